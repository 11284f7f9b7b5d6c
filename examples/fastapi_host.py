"""Agents in a FastAPI app whose users have JWTs. POST /ai/run/flock with the header "Authorization: Bearer <JWT>".

pip install fastapi pyjwt; JWT_SECRET=$(openssl rand -hex 32) uvicorn examples.fastapi_host:app
"""

import os
import secrets
from typing import Annotated

import jwt
from fastapi import Depends, FastAPI, HTTPException
from starlette.requests import HTTPConnection

from examples.plain_function import flock
from flock.runs import Principal
from flockapi import create_app

SECRET = os.environ.get("JWT_SECRET") or secrets.token_hex()  # all workers need the same one


def user_of(connection: HTTPConnection) -> Principal:
    """Return the user of a request. A dependency of the host's own routes, and ``auth=`` of the mounted app."""
    token = connection.headers.get("authorization", "").removeprefix("Bearer ")
    try:
        claims = jwt.decode(token, SECRET, algorithms=["HS256"], options={"require": ["exp", "sub"]})
    except jwt.InvalidTokenError as exc:  # the client reads why, such as "Signature has expired"
        headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise HTTPException(401, f"The token is not valid: {exc}.", headers) from exc
    return Principal(name=claims["sub"], admin=claims.get("role") == "admin")  # admins see all runs, and /ai/metrics


ai = create_app(flock, auth=user_of)  # a FastAPI dependency would not protect a mounted app
app = FastAPI(lifespan=lambda _: ai.lifespan())
app.mount("/ai", ai)


@app.get("/me")
def me(user: Annotated[Principal, Depends(user_of)]) -> str:
    return user.name

"""Agents in a FastAPI app. POST /ai/run/flock with the header "Authorization: Bearer secret".

ANN_TOKEN=secret uvicorn examples.fastapi_host:app
"""

import os
import secrets
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from starlette.requests import HTTPConnection

from examples.plain_function import flock
from flock.runs import Principal
from flockapi import create_app

TOKEN = os.environ.get("ANN_TOKEN") or secrets.token_urlsafe()


def user_of(connection: HTTPConnection) -> Principal:
    """Return the user of a request. A dependency of the host's own routes, and ``auth=`` of the mounted app."""
    sent = connection.headers.get("authorization", "").encode()
    if not secrets.compare_digest(sent, f"Bearer {TOKEN}".encode()):
        raise HTTPException(401)
    return Principal(name="ann")


ai = create_app(flock, auth=user_of)  # a FastAPI dependency would not protect a mounted app
app = FastAPI(lifespan=lambda _: ai.lifespan())
app.mount("/ai", ai)


@app.get("/me")
def me(user: Annotated[Principal, Depends(user_of)]) -> str:
    return user.name

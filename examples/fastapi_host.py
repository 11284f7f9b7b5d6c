"""ANN_TOKEN=secret uvicorn examples.fastapi_host:app, and POST /ai/run/flock with "Authorization: Bearer secret"."""

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
    """Who sent a request: a dependency of the host's own routes, and ``auth=`` of the flock."""
    sent = connection.headers.get("authorization", "").encode()
    if not secrets.compare_digest(sent, f"Bearer {TOKEN}".encode()):
        raise HTTPException(401)
    return Principal(name="ann")


ai = create_app(flock, auth=user_of)  # a dependency of FastAPI would not protect what is mounted
app = FastAPI(lifespan=lambda _: ai.lifespan())
app.mount("/ai", ai)


@app.get("/me")
def me(user: Annotated[Principal, Depends(user_of)]) -> str:
    return user.name

"""uvicorn examples.fastapi_host:app, and POST /ai/run/flock."""

from fastapi import FastAPI

from examples.plain_function import flock
from flockapi import create_app

ai = create_app(flock)
app = FastAPI(lifespan=lambda _: ai.lifespan())
app.mount("/ai", ai)

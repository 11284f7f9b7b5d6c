"""An asgi.py: DJANGO_SETTINGS_MODULE=mysite.settings uvicorn examples.django_host:app, and POST /ai/run/flock."""

from django.core.asgi import get_asgi_application
from starlette.applications import Starlette
from starlette.routing import Mount

from examples.plain_function import flock
from flockapi import create_app

ai = create_app(flock)
app = Starlette(routes=[Mount("/ai", ai), Mount("/", get_asgi_application())], lifespan=lambda _: ai.lifespan())

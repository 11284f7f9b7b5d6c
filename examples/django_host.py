"""Agents in a Django site. Log in to the site, then POST /ai/run/flock.

DJANGO_SETTINGS_MODULE=mysite.settings uvicorn examples.django_host:app
"""

from importlib import import_module

from django.conf import settings
from django.contrib.auth import aget_user
from django.core.asgi import get_asgi_application
from django.http import HttpRequest
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount

from examples.plain_function import flock
from flock.runs import Principal
from flockapi import create_app

django = get_asgi_application()


async def user_of(connection: HTTPConnection) -> Principal | None:
    """Return the logged-in user. Django's middleware does not run for the mounted app, so read the session here."""
    request = HttpRequest()
    session_key = connection.cookies.get(settings.SESSION_COOKIE_NAME)
    request.session = import_module(settings.SESSION_ENGINE).SessionStore(session_key)
    user = await aget_user(request)
    return Principal(name=user.get_username()) if user.is_authenticated else None


ai = create_app(flock, auth=user_of)
app = Starlette(routes=[Mount("/ai", ai), Mount("/", django)], lifespan=lambda _: ai.lifespan())

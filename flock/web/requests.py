"""What a request says of itself: its id, and the paths that links begin with."""

import re
import secrets
from urllib.parse import quote

from starlette.requests import Request
from starlette.types import Scope

__all__ = ["path_of", "request_id_for", "request_id_of", "root_path"]


def root_path(scope: Scope) -> str:
    """The path under which this app is mounted or proxied; links begin with it."""
    path: str = scope.get("root_path", "")
    return path.rstrip("/")


def path_of(scope: Scope) -> str:
    """The path of the request, as a link has it. ``Request.url`` fails if the query is not UTF-8."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=~")


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["flock.request_id"]
    return request_id


def request_id_for(scope: Scope) -> str:
    """The id that the client sent, or a new one."""
    sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return sent if re.fullmatch(r"[\w.:-]{1,128}", sent, re.ASCII) else secrets.token_hex(16)

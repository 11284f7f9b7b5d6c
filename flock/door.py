"""The door of an app, as ASGI middleware: what is asked of a request before anything of its body is read."""

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from flock.auth import KeyRing, Rate, check_host, check_origin
from flock.errors import FlockError, Unauthenticated
from flock.runs import Principal

__all__ = ["CORS", "Auth", "Door", "by_key", "principal_of"]

#: Says who asks, or None where nobody may know; it reads headers, a session, a certificate, and never the body.
Auth = Callable[[HTTPConnection], Awaitable[Principal | None] | Principal | None]

#: What a page of another origin may send and read, where the owner lets it.
CORS: Mapping[str, Any] = {
    "allow_methods": ("GET", "POST", "DELETE"),
    "allow_headers": (
        *("Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "traceparent"),
        "X-Request-ID",
    ),
    "expose_headers": (
        *("Flock-Run-Status", "Idempotency-Replayed", "Link", "Location", "Preference-Applied", "Retry-After"),
        "X-Request-ID",
    ),
}

#: What browsers send with what a page asks for, and hardly anybody else does.
FROM_PAGES = (b"origin", b"sec-fetch-site")

#: What changes nothing (RFC 9110, section 9.2.1).
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Door:
    """Is this server meant, may that page do it, who is it, and is it not too much?

    Args:
        is_open: whether a scope leads to what everybody may see.
        refuse: makes the answer of an error.
        auth: knows principals; None lets everybody in.
        hosts: what ``Host`` may say, without the port; None is anything.
        origins: pages of other origins that may change something.
        rate: how much each principal may ask for; None is any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        is_open: Callable[[Scope], bool],
        refuse: Callable[[Request, Exception], Awaitable[Response]],
        auth: Auth | None,
        hosts: Collection[str] | None,
        origins: Collection[str],
        max_header_bytes: int,
        rate: Rate | None,
    ) -> None:
        self._app = app
        self._is_open = is_open
        self._refuse = refuse
        self._max_header_bytes = max_header_bytes
        self._rate = rate
        self._auth = auth
        self._hosts = hosts
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection, length, is_from_page = HTTPConnection(scope), 0, False
        for name, value in scope["headers"]:  # once, since each look-up goes through all of them
            length += len(name) + len(value)
            is_from_page = is_from_page or name in FROM_PAGES
        try:
            if length > self._max_header_bytes:
                raise HTTPException(431, f"The headers are longer than {self._max_header_bytes} bytes together.")
            if self._hosts is not None:
                check_host(connection.headers.get("host", ""), self._hosts)
            if is_from_page and scope.get("method") not in SAFE_METHODS:
                check_origin(connection.headers, self._origins)
            if (self._auth is not None or self._rate is not None) and not self._is_open(scope):
                if self._auth is not None:
                    scope["flock.principal"] = await _identify(connection, self._auth)
                if self._rate is not None:
                    scope["flock.headers"] = self._rate.take(principal_of(connection))
        except (HTTPException, FlockError) as exc:
            if scope["type"] == "websocket":
                await WebSocketClose(1008)(scope, receive, send)  # RFC 6455, 7.4.1: policy violation
            else:
                await (await self._refuse(Request(scope, receive), exc))(scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def _identify(connection: HTTPConnection, auth: Auth) -> Principal:
    found = auth(connection)
    principal = await found if inspect.isawaitable(found) else found
    if isinstance(principal, Principal):
        return principal
    raise Unauthenticated("This needs a key that is known here. With curl: -H 'Authorization: Bearer YOUR_KEY'")


def by_key(keys: KeyRing) -> Auth:
    """``auth`` by ``Authorization: Bearer`` (RFC 6750) or ``X-API-Key``."""

    async def auth(connection: HTTPConnection) -> Principal | None:
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = connection.headers.get("x-api-key", "")
        return keys.find(key.strip())

    return auth


def principal_of(request: HTTPConnection) -> Principal | None:
    """Who asks, as ``auth`` said; None where the app has none."""
    principal: Principal | None = request.scope.get("flock.principal")
    return principal

"""The router of an app: it checks access before anything of a request's body is read."""

import inspect
import ipaddress
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException, WebSocketException
from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Match, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from flock.errors import FlockError, Forbidden, Unauthenticated
from flock.runs import Principal
from flock.web.auth import Caller, KeyRing, RateLimit, check_host, check_origin

__all__ = [
    "CORS",
    "AppRoute",
    "AppRouter",
    "Auth",
    "Needs",
    "PublicMount",
    "RouteMatch",
    "api_key_auth",
    "caller_of",
    "principal_of",
]

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


#: What a route needs of a request: nothing, to be admitted by ``auth``, or that the principal is an admin, if there is
#: one.
Needs = Literal["nothing", "access", "admin"]


class AppRoute(Route):
    """A route that declares what it needs. A route of Starlette's own needs access."""

    def __init__(self, needs: Needs, methods: str, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, methods=methods.split(), **options)
        self.needs = needs


class PublicMount(Mount):
    """A mount that needs nothing."""

    needs: Needs = "nothing"


class RouteMatch(msgspec.Struct):
    """What the router found out about a request, in one object that middleware which copies the scope shares.

    Attributes:
        route: the route that answers; None if no route matches.
        headers: what the response says about the rate limit.
    """

    route: BaseRoute | None = None
    headers: Mapping[str, str] = {}


class AppRouter(Router):
    """A router that admits a request to the route that answers it, and to no other.

    It finds the route once, as Starlette does: the first that matches path and method, otherwise the first that matches
    the path. Only a route that declares that it needs nothing answers without authentication, and is not counted
    against *rate*. All others need it, also those that a host adds later, and so do unknown paths.

    Args:
        auth: identifies principals; None lets everybody in.
        is_anonymous: nobody is identified, here or by a host. So what is not open is kept from pages of other origins,
            also if it changes nothing: a page could make the browser of somebody who can connect ask for it.
        hosts: what ``Host`` may say, without the port; None is anything.
        origins: pages of other origins that may change something.
        rate: how much each principal may ask for; None is any.
        options: see ``starlette.routing.Router``.
    """

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        *,
        auth: Auth | None,
        is_anonymous: bool,
        hosts: Collection[str] | None,
        origins: Collection[str],
        max_header_bytes: int,
        rate: RateLimit | None,
        **options: Any,
    ) -> None:
        super().__init__(routes, redirect_slashes=False, **options)  # to an address that ``Host`` names
        self._auth = auth
        self._is_anonymous = is_anonymous
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = origins
        self._max_header_bytes = max_header_bytes
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        route, child_scope = self._match(scope)
        found: RouteMatch = scope.setdefault("flock.found", RouteMatch())
        found.route = route
        needs: Needs = getattr(route, "needs", "access")
        try:
            self._check_headers(scope, is_kept=self._is_anonymous and route is not None and needs != "nothing")
            if needs != "nothing":
                await self._admit(scope, found, needs)
        except (HTTPException, FlockError) as exc:
            if scope["type"] == "websocket":
                raise WebSocketException(1008) from exc  # RFC 6455, 7.4.1: policy violation
            raise
        if route is None:
            await super().__call__(scope, receive, send)
        else:
            scope.setdefault("router", self)
            scope["route"] = route
            scope.update(child_scope)
            await route.handle(scope, receive, send)

    def _match(self, scope: Scope) -> tuple[BaseRoute | None, Scope]:
        """The route that answers *scope*, and what it adds to the scope."""
        partial: tuple[BaseRoute | None, Scope] = None, {}
        for route in self.routes:
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                return route, child_scope
            if match is Match.PARTIAL and partial[0] is None:
                partial = route, child_scope
        return partial

    def _check_headers(self, scope: Scope, *, is_kept: bool) -> None:
        """*is_kept*: from pages of other origins, whatever the method."""
        length, is_from_page = 0, False
        for name, value in scope["headers"]:  # once, since each look-up goes through all of them
            length += len(name) + len(value)
            is_from_page = is_from_page or name in FROM_PAGES
        if length > self._max_header_bytes:
            raise HTTPException(431, f"The headers are longer than {self._max_header_bytes} bytes together.")
        headers = Headers(scope=scope)
        if self._hosts is not None:
            check_host(headers.get("host", ""), self._hosts)
        if is_from_page and (is_kept or scope.get("method") not in SAFE_METHODS):
            check_origin(headers, self._origins)

    async def _admit(self, scope: Scope, found: RouteMatch, needs: Needs) -> None:
        connection = HTTPConnection(scope)
        if self._auth is not None:
            scope["flock.principal"] = await _identify(connection, self._auth)
        principal = principal_of(connection)
        if self._rate is not None:
            found.headers = self._rate.take(principal)
        if needs == "admin" and principal is not None and not principal.admin:
            raise Forbidden(f"{scope['path']} shows what belongs to everybody, and {principal.name!r} is not an admin.")


async def _identify(connection: HTTPConnection, auth: Auth) -> Principal:
    found = auth(connection)
    principal = await found if inspect.isawaitable(found) else found
    if isinstance(principal, Principal):
        return principal
    raise Unauthenticated("This needs a key that is known here. With curl: -H 'Authorization: Bearer YOUR_KEY'")


def api_key_auth(keys: KeyRing) -> Auth:
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


def caller_of(request: HTTPConnection) -> Caller:
    """Whose share the request counts for: that of its principal, or else of the address that it comes from.

    All addresses of an IPv6 network of 64 bits are one caller, since one machine can use each of them.
    """
    principal, host = principal_of(request), request.client.host if request.client else ""
    if principal is not None:
        return "principal", principal.name
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # a Unix socket has no address
        return "address", host
    if isinstance(address, ipaddress.IPv4Address):
        return "address", str(address)
    return ("address", str(address.ipv4_mapped)) if address.ipv4_mapped else ("network", str(int(address) >> 64))

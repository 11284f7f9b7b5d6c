"""The router of an app. It checks access before the body of a request is read."""

import functools
import inspect
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from typing import Any, Literal

import anyio.to_thread
import msgspec
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException, WebSocketException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.routing import BaseRoute, Match, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from flock.agents.signature import is_async
from flock.errors import FlockError, Forbidden, Unauthenticated
from flock.logs import REQUEST
from flock.runs import Principal
from flock.runs.text import valid_traceparent
from flock.web.auth import Caller, KeyRing, RateLimit, check_host, check_origin
from flock.web.requests import traceparent_of

#: Returns the principal of a request, or None if it cannot be identified. It may read headers, a session or a
#: certificate, but not the body. A plain function is called in a thread, so it may wait.
Auth = Callable[[HTTPConnection], Awaitable[Principal | None] | Principal | None]

#: The methods and headers that a page of an allowed origin may use.
CORS: Mapping[str, Any] = {
    "allow_methods": ("GET", "POST", "DELETE"),
    "allow_headers": (
        *("Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "traceparent"),
        *("X-Request-ID", "MCP-Protocol-Version", "Mcp-Session-Id", "Mcp-Method", "Mcp-Name", "A2A-Version"),
        *(f"X-Stainless-{name}" for name in ("Arch", "Lang", "OS", "Package-Version", "Runtime", "Runtime-Version")),
        *("X-Stainless-Helper-Method", "X-Stainless-Retry-Count", "X-Stainless-Timeout"),  # OpenAI's client sends them
    ),
    "expose_headers": (
        *("Flock-Run-Status", "Idempotency-Replayed", "Link", "Location", "Preference-Applied", "Retry-After"),
        *("X-Request-ID", "Flock-Run-Id", "Mcp-Session-Id"),
    ),
}

#: The headers that browsers send for requests from pages, and other clients rarely send.
BROWSER_HEADERS = frozenset({b"origin", b"sec-fetch-site"})

#: The methods that change nothing (RFC 9110, section 9.2.1).
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

#: The access that a route needs: none, authentication by ``auth``, or, if there are principals, one that is an admin.
Needs = Literal["nothing", "access", "admin"]


class AppRoute(Route):
    """A route that declares the access it needs. A plain Starlette route needs "access"."""

    def __init__(self, needs: Needs, methods: str, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, methods=methods.split(), **options)
        self.app = self._respond
        self.needs = needs
        #: what all paths of the route begin with, so that most routes need no regular expression to be ruled out
        self.beginning, parameter, _ = path.partition("{")
        self._is_literal = not parameter

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Like that of ``Route``, but a path without parameters is compared without a regular expression."""
        if not self._is_literal or scope.get("root_path"):
            return super().matches(scope)
        if scope["type"] != "http" or scope["path"] != self.path:
            return Match.NONE, {}
        match = Match.FULL if scope["method"] in (self.methods or ()) else Match.PARTIAL
        return match, {"endpoint": self.endpoint, "path_params": scope.get("path_params", {})}

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Like the app of ``Route``, which also handles exceptions. Here the app handles them, once."""
        response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


class PublicMount(Mount):
    """A mount that needs no authentication."""

    needs: Needs = "nothing"


class RouteMatch(msgspec.Struct):
    """The router's result for a request. It is one object, so that it is shared if middleware copies the scope.

    Attributes:
        route: the route that handles the request; None if no route matches.
        headers: the rate limit headers of the response.
    """

    route: BaseRoute | None = None
    headers: Mapping[str, str] = {}


class AppRouter(Router):
    """A router that checks the access for exactly the route that will handle the request.

    It selects the route once, with Starlette's rule: the first that matches path and method, otherwise the first that
    matches the path. Only routes that declare "nothing" work without authentication, and they do not count against
    *rate*. All others need authentication, including routes that a host adds later, and unknown paths.

    Args:
        auth: identifies principals; None allows every request.
        is_anonymous: True if neither this app nor its host identifies users. If so, pages of other origins cannot even
            read protected routes: such a page could send requests through the browser of a user who can connect.
        hosts: allowed values of ``Host``, without the port; None allows any.
        origins: other origins whose pages may change something.
        rate: the rate limit of each caller; None means no limit.
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
        super().__init__(routes, redirect_slashes=False, **options)  # a redirect would use the unchecked ``Host``
        self._auth = auth
        self._auth_needs_thread = auth is not None and not is_async(auth)
        self._is_anonymous = is_anonymous
        self._hosts = None if hosts is None else {host.lower() for host in hosts}
        self._origins = origins
        self._max_header_bytes = max_header_bytes
        self._rate = rate
        #: for routes that need no admin
        self._checks_access = auth is not None or rate is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await super().__call__(scope, receive, send)
            return
        route, child_scope = self._match(scope)
        route_match: RouteMatch = scope.setdefault("flock.found", RouteMatch())
        route_match.route = route
        needs: Needs = getattr(route, "needs", "access")
        try:
            is_protected = self._is_anonymous and route is not None and needs != "nothing"
            self._check_headers(scope, is_protected=is_protected)
            if needs == "admin" or (needs != "nothing" and self._checks_access):
                await self._authorise(scope, route_match, needs)
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
            acting = REQUEST.set(functools.partial(_facts_of, HTTPConnection(scope)))
            try:
                await route.handle(scope, receive, send)
            finally:
                REQUEST.reset(acting)

    def _match(self, scope: Scope) -> tuple[BaseRoute | None, Scope]:
        """Return the route for *scope*, and its additions to the scope."""
        partial: tuple[BaseRoute | None, Scope] = None, {}
        path = None if scope.get("root_path") else scope["path"]
        for route in self.routes:
            if path is not None and isinstance(route, AppRoute) and not path.startswith(route.beginning):
                continue
            match, child_scope = route.matches(scope)
            if match is Match.FULL:
                return route, child_scope
            if match is Match.PARTIAL and partial[0] is None:
                partial = route, child_scope
        return partial

    def _check_headers(self, scope: Scope, *, is_protected: bool) -> None:
        """Check the size, the host and the origin. With *is_protected*, check the origin for every method."""
        length, is_from_browser = 0, False
        for name, value in scope["headers"]:
            length += len(name) + len(value)
            is_from_browser |= name in BROWSER_HEADERS
        if length > self._max_header_bytes:
            raise HTTPException(
                431, f"The headers are longer than {self._max_header_bytes} bytes in total. Send fewer or shorter ones."
            )
        headers = Headers(scope=scope)
        if self._hosts is not None:
            check_host(headers.get("host", ""), self._hosts)
        if is_from_browser and (is_protected or scope.get("method") not in SAFE_METHODS):
            check_origin(headers, {*self._origins, *_allowed_by_host(scope, headers.get("origin"))})

    async def _authorise(self, scope: Scope, route_match: RouteMatch, needs: Needs) -> None:
        connection = HTTPConnection(scope)
        if self._auth is not None:
            try:
                result = await _in_thread(self._auth, connection) if self._auth_needs_thread else self._auth(connection)
                identified = await result if inspect.isawaitable(result) else result
                if not isinstance(identified, Principal):
                    raise Unauthenticated("The credentials of this request are missing, unknown or expired.")
            except Unauthenticated:
                if self._rate is not None:  # guesses count for the address
                    route_match.headers = self._rate.take(caller_of(connection))
                raise
            scope["flock.principal"] = identified
        principal = principal_of(connection)
        if self._rate is not None:
            route_match.headers = self._rate.take(caller_of(connection))
        if needs == "admin" and principal is not None and not principal.admin:
            raise Forbidden(f"{scope['path']} is only for admins, and {principal.name!r} is not an admin.")


def _facts_of(request: HTTPConnection) -> Mapping[str, Any]:
    """Return what identifies a request in the log."""
    principal, trace = principal_of(request), valid_traceparent(traceparent_of(request))
    facts = {"request_id": request.scope.get("flock.request_id"), "request_trace_id": trace and trace[3:35]}
    return facts | {"principal": principal and principal.name}


async def _in_thread(auth: Auth, connection: HTTPConnection) -> Any:
    """Call a plain function in a thread, and keep the context variables that it sets.

    Cancellation: when the function has returned.
    """

    def call() -> tuple[Any, Mapping[ContextVar[Any], Any]]:
        before, result = copy_context(), auth(connection)
        return result, {each: value for each, value in copy_context().items() if before.get(each, before) is not value}

    result, variables = await anyio.to_thread.run_sync(call)
    for variable, value in variables.items():
        variable.set(value)
    return result


def api_key_auth(keys: KeyRing) -> Auth:
    """Return an ``auth`` function for ``Authorization: Bearer`` (RFC 6750) and ``X-API-Key``.

    A key that is sent twice is unknown, since a proxy may have looked at the other one.
    """

    async def auth(connection: HTTPConnection) -> Principal:
        scheme, _, key = ", ".join(connection.headers.getlist("authorization")).partition(" ")
        if scheme.lower() != "bearer":
            key = ", ".join(connection.headers.getlist("x-api-key"))
        principal = keys.find(key.strip())
        if principal is None:
            raise Unauthenticated("The API key is missing or unknown. With curl: -H 'Authorization: Bearer YOUR_KEY'")
        return principal

    return auth


def _cors_of(*apps: Any) -> Iterator[tuple[Collection[str], str]]:
    """Yield ``allow_origins`` and ``allow_origin_regex`` of each CORSMiddleware of *apps*."""
    for app in apps:
        for middleware in getattr(app, "user_middleware", ()):
            if isinstance(middleware.cls, type) and issubclass(middleware.cls, CORSMiddleware):
                given = middleware.kwargs
                yield next(iter(middleware.args), given.get("allow_origins", ())), given.get("allow_origin_regex") or ""


def allows_any_origin(*apps: Any) -> bool:
    """Whether a CORSMiddleware of *apps* allows the pages of all sites."""
    return any("*" in origins or _matches_any(pattern) for origins, pattern in _cors_of(*apps))


def _matches_any(pattern: str) -> bool:
    return any(re.fullmatch(pattern, f"{scheme}://a-page-of-anybody.com") for scheme in ("http", "https"))


def _allowed_by_host(scope: Scope, origin: str | None) -> Iterator[str]:
    """Yield the origins that CORSMiddleware of this app or its host allows. "null", or allowing all sites, allows none.

    A browser sends no cookies to ``*``, but here its network address alone may give it access.
    """
    for origins, pattern in _cors_of(scope.get("app"), scope.get("flock.host")):
        yield from (each for each in origins if each not in ("*", "null"))
        if origin not in (None, "null") and re.fullmatch(pattern, origin) and not _matches_any(pattern):
            yield origin


def principal_of(request: HTTPConnection) -> Principal | None:
    """Return the principal that ``auth`` identified, or None if the app has no ``auth``."""
    principal: Principal | None = request.scope.get("flock.principal")
    return principal


def caller_of(request: HTTPConnection) -> Caller:
    """Return the caller for limits: the principal of the request, or the client's address if there is none.

    All addresses of a 64-bit IPv6 network are one caller, since one machine can use all of them.
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

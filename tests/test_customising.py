"""Everything can be changed without a fork: routes, middleware, handlers, lifespan, docs, the specification."""

import contextlib
import functools
import re
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from flock.core import Flock
from flock.errors import AgentNotFound, DefinitionError
from flock.runs import Principal
from flock.web.options import AppOptions
from flockapi import FlockAPI, create_app, engine_of, healthz, principal_of
from tests.support import PATIENCE_S, ROOT
from tests.support.engines import until
from tests.support.flocks import sample_flock
from tests.support.http import client_of, post_run
from tests.support.servers import Served, running

pytestmark = pytest.mark.anyio


async def double(request: Request) -> Response:
    """A route of the host that runs an agent."""
    number = int(request.query_params["of"])
    engine = await engine_of(request)
    run = await engine.submit("add", msgspec.Raw(b'{"a": %d, "b": %d}' % (number, number)), is_async=False)
    run = await engine.wait(run.run_id)
    result = msgspec.json.decode(run.result or b"")["result"]
    return JSONResponse({"double": result, "agents": len(request.app.flock.agents)})


PATHS = {"/double": {"get": {"operationId": "double", "responses": {"200": {"description": "Twice the number."}}}}}


async def test_a_route_of_the_host_runs_agents_and_is_described() -> None:
    app = create_app(sample_flock(), store=":memory:", routes=[Route("/double", double)], openapi_paths=PATHS)
    async with client_of(app) as client:  # no lifespan ran, so the route starts the engine
        assert (await client.get("/double?of=21")).json() == {"double": 42, "agents": 7}
        spec = (await client.get("/openapi.json")).json()
        assert spec["paths"]["/double"] == PATHS["/double"]
        assert "/run/flock" in spec["paths"]
        assert yaml.safe_load((await client.get("/openapi.yaml")).text) == spec


async def test_a_route_of_the_host_takes_precedence() -> None:
    async def agents(request: Request) -> Response:
        return Response("none of your business")

    async with client_of(create_app(sample_flock(), routes=[Route("/agents", agents)])) as client:
        assert (await client.get("/agents")).text == "none of your business"
        assert (await client.get("/agents/add")).status_code == 200


async def test_middleware_sees_each_request() -> None:
    async def stamp(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["X-Stamp"] = "seen"
        return response

    app = create_app(sample_flock(), store=":memory:", middleware=[Middleware(BaseHTTPMiddleware, dispatch=stamp)])
    async with client_of(app) as client:
        run = await client.post("/run/flock", json={"agent_name": "add", "inputs": {"a": 1}})
        assert (run.headers["X-Stamp"], run.json()["result"]) == ("seen", {"result": 3})
        assert (await client.get("/run/42")).headers["X-Stamp"] == "seen"


async def test_an_exception_handler_of_the_host_is_used() -> None:
    async def unknown(request: Request, exc: Exception) -> Response:
        return Response("who?", 418)

    app = create_app(sample_flock(), exception_handlers={AgentNotFound: unknown})
    async with client_of(app) as client:
        assert (await client.get("/agents/nobody")).status_code == 418
        assert (await client.get("/run/42")).json()["title"] == "Unknown run"


async def test_a_lifespan_of_the_host_runs_inside_the_apps_own() -> None:
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        await app.engine.check_ready()
        seen.append("in")
        yield
        await app.engine.check_ready()
        seen.append("out")

    app = create_app(sample_flock(), store=":memory:", lifespan=lifespan)
    async with app.lifespan(), client_of(app) as client:
        assert seen == ["in"]
        assert (await client.get("/readyz")).status_code == 200
    assert seen == ["in", "out"]


async def api_key_auth(connection: HTTPConnection) -> Principal | None:
    names = {"Bearer of-ann": "ann"}
    name = names.get(connection.headers.get("authorization", ""))
    return None if name is None else Principal(name=name)


async def whoami(request: Request) -> Response:
    principal = principal_of(request)
    assert principal is not None
    return JSONResponse({"name": principal.name})


async def test_auth_guards_all_routes_except_docs_and_health() -> None:
    routes = [Route("/whoami", whoami)]
    app = create_app(sample_flock(), store=":memory:", server_name='A "name"', auth=api_key_auth, routes=routes)
    body = {"agent_name": "add", "inputs": {"a": 1}}
    async with client_of(app) as client:
        for method, path in (("POST", "/run/flock"), ("GET", "/runs"), ("GET", "/whoami"), ("GET", "/nowhere")):
            refused = await client.request(method, path, content=b"not even JSON")
            assert (refused.status_code, refused.json()["title"]) == (401, "Unauthorized")
            assert refused.headers["WWW-Authenticate"] == 'Bearer realm="A name"'
            assert refused.json()["request_id"] == refused.headers["X-Request-ID"]
            assert refused.headers["Connection"] == "close", "the body was not read"
        for path in ("/docs", "/redoc", "/static/docs.js", "/openapi.yaml", "/openapi.json", "/healthz", "/readyz"):
            assert (await client.get(path)).status_code == 200
        client.headers["Authorization"] = "Bearer of-ann"
        assert (await client.post("/run/flock", json=body)).json()["result"] == {"result": 3}
        assert (await client.get("/whoami")).json() == {"name": "ann"}
        assert (await client.get("/nowhere")).status_code == 404
    mounted = Starlette(routes=[Mount("/ai", app)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(mounted), base_url="http://t") as client:
        assert (await client.get("/ai/healthz")).status_code == 200
        assert (await client.get("/ai/runs")).status_code == 401


async def test_auth_sees_the_scope_of_host_middleware_and_may_raise_its_own_error() -> None:
    async def by_session(connection: HTTPConnection) -> Principal | None:
        if connection.scope["session"] == "expired":
            raise HTTPException(403, "Log in again.")
        return Principal(name=connection.scope["session"])

    class Sessions:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app({**scope, "session": scope["query_string"].decode()}, receive, send)

    routes = [Route("/whoami", whoami)]
    middleware = [Middleware(Sessions)]
    async with client_of(create_app(sample_flock(), auth=by_session, middleware=middleware, routes=routes)) as client:
        assert (await client.get("/whoami?ann")).json() == {"name": "ann"}
        refused = (await client.get("/whoami?expired")).json()
        assert (refused["status"], refused["detail"]) == (403, "Log in again.")


class AsyncAuth:
    async def __call__(self, connection: HTTPConnection) -> Principal:
        return identified(connection)


class PlainAuth:
    def __call__(self, connection: HTTPConnection) -> Principal:
        return identified(connection)


def identified(connection: HTTPConnection, name: str = "ann") -> Principal:
    """Identify each caller as the thread that executes this, by the number of that thread."""
    return Principal(name=f"{name} {threading.get_ident()}")


async def identified_async(connection: HTTPConnection, name: str = "ann") -> Principal:
    return identified(connection, name)


@pytest.mark.parametrize(
    ("auth", "in_thread"),
    [
        pytest.param(identified, True, id="function"),
        pytest.param(PlainAuth(), True, id="object"),
        pytest.param(functools.partial(identified, name="ben"), True, id="partial"),
        pytest.param(lambda connection: identified_async(connection), True, id="a plain wrapper of an async function"),
        pytest.param(identified_async, False, id="async function"),
        pytest.param(AsyncAuth(), False, id="async object"),
        pytest.param(AsyncAuth().__call__, False, id="async method"),
        pytest.param(functools.partial(identified_async, name="ben"), False, id="partial of an async function"),
        pytest.param(functools.partial(AsyncAuth()), False, id="partial of an async object"),
    ],
)
async def test_only_a_plain_auth_function_runs_in_a_thread(auth: Any, in_thread: bool) -> None:
    app = create_app(sample_flock(), store=":memory:", auth=auth, routes=[Route("/whoami", whoami)])
    async with client_of(app) as client:
        name = (await client.get("/whoami")).json()["name"]
    is_wrapper = getattr(auth, "__name__", "") == "<lambda>"  # its coroutine is awaited in the event loop
    assert (int(name.split()[1]) != threading.get_ident()) == (in_thread and not is_wrapper)


async def test_a_plain_auth_function_that_waits_holds_up_no_other_request() -> None:
    started, may_go = threading.Event(), threading.Event()

    def auth(connection: HTTPConnection) -> Principal:
        started.set()
        assert may_go.wait(PATIENCE_S)
        return Principal(name="ann")

    app = create_app(sample_flock(), store=":memory:", auth=auth)
    async with client_of(app) as client, anyio.create_task_group() as tasks:
        statuses: list[int] = []

        async def ask() -> None:
            statuses.append((await client.get("/runs")).status_code)

        tasks.start_soon(ask)
        await until(started.is_set)
        assert (await client.get("/healthz")).status_code == 200
        assert statuses == []
        may_go.set()
    assert statuses == [200]


async def test_api_keys_are_checked_without_a_thread() -> None:
    """Here none is free."""
    key = {"Authorization": "Bearer fk_0123456789abcdef"}
    app = create_app(sample_flock(), store=":memory:", api_keys={"ann": "fk_0123456789abcdef"})
    limiter, borrowers = anyio.to_thread.current_default_thread_limiter(), list[object]()
    async with client_of(app) as client:
        try:
            while limiter.available_tokens:
                borrowers.append(object())
                limiter.acquire_on_behalf_of_nowait(borrowers[-1])
            with anyio.fail_after(PATIENCE_S):
                assert (await client.get("/runs", headers=key)).status_code == 200
        finally:
            for borrower in borrowers:
                limiter.release_on_behalf_of(borrower)


@pytest.mark.parametrize(("error", "status"), [(HTTPException(403, "Log in."), 403), (ValueError("bug"), 500)])
async def test_an_exception_of_a_plain_auth_function_is_that_of_an_async_one(error: Exception, status: int) -> None:
    def plain(connection: HTTPConnection) -> Principal:
        raise error

    async def is_async(connection: HTTPConnection) -> Principal:
        raise error

    for auth in (plain, is_async):
        async with client_of(create_app(sample_flock(), store=":memory:", auth=auth)) as client:
            assert (await client.get("/runs")).status_code == status


async def test_a_run_sees_the_context_variables_that_a_plain_auth_function_sets() -> None:
    user, flock = ContextVar("user", default="nobody"), Flock()

    def auth(connection: HTTPConnection) -> Principal:
        user.set("ann")
        return Principal(name="ann")

    @flock.agent
    async def name() -> str:
        return user.get()

    async with client_of(create_app(flock, store=":memory:", auth=auth)) as client:
        assert (await post_run(client, "name")).json()["result"] == {"result": "ann"}


async def test_a_request_that_is_cancelled_during_its_auth_ends_with_the_function() -> None:
    started, may_go, has_ended = threading.Event(), threading.Event(), threading.Event()

    def auth(connection: HTTPConnection) -> Principal:
        started.set()
        assert may_go.wait(PATIENCE_S)
        has_ended.set()
        return Principal(name="ann")

    async with client_of(create_app(sample_flock(), store=":memory:", auth=auth)) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "/runs")
            await until(started.is_set)
            tasks.cancel_scope.cancel()
            may_go.set()
        assert has_ended.is_set()
        assert anyio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
        assert (await client.get("/runs")).status_code == 200


PAGE, OTHER_PAGE = "https://page.example", "https://other.example"


@pytest.mark.parametrize("where", ["host", "middleware="])
async def test_an_origin_that_the_host_names_in_its_cors_middleware_is_allowed(where: str) -> None:
    cors = [Middleware(CORSMiddleware, allow_origins=[PAGE], allow_methods=["POST"], allow_headers=["content-type"])]
    app = create_app(sample_flock(), store=":memory:", auth="host", middleware=cors if where == "middleware=" else ())
    host = Starlette(routes=[Mount("/ai", app)], middleware=cors if where == "host" else ())
    add = {"agent_name": "add", "inputs": {"a": 1}}
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t/ai") as client:
        for origin, status in ((PAGE, 200), (OTHER_PAGE, 403), ("null", 403)):
            sent = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
            preflight = await client.options("/run/flock", headers=sent | ask)
            answer = await client.post("/run/flock", json=add, headers=sent)
            assert (preflight.status_code == 200) == (status == 200)
            assert answer.status_code == status
            assert answer.headers.get("Access-Control-Allow-Origin") == (origin if status == 200 else None)
            if status == 403:
                assert "cors_origins=" in answer.json()["detail"]


async def test_null_is_no_origin_that_a_host_can_allow() -> None:
    """Any site can send it from a sandboxed frame. An origin that is passed by position is allowed, too."""
    app = create_app(sample_flock(), store=":memory:", auth="host")
    host = Starlette(routes=[Mount("/ai", app)], middleware=[Middleware(CORSMiddleware, ["null", PAGE])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t/ai") as client:
        for origin, status in ((PAGE, 200), ("null", 403)):
            sent = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
            add = {"agent_name": "add", "inputs": {"a": 1}}
            assert (await client.post("/run/flock", json=add, headers=sent)).status_code == status


async def test_an_origin_that_the_pattern_of_a_host_matches_is_allowed() -> None:
    app = create_app(sample_flock(), store=":memory:", auth="host")
    cors = Middleware(CORSMiddleware, allow_origin_regex=r"https://(.+\.)?page\.example|null")
    host = Starlette(routes=[Mount("/ai", app)], middleware=[cors])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t/ai") as client:
        for origin, status in (("https://pr-7.page.example", 422), (f"{PAGE}.evil", 403), ("null", 403)):
            answer = await client.post("/run/flock", json={"agent_name": "add"}, headers={"Origin": origin})
            assert answer.status_code == status


ANY_SITE = pytest.mark.parametrize("allowed", [{"allow_origins": ["*"]}, {"allow_origin_regex": "https://.*"}], ids=str)


@ANY_SITE
@pytest.mark.parametrize("where", ["host", "middleware="])
async def test_a_host_that_allows_any_origin_does_not_turn_the_protection_off(
    allowed: Any, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Any page could run agents through the browser of a user. A warning, and the response, say what to set."""
    cors = [Middleware(CORSMiddleware, **allowed)]
    app = create_app(sample_flock(), store=":memory:", auth="host", middleware=cors if where == "middleware=" else ())
    host = Starlette(routes=[Mount("/ai", app)], middleware=cors if where == "host" else ())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t/ai") as client:
        for _ in range(2):
            answer = await client.post("/run/flock", json={"agent_name": "add"}, headers={"Origin": PAGE})
            assert answer.status_code == 403
            assert "cors_origins=" in answer.json()["detail"]
    (warning,) = [each.getMessage() for each in caplog.records if "CORS" in each.getMessage()]
    assert "cors_origins=" in warning


@ANY_SITE
async def test_a_served_app_warns_at_its_start_that_it_allows_any_origin(
    allowed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(sample_flock(), store=":memory:", auth="host", middleware=[Middleware(CORSMiddleware, **allowed)])
    async with Served(app):
        assert "cors_origins=" in caplog.text


@ANY_SITE
async def test_a_host_that_allows_any_origin_is_not_warned_if_the_app_names_its_origins(
    allowed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(sample_flock(), store=":memory:", auth="host", cors_origins=[PAGE])
    host = Starlette(routes=[Mount("/ai", app)], middleware=[Middleware(CORSMiddleware, **allowed)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t/ai") as client:
        answer = await client.post("/run/flock", json={"agent_name": "add"}, headers={"Origin": PAGE})
        assert answer.status_code == 422
    assert "CORS" not in caplog.text


async def test_a_host_route_that_shadows_an_open_page_is_not_open() -> None:
    routes = [Route("/docs", whoami), Route("/static/{path:path}", whoami)]
    async with client_of(create_app(sample_flock(), auth=api_key_auth, docs=False, routes=routes)) as client:
        for path in ("/docs", "/static/docs.js", "/redoc", "/static/../runs", "//runs", "/runs/"):
            assert (await client.get(path)).status_code == 401


ADDED_LATER: dict[str, tuple[str, str, Callable[[FlockAPI], object]]] = {
    "a method that an open route does not take": (
        *("POST", "/"),
        lambda app: app.routes.append(Route("/", whoami, methods=["POST"])),
    ),
    "a method of an open page": ("PUT", "/docs", lambda app: app.add_route("/docs", whoami, methods=["PUT"])),
    "before an open route": ("GET", "/docs", lambda app: app.router.routes.insert(0, Route("/docs", whoami))),
    "equal to an open route": (
        *("GET", "/healthz"),
        lambda app: app.router.routes.insert(0, Route("/healthz", healthz, middleware=[Middleware(ReplacedByWhoami)])),
    ),
    "a mount": ("GET", "/more/whoami", lambda app: app.mount("/more", Starlette(routes=[Route("/whoami", whoami)]))),
    "a mount around an open path": (
        *("GET", "/static/whoami"),
        lambda app: app.router.routes.insert(0, Mount("/static", routes=[Route("/whoami", whoami)])),
    ),
    "a host": (
        "GET",
        "/healthz",
        lambda app: app.router.routes.insert(0, Host("t", Router([Route("/healthz", whoami)]))),
    ),
    "a path of its own": ("OPTIONS", "/new", lambda app: app.add_route("/new", whoami, methods=["OPTIONS"])),
}


class ReplacedByWhoami:
    """Middleware that replaces any route, while Starlette still considers the route equal."""

    def __init__(self, app: ASGIApp) -> None:
        pass

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await whoami(Request(scope)))(scope, receive, send)


@pytest.mark.parametrize(("method", "path", "add"), ADDED_LATER.values(), ids=ADDED_LATER)
async def test_a_route_that_is_added_later_requires_a_key(
    method: str, path: str, add: Callable[[FlockAPI], object]
) -> None:
    """Access is decided for the route that answers, wherever it is in the table and whatever it resembles."""
    app = create_app(sample_flock(), auth=api_key_auth, create_ui=True)
    add(app)
    async with client_of(app) as client:
        assert (await client.request(method, path)).status_code == 401
        answer = await client.request(method, path, headers={"Authorization": "Bearer of-ann"})
        assert (answer.status_code, answer.json()) == (200, {"name": "ann"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(
            ("HEAD", "/docs", 200),
            ("PUT", "/docs", 405),
            ("OPTIONS", "/healthz", 405),
            ("POST", "/static/docs.js", 405),
        ),
        *(("HEAD", "/runs", 401), ("PUT", "/runs", 401), ("OPTIONS", "/run/flock", 401), ("OPTIONS", "/nowhere", 401)),
        *(("HEAD", "/docs/", 401), ("GET", "/healthz/", 401), ("GET", "/", 401), ("GET", "//docs", 401)),
    ],
)
async def test_only_open_routes_are_open_with_any_method(method: str, path: str, status: int) -> None:
    async with client_of(create_app(sample_flock(), auth=api_key_auth)) as client:
        assert (await client.request(method, path)).status_code == status


@pytest.mark.parametrize("found", [False, None, 0, "ann", {"name": "ann"}])
async def test_auth_grants_access_only_to_a_principal(found: Any) -> None:
    async with client_of(create_app(sample_flock(), auth=lambda connection: found)) as client:
        refused = await client.get("/runs")
        assert (refused.status_code, "API key" in refused.text) == (401, False)


@pytest.mark.parametrize("name", [uuid.uuid4(), None, b"ann", "\ud800"], ids=["uuid", "none", "bytes", "surrogate"])
async def test_a_principal_with_an_invalid_name_fails_only_its_own_request(
    name: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such an ``auth=`` is a mistake of the host: that caller gets 500, and the log says what to change."""

    def auth(connection: HTTPConnection) -> Principal:
        return Principal(name="ann" if connection.headers.get("x-user") == "ann" else name)

    body = {"agent_name": "add", "inputs": {"a": 1}, "async_run": True}
    app = create_app(sample_flock(), store=tmp_path / "flock.db", auth=auth)
    answers: dict[str, list[int]] = {"ann": [], "bob": []}
    async with app.lifespan(), client_of(app) as client:

        async def send(user: str) -> None:
            answers[user].append((await client.post("/run/flock", json=body, headers={"X-User": user})).status_code)

        async with anyio.create_task_group() as tasks:
            for user in ("bob", "ann") * 20:
                tasks.start_soon(send, user)
        assert answers == {"ann": [202] * 20, "bob": [500] * 20}
        assert (await client.get("/readyz")).status_code == 200
    assert "The name of a Principal must be" in caplog.text


@pytest.mark.parametrize(("server_name", "realm"), [("Агенты", ""), ("A\r\nX-Forged: 1", "AX-Forged: 1")])
async def test_any_server_name_can_be_the_realm(server_name: str, realm: str) -> None:
    async with client_of(create_app(sample_flock(), auth=lambda _: None, server_name=server_name)) as client:
        refused = await client.get("/runs")
        assert (refused.status_code, refused.headers["WWW-Authenticate"]) == (401, f'Bearer realm="{realm}"')


async def test_an_unknown_http_status_is_passed_on() -> None:
    def teapot(connection: HTTPConnection) -> Principal:
        raise HTTPException(499, "Come back never.")

    async with client_of(create_app(sample_flock(), auth=teapot)) as client:
        assert (await client.get("/runs")).json()["title"] == "Status 499"


async def test_a_websocket_without_a_principal_is_closed() -> None:
    async def never(websocket: WebSocket) -> None:
        raise AssertionError

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    app = create_app(sample_flock(), auth=api_key_auth, routes=[WebSocketRoute("/ws", never)])
    await app({"type": "websocket", "path": "/ws", "headers": [], "query_string": b""}, receive, send)
    assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1008)]


@pytest.mark.parametrize("docs", [False, None])
async def test_the_docs_pages_can_be_switched_off(docs: bool | None) -> None:
    async with client_of(create_app(sample_flock(), docs=docs)) as client:
        for path in ("/docs", "/redoc", "/static/docs.html"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 200


@pytest.mark.parametrize("path", ["/", "/ui", "/ui/"])
@pytest.mark.parametrize("prefix", ["", "/ai"])
async def test_the_404_for_a_missing_page_names_the_pages_that_exist(path: str, prefix: str) -> None:
    app = create_app(sample_flock())
    served: ASGIApp = Starlette(routes=[Mount(prefix, app)]) if prefix else app
    async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://t") as client:
        missing = await client.get(prefix + path)
        assert (missing.status_code, missing.json()["title"]) == (404, "Not Found")
        assert f"The API documentation is at {prefix}/docs." in missing.json()["detail"]
        assert "at /ui, start it with --ui (create_ui=True in Python)" in missing.json()["detail"]
        assert (await client.get(f"{prefix}/docs")).status_code == 200
        assert (await client.get(f"{prefix}/uix")).json()["detail"] == "Not Found"


async def test_the_hint_names_no_disabled_docs_and_hides_no_page_of_the_host() -> None:
    app = create_app(sample_flock(), docs=False)
    async with client_of(app) as client:
        assert "docs" not in (await client.get("/ui")).json()["detail"]
        app.add_route("/ui", lambda request: Response("my own"))
        assert (await client.get("/ui")).text == "my own"
    async with client_of(create_app(sample_flock(), create_ui=True)) as client:
        assert (await client.get("/", follow_redirects=True)).headers["Content-Type"].startswith("text/html")


MISTAKES: dict[str, Any] = {
    "server_name": (None, "a string"),
    "engine": (sample_flock(), "an engine of flock, as flock.engine() returns it, or None, not a value of type Flock"),
    "store": (None, "the path of a file or folder"),
    "ignore_query": ("token", 'a list of names of query parameters, such as ["token"]'),
    "max_body_bytes": ("1MB", "a whole number of at least 1, not '1MB'"),
    "max_upload_bytes": (1e9, "a whole number of at least 1, not 1000000000.0"),
    "max_json_depth": (0, "a whole number of at least 1, not 0"),
    "max_header_bytes": (True, "a whole number of at least 1, not True"),
    "body_timeout_s": (float("nan"), "a number of seconds above 0 and up to 1e+09, not nan"),
    "csv_dir": (["uploads"], "the path of a file or folder, or None"),
    "max_wait_s": (-1, "a whole number of at least 0, not -1"),
    "max_event_streams": (-1, "a whole number of at least 0"),
    "max_uploads_per_principal": (-1, "a whole number of at least 0"),
    "max_downloads_per_principal": (-1, "a whole number of at least 0"),
    "max_requests_per_minute": (0.5, "a whole number of at least 1, or None, not 0.5"),
    "on_disconnect": ("stop", '"cancel" or "continue", not \'stop\''),
    "expose_errors": ("no", "True or False"),
    "routes": (["/double"], "a list of Starlette routes"),
    "openapi_paths": (["/double"], "a mapping of paths, as in OpenAPI"),
    "api_keys": ("ann=fk_secret", "a mapping of names to keys, all strings, or None, not a value of type str"),
    "webhook_secrets": (["fk_secret"], "a list of secrets, as 'flockapi webhook secret' prints them"),
    "auth": ("x", 'a function of the connection that returns a Principal or None, "host" if'),
    "allowed_hosts": (["https://agents.example"], "a list of host names without scheme and port"),
    "cors_origins": ("https://agents.example", "a list of origins"),
    "middleware": ([BaseHTTPMiddleware], "a list of starlette.middleware.Middleware"),
    "exception_handlers": ([whoami], "a mapping of exception classes or status codes to functions"),
    "lifespan": (True, "a function of the app"),
    "docs": ("/docs", "True or False, or None"),
    "create_ui": (1, "True or False"),
    "protocols": (["soap"], "a list of 'openai'"),
    "public_url": ("agents.example", 'an address such as "https://agents.example/ai", or None'),
    "metrics": ("prometheus", "True or False"),
}


@pytest.mark.parametrize("name", ["flock", *AppOptions.__struct_fields__])
async def test_an_invalid_option_is_refused_when_the_app_is_created(name: str) -> None:
    """The error of each option says what is valid, and never shows a key."""
    if name == "flock":
        with pytest.raises(DefinitionError, match="flock= must be a Flock, not 'my flock'"):
            create_app("my flock")  # type: ignore[arg-type]
        return
    value, words = MISTAKES[name]
    with pytest.raises(DefinitionError) as caught:
        create_app(sample_flock(), **{name: value})
    assert str(caught.value).startswith(f"create_app: {name}= must be {words}")
    assert "fk_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("api_keys", {"ann": None}), ("api_keys", {1: "fk_secret_of_sixteen"}), ("allowed_hosts", "agents.example")),
        *(("allowed_hosts", ["agents.example:443"]), ("allowed_hosts", [""]), ("body_timeout_s", 0), ("docs", 1)),
        *(
            ("body_timeout_s", float("inf")),
            ("auth", Principal(name="ann")),
            ("middleware", {1}),
            ("engine", "flock.db"),
        ),
    ],
)
async def test_an_almost_valid_option_is_refused_too(name: str, value: Any) -> None:
    with pytest.raises(DefinitionError, match=f"create_app: {name}= must be "):
        create_app(sample_flock(), **{name: value})


async def test_the_limits_of_options_are_valid() -> None:
    lowest: dict[str, Any] = {name: 1 for name in MISTAKES if re.match("max_.*(bytes|depth|minute)", name)}
    lowest |= {"max_wait_s": 0, "max_event_streams": 0, "body_timeout_s": 1e-9, "allowed_hosts": {"a", "[::1]"}}
    app = create_app(sample_flock(), store=Path("x.db"), csv_dir=".", docs=None, metrics=None, **lowest)
    assert {name: getattr(app.options, name) for name in lowest} == lowest


SCRIPT = """
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from flock.core import Flock

async def hello(request):
    return PlainTextResponse(f"hello from {request.app.flock.name}")

Flock("scripted").start_api(port=0, custom_endpoints=[Route("/hello", hello)])
"""


def test_start_api_takes_custom_endpoints(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with running(sys.executable, str(tmp_path / "script.py"), PYTHONPATH=str(ROOT)) as server:
        assert httpx.get(f"{server.url}/hello").text == "hello from scripted"


def test_an_engine_of_ones_own_is_rejected_with_what_is_needed() -> None:
    """Apps need more of an engine than the methods of the protocol, such as the sending of webhooks."""

    class Own:
        async def submit_batch(self) -> None: ...

    with pytest.raises(DefinitionError, match=r"an engine of flock, as flock\.engine\(\) returns it"):
        create_app(sample_flock(), engine=Own())  # type: ignore[arg-type]

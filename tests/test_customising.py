"""Everything can be changed without a fork: routes, middleware, handlers, lifespan, docs, the specification."""

import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flock.errors import AgentNotFound
from flockapi import FlockAPI, create_app, engine_of
from tests.fakes import ROOT, running, sample_flock

pytestmark = pytest.mark.anyio


async def double(request: Request) -> Response:
    """A route of the host's own that runs an agent."""
    number = int(request.query_params["of"])
    engine = await engine_of(request)
    run = await engine.submit("add", msgspec.Raw(b'{"a": %d, "b": %d}' % (number, number)), is_async=False)
    run = await engine.wait(run.run_id)
    result = msgspec.json.decode(run.result or b"")["result"]
    return JSONResponse({"double": result, "agents": len(request.app.flock.agents)})


PATHS = {"/double": {"get": {"operationId": "double", "responses": {"200": {"description": "Twice the number."}}}}}


def client_of(app: FlockAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://t")


async def test_a_route_of_the_host_runs_agents_and_is_described() -> None:
    app = create_app(sample_flock(), store=":memory:", routes=[Route("/double", double)], openapi_paths=PATHS)
    async with client_of(app) as client:  # nobody ran the lifespan: the route starts the engine
        assert (await client.get("/double?of=21")).json() == {"double": 42, "agents": 6}
        spec = (await client.get("/openapi.json")).json()
        assert spec["paths"]["/double"] == PATHS["/double"]
        assert "/run/flock" in spec["paths"]
        assert yaml.safe_load((await client.get("/openapi.yaml")).text) == spec


async def test_a_route_of_the_host_comes_before_the_apps_own() -> None:
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


async def test_a_handler_of_the_host_answers_for_its_errors() -> None:
    async def unknown(request: Request, exc: Exception) -> Response:
        return Response("who?", 418)

    app = create_app(sample_flock(), exception_handlers={AgentNotFound: unknown})
    async with client_of(app) as client:
        assert (await client.get("/agents/nobody")).status_code == 418
        assert (await client.get("/run/42")).json()["title"] == "Unknown run"


async def test_a_lifespan_of_the_host_is_composed_and_not_replaced() -> None:
    seen: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        app.engine.check_ready()
        seen.append("in")
        yield
        app.engine.check_ready()
        seen.append("out")

    app = create_app(sample_flock(), store=":memory:", lifespan=lifespan)
    async with app.lifespan(), client_of(app) as client:
        assert seen == ["in"]
        assert (await client.get("/readyz")).status_code == 200
    assert seen == ["in", "out"]


@pytest.mark.parametrize("docs", [False, None])
async def test_the_docs_pages_can_be_left_out(docs: bool | None) -> None:
    async with client_of(create_app(sample_flock(), docs=docs)) as client:
        for path in ("/docs", "/redoc", "/static/docs.html"):
            assert (await client.get(path)).status_code == 404
        assert (await client.get("/openapi.json")).status_code == 200


SCRIPT = """
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from flock.core import Flock

async def hello(request):
    return PlainTextResponse(f"hello from {request.app.flock.name}")

Flock("scripted").start_api(port=0, custom_endpoints=[Route("/hello", hello)])
"""


def test_start_api_takes_endpoints_of_the_script(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with running(sys.executable, str(tmp_path / "script.py"), PYTHONPATH=str(ROOT)) as server:
        assert httpx.get(f"{server.url}/hello").text == "hello from scripted"

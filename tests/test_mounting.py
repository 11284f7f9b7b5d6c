"""At home in other apps: real frameworks and servers, at the root and under prefixes, with and without a lifespan."""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from flock.core import Flock
from flockapi import create_app
from tests.fakes import ROOT, running
from tests.test_http_lifecycle import Served, events_in

HOST = '''
import contextlib, os
from flock.core import Flock
from flockapi import create_app

def flock_of(name):
    flock = Flock(name)

    @flock.agent
    async def greet(who: str) -> str:
        return f"{name} greets {who}"

    return flock

apps = {f"/{name}": create_app(flock_of(name), server_name=name) for name in ("one", "two")}

@contextlib.asynccontextmanager
async def lifespan(host):
    """As a host composes them in its own."""
    async with contextlib.AsyncExitStack() as stack:
        for app in apps.values():
            await stack.enter_async_context(app.lifespan())
        yield

async def dispatch(scope, receive, send):
    """A bare ASGI callable."""
    if scope["type"] == "lifespan":
        assert is_composed, "this host knows no lifespan"
        async with lifespan(None):
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    for prefix, app in apps.items():
        if scope["path"].startswith(prefix + "/"):
            await app({**scope, "root_path": scope.get("root_path", "") + prefix}, receive, send)
            return
    await rest(scope, receive, send)

async def nobody(scope, receive, send):
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})

is_composed = os.environ["LIFESPAN"] == "composed"
host, rest = os.environ["HOST"], nobody
if host == "starlette":
    from starlette.applications import Starlette
    app = Starlette(lifespan=lifespan if is_composed else None)
elif host == "fastapi":
    from fastapi import FastAPI
    app = FastAPI(lifespan=lifespan if is_composed else None)
elif host == "django":
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="x")
    urlpatterns = []
    rest, app = get_asgi_application(), dispatch
else:
    app = dispatch
if host in ("starlette", "fastapi"):
    for prefix, mounted in apps.items():
        app.mount(prefix, mounted)
'''

SERVERS = {
    "uvicorn": ["uvicorn", "--host", "127.0.0.1", "--port", "{port}"],
    "hypercorn": ["hypercorn", "--bind", "127.0.0.1:{port}"],
    "hypercorn trio": ["hypercorn", "--worker-class", "trio", "--bind", "127.0.0.1:{port}"],
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("lifespan", ["composed", "not run"])
@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("host", ["starlette", "fastapi", "django", "bare"])
def test_two_flocks_are_at_home_under_two_prefixes(host: str, server: str, lifespan: str, tmp_path: Path) -> None:
    """Runs, links, events and docs; where nothing can start the engine, the answer has the line to add."""
    (tmp_path / "host.py").write_text(HOST)
    command = [part.format(port=free_port()) for part in SERVERS[server]]
    env = {"HOST": host, "LIFESPAN": lifespan, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    with running(sys.executable, "-m", *command, "host:app", timeout_s=60, **env) as served:
        with httpx.Client(base_url=served.url, timeout=30) as client:
            body = {"agent_name": "greet", "inputs": {"who": "Ann"}}
            first = client.post("/one/run/flock", json=body)
            if (server, lifespan) == ("hypercorn trio", "not run"):
                assert first.status_code == 503
                assert "async with flock_app.lifespan(): yield" in first.json()["detail"]
                return
            assert first.json()["result"] == {"result": "one greets Ann"}
            accepted = client.post("/two/run/flock", json={**body, "async_run": True})
            assert accepted.headers["Location"].startswith("/two/run/")
            run = client.get(accepted.headers["Location"], params={"wait": 20}).json()
            assert run["result"] == {"result": "two greets Ann"}
            assert client.get(f"/one/run/{run['run_id']}").status_code == 404, "each has its own"
            events = events_in(client.get(f"{accepted.headers['Location']}/events").text)
            assert events[-1]["event"] == "run.completed"
            for path in ("/one/docs", "/one/static/vendor/README.md", "/one/readyz"):
                assert client.get(path).status_code == 200
            assert client.get("/two/openapi.json").json()["info"]["title"] == "two"
            if (host, server) != ("django", "hypercorn trio"):  # Django's own pages need asyncio
                assert client.get("/three/agents").status_code == 404
        served.process.send_signal(signal.SIGINT)
        served.process.wait(20)
    assert "Traceback" not in "\n".join(served.lines)


def sleeper() -> Flock:
    flock, naps_s = Flock("sleeper"), [0, 600]

    @flock.agent
    async def nap() -> int:
        await anyio.sleep(naps_s.pop())
        return 1

    return flock


NAP = {"agent_name": "nap", "async_run": True}


async def accept_and_see_it_begin(host: Starlette) -> str:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
        run_id: str = (await client.post("/ai/run/flock", json=NAP)).json()["run_id"]
        with anyio.fail_after(20):
            while (await client.get("/ai/runs?status=running")).json()["runs"] == []:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    return run_id


def test_what_began_without_a_lifespan_goes_on_in_the_next_loop(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a loop cancels what is in it: the run is left in order, and the next first request takes it up."""
    flock = sleeper()
    host = Starlette(routes=[Mount("/ai", create_app(flock))])
    run_id = asyncio.run(accept_and_see_it_begin(host))

    async def wait() -> tuple[str, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
            run = (await client.get(f"/ai/run/{run_id}", params={"wait": 20})).json()
            return run["status"], run["attempt"]

    assert asyncio.run(wait()) == ("completed", 2)
    assert "raised" not in caplog.text


@pytest.mark.anyio
async def test_starting_twice_is_one_start_and_an_app_may_be_started_again() -> None:
    flock = sleeper()
    engine = flock.engine()
    one, two = create_app(flock, engine=engine), create_app(flock, engine=engine)
    for _ in range(2):
        async with one.lifespan(), one.lifespan(), two.lifespan():
            for app in (one, two):
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                    assert (await client.get("/readyz")).status_code == 200
        async with httpx.AsyncClient(transport=httpx.ASGITransport(two), base_url="http://t") as client:
            assert (await client.get("/readyz")).status_code == 503, "it was closed on purpose"


@pytest.mark.anyio
async def test_many_first_requests_are_one_start() -> None:
    flock = sleeper()
    app = create_app(flock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(name.startswith("flock.db-engine-") for name in os.listdir()) == 1


@pytest.mark.anyio
async def test_a_store_that_cannot_be_used_is_said_at_each_request_until_it_can(tmp_path: Path) -> None:
    flock = sleeper()
    app = create_app(flock, store=tmp_path / "later" / "flock.db")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for _ in range(2):
            answer = await client.get("/runs")
            assert (answer.status_code, answer.json()["title"]) == (503, "Store unavailable")
        (tmp_path / "later").mkdir()
        assert (await client.get("/runs")).status_code == 200


@pytest.mark.anyio
async def test_behind_a_proxy_links_have_its_path() -> None:
    """As uvicorn's ``root_path`` says it; the proxy cuts its path off."""
    flock = sleeper()
    app = create_app(flock, store=":memory:")
    async with Served(app) as served:
        served.server.config.root_path = "/behind"
        async with httpx.AsyncClient(base_url=served.url) as client:
            accepted = await client.post("/run/flock", json=NAP)
            assert accepted.headers["Location"].startswith("/behind/run/")


@pytest.mark.anyio
async def test_two_apps_on_one_flock_share_one_engine() -> None:
    flock = sleeper()
    one, two, other = create_app(flock), create_app(flock), create_app(flock, store=":memory:")
    assert one.engine is two.engine
    assert one.engine is not other.engine
    async with one.lifespan():
        host = Starlette(routes=[Mount("/one", one), Mount("/two", two)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
            run_id = (await client.post("/one/run/flock", json=NAP)).json()["run_id"]
            assert (await client.get(f"/two/run/{run_id}")).status_code == 200

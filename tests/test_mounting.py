"""Mounted in other apps: real frameworks and servers, at the root and under prefixes, with and without a lifespan."""

import asyncio
import contextlib
import functools
import gc
import json
import locale
import logging
import os
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from flock.core import Flock
from flock.models.llm import ModelClient
from flock.runs import new_id
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S, ROOT
from tests.support.cluster import patient
from tests.support.flocks import sample_flock
from tests.support.http import events_in
from tests.support.servers import Served, free_port, running

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

prefixes = os.environ["PREFIXES"].split(",")
apps = {prefix: create_app(flock_of(f"number{prefix}"), server_name=f"at {prefix}") for prefix in prefixes}

@contextlib.asynccontextmanager
async def lifespan(host):
    """Compose the lifespans of the apps, as a host does."""
    async with contextlib.AsyncExitStack() as stack:
        for app in apps.values():
            await stack.enter_async_context(app.lifespan())
        yield

async def dispatch(scope, receive, send):
    """A bare ASGI callable."""
    if scope["type"] == "lifespan":
        assert is_composed, "this host does not run a lifespan"
        async with lifespan(None):
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    root_path = scope.get("root_path", "")
    path = scope["path"].removeprefix(root_path)  # Hypercorn omits it
    for prefix, app in apps.items():
        if path.startswith(prefix + "/"):
            await app({**scope, "root_path": root_path + prefix, "path": root_path + path}, receive, send)
            return
    await rest(scope, receive, send)

async def not_found(scope, receive, send):
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})

is_composed = os.environ["LIFESPAN"] == "composed"
host, rest = os.environ["HOST"], not_found
if host == "starlette":
    from starlette.applications import Starlette
    app = Starlette(lifespan=lifespan if is_composed else None)
elif host == "fastapi":
    from fastapi import FastAPI
    own_pages = None if "" in apps else "/openapi.json"  # at the root they would hide the flock's
    app = FastAPI(lifespan=lifespan if is_composed else None, openapi_url=own_pages)
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


MOUNTS = {
    "two prefixes": (("/one", "/two"), ""),
    "the root": (("",), ""),
    "behind a proxy": (("/one", "/two"), "/behind"),
}


def is_in_gate(host: str, server: str, mount: str) -> bool:
    """Before a merge, one host is tried with every server and every mount, and one server with every host."""
    if mount == "two prefixes":
        return host == "starlette" or server == "uvicorn"
    return (host, server) == ("starlette", "uvicorn")


MATRIX = [
    pytest.param(
        host,
        server,
        mount,
        lifespan,
        id=f"{host}, {server}, {mount}, lifespan {lifespan}",
        marks=() if is_in_gate(host, server, mount) else pytest.mark.nightly,
    )
    for host in ("starlette", "fastapi", "django", "bare")
    for server in SERVERS
    for mount in MOUNTS
    for lifespan in ("composed", "not run")
    if (mount, lifespan) != ("the root", "not run")  # the mount does not affect how the app starts
    if (mount, lifespan) != ("behind a proxy", "not run")
]


@pytest.mark.parametrize(("host", "server", "mount", "lifespan"), MATRIX)
def test_flocks_can_be_mounted_in_any_host(host: str, server: str, mount: str, lifespan: str, tmp_path: Path) -> None:
    """Check runs, links, events and docs. If nothing can start the engine, the answer has the line to add."""
    (tmp_path / "host.py").write_text(HOST)
    prefixes, proxied = MOUNTS[mount]
    command = [part.format(port=free_port()) for part in SERVERS[server]]
    if proxied:  # the proxy strips its prefix, which the server is given
        command += ["--root-path", proxied]
    env = {"HOST": host, "LIFESPAN": lifespan, "PREFIXES": ",".join(prefixes)}
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    with running(sys.executable, "-m", *command, "host:app", **env) as served:
        with httpx.Client(base_url=served.url, timeout=30) as client:
            for prefix in prefixes:
                body = {"agent_name": "greet", "inputs": {"who": "Ann"}}
                first = client.post(f"{prefix}/run/flock", json=body)
                if (server, lifespan) == ("hypercorn trio", "not run"):
                    assert first.status_code == 503
                    assert "async with flock_app.lifespan(): yield" in first.json()["detail"]
                    return
                greeting = {"result": f"number{prefix} greets Ann"}
                assert first.json()["result"] == greeting
                accepted = client.post(f"{prefix}/run/flock", json={**body, "async_run": True})
                assert accepted.headers["Location"].startswith(f"{proxied}{prefix}/run/")
                location = accepted.headers["Location"].removeprefix(proxied)
                run = client.get(location, params={"wait": 20}).json()
                assert run["result"] == greeting
                listed = client.get(f"{prefix}/runs?limit=1").json()
                assert listed["next"].startswith(f"{proxied}{prefix}/runs?")
                assert client.get(listed["next"].removeprefix(proxied)).json()["next"] is None
                for other in set(prefixes) - {prefix}:
                    assert client.get(f"{other}/run/{run['run_id']}").status_code == 404, "each app has its own runs"
                events = events_in(client.get(f"{location}/events").text)
                assert events[-1]["event"] == "run.completed"
                for path in ("/docs", "/static/vendor/README.md", "/readyz"):
                    assert client.get(prefix + path).status_code == 200
                assert client.get(f"{prefix}/openapi.json").json()["info"]["title"] == f"at {prefix}"
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


async def submit_and_wait_until_running(host: Starlette) -> str:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
        run_id: str = (await client.post("/ai/run/flock", json=NAP)).json()["run_id"]
        with anyio.fail_after(PATIENCE_S):
            while (await client.get("/ai/runs?status=running")).json()["runs"] == []:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    return run_id


def test_a_run_started_without_a_lifespan_resumes_in_the_next_loop(caplog: pytest.LogCaptureFixture) -> None:
    """A closing loop cancels its tasks. The run is left in a valid state, and the next first request resumes it."""
    flock = sleeper()
    host = Starlette(routes=[Mount("/ai", create_app(flock))])
    run_id = asyncio.run(submit_and_wait_until_running(host))

    async def wait() -> tuple[str, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
            run = (await client.get(f"/ai/run/{run_id}", params={"wait": 20})).json()
            return run["status"], run["attempt"]

    assert asyncio.run(wait()) == ("completed", 2)
    assert "raised" not in caplog.text


@pytest.mark.anyio
async def test_nested_lifespans_start_the_engine_once_and_an_app_can_restart() -> None:
    flock = sleeper()
    engine = flock.engine()
    one, two = create_app(flock, engine=engine), create_app(flock, engine=engine)
    for _ in range(2):
        async with one.lifespan(), one.lifespan(), two.lifespan():
            for app in (one, two):
                async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
                    assert (await client.get("/readyz")).status_code == 200
        async with httpx.AsyncClient(transport=httpx.ASGITransport(two), base_url="http://t") as client:
            assert (await client.get("/readyz")).status_code == 200, "opened by a request, as if there were no lifespan"


@pytest.mark.anyio
async def test_concurrent_first_requests_start_the_engine_once() -> None:
    flock = sleeper()
    app = create_app(flock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        answers = await asyncio.gather(*(client.get("/readyz") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(name.startswith("flock.db-engine-") for name in os.listdir()) == 1


@pytest.mark.anyio
async def test_each_request_answers_503_until_the_store_is_available(tmp_path: Path) -> None:
    flock = sleeper()
    app = create_app(flock, store=tmp_path / "later" / "flock.db")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for _ in range(2):
            answer = await client.get("/runs")
            assert (answer.status_code, answer.json()["title"]) == (503, "Store unavailable")
        (tmp_path / "later").mkdir()
        assert (await client.get("/runs")).status_code == 200


@pytest.mark.anyio
async def test_links_behind_a_proxy_include_its_prefix() -> None:
    """uvicorn has it as ``root_path``, and the proxy strips it."""
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


@pytest.mark.anyio
async def test_apps_that_start_together_share_one_engine_until_the_last_exits() -> None:
    """Each app runs in its own task, like two servers. The first to start exits first."""
    flock = sleeper()
    apps = [create_app(flock), create_app(flock)]
    go = [asyncio.Event(), asyncio.Event()]
    started = asyncio.Queue[int]()

    async def serve(number: int) -> None:
        async with apps[number].lifespan():
            started.put_nowait(number)
            await go[number].wait()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        servers = [tasks.create_task(serve(number)) for number in (0, 1)]
        first, second = await started.get(), await started.get()
        go[first].set()
        await servers[first]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[second]), base_url="http://t") as client:
            assert (await client.get("/readyz")).status_code == 200
            go[second].set()
            await servers[second]
            assert apps[second].engine.health().engine == "stopped"


@pytest.mark.anyio
async def test_an_app_that_exits_at_once_does_not_stop_the_other() -> None:
    """Both wait for the same start. The first exits before the second continues."""
    flock, has_exited = sleeper(), asyncio.Event()
    brief, lasting = create_app(flock), create_app(flock)

    async def enter_and_exit() -> None:
        async with brief.lifespan():
            pass
        has_exited.set()

    async def serve() -> str:
        async with lasting.lifespan():
            await has_exited.wait()
            return lasting.engine.health().engine  # a request would reopen it

    async with asyncio.timeout(20):
        assert (await asyncio.gather(enter_and_exit(), serve()))[1] == "running"


@pytest.mark.anyio
async def test_a_lifespan_can_start_while_a_first_request_opens_the_engine() -> None:
    flock = sleeper()
    one, two = create_app(flock), create_app(flock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(one), base_url="http://t") as client:
        request = asyncio.create_task(client.get("/readyz"))
        async with two.lifespan():
            assert (await request).status_code == 200


def test_a_new_app_reopens_the_engine_after_an_old_one_exited() -> None:
    """They share an engine, but the exit of the old app does not affect the new one."""
    flock = sleeper()

    async def live(app: FlockAPI, *, with_lifespan: bool) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            async with app.lifespan() if with_lifespan else contextlib.nullcontext():
                return (await client.get("/runs")).status_code

    old, new = create_app(flock), create_app(flock)
    assert old.engine is new.engine
    assert asyncio.run(live(old, with_lifespan=True)) == 200
    assert asyncio.run(live(new, with_lifespan=False)) == 200


async def live_and_wait(app: FlockAPI, *, with_lifespan: bool = True) -> None:
    """Run one life cycle with waits for runs, batches, events, slots, deletions and retention."""
    transport = httpx.ASGITransport(app)
    async with (
        app.lifespan() if with_lifespan else contextlib.nullcontext(),
        httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60) as client,
    ):
        nap = {"agent_name": "nap", "inputs": {"s": 0.3}}
        accepted = (await client.post("/run/flock", json={**nap, "async_run": True})).json()
        ends: list[Any] = []

        async def follow(path: str) -> None:
            ends.append(events_in((await client.get(path)).text)[-1]["event"])

        async def run() -> None:
            ends.append((await client.post("/run/flock", json=nap)).json()["status"])

        async def wait(path: str) -> None:
            ends.append((await client.get(f"{path}?wait=30")).json()["status"])

        batch = (await client.post("/run/batch", json={"agent_name": "nap", "batch_inputs": [{"s": 0.1}] * 3})).json()
        paths = f"/run/{accepted['run_id']}", f"/batch/{batch['batch_id']}"
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for path in paths:
                    tasks.start_soon(follow, f"{path}/events")
                    tasks.start_soon(wait, path)
                for _ in range(3):
                    tasks.start_soon(run)
        assert sorted(ends) == ["batch.completed", *["completed"] * 5, "run.completed"]
        assert (await client.delete(paths[1])).status_code == 204
        await run()  # meanwhile the sweeper deletes its items and waits for the next deletion


def napping() -> Flock:
    flock = Flock(f"napping {new_id()}")

    @flock.agent(max_concurrency=1)
    async def nap(s: float) -> float:
        await anyio.sleep(s)
        return s

    return flock


@pytest.mark.parametrize("store", ["flock.db", ":memory:"])
@pytest.mark.parametrize("backends", [["asyncio"] * 3, ["trio"] * 2, ["asyncio", "trio", "asyncio"]], ids="-".join)
def test_an_app_can_run_again_in_another_loop(store: str, backends: list[str]) -> None:
    """Any number of times in sequence, whatever was waiting in the previous loop."""
    app = create_app(napping(), store=store)
    for backend in backends:
        anyio.run(live_and_wait, app, backend=backend)


def test_an_app_can_run_again_without_its_lifespan() -> None:
    app = create_app(napping())
    for with_lifespan in (False, False, True, True):
        anyio.run(functools.partial(live_and_wait, app, with_lifespan=with_lifespan))


def test_an_app_on_a_cluster_can_run_again_in_another_loop(temporal_address: str) -> None:
    """So can a worker."""
    from flock.temporal import TemporalEngine, TemporalWorker

    flock = napping()
    app = create_app(flock, engine=patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)))
    worker = TemporalWorker(flock.agents, ModelClient(), temporal_address, flock=flock.name, drain_timeout_s=0)

    async def live() -> None:
        async with worker:
            await live_and_wait(app)

    for _ in range(3):
        asyncio.run(live())


def test_an_engine_runs_in_one_loop_at_a_time() -> None:
    flock = sleeper()
    one, two = create_app(flock), create_app(flock)

    async def ask_in_another_loop() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(two), base_url="http://t") as client:
            return (await client.get("/runs")).json()

    async def main() -> None:
        async with one.lifespan():
            problem = await asyncio.to_thread(asyncio.run, ask_in_another_loop())
            assert (problem["status"], "another event loop" in problem["detail"]) == (503, True)

    asyncio.run(main())


@pytest.mark.anyio
@pytest.mark.parametrize("root_path", ["", "/proxy"])
async def test_a_host_below_a_mount_can_strip_the_path(root_path: str) -> None:
    app = create_app(sleeper(), store=":memory:")

    async def stripping(scope: Any, receive: Any, send: Any) -> None:
        stripped = "/" + scope["path"].rpartition("/ai/")[2]
        await app({**scope, "path": stripped, "root_path": f"{scope['root_path']}/ai"}, receive, send)

    host = Starlette(routes=[Mount("/x", stripping)])
    transport = httpx.ASGITransport(host, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/x/ai/agents")).status_code == 200


def state_of_the_process() -> dict[str, Any]:
    """Return the state that belongs to the program, not to an app in it."""
    root = logging.getLogger()
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "wakeup": signal.set_wakeup_fd(-1),
        "root logger": (root.level, root.handlers[:], root.filters[:], root.disabled, logging.root.manager.disable),
        "our loggers": {
            name: (logger.level, logger.handlers[:], logger.propagate)
            for name, logger in logging.root.manager.loggerDict.items()
            if name.partition(".")[0] == "flock" and isinstance(logger, logging.Logger)
        },
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "collector": (gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()),
        "loop policy": type(asyncio.get_event_loop_policy()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "path": sys.path[:],
        "switch interval": sys.getswitchinterval(),
        "recursion limit": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "umask": (mask := os.umask(0o077), os.umask(mask))[0],
        "warnings": warnings.filters[:],
    }


def test_a_full_life_cycle_changes_no_global_state() -> None:
    """Compare the state before and after in a process without the handlers of pytest."""
    compare = (
        "import asyncio, httpx, json, prometheus_client\n"
        "from tests.test_mounting import live_fully, state_of_the_process\n"
        "before = state_of_the_process()\n"
        "asyncio.run(live_fully())\n"
        "after = state_of_the_process()\n"
        "print(json.dumps([name for name in before if before[name] != after[name]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", compare],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


async def live_fully() -> None:
    """Use runs, a batch, an event stream, a failing run, metrics and docs, with a lifespan and then without."""
    app = create_app(sample_flock(), metrics=True)
    host = Starlette(routes=[Mount("/ai", app)])
    transport = httpx.ASGITransport(host)
    for lifespan in (app.lifespan(), contextlib.nullcontext()):
        async with lifespan, httpx.AsyncClient(transport=transport, base_url="http://t/ai") as client:
            for agent_name, inputs in (("add", {"a": 1}), ("explode", {"text": "x"})):
                body = {"agent_name": agent_name, "inputs": inputs}
                run = (await client.post("/run/flock", json=body)).json()
                await client.get(f"/run/{run['run_id']}/events")
            await client.post("/run/batch", json={"agent_name": "add", "batch_inputs": [{"a": 1}]})
            for path in ("/docs", "/openapi.yaml", "/metrics", "/readyz"):
                await client.get(path)
        app = create_app(sample_flock(), store="other.db")
        host.routes[:] = [Mount("/ai", app)]


def test_under_trio_the_first_to_open_an_engine_waits_for_the_others() -> None:
    flock = sleeper()
    apps = [create_app(flock), create_app(flock)]
    left: list[int] = []

    async def main() -> None:
        first_may_go, second_may_go = anyio.Event(), anyio.Event()
        held = [anyio.Event(), anyio.Event()]

        async def serve(number: int, may_go: anyio.Event) -> None:
            async with apps[number].lifespan():
                held[number].set()
                await may_go.wait()
            left.append(number)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, 0, first_may_go)
            await held[0].wait()
            tasks.start_soon(serve, 1, second_may_go)
            await held[1].wait()
            first_may_go.set()
            await anyio.wait_all_tasks_blocked()
            async with httpx.AsyncClient(transport=httpx.ASGITransport(apps[1]), base_url="http://t") as client:
                assert (await client.get("/readyz")).status_code == 200
            second_may_go.set()

    anyio.run(main, backend="trio")
    assert sorted(left) == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/ai", "/tools/ai"])
async def test_all_paths_work_below_a_mount_of_litestar(path: str) -> None:
    """It appends a slash to the path, from which it removes that of the mount, and sends no root path."""
    from litestar import Litestar, asgi
    from litestar.types import Receive, Scope, Send

    ai = create_app(sample_flock(), store=":memory:", auth="host")

    @asgi(path, is_mount=True, copy_scope=True)
    async def mounted(scope: Scope, receive: Receive, send: Send) -> None:
        await ai(scope, receive, send)  # type: ignore[arg-type]

    transport = httpx.ASGITransport(Litestar([mounted]))  # type: ignore[arg-type]
    async with ai.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        sent = {"agent_name": "add", "inputs": {"a": 1}, "async_run": True}
        accepted = await client.post(f"{path}/run/flock", json=sent)
        run_id = accepted.json()["run_id"]
        assert accepted.headers["location"] == f"{path}/run/{run_id}"
        assert (await client.get(f"{path}/run/{run_id}?wait=5")).json()["status"] == "completed"
        assert (await client.get(f"{path}/runs")).json()["runs"][0]["run_id"] == run_id
        assert (await client.get(f"{path}/openapi.json")).status_code == 200
        assert (await client.get(f"{path}/docs")).status_code == 200
        assert (await client.get(f"{path}/nothing")).status_code == 404

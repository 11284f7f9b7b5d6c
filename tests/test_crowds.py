"""Thousands of connections at once to real servers: silent ones, and ones that wait for the same run."""

import contextlib
import re
import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from flock.command.connection import HEAD_TIMEOUT_S
from tests.support import ROOT
from tests.support.servers import Server, flockapi_command, running

pytestmark = pytest.mark.alone

SILENT = 5_000
ANSWERED = 500
WAITERS = 10_000
#: Connections that are opened before the next check, fewer than a server's backlog.
WAVE = 1_000
#: Other files that this process or a server may have open.
OTHER_FILES = 200
#: How much memory a waiting client may take, as a multiple of what it takes in a bare app.
MAX_RATIO = 1.5
#: How long a response may take beside a crowd, in seconds.
PROMPT_S = 2
#: uvicorn's own timeout of a connection after a response, in seconds.
KEEP_ALIVE_S = 5
#: How late a connection may be closed on a busy machine, and how early by the loop's own clock, in seconds.
LATE_S, EARLY_S = 5, 0.5

FLOCK = """
import asyncio
from flock.core import Flock

flock = Flock("crowd")
opened = asyncio.Event()

@flock.agent
async def sleeper() -> str:
    await opened.wait()
    return "good morning"

@flock.agent
async def wake() -> None:
    opened.set()

@flock.agent
async def count_tasks() -> int:
    return len(asyncio.all_tasks())
"""

#: A minimal app whose requests wait, with the settings of ``flockapi serve``.
BARE = """
import asyncio
import anyio
import uvicorn
from flock.command.server import ServerSettings, tune_gc
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

opened = anyio.Event()

async def sleeper(request: Request) -> JSONResponse:
    await opened.wait()
    return JSONResponse({"result": "good morning"})

async def wake(request: Request) -> JSONResponse:
    opened.set()
    return JSONResponse({"result": None})

async def count_tasks(request: Request) -> JSONResponse:
    return JSONResponse({"result": len(asyncio.all_tasks())})

app = Starlette(routes=[Route(f"/{name.__name__}", name) for name in (sleeper, wake, count_tasks)])
tune_gc()
limit = ServerSettings().max_connections
uvicorn.run(app, port=0, http="httptools", server_header=False, limit_concurrency=limit)
"""


@pytest.fixture(autouse=True)
def _many_files() -> Iterator[None]:
    """Raise the limit of open files to its maximum, for this process and the servers that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def crowd() -> Iterator[contextlib.ExitStack]:
    """Yield a stack that closes the connections pushed to it."""
    with contextlib.ExitStack() as stack:
        yield stack


def affordable(wanted: int) -> int:
    """Return *wanted*, or the number of connections that a process may have open if that is less."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard - OTHER_FILES)


def connect(server: Server, crowd: contextlib.ExitStack, path: str = "") -> socket.socket:
    """Open a connection, and request *path* if there is one."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    connection = crowd.enter_context(socket.create_connection(address, timeout=30))
    if path:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return connection


def read_until(words: bytes, connection: socket.socket) -> bytes:
    received = b""
    while words not in received:
        received += (read := connection.recv(65_536))
        assert read, f"the connection ended: {received!r}"
    return received


def flock_server(tmp_path: Path) -> contextlib.AbstractContextManager[Server]:
    (tmp_path / "crowd.py").write_text(FLOCK)
    return running(*flockapi_command("serve", str(tmp_path / "crowd.py"), "--port", "0"))


# Silent clients


def closed_after_s(silent_since: Mapping[socket.socket, float], timeout_s: float) -> dict[socket.socket, float]:
    """Return after how many seconds of silence the server closed each connection, if it did within *timeout_s*."""
    closed: dict[socket.socket, float] = {}
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for connection in silent_since:
            selector.register(connection, selectors.EVENT_READ, connection)
        while len(closed) < len(silent_since) and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                assert key.data.recv(1) == b"", "the server sends them nothing"
                selector.unregister(key.data)
                closed[key.data] = time.monotonic() - silent_since[key.data]
    return closed


def test_silent_clients_delay_no_request_and_are_disconnected(tmp_path: Path, crowd: contextlib.ExitStack) -> None:
    """They are silent from the start, or after a response."""
    number = affordable(SILENT + ANSWERED) - ANSWERED
    with flock_server(tmp_path) as server:
        silent = {connect(server, crowd): time.monotonic() for _ in range(number)}
        answered = {}
        for _ in range(ANSWERED):
            connection = connect(server, crowd, "/healthz")
            assert b"200 OK" in read_until(b"}\n", connection)
            answered[connection] = time.monotonic()
        began = time.monotonic()
        run = httpx.post(f"{server.url}/run/flock", json={"agent_name": "count_tasks"})
        took_s = time.monotonic() - began
        assert (run.json()["status"], took_s < PROMPT_S) == ("completed", True), f"{took_s:.1f} s beside {number}"

        closed = closed_after_s(silent | answered, HEAD_TIMEOUT_S + LATE_S)
        for group, limit_s in ((silent, HEAD_TIMEOUT_S), (answered, KEEP_ALIVE_S)):
            times_s = [closed[connection] for connection in group if connection in closed]
            assert len(times_s) == len(group)
            assert limit_s - EARLY_S < min(times_s) <= max(times_s) < limit_s + LATE_S


# Waiting clients


def memory_kib(server: Server) -> int:
    """Return the server's own memory, and its share of the memory that it shares with other processes."""
    found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{server.process.pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def memory_of_waiting_kib(
    server: Server, path: str, number: int, call: Callable[[str], Any], crowd: contextlib.ExitStack
) -> float:
    """Return how much the server grows for each of *number* requests for *path*, which end when *call* wakes them.

    A request is a task, and waits before a later request counts the tasks.
    """
    tasks_before, before_kib = call("count_tasks"), memory_kib(server)
    waiting: list[socket.socket] = []
    while len(waiting) < number:
        waiting += [connect(server, crowd, path) for _ in range(min(WAVE, number - len(waiting)))]
        deadline = time.monotonic() + 30
        while call("count_tasks") - tasks_before < len(waiting):
            assert time.monotonic() < deadline, f"not all of {len(waiting)} are waiting"
    grown_kib = memory_kib(server) - before_kib
    call("wake")
    for connection in waiting:
        read_until(b"good morning", connection)
    return grown_kib / number


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel has no smaps_rollup")
def test_clients_that_wait_for_a_run_take_little_more_memory_than_in_a_bare_app(
    tmp_path: Path, crowd: contextlib.ExitStack
) -> None:
    number = affordable(WAITERS)
    (tmp_path / "bare.py").write_text(BARE)
    with running(sys.executable, str(tmp_path / "bare.py"), PYTHONPATH=str(ROOT)) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:

            def get(name: str) -> Any:
                return client.get(f"/{name}").json()["result"]

            bare_kib = memory_of_waiting_kib(server, "/sleeper", number, get, crowd)
    crowd.close()
    with flock_server(tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as client:

        def call(agent_name: str) -> Any:
            return client.post("/run/flock", json={"agent_name": agent_name}).json()["result"]["result"]

        body = {"agent_name": "sleeper", "async_run": True}
        run_id = client.post("/run/flock", json=body).json()["run_id"]
        flock_kib = memory_of_waiting_kib(server, f"/run/{run_id}?wait=600", number, call, crowd)
    figures = f"{number} waiting clients take {flock_kib:.1f} KiB each, and {bare_kib:.1f} KiB in a bare app"
    assert flock_kib < MAX_RATIO * bare_kib, f"{figures} ({WAITERS} if a process may open that many files)"

"""Thousands of connections at a time, to real servers: those who say nothing, and those who wait for one run."""

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
#: How many come at a time; a server's backlog takes more.
WAVE = 1_000
#: What else this process and a server have open, at the most.
OTHER_FILES = 200
#: What each who waits may take, as a multiple of what a bare app takes for it.
MAX_RATIO = 1.5
#: How long an answer may take with a crowd there, in seconds.
PROMPT_S = 2
#: uvicorn's own limit for a connection that was answered, in seconds.
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

#: The least that waits, with the settings of ``flockapi serve``.
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
    """As many as the system lets a process have open, for this one and the servers that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def crowd() -> Iterator[contextlib.ExitStack]:
    """Closes the connections that are pushed to it."""
    with contextlib.ExitStack() as stack:
        yield stack


def affordable(wanted: int) -> int:
    """So many connections, or as many as the system lets a process have open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard - OTHER_FILES)


def connect(server: Server, crowd: contextlib.ExitStack, path: str = "") -> socket.socket:
    """A connection that has asked for *path*, if there is one."""
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


# Those who say nothing


def closed_after_s(silent_since: Mapping[socket.socket, float], timeout_s: float) -> dict[socket.socket, float]:
    """After how many seconds of silence the server closed each of those that it closes within *timeout_s*."""
    closed: dict[socket.socket, float] = {}
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for connection in silent_since:
            selector.register(connection, selectors.EVENT_READ, connection)
        while len(closed) < len(silent_since) and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                assert key.data.recv(1) == b"", "nothing is said to them"
                selector.unregister(key.data)
                closed[key.data] = time.monotonic() - silent_since[key.data]
    return closed


def test_those_who_say_nothing_hold_up_nobody_and_are_closed(tmp_path: Path, crowd: contextlib.ExitStack) -> None:
    """From the beginning, or since they were answered."""
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


# Those who wait


def memory_kib(server: Server) -> int:
    """What the server's process has for itself, and its share of what it has together with others."""
    found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{server.process.pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def memory_of_waiting_kib(
    server: Server, path: str, number: int, call: Callable[[str], Any], crowd: contextlib.ExitStack
) -> float:
    """By how much the server grows for each of *number* requests for *path*, which end when it is called to wake.

    A request is a task, and runs up to its wait before one behind it counts the tasks.
    """
    tasks_before, before_kib = call("count_tasks"), memory_kib(server)
    waiting: list[socket.socket] = []
    while len(waiting) < number:
        waiting += [connect(server, crowd, path) for _ in range(min(WAVE, number - len(waiting)))]
        deadline = time.monotonic() + 30
        while call("count_tasks") - tasks_before < len(waiting):
            assert time.monotonic() < deadline, f"not all of {len(waiting)} have come to wait"
    grown_kib = memory_kib(server) - before_kib
    call("wake")
    for connection in waiting:
        read_until(b"good morning", connection)
    return grown_kib / number


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="the kernel does not tell")
def test_those_who_wait_for_a_run_take_little_more_than_in_a_bare_app(
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
        flock_kib = memory_of_waiting_kib(server, f"/run/{run_id}?wait=60", number, call, crowd)
    figures = f"{number} who wait take {flock_kib:.1f} KiB each, and {bare_kib:.1f} KiB in a bare app"
    assert flock_kib < MAX_RATIO * bare_kib, f"{figures} ({WAITERS} where a process may have so many files open)"

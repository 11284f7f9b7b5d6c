"""How the workers of a server divide its connections."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from flock.command import accepting
from flock.command.accepting import NOT_ACCEPTING, Acceptor
from tests.support import PATIENCE_S
from tests.support.servers import Server, flockapi_command, running, workers_of

SCRIPT = """
import os
from flock.core import Flock

flock = Flock()

@flock.agent
def process_id() -> int:
    return os.getpid()
"""
CONNECTIONS = 64


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (script := tmp_path / "script.py").write_text(SCRIPT)
    store = str(tmp_path / "flock.db")
    with running(*flockapi_command("serve", str(script), "--port", "0", "--workers", "2", "--store", store)) as server:
        server.wait_for_line("Application startup complete", times=2)
        while anyio.run(answered, server, 4).keys() != set(workers_of(server)):
            pass
        yield server


async def answered(server: Server, connections: int) -> Counter[int]:
    """Open connections at once, and keep them open until each has a response. Return how many each worker has."""
    body = {"agent_name": "process_id", "inputs": {}}
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S))
            for _ in range(connections)
        ]
        responses = await asyncio.gather(*(client.post("/run/flock", json=body) for client in clients))
        return Counter(response.json()["result"]["result"] for response in responses)


def test_workers_get_about_as_many_of_the_connections_that_are_opened_at_once(server: Server) -> None:
    for _ in range(3):
        found = anyio.run(answered, server, CONNECTIONS)
        assert found.keys() == set(workers_of(server))
        assert min(found.values()) > CONNECTIONS / 4, found


def test_a_worker_that_hangs_holds_up_no_connection(server: Server) -> None:
    hanging, other = workers_of(server)
    os.kill(hanging, signal.SIGSTOP)
    try:
        assert anyio.run(answered, server, CONNECTIONS) == {other: CONNECTIONS}
    finally:
        os.kill(hanging, signal.SIGCONT)
    assert anyio.run(answered, server, CONNECTIONS).keys() == {hanging, other}


def test_a_new_worker_gets_its_share(server: Server) -> None:
    killed, other = workers_of(server)
    os.kill(killed, signal.SIGKILL)
    server.wait_for_line("A new worker replaces it")
    assert anyio.run(answered, server, CONNECTIONS)[other] > 0
    server.wait_for_line("Application startup complete", times=3)
    while len(anyio.run(answered, server, 4)) < 2:
        pass
    found = anyio.run(answered, server, CONNECTIONS)
    assert killed not in found
    assert min(found.values()) > CONNECTIONS / 4, found


class Talk(asyncio.Protocol):
    """Sends its number."""

    def __init__(self, number: int, connections: set[object]) -> None:
        self._number, self._connections = number, connections

    def connection_made(self, transport: Any) -> None:
        self._connections.add(self)
        transport.write(b"%d" % self._number)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)


class Listener(socket.socket):
    """Can be made to fail."""

    error: OSError | None = None

    def accept(self) -> tuple[socket.socket, Any]:
        if self.error is not None:
            raise self.error
        return super().accept()


@contextlib.asynccontextmanager
async def accepting_with(counts: list[int]) -> AsyncIterator[tuple[Listener, Acceptor]]:
    """Accept connections as worker 0 of some that share *counts*."""
    listener, connections = Listener(), set[object]()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    acceptor = Acceptor(listener, lambda: Talk(0, connections), connections, counts, 0)
    try:
        yield listener, acceptor
    finally:
        acceptor.close()


async def read_from(listener: Listener) -> tuple[asyncio.StreamWriter, bytes]:
    reader, writer = await asyncio.open_connection(*listener.getsockname())
    return writer, await asyncio.wait_for(reader.read(1), PATIENCE_S)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_worker_counts_its_connections_until_it_closes(anyio_backend: str) -> None:
    counts = [NOT_ACCEPTING, NOT_ACCEPTING]
    async with accepting_with(counts) as (listener, acceptor):
        assert counts == [0, NOT_ACCEPTING]
        writer, said = await read_from(listener)
        acceptor.note()
        assert (said, counts) == (b"0", [1, NOT_ACCEPTING])
        writer.close()
        with anyio.fail_after(PATIENCE_S):
            while counts[0]:
                await anyio.sleep(0.001)
                acceptor.note()
    acceptor.close()
    assert counts == [NOT_ACCEPTING, NOT_ACCEPTING]
    assert listener.fileno() < 0


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_error_is_logged_and_the_connections_wait(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accepting, "RETRY_S", 0.01)
    async with accepting_with([NOT_ACCEPTING]) as (listener, _):
        listener.error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        waiting = asyncio.create_task(read_from(listener))
        with anyio.fail_after(PATIENCE_S):
            while len(caplog.records) < 2:  # noqa: ASYNC110
                await anyio.sleep(0.001)
        assert not waiting.done()
        listener.error = None
        writer, said = await waiting
        writer.close()
    assert said == b"0"
    assert caplog.messages[0] == "No connection can be accepted: Too many open files. It is tried again in 0.01 s."


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_worker_that_has_more_leaves_the_next_one_to_another_for_a_moment(
    anyio_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = list[float]()
    monkeypatch.setattr(Acceptor, "_pause_for", _noting(pauses, Acceptor._pause_for))
    counts = [NOT_ACCEPTING, 0]
    async with accepting_with(counts) as (listener, _):
        writers = [(await read_from(listener))[0]]
        assert not pauses  # it may have one more without waiting
        writers += [(await read_from(listener))[0] for _ in range(3)]
        assert set(pauses) == {accepting.YIELD_S}
        pauses.clear()
        counts[1] = 100
        writers += [(await read_from(listener))[0] for _ in range(3)]
        assert not pauses
        for writer in writers:
            writer.close()


def _noting(pauses: list[float], pause_for: Any) -> Any:
    def noted(acceptor: Acceptor, seconds: float) -> None:
        pauses.append(seconds)
        pause_for(acceptor, seconds)

    return noted

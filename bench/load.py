"""The load generator: connections that each have one request open at a time, in one thread of this process.

It sends prepared bytes and reads only the status and the length of a response, which costs about 10 µs a request. The
table shows how busy it is, because a ratio is only true if the server is the bottleneck. No tool must be installed.
"""

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import cast

import msgspec

from bench.machine import cpu_s
from bench.servers import Server

#: Receives the status and the body of a response, and returns the next request, or None.
Handler = Callable[[int, bytes], bytes | None]

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
CHUNKED, LAST_CHUNK = re.compile(rb"(?i)\r\ntransfer-encoding: *chunked"), b"\r\n0\r\n\r\n"
TIMEOUT_S = 120


class Connection(asyncio.Protocol):
    """A connection that stays open. Its handler is called with each response."""

    def __init__(self, handle: Handler) -> None:
        self.is_open = self.is_idle = True
        self._handle = handle
        self._received, self._size = bytearray(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False

    def send(self, request: bytes) -> None:
        self.is_idle = False
        self._transport.write(request)

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._received:
            self._received += data
            if len(self._received) < self._size:  # a response of megabytes is looked at once
                return
            data = bytes(self._received)
        head = data.find(b"\r\n\r\n")
        if head < 0 or not is_whole(data, head):
            found = LENGTH.search(data, 0, max(0, head))
            self._received, self._size = bytearray(data), head + 4 + int(found[1]) if found else 0
            return
        self._received = bytearray()
        self.is_idle = True  # a server may close it, if nothing comes for some seconds
        request = self._handle(int(data[9:12]), data[head + 4 :])
        if request is not None:
            self.send(request)


def is_whole(data: bytes, head: int) -> bool:
    """Whether *data* is a whole response, whose head ends at *head*. Chunks are not looked at: only their end is."""
    if found := LENGTH.search(data, 0, head):
        return len(data) >= head + 4 + int(found[1])
    return data.endswith(LAST_CHUNK) and CHUNKED.search(data, 0, head) is not None


@contextlib.asynccontextmanager
async def connected(server: Server, handlers: Iterable[Handler]) -> AsyncIterator[list[Connection]]:
    """Open a connection for each handler. Raises RuntimeError if the server has closed one before the end."""
    loop, connections = asyncio.get_running_loop(), []
    try:
        for handle in handlers:
            _, connection = await loop.create_connection(
                lambda handle=handle: Connection(handle),  # type: ignore[misc]
                "127.0.0.1",
                server.port,
            )
            connections.append(connection)
        yield connections
        if lost := sum(not (connection.is_open or connection.is_idle) for connection in connections):
            raise RuntimeError(f"{server.name} closed {lost} of {len(connections)} connections.")
    finally:
        for connection in connections:
            connection.close()


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What loading a server for some time has shown.

    Attributes:
        requests: the number of requests, which all have a response.
        per_s: responses a second.
        server_us: the CPU time of the server for each response.
        load_percent: how busy the load generator was.
    """

    requests: int
    per_s: float
    server_us: float
    load_percent: float


class Repeater:
    """Sends requests again and again for some seconds, and counts the responses."""

    def __init__(self, requests: Iterable[bytes], seconds: float, expected: int, proof: bytes) -> None:
        self.done, self.wrong, self.last, self.proof = 0, 0, b"", proof
        self._requests = itertools.cycle(requests)
        self._seconds, self._expected = seconds, expected
        self._deadline, self._open = 0.0, 0
        self._finished = asyncio.Event()

    def handle(self, status: int, body: bytes) -> bytes | None:
        self.done += 1
        self.wrong += status != self._expected or self.proof not in body
        self.last = body
        if time.perf_counter() < self._deadline:
            return next(self._requests)
        self._open -= 1
        if not self._open:
            self._finished.set()
        return None

    async def run(self, connections: Sequence[Connection]) -> None:
        """Return when the time is over, and each connection has its last response."""
        self._deadline, self._open = time.perf_counter() + self._seconds, len(connections)
        for connection in connections:
            connection.send(next(self._requests))
        await asyncio.wait_for(self._finished.wait(), TIMEOUT_S)


async def repeat(
    server: Server,
    requests: Sequence[bytes],
    *,
    connections: int,
    seconds: float,
    expected: int = 200,
    proof: bytes = b"",
    settle: Callable[[bytes], object] | None = None,
) -> Sample:
    """Send *requests* again and again for some seconds, from many connections.

    Args:
        proof: what the body of each response must contain.
        settle: called with the last response. It returns when the work of all responses is done. Its time counts.

    Raises: RuntimeError if a response does not have the expected status.
    """
    load = Repeater(requests, seconds, expected, proof)
    async with connected(server, [load.handle] * connections) as opened:
        server_s, load_s, began = cpu_s(server.pid), time.process_time(), time.perf_counter()
        await load.run(opened)
        load_percent = 100 * (time.process_time() - load_s) / (time.perf_counter() - began)
        if settle is not None:
            settle(load.last)
        took_s, server_s = time.perf_counter() - began, cpu_s(server.pid) - server_s
    if load.wrong:
        wanted = f"the status {expected}" + (f" and {proof.decode()}" if proof else "")
        raise RuntimeError(
            f"{server.name}: {load.wrong} of {load.done} responses do not have {wanted}: {load.last[:500]!r}"
        )
    return Sample(
        requests=load.done,
        per_s=load.done / took_s,
        server_us=server_s / load.done * 1e6,
        load_percent=load_percent,
    )


async def send_all(server: Server, requests: Sequence[bytes], *, connections: int, expected: int = 200) -> list[bytes]:
    """Send each request once, from many connections, and return the bodies of the responses in the order of arrival.

    Raises: RuntimeError if a response does not have the expected status.
    """
    stream, bodies, wrong, finished = iter(requests), list[bytes](), list[bytes](), asyncio.Event()

    def handle(status: int, body: bytes) -> bytes | None:
        (bodies if status == expected else wrong).append(body)
        if wrong or len(bodies) == len(requests):
            finished.set()
        return next(stream, None)

    async with connected(server, [handle] * min(connections, len(requests))) as opened:
        for connection in opened:
            connection.send(next(stream))
        await asyncio.wait_for(finished.wait(), TIMEOUT_S)
    if wrong:
        raise RuntimeError(f"{server.name} does not respond {expected}: {wrong[0][:500]!r}")
    return bodies

"""Streams of text, each with one reader: what a piece costs, and how late it is."""

import asyncio
import re
import statistics
import time
from typing import cast

import msgspec

from bench.machine import cpu_s
from bench.servers import Server

TIMEOUT_S = 120
STAMP = re.compile(rb"(?<!\d)(\d{12,19}) ")


class Listener(asyncio.Protocol):
    """A reader of a stream, whose pieces are the times at which they were written."""

    def __init__(self, request: bytes) -> None:
        self.late_ns: dict[bytes, int] = {}
        self.received = bytearray()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._scanned = request, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self.received += data
        for stamp in STAMP.finditer(self.received, self._scanned):
            self.late_ns.setdefault(bytes(stamp[1]), now - int(stamp[1]))  # the end may repeat the text
            self._scanned = stamp.end()
        self._scanned = max(self._scanned, len(self.received) - 20)  # a stamp may be there in part
        if self.received.endswith(b"\r\n0\r\n\r\n"):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class Streams(msgspec.Struct, frozen=True, kw_only=True):
    """What many streams at once have cost the server.

    Attributes:
        piece_us: the CPU time of the server for each piece.
        late_ms: how late a piece was, at the median.
        kb: the size of each stream, with its head.
    """

    piece_us: float
    late_ms: float
    kb: float


async def read_streams(server: Server, request: bytes, streams: int, pieces: int, proof: bytes = b"") -> Streams:
    """Read streams to their end. Raises RuntimeError if one does not have all pieces, or not the *proof* of its end."""
    loop, used_s = asyncio.get_running_loop(), cpu_s(server.pid)
    opened = [await loop.create_connection(lambda: Listener(request), "127.0.0.1", server.port) for _ in range(streams)]
    await asyncio.wait_for(asyncio.gather(*(listener.ended for _, listener in opened)), TIMEOUT_S)
    used_s = cpu_s(server.pid) - used_s
    for _, listener in opened:
        if len(listener.late_ns) != pieces or proof not in listener.received:
            found = f"{len(listener.late_ns)} of {pieces} pieces"
            raise RuntimeError(f"{server.name}: a stream with {found}: {bytes(listener.received[:500])!r}")
    return Streams(
        piece_us=used_s / (streams * pieces) * 1e6,
        late_ms=statistics.median(late for _, listener in opened for late in listener.late_ns.values()) / 1e6,
        kb=sum(len(listener.received) for _, listener in opened) / streams / 1e3,
    )

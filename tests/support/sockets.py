"""Raw connections to a server, and servers that misbehave."""

import contextlib
import functools
import socket
import struct
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import anyio
import anyio.abc

from tests.support.servers import Server

#: More than the socket buffers of both sides hold.
LONG_BYTES = 64 * 1024 * 1024
#: More than the kernel's buffers for one connection, and much less than LONG_BYTES.
KERNEL_BYTES = 16 * 1024 * 1024


#: The size of a bomb when it is decompressed.
BOMB_BYTES = 256 * 1024 * 1024


@functools.cache
def gzip_bomb() -> bytes:
    """Return BOMB_BYTES of spaces, compressed. They are equal blocks, so that it is made at once."""
    content, compressor, crc = b" " * 1024 * 1024, zlib.compressobj(wbits=zlib.MAX_WBITS | 16), 0
    first, block = (compressor.compress(content) + compressor.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    for _ in range(blocks := BOMB_BYTES // len(content)):
        crc = zlib.crc32(content, crc)
    return first + block * (blocks - 1) + b"\3\0" + struct.pack("<II", crc, BOMB_BYTES)


@contextlib.contextmanager
def little_memory(max_bytes: int = BOMB_BYTES // 4) -> Iterator[None]:
    """Check that the block never holds more than *max_bytes* of new memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def connected(server: Server, request: str | bytes = b"", receive_bytes: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        connection.sendall(request.encode() if isinstance(request, str) else request)
        yield connection


def sent_before_refused(connection: socket.socket, piece: bytes, patience_s: float = 2) -> int:
    """Send *piece* until the server closes or stops reading, and return the number of bytes sent."""
    sent = 0
    connection.settimeout(patience_s)
    with contextlib.suppress(TimeoutError, ConnectionError):
        while sent < LONG_BYTES:
            sent += connection.send(piece)
    return sent


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


@contextlib.asynccontextmanager
async def socket_server(
    handle: Callable[[anyio.abc.SocketStream], Awaitable[None]],
) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve each connection to a real socket with *handle*. Yield its URL, and a list with one entry per connection."""
    connections: list[int] = []

    async def count(stream: anyio.abc.SocketStream) -> None:
        connections.append(1)
        async with stream:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                await handle(stream)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, count)
        yield f"http://127.0.0.1:{port}/v1", connections
        tasks.cancel_scope.cancel()

"""``flockapi mcp``: the MCP server over stdin and stdout. Each line becomes a request to the same app."""

import contextlib
import hashlib
import logging.config
import os
import signal
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.to_thread
import msgspec
from starlette.types import ASGIApp, Message

from flock.command.server import abandon_busy_threads, log_config
from flock.declared import DeclaredFlock
from flock.runs import Principal
from flockapi import FlockAPI

#: The owner of all runs: the person who uses the host. It has no roles.
LOCAL = Principal(name="local")
#: How long requests may still take after the input has ended, in seconds. Then their runs are cancelled.
LAST_REQUESTS_S = 2


class _Cancelled(msgspec.Struct, frozen=True, rename="camel"):
    request_id: msgspec.Raw = msgspec.Raw(b"")


class _Sent(msgspec.Struct, frozen=True):
    """What has to be known of a message before the app reads it."""

    id: msgspec.Raw = msgspec.Raw(b"")
    method: str = ""
    params: _Cancelled = _Cancelled()


def state_file(target: str) -> str:
    """Return the default store of the flock *target*, in the user's state folder, which is created."""
    source, _, name = target.partition(":")
    source = os.path.abspath(source) if source.endswith(".py") else source
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "flockapi"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder / f"{Path(source).stem}-{hashlib.sha256(f'{source}:{name}'.encode()).hexdigest()[:8]}.db")


def take_streams() -> tuple[int, int]:
    """Return stdin and stdout. From now on the program reads nothing, and prints to stderr."""
    source, sink, nothing = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return source, sink


def serve_stdio(flock: DeclaredFlock, streams: tuple[int, int], *, store: str, log_json: bool) -> None:
    """Serve *flock* until the input ends. This configures logging for the whole process. Raises StoreError."""
    logging.config.dictConfig(log_config(log_json))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a thread that reads cannot be interrupted

    async def identify(_: Any) -> Principal:
        return LOCAL

    app = FlockAPI(flock, server_name=flock.name, store=store, auth=identify, protocols=["mcp"], metrics=False)
    anyio.run(_serve, app, *streams)
    abandon_busy_threads()


async def _serve(app: FlockAPI, source: int, sink: int) -> None:
    one_at_a_time = anyio.CapacityLimiter(1)
    os.set_blocking(sink, True)  # otherwise a full pipe would get a part of a line
    with os.fdopen(source, "rb") as read, os.fdopen(sink, "wb", buffering=0) as written:

        def write_line(line: bytes) -> None:
            rest = memoryview(line + b"\n")
            while rest:
                rest = rest[written.write(rest) :]

        async def write(line: bytes) -> None:
            await anyio.to_thread.run_sync(write_line, line, limiter=one_at_a_time)

        async with app.lifespan():
            await serve_lines(app, lines_of(read, app.options.max_body_bytes), write)


async def lines_of(source: IO[bytes], max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Yield each line of *source*. Of one that is too long, only the beginning, which the app rejects."""
    while line := await anyio.to_thread.run_sync(source.readline, max_bytes + 2):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = await anyio.to_thread.run_sync(source.readline, max_bytes)
        yield line


async def serve_lines(app: ASGIApp, lines: AsyncIterable[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
    """Send each line to *app*, and *write* what it returns, until there are no more lines.

    A request that the client cancels, or whose response it does not read, ends as if the client had disconnected.
    """
    # The ids of the requests that have not ended. Two may have the same one.
    open_ids = weakref.WeakKeyDictionary[anyio.CancelScope, bytes]()
    async with anyio.create_task_group() as tasks:
        async for line in lines:
            sent = _Sent()
            with contextlib.suppress(msgspec.DecodeError, RecursionError):  # the app says what is wrong
                sent = msgspec.json.decode(line, type=_Sent)
            if sent.method == "notifications/cancelled":
                for scope in [each for each, id_ in open_ids.items() if id_ == bytes(sent.params.request_id)]:
                    scope.cancel()
            elif line.strip():
                scope = anyio.CancelScope()
                open_ids[scope] = bytes(sent.id)
                tasks.start_soon(_exchange, app, line, scope, write)
        tasks.cancel_scope.deadline = anyio.current_time() + LAST_REQUESTS_S


async def _exchange(
    app: ASGIApp, line: bytes, scope: anyio.CancelScope, write: Callable[[bytes], Awaitable[None]]
) -> None:
    """Send one request to *app*, and write its response: one line, or one for each event of a stream."""
    body, received, end = [line], [b""], b"\n"

    async def receive() -> Message:
        if not body:
            await anyio.sleep_forever()
        return {"type": "http.request", "body": body.pop(), "more_body": False}

    async def send(message: Message) -> None:
        nonlocal end
        if message["type"] == "http.response.start":
            end = b"\n\n" if any(b"event-stream" in value for _, value in message["headers"]) else end
            return
        piece = message.get("body", b"")
        is_end = end in received[-1][-1:] + piece
        received.append(piece)
        if not is_end:
            return
        *whole, rest = b"".join(received).split(end)
        received[:] = [rest]
        try:
            for text in whole:
                if text := text.partition(b"data: ")[2] if end == b"\n\n" else text:  # not a comment
                    await write(text)
        except OSError:  # the host has closed its end
            scope.cancel()

    request = {
        **{"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "scheme": "http"},
        **{"method": "POST", "path": "/mcp", "query_string": b"", "flock.is_stdio": True},
        "headers": [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")],
    }
    with scope, contextlib.suppress(Exception):  # the app has logged it, after its response
        await app(request, receive, send)

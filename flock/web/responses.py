"""Responses: JSON, server-sent events, and long ones in pieces, of which an unread one holds one in memory."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, nullcontext
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from flock.errors import FlockError
from flock.runs import Engine, Event, LongJSON

__all__ = [
    "PIECE_BYTES",
    "EventStream",
    "JSONResponse",
    "LimitedStream",
    "LongResponse",
    "PageResponse",
    "add_headers",
    "cut_message",
    "event_parts",
    "event_text",
    "head_of_stream",
    "kept",
    "long_parts",
    "pieces",
]

logger = logging.getLogger("flock.api")

#: A server copies what it is given to send, until the client has read it; so it is given so much at a time.
PIECE_BYTES = 64 * 1024


#: When the reader of an event stream that was cut should connect again, in milliseconds.
RECONNECT_MS = 1000


class JSONResponse(Response):
    """A struct as JSON. A newline ends it, so that a shell's prompt starts on its own line."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content) + b"\n"


def add_headers(start: Message, request_id: str, more: Mapping[str, str]) -> None:
    """Give the start of a response its id, *more* headers, and those that keep it out of caches and guesses."""
    names = {name.lower() for name, _ in start["headers"]}
    added = {"x-request-id": request_id, **more}
    if b"x-content-type-options" not in names:
        added["x-content-type-options"] = "nosniff"
    if b"cache-control" not in names and b"etag" not in names:  # an ETag is there for caches
        added["cache-control"] = "no-store"
    start["headers"] = [*start["headers"], *((name.encode(), value.encode()) for name, value in added.items())]


def cut_message(message: Message) -> Iterator[Message]:
    """A message of ASGI as several, if its body is long."""
    body: bytes = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield {**message, "body": body[start:end], "more_body": end < len(body) or message.get("more_body", False)}


async def event_text(
    events: AsyncIterator[Event | None], engine: Engine, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The body of a stream of *events*. If the engine is about to stop, it ends with when to connect again."""
    is_event_whole = True
    try:
        async for event in events:
            is_event_whole = False
            parts = event_parts(event)
            with kept(parts):
                async for piece in pieces(parts):
                    yield piece
            is_event_whole = True
    except FlockError as exc:
        logger.warning("request %s: its event stream is cut: %s", request_id, exc)
    if engine.is_draining and is_event_whole:  # an empty line would make an event of what was sent of the last one
        yield b"retry: %d\n\n" % RECONNECT_MS


def long_parts(content: Any, before: bytes, after: bytes) -> list[bytes | LongJSON]:
    """The JSON of *content* between other text, with each ``LongJSON`` in it as a part of its own."""
    long: list[LongJSON] = []

    def mark(value: LongJSON) -> msgspec.Raw:
        long.append(value)
        return msgspec.Raw(b"\0")

    text = b"%b%b%b" % (before, msgspec.json.encode(content, enc_hook=mark), after)
    first, *others = text.split(b"\0")  # JSON has no such character
    return [first, *(part for pair in zip(long, others, strict=True) for part in pair)]


@contextmanager
def kept(parts: Sequence[bytes | LongJSON]) -> Iterator[None]:
    """Keep what is read as it is sent from retention within the block."""
    with ExitStack() as stack:
        for part in parts:
            if isinstance(part, LongJSON):
                stack.enter_context(part.kept())
        yield


async def pieces(parts: Sequence[bytes | LongJSON]) -> AsyncIterator[bytes]:
    """All of *parts*; a long one is read as it is asked for. Raises RunNotFound, StoreError."""
    for part in parts:
        for piece in part.pieces() if isinstance(part, LongJSON) else (part,):
            yield piece


class LongResponse(StreamingResponse):
    """JSON with each ``LongJSON`` in it, and a newline at its end. Its length is known, so it is not chunked.

    If it cannot be read to its end, a WARNING is logged, and the server closes the connection.
    """

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int, headers: Mapping[str, str], *, is_head: bool) -> None:
        parts = long_parts(content, b"", b"\n")
        length = sum(part.length if isinstance(part, LongJSON) else len(part) for part in parts)
        self._parts: Sequence[bytes | LongJSON] = [] if is_head else parts
        super().__init__(pieces(self._parts), status_code, {**headers, "Content-Length": str(length)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with kept(self._parts):
            try:
                await super().__call__(scope, receive, send)
            except FlockError as exc:
                logger.warning("request %s: its answer is cut: %s", scope["flock.request_id"], exc)


class PageResponse(JSONResponse):
    """A page of records. If it is long, *held* is entered before it is sent, and left however that ends."""

    def __init__(
        self,
        content: Any,
        held: AbstractContextManager[None],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(content, status_code, headers)
        self._held = held if len(self.body) > PIECE_BYTES else nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


class LimitedStream(StreamingResponse):
    """A stream of unknown length. *held* is entered before it starts, and left, with *content* closed, however it ends.

    Raises: when it is sent, what entering *held* raises, which is answered as any error of the handler.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        held: AbstractContextManager[None],
        headers: Mapping[str, str],
        media_type: str | None = None,
    ) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._content, self._held = content, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            async with aclosing(self._content):
                await super().__call__(scope, receive, send)


class EventStream(LimitedStream):
    """Server-sent events."""

    media_type = "text/event-stream"


def head_of_stream(media_type: str, headers: Mapping[str, str]) -> Response:
    """The answer to HEAD where GET would stream: how long that is nobody can say (RFC 9110, section 8.6)."""
    response = Response(media_type=media_type, headers=headers)
    del response.headers["Content-Length"]
    return response


def event_parts(event: Event | None) -> list[bytes | LongJSON]:
    """One event as ``text/event-stream`` has it; None is a comment, which keeps the connection open."""
    if event is None:
        return [b": still here\n\n"]
    id_ = b"" if event.id is None else b"id: %d\n" % event.id
    return long_parts(event.data, b"%sevent: %s\ndata: " % (id_, event.name.encode()), b"\n\n")

"""Responses: JSON, server-sent events, and long responses, of which only one piece at a time is in memory."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import anyio
import msgspec
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from flock.errors import FlockError
from flock.runs import Engine, Event, LongJSON, Run
from flock.web.requests import while_connected

logger = logging.getLogger("flock.api")

#: Max size of a piece that is passed to the server, which holds a copy until the client has read it.
PIECE_BYTES = 64 * 1024

#: In events these do not end a line, but they do for ``str.splitlines`` and the ``iter_lines`` of httpx.
LINE_ENDS = {b"\xc2\x85": rb"\u0085", b"\xe2\x80\xa8": rb"\u2028", b"\xe2\x80\xa9": rb"\u2029"}

#: What JSON has to escape in a string that is JSON, the backslash first.
QUOTED = {b"\\": rb"\\", b'"': rb"\"", b"\n": rb"\n", b"\r": rb"\r", b"\t": rb"\t"}

#: A comment in an event stream.
KEEP_ALIVE = b": keep-alive\n\n"

#: How long a client should wait before it reconnects to an event stream that was cut off, in milliseconds.
RECONNECT_MS = 1000


#: The events that are a piece of text.
DELTAS = ("output.delta", "reasoning.delta")

#: The members of ``run.accepted``.
ACCEPTED = ("run_id", "attempt", "agent_name", "status")


class JSONResponse(Response):
    """A struct as JSON, with a newline at the end, so that a shell prompt starts on its own line."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content) + b"\n"


def add_headers(start: Message, request_id: str, more: Mapping[str, str]) -> None:
    """Add the request id, *more* headers, and defaults that prevent caching and sniffing to the start of a response."""
    if more:
        MutableHeaders(scope=start).update(more)
    headers = [header for header in start.get("headers", ()) if header[0] != b"x-request-id"]
    names = {name for name, _ in headers}
    headers.append((b"x-request-id", request_id.encode()))
    if b"x-content-type-options" not in names:
        headers.append((b"x-content-type-options", b"nosniff"))
    if b"cache-control" not in names and b"etag" not in names:  # the latter is there for caches
        headers.append((b"cache-control", b"no-store"))
    start["headers"] = headers


def split_message(message: Message) -> Iterator[Message]:
    """Split an ASGI message with a long body into several messages."""
    body: bytes = message["body"]
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield {**message, "body": body[start:end], "more_body": end < len(body) or message.get("more_body", False)}


async def event_text(
    events: AsyncGenerator[Event | None, None], engine: Engine, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Yield the body of a stream of *events*. If the engine is draining, the last line is a ``retry`` hint."""
    is_event_whole, position = True, None
    try:
        async with aclosing(events):
            async for event in events:
                if event is not None and event.name in DELTAS and event.data["position"] == position:
                    yield _delta(event)
                    continue
                if event is not None and event.name == "step.started":
                    position = event.data["position"]
                parts, is_event_whole = _event_parts(event), False
                with held(parts):
                    async for piece in _event_pieces(parts):
                        yield piece
                is_event_whole = True
    except FlockError as exc:
        logger.warning("request %s: the event stream was cut off: %s", request_id, exc)
    if engine.is_draining and is_event_whole:  # otherwise the empty line would complete a partial event
        yield b"retry: %d\n\n" % RECONNECT_MS


async def events_of_new_run(engine: Engine, run: Run, *, reasoning: bool) -> AsyncGenerator[Event | None, None]:
    """Yield ``run.accepted``, then the events of a run until it ends or waits for an answer."""
    run_id = run.run_id
    yield Event(id=None, name="run.accepted", data={name: getattr(run, name) for name in ACCEPTED})
    del run  # frees its inputs, which may be long
    async with aclosing(engine.events(run_id, reasoning=reasoning)) as events:
        async for event in events:
            yield event
            if event is not None and event.name == "run.waiting":
                return


def _long_parts(content: Any, before: bytes, after: bytes) -> list[bytes | LongJSON]:
    """Return *before*, the JSON of *content*, and *after*, with each ``LongJSON`` as a part of its own."""
    long: list[LongJSON] = []

    def mark(value: LongJSON) -> msgspec.Raw:
        long.append(value)
        return msgspec.Raw(b"\0")

    text = b"%b%b%b" % (before, msgspec.json.encode(content, enc_hook=mark), after)
    first, *others = text.split(b"\0")  # JSON never contains this byte
    return [first, *(part for pair in zip(long, others, strict=True) for part in pair)]


def size_of(content: Any) -> int:
    """Return the bytes of the JSON of *content*, without those of texts that are not loaded."""
    return _size(_long_parts(content, b"", b""))


def _size(parts: Sequence[bytes | LongJSON]) -> int:
    return sum(part.length if isinstance(part, LongJSON) else len(part) for part in parts)


@contextmanager
def held(parts: Sequence[bytes | LongJSON]) -> Iterator[None]:
    """Prevent retention from deleting *parts* during the block, in which they are read from the store."""
    with ExitStack() as stack:
        for part in parts:
            if isinstance(part, LongJSON):
                stack.enter_context(part.kept())
        yield


async def pieces(parts: Sequence[bytes | LongJSON]) -> AsyncIterator[bytes]:
    """Yield all *parts*. A long one is read from the store piece by piece. Raises RunNotFound, StoreError."""
    for part in parts:
        if isinstance(part, LongJSON):
            async for piece in part.pieces():
                yield piece
        else:
            yield part


async def _event_pieces(parts: Sequence[bytes | LongJSON]) -> AsyncIterator[bytes]:
    """Yield all *parts* of an event, with the characters in LINE_ENDS as JSON escapes. Raises as ``pieces`` does."""
    rest = b""  # the last bytes of a piece may be the first ones of such a character
    async for piece in pieces(parts):
        text = rest + piece
        whole = text.rstrip(b"\xc2\xe2\x80")
        rest = text[len(whole) :]
        yield _escaped(whole)


class CutOff(Exception):
    """The rest of an event cannot be read. Its stream ends, since any other event would be taken for a part of it."""


async def long_event(content: Any) -> AsyncGenerator[bytes, None]:
    """Yield a server-sent event like ``sent_event``. A ``LongJSON`` in it is read from the store piece by piece.

    Raises: CutOff.
    """
    parts = _long_parts(content, b"data: ", b"\n\n")
    try:
        with held(parts):
            async for piece in _event_pieces(parts):
                yield piece
    except FlockError as exc:
        raise CutOff(str(exc)) from exc


def _delta(event: Event) -> bytes:
    """Return a piece of text, without what the last ``step.started``, or ``call.started`` of the call, has said."""
    if not event.sent:
        shown = {name: event.data[name] for name in ("call_id", "field", "text") if name in event.data}
        msgspec.structs.force_setattr(event, "sent", sent_event(shown, event.name))
    return event.sent


def _escaped(text: bytes, escapes: Mapping[bytes, bytes] = LINE_ENDS) -> bytes:
    if escapes is LINE_ENDS and text.isascii():
        return text
    for character, escape in escapes.items():
        text = text.replace(character, escape)
    return text


class QuotedJSON(LongJSON):
    """The JSON of *content*, in which a ``LongJSON`` may be, as a JSON string. Escaping adds to its ``length``."""

    def __init__(self, content: Any) -> None:
        self._parts = _long_parts(content, b"", b"")
        self.length = _size(self._parts)
        self.kept = partial(held, self._parts)

    async def pieces(self) -> AsyncIterator[bytes]:
        yield b'"'
        async for piece in pieces(self._parts):
            yield _escaped(piece, QUOTED)
        yield b'"'


class LongResponse(StreamingResponse):
    """JSON that contains ``LongJSON`` values, with a newline at the end. It is not chunked if its length is known.

    It holds *slot* while it is sent. ``size`` is that of the JSON; escaping adds to it.

    If a value cannot be read completely, a WARNING is logged, and the server closes the connection.
    """

    media_type = "application/json"

    def __init__(
        self,
        content: Any,
        status_code: int,
        headers: Mapping[str, str],
        *,
        is_head: bool,
        slot: AbstractContextManager[None] | None = None,
    ) -> None:
        parts = _long_parts(content, b"", b"\n")
        self.content, self.size, self._slot = content, _size(parts), slot or nullcontext()
        if not any(isinstance(part, QuotedJSON) for part in parts):
            headers = {**headers, "Content-Length": str(self.size)}
        self._parts: Sequence[bytes | LongJSON] = [] if is_head else parts
        super().__init__(pieces(self._parts), status_code, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot, held(self._parts):
            try:
                await super().__call__(scope, receive, send)
            except FlockError as exc:
                logger.warning("request %s: the response was cut off: %s", scope["flock.request_id"], exc)


class PageResponse(JSONResponse):
    """A page of records. If it is long, it holds *slot* while it is sent."""

    def __init__(
        self,
        content: Any,
        slot: AbstractContextManager[None],
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(content, status_code, headers)
        self._slot = slot if len(self.body) > PIECE_BYTES else nullcontext()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._slot:
            await super().__call__(scope, receive, send)


class LimitedStream(StreamingResponse):
    """A stream of unknown length. It holds *slot* while it is sent, and closes *content* at the end.

    Args:
        on_cut_off: called if the client disconnects, or the request is cancelled, before the end of the stream.
        is_awaited: nothing is sent before the first piece of *content* is there, which is empty.

    Raises: when it is sent, the error of entering *slot*, or of a first piece that is awaited. It becomes a response
        like any error of the handler.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        slot: AbstractContextManager[object],
        headers: Mapping[str, str],
        media_type: str | None = None,
        *,
        on_cut_off: Callable[[], Awaitable[object]] | None = None,
        is_awaited: bool = False,
    ) -> None:
        super().__init__(content, headers=headers, media_type=media_type)
        self._is_awaited = is_awaited
        self._content, self._slot, self._on_cut_off = content, slot, on_cut_off

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._on_cut_off = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._slot:
                async with aclosing(self._content):
                    if self._is_awaited:
                        await while_connected(Request(scope, receive), anext(self._content))
                    await super().__call__(scope, receive, send)
        finally:
            if self._on_cut_off is not None:
                with anyio.CancelScope(shield=True), suppress(FlockError):
                    await self._on_cut_off()


class EventStream(LimitedStream):
    """Server-sent events. If one of them is cut off, a WARNING is logged, and the server closes the connection."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except CutOff as exc:
            logger.warning("request %s: the event stream was cut off: %s", scope["flock.request_id"], exc)


def head_of_stream(media_type: str, headers: Mapping[str, str]) -> Response:
    """Return the response to HEAD for a stream, whose length is unknown (RFC 9110, section 8.6)."""
    response = Response(media_type=media_type, headers=headers)
    del response.headers["Content-Length"]
    return response


def sent_event(content: Any, name: str | None = None) -> bytes:
    """Return a server-sent event with *content*, which is not long, as JSON."""
    data = _escaped(msgspec.json.encode(content))
    return b"%bdata: %b\n\n" % (b"" if name is None else b"event: %b\n" % name.encode(), data)


def _event_parts(event: Event | None) -> list[bytes | LongJSON]:
    """Return one event as ``text/event-stream``. None becomes a comment, which keeps the connection open."""
    if event is None:
        return [KEEP_ALIVE]
    id_ = b"" if event.id is None else b"id: %d\n" % event.id
    return _long_parts(event.data, b"%sevent: %s\ndata: " % (id_, event.name.encode()), b"\n\n")

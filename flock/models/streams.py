"""Streamed replies of model servers: server-sent events with the pieces of one chat completion."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from flock.errors import ModelError
from flock.models import http
from flock.models.bodies import BadBody, Whole, pieces_of
from flock.models.completions import Listener
from flock.models.pieces import Joiner, joined
from flock.models.replies import bad_response, decoded, model_error, stream_error, text_of, unfinished_usage
from flock.models.sse import Event, Events
from flock.runs import Usage
from flock.scopes import current_task

if TYPE_CHECKING:
    import httpx

#: Max memory of a reply, if each of its pieces needs this much beside its text.
MAX_REPLY_BYTES, PIECE_BYTES = 64 * 1024 * 1024, 200
#: About how many bytes of text are one token.
BYTES_PER_TOKEN = 4
#: How long to wait for the token usage after a reply is complete, and for the end of the connection after that.
USAGE_S, END_S = 2.0, 0.1


class _FunctionPiece(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _CallPiece(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _FunctionPiece | None = None


class _Delta(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    tool_calls: list[_CallPiece] | None = None
    #: by provider
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(msgspec.Struct):
    index: int | None = 0
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Any = None
    error: Any = None
    object: str | None = None


_CHUNKS = msgspec.json.Decoder(_Chunk)


def _is_error(chunk: _Chunk) -> bool:
    reasons = [choice.finish_reason for choice in chunk.choices or () if not choice.index]
    return bool(chunk.error) or chunk.object == "error" or "error" in reasons


class _Call:
    """A tool call, of which some pieces have arrived."""

    def __init__(self, id: str | None) -> None:
        self.id = id
        self.name: str | None = None
        self.arguments: list[Any] = []

    def add(self, function: _FunctionPiece) -> None:
        self.name = self.name or function.name
        if function.arguments is not None:
            self.arguments.append(function.arguments)

    def whole(self) -> dict[str, Any]:
        arguments = self.arguments
        if all(isinstance(piece, str) for piece in arguments):
            arguments = [joined("".join(arguments))]
        return {"id": self.id, "function": {"name": self.name, "arguments": arguments[-1]}}


class StreamedReply:
    """Assembles a chat completion from the chunks of a stream, and reports its text to *listener*.

    Attributes:
        is_complete: whether the server has sent a finish reason or the end of the stream.
        is_ended: whether it has sent the end of the stream.
        has_begun: whether it has sent a part of the reply.
        received_bytes: of text, reasoning and arguments.

    Args:
        name: of the model.
    """

    def __init__(self, name: str, listener: Listener) -> None:
        self.is_complete = self.is_ended = self.has_begun = False
        self.received_bytes = 0
        self._name = name
        self._listener = listener
        self._content: list[str] = []
        self._text, self._thoughts = Joiner(), Joiner()
        self._refusal: list[str] = []
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._finish_reason: str | None = None
        self._usage: Any = None
        self._size = 0
        #: text that the listener has not received, and whether it is of the answer
        self._unreported: list[str] = []
        self._is_answer = True

    def take(self, event: Event) -> None:
        """Add an event of a stream. Raises ModelError."""
        if self.is_ended:
            return
        try:
            chunk = _CHUNKS.decode(event.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass  # not a chunk, or one that needs a lenient decoder
        else:
            if event.name != "error" and not _is_error(chunk):
                self._add(chunk)
                return
        if event.data.strip() == b"[DONE]":
            self.is_complete = self.is_ended = True
            return
        try:
            data = decoded(event.data)
        except (ValueError, RecursionError) as exc:
            if event.name == "error":
                raise stream_error(self._name, event.data.decode(errors="replace")) from exc
            raise bad_response(self._name, "sent an event that is not JSON", f"{event.data[:200]!r}") from exc
        if event.name == "error":
            raise stream_error(self._name, data)
        self.add(data)

    def add(self, data: Any) -> None:
        """Add one chunk. Raises ModelError."""
        try:
            chunk = msgspec.convert(data, _Chunk)
        except msgspec.ValidationError as exc:
            raise bad_response(self._name, "sent an event that is not a chunk of a chat completion", str(exc)) from exc
        if not (chunk.error or chunk.object == "error"):
            self._add(chunk)
        if _is_error(chunk):
            raise stream_error(self._name, data)

    def _add(self, chunk: _Chunk) -> None:
        self.has_begun = True
        self._usage = chunk.usage or self._usage
        for choice in chunk.choices or ():
            if choice.index:  # only one answer was requested
                continue
            if choice.delta is not None:
                self._add_delta(choice.delta)
            if choice.finish_reason and choice.finish_reason != "error":
                self._finish_reason, self.is_complete = choice.finish_reason, True

    def end(self) -> dict[str, Any]:
        """Return the chat completion, as a server sends it without a stream. Raises ModelError if it is incomplete."""
        self._add_text(self._text.end())
        self._add_reasoning(self._thoughts.end())
        if not self.is_complete:
            reason = "ended its stream before the answer was complete"
            raise model_error(self._name, "model_unavailable", reason)
        message: dict[str, Any] = {
            "content": "".join(self._content) if self._content else None,
            "refusal": "".join(self._refusal) or None,
            "tool_calls": [call.whole() for call in self._calls],
        }
        return {"choices": [{"message": message, "finish_reason": self._finish_reason}], "usage": self._usage}

    def unfinished_usage(self, prompt_bytes: int) -> Usage:
        """Return the tokens used so far: as the server has counted them, or an estimate."""
        input_tokens, output_tokens = (-(-size // BYTES_PER_TOKEN) for size in (prompt_bytes, self.received_bytes))
        return unfinished_usage(self._usage, input_tokens, output_tokens)

    def _add_delta(self, delta: _Delta) -> None:
        for thought in (delta.reasoning_content, delta.reasoning):
            if thought and isinstance(thought, str):
                self._add_reasoning(self._thoughts.add(thought))
                break
        if isinstance(text := text_of(delta.content), str):
            self._add_text(self._text.add(text))
        if delta.refusal:
            self._count(delta.refusal)
            self._refusal.append(delta.refusal)
        for piece in delta.tool_calls or ():
            function = piece.function or _FunctionPiece()
            self._count(str(function.arguments))
            self._call_of(piece, function).add(function)

    def _call_of(self, piece: _CallPiece, function: _FunctionPiece) -> _Call:
        """Return the call that *piece* continues, or a new one. Only pieces with a name begin a call.

        Some servers send no index, or 0 for all calls. Others send no id, or a new one with each piece.
        """
        known = next(reversed(self._calls), None) if piece.index is None else self._by_index.get(piece.index)
        continues = known is not None and (not function.name or (known.id and piece.id in (None, "", known.id)))
        if known is None or not continues:
            known = _Call(piece.id)
            self._calls.append(known)
        if piece.index is not None:
            self._by_index[piece.index] = known
        return known

    def _add_text(self, text: str) -> None:
        if text:
            self._count(text)
            self._content.append(text)
            self._report(text, is_answer=True)

    def _add_reasoning(self, text: str) -> None:
        if text:
            self.received_bytes += len(text.encode(errors="replace"))
            self._report(text, is_answer=False)

    def _report(self, text: str, *, is_answer: bool) -> None:
        """Report *text* together with what follows in this turn of the event loop: the pieces of one read."""
        if self._unreported and is_answer != self._is_answer:
            self.report()
        if not self._unreported:
            self._is_answer = is_answer
            if current_task() is not None:  # on trio, each piece is reported alone
                asyncio.get_running_loop().call_soon(self.report)
        self._unreported.append(text)
        if current_task() is None:
            self.report()

    def report(self) -> None:
        """Report the text that was received to the listener."""
        if self._unreported:
            text, self._unreported = "".join(self._unreported), []
            (self._listener.text if self._is_answer else self._listener.reasoning)(text)

    def _count(self, text: str) -> None:
        self.received_bytes += len(text) if text.isascii() else len(text.encode(errors="replace"))
        self._size += len(text) + PIECE_BYTES
        if self._size > MAX_REPLY_BYTES:
            raise bad_response(self._name, "sent an answer that is too long")


@contextlib.contextmanager
def counted(reply: StreamedReply, prompt_bytes: int, on_unfinished: Callable[[Usage], None]) -> Iterator[None]:
    """Report the tokens of *reply* if the block is cancelled or fails, unless the server sent an error and no reply.

    All text is reported to the listener when the block ends.
    """
    try:
        yield
    except BaseException as exc:
        if reply.has_begun or not isinstance(exc, ModelError):
            on_unfinished(reply.unfinished_usage(prompt_bytes))
        raise
    finally:
        reply.report()


async def read_reply(
    response: "httpx.Response | Whole",
    name: str,
    listener: Listener,
    prompt_bytes: int,
    on_unfinished: Callable[[Usage], None],
) -> dict[str, Any]:
    """Read a stream, and return the chat completion. *on_unfinished* receives the tokens if it is not read to its end.

    Raises:
        ModelError: the server reports an error, or the stream is invalid or incomplete.
        httpx.TransportError: the connection was lost, or nothing arrived in time.

    Cancellation: the connection is closed, so the server can stop.
    """
    reply = StreamedReply(name, listener)
    with counted(reply, prompt_bytes, on_unfinished):
        await _read(response, reply, name)
        return reply.end()


async def _read(response: "httpx.Response | Whole", reply: StreamedReply, name: str) -> None:
    try:
        with anyio.CancelScope() as scope:
            events = Events()
            async with contextlib.aclosing(pieces_of(response)) as pieces:
                async for piece in pieces:
                    for event in events.feed(piece):
                        reply.take(event)
                    if reply.is_complete:  # what follows is not worth a long wait
                        wait_s = END_S if reply.is_ended else USAGE_S
                        scope.deadline = min(scope.deadline, anyio.current_time() + wait_s)
    except BadBody as exc:
        raise bad_response(name, f"sent {exc}") from exc
    except http.errors("TransportError"):
        if not reply.is_complete:
            raise

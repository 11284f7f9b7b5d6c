"""Long answers in pieces: an unread one holds a piece in memory, and not all of it."""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Message

from flock.runs import LongJSON

__all__ = ["PIECE_BYTES", "LongResponse", "cut_message", "long_parts", "pieces"]

#: A server copies what it is given to send, until the client has read it; so it is given so much at a time.
PIECE_BYTES = 64 * 1024


def cut_message(message: Message) -> Iterator[Message]:
    """A message of ASGI as several, if its body is long."""
    body: bytes = message.get("body", b"")
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        end = start + PIECE_BYTES
        yield {**message, "body": body[start:end], "more_body": end < len(body) or message.get("more_body", False)}


def long_parts(content: Any, before: bytes, after: bytes) -> list[bytes | LongJSON]:
    """The JSON of *content* between other text, with each ``LongJSON`` in it as a part of its own."""
    long: list[LongJSON] = []

    def mark(value: LongJSON) -> msgspec.Raw:
        long.append(value)
        return msgspec.Raw(b"\0")

    text = b"%b%b%b" % (before, msgspec.json.encode(content, enc_hook=mark), after)
    first, *others = text.split(b"\0")  # JSON has no such character
    return [first, *(part for pair in zip(long, others, strict=True) for part in pair)]


async def pieces(parts: Sequence[bytes | LongJSON]) -> AsyncIterator[bytes]:
    """All of *parts*; a long one is read as it is asked for. Raises RunNotFound, StoreError."""
    for part in parts:
        for piece in part.pieces() if isinstance(part, LongJSON) else (part,):
            yield piece


class LongResponse(StreamingResponse):
    """JSON with each ``LongJSON`` in it, and a newline at its end. Its length is known, so it is not chunked."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int, headers: Mapping[str, str], *, is_head: bool) -> None:
        parts = long_parts(content, b"", b"\n")
        length = sum(part.length if isinstance(part, LongJSON) else len(part) for part in parts)
        super().__init__(pieces([] if is_head else parts), status_code, {**headers, "Content-Length": str(length)})

"""Server-sent events of other servers: of models and MCP."""

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, NamedTuple

from flock.models import bodies
from flock.models.bodies import BadBody, pieces_of

if TYPE_CHECKING:
    import httpx


class Event(NamedTuple):
    name: str
    data: bytes


def is_stream(response: "httpx.Response") -> bool:
    return str(response.headers.get("content-type", "")).lower().startswith("text/event-stream")


async def events_in(response: "httpx.Response") -> AsyncGenerator[Event, None]:
    """Yield each event of a response, whose bytes arrive in any pieces (HTML, section 9.2.6).

    Comments are ignored, and so is an event without the empty line that ends it: its connection was lost. The lines of
    httpx would also end at characters such as U+2028, which JSON may contain.

    Raises: BadBody if the body is invalid, or an event is too long; httpx.HTTPError.
    """
    line, name, data, size, ended_with_cr = bytearray(), "", list[bytes](), 0, False
    async with contextlib.aclosing(pieces_of(response)) as pieces:
        async for piece in pieces:
            if ended_with_cr:
                piece = piece.removeprefix(b"\n")
            ended_with_cr = piece.endswith(b"\r")
            for part in piece.splitlines(keepends=True):
                size += len(part)
                if size > bodies.MAX_MESSAGE_BYTES:
                    raise BadBody.too_long()
                line += part
                if not part.endswith((b"\r", b"\n")):
                    continue
                field, colon, value = bytes(line).rstrip(b"\r\n").partition(b":")
                line.clear()
                if field == b"data":
                    data.append(value.removeprefix(b" "))
                elif field == b"event":
                    name = value.strip().decode(errors="replace")
                elif not field and not colon:
                    if joined := b"\n".join(data):
                        yield Event(name, joined)
                    name, data, size = "", [], 0
                elif not data:  # comments keep a connection open for any time
                    size = 0

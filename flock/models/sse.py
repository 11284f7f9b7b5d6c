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


class Events:
    """The events of a stream, whose bytes arrive in any pieces (HTML, section 9.2.6).

    Comments are ignored, and so is an event without the empty line that ends it: its connection was lost. The lines of
    httpx would also end at characters such as U+2028, which JSON may contain.
    """

    def __init__(self) -> None:
        self._line, self._name, self._data = bytearray(), "", list[bytes]()
        self._size, self._ended_with_cr = 0, False

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that *piece* completes. Raises BadBody if one is too long."""
        found: list[Event] = []
        if self._ended_with_cr:
            piece = piece.removeprefix(b"\n")
        self._ended_with_cr = piece.endswith(b"\r")
        for part in piece.splitlines(keepends=True):
            self._size += len(part)
            if self._size > bodies.MAX_MESSAGE_BYTES:
                raise BadBody.too_long()
            line = part.rstrip(b"\r\n")
            if self._line or len(line) == len(part):
                self._line += part
                if len(line) == len(part):  # the rest is in the next piece
                    continue
                line = bytes(self._line).rstrip(b"\r\n")
                self._line.clear()
            if line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                continue
            field, colon, value = line.partition(b":")
            if field == b"data":
                self._data.append(value)
            elif field == b"event":
                self._name = value.strip().decode(errors="replace")
            elif not field and not colon:
                if joined := b"\n".join(self._data):
                    found.append(Event(self._name, joined))
                self._name, self._data, self._size = "", [], 0
            elif not self._data:  # comments keep a connection open for any time
                self._size = 0
        return found


async def events_in(response: "httpx.Response") -> AsyncGenerator[Event, None]:
    """Yield each event of a response. Raises BadBody if the body or an event is invalid; httpx.HTTPError."""
    events = Events()
    async with contextlib.aclosing(pieces_of(response)) as pieces:
        async for piece in pieces:
            for event in events.feed(piece):
                yield event

"""Server-sent events of other servers: of models and MCP."""

import contextlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

import httpx

from flock.models import bodies
from flock.models.bodies import BadBody, pieces_of

__all__ = ["Event", "events_in", "is_stream"]


class Event(NamedTuple):
    name: str
    data: bytes


class _Events:
    """Splits bytes, which arrive in any pieces, into events (HTML, section 9.2.6).

    Comments are ignored, and so is an event without the empty line that ends it: its connection was lost. The lines of
    httpx would also end at characters such as U+2028, which JSON may contain.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._ended_with_cr = False
        self._name = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that *piece* completes."""
        if self._ended_with_cr:
            piece = piece.removeprefix(b"\n")
        self._ended_with_cr = piece.endswith(b"\r")
        found: list[Event] = []
        for part in piece.splitlines(keepends=True):
            self._size += len(part)
            if self._size > bodies.MAX_MESSAGE_BYTES:
                raise BadBody.too_long()
            self._line += part
            if part.endswith((b"\r", b"\n")):
                self._take(bytes(self._line).rstrip(b"\r\n"), found)
                self._line.clear()
        return found

    def _take(self, line: bytes, found: list[Event]) -> None:
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
        elif field == b"event":
            self._name = value.strip().decode(errors="replace")
        elif not line:
            if data := b"\n".join(self._data):
                found.append(Event(self._name, data))
            self._name, self._data, self._size = "", [], 0
        elif not self._data:  # comments keep a connection open for any time
            self._size = 0


def is_stream(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).lower().startswith("text/event-stream")


async def events_in(response: httpx.Response) -> AsyncGenerator[Event, None]:
    """Yield each event of a response. Raises BadBody, also if one is too long; httpx.HTTPError."""
    events = _Events()
    async with contextlib.aclosing(pieces_of(response)) as pieces:
        async for piece in pieces:
            for event in events.feed(piece):
                yield event

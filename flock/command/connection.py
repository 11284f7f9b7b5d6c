"""One HTTP connection of our own server: what a client may send, and what it must read, with bounds of size and time.

uvicorn waits for ever for the head of a request, reads requests while it still answers an earlier one, waits for ever
for a client that reads no answer, and loses an answer that it sends before it has the whole body. Not here:

- A head has ``HEAD_TIMEOUT_S`` and ``MAX_HEAD_BYTES``.
- What arrives during an answer waits for its end, up to ``MAX_PIPELINED_BYTES``. Then nothing more is read, so a
  disconnect is noticed only when something is written.
- A client that reads too slowly loses its connection; see ``Connection.watch_writes``.
- A connection is closed in stages; see ``_ResponseTransport``.
"""

import asyncio
import functools
import re
from typing import Any

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flock.web.problems import on_error
from flock.web.requests import request_id_for

__all__ = [
    "HEAD_TIMEOUT_S",
    "MAX_HEAD_BYTES",
    "MAX_PIPELINED_BYTES",
    "MIN_READ_BYTES_PER_S",
    "STALL_AT_EXIT_S",
    "Connection",
]

#: How long the head of a request may take to arrive, in seconds, and its size; the app answers 431 for less than that.
HEAD_TIMEOUT_S = 10
MAX_HEAD_BYTES = 256 * 1024
#: A client that reads more slowly than this, on average over ``write_timeout_s``, loses its connection.
MIN_READ_BYTES_PER_S = 256
#: At shutdown, a client that reads nothing for so long loses its connection, in seconds.
STALL_AT_EXIT_S = 1.0
#: What may arrive during an answer before reading is paused.
MAX_PIPELINED_BYTES = 64 * 1024
#: A message ends with an empty line, unless it has a body of a known length.
EMPTY_LINE = re.compile(rb"\n\r?\n")
#: Each call of the parser takes microseconds, so only the first pieces of what was read may be as short as one line.
MAX_SHORT_PIECES = 64
LONG_PIECE_BYTES = 1024


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer in place of the app when there are too many connections."""
    scope["flock.request_id"] = request_id = request_id_for(scope)
    headers = {"Retry-After": "1", "Connection": "close", "X-Request-ID": request_id}
    headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # as every answer of the app
    detail = "This server has as many connections as it takes (--max-connections). Try again in 1 s."
    response = await on_error(Request(scope), HTTPException(503, detail, headers))
    await response(scope, receive, send)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with bounds.

    Args:
        write_timeout_s: how long a client may read nothing, in seconds, while an answer waits for it.
    """

    # Kept apart from uvicorn's attributes: with more of them, each connection would need 1.2 KiB for a dictionary.
    __slots__ = (
        "_body_bytes",
        "_head_bytes",
        "_head_timer",
        "_is_admitted",
        "_is_in_head",
        "_max_connections",
        "_pipelined",
        "_tail",
        "_write_timer",
        "is_discarding",
        "write_timeout_s",
        "written_bytes",
    )

    def __init__(self, config: uvicorn.Config, *args: Any, write_timeout_s: float = 30, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.write_timeout_s = write_timeout_s
        # uvicorn refuses everybody when there are too many, in plain text; here only new connections are refused.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._is_admitted = False
        #: The body that arrives belongs to a request that was answered already; it is read and dropped.
        self.is_discarding = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._head_bytes = 0
        #: What is left of a body whose length is known.
        self._body_bytes = 0
        #: What arrived during an answer.
        self._pipelined = b""
        #: The last two bytes that were parsed.
        self._tail = b""
        self.written_bytes = 0

    # Reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_head()

    def data_received(self, data: bytes) -> None:
        data, start, pieces = self._pipelined + data, 0, 0
        self._pipelined = b""
        while start < len(data) and not self.is_discarding and not self.transport.is_closing():
            if self._is_answering():
                self._pipelined = data[start:]
                if len(self._pipelined) > MAX_PIPELINED_BYTES:
                    self.flow.pause_reading()
                return
            if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._begin_head()
            end = self._end_of_piece(data, start, 0 if pieces < MAX_SHORT_PIECES else LONG_PIECE_BYTES)
            self._head_bytes += end - start
            super().data_received(data[start:end])
            if self.transport.get_protocol() is not self:  # it is a WebSocket now
                self._cancel_timers()
                return
            start, pieces, self._tail = end, pieces + 1, data[max(start, end - 2) : end]
            if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
                self._close()

    def _is_answering(self) -> bool:
        """Whether a request has arrived whole and is not answered yet."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _end_of_piece(self, data: bytes, start: int, least: int) -> int:
        """Where the message may end: the parser cannot stop there by itself."""
        if self._body_bytes:
            return min(len(data), start + self._body_bytes)
        if start == 0 and (found := EMPTY_LINE.search(self._tail + data[:2])):  # it began with the last read
            return found.end() - len(self._tail)
        found = EMPTY_LINE.search(data, start + least)
        return found.end() if found else len(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # and not in the trailers of a chunked body, which nothing reads
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_answering():  # a second message in one piece: its client sends it again on another connection
            self.cycle.keep_alive, self.is_discarding = False, True
            return
        self._end_head()
        self._is_in_head = False
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        self._body_bytes = int(length)  # the parser has refused what is not a number
        if not self._is_admitted:
            self._is_admitted = self._max_connections is None or len(self.connections) <= self._max_connections
            self.app = self.config.loaded_app if self._is_admitted else _refuse
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = _ResponseTransport(self)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        if self.is_discarding:
            return
        self._body_bytes = max(0, self._body_bytes - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head = True
        if not self.is_discarding:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._pipelined and not self.transport.is_closing():
            self.data_received(b"")

    def _begin_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Writing

    def _close(self) -> None:
        """A transport that closes waits until its client has read everything, so that has its time too."""
        self.transport.close()
        self.watch_writes(self.write_timeout_s)

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self.watch_writes(self.write_timeout_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_writes(self.write_timeout_s)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.watch_writes(self.write_timeout_s)

    def shutdown(self) -> None:
        super().shutdown()
        self.write_timeout_s = min(self.write_timeout_s, STALL_AT_EXIT_S)  # also for an answer that begins later
        self.watch_writes(self.write_timeout_s)

    def watch_writes(self, timeout_s: float) -> None:
        """End the connection if its client reads less than ``MIN_READ_BYTES_PER_S`` on average over *timeout_s*.

        It is measured each *timeout_s*, until everything is read. So it takes up to twice that time to notice.
        """
        if self._write_timer is not None:
            self._write_timer.cancel()
        unread = self.transport.get_write_buffer_size()
        check = functools.partial(self._check_writes, unread, self.written_bytes, timeout_s)
        self._write_timer = self.loop.call_later(timeout_s, check) if unread else None

    def _check_writes(self, unread: int, written_bytes: int, timeout_s: float) -> None:
        read = unread + self.written_bytes - written_bytes - self.transport.get_write_buffer_size()
        if read < min(unread, MIN_READ_BYTES_PER_S * timeout_s):
            self.transport.abort()
        else:
            self.watch_writes(timeout_s)

    def _cancel_timers(self) -> None:
        self._end_head()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._pipelined = b""
        if self.cycle is not None:
            self.cycle.transport = self.transport  # no reference cycle is left to the garbage collector
        super().connection_lost(exc)


class _ResponseTransport:
    """The transport of one answer. It is closed in stages if the client is still sending.

    A socket that is closed with something unread resets its connection, and the client loses the answer (RFC 9112,
    section 9.6). So only our side is closed; uvicorn's time-out for idle connections ends the other, if the client does
    not.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        self._connection.written_bytes += len(data)
        self._connection.transport.write(data)

    def close(self) -> None:
        connection, transport = self._connection, self._connection.transport
        is_sending = connection.cycle.more_body or connection.is_discarding
        if is_sending and transport.can_write_eof() and not transport.is_closing():
            connection.is_discarding = True
            transport.write_eof()
        else:
            transport.close()
        connection.watch_writes(connection.write_timeout_s)

"""One HTTP connection of the server, with limits of size and time for reads and writes.

uvicorn waits forever for the head of a request, and for a client that does not read its response. It reads further
requests during a response, and loses a response that it sends before the end of the body. This class differs:

- The head of a request is limited by ``HEAD_TIMEOUT_S`` and ``MAX_HEAD_BYTES``. The size also limits chunk
  extensions and trailers.
- Data that arrives during a response is buffered up to ``MAX_PIPELINED_BYTES``. Then reading pauses, and a disconnect
  is noticed only at the next write.
- A client that reads too slowly is disconnected; see ``Connection.watch_writes``.
- A connection is closed in stages; see ``_ResponseTransport``. What arrives after an early response is read up to
  ``MAX_HEAD_BYTES``.
- While the server stops, each response is the last one of its connection, and says so (RFC 9112, section 9.6).
"""

import asyncio
import functools
import re
from typing import Any

import uvicorn
import uvicorn.server
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flock.web.problems import on_error
from flock.web.requests import request_id_for

#: Limits of the head of a request: seconds to arrive, and size. The app rejects shorter heads with 431
#: (``max_header_bytes``).
HEAD_TIMEOUT_S = 10
MAX_HEAD_BYTES = 256 * 1024
#: A chunked body may take this many times its size: a chunk of one byte takes 6. The rest counts as head.
MAX_CHUNK_OVERHEAD = 16
#: A client that reads more slowly than this, on average over ``write_timeout_s``, is disconnected.
MIN_READ_BYTES_PER_S = 256
#: At shutdown, a client that reads nothing for this long is disconnected, in seconds.
STALL_AT_EXIT_S = 1.0
#: Max bytes that may arrive during a response before reading pauses.
MAX_PIPELINED_BYTES = 64 * 1024
#: What is written in one iteration of the event loop is joined up to this size.
MAX_JOINED_BYTES = 16 * 1024
#: A message ends with an empty line, unless it has a body of a known length.
EMPTY_LINE = re.compile(rb"\n\r?\n")
#: Each call of the parser takes microseconds. So only the first pieces of one read may be short.
MAX_SHORT_PIECES = 64
LONG_PIECE_BYTES = 1024


class ServerState(uvicorn.server.ServerState):
    """What the connections of a server share. *is_stopping*: the next response of each of them is its last one."""

    is_stopping = False


async def _reject(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond with 503 in place of the app if there are too many connections."""
    scope["flock.request_id"] = request_id = request_id_for(scope)
    headers = {"Retry-After": "1", "Connection": "close", "X-Request-ID": request_id}
    headers |= {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # as in all responses of the app
    detail = "This server has reached its limit of connections (--max-connections). Try again in 1 s."
    response = await on_error(Request(scope), HTTPException(503, detail, headers))
    await response(scope, receive, send)


class Connection(HttpToolsProtocol):
    """uvicorn's connection, with limits.

    Args:
        write_timeout_s: how long a client may read nothing while it has an unread response, in seconds.
    """

    # Slots, since more attributes in uvicorn's dictionary would cost 1.2 KiB for each connection.
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
        # Above the limit, uvicorn rejects the requests of all connections. Here only new connections are rejected.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._is_admitted = False
        #: The request already has its response, so the rest of its body is discarded.
        self.is_discarding = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        #: The bytes of this request that have arrived and are not body; see ``MAX_CHUNK_OVERHEAD``.
        self._head_bytes = 0
        #: The remaining bytes of a body of known length.
        self._body_bytes = 0
        #: The data that arrived during a response.
        self._pipelined = b""
        #: The last two bytes that were parsed.
        self._tail = b""
        self.written_bytes = 0

    # Reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head()

    def data_received(self, data: bytes) -> None:
        if self.is_discarding:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:  # the client has its response, and must read it before it may go on
                self.flow.pause_reading()
            return
        data, start, pieces = self._pipelined + data, 0, 0
        self._pipelined = b""
        while start < len(data) and not self.is_discarding and not self.transport.is_closing():
            if self._is_responding():
                self._pipelined = data[start:]
                if len(self._pipelined) > MAX_PIPELINED_BYTES:
                    self.flow.pause_reading()
                return
            end = self._end_of_piece(data, start, 0 if pieces < MAX_SHORT_PIECES else LONG_PIECE_BYTES)
            super().data_received(data[start:end])
            if self.transport.get_protocol() is not self:  # upgraded to a WebSocket
                self._cancel_timers()
                return
            # unless the whole request has arrived, or the parser has rejected it
            if not self._is_responding() and not self.transport.is_closing():
                self._count_head(end - start)
            start, pieces, self._tail = end, pieces + 1, data[max(start, end - 2) : end]

    def _count_head(self, received_bytes: int) -> None:
        self._head_bytes = max(0, self._head_bytes + received_bytes)
        if self._head_bytes <= MAX_HEAD_BYTES:
            if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
                self._start_head()
        elif self._is_in_head or not self.cycle.response_started:
            self.send_400_response(f"More than {MAX_HEAD_BYTES} bytes of this request are not its body.")
        else:
            self._close()

    def _is_responding(self) -> bool:
        """Whether a request has arrived completely and its response has not ended."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _end_of_piece(self, data: bytes, start: int, min_bytes: int) -> int:
        """Return where to cut before the parser sees the next message, since the parser cannot stop between two."""
        if self._body_bytes:
            return min(len(data), start + self._body_bytes)
        if start == 0 and (boundary := EMPTY_LINE.search(self._tail + data[:2])):  # it started in the previous read
            return boundary.end() - len(self._tail)
        boundary = EMPTY_LINE.search(data, start + min_bytes)
        return boundary.end() if boundary else len(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailers of a chunked body are ignored
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_responding():  # a second message in the same piece: the client retries it on a new connection
            self.cycle.keep_alive, self.is_discarding = False, True
            return
        self._end_head()
        self._is_in_head = False
        length = next((value for name, value in self.headers if name == b"content-length"), b"0")
        self._body_bytes = int(length)  # the parser has rejected invalid numbers
        if not self._is_admitted:
            self._is_admitted = self._max_connections is None or len(self.connections) <= self._max_connections
            self.app = self.config.loaded_app if self._is_admitted else _reject
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = _ResponseTransport(self)  # type: ignore[assignment]
            if isinstance(self.server_state, ServerState) and self.server_state.is_stopping:
                self.finish()

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun to arrive, and none waits for its response."""
        return not self._head_bytes and (self.cycle is None or self.cycle.response_complete)

    def finish(self) -> None:
        """Close the connection after the response, if its head has not been sent, which then says so."""
        if self.cycle is not None and not self.cycle.response_started:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        if self.is_discarding:
            return
        self._body_bytes = max(0, self._body_bytes - len(body))
        if not self.cycle.response_complete:
            self._head_bytes -= MAX_CHUNK_OVERHEAD * len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        if not self.is_discarding:
            self.scope["flock.body_has_arrived"] = True  # type: ignore[typeddict-unknown-key]
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self.cycle.transport.flush()  # type: ignore[attr-defined]
        super().on_response_complete()
        if self._pipelined and not self.transport.is_closing():
            self.data_received(b"")

    def _start_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

    def _end_head(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # Writing

    def _close(self) -> None:
        """Close the transport, which first waits for the client to read everything. Limit that time too."""
        self.transport.close()
        self.watch_writes()

    def send_400_response(self, msg: str) -> None:
        super().send_400_response(msg)
        self.watch_writes()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch_writes()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self.watch_writes()

    def shutdown(self) -> None:
        super().shutdown()
        self.write_timeout_s = min(self.write_timeout_s, STALL_AT_EXIT_S)  # also for responses that start later
        self.watch_writes()

    def watch_writes(self) -> None:
        """Abort the connection if its client reads less than ``MIN_READ_BYTES_PER_S`` over ``write_timeout_s``.

        This is checked at the end of each such time until everything is read. So detection takes up to twice the time.
        """
        if self._write_timer is not None:
            self._write_timer.cancel()
        unread_bytes = self.transport.get_write_buffer_size()
        check = functools.partial(self._check_writes, unread_bytes, self.written_bytes)
        self._write_timer = self.loop.call_later(self.write_timeout_s, check) if unread_bytes else None

    def _check_writes(self, unread_bytes: int, written_bytes: int) -> None:
        read_bytes = unread_bytes + self.written_bytes - written_bytes - self.transport.get_write_buffer_size()
        if read_bytes < min(unread_bytes, MIN_READ_BYTES_PER_S * self.write_timeout_s):
            self.transport.abort()
        else:
            self.watch_writes()

    def _cancel_timers(self) -> None:
        self._end_head()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers()
        self._pipelined = b""
        if self.cycle is not None:
            self.cycle.transport = self.transport  # breaks a reference cycle
        super().connection_lost(exc)


class _ResponseTransport:
    """The transport of one response. It joins what is written in one iteration of the event loop, and closes in stages.

    uvicorn writes the head and each piece of the body separately, and each write is a system call and a packet. A
    response that has ended does not wait for the end of the iteration.

    Closing a socket that has unread data resets the connection, and the client loses the response (RFC 9112, section
    9.6). So if the client is still sending, only our side is closed first. The client closes the other side, or the
    timeout of uvicorn for idle connections does.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._unwritten = b""
        self.is_closing = connection.transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._unwritten:
            self._connection.loop.call_soon(self.flush_unless_closed)
        self._unwritten += data
        if len(self._unwritten) > MAX_JOINED_BYTES or self.is_closing():  # it closes when the client has read all
            self.flush()

    def flush_unless_closed(self) -> None:
        if not self.is_closing():
            self.flush()

    def flush(self) -> None:
        if self._unwritten:
            self._connection.written_bytes += len(self._unwritten)
            self._connection.transport.write(self._unwritten)
            self._unwritten = b""

    def close(self) -> None:
        self.flush_unless_closed()
        connection, transport = self._connection, self._connection.transport
        is_sending = connection.cycle.more_body or connection.is_discarding
        if is_sending and transport.can_write_eof() and not transport.is_closing():
            connection.is_discarding = True
            transport.write_eof()
        else:
            transport.close()
        connection.watch_writes()

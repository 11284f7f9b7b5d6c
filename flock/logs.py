"""The lines of a log: as JSON for log collectors, and a handler that never waits for a slow reader."""

import asyncio
import contextlib
import io
import logging
import logging.handlers
import os
import select
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from flock.errors import DefinitionError
from flock.runs import Batch, Run, safe_text
from flock.runs.text import for_terminal
from flock.runs.traces import current, principal_of

#: What identifies the run of a log record.
OF_RUN = ("run_id", "agent_name", "attempt", "batch_id", "request_id", "trace_id")
#: Members of our own records. They are left out if they are None.
OWN = (*OF_RUN, "principal", "status", "duration_ms", "requested_by", "request_trace_id")
#: Has the events of ``audit``.
auditor = logging.getLogger("flock.audit")
#: Returns the ``principal``, the ``request_id`` and the ``request_trace_id`` of the request that this task serves.
REQUEST: ContextVar[Callable[[], Mapping[str, Any]]] = ContextVar("flock_request", default=dict)
#: The attributes of each record, which are not ``extra=``, and the copy of its message that uvicorn adds, with colours.
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


def fields_of_run(run: Run | Batch) -> dict[str, Any]:
    """Return the fields that identify the run of a log record. Pass them as ``extra=``; each becomes a JSON member."""
    return {name: getattr(run, name, None) for name in OF_RUN} | {"principal": principal_of(run)}


def audit(event: str, words: str, about: Mapping[str, Any], by: str | None = None) -> None:
    """Log what a client has done, as an event with the principal, the id and the trace of its request.

    Args:
        words: what it has done, after "has".
        about: more members. Those of ``fields_of_run`` name the run or the batch, whose owner is ``requested_by``.
        by: the name of the principal; None is that of the request.
    """
    request = REQUEST.get()()
    by = by or request.get("principal")
    own = {"requested_by": about.get("principal"), "request_id": None, **request, "principal": by, "event": event}
    id_ = about.get("run_id") or about.get("batch_id")
    record = f"{'run' if about.get('run_id') else 'batch'} {id_}: " if id_ else ""
    auditor.info("%s%s has %s", record, "somebody" if by is None else repr(by), words, extra={**about, **own})


class AuditFile(logging.handlers.WatchedFileHandler):
    """Appends lines to a file that only its owner can read. If the file was moved, it is created again.

    Raises: DefinitionError if it cannot be written.
    """

    def __init__(self, filename: str) -> None:
        try:
            super().__init__(filename, encoding="utf-8")
        except OSError as exc:
            reason = f"The file {filename!r} for --audit cannot be written: {exc.strerror}."
            raise DefinitionError(f"{reason} Name another one, or change its permissions.") from exc

    def _open(self) -> Any:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


class JSONFormatter(logging.Formatter):
    """Formats a record as ``{"time", "level", "logger", "message"}``, plus ``exception`` and the members of ``extra=``.

    An extra member with the name of a field is left out. One that is not JSON is converted to text.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            safe_text(name): _as_json(value)
            for name, value in vars(record).items()
            if name not in STANDARD and not (value is None and name in OWN)
        }
        line |= {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": safe_text(record.getMessage()),
        }
        if "trace_id" not in line and (traceparent := current()) is not None:
            line["trace_id"] = traceparent[3:35]
        if record.exc_info:
            line["exception"] = safe_text(self.formatException(record.exc_info))
        return for_terminal(msgspec.json.encode(line).decode())


#: A pipe that can be written takes at least this much without waiting; ``select.PIPE_BUF`` is not more anywhere.
CHUNK_BYTES = min(4096, select.PIPE_BUF)
#: Max size of the lines that wait for a reader. Those beyond it are dropped.
MAX_WAITING_BYTES = 1024 * 1024
#: How often it is tried whether somebody reads the log again, in seconds.
RETRY_S = 0.1


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one turn of the event loop together. Outside of an event loop it writes each at once.

    It never waits: while a pipe is full, up to ``MAX_WAITING_BYTES`` of lines wait. The others are dropped, and their
    number is logged when there is room again.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(stream)
        self._waiting = bytearray()
        self._dropped = 0
        #: the loop that is going to call ``flush``
        self._loop: asyncio.AbstractEventLoop | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}{self.terminator}".encode("utf-8", "backslashreplace")
        except Exception:
            self.handleError(record)
            return
        if len(self._waiting) + len(line) <= MAX_WAITING_BYTES:
            self._waiting += line
        else:
            self._dropped += 1
        loop = asyncio._get_running_loop()  # unlike the public function, it raises nothing where none is running
        if loop is None:
            self.flush()
        elif self._loop is not loop:
            self._loop = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write as much as is taken without waiting. In an event loop, the rest follows."""
        with self.lock or contextlib.nullcontext():
            self._loop = None
            try:
                while self._waiting and self._has_room():
                    # Whole lines, since several processes may write to one pipe.
                    end = self._waiting.rfind(b"\n", 0, CHUNK_BYTES) + 1 or CHUNK_BYTES
                    del self._waiting[: self._write(bytes(self._waiting[:end]))]
                    if not self._waiting and self._dropped:
                        self._waiting += self._note_of_dropped()
            except BlockingIOError:
                pass
            except (OSError, ValueError, AttributeError):  # nobody can read it any more
                self._waiting.clear()
            loop = asyncio._get_running_loop()
            if self._waiting and loop is not None:
                self._loop = loop
                loop.call_later(RETRY_S, self.flush)

    def _note_of_dropped(self) -> bytes:
        dropped, self._dropped = self._dropped, 0
        text = "%d lines were dropped here, because the log was not read for a while."
        record = logging.LogRecord("flock.server", logging.WARNING, "", 0, text, (dropped,), None)
        return f"{self.format(record)}{self.terminator}".encode()

    def _has_room(self) -> bool:
        try:
            descriptor = self.stream.fileno()
        except io.UnsupportedOperation:
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(0))

    def _write(self, data: bytes) -> int:
        """Write *data*, and return how much of it."""
        try:
            descriptor = self.stream.fileno()
        except io.UnsupportedOperation:
            self.stream.write(data.decode("utf-8", "replace"))
            self.stream.flush()
            return len(data)
        return os.write(descriptor, data)


def _as_json(value: Any) -> msgspec.Raw | str:
    try:
        return msgspec.Raw(msgspec.json.encode(value, enc_hook=str))
    except Exception:  # such as a cycle, or a lone surrogate
        return safe_text(value)

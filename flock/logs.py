"""Log records as JSON, one object per line, for log collectors. Used by ``--log-json``, and by hosts that choose it."""

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from flock.runs import Run, safe_text
from flock.runs.text import for_terminal

#: What identifies the run of a log record.
OF_RUN = ("run_id", "agent_name", "attempt", "batch_id", "request_id", "trace_id")
#: Members of our own records. They are left out if they are None.
OWN = (*OF_RUN, "status", "duration_ms")
#: The attributes of each record, which are not ``extra=``, and the copy of its message that uvicorn adds, with colours.
STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


def fields_of_run(run: Run) -> dict[str, Any]:
    """Return the fields that identify the run of a log record. Pass them as ``extra=``; each becomes a JSON member."""
    return {name: getattr(run, name) for name in OF_RUN}


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
        if record.exc_info:
            line["exception"] = safe_text(self.formatException(record.exc_info))
        return for_terminal(msgspec.json.encode(line).decode())


def _as_json(value: Any) -> msgspec.Raw | str:
    try:
        return msgspec.Raw(msgspec.json.encode(value, enc_hook=str))
    except Exception:  # such as a cycle, or a lone surrogate
        return safe_text(value)

"""Log records as JSON, one object per line, for log collectors. Used by ``--log-json``, and by hosts that choose it."""

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from flock.runs import Run, safe_text

__all__ = ["JSONFormatter", "fields_of_run"]


def fields_of_run(run: Run) -> dict[str, Any]:
    """Return the fields that identify the run of a log record. Pass them as ``extra=``; each becomes a JSON member."""
    return {
        "run_id": run.run_id,
        "agent_name": run.agent_name,
        "attempt": run.attempt,
        "batch_id": run.batch_id,
        "request_id": run.request_id,
        "trace_id": run.trace_id,
    }


#: Optional members, in addition to those that every record has.
EXTRA = ("run_id", "agent_name", "attempt", "batch_id", "request_id", "trace_id", "status", "duration_ms")


class JSONFormatter(logging.Formatter):
    """Formats a record as ``{"time", "level", "logger", "message"}``, plus the members in EXTRA and ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": safe_text(record.getMessage()),
        }
        line |= {name: value for name in EXTRA if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = safe_text(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()

"""Log records as JSON, one object a line, for those who collect them. Only the project's own server uses it."""

import logging
from datetime import UTC, datetime
from typing import Any

import msgspec

from flock.runs import Run, safe_text

__all__ = ["JSONFormatter", "fields_of_run"]


def fields_of_run(run: Run) -> dict[str, Any]:
    """What tells of which run a record is; pass it as ``extra=``. Each becomes a member in JSON."""
    return {
        "run_id": run.run_id,
        "agent_name": run.agent_name,
        "attempt": run.attempt,
        "batch_id": run.batch_id,
        "request_id": run.request_id,
        "trace_id": run.trace_id,
    }


#: Members beyond those that every record has.
EXTRA = ("run_id", "agent_name", "attempt", "batch_id", "request_id", "trace_id", "status", "duration_ms")


class JSONFormatter(logging.Formatter):
    """``{"time", "level", "logger", "message"}``, what is known of the run, and ``exception`` where there is one."""

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

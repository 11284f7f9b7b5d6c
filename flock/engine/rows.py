"""How records become rows of the store, and rows records. A row may be damaged."""

import contextlib
import functools
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from flock.errors import cut
from flock.runs import Batch, BatchOptions, Progress, Run, RunStatus, Step, Usage

__all__ = [
    "BATCH_FIELDS",
    "BATCH_READERS",
    "BATCH_TYPES",
    "DAMAGE",
    "DAMAGED_BATCH",
    "DAMAGED_RUN",
    "EPOCH",
    "FIELDS",
    "READERS",
    "STEP_TYPES",
    "TIMES_OF_BATCH",
    "TYPES",
    "UNREADABLE",
    "Damaged",
    "LastStep",
    "batch_from",
    "batch_or_remains",
    "batch_values",
    "bytes_or_none",
    "id_at",
    "micros",
    "names_json",
    "remains_of",
    "remains_of_run",
    "run_from",
    "run_or_remains",
    "run_values",
    "step_from",
    "steps_with_rows",
    "time_from",
]

T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: ``error`` of a run or a batch whose row in the store is damaged, and ``error_type`` of the run.
DAMAGED_RUN = "The record of this run is damaged and cannot be read."
DAMAGED_BATCH = "The record of this batch is damaged and cannot be read."
UNREADABLE = "unreadable"
#: What SQLite gives for a column. It keeps any type in any column, so a damaged row may hold another one.
TEXT, INTEGER, BLOB = {str}, {int}, {bytes}
MAYBE_TEXT, MAYBE_INTEGER, MAYBE_REAL, MAYBE_BLOB = ({type_, type(None)} for type_ in (str, int, float, bytes))

TYPES: Mapping[str, Collection[type]] = {
    "run_id": TEXT,
    "flock": TEXT,
    "agent_name": TEXT,
    "inputs": BLOB,
    "status": TEXT,
    "result": MAYBE_BLOB,
    "error": MAYBE_TEXT,
    "error_type": MAYBE_TEXT,
    "created_at": INTEGER,
    "started_at": MAYBE_INTEGER,
    "completed_at": MAYBE_INTEGER,
    "request_id": MAYBE_TEXT,
    "batch_id": MAYBE_TEXT,
    "position": MAYBE_INTEGER,
    "is_async": INTEGER,
    "attempt": INTEGER,
    "timeout_s": MAYBE_REAL,
    "owner": MAYBE_TEXT,
    "cancel_requested": INTEGER,
    "progress": MAYBE_BLOB,
    "traceparent": MAYBE_TEXT,
    "principal": MAYBE_TEXT,
    "recoveries": INTEGER,
    "extra": MAYBE_BLOB,
    "last_step": MAYBE_BLOB,
}
FIELDS = tuple(TYPES)

STEP_TYPES: Mapping[str, Collection[type]] = {
    "agent_name": TEXT,
    "result": BLOB,
    "next_agent": MAYBE_TEXT,
    "usage": MAYBE_BLOB,
    "attempt": INTEGER,
    "started_at": INTEGER,
    "completed_at": INTEGER,
}

BATCH_TYPES: Mapping[str, Collection[type]] = {
    "batch_id": TEXT,
    "flock": TEXT,
    "agent_name": TEXT,
    "options": BLOB | TEXT,
    "status": TEXT,
    "total_items": INTEGER,
    "completed_items": INTEGER,
    "failed_items": INTEGER,
    "cancelled_items": INTEGER,
    "error": MAYBE_TEXT,
    "created_at": INTEGER,
    "started_at": MAYBE_INTEGER,
    "completed_at": MAYBE_INTEGER,
    "request_id": MAYBE_TEXT,
    "owner": MAYBE_TEXT,
    "principal": MAYBE_TEXT,
    "attempt": INTEGER,
    "cancel_requested": INTEGER,
    "reopening": MAYBE_TEXT,
    "resumed_at": MAYBE_INTEGER,
    "resumed_with": INTEGER,
    "extra_names": MAYBE_BLOB,
}
BATCH_FIELDS = tuple(BATCH_TYPES)
TIMES_OF_BATCH = ("created_at", "started_at", "completed_at", "resumed_at")


def micros(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1_000_000)


def time_from(micros: int | None) -> datetime | None:
    return None if micros is None else EPOCH + timedelta(microseconds=micros)


def _json(kept: bytes) -> msgspec.Raw:
    """What was kept, looked through at a microsecond for 3 kB. Raises ValueError where it is no JSON."""
    kept.decode()
    with contextlib.suppress(RecursionError):  # nested as deep as just went in is no damage
        msgspec.json.decode(kept, type=msgspec.Raw)
    return msgspec.Raw(kept)


def _progress(kept: bytes | None) -> Progress | None:
    """A run is worth more than how far it said it was."""
    try:
        progress = None if kept is None else msgspec.json.decode(kept, type=Progress)
    except msgspec.DecodeError:
        return None
    return progress and replace(progress, message=cut(progress.message))


def _text(kept: str | None) -> str | None:
    """An earlier version kept texts of any length."""
    return None if kept is None else cut(kept)


def names_json(names: Iterable[str]) -> str:
    return msgspec.json.encode(sorted(names)).decode()


def bytes_or_none(raw: msgspec.Raw | None) -> bytes | None:
    return None if raw is None else bytes(raw)


def id_at(time: datetime, milliseconds_later: int = 0) -> str:
    """Where the ids that were made at *time* begin (RFC 9562: their first 48 bits are milliseconds)."""
    digits = f"{max(0, (micros(time) or 0) // 1000 + milliseconds_later):012x}"
    return f"{digits[:8]}-{digits[8:]}"


#: How the values of columns become those of records, if they are not the same.
READERS: Mapping[str, Callable[[Any], Any]] = {
    "inputs": _json,
    "status": RunStatus,
    **dict.fromkeys(("result", "extra"), lambda kept: None if kept is None else _json(kept)),
    **dict.fromkeys(("created_at", "started_at", "completed_at"), time_from),
    **dict.fromkeys(("is_async", "cancel_requested"), bool),
    "progress": _progress,
    **dict.fromkeys(("error", "error_type"), _text),
}

BATCH_READERS: Mapping[str, Callable[[Any], Any]] = {
    "options": functools.partial(msgspec.json.decode, type=BatchOptions),
    "status": RunStatus,
    **dict.fromkeys(TIMES_OF_BATCH, time_from),
    "cancel_requested": bool,
    "error": _text,
    "extra_names": lambda kept: () if kept is None else msgspec.json.decode(kept, type=tuple[str, ...]),
}


class Damaged(sqlite3.DatabaseError):
    """A row holds what was never written to it: SQLite has no checksums, and gives what it finds.

    Attributes:
        is_writable: False if SQLite itself cannot read all of it. To write it would fail the whole transaction.
    """

    def __init__(self, reason: Exception, *, is_writable: bool = True) -> None:
        super().__init__(f"a row is damaged ({reason})")
        self.is_writable = is_writable


#: What is raised when what a damaged row holds is converted.
DAMAGE = (ArithmeticError, TypeError, ValueError)


def _refuse_damage(convert: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(convert)
    def refuse_damage(*args: Any) -> T:
        try:
            return convert(*args)
        except DAMAGE as exc:
            raise Damaged(exc) from exc

    return refuse_damage


def _check_types(row: Sequence[Any], types: Mapping[str, Collection[type]]) -> None:
    for value, (name, allowed) in zip(row, types.items(), strict=True):
        if type(value) not in allowed:
            raise TypeError(f"{name} is of the type {type(value).__name__}")


def remains_of(
    row: Sequence[Any], types: Mapping[str, Collection[type]], readers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    """Those values of a damaged row that are not."""
    values: dict[str, Any] = {}
    for value, (name, allowed) in zip(row, types.items(), strict=True):
        with contextlib.suppress(*DAMAGE):
            if type(value) is bytes and str in allowed:
                value = value.decode()
            _check_types([value], {name: allowed})
            values[name] = readers[name](value) if name in readers else value
    return values


def run_values(run: Run, last_step: bytes | None = None) -> tuple[Any, ...]:
    """A row of ``runs``, in the order of ``FIELDS``."""
    return (
        run.run_id,
        run.flock,
        run.agent_name,
        bytes(run.inputs),
        run.status.value,
        bytes_or_none(run.result),
        run.error,
        run.error_type,
        micros(run.created_at),
        micros(run.started_at),
        micros(run.completed_at),
        run.request_id,
        run.batch_id,
        run.position,
        run.is_async,
        run.attempt,
        run.timeout_s,
        run.owner,
        run.cancel_requested,
        run.progress and msgspec.json.encode(run.progress),
        run.traceparent,
        run.principal,
        run.recoveries,
        bytes_or_none(run.extra),
        last_step,
    )


@_refuse_damage
def run_from(row: Sequence[Any], steps: tuple[Step, ...]) -> Run:
    _check_types(row, TYPES)
    values = dict(zip(FIELDS, row, strict=True))
    for name, read in READERS.items():
        values[name] = read(values[name])
    last_step, result = values.pop("last_step"), values["result"]
    if last_step is not None and result is not None:
        steps = (*steps, _last_step_from(last_step, result))
    return Run(**values, steps=steps)


def run_or_remains(row: Sequence[Any]) -> Run:
    """A run without its steps. One whose row is damaged says so in ``error``, and keeps what can be read."""
    try:
        return run_from(row, ())
    except Damaged:
        return remains_of_run(row)


def remains_of_run(row: Sequence[Any]) -> Run:
    values: dict[str, Any]
    values = {"run_id": "", "flock": "", "agent_name": "", "inputs": msgspec.Raw(b"{}"), "status": RunStatus.FAILED}
    values |= {"created_at": EPOCH, **remains_of(row, TYPES, READERS), "error": DAMAGED_RUN, "error_type": UNREADABLE}
    values.pop("last_step", None)
    return Run(**values)


def steps_with_rows(run: Run, steps: Mapping[int, Step]) -> Mapping[int, Step]:
    """Those of *steps*, by position, that are not written in the row of *run* itself."""
    if run.status is not RunStatus.COMPLETED:
        return steps
    return {position: step for position, step in steps.items() if position != len(run.steps) - 1}


class LastStep(NamedTuple):
    """What of the last step of a completed run is not in its row already."""

    agent_name: str
    usage: Usage | None
    attempt: int
    started_at: int | None
    completed_at: int | None

    @classmethod
    def of(cls, step: Step) -> "LastStep":
        return cls(step.agent_name, step.usage, step.attempt, micros(step.started_at), micros(step.completed_at))

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)


def _last_step_from(kept: bytes, result: msgspec.Raw) -> Step:
    last = msgspec.json.decode(kept, type=LastStep)
    return Step(
        agent_name=last.agent_name,
        result=result,
        usage=last.usage,
        attempt=last.attempt,
        started_at=EPOCH + timedelta(microseconds=last.started_at or 0),
        completed_at=EPOCH + timedelta(microseconds=last.completed_at or 0),
    )


@_refuse_damage
def step_from(row: Sequence[Any]) -> Step:
    _check_types(row, STEP_TYPES)
    agent_name, result, next_agent, usage, attempt, started_at, completed_at = row
    return Step(
        agent_name=agent_name,
        result=_json(result),
        next_agent=next_agent,
        usage=usage and msgspec.json.decode(usage, type=Usage),
        attempt=attempt,
        started_at=EPOCH + timedelta(microseconds=started_at),
        completed_at=EPOCH + timedelta(microseconds=completed_at),
    )


def batch_values(batch: Batch, hidden: str | None) -> tuple[Any, ...]:
    """A row of ``batches``, in the order of ``BATCH_FIELDS``, and why it is out of sight."""
    values = {
        **msgspec.structs.asdict(batch),
        "options": msgspec.json.encode(batch.options),
        "status": batch.status.value,
        "extra_names": msgspec.json.encode(batch.extra_names) if batch.extra_names else None,
        **{name: micros(getattr(batch, name)) for name in TIMES_OF_BATCH},
    }
    return (*(values[name] for name in BATCH_FIELDS), hidden)


@_refuse_damage
def batch_from(row: Sequence[Any]) -> Batch:
    _check_types(row, BATCH_TYPES)
    values = dict(zip(BATCH_FIELDS, row, strict=True))
    for name, read in BATCH_READERS.items():
        values[name] = read(values[name])
    return Batch(**values)


def batch_or_remains(row: Sequence[Any]) -> Batch:
    """A batch. One whose row is damaged says so in ``error``, and keeps what can be read."""
    try:
        return batch_from(row)
    except Damaged:
        values: dict[str, Any]
        values = {"batch_id": "", "flock": "", "agent_name": "", "options": BatchOptions(), "total_items": 0}
        values |= {"status": RunStatus.FAILED, "created_at": EPOCH, **remains_of(row, BATCH_TYPES, BATCH_READERS)}
        return Batch(**values | {"error": DAMAGED_BATCH})

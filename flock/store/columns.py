"""Conversion between records and rows of the store. A row may be damaged.

Each field of a record has a column of the same name, and the type of the field determines how a value is stored. So a
new field needs a migration, but no change here unless its type is new.
"""

import contextlib
import functools
import operator
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any, NamedTuple, TypeVar, get_args

import msgspec
from msgspec.structs import replace

from flock.errors import cut
from flock.runs import (
    NOT_LOADED,
    Batch,
    BatchOptions,
    Call,
    CallKind,
    ClientSettings,
    Principal,
    Progress,
    Question,
    Run,
    RunStatus,
    Spent,
    Step,
    Time,
    Usage,
    Webhook,
)
from flock.runs.records import Place, Raised
from flock.steps.outcomes import DAMAGED

T = TypeVar("T")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
#: ``error`` of a batch whose row in the store is damaged; see ``outcomes.DAMAGED`` for a run.
DAMAGED_BATCH = "The record of this batch is damaged and cannot be read."
#: The same of a webhook.
DAMAGED_WEBHOOK = "The record of this webhook is damaged and cannot be read."


def micros(time: datetime | None) -> int | None:
    return None if time is None else (time - EPOCH) // MICROSECOND


def time_from(micros: int | None) -> datetime | None:
    return None if micros is None else EPOCH + timedelta(microseconds=micros)


def names_json(names: Iterable[str]) -> str:
    return msgspec.json.encode(sorted(names)).decode()


_CHECK_JSON = msgspec.json.Decoder(msgspec.Raw).decode


def _json(stored: bytes) -> msgspec.Raw:
    """Return stored JSON. Raises ValueError if it is invalid. The check takes a microsecond for 3 kB."""
    stored.decode()
    try:
        _CHECK_JSON(stored)
    except RecursionError:  # valid but deeply nested JSON is not damage
        pass
    return msgspec.Raw(stored)


def _progress(stored: bytes) -> Progress | None:
    """Return stored progress. If it is damaged, return None, so that the run can still be read."""
    try:
        progress = msgspec.json.decode(stored, type=Progress)
    except msgspec.DecodeError:
        return None
    return replace(progress, message=cut(progress.message))


class Column(NamedTuple):
    """How the values of a field are stored.

    Attributes:
        types: the types that SQLite returns. It stores any type in any column, so a damaged row may have another one.
        placeholder: the SQL to select instead of the column if the value is not read.
        write: converts a value that is not None for SQLite, or None if no conversion is needed.
        read: converts a value that is not NULL from SQLite, or None if no conversion is needed.
    """

    types: Collection[type]
    placeholder: str
    write: Callable[[Any], Any] | None = None
    read: Callable[[Any], Any] | None = None


def json_or_null(value: Any) -> bytes | None:
    """Return the column of a struct, or of a tuple, which is NULL if there is no value, or the tuple is empty."""
    return msgspec.json.encode(value) if value else None


def _struct_column(type_: Any) -> Column:
    return Column({bytes}, "x'7b7d'", msgspec.json.encode, msgspec.json.Decoder(type_).decode)


def _tuple_column(type_: Any) -> Column:
    return Column({bytes, NoneType}, "NULL", json_or_null, msgspec.json.Decoder(type_).decode)


#: By the type of the field. If a field may be None, its column may be NULL.
COLUMNS: Mapping[Any, Column] = {
    str: Column({str}, "''"),
    bool: Column({int}, "0", read=bool),
    int: Column({int}, "0"),
    float: Column({float}, "0.0"),
    datetime: Column({int}, "0", micros, time_from),
    Time: Column({int}, "0", micros, time_from),
    # Faster than ``value``, which takes three times as long.
    RunStatus: Column({str}, "''", operator.attrgetter("_value_"), RunStatus),
    msgspec.Raw: Column({bytes}, "x'7b7d'", bytes, _json),
    Progress: Column({bytes}, "x'7b7d'", msgspec.json.encode, _progress),
    **{type_: _struct_column(type_) for type_ in (Usage, Place, Principal, ClientSettings, Raised)},
    BatchOptions: Column({bytes, str}, "x'7b7d'", msgspec.json.encode, msgspec.json.Decoder(BatchOptions).decode),
    **{type_: _tuple_column(type_) for type_ in (tuple[str, ...], tuple[Spent, ...], tuple[Question, ...])},
    CallKind: Column({str}, "'function'"),
    # Each step has its own row, except for the last step of a completed run.
    tuple[Step, ...]: Column({bytes, NoneType}, "NULL"),
}


def _columns_of(record: type[msgspec.Struct]) -> Mapping[str, Column]:
    """Return the column of each field of *record*, in order."""
    columns = {}
    for field in msgspec.structs.fields(record):
        may_be_null = NoneType in get_args(field.type)
        (value_type,) = set(get_args(field.type)) - {NoneType} if may_be_null else {field.type}
        column = COLUMNS[value_type]
        if field.name in ("error", "error_type", "earlier_error"):
            column = column._replace(read=cut)  # an earlier version stored texts of any length
        if may_be_null:
            column = column._replace(types={*column.types, NoneType}, placeholder="NULL")
        columns[field.name] = column
    return columns


#: The columns of ``runs``, in the order in which they are written and read.
RUN_TABLE = {"last_step" if name == "steps" else name: column for name, column in _columns_of(Run).items()}
#: The columns of ``steps``, after ``run_id`` and ``position``.
STEP_TABLE = _columns_of(Step)
#: The columns of ``calls``, after ``run_id``, ``position`` and ``tries``.
CALL_TABLE = _columns_of(Call)
LONG_IN_CALLS = ("arguments", "result")
#: The columns of ``batches``, before ``hidden``.
BATCH_TABLE = _columns_of(Batch)
#: The columns of ``webhooks`` that are read, and at the end that of ``webhook_urls``.
WEBHOOK_TABLE = _columns_of(Webhook)
#: The fields of a run that change while it is executed. Its last step is written with them.
UPDATED = (
    *("status", "result", "error", "error_type", "started_at", "completed_at", "progress"),
    *("spent", "spent_by", "dropped", "first_span"),
)

#: The fields of a run that change when it begins to wait for answers, or gets one.
SUSPENDED = ("waiting_for", "worked_s", "progress")


class Damaged(sqlite3.DatabaseError):
    """A row contains invalid data. SQLite has no checksums, so it does not always detect damage itself.

    Attributes:
        is_writable: False if SQLite cannot read the whole row. Writing such a row would fail the whole transaction.
    """

    def __init__(self, reason: Exception, *, is_writable: bool = True) -> None:
        super().__init__(f"a row is damaged ({reason})")
        self.is_writable = is_writable


#: The exceptions that are raised when the values of a damaged row are converted.
DAMAGE = (ArithmeticError, TypeError, ValueError)


def _raising_damaged(convert: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(convert)
    def converted(*args: Any) -> T:
        try:
            return convert(*args)
        except DAMAGE as exc:
            raise Damaged(exc) from exc

    return converted


json_from = _raising_damaged(_json)


def _reader(table: Mapping[str, Column]) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return a function that converts a row to the fields of a record, without those that are NULL.

    It raises the exceptions in ``DAMAGE``.
    """

    @functools.lru_cache  # most rows have values of the same types
    def plan(*types: type) -> Sequence[tuple[int, str, Callable[[Any], Any] | None]]:
        """Return the index, name and ``Column.read`` of each value that is not NULL."""
        present = []
        for index, (type_, (name, column)) in enumerate(zip(types, table.items(), strict=True)):
            if type_ not in column.types:
                raise TypeError(f"{name} is of type {type_.__name__}")
            if type_ is not NoneType:
                present.append((index, name, column.read))
        return present

    def values_from(row: Sequence[Any]) -> dict[str, Any]:
        present = plan(*map(type, row))
        return {name: row[index] if read is None else read(row[index]) for index, name, read in present}

    return values_from


def _remains_of(row: Sequence[Any], table: Mapping[str, Column]) -> dict[str, Any]:
    """Return the readable fields of a damaged row."""
    values: dict[str, Any] = {}
    for value, (name, column) in zip(row, table.items(), strict=True):
        with contextlib.suppress(*DAMAGE):
            if type(value) is bytes and str in column.types:
                value = value.decode()
            values |= _reader({name: column})([value])
    return values


def _writer(
    columns: Iterable[Column], fields: Callable[[Any], Iterable[Any]] = msgspec.structs.astuple
) -> Callable[[Any], list[Any]]:
    """Return a function that converts a record to values for *columns*. *fields* returns the values of the record."""
    writes = [(index, column.write) for index, column in enumerate(columns) if column.write is not None]

    def values_of(record: Any) -> list[Any]:
        values = [*fields(record)]
        for index, write in writes:
            if (value := values[index]) is not None:
                values[index] = write(value)
        return values

    return values_of


_fields_of_run = _writer(RUN_TABLE.values())
_updated_fields_of_run = _writer((RUN_TABLE[name] for name in UPDATED), operator.attrgetter(*UPDATED))
_fields_of_waiting_run = _writer((RUN_TABLE[name] for name in SUSPENDED), operator.attrgetter(*SUSPENDED))
_fields_of_step = _writer(STEP_TABLE.values())
_fields_of_call = _writer(CALL_TABLE.values())
_fields_of_batch = _writer(BATCH_TABLE.values())
_read_run, _read_step, _read_call, _read_batch = map(_reader, (RUN_TABLE, STEP_TABLE, CALL_TABLE, BATCH_TABLE))
_read_webhook = _reader(WEBHOOK_TABLE)
LAST_STEP = list(RUN_TABLE).index("last_step")


def run_values(run: Run, last_step: bytes | None = None) -> dict[str, Any]:
    """Return a row of ``runs``, by column. Columns that are NULL are left out."""
    values = _fields_of_run(run)
    values[LAST_STEP] = last_step
    return {name: value for name, value in zip(RUN_TABLE, values, strict=True) if value is not None}


def shared_and_own_values(runs: Iterable[Run]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return the values of new runs without steps, by column: those that are the same in all of them, and the others.

    Columns that are NULL in all are left out.
    """
    shared, own = dict[str, Any](), dict[str, list[Any]]()
    rows = zip(*map(msgspec.structs.astuple, runs), strict=True)
    for (name, column), values in zip(RUN_TABLE.items(), rows, strict=True):
        write = column.write
        if name == "run_id" or values.count(values[0]) < len(values):
            own[name] = [value if value is None or write is None else write(value) for value in values]
        elif values[0] not in (None, ()):
            shared[name] = values[0] if write is None else write(values[0])
    return shared, own


def updated_values(run: Run, last_step: bytes | None) -> list[Any]:
    """Return the values of the columns ``UPDATED`` and ``last_step``."""
    return [*_updated_fields_of_run(run), last_step]


def waiting_values(run: Run) -> list[Any]:
    """Return the values of the columns ``SUSPENDED``, when the first wait expires, and whether it asks nobody."""
    expiries = [wait.expires_at for wait in run.waiting_for if wait.expires_at is not None]
    return [*_fields_of_waiting_run(run), micros(min(expiries, default=None)), int(run.is_active)]


def names_of_retriers(record: Run | Batch, by: str | None) -> bytes | None:
    """Return the column ``retried_by`` of a record that *by* retries."""
    return json_or_null(record.retried_by if by is None or by in record.retried_by else (*record.retried_by, by))


def step_values(run_id: str, position: int, step: Step) -> list[Any]:
    """Return a row of ``steps``."""
    return [run_id, position, *_fields_of_step(step)]


def batch_values(batch: Batch, hidden: str | None) -> list[Any]:
    """Return a row of ``batches``, in the order of ``BATCH_TABLE``, followed by *hidden*."""
    return [*_fields_of_batch(batch), hidden]


def call_values(run: Run, position: int, call: Call) -> list[Any]:
    """A row of ``calls``."""
    return [run.run_id, position, run.tries, *_fields_of_call(call)]


@_raising_damaged
def run_from(row: Sequence[Any], steps: tuple[Step, ...]) -> Run:
    values = _read_run(row)
    last_step, result = values.pop("last_step", None), values.get("result")
    if last_step is not None and result is not None:
        steps = (*steps, _last_step_from(last_step, result))
    return Run(**values, steps=steps)


def run_or_remains(row: Sequence[Any]) -> Run:
    """Return a run without its steps. If its row is damaged, return the readable fields, with an ``error``."""
    try:
        return run_from(row, ())
    except Damaged:
        return remains_of_run(row)


def remains_of_run(row: Sequence[Any]) -> Run:
    values: dict[str, Any]
    end = {"error": DAMAGED.error, "error_type": DAMAGED.error_type}
    values = {"run_id": "", "flock": "", "agent_name": "", "inputs": msgspec.Raw(b"{}"), "status": RunStatus.FAILED}
    values |= {"created_at": EPOCH, **_remains_of(row, RUN_TABLE), **end}
    values.pop("last_step", None)
    return Run(**values)


def is_known_damage(row: Sequence[Any]) -> bool:
    """Whether the run of a damaged row has already failed because of the damage."""
    return _remains_of(row, RUN_TABLE).get("error_type") == DAMAGED.error_type


def steps_with_rows(run: Run, steps: Mapping[int, Step]) -> Mapping[int, Step]:
    """Return the *steps* that need a row of their own, by position."""
    if run.status is not RunStatus.COMPLETED:
        return steps
    return {position: step for position, step in steps.items() if position != len(run.steps) - 1}


class _LastStep(NamedTuple):
    """The fields of a completed run's last step that the row of the run does not have."""

    agent_name: str
    usage: Usage | None
    attempt: int
    started_at: int
    completed_at: int
    call_count: int = 0
    model: str | None = None
    first_try: int = 1


def last_step_of(run: Run) -> bytes:
    step = run.steps[-1]
    times = micros(step.started_at) or 0, micros(step.completed_at) or 0
    return msgspec.json.encode(
        _LastStep(step.agent_name, step.usage, step.attempt, *times, step.call_count, step.model, step.first_try)
    )


_LAST_STEP = msgspec.json.Decoder(_LastStep)


def _last_step_from(stored: bytes, result: msgspec.Raw) -> Step:
    last = _LAST_STEP.decode(stored)
    times = {"started_at": time_from(last.started_at), "completed_at": time_from(last.completed_at)}
    return Step(result=result, **last._asdict() | times)


@_raising_damaged
def step_from(row: Sequence[Any]) -> Step:
    return Step(**_read_step(row))


@_raising_damaged
def batch_from(row: Sequence[Any]) -> Batch:
    return Batch(**_read_batch(row))


def batch_or_remains(row: Sequence[Any]) -> Batch:
    """Return a batch. If its row is damaged, return the readable fields, with an ``error``."""
    try:
        return batch_from(row)
    except Damaged:
        values: dict[str, Any]
        values = {"batch_id": "", "flock": "", "agent_name": "", "options": BatchOptions(), "total_items": 0}
        values |= {"status": RunStatus.FAILED, "created_at": EPOCH, **_remains_of(row, BATCH_TABLE)}
        return Batch(**values | {"error": DAMAGED_BATCH})


@_raising_damaged
def webhook_from(row: Sequence[Any]) -> Webhook:
    values: dict[str, Any] = dict.fromkeys(WEBHOOK_TABLE)
    return Webhook(**values | _read_webhook(row))


def webhook_or_remains(row: Sequence[Any]) -> Webhook:
    """Return a webhook from a row with text as bytes. If it is damaged, return what can be read, with an ``error``."""
    values: dict[str, Any] = dict.fromkeys(WEBHOOK_TABLE) | dict.fromkeys(("attempt", "tries"), 0)
    values |= dict.fromkeys(("webhook_id", "type", "record_id", "agent_name"), "")
    values |= {"status": "given_up", "created_at": EPOCH, "next_try_at": EPOCH}
    remains = _remains_of(row, WEBHOOK_TABLE)
    is_damaged = len(remains) < sum(value is not None for value in row)
    return Webhook(**values | remains | ({"error": DAMAGED_WEBHOOK} if is_damaged else {}))


@_raising_damaged
def call_from(row: Sequence[Any]) -> Call:
    return Call(**_read_call(row))


def shown_call_from(row: Sequence[Any]) -> Call:
    """Return a call whose long values were not read, but are NULL in *row*."""
    long = [name for name, value in zip(CALL_TABLE, row, strict=True) if value is None and name in LONG_IN_CALLS]
    call = call_from([b"{}" if name in long else value for name, value in zip(CALL_TABLE, row, strict=True)])
    return replace(call, **dict.fromkeys(long, NOT_LOADED))

"""How records become rows of the store, and rows records.

All functions are called within a transaction of ``flock.engine.store``, or on its connection for reading.
"""

import contextlib
import functools
import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from flock.engine.refusals import stopping
from flock.errors import KeyReused, Replayed, cut
from flock.runs import Batch, BatchOptions, IdempotencyKey, Page, Progress, QueueLimits, Run, RunStatus, Step, Usage

__all__ = [
    "DAMAGED_BATCH",
    "DAMAGED_RUN",
    "INTERRUPTED",
    "UNREADABLE",
    "Damaged",
    "Ended",
    "batch_from",
    "batch_or_remains",
    "batch_values",
    "bytes_or_none",
    "check_engine",
    "check_key",
    "check_room",
    "count_ended",
    "delete_items",
    "delete_runs",
    "find_batch",
    "find_run",
    "find_steps",
    "has_key",
    "id_at",
    "insert_key",
    "insert_runs",
    "item_listing",
    "listing",
    "micros",
    "names_json",
    "page_of",
    "read_row",
    "rows_of",
    "run_from",
    "run_or_remains",
    "run_values",
    "step_from",
    "steps_with_rows",
    "time_from",
    "write_run",
]

T = TypeVar("T")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: ``error`` and ``error_type`` of a run whose server went away while somebody waited for it.
INTERRUPTED = ("The server stopped before this run ended.", "interrupted")
#: ``error`` of a run or a batch whose row in the store is damaged, and ``error_type`` of the run.
DAMAGED_RUN = "The record of this run is damaged and cannot be read."
DAMAGED_BATCH = "The record of this batch is damaged and cannot be read."
UNREADABLE = "unreadable"


# Rows

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
COLUMNS = ", ".join(FIELDS)
#: What stands for a column that is not read.
EMPTY = {
    "inputs": "x'7b7d'",
    "recoveries": "0",
    **dict.fromkeys(("result", "traceparent", "principal", "extra", "last_step"), "NULL"),
}
#: The columns of a row of which only the beginning can be read; a row without inputs counts as damaged.
SHORT_COLUMNS = ", ".join(
    {**EMPTY, "inputs": "x''", "error": "NULL", "progress": "NULL"}.get(name, name) for name in FIELDS
)
#: What stands for a result that is not read, if there is one.
OUTLINED = "CASE typeof(result) WHEN 'blob' THEN x'7b7d' ELSE result END"
OUTLINE_COLUMNS = ", ".join(
    {"inputs": EMPTY["inputs"], "extra": "NULL", "result": OUTLINED}.get(name, name) for name in FIELDS
)
# What a failed commit may have written all the same is written again.
INSERT_RUN = f"INSERT OR REPLACE INTO runs ({COLUMNS}) VALUES ({', '.join('?' * len(FIELDS))})"
UPDATE = """UPDATE runs SET status = ?, result = ?, error = ?, error_type = ?, started_at = ?, completed_at = ?,
    progress = ?, last_step = ? WHERE run_id = ? AND attempt = ? AND status IN ('starting', 'running')"""
UPDATE_RUN = f"{UPDATE} AND owner = ?"
UPDATE_ITEM = f"{UPDATE} AND EXISTS (SELECT 1 FROM batches WHERE batch_id = ? AND owner = ?)"
DROP_OLD_BATCHES = """UPDATE batches SET hidden = 'dropped' WHERE batch_id IN (SELECT batch_id FROM batches
    WHERE flock = :flock AND hidden IS NULL AND batch_id < :bound AND completed_at <= :latest
    AND batch_id NOT IN (SELECT value FROM json_each(:kept)) LIMIT :limit)"""
COUNT_ITEMS = """UPDATE batches SET completed_items = completed_items + ?, failed_items = failed_items + ?,
    cancelled_items = cancelled_items + ? WHERE batch_id = ?"""
INSERT_STEP = "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"

#: Items of batches that ended, by batch and status.
Ended = Counter[tuple[str, RunStatus]]


def write_run(db: sqlite3.Connection, run: Run, is_new: bool, steps: Mapping[int, Step], ended: Ended) -> bool:
    """Write one run and its new steps, and count it in *ended*; False if it is not this engine's any more.

    The last step of a run that completed is written with it: its result is the run's.
    """
    own_rows = steps_with_rows(run, steps)
    last_step = _LastStep.of(run.steps[-1]).encoded() if len(own_rows) < len(steps) else None
    if is_new:
        db.execute(INSERT_RUN, run_values(run, last_step))
    else:
        fence = (run.owner,) if run.batch_id is None else (run.batch_id, run.owner)
        values = (
            run.status.value,
            bytes_or_none(run.result),
            run.error,
            run.error_type,
            micros(run.started_at),
            micros(run.completed_at),
            run.progress and msgspec.json.encode(run.progress),
            last_step,
            run.run_id,
            run.attempt,
            *fence,
        )
        if db.execute(UPDATE_RUN if run.batch_id is None else UPDATE_ITEM, values).rowcount == 0:
            return False
    for position, step in own_rows.items():
        values_of_step = (
            run.run_id,
            position,
            step.agent_name,
            bytes(step.result),
            step.next_agent,
            step.usage and msgspec.json.encode(step.usage),
            step.attempt,
            micros(step.started_at),
            micros(step.completed_at),
        )
        db.execute(INSERT_STEP, values_of_step)
    if run.batch_id is not None and run.status.is_final:
        ended[run.batch_id, run.status] += 1
    return True


def steps_with_rows(run: Run, steps: Mapping[int, Step]) -> Mapping[int, Step]:
    """Those of *steps*, by position, that are not written in the row of *run* itself."""
    if run.status is not RunStatus.COMPLETED:
        return steps
    return {position: step for position, step in steps.items() if position != len(run.steps) - 1}


class _LastStep(NamedTuple):
    """What of the last step of a completed run is not in its row already."""

    agent_name: str
    usage: Usage | None
    attempt: int
    started_at: int | None
    completed_at: int | None

    @classmethod
    def of(cls, step: Step) -> "_LastStep":
        return cls(step.agent_name, step.usage, step.attempt, micros(step.started_at), micros(step.completed_at))

    def encoded(self) -> bytes:
        return msgspec.json.encode(self)


def count_ended(db: sqlite3.Connection, ended: Ended) -> None:
    """Add the items of *ended* to the counts of their batches."""
    for batch_id in {batch_id for batch_id, _ in ended}:
        failed, cancelled = ended[batch_id, RunStatus.FAILED], ended[batch_id, RunStatus.CANCELLED]
        total = ended[batch_id, RunStatus.COMPLETED] + failed + cancelled
        db.execute(COUNT_ITEMS, (total, failed, cancelled, batch_id))


def insert_runs(db: sqlite3.Connection, runs: Iterable[Run]) -> None:
    """Write new runs that have no steps yet."""
    db.executemany(INSERT_RUN, map(run_values, runs))


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


def find_run(db: sqlite3.Connection, run_id: str, *, is_outline: bool = False) -> Run | None:
    """A run; in its outline ``{}`` stands for its inputs and for each result, which are not read.

    Raises Damaged, unless the run has failed for that reason.
    """
    try:
        row = read_row(db, OUTLINE_COLUMNS if is_outline else COLUMNS, "run_id", run_id)
        return None if row is None else run_from(row, find_steps(db, run_id, OUTLINED if is_outline else "result"))
    except Damaged:
        row = _read_remains(db, run_id)
        if _remains_of(row, TYPES, READERS).get("error_type") != UNREADABLE:
            raise
        return _remains_of_run(row)


def find_steps(db: sqlite3.Connection, run_id: str, result: str = "result") -> tuple[Step, ...]:
    query = (
        f"SELECT agent_name, {result}, next_agent, usage, attempt, started_at, completed_at FROM steps "
        "WHERE run_id = ? ORDER BY position"
    )
    with _finding_damage():
        return tuple(map(step_from, db.execute(query, (run_id,))))


def read_row(db: sqlite3.Connection, columns: str, name: str, value: Any) -> Any:
    """The row of ``runs`` with that *value*, or None. Raises Damaged."""
    with _finding_damage():
        return db.execute(f"SELECT {columns} FROM runs WHERE {name} = ?", (value,)).fetchone()


def _read_remains(db: sqlite3.Connection, run_id: str) -> Any:
    """A damaged row, or its beginning if that is all that SQLite can read; with text as bytes, since it may be none."""
    db.text_factory = bytes
    try:
        return read_row(db, COLUMNS, "run_id", run_id)
    except Damaged:
        return read_row(db, SHORT_COLUMNS, "run_id", run_id)
    finally:
        db.text_factory = str


class Damaged(sqlite3.DatabaseError):
    """A row holds what was never written to it: SQLite has no checksums, and gives what it finds.

    Attributes:
        is_writable: False if SQLite itself cannot read all of it. To write it would fail the whole transaction.
    """

    def __init__(self, reason: Exception, *, is_writable: bool = True) -> None:
        super().__init__(f"a row is damaged ({reason})")
        self.is_writable = is_writable


@contextlib.contextmanager
def _finding_damage() -> Iterator[None]:
    """Raise Damaged if SQLite or its driver cannot read one row; what else they raise is not about a row."""
    try:
        yield
    except sqlite3.DatabaseError as exc:
        if "Could not decode to UTF-8" in str(exc):
            raise Damaged(exc) from exc
        if type(exc) is sqlite3.DatabaseError:  # SQLITE_CORRUPT
            raise Damaged(exc, is_writable=False) from exc
        raise


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
        return _remains_of_run(row)


def _remains_of_run(row: Sequence[Any]) -> Run:
    values: dict[str, Any]
    values = {"run_id": "", "flock": "", "agent_name": "", "inputs": msgspec.Raw(b"{}"), "status": RunStatus.FAILED}
    values |= {"created_at": EPOCH, **_remains_of(row, TYPES, READERS), "error": DAMAGED_RUN, "error_type": UNREADABLE}
    values.pop("last_step", None)
    return Run(**values)


def _remains_of(
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


def rows_of(
    db: sqlite3.Connection, query: Callable[[str], str], values: Mapping[str, Any], columns: str = COLUMNS
) -> Iterator[Sequence[Any]]:
    """The rows of *query*, a function of the columns; as much as can be read of those that SQLite cannot read whole."""
    read = 0
    try:
        with _finding_damage():
            for row in db.execute(query(columns), values):
                yield row[: len(FIELDS)]
                read += 1
    except Damaged:
        for run_id, *_ in itertools.islice(db.execute(query("run_id"), values), read, None):
            try:
                row = read_row(db, columns, "run_id", run_id)
            except Damaged:
                row = _read_remains(db, run_id)
            yield row


def page_of(limit: int, rows: Iterable[Sequence[Any]]) -> Page[Run]:
    """The first of *rows* as runs without their steps; rows beyond the page are not read, but for one."""
    page = Page[Run](limit)
    for row in rows:
        if not page.add(run_or_remains(row)):
            break
    return page


def _last_step_from(kept: bytes, result: msgspec.Raw) -> Step:
    last = msgspec.json.decode(kept, type=_LastStep)
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
BATCH_COLUMNS = ", ".join(BATCH_FIELDS)
INSERT_BATCH = f"INSERT INTO batches ({BATCH_COLUMNS}, hidden) VALUES ({', '.join('?' * (len(BATCH_FIELDS) + 1))})"
FAIL_RUN = """UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?
    WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"""
RUNS_OF = """SELECT run_id FROM runs
    WHERE owner = ? AND status IN ('starting', 'running') AND batch_id IS NULL ORDER BY run_id"""
TAKE_RUN = """UPDATE runs SET owner = ?, attempt = attempt + (status = 'running'),
    recoveries = recoveries + (status = 'running'), status = 'starting'
    WHERE run_id = ? AND owner = ? AND status IN ('starting', 'running')"""
BATCHES_OF = """SELECT batch_id FROM batches INDEXED BY batches_open
    WHERE owner = ? AND hidden IS NULL AND completed_at IS NULL ORDER BY batch_id"""
FAIL_BATCH = "UPDATE batches SET status = 'failed', error = ?, completed_at = ? WHERE batch_id = ? AND owner = ?"
FAIL_ITEMS = """UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?
    WHERE batch_id = ? AND status IN ('starting', 'running')"""
TAKE_BATCH = "UPDATE batches SET owner = ? WHERE batch_id = ? AND owner = ? AND completed_at IS NULL"
TAKE_ITEMS = """UPDATE runs SET attempt = attempt + 1, recoveries = recoveries + 1, status = 'starting'
    WHERE batch_id = ? AND status = 'running'"""
DROP_STAGED = "UPDATE batches SET hidden = 'dropped' WHERE owner = ? AND hidden = 'staged'"


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


TIMES_OF_BATCH = ("created_at", "started_at", "completed_at", "resumed_at")


def find_batch(db: sqlite3.Connection, batch_id: str) -> Batch | None:
    """A batch that is not out of sight. Raises Damaged, unless it has failed for that reason."""
    query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE batch_id = ? AND hidden IS NULL"
    row = db.execute(query, (batch_id,)).fetchone()
    if row is None:
        return None
    return batch_or_remains(row) if row[BATCH_FIELDS.index("error")] == DAMAGED_BATCH else batch_from(row)


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
        values |= {"status": RunStatus.FAILED, "created_at": EPOCH, **_remains_of(row, BATCH_TYPES, BATCH_READERS)}
        return Batch(**values | {"error": DAMAGED_BATCH})


#: Runs of agents that no program has any more wait too, but not for a slot.
WAITING = """FROM runs INDEXED BY runs_by_both WHERE batch_id IS NULL AND flock = ?
    AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'starting'"""


#: The same of one principal.
WAITING_OF = """SELECT count(*) FROM runs INDEXED BY runs_by_principal_and_agent WHERE batch_id IS NULL AND flock = ?
    AND principal = ? AND agent_name IN (SELECT value FROM json_each(?)) AND status = 'starting'"""


def check_room(
    db: sqlite3.Connection, flock: str, agents: Collection[str], principal: str | None, limits: QueueLimits
) -> None:
    """Raise EngineFull if no run of these agents, or none of *principal*, may wait beside those that do."""
    names = names_json(agents)
    limits.check(db.execute(f"SELECT count(*) {WAITING}", (flock, names)).fetchone()[0])
    if principal is not None:
        limits.check_share(db.execute(WAITING_OF, (flock, principal, names)).fetchone()[0])


def check_key(db: sqlite3.Connection, flock: str, key: IdempotencyKey | None) -> None:
    if key is None:
        return
    query = "SELECT fingerprint, made_id FROM idempotency_keys WHERE flock = ? AND key = ?"
    found = db.execute(query, (flock, key.kept_as)).fetchone()
    if found is not None:
        raise Replayed(found[1]) if found[0] == key.digest else KeyReused(key.key)


def has_key(db: sqlite3.Connection, flock: str, key: IdempotencyKey | None) -> bool:
    """Whether something was made under *key*, for whatever request."""
    query = "SELECT 1 FROM idempotency_keys WHERE flock = ? AND key = ?"
    return key is not None and db.execute(query, (flock, key.kept_as)).fetchone() is not None


def check_engine(db: sqlite3.Connection, engine_id: str | None) -> None:
    """Raise EngineStopped where an engine has let go of all that it had: nobody would go on with more."""
    if db.execute("SELECT 1 FROM engines WHERE engine_id = ?", (engine_id,)).fetchone() is None:
        raise stopping()


def insert_key(
    db: sqlite3.Connection, flock: str, key: IdempotencyKey | None, made_id: str, created_at: datetime
) -> None:
    if key is not None:
        values = (flock, key.kept_as, key.digest, made_id, micros(created_at))
        db.execute("INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?)", values)


def listing(columns: str, statuses: Iterable[str], conditions: str, also: str = "", order: str = "DESC") -> str:
    """A query for runs that are no items, in the order of their ids, and *also* what another query gives.

    SQLite merges the ranges of the statuses as it reads them, so that no index without the status is needed: each one
    that there is takes its time at each write.
    """
    is_of_agent = "agent_name = " in conditions
    index = "runs_by_both" if is_of_agent else "runs_by_status"
    if "principal = " in conditions:
        index = "runs_by_principal_and_agent" if is_of_agent else "runs_by_principal"
    ranges = [
        f"SELECT {columns} FROM runs INDEXED BY {index} WHERE batch_id IS NULL AND {conditions} AND status = '{status}'"
        for status in statuses
    ]
    return f"{' UNION ALL '.join([*ranges, also] if also else ranges)} ORDER BY 1 {order}"


def item_listing(columns: str, statuses: Iterable[str]) -> str:
    """A query for up to :limit items of :batch_id behind :after, in order: SQLite merges the ranges as it reads."""
    ranges = (
        f"SELECT {columns}, position AS place FROM runs INDEXED BY items_by_status "
        f"WHERE batch_id = :batch_id AND status = '{status}' AND position > :after AND position <= {2**63 - 1}"
        for status in statuses
    )
    return f"{' UNION ALL '.join(ranges)} ORDER BY place LIMIT :limit"


BATCHES = "SELECT batch_id FROM batches WHERE flock = :flock AND hidden IS NULL"
NEWEST = f"{listing('run_id', RunStatus, 'flock = :flock', BATCHES)} LIMIT 1 OFFSET :offset"
FINAL = [status for status in RunStatus if status.is_final]
OLD = """flock = :flock AND run_id < :bound AND completed_at <= :latest
    AND run_id NOT IN (SELECT value FROM json_each(:kept))"""
OLD_RUNS = f"{listing('run_id', FINAL, OLD, order='ASC')} LIMIT :limit"


def delete_runs(db: sqlite3.Connection, run_ids: Sequence[str]) -> int:
    query = "DELETE FROM runs WHERE run_id = ? AND batch_id IS NULL AND status NOT IN ('starting', 'running')"
    deleted = [run_id for run_id in run_ids if db.execute(query, (run_id,)).rowcount]
    db.executemany("DELETE FROM steps WHERE run_id = ?", [(run_id,) for run_id in deleted])
    return len(deleted)


def delete_items(db: sqlite3.Connection, batch_id: str, limit: int) -> int:
    """Delete up to *limit* items of a final batch, and the batch with the last of them."""
    query = "SELECT run_id FROM runs WHERE batch_id = ? LIMIT ?"
    ids = [(row[0],) for row in db.execute(query, (batch_id, limit))]
    db.executemany("DELETE FROM steps WHERE run_id = ?", ids)
    db.executemany("DELETE FROM runs WHERE run_id = ?", ids)
    if len(ids) < limit:
        db.execute("DELETE FROM batches WHERE batch_id = ?", (batch_id,))
    return len(ids) + 1


# Values


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


def names_json(names: Iterable[str]) -> str:
    return msgspec.json.encode(sorted(names)).decode()


def bytes_or_none(raw: msgspec.Raw | None) -> bytes | None:
    return None if raw is None else bytes(raw)


def id_at(time: datetime, milliseconds_later: int = 0) -> str:
    """Where the ids that were made at *time* begin (RFC 9562: their first 48 bits are milliseconds)."""
    digits = f"{max(0, (micros(time) or 0) // 1000 + milliseconds_later):012x}"
    return f"{digits[:8]}-{digits[8:]}"

"""The tables of the store: how they are made, and how records become rows and rows records.

All functions are called within a transaction of ``flock.store``, or on its connection for reading.
"""

import functools
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from flock.errors import EngineFull, KeyReused, Replayed
from flock.runs import Batch, BatchOptions, IdempotencyKey, Progress, Run, RunStatus, Step, Usage

__all__ = [
    "INTERRUPTED",
    "MIGRATIONS",
    "batch_from",
    "bytes_or_none",
    "check_key",
    "check_room",
    "delete_items",
    "delete_runs",
    "find_batch",
    "find_run",
    "find_steps",
    "id_at",
    "insert_key",
    "insert_run",
    "listing",
    "micros",
    "run_from",
    "step_from",
    "time_from",
    "write_run",
]

T = TypeVar("T")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: ``error`` and ``error_type`` of a run whose server went away while somebody waited for it.
INTERRUPTED = ("The server stopped before this run ended.", "interrupted")


# Migrations: applied in order, each once; the file remembers how many. Never change one that was released.


def _create_tables(db: sqlite3.Connection) -> None:
    for statement in (
        """CREATE TABLE runs (
            run_id TEXT PRIMARY KEY,
            flock TEXT NOT NULL,
            agent_name TEXT NOT NULL,
            status TEXT NOT NULL,
            error_type TEXT,
            created_at INTEGER NOT NULL,
            started_at INTEGER,
            completed_at INTEGER,
            request_id TEXT,
            batch_id TEXT,
            position INTEGER,
            is_async INTEGER NOT NULL,
            attempt INTEGER NOT NULL,
            timeout_s REAL,
            owner TEXT,
            cancel_requested INTEGER NOT NULL DEFAULT 0,
            progress BLOB,
            error TEXT,
            inputs BLOB NOT NULL, -- what is long comes last: what lies behind it takes longer to read
            result BLOB
        )""",
        # A page of GET /runs is one range of one of these for each status, whatever its filter; see listing.
        "CREATE INDEX runs_by_status ON runs (flock, status, run_id) WHERE batch_id IS NULL",
        "CREATE INDEX runs_by_both ON runs (flock, agent_name, status, run_id) WHERE batch_id IS NULL",
        "CREATE UNIQUE INDEX items ON runs (batch_id, position) WHERE batch_id IS NOT NULL",
        "CREATE INDEX cancels ON runs (owner) WHERE cancel_requested = 1 AND status IN ('starting', 'running')",
        "CREATE INDEX runs_active ON runs (owner) WHERE status IN ('starting', 'running')",
        """CREATE TABLE steps (
            run_id TEXT NOT NULL,
            position INTEGER NOT NULL,
            agent_name TEXT NOT NULL,
            result BLOB NOT NULL,
            next_agent TEXT,
            usage BLOB,
            attempt INTEGER NOT NULL,
            started_at INTEGER NOT NULL,
            completed_at INTEGER NOT NULL,
            PRIMARY KEY (run_id, position)
        )""",
        """CREATE TABLE batches (
            batch_id TEXT PRIMARY KEY,
            flock TEXT NOT NULL,
            agent_name TEXT NOT NULL,
            options BLOB NOT NULL,
            status TEXT NOT NULL,
            total_items INTEGER NOT NULL,
            completed_items INTEGER NOT NULL DEFAULT 0,
            failed_items INTEGER NOT NULL DEFAULT 0,
            cancelled_items INTEGER NOT NULL DEFAULT 0,
            error TEXT,
            created_at INTEGER NOT NULL,
            started_at INTEGER,
            completed_at INTEGER,
            request_id TEXT,
            owner TEXT
        )""",
        "CREATE TABLE engines (engine_id TEXT PRIMARY KEY, flock TEXT NOT NULL, started_at INTEGER NOT NULL)",
        """CREATE TABLE idempotency_keys (
            flock TEXT NOT NULL,
            key TEXT NOT NULL,
            fingerprint BLOB NOT NULL,
            made_id TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            PRIMARY KEY (flock, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX keys_by_what_they_made ON idempotency_keys (made_id)",
    ):
        db.execute(statement)


def _add_traceparent(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE runs ADD COLUMN traceparent TEXT")


def _add_principal(db: sqlite3.Connection) -> None:
    for statement in (
        "ALTER TABLE runs ADD COLUMN principal TEXT",
        "ALTER TABLE batches ADD COLUMN principal TEXT",
        # Only those who have keys pay for it.
        "CREATE INDEX runs_by_principal ON runs (flock, principal, status, run_id) "
        "WHERE batch_id IS NULL AND principal IS NOT NULL",
    ):
        db.execute(statement)


MIGRATIONS: Sequence[Callable[[sqlite3.Connection], None]] = [_create_tables, _add_traceparent, _add_principal]


# Rows

FIELDS = (
    "run_id flock agent_name inputs status result error error_type created_at started_at completed_at request_id "
    "batch_id position is_async attempt timeout_s owner cancel_requested progress traceparent principal"
).split()
COLUMNS = ", ".join(FIELDS)
#: What stands for a column that is not read.
EMPTY = {"inputs": "x'7b7d'", "result": "NULL", "traceparent": "NULL", "principal": "NULL"}
# What a failed commit may have written all the same is written again.
INSERT_RUN = f"INSERT OR REPLACE INTO runs ({COLUMNS}) VALUES ({', '.join('?' * len(FIELDS))})"
UPDATE_RUN = """UPDATE runs
    SET status = ?, result = ?, error = ?, error_type = ?, started_at = ?, completed_at = ?, progress = ?
    WHERE run_id = ? AND owner = ? AND attempt = ? AND status IN ('starting', 'running')"""
OLD_BATCHES = (
    "SELECT batch_id FROM batches WHERE flock = :flock AND batch_id < :bound AND completed_at <= :latest LIMIT 1"
)
COUNT_ITEM = """UPDATE batches SET completed_items = completed_items + 1, failed_items = failed_items + ?,
    cancelled_items = cancelled_items + ? WHERE batch_id = ?"""
INSERT_STEP = "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


def write_run(db: sqlite3.Connection, run: Run, is_new: bool, steps: Mapping[int, Step]) -> bool:
    """Write one run and its new steps; False if it is not this engine's any more."""
    if is_new:
        insert_run(db, run)
    else:
        values = (
            run.status.value,
            bytes_or_none(run.result),
            run.error,
            run.error_type,
            micros(run.started_at),
            micros(run.completed_at),
            run.progress and msgspec.json.encode(run.progress),
            run.run_id,
            run.owner,
            run.attempt,
        )
        if db.execute(UPDATE_RUN, values).rowcount == 0:
            return False
    if run.batch_id is not None and run.status.is_final:
        db.execute(COUNT_ITEM, (run.status is RunStatus.FAILED, run.status is RunStatus.CANCELLED, run.batch_id))
    for position, step in steps.items():
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
    return True


def insert_run(db: sqlite3.Connection, run: Run) -> None:
    db.execute(
        INSERT_RUN,
        (
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
        ),
    )


def find_run(db: sqlite3.Connection, run_id: str) -> Run | None:
    row = db.execute(f"SELECT {COLUMNS} FROM runs WHERE run_id = ?", (run_id,)).fetchone()
    if row is None:
        return None
    return run_from(row, find_steps(db, run_id))


def find_steps(db: sqlite3.Connection, run_id: str) -> tuple[Step, ...]:
    query = (
        "SELECT agent_name, result, next_agent, usage, attempt, started_at, completed_at FROM steps WHERE run_id = ? "
        "ORDER BY position"
    )
    return tuple(map(step_from, db.execute(query, (run_id,))))


def _refuse_damage(convert: Callable[..., T]) -> Callable[..., T]:
    """A row that was never written so is an error of the store: SQLite has no checksums, and gives what it finds."""

    @functools.wraps(convert)
    def refuse_damage(*args: Any) -> T:
        try:
            return convert(*args)
        except (ArithmeticError, TypeError, ValueError) as exc:
            raise sqlite3.DatabaseError(f"a row is damaged ({exc})") from exc

    return refuse_damage


@_refuse_damage
def run_from(row: Sequence[Any], steps: tuple[Step, ...]) -> Run:
    values = dict(zip(FIELDS, row, strict=True))
    for name in ("created_at", "started_at", "completed_at"):
        values[name] = time_from(values[name])
    return Run(
        **values
        | {
            "inputs": _json(values["inputs"]),
            "status": RunStatus(values["status"]),
            "result": None if values["result"] is None else _json(values["result"]),
            "is_async": bool(values["is_async"]),
            "cancel_requested": bool(values["cancel_requested"]),
            "progress": _progress(values["progress"]),
            "steps": steps,
        }
    )


@_refuse_damage
def step_from(row: Sequence[Any]) -> Step:
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


BATCH_COLUMNS = (
    "batch_id, flock, agent_name, options, status, total_items, completed_items, failed_items, cancelled_items, error, "
    "created_at, started_at, completed_at, request_id, owner, principal"
)
INSERT_BATCH = """INSERT INTO batches
    (batch_id, flock, agent_name, options, status, total_items, created_at, request_id, owner, principal)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
INTERRUPT_SYNC = """UPDATE runs SET status = 'failed', error = ?, error_type = ?, completed_at = ?
    WHERE owner = ? AND status IN ('starting', 'running') AND NOT is_async RETURNING run_id"""
TAKE_BATCHES = "UPDATE batches SET owner = ? WHERE owner = ? AND status IN ('starting', 'running')"
RUNS_OF = """SELECT run_id FROM runs
    WHERE owner = ? AND status IN ('starting', 'running') AND batch_id IS NULL ORDER BY run_id"""
BATCHES_OF = "SELECT batch_id FROM batches WHERE owner = ? AND status IN ('starting', 'running') ORDER BY batch_id"
TAKE_RUNS = """UPDATE runs SET owner = ?, attempt = attempt + (status = 'running'), status = 'starting'
    WHERE owner = ? AND status IN ('starting', 'running')"""


def find_batch(db: sqlite3.Connection, batch_id: str) -> Batch | None:
    row = db.execute(f"SELECT {BATCH_COLUMNS} FROM batches WHERE batch_id = ?", (batch_id,)).fetchone()
    return None if row is None else batch_from(row)


@_refuse_damage
def batch_from(row: Sequence[Any]) -> Batch:
    values = dict(zip(BATCH_COLUMNS.split(", "), row, strict=True))
    for name in ("created_at", "started_at", "completed_at"):
        values[name] = time_from(values[name])
    values["options"] = msgspec.json.decode(values["options"], type=BatchOptions)
    values["status"] = RunStatus(values["status"])
    return Batch(**values)


def check_room(db: sqlite3.Connection, flock: str, max_queue: int) -> None:
    query = "SELECT count(*) FROM runs INDEXED BY runs_by_status WHERE batch_id IS NULL AND flock = ? AND status = ?"
    waiting = db.execute(query, (flock, "starting")).fetchone()[0]
    if waiting >= max_queue:
        raise EngineFull(f"{waiting} runs are waiting already, all that this server takes (max_queue).")


def check_key(db: sqlite3.Connection, flock: str, key: IdempotencyKey | None) -> None:
    if key is None:
        return
    query = "SELECT fingerprint, made_id FROM idempotency_keys WHERE flock = ? AND key = ?"
    found = db.execute(query, (flock, key.kept_as)).fetchone()
    if found is not None:
        raise Replayed(found[1]) if found[0] == key.fingerprint else KeyReused(key.key)


def insert_key(
    db: sqlite3.Connection, flock: str, key: IdempotencyKey | None, made_id: str, created_at: datetime
) -> None:
    if key is not None:
        values = (flock, key.kept_as, key.fingerprint, made_id, micros(created_at))
        db.execute("INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?)", values)


def listing(columns: str, statuses: Iterable[str], conditions: str, also: str = "", order: str = "DESC") -> str:
    """A query for runs that are no items, in the order of their ids, and *also* what another query gives.

    SQLite merges the ranges of the statuses as it reads them, so that no index without the status is needed: each one
    that there is takes its time at each write.
    """
    index = "runs_by_both" if "agent_name = " in conditions else "runs_by_status"
    if "principal = " in conditions:
        index = "runs_by_principal"
    ranges = [
        f"SELECT {columns} FROM runs INDEXED BY {index} WHERE batch_id IS NULL AND {conditions} AND status = '{status}'"
        for status in statuses
    ]
    return f"{' UNION ALL '.join([*ranges, also] if also else ranges)} ORDER BY 1 {order}"


BATCHES = "SELECT batch_id FROM batches WHERE flock = :flock"
NEWEST = f"{listing('run_id', RunStatus, 'flock = :flock', BATCHES)} LIMIT 1 OFFSET :offset"
FINAL = [status for status in RunStatus if status.is_final]
OLD = "flock = :flock AND run_id < :bound AND completed_at <= :latest"
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
    msgspec.json.decode(kept, type=msgspec.Raw)
    return msgspec.Raw(kept)


def _progress(kept: bytes | None) -> Progress | None:
    """A run is worth more than how far it said it was."""
    try:
        return None if kept is None else msgspec.json.decode(kept, type=Progress)
    except msgspec.DecodeError:
        return None


def bytes_or_none(raw: msgspec.Raw | None) -> bytes | None:
    return None if raw is None else bytes(raw)


def id_at(time: datetime, milliseconds_later: int = 0) -> str:
    """Where the ids that were made at *time* begin (RFC 9562: their first 48 bits are milliseconds)."""
    digits = f"{max(0, (micros(time) or 0) // 1000 + milliseconds_later):012x}"
    return f"{digits[:8]}-{digits[8:]}"

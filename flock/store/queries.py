"""Queries that the store and its batches share.

All functions are called inside a transaction of ``Database.change``, or on its read connection.
"""

import contextlib
import itertools
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.errors import Conflict, KeyReused, OwnershipLost, Replayed
from flock.runs import (
    MAX_SHOWN_BYTES,
    MAX_SHOWN_CALLS,
    NOT_LOADED,
    Account,
    Batch,
    Call,
    IdempotencyKey,
    QueueLimits,
    Run,
    RunStatus,
    Spent,
    Step,
    Usage,
    UsageFilter,
    UsageRow,
    now,
)
from flock.runs.records import PAGE_BYTES, WAIT_KINDS
from flock.runs.usage import spent_since
from flock.steps.identity import Newest
from flock.steps.refusals import not_accepting
from flock.store import statements
from flock.store.columns import (
    BATCH_TABLE,
    DAMAGED_BATCH,
    RUN_TABLE,
    Damaged,
    batch_from,
    batch_or_remains,
    call_from,
    call_values,
    is_known_damage,
    json_or_null,
    last_step_of,
    micros,
    names_json,
    remains_of_run,
    run_from,
    run_values,
    shared_and_own_values,
    shown_call_from,
    step_from,
    step_values,
    steps_with_rows,
    updated_values,
)

#: What a call counts for the size of a page, in addition to its result.
CALL_BYTES = 1024
#: How many calls a reader of events holds, each of at most ``MAX_SHOWN_BYTES``.
CALLS_PER_PAGE = 16
#: How many new items of a batch one statement writes.
RUNS_PER_INSERT = 100


class Ended(defaultdict[tuple[str, RunStatus], int]):
    """Items of batches that ended, by batch and status.

    Attributes:
        spent: the tokens that items have used since they were last written, by batch.
        versions: for each batch and owner, the number of the version that executes its items; None for another's batch.
    """

    def __init__(self, ended: Mapping[tuple[str, RunStatus], int] = {}) -> None:
        super().__init__(int, ended)
        self.spent: dict[str, Usage] = {}
        self.versions: dict[tuple[str, str | None], tuple[int | None] | None] = {}


def write_run(db: sqlite3.Connection, run: Run, is_new: bool, steps: Mapping[int, Step], ended: Ended) -> bool:
    """Write one run and its new steps, and count it in *ended*. Returns False if this engine no longer owns it.

    The last step of a completed run is written in the row of the run, because both have the same result.
    """
    spent, used = _newly_spent(db, run)
    own_rows = steps_with_rows(run, steps)
    last_step = last_step_of(run) if len(own_rows) < len(steps) else None
    if is_new:
        _insert_run(db, run, last_step)
    else:
        values = (*updated_values(run, last_step), run.run_id, run.attempt)
        if run.batch_id is None:
            is_own = db.execute(statements.UPDATE_RUN, (*values, run.owner)).rowcount > 0
        else:  # one query for all items of the transaction
            if (key := (run.batch_id, run.owner)) not in ended.versions:
                ended.versions[key] = db.execute(statements.VERSION_OF_OWN_BATCH, key).fetchone()
            version = ended.versions[key]
            is_own = version is not None and db.execute(statements.UPDATE_ITEM, (*version, *values)).rowcount > 0
        if not is_own:
            return False
    _count_used(db, run, used)
    for position, step in own_rows.items():
        db.execute(statements.INSERT_STEP, step_values(run.run_id, position, step))
    if steps and run.waiting_for:  # those of the step that has ended
        db.execute(statements.SET_WAITS, (None, run.run_id))
    elif run.waiting_for and run.status.is_final:
        db.execute(statements.CLOSE_QUESTIONS, (run.run_id,))
    if steps and run.deaths:
        db.execute(statements.CLEAR_DEATHS, (run.run_id,))
    if run.batch_id is not None and run.status.is_final:
        ended[run.batch_id, run.status] += 1
    if run.batch_id is not None and spent is not None:
        ended.spent[run.batch_id] = ended.spent.get(run.batch_id, Usage()) + spent
    return True


def _newly_spent(db: sqlite3.Connection, run: Run) -> tuple[Usage | None, Sequence[Spent]]:
    """Return what *run* has spent since it was last written: in all, if it is an item, and by agent and model.

    Call it before writing.
    """
    if run.spent is None:
        return None, ()
    row = db.execute(statements.SPENT, (run.run_id,)).fetchone()
    of_item = None if run.batch_id is None else run.spent - _usage_from(row)
    return of_item, spent_since(run.spent_by, _spent_by_from(None if row is None else row[1]))


def _spent_by_from(stored: bytes | None) -> tuple[Spent, ...]:
    return () if stored is None else msgspec.json.decode(stored, type=tuple[Spent, ...])


def _count_used(db: sqlite3.Connection, run: Run, used: Iterable[Spent]) -> None:
    """Add to the usage of the principal of *run* today."""
    for each in used:
        counts = [min(count, statements.MAX_SUM) for count in msgspec.structs.astuple(each.usage)]
        day = now().date().toordinal()
        db.execute(statements.ADD_USAGE, (run.flock, day, run.principal or "", each.agent_name, each.model, *counts))


def find_account(db: sqlite3.Connection, flock: str, principal: str, spent: Mapping[str, tuple[Spent, ...]]) -> Account:
    """Return the account of a principal. *spent* is what runs have spent, by id, including what is not written yet."""
    day = now().date().toordinal()
    values = {"flock": flock, "principal": principal, "day": day, "runs": names_json(spent)}
    rows = db.execute(statements.ACCOUNT, values).fetchall()
    written = {run_id: _spent_by_from(stored) for *_, run_id, stored in rows}
    unwritten = [
        each.usage.picodollars for run_id in spent for each in spent_since(spent[run_id], written.get(run_id, ()))
    ]
    return Account(max_cost=rows[0][0], picodollars=int(rows[0][1]) + sum(unwritten))


def set_budget(db: sqlite3.Connection, flock: str, principal: str, max_cost: float | None) -> None:
    if max_cost is None:
        db.execute(statements.DELETE_BUDGET, (flock, principal))
    else:
        db.execute(statements.SET_BUDGET, (flock, principal, max_cost))


def find_usage(db: sqlite3.Connection, flock: str, day: date, wanted: UsageFilter) -> list[UsageRow]:
    """Return the usage of a day, as *wanted*."""
    by = tuple(name for name in wanted.by if name != "day")
    values = {"flock": flock, "day": day.toordinal(), "principal": wanted.principal}
    rows = db.execute(statements.usage_of_day(by, of_all=wanted.principal is None), values)
    return [
        UsageRow(
            day=day,
            **dict(zip(by, row[: len(by)], strict=True)),
            usage=Usage(**dict(zip(Usage.__struct_fields__, map(int, row[len(by) :]), strict=True))),
        )
        for row in rows
    ]


def _usage_from(row: Sequence[Any] | None) -> Usage:
    return Usage() if row is None or row[0] is None else msgspec.json.decode(row[0], type=Usage)


def write_spent(db: sqlite3.Connection, run: Run) -> None:
    """Write ``Run.spent``, and add to the usage of its batch."""
    if run.spent is None:
        return
    ended, (spent, used) = Ended(), _newly_spent(db, run)
    db.execute(statements.SET_SPENT, (json_or_null(run.spent), json_or_null(run.spent_by), run.run_id))
    _count_used(db, run, used)
    if spent is not None and run.batch_id is not None:
        ended.spent[run.batch_id] = spent
        count_ended(db, ended)


def count_ended(db: sqlite3.Connection, ended: Ended) -> None:
    """Add the items of *ended* to the counts of their batches, and what they have spent to their usage."""
    for batch_id in {batch_id for batch_id, _ in ended}:
        failed, cancelled = ended[batch_id, RunStatus.FAILED], ended[batch_id, RunStatus.CANCELLED]
        total = ended[batch_id, RunStatus.COMPLETED] + failed + cancelled
        db.execute(statements.COUNT_ENDED_ITEMS, (total, failed, cancelled, batch_id))
    for batch_id, spent in ended.spent.items():
        usage = _usage_from(db.execute(statements.USAGE_OF_BATCH, (batch_id,)).fetchone()) + spent
        db.execute(statements.SET_USAGE_OF_BATCH, (msgspec.json.encode(usage), batch_id))


def insert_runs(db: sqlite3.Connection, runs: Iterable[Run]) -> None:
    """Write new runs that have no steps yet, many with each statement, which takes a third of the time."""
    left = iter(runs)
    while chunk := list(itertools.islice(left, RUNS_PER_INSERT)):
        shared, own = shared_and_own_values(chunk)
        statement = statements.insert_runs(tuple(shared), tuple(own), len(chunk))
        db.execute(statement, [*shared.values(), *itertools.chain(*zip(*own.values(), strict=True))])


def _insert_run(db: sqlite3.Connection, run: Run, last_step: bytes | None = None) -> None:
    values = run_values(run, last_step)
    db.execute(statements.insert_run(tuple(values)), list(values.values()))


def find_run(db: sqlite3.Connection, run_id: str, *, is_outline: bool = False) -> Run | None:
    """Return a run, or its outline: a stub with ``{}`` for its inputs and long results, which are not read.

    Raises Damaged if its row is damaged, unless the run has already failed because of the damage.
    """
    try:
        with DetectingDamage():
            row = db.execute(statements.OUTLINE_OF_RUN if is_outline else statements.WHOLE_RUN, (run_id,)).fetchone()
        if row is None:
            return None
        *columns, has_steps = row
        steps = statements.OUTLINED_STEPS if is_outline else statements.STEPS
        run = run_from(columns, find_steps(db, run_id, steps) if has_steps else ())
        return replace(run, inputs=NOT_LOADED) if is_outline else run
    except Damaged:
        row = _read_remains(db, run_id)
        if not is_known_damage(row):
            raise
        return remains_of_run(row)


def find_steps(db: sqlite3.Connection, run_id: str, query: str = statements.STEPS) -> tuple[Step, ...]:
    with DetectingDamage():
        return tuple(map(step_from, db.execute(query, (run_id,))))


def read_row(db: sqlite3.Connection, columns: str, name: str, value: Any) -> Any:
    """Return the row of ``runs`` with *value* in the column *name*, or None. Raises Damaged."""
    with DetectingDamage():
        return db.execute(statements.find_run(columns, name), (value,)).fetchone()


def _read_remains(db: sqlite3.Connection, run_id: str) -> Any:
    """Return a damaged row, or only its first columns if SQLite cannot read more. Text is returned as bytes."""
    with text_as_bytes(db):
        try:
            return read_row(db, statements.RUN_COLUMNS, "run_id", run_id)
        except Damaged:
            return read_row(db, statements.SHORT_COLUMNS, "run_id", run_id)


@contextlib.contextmanager
def text_as_bytes(db: sqlite3.Connection) -> Iterator[None]:
    """Read text as bytes in the block, which may not be valid text."""
    db.text_factory = bytes
    try:
        yield
    finally:
        db.text_factory = str


class DetectingDamage:
    """Raises Damaged for errors of SQLite and its driver that concern a single row. A generator would take longer."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if isinstance(exc, sqlite3.DatabaseError):
            if "Could not decode to UTF-8" in str(exc):
                raise Damaged(exc) from exc
            if type(exc) is sqlite3.DatabaseError:  # SQLITE_CORRUPT
                raise Damaged(exc, is_writable=False) from exc


def rows_of(
    db: sqlite3.Connection,
    query: Callable[[str], str],
    values: Mapping[str, Any],
    columns: str = statements.RUN_COLUMNS,
) -> Iterator[Sequence[Any]]:
    """Yield the rows of *query*, a function of the columns. Of a damaged row, yield as much as can be read."""
    yielded = 0
    try:
        with DetectingDamage():
            for row in db.execute(query(columns), values):
                yield row[: len(RUN_TABLE)]
                yielded += 1
    except Damaged:
        for run_id, *_ in itertools.islice(db.execute(query("run_id"), values), yielded, None):
            try:
                row = read_row(db, columns, "run_id", run_id)
            except Damaged:
                row = _read_remains(db, run_id)
            yield row


def find_batch(db: sqlite3.Connection, batch_id: str) -> Batch | None:
    """Return a batch unless it is hidden.

    Raises Damaged if its row is damaged, unless the batch has already failed because of the damage.
    """
    row = db.execute(statements.FIND_BATCH, (batch_id,)).fetchone()
    if row is None:
        return None
    return batch_or_remains(row) if row[list(BATCH_TABLE).index("error")] == DAMAGED_BATCH else batch_from(row)


class QueuedRuns:
    """The numbers of queued runs, in all and of each principal.

    They are counted once for all runs that a transaction accepts, since counting takes longer the more runs are queued.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str | None], int] = {}
        #: ``total_changes`` of the connection after the last ``insert``
        self._changes = 0

    def forget(self) -> None:
        """Call it when a transaction begins, because other processes may have written."""
        self._counts.clear()

    def check_room(
        self, db: sqlite3.Connection, flock: str, agents: Collection[str], principal: str | None, limits: QueueLimits
    ) -> None:
        """Raise EngineFull if too many runs of these agents, or of *principal*, are queued."""
        if db.total_changes != self._changes:  # something else was written
            self.forget()
        counts, names = self._counts, names_json(agents)
        if (flock, None) not in counts:
            counts[flock, None] = db.execute(statements.COUNT_QUEUED, (flock, names)).fetchone()[0]
        limits.check(counts[flock, None])
        if principal is None:
            return
        if (flock, principal) not in counts:
            values = (flock, principal, names)
            counts[flock, principal] = db.execute(statements.COUNT_QUEUED_OF_PRINCIPAL, values).fetchone()[0]
        limits.check_share(counts[flock, principal])

    def insert(self, db: sqlite3.Connection, run: Run, key: IdempotencyKey | None) -> None:
        """Write a new run and its *key*, after ``check_room``."""
        _insert_run(db, run)
        insert_key(db, run.flock, key, run.run_id, run.created_at)
        for principal in {None, run.principal}:
            self._counts[run.flock, principal] += 1
        self._changes = db.total_changes


def check_key(db: sqlite3.Connection, flock: str, key: IdempotencyKey | None) -> None:
    if key is None:
        return
    row = db.execute(statements.FIND_KEY, (flock, key.scoped_key)).fetchone()
    if row is not None:
        raise Replayed(row[1]) if row[0] == key.digest else KeyReused(key.key)


def check_engine(db: sqlite3.Connection, engine_id: str | None) -> None:
    """Raise EngineStopped if the engine is no longer registered, since nothing would recover its new work."""
    if db.execute(statements.FIND_ENGINE, (engine_id,)).fetchone() is None:
        raise not_accepting()


def check_latest(db: sqlite3.Connection, run: Run, newest: Newest | None) -> None:
    """Raise Conflict if the session of *run* has a run after *newest*."""
    values = (run.flock, run.session_id, run.principal, newest and newest.run_id)
    if newest is not None and (row := db.execute(statements.LATER_RUN, values).fetchone()) is not None:
        raise Conflict.continued(row[0])


def insert_key(
    db: sqlite3.Connection, flock: str, key: IdempotencyKey | None, made_id: str, created_at: datetime
) -> None:
    if key is not None:
        values = (flock, key.scoped_key, key.digest, made_id, micros(created_at))
        db.execute(statements.INSERT_KEY, values)


def delete_runs(db: sqlite3.Connection, run_ids: Sequence[str]) -> int:
    deleted = [run_id for run_id in run_ids if db.execute(statements.DELETE_FINAL_RUN, (run_id,)).rowcount]
    _delete_details(db, [(run_id,) for run_id in deleted])
    return len(deleted)


def delete_run(db: sqlite3.Connection, run_id: str) -> bool:
    """Delete a final run, and its key, so that this can create the run again. Return False if it is not final."""
    is_deleted = delete_runs(db, [run_id]) == 1
    if is_deleted:
        db.execute(statements.DELETE_KEYS_OF, (run_id,))
    return is_deleted


def delete_items(db: sqlite3.Connection, batch_id: str, limit: int) -> int:
    """Delete up to *limit* items of a final batch, and the batch itself with the last of them."""
    ids = [(row[0],) for row in db.execute(statements.ITEMS_OF, (batch_id, limit))]
    _delete_details(db, ids)
    db.executemany(statements.DELETE_RUN, ids)
    if len(ids) < limit:
        db.execute(statements.DELETE_BATCH, (batch_id,))
    return len(ids) + 1


def _delete_details(db: sqlite3.Connection, run_ids: Sequence[tuple[str]]) -> None:
    """Delete the steps, calls, questions and messages of these runs."""
    for statement in statements.DELETE_DETAILS:
        db.executemany(statement, run_ids)


def find_spent(db: sqlite3.Connection, query: str, values: Mapping[str, Any]) -> list[tuple[str, Usage | None]]:
    """Return ``spent`` of the runs that *query* finds, by id. It is None if only the steps of a run have its usage.

    The query returns the id, ``spent``, and how many bytes SQLite skips to read it. A page has ``PAGE_BYTES`` of these.
    """
    page, bytes_left = list[tuple[str, Usage | None]](), PAGE_BYTES
    for run_id, stored, length in db.execute(query, values):
        spent = None
        with contextlib.suppress(msgspec.DecodeError, TypeError):  # a damaged run is reported when it is read
            spent = msgspec.json.decode(stored, type=Usage)
        page.append((run_id, spent))
        bytes_left -= length
        if bytes_left < 0:
            break
    return page


def earlier_runs(db: sqlite3.Connection, run: Run, limit: int, max_bytes: int) -> list[Run]:
    """Return completed runs of the session and the agent of *run*, oldest first: the last *limit*, or *max_bytes*.

    Damaged runs are left out.
    """
    values = (run.flock, run.session_id, run.principal, run.agent_name, run.run_id, limit)
    runs: list[Run] = []
    for (run_id,) in db.execute(statements.EARLIER_RUNS, values).fetchall():
        with contextlib.suppress(Damaged):
            earlier = find_run(db, run_id)
            max_bytes -= 0 if earlier is None else earlier.exchange_bytes
            if max_bytes < 0:
                break
            runs += [] if earlier is None else [earlier]
    return runs[::-1]


def find_calls(db: sqlite3.Connection, run: Run, position: int, after_row: int, tries: int) -> list[tuple[int, Call]]:
    """Return a page of the finished calls of a step, each with its row, in the order in which they finished.

    Args:
        tries: those of the run when the calls were made.

    Raises Damaged.
    """
    page, bytes_left = list[tuple[int, Call]](), PAGE_BYTES
    with DetectingDamage():
        for row, *values in db.execute(statements.CALLS, (run.run_id, position, tries, after_row)):
            page.append((row, call := call_from(values)))
            bytes_left -= CALL_BYTES + len(call.arguments) + len(call.result)
            if bytes_left < 0:
                break
    return page


def find_shown_calls(db: sqlite3.Connection, run_id: str) -> list[Sequence[Any]]:
    """Return the rows of the calls of a run, each after the position of its step. Raises Damaged.

    They are in the order in which the calls finished. If there are too many, answers come first.
    """
    with DetectingDamage():
        return db.execute(
            statements.SHOWN_CALLS, (MAX_SHOWN_BYTES, MAX_SHOWN_BYTES, run_id, MAX_SHOWN_CALLS)
        ).fetchall()


def check_owner_of_batch(db: sqlite3.Connection, batch: Batch) -> Batch:
    """Return the current record of *batch*. Raises OwnershipLost."""
    current = find_batch(db, batch.batch_id)
    if current is None or current.owner != batch.owner:
        raise OwnershipLost(batch.batch_id)
    return current


def check_owner(db: sqlite3.Connection, run: Run) -> None:
    """Raise OwnershipLost unless the owner of *run*, or of its batch, may write it in this attempt."""
    if db.execute(statements.OWNS_RUN, (run.run_id, run.attempt, run.owner, run.owner)).fetchone() is None:
        raise OwnershipLost(run.run_id)


def find_next_calls(
    db: sqlite3.Connection, run_id: str, position: int, number: int, after_row: int
) -> list[tuple[int, Call]]:
    """Return a page of the calls of a step that were stored after a row, each with its row, from *number* on.

    Only the arguments of questions are read. Raises Damaged.
    """
    values = (MAX_SHOWN_BYTES, MAX_SHOWN_BYTES, run_id, position, after_row, CALLS_PER_PAGE, number)
    with DetectingDamage():
        return [(row, shown_call_from(call)) for row, *call in db.execute(statements.NEXT_CALLS, values)]


def _place_answer(db: sqlite3.Connection, run: Run, position: int, call: Call) -> bool:
    """Write the place of an answer. Returns False if it is not stored yet, since the program has given it itself."""
    values = (msgspec.json.encode(call.place), run.run_id, position, run.tries, call.call_id)
    return db.execute(statements.PLACE_ANSWER, values).rowcount == 1


def resume(db: sqlite3.Connection, run: Run, answered: Collection[str], owner: str | None) -> Run | None:
    """Let a waiting run continue, and return a stub of it. It keeps the waits that are not *answered*."""
    left = tuple(wait for wait in run.waiting_for if wait.call_id not in answered)
    db.execute(statements.RESUME_RUN, (None if run.batch_id else owner, json_or_null(left), run.run_id))
    db.execute(statements.COUNT_WAITING_ITEMS, (-1, run.batch_id))
    return find_run(db, run.run_id, is_outline=True)


def write_call(db: sqlite3.Connection, run: Run, position: int, call: Call) -> None:
    """Write a finished call of a step, or its start, and what the run has spent. Raises OwnershipLost."""
    check_owner(db, run)
    write_spent(db, run)
    if call.once == "ended":
        db.execute(statements.DELETE_START, (run.run_id, position, call.call_id))
    if not (call.is_answer and _place_answer(db, run, position, call)):
        db.execute(statements.INSERT_CALL, call_values(run, position, call))
    if call.kind in WAIT_KINDS:
        db.execute(statements.SET_WAITS, (json_or_null(run.waiting_for), run.run_id))
    if run.deaths and not call.is_start:
        db.execute(statements.CLEAR_DEATHS, (run.run_id,))

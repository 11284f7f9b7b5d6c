"""Recovery of the unfinished work of an engine whose process has ended: another engine takes it over.

All functions are called inside a transaction of ``Database.change``, or on its read connection.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from flock.runs import RunStatus, stub_of
from flock.steps.outcomes import CRASHED, DAMAGED, DEATHS_ALONE, INTERRUPTED, Outcome
from flock.store import queries, statements
from flock.store.columns import DAMAGED_BATCH, Damaged, micros, names_json
from flock.store.port import TakenOver
from flock.store.suspects import SuspectGroup, groups_of

logger = logging.getLogger("flock.store")

T = TypeVar("T")


class Unfinished:
    """The ids of an engine's unfinished runs and batches, by what to do with them."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.batches: list[str] = []
        self.damaged_batches: list[str] = []
        #: runs to mark as failed
        self.ends: dict[str, Outcome] = {}
        #: the number of runs and batches that stay, by their missing agent
        self.missing: Counter[str] = Counter()


def find_unfinished(db: sqlite3.Connection, dead_id: str, agents: Collection[str], only: str | None) -> Unfinished:
    """Find the unfinished work of an engine. Not for use in a write transaction: a damaged row would fail it."""
    unfinished = Unfinished()

    def found(kind: str, query: str, find: Callable[..., T | None]) -> Iterator[tuple[str, T | Damaged]]:
        for (id_,) in db.execute(query, (dead_id,)).fetchall():
            try:
                if only in (None, id_) and (record := find(db, id_)) is not None:
                    yield id_, record
            except Damaged as exc:
                logger.error("%s %s is unfinished and cannot be read: %s", kind, id_, exc)
                yield id_, exc

    for run_id, run in found("run", statements.UNFINISHED_RUNS, queries.find_run):
        if isinstance(run, Damaged):
            if run.is_writable:
                unfinished.ends[run_id] = DAMAGED
        elif not run.is_async:
            unfinished.ends[run_id] = INTERRUPTED
        elif run.cancel_requested or (run.next_agent_name or run.agent_name) in agents:
            unfinished.runs.append(run_id)
        else:
            unfinished.missing[run.next_agent_name or run.agent_name] += 1
    for batch_id, batch in found("batch", statements.UNFINISHED_BATCHES, queries.find_batch):
        if isinstance(batch, Damaged):
            unfinished.damaged_batches.append(batch_id)
        elif batch.cancel_requested or batch.agent_name in agents:
            unfinished.batches.append(batch_id)
        else:
            unfinished.missing[batch.agent_name] += 1
    return unfinished


def take_over(
    db: sqlite3.Connection,
    unfinished: Unfinished,
    dead_id: str,
    owner: str,
    now: datetime,
    executed: Mapping[str, int],
    max_recoveries: int,
) -> TakenOver:
    """Make *owner* the owner of work that can be resumed, and end the rest. Skip what *dead_id* no longer owns.

    Args:
        executed: see ``flock.store.suspects``.
    """
    at = micros(now)
    ended = [
        run_id
        for run_id, end in unfinished.ends.items()
        if _changes(db, statements.FAIL_RUN, end.error, end.error_type, at, run_id, dead_id)
    ]
    runs = ended + [id_ for id_ in unfinished.runs if _changes(db, statements.TAKE_RUN, owner, id_, dead_id)]
    batches = [id_ for id_ in unfinished.batches if _changes(db, statements.TAKE_BATCH, owner, id_, dead_id)]
    for batch_id in batches:
        db.execute(statements.TAKE_ITEMS, (batch_id,))
    for batch_id in unfinished.damaged_batches:
        if _changes(db, statements.FAIL_BATCH, DAMAGED_BATCH, at, batch_id, dead_id):
            db.execute(statements.CLOSE_QUESTIONS_OF_ITEMS, (batch_id, RunStatus.WAITING.value, -1))
            db.execute(statements.FAIL_ITEMS, (DAMAGED_BATCH, DAMAGED.error_type, at, batch_id))
    crashed, suspects = _judge(db, {*runs, *batches}, executed, max_recoveries, at)
    db.executemany(statements.CLOSE_QUESTIONS, [(run_id,) for run_id in (*ended, *crashed)])
    is_complete = remove_engine(db, dead_id)
    runs += [run_id for run_id in crashed if run_id not in runs]
    return TakenOver(
        [stub_of(run) for run_id in runs if (run := queries.find_run(db, run_id)) is not None],
        [batch for batch_id in batches if (batch := queries.find_batch(db, batch_id)) is not None],
        unfinished.missing,
        is_complete,
        suspects,
    )


def _judge(
    db: sqlite3.Connection, taken: set[str], executed: Mapping[str, int], max_recoveries: int, at: int | None
) -> tuple[Sequence[str], Sequence[SuspectGroup]]:
    """Count the death of a process for the runs, and for the items of batches, that were *taken* and *executed*.

    Returns: those that failed, because they were alone, and those that may be the cause.
    """
    died = [row for row in db.execute(statements.EXECUTED_RUNS, (names_json(executed),)) if not taken.isdisjoint(row)]
    is_alone, crashed = len(executed) == 1, []
    db.executemany(statements.COUNT_DEATH, [(is_alone, run_id) for run_id, _ in died])
    limits = (max_recoveries, min(max_recoveries, DEATHS_ALONE))
    for run_id, batch_id in died if is_alone else ():
        if _changes(db, statements.FAIL_CRASHED, CRASHED.error, CRASHED.error_type, at, run_id, *limits):
            crashed.append(run_id)
            if batch_id is not None:
                queries.count_ended(db, queries.Ended({(batch_id, RunStatus.FAILED): 1}))
    found = db.execute(statements.SUSPECTS).fetchall()
    suspects = {run_id: deaths for run_id, batch_id, deaths in found if not taken.isdisjoint((run_id, batch_id))}
    return crashed, groups_of(suspects, executed)


def _changes(db: sqlite3.Connection, query: str, *values: Any) -> bool:
    """Execute *query*. Return whether it changed a row."""
    return db.execute(query, values).rowcount > 0


def remove_engine(db: sqlite3.Connection, engine_id: str) -> bool:
    """Drop the staged batches of an engine, and its row. Returns False if it has unfinished work: its row stays."""
    db.execute(statements.DROP_STAGED_BATCHES, (engine_id,))
    for unfinished in (statements.UNFINISHED_RUNS, statements.UNFINISHED_BATCHES):
        if db.execute(unfinished, (engine_id,)).fetchone():
            return False
    db.execute(statements.DELETE_ENGINE, (engine_id,))
    return True

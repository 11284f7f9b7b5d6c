"""What an engine left unfinished when its process ended, and how another one takes it over.

All functions are called within a transaction of ``flock.engine.store``, or on its connection for reading.
"""

import logging
import sqlite3
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from flock.engine import queries, statements
from flock.engine.rows import DAMAGED_BATCH, DAMAGED_RUN, UNREADABLE, Damaged, micros
from flock.runs import Batch, Run, stub_of

__all__ = ["INTERRUPTED", "TakenOver", "Unfinished", "find_unfinished", "has_unfinished", "take_over"]

logger = logging.getLogger("flock.store")

#: ``error`` and ``error_type`` of a run whose server went away while somebody waited for it.
INTERRUPTED = ("The server stopped before this run ended.", "interrupted")


class TakenOver(NamedTuple):
    """What an engine took over from one that is gone.

    Attributes:
        runs: those that ended with it, and those to go on with; stubs, unless they are short.
        batches: to go on with.
        waiting: how many runs and batches were left, by the agent that they wait for.
        is_complete: nothing was unfinished.
    """

    runs: Sequence[Run]
    batches: Sequence[Batch]
    waiting: Mapping[str, int]
    is_complete: bool


class Unfinished:
    """The ids of what an engine left unfinished, by what is to be done with it."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.batches: list[str] = []
        self.damaged_batches: list[str] = []
        #: runs that end as failed: with which ``error`` and ``error_type``
        self.ends: dict[str, tuple[str, str]] = {}
        self.waiting: Counter[str] = Counter()


def find_unfinished(db: sqlite3.Connection, dead_id: str, agents: Collection[str], only: str | None) -> Unfinished:
    """Read outside a transaction for writing, which would fail if SQLite cannot read one of the rows."""
    unfinished = Unfinished()
    for (run_id,) in db.execute(statements.UNFINISHED_RUNS, (dead_id,)).fetchall():
        if only not in (None, run_id):
            continue
        try:
            run = queries.find_run(db, run_id)
        except Damaged as exc:
            logger.error("run %s was left unfinished, and cannot be read: %s", run_id, exc)
            if exc.is_writable:
                unfinished.ends[run_id] = (DAMAGED_RUN, UNREADABLE)
            continue
        if run is None:
            continue
        agent_name = run.next_agent_name or run.agent_name
        if not run.is_async:
            unfinished.ends[run_id] = INTERRUPTED
        elif run.cancel_requested or agent_name in agents:
            unfinished.runs.append(run_id)
        else:
            unfinished.waiting[agent_name] += 1
    for (batch_id,) in db.execute(statements.UNFINISHED_BATCHES, (dead_id,)).fetchall():
        if only not in (None, batch_id):
            continue
        try:
            batch = queries.find_batch(db, batch_id)
        except Damaged as exc:
            logger.error("batch %s was left unfinished, and cannot be read: %s", batch_id, exc)
            unfinished.damaged_batches.append(batch_id)
            continue
        if batch is not None and (batch.cancel_requested or batch.agent_name in agents):
            unfinished.batches.append(batch_id)
        elif batch is not None:
            unfinished.waiting[batch.agent_name] += 1
    return unfinished


def take_over(db: sqlite3.Connection, unfinished: Unfinished, dead_id: str, owner: str, now: datetime) -> TakenOver:
    """Make *owner* the owner of what is *left*, as far as it still belongs to *dead_id*, and end the rest of it."""
    at = micros(now)
    ended = [id_ for id_, end in unfinished.ends.items() if _changes(db, statements.FAIL_RUN, *end, at, id_, dead_id)]
    runs = ended + [id_ for id_ in unfinished.runs if _changes(db, statements.TAKE_RUN, owner, id_, dead_id)]
    batches = [id_ for id_ in unfinished.batches if _changes(db, statements.TAKE_BATCH, owner, id_, dead_id)]
    for batch_id in batches:
        db.execute(statements.TAKE_ITEMS, (batch_id,))
    for batch_id in unfinished.damaged_batches:
        if _changes(db, statements.FAIL_BATCH, DAMAGED_BATCH, at, batch_id, dead_id):
            db.execute(statements.FAIL_ITEMS, (DAMAGED_BATCH, UNREADABLE, at, batch_id))
    db.execute(statements.DROP_STAGED_BATCHES, (dead_id,))
    is_complete = not has_unfinished(db, dead_id)
    if is_complete:
        db.execute(statements.DELETE_ENGINE, (dead_id,))
    return TakenOver(
        [stub_of(run) for run_id in runs if (run := queries.find_run(db, run_id)) is not None],
        [batch for batch_id in batches if (batch := queries.find_batch(db, batch_id)) is not None],
        unfinished.waiting,
        is_complete,
    )


def _changes(db: sqlite3.Connection, query: str, *values: Any) -> bool:
    return db.execute(query, values).rowcount > 0


def has_unfinished(db: sqlite3.Connection, engine_id: str) -> bool:
    return any(
        db.execute(of, (engine_id,)).fetchone() for of in (statements.UNFINISHED_RUNS, statements.UNFINISHED_BATCHES)
    )

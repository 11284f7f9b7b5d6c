"""Runs that wait for the answers of people. They exist only in the store; no engine owns them.

All functions are called inside a transaction of ``Database.change``.
"""

import logging
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import UnsetType
from msgspec.structs import replace

from flock.errors import RunNotFound
from flock.runs import Run, RunStatus
from flock.steps.answers import answer_of, is_expired, question_for
from flock.steps.outcomes import Outcome, expiry_of
from flock.store import queries, statements
from flock.store.columns import Damaged, call_values, micros, waiting_values

logger = logging.getLogger("flock.store")


def suspend(db: sqlite3.Connection, run: Run) -> bool:
    """Write a run that begins to wait. Returns False if it was cancelled meanwhile. Raises OwnershipLost."""
    queries.check_owner(db, run)
    queries.write_spent(db, run)
    is_waiting = db.execute(statements.SUSPEND_RUN, (*waiting_values(run), run.run_id)).rowcount == 1
    if is_waiting:
        db.execute(statements.COUNT_WAITING_ITEMS, (1, run.batch_id))
    return is_waiting


def answer(
    db: sqlite3.Connection, run_id: str, call_id: str, output: msgspec.Raw, owner: str, at: datetime
) -> Run | None:
    """Answer a question. If it was the last one, return a stub of the run, which is to be started by *owner*.

    Otherwise nothing is returned, since each of the answers in one transaction would hold all questions that are left.

    Raises: RunNotFound, CallNotFound, Conflict, InvalidData, EngineStopped.
    """
    run = queries.find_run(db, run_id, is_outline=True)
    if run is None:
        raise RunNotFound(run_id)

    def find_answer() -> bytes | None:
        row = db.execute(statements.FIND_ANSWER, (run_id, call_id, len(run.steps), run.first_try)).fetchone()
        return None if row is None else row[0]

    if question_for(run, call_id, output, find_answer) is None:
        return None
    queries.check_engine(db, owner)
    return _continue(db, run, {call_id: output}, owner, at)


def expire(
    run_ids: Iterable[str], agents: Collection[str], owner: str, at: datetime, db: sqlite3.Connection
) -> Sequence[Run]:
    """End the waiting of runs with questions that have expired. Return stubs of those that have ended or are to start.

    A run with a default waits until a program that has its agent continues it.
    """
    changed = []
    for run_id in run_ids:
        try:
            run = queries.find_run(db, run_id, is_outline=True)
        except Damaged as exc:
            logger.error("run %s is waiting and cannot be read: %s", run_id, exc)
            continue
        if run is None or run.status is not RunStatus.WAITING:
            continue
        expired = [open_ for open_ in run.waiting_for if is_expired(open_, at)]
        defaults = {open_.call_id: open_.default for open_ in expired if not isinstance(open_.default, UnsetType)}
        unanswered = next((open_ for open_ in expired if open_.call_id not in defaults), None)
        if unanswered is not None:
            end(db, run, expiry_of(unanswered), at)
            changed.append(queries.find_run(db, run_id, is_outline=True))
        elif run.next_agent_name in agents:
            changed.append(_continue(db, run, defaults, owner, at))
    return [run for run in changed if run is not None]


def end(db: sqlite3.Connection, run: Run, outcome: Outcome, at: datetime) -> bool:
    """Write the end of a waiting run. Returns False if it is not waiting. Its questions stay for late answers."""
    values = (outcome.status.value, outcome.error, outcome.error_type, micros(at), run.run_id)
    is_ended = db.execute(statements.END_WAITING_RUN, values).rowcount == 1
    if is_ended and run.batch_id is not None:
        queries.count_ended(db, queries.Ended({(run.batch_id, outcome.status): 1}))
        db.execute(statements.COUNT_WAITING_ITEMS, (-1, run.batch_id))
    return is_ended


def _continue(
    db: sqlite3.Connection, run: Run, answers: Mapping[str, msgspec.Raw], owner: str, at: datetime
) -> Run | None:
    """Write *answers* to the journal. If no question is left, return a stub of the run, which can be started."""
    for question in run.waiting_for:
        if question.call_id in answers:
            call = answer_of(question, answers[question.call_id], at)
            db.execute(statements.INSERT_CALL, call_values(run, len(run.steps), call))
    left = tuple(question for question in run.waiting_for if question.call_id not in answers)
    if left:
        db.execute(statements.SUSPEND_RUN, (*waiting_values(replace(run, waiting_for=left)), run.run_id))
        return None
    db.execute(statements.RESUME_RUN, (None if run.batch_id else owner, run.run_id))
    db.execute(statements.COUNT_WAITING_ITEMS, (-1, run.batch_id))
    return queries.find_run(db, run.run_id, is_outline=True)

"""Calls of models in the batch endpoints of providers, until their items have got the replies.

A call is written in the transaction in which its item begins to wait for the reply, and deleted in the one in which the
item gets it. If its item waits no more, because it was cancelled, the reply stays here until it waits again.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.models.completions import BatchCall
from flock.runs import JSON_NULL, Batch, Question, Run, RunStatus, added, now
from flock.runs.usage import spent_with
from flock.steps.answers import answer_of
from flock.store import queries, statements
from flock.store.columns import call_values, micros, time_from
from flock.store.database import Database
from flock.store.port import Job, Reply


class JobStore:
    """What the task that works on a batch needs to know. Writing methods raise OwnershipLost if it is another's."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def open(self, batch: Batch) -> Sequence[Job]:
        """Return the jobs of a batch that have not ended, oldest first."""
        rows = self._db.read(lambda db: db.execute(statements.JOBS, (batch.batch_id,)).fetchall())
        return [Job(*row) for row in rows]

    async def new_calls(self, batch: Batch) -> tuple[int, datetime | None]:
        """Return how many calls of a batch are in no job yet, and when the first one began to wait."""
        count, first = self._db.read(lambda db: db.execute(statements.NEW_CALLS, (batch.batch_id,)).fetchone())
        return count, time_from(first)

    async def held(self, batch: Batch) -> int:
        """Return what the calls in jobs reserve, in picodollars."""
        return await self._sum(statements.HELD, batch.batch_id)

    async def count_submitted(self, batch_id: str) -> int:
        """Return how many calls of a batch are in jobs."""
        return await self._sum(statements.COUNT_SUBMITTED, batch_id)

    async def _sum(self, query: str, batch_id: str) -> int:
        (found,) = await self._db.read_in_thread(lambda db: db.execute(query, (batch_id,)).fetchone())
        return int(found or 0)

    async def create(
        self,
        batch: Batch,
        job_id: str,
        cost_of: Callable[[Sequence[tuple[str, int, int | None]]], list[int]],
    ) -> Job | None:
        """Put calls of one model that are in no job into a new one, in the order in which they began to wait.

        Args:
            cost_of: returns what each call reserves, given the model, length and max tokens of each. The calls beyond
                the returned costs are left out.

        Returns: the job; None if there is no call for it.
        """

        def apply(db: sqlite3.Connection) -> Job | None:
            queries.check_owner_of_batch(db, batch)
            first = db.execute(statements.FIRST_NEW_CALL, (batch.batch_id,)).fetchone()
            rows = [] if first is None else db.execute(statements.CALLS_FOR_JOB, (batch.batch_id, *first)).fetchall()
            costs = cost_of([tuple(call) for _, *call in rows])
            if not costs:
                return None
            db.execute(statements.INSERT_JOB, (job_id, batch.batch_id, *first, at := time.time_ns() // 1000))
            chosen = ((job_id, cost, row) for cost, (row, *_) in zip(costs, rows, strict=False))
            db.executemany(statements.PUT_CALL_INTO_JOB, chosen)
            return Job(job_id, first[0], None, False, at)

        return await self._db.change(apply)

    async def size(self, job: Job) -> tuple[int, int]:
        """Return the number of the calls of a job, and the length of their lines."""
        count, size = self._db.read(lambda db: db.execute(statements.SIZE_OF_JOB, (job.job_id,)).fetchone())
        return count, int(size) + count  # with the ends of the lines

    async def lines(self, job: Job, after: str, limit: int) -> Sequence[tuple[str, bytes]]:
        """Return the ids and the lines of up to *limit* calls of a job after an id, in the order of their ids."""
        return self._db.read(lambda db: db.execute(statements.LINES_OF_JOB, (job.job_id, after, limit)).fetchall())

    async def submitted(self, batch: Batch, job: Job, provider_id: str) -> None:
        await self._change(batch, lambda db: db.execute(statements.SET_PROVIDER_ID, (provider_id, job.job_id)))

    async def cancelled(self, batch: Batch, job: Job) -> None:
        await self._change(batch, lambda db: db.execute(statements.CANCEL_JOB, (job.job_id,)))

    async def reply(self, batch: Batch, job: Job, replies: Sequence[tuple[str, Reply]]) -> Sequence[str]:
        """Give replies to calls of a job, by id. Their items continue.

        Returns: the ids that were open calls of the job. Others have a reply already, or are unknown.
        """

        def apply(db: sqlite3.Connection) -> list[str]:
            queries.check_owner_of_batch(db, batch)
            return [id_ for id_, reply in replies if _reply(db, job, id_, reply, now())]

        return await self._db.change(apply)

    async def rest(self, job: Job, limit: int) -> Sequence[str]:
        """Return the ids of up to *limit* calls of a job that have no reply."""
        rows = self._db.read(lambda db: db.execute(statements.REST_OF_JOB, (job.job_id, limit)).fetchall())
        return [id_ for (id_,) in rows]

    async def end(self, batch: Batch, job: Job) -> None:
        """Delete a job. Its calls without a reply are for another one."""

        def apply(db: sqlite3.Connection) -> None:
            db.execute(statements.DROP_CALLS_OF_JOB, (job.job_id,))
            db.execute(statements.TAKE_CALLS_FROM_JOB, (job.job_id,))
            db.execute(statements.DELETE_JOB, (job.job_id,))

        await self._change(batch, apply)

    async def _change(self, batch: Batch, apply: Callable[[sqlite3.Connection], Any]) -> None:
        def apply_own(db: sqlite3.Connection) -> None:
            queries.check_owner_of_batch(db, batch)
            apply(db)

        await self._db.change(apply_own)


def keep_call(db: sqlite3.Connection, run: Run, wait: Question, at: datetime) -> bool:
    """Keep the call for whose reply an item begins to wait.

    Returns: whether the item has the reply already, because an earlier attempt had asked the same.
    """
    call = msgspec.json.decode(wait.arguments, type=BatchCall)  # type: ignore[arg-type]
    key = (run.run_id, wait.call_id)
    found = db.execute(statements.FIND_MODEL_CALL, key).fetchone()
    if found is not None and found[0] == call.digest:
        if found[1] is not None:
            current = queries.find_run(db, run.run_id, is_outline=True) or run  # with what it has spent
            _give(db, current, wait, msgspec.json.decode(found[1], type=Reply), call.agent_name, at)
        return found[1] is not None
    values = (call.custom_id, run.batch_id, call.agent_name, call.target, call.model, call.max_tokens, call.digest)
    db.execute(statements.INSERT_MODEL_CALL, (*key, *values, len(call.line), bytes(call.line), micros(at)))
    return False


def _reply(db: sqlite3.Connection, job: Job, custom_id: str, reply: Reply, at: datetime) -> bool:
    row = db.execute(statements.FIND_CALL_OF_JOB, (job.job_id, custom_id)).fetchone()
    if row is None:
        return False
    run_id, call_id, agent_name = row
    run = queries.find_run(db, run_id, is_outline=True)
    is_waiting = run is not None and run.status is RunStatus.WAITING
    wait = next((each for each in run.waiting_for if each.call_id == call_id), None) if run and is_waiting else None
    if run is None or wait is None:  # it was cancelled, or another of its calls continues
        db.execute(statements.KEEP_REPLY, (msgspec.json.encode(reply), run_id, call_id))
        return True
    _give(db, run, wait, reply, agent_name, at)
    queries.resume(db, run, [call_id], None)
    return True


def _give(db: sqlite3.Connection, run: Run, wait: Question, reply: Reply, agent_name: str, at: datetime) -> None:
    """Store a reply as the end of the call that waits for it, with what it has cost, and forget the call."""
    output = JSON_NULL if reply.completion is None else msgspec.Raw(msgspec.json.encode(reply.completion))
    call = replace(
        answer_of(wait, output, at),
        usage=reply.usage,
        model=reply.model,
        error=reply.error,
        error_type=reply.error_type,
        raised=reply.raised,
    )
    if reply.usage is not None:
        of_agent = spent_with(run.spent_by, agent_name, reply.model or "", reply.usage)
        queries.write_spent(db, replace(run, spent=added(run.usage, reply.usage), spent_by=of_agent))
    db.execute(statements.INSERT_CALL, call_values(run, len(run.steps), call))
    db.execute(statements.DELETE_MODEL_CALL, (run.run_id, wait.call_id))

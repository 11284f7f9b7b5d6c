"""Calls of models in the batch endpoints of providers, until their items have got the replies.

A call is written in the transaction in which its item begins to wait for the reply, and deleted in the one in which the
item gets it. If its item waits no more, because it was cancelled, the reply stays here until it waits again.
"""

import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
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

#: How many calls one transaction changes, and how many bytes of lines are read at a time.
CHUNK_SIZE, PAGE_BYTES = 2000, 64 * 1024


class JobStore:
    """What the task that works on a batch needs to know. Writing methods raise OwnershipLost if it is another's."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def open(self, batch: Batch) -> Sequence[Job]:
        """Return the jobs of a batch that have not ended, oldest first."""
        rows = self._db.read(lambda db: db.execute(statements.JOBS, (batch.batch_id,)).fetchall())
        return [Job(*row) for row in rows]

    async def new_calls(self, batch: Batch, limit: int) -> tuple[int, datetime | None]:
        """Return how many calls of a batch are in no job yet, up to *limit*, and when the first one began to wait."""
        count, first = self._db.read(lambda db: db.execute(statements.NEW_CALLS, (batch.batch_id, limit)).fetchone())
        return count, time_from(first)

    async def held(self, batch_id: str) -> Mapping[str, tuple[int, int]]:
        """Return what the open calls of each job reserve, in picodollars, and how many they are."""
        rows = await self._db.read_in_thread(lambda db: db.execute(statements.HELD, (batch_id,)).fetchall())
        return {job_id: (cost, count) for job_id, cost, count in rows}

    async def create(
        self,
        batch: Batch,
        job_id: str,
        limit: int,
        costs_of: Callable[[Sequence[tuple[str, int, int | None]], int, int], list[int]],
    ) -> Job | None:
        """Put up to *limit* new calls of one model into a new job, in the order in which they began to wait.

        This takes several transactions. If the process dies in between, the job has fewer calls.

        Args:
            costs_of: returns what each call reserves, given the model, length and max tokens of each, and the length
                and the costs of those that are in the job already. The calls beyond the returned costs are left out.

        Returns: the job; None if there is no call for it.
        """
        job: Job | None = None
        count = size = total = 0

        def fill(db: sqlite3.Connection) -> tuple[str, list[tuple[int, int]], bool] | None:
            """Return the target of the job, the length and cost of each new call of it, and whether that were all."""
            queries.check_owner_of_batch(db, batch)
            of_job = None if job is None else (job.target,)
            of_job = of_job or db.execute(statements.FIRST_NEW_CALL, (batch.batch_id,)).fetchone()
            if of_job is None:
                db.execute(statements.DROP_NEW_CALLS, (batch.batch_id, CHUNK_SIZE))
                return None
            values = (batch.batch_id, *of_job, at_most := min(limit - count, CHUNK_SIZE))
            rows = db.execute(statements.CALLS_FOR_JOB, values).fetchall()
            costs = costs_of([tuple(call) for _, *call in rows], size, total)
            if costs and job is None:
                db.execute(statements.INSERT_JOB, (job_id, batch.batch_id, *of_job, at))
            chosen = list(zip(costs, rows, strict=False))
            db.executemany(statements.PUT_CALL_INTO_JOB, ((job_id, cost, row) for cost, (row, *_) in chosen))
            return of_job[0], [(length + 1, cost) for cost, (_, _, length, _) in chosen], len(chosen) < at_most

        at, is_full = time.time_ns() // 1000, False
        while not is_full and count < limit and (filled := await self._db.change(fill)) is not None:
            target, chosen, is_full = filled
            job = Job(job_id, target, None, False, at) if chosen else job
            count += len(chosen)
            size += sum(length for length, _ in chosen)
            total += sum(cost for _, cost in chosen)
        return job

    async def size(self, job: Job) -> tuple[int, int]:
        """Return the number of the calls of a job, and the length of their lines."""
        query = (statements.SIZE_OF_JOB, (job.job_id,))
        count, size = await self._db.read_in_thread(lambda db: db.execute(*query).fetchone())
        return count, int(size) + count  # with the ends of the lines

    async def lines(self, job: Job, after: str) -> Sequence[tuple[str, bytes]]:
        """Return the ids and the lines of some calls of a job after an id, in the order of their ids."""

        def find(db: sqlite3.Connection) -> list[tuple[str, bytes]]:
            page, left = list[tuple[str, bytes]](), PAGE_BYTES
            for row in db.execute(statements.LINES_OF_JOB, (job.job_id, after)):
                page.append(row)
                left -= len(row[1])
                if left <= 0:
                    break
            return page

        return self._db.read(find)

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
        """Delete a job. Its calls without a reply are for another one, if their items wait."""

        def apply(db: sqlite3.Connection) -> bool:
            queries.check_owner_of_batch(db, batch)
            values = (job.job_id, CHUNK_SIZE)
            left = db.execute(statements.TAKE_CALLS_FROM_JOB, values).rowcount == CHUNK_SIZE
            if not left and not (left := db.execute(statements.DROP_CALLS_OF_JOB, values).rowcount == CHUNK_SIZE):
                db.execute(statements.DELETE_JOB, (job.job_id,))
            return left

        while await self._db.change(apply):
            pass

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
    same = ("usage", "model", "error", "error_type", "raised")
    call = replace(answer_of(wait, output, at), **{name: getattr(reply, name) for name in same})
    if reply.usage is not None:
        of_agent = spent_with(run.spent_by, agent_name, reply.model or "", reply.usage)
        queries.write_spent(db, replace(run, spent=added(run.usage, reply.usage), spent_by=of_agent))
    db.execute(statements.INSERT_CALL, call_values(run, len(run.steps), call))
    db.execute(statements.DELETE_MODEL_CALL, (run.run_id, wait.call_id))

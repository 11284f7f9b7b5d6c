"""Items of batches in a worker: one after the other, as many as it gets done in a short time.

For each await of an item: if its worker dies, another goes on behind the last step that a heartbeat told of, which is a
tenth of a second old at most; if it is cancelled, it has stopped before that is said.
"""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace
from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from flock.engine.outcomes import CANCELLED, Outcome
from flock.engine.turns import Turns
from flock.errors import StoreError
from flock.runs import Run, RunStatus, Step, now
from flock.temporal.chunks import Chunk, read_chunk, reopens
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    FIND_ACTIVITY,
    FORGET_ACTIVITY,
    ITEMS_ACTIVITY,
    ForgetOrder,
    ItemEnd,
    ItemsDone,
    ItemsOrder,
    Part,
    batch_workflow_id,
    chunk_workflow_id,
    recoded,
    rows_workflow_id,
)
from flock.temporal.payloads import PAYLOAD_LOST
from flock.temporal.records import CANCELLED_BEFORE
from flock.temporal.turns import ActivityTurn, until_done

__all__ = ["ItemActivities"]

logger = logging.getLogger("flock.temporal")

#: No item is begun so many seconds, or bytes to be kept, after the first: others have their turn, and what is done is
#: in the history of its chunk.
SLICE_S = 2.0
SLICE_BYTES = 256 * 1024
#: How often the cluster is told how far it is, while that changes, in seconds.
BEAT_S = 0.1
#: So many chunks' rows are kept in memory: several lanes of one chunk ask, one after the other.
CHUNKS_KEPT = 32
#: How long it may take to find out what is to be cancelled, and how often that is looked at, in seconds.
LOOK_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 1.0
DELETES_AT_ONCE = 8


class _Job:
    """One ``ItemsOrder`` that is at work here."""

    def __init__(self, order: ItemsOrder, done: ItemsDone) -> None:
        self.order = order
        self.ended = list(done.ended)
        self.at_work = done.unfinished
        self.bytes = sum(map(_bytes_of, self.ended))
        self.turn: ActivityTurn | None = None
        self.has_taken_turns = False
        #: items that are to be cancelled: all of them, or some
        self.is_cancelled = False
        self.cancelled: set[int] = set()
        #: no further item is to be begun
        self.is_to_return = False
        self.news = asyncio.Event()

    def parts_to_do(self) -> list[Part]:
        return self.order.left_after(self.done())

    def is_to_cancel(self, position: int) -> bool:
        return self.is_cancelled or position in self.cancelled

    def end(self, ended: ItemEnd) -> None:
        self.ended.append(ended)
        if self.at_work is not None and self.at_work.position == ended.position:
            self.at_work = None
        self.bytes += _bytes_of(ended)
        self.news.set()

    def done(self) -> ItemsDone:
        at_work = self.at_work
        if at_work is not None and self.turn is not None:
            at_work = replace(at_work, progress=self.turn.progress)
        return ItemsDone(ended=tuple(self.ended), unfinished=at_work)


class ItemActivities:
    """What a worker does for batches."""

    def __init__(self, cluster: Cluster, turns: Turns, drain_timeout_s: float) -> None:
        self._cluster = cluster
        self._turns = turns
        self._drain_timeout_s = drain_timeout_s
        self._jobs: set[_Job] = set()
        self._looking: dict[tuple[str, int, int], asyncio.Task[None]] = {}
        self._chunks: OrderedDict[tuple[str, int, int], asyncio.Task[Chunk]] = OrderedDict()

    @activity.defn(name=ITEMS_ACTIVITY)
    async def run(self, order: ItemsOrder) -> ItemsDone:
        """Take items to their ends. What is not among those that it returns is to be ordered anew.

        Cancellation: who is to stop is read from the chunk's memo; when it has stopped, it returns as always.
        """
        info = activity.info()
        told = [recoded(beat, ItemsDone) for beat in info.heartbeat_details]
        job = _Job(order, told[0] if told else ItemsDone())
        self._jobs.add(job)
        work = asyncio.create_task(self._work_through(job, is_again=info.attempt > 1))
        beats = asyncio.create_task(_tell_beats(job))
        asking: list[asyncio.Task[None]] = []

        def stop() -> None:
            job.is_to_return = True
            if job.turn is not None:
                job.turn.stop(self._turns)

        def cancel() -> None:
            job.is_to_return = True
            if not asking:
                asking.append(asyncio.create_task(self._stop_cancelled(order)))

        try:
            await until_done(work, drain_timeout_s=self._drain_timeout_s, stop=stop, cancel=cancel)
        finally:
            for task in (beats, *asking):
                task.cancel()
            self._jobs.discard(job)
        if work.exception() is not None and job.ended:  # what a worker that died has told must not go with this try
            return job.done().tried_again()
        work.result()
        done = job.done()
        return done if done.unfinished is None or done.unfinished.steps else replace(done, unfinished=None)

    async def _work_through(self, job: _Job, *, is_again: bool) -> None:
        items = (await self._chunk(job.order)).items
        return_at = time.monotonic() + SLICE_S
        for part in job.parts_to_do():
            if job.is_to_cancel(part.position):
                continue
            run = items[part.position]
            if part.started_at is not None:
                run = replace(run, status=RunStatus.RUNNING, started_at=part.started_at)
            run = replace(run, steps=part.steps or run.steps)
            ended = await self._carry_out(job, run, is_again=is_again or part.is_again)
            if ended is None:
                return
            job.end(ended)
            is_again = False
            if job.is_to_return or activity.is_worker_shutdown():
                return
            if time.monotonic() > return_at or job.bytes > SLICE_BYTES:
                return

    async def _carry_out(self, job: _Job, run: Run, *, is_again: bool) -> ItemEnd | None:
        """Take one item to its end; None where it is left for later."""
        position = run.position or 0
        while run.next_agent_name is not None:
            if self._turns.is_at_most_once(run) and job.has_taken_turns:
                return None  # it begins an order of its own: whoever gets that a second time knows that it was begun
            turn = job.turn = ActivityTurn(run, job.order.timeout_s, is_again=is_again)
            job.has_taken_turns, is_again = True, False
            job.at_work = _part(run)
            taking = asyncio.create_task(turn.take(self._turns))
            while not taking.done():
                await asyncio.wait([taking])
            job.turn = None
            if turn.outcome is None:
                return None
            run = replace(run, started_at=run.started_at or turn.started_at, progress=turn.progress)
            end = turn.outcome if isinstance(turn.outcome, Outcome) else None
            if isinstance(turn.outcome, Step):
                run = replace(run, status=RunStatus.RUNNING, steps=(*run.steps, turn.outcome))
                job.at_work = _part(run)
                job.news.set()
                if run.next_agent_name is not None and job.is_to_cancel(position):
                    end = CANCELLED
            if end is not None:
                return self._tell_end(run, _ended(_part(run), end, run.started_at))
        ended = ItemEnd(
            position=position,
            started_at=run.started_at or now(),
            completed_at=now(),
            progress=run.progress,
            steps=run.steps,
        )
        return self._tell_end(run, ended)

    def _tell_end(self, run: Run, ended: ItemEnd) -> ItemEnd:
        result = ended.steps[-1].result if ended.status is RunStatus.COMPLETED else None
        end = {"status": ended.status, "error": ended.error, "error_type": ended.error_type, "result": result}
        self._turns.notify("run_ended", replace(run, completed_at=ended.completed_at, **end))
        return ended

    async def _stop_cancelled(self, order: ItemsOrder) -> None:
        """Stop whoever is to stop in the chunk of *order*, until told otherwise: the cluster says it once to each job.

        While nobody knows who is meant, what is at work goes on.
        """
        key = (order.batch_id, order.chunk, order.attempt)
        while True:
            looking = self._looking.get(key)
            if looking is None:
                looking = self._looking[key] = asyncio.create_task(self._look(order))
                looking.add_done_callback(lambda _: self._looking.pop(key))
            await asyncio.shield(looking)
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def _look(self, order: ItemsOrder) -> None:
        """Find out who is to stop, and stop all of them here: some jobs are told only with their next heartbeat.

        The batch knows before its chunks that all of it is to stop.
        """
        batch_id, chunk, attempt = order.batch_id, order.chunk, order.attempt
        told = await self._memo_of(chunk_workflow_id(batch_id, chunk, attempt))
        batch: Mapping[str, Any] = {}
        if told.get("is_cancelled"):
            batch = (await self._memo_of(batch_workflow_id(batch_id, attempt))).get("batch", {})
        for job in self._jobs:
            if (job.order.batch_id, job.order.attempt) != (batch_id, attempt):
                continue
            job.is_cancelled |= bool(batch.get("cancel_requested"))
            if job.order.chunk == chunk:
                job.is_cancelled |= bool(told.get("is_cancelled"))
                job.cancelled.update(told.get("cancelled", ()))  # an empty list is none to the cluster
            self._cancel_parts(job)

    async def _memo_of(self, workflow_id: str) -> Mapping[str, Any]:
        handle = self._cluster.client.get_workflow_handle(workflow_id)
        try:
            async with self._cluster.asking(LOOK_TIMEOUT_S):
                return await (await handle.describe()).memo()
        except (StoreError, RPCError) as exc:
            logger.warning("what is to be cancelled of %s cannot be found out: %s", workflow_id, exc)
            return {}

    def _cancel_parts(self, job: _Job) -> None:
        for part in job.parts_to_do():
            is_at_work = job.at_work is not None and part.position == job.at_work.position
            if is_at_work and job.turn is not None and job.is_to_cancel(part.position):
                job.turn.cancel()
            elif not is_at_work and job.is_to_cancel(part.position):
                job.end(_ended(part, CANCELLED_BEFORE, part.started_at))

    async def _chunk(self, order: ItemsOrder) -> Chunk:
        """The items of a chunk as they were when this attempt began. Raises RPCError."""
        key = (order.batch_id, order.chunk, order.attempt)
        if key in self._chunks:
            self._chunks.move_to_end(key)
        else:
            self._chunks[key] = asyncio.create_task(self._read(order))
        try:
            found = await asyncio.shield(self._chunks[key])
        except BaseException:
            self._chunks.pop(key, None)
            raise
        while len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)
        return found

    async def _read(self, order: ItemsOrder) -> Chunk:
        *before, about = order.attempts
        found = await self._read_before(order)
        if before:
            found.reopen(about)
        return found

    async def _read_before(self, order: ItemsOrder) -> Chunk:
        try:
            *before, _ = order.attempts
            return await read_chunk(self._cluster, order.batch_id, order.chunk, before, order.attempts[0].rows_of)
        except RPCError as exc:
            if exc.status is not RPCStatusCode.NOT_FOUND:
                raise
            forgotten = (
                "The cluster has forgotten the rows of this chunk, or what was done before: its retention is over."
            )
            raise ApplicationError(forgotten, type=PAYLOAD_LOST, non_retryable=True) from exc

    @activity.defn(name=FIND_ACTIVITY)
    async def find(self, order: ItemsOrder) -> list[int]:
        """The positions of those items of a chunk that its attempt is about."""
        *before, about = order.attempts
        found = await self._read_before(order)
        if not before:
            return [position for position, item in found.items.items() if not item.status.is_final]
        return [position for position, item in found.items.items() if reopens(about, item)]

    @activity.defn(name=FORGET_ACTIVITY)
    async def forget(self, order: ForgetOrder) -> None:
        """Delete all that is kept of a batch. It may be begun again."""
        client, of_batch = self._cluster.client, order.batch_id
        # The search may not know yet what was sent a moment ago.
        ids = [(rows_workflow_id(order.rows_of or of_batch, chunk), "") for chunk in range(order.chunks)]
        for prefix in (f"batch:{of_batch}", f"chunk:{of_batch}:"):
            found = client.list_workflows(f"WorkflowId STARTS_WITH '{prefix}'", page_size=1000)
            ids += [(each.id, each.run_id) async for each in found]
        left = iter(ids)

        async def delete() -> None:
            for workflow_id, run_id in left:
                await self._cluster.delete(workflow_id, run_id)

        await asyncio.gather(*(delete() for _ in range(DELETES_AT_ONCE)))


def _part(run: Run) -> Part:
    return Part(position=run.position or 0, started_at=run.started_at, steps=run.steps, progress=run.progress)


def _ended(part: Part, end: Outcome, started_at: datetime | None) -> ItemEnd:
    return ItemEnd(
        position=part.position,
        status=end.status,
        error=end.error,
        error_type=end.error_type,
        started_at=started_at,
        completed_at=now(),
        progress=part.progress,
        steps=part.steps,
    )


def _bytes_of(ended: ItemEnd) -> int:
    return len(msgspec.json.encode(ended))


async def _tell_beats(job: _Job) -> None:
    silent_s = job.order.heartbeat_timeout_s / 3
    while True:
        await asyncio.sleep(BEAT_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(silent_s - BEAT_S):
                await job.news.wait()
        job.news.clear()
        activity.heartbeat(job.done())

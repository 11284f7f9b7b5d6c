"""Batch items in a worker: one activity runs items in sequence, for a short time.

At each await of an item: if its worker dies, another one resumes after the last step in a heartbeat, which is at most a
tenth of a second old. If the item is cancelled, it is reported as cancelled only after it has stopped.
"""

import asyncio
import contextlib
import functools
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import replace
from temporalio import activity
from temporalio.service import RPCError, RPCStatusCode

from flock.agents.versions import label_of, version_of
from flock.errors import EngineFull, StoreError
from flock.runs import Run, RunStatus, Usage, added, now
from flock.steps.executor import WaitingForAnswers
from flock.steps.outcomes import CANCELLED, CANCELLED_BEFORE_START, CRASHED, Outcome, log_crash
from flock.temporal.cluster import Cluster, logger
from flock.temporal.messages import (
    DELETE_ACTIVITY,
    FIND_ACTIVITY,
    ITEMS_ACTIVITY,
    DeleteOrder,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    Part,
    RowsOrder,
    batch_workflow_id,
    recoded,
    rows_workflow_id,
)
from flock.temporal.payloads import payload_lost
from flock.temporal.records import Chunk, read_chunk
from flock.temporal.steps import ActivityStep, Workplace, until_done
from flock.temporal.suspects import Suspicion

#: An activity starts no more items after this many seconds or bytes of results. Then its results are in the history of
#: the chunk, and other work gets a slot.
SLICE_S = 2.0
SLICE_BYTES = 256 * 1024
#: The interval between heartbeats while there is progress, in seconds. If a worker dies, later work is repeated.
HEARTBEAT_INTERVAL_S = 0.1
#: How many chunks are cached, since several lanes of one chunk read its rows one after the other.
CHUNK_CACHE_SIZE = 32
#: The timeout and the interval of requests for the items to cancel, in seconds.
CANCEL_POLL_TIMEOUT_S = 10.0
CANCEL_POLL_INTERVAL_S = 1.0
DELETES_AT_ONCE = 8


class _Job:
    """An ``ItemsOrder`` that is running in this worker."""

    def __init__(self, order: ItemsOrder, done: ItemsDone, cluster: Cluster) -> None:
        self.order = order
        #: of the current item
        self.suspicion = Suspicion(done, cluster, self.done)
        self.ended = list(done.ended)
        self.current = done.unfinished
        self.waiting = list(done.waiting)
        self.bytes = sum(map(_bytes_of, self.ended)) + sum(map(_bytes_of, self.waiting))
        self.active: ActivityStep | None = None
        #: a step that this worker leaves to others
        self.left: ActivityStep | None = None
        #: what the current item had spent before this attempt of the batch
        self.spent_before = Usage()
        self.has_begun = False
        #: items to cancel: all of them, or these positions
        self.is_cancelled = False
        self.cancelled: set[int] = set()
        #: set if no more items may start
        self.should_return = False
        self.changed = asyncio.Event()

    def remaining_parts(self) -> list[Part]:
        return self.order.left_after(self.done())

    def part(self, run: Run, waited_s: float = 0.0) -> Part:
        """Return the current item as it is now."""
        return Part(
            position=run.position or 0,
            started_at=run.started_at,
            steps=run.steps,
            progress=run.progress,
            usage=self.usage(run.spent),
            waited_s=waited_s,
            dropped=run.dropped,
            waited_for=run.waiting_for,
        )

    def must_cancel(self, position: int) -> bool:
        return self.is_cancelled or position in self.cancelled

    def end(self, ended: Part) -> None:
        """Note that an item has ended, or waits for answers."""
        if isinstance(ended, ItemOutcome):
            self.ended.append(ended)
        else:
            self.waiting.append(ended)
        if self.current is not None and self.current.position == ended.position:
            self.current = None
        self.bytes += _bytes_of(ended)
        self.changed.set()

    def done(self) -> ItemsDone:
        current = self.current
        if current is not None and self.active is not None:
            current = replace(
                current,
                progress=self.active.progress,
                has_calls=self.active.has_calls,
                usage=self.usage(self.active.spent),
                waited_s=self.active.waited_s,
            )
        return ItemsDone(
            ended=tuple(self.ended),
            unfinished=current,
            waiting=tuple(self.waiting),
            misses=self.suspicion.misses,
            deaths=self.suspicion.report(),
        )

    def usage(self, spent: Usage | None) -> Usage | None:
        """Return what the current item has spent in this attempt, if it has *spent* that much in all of them."""
        return None if spent is None or spent == self.spent_before else spent - self.spent_before


class ItemActivities:
    """The activities of a worker for batches."""

    def __init__(self, at: Workplace) -> None:
        self._at, self._cluster, self._executor = at, at.cluster, at.executor
        self._jobs: set[_Job] = set()
        self._lookups: dict[str, asyncio.Task[None]] = {}
        self._version_of = functools.cache(version_of)
        self._label_of = functools.cache(self._label)
        #: batches for which a warning about a version was logged
        self._mixed: deque[str | None] = deque(maxlen=1000)
        self._chunks: OrderedDict[str, asyncio.Task[Chunk]] = OrderedDict()

    def _label(self, name: str) -> str:
        models = self._executor.models
        return label_of(name, self._executor.agents, models.default_model, self._executor.shared.model_hooks)

    @activity.defn(name=ITEMS_ACTIVITY)
    async def run(self, order: ItemsOrder) -> ItemsDone:
        """Run items. Those that it does not return must be scheduled again.

        Raises: ApplicationError if this worker lacks the agent of the first one that is left. The cluster retries it.
        Cancellation: the chunk's memo has the items to cancel. When they have stopped, it returns as usual.
        """
        reported = [recoded(heartbeat, ItemsDone) for heartbeat in activity.info().heartbeat_details]
        job = _Job(order, reported[0] if reported else ItemsDone(), self._cluster)
        is_again = job.suspicion.is_again
        self._jobs.add(job)
        work = asyncio.create_task(self._run_items(job, is_again=is_again))
        heartbeats = asyncio.create_task(_send_heartbeats(job))
        polls: list[asyncio.Task[None]] = []

        def stop() -> None:
            job.should_return = True
            if job.active is not None:
                job.active.stop()

        def cancel() -> None:
            job.should_return = True
            if not polls:
                polls.append(asyncio.create_task(self._stop_cancelled(order)))

        try:
            await until_done(work, drain_timeout_s=self._at.drain_timeout_s, stop=stop, cancel=cancel)
        finally:
            for task in (heartbeats, *polls):
                task.cancel()
            self._jobs.discard(job)
        if work.exception() is not None and (job.ended or job.waiting):  # keep the progress that a dead worker reported
            return job.done().for_retry()
        left = None if polls or (not job.suspicion.is_suspect and (job.ended or job.waiting)) else job.left
        if left is not None or work.exception() is not None:
            job.suspicion.is_stopped = True
            activity.heartbeat(replace(job.done(), misses=job.suspicion.misses + (left is not None)))
        work.result()
        if left is not None:
            raise left.left_to_others()
        done = job.done()
        if job.left is not None and is_again:
            return done.for_retry()
        unfinished = done.unfinished
        has_progress = unfinished is not None and (
            unfinished.steps or unfinished.has_calls or unfinished.usage or unfinished.needs
        )
        return done if has_progress else replace(done, unfinished=None)

    async def _run_items(self, job: _Job, *, is_again: bool) -> None:
        chunk = await self._chunk(job.order)
        items = chunk.items
        return_at = time.monotonic() + SLICE_S
        is_retry = job.suspicion.attempt > 1  # heartbeats lag, so any of its steps may have finished calls
        for part in job.remaining_parts():
            if job.must_cancel(part.position):
                job.suspicion.clear()
                continue
            run = items[part.position]
            if part.started_at is not None:
                run = replace(run, status=RunStatus.RUNNING, started_at=part.started_at)
            job.spent_before = run.usage or Usage()
            run = replace(
                run, steps=part.steps or run.steps, spent=added(run.usage, part.usage), waiting_for=part.waited_for
            )
            part = replace(part, is_again=is_again or part.is_again, has_calls=is_retry or part.has_calls)
            if self._at.gate.is_proven(job.suspicion):
                log_crash(run, job.suspicion.deaths)
                ended: Part | None = self._ended(job, run, CRASHED)
            else:
                ended = await self._run_item(job, run, part, chunk.agents)
            if ended is None:
                return
            job.end(ended)
            job.suspicion.clear()
            is_again = False
            if isinstance(ended, ItemOutcome) and ended.lasting is not False:
                return  # so that the batch decides at once whether others start
            if job.should_return or activity.is_worker_shutdown():
                return
            if time.monotonic() > return_at or job.bytes > SLICE_BYTES:
                return

    async def _run_item(self, job: _Job, run: Run, part: Part, agents: Mapping[str, str]) -> Part | None:
        """Run one item until it ends or waits for answers. Returns None if it is left for a later order."""
        position, is_again, needs = part.position, part.is_again, part.needs
        elsewhere = {run.agent_name, *agents}
        if part.steps:  # the worker that has chosen the next agent has it, or the item would have ended
            elsewhere.add(run.next_agent_name or "")
        while run.next_agent_name is not None:
            if self._executor.is_at_most_once(run) and job.has_begun:
                return None  # it needs an order of its own, so that a retry knows that it was started
            active = job.active = ActivityStep(run, job.order.timeout_s, self._at, job.suspicion, is_again=is_again)
            active.has_calls, active.waited_s = part.has_calls, part.waited_s
            active.of_chunk = job.order
            active.elsewhere, active.needs = elsewhere, needs
            job.has_begun, is_again, needs = True, False, None
            before, job.current = job.current, job.part(run, part.waited_s)
            self._check_version(run, agents)
            taking = asyncio.create_task(active.execute())
            while not taking.done():
                await asyncio.wait([taking])
            job.active = None
            part = replace(part, waited_s=active.waited_s)
            if active.outcome is None:
                job.current = replace(
                    job.current,
                    has_calls=active.has_calls,
                    usage=job.usage(active.spent),
                    needs=active.needs,
                    waited_s=part.waited_s,
                )
                if active.lacks is not None:
                    started = replace(job.current, started_at=run.started_at or active.started_at)
                    job.left, job.current = active, before if active.started_at is None else started
                return None
            run = replace(
                run,
                started_at=run.started_at or active.started_at,
                progress=active.progress,
                spent=active.spent,
                dropped=active.dropped,
            )
            if isinstance(active.outcome, WaitingForAnswers):
                questions = tuple(active.outcome.questions)
                run = replace(run, waiting_for=())
                return replace(job.part(run, part.waited_s), questions=questions, worked_s=active.worked_s)
            if isinstance(active.outcome, Outcome):
                return self._ended(job, run, active.outcome, active.lasting)
            run = replace(run, status=RunStatus.RUNNING, steps=(*run.steps, active.outcome), waiting_for=())
            job.current = job.part(run, part.waited_s)
            job.suspicion.clear()
            job.changed.set()
            if run.next_agent_name is not None and job.must_cancel(position):
                return self._ended(job, run, CANCELLED)
        run = replace(run, started_at=run.started_at or now())  # a retry with no step left to run
        return self._ended(job, run, None)

    def _check_version(self, run: Run, versions: Mapping[str, str]) -> None:
        """Warn, once for a batch, if the next agent of an item has another version than at the submission."""
        agent = self._executor.find(run.next_agent_name)
        if agent is None or agent.name not in versions or run.batch_id in self._mixed:
            return
        accepted, own = versions[agent.name], self._version_of(agent)
        if accepted != own:
            self._mixed.append(run.batch_id)
            logger.warning(
                "The batch %s was accepted with the version %s of the agent %r, and this worker has the version %s.",
                *(run.batch_id, accepted, agent.name, own),
            )

    def _ended(self, job: _Job, run: Run, outcome: Outcome | None, lasting: bool | None = False) -> ItemOutcome:
        if outcome is not None and lasting:
            outcome = replace(outcome, status=RunStatus.CANCELLED)
        end = job.part(run).ended(outcome, now())
        end = replace(end, lasting=lasting, version=self._label_of(run.agent_name))
        self._executor.notify("run_ended", end.of(run))
        return end

    async def _stop_cancelled(self, order: ItemsOrder) -> None:
        """Poll for cancelled items in the chunk of *order* and stop them, until this task is cancelled.

        It must poll, because the cluster cancels an activity only once. While the memo cannot be read, items continue.
        """
        key = order.workflow_id
        while True:
            lookup = self._lookups.get(key)
            if lookup is None:
                lookup = self._lookups[key] = asyncio.create_task(self._read_cancellations(order))
                lookup.add_done_callback(lambda _: self._lookups.pop(key))
            await asyncio.shield(lookup)
            await asyncio.sleep(CANCEL_POLL_INTERVAL_S)

    async def _read_cancellations(self, order: ItemsOrder) -> None:
        """Read which items to cancel, and stop them in all jobs: some jobs are notified only at their next heartbeat.

        The memo of the batch is read too, because it has a cancellation of the whole batch before its chunks do.
        """
        batch_id, chunk, attempt = order.batch_id, order.chunk, order.attempt
        memo = await self._memo_of(order.workflow_id)
        batch: Mapping[str, Any] = {}
        if memo.get("is_cancelled"):
            batch = (await self._memo_of(batch_workflow_id(batch_id, attempt))).get("batch", {})
        for job in self._jobs:
            if (job.order.batch_id, job.order.attempt) != (batch_id, attempt):
                continue
            job.is_cancelled |= bool(batch.get("cancel_requested"))
            if job.order.chunk == chunk:
                job.is_cancelled |= bool(memo.get("is_cancelled"))
                job.cancelled.update(memo.get("cancelled", ()))  # the cluster drops empty lists from a memo
            self._cancel_parts(job)

    async def _memo_of(self, workflow_id: str) -> Mapping[str, Any]:
        try:
            described = await self._cluster.describe(workflow_id, CANCEL_POLL_TIMEOUT_S)
        except (StoreError, EngineFull) as exc:
            logger.warning("cannot read which items of %s to cancel: %s", workflow_id, exc)
            return {}
        return {} if described is None else await described.memo()

    def _cancel_parts(self, job: _Job) -> None:
        for part in job.remaining_parts():
            is_current = job.current is not None and part.position == job.current.position
            if is_current and job.active is not None and job.must_cancel(part.position):
                job.active.cancel()
            elif not is_current and job.must_cancel(part.position):
                job.end(part.ended(CANCELLED_BEFORE_START, now()))

    async def _chunk(self, order: ItemsOrder) -> Chunk:
        """Return the items of a chunk as they were at the start of this attempt. Raises RPCError, ApplicationError."""
        key = order.workflow_id
        if key in self._chunks:
            self._chunks.move_to_end(key)
        else:
            self._chunks[key] = asyncio.create_task(self._read(order))
        try:
            chunk = await asyncio.shield(self._chunks[key])
        except BaseException:
            self._chunks.pop(key, None)
            raise
        while len(self._chunks) > CHUNK_CACHE_SIZE:
            self._chunks.popitem(last=False)
        return chunk

    async def _read(self, order: ItemsOrder) -> Chunk:
        try:
            return await read_chunk(self._cluster, order.batch_id, order.chunk, order.attempts)
        except RPCError as exc:
            if exc.status is not RPCStatusCode.NOT_FOUND:
                raise
            raise payload_lost(
                "The cluster has deleted the rows of this chunk or an earlier attempt, because their retention is over."
            ) from exc

    @activity.defn(name=FIND_ACTIVITY)
    async def find(self, order: ItemsOrder) -> list[int]:
        """Return the positions of the items of a chunk that its attempt covers: earlier ones have ended all others."""
        items = (await self._read(order)).items
        return [position for position, item in items.items() if not item.status.is_final]

    @activity.defn(name=DELETE_ACTIVITY)
    async def delete_batch(self, order: DeleteOrder) -> None:
        """Delete all workflows of a batch. It is idempotent, so it can be retried."""
        client, of_batch = self._cluster.client, order.batch_id
        # Not by search, which may not have rows that were sent a moment ago.
        ids = [(rows_workflow_id(order.rows_of or of_batch, chunk), "") for chunk in range(order.chunks)]
        for prefix in (f"batch:{of_batch}", f"chunk:{of_batch}:"):
            workflows = client.list_workflows(f"WorkflowId STARTS_WITH '{prefix}'", page_size=1000)
            ids += [(workflow.id, workflow.run_id) async for workflow in workflows]
        remaining = iter(ids)

        async def delete() -> None:
            for workflow_id, run_id in remaining:
                if self._cluster.files is not None and workflow_id.startswith("rows:"):
                    async with self._cluster.rpc_scope(None, missing_ok=True):  # it was deleted before
                        with contextlib.suppress(StoreError):  # its long payload is lost; see ``delete_unused``
                            rows = await self._cluster.input_of(workflow_id, RowsOrder)
                            await self._cluster.files.release(ids[0][0], rows.item.files, order.at)
                await self._cluster.delete(workflow_id, run_id)

        await asyncio.gather(*(delete() for _ in range(DELETES_AT_ONCE)))


def _bytes_of(ended: Part) -> int:
    return len(msgspec.json.encode(ended))


async def _send_heartbeats(job: _Job) -> None:
    silent_s = job.order.heartbeat_timeout_s / 3
    while True:
        await asyncio.sleep(HEARTBEAT_INTERVAL_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(silent_s - HEARTBEAT_INTERVAL_S):
                await job.changed.wait()
        job.changed.clear()
        activity.heartbeat(job.done())

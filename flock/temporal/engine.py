"""The engine on a Temporal cluster: it keeps nothing itself, so that any number of them answer alike.

A run's record is read from the history of its workflow, and its attempts are workflows ``run:{id}``, ``run:{id}:2`` and
so on. What is done with batches is in ``flock.temporal.batches``.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self, TypeVar

import msgspec
from google.protobuf.duration_pb2 import Duration
from msgspec.structs import replace
from temporalio.api.enums.v1 import EventType, TaskQueueType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import Client, WorkflowHandle, WorkflowHistoryEventFilterType
from temporalio.common import Priority
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from flock.agents.agent import Agent
from flock.engine.base import EngineBase
from flock.engine.intake import Intake
from flock.engine.refusals import RETRYABLE, not_cancelled, not_deleted, run_not_retried, wait_stopped
from flock.errors import Conflict, EngineFull, Replayed, RunNotFound, StoreError
from flock.limits import Limits, enforced_by
from flock.options import replaced
from flock.runs import (
    INVALID_INPUT,
    Batch,
    BatchFilter,
    IdempotencyKey,
    Observer,
    Page,
    Queue,
    Run,
    RunFilter,
    RunStatus,
    now,
)
from flock.temporal.batches import TemporalBatches
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    HEARTBEAT_TIMEOUT_S,
    MAX_ITEMS,
    RUN_WORKFLOW,
    RunOrder,
    new_batch_id,
    run_workflow_id,
    task_queue_of,
)
from flock.temporal.records import at_work, run_of, waiting_again
from flock.temporal.reservations import Reservations
from flock.temporal.search import ID, newest_first, open_runs, own

__all__ = ["TemporalEngine"]

logger = logging.getLogger("flock.temporal")

#: How often the cluster is asked whether it is there, and how much is open, and how long it may take, in seconds.
WATCH_INTERVAL_S = 0.5
WATCH_TIMEOUT_S = 0.7
#: How often a waiting client looks for the end of an item, in seconds.
POLL_INTERVAL_S = 0.25
#: Of one run, and of an item always, in what the cluster takes at once.
MAX_INPUT_BYTES = 1_000_000
#: How many runs of a list are read at the same time.
READS_AT_ONCE = 20

Ends = TypeVar("Ends", Run, Batch)


class TemporalEngine(EngineBase):
    """``Engine`` on a Temporal cluster. It needs a ``TemporalWorker`` of the same flock, there or elsewhere.

    Every run is kept as an asynchronous one is: it outlives this process, also where its caller waits for the answer.

    Args:
        agents: by name; read at each submission. Workers have them too.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are kept; an engine sees only those of its own.
        heartbeat_timeout_s: how long a worker may be silent before its steps are begun elsewhere. An async agent that
            blocks the event loop for longer than that is begun a second time.
        payload_dir: a folder for what is too long for the cluster; the workers have the same one. See README.md.
        limits, bounds: its bounds, as one value, or as keyword arguments that come before it; see ``Limits``.

    Raises: DefinitionError if a bound is not valid.

    How long runs are kept after their end is the namespace's own setting.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        address: str | None = None,
        *,
        namespace: str | None = None,
        flock: str = "flock",
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        payload_dir: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        **bounds: Any,
    ) -> None:
        self.cluster = Cluster(address, namespace=namespace, payload_dir=payload_dir)
        limits = replaced(limits or Limits(), bounds, enforced_by("server"))
        limits = replace(limits, max_items=min(limits.max_items, MAX_ITEMS))
        if payload_dir is None:
            limits = replace(limits, max_input_bytes=min(limits.max_input_bytes, MAX_INPUT_BYTES))
        super().__init__(agents, flock, limits)
        self._task_queue = task_queue_of(flock)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._reservations = Reservations(self.cluster, flock, self._task_queue)
        self._batches = TemporalBatches(
            self.cluster,
            self._reservations,
            flock,
            self._task_queue,
            limits=limits,
            heartbeat_timeout_s=heartbeat_timeout_s,
        )
        self._watch_task: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._error: StoreError | None = None
        self._open_runs = 0
        self._started_runs = 0
        #: by principal, as far as it was asked since they were counted last
        self._open_runs_of: dict[str, int] = {}
        #: accepted, and on their way to the cluster
        self._starting = 0
        self._waiting = 0

    @property
    def is_draining(self) -> bool:
        return self._is_leaving

    @property
    def _is_entered(self) -> bool:
        return self._watch_task is not None

    @property
    def _is_store_ok(self) -> bool:
        return self._error is None

    @property
    def _client(self) -> Client:
        return self.cluster.client

    # Lifecycle

    async def __aenter__(self) -> Self:
        self._check_not_entered()
        await self.cluster.connect()
        self._is_leaving, self._error = False, None
        #: set while those who wait must look what is the matter
        self._trouble, self._nobody_waits = asyncio.Event(), asyncio.Event()
        self._watch_task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        task, self._watch_task = self._watch_task, None
        assert task is not None
        self._is_leaving = True
        self._trouble.set()
        task.cancel()
        await asyncio.wait([task])

    async def drain(self, timeout_s: float) -> None:
        """Take no new work, and let those who wait go after *timeout_s*. Runs go on: workers have them."""
        self._check_entered()
        self._is_leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    self._nobody_waits.clear()
                    await self._nobody_waits.wait()
        self._trouble.set()

    def check_ready(self) -> None:
        self._check_running()
        if self._error is not None:
            raise self._error

    def observe(self, observer: Observer) -> None:
        """Nothing is told: what happens to runs happens in workers, which have observers of their own."""

    async def queue(self) -> Queue:
        """Steps that no worker has taken yet, first ones or later ones, as the cluster estimates them."""
        self._check_entered()
        wanted = DescribeTaskQueueRequest(
            namespace=self.cluster.namespace,
            task_queue=TaskQueue(name=self._task_queue),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            report_stats=True,
        )
        async with self.cluster.asking():
            stats = (await self._client.workflow_service.describe_task_queue(wanted)).stats
        age: Duration = stats.approximate_backlog_age
        depth = stats.approximate_backlog_count
        return Queue(depth, now() - age.ToTimedelta() if depth else None)

    async def _watch(self) -> None:
        """Know whether the cluster is there, and how much is open; tell those who wait when it goes away."""
        misses = 0
        while True:
            try:
                async with self.cluster.asking(WATCH_TIMEOUT_S):
                    query = open_runs(self._flock)
                    before = self._started_runs
                    count = (await self._client.count_workflows(query)).count
                    self._open_runs = count + self._started_runs - before  # the cluster may not have counted the latest
                    self._open_runs_of.clear()
                self._error, misses = None, 0
                if not self._is_leaving:
                    self._trouble.clear()
            except StoreError as exc:
                misses += 1
                if misses == 1:  # it may be a busy moment, here or there, and many would be told
                    continue
                self._error = exc
                self._trouble.set()
            except Exception:
                logger.exception("the cluster cannot be watched")
            await asyncio.sleep(WATCH_INTERVAL_S)

    # Runs

    async def _accept(self, run: Run, key: IdempotencyKey | None) -> None:
        try:
            await self._check_room(run.principal)
        except EngineFull:
            if key is not None and (made_id := await self._started_under(key)) is not None:
                raise Replayed(made_id) from None  # that comes before any limit
            raise
        with self._being_started():
            if key is None:
                await self._start(self._order(run))
                return
            made_id = await self._reservations.claim(key, run.run_id)
            order = replace(self._order(replace(run, run_id=made_id)), key_id=self._reservations.key_id(key))
            # The process that claimed the key may have died before it started the run; the next one starts it.
            with contextlib.suppress(WorkflowAlreadyStartedError):
                await self._start(order)
        if made_id != run.run_id:
            raise Replayed(made_id)

    def _order(self, run: Run) -> RunOrder:
        timeout_s = min(run.timeout_s or self._limits.max_timeout_s, self._limits.max_timeout_s)
        return RunOrder(
            run=run,
            timeout_s=timeout_s,
            queue_timeout_s=self._limits.queue_timeout_s,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
        )

    async def _start(self, order: RunOrder) -> None:
        """Raises WorkflowAlreadyStartedError where this attempt was begun before."""
        await self.cluster.start(
            RUN_WORKFLOW,
            order,
            order.run,
            id=run_workflow_id(order.run.run_id, order.run.attempt),
            task_queue=self._task_queue,
            priority=Priority(priority_key=1),
        )
        self._open_runs += 1
        self._started_runs += 1

    async def _check_room(self, principal: str | None) -> None:
        """Raise EngineFull if as many runs, or as many of *principal*, are open. Nothing is awaited after the check."""
        limits, counts = self._limits.queue, self._open_runs_of
        if principal is not None and self._open_runs + self._starting >= limits.max_runs_per_principal:
            if principal not in counts:
                async with self.cluster.asking():
                    count = (await self._client.count_workflows(open_runs(self._flock, principal))).count
                counts.setdefault(principal, count)
            limits.check_share(counts[principal], "open")
            counts[principal] += 1
        limits.check(self._open_runs + self._starting, "open")

    @contextlib.contextmanager
    def _being_started(self) -> Iterator[None]:
        """Count a run that is started within the block."""
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1

    async def _started_under(self, key: IdempotencyKey) -> str | None:
        """The id of the run that was started under *key*; None if it was only claimed. Raises KeyReused."""
        made_id = await self._reservations.find(key)
        if made_id is not None:
            with contextlib.suppress(RunNotFound):
                return (await self.get_run(made_id)).run_id
        return None

    async def get_run(self, run_id: str) -> Run:
        self._check_entered()
        if ID.fullmatch(run_id) is None:
            raise RunNotFound(run_id)
        run = await self._attempt(run_id, 1) or await self._batches.item(run_id)
        if run is None:
            run = await self._attempt(run_id, await self.cluster.last_attempt(RUN_WORKFLOW, run_workflow_id(run_id, 1)))
        if run is None or run.flock != self._flock:
            raise RunNotFound(run_id)
        if run.batch_id is not None:
            return run
        while run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
            later = await self._attempt(run_id, run.attempt + 1)
            if later is None:
                break
            run = later
        if run.status.is_final and await self._reservations.is_gone(run_id):
            raise RunNotFound(run_id)
        return run

    async def _attempt(self, run_id: str, attempt: int) -> Run | None:
        """One attempt of a run as it stands, or None where there is none."""
        if attempt == 0:
            return None
        handle = self._handle(run_id, attempt)
        try:
            async with self.cluster.asking():
                run = run_of(await self._history(handle))
                if run.status.is_final:
                    return run
                described = (await handle.describe()).raw_description
                if described.workflow_execution_info.HasField("close_time"):
                    return run_of(await self._history(handle))
                return at_work(run, described.pending_activities)
        except RPCError:
            return None

    async def _history(self, handle: WorkflowHandle[Any, Any]) -> Sequence[HistoryEvent]:
        events = (await handle.fetch_history()).events
        # What turns were given is known from what came of those before.
        scheduled = EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        await self.cluster.payloads.bring_in(event for event in events if event.event_type != scheduled)
        return events

    def _handle(self, run_id: str, attempt: int) -> WorkflowHandle[Any, Any]:
        return self._client.get_workflow_handle(run_workflow_id(run_id, attempt))

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        async def look() -> tuple[Run, WorkflowHandle[Any, Any] | None]:
            run = await self.get_run(run_id)
            return run, None if run.batch_id is not None else self._handle(run_id, run.attempt)

        self._check_entered()
        return await self._wait(look, self._handle(run_id, 1) if ID.fullmatch(run_id) else None, timeout_s)

    async def _wait(
        self,
        look: Callable[[], Awaitable[tuple[Ends, WorkflowHandle[Any, Any] | None]]],
        handle: WorkflowHandle[Any, Any] | None,
        timeout_s: float | None,
    ) -> Ends:
        """What *look* gives once it is final, or as it stands after *timeout_s*.

        *look* gives the workflow with it that will end; *handle* is the one before anybody has looked.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        found = None
        self._waiting += 1
        try:
            while True:
                left_s = None if deadline is None else deadline - time.monotonic()
                if found is not None and left_s is not None and left_s <= 0:
                    return found
                if handle is not None and (left_s is None or left_s > 0):
                    await self._until_closed(handle, left_s)
                elif found is not None:  # an item has no workflow of its own
                    await asyncio.sleep(POLL_INTERVAL_S if left_s is None else min(left_s, POLL_INTERVAL_S))
                    if self._is_leaving:
                        raise wait_stopped()
                found, handle = await look()
                if found.status.is_final:
                    return found
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._nobody_waits.set()

    async def _until_closed(self, handle: WorkflowHandle[Any, Any], timeout_s: float | None) -> None:
        """Wait for the end of a workflow, at most *timeout_s*. Raises EngineStopped, StoreError."""

        async def follow() -> None:
            with contextlib.suppress(RPCError):  # there is none: whoever reads it says so
                async with self.cluster.asking(None):
                    end = WorkflowHistoryEventFilterType.CLOSE_EVENT
                    async for _ in handle.fetch_history_events(wait_new_event=True, event_filter_type=end):
                        return

        following, trouble = asyncio.create_task(follow()), asyncio.create_task(self._trouble.wait())
        try:
            await asyncio.wait([following, trouble], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                following.result()
            elif self._is_leaving and trouble.done():
                raise wait_stopped()
            elif trouble.done():
                raise self._error or StoreError("The cluster did not answer for a moment. Ask again.")
        finally:
            following.cancel()
            trouble.cancel()

    async def cancel_run(self, run_id: str) -> Run:
        run = await self.get_run(run_id)
        if not run.status.is_final and run.batch_id is not None:
            await self._batches.cancel_item(run)
        elif not run.status.is_final:
            with contextlib.suppress(RPCError):  # it has ended in the meantime
                async with self.cluster.asking():
                    await self._handle(run_id, run.attempt).cancel()
        run = await self.get_run(run_id)
        if conflict := not_cancelled(run):
            raise conflict
        return replace(run, cancel_requested=True)

    async def retry_run(self, run_id: str) -> Run:
        self._check_running()
        run = await self.get_run(run_id)
        batch = None if run.batch_id is None else await self._batches.get(run.batch_id)
        if batch is not None:
            if batch.status.is_final and run.status in RETRYABLE and run.error_type != INVALID_INPUT:
                await self._batches.retry(batch.batch_id, (run.status,), run)
                return await self.get_run(run_id)
        if batch is not None or run.status not in RETRYABLE:
            raise run_not_retried(run, batch)
        again = waiting_again(replace(run, is_async=True))
        try:
            await self._check_room(run.principal)
            with self._being_started():
                await self._start(replace(self._order(again), key_id=await self._kept_key(run)))
        except WorkflowAlreadyStartedError as exc:
            raise Conflict(f"The run {run_id} is being tried again already.") from exc
        return again

    async def _kept_key(self, run: Run) -> str | None:
        async with self.cluster.asking():
            return (await self.cluster.input_of(run_workflow_id(run.run_id, run.attempt), RunOrder)).key_id

    async def delete_run(self, run_id: str) -> None:
        run = await self.get_run(run_id)
        if run.batch_id is not None or not run.status.is_final:
            raise not_deleted(run)
        key_id = await self._kept_key(run)
        if not await self._reservations.note_gone(run_id):
            raise RunNotFound(run_id)
        await self._reservations.free(key_id, run_id)
        async with self.cluster.asking():
            for attempt in range(1, run.attempt + 1):
                await self.cluster.delete(run_workflow_id(run_id, attempt))

    # Lists

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        """As the cluster's search sees it, moments late. The records themselves are as they stand."""
        self._check_entered()
        page, at_once = Page[Run](wanted.limit), 1  # of long records, one is more than a page

        async def read(run_id: str) -> Run | None:
            with contextlib.suppress(RunNotFound):  # it was deleted in the meantime
                return _listed(await self.get_run(run_id), wanted)
            return None

        ids = newest_first(self.cluster, own(RUN_WORKFLOW, self._flock), "run", wanted)
        async for run_ids in ids:
            unread = iter(run_ids)
            while some := list(islice(unread, at_once)):
                at_once = min(READS_AT_ONCE, wanted.limit)
                for run in await asyncio.gather(*map(read, some)):
                    if run is not None and _fits(run, wanted) and not page.add(run):
                        return page
        return page

    # Batches

    _new_batch_id = staticmethod(new_batch_id)
    _max_item_bytes = MAX_INPUT_BYTES

    async def _accept_batch(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        return await self._batches.submit(intake, key)

    async def get_batch(self, batch_id: str) -> Batch:
        self._check_entered()
        return await self._batches.get(batch_id)

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        async def look() -> tuple[Batch, WorkflowHandle[Any, Any] | None]:
            batch = await self.get_batch(batch_id)
            return batch, self._batches.handle(batch_id, batch.attempt)

        self._check_entered()
        handle = None if ID.fullmatch(batch_id) is None else self._batches.handle(batch_id)
        return await self._wait(look, handle, timeout_s)

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Sequence[RunStatus] = tuple(RunStatus)
    ) -> Sequence[Run]:
        self._check_entered()
        return await self._batches.items(batch_id, after, limit, statuses)

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        self._check_entered()
        return await self._batches.page(wanted)

    async def cancel_batch(self, batch_id: str) -> Batch:
        self._check_entered()
        return await self._batches.cancel(batch_id)

    async def retry_batch(self, batch_id: str, only: Sequence[RunStatus] = ()) -> Batch:
        self._check_running()
        return await self._batches.retry(batch_id, only)

    async def delete_batch(self, batch_id: str) -> None:
        self._check_entered()
        await self._batches.delete(batch_id)


def _fits(run: Run, wanted: RunFilter) -> bool:
    """The search knows each attempt, and what it knew a moment ago."""
    return wanted.status in (None, run.status)


def _listed(run: Run, wanted: RunFilter) -> Run:
    return replace(
        run,
        inputs=run.inputs if wanted.with_inputs else msgspec.Raw(b"{}"),
        result=run.result if wanted.with_results else None,
        steps=(),
    )

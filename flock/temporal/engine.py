"""The engine on a Temporal cluster: it keeps nothing itself, so that any number of them answer alike.

A run's record is read from the history of its workflow, and its attempts are workflows ``run:{id}``, ``run:{id}:2`` and
so on. Lists come from the cluster's search, which tells of a change within moments, and cannot sort everywhere: runs
are read by ranges of their ids, which are ordered by time, and each range is sorted here.
"""

import asyncio
import contextlib
import hashlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NoReturn, Self

import msgspec
from google.protobuf.duration_pb2 import Duration
from msgspec.structs import replace
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest, DescribeTaskQueueRequest
from temporalio.client import Client, WorkflowHandle, WorkflowHistoryEventFilterType
from temporalio.common import (
    Priority,
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from flock.agents import Agent
from flock.batches import as_json
from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    Conflict,
    EngineFull,
    EngineStopped,
    KeyReused,
    Replayed,
    RunNotFound,
    StoreError,
)
from flock.runs import (
    Batch,
    BatchFilter,
    BatchOptions,
    EngineHealth,
    Event,
    IdempotencyKey,
    Inputs,
    Items,
    Observer,
    OnInvalid,
    Progress,
    Queue,
    Run,
    RunFilter,
    RunStatus,
    events_of,
    new_id,
    now,
    valid_traceparent,
)
from flock.schema import id_at
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    AGENT,
    FLOCK,
    HEARTBEAT_TIMEOUT_S,
    MARK_WORKFLOW,
    PRINCIPAL,
    RUN_WORKFLOW,
    RunOrder,
    run_workflow_id,
    task_queue_of,
)
from flock.temporal.records import at_work, order_of, run_of

__all__ = ["TemporalEngine"]

logger = logging.getLogger("flock.temporal")

#: How often the cluster is asked whether it is there, and how much is open, and how long it may take, in seconds.
WATCH_INTERVAL_S = 0.5
WATCH_TIMEOUT_S = 0.7
#: How often an event stream looks for news, in seconds, and how long it may be silent.
POLL_INTERVAL_S = 0.25
KEEP_ALIVE_S = 15.0
#: After so many seconds a worker that died with a workflow's task is not waited for.
TASK_TIMEOUT = timedelta(seconds=3)
#: How long an idempotency key is kept.
KEEP_KEYS_FOR = timedelta(hours=24)
#: How many runs a range of a list may hold, and how many are read at the same time.
RUNS_A_RANGE = 1000
READS_AT_ONCE = 20
#: How long it is marked that a run was deleted. The cluster takes half a minute to forget what has ended.
KEEP_GONE_FOR = timedelta(hours=1)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
#: Ids may have been made by a clock that is ahead.
MAX_CLOCK_LEAD = timedelta(days=7)
RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

#: How the workflows stand whose runs may have a status.
EXECUTION_STATUS = {
    RunStatus.STARTING: "'Running'",
    RunStatus.RUNNING: "'Running'",
    RunStatus.COMPLETED: "'Completed'",
    RunStatus.FAILED: "'Failed', 'Terminated', 'TimedOut'",
    RunStatus.CANCELLED: "'Canceled'",
}


class TemporalEngine:
    """``Engine`` on a Temporal cluster. It needs a ``TemporalWorker`` of the same flock, there or elsewhere.

    Every run is kept as an asynchronous one is: it outlives this process, also where its caller waits for the answer.

    Args:
        agents: by name; read at each submission. Workers have them too.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are kept; an engine sees only those of its own.
        max_queue: runs accepted that have not ended. They are counted twice a second, so that a crowd may go beyond it
            by as many as the other API processes take in that time.
        max_timeout_s: the longest that one attempt of a run may take, and what it may take where nobody says less.
        max_input_bytes: the longest inputs of one run, as JSON; the cluster takes 2 MiB, results included.
        queue_timeout_s: the longest that a run may wait for its first step; None is no limit.
        heartbeat_timeout_s: how long a worker may be silent before its steps are begun elsewhere. An async agent that
            blocks the event loop for longer than that is begun a second time.

    How long runs are kept after their end is the namespace's own setting.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        address: str | None = None,
        *,
        namespace: str | None = None,
        flock: str = "flock",
        max_queue: int = 10_000,
        max_timeout_s: float = 86_400,
        max_input_bytes: int = 1_000_000,
        queue_timeout_s: float | None = None,
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
    ) -> None:
        self.cluster = Cluster(address, namespace=namespace)
        self._agents = agents
        self._flock = flock
        self._task_queue = task_queue_of(flock)
        self._max_queue = max_queue
        self._max_timeout_s = max_timeout_s
        self._max_input_bytes = max_input_bytes
        self._queue_timeout_s = queue_timeout_s
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._watch_task: asyncio.Task[None] | None = None
        self._is_leaving = False
        self._error: StoreError | None = None
        self._open_runs = 0
        self._waiting = 0

    @property
    def is_leaving(self) -> bool:
        return self._is_leaving

    @property
    def _client(self) -> Client:
        return self.cluster.client

    # Life

    async def __aenter__(self) -> Self:
        if self._watch_task is not None:
            raise EngineStopped("This engine is running already.")
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
        self._is_leaving = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._waiting:
                    self._nobody_waits.clear()
                    await self._nobody_waits.wait()
        self._trouble.set()

    def _check_running(self) -> None:
        if self._watch_task is None:
            raise EngineStopped("The engine is not running: enter it with 'async with', or run the app's lifespan.")
        if self._is_leaving:
            raise EngineStopped("The server is about to stop and takes no new work.")

    def check_ready(self) -> None:
        self._check_running()
        if self._error is not None:
            raise self._error

    def health(self) -> EngineHealth:
        state: Literal["running", "stopping"] = "stopping" if self._is_leaving else "running"
        return EngineHealth(
            "stopped" if self._watch_task is None else state, "ok" if self._error is None else "failing"
        )

    def observe(self, observer: Observer) -> None:
        """Nothing is told: what happens to runs happens in workers, which have observers of their own."""

    async def queue(self) -> Queue:
        """Steps that no worker has taken yet, first ones or later ones, as the cluster estimates them."""
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
                    query = f"{self._own()} AND ExecutionStatus = 'Running'"
                    self._open_runs = (await self._client.count_workflows(query)).count
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

    async def submit(
        self,
        agent_name: str,
        inputs: Inputs,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        is_async: bool = True,
        timeout_s: float | None = None,
        key: IdempotencyKey | None = None,
    ) -> Run:
        self._check_running()
        raw = as_json(inputs, "/inputs", self._max_input_bytes)
        self._agent(agent_name).input.decode(raw, "/inputs")
        run = Run(
            run_id=new_id(),
            flock=self._flock,
            agent_name=agent_name,
            inputs=raw,
            created_at=now(),
            request_id=request_id,
            traceparent=valid_traceparent(traceparent),
            principal=principal,
            is_async=is_async,
            timeout_s=timeout_s,
        )
        if key is None:
            self._check_room()
            await self._start(self._order(run))
            return run
        key_id = self._key_id(key)
        made_id = await self._claim(key, key_id, run.run_id)
        if made_id == run.run_id:
            self._check_room()
        order = replace(self._order(replace(run, run_id=made_id)), key_id=key_id)
        # Whoever claimed the key may have died before it started the run; whoever comes next starts it in its place.
        with contextlib.suppress(WorkflowAlreadyStartedError):
            await self._start(order)
        if made_id != run.run_id:
            raise Replayed(made_id)
        return run

    def _order(self, run: Run) -> RunOrder:
        timeout_s = min(run.timeout_s or self._max_timeout_s, self._max_timeout_s)
        return RunOrder(
            run=run,
            timeout_s=timeout_s,
            queue_timeout_s=self._queue_timeout_s,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
        )

    async def _start(self, order: RunOrder) -> None:
        """Raises WorkflowAlreadyStartedError where this attempt was begun before."""
        run = order.run
        attributes = [SearchAttributePair(FLOCK, run.flock), SearchAttributePair(AGENT, run.agent_name)]
        if run.principal is not None:
            attributes.append(SearchAttributePair(PRINCIPAL, run.principal))
        async with self.cluster.asking():
            await self._client.start_workflow(
                RUN_WORKFLOW,
                order,
                id=run_workflow_id(run.run_id, run.attempt),
                task_queue=self._task_queue,
                task_timeout=TASK_TIMEOUT,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                search_attributes=TypedSearchAttributes(attributes),
                priority=Priority(priority_key=1),
            )
        self._open_runs += 1

    def _key_id(self, key: IdempotencyKey) -> str:
        digest = hashlib.sha256(f"{self._flock}\n{key.kept_as}".encode()).hexdigest()
        return f"key:{digest}"

    async def _claim(self, key: IdempotencyKey, key_id: str, run_id: str) -> str:
        """The id of the run that *key* stands for: *run_id*, unless somebody claimed it before. Raises KeyReused."""
        mine = {"run_id": run_id, "fingerprint": key.digest.hex()}
        async with self.cluster.asking():
            if await self._mark(key_id, KEEP_KEYS_FOR, mine):
                return run_id
            kept = await (await self._client.get_workflow_handle(key_id).describe()).memo()
        if kept["fingerprint"] != mine["fingerprint"]:
            raise KeyReused(key.key)
        made_id: str = kept["run_id"]
        return made_id

    async def _mark(self, mark_id: str, keep_for: timedelta, memo: Mapping[str, str] | None = None) -> bool:
        """Make a mark; False where there is one already."""
        try:
            await self._client.start_workflow(
                MARK_WORKFLOW,
                id=mark_id,
                task_queue=self._task_queue,
                start_delay=keep_for,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                memo=memo,
            )
        except WorkflowAlreadyStartedError:
            return False
        return True

    def _check_room(self) -> None:
        if self._open_runs >= self._max_queue:
            raise EngineFull(f"{self._open_runs} runs are open already, all that this flock takes (max_queue).")

    async def get_run(self, run_id: str) -> Run:
        if RUN_ID.fullmatch(run_id) is None:
            raise RunNotFound(run_id)
        run = await self._attempt(run_id, 1) or await self._attempt(run_id, await self._last_attempt(run_id))
        if run is None or run.flock != self._flock:
            raise RunNotFound(run_id)
        while run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
            later = await self._attempt(run_id, run.attempt + 1)
            if later is None:
                break
            run = later
        if run.status.is_final and await self._is_gone(run_id):
            raise RunNotFound(run_id)
        return run

    async def _attempt(self, run_id: str, attempt: int) -> Run | None:
        """One attempt of a run as it stands, or None where there is none."""
        if attempt == 0:
            return None
        handle = self._handle(run_id, attempt)
        try:
            async with self.cluster.asking():
                run = run_of(await _history(handle))
                if run.status.is_final:
                    return run
                described = (await handle.describe()).raw_description
                if described.workflow_execution_info.HasField("close_time"):
                    return run_of(await _history(handle))
                return at_work(run, described.pending_activities)
        except RPCError:
            return None

    async def _last_attempt(self, run_id: str) -> int:
        """0 where nothing is kept of a run. The cluster forgets its first attempts before the last one."""
        query = f"WorkflowType = '{RUN_WORKFLOW}' AND WorkflowId STARTS_WITH 'run:{run_id}:'"
        async with self.cluster.asking():
            return max(
                [int(found.id.rpartition(":")[2]) async for found in self._client.list_workflows(query)], default=0
            )

    def _handle(self, run_id: str, attempt: int) -> WorkflowHandle[Any, Any]:
        return self._client.get_workflow_handle(run_workflow_id(run_id, attempt))

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        run = None
        self._waiting += 1
        try:
            while True:
                left_s = None if deadline is None else deadline - time.monotonic()
                if run is not None and left_s is not None and left_s <= 0:
                    return run
                if RUN_ID.fullmatch(run_id) is not None and (left_s is None or left_s > 0):
                    await self._until_closed(self._handle(run_id, 1 if run is None else run.attempt), left_s)
                run = await self.get_run(run_id)
                if run.status.is_final:
                    return run
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
                raise EngineStopped("The server is about to stop. Ask another one, or this one when it is back.")
            elif trouble.done():
                raise self._error or StoreError("The cluster did not answer for a moment. Ask again.")
        finally:
            following.cancel()
            trouble.cancel()

    async def cancel_run(self, run_id: str) -> Run:
        run = await self.get_run(run_id)
        if not run.status.is_final:
            with contextlib.suppress(RPCError):  # it has ended in the meantime
                async with self.cluster.asking():
                    await self._handle(run_id, run.attempt).cancel()
            run = await self.get_run(run_id)
        if run.status.is_final and run.status is not RunStatus.CANCELLED:
            raise Conflict(f"The run {run_id} is {run.status} and cannot be cancelled any more.")
        return run

    async def retry_run(self, run_id: str) -> Run:
        self._check_running()
        run = await self.get_run(run_id)
        if run.status not in (RunStatus.FAILED, RunStatus.CANCELLED):
            raise Conflict(
                f"The run {run_id} is {run.status}; only a run that failed or was cancelled can be tried again."
            )
        self._check_room()
        again = replace(
            run,
            status=RunStatus.STARTING,
            attempt=run.attempt + 1,
            is_async=True,
            error=None,
            error_type=None,
            started_at=None,
            completed_at=None,
            progress=None,
            cancel_requested=False,
        )
        try:
            await self._start(replace(self._order(again), key_id=await self._kept_key(run)))
        except WorkflowAlreadyStartedError as exc:
            raise Conflict(f"The run {run_id} is being tried again already.") from exc
        return again

    async def _kept_key(self, run: Run) -> str | None:
        async with self.cluster.asking():
            return order_of(await _history(self._handle(run.run_id, run.attempt))).key_id

    async def delete_run(self, run_id: str) -> None:
        run = await self.get_run(run_id)
        if not run.status.is_final:
            raise Conflict(
                f"The run {run_id} is still {run.status} and cannot be deleted. Cancel it first, or wait for its end."
            )
        key_id = await self._kept_key(run)
        async with self.cluster.asking():
            if not await self._mark(f"gone:{run_id}", KEEP_GONE_FOR):
                raise RunNotFound(run_id)
            if key_id is not None:  # whoever deletes a run may make it anew under the same key
                with contextlib.suppress(RPCError):  # it is gone by itself
                    await self._client.get_workflow_handle(key_id).terminate()
            for attempt in range(1, run.attempt + 1):
                with contextlib.suppress(RPCError):  # the cluster has forgotten it before
                    await self._client.workflow_service.delete_workflow_execution(
                        DeleteWorkflowExecutionRequest(
                            namespace=self.cluster.namespace,
                            workflow_execution=WorkflowExecution(workflow_id=run_workflow_id(run_id, attempt)),
                        )
                    )

    async def _is_gone(self, run_id: str) -> bool:
        try:
            async with self.cluster.asking():
                await self._client.get_workflow_handle(f"gone:{run_id}").describe()
        except RPCError:
            return False
        return True

    # Lists

    async def list_runs(self, wanted: RunFilter) -> Sequence[Run]:
        """As the cluster's search sees it, moments late. The records themselves are as they stand."""
        runs: list[Run] = []
        reads = asyncio.Semaphore(READS_AT_ONCE)

        async def read(run_id: str) -> Run | None:
            async with reads:
                with contextlib.suppress(RunNotFound):  # it was deleted in the meantime
                    return await self.get_run(run_id)
            return None

        async for run_ids in self._ranges(wanted):
            for start in range(0, len(run_ids), wanted.limit):
                found = await asyncio.gather(*map(read, run_ids[start : start + wanted.limit]))
                runs += [run for run in found if run is not None and _fits(run, wanted)]
                if len(runs) >= wanted.limit:
                    return [_listed(run, wanted) for run in runs[: wanted.limit]]
        return [_listed(run, wanted) for run in runs]

    async def _ranges(self, wanted: RunFilter) -> AsyncIterator[list[str]]:
        """The ids of runs that may be wanted, newest first, from one range of ids after the other."""
        conditions = [self._own()]
        if wanted.status is not None:
            conditions.append(f"ExecutionStatus IN ({EXECUTION_STATUS[wanted.status]})")
        if wanted.agent_name is not None:
            conditions.append(f"{AGENT.name} = {_quoted(wanted.agent_name)}")
        if wanted.principal is not None:
            conditions.append(f"{PRINCIPAL.name} = {_quoted(wanted.principal)}")
        bottom = 0 if wanted.created_after is None else _milliseconds(wanted.created_after) + 1
        top = _milliseconds(now() + MAX_CLOCK_LEAD if wanted.created_before is None else wanted.created_before)
        high = _id_at(top)
        if wanted.after is not None and not RUN_ID.fullmatch(wanted.after):
            return  # no run is behind what is none
        if wanted.after is not None and wanted.after < high:
            high, top = wanted.after, int(wanted.after.replace("-", "")[:12], 16)
        span = top - bottom
        while top >= bottom:
            low = max(bottom, top - span)
            query = " AND ".join([*conditions, f"WorkflowId >= 'run:{_id_at(low)}'", f"WorkflowId < 'run:{high}'"])
            async with self.cluster.asking():
                if (await self._client.count_workflows(query)).count > RUNS_A_RANGE and span > 1:
                    span = max(1, span // 4)
                    continue
                found = {found.id.split(":")[1] async for found in self._client.list_workflows(query, page_size=1000)}
            yield sorted(found, reverse=True)
            if low == bottom:
                return
            high, top, span = _id_at(low), low, span * 2

    def _own(self) -> str:
        return f"WorkflowType = '{RUN_WORKFLOW}' AND {FLOCK.name} = {_quoted(self._flock)}"

    # Events

    async def events(self, run_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        told: Progress | None = None
        told_at = time.monotonic()
        while True:
            run = await self.get_run(run_id)
            for event in events_of(run):
                is_new = run.progress != told if event.id is None else event.id > after
                if not is_new:
                    continue
                if event.id is None:
                    told = run.progress
                else:
                    after = event.id
                told_at = time.monotonic()
                yield event
            if run.status.is_final or self._is_leaving:
                return
            if time.monotonic() > told_at + KEEP_ALIVE_S:
                told_at = time.monotonic()
                yield None
            await asyncio.sleep(POLL_INTERVAL_S)

    def _agent(self, name: str) -> Agent:
        try:
            return self._agents[name]
        except KeyError:
            raise AgentNotFound(name, list(self._agents)) from None

    # Batches: not yet

    async def submit_batch(
        self,
        agent_name: str,
        items: Items,
        options: BatchOptions,
        *,
        on_invalid: OnInvalid = "reject",
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        key: IdempotencyKey | None = None,
    ) -> Batch:
        self._check_running()
        self._agent(agent_name)
        raise Conflict("Batches are not carried out on a Temporal cluster yet. Send runs, or serve with a store.")

    async def get_batch(self, batch_id: str) -> Batch:
        _no_batch(batch_id)

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        _no_batch(batch_id)

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Sequence[RunStatus] = tuple(RunStatus)
    ) -> Sequence[Run]:
        _no_batch(batch_id)

    async def list_batches(self, wanted: BatchFilter) -> Sequence[Batch]:
        return []

    async def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        _no_batch(batch_id)
        yield None

    async def cancel_batch(self, batch_id: str) -> Batch:
        _no_batch(batch_id)

    async def retry_batch(self, batch_id: str, only: Sequence[RunStatus] = ()) -> Batch:
        _no_batch(batch_id)

    async def delete_batch(self, batch_id: str) -> None:
        _no_batch(batch_id)


def _no_batch(batch_id: str) -> NoReturn:
    raise BatchNotFound(batch_id)


async def _history(handle: WorkflowHandle[Any, Any]) -> Sequence[HistoryEvent]:
    return (await handle.fetch_history()).events


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


def _milliseconds(time: datetime) -> int:
    return max(0, (time - EPOCH) // timedelta(milliseconds=1))


def _id_at(milliseconds: int) -> str:
    return id_at(EPOCH + timedelta(milliseconds=milliseconds))


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

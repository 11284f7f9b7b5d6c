"""The engine on a Temporal cluster. It stores nothing itself, so any number of engines give the same answers.

A run's record is read from the history of its workflow. Its attempts are the workflows ``run:{id}``, ``run:{id}:2`` and
so on. Batches are in ``flock.temporal.batches``.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any, Self

import msgspec
from msgspec.structs import replace
from temporalio.api.enums.v1 import TaskQueueType
from temporalio.api.taskqueue.v1 import TaskQueue
from temporalio.api.workflowservice.v1 import DescribeTaskQueueRequest
from temporalio.client import WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import Priority, WorkflowIDConflictPolicy
from temporalio.exceptions import WorkflowAlreadyStartedError

from flock.agents.agent import Agent
from flock.agents.checks import check_no_batches
from flock.engine.base import ended_calls
from flock.errors import (
    BatchNotFound,
    CallNotFound,
    Conflict,
    EngineFull,
    Replayed,
    RunNotFound,
    StoreError,
    TooLarge,
    TooManyRequests,
)
from flock.limits import Limits, enforced_by
from flock.logs import audit, fields_of_run
from flock.models.models import ModelChoice
from flock.models.prices import Price
from flock.options import replaced
from flock.runs import (
    INVALID_INPUT,
    Account,
    AskedQuestion,
    Batch,
    Call,
    FileBox,
    IdempotencyKey,
    Observer,
    Page,
    Principal,
    Question,
    QuestionFilter,
    QuestionPage,
    Queue,
    RetriedCalls,
    Run,
    RunFilter,
    RunStatus,
    UsageFilter,
    UsageRow,
    new_id,
    now,
)
from flock.steps.answers import (
    answer_in_words,
    answer_of,
    asked_question,
    can_answer,
    check_message,
    is_of,
    may_count,
    may_see,
    message_from,
    question_for,
)
from flock.steps.identity import Newest, new_call_key
from flock.steps.refusals import RETRYABLE, already_retried, check_cancel, not_deleted, run_not_retried, wait_stopped
from flock.store.contents import SWEEP_INTERVAL_S
from flock.temporal.accounts import account_in_memo, signal_account, usage_of
from flock.temporal.batches import TemporalBatches
from flock.temporal.cluster import Cluster, logger
from flock.temporal.files import SharedContents
from flock.temporal.messages import (
    ASKING,
    CHUNK_WORKFLOW,
    HEARTBEAT_TIMEOUT_S,
    ID,
    MAX_ITEMS,
    RUN_WORKFLOW,
    STATUS,
    CallDone,
    RunOrder,
    Sent,
    batch_workflow_id,
    chunk_workflow_id,
    parse_item_id,
    run_workflow_id,
    session_workflow_id,
    task_queue_of,
    workflow_id_of,
)
from flock.temporal.records import Traces, early_messages, reset_for_retry, run_of, shown, with_heartbeats
from flock.temporal.search import (
    AskingRuns,
    Record,
    asking_workflows,
    inbox_in,
    may_have,
    newest_first,
    open_runs,
    page_of,
    waiting_runs,
    workflows_of,
)
from flock.temporal.webhooks import TemporalWebhooks
from flock.temporal.workflows import KEEP_SESSION_S, NO_LIMIT, FlockAccount, FlockRun, FlockSession

#: A multiple of this time, in seconds, is what the error takes that there is no such run, if somebody asks for a
#: question. It is longer than the requests to the cluster take.
SAME_S = 0.25
#: How often open questions are read for a client that waits for one, in seconds.
QUESTIONS_INTERVAL_S = 1.0

#: The interval and the timeout of requests that check the cluster and count open runs, in seconds.
WATCH_INTERVAL_S = 0.5
WATCH_TIMEOUT_S = 0.7
#: How often an item is read while a caller waits for it, in seconds.
POLL_INTERVAL_S = 0.25
#: Max size of the inputs of a run without a ``payload_dir``, and of any item.
MAX_INPUT_BYTES = 1_000_000
#: The first pause before a history is read again that does not have an answer yet, in seconds. Later ones are longer.
REREAD_DELAY_S = 0.02
#: How long the worker that sends webhooks may take to end, in seconds.
SHUTDOWN_GRACE_S = 5.0
#: How long a request to cancel a waiting run waits for its end, in seconds. It ends at once if there is a worker.
CANCEL_WAIT_S = 3.0


class TemporalEngine(TemporalBatches):
    """``Engine`` on a Temporal cluster. It needs a ``TemporalWorker`` of the same flock, on any machine.

    Every run is stored like an asynchronous one. It outlives this process, even if a caller waits for its result.

    Args:
        agents: by name; read at each submission. Workers have them too.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are stored; an engine sees only its own.
        heartbeat_timeout_s: seconds without a heartbeat after which a worker is considered dead and its steps are
            retried elsewhere. An async agent that blocks the event loop for longer is started a second time.
        payload_dir: the folder for payloads too long for the cluster, the same as the workers'; see docs/temporal.md.
        files_dir: the folder for the files of runs, the same as the workers'. Without it, no agent takes files.
        prices, default_model: those of the workers, to reject a ``max_cost`` that cannot hold.
        limits, bounds: limits as one value, or as keyword arguments, which override it; see ``Limits``.

    Raises: DefinitionError if a limit is invalid.

    The retention of the namespace decides how long runs are kept after they end.
    """

    is_draining = False
    _max_item_bytes = MAX_INPUT_BYTES

    def __init__(
        self,
        agents: Mapping[str, Agent],
        address: str | None = None,
        *,
        namespace: str | None = None,
        flock: str = "flock",
        heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S,
        payload_dir: str | os.PathLike[str] | None = None,
        files_dir: str | os.PathLike[str] | None = None,
        prices: Mapping[str, Price] | None = None,
        default_model: ModelChoice = None,
        limits: Limits | None = None,
        **bounds: Any,
    ) -> None:
        cluster = Cluster(address, namespace=namespace, payload_dir=payload_dir, files_dir=files_dir)
        limits = replaced(limits or Limits(), bounds, enforced_by("server"))
        limits = replace(limits, max_items=min(limits.max_items, MAX_ITEMS))
        if payload_dir is None:
            limits = replace(limits, max_input_bytes=min(limits.max_input_bytes, MAX_INPUT_BYTES))
        super().__init__(
            cluster, heartbeat_timeout_s, agents, flock, limits, prices=prices, default_model=default_model
        )
        self.webhooks = TemporalWebhooks(cluster, flock)
        #: an app may set it: a task that sends the webhooks
        self.send_webhooks: Callable[[], Coroutine[Any, Any, None]] | None = None
        self._tasks = list[asyncio.Task[None]]()
        self._error: StoreError | None = None
        self._open_runs = 0
        self._started_runs = 0
        #: by principal, for those that were counted since the last check of the cluster
        self._open_runs_of: dict[str, int] = {}
        #: runs that are being sent to the cluster
        self._starting = 0
        self._callers = 0
        self._secret: str | None = None
        #: runs whose streams began with their requests
        self._watched: set[str] = set()

    @property
    def _is_entered(self) -> bool:
        return bool(self._tasks)

    @property
    def _is_store_ok(self) -> bool:
        return self._error is None

    # Lifecycle

    async def __aenter__(self) -> Self:
        self._check_not_entered()
        check_no_batches(self._agents, self._default_models)
        await self.cluster.connect()
        self.is_draining, self._error = False, None
        #: _wake_waiters is set while no caller may wait, because the engine stops or the cluster does not answer
        self._wake_waiters, self._no_waiters = asyncio.Event(), asyncio.Event()
        self._tasks = [asyncio.create_task(self._watch(), context=Context())]
        if self.cluster.files is not None:
            self._tasks.append(asyncio.create_task(self._sweep(self.cluster.files), context=Context()))
        if self.send_webhooks is not None:
            self._tasks.append(asyncio.create_task(self.send_webhooks(), context=Context()))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks, self._tasks = self._tasks, []
        self.is_draining = True
        self._wake_waiters.set()
        for each in tasks:
            each.cancel()
        # The SDK's core sometimes never reports the end.
        await asyncio.wait([*tasks, *self._drops], timeout=SHUTDOWN_GRACE_S)

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting work, and stop waiting for runs after *timeout_s*. Runs continue in workers."""
        self._check_entered()
        self.is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._callers:
                    self._no_waiters.clear()
                    await self._no_waiters.wait()
        self._wake_waiters.set()

    async def check_ready(self) -> None:
        self._check_running()
        if self._error is not None:
            raise self._error

    def observe(self, observer: Observer) -> None:
        """No effect: runs are executed by workers, which have observers of their own."""

    async def queue(self) -> Queue:
        """Return the steps that no worker has taken yet, first or later ones, by the cluster's estimate."""
        self._check_entered()
        request = DescribeTaskQueueRequest(
            namespace=self.cluster.namespace,
            task_queue=TaskQueue(name=task_queue_of(self._flock)),
            task_queue_type=TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY,
            report_stats=True,
        )
        async with self.cluster.rpc_scope():
            stats = (await self.cluster.client.workflow_service.describe_task_queue(request)).stats
            asking = (await self.cluster.client.count_workflows(waiting_runs(self._flock))).count
        depth = stats.approximate_backlog_count
        return Queue(depth, now() - stats.approximate_backlog_age.ToTimedelta() if depth else None, asking)

    async def _watch(self) -> None:
        """Check the cluster and count open runs. Wake waiting callers if the cluster does not answer."""
        misses = 0
        while True:
            try:
                async with self.cluster.rpc_scope(WATCH_TIMEOUT_S):
                    before = self._started_runs
                    count = (await self.cluster.client.count_workflows(open_runs(self._flock))).count
                    latest = self._started_runs - before + self._starting  # it may have counted these or not
                    self._open_runs = min(count + latest, max(count, self._open_runs + self._starting)) - self._starting
                    self._open_runs_of.clear()
                self._error, misses = None, 0
                if not self.is_draining:
                    self._wake_waiters.clear()
            except StoreError as exc:
                misses += 1
                if misses == 1:  # one miss may only be a busy moment, and an error would reach all waiting callers
                    continue
                self._error = exc
                self._wake_waiters.set()
            except Exception:
                logger.exception("the cluster cannot be watched")
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _sweep(self, files: SharedContents) -> None:
        """Delete the files that no run has, every hour."""
        while True:
            try:
                await files.delete_unused(self.cluster.has)
            except (StoreError, EngineFull, OSError) as exc:
                logger.warning("the files that no run has cannot be deleted now: %s", exc)
            except Exception:
                logger.exception("the files that no run has cannot be deleted now")
            await asyncio.sleep(SWEEP_INTERVAL_S)

    def files(self, principal: str | None = None) -> FileBox:
        if self.cluster.files is None:
            return super().files(principal)
        self._check_entered()
        return self.cluster.files.of(principal, self._limits.max_file_bytes, self._limits.max_files_bytes)

    # Runs

    async def _accept(self, run: Run, key: IdempotencyKey | None, context: Context, newest: Newest | None) -> None:
        try:
            await self._check_room(run.principal)
        except EngineFull:
            if key is not None and (made_id := await self._reservations.find(key)) is not None:
                with contextlib.suppress(RunNotFound):  # a replay comes before any limit
                    raise Replayed((await self.get_run(made_id)).run_id) from None
            raise
        with self._counted_as_starting():
            made_id, order = run.run_id, self._order(run)
            if key is not None:
                made_id = await self._reservations.claim(key, run.run_id)
                order = replace(self._order(replace(run, run_id=made_id)), key_id=self._reservations.key_id(key))
            if newest is not None and newest.is_replaced:
                with contextlib.suppress(RunNotFound):
                    order = replace(order, replaces=workflow_id_of(await self.get_run(newest.run_id)))
            if self.cluster.files is not None:
                await self.cluster.files.mark(run_workflow_id(made_id, 1), run.files)
            if newest is not None:
                await self._take_turn(order, newest.run_id)
            # If the process that claimed the key died before it started the run, this one starts it.
            with contextlib.suppress(WorkflowAlreadyStartedError):
                await self._start(order, newest.run_id if newest and newest.is_replaced else None)
        if made_id != run.run_id:
            raise Replayed(made_id)

    async def _take_turn(self, order: RunOrder, continues: str) -> None:
        """Mark that a run continues another one, until a search surely finds it. Raises Conflict if another run has."""
        turn = IdempotencyKey(f"{session_workflow_id(order.run)} {continues}", b"")
        holder = await self._reservations.claim(turn, order.run.run_id, timedelta(seconds=KEEP_SESSION_S))
        if holder != order.run.run_id:
            await self._reservations.release(order.key_id, order.run.run_id)
            raise Conflict.continued(holder)

    def _order(self, run: Run) -> RunOrder:
        timeout_s = min(run.timeout_s or self._limits.max_timeout_s, self._limits.max_timeout_s)
        return RunOrder(
            run=run,
            timeout_s=timeout_s,
            queue_timeout_s=self._limits.queue_timeout_s,
            heartbeat_timeout_s=self._heartbeat_timeout_s,
            agents=tuple(self._agents),
            has_receiver=self.has_receiver(run.agent_name),
        )

    async def _start(self, order: RunOrder, replaced: str | None = None) -> None:
        """Start an attempt, and drop the run *replaced* before its turn comes.

        Raises: WorkflowAlreadyStartedError if it was started before.

        If this process dies before the run has joined its session, or the cluster does not answer, the run joins it by
        itself. It also cancels the run that it replaces, but does not delete that if it has ended.
        """
        await self.cluster.start(RUN_WORKFLOW, order, order.run, priority=Priority(priority_key=1))
        self._open_runs += 1
        self._started_runs += 1
        if replaced:
            await self._drop_run(replaced)
        if order.run.session_id is not None:
            with contextlib.suppress(StoreError, EngineFull):  # it is accepted, and joins by itself
                await self._join_session(order.run)

    async def _join_session(self, run: Run) -> None:
        """Append an attempt of *run* to its session. No effect if it is in there. Raises StoreError, EngineFull."""
        await self.cluster.start_workflow(
            FlockSession.run,
            [],
            [],
            flock=self._flock,
            id=session_workflow_id(run),
            id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
            start_signal="join",
            start_signal_args=[workflow_id_of(run)],
        )

    async def _check_room(self, principal: str | None) -> None:
        """Raise EngineFull if too many runs are open, in total or of *principal*. The last check awaits nothing."""
        limits, counts = self._limits.queue, self._open_runs_of
        if principal is not None and self._open_runs + self._starting >= limits.max_runs_per_principal:
            if principal not in counts:
                async with self.cluster.rpc_scope():
                    count = (await self.cluster.client.count_workflows(open_runs(self._flock, principal))).count
                counts.setdefault(principal, count)
            limits.check_share(counts[principal], "open")
            counts[principal] += 1
        limits.check(self._open_runs + self._starting, "open")

    @contextlib.contextmanager
    def _counted_as_starting(self) -> Iterator[None]:
        """Count a run as open while it is being started in the block."""
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1

    async def get_state(self, run_id: str, principal: str | None = None) -> tuple[RunStatus, int]:
        return (await self._glance(run_id, principal))[:2]

    async def _glance(self, run_id: str, principal: str | None = None) -> tuple[RunStatus, int, Run | None]:
        """Return the status and the attempt of a run, from its search attributes only, or the whole of an item.

        Raises: RunNotFound.
        """
        found, attempt = await self._find(run_id, principal)
        if found is None:
            item = await self.get_run(run_id)
            return item.status, item.attempt, item
        status = _status_of(found)
        while status in RETRYABLE:
            later = await self.cluster.describe(run_workflow_id(run_id, attempt + 1))
            if later is None:
                break
            status, attempt = _status_of(later), attempt + 1
        if status.is_final and await self._reservations.is_deleted(run_id):
            raise RunNotFound(run_id)
        return status, attempt, None

    async def _find(self, run_id: str, principal: str | None) -> tuple[WorkflowExecutionDescription | None, int]:
        """Return the first attempt of a run that is kept, and its number; None if it is an item of a batch.

        Raises: RunNotFound. One of another principal takes as many requests as an unknown one.
        """
        self._check_entered()
        if ID.fullmatch(run_id) is None:
            raise RunNotFound(run_id)
        first_id, attempt = run_workflow_id(run_id, 1), 1
        found = await self._own(first_id, principal)
        if found is None:
            batch_id, position = parse_item_id(run_id)
            with contextlib.suppress(BatchNotFound):
                if 0 <= position < (await self._find_batch(batch_id, principal)).batch.total_items:
                    return None, 1
            attempt = await self.cluster.last_attempt(RUN_WORKFLOW, first_id)
            found = await self._own(run_workflow_id(run_id, attempt), principal)
        if found is None:
            raise RunNotFound(run_id)
        return found, attempt

    async def get_run(self, run_id: str, principal: str | None = None) -> Run:
        self._check_entered()
        if ID.fullmatch(run_id) is None:
            raise RunNotFound(run_id)
        if principal is not None:
            await self._find(run_id, principal)  # so that nothing of others is read
        run = await self._attempt(run_id, 1) or (await self._item(run_id))[0]
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
        if run.status.is_final and await self._reservations.is_deleted(run_id):
            raise RunNotFound(run_id)
        return run

    async def get_account(self, principal: str) -> Account:
        self._check_entered()
        return await account_in_memo(self.cluster, self._flock, principal)

    async def secret(self) -> str:
        self._check_entered()
        if self._secret is None:
            key = IdempotencyKey("key of the flock", b"")  # which is not a client's key
            self._secret = await self._reservations.claim(key, new_call_key(), NO_LIMIT)
        return self._secret

    async def made_by(self, key: IdempotencyKey) -> str | None:
        self._check_entered()
        return await self._reservations.made_by(key)

    async def _set_budget(self, principal: str, max_cost: float | None) -> None:
        await signal_account(self.cluster, self._flock, principal, FlockAccount.set_budget, max_cost)

    def _usage_pages(self, wanted: UsageFilter) -> AsyncIterator[Sequence[UsageRow]]:
        return usage_of(self.cluster, self._flock, wanted)

    async def get_calls(self, run: Run) -> Mapping[int, Sequence[Call]]:
        self._check_entered()
        traces = await self._traces_of(run)
        return ended_calls(run, {step: list(map(shown, calls)) for step, calls in traces.calls.items()})

    async def _traces_of(self, run: Run) -> Traces:
        """Return what all attempts of *run* have left in histories. Those that were deleted are missing."""
        if run.batch_id is not None:
            return (await self._item(run.run_id))[1]
        found = Traces()
        for attempt in range(1, run.attempt + 1):
            async with self.cluster.rpc_scope(missing_ok=True):
                run_of(await self.cluster.history_of(run_workflow_id(run.run_id, attempt)), found)
        return found

    async def _attempt(self, run_id: str, attempt: int) -> Run | None:
        """Return the current record of one attempt of a run, or None."""
        handle = self.cluster.handle(run_workflow_id(run_id, attempt))
        async with self.cluster.rpc_scope(missing_ok=True):
            run = run_of(await self.cluster.history_of(handle.id))
            if run.status.is_final:
                return run
            described = await handle.describe()
            if described.close_time is not None:
                return run_of(await self.cluster.history_of(handle.id))
            for step in described.raw_description.pending_activities:
                run = with_heartbeats(run, step.heartbeat_details)
            return run
        return None

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        self._check_entered()
        may_ask = any(agent.may_ask for agent in self._agents.values())
        first_id = run_workflow_id(run_id, 1) if ID.fullmatch(run_id) else None
        return await self._wait(partial(self.get_run, run_id), first_id, timeout_s, waits=0 if may_ask else None)

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        self._check_entered()
        first_id = batch_workflow_id(batch_id, 1) if ID.fullmatch(batch_id) else None
        return await self._wait(partial(self.get_batch, batch_id), first_id, timeout_s)

    async def _wait(
        self,
        read: Callable[[], Awaitable[Record]],
        workflow_id: str | None,
        timeout_s: float | None,
        waits: int | None = None,
    ) -> Record:
        """Return the record from *read* when it is not active, or the current one after *timeout_s*.

        Args:
            workflow_id: the workflow to wait for before the first call of *read*.
            waits: see ``_until_change``.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        record, followed = None, None
        with self._counted_as_caller():
            while True:
                left_s = None if deadline is None else deadline - time.monotonic()
                if record is not None and left_s is not None and left_s <= 0:
                    return record
                if workflow_id is not None and (left_s is None or left_s > 0):
                    waits = waits if workflow_id == followed or waits is None else 0
                    followed, waits = workflow_id, await self._until_change(workflow_id, left_s, waits)
                elif record is not None:  # an item has no workflow of its own
                    await asyncio.sleep(POLL_INTERVAL_S if left_s is None else min(left_s, POLL_INTERVAL_S))
                    if self.is_draining:
                        raise wait_stopped()
                record = await read()
                if not (record.is_active if isinstance(record, Run) else record.status.is_active):
                    return record
                workflow_id = None if isinstance(record, Run) and record.batch_id else workflow_id_of(record)

    @contextlib.contextmanager
    def _counted_as_caller(self) -> Iterator[None]:
        """Let ``drain`` wait for the end of the block."""
        self._callers += 1
        try:
            yield
        finally:
            self._callers -= 1
            if not self._callers:
                self._no_waiters.set()

    @contextlib.contextmanager
    def watch(self, run_id: str) -> Iterator[None]:
        """Let a drain wait for the stream of the run, as it does for a caller of ``wait``. There is no live output."""
        self._check_entered()
        self._watched.add(run_id)
        try:
            with self._counted_as_caller():
                yield
        finally:
            self._watched.discard(run_id)

    def _may_end_in_drain(self, run_id: str) -> bool:
        return run_id in self._watched and not self._wake_waiters.is_set()

    async def _until_change(self, workflow_id: str, timeout_s: float | None, waits: int | None = None) -> int | None:
        """Wait until a workflow is closed, at most *timeout_s*.

        Args:
            waits: if given, also until the run begins to wait for answers, after the event with this id. It takes more
                requests, so it is only for runs that may ask.

        Returns: the id of the event, or *waits*. Raises EngineStopped, StoreError.
        """
        # The next read reports a missing workflow.
        following = asyncio.create_task(self.cluster.until_change(workflow_id, waits))
        woken = asyncio.create_task(self._wake_waiters.wait())
        try:
            await asyncio.wait([following, woken], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result() or waits
            if woken.done():
                gone = self._error or StoreError("The cluster did not answer for a moment. Try again.")
                raise wait_stopped() if self.is_draining else gone
            return waits
        finally:
            following.cancel()
            woken.cancel()

    async def cancel_run(self, run_id: str) -> Run:
        status, attempt, item = await self._glance(run_id)
        if status.is_final:
            check_cancel(f"run {run_id}", status)
        elif item is not None:
            batch = await self.get_batch(item.batch_id or "")
            await self.cluster.signal(workflow_id_of(batch), "cancel_item", item.position)
        else:
            workflow_id = run_workflow_id(run_id, attempt)
            async with self.cluster.rpc_scope(missing_ok=True):
                await self.cluster.handle(workflow_id).cancel()
            if status is RunStatus.WAITING:  # nothing is running, so it ends at once
                await self._until_change(workflow_id, CANCEL_WAIT_S)
        run = await self.get_run(run_id)
        check_cancel(f"run {run_id}", run.status)
        return replace(run, cancel_requested=True)

    async def answer_call(self, run_id: str, call_id: str, output: msgspec.Raw, by: Principal | None = None) -> Run:
        """See ``Engine.answer_call``. The answer is a signal, so it needs no worker. Of several, the first one counts.

        Cancellation: the answer may have been sent.
        """
        self._check_entered()
        if len(output) > MAX_INPUT_BYTES:
            raise TooLarge(f"An answer may have up to {MAX_INPUT_BYTES} bytes, and this one has {len(output)}.")
        is_sent, pause_s = False, REREAD_DELAY_S
        while True:
            run, traces, _ = await self._find_question(run_id, call_id, by)
            is_open = any(wait.call_id == call_id for wait in run.waiting_for)
            given = None if is_open else _answer_in(run, traces, call_id)
            was_asked = call_id in traces.asked
            question = question_for(run, call_id, output, lambda: given, lambda: was_asked, by)  # noqa: B023 - called at once
            if question is None:
                return run
            if is_sent:  # the cluster adds it to the history when the workflow has completed its task
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, 1.0)
                continue
            call = answer_of(question, output, now(), by)
            done = CallDone(item=run.position or 0, step=len(run.steps), call=call)
            await self.cluster.signal(await self._keeper_of(run), FlockRun.call_done, done)
            about = fields_of_run(run) | {"call_id": call_id}
            audit("question.answered", answer_in_words(question, call), about, call.answered_by)
            is_sent = True

    _questions_interval_s = QUESTIONS_INTERVAL_S

    async def _questions(self, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
        """Ask the workflows that the search of the cluster finds."""
        by, page = wanted.by, QuestionPage()
        is_own = by is not None and not by.admin and not by.roles
        filter_ = AskingRuns(
            agent_name=wanted.agent_name,
            session_id=wanted.session_id,
            principal=by.name if by is not None and is_own else wanted.principal,
            after=wanted.after,
        )
        query, read = asking_workflows(self._flock), partial(self._asked_in, wanted)
        async with aclosing(newest_first(self.cluster, query, ("run", "chunk"), filter_, read)) as found:
            async for asked_questions in found:
                for asked, begun_by in asked_questions:
                    is_wanted = wanted.role in (None, asked.question.answerer) and not asked.question.is_for_client
                    is_wanted &= wanted.after is None or asked.run_id < wanted.after
                    is_wanted &= wanted.principal in (None, asked.principal)
                    if not is_wanted or not can_answer(asked.question, asked.principal, begun_by, by):
                        continue
                    if not page.add(asked, wanted.limit):
                        page.rest = replace(wanted, after=page[-1].run_id), None
                        return page
        return page

    async def _asked_in(
        self, wanted: QuestionFilter, found: WorkflowExecution
    ) -> Sequence[tuple[AskedQuestion, Collection[str]]]:
        """Return the open questions of a run, or of the items of a chunk, and who has begun these. The newest is first.

        They may be others than those *wanted*. If there are none of these, nothing else is read.
        """
        if not may_have(found, wanted):
            return []
        if found.workflow_type == CHUNK_WORKFLOW:
            items = reversed((await self._running_chunk(found.id)).items.values())
            return [(asked_question(item, each, None), item.begun_by) for item in items for each in item.questions]
        current = await self.cluster.describe(found.id)
        if current is None or current.close_time is not None or current.typed_search_attributes.get(STATUS) != ASKING:
            return []  # the search lags
        if (inbox := inbox_in(current)).asked:
            return [(asked, inbox.begun_by) for asked in inbox.asked]
        run = await self.get_run(found.id.split(":")[1])
        return [(asked_question(run, each, None), run.begun_by) for each in run.questions]

    async def get_question(self, run_id: str, call_id: str, by: Principal | None = None) -> AskedQuestion:
        self._check_entered()
        run, traces, question = await self._find_question(run_id, call_id, by)
        if question is None:
            raise CallNotFound(run_id, call_id)
        return asked_question(run, question, _answer_in(None, traces, call_id))

    async def _find_question(
        self, run_id: str, call_id: str, by: Principal | None
    ) -> tuple[Run, Traces, Question | None]:
        """Return a run with what it has left, and a question that it has asked, or None.

        Raises: RunNotFound if there is no such run, or *by* may not know of it. This takes a multiple of ``SAME_S``, so
            that its time does not tell one from the other.
        """
        since = time.monotonic()
        try:
            run = await self.get_run(run_id)
            traces = await self._traces_of(run)
            question = traces.asked.get(call_id)
            if not is_of(run, by) and (question is None or not may_see(run, question, by)):
                raise RunNotFound(run_id)
        except RunNotFound:
            await asyncio.sleep(0 if by is None else (since - time.monotonic()) % SAME_S)
            raise
        return run, traces, question

    async def send_message(
        self, run_id: str, name: str, message: msgspec.Raw, key: IdempotencyKey | None = None
    ) -> Run:
        """See ``Engine.send_message``. The message is a signal, so it needs no worker.

        Cancellation: the message may have been sent.
        """
        self._check_entered()
        message = message_from(name, message, MAX_INPUT_BYTES)
        run, new = await self.get_run(run_id), new_id()
        id_ = None if key is None else await self._reservations.find(key)
        if id_ is None:
            check_message(run, name, message, await self._count_kept(run, message))
            id_ = new if key is None else await self._reservations.claim(key, new)
        replayed = None if id_ == new else Replayed(run_id)
        if replayed is not None and id_ in (await self._traces_of(run)).message_ids:
            raise replayed
        # If the process that claimed the key died before it sent the message, this one sends it.
        sent = Sent(item=run.position or 0, id=id_, name=name, message=message, at=now())
        is_sent = await self.cluster.signal(await self._keeper_of(run), FlockRun.message, sent)
        if not is_sent and run.batch_id is not None and not (await self.get_run(run_id)).status.is_final:
            batch = await self.get_batch(run.batch_id)  # it keeps those to items that have not started
            is_sent = await self.cluster.signal(workflow_id_of(batch), FlockRun.message, sent)
        if replayed is not None:
            raise replayed
        if not is_sent:
            raise Conflict(f"The run {run_id} has ended, so it cannot receive a message {name!r}.")
        return await self.get_run(run_id)

    async def _count_kept(self, run: Run, message: msgspec.Raw) -> int:
        """Return how many messages are kept for a run.

        Raises: TooManyRequests if a batch cannot keep the *message* too, because the item has not started.
        """
        if run.batch_id is None:
            return len((await self._traces_of(run)).unreceived)
        order, position = await self._current(run.batch_id), run.position or 0
        chunk = await self._read(order, order.chunk_of(position))
        if chunk.has_begun:
            return len(chunk.readings[position].traces.unreceived)
        begun_to = order.attempts[-1].begun_to
        async with self.cluster.rpc_scope(missing_ok=True):
            history = await self.cluster.history_of(workflow_id_of(order.batch))
            early = [sent for sent in early_messages(history) if order.chunk_of(sent.item) >= begun_to]
            size = sum(len(sent.message) for sent in early)
            if early and size + len(message) > MAX_INPUT_BYTES:
                raise TooManyRequests(
                    f"Messages with {size} bytes are kept for items of the batch {run.batch_id} that have not started, "
                    f"and there is room for {MAX_INPUT_BYTES}. Send more when some of these have started."
                )
            return sum(sent.item == position for sent in early)
        return 0

    async def _keeper_of(self, run: Run) -> str:
        """Return the id of the workflow that keeps the calls of *run*."""
        if run.batch_id is None:
            return workflow_id_of(run)
        order = await self._current(run.batch_id)
        return chunk_workflow_id(run.batch_id, order.chunk_of(run.position or 0), order.batch.attempt)

    async def retry_run(
        self, run_id: str, max_cost: float | None = None, *, calls: RetriedCalls = "keep", by: Principal | None = None
    ) -> Run:
        self._check_running()
        status, _, item = await self._glance(run_id)
        if item is None and status not in RETRYABLE:
            raise run_not_retried(run_id, status, None)
        run = item or await self.get_run(run_id)
        self._check_prices(run.agent_name, max_cost)
        batch = None if run.batch_id is None else await self.get_batch(run.batch_id)
        if batch is not None and batch.status.is_final and run.status in RETRYABLE and run.error_type != INVALID_INPUT:
            await self._retry_batch(batch.batch_id, (run.status,), run, max_cost, calls, by)
            return await self.get_run(run_id)
        if batch is not None or run.status not in RETRYABLE:
            raise run_not_retried(run_id, run.status, batch)
        max_cost = run.max_cost if max_cost is None else max_cost
        run_again = replace(run, is_async=True, max_cost=max_cost)
        again = reset_for_retry(run_again, keeps_calls=calls == "keep", by=None if by is None else by.name)
        try:
            await self._check_room(run.principal)
            if self.cluster.files is not None:
                await self.cluster.files.mark(run_workflow_id(run_id, 1), run.files)
            with self._counted_as_starting():
                order = replace(self._order(again), key_id=await self._stored_key_id(run))
                await self._start(replace(order, messages=(await self._traces_of(run)).unreceived))
        except WorkflowAlreadyStartedError as exc:
            raise already_retried(run) from exc
        return again

    async def _stored_key_id(self, run: Run) -> str | None:
        async with self.cluster.rpc_scope(missing=RunNotFound(run.run_id)):
            return (await self.cluster.input_of(workflow_id_of(run), RunOrder)).key_id

    async def delete_run(self, run_id: str) -> None:
        at, (status, attempt, item) = time.time(), await self._glance(run_id)
        if item is not None or not status.is_final:
            raise not_deleted(item or await self.get_run(run_id))
        async with self.cluster.rpc_scope(missing=RunNotFound(run_id)):
            order = await self.cluster.input_of(run_workflow_id(run_id, attempt), RunOrder)
        await self._reservations.release(order.key_id, run_id)
        async with self.cluster.rpc_scope():
            for each in range(1, attempt + 1):
                await self.cluster.delete(run_workflow_id(run_id, each))
        if not await self._reservations.mark_deleted(run_id):  # last, so that a deletion that failed can be repeated
            raise RunNotFound(run_id)
        if self.cluster.files is not None:
            await self.cluster.files.release(run_workflow_id(run_id, 1), order.run.files, at)

    # Lists

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        """List runs. The cluster's search may lag by a moment, but the records are current."""
        self._check_entered()

        async def read(run_id: str) -> Run:
            run = await self.get_run(run_id)
            inputs = run.inputs if wanted.with_inputs else msgspec.Raw(b"{}")
            return replace(run, inputs=inputs, result=run.result if wanted.with_results else None, steps=())

        return await page_of(self.cluster, workflows_of(RUN_WORKFLOW, self._flock), "run", wanted, read)


def _status_of(run: WorkflowExecutionDescription) -> RunStatus:
    """Return the status of an attempt of a run. One that has not started seems to be running."""
    if run.status is WorkflowExecutionStatus.RUNNING:
        return RunStatus.WAITING if run.typed_search_attributes.get(STATUS) is not None else RunStatus.RUNNING
    if run.status is WorkflowExecutionStatus.COMPLETED:
        return RunStatus.COMPLETED
    return RunStatus.CANCELLED if run.status is WorkflowExecutionStatus.CANCELED else RunStatus.FAILED


def _answer_in(run: Run | None, traces: Traces, call_id: str) -> Call | None:
    """Return the answer of the last step that asked, unless a retry of *run* has dropped it."""
    for step in sorted(traces.calls, reverse=True):
        for call in reversed(traces.calls[step]):
            if call.kind == "question" and call.call_id == call_id and call.error is None:
                return call if run is None or may_count(run, step, call_id) else None
    return None

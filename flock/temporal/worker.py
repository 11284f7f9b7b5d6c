"""A worker: executes agents for the cluster, with a limit on concurrency, and reports the outcomes."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Self

from msgspec.structs import replace
from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from flock.agents.agent import Agent
from flock.agents.checks import check_no_batches, tool_sources
from flock.agents.mcp import listing_tools
from flock.agents.shared import Shared
from flock.limits import Limits, enforced_by
from flock.models.llm import ModelClient
from flock.models.prices import Price, merged
from flock.options import replaced
from flock.runs import Call, Observer, Run, RunStatus, Step, now
from flock.steps.executor import MAX_HISTORY_BYTES, StepExecutor, WaitingForAnswers
from flock.steps.outcomes import CANCELLED, CRASHED, log_crash
from flock.temporal.accounts import Accounts
from flock.temporal.batchflows import FlockBatch, FlockChunk, FlockDelete, FlockRows
from flock.temporal.cluster import Cluster, logger
from flock.temporal.items import HEARTBEAT_INTERVAL_S, ItemActivities
from flock.temporal.messages import (
    ACTIVITY,
    HEARTBEAT_TIMEOUT_S,
    INTERRUPTED,
    Heartbeat,
    RunOrder,
    StepDone,
    items_queue_of,
    latest,
    recoded,
    task_queue_of,
)
from flock.temporal.reports import FlockWebhook
from flock.temporal.search import calls_of, earlier_runs
from flock.temporal.steps import MAX_RUN_BYTES, ActivityStep, Workplace, until_done
from flock.temporal.suspects import Gate, Suspicion
from flock.temporal.workflows import FlockAccount, FlockMark, FlockRun, FlockSession

#: How long a workflow task waits for the worker that has the workflow in its cache, in seconds. A step that starts
#: again asks its workflow for its finished calls, so it waits as long for a worker that has died.
STICKY_TIMEOUT_S = 2
#: When a step sends its first heartbeat, in seconds. Shorter steps need none.
FIRST_HEARTBEAT_S = 0.2
#: How long the SDK's worker may take to shut down after the drain timeout, in seconds.
SHUTDOWN_GRACE_S = 5


class TemporalWorker:
    """Executes runs of *agents* that a ``TemporalEngine`` of the same flock has accepted.

    It runs while its async context is open. Any number of workers, on any machines, share the work.

    Args:
        agents: by name.
        models: the client for the model calls of agents; the worker closes it.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are stored.
        observers: receive the events of this worker; see ``Observer``.
        max_steps, expose_errors: see ``EmbeddedEngine``.
        max_run_bytes: max total size of the inputs and results of one run, as JSON. A result beyond it fails its run.
            The default is 1.5 million, or 64 MiB with a ``payload_dir``.
        drain_timeout_s: how long steps may continue when the worker shuts down. Other workers retry the rest.
        payload_dir: the folder for payloads too long for the cluster, the same as the engine's; see docs/temporal.md.
        files_dir: the folder for files, the same as the engine's. Without it, runs with files are left to others.
        prices, shared: see ``EmbeddedEngine``.
        limits, bounds: limits as one value, or as keyword arguments, which override it; see ``Limits``. Batch items
            leave a tenth of ``max_concurrency`` to runs.

    Raises: DefinitionError if a limit is invalid.

    Raises, at entry: StoreError, DefinitionError; see ``Cluster.connect``.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        address: str | None = None,
        *,
        namespace: str | None = None,
        flock: str = "flock",
        observers: Sequence[Observer] = (),
        max_steps: int = 32,
        max_run_bytes: int | None = None,
        drain_timeout_s: float = 20,
        expose_errors: bool = False,
        payload_dir: str | os.PathLike[str] | None = None,
        files_dir: str | os.PathLike[str] | None = None,
        prices: Mapping[str, Price] | None = None,
        shared: Shared | None = None,
        limits: Limits | None = None,
        **bounds: Any,
    ) -> None:
        self.cluster = Cluster(address, namespace=namespace, payload_dir=payload_dir, files_dir=files_dir)
        self.task_queue = task_queue_of(flock)
        self._models = models
        self._tool_sources = tool_sources(agents)
        self._limits = replaced(limits or Limits(), bounds, enforced_by("worker"))
        if max_run_bytes is None:
            max_run_bytes = MAX_RUN_BYTES if payload_dir is None else 64 * 1024 * 1024
        executor = StepExecutor(
            agents,
            models,
            observers,
            limits=self._limits,
            max_steps=max_steps,
            expose_errors=expose_errors,
            max_run_bytes=max_run_bytes,
            max_item_bytes=min(max_run_bytes, MAX_RUN_BYTES),  # heartbeats carry results, and never use the folder
            prices=merged(prices),
            shared=shared or Shared(),
            folder_of=None if self.cluster.files is None else self.cluster.files.folder,
        )
        gate, accounts = Gate(self._limits.max_recoveries), Accounts(self.cluster, flock, executor.prices)
        self.workplace = Workplace(self.cluster, executor, gate, accounts, drain_timeout_s)
        models.on_retry = lambda: executor.notify("model_call_retried")

    async def __aenter__(self) -> Self:
        check_no_batches(self.workplace.executor.agents, self._models.default_model)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._models)
            await stack.enter_async_context(listing_tools(self._tool_sources))
            await stack.enter_async_context(self.workplace.executor.state)
            await self.cluster.connect(lazy=False)
            client = self.cluster.client
            items, drain_timeout_s = ItemActivities(self.workplace), self.workplace.drain_timeout_s
            drain_timeout = timedelta(seconds=drain_timeout_s)
            for_items = Worker(
                client,
                task_queue=items_queue_of(self.task_queue),
                activities=[items.run],
                # An item that waits here could run elsewhere.
                max_concurrent_activities=self.workplace.executor.item_slots,
                max_heartbeat_throttle_interval=timedelta(seconds=HEARTBEAT_INTERVAL_S),
                graceful_shutdown_timeout=drain_timeout,
            )
            for_runs = Worker(
                client,
                task_queue=self.task_queue,
                workflows=[
                    FlockRun,
                    FlockMark,
                    FlockSession,
                    FlockAccount,
                    FlockBatch,
                    FlockChunk,
                    FlockRows,
                    FlockDelete,
                    FlockWebhook,
                ],
                activities=[self._run_agent, items.find, items.delete_batch],
                workflow_runner=UnsandboxedWorkflowRunner(),  # workflows contain no user code, and replays are tested
                max_concurrent_activities=self._limits.max_concurrency,
                max_eager_activity_reservations_per_workflow_task=min(100, self._limits.max_concurrency),
                max_heartbeat_throttle_interval=timedelta(seconds=HEARTBEAT_TIMEOUT_S / 3),
                sticky_queue_schedule_to_start_timeout=timedelta(seconds=STICKY_TIMEOUT_S),
                graceful_shutdown_timeout=drain_timeout,
            )
            workers = list[Worker]()
            stack.push_async_callback(_shut_down, workers, drain_timeout_s + SHUTDOWN_GRACE_S)
            for worker in (for_runs, for_items):
                await worker.__aenter__()
                workers.append(worker)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Start no new steps, drain the running ones, and leave the rest to other workers."""
        await self._exit.aclose()

    # One step of a run

    @activity.defn(name=ACTIVITY)
    async def _run_agent(self, order: RunOrder) -> StepDone:
        """Run the next agent of a run.

        Raises:
            ApplicationError: the run failed or was cancelled (not retryable), or the worker shut down before the end of
                the step or lacks an agent (retryable).
        """
        active = _RunStep(order, self.workplace)
        if self.workplace.gate.is_proven(active.suspicion):
            log_crash(order.run, active.suspicion.deaths)
            raise ApplicationError(
                CRASHED.error,
                active.heartbeat(),
                type=CRASHED.error_type,
                non_retryable=True,
                category=ApplicationErrorCategory.BENIGN,  # it is in our log
            )
        work = asyncio.create_task(active.execute())
        heartbeats = asyncio.create_task(_send_heartbeats(active, order.heartbeat_timeout_s))
        try:
            await until_done(
                work, drain_timeout_s=self.workplace.drain_timeout_s, stop=active.stop, cancel=active.cancel
            )
        finally:
            heartbeats.cancel()
        outcome = active.outcome
        active.suspicion.is_stopped = outcome is None
        if outcome is None and active.lacks is not None:
            beat = active.heartbeat()
            activity.heartbeat(replace(beat, misses=beat.misses + 1))
            raise active.left_to_others(beat)
        if isinstance(outcome, Step):
            return active.done
        if isinstance(outcome, WaitingForAnswers):
            return active.ended(questions=tuple(outcome.questions), worked_s=active.worked_s)
        if outcome is None:
            activity.heartbeat(active.heartbeat())
            raise ApplicationError("The worker stopped before this step ended.", active.heartbeat(), type=INTERRUPTED)
        # A CancelledError could not carry the start of the step. The workflow knows that it was cancelled.
        # BENIGN keeps a requested cancellation out of the SDK's log.
        category = ApplicationErrorCategory.BENIGN if outcome is CANCELLED else ApplicationErrorCategory.UNSPECIFIED
        raise ApplicationError(
            outcome.error, active.heartbeat(), type=outcome.error_type, non_retryable=True, category=category
        ) from None  # its cause is for our log only


class _RunStep(ActivityStep):
    """The next step of a run. Its heartbeats report its start and its progress.

    ``done`` is its result, if it has completed a step.
    """

    done: StepDone

    def __init__(self, order: RunOrder, at: Workplace) -> None:
        info = activity.info()
        last = next((recoded(sent, Heartbeat) for sent in info.heartbeat_details), Heartbeat())
        suspicion = Suspicion(last, at.cluster, self.heartbeat)
        is_new = last.begun_at is None and not suspicion.deaths
        super().__init__(
            replace(order.run, first_span=order.run.first_span or last.first_span),
            order.timeout_s,
            at,
            suspicion,
            is_again=suspicion.is_again,
            queue_timeout_s=order.queue_timeout_s if is_new else None,
        )
        self.elsewhere = {order.run.agent_name, *order.agents}
        self._latest = order.latest
        self.has_calls = order.has_calls or last.needs is not None or last.begun_at is not None
        self.held_s, self.waited_s = last.held_s, order.waited_s + last.held_s
        self.queued_s = order.queued_s + (now() - info.scheduled_time).total_seconds()
        self.started_at, self.spent = last.begun_at, latest(self.spent, last.spent)  # these stay valid
        self.needs = last.needs

    async def is_next(self) -> bool:
        return self._is_next and await super().is_next()

    @property
    def _is_next(self) -> bool:
        return not self._latest or self.run.status is not RunStatus.STARTING

    async def wait_begins(self) -> None:
        activity.heartbeat(self.heartbeat())  # to the cluster it has started, but it waits
        if not self._is_next:  # the run before it has left the session, and is about to close
            await self._cluster.answered(lambda: self._cluster.until_change(self._latest[-1]))
        await super().wait_begins()

    async def earlier_runs(self, limit: int) -> Sequence[Run]:
        return await self._cluster.answered(
            lambda: earlier_runs(self._cluster, self.run, self._latest, limit, MAX_HISTORY_BYTES)
        )

    async def calls_of(self, run: Run, position: int) -> Sequence[Call]:
        return await self._cluster.answered(lambda: calls_of(self._cluster, run, position))

    async def keep(self, step: Step) -> None:
        """Store a long result while heartbeats are sent. Later, a slow disk would look like a dead worker."""
        # Later, a thread may still report progress.
        self.done = self.ended(step=step, has_next=self._executor.find(step.next_agent) is not None)
        await self._cluster.payloads.store_ahead(activity.info().workflow_id or "", self.done)

    def ended(self, **end: Any) -> StepDone:
        """Return the result of the step, with the fields in *end*."""
        end |= {"progress": self.progress, "first_span": self.run.first_span}
        return StepDone(begun_at=self.started_at, spent=self.spent, held_s=self.held_s, **end)

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(
            begun_at=self.started_at,
            progress=self.progress,
            spent=self.spent,
            misses=self.suspicion.misses,
            needs=self.needs,
            held_s=self.held_s,
            deaths=self.suspicion.report(),
            dropped=self.dropped,
            first_span=self.run.first_span,
        )


async def _shut_down(workers: Sequence[Worker], timeout_s: float) -> None:
    """Shut down workers of the SDK together, so that none starts a step while another one drains.

    The time limit is needed because their core sometimes never reports the end.
    """

    async def shut_down(worker: Worker) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await worker.__aexit__(None, None, None)
        except TimeoutError:
            queue = worker.task_queue
            logger.warning("The worker of %s did not shut down within %g s and is abandoned.", queue, timeout_s)

    await asyncio.gather(*map(shut_down, workers))


async def _send_heartbeats(active: _RunStep, heartbeat_timeout_s: float) -> None:
    pause_s = min(FIRST_HEARTBEAT_S, heartbeat_timeout_s / 3)
    while True:
        await asyncio.sleep(pause_s)
        activity.heartbeat(active.heartbeat())
        pause_s = heartbeat_timeout_s / 3

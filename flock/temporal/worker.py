"""A worker: takes turns of agents from the cluster, as many at a time as it may, and tells how they ended."""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

from temporalio import activity
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from flock.agents.agent import Agent
from flock.agents.llm import ModelClient
from flock.engine.outcomes import CANCELLED, Outcome
from flock.engine.turns import Turns
from flock.limits import Limits, enforced_by
from flock.options import replaced
from flock.runs import Observer, Progress, Step, now
from flock.temporal.batchflows import FlockBatch, FlockChunk, FlockForget, FlockRows
from flock.temporal.cluster import Cluster
from flock.temporal.items import ItemActivities
from flock.temporal.messages import (
    ACTIVITY,
    HEARTBEAT_TIMEOUT_S,
    INTERRUPTED,
    Beat,
    RunOrder,
    StepDone,
    items_queue_of,
    recoded,
    task_queue_of,
)
from flock.temporal.payloads import PayloadFolder
from flock.temporal.turns import MAX_RUN_BYTES, ActivityTurn, until_done
from flock.temporal.workflows import FlockMark, FlockRun

__all__ = ["TemporalWorker"]

logger = logging.getLogger("flock.temporal")

#: After so many seconds a worker that died is not waited for to go on with a workflow that it knew.
STICKY_TIMEOUT_S = 2
#: How often at most the cluster is told how far items are, in seconds: what was done since then is done again if the
#: worker dies.
ITEMS_BEAT_S = 0.1
#: After so many seconds a turn tells that it has begun: shorter ones are spared the call.
FIRST_BEAT_S = 0.2
#: How much longer than its turns the library's own worker may take to stop, in seconds.
TIDYING_UP_S = 5


class TemporalWorker:
    """Carries out runs of *agents* that a ``TemporalEngine`` of the same flock has accepted. Use it as an async context
    manager: it works inside it only. Any number of them, on any machines, share the work.

    Args:
        agents: by name.
        models: what model agents call; the worker closes it.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are kept.
        observers: hear of what happens here; not of ends, which are the cluster's.
        max_steps, expose_errors: see ``EmbeddedEngine``.
        max_run_bytes: inputs and all results of one run together, as JSON; a result beyond it fails its run. If None,
            1.5 million, and 64 MiB where there is a ``payload_dir``.
        drain_timeout_s: how long turns may continue when the worker stops; another worker takes what is left.
        payload_dir: a folder for what is too long for the cluster; the engine has the same one. See README.md.
        limits, bounds: its bounds, as one value, or as keyword arguments that come before it; see ``Limits``. Items of
            batches leave a tenth of ``max_concurrency`` to runs.

    Raises: DefinitionError if a bound is not valid.

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
        limits: Limits | None = None,
        **bounds: Any,
    ) -> None:
        self.cluster = Cluster(address, namespace=namespace, payload_dir=payload_dir)
        self.task_queue = task_queue_of(flock)
        self._models = models
        self._limits = replaced(limits or Limits(), bounds, enforced_by("worker"))
        if max_run_bytes is None:
            max_run_bytes = MAX_RUN_BYTES if payload_dir is None else 64 * 1024 * 1024
        self._drain_timeout_s = drain_timeout_s
        self._turns = Turns(
            agents,
            models,
            observers,
            limits=self._limits,
            max_steps=max_steps,
            expose_errors=expose_errors,
            max_run_bytes=max_run_bytes,
            max_item_bytes=min(max_run_bytes, MAX_RUN_BYTES),  # heartbeats report it, which go to the cluster always
        )
        models.on_retry = lambda: self._turns.notify("model_call_retried")

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._models)
            await self.cluster.connect(lazy=False)
            client, items = self.cluster.client, ItemActivities(self.cluster, self._turns, self._drain_timeout_s)
            drain_timeout = timedelta(seconds=self._drain_timeout_s)
            for_items = Worker(
                client,
                task_queue=items_queue_of(self.task_queue),
                activities=[items.run],
                max_concurrent_activities=self._turns.item_slots,  # what waits here may have a slot elsewhere
                max_heartbeat_throttle_interval=timedelta(seconds=ITEMS_BEAT_S),
                graceful_shutdown_timeout=drain_timeout,
            )
            for_runs = Worker(
                client,
                task_queue=self.task_queue,
                workflows=[FlockRun, FlockMark, FlockBatch, FlockChunk, FlockRows, FlockForget],
                activities=[self._run_agent, items.find, items.forget],
                workflow_runner=UnsandboxedWorkflowRunner(),  # all of their code is ours, and replays are tested
                max_concurrent_activities=self._limits.max_concurrency,
                max_eager_activity_reservations_per_workflow_task=min(100, self._limits.max_concurrency),
                max_heartbeat_throttle_interval=timedelta(seconds=HEARTBEAT_TIMEOUT_S / 3),
                sticky_queue_schedule_to_start_timeout=timedelta(seconds=STICKY_TIMEOUT_S),
                graceful_shutdown_timeout=drain_timeout,
            )
            for worker in (for_runs, for_items):
                await worker.__aenter__()
                stack.push_async_exit(partial(_leave, worker, self._drain_timeout_s + TIDYING_UP_S))
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Take no new turns, let those at work end, and leave the rest to other workers."""
        await self._exit.aclose()

    # One turn of a run

    @activity.defn(name=ACTIVITY)
    async def _run_agent(self, order: RunOrder) -> StepDone:
        """Let the next agent of a run have its turn.

        Raises:
            ApplicationError: how the run ends, and is not to be tried again, also when it was to be cancelled and has
                stopped; or the worker leaves, and it is.
        """
        turn = _RunTurn(order, self.cluster.payloads)
        work = asyncio.create_task(turn.take(self._turns))
        beats = asyncio.create_task(_tell_beats(turn, order.heartbeat_timeout_s))
        try:
            await until_done(
                work,
                drain_timeout_s=self._drain_timeout_s,
                stop=lambda: turn.stop(self._turns),
                cancel=turn.cancel,
            )
        finally:
            beats.cancel()
        if isinstance(turn.outcome, Step):
            return turn.done(turn.outcome)
        if turn.outcome is None:
            raise ApplicationError("The worker stopped while this turn was at work.", turn.beat(), type=INTERRUPTED)
        _end(turn, turn.outcome)


class _RunTurn(ActivityTurn):
    """The next turn of a run. Its heartbeats say when it started, and how far it is."""

    def __init__(self, order: RunOrder, payloads: PayloadFolder) -> None:
        info = activity.info()
        super().__init__(order.run, order.timeout_s, is_again=info.attempt > 1, queue_timeout_s=order.queue_timeout_s)
        self.queued_s = (now() - info.scheduled_time).total_seconds()
        for beat in info.heartbeat_details:  # what a worker that died has told of the beginning stays true
            self.started_at = recoded(beat, Beat).begun_at
        self._payloads = payloads
        self._progress_when_done: Progress | None = None

    async def wait_begins(self) -> None:
        activity.heartbeat(self.beat())  # it has not begun, though the cluster has it as started

    async def keep(self, step: Step) -> None:
        """Write a long result while heartbeats are sent: later, a slow disk would look like a worker that died."""
        self._progress_when_done = self.progress  # a thread may go on reporting
        await self._payloads.keep(activity.info().workflow_id or "", self.done(step))

    def done(self, step: Step) -> StepDone:
        assert self.started_at is not None
        return StepDone(step=step, begun_at=self.started_at, progress=self._progress_when_done)

    def beat(self) -> Beat:
        return Beat(begun_at=self.started_at, progress=self.progress)


async def _leave(
    worker: Worker,
    timeout_s: float,
    exc_type: type[BaseException] | None,
    exc: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """Stop a worker of the library. Its turns have ended by then; at times its core never says that it has, too."""
    try:
        async with asyncio.timeout(timeout_s):
            await worker.__aexit__(exc_type, exc, traceback)
    except TimeoutError:
        logger.warning("The worker of %s has not ended within %g s, and is left so.", worker.task_queue, timeout_s)


async def _tell_beats(turn: _RunTurn, heartbeat_timeout_s: float) -> None:
    pause_s = min(FIRST_BEAT_S, heartbeat_timeout_s / 3)
    while True:
        await asyncio.sleep(pause_s)
        activity.heartbeat(turn.beat())
        pause_s = heartbeat_timeout_s / 3


def _end(turn: _RunTurn, end: Outcome) -> NoReturn:
    # A CancelledError could not say when the turn began. The workflow knows that it was asked to cancel.
    # What was asked for is no failure for the library's log.
    category = ApplicationErrorCategory.BENIGN if end is CANCELLED else ApplicationErrorCategory.UNSPECIFIED
    raise ApplicationError(
        end.error, turn.beat(), type=end.error_type, non_retryable=True, category=category
    ) from None  # what raised it is for the log only

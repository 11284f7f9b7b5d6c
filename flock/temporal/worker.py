"""A worker: takes turns of agents from the cluster, as many at a time as it may, and tells how they ended.

What it does to a turn is what ``flock.runner`` does to a run: one cancel scope, within which whatever an agent raises,
cancels or leaves behind ends that turn and touches no other.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from typing import NoReturn, Self

import anyio
from msgspec.structs import replace
from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from flock.agents import Agent, Resources
from flock.ends import CANCELLED, End, failure_of, interrupted_turn, queue_timeout, timeout_of
from flock.errors import ResultTooLarge
from flock.llm import ModelClient
from flock.runs import Observer, Progress, Run, RunContext, RunStatus, Step, Usage, now
from flock.slots import Slots
from flock.temporal.cluster import Cluster
from flock.temporal.messages import ACTIVITY, HEARTBEAT_TIMEOUT_S, INTERRUPTED, Beat, RunOrder, StepDone, task_queue_of
from flock.temporal.workflows import FlockMark, FlockRun
from flock.threads import Threads
from flock.workflow import next_step, run_step

__all__ = ["TemporalWorker"]

logger = logging.getLogger("flock.temporal")

#: The longest text of an error that the cluster is given, in characters.
MAX_ERROR_CHARS = 100_000
#: After so many seconds a worker that died is not waited for to go on with a workflow that it knew.
STICKY_TIMEOUT_S = 2


class _Turn:
    """One agent's turn that is at work here."""

    def __init__(self, order: RunOrder) -> None:
        self.run = order.run
        self.order = order
        self.scope = anyio.CancelScope()
        self.context: RunContext | None = None
        self.begun_at: datetime | None = None
        self.progress: Progress | None = None
        self.done: Step | None = None
        self.failure: BaseException | None = None
        self.is_left = False

    def note_progress(self, progress: Progress) -> None:
        """Called from any thread; the next heartbeat tells it on."""
        self.progress = progress

    @property
    def beat(self) -> Beat:
        return Beat(begun_at=self.begun_at, progress=self.progress)

    def stop(self) -> None:
        if self.context is not None:
            self.context.cancel_requested = True
        self.scope.cancel()


class TemporalWorker:
    """Carries out runs of *agents* that a ``TemporalEngine`` of the same flock has accepted. Use it as an async context
    manager: it works inside it only. Any number of them, on any machines, share the work.

    Args:
        agents: by name.
        models: what model agents call; the worker closes it.
        address, namespace: of the cluster; see ``Cluster``.
        flock: the name under which runs are kept.
        observers: hear of what happens here; not of ends, which are the cluster's.
        max_concurrency: turns at work at the same time, in this process.
        max_threads: synchronous functions at work at the same time.
        max_steps, max_tokens, expose_errors: see ``EmbeddedEngine``.
        max_run_bytes: inputs and all results of one run together, as JSON; a result beyond it fails its run.
        drain_timeout_s: how long turns may go on when the worker stops; what is left then goes on elsewhere.

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
        max_concurrency: int = 100,
        max_threads: int = 40,
        max_steps: int = 32,
        max_tokens: int | None = None,
        max_run_bytes: int = 1_500_000,
        drain_timeout_s: float = 20,
        expose_errors: bool = False,
    ) -> None:
        self.cluster = Cluster(address, namespace=namespace)
        self.task_queue = task_queue_of(flock)
        self._agents = agents
        self._models = models
        self._observers = observers
        self._max_concurrency = max_concurrency
        self._max_steps = max_steps
        self._max_tokens = max_tokens
        self._max_run_bytes = max_run_bytes
        self._drain_timeout_s = drain_timeout_s
        self._expose_errors = expose_errors
        self._threads = Threads(max_threads)
        self._agent_slots: dict[str, Slots] = {}
        models.on_retry = lambda: self._tell("model_call_retried")

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._models)
            await self.cluster.connect(lazy=False)
            worker = Worker(
                self.cluster.client,
                task_queue=self.task_queue,
                workflows=[FlockRun, FlockMark],
                activities=[self._run_agent],
                workflow_runner=UnsandboxedWorkflowRunner(),  # all of their code is ours, and replays are tested
                max_concurrent_activities=self._max_concurrency,
                max_eager_activity_reservations_per_workflow_task=min(100, self._max_concurrency),
                max_heartbeat_throttle_interval=timedelta(seconds=HEARTBEAT_TIMEOUT_S / 3),
                sticky_queue_schedule_to_start_timeout=timedelta(seconds=STICKY_TIMEOUT_S),
                graceful_shutdown_timeout=timedelta(seconds=self._drain_timeout_s),
            )
            await stack.enter_async_context(worker)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Take no new turns, let those at work end, and leave the rest to other workers."""
        await self._exit.aclose()

    # One turn

    @activity.defn(name=ACTIVITY)
    async def _run_agent(self, order: RunOrder) -> StepDone:
        """Let the next agent of a run have its turn.

        Raises:
            ApplicationError: how the run ends, and is not to be tried again; or the worker leaves, and it is.
            CancelledError: it was to be cancelled, and has stopped.
        """
        turn = _Turn(order)
        # A task of its own takes with it whatever cancellation the agent's code leaves behind.
        work, beats = asyncio.create_task(self._work(turn)), asyncio.create_task(_tell_beats(turn))
        try:
            while not work.done():
                try:
                    await asyncio.wait([work])
                except asyncio.CancelledError:
                    if activity.is_worker_shutdown():
                        turn.is_left = True
                        self._threads.abandon(turn)
                    turn.stop()
        finally:
            beats.cancel()
        if turn.done is not None and turn.begun_at is not None:
            return StepDone(step=turn.done, begun_at=turn.begun_at, progress=turn.progress)
        if turn.is_left:
            raise ApplicationError("The worker stopped while this turn was at work.", type=INTERRUPTED)
        if turn.begun_at is not None and anyio.current_time() >= turn.scope.deadline:
            _end(turn, timeout_of(order.timeout_s))
        if turn.scope.cancel_called:
            raise asyncio.CancelledError(CANCELLED.error)
        _end(turn, failure_of(order.run, turn.failure, expose_errors=self._expose_errors))

    async def _work(self, turn: _Turn) -> None:
        try:
            with turn.scope:
                turn.done = await self._step(turn)
        except BaseException as exc:  # an agent's SystemExit would end the worker
            turn.failure = exc

    async def _step(self, turn: _Turn) -> Step:
        run = turn.run
        step = next_step(run, self._agents, self._max_steps)
        assert step is not None, "the workflow asks for no turn behind the last"
        if activity.info().attempt > 1 and step.agent.on_interrupt == "fail":
            raise interrupted_turn(step.agent.name)
        release = await self._admit(turn, step.agent)
        try:
            turn.begun_at = begun_at = now()
            left_s = turn.order.timeout_s
            if run.started_at is None:
                run = replace(run, status=RunStatus.RUNNING, started_at=begun_at)
                self._tell("run_started", run)
            else:
                left_s -= (begun_at - run.started_at).total_seconds()
            turn.scope.deadline = anyio.current_time() + left_s
            spend = functools.partial(self._tell, "tokens_spent", step.agent.name)
            turn.context = RunContext(run, step.agent.name, turn.note_progress, spend, self._max_tokens)
            turn.context.cancel_requested = turn.scope.cancel_called
            call_in_thread = functools.partial(
                self._threads.call, owner=turn, batch_id=None, deadline=turn.scope.deadline
            )
            done = await run_step(step, Resources(self._models, call_in_thread), turn.context)
            self._check_size(run, done)
            self._tell("step_completed", done)
            return done
        finally:
            self._threads.when_free(turn, release)

    async def _admit(self, turn: _Turn, agent: Agent) -> Callable[[], None]:
        """Wait for a place of the agent, if it has so many only. Returns what gives it back. Raises QueueTimeout."""
        if agent.max_concurrency is None:
            return lambda: None
        slots = self._agent_slots.setdefault(agent.name, Slots(agent.max_concurrency))
        with anyio.move_on_after(0) as at_once:
            await slots.acquire(None)
        if at_once.cancelled_caught:
            activity.heartbeat(turn.beat)  # it has not begun, though the cluster has it as started
            limit_s, left_s = turn.order.queue_timeout_s, None
            if limit_s is not None and turn.run.started_at is None:
                left_s = limit_s - (now() - activity.info().scheduled_time).total_seconds()
            with anyio.move_on_after(left_s) as waiting:
                await slots.acquire(None)
            if waiting.cancelled_caught:
                raise queue_timeout(limit_s or 0)
        return functools.partial(slots.release, None)

    def _check_size(self, run: Run, done: Step) -> None:
        """The cluster would refuse what is longer, and let the agent try again, who may have paid a model."""
        size = len(run.inputs) + sum(len(step.result) for step in (*run.steps, done))
        if size > self._max_run_bytes:
            raise ResultTooLarge(
                f"What {done.agent_name!r} gave has {len(done.result)} bytes, and inputs and results of the run "
                f"{size} together, more than the cluster keeps of one ({self._max_run_bytes}, max_run_bytes)."
            )

    def _tell(self, event: str, *about: Run | Step | Usage | str) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*about)
            except Exception:
                logger.exception("an observer failed at %s", event)


async def _tell_beats(turn: _Turn) -> None:
    while True:
        await asyncio.sleep(turn.order.heartbeat_timeout_s / 3)
        activity.heartbeat(turn.beat)


def _end(turn: _Turn, end: End) -> NoReturn:
    raise ApplicationError(
        end.error[:MAX_ERROR_CHARS], turn.beat, type=end.error_type, non_retryable=True
    ) from None  # what raised it is for the log only

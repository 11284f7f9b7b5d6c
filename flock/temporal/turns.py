"""One agent's turn in a worker, whether it is of a run or of an item of a batch.

What is done to a turn here is what ``flock.engine.runner`` does to a run: one cancel scope, within which whatever an
agent raises, cancels or leaves behind ends that turn and touches no other.
"""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime

import anyio
from msgspec.structs import replace
from temporalio import activity

from flock.agents.agent import Agent, Resources
from flock.agents.llm import ModelClient
from flock.agents.workflow import NextStep, next_step, run_step
from flock.engine.ends import End, failure_of, interrupted_turn, queue_timeout, timeout_of
from flock.engine.slots import Slots, acquire_all
from flock.engine.threads import Threads
from flock.errors import ResultTooLarge
from flock.limits import Limits
from flock.runs import Observer, Progress, Run, RunContext, RunStatus, Step, Usage, now

__all__ = ["MAX_RUN_BYTES", "Turn", "Turns", "is_left", "until_left"]

logger = logging.getLogger("flock.temporal")

#: Inputs and results of one run together, of the 2 MiB that the cluster takes at once.
MAX_RUN_BYTES = 1_500_000


async def until_left(drain_timeout_s: float) -> None:
    """Returns when the worker of this activity has waited for it for long enough, and stops without it.

    The SDK then cancels it, but for one that was cancelled before.
    """
    await activity.wait_for_worker_shutdown()
    await asyncio.sleep(drain_timeout_s)


def is_left() -> bool:
    """Whether this activity is cancelled since its worker stops."""
    details = activity.cancellation_details()
    return details is not None and details.worker_shutdown


class Turn:
    """The next turn of *run*.

    Args:
        timeout_s: wall-clock seconds for the attempt, from its first turn on.
        is_again: another worker may have begun it.
        begun_at: when another worker began it, if that was told.
        waits_s: how long it may wait for its place, and the limit of which that is the rest.
        tell_waiting: called when it has to wait for its place.
        keep: called with what it gave, while its heartbeats are sent.

    Attributes:
        begun_at: when it got its place, the first time.
        progress_when_done: as it is told with what it gave: a thread may go on telling.
        done, failure: what came of it.
        is_left: the worker stops, and others are to begin it anew.
    """

    def __init__(
        self,
        run: Run,
        timeout_s: float,
        *,
        is_again: bool = False,
        begun_at: datetime | None = None,
        waits_s: tuple[float, float] | None = None,
        tell_waiting: Callable[[], None] = lambda: None,
        keep: Callable[[Step], Awaitable[None]] | None = None,
    ) -> None:
        self.run = run
        self.timeout_s = timeout_s
        self.is_again = is_again
        self.waits_s = waits_s
        self.tell_waiting = tell_waiting
        self.keep = keep
        self.scope = anyio.CancelScope()
        self.context: RunContext | None = None
        self.begun_at = begun_at
        self.progress: Progress | None = None
        self.progress_when_done: Progress | None = None
        self.done: Step | None = None
        self.failure: BaseException | None = None
        self.is_left = False

    def note_progress(self, progress: Progress) -> None:
        """Called from any thread; the next heartbeat tells it on."""
        self.progress = progress

    def stop(self) -> None:
        if self.context is not None:
            self.context.cancel_requested = True
        self.scope.cancel()

    @property
    def is_late(self) -> bool:
        return self.begun_at is not None and anyio.current_time() >= self.scope.deadline


class Turns:
    """All turns of one worker; ``TemporalWorker`` describes the arguments.

    max_items: items of batches at work at the same time; the other places are kept for runs.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        observers: Sequence[Observer],
        *,
        limits: Limits,
        max_steps: int,
        max_run_bytes: int,
        expose_errors: bool,
    ) -> None:
        self._agents = agents
        self._models = models
        self._observers = observers
        self._max_steps = max_steps
        self._max_tokens = limits.max_tokens
        self._max_run_bytes = max_run_bytes
        self._expose_errors = expose_errors
        self._threads = Threads(limits.max_threads)
        reserved = limits.max_concurrency // 10
        self.max_items = limits.max_concurrency - reserved
        self._slots = Slots(limits.max_concurrency, reserved=reserved)
        self._agent_slots: dict[str, Slots] = {}

    async def take(self, turn: Turn) -> None:
        """Let the next agent of a run have its turn, whatever comes of it."""
        try:
            with turn.scope:
                turn.done = await self._step(turn)
        except BaseException as exc:  # an agent's SystemExit would end the worker
            turn.failure = exc

    def leave(self, turn: Turn) -> None:
        """Stop a turn since the worker stops."""
        turn.is_left = True
        self._threads.abandon(turn)
        turn.stop()

    def end_of(self, turn: Turn) -> End:
        """How a run ends whose turn gave nothing."""
        if turn.is_late:
            return timeout_of(turn.timeout_s)
        return failure_of(turn.run, turn.failure, expose_errors=self._expose_errors)

    def may_be_begun_once(self, run: Run) -> bool:
        """Whether the next turn of *run* is one that must not be begun a second time."""
        name = (run.steps[-1].next_agent if run.steps else None) or run.agent_name
        agent = self._agents.get(name)
        return agent is not None and agent.on_interrupt == "fail"

    def tell(self, event: str, *about: Run | Step | Usage | str) -> None:
        """Call the method *event* of each observer; what one of them gets wrong harms no run."""
        for observer in self._observers:
            try:
                getattr(observer, event)(*about)
            except Exception:
                logger.exception("an observer failed at %s", event)

    async def _step(self, turn: Turn) -> Step:
        run = turn.run
        step = next_step(run, self._agents, self._max_steps)
        assert step is not None, "nobody asks for a turn behind the last"
        if turn.is_again and step.agent.on_interrupt == "fail":
            raise interrupted_turn(step.agent.name)
        release = await self._admit(turn, step)
        try:
            turn.begun_at = turn.begun_at or now()
            left_s = turn.timeout_s
            if run.started_at is None:
                run = replace(run, status=RunStatus.RUNNING, started_at=turn.begun_at)
                self.tell("run_started", run)
            else:
                left_s -= (now() - run.started_at).total_seconds()
            turn.scope.deadline = anyio.current_time() + left_s
            spend = functools.partial(self.tell, "tokens_spent", step.agent.name)
            turn.context = RunContext(run, step.agent.name, turn.note_progress, spend, self._max_tokens)
            turn.context.cancel_requested = turn.scope.cancel_called
            call_in_thread = functools.partial(
                self._threads.call, owner=turn, batch_id=run.batch_id, deadline=turn.scope.deadline
            )
            done = await run_step(step, Resources(self._models, call_in_thread), turn.context)
            self._check_size(run, done)
            turn.progress_when_done = turn.progress
            if turn.keep is not None:  # here: a slow disk afterwards would look like a worker that died
                await turn.keep(done)
            self.tell("step_completed", done)
            return done
        finally:
            self._threads.when_free(turn, release)

    async def _admit(self, turn: Turn, step: NextStep) -> Callable[[], None]:
        """Wait for a place of the worker and of the agent. Returns what gives both back. Raises QueueTimeout."""
        slots, batch_id = [self._slots], turn.run.batch_id
        if step.agent.max_concurrency is not None:
            slots.append(self._agent_slots.setdefault(step.agent.name, Slots(step.agent.max_concurrency)))

        def release() -> None:
            for each in slots:
                each.release(batch_id)

        with anyio.move_on_after(0):
            await acquire_all(slots, batch_id)
            return release
        turn.tell_waiting()
        with anyio.move_on_after(turn.waits_s[0] if turn.waits_s else None):
            await acquire_all(slots, batch_id)
            return release
        raise queue_timeout(turn.waits_s[1] if turn.waits_s else 0)

    def _check_size(self, run: Run, done: Step) -> None:
        """The cluster would refuse what is longer, and let the agent try again, who may have paid a model."""
        size = len(run.inputs) + sum(len(step.result) for step in (*run.steps, done))
        limit = self._max_run_bytes
        if run.batch_id is not None:
            limit = min(limit, MAX_RUN_BYTES)  # heartbeats tell it, which go to the cluster always
        if size > limit:
            raise ResultTooLarge(
                f"What {done.agent_name!r} gave has {len(done.result)} bytes, and inputs and results of the run "
                f"{size} together, more than the cluster keeps of one ({limit}, max_run_bytes)."
            )

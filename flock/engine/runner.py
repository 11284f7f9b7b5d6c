"""Takes runs to their end: one turn after the other, and what is written when.

Only what is at work here is in memory, so that those who wait are told without asking the disk. For each await below:
if it is cancelled, the run ends in ``_finish``, which is shielded; if the process dies before a commit, the run goes on
after the last committed step at the next start; if it dies after one, that step is done.
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import asdict, replace

from flock.agents.agent import Agent
from flock.agents.llm import ModelClient
from flock.engine.logs import fields_of_run
from flock.engine.outcomes import failure_of
from flock.engine.rows import DAMAGED_RUN, Damaged
from flock.engine.store import RETRY_AFTER_S, Store
from flock.engine.takeover import INTERRUPTED
from flock.engine.turns import ActiveRun, Turns
from flock.errors import OwnershipLost, StoreError, Unreadable, Unstorable
from flock.limits import Limits
from flock.runs import Observer, Run, RunStatus, Step, now, stub_of

__all__ = ["Runner", "StoredRun", "current_task"]

logger = logging.getLogger("flock.runs")

#: How long the last write of a run may take when the engine is leaving, in seconds.
FINAL_WRITE_TIMEOUT_S = 5.0


class StoredRun(ActiveRun):
    """An active run whose record is in the store, and those who wait for it.

    Attributes:
        run: a stub while it waits, unless it is short.
    """

    def __init__(self, run: Run, runner: "Runner") -> None:
        queue_timeout_s = runner.limits.queue_timeout_s if run.batch_id is None else None  # items wait for each other
        super().__init__(
            run,
            runner.timeout_s_of(run),
            is_again=run.started_at is not None,  # it was at work when its process died
            queue_timeout_s=queue_timeout_s,
        )
        self._runner = runner
        #: called once it has a slot
        self.on_begin: Callable[[], None] | None = None
        #: how much of ``Runner.queued_bytes`` is its inputs
        self.queued_bytes = 0
        self.store_error: StoreError | None = None
        #: the run with its last step, which is not written yet
        self.unsaved: Run | None = None
        #: when the first of those who wait wants to be woken, by the loop's clock
        self.wake_at = math.inf
        self.is_interrupted = False
        #: what becomes of it is said by the store only: another engine has it now, or its record is damaged
        self.is_lost = False
        # Made only where somebody waits: an event takes longer than a step's record.
        self._change: anyio.Event | None = None
        self._end: anyio.Event | None = None
        if run.cancel_requested:
            self.cancel()

    @property
    def change(self) -> anyio.Event:
        """Set at the next change."""
        if self._change is None:
            self._change = anyio.Event()
        return self._change

    @property
    def end(self) -> anyio.Event:
        """Set at the end, or when those who wait for it should look what is the matter."""
        if self._end is None:
            self._end = anyio.Event()
        return self._end

    async def wait_begins(self) -> None:
        await self._runner.unload(self)

    async def begin(self) -> Run:
        return await self._runner.begin(self)

    async def started(self, run: Run, agent: Agent) -> None:
        await self._runner.save_start(self, run, agent)

    def update(self, run: Run) -> None:
        """The run is now *run*; wake those who wait for a change, and at its end all."""
        self.run = run
        if self._change is not None:
            self._change.set()
            self._change = None
        if run.status.is_final:
            self.wake()

    def wake(self) -> None:
        """Wake those who wait for the end, whether it has come or not."""
        if self._end is not None:
            self._end.set()
            self._end = None


class Runner:
    """Takes runs to their end, whatever their agents do; ``EmbeddedEngine`` describes the options.

    Attributes:
        active: all that are at work here or wait for it, by id.
        cancelled_before: the attempts of items that were cancelled before they began, by id.
        watch_task: a task of the engine that only the end of the event loop, or of the engine, cancels.
        is_draining: what cannot be written now is not tried again.
        queued_bytes: how long the inputs of runs are that wait for their first step, by their principal. Neither items
            of batches count nor what was taken over after a crash.
        turns: takes their turns.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        store: Store,
        observers: Sequence[Observer],
        *,
        limits: Limits,
        max_steps: int,
        expose_errors: bool,
    ) -> None:
        self._store = store
        self.limits = limits
        self._expose_errors = expose_errors

        self.active: dict[str, StoredRun] = {}
        self.cancelled_before: dict[str, int] = {}
        self.watch_task: asyncio.Task[Any] | None = None
        self.is_draining = False
        self.queued_bytes: Counter[str | None] = Counter()
        self.turns = Turns(
            agents,
            models,
            observers,
            limits=limits,
            max_steps=max_steps,
            expose_errors=expose_errors,
            max_result_bytes=limits.max_result_bytes,
        )

    def start(self, tasks: anyio.abc.TaskGroup, run: Run) -> None:
        """Take a run to its end in a task of its own."""
        tasks.start_soon(self._execute, self._admit(run))

    def execute(self, run: Run, on_begin: Callable[[], None]) -> Coroutine[Any, Any, None]:
        """Take a run to its end, and call *on_begin* when it has a slot. Raises if the engine is cancelled only.

        The coroutine does not hold *run*.
        """
        active = self._admit(run)
        active.on_begin = on_begin
        return self._execute(active)

    def _admit(self, run: Run) -> StoredRun:
        if self.cancelled_before.pop(run.run_id, None) == run.attempt:
            run = replace(run, cancel_requested=True)
        active = self.active[run.run_id] = StoredRun(run, self)
        if run.batch_id is None and not run.is_stub:
            active.queued_bytes = len(run.inputs)
            self.count_queued(run.principal, active.queued_bytes)
        return active

    def count_queued(self, principal: str | None, more_bytes: int) -> None:
        """Add to ``queued_bytes``."""
        self.queued_bytes[principal] += more_bytes
        if not self.queued_bytes[principal]:
            del self.queued_bytes[principal]

    def _dequeue(self, active: StoredRun) -> None:
        self.count_queued(active.run.principal, -active.queued_bytes)
        active.queued_bytes = 0

    def stop(self) -> None:
        """Stop all that is at work, since the engine is leaving."""
        for active in list(self.active.values()):
            self.turns.stop(active)

    async def interrupt(self, active: StoredRun) -> None:
        """The engine is going: what nobody waits for goes on at the next start, and all else ends here."""
        run = active.unsaved or active.run
        if not run.is_async or not self._store.is_shared:
            error, error_type = INTERRUPTED
            ended = replace(run, status=RunStatus.FAILED, error=error, error_type=error_type, completed_at=now())
            with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S), contextlib.suppress(StoreError, OwnershipLost, Unstorable):
                await self._store.save(ended, run.steps[-1] if active.unsaved is not None else None)
                self.turns.notify("run_ended", ended)
            active.run = ended
        active.is_interrupted = True
        active.update(active.run)
        active.wake()
        self._remove(active)

    async def _execute(self, active: StoredRun) -> None:
        end: dict[str, Any] | None = None
        failure: BaseException | None = None
        try:
            with active.scope:
                end = {"status": RunStatus.COMPLETED, "result": await self._steps(active)}
        except OwnershipLost:
            self._on_ownership_lost(active)
            return
        except BaseException as exc:
            # Within a cancelled scope the deadline is -inf. A cancellation without one comes from the agent's own code,
            # as every other exception does, whatever its class.
            if anyio.current_effective_deadline() == -math.inf:  # the engine is leaving
                if isinstance(exc, anyio.get_cancelled_exc_class()):
                    raise
                return  # it is not to fail by what an agent makes of that; __aexit__ says what becomes of the run
            if self.watch_task is not None and self.watch_task.cancelling():
                raise  # the event loop is ending, and cancels whatever is in it
            failure = exc
        if end is None:
            if active.is_stopped:
                await self.interrupt(active)
                return
            end = asdict(self.turns.outcome_of(active, failure))
        await _absorb_cancellation()
        if isinstance(failure, Unreadable) and not failure.is_writable:  # to write it would fail all of its group
            self._disown(active)
            return
        try:
            await self._finish(active, end)
        except Unstorable as exc:
            active.unsaved = None
            await self._finish(active, asdict(failure_of(active.run, exc, expose_errors=self._expose_errors)))

    async def _steps(self, active: StoredRun) -> msgspec.Raw:
        """Let one agent after the other have its turn. The last step is written together with the run's end."""
        while (active.unsaved or active.run).next_agent_name is not None:
            await self._step(active)
            if active.cancel_requested:
                raise anyio.get_cancelled_exc_class()
        run = active.unsaved or await self._load(active)
        if run.started_at is None:  # tried again, and there was nothing left to do
            active.update(replace(run, status=RunStatus.RUNNING, started_at=now()))
        return run.steps[-1].result

    async def _step(self, active: StoredRun) -> None:
        """Let the next agent have its turn, and write what came of it."""
        if self.is_draining:
            await anyio.lowlevel.checkpoint_if_cancelled()
        step = await self.turns.take(active)
        run = replace(active.run, steps=(*active.run.steps, step))
        await _absorb_cancellation()
        if step.next_agent is None:
            active.unsaved = run
        else:
            await self._save(active, run, step)

    async def begin(self, active: StoredRun) -> Run:
        """See ``ActiveRun.begin``. Raises: OwnershipLost, Unreadable."""
        self._dequeue(active)
        on_begin, active.on_begin = active.on_begin, None
        if on_begin is not None:
            on_begin()
        return await self._load(active)

    async def save_start(self, active: StoredRun, run: Run, agent: Agent) -> None:
        """See ``ActiveRun.started``."""
        if run.is_async and agent.on_interrupt == "fail":
            await self._save(active, run, None)  # who begins it a second time must know that it was begun
        else:
            self._store.save_nowait(run)
            active.update(run)
        if run.is_async and run.batch_id is None:
            self._store.flush_nowait()

    async def unload(self, active: StoredRun) -> None:
        """Hold only a stub of a run that waits for a slot."""
        is_in_store = active.run.is_async or active.run.status is not RunStatus.STARTING
        if not is_in_store and stub_of(active.run).is_stub:
            await self._save(active, active.run, None)
            is_in_store = True
        if is_in_store:
            active.run = stub_of(active.run)

    async def _load(self, active: StoredRun) -> Run:
        """The run with what was left in the store, trying again as long as that cannot be read.

        Raises: OwnershipLost; Unreadable if its record is damaged.
        """
        while active.run.is_stub:
            try:
                found = self._store.get_run(active.run.run_id)
            except StoreError as exc:
                if isinstance(exc.__cause__, Damaged):
                    raise _unreadable(exc.__cause__) from exc
                active.store_error = exc
                active.wake()
                await anyio.sleep(RETRY_AFTER_S)
                continue
            active.store_error = None
            if found is None or found.status.is_final or found.attempt != active.run.attempt:
                raise OwnershipLost(active.run.run_id)
            if found.batch_id is None and found.owner != active.run.owner:
                raise OwnershipLost(active.run.run_id)
            active.run = replace(found, owner=active.run.owner, progress=active.progress)
        return active.run

    def timeout_s_of(self, run: Run) -> float:
        """How long one attempt may take, in seconds."""
        return min(run.timeout_s or self.limits.max_timeout_s, self.limits.max_timeout_s)

    async def _save(self, active: StoredRun, run: Run, step: Step | None) -> None:
        """Write *run* and tell those who wait, trying again as long as the store cannot be written."""
        with anyio.CancelScope(shield=True) if self._store.is_shared else contextlib.nullcontext():
            while True:
                try:
                    await self._store.save(run, step)
                    break
                except StoreError as exc:
                    if self.is_draining:
                        raise
                    active.store_error = exc
                    active.wake()
                    await anyio.sleep(RETRY_AFTER_S)
        active.store_error = None
        active.update(run)

    async def _finish(self, active: StoredRun, end: Mapping[str, Any]) -> None:
        run = active.unsaved or active.run
        step = run.steps[-1] if active.unsaved is not None else None
        run = replace(run, **end, completed_at=now(), progress=active.progress)
        try:
            await self._save(active, run, step)
        except OwnershipLost:
            self._on_ownership_lost(active)
            return
        except StoreError as exc:
            logger.warning("run %s: its end was not written: %s", run.run_id, exc)
            await self.interrupt(active)
            return
        except Unstorable as exc:
            if active.unsaved is not None:  # it may be possible without its last step
                raise
            logger.error("run %s: its end cannot be kept: %s %s", run.run_id, exc, exc.log_detail)
            self._store.discard(run.run_id)
            active.update(run)
        self._remove(active)
        self.turns.notify("run_ended", run)
        level = logging.INFO if run.batch_id is None else logging.DEBUG  # of a million items the batch tells
        if logger.isEnabledFor(level):
            took_ms = round((now() - run.created_at).total_seconds() * 1000)
            template = "run %s: %s, agent %s, %d ms (request %s)"
            extra = fields_of_run(run) | {"status": run.status.value, "duration_ms": took_ms}
            logger.log(level, template, run.run_id, run.status, run.agent_name, took_ms, run.request_id, extra=extra)

    def _remove(self, active: StoredRun) -> None:
        self._dequeue(active)
        if self.active.get(active.run.run_id) is active:
            del self.active[active.run.run_id]

    def _on_ownership_lost(self, active: StoredRun) -> None:
        """Those who wait for the run hear of it from the store from now on."""
        logger.warning("run %s: another engine has taken it over", active.run.run_id)
        self._disown(active)

    def _disown(self, active: StoredRun) -> None:
        active.is_lost = True
        self._remove(active)
        active.update(active.run)
        active.wake()


def _unreadable(damage: Damaged) -> Unreadable:
    error = Unreadable(DAMAGED_RUN)
    error.is_writable, error.log_detail = damage.is_writable, str(damage)
    return error


def current_task() -> "asyncio.Task[Any] | None":
    """Another event loop than asyncio's has no such thing."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


async def _absorb_cancellation() -> None:
    """Take in a cancellation that an agent asked for its own task and has not met: it would hit what comes next."""
    task = current_task()
    while task is not None and task.cancelling() and anyio.current_effective_deadline() != -math.inf:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise
        task.uncancel()

"""The engine inside this process: each run is a task of one anyio task group that lives as long as the engine.

What is accepted lies in a store, and so does every step. Only what is at work here is in memory as well, so that those
who wait are told without asking the disk. Several engines may share one store: each works on the runs that it owns, and
a watch looks 20 times a second whether anything was committed elsewhere.

For each await below: if it is cancelled, the run ends in `_finish`, which is shielded; if the process dies before a
commit, the run goes on after the last committed step at the next start; if it dies after one, that step is done.
"""

import asyncio
import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Self

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents import Agent, Resources
from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    Conflict,
    EngineFull,
    EngineStopped,
    FieldError,
    Interrupted,
    InvalidData,
    OwnershipLost,
    QueueTimeout,
    RunNotFound,
    StepError,
    StoreError,
)
from flock.llm import ModelClient
from flock.runs import (
    Batch,
    BatchOptions,
    Event,
    IdempotencyKey,
    Progress,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    Step,
    events_of,
    make_ids_after,
    new_id,
    now,
)
from flock.schema import INTERRUPTED
from flock.store import RETRY_AFTER_S, Store
from flock.threads import Threads
from flock.workflow import NextStep, next_step, run_step

__all__ = ["EmbeddedEngine"]

logger = logging.getLogger("flock.runs")

#: How many errors of a batch's items are told at once.
MAX_ITEM_ERRORS = 100
#: How often the store is asked for what others did, in seconds.
WATCH_INTERVAL_S = 0.05
#: How often other engines are looked after, in seconds.
TAKE_OVER_INTERVAL_S = 1.0
#: How often old runs are deleted, in seconds, and how many in one transaction.
RETENTION_INTERVAL_S = 10.0
RETENTION_BITE = 500
#: How long an event stream may be silent, in seconds.
KEEP_ALIVE_S = 15.0
#: How many items of a batch are read at once.
ITEMS_A_PAGE = 200
#: How long an idempotency key is kept.
KEEP_KEYS_FOR = timedelta(hours=24)
#: How long the last write of a run may take when the engine is leaving, in seconds.
FINAL_WRITE_TIMEOUT_S = 5.0


class _Active:
    """A run that this engine works on, or will."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.scope = anyio.CancelScope()
        self.context: RunContext | None = None
        self.cancel_requested = run.cancel_requested
        self.store_error: StoreError | None = None
        #: the run with its last step, which is not written yet
        self.unsaved: Run | None = None
        self.progress: Progress | None = run.progress
        #: when the first of those who wait wants to be woken, by the loop's clock
        self.wake_at = math.inf
        #: it was cancelled since the engine is leaving
        self.is_stopped = False
        self.is_left = False
        #: another engine has it now
        self.is_lost = False
        # Made only where somebody waits: an event takes longer than a step's record.
        self._change: anyio.Event | None = None
        self._end: anyio.Event | None = None
        if run.cancel_requested:
            self.scope.cancel()

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

    def note_progress(self, progress: Progress) -> None:
        """Called from any thread; the watch tells it on."""
        self.progress = progress

    def tell(self, run: Run) -> None:
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


class EmbeddedEngine:
    """``Engine`` on anyio task groups over a ``Store``.

    Args:
        agents: by name; read at each submission, so agents added later are found.
        models: what model agents call; the engine closes it.
        store: where runs are kept; the engine opens and closes it.
        flock: the name under which runs are kept; an engine takes up only those of its own.
        max_concurrency: steps at work at the same time, in this process.
        max_queue: runs accepted and waiting, in all processes on the store.
        max_items: items of all unfinished batches together.
        max_threads: synchronous functions at work at the same time.
        max_steps: how often one run may be handed on.
        max_timeout_s: the longest that one attempt of a run may take, and what it may take where nobody says less.
        queue_timeout_s: the longest that a run may wait for its first step; None is no limit.
        keep_for_s, keep_runs: final runs that are older, or beyond the newest so many, are deleted; None keeps them. A
            batch counts as one.
        expose_errors: put the text of any exception into a run's ``error``; for development.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        store: Store,
        *,
        flock: str = "flock",
        max_concurrency: int = 100,
        max_queue: int = 10_000,
        max_items: int = 10_000,
        max_threads: int = 40,
        max_steps: int = 32,
        max_timeout_s: float = 86_400,
        queue_timeout_s: float | None = None,
        keep_for_s: float | None = None,
        keep_runs: int | None = None,
        expose_errors: bool = False,
    ) -> None:
        self.store = store
        self._agents = agents
        self._models = models
        self._flock = flock
        self._max_concurrency = max_concurrency
        self._max_queue = max_queue
        self._max_items = max_items
        self._max_threads = max_threads
        self._max_steps = max_steps
        self._max_timeout_s = max_timeout_s
        self._queue_timeout_s = queue_timeout_s
        self._keep_for_s = keep_for_s
        self._keep_runs = keep_runs
        self._expose_errors = expose_errors

        self._engine_id = ""
        self._active: dict[str, _Active] = {}
        self._accepting: set[str] = set()
        self._agent_slots: dict[str, anyio.Semaphore] = {}
        self._store_changed = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None
        self.is_leaving = False

    # Life

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise EngineStopped("This engine is running already.")
        self._engine_id = new_id()
        self._slots = anyio.Semaphore(self._max_concurrency)
        self._agent_slots.clear()
        self.is_leaving = False
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            await stack.enter_async_context(self._models)
            self._threads = Threads(self._max_threads)
            with self._entering():
                await self.store.enter(self._engine_id, self._flock)
                if (newest := self.store.last_id()) is not None:
                    with contextlib.suppress(ValueError):  # of a damaged file; what reads it says so
                        make_ids_after(newest)
            self._exit = stack.pop_all()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            with self._entering():
                await self._take_over()
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks.start_soon(self._watch)
        self._tasks.start_soon(self._retain)
        return self

    @contextlib.contextmanager
    def _entering(self) -> Iterator[None]:
        try:
            yield
        except StoreError as exc:
            raise StoreError(
                f"The store {self.store.path!r} cannot be used: {exc.__cause__ or exc}. Make room on its disk if that "
                "is full; otherwise restore it, or name another file (store=, --store)."
            ) from exc

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop what is at work; asynchronous runs go on at the next start, the others end as interrupted."""
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        self.is_leaving = True
        tasks.cancel_scope.cancel()
        for active in self._active.values():
            self._threads.abandon(active)
        await tasks.__aexit__(None, None, None)
        with anyio.CancelScope(shield=True):
            async with anyio.create_task_group() as leaving:  # together: they share one time-out
                for active in list(self._active.values()):
                    leaving.start_soon(self._leave, active)
            with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S), contextlib.suppress(StoreError):
                await self.store.leave(self._engine_id)
        await self._exit.aclose()

    async def drain(self, timeout_s: float) -> None:
        self.is_leaving = True
        self._tell_store_changed()
        for active in self._active.values():
            active.tell(active.run)  # event streams end
        for seconds in (timeout_s, FINAL_WRITE_TIMEOUT_S):
            with anyio.move_on_after(seconds):
                while self._active:
                    await next(iter(self._active.values())).change.wait()
            for active in list(self._active.values()):
                active.is_stopped = True
                self._threads.abandon(active)
                active.scope.cancel()

    def _running_tasks(self) -> anyio.abc.TaskGroup:
        if self._tasks is None:
            raise EngineStopped("The engine is not running: enter it with 'async with', or run the app's lifespan.")
        if self.is_leaving:
            raise EngineStopped("The server is about to stop and takes no new work.")
        return self._tasks

    def check_ready(self) -> None:
        self._running_tasks()
        self.store.check_writable()

    # Runs

    async def submit(
        self,
        agent_name: str,
        inputs: msgspec.Raw,
        *,
        request_id: str | None = None,
        is_async: bool = True,
        timeout_s: float | None = None,
        key: IdempotencyKey | None = None,
    ) -> Run:
        tasks = self._running_tasks()
        self._agent(agent_name).input.decode(inputs, "/inputs")
        # The copy lets go of the request's body, of which a Raw is only a view.
        run = self._new_run(agent_name, msgspec.Raw(bytes(inputs)), request_id, is_async=is_async, timeout_s=timeout_s)
        if not is_async and key is None:
            # Its end is written and waited for; its start is worth nothing without a caller.
            if len(self._active) >= self._max_concurrency + self._max_queue:
                raise EngineFull(
                    f"{len(self._active)} runs are waiting already, all that this server takes (max_queue)."
                )
            self.store.save_nowait(run, is_new=True)
        else:
            # Shielded: what is written would wait for ever if its caller were cancelled before it is started.
            with anyio.CancelScope(shield=True):
                async with self._accepting_key(key):
                    await self.store.accept(run, self._max_queue, key)
        self._start(tasks, run)
        return run

    async def get_run(self, run_id: str) -> Run:
        if run_id in self._active:
            return self._active[run_id].run
        run = self.store.get_run(run_id)
        if run is None or run.flock != self._flock:
            raise RunNotFound(run_id)
        return run

    async def wait_run(self, run_id: str, timeout_s: float | None = None) -> Run:
        deadline = math.inf if timeout_s is None else anyio.current_time() + timeout_s
        active = self._active.get(run_id)
        while active is not None and not active.is_lost:
            if active.run.status.is_final:
                return active.run
            if active.store_error is not None:
                raise active.store_error
            if active.is_left:
                raise EngineStopped("The server stopped before this run ended; it goes on at the next start.")
            if timeout_s is not None and anyio.current_time() >= deadline:
                return active.run
            active.wake_at = min(active.wake_at, deadline)  # the watch sees to it: a timer for each takes longer
            await active.end.wait()
        with anyio.CancelScope(deadline=deadline):
            while not (run := await self.get_run(run_id)).status.is_final:
                await self._store_changed.wait()
            return run
        return await self.get_run(run_id)

    async def cancel_run(self, run_id: str) -> Run:
        active = self._active.get(run_id)
        if active is None:
            run = await self.get_run(run_id)
            if not run.status.is_final and await self.store.request_cancel(run_id):
                return await self.get_run(run_id)
            run = await self.get_run(run_id)
            if run.status is not RunStatus.CANCELLED:
                raise Conflict(f"The run {run_id} is {run.status} and cannot be cancelled any more.")
            return run
        self._cancel(active)
        return active.run

    async def retry_run(self, run_id: str) -> Run:
        tasks = self._running_tasks()
        run = await self.get_run(run_id)
        reopened = None
        if run.batch_id is None and run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
            with anyio.CancelScope(shield=True):
                reopened = await self.store.reopen(run_id, self._flock, self._engine_id, self._max_queue)
        if reopened is None:
            what = "an item of a batch" if run.batch_id else (await self.get_run(run_id)).status
            raise Conflict(f"The run {run_id} is {what}; only a run that failed or was cancelled can be tried again.")
        self._start(tasks, reopened)
        return reopened

    async def delete_run(self, run_id: str) -> None:
        run = await self.get_run(run_id)
        if run.batch_id is not None or not await self.store.delete_run(run_id):
            what = "an item of a batch" if run.batch_id else f"still {(await self.get_run(run_id)).status}"
            raise Conflict(f"The run {run_id} is {what} and cannot be deleted. Cancel it first, or wait for its end.")

    async def list_runs(self, wanted: RunFilter) -> Sequence[Run]:
        return self.store.list_runs(self._flock, wanted)

    async def events(self, run_id: str, after: int = 0) -> AsyncIterator[Event | None]:
        told: Progress | None = None
        while True:
            active = self._active.get(run_id)
            changed = active.change if active else self._store_changed
            run = active.run if active else await self.get_run(run_id)
            for event in events_of(run):
                if event.id is None:
                    if run.progress != told:
                        told = run.progress
                        yield event
                elif event.id > after:
                    after = event.id
                    yield event
            if run.status.is_final or self.is_leaving:
                return
            if changed.is_set():
                continue
            with anyio.move_on_after(KEEP_ALIVE_S) as silence:
                await changed.wait()
            if silence.cancelled_caught:
                yield None

    def _agent(self, name: str) -> Agent:
        try:
            return self._agents[name]
        except KeyError:
            raise AgentNotFound(name, list(self._agents)) from None

    def _new_run(self, agent_name: str, inputs: msgspec.Raw, request_id: str | None, **more: Any) -> Run:
        return Run(
            run_id=new_id(),
            flock=self._flock,
            agent_name=agent_name,
            inputs=inputs,
            created_at=now(),
            request_id=request_id,
            owner=self._engine_id,
            **more,
        )

    @asynccontextmanager
    async def _accepting_key(self, key: IdempotencyKey | None) -> AsyncIterator[None]:
        """Only one request with a key at a time; a later one is a replay."""
        if key is None:
            yield
            return
        if key.key in self._accepting:
            raise Conflict(f"A request with the idempotency key {key.key!r} is being accepted at this moment.")
        self._accepting.add(key.key)
        try:
            yield
        finally:
            self._accepting.discard(key.key)

    def _start(self, tasks: anyio.abc.TaskGroup, run: Run) -> None:
        active = self._active[run.run_id] = _Active(run)
        tasks.start_soon(self._carry_out, active)

    def _cancel(self, active: _Active) -> None:
        active.cancel_requested = True
        if active.context is not None:
            active.context.cancel_requested = True
        active.scope.cancel()

    # The way of one run

    async def _carry_out(self, active: _Active) -> None:
        """Take a run to its end, whatever its agents do. Only a cancellation of the engine comes out of here."""
        end: dict[str, Any] = {}
        try:
            with active.scope:
                end = {"status": RunStatus.COMPLETED, "result": await self._steps(active)}
        except OwnershipLost:
            self._lose(active)
            return
        except BaseException as exc:
            # Within a cancelled scope the deadline is -inf. A cancellation without one comes from the agent's own code,
            # as every other exception does, whatever its class.
            if anyio.current_effective_deadline() == -math.inf:
                raise  # the engine is leaving; __aexit__ says what becomes of the run
            end = self._failure(active.run, exc)
        if active.is_stopped and end.get("status") is not RunStatus.COMPLETED:
            await self._leave(active)
            return
        if end.get("status") is not RunStatus.COMPLETED:
            if anyio.current_time() >= active.scope.deadline:
                end = self._timeout(active)
            elif active.cancel_requested:
                end = {"status": RunStatus.CANCELLED, "error": "The run was cancelled.", "error_type": "cancelled"}
        await _absorb_cancellation()
        await self._finish(active, end)

    async def _steps(self, active: _Active) -> msgspec.Raw:
        """Let one agent after the other have its turn. The last step is written together with the run's end."""
        run = active.run
        if run.started_at is not None:  # it was at work when its process died
            self._check_interrupted(run)
        while (step := next_step(run, self._agents, self._max_steps)) is not None:
            run = await self._turn(active, run, step)
            await _absorb_cancellation()
            if run.steps[-1].next_agent is None:
                active.unsaved = run
            else:
                await self._save(active, run, run.steps[-1])
            if active.cancel_requested:
                raise anyio.get_cancelled_exc_class()
        return run.steps[-1].result

    async def _turn(self, active: _Active, run: Run, step: NextStep) -> Run:
        """One agent's turn, within a slot of the engine and of the agent; a thread that hangs keeps both."""
        release = await self._admit(active, step.agent)
        try:
            if run.status is RunStatus.STARTING:
                timeout_s = min(run.timeout_s or self._max_timeout_s, self._max_timeout_s)
                active.scope.deadline = anyio.current_time() + timeout_s
                run = replace(run, status=RunStatus.RUNNING, started_at=now())
                if run.is_async and step.agent.on_interrupt == "fail":
                    await self._save(active, run, None)  # who begins it a second time must know that it was begun
                else:
                    self.store.save_nowait(run)
                    active.tell(run)
                if run.is_async and run.batch_id is None:
                    self.store.flush_nowait()
            context = active.context = RunContext(run, step.agent.name, active.note_progress)
            context.cancel_requested = active.cancel_requested
            call_in_thread = functools.partial(self._threads.call, owner=active, deadline=active.scope.deadline)
            done = await run_step(step, Resources(self._models, call_in_thread), context)
            return replace(run, steps=(*run.steps, done))
        finally:
            active.context = None
            self._threads.when_free(active, release)

    async def _admit(self, active: _Active, agent: Agent) -> Callable[[], None]:
        """Wait for a place of the agent, then for one of the engine, first come, first served.

        Returns: what gives both back. Raises QueueTimeout.
        """
        slots = [self._slots]
        if agent.max_concurrency is not None:
            slots.insert(0, self._agent_slots.setdefault(agent.name, anyio.Semaphore(agent.max_concurrency)))
        taken: list[anyio.Semaphore] = []

        def release() -> None:
            while taken:
                taken.pop().release()

        await anyio.lowlevel.checkpoint_if_cancelled()
        limit_s = self._queue_timeout_s if active.run.status is RunStatus.STARTING else None
        deadline = math.inf if limit_s is None else anyio.current_time() + limit_s
        try:
            for slot in slots:
                try:
                    slot.acquire_nowait()
                except anyio.WouldBlock:
                    with anyio.CancelScope(deadline=deadline) as waiting:
                        await slot.acquire()
                    if waiting.cancelled_caught:
                        raise QueueTimeout(
                            f"The run waited {limit_s:g} s for its first step, the limit (queue_timeout_s)."
                        ) from None
                taken.append(slot)
        except BaseException:
            release()
            raise
        return release

    def _check_interrupted(self, run: Run) -> None:
        name = (run.steps[-1].next_agent if run.steps else None) or run.agent_name
        agent = self._agents.get(name)
        if agent is not None and agent.on_interrupt == "fail":
            raise Interrupted(f"The server stopped while {name!r} was at work, which asks not to be begun again.")

    async def _save(self, active: _Active, run: Run, step: Step | None) -> None:
        """Write *run* and tell those who wait, trying again as long as the store cannot be written."""
        with anyio.CancelScope(shield=True) if self.store.is_shared else contextlib.nullcontext():
            while True:
                try:
                    await self.store.save(run, step)
                    break
                except StoreError as exc:
                    if self.is_leaving:
                        raise
                    active.store_error = exc
                    active.wake()
                    await anyio.sleep(RETRY_AFTER_S)
        active.store_error = None
        active.tell(run)

    async def _finish(self, active: _Active, end: Mapping[str, Any]) -> None:
        run = active.unsaved or active.run
        step = run.steps[-1] if active.unsaved is not None else None
        for name in ("error", "error_type"):
            end = {**end, name: _sayable(end.get(name))}
        run = replace(run, **end, completed_at=now(), progress=active.progress)
        try:
            await self._save(active, run, step)
        except OwnershipLost:
            self._lose(active)
            return
        except StoreError as exc:
            logger.warning("run %s: its end was not written: %s", run.run_id, exc)
            await self._leave(active)
            return
        self._forget(active)
        if logger.isEnabledFor(logging.INFO):
            took_ms = (now() - run.created_at).total_seconds() * 1000
            template = "run %s: %s, agent %s, %d ms (request %s)"
            logger.info(template, run.run_id, run.status, run.agent_name, took_ms, run.request_id)

    def _forget(self, active: _Active) -> None:
        self._active.pop(active.run.run_id, None)

    def _lose(self, active: _Active) -> None:
        """Those who wait for the run hear of it from the store from now on."""
        logger.warning("run %s: another engine has taken it over", active.run.run_id)
        active.is_lost = True
        self._forget(active)
        active.tell(active.run)
        active.wake()

    async def _leave(self, active: _Active) -> None:
        """The engine is going: what nobody waits for goes on at the next start, and all else ends here."""
        run = active.unsaved or active.run
        if not run.is_async or not self.store.is_shared:
            error, error_type = INTERRUPTED
            ended = replace(run, status=RunStatus.FAILED, error=error, error_type=error_type, completed_at=now())
            with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S), contextlib.suppress(StoreError, OwnershipLost):
                await self.store.save(ended, run.steps[-1] if active.unsaved is not None else None)
            active.run = ended
        active.is_left = True
        active.tell(active.run)
        active.wake()
        self._forget(active)

    def _timeout(self, active: _Active) -> dict[str, Any]:
        timeout_s = min(active.run.timeout_s or self._max_timeout_s, self._max_timeout_s)
        error = f"The run did not end within {timeout_s:g} s (timeout_s)."
        return {"status": RunStatus.FAILED, "error": error, "error_type": "timeout"}

    def _failure(self, run: Run, exc: BaseException) -> dict[str, Any]:
        """How a run ends that ended in an exception: what of it is for the client, and the rest for the log."""
        while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
            exc = exc.exceptions[0]
        if isinstance(exc, StepError):
            logger.warning("run %s: %s %s (request %s)", run.run_id, exc, exc.log_detail, run.request_id)
            return {"status": RunStatus.FAILED, "error": str(exc), "error_type": exc.error_type}
        agent_name = run.steps[-1].next_agent if run.steps else run.agent_name
        logger.error("run %s: agent %s raised (request %s)", run.run_id, agent_name, run.request_id, exc_info=exc)
        error = f"The agent {agent_name!r} raised {type(exc).__name__}"
        where = f"request {run.request_id}" if run.request_id else f"run {run.run_id}"
        error += f": {exc}" if self._expose_errors else f"; the server's log has more under {where}."
        return {"status": RunStatus.FAILED, "error": error, "error_type": "agent_exception"}

    # What goes on beside the runs

    async def _watch(self) -> None:
        """Look for what others did, and for others that are gone; 20 times a second, at a cost of microseconds."""
        version, look_after_others_at = -1, anyio.current_time() + TAKE_OVER_INTERVAL_S
        while True:
            await anyio.sleep(WATCH_INTERVAL_S)
            at = anyio.current_time()
            for active in list(self._active.values()):
                if active.progress is not active.run.progress:
                    active.tell(replace(active.run, progress=active.progress))
                    self.store.save_nowait(active.run)
                if at >= active.wake_at:
                    active.wake_at = math.inf
                    active.wake()
            self.store.flush_nowait()
            try:
                seen = self.store.data_version() if self.store.is_shared else version - 1
                if seen != version:
                    version = seen
                    self._tell_store_changed()
                    for run_id in self.store.cancels_for(self._engine_id):
                        if run_id in self._active:
                            self._cancel(self._active[run_id])
                if self.store.is_shared and at >= look_after_others_at:
                    look_after_others_at = at + TAKE_OVER_INTERVAL_S
                    if not await self.store.remain(self._engine_id, self._flock):
                        logger.warning("another engine has taken over what this one had; it goes on with new work")
                    await self._take_over()
            except StoreError as exc:
                logger.error("the store cannot be watched: %s", exc)

    def _tell_store_changed(self) -> None:
        changed, self._store_changed = self._store_changed, anyio.Event()
        changed.set()

    async def _take_over(self) -> None:
        """Go on with what engines left whose process is gone."""
        for dead_id in self.store.dead_engines(self._flock, self._engine_id) if self.store.is_shared else ():
            runs, batches = await self.store.take_over(dead_id, self._engine_id, now())
            if runs or batches:
                logger.info("going on with %d runs and %d batches of an engine that is gone", len(runs), len(batches))
            tasks = self._tasks
            assert tasks is not None
            for run in runs:
                self._start(tasks, run)
            for batch in batches:
                tasks.start_soon(self._batch_task, batch)

    async def _retain(self) -> None:
        """Delete what is too old, in small bites."""
        while True:
            await anyio.sleep(RETENTION_INTERVAL_S)
            with contextlib.suppress(StoreError):
                await self.store.forget_keys(now() - KEEP_KEYS_FOR)
                await self.delete_old()

    async def delete_old(self) -> None:
        """Delete final runs that are older than ``keep_for_s`` or beyond the newest ``keep_runs``."""
        before = None if self._keep_for_s is None else now() - timedelta(seconds=self._keep_for_s)
        if before is None and self._keep_runs is None:
            return
        while await self.store.delete_old(self._flock, before, self._keep_runs, RETENTION_BITE):
            await anyio.lowlevel.checkpoint()

    # Batches

    async def submit_batch(
        self,
        agent_name: str,
        items: Sequence[msgspec.Raw],
        options: BatchOptions,
        *,
        request_id: str | None = None,
        key: IdempotencyKey | None = None,
    ) -> Batch:
        self._running_tasks()
        if len(items) > self._max_items:
            detail = f"{len(items)} items are more than this server takes in a batch ({self._max_items}, max_items)."
            raise InvalidData([FieldError(detail=detail, pointer="/batch_inputs")])
        await _check_items(self._agent(agent_name), items)
        tasks = self._running_tasks()
        batch = Batch(
            batch_id=new_id(),
            flock=self._flock,
            agent_name=agent_name,
            options=options,
            total_items=len(items),
            created_at=now(),
            request_id=request_id,
            owner=self._engine_id,
        )
        runs = [
            self._new_run(agent_name, item, request_id, batch_id=batch.batch_id, position=position, is_async=True)
            for position, item in enumerate(items)
        ]
        with anyio.CancelScope(shield=True):
            async with self._accepting_key(key):
                await self.store.accept_batch(batch, runs, self._max_items, key)
        tasks.start_soon(self._batch_task, batch)
        return batch

    async def get_batch(self, batch_id: str) -> Batch:
        batch = self.store.get_batch(batch_id)
        if batch is None or batch.flock != self._flock:
            raise BatchNotFound(batch_id)
        return batch

    async def get_items(self, batch_id: str, *, after: int = -1, limit: int = 1000) -> Sequence[Run]:
        await self.get_batch(batch_id)
        return self.store.get_items(batch_id, after, limit)

    async def _batch_task(self, batch: Batch) -> None:
        """Work on a batch until no item is left, beginning again as long as the store fails."""
        batch = replace(batch, status=RunStatus.RUNNING, started_at=batch.started_at or now())
        workers = min(batch.options.max_workers, batch.total_items) if batch.options.parallel else 1
        while not self.is_leaving:
            try:
                await self.store.update_batch(batch)
                items = self._unfinished_items(batch.batch_id)
                async with anyio.create_task_group() as tasks:
                    for _ in range(workers):
                        tasks.start_soon(self._work_through, items)
                if not self.is_leaving and not self.store.unfinished_items(batch.batch_id, -1, 1):
                    await self._end_batch(batch)
                    return
            except OwnershipLost:
                logger.warning("batch %s: another engine has taken it over", batch.batch_id)
                return
            except StoreError as exc:
                logger.error("batch %s: %s", batch.batch_id, exc)
            await anyio.sleep(RETRY_AFTER_S)

    def _unfinished_items(self, batch_id: str) -> Iterator[Run]:
        """Items that are still to be done, read from the store in pages."""
        after = -1
        while page := self.store.unfinished_items(batch_id, after, ITEMS_A_PAGE):
            yield from page
            after = page[-1].position or 0

    async def _work_through(self, items: Iterator[Run]) -> None:
        try:
            for item in items:  # shared with the batch's other workers
                if self.is_leaving:
                    return
                active = self._active[item.run_id] = _Active(item)
                await self._carry_out(active)
        except StoreError as exc:  # the next page cannot be read
            logger.error("items cannot be read: %s", exc)

    async def _end_batch(self, batch: Batch) -> None:
        counted = await self.get_batch(batch.batch_id)
        error = None
        if counted.failed_items + counted.cancelled_items == counted.total_items:
            first = self.store.get_items(batch.batch_id, -1, 1)[0]
            error = f"None of the {batch.total_items} items completed. The first one: {first.error}"
        status = RunStatus.COMPLETED if error is None else RunStatus.FAILED
        await self.store.update_batch(replace(batch, status=status, error=error, completed_at=now()))


def _sayable(text: object) -> str | None:
    """A text that can be kept and sent: agents may put anything into their errors, lone surrogates too."""
    return None if text is None else str(text).encode("utf-8", "replace").decode()


async def _absorb_cancellation() -> None:
    """Take in a cancellation that an agent asked for its own task and has not met: it would hit what comes next."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # another event loop than asyncio's has no such thing
        return
    while task is not None and task.cancelling() and anyio.current_effective_deadline() != -math.inf:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise
        task.uncancel()


async def _check_items(agent: Agent, items: Sequence[msgspec.Raw]) -> None:
    """Raise InvalidData with up to ``MAX_ITEM_ERRORS`` errors of all items, or if there is no item."""
    errors: list[FieldError] = []
    if not items:
        errors.append(FieldError(detail="A batch has at least one item.", pointer="/batch_inputs"))
    for position, item in enumerate(items):
        if position % 1000 == 999:
            await anyio.lowlevel.checkpoint()  # others have their turn
        try:
            agent.input.decode(item, f"/batch_inputs/{position}")
        except InvalidData as exc:
            errors += exc.errors
        if len(errors) >= MAX_ITEM_ERRORS:
            break
    if errors:
        raise InvalidData(errors[:MAX_ITEM_ERRORS])

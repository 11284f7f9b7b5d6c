"""Executes runs step by step, and writes their records to the store.

Active runs are in memory, so that waiting callers are notified without reading the disk. For each await below: if it is
cancelled, the run ends in ``_finish``, which is shielded. If the process dies, the run is resumed after its last
committed step at the next start.
"""

import asyncio
import contextlib
import functools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextvars import Context
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import asdict, replace

from flock.agents.agent import Agent, ModelAgent
from flock.engine.quarantine import Quarantine
from flock.errors import EngineFull, KeyInUse, OwnershipLost, StoreError, Unreadable, Unstorable
from flock.fair import FairShare
from flock.logs import fields_of_run
from flock.models.prices import Budget, DayBudget
from flock.runs import Account, Batch, Call, IdempotencyKey, Question, Run, RunStatus, Step, Usage, now, stub_of, traces
from flock.runs.text import of_request
from flock.scopes import Signal, current_task
from flock.steps.executor import MAX_HISTORY_BYTES, ActiveRun, StepExecutor, WaitingForAnswers
from flock.steps.live import LiveOutput, Unread
from flock.steps.outcomes import CANCELLED, DAMAGED, INTERRUPTED, Outcome, failure_of
from flock.store.port import RETRY_AFTER_S, DamagedRecord, Store

T = TypeVar("T")
K = TypeVar("K")

logger = logging.getLogger("flock.runs")

#: How long the last write of a run may take when the engine shuts down, in seconds.
FINAL_WRITE_TIMEOUT_S = 5.0
#: How often a run checks whether an earlier run of its session, on another engine, has ended, in seconds.
RECHECK_S = 1.0
#: How many reads may find the file damaged where a record is, before its run is left to the next start.
MAX_READS = 5


OnEnd = Callable[[Run, Outcome | None, BaseException | None], Outcome | None]


class StoredRun(ActiveRun):
    """An active run whose record is in the store, with the events that wake its waiting callers.

    Attributes:
        run: the record. It is a stub while the run waits for a slot, unless it is short.
        change: notified of each new record.
        end: notified of the end, and by ``wake``.
    """

    #: Called when it gets a slot, and when it begins to wait for an answer.
    on_begin: Callable[[], None] | None = None
    on_wait: Callable[[], None] | None = None
    #: Called with its outcome, None if it has completed, and what was raised. Returns the outcome to store.
    on_end: OnEnd | None = None
    #: The length of its inputs, as counted in ``Runner.queued_bytes``.
    queued_bytes = 0
    store_error: StoreError | None = None
    #: The run including its last step, which is not written yet.
    unsaved: Run | None = None
    #: The earliest deadline of the waiting callers, by the loop's clock.
    wake_at = math.inf
    #: The engine shut down before the run ended.
    is_interrupted = False
    #: Only the store has its current state, because another engine owns it now or its record is damaged.
    is_lost = False

    def __init__(self, run: Run, runner: "Runner") -> None:
        limits = runner.limits
        # Items wait for each other, and a suspect, or a run that got an answer, was already started once.
        is_new = run.batch_id is None and not run.worked_s and not run.is_suspect
        queue_timeout_s = limits.queue_timeout_s if is_new else None
        super().__init__(
            run,
            min(run.timeout_s or limits.max_timeout_s, limits.max_timeout_s),
            is_again=run.started_at is not None,  # it was running when its process died
            queue_timeout_s=queue_timeout_s,
        )
        self._runner = runner
        self.change, self.end = Signal(), Signal()
        self.day_budget = runner.day_budget_of(run)
        if run.cancel_requested:
            self.cancel()

    @property
    def is_cut_off(self) -> bool:
        watch_task = self._runner.watch_task
        return super().is_cut_off or (watch_task is not None and watch_task.cancelling() > 0)

    @property
    def has_batches(self) -> bool:  # type: ignore[override]
        return self.run.batch_id is not None

    @property
    def keeps_text(self) -> bool:
        """Whether its live output is kept while nobody watches. Clients of asynchronous runs come after the start."""
        return self.run.is_async and self.run.batch_id is None

    def note_usage(self, agent_name: str, usage: Usage, model: str | None) -> None:
        super().note_usage(agent_name, usage, model)
        if self.run.principal is not None and self._runner.active.get(self.run.run_id) is self:  # not a late thread
            self._runner.spending[self.run.principal].add(self)

    # For its steps; see ``ActiveRun``

    async def is_next(self) -> bool:
        """False if the store cannot be read."""
        try:
            return self.may_begin and (self.run.session_id is None or await self._before() is None)
        except StoreError:
            return False

    @property
    def may_begin(self) -> bool:
        return self._runner.quarantine.admits(self.run)

    async def _before(self) -> str | None:
        """Return the id of the run of its session for which it has to wait. Raises StoreError."""
        has_to_wait = self.run.session_id is not None and self.run.status is RunStatus.STARTING
        return await self._runner.store.active_before(self.run) if has_to_wait else None

    async def wait_begins(self) -> None:
        await self._unload()
        await self._wait_for_session()
        await self._runner.quarantine.wait(self.run)

    async def _unload(self) -> None:
        """Keep only a stub in memory while it waits for a slot. Store it first if it is not stored yet."""
        is_in_store = self.run.is_async or self.run.status is not RunStatus.STARTING
        if not is_in_store and stub_of(self.run).is_stub:
            await self.save(self.run, None)
        self.run = stub_of(self.run)  # a short run stays as it is

    async def _wait_for_session(self) -> None:
        """Wait until no earlier run of its session is active. The end of a run wakes only the nearest one."""
        while (run_id := await self._read(self._before)) is not None:
            # If another engine retries that run at once, its end may go unnoticed here, and it now waits for this one.
            with anyio.move_on_after(None if run_id in self._runner.active else RECHECK_S):
                await self._runner.end_of(run_id).wait()

    async def begin(self) -> Run:
        """Raises: OwnershipLost, Unreadable."""
        self._runner.quarantine.begin(self.run.run_id)  # before any await, since suspects start when nothing has begun
        await self.wait_for_store()
        self.dequeue()
        on_begin, self.on_begin = self.on_begin, None
        if on_begin is not None:
            on_begin()
        return await self.load()

    async def started(self, run: Run, agent: Agent) -> None:
        if run.is_async and (agent.on_interrupt == "fail" or run.is_suspect):
            await self.save(run, None)  # after a crash it must be known that the agent was started
        else:
            self._runner.store.save_nowait(run)
            self.update(run)
        if run.batch_id is None and (run.is_async or isinstance(agent, ModelAgent)):
            self._runner.store.flush_nowait()  # others are written when they end, or at the engine's next tick

    async def wait_for_store(self) -> None:
        """A result stays in memory until it is written, so no more work starts while results cannot be written."""
        if self._runner.store.is_writable and not self._runner.store.is_behind():
            return
        while await self._read(self._is_store_behind):
            try:
                await self._runner.store.catch_up()
            except StoreError:
                await anyio.sleep(RETRY_AFTER_S)

    async def _is_store_behind(self) -> bool:
        return self._runner.store.is_behind()

    async def earlier_runs(self, limit: int) -> Sequence[Run]:
        """Raises Unreadable."""
        return await self._read(lambda: self._runner.store.earlier_runs(self.run, limit, MAX_HISTORY_BYTES))

    async def finished_calls(self) -> Sequence[Call]:
        """Raises Unreadable."""
        return await self._calls(self.run, len(self.run.steps), self.run.tries)

    async def earlier_calls(self, run: Run) -> Sequence[Call]:
        """Raises Unreadable."""
        return [
            call for tries in range(run.first_try, run.tries) for call in await self._calls(run, len(run.steps), tries)
        ]

    async def calls_of(self, run: Run, position: int) -> Sequence[Call]:
        """Raises Unreadable."""
        first = run.steps[position].first_try
        return [call for tries in range(first, run.tries + 1) for call in await self._calls(run, position, tries)]

    async def _calls(self, run: Run, position: int, tries: int) -> Sequence[Call]:
        calls, after, share = list[Call](), 0, FairShare()
        read = functools.partial(self._runner.store.calls, run, position, tries=tries)
        while page := await self._read(functools.partial(read, after)):
            calls += [call for _, call in page]
            after = page[-1][0]
            await share.checkpoint()
        return calls

    async def check_wait(self, wait: Question) -> Call | None:
        """Cancellation: an answer that was found is in the journal when the step runs again. Raises OwnershipLost."""
        store = self._runner.store
        others = _without(self.run.waiting_for, wait.call_id)
        is_known = len(others) < len(self.run.waiting_for)
        if is_known and not await self._read(lambda: store.has_answer(self.run, wait)):
            return None
        run = self.run = replace(self.run, waiting_for=(*others, wait))
        found: list[Call | None] = []

        async def check() -> None:
            found.append(await store.check_wait(run, wait, now()))

        await self.retrying(check)
        if found[0] is not None:
            self.run = replace(self.run, waiting_for=_without(self.run.waiting_for, wait.call_id))
        self.update(self.run)
        return found[0]

    async def keep_call(self, call: Call) -> None:
        """Nothing cancels it, since the journal saves a call in a task of its own. Raises OwnershipLost."""
        run = self.run = replace(self.run, **self.costs, waiting_for=_without(self.run.waiting_for, call.call_id))
        await self.retrying(lambda: self._runner.store.save_call(run, len(run.steps), call))

    # Reading and writing its record

    async def load(self) -> Run:
        """Return the whole record, read from the store if it was unloaded. Raises OwnershipLost, Unreadable."""
        if self.run.is_stub:
            stored = await self._read(lambda: self._runner.store.get_run(self.run.run_id))
            if stored is None or stored.status.is_final or stored.attempt != self.run.attempt:
                raise OwnershipLost(self.run.run_id)
            if stored.batch_id is None and stored.owner != self.run.owner:
                raise OwnershipLost(self.run.run_id)
            self.run = replace(stored, owner=self.run.owner, progress=self.progress, **self.costs)
        return self.run

    async def _read(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return what *read* reads from the store. Retry while the store cannot be read.

        Raises: Unreadable if a record is damaged.
        """
        damaged = 0
        while True:
            try:
                value = await read()
            except StoreError as exc:
                damaged += isinstance(exc, DamagedRecord)
                if isinstance(exc, DamagedRecord) and (exc.is_writable or damaged == MAX_READS):
                    error = Unreadable(DAMAGED.error)
                    error.is_writable, error.log_detail = exc.is_writable, str(exc.__cause__)
                    raise error from exc
                self.store_error = exc
                self.wake()
                await anyio.sleep(RETRY_AFTER_S)
            else:
                self.store_error = None
                return value

    async def save(self, run: Run, step: Step | None) -> None:
        """Write *run* and notify waiting callers. Retry while the store cannot be written."""
        await self.retrying(lambda: self._runner.store.save(run, step, shield=True))
        self.update(replace(run, waiting_for=()) if step is not None and run.waiting_for else run)

    async def retrying(self, write: Callable[[], Awaitable[None]]) -> None:
        """Call *write*, which ignores cancellation, until the store can be written, but only once during shutdown."""
        while True:
            try:
                await write()
                break
            except StoreError as exc:
                if self._runner.is_draining:
                    raise
                self.store_error = exc
                self.wake()
                with anyio.CancelScope(shield=True):
                    # Soon enough for the store's next attempt, so that it cannot succeed without this write.
                    await anyio.sleep(RETRY_AFTER_S / 2)
        self.store_error = None

    def dequeue(self) -> None:
        """Its inputs no longer wait."""
        if self.queued_bytes:
            _add_to(self._runner.queued_bytes, self.run.principal, -self.queued_bytes)
            self.queued_bytes = 0

    def update(self, run: Run) -> None:
        """Replace the record by *run*. Wake callers that wait for a change, and if it is not active, all callers."""
        self.run = run
        if self.live is not None:
            self.live.note_news()
        self.change.notify()
        if not run.status.is_active:
            self.wake()

    def wake(self) -> None:
        """Wake callers that wait for the end, so that they check the state again."""
        self.end.notify()


class Runner:
    """Executes runs to their end. ``EmbeddedEngine`` describes the options.

    Attributes:
        active: the runs that are running here or wait for their session or a slot, by id.
        watched: the live output of each run that is watched, also of one that is not active here, by id.
        unread: watches the runs that were submitted with ``watch``.
        awaited: the signals of ``end_of``, for batches and for runs of other engines.
        cancelled_before: for runs that were cancelled before they were active here, the cancelled attempt, by id.
        watch_task: a task of the engine. It is cancelled only when the engine or the event loop ends.
        is_draining: the engine is shutting down. Failed writes are not retried.
        queued_bytes: the total length of the inputs of runs that wait for their first step, by principal. It includes
            neither items of batches nor long runs that were recovered after a crash.
        executor: executes single steps.
        quarantine: which runs may start.
    """

    def __init__(
        self,
        store: Store,
        executor: StepExecutor,
        *,
        continue_answered: Callable[[Run | None], None],
    ) -> None:
        self.store = store
        self.executor = executor
        self.continue_answered = continue_answered
        self.limits = limits = executor.limits
        self.active: dict[str, StoredRun] = {}
        self.watched: dict[str, LiveOutput] = {}
        self.unread = Unread(self.watch, limits.max_result_bytes // 4)  # in StringIO, a character takes 4 bytes
        self.awaited: dict[str, Signal] = {}
        self.cancelled_before: dict[str, int] = {}
        self.watch_task: asyncio.Task[Any] | None = None
        self.is_draining = False
        self.queued_bytes: Counter[str | None] = Counter()
        self.quarantine = Quarantine(store.executing)
        #: the active runs of each principal that have spent something
        self.spending: defaultdict[str, set[StoredRun]] = defaultdict(set)
        self._day_budgets: WeakValueDictionary[str, DayBudget] = WeakValueDictionary()
        #: the agents to which no message can be sent
        self._receive_nothing = {name for name, agent in executor.agents.items() if not agent.uses_context}

    def day_budget_of(self, record: Run | Batch) -> DayBudget | None:
        """Return what the principal of a record may spend in a day. All its runs in this process share it."""
        if record.principal is None:
            return None
        budget = self._day_budgets.get(record.principal)
        if budget is None:
            read = functools.partial(self._read_account, record.flock, record.principal)
            budget = self._day_budgets[record.principal] = DayBudget(self.executor.prices, read)
        return budget

    async def account(self, flock: str, principal: str) -> Account:
        """Return what a principal may spend in a day, and has spent, also if it is not written. Raises StoreError."""
        spending = list(self.spending.get(principal, ()))
        return await self.store.account(flock, principal, {each.run.run_id: each.spent_by for each in spending})

    async def _read_account(self, flock: str, principal: str) -> Account:
        """Like ``account``. Retry while the store cannot be read."""
        while True:
            try:
                return await self.account(flock, principal)
            except StoreError:
                await anyio.sleep(RETRY_AFTER_S)

    def check_room(self, principal: str | None) -> None:
        """Like the check in ``Store.accept``, for a run that is not in the store until it ends."""
        queued, limits = len(self.active) - self.limits.max_concurrency, self.limits.queue
        limits.check(queued)
        if principal is not None and queued >= limits.max_runs_per_principal:
            runs = [active.run for active in self.active.values()]
            limits.check_share(sum(run.principal == principal and run.status is RunStatus.STARTING for run in runs))

    def full(self, principal: str | None) -> EngineFull | None:
        """Return an error for new runs if the inputs of queued runs have reached their limit."""
        queued, limit = self.queued_bytes, self.limits.max_queue_bytes
        if queued.total() >= limit:
            whose, words = "queued runs", "this server (max_queue_bytes)"
        elif principal is not None and queued[principal] >= limit / 2:
            whose, words = "this caller's queued runs", "one caller (half of max_queue_bytes)"
        else:
            return None
        return EngineFull(
            f"The inputs of {whose} have reached the limit of {words}. Try again when some of the runs have started."
        )

    def start(self, tasks: anyio.abc.TaskGroup, run: Run, context: Context) -> None:
        """Execute a run in a task of its own, which starts in a copy of *context*."""
        context.run(lambda: tasks.start_soon(self._execute, self._admit(run), name="run"))

    def execute(
        self, run: Run, on_begin: Callable[[], None], on_wait: Callable[[], None], on_end: OnEnd, budget: Budget | None
    ) -> Coroutine[Any, Any, None]:
        """Return a coroutine that executes a run until it ends, or begins to wait for an answer.

        It calls *on_begin* when the run gets a slot, *on_wait* when it begins to wait for an answer, and *on_end* when
        it ends.

        It raises only if the engine is cancelled. It holds no reference to *run*.
        """
        active = self._admit(run)
        active.on_begin, active.on_wait, active.on_end, active.budget = on_begin, on_wait, on_end, budget
        return self._execute(active)

    def _admit(self, run: Run) -> StoredRun:
        if self.cancelled_before.pop(run.run_id, None) == run.attempt:
            run = replace(run, cancel_requested=True)
        active = self.active[run.run_id] = StoredRun(run, self)
        active.live = self.watched.get(run.run_id)
        if active.live is None and active.keeps_text:
            active.live = self._new_live(run)
            active.live.next_is_late = True
        if run.batch_id is None and not run.is_stub:
            active.queued_bytes = run.input_bytes
            _add_to(self.queued_bytes, run.principal, active.queued_bytes)
        return active

    @contextlib.contextmanager
    def watch(self, run_id: str) -> Iterator[LiveOutput]:
        """Let the agents of a run write its live output inside the block."""
        live, active = self.watched.get(run_id), self.active.get(run_id)
        if live is None:
            live = None if active is None else active.live
            live = self.watched[run_id] = live or self._new_live(None if active is None else active.run)
            if active is not None:
                active.live = live
        live.watchers += 1
        try:
            yield live
        finally:
            live.watchers -= 1
            if not live.watchers:
                del self.watched[run_id]
                if live.follower is not None:
                    live.follower.cancel()
                if (active := self.active.get(run_id)) is not None and not active.keeps_text:
                    active.live = None

    @contextlib.contextmanager
    def watch_until_read(self, run_id: str) -> Iterator[None]:
        """Watch a run that is accepted inside the block, until its first reader comes; see ``Unread``."""
        with self.watch(run_id):
            yield
            self.unread.add(run_id)
            if run_id not in self.active:
                self.unread.end(run_id)

    def _new_live(self, run: Run | None) -> LiveOutput:
        live = LiveOutput(self.limits.max_result_bytes)
        live.ended_steps = 0 if run is None else len(run.steps)
        return live

    def stop(self) -> None:
        """Stop all runs, because the engine is shutting down."""
        for active in list(self.active.values()):
            self.executor.stop(active)

    async def interrupt(self, active: StoredRun) -> None:
        """Leave an asynchronous run in a file for the next start, at shutdown. End any other as interrupted."""
        run = replace(active.unsaved or active.run, **active.costs)
        if run.is_async and self.store.is_shared:
            if active.spent is not active.run.spent:
                self.store.save_nowait(replace(active.run, **active.costs))
        else:
            ended = replace(run, completed_at=active.now(), **asdict(INTERRUPTED))
            with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S), contextlib.suppress(StoreError, OwnershipLost, Unstorable):
                await self.store.save(ended, run.steps[-1] if active.unsaved is not None else None)
                self.executor.notify("run_ended", ended)
            active.run = ended
        active.is_interrupted = True
        active.update(active.run)
        active.wake()
        self._remove(active)

    async def _execute(self, active: StoredRun) -> None:
        with traces.of_run(active.run) as span:
            try:
                await self._run_to_end(active)
            except Exception as exc:  # such as an exception whose name cannot be read: other runs must continue
                if not isinstance(exc, Unstorable):
                    logger.exception("run %s: unexpected error", active.run.run_id)
                active.unsaved = None
                outcome = failure_of(active.run, exc, expose_errors=self.executor.expose_errors)
                if active.on_end is not None:
                    outcome = active.on_end(active.run, outcome, exc) or outcome
                await self._finish(active, asdict(outcome))
            span.ended(active.run)

    async def _run_to_end(self, active: StoredRun) -> None:
        end: dict[str, Any] | None = None
        failure: BaseException | None = None
        try:
            with active.scope:
                end = {"status": RunStatus.COMPLETED, "result": await self._steps(active)}
        except OwnershipLost:
            self._on_ownership_lost(active)
            return
        except BaseException as exc:
            # In a cancelled scope the deadline is -inf. With any other deadline, the exception comes from the agent's
            # code, even if it is a cancellation.
            if anyio.current_effective_deadline() == -math.inf:  # the engine is shutting down
                if isinstance(exc, anyio.get_cancelled_exc_class()):
                    raise
                return  # the agent turned the cancellation into an error; __aexit__ handles the run
            if self.watch_task is not None and self.watch_task.cancelling():
                raise  # the event loop is ending and cancels all tasks
            failure = exc
        try:
            if end is None and active.is_stopped:
                await self.interrupt(active)
                return
            await _absorb_cancellation()
            if isinstance(failure, WaitingForAnswers) and await self._suspend(active, failure.questions):
                return
            outcome = None if end is not None else await self.executor.outcome_of(active, failure)
            if active.on_end is not None:
                outcome = active.on_end(active.run, outcome, failure)
            if outcome is not None:
                end = asdict(outcome)
            assert end is not None
            if isinstance(failure, Unreadable) and not failure.is_writable:  # writing it would fail its whole group
                self._disown(active)
                return
            await self._finish(active, end)
        finally:
            failure = None  # its traceback refers to this frame

    async def _steps(self, active: StoredRun) -> msgspec.Raw:
        """Run the agents in sequence. The last step is written together with the end of the run."""
        while (active.unsaved or active.run).next_agent_name is not None:
            if self.is_draining:
                await anyio.lowlevel.checkpoint_if_cancelled()
            step = await self.executor.execute(active)
            run = replace(active.run, steps=(*active.run.steps, step), **active.costs)
            if step.next_agent is None:
                active.unsaved = run
            else:
                await _absorb_cancellation()
                await active.save(run, step)
            if active.cancel_requested:
                raise anyio.get_cancelled_exc_class()
        run = active.unsaved or await active.load()
        if run.started_at is None:  # retried with all steps already done
            active.update(replace(run, status=RunStatus.RUNNING, started_at=active.now()))
        return run.steps[-1].result

    def end_of(self, id_: str) -> Signal:
        """Return what the engine notifies when a run or a batch has ended, or earlier to have it checked again."""
        active = self.active.get(id_)
        return self.awaited.setdefault(id_, Signal()) if active is None else active.end

    async def _suspend(self, active: StoredRun, questions: Sequence[Question]) -> bool:
        """Leave a run to the store until one of *questions* is answered. Returns False if it was cancelled."""
        if active.cancel_requested:
            return False
        run = replace(
            active.run,
            status=RunStatus.WAITING,
            is_async=True,  # its client gets a response now, so it is resumed after a crash
            waiting_for=tuple(questions),
            worked_s=active.worked_s,
            progress=active.progress,
            **active.costs,
        )

        def then(suspended: tuple[bool, Run | None]) -> None:
            is_waiting, answered = suspended
            active.cancel_requested |= not is_waiting
            if is_waiting:
                self._remove(active)
                if answered is None:
                    active.update(run)
                    self.executor.notify("run_waiting", run)
                else:
                    self.continue_answered(answered)
                    self._disown(active)
                if active.on_wait is not None:
                    active.on_wait()

        try:
            with anyio.CancelScope(shield=True):
                await active.retrying(lambda: self.store.suspend(run, now(), then))
                is_waiting = active.run.status is RunStatus.WAITING
                if is_waiting and active.cancel_requested:  # while it was written
                    await active.retrying(lambda: self.cancel_waiting(run))
                elif active.is_lost and active.cancel_requested:
                    self.cancel_soon(run)
                return is_waiting or active.is_lost
        except OwnershipLost:
            self._on_ownership_lost(active)
        except StoreError:
            await self.interrupt(active)
        return True

    def cancel_soon(self, run: Run) -> None:
        """Cancel *run*, or when it becomes active here."""
        if (active := self.active.get(run.run_id)) is not None:
            active.cancel()
        else:
            self.cancelled_before[run.run_id] = run.attempt

    async def cancel_waiting(self, run: Run) -> None:
        """Cancel *run* if it is still waiting."""
        at = now()
        if await self.store.end_waiting(run, CANCELLED, at):
            run = replace(run, **asdict(CANCELLED), completed_at=at)
            self.ended(run)
            await self.warn_of_messages(run)

    async def _finish(self, active: StoredRun, end: Mapping[str, Any]) -> None:
        run = active.unsaved or active.run
        step = run.steps[-1] if active.unsaved is not None else None
        now_known = {"progress": active.progress, "dropped": active.dropped, **active.costs}
        run = replace(run, **end, **now_known, completed_at=active.now())
        try:
            await active.save(run, step)
        except OwnershipLost:
            self._on_ownership_lost(active)
            return
        except StoreError as exc:
            logger.warning("run %s: its final state was not written: %s", run.run_id, exc)
            await self.interrupt(active)
            return
        except Unstorable as exc:
            if active.unsaved is not None:  # without its last step it can perhaps be stored
                raise
            logger.error("run %s: its final state cannot be stored: %s %s", run.run_id, exc, exc.log_detail)
            self.store.discard(run.run_id)
            active.update(run)
        self._remove(active)
        self.ended(run)
        await self.warn_of_messages(run)

    def ended(self, run: Run) -> None:
        """Notify the observers of the end of *run*, and log it."""
        self.executor.notify("run_ended", run)
        level = logging.INFO if run.batch_id is None else logging.DEBUG  # items are too many; the batch logs a summary
        if logger.isEnabledFor(level):
            took_ms = max(0, round(((run.completed_at or now()) - run.created_at).total_seconds() * 1000))
            template, source = "run %s: %s, agent %s, %d ms%s", of_request(run.request_id)
            extra = fields_of_run(run) | {"status": run.status.value, "duration_ms": took_ms}
            logger.log(level, template, run.run_id, run.status, run.agent_name, took_ms, source, extra=extra)

    async def warn_of_messages(self, run: Run) -> None:
        """Name the messages that *run*, which has ended, has not received."""
        names = [run.agent_name, run.next_agent_name or run.agent_name, *[step.agent_name for step in run.steps]]
        if self._receive_nothing.issuperset(names):
            return
        with contextlib.suppress(StoreError):
            if messages := await self.store.unreceived(run.run_id):
                template = "run %s: it has ended and not received its messages %s"
                logger.warning(template, run.run_id, ", ".join(messages), extra=fields_of_run(run))

    def _remove(self, active: StoredRun) -> None:
        active.dequeue()
        if self.active.get(active.run.run_id) is active:
            del self.active[active.run.run_id]
            principal = active.run.principal
            if principal is not None and principal in self.spending:
                self.spending[principal].discard(active)
                if not self.spending[principal]:
                    del self.spending[principal]
            self.quarantine.end(active.run.run_id)
            self.unread.end(active.run.run_id)

    def _on_ownership_lost(self, active: StoredRun) -> None:
        """Stop executing a run that another engine has taken over."""
        logger.warning("run %s: it was taken over by another engine", active.run.run_id)
        self._disown(active)

    def _disown(self, active: StoredRun) -> None:
        """Stop tracking a run here. Waiting callers read it from the store from now on."""
        active.is_lost = True
        self._remove(active)
        active.update(active.run)
        active.wake()


def _without(waits: tuple[Question, ...], call_id: str) -> tuple[Question, ...]:
    return tuple(wait for wait in waits if wait.call_id != call_id)


def _add_to(counter: Counter[K], key: K, more: int) -> None:
    """Add to a count, which has no entry while it is 0."""
    counter[key] += more
    if not counter[key]:
        del counter[key]


@contextlib.contextmanager
def counted(counter: Counter[K], key: K, more: int = 1) -> Iterator[None]:
    """Add to a count inside the block."""
    _add_to(counter, key, more)
    try:
        yield
    finally:
        _add_to(counter, key, -more)


@contextlib.contextmanager
def accepting(keys: set[str], key: IdempotencyKey | None) -> Iterator[None]:
    """Raise KeyInUse if another request with the same key is being accepted. A later one is a replay."""
    if key is None:
        yield
        return
    if key.scoped_key in keys:
        raise KeyInUse(key.key)
    keys.add(key.scoped_key)
    try:
        yield
    finally:
        keys.discard(key.scoped_key)


async def _absorb_cancellation() -> None:
    """Absorb a pending cancellation that an agent requested of its own task. It would hit the next await."""
    task = current_task()
    while task is not None and task.cancelling() and anyio.current_effective_deadline() != -math.inf:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise
        task.uncancel()

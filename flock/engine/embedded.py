"""The embedded engine: each run is a task in an anyio task group that lives as long as the engine.

The engine's own tasks, asynchronous runs and batches start in an empty context, since they may outlive the request that
starts them. A synchronous run starts in a copy of its caller's context.

Accepted runs and their steps are stored. Several engines may share a store: each executes the runs that it owns, and a
watch task checks 20 times a second whether another process has committed anything.
"""

import contextlib
import functools
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack
from contextvars import Context
from datetime import date, datetime
from typing import Any, Self

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent
from flock.agents.checks import tool_sources
from flock.agents.mcp import listing_tools
from flock.agents.program import Program
from flock.agents.shared import Shared
from flock.engine import relay
from flock.engine.base import WAKE_INTERVAL_S, EngineBase, RunReader, ended_calls
from flock.engine.batches import Batches
from flock.engine.intake import Intake
from flock.engine.recovery import Recovery
from flock.engine.relay import Relay
from flock.engine.retention import Retention
from flock.engine.runner import FINAL_WRITE_TIMEOUT_S, Runner, StoredRun, accepting, counted
from flock.engine.storereader import StoreReader
from flock.errors import BatchNotFound, CallNotFound, Conflict, EngineStopped, RunNotFound, StoreError
from flock.fair import FairShare
from flock.limits import Limits
from flock.logs import audit, fields_of_run
from flock.models.llm import ModelClient
from flock.models.prices import Price
from flock.options import replaced
from flock.runs import (
    Account,
    Answer,
    AskedQuestion,
    Batch,
    BatchFilter,
    BatchOptions,
    Call,
    FileBox,
    IdempotencyKey,
    LongJSON,
    Observer,
    Page,
    Principal,
    QuestionFilter,
    QuestionPage,
    Queue,
    RetriedCalls,
    Run,
    RunFilter,
    RunStatus,
    Statuses,
    Usage,
    UsageFilter,
    UsageRow,
    make_ids_after,
    new_id,
    now,
    statuses_of,
)
from flock.runs.records import LONG_BYTES, NOT_LOADED
from flock.scopes import Signal, current_task, start_in_empty_context
from flock.steps.answers import message_from
from flock.steps.executor import StepExecutor
from flock.steps.identity import Newest
from flock.steps.live import LiveOutput
from flock.steps.outcomes import INTERRUPTED
from flock.steps.refusals import check_cancel, not_deleted, not_retried, run_not_retried, wait_stopped
from flock.store.port import Retry, Store

logger = logging.getLogger("flock.runs")

#: How often the store is checked for commits of other processes, in seconds.
WATCH_INTERVAL_S = 0.05
#: The time after which all other engines have seen a commit, unless they are overloaded, in seconds.
SEEN_BY_ALL_S = 4 * WATCH_INTERVAL_S
#: How often the store's file and the other engines are checked, in seconds. Changes may go unnoticed that long.
CHECK_INTERVAL_S = 0.5
#: How many items are read from the store at once, since that holds the event loop.
ITEMS_AT_ONCE = 50


class EmbeddedEngine(EngineBase):
    """``Engine`` on anyio task groups over a ``Store``.

    Args:
        agents: by name. The mapping is read at each submission, so agents added later are found.
        models: the client for model calls. The engine closes it.
        store: where runs are stored. The engine opens and closes it.
        flock: the name under which runs are stored. An engine sees only the runs of its own flock, and recovers only
            those whose agent it has.
        program_path: where the flock is defined. If the store has another path, a warning is logged at the start.
        max_steps: max steps in one run.
        expose_errors: put the text of any exception into a run's ``error``; for development.
        on_question: answers the questions of agents at once. Without it, their runs wait for answers.
        prices: of models, by name. They are added to ``flock.models.prices.PRICES``, or replace its entries.
        shared: what the agents share, such as the state of the flock.
        limits: see ``Limits``.
        bounds: fields of ``Limits`` as keyword arguments. They override *limits*.
    """

    calls_models = True

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        store: Store,
        *,
        flock: str = "flock",
        program_path: str = "",
        max_steps: int = 32,
        expose_errors: bool = False,
        on_question: Answer | None = None,
        prices: Mapping[str, Price] | None = None,
        shared: Shared | None = None,
        limits: Limits | None = None,
        **bounds: Any,
    ) -> None:
        super().__init__(
            agents,
            flock,
            replaced(limits or Limits(), bounds),
            prices=prices,
            default_model=models.default_model or None,
        )
        shared = shared or Shared()
        self._model_hooks = shared.model_hooks
        self.store = store
        self._program_path = program_path
        self._models = models
        models.on_retry = lambda: self._runner.executor.notify("model_call_retried")
        self._observers: list[Observer] = []
        self._make_executor = functools.partial(
            StepExecutor,
            agents,
            models,
            self._observers,
            limits=self._limits,
            max_steps=max_steps,
            expose_errors=expose_errors,
            max_result_bytes=self._limits.max_result_bytes,
            answer=on_question,
            prices=self._prices,
            shared=shared,
            folder_of=store.contents.folder,
        )
        #: an app may set it: stores the receivers of webhooks, and returns the task that sends them
        self.send_webhooks: Callable[[str], Awaitable[Callable[[], Coroutine[Any, Any, None]]]] | None = None
        self._engine_id = ""
        self._tasks: anyio.abc.TaskGroup | None = None
        self._reset()

    @property
    def is_draining(self) -> bool:
        return self._runner.is_draining

    @property
    def _owner(self) -> str:
        return self._engine_id

    @property
    def _is_entered(self) -> bool:
        return self._tasks is not None

    @property
    def _is_store_ok(self) -> bool:
        return self.store.is_writable

    # Lifecycle

    def _reset(self) -> None:
        """Create the state that is bound to one event loop, such as events."""
        self._runner = Runner(self.store, self._make_executor(), continue_answered=self._start_answered)
        self._batches = Batches(
            self.store.batches, self._runner, self._start_task, self._next_change, self.recipe_and_version
        )
        self._accepting: set[str] = set()
        self._store_changed = Signal()
        self._recovery = Recovery(
            self._runner, self._batches, self._agents, self._flock, self._engine_id, self._start, self._start_task
        )
        self._relay = Relay(self, self.store, self._engine_id, self._start_task)
        self._retention = Retention(self.store, self._flock, self._limits, self._runner.active)

    async def __aenter__(self) -> Self:
        self._check_not_entered()
        self._engine_id = new_id()
        self._reset()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            await stack.enter_async_context(self._models)
            await stack.enter_async_context(listing_tools(tool_sources(self._agents)))
            await stack.enter_async_context(self._runner.executor.state)
            stack.push_async_callback(self._unregister)
            with self._explaining_store_errors():
                program = Program.of(self._program_path, self._agents)
                before = await self.store.register_engine(self._engine_id, self._flock, self._agents.keys(), program)
                await self._recovery.warn_of_others(program.differences(before))
                if (newest := await self.store.last_id()) is not None:
                    with contextlib.suppress(ValueError):  # the file is damaged, which is reported when the run is read
                        make_ids_after(newest)
            self._exit = stack.pop_all()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            if self.store.is_shared:
                await self._serve_live(self._tasks)
            with self._explaining_store_errors():
                if self.send_webhooks is not None:
                    start_in_empty_context(self._tasks, await self.send_webhooks(self._engine_id))
                await self._recovery.take_over()
        except BaseException:
            await self.__aexit__()
            raise
        for task in (self._watch, self._wake_readers, self._end_waits, self._retention.apply):
            start_in_empty_context(self._tasks, task)
        return self

    async def _serve_live(self, tasks: anyio.abc.TaskGroup) -> None:
        """Listen before this engine owns a run: others that cannot connect to an owner do not try again."""
        path = relay.socket_path(self.store.path, self._engine_id)
        if path is None:
            template = "Other processes do not get the text of running agents: the path of the store %s is too long."
            logger.info(template, self.store.path)
        elif listener := await relay.listen(path):
            is_active = self._runner.active.__contains__
            start_in_empty_context(tasks, relay.serve, listener, path, self._runner.watch, is_active)

    @contextlib.contextmanager
    def _explaining_store_errors(self) -> Iterator[None]:
        try:
            yield
        except (StoreError, OSError) as exc:
            raise StoreError(
                f"The store {self.store.path!r} cannot be used: {exc.__cause__ or exc}. If its disk is full, free some "
                "space. Otherwise restore the file, or use another one (store=, --store)."
            ) from exc

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop all runs. Asynchronous runs are resumed at the next start; the others end as interrupted."""
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        self._runner.is_draining = True
        self.store.executing.forget()
        tasks.cancel_scope.cancel()
        self._runner.stop()
        try:
            await tasks.__aexit__(None, None, None)
        finally:  # also if the host program is being cancelled
            try:
                with anyio.CancelScope(shield=True):
                    async with anyio.create_task_group() as stops:  # concurrently, so that they share one timeout
                        for active in list(self._runner.active.values()):
                            start_in_empty_context(stops, self._runner.interrupt, active)
            finally:  # asyncio cancels a task in spite of the shield
                await self._exit.aclose()

    async def _unregister(self) -> None:
        with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S, shield=True), contextlib.suppress(StoreError, OSError):
            await self.store.unregister_engine(self._engine_id)

    async def drain(self, timeout_s: float) -> None:
        self._check_entered()
        self._runner.is_draining = True
        self.store.executing.forget()
        self._wake_all()
        for seconds in (timeout_s, FINAL_WRITE_TIMEOUT_S):
            with anyio.move_on_after(seconds):
                while self._runner.active:
                    await next(iter(self._runner.active.values())).change.wait()
            self._runner.stop()

    def _check_running(self) -> None:
        super()._check_running()
        self.store.check_writable()

    async def check_ready(self) -> None:
        self._check_running()
        await self.store.last_id()  # raises if the store cannot be read

    def observe(self, observer: Observer) -> None:
        self._observers.append(observer)

    def files(self, principal: str | None = None) -> FileBox:
        self._check_entered()
        return self.store.contents.of(principal, self._limits.max_file_bytes, self._limits.max_files_bytes)

    async def queue(self) -> Queue:
        self._check_entered()
        return await self.store.queue(self._flock)

    # Runs

    async def _accept(self, run: Run, key: IdempotencyKey | None, context: Context, newest: Newest | None) -> None:
        full = self._runner.full(run.principal)
        # Its client gets its id before its end, or it has files.
        is_announced = run.is_async or bool(run.files) or run.run_id in self._runner.watched
        if not is_announced and key is None and run.session_id is None:
            if full is not None:
                raise full
            # Only its end must be on disk: if the process dies, its caller is gone, and the run is not resumed.
            self._runner.check_room(run.principal)
            self.store.save_nowait(run, is_new=True)
            self._start(run, context)
        else:
            start = functools.partial(self._start, context=context)
            replaced = newest.run_id if newest and newest.is_replaced else None
            if replaced is not None:
                await self._wait_until_seen((await self.get_outline(replaced)).completed_at)
            # It is accepted even if it is cancelled here, and what it replaces ends by the same commit.
            with (
                contextlib.nullcontext() if replaced is None else anyio.CancelScope(shield=True),
                accepting(self._accepting, key),
                counted(self._runner.queued_bytes, run.principal, run.input_bytes),
            ):
                ended = await self.store.accept(run, full or self._limits.queue, key, start, newest)
                if ended is not None:
                    self._runner.ended(ended)
                    await self._runner.warn_of_messages(ended)
                elif replaced is not None:
                    await self._drop_run(replaced)  # no effect unless it had not ended

    async def get_run(self, run_id: str, principal: str | None = None) -> Run:
        active = await self._active(run_id, principal)
        if active is not None and not active.run.is_stub:
            return active.run
        self._check_entered()
        return await self._check_visible(run_id, await self.store.get_run(run_id))

    async def get_outline(self, run_id: str, principal: str | None = None) -> Run:
        active = await self._active(run_id, principal)
        return await self._check_visible(run_id, await self.store.outline(run_id)) if active is None else active.run

    async def _active(self, run_id: str, principal: str | None) -> StoredRun | None:
        """Return the run if it is active here. Raises RunNotFound if it is not of *principal*, before it is read."""
        active = self._runner.active.get(run_id)
        if active is None:
            self._check_entered()
        if principal is not None:
            is_own = await self.store.is_of(run_id, principal) if active is None else active.run.principal == principal
            if not is_own:
                raise RunNotFound(run_id)
        return active

    async def get_calls(self, run: Run) -> Mapping[int, Sequence[Call]]:
        self._check_entered()
        return ended_calls(run, await self.store.shown_calls(run.run_id))

    async def _changed_outline(self, run_id: str, known: Any) -> tuple[Any, Run | None]:
        """Return the version of a stored run, and its outline unless that version is *known*."""
        self._check_entered()
        version = await self.store.version(run_id)
        if known is not None and version == known:
            return version, None
        return version, await self._check_visible(run_id, await self.store.outline(run_id))

    async def _check_visible(self, run_id: str, run: Run | None) -> Run:
        """Return *run* if clients may see it. Raises RunNotFound."""
        if run is None or run.flock != self._flock:
            raise RunNotFound(run_id)
        if run.batch_id is not None and await self.store.batches.get(run.batch_id) is None:  # its batch is hidden
            raise RunNotFound(run_id)
        return run

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        deadline = math.inf if timeout_s is None else anyio.current_time() + timeout_s
        active = self._runner.active.get(run_id)
        while active is not None and not active.is_lost:
            if not active.run.is_active:
                return await self._record_of(active)
            if active.run.status is RunStatus.WAITING:  # for no person, and not here
                break
            if active.store_error is not None:
                raise active.store_error
            if active.is_interrupted:
                raise EngineStopped(f"{INTERRUPTED.error} The run is resumed at the next start.")
            if timeout_s is not None and anyio.current_time() >= deadline:
                return await self._record_of(active)
            active.wake_at = min(active.wake_at, deadline)  # for the watch task: a timer for each waiter is slower
            await active.end.wait()
        with anyio.CancelScope(deadline=deadline):
            while (run := await self.get_run(run_id)).is_active:
                del run  # do not hold a possibly long record during a possibly long wait
                if self.is_draining:
                    raise wait_stopped()
                await self._runner.end_of(run_id).wait()
            return run
        return await self.get_run(run_id)

    async def cancel_run(self, run_id: str) -> Run:
        active = self._runner.active.get(run_id)
        if active is None:
            self._check_entered()
            if await self.store.version(run_id) is None:
                await self.store.catch_up()  # it may be among the writes before this one
                active = self._runner.active.get(run_id)
        if active is None:
            while not (run := await self.get_outline(run_id)).status.is_final:
                if run.status is RunStatus.WAITING:  # nothing is running, so it ends at once
                    _audit_cancel(run)
                    await self._runner.cancel_waiting(run)
                elif await self.store.request_cancel(run_id):
                    _audit_cancel(run)
                    owned = run if run.batch_id is None else await self.get_batch(run.batch_id)
                    if owned.owner == self._engine_id and run_id not in self._runner.active:
                        self._runner.cancelled_before[run_id] = run.attempt
                    await self._recovery.take_over_cancelled(run_id, owned.owner)
                    return await self.get_outline(run_id)
            check_cancel(f"run {run_id}", run.status)
            return run
        if not active.cancel_requested:
            _audit_cancel(active.run)
        active.cancel()
        if active.run.is_async:
            await self.store.request_cancel(run_id)  # so that the request survives a crash
        return active.run

    async def _record_of(self, active: StoredRun) -> Run:
        """Return the record of *active*. If it cannot be read, return the stub, without inputs and steps."""
        run = active.run
        if run.is_stub:
            with contextlib.suppress(StoreError):
                run = await self.store.get_run(run.run_id) or run
        return replace(run, steps=()) if run.is_stub else run

    async def answer_call(self, run_id: str, call_id: str, output: msgspec.Raw, by: Principal | None = None) -> Run:
        self._check_running()
        await self._check_may_answer(run_id, call_id, by)
        run = await self.get_outline(run_id)
        if run.status is RunStatus.WAITING:
            self._check_has_agent(run.next_agent_name or "")
        del run  # with all its questions, which each of many waiting answers would hold
        answered = self.store.answer(run_id, call_id, output, by, self._engine_id, now(), then=self._start_answered)
        started = await answered
        if (active := self._runner.active.get(run_id)) is not None:
            left = tuple(wait for wait in active.run.waiting_for if wait.call_id != call_id)
            active.update(replace(active.run, waiting_for=left))
        self._note_answer(run_id)
        return started or await self.get_outline(run_id)

    async def _questions(self, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
        return await self.store.list_questions(self._flock, wanted, since)

    async def get_question(self, run_id: str, call_id: str, by: Principal | None = None) -> AskedQuestion:
        self._check_entered()
        await self._check_may_answer(run_id, call_id, by)
        await self.get_outline(run_id)
        if (found := await self.store.find_question(run_id, call_id)) is None:
            raise CallNotFound(run_id, call_id)
        return found

    async def _check_may_answer(self, run_id: str, call_id: str, by: Principal | None) -> None:
        """Raise RunNotFound if *by* may not know of a question, before anything of its run is read."""
        if by is not None and not await self.store.may_answer(run_id, call_id, by):
            raise RunNotFound(run_id)

    async def send_message(
        self, run_id: str, name: str, message: msgspec.Raw, key: IdempotencyKey | None = None
    ) -> Run:
        self._check_running()
        message = message_from(name, message, self._limits.max_input_bytes)
        run = await self.get_outline(run_id)
        if run.status is RunStatus.WAITING:
            self._check_has_agent(run.next_agent_name or "")
        await self.store.send(run_id, name, message, key, self._engine_id, now(), then=self._start_answered)
        self._note_answer(run_id)
        return await self.get_outline(run_id)

    def _note_answer(self, run_id: str) -> None:
        """Let the step of a run that is active here check its waits."""
        active = self._runner.active.get(run_id)
        if active is not None and active.context is not None:
            active.context.journal.note_answer()

    def _start_answered(self, run: Run | None) -> None:
        """Start a run that got an answer, a message or its wake-up, unless it is None. Its batch starts an item."""
        if run is not None and run.batch_id is None and run.run_id not in self._runner.active:
            self._start(run)

    async def retry_run(
        self, run_id: str, max_cost: float | None = None, *, calls: RetriedCalls = "keep", by: Principal | None = None
    ) -> Run:
        self._check_running()
        run, retry = await self.get_outline(run_id), self._retry(max_cost, calls, by)
        self._check_has_agent(run.agent_name)
        self._check_prices(run.agent_name, max_cost)
        reopened = None
        if run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
            if run.batch_id is None:
                if (full := self._runner.full(run.principal)) is not None:
                    raise full
                with counted(self._runner.queued_bytes, run.principal, await self.store.input_bytes(run_id)):
                    reopened = await self.store.reopen(run, self._limits.queue, retry, self._start)
            elif await self.store.batches.reopen_item(run, retry, self._batches.start):
                reopened = await self.get_outline(run_id)
            if reopened is None:
                run = await self.get_outline(run_id)
        if reopened is None:
            batch = None if run.batch_id is None else await self.get_batch(run.batch_id)
            raise run_not_retried(run_id, run.status, batch)
        audit("run.retried", "retried it", fields_of_run(reopened), None if by is None else by.name)
        return reopened

    def _retry(self, max_cost: float | None, calls: RetriedCalls, by: Principal | None) -> Retry:
        return Retry(self._engine_id, max_cost, calls, None if by is None else by.name)

    async def delete_run(self, run_id: str) -> None:
        run = await self.get_outline(run_id)
        await self._wait_until_seen(run.completed_at)
        if run.batch_id is not None or not await self.store.delete_run(run_id):
            raise not_deleted(await self.get_outline(run_id))
        audit("run.deleted", "deleted it", fields_of_run(run))

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        self._check_entered()
        return await self.store.list_runs(self._flock, wanted)

    async def _spent(self, wanted: RunFilter) -> Sequence[tuple[str, Usage | None]]:
        self._check_entered()
        return await self.store.spent(self._flock, wanted)

    async def get_account(self, principal: str) -> Account:
        self._check_entered()
        return await self._runner.account(self._flock, principal)

    async def secret(self) -> str:
        self._check_entered()
        return await self.store.secret(self._flock)

    async def made_by(self, key: IdempotencyKey) -> str | None:
        self._check_entered()
        return await self.store.made_by(self._flock, key)

    async def _set_budget(self, principal: str, max_cost: float | None) -> None:
        await self.store.set_budget(self._flock, principal, max_cost)

    async def _usage_pages(self, wanted: UsageFilter) -> AsyncIterator[Sequence[UsageRow]]:
        for day in range(wanted.first_day.toordinal(), wanted.last_day.toordinal() + 1):
            yield await self.store.usage(self._flock, date.fromordinal(day), wanted)

    def watch(self, run_id: str) -> AbstractContextManager[LiveOutput]:
        return self._runner.watch(run_id)

    def _watch_until_read(self, run_id: str) -> AbstractContextManager[None]:
        return self._runner.watch_until_read(run_id)

    @contextlib.contextmanager
    def _reader(self, run_id: str, after: int, *, reasoning: bool) -> Iterator[RunReader]:
        with self.watch(run_id) as output, output.reader(after, reasoning=reasoning) as live:
            self._runner.unread.drop(run_id)
            yield StoreReader(self, self._runner, self._relay.follow, self._changed_outline, run_id, output, live)

    def _may_end_in_drain(self, run_id: str) -> bool:
        return run_id in self._runner.active

    def _next_change(self) -> Callable[[], Awaitable[object]]:
        return self._store_changed.next.wait

    async def shown_result(self, run: Run, position: int | None = None) -> msgspec.Raw | LongJSON | None:
        """Return the result of *run*, or of its step at *position*: a long one as ``LongJSON``, which holds no *run*.

        Raises: RunNotFound, StoreError if *run* is a stub, whose results are only in the store.
        """
        result = run.result if position is None else run.steps[position].result
        if result is None or (result != NOT_LOADED if run.is_stub else len(result) <= LONG_BYTES):
            return result
        if run.status is RunStatus.COMPLETED and position == len(run.steps) - 1:
            position = None  # the last result is stored only once, as that of the run
        length = await self.store.result_bytes(run.run_id, position) if run.is_stub else len(result)
        kept = functools.partial(self._retention.keeping, run.batch_id or run.run_id)
        long = LongJSON(length, functools.partial(self.store.read_result, run.run_id, position), kept)
        return long if length > LONG_BYTES else await self.store.short_result(run.run_id, position)

    async def _wait_until_seen(self, completed_at: datetime | None) -> None:
        """Wait until other engines have seen the end of a record, before it is deleted."""
        if self.store.is_shared and completed_at is not None:
            await anyio.sleep(max(0, min(SEEN_BY_ALL_S, SEEN_BY_ALL_S - (now() - completed_at).total_seconds())))

    def _check_has_agent(self, agent_name: str) -> None:
        if agent_name not in self._agents:
            raise Conflict(f"This program does not have the required agent {agent_name!r}. Use a program that has it.")

    def _start_task(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> bool:
        """Start *work*. Return False if the engine is shutting down: it is recovered at the next start instead."""
        if self._tasks is None or self.is_draining:
            return False
        start_in_empty_context(self._tasks, work, *args)
        return True

    def _start(self, run: Run | None, context: Context | None = None) -> None:
        """Start *run* in *context*, by default an empty one, like ``_start_task``."""
        if run is not None and self._tasks is not None and not self.is_draining:
            self._runner.start(self._tasks, run, context or Context())

    # Background tasks

    async def _save_progress(self, at: float, share: FairShare) -> None:
        """Store the progress of all runs that have reported some, and wake those that wanted to be by *at*."""
        for active in list(self._runner.active.values()):
            await share.checkpoint()
            # After its step, a newer record is already being written, which must not be replaced by this one.
            is_changed = active.progress is not active.run.progress or active.spent is not active.run.spent
            if active.context is not None and is_changed:
                active.update(replace(active.run, progress=active.progress, **active.costs))
                self.store.save_nowait(active.run)
            if at >= active.wake_at:
                active.wake_at = math.inf
                active.wake()

    async def _watch(self) -> None:
        """Watch for changes by other engines, and for dead engines. An iteration takes microseconds."""
        self._runner.watch_task = current_task()
        version, check_at = -1, anyio.current_time() + CHECK_INTERVAL_S
        while True:
            await anyio.sleep(WATCH_INTERVAL_S)
            at, share = anyio.current_time(), FairShare()
            await self._save_progress(at, share)
            self._runner.unread.drop_expired()
            self._runner.quarantine.check()
            self.store.flush_nowait()
            try:
                if is_check_due := self.store.is_shared and at >= check_at:
                    check_at = at + CHECK_INTERVAL_S
                    await self.store.check_file()
                if self.store.is_displaced:
                    self._wake_all()  # their next read raises StoreError
                    continue
                seen = await self.store.data_version() if self.store.is_shared else version - 1
                if seen != version:
                    self._notify_store_changed()
                    for run_id in list(self._runner.active):
                        await share.checkpoint()
                        self._note_answer(run_id)
                    for run_id, attempt in await self.store.cancels_for(self._engine_id):
                        if run_id in self._runner.active:
                            self._runner.active[run_id].cancel()
                        else:
                            self._runner.cancelled_before[run_id] = attempt
                    for batch_id in await self.store.batches.cancels_for(self._engine_id):
                        self._batches.cancel(batch_id)
                    awaited, cancelled = self._runner.awaited, self._runner.cancelled_before
                    for id_ in await self.store.ended({**awaited, **cancelled}) if awaited or cancelled else ():
                        cancelled.pop(id_, None)  # it may have ended without starting here, with its batch
                        if id_ in awaited:
                            awaited.pop(id_).notify()
                    version = seen  # only now, so that what could not be read is read again
                if is_check_due:
                    if not await self.store.renew_registration(self._engine_id, self._flock):
                        logger.warning(
                            "another engine has taken over the runs of this one, which continues with new work"
                        )
                    await self._recovery.take_over()
            except StoreError as exc:
                logger.error("the store cannot be watched: %s", exc)
            except Exception:  # such as too many open files: runs and the watch must continue
                logger.exception("the store cannot be watched")

    def _notify_store_changed(self) -> None:
        self._store_changed.notify()
        for run_id, live in self._runner.watched.items():
            active = self._runner.active.get(run_id)
            if live.readers and (active is None or active.run.is_stub):
                live.note_news()

    def _wake_all(self) -> None:
        """Wake all that wait for a run or a batch, so that they check again."""
        self._notify_store_changed()
        while self._runner.awaited:
            self._runner.awaited.popitem()[1].notify()

    async def _wake_readers(self) -> None:
        """Let those who read events see whether a keep-alive is due: one timer for all."""
        while True:
            await anyio.sleep(WAKE_INTERVAL_S)
            for live in self._runner.watched.values():
                live.wake()

    async def _end_waits(self) -> None:
        """Continue or end the runs whose waits are over. All engines of the flock do, and one is first."""
        while True:
            await anyio.sleep(CHECK_INTERVAL_S)
            ended, share = list[Run](), FairShare()
            try:
                then = functools.partial(self._on_expired, ended)
                await self.store.expire(self._flock, self._engine_id, now(), then=then)
                for run in ended:
                    await self._runner.warn_of_messages(run)
                    await share.checkpoint()
            except StoreError:
                pass  # the store has logged it
            except Exception:
                logger.exception("runs whose waits are over could not be continued")

    def _on_expired(self, ended: list[Run], runs: Sequence[Run]) -> None:
        for run in runs:
            if run.status.is_final:
                self._runner.ended(run)
                ended.append(run)
            else:
                self._start_answered(run)

    async def delete_old(self) -> None:
        """Delete old runs; see ``Retention.delete_old``."""
        await self._retention.delete_old()

    # Batches

    async def _accept_batch(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        with accepting(self._accepting, key):
            return await self._batches.submit(intake, key)

    async def get_batch(self, batch_id: str) -> Batch:
        self._check_entered()
        batch = await self.store.batches.get(batch_id)
        if batch is None or batch.flock != self._flock:
            raise BatchNotFound(batch_id)
        return batch

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        with anyio.move_on_after(timeout_s):
            while not (await self.get_batch(batch_id)).status.is_final:
                if self.is_draining:
                    raise wait_stopped()
                await self._runner.end_of(batch_id).wait()
        return await self.get_batch(batch_id)

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Statuses = tuple(RunStatus)
    ) -> Sequence[Run]:
        await self.get_batch(batch_id)
        page, wanted, share = Page[Run](limit), statuses_of(statuses), FairShare()
        while len(page) < limit:
            some = await self.store.batches.items(batch_id, after, min(limit, ITEMS_AT_ONCE), wanted)
            if not some or not all(map(page.add, some)):
                break
            after = some[-1].position or 0
            await share.checkpoint()
        return page

    async def count_submitted(self, batch_id: str) -> int:
        """Return how many calls of a batch are in jobs of batch endpoints."""
        return sum(count for _, count in (await self.store.jobs.held(batch_id)).values())

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        self._check_entered()
        return await self.store.batches.page(self._flock, wanted)

    async def cancel_batch(self, batch_id: str) -> Batch:
        await self.get_batch(batch_id)
        if await self.store.batches.request_cancel(batch_id):
            batch = await self.get_batch(batch_id)
            audit("batch.cancel_requested", "requested its cancellation", fields_of_run(batch))
            if batch.owner == self._engine_id:
                self._batches.cancel(batch_id)
            else:
                await self._recovery.take_over_cancelled(batch_id, batch.owner)
                await anyio.sleep(SEEN_BY_ALL_S)  # after that its owner starts no more items
        batch = await self.get_batch(batch_id)
        check_cancel(f"batch {batch_id}", batch.status)
        return batch

    async def retry_batch(
        self,
        batch_id: str,
        only: Statuses = (),
        max_cost: float | None = None,
        *,
        calls: RetriedCalls = "keep",
        by: Principal | None = None,
        options: BatchOptions | None = None,
    ) -> Batch:
        """Like ``Engine.retry_batch``. *options* replace those of the batch."""
        self._check_running()
        batch = await self.get_batch(batch_id)
        self._check_has_agent(batch.agent_name)
        self._check_prices(batch.agent_name, max_cost)
        self._check_not_spent(batch, max_cost)
        statuses, retry = self._retried(only), self._retry(max_cost, calls, by)._replace(options=options)
        reopened = await self.store.batches.reopen(
            batch_id, statuses, self._limits.max_open_items, retry, self._batches.start
        )
        if reopened is None:
            raise not_retried(await self.get_batch(batch_id), statuses)
        audit("batch.retried", "retried it", fields_of_run(reopened), None if by is None else by.name)
        return reopened

    async def delete_batch(self, batch_id: str) -> None:
        batch = await self.get_batch(batch_id)
        await self._wait_until_seen(batch.completed_at)
        if not await self.store.batches.drop(batch_id):
            raise not_deleted(batch)
        audit("batch.deleted", "deleted it", fields_of_run(batch))


def _audit_cancel(run: Run) -> None:
    audit("run.cancel_requested", "requested its cancellation", fields_of_run(run))

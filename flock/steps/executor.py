"""Executes the steps of runs, in the embedded engine or in a worker of a cluster.

This module handles slots, deadlines, threads, interruption, size checks, observers and the step itself. To store
records and to wake waiting callers, an engine overrides methods of ``ActiveRun``.
"""

import asyncio
import contextlib
import functools
import logging
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent, ModelAgent, Resources
from flock.agents.handoff import exchanges_of, execute_agent, inputs_for, next_agent
from flock.agents.history import Exchange
from flock.agents.shared import Shared, State
from flock.errors import ChangedProgram, Interrupted, InvalidOutput, OwnershipLost, ResultTooLarge
from flock.files import FOLDER
from flock.limits import Limits
from flock.logs import fields_of_run
from flock.models.llm import ModelClient
from flock.models.prices import Budget, DayBudget, Price, priced
from flock.runs import (
    Answer,
    Batch,
    Call,
    CallKind,
    Observer,
    Progress,
    Question,
    Run,
    RunContext,
    RunStatus,
    Step,
    Usage,
    added,
    steady_now,
    traces,
)
from flock.runs.context import CURRENT_CALL
from flock.runs.usage import spent_with
from flock.scopes import Clock, loop_clock, new_scope, set_deadline
from flock.steps.callees import Callees
from flock.steps.journal import Journal
from flock.steps.live import LiveOutput
from flock.steps.outcomes import CANCELLED, Outcome, failure_of, queue_timeout, timeout_of, with_hint
from flock.steps.retries import dropped_calls, kept_calls, key_of, without_excluded
from flock.steps.slots import AgentSlot, BatchKey, Slots, acquire_all, acquire_all_nowait
from flock.steps.threads import Threads

logger = logging.getLogger("flock.runs")

#: The slot of the step that the current task, or its thread, is executing.
CURRENT_SLOT: ContextVar[AgentSlot] = ContextVar("flock_slot")
#: Max total size of the runs in the history of an agent, as JSON.
MAX_HISTORY_BYTES = 256 * 1024
#: Held while ``ActiveRun.spent`` changes.
SPENDING = threading.Lock()


class WaitingForAnswers(Exception):
    """A step ended because its agent waits for *questions*, sleeps or messages. It starts again at the first answer."""

    def __init__(self, questions: Sequence[Question]) -> None:
        super().__init__(f"{len(questions)} questions")
        self.questions = questions


class AgentElsewhere(Exception):
    """A step ended because it calls the agent *name*, which another process has. It starts again there."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class ActiveRun:
    """A run that is running in this process, or waits for a slot.

    Args:
        timeout_s: wall-clock seconds for the attempt, from the start of its first step.
        is_again: its next step may have been started before, by a process that died.
        queue_timeout_s: max seconds to wait for its first step; None means no limit.

    Attributes:
        run: the record. It may be a stub while the run waits.
        scope: cancels its steps. The deadline is set when the first step in this process gets its slot.
        context: the context of the current step.
        started_at: when its first step in this process got its slot.
        cancel_requested: a client requested its cancellation.
        is_stopped: it was cancelled because the engine is shutting down. It is resumed later or elsewhere.
        progress: the latest progress that an agent has reported.
        live: what its agents write; None while it is not kept.
        spent: see ``Run``; including what is not written yet.
        dropped: see ``Run``; including the calls of a step that has failed now.
        now: returns the time for the record of the run, its steps and calls.
        spent_by: see ``Run``; including what is not written yet.
        budget: what it may cost, or its batch; None if there is no ``max_cost``.
        day_budget: what its principal may spend in a day; None if it has no principal.
    """

    budget: Budget | None = None
    day_budget: DayBudget | None = None
    live: LiveOutput | None = None
    #: The agents that another process has if this one lacks them.
    elsewhere: Collection[str] = ()
    #: Calls of models may wait for a batch endpoint.
    has_batches = False
    #: Calls of the next step have finished, so they must be read.
    has_calls = False
    #: The calls of earlier attempts that the step does not execute again.
    kept: Sequence[Call] = ()
    #: Seconds of ``queue_timeout_s`` that have already passed in another process.
    queued_s = 0.0
    #: Seconds of the attempt that are not part of ``timeout_s``, because it waited for answers in another process.
    waited_s = 0.0
    context: RunContext | None = None
    started_at: datetime | None = None
    cancel_requested = False
    is_stopped = False

    def __init__(
        self, run: Run, timeout_s: float, *, is_again: bool = False, queue_timeout_s: float | None = None
    ) -> None:
        self.run = run
        self.timeout_s = timeout_s
        self.is_again = is_again
        self.queue_timeout_s = queue_timeout_s
        self.scope = new_scope()
        self.progress = run.progress
        self.spent, self.spent_by = run.usage, run.spent_by
        self.dropped = run.dropped
        self.now = steady_now()

    def note_progress(self, progress: Progress | None) -> None:
        """Record progress. It may be called from any thread."""
        self.progress = progress

    def note_usage(self, agent_name: str, usage: Usage, model: str | None) -> None:
        """Add the tokens of an answer to an agent. It may be called from any thread."""
        with SPENDING:
            self.spent = added(self.spent, usage)
            self.spent_by = spent_with(self.spent_by, agent_name, model or "", usage)
            for budget in self.budgets:
                budget.add(usage)

    @property
    def budgets(self) -> Sequence[Budget]:
        return [budget for budget in (self.budget, self.day_budget) if budget is not None]

    @property
    def costs(self) -> dict[str, Any]:
        """The fields ``spent`` and ``spent_by`` of the record."""
        with SPENDING:
            return {"spent": self.spent, "spent_by": self.spent_by}

    def cancel(self) -> None:
        """Request the run to stop."""
        self.cancel_requested = True
        if self.context is not None:
            self.context.request_cancel()
        self.scope.cancel()

    async def history(self, agent: Agent, limit: int, has_calls: bool = False) -> Sequence[Exchange]:
        """Return the last *limit* exchanges of *agent* in earlier runs of the session, oldest first."""
        if self.run.session_id is None:
            return ()
        found = exchanges_of(agent, await self.earlier_runs(limit))[-limit:]
        return [
            exchange._replace(calls=await self.calls_of(run, position)) if has_calls else exchange
            for run, position, exchange in found
        ]

    @property
    def is_cut_off(self) -> bool:
        """Whether it is being stopped, or its deadline has passed, so that what ends now is to be executed again."""
        return Clock(self.scope).is_over

    @property
    def worked_s(self) -> float:
        """Seconds of ``timeout_s`` that the attempt has spent. At least a millisecond, so that it is never 0."""
        return max(0.001, self.timeout_s - (self.scope.deadline - anyio.current_time()))

    # To be overridden by an engine

    async def is_next(self) -> bool:
        """Whether its step does not have to wait for an earlier run of its session."""
        return True

    @property
    def may_begin(self) -> bool:
        """Whether its step may use the slot for which it has waited. Otherwise it waits again."""
        return True

    async def wait_begins(self) -> None:
        """Called before its step waits for a slot. Returns when it need not wait for its session."""

    async def begin(self) -> Run:
        """Called when a step gets its slot. Returns the whole record."""
        return self.run

    async def started(self, run: Run, agent: Agent) -> None:
        """Called when the attempt starts, with its new record and the agent of its first step."""

    async def wait_for_store(self) -> None:
        """Called before each call. Returns when its result can be stored."""

    async def finished_calls(self) -> Sequence[Call]:
        """Called if the next step may have run before in this attempt. Returns its finished calls."""
        return ()

    async def earlier_calls(self, run: Run) -> Sequence[Call]:
        """Called in a retry. Returns the finished calls of the next step of *run* in tries from its ``first_try`` on.

        Those of the current one are left out.
        """
        return ()

    async def keep_call(self, call: Call) -> None:
        """Called with each finished call, and with the start of one that is executed at most once.

        It may be an answer or a message that ``check_wait`` has returned: then its place is stored with it. On return
        it is stored. Raises Uncertain if another process has started the same call.
        """

    async def check_wait(self, wait: Question) -> Call | None:
        """Called with a question or an awaited message of a step that still runs; see ``Journal``."""
        return None

    async def earlier_runs(self, limit: int) -> Sequence[Run]:
        """Return the last *limit* completed runs of its session and agent, oldest first, or fewer if they are long."""
        return ()

    async def calls_of(self, run: Run, position: int) -> Sequence[Call]:
        """Return the calls of a step of one of the ``earlier_runs``, oldest first, in the tries that counted."""
        return ()

    async def keep(self, step: Step) -> None:
        """Called with a step while it still holds its slot."""


@dataclass(eq=False)
class StepExecutor:
    """Executes the steps of one engine or worker.

    Args:
        limits: uses ``max_concurrency``, a tenth of which is reserved for runs that are not items, ``max_threads``,
            ``max_tokens``, ``max_calls`` and ``grace_s``.
        max_steps, expose_errors: see ``EmbeddedEngine``.
        max_result_bytes: max size of the result of one step, as JSON.
        max_run_bytes, max_item_bytes: max total size of the inputs and results, as JSON, of a run and of an item.
        answer: answers the questions of agents at once. Without it, their runs wait for answers.
        prices: of models, by name; see ``flock.models.prices``.
        shared: what the agents share.
        folder_of: returns the folder with the files of a principal.

    Attributes:
        state: the state of the flock. The engine enters it.
        item_slots: max batch items that run at the same time.
    """

    agents: Mapping[str, Agent]
    models: ModelClient
    observers: Sequence[Observer]
    _: KW_ONLY
    limits: Limits
    max_steps: int
    expose_errors: bool
    max_result_bytes: float = math.inf
    max_run_bytes: float = math.inf
    max_item_bytes: float = math.inf
    answer: Answer | None = None
    prices: Mapping[str, Price]
    shared: Shared = field(default_factory=Shared)
    folder_of: Callable[[str | None], Path] | None = None

    def __post_init__(self) -> None:
        self.state = State(self.shared)
        count = self.limits.max_concurrency
        self.item_slots = count - count // 10
        self._slots = Slots(count, reserved=count // 10)
        self._agent_slots: dict[str, Slots] = {}
        self._threads = Threads(self.limits.max_threads)
        #: the agents and names of equal calls that the log has
        self._warned_of = set[tuple[str, str]]()
        if any(isinstance(agent, ModelAgent) for agent in self.agents.values()):
            self.models.prepare()

    def budget(self, max_cost: float | None, spent: Usage | None, owner: str) -> Budget | None:
        return None if max_cost is None else Budget(self.prices, max_cost, spent, owner)

    async def execute(self, active: ActiveRun) -> Step:
        """Run the next agent of a run, in a slot of the engine and one of the agent.

        Raises: what the agent raises; Interrupted, InvalidHandoff, QueueTimeout, ResultTooLarge, TooManySteps;
            WaitingForAnswers if the agent asks a person; AgentElsewhere if it calls an agent that only others have.
        Cancellation: the step is lost. The slots stay taken until no thread is running for the run.
        """
        agent = next_agent(active.run, self.agents, self.max_steps)
        assert agent is not None, "all steps are done"
        is_again, active.is_again = active.is_again, False
        if is_again and agent.on_interrupt == "fail" and not active.run.worked_s:
            raise Interrupted(
                f"The server stopped while {agent.name!r} was running. "
                'Its on_interrupt="fail" rules out an automatic retry.'
            )
        slot = await self._acquire(active, agent)
        # It is reset below: a batch starts a new task for its next item if a context variable is left.
        folder = FOLDER.set(self.folder_of and functools.partial(self.folder_of, active.run.principal))
        try:
            run = await active.begin()
            inputs = inputs_for(agent, run)
            active.started_at = active.started_at or active.now()
            if agent.on_retry == "again":
                run = replace(run, journal=None)
            is_start, spent_s = run.status is RunStatus.STARTING, run.worked_s
            if is_start:
                started_at = run.started_at if run.worked_s else active.started_at
                first_span = run.first_span or traces.current()
                run = replace(run, status=RunStatus.RUNNING, started_at=started_at, first_span=first_span)
            elif run.started_at is not None:
                spent_s = max(0, (active.now() - run.started_at).total_seconds()) - active.waited_s
            if active.scope.deadline == math.inf:
                set_deadline(active.scope, loop_clock()() + active.timeout_s - spent_s)
            if is_start:
                await active.started(run, agent)
                if not run.worked_s:
                    self.notify("run_started", run)
            with traces.of_step(run, agent.name, WaitingForAnswers, AgentElsewhere):
                step = await self._step(active, run, agent, inputs, slot, is_again=is_again)
            self._check_size(run, step)
            await active.keep(step)
            if active.live is not None:
                active.live.end_step(len(run.steps))
            self.notify("step_completed", step)
            return step
        finally:
            active.context = None
            self._threads.when_free(active, functools.partial(self._release, slot))
            with contextlib.suppress(ValueError):  # the coroutine may be closed in another context
                FOLDER.reset(folder)

    async def _step(
        self, active: ActiveRun, run: Run, agent: Agent, inputs: msgspec.Raw, slot: AgentSlot, *, is_again: bool
    ) -> Step:
        """Execute *agent*. If it uses its context, there is a journal of its calls."""
        started_at, batch = active.now(), _batch_of(run)
        call_in_thread = functools.partial(self._call_in_thread, active, batch)
        resources = Resources(self.models, call_in_thread, active.history, self.agents, self.shared, active.has_batches)
        usage, model, call_count = None, None, 0
        if agent.uses_context:
            journal = await self._journal(active, run, agent, resources, is_again=is_again)
            result = await self._with_journal(active, run, agent, inputs, slot, resources, journal)
            usage, model, call_count = journal.usage, journal.model, journal.kept
        else:  # a journal takes longer than a short function
            result = await execute_agent(agent, inputs, resources, RunContext(run, agent.name, active.note_progress))
        return Step(
            agent_name=agent.name,
            result=result,
            next_agent=await agent.choose_next(result),
            usage=usage,
            attempt=run.attempt,
            call_count=call_count,
            first_try=run.first_try,
            model=model,
            started_at=started_at,
            completed_at=active.now(),
        )

    async def _journal(
        self, active: ActiveRun, run: Run, agent: Agent, resources: Resources, *, is_again: bool
    ) -> Journal:
        execute_callee = functools.partial(self._execute_callee, _batch_of(run), resources)
        is_retry = run.first_try < run.tries
        earlier = without_excluded(await active.earlier_calls(run), run.begun_by) if is_retry else ()
        active.kept = kept_calls(earlier, run.dropped)
        finished = await active.finished_calls() if is_again or active.has_calls else ()
        elsewhere = () if self.is_at_most_once(run) else active.elsewhere  # it must not start a second time there
        callees = Callees(
            caller=run, agents=self.agents, max_steps=self.max_steps, execute=execute_callee, elsewhere=elsewhere
        )
        return Journal(
            [*active.kept, *finished],
            save=functools.partial(self._keep_call, active),
            wait_for_store=active.wait_for_store,
            on_start=functools.partial(_call_started, active),
            call_in_thread=resources.call_in_thread,
            run_callee=callees.run,
            spent=run.usage_of_steps or Usage(),
            max_calls=self.limits.max_calls - sum(step.call_count for step in run.steps),
            max_result_bytes=self.max_result_bytes,
            max_total_bytes=self.max_item_bytes,
            expose_errors=self.expose_errors,
            clock=Clock(active.scope),
            now=active.now,
            is_cut_off=lambda: active.is_cut_off,
            replay_grace_s=self.limits.replay_grace_s,
            stops_on_change=agent.on_change == "stop" and run.first_try == run.tries,
            call_ids=run.call_ids,
            call_key=run.call_key,
            answer=self.answer,
            waited_for=active.run.waiting_for,  # it may have learnt of more
            tries=run.tries,
            position=len(run.steps),
            check_wait=functools.partial(self._check_wait, active),
        )

    async def _with_journal(
        self,
        active: ActiveRun,
        run: Run,
        agent: Agent,
        inputs: msgspec.Raw,
        slot: AgentSlot,
        resources: Resources,
        journal: Journal,
    ) -> msgspec.Raw:
        """Execute *agent*, and return its result. Raises WaitingForAnswers, AgentElsewhere; see ``execute``."""
        if active.budget is None:
            active.budget = self.budget(run.max_cost, active.spent, "run")
        if active.day_budget is not None:
            await active.day_budget.refresh()
        active.context = context = RunContext(
            run,
            agent.name,
            active.note_progress,
            journal,
            on_usage=functools.partial(self._on_usage, active),
            max_tokens=self.limits.max_tokens,
            live=lambda: active.live,
            output_names=agent.output_names,
            priced=functools.partial(priced, self.prices),
            budgets=active.budgets,
            state=lambda: self.state.value,
        )
        if active.cancel_requested:
            context.request_cancel()
        if active.live is not None:
            active.live.begin_step(context)
        if journal.mixed_up and (agent.name, journal.mixed_up) not in self._warned_of:
            self._warned_of.add((agent.name, journal.mixed_up))
            template = (
                "run %s: %s made equal calls of %s at the same time, which ended differently. Only the order in which "
                "they start tells them apart. Pass another call_name= to each of them."
            )
            logger.warning(template, run.run_id, agent.name, journal.mixed_up, extra=fields_of_run(run))
        reset = CURRENT_SLOT.set(slot)
        failure: BaseException | None = None
        try:
            with journal.scope:
                result = await execute_agent(agent, inputs, resources, context)
        except BaseException as exc:  # a TaskGroup of Python 3.11 may leave a cancellation behind
            failure = exc
            is_ours = isinstance(exc, (Exception, asyncio.CancelledError)) and journal.is_suspended
            if not is_ours or active.is_cut_off:
                raise
        finally:
            CURRENT_SLOT.reset(reset)
            left = await journal.end(self.limits.grace_s, functools.partial(self._threads.are_awaited, active))
            if failure is not None and not journal.is_suspended:
                invalid = map(key_of, journal.replies) if isinstance(failure, InvalidOutput) else ()
                failed = dropped_calls(journal.failed, failure, journal.has_gone_on, active.kept)
                active.dropped = (*run.dropped, *failed, *invalid)
            failure = None  # it refers to this frame
            journal.forget_failed()
            if left:
                template = "run %s: %s ended, but %d of its calls still run: their tasks swallow their cancellation"
                logger.warning(template, run.run_id, agent.name, left, extra=fields_of_run(run))
        _raise_if_ended(journal, agent)
        if journal.not_repeated:
            ids = ", ".join(journal.not_repeated)
            logger.warning("run %s: %s did not repeat these calls: %s", run.run_id, agent.name, ids)
        return result

    def _on_usage(self, active: ActiveRun, agent_name: str, usage: Usage, model: str | None) -> None:
        active.note_usage(agent_name, usage, model)
        self.notify("tokens_spent", agent_name, usage)

    async def _call_in_thread(
        self, active: ActiveRun, batch: BatchKey, function: Callable[[], Any], deadline: float = math.inf
    ) -> Any:
        """Call a synchronous function for a run, in the step whose slot the current task holds."""
        slot = CURRENT_SLOT.get(None)
        return await self._threads.call(
            function,
            [active] if slot is None else [active, slot],
            batch,
            min(deadline, active.scope.deadline),
            keeps_result=bool(CURRENT_CALL.get()),
        )

    async def _execute_callee(
        self, batch: BatchKey, resources: Resources, agent: Agent, inputs: msgspec.Raw, context: RunContext
    ) -> msgspec.Raw:
        """Execute an agent that a step has called, in the slot of the run."""
        slot = AgentSlot(self._slots_of(agent), batch)
        async with CURRENT_SLOT.get().waiting_for_callee():
            await slot.acquire()
            reset = CURRENT_SLOT.set(slot)
            try:
                return await execute_agent(
                    agent, inputs, resources, context.of_called_agent(agent.name, agent.output_names)
                )
            finally:
                CURRENT_SLOT.reset(reset)
                self._threads.when_free(slot, slot.close)

    async def _keep_call(self, active: ActiveRun, call: Call) -> None:
        """Store a call. If another process owns the run now, stop the agent."""
        try:
            await active.keep_call(call)
        except OwnershipLost:
            active.scope.cancel()
            raise
        if not call.is_start:
            if active.live is not None and active.context is not None:
                active.live.end_call(active.context.position, call.call_id)
                active.live.note_news()
            self.notify("call_completed", call)

    async def _check_wait(self, active: ActiveRun, wait: Question) -> Call | None:
        """Return the call that answers *wait*, or None. If another process owns the run now, stop the agent."""
        try:
            return await active.check_wait(wait)
        except OwnershipLost:
            active.scope.cancel()
            raise

    def stop(self, active: ActiveRun) -> None:
        """Stop a run because the engine is shutting down. Do not wait for a function in a thread."""
        active.is_stopped = True
        self._threads.abandon(active)
        active.scope.cancel()

    async def outcome_of(self, active: ActiveRun, exc: BaseException | None) -> Outcome:
        """Return the outcome of a run whose step was cancelled or raised *exc*. It is cancelled when no thread runs."""
        if active.cancel_requested:
            await self._threads.until_free(active, active.scope.deadline)
        if anyio.current_time() >= active.scope.deadline:
            outcome = timeout_of(active.timeout_s)
        elif active.cancel_requested:
            return CANCELLED
        else:
            outcome = failure_of(active.run, exc, expose_errors=self.expose_errors)
        return with_hint(active.run, outcome) if active.kept else outcome

    def find(self, name: str | None) -> Agent | None:
        """Return the agent with this name, or None."""
        return self.agents.get(name or "")

    def is_at_most_once(self, run: Run) -> bool:
        """Whether the next step of *run* must not be started a second time."""
        agent = self.find(run.next_agent_name)
        return agent is not None and agent.on_interrupt == "fail"

    def notify(self, event: str, *arguments: Run | Step | Call | Usage | Batch | str) -> None:
        """Call the method *event* of each observer that has it. Log an exception that an observer raises."""
        for observer in self.observers:
            try:
                getattr(observer, event, _ignore)(*arguments)
            except Exception:
                logger.exception("an observer raised in %s", event)

    def _slots_of(self, agent: Agent) -> Slots | None:
        """Return the slots of an agent with ``max_concurrency``."""
        if agent.max_concurrency is None:
            return None
        return self._agent_slots.setdefault(agent.name, Slots(agent.max_concurrency))

    async def _acquire(self, active: ActiveRun, agent: Agent) -> AgentSlot:
        """Acquire a slot of the engine and one of the agent, and return the latter. Raises QueueTimeout."""
        batch, of_agent = _batch_of(active.run), self._slots_of(agent)
        slots = [self._slots] if of_agent is None else [self._slots, of_agent]
        if active.scope.cancel_called:  # an unconditional checkpoint would take as long as a short step
            await anyio.lowlevel.checkpoint_if_cancelled()
        if await active.is_next() and acquire_all_nowait(slots, batch):
            return AgentSlot(of_agent, batch, is_held=True)
        limit_s = active.queue_timeout_s if active.run.status is RunStatus.STARTING else None
        with contextlib.nullcontext() if limit_s is None else anyio.move_on_after(limit_s - active.queued_s):
            while True:
                await active.wait_begins()
                await acquire_all(slots, batch)
                if active.may_begin:
                    return AgentSlot(of_agent, batch, is_held=True)
                for taken in slots:
                    taken.release(batch)
        assert limit_s is not None
        raise queue_timeout(limit_s)

    def _release(self, slot: AgentSlot) -> None:
        """Release the slots of a step: that of the engine, and that of the agent."""
        self._slots.release(slot.batch)
        slot.close()

    def _check_size(self, run: Run, step: Step) -> None:
        """Raise ResultTooLarge if the step cannot be stored, before another step costs money."""
        length = len(step.result)
        if length > self.max_result_bytes:
            raise ResultTooLarge(
                f"The result of {step.agent_name!r} has {length} bytes, more than the maximum "
                f"({self.max_result_bytes}, max_result_bytes)."
            )
        limit = self.max_run_bytes if run.batch_id is None else self.max_item_bytes
        if limit < math.inf and (size := run.exchange_bytes + length) > limit:
            raise ResultTooLarge(
                f"The result of {step.agent_name!r} has {length} bytes. All inputs and results of the run have {size} "
                f"bytes, more than the cluster can store for one run ({limit}, max_run_bytes)."
            )


def _raise_if_ended(journal: Journal, agent: Agent) -> None:
    """Raise ChangedProgram, WaitingForAnswers or AgentElsewhere if the step was ended for that."""
    if journal.change is not None:
        raise ChangedProgram(
            f"The program of {agent.name!r} was changed before this step had ended: {journal.change}. So it was "
            "stopped, because something might be done twice. Retry the run with the earlier program, or start "
            "another one."
        )
    if journal.questions:
        raise WaitingForAnswers(journal.questions)
    if journal.elsewhere is not None:
        raise AgentElsewhere(journal.elsewhere)


def _ignore(*arguments: object) -> None:
    """The method of an observer that was written for an earlier version."""


def _call_started(
    active: ActiveRun, call_id: str, name: str, kind: CallKind, arguments: msgspec.Raw, started_at: datetime
) -> None:
    if active.live is not None and active.context is not None:
        active.live.begin_call(active.context, call_id, name, kind, arguments, started_at)


def _batch_of(run: Run) -> BatchKey:
    return None if run.batch_id is None else (run.principal, run.batch_id)

"""Steps of runs and of batch items, in the activities of a worker.

``flock.steps.executor`` executes them. Here each step has a task of its own, so that an exception or a stray
cancellation ends only that step.
"""

import asyncio
import contextlib
import math
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from temporalio import activity
from temporalio.client import WorkflowQueryFailedError
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.service import RPCError, RPCStatusCode

from flock.agents.agent import Agent
from flock.errors import CallError, EngineFull, OwnershipLost, StoreError, Uncertain, Unreadable
from flock.runs import Call, Question, Run, RunStatus, Step, Usage, now
from flock.runs.traces import of_run
from flock.steps.executor import ActiveRun, AgentElsewhere, StepExecutor, WaitingForAnswers
from flock.steps.failures import lasting_of
from flock.steps.identity import asking_call
from flock.steps.outcomes import Outcome, queue_timeout, timeout_of
from flock.temporal.accounts import Accounts
from flock.temporal.cluster import RETRY_AFTER_S, Cluster, logger
from flock.temporal.messages import (
    Asked,
    Begun,
    CallDone,
    CallsPage,
    Execution,
    OfChunk,
    Report,
    Waits,
    latest,
    run_workflow_id,
)
from flock.temporal.records import Traces, journal_of, read_chunk, run_of
from flock.temporal.suspects import Gate, Suspicion
from flock.temporal.workflows import FlockRun

T = TypeVar("T")

#: Inputs and results of one run together. The cluster takes at most 2 MiB at once.
MAX_RUN_BYTES = 1_500_000
#: How long the histories of earlier attempts may take to read, in seconds, before they are read again.
PATIENCE_S = 60.0
#: The cluster will not accept the same signal later.
REFUSALS = (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.FAILED_PRECONDITION)
#: The pause before an activity that a worker left to others is given to a worker again, in seconds: the first one, and
#: the longest. Any worker may get it, so there must be several attempts soon.
MISS_PAUSE_S, MAX_MISS_PAUSE_S = 0.1, 10.0
#: How often a step that still runs looks for answers and messages, in seconds.
POLL_WAITS_S = 0.5
#: How many signals of one step are sent at the same time. The cluster holds back some dozens during a workflow task.
SIGNALS_AT_ONCE = 50
#: How often a suspect is left to others, to find a worker that executes nothing.
MAX_MOVES = 6


@dataclass(frozen=True)
class Workplace:
    """What a worker has to execute steps.

    Attributes:
        drain_timeout_s: how long steps may continue when the worker shuts down.
    """

    cluster: Cluster
    executor: StepExecutor
    gate: Gate
    accounts: Accounts
    drain_timeout_s: float


class ActivityStep(ActiveRun):
    """The next step of a run. It may have killed workers before; see ``Suspicion``.

    Attributes:
        outcome: its step, its questions, or how the run ends; None if the worker leaves the step to another one,
            because it shuts down or lacks something.
        lacks: what this worker lacks for it, such as an agent.
        needs, held_s: see ``Heartbeat``.
        lasting: see ``lasting_of``.
    """

    outcome: Step | WaitingForAnswers | Outcome | None = None
    lacks: str | None = None
    needs: str | None = None
    held_s = 0.0
    lasting: bool | None = False
    #: Of the step of an item.
    of_chunk: OfChunk | None = None

    def __init__(self, run: Run, timeout_s: float, at: Workplace, suspicion: Suspicion, **options: Any) -> None:
        super().__init__(run, timeout_s, **options)
        self._cluster, self._executor, self._gate = at.cluster, at.executor, at.gate
        self._account = at.accounts.of(run.principal)
        self.day_budget = None if run.principal is None else self._account.budget
        #: an earlier execution of the step may not have ended
        self._is_again = self.is_again or suspicion.attempt > 1
        self.suspicion = suspicion
        self._key = f"{run.run_id} {suspicion.attempt}"  # an earlier attempt may still be running here
        #: the waits that have begun while the step runs, and what has come for them
        self._asked: dict[str, Question] = {}
        self._found = Waits()
        self._signals = asyncio.Semaphore(SIGNALS_AT_ONCE)
        self._asking: set[asyncio.Task[None]] = set()
        self._polling: asyncio.Task[None] | None = None

    def note_usage(self, agent_name: str, usage: Usage, model: str | None) -> None:
        super().note_usage(agent_name, usage, model)
        self._account.spend(agent_name, usage, model)

    async def is_next(self) -> bool:
        return self.may_begin

    @property
    def may_begin(self) -> bool:
        return self._gate.is_open_to(self._key)

    async def wait_begins(self) -> None:
        if self.may_begin:
            return
        since = asyncio.get_running_loop().time()
        try:
            await self.suspicion.hold()
            await self._gate.wait_for_turn(self._key)
        finally:
            if self._begun_at is not None:  # otherwise its time has not begun
                held_s = asyncio.get_running_loop().time() - since
                self.held_s, self.waited_s = self.held_s + held_s, self.waited_s + held_s

    async def begin(self) -> Run:
        await self._gate.start(self._key, self.suspicion)
        return self.run

    async def started(self, run: Run, agent: Agent) -> None:
        self.run = replace(self.run, first_span=run.first_span)

    async def finished_calls(self) -> Sequence[Call]:
        """From now on, what the worker before this one reports does not count, since it only seems to be dead.

        What it has asked keeps its ids.
        """
        if self._is_again:
            await self._send(FlockRun.begun, Begun(**self._as_reporter), self.run.agent_name)
        calls, begun = await self._read_calls()
        waits = {asking_call(wait.call_id): wait for wait in (*self.run.waiting_for, *begun)}
        self.run = replace(self.run, waiting_for=tuple(waits.values()))
        return calls

    @property
    def _as_reporter(self) -> dict[str, Any]:
        """The fields of ``Report``."""
        info, generation = activity.info(), 0 if self.of_chunk is None else self.of_chunk.generation
        by = Execution(generation, int(info.activity_id), info.attempt, info.current_attempt_scheduled_time)
        return {"item": self.run.position or 0, "by": by}

    async def _read_calls(self) -> tuple[Sequence[Call], Sequence[Question]]:
        """Return the finished calls of the step, and the waits that it had begun."""
        calls, page = list[Call](), CallsPage(is_last=False)
        while not page.is_last:
            page = await self._ask(FlockRun.calls_from, len(calls))
            calls += page.calls
            self.spent = latest(self.spent, page.spent)
        return calls, page.waits

    async def _ask(self, query: Callable[..., T], more: object) -> T:
        """Return what the workflow answers to a *query* about the step."""
        args = query, self.run.position or 0, len(self.run.steps), more
        return await self._cluster.answered(lambda: self._cluster.ask(self._workflow_id, *args))

    async def earlier_calls(self, run: Run) -> Sequence[Call]:
        """Read them from the histories of the earlier attempts. Raises Unreadable if one was deleted."""
        lost = Unreadable(
            "The cluster has deleted the history of an earlier attempt, and with it the calls that a retry keeps. "
            'A retry with {"calls": "again"} executes all calls again.'
        )
        step, of_chunk = len(run.steps), self.of_chunk

        async def ask() -> list[Call]:
            async with self._cluster.rpc_scope(PATIENCE_S, missing=lost):
                if of_chunk is not None:
                    earlier, at = of_chunk.attempts[:-1], run.position or 0
                    chunk = await read_chunk(self._cluster, of_chunk.batch_id, of_chunk.chunk, earlier, whole=at)
                    return chunk.readings[at].traces.calls.get(step, [])
                found = Traces()
                for attempt in range(run.first_try, run.tries):
                    history = await self._cluster.history_of(run_workflow_id(run.run_id, attempt))
                    run_of(history, found, is_whole=True)
                return found.calls.get(step, [])

        return journal_of(step, await self._cluster.answered(ask))

    async def keep_call(self, call: Call) -> None:
        """Send the call to the workflow of this activity. A signal is in its history when this returns.

        Raises: CallError if the cluster refuses it, OwnershipLost if the workflow has ended, Uncertain if it is a start
            and another worker, which seems to be dead, has started the call too.
        """
        self.has_calls = True
        run = self.run
        await self._account.flush()  # before it is stored, so that nothing that is stored is missing
        done = CallDone(step=len(run.steps), call=call, spent=self.spent, **self._as_reporter)
        await self._send(FlockRun.call_done, done, call.name)
        if call.is_start:
            calls, _ = await self._read_calls()
            same = [each.started_at for each in calls if each.call_id == call.call_id]
            if same[:1] != [call.started_at]:
                raise Uncertain(f"Another worker has started the call {call.name!r} too. Find out whether it was done.")
        elif self.suspicion.clear():
            await self.suspicion.confirm()

    async def _send(self, signal: Callable[..., None], value: Report, name: str) -> None:
        while True:
            try:
                async with self._signals:
                    if await self._cluster.signal(self._workflow_id, signal, value):
                        return
                raise OwnershipLost(self.run.run_id)
            except (StoreError, EngineFull) as exc:
                if isinstance(exc.__cause__, RPCError) and exc.__cause__.status in REFUSALS:
                    raise CallError(f"The cluster does not store the call {name!r}: {exc.__cause__}.") from exc
                await asyncio.sleep(RETRY_AFTER_S)

    async def check_wait(self, wait: Question) -> Call | None:
        """Raises: CallError, OwnershipLost; see ``keep_call``.

        Cancellation: a message that was given to the wait is in the journal when the step runs again.
        """
        if wait.call_id not in self._asked or (wait.kind == "message" and wait.question in self._found.messages):
            self._asked[wait.call_id] = wait
            asked = Asked(step=len(self.run.steps), question=wait, **self._as_reporter)
            asking = asyncio.create_task(self._send(FlockRun.asked, asked, "ask" if wait.is_question else "receive"))
            self._asking.add(asking)
            asking.add_done_callback(self._asking.discard)
            await asyncio.shield(asking)
            if self._polling is None:
                self._polling = asyncio.create_task(self._poll_waits())
            if wait.kind == "message":
                with contextlib.suppress(RPCError, WorkflowQueryFailedError):
                    await self._read_waits()
        return next((answer for answer in self._found.answers if answer.call_id == wait.call_id), None)

    async def _poll_waits(self) -> None:
        """Deliver answers and messages to the step, until this task is cancelled or the workflow has ended."""
        with contextlib.suppress(RPCError, WorkflowQueryFailedError):
            while True:
                await asyncio.sleep(POLL_WAITS_S)
                await self._read_waits()
                kept = self._found.messages
                if any(wait.kind == "message" and wait.question in kept for wait in self._asked.values()):
                    self._note_news()

    async def _read_waits(self) -> None:
        before, self._found = self._found, await self._ask(FlockRun.waits, list(self._asked))
        if len(self._found.answers) != len(before.answers):
            self._note_news()

    def _note_news(self) -> None:
        if self.context is not None:
            self.context.journal.note_answer()

    @property
    def _workflow_id(self) -> str:
        return activity.info().workflow_id or ""

    async def execute(self) -> None:
        """Execute the step and set ``outcome``. A return value would be lost if an agent left a cancellation behind."""
        self._gate.arrive(self._key, self.suspicion)
        try:
            with of_run(self.run) as span:
                await self._execute()
                if isinstance(self.outcome, Outcome) and self.outcome.status is RunStatus.FAILED:
                    span.fail(self.outcome.error_type or "failed")
        finally:
            if self._polling is not None:
                self._polling.cancel()
            if self._asking:  # a message must not be given to a wait of a step that has ended
                await asyncio.wait(self._asking)
            await self._account.flush()
            await self._gate.leave(self._key, self.suspicion)

    async def _execute(self) -> None:
        failure: BaseException | None = None
        if self.suspicion.is_suspect and self.suspicion.misses < MAX_MOVES and self._gate.is_busy:
            self.lacks = "time for a suspect"
            return
        for name in (self.run.next_agent_name, self.needs):
            if name is not None and name in self.elsewhere and self._executor.find(name) is None:
                await self._leave(f"agent {name!r}")
                return
        if self.run.files and self._cluster.files is None:
            await self._leave("folder for files (--files-dir)")
            return
        try:
            with self.scope:
                self.outcome = await self._executor.execute(self)
                return
        except BaseException as exc:  # an agent's SystemExit would end the worker
            failure = exc
        try:
            if isinstance(failure, AgentElsewhere) and not self.cancel_requested:
                self.needs = failure.name
                await self._leave(f"agent {failure.name!r}")
                return
            if isinstance(failure, WaitingForAnswers) and not self.cancel_requested:
                length = len(msgspec.json.encode(failure.questions))
                if length <= MAX_RUN_BYTES:
                    self.outcome = failure.with_traceback(None)
                    self._executor.notify("run_waiting", self._waiting_for(failure.questions))
                    return
                failure = CallError(
                    f"The questions have {length} bytes, more than the cluster can store. Ask shorter ones."
                )
            if not self.is_stopped:
                self.outcome = await self._executor.outcome_of(self, failure)
                if self.outcome.status is RunStatus.FAILED:
                    self.lasting = lasting_of(self.run, self._executor.find(self.run.agent_name), failure)
        finally:
            failure = None  # its traceback refers to this frame

    async def _leave(self, lacks: str) -> None:
        """Leave the step to a worker that has what this one *lacks*, unless the time of the run is over."""
        if self.left_s > 0:
            self.lacks = lacks
        elif self._begun_at is None:
            self.outcome = await self._executor.outcome_of(self, queue_timeout(self.queue_timeout_s or 0))
        else:
            self.outcome = timeout_of(self.timeout_s)

    @property
    def _begun_at(self) -> datetime | None:
        return self.run.started_at or self.started_at

    @property
    def left_s(self) -> float:
        """For how long the run may wait for a worker, in seconds."""
        if self._begun_at is not None:
            return self.timeout_s + self.waited_s - (now() - self._begun_at).total_seconds()
        return math.inf if self.queue_timeout_s is None else self.queue_timeout_s - self.queued_s

    def left_to_others(self, *details: Any) -> ApplicationError:
        """Return the failure after which the cluster gives the activity to any worker again, each time a bit later."""
        misses = self.suspicion.misses
        if not misses:
            logger.warning("run %s waits for a worker that has the %s.", self.run.run_id, self.lacks)
        pause_s = min(MISS_PAUSE_S * 2 ** min(misses, 10), MAX_MISS_PAUSE_S, max(0.001, self.left_s))
        return ApplicationError(
            f"This worker has no {self.lacks}.",
            *details,
            type="left_to_others",
            next_retry_delay=timedelta(seconds=pause_s),
            category=ApplicationErrorCategory.BENIGN,
        )

    def _waiting_for(self, questions: Sequence[Question]) -> Run:
        return replace(
            self.run,
            status=RunStatus.WAITING,
            started_at=self._begun_at,
            waiting_for=tuple(questions),
            worked_s=self.worked_s,
            progress=self.progress,
            spent=self.spent,
        )

    def stop(self) -> None:
        """Stop the step because the worker shuts down. A function in a thread sees ``cancel_requested``."""
        self._executor.stop(self)
        self.cancel()


async def until_done(
    work: asyncio.Task[None], *, drain_timeout_s: float, stop: Callable[[], None], cancel: Callable[[], None]
) -> None:
    """Wait for *work* in an activity, even if the activity is cancelled.

    Args:
        stop: called when the worker has been shutting down for *drain_timeout_s* seconds.
        cancel: called when the cluster cancels the activity.
    """
    stopping = asyncio.create_task(_until_stopped(drain_timeout_s))
    try:
        while not work.done():
            try:
                await asyncio.wait([work] if stopping.done() else [work, stopping], return_when=FIRST_COMPLETED)
                if stopping.done() and not work.done():
                    stop()
            except asyncio.CancelledError:
                details = activity.cancellation_details()
                if details is not None and details.worker_shutdown:
                    stop()
                else:
                    cancel()
    finally:
        stopping.cancel()


async def _until_stopped(drain_timeout_s: float) -> None:
    """Wait for the shutdown and the drain. The SDK does not notify an activity that is already cancelled."""
    await activity.wait_for_worker_shutdown()
    await asyncio.sleep(drain_timeout_s)

"""The workflows of a run, which executes its agents in sequence, and of a session, which puts its runs in order.

They are generic: only the activity knows the agents, so running workflows survive a deployment with other agents.
Replay requires them to be deterministic: they use only their clock, their input and their signals.
"""

import asyncio
import contextlib
import math
from collections.abc import Iterable
from datetime import date, timedelta

import msgspec
from msgspec.structs import replace
from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    FailureError,
    TimeoutType,
    WorkflowAlreadyStartedError,
    is_cancelled_exception,
)
from temporalio.exceptions import TimeoutError as ActivityTimeout

from flock.engine.base import KEEP_USAGE_FOR
from flock.runs import Account, Call, Question, Run, RunStatus, UsageRow, spent_with
from flock.steps.answers import asked_question, is_expired
from flock.steps.outcomes import Outcome, expiry_of, queue_timeout, timeout_of
from flock.temporal.calls import Calls
from flock.temporal.messages import (
    ACCOUNT_WORKFLOW,
    ACTIVITY,
    ASKING,
    ASLEEP,
    INBOX,
    INTERRUPTED,
    MAX_INBOX_BYTES,
    RUN_WORKFLOW,
    STATUS,
    TASK_TIMEOUT,
    AccountState,
    Asked,
    Begun,
    CallDone,
    CallsPage,
    Inbox,
    RunOrder,
    Sent,
    SpentReport,
    StepDone,
    Waits,
    roles_of,
    session_workflow_id,
)
from flock.temporal.reports import Reports

#: Only steps are retried whose worker died, stopped or lacks their agent. Workers count the deaths; see ``Suspicion``.
RETRIES = RetryPolicy(initial_interval=timedelta(seconds=0.5), maximum_interval=timedelta(seconds=5))
#: The worker enforces the deadline, and heartbeats show that it is alive. So the cluster needs no limit of its own.
NO_LIMIT = timedelta(days=365)
#: Runs have a higher priority than batch items.
RUNS_FIRST = Priority(priority_key=1)
#: When a session looks after its first run, and a run after its session, because one may have been terminated. Then
#: after twice that time, and so on.
LOOK_AFTER_S = 30.0
#: How long a session stays open after its last run. Until then the search of the cluster has surely found that run.
KEEP_SESSION_S = 60.0
#: The patch since which the first answer starts a step again. Before, it was the last one.
FIRST_ANSWER = "first-answer"
#: The patch since which a run cancels the one that it replaces. Before, only its engine did.
REPLACES = "replaces"
#: What ends a workflow. Anything else is a bug: it fails only the current task, which a version without it does again.
ENDS = (FailureError, asyncio.CancelledError, TimeoutError)
#: How many of its last runs a session remembers.
LATEST = 50
#: For how many days a report of a worker may be sent again.
KEEP_REPORTS_DAYS = 7


class CallKeeper:
    """A workflow that keeps the finished calls of its activities, and messages to its runs, in ``_calls``."""

    _calls: Calls

    @workflow.signal
    def call_done(self, done: CallDone) -> None:
        self._calls.add(done)

    @workflow.signal
    def message(self, sent: Sent) -> None:
        self._calls.keep(sent)

    @workflow.signal
    def begun(self, begun: Begun) -> None:
        self._calls.fence.admits(begun)

    @workflow.signal
    def asked(self, asked: Asked) -> None:
        self._calls.ask(asked)

    @workflow.query
    def calls_from(self, item: int, step: int, after: int) -> CallsPage:
        """Return finished calls of a step, without the first *after*, and what the item or run has spent."""
        return self._calls.page(item, step, after)

    @workflow.query
    def waits(self, item: int, step: int, call_ids: list[str]) -> Waits:
        """Return what has come for the waits of a step that still runs."""
        return self._calls.waits(item, step, call_ids)


@workflow.defn(name=RUN_WORKFLOW)
class FlockRun(CallKeeper):
    """One attempt of one run. Its history is the run's record (``flock.temporal.records``), so it returns nothing.

    If the run fails, it raises an ``ApplicationError`` with the run's ``error`` and ``error_type``.

    Cancellation: it closes as cancelled when its agent has stopped.
    """

    def __init__(self) -> None:
        self._calls = Calls(on_drop=log_dropped)
        self._latest: tuple[str, ...] | None = None

    @workflow.signal
    def begin(self, latest: list[str]) -> None:
        """Let the run begin: all earlier runs of its session have left. *latest* are the last of these."""
        self._latest = tuple(latest)

    @workflow.run
    async def run(self, order: RunOrder) -> None:
        self._reports = Reports(order.run, has_receiver=order.has_receiver)
        self._calls.keep_before(order.messages)
        try:
            await self._run(order)
        except ENDS as exc:
            await self._reports.send("cancelled" if is_cancelled_exception(exc) else "failed", is_end=True)
            raise
        await self._reports.send("completed", is_end=True)

    async def _run(self, order: RunOrder) -> None:
        try:
            if order.replaces is not None and workflow.patched(REPLACES):
                with contextlib.suppress(FailureError):  # it has ended
                    await workflow.get_external_workflow_handle(order.replaces).cancel()
            await self._steps(order if order.run.session_id is None else await self._begun(order))
        except ENDS:
            await self._end(order.run)
            raise
        await self._end(order.run)

    async def _end(self, run: Run) -> None:
        if names := ", ".join(sorted({sent.name for sent in self._calls.messages_to(0)})):
            workflow.logger.warning("run %s: it has ended and not received its messages %s", run.run_id, names)
        if run.session_id is not None:
            await self._leave(run)

    async def _leave(self, run: Run, *has_ended: bool) -> None:
        with contextlib.suppress(FailureError):  # the session was terminated, or has ended while the run waited
            await _session_of(run).signal("leave", args=[workflow.info().workflow_id, *has_ended])

    async def _begun(self, order: RunOrder) -> RunOrder:
        """Wait until the run may begin. Return the order of its first step."""
        since, look_after_s, limit_s = workflow.now(), LOOK_AFTER_S, order.queue_timeout_s or math.inf
        while self._latest is None:
            waited_s = (workflow.now() - since).total_seconds()
            if waited_s >= limit_s:
                raise _late(order)
            if waited_s >= look_after_s:
                await self._join_again(order)
                look_after_s *= 2
            with contextlib.suppress(TimeoutError):
                left_s = max(0.001, min(limit_s, look_after_s) - waited_s)
                await workflow.wait_condition(lambda: self._latest is not None, timeout=left_s)
        return replace(order, queued_s=(workflow.now() - since).total_seconds(), latest=self._latest)

    async def _join_again(self, order: RunOrder) -> None:
        """Join the session: the process that started the run may have died before that, or the session is gone."""
        own_id = workflow.info().workflow_id
        try:
            await _session_of(order.run).signal("join", own_id)
        except FailureError:
            with contextlib.suppress(WorkflowAlreadyStartedError):
                await workflow.start_child_workflow(
                    FlockSession.run,
                    args=[[own_id], []],
                    id=session_workflow_id(order.run),
                    parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                    task_timeout=TASK_TIMEOUT,
                )

    async def _steps(self, order: RunOrder) -> None:
        while order.run.next_agent_name is not None:
            done = await self._step(order)
            run = replace(
                order.run,
                status=RunStatus.RUNNING,
                started_at=order.run.started_at or done.begun_at,
                spent=done.spent or order.run.spent,
                first_span=order.run.first_span or done.first_span,
            )
            if done.step is None:
                left, waited_s = await self._wait_for_answers(run, done)
                order = replace(order, run=replace(run, waiting_for=left), has_calls=True, waited_s=waited_s)
            else:
                self._calls.next_step()
                agents, chosen = order.agents, done.step.next_agent
                if done.has_next and chosen is not None and chosen not in agents:
                    agents = (*agents, chosen)
                run = replace(run, steps=(*run.steps, done.step), waiting_for=())
                waited_s = order.waited_s + done.held_s
                order = replace(order, run=run, has_calls=False, agents=agents, waited_s=waited_s)
            _check_cancelled()

    async def _wait_for_answers(self, run: Run, done: StepDone) -> tuple[tuple[Question, ...], float]:
        """Wait for the first answer, wake-up or message.

        Returns: the waits that are left, and for how long the attempt has waited so far, in seconds.
        """
        asks = any(wait.is_question for wait in done.questions)
        workflow.upsert_search_attributes([STATUS.value_set(ASKING if asks else ASLEEP)])
        if asks and workflow.patched(INBOX):
            workflow.upsert_memo({INBOX: _inbox_of(replace(run, status=RunStatus.WAITING, waiting_for=done.questions))})
        if run.session_id is not None:  # its other runs need not wait for a person
            self._leaving = asyncio.create_task(self._leave(run, False))
        step, left = len(run.steps), done.questions
        if asks and self._calls.still_open(0, step, left) == left:
            await self._reports.send("waiting")
        while left := await self._still_open(step, left):
            late = next((question for question in left if is_expired(question, workflow.now())), None)
            if late is not None:
                raise _failed(expiry_of(late))
            if left != done.questions and workflow.patched(FIRST_ANSWER):
                break
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(
                    lambda: self._calls.has_news(0, step, left, workflow.now()), timeout=time_to_expiry(left)
                )
        workflow.upsert_search_attributes([STATUS.value_unset()])
        assert run.started_at is not None
        return left, (workflow.now() - run.started_at).total_seconds() - done.worked_s

    async def _still_open(self, step: int, waits: tuple[Question, ...]) -> tuple[Question, ...]:
        """Return those of *waits* that have no answer. Report the questions that have expired."""
        for wait in self._calls.unanswered(0, step, waits):
            if wait.kind is msgspec.UNSET and is_expired(wait, workflow.now()):
                await self._reports.send("question.expired", wait.call_id)
        return self._calls.still_open(0, step, waits, workflow.now())

    async def _step(self, order: RunOrder) -> StepDone:
        max_wait_s = order.queue_timeout_s and max(0.001, order.queue_timeout_s - order.queued_s)
        if order.run.started_at is not None:
            spent_s = (workflow.now() - order.run.started_at).total_seconds() - order.waited_s
            max_wait_s = max(0.001, order.timeout_s - spent_s)
        try:
            done: StepDone = await workflow.execute_activity(
                ACTIVITY,
                order,
                result_type=StepDone,
                start_to_close_timeout=NO_LIMIT,
                schedule_to_start_timeout=None if max_wait_s is None else timedelta(seconds=max_wait_s),
                heartbeat_timeout=timedelta(seconds=order.heartbeat_timeout_s),
                retry_policy=RETRIES,
                cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
                priority=RUNS_FIRST,
            )
        except ActivityError as exc:
            failure = _failure(order, exc.cause)
            if failure.type != "timeout":
                _check_cancelled()
            raise failure from None
        return done


def _inbox_of(run: Run) -> Inbox:
    asked = tuple(asked_question(run, question, None) for question in run.questions)
    shown = asked if len(msgspec.json.encode(asked)) <= MAX_INBOX_BYTES else ()
    return Inbox(roles=roles_of(run.questions), begun_by=run.begun_by, asked=shown)


def log_dropped(call: Call) -> None:
    workflow.logger.warning("%s", call.error)


def _late(order: RunOrder) -> ApplicationError:
    late = queue_timeout(order.queue_timeout_s or 0)
    return ApplicationError(str(late), type=late.error_type, non_retryable=True)


def _failed(end: Outcome) -> ApplicationError:
    return ApplicationError(end.error, type=end.error_type, non_retryable=True)


def time_to_expiry(questions: Iterable[Question]) -> timedelta | None:
    """Return the time until the first of *questions* expires; None if none of them does."""
    expiries = [question.expires_at for question in questions if question.expires_at is not None]
    return max(timedelta(milliseconds=1), min(expiries) - workflow.now()) if expiries else None


def _session_of(run: Run) -> workflow.ExternalWorkflowHandle[None]:
    return workflow.get_external_workflow_handle(session_workflow_id(run))


@workflow.defn(name="flock_session")
class FlockSession:
    """The runs of one session that have not ended, in the order in which they joined. The first of them may begin.

    It ends some time after its last run.

    Args:
        runs: the workflow ids of the first runs.
        latest: those of the last runs that have left.
    """

    @workflow.init
    def __init__(self, runs: list[str], latest: list[str]) -> None:
        self._runs, self._latest = runs, latest

    @workflow.signal
    def join(self, run: str) -> None:
        if run not in self._runs:
            self._runs.append(run)

    @workflow.signal
    def leave(self, run: str, has_ended: bool = True) -> None:
        """Remove a run, because it has ended or waits for answers. In the latter case, it leaves again at its end."""
        if run in self._runs:
            self._runs.remove(run)
        if has_ended and run not in self._latest:
            self._latest = [*self._latest, run][-LATEST:]

    @workflow.run
    async def run(self, runs: list[str], latest: list[str]) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(lambda: bool(self._runs), timeout=KEEP_SESSION_S)
            if not self._runs:
                return
            await self._until_left(self._runs[0])
            if workflow.info().is_continue_as_new_suggested():
                workflow.continue_as_new(args=[self._runs, self._latest])

    async def _until_left(self, run: str) -> None:
        """Let *run* begin, and wait until it leaves or is gone."""
        wait_s = LOOK_AFTER_S
        while run in self._runs:
            try:
                await workflow.get_external_workflow_handle(run).signal("begin", self._latest)
            except FailureError:
                self.leave(run)
            with contextlib.suppress(TimeoutError):
                await workflow.wait_condition(lambda: run not in self._runs, timeout=wait_s)
            wait_s *= 2


@workflow.defn(name=ACCOUNT_WORKFLOW)
class FlockAccount:
    """What a principal may spend in a day, and has spent. It never ends.

    Its memo has the budget and what was spent today, so that engines can read that without a worker.
    """

    @workflow.init
    def __init__(self, state: AccountState) -> None:
        self._state = state
        self._changed = False

    @workflow.signal
    def spent(self, report: SpentReport) -> None:
        state = self._state
        number, _ = state.reports.get(report.worker, (0, 0))
        if report.number <= number:
            return
        state.reports[report.worker] = (report.number, report.day)
        for each in report.spent:
            so_far = state.days.get(report.day, ())
            state.days[report.day] = spent_with(so_far, each.agent_name, each.model, each.usage)
        self._changed = True

    @workflow.signal
    def set_budget(self, max_cost: float | None) -> None:
        self._state.max_cost = max_cost
        self._changed = True

    @workflow.query
    def account(self, day: int) -> Account:
        """Return what may be spent, and was spent on *day*."""
        spent = sum(each.usage.picodollars for each in self._state.days.get(day, ()))
        return Account(max_cost=self._state.max_cost, picodollars=spent)

    @workflow.query
    def usage(self, first_day: int, last_day: int) -> list[UsageRow]:
        return [
            UsageRow(
                day=date.fromordinal(day),
                principal=self._state.principal,
                agent_name=each.agent_name,
                model=each.model,
                usage=each.usage,
            )
            for day, spent in self._state.days.items()
            if first_day <= day <= last_day
            for each in spent
        ]

    @workflow.run
    async def run(self, state: AccountState) -> None:
        while not workflow.info().is_continue_as_new_suggested():
            await workflow.wait_condition(lambda: self._changed or workflow.info().is_continue_as_new_suggested())
            self._changed = False
            day = workflow.now().date().toordinal()
            account = self.account(day)
            workflow.upsert_memo({"day": day, "max_cost": account.max_cost, "picodollars": account.picodollars})
        today = workflow.now().date().toordinal()
        days = {day: spent for day, spent in state.days.items() if day > today - KEEP_USAGE_FOR.days}
        reports = {worker: report for worker, report in state.reports.items() if report[1] > today - KEEP_REPORTS_DAYS}
        workflow.continue_as_new(replace(state, days=days, reports=reports))


@workflow.defn(name="flock_mark")
class FlockMark:
    """Reserves the id of an idempotency key or a deleted run, while it waits for its delayed start."""

    @workflow.run
    async def run(self) -> None: ...


def _check_cancelled() -> None:
    """Raise CancelledError if the run was cancelled while its agent completed."""
    if workflow.cancellation_reason() is not None:
        raise asyncio.CancelledError


def _failure(order: RunOrder, cause: BaseException | None) -> ApplicationError:
    if isinstance(cause, ApplicationError):
        return ApplicationError(cause.message, *cause.details, type=cause.type, non_retryable=True)
    if isinstance(cause, ActivityTimeout) and cause.type is TimeoutType.SCHEDULE_TO_START:
        return _late(order) if order.run.started_at is None else _failed(timeout_of(order.timeout_s))
    return ApplicationError("The cluster ended a step of this run.", type=INTERRUPTED, non_retryable=True)

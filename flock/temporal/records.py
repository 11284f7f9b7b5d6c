"""Build the records of runs from the histories of their workflows. This needs no worker and no second copy.

The items of a batch are built from the histories of its chunks.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import UnsetType
from msgspec.structs import asdict, replace
from temporalio.api.common.v1 import Payloads
from temporalio.api.enums.v1 import EventType, RetryState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.exceptions import ApplicationError, CancelledError, TimeoutError
from temporalio.service import RPCError, RPCStatusCode

from flock.errors import cut
from flock.runs import INVALID_INPUT, MAX_SHOWN_BYTES, NOT_LOADED, Call, Question, Run, RunStatus, Usage, added
from flock.steps.answers import is_expired
from flock.steps.identity import asking_call
from flock.steps.outcomes import CANCELLED, CANCELLED_BEFORE_START, COST_LIMIT, Outcome, expiry_of
from flock.temporal.calls import Calls, Fence
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    ASKED_SIGNAL,
    BEGUN_SIGNAL,
    CALL_SIGNAL,
    CONVERTER,
    INTERRUPTED,
    ITEMS_ACTIVITY,
    MESSAGE_SIGNAL,
    Asked,
    Attempt,
    BatchOrder,
    Begun,
    CallDone,
    ChunkOrder,
    Counts,
    Heartbeat,
    ItemsDone,
    ItemsOrder,
    RowsOrder,
    RunOrder,
    Sent,
    StepDone,
    chunk_workflow_id,
    decoded,
    item_id,
    latest,
    recoded,
    rows_workflow_id,
)
from flock.temporal.payloads import PAYLOAD_LOST

#: The events of a workflow, and its pending activities.
History = tuple[Sequence[HistoryEvent], Sequence[PendingActivityInfo]]

#: How a workflow was closed from outside, in words.
CLOSED_FROM_OUTSIDE = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED: "terminated",
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT: "timed out",
}
#: The events that close a chunk. Continue-as-new is not one of them.
CLOSED = (
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
    *CLOSED_FROM_OUTSIDE,
)
#: The events that end an activity.
ENDS = (
    EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED,
    EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT,
)
#: Pauses between reads of a history that does not have the latest results yet, in seconds.
REREAD_DELAYS_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)


def reset_for_retry(run: Run, *, keeps_calls: bool, by: str | None = None) -> Run:
    """Return *run* as its next attempt starts, which the principal *by* has requested.

    It keeps its steps, and perhaps the calls of the step that failed.
    """
    return replace(
        run,
        status=RunStatus.STARTING,
        attempt=run.attempt + 1,
        result=None,
        error=None,
        error_type=None,
        started_at=None,
        completed_at=None,
        progress=None,
        cancel_requested=False,
        waiting_for=(),
        worked_s=0.0,
        deaths=0,
        journal=run.first_try if keeps_calls else None,
        earlier_error=run.error,
        retried_by=run.retried_by if by is None or by in run.retried_by else (*run.retried_by, by),
    )


def run_of(history: Sequence[HistoryEvent]) -> Run:
    """Build a run from its history. For the progress of a running step, see ``with_heartbeats``."""
    return _read(history)[0]


def _read(history: Sequence[HistoryEvent], whole: int | None = None) -> tuple[Run, Calls, list[CallDone]]:
    """Return the run, the answers of its questions with the messages that it has received or not, and all calls.

    Args:
        whole: see ``_signal_in``.
    """
    order = decoded(history[0].workflow_execution_started_event_attributes.input.payloads[0], RunOrder)
    run, answers, task_at = order.run, Calls(messages=order.messages), None
    calls: list[CallDone] = []
    for event in history:
        at = event.event_time.ToDatetime(UTC)
        if (brought := _signal_in(event, whole)) is not None:
            run = _with_signal(run, answers, calls, brought)
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                task_at = at
            case EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED if run.status is RunStatus.WAITING:
                run = _with_answers(run, answers, task_at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED if run.status is RunStatus.WAITING:
                run = replace(run, status=RunStatus.STARTING)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                run = replace(run, cancel_requested=True)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED if run.status is RunStatus.STARTING:
                run = replace(run, status=RunStatus.RUNNING, started_at=run.started_at or at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                done = decoded(_attributes_of(event).result.payloads[0], StepDone)
                run = _with_progress(run, done)
                if done.step is None:
                    waiting = {"status": RunStatus.WAITING, "waiting_for": done.questions, "worked_s": done.worked_s}
                    run = _with_answers(replace(run, **waiting), answers)
                else:
                    run = replace(run, steps=(*run.steps, done.step), waiting_for=())
            case EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED | EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT:
                failure = _attributes_of(event).failure
                run = with_heartbeats(run, failure.application_failure_info.details)
                run = with_heartbeats(run, failure.timeout_failure_info.last_heartbeat_details)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                run = replace(
                    run,
                    status=RunStatus.COMPLETED,
                    result=run.steps[-1].result,
                    started_at=run.started_at or at,  # a retry with no step left to run
                    completed_at=at,
                )
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                failure = _attributes_of(event).failure
                info = failure.application_failure_info
                outcome = Outcome(RunStatus.FAILED, cut(failure.message), info.type or INTERRUPTED)
                run = _ended(with_heartbeats(run, info.details), outcome, at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                run = _ended(run, CANCELLED, at)
            case end if end in CLOSED_FROM_OUTSIDE:
                error = f"The run was {CLOSED_FROM_OUTSIDE[end]} on the cluster before it ended."
                run = _ended(run, Outcome(RunStatus.FAILED, error, INTERRUPTED), at)
    return run, answers, calls


def _with_signal(run: Run, answers: Calls, calls: list[CallDone], brought: CallDone | Sent | Asked | Begun) -> Run:
    """Return *run* after a signal, and add what it *brought* to the others."""
    if isinstance(brought, CallDone):
        run = replace(run, spent=latest(run.spent, brought.spent))
    if isinstance(brought, Sent):
        answers.keep(brought)
        return _with_answers(run, answers)
    if not answers.fence.admits(brought):
        return run
    if isinstance(brought, Asked):
        answers.ask(brought)
        return _with_answers(_with_waits(run, [brought.question]), answers) if brought.step == len(run.steps) else run
    if isinstance(brought, CallDone):
        calls.append(brought)
        run = replace(run, waiting_for=_left_after(brought, run))
        if _is_of_answers(brought.call) and not run.status.is_final:
            answers.add(brought)
            return _with_answers(run, answers)
    return run


def _is_of_answers(call: Call) -> bool:
    return call.kind == "question" or call.is_answer


def _attributes_of(event: HistoryEvent) -> Any:
    """Return the attributes of an event of any type."""
    return getattr(event, event.WhichOneof("attributes") or "")


def _ended(run: Run, outcome: Outcome, at: datetime | None) -> Run:
    return replace(run, **asdict(outcome), completed_at=at)


def _with_answers(run: Run, answers: Calls, at: datetime | None = None) -> Run:
    """Return *run* without the waits that have an answer, or expired before *at*. It still waits for the others.

    It no longer waits when its next step is scheduled, which a worker does after the first answer.
    """
    if run.status is not RunStatus.WAITING:  # those that it waited for, and its step runs again
        return replace(run, waiting_for=answers.unanswered(run.position or 0, len(run.steps), run.waiting_for))
    left = answers.still_open(run.position or 0, len(run.steps), run.waiting_for, at)
    return replace(run, waiting_for=left, status=RunStatus.WAITING if left else RunStatus.STARTING)


def _with_waits(run: Run, asked: Iterable[Question]) -> Run:
    """Return *run*, whose step still runs, with the waits that it has *asked* meanwhile.

    After a death, a call may ask the same in other words, under another id.
    """
    waits = {asking_call(wait.call_id): wait for wait in (*run.waiting_for, *asked)}
    return replace(run, waiting_for=tuple(waits.values()))


def _left_after(done: CallDone, run: Run) -> tuple[Question, ...]:
    """Return the waits of *run* without one that has ended in its step, because it was cancelled or had a default."""
    is_of_step = done.call.place is not None and done.step == len(run.steps) and run.status is not RunStatus.WAITING
    return tuple(wait for wait in run.waiting_for if not (is_of_step and wait.call_id == done.call.call_id))


def _is_at_first_step(run: Run) -> bool:
    """Whether its attempt has neither completed a step nor waited for an answer."""
    return not run.worked_s and not any(step.attempt == run.attempt for step in run.steps)


#: What the signals bring that workers and the API send to the workflow of a run or of a chunk.
SIGNALS: Mapping[str, type[CallDone | Sent | Asked | Begun]] = {
    CALL_SIGNAL: CallDone,
    MESSAGE_SIGNAL: Sent,
    ASKED_SIGNAL: Asked,
    BEGUN_SIGNAL: Begun,
}


def _signal_in(event: HistoryEvent, whole: int | None = None) -> CallDone | Sent | Asked | Begun | None:
    """Return what *event* brings if it is such a signal.

    Long values of a call are not loaded, except for answers and for calls of the item *whole*.
    """
    signal = event.workflow_execution_signaled_event_attributes
    if (type_ := SIGNALS.get(signal.signal_name)) is None:
        return None
    brought = decoded(signal.input.payloads[0], type_)
    if not isinstance(brought, CallDone) or brought.item == whole or brought.call.kind == "question":
        return brought
    return replace(brought, call=shown(brought.call))


def asked_in(history: Iterable[HistoryEvent]) -> dict[str, Question]:
    """Return all questions that a run has asked in one attempt, by id."""
    found = dict[str, Question]()
    for event in history:
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
            done = decoded(_attributes_of(event).result.payloads[0], StepDone)
            found |= {question.call_id: question for question in done.questions if question.is_question}
        elif event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
            asked = _signal_in(event)
            if isinstance(asked, Asked) and asked.question.is_question:
                found[asked.question.call_id] = asked.question
    return found


def unreceived_of(history: Sequence[HistoryEvent]) -> tuple[Sent, ...]:
    """Return the messages that one attempt of a run has not received."""
    return _read(history)[1].messages_to(0)


def had_message(history: Sequence[HistoryEvent], message_id: str) -> bool:
    """Whether one attempt of a run has had a message."""
    return _read(history)[1].has_had(message_id)


def early_messages(history: Sequence[HistoryEvent]) -> Sequence[Sent]:
    """Return the messages in the history of a batch. Those of chunks that have started are in the chunks too."""
    order = decoded(history[0].workflow_execution_started_event_attributes.input.payloads[0], BatchOrder)
    brought = map(_signal_in, history)
    return Calls(messages=(*order.messages, *(each for each in brought if isinstance(each, Sent)))).all_messages()


def shown(call: Call) -> Call:
    """Return *call* without long values."""
    long = {name: NOT_LOADED for name in ("arguments", "result") if len(getattr(call, name)) > MAX_SHOWN_BYTES}
    return replace(call, **long) if long else call


def calls_of(history: Sequence[HistoryEvent], *, is_whole: bool = False) -> dict[int, list[Call]]:
    """Return the calls of each step of a run in one attempt; see ``_signal_in``."""
    _, answers, calls = _read(history, 0 if is_whole else None)
    return _by_step(calls, answers)


def journal_of(step: int, calls: Iterable[Call]) -> list[Call]:
    """Return those of *calls* that a step reads when it runs again: of several ends of one call, the first counts."""
    journal = Calls()
    for call in calls:
        journal.add(CallDone(step=step, call=call))
    return journal.of_step(0, step)


def _by_step(done: Iterable[CallDone], answers: Calls, item: int = 0) -> dict[int, list[Call]]:
    """Return the calls that workers have *done*, and *answers*, oldest first, by the position of their step."""
    found: dict[int, list[Call]] = {}
    made = [each for each in done if not _is_of_answers(each.call)]
    ended = {(each.step, each.call.call_id) for each in made if each.call.once == "ended"}
    made = [each for each in made if not (each.call.is_start and (each.step, each.call.call_id) in ended)]
    for each in [*made, *answers.of_item(item)]:
        found.setdefault(each.step, []).append(each.call)
    return {step: sorted(calls, key=lambda call: call.completed_at) for step, calls in found.items()}


def with_heartbeats(run: Run, heartbeats: Payloads) -> Run:
    """Return *run* with the *heartbeats* of its step. Without any, the step may still wait for its slot."""
    for sent in heartbeats.payloads:
        run = _with_progress(run, decoded(sent, Heartbeat))
    return run


def _with_progress(run: Run, beat: Heartbeat) -> Run:
    """Return *run* with the progress of its *beat*. The first step of an attempt also reports the start of the run."""
    has_started = run.status is RunStatus.STARTING and beat.begun_at is not None
    return replace(
        run,
        status=RunStatus.RUNNING if has_started else run.status,
        started_at=beat.begun_at if _is_at_first_step(run) else run.started_at,
        progress=beat.progress or run.progress,
        spent=latest(run.spent, beat.spent),
        dropped=beat.dropped or run.dropped,
    )


# Items

GIVEN_UP = Outcome(
    RunStatus.FAILED,
    "The worker died or stopped in each attempt to run this item. The item may be the cause.",
    INTERRUPTED,
)


def done_after_failure(
    order: ItemsOrder, cause: BaseException | None, at: datetime, *, is_cancelled: bool
) -> ItemsDone:
    """Return the progress of an *order* that failed because of *cause* and that the cluster does not retry.

    After the last retry, the item that was running fails, so that the others can continue. If instead the worker died
    while the order was being cancelled, no item fails, and all that have not ended are scheduled again.
    """
    if isinstance(cause, CancelledError):  # it was cancelled before it started
        return ItemsDone()
    heartbeats = cause.last_heartbeat_details if isinstance(cause, TimeoutError) else ()
    done = recoded(heartbeats[0], ItemsDone) if heartbeats else ItemsDone()
    return done.for_retry() if is_cancelled else order.failed_after(done, outcome_of_failure(cause), at)


def outcome_of_failure(cause: BaseException | None) -> Outcome:
    """Return the outcome of an item whose activity failed because of *cause*."""
    if isinstance(cause, ApplicationError) and cause.type == PAYLOAD_LOST:
        return Outcome(RunStatus.FAILED, cause.message, PAYLOAD_LOST)
    return GIVEN_UP


class Chunk:
    """The items of one chunk, from its rows and its histories.

    Attributes:
        items: by position.
        calls: the calls that have ended, by the position of their item and of their step.
        asked: all questions that items have asked, by position and id.
        agents: see ``RowsOrder``.
        has_begun: the last attempt has started the chunk.
        messages: those that its items have received in this attempt, or not.

    Args:
        whole: the position of an item whose calls are read whole, without those that no longer count.
    """

    def __init__(self, batch_id: str, rows: RowsOrder, whole: int | None = None) -> None:
        self.agents = rows.agents
        self.has_begun, self.messages = False, Calls()
        self._whole = whole
        self.items: dict[int, Run] = {}
        self.calls: dict[int, dict[int, list[Call]]] = {}
        self.asked: dict[int, dict[str, Question]] = {}
        #: what each item had spent before the attempt that is being applied
        self._spent_before: dict[int, Usage | None] = {}
        #: the waits that have begun in a step that still runs, by position and by step
        self._asked: dict[tuple[int, int], dict[str, Question]] = {}
        #: positions of items that wait for answers
        self._waiting: set[int] = set()
        #: the outcome of items that are not running, if the attempt starts no more
        self._stopped_by: Outcome | None = None
        for position, row in enumerate(rows.rows, rows.first):
            is_invalid = row.error is not None
            self.items[position] = replace(
                rows.item,
                run_id=item_id(batch_id, position),
                batch_id=batch_id,
                position=position,
                inputs=row.inputs,
                extra=None if isinstance(row.extra, UnsetType) else row.extra,
                status=RunStatus.FAILED if is_invalid else RunStatus.STARTING,
                error=row.error,
                error_type=INVALID_INPUT if is_invalid else None,
                completed_at=rows.item.created_at if is_invalid else None,
            )

    def reopen(self, attempt: Attempt) -> None:
        """Reset the items that an attempt of the batch retries. Invalid inputs would fail again."""
        for position, item in self.items.items():
            is_covered = attempt.position in (None, position)
            if item.status in attempt.only and is_covered and item.error_type != INVALID_INPUT:
                keeps_calls, by = attempt.keeps_calls, attempt.retried_by
                self.items[position] = reset_for_retry(item, keeps_calls=keeps_calls, by=by)
                if position == self._whole and not attempt.keeps_calls:
                    self.calls.pop(position, None)

    def fold(self, history: History, reason: Outcome | None) -> None:
        """Apply the history of one attempt to the items. *reason*: see ``end``."""
        events, pending = history
        orders = _OpenOrders()
        calls: dict[int, list[CallDone]] = {}
        answers, task_at = Calls(), None
        self.has_begun, self.messages = bool(events), answers
        self._spent_before = {position: item.usage for position, item in self.items.items()}
        self._asked.clear()
        self._stopped_by = None
        for event in events:
            at = event.event_time.ToDatetime(UTC)
            match _signal_in(event, self._whole):
                case Sent() as sent:
                    answers.keep(sent)
                    self._answer([sent.item], answers, None)
                case CallDone() as call if answers.fence.admits(call):
                    calls.setdefault(call.item, []).append(call)
                    self._note_end(call)
                    if _is_of_answers(call.call):  # perhaps of a step whose order has not ended yet
                        answers.add(call)
                        self._answer([call.item], answers, None)
                case Asked() as asked if answers.fence.admits(asked):
                    answers.ask(asked)
                    self._ask(asked, answers)
                case Begun() as begun:
                    answers.fence.admits(begun)
            if completed := orders.apply(event):
                self._apply(*completed, at, answers)
            match event.event_type:
                case EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                    task_at = at
                case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED if self._waiting:
                    for position in [position for position in self._waiting if orders.has(position)]:
                        self.items[position] = replace(self.items[position], status=RunStatus.STARTING)
                        self._waiting.discard(position)
                case EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED if self._waiting:
                    self._answer(list(self._waiting), answers, task_at)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                    payload = event.workflow_execution_started_event_attributes.input.payloads[0]
                    chunk = decoded(payload, ChunkOrder)
                    answers.fence = Fence(chunk.generation)
                    for sent in chunk.messages:
                        answers.keep(sent)
                    self.cancel(chunk.cancelled)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
                    signal = event.workflow_execution_signaled_event_attributes
                    if signal.signal_name == "cancel_item":
                        position = decoded(signal.input.payloads[0], int)
                        self.cancel({position: None if orders.has(position) else at})
                    elif signal.signal_name == "stop":
                        self._stopped_by = COST_LIMIT
                        self.end([position for position in self.items if not orders.has(position)], at, COST_LIMIT)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                    self.cancel(dict.fromkeys(self.items))
                case closed if closed in CLOSED:
                    self.end(self.items, at, reason)
        for order, done in orders.heartbeats(pending):
            self._apply(order, done, None, answers)
        for position in calls.keys() | {answer.item for answer in answers.all()}:
            of_item = self.calls.setdefault(position, {})
            for step, made in _by_step(calls.get(position, ()), answers, position).items():
                of_item[step] = [*of_item.get(step, ()), *made]

    def cancel(self, ends: Mapping[int, datetime | None]) -> None:
        """Note requests to cancel items. Those with a time were waiting, and ended at that time."""
        for position, at in ends.items():
            item = self.items.get(position)
            if item is not None and not item.status.is_final:
                item = replace(item, cancel_requested=True)
                self.items[position] = item if at is None else _cancelled(item, at)
                self._waiting.discard(position)

    def end(self, positions: Iterable[int], at: datetime, reason: Outcome | None) -> None:
        """End those items that have not ended. *reason* is their outcome, if they were not cancelled."""
        for position in positions:
            item = self.items[position]
            if not item.status.is_final:
                self.items[position] = _cancelled(item, at, reason)
            self._waiting.discard(position)

    def _ask(self, asked: Asked, answers: Calls) -> None:
        """Note a wait of a step that still runs."""
        wait = asked.question
        self._asked.setdefault((asked.item, asked.step), {})[asking_call(wait.call_id)] = wait
        if wait.is_question:
            self.asked.setdefault(asked.item, {})[wait.call_id] = wait
        item = self.items[asked.item]
        if asked.step == len(item.steps) and asked.item not in self._waiting and not item.status.is_final:
            self.items[asked.item] = _with_answers(_with_waits(item, [wait]), answers)

    def _note_end(self, done: CallDone) -> None:
        """Remove a wait that has ended while its step runs."""
        if done.call.place is not None:
            self._asked.get((done.item, done.step), {}).pop(asking_call(done.call.call_id), None)
            item = self.items[done.item]
            self.items[done.item] = replace(item, waiting_for=_left_after(done, item))

    def _answer(self, positions: Iterable[int], answers: Calls, at: datetime | None) -> None:
        """Remove the waits of items that have an answer, or that expired before *at*."""
        for position in self.items.keys() & positions:
            if position not in self._waiting:
                item = self.items[position]
                if item.waiting_for and not item.status.is_final:
                    self.items[position] = _with_answers(item, answers)
                continue
            item = _with_answers(self.items[position], answers, at)
            late = next((question for question in item.waiting_for if at and is_expired(question, at)), None)
            if late is not None:
                item = _ended(item, expiry_of(late), at)
            self.items[position] = item
            if item.status is not RunStatus.WAITING:
                self._waiting.discard(position)

    def _apply(self, order: ItemsOrder, done: ItemsDone, at: datetime | None, answers: Calls) -> None:
        """Apply the progress of *order*. *at* is when the order ended, or None if it is running."""
        for ended in done.ended:
            item = self.items[ended.position]
            spent = latest(item.spent, added(self._spent_before.get(ended.position), ended.usage))
            self.items[ended.position] = replace(ended.of(item), spent=spent)
        for part in (*done.waiting, *order.left_after(done)):
            item = self.items[part.position]
            asked = {question.call_id: question for question in part.questions if question.is_question}
            self.asked.setdefault(part.position, {}).update(asked)
            if item.status.is_final:
                continue
            item = replace(item, spent=latest(item.spent, added(self._spent_before.get(part.position), part.usage)))
            if part.started_at is not None:
                item = replace(
                    item,
                    status=RunStatus.WAITING if part.questions else RunStatus.RUNNING,
                    waiting_for=part.questions or part.waited_for,
                    worked_s=part.worked_s or item.worked_s,
                    started_at=part.started_at,
                    steps=part.steps or item.steps,
                    progress=part.progress,
                )
                if part.questions:
                    self._asked.pop((part.position, len(item.steps)), None)
                else:
                    asked = self._asked.get((part.position, len(item.steps)), {})
                    item = _with_answers(_with_waits(item, asked.values()), answers)
            if at is not None and (item.cancel_requested or self._stopped_by is not None):
                item = _cancelled(item, at, self._stopped_by)
            self.items[part.position] = item
            if item.status is RunStatus.WAITING:
                self._waiting.add(part.position)
                self._answer([part.position], answers, None)


def _cancelled(item: Run, at: datetime, reason: Outcome | None = None) -> Run:
    is_waiting = item.status is RunStatus.WAITING
    return _ended(item, reason or (CANCELLED if is_waiting else CANCELLED_BEFORE_START), at)


class _OpenOrders:
    """The ``run_items`` activities of a chunk that have not ended, from its history."""

    def __init__(self) -> None:
        self._orders: dict[int, tuple[str, ItemsOrder]] = {}

    def apply(self, event: HistoryEvent) -> tuple[ItemsOrder, ItemsDone] | None:
        """Apply *event*. If it ends an order, return the order and its progress."""
        attributes = _attributes_of(event)
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            if attributes.activity_type.name == ITEMS_ACTIVITY:
                order = decoded(attributes.input.payloads[0], ItemsOrder)
                self._orders[event.event_id] = (attributes.activity_id, order)
        elif event.event_type in ENDS and attributes.scheduled_event_id in self._orders:
            _, order = self._orders.pop(attributes.scheduled_event_id)
            return order, _done_of(event, order)
        return None

    def has(self, position: int) -> bool:
        return any(part.position == position for _, order in self._orders.values() for part in order.parts)

    def heartbeats(self, pending: Sequence[PendingActivityInfo]) -> list[tuple[ItemsOrder, ItemsDone]]:
        """Return each open order that has a heartbeat, with the last one."""
        orders = dict(self._orders.values())
        return [(orders[id_], done) for id_, done in _heartbeats_of(pending) if id_ in orders]

    def are_all_in(self, pending: Sequence[PendingActivityInfo], last_event: int) -> bool:
        """Whether *pending* has all open orders that were scheduled up to *last_event*."""
        ids = {activity.activity_id for activity in pending}
        return all(id_ in ids for event_id, (id_, _) in self._orders.items() if event_id <= last_event)


def _done_of(event: HistoryEvent, order: ItemsOrder) -> ItemsDone:
    """Return the progress of an *order* that ended with *event*."""
    attributes = _attributes_of(event)
    if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
        return decoded(attributes.result.payloads[0], ItemsDone)
    if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_CANCELED:
        return ItemsDone()
    cause = CONVERTER.failure_converter.from_failure(attributes.failure, CONVERTER.payload_converter)
    is_cancelled = attributes.retry_state == RetryState.RETRY_STATE_CANCEL_REQUESTED
    return done_after_failure(order, cause, event.event_time.ToDatetime(UTC), is_cancelled=is_cancelled)


def _heartbeats_of(pending: Iterable[PendingActivityInfo]) -> list[tuple[str, ItemsDone]]:
    return [
        (activity.activity_id, decoded(activity.heartbeat_details.payloads[0], ItemsDone))
        for activity in pending
        if activity.HasField("heartbeat_details")
    ]


def ended_so_far(pending: Iterable[PendingActivityInfo]) -> Counts:
    """Count the items that have ended or wait in running activities, from their heartbeats."""
    all_done = [done for _, done in _heartbeats_of(pending)]
    ended = sum((ended.counts for done in all_done for ended in done.ended), Counts())
    waiting = [part for done in all_done for part in done.waiting]
    return ended + Counts(waiting=len(waiting), usage=added(*(part.usage for part in waiting)))


async def _latest_history(cluster: Cluster, workflow_id: str) -> History:
    """Return the latest history of a chunk's attempt and its pending activities. Raises RPCError, NOT_FOUND.

    While a workflow task is running, an activity that completes is no longer pending and not yet in the history. Its
    items would seem to wait again. So this waits for the history, for longer than the workflow task timeout.
    """
    for pause_s in (*REREAD_DELAYS_S, None):
        described = (await cluster.handle(workflow_id).describe()).raw_description
        info = described.workflow_execution_info
        history = await cluster.history_of(workflow_id, info.execution.run_id, with_inputs=True)
        orders = _OpenOrders()
        for event in history:
            orders.apply(event)
        if pause_s is None or orders.are_all_in(described.pending_activities, info.history_length):
            break
        await asyncio.sleep(pause_s)
    return history, described.pending_activities


async def read_chunk(
    cluster: Cluster, batch_id: str, chunk: int, attempts: Sequence[Attempt], whole: int | None = None
) -> Chunk:
    """Read the current state of a chunk from its rows and all *attempts*. *whole*: see ``Chunk``.

    Raises: RPCError, NOT_FOUND if the retention of its rows or of the first attempt is over.
    """

    async def read(number: int, attempt: Attempt) -> History:
        if chunk >= attempt.begun_to:
            return (), ()
        # A retry starts only chunks that have items to retry, and a running attempt may not have started this one yet.
        may_be_missing = number > 1 or attempt.completed_at is None
        return await _full_history(cluster, chunk_workflow_id(batch_id, chunk, number), may_be_missing=may_be_missing)

    histories = asyncio.gather(*(read(number, attempt) for number, attempt in enumerate(attempts, 1)))
    rows = await cluster.input_of(rows_workflow_id(attempts[0].rows_of or batch_id, chunk), RowsOrder)
    items = Chunk(batch_id, rows, whole)
    for number, (attempt, history) in enumerate(zip(attempts, await histories, strict=True), 1):
        if number > 1:
            items.reopen(attempt)
        items.cancel(attempt.cancelled)
        reason = COST_LIMIT if attempt.is_spent else None
        items.fold(history, reason)
        if attempt.completed_at is not None:
            items.end(items.items, attempt.completed_at, reason)
    return items


async def _full_history(cluster: Cluster, workflow_id: str, *, may_be_missing: bool) -> History:
    """Return all events of a chunk's attempt, across continue-as-new, and its pending activities."""
    events: list[HistoryEvent] = []
    run_id: str | None = None
    pending: Sequence[PendingActivityInfo] = ()
    try:
        while True:
            history = await cluster.history_of(workflow_id, run_id, with_inputs=True)
            if not events and history[-1].event_type not in CLOSED:
                history, pending = await _latest_history(cluster, workflow_id)
            events = [*history, *events]
            run_id = history[0].workflow_execution_started_event_attributes.continued_execution_run_id
            if not run_id:
                return events, pending
    except RPCError as exc:
        if exc.status is not RPCStatusCode.NOT_FOUND or events or not may_be_missing:
            raise
        return events, pending

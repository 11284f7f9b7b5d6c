"""Build the records of runs from the histories of their workflows. This needs no worker and no second copy.

The items of a batch are built from the histories of its chunks.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec import UnsetType
from msgspec.structs import asdict, replace
from temporalio.api.common.v1 import Payloads
from temporalio.api.enums.v1 import EventType, RetryState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.exceptions import ApplicationError, CancelledError, TimeoutError
from temporalio.service import RPCError, RPCStatusCode

from flock.errors import cut
from flock.runs import INVALID_INPUT, MAX_SHOWN_BYTES, NOT_LOADED, Call, Question, Run, RunStatus, added
from flock.steps.answers import is_expired
from flock.steps.identity import asking_call
from flock.steps.outcomes import CANCELLED, CANCELLED_BEFORE_START, COST_LIMIT, Outcome, expiry_of
from flock.temporal.calls import Calls, Fence
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    CONVERTER,
    INTERRUPTED,
    ITEMS_ACTIVITY,
    Asked,
    Attempt,
    BatchOrder,
    Begun,
    CallDone,
    ChunkOrder,
    Counts,
    Heartbeat,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    Part,
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


class Traces(msgspec.Struct, kw_only=True):
    """What a run or an item has left in histories, beside its record.

    Attributes:
        calls: those that have ended, oldest first, by the position of their step.
        asked: all its questions, by id.
        unreceived: the messages that it has not received. Earlier attempts may have had others.
        message_ids: of the messages that it has received or not.
    """

    calls: dict[int, list[Call]] = {}
    asked: dict[str, Question] = {}
    unreceived: tuple[Sent, ...] = ()
    message_ids: set[str] = set()


class Reading:
    """A run or an item, as far as its histories have been read.

    Attributes:
        run: its record.
        traces: those of the attempts that have been read to their end.
        version: of the agent that has ended the item; see ``ItemOutcome``.
    """

    version: str | None = None

    def __init__(self, run: Run, traces: Traces | None = None) -> None:
        self.run = run
        self.traces = Traces() if traces is None else traces
        self.begin(Calls())

    def begin(self, answers: Calls) -> None:
        """Read the next attempt. *answers* are those of all items of its chunk, with the messages to them."""
        self._answers = answers
        self._made: list[CallDone] = []
        #: the waits that have begun in a step that still runs, by step
        self._waits: defaultdict[int, dict[str, Question]] = defaultdict(dict)
        #: what it had spent before
        self._spent_before = self.run.usage

    def end(self) -> None:
        """Add what the attempt has left."""
        for step, calls in _by_step(self._made, self._answers, self._item).items():
            self.traces.calls[step] = [*self.traces.calls.get(step, ()), *calls]
        self.traces.unreceived = self._answers.messages_to(self._item)
        self.traces.message_ids = self.traces.message_ids | self._answers.message_ids

    @property
    def _item(self) -> int:
        return self.run.position or 0

    @property
    def is_waiting(self) -> bool:
        return self.run.status is RunStatus.WAITING

    def change(self, **fields: Any) -> None:
        self.run = replace(self.run, **fields)

    def take(self, brought: "Brought") -> None:
        """Apply what a signal has *brought*."""
        if isinstance(brought, CallDone) and brought.spent is not None:
            self.change(spent=latest(self.run.spent, brought.spent))
        if isinstance(brought, Sent):
            self._answers.keep(brought)
        elif not self._answers.fence.admits(brought):
            return
        elif isinstance(brought, Asked):
            self._answers.ask(brought)
            self._waits[brought.step][asking_call(brought.question.call_id)] = brought.question
            self._note_questions([brought.question])
            self._add_waits()
        elif isinstance(brought, CallDone):
            self._made.append(brought)
            if brought.call.place is not None:
                self._end_wait(brought)
            if _is_of_answers(brought.call):  # perhaps of a step whose order has not ended yet
                self._answers.add(brought)
        self.answer()

    def answer(self, at: datetime | None = None) -> None:
        """Remove the waits that have an answer, or that expired before *at*. It still waits for the others.

        It no longer waits when its next step is scheduled, which a worker does after the first answer.
        """
        run = self.run
        if not run.waiting_for or run.status.is_final:
            return
        of_step = self._item, len(run.steps), run.waiting_for
        if not self.is_waiting:  # those that it waited for, and its step runs again
            self.change(waiting_for=self._answers.unanswered(*of_step))
            return
        left = self._answers.still_open(*of_step, at)
        self.change(waiting_for=left, status=RunStatus.WAITING if left else RunStatus.STARTING)
        if at is not None and (late := next((wait for wait in left if is_expired(wait, at)), None)) is not None:
            self.close(expiry_of(late), at)

    def wait_for(self, waits: tuple[Question, ...], worked_s: float) -> None:
        """Note that its step has ended, and waits."""
        self._waits.pop(len(self.run.steps), None)
        self._note_questions(waits)
        self.change(status=RunStatus.WAITING, waiting_for=waits, worked_s=worked_s)
        self.answer()

    def close(self, outcome: Outcome, at: datetime) -> None:
        self.change(**asdict(outcome), completed_at=at)

    def cancel(self, at: datetime, reason: Outcome | None = None) -> None:
        """End an item that has not ended and is not running. *reason*: its outcome, if it was not cancelled."""
        if not self.run.status.is_final:
            self.close(reason or (CANCELLED if self.is_waiting else CANCELLED_BEFORE_START), at)

    def progress(self, beat: Heartbeat) -> None:
        """Apply the progress of a step. The first step of an attempt also reports the start of the run."""
        run = self.run
        if run.status is RunStatus.STARTING and beat.begun_at is not None:
            self.change(status=RunStatus.RUNNING)
        if not run.worked_s and not any(step.attempt == run.attempt for step in run.steps):
            self.change(started_at=beat.begun_at)
        self.change(
            progress=beat.progress or run.progress,
            spent=latest(run.spent, beat.spent),
            dropped=beat.dropped or run.dropped,
        )

    def progress_of_item(self, part: Part) -> None:
        """Apply the progress of an item, or its end."""
        run = self.run
        self._note_questions(part.questions)
        if run.status.is_final and not isinstance(part, ItemOutcome):
            return
        spent = latest(run.spent, added(self._spent_before, part.usage))
        if isinstance(part, ItemOutcome):
            self.run, self.version = replace(part.of(run), spent=spent), part.made_by
            return
        self.change(spent=spent)
        if part.started_at is not None:
            self.change(
                status=RunStatus.RUNNING,
                waiting_for=part.waited_for,
                worked_s=part.worked_s or run.worked_s,
                started_at=part.started_at,
                steps=part.steps or run.steps,
                progress=part.progress,
            )
        if part.questions:
            self.wait_for(part.questions, self.run.worked_s)
        else:
            self._add_waits()
            self.answer()

    def _note_questions(self, waits: Iterable[Question]) -> None:
        self.traces.asked |= {wait.call_id: wait for wait in waits if wait.is_question}

    def _add_waits(self) -> None:
        """Add the waits of the step that runs. After a death, a call may wait again, under another id."""
        if not self.is_waiting and not self.run.status.is_final:
            begun = self._waits[len(self.run.steps)]
            waits = {asking_call(wait.call_id): wait for wait in (*self.run.waiting_for, *begun.values())}
            self.change(waiting_for=tuple(waits.values()))

    def _end_wait(self, done: CallDone) -> None:
        """Remove a wait that has ended in its step, because it was cancelled or had a default."""
        self._waits[done.step].pop(asking_call(done.call.call_id), None)
        if self.run.waiting_for and done.step == len(self.run.steps) and not self.is_waiting:
            self.change(waiting_for=tuple(wait for wait in self.run.waiting_for if wait.call_id != done.call.call_id))


def run_of(history: Sequence[HistoryEvent], traces: Traces | None = None, *, is_whole: bool = False) -> Run:
    """Build a run from the history of one attempt. For the progress of a running step, see ``with_heartbeats``.

    Args:
        traces: of the earlier attempts. Those of this one are added.
        is_whole: see ``_signal_in``.
    """
    order = decoded(history[0].workflow_execution_started_event_attributes.input.payloads[0], RunOrder)
    reading, task_at = Reading(order.run, traces), None
    reading.begin(Calls(messages=order.messages))
    for event in history:
        at = event.event_time.ToDatetime(UTC)
        if (brought := _signal_in(event, 0 if is_whole else None)) is not None:
            reading.take(brought)
        run, status = reading.run, reading.run.status
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                task_at = at
            case EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED if status is RunStatus.WAITING:
                reading.answer(task_at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED if status is RunStatus.WAITING:
                reading.change(status=RunStatus.STARTING)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                reading.change(cancel_requested=True)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED if status is RunStatus.STARTING:
                reading.change(status=RunStatus.RUNNING, started_at=run.started_at or at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                done = decoded(_attributes_of(event).result.payloads[0], StepDone)
                reading.progress(done)
                if done.step is None:
                    reading.wait_for(done.questions, done.worked_s)
                else:
                    reading.change(steps=(*run.steps, done.step), waiting_for=())
            case EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED | EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT:
                failure = _attributes_of(event).failure
                reading.run = with_heartbeats(run, failure.application_failure_info.details)
                reading.run = with_heartbeats(reading.run, failure.timeout_failure_info.last_heartbeat_details)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                # A retry may have had no step left to run.
                reading.change(result=run.steps[-1].result, started_at=run.started_at or at)
                reading.change(status=RunStatus.COMPLETED, completed_at=at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                failure = _attributes_of(event).failure
                info = failure.application_failure_info
                reading.run = with_heartbeats(run, info.details)
                reading.close(Outcome(RunStatus.FAILED, cut(failure.message), info.type or INTERRUPTED), at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                reading.close(CANCELLED, at)
            case end if end in CLOSED_FROM_OUTSIDE:
                error = f"The run was {CLOSED_FROM_OUTSIDE[end]} on the cluster before it ended."
                reading.close(Outcome(RunStatus.FAILED, error, INTERRUPTED), at)
    reading.end()
    return reading.run


def _is_of_answers(call: Call) -> bool:
    return call.kind == "question" or call.is_answer


def _attributes_of(event: HistoryEvent) -> Any:
    """Return the attributes of an event of any type."""
    return getattr(event, event.WhichOneof("attributes") or "")


#: What a signal brings that workers and the API send to the workflow of a run or of a chunk.
Brought = CallDone | Sent | Asked | Begun
SIGNALS: Mapping[str, type[Brought]] = {"call_done": CallDone, "message": Sent, "asked": Asked, "begun": Begun}


def _signal_in(event: HistoryEvent, whole: int | None = None) -> Brought | None:
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


def early_messages(history: Sequence[HistoryEvent]) -> Sequence[Sent]:
    """Return the messages in the history of a batch. Those of chunks that have started are in the chunks too."""
    order = decoded(history[0].workflow_execution_started_event_attributes.input.payloads[0], BatchOrder)
    brought = map(_signal_in, history)
    return Calls(messages=(*order.messages, *(each for each in brought if isinstance(each, Sent)))).all_messages()


def shown(call: Call) -> Call:
    """Return *call* without long values."""
    long = {name: NOT_LOADED for name in ("arguments", "result") if len(getattr(call, name)) > MAX_SHOWN_BYTES}
    return replace(call, **long) if long else call


def journal_of(step: int, calls: Iterable[Call]) -> list[Call]:
    """Return those of *calls* that a step reads when it runs again: of several ends of one call, the first counts."""
    journal = Calls()
    for call in calls:
        journal.add(CallDone(step=step, call=call))
    return journal.of_step(0, step)


def _by_step(done: Iterable[CallDone], answers: Calls, item: int) -> dict[int, list[Call]]:
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
    reading = Reading(run)
    for sent in heartbeats.payloads:
        reading.progress(decoded(sent, Heartbeat))
    return reading.run


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
        readings: of the items, by position.
        agents: see ``RowsOrder``.
        has_begun: the last attempt has started the chunk.

    Args:
        whole: the position of an item whose calls are read whole, without those that no longer count.
    """

    def __init__(self, batch_id: str, rows: RowsOrder, whole: int | None = None) -> None:
        self.agents, self.has_begun, self._whole = rows.agents, False, whole
        self.readings: dict[int, Reading] = {}
        #: the outcome of items that are not running, if the attempt starts no more
        self._stopped_by: Outcome | None = None
        for position, row in enumerate(rows.rows, rows.first):
            is_invalid = row.error is not None
            item = replace(
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
            self.readings[position] = Reading(item)

    @property
    def items(self) -> dict[int, Run]:
        """The items by position."""
        return {position: reading.run for position, reading in self.readings.items()}

    def reopen(self, attempt: Attempt) -> None:
        """Reset the items that an attempt of the batch retries. Invalid inputs would fail again."""
        for position, reading in self.readings.items():
            item, is_covered = reading.run, attempt.position in (None, position)
            if item.status in attempt.only and is_covered and item.error_type != INVALID_INPUT:
                reading.run = reset_for_retry(item, keeps_calls=attempt.keeps_calls, by=attempt.retried_by)
                if position == self._whole and not attempt.keeps_calls:
                    reading.traces.calls.clear()

    def fold(self, history: History, reason: Outcome | None) -> None:
        """Apply the history of one attempt to the items. *reason*: see ``end``."""
        events, pending = history
        orders, answers, task_at = _OpenOrders(), Calls(), None
        started: Iterable[int] = self.readings  # unless its batch has chosen some
        self.has_begun, self._stopped_by = bool(events), None
        for reading in self.readings.values():
            reading.begin(answers)
        for event in events:
            at = event.event_time.ToDatetime(UTC)
            if (brought := _signal_in(event, self._whole)) is not None:
                self.readings[brought.item].take(brought)
            if completed := orders.apply(event):
                self._apply(*completed, at)
                for ended in completed[1].ended:
                    if ended.lasting:
                        self._stop(ended.reason, orders, at)
            match event.event_type:
                case EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                    task_at = at
                case EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                    for reading in self._waiting():
                        if orders.has(reading.run.position or 0):
                            reading.change(status=RunStatus.STARTING)
                case EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED:
                    for reading in self._waiting():
                        reading.answer(task_at)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                    payload = event.workflow_execution_started_event_attributes.input.payloads[0]
                    chunk = decoded(payload, ChunkOrder)
                    answers.fence = Fence(chunk.generation)
                    started = started if chunk.chosen is None else chunk.chosen
                    for sent in chunk.messages:
                        answers.keep(sent)
                    self.cancel(chunk.cancelled)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
                    signal = event.workflow_execution_signaled_event_attributes
                    if signal.signal_name == "cancel_item":
                        position = decoded(signal.input.payloads[0], int)
                        self.cancel({position: None if orders.has(position) else at})
                    elif signal.signal_name == "stop":
                        self._stop(COST_LIMIT, orders, at)
                    elif signal.signal_name == "end_early":
                        self._stop(decoded(signal.input.payloads[0], Outcome), orders, at)
                case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                    self.cancel(dict.fromkeys(self.readings))
                case closed if closed in CLOSED:
                    self.end(started, at, reason)
        for order, done in orders.heartbeats(pending):
            self._apply(order, done, None)
        for reading in self.readings.values():
            reading.end()

    def cancel(self, ends: Mapping[int, datetime | None]) -> None:
        """Note requests to cancel items. Those with a time were waiting, and ended at that time."""
        for position, at in ends.items():
            reading = self.readings.get(position)
            if reading is not None and not reading.run.status.is_final:
                reading.change(cancel_requested=True)
                if at is not None:
                    reading.cancel(at)

    def end(self, positions: Iterable[int], at: datetime, reason: Outcome | None) -> None:
        """End those items that have not ended. *reason* is their outcome, if they were not cancelled."""
        for position in positions:
            self.readings[position].cancel(at, reason)

    def _stop(self, reason: Outcome, orders: "_OpenOrders", at: datetime) -> None:
        """End the items that are not running, because the attempt starts no more."""
        self._stopped_by = self._stopped_by or reason
        self.end([position for position in self.readings if not orders.has(position)], at, self._stopped_by)

    def _waiting(self) -> list[Reading]:
        return [reading for reading in self.readings.values() if reading.is_waiting]

    def _apply(self, order: ItemsOrder, done: ItemsDone, at: datetime | None) -> None:
        """Apply the progress of *order*. *at* is when the order ended, or None if it is running."""
        for part in (*done.ended, *done.waiting, *order.left_after(done)):
            reading = self.readings[part.position]
            reading.progress_of_item(part)
            if at is not None and (reading.run.cancel_requested or self._stopped_by is not None):
                reading.cancel(at, self._stopped_by)


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
        may_be_missing = number > 1 or attempt.completed_at is None or attempt.is_partial
        return await _full_history(cluster, chunk_workflow_id(batch_id, chunk, number), may_be_missing=may_be_missing)

    rows, histories = await asyncio.gather(
        cluster.input_of(rows_workflow_id(attempts[0].rows_of or batch_id, chunk), RowsOrder),
        asyncio.gather(*(read(number, attempt) for number, attempt in enumerate(attempts, 1))),
    )
    items = Chunk(batch_id, rows, whole)
    for number, (attempt, history) in enumerate(zip(attempts, histories, strict=True), 1):
        if number > 1:
            items.reopen(attempt)
        items.cancel(attempt.cancelled)
        items.fold(history, attempt.reason)
        if attempt.completed_at is not None:
            items.end(items.items, attempt.completed_at, attempt.reason)
        for position in set(attempt.refused) & set(items.readings):
            items.readings[position].change(status=RunStatus.CANCELLED)
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

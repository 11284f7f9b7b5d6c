"""Build the records of batch items from the histories of chunks. This needs no worker and no second copy."""

import asyncio
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import UnsetType
from msgspec.structs import asdict, replace
from temporalio.api.enums.v1 import EventType, RetryState
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.service import RPCError, RPCStatusCode

from flock.runs import INVALID_INPUT, Call, Run, RunStatus, Usage, added
from flock.steps.answers import is_expired
from flock.steps.outcomes import CANCELLED, CANCELLED_BEFORE_START, COST_LIMIT, Outcome, expiry_of
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    CONVERTER,
    ITEMS_ACTIVITY,
    Attempt,
    CallDone,
    Calls,
    ChunkOrder,
    Counts,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    Part,
    RowsOrder,
    chunk_workflow_id,
    decoded,
    item_id,
    latest,
    rows_workflow_id,
)
from flock.temporal.records import (
    by_step,
    call_of,
    done_after_failure,
    reset_for_retry,
    with_answers,
)

__all__ = ["Chunk", "ended_so_far", "read_chunk"]

#: The events that close a chunk. Continue-as-new is not one of them.
CLOSED = (
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT,
)
#: Pauses between reads of a history that does not have the latest results yet, in seconds.
REREAD_DELAYS_S = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

E = EventType


class Chunk:
    """The items of one chunk, from its rows and its histories.

    Attributes:
        items: by position.
        calls: the calls that have ended, by the position of their item and of their step.
        agents: see ``RowsOrder``.
    """

    def __init__(self, batch_id: str, rows: RowsOrder) -> None:
        self.agents = rows.agents
        self.items: dict[int, Run] = {}
        self.calls: dict[int, dict[int, list[Call]]] = {}
        #: what each item had spent before the attempt that is being applied
        self._spent_before: dict[int, Usage | None] = {}
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
                self.items[position] = reset_for_retry(item)

    def fold(
        self,
        history: Iterable[HistoryEvent],
        pending: Sequence[PendingActivityInfo] = (),
        reason: Outcome | None = None,
    ) -> None:
        """Apply the history of one attempt to the items. *reason*: see ``end``."""
        orders = _OpenOrders()
        calls: dict[int, list[CallDone]] = {}
        answers, task_at = Calls(), None
        self._spent_before = {position: item.usage for position, item in self.items.items()}
        self._stopped_by = None
        for event in history:
            at = event.event_time.ToDatetime(UTC)
            if (call := call_of(event)) is not None:
                calls.setdefault(call.item, []).append(call)
                if call.call.kind == "question":  # perhaps of a turn whose order has not ended yet
                    answers.add(call)
                    self._answer([call.item], answers, None)
            if completed := orders.apply(event):
                self._apply(*completed, at, answers)
            match event.event_type:
                case E.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                    task_at = at
                case E.EVENT_TYPE_WORKFLOW_TASK_COMPLETED if self._waiting:
                    self._answer(list(self._waiting), answers, task_at)
                case E.EVENT_TYPE_WORKFLOW_EXECUTION_STARTED:
                    payload = event.workflow_execution_started_event_attributes.input.payloads[0]
                    for position, asked_at in decoded(payload, ChunkOrder).cancelled.items():
                        self.cancel([position], asked_at)
                case E.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED:
                    signal = event.workflow_execution_signaled_event_attributes
                    if signal.signal_name == "cancel_item":
                        position = decoded(signal.input.payloads[0], int)
                        self.cancel([position], None if orders.has(position) else at)
                    elif signal.signal_name == "stop":
                        self._stopped_by = COST_LIMIT
                        self.end([position for position in self.items if not orders.has(position)], at, COST_LIMIT)
                case E.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                    self.cancel(self.items, None)
                case closed if closed in CLOSED:
                    self.end(self.items, at, reason)
        for order, done in orders.heartbeats(pending):
            self._apply(order, done, None, answers)
        for position in calls.keys() | {answer.item for answer in answers.all()}:
            found = by_step(calls.get(position, ()), answers, position)
            self.calls.setdefault(position, {}).update(found)  # a retry replaces those of the failed step

    def cancel(self, positions: Iterable[int], at: datetime | None) -> None:
        """Note a request to cancel items. If *at* is given, they were waiting, and ended at that time."""
        for position in positions:
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

    def _answer(self, positions: Iterable[int], answers: Calls, at: datetime | None) -> None:
        """Remove the questions of waiting items that have an answer, or that expired before *at*."""
        for position in self._waiting.intersection(positions):
            item = with_answers(self.items[position], answers, at)
            late = next((question for question in item.waiting_for if at and is_expired(question, at)), None)
            if late is not None:
                item = _ended(item, expiry_of(late), at)
            self.items[position] = item
            if item.status is not RunStatus.WAITING:
                self._waiting.discard(position)

    def _apply(self, order: ItemsOrder, done: ItemsDone, at: datetime | None, answers: Calls) -> None:
        """Apply the progress of *order*. *at* is when the order ended, or None if it is running."""
        for ended in done.ended:
            self._apply_end(ended)
        for part in done.waiting:
            waiting = {"status": RunStatus.WAITING, "waiting_for": part.questions, "worked_s": part.worked_s}
            item = replace(self._started(part), **waiting)
            if self._must_end(item) and at is not None:
                self.items[part.position] = _cancelled(item, at, self._stopped_by)
                continue
            self.items[part.position] = item
            self._waiting.add(part.position)
            self._answer([part.position], answers, None)
        for part in order.left_after(done):
            item = self._started(part)
            if self._must_end(item) and at is not None and not item.status.is_final:
                item = _cancelled(item, at, self._stopped_by)
            self.items[part.position] = item

    def _must_end(self, item: Run) -> bool:
        """Whether *item* ends instead of running again."""
        return item.cancel_requested or self._stopped_by is not None

    def _started(self, part: Part) -> Run:
        item = self.items[part.position]
        if item.status.is_final:
            return item
        item = replace(item, spent=latest(item.spent, added(self._spent_before.get(part.position), part.usage)))
        if part.started_at is None:
            return item
        steps = part.steps or item.steps
        return replace(item, status=RunStatus.RUNNING, started_at=part.started_at, steps=steps, progress=part.progress)

    def _apply_end(self, ended: ItemOutcome) -> None:
        item = self.items[ended.position]
        steps = ended.steps or item.steps
        self.items[ended.position] = replace(
            item,
            status=ended.status,
            result=steps[-1].result if ended.status is RunStatus.COMPLETED else None,
            error=ended.error,
            error_type=ended.error_type,
            started_at=ended.started_at,
            completed_at=ended.completed_at,
            progress=ended.progress,
            steps=steps,
            spent=latest(item.spent, added(self._spent_before.get(ended.position), ended.usage)),
        )


def _cancelled(item: Run, at: datetime, reason: Outcome | None = None) -> Run:
    is_waiting = item.status is RunStatus.WAITING
    return _ended(item, reason or (CANCELLED if is_waiting else CANCELLED_BEFORE_START), at)


def _ended(item: Run, outcome: Outcome, at: datetime | None) -> Run:
    return replace(item, **asdict(outcome), completed_at=at)


class _OpenOrders:
    """The ``run_items`` activities of a chunk that have not ended, from its history."""

    def __init__(self) -> None:
        self._orders: dict[int, tuple[str, ItemsOrder]] = {}

    def apply(self, event: HistoryEvent) -> tuple[ItemsOrder, ItemsDone] | None:
        """Apply *event*. If it ends an order, return the order and its progress."""
        match event.event_type:
            case E.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
                scheduled = event.activity_task_scheduled_event_attributes
                if scheduled.activity_type.name == ITEMS_ACTIVITY:
                    order = decoded(scheduled.input.payloads[0], ItemsOrder)
                    self._orders[event.event_id] = (scheduled.activity_id, order)
            case E.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                completed = event.activity_task_completed_event_attributes
                if taken := self._pop(completed.scheduled_event_id):
                    return taken, decoded(completed.result.payloads[0], ItemsDone)
            case E.EVENT_TYPE_ACTIVITY_TASK_CANCELED:
                if taken := self._pop(event.activity_task_canceled_event_attributes.scheduled_event_id):
                    return taken, ItemsDone()
            case E.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT:
                return self._failed(event, event.activity_task_timed_out_event_attributes)
            case E.EVENT_TYPE_ACTIVITY_TASK_FAILED:
                return self._failed(event, event.activity_task_failed_event_attributes)
        return None

    def _failed(self, event: HistoryEvent, end: Any) -> tuple[ItemsOrder, ItemsDone] | None:
        order = self._pop(end.scheduled_event_id)
        if order is None:
            return None
        cause = CONVERTER.failure_converter.from_failure(end.failure, CONVERTER.payload_converter)
        is_cancelled = end.retry_state == RetryState.RETRY_STATE_CANCEL_REQUESTED
        return order, done_after_failure(order, cause, event.event_time.ToDatetime(UTC), is_cancelled=is_cancelled)

    def _pop(self, event_id: int) -> ItemsOrder | None:
        return self._orders.pop(event_id, ("", None))[1]

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


async def _latest_history(
    cluster: Cluster, workflow_id: str
) -> tuple[Sequence[HistoryEvent], Sequence[PendingActivityInfo]]:
    """Return the latest history of a chunk's attempt and its pending activities. Raises RPCError, NOT_FOUND.

    While a workflow task is running, an activity that completes is no longer pending and not yet in the history. Its
    items would seem to wait again. So this waits for the history, for longer than the workflow task timeout.
    """
    for pause_s in (*REREAD_DELAYS_S, None):
        described = (await cluster.client.get_workflow_handle(workflow_id).describe()).raw_description
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
    cluster: Cluster, batch_id: str, chunk: int, attempts: Sequence[Attempt], rows_of: str | None
) -> Chunk:
    """Read the current state of a chunk from its rows and all *attempts*. *rows_of*: see ``Attempt``.

    Raises: RPCError, NOT_FOUND if the retention of its rows or of the first attempt is over.
    """
    # A retry starts only chunks that have items to retry, and a running attempt may not have started this one yet.
    histories = asyncio.gather(
        *(
            _full_history(
                cluster,
                chunk_workflow_id(batch_id, chunk, number),
                may_be_missing=number > 1 or attempt.completed_at is None,
            )
            for number, attempt in enumerate(attempts, 1)
            if chunk < attempt.begun_to
        )
    )
    rows = await cluster.input_of(rows_workflow_id(rows_of or batch_id, chunk), RowsOrder)
    remaining_histories = iter(await histories)
    items = Chunk(batch_id, rows)
    for number, attempt in enumerate(attempts, 1):
        if number > 1:
            items.reopen(attempt)
        for position, at in attempt.cancelled.items():
            items.cancel([position], at)
        reason = COST_LIMIT if attempt.is_spent else None
        if chunk < attempt.begun_to:
            items.fold(*next(remaining_histories), reason)
        if attempt.completed_at is not None:
            items.end(items.items, attempt.completed_at, reason)
    return items


async def _full_history(
    cluster: Cluster, workflow_id: str, *, may_be_missing: bool
) -> tuple[Sequence[HistoryEvent], Sequence[PendingActivityInfo]]:
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

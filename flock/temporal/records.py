"""From the history of a workflow to the record of its run: no worker is asked, and nothing is kept twice."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType
from temporalio.api.failure.v1 import Failure
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo

from flock.engine.outcomes import CANCELLED, Outcome
from flock.errors import cut
from flock.runs import Run, RunStatus
from flock.temporal.messages import (
    INTERRUPTED,
    Heartbeat,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    RunOrder,
    StepDone,
    decoded,
)
from flock.temporal.payloads import PAYLOAD_LOST

__all__ = [
    "CANCELLED_BEFORE_START",
    "GIVEN_UP",
    "done_after_failure",
    "order_of",
    "outcome_of_failure",
    "reset_for_retry",
    "run_of",
    "time_of",
    "with_pending_activity",
]

#: What ends a workflow that did not end by itself, in words.
CLOSED_FROM_OUTSIDE = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED: "terminated",
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT: "timed out",
}


def reset_for_retry(run: Run) -> Run:
    """A run as its next attempt finds it, with the steps that it has."""
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
    )


def order_of(history: Sequence[HistoryEvent]) -> RunOrder:
    """What the workflow was started with."""
    sent = history[0].workflow_execution_started_event_attributes.input.payloads[0]
    order: RunOrder = decoded(sent, RunOrder)
    return order


def run_of(history: Sequence[HistoryEvent]) -> Run:
    """The run as its history tells it. Of a turn that has not ended it tells nothing: see ``with_pending_activity``."""
    run = order_of(history).run
    for event in history:
        at = time_of(event.event_time)
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                run = replace(run, cancel_requested=True)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED if run.started_at is None:
                run = replace(run, status=RunStatus.RUNNING, started_at=at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                sent = event.activity_task_completed_event_attributes.result.payloads[0]
                done: StepDone = decoded(sent, StepDone)
                is_first = not any(step.attempt == run.attempt for step in run.steps)
                started_at = done.begun_at if is_first else run.started_at
                progress = done.progress or run.progress
                run = replace(run, steps=(*run.steps, done.step), started_at=started_at, progress=progress)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED:
                failed = event.activity_task_failed_event_attributes.failure
                run = _with_heartbeats(run, failed.application_failure_info.details.payloads)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_TIMED_OUT:
                late = event.activity_task_timed_out_event_attributes.failure
                run = _with_heartbeats(run, late.timeout_failure_info.last_heartbeat_details.payloads)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_COMPLETED:
                run = replace(
                    run,
                    status=RunStatus.COMPLETED,
                    result=run.steps[-1].result,
                    started_at=run.started_at or at,  # tried again, and there was nothing left to do
                    completed_at=at,
                )
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                run = _failed(run, event.workflow_execution_failed_event_attributes.failure, at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                run = replace(
                    run,
                    status=RunStatus.CANCELLED,
                    error=CANCELLED.error,
                    error_type=CANCELLED.error_type,
                    completed_at=at,
                )
            case end if end in CLOSED_FROM_OUTSIDE:
                error = f"The run was {CLOSED_FROM_OUTSIDE[end]} on the cluster before it ended."
                run = replace(run, status=RunStatus.FAILED, error=error, error_type=INTERRUPTED, completed_at=at)
    return run


def with_pending_activity(run: Run, pending: Sequence[PendingActivityInfo]) -> Run:
    """*run*, which is open, with what the worker of its turn has told: until then the turn may wait for its slot."""
    run = _with_heartbeats(run, pending[0].heartbeat_details.payloads if pending else ())
    has_started = run.started_at is not None and run.status is RunStatus.STARTING
    return replace(run, status=RunStatus.RUNNING) if has_started else run


def _with_heartbeats(run: Run, payloads: Iterable[Payload]) -> Run:
    """*run* with what a turn has told of itself; when the run started is known from the first one of its attempt."""
    for heartbeat in (decoded(sent, Heartbeat) for sent in payloads):
        is_first = not any(step.attempt == run.attempt for step in run.steps)
        started_at = heartbeat.begun_at if is_first else run.started_at
        run = replace(run, started_at=started_at, progress=heartbeat.progress or run.progress)
    return run


def _failed(run: Run, failure: Failure, at: datetime) -> Run:
    about = failure.application_failure_info
    run = _with_heartbeats(run, about.details.payloads)
    error_type = about.type or INTERRUPTED
    return replace(run, status=RunStatus.FAILED, error=cut(failure.message), error_type=error_type, completed_at=at)


def time_of(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(UTC)


# Items

CANCELLED_BEFORE_START = Outcome(RunStatus.CANCELLED, "The batch was cancelled before this item began.", "cancelled")
GIVEN_UP = Outcome(
    RunStatus.FAILED, "The workers that had this item died or stopped, many of them. It may be the item.", INTERRUPTED
)


def outcome_of_failure(error_type: str | None, error: str) -> Outcome:
    """How an item ends that cannot be worked on, by what its activity failed with."""
    return Outcome(RunStatus.FAILED, error, PAYLOAD_LOST) if error_type == PAYLOAD_LOST else GIVEN_UP


def done_after_failure(
    order: ItemsOrder, heartbeat: ItemsDone | None, at: datetime, *, is_cancelled: bool, end: Outcome = GIVEN_UP
) -> ItemsDone:
    """What is taken for done where the cluster does not let *order* be tried again.

    Many had it: whatever was at work fails, so that the rest can go on. Or some of it is to be cancelled, and its
    worker died before it had: the rest is to be ordered anew.
    """
    heartbeat = heartbeat or ItemsDone()
    if is_cancelled:
        return heartbeat.for_retry()
    gone = {ended.position for ended in heartbeat.ended}
    culprit = heartbeat.unfinished or next((part for part in order.parts if part.position not in gone), None)
    if culprit is None:  # it died before it could say that it was done
        return ItemsDone(ended=heartbeat.ended)
    failed = ItemOutcome(
        position=culprit.position,
        status=end.status,
        error=end.error,
        error_type=end.error_type,
        started_at=culprit.started_at,
        completed_at=at,
        steps=culprit.steps,
    )
    return ItemsDone(ended=(*heartbeat.ended, failed))

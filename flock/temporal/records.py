"""Build the record of a run from the history of its workflow. This needs no worker and no second copy."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from msgspec.structs import asdict, replace
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflow.v1 import PendingActivityInfo
from temporalio.exceptions import ApplicationError, CancelledError, TimeoutError

from flock.errors import cut
from flock.runs import MAX_SHOWN_BYTES, NOT_LOADED, Call, Run, RunStatus
from flock.steps.outcomes import CANCELLED, Outcome
from flock.temporal.messages import (
    CALL_SIGNAL,
    INTERRUPTED,
    CallDone,
    Calls,
    Heartbeat,
    ItemsDone,
    ItemsOrder,
    RunOrder,
    StepDone,
    decoded,
    latest,
    recoded,
)
from flock.temporal.payloads import PAYLOAD_LOST

__all__ = [
    "GIVEN_UP",
    "by_step",
    "call_of",
    "calls_of",
    "done_after_failure",
    "outcome_of_failure",
    "reset_for_retry",
    "run_of",
    "shown",
    "with_answers",
    "with_pending_activity",
]

#: How a workflow was closed from outside, in words.
CLOSED_FROM_OUTSIDE = {
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TERMINATED: "terminated",
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_TIMED_OUT: "timed out",
}


def reset_for_retry(run: Run) -> Run:
    """Return *run* as its next attempt starts. It keeps its steps."""
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
    )


def run_of(history: Sequence[HistoryEvent]) -> Run:
    """Build a run from its history. For the progress of a running turn, see ``with_pending_activity``."""
    return _read(history)[0]


def _read(history: Sequence[HistoryEvent]) -> tuple[Run, Calls]:
    """Return the run, and the answers of its questions."""
    order = decoded(history[0].workflow_execution_started_event_attributes.input.payloads[0], RunOrder)
    run, answers, task_at = order.run, Calls(), None
    for event in history:
        at = event.event_time.ToDatetime(UTC)
        match event.event_type:
            case EventType.EVENT_TYPE_WORKFLOW_TASK_STARTED:
                task_at = at
            case EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED if run.status is RunStatus.WAITING:
                run = with_answers(run, answers, task_at)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED if (call := call_of(event)) is not None:
                run = replace(run, spent=latest(run.spent, call.spent))
                if run.status is RunStatus.WAITING:
                    answers.add(call)
                    run = with_answers(run, answers)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED:
                run = replace(run, cancel_requested=True)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_STARTED if run.status is RunStatus.STARTING:
                run = replace(run, status=RunStatus.RUNNING, started_at=run.started_at or at)
            case EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED:
                payload = event.activity_task_completed_event_attributes.result.payloads[0]
                done = decoded(payload, StepDone)
                run = _with_progress(run, done)
                if done.step is None:
                    waiting = {"status": RunStatus.WAITING, "waiting_for": done.questions, "worked_s": done.worked_s}
                    run = with_answers(replace(run, **waiting), answers)
                else:
                    run = replace(run, steps=(*run.steps, done.step))
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
                    started_at=run.started_at or at,  # a retry with no step left to run
                    completed_at=at,
                )
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_FAILED:
                failure = event.workflow_execution_failed_event_attributes.failure
                info = failure.application_failure_info
                ended = {"error": cut(failure.message), "error_type": info.type or INTERRUPTED, "completed_at": at}
                run = replace(_with_heartbeats(run, info.details.payloads), status=RunStatus.FAILED, **ended)
            case EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCELED:
                run = replace(run, **asdict(CANCELLED), completed_at=at)
            case end if end in CLOSED_FROM_OUTSIDE:
                error = f"The run was {CLOSED_FROM_OUTSIDE[end]} on the cluster before it ended."
                run = replace(run, status=RunStatus.FAILED, error=error, error_type=INTERRUPTED, completed_at=at)
    return run, answers


def with_answers(run: Run, answers: Calls, at: datetime | None = None) -> Run:
    """Return *run*, which waits, without the questions that have an answer, or expired before *at*."""
    left = answers.still_open(run.position or 0, len(run.steps), run.waiting_for, at)
    return replace(run, waiting_for=left, status=RunStatus.WAITING if left else RunStatus.STARTING)


def _is_first_turn(run: Run) -> bool:
    """Whether its attempt has neither completed a step nor waited for an answer."""
    return not run.worked_s and not any(step.attempt == run.attempt for step in run.steps)


def call_of(event: HistoryEvent) -> CallDone | None:
    """Return the finished call that *event* reports, or None. Its long values are not loaded, except for answers."""
    signal = event.workflow_execution_signaled_event_attributes
    if event.event_type != EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED or signal.signal_name != CALL_SIGNAL:
        return None
    done: CallDone = decoded(signal.input.payloads[0], CallDone)
    return done if done.call.kind == "question" else replace(done, call=shown(done.call))


def shown(call: Call) -> Call:
    """Return *call* without long values."""
    long = {name: NOT_LOADED for name in ("arguments", "result") if len(getattr(call, name)) > MAX_SHOWN_BYTES}
    return replace(call, **long) if long else call


def calls_of(history: Sequence[HistoryEvent]) -> dict[int, list[Call]]:
    """Return the calls of each step of a run in one attempt; see ``call_of``."""
    done = [done for event in history if (done := call_of(event)) is not None]
    return by_step(done, _read(history)[1])


def by_step(done: Iterable[CallDone], answers: Calls, item: int = 0) -> dict[int, list[Call]]:
    """Return the calls that workers have *done*, and *answers*, oldest first, by the position of their step."""
    found: dict[int, list[Call]] = {}
    for each in [*(each for each in done if each.call.kind != "question"), *answers.of_item(item)]:
        found.setdefault(each.step, []).append(each.call)
    return {step: sorted(calls, key=lambda call: call.completed_at) for step, calls in found.items()}


def with_pending_activity(run: Run, pending: Sequence[PendingActivityInfo]) -> Run:
    """Return *run*, which has not ended, with the last heartbeat of its turn.

    Without a heartbeat, the turn may still wait for its slot.
    """
    return _with_heartbeats(run, pending[0].heartbeat_details.payloads if pending else ())


def _with_heartbeats(run: Run, payloads: Iterable[Payload]) -> Run:
    for sent in payloads:
        run = _with_progress(run, decoded(sent, Heartbeat))
    return run


def _with_progress(run: Run, turn: Heartbeat) -> Run:
    """Return *run* with the progress of its *turn*. The first turn of an attempt also reports the start of the run."""
    has_started = run.status is RunStatus.STARTING and turn.begun_at is not None
    return replace(
        run,
        status=RunStatus.RUNNING if has_started else run.status,
        started_at=turn.begun_at if _is_first_turn(run) else run.started_at,
        progress=turn.progress or run.progress,
        spent=latest(run.spent, turn.spent),
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

"""The workflow of a run, which executes its agents in sequence.

It is generic: only the activity knows the agents, so running workflows survive a deployment with other agents. Replay
requires it to be deterministic: it uses only the workflow's clock and its input.
"""

import asyncio
from datetime import timedelta

from msgspec.structs import replace
from temporalio import workflow
from temporalio.common import Priority, RetryPolicy
from temporalio.exceptions import ActivityError, ApplicationError, TimeoutError, TimeoutType

from flock.engine.outcomes import queue_timeout, timeout_of
from flock.runs import Call, RunStatus
from flock.temporal.messages import (
    ACTIVITY,
    CALL_SIGNAL,
    CALLS_QUERY,
    INTERRUPTED,
    MARK_WORKFLOW,
    RUN_WORKFLOW,
    CallDone,
    Calls,
    RunOrder,
    StepDone,
)

__all__ = ["FlockMark", "FlockRun"]

#: Only turns whose worker died or stopped are retried. The limit is for a turn that kills its workers.
RETRIES = RetryPolicy(
    initial_interval=timedelta(seconds=0.5),
    backoff_coefficient=2,
    maximum_interval=timedelta(seconds=30),
    maximum_attempts=20,
)
#: The worker enforces the deadline, and heartbeats show that it is alive. So the cluster needs no limit of its own.
NO_LIMIT = timedelta(days=365)
#: Runs have a higher priority than batch items.
RUNS_FIRST = Priority(priority_key=1)


@workflow.defn(name=RUN_WORKFLOW)
class FlockRun:
    """One attempt of one run. Its history is the run's record (``flock.temporal.records``), so it returns nothing.

    If the run fails, it raises an ``ApplicationError`` with the run's ``error`` and ``error_type``.

    Cancellation: it closes as cancelled when its agent has stopped.
    """

    def __init__(self) -> None:
        self._calls = Calls()

    @workflow.signal(name=CALL_SIGNAL)
    def call_done(self, done: CallDone) -> None:
        self._calls.add(done)

    @workflow.query(name=CALLS_QUERY)
    def calls(self, item: int, step: int) -> list[Call]:
        """Return the finished calls of a step."""
        return self._calls.of_step(item, step)

    @workflow.run
    async def run(self, order: RunOrder) -> None:
        while order.run.next_agent_name is not None:
            done = await self._turn(order)
            self._calls = Calls()
            run = order.run
            order = replace(
                order,
                run=replace(
                    run,
                    status=RunStatus.RUNNING,
                    started_at=run.started_at or done.begun_at,
                    steps=(*run.steps, done.step),
                ),
            )
            _check_cancelled()

    async def _turn(self, order: RunOrder) -> StepDone:
        max_wait_s = order.queue_timeout_s
        if order.run.started_at is not None:
            max_wait_s = max(0.001, order.timeout_s - (workflow.now() - order.run.started_at).total_seconds())
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


@workflow.defn(name=MARK_WORKFLOW)
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
    if isinstance(cause, TimeoutError) and cause.type is TimeoutType.SCHEDULE_TO_START:
        if order.run.started_at is not None:
            end = timeout_of(order.timeout_s)
            return ApplicationError(end.error, type=end.error_type, non_retryable=True)
        late = queue_timeout(order.queue_timeout_s or 0)
        return ApplicationError(str(late), type=late.error_type, non_retryable=True)
    message = f"The worker died or stopped in each of {RETRIES.maximum_attempts} attempts. The run may be the cause."
    return ApplicationError(message, type=INTERRUPTED, non_retryable=True)

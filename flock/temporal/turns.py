"""Turns of runs and of batch items, in the activities of a worker.

``flock.engine.turns`` executes them. Here each turn has a task of its own, so that an exception or a stray cancellation
ends only that turn.
"""

import asyncio
import contextlib
from asyncio import FIRST_COMPLETED
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from temporalio import activity
from temporalio.client import WorkflowHandle, WorkflowQueryFailedError
from temporalio.service import RPCError, RPCStatusCode

from flock.engine.outcomes import Outcome
from flock.engine.turns import ActiveRun, Turns, WaitingForAnswers
from flock.errors import CallError, EngineFull, OwnershipLost, StoreError
from flock.runs import Call, Run, Step, Usage
from flock.temporal.cluster import Cluster
from flock.temporal.messages import CALL_SIGNAL, CALLS_QUERY, SPENT_QUERY, CallDone, latest, recoded

__all__ = ["MAX_RUN_BYTES", "ActivityTurn", "until_done"]

T = TypeVar("T")

#: Inputs and results of one run together. The cluster takes at most 2 MiB at once.
MAX_RUN_BYTES = 1_500_000
#: The cluster will not accept the same signal later.
REFUSALS = (RPCStatusCode.INVALID_ARGUMENT, RPCStatusCode.FAILED_PRECONDITION)
#: The pause before a failed request for calls is sent again.
RETRY_AFTER_S = 1.0


class ActivityTurn(ActiveRun):
    """The next turn of a run.

    Attributes:
        outcome: its step, its questions, or how the run ends; None if the worker shuts down and leaves the turn to
            another one.
    """

    outcome: Step | WaitingForAnswers | Outcome | None = None

    def __init__(self, run: Run, timeout_s: float, cluster: Cluster, **options: Any) -> None:
        super().__init__(run, timeout_s, **options)
        self._cluster = cluster

    async def finished_calls(self) -> Sequence[Call]:
        handle, run = self._workflow(), self.run

        async def ask() -> list[Call]:
            async with self._cluster.rpc_scope():
                spent = None
                with contextlib.suppress(WorkflowQueryFailedError):  # a worker of an earlier version has answered
                    spent = await handle.query(SPENT_QUERY, run.position or 0)
                found: list[Call] = await handle.query(
                    CALLS_QUERY, args=[run.position or 0, len(run.steps)], result_type=list[Call]
                )
            self.spent = latest(self.spent, recoded(spent, Usage) if spent else None)
            return found

        return await self._answered(ask)

    async def _answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what *ask* returns. Call it until the cluster answers."""
        while True:
            try:
                return await ask()
            except (StoreError, EngineFull):
                await asyncio.sleep(RETRY_AFTER_S)

    async def keep_call(self, call: Call) -> None:
        """Send the call to the workflow of this activity. A signal is in its history when this returns.

        Raises: CallError if the cluster refuses it, OwnershipLost if the workflow has ended.
        """
        self.has_calls = True
        handle, run = self._workflow(), self.run
        done = CallDone(item=run.position or 0, step=len(run.steps), call=call, spent=self.spent)
        while True:
            try:
                async with self._cluster.rpc_scope():
                    await handle.signal(CALL_SIGNAL, done)
                return
            except RPCError as exc:
                raise OwnershipLost(run.run_id) from exc
            except (StoreError, EngineFull) as exc:
                if isinstance(exc.__cause__, RPCError) and exc.__cause__.status in REFUSALS:
                    raise CallError(f"The cluster does not store the call {call.name!r}: {exc.__cause__}.") from exc
                await asyncio.sleep(RETRY_AFTER_S)

    def _workflow(self) -> WorkflowHandle[Any, Any]:
        # Without its run id, since a chunk may continue as new.
        return self._cluster.client.get_workflow_handle(activity.info().workflow_id or "")

    async def take(self, turns: Turns) -> None:
        """Execute the turn and set ``outcome``. A return value would be lost if an agent left a cancellation behind."""
        failure: BaseException | None = None
        try:
            with self.scope:
                self.outcome = await turns.take(self)
                return
        except BaseException as exc:  # an agent's SystemExit would end the worker
            failure = exc
        if isinstance(failure, WaitingForAnswers) and not self.cancel_requested:
            length = len(msgspec.json.encode(failure.questions))
            if length <= MAX_RUN_BYTES:
                self.outcome = failure
                return
            failure = CallError(
                f"The questions have {length} bytes, more than the cluster can store. Ask shorter ones."
            )
        if not self.is_stopped:
            self.outcome = turns.outcome_of(self, failure)

    def stop(self, turns: Turns) -> None:
        """Stop the turn because the worker shuts down. A function in a thread sees ``cancel_requested``."""
        turns.stop(self)
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

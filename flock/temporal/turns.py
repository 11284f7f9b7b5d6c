"""Turns in the activities of a worker, of runs and of items of batches.

``flock.engine.turns`` takes them. Here each has a task of its own, within which whatever an agent raises, cancels or
leaves behind ends that turn and touches no other.
"""

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import Callable

from temporalio import activity

from flock.engine.outcomes import Outcome
from flock.engine.turns import ActiveRun, Turns
from flock.runs import Step

__all__ = ["MAX_RUN_BYTES", "ActivityTurn", "until_done"]

#: Inputs and results of one run together, of the 2 MiB that the cluster takes at once.
MAX_RUN_BYTES = 1_500_000


class ActivityTurn(ActiveRun):
    """The next turn of a run.

    Attributes:
        outcome: its step, or how the run ends; None if the worker stops and leaves the turn to another one.
    """

    outcome: Step | Outcome | None = None

    async def take(self, turns: Turns) -> None:
        """Take the turn. A task's own result would be lost if an agent left a cancellation behind."""
        failure: BaseException | None = None
        try:
            with self.scope:
                self.outcome = await turns.take(self)
                return
        except BaseException as exc:  # an agent's SystemExit would end the worker
            failure = exc
        if not self.is_stopped:
            self.outcome = turns.outcome_of(self, failure)

    def stop(self, turns: Turns) -> None:
        """Stop the turn because the worker stops. A function in a thread is told, since nothing waits for it now."""
        turns.stop(self)
        self.cancel()


async def until_done(
    work: asyncio.Task[None], *, drain_timeout_s: float, stop: Callable[[], None], cancel: Callable[[], None]
) -> None:
    """Wait for *work*, which is done in this activity, whatever happens to the activity.

    Args:
        stop: called when the worker stops and has waited for *drain_timeout_s* seconds.
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
    """The SDK cancels an activity after that time, but not one that was cancelled before."""
    await activity.wait_for_worker_shutdown()
    await asyncio.sleep(drain_timeout_s)

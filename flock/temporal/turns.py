"""Turns of runs and of batch items, in the activities of a worker.

``flock.engine.turns`` executes them. Here each turn has a task of its own, so that an exception or a stray cancellation
ends only that turn.
"""

import asyncio
from asyncio import FIRST_COMPLETED
from collections.abc import Callable

from temporalio import activity

from flock.engine.outcomes import Outcome
from flock.engine.turns import ActiveRun, Turns
from flock.runs import Step

__all__ = ["MAX_RUN_BYTES", "ActivityTurn", "until_done"]

#: Inputs and results of one run together. The cluster takes at most 2 MiB at once.
MAX_RUN_BYTES = 1_500_000


class ActivityTurn(ActiveRun):
    """The next turn of a run.

    Attributes:
        outcome: its step, or how the run ends; None if the worker shuts down and leaves the turn to another one.
    """

    outcome: Step | Outcome | None = None

    async def take(self, turns: Turns) -> None:
        """Execute the turn and set ``outcome``. A return value would be lost if an agent left a cancellation behind."""
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

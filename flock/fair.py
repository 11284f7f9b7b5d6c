"""An event loop is shared: a long loop over what a client sent stops now and then, so that other tasks run too."""

import time

import anyio
from anyio.lowlevel import RunVar, checkpoint

__all__ = ["FairShare"]

#: How long a task may keep the event loop before it lets others run, in seconds.
SHARE_S = 0.002

#: How many tasks that have had their share may continue in the same turn of the event loop.
SHARERS = 5

#: For each event loop, the tasks that continue next.
_sharers: RunVar[anyio.Semaphore] = RunVar("flock_sharers")


class FairShare:
    """The event loop's time for one task.

    A loop awaits ``checkpoint`` after each row and each piece. Time is measured, since neither rows nor bytes say what
    a step costs. Tasks that have had their share continue a few at a time, first come, first served: however many there
    are, other tasks wait for SHARERS times SHARE_S at most.
    """

    def __init__(self) -> None:
        self._ends_at = 0.0

    async def checkpoint(self) -> None:
        """Let other tasks run if this one has had its share; otherwise return at once."""
        if time.perf_counter() >= self._ends_at:
            sharers = _sharers.get(None)
            if sharers is None:
                sharers = anyio.Semaphore(SHARERS, fast_acquire=True)
                _sharers.set(sharers)
            async with sharers:
                await checkpoint()
            self._ends_at = time.perf_counter() + SHARE_S

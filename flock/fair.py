"""Cooperative scheduling: a long loop over client data yields now and then, so that other tasks can run."""

import time

import anyio
from anyio.lowlevel import RunVar, checkpoint

#: How long a task may occupy the event loop before it yields, in seconds.
SHARE_S = 0.002

#: How many of the tasks that have used up their share may continue in one iteration of the event loop.
SHARERS = 5

#: One semaphore for each event loop. A task that has used up its share continues when it holds it.
_sharers: RunVar[anyio.Semaphore] = RunVar("flock_sharers")


class FairShare:
    """One task's share of the event loop's time.

    A loop awaits ``checkpoint`` after each row and each chunk. The share is measured in time, because neither rows nor
    bytes show what a step costs. Tasks that have used up their share continue a few at a time, in FIFO order. So other
    tasks wait for at most SHARERS times SHARE_S, however many loops are running.
    """

    def __init__(self) -> None:
        self._ends_at = time.perf_counter() + SHARE_S

    async def checkpoint(self) -> None:
        """Yield to other tasks if this one has used up its share. Otherwise return immediately."""
        if time.perf_counter() >= self._ends_at:
            sharers = _sharers.get(None)
            if sharers is None:
                sharers = anyio.Semaphore(SHARERS, fast_acquire=True)
                _sharers.set(sharers)
            async with sharers:
                await checkpoint()
            self._ends_at = time.perf_counter() + SHARE_S

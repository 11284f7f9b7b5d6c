"""An event loop is shared: a long loop over what a client sent stops now and then, so that other tasks run too."""

import time

import anyio.lowlevel

__all__ = ["FairShare"]

#: How long a task may keep the event loop before it lets others run, in seconds.
SHARE_S = 0.002


class FairShare:
    """The event loop's time for one task.

    A loop awaits ``checkpoint`` after each row and each piece. Time is measured, since neither rows nor bytes say what
    a step costs.
    """

    def __init__(self) -> None:
        self._ends_at = 0.0

    async def checkpoint(self) -> None:
        """Let other tasks run if this one has had its share; otherwise return at once."""
        if time.perf_counter() >= self._ends_at:
            await anyio.lowlevel.checkpoint()
            self._ends_at = time.perf_counter() + SHARE_S

"""Worker threads for synchronous functions.

A thread cannot be cancelled, so a call in one is waited for even when its run is cancelled: nothing is said to have
stopped that has not. Only at its deadline, or when the engine leaves, is it left alone; its slot stays taken until the
function returns, so that functions that hang cannot pile up.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from flock.engine.slots import Slots

__all__ = ["Threads"]

T = TypeVar("T")


class _Call:
    def __init__(self, batch_id: str | None, deadline: float) -> None:
        self.batch_id = batch_id
        self.scope = anyio.CancelScope(shield=True, deadline=deadline)
        self.is_begun = False
        self.is_done = False
        self.is_abandoned = False
        self.is_released = False
        self.when_free: list[Callable[[], None]] = []


class Threads:
    """At most *max_threads* calls at the same time; each has an *owner*, one call an owner."""

    def __init__(self, max_threads: int) -> None:
        self._slots = Slots(max_threads, reserved=max_threads // 10)
        self._calls: dict[object, _Call] = {}

    async def call(self, function: Callable[[], T], owner: object, batch_id: str | None, deadline: float) -> T:
        """Call *function* in a thread and wait for it, until *deadline* (of the loop's clock) or ``abandon``.

        *batch_id* is of the batch of which *owner* is an item.

        Raises: what *function* raises; TimeoutError if it is left alone.
        Cancellation: while it waits for a slot, at once; then only when the function has returned.
        """
        call, schedule_in_loop = _Call(batch_id, deadline), _loop_scheduler()
        await self._slots.acquire(batch_id)
        self._calls[owner] = call

        def run() -> T:
            try:
                call.is_begun = True  # before it looks, as the other side does
                if call.is_abandoned:
                    raise TimeoutError
                return function()
            finally:
                call.is_done = True
                if call.is_abandoned:
                    # It does not wait for an answer: the loop may be at its end, and the thread would never be.
                    with contextlib.suppress(RuntimeError):  # it is closed by now
                        schedule_in_loop(self._free, owner, call)

        try:
            with call.scope:
                # A limiter of its own, since the slot is released later than this one would be.
                return await anyio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))
        finally:
            # The thread looks at this after it has set is_begun and is_done, and we the other way round.
            call.is_abandoned = True
            if call.is_done or not call.is_begun or not call.scope.cancelled_caught:
                self._free(owner, call)
        await anyio.lowlevel.checkpoint_if_cancelled()
        raise TimeoutError

    def _free(self, owner: object, call: _Call) -> None:
        if call.is_released:
            return
        call.is_released = True
        self._slots.release(call.batch_id)
        if self._calls.get(owner) is call:
            del self._calls[owner]
        for callback in call.when_free:
            callback()

    def abandon(self, owner: object) -> None:
        """Do not wait any longer for the call of *owner*, if there is one."""
        if owner in self._calls:
            self._calls[owner].scope.cancel()

    def when_free(self, owner: object, callback: Callable[[], None]) -> None:
        """Call *callback* once no thread works for *owner*: at once, or when its function returns."""
        if owner in self._calls:
            self._calls[owner].when_free.append(callback)
        else:
            callback()

    @property
    def busy(self) -> int:
        """How many functions have not returned."""
        return len(self._calls)


def _loop_scheduler() -> Callable[..., Any]:
    """What calls a function in this event loop, from any thread, without waiting for it."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon

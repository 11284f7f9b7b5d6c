"""Worker threads for synchronous functions.

A thread cannot be cancelled. So a cancelled run waits for its thread, and is reported as cancelled only when the work
has really stopped. A call is abandoned only at its deadline or when the engine shuts down. Its slot stays taken until
the function returns, so that hanging functions cannot accumulate.
"""

import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from flock.scopes import Cancellation, note_late_cancellation, running_loop, set_deadline
from flock.steps.slots import BatchKey, Slots

T = TypeVar("T")

logger = logging.getLogger("flock.runs")

#: How long to wait after the system had no thread for a function, in seconds.
RETRY_AFTER_S = 1.0


class _Call(Generic[T]):
    """A call of *function* in a thread. The thread calls *free* in the event loop if the call was abandoned."""

    def __init__(
        self,
        function: Callable[[], T],
        owners: Sequence[object],
        batch: BatchKey,
        free: "Callable[[_Call[T]], None]",
    ) -> None:
        self.owners = owners
        self.batch = batch
        self.scope = anyio.CancelScope(shield=True)
        self.is_started = False
        self.is_done = False
        self.is_abandoned = False
        self.is_released = False
        #: returns what the function returned, or raises what it raised; None before that
        self.outcome: Callable[[], T] | None = None
        #: whether it has returned or raised, and not a coroutine that is still to be awaited
        self.has_ended = False
        self._function = function
        self._free = free
        self._schedule_in_loop = loop_scheduler()
        #: set in the event loop when the function has returned, if ``_needs_end`` was set before
        self._end = anyio.Event()
        self._needs_end = False

    def execute(self) -> None:
        """Call the function, in the thread. This raises nothing: anyio would make a cycle of the exception."""
        try:
            self.is_started = True  # must be set before is_abandoned is read; see ``Threads.call``
            if self.is_abandoned:
                raise TimeoutError
            value = self._function()
            self.outcome, self.has_ended = lambda: value, not inspect.isawaitable(value)
        except BaseException as exc:
            self.outcome, self.has_ended = functools.partial(_raise, exc), True
        finally:
            self.is_done = True
            if self._needs_end:
                self._schedule_in_loop(self._end.set)
            if self.is_abandoned:  # do not wait for a result: if the loop is ending, the thread would never end
                self._schedule_in_loop(self._free, self)

    async def wait(self) -> None:
        """Wait until the function has returned, if it has started, or ``scope`` is cancelled.

        Cancellation: ignored, since asyncio cancels the tasks of a gather itself, and no shield of anyio prevents that.
        """
        self._needs_end = True
        while self.is_started and not (self.is_done or self.scope.cancel_called):
            with contextlib.suppress(anyio.get_cancelled_exc_class()):
                await self._end.wait()


class Threads:
    """Runs at most *max_threads* calls at the same time, for any number of owners."""

    def __init__(self, max_threads: int) -> None:
        self._slots = Slots(max_threads, reserved=max_threads // 10)
        self._calls: dict[object, list[_Call[Any]]] = {}
        self._when_free: dict[object, list[Callable[[], None]]] = {}
        #: the scopes of tasks in ``until_free``
        self._waits: dict[object, anyio.CancelScope] = {}

    async def call(
        self,
        function: Callable[[], T],
        owners: Sequence[object],
        batch: BatchKey,
        deadline: float,
        *,
        keeps_result: bool = False,
    ) -> T:
        """Call *function* in a thread and wait for it, until *deadline* (of the loop's clock) or ``abandon``.

        Args:
            owners: the run, and the step that holds a slot meanwhile.
            batch: that of the run, if it is an item.
            keeps_result: end as the function has ended even if ``asyncio.timeout`` or the like has cancelled this task
                meanwhile. The caller must then await ``Cancellation.raise_if_late``.

        Raises: what *function* raises; TimeoutError if the call is abandoned.
        Cancellation: immediate while waiting for a slot. After that, only when the function has returned.
        """
        call = _Call[T](function, owners, batch, self._free)
        await self._slots.acquire(batch)
        for owner in owners:
            self._calls.setdefault(owner, []).append(call)
        cancellation, cancelled_at = Cancellation(), 0.0
        try:
            with call.scope:
                set_deadline(call.scope, deadline)
                # The call gets its own limiter, because anyio would release a shared one before the slot is free.
                limiter = anyio.CapacityLimiter(1)
                try:
                    while not call.is_started:
                        try:
                            await anyio.to_thread.run_sync(call.execute, abandon_on_cancel=True, limiter=limiter)
                        except RuntimeError as exc:
                            logger.warning("a thread for an agent cannot be started now: %s", exc)
                            await anyio.sleep(RETRY_AFTER_S)
                    assert call.outcome is not None
                    return call.outcome()
                except anyio.get_cancelled_exc_class():
                    cancelled_at = anyio.current_time()
                    await call.wait()
                    if not (keeps_result and call.has_ended):
                        raise
            if keeps_result and call.has_ended and call.outcome is not None:
                if cancellation.is_requested:  # also by others than the scope, which has taken back its own requests
                    note_late_cancellation(cancelled_at)
                return call.outcome()
        finally:
            # The thread sets is_started and is_done, then reads is_abandoned. This task sets it, then reads those.
            call.is_abandoned = True
            call.outcome = None  # the traceback of what it raises refers to the call
            if call.is_done or not call.is_started:
                self._free(call)
        await anyio.lowlevel.checkpoint_if_cancelled()
        raise TimeoutError

    def _free(self, call: _Call[Any]) -> None:
        if call.is_released:
            return
        call.is_released = True
        self._slots.release(call.batch)
        for owner in call.owners:
            self._calls[owner].remove(call)
            if not self._calls[owner]:
                del self._calls[owner]
                for callback in self._when_free.pop(owner, ()):
                    callback()

    def abandon(self, owner: object) -> None:
        """Stop waiting for the calls of *owner*."""
        for call in self._calls.get(owner, ()):
            call.scope.cancel()
        if owner in self._waits:
            self._waits[owner].cancel()

    def are_awaited(self, owner: object) -> bool:
        """Whether a function is running for *owner* for which a task waits."""
        return any(not call.is_abandoned for call in self._calls.get(owner, ()))

    async def until_free(self, owner: object, deadline: float) -> None:
        """Wait until no thread is running for *owner*, not even an abandoned one, until *deadline*, or ``abandon``."""
        if owner not in self._calls:
            return
        is_free = anyio.Event()
        self.when_free(owner, is_free.set)
        with anyio.CancelScope(deadline=deadline) as self._waits[owner]:
            try:
                await is_free.wait()
            finally:
                del self._waits[owner]

    def when_free(self, owner: object, callback: Callable[[], None]) -> None:
        """Call *callback* when no thread is running for *owner*: now, or when its last function returns."""
        if owner in self._calls:
            self._when_free.setdefault(owner, []).append(callback)
        else:
            callback()


def _raise(exc: BaseException) -> NoReturn:
    try:
        raise exc
    finally:
        del exc  # its traceback refers to this frame


def loop_scheduler() -> Callable[..., None]:
    """Return a function that schedules a call in this event loop, if that has not ended. It works in any thread."""
    here = threading.get_ident()
    if (loop := running_loop()) is not None:
        from_here: Callable[..., object] = loop.call_soon  # in contrast to the other one, it writes to no socket
        from_thread: Callable[..., object] = loop.call_soon_threadsafe
    else:
        import trio

        from_here = from_thread = trio.lowlevel.current_trio_token().run_sync_soon

    def call_soon(function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            (from_here if threading.get_ident() == here else from_thread)(function, *args)

    return call_soon

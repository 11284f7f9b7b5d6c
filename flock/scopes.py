"""Tasks in an empty context, and the cancel scopes of a task that runs code of a user: their ends, and their clocks."""

import asyncio
import contextlib
import functools
import logging
import math
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context, ContextVar
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

logger = logging.getLogger("flock.runs")


#: By how much the timer of a scope comes after ours, in seconds.
JUST_AFTER_S = 1e-6
#: How many tasks that wait for one event are woken in one turn of the event loop.
WAKES_PER_TURN = 1000
#: How long a task gets to go on after the time of a stopped clock has counted, in seconds.
SOON_S = 0.05


def current_task() -> "asyncio.Task[Any] | None":
    """Return the current asyncio task, or None on another event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the running event loop of asyncio, or None in a thread without one and on another event loop."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _Late(NamedTuple):
    """A time in which a task had to finish something: its first and last ``Task.cancelling``, and when it began."""

    first: int
    last: int
    since: float


#: Tasks that were cancelled while they had to finish something. ``cancelling`` alone does not show it: before Python
#: 3.13 a ``TaskGroup`` that fails may leave it raised.
_CANCELLED_LATE = weakref.WeakKeyDictionary["asyncio.Task[Any]", list[_Late]]()


def note_late_cancellation(since: float | None = None) -> float | None:
    """The current task was cancelled while it has to finish something. A block around it raises that later.

    Args:
        since: when it was first cancelled then, in the time of the event loop; by default now. anyio may cancel it
            again in each turn of the loop.

    Returns: *since*.
    """
    if (task := current_task()) is not None:
        since, first = task.get_loop().time() if since is None else since, task.cancelling()
        times = [each for each in _CANCELLED_LATE.get(task, ()) if each.first < first]
        if times and times[-1].since == since:
            first = times.pop().first
        _CANCELLED_LATE[task] = [*times, _Late(first, task.cancelling(), since)]
    return since


class Cancellation:
    """Whether the current task is cancelled in a block, from the creation of this object on."""

    __slots__ = ("_cancelling", "_handled", "task")

    def __init__(self) -> None:
        self.task = current_task()
        self._handled = sys.exception()
        # A request that is still to be raised, as a TaskGroup of Python 3.13 may leave one, is raised in the block.
        self._cancelling = 0 if self.task is None else self.task.cancelling() - self.task._must_cancel  # type: ignore[attr-defined]

    @property
    def is_late(self) -> bool:
        """Whether the task was cancelled while it had to finish something, which it has."""
        late = self._late
        return bool(late) and self.task is not None and late[-1].last == self.task.cancelling()

    @property
    def late_s(self) -> float | None:
        """Seconds since the task was first cancelled while it had to finish something; None if it was not.

        A block in this one, such as that of a scope of anyio, may have taken back a cancellation of its own since.
        """
        if self.task is None or not (late := self._late) or late[-1].last < self.task.cancelling():
            return None
        return self.task.get_loop().time() - late[0].since

    @property
    def _late(self) -> list[_Late]:
        if self.task is None:
            return []
        return [each for each in _CANCELLED_LATE.get(self.task, ()) if each.last > self._cancelling]

    def is_cause_of(self, exc: BaseException) -> bool:
        """Whether *exc* is the cancellation, or what a function has turned it into."""
        if self.task is None:
            return isinstance(exc, anyio.get_cancelled_exc_class())
        found: BaseException | None = exc
        while not (found is None or found is self._handled or isinstance(found, asyncio.CancelledError)):
            found = _before(found)
        # What was being handled before the block is not its own, such as that of a time-out that has passed.
        return found is not None and found is not self._handled and self.is_requested

    @property
    def is_requested(self) -> bool:
        """Whether the task was cancelled, and the block has not ended. Always false on trio."""
        return self.task is not None and self.task.cancelling() > self._cancelling

    async def raise_if_late(self) -> None:
        if self.is_late:
            await anyio.lowlevel.checkpoint_if_cancelled()  # a scope of anyio expects its own exception
            raise asyncio.CancelledError


def _before(exc: BaseException) -> BaseException | None:
    """Return what was being handled when *exc* was raised. A time-out that has passed cancels only its own block."""
    if isinstance(exc, TimeoutError) and isinstance(exc.__cause__, asyncio.CancelledError):
        exc = exc.__cause__
    return exc.__context__


def loop_clock() -> Callable[[], float]:
    """Return a function for the time of the event loop. On asyncio it is faster than that of anyio."""
    return anyio.current_time if current_task() is None else asyncio.get_running_loop().time


@functools.cache
def _scope_of_asyncio() -> type[anyio.CancelScope]:
    return type(anyio.CancelScope())


def new_scope() -> anyio.CancelScope:
    """Return a scope. anyio finds out for each one which event loop is running, which takes longer than the scope."""
    return anyio.CancelScope() if current_task() is None else _scope_of_asyncio()()


def start_in_empty_context(tasks: TaskGroup, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
    """Start a task that does not see the context variables of its caller, and does not keep them alive."""
    Context().run(tasks.start_soon, function, *args)


def set_deadline(scope: "anyio.CancelScope | _Limit", deadline: float) -> None:
    """Set the deadline of a scope that was entered, in an empty context.

    asyncio keeps a timer and its context, with the objects of a request, until the deadline, even if it is cancelled.
    """
    Context().run(setattr, scope, "deadline", deadline)


class Clock:
    """The deadline of a scope, which does not move nearer while the clock is stopped."""

    def __init__(self, scope: "anyio.CancelScope | _Limit") -> None:
        self._scope = scope
        self._stops = 0
        self._stopped_at = self._left_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the scope was cancelled, or its deadline has passed."""
        return self._scope.cancel_called or anyio.current_time() >= self._scope.deadline

    def stop(self) -> None:
        if not self._stops:
            self._stopped_at = anyio.current_time()
            self._left_s = self._scope.deadline - self._stopped_at
            set_deadline(self._scope, math.inf)
        self._stops += 1

    def start(self, *, has_counted: bool) -> None:
        """Go on, with the time since ``stop`` if that *has_counted*; but the deadline passes no sooner than soon."""
        self._stops -= 1
        if not self._stops:
            time, left_s = anyio.current_time(), self._left_s
            if has_counted:
                left_s = max(left_s - (time - self._stopped_at), min(left_s, SOON_S))
            set_deadline(self._scope, time + left_s)


class _Event(asyncio.Event):
    """Wakes the tasks that wait for it in several turns of the event loop: to wake 10,000 at once would hold that."""

    def set(self) -> None:
        self._value = True
        self._wake(iter(tuple(self._waiters)))

    def _wake(self, waiters: Iterator[asyncio.Future[bool]]) -> None:
        for count, waiter in enumerate(waiters, 1):
            if not waiter.done():
                waiter.set_result(True)
            if count == WAKES_PER_TURN:
                waiter.get_loop().call_soon(self._wake, waiters)
                return


def new_event() -> anyio.Event | asyncio.Event:
    """Return an event for the current event loop. On asyncio it is faster than that of anyio."""
    return anyio.Event() if current_task() is None else _Event()


class Signal:
    """Wakes all tasks that wait for it now. It creates an event only for these, since that takes a while."""

    _event: anyio.Event | asyncio.Event | None = None

    def wait(self) -> Coroutine[Any, Any, object]:
        return self.next.wait()

    @property
    def next(self) -> anyio.Event | asyncio.Event:
        """An event that the next ``notify`` sets."""
        if self._event is None:
            self._event = new_event()
        return self._event

    def notify(self) -> None:
        event, self._event = self._event, None
        if event is not None:
            event.set()


_CLOCKS: ContextVar[tuple[Clock, ...]] = ContextVar("flock_clocks", default=())


class _Limit:
    """The deadline of a scope, and how many cancellations the task had when it passed, without those of scopes in it.

    anyio takes it for cancelled by others if ``Task.cancelling`` has another reason, or if asyncio has lost the message
    of its cancellation: before Python 3.13 a ``TaskGroup`` that fails leaves the one, and a ``gather`` does the other.
    """

    def __init__(self, scope: anyio.CancelScope, task: "asyncio.Task[Any]") -> None:
        self._scope, self._task = scope, task
        self._timer: asyncio.TimerHandle | None = None
        self._before = -1

    @property
    def deadline(self) -> float:
        return self._scope.deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self.close()
        if deadline != math.inf and not self.cancel_called:  # it passes once, also if its clock is stopped later
            self._timer = asyncio.get_running_loop().call_at(deadline, self._pass)
        self._scope.deadline = deadline + JUST_AFTER_S

    @property
    def cancel_called(self) -> bool:
        return self._scope.cancel_called

    def _pass(self) -> None:
        inner = _scopes_above(self._scope, _scope_of(self._task))  # they uncancel the task, or leave that to this one
        self._before = self._task.cancelling() - sum(getattr(each, "_pending_uncancellations", 0) for each in inner)
        self._scope.cancel()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @property
    def is_only_cause(self) -> bool:
        """Whether nothing else has cancelled the task since it has passed. The scope was left."""
        return self._task.cancelling() <= self._before


@contextlib.contextmanager
def move_on_after_working(seconds: float) -> Iterator[None]:
    """Leave the block after that many seconds inside it, without those in ``clocks_stopped``."""
    scope, task = anyio.CancelScope(), current_task()
    limit = None if task is None else _Limit(scope, task)
    reset = _CLOCKS.set((*_CLOCKS.get(), Clock(limit or scope)))
    try:
        with scope:
            (limit or scope).deadline = anyio.current_time() + seconds
            yield
    except asyncio.CancelledError:
        if limit is None or not limit.is_only_cause:
            raise
    finally:
        _CLOCKS.reset(reset)
        if limit is not None:
            limit.close()


@contextlib.contextmanager
def clocks_stopped(*others: Clock, counts: bool = False) -> Iterator[None]:
    """Stop the clocks of all enclosing ``move_on_after_working``, and *others*.

    Args:
        counts: the time in the block counts nevertheless, but no deadline passes in it.
    """
    clocks = (*_CLOCKS.get(), *others)
    for clock in clocks:
        clock.stop()
    try:
        yield
    finally:
        for clock in clocks:
            clock.start(has_counted=counts)


class closing_scopes:
    """Close the cancel scopes that the block has entered and not left, and cancel their task groups.

    An abandoned async generator leaves one open, or an ``AsyncExitStack`` that nobody closes. anyio then refuses to
    leave the scopes around it, which ends the engine. It has no public way to find them. On trio nothing is closed.
    """

    __slots__ = ("_agent_name", "_before", "_task")

    def __init__(self, agent_name: str) -> None:
        self._agent_name, self._task = agent_name, current_task()

    def __enter__(self) -> None:
        self._before = _scope_of(self._task)

    def __exit__(self, *exc_info: object) -> None:
        if self._before is not None and (left_open := _scopes_above(self._before, _scope_of(self._task))):
            logger.warning("agent %s left %d cancel scopes or task groups open", self._agent_name, len(left_open))
            for scope in left_open:
                scope.cancel()
                scope.__exit__(None, None, None)


def _scope_of(task: "asyncio.Task[Any] | None") -> Any:
    """Return the innermost scope of a task."""
    states = getattr(sys.modules.get("anyio._backends._asyncio"), "_task_states", {})
    return None if task is None else getattr(states.get(task), "cancel_scope", None)


def _scopes_above(before: Any, scope: Any) -> list[Any]:
    """Return the scopes from *scope* out to *before*, innermost first; none if *before* was left too."""
    found: list[Any] = []  # list[Any]() takes as long as the rest
    while scope is not None and scope is not before:
        found.append(scope)
        scope = getattr(scope, "_parent_scope", None)
    return found if scope is before else []

"""An event loop with virtual time, which executes tasks and threads in an order that a seed decides.

Time passes only when nothing is ready: then it jumps to the next timer. So a second takes microseconds, and a wait that
never ends is found at once.
"""

import asyncio
import contextlib
import contextvars
import gc
import itertools
import random
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from anyio._backends._asyncio import CancelScope, _task_states

from flock import fair
from flock.engine import relay
from flock.runs import ids
from flock.store import files
from flock.store.database import Database

__all__ = ["BEGIN", "Died", "Schedule", "Stuck", "Thread", "execute", "live"]

T = TypeVar("T")

#: By how much timers may be late, and a thread may take to start and to report its result, in seconds.
LATE_S = (0.0, 0.0, 0.001, 0.02, 0.3)
#: A program that has not ended after so many virtual seconds waits for something that never happens.
HORIZON_S = 60.0
#: Tasks that wake each other so many times, while no time passes, are busy waiting. Beside a thread they wait for that.
BUSY_STEPS, BUSY_STEPS_BESIDE_THREADS = 10_000, 2_000
#: When virtual time begins.
BEGIN = datetime.now(UTC)
#: No program needs as many iterations.
MAX_STEPS = 2_000_000
#: After so many iterations while no time has passed, each takes some time, in seconds.
QUICK_STEPS, STEP_S = 100, 1e-9


class Stuck(Exception):
    """A wait never ends. The text has what each task awaits."""


class Died(SystemExit):
    """The process has died, as by kill -9. A callback raises it: then nothing of the loop is executed any more."""


Base: Any = asyncio.BaseEventLoop  # whose private parts are used


class Schedule(Base):  # type: ignore[misc]
    """An event loop in which *seed* decides what asyncio leaves open. Seed 0 has the order of asyncio without delays.

    A task that is ready may be delayed until others that are ready have been executed, timers may be late, and a
    thread takes time to start and to report its result. Nothing else is reordered, because asyncio promises to call
    callbacks in the order in which they were registered, and libraries rely on it.

    Attributes:
        steps: the iterations so far.
        trace: when each iteration was, and what it has executed.
        threads: those whose function has not returned.
        is_busy: tasks have waited by waking each other.
    """

    _ready: deque[asyncio.Handle]

    def __init__(
        self,
        seed: int,
        *,
        begins_at: float = 0.0,
        horizon_s: float = HORIZON_S,
        is_traced: bool = True,
        has_late_timers: bool = True,
    ) -> None:
        super().__init__()
        self._late_s = LATE_S if seed and has_late_timers else LATE_S[:1]
        self._is_traced = is_traced
        self._seed, self._random, self._now, self._horizon = seed, random.Random(seed), begins_at, begins_at + horizon_s
        self._selector = self
        self._at: dict[int, Callable[[], object]] = {}
        self._steps_now, self.steps, self._max_steps = 0, 0, MAX_STEPS
        self.is_busy = False
        self.trace: list[str] = []
        self.threads: set[Thread] = set()
        numbers = itertools.count()
        self.set_task_factory(lambda loop, coro, **options: _Task(coro, next(numbers), loop=loop, **options))

    def time(self) -> float:
        return self._now

    def late_s(self) -> float:
        return self._random.choice(self._late_s)

    def at(self, step: int, callback: Callable[[], object]) -> None:
        """Call *callback* at the beginning of an iteration."""
        self._at[step] = callback

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        # That of a store does not sleep, and a real thread takes longer than all that it does.
        is_quick = any(getattr(each, "__func__", None) is Database._write for each in args)
        thread = Thread(self, lambda: func(*args), is_quick=is_quick)
        self.call_later(self.late_s(), thread.proceed)
        future: asyncio.Future[T] = thread.future
        return future

    def _run_once(self) -> None:
        self.steps += 1
        if (callback := self._at.pop(self.steps, None)) is not None:
            self._ready.appendleft(asyncio.Handle(callback, (), self))
        if self._seed:
            count = len(self._ready)
            delays = [self._random.random() * count if _task_of(each) else 0 for each in self._ready]
            places = sorted(range(count), key=lambda place: place + delays[place])
            self._ready = deque(self._ready[place] for place in places)
        if self._is_traced:
            self.trace.append(" ".join([f"{self._now:.3f}", *map(_name_of, self._ready)]))
        super()._run_once()

    # In place of a selector, since there are no files and sockets.

    def select(self, timeout: float | None) -> list[Any]:
        self._steps_now = 0 if timeout else self._steps_now + 1
        busy_steps = BUSY_STEPS_BESIDE_THREADS if self.threads else BUSY_STEPS
        if self._steps_now > busy_steps and self._scheduled:
            self.is_busy, self._steps_now, timeout = True, 0, max(0.0, self._scheduled[0].when() - self._now)
        if timeout:  # all timers are late, in their order
            self._now += timeout + self.late_s()
        elif self._steps_now > QUICK_STEPS:  # a wait whose end is nearer than a float can tell does not last for ever
            self._now += STEP_S
        if timeout is None or self._now > self._horizon or self.steps > self._max_steps:
            self._horizon, self._max_steps = self._now + HORIZON_S, self.steps + MAX_STEPS  # to close the loop
            raise Stuck("\n".join([f"No end after {self._now:g} s:", *sorted(map(_where, asyncio.all_tasks(self)))]))
        return []

    def _process_events(self, events: list[Any]) -> None: ...

    def _write_to_self(self) -> None: ...


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same each time."""

    def __init__(self, coro: Any, number: int, **options: Any) -> None:
        self.number = number
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


class Thread(threading.Thread):
    """Executes a function while the loop stands still. While the function sleeps, the loop continues."""

    def __init__(self, loop: Schedule, function: Callable[[], Any], *, is_quick: bool) -> None:
        super().__init__(daemon=True)
        self.loop, self.future, self._function, self._is_quick = loop, loop.create_future(), function, is_quick
        self._may_go, self._has_stopped = threading.Semaphore(0), threading.Semaphore(0)

    def proceed(self) -> None:
        """Let the function start or continue, until it sleeps or returns. Called in the loop."""
        if self in self.loop.threads:
            self._may_go.release()
        elif not self.future.cancelled():  # as in a pool
            self.loop.threads.add(self)
            self.run() if self._is_quick else self.start()
        else:
            return
        self._has_stopped.acquire()

    def run(self) -> None:
        report: Callable[[Any], None] = self.future.set_result
        try:
            result = self._function()
        except BaseException as exc:
            report, result = self.future.set_exception, exc
        self.loop.threads.discard(self)
        if not self.loop.is_closed():
            self.loop.call_later(self.loop.late_s(), self._report, report, result)
        self._has_stopped.release()

    def _report(self, report: Callable[[Any], None], result: Any) -> None:
        if not self.future.cancelled():
            report(result)

    def sleep(self, seconds: float) -> None:
        self.loop.call_later(seconds, self.proceed)
        self._stop()

    def wait_for(self, awaited: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine that the loop executes."""
        task: asyncio.Task[T] = self.loop.create_task(awaited)
        task.add_done_callback(lambda _: self.proceed())
        self._stop()
        return task.result()

    def _stop(self) -> None:
        """Let the loop continue until it calls ``proceed``."""
        self._has_stopped.release()
        self._may_go.acquire()
        if self.loop.is_closed():
            raise SystemExit


def execute(main: Callable[[Schedule], Coroutine[Any, Any, T]], seed: int) -> T:
    """Return the result of *main* in the order of *seed*. Raises Stuck if a wait never ends."""
    loop, state = Schedule(seed), random.getstate()
    random.seed(seed)
    gc.freeze()
    gc.disable()  # it would finalize objects at any moment
    try:
        with _virtual(loop), warnings.catch_warnings(record=True, action="always") as caught:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                result = runner.run(main(loop))
            gc.collect()
        assert not caught, str(caught[0].message)  # such as a coroutine that was never awaited
        return result
    finally:
        loop.close()
        for thread in list(loop.threads):
            thread.proceed()  # to its end
        gc.enable()
        gc.unfreeze()
        random.setstate(state)


def live(main: Coroutine[Any, Any, T], loop: Schedule) -> T:
    """Return the result of *main*, in a process of its own. Call it while the garbage collector is disabled.

    What is left of the process is never executed. Its garbage must be collected while no other loop is running.

    Raises: Died, Stuck.
    """
    locks = set(files._open_locks)
    try:
        with _virtual(loop):
            result: T = loop.run_until_complete(main)
            return result
    finally:
        for task in asyncio.all_tasks(loop):
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _task_states.pop(task, None)  # it would keep the task
        anyio.lowlevel._run_vars.pop(loop, None)
        loop.close()
        for thread in list(loop.threads):
            thread.proceed()  # to its end
        for lock in files._open_locks - locks:
            files.close_lock(lock)


@contextlib.contextmanager
def _virtual(loop: Schedule) -> Iterator[None]:
    """Let all clocks and threads be those of *loop*, and let sets have the same order each time."""
    real_sleep = time.sleep
    scopes = dict[int, tuple[int, Any]]()  # keeps them, so that no later one gets the same address

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return BEGIN + timedelta(seconds=loop.time())

    async def run_sync(
        function: Callable[..., T], *args: Any, abandon_on_cancel: bool = False, limiter: Any = None
    ) -> T:
        """Do what that of anyio does, whose threads cannot be replaced."""
        await anyio.lowlevel.checkpoint()
        async with limiter or anyio.to_thread.current_default_thread_limiter():
            with anyio.CancelScope(shield=not abandon_on_cancel):
                return await loop.run_in_executor(None, contextvars.copy_context().run, function, *args)
        raise AssertionError

    def sleep(seconds: float) -> None:
        thread = threading.current_thread()
        (thread.sleep if isinstance(thread, Thread) else real_sleep)(seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anyio.to_thread, "run_sync", run_sync)
        patch.setattr(time, "sleep", sleep)
        patch.setattr(ids, "datetime", Clock)
        patch.setattr(relay, "socket_path", lambda *of_engine: None)
        patch.setattr(fair, "time", SimpleNamespace(perf_counter=loop.time))
        patch.setattr(CancelScope, "__hash__", lambda scope: scopes.setdefault(id(scope), (len(scopes), scope))[0])
        yield


def _task_of(handle: asyncio.Handle) -> _Task | None:
    task = getattr(handle._callback, "__self__", None)  # type: ignore[attr-defined]
    return task if isinstance(task, _Task) else None


def _name_of(handle: asyncio.Handle) -> str:
    task = _task_of(handle)
    return str(getattr(handle._callback, "__name__", "?") if task is None else task.number)  # type: ignore[attr-defined]


def _where(task: Any) -> str:
    """Return the lines at which *task* waits, the innermost last."""
    lines = list[str]()
    awaited: Any = task.get_coro()
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            lines.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return f"  task {task.number}: {' → '.join(lines)}"

"""When an engine is open: while somebody's lifespan runs, or, where nobody runs one, from the first request on.

A server runs the lifespan of the app that it serves, and not those of apps that are mounted in it. So a host may
compose it in its own; where it does not, the engine is open up to the end of the event loop.

Several may hold one engine: it opens with the first of them, and closes with the last. Under asyncio it lives in a task
of its own, since whoever opened it may leave before the others do. Trio has no such tasks: there it lives within the
first one's lifespan, who waits for the others.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator

import anyio

from flock.errors import EngineStopped
from flock.runs import Engine

__all__ = ["EngineLifespan", "lifespan_of"]


class EngineLifespan:
    """The life of one engine, whoever asks for it; see ``lifespan_of``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._holders = 0
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._all_left = anyio.Event()
        #: set when the first one under trio has opened the engine, or has failed to
        self._opening: anyio.Event | None = None

    @contextlib.asynccontextmanager
    async def span(self) -> AsyncIterator[None]:
        """Hold the engine open. Raises what keeps it from opening."""
        engine = self._engine()
        assert engine is not None, "whoever asks has it"
        if (loop := _running_loop()) is not None:
            self._holders += 1  # before it is open: nobody who leaves meanwhile is the last one then
            try:
                await self._open()
                yield
            finally:
                self._holders -= 1
                if self._holders == 0 and self._task is not None and self._task.get_loop() is loop:
                    self._all_left.set()
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait([self._task])
                    if not self._task.cancelled():
                        self._task.result()  # raises what went wrong at its end
            return
        while self._opening is not None:  # of those who come at the same time only one is the first
            await self._opening.wait()
        is_first, self._holders = self._holders == 0, self._holders + 1
        if is_first:
            self._all_left, self._opening = anyio.Event(), anyio.Event()
            stack = contextlib.AsyncExitStack()
            try:
                await stack.enter_async_context(engine)
            except BaseException:
                self._holders -= 1
                raise
            finally:
                self._opening.set()
                self._opening = None
        try:
            yield
        finally:
            self._holders -= 1
            if self._holders == 0:
                self._all_left.set()
            if is_first:
                with anyio.CancelScope(shield=True):
                    await self._all_left.wait()
                await stack.aclose()

    async def open(self) -> None:
        """Open the engine, unless it is open, up to the end of the event loop.

        Raises: EngineStopped where that cannot be; StoreError where its store cannot be used.
        Cancellation: it is opened all the same.
        """
        if self._holders and (self._task is None or self._task.done()):  # under trio
            return
        if _running_loop() is None:
            raise EngineStopped(
                "The engine is not running, and under this event loop it cannot start by itself. Add to the host's "
                "lifespan: async with flock_app.lifespan(): yield"
            )
        await self._open()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        while self._task is not None and not self._task.done() and self._all_left.is_set():
            await asyncio.wait([self._task])  # it is closing; open it anew
        if self._task is None or self._task.done():
            self._all_left, self._opened = anyio.Event(), loop.create_future()
            self._task = loop.create_task(self._live(self._opened, self._all_left))
        elif self._task.get_loop() is not loop:
            raise EngineStopped(
                "This engine runs in another event loop, or in one that was closed under it. Give the app of each loop "
                "an engine of its own: create_app(flock, engine=flock.engine(store=...))"
            )
        assert self._opened is not None
        if not self._opened.done() or self._opened.exception() is not None:
            await asyncio.shield(self._opened)

    async def _live(self, opened: asyncio.Future[None], all_left: anyio.Event) -> None:
        """Up to the last one's leave, or the end of the loop, which cancels what is left in it."""
        engine = self._engine()
        assert engine is not None, "whoever asks has it"
        try:
            async with engine:
                if not opened.done():
                    opened.set_result(None)
                await all_left.wait()
        except Exception as exc:
            if opened.done():
                raise
            opened.set_exception(exc)
            opened.exception()  # it may be that nobody waits for it any more


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_lives: "weakref.WeakKeyDictionary[Engine, EngineLifespan]" = weakref.WeakKeyDictionary()


def lifespan_of(engine: Engine) -> EngineLifespan:
    """The one life of *engine*, however many apps are on it."""
    life = _lives.get(engine)
    return _lives.setdefault(engine, EngineLifespan(engine)) if life is None else life

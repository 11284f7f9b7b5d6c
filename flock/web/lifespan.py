"""The lifespan of an engine: it opens with an app's lifespan, or at the first request if no lifespan runs.

A request that arrives before an engine closes does not open it again, so that a server that has stopped leaves no
engine open. A later request opens it again, as if there had been no lifespan.

A server runs the lifespan of the app that it serves, but not those of apps mounted in it. So a host may enter a mounted
app's lifespan in its own. If it does not, the engine stays open until the event loop ends.

Several apps may share an engine. It opens with the first lifespan and closes with the last. Under asyncio the engine
runs in a task of its own, since the lifespan that opened it may end before the others. Trio has no background tasks, so
there the engine runs in the first lifespan, which waits for the others.
"""

import asyncio
import contextlib
import logging
import weakref
from collections.abc import AsyncIterator
from contextvars import Context

import anyio

from flock.errors import EngineStopped
from flock.runs import Engine
from flock.scopes import running_loop

logger = logging.getLogger("flock.api")


class EngineLifespan:
    """The lifespan of one engine, shared by all apps on it; see ``lifespan_of``.

    Attributes:
        ended: how often the last holder has exited.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._holders = self.ended = 0
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None
        self._all_released = anyio.Event()
        #: the event loop in which the engine is open; None if it is not, and under trio
        self._open_in: asyncio.AbstractEventLoop | None = None
        #: Under trio: set when the first holder has opened the engine, or has failed to.
        self._opening: anyio.Event | None = None

    @contextlib.asynccontextmanager
    async def span(self) -> AsyncIterator[None]:
        """Hold the engine open. Raises the engine's error if it cannot open."""
        engine = self._engine()
        assert engine is not None, "the caller holds a reference"
        if (loop := running_loop()) is not None:
            self._holders += 1  # first, so that a holder that exits while the engine opens is not the last one
            try:
                await self._open()
                yield
            finally:
                self._holders -= 1
                if self._holders == 0 and self._task is not None and self._task.get_loop() is loop:
                    self._release()
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait([self._task])
                    if not self._task.cancelled():
                        self._task.result()  # raises an error of the shutdown
            return
        while self._opening is not None:  # another holder is opening the engine
            await self._opening.wait()
        is_first, self._holders = self._holders == 0, self._holders + 1
        if is_first:
            self._all_released, self._opening = anyio.Event(), anyio.Event()
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
                self._release()
            if is_first:
                with anyio.CancelScope(shield=True):
                    await self._all_released.wait()
                await stack.aclose()

    def _release(self) -> None:
        """Let the engine close."""
        self.ended += 1
        self._all_released.set()

    async def open(self, ended: int | None = None) -> None:
        """Open the engine for a request if it is not open. It stays open until the event loop ends.

        Args:
            ended: the value of ``ended`` when the request arrived; None if that is not known.

        Raises:
            EngineStopped: it is closing, it has closed since the request arrived and no lifespan has opened it again,
                or it cannot open under this event loop.
            StoreError: its store cannot be used.

        Cancellation: the engine opens anyway.
        """
        is_open = self._open_in is not None and self._open_in is running_loop()
        if is_open and self._holders and not self._all_released.is_set():
            return  # as for nearly all requests
        is_closing = self._all_released.is_set() and self._task is not None and not self._task.done()
        if is_closing or (not self._holders and ended not in (None, self.ended)):
            raise EngineStopped("The server is shutting down. Try again when it has started.")
        if running_loop() is None:
            if self._holders:
                return
            raise EngineStopped(
                "The engine is not running, and it cannot start by itself under this event loop. Add to the host's "
                "lifespan: async with flock_app.lifespan(): yield"
            )
        await self._open()

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        while self._task is not None and not self._task.done() and self._all_released.is_set():
            await asyncio.wait([self._task])  # it is closing, so open a new one afterwards
        if self._task is None or self._task.done():
            self._all_released, self._opened = anyio.Event(), loop.create_future()
            # In an empty context: the engine outlives the request that opens it.
            self._task = loop.create_task(self._run(self._opened, self._all_released), context=Context())
        elif self._task.get_loop() is not loop:
            raise EngineStopped(
                "This engine runs in another event loop, or its event loop was closed while it ran. Use a separate "
                "engine for the app of each loop: create_app(flock, engine=flock.engine(store=...))"
            )
        assert self._opened is not None
        if not self._opened.done() or self._opened.exception() is not None:
            await asyncio.shield(self._opened)

    async def _run(self, opened: asyncio.Future[None], all_released: anyio.Event) -> None:
        """Run the engine until the last holder exits, or until the event loop ends and cancels this task."""
        engine = self._engine()
        assert engine is not None, "the caller holds a reference"
        try:
            async with engine:
                if not opened.done():
                    opened.set_result(None)
                self._open_in = opened.get_loop()
                try:
                    await all_released.wait()
                finally:
                    self._open_in = None
        except Exception as exc:
            if opened.done():
                if all_released.is_set():
                    raise
                logger.exception("The engine has ended because of an error. The next request opens it again.")
                return
            opened.set_exception(exc)
            opened.exception()  # marks it as retrieved, in case its waiter was cancelled


_lifespans: "weakref.WeakKeyDictionary[Engine, EngineLifespan]" = weakref.WeakKeyDictionary()


def lifespan_of(engine: Engine) -> EngineLifespan:
    """Return the lifespan of *engine*, which all apps on it share."""
    lifespan = _lifespans.get(engine)
    return _lifespans.setdefault(engine, EngineLifespan(engine)) if lifespan is None else lifespan

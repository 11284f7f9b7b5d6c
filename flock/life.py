"""When an engine is open: while somebody's lifespan runs, or, where nobody runs one, from the first request on.

A server runs the lifespan of the app that it serves, and not those of apps that are mounted in it. So a host may
compose it in its own; where it does not, the engine lives in a task of its own, up to the end of the event loop.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator

import anyio

from flock.errors import EngineStopped
from flock.runs import Engine

__all__ = ["Life", "life_of"]


class Life:
    """The life of one engine, whoever asks for it; see ``life_of``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._is_open = False
        self._has_ended = False
        self._task: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[None] | None = None

    @contextlib.asynccontextmanager
    async def span(self) -> AsyncIterator[None]:
        """Open the engine, and close it at the end. Where it is open already, whoever opened it closes it."""
        engine = self._engine()
        if self._is_open or engine is None:
            yield
            return
        async with engine:
            self._is_open = True
            try:
                yield
            finally:
                self._is_open, self._has_ended = False, True

    async def begin(self) -> None:
        """Open the engine in a task of its own, unless it is open, or was closed on purpose.

        Raises: EngineStopped where that cannot be; StoreError where its store cannot be used.
        Cancellation: it is opened all the same.
        """
        if self._is_open or self._has_ended:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise EngineStopped(
                "The engine is not running, and under this event loop it cannot start by itself. Add to the host's "
                "lifespan: async with flock_app.lifespan(): yield"
            ) from None
        if self._opened is None or self._task is None or self._task.done():
            self._opened = loop.create_future()
            self._task = loop.create_task(self._live(self._opened))
        await asyncio.shield(self._opened)

    async def _live(self, opened: asyncio.Future[None]) -> None:
        """Up to the end of the loop, which cancels what is left in it."""
        try:
            async with self.span():
                opened.set_result(None)
                await anyio.sleep_forever()
        except Exception as exc:
            if opened.done():
                raise
            opened.set_exception(exc)
        finally:
            self._has_ended = False  # another loop may begin it again


_lives: "weakref.WeakKeyDictionary[Engine, Life]" = weakref.WeakKeyDictionary()


def life_of(engine: Engine) -> Life:
    """The one life of *engine*, however many apps are on it."""
    return _lives.setdefault(engine, Life(engine))

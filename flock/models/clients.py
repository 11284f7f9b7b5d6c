"""The HTTP clients of calls, each of which has one connection."""

import contextlib
import functools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread

from flock.models import http
from flock.models.bodies import ENCODING

if TYPE_CHECKING:
    import httpx

#: For how long a connection is kept that no request uses, in seconds.
KEEP_IDLE_S = 5.0


class Clients:
    """As many HTTP clients as there are requests at once.

    In each request, httpx looks at all connections of its client, and for each idle one at all of them again. With one
    client for all, a request beside 300 idle connections would hold the event loop for 44 ms.

    Args:
        transport: replaces the network. Then one client has all requests.
        read_timeout_s: max seconds without data from a server.
    """

    def __init__(self, transport: "httpx.AsyncBaseTransport | None", read_timeout_s: float) -> None:
        self._transport, self._read_timeout_s = transport, read_timeout_s
        self._opening = anyio.Lock()
        self._new: Callable[[], httpx.AsyncClient] | None = None
        self._all: set[httpx.AsyncClient] = set()
        #: those that may be lent, the one that was used last at the end, and when that was
        self._free: deque[tuple[float, httpx.AsyncClient]] = deque()

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncGenerator["httpx.AsyncClient", None]:
        """Yield a client for one request. Those that were not used for ``KEEP_IDLE_S`` are closed before it is sent."""
        while self._free and self._free[0][0] < time.monotonic() - KEEP_IDLE_S:
            await self._close(self._free.popleft()[1])
        client = self._free.pop()[1] if self._free else await self._open()
        if self._transport is not None:
            self._free.append((math.inf, client))
            yield client
            return
        try:
            yield client
        finally:
            if client in self._all:  # otherwise it was closed meanwhile
                self._free.append((time.monotonic(), client))

    async def aclose(self) -> None:
        self._free.clear()
        while self._all:
            await self._close(next(iter(self._all)))

    async def _open(self) -> "httpx.AsyncClient":
        if self._new is None and self._transport is not None:
            self._new = self._factory()
        elif self._new is None:
            async with self._opening:
                if self._new is None:  # in a thread, since its imports would hold the event loop
                    self._new = await anyio.to_thread.run_sync(self._factory)
        client = self._new()
        self._all.add(client)
        return client

    async def _close(self, client: "httpx.AsyncClient") -> None:
        self._all.discard(client)
        await client.aclose()

    def _factory(self) -> Callable[[], "httpx.AsyncClient"]:
        library = http.library(self._transport)
        return functools.partial(
            library.AsyncClient,
            transport=self._transport,
            verify=library.create_ssl_context() if self._transport is None else True,  # once, since it takes 10 ms
            timeout=library.Timeout(self._read_timeout_s, connect=10, pool=None),
            headers={"Accept-Encoding": ENCODING},
        )

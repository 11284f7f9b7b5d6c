"""How the connections of a server are divided among its workers, which share a socket."""

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Callable, Collection, MutableSequence, Sequence

logger = logging.getLogger("flock.server")

#: The number of connections that are accepted in one iteration of the event loop.
ACCEPTS_PER_ITERATION = 16
#: The count of a worker that accepts none.
NOT_ACCEPTING = 2**31 - 1
#: How long a worker that has more connections than another one leaves the next one to it, in seconds.
YIELD_S = 0.001
#: How long to wait after an error, such as too many open files, in seconds.
RETRY_S = 1.0


class Acceptor:
    """Accepts the connections of one worker, so that each worker has about as many.

    Otherwise the first one that wakes up would accept all that a proxy opens at once, and answer their requests alone.
    It stands for a server of asyncio, of which uvicorn uses ``sockets``, ``close`` and ``wait_closed``.

    Args:
        listener: all workers share it.
        make_protocol: is called for each connection.
        connections: those of this worker that are open.
        counts: how many each worker has, or NOT_ACCEPTING, in memory that they share. Each writes only its own.
        number: that of this worker.
    """

    def __init__(
        self,
        listener: socket.socket,
        make_protocol: Callable[[], asyncio.Protocol],
        connections: Collection[object],
        counts: MutableSequence[int],
        number: int,
    ) -> None:
        self.sockets: Sequence[socket.socket] = (listener,)
        self._listener, self._make_protocol, self._connections = listener, make_protocol, connections
        self._counts, self._number = counts, number
        self._loop = asyncio.get_running_loop()
        self._connecting = set[asyncio.Task[object]]()
        self._pause: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self.note()
        self._loop.add_reader(listener, self._accept)

    def note(self) -> None:
        """Tell the other workers how many connections are open. Call it now and then, since they also close."""
        self._counts[self._number] = len(self._connections) + len(self._connecting)

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._counts[self._number] = NOT_ACCEPTING
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    async def wait_closed(self) -> None: ...

    @property
    def _has_more_than_others(self) -> bool:
        self.note()
        least = min(self._counts)
        return self._counts[self._number] > least + 1 + least // 8

    def _accept(self, *, is_due: bool = False) -> None:
        """Accept what waits. If another worker has fewer connections, leave it to that, unless it *is_due*."""
        for _ in range(ACCEPTS_PER_ITERATION):
            if self._has_more_than_others and not is_due:
                self._pause_for(YIELD_S)
                return
            is_due = False  # only the first one has waited
            try:
                connection, _address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                reason = os.strerror(exc.errno or 0)
                logger.error("No connection can be accepted: %s. It is tried again in %g s.", reason, RETRY_S)
                self._pause_for(RETRY_S)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._loop.connect_accepted_socket(self._make_protocol, connection))
            self._connecting.add(task)
            task.add_done_callback(functools.partial(self._connected, connection))

    def _connected(self, connection: socket.socket, task: asyncio.Task[object]) -> None:
        self._connecting.discard(task)
        if task.cancelled() or task.exception() is not None:  # the client has gone, or the loop ends
            connection.close()

    def _pause_for(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._pause = self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)
        self._accept(is_due=True)

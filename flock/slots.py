"""Places that runs and items of batches take in turn."""

from collections import deque

import anyio

__all__ = ["Slots"]


class Slots:
    """So many *places*, of which items of batches leave *reserved* to the runs that somebody may wait for.

    Runs are served first, in the order in which they came; then one item of each batch after the other, so that a long
    batch does not keep a short one waiting.
    """

    def __init__(self, places: int, *, reserved: int = 0) -> None:
        self._free = places
        self._free_for_items = places - reserved
        self._runs: deque[anyio.Event] = deque()
        self._items: dict[str, deque[anyio.Event]] = {}

    async def acquire(self, batch_id: str | None) -> None:
        """Take a place for a run, or for an item of a batch. Cancellation: none is taken."""
        # Whoever could be served has been, so nobody is overtaken.
        if self._free and (batch_id is None or self._free_for_items):
            self._take(batch_id)
            return
        queue, turn = self._runs if batch_id is None else self._items.setdefault(batch_id, deque()), anyio.Event()
        queue.append(turn)
        try:
            await turn.wait()
        except BaseException:
            if turn.is_set():
                self.release(batch_id)
            else:
                queue.remove(turn)
                if not queue and batch_id is not None:
                    del self._items[batch_id]
            raise

    def release(self, batch_id: str | None) -> None:
        """Give a place back that was taken for the same."""
        self._free += 1
        self._free_for_items += batch_id is not None
        while self._free and (self._runs or (self._items and self._free_for_items)):
            if self._runs:
                served, queue = None, self._runs
            else:
                served = next(iter(self._items))
                queue = self._items.pop(served)
            queue.popleft().set()
            self._take(served)
            if served is not None and queue:
                self._items[served] = queue  # behind the others

    def _take(self, batch_id: str | None) -> None:
        self._free -= 1
        self._free_for_items -= batch_id is not None

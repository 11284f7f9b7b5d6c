"""Fair slots for runs and for items of batches."""

from collections import deque
from collections.abc import Sequence

import anyio

__all__ = ["Slots", "acquire_all", "acquire_all_nowait"]


class Slots:
    """*count* slots. *reserved* of them are for runs that are not items, since clients may wait for those.

    Runs come first, in FIFO order. Then the batches get slots in round-robin order, so that a long batch does not delay
    a short one.
    """

    def __init__(self, count: int, *, reserved: int = 0) -> None:
        self._free = count
        self._free_for_items = count - reserved
        self._runs: deque[anyio.Event] = deque()
        self._items: dict[str, deque[anyio.Event]] = {}

    def acquire_nowait(self, batch_id: str | None) -> bool:
        """Acquire a slot for a run, or for an item of a batch, if one is free. Return whether it was acquired."""
        # ``release`` serves all waiters that it can, so this overtakes none of them.
        is_free = self._free > 0 and (batch_id is None or self._free_for_items > 0)
        if is_free:
            self._take(batch_id)
        return is_free

    async def acquire(self, batch_id: str | None) -> None:
        """Wait for a slot. Cancellation: no slot is acquired."""
        if self.acquire_nowait(batch_id):
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
        """Release a slot that was acquired with the same *batch_id*."""
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
                self._items[served] = queue  # after the others

    def _take(self, batch_id: str | None) -> None:
        self._free -= 1
        self._free_for_items -= batch_id is not None


def acquire_all_nowait(slots: Sequence[Slots], batch_id: str | None) -> bool:
    """Acquire one of each of *slots* if all of them have a free one. Return whether they were acquired."""
    for taken, slot in enumerate(slots):
        if not slot.acquire_nowait(batch_id):
            for other in slots[:taken]:
                other.release(batch_id)
            return False
    return True


async def acquire_all(slots: Sequence[Slots], batch_id: str | None) -> None:
    """Acquire one of each of *slots*. While waiting for one, hold none of the others, so that other runs can use them.

    Cancellation: no slot is acquired.
    """
    waits_for = 0
    while True:
        await slots[waits_for].acquire(batch_id)
        taken = [slots[waits_for]]
        for index, slot in enumerate(slots):
            if index == waits_for:
                continue
            if not slot.acquire_nowait(batch_id):
                waits_for = index
                break
            taken.append(slot)
        else:
            return
        for slot in taken:
            slot.release(batch_id)

"""Fair slots for runs and for items of batches."""

import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Sequence

import anyio

#: The principal and the id of the batch of an item; None for a run that is not an item.
BatchKey = tuple[str | None, str] | None


class Slots:
    """*count* slots. *reserved* of them are for runs that are not items, since clients may wait for those.

    Runs come first, in FIFO order. Then principals get slots in round-robin order, and so do the batches of one
    principal: neither a long batch nor many batches delay the short batch of another principal.
    """

    def __init__(self, count: int, *, reserved: int = 0) -> None:
        self._free = count
        self._free_for_items = count - reserved
        self._runs: deque[anyio.Event] = deque()
        #: the queued items, by principal and batch; the next ones come first
        self._items: dict[str | None, dict[str, deque[anyio.Event]]] = {}

    def acquire_nowait(self, batch: BatchKey) -> bool:
        """Acquire a slot for a run, or for an item of a batch, if one is free. Return whether it was acquired."""
        # ``release`` serves all waiters that it can, so this overtakes none of them.
        is_free = self._free > 0 and (batch is None or self._free_for_items > 0)
        if is_free:
            self._take(batch)
        return is_free

    async def acquire(self, batch: BatchKey) -> None:
        """Wait for a slot. Cancellation: no slot is acquired."""
        if self.acquire_nowait(batch):
            return
        slot_given = anyio.Event()
        queue = self._runs if batch is None else self._items.setdefault(batch[0], {}).setdefault(batch[1], deque())
        queue.append(slot_given)
        try:
            await slot_given.wait()
        except BaseException:
            if slot_given.is_set():
                self.release(batch)
            else:
                queue.remove(slot_given)
                if not queue and batch is not None:
                    del self._items[batch[0]][batch[1]]
                    if not self._items[batch[0]]:
                        del self._items[batch[0]]
            raise

    def release(self, batch: BatchKey) -> None:
        """Release a slot that was acquired for the same *batch*."""
        self._free += 1
        self._free_for_items += batch is not None
        while self._free and (self._runs or (self._items and self._free_for_items)):
            served, slot_given = (None, self._runs.popleft()) if self._runs else self._next_item()
            slot_given.set()
            self._take(served)

    def _next_item(self) -> tuple[BatchKey, anyio.Event]:
        """Remove the next item. Move its principal and its batch after the others."""
        principal, batches = next(iter(self._items.items()))
        batch_id, queue = next(iter(batches.items()))
        slot_given = queue.popleft()
        del self._items[principal], batches[batch_id]
        if queue:
            batches[batch_id] = queue
        if batches:
            self._items[principal] = batches
        return (principal, batch_id), slot_given

    def _take(self, batch: BatchKey) -> None:
        self._free -= 1
        self._free_for_items -= batch is not None


class AgentSlot:
    """A slot that a step holds while it works, and releases while it waits for an agent that it has called.

    So agents that call each other cannot wait for each other's slots. *slots* is None if there is no limit.
    """

    def __init__(self, slots: Slots | None, batch: BatchKey, *, is_held: bool = False) -> None:
        self._slots = slots
        self.batch = batch
        self._is_held = is_held
        self._is_over = False
        self._callees = 0

    async def acquire(self) -> None:
        """Wait for the slot, unless the step waits for an agent that it has called. Cancellation: it is not held."""
        if self._slots is None or not self._is_wanted:
            return
        await self._slots.acquire(self.batch)
        if self._is_wanted:
            self._is_held = True
        else:  # the step has ended or called another agent meanwhile, or this was called twice
            self._slots.release(self.batch)

    @property
    def _is_wanted(self) -> bool:
        return not (self._callees or self._is_held or self._is_over)

    def release(self) -> None:
        """Release the slot if it is held."""
        if self._slots is not None and self._is_held:
            self._is_held = False
            self._slots.release(self.batch)

    def close(self) -> None:
        """Release the slot for good, because the step has ended."""
        self._is_over = True
        self.release()

    @contextlib.asynccontextmanager
    async def waiting_for_callee(self) -> AsyncGenerator[None, None]:
        """Release the slot while one or more agents work for this step."""
        self.release()
        self._callees += 1
        try:
            yield
        finally:
            self._callees -= 1
            await self.acquire()


def acquire_all_nowait(slots: Sequence[Slots], batch: BatchKey) -> bool:
    """Acquire one of each of *slots* if all of them have a free one. Return whether they were acquired."""
    for index, slot in enumerate(slots):
        if not slot.acquire_nowait(batch):
            for acquired in slots[:index]:
                acquired.release(batch)
            return False
    return True


async def acquire_all(slots: Sequence[Slots], batch: BatchKey) -> None:
    """Acquire one of each of *slots*. While waiting for one, hold none of the others, so that other runs can use them.

    Cancellation: no slot is acquired.
    """
    first, *others = slots
    while True:
        await first.acquire(batch)
        if acquire_all_nowait(others, batch):
            return
        first.release(batch)
        first, *others = *others, first  # wait for another one

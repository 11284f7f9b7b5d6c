"""The order in which waiters get slots."""

import anyio
import pytest

from flock.steps.slots import BatchKey, Slots, acquire_all

pytestmark = pytest.mark.anyio

A, B, C = (None, "a"), (None, "b"), (None, "c")


async def served(slots: Slots, waiting: list[BatchKey], taken: list[BatchKey]) -> list[BatchKey]:
    """Return the order in which *waiting* get a slot while the slots of *taken* are released one by one."""
    order: list[BatchKey] = []

    async def wait(batch: BatchKey) -> None:
        await slots.acquire(batch)
        order.append(batch)
        slots.release(batch)

    for batch in taken:
        await slots.acquire(batch)
    async with anyio.create_task_group() as tasks:
        for batch in waiting:
            tasks.start_soon(wait, batch)
            await anyio.wait_all_tasks_blocked()
        for batch in taken:
            slots.release(batch)
    return order


async def test_runs_go_first_and_batches_take_turns() -> None:
    """A long batch blocks neither a run nor a short batch."""
    waiting: list[BatchKey] = [A, A, A, A, B, B, None, C, None]
    order = await served(Slots(1), waiting, taken=[None])
    assert order == [None, None, A, B, C, A, B, A, A]


async def test_many_batches_of_one_principal_do_not_delay_the_batch_of_another() -> None:
    first, second, third = (("ann", name) for name in ("a", "b", "c"))
    other = ("ben", "d")
    waiting: list[BatchKey] = [first, first, second, second, third, other, other]
    order = await served(Slots(1), waiting, taken=[None])
    assert order == [first, other, second, other, third, first, second]


async def test_items_leave_the_reserved_slots_to_runs() -> None:
    slots = Slots(3, reserved=1)
    for _ in range(2):
        await slots.acquire(A)
    with anyio.move_on_after(0) as scope:
        await slots.acquire(B)
    assert scope.cancelled_caught
    await slots.acquire(None)
    with anyio.move_on_after(0) as scope:
        await slots.acquire(None)
    assert scope.cancelled_caught
    slots.release(A)
    with anyio.fail_after(5):
        await slots.acquire(B)


@pytest.mark.parametrize("batch", [None, A])
async def test_a_cancelled_waiter_takes_no_slot(batch: BatchKey) -> None:
    """Even if it gets the slot in the same iteration of the loop in which it is cancelled."""
    slots = Slots(1)

    async def acquire_and_release() -> None:
        await slots.acquire(batch)
        slots.release(batch)

    for is_served in (False, True):
        await slots.acquire(None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(acquire_and_release)
            await anyio.wait_all_tasks_blocked()
            if is_served:
                slots.release(None)
            tasks.cancel_scope.cancel()
        if not is_served:
            slots.release(None)
        with anyio.fail_after(5):
            await acquire_and_release()


async def test_a_waiter_for_one_slot_holds_no_other() -> None:
    """An item that waits for a slot of the engine does not block its agent for a run, and vice versa."""
    engine, agent = Slots(2, reserved=1), Slots(1)
    await engine.acquire(C)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(acquire_all, [engine, agent], A)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(5):
            await acquire_all([engine, agent], None)
        engine.release(C)
        await anyio.wait_all_tasks_blocked()
        assert engine.acquire_nowait(B), "the item waits for its agent now, and holds no slot of the engine"
        engine.release(B)
        for each in (engine, agent):
            each.release(None)
        # The item has both slots now, so the group ends.
    assert not agent.acquire_nowait(None)

"""The order in which waiters get slots."""

import anyio
import pytest

from flock.engine.slots import Slots, acquire_all

pytestmark = pytest.mark.anyio


async def served(slots: Slots, waiting: list[str | None], taken: list[str | None]) -> list[str | None]:
    """Return the order in which *waiting* get a slot while the slots of *taken* are released one by one."""
    order: list[str | None] = []

    async def wait(batch_id: str | None) -> None:
        await slots.acquire(batch_id)
        order.append(batch_id)
        slots.release(batch_id)

    for batch_id in taken:
        await slots.acquire(batch_id)
    async with anyio.create_task_group() as tasks:
        for batch_id in waiting:
            tasks.start_soon(wait, batch_id)
            await anyio.wait_all_tasks_blocked()
        for batch_id in taken:
            slots.release(batch_id)
    return order


async def test_runs_go_first_and_batches_take_turns() -> None:
    """A long batch blocks neither a run nor a short batch."""
    waiting = ["a", "a", "a", "a", "b", "b", None, "c", None]
    order = await served(Slots(1), waiting, taken=[None])
    assert order == [None, None, "a", "b", "c", "a", "b", "a", "a"]


async def test_items_leave_the_reserved_slots_to_runs() -> None:
    slots = Slots(3, reserved=1)
    for _ in range(2):
        await slots.acquire("a")
    with anyio.move_on_after(0) as scope:
        await slots.acquire("b")
    assert scope.cancelled_caught
    await slots.acquire(None)
    with anyio.move_on_after(0) as scope:
        await slots.acquire(None)
    assert scope.cancelled_caught
    slots.release("a")
    with anyio.fail_after(5):
        await slots.acquire("b")


@pytest.mark.parametrize("batch_id", [None, "a"])
async def test_a_cancelled_waiter_takes_no_slot(batch_id: str | None) -> None:
    """Even if it gets the slot in the same iteration of the loop in which it is cancelled."""
    slots = Slots(1)

    async def acquire_and_release() -> None:
        await slots.acquire(batch_id)
        slots.release(batch_id)

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
    await engine.acquire("other")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(acquire_all, [engine, agent], "a")
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(5):
            await acquire_all([engine, agent], None)
        engine.release("other")
        await anyio.wait_all_tasks_blocked()
        assert engine.acquire_nowait("b"), "the item waits for its agent now, and holds no slot of the engine"
        engine.release("b")
        for each in (engine, agent):
            each.release(None)
        # The item has both slots now, so the group ends.
    assert not agent.acquire_nowait(None)

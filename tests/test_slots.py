"""Who is served next."""

import anyio
import pytest

from flock.engine.slots import Slots, acquire_all

pytestmark = pytest.mark.anyio


async def served(slots: Slots, waiting: list[str | None], taken: list[str | None]) -> list[str | None]:
    """In which order those are served that wait in this order, while *taken* is given back one by one."""
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
    """A long batch keeps neither a run nor a short batch waiting."""
    waiting = ["a", "a", "a", "a", "b", "b", None, "c", None]
    order = await served(Slots(1), waiting, taken=[None])
    assert order == [None, None, "a", "b", "c", "a", "b", "a", "a"]


async def test_items_leave_places_to_runs() -> None:
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
async def test_who_is_cancelled_while_it_waits_takes_no_place(batch_id: str | None) -> None:
    """Also when it was served in the same turn of the loop in which it is cancelled."""
    slots = Slots(1)

    async def take_and_give_back() -> None:
        await slots.acquire(batch_id)
        slots.release(batch_id)

    for is_served in (False, True):
        await slots.acquire(None)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(take_and_give_back)
            await anyio.wait_all_tasks_blocked()
            if is_served:
                slots.release(None)
            tasks.cancel_scope.cancel()
        if not is_served:
            slots.release(None)
        with anyio.fail_after(5):
            await take_and_give_back()


async def test_who_waits_for_one_place_holds_no_other() -> None:
    """An item that waits for the engine does not keep its agent from a run, nor the other way round."""
    engine, agent = Slots(2, reserved=1), Slots(1)
    await engine.acquire("other")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(acquire_all, [engine, agent], "a")
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(5):
            await acquire_all([engine, agent], None)
        engine.release("other")
        await anyio.wait_all_tasks_blocked()
        assert engine.acquire_nowait("b"), "the item waits for its agent now, and holds no place of the engine"
        engine.release("b")
        for each in (engine, agent):
            each.release(None)
        # The item has both now, and so the group ends.
    assert not agent.acquire_nowait(None)

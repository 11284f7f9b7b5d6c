"""Loops over client data share the event loop with everything else."""

import anyio
import anyio.lowlevel
import pytest

from flock import fair
from flock.engine.embedded import ITEMS_AT_ONCE
from flock.fair import SHARERS, FairShare
from flock.runs import BatchOptions
from tests.support.engines import counting_turns
from tests.support.flocks import Work, numbers

pytestmark = pytest.mark.anyio


async def test_only_a_few_loops_continue_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them continues as often as the others."""
    monkeypatch.setattr(fair, "SHARE_S", 0)
    steps, most = [0] * 40, 0

    async def loop(number: int) -> None:
        share = FairShare()
        while True:
            await share.checkpoint()
            steps[number] += 1

    async with anyio.create_task_group() as tasks:
        for number in range(len(steps)):
            tasks.start_soon(loop, number)
        for _ in range(10):  # each of them begins with a step
            await anyio.lowlevel.checkpoint()
        for _ in range(500):
            before = sum(steps)
            await anyio.lowlevel.checkpoint()
            most = max(most, sum(steps) - before)
        tasks.cancel_scope.cancel()
    assert most == SHARERS
    assert max(steps) - min(steps) <= 1
    assert min(steps) > 10


async def test_a_single_loop_does_not_wait() -> None:
    share = FairShare()
    async with counting_turns() as turns:
        await share.checkpoint()
    assert turns == [1]


async def test_a_page_of_items_is_read_in_pieces_between_which_others_have_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    work = Work()
    async with work.flock.engine() as engine:
        batch = await engine.submit_batch("item", numbers(3 * ITEMS_AT_ONCE), BatchOptions())
        await engine.wait_batch(batch.batch_id)
        async with counting_turns() as turns:
            page = await engine.get_items(batch.batch_id)
        assert [item.position for item in page] == list(range(3 * ITEMS_AT_ONCE))
        assert turns[0] >= 3
        assert len(await engine.get_items(batch.batch_id, after=9, limit=ITEMS_AT_ONCE + 1)) == ITEMS_AT_ONCE + 1


async def test_rows_that_are_left_out_do_not_hold_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    work = Work()
    for options in (BatchOptions(sample=20, parallel=False), BatchOptions(dedupe=True, parallel=False)):
        async with work.flock.engine() as engine:
            async with counting_turns() as turns:
                before = turns[0]
                batch = await engine.submit_batch("item", [{"n": 1}] * 2000, options)
                accepting = turns[0] - before
                await engine.wait_batch(batch.batch_id)
            assert turns[0] - before - accepting >= 1000

"""What every engine guarantees for batches, tested on each engine through the protocol only."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock
from flock.errors import (
    AgentError,
    BatchNotFound,
    Conflict,
    DefinitionError,
    EngineFull,
    InvalidData,
    KeyReused,
    Replayed,
    RunNotFound,
    TooLarge,
)
from flock.runs import BatchFilter, BatchOptions, Engine, Event, IdempotencyKey, Items, Row, RunStatus
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, all_items, ended, until
from tests.support.flocks import Work, numbers

pytestmark = pytest.mark.anyio

OPTIONS = BatchOptions()


async def listed(engine: Engine, count: int, **wanted: Any) -> None:
    """Wait until the list has *count* batches, because a cluster's search lags behind for a moment."""
    with anyio.fail_after(PATIENCE_S):
        while len(await engine.list_batches(BatchFilter(**wanted))) != count:  # noqa: ASYNC110 - there is no event for it
            await anyio.sleep(0.05)


# Submission


async def numbers_then_error(count: int) -> AsyncIterator[Any]:
    for item in numbers(count):
        yield item
    raise ConnectionError("gone")


async def test_a_batch_is_accepted_whole_or_not_at_all(open_engine: OpenEngine) -> None:
    work, refused = Work(), list[str]()
    cases: list[tuple[Any, type[Exception]]]
    async with open_engine(work.flock, max_items=150, max_input_bytes=1000) as engine:
        cases = [
            (numbers_then_error(110), ConnectionError),
            ([*numbers(110), {"n": "x"}], InvalidData),
            ([{"n": "x"}, *numbers(110)], InvalidData),
            (numbers(151), TooLarge),
            ([*numbers(110), {"n": "x" * 2000}], TooLarge),
            ([*numbers(110), {"n": object()}], InvalidData),
            ([], InvalidData),
        ]
        for items, error in cases:
            with pytest.raises(error) as raised:
                await engine.submit_batch("item", items, OPTIONS)
            refused.append(str(raised.value))
        assert await engine.list_batches(BatchFilter()) == []
    assert work.calls == []
    assert len(set(refused)) == 7


@pytest.mark.slow
async def test_a_batch_of_many_pages_is_accepted_and_completed_in_order(open_engine: OpenEngine) -> None:
    """Its items may be a list, an iterator or an async iterator."""
    work = Work()

    async def later() -> AsyncIterator[Any]:
        for item in numbers(701):
            yield item

    async with open_engine(work.flock) as engine:
        for count, items in ((701, numbers(701)), (21, iter(numbers(21))), (701, later())):
            batch = await ended(engine, await engine.submit_batch("item", items, OPTIONS))
            assert (batch.status, batch.total_items, batch.completed_items) == (RunStatus.COMPLETED, count, count)
            found = await all_items(engine, batch)
            assert [item.position for item in found] == list(range(count))
            assert [bytes(item.result) for item in found] == [b'{"result":%d}' % n for n in range(count)]


async def test_max_open_items_limits_the_items_of_all_batches_together(open_engine: OpenEngine) -> None:
    work = Work()
    work.holds = True
    async with open_engine(work.flock, max_open_items=5) as engine:
        first = await engine.submit_batch("item", numbers(3), OPTIONS)
        await listed(engine, 1)
        for key in (None, IdempotencyKey("k", b"1"), IdempotencyKey("k", b"1")):
            with pytest.raises(EngineFull, match="3 items of batches have not ended or are being uploaded, and 3 more"):
                await engine.submit_batch("item", numbers(3), OPTIONS, key=key)
        second = await engine.submit_batch("item", numbers(2), OPTIONS)
        work.may_go.set()
        for batch in (first, second):
            assert (await ended(engine, batch)).status is RunStatus.COMPLETED


async def test_a_batch_without_workers_is_refused(open_engine: OpenEngine) -> None:
    """It would wait forever."""
    async with open_engine(Work().flock) as engine:
        with pytest.raises(DefinitionError, match="max_workers must be at least 1, not 0"):
            await engine.submit_batch("item", numbers(1), BatchOptions(max_workers=0))


async def test_invalid_items_are_skipped_on_request(open_engine: OpenEngine) -> None:
    """They fail at once and permanently, so a retry does not run them."""
    work = Work()
    work.fails = {2}
    items: Items = [{"n": 0}, {"n": "x"}, {"n": 2}, {}, Row(inputs=msgspec.Raw(b'{"n":4}'), line=9)]
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", items, OPTIONS, on_invalid="skip")
        assert (batch.total_items, batch.completed_items, batch.failed_items) == (5, 2, 2)
        batch = await ended(engine, batch)
        assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 5, 3)
        found = await all_items(engine, batch)
        assert [item.error_type for item in found] == [None, "invalid_input", "agent_error", "invalid_input", None]
        assert found[1].error == "/batch_inputs/1/n: Expected 'int', got 'str'."
        work.fails = set()
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (batch.attempt, batch.completed_items, batch.failed_items) == (2, 5, 2)
        assert [item.attempt for item in await all_items(engine, batch)] == [1, 1, 2, 1, 1]
    assert sorted(work.calls) == [0, 2, 2, 4]


async def test_invalid_items_need_no_room_in_a_retry(open_engine: OpenEngine) -> None:
    """They are never executed again, so only the one that failed counts for ``max_open_items``."""
    work = Work()
    work.fails = {0}
    async with open_engine(work.flock, max_open_items=1) as engine:
        batch = await engine.submit_batch("item", [{"n": 0}, {}, {}, {}], OPTIONS, on_invalid="skip")
        await ended(engine, batch)
        await listed(engine, 1, status=RunStatus.FAILED)
        work.fails = set()
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, batch.attempt, batch.failed_items) == (RunStatus.COMPLETED, 2, 3)


async def test_a_retry_of_items_that_did_not_fail_is_an_error(open_engine: OpenEngine) -> None:
    async with open_engine(Work().flock) as engine:
        batch = await ended(engine, await engine.submit_batch("item", numbers(1), OPTIONS))
        with pytest.raises(DefinitionError, match="only= of a retry must be 'failed', 'cancelled', or both"):
            await engine.retry_batch(batch.batch_id, ["completed"])


async def test_a_batch_fails_if_all_its_items_are_skipped(open_engine: OpenEngine) -> None:
    async with open_engine(Work().flock) as engine:
        batch = await ended(engine, await engine.submit_batch("item", [{}, {}], OPTIONS, on_invalid="skip"))
        assert batch.status is RunStatus.FAILED
        assert batch.error == (
            "None of the 2 items completed. The first error: /batch_inputs/0/n: This field is required."
        )
        with pytest.raises(Conflict, match="no item that failed or was cancelled"):
            await engine.retry_batch(batch.batch_id)


async def test_equal_batches_with_the_same_key_are_one_batch(open_engine: OpenEngine) -> None:
    work, key = Work(), IdempotencyKey("k", b"1")
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(30), OPTIONS, key=key)
        with pytest.raises(Replayed) as caught:
            await engine.submit_batch("item", numbers(30), OPTIONS, key=key)
        assert caught.value.made_id == batch.batch_id
        with pytest.raises(KeyReused):
            await engine.submit_batch("item", numbers(30), OPTIONS, key=IdempotencyKey("k", b"2"))
        await ended(engine, batch)
        await engine.delete_batch(batch.batch_id)
        again = await engine.submit_batch("item", numbers(30), OPTIONS, key=key)
        assert again.batch_id != batch.batch_id, "the key of a deleted batch can be used again"
        await ended(engine, again)
    assert len(work.calls) == 60


async def test_the_error_of_a_failed_batch_is_that_of_its_last_attempt(open_engine: OpenEngine) -> None:
    flock, why = Flock(), "at first"

    @flock.agent
    async def item(n: int) -> int:
        raise AgentError(f"{n} {why}")

    async with open_engine(flock) as engine:
        batch = await ended(engine, await engine.submit_batch("item", numbers(2), OPTIONS))
        assert batch.error == "None of the 2 items completed. The first error: 0 at first"
        why = "later"
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert batch.error == "None of the 2 items completed. The first error: 0 later"


async def test_items_run_one_by_one_in_order_if_parallel_is_false(open_engine: OpenEngine) -> None:
    flock, running, order = Flock(), 0, list[int]()

    @flock.agent
    async def item(n: int) -> None:
        nonlocal running
        running += 1
        assert running == 1
        order.append(n)
        await anyio.lowlevel.checkpoint()
        running -= 1

    async with open_engine(flock) as engine:
        options = BatchOptions(parallel=False, max_workers=9)
        batch = await ended(engine, await engine.submit_batch("item", numbers(40), options))
        assert (batch.failed_items, order) == (0, list(range(40)))


async def test_as_many_items_run_at_once_as_there_are_workers(open_engine: OpenEngine) -> None:
    work = Work()
    work.holds = True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(70), BatchOptions(max_workers=13))
        await until(lambda: len(work.calls) == 13)
        await anyio.sleep(0.3)  # time for one more to start
        assert len(work.calls) == 13
        work.may_go.set()
        assert (await ended(engine, batch)).failed_items == 0
    assert sorted(work.calls) == list(range(70))


async def test_items_of_a_batch_have_no_queue_timeout(open_engine: OpenEngine) -> None:
    """``queue_timeout_s`` applies only to runs outside batches."""
    work = Work()
    work.holds = True
    async with open_engine(work.flock, max_concurrency=1, queue_timeout_s=0.05) as engine:
        batch = await engine.submit_batch("item", numbers(3), OPTIONS)
        await work.started.wait()
        run = await engine.submit("item", {"n": -1})
        assert (await engine.wait(run.run_id)).error_type == "queue_timeout"
        work.may_go.set()
        assert (await ended(engine, batch)).failed_items == 0


@pytest.mark.slow
async def test_a_cancelled_batch_starts_no_item_and_waits_for_running_ones(open_engine: OpenEngine) -> None:
    work = Work()
    work.holds = True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(1000), BatchOptions(max_workers=4))
        await until(lambda: len(work.calls) == 4)
        cancelling = await engine.cancel_batch(batch.batch_id)
        assert (cancelling.status, cancelling.cancel_requested) == (RunStatus.RUNNING, True)
        batch = await ended(engine, batch)
        assert (batch.status, batch.cancelled_items, batch.error) == (
            RunStatus.CANCELLED,
            1000,
            "The batch was cancelled.",
        )
        assert len(work.calls) == 4
        assert (await engine.cancel_batch(batch.batch_id)).status is RunStatus.CANCELLED
        items = await engine.get_items(batch.batch_id, limit=1000)
        assert {item.status for item in items} == {RunStatus.CANCELLED}
        assert {item.error for item in items} == {
            "The run was cancelled.",
            "The batch was cancelled before this item started.",
        }
        work.holds = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, [RunStatus.CANCELLED]))
        assert (batch.status, batch.attempt, batch.cancelled_items) == (RunStatus.COMPLETED, 2, 0)
        with pytest.raises(Conflict, match="completed and can no longer be cancelled"):
            await engine.cancel_batch(batch.batch_id)
        with pytest.raises(Conflict, match="no item that failed or was cancelled"):
            await engine.retry_batch(batch.batch_id)


async def test_ended_items_are_counted_while_a_cancellation_waits(open_engine: OpenEngine) -> None:
    flock, calls, may_go = Flock(), list[int](), anyio.Event()

    @flock.agent
    async def item(n: int) -> int:
        calls.append(n)
        if n == 0:
            with anyio.CancelScope(shield=True):
                await may_go.wait()
        elif n in (13, 19):
            await anyio.sleep_forever()
        return n

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("item", numbers(20), BatchOptions(max_workers=3))
        await until(lambda: {0, 13, 19} <= set(calls))
        done = 0
        with anyio.fail_after(PATIENCE_S):
            while done < len(calls) - 3:
                done = (await engine.get_batch(batch.batch_id)).completed_items
        await engine.cancel_batch(batch.batch_id)
        (last,) = await engine.get_items(batch.batch_id, after=18)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(last.run_id)).status is RunStatus.CANCELLED
        counts = []
        for _ in range(10):
            counts.append((await engine.get_batch(batch.batch_id)).completed_items)
            await anyio.sleep(0.05)
        may_go.set()
        batch = await ended(engine, batch)
        assert [done, *counts, 20] == sorted([done, *counts, 20])
        assert (batch.status, batch.completed_items) == (RunStatus.CANCELLED, 20)


@pytest.mark.slow
async def test_a_batch_can_be_retried_whenever_it_was_cancelled(open_engine: OpenEngine) -> None:
    """Its items may be in any state at that moment: being read, assigned, on their way to a worker, or running."""
    work = Work()
    async with open_engine(work.flock) as engine:
        for n in range(6):
            batch = await engine.submit_batch("item", numbers(200), BatchOptions(max_workers=40))
            await anyio.sleep(n / 40)
            with contextlib.suppress(Conflict):
                await engine.cancel_batch(batch.batch_id)
            batch = await ended(engine, batch)
            if batch.cancelled_items:
                batch = await ended(engine, await engine.retry_batch(batch.batch_id, [RunStatus.CANCELLED]))
            assert (batch.status, batch.completed_items, batch.cancelled_items) == (RunStatus.COMPLETED, 200, 0)
            assert {item.status for item in await all_items(engine, batch)} == {RunStatus.COMPLETED}


async def test_only_an_ended_batch_can_be_retried_or_deleted(open_engine: OpenEngine) -> None:
    work = Work()
    work.holds = True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(2), OPTIONS)
        await work.started.wait()
        with pytest.raises(Conflict, match=r"is running\. Only a batch that has ended"):
            await engine.retry_batch(batch.batch_id)
        with pytest.raises(Conflict, match="is still running"):
            await engine.delete_batch(batch.batch_id)
        work.may_go.set()
        await ended(engine, batch)
        (item, _) = await engine.get_items(batch.batch_id)
        await engine.delete_batch(batch.batch_id)
        for look in (engine.get_batch, engine.delete_batch, engine.retry_batch, engine.cancel_batch, engine.wait_batch):
            with pytest.raises(BatchNotFound):
                await look(batch.batch_id)
        with pytest.raises(RunNotFound):
            await engine.get_run(item.run_id)


async def test_a_retry_of_failed_items_does_not_run_cancelled_ones(open_engine: OpenEngine) -> None:
    work = Work()
    work.fails, work.holds = {0}, True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(5), BatchOptions(max_workers=2))
        await until(lambda: len(work.calls) == 2)
        (_, second, *_) = await engine.get_items(batch.batch_id)
        await engine.cancel_run(second.run_id)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(second.run_id)).status is RunStatus.CANCELLED
        work.may_go.set()
        batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items, batch.cancelled_items) == (RunStatus.COMPLETED, 1, 1)
        work.fails = set()
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, [RunStatus.FAILED]))
        assert (batch.failed_items, batch.cancelled_items) == (0, 1)
        with pytest.raises(Conflict, match="no item that failed"):
            await engine.retry_batch(batch.batch_id, [RunStatus.FAILED])


async def test_an_item_cancelled_before_its_batch_is_retried_with_it(open_engine: OpenEngine) -> None:
    work = Work()
    work.holds = True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", numbers(5), BatchOptions(max_workers=1))
        await work.started.wait()
        (*_, last) = await engine.get_items(batch.batch_id)
        await engine.cancel_run(last.run_id)
        await engine.cancel_batch(batch.batch_id)
        assert (await ended(engine, batch)).cancelled_items == 5
        work.holds = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (batch.completed_items, batch.cancelled_items) == (5, 0)


async def test_a_retry_resumes_after_the_last_committed_step(open_engine: OpenEngine) -> None:
    """The committed step is not executed again, and is still listed."""
    flock, calls, fails = Flock(), list[str](), True

    @flock.agent(next_agent="second")
    async def first(n: int) -> int:
        calls.append("first")
        return n

    @flock.agent
    async def second(n: int) -> int:
        calls.append("second")
        if fails:
            raise AgentError("not now")
        return n

    async with open_engine(flock) as engine:
        batch = await ended(engine, await engine.submit_batch("first", numbers(1), OPTIONS))
        fails = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        (item,) = await engine.get_items(batch.batch_id)
        steps = (await engine.get_run(item.run_id)).steps
    assert calls == ["first", "second", "second"]
    assert [(step.agent_name, step.attempt) for step in steps] == [("first", 1), ("second", 2)]


async def test_one_item_can_be_retried_after_its_batch_has_ended(open_engine: OpenEngine) -> None:
    """The retry is the next attempt of the batch, and the other items do not change."""
    work = Work()
    work.fails, work.holds = {0, 1}, True
    async with open_engine(work.flock) as engine:
        batch = await engine.submit_batch("item", [*numbers(3), {}], BatchOptions(max_workers=1), on_invalid="skip")
        await work.started.wait()
        first, _, _, invalid = await engine.get_items(batch.batch_id)
        work.holds = False
        with pytest.raises(Conflict, match="failed, and its batch is running"):
            await engine.retry_run(invalid.run_id)
        work.may_go.set()
        batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items) == (RunStatus.COMPLETED, 3)
        for item in (invalid, (await engine.get_items(batch.batch_id))[2]):
            with pytest.raises(Conflict, match="only if their inputs are valid"):
                await engine.retry_run(item.run_id)
        work.fails = set()
        assert (await engine.retry_run(first.run_id)).attempt == 2
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(first.run_id)).status is RunStatus.COMPLETED
        batch = await ended(engine, batch)
        assert (batch.attempt, batch.completed_items, batch.failed_items) == (2, 4, 2)
        assert work.calls == [0, 1, 2, 0]


async def test_batch_events_report_progress_and_then_the_end(open_engine: OpenEngine) -> None:
    flock, ends = Flock(), anyio.Semaphore(0)

    @flock.agent
    async def item(n: int) -> int:
        await ends.acquire()
        return n

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("item", numbers(4), BatchOptions(max_workers=1))
        received: list[Event] = []
        async with contextlib.aclosing(engine.batch_events(batch.batch_id)) as events:
            async for event in events:
                assert event is not None
                received.append(event)
                for _ in range(2 if len(received) == 1 else 1):
                    ends.release()
        done = [event.data["completed_items"] for event in received]
        assert done[:-1] == sorted(set(done[:-1])), "no count is reported twice before the end"
        assert (done[0], done[-1]) == (0, 4)
        assert [event.name for event in received] == ["batch.progress"] * (len(received) - 1) + ["batch.completed"]
        assert [event.id for event in received] == [None] * (len(received) - 1) + [1]
        assert received[1].data["eta_s"] > 0
        assert [event async for event in engine.batch_events(batch.batch_id, after=1)] == []


async def test_batches_are_listed_in_pages_newest_first(open_engine: OpenEngine) -> None:
    work = Work()

    @work.flock.agent
    async def other() -> int:
        return 1

    async with open_engine(work.flock) as engine:
        made = [await engine.submit_batch("item", numbers(1), OPTIONS, principal="ann") for _ in range(3)]
        made.append(await engine.submit_batch("other", [{}], OPTIONS))
        for batch in made:
            await ended(engine, batch)
        ids = [batch.batch_id for batch in reversed(made)]

        async def found(**wanted: Any) -> list[str]:
            return [batch.batch_id for batch in await engine.list_batches(BatchFilter(**wanted))]

        await listed(engine, len(ids), status=RunStatus.COMPLETED)
        assert await found() == ids
        assert await found(limit=2) == ids[:2]
        assert await found(after=ids[1]) == ids[2:]
        assert await found(agent_name="other") == ids[:1]
        assert await found(principal="ann") == ids[1:]
        assert await found(status=RunStatus.COMPLETED) == ids
        assert await found(status=RunStatus.FAILED) == []


async def test_batches_are_listed_by_status(open_engine: OpenEngine) -> None:
    """Also after a retry: a batch is listed once, with the status of its last attempt."""
    work = Work()
    fails = {"once": True}

    @work.flock.agent
    async def fail() -> int:
        if fails.pop("once", False):
            raise AgentError("no")
        return 1

    async with open_engine(work.flock) as engine:
        failed = await ended(engine, await engine.submit_batch("fail", [{}], OPTIONS))
        work.holds = True
        running = await engine.submit_batch("item", numbers(1), OPTIONS)
        await work.started.wait()
        await engine.cancel_batch(running.batch_id)
        cancelled = await ended(engine, running)
        assert (failed.status, cancelled.status) == (RunStatus.FAILED, RunStatus.CANCELLED)
        await listed(engine, 1, status=RunStatus.FAILED)
        await listed(engine, 1, status=RunStatus.CANCELLED)
        await engine.retry_batch(failed.batch_id)
        await ended(engine, failed)
        await listed(engine, 1, status=RunStatus.COMPLETED)
        await listed(engine, 0, status=RunStatus.FAILED)
        await listed(engine, 0, status=RunStatus.RUNNING)

"""The engine in this process: every run ends, in one way, and touches no other."""

import asyncio
import contextlib
import uuid
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock
from flock.errors import AgentError, BatchNotFound, EngineStopped, InvalidData, RunNotFound
from flock.runs import BatchOptions, Run, RunStatus, new_id

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")


async def finish(flock: Flock, agent_name: str, **options: Any) -> Run:
    async with flock.engine(**options) as engine:
        return await engine.wait_run((await engine.submit(agent_name, EMPTY)).run_id)


async def awaits_its_own_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def raises_system_exit() -> None:
    raise SystemExit(3)


def exits_in_a_thread() -> None:
    raise SystemExit(3)


async def raises_cancelled() -> None:
    raise asyncio.CancelledError


async def raises_in_a_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(raises_agent_error)


async def raises_agent_error() -> None:
    raise AgentError("told")


async def raises_a_group_of_two() -> None:
    raise BaseExceptionGroup("both", [ValueError("a"), SystemExit(1)])


async def cancels_itself_and_goes_on() -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    raise AgentError("told")


async def raises_generator_exit() -> None:
    raise GeneratorExit


async def raises_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def interrupts_in_a_thread() -> None:
    raise KeyboardInterrupt


async def raises_a_lone_surrogate() -> None:
    raise AgentError("told \ud800")


async def recurses() -> None:
    await recurses()


@pytest.mark.parametrize(
    ("function", "error_type", "words"),
    [
        (awaits_its_own_cancelled_task, "agent_exception", "raised CancelledError"),
        (raises_system_exit, "agent_exception", "raised SystemExit"),
        (exits_in_a_thread, "agent_exception", "raised SystemExit"),
        (raises_cancelled, "agent_exception", "raised CancelledError"),
        (raises_in_a_group, "agent_error", "told"),
        (raises_a_group_of_two, "agent_exception", "raised BaseExceptionGroup"),
        (recurses, "agent_exception", "raised RecursionError"),
        (cancels_itself_and_goes_on, "agent_error", "told"),
        (raises_generator_exit, "agent_exception", "raised GeneratorExit"),
        (raises_keyboard_interrupt, "agent_exception", "raised KeyboardInterrupt"),
        (interrupts_in_a_thread, "agent_exception", "raised KeyboardInterrupt"),
        (raises_a_lone_surrogate, "agent_error", "told ?"),
    ],
)
async def test_an_agent_that_misbehaves_fails_its_own_run_only(function: Any, error_type: str, words: str) -> None:
    flock = Flock()
    may_go, bystander_runs = anyio.Event(), anyio.Event()

    @flock.agent
    async def bystander() -> str:
        bystander_runs.set()
        await may_go.wait()
        return "well"

    flock.agent(name="bad")(function)
    async with flock.engine() as engine:
        other = await engine.submit("bystander", EMPTY)
        await bystander_runs.wait()
        run = await engine.wait_run((await engine.submit("bad", EMPTY)).run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, error_type)
        assert words in (run.error or "")
        assert run.completed_at
        may_go.set()
        assert (await engine.wait_run(other.run_id)).status is RunStatus.COMPLETED


async def test_a_cancellation_that_an_agent_leaves_behind_hits_nobody() -> None:
    """It asks for its own task to be cancelled and returns before it is: its run, its batch and its engine go on."""
    flock = Flock()

    @flock.agent
    async def leave_behind() -> int:
        task = asyncio.current_task()
        assert task
        task.cancel()
        return 1

    @flock.agent
    def after() -> int:
        return 2

    async with flock.engine() as engine:
        run = await engine.wait_run((await engine.submit("leave_behind", EMPTY)).run_id)
        batch = await engine.submit_batch("leave_behind", [EMPTY] * 5, BatchOptions(max_workers=2))
        items = [await engine.wait_run(item.run_id) for item in await engine.get_items(batch.batch_id)]
        later = await engine.wait_run((await engine.submit("after", EMPTY)).run_id)
    assert {each.status for each in (run, *items, later)} == {RunStatus.COMPLETED}
    assert (await engine.get_batch(batch.batch_id)).status is RunStatus.COMPLETED


async def test_a_final_run_keeps_its_result_and_not_what_led_to_it() -> None:
    flock = Flock()

    @flock.agent(next_agent="short")
    def long(text: str) -> str:
        return text * 2

    @flock.agent
    def short() -> int:
        return 1

    async with flock.engine() as engine:
        inputs = msgspec.Raw(msgspec.json.encode({"text": "x" * 10_000}))
        run = await engine.wait_run((await engine.submit("long", inputs)).run_id)
    assert len(msgspec.json.encode(run)) < 1500
    assert bytes(run.result or b"") == b'{"result":1}'


async def test_a_batch_that_can_never_fit_is_invalid_and_not_told_to_come_again() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(max_items=3) as engine:
        with pytest.raises(InvalidData, match="4 items are more than this server takes"):
            await engine.submit_batch("one", [EMPTY] * 4, BatchOptions())


async def test_leaving_the_engine_ends_what_is_at_work_and_tells_those_who_wait() -> None:
    flock, started = Flock(), anyio.Event()

    @flock.agent
    async def sleep() -> None:
        started.set()
        await anyio.sleep_forever()

    ended: list[Run] = []

    async def wait(run_id: str) -> None:
        ended.append(await engine.wait_run(run_id))

    async with anyio.create_task_group() as tasks:
        async with flock.engine(max_concurrency=1) as engine:
            running, waiting = [await engine.submit("sleep", EMPTY) for _ in range(2)]
            batch = await engine.submit_batch("sleep", [EMPTY] * 3, BatchOptions())
            await started.wait()
            tasks.start_soon(wait, running.run_id)
            tasks.start_soon(wait, waiting.run_id)
            await anyio.wait_all_tasks_blocked()
    assert [(run.status, run.error_type) for run in ended] == [(RunStatus.FAILED, "interrupted")] * 2
    batch = await engine.get_batch(batch.batch_id)
    assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.FAILED, 3, 3)
    with pytest.raises(EngineStopped, match="not running"):
        await engine.submit("sleep", EMPTY)
    with pytest.raises(EngineStopped):
        await engine.submit_batch("sleep", [EMPTY], BatchOptions())


async def test_a_cancellation_from_outside_ends_the_runs_too() -> None:
    """The host's own scope is cancelled around the engine: nothing hangs, and the run is final."""
    flock, started = Flock(), anyio.Event()

    @flock.agent
    async def sleep() -> None:
        started.set()
        await anyio.sleep_forever()

    with anyio.CancelScope() as scope:
        async with flock.engine() as engine:
            run = await engine.submit("sleep", EMPTY)
            await started.wait()
            scope.cancel()
            await anyio.sleep_forever()
    assert (await engine.get_run(run.run_id)).error_type == "interrupted"


async def test_an_engine_can_be_entered_again_and_not_twice() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    engine = flock.engine()
    for _ in range(2):
        async with engine:
            with pytest.raises(EngineStopped, match="running already"):
                await engine.__aenter__()
            run = await engine.wait_run((await engine.submit("one", EMPTY)).run_id)
            assert run.status is RunStatus.COMPLETED
    assert (await engine.get_run(run.run_id)).status is RunStatus.COMPLETED


async def test_max_concurrency_bounds_runs_and_items_together() -> None:
    flock, busy, most = Flock(), 0, 0

    @flock.agent
    async def work() -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        busy -= 1

    async with flock.engine(max_concurrency=4) as engine:
        runs = [await engine.submit("work", EMPTY) for _ in range(20)]
        batch = await engine.submit_batch("work", [EMPTY] * 20, BatchOptions(max_workers=20))
        for run in [*runs, *await engine.get_items(batch.batch_id)]:
            assert (await engine.wait_run(run.run_id)).status is RunStatus.COMPLETED
    assert most == 4


async def test_the_oldest_final_records_are_forgotten() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(keep_runs=3) as engine:
        runs = [await engine.wait_run((await engine.submit("one", EMPTY)).run_id) for _ in range(4)]
        with pytest.raises(RunNotFound):
            await engine.get_run(runs[0].run_id)
        assert await engine.get_run(runs[1].run_id)

        batches = []
        for size in (2, 5):
            batch = await engine.submit_batch("one", [EMPTY] * size, BatchOptions())
            items = await engine.get_items(batch.batch_id)
            for item in items:
                await engine.wait_run(item.run_id)
            await anyio.wait_all_tasks_blocked()
            batches.append((batch.batch_id, items))
        # The second one alone is more than is kept: the newest is never forgotten, and all else is.
        assert (await engine.get_batch(batches[1][0])).status is RunStatus.COMPLETED
        with pytest.raises(BatchNotFound):
            await engine.get_batch(batches[0][0])
        with pytest.raises(BatchNotFound):
            await engine.get_items(batches[0][0])
        for forgotten in [runs[3].run_id, batches[0][1][0].run_id]:
            with pytest.raises(RunNotFound):
                await engine.wait_run(forgotten)


async def test_who_waits_hears_of_a_run_that_is_forgotten_at_once() -> None:
    flock, may_go = Flock(), anyio.Event()

    @flock.agent
    async def wait() -> int:
        await may_go.wait()
        return 1

    heard: list[Run] = []

    async def listen(run_id: str) -> None:
        heard.append(await engine.wait_run(run_id))

    async with flock.engine(keep_runs=1) as engine, anyio.create_task_group() as tasks:
        for run in [await engine.submit("wait", EMPTY) for _ in range(5)]:
            tasks.start_soon(listen, run.run_id)
        await anyio.wait_all_tasks_blocked()
        may_go.set()
    assert [run.status for run in heard] == [RunStatus.COMPLETED] * 5


async def test_agents_added_later_are_found() -> None:
    flock = Flock()
    async with flock.engine() as engine:

        @flock.agent
        def late() -> int:
            return 1

        run = await engine.wait_run((await engine.submit("late", EMPTY)).run_id)
    assert run.status is RunStatus.COMPLETED


async def test_an_agent_is_named_where_it_failed_not_where_the_run_began() -> None:
    flock = Flock()

    @flock.agent(next_agent="second")
    def first() -> int:
        return 1

    @flock.agent
    def second() -> int:
        raise ValueError

    run = await finish(flock, "first")
    assert (run.error or "").startswith("The agent 'second' raised ValueError")
    assert len(run.steps) == 1, "what was finished stays readable"


def test_ids_are_uuids_of_version_7_in_order() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(uuid.UUID(id_).version, uuid.UUID(id_).variant) for id_ in ids} == {(7, uuid.RFC_4122)}

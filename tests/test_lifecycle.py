"""The life of a run by the engine: cancel, retry, delete, list, events, time-outs, keys, progress, two engines."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock
from flock.engine.embedded import WATCH_INTERVAL_S, EmbeddedEngine
from flock.errors import StoreError
from flock.runs import (
    Batch,
    BatchOptions,
    Event,
    Progress,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    Step,
)
from tests.support import PATIENCE_S
from tests.support.engines import until, until_run
from tests.support.flocks import Gate

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture(params=["disk", "memory"])
async def engine(request: pytest.FixtureRequest, gate: Gate, tmp_path: Path) -> AsyncIterator[EmbeddedEngine]:
    store = tmp_path / "flock.db" if request.param == "disk" else ":memory:"
    async with gate.flock.engine(store=store, max_concurrency=2) as made:
        yield made
        gate.thread_may_go.set()


async def submit(engine: EmbeddedEngine, agent_name: str, **more: Any) -> Run:
    return await engine.submit(agent_name, EMPTY, **more)


# Cancel


# Time


async def test_a_run_is_cancelled_between_its_steps(
    engine: EmbeddedEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its first step is being written: that step stays, and the second does not begin."""
    save, at_it, may_go_on = engine.store.save, anyio.Event(), anyio.Event()

    async def slow_save(run: Run, step: Step | None = None, *, is_new: bool = False) -> None:
        await save(run, step, is_new=is_new)
        if step is not None and not at_it.is_set():
            at_it.set()
            with anyio.CancelScope(shield=True):
                await may_go_on.wait()

    monkeypatch.setattr(engine.store, "save", slow_save)
    run = await submit(engine, "steady")
    await at_it.wait()
    await engine.cancel_run(run.run_id)
    may_go_on.set()
    run = await engine.wait(run.run_id)
    assert (run.status, [step.agent_name for step in run.steps]) == (RunStatus.CANCELLED, ["steady"])
    assert gate.calls == ["steady"]
    gate.fails = False
    await engine.retry_run(run.run_id)
    assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert gate.calls == ["steady", "shaky"], "and is not begun again"


# Retry, delete, list


# Events


async def test_progress_that_nobody_heard_of_does_not_undo_the_end(gate: Gate, tmp_path: Path) -> None:
    """The end waits for the disk, and the watch finds progress that is to be told."""
    disk_is_free = threading.Event()
    gate.may_go.set()
    async with gate.flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(engine.store.change, lambda db: disk_is_free.wait(20))
        await anyio.wait_all_tasks_blocked()
        run = await submit(engine, "report", is_async=False)
        await anyio.sleep(3 * WATCH_INTERVAL_S)
        disk_is_free.set()
        await engine.wait(run.run_id)
        run = await engine.get_run(run.run_id)  # as it is on disk
        assert (run.status, run.progress) == (RunStatus.COMPLETED, Progress(done=2, total=3, message="second"))


# Keys


# Batches


async def test_a_batch_outlives_a_store_that_fails_for_a_moment(
    engine: EmbeddedEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its items nor the engine end by it."""
    gate.fails = False
    read, failures = engine.batch_store.pending_items, [StoreError("now"), StoreError("and now")]

    def fail_first(batch: Batch, after: int, limit: int) -> list[Run]:
        if failures:
            raise failures.pop()
        return read(batch, after, limit)

    monkeypatch.setattr(engine.batch_store, "pending_items", fail_first)
    batch = await engine.submit_batch("steady", [EMPTY] * 3, BatchOptions())
    with anyio.fail_after(PATIENCE_S):
        while not (batch := await engine.get_batch(batch.batch_id)).status.is_final:  # noqa: ASYNC110 - as a client
            await anyio.sleep(0.01)
    assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 3, 0)
    assert gate.calls.count("steady") == 3


async def test_an_item_goes_on_after_its_last_step_at_the_next_start(tmp_path: Path) -> None:
    """A step that was committed is not executed again, in a batch as elsewhere."""
    flock, begun, calls, naps_s = Flock("items"), anyio.Event(), [], [0, 600]

    @flock.agent(next_agent="second")
    async def first() -> int:
        calls.append("first")
        return 1

    @flock.agent
    async def second(result: int) -> int:
        calls.append("second")
        begun.set()
        await anyio.sleep(naps_s.pop())
        return result + 1

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await engine.submit_batch("first", [EMPTY], BatchOptions())
        await begun.wait()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        (item,) = await engine.get_items(batch.batch_id)
        with anyio.fail_after(PATIENCE_S):
            item = await engine.wait(item.run_id)
    assert (item.status, item.attempt, bytes(item.result or b"")) == (RunStatus.COMPLETED, 2, b'{"result":2}')
    assert calls == ["first", "second", "second"]


async def test_a_caller_cancelled_while_its_run_is_accepted_leaves_no_orphan(engine: EmbeddedEngine) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await submit(engine, "steady")
    runs = await engine.list_runs(RunFilter())
    assert [(await engine.wait(run.run_id)).status for run in runs] == [RunStatus.FAILED] * len(runs)


async def test_a_run_whose_caller_was_cancelled_goes_on_once_it_is_accepted(engine: EmbeddedEngine, gate: Gate) -> None:
    """By asyncio's own means too, which no shield keeps out."""
    caller = asyncio.create_task(submit(engine, "steady"))
    await asyncio.sleep(0)  # it has said what is to be written
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled() is engine.store.is_shared, "in memory nothing is waited for"
    with anyio.fail_after(PATIENCE_S):
        while not (runs := await engine.list_runs(RunFilter())):  # noqa: ASYNC110 - as a client
            await anyio.sleep(0.01)
    assert [(await engine.wait(run.run_id)).status for run in runs] == [RunStatus.FAILED]
    assert gate.calls == ["steady", "shaky"]


# Two engines on one file


async def test_one_engine_cancels_waits_and_streams_what_another_runs(gate: Gate, tmp_path: Path) -> None:
    async with (
        gate.flock.engine(store=tmp_path / "flock.db") as here,
        gate.flock.engine(store=tmp_path / "flock.db") as there,
    ):
        run = await submit(here, "nap")
        await gate.begun.wait()
        await until_run(there, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        assert (await there.wait(run.run_id, timeout_s=0.05)).status is RunStatus.RUNNING
        await there.cancel_run(run.run_id)
        with anyio.fail_after(5):
            assert (await there.wait(run.run_id)).status is RunStatus.CANCELLED
        names = [event.name async for event in there.events(run.run_id) if event]
        assert names == ["run.started", "step.started", "run.cancelled"]


async def test_a_run_that_is_to_be_resumed_has_not_started_before_it_does(tmp_path: Path) -> None:
    """The event says when its new attempt started, and not when the interrupted one did."""
    flock, begun, may_go = Flock("resumed"), list[str](), anyio.Event()

    @flock.agent
    async def nap(context: RunContext) -> None:
        begun.append(context.run_id)
        await may_go.wait()

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        runs = [await submit(engine, "nap") for _ in range(2)]
        await until(lambda: len(begun) == 2)
    async with flock.engine(store=tmp_path / "flock.db", max_concurrency=1) as engine:
        await until(lambda: len(begun) == 3)
        (waiting,) = {run.run_id for run in runs} - {begun[2]}
        live: list[Event | None] = []

        async def follow() -> None:
            live.extend([event async for event in engine.events(waiting)])

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow)
                await anyio.wait_all_tasks_blocked()
                may_go.set()
        run = await engine.get_run(waiting)
        assert (run.attempt, run.status) == (2, RunStatus.COMPLETED)
        assert live == [event async for event in engine.events(waiting)]
        assert live[0]
        assert live[0].data["started_at"] == run.started_at


async def test_an_agent_may_ask_not_to_be_begun_again(gate: Gate, tmp_path: Path) -> None:
    begun = anyio.Event()

    @gate.flock.agent(on_interrupt="fail")
    async def once(context: RunContext) -> None:
        kept = opened.store.get_run(context.run_id)
        assert kept
        assert kept.started_at, "that it has begun is on disk before it begins"
        begun.set()
        await anyio.sleep_forever()

    async with gate.flock.engine(store=tmp_path / "flock.db") as opened:
        run = await submit(opened, "once")
        await begun.wait()
    async with gate.flock.engine(store=tmp_path / "flock.db") as again:
        run = await again.wait(run.run_id)
    assert (run.status, run.error_type) == (RunStatus.FAILED, "interrupted")
    assert "rules out an automatic retry" in (run.error or "")

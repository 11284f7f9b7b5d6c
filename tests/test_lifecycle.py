"""The life cycle of runs in the embedded engine: cancellation, progress, batches, two engines on one store."""

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
from tests.support.engines import sqlite_of, until, until_run
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


# Cancellation


async def test_a_run_cancelled_between_its_steps_keeps_its_finished_step(
    engine: EmbeddedEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel it while its first step is being written. The second step does not start."""
    save, is_saving, may_continue = engine.store.save, anyio.Event(), anyio.Event()

    async def slow_save(run: Run, step: Step | None = None, **options: bool) -> None:
        await save(run, step, **options)
        if step is not None and not is_saving.is_set():
            is_saving.set()
            with anyio.CancelScope(shield=True):
                await may_continue.wait()

    monkeypatch.setattr(engine.store, "save", slow_save)
    run = await submit(engine, "steady")
    await is_saving.wait()
    await engine.cancel_run(run.run_id)
    may_continue.set()
    run = await engine.wait(run.run_id)
    assert (run.status, [step.agent_name for step in run.steps]) == (RunStatus.CANCELLED, ["steady"])
    assert gate.calls == ["steady"]
    gate.fails = False
    await engine.retry_run(run.run_id)
    assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert gate.calls == ["steady", "shaky"], "the finished step is not repeated"


async def test_a_run_cancelled_while_its_step_is_written_keeps_the_step(gate: Gate, tmp_path: Path) -> None:
    disk_is_free = threading.Event()
    async with gate.flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(sqlite_of(engine).change, lambda db: disk_is_free.wait(PATIENCE_S))
        await anyio.wait_all_tasks_blocked()
        run = await submit(engine, "steady", is_async=False)
        await until(lambda: gate.calls == ["steady"])
        await engine.cancel_run(run.run_id)
        with anyio.move_on_after(0.2):
            await engine.wait(run.run_id)
            pytest.fail("the run ended before its step was on disk")
        disk_is_free.set()
        run = await engine.wait(run.run_id)
        assert (run.status, [step.agent_name for step in run.steps]) == (RunStatus.CANCELLED, ["steady"])
        assert await engine.get_run(run.run_id) == run, "the store has the same"
    assert gate.calls == ["steady"]


async def test_a_result_that_is_being_written_survives_the_cancellation_of_its_host(gate: Gate, tmp_path: Path) -> None:
    disk_is_free = threading.Event()
    gate.may_go.set()
    run: Run | None = None
    with anyio.CancelScope() as host:
        async with gate.flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
            tasks.start_soon(sqlite_of(engine).change, lambda db: disk_is_free.wait(PATIENCE_S))
            await anyio.wait_all_tasks_blocked()
            run = await submit(engine, "report", is_async=False)
            await until(lambda: bool(sqlite_of(engine)._open.runs))  # its final record waits for the disk
            asyncio.get_running_loop().call_later(0.2, disk_is_free.set)
            host.cancel()
            await anyio.sleep_forever()
    async with gate.flock.engine(store=tmp_path / "flock.db") as engine:
        assert run is not None
        assert (await engine.get_run(run.run_id)).status is RunStatus.COMPLETED


async def test_an_agent_that_cancels_its_task_too_late_has_no_effect(gate: Gate, tmp_path: Path) -> None:
    """Its run ends while the disk is slow. A watchdog that nobody has stopped cancels the task meanwhile."""
    disk_is_free, flock = threading.Event(), Flock("late")

    @flock.agent
    async def late() -> int:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_later(0.1, task.cancel)
        asyncio.get_running_loop().call_later(0.3, disk_is_free.set)
        return 1

    async with flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(sqlite_of(engine).change, lambda db: disk_is_free.wait(PATIENCE_S))
        await anyio.wait_all_tasks_blocked()
        run = await submit(engine, "late", is_async=False)
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        disk_is_free.set()
        again = await submit(engine, "late", is_async=False)
        assert (await engine.wait(again.run_id)).status is RunStatus.COMPLETED, "the engine is alive"


# Progress


async def test_unreported_progress_does_not_overwrite_the_final_status(gate: Gate, tmp_path: Path) -> None:
    """The final write waits for the disk while the watcher finds progress to report."""
    disk_is_free = threading.Event()
    gate.may_go.set()
    async with gate.flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(sqlite_of(engine).change, lambda db: disk_is_free.wait(20))
        await anyio.wait_all_tasks_blocked()
        run = await submit(engine, "report", is_async=False)
        await anyio.sleep(3 * WATCH_INTERVAL_S)
        disk_is_free.set()
        await engine.wait(run.run_id)
        run = await engine.get_run(run.run_id)  # as it is on disk
        assert (run.status, run.progress) == (RunStatus.COMPLETED, Progress(done=2, total=3, message="second"))


# Batches


async def test_a_batch_survives_a_transient_store_failure(
    engine: EmbeddedEngine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither its items nor the engine fail."""
    gate.fails = False
    read, failures = engine.store.batches.pending_items, [StoreError("now"), StoreError("and now")]

    async def fail_first(*args: Any, **options: Any) -> list[Run]:
        if failures:
            raise failures.pop()
        return await read(*args, **options)

    monkeypatch.setattr(engine.store.batches, "pending_items", fail_first)
    batch = await engine.submit_batch("steady", [EMPTY] * 3, BatchOptions())
    with anyio.fail_after(PATIENCE_S):
        while not (batch := await engine.get_batch(batch.batch_id)).status.is_final:  # noqa: ASYNC110 - as a client
            await anyio.sleep(0.01)
    assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 3, 0)
    assert gate.calls.count("steady") == 3


async def test_an_item_resumes_after_its_last_committed_step(tmp_path: Path) -> None:
    """A committed step is not executed again after a restart."""
    flock, second_started, calls, naps_s = Flock("items"), anyio.Event(), [], [0, 600]

    @flock.agent(next_agent="second")
    async def first() -> int:
        calls.append("first")
        return 1

    @flock.agent
    async def second(result: int) -> int:
        calls.append("second")
        second_started.set()
        await anyio.sleep(naps_s.pop())
        return result + 1

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await engine.submit_batch("first", [EMPTY], BatchOptions())
        await second_started.wait()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        (item,) = await engine.get_items(batch.batch_id)
        with anyio.fail_after(PATIENCE_S):
            item = await engine.wait(item.run_id)
    assert (item.status, item.attempt, bytes(item.result or b"")) == (RunStatus.COMPLETED, 2, b'{"result":2}')
    assert calls == ["first", "second", "second"]


async def test_cancelling_the_caller_during_submit_leaves_no_orphaned_run(engine: EmbeddedEngine) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await submit(engine, "steady")
    runs = await engine.list_runs(RunFilter())
    assert [(await engine.wait(run.run_id)).status for run in runs] == [RunStatus.FAILED] * len(runs)


async def test_an_accepted_run_continues_if_its_caller_is_cancelled(engine: EmbeddedEngine, gate: Gate) -> None:
    """``asyncio.Task.cancel`` also gets through a shielded scope."""
    caller = asyncio.create_task(submit(engine, "steady"))
    await asyncio.sleep(0)  # its write is queued
    caller.cancel()
    await asyncio.wait([caller])
    assert caller.cancelled() is engine.store.is_shared, "an in-memory store does not wait"
    with anyio.fail_after(PATIENCE_S):
        while not (runs := await engine.list_runs(RunFilter())):  # noqa: ASYNC110 - as a client
            await anyio.sleep(0.01)
    assert [(await engine.wait(run.run_id)).status for run in runs] == [RunStatus.FAILED]
    assert gate.calls == ["steady", "shaky"]


# Two engines on one file


async def test_one_engine_can_cancel_await_and_stream_a_run_of_another(gate: Gate, tmp_path: Path) -> None:
    async with (
        gate.flock.engine(store=tmp_path / "flock.db") as here,
        gate.flock.engine(store=tmp_path / "flock.db") as there,
    ):
        run = await submit(here, "nap")
        await gate.started.wait()
        await until_run(there, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        assert (await there.wait(run.run_id, timeout_s=0.05)).status is RunStatus.RUNNING
        await there.cancel_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            assert (await there.wait(run.run_id)).status is RunStatus.CANCELLED
        names = [event.name async for event in there.events(run.run_id) if event]
        assert names == ["run.started", "step.started", "run.cancelled"]


async def test_a_resumed_run_reports_the_start_time_of_its_new_attempt(tmp_path: Path) -> None:
    """Its start event does not have the time of the interrupted attempt."""
    flock, started, may_go = Flock("resumed"), list[str](), anyio.Event()

    @flock.agent
    async def nap(context: RunContext) -> None:
        started.append(context.run_id)
        await may_go.wait()

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        runs = [await submit(engine, "nap") for _ in range(2)]
        await until(lambda: len(started) == 2)
    async with flock.engine(store=tmp_path / "flock.db", max_concurrency=1) as engine:
        await until(lambda: len(started) == 3)
        (waiting,) = {run.run_id for run in runs} - {started[2]}
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


async def test_an_agent_with_on_interrupt_fail_is_not_restarted(gate: Gate, tmp_path: Path) -> None:
    started = anyio.Event()

    @gate.flock.agent(on_interrupt="fail")
    async def once(context: RunContext) -> None:
        stored = await opened.store.get_run(context.run_id)
        assert stored
        assert stored.started_at, "the start is on disk before the agent starts"
        started.set()
        await anyio.sleep_forever()

    async with gate.flock.engine(store=tmp_path / "flock.db") as opened:
        run = await submit(opened, "once")
        await started.wait()
    async with gate.flock.engine(store=tmp_path / "flock.db") as again:
        run = await again.wait(run.run_id)
    assert (run.status, run.error_type) == (RunStatus.FAILED, "interrupted")
    assert "rules out an automatic retry" in (run.error or "")

"""The embedded engine: every run ends in one way and does not affect others."""

import asyncio
import glob
import uuid
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from flock import fair
from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.engine.runner import Runner
from flock.errors import BatchNotFound, EngineStopped, RunNotFound, TooLarge
from flock.runs import Batch, BatchOptions, Run, RunStatus, new_id
from flock.scopes import closing_scopes
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import until
from tests.support.http import client_of, post_run

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")


async def batch_end(engine: EmbeddedEngine, batch_id: str) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        while not (batch := await engine.get_batch(batch_id)).status.is_final:  # noqa: ASYNC110 - no event for it
            await anyio.sleep(0.01)
    return batch


async def finish(flock: Flock, agent_name: str, **options: Any) -> Run:
    async with flock.engine(**options) as engine:
        return await engine.wait((await engine.submit(agent_name, EMPTY)).run_id)


async def test_a_pending_cancellation_of_an_agents_task_has_no_effect() -> None:
    """The agent cancels its own task and returns first. Its run, its batch and its engine continue."""
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
        run = await engine.wait((await engine.submit("leave_behind", EMPTY)).run_id)
        batch = await engine.submit_batch("leave_behind", [EMPTY] * 5, BatchOptions(max_workers=2))
        items = [await engine.wait(item.run_id) for item in await engine.get_items(batch.batch_id)]
        later = await engine.wait((await engine.submit("after", EMPTY)).run_id)
        assert {each.status for each in (run, *items, later)} == {RunStatus.COMPLETED}
        assert (await batch_end(engine, batch.batch_id)).status is RunStatus.COMPLETED


async def test_a_batch_that_can_never_fit_raises_too_large() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(max_items=3) as engine:
        with pytest.raises(TooLarge, match="more than 3 items"):
            await engine.submit_batch("one", [EMPTY] * 4, BatchOptions())


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
async def test_waiters_get_an_answer_when_the_engine_stops(on_disk: bool, is_async: bool, tmp_path: Path) -> None:
    """Waits for runs that resume at the next start raise EngineStopped. All other runs have failed as interrupted."""
    flock, started = Flock(), anyio.Event()

    @flock.agent
    async def sleep() -> None:
        started.set()
        await anyio.sleep_forever()

    outcomes: list[Run | EngineStopped] = []

    async def wait(run_id: str) -> None:
        try:
            outcomes.append(await engine.wait(run_id))
        except EngineStopped as exc:
            outcomes.append(exc)

    store = tmp_path / "flock.db" if on_disk else ":memory:"
    async with anyio.create_task_group() as tasks:
        async with flock.engine(max_concurrency=1, store=store) as engine:
            runs = [await engine.submit("sleep", EMPTY, is_async=is_async) for _ in range(2)]
            await engine.submit_batch("sleep", [EMPTY] * 3, BatchOptions())
            await started.wait()
            for run in runs:
                tasks.start_soon(wait, run.run_id)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
    assert len(outcomes) == 2
    for each in outcomes:
        if on_disk and is_async:
            assert isinstance(each, EngineStopped)
        else:
            assert isinstance(each, Run)
            assert (each.status, each.error_type) == (RunStatus.FAILED, "interrupted")
    with pytest.raises(EngineStopped, match="not running"):
        await engine.submit("sleep", EMPTY)
    with pytest.raises(EngineStopped):
        await engine.submit_batch("sleep", [EMPTY], BatchOptions())


async def test_runs_resume_after_the_host_was_cancelled(tmp_path: Path) -> None:
    """The host's scope around the engine is cancelled. Nothing hangs, and the runs are on disk."""
    flock, started, may_end = Flock(), anyio.Event(), anyio.Event()

    @flock.agent
    async def sleep() -> int:
        started.set()
        await may_end.wait()
        return 1

    with anyio.CancelScope() as scope:
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            run = await engine.submit("sleep", EMPTY)
            await started.wait()
            scope.cancel()
            await anyio.sleep_forever()
    may_end.set()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.wait(run.run_id)
    assert (run.status, run.attempt) == (RunStatus.COMPLETED, 2)


async def test_an_engine_that_is_cancelled_while_it_starts_leaves_no_lock_file(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await Flock().engine(store=tmp_path / "flock.db").__aenter__()
    assert scope.cancelled_caught
    assert not glob.glob(f"{tmp_path}/flock.db-engine-*")


async def test_an_engine_can_be_entered_again_but_not_twice(tmp_path: Path) -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    engine = flock.engine(store=tmp_path / "flock.db")
    async with engine:
        with pytest.raises(EngineStopped, match="already running"):
            await engine.__aenter__()
        run = await engine.wait((await engine.submit("one", EMPTY)).run_id)
    async with engine:
        assert (await engine.get_run(run.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait((await engine.submit("one", EMPTY)).run_id)).status is RunStatus.COMPLETED


async def test_max_concurrency_limits_runs_and_items_together() -> None:
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
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert most == 4


async def test_the_oldest_final_runs_are_deleted() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(keep_runs=3) as engine:
        runs = [await engine.wait((await engine.submit("one", EMPTY)).run_id) for _ in range(5)]
        await engine.delete_old()
        for run in runs[:2]:
            with pytest.raises(RunNotFound):
                await engine.get_run(run.run_id)
        for run in runs[2:]:
            assert await engine.get_run(run.run_id)

        # A batch counts as one run, however many items it has.
        batches = []
        for size in (2, 5, 5, 5, 5):
            batch = await engine.submit_batch("one", [EMPTY] * size, BatchOptions())
            batches.append(await batch_end(engine, batch.batch_id))
        await engine.delete_old()
        for batch in batches[2:]:
            assert len(await engine.get_items(batch.batch_id)) == 5
        for batch in batches[:2]:
            with pytest.raises(BatchNotFound):
                await engine.get_items(batch.batch_id)
        with pytest.raises(RunNotFound):
            await engine.get_run(runs[-1].run_id)


async def test_runs_are_deleted_by_age() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(keep_for_s=0.001) as engine:
        run = await engine.wait((await engine.submit("one", EMPTY)).run_id)
        await anyio.sleep(0.01)
        await engine.delete_old()
        with pytest.raises(RunNotFound):
            await engine.wait(run.run_id)


def test_ids_are_uuids_of_version_7_in_order() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(uuid.UUID(id_).version, uuid.UUID(id_).variant) for id_ in ids} == {(7, uuid.RFC_4122)}


@pytest.mark.parametrize("error", [ValueError("late"), SystemExit(3)])
async def test_exceptions_of_agents_do_not_leave_a_stopping_engine(error: BaseException, tmp_path: Path) -> None:
    """The engine stops cleanly, and the runs resume at the next start."""
    flock, begun, holds = Flock(), anyio.Semaphore(0), True

    @flock.agent
    async def item() -> int:
        if not holds:
            return 1
        begun.release()
        try:
            await anyio.sleep_forever()
        except BaseException:
            raise error from None
        return 0

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("item", EMPTY)
        batch = await engine.submit_batch("item", [EMPTY], BatchOptions())
        await begun.acquire()
        await begun.acquire()
    holds = False
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert (await batch_end(engine, batch.batch_id)).status is RunStatus.COMPLETED


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("no name")


async def test_an_exception_whose_name_cannot_be_read_fails_only_its_run() -> None:
    flock = Flock()

    @flock.agent
    async def bad() -> int:
        raise Nameless("Bad", (Exception,), {})  # type: ignore[misc]

    @flock.agent
    async def good() -> int:
        return 1

    async with flock.engine() as engine:
        bad_run, good_run = [await engine.submit(name, EMPTY) for name in ("bad", "good")]
        assert (await engine.wait(bad_run.run_id)).status is RunStatus.FAILED
        assert (await engine.wait(good_run.run_id)).status is RunStatus.COMPLETED


async def test_an_engine_that_has_ended_is_opened_by_the_next_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody has foreseen must not leave a server that responds with 503 until somebody restarts it."""
    flock = Flock()

    @flock.agent
    async def one() -> int:
        return 1

    async def defect() -> None:
        raise RuntimeError("unforeseen")

    app = create_app(flock, store=tmp_path / "flock.db", auth="host")
    assert isinstance(app.engine, EmbeddedEngine)
    async with app.lifespan(), client_of(app) as client:
        assert app.engine._tasks is not None
        app.engine._tasks.start_soon(defect)
        await until(lambda: "The engine has ended because of an error" in caplog.text)
        assert "unforeseen" in caplog.text
        assert (await client.get("/readyz")).status_code == 200
        assert (await post_run(client, "one")).json()["status"] == "completed"


def test_on_trio_an_agent_runs_as_it_is() -> None:
    """Also in a process that has used asyncio before."""

    async def use() -> str:
        with closing_scopes("agent"):
            await anyio.sleep(0.001)
            return "done"

    assert [anyio.run(use, backend=backend) for backend in ("asyncio", "trio")] == ["done", "done"]


async def test_other_tasks_run_while_many_runs_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    flock, turns, seen, start = Flock(), 0, list[int](), Runner.start

    @flock.agent
    async def nap() -> None:
        await anyio.sleep_forever()

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    def noting(runner: Runner, *args: Any) -> None:
        seen.append(turns)
        start(runner, *args)

    async with flock.engine(store=tmp_path / "flock.db", durability="process") as engine:
        for _ in range(100):
            await engine.submit("nap", {})
    monkeypatch.setattr(Runner, "start", noting)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        async with flock.engine(store=tmp_path / "flock.db"):
            assert len(seen) == 100
            assert len(set(seen)) > 50
        tasks.cancel_scope.cancel()

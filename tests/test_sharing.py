"""Several programs on one store: each runs its own agents, and warns about the work of others."""

import contextlib
import glob
import logging
import os
import re
import signal
import sqlite3
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from flock.command.target import load_flock
from flock.core import Flock, FlockFactory
from flock.engine import base
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict, EngineFull, RunNotFound
from flock.runs import BatchFilter, BatchOptions, RunFilter, RunStatus
from flock.store import files, queries
from tests.support import PATIENCE_S
from tests.support.engines import sqlite_of, until
from tests.support.servers import flockapi_command, running

pytestmark = pytest.mark.anyio

STORE = "flock.db"


class Program:
    """A flock with the given agents. ``first`` hands off to ``second``, and all but ``first`` wait for ``may_go``."""

    def __init__(self, *agents: str, name: str = "flock") -> None:
        self.flock, self.calls = Flock(name), list[str]()
        self.started, self.may_go = anyio.Event(), anyio.Event()
        for agent_name in agents:
            self.add(agent_name)

    def add(self, agent_name: str) -> None:
        @self.flock.agent(name=agent_name, next_agent="second" if agent_name == "first" else None)
        async def work() -> str:
            self.calls.append(agent_name)
            self.started.set()
            if agent_name != "first":
                await self.may_go.wait()
            return agent_name

    def engine(self, **options: Any) -> EmbeddedEngine:
        return self.flock.engine(store=STORE, **options)


async def leave_unfinished(program: Program, *agents: str, batches: bool = False) -> list[str]:
    """Return the ids of runs or batches that were running when their engine stopped."""
    async with program.engine() as engine:
        if batches:
            ids = [(await engine.submit_batch(name, [{}] * 3, BatchOptions())).batch_id for name in agents]
        else:
            ids = [(await engine.submit(name, {})).run_id for name in agents]
        await until(lambda: len(set(program.calls)) >= len(set(agents)))
    return ids


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


async def status_of(engine: EmbeddedEngine, id_: str, *, is_batch: bool) -> RunStatus:
    return (await engine.get_batch(id_) if is_batch else await engine.get_run(id_)).status


@pytest.mark.parametrize("batches", [False, True], ids=["runs", "batches"])
async def test_unfinished_work_waits_for_a_program_with_its_agent(
    batches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A program without the agent resumes the other work, warns about the waiting work and lists it."""
    both, other, same = Program("ours", "theirs"), Program("theirs"), Program("ours")
    ours, theirs = await leave_unfinished(both, "ours", "theirs", batches=batches)
    other.may_go.set()
    same.may_go.set()
    async with other.engine() as engine:
        wait = engine.wait_batch if batches else engine.wait
        assert (await wait(theirs, timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED
        assert not (await wait(ours, timeout_s=1.5)).status.is_final, "the engine looks for abandoned work every second"
        listed = await (engine.list_batches(BatchFilter()) if batches else engine.list_runs(RunFilter()))
        assert len(listed) == 2
    assert set(other.calls) == {"theirs"}
    waiting = [line for line in warnings_of(caplog) if "does not have: ours (1)" in line]
    assert len(waiting) == 1
    async with same.engine() as engine:
        wait = engine.wait_batch if batches else engine.wait
        assert (await wait(ours, timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED
    assert set(same.calls) == {"ours"}
    assert not glob.glob(f"{STORE}-engine-*"), "no lock of a stopped engine is left"


async def test_the_lock_file_of_an_engine_that_died_before_it_was_registered_is_removed() -> None:
    """No table has it, so no engine takes over from it. A locked one belongs to an engine that is starting."""
    async with Program().engine():
        pass
    files.close_lock(files.acquire_lock(f"{STORE}-engine-dead", 0o600))
    starting = files.acquire_lock(f"{STORE}-engine-starting", 0o600)
    async with Program().engine() as engine:
        locks = {name.rpartition("-engine-")[2] for name in glob.glob(f"{STORE}-engine-*")}
        assert locks == {"starting", engine._engine_id}
    files.close_lock(starting)


async def test_a_handed_off_run_waits_for_its_next_agent() -> None:
    whole = Program("first", "second")
    async with whole.engine() as engine:
        run_id = (await engine.submit("first", {})).run_id
        await whole.started.wait()
    async with Program("first").engine() as engine:
        assert not (await engine.wait(run_id, timeout_s=0.2)).status.is_final
    second = Program("second")
    second.may_go.set()
    async with second.engine() as engine:
        run = await engine.wait(run_id, timeout_s=PATIENCE_S)
        assert (run.status, [step.agent_name for step in run.steps]) == (RunStatus.COMPLETED, ["first", "second"])


async def test_an_agent_that_is_added_later_resumes_the_runs_that_wait_for_it() -> None:
    (run_id,) = await leave_unfinished(Program("ours"), "ours")
    program = Program("other")
    program.may_go.set()
    async with program.engine() as engine:
        assert not (await engine.wait(run_id, timeout_s=0.2)).status.is_final
        program.add("ours")
        assert (await engine.wait(run_id, timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED


@pytest.mark.parametrize("batches", [False, True], ids=["runs", "batches"])
async def test_work_whose_agent_is_missing_can_be_cancelled_and_deleted(batches: bool) -> None:
    kept, gone = await leave_unfinished(Program("ours"), "ours", "ours", batches=batches)
    async with Program("other").engine() as engine:
        cancel: Callable[[str], Awaitable[Any]] = engine.cancel_batch if batches else engine.cancel_run
        delete: Callable[[str], Awaitable[Any]] = engine.delete_batch if batches else engine.delete_run
        wait = engine.wait_batch if batches else engine.wait
        with pytest.raises(Conflict, match="Cancel it first"):
            await delete(gone)
        await cancel(gone)
        assert (await wait(gone, timeout_s=PATIENCE_S)).status is RunStatus.CANCELLED
        await delete(gone)
        assert not (await wait(kept, timeout_s=0)).status.is_final
    ours = Program("ours")
    ours.may_go.set()
    async with ours.engine() as engine:
        wait = engine.wait_batch if batches else engine.wait
        assert (await wait(kept, timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED


@pytest.mark.parametrize("batches", [False, True], ids=["runs", "batches"])
async def test_work_of_a_dead_engine_ends_even_if_the_request_to_cancel_it_is_cancelled(batches: bool) -> None:
    """The engine is its owner from the commit on, which a cancelled request does not wait for."""
    (id_,) = await leave_unfinished(Program("ours"), "ours", batches=batches)
    is_blocked, may_write = anyio.Event(), threading.Event()
    async with Program("other").engine() as engine, anyio.create_task_group() as tasks:
        take_over = engine.store.take_over

        async def blocked(*args: Any, **options: Any) -> Any:
            tasks.start_soon(sqlite_of(engine).change, lambda db: may_write.wait(PATIENCE_S))
            await anyio.wait_all_tasks_blocked()
            is_blocked.set()
            return await take_over(*args, **options)

        engine.store.take_over = blocked  # type: ignore[method-assign]
        with anyio.CancelScope() as request:
            tasks.start_soon(cancel_when, is_blocked, request)
            await (engine.cancel_batch(id_) if batches else engine.cancel_run(id_))
        assert request.cancelled_caught
        may_write.set()
        wait = engine.wait_batch if batches else engine.wait
        assert (await wait(id_, timeout_s=PATIENCE_S)).status is RunStatus.CANCELLED


async def cancel_when(event: anyio.Event, scope: anyio.CancelScope) -> None:
    await event.wait()
    await anyio.sleep(0.2)  # for the read in a thread, after which the takeover waits for the disk
    scope.cancel()


async def test_work_whose_agent_is_missing_does_not_count_toward_the_limits() -> None:
    """Otherwise one program would stay full until another one comes back."""
    await leave_unfinished(Program("ours"), "ours", "ours", "ours")
    await leave_unfinished(Program("ours"), "ours", batches=True)
    other = Program("other")
    async with other.engine(max_queue=1, max_open_items=3, max_concurrency=1) as engine:
        assert (await engine.queue()).depth == 0
        await engine.submit("other", {})
        await other.started.wait()
        await engine.submit("other", {})
        with pytest.raises(EngineFull, match="1 runs are already queued"):
            await engine.submit("other", {})
        assert (await engine.queue()).depth == 1
        await engine.submit_batch("other", [{}] * 3, BatchOptions())
        with pytest.raises(EngineFull, match="max_open_items"):
            await engine.submit_batch("other", [{}], BatchOptions())


@pytest.mark.parametrize("batches", [False, True], ids=["runs", "batches"])
async def test_only_a_program_with_the_agent_can_retry(batches: bool) -> None:
    ours = Program("ours")
    async with ours.engine() as engine:
        id_ = (await engine.submit_batch("ours", [{}], BatchOptions())).batch_id if batches else ""
        id_ = id_ or (await engine.submit("ours", {})).run_id
        await ours.started.wait()
        await (engine.cancel_batch(id_) if batches else engine.cancel_run(id_))
        await (engine.wait_batch(id_) if batches else engine.wait(id_))
    async with Program("other").engine() as engine:
        with pytest.raises(Conflict, match="does not have the required agent 'ours'"):
            await (engine.retry_batch(id_) if batches else engine.retry_run(id_))
        assert await status_of(engine, id_, is_batch=batches) is RunStatus.CANCELLED


@pytest.mark.parametrize(
    ("before", "now", "missing"),
    [
        pytest.param(["one"], ["two"], "one", id="others"),
        pytest.param(["one", "two", "three"], ["two"], "one, three", id="more"),
        pytest.param(["one"], ["one", "two"], None, id="fewer"),
        pytest.param(["one"], ["one"], None, id="the same"),
        pytest.param([], ["one"], None, id="none"),
    ],
)
async def test_startup_warns_if_a_flock_of_the_same_name_had_other_agents(
    before: list[str], now: list[str], missing: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """An additional agent is not a reason to warn."""
    async with Program(*before).engine(), Program(*before, name="another").engine():
        pass
    assert warnings_of(caplog) == []
    async with Program(*now).engine():
        pass
    expected = (
        f"last used by a flock with the same name, 'flock', and with agents that this one does not have: {missing}."
    )
    assert [expected in line for line in warnings_of(caplog)] == ([] if missing is None else [True])


async def test_startup_warns_once_if_an_agent_has_another_signature(caplog: pytest.LogCaptureFixture) -> None:
    """The warning shows both. A description is not part of a signature, and both workers of one program are silent."""

    def started(input_: str, description: str = "") -> EmbeddedEngine:
        flock, input_ = Flock(), f"{input_} | {description}"
        flock.add_agent(FlockFactory.create_default_agent("mood", input=input_, output="mood: str"))
        return flock.engine(store=STORE)

    async with started("text: str"), started("text: str", "what to read"):
        assert warnings_of(caplog) == []
    async with started("text: int"), started("text: int"):
        (warning,) = warnings_of(caplog)
    assert re.search(r"other signatures: mood was text -> mood \((\w{8})\) and is text -> mood \((?!\1)", warning)


async def test_an_older_version_has_stored_only_the_names_of_agents(caplog: pytest.LogCaptureFixture) -> None:
    async with Program("ours").engine() as engine:
        await sqlite_of(engine).change(
            lambda db: db.execute("""UPDATE flocks SET agents = '["gone", "ours"]'""") and None
        )
    async with Program("ours").engine():
        pass
    (warning,) = warnings_of(caplog)
    assert "the same name, 'flock', and with agents that this one does not have: gone. If" in warning


def test_two_flocks_of_one_file_are_two_programs(tmp_path: Path) -> None:
    (tmp_path / "two_flocks.py").write_text("from flock.core import Flock\nlive, staging = Flock(), Flock()\n")
    paths = [load_flock(f"two_flocks.py:{name}").program_path for name in ("live", "staging")]
    assert paths == [f"{tmp_path}/two_flocks.py:{name}" for name in ("live", "staging")]


@pytest.mark.parametrize("batches", [False, True], ids=["runs", "batches"])
async def test_startup_warns_about_unfinished_runs_of_other_flocks(
    batches: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No other flock runs them or sees them."""
    (id_,) = await leave_unfinished(Program("ours", name="left"), "ours", batches=batches)
    async with Program("ours", name="left").engine():
        assert warnings_of(caplog) == []
    async with Program("ours", name="mine").engine() as engine:
        assert await engine.list_runs(RunFilter()) == []
        with pytest.raises(RunNotFound):
            await engine.get_run(id_)
    (warning,) = warnings_of(caplog)
    assert (
        "has 1 unfinished runs and batches of the flock 'left'. This flock, 'mine', does not execute them." in warning
    )


# Damaged records


async def test_an_unreadable_run_fails_at_the_next_start_and_does_not_block_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lists include it and the others."""
    ids = await leave_unfinished(Program("ours"), *["ours"] * 4)
    batch_ids = await leave_unfinished(Program("ours"), "ours", "ours", batches=True)
    with contextlib.closing(sqlite3.connect(STORE)) as db, db:
        db.execute("UPDATE runs SET inputs = x'ff' WHERE run_id = ?", ids[:1])
        db.execute("UPDATE runs SET attempt = 'first', is_async = x'00' WHERE run_id = ?", ids[1:2])
        db.execute(
            "INSERT INTO steps (run_id, position, agent_name, result, next_agent, attempt, started_at, completed_at) "
            "VALUES (?, 0, 'ours', x'ff', 'ours', 1, 1, 1)",
            ids[2:3],
        )
        db.execute("UPDATE batches SET options = x'ff' WHERE batch_id = ?", batch_ids[:1])
    ours = Program("ours")
    ours.may_go.set()
    async with ours.engine() as engine:
        assert (await engine.wait(ids[3], timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED
        assert (await engine.wait_batch(batch_ids[1], timeout_s=PATIENCE_S)).status is RunStatus.COMPLETED
        for run_id in ids[:3]:
            run = await engine.get_run(run_id)
            assert (run.status, run.error_type, run.agent_name) == (RunStatus.FAILED, "unreadable", "ours")
        wanted = RunFilter(with_inputs=True, with_results=True)
        assert [run.run_id for run in await engine.list_runs(wanted)] == ids[::-1]
        batch = await engine.get_batch(batch_ids[0])
        assert (batch.status, batch.error) == (
            RunStatus.FAILED,
            "The record of this batch is damaged and cannot be read.",
        )
        assert [each.batch_id for each in await engine.list_batches(BatchFilter())] == batch_ids[::-1]
        assert {item.status for item in await engine.get_items(batch_ids[0])} == {RunStatus.FAILED}
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 4
    for id_ in [*ids[:3], batch_ids[0]]:
        assert len([line for line in errors if id_ in line and "cannot be read" in line]) == 1


@pytest.mark.parametrize("what", ["inputs = x'ff'", "error = x'ff'", "created_at = 'today'"])
async def test_a_run_damaged_after_it_ended_is_listed_with_its_readable_fields(what: str) -> None:
    ours = Program("ours")
    ours.may_go.set()
    async with ours.engine() as engine:
        ids = [(await engine.submit("ours", {})).run_id for _ in range(3)]
        for run_id in ids:
            await engine.wait(run_id)
    with contextlib.closing(sqlite3.connect(STORE)) as db, db:
        db.execute(f"UPDATE runs SET {what} WHERE run_id = ?", ids[1:2])
    async with ours.engine() as engine:
        runs = await engine.list_runs(RunFilter(with_inputs=True, with_results=True))
        assert [run.run_id for run in runs] == ids[::-1]
        assert [run.error_type for run in runs] == [None, "unreadable", None]
        assert [run.status for run in runs] == [RunStatus.COMPLETED] * 3


# Separate processes

SCRIPT = """
import time
from pathlib import Path
from flock.core import Flock

flock = Flock()

@flock.agent
def {agent}() -> str:
    Path("begun-{agent}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return "{agent}"
"""


def test_programs_in_one_folder_leave_the_queue_of_a_killed_program_to_its_next_start(tmp_path: Path) -> None:
    """With ``Flock()`` as in the README, and the default store."""

    def command(agent: str) -> list[str]:
        (tmp_path / f"{agent}.py").write_text(SCRIPT.format(agent=agent))
        return flockapi_command("serve", f"{agent}.py", "--port", "0")

    body = {"agent_name": "reports", "inputs": {}, "async_run": True}
    with running(*command("reports")) as server:
        ids = [httpx.post(f"{server.url}/run/flock", json=body).json()["run_id"] for _ in range(3)]
        server.wait_for_line("127.0.0.1")
        anyio.run(until, (tmp_path / "begun-reports").exists)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with running(*command("mails")) as server:
        server.wait_for_line("with agents that this one does not have: reports.")
        server.wait_for_line("does not have: reports (3)")
        statuses = [httpx.get(f"{server.url}/run/{run_id}").json()["status"] for run_id in ids]
        assert set(statuses) <= {"starting", "running"}
        assert httpx.post(f"{server.url}/run/{ids[0]}/cancel").status_code == 202
        assert httpx.get(f"{server.url}/run/{ids[0]}?wait=20", timeout=30).json()["status"] == "cancelled"
    (tmp_path / "go").touch()
    with running(*command("reports")) as server:
        ends = [httpx.get(f"{server.url}/run/{run_id}?wait=20", timeout=30).json() for run_id in ids]
        assert [end["status"] for end in ends] == ["cancelled", "completed", "completed"]


def test_startup_names_another_program_with_the_same_flock_and_agents_before_it_takes_over_its_runs(
    tmp_path: Path,
) -> None:
    """Production was killed, and staging has the same store by mistake."""
    paths = {}
    for name in ("production", "staging"):
        paths[name] = tmp_path / name / "app.py"
        paths[name].parent.mkdir()
        paths[name].write_text(SCRIPT.format(agent="reports"))

    def command(name: str) -> list[str]:
        return flockapi_command("serve", str(paths[name]), "--port", "0", "--store", str(tmp_path / "flock.db"))

    with running(*command("production")) as server:
        body = {"agent_name": "reports", "inputs": {}, "async_run": True}
        assert httpx.post(f"{server.url}/run/flock", json=body).status_code == 202
        anyio.run(until, Path("begun-reports").exists)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    Path("go").touch()
    with running(*command("staging")) as server:
        server.wait_for_line("resuming 1 runs")
        words = f"which is defined in {paths['production']} and not in {paths['staging']}. If that is another program"
        (warned_at,) = [number for number, line in enumerate(server.lines) if words in line]
        (resumed_at,) = [number for number, line in enumerate(server.lines) if "resuming 1 runs" in line]
        assert warned_at < resumed_at


def test_startup_does_not_warn_about_the_same_program_however_it_is_started(tmp_path: Path) -> None:
    """As a script, as a file or a module, by another path, and in several workers."""
    (tmp_path / "app.py").write_text(SCRIPT.format(agent="reports"))
    (tmp_path / "script.py").write_text("from app import flock\n\nflock.start_api(port=0)\n")
    serve = flockapi_command("serve", "--port", "0", "--store", "flock.db")
    workers = [*serve, "app:flock", "--workers", "2"]
    for command in ([sys.executable, "script.py"], [*serve, "app.py"], [*serve, "./app.py:flock"], workers):
        with running(*command) as server:
            server.wait_for_line("Application startup complete", times=2 if command is workers else 1)
            assert not any("last used by" in line for line in server.lines)


async def test_queued_runs_of_absent_programs_do_not_reduce_the_share_of_a_principal() -> None:
    gone, here = Program("theirs"), Program("ours")
    async with gone.engine(max_concurrency=1, max_queue=6) as engine:
        for _ in range(4):
            await engine.submit("theirs", {}, principal="ann")
        await gone.started.wait()
    async with here.engine(max_concurrency=1, max_queue=6) as engine:
        for _ in range(4):
            await engine.submit("ours", {}, principal="ann")
            await here.started.wait()
        with pytest.raises(EngineFull, match="max_queue_per_principal"):
            await engine.submit("ours", {}, principal="ann")


async def test_other_tasks_run_while_the_records_of_a_dead_engine_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be gigabytes, so a thread reads them. Here the thread waits for another task."""
    await leave_unfinished(Program("ours"), "ours")
    is_reading, may_continue, find_run = threading.Event(), threading.Event(), queries.find_run

    def find_slowly(db: sqlite3.Connection, run_id: str) -> Any:
        is_reading.set()
        assert may_continue.wait(PATIENCE_S)
        return find_run(db, run_id)

    async def run_during_the_read() -> None:
        await until(is_reading.is_set)
        may_continue.set()

    monkeypatch.setattr(queries, "find_run", find_slowly)
    program = Program("ours")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_during_the_read)
        async with program.engine():
            await program.started.wait()
            program.may_go.set()


async def test_a_silent_event_stream_is_kept_alive_while_another_engine_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "KEEP_ALIVE_S", 1)
    program = Program("ours", "first", "second")
    async with program.engine() as there, program.engine() as here, anyio.create_task_group() as tasks:
        run = await there.submit("ours", {})
        await program.started.wait()

        async def stay_busy() -> None:
            while True:
                await there.submit("first", {})
                await anyio.sleep(0.02)

        tasks.start_soon(stay_busy)
        with anyio.fail_after(PATIENCE_S):
            async for event in here.events(run.run_id):
                if event is None:
                    break
            else:
                raise AssertionError("the stream ended")
        tasks.cancel_scope.cancel()

"""Runs that may have killed their process: what is known of them, in which groups they start, and beside whom."""

import asyncio
import contextlib
import functools
import math
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from msgspec.structs import replace

from flock.core import Flock
from flock.engine import quarantine, recovery
from flock.engine.embedded import EmbeddedEngine
from flock.engine.quarantine import Quarantine
from flock.runs import Batch, BatchOptions, Question, Run, RunContext, RunStatus, new_id, now
from flock.store import files, statements, suspects
from flock.store.columns import batch_values
from flock.store.store import SQLiteStore
from flock.store.suspects import Executing, SuspectGroup, executed_until_death, groups_of
from tests.support import PATIENCE_S
from tests.support.engines import until

pytestmark = pytest.mark.anyio


# The groups


def deaths_until_all_are_found(good: int, poisons: Sequence[int], fuse_s: float) -> tuple[int, list[int]]:
    """Play the rule with *poisons* among *good* runs, each of which kills its process *fuse_s* after its start.

    Returns: the number of deaths, and who was alone, in order.
    """
    deaths = dict.fromkeys(range(good + len(poisons)), 0)
    alone = Counter[int]()
    found: list[int] = []
    executed: dict[str, int] = {}
    for died in range(1, 200):
        suspects_ = {str(run): count for run, count in deaths.items() if count > 1}
        groups = groups_of(suspects_, executed)
        starts, at = list[tuple[float, Collection[str]]](), 0.0
        for group in groups:
            starts.append((at, group.run_ids))
            at += group.life_s
        starts.append((at, [str(run) for run, count in deaths.items() if count <= 1]))
        kills_at = min((at + fuse_s for at, ids in starts for run in poisons if str(run) in ids), default=math.inf)
        if kills_at == math.inf:
            return died - 1, found
        executed = {run_id: number for number, (at, ids) in enumerate(starts) for run_id in ids if at <= kills_at}
        for run_id in executed:
            deaths[int(run_id)] += 1
        run = int(next(iter(executed)))
        alone[run] += len(executed) == 1
        if len(executed) == 1 and deaths[run] >= 3 and alone[run] >= 2:
            found.append(run)
            del deaths[run]
            poisons = [other for other in poisons if other != run]
    raise AssertionError("it was not found")


@pytest.mark.parametrize("good", [0, 1, 2, 7, 200])
def test_a_run_that_kills_at_once_is_alone_after_few_deaths(good: int) -> None:
    """At most 3 and the binary logarithm of the number of runs, wherever it stands among them."""
    for poison in range(good + 1):
        deaths, found = deaths_until_all_are_found(good, [poison], 0.01)
        assert found == [poison]
        assert deaths <= max(5, 3 + math.log2(good + 1))


@pytest.mark.parametrize("fuse_s", [1.5, 10, 60])
def test_a_run_that_kills_later_is_found_too(fuse_s: float) -> None:
    """Groups live twice as long with each death, so the time becomes longer than any fuse."""
    for poison in (0, 77, 200):
        deaths, found = deaths_until_all_are_found(200, [poison], fuse_s)
        assert found == [poison]
        assert deaths <= 3 + math.log2(200) + 2 * math.log2(fuse_s)


def test_of_two_runs_that_kill_both_are_found_and_no_other() -> None:
    for pair in ([0, 1], [0, 201], [100, 101], [3, 150]):
        deaths, found = deaths_until_all_are_found(200, pair, 0.01)
        assert sorted(found) == pair
        assert deaths <= 2 * (3 + math.log2(200))


def test_the_newest_group_starts_first_again() -> None:
    """The runs beside it had lived before it started, and runs that had not started are innocent of the last death."""
    found = groups_of({"old": 3, "new1": 3, "new2": 3, "idle": 2}, {"old": 1, "new1": 2, "new2": 2, "normal": 3})
    assert [set(group.run_ids) for group in found] == [{"new1"}, {"new2"}, {"old"}, {"idle"}]
    assert [group.life_s for group in found] == [2, 2, 2, 1]


def test_400_suspects_all_run_again_within_seconds() -> None:
    found = groups_of(dict.fromkeys(map(str, range(400)), 2), {})
    assert sum(len(group.run_ids) for group in found) == 400
    assert sum(group.life_s for group in found) <= 10


# What a process was executing


def lines_of(path: Path) -> Any:
    return executed_until_death(str(path))


def test_what_a_process_executes_is_in_its_file_at_every_moment(tmp_path: Path) -> None:
    path, executing = tmp_path / "lock", Executing()
    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        first, second = new_id(), new_id()
        executing.begin(first)
        executing.group = 7
        executing.begin(second)
        executing.begin(second)
        assert lines_of(path) == {first: 0, second: 7}
        executing.end(first)
        executing.end("unknown")
        assert (lines_of(path), len(executing)) == ({second: 7}, 1)
        executing.begin(third := new_id())
        assert lines_of(path) == {second: 7, third: 7}
        executing.forget()
        executing.end(second)
        assert lines_of(path) == {}, "a stop that was asked for does not count"


def test_a_run_that_begins_takes_the_line_of_one_that_has_just_ended(tmp_path: Path) -> None:
    """So an item of a batch costs one write. What no run takes is erased in the next turn of the event loop."""
    path, executing = tmp_path / "lock", Executing()
    first, second, third, fourth = (new_id() for _ in range(4))

    async def execute() -> None:
        for run_id in (first, second, third):
            executing.begin(run_id)
        executing.end(second)
        assert lines_of(path) == {first: 0, second: 0, third: 0}
        executing.begin(fourth)
        assert lines_of(path) == {first: 0, third: 0, fourth: 0}
        executing.end(fourth)
        assert lines_of(path) == {first: 0, third: 0, fourth: 0}
        await anyio.lowlevel.checkpoint()
        assert lines_of(path) == {first: 0, third: 0}

    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        anyio.run(execute)


def test_a_run_that_is_executed_alone_is_alone_in_the_file_at_once(tmp_path: Path) -> None:
    """Otherwise it would not be known as the cause if it kills the process in this turn of the event loop."""
    path, executing = tmp_path / "lock", Executing()
    first, second, third, fourth = (new_id() for _ in range(4))

    async def execute() -> None:
        for run_id in (first, second, third):
            executing.begin(run_id)
        executing.end(first)
        executing.end(second)
        assert lines_of(path) == {third: 0}
        executing.end(third)
        executing.begin(fourth)
        assert lines_of(path) == {fourth: 0}

    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        anyio.run(execute)


def test_lines_are_erased_again_after_the_event_loop_has_ended(tmp_path: Path) -> None:
    path, executing, going_on = tmp_path / "lock", Executing(), [new_id(), new_id()]

    def execute(run_ids: Sequence[str], then: Callable[[], object]) -> None:
        for run_id in (*run_ids, *going_on):
            executing.begin(run_id)
        for run_id in run_ids:
            executing.end(run_id)
        then()

    def execute_in_loop(run_ids: Sequence[str], *, is_cut_off: bool) -> None:
        loop = asyncio.new_event_loop()
        loop.call_soon(execute, run_ids, loop.stop if is_cut_off else functools.partial(loop.call_soon, loop.stop))
        loop.run_forever()
        loop.close()

    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        execute_in_loop(three := [new_id(), new_id(), new_id()], is_cut_off=True)
        assert lines_of(path) == dict.fromkeys([*three, *going_on], 0)
    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        execute_in_loop([new_id(), new_id()], is_cut_off=False)
        assert lines_of(path) == dict.fromkeys(going_on, 0)


def test_a_restart_of_the_machine_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, executing = tmp_path / "lock", Executing()
    with open(path, "w+b", buffering=0) as file:
        executing.open(file)
        executing.begin(run_id := new_id())
        assert lines_of(path) == {run_id: 0}
        monkeypatch.setattr(suspects, "_boot_id", lambda: "another")
        assert lines_of(path) == {}


def test_a_file_that_is_missing_or_damaged_has_no_runs(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lines_of(path) == {}
    for content in (b"", b"\xff\xfe", b"no boot id\n1 x\n"):
        path.write_bytes(content)
        assert lines_of(path) == {}
    path.write_bytes(f"{suspects._boot_id()}\nx y\n1 a b\n\0\0\0{' ' * 60}\n2 c\n".encode())
    assert lines_of(path) == {"c": 2}


# Taking over


class Work:
    """A flock whose runs note that they have started, and wait until they may end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "flock.db"
        self.started: list[int] = []
        self.statuses: list[str] = []
        self.may_end = anyio.Event()
        self.flock = Flock("work")
        self.flock.agent(self.work)

    async def work(self, n: int) -> int:
        self.started.append(n)
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            query = "SELECT status FROM runs WHERE json_extract(CAST(inputs AS TEXT), '$.n') = ?"
            self.statuses += [row[0] for row in db.execute(query, (n,))]
        await self.may_end.wait()
        return n

    def engine(self, **options: Any) -> Any:
        return self.flock.engine(store=self.path, **options)

    async def die(self, runs: Sequence[Run], *groups: Sequence[Run], batch: Batch | None = None) -> None:
        """Leave *runs* in the store as a process does that was executing *groups* when it died."""
        async with SQLiteStore(self.path) as store:
            owner = new_id()
            await store.register_engine(owner, "work", {"work"})
            for run in runs:
                await store.save(replace(run, owner=None if batch else owner), is_new=True)
            alone = "UPDATE runs SET deaths_alone = 1 WHERE deaths > 1"
            await store.change(lambda db: db.execute(alone) and None)
            if batch is not None:
                await store.change(lambda db: self._insert(db, replace(batch, owner=owner)))
            for group in groups:
                store.executing.group += 1
                for run in group:
                    store.executing.begin(run.run_id)
            files.close_lock(store._engine_lock)  # as the kernel does

    def _insert(self, db: sqlite3.Connection, batch: Batch) -> None:
        db.execute(statements.INSERT_BATCH, batch_values(batch, None))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def run_of(n: int, deaths: int = 0, **fields: Any) -> Run:
    values: dict[str, Any] = {"run_id": new_id(), "flock": "work", "agent_name": "work", "created_at": now()}
    values |= {"inputs": msgspec.Raw(b'{"n":%d}' % n), "deaths": deaths, "is_async": True}
    return Run(**values | fields)


def deaths_of(work: Work) -> dict[str, int]:
    with contextlib.closing(sqlite3.connect(work.path)) as db:
        return dict(db.execute("SELECT run_id, deaths FROM runs"))


async def test_only_runs_that_were_executing_count_a_death(work: Work) -> None:
    running, other = run_of(0), run_of(1)
    await work.die([running, other], [running])
    async with work.engine():
        await until(lambda: len(work.started) == 2)
    assert deaths_of(work) == {running.run_id: 1, other.run_id: 0}


async def test_a_run_that_was_alone_in_its_third_death_fails_as_crashed(
    work: Work, caplog: pytest.LogCaptureFixture
) -> None:
    """The log names it, and a retry starts from 0."""
    poison, other = run_of(0, deaths=2), run_of(1, deaths=2)
    await work.die([poison, other], [poison])
    async with work.engine() as engine:
        run = await engine.wait(poison.run_id)
        assert (run.status, run.error_type, run.result) == (RunStatus.FAILED, "crashed", None)
        assert any(poison.run_id in line and "'work'" not in line for line in caplog.messages if "killed" in line)
        assert run.completed_at is not None
        await engine.retry_run(poison.run_id)
        assert deaths_of(work)[poison.run_id] == 0
        work.may_end.set()
        assert (await engine.wait(poison.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait(other.run_id)).status is RunStatus.COMPLETED


async def test_a_run_that_was_alone_in_only_one_death_does_not_fail(work: Work) -> None:
    """Somebody may have killed the process just then. A finished call clears the earlier deaths."""
    work.may_end.set()
    once, cleared = run_of(0, deaths=1), run_of(1)
    await work.die([once, cleared], [once])
    async with SQLiteStore(work.path) as store:
        await store.change(lambda db: db.execute("UPDATE runs SET deaths_alone = 5 WHERE deaths = 0") and None)
    async with work.engine(max_recoveries=2) as engine:
        assert (await engine.wait(once.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait(cleared.run_id)).status is RunStatus.COMPLETED
    await work.die([last := run_of(2)], [last])
    async with SQLiteStore(work.path) as store:
        await store.change(lambda db: db.execute("UPDATE runs SET deaths_alone = 5 WHERE deaths = 0") and None)
    async with work.engine(max_recoveries=2) as engine:
        assert (await engine.wait(last.run_id)).status is RunStatus.COMPLETED


async def test_no_run_fails_that_was_not_alone(work: Work) -> None:
    """Even with many deaths, and if the other one was synchronous."""
    synchronous, runs = run_of(0, is_async=False), [run_of(1, deaths=20), run_of(2, deaths=20)]
    work.may_end.set()
    await work.die(runs, runs)
    async with work.engine() as engine:
        for run in runs:
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    await work.die([last := run_of(3, deaths=20)], [last, synchronous])
    async with work.engine() as engine:
        assert (await engine.wait(last.run_id)).status is RunStatus.COMPLETED


async def test_a_stop_that_was_asked_for_is_no_death(work: Work) -> None:
    """Not even if the process is killed while it stops."""
    async with work.engine() as engine:
        await engine.submit("work", msgspec.Raw(b'{"n":0}'), is_async=True)
        await until(lambda: work.started == [0])
        (lock,) = work.path.parent.glob("flock.db-engine-*")
        assert len(lines_of(lock)) == 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.drain, PATIENCE_S)
            await until(lambda: engine.is_draining)
            assert lines_of(lock) == {}
            tasks.cancel_scope.cancel()
    async with work.engine():
        await until(lambda: work.started == [0, 0])
    assert set(deaths_of(work).values()) == {0}


async def test_max_recoveries_is_the_number_of_deaths(work: Work) -> None:
    runs = [run_of(0), run_of(1, deaths=3)]
    work.may_end.set()
    for run in runs:
        await work.die([run], [run])
    async with work.engine(max_recoveries=5) as engine:
        assert [(await engine.wait(run.run_id)).status for run in runs] == ["completed"] * 2
    await work.die([first := run_of(2)], [first])
    async with work.engine(max_recoveries=1) as engine:
        assert (await engine.wait(first.run_id)).error_type == "crashed"


async def test_suspects_start_in_groups_and_everything_else_after_them(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a group has not lived for its time, nothing else starts. Each suspect is running on disk by then."""
    monkeypatch.setattr(suspects, "FIRST_LIFE_S", math.inf)
    monkeypatch.setattr(suspects, "MAX_LIFE_S", 3600.0)
    runs = [run_of(n, deaths=1) for n in range(8)]
    await work.die([*runs, run_of(100)], runs)
    async with work.engine() as engine:
        new = await engine.submit("work", msgspec.Raw(b'{"n":200}'), is_async=True)
        batch = await engine.submit_batch("work", [{"n": 300}], BatchOptions())
        for started in (2, 4, 6, 8):
            await until(lambda started=started: len(work.started) == started)  # type: ignore[misc]
            await anyio.sleep(0.2)
            assert len(work.started) == started
            engine._runner.quarantine._lives_until = 0.0
        await until(lambda: len(work.started) == 11)
        assert set(work.started[:8]) == set(range(8))
        assert work.statuses[:8] == ["running"] * 8
        work.may_end.set()
        assert (await engine.wait(new.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait_batch(batch.batch_id)).status is RunStatus.COMPLETED


async def test_the_next_group_starts_at_once_when_the_last_one_has_ended(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspects, "FIRST_LIFE_S", math.inf)
    monkeypatch.setattr(suspects, "MAX_LIFE_S", 3600.0)
    runs = [run_of(n, deaths=1) for n in range(8)]
    work.may_end.set()
    await work.die([*runs, run_of(100)], runs)
    async with work.engine():
        await until(lambda: len(work.started) == 9)


async def test_waiting_as_a_suspect_counts_on_no_clock_of_the_run(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MAX_LIFE_S", 3600.0)
    monkeypatch.setattr(suspects, "FIRST_LIFE_S", 3600.0)
    first, *others = runs = [run_of(0, deaths=2), *(run_of(n, deaths=1, timeout_s=2) for n in (1, 2, 3))]
    await work.die(runs, runs)
    async with work.engine(queue_timeout_s=0.1) as engine:
        await until(lambda: work.started == [0])
        await anyio.sleep(2.1)
        work.may_end.set()
        for run in (first, *others):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED


async def test_a_step_or_a_call_clears_its_run_and_only_that_one(tmp_path: Path) -> None:
    work = Work(tmp_path)

    @work.flock.agent(next_agent="work")
    async def step(n: int) -> int:
        return n

    @work.flock.agent
    async def call(n: int, context: RunContext) -> int:
        await context.call(abs, n)
        work.started.append(n)
        await work.may_end.wait()
        return n

    by_step, by_call, uncleared = (run_of(n, 1, agent_name=name) for n, name in enumerate(("step", "call", "work")))
    async with SQLiteStore(work.path) as store:
        await store.register_engine("dead", "work", {"work", "step", "call"})
        for run in (by_step, by_call, uncleared):
            await store.save(replace(run, owner="dead"), is_new=True)
            store.executing.begin(run.run_id)
        files.close_lock(store._engine_lock)
    async with work.engine():
        await until(lambda: len(work.started) == 3)
    assert deaths_of(work) == {by_step.run_id: 0, by_call.run_id: 0, uncleared.run_id: 2}


async def test_an_answer_clears_its_run(tmp_path: Path) -> None:
    work = Work(tmp_path)

    @work.flock.agent
    async def ask(n: int, context: RunContext) -> int:
        answer: int = await context.ask("How many?", int)
        return answer

    run = run_of(0, deaths=1, agent_name="ask")
    async with SQLiteStore(work.path) as store:
        await store.register_engine("dead", "work", {"ask"})
        await store.save(replace(run, owner="dead"), is_new=True)
        store.executing.begin(run.run_id)
        files.close_lock(store._engine_lock)
    async with work.engine() as engine:
        waiting = await engine.wait(run.run_id)
        question: Question = waiting.waiting_for[0]
        await engine.answer_call(run.run_id, question.call_id, msgspec.Raw(b"5"))
        assert (await engine.wait(run.run_id)).value == {"result": 5}
    assert deaths_of(work) == {run.run_id: 0}


# Batches


async def leave_batch(work: Work, deaths: Sequence[int], executing: Sequence[int], **options: Any) -> Batch:
    """Leave a batch whose items have been running in so many deaths, of which the last one is not counted yet."""
    batch = Batch(
        batch_id=new_id(), flock="work", agent_name="work", options=BatchOptions(**options), created_at=now(),
        total_items=len(deaths), status=RunStatus.RUNNING, started_at=now(),
    )  # fmt: skip
    items = [run_of(n, count, batch_id=batch.batch_id, position=n) for n, count in enumerate(deaths)]
    await work.die(items, [items[n] for n in executing], batch=batch)
    return batch


async def test_a_batch_continues_without_an_item_that_kills(work: Work) -> None:
    work.may_end.set()
    batch = await leave_batch(work, [0, 0, 2, 0], [2])
    async with work.engine() as engine:
        ended = await engine.wait_batch(batch.batch_id)
        assert (ended.status, ended.failed_items, ended.completed_items) == (RunStatus.COMPLETED, 1, 4)
        items = await engine.get_items(batch.batch_id)
        assert [item.error_type for item in items] == [None, None, "crashed", None]
        assert sorted(work.started) == [0, 1, 3]
        await engine.retry_batch(batch.batch_id)
        assert (await engine.wait_batch(batch.batch_id)).failed_items == 0


async def test_suspects_among_items_are_executed_like_other_suspects(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gets a worker, wherever it stands in its batch; the other items wait."""
    monkeypatch.setattr(suspects, "FIRST_LIFE_S", math.inf)
    monkeypatch.setattr(suspects, "MAX_LIFE_S", 3600.0)
    batch = await leave_batch(work, [0, 0, 1, 0, 1, 1, 1, 0], [2, 4, 5, 6], max_workers=4)
    async with work.engine() as engine:
        for started in (1, 2, 3, 4):
            await until(lambda started=started: len(work.started) == started)  # type: ignore[misc]
            await anyio.sleep(0.1)
            assert len(work.started) == started
            engine._runner.quarantine._lives_until = 0.0
        assert set(work.started) == {2, 4, 5, 6}
        work.may_end.set()
        ended = await engine.wait_batch(batch.batch_id)
        assert (ended.completed_items, ended.failed_items, len(work.started)) == (8, 0, 8)


async def test_a_cancelled_batch_with_suspects_does_not_hold_up_others(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its items never start, so nothing waits for them for long."""
    monkeypatch.setattr(quarantine, "ARRIVAL_S", 0.2)
    batch = await leave_batch(work, [1, 1], [0, 1])
    async with SQLiteStore(work.path) as store:
        query = "UPDATE batches SET cancel_requested = 1"
        await store.change(lambda db: db.execute(query) and None)
    work.may_end.set()
    async with work.engine() as engine:
        run = await engine.submit("work", msgspec.Raw(b'{"n":9}'))
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait_batch(batch.batch_id)).status is RunStatus.CANCELLED
    assert work.started == [9]


# A process that is busy


async def test_a_busy_process_leaves_suspects_to_an_idle_one(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LEAVE_S", PATIENCE_S)
    async with work.engine() as busy:
        own = await busy.submit("work", msgspec.Raw(b'{"n":100}'), is_async=True)
        await until(lambda: work.started == [100])
        await work.die([suspect := run_of(0, deaths=1)], [suspect])
        await until(lambda: bool(busy._recovery._left))
        assert work.started == [100]
        async with work.engine() as idle:
            await until(lambda: work.started == [100, 0])
            work.may_end.set()
            assert (await idle.wait(suspect.run_id)).status is RunStatus.COMPLETED
            assert (await busy.wait(own.run_id)).status is RunStatus.COMPLETED


async def test_a_busy_process_that_takes_suspects_executes_them_when_nothing_else_is_executed(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while it starts nothing new, so that it can. Then it does, since what is running may wait for that."""
    monkeypatch.setattr(recovery, "LEAVE_S", 0.0)
    monkeypatch.setattr(quarantine, "HOLD_S", 3600.0)
    async with work.engine() as engine:

        async def submit(n: int) -> Run:
            run: Run = await engine.submit("work", msgspec.Raw(b'{"n":%d}' % n), is_async=True)
            return run

        await submit(100)
        await until(lambda: work.started == [100])
        await work.die([suspect := run_of(0, deaths=1)], [suspect])
        await until(lambda: engine._runner.quarantine._is_closed)
        await submit(200)
        assert work.started == [100]
        engine._runner.quarantine._since -= 3600
        await until(lambda: work.started == [100, 200])
        engine._runner.quarantine._since -= 3600
        await until(lambda: engine._runner.quarantine._is_closed)
        await submit(300)
        assert work.started == [100, 200]
        work.may_end.set()
        await until(lambda: set(work.started) == {100, 200, 300, 0})
        assert work.started.index(0) == 2


async def test_a_run_that_has_started_is_never_held_up() -> None:
    quarantined = Quarantine(Executing())
    quarantined.add([SuspectGroup({"suspect"}, PATIENCE_S)])
    assert not quarantined.admits(run_of(0))
    assert quarantined.admits(run_of(0, status=RunStatus.RUNNING))
    assert quarantined.admits(run_of(0, run_id="suspect"))


async def test_in_memory_nothing_is_noted(work: Work) -> None:
    work.may_end.set()
    engine: EmbeddedEngine
    async with work.flock.engine(store=":memory:") as engine:
        assert engine.store.executing._file is None

"""Batches in the embedded engine: submission, scheduling, cancellation, retry, recovery and deletion."""

import asyncio
import contextlib
import itertools
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock
from flock.engine import embedded
from flock.errors import (
    BatchNotFound,
    EngineStopped,
    InvalidData,
    RunNotFound,
    StoreError,
    TooLarge,
)
from flock.rows.items import item_pages
from flock.runs import Batch, BatchFilter, BatchOptions, RunStatus, new_id, now
from flock.steps.outcomes import DAMAGED
from flock.store.batchstore import SQLiteBatchStore
from flock.store.migrations import MIGRATIONS
from flock.store.port import Retry
from flock.store.store import SQLiteStore
from tests.support import PATIENCE_S
from tests.support.engines import ended, sqlite_of, until
from tests.support.flocks import Work, numbers

pytestmark = pytest.mark.anyio

OPTIONS = BatchOptions()


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest) -> str:
    return "flock.db" if request.param == "disk" else ":memory:"


def rows(store: str | Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(store)) as db:
        return db.execute(query).fetchall()


# Submission


async def numbers_then_error(count: int) -> AsyncIterator[Any]:
    for item in numbers(count):
        yield item
    raise ConnectionError("gone")


@pytest.mark.parametrize(
    ("items", "error"),
    [
        pytest.param(lambda: numbers_then_error(1100), ConnectionError, id="it is interrupted"),
        pytest.param(lambda: [*numbers(1100), {"n": "x"}], InvalidData, id="the last item is invalid"),
        pytest.param(lambda: [{"n": "x"}, *numbers(1100)], InvalidData, id="the first item is invalid"),
        pytest.param(lambda: numbers(1501), TooLarge, id="one too many"),
        pytest.param(lambda: [*numbers(1100), {"n": "x" * 2000}], TooLarge, id="an item is too long"),
        pytest.param(lambda: [*numbers(1100), {"n": object()}], InvalidData, id="an item is not JSON"),
        pytest.param(lambda: [], InvalidData, id="no items"),
    ],
)
@pytest.mark.slow
async def test_a_batch_is_accepted_whole_or_not_at_all(items: Any, error: type[Exception], store: str) -> None:
    work = Work()
    async with work.flock.engine(store=store, max_items=1500, max_input_bytes=1000) as engine:
        with pytest.raises(error):
            await engine.submit_batch("item", items(), OPTIONS)
        assert await engine.list_batches(BatchFilter()) == []
        while await engine.store.batches.sweep():
            pass
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM runs").fetchone()) == (0,)
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM batches").fetchone()) == (0,)
    assert work.calls == []


async def test_an_unfinished_upload_is_hidden_and_dropped_with_its_sender(store: str) -> None:
    """Until its last item has arrived, the batch and its items are not visible and none of them starts."""
    work, staged = Work(), anyio.Event()

    async def stalls() -> AsyncIterator[Any]:
        for item in numbers(1100):
            yield item
        staged.set()
        await anyio.sleep_forever()

    async with work.flock.engine(store=store) as engine:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.submit_batch, "item", stalls(), OPTIONS)
            await staged.wait()
            query = "SELECT batch_id, run_id FROM runs LIMIT 1"
            batch_id, run_id = sqlite_of(engine).read(lambda db: db.execute(query).fetchone())
            assert await engine.list_batches(BatchFilter()) == []
            for look, id_, error in (
                (engine.get_batch, batch_id, BatchNotFound),
                (engine.cancel_batch, batch_id, BatchNotFound),
                (engine.get_run, run_id, RunNotFound),
            ):
                with pytest.raises(error):
                    await look(id_)
            tasks.cancel_scope.cancel()
        while await engine.store.batches.sweep():
            pass
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM runs").fetchone()) == (0,)
    assert work.calls == []


async def test_the_staged_items_of_a_dead_process_are_dropped() -> None:
    """The row of its engine exists, but no process holds its lock."""
    work = Work()
    dead_id = new_id()
    async with work.flock.engine(store="flock.db") as engine:
        batch = Batch(
            batch_id=new_id(),
            flock="work",
            agent_name="item",
            options=OPTIONS,
            total_items=0,
            created_at=now(),
            owner=dead_id,
        )
        await sqlite_of(engine).change(
            lambda db: db.execute("INSERT INTO engines VALUES (?, 'work', 0)", (dead_id,)) and None
        )
        await engine.store.batches.stage(batch, [], 1000, is_first=True)
    async with work.flock.engine(store="flock.db") as engine:
        with anyio.fail_after(PATIENCE_S):
            while rows("flock.db", "SELECT * FROM batches"):
                await anyio.sleep(0.02)
                sqlite_of(engine).batches.has_dropped.set()


@pytest.mark.parametrize("swept", [False, True])
@pytest.mark.parametrize("count", [600, 1100])
async def test_an_upload_that_another_engine_dropped_is_refused(count: int, swept: bool, store: str) -> None:
    """This happens if its process was suspended so long that it was taken for dead. No item of it remains."""
    work = Work()

    async def pauses() -> AsyncIterator[Any]:
        for item in numbers(550):
            yield item
        await sqlite_of(engine).change(lambda db: db.execute("UPDATE batches SET hidden = 'dropped'") and None)
        while swept and await engine.store.batches.sweep():
            pass
        for item in numbers(count - 550):
            yield item

    async with work.flock.engine(store=store) as engine:
        with pytest.raises(StoreError, match="Upload the whole batch again"):
            await engine.submit_batch("item", pauses(), OPTIONS)
        while await engine.store.batches.sweep():
            pass
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM runs").fetchone()) == (0,)
    assert work.calls == []


@pytest.mark.slow
async def test_every_accepted_item_can_be_read_however_deep_it_is_nested(store: str) -> None:
    """The depth limit depends on the stack of the caller, and reaching it does not stop the engine."""
    flock, accepted = Flock(), 0

    @flock.agent
    async def nest(x: list[Any]) -> int:
        return 1

    async with flock.engine(store=store) as engine:
        for levels in range(850, 1000):
            item = msgspec.Raw(b'{"x":%s%s}' % (b"[" * levels, b"]" * levels))
            with contextlib.suppress(InvalidData):
                batch = await ended(engine, await engine.submit_batch("nest", [item], OPTIONS))
                assert len(await engine.get_items(batch.batch_id)) == 1
                accepted += 1
        assert 0 < accepted < 150


# Scheduling


async def test_a_run_and_a_short_batch_do_not_wait_for_a_long_batch(store: str) -> None:
    """With one slot and 200 items ahead, the run goes next, and the short batch takes turns with the long one."""
    work = Work()
    work.holds = True
    async with work.flock.engine(store=store, max_concurrency=1) as engine:
        long = await engine.submit_batch("item", numbers(200), BatchOptions(max_workers=50))
        await work.started.wait()
        await anyio.wait_all_tasks_blocked()
        short = await engine.submit_batch("item", [{"n": 1000}, {"n": 1001}], OPTIONS)
        run = await engine.submit("item", {"n": -1})
        await anyio.wait_all_tasks_blocked()
        work.holds = False
        work.may_go.set()
        for batch in (short, long):
            await ended(engine, batch)
        await engine.wait(run.run_id)
    assert work.calls.index(-1) == 1
    assert max(work.calls.index(1000), work.calls.index(1001)) < 20


async def test_items_share_commits_and_the_tasks_of_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "WATCH_INTERVAL_S", 1.0)  # at each, the starts of items are committed
    flock, tasks = Flock("items"), set[Any]()

    @flock.agent
    async def double(n: int) -> int:
        tasks.add(asyncio.current_task())
        return 2 * n

    async with flock.engine(store="flock.db") as engine:
        statements = list[str]()
        sqlite_of(engine)._db.set_trace_callback(statements.append)
        batch = await engine.submit_batch("double", numbers(1000), BatchOptions(max_workers=100))
        assert (await ended(engine, batch)).completed_items == 1000
    assert statements.count("COMMIT") <= 30
    assert len(tasks) <= 100


async def test_an_item_that_ends_alone_is_stored_while_others_run() -> None:
    flock, may_end = Flock("items"), anyio.Event()

    @flock.agent
    async def wait(n: int) -> int:
        if n:
            await may_end.wait()
        return n

    async with flock.engine(store="flock.db") as engine:
        batch = await engine.submit_batch("wait", numbers(3), OPTIONS)
        await until(lambda: rows("flock.db", "SELECT position FROM runs WHERE status = 'completed'") == [(0,)])
        may_end.set()
        assert (await ended(engine, batch)).completed_items == 3


async def test_few_more_items_are_in_memory_than_there_are_slots(store: str) -> None:
    """This holds for any number of workers, because each item may be as long as a body."""
    work = Work()
    work.holds = True
    async with work.flock.engine(store=store, max_concurrency=3) as engine:
        batch = await engine.submit_batch("item", numbers(400), BatchOptions(max_workers=1000))
        await work.started.wait()
        await anyio.wait_all_tasks_blocked()
        assert len(engine._runner.active) == 4, "the running ones, and one that waits"
        work.may_go.set()
        assert (await ended(engine, batch)).status is RunStatus.COMPLETED


# Waiting


async def test_waiters_of_a_batch_are_woken_only_by_its_end(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise thousands of waiters would read the batch after each commit, and the server would do nothing else."""
    work, reads = Work(), 0
    work.holds = True

    def count(batch_id: str, get: Any = SQLiteBatchStore.get) -> Any:
        nonlocal reads
        reads += 1
        return get(engine.store.batches, batch_id)

    async with work.flock.engine(store=store) as engine:
        batch = await engine.submit_batch("item", numbers(1), OPTIONS)
        monkeypatch.setattr(engine.store.batches, "get", count)
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(ended, engine, batch)
            await work.started.wait()
            for n in range(5):
                await engine.submit("item", {"n": n})
                await anyio.sleep(0.1)
            work.may_go.set()
        assert reads <= 3 * 20


# Damaged rows

#: Damage that may be found in a row.
DAMAGES = {
    "inputs that are not JSON": "inputs = x'ff00'",
    "inputs that are text": "inputs = '{}'",
    "no inputs": "inputs = x''",
    "an unknown status": "status = 'asleep'",
    "an attempt that is text": "attempt = 'first'",
    "a time that is text": "created_at = 'today'",
    "a time out of range": "created_at = 9223372036854775807",
    "a text that is not UTF-8": "agent_name = CAST(x'ff' AS TEXT)",
    "a position that is text": "position = 'third'",
    "steps that are not JSON": "started_at = 1",
    "a last step that is text": "last_step = 'x'",
}


@pytest.mark.parametrize("change", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.slow
async def test_an_unreadable_item_fails_alone_and_its_batch_ends(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other items run, the log has one line for it, and it is among the results."""
    work, store = Work(), str(tmp_path / "flock.db")
    work.holds = True
    async with work.flock.engine(store=store) as engine:
        batch = await engine.submit_batch("item", numbers(600), BatchOptions(max_workers=1))
        await work.started.wait()
        ids = [item.run_id for item in await engine.get_items(batch.batch_id, limit=600)]
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        assert db.execute(f"UPDATE runs SET {change} WHERE position = 3").rowcount == 1
        db.execute(
            "INSERT INTO steps (run_id, position, agent_name, result, attempt, started_at, completed_at) "
            "VALUES (?, 0, 'item', x'7b', 1, 1, 1)",
            (ids[3],),
        )
    work.may_go.set()
    async with work.flock.engine(store=store) as engine:
        batch = await ended(engine, batch)
        assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 600, 1)
        item = await engine.get_run(ids[3])
        assert (item.status, item.error_type) == (RunStatus.FAILED, "unreadable")
        items = [item async for page in item_pages(engine, batch.batch_id) for item in page]
        assert len(items) == (599 if "position" in change else 600)
        failed = {item.run_id for item in items if item.status is not RunStatus.COMPLETED}
        assert failed == (set() if "position" in change else {ids[3]})
    assert sorted(set(work.calls)) == [n for n in range(600) if n != 3]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        len([error for error in errors if ids[3] in error and "cannot be read and was marked as failed" in error]) == 1
    )
    assert len(errors) == 1


@pytest.mark.slow
async def test_a_batch_of_unreadable_items_fails(tmp_path: Path) -> None:
    work, store = Work(), str(tmp_path / "flock.db")
    work.holds = True
    async with work.flock.engine(store=store, max_concurrency=1) as engine:
        batch = await engine.submit_batch("item", numbers(2500), BatchOptions(max_workers=1))
        await work.started.wait()
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        db.execute("UPDATE runs SET inputs = x'ff'")
    async with work.flock.engine(store=store) as engine:
        batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items, batch.completed_items) == (RunStatus.FAILED, 2500, 2500)
        assert batch.error == f"None of the 2500 items completed. The first error: {DAMAGED.error}"
        retried = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (retried.status, retried.failed_items) == (RunStatus.FAILED, 2500)


async def test_an_item_with_lost_pages_does_not_keep_its_batch_from_ending(tmp_path: Path) -> None:
    """SQLite can neither read nor write such a row."""
    work, store = Work(), str(tmp_path / "flock.db")
    work.holds = True
    async with work.flock.engine(store=store) as engine:
        rows_of_batch = [{"n": n, "text": chr(65 + n) * 30_000} for n in range(5)]
        batch = await engine.submit_batch("long", rows_of_batch, BatchOptions(max_workers=1))
        await work.started.wait()
        ids = [item.run_id for item in await engine.get_items(batch.batch_id)]
    with contextlib.closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
    lose_pages(Path(store), b"D" * 1000)
    work.may_go.set()
    async with work.flock.engine(store=store) as engine:
        batch = await ended(engine, batch)
        assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 5, 1)
        items = await engine.get_items(batch.batch_id)
        assert [item.run_id for item in items] == ids
        assert [item.error_type for item in items] == [None, None, None, "unreadable", None]
        await engine.check_ready()
    assert sorted(set(work.calls)) == [0, 1, 2, 4]


def lose_pages(store: Path, words: bytes) -> None:
    """Overwrite the pages that contain only *words*."""
    whole = store.read_bytes()
    pages = [whole[at : at + 4096] for at in range(0, len(whole), 4096)]
    lost = [n for n, page in enumerate(pages) if words in page[: len(words) + 4]]
    assert lost
    for n in lost:
        pages[n] = b"\xee" * 4096
    with open(store, "r+b") as file:
        file.write(b"".join(pages))


# Several engines, and recovery


async def test_an_engine_recovers_a_batch_that_another_left(tmp_path: Path) -> None:
    """This includes a batch that was being reopened for a retry."""
    work, path = Work(), tmp_path / "flock.db"
    work.holds, work.fails = True, set(range(0, 5000, 2))
    async with work.flock.engine(store=path) as engine:
        going = await engine.submit_batch("item", numbers(20), OPTIONS)
        await work.started.wait()
    assert rows(path, "SELECT status FROM batches") == [("running",)]
    work.holds = False
    async with work.flock.engine(store=path) as engine:
        assert (await ended(engine, going)).completed_items == 20
        reopened = await engine.store.batches.reopen(
            going.batch_id, [RunStatus.FAILED], 100, Retry(engine._engine_id), lambda batch: None
        )
        assert reopened is not None
        assert (reopened.reopening, reopened.failed_items) == ("failed", 10)
    work.fails = set()
    async with work.flock.engine(store=path) as engine:
        batch = await ended(engine, going)
        assert (batch.attempt, batch.status, batch.failed_items, batch.reopening) == (2, RunStatus.COMPLETED, 0, None)


async def test_another_engine_on_the_same_file_can_cancel_and_retry_a_batch(tmp_path: Path) -> None:
    work, path = Work(), tmp_path / "flock.db"
    work.holds = True
    async with work.flock.engine(store=path) as owner, work.flock.engine(store=path) as other:
        batch = await owner.submit_batch("item", numbers(50), BatchOptions(max_workers=3))
        await work.started.wait()
        cancelling = await other.cancel_batch(batch.batch_id)
        begun = len(work.calls)
        assert cancelling.cancel_requested
        batch = await ended(other, batch)
        assert (batch.status, batch.cancelled_items, len(work.calls)) == (RunStatus.CANCELLED, 50, begun)
        work.holds = False
        again = await other.retry_batch(batch.batch_id)
        assert again.owner != batch.owner
        assert (await ended(owner, again)).status is RunStatus.COMPLETED


async def test_an_engine_taken_for_dead_starts_no_item_of_a_batch_that_it_lost(tmp_path: Path) -> None:
    work, path = Work(), tmp_path / "flock.db"
    work.holds = True
    async with work.flock.engine(store=path) as engine:
        batch = await engine.submit_batch("item", numbers(2000), BatchOptions(max_workers=2))
        await work.started.wait()
        await anyio.wait_all_tasks_blocked()
        await sqlite_of(engine).change(lambda db: db.execute("UPDATE batches SET owner = 'another'") and None)
        work.may_go.set()
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(PATIENCE_S):
            while engine._runner.active:  # noqa: ASYNC110 - they end by themselves
                await anyio.sleep(0.01)
        assert (await engine.get_batch(batch.batch_id)).completed_items == 0
        assert len(work.calls) < 2000


@pytest.mark.parametrize("version", range(3, len(MIGRATIONS)))
async def test_a_batch_in_an_older_store_is_recovered_after_the_migration(version: int, tmp_path: Path) -> None:
    """One item of the batch is done, with its step in its own row, and one is not."""
    path, batch_id, work = tmp_path / "flock.db", new_id(), Work()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in itertools.chain.from_iterable(MIGRATIONS[:version]):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute("INSERT INTO engines VALUES ('dead', 'work', 0)")
        db.execute(
            "INSERT INTO batches (batch_id, flock, agent_name, options, status, total_items, completed_items, "
            "created_at, owner) VALUES (?, 'work', 'item', '{}', 'running', 2, 1, 0, 'dead')",
            (batch_id,),
        )
        ids = [new_id(), new_id()]
        for position, (run_id, status, result) in enumerate(
            [(ids[0], "completed", b'{"result":0}'), (ids[1], "running", None)]
        ):
            db.execute(
                "INSERT INTO runs (run_id, flock, agent_name, status, created_at, started_at, batch_id, position, "
                "is_async, attempt, owner, inputs, result) "
                "VALUES (?, 'work', 'item', ?, 0, 0, ?, ?, 1, 1, 'dead', ?, ?)",
                (run_id, status, batch_id, position, b'{"n":%d}' % position, result),
            )
        db.execute(
            "INSERT INTO steps (run_id, position, agent_name, result, attempt, started_at, completed_at) "
            "VALUES (?, 0, 'item', ?, 1, 0, 0)",
            (ids[0], b'{"result":0}'),
        )
    async with work.flock.engine(store=path) as engine:
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch_id)
        assert (batch.status, batch.completed_items, batch.attempt) == (RunStatus.COMPLETED, 2, 1)
        first, second = [await engine.get_run(run_id) for run_id in ids]
        assert [len(run.steps) for run in (first, second)] == [1, 1]
        assert (second.attempt, second.result) == (2, msgspec.Raw(b'{"result":1}'))
    assert work.calls == [1]


async def test_old_batches_are_deleted_as_a_whole(tmp_path: Path) -> None:
    work = Work()
    async with work.flock.engine(store=tmp_path / "flock.db", keep_runs=1) as engine:
        for _ in range(3):
            batch = await ended(engine, await engine.submit_batch("item", numbers(3), OPTIONS))
        await engine.delete_old()
        assert [each.batch_id for each in await engine.list_batches(BatchFilter())] == [batch.batch_id]
        while await engine.store.batches.sweep():
            pass
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM runs").fetchone()) == (3,)


@pytest.fixture
def fails_at_first(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Return a function that makes a method fail twice: once like a full disk, and once with a bug."""

    def arm(owner: Any, name: str) -> None:
        method = getattr(owner, name)
        failures = [ValueError("a bug"), StoreError("now")]

        async def fail_first(*args: Any, **options: Any) -> Any:
            if failures:
                raise failures.pop()
            return await method(*args, **options)

        monkeypatch.setattr(owner, name, fail_first)

    return arm


@pytest.mark.parametrize("name", ["begin", "end", "cancel_waiting", "reopen_some"])
@pytest.mark.slow
async def test_a_batch_continues_after_a_failed_write(name: str, fails_at_first: Any, store: str) -> None:
    work = Work()
    work.holds, work.fails = name == "cancel_waiting", {1}
    async with work.flock.engine(store=store) as engine:
        if name != "reopen_some":
            fails_at_first(engine.store.batches, name)
        batch = await engine.submit_batch("item", numbers(3), BatchOptions(max_workers=1))
        if name == "cancel_waiting":
            await work.started.wait()
            await engine.cancel_batch(batch.batch_id)
        batch = await ended(engine, batch)
        if name == "reopen_some":
            fails_at_first(engine.store.batches, name)
            work.fails = set()
            batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert batch.completed_items == 3
        assert batch.cancelled_items == (3 if name == "cancel_waiting" else 0)


async def test_staged_items_are_dropped_when_the_store_can_be_written_again(fails_at_first: Any, store: str) -> None:
    """The sender gets the error of its upload, and not the error of the store."""
    async with Work().flock.engine(store=store) as engine:
        fails_at_first(engine.store.batches, "drop")
        with pytest.raises(ConnectionError):
            await engine.submit_batch("item", numbers_then_error(1100), OPTIONS)
        with anyio.fail_after(PATIENCE_S):
            while sqlite_of(engine).read(lambda db: db.execute("SELECT 1 FROM runs").fetchone()):  # noqa: ASYNC110
                await anyio.sleep(0.01)


@pytest.mark.parametrize("count", [1, 1100])
async def test_an_engine_that_has_left_its_store_accepts_no_batch(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last item arrives just after the engine has released everything that it owned."""
    work, waiting, arrived, errors = Work(), anyio.Event(), anyio.Event(), list[BaseException]()

    async def items() -> AsyncIterator[Any]:
        for item in numbers(count - 1):
            yield item
        waiting.set()
        await arrived.wait()
        yield {"n": 0}

    async def submit(*args: Any) -> None:
        try:
            await args[0](*args[1:])
        except EngineStopped as exc:
            errors.append(exc)

    async def leave(engine_id: str, leave: Any = SQLiteStore.unregister_engine) -> None:
        await leave(engine.store, engine_id)
        arrived.set()
        await anyio.sleep(0.1)

    async with anyio.create_task_group() as tasks:
        async with work.flock.engine(store=tmp_path / "flock.db") as engine:
            monkeypatch.setattr(engine.store, "unregister_engine", leave)
            tasks.start_soon(submit, engine.submit_batch, "item", items(), OPTIONS)
            await waiting.wait()
    assert len(errors) == 1
    assert rows(tmp_path / "flock.db", "SELECT count(*) FROM batches WHERE hidden IS NULL") == [(0,)]


async def test_an_upload_does_not_delay_a_drain(tmp_path: Path) -> None:
    """The upload is refused at its next page, and its staged items are dropped."""
    work = Work()
    async with work.flock.engine(store=tmp_path / "flock.db") as engine:

        async def rows() -> AsyncIterator[dict[str, int]]:
            for n in range(5000):
                if n == 1000:
                    await engine.drain(0)
                yield {"n": n}

        with pytest.raises(EngineStopped, match="Upload the whole batch again"):
            await engine.submit_batch("item", rows(), BatchOptions())
        assert await engine.list_batches(BatchFilter()) == []

"""The store: group commits, fencing, migrations, refused values and full disks."""

import ast
import contextlib
import functools
import logging
import os
import re
import sqlite3
import subprocess
import sys
import tomllib
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace

from flock.core import Flock
from flock.errors import EngineFull, EngineStopped, KeyReused, OwnershipLost, Replayed, StoreError, Unstorable
from flock.runs import (
    Batch,
    BatchOptions,
    IdempotencyKey,
    Progress,
    QueueLimits,
    Run,
    RunFilter,
    RunStatus,
    Step,
    Usage,
    new_id,
    now,
)
from flock.store import queries, statements
from flock.store.batchstate import create_state
from flock.store.columns import BATCH_TABLE, RUN_TABLE, STEP_TABLE, Column
from flock.store.migrations import MIGRATIONS
from flock.store.statements import RUN_COLUMNS, batch_page, merged, run_page
from flock.store.store import SQLiteStore
from flock.web.wire import RunSummary
from tests.support import PATIENCE_S, ROOT

pytestmark = pytest.mark.anyio


def run_of(**more: Any) -> Run:
    values = {"flock": "f", "agent_name": "a", "owner": "me", "is_async": True, **more}
    return Run(run_id=new_id(), inputs=msgspec.Raw(b'{"x":1}'), created_at=now(), **values)


def step_of(**more: Any) -> Step:
    return Step(agent_name="a", result=msgspec.Raw(b'{"y":2}'), started_at=now(), completed_at=now(), **more)


@pytest.fixture(params=["disk", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SQLiteStore]:
    async with SQLiteStore(tmp_path / "flock.db" if request.param == "disk" else ":memory:") as made:
        yield made


@pytest.mark.parametrize("module", ["flock.store.store", "flock.core", "flockapi", "flock.command.cli"])
@pytest.mark.slow
def test_without_fcntl_the_import_names_the_supported_systems(module: str) -> None:
    """As on Windows. The project's classifiers and markers agree."""
    code = f"import sys; sys.modules.update(fcntl=None, resource=None); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: flockapi supports Linux and macOS, but not Windows" in done.stderr.splitlines()[-1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    systems = {each for each in project["classifiers"] if each.startswith("Operating System ::")}
    assert systems == {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"}
    markers = [each for each in project["dependencies"] if "sys_platform" in each]
    assert all("sys_platform != 'win32'" in each for each in markers)


async def test_a_run_is_read_as_it_was_written(store: SQLiteStore) -> None:
    run = run_of(request_id="r1", timeout_s=2.5)
    await store.save(run, is_new=True)
    assert await store.get_run(run.run_id) == run
    step = step_of(usage=Usage(input_tokens=1, output_tokens=2), next_agent="b")
    run = replace(run, status=RunStatus.RUNNING, started_at=now(), steps=(step,))
    await store.save(run, step)
    assert await store.get_run(run.run_id) == run
    run = replace(run, status=RunStatus.COMPLETED, result=msgspec.Raw(b"{}"), completed_at=now())
    await store.save(run)
    assert await store.get_run(run.run_id) == run
    assert await store.get_run("nobody") is None


async def test_concurrent_writes_share_a_transaction(store: SQLiteStore) -> None:
    """A run that starts and ends between two commits is one row, written once."""
    run, statements = run_of(), list[str]()
    store._db.set_trace_callback(statements.append)
    async with anyio.create_task_group() as tasks:
        for other in [run_of() for _ in range(50)]:
            tasks.start_soon(functools.partial(store.save, other, is_new=True))
        store.save_nowait(run, is_new=True)
        run = replace(run, status=RunStatus.COMPLETED, completed_at=now())
        await store.save(run)
    assert await store.get_run(run.run_id) == run
    if store.is_shared:
        assert statements.count("COMMIT") <= 2


async def test_a_write_by_another_owner_or_attempt_is_refused(store: SQLiteStore) -> None:
    run = run_of()
    await store.save(run, is_new=True)
    ended = replace(run, status=RunStatus.COMPLETED, completed_at=now())
    for stranger in (replace(ended, owner="other"), replace(ended, attempt=2)):
        with pytest.raises(OwnershipLost):
            await store.save(stranger)
    await store.save(ended)
    with pytest.raises(OwnershipLost):
        await store.save(replace(run, status=RunStatus.RUNNING))
    assert await store.get_run(run.run_id) == ended


async def test_a_taken_over_run_is_fenced_from_its_former_owner(store: SQLiteStore) -> None:
    running = run_of(status=RunStatus.RUNNING, started_at=now())
    waiting, waited_for = run_of(), run_of(is_async=False)
    already_owned = run_of(owner="successor")
    for run in (running, waiting, waited_for, already_owned):
        await store.save(run, is_new=True)
    await store.register_engine("me", "f", {"a"})
    runs, batches, waiting_for, is_all, suspects = await store.take_over("me", "successor", now(), 3)
    assert (batches, waiting_for, is_all, suspects) == ([], {}, True, [])
    ended, *resumed = runs
    assert (ended.run_id, ended.error_type) == (waited_for.run_id, "interrupted")
    assert [(run.run_id, run.attempt) for run in resumed] == [(running.run_id, 2), (waiting.run_id, 1)]
    assert [run.recoveries for run in resumed] == [1, 0]
    assert await store.take_over("me", "late", now(), 3) == ([], [], {}, True, [])
    with pytest.raises(OwnershipLost):
        await store.save(replace(running, status=RunStatus.COMPLETED))
    interrupted = await store.get_run(waited_for.run_id)
    assert interrupted
    assert (interrupted.status, interrupted.error_type) == (RunStatus.FAILED, "interrupted")
    await store.unregister_engine("me")


@pytest.mark.parametrize("insert", ["insert_run", "insert_runs"])
async def test_a_run_that_is_written_again_keeps_its_place_in_its_session(
    insert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first commit is reported as failed, but is on disk. A cancellation from elsewhere is kept too."""
    first, second = (run_of(session_id="s") for _ in range(2))
    async with SQLiteStore(tmp_path / "flock.db") as store:
        write_once, may_commit = store._write_once, anyio.Event()

        def fail_after_commit(write: Callable[[], None]) -> None:
            write_once(write)
            if not may_commit.is_set():
                raise sqlite3.OperationalError("disk I/O error")

        if insert == "insert_runs":
            await store.change(lambda db: queries.insert_runs(db, [first]))
        else:
            monkeypatch.setattr(store, "_write_once", fail_after_commit)
            with pytest.raises(StoreError):
                await store.save(first, is_new=True)
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("UPDATE runs SET cancel_requested = 1")
        may_commit.set()
        await store.save(second, is_new=True)
        if insert == "insert_runs":
            await store.change(lambda db: queries.insert_runs(db, [replace(first, status=RunStatus.RUNNING)]))
        assert (await store.active_before(second), await store.active_before(first)) == (first.run_id, None)
        assert await store.cancels_for("me") == [(first.run_id, 1)]


async def test_limits_and_keys_are_checked_in_one_transaction(store: SQLiteStore) -> None:
    key = IdempotencyKey("k", b"1")
    first = run_of()
    with pytest.raises(EngineStopped):  # no engine would resume it
        await store.accept(first, QueueLimits(2, 2), key)
    await store.register_engine("me", first.flock, {"a"})
    await store.accept(first, QueueLimits(2, 2), key)
    await store.accept(run_of(), QueueLimits(2, 2), None)
    with pytest.raises(EngineFull):
        await store.accept(run_of(), QueueLimits(2, 2), None)
    with pytest.raises(Replayed) as caught:  # a replay comes before any limit
        await store.accept(run_of(), QueueLimits(2, 2), key)
    assert caught.value.made_id == first.run_id
    with pytest.raises(KeyReused):
        await store.accept(run_of(), QueueLimits(2, 2), IdempotencyKey("k", b"2"))
    await store.delete_old_keys(now() + timedelta(seconds=1))
    with pytest.raises(EngineFull):
        await store.accept(run_of(), QueueLimits(2, 2), key)
    await store.unregister_engine("me")


async def test_runs_that_are_accepted_in_one_transaction_count_toward_the_limits(store: SQLiteStore) -> None:
    """Also after other writes of the transaction, and in the next ones."""
    await store.register_engine("me", "f", {"a"})
    accepted: list[str | None] = []

    async def accept(run: Run) -> None:
        with contextlib.suppress(EngineFull):
            await store.accept(run, QueueLimits(6, 3), None, then=lambda run: accepted.append(run.principal))

    async def accept_many() -> None:
        async with anyio.create_task_group() as tasks:
            for number in range(30):
                principal = [None, "ann", "bob"][number % 3]
                tasks.start_soon(accept, run_of(principal=principal))
                if number == 4:
                    tasks.start_soon(store.delete_run, ended.run_id)

    ended = run_of()
    await store.save(ended, is_new=True)
    await store.save(replace(ended, status=RunStatus.FAILED, completed_at=now()))
    await accept_many()
    assert accepted == [None, "ann", "bob"] * 2
    await accept_many()
    assert len(accepted) == 6
    waiting = (await store.list_runs("f", RunFilter(status=RunStatus.STARTING, principal="bob")))[0]
    await store.save(replace(waiting, status=RunStatus.COMPLETED, completed_at=now()))
    await accept_many()
    assert len(accepted) == 7
    assert (await store.queue("f")).depth == 6
    await store.unregister_engine("me")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (RunFilter(), [3, 2, 1, 0]),
        (RunFilter(limit=2), [3, 2]),
        (RunFilter(status=RunStatus.FAILED), [3, 1]),
        (RunFilter(agent_name="b"), [3, 2]),
        (RunFilter(agent_name="b", status=RunStatus.FAILED), [3]),
        (RunFilter(created_after=datetime(2100, 1, 1, tzinfo=UTC)), []),
        (RunFilter(created_before=datetime(2020, 1, 1, tzinfo=UTC)), []),
        (RunFilter(created_after=datetime(2020, 1, 1, tzinfo=UTC)), [3, 2, 1, 0]),
    ],
)
async def test_lists_are_filtered_and_newest_first(wanted: RunFilter, expected: list[int], store: SQLiteStore) -> None:
    runs = [
        run_of(agent_name=agent_name, status=status)
        for agent_name in ("a", "b")
        for status in (RunStatus.COMPLETED, RunStatus.FAILED)
    ]
    for run in (*runs, run_of(flock="other")):
        await store.save(run, is_new=True)
    ids = [run.run_id for run in runs]
    assert [ids.index(run.run_id) for run in await store.list_runs("f", wanted)] == expected
    page = await store.list_runs("f", replace(wanted, limit=1))
    if len(expected) > 1 and wanted.limit > 2:
        rest = await store.list_runs("f", replace(wanted, after=page[0].run_id))
        assert [ids.index(run.run_id) for run in rest] == expected[1:]


# Values that SQLite refuses

#: Values of an unsupported type, range and encoding.
REFUSED: dict[str, Any] = {"type": uuid.uuid4(), "range": 10**30, "encoding": "\ud800"}


async def refused_run(store: SQLiteStore, run: Run, value: Any) -> None:
    await store.save(run_of(principal=value), is_new=True)


async def refused_end(store: SQLiteStore, run: Run, value: Any) -> None:
    await store.save(replace(run, status=RunStatus.FAILED, error=value))


async def refused_step(store: SQLiteStore, run: Run, value: Any) -> None:
    step = step_of(next_agent=value)
    await store.save(replace(run, status=RunStatus.RUNNING, steps=(step,)), step)


async def refused_progress(store: SQLiteStore, run: Run, value: Any) -> None:
    progress = Progress(done=1, message=value if isinstance(value, str) else REFUSED["encoding"])
    await store.save(replace(run, status=RunStatus.RUNNING, progress=progress))


async def refused_acceptance(store: SQLiteStore, run: Run, value: Any) -> None:
    await store.accept(run_of(principal=value), QueueLimits(1000, 1000), None)


async def refused_key(store: SQLiteStore, run: Run, value: Any) -> None:
    digest: Any = value if isinstance(value, uuid.UUID | int) else b""
    await store.accept(
        run_of(), QueueLimits(1000, 1000), IdempotencyKey(value if isinstance(value, str) else "k", digest)
    )


def batch_of(**more: Any) -> Batch:
    values = {"flock": "f", "agent_name": "a", "owner": "me", "total_items": 2, "options": BatchOptions(), **more}
    return Batch(batch_id=new_id(), created_at=now(), **values)


async def test_items_that_share_a_transaction_are_each_fenced_by_their_batch(store: SQLiteStore) -> None:
    """Each gets the number of the version of its own batch, and that of another owner is not written."""
    own, lost = [batch_of(versions=("1",)), batch_of(versions=("1", "2"))], batch_of(owner="other", versions=("1",))
    items = [run_of(batch_id=batch.batch_id, position=n) for batch in (lost, *own) for n in range(2)]
    for batch in (lost, *own):
        mine = [item for item in items if item.batch_id == batch.batch_id]
        await store.batches.stage(batch, mine, 1000, is_first=True)
    refused = list[str]()

    async def end(item: Run) -> None:
        try:
            await store.save(replace(item, status=RunStatus.COMPLETED, completed_at=now()))
        except OwnershipLost:
            refused.append(item.run_id)

    async with anyio.create_task_group() as tasks:
        for item in items:
            tasks.start_soon(end, item)
    assert refused == [item.run_id for item in items[:2]]
    found = [await store.get_run(item.run_id) for item in items]
    assert [run and (run.status, run.version_number) for run in found] == [
        *[(RunStatus.STARTING, None)] * 2,
        *[(RunStatus.COMPLETED, 1)] * 2,
        *[(RunStatus.COMPLETED, 2)] * 2,
    ]


async def test_items_that_share_a_statement_keep_values_of_their_own(store: SQLiteStore) -> None:
    batch, end = batch_of(principal="p"), {"status": RunStatus.FAILED, "error": "invalid", "completed_at": now()}
    items = [run_of(batch_id=batch.batch_id, position=n, principal="p", attempt=2) for n in range(250)]
    items[0], items[99] = replace(items[0], **end), replace(items[99], files=("a/b",))
    items[100], items[249] = replace(items[100], extra=msgspec.Raw(b'{"z":1}')), replace(items[249], timeout_s=0.5)
    (store.contents.root / "a").mkdir(parents=True)
    (store.contents.root / "a/b").touch()
    await store.batches.stage(batch, items, 1000, is_first=True)
    assert [await store.get_run(item.run_id) for item in items] == items


async def refused_batch(store: SQLiteStore, run: Run, value: Any) -> None:
    batch = batch_of(principal=value)
    await store.batches.accept(batch, [], 1000, None, then=lambda batch: None, is_staged=False)


async def refused_item(store: SQLiteStore, run: Run, value: Any) -> None:
    batch = batch_of()
    items = [run_of(batch_id=batch.batch_id, position=0), run_of(batch_id=batch.batch_id, position=1, error=value)]
    await store.batches.stage(batch, items, 1000, is_first=True)


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    "write",
    [
        refused_run,
        refused_end,
        refused_step,
        refused_progress,
        refused_acceptance,
        refused_key,
        refused_batch,
        refused_item,
    ],
)
@pytest.mark.slow
async def test_a_record_that_sqlite_refuses_fails_alone(
    write: Callable[[SQLiteStore, Run, Any], Awaitable[None]], value: Any, store: SQLiteStore
) -> None:
    """The other records of its transaction are written, and no part of the refused one."""
    run, others = run_of(), [run_of() for _ in range(4)]
    await store.register_engine("me", "f", {"a"})
    await store.save(run, is_new=True)

    async def fail() -> None:
        with pytest.raises(Unstorable) as caught:
            await write(store, run, value)
        assert caught.value.log_detail

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(store.save, others[0], is_new=True))
        tasks.start_soon(functools.partial(store.accept, others[1], QueueLimits(1000, 1000), None))
        tasks.start_soon(fail)
        tasks.start_soon(functools.partial(store.save, others[2], is_new=True))
        tasks.start_soon(functools.partial(store.accept, others[3], QueueLimits(1000, 1000), None))
    store.check_writable()
    stored = await store.list_runs("f", RunFilter())
    assert {each.run_id for each in stored} == {each.run_id for each in (run, *others)}
    assert await store.get_run(run.run_id) == run
    for table in ("steps", "batches", "idempotency_keys"):
        assert store.read(lambda db: db.execute(f"SELECT count(*) FROM {table}").fetchone()) == (0,)  # noqa: B023
    ended = replace(run, status=RunStatus.COMPLETED, completed_at=now())
    await store.save(ended)
    assert await store.get_run(run.run_id) == ended
    await store.unregister_engine("me")


async def test_a_refused_new_run_can_be_saved_as_failed(store: SQLiteStore) -> None:
    """A short run is written once, when it ends. If its result is refused, its failure is its first record."""
    run = run_of(is_async=False)
    store.save_nowait(run, is_new=True)
    with pytest.raises(Unstorable):
        await store.save(replace(run, status=RunStatus.FAILED, error="\ud800"))
    failed = replace(run, status=RunStatus.FAILED, error="unstorable")
    await store.save(failed)
    assert await store.get_run(run.run_id) == failed


# Files


@pytest.mark.parametrize(
    "conditions",
    [
        "flock = :flock",
        "flock = :flock AND agent_name = :agent_name",
        "flock = :flock AND principal = :principal",
        "flock = :flock AND agent_name = :agent_name AND principal = :principal",
        "flock = :flock AND run_id < :after",
        "flock = :flock AND session_id = :session_id",
        "flock = :flock AND session_id = :session_id AND principal = :principal",
    ],
)
@pytest.mark.parametrize("statuses", [list(RunStatus), [RunStatus.FAILED]], ids=["any", "one"])
async def test_a_page_of_a_list_is_read_from_an_index_in_order(
    conditions: str, statuses: list[RunStatus], store: SQLiteStore
) -> None:
    """Nothing is sorted or scanned, so its time does not grow with the store. bench/list_runs.py measures it."""
    values = {"flock": "f", "agent_name": "a", "principal": "p", "after": "x", "session_id": "s"}
    query = f"EXPLAIN QUERY PLAN {merged(RUN_COLUMNS, statuses, conditions)} LIMIT 10"
    plan = "\n".join(row[3] for row in store.read(lambda db: db.execute(query, values).fetchall()))
    assert "TEMP B-TREE" not in plan
    assert "SCAN" not in plan
    assert plan.count("SEARCH runs USING INDEX") == len(statuses)
    for condition in re.findall(r"(\w+) = :", conditions):
        assert plan.count(f"{condition}=?") == len(statuses), "each condition uses the index"


@pytest.mark.parametrize("names", [("flock",), ("flock", "agent_name"), ("flock", "session_id")], ids=" ".join)
async def test_a_list_reads_the_principal_of_a_run_from_its_index(names: tuple[str, ...], store: SQLiteStore) -> None:
    """It is stored after the result, and reading it there takes as long as reading the result."""
    query = run_page("principal", [RunStatus.COMPLETED], names)
    values = dict.fromkeys(names, "x") | {"limit": 10}
    program = store.read(lambda db: db.execute(f"EXPLAIN {query}", values).fetchall())
    opened = [row[2] for row in program if row[1] == "OpenRead"]  # the table, and then the index
    assert [row[2] for row in program if row[1] == "Column"] == opened[1:]


async def test_the_batches_of_a_principal_are_read_from_an_index_in_order(store: SQLiteStore) -> None:
    query, values = batch_page(["flock", "principal"]), {"flock": "f", "principal": "p", "limit": 10}
    plan = [row[3] for row in store.read(lambda db: db.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall())]
    assert plan == ["SEARCH batches USING INDEX batches_by_principal (flock=? AND principal=?)"]


@pytest.mark.parametrize(
    ("table", "columns", "others"),
    [
        ("runs", RUN_TABLE, ("expires_at", "deaths_alone", "is_asleep")),
        ("steps", STEP_TABLE, ("run_id", "position")),
        ("batches", BATCH_TABLE, ("hidden",)),
    ],
)
async def test_each_field_of_a_record_has_a_column(
    table: str, columns: Mapping[str, Column], others: tuple[str, ...], store: SQLiteStore
) -> None:
    """The column has the type of the field. A new field needs only a migration."""
    python_types = {"TEXT": str, "INTEGER": int, "REAL": float, "BLOB": bytes}
    found = {row[1]: row for row in store._db.execute(f"PRAGMA table_info({table})")}
    assert found.keys() == {*columns, *others}
    for name, column in columns.items():
        _, _, type_, is_required, _, is_key = found[name]
        assert python_types[type_] in column.types
        assert (type(None) in column.types) is not bool(is_required or is_key), name
        (stand_in,) = store._db.execute(f"SELECT {column.placeholder}").fetchone()
        assert type(stand_in) in column.types


#: The fields of a run that never change, and those that a retry does not reset.
FIXED = """run_id flock agent_name inputs created_at request_id batch_id position traceparent principal timeout_s extra
    session_id call_ids call_key caller client files"""
KEPT = "steps owner is_async recoveries spent spent_by max_cost dropped digest first_span version_number"


def test_each_field_of_a_run_is_fixed_or_written_when_it_changes() -> None:
    """If this fails for a new field, see CONTRIBUTING.md. ``UPDATED`` and ``SUSPENDED`` are in these statements."""
    texts = [text for text in vars(statements).values() if isinstance(text, str)]
    updates = [text.partition("WHERE")[0] for text in texts if text.startswith("UPDATE runs SET")]
    written = {"steps", *re.findall(r"(\w+) = ", "".join(updates))} & {*Run.__struct_fields__}
    assert {*Run.__struct_fields__} - written == {*FIXED.split()}
    assert written - {*re.findall(r"(\w+) = ", statements.REOPENED)} == {*KEPT.split()}


def test_a_list_reads_each_field_that_it_shows() -> None:
    columns = statements.list_columns(with_inputs=True, with_results=True).split(", ")
    read = {name for name, column in zip(RUN_TABLE, columns, strict=True) if name in column}
    assert {*RunSummary.__struct_fields__} - {"waits"} <= read, "waits are those in waiting_for"


@pytest.mark.parametrize("query", [statements.ACTIVE_BEFORE, statements.EARLIER_RUNS], ids=["order", "history"])
async def test_the_runs_of_a_session_are_read_from_an_index_in_order(query: str, store: SQLiteStore) -> None:
    plan = [row[3] for row in store._db.execute(f"EXPLAIN QUERY PLAN {query}", [None] * query.count("?"))]
    assert not [line for line in plan if "TEMP B-TREE" in line or line.startswith("SCAN")], plan


def test_every_sql_statement_is_in_one_module() -> None:
    """Except for those of the migrations."""
    verbs, words = "SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP", "FROM|INTO|SET|TABLE|INDEX"
    is_sql = re.compile(rf"\s*({verbs})\b.*\b({words})\b", re.DOTALL)
    for path in (ROOT / "flock").rglob("*.py"):
        constants = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        found = [value for value in constants if isinstance(value, str) and is_sql.match(value)]
        assert not found or path.stem in ("statements", "migrations"), path


async def test_every_sql_statement_matches_the_tables(store: SQLiteStore) -> None:
    found = [text for text in vars(statements).values() if isinstance(text, str) and re.match("[A-Z]+ ", text)]
    queries = [text for text in found if text.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")]
    assert len(queries) > 50
    for query in queries:
        values: Any = [None] * query.count("?") or defaultdict(str)
        store._db.execute(f"EXPLAIN {query}", values)


async def test_a_file_that_is_not_a_store_is_refused_and_unchanged(tmp_path: Path) -> None:
    newer, foreign, text = tmp_path / "newer.db", tmp_path / "foreign.db", tmp_path / "text.db"
    with contextlib.closing(sqlite3.connect(newer)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with contextlib.closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE mine (a)")
    text.write_text("This is not a database, but a text that is long enough to be looked at." * 20)
    before = foreign.read_bytes()[200:]
    for path, words in ((newer, "newer version"), (foreign, "another program"), (text, "not a database")):
        with pytest.raises(StoreError, match=words):
            async with SQLiteStore(path):
                pytest.fail("it was opened")
    with pytest.raises(StoreError, match="':memory:'"):
        async with SQLiteStore(tmp_path / "nowhere" / "flock.db"):
            pytest.fail("it was opened")
    assert foreign.read_bytes()[200:] == before


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes_of(folder: Path) -> dict[str, str]:
    """Return the permissions of each file, by its suffix after the name of the store."""
    files = folder.glob("flock.db*")
    return {file.name.removeprefix("flock.db")[:7]: oct(file.stat().st_mode & 0o777) for file in files}


FILES = ("", "-wal", "-shm", "-lock", "-engine")


async def test_only_the_owner_can_read_a_new_store_with_any_umask(tmp_path: Path) -> None:
    with umask(0):
        async with SQLiteStore(tmp_path / "flock.db") as store:
            await store.register_engine("1", "f", ())
            assert modes_of(tmp_path) == dict.fromkeys(FILES, "0o600")
            await store.unregister_engine("1")


@pytest.mark.parametrize(
    "make", [lambda path: SQLiteStore(path)._connect().close(), create_state], ids=["store", "state of a batch"]
)
def test_a_new_store_is_private_before_sqlite_opens_it(
    make: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others cannot read it at any moment."""
    modes = []

    def connect(path: str, *args: Any, connect: Any = sqlite3.connect, **options: Any) -> sqlite3.Connection:
        modes.append(modes_of(tmp_path))
        made: sqlite3.Connection = connect(path, *args, **options)
        return made

    monkeypatch.setattr(sqlite3, "connect", connect)
    with umask(0):
        make(str(tmp_path / "flock.db"))
    assert modes == [{"": "0o600"}]


@pytest.mark.parametrize(("mode", "is_public"), [(0o600, False), (0o660, False), (0o644, True)])
async def test_an_existing_store_keeps_its_permissions_and_startup_warns_if_it_is_public(
    mode: int, is_public: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The files next to it get the same permissions, so that all who share the store can use them."""
    path = tmp_path / "flock.db"
    with umask(0):
        path.touch(mode)
        async with Flock().engine(store=path):
            modes = modes_of(tmp_path)
            assert modes.pop("-live-0") == "0o600", "the socket for the text of running agents is always private"
            assert modes == dict.fromkeys(FILES, oct(mode))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    expected = f"Every user of this machine can read the store {path}. To change that, run: chmod go= {path}*"
    assert warnings == [expected] * is_public


@pytest.mark.parametrize("durability", ["power", "process"])
async def test_writes_are_there_after_a_restart(durability: Any, tmp_path: Path) -> None:
    run = run_of()
    async with SQLiteStore(tmp_path / "flock.db", durability=durability) as store:
        store.save_nowait(run, is_new=True)  # closing flushes it
    async with SQLiteStore(tmp_path / "flock.db") as store:
        assert await store.get_run(run.run_id) == run


async def test_a_full_disk_fails_writes_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file cannot grow, as on a full disk. Acknowledged writes are kept, and the failed one is retried."""
    async with SQLiteStore(tmp_path / "flock.db") as store:
        stored = run_of()
        await store.save(stored, is_new=True)
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")
        large = replace(run_of(), inputs=msgspec.Raw(b'"%b"' % (b"x" * 1_000_000)))
        with pytest.raises(StoreError, match="cannot be written now"):
            await store.save(large, is_new=True)
        assert "full" in caplog.text
        assert await store.get_run(stored.run_id) == stored
        store._db.execute("PRAGMA max_page_count = 1073741823")
        later = run_of()
        await store.save(later, is_new=True)
        assert await store.get_run(large.run_id) == large
        assert await store.get_run(later.run_id) == later


OPEN = """
import sys, anyio
from flock.store.store import SQLiteStore

async def main():
    print("ready", flush=True)
    sys.stdin.readline()
    async with SQLiteStore(sys.argv[1]):
        pass

anyio.run(main)
"""


def test_processes_that_open_a_new_store_at_the_same_moment_all_start(tmp_path: Path) -> None:
    """SQLite does not wait for a lock when WAL is switched on, or when the last process closes the file."""
    for number in range(12):
        path = tmp_path / f"{number}.db"
        options: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        opening = [subprocess.Popen([sys.executable, "-c", OPEN, str(path)], **options) for _ in range(4)]
        for process in opening:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in opening:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        for process in opening:
            _, errors = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, errors

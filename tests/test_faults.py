"""Faults of a machine: full disks, damaged files, killed and suspended processes, and clocks that jump."""

import contextlib
import errno
import itertools
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

import flock.runs.ids
import flock.store.files
import flock.store.store
import flock.store.storefile
from flock.core import Flock, FlockFactory, data_url
from flock.engine import runner
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Replayed, StoreError, Unreadable
from flock.runs import BatchOptions, IdempotencyKey, Run, RunContext, RunFilter, RunStatus
from flock.store import contents
from flock.store.port import DamagedRecord
from flock.store.store import SQLiteStore
from flock.testing import FakeModel
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S, slowness
from tests.support.engines import sqlite_of, until_run
from tests.support.engines import until as until_true
from tests.support.http import client_of, post_run, wait_until
from tests.support.servers import Server, flockapi_command, memory_kib, running
from tests.test_files import PNG, receipts, stored

T = TypeVar("T")

FLOCK = """
import asyncio, multiprocessing, os, subprocess, sys, time
from pathlib import Path
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("faults")
HERE = Path(__file__).parent

def note(words: str) -> None:
    fd = os.open(HERE / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{words}\\n".encode())
    os.close(fd)

@flock.agent
def length(text: str) -> int:
    return len(text)

@flock.agent
def repeat(text: str, times: int) -> str:
    return text * times

@flock.agent
async def pay(times: int) -> str:
    \"\"\"Logs that it was paid.\"\"\"
    note("paid")
    return "x" * times

@flock.agent
async def pay_in_call(times: int, context: RunContext) -> int:
    return len(await context.call(pay, times))

@flock.agent
async def work(n: int) -> int:
    \"\"\"Logs its start, ends when its process may, and returns the process id.\"\"\"
    note(f"{n} {os.getpid()}")
    while not (HERE / f"go-{os.getpid()}").exists():
        await asyncio.sleep(0.01)
    return os.getpid()

@flock.agent
def have_child(how: str) -> int:
    \"\"\"Starts a child that outlives the server.\"\"\"
    if (HERE / "log").exists():
        return os.getpid()
    if how == "fork":
        if not (pid := os.fork()):
            time.sleep(100)
            os._exit(0)
    elif how == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        child.start()
        pid = child.pid
    else:
        pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]).pid
    note(str(pid))
    time.sleep(100)
    return 0
"""


@pytest.fixture
def flock_file(tmp_path: Path) -> Path:
    file = tmp_path / "faults.py"
    file.write_text(FLOCK)
    return file


def serve_command(flock_file: Path, store: Path) -> list[str]:
    return flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(store), "--drain-timeout", "1")


@contextlib.contextmanager
def serving(flock_file: Path, store: Path, *wrapper: str) -> Iterator[tuple[Server, httpx.Client]]:
    """Run a server, under *wrapper* if there is one, with a client for it. Its log must have no traceback."""
    with running(*wrapper, *serve_command(flock_file, store)) as server:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            yield server, client
    assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)


def until(find: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """Poll *find* until it returns something true, and return that."""
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        assert time.monotonic() < deadline, f"after {timeout_s} s: no {what}"
        time.sleep(0.01)
    return found


def submit(client: httpx.Client, agent_name: str, **inputs: Any) -> httpx.Response:
    return client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs, "async_run": True})


def accepted(client: httpx.Client, agent_name: str, **inputs: Any) -> str:
    answer = submit(client, agent_name, **inputs)
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["run_id"]
    return run_id


def ended(client: httpx.Client, run_id: str, timeout_s: float = PATIENCE_S) -> Any:
    """Poll the run until it is final, and return it."""

    def look() -> Any:
        run = client.get(f"/run/{run_id}").raise_for_status().json()
        return None if run["status"] in ("starting", "running") else run

    return until(look, f"end of {run_id}", timeout_s)


def is_unavailable(answer: httpx.Response) -> bool:
    """Return whether the answer is a 503 of the store, after checking that the problem is complete."""
    if answer.status_code != 503:
        return False
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["status"]) == ("urn:flockapi:problem:store-unavailable", 503)
    assert int(answer.headers["retry-after"]) >= 1
    return True


def rows(store: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(store)) as db:
        return db.execute(query, values).fetchall()


def starts(folder: Path) -> list[tuple[int, int]]:
    """Return the n and the process id of each start of ``work``."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(n), int(pid)) for n, pid in map(str.split, lines)]


# A full disk


@contextlib.contextmanager
def files_that_may_not_grow(folder: Path) -> Iterator[tuple[list[str], Callable[[Server], None]]]:
    """Limit the size of files with RLIMIT_FSIZE, which works on any Linux. A write beyond it fails with EFBIG."""
    limit = 800_000  # a new store needs 650,000
    set_limit = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def make_space(server: Server) -> None:
        infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, infinite)

    yield [sys.executable, "-c", set_limit], make_space


@contextlib.contextmanager
def a_full_disk(folder: Path) -> Iterator[tuple[list[str], Callable[[Server], None]]]:
    """Mount a file system of 1.2 MB. A write beyond it fails with ENOSPC."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], check=True)
    (folder / "ballast").write_bytes(bytes(200_000))

    def make_space(server: Server) -> None:
        (folder / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    try:
        yield [], make_space
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    attempt = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]  # in a namespace of its own
    return subprocess.run(attempt, capture_output=True).returncode == 0


DISKS = [files_that_may_not_grow, *([a_full_disk] if can_mount() else [])]


@pytest.mark.parametrize("limited_disk", DISKS)
def test_a_full_disk_is_answered_503_and_loses_no_accepted_run(
    limited_disk: Any, flock_file: Path, tmp_path: Path
) -> None:
    """Inputs of 50 kB fill the disk. When there is room again, the same process continues."""
    (tmp_path / "disk").mkdir()
    store = tmp_path / "disk" / "flock.db"
    with limited_disk(tmp_path / "disk") as (wrapper, make_space), serving(flock_file, store, *wrapper) as at:
        server, client = at
        run_ids: list[str] = []
        for n in itertools.count():
            answer = submit(client, "length", text="x" * (50_000 + n))
            if is_unavailable(answer):
                break
            assert answer.status_code == 202, answer.text
            run_ids.append(answer.json()["run_id"])
            assert n < 100
        assert run_ids, "some runs were accepted first"
        server.wait_for_line("cannot be written")
        assert {run_id for (run_id,) in rows(store, "SELECT run_id FROM runs")} == set(run_ids)
        for run_id in run_ids:
            assert client.get(f"/run/{run_id}").status_code == 200
        text = {"text": "x" * 50_000}
        assert is_unavailable(client.post("/run/flock", json={"agent_name": "length", "inputs": text}))
        assert is_unavailable(submit(client, "length", **text))

        make_space(server)
        until(lambda: submit(client, "length", text="").status_code == 202, "room")
        run_ids.append(accepted(client, "length", text="x" * (50_000 + len(run_ids))))
        for n, run_id in enumerate(run_ids):
            run = ended(client, run_id)
            assert (run["status"], run["result"]) == ("completed", {"result": 50_000 + n})
        assert server.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("agent_name", ["pay", "pay_in_call"])
@pytest.mark.parametrize("limited_disk", DISKS)
def test_a_client_that_retries_on_a_full_disk_pays_once(
    limited_disk: Any, agent_name: str, flock_file: Path, tmp_path: Path
) -> None:
    """Its result waits until there is room. Until then new runs are refused, even if a short write succeeds."""
    (tmp_path / "disk").mkdir()
    request = {"agent_name": agent_name, "inputs": {"times": 1_000_000}}
    with limited_disk(tmp_path / "disk") as (wrapper, make_space):
        with serving(flock_file, tmp_path / "disk" / "flock.db", *wrapper) as (server, client):
            answer = client.post("/run/flock", json=request)
            assert is_unavailable(answer)
            found = re.search(r"GET /run/(\S+) shows its status", answer.json()["detail"])
            assert found
            until_time = time.monotonic() + 3.5  # in which the store is probed three times
            while time.monotonic() < until_time:
                assert is_unavailable(client.post("/run/flock", json=request))
            assert (tmp_path / "log").read_text() == "paid\n"

            make_space(server)
            until(lambda: client.get("/readyz").status_code == 200, "recovery, although nobody has written")
            assert ended(client, found[1])["status"] == "completed"
            assert client.post("/run/flock", json=request).json()["status"] == "completed"
            assert (tmp_path / "log").read_text() == "paid\n" * 2


@pytest.mark.parametrize("limited_disk", DISKS)
def test_results_that_a_full_disk_cannot_take_do_not_fill_the_memory(
    limited_disk: Any, flock_file: Path, tmp_path: Path
) -> None:
    """Twenty clients ask for 400 results of 1 MB. Only what was running when the disk failed is kept in memory."""
    (tmp_path / "disk").mkdir()
    request = {"agent_name": "pay", "inputs": {"times": 1_000_000}}
    with limited_disk(tmp_path / "disk") as (wrapper, _), ThreadPoolExecutor(20) as pool:
        with serving(flock_file, tmp_path / "disk" / "flock.db", *wrapper) as (server, client):
            assert client.get("/agents").status_code == 200
            before = memory_kib(server)
            answers = pool.map(lambda _: client.post("/run/flock", json=request), range(400))
            assert all(map(is_unavailable, answers))
            assert memory_kib(server) - before < 150 * 1024
            assert len((tmp_path / "log").read_text().splitlines()) <= 20


@pytest.fixture
async def on_a_small_disk(tmp_path: Path) -> AsyncIterator[tuple[FlockAPI, httpx.AsyncClient, Callable[[], None]]]:
    """An app of agents with files on a file system of 1.2 MB of its own, of which 350 kB are free."""
    if not can_mount():
        pytest.skip("only root can mount a small disk")
    (tmp_path / "disk").mkdir()
    with a_full_disk(tmp_path / "disk") as (_, make_space):
        app = create_app(receipts(), store=tmp_path / "disk" / "runs.db", auth="host")
        async with app.lifespan(), client_of(app) as client:
            yield app, client, lambda: make_space(None)  # type: ignore


@pytest.mark.parametrize("min_free_bytes", [0, contents.MIN_FREE_BYTES])
async def test_an_upload_that_fills_the_disk_stores_nothing(
    on_a_small_disk: Any, min_free_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write fails with ENOSPC, or less is free than files leave."""
    (_, client, make_space), disk = on_a_small_disk, tmp_path / "disk"
    long = b"x" * 800_000
    monkeypatch.setattr(contents, "MIN_FREE_BYTES", min_free_bytes)
    uploads: list[Callable[[], Awaitable[httpx.Response]]] = [
        lambda: client.post("/files", content=long),
        lambda: client.post("/run/flock", data={"agent_name": "read"}, files={"letter": long}),
        lambda: post_run(client, "read", {"letter": data_url(long[:700_000])}),
    ]
    for upload in uploads:
        assert is_unavailable(await upload())
        assert stored(disk) == []
    assert (await client.get("/runs")).json()["runs"] == []
    if not min_free_bytes:
        assert (await client.post("/files", content=b"short")).status_code == 201, "there is room for it"
    make_space()
    monkeypatch.setattr(contents, "MIN_FREE_BYTES", 0)
    assert [(await upload()).status_code for upload in uploads] == [201, 200, 200]


async def test_a_disk_that_is_full_when_a_file_is_stored_and_its_run_is_not_accepted_keeps_neither(
    on_a_small_disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (app, client, make_space), disk = on_a_small_disk, tmp_path / "disk"
    monkeypatch.setattr(contents, "MIN_FREE_BYTES", 0)
    inputs = {"photo": data_url(PNG), "note": "x" * 600_000}
    assert is_unavailable(await post_run(client, "look", inputs))
    (path,) = stored(disk)
    assert path.read_bytes() == PNG
    make_space()
    await wait_until(client, "/readyz", lambda body: body.get("status") != 503)
    assert (await client.get("/runs")).json()["runs"] == []
    await app.engine.store.delete_unused_files(0)
    assert stored(disk) == []
    assert (await post_run(client, "look", inputs)).json()["result"]["result"]["read"] == len(PNG)


async def test_a_folder_that_cannot_be_synced_accepts_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is there, and nothing has it: it is deleted as one that no run takes."""

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    app = create_app(receipts(), store=tmp_path / "runs.db", auth="host")
    async with app.lifespan(), client_of(app) as client:
        with monkeypatch.context() as patch:
            patch.setattr(contents, "sync_folder", fail)
            assert is_unavailable(await post_run(client, "look", {"photo": data_url(PNG)}))
            assert is_unavailable(await client.post("/files", content=PNG))
        assert (await client.get("/runs")).json()["runs"] == []
        engine: Any = app.engine
        await engine.store.delete_unused_files(0)
        assert stored(tmp_path) == []
        assert (await client.post("/files", content=PNG)).status_code == 201


class Paid:
    """A flock that records which work has begun. Each piece of work ends when ``end`` was called with its name."""

    def __init__(self) -> None:
        self.flock, self.begun, self.may_end = Flock("paid"), list[str](), dict[str, anyio.Event]()

        async def pay(what: str) -> None:
            self.begun.append(what)
            await self.may_end.setdefault(what, anyio.Event()).wait()

        @self.flock.agent
        async def long(what: str) -> str:
            await pay(what)
            return "x" * 1_000_000

        @self.flock.agent(max_concurrency=1)
        async def short(what: str) -> None:
            await pay(what)

        @self.flock.agent
        async def calls(context: RunContext) -> None:
            await pay("outside of calls")
            await context.call(pay, "call")

        @self.flock.agent(next_agent="second_step")
        async def first_step() -> None:
            await pay("first step")

        @self.flock.agent
        async def second_step() -> None:
            await pay("second step")

        @self.flock.agent(next_agent="writer")
        async def before_model() -> str:
            await pay("before a model")
            return "draft"

        self.flock.add_agent(
            FlockFactory.create_default_agent("writer", model="openai/gpt-4o", input="result", output="text")
        )

    def end(self, *names: str) -> None:
        for name in names:
            self.may_end.setdefault(name, anyio.Event()).set()


@pytest.mark.anyio
async def test_nothing_that_costs_money_starts_while_the_store_fails(tmp_path: Path) -> None:
    """Neither a queued run, nor an item of a batch, a call or a step of a running run, nor new work, nor a model."""
    paid, model = Paid(), FakeModel([{"text": "done"}])
    async with paid.flock.engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        runs = [await engine.submit("long", {"what": "long"}), await engine.submit("short", {"what": "short"})]
        runs += [await engine.submit(name, {}) for name in ("calls", "first_step", "before_model")]
        await until_true(lambda: len(paid.begun) == 5)
        runs += [await engine.submit("short", {"what": "queued"})]
        batch = await engine.submit_batch("short", [{"what": f"item {n}"} for n in range(3)], BatchOptions())
        failed = await engine.submit("long", {"what": "to be retried"})
        await engine.cancel_run(failed.run_id)
        failed = await engine.wait(failed.run_id)
        begun = sorted(paid.begun)

        database = sqlite_of(engine)._db
        database.execute(f"PRAGMA max_page_count = {database.execute('PRAGMA page_count').fetchone()[0]}")
        paid.end("long")
        await until_true(lambda: engine.health().store == "failing")
        paid.end("short", "outside of calls", "first step", "before a model")
        queued = engine._runner.active[runs[-1].run_id]
        await until_true(lambda: queued.store_error is not None)
        for new in (
            engine.submit("short", {"what": "async"}),
            engine.submit("short", {"what": "sync"}, is_async=False),
            engine.submit("writer", {"result": "async"}),
            engine.submit("writer", {"result": "sync"}, is_async=False),
            engine.submit_batch("writer", [{"result": "item"}], BatchOptions()),
            engine.submit_batch("short", [{"what": "item"}], BatchOptions()),
            engine.retry_run(failed.run_id),
        ):
            with pytest.raises(StoreError):
                await new
        with pytest.raises(StoreError):
            await engine.wait(runs[-1].run_id)
        await anyio.wait_all_tasks_blocked()
        assert (sorted(paid.begun), model.requests) == (begun, [])

        database.execute("PRAGMA max_page_count = 1073741823")
        paid.end("queued", "call", "second step", *(f"item {n}" for n in range(3)))
        for run in runs:
            run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
            assert run.status is RunStatus.COMPLETED
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait_batch(batch.batch_id)).status is RunStatus.COMPLETED
        assert len(model.requests) == 1


@pytest.mark.anyio
async def test_a_store_that_cannot_keep_up_holds_back_new_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of 1 MB wait while another process writes. At 16 MB no more runs start until they are written."""
    monkeypatch.setattr(flock.store.storefile, "LOCK_TIMEOUT_S", math.inf)
    paid = Paid()
    async with paid.flock.engine(store=tmp_path / "flock.db", max_concurrency=1) as engine:
        with flock.store.files.open_lock(f"{engine.store.path}-lock", 0o600) as file:
            await until_true(lambda: flock.store.files.try_lock(file))
            paid.end("long")
            for _ in range(40):
                run = await engine.submit("long", {"what": "long"}, is_async=False)
            await until_true(lambda: len(paid.begun) >= 17)
            await anyio.wait_all_tasks_blocked()
            assert len(paid.begun) == 17
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert len(paid.begun) == 40


@pytest.mark.anyio
async def test_other_processes_may_write_while_the_event_loop_is_busy(tmp_path: Path) -> None:
    began = threading.Event()
    async with SQLiteStore(tmp_path / "flock.db") as store, anyio.create_task_group() as tasks:
        with flock.store.files.open_lock(f"{store.path}-lock", 0o600) as file:
            tasks.start_soon(store.change, lambda _: began.set())
            while not began.is_set():
                await anyio.lowlevel.checkpoint()
            until(lambda: flock.store.files.try_lock(file), "end of the transaction")  # the event loop waits meanwhile
            flock.store.files.unlock(file)


# A damaged file


PAGE = 4096


def fill(client: httpx.Client) -> dict[str, str]:
    """Create runs whose results take between zero and several overflow pages, and return the results by run id."""
    runs = {}
    for n in range(60):
        text, times = f"<{n:02}>", (1, 1, 100, 100, 1500, 1500, 5000, 5000)[n % 8]
        inputs = {"text": text, "times": times}
        run = client.post("/run/flock", json={"agent_name": "repeat", "inputs": inputs}).raise_for_status().json()
        assert run["result"] == {"result": text * times}
        runs[run["run_id"]] = text * times
    return runs


def damage(store: Path, what: str) -> None:
    """Overwrite pages: all except the first, or those that contain only a part of every second run's long result."""
    chance = random.Random(7)
    with contextlib.closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, "the write-ahead log is empty"
        assert db.execute("PRAGMA page_size").fetchone()[0] == PAGE
    whole = store.read_bytes()
    pages = [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]
    assert len(pages) > 100
    results = [f"<{n:02}>".encode() * 100 for n in range(0, 60, 2)]
    for number, page in enumerate(pages[1:], 1):
        if what.startswith("all") or any(page[4:304] in result for result in results):
            pages[number] = bytes(PAGE) if what.endswith("zeros") else chance.randbytes(PAGE)
    with open(store, "r+b") as file:
        file.write(b"".join(pages))


def check_answers(client: httpx.Client, runs: dict[str, str]) -> list[str]:
    """Check that each run is returned correctly or answered 503, and return the results of those with 503."""
    unavailable = []
    for run_id, result in runs.items():
        answer = client.get(f"/run/{run_id}")
        if is_unavailable(answer):
            unavailable.append(result)
        else:
            assert answer.status_code == 200, answer.text
            assert (answer.json()["status"], answer.json()["result"]) == ("completed", {"result": result})
    return unavailable


@pytest.mark.parametrize("what", ["no database", "no header", "all noise", "all zeros"])
def test_a_file_that_is_not_a_store_any_more_is_refused(what: str, flock_file: Path, tmp_path: Path) -> None:
    """The server exits with an error code and a message that says what to do, without a traceback."""
    store = tmp_path / "flock.db"
    if what != "no database":
        with serving(flock_file, store) as (server, client):
            fill(client)
            server.stop()
    if what.startswith("all"):
        damage(store, what)
        words = f"The store {str(store)!r} cannot be opened: database disk image is malformed."
    else:
        store.write_bytes(random.Random(7).randbytes(100) + (store.read_bytes()[100:] if store.exists() else b""))
        words = f"The store {str(store)!r} cannot be opened: file is not a database."
    before = store.read_bytes()
    done = subprocess.run(serve_command(flock_file, store), capture_output=True, text=True, timeout=PATIENCE_S)
    output = done.stdout + done.stderr
    assert done.returncode not in (0, -signal.SIGTERM)
    assert words in output
    assert "use another file (store=, --store)" in output.replace("Use", "use")
    assert "Traceback" not in output
    assert store.read_bytes() == before, "the file is not changed, so its data may still be recovered"


@pytest.mark.parametrize("what", ["some noise", "some zeros"])
def test_a_damaged_file_returns_intact_runs_and_503_for_the_rest(what: str, flock_file: Path, tmp_path: Path) -> None:
    """SQLite has no checksums, but still no response is wrong and none is a 500."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        runs = fill(client)
        server.stop()
    damage(store, what)
    with serving(flock_file, store) as (server, client):
        damaged = [result for result in list(runs.values())[::2] if len(result) > PAGE]
        assert check_answers(client, runs) == damaged
        server.wait_for_line("cannot be read")
        assert client.get("/agents").status_code == 200
        assert server.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("what", ["all noise", "all zeros"])
def test_a_file_damaged_under_a_running_server_causes_no_wrong_response(
    what: str, flock_file: Path, tmp_path: Path
) -> None:
    """The server stays up, returns what is still in its cache, and answers 503 to everything else."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        runs = fill(client)
        check_answers(client, dict(list(runs.items())[:10]))
        damage(store, what)
        assert check_answers(client, runs)
        for sent in (
            submit(client, "length", text="xx"),
            client.post("/run/flock", json={"agent_name": "length", "inputs": {"text": "xx"}}),
            client.post("/run/batch", json={"agent_name": "length", "batch_inputs": [{"text": "xx"}]}),
        ):
            assert is_unavailable(sent), sent.text
        assert check_answers(client, runs)
        server.wait_for_line("cannot be read")
        server.wait_for_line("cannot be written")
        assert client.get("/agents").status_code == 200
        assert server.process.poll() is None


# Several servers on one file


def test_servers_started_at_once_on_a_new_file_all_serve_it(flock_file: Path, tmp_path: Path) -> None:
    """Any of them may create the tables."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        served = list(pool.map(lambda _: stack.enter_context(serving(flock_file, store)), range(3)))
        for server, client in served:
            run_id = accepted(client, "length", text="abc")
            for _, other in served:
                assert ended(other, run_id)["result"] == {"result": 3}
            assert server.process.poll() is None


@pytest.mark.alone
def test_each_run_of_a_killed_server_is_recovered_by_one_other_server(flock_file: Path, tmp_path: Path) -> None:
    """Each of three servers reports every run. One of the two that are left recovers each run of the killed one."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        served = [stack.enter_context(serving(flock_file, store)) for _ in range(3)]
        (doomed, first), *others = served
        pids = [server.process.pid for server, _ in served]
        for pid in pids[1:]:
            (tmp_path / f"go-{pid}").touch()
        own = {n: accepted(served[1 + n % 2][1], "work", n=n) for n in range(20)}
        for n, run_id in own.items():
            for client in (others[0][1], others[1][1], first):
                assert ended(client, run_id)["result"] == {"result": pids[1 + n % 2]}
        left = {n: accepted(first, "work", n=n) for n in range(100, 110)}
        until(lambda: len(starts(tmp_path)) == 30, "beginning of each run")
        for run_id in left.values():
            path = f"/run/{run_id}"
            until(lambda: others[0][1].get(path).json()["status"] == "running", "news of it")  # noqa: B023 - called here

        killed_at = time.monotonic()
        os.kill(doomed.process.pid, signal.SIGKILL)
        for run_id in left.values():
            run = ended(others[0][1], run_id)
            assert run["status"] == "completed"
            assert run["result"]["result"] in pids[1:]
        assert time.monotonic() - killed_at < 6 * slowness(), (
            "two seconds are promised, and a busy machine may take longer"
        )
        assert sorted(n for n, _ in starts(tmp_path)) == sorted([*own, *left, *left]), "a recovered run starts twice"
        until(lambda: [line for server, _ in others for line in server.lines if "resuming 10 runs" in line], "line")
        assert sum("resuming 10 runs" in line for server, _ in others for line in server.lines) == 1


# A suspended process


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def suspend(pid: int, store: Path) -> None:
    """Send SIGSTOP at a moment when the process does not block the writes of all others."""

    def is_suspended() -> bool:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid) == "T", "stop")
        if flock.store.files.is_locked(f"{store}-lock"):
            os.kill(pid, signal.SIGCONT)
            return False
        return True

    until(is_suspended, "moment between two transactions")


def test_a_server_that_resumes_after_its_runs_were_taken_over_overwrites_nothing(
    flock_file: Path, tmp_path: Path
) -> None:
    """The kernel keeps the lock of a stopped process, so the test removes the lock file, as a clean-up script might."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        sleeper, at_sleeper = stack.enter_context(serving(flock_file, store))
        (lock_file,) = tmp_path.glob("flock.db-engine-*")
        other, at_other = stack.enter_context(serving(flock_file, store))
        pid, other_pid = sleeper.process.pid, other.process.pid
        stack.callback(os.kill, pid, signal.SIGCONT)
        run_id = accepted(at_sleeper, "work", n=1)
        batch = {"agent_name": "work", "batch_inputs": [{"n": 10}, {"n": 11}, {"n": 12}], "parallel": False}
        batch_id = at_sleeper.post("/run/batch", json=batch).json()["batch_id"]
        waited_for = pool.submit(at_sleeper.post, "/run/flock", json={"agent_name": "work", "inputs": {"n": 2}})
        until(lambda: len(starts(tmp_path)) == 3, "beginning of each run")
        until(lambda: len(rows(store, "SELECT run_id FROM runs")) == 5, "record of the run that is waited for")
        suspend(pid, store)
        assert flock.store.files.is_locked(str(lock_file)), "a stopped process keeps its lock"
        lock_file.unlink()
        until(lambda: (1, other_pid) in starts(tmp_path), "take-over")
        (tmp_path / f"go-{other_pid}").touch()
        assert ended(at_other, run_id)["result"] == {"result": other_pid}
        until(lambda: at_other.get(f"/batch/{batch_id}").json()["status"] == "completed", "end of the batch")

        def all_rows() -> list[list[tuple[Any, ...]]]:
            return [rows(store, f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("runs", "steps", "batches")]

        before, shown = all_rows(), at_other.get(f"/run/{run_id}").json()
        assert len(before[0]) == 5
        (tmp_path / f"go-{pid}").touch()
        os.kill(pid, signal.SIGCONT)
        sleeper.wait_for_line(f"run {run_id}: it was taken over by another engine")
        answer = waited_for.result(PATIENCE_S).json()
        assert (answer["status"], answer["error_type"]) == ("failed", "interrupted")
        sleeper.wait_for_line(f"run {answer['run_id']}: it was taken over by another engine")
        sleeper.wait_for_line(f"batch {batch_id}: it was taken over by another engine")
        assert all_rows() == before
        assert at_sleeper.get(f"/run/{run_id}").json() == shown
        assert not any("completed" in line and run_id in line for line in sleeper.lines)

        sleeper.wait_for_line("another engine has taken over the runs of this one, which continues with new work")
        assert ended(at_sleeper, accepted(at_sleeper, "work", n=3))["result"] == {"result": pid}
        (tmp_path / f"go-{pid}").unlink()
        last = accepted(at_sleeper, "work", n=4)
        until(lambda: (4, pid) in starts(tmp_path), "beginning")
        os.kill(pid, signal.SIGKILL)
        assert ended(at_other, last)["result"] == {"result": other_pid}, "its runs are recovered again"


def test_a_process_that_keeps_the_store_locked_does_not_block_others_forever(flock_file: Path, tmp_path: Path) -> None:
    """It may be suspended during a commit. Until it continues, the others read, answer 503 and can stop."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        server, client = stack.enter_context(serving(flock_file, store))
        leaving, _ = stack.enter_context(serving(flock_file, store))
        run_id = accepted(client, "length", text="abc")
        shown = ended(client, run_id)
        with open(f"{store}-lock", "ab") as file:
            until(lambda: flock.store.files.try_lock(file), "moment between two transactions")
            late = pool.submit(
                subprocess.run, serve_command(flock_file, store), capture_output=True, text=True, timeout=PATIENCE_S
            )
            code = pool.submit(leaving.stop)
            assert is_unavailable(submit(client, "length", text="abc"))
            server.wait_for_line("another process has kept")
            assert client.get(f"/run/{run_id}").json() == shown
            assert late.result().returncode not in (0, -signal.SIGTERM)
            assert f"The store {str(store)!r} cannot be used: another process has kept" in late.result().stderr
            assert "Traceback" not in late.result().stderr
            assert code.result() in (0, -signal.SIGTERM)
        until(lambda: submit(client, "length", text="abc").status_code == 202, "way back")


# A child that outlives its server


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "subprocess"])
def test_a_child_process_of_an_agent_does_not_prevent_recovery(how: str, flock_file: Path, tmp_path: Path) -> None:
    """The next server recovers the runs before it listens, while the child is still alive."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        run_id = accepted(client, "have_child", how=how)
        child = until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip(), "child")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        with serving(flock_file, store) as (successor, client):
            assert any("resuming 1 runs" in line for line in successor.lines), "it recovers before it listens"
            run = ended(client, run_id)
            assert (run["status"], run["result"]) == ("completed", {"result": successor.process.pid})
            assert state_of(int(child)) in "SRD", "the child is alive"


# A clock that jumps


class Clock:
    """The wall clock of this process, which a test can set.

    Setting the machine's own clock would harm others, and no library that fakes it works everywhere. So this replaces
    the two places where the package reads the time. The monotonic clock is the real one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta(0)
        clock, time_ns, seconds = self, time.time_ns, time.time

        class Settable(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + clock.ahead

        monkeypatch.setattr(flock.runs.ids, "_last_id_time", flock.runs.ids._last_id_time)  # restored at the end
        monkeypatch.setattr(time, "time", lambda: seconds() + clock.ahead.total_seconds())
        monkeypatch.setattr(time, "time_ns", lambda: time_ns() + int(clock.ahead.total_seconds()) * 1_000_000_000)
        for module in (flock.runs.ids, flock.store.store):
            monkeypatch.setattr(module, "datetime", Settable)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


DAY = timedelta(days=1)


def clocked_flock() -> Flock:
    flock = Flock("clock")

    @flock.agent(next_agent="second")
    def first(n: int) -> int:
        return n

    @flock.agent
    def second(n: int) -> int:
        return n

    @flock.agent
    async def hang() -> None:
        await anyio.sleep_forever()

    return flock


async def done(engine: EmbeddedEngine, n: int, key: IdempotencyKey | None = None) -> Run:
    with anyio.fail_after(PATIENCE_S):
        run = await engine.submit("first", msgspec.Raw(b'{"n": %d}' % n), key=key)
        return await engine.wait(run.run_id)


async def events_are_whole(engine: EmbeddedEngine, run_id: str) -> bool:
    with anyio.fail_after(PATIENCE_S):
        events = [event async for event in engine.events(run_id) if event]
    names = ["run.started", *["step.started", "step.completed"] * 2, "run.completed"]
    return [event.name for event in events] == names and sorted(e.id or 0 for e in events) == [e.id for e in events]


async def pages(engine: EmbeddedEngine) -> list[str]:
    """Return the ids of all runs, read two at a time."""
    found: list[str] = []
    while page := await engine.list_runs(RunFilter(limit=2, after=found[-1] if found else None)):
        found += [run.run_id for run in page]
        assert len(found) < 100
    return found


@pytest.mark.anyio
async def test_runs_keep_their_order_when_the_clock_is_set_back(clock: Clock, tmp_path: Path) -> None:
    """Lists, cursors, events and idempotency keys go by ids. Only the reported times go back."""
    async with clocked_flock().engine(store=tmp_path / "flock.db") as engine:
        key, later_key = IdempotencyKey("before", b"1"), IdempotencyKey("after", b"1")
        runs = [await done(engine, 0, key), await done(engine, 1), await done(engine, 2)]
        clock.ahead = -DAY
        runs += [await done(engine, 3), await done(engine, 4, later_key)]
        assert [run.status for run in runs] == [RunStatus.COMPLETED] * 5
        assert datetime.now(UTC) - runs[3].created_at > DAY / 2
        assert runs[3].created_at <= (runs[3].completed_at or runs[0].created_at) < runs[0].created_at
        assert await pages(engine) == [run.run_id for run in reversed(runs)]
        for run in runs:
            assert await events_are_whole(engine, run.run_id)
        await engine.store.delete_old_keys(flock.runs.now() - DAY)
        for again, run in ((key, runs[0]), (later_key, runs[4])):
            with pytest.raises(Replayed) as caught:
                await done(engine, 9, again)
            assert caught.value.made_id == run.run_id
        clock.ahead = timedelta(0)
        runs.append(await done(engine, 5))
        assert await pages(engine) == [run.run_id for run in reversed(runs)]


@pytest.mark.parametrize("ahead", [3 * DAY, -DAY], ids=["ahead", "back"])
@pytest.mark.anyio
async def test_no_duration_is_that_of_a_clock_that_is_set_during_a_run(
    ahead: timedelta, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logs, metrics and spans take their durations from the times of the record."""
    flock, set_ahead = Flock("clock"), anyio.Event()

    @flock.agent
    async def jump(context: RunContext) -> None:
        def inside() -> None:
            clock.ahead = ahead

        await context.call(inside)

    @flock.agent
    async def hang() -> None:
        clock.ahead = ahead
        set_ahead.set()
        await anyio.sleep_forever()

    caplog.set_level(logging.INFO, "flock.runs")
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        with anyio.fail_after(PATIENCE_S):
            jumped = await engine.wait((await engine.submit("jump", msgspec.Raw(b"{}"))).run_id)
            (calls,) = (await engine.get_calls(jumped)).values()
            clock.ahead = timedelta(0)
            hanging = await engine.submit("hang", msgspec.Raw(b"{}"))
            await set_ahead.wait()
            await engine.cancel_run(hanging.run_id)
            cancelled = await engine.wait(hanging.run_id)
        assert [jumped.status, cancelled.status] == [RunStatus.COMPLETED, RunStatus.CANCELLED]
        assert (await engine.store.outline(cancelled.run_id) or jumped).completed_at == cancelled.completed_at
    ended: list[tuple[datetime, datetime | None]] = [(each.started_at, each.completed_at) for each in calls]
    ended += [(step.started_at, step.completed_at) for step in jumped.steps]
    ended += [(run.created_at, run.completed_at) for run in (jumped, cancelled)]
    for start, end in ended:
        assert end is not None
        assert timedelta(0) <= end - start < timedelta(seconds=PATIENCE_S)
    took = [each.__dict__["duration_ms"] for each in caplog.records if "duration_ms" in each.__dict__]
    assert len(took) == 2
    assert all(0 <= each < PATIENCE_S * 1000 for each in took)


@pytest.mark.anyio
async def test_the_newest_runs_are_kept_whatever_the_clock_says(clock: Clock, tmp_path: Path) -> None:
    """``keep_runs`` is a number of runs, so it applies at once and not only when the clock has caught up."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_runs=3) as engine:
        runs = [await done(engine, n) for n in range(3)]
        clock.ahead = -DAY
        runs += [await done(engine, n) for n in range(3, 5)]
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs[2:])]


@pytest.mark.anyio
async def test_the_newest_runs_are_kept_by_the_next_process_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine whose clock was ahead restarts with the right time, and its new runs are not taken for the oldest."""
    clock.ahead = DAY
    monkeypatch.setattr(flock.runs.ids, "_last_id_time", 0)
    async with clocked_flock().engine(store=tmp_path / "flock.db") as engine:
        runs = [await done(engine, n) for n in range(3)]
    clock.ahead = timedelta(0)
    monkeypatch.setattr(flock.runs.ids, "_last_id_time", 0)  # as in a new process
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_runs=2) as engine:
        runs.append(await done(engine, 3))
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs[2:])]


@pytest.mark.anyio
async def test_runs_are_kept_by_age_when_the_clock_is_set_back(clock: Clock, tmp_path: Path) -> None:
    """No run is deleted too early, and all are deleted when the clock says that they are old."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_for_s=3600) as engine:
        runs = [await done(engine, 0)]
        clock.ahead = -DAY
        runs.append(await done(engine, 1))
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs)]
        clock.ahead = 2 * DAY
        await engine.delete_old()
        assert await pages(engine) == []


@pytest.mark.anyio
@pytest.mark.parametrize("jump", [-DAY, DAY], ids=["back", "forward"])
async def test_timeouts_do_not_depend_on_the_wall_clock(jump: timedelta, clock: Clock, tmp_path: Path) -> None:
    """This holds for timeouts of runs, of the queue and of waiting clients."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", max_concurrency=1, queue_timeout_s=0.6) as engine:
        began = anyio.current_time()
        run = await engine.submit("hang", msgspec.Raw(b"{}"), timeout_s=3)
        queued = await engine.submit("first", msgspec.Raw(b'{"n": 1}'))
        with anyio.fail_after(PATIENCE_S):
            while (await engine.get_run(run.run_id)).status is RunStatus.STARTING:  # noqa: ASYNC110 - as a client
                await anyio.sleep(0.01)
            clock.ahead = jump
            assert (await engine.wait(run.run_id, timeout_s=0.1)).status is RunStatus.RUNNING
            assert anyio.current_time() - began >= 0.1
            queued = await engine.wait(queued.run_id)
            assert anyio.current_time() - began >= 0.6
            run = await engine.wait(run.run_id)
            assert anyio.current_time() - began >= 1
        assert (queued.status, queued.error_type) == (RunStatus.FAILED, "queue_timeout")
        assert (run.status, run.error_type) == (RunStatus.FAILED, "timeout")
        assert (await done(engine, 2)).status is RunStatus.COMPLETED


async def test_other_errors_do_not_hide_that_a_record_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the run would be read for ever."""
    damaged = DamagedRecord("damaged")
    damaged.is_writable, damaged.__cause__ = False, sqlite3.DatabaseError("malformed")
    errors = iter([StoreError("locked")] * (runner.MAX_READS + 1) + [damaged] * runner.MAX_READS)

    async def read() -> None:
        raise next(errors)

    monkeypatch.setattr(runner, "RETRY_AFTER_S", 0)
    with pytest.raises(Unreadable):
        await runner.StoredRun._read(SimpleNamespace(wake=lambda: None), read)  # type: ignore[arg-type]
    assert next(errors, None) is None

"""Queued runs and unread results stay in the store, not in memory. Uses real servers, sockets and files."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import time
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from anyio.lowlevel import checkpoint
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flock import fair
from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict, EngineFull, Replayed, RunNotFound, StoreError
from flock.formats import FORMATS
from flock.rows.items import item_pages
from flock.rows.results import results_as
from flock.runs import (
    BatchOptions,
    IdempotencyKey,
    LongJSON,
    Page,
    Run,
    RunStatus,
)
from flock.runs.records import LONG_BYTES
from flock.store.port import DamagedRecord
from flockapi import create_app
from tests.support import PATIENCE_S, WORKERS
from tests.support.engines import counting_turns, ended, sqlite_of, until
from tests.support.http import client_of
from tests.support.servers import Served, Server, memory_kib, serving
from tests.support.sockets import connected, read_to_end

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports the memory")

FLOCK = """
import anyio
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("waiting")

@flock.agent
async def nap(seconds: float, text: str = "") -> str:
    await anyio.sleep(seconds)
    return "awake"

@flock.agent
async def long(n: int) -> str:
    return "x" * n

@flock.agent
async def asks(context: RunContext, questions: int) -> None:
    async with anyio.create_task_group() as tasks:
        for number in range(questions):
            tasks.start_soon(context.ask, f"{number} " + "x" * 7000, bool)
"""
RUNS = 40
RUN_BYTES = 1_000_000
#: Much less than RUNS * RUN_BYTES, and more than a server needs for the requests themselves.
MAX_GROWTH_KIB = 20 * 1024


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("waiting") / "waiting.py"
    path.write_text(FLOCK)
    return path


def nap(seconds: float = 3000, length: int = RUN_BYTES) -> dict[str, Any]:
    return {"seconds": seconds, "text": "x" * length}


def occupy(server: Server, workers: int) -> None:
    """Take the one slot of each worker."""
    running = 0
    while running < workers:
        run = {"agent_name": "nap", "inputs": nap(length=0), "async_run": True}
        assert httpx.post(f"{server.url}/run/flock", json=run).status_code == 202
        running = len(httpx.get(f"{server.url}/runs?status=running").json()["runs"])


def waiting(server: Server) -> int:
    return len(httpx.get(f"{server.url}/runs?status=starting&limit=1000").json()["runs"])


def submit_run(client: httpx.Client) -> httpx.Response:
    return client.post("/run/flock", json={"agent_name": "nap", "inputs": nap(), "async_run": True})


def submit_batch(client: httpx.Client) -> httpx.Response:
    items = [{"seconds": 3000}, nap()]
    return client.post("/run/batch", json={"agent_name": "nap", "batch_inputs": items, "parallel": False})


@needs_proc
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("submit", [submit_run, submit_batch])
def test_queued_runs_are_not_in_memory_before_or_after_a_crash(
    submit: Callable[[httpx.Client], httpx.Response], workers: int, script: Path, tmp_path: Path
) -> None:
    """250 runs of 1 MB took 344 MB, and as much again after a restart."""
    with serving(script, tmp_path, "--max-concurrency", "1", workers=workers) as server:
        occupy(server, workers)
        idle_kib = memory_kib(server)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(RUNS):
                assert submit(client).status_code == 202
        grown_kib = [memory_kib(server) - idle_kib]
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with serving(script, tmp_path, "--max-concurrency", "1", workers=workers) as server:
        server.wait_for_line("resuming", times=workers)
        grown_kib.append(memory_kib(server) - idle_kib)
    assert max(grown_kib) < MAX_GROWTH_KIB, grown_kib


@needs_proc
def test_a_queued_synchronous_request_does_not_hold_its_body(script: Path, tmp_path: Path) -> None:
    body = json.dumps({"agent_name": "nap", "inputs": nap()}).encode()
    head = (
        b"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    with serving(script, tmp_path, "--max-concurrency", "1") as server, contextlib.ExitStack() as stack:
        occupy(server, 1)
        idle_kib = memory_kib(server)
        for number in range(RUNS):
            stack.enter_context(connected(server, head % len(body) + body))
            while waiting(server) <= number:
                pass
        assert memory_kib(server) - idle_kib < MAX_GROWTH_KIB


async def load(server: Server, count: int, agent_name: str, inputs: Any) -> None:
    """Send *count* runs at once. Return when none is queued or running."""
    run = {"agent_name": agent_name, "inputs": inputs, "async_run": True}
    async with httpx.AsyncClient(
        base_url=server.url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=50)
    ) as client:

        async def send() -> None:
            assert (await client.post("/run/flock", json=run)).status_code == 202

        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(send)
        with anyio.fail_after(PATIENCE_S):
            for status in ("starting", "running"):
                while (await client.get(f"/runs?status={status}")).json()["runs"]:  # noqa: ASYNC110 - no event for it
                    await anyio.sleep(0.2)


@needs_proc
@pytest.mark.slow
def test_waiting_runs_use_no_memory_and_what_is_freed_is_given_back(script: Path, tmp_path: Path) -> None:
    """A server kept 480 MB: cycles of the tasks that had ended. 107 are left, free pools of Python's allocator."""
    with serving(script, tmp_path) as server:
        idle_kib = memory_kib(server)
        anyio.run(load, server, 20, "asks", {"questions": 800})
        until = time.monotonic() + PATIENCE_S
        while (kept_kib := memory_kib(server) - idle_kib) > 200 * 1024 and time.monotonic() < until:
            time.sleep(0.5)  # memory has no event
        assert kept_kib <= 200 * 1024, kept_kib


@needs_proc
@pytest.mark.slow
def test_a_second_load_takes_no_more_memory_than_the_first(script: Path, tmp_path: Path) -> None:
    """What 1,000 runs at once leave, about 20 MB of free pools of Python's allocator, is used by the next ones."""
    with serving(script, tmp_path, "--max-queue", "2000") as server:
        anyio.run(load, server, 1000, "nap", nap(0, 0))
        loaded_kib = memory_kib(server)
        anyio.run(load, server, 1000, "long", {"n": 0})
        assert memory_kib(server) - loaded_kib < 8 * 1024


LONG_RESULT = 8_000_000


def get_request(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()


def long_run(server: Server) -> str:
    """Return the path of a run with a long result."""
    run = {"agent_name": "long", "inputs": {"n": LONG_RESULT}, "async_run": True}
    path = f"/run/{httpx.post(f'{server.url}/run/flock', json=run).json()['run_id']}"
    assert httpx.head(f"{server.url}{path}?wait=60", timeout=60).headers["flock-run-status"] == "completed"
    return path


@needs_proc
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("suffix", ["/events", ""])
def test_stalled_readers_do_not_hold_a_long_result_in_memory(
    suffix: str, workers: int, script: Path, tmp_path: Path
) -> None:
    """20 of them took 485 MB for a result of 8 MB, which is stored twice: with the run and with its step."""
    with serving(script, tmp_path, workers=workers) as server, contextlib.ExitStack() as stack:
        path = long_run(server) + suffix
        idle_kib = memory_kib(server)
        unread = [stack.enter_context(connected(server, get_request(path), size)) for size in (None, *[4096] * 19)]
        for connection in unread:
            assert connection.recv(1) == b"H"
        grown_kib = memory_kib(server) - idle_kib
        assert grown_kib < len(unread) * LONG_RESULT // 1024 // 2, "less than half of the results themselves"
        head, _, body = read_to_end(unread[0]).partition(b"\r\n\r\n")
        assert body.count(b"x") == 2 * LONG_RESULT
        if not suffix:
            assert b"content-length: %d" % len(body) in head
            assert httpx.head(server.url + path).headers["content-length"] == str(len(body))
            assert json.loads(body)["result"] == json.loads(body)["steps"][0]["result"]


# One engine


class Work:
    """A flock with agents that hold their slot, and others that return their inputs."""

    def __init__(self) -> None:
        self.flock, self.calls, self.may_go, self.started = Flock(), list[str](), anyio.Event(), anyio.Event()

        @self.flock.agent
        async def hold() -> int:
            self.started.set()
            await self.may_go.wait()
            return 1

        @self.flock.agent(next_agent="last")
        async def first(text: str) -> str:
            self.calls.append("first")
            await checkpoint()
            return text[::-1]

        @self.flock.agent
        async def last(text: str, result: str) -> str:
            self.calls.append("last")
            return text + result

        @self.flock.agent
        async def read(text: str) -> int:
            self.calls.append("read")
            return len(text)

        @self.flock.agent(max_concurrency=1)
        async def lane(text: str) -> int:
            self.calls.append("lane")
            self.started.set()
            await self.may_go.wait()
            return len(text)

    @contextlib.asynccontextmanager
    async def busy(self, **options: Any) -> AsyncIterator[EmbeddedEngine]:
        """Open an engine whose only slot is taken until ``may_go`` is set."""
        async with self.flock.engine(**{"max_concurrency": 1, **options}) as engine:
            await engine.submit("hold", {})
            await self.started.wait()
            yield engine
            self.may_go.set()


TEXT = {"text": "ab" * 1000}


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return ":memory:" if request.param == "memory" else str(tmp_path / "flock.db")


async def end_of(engine: EmbeddedEngine, run: Run) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


def held(engine: EmbeddedEngine, run: Run) -> Run:
    """Return what the engine has of a run in memory."""
    return engine._runner.active[run.run_id].run


async def until_only_in_store(engine: EmbeddedEngine, run: Run) -> None:
    await until(lambda: held(engine, run).is_stub)


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_queued_run_has_its_inputs_and_results_at_each_step(is_async: bool, store: str) -> None:
    """Between two steps it queues again, after the runs that arrived meanwhile."""
    work = Work()
    async with work.busy(store=store) as engine:
        runs = [await engine.submit("first", TEXT, is_async=is_async) for _ in range(3)]
        for run in runs:
            await until_only_in_store(engine, run)
        work.may_go.set()
        for run in runs:
            whole = await end_of(engine, run)
            assert (whole.status, whole.error) == (RunStatus.COMPLETED, None)
            assert bytes(whole.inputs) == json.dumps(TEXT, separators=(",", ":")).encode()
            assert json.loads(bytes(whole.result or b"")) == {"result": TEXT["text"] + TEXT["text"][::-1]}
            assert [step.agent_name for step in whole.steps] == ["first", "last"]
        assert work.calls == ["first"] * 3 + ["last"] * 3


@pytest.mark.anyio
async def test_a_queued_run_can_be_read(store: str) -> None:
    """Its record and its events are complete."""
    work = Work()
    async with work.flock.engine(store=store, max_concurrency=2) as engine:
        holders = [await engine.submit("lane", TEXT)]
        await work.started.wait()
        run = await engine.submit("lane", TEXT)
        await until_only_in_store(engine, run)
        assert json.loads(bytes((await engine.get_run(run.run_id)).inputs)) == TEXT
        assert json.loads(bytes((await engine.wait(run.run_id, 0)).inputs)) == TEXT
        events = engine.events(run.run_id)
        work.may_go.set()
        names = [event.name async for event in events if event]
        assert names == ["run.started", "step.started", "step.completed", "run.completed"]
        assert (await end_of(engine, holders[0])).status is RunStatus.COMPLETED


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_queued_run_can_be_cancelled_and_retried(is_async: bool, store: str) -> None:
    work = Work()
    async with work.busy(store=store) as engine:
        run = await engine.submit("read", TEXT, is_async=is_async)
        await until_only_in_store(engine, run)
        await engine.cancel_run(run.run_id)
        cancelled = await end_of(engine, run)
        assert cancelled.status is RunStatus.CANCELLED
        assert json.loads(bytes(cancelled.inputs)) == TEXT
        again = await engine.retry_run(run.run_id)
        work.may_go.set()
        assert (await end_of(engine, again)).status is RunStatus.COMPLETED
        assert work.calls == ["read"]


@pytest.mark.anyio
async def test_a_run_that_is_queued_too_long_fails(store: str) -> None:
    work = Work()
    async with work.busy(store=store, queue_timeout_s=0.05) as engine:
        failed = await end_of(engine, await engine.submit("read", TEXT))
        assert (failed.status, failed.error_type) == (RunStatus.FAILED, "queue_timeout")
        assert json.loads(bytes(failed.inputs)) == TEXT


@pytest.mark.anyio
async def test_a_run_that_gets_a_slot_at_once_is_not_reread(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work()
    async with work.flock.engine(store=store) as engine:
        read: list[str] = []
        monkeypatch.setattr(engine.store, "get_run", read.append)
        for is_async in (True, False):
            assert (await end_of(engine, await engine.submit("first", TEXT, is_async=is_async))).result is not None
        assert read == []


@pytest.mark.anyio
async def test_a_queued_run_is_not_lost_if_the_store_cannot_be_read(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that waits for it gets an error, and the run resumes when the store can be read again."""
    work = Work()
    async with work.busy(store=store) as engine:
        run = await engine.submit("read", TEXT, is_async=False)
        await until_only_in_store(engine, run)
        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "get_run", failing)
            work.may_go.set()
            with pytest.raises(StoreError):
                await end_of(engine, run)
            assert work.calls == []
        await until(lambda: run.run_id not in engine._runner.active)
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED


def failing(run_id: str) -> Run:
    raise StoreError("The store cannot be read now.")


def write(path: str, query: str, *values: Any) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as db:
        assert db.execute(query, values).rowcount == 1


@pytest.mark.anyio
async def test_a_run_damaged_while_it_is_queued_fails_as_unreadable(tmp_path: Path) -> None:
    work, path = Work(), str(tmp_path / "flock.db")
    async with work.busy(store=path) as engine:
        run = await engine.submit("read", TEXT)
        await until_only_in_store(engine, run)
        write(path, "UPDATE runs SET inputs = x'ff' WHERE run_id = ?", run.run_id)
        work.may_go.set()
        failed = await end_of(engine, run)
        assert (failed.status, failed.error_type) == (RunStatus.FAILED, "unreadable")
        assert work.calls == []


@pytest.mark.anyio
async def test_a_damaged_run_that_cannot_be_written_is_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing it would fail the other writes of the same transaction."""
    work = Work()

    def damaged(run_id: str) -> Run:
        error = DamagedRecord("The store cannot be read now.")
        error.is_writable = False
        raise error from sqlite3.DatabaseError()

    async with work.busy(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("read", TEXT)
        await until_only_in_store(engine, run)
        with monkeypatch.context() as patch:
            patch.setattr(engine.store, "get_run", damaged)
            work.may_go.set()
            await until(lambda: run.run_id not in engine._runner.active)
            with pytest.raises(StoreError):
                await engine.wait(run.run_id)
        assert (await engine.get_run(run.run_id)).status is RunStatus.STARTING
        assert work.calls == []


@pytest.mark.anyio
async def test_a_queued_run_that_another_engine_took_over_is_not_started(tmp_path: Path) -> None:
    work, path = Work(), str(tmp_path / "flock.db")
    async with work.busy(store=path) as engine:
        run = await engine.submit("read", TEXT)
        await until_only_in_store(engine, run)
        write(path, "UPDATE runs SET owner = 'another' WHERE run_id = ?", run.run_id)
        work.may_go.set()
        await until(lambda: run.run_id not in engine._runner.active)
        assert work.calls == []
        assert (await engine.get_run(run.run_id)).status is RunStatus.STARTING


@pytest.mark.anyio
async def test_a_drain_leaves_queued_runs_to_the_next_start(tmp_path: Path) -> None:
    work, path = Work(), str(tmp_path / "flock.db")
    async with work.busy(store=path) as engine:
        run, at_once = await engine.submit("read", TEXT), await engine.submit("read", TEXT, is_async=False)
        await until_only_in_store(engine, run)
        await until_only_in_store(engine, at_once)
        await engine.drain(0)
        assert (await engine.wait(at_once.run_id)).error_type == "interrupted"
    async with work.flock.engine(store=path) as engine:
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
        assert (await engine.get_run(at_once.run_id)).error_type == "interrupted"
    assert work.calls == ["read"]


@pytest.mark.anyio
async def test_long_items_of_a_batch_are_read_when_they_run(store: str) -> None:
    work = Work()
    texts = [{"text": "x" * length} for length in (1, 2 * LONG_BYTES, 2000, 3 * LONG_BYTES)]
    async with work.busy(store=store, max_concurrency=2) as engine:
        batch = await engine.submit_batch("read", texts, BatchOptions(max_workers=4))
        assert (await ended(engine, batch)).failed_items == 0
        items = await engine.get_items(batch.batch_id)
        assert [json.loads(bytes(item.result or b"")) for item in items] == [
            {"result": len(item["text"])} for item in texts
        ]


# Long results


@pytest.mark.anyio
async def test_events_read_a_long_result_from_the_store(store: str) -> None:
    work = Work()
    text = "é" * LONG_BYTES
    async with work.flock.engine(store=store) as engine:
        run = await end_of(engine, await engine.submit("first", {"text": text}))
        results = {
            event.name + str(event.data.get("position", "")): event.data["result"]
            async for event in engine.events(run.run_id)
            if event and "result" in event.data
        }
        expected = {"step.completed0": text, "step.completed1": 2 * text, "run.completed": 2 * text}
        assert results.keys() == expected.keys()
        for name, long in results.items():
            assert isinstance(long, LongJSON)
            pieces = [piece async for piece in long.pieces()]
            assert max(map(len, pieces)) <= 2 * LONG_BYTES
            assert len(b"".join(pieces)) == long.length
            assert json.loads(b"".join(pieces)) == {"result": expected[name]}
        await engine.delete_run(run.run_id)
        with pytest.raises(RunNotFound):
            await anext(long.pieces())


@pytest.mark.anyio
async def test_streaming_events_takes_no_longer_than_a_few_reads_of_the_run(store: str) -> None:
    """For 20 steps they took as long as 42 reads."""
    flock = Flock()

    @flock.agent(output="n: int, text: str", next_agent=lambda result: "again" if result["n"] < 20 else None)
    async def again(n: int) -> dict[str, Any]:
        return {"n": n + 1, "text": "x" * 300_000}

    async with flock.engine(store=store) as engine:
        run = await end_of(engine, await engine.submit("again", {"n": 0}))
        assert len(run.steps) == 20
        reads_s, events_s = list[float](), list[float]()
        for _ in range(3):  # the least of them is without a collection of the garbage of other tests
            started_s = time.process_time()
            for _ in range(10):
                await engine.get_run(run.run_id)
            read_at_s = time.process_time()
            events = [event async for event in engine.events(run.run_id)]
            assert len(events) == 42
            events_s.append(time.process_time() - read_at_s)
            reads_s.append(read_at_s - started_s)
        assert min(events_s) < min(reads_s)


@pytest.mark.anyio
async def test_events_reread_a_record_only_if_it_has_changed(tmp_path: Path) -> None:
    """Even after an unrelated commit by another process."""
    work, path, names = Work(), str(tmp_path / "flock.db"), list[str]()
    async with work.busy(store=path) as engine, work.flock.engine(store=path) as other:
        run = await engine.submit("read", TEXT)
        statements: list[str] = []
        sqlite_of(other)._reader.set_trace_callback(statements.append)

        def about_run() -> list[str]:
            return [statement for statement in statements if run.run_id in statement]

        async def follow() -> None:
            names.extend([event.name async for event in other.events(run.run_id) if event])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            for _ in range(3):
                seen = len(about_run())
                await until(lambda seen=seen: len(about_run()) > seen)  # type: ignore[misc]
                write(path, "UPDATE flocks SET agents = agents || ' '")  # SQLite does not write equal values
            assert sum("created_at" in statement for statement in about_run()) == 1
            work.may_go.set()
        assert names == ["run.started", "step.started", "step.completed", "run.completed"]


@pytest.mark.anyio
async def test_an_event_that_cannot_be_read_completely_is_left_unterminated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A browser ignores an event without an empty line after it, and requests it again."""
    work = Work()
    engine = work.flock.engine()
    app = create_app(work.flock, engine=engine, auth="anybody")
    async with app.lifespan():
        run = await end_of(engine, await engine.submit("first", {"text": "x" * 3 * LONG_BYTES}))
        read_result = engine.store.read_result

        async def read_only_the_start(run_id: str, position: int | None, start: int, length: int) -> bytes:
            if start == 0:
                return await read_result(run_id, position, start, length)
            engine._runner.is_draining = True
            raise StoreError("The store cannot be read now.")

        monkeypatch.setattr(engine.store, "read_result", read_only_the_start)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            text = (await client.get(f"/run/{run.run_id}/events")).text
        *events, last = text.split("\n\n")
        assert [event.partition("event: ")[2].partition("\n")[0] for event in events] == ["run.started", "step.started"]
        assert "step.completed" in last
        assert not last.endswith("\n")


def test_an_answer_is_cut_off_if_its_run_is_deleted_meanwhile(script: Path, tmp_path: Path) -> None:
    """It ends before its announced length, so no client mistakes it for complete."""
    with serving(script, tmp_path) as server:
        path = long_run(server)
        with connected(server, get_request(path), 4096) as connection:
            assert connection.recv(1)
            assert httpx.delete(server.url + path).status_code == 204
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1_000_000):
                    received += len(part)
            assert received < 2 * LONG_RESULT
        server.wait_for_line("the response was cut off")
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert sum("was cut off" in line or "Traceback" in line for line in server.lines) == 1


@pytest.mark.anyio
async def test_retention_deletes_no_run_whose_result_is_being_sent(store: str) -> None:
    work = Work()
    engine = work.flock.engine(store=store, keep_for_s=0)

    def retaining(app: ASGIApp) -> ASGIApp:
        """Apply the retention before each part of an answer."""

        async def with_retention(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_later(message: Message) -> None:
                await engine.delete_old()
                await send(message)

            await app(scope, receive, send_later)

        return with_retention

    app = create_app(work.flock, engine=engine, auth="anybody", middleware=[Middleware(retaining)])
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            run = {"agent_name": "last", "inputs": {"text": "x" * 5 * LONG_BYTES, "result": ""}}
            answer = await client.post("/run/flock", json=run)
        assert answer.json()["result"] == {"result": "x" * 5 * LONG_BYTES}
        await engine.delete_old()
        with pytest.raises(RunNotFound):
            await engine.get_run(answer.json()["run_id"])


@pytest.mark.anyio
async def test_a_refused_retry_reads_its_run_once(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 15 MB takes 2 ms to read."""
    work = Work()
    async with work.flock.engine(store=store) as engine:
        run = await end_of(engine, await engine.submit("last", {"text": "x", "result": ""}))
        read, outline = list[str](), engine.store.outline

        async def counted_outline(run_id: str) -> Run | None:
            read.append(run_id)
            return await outline(run_id)

        monkeypatch.setattr(engine.store, "outline", counted_outline)
        with pytest.raises(Conflict):
            await engine.retry_run(run.run_id)
        assert read == [run.run_id]


@pytest.mark.anyio
async def test_other_tasks_run_between_the_pieces_of_a_long_result(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    work = Work()
    async with work.flock.engine(store=store) as engine:
        run = await end_of(engine, await engine.submit("last", {"text": "x" * 20 * LONG_BYTES, "result": ""}))
        long = await engine.shown_result(run)
        assert isinstance(long, LongJSON)
        async with counting_turns() as turns:
            pieces = [piece async for piece in long.pieces()]
    assert turns[0] >= len(pieces) >= 10


@pytest.mark.anyio
@pytest.mark.alone
async def test_long_results_that_are_downloaded_at_once_do_not_hold_the_event_loop(tmp_path: Path) -> None:
    """Reading 16 results of 15 MB held it for up to 3.7 s of processor time, since the clients are fast."""
    flock, bodies = Flock(), list[int]()

    @flock.agent
    async def long(mb: int) -> str:
        return "x" * mb * 1_000_000

    def download(path: str) -> None:
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client, client.stream("GET", path) as response:
            bodies.append(sum(map(len, response.iter_raw())))

    app, longest_s = create_app(flock, store=str(tmp_path / "flock.db"), auth="anybody"), 0.0
    async with Served(app) as server:
        run = await app.engine.wait((await app.engine.submit("long", {"mb": 15})).run_id)
        async with anyio.create_task_group() as tasks:
            for _ in range(16):
                tasks.start_soon(anyio.to_thread.run_sync, download, f"/run/{run.run_id}")
            at = time.thread_time()
            while len(bodies) < 16:
                await checkpoint()
                at, before = time.thread_time(), at
                longest_s = max(longest_s, at - before)
    assert min(bodies) > 2 * 15_000_000
    assert longest_s < 0.25


# The byte limit of the queue


@pytest.mark.anyio
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_queue_at_its_byte_limit_refuses_runs_until_another_leaves_it(is_async: bool, store: str) -> None:
    """A request that was accepted before is still replayed."""
    work = Work()
    async with work.busy(store=store, max_queue_bytes=5000) as engine:
        key = IdempotencyKey("key", b"")
        runs = [await engine.submit("read", TEXT, key=key)]
        runs += [await engine.submit("read", TEXT, is_async=is_async) for _ in range(2)]
        with pytest.raises(EngineFull, match="max_queue_bytes"):
            await engine.submit("read", {"text": ""}, is_async=is_async)
        with pytest.raises(Replayed):
            await engine.submit("read", TEXT, key=key)
        await engine.cancel_run(runs.pop().run_id)
        await until(lambda: engine._runner.queued_bytes.total() < 5000)
        runs.append(await engine.submit("read", TEXT, is_async=is_async))
        work.may_go.set()
        for run in runs:
            assert (await end_of(engine, run)).status is RunStatus.COMPLETED
        assert engine._runner.queued_bytes.total() == 0


@pytest.mark.anyio
async def test_one_principal_can_use_half_of_the_queue_bytes(store: str) -> None:
    work = Work()
    async with work.busy(store=store, max_queue_bytes=5000) as engine:
        for _ in range(2):
            await engine.submit("read", TEXT, principal="ann")
        with pytest.raises(EngineFull, match="this caller"):
            await engine.submit("read", TEXT, principal="ann")
        await engine.submit("read", TEXT, principal="bob")


@pytest.mark.anyio
async def test_concurrent_retries_count_toward_the_queue_bytes(store: str) -> None:
    work = Work()
    async with work.busy(store=store, max_queue_bytes=5000) as engine:
        ids = []
        for _ in range(10):
            run = await engine.submit("read", TEXT)
            await engine.cancel_run(run.run_id)
            ids.append((await end_of(engine, run)).run_id)
        ends = await asyncio.gather(*map(engine.retry_run, ids), return_exceptions=True)
        assert [type(end) for end in ends] == [Run] * 3 + [EngineFull] * 7
        work.may_go.set()


@pytest.mark.anyio
async def test_a_run_interrupted_before_its_second_step_is_answered_with_its_first(store: str) -> None:
    work, ended = Work(), list[Run]()

    @work.flock.agent(next_agent="lane")
    async def before(text: str) -> str:
        return text[::-1]

    async with anyio.create_task_group() as tasks:

        async def wait(run_id: str) -> None:
            ended.append(await engine.wait(run_id))

        async with work.flock.engine(store=store) as engine:
            await engine.submit("lane", {"text": ""})
            await work.started.wait()
            run = await engine.submit("before", TEXT, is_async=False)
            tasks.start_soon(wait, run.run_id)
            await until_only_in_store(engine, run)
    assert [(end.status, end.error_type) for end in ended] == [(RunStatus.FAILED, "interrupted")]
    assert [msgspec.json.decode(step.result) for step in ended[0].steps] == [{"result": TEXT["text"][::-1]}]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_server_at_its_queue_byte_limit_answers_429(workers: int, script: Path, tmp_path: Path) -> None:
    options = ("--max-concurrency", "1", "--max-queue-bytes", "1000000")
    with serving(script, tmp_path, *options, workers=workers) as server:
        occupy(server, workers)
        short = waiting(server)
        with httpx.Client(base_url=server.url, timeout=60) as client:
            answers = (submit_run(client) for _ in itertools.count())
            refused = next(answer for answer in answers if answer.status_code != 202)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "max_queue_bytes" in refused.json()["detail"]
        assert waiting(server) - short <= workers


# Downloads and pages

#: The others are written to a file first; see ``test_binary_formats``.
TEXT_FORMATS = [name for name in FORMATS if name not in ("xlsx", "parquet")]


@pytest.mark.anyio
@pytest.mark.parametrize("format_", TEXT_FORMATS)
async def test_a_stalled_download_does_not_hold_the_records_of_its_page(format_: str) -> None:
    """It holds only the text that is being sent."""
    work, read = Work(), list[weakref.ref[Page[Run]]]()
    async with work.flock.engine() as engine:
        batch = await ended(engine, await engine.submit_batch("read", [TEXT] * 2, BatchOptions()))
        get_items = engine.get_items

        async def weak_items(*args: Any, **options: Any) -> Page[Run]:
            page = Page[Run](1)
            page += await get_items(*args, **options)
            read.append(weakref.ref(page))
            return page

        engine.get_items = weak_items  # type: ignore[method-assign]
        stream = results_as(format_, item_pages(engine, batch.batch_id), (), (None, None), True)
        await anext(stream)
        assert TEXT["text"].encode() in await anext(stream)
        assert [page() for page in read] == [None]


@pytest.mark.anyio
@pytest.mark.parametrize("format_", TEXT_FORMATS)
async def test_other_tasks_run_between_the_items_of_a_download(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the client is faster than the server, which then never waits for it."""
    monkeypatch.setattr(fair, "SHARE_S", 0)
    work = Work()
    async with work.flock.engine() as engine:
        batch = await ended(engine, await engine.submit_batch("read", [TEXT] * 100, BatchOptions()))
        async with counting_turns() as turns:
            stream = results_as(format_, item_pages(engine, batch.batch_id), (), (None, None), True)
            text = b"".join([piece async for piece in stream])
    assert text.count(TEXT["text"].encode()) >= 100
    assert turns[0] >= 100


@pytest.mark.anyio
@pytest.mark.parametrize("suffix", ["/results", "?limit=1000"])
async def test_concurrent_downloads_of_a_principal_are_limited(suffix: str) -> None:
    """A short page is always sent, and a slot is free again when a client disconnects."""
    work = Work()
    app = create_app(work.flock, store=":memory:", auth="anybody", max_downloads_per_principal=2)
    statuses: list[int] = []

    async def receive() -> Message:
        await anyio.sleep_forever()
        raise AssertionError

    async def never_read(message: Message) -> None:
        statuses.append(message["status"])
        await anyio.sleep_forever()

    async with app.lifespan(), client_of(app) as client:
        assert isinstance(app.engine, EmbeddedEngine)
        inputs = {"text": "x" * 2 * LONG_BYTES, "result": ""}
        batch = await ended(app.engine, await app.engine.submit_batch("last", [inputs], BatchOptions()))
        path = f"/batch/{batch.batch_id}"
        for _ in range(2):
            statuses.clear()
            scope: dict[str, Any] = {"type": "http", "method": "GET", "headers": [], "query_string": b"limit=1000"}
            scope |= {"path": path + suffix.partition("?")[0], "client": ("127.0.0.1", 1)}  # the address of httpx
            async with anyio.create_task_group() as tasks:
                for _ in range(2):
                    tasks.start_soon(app, {**scope}, receive, never_read)
                await until(lambda: len(statuses) == 2)
                assert statuses == [200, 200]
                refused = await client.get(path + suffix)
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
                assert refused.json()["detail"] == "The limit is 2 open downloads per caller. Close one, or wait."
                assert (await client.get(f"{path}?results=false")).status_code == 200
                tasks.cancel_scope.cancel()
        assert (await client.get(path + suffix)).status_code == 200

"""Cluster-specific behaviour: killed processes, an unavailable cluster, replayed histories."""

import asyncio
import contextlib
import dataclasses
import errno
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from click.testing import CliRunner
from hypercorn.asyncio import serve
from hypercorn.config import Config
from msgspec.structs import replace
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionCount, WorkflowHistory
from temporalio.converter import StorageDriverClaim, StorageDriverRetrieveContext
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner

from flock.agents.versions import version_of
from flock.command.cli import main
from flock.core import Flock
from flock.errors import (
    AgentError,
    BatchNotFound,
    Conflict,
    DefinitionError,
    EngineFull,
    EngineStopped,
    Replayed,
    RunNotFound,
    StoreError,
)
from flock.models.llm import ModelClient
from flock.runs import (
    Batch,
    BatchFilter,
    BatchOptions,
    IdempotencyKey,
    Progress,
    Question,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    Usage,
    new_id,
    now,
)
from flock.runs.events import end_id
from flock.store.statements import REOPENED
from flock.temporal import TemporalEngine, TemporalWorker, batchflows, payloads, suspects, workflows
from flock.temporal.batchflows import FlockBatch, FlockChunk, FlockDelete, FlockRows
from flock.temporal.cluster import Cluster
from flock.temporal.items import ItemActivities
from flock.temporal.messages import (
    CONVERTER,
    Counts,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    Part,
    batch_workflow_id,
    chunk_workflow_id,
    decoded,
    item_id,
    new_batch_id,
    run_workflow_id,
)
from flock.temporal.payloads import PayloadFolder
from flock.temporal.records import reset_for_retry, run_of
from flock.temporal.reports import FlockWebhook
from flock.temporal.search import open_runs
from flock.temporal.steps import Workplace
from flock.temporal.worker import _shut_down
from flock.temporal.workflows import FlockAccount, FlockMark, FlockRun, FlockSession
from flock.testing import FakeModel, Reply
from flockapi import create_app
from tests.support import PATIENCE_S, ROOT, slowness, slowness_meanwhile
from tests.support.cluster import HEARTBEAT_PATIENCE_S, patient, temporal_server
from tests.support.engines import ended, until
from tests.support.flocks import CALLING_TOOLS, Gate, Work, numbers, sample_flock
from tests.support.http import client_of
from tests.support.servers import Server, flockapi_command, free_port, running

pytestmark = pytest.mark.anyio

HISTORIES = Path(__file__).parent / "histories"
EMPTY = msgspec.Raw(b"{}")

#: A flock that logs when each of its agents starts, and in which process.
NOTING = """
import asyncio, os, time
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("noting {name}")

def note(run, agent, key):
    with open({log!r}, "a") as log:
        log.write(f"{{run}} {{agent}} {{os.getpid()}} {{time.time()}} {{key}}\\n")

@flock.agent(next_agent="second")
async def first(n: int, context: RunContext) -> int:
    note(n, "first", context.step_key)
    await asyncio.sleep(0.3)
    return n

@flock.agent
async def second(n: int, context: RunContext) -> int:
    note(n, "second", context.step_key)
    await asyncio.sleep(1)
    return n + 1

@flock.agent(on_interrupt="fail")
async def once(context: RunContext) -> int:
    note("-", "once", context.step_key)
    await asyncio.sleep(60)
    return 1

@flock.agent
async def item(n: int, context: RunContext) -> int:
    note(n, "item", context.step_key)
    try:
        await asyncio.sleep({item_s})
    except asyncio.CancelledError:
        note(n, "stopped", context.step_key)
        raise
    return 2 * n
"""


def test_a_retry_resets_the_same_fields_on_the_cluster_as_in_the_store() -> None:
    """If this fails for a new field of a run, see CONTRIBUTING.md."""
    at = now()
    ended = Run(
        run_id="1",
        flock="flock",
        agent_name="add",
        inputs=EMPTY,
        status=RunStatus.FAILED,
        result=EMPTY,
        error="It failed.",
        error_type="agent_error",
        cancel_requested=True,
        progress=Progress(done=1),
        waiting_for=(Question(call_id="1", question="?", schema=EMPTY, asked_at=now()),),
        worked_s=1.0,
        deaths=1,
        created_at=at,
        started_at=at,
        completed_at=at,
    )
    again = reset_for_retry(ended, keeps_calls=True, by="ann")
    reset = {name for name in Run.__struct_fields__ if getattr(again, name) != getattr(ended, name)}
    assert reset == {*re.findall(r"(\w+) = ", REOPENED)}


class LogEntry(msgspec.Struct):
    run: str
    agent: str
    pid: int
    at: float
    key: str


def entries_in(log: Path) -> list[LogEntry]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [LogEntry(run, agent, int(pid), float(at), key) for run, agent, pid, at, key in map(str.split, lines)]


@contextlib.contextmanager
def working(
    target: Path, address: str, slots: int = 20, options: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run a worker in its own process until the block ends."""
    command = flockapi_command("worker", str(target), "--temporal", address, "--max-concurrency", str(slots), *options)
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    worker = Server(process)
    try:
        worker.wait_for_line("Worker connected to")
        yield process
        process.terminate()  # a clean exit writes its coverage
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    finally:
        process.kill()
        process.wait()
        worker.close()


async def until_started(log: Path, count: int) -> list[LogEntry]:
    with anyio.fail_after(PATIENCE_S):
        while len(found := entries_in(log)) < count:  # noqa: ASYNC110 - other processes report it in a file
            await anyio.sleep(0.02)
    return found


def _restarted(entries: list[LogEntry], seen: set[str], after: float) -> list[LogEntry]:
    """Return the entries *after* that time of items that had started before."""
    return [entry for entry in entries if entry.at > after and entry.run in seen]


@contextlib.asynccontextmanager
async def open_pair(
    flock: Flock, address: str, *, with_worker: bool = True, **options: Any
) -> AsyncIterator[TemporalEngine]:
    async with contextlib.AsyncExitStack() as stack:
        if with_worker:
            models = ModelClient(flock.model)
            folders: dict[str, Any] = {name: options.get(name) for name in ("payload_dir", "files_dir")}
            worker = TemporalWorker(flock.agents, models, address, flock=flock.name, drain_timeout_s=0, **folders)
            await stack.enter_async_context(worker)
        options = {"heartbeat_timeout_s": HEARTBEAT_PATIENCE_S, **options}
        yield await stack.enter_async_context(
            patient(TemporalEngine(flock.agents, address, flock=flock.name, **options))
        )


# Processes


@pytest.mark.alone
async def test_runs_survive_a_killed_worker_and_a_killed_server(temporal_address: str, tmp_path: Path) -> None:
    """All runs end within seconds, and no finished step is repeated. Other servers report the same."""
    target, log = tmp_path / "noting.py", tmp_path / "log"
    flock_text = NOTING.format(name=new_id(), log=str(log), item_s=0.2)
    target.write_text(flock_text.replace("sleep(1)", "sleep(8)"))  # the second steps outlast the start of a worker
    serve = flockapi_command("serve", str(target), "--temporal", temporal_address, "--port", "0")
    with contextlib.ExitStack() as stack:
        doomed = stack.enter_context(working(target, temporal_address))
        here, there = stack.enter_context(running(*serve)), stack.enter_context(running(*serve))
        async with httpx.AsyncClient(base_url=here.url, timeout=60) as client:
            bodies = [{"agent_name": "first", "inputs": {"n": n}, "async_run": True} for n in range(10)]
            bodies.append({"agent_name": "once", "async_run": True})
            sent = [await client.post("/run/flock", json=body) for body in bodies]
            assert {response.status_code for response in sent} == {202}
            run_ids = [response.json()["run_id"] for response in sent]
            await until_started(log, 21)  # all are in their second step, or in their only one
            stack.enter_context(working(target, temporal_address))
            doomed.kill()
            here.process.kill()
            killed_at = time.time()
        async with httpx.AsyncClient(base_url=there.url, timeout=60) as client:
            runs = [(await client.get(f"/run/{run_id}", params={"wait": 30})).json() for run_id in run_ids]
            later = stack.enter_context(running(*serve))
            others = [(await client.get(f"{later.url}/run/{run_id}")).json() for run_id in run_ids]
    assert runs == others
    *chains, once = runs
    assert {run["status"] for run in chains} == {"completed"}
    assert [run["result"] for run in chains] == [{"result": n + 1} for n in range(10)]
    assert (once["status"], once["error_type"]) == ("failed", "interrupted")
    again = [entry for entry in entries_in(log) if entry.pid != doomed.pid]
    assert {entry.key for entry in again} == {f"{run_workflow_id(run['run_id'], 1)}/1" for run in chains}
    assert {entry.agent for entry in again} == {"second"}, "finished steps are not repeated"
    assert all(entry.at < killed_at + 10 for entry in again), [entry.at - killed_at for entry in again]


@pytest.mark.alone
async def test_a_batch_survives_killed_workers_servers_and_clusters(tmp_path: Path) -> None:
    """With 2,000 rows, kill one of two workers, one of two API servers, and then the cluster.

    All items end correctly. Only items that were running are restarted, within seconds.
    """
    target, log, port = tmp_path / "noting.py", tmp_path / "log", free_port()
    target.write_text(NOTING.format(name=new_id(), log=str(log), item_s=0.4))
    address = f"127.0.0.1:{port}"
    serve = flockapi_command("serve", str(target), "--temporal", address, "--port", "0")
    rows = b"n\n" + b"".join(b"%d\n" % n for n in range(2000))
    wanted = {"agent_name": "item", "max_workers": "60"}
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(temporal_server(tmp_path / "temporal.db", port))
        doomed = stack.enter_context(working(target, address, 40))
        here, there = stack.enter_context(running(*serve)), stack.enter_context(running(*serve))
        async with httpx.AsyncClient(base_url=here.url, timeout=60) as client:
            sent = await client.post("/run/batch", content=rows, params=wanted, headers={"Content-Type": "text/csv"})
            assert sent.status_code == 202, sent.text
            path = f"/batch/{sent.json()['batch_id']}"
            await until_started(log, 100)
            stack.enter_context(working(target, address, 40))
            ready, shared_to = len(entries_in(log)), len(entries_in(log)) + 500
            await until_started(log, shared_to)
            both = entries_in(log)[ready:shared_to]
            of_first = sum(entry.pid == doomed.pid for entry in both) / len(both)
            assert 0.25 < of_first < 0.75, "a late worker takes half of the remaining items"
            answers = [(await client.get(f"{each.url}{path}?results=false")).json() for each in (here, there)]
            assert [answer["status"] for answer in answers] == ["running", "running"]
            doomed.kill()
            killed_at = time.time()
            here.process.kill()
            seen = {entry.run for entry in entries_in(log)}
            with anyio.fail_after(PATIENCE_S):
                slow = slowness()
                while not (resumed := _restarted(entries_in(log), seen, killed_at)):  # noqa: ASYNC110 - processes report it in a file
                    await anyio.sleep(0.05)
        async with httpx.AsyncClient(base_url=there.url, timeout=60) as client:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            with anyio.fail_after(PATIENCE_S):
                while (await client.get(path)).status_code != 503:  # noqa: ASYNC110 - as a client
                    await anyio.sleep(0.05)
            stack.enter_context(temporal_server(tmp_path / "temporal.db", port))
            with anyio.fail_after(PATIENCE_S):
                while (await client.get(f"{path}?wait=30")).json().get("status") != "completed":  # noqa: ASYNC110
                    await anyio.sleep(0.1)
            batch = (await client.get(path)).json()
            found = (await client.get(f"{path}/results", headers={"Accept": "application/x-ndjson"})).text
            again = stack.enter_context(running(*serve))
            assert (await client.get(f"{again.url}{path}")).json() == batch
    assert (batch["completed_items"], batch["failed_items"]) == (2000, 0)
    assert [json.loads(line)["result"] for line in found.splitlines()] == [{"result": 2 * n} for n in range(2000)]
    entries = entries_in(log)
    first = {entry.run: entry for entry in reversed(entries)}
    twice = [entry for entry in entries if first[entry.run] is not entry]
    assert len(first) == 2000
    assert {entry.key for entry in twice} <= {entry.key for entry in first.values()}, "the provider gets the same key"
    assert 0 < len(twice) <= 2 * 60, f"{len(twice)} items were restarted: those that were running at a kill"
    assert resumed[0].at - killed_at < 5 * slow


@pytest.mark.alone
async def test_a_cancelled_batch_stops_on_all_workers(temporal_address: str, tmp_path: Path) -> None:
    """With 200 items running on two workers, all stop within two seconds and no other item starts.

    The best of three batches counts: what a busy machine does not do in time, a cluster tries again seconds later.
    """
    target, log = tmp_path / "noting.py", tmp_path / "log"
    target.write_text(NOTING.format(name=new_id(), log=str(log), item_s=60))
    serve = flockapi_command("serve", str(target), "--temporal", temporal_address, "--port", "0")
    with (
        running(*serve) as here,
        running(*serve) as there,
        working(target, temporal_address, 120),
        working(target, temporal_address, 120),
    ):
        async with httpx.AsyncClient(base_url=here.url, timeout=60) as client:
            took = [await _cancel_on_all_workers(client, there.url, log)]
            while took[-1] >= 2 and len(took) < 3:
                took.append(await _cancel_on_all_workers(client, there.url, log))
    assert min(took) < 2


async def _cancel_on_all_workers(client: httpx.AsyncClient, there: str, log: Path) -> float:
    """Start a batch, cancel it at the other server, and return the seconds that it would take on an idle machine."""
    before = len(entries_in(log))
    body = {"agent_name": "item", "batch_inputs": [{"n": n} for n in range(2000)], "max_workers": 200}
    path = f"/batch/{(await client.post('/run/batch', json=body)).json()['batch_id']}"
    await until_started(log, before + 200)
    with slowness_meanwhile() as slow, anyio.fail_after(PATIENCE_S):
        asked_at = time.time()
        while (cancelled := await client.post(f"{there}{path}/cancel?wait=20")).status_code == 503:
            pass  # the cluster of a busy machine does not answer in time, and the client asks again
    assert (cancelled.status_code, cancelled.json()["status"], cancelled.json()["cancelled_items"]) == (
        200,
        "cancelled",
        2000,
    )
    entries = entries_in(log)[before:]
    assert [entry.agent for entry in entries] == ["item"] * 200 + ["stopped"] * 200
    bodies = [(await client.get(f"{url}{path}")).json() for url in (client.base_url, there)]
    assert bodies[0] == bodies[1]
    return (entries[-1].at - asked_at) / max(slow)


async def test_a_worker_killed_while_one_item_is_cancelled_affects_no_other_item(
    temporal_address: str, tmp_path: Path
) -> None:
    """The cluster does not retry an activity that is being cancelled, even if most of its items are unfinished."""
    target, log = tmp_path / "noting.py", tmp_path / "log"
    name = new_id()
    target.write_text(NOTING.format(name=name, log=str(log), item_s=60))
    flock: Flock = runpy.run_path(str(target))["flock"]
    engine = patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name, heartbeat_timeout_s=10))
    async with engine:
        with working(target, temporal_address) as doomed:
            options = BatchOptions(max_workers=1)
            batches = [
                await engine.submit_batch("item", [{"n": n} for n in range(3)], options),
                await engine.submit_batch("once", [{}] * 2, options),
            ]
            await until_started(log, 2)
            for batch in batches:
                (*_, last) = await engine.get_items(batch.batch_id)
                await engine.cancel_run(last.run_id)
                assert (await engine.wait(last.run_id, 20)).status is RunStatus.CANCELLED
            doomed.kill()
        target.write_text(NOTING.format(name=name, log=str(log), item_s=0.1))
        with working(target, temporal_address):
            ended = [await engine.wait_batch(batch.batch_id, PATIENCE_S) for batch in batches]
            items = [item for batch in batches for item in await engine.get_items(batch.batch_id)]
    assert [item.status for item in items] == ["completed", "completed", "cancelled", "failed", "cancelled"]
    assert items[3].error_type == "interrupted"
    assert [(batch.failed_items, batch.cancelled_items) for batch in ended] == [(0, 1), (1, 1)]
    assert sorted(entry.run for entry in entries_in(log)) == ["-", "0", "0", "1"]


async def test_the_start_time_of_a_run_does_not_change_if_its_worker_is_killed(
    temporal_address: str, tmp_path: Path
) -> None:
    """Another worker restarts the step, and the event is the one that was already sent."""
    target, log = tmp_path / "noting.py", tmp_path / "log"
    target.write_text(NOTING.format(name=new_id(), log=str(log), item_s=2))
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        run = await engine.submit("item", {"n": 1})
        with working(target, temporal_address) as doomed, anyio.fail_after(PATIENCE_S):
            live = await anext(event async for event in engine.events(run.run_id) if event is not None)
            doomed.kill()
        with working(target, temporal_address), anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert len(entries_in(log)) == 2
        replayed = await anext(event async for event in engine.events(run.run_id) if event is not None)
    assert (live.name, replayed) == ("run.started", live)


async def test_a_worker_that_shuts_down_leaves_its_runs_to_others(temporal_address: str, tmp_path: Path) -> None:
    target, log = tmp_path / "noting.py", tmp_path / "log"
    target.write_text(NOTING.format(name=new_id(), log=str(log), item_s=0.2))
    serve = flockapi_command("serve", str(target), "--temporal", temporal_address, "--port", "0")
    with running(*serve) as server, working(target, temporal_address) as leaving:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            sent = await client.post("/run/flock", json={"agent_name": "first", "inputs": {"n": 1}, "async_run": True})
            await until_started(log, 2)
            leaving.terminate()
            assert await anyio.to_thread.run_sync(leaving.wait, 30) == 0, "a clean exit, because its step had ended"
            ended = await client.get(f"/run/{sent.json()['run_id']}")
            with working(target, temporal_address):
                ended = await client.get(f"/run/{sent.json()['run_id']}", params={"wait": 30})
    assert ended.json()["status"] == "completed"
    assert len(entries_in(log)) == 2


async def test_a_worker_stops_even_if_its_library_hangs(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its core sometimes reports that it has no more work, but never that it has shut down."""

    async def never_end(worker: object) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr("temporalio.bridge.worker.Worker.finalize_shutdown", never_end)
    monkeypatch.setattr("flock.temporal.worker.SHUTDOWN_GRACE_S", 0.5)
    with anyio.fail_after(PATIENCE_S):
        async with open_pair(sample_flock(), temporal_address) as engine:
            run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
    assert run.status is RunStatus.COMPLETED
    assert "did not shut down within 0.5 s" in caplog.text


async def test_the_heartbeat_timeout_can_be_raised(temporal_address: str) -> None:
    """An agent that blocks the event loop is not started a second time."""
    flock, calls = Flock(new_id()), []

    @flock.agent
    async def block() -> int:
        calls.append(1)
        time.sleep(4.5)  # noqa: ASYNC251 - what a careless agent does
        return 1

    async with open_pair(flock, temporal_address, heartbeat_timeout_s=30) as engine:
        run = await engine.submit("block", EMPTY)
        with anyio.fail_after(PATIENCE_S):
            while not (run := await _read(engine, run.run_id)).status.is_final:  # noqa: ASYNC110 - it was blocked
                await anyio.sleep(0.1)
    assert (run.status, len(calls)) == (RunStatus.COMPLETED, 1)


async def _read(engine: TemporalEngine, run_id: str) -> Run:
    """Read a run, and retry while a blocked event loop makes the cluster seem unavailable."""
    while True:
        with contextlib.suppress(StoreError):
            return await engine.get_run(run_id)


async def test_a_queued_item_is_cancelled_at_once(temporal_address: str) -> None:
    """At any position in the queue. It is counted, at the latest, when it would have run."""
    work = Work(new_id())
    work.holds = True
    async with open_pair(work.flock, temporal_address) as engine:
        batch = await engine.submit_batch("item", numbers(50), BatchOptions(max_workers=1))
        await work.started.wait()
        waiting = [item for item in await engine.get_items(batch.batch_id) if item.position in (1, 30, 49)]
        for item in waiting:
            assert (await engine.cancel_run(item.run_id)).cancel_requested
        with anyio.fail_after(PATIENCE_S):
            ends = [await engine.wait(item.run_id) for item in waiting]
        assert {end.status for end in ends} == {RunStatus.CANCELLED}
        assert work.calls == [0]
        work.may_go.set()
        assert (await ended(engine, batch)).cancelled_items == 3
        assert [await engine.get_run(item.run_id) for item in waiting] == ends
    assert sorted({*range(50)} - {*work.calls}) == [1, 30, 49]


async def test_a_stopping_worker_hands_off_more_than_fits_in_one_message(temporal_address: str) -> None:
    """The finished steps of one item fit, but those of all items together do not."""
    flock, calls, holds = Flock(new_id()), list[str](), True

    @flock.agent(next_agent="second")
    async def first(n: int) -> str:
        calls.append("first")
        return "x" * 600_000

    @flock.agent
    async def second(result: str) -> int:
        calls.append("second")
        while holds:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.05)
        return 1

    async with open_pair(flock, temporal_address, with_worker=False) as engine:
        async with open_pair(flock, temporal_address):
            batch = await engine.submit_batch("first", numbers(20), BatchOptions(max_workers=10))
            await until(lambda: calls.count("second") == 10)
        holds = False
        async with open_pair(flock, temporal_address):
            batch = await ended(engine, batch)
    assert (batch.completed_items, batch.failed_items) == (20, 0)
    assert calls.count("first") == 20


async def test_the_last_heartbeat_of_a_dead_worker_is_used_if_the_next_one_fails() -> None:
    """The cluster does not retry the activity if one of its items is being cancelled."""
    cluster = Cluster("127.0.0.1:1")
    runs_no_agent: Any = None
    items = ItemActivities(Workplace(cluster, runs_no_agent, suspects.Gate(3), runs_no_agent, 0))
    ended, running_part = ItemOutcome(position=0, completed_at=now()), Part(position=1)
    order = ItemsOrder(batch_id="b", chunk=0, parts=(Part(position=0), running_part, Part(position=2)), timeout_s=1)

    async def fails(order: ItemsOrder) -> Any:
        raise StoreError("The cluster does not answer now.")

    items._chunk = fails  # type: ignore[method-assign]
    environment = ActivityEnvironment()
    beat = msgspec.to_builtins(ItemsDone(ended=(ended,), unfinished=running_part))
    environment.info = dataclasses.replace(environment.info, heartbeat_details=[beat], attempt=2)
    done = await environment.run(items.run, order)
    assert (done.ended, done.unfinished) == ((ended,), replace(running_part, is_again=True))
    environment.info = dataclasses.replace(environment.info, heartbeat_details=[])
    with pytest.raises(StoreError):
        await environment.run(items.run, order)


async def test_items_with_long_messages_are_started_once(temporal_address: str) -> None:
    """The cluster limits the size of a message, and repeats the work if it refuses the answer."""
    flock, calls = Flock(new_id()), list[int]()

    @flock.agent
    async def item(n: int, context: RunContext) -> int:
        calls.append(n)
        if n == 0:
            context.progress(1, 2, "x" * 3_000_000)
            await asyncio.sleep(0.3)
        elif n >= 350:
            context.progress(1, 2, "\U0001f986" * 10_000)
            raise AgentError("\U0001f986" * 10_000)
        return n

    async with open_pair(flock, temporal_address) as engine:
        rows = [{"n": n} for n in range(400)]
        batch = await engine.submit_batch("item", rows, BatchOptions(max_workers=1))
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        assert (batch.completed_items, batch.failed_items) == (400, 50)
    assert sorted(calls) == list(range(400))


async def test_a_batch_that_continues_in_new_histories_reads_as_one(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every read finds it. Its count of ended items never decreases and never exceeds the total."""
    monkeypatch.setattr(batchflows, "MAX_EVENTS", 12)
    flock, counts = Flock(new_id()), [0]

    @flock.agent
    async def item(n: int) -> int:
        await asyncio.sleep(0.02)
        return n

    async with open_pair(flock, temporal_address) as engine:
        key = IdempotencyKey(new_id(), b"1")
        rows = [{"n": n} for n in range(120)]
        batch = await engine.submit_batch("item", rows, BatchOptions(max_workers=3), key=key)
        with anyio.fail_after(PATIENCE_S):
            while not batch.status.is_final:
                batch = await engine.get_batch(batch.batch_id)
                counts.append(batch.completed_items)
        items = await engine.get_items(batch.batch_id)
        history = (await engine.cluster.handle(batch_workflow_id(batch.batch_id, 1)).fetch_history()).events
    at_first = history[0].workflow_execution_started_event_attributes.memo.fields
    assert decoded(at_first["batch"], Batch).completed_items >= 20, "as soon as a new history starts"
    assert counts == sorted(counts)
    assert (batch.completed_items, batch.failed_items) == (120, 0)
    assert {item.status for item in items} == {RunStatus.COMPLETED}


async def test_results_can_be_read_while_a_worker_is_still_processing_them(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in the history of the batch until the worker has finished."""
    until, collect = batchflows.FlockBatch._until, batchflows.FlockChunk._collect

    async def slow_until(batch: Any, *args: Any) -> None:
        if not batch._started:
            time.sleep(0.5)  # noqa: ASYNC251 - a busy worker
        await until(batch, *args)

    def slow_collect(chunk: Any) -> None:
        time.sleep(0.2)
        collect(chunk)

    monkeypatch.setattr(batchflows.FlockBatch, "_until", slow_until)
    monkeypatch.setattr(batchflows.FlockChunk, "_collect", slow_collect)
    flock, done, ends = Flock(new_id()), [0], set[int]()

    @flock.agent
    async def item(n: int) -> int:
        await asyncio.sleep(0.02 + n % 5 / 50)
        return n

    async with open_pair(flock, temporal_address) as engine:
        key = IdempotencyKey(new_id(), b"1")
        batch = await engine.submit_batch("item", numbers(40), BatchOptions(max_workers=8), key=key)
        with anyio.fail_after(PATIENCE_S):
            while not batch.status.is_final:
                batch = await engine.get_batch(batch.batch_id)
                done.append(batch.completed_items)
                items = await engine.get_items(batch.batch_id, statuses=[RunStatus.COMPLETED])
                assert ends <= (ends := {item.position or 0 for item in items})
    assert done == sorted(done)
    assert ends == {*range(40)}


# An unavailable cluster


@pytest.mark.alone
async def test_an_unavailable_cluster_is_reported_within_two_seconds_and_recovers(tmp_path: Path) -> None:
    gate, port = Gate(), free_port()
    engine = TemporalEngine(gate.flock.agents, f"127.0.0.1:{port}", flock=gate.flock.name)
    app = create_app(gate.flock, engine=engine)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as client:
        with temporal_server(tmp_path / "temporal.db", port) as server:
            async with contextlib.AsyncExitStack() as stack:
                worker = TemporalWorker(gate.flock.agents, ModelClient(), f"127.0.0.1:{port}", flock=gate.flock.name)
                await stack.enter_async_context(worker)
                await stack.enter_async_context(app.lifespan())
                accepted = await client.post("/run/flock", json={"agent_name": "nap", "async_run": True})
                await gate.started.wait()
                assert (await client.get("/readyz")).status_code == 200
                waiting = asyncio.create_task(client.get(f"/run/{accepted.json()['run_id']}?wait=60"))
                await asyncio.sleep(0.1)
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                for path in ("/readyz", "/runs", "/batches", f"/run/{accepted.json()['run_id']}"):
                    at = time.monotonic()
                    with anyio.fail_after(PATIENCE_S):
                        while (answer := await client.get(path)).status_code == 200:  # noqa: ASYNC110 - as a client
                            await asyncio.sleep(0.05)
                    assert time.monotonic() - at < 3 * slowness(), path
                    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
                    assert str(port) not in answer.text, "clients do not see its address"
                for path, body in (
                    ("/run/flock", {"agent_name": "nap"}),
                    ("/run/batch", {"agent_name": "nap", "batch_inputs": [{}] * 500}),
                ):
                    at = time.monotonic()
                    refused = await client.post(path, json=body)
                    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
                    assert time.monotonic() - at < 2.5 * slowness()
                assert (await waiting).status_code == 503
                with temporal_server(tmp_path / "temporal.db", port):
                    with anyio.fail_after(PATIENCE_S):
                        while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - as a client
                            await asyncio.sleep(0.05)
                    gate.may_go.set()
                    ended = await client.get(f"/run/{accepted.json()['run_id']}?wait=60")
                    assert ended.json()["status"] == "completed"


async def test_a_missing_cluster_is_reported_with_what_to_do() -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(StoreError, match=f"{address} cannot be used.*Start it, or name another"):
        async with TemporalEngine({}, address):
            pass


async def test_a_missing_namespace_is_created(temporal_address: str) -> None:
    flock, namespace = sample_flock(), f"made-{new_id()}"
    worker = TemporalWorker(flock.agents, ModelClient(), temporal_address, namespace=namespace, drain_timeout_s=0)
    async with worker, patient(TemporalEngine(flock.agents, temporal_address, namespace=namespace)) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
    assert run.status is RunStatus.COMPLETED


# A cluster with restricted permissions


@contextlib.asynccontextmanager
async def fake_cluster(**statuses: int) -> AsyncIterator[str]:
    """Serve gRPC that answers each method with the given status, and status 0 with an empty message.

    The development server refuses nothing. The wire format is the real one: HTTP/2 with a ``grpc-status`` (the gRPC
    protocol, "Responses").
    """

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        status = ({"GetSystemInfo": 0} | statuses).get(scope["path"].rpartition("/")[2], 12)  # UNIMPLEMENTED
        headers = [(b"content-type", b"application/grpc"), (b"grpc-status", b"%d" % status), (b"grpc-message", b"No.")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if status else bytes(5)})

    config, done = Config(), asyncio.Event()
    config.bind = [f"127.0.0.1:{free_port()}"]
    serving = asyncio.create_task(serve(app, config, shutdown_trigger=done.wait))
    try:
        yield config.bind[0]
    finally:
        done.set()
        await serving


PERMISSION_DENIED, NOT_FOUND = 7, 5


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        pytest.param(
            {"DescribeNamespace": NOT_FOUND, "RegisterNamespace": PERMISSION_DENIED},
            "has no namespace 'mine'.*temporal operator namespace create -n mine --retention 30d --address 127",
            id="create a namespace",
        ),
        pytest.param(
            {"DescribeNamespace": 0, "ListSearchAttributes": 0, "AddSearchAttributes": PERMISSION_DENIED},
            "attributes FlockName.*search-attribute create --name FlockName --type Keyword -n mine --address 127",
            id="create search attributes",
        ),
        pytest.param(
            {"DescribeNamespace": 0, "ListSearchAttributes": 0}, "create --name FlockAgent", id="a method is missing"
        ),
        pytest.param(
            {"DescribeNamespace": PERMISSION_DENIED},
            "denies access to.*No.*TEMPORAL_API_KEY",
            id="access the namespace",
        ),
    ],
)
async def test_a_missing_permission_is_reported_with_the_command_to_run(statuses: dict[str, int], words: str) -> None:
    async with fake_cluster(**statuses) as address:
        with pytest.raises(DefinitionError, match=words):
            async with TemporalEngine({}, address, namespace="mine"):
                pass


async def test_a_cluster_that_does_not_list_search_attributes_causes_only_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        fake_cluster(DescribeNamespace=0, ListSearchAttributes=PERMISSION_DENIED) as address,
        TemporalEngine({}, address, namespace="mine") as engine,
    ):
        assert engine.health().engine == "running"
    assert "search-attribute create --name FlockPrincipal --type Keyword -n mine" in caplog.text


# Without workers


async def test_a_batch_with_deleted_chunks_is_not_found(temporal_address: str) -> None:
    """Retention deletes chunks before their batch. Their finished items must not look unfinished."""
    work = Work()
    work.holds = True
    async with open_pair(work.flock, temporal_address) as engine:
        batch = await engine.submit_batch("item", numbers(30), BatchOptions(max_workers=2))
        await work.started.wait()
        chunk = WorkflowExecution(workflow_id=f"chunk:{batch.batch_id}:0")
        await engine.cluster.client.workflow_service.delete_workflow_execution(
            DeleteWorkflowExecutionRequest(namespace=engine.cluster.namespace, workflow_execution=chunk)
        )
        work.may_go.set()
        batch = await ended(engine, batch)
        assert (batch.completed_items, batch.failed_items) == (30, 20)
        with pytest.raises(BatchNotFound):
            await engine.get_items(batch.batch_id)
        with pytest.raises(BatchNotFound):
            await engine.retry_batch(batch.batch_id)
        await engine.delete_batch(batch.batch_id)


@pytest.mark.parametrize("misfits", [0, 1])
async def test_a_batch_whose_rows_were_deleted_fails_with_an_explanation(misfits: int, temporal_address: str) -> None:
    """If some rows are invalid, the worker first has to find out which."""
    work = Work()
    async with open_pair(work.flock, temporal_address, with_worker=False) as engine:
        sent: list[Mapping[str, Any]] = [*numbers(3), *[{"n": "x"}] * misfits]
        batch = await engine.submit_batch("item", sent, BatchOptions(), on_invalid="skip")
        rows = WorkflowExecution(workflow_id=f"rows:{batch.batch_id}:0")
        await engine.cluster.client.workflow_service.delete_workflow_execution(
            DeleteWorkflowExecutionRequest(namespace=engine.cluster.namespace, workflow_execution=rows)
        )
        with anyio.fail_after(PATIENCE_S), contextlib.suppress(RPCError):
            while await engine.cluster.client.get_workflow_handle(rows.workflow_id).describe():  # noqa: ASYNC110
                await anyio.sleep(0.02)
        async with TemporalWorker(work.flock.agents, ModelClient(), temporal_address, flock=work.flock.name):
            batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items, work.calls) == (RunStatus.FAILED, 3 + misfits, [])
        assert batch.error is not None
        assert "The cluster has deleted the rows" in batch.error


async def test_a_batch_terminated_on_the_cluster_fails_and_can_be_retried(temporal_address: str) -> None:
    """It is terminated before a worker starts it."""
    work = Work()
    async with open_pair(work.flock, temporal_address, with_worker=False) as engine:
        batch = await engine.submit_batch("item", numbers(3), BatchOptions())
        await engine.cluster.client.get_workflow_handle(f"batch:{batch.batch_id}").terminate()
        batch = await ended(engine, batch)
        assert (batch.status, batch.cancelled_items) == (RunStatus.FAILED, 3)
        assert batch.error == "The batch was ended on the cluster before it completed."
        assert {item.status for item in await engine.get_items(batch.batch_id)} == {RunStatus.CANCELLED}
        with pytest.raises(Conflict, match="failed and can no longer be cancelled"):
            await engine.cancel_batch(batch.batch_id)
        async with TemporalWorker(work.flock.agents, ModelClient(), temporal_address, flock=work.flock.name):
            batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (batch.status, batch.attempt, sorted(work.calls)) == (RunStatus.COMPLETED, 2, [0, 1, 2])


async def until_counted(engine: TemporalEngine, count: int) -> None:
    """Wait until the search of the cluster has *count* open runs, and *engine* has read that."""
    with anyio.fail_after(PATIENCE_S):
        while (await engine.cluster.client.count_workflows(open_runs(engine._flock))).count < count:  # noqa: ASYNC110
            await anyio.sleep(0.02)
        for _ in range(2):  # the next count may have begun before
            engine._open_runs_of[""] = 0
            await until(lambda: not engine._open_runs_of)


async def test_a_refused_request_is_refused_again_under_its_key_while_the_queue_is_full(temporal_address: str) -> None:
    """An accepted run is still found by its key, and a refused request leaves its key free."""
    flock = sample_flock()
    flock.name = new_id()
    async with open_pair(flock, temporal_address, with_worker=False, max_queue=2) as engine:
        accepted_key, refused_key = IdempotencyKey("accepted", b"1"), IdempotencyKey("refused", b"1")
        accepted = await engine.submit("add", {"a": 1}, key=accepted_key)
        other = await engine.submit("add", {"a": 1})
        await until_counted(engine, 2)
        for _ in range(3):
            with pytest.raises(EngineFull, match="2 runs are already open"):
                await engine.submit("add", {"a": 1}, key=refused_key)
            with pytest.raises(Replayed, match=accepted.run_id):
                await engine.submit("add", {"a": 1}, key=accepted_key)
        assert {run.run_id for run in await engine.list_runs(RunFilter())} <= {accepted.run_id, other.run_id}
        # Like a process that dies after it has claimed a key.
        claimed_key = IdempotencyKey("claimed", b"1")
        await engine._reservations.claim(claimed_key, new_id())
        with pytest.raises(EngineFull):
            await engine.submit("add", {"a": 1}, key=claimed_key)
        await engine.cluster.client.get_workflow_handle(run_workflow_id(other.run_id, 1)).terminate()
        with anyio.fail_after(PATIENCE_S):
            while True:  # open runs are counted twice a second
                with contextlib.suppress(EngineFull):
                    await engine.submit("add", {"a": 2}, key=IdempotencyKey("refused", b"another body"))
                    break
                await anyio.sleep(0.05)


async def test_small_requests_read_no_results_and_nothing_of_others(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One about a run or an item of another principal takes as many requests of the cluster as about an unknown run."""
    flock, made, keys = Flock(new_id()), list[str](), {"ann": "a" * 32, "bob": "b" * 32}

    @flock.agent
    async def work(n: int) -> int:
        if n < 0:
            raise AgentError("below 0")
        return n

    for name in ("describe", "last_attempt", "history_of", "input_of"):
        call = getattr(Cluster, name)

        def counted(*args: Any, call: Any = call, **options: Any) -> Any:
            made.append(call.__name__)
            return call(*args, **options)

        monkeypatch.setattr(Cluster, name, counted)
    async with worker_of(flock, temporal_address):
        engine = patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name))
        app = create_app(flock, engine=engine, api_keys=keys)
        async with app.lifespan(), client_of(app) as client:

            async def made_by(name: str, method: str, path: str, status: int) -> list[str]:
                made.clear()
                headers = {"X-API-Key": keys[name], "Last-Event-ID": str(end_id(1))}
                assert (await client.request(method, path, headers=headers)).status_code == status, (method, path)
                return [each for each in made if each != "describe" or name == "bob"]

            completed = await engine.submit("work", {"n": 1}, principal="ann")
            failed = await engine.submit("work", {"n": -1}, principal="ann")
            for run in (completed, failed):
                await engine.wait(run.run_id)
            batch = await engine.submit_batch("work", numbers(2), BatchOptions(), principal="ann")
            item = (await engine.get_items((await ended(engine, batch)).batch_id))[1]
            for request in ("HEAD", "GET", "POST /cancel", "POST /retry", "GET /events", "DELETE"):
                method, _, suffix = request.partition(" ")
                unknown = await made_by("bob", method, f"/run/{new_id()}{suffix}", 404)
                assert not {"history_of", "input_of"} & set(unknown)
                for run in (completed, failed, item):
                    assert await made_by("bob", method, f"/run/{run.run_id}{suffix}", 404) == unknown, (method, suffix)
            for run, method, suffix, status in (
                (completed, "POST", "/cancel", 409),
                (completed, "POST", "/retry", 409),
                (failed, "POST", "/cancel", 409),
                (failed, "GET", "/events", 204),
                (completed, "GET", "/events", 204),
            ):
                assert await made_by("ann", method, f"/run/{run.run_id}{suffix}", status) == []
            deleted = await made_by("ann", "DELETE", f"/run/{completed.run_id}", 204)
            assert deleted == ["input_of"], "the names of its files are with its inputs"
            await made_by("ann", "POST", f"/run/{failed.run_id}/retry", 202)
            assert (await engine.wait(failed.run_id)).attempt == 2
            assert await engine.get_state(failed.run_id, "ann") == (RunStatus.FAILED, 2)


@pytest.mark.parametrize("is_in_the_count", [True, False])
async def test_a_run_that_starts_while_open_runs_are_counted_counts_once(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, is_in_the_count: bool
) -> None:
    flock = sample_flock()
    flock.name = new_id()
    counting, may_count, was_counted = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with open_pair(flock, temporal_address, with_worker=False, max_queue=3) as engine:
        await engine.submit("add", {"a": 1})

        async def count_workflows(query: str) -> WorkflowExecutionCount:
            if counting.is_set():  # the count before was taken over
                was_counted.set()
                await asyncio.Event().wait()
            counting.set()
            await may_count.wait()
            return WorkflowExecutionCount(2 if is_in_the_count else 1, ())

        monkeypatch.setattr(engine.cluster.client, "count_workflows", count_workflows)
        with anyio.fail_after(PATIENCE_S):
            await counting.wait()
            await engine.submit("add", {"a": 2})
            may_count.set()
            await was_counted.wait()
            await engine.submit("add", {"a": 3})
            with pytest.raises(EngineFull, match="3 runs are already open"):
                await engine.submit("add", {"a": 4})


async def test_a_run_that_was_counted_before_its_start_was_answered_counts_once(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = sample_flock()
    flock.name = new_id()
    started, was_counted, again = asyncio.Event(), asyncio.Event(), asyncio.Event()
    async with open_pair(flock, temporal_address, with_worker=False, max_queue=3) as engine:
        start = engine.cluster.client.start_workflow

        async def start_workflow(*args: Any, **options: Any) -> None:
            await start(*args, **options)
            started.set()
            await again.wait()  # the answer comes late

        async def count_workflows(query: str) -> WorkflowExecutionCount:
            await started.wait()
            if was_counted.is_set():
                again.set()
                await asyncio.Event().wait()
            was_counted.set()
            return WorkflowExecutionCount(1, ())

        monkeypatch.setattr(engine.cluster.client, "start_workflow", start_workflow)
        monkeypatch.setattr(engine.cluster.client, "count_workflows", count_workflows)
        with anyio.fail_after(PATIENCE_S):
            for a in range(3):
                await engine.submit("add", {"a": a})
            with pytest.raises(EngineFull, match="3 runs are already open"):
                await engine.submit("add", {"a": 4})


async def test_concurrent_submissions_do_not_exceed_the_limit(temporal_address: str) -> None:
    flock = sample_flock()
    flock.name = new_id()
    async with open_pair(flock, temporal_address, with_worker=False, max_queue=2) as engine:
        keys = [None if n % 2 else IdempotencyKey(f"k{n}", b"1") for n in range(10)]
        ends = await asyncio.gather(*(engine.submit("add", {"a": 1}, key=key) for key in keys), return_exceptions=True)
        assert [type(end) for end in ends] == [Run] * 2 + [EngineFull] * 8


async def test_without_a_worker_runs_are_accepted_up_to_the_limit_and_can_be_read(temporal_address: str) -> None:
    flock = sample_flock()
    flock.name = new_id()
    async with open_pair(flock, temporal_address, with_worker=False, max_queue=2) as engine:
        key = IdempotencyKey("k", b"1")
        first = await engine.submit("add", {"a": 1}, key=key)
        await engine.submit("add", {"a": 1})
        await until_counted(engine, 2)
        with pytest.raises(EngineFull, match="2 runs are already open"):
            await engine.submit("add", {"a": 1})
        assert (await engine.get_run(first.run_id)).status is RunStatus.STARTING
        assert (await engine.cancel_run(first.run_id)).cancel_requested
    async with open_pair(flock, temporal_address) as engine:
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(first.run_id)).status is RunStatus.CANCELLED
            runs = await engine.list_runs(RunFilter())
            assert len(runs) == 2


async def test_the_next_request_starts_the_run_of_a_key_whose_server_died(temporal_address: str) -> None:
    gate = Gate()
    gate.flock.name = new_id()
    key, run_id = IdempotencyKey("k", b"1"), new_id()
    async with open_pair(gate.flock, temporal_address) as engine:
        assert await engine._reservations.claim(key, run_id) == run_id
        with pytest.raises(Exception, match=run_id):
            await engine.submit("nap", EMPTY, key=key)
        gate.may_go.set()
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run_id)).status is RunStatus.COMPLETED


async def test_the_next_request_starts_the_batch_of_a_key_whose_claim_was_not_answered(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key was claimed or it was not. The client cannot know."""
    work = Work(new_id())
    async with open_pair(work.flock, temporal_address) as engine:
        claim = engine._reservations.claim

        async def claim_and_fail(key: IdempotencyKey, made_id: str) -> str:
            await claim(key, made_id)
            raise StoreError("The cluster does not answer now.")

        async def fail_to_claim(key: IdempotencyKey, made_id: str) -> str:
            raise StoreError("The cluster does not answer now.")

        for number, failing_claim in enumerate((claim_and_fail, fail_to_claim)):
            key = IdempotencyKey(f"k{number}", b"1")
            monkeypatch.setattr(engine._reservations, "claim", failing_claim)
            with pytest.raises(StoreError):
                await engine.submit_batch("item", numbers(3), BatchOptions(), key=key)
            monkeypatch.undo()
            while engine._drops:
                await asyncio.wait(engine._drops)
            try:
                made_id = (await engine.submit_batch("item", numbers(3), BatchOptions(), key=key)).batch_id
            except Replayed as exc:
                made_id = exc.made_id
            with anyio.fail_after(PATIENCE_S):
                assert (await engine.wait_batch(made_id)).status is RunStatus.COMPLETED
    assert len(work.calls) == 6


async def test_the_next_request_starts_the_batch_of_a_key_whose_server_died(temporal_address: str) -> None:
    """The batch has the id that was claimed, and the rows of the request that started it."""
    work, key, batch_id = Work(new_id()), IdempotencyKey("k", b"1"), new_batch_id()
    async with open_pair(work.flock, temporal_address) as engine:
        assert await engine._reservations.claim(key, batch_id) == batch_id
        work.fails.add(1)
        for _ in range(2):
            with pytest.raises(Replayed) as caught:
                await engine.submit_batch("item", numbers(3), BatchOptions(), key=key)
            assert caught.value.made_id == batch_id
        batch = await ended(engine, await engine.get_batch(batch_id))
        assert (batch.completed_items, batch.failed_items) == (3, 1)
        items = await engine.get_items(batch_id)
        assert [item.run_id for item in items] == [item_id(batch_id, position) for position in range(3)]
        work.fails.clear()
        batch = await ended(engine, await engine.retry_batch(batch_id))
        assert (batch.completed_items, batch.failed_items) == (3, 0)
        rows_of = (await engine._current(batch_id)).attempts[0].rows_of
        assert rows_of not in (None, batch_id)
        rows = engine.cluster.client.get_workflow_handle(f"rows:{rows_of}:0")
        await rows.describe()
        await engine.delete_batch(batch_id)
        with anyio.fail_after(PATIENCE_S), contextlib.suppress(RPCError):  # until it is deleted
            while await rows.describe():  # noqa: ASYNC110 - the cluster reports nothing
                await asyncio.sleep(0.1)
    assert len(work.calls) == 4


async def test_a_batch_whose_start_was_not_answered_keeps_its_rows(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was started under an id that a dead server had claimed, and the client got no answer."""
    work, key, batch_id = Work(new_id()), IdempotencyKey("k", b"1"), new_batch_id()
    async with open_pair(work.flock, temporal_address) as engine:
        await engine._reservations.claim(key, batch_id)
        start = engine.cluster.start

        async def start_and_fail(*args: Any, **options: Any) -> None:
            await start(*args, **options)
            raise StoreError("The cluster does not answer now.")

        monkeypatch.setattr(engine.cluster, "start", start_and_fail)
        with pytest.raises(StoreError):
            await engine.submit_batch("item", numbers(3), BatchOptions(), key=key)
        monkeypatch.undo()
        assert not engine._drops
        with pytest.raises(Replayed, match=batch_id):
            await engine.submit_batch("item", numbers(3), BatchOptions(), key=key)
        batch = await ended(engine, await engine.get_batch(batch_id))
        assert (batch.completed_items, batch.failed_items) == (3, 0)
        assert len(await engine.get_items(batch_id)) == 3
    assert len(work.calls) == 3


async def test_deleting_a_run_does_not_free_a_key_that_another_run_has_claimed(temporal_address: str) -> None:
    """A key is stored for a day, and a run for longer."""
    gate, key, other_id = Gate(), IdempotencyKey("k", b"1"), new_id()
    gate.flock.name = new_id()
    gate.may_go.set()
    async with open_pair(gate.flock, temporal_address) as engine:
        run = await engine.submit("nap", EMPTY, key=key)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        await engine._reservations.release(engine._reservations.key_id(key), run.run_id)  # as after a day
        assert await engine._reservations.claim(key, other_id) == other_id
        await engine.delete_run(run.run_id)
        assert await engine._reservations.find(key) == other_id


async def test_a_deletion_that_failed_halfway_can_be_repeated(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = sample_flock()
    flock.name = new_id()
    delete, errors = Cluster.delete, [StoreError("away")]

    async def away_once(cluster: Cluster, *args: Any) -> None:
        if errors:
            raise errors.pop()
        await delete(cluster, *args)

    async with open_pair(flock, temporal_address) as engine:
        run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
        monkeypatch.setattr(Cluster, "delete", away_once)
        with pytest.raises(StoreError, match="away"):
            await engine.delete_run(run.run_id)
        await engine.delete_run(run.run_id)
        with pytest.raises(RunNotFound):
            await engine.get_run(run.run_id)


async def test_a_run_that_cannot_join_its_session_at_once_is_accepted_and_joins_it_later(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = sample_flock()
    flock.name = new_id()
    monkeypatch.setattr(workflows, "LOOK_AFTER_S", 0.2)

    async def away(engine: TemporalEngine, run: Run) -> None:
        raise StoreError("away")

    async with open_pair(flock, temporal_address) as engine:
        monkeypatch.setattr(TemporalEngine, "_join_session", away)
        run = await engine.submit("add", {"a": 1}, session_id="s")
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED


async def test_an_upload_does_not_delay_a_drain(temporal_address: str) -> None:
    """The upload is refused at its next page, and what was sent is deleted before the engine ends."""
    work, started = Work(), 0
    work.flock.name = new_id()
    async with open_pair(work.flock, temporal_address) as engine:

        async def rows() -> AsyncIterator[dict[str, int]]:
            nonlocal started
            for n in range(5000):
                if n == 1000:
                    await engine.drain(0)
                started = n
                yield {"n": n}

        with pytest.raises(EngineStopped, match="Upload the whole batch again"):
            await engine.submit_batch("item", rows(), BatchOptions())
        assert started < 4999
    assert not engine._drops


async def test_rows_without_room_at_the_end_of_their_upload_are_named(temporal_address: str) -> None:
    work = Work()
    work.holds = True
    work.flock.name = new_id()
    async with (
        open_pair(work.flock, temporal_address, max_open_items=5) as engine,
        open_pair(work.flock, temporal_address, max_open_items=5, with_worker=False) as other,
    ):

        async def rows() -> AsyncIterator[dict[str, int]]:
            for row in numbers(3):
                yield row
            await other.submit_batch("item", numbers(3), BatchOptions())
            with anyio.fail_after(PATIENCE_S):
                while not await engine.list_batches(BatchFilter()):  # noqa: ASYNC110 - the search lags
                    await anyio.sleep(0.01)

        with pytest.raises(EngineFull, match="3 items of batches have not ended or are being uploaded, and 3 more"):
            await engine.submit_batch("item", rows(), BatchOptions())
        work.may_go.set()


async def test_workers_of_runs_and_of_items_drain_at_the_same_time() -> None:
    """Otherwise one would start steps while the other one drains, and both would take twice as long."""
    draining = [anyio.Event(), anyio.Event()]

    class Draining:
        def __init__(self, own: int) -> None:
            self.own = own

        async def __aexit__(self, *exc_info: object) -> None:
            draining[self.own].set()
            await draining[1 - self.own].wait()

    workers: Any = [Draining(0), Draining(1)]
    with anyio.fail_after(PATIENCE_S):
        await _shut_down(workers, PATIENCE_S)


async def test_a_start_in_a_namespace_that_the_cluster_does_not_know_is_an_error_of_the_store(
    temporal_address: str,
) -> None:
    """So it is tried again, as a new namespace may be unknown to a part of the cluster for seconds."""
    cluster = Cluster(temporal_address, namespace="unknown")
    cluster._client = await cluster.answered(cluster.client_of_worker)  # connect() would make it
    with pytest.raises(StoreError, match="does not know the namespace 'unknown'"):
        await cluster.start_workflow(FlockMark.run, 1.0, flock="f", id="w")


async def test_changes_made_by_others_on_the_cluster_are_reported(temporal_address: str) -> None:
    """A workflow is terminated, and a first attempt is deleted before the second."""
    flock = sample_flock()
    flock.name = new_id()
    async with open_pair(flock, temporal_address) as engine:
        run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
        again = replace(run, run_id=new_id(), attempt=2, status=RunStatus.STARTING, steps=(), result=None)
        await engine._start(engine._order(again))
        with anyio.fail_after(PATIENCE_S):
            while len(await engine.list_runs(RunFilter())) < 2:  # noqa: ASYNC110 - the search lags behind
                await anyio.sleep(0.02)
            assert (await engine.wait(again.run_id)).attempt == 2
    async with open_pair(flock, temporal_address, with_worker=False) as engine:
        run = await engine.submit("add", {"a": 1})
        await engine.cluster.handle(run_workflow_id(run.run_id, 1)).terminate()
        run = await engine.wait(run.run_id)
    assert (run.status, run.error_type) == (RunStatus.FAILED, "interrupted")
    assert run.error == "The run was terminated on the cluster before it ended."


# Agents that a worker lacks


class Deployment:
    """Two versions of a program, of which one lacks agents of the other. ``calls`` has a word for each turn."""

    def __init__(self) -> None:
        self.whole, self.part, self.calls = Flock(new_id()), Flock(), list[str]()
        self.part.name = self.whole.name

        async def note(word: str) -> int:
            self.calls.append(word)
            return len(word)

        @self.whole.agent(on_interrupt="fail")
        async def fresh(n: int) -> int:
            return await note(f"fresh {n}")

        @self.whole.agent(next_agent="second")
        async def first(n: int) -> int:
            return await note(f"first {n}")

        @self.whole.agent(on_interrupt="fail")
        async def second(n: int) -> int:
            return await note(f"second {n}")

        @self.whole.agent
        async def caller(n: int, context: RunContext) -> int:
            found = await asyncio.gather(
                context.call(note, f"called {n}"), *(context.run_agent("helper", {"n": n + more}) for more in (0, 100))
            )
            return len(found)

        @self.whole.agent
        async def helper(n: int) -> int:
            return await note(f"helper {n}")

        for name in ("first", "caller"):
            self.part.add_agent(self.whole.agents[name])


def worker_of(flock: Flock, address: str) -> TemporalWorker:
    return TemporalWorker(flock.agents, ModelClient(flock.model), address, flock=flock.name, drain_timeout_s=0)


async def until_left(engine: TemporalEngine, workflow_id: str) -> None:
    """Wait until a worker has left an activity of a workflow to others, three times."""
    handle = engine.cluster.client.get_workflow_handle(workflow_id)
    with anyio.fail_after(PATIENCE_S):
        while True:
            with contextlib.suppress(RPCError):
                pending = (await handle.describe()).raw_description.pending_activities
                if any(activity.attempt > 3 for activity in pending):
                    return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("accepted_by", ["whole", "part"])
async def test_a_rolling_deployment_loses_nothing(accepted_by: str, temporal_address: str) -> None:
    """Whichever version the API has. The part ends its runs after the first agent, and the whole hands them off."""
    versions = Deployment()
    del versions.part.agents["first"]

    @versions.part.agent(name="first")
    async def ends_here(n: int) -> int:
        return n

    names = ["first"] if accepted_by == "part" else ["first", "fresh", "caller"]
    async with (
        worker_of(versions.whole, temporal_address),
        worker_of(versions.part, temporal_address),
        open_pair(getattr(versions, accepted_by), temporal_address, with_worker=False) as engine,
    ):
        runs = [await engine.submit(name, {"n": n}) for name in names for n in range(8)]
        batches = [await engine.submit_batch(name, numbers(8), BatchOptions(max_workers=8)) for name in names]
        runs = [await engine.wait(run.run_id, PATIENCE_S) for run in runs]
        for batch in batches:
            await ended(engine, batch)
            runs += await engine.get_items(batch.batch_id)
    assert {(run.status, run.error, run.attempt) for run in runs} == {(RunStatus.COMPLETED, None, 1)}
    assert len(runs) == 16 * len(names)


@pytest.mark.parametrize(
    ("agent_name", "status", "calls"),
    [
        pytest.param("fresh", RunStatus.STARTING, ["fresh 1"], id="first step"),
        pytest.param("first", RunStatus.RUNNING, ["first 1", "second 1"], id="second step"),
        pytest.param("caller", RunStatus.RUNNING, ["called 1", "helper 1", "helper 101"], id="called agent"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "item"])
async def test_work_waits_for_a_worker_that_has_its_agent(
    kind: str, agent_name: str, status: RunStatus, calls: list[str], temporal_address: str
) -> None:
    """Nothing is counted or stored as a failure, and nothing is executed twice. See ``on_interrupt="fail"`` above."""
    versions = Deployment()
    async with open_pair(versions.whole, temporal_address, with_worker=False) as engine:
        async with worker_of(versions.part, temporal_address):
            if kind == "run":
                run = await engine.submit(agent_name, {"n": 1})
                await until_left(engine, run_workflow_id(run.run_id, 1))
            else:
                batch = await engine.submit_batch(agent_name, [{"n": 1}], BatchOptions())
                await until_left(engine, chunk_workflow_id(batch.batch_id, 0, 1))
                (run,) = await engine.get_items(batch.batch_id)
            run = await engine.get_run(run.run_id)
            assert (run.status, run.error, run.attempt) == (status, None, 1)
            assert (run.started_at is None) == (status is RunStatus.STARTING)
            async with worker_of(versions.whole, temporal_address):
                with anyio.fail_after(PATIENCE_S):
                    run = await engine.wait(run.run_id)
    assert (run.status, run.error, run.attempt) == (RunStatus.COMPLETED, None, 1)
    assert sorted(versions.calls) == calls


@pytest.mark.parametrize("kind", ["run", "item"])
async def test_a_step_whose_worker_was_killed_waits_for_one_that_has_its_agent(
    kind: str, temporal_address: str, tmp_path: Path
) -> None:
    """The retry of a killed step is one, however often other workers have left it: on_interrupt="fail" holds."""
    target, log = tmp_path / "noting.py", tmp_path / "log"
    text = NOTING.format(name=new_id(), log=str(log), item_s=0)
    target.write_text(text.replace("sleep(0.3)", "sleep(600)"))
    flock, without = runpy.run_path(str(target))["flock"], Flock()
    without.name = flock.name
    runs, batches = list[Run](), list[Batch]()
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        with working(target, temporal_address) as doomed:
            for name, inputs in (("first", {"n": 1}), ("once", {})):
                if kind == "run":
                    runs.append(await engine.submit(name, inputs))
                else:
                    batches.append(await engine.submit_batch(name, [inputs], BatchOptions()))
            await until_started(log, 2)
            doomed.kill()
            doomed.wait()
        async with worker_of(without, temporal_address):
            for run in runs:
                await until_left(engine, run_workflow_id(run.run_id, 1))
            for batch in batches:
                await until_left(engine, chunk_workflow_id(batch.batch_id, 0, 1))
            target.write_text(text)
            with working(target, temporal_address):
                for batch in batches:
                    await engine.wait_batch(batch.batch_id, PATIENCE_S)
                    runs += await engine.get_items(batch.batch_id)
                first, once = [await engine.wait(run.run_id, PATIENCE_S) for run in runs]
    assert (first.status, first.error) == (RunStatus.COMPLETED, None)
    assert (once.status, once.error_type) == (RunStatus.FAILED, "interrupted")
    assert [entry.agent for entry in entries_in(log) if entry.pid != doomed.pid] == ["first", "second"]


@pytest.mark.parametrize(
    ("agent_name", "timeout_s", "error_type"),
    [
        pytest.param("fresh", None, "queue_timeout", id="first step"),
        pytest.param("first", 1, "timeout", id="second step"),
        pytest.param("caller", 1, "timeout", id="called agent"),
    ],
)
async def test_a_run_does_not_wait_for_an_agent_beyond_its_time(
    agent_name: str, timeout_s: float | None, error_type: str, temporal_address: str
) -> None:
    """As if it waited for any worker."""
    versions, queue_timeout_s = Deployment(), 1 if timeout_s is None else None
    async with (
        open_pair(versions.whole, temporal_address, with_worker=False, queue_timeout_s=queue_timeout_s) as engine,
        worker_of(versions.part, temporal_address),
    ):
        run = await engine.submit(agent_name, {"n": 1}, timeout_s=timeout_s)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.status, run.error_type) == (RunStatus.FAILED, error_type)
    assert (run.started_at is None) == (agent_name == "fresh")


async def test_an_item_does_not_wait_for_an_agent_beyond_its_time(temporal_address: str) -> None:
    versions = Deployment()
    async with (
        open_pair(versions.whole, temporal_address, with_worker=False) as engine,
        worker_of(versions.part, temporal_address),
    ):
        batch = await ended(engine, await engine.submit_batch("first", numbers(2), BatchOptions(timeout_s=1)))
        items = await engine.get_items(batch.batch_id)
    assert {(item.status, item.error_type) for item in items} == {(RunStatus.FAILED, "timeout")}


async def test_work_that_waits_for_an_agent_is_cancelled_at_once(temporal_address: str) -> None:
    versions = Deployment()
    async with (
        open_pair(versions.whole, temporal_address, with_worker=False) as engine,
        worker_of(versions.part, temporal_address),
    ):
        run = await engine.submit("fresh", {"n": 1})
        batch = await engine.submit_batch("fresh", numbers(2), BatchOptions(max_workers=1))
        await until_left(engine, run_workflow_id(run.run_id, 1))
        await until_left(engine, chunk_workflow_id(batch.batch_id, 0, 1))
        one, other = await engine.get_items(batch.batch_id)
        with anyio.fail_after(PATIENCE_S):
            for run_id in (run.run_id, one.run_id):
                await engine.cancel_run(run_id)
                assert (await engine.wait(run_id)).status is RunStatus.CANCELLED
            await engine.cancel_batch(batch.batch_id)
            assert (await engine.wait(other.run_id)).status is RunStatus.CANCELLED
    assert versions.calls == []


async def test_a_batch_that_mixes_versions_of_its_agent_is_a_warning(
    temporal_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One for a batch, which names both versions. Another version of an agent that it does not use is none."""
    at_api, at_worker = Flock(new_id()), Flock()
    at_worker.name = at_api.name

    @at_api.agent(name="item", next_agent="same")
    async def item_of_api(n: int) -> int:
        return n

    @at_worker.agent(name="item", next_agent="same")
    async def item_of_worker(n: int) -> int:
        return n + 1

    @at_api.agent
    async def same(n: int) -> int:
        return n

    at_worker.add_agent(same)
    async with (
        open_pair(at_api, temporal_address, with_worker=False) as engine,
        worker_of(at_worker, temporal_address),
    ):
        batch = await ended(engine, await engine.submit_batch("item", numbers(45), BatchOptions(max_workers=4)))
        unmixed = await ended(engine, await engine.submit_batch("same", numbers(5), BatchOptions()))
    assert (batch.status, unmixed.status) == (RunStatus.COMPLETED, RunStatus.COMPLETED)
    (warning,) = [record for record in caplog.records if "version" in record.getMessage()]
    assert warning.levelname == "WARNING"
    expected = (batch.batch_id, "'item'", version_of(item_of_api), version_of(item_of_worker))
    assert all(word in warning.getMessage() for word in expected)


# Long payloads


@pytest.fixture
def long_flock() -> Flock:
    """Return a flock whose first agent returns 5 MB, which the second gets."""
    flock = Flock(new_id())

    @flock.agent(output="more: str", next_agent="measure")
    def repeat(text: str, times: int) -> dict[str, str]:
        return {"more": text * times}

    @flock.agent
    def measure(more: str) -> int:
        return len(more)

    @flock.agent
    async def chat(go: str, context: RunContext) -> str:
        context.progress(1, 2, "x" * 300_000)
        await until(Path(go).exists)
        return "x" * 5_000_000

    return flock


LONG: dict[str, Any] = {"agent_name": "repeat", "inputs": {"text": "x" * 500_000, "times": 10}}


async def test_payloads_too_long_for_the_cluster_go_through_a_folder(
    long_flock: Flock, temporal_address: str, tmp_path: Path
) -> None:
    """An API and a worker store inputs and the results of steps and runs there. A deleted run leaves nothing."""
    payload_dir, go = tmp_path / "payloads", tmp_path / "go"
    payload_dir.mkdir()
    own: dict[str, Any] = {"flock": long_flock.name, "payload_dir": payload_dir}
    app = create_app(long_flock, engine=patient(TemporalEngine(long_flock.agents, temporal_address, **own)))
    async with TemporalWorker(long_flock.agents, ModelClient(), temporal_address, **own), app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t", timeout=60) as client:
            run = (await client.post("/run/flock", json=LONG)).json()
            assert (run["status"], run["result"]) == ("completed", {"result": 5_000_000})
            assert len(run["steps"][0]["result"]["more"]) == 5_000_000
            chat = await client.post(
                "/run/flock", json={"agent_name": "chat", "inputs": {"go": str(go)}, "async_run": True}
            )
            with anyio.fail_after(PATIENCE_S):
                while (  # noqa: ASYNC110 - as a client
                    seen := (await client.get(chat.headers["Location"])).json()
                )["progress"] is None:
                    await asyncio.sleep(0.05)
            assert (seen["status"], seen["progress"]["message"][-7:]) == ("running", "… (cut)")
            go.touch()
            chat = await client.get(chat.headers["Location"], params={"wait": 30})
            assert len(chat.json()["result"]["result"]) == 5_000_000
            stored = {path.name for path in payload_dir.iterdir()}
            assert stored == {f"run%3A{id_}" for id_ in (run["run_id"], chat.json()["run_id"])}
            assert all(re.fullmatch("[0-9a-f]{64}", path.name) for path in payload_dir.glob("*/*"))
            assert (await client.delete(f"/run/{run['run_id']}")).status_code == 204
            (file,) = payload_dir.glob("*/*")
            file.write_bytes(file.read_bytes()[:-1])
            await assert_unavailable(chat.url, client, "its checksum does not match")
            file.unlink()
            await assert_unavailable(chat.url, client, "Check that all processes have the same --payload-dir")
            file.mkdir()
            await assert_unavailable(chat.url, client, "cannot be read: ")


async def assert_unavailable(url: httpx.URL, client: httpx.AsyncClient, words: str) -> None:
    answer = await client.get(url)
    assert answer.status_code == 503
    assert words in answer.json()["detail"]
    assert "/payloads" not in answer.text, "clients do not see its path"


async def test_a_process_without_the_folder_reports_the_missing_option(
    long_flock: Flock, temporal_address: str, tmp_path: Path
) -> None:
    """A worker fails the run, which can be retried when the worker has the folder. An API answers 503."""
    async with open_pair(long_flock, temporal_address, with_worker=False, payload_dir=tmp_path) as engine:
        run = await engine.submit(LONG["agent_name"], LONG["inputs"])
        async with open_pair(long_flock, temporal_address) as other:
            with anyio.fail_after(PATIENCE_S):
                run = await engine.wait(run.run_id)
            assert (run.status, run.error_type) == (RunStatus.FAILED, "payload_lost")
            assert "Start it with --payload-dir" in (run.error or "")
            with pytest.raises(StoreError, match="Start it with --payload-dir"):
                await other.get_run(run.run_id)
        await engine.retry_run(run.run_id)
        async with open_pair(long_flock, temporal_address, payload_dir=tmp_path):
            with anyio.fail_after(PATIENCE_S):
                assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED


async def test_a_payload_waits_for_disk_space_and_leaves_no_partial_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A result that was paid for is not dropped. A failing fsync simulates the full disk."""
    errors = [OSError(errno.ENOSPC, "No space left on device")]

    def fsync(descriptor: int) -> None:
        if errors:
            raise errors.pop()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(payloads, "RETRY_AFTER_S", 0.01)
    folder = PayloadFolder(tmp_path)
    (tmp_path / "run%3A1").mkdir()
    await folder.store_ahead("run:1", "x" * 300_000)
    (file,) = (tmp_path / "run%3A1").iterdir()
    os.utime(file, (0, 0))
    await folder.store_ahead("run:1", "x" * 300_000)
    assert file.stat().st_mtime > 0, "reuse makes the file as recent as a new one"
    await folder.store_ahead("run:1", "short")
    assert [*(tmp_path / "run%3A1").iterdir()] == [file]


async def test_a_claim_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / ("0" * 64)).write_text("secret")
    (tmp_path / "payloads").mkdir()
    for file in (f"../{'0' * 64}", f"{tmp_path}/{'0' * 64}", ""):
        claim = StorageDriverClaim({"file": file})
        with pytest.raises(ApplicationError, match="is not a valid file name"):
            await PayloadFolder(tmp_path / "payloads").retrieve(StorageDriverRetrieveContext(), [claim])


async def test_a_missing_folder_is_reported_at_startup(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match=r"gone' is missing or not writable.*Create it, or name another one"):
        async with TemporalEngine({}, "127.0.0.1:1", payload_dir=tmp_path / "gone"):
            pass


# Histories


async def test_the_text_of_an_exception_is_not_in_the_history(temporal_address: str) -> None:
    flock = sample_flock()
    flock.name = new_id()
    async with open_pair(flock, temporal_address) as engine:
        run = await engine.wait((await engine.submit("explode", {"text": "xyzzy"})).run_id)
        history = await engine.cluster.handle(run_workflow_id(run.run_id, 1)).fetch_history()
    stored = str([event for event in history.events if event.HasField("activity_task_failed_event_attributes")])
    assert "explode" in stored
    assert "a secret" not in stored


@pytest.mark.parametrize("path", sorted(HISTORIES.glob("*.json")), ids=lambda path: path.stem)
async def test_recorded_histories_can_be_replayed(path: Path) -> None:
    """A workflow that is running when a new version is deployed continues as it started."""
    history = WorkflowHistory.from_json(path.stem, await anyio.Path(path).read_text())
    await replay(history)
    kind, _, rest = path.stem.partition("-")
    if kind == "batch":
        memos = [event.workflow_properties_modified_event_attributes.upserted_memo.fields for event in history.events]
        (*_, last) = [decoded(memo["batch"], Batch) for memo in memos if "batch" in memo]
        assert rest.startswith(last.status.value)
    elif kind == "chunk":
        given = history.events[-1].workflow_execution_completed_event_attributes.result.payloads[0]
        found = decoded(given, Counts)
        counts = {"completed": found.completed, "failed": found.failed, "cancelled": found.cancelled}
        expected = "-".join(f"{status}-{count}" for status, count in counts.items() if count)
        assert rest.partition("-with-")[0] == expected
    elif kind == "webhook":
        assert rest == {"completed": "sent", "failed": "given-up"}[end_of(history)]
    elif kind != "session":
        assert path.stem.startswith(run_of(history.events).status.value)


def end_of(history: WorkflowHistory) -> str:
    return str(history.events[-1].WhichOneof("attributes")).split("_")[2]


async def replay(history: WorkflowHistory) -> None:
    workflows = [FlockRun, FlockMark, FlockSession, FlockAccount, FlockBatch, FlockChunk, FlockRows, FlockDelete]
    workflows.append(FlockWebhook)
    replayer = Replayer(workflows=workflows, data_converter=CONVERTER, workflow_runner=UnsandboxedWorkflowRunner())
    await replayer.replay_workflow(history)


@pytest.mark.parametrize("name", ["cancelled-with-webhooks", "failed-with-webhooks", "batch-completed-with-a-webhook"])
async def test_a_worker_may_drop_a_workflow_from_its_memory_at_any_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also while it waits for the start of a webhook, and ignores its cancellation."""
    text, count = await anyio.Path(HISTORIES / f"{name}.json").read_text(), 0
    events = list(WorkflowHistory.from_json(name, text).events)
    for end, event in enumerate(events, 1):
        if event.HasField("workflow_task_started_event_attributes"):
            await replay(WorkflowHistory(name, events[:end]))
            count += 1
    assert count >= 6
    assert "Eviction" not in caplog.text


@pytest.mark.parametrize("name", ["completed-with-an-answer", "failed-since-a-question-expired", "batch-completed"])
async def test_what_a_worker_of_an_earlier_version_has_executed_reports_nothing(name: str) -> None:
    """It did not know that the agent has a receiver, and a later worker continues the run."""
    history = WorkflowHistory.from_json(name, await anyio.Path(HISTORIES / f"{name}.json").read_text())
    (payload,) = history.events[0].workflow_execution_started_event_attributes.input.payloads
    payload.data = payload.data.removesuffix(b"}") + b',"has_receiver":true}'
    await replay(history)


# Calls

CALLING = """
import asyncio, os
from flock.core import Flock
from flock.runs import RunContext

flock = Flock({name!r})
log = os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_RDWR)

async def note(word: str) -> int:
    os.write(log, word.encode() + b"\\n")
    return len(word)

async def hang() -> int:
    await note("hang")
    if open({log!r}).read().split().count("hang") == 1:
        await asyncio.sleep(600)
    return 1000

@flock.agent
async def work(context: RunContext) -> int:
    first = await context.call(note, "a")
    both = await asyncio.gather(context.call(note, "bb"), context.call(note, "bb"))
    return first + sum(both) + await context.call(hang)
"""


@pytest.mark.parametrize("end", ["killed", "stopped"])
@pytest.mark.parametrize("kind", ["run", "item"])
async def test_finished_calls_outlive_their_worker(kind: str, end: str, temporal_address: str, tmp_path: Path) -> None:
    """The next worker executes only the call that was running. A worker of a busy machine is not taken for dead."""
    target, log = tmp_path / "calling.py", tmp_path / "log"
    target.write_text(CALLING.format(name=new_id(), log=str(log)))
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(
        TemporalEngine(flock.agents, temporal_address, flock=flock.name, heartbeat_timeout_s=10)
    ) as engine:
        with working(target, temporal_address, options=["--drain-timeout", "0"]) as doomed:
            run_id = ""
            if kind == "run":
                run_id = (await engine.submit("work", {})).run_id
            else:
                batch = await engine.submit_batch("work", [{}], BatchOptions())
            with anyio.fail_after(PATIENCE_S):
                while "hang" not in log.read_text():  # noqa: ASYNC110 - another process writes it
                    await anyio.sleep(0.02)
            doomed.kill() if end == "killed" else doomed.terminate()
            doomed.wait()
        with working(target, temporal_address):
            if kind == "item":
                await engine.wait_batch(batch.batch_id, PATIENCE_S)
                (item,) = await engine.get_items(batch.batch_id)
                run_id = item.run_id
            run = await engine.wait(run_id, PATIENCE_S)
    assert run.result is not None
    assert (run.status, bytes(run.result)) == (RunStatus.COMPLETED, b'{"result":1005}')
    assert log.read_text().split() == ["a", "bb", "bb", "hang", "hang"]


async def test_replies_of_models_and_calls_of_tools_outlive_their_worker(
    temporal_address: str, tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a call that failed, since the model has read its error."""
    target, log = tmp_path / "tools.py", tmp_path / "log"
    target.write_text(CALLING_TOOLS.format(name=new_id(), log=str(log)))
    flock: Flock = runpy.run_path(str(target))["flock"]
    notes = [("note", {"word": "a"}), ("note", {"word": "fail"})]
    model.replies = [Reply(calls=[*notes]), Reply(calls=[("hang", {})]), Reply({"a": "x"})]
    with model.serve() as url:
        monkeypatch.setenv("OLLAMA_BASE_URL", url)
        async with patient(
            TemporalEngine(flock.agents, temporal_address, flock=flock.name, heartbeat_timeout_s=10)
        ) as engine:
            with working(target, temporal_address, options=["--drain-timeout", "0"]) as doomed:
                run_id = (await engine.submit("ask", {"q": "?"})).run_id
                with anyio.fail_after(PATIENCE_S):
                    while "hang" not in log.read_text():  # noqa: ASYNC110 - another process writes it
                        await anyio.sleep(0.02)
                doomed.kill()
                doomed.wait()
            with working(target, temporal_address):
                run = await engine.wait(run_id, PATIENCE_S)
    assert run.result is not None
    assert (run.status, bytes(run.result)) == (RunStatus.COMPLETED, b'{"a":"x"}')
    assert run.usage == Usage(input_tokens=30, output_tokens=15)
    assert sorted(log.read_text().split()) == ["a", "fail", "hang", "hang"]
    assert len(model.requests) == 3


# The command line


def test_the_ten_lines_of_the_temporal_page_work(temporal_address: str) -> None:
    """Unchanged, except for the addresses."""
    page = (ROOT / "docs" / "temporal.md").read_text("utf-8")
    (lines,) = (block.splitlines() for block in re.findall(r"(?s)```bash\n(.*?)```", page) if "# 10.0.0.1" in block)
    assert len(lines) == 10
    lines = [line.replace("10.0.0.1:7233", temporal_address).removesuffix(" &") for line in lines]
    cluster, serve, work = (
        next(line for line in lines if line.startswith(words))
        for words in ("temporal server", "flockapi serve", "flockapi worker")
    )
    shown = subprocess.run(["bash", "-c", f"{Path(sys.executable).parent}/{cluster} --help"], capture_output=True)
    assert shown.returncode == 0, "it accepts the options"
    ours = f"cd {shlex.quote(str(ROOT))} && exec {shlex.quote(sys.executable)} -m flock"
    serve = serve.replace("--host 10.0.0.1", "--host 0.0.0.0 --port 0").replace("flockapi", ours)
    keys = "alice=fk_a-key-of-the-tests-that-is-long-enough"
    worker = subprocess.Popen(["bash", "-c", work.replace("flockapi", ours)], stderr=subprocess.DEVNULL)
    try:
        with running("bash", "-c", serve, FLOCK_API_KEYS=keys) as server:
            port = server.url.rpartition(":")[2]
            command = lines[-1].replace("10.0.0.1:8344", f"127.0.0.1:{port}").replace("curl", "curl -sS", 1)
            done = subprocess.run(
                ["bash", "-c", command], env=os.environ | {"FLOCK_API_KEYS": keys}, capture_output=True
            )
            assert msgspec.json.decode(done.stdout)["result"] == {"result": "Hello, Ann!"}
    finally:
        worker.kill()
        worker.wait()


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    arguments = ["serve", "x.py", "--temporal", "127.0.0.1:1"]
    for option, words in (("--store=x.db", "the cluster stores"), ("--max-tokens=1", "flockapi worker")):
        result = CliRunner().invoke(main, [*arguments, option])
        assert result.exit_code == 2
        assert words in result.output
    result = CliRunner().invoke(main, ["serve", "x.py", "--payload-dir", str(tmp_path)])
    assert (result.exit_code, "needs --temporal" in result.output) == (2, True)


async def test_the_engine_and_its_runs_do_not_see_the_context_of_a_caller(temporal_address: str) -> None:
    tenant: ContextVar[str] = ContextVar("tenant", default="nobody")
    flock, seen = Flock(f"contexts {new_id()}"), list[str]()

    @flock.agent
    async def agent() -> str:
        return tenant.get()

    class Watched(TemporalEngine):
        async def _watch(self) -> None:
            seen.append(tenant.get())
            await super()._watch()

    async with TemporalWorker(flock.agents, ModelClient(), temporal_address, flock=flock.name):
        tenant.set("caller")
        async with Watched(flock.agents, temporal_address, flock=flock.name) as engine:
            for is_async in (True, False):
                run = await engine.wait((await engine.submit("agent", EMPTY, is_async=is_async)).run_id)
                assert run.result is not None
                assert bytes(run.result) == b'{"result":"nobody"}'
    assert seen == ["nobody"]


def test_a_worker_warns_at_startup_about_agents_that_cannot_run(temporal_address: str, tmp_path: Path) -> None:
    """Workers call the models. Servers do not, and need none of their keys."""
    target = tmp_path / "bare.py"
    made = "flock.add_agent(FlockFactory.create_default_agent('bare', output='answer'))"
    target.write_text(f"from flock.core import Flock, FlockFactory\nflock = Flock({new_id()!r})\n{made}\n")
    command = flockapi_command("worker", str(target), "--temporal", temporal_address)
    process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    worker = Server(process)
    try:
        worker.wait_for_line("WARNING:  The agent 'bare' cannot run. The model cannot be called: no model is set")
        worker.stop()
    finally:
        process.kill()
        process.wait()
        worker.close()


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["worker"]], ids=["serve", "worker"])
def test_a_missing_extra_is_reported_with_its_install_command(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("from flock.core import Flock\nflock = Flock()\n")
    hide = "import sys; sys.modules['temporalio'] = None; from flock.command.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", hide, *command, str(tmp_path / "empty.py"), "--temporal", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"pip install 'temporalio>=[\d.]+'$", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr

"""Runs and items that kill their workers: they fail, and what was executed beside them completes."""

import asyncio
import contextlib
import dataclasses
import logging
import runpy
import subprocess
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from msgspec.structs import replace
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from flock.core import Flock
from flock.models.llm import ModelClient
from flock.runs import BatchOptions, Run, RunStatus, new_id, now
from flock.temporal import TemporalEngine, TemporalWorker, suspects
from flock.temporal.items import ItemActivities
from flock.temporal.messages import (
    Deaths,
    Heartbeat,
    ItemsDone,
    ItemsOrder,
    Part,
    RunOrder,
    decoded,
    run_workflow_id,
)
from flock.temporal.suspects import Gate, Suspicion
from tests.support.cluster import patient
from tests.support.engines import until
from tests.support.flocks import numbers
from tests.support.servers import flockapi_command

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")

POISON = """
import asyncio, os, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock = Flock({name!r})
log = pathlib.Path({log!r})

@flock.agent
async def good(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "done"

@flock.agent
async def bad() -> str:
    os._exit(1)

@flock.agent
async def item(n: int) -> int:
    if n == 7:
        os._exit(1)
    await asyncio.sleep(0.02)
    return n

def note(n: int) -> int:
    with log.open("a") as file:
        file.write(f"{{n}}\\n")
    return n

@flock.agent
async def caller(context: RunContext) -> str:
    for n in range(4):
        is_new = str(n) not in (log.read_text().split() if log.exists() else ())
        await context.call(note, n)
        if is_new:
            os._exit(1)
    return "done"
"""


class Workers:
    """Worker processes, each of which is started again when it has died."""

    def __init__(self, folder: Path, address: str, count: int, heartbeat_timeout_s: float = 2) -> None:
        target = folder / "poison.py"
        target.write_text(POISON.format(name=new_id(), log=str(folder / "calls")))
        self.flock: Flock = runpy.run_path(str(target))["flock"]
        options: dict[str, Any] = {"flock": self.flock.name, "heartbeat_timeout_s": heartbeat_timeout_s}
        self.engine = patient(TemporalEngine(self.flock.agents, address, **options))
        self.deaths = 0
        self._command = flockapi_command("worker", str(target), "--temporal", address, "--drain-timeout", "1")
        self._logs = [folder / f"worker{n}.log" for n in range(count)]
        self._stops = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(log,)) for log in self._logs]

    async def __aenter__(self) -> TemporalEngine:
        for thread in self._threads:
            thread.start()
        return await self.engine.__aenter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self._stops.set()
        await self.engine.__aexit__(None, None, None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    def _run(self, path: Path) -> None:
        with path.open("wb") as log:
            while not self._stops.is_set():
                process = subprocess.Popen(self._command, stdout=log, stderr=log)
                while process.poll() is None and not self._stops.wait(0.05):
                    pass
                if process.poll() is None:
                    process.terminate()
                else:
                    self.deaths += 1
                process.wait()

    def lines(self, words: str) -> list[str]:
        return [line for log in self._logs for line in log.read_text().splitlines() if words in line]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bad", [1, pytest.param(3, marks=pytest.mark.nightly)])
async def test_a_run_that_kills_its_workers_fails_alone(bad: int, temporal_address: str, tmp_path: Path) -> None:
    """The other runs, which both workers execute beside it, complete. The log names it."""
    workers, names = Workers(tmp_path, temporal_address, 2), (["good"] * 10 + ["bad"]) * bad + ["good"] * 10
    async with workers as engine:
        runs = [await engine.submit(name, {"seconds": 2} if name == "good" else {}) for name in names]
        with anyio.fail_after(280):
            runs = [await engine.wait(run.run_id) for run in runs]
    assert [run.error_type for run in runs] == ["crashed" if name == "bad" else None for name in names]
    lines = workers.lines("killed its process")
    for run in runs:
        assert sum(f"run {run.run_id}: agent bad" in line for line in lines) == (run.status is RunStatus.FAILED)
    assert 3 <= workers.deaths <= 8 * bad  # three are enough if it was alone in two of them


@pytest.mark.timeout(150)
@pytest.mark.nightly  # a minute and a half
async def test_a_batch_continues_without_an_item_that_kills_its_workers(temporal_address: str, tmp_path: Path) -> None:
    workers = Workers(tmp_path, temporal_address, 2)
    async with workers as engine:
        batch = await engine.submit_batch("item", numbers(40), BatchOptions(max_workers=8))
        with anyio.fail_after(120):
            batch = await engine.wait_batch(batch.batch_id)
        items = await engine.get_items(batch.batch_id)
    assert (batch.status, batch.failed_items, batch.completed_items) == (RunStatus.COMPLETED, 1, 40)
    assert [item.position for item in items if item.error_type == "crashed"] == [7]
    (line,) = workers.lines("killed its process")
    assert "agent item" in line


@pytest.mark.timeout(300)
async def test_a_finished_call_clears_its_run(temporal_address: str, tmp_path: Path) -> None:
    """A run that kills its worker after each of its calls, and so four times, completes."""
    workers = Workers(tmp_path, temporal_address, 1, heartbeat_timeout_s=5)  # one that only stops is not dead
    async with workers as engine:
        run = await engine.submit("caller", {})
        with anyio.fail_after(280):
            run = await engine.wait(run.run_id)
    assert (run.status, workers.deaths) == (RunStatus.COMPLETED, 4)
    assert workers.lines("suspects start") == []


async def test_a_worker_that_is_asked_to_stop_has_not_died(temporal_address: str) -> None:
    flock, started, may_end = Flock(new_id()), list[str](), anyio.Event()

    @flock.agent
    async def work() -> str:
        started.append("work")
        await may_end.wait()
        return "done"

    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        run = await engine.submit("work", {})
        for stops in range(4):
            async with TemporalWorker(
                flock.agents, ModelClient(None), temporal_address, flock=flock.name, drain_timeout_s=0
            ):
                await until(lambda stops=stops: len(started) == stops + 1)  # type: ignore[misc]
                if stops == 3:
                    may_end.set()
                    run = await engine.wait(run.run_id)
            if stops < 3:
                described = await engine.cluster.describe(run_workflow_id(run.run_id, 1))
                assert described is not None
                (pending,) = described.raw_description.pending_activities
                beat = decoded(pending.heartbeat_details.payloads[0], Heartbeat)
                assert beat.deaths == Deaths(survived=stops + 1)
    assert run.status is RunStatus.COMPLETED


# What an activity knows of its earlier attempts


def given(environment: ActivityEnvironment, attempt: int, last: Heartbeat | ItemsDone) -> None:
    beats = [msgspec.to_builtins(last)]
    environment.info = dataclasses.replace(environment.info, heartbeat_details=beats, attempt=attempt)


async def test_a_run_fails_that_was_alone_in_two_deaths_of_three(caplog: pytest.LogCaptureFixture) -> None:
    """Attempts in which a worker has stopped or left it to others do not count."""
    flock = Flock("f")
    worker = TemporalWorker(flock.agents, ModelClient(None), "127.0.0.1:1", flock="f")
    run = Run(run_id=new_id(), flock="f", agent_name="gone", created_at=now(), inputs=EMPTY)
    environment = ActivityEnvironment()
    given(environment, 4, Heartbeat(deaths=Deaths(alone=1, alone_at=3)))
    with pytest.raises(ApplicationError, match="The process died repeatedly while it was executing this") as caught:
        await environment.run(worker._run_agent, RunOrder(run=run, timeout_s=1))
    assert (caught.value.type, caught.value.non_retryable) == ("crashed", True)
    (record,) = [record for record in caplog.records if "killed" in record.getMessage()]
    assert record.levelno == logging.ERROR
    assert f"run {run.run_id}: agent gone killed its process, which died 3 times" in record.getMessage()
    for attempt, innocent in [
        (4, Deaths(alone=1, alone_at=2)),
        (4, Deaths(alone=1)),
        (4, Deaths(alone=1, alone_at=3, survived=1)),
        (100, Deaths()),
    ]:
        given(environment, attempt, Heartbeat(deaths=innocent))
        with pytest.raises(ApplicationError, match="This worker has no agent 'gone'") as left:
            await environment.run(worker._run_agent, RunOrder(run=run, timeout_s=1))
        assert not left.value.non_retryable
    given(environment, 4, Heartbeat(misses=1, deaths=Deaths(alone=1, alone_at=3)))
    with pytest.raises(ApplicationError, match="This worker has no agent 'gone'"):
        await environment.run(worker._run_agent, RunOrder(run=run, timeout_s=1))


async def test_an_item_fails_that_was_alone_in_two_deaths_of_three() -> None:
    """The next item has not been executed in any of them."""
    flock = Flock("f")
    worker = TemporalWorker(flock.agents, ModelClient(None), "127.0.0.1:1", flock="f")
    items = ItemActivities(worker.workplace)
    run = Run(run_id=new_id(), flock="f", agent_name="gone", created_at=now(), inputs=EMPTY, batch_id="b", position=0)

    async def chunk(order: ItemsOrder) -> Any:
        return SimpleNamespace(items={n: replace(run, position=n) for n in range(2)}, agents={})

    items._chunk = chunk  # type: ignore[method-assign]
    environment = ActivityEnvironment()
    given(environment, 4, ItemsDone(deaths=Deaths(alone=1, alone_at=3)))
    order = ItemsOrder(batch_id="b", chunk=0, parts=(Part(position=0), Part(position=1)), timeout_s=1)
    done = await environment.run(items.run, order)
    assert [(ended.position, ended.status, ended.error_type) for ended in done.ended] == [
        (0, RunStatus.FAILED, "crashed")
    ]


# The gate


class Case(Suspicion):
    """A suspicion without an activity. It notes what the cluster would know of it."""

    def __init__(self, deaths: int, *, survived: int = 0) -> None:
        self.attempt = deaths + survived + 1
        self._survived, self._alone, self._was_held = survived, 0, False
        self.sent: list[Deaths] = []

    @property
    def is_stopping(self) -> bool:
        return self.is_stopped

    async def confirm(self) -> None:
        await asyncio.sleep(0.01)
        self.sent.append(self.report() or Deaths())


class Line:
    """Steps at the gate of a worker."""

    def __init__(self) -> None:
        self.gate = Gate(3)
        self.executing: dict[str, Case] = {}
        self._ends: dict[str, anyio.Event] = {}

    async def step(self, key: str, case: Case) -> None:
        end = self._ends[key] = anyio.Event()
        self.gate.arrive(key, case)
        try:
            while not self.gate.is_open_to(key):
                await case.hold()
                await self.gate.wait_for_turn(key)
            await self.gate.start(key, case)
            self.executing[key] = case
            await end.wait()
            del self.executing[key]
        finally:
            await self.gate.leave(key, case)

    def end(self, *keys: str) -> None:
        for key in keys:
            self._ends[key].set()


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr(suspects, "GATHER_S", 0.1)
    return Line()


@contextlib.asynccontextmanager
async def together(*steps: Coroutine[Any, Any, None]) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    async with asyncio.TaskGroup() as tasks:
        started = [tasks.create_task(step) for step in steps]
        yield started
        for task in started:
            task.cancel()


async def test_a_suspect_is_alone_and_the_cluster_knows_it(line: Line) -> None:
    """From before it begins until before anything else does."""
    busy, suspect, other = Case(0), Case(2), Case(0)
    async with together(line.step("busy", busy), line.step("suspect", suspect)):
        await until(lambda: line.gate._is_closed)
        async with together(line.step("other", other)):
            await until(lambda: bool(other.sent))
            assert list(line.executing) == ["busy"]
            assert (busy.sent, other.sent) == ([], [Deaths(survived=1, is_held=True)])
            assert suspect.sent == [Deaths(survived=1, is_held=True)]
            line.end("busy")
            await until(lambda: "suspect" in line.executing)
            assert suspect.sent[1:] == [Deaths(alone_at=3)]
            await anyio.sleep(0.2)
            assert list(line.executing) == ["suspect"]
            await until(lambda: "other" in line.executing)
            assert suspect.sent[2:] == [Deaths()]
            assert other.sent[1:] == [Deaths()]


async def test_a_suspect_that_ends_is_not_alone_any_more(line: Line) -> None:
    suspect, other = Case(2), Case(3)
    async with together(line.step("suspect", suspect), line.step("other", other)):
        await until(lambda: "other" in line.executing)
        assert other.sent[1:] == [Deaths(alone_at=4)]
        line.end("other")
        await until(lambda: "suspect" in line.executing)
        assert other.sent[2:] == [Deaths()]
        assert suspect.sent[1:] == [Deaths(alone_at=3)]


async def test_a_suspect_that_is_cancelled_while_it_waits_holds_up_nothing(line: Line) -> None:
    async with together(line.step("busy", Case(0)), line.step("suspect", Case(2))) as (_, waiting):
        await until(lambda: line.gate._is_closed)
        waiting.cancel()
        await anyio.lowlevel.checkpoint()
        async with together(line.step("other", Case(0))):
            await until(lambda: "other" in line.executing)


@pytest.mark.parametrize(("deaths", "size"), [(2, 25), (3, 6), (4, 1), (5, 1), (500, 1)])
async def test_groups_become_smaller_with_each_death(
    deaths: int, size: int, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last groups are as large as the first ones, as long as all are there."""
    monkeypatch.setattr(suspects, "life_s", lambda deaths: 3600)
    async with together(*(line.step(f"{n}", Case(deaths)) for n in range(100))):
        for groups in range(1, 4):
            await until(lambda groups=groups: len(line.executing) == groups * size)  # type: ignore[misc]
            await anyio.sleep(0.1)
            assert len(line.executing) == groups * size
            line.gate._lives_until = 0.0

"""Mistakes of agents and clients, each of which once harmed the engine."""

import asyncio
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.errors import AgentError, DefinitionError, StoreError, Unstorable
from flock.runs import (
    BatchOptions,
    IdempotencyKey,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
)
from flock.runs.events import EVENTS_PER_ATTEMPT
from tests.support import PATIENCE_S
from tests.support.engines import until_run
from tests.support.servers import flockapi_command, running
from tests.test_lifecycle import EMPTY

pytestmark = pytest.mark.anyio


async def end_of(engine: EmbeddedEngine, agent_name: str, **more: Any) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait((await engine.submit(agent_name, EMPTY, **more)).run_id)


class Mute(AgentError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "flock.db") if request.param == "disk" else ":memory:"


@pytest.mark.parametrize(
    ("progress", "status"),
    [
        ((1, 2, "\ud800"), RunStatus.COMPLETED),
        ((1, 2, 5), RunStatus.COMPLETED),
        (("5",), RunStatus.COMPLETED),
        pytest.param((object(),), RunStatus.FAILED, id="an object"),
        ((None,), RunStatus.FAILED),
        ((float("nan"),), RunStatus.FAILED),
        ((1, float("inf")), RunStatus.FAILED),
        ((2**5000,), RunStatus.FAILED),
    ],
    ids=repr,
)
async def test_invalid_progress_fails_only_its_own_run(
    progress: tuple[Any, ...], status: RunStatus, store: str
) -> None:
    flock = Flock()

    @flock.agent
    async def tell(context: RunContext) -> int:
        context.progress(*progress)
        await anyio.sleep(0.12)  # longer than progress is collected before a write
        return 1

    async with flock.engine(store=store) as engine:
        assert (await end_of(engine, "tell")).status is status
        await engine.check_ready()
        (listed,) = await engine.list_runs(RunFilter())
        await engine.delete_run(listed.run_id)


@pytest.mark.parametrize("expose_errors", [False, True])
async def test_an_unstorable_value_or_error_fails_only_its_own_run(expose_errors: bool, store: str) -> None:
    flock = Flock()

    @flock.agent(next_agent=lambda result: "\ud800")
    async def to_nowhere() -> int:
        return 1

    @flock.agent
    async def mute() -> int:
        raise Mute("x")

    @flock.agent
    def muted_in_thread() -> int:
        error = ValueError()
        error.__class__ = type("Odd", (ValueError,), {"__str__": lambda self: 1 / 0})
        raise error

    @flock.agent
    async def fine() -> int:
        return 1

    async with flock.engine(store=store, expose_errors=expose_errors) as engine:
        runs = [await end_of(engine, name) for name in ("to_nowhere", "mute", "muted_in_thread")]
        assert [run.status for run in runs] == [RunStatus.FAILED] * 3
        assert runs[0].error_type == "unstorable"
        assert (await end_of(engine, "fine")).status is RunStatus.COMPLETED
        await engine.check_ready()


@pytest.mark.parametrize("is_long", [False, True])
async def test_a_run_with_an_unstorable_value_ends_and_harms_no_other(is_long: bool, store: str) -> None:
    """Its submission or its end reports the error, even if the run was saved in between."""
    flock = Flock()

    @flock.agent
    async def echo(n: int) -> int:
        if n and is_long:
            await anyio.sleep(0.12)  # longer than writes are collected
        return n

    principal: Any = uuid.uuid4()
    async with flock.engine(store=store) as engine:
        run = await engine.submit("echo", {"n": 1}, principal=principal, is_async=False)
        failed = await engine.wait(run.run_id)
        assert (failed.status, failed.error_type) == (RunStatus.FAILED, "unstorable")
        with pytest.raises(Unstorable):
            await engine.submit("echo", {"n": 1}, principal=principal)
        with pytest.raises(Unstorable):
            await engine.submit_batch("echo", [{"n": 1}], BatchOptions(), principal=principal)
        run = await engine.submit("echo", {"n": 0})
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        await engine.check_ready()


async def test_short_timeouts_leave_no_slot_or_thread_occupied(store: str) -> None:
    flock = Flock()

    @flock.agent
    def quick() -> int:
        return 1

    @flock.agent
    async def holds_up() -> int:
        for _ in range(10):
            time.sleep(0.01)  # noqa: ASYNC251 - as a careless agent does
            await anyio.lowlevel.checkpoint()
        return 1

    async with flock.engine(store=store, max_concurrency=4, max_threads=4) as engine:
        ids = [(await engine.submit("holds_up", EMPTY)).run_id]
        ids += [(await engine.submit("quick", EMPTY, timeout_s=0.005)).run_id for _ in range(40)]
        with anyio.fail_after(PATIENCE_S):
            for run_id in ids:
                await engine.wait(run_id)
        assert {(await end_of(engine, "quick")).status for _ in range(8)} == {RunStatus.COMPLETED}


async def test_a_store_has_the_same_locks_under_every_path(tmp_path: Path) -> None:
    """The path may be a symbolic link, and an agent may change the working directory."""
    (tmp_path / "folder").mkdir()
    begun: list[int] = []
    flock = Flock()

    @flock.agent
    async def wanders() -> int:
        begun.append(1)
        os.chdir(tmp_path / "folder")
        await anyio.sleep(2.5)  # longer than the interval at which engines check each other
        return 1

    async with flock.engine(store="real.db") as one:
        (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
        async with flock.engine(store=tmp_path / "link.db"):
            assert (await end_of(one, "wanders")).attempt == 1
    assert len(begun) == 1


async def test_an_accepted_cancellation_survives_a_restart(tmp_path: Path) -> None:
    may_go, calls = threading.Event(), []
    flock = Flock()

    @flock.agent
    def block() -> int:
        calls.append(1)
        may_go.wait(20)
        return 1

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("block", EMPTY)
        await until_run(engine, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        assert not (await engine.cancel_run(run.run_id)).status.is_final
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
    may_go.set()
    assert len(calls) == 1


async def test_items_cancelled_before_they_start_never_start(store: str) -> None:
    begun, may_go, calls = anyio.Event(), anyio.Event(), []
    flock = Flock()

    @flock.agent
    async def item(n: int) -> int:
        calls.append(n)
        begun.set()
        await may_go.wait()
        return n

    async with flock.engine(store=store) as engine:
        items = [msgspec.Raw(b'{"n": %d}' % n) for n in range(6)]
        batch = await engine.submit_batch("item", items, BatchOptions(max_workers=1))
        await begun.wait()
        for run in (await engine.get_items(batch.batch_id))[1:]:
            await engine.cancel_run(run.run_id)
        may_go.set()
        with anyio.fail_after(PATIENCE_S):
            while not (batch := await engine.get_batch(batch.batch_id)).status.is_final:  # noqa: ASYNC110 - as a client
                await anyio.sleep(0.01)
    assert calls == [0]
    assert (batch.completed_items, batch.cancelled_items) == (6, 5)


async def test_the_ids_of_cancelled_items_that_never_start_are_forgotten(store: str) -> None:
    flock, begun = Flock(), anyio.Event()

    @flock.agent
    async def item(n: int) -> int:
        begun.set()
        await anyio.sleep_forever()
        return n

    async with flock.engine(store=store) as engine:
        items = [msgspec.Raw(b'{"n": %d}' % n) for n in range(600)]
        batch = await engine.submit_batch("item", items, BatchOptions(max_workers=1))
        await begun.wait()
        last = (await engine.get_items(batch.batch_id, after=500))[-5:]
        for run in last:
            await engine.cancel_run(run.run_id)
        cancelled = engine._runner.cancelled_before
        assert cancelled.keys() == {run.run_id for run in last}
        await engine.cancel_batch(batch.batch_id)
        with anyio.fail_after(PATIENCE_S):
            while cancelled:  # noqa: ASYNC110 - the engine has no event for it
                await anyio.sleep(0.01)


async def test_the_watch_of_the_store_continues_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, no file can be opened for a moment."""
    flock = Flock()

    @flock.agent
    async def one() -> int:
        return 1

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        failures = [OSError(24, "Too many open files"), StoreError("now")]
        seen, data_version = anyio.Event(), engine.store.data_version

        async def fail_first() -> int:
            if failures:
                raise failures.pop()
            seen.set()
            return await data_version()

        monkeypatch.setattr(engine.store, "data_version", fail_first)
        with anyio.fail_after(PATIENCE_S):
            await seen.wait()
        assert (await end_of(engine, "one")).status is RunStatus.COMPLETED
        await engine.check_ready()


async def test_an_engine_whose_host_is_cancelled_shuts_down_cleanly(tmp_path: Path) -> None:
    flock, begun, naps_s = Flock(), anyio.Event(), [0, 600]

    @flock.agent
    async def nap() -> int:
        begun.set()
        await anyio.sleep(naps_s.pop())
        return 1

    with anyio.CancelScope() as host:
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            run = await engine.submit("nap", EMPTY)
            await begun.wait()
            host.cancel()
            await anyio.sleep(30)
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED


@pytest.mark.alone
async def test_engines_of_two_flocks_start_on_a_busy_file(tmp_path: Path) -> None:
    """Both are in one process, so an engine that waits for the lock must not block the one that holds it."""
    busy, other = Flock("busy"), Flock("other")

    async def one() -> int:
        return 1

    busy.agent(one)
    other.agent(one)
    async with busy.engine(store=tmp_path / "flock.db") as working, anyio.create_task_group() as tasks:

        async def work() -> None:
            while True:
                await end_of(working, "one")

        for _ in range(4):
            tasks.start_soon(work)
        with anyio.fail_after(PATIENCE_S):
            for _ in range(5):
                async with other.engine(store=tmp_path / "flock.db") as engine:
                    assert (await end_of(engine, "one")).status is RunStatus.COMPLETED
        tasks.cancel_scope.cancel()


async def test_a_waiter_gets_an_error_when_its_engine_drains(tmp_path: Path) -> None:
    flock = Flock()

    @flock.agent
    async def nap() -> int:
        await anyio.sleep(600)
        return 1

    async with flock.engine(store=tmp_path / "flock.db") as one, flock.engine(store=tmp_path / "flock.db") as other:
        run = await one.submit("nap", EMPTY)
        waiter = asyncio.create_task(other.wait(run.run_id, 60))
        await until_run(other, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        await other.drain(5)
        done, _ = await asyncio.wait([waiter], timeout=30)
        assert done
        assert "shutting down" in str(waiter.exception())


async def test_a_retry_with_no_steps_left_starts_and_completes(store: str) -> None:
    flock, begun = Flock(), anyio.Event()

    @flock.agent
    async def swallow() -> int:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            return 5  # noqa: B012 - as a careless agent swallows its cancellation

    async with flock.engine(store=store) as engine:
        run = await engine.submit("swallow", EMPTY)
        await begun.wait()
        await engine.cancel_run(run.run_id)
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        await engine.retry_run(run.run_id)
        run = await engine.wait(run.run_id)
        assert (run.status, run.attempt) == (RunStatus.COMPLETED, 2)
        assert run.started_at
        names = [event.name async for event in engine.events(run.run_id, after=2 * EVENTS_PER_ATTEMPT - 1) if event]
        assert names == ["run.started", "run.completed"]


async def test_the_idempotency_key_of_a_deleted_run_can_be_used_again(store: str) -> None:
    flock, key = Flock(), IdempotencyKey("k", b"1")

    @flock.agent
    async def one() -> int:
        return 1

    async with flock.engine(store=store) as engine:
        first = await end_of(engine, "one", key=key)
        await engine.delete_run(first.run_id)
        assert (await end_of(engine, "one", key=key)).run_id != first.run_id


@pytest.mark.parametrize("option", ["max_timeout_s", "queue_timeout_s", "keep_for_s"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e12])
def test_invalid_times_are_refused(option: str, value: Any) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(DefinitionError, match=option):
        Flock().engine(**options)


NAP = """
import anyio
from flock.core import Flock
flock = Flock()

@flock.agent
async def nap() -> None:
    print("at work", flush=True)
    await anyio.sleep(600)
"""


def test_a_second_interrupt_skips_the_drain_but_still_shuts_down_cleanly(tmp_path: Path) -> None:
    (tmp_path / "nap.py").write_text(NAP)
    command = flockapi_command("serve", str(tmp_path / "nap.py"), "--port", "0", "--drain-timeout", "50")
    with running(*command) as server:
        body = {"agent_name": "nap", "async_run": True}
        run_id = httpx.post(f"{server.url}/run/flock", json=body).json()["run_id"]
        server.wait_for_line("at work")
        server.process.send_signal(signal.SIGINT)
        with httpx.Client(base_url=server.url) as client:
            while client.get("/readyz").status_code == 200:
                time.sleep(0.01)
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)
    log = "\n".join(server.lines)
    assert "ERROR" not in log
    assert "Application shutdown complete" in log
    with running(*command) as server:
        server.wait_for_line("at work")
        assert httpx.get(f"{server.url}/run/{run_id}").json()["attempt"] == 2

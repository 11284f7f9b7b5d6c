"""What agents and clients can do wrong, and what must not come of it: each was once a way to hurt the engine."""

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
from flock.runs import BatchOptions, IdempotencyKey, Run, RunContext, RunFilter, RunStatus
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
async def test_progress_that_is_none_fails_its_own_run_at_most(
    progress: tuple[Any, ...], status: RunStatus, store: str
) -> None:
    flock = Flock()

    @flock.agent
    async def tell(context: RunContext) -> int:
        context.progress(*progress)
        await anyio.sleep(0.12)  # longer than progress is gathered
        return 1

    async with flock.engine(store=store) as engine:
        assert (await end_of(engine, "tell")).status is status
        engine.check_ready()
        (listed,) = await engine.list_runs(RunFilter())
        await engine.delete_run(listed.run_id)


@pytest.mark.parametrize("expose_errors", [False, True])
async def test_what_cannot_be_kept_or_said_fails_its_own_run_only(expose_errors: bool, store: str) -> None:
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
        engine.check_ready()


@pytest.mark.parametrize("is_long", [False, True])
async def test_a_run_with_a_value_that_can_never_be_kept_ends_for_who_waits_and_harms_no_other(
    is_long: bool, store: str
) -> None:
    """Its own submission or its end says so, also if the run was saved along the way."""
    flock = Flock()

    @flock.agent
    async def echo(n: int) -> int:
        if n and is_long:
            await anyio.sleep(0.12)  # longer than writes are gathered
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
        engine.check_ready()


async def test_short_times_leave_no_slot_and_no_thread_taken(store: str) -> None:
    flock = Flock()

    @flock.agent
    def quick() -> int:
        return 1

    @flock.agent
    async def holds_up() -> int:
        for _ in range(10):
            time.sleep(0.01)  # noqa: ASYNC251 - what a careless agent does
            await anyio.lowlevel.checkpoint()
        return 1

    async with flock.engine(store=store, max_concurrency=4, max_threads=4) as engine:
        ids = [(await engine.submit("holds_up", EMPTY)).run_id]
        ids += [(await engine.submit("quick", EMPTY, timeout_s=0.005)).run_id for _ in range(40)]
        with anyio.fail_after(PATIENCE_S):
            for run_id in ids:
                await engine.wait(run_id)
        assert {(await end_of(engine, "quick")).status for _ in range(8)} == {RunStatus.COMPLETED}


async def test_a_store_has_one_name_whatever_it_is_called(tmp_path: Path) -> None:
    """By a link, or after an agent has changed the folder, the locks are the same."""
    (tmp_path / "folder").mkdir()
    begun: list[int] = []
    flock = Flock()

    @flock.agent
    async def wanders() -> int:
        begun.append(1)
        os.chdir(tmp_path / "folder")
        await anyio.sleep(2.5)  # longer than engines look after each other
        return 1

    async with flock.engine(store="real.db") as one:
        (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
        async with flock.engine(store=tmp_path / "link.db"):
            assert (await end_of(one, "wanders")).attempt == 1
    assert len(begun) == 1


async def test_a_cancel_that_was_accepted_outlives_the_process(tmp_path: Path) -> None:
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


async def test_items_that_were_cancelled_before_they_began_do_not_begin(store: str) -> None:
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


async def test_a_watch_that_fails_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when no file can be opened for a moment."""
    flock = Flock()

    @flock.agent
    async def one() -> int:
        return 1

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        failures = [OSError(24, "Too many open files"), StoreError("now")]
        seen, data_version = anyio.Event(), engine.store.data_version

        def fail_first() -> int:
            if failures:
                raise failures.pop()
            seen.set()
            return data_version()

        monkeypatch.setattr(engine.store, "data_version", fail_first)
        with anyio.fail_after(PATIENCE_S):
            await seen.wait()
        assert (await end_of(engine, "one")).status is RunStatus.COMPLETED
        engine.check_ready()


async def test_an_engine_whose_host_is_cancelled_leaves_in_order(tmp_path: Path) -> None:
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
async def test_engines_of_two_flocks_start_on_a_file_that_is_busy(tmp_path: Path) -> None:
    """In one process: waiting for the other must not keep the other from going on."""
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
        with anyio.fail_after(4):
            for _ in range(5):
                async with other.engine(store=tmp_path / "flock.db") as engine:
                    assert (await end_of(engine, "one")).status is RunStatus.COMPLETED
        tasks.cancel_scope.cancel()


async def test_a_waiter_at_another_engine_is_told_when_that_one_leaves(tmp_path: Path) -> None:
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
        done, _ = await asyncio.wait([waiter], timeout=5)
        assert done
        assert "shutting down" in str(waiter.exception())


async def test_a_retry_with_nothing_left_to_do_begins_and_ends(store: str) -> None:
    flock, begun = Flock(), anyio.Event()

    @flock.agent
    async def swallow() -> int:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            return 5  # noqa: B012 - what a careless agent does with its cancellation

    async with flock.engine(store=store) as engine:
        run = await engine.submit("swallow", EMPTY)
        await begun.wait()
        await engine.cancel_run(run.run_id)
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        await engine.retry_run(run.run_id)
        run = await engine.wait(run.run_id)
        assert (run.status, run.attempt) == (RunStatus.COMPLETED, 2)
        assert run.started_at
        names = [event.name async for event in engine.events(run.run_id, after=1_999_999) if event]
        assert names == ["run.started", "run.completed"]


async def test_a_run_that_its_client_deleted_may_be_made_again_under_its_key(store: str) -> None:
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
def test_times_that_are_none_are_refused(option: str, value: Any) -> None:
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


def test_a_second_interrupt_ends_the_patience_and_not_the_order(tmp_path: Path) -> None:
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

"""Conversations: runs of one session are executed in order, and agents with ``history=`` see the turns before them."""

import inspect
import itertools
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextvars import Context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest
from msgspec.structs import replace

from flock import fair
from flock.core import Flock, FlockFactory
from flock.engine.embedded import SEEN_BY_ALL_S
from flock.errors import Conflict, DefinitionError, Replayed, RunNotFound, SessionNotFound, StoreError
from flock.runs import Engine, IdempotencyKey, Principal, Run, RunContext, RunFilter, RunStatus, Usage, now
from flock.steps.executor import MAX_HISTORY_BYTES
from flock.testing import FakeModel, Reply
from flock.web.auth import ScopedEngine
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_with_worker
from tests.support.engines import OpenEngine, sqlite_of, until, until_run
from tests.support.servers import serving
from tests.support.stores import undo

if TYPE_CHECKING:
    from flock.temporal import TemporalEngine

pytestmark = pytest.mark.anyio


class Turns:
    """A flock whose agent records its calls, and waits in a call until a test lets it continue."""

    def __init__(self) -> None:
        self.flock, self.calls = Flock("turns"), list[int]()
        self.may_go: dict[int, anyio.Event] = {}
        self.fails = set[int]()
        self.at_work = self.most_at_work = 0

        @self.flock.agent
        async def turn(n: int, text: str = "") -> int:
            self.calls.append(n)
            self.at_work += 1
            self.most_at_work = max(self.most_at_work, self.at_work)
            try:
                if n in self.may_go:
                    await self.may_go[n].wait()
                if n in self.fails:
                    raise ValueError(n)
            finally:
                self.at_work -= 1
            return n

        @self.flock.agent
        async def other() -> str:
            return "done"

        @self.flock.agent
        async def asking(n: int, context: RunContext) -> int:
            await context.ask("Go on?", bool)
            return n

    def hold(self, n: int) -> anyio.Event:
        self.may_go[n] = anyio.Event()
        return self.may_go[n]


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
async def engine(open_engine: OpenEngine, turns: Turns) -> AsyncIterator[Engine]:
    async with open_engine(turns.flock, max_concurrency=2) as made:
        yield made


async def submit(engine: Engine, n: int, session_id: str | None = "s", *, agent_name: str = "turn", **more: Any) -> Run:
    return await engine.submit(agent_name, {"n": n}, session_id=session_id, **more)


async def ended(engine: Engine, run: Run) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def started(turns: Turns, n: int) -> None:
    await until(lambda: n in turns.calls)


# The order


async def test_runs_of_a_session_are_executed_one_after_the_other(engine: Engine, turns: Turns) -> None:
    may_go = turns.hold(0)
    runs = [await submit(engine, n, is_async=n % 2 == 0) for n in range(5)]
    await started(turns, 0)
    assert [(await engine.get_run(run.run_id)).status for run in runs[1:]] == [RunStatus.STARTING] * 4
    may_go.set()
    done = [await ended(engine, run) for run in runs]
    assert [run.status for run in done] == [RunStatus.COMPLETED] * 5
    assert turns.calls == [0, 1, 2, 3, 4]
    assert turns.most_at_work == 1
    for earlier, later in itertools.pairwise(done):
        assert earlier.completed_at is not None
        assert later.started_at is not None
        assert earlier.completed_at <= later.started_at
    assert {run.session_id for run in done} == {"s"}


async def test_a_run_that_waits_for_its_session_holds_no_slot(engine: Engine, turns: Turns) -> None:
    """There are two slots. One is in use, and three runs wait for their session."""
    may_go = turns.hold(0)
    runs = [await submit(engine, n) for n in range(4)]
    await started(turns, 0)
    for session_id, principal in ((None, None), ("another", None), ("s", "ann")):
        done = await ended(engine, await engine.submit("other", {}, session_id=session_id, principal=principal))
        assert done.status is RunStatus.COMPLETED
    assert turns.calls == [0]
    may_go.set()
    assert (await ended(engine, runs[-1])).status is RunStatus.COMPLETED


async def test_a_run_is_cancelled_while_it_waits_for_its_session(engine: Engine, turns: Turns) -> None:
    may_go = turns.hold(0)
    first, second, third = [await submit(engine, n) for n in range(3)]
    await started(turns, 0)
    await engine.cancel_run(second.run_id)
    assert (await ended(engine, second)).status is RunStatus.CANCELLED
    assert (await engine.get_run(third.run_id)).status is RunStatus.STARTING, "the first one is still running"
    may_go.set()
    assert (await ended(engine, third)).status is RunStatus.COMPLETED
    assert turns.calls == [0, 2]
    assert (await ended(engine, first)).status is RunStatus.COMPLETED


async def test_a_session_continues_after_a_run_that_failed_or_was_cancelled(engine: Engine, turns: Turns) -> None:
    turns.fails.add(0)
    turns.hold(1)
    runs = [await submit(engine, n) for n in range(3)]
    await started(turns, 1)
    await engine.cancel_run(runs[1].run_id)
    statuses = [(await ended(engine, run)).status for run in runs]
    assert statuses == [RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.COMPLETED]


async def test_a_retried_run_is_the_last_of_its_session(engine: Engine, turns: Turns) -> None:
    turns.fails.add(0)
    first = await submit(engine, 0)
    assert (await ended(engine, first)).status is RunStatus.FAILED
    turns.fails.clear()
    may_go = turns.hold(1)
    second = await submit(engine, 1)
    third = await submit(engine, 2)
    await started(turns, 1)
    assert (await engine.retry_run(first.run_id)).status is RunStatus.STARTING
    may_go.set()
    assert (await ended(engine, first)).status is RunStatus.COMPLETED
    assert (await ended(engine, second)).status is (await ended(engine, third)).status is RunStatus.COMPLETED
    assert turns.calls == [0, 1, 2, 0]
    assert turns.most_at_work == 1


async def test_the_wait_for_the_session_counts_as_waiting_for_the_first_step(
    open_engine: OpenEngine, turns: Turns
) -> None:
    may_go = turns.hold(0)
    async with open_engine(turns.flock, queue_timeout_s=2) as engine:
        await submit(engine, 0)
        await started(turns, 0)
        late = await ended(engine, await submit(engine, 1))
        assert (late.status, late.error_type) == (RunStatus.FAILED, "queue_timeout")
        may_go.set()
    assert turns.calls == [0]


# The order, in the store


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "flock.db")


async def test_the_order_holds_for_all_engines_on_a_file(store: str, turns: Turns) -> None:
    may_go = turns.hold(0)
    async with turns.flock.engine(store=store) as one, turns.flock.engine(store=store) as other:
        engines = [one, other] * 4
        runs = [await submit(engine, n) for n, engine in enumerate(engines)]
        await started(turns, 0)
        may_go.set()
        for engine, run in zip(reversed(engines), runs, strict=True):
            assert (await ended(engine, run)).status is RunStatus.COMPLETED
    assert turns.calls == list(range(8))
    assert turns.most_at_work == 1


async def test_a_run_that_is_retried_at_once_is_behind_a_run_of_another_engine(store: str, turns: Turns) -> None:
    """The other engine looks for changes 20 times a second, and may not see that the run had ended."""
    may_go = turns.hold(0)
    turns.fails.add(0)
    async with turns.flock.engine(store=store) as one, turns.flock.engine(store=store) as other:
        first, second = await submit(one, 0), await submit(other, 1)
        await started(turns, 0)
        await until(lambda: first.run_id in other._runner.awaited)
        may_go.set()
        assert (await ended(one, first)).status is RunStatus.FAILED
        turns.fails.clear()
        await one.retry_run(first.run_id)
        assert (await ended(other, second)).status is RunStatus.COMPLETED
        assert (await ended(one, first)).status is RunStatus.COMPLETED
    assert turns.calls == [0, 1, 0]
    assert turns.most_at_work == 1


SLOW_TURNS = """
import asyncio, os
from flock.core import Flock

flock = Flock("turns")

def note(line: str) -> None:
    with open(os.environ["LOG"], "a") as log:
        print(line, file=log)

@flock.agent
async def turn(n: int) -> int:
    note(f"begins {n}")
    while not os.path.exists(os.environ["LOG"] + "-go"):
        await asyncio.sleep(0.01)
    note(f"ends {n}")
    return n
"""


async def test_one_of_several_runs_at_once_continues_a_session(engine: Engine, turns: Turns) -> None:
    accepted, refused = list[Run](), list[str]()

    async def go_on(n: int, after: str, **more: Any) -> None:
        try:
            accepted.append(await submit(engine, n, continues=after, **more))
        except Conflict as exc:
            refused.append(str(exc))

    async def all_at_once(after: str) -> None:
        async with anyio.create_task_group() as tasks:
            for n in range(3):
                tasks.start_soon(go_on, n, after)

    await all_at_once("")
    await ended(engine, accepted[0])
    await all_at_once(accepted[0].run_id)
    assert (len(accepted), len(refused)) == (2, 4)
    assert all(accepted[0].run_id in why for why in refused[:2])
    assert all(accepted[1].run_id in why for why in refused[2:])
    key = IdempotencyKey("k", b"")
    await go_on(1, accepted[0].run_id, key=key)
    assert (len(refused), await engine.made_by(key)) == (5, None)
    last = await submit(engine, 1, continues=accepted[1].run_id, key=key)
    with pytest.raises(Replayed, match=last.run_id):  # a replay comes first
        await submit(engine, 1, continues=accepted[1].run_id, key=key)
    await submit(engine, 1, continues="", principal="ann")  # it has a session of its own


async def test_a_run_that_replaces_another_one_drops_it_only_if_it_is_accepted(engine: Engine, turns: Turns) -> None:
    first = await submit(engine, 0, continues="")
    await ended(engine, first)
    with pytest.raises(Conflict):
        await submit(engine, 1, continues="", replaces=True)
    assert (await engine.get_run(first.run_id)).status is RunStatus.COMPLETED
    turns.may_go[1] = anyio.Event()
    second = await submit(engine, 1, continues=first.run_id, replaces=True)
    with pytest.raises(RunNotFound):
        await engine.get_run(first.run_id)
    await started(turns, 1)
    third = await submit(engine, 2, continues=second.run_id, replaces=True)
    assert (await ended(engine, second)).status is RunStatus.CANCELLED
    assert (await ended(engine, third)).status is RunStatus.COMPLETED


@pytest.mark.parametrize("is_waiting", [pytest.param(False, id="running"), pytest.param(True, id="waiting")])
async def test_a_replaced_run_ends_even_if_nothing_follows_the_acceptance_of_the_other(
    engine: Engine, turns: Turns, monkeypatch: pytest.MonkeyPatch, is_waiting: bool
) -> None:
    """The process stops, or the store fails, before a request to cancel it."""

    async def fail(run_id: str) -> Run:
        raise StoreError("The disk is full.")

    turns.hold(1)
    first = await submit(engine, 1, continues="", **({"agent_name": "asking"} if is_waiting else {}))
    status = RunStatus.WAITING if is_waiting else RunStatus.RUNNING
    await until_run(engine, first.run_id, lambda run: run.status is status)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "cancel_run", fail)
        second = await submit(engine, 2, continues=first.run_id, replaces=True)
        assert (await ended(engine, second)).status is RunStatus.COMPLETED
    assert (await ended(engine, first)).status is RunStatus.CANCELLED


@pytest.mark.slow
async def test_a_replaced_run_ends_although_its_process_was_killed_after_the_acceptance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, log = tmp_path / "turns.py", tmp_path / "log"
    kill = "os.kill(os.getpid(), 9) if os.environ.get('KILL') else cancel(*args)"
    script.write_text(
        f"{SLOW_TURNS}\nfrom flock.engine.embedded import EmbeddedEngine\n"
        f"cancel = EmbeddedEngine.cancel_run\nEmbeddedEngine.cancel_run = lambda *args: {kill}\n"
    )
    monkeypatch.setenv("LOG", str(log))

    async def say(**more: Any) -> httpx.Response:
        messages = [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": '{"n": 1}'}]}]
        body = {"id": "s", "messages": messages, **more}
        async with client.stream("POST", f"{server.url}/vercel/turn", json=body) as response:
            async for line in response.aiter_lines():
                if "run_id" in line:
                    break
        return response

    async with httpx.AsyncClient(timeout=90) as client:
        monkeypatch.setenv("KILL", "yes")
        with serving(script, tmp_path) as server:
            first = (await say()).headers["Flock-Run-Id"]
            await until(log.exists)
            with pytest.raises(httpx.HTTPError):
                await say(trigger="regenerate-message", messageId=f"msg_{first}")
            server.process.wait()
        monkeypatch.delenv("KILL")
        with serving(script, tmp_path) as server:
            run = (await client.get(f"{server.url}/run/{first}?wait=60")).json()
            assert run["status"] == "cancelled"
            (tmp_path / "log-go").touch()
            (other,) = (await client.get(f"{server.url}/runs?limit=1")).json()["runs"]
            run = (await client.get(f"{server.url}/run/{other['run_id']}?wait=60")).json()
            assert (run["run_id"] != first, run["status"]) == (True, "completed")
    assert log.read_text() == "begins 1\nbegins 1\nends 1\n"


async def test_no_run_of_another_principal_is_replaced(turns: Turns) -> None:
    async with turns.flock.engine() as engine:
        theirs = await submit(engine, 0, principal="bob")
        await ended(engine, theirs)
        with pytest.raises(RunNotFound):
            await submit(ScopedEngine(engine, Principal(name="ann")), 1, continues=theirs.run_id, replaces=True)
        assert await engine.get_run(theirs.run_id)


async def test_one_of_two_engines_on_a_file_continues_a_session(store: str, turns: Turns) -> None:
    async with turns.flock.engine(store=store) as one, turns.flock.engine(store=store) as other:
        first = await submit(one, 0, continues="")
        with pytest.raises(Conflict, match=first.run_id):
            await submit(other, 1, continues="")
        await submit(other, 1, continues=first.run_id)
        with pytest.raises(Conflict, match="has continued this session"):
            await submit(one, 2, continues=first.run_id)


@pytest.mark.slow
async def test_the_order_holds_after_kill_9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes have the runs of one session. They are killed in the first run, and started again."""
    script, log = tmp_path / "turns.py", tmp_path / "log"
    script.write_text(SLOW_TURNS)
    monkeypatch.setenv("LOG", str(log))
    async with httpx.AsyncClient(timeout=90) as client:
        with serving(script, tmp_path, workers=2) as server:
            for n in range(6):
                body = {"agent_name": "turn", "inputs": {"n": n}, "session_id": "s", "async_run": True}
                headers = {"Connection": "close"}  # the next connection may be accepted by the other process
                answered = await client.post(f"{server.url}/run/flock", json=body, headers=headers)
                last = answered.raise_for_status().json()["run_id"]
            await until(lambda: log.exists() and bool(log.read_text()))
            os.killpg(server.process.pid, signal.SIGKILL)
        assert log.read_text() == "begins 0\n"
        (tmp_path / "log-go").touch()
        with serving(script, tmp_path, workers=2) as server:
            run = (await client.get(f"{server.url}/run/{last}?wait=60")).json()
            assert run["status"] == "completed"
    assert log.read_text() == "begins 0\n" + "".join(f"begins {n}\nends {n}\n" for n in range(6))


async def test_runs_are_ordered_as_they_were_accepted_not_as_their_ids(store: str, turns: Turns) -> None:
    """An engine may create an id and then be slow to store the run."""
    async with turns.flock.engine(store=store) as engine:
        turns.hold(0)
        first = await submit(engine, 0)
        earlier_id = msgspec.structs.replace(first, run_id="00" + first.run_id[2:], inputs=msgspec.Raw(b'{"n": 1}'))
        await engine._accept(earlier_id, None, Context(), None)
        assert await engine.store.active_before(earlier_id) == first.run_id
        assert await engine.store.active_before(first) is None


async def test_the_order_holds_after_a_restart(store: str, turns: Turns) -> None:
    turns.hold(0)
    async with turns.flock.engine(store=store) as engine:
        runs = [await submit(engine, n) for n in range(3)]
        await started(turns, 0)
    turns.calls.clear()
    may_go = turns.hold(0)
    async with turns.flock.engine(store=store) as engine:
        await started(turns, 0)
        late = await submit(engine, 3)
        may_go.set()
        assert (await ended(engine, late)).status is RunStatus.COMPLETED
        assert [(await ended(engine, run)).attempt for run in runs] == [2, 1, 1]
    assert turns.calls == [0, 1, 2, 3]


async def test_a_long_run_is_not_in_memory_while_it_waits_for_its_session(store: str, turns: Turns) -> None:
    may_go = turns.hold(0)
    async with turns.flock.engine(store=store) as engine:
        await submit(engine, 0)
        text = "x" * 5000
        for is_async in (True, False):
            waiting = await engine.submit("turn", {"n": 1, "text": text}, session_id="s", is_async=is_async)
            active = engine._runner.active[waiting.run_id]
            await until(lambda active=active: active.run.is_stub)  # type: ignore[misc]
        may_go.set()
        assert msgspec.json.decode((await ended(engine, waiting)).inputs)["text"] == text


async def test_a_store_from_before_sessions_is_migrated(store: str, turns: Turns) -> None:
    async with turns.flock.engine(store=store) as engine:
        run = await ended(engine, await submit(engine, 0, None))
    with sqlite3.connect(store) as db:
        undo(db, 9)
    db.close()
    async with turns.flock.engine(store=store) as engine:
        assert await engine.get_run(run.run_id) == replace(run, call_ids=1, call_key="")
        assert (await ended(engine, await submit(engine, 1))).status is RunStatus.COMPLETED


# The order, on a cluster


@pytest.fixture
async def cluster(
    temporal_address: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator["TemporalEngine"]:
    """An engine whose runs and sessions look after each other ten times a second."""
    from flock.temporal import workflows

    monkeypatch.setattr(workflows, "LOOK_AFTER_S", 0.1)
    async with engine_with_worker(temporal_address, turns.flock) as engine, engine:
        yield engine


async def test_a_run_joins_its_session_if_the_process_that_accepted_it_died(
    cluster: "TemporalEngine", turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def die(*_: Any) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_join_session", die)
        alone = await submit(cluster, 0)
    assert (await ended(cluster, alone)).status is RunStatus.COMPLETED
    may_go = turns.hold(1)
    first = await submit(cluster, 1)
    await started(turns, 1)
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_join_session", die)
        second = await submit(cluster, 2)
    third = await submit(cluster, 3)
    may_go.set()
    for run in (first, second, third):
        assert (await ended(cluster, run)).status is RunStatus.COMPLETED
    assert turns.most_at_work == 1


async def test_a_session_continues_after_a_run_or_its_workflow_was_terminated(
    cluster: "TemporalEngine", turns: Turns
) -> None:
    from flock.temporal.messages import run_workflow_id, session_workflow_id

    turns.hold(0)
    first, second = [await submit(cluster, n) for n in range(2)]
    await started(turns, 0)
    await cluster.cluster.handle(run_workflow_id(first.run_id, 1)).terminate()
    assert (await ended(cluster, second)).status is RunStatus.COMPLETED
    turns.hold(2)
    third, fourth = [await submit(cluster, n) for n in (2, 3)]
    await started(turns, 2)
    await cluster.cluster.client.get_workflow_handle(session_workflow_id(third)).terminate()
    turns.may_go[2].set()
    assert (await ended(cluster, third)).status is RunStatus.COMPLETED
    assert (await ended(cluster, fourth)).status is RunStatus.COMPLETED


@pytest.mark.cluster
async def test_a_run_that_a_worker_drops_from_its_memory_does_not_leave_its_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its coroutine is closed by the garbage collector, also on a thread in which another workflow runs."""
    from temporalio import workflow

    from flock.temporal.messages import RunOrder
    from flock.temporal.workflows import FlockRun

    class Forever:
        def __await__(self) -> Any:
            yield

    async def begun(self: FlockRun, order: RunOrder) -> RunOrder:
        await Forever()
        return order

    monkeypatch.setattr(FlockRun, "_begun", begun)
    monkeypatch.setattr(workflow, "in_workflow", lambda: True)
    run = Run(run_id="r", flock="f", agent_name="a", inputs=msgspec.Raw(b"{}"), created_at=now(), session_id="s")
    running = FlockRun().run(RunOrder(run=run, timeout_s=1))
    running.send(None)
    running.close()  # it would raise if the run used the cluster
    assert inspect.getcoroutinestate(running) == inspect.CORO_CLOSED


async def test_the_history_is_found_when_the_session_no_longer_remembers_its_runs(
    temporal_address: str, model: FakeModel
) -> None:
    from flock.temporal.messages import session_workflow_id

    async with engine_with_worker(temporal_address, chat(history=2), model.transport) as engine, engine:
        for principal in ("o'ann", None, "o'ann", "o'ann"):
            run = await say(engine, model, f"q{len(model.requests)}", {"reply": "a"}, principal=principal)
        await engine.cluster.client.get_workflow_handle(session_workflow_id(run)).terminate()
        await _listed(engine, 4, session_id="s", status=RunStatus.COMPLETED)
        await say(engine, model, "q", {"reply": "a"}, principal="o'ann")
        assert [prompt for prompt, _ in earlier(model)] == ['{"text": "q2"}', '{"text": "q3"}']
        await say(engine, model, "q", {"reply": "a"})
        assert [prompt for prompt, _ in earlier(model)] == ['{"text": "q1"}']


# Lists and deletion


async def test_a_session_is_listed_and_deleted(engine: Engine, turns: Turns) -> None:
    turns.fails.add(1)
    runs = [await ended(engine, await submit(engine, n)) for n in range(3)]
    kept = await ended(engine, await submit(engine, 3, "another"))
    assert [run.run_id for run in await _listed(engine, 3, session_id="s")] == [run.run_id for run in reversed(runs)]
    failed = await _listed(engine, 1, session_id="s", status=RunStatus.FAILED, agent_name="turn")
    assert [run.run_id for run in failed] == [runs[1].run_id]
    assert (await engine.get_session("s")).total_runs == 3
    await engine.delete_session("s")
    assert await engine.list_runs(RunFilter(session_id="s")) == []
    assert [run.run_id for run in await engine.list_runs(RunFilter())] == [kept.run_id]
    for ask in (engine.get_session, engine.delete_session):
        with pytest.raises(SessionNotFound, match="'s'"):
            await ask("s")


async def _listed(engine: Engine, count: int, **wanted: Any) -> Sequence[Run]:
    """List runs when the search of a cluster has found *count* of them."""
    with anyio.fail_after(PATIENCE_S):
        while len(page := await engine.list_runs(RunFilter(**wanted))) < count:  # noqa: ASYNC110 - there is no event
            await anyio.sleep(0.05)
    return page


class Turned:
    """Counts the turns of another task in the event loop inside the block."""

    async def __aenter__(self) -> "Turned":
        self.turns, self._tasks = 0, anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._count)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._tasks.cancel_scope.cancel()
        await self._tasks.__aexit__(None, None, None)

    async def _count(self) -> None:
        while True:
            self.turns += 1
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("path", [":memory:", "flock.db"])
async def test_a_session_is_summed_without_reading_its_runs(
    path: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks have their turns meanwhile. The sum is exact, also above 64 bits and with runs of older versions."""
    monkeypatch.setattr(fair, "SHARE_S", 0)
    async with turns.flock.engine(store=path, durability="process") as engine:
        for n in range(220):
            inputs, session_id = {"n": n, "text": "x" * 20_000}, "s" if n else "another"
            await ended(engine, await engine.submit("turn", inputs, session_id=session_id))
        spent, last_step = Usage(input_tokens=1, picodollars=2**62 + 1), ["turn", {"output_tokens": 5}, 1, 1, 1]

        def spend(db: sqlite3.Connection) -> None:
            db.execute("UPDATE runs SET spent = ?", (msgspec.json.encode(spent),))
            values = (msgspec.json.encode(last_step), page[3].run_id)
            db.execute("UPDATE runs SET spent = NULL, last_step = ? WHERE run_id = ?", values)

        page = await engine.list_runs(RunFilter(session_id="s"))
        await sqlite_of(engine).change(spend)
        monkeypatch.setattr(engine.store, "get_run", None)
        async with Turned() as other:
            session = await engine.get_session("s")
        assert session.total_runs == 219
        total = Usage(input_tokens=218, output_tokens=5, picodollars=218 * (2**62 + 1))
        assert session.usage == total
        assert other.turns >= 219


@pytest.mark.parametrize("path", [":memory:", "flock.db"])
async def test_other_tasks_run_while_a_session_is_deleted(
    path: str, turns: Turns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    async with turns.flock.engine(store=path, durability="process") as engine:
        for n in range(30):
            await ended(engine, await submit(engine, n))
        await anyio.sleep(SEEN_BY_ALL_S)
        async with Turned() as other:
            await engine.delete_session("s")
        assert other.turns >= 30


async def test_a_session_with_an_active_run_is_not_deleted(engine: Engine, turns: Turns) -> None:
    done = await ended(engine, await submit(engine, 0))
    may_go = turns.hold(1)
    active = await submit(engine, 1)
    await _listed(engine, 2, session_id="s")
    with pytest.raises(Conflict, match=active.run_id):
        await engine.delete_session("s")
    assert (await engine.get_run(done.run_id)).status is RunStatus.COMPLETED
    may_go.set()
    await ended(engine, active)
    await engine.delete_session("s")


async def test_a_session_of_another_principal_is_another_session(engine: Engine, turns: Turns) -> None:
    ann, ben = (ScopedEngine(engine, Principal(name=name)) for name in ("ann", "o'ben"))
    admin = ScopedEngine(engine, Principal(name="ops", admin=True))
    runs = [await scoped.submit("turn", {"n": n}, session_id="s") for n, scoped in enumerate((ann, ben, admin))]
    of_ann, of_ben, of_ops = [(await ended(engine, run)).run_id for run in runs]
    await _listed(engine, 3, session_id="s")
    assert [run.run_id for run in await ben.list_runs(RunFilter(session_id="s"))] == [of_ben]
    assert [(await scoped.get_session("s")).total_runs for scoped in (ann, ben, admin)] == [1, 1, 3]
    await ben.delete_session("s")
    with pytest.raises(SessionNotFound):
        await ben.delete_session("s")
    assert [run.run_id for run in await admin.list_runs(RunFilter(session_id="s"))] == [of_ops, of_ann]
    await admin.delete_session("s")
    assert await ann.list_runs(RunFilter(session_id="s")) == []


# History


def chat(**options: Any) -> Flock:
    flock = Flock("chat", model="openai/gpt-4o")
    options = {"name": "chat", "input": "text: str", "output": "reply: str", "history": 20, **options}
    flock.add_agent(FlockFactory.create_default_agent(**options))
    return flock


async def say(
    engine: Engine, model: FakeModel, text: str, reply: Any, session_id: str | None = "s", **more: Any
) -> Run:
    model.replies.append(Reply(reply))
    agent_name = more.pop("agent_name", "chat")
    return await ended(engine, await engine.submit(agent_name, {"text": text}, session_id=session_id, **more))


def earlier(model: FakeModel) -> list[tuple[str, str]]:
    """Return the turns in the last request: the first line of each prompt, and each answer."""
    _, *messages, _ = model.requests[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    texts = [message["content"].partition("\n")[0] for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


async def test_a_model_sees_the_earlier_turns_of_its_session(open_engine: OpenEngine, model: FakeModel) -> None:
    async with open_engine(chat(history=2), transport=model.transport) as engine:
        for n in range(4):
            run = await say(engine, model, f"q{n}", {"reply": f"a{n}"})
            assert run.status is RunStatus.COMPLETED, run.error
        assert earlier(model) == [('{"text": "q1"}', '{"reply":"a1"}'), ('{"text": "q2"}', '{"reply":"a2"}')]
        first, last = model.requests[0]["messages"], model.requests[-1]["messages"]
        assert last[-1]["content"] == first[-1]["content"].replace("q0", "q3")
        assert last[1]["content"] == first[-1]["content"].replace("q0", "q1"), "an earlier turn has the same form"
        for more in ({"session_id": None}, {"session_id": "t"}, {"principal": "ann"}):
            await say(engine, model, "q", {"reply": "a"}, **more)
            assert earlier(model) == []


async def test_the_history_has_only_completed_turns_of_the_same_agent(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    flock = chat(answer_retries=0)
    flock.add_agent(FlockFactory.create_default_agent("critic", input="text: str", output="mark: int"))
    async with open_engine(flock, transport=model.transport) as engine:
        await say(engine, model, "q0", {"reply": "a0"})
        assert (await say(engine, model, "bad", "no JSON")).status is RunStatus.FAILED
        await say(engine, model, "mark it", {"mark": 5}, agent_name="critic")
        assert earlier(model) == [], "it has no history="
        await say(engine, model, "q1", {"reply": "a1"})
        assert earlier(model) == [('{"text": "q0"}', '{"reply":"a0"}')]


async def test_an_agent_later_in_a_run_sees_its_own_turns(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = chat(input="shout: str")

    @flock.agent(next_agent="chat")
    def shout(text: str) -> dict[str, str]:
        return {"shout": text.upper()}

    flock.agents["shout"].output = flock.agents["chat"].input
    flock.agents["shout"]._is_boxed = False  # type: ignore[attr-defined]
    async with open_engine(flock, transport=model.transport) as engine:
        for n in range(2):
            run = await say(engine, model, f"q{n}", {"reply": f"a{n}"}, agent_name="shout")
            assert run.status is RunStatus.COMPLETED, run.error
        assert earlier(model) == [('{"shout": "Q0"}', '{"reply":"a0"}')]


async def test_a_step_that_runs_again_has_the_same_history(open_engine: OpenEngine, model: FakeModel) -> None:
    async with open_engine(chat(answer_retries=0), transport=model.transport) as engine:
        await say(engine, model, "q0", {"reply": "a0"})
        failed = await say(engine, model, "q1", "no JSON")
        model.replies.append(Reply({"reply": "a1"}))
        await engine.retry_run(failed.run_id)
        assert (await ended(engine, failed)).status is RunStatus.COMPLETED
        assert model.requests[-1]["messages"] == model.requests[-2]["messages"]


async def test_a_long_history_is_cut_at_its_beginning(open_engine: OpenEngine, model: FakeModel) -> None:
    long = "x" * (MAX_HISTORY_BYTES // 3)
    async with open_engine(chat(), transport=model.transport) as engine:
        for n in range(5):
            await say(engine, model, f"{n}{long}", {"reply": "a"})
        assert [prompt[10] for prompt, _ in earlier(model)] == ["2", "3"]


async def test_turns_that_no_longer_match_the_agent_are_left_out(model: FakeModel, tmp_path: Path) -> None:
    store = str(tmp_path / "flock.db")
    async with chat().engine(store=store, transport=model.transport) as engine:
        await say(engine, model, "q0", {"reply": "a0"})
    async with chat(output="reply: str, mood: str").engine(store=store, transport=model.transport) as engine:
        await say(engine, model, "q1", {"reply": "a1", "mood": "m1"})
        assert earlier(model) == []
        await say(engine, model, "q2", {"reply": "a2", "mood": "m2"})
        assert earlier(model) == [('{"text": "q1"}', '{"reply":"a1","mood":"m1"}')]


@pytest.mark.parametrize("history", [0, -1, 2.5, "20", True])
def test_history_must_be_a_whole_number_from_1(history: Any) -> None:
    with pytest.raises(DefinitionError, match="history= of 'chat' must be a whole number from 1, a History, or None"):
        chat(history=history)


def test_an_agent_with_a_conversation_as_its_input_has_no_history() -> None:
    with pytest.raises(DefinitionError, match="'chat' has a conversation as an input, so history= would add"):
        chat(input="messages: Messages")


def test_only_a_model_agent_has_a_history() -> None:
    with pytest.raises(TypeError, match="history"):
        Flock().agent(history=20)(lambda: 1)  # type: ignore[call-overload]


# The API


@pytest.fixture
async def api(turns: Turns) -> AsyncIterator[httpx.AsyncClient]:
    keys = {"ann": "ann-key-0123456789", "ben": "ben-key-0123456789"}
    app: FlockAPI = create_app(turns.flock, store=":memory:", api_keys=keys)
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        client.headers["X-API-Key"] = keys["ann"]
        yield client


async def post(api: httpx.AsyncClient, n: int, session_id: Any = "s", **more: Any) -> httpx.Response:
    body = {"agent_name": "turn", "inputs": {"n": n}, "session_id": session_id, **more}
    return await api.post("/run/flock", json=body)


async def test_a_run_shows_its_session(api: httpx.AsyncClient) -> None:
    run = (await post(api, 1)).json()
    assert (run["status"], run["session_id"]) == ("completed", "s")
    assert (await api.get(f"/run/{run['run_id']}")).json()["session_id"] == "s"
    assert "session_id" not in (await post(api, 1, None)).json()
    runs = (await api.get("/runs?session_id=s&status=completed&agent_name=turn")).json()["runs"]
    assert [found["run_id"] for found in runs] == [run["run_id"]]
    assert (await api.get("/runs?session_id=s&agent_name=other")).json()["runs"] == []


async def test_a_list_with_inputs_shows_the_session_of_each_run(api: httpx.AsyncClient) -> None:
    for session_id in ("s", None):
        await post(api, 1, session_id)
    runs = (await api.get("/runs?include=inputs")).json()["runs"]
    assert [run.get("session_id", "none") for run in runs] == ["none", "s"]
    for include in ("", "?include=result"):
        runs = (await api.get(f"/runs{include}")).json()["runs"]
        assert not any("session_id" in run for run in runs)


async def test_synchronous_requests_of_a_session_are_executed_in_order(api: httpx.AsyncClient, turns: Turns) -> None:
    may_go = turns.hold(0)
    async with anyio.create_task_group() as requests:
        requests.start_soon(post, api, 0)
        await started(turns, 0)
        requests.start_soon(post, api, 1)
        while len((await api.get("/runs?session_id=s")).json()["runs"]) < 2:  # noqa: ASYNC110 - there is no event
            await anyio.sleep(0.01)
        may_go.set()
    assert turns.calls == [0, 1]
    assert turns.most_at_work == 1


@pytest.mark.parametrize("session_id", ["", "x" * 129, "a b", "ü", "a\n", "a\x00", 5, ["s"]])
async def test_an_invalid_session_id_is_an_error(api: httpx.AsyncClient, session_id: Any) -> None:
    response = await post(api, 1, session_id)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/session_id"


@pytest.mark.parametrize("session_id", ["a/b?c=d&e#f%25", "x" * 128, "..a", '"'])
async def test_a_session_id_may_have_any_visible_characters(api: httpx.AsyncClient, session_id: str) -> None:
    assert (await post(api, 1, session_id)).status_code == 200
    assert len((await api.get("/runs", params={"session_id": session_id})).json()["runs"]) == 1
    quoted = httpx.QueryParams({"": session_id})
    path = f"/session/{str(quoted)[1:]}"
    assert (await api.delete(path)).status_code == 204
    assert (await api.delete(path)).status_code == 404


async def test_a_batch_has_no_session(api: httpx.AsyncClient) -> None:
    body = {"agent_name": "turn", "batch_inputs": [{"n": 1}], "session_id": "s"}
    response = await api.post("/run/batch", json=body)
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/session_id"


async def test_a_session_is_deleted_once_its_runs_have_ended(api: httpx.AsyncClient, turns: Turns) -> None:
    missing = await api.delete("/session/s")
    assert (missing.status_code, missing.json()["type"]) == (404, "urn:flockapi:problem:unknown-session")
    may_go = turns.hold(0)
    active = (await post(api, 0, async_run=True)).json()["run_id"]
    refused = await api.delete("/session/s")
    assert refused.status_code == 409
    assert active in refused.json()["detail"]
    other = await api.delete("/session/s", headers={"X-API-Key": "ben-key-0123456789"})
    assert other.status_code == 404, "it is a session of ann"
    may_go.set()
    assert (await api.get(f"/run/{active}?wait=60")).json()["status"] == "completed"
    assert (await api.delete("/session/s")).status_code == 204
    assert (await api.get(f"/run/{active}")).status_code == 404

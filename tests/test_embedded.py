"""The embedded engine: every run ends in one way and does not affect others."""

import asyncio
import contextlib
import gc
import glob
import re
import sqlite3
import uuid
import weakref
from collections.abc import AsyncIterator, Iterator
from contextvars import Context, ContextVar, copy_context
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest
import trio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from flock import fair
from flock.agents.mcp import mcp_tools
from flock.core import Flock, FlockFactory
from flock.engine import embedded
from flock.engine.embedded import EmbeddedEngine
from flock.engine.runner import Runner
from flock.errors import BatchNotFound, EngineStopped, RunNotFound, TooLarge
from flock.runs import Batch, BatchOptions, IdempotencyKey, Run, RunContext, RunStatus, new_id
from flock.scopes import closing_scopes, current_task
from flock.testing import FakeModel, ModelRequest, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import counting_turns, sqlite_of, until
from tests.support.http import client_of, get, post_run
from tests.support.receivers import SECRET
from tests.support.servers import Served

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")


async def batch_end(engine: EmbeddedEngine, batch_id: str) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        while not (batch := await engine.get_batch(batch_id)).status.is_final:  # noqa: ASYNC110 - no event for it
            await anyio.sleep(0.01)
    return batch


async def finish(flock: Flock, agent_name: str, **options: Any) -> Run:
    async with flock.engine(**options) as engine:
        return await engine.wait((await engine.submit(agent_name, EMPTY)).run_id)


async def test_a_pending_cancellation_of_an_agents_task_has_no_effect() -> None:
    """The agent cancels its own task and returns first. Its run, its batch and its engine continue."""
    flock = Flock()

    @flock.agent
    async def leave_behind() -> int:
        task = asyncio.current_task()
        assert task
        task.cancel()
        return 1

    @flock.agent
    def after() -> int:
        return 2

    async with flock.engine() as engine:
        run = await engine.wait((await engine.submit("leave_behind", EMPTY)).run_id)
        batch = await engine.submit_batch("leave_behind", [EMPTY] * 5, BatchOptions(max_workers=2))
        items = [await engine.wait(item.run_id) for item in await engine.get_items(batch.batch_id)]
        later = await engine.wait((await engine.submit("after", EMPTY)).run_id)
        assert {each.status for each in (run, *items, later)} == {RunStatus.COMPLETED}
        assert (await batch_end(engine, batch.batch_id)).status is RunStatus.COMPLETED


async def test_the_items_of_a_batch_share_a_task_unless_one_leaves_a_context_variable() -> None:
    """A task for each item takes a tenth of its time."""
    flock, left, tasks = Flock(), ContextVar[int]("left"), list[Any]()

    @flock.agent
    async def work(leaves: bool) -> None:
        assert left.get(None) is None
        tasks.append(asyncio.current_task())
        if leaves:
            left.set(1)

    async with flock.engine() as engine:
        rows = [{"leaves": False}, {"leaves": False}, {"leaves": True}, {"leaves": False}]
        batch = await engine.submit_batch("work", rows, BatchOptions(max_workers=1))
        assert (await batch_end(engine, batch.batch_id)).completed_items == 4
    assert [tasks[0] is each for each in tasks] == [True, True, True, False]


async def test_a_synchronous_run_is_stored_once_and_before_its_end_only_if_it_calls_a_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "WATCH_INTERVAL_S", 3600)  # at each, what began before is stored
    flock, statements, requests = Flock("stored", model="openai/gpt-4o"), list[str](), list[ModelRequest]()
    flock.add_agent(FlockFactory.create_default_agent("ask", input="question", output="answer"))

    @flock.agent
    async def double(number: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 2 * number

    async def reply(request: ModelRequest) -> Reply:
        requests.append(request)
        await until(lambda: stored() == [("completed",), ("running",)])  # if the process dies now, the run is listed
        return Reply({"answer": "yes"})

    def stored() -> list[Any]:
        with contextlib.closing(sqlite3.connect("flock.db")) as db:
            return db.execute("SELECT status FROM runs ORDER BY run_id").fetchall()

    async with flock.engine(store="flock.db", transport=FakeModel(reply).transport) as engine:
        sqlite_of(engine)._db.set_trace_callback(statements.append)
        for agent_name, inputs in (("double", b'{"number": 1}'), ("ask", b'{"question": "?"}')):
            run = await engine.submit(agent_name, msgspec.Raw(inputs), is_async=False)
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
            different = dict.fromkeys(statements)  # one with a trigger is traced twice
            writes = [text.split()[0] for text in different if re.match("(INSERT.*INTO|UPDATE) runs ", text)]
            assert writes == (["INSERT"] if agent_name == "double" else ["INSERT", "UPDATE"])
            statements.clear()
    assert len(requests) == 1


async def test_a_batch_that_can_never_fit_raises_too_large() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(max_items=3) as engine:
        with pytest.raises(TooLarge, match="more than 3 items"):
            await engine.submit_batch("one", [EMPTY] * 4, BatchOptions())


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
async def test_waiters_get_an_answer_when_the_engine_stops(on_disk: bool, is_async: bool, tmp_path: Path) -> None:
    """Waits for runs that resume at the next start raise EngineStopped. All other runs have failed as interrupted."""
    flock, started = Flock(), anyio.Event()

    @flock.agent
    async def sleep() -> None:
        started.set()
        await anyio.sleep_forever()

    outcomes: list[Run | EngineStopped] = []

    async def wait(run_id: str) -> None:
        try:
            outcomes.append(await engine.wait(run_id))
        except EngineStopped as exc:
            outcomes.append(exc)

    store = tmp_path / "flock.db" if on_disk else ":memory:"
    async with anyio.create_task_group() as tasks:
        async with flock.engine(max_concurrency=1, store=store) as engine:
            runs = [await engine.submit("sleep", EMPTY, is_async=is_async) for _ in range(2)]
            await engine.submit_batch("sleep", [EMPTY] * 3, BatchOptions())
            await started.wait()
            for run in runs:
                tasks.start_soon(wait, run.run_id)
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
    assert len(outcomes) == 2
    for each in outcomes:
        if on_disk and is_async:
            assert isinstance(each, EngineStopped)
        else:
            assert isinstance(each, Run)
            assert (each.status, each.error_type) == (RunStatus.FAILED, "interrupted")
    with pytest.raises(EngineStopped, match="not running"):
        await engine.submit("sleep", EMPTY)
    with pytest.raises(EngineStopped):
        await engine.submit_batch("sleep", [EMPTY], BatchOptions())


async def test_runs_resume_after_the_host_was_cancelled(tmp_path: Path) -> None:
    """The host's scope around the engine is cancelled. Nothing hangs, and the runs are on disk."""
    flock, started, may_end = Flock(), anyio.Event(), anyio.Event()

    @flock.agent
    async def sleep() -> int:
        started.set()
        await may_end.wait()
        return 1

    with anyio.CancelScope() as scope:
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            run = await engine.submit("sleep", EMPTY)
            await started.wait()
            scope.cancel()
            await anyio.sleep_forever()
    may_end.set()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.wait(run.run_id)
    assert (run.status, run.attempt) == (RunStatus.COMPLETED, 2)


async def test_an_engine_that_is_cancelled_while_it_starts_leaves_no_lock_file(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await Flock().engine(store=tmp_path / "flock.db").__aenter__()
    assert scope.cancelled_caught
    assert not glob.glob(f"{tmp_path}/flock.db-engine-*")


async def test_an_engine_can_be_entered_again_but_not_twice(tmp_path: Path) -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    engine = flock.engine(store=tmp_path / "flock.db")
    async with engine:
        with pytest.raises(EngineStopped, match="already running"):
            await engine.__aenter__()
        run = await engine.wait((await engine.submit("one", EMPTY)).run_id)
    async with engine:
        assert (await engine.get_run(run.run_id)).status is RunStatus.COMPLETED
        assert (await engine.wait((await engine.submit("one", EMPTY)).run_id)).status is RunStatus.COMPLETED


async def test_max_concurrency_limits_runs_and_items_together() -> None:
    flock, busy, most = Flock(), 0, 0

    @flock.agent
    async def work() -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        busy -= 1

    async with flock.engine(max_concurrency=4) as engine:
        runs = [await engine.submit("work", EMPTY) for _ in range(20)]
        batch = await engine.submit_batch("work", [EMPTY] * 20, BatchOptions(max_workers=20))
        for run in [*runs, *await engine.get_items(batch.batch_id)]:
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert most == 4


async def test_the_oldest_final_runs_are_deleted() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(keep_runs=3) as engine:
        runs = [await engine.wait((await engine.submit("one", EMPTY)).run_id) for _ in range(5)]
        await engine.delete_old()
        for run in runs[:2]:
            with pytest.raises(RunNotFound):
                await engine.get_run(run.run_id)
        for run in runs[2:]:
            assert await engine.get_run(run.run_id)

        # A batch counts as one run, however many items it has.
        batches = []
        for size in (2, 5, 5, 5, 5):
            batch = await engine.submit_batch("one", [EMPTY] * size, BatchOptions())
            batches.append(await batch_end(engine, batch.batch_id))
        await engine.delete_old()
        for batch in batches[2:]:
            assert len(await engine.get_items(batch.batch_id)) == 5
        for batch in batches[:2]:
            with pytest.raises(BatchNotFound):
                await engine.get_items(batch.batch_id)
        with pytest.raises(RunNotFound):
            await engine.get_run(runs[-1].run_id)


async def test_runs_are_deleted_by_age() -> None:
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with flock.engine(keep_for_s=0.001) as engine:
        run = await engine.wait((await engine.submit("one", EMPTY)).run_id)
        await anyio.sleep(0.01)
        await engine.delete_old()
        with pytest.raises(RunNotFound):
            await engine.wait(run.run_id)


def test_ids_are_uuids_of_version_7_in_order() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)
    assert {(uuid.UUID(id_).version, uuid.UUID(id_).variant) for id_ in ids} == {(7, uuid.RFC_4122)}


@pytest.mark.parametrize("error", [ValueError("late"), SystemExit(3)])
async def test_exceptions_of_agents_do_not_leave_a_stopping_engine(error: BaseException, tmp_path: Path) -> None:
    """The engine stops cleanly, and the runs resume at the next start."""
    flock, begun, holds = Flock(), anyio.Semaphore(0), True

    @flock.agent
    async def item() -> int:
        if not holds:
            return 1
        begun.release()
        try:
            await anyio.sleep_forever()
        except BaseException:
            raise error from None
        return 0

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("item", EMPTY)
        batch = await engine.submit_batch("item", [EMPTY], BatchOptions())
        await begun.acquire()
        await begun.acquire()
    holds = False
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert (await batch_end(engine, batch.batch_id)).status is RunStatus.COMPLETED


class Nameless(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise ValueError("no name")


async def test_an_exception_whose_name_cannot_be_read_fails_only_its_run() -> None:
    flock = Flock()

    @flock.agent
    async def bad() -> int:
        raise Nameless("Bad", (Exception,), {})  # type: ignore[misc]

    @flock.agent
    async def good() -> int:
        return 1

    async with flock.engine() as engine:
        bad_run, good_run = [await engine.submit(name, EMPTY) for name in ("bad", "good")]
        assert (await engine.wait(bad_run.run_id)).status is RunStatus.FAILED
        assert (await engine.wait(good_run.run_id)).status is RunStatus.COMPLETED


async def test_an_engine_that_has_ended_is_opened_by_the_next_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody has foreseen must not leave a server that responds with 503 until somebody restarts it."""
    flock = Flock()

    @flock.agent
    async def one() -> int:
        return 1

    async def defect() -> None:
        raise RuntimeError("unforeseen")

    app = create_app(flock, store=tmp_path / "flock.db", auth="host")
    assert isinstance(app.engine, EmbeddedEngine)
    async with app.lifespan(), client_of(app) as client:
        assert app.engine._tasks is not None
        app.engine._tasks.start_soon(defect)
        await until(lambda: "The engine has ended because of an error" in caplog.text)
        assert "unforeseen" in caplog.text
        assert (await client.get("/readyz")).status_code == 200
        assert (await post_run(client, "one")).json()["status"] == "completed"


def test_on_trio_an_agent_runs_as_it_is() -> None:
    """Also in a process that has used asyncio before."""

    async def use() -> str:
        with closing_scopes("agent"):
            await anyio.sleep(0.001)
            return "done"

    assert [anyio.run(use, backend=backend) for backend in ("asyncio", "trio")] == ["done", "done"]


async def test_other_tasks_run_while_many_runs_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    flock, seen, start = Flock(), list[int](), Runner.start

    @flock.agent
    async def nap() -> None:
        await anyio.sleep_forever()

    def noting(runner: Runner, *args: Any) -> None:
        seen.append(turns[0])
        start(runner, *args)

    async with flock.engine(store=tmp_path / "flock.db", durability="process") as engine:
        for _ in range(100):
            await engine.submit("nap", {})
    monkeypatch.setattr(Runner, "start", noting)
    async with counting_turns() as turns, flock.engine(store=tmp_path / "flock.db"):
        assert len(seen) == 100
        assert len(set(seen)) > 50


#: What the host of these tests knows of the request that it handles.
TENANT: ContextVar[Any] = ContextVar("tenant", default="nobody")
ON_BOTH = pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
STORES = pytest.mark.parametrize("store", [":memory:", "flock.db"])


@contextlib.contextmanager
def as_tenant(tenant: Any) -> Iterator[None]:
    token = TENANT.set(tenant)
    try:
        yield
    finally:
        TENANT.reset(token)


class SetsTenant:
    """Middleware that sets TENANT to the header of a request."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_tenant(dict(scope.get("headers", ())).get(b"tenant", b"lifespan").decode()):
            await self.app(scope, receive, send)


def tenants() -> Flock:
    """A flock of agents that return the tenant that they see."""
    flock = Flock()

    @flock.agent
    async def tenant() -> str:
        return str(TENANT.get())

    @flock.agent
    def tenant_in_thread() -> str:
        return str(TENANT.get())

    @flock.agent
    async def tenant_after_an_answer(context: RunContext) -> str:
        await context.ask("Go on?", bool)
        return str(TENANT.get())

    @flock.agent
    async def tenant_at_second_try(context: RunContext) -> str:
        if context.attempt == 1:
            raise ValueError("again")
        return str(TENANT.get())

    return flock


def text_of(run: Run) -> str:
    assert run.result is not None, run.error
    text: str = msgspec.json.decode(run.result)["result"]
    return text


@contextlib.contextmanager
def tenants_of_new_tasks() -> Iterator[list[tuple[Any, Any]]]:
    """Collect the new tasks of this event loop, each with the tenant that it sees."""
    seen = list[tuple[Any, Any]]()

    def create(loop: Any, coroutine: Any, *, context: Context | None = None, **more: Any) -> Any:
        context = copy_context() if context is None else context
        task = asyncio.Task(coroutine, loop=loop, context=context, **more)
        seen.append((task, context.get(TENANT)))
        return task

    class Notes(trio.abc.Instrument):
        def task_spawned(self, task: trio.lowlevel.Task) -> None:
            seen.append((task, task.context.get(TENANT)))

    with contextlib.ExitStack() as ends:
        if current_task() is None:
            trio.lowlevel.add_instrument(notes := Notes())
            ends.callback(trio.lowlevel.remove_instrument, notes)
        else:
            set_task_factory = asyncio.get_running_loop().set_task_factory
            set_task_factory(create)
            ends.callback(set_task_factory, None)
        yield seen


def name_of(task: Any) -> str:
    name: str = task.get_name() if isinstance(task, asyncio.Task) else task.name
    return name.rpartition(".")[2]


@ON_BOTH
async def test_the_engines_own_tasks_start_in_an_empty_context() -> None:
    """Also if a caller with a context of its own opens the engine, calls it and closes it."""
    flock, started = Flock(webhook_url="http://127.0.0.1:9/"), anyio.Event()  # no server listens there

    @flock.agent
    async def hold(holds: bool) -> None:
        if holds:
            started.set()
            await anyio.sleep_forever()

    tools = [mcp_tools("http://127.0.0.1:9/mcp")]
    flock.add_agent(FlockFactory.create_default_agent("ask", output="a: str", tools=tools))
    app = create_app(flock, store="flock.db", auth="host", webhook_secrets=[SECRET])
    with tenants_of_new_tasks() as seen, as_tenant("host"):
        async with app.engine as engine:
            await engine.wait_batch((await engine.submit_batch("hold", [{"holds": False}], BatchOptions())).batch_id)
            await engine.submit("hold", {"holds": True})
            await started.wait()
            await until(lambda: any(name_of(task) == "_send" for task, _ in seen))
    assert [(name_of(task), tenant) for task, tenant in seen if tenant is not None] == []
    own = {"_watch", "_wake_readers", "_end_waits", "apply", "_write_until_closed", "serve", "list_tools", "_send"}
    assert own | {"_run_items", "interrupt"} <= {name_of(task) for task, _ in seen}


@ON_BOTH
@STORES
async def test_an_asynchronous_run_starts_in_an_empty_context(store: str) -> None:
    """It may start later or elsewhere, so it sees neither its caller nor the program that opened the engine."""
    seen = set[str]()
    with as_tenant("opener"):
        async with tenants().engine(store=store) as engine:
            with as_tenant("caller"):
                for name in ("tenant", "tenant_in_thread"):
                    run = await engine.wait((await engine.submit(name, EMPTY)).run_id)
                    seen.add(text_of(run))
                run = await engine.wait((await engine.submit("tenant_at_second_try", EMPTY)).run_id)
                seen.add(text_of(await engine.wait((await engine.retry_run(run.run_id)).run_id)))
    assert seen == {"nobody"}


@ON_BOTH
@STORES
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_run_that_got_an_answer_continues_in_an_empty_context(store: str, is_async: bool) -> None:
    async with tenants().engine(store=store) as engine:
        with as_tenant("caller"):
            asking = await engine.submit("tenant_after_an_answer", EMPTY, is_async=is_async)
            run = await engine.wait(asking.run_id)
            (question,) = run.waiting_for
            with as_tenant("answerer"):
                await engine.answer_call(run.run_id, question.call_id, msgspec.Raw(b"true"))
            assert text_of(await engine.wait(run.run_id)) == "nobody"


@ON_BOTH
async def test_a_resumed_run_starts_in_an_empty_context(tmp_path: Path) -> None:
    flock, started, may_end = Flock(), anyio.Event(), anyio.Event()

    @flock.agent
    async def tenant() -> str:
        started.set()
        await may_end.wait()
        return str(TENANT.get())

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("tenant", EMPTY)
        batch = await engine.submit_batch("tenant", [EMPTY], BatchOptions())
        await started.wait()
    may_end.set()
    with as_tenant("opener"):
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            (item,) = await engine.get_items(batch.batch_id)
            assert [text_of(await engine.wait(each.run_id)) for each in (run, item)] == ["nobody"] * 2


@ON_BOTH
@STORES
async def test_the_items_of_a_batch_start_in_an_empty_context(store: str) -> None:
    """Each of them: what an agent sets in its own context is gone when the next item starts."""
    flock = Flock()

    @flock.agent
    async def tenant(number: int) -> str:
        seen = str(TENANT.get())
        TENANT.set(f"item {number}")
        return seen

    with as_tenant("opener"):
        async with flock.engine(store=store) as engine:
            with as_tenant("caller"):
                for parallel in (True, False):
                    rows = [{"number": number} for number in range(20)]
                    batch = await engine.submit_batch("tenant", rows, BatchOptions(parallel=parallel, max_workers=2))
                    with anyio.fail_after(PATIENCE_S):
                        await engine.wait_batch(batch.batch_id)
                    items = await engine.get_items(batch.batch_id)
                    assert {text_of(item) for item in items} == {"nobody"}


@ON_BOTH
@STORES
@pytest.mark.parametrize("more", [{}, {"session_id": "s"}, {"key": IdempotencyKey("k", b"1")}], ids=str)
async def test_a_synchronous_run_sees_the_context_of_its_caller(store: str, more: Any) -> None:
    async with tenants().engine(store=store) as engine:
        with as_tenant("caller"):
            run = await engine.submit("tenant", EMPTY, is_async=False, **more)
        assert text_of(await engine.wait(run.run_id)) == "caller"


def test_a_run_without_a_server_sees_the_context_of_its_caller() -> None:
    with as_tenant("script"):
        assert tenants().run("tenant") == {"result": "script"}
        assert tenants().run("tenant_in_thread") == {"result": "script"}


@STORES
@pytest.mark.parametrize("host", ["mounted", "mounted, with a lifespan", "served"])
async def test_a_run_does_not_see_the_context_of_another_request(store: str, host: str) -> None:
    """The first request opens the engine if no lifespan does. Later requests are of another tenant."""
    middleware, prefix = [Middleware(SetsTenant)], "" if host == "served" else "/ai"
    app = create_app(tenants(), store=store, auth="host", middleware=middleware if host == "served" else ())
    with_lifespan = app.lifespan() if host == "mounted, with a lifespan" else contextlib.nullcontext()
    async with with_lifespan, Served(Starlette(routes=[Mount(prefix, app)], middleware=middleware)) as mounted:
        async with Served(app) if host == "served" else contextlib.nullcontext(mounted) as served:
            async with httpx.AsyncClient(base_url=served.url + prefix) as client:
                await check_contexts_of_requests(client)


async def check_contexts_of_requests(client: httpx.AsyncClient) -> None:
    client.headers["tenant"] = "first"
    await get(client, "/agents")
    await get(client, "/runs")
    client.headers["tenant"] = "second"
    for more, headers in (({}, {}), ({"session_id": "s"}, {}), ({}, {"Idempotency-Key": '"k"'})):
        body = {"agent_name": "tenant", **more}
        run = (await client.post("/run/flock", json=body, headers=headers)).json()
        assert run["result"] == {"result": "second"}
    run = (await post_run(client, "tenant", async_run=True)).json()
    assert (await get(client, f"/run/{run['run_id']}", wait=60))["result"] == {"result": "nobody"}
    batch = (await client.post("/run/batch", json={"agent_name": "tenant", "batch_inputs": [{}] * 5})).json()
    batch = await get(client, f"/batch/{batch['batch_id']}", wait=60)
    assert batch["results"] == [{"result": "nobody"}] * 5


class Tenant:
    """What a host keeps of a request."""


@STORES
async def test_nothing_keeps_the_objects_of_a_request_alive(store: str) -> None:
    """The request opens the engine, and starts a batch and a run that continue.

    The event loop keeps the context of a timer that has been cancelled until its time, so that of the body is short.
    """
    flock, started, may_end = tenants(), anyio.Event(), anyio.Event()

    @flock.agent
    async def hold() -> None:
        started.set()
        await may_end.wait()

    app = create_app(flock, store=store, auth="host", body_timeout_s=1)
    tenant = Tenant()
    kept = weakref.ref(tenant)

    async def requests() -> None:
        async with client_of(app) as client:
            assert (await post_run(client, "hold", async_run=True)).status_code == 202
            assert (await client.post("/run/batch", json={"agent_name": "hold", "batch_inputs": [{}]})).is_success
            for name in ("tenant", "tenant_in_thread"):
                assert (await post_run(client, name)).json()["status"] == "completed"

    with as_tenant(tenant):
        task = asyncio.create_task(requests())
    del tenant
    await task
    del task
    await started.wait()
    await until(lambda: gc.collect() >= 0 and kept() is None)
    may_end.set()


@STORES
async def test_after_a_lifespan_has_ended_a_request_opens_the_engine_again(store: str) -> None:
    """A host's tests do not depend on their order."""
    app = create_app(tenants(), store=store, auth="host")
    async with client_of(app) as client:
        for _ in range(2):
            async with app.lifespan():
                assert (await post_run(client, "tenant")).json()["status"] == "completed"
            assert app.engine.health().engine == "stopped"
            assert (await post_run(client, "tenant")).json()["status"] == "completed"


async def test_a_request_while_the_engine_stops_is_answered_with_503() -> None:
    flock, started, is_stopping, may_stop = Flock(), anyio.Event(), anyio.Event(), anyio.Event()

    @flock.agent
    async def clean_up_slowly() -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            is_stopping.set()
            with anyio.CancelScope(shield=True):
                await may_stop.wait()

    app, may_exit = create_app(flock, store="flock.db", auth="host"), anyio.Event()

    async def serve() -> None:
        async with app.lifespan():
            await may_exit.wait()

    async with client_of(app) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        assert (await post_run(client, "clean_up_slowly", async_run=True)).status_code == 202
        await started.wait()
        may_exit.set()
        await is_stopping.wait()
        answers: list[tuple[int, str | None]] = []

        async def ask(path: str) -> None:
            answer = await client.get(path)
            answers.append((answer.status_code, answer.headers.get("Retry-After")))
            if len(answers) == 2:
                may_stop.set()

        for path in ("/runs", "/readyz"):
            tasks.start_soon(ask, path)
        with anyio.move_on_after(PATIENCE_S):
            await may_stop.wait()
        may_stop.set()
    assert answers == [(503, "1")] * 2
    assert app.engine.health().engine == "stopped"


async def test_a_request_that_outlasts_its_lifespan_does_not_open_the_engine_again() -> None:
    """A server that has stopped must not leave an engine open because of a slow upload."""
    app, is_sending, may_go = create_app(tenants(), store="flock.db", auth="host"), anyio.Event(), anyio.Event()
    answers: list[httpx.Response] = []

    async def body() -> AsyncIterator[bytes]:
        is_sending.set()
        await may_go.wait()
        yield b'{"agent_name": "tenant"}'

    async with client_of(app) as client, anyio.create_task_group() as tasks:

        async def upload() -> None:
            headers = {"Content-Type": "application/json"}
            answers.append(await client.post("/run/flock", content=body(), headers=headers))

        async with app.lifespan():
            tasks.start_soon(upload)
            await is_sending.wait()
        may_go.set()
    assert [answer.status_code for answer in answers] == [503]
    assert app.engine.health().engine == "stopped"

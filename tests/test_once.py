"""Calls that are executed at most once: their start is recorded first, and one without a recorded end is uncertain."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import CallError, Uncertain
from flock.runs import Engine, Run, RunContext, RunStatus, now
from flock.runs.records import Call
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until_run

pytestmark = pytest.mark.anyio


async def ended(engine: Engine, run: Run) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def answered(engine: Engine, run: Run) -> Run:
    """Answer the question of *run* with "yes" as soon as it asks, and return its end."""
    run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
    await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
    return await ended(engine, run)


async def test_it_is_a_call_like_others_if_nothing_happens(open_engine: OpenEngine) -> None:
    """Its end replaces its start, and a second equal call is another one."""
    flock, charged = Flock(), list[int]()

    async def charge(amount: int) -> int:
        charged.append(amount)
        return len(charged)

    @flock.agent
    async def pay(context: RunContext) -> list[int]:
        made = [int(await context.call(charge, 5, call_once=True)) for _ in range(2)]
        assert await context.ask("Go on?", bool)
        return made

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("pay", {}))
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error) == ({"result": [1, 2]}, None)
    assert charged == [5, 5]
    assert [(call.name, bytes(call.result), call.error) for call in calls] == [
        ("charge", b"1", None),
        ("charge", b"2", None),
        ("ask", b"true", None),
    ]


async def test_one_that_failed_is_not_executed_again_by_the_program(open_engine: OpenEngine) -> None:
    """Neither by its own second call nor after an answer."""
    flock, charged = Flock(), list[int]()

    async def charge() -> None:
        charged.append(1)
        raise ConnectionError("reset")

    @flock.agent
    async def pay(context: RunContext) -> list[str]:
        seen = []
        for _ in range(2):
            try:
                await context.call(charge, call_once=True)
            except ConnectionError as exc:
                seen.append(str(exc))
        assert await context.ask("Go on?", bool)
        return seen

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("pay", {}))
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error) == ({"result": ["reset", "reset"]}, None)
    assert charged == [1]
    assert [call.name for call in calls] == ["charge", "ask"]


async def test_one_that_the_program_cancelled_is_uncertain(open_engine: OpenEngine) -> None:
    flock, charged, reached = Flock(), list[int](), asyncio.Event()

    async def charge() -> None:
        charged.append(1)
        reached.set()
        await anyio.sleep_forever()

    @flock.agent
    async def pay(context: RunContext) -> list[str]:
        seen = list[str]()
        for _ in range(3):
            task = asyncio.create_task(context.call(charge, call_once=True))
            await reached.wait()
            await asyncio.sleep(0)
            if not seen:
                task.cancel()
            try:
                await task
            except (asyncio.CancelledError, Uncertain) as exc:
                seen.append(type(exc).__name__)
        assert await context.ask("Go on?", bool)
        return seen

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("pay", {}))
        calls = (await engine.get_calls(run))[0]
    assert run.error is None
    assert isinstance(run.value, dict)
    assert run.value["result"][1:] == ["Uncertain", "Uncertain"]
    assert charged == [1]
    types = [(call.name, call.error_type) for call in calls]
    assert types == [("charge", "cancelled"), ("charge", "uncertain"), ("ask", None)]
    assert calls[1].error is not None
    assert "its end is not recorded" in calls[1].error


async def test_the_late_result_of_a_thread_is_its_end(open_engine: OpenEngine) -> None:
    flock, charged, reached, may_go = Flock(), list[int](), threading.Event(), threading.Event()

    def charge() -> int:
        reached.set()
        may_go.wait(PATIENCE_S)
        charged.append(1)
        return len(charged)

    @flock.agent
    async def pay(context: RunContext) -> int:
        task = asyncio.create_task(context.call(charge, call_once=True))
        await anyio.to_thread.run_sync(reached.wait)
        task.cancel()
        may_go.set()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return int(await context.call(charge, call_once=True))

    async with open_engine(flock) as engine:
        run = await ended(engine, await engine.submit("pay", {}))
    assert (run.value, run.error) == ({"result": 1}, None)
    assert charged == [1]


async def test_one_that_ran_when_its_process_ended_is_uncertain(open_again: OpenEngine) -> None:
    """The program may handle that. If not, the run fails, and the call is shown."""
    flock, charged, reached = Flock(), list[str](), anyio.Event()

    async def charge(card: str) -> None:
        charged.append(card)
        reached.set()
        await anyio.sleep_forever()

    @flock.agent
    async def pay(card: str, context: RunContext) -> str:
        try:
            await context.call(charge, card, call_once=True)
        except Uncertain:
            if card == "bad":
                raise
            return "is it paid?"
        return "paid"

    async with open_again(flock) as engine:
        run, other = [await engine.submit("pay", {"card": card}) for card in ("good", "bad")]
        with anyio.fail_after(PATIENCE_S):
            while len(charged) < 2:  # noqa: ASYNC110 - there is one event for both
                await anyio.sleep(0.01)
        assert [call.name for call in (await engine.get_calls(run)).get(0, ())] == []
    async with open_again(flock) as engine:
        run, other = await ended(engine, run), await ended(engine, other)
        calls = (await engine.get_calls(other))[0]
        assert sorted(charged) == ["bad", "good"]
        await engine.retry_run(other.run_id, calls="again")
        with anyio.fail_after(PATIENCE_S):
            while len(charged) < 3:  # noqa: ASYNC110 - see above
                await anyio.sleep(0.01)
    assert (run.value, run.error) == ({"result": "is it paid?"}, None)
    assert other.error_type == "uncertain"
    assert other.error is not None
    assert "'charge' was started at" in other.error
    assert '{"calls": "again"}' in other.error
    assert [(call.name, call.error_type, bytes(call.arguments)) for call in calls] == [
        ("charge", "uncertain", b'{"card":"bad"}')
    ]
    assert sorted(charged) == ["bad", "bad", "good"]


async def test_one_that_its_deadline_cut_off_has_no_end(open_engine: OpenEngine) -> None:
    """It is shown as uncertain, although it has turned its cancellation into an error of its own."""
    flock, charged = Flock(), list[int]()

    async def charge() -> None:
        charged.append(1)
        try:
            await anyio.sleep_forever()
        finally:
            raise ConnectionError("closed")

    @flock.agent
    async def pay(context: RunContext) -> None:
        await context.call(charge, call_once=True)

    async with open_engine(flock) as engine:
        run = await ended(engine, await engine.submit("pay", {}, timeout_s=1))
        (call,) = (await engine.get_calls(run))[0]
        assert run.error_type == "timeout"
        assert (call.name, call.once, call.error_type) == ("charge", "started", "uncertain")
        run = await ended(engine, await engine.retry_run(run.run_id))
    assert run.error_type == "uncertain"
    assert charged == [1]


DYING = """
import asyncio, os, sys
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("dying")

async def charge(amount: int) -> None:
    with open("charged", "a") as log:
        log.write("x")
    os._exit(1)

@flock.agent
async def pay(context: RunContext) -> None:
    await context.call(charge, 5, call_once=True)

async def main() -> None:
    async with flock.engine(store="flock.db") as engine:
        if len(sys.argv) == 1:
            print((await engine.submit("pay", {})).run_id, flush=True)
            await asyncio.sleep(60)
        run = await engine.wait(sys.argv[1])
        print(run.error_type, run.error)

asyncio.run(main())
"""


async def test_its_start_is_on_disk_before_it_is_executed(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)

    async def execute(*arguments: str) -> str:
        command = [sys.executable, "dying.py", *arguments]
        done = await anyio.run_process(command, cwd=tmp_path, check=False, stderr=subprocess.PIPE, env=os.environ)
        return done.stdout.decode().strip()

    run_id = await execute()
    with contextlib.closing(sqlite3.connect(tmp_path / "flock.db")) as db:
        assert db.execute("SELECT name, once FROM calls").fetchall() == [("charge", "started")]
    assert (await execute(run_id)).startswith("uncertain The call 'charge' was started at")
    assert (tmp_path / "charged").read_text() == "x"
    with contextlib.closing(sqlite3.connect(tmp_path / "flock.db")) as db:
        assert db.execute("SELECT name, once FROM calls").fetchall() == [("charge", "ended")]


async def test_it_is_not_executed_if_another_engine_owns_the_run(tmp_path: Path) -> None:
    flock, charged, reached, may_go, ended_at = Flock(), list[int](), anyio.Event(), anyio.Event(), anyio.Event()

    async def charge() -> None:
        charged.append(1)

    @flock.agent
    async def pay(context: RunContext) -> None:
        reached.set()
        await may_go.wait()
        try:
            await context.call(charge, call_once=True)
        finally:
            ended_at.set()

    store = tmp_path / "flock.db"
    async with flock.engine(store=store) as engine:
        await engine.submit("pay", {})
        await reached.wait()
        with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
            db.execute("UPDATE runs SET owner = 'another', attempt = attempt + 1, recoveries = recoveries + 1")
        may_go.set()
        with anyio.fail_after(PATIENCE_S):
            await ended_at.wait()
    assert not charged
    with contextlib.closing(sqlite3.connect(store)) as db:
        assert not db.execute("SELECT 1 FROM calls").fetchall()


async def test_it_is_uncertain_if_another_engine_takes_the_run_while_it_is_executed(tmp_path: Path) -> None:
    """Its end, which comes later, does not count."""
    flock, charged, reached, may_go, ended_at = Flock(), list[int](), anyio.Event(), anyio.Event(), anyio.Event()

    async def charge() -> None:
        charged.append(1)
        reached.set()
        await may_go.wait()

    @flock.agent
    async def pay(context: RunContext) -> None:
        try:
            await context.call(charge, call_once=True)
        finally:
            ended_at.set() if may_go.is_set() else None

    store = tmp_path / "flock.db"
    async with flock.engine(store=store) as engine:
        run = await engine.submit("pay", {})
        await reached.wait()
        with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
            db.execute("INSERT INTO engines VALUES ('dead', ?, 0)", (flock.name,))
            db.execute("UPDATE runs SET owner = 'dead'")
        async with flock.engine(store=store) as other:
            run = await ended(other, run)
            may_go.set()
            with anyio.fail_after(PATIENCE_S):
                await ended_at.wait()
            calls = (await other.get_calls(run))[0]
    assert run.error_type == "uncertain"
    assert [(call.name, call.error_type) for call in calls] == [("charge", "uncertain")]
    assert charged == [1]


@pytest.mark.parametrize("kind", ["ask", "in a called agent", "sleep", "receive"])
async def test_it_cannot_wait_for_a_person(kind: str, open_engine: OpenEngine) -> None:
    """Its step would run again when it is answered."""
    flock = Flock()

    @flock.agent
    async def child(context: RunContext) -> bool:
        return await context.ask("Charge?", bool)

    async def charge(context: RunContext) -> bool:
        if kind == "ask":
            return await context.ask("Charge?", bool)
        if kind == "sleep":
            await context.sleep(60)
        if kind == "receive":
            return await context.receive("charge", bool)
        return bool((await context.run_agent("child", {}))["result"])

    @flock.agent
    async def pay(context: RunContext) -> bool:
        return bool(await context.call(charge, call_once=True))

    async with open_engine(flock) as engine:
        run = await ended(engine, await engine.submit("pay", {}))
    assert run.error_type == "call_error"
    assert run.error is not None
    assert "'charge' is executed at most once" in run.error


async def test_it_has_no_retries() -> None:
    flock = Flock()

    async def charge() -> None: ...

    @flock.agent
    async def pay(context: RunContext) -> None:
        await context.call(charge, call_once=True, call_retries=1)

    async with flock.engine() as engine:
        run = await ended(engine, await engine.submit("pay", {}))
    assert run.error == "'charge' is executed at most once (call_once), so omit call_retries."


# Tools


def buying(tool: Any) -> Flock:
    flock = Flock("tools", model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a: str", tools=[Tool(tool, once=True)]))
    return flock


CALL = Reply(calls=[("buy", {"what": "tea"})])


async def test_a_model_reads_that_a_tool_failed(open_engine: OpenEngine) -> None:
    bought = list[str]()

    async def buy(what: str) -> None:
        bought.append(what)
        raise ConnectionError("reset")

    flock = buying(buy)
    with FakeModel([CALL, {"a": "no"}]) as model:
        async with open_engine(flock) as engine:
            run = await ended(engine, await engine.submit("ask", {"q": "?"}))
    assert (run.value, run.error) == ({"a": "no"}, None)
    assert "Error: " in model.requests[-1].text
    assert bought == ["tea"]


@pytest.mark.parametrize("kind", ["ask", "sleep", "receive"])
async def test_a_tool_cannot_wait_either(kind: str, open_engine: OpenEngine) -> None:
    async def buy(what: str, context: RunContext) -> None:
        if kind == "ask":
            await context.ask("Buy it?", bool)
        elif kind == "sleep":
            await context.sleep(60)
        await context.receive("word", bool)

    flock = buying(buy)
    with FakeModel([CALL, {"a": "no"}]) as model:
        async with open_engine(flock) as engine:
            run = await ended(engine, await engine.submit("ask", {"q": "?"}))
    assert (run.value, run.error) == ({"a": "no"}, None)
    error = f"Error: The call 'buy' is executed at most once (call_once, once=True), so it cannot {kind}."
    assert error in model.requests[-1].text


async def test_a_model_does_not_read_that_a_tool_is_uncertain(open_again: OpenEngine) -> None:
    """It would perhaps call the tool again."""
    bought, reached = list[str](), anyio.Event()

    async def buy(what: str) -> None:
        bought.append(what)
        reached.set()
        await anyio.sleep_forever()

    flock = buying(buy)
    with FakeModel([CALL]):
        async with open_again(flock) as engine:
            run = await engine.submit("ask", {"q": "?"})
            await reached.wait()
        async with open_again(flock) as engine:
            run = await ended(engine, run)
    assert run.error_type == "uncertain"
    assert bought == ["tea"]


# On a cluster


@pytest.mark.cluster
async def test_of_two_workers_that_start_a_call_one_executes_it(temporal_address: str) -> None:
    """A worker that is taken for dead may still be running."""
    from flock.temporal.calls import Calls
    from flock.temporal.messages import CallDone, run_workflow_id
    from flock.temporal.workflows import FlockRun
    from tests.support.cluster import engine_with_worker

    flock, charged = Flock(), list[int]()
    start = Call(call_id="charge:x", name="charge", once="started", started_at=now(), completed_at=now())

    async def charge() -> None:
        charged.append(1)

    async with engine_with_worker(temporal_address, flock) as engine, engine:

        @flock.agent
        async def pay(context: RunContext) -> None:
            workflow = engine.cluster.handle(run_workflow_id(context.run_id, 1))
            await workflow.signal(FlockRun.call_done, CallDone(step=0, call=start))
            await context.call(charge, call_name="x", call_once=True)

        run = await ended(engine, await engine.submit("pay", {}))
    assert (run.error_type, run.error) == (
        "uncertain",
        "Another worker has started the call 'charge' too. Find out whether it was done.",
    )
    assert not charged
    calls = Calls()
    for call in (
        start,
        msgspec.structs.replace(start, once="ended"),
        msgspec.structs.replace(start, started_at=now()),
        msgspec.structs.replace(start, once="ended", error="late"),
    ):
        calls.add(CallDone(step=0, call=call))
    (call,) = calls.of_step(0, 0)
    assert (call.once, call.error) == ("ended", None)


def test_an_uncertain_call_is_a_call_error() -> None:
    assert issubclass(Uncertain, CallError)

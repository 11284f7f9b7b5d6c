"""Calls of a step: each is executed once, and its result survives a crash."""

import asyncio
import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock import fair
from flock.agents.agent import OnChange
from flock.core import Flock
from flock.errors import AgentError, CallError, StoreError
from flock.runs import MAX_SHOWN_CALLS, NOT_LOADED, BatchOptions, Call, CallOptions, Engine, Run, RunContext, RunStatus
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, counting_turns, sqlite_of, until
from tests.support.servers import serving
from tests.test_agents import context_of, journal

pytestmark = pytest.mark.anyio


async def ended(engine: Engine, agent_name: str, inputs: Any = {}) -> Run:  # noqa: B006
    run = await engine.submit(agent_name, inputs)
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


def result_of(run: Run) -> Any:
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.result is not None
    return msgspec.json.decode(run.result)["result"]


@dataclasses.dataclass
class Receipt:
    number: int
    amount: float


async def test_a_call_returns_what_its_return_type_reads_from_json(open_engine: OpenEngine) -> None:
    flock, threads = Flock(), []

    async def charge(amount: float) -> Receipt:
        return Receipt(7, amount)

    def add(a: int, b: int) -> int:
        threads.append(threading.current_thread())
        return a + b

    def untyped():  # type: ignore[no-untyped-def]
        return (1, math.nan)

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        receipt = await context.call(charge, 40)
        total = await context.call(add, 1, b=2)
        return [repr(receipt), repr(total), repr(await context.call(untyped))]

    expected = ["Receipt(number=7, amount=40.0)", "3", "[1, None]"]
    async with open_engine(flock) as engine:
        assert result_of(await ended(engine, "work")) == expected
        batch = await engine.submit_batch("work", [{}, {}], BatchOptions())
        await engine.wait_batch(batch.batch_id, PATIENCE_S)
        assert [result_of(item) for item in await engine.get_items(batch.batch_id)] == [expected] * 2
    assert threads[0] is not threading.main_thread()


async def interrupt(flock: Flock, store: Path, agent_name: str, reached: anyio.Event, **options: Any) -> str:
    """Run an agent until *reached*, and end its engine as its process would end."""
    engine = flock.engine(store=store, **options)
    async with engine:
        run = await engine.submit(agent_name, {})
        with anyio.fail_after(PATIENCE_S):
            await reached.wait()
        await engine.drain(0)
    return run.run_id


async def test_finished_calls_are_read_when_the_step_runs_again(tmp_path: Path) -> None:
    """Those that have failed raise the same again. Those that were running are executed again."""
    flock, executed, reached, keys = Flock(), list[Any](), anyio.Event(), list[str]()

    async def finish(n: int, context: RunContext) -> int:
        executed.append(n)
        keys.append(context.idempotency_key)
        return n * 10

    async def fail() -> None:
        executed.append("fail")
        raise ValueError("secret")

    async def hang() -> str:
        executed.append("hang")
        reached.set()
        if len(executed) < 8:
            await anyio.sleep_forever()
        return "done"

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        found: list[Any] = await asyncio.gather(*(context.call(finish, n) for n in (1, 1, 2)))
        try:
            await context.call(fail)
        except ValueError as exc:
            found.append(type(exc).__name__)
        return [*found, await context.call(hang)]

    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached)
    assert executed == [1, 1, 2, "fail", "hang"]
    assert len(set(keys)) == 3
    executed += ["restart"] * 3
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run_id)
    assert result_of(run) == [10, 10, 20, "ValueError", "done"]
    assert executed[8:] == ["hang"]


async def test_a_damaged_call_fails_the_run_as_unreadable(tmp_path: Path) -> None:
    flock, reached = Flock(), anyio.Event()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.call(long)
        reached.set()
        await anyio.sleep_forever()

    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached)
    with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
        db.execute("UPDATE calls SET result = x'ff'")
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run_id)).error_type == "unreadable"


async def test_a_gathered_call_that_exits_is_a_call_error() -> None:
    """asyncio would end the event loop, and so the server. It is stored like any failed call."""
    flock, caught = Flock(), list[str]()

    async def leave() -> None:
        sys.exit("bad usage")

    def leave_in_thread() -> None:
        sys.exit("bad usage")

    @flock.agent
    async def work(context: RunContext) -> None:
        calls = [context.call(leave), context.call(leave_in_thread)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, CallError)
            caught.append(str(result))
        await asyncio.gather(context.call(leave))

    async with flock.engine(expose_errors=True) as engine:
        run = await ended(engine, "work")
        stored = (await engine.get_calls(run))[0]
    told = "The call 'leave' raised SystemExit: bad usage"
    assert caught == [told, "The call 'leave_in_thread' raised SystemExit: bad usage"]
    assert (run.status, run.error, run.error_type) == (RunStatus.FAILED, told, "call_error")
    assert {call.error for call in stored} == {*caught}


async def test_a_retry_of_all_calls_begins_with_an_empty_journal(tmp_path: Path) -> None:
    flock, executed = Flock(), []

    async def look() -> int:
        executed.append("look")
        return len(executed)

    @flock.agent
    async def work(context: RunContext) -> int:
        found = await context.call(look)
        if len(executed) == 1:
            raise AgentError("not yet")
        return int(found)

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await ended(engine, "work")
        assert (run.status, run.error) == (RunStatus.FAILED, "not yet")
        await engine.retry_run(run.run_id, calls="again")
        assert result_of(await engine.wait(run.run_id)) == 2


@pytest.mark.parametrize("on_change", ["stop", "continue"])
async def test_a_changed_program_executes_what_does_not_match_only_if_it_may(
    on_change: OnChange, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flock, executed, reached = Flock(), [], anyio.Event()
    names = ["old"]

    async def step(name: str) -> str:
        executed.append(name)
        return name

    @flock.agent(on_change=on_change)
    async def work(context: RunContext) -> str:
        found = await context.call(step, names[0])
        if names == ["old"]:
            reached.set()
            await anyio.sleep_forever()
        return str(found)

    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached)
    names[:] = ["new"]
    async with flock.engine(store=store, replay_grace_s=0.1) as engine:
        run = await engine.wait(run_id)
    if on_change == "continue":
        assert result_of(run) == "new"
        assert executed == ["old", "new"]
        assert "did not repeat these calls: step:" in caplog.text
    else:
        assert run.error_type == "changed_program"
        assert 'it makes the call step {"name":"new"} instead of step {"name":"old"}.' in (run.error or "")
        assert executed == ["old"]


async def test_a_named_call_needs_no_json_arguments() -> None:
    flock = Flock()

    async def send(client: Any, text: str) -> str:
        return text.upper()

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        first = await context.call(send, object(), "a", name="first")
        try:
            await context.call(send, object(), "b")
        except CallError as exc:
            return [first, str(exc)]
        return []

    async with flock.engine() as engine:
        first, error = result_of(await ended(engine, "work"))
    assert first == "A"
    assert error.startswith("The arguments of the call 'send' cannot be converted to JSON")
    assert "Pass call_name=" in error


def unserializable() -> Any:
    return object()


def mistyped() -> int:
    return "text"  # type: ignore[return-value]


def long() -> str:
    return "x" * 2000


@pytest.mark.parametrize(
    ("function", "name", "words"),
    [
        (unserializable, None, "The result of the call 'unserializable' cannot be converted to JSON"),
        (mistyped, None, "The result of the call 'mistyped' does not match its return type: Expected `int`"),
        (long, None, "The result of the call 'long' has 2002 bytes, more than the maximum (1000, max_result_bytes)"),
        (long, "a/b", "'a/b' is not a valid name for a call of 'long'"),
    ],
)
async def test_a_call_that_cannot_be_stored_fails_the_run_with_its_name(function: Any, name: Any, words: str) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.call(function, name=name)

    async with flock.engine(max_result_bytes=1000) as engine:
        run = await ended(engine, "work")
    assert (run.status, run.error_type) == (RunStatus.FAILED, "call_error")
    assert run.error is not None
    assert words in run.error


@pytest.mark.parametrize(("first", "second"), [(3, 0), (1, 2)])
async def test_a_run_may_make_a_limited_number_of_calls(first: int, second: int) -> None:
    """The calls of all its steps count."""
    flock = Flock()

    async def call(context: RunContext, times: int) -> None:
        for _ in range(times):
            await context.call(long)

    @flock.agent(next_agent="more")
    async def work(context: RunContext) -> None:
        await call(context, first)

    @flock.agent
    async def more(context: RunContext) -> None:
        await call(context, second)

    async with flock.engine(max_calls=2) as engine:
        run = await ended(engine, "work")
    assert run.error == "The run has made as many calls as one run may make (max_calls). Split its work into runs."
    assert [step.call_count for step in run.steps] == ([1] if second else [])


async def test_a_synchronous_agent_is_told_to_be_async() -> None:
    flock = Flock()

    @flock.agent
    def work(context: RunContext) -> None:
        _ = context.call(long)

    async with flock.engine() as engine:
        run = await ended(engine, "work")
    assert run.error == "'work' is not async, so it cannot make calls. Make it async."


async def test_a_call_left_behind_by_its_step_leaves_no_entry(tmp_path: Path) -> None:
    flock, left = Flock(), []

    async def slow() -> None:
        await anyio.sleep_forever()

    @flock.agent
    async def work(context: RunContext) -> str:
        left.append(asyncio.ensure_future(context.call(slow)))
        await anyio.lowlevel.checkpoint()
        return "done"

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await ended(engine, "work")
        assert left[0].cancelled()
        assert result_of(await engine.get_run(run.run_id)) == "done"
        assert await engine.store.calls(run, 0) == []


async def test_a_cancelled_run_stores_no_call_that_was_running(tmp_path: Path) -> None:
    flock, running = Flock(), anyio.Event()

    async def hang() -> None:
        running.set()
        await anyio.sleep_forever()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.call(long)
        await context.call(hang)

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("work", {})
        await running.wait()
        await engine.cancel_run(run.run_id)
        run = await engine.wait(run.run_id)
        assert run.status is RunStatus.CANCELLED
        assert [call.name for _, call in await engine.store.calls(run, 0)] == ["long"]
        await engine.delete_run(run.run_id)
        assert sqlite_of(engine).read(lambda db: db.execute("SELECT count(*) FROM calls").fetchone()) == (0,)


async def test_calls_in_threads_run_at_the_same_time() -> None:
    flock, both = Flock(), threading.Barrier(2, timeout=PATIENCE_S)

    def meet(n: int) -> int:
        both.wait()
        return n

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        return list(await asyncio.gather(context.call(meet, 1), context.call(meet, 2)))

    async with flock.engine() as engine:
        assert result_of(await ended(engine, "work")) == [1, 2]


SCRIPT = """
import asyncio, os
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("calls")
log = os.open("calls.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

def write(n: int, run: int, context: RunContext) -> int:
    os.write(log, b"%s\\n" % context.idempotency_key.encode())
    return n

@flock.agent
async def work(run: int, context: RunContext) -> int:
    total = 0
    for n in range(0, 15, 3):
        total += sum(await asyncio.gather(*(context.call(write, k, run) for k in (n, n + 1, n + 2))))
        await asyncio.sleep(0.2)
    return total
"""


def committed() -> set[str]:
    """Return the idempotency keys of the calls in the store."""
    with contextlib.closing(sqlite3.connect("flock.db")) as db:
        return {f"run:{run_id}/0/{call_id}" for run_id, call_id in db.execute("SELECT run_id, call_id FROM calls")}


def executed() -> list[str]:
    return Path("calls.log").read_text().splitlines()


@pytest.mark.slow
def test_kill_9_repeats_no_committed_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """100 runs of 15 calls each. The server is killed five times, with calls in flight."""
    script = tmp_path / "calls.py"
    script.write_text(SCRIPT)
    Path("calls.log").touch()
    run_ids: list[str] = []
    kills: list[tuple[set[str], int]] = []
    for kill in range(1, 6):
        with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            while len(run_ids) < 100:
                body = {"agent_name": "work", "inputs": {"run": len(run_ids)}, "async_run": True}
                run_ids.append(client.post("/run/flock", json=body).json()["run_id"])
            deadline = time.monotonic() + PATIENCE_S
            while len(set(executed())) < 200 * kill:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        kills.append((committed(), len(executed())))
    with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for run_id in run_ids:
            run = client.get(f"/run/{run_id}", params={"wait": 50}).json()
            assert (run["status"], run["result"]) == ("completed", {"result": sum(range(15))})
    lines = executed()
    for stored, count in kills:
        assert not stored & set(lines[count:]), "a call was executed again after its commit"
    assert len(set(lines)) == 1500
    in_flight = sum(len(set(lines[:count]) - stored) for stored, count in kills)
    assert len(lines) - 1500 <= in_flight
    with capsys.disabled():
        print(f"\n{len(lines) - 1500} of 1500 calls were executed twice; {in_flight} were in flight at a kill")


async def resumed(flock: Flock, store: Path, agent_name: str, reached: anyio.Event) -> Any:
    run_id = await interrupt(flock, store, agent_name, reached)
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            return result_of(await engine.wait(run_id))


async def test_a_call_that_begins_in_a_task_that_is_to_be_cancelled_is_not_executed_again(tmp_path: Path) -> None:
    flock, charged, reached = Flock(), list[int](), anyio.Event()

    async def charge(amount: int) -> None:
        charged.append(amount)
        await anyio.sleep_forever()

    async def wait() -> None:
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()

    @flock.agent
    async def work(context: RunContext) -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await context.call(charge, 9)
        task.uncancel()
        await context.call(wait)
        return "done"

    assert await resumed(flock, tmp_path / "flock.db", "work", reached) == "done"
    assert charged == [9]


async def test_a_call_that_succeeded_at_the_second_try_is_not_executed_again(tmp_path: Path) -> None:
    """The author's own retry has the idempotency key of the failed call, and its committed result is found."""
    flock, keys, charged, reached = Flock(), list[str](), list[int](), anyio.Event()

    async def charge(amount: int, context: RunContext) -> int:
        keys.append(context.idempotency_key)
        if len(keys) == 1:
            raise ConnectionError
        charged.append(amount)
        return amount

    @flock.agent
    async def work(context: RunContext) -> int:
        try:
            paid = await context.call(charge, 5)
        except ConnectionError:
            paid = await context.call(charge, 5)
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return int(paid)

    assert await resumed(flock, tmp_path / "flock.db", "work", reached) == 5
    assert charged == [5]
    assert len(set(keys)) == 1


@pytest.mark.parametrize("kind", ["asyncio", "anyio"])
async def test_a_call_whose_time_ends_while_it_is_saved_is_not_executed_again(kind: str, tmp_path: Path) -> None:
    """The disk is slow. The call is stored once, and the author's own retry returns its result."""
    flock, charged, is_blocked, disk_is_free = Flock(), list[int](), threading.Event(), threading.Event()
    has_timed_out, end_time = anyio.Event(), list[Callable[[float], None]]()

    def block(db: sqlite3.Connection) -> None:
        is_blocked.set()
        disk_is_free.wait(PATIENCE_S)

    async def charge(amount: int) -> int:
        charged.append(amount)
        if len(charged) == 1:
            tasks.start_soon(sqlite_of(engine).change, block)
            await until(is_blocked.is_set)
            tasks.start_soon(end_in_time)
        return amount

    async def end_in_time() -> None:
        await until(lambda: bool(sqlite_of(engine)._open.changes))  # the call waits for the disk
        end_time[0](anyio.current_time())
        await anyio.wait_all_tasks_blocked()
        disk_is_free.set()

    async def charge_in_time(context: RunContext) -> int:
        if kind == "anyio":
            with anyio.fail_after(PATIENCE_S) as scope:
                end_time.append(lambda at: setattr(scope, "deadline", at))
                return int(await context.call(charge, 5))
        async with asyncio.timeout(PATIENCE_S) as timeout:
            end_time.append(timeout.reschedule)
            return int(await context.call(charge, 5))

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        try:
            first = await charge_in_time(context)
        except TimeoutError:
            assert disk_is_free.is_set(), "it is on disk"
            has_timed_out.set()
            first = await context.call(charge, 5)
        return [first, await context.call(charge, 5)]

    async with flock.engine(store=tmp_path / "flock.db") as engine, anyio.create_task_group() as tasks:
        run = await ended(engine, "work")
        stored = (await engine.get_calls(run))[0]
    assert result_of(run) == [5, 5]
    assert charged == [5, 5]
    assert has_timed_out.is_set() == (kind == "asyncio")
    numbers = [(call.call_id.removeprefix(stored[0].call_id), call.is_cancelled) for call in stored]
    assert numbers == [("", False), *([("", True)] if kind == "asyncio" else []), (":2", False)]
    assert run.steps[0].call_count == 2


async def test_calls_inside_a_call_do_not_take_the_numbers_of_others(tmp_path: Path) -> None:
    """A call that is read from the journal makes no inner calls, so inner calls are numbered apart."""
    flock, paid, reached = Flock(), list[int](), anyio.Event()

    async def pay(amount: int) -> int:
        paid.append(amount)
        return len(paid)

    async def outer(context: RunContext) -> int:
        return int(await context.call(pay, 5))

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        found = [await context.call(outer), await context.call(pay, 5)]
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return [*found, await context.call(pay, 5)]

    assert await resumed(flock, tmp_path / "flock.db", "work", reached) == [1, 2, 3]
    assert len(paid) == 3


class Box:
    def __init__(self, to: str, send: Any) -> None:
        self.to = to
        self._send = send

    async def send(self) -> str:
        return str(await self._send(self.to))


@pytest.mark.parametrize("kind", ["partial", "method"])
async def test_functions_that_differ_in_what_they_are_bound_to_are_different(tmp_path: Path, kind: str) -> None:
    """A crash gives none the result of another. A method needs a name if its object is not JSON."""
    flock, sent, reached = Flock(), list[str](), anyio.Event()

    async def prepare(to: str, delay_s: float) -> None:
        await anyio.sleep(delay_s)

    async def send(to: str) -> str:
        if to == "ann" and not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        sent.append(to)
        return to

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        async def send_to(to: str, delay_s: float) -> str:
            await context.call(prepare, to, delay_s)
            if kind == "partial":
                return str(await context.call(functools.partial(send, to)))
            with pytest.raises(CallError, match="Pass call_name= to identify the call"):
                await context.call(Box(to, send).send)
            return str(await context.call(Box(to, send).send, name=to))

        return list(await asyncio.gather(send_to("ann", 0.2), send_to("bob", 0.01)))

    assert await resumed(flock, tmp_path / "flock.db", "work", reached) == ["ann", "bob"]
    assert sent == ["bob", "ann"]


async def test_a_cancelled_run_waits_for_the_threads_of_gathered_calls() -> None:
    """It is reported as cancelled when they have ended, although asyncio itself cancels the tasks of a gather."""
    flock, started, may_end, has_ended = Flock(), threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        started.set()
        may_end.wait(PATIENCE_S)
        has_ended.set()

    @flock.agent
    async def work(context: RunContext) -> None:
        await asyncio.gather(context.call(slow))

    async with flock.engine() as engine:
        run = await engine.submit("work", {})
        while not started.is_set():  # noqa: ASYNC110 - a thread sets it
            await anyio.sleep(0.01)
        await engine.cancel_run(run.run_id)
        threading.Timer(0.3, may_end.set).start()
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        is_true = has_ended.is_set()
        may_end.set()
        assert is_true


async def test_calls_that_asyncio_cancels_keep_their_threads_counted() -> None:
    """At most max_threads functions run at once, also if the agent stops waiting for them with asyncio.timeout."""
    flock, running, most = Flock(), [0], [0]

    def hang(n: int) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.4)
        running[0] -= 1

    @flock.agent
    async def work(context: RunContext) -> None:
        for n in range(4):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await context.call(hang, n)

    async with flock.engine(max_threads=1) as engine:
        await ended(engine, "work")
    assert most == [1]


async def test_no_call_is_executed_after_the_run_was_lost(tmp_path: Path) -> None:
    """An agent that catches every exception does not continue a run that another engine has taken over."""
    flock, executed, reached, may_go = Flock(), list[int](), anyio.Event(), anyio.Event()

    async def count(n: int) -> None:
        executed.append(n)

    @flock.agent
    async def work(context: RunContext) -> None:
        reached.set()
        await may_go.wait()
        for n in range(3):
            with contextlib.suppress(Exception):
                await context.call(count, n)
        reached.set()

    store = tmp_path / "flock.db"
    async with flock.engine(store=store) as engine:
        await engine.submit("work", {})
        await reached.wait()
        with contextlib.closing(sqlite3.connect(store, isolation_level=None)) as db:
            db.execute("UPDATE runs SET owner = 'another', attempt = attempt + 1, recoveries = recoveries + 1")
        may_go.set()
        await anyio.sleep(0.5)
    assert executed in ([], [0])


async def test_a_call_that_is_too_long_for_its_step_does_not_make_shorter_ones_fail() -> None:
    """Its message says to return a reference instead, and so the program may."""
    made = dataclasses.replace(journal(), finished=(), max_total_bytes=100, replay_grace_s=5)
    context = context_of("work", [])

    async def value(length: int) -> str:
        return "x" * length

    with pytest.raises(CallError, match="larger than the cluster can store"):
        await made.call(context, value, [200], {}, CallOptions())
    assert await made.call(context, value, [20], {}, CallOptions()) == "x" * 20


async def test_a_call_that_the_store_could_not_keep_has_no_entry_and_is_the_last_of_its_step() -> None:
    """It is executed when the step runs again, also if the program has caught the error."""
    executed = list[int]()

    async def save(call: Call) -> None:
        raise StoreError("The disk is full.")

    async def count(n: int) -> None:
        executed.append(n)

    made = dataclasses.replace(journal(), finished=(), max_total_bytes=100, replay_grace_s=5, save=save)
    for n in range(2):
        with pytest.raises(StoreError):
            await made.call(context_of("work", []), count, [n], {}, CallOptions())
    assert (executed, made.kept, made.failed) == ([0], 0, [])


async def test_options_of_a_call_are_not_taken_from_the_arguments_of_its_function() -> None:
    """``name=`` and ``keep=`` are earlier names of options: they are arguments if the function has such a parameter."""
    flock = Flock()

    async def greet(name: str = "you", keep: str = "") -> str:
        return f"hello {name}{keep}"

    async def other(n: int = 0) -> int:
        return n

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        return [
            await context.call(greet, name="Ann", keep="!"),
            await context.call(greet, name="Ann", call_name="named", call_keep="result"),
            await context.call(other, 3, name="other", keep="result"),
        ]

    async with flock.engine() as engine:
        run = await ended(engine, "work")
        calls = (await engine.get_calls(run))[0]
    assert result_of(run) == ["hello Ann!", "hello Ann", 3]
    assert [call.call_id for call in calls[1:]] == ["greet:named", "other:other"]
    assert [bytes(call.arguments) for call in calls] == [b'{"keep":"!","name":"Ann"}', b"null", b"null"]


async def test_a_call_is_tried_again_with_one_key_until_it_returns() -> None:
    flock, keys = Flock(), list[str]()

    async def flaky(context: RunContext) -> int:
        keys.append(context.idempotency_key)
        if len(keys) < 3:
            raise ConnectionError
        return len(keys)

    @flock.agent
    async def work(context: RunContext) -> int:
        return int(await context.call(flaky, call_retries=2))

    async with flock.engine() as engine:
        run = await ended(engine, "work")
        calls = (await engine.get_calls(run))[0]
    assert result_of(run) == 3
    assert len(set(keys)) == 1
    assert [(call.name, call.error) for call in calls] == [("flaky", None)]


async def test_a_call_has_a_time_limit_for_each_try() -> None:
    """A function in a thread has been executed when it returns, so its result counts even if it is late."""
    flock, begun = Flock(), list[int]()

    async def slow() -> int:
        begun.append(1)
        await anyio.sleep_forever()
        return 1

    def slow_in_thread() -> int:
        time.sleep(0.1)
        return 7

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        try:
            await context.call(slow, call_timeout_s=0.01, call_retries=1)
        except TimeoutError as exc:
            return [str(exc), await context.call(slow_in_thread, call_timeout_s=0.01)]
        return []

    async with flock.engine() as engine:
        run = await ended(engine, "work")
    assert result_of(run) == ["The call 'slow' did not end within 0.01 s (call_timeout_s).", 7]
    assert len(begun) == 2


async def test_a_call_that_the_program_has_cancelled_is_not_tried_again() -> None:
    """Its function turns the cancellation into an exception of its own."""
    flock, begun = Flock(), list[int]()

    async def stubborn() -> None:
        begun.append(1)
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            raise ConnectionError("closed") from None

    @flock.agent
    async def work(context: RunContext) -> str:
        try:
            async with asyncio.timeout(0.01):
                await context.call(stubborn, call_retries=3)
        except (ConnectionError, TimeoutError) as exc:
            return type(exc).__name__
        return ""

    async with flock.engine() as engine:
        run = await ended(engine, "work")
    assert (result_of(run), len(begun)) == ("TimeoutError", 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"call_timeout_s": 0}, "call_timeout_s of 'long' must be above 0"),
        ({"call_retries": -1}, "call_retries of 'long'"),
    ],
    ids=["time", "retries"],
)
async def test_an_option_of_a_call_that_makes_no_sense_is_an_error(options: Any, words: str) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> str:
        return str(await context.call(long, **options))

    async with flock.engine() as engine:
        run = await ended(engine, "work")
    assert run.error_type == "call_error"
    assert words in (run.error or "")


async def test_a_long_journal_is_read_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run in between when the step starts again."""
    monkeypatch.setattr(fair, "SHARE_S", 0)
    flock, pages = Flock(), list[int]()

    @flock.agent
    async def work(context: RunContext) -> int:
        found = await asyncio.gather(*(context.call(megabyte, n) for n in range(5)))
        await context.ask("Go on?", bool)
        return sum(map(len, found))

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await ended(engine, "work")
        find_calls = engine.store.calls

        def read(*args: Any, **options: Any) -> Any:
            pages.append(turns[0])
            return find_calls(*args, **options)

        monkeypatch.setattr(engine.store, "calls", read)
        async with counting_turns() as turns:
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
            assert result_of(await engine.wait(run.run_id)) == 5_000_000
    assert len(pages) > 3
    assert pages == sorted(set(pages)), "another task had its turn before each page"


async def megabyte(n: int) -> str:
    return "x" * 1_000_000


async def test_a_run_shows_its_calls(open_engine: OpenEngine) -> None:
    """Of each step, in the order in which they ended, with those that failed. Long values are left out."""
    flock = Flock()

    async def fail(reason: str) -> None:
        raise AgentError(reason)

    async def both(context: RunContext) -> int:
        return len(await context.call(long)) + len(await context.call(secret, "s", keep="result"))

    def secret(text: str) -> str:
        return text.upper()

    @flock.agent(next_agent="second")
    async def first(context: RunContext) -> str:
        with contextlib.suppress(AgentError):
            await context.call(fail, "no")
        return str(await context.call(both))

    @flock.agent
    async def second(result: str, context: RunContext) -> str:
        await context.call(very_long)
        if result:
            raise AgentError("the end")
        return result

    def shown(calls: Any) -> list[Any]:
        return [
            (re.sub(r":[0-9a-f]{16}", "", call.call_id), bytes(call.arguments), bytes(call.result)[:9], call.error)
            for call in calls
        ]

    async with open_engine(flock) as engine:
        run = await ended(engine, "first")
        assert (run.status, [step.call_count for step in run.steps]) == (RunStatus.FAILED, [4])
        batch = await engine.submit_batch("first", [{}], BatchOptions())
        await engine.wait_batch(batch.batch_id, PATIENCE_S)
        (item,) = await engine.get_items(batch.batch_id)
        for each in (run, item):
            calls = await engine.get_calls(await engine.get_run(each.run_id))
            assert shown(calls[0]) == [
                ("fail", b'{"reason":"no"}', b"null", "no"),
                ("both~long", b"{}", b'"xxxxxxxx', None),
                ("both~secret", b"null", b'"S"', None),
                ("both", b"{}", b"2001", None),
            ]
            assert shown(calls[1]) == [("very_long", b"{}", b"{}", None)]
            assert calls[1][0].result is NOT_LOADED


def very_long() -> str:
    return "x" * 5000


async def test_the_api_shows_calls_where_there_are_any() -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext, n: int = 1) -> int:
        for _ in range(n):
            await context.call(long, keep="result")
            await context.call(very_long)
        return n

    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(flock)), base_url="http://t") as client:
        body = {"agent_name": "work", "inputs": {"n": 1}}
        run = (await client.post("/run/flock", json=body)).json()
        assert run["status"] == "completed", run
        first, second = run["steps"][0]["calls"]
        assert (first["name"], first["kind"], first["arguments"], first["result"]) == (
            "long",
            "function",
            None,
            "x" * 2000,
        )
        assert (second["name"], "result" in second, second["error"]) == ("very_long", False, None)
        assert (await client.get(f"/run/{run['run_id']}")).json() == run
        run = (await client.post("/run/flock", json={**body, "inputs": {"n": 0}})).json()
        assert "calls" not in run["steps"][0]
        assert (await client.get(f"/run/{run['run_id']}")).json() == run


async def test_ten_thousand_calls_are_shown_without_reading_each_for_each(tmp_path: Path) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.call(long)

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await ended(engine, "work")
        columns = "run_id, position, tries, call_id, name, kind, arguments, result, started_at, completed_at"

        def copy(db: sqlite3.Connection) -> None:
            db.execute(
                f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9999) "
                f"INSERT INTO calls ({columns}) SELECT {columns} FROM calls, n"
            )

        await sqlite_of(engine).change(copy)
        operations = []

        def count() -> int:
            operations.append(1)
            return 0

        sqlite_of(engine).read(lambda db: db.set_progress_handler(count, 1000))
        calls = await engine.get_calls(run)
        sqlite_of(engine).read(lambda db: db.set_progress_handler(None, 0))
    assert len(calls[0]) == MAX_SHOWN_CALLS
    assert len(operations) < 1000, "a million operations"

"""Sleeps and messages: a run waits for a time or another system as it waits for people, in the store only."""

import asyncio
import logging
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.engine import embedded
from flock.engine.embedded import EmbeddedEngine
from flock.errors import (
    AgentError,
    CallNotFound,
    Conflict,
    InvalidData,
    KeyReused,
    Replayed,
    RunFailed,
    RunNotFound,
    TooLarge,
    TooManyRequests,
)
from flock.runs import (
    BatchOptions,
    Engine,
    IdempotencyKey,
    QuestionFilter,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    new_id,
    now,
)
from flock.steps import answers, journal
from flock.store import statements
from flock.web.auth import new_key
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S, slowness_meanwhile
from tests.support.cluster import engine_for, engine_with_worker
from tests.support.engines import OpenEngine, sqlite_of, until, until_run
from tests.support.http import check_problem, client_of, events_in, get, post_run
from tests.support.servers import Served, memory_kib, serving
from tests.test_ask import json_of, result_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def short_sleeps_suspend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sleeps of any length suspend their step, so that no test waits for 5 seconds."""
    monkeypatch.setattr(journal, "MIN_SUSPENDED_S", 0.0)


async def suspended(engine: Engine, run_id: str) -> Run:
    return await until_run(engine, run_id, lambda run: run.status is RunStatus.WAITING)


async def started(engine: Engine, agent_name: str, inputs: Any = {}, **options: Any) -> str:  # noqa: B006
    """Return the id of a new run when it waits."""
    run = await engine.submit(agent_name, inputs, **options)
    await suspended(engine, run.run_id)
    return run.run_id


async def send(engine: Engine, run_id: str, message: Any, name: str = "payment") -> Run:
    return await engine.send_message(run_id, name, json_of(message))


class Payments:
    """A flock with an agent that receives *count* payments, before or after it may go on."""

    def __init__(self, count: int, **options: Any) -> None:
        self.flock = Flock()
        self.may_go = anyio.Event()

        async def wait() -> None:
            await self.may_go.wait()

        @self.flock.agent
        async def early(context: RunContext) -> list[int]:
            return [await context.receive("payment", int, **options) for _ in range(count)]

        @self.flock.agent
        async def late(context: RunContext) -> list[int]:
            await context.call(wait)
            return [await context.receive("payment", int, **options) for _ in range(count)]


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_run_sleeps_without_a_slot_and_continues(open_engine: OpenEngine) -> None:
    """The time is not part of its time limit."""
    flock, executed = Flock(), list[str]()

    async def look() -> str:
        executed.append("look")
        return "looked"

    @flock.agent
    async def work(context: RunContext) -> str:
        before: str = await context.call(look)
        await context.sleep(4)
        executed.append("code")
        await context.sleep_until(datetime.now(UTC) + timedelta(days=1) if context.attempt > 1 else now())
        return f"{before} and slept"

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work", timeout_s=3.5)
        run = await engine.get_run(run_id)
        assert (run.questions, run.is_active) == ((), True)
        [sleep] = run.waiting_for
        assert (sleep.kind, sleep.expires_at) == ("sleep", sleep.asked_at + timedelta(seconds=4))
        if isinstance(engine, EmbeddedEngine):
            assert engine._runner.active == {}
        assert (await engine.queue()).asking == 0
        with pytest.raises(CallNotFound):
            await engine.answer_call(run_id, sleep.call_id, json_of(None))
        assert await result_of(engine, run_id) == "looked and slept"
        calls = (await engine.get_calls(run))[0]
        assert [call.kind for call in calls] == ["function", "sleep", "sleep"]
    assert executed == ["look", "code"]


async def test_a_short_sleep_is_executed_in_place(open_engine: OpenEngine) -> None:
    flock, executed = Flock(), list[str]()

    @flock.agent
    async def work(context: RunContext) -> bool:
        executed.append("code")
        since = time.monotonic()
        await context.sleep(0.2)
        await context.sleep_until(now() - timedelta(days=1))
        return 0.2 <= time.monotonic() - since

    async with open_engine(flock) as engine:
        assert await result_of(engine, (await engine.submit("work", {})).run_id) is True
    assert executed == ["code"]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 4e9])
def test_a_sleep_that_is_too_long_or_negative_fails_the_run(seconds: float) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.sleep(seconds)

    @flock.agent
    async def until(context: RunContext) -> None:
        await context.sleep_until(datetime(2026, 1, 1))

    with pytest.raises(RunFailed, match="A run can sleep 0 to"):
        flock.run("work")
    with pytest.raises(RunFailed, match="has no time zone"):
        flock.run("until")


async def test_a_message_continues_a_run_that_waits_for_it(open_engine: OpenEngine) -> None:
    """One that does not fit is refused with a pointer, and the run still waits."""
    async with open_engine(Payments(2).flock) as engine:
        run_id = await started(engine, "early")
        with pytest.raises(InvalidData) as caught:
            await send(engine, run_id, "much")
        assert [error.pointer for error in caught.value.errors] == ["/message"]
        with pytest.raises(InvalidData, match="not a valid name"):
            await send(engine, run_id, 1, name="a b")
        assert (await engine.get_run(run_id)).status is RunStatus.WAITING
        for amount in (1, 2):
            await send(engine, run_id, amount)
        assert await result_of(engine, run_id) == [1, 2]
        calls = (await engine.get_calls(await engine.get_run(run_id)))[0]
        assert [(call.kind, call.name, bytes(call.result)) for call in calls] == [
            ("message", "receive", b"1"),
            ("message", "receive", b"2"),
        ]
        with pytest.raises(Conflict, match="so it can no longer receive a message 'payment'"):
            await send(engine, run_id, 3)
        with pytest.raises(RunNotFound):
            await send(engine, new_id(), 3)


async def test_early_messages_are_received_in_their_order_and_those_that_do_not_fit_are_dropped(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    payments = Payments(3)
    async with open_engine(payments.flock) as engine:
        run_id = (await engine.submit("late", {})).run_id
        await until_run(engine, run_id, lambda run: run.status is RunStatus.RUNNING)
        for amount in (1, "two", 3, 4):
            await send(engine, run_id, amount)
        await send(engine, run_id, "nobody", name="other")
        payments.may_go.set()
        assert await result_of(engine, run_id) == [1, 3, 4]
        calls = (await engine.get_calls(await engine.get_run(run_id)))[0]
        [dropped] = [call for call in calls if call.error is not None]
        assert (dropped.name, dropped.error_type) == ("receive", "call_error")
        assert dropped.error == (
            "A message 'payment' was dropped, because it does not fit: /message: Expected 'int', got 'str'."
        )
        await until(lambda: "not received its messages other" in caplog.text)
    assert "A message 'payment' was dropped" in caplog.text


async def test_a_message_that_is_sent_again_with_its_key_is_received_once(open_engine: OpenEngine) -> None:
    def key(name: str, fingerprint: bytes = b"same") -> IdempotencyKey:
        return IdempotencyKey(name, fingerprint)

    async with open_engine(Payments(2).flock) as engine:
        run_id, other = [await started(engine, "early") for _ in range(2)]
        with pytest.raises(InvalidData):
            await engine.send_message(run_id, "payment", json_of("one"), key("a"))
        await engine.send_message(run_id, "payment", json_of(1), key("a"))
        for _ in range(2):
            with pytest.raises(Replayed):
                await engine.send_message(run_id, "payment", json_of(1), key("a"))
        with pytest.raises(KeyReused):
            await engine.send_message(other, "payment", json_of(1), key("a", b"another"))
        await engine.send_message(run_id, "payment", json_of(2), key("b"))
        assert await result_of(engine, run_id) == [1, 2]
        with pytest.raises(Replayed):
            await engine.send_message(run_id, "payment", json_of(1), key("a"))
        await engine.cancel_run(other)


async def test_messages_are_bounded(open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_MESSAGES", 2)
    payments = Payments(2)
    async with open_engine(payments.flock) as engine:
        run_id = (await engine.submit("late", {})).run_id
        await until_run(engine, run_id, lambda run: run.status is RunStatus.RUNNING)
        with pytest.raises(TooLarge, match="A message may have up to"):
            await send(engine, run_id, "x" * 20_000_000)
        for amount in (1, 2):
            await send(engine, run_id, amount)
        with pytest.raises(TooManyRequests, match="2 messages are kept for the run"):
            await send(engine, run_id, 3)
        payments.may_go.set()
        assert await result_of(engine, run_id) == [1, 2]


async def test_a_message_that_does_not_come_in_time_fails_the_run_unless_there_is_a_default(
    open_engine: OpenEngine,
) -> None:
    async with open_engine(Payments(1, expires_s=3).flock) as engine:
        run_id = await started(engine, "early")
        run = await until_run(engine, run_id, lambda run: run.status.is_final)
        assert (run.error_type, run.error) == ("expired", "No message 'payment' has come in time.")
    async with open_engine(Payments(1, expires_s=3, default=7).flock) as engine:
        assert await result_of(engine, await started(engine, "early")) == [7]


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_the_first_of_several_waits_starts_the_step_again_and_the_others_keep_their_times(
    open_engine: OpenEngine,
) -> None:
    flock, executed = Flock(), list[str]()

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        executed.append("code")
        return list(
            await asyncio.gather(
                context.ask("Go on?", bool, expires_s=600),
                context.sleep(3),
                context.receive("payment", int, expires_s=500),
            )
        )

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work")
        question, _, payment = (await engine.get_run(run_id)).waiting_for
        run = await until_run(engine, run_id, lambda run: len(run.waiting_for) == 2 and run.status is RunStatus.WAITING)
        assert run.waiting_for == (question, payment)
        await send(engine, run_id, 5)
        await engine.answer_call(run_id, question.call_id, json_of(True))
        assert await result_of(engine, run_id) == [True, None, 5]
    assert 2 < len(executed) < 5


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_sleep_keeps_its_time_when_an_answer_starts_the_step_again(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> bool:
        answer, _ = await asyncio.gather(context.ask("Go on?", bool), context.sleep(6))
        return bool(answer)

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work")
        question, sleep = (await engine.get_run(run_id)).waiting_for
        await engine.answer_call(run_id, question.call_id, json_of(True))
        run = await until_run(engine, run_id, lambda run: run.status is RunStatus.WAITING)
        assert run.waiting_for == (sleep,)
        assert await result_of(engine, run_id) is True


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_the_next_step_does_not_take_the_waits_of_the_last_one(open_engine: OpenEngine) -> None:
    """Both have a sleep with the same id. The first step ended without the end of its own."""
    flock = Flock()

    @flock.agent(next_agent="second")
    async def first(context: RunContext) -> str:
        sleeping = asyncio.create_task(context.sleep(3600))
        await context.ask("Go on?", bool)
        sleeping.cancel()
        return "first"

    @flock.agent
    async def second(context: RunContext) -> str:
        await context.sleep(1)
        return "second"

    async with open_engine(flock) as engine:
        run_id = await started(engine, "first")
        question = next(wait for wait in (await engine.get_run(run_id)).waiting_for if wait.is_question)
        await engine.answer_call(run_id, question.call_id, json_of(True))
        assert await result_of(engine, run_id) == "second"


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_items_sleep_and_receive_messages(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(n: int, context: RunContext) -> int:
        await context.sleep(0.5)
        return n + await context.receive("more", int)

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": 10}, {"n": 20}], BatchOptions())
        for item in await engine.get_items(batch.batch_id):
            await suspended(engine, item.run_id)
            await send(engine, item.run_id, item.position, name="more")
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        assert (batch.status, batch.failed_items, batch.waiting_items) == (RunStatus.COMPLETED, 0, 0)
        results = [msgspec.json.decode(item.result or b"") for item in await engine.get_items(batch.batch_id)]
        assert results == [{"result": 10}, {"result": 21}]


async def test_a_retry_starts_with_the_messages_that_were_not_received(open_engine: OpenEngine) -> None:
    """A retry keeps those that were received, like answers, unless it executes all calls again."""
    flock, has_both = Flock(), anyio.Event()

    @flock.agent
    async def work(context: RunContext) -> int:
        got = await context.receive("payment", int)
        await has_both.wait()
        if got == 1:
            raise AgentError("The first payment is lost.")
        return got

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work")
        for amount in (1, 2):
            await send(engine, run_id, amount)
        has_both.set()
        await until_run(engine, run_id, lambda run: run.status is RunStatus.FAILED)
        await engine.retry_run(run_id)
        await until_run(engine, run_id, lambda run: run.status is RunStatus.FAILED and run.tries == 2)
        await engine.retry_run(run_id, calls="again")
        assert await result_of(engine, run_id) == 2


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_sleeping_run_ends_at_once_when_it_is_cancelled(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.sleep(3600)

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work")
        with anyio.fail_after(PATIENCE_S):
            while not await engine.list_runs(RunFilter(status=RunStatus.WAITING)):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert await engine.list_questions(QuestionFilter()) == [], "it asks nobody"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.wait, run_id)
            await anyio.lowlevel.checkpoint()
            assert (await engine.cancel_run(run_id)).status is RunStatus.CANCELLED


async def test_a_step_knows_that_it_ends_to_wait(open_engine: OpenEngine) -> None:
    flock, seen = Flock(), list[bool]()

    @flock.agent
    async def work(context: RunContext) -> int:
        try:
            return await context.receive("payment", int)
        finally:
            seen.append(context.is_suspending)

    async with open_engine(flock) as engine:
        run_id = await started(engine, "work")
        await send(engine, run_id, 1)
        assert await result_of(engine, run_id) == 1
    assert seen == [True, False]


# The step still runs


class Beside:
    """A flock with an agent that waits beside a call that runs until ``may_end``."""

    def __init__(self) -> None:
        self.flock, self.executed = Flock(), list[Any]()
        self.may_end = anyio.Event()

        async def slow() -> None:
            await self.may_end.wait()

        async def note(wait: Any) -> None:
            self.executed.append(await wait)

        @self.flock.agent
        async def work(context: RunContext) -> int:
            self.executed.append("code")
            await asyncio.gather(
                context.call(slow),
                note(context.ask("Go on?", bool)),
                note(context.receive("payment", int)),
                note(context.receive("late", int, expires_s=0.1, default=9)),
            )
            return len(self.executed)


async def test_answers_are_delivered_to_a_step_that_still_runs(tmp_path: Path) -> None:
    """Also through another engine, and what is delivered is in the journal."""
    beside = Beside()
    async with (
        beside.flock.engine(store=tmp_path / "flock.db") as one,
        beside.flock.engine(store=tmp_path / "flock.db") as two,
    ):
        run_id = (await one.submit("work", {})).run_id
        run = await until_run(one, run_id, lambda run: len(run.questions) == 1)
        assert run.status is RunStatus.RUNNING
        await until(lambda: 9 in beside.executed)
        await two.answer_call(run_id, run.questions[0].call_id, json_of(True))
        await until(lambda: True in beside.executed)
        assert await two.answer_call(run_id, run.questions[0].call_id, json_of(True))
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await one.answer_call(run_id, run.questions[0].call_id, json_of(False))
        with pytest.raises(InvalidData):
            await two.send_message(run_id, "payment", json_of("one"))
        await two.send_message(run_id, "payment", json_of(5))
        await until(lambda: 5 in beside.executed)
        assert (await one.get_run(run_id)).questions == ()
        beside.may_end.set()
        assert await result_of(one, run_id) == 4
        calls = (await one.get_calls(await one.get_run(run_id)))[0]
        assert sorted(call.kind for call in calls) == ["function", "message", "message", "question"]


@pytest.mark.cluster
async def test_on_a_cluster_an_answer_is_delivered_within_a_second(temporal_address: str) -> None:
    """The quickest of three: the machine may be busy."""
    flock, delivered_at, may_end = Flock(), list[float](), anyio.Event()

    async def slow() -> None:
        await may_end.wait()

    async def ask(context: RunContext) -> None:
        for n in range(3):
            await context.ask(f"Go on? {n}", bool)
            delivered_at.append(time.monotonic())

    @flock.agent
    async def work(context: RunContext) -> int:
        await asyncio.gather(context.call(slow), ask(context))
        return len(delivered_at)

    def asks(run: Run, n: int) -> bool:
        return f"Go on? {n}" in [each.question for each in run.questions]

    took_s = list[float]()
    with slowness_meanwhile() as slower:
        async with engine_with_worker(temporal_address, flock) as engine, engine:
            run_id = (await engine.submit("work", {})).run_id
            while len(took_s) < 3:
                run = await until_run(engine, run_id, lambda run: asks(run, len(took_s)))
                assert run.status.is_active
                since = time.monotonic()
                await engine.answer_call(run_id, run.questions[-1].call_id, json_of(True))
                await until(lambda: len(delivered_at) > len(took_s))
                took_s.append(delivered_at[-1] - since)
            assert (await engine.get_run(run_id)).questions == ()
            may_end.set()
            assert await result_of(engine, run_id) == 3
            calls = (await engine.get_calls(await engine.get_run(run_id)))[0]
            assert [call.kind for call in calls] == ["question"] * 3 + ["function"]
    assert min(took_s) < max(slower), took_s


# In the store


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_sleeps_and_messages_survive_a_restart(tmp_path: Path) -> None:
    flock, store = Flock(), tmp_path / "flock.db"

    @flock.agent
    async def work(context: RunContext) -> int:
        await context.sleep(1)
        return await context.receive("payment", int)

    async with flock.engine(store=store) as engine:
        run_id = await started(engine, "work", is_async=False)
        before = (await engine.get_run(run_id)).waiting_for
        await send(engine, run_id, 5)
    async with flock.engine(store=store) as engine:
        run = await engine.get_run(run_id)
        assert run.waiting_for in (before, ())
        assert await result_of(engine, run_id) == 5


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_clock_that_jumps_back_neither_wakes_a_run_early_nor_for_ever_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flock, jump = Flock(), timedelta()
    monkeypatch.setattr(embedded, "now", lambda: now() - jump)

    @flock.agent
    async def work(context: RunContext) -> str:
        await context.sleep(0.2)
        return "slept"

    async with flock.engine() as engine:
        run_id = await started(engine, "work")
        jump = timedelta(hours=1)
        await anyio.sleep(1.2)  # the engine has looked twice
        assert (await engine.get_run(run_id)).status is RunStatus.WAITING
        jump = timedelta()
        assert await result_of(engine, run_id) == "slept"


async def test_the_next_wake_up_and_the_count_of_runs_that_ask_read_only_an_index(tmp_path: Path) -> None:
    async with Payments(1).flock.engine(store=tmp_path / "flock.db") as engine:
        db = sqlite_of(engine)._db
        for query, values, index in (
            (statements.EXPIRED_RUNS, ("flock", 0), "runs_expiring (flock=? AND expires_at<?)"),
            (statements.COUNT_ASKING, ("flock", "[]"), "INDEX runs_asking (flock=?)"),
            (statements.NEXT_MESSAGE, ("", ""), "messages_of_runs (run_id=? AND name=?)"),
        ):
            plan = "\n".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values))
            assert index in plan, plan
            assert "SCAN runs" not in plan


# Without a server


def test_without_a_server_a_run_sleeps_in_place_and_nobody_sends_a_message() -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> str:
        await context.sleep(0.2)
        return await context.receive("word", str)

    since = time.monotonic()
    with pytest.raises(RunFailed, match=r"Nobody is here to send the message 'word' to the agent\. Pass on_question="):
        flock.run("work")
    assert time.monotonic() - since >= 0.2
    assert flock.run("work", on_question=lambda wait: f"{wait.kind} {wait.question}") == {"result": "message word"}


# Over HTTP

KEYS = {"ann": new_key(), "bob": new_key()}


@pytest.fixture(params=["embedded", "temporal"])
async def engine(request: pytest.FixtureRequest, short_sleeps_suspend: None) -> AsyncIterator[Engine]:
    async with engine_for(request, sleeping_flock()) as made:
        yield made


def sleeping_flock() -> Flock:
    flock = Flock("sleeping")

    @flock.agent
    async def nap(context: RunContext) -> str:
        await context.sleep(2)
        return "slept"

    @flock.agent
    async def pay(context: RunContext) -> int:
        return await context.receive("payment", int)

    @flock.agent
    async def nap_and_ask(context: RunContext) -> bool:
        await context.sleep(0.5)
        return await context.ask("Go on?", bool)

    async def slow() -> None:
        while not await anyio.Path("go").exists():  # noqa: ASYNC110 - the test makes it
            await anyio.sleep(0.01)

    @flock.agent
    async def work_and_ask(context: RunContext) -> None:
        await asyncio.gather(context.call(slow), context.ask("Go on?", bool))

    return flock


async def test_a_synchronous_request_is_answered_after_a_sleep_and_not_before(engine: Engine) -> None:
    app = create_app(sleeping_flock(), engine=engine, auth="host")
    async with app.lifespan(), client_of(app) as client:
        response = await post_run(client, "nap")
        assert (response.status_code, response.json()["result"]) == (200, {"result": "slept"})
        response = await post_run(client, "nap_and_ask")
        assert (response.status_code, response.json()["status"]) == (202, "waiting")
        assert "waits" not in response.json()
        await client.post(f"{response.headers['Location']}/cancel?wait=10")


@pytest.mark.parametrize("agent_name", ["nap", "pay"])
async def test_neither_a_sleep_nor_an_awaited_message_ends_a_wait_or_a_stream(agent_name: str, engine: Engine) -> None:
    app = create_app(sleeping_flock(), engine=engine, auth="host")
    async with app.lifespan(), client_of(app) as client:
        path = (await post_run(client, agent_name, async_run=True)).headers["Location"]
        run_id = path.rpartition("/")[2]
        await suspended(engine, run_id)
        waiting = asyncio.ensure_future(get(client, path, wait=60))
        streaming = asyncio.ensure_future(client.get(f"{path}/events"))
        if agent_name == "pay":
            done, _ = await asyncio.wait([waiting, streaming], timeout=0.5)
            assert not done
            await send(engine, run_id, 1)
        run, stream = await waiting, await streaming
    assert (run["status"], run["result"]) == ("completed", {"result": "slept" if agent_name == "nap" else 1})
    assert events_in(stream.text)[-1]["event"] == "run.completed"


async def test_a_question_beside_a_call_that_runs_ends_no_request(engine: Engine) -> None:
    """Only when the step has ended to wait for its answer."""
    app = create_app(sleeping_flock(), engine=engine, auth="host")
    async with app.lifespan(), client_of(app) as client:
        posting = asyncio.ensure_future(post_run(client, "work_and_ask"))
        with anyio.fail_after(PATIENCE_S):
            while not (runs := await engine.list_runs(RunFilter(agent_name="work_and_ask"))):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await until_run(engine, runs[0].run_id, lambda run: bool(run.questions))
        path = f"/run/{runs[0].run_id}"
        waiting = asyncio.ensure_future(get(client, path, wait=60))
        done, _ = await asyncio.wait([posting, waiting], timeout=0.5)
        assert not done
        await anyio.Path("go").touch()
        response, run = await posting, await waiting
        await client.post(f"{path}/cancel?wait=10")
    assert (response.status_code, response.json()["status"], run["status"]) == (202, "waiting", "waiting")
    assert [each["question"] for each in response.json()["waiting_for"]] == ["Go on?"]


async def test_a_question_beside_a_call_that_runs_is_in_a_stream_and_does_not_end_it(engine: Engine) -> None:
    """On a cluster, a stream has only what is stored."""
    app, body = create_app(sleeping_flock(), engine=engine, auth="host"), {"agent_name": "work_and_ask", "inputs": {}}
    async with app.lifespan(), client_of(app) as client:
        streaming = asyncio.ensure_future(client.post("/run/flock", json=body, headers={"Accept": "text/event-stream"}))
        with anyio.fail_after(PATIENCE_S):
            while not (runs := await engine.list_runs(RunFilter(agent_name="work_and_ask"))):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await until_run(engine, runs[0].run_id, lambda run: bool(run.questions))
        done, _ = await asyncio.wait([streaming], timeout=0.5)
        assert not done
        await anyio.Path("go").touch()
        events = events_in((await streaming).text)
        await client.post(f"/run/{runs[0].run_id}/cancel?wait=10")
    calls = [(each["event"], each["data"]["name"]) for each in events if each["event"].startswith("call.")]
    started = [("call.started", "slow"), ("call.started", "ask")]
    assert calls == [*(started if isinstance(engine, EmbeddedEngine) else ()), ("call.completed", "slow")]
    assert events[-1]["event"] == "run.waiting"


async def test_a_message_over_http_is_seen_in_the_run_and_sent_by_its_owner_only(engine: Engine) -> None:
    app = create_app(sleeping_flock(), engine=engine, api_keys=KEYS)
    async with app.lifespan(), client_of(app) as client:

        async def request(name: str, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
            headers = {"Authorization": f"Bearer {KEYS[name]}", **headers}
            return await client.request(method, path, json=body, headers=headers)

        body = {"agent_name": "pay", "async_run": True}
        run = (await request("ann", "POST", "/run/flock", body)).json()
        path = f"/run/{run['run_id']}"
        await suspended(engine, run["run_id"])
        run = (await request("ann", "GET", path)).json()
        [wait] = run["waits"]
        assert (wait["kind"], wait["name"], wait["until"], "waiting_for" in run) == ("message", "payment", None, False)
        messages = f"{path}/messages/payment"
        assert check_problem(await request("bob", "POST", messages, {"message": 1}), 404)["title"] == "Unknown run"
        wrong = check_problem(await request("ann", "POST", messages, {"message": "one"}), 422)
        assert [error["pointer"] for error in wrong["errors"]] == ["/message"]
        check_problem(await request("ann", "POST", messages, {"message": "x" * 20_000_000}), 413)
        key = {"Idempotency-Key": new_id()}
        for is_replay in (False, True):
            response = await request("ann", "POST", messages, {"message": 1}, **key)
            assert response.status_code == 202
            assert ("Idempotency-Replayed" in response.headers) is is_replay
        check_problem(await request("ann", "POST", messages, {"message": 2}, **key), 422)
        assert (await request("ann", "GET", f"{path}?wait=30")).json()["result"] == {"result": 1}
        check_problem(await request("ann", "POST", messages, {"message": 1}), 409)


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_client_that_disconnects_cancels_its_sleeping_run(tmp_path: Path) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.sleep(3600)

    app: FlockAPI = create_app(flock, store=tmp_path / "flock.db", auth="host")
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
        with anyio.move_on_after(1):
            await post_run(client, "work")
        [run] = await app.engine.list_runs(RunFilter())
        await until_run(app.engine, run.run_id, lambda run: run.status is RunStatus.CANCELLED)


# Crashes

SCRIPT = """
import os
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("sleeping")
log = os.open("calls.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

def note(word: str) -> None:
    os.write(log, word.encode() + b"\\n")

@flock.agent
async def nap(seconds: float, context: RunContext) -> str:
    await context.call(note, "before")
    await context.sleep(seconds)
    await context.call(note, "after")
    return await context.receive("word", str)
"""


@pytest.mark.slow
def test_kill_9_loses_neither_a_sleep_nor_a_message(tmp_path: Path) -> None:
    script = tmp_path / "naps.py"
    script.write_text(SCRIPT)
    body = {"agent_name": "nap", "inputs": {"seconds": 12}, "async_run": True}
    with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        path = client.post("/run/flock", json=body).headers["Location"]
        deadline = time.monotonic() + PATIENCE_S
        while (run := client.get(path).json())["status"] != "waiting":
            assert time.monotonic() < deadline
        assert client.post(f"{path}/messages/word", json={"message": "kept"}).status_code == 202
        os.killpg(server.process.pid, signal.SIGKILL)
    with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get(path).json()["waits"] == run["waits"]
        ended = client.get(path, params={"wait": 60}).json()
        assert ended["result"] == {"result": "kept"}
        woke_at = ended["steps"][0]["calls"][1]["completed_at"]
        late_s = (datetime.fromisoformat(woke_at) - datetime.fromisoformat(run["waits"][0]["until"])).total_seconds()
        assert 0 <= late_s < 2, "it was neither cut short nor begun again"
    assert Path("calls.log").read_text().splitlines() == ["before", "after"]


@pytest.mark.nightly
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports the memory")
def test_100_000_sleeping_runs_cost_neither_memory_nor_time(tmp_path: Path) -> None:
    script = tmp_path / "naps.py"
    script.write_text(SCRIPT)
    body = {"agent_name": "nap", "inputs": {"seconds": 86_400}, "async_run": True}

    def measured() -> tuple[int, float, str]:
        """Start a server, let one run sleep and send it a message. Return its memory, the time, and the run's id."""
        started_at = time.monotonic()
        with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            path = client.post("/run/flock", json=body).headers["Location"]
            while client.get(path).json()["status"] != "waiting":
                assert time.monotonic() < started_at + PATIENCE_S
            assert client.post(f"{path}/messages/word", json={"message": "a"}).status_code == 202
            time.sleep(1)  # the wake-ups are checked twice in this time
            return memory_kib(server), time.monotonic() - started_at, path.rpartition("/")[2]

    before_kib, before_s, run_id = measured()
    with closing(sqlite3.connect(tmp_path / "flock.db")) as db, db:
        names = [row[1] for row in db.execute("PRAGMA table_info(runs)")]
        values = ", ".join("printf('%08x%s', n, substr(run_id, 9))" if name == "run_id" else name for name in names)
        db.execute(
            f"""WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100000)
            INSERT INTO runs ({", ".join(names)}) SELECT {values} FROM runs, numbers WHERE run_id = ?""",
            (run_id,),
        )
        since = time.monotonic()
        for _ in range(100):
            assert db.execute(statements.EXPIRED_RUNS, ("sleeping", 0)).fetchall() == []
        assert time.monotonic() - since < 0.1
    after_kib, after_s, _ = measured()
    logging.getLogger(__name__).warning("100,000 sleeping runs: %d KiB more", after_kib - before_kib)
    assert after_kib < before_kib + 8 * 1024
    assert after_s < before_s + 2

"""Questions to a person: a run waits for the answer in the store only, and continues where it was."""

import asyncio
import contextlib
import dataclasses
import json
import os
import pty
import signal
import sqlite3
import subprocess
import time
import tracemalloc
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio
import httpx
import msgspec
import pytest

from flock.agents.questions import check_answer, schema_of
from flock.core import Flock, FlockFactory
from flock.engine import embedded
from flock.engine.embedded import EmbeddedEngine
from flock.errors import CallNotFound, Conflict, InvalidData, RunFailed
from flock.runs import (
    BatchOptions,
    Engine,
    Question,
    QuestionFilter,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    new_id,
    now,
)
from flock.steps.identity import asking_call
from flock.store import waiting as waiting_module
from flock.testing import FakeModel, Reply
from flock.web.auth import new_key
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for
from tests.support.engines import OpenEngine, until, until_run
from tests.support.http import check_problem, client_of, events_in, get, post_run
from tests.support.models import usage_of_gpt_4o
from tests.support.servers import Served, flockapi_command, memory_kib, serving

pytestmark = pytest.mark.anyio


@dataclasses.dataclass
class Approval:
    approved: bool
    reason: str = ""


def json_of(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


async def waiting(engine: Engine, run_id: str, count: int = 1) -> Run:
    """Return the run when it waits for *count* answers."""
    with anyio.fail_after(PATIENCE_S):
        run = await engine.wait(run_id)
    assert (run.status, len(run.waiting_for)) == (RunStatus.WAITING, count), run.error
    return run


async def asked(engine: Engine, agent_name: str, inputs: Any = {}, count: int = 1, **options: Any) -> Run:  # noqa: B006
    """Return a new run when it waits."""
    run = await engine.submit(agent_name, inputs, **options)
    return await waiting(engine, run.run_id, count)


async def result_of(engine: Engine, run_id: str) -> Any:
    with anyio.fail_after(PATIENCE_S):
        run = await engine.wait(run_id)
    assert run.status is RunStatus.COMPLETED, (run.status, run.error)
    assert run.result is not None
    return msgspec.json.decode(run.result)["result"]


class Refunds:
    """A flock with an agent that asks whether to refund, between two calls, and what it has executed."""

    def __init__(self, **ask: Any) -> None:
        self.executed: list[str] = []
        self.flock = Flock()

        async def look(order: str) -> float:
            self.executed.append("look")
            return 40.0

        async def pay(amount: float) -> str:
            self.executed.append("pay")
            return f"paid {amount}"

        @self.flock.agent
        async def refund(order: str, context: RunContext) -> str:
            amount = await context.call(look, order)
            self.executed.append("code")
            answer = await context.ask(f"Refund {amount} for {order}?", Approval, **ask)
            if not answer.approved:
                return f"refused: {answer.reason}"
            paid: str = await context.call(pay, amount)
            return paid


async def test_a_run_waits_for_the_answer_and_continues_with_it(open_engine: OpenEngine) -> None:
    refunds = Refunds()
    async with open_engine(refunds.flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        if isinstance(engine, EmbeddedEngine):
            assert engine._runner.active == {}  # it left memory
        [question] = run.waiting_for
        assert question.question == "Refund 40.0 for A7?"
        assert msgspec.json.decode(question.schema)["required"] == ["approved"]
        assert question.call_id.startswith("ask:")
        with anyio.fail_after(PATIENCE_S):
            while not (listed := await engine.list_runs(RunFilter(status=RunStatus.WAITING))):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert [(item.run_id, item.waiting_for) for item in listed] == [(run.run_id, run.waiting_for)]
        assert [asked.run_id for asked in await engine.list_questions(QuestionFilter())] == [run.run_id]
        assert (await engine.queue()).asking == 1
        answered = await engine.answer_call(run.run_id, question.call_id, json_of({"approved": True}))
        assert answered.status is RunStatus.STARTING
        assert answered.waiting_for == ()
        assert await result_of(engine, run.run_id) == "paid 40.0"
    assert refunds.executed == ["look", "code", "code", "pay"]


@pytest.mark.parametrize(
    ("output", "pointer"),
    [
        ({}, "/output/approved"),
        ({"approved": "yes"}, "/output/approved"),
        ({"approved": True, "why": 1}, "/output/why"),
        ([], "/output"),
    ],
)
async def test_an_answer_that_does_not_fit_is_refused_with_a_pointer(
    output: Any, pointer: str, open_engine: OpenEngine
) -> None:
    async with open_engine(Refunds().flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        with pytest.raises(InvalidData) as caught:
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(output))
        assert [error.pointer for error in caught.value.errors] == [pointer]
        assert (await engine.get_run(run.run_id)).waiting_for == run.waiting_for


@pytest.mark.parametrize("number", ["1e400", "-1e400", "9" * 5000])
async def test_a_number_out_of_range_in_an_answer_is_refused_with_its_pointer(
    number: str, open_engine: OpenEngine
) -> None:
    """Also in an answer to a question that has been answered."""
    flock = Flock(f"asking {new_id()}")

    @flock.agent
    async def ask(context: RunContext) -> Any:
        return await context.ask("What?", Any)

    async with open_engine(flock) as engine:
        run = await asked(engine, "ask", {})
        call_id = run.waiting_for[0].call_id
        for is_answered in (False, True):
            for output, pointer in ((number, ""), (f'{{"a": [0, {number}]}}', "/a/1")):
                with pytest.raises(InvalidData, match="out of range") as caught:
                    await engine.answer_call(run.run_id, call_id, msgspec.Raw(output.encode()))
                assert [error.pointer for error in caught.value.errors] == [f"/output{pointer}"]
            if not is_answered:
                await engine.answer_call(run.run_id, call_id, json_of(1.5))
                assert await result_of(engine, run.run_id) == 1.5


async def test_the_same_answer_may_be_given_again_and_no_other(open_engine: OpenEngine) -> None:
    async with open_engine(Refunds().flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        call_id = run.waiting_for[0].call_id
        with pytest.raises(CallNotFound):
            await engine.answer_call(run.run_id, "ask:other", json_of(True))
        answer = json_of({"approved": False, "reason": "late"})
        await engine.answer_call(run.run_id, call_id, answer)
        assert await result_of(engine, run.run_id) == "refused: late"
        same = msgspec.Raw(b'{"reason": "late", "approved": false}')
        assert (await engine.answer_call(run.run_id, call_id, same)).status is RunStatus.COMPLETED
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await engine.answer_call(run.run_id, call_id, json_of({"approved": True}))


async def test_of_concurrent_answers_one_wins(tmp_path: Path) -> None:
    refunds, outcomes = Refunds(), list[str]()
    async with (
        refunds.flock.engine(store=tmp_path / "a.db") as one,
        refunds.flock.engine(store=tmp_path / "a.db") as two,
    ):
        run = await asked(one, "refund", {"order": "A7"})

        async def answer(engine: Engine, reason: str) -> None:
            output = json_of({"approved": False, "reason": reason})
            try:
                await engine.answer_call(run.run_id, run.waiting_for[0].call_id, output)
                outcomes.append(reason)
            except Conflict:
                pass

        async with anyio.create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(answer, (one, two)[number % 2], str(number))
        assert len(outcomes) == 1
        for engine in (one, two):
            assert await result_of(engine, run.run_id) == f"refused: {outcomes[0]}"


async def test_answers_given_at_once_do_not_each_hold_all_questions(tmp_path: Path) -> None:
    flock, count, size = Flock(), 100, 7_000

    @flock.agent
    async def refund(context: RunContext) -> int:
        return len(await asyncio.gather(*(context.ask(f"{n} {'x' * size}", bool) for n in range(count))))

    async with flock.engine(store=tmp_path / "flock.db", durability="process") as engine:
        run_id = (await engine.submit("refund", {})).run_id
        call_ids = [question.call_id for question in (await engine.wait(run_id)).waiting_for]
        tracemalloc.start()
        try:
            async with anyio.create_task_group() as tasks:
                for call_id in call_ids:
                    tasks.start_soon(engine.answer_call, run_id, call_id, msgspec.Raw(b"true"))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (await engine.wait(run_id)).status is RunStatus.COMPLETED
    assert peak < 20 * count * size, "the questions are in memory a few times"


async def test_questions_asked_together_wait_together_after_the_siblings_have_finished(open_engine: OpenEngine) -> None:
    flock, executed, released = Flock(), list[str](), anyio.Event()

    async def slow() -> str:
        await released.wait()
        executed.append("slow")
        return "slow"

    async def after(text: str) -> str:
        executed.append("after")
        return f"{text} after"

    async def two_calls(context: RunContext) -> str:
        found: str = await context.call(after, await context.call(slow))
        return found

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        return list(
            await asyncio.gather(
                context.ask("Colour?", Literal["red", "blue"]), context.ask("How many?", int), two_calls(context)
            )
        )

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        await until_run(engine, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        released.set()
        run = await waiting(engine, run.run_id, 2)
        assert executed == ["slow", "after"]
        colour, number = run.waiting_for
        assert (colour.question, number.question) == ("Colour?", "How many?")
        await engine.answer_call(run.run_id, number.call_id, json_of(3))
        run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
        assert run.waiting_for == (colour,), "the first answer starts the step again, and the other question is open"
        assert (await engine.answer_call(run.run_id, number.call_id, json_of(3))).waiting_for == (colour,)
        await engine.answer_call(run.run_id, colour.call_id, json_of("blue"))
        assert await result_of(engine, run.run_id) == ["blue", 3, "slow after"]
    assert executed == ["slow", "after"]


async def test_a_question_inside_a_call_makes_the_whole_run_wait(open_engine: OpenEngine) -> None:
    flock, executed = Flock(), list[str]()

    async def pay() -> str:
        executed.append("pay")
        return "paid"

    async def approve(what: str, context: RunContext) -> str:
        executed.append("approve")
        first = await context.ask(f"{what}?", bool)
        second = await context.ask(f"{what}?", bool)
        return f"{first} {second}"

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        return [await context.call(pay), await context.call(approve, "Send")]

    async with open_engine(flock) as engine:
        run = await asked(engine, "work")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
        again = await waiting(engine, run.run_id)
        assert asking_call(again.waiting_for[0].call_id) == asking_call(run.waiting_for[0].call_id) + ":2"
        assert again.waiting_for[0].call_id.startswith("approve:")
        await engine.answer_call(run.run_id, again.waiting_for[0].call_id, json_of(False))
        assert await result_of(engine, run.run_id) == ["paid", "True False"]
    assert executed == ["pay", "approve", "approve", "approve"]


async def test_an_agent_that_swallows_the_end_of_its_turn_waits_all_the_same(open_engine: OpenEngine) -> None:
    flock = Flock()

    async def careless(context: RunContext) -> str:
        try:
            return str(await context.ask("Inner?", bool))
        except BaseException:
            return "garbage"

    @flock.agent
    async def swallow(context: RunContext) -> str:
        try:
            return str(await context.ask("Go on?", bool))
        except BaseException:
            return "garbage"

    @flock.agent
    async def replace(context: RunContext) -> str:
        try:
            return str(await context.ask("Go on?", bool))
        finally:
            if context.attempt == 1 and not answered:
                raise ValueError("clean-up failed")

    @flock.agent
    async def nested(context: RunContext) -> str:
        found: str = await context.call(careless)
        return found

    answered = False
    async with open_engine(flock) as engine:
        runs = [await asked(engine, name) for name in ("swallow", "replace", "nested")]
        answered = True
        for run in runs:
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
            assert await result_of(engine, run.run_id) == "True"


@pytest.mark.parametrize("is_in_task", [False, True])
async def test_a_run_asks_from_within_a_shield(is_in_task: bool, open_engine: OpenEngine) -> None:
    """A shield of anyio keeps the end of the step from what is in it, and so the run would never end."""
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> list[bool]:
        found = list[bool]()
        with anyio.CancelScope(shield=True):
            if is_in_task:
                found += await asyncio.gather(context.ask("Go on?", bool), context.ask("Sure?", bool))
            else:
                found += [await context.ask("Go on?", bool), await context.ask("Sure?", bool)]
        return found

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        for question in ("Go on?", "Sure?"):
            run = await until_run(
                engine,
                run.run_id,
                lambda run: run.status is RunStatus.WAITING and any(q.question == question for q in run.waiting_for),  # noqa: B023
            )
            call_id = next(each.call_id for each in run.waiting_for if each.question == question)
            await engine.answer_call(run.run_id, call_id, json_of(True))
        assert await result_of(engine, run.run_id) == [True, True]


async def test_the_time_of_waiting_is_not_part_of_the_timeout(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> str:
        await context.ask("Go on?", bool)
        await anyio.sleep_forever()
        return ""

    @flock.agent
    async def quick(context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        slow = await asked(engine, "work", timeout_s=3)
        run = await asked(engine, "quick", timeout_s=3)
        await anyio.sleep(3.1)
        for each in (slow, run):
            await engine.answer_call(each.run_id, each.waiting_for[0].call_id, json_of(True))
        assert await result_of(engine, run.run_id) is True
        ended = await engine.wait(slow.run_id)
        assert (ended.status, ended.error_type, ended.started_at) == (RunStatus.FAILED, "timeout", slow.started_at)


async def test_a_waiting_run_ends_at_once_when_it_is_cancelled(open_engine: OpenEngine) -> None:
    async with open_engine(Refunds().flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        with pytest.raises(Conflict, match="is still waiting"):
            await engine.delete_run(run.run_id)
        assert (await engine.cancel_run(run.run_id)).status is RunStatus.CANCELLED
        assert (await engine.cancel_run(run.run_id)).status is RunStatus.CANCELLED
        with pytest.raises(Conflict, match=r"is cancelled, so its question .* can no longer be answered"):
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        await engine.retry_run(run.run_id)
        run = await waiting(engine, run.run_id)
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        assert await result_of(engine, run.run_id) == "paid 40.0"
        await engine.delete_run(run.run_id)


async def test_an_expired_question_fails_the_run_unless_it_has_a_default(open_engine: OpenEngine) -> None:
    expiring, with_default = Refunds(expires_s=3), Refunds(expires_s=3, default=Approval(False, "nobody was there"))
    async with open_engine(expiring.flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        assert run.waiting_for[0].expires_at is not None
        run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "expired")
        assert run.error == "Nobody answered in time: Refund 40.0 for A7?"
        with pytest.raises(Conflict, match="is failed"):
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        await engine.retry_run(run.run_id)
        await waiting(engine, run.run_id)
    assert expiring.executed == ["look", "code", "code"]
    async with open_engine(with_default.flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"})
        run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
        assert msgspec.json.decode(run.result or b"{}") == {"result": "refused: nobody was there"}


async def test_a_question_stays_open_after_its_time_while_other_calls_of_its_step_run() -> None:
    flock, may_end = Flock(), anyio.Event()

    async def other() -> None:
        await may_end.wait()

    @flock.agent
    async def work(context: RunContext) -> bool:
        found = await asyncio.gather(context.ask("Pay?", bool, expires_s=0.05), context.call(other))
        return bool(found[0])

    async with flock.engine(store=":memory:") as engine:
        run = await engine.submit("work", {})
        run = await until_run(engine, run.run_id, lambda run: bool(run.questions))
        expires_at = run.questions[0].expires_at
        assert expires_at is not None
        await anyio.sleep((expires_at - now()).total_seconds() + 0.05)
        assert (await engine.get_run(run.run_id)).status is RunStatus.RUNNING
        await engine.answer_call(run.run_id, run.questions[0].call_id, json_of(True))
        may_end.set()
        assert await result_of(engine, run.run_id) is True


async def test_on_question_may_take_longer_than_the_question_may_wait() -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> bool:
        return await context.ask("Pay?", bool, expires_s=0.01)

    async def slow(question: Question) -> bool:
        assert question.expires_at is not None
        await anyio.sleep((question.expires_at - now()).total_seconds() + 0.05)
        return True

    async with flock.engine(store=":memory:", on_question=slow) as engine:
        run = await engine.submit("work", {})
        assert await result_of(engine, run.run_id) is True


async def test_of_several_engines_one_continues_an_expired_run(tmp_path: Path) -> None:
    refunds, store = Refunds(expires_s=0.1, default=Approval(True)), tmp_path / "flock.db"
    async with refunds.flock.engine(store=store) as one, refunds.flock.engine(store=store) as two:
        runs = [await engine.submit("refund", {"order": str(n)}) for n in range(5) for engine in (one, two)]
        for run in runs:
            await until_run(two, run.run_id, lambda run: run.status.is_final)
            assert await result_of(one, run.run_id) == "paid 40.0"
    assert refunds.executed.count("pay") == len(runs)


async def test_an_expired_run_that_cannot_go_on_here_is_not_looked_at_again_for_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of one is damaged, and the agent of the other one is missing. The latter goes on elsewhere."""
    refunds, store = Refunds(expires_s=0.1, default=Approval(True)), tmp_path / "flock.db"
    monkeypatch.setattr(embedded, "CHECK_INTERVAL_S", 3600)
    async with refunds.flock.engine(store=store) as engine:
        damaged, other = [await asked(engine, "refund", {"order": order}) for order in "ab"]
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        db.execute("UPDATE runs SET progress = '[' WHERE run_id = ?", (damaged.run_id,))
    monkeypatch.setattr(embedded, "CHECK_INTERVAL_S", 0.01)
    checks, expire = 0, waiting_module.expire

    def counted(run_ids: Any, *args: Any) -> Any:
        nonlocal checks
        checks += len(run_ids)
        return expire(run_ids, *args)

    monkeypatch.setattr(waiting_module, "expire", counted)
    without = Flock(refunds.flock.name)
    without.agent(name="one")(lambda: 1)
    async with without.engine(store=store) as engine:
        await until(lambda: checks == 2)
        await anyio.sleep(0.2)  # twenty checks
    assert checks == 2
    assert sum(damaged.run_id in message for message in caplog.messages) == 1
    async with refunds.flock.engine(store=store) as engine:
        await until_run(engine, other.run_id, lambda run: run.status is RunStatus.COMPLETED)


async def test_a_waiting_run_survives_a_restart_and_can_be_answered_by_another_engine(tmp_path: Path) -> None:
    refunds, store = Refunds(), tmp_path / "flock.db"
    async with refunds.flock.engine(store=store) as engine:
        run = await asked(engine, "refund", {"order": "A7"}, is_async=False)
    async with refunds.flock.engine(store=store) as one, refunds.flock.engine(store=store) as two:
        assert (await one.get_run(run.run_id)).status is RunStatus.WAITING
        await two.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        assert await result_of(one, run.run_id) == "paid 40.0"
    assert refunds.executed == ["look", "code", "code", "pay"]


async def test_items_of_a_batch_may_wait_and_are_counted(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(n: int, context: RunContext) -> str:
        return str(await context.ask(f"Send {n}?", bool)) if n % 2 else "sent"

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(6)], BatchOptions(max_workers=1))
        with anyio.fail_after(PATIENCE_S):
            while (batch := await engine.get_batch(batch.batch_id)).waiting_items < 3:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert (batch.status, batch.completed_items) == (RunStatus.RUNNING, 3)
        if isinstance(engine, EmbeddedEngine):
            await until(lambda: not engine._runner.active)
        items = await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])
        assert [item.waiting_for[0].question for item in items] == ["Send 1?", "Send 3?", "Send 5?"]
        for item in items[:2]:
            await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(True))
            await until_run(engine, item.run_id, lambda run: run.status.is_final)
        await engine.cancel_run(items[2].run_id)
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        counts = (batch.status, batch.completed_items, batch.cancelled_items, batch.waiting_items)
        assert counts == (RunStatus.COMPLETED, 6, 1, 0)


async def test_the_events_of_a_batch_count_the_items_that_wait(open_engine: OpenEngine) -> None:
    async with open_engine(Refunds().flock) as engine:
        batch = await engine.submit_batch("refund", [{"order": "A7"}] * 2, BatchOptions())
        async with contextlib.aclosing(engine.batch_events(batch.batch_id)) as events:
            with anyio.fail_after(PATIENCE_S):
                async for event in events:
                    if event is not None and event.data["waiting_items"] == 2:
                        break
        await engine.cancel_batch(batch.batch_id)


async def test_cancelling_a_batch_cancels_its_waiting_items(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(n: int, context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(3)], BatchOptions())
        with anyio.fail_after(PATIENCE_S):
            while (await engine.get_batch(batch.batch_id)).waiting_items < 3:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await engine.cancel_batch(batch.batch_id)
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        counts = (batch.status, batch.completed_items, batch.cancelled_items, batch.waiting_items)
        assert counts == (RunStatus.CANCELLED, 3, 3, 0)
        first, *others = await engine.get_items(batch.batch_id)
        assert (first.error, first.error_type) == ("The run was cancelled.", "cancelled")
        await engine.retry_run(first.run_id)
        run = await until_run(engine, first.run_id, lambda run: run.status is RunStatus.WAITING)
        assert (await engine.get_items(batch.batch_id))[1:] == others
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        assert (batch.status, batch.cancelled_items, batch.waiting_items) == (RunStatus.CANCELLED, 2, 0)
        assert batch.error is not None


async def test_an_expired_question_of_an_item_fails_it_unless_it_has_a_default(open_engine: OpenEngine) -> None:
    """A retry of the batch starts the failed item again, and asks again. It keeps the call that has returned."""
    flock, executed = Flock(), list[int]()

    async def look(n: int) -> int:
        executed.append(n)
        return n

    @flock.agent
    async def work(n: int, context: RunContext) -> str:
        if n == 0:
            return await context.ask("Who takes 0?", str, expires_s=1, default="nobody")
        await context.call(look, n)
        return await context.ask("Who takes 1?", str, expires_s=1 if context.attempt == 1 else None)

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(2)], BatchOptions())
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        assert (batch.status, batch.failed_items, batch.waiting_items) == (RunStatus.COMPLETED, 1, 0)
        given, failed = await engine.get_items(batch.batch_id)
        assert given.result == json_of({"result": "nobody"})
        assert (failed.error_type, failed.error) == ("expired", "Nobody answered in time: Who takes 1?")
        calls = await engine.get_calls(await engine.get_run(given.run_id))
        assert [(call.kind, call.result) for call in calls[0]] == [("question", json_of("nobody"))]
        await engine.retry_batch(batch.batch_id)
        item = await until_run(engine, failed.run_id, lambda run: run.status is RunStatus.WAITING)
        await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of("Ann"))
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
        assert (batch.failed_items, executed) == (0, [1])
        assert await result_of(engine, item.run_id) == "Ann"


async def test_an_answered_item_of_a_long_batch_does_not_wait_for_the_others(open_engine: OpenEngine) -> None:
    flock, resumed = Flock(), anyio.Event()

    @flock.agent
    async def work(n: int, context: RunContext) -> bool:
        if n == 0:
            await context.ask("Go on?", bool)
            resumed.set()
        if n == 200:
            await resumed.wait()
        return True

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(300)], BatchOptions(max_workers=2))
        with anyio.fail_after(PATIENCE_S):
            while not (items := await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
                await anyio.sleep(0.01)
            await engine.answer_call(items[0].run_id, items[0].waiting_for[0].call_id, json_of(True))
            batch = await engine.wait_batch(batch.batch_id)
    assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 300, 0)


async def test_waiting_items_survive_a_restart(tmp_path: Path) -> None:
    flock, store = Flock(), tmp_path / "flock.db"

    @flock.agent
    async def work(n: int, context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    async with flock.engine(store=store) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(2)], BatchOptions())
        with anyio.fail_after(PATIENCE_S):
            while (await engine.get_batch(batch.batch_id)).waiting_items < 2:  # noqa: ASYNC110
                await anyio.sleep(0.01)
    async with flock.engine(store=store) as one, flock.engine(store=store) as two:
        for item in await two.get_items(batch.batch_id):
            assert item.status is RunStatus.WAITING
            await two.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(True))
        with anyio.fail_after(PATIENCE_S):
            batch = await one.wait_batch(batch.batch_id)
    assert (batch.status, batch.failed_items) == (RunStatus.COMPLETED, 0)


async def test_engines_on_one_file_see_that_a_run_waits_and_may_cancel_it(tmp_path: Path) -> None:
    refunds, store = Refunds(), tmp_path / "flock.db"
    async with refunds.flock.engine(store=store) as one, refunds.flock.engine(store=store) as two:
        run = await one.submit("refund", {"order": "A7"})
        await waiting(two, run.run_id)
        assert (await two.cancel_run(run.run_id)).status is RunStatus.CANCELLED
        assert (await one.get_run(run.run_id)).status is RunStatus.CANCELLED


async def test_a_cancellation_while_a_sibling_is_finished_is_not_lost(open_engine: OpenEngine) -> None:
    flock, released = Flock(), anyio.Event()

    async def slow() -> None:
        await released.wait()

    @flock.agent
    async def work(context: RunContext) -> None:
        await asyncio.gather(context.ask("Go on?", bool), context.call(slow))

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        await until_run(engine, run.run_id, lambda run: run.status is RunStatus.RUNNING)
        await engine.cancel_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED


async def test_an_agent_that_another_one_runs_may_ask(open_engine: OpenEngine) -> None:
    flock, executed = Flock(), list[str]()

    async def look() -> int:
        executed.append("look")
        return 7

    @flock.agent(max_concurrency=1)
    async def inner(context: RunContext) -> str:
        found = await context.call(look)
        return f"{found} {await context.ask('Inner?', bool)}"

    @flock.agent
    async def outer(context: RunContext) -> list[Any]:
        answers = await asyncio.gather(context.run_agent("inner", {}), context.ask("Outer?", bool))
        return [answers[0]["result"], answers[1]]

    async with open_engine(flock) as engine:
        run = await asked(engine, "outer", count=2)
        for question in run.waiting_for:
            await engine.answer_call(run.run_id, question.call_id, json_of(True))
        assert await result_of(engine, run.run_id) == ["7 True", True]
    assert executed == ["look"]


async def test_a_tool_of_a_model_agent_may_ask(open_engine: OpenEngine, model: FakeModel) -> None:
    """The model is asked once before the answer and once after it, and the other tool of the round is called once."""
    looked: list[str] = []

    def look(order: str) -> float:
        looked.append(order)
        return 40.0

    async def refund(order: str, context: RunContext) -> str:
        return "refunded" if await context.ask(f"Refund {order}?", bool) else "refused"

    flock = Flock(model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("desk", input="q", output="a: str", tools=[look, refund]))
    model.replies = [
        Reply(calls=[("look", {"order": "A7"}), ("refund", {"order": "A7"})]),
        Reply({"a": "It is refused."}),
    ]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "desk", {"q": "My order!"})
        assert (len(model.requests), looked) == (1, ["A7"])
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(False))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        assert run.result == json_of({"a": "It is refused."})
    assert (len(model.requests), looked) == (2, ["A7"])
    assert [message["content"] for message in model.requests[1]["messages"][-2:]] == ["40.0", "refused"]
    assert run.usage == usage_of_gpt_4o(20, 10)


async def test_a_waiting_run_does_not_hold_up_its_session(open_engine: OpenEngine) -> None:
    async with open_engine(Refunds().flock) as engine:
        first = await engine.submit("refund", {"order": "A7"}, session_id="s")
        second = await engine.submit("refund", {"order": "A8"}, session_id="s")
        for run in (second, first):
            run = await waiting(engine, run.run_id)
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
            assert await result_of(engine, run.run_id) == "paid 40.0"


async def test_an_agent_that_may_not_be_repeated_may_ask(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent(on_interrupt="fail")
    async def work(context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        run = await asked(engine, "work")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
        assert await result_of(engine, run.run_id) is True


@pytest.mark.parametrize(
    ("type_", "options", "words"),
    [
        (object, {}, "The answer cannot be of type <class 'object'>"),
        (bool, {"name": "a/b"}, "'a/b' is not a valid name for a call of 'ask'"),
        (bool, {"expires_s": 0}, "expires_s must be above 0"),
        (bool, {"default": "yes"}, "does not match its return type: Expected `bool`"),
    ],
)
async def test_a_question_that_cannot_be_asked_fails_the_run(
    type_: Any, options: Any, words: str, open_engine: OpenEngine
) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> Any:
        return await context.ask("Go on?", type_, **options)

    @flock.agent
    def thread(context: RunContext) -> Any:
        _ = context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        for name, error in (("work", words), ("thread", "'thread' is not async, so it cannot make calls")):
            run = await engine.submit(name, {})
            run = await engine.wait(run.run_id)
            assert (run.status, run.error_type) == (RunStatus.FAILED, "call_error")
            assert error in (run.error or "")


class Cat(msgspec.Struct, tag=True):
    lives: Annotated[int, msgspec.Meta(ge=1, le=9)]
    kittens: "list[Cat]" = []


class Dog(msgspec.Struct, tag=True):
    name: Annotated[str, msgspec.Meta(max_length=5)]


@dataclasses.dataclass
class Form:
    pet: Cat | Dog
    size: Literal["small", 2] | None
    at: datetime
    pair: tuple[int, str]
    amounts: dict[str, float]


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({}, None),
        ({"size": None}, None),
        ({"size": True}, "/size"),
        ({"size": "big"}, "/size"),
        ({"at": "yesterday"}, "/at"),
        ({"pair": [1]}, "/pair"),
        ({"pair": [1, 2]}, "/pair/1"),
        ({"amounts": {"a/b": "x"}}, "/amounts/a~1b"),
        ({"pet": {"type": "Dog", "name": "too long"}}, "/pet/name"),
        ({"pet": {"type": "Cat", "lives": 9, "kittens": [{"type": "Cat", "lives": 10}]}}, "/pet/kittens/0/lives"),
        ({"pet": 3}, "/pet"),
    ],
)
def test_an_answer_is_checked_against_the_schema_alone(change: Any, pointer: str | None) -> None:
    good = {
        "pet": {"type": "Dog", "name": "Rex"},
        "size": 2,
        "at": "2026-11-26T10:00:00Z",
        "pair": [1, "a"],
        "amounts": {"a": 1.5},
    }
    question = Question(call_id="ask:1", question="?", schema=schema_of(Form), asked_at=now())
    if pointer is None:
        check_answer(question, json_of(good | change))
        return
    with pytest.raises(InvalidData) as caught:
        check_answer(question, json_of(good | change))
    assert [error.pointer for error in caught.value.errors] == [f"/output{pointer}"]
    with pytest.raises(msgspec.ValidationError):  # the type agrees
        msgspec.json.decode(json_of(good | change), type=Form)


def test_without_a_server_a_function_answers() -> None:
    refunds = Refunds()

    async def approve(question: Question) -> Approval:
        return Approval(question.question.startswith("Refund"))

    assert refunds.flock.run("refund", {"order": "A7"}, on_question=approve) == {"result": "paid 40.0"}
    assert refunds.executed == ["look", "code", "pay"]
    results = refunds.flock.run_batch("refund", [{"order": "A7"}], on_question=lambda question: {"approved": False})
    assert results == [{"result": "refused: "}]


def test_without_a_server_and_an_answer_the_error_says_what_to_do() -> None:
    with pytest.raises(RunFailed, match=r"Pass on_question= to flock.run .*Refund 40.0 for A7\?"):
        Refunds().flock.run("refund", {"order": "A7"})


def test_the_command_asks_at_the_terminal_until_the_answer_fits(tmp_path: Path) -> None:
    script, (ours, theirs) = tmp_path / "refunds.py", pty.openpty()
    script.write_text(SCRIPT)
    command = flockapi_command("run", str(script), "refund")
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(ours, b"maybe\n1\ntrue\n")
    printed, asked = process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    os.close(theirs)
    assert asked.count('Refund 40? (JSON: {"type":"boolean"}): ') == 3
    assert "/output: Expected 'bool', got 'int'." in asked
    assert json.loads(printed) == {"result": "paid 40"}


def test_the_command_without_a_terminal_says_what_to_do(tmp_path: Path) -> None:
    script = tmp_path / "refunds.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        flockapi_command("run", str(script), "refund"), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "Error: The agent asks a question. Run the command at a terminal to answer: Refund 40?\n"


# Over HTTP

KEYS = {"ann": new_key(), "bob": new_key(), "ops:admin": new_key()}


@pytest.fixture(params=["embedded", "temporal"])
async def engine(request: pytest.FixtureRequest, flock: Flock) -> AsyncIterator[Engine]:
    """An engine of each kind, because a client cannot tell which one answers."""
    async with engine_for(request, flock) as made:
        yield made


@pytest.fixture
async def app(flock: Flock, engine: Engine) -> AsyncIterator[FlockAPI]:
    made = create_app(flock, engine=engine, auth="host")
    async with made.lifespan():
        yield made


async def test_a_synchronous_request_is_answered_when_its_run_begins_to_wait(client: httpx.AsyncClient) -> None:
    response = await post_run(client, "approve", {"text": "it"})
    body = response.json()
    assert (response.status_code, body["status"], response.headers["Flock-Run-Status"]) == (202, "waiting", "waiting")
    path = response.headers["Location"]
    assert path == f"/run/{body['run_id']}"
    [question] = body["waiting_for"]
    assert question.keys() == {"call_id", "question", "schema", "asked_at", "expires_at", "four_eyes"}
    assert question["schema"]["properties"]["approved"] == {"type": "boolean"}
    assert (await get(client, path, wait=60))["waiting_for"] == [question]
    with anyio.fail_after(PATIENCE_S):
        while not (runs := (await get(client, "/runs", status="waiting"))["runs"]):
            pass
    [listed] = runs
    assert listed["waiting_for"] == [question]
    calls = f"{path}/calls/"
    check_problem(await client.post(calls + "ask:x", json={"output": True}), 404)
    wrong = check_problem(await client.post(calls + question["call_id"], json={"output": {"approved": 1}}), 422)
    assert wrong["errors"] == [{"detail": "Expected 'bool', got 'int'.", "pointer": "/output/approved"}]
    sent = {"output": {"approved": True}}
    response = await client.post(f"{calls}{question['call_id']}?wait=60", json=sent)
    assert (response.status_code, response.json()["result"]) == (200, {"result": "sent"})
    assert "waiting_for" not in response.json()
    assert (await client.post(calls + question["call_id"], json=sent)).status_code == 200
    check_problem(await client.post(calls + question["call_id"], json={"output": {"approved": False}}), 409)


async def test_a_preferred_wait_ends_when_the_run_begins_to_wait(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "approve", "inputs": {"text": "it"}}
    response = await client.post("/run/flock", json=body, headers={"Prefer": "respond-async, wait=60"})
    assert (response.status_code, response.json()["status"]) == (202, "waiting")
    await client.post(f"/run/{response.json()['run_id']}/cancel")


async def test_a_repeated_request_is_answered_with_the_waiting_run(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "approve", "inputs": {"text": "it"}}
    first, second = [await client.post("/run/flock", json=body, headers={"Idempotency-Key": "one"}) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()


async def test_only_the_owner_and_an_admin_may_answer(flock: Flock, engine: Engine) -> None:
    app = create_app(flock, engine=engine, api_keys=KEYS)
    async with app.lifespan(), client_of(app) as client:

        async def send(name: str, method: str, path: str, body: Any = None) -> httpx.Response:
            return await client.request(method, path, json=body, headers={"Authorization": f"Bearer {KEYS[name]}"})

        for answerer in ("ann", "ops:admin"):
            run = (await send("ann", "POST", "/run/flock", {"agent_name": "approve", "inputs": {"text": "it"}})).json()
            path = f"/run/{run['run_id']}/calls/{run['waiting_for'][0]['call_id']}"
            body = {"output": {"approved": True}}
            assert check_problem(await send("bob", "POST", path, body), 404)["title"] == "Unknown run"
            assert (await send(answerer, "POST", path, body)).status_code == 200


async def test_the_events_show_that_a_run_waits_and_then_go_on(flock: Flock, engine: Engine) -> None:
    app = create_app(flock, engine=engine, auth="host")
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
        run = (await post_run(client, "approve", {"text": "it"})).json()
        path, question, lines = f"/run/{run['run_id']}", run["waiting_for"][0], list[str]()
        async with client.stream("GET", f"{path}/events") as response:
            async for line in response.aiter_lines():
                lines.append(line)
                if line.startswith("data: ") and "waiting_for" in line:
                    await client.post(f"{path}/calls/{question['call_id']}", json={"output": {"approved": True}})
        events = events_in("\n".join(lines))
        names = [event["event"] for event in events]
        stored = ("run.started", "step.started", "run.waiting", "call.completed", "step.completed", "run.completed")
        assert names == list(stored), "the answer is a call"
        assert "id" not in events[2]
        assert events[2]["data"]["waiting_for"] == [question]
        ids = [int(event["id"]) for event in events if "id" in event]
        assert ids == sorted(set(ids))


# Crashes

SCRIPT = """
import dataclasses, os, time
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("refunds")
log = os.open("calls.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

def look() -> int:
    os.write(log, b"look\\n")
    return 40

def pay(amount: int) -> str:
    os.write(log, b"pay\\n")
    time.sleep(600 if os.path.exists("slow") else 0)
    return f"paid {amount}"

@flock.agent
async def refund(context: RunContext) -> str:
    amount = await context.call(look)
    return await context.call(pay, amount) if await context.ask(f"Refund {amount}?", bool) else "refused"
"""


def executed() -> list[str]:
    return Path("calls.log").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_loses_neither_a_waiting_run_nor_an_answer(tmp_path: Path, workers: int) -> None:
    script = tmp_path / "refunds.py"
    script.write_text(SCRIPT)
    with serving(script, tmp_path, workers=workers) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        run = client.post("/run/flock", json={"agent_name": "refund"}).json()
        assert run["status"] == "waiting"
        os.killpg(server.process.pid, signal.SIGKILL)
    Path("slow").touch()
    path, question = f"/run/{run['run_id']}", run["waiting_for"][0]
    answer = f"{path}/calls/{question['call_id']}"
    with serving(script, tmp_path, workers=workers) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get(path).json()["waiting_for"] == [question]
        assert client.post(answer, json={"output": True}).status_code == 200
        deadline = time.monotonic() + PATIENCE_S
        while "pay" not in executed():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(server.process.pid, signal.SIGKILL)
    Path("slow").unlink()
    with serving(script, tmp_path, workers=workers) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get(path, params={"wait": 30}).json()["result"] == {"result": "paid 40"}
        assert client.post(answer, json={"output": True}).status_code == 200
    assert executed() == ["look", "pay", "pay"]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux reports the memory")
def test_100_000_waiting_runs_cost_neither_memory_nor_time_at_the_start(tmp_path: Path) -> None:
    script = tmp_path / "refunds.py"
    script.write_text(SCRIPT.replace("bool)", "bool, expires_s=86400)"))

    def measured() -> tuple[int, float, Any]:
        """Start a server, ask twice, list, and answer one question. Return its memory, the time, and the open run."""
        started_at = time.monotonic()
        with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            run, _ = (client.post("/run/flock", json={"agent_name": "refund"}).json() for _ in range(2))
            listed = client.get("/runs", params={"status": "waiting", "limit": 100}).json()["runs"]
            answer = f"/run/{listed[0]['run_id']}/calls/{run['waiting_for'][0]['call_id']}"
            assert client.post(answer, json={"output": True}, params={"wait": 30}).json()["status"] == "completed"
            time.sleep(1)  # the questions are checked for their expiry twice in this time
            return memory_kib(server), time.monotonic() - started_at, run

    before_kib, before_s, run = measured()
    with contextlib.closing(sqlite3.connect(tmp_path / "flock.db")) as db, db:
        names = [row[1] for row in db.execute("PRAGMA table_info(runs)")]
        values = ", ".join("printf('%08x%s', n, substr(run_id, 9))" if name == "run_id" else name for name in names)
        db.execute(
            f"""WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 100000)
            INSERT INTO runs ({", ".join(names)}) SELECT {values} FROM runs, numbers WHERE run_id = ?""",
            (run["run_id"],),
        )
    after_kib, after_s, _ = measured()
    assert after_kib < before_kib + 8 * 1024
    assert after_s < 2 * before_s + 2


async def test_an_answerer_that_is_no_role_fails_the_step_before_it_asks(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def ask(role: str, context: RunContext) -> bool:
        return await context.ask("Send it?", bool, answerer=role)

    async with open_engine(flock) as engine:
        for role in ("a,b", "", "a\u202eb"):
            run = await engine.wait((await engine.submit("ask", {"role": role})).run_id)
            assert (run.status, run.waiting_for) == (RunStatus.FAILED, ())
            assert run.error is not None
            assert "is not the name of a role" in run.error
            assert "\u202e" not in run.error


async def test_a_question_is_kept_as_it_was_asked_and_turns_no_line_of_the_log(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its characters may change the direction of others, so an approver must not be shown another text."""
    flock, text = Flock(), "Pay \u202e001\u202c €?\n\u2066To Ann\u2069"
    caplog.set_level("DEBUG")

    @flock.agent
    async def ask(context: RunContext) -> str:
        return await context.ask(text, str)

    async with open_engine(flock) as engine:
        run = await asked(engine, "ask")
        (question,) = run.questions
        assert question.question == text
        assert (await engine.get_question(run.run_id, question.call_id)).question.question == text
        await engine.answer_call(run.run_id, question.call_id, json_of(text))
        done = await engine.wait(run.run_id)
        assert done.value == {"result": text}
    assert not {"\u202e", "\u2066"} & set(caplog.text)

"""Sleeps and messages: a run waits for a time or another system as it waits for people, in the store only."""

from typing import Any

import pytest

from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict, InvalidData, RunNotFound
from flock.runs import Engine, Run, RunContext, RunStatus, new_id
from flock.steps import journal
from tests.support.engines import OpenEngine, until_run
from tests.test_ask import json_of, result_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def short_sleeps_suspend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sleeps of any length suspend their step, so that no test waits for 5 seconds."""
    monkeypatch.setattr(journal, "MIN_SUSPENDED_S", 0.0)


async def asleep(engine: Engine, run_id: str) -> Run:
    return await until_run(engine, run_id, lambda run: run.status is RunStatus.WAITING)


@pytest.mark.usefixtures("short_sleeps_suspend")
async def test_a_run_sleeps_without_a_slot_and_continues(open_engine: OpenEngine) -> None:
    flock, executed = Flock(), list[str]()

    async def look() -> str:
        executed.append("look")
        return "looked"

    @flock.agent
    async def work(context: RunContext) -> str:
        before: str = await context.call(look)
        await context.sleep(1)
        executed.append("code")
        return f"{before} and slept"

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {}, timeout_s=0.9)
        run = await asleep(engine, run.run_id)
        assert (run.questions, run.is_active) == ((), True)
        if isinstance(engine, EmbeddedEngine):
            assert engine._runner.active == {}
            assert (await engine.queue()).asking == 0
        assert await result_of(engine, run.run_id) == "looked and slept"
        calls = (await engine.get_calls(await engine.get_run(run.run_id)))[0]
        assert [(call.kind, call.name) for call in calls] == [("function", "look"), ("sleep", "sleep")]
    assert executed == ["look", "code"]


async def test_a_message_continues_a_run_that_waits_for_it(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        return [await context.receive("payment", int), await context.receive("payment", int)]

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        await asleep(engine, run.run_id)
        with pytest.raises(InvalidData) as caught:
            await engine.send_message(run.run_id, "payment", json_of("much"))
        assert [error.pointer for error in caught.value.errors] == ["/message"]
        assert (await engine.get_run(run.run_id)).status is RunStatus.WAITING
        for amount in (1, 2):
            await engine.send_message(run.run_id, "payment", json_of(amount))
        assert await result_of(engine, run.run_id) == [1, 2]
        with pytest.raises(Conflict, match="is completed, so it can no longer receive a message 'payment'"):
            await engine.send_message(run.run_id, "payment", json_of(3))
        with pytest.raises(RunNotFound):
            await engine.send_message(new_id(), "payment", json_of(3))

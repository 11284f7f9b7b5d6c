"""Agents that call other agents: each turn of a called agent is one call of the step."""

import asyncio
import functools
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from flock.core import Flock, FlockFactory
from flock.runs import RunContext, RunStatus
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine
from tests.support.models import usage_of_gpt_4o
from tests.test_calls import ended, interrupt, result_of

pytestmark = pytest.mark.anyio


async def test_a_workflow_calls_agents_at_the_same_time_and_decides(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    def research(topic: str) -> str:
        return f"about {topic}"

    @flock.agent
    async def compare(first: str, second: str) -> bool:
        return len(first) > len(second)

    @flock.agent
    async def report(topics: list[str], context: RunContext) -> str:
        found = await asyncio.gather(*(context.run_agent("research", {"topic": topic}) for topic in topics))
        texts = [each["result"] for each in found]
        longer = await context.run_agent("compare", {"first": texts[0], "second": texts[1]})
        return str(texts[0] if longer["result"] else texts[1])

    async with open_engine(flock) as engine:
        assert result_of(await ended(engine, "report", {"topics": ["tea", "coffee"]})) == "about coffee"


async def test_the_hand_offs_of_a_called_agent_are_followed(open_engine: OpenEngine) -> None:
    flock = Flock()

    def decide(result: dict[str, Any]) -> str | None:
        return None if result["kind"] == "plain" else "shout"

    @flock.agent(output="text: str, kind: Literal['plain', 'loud']", next_agent=decide)
    def sort(text: str) -> dict[str, str]:
        return {"text": text, "kind": "loud" if text.endswith("!") else "plain"}

    @flock.agent(output="text: str")
    def shout(text: str) -> dict[str, str]:
        return {"text": text.upper()}

    @flock.agent
    async def work(context: RunContext) -> list[dict[str, Any]]:
        return [await context.run_agent("sort", {"text": text}) for text in ("hello", "hello!")]

    async with open_engine(flock) as engine:
        assert result_of(await ended(engine, "work")) == [{"text": "hello", "kind": "plain"}, {"text": "HELLO!"}]


async def test_a_called_agent_whose_task_never_starts_leaves_no_coroutine(open_engine: OpenEngine) -> None:
    """Python would warn that a coroutine was never awaited."""
    flock, begun = Flock(), list[str]()

    @flock.agent
    async def research() -> None:
        begun.append("research")

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        researching = asyncio.ensure_future(context.run_agent("research", {}))
        researching.cancel()
        with warnings.catch_warnings(record=True, action="always") as caught:
            await asyncio.wait([researching])
        return [str(warning.message) for warning in caught]

    async with open_engine(flock) as engine:
        assert result_of(await ended(engine, "work")) == []
    assert begun == []


async def test_finished_agents_do_not_run_again(tmp_path: Path) -> None:
    """An agent that was interrupted runs again, and reads the calls that it had finished."""
    flock, executed, reached = Flock(), list[str](), anyio.Event()

    def note(text: str) -> str:
        executed.append(text)
        return text

    @flock.agent(next_agent="second")
    async def first(context: RunContext) -> str:
        return str(await context.call(note, "first"))

    @flock.agent
    async def second(result: str, context: RunContext) -> str:
        found = await context.call(note, "second")
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return f"{result} {found}"

    @flock.agent
    async def work(context: RunContext) -> str:
        return str((await context.run_agent("first", {}))["result"])

    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached)
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            assert result_of(await engine.wait(run_id)) == "first second"
    assert executed == ["first", "second"]


async def test_the_tokens_of_called_agents_count_once(tmp_path: Path, model: FakeModel) -> None:
    """Also after a crash, when finished calls are read; and ``max_tokens`` covers them."""
    flock, reached = Flock(model="openai/gpt-4o"), anyio.Event()
    flock.add_agent(FlockFactory.create_default_agent("ask", input="x: str", output="y: str"))

    async def nested(context: RunContext) -> int:
        return len(await context.run_agent("ask", {"x": "nested"}))

    @flock.agent
    async def work(context: RunContext) -> str:
        await context.run_agent("ask", {"x": "a"})
        await context.call(nested)
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return str((await context.run_agent("ask", {"x": "b"}))["y"])

    model.replies = [Reply({"y": str(number)}) for number in range(3)]
    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached, transport=model.transport)
    async with flock.engine(store=store, transport=model.transport, max_tokens=31) as engine:
        run = await engine.wait(run_id)
        assert (result_of(run), run.usage) == ("2", usage_of_gpt_4o(30, 15))
        assert (await engine.get_run(run_id)).usage == run.usage
    model.replies = [Reply({"y": "again"}) for _ in range(2)]
    async with flock.engine(transport=model.transport, max_tokens=30) as engine:
        run = await ended(engine, "work")
    assert run.error is not None
    assert run.error.startswith("Stopped after 30 tokens, before 'ask' called its model.")
    keys = [request.headers["idempotency-key"] for request in model.requests]
    assert len(set(keys[:3])) == 3, "each call has a key of its own"


@pytest.mark.parametrize("limits", [{"max_concurrency": 1}, pytest.param({}, marks=pytest.mark.nightly)])
async def test_a_hundred_callers_in_one_slot_do_not_deadlock(limits: dict[str, int], open_engine: OpenEngine) -> None:
    """Each agent runs once at a time, and calls the other, which calls itself."""
    flock, running, most = Flock(), Counter[str](), Counter[str]()

    async def working(name: str) -> None:
        running[name] += 1
        most[name] = max(most[name], running[name])
        await anyio.lowlevel.checkpoint()
        running[name] -= 1

    @flock.agent(max_concurrency=1)
    async def even(n: int, context: RunContext) -> int:
        await working("even")
        found = n and (await context.run_agent("odd", {"n": n - 1}))["result"] + 1
        await working("even")
        return int(found)

    @flock.agent(max_concurrency=1)
    async def odd(n: int, context: RunContext) -> int:
        await working("odd")
        calls = [context.run_agent(name, {"n": n - 1}) for name in ("even", "odd")] if n else []
        found = await asyncio.gather(*calls)
        await working("odd")
        return max((each["result"] + 1 for each in found), default=0)

    async with open_engine(flock, **limits) as engine:
        runs = [await engine.submit(("even", "odd")[number % 2], {"n": 3}) for number in range(100)]
        with anyio.fail_after(PATIENCE_S):
            assert {result_of(await engine.wait(run.run_id)) for run in runs} == {3}
    assert most == {"even": 1, "odd": 1}


async def test_a_cancelled_run_stops_the_agents_that_it_called() -> None:
    flock, running, stopped = Flock(), anyio.Event(), threading.Event()

    @flock.agent(max_concurrency=1)
    def slow(context: RunContext) -> None:
        running_in_loop()
        while not context.cancel_requested:
            time.sleep(0.001)
        stopped.set()

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.run_agent("slow", {})

    async with flock.engine() as engine:
        running_in_loop = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, running.set)
        run = await engine.submit("work", {})
        await running.wait()
        await engine.cancel_run(run.run_id)
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        assert stopped.is_set()


@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        ("reserch", {}, "There is no agent 'reserch' to call. Did you mean 'research'? Known agents: "),
        ("research", {}, "The inputs for the agent 'research' are invalid. "),
        ("research", {"topic": 1}, "The inputs for the agent 'research' are invalid. "),
        ("once", {}, "'once' may not be repeated (on_interrupt='fail'), but a step"),
        ("loop", {}, "'loop' was not called, because 5 calls are already nested, the limit (max_steps)."),
        ("lost", {}, "There is no agent 'nobody' to hand off to (lost → nobody)."),
    ],
)
async def test_an_agent_that_cannot_be_called_is_an_error(name: str, inputs: dict[str, Any], words: str) -> None:
    flock = Flock()

    @flock.agent
    def research(topic: str) -> str:
        return topic

    @flock.agent(on_interrupt="fail")
    def once() -> None: ...

    @flock.agent(next_agent="nobody")
    def lost() -> None: ...

    @flock.agent
    async def loop(context: RunContext) -> dict[str, Any]:
        return await context.run_agent("loop", {})

    @flock.agent
    async def work(context: RunContext) -> None:
        await context.run_agent(name, inputs)

    async with flock.engine(max_steps=5) as engine:
        run = await ended(engine, "work")
    assert run.status is RunStatus.FAILED
    assert run.error is not None
    assert run.error.startswith(words)


async def test_a_synchronous_agent_cannot_call_an_agent() -> None:
    flock = Flock()

    @flock.agent
    def work(context: RunContext) -> None:
        context.run_agent("work", {})  # type: ignore[unused-coroutine]

    async with flock.engine() as engine:
        run = await ended(engine, "work")
    assert run.error == "'work' is not async, so it cannot make calls. Make it async."

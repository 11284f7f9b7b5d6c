"""``context.timeout``: its time counts from the first start of the block, also while the run waits."""

import asyncio
import contextlib
import time
from typing import Any

import anyio
import msgspec
import pytest

from flock.agents.questions import TIMER
from flock.core import Flock
from flock.runs import Engine, Run, RunContext, RunStatus, now
from flock.steps import journal
from tests.support.engines import OpenEngine, continued, interrupted, until_run

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def short_timers_suspend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MIN_SUSPENDED_S", 0.0)


async def asking(engine: Engine, run: Run) -> Run:
    return await until_run(
        engine, run.run_id, lambda run: run.status is RunStatus.WAITING and run.waiting_for[0].question == "Go on?"
    )


async def ended(engine: Engine, run: Run) -> Run:
    return await until_run(engine, run.run_id, lambda run: run.completed_at is not None)


async def answered(engine: Engine, run: Run) -> Run:
    run = await asking(engine, run)
    call_id = next(each.call_id for each in run.waiting_for if each.question == "Go on?")
    await engine.answer_call(run.run_id, call_id, msgspec.Raw(b"true"))
    return await ended(engine, run)


@pytest.mark.parametrize("is_slow", [False, True])
async def test_a_block_ends_as_it_did_when_the_step_runs_again(is_slow: bool, open_engine: OpenEngine) -> None:
    flock, begun, seen = Flock(), list[str](), list[str]()

    async def work_on(name: str) -> str:
        begun.append(name)
        await anyio.sleep(3600 if is_slow else 0)
        return name

    @flock.agent
    async def work(context: RunContext) -> bool:
        try:
            async with context.timeout(0.5 if is_slow else 3600):
                seen.append(await context.call(work_on, "a") + await context.call(work_on, "b"))
        except TimeoutError:
            seen.append("timeout")
        return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("work", {}))
    assert (run.error, run.value) == (None, {"result": True})
    assert seen == ["timeout" if is_slow else "ab"] * 2
    assert begun == (["a"] if is_slow else ["a", "b"])


async def test_it_ends_the_wait_for_a_person(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> str:
        try:
            async with context.timeout(3):
                return str(await context.ask("Go on?", bool))
        except TimeoutError:
            return "nobody has answered"

    async with open_engine(flock) as engine:
        run = await asking(engine, await engine.submit("work", {}))
        assert {each.kind for each in run.waiting_for} == {msgspec.UNSET, "sleep"}
        run = await ended(engine, run)
    assert (run.error, run.value) == (None, {"result": "nobody has answered"})


@pytest.mark.parametrize("kind", ["ask", "receive"])
async def test_an_answer_or_a_message_that_is_stored_before_its_end_wins(kind: str, open_engine: OpenEngine) -> None:
    """The step gets a slot and runs again only when the time is over."""
    flock, reached, may_go = Flock(), anyio.Event(), anyio.Event()

    @flock.agent
    async def block() -> None:
        reached.set()
        await may_go.wait()

    @flock.agent
    async def work(context: RunContext) -> bool:
        async with context.timeout(8):
            return await (context.ask("Go on?", bool) if kind == "ask" else context.receive("Go-on", bool))

    async with open_engine(flock, max_concurrency=1) as engine:
        run = await engine.submit("work", {})
        run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
        await engine.submit("block", {})
        await reached.wait()
        waits = {each.question: each for each in run.waiting_for}
        expires_at = waits.pop(TIMER).expires_at
        (call_id,) = [each.call_id for each in waits.values()]
        if kind == "ask":
            await engine.answer_call(run.run_id, call_id, msgspec.Raw(b"true"))
        else:
            await engine.send_message(run.run_id, "Go-on", msgspec.Raw(b"true"))
        assert expires_at is not None
        left_s = (expires_at - now()).total_seconds()
        assert left_s > 0, "it is stored in time"
        await anyio.sleep(left_s + 0.5)
        assert (await engine.get_run(run.run_id)).completed_at is None
        may_go.set()
        run = await ended(engine, run)
    assert (run.error, run.value) == (None, {"result": True})


@pytest.mark.parametrize("kind", ["call_timeout_s", "timeout", "sleep"])
async def test_what_has_passed_once_does_not_pass_again(kind: str, open_engine: OpenEngine) -> None:
    flock, took_s = Flock(), list[float]()

    async def hang() -> None:
        await anyio.sleep_forever()

    async def wait(context: RunContext) -> None:
        if kind == "sleep":
            return await context.sleep(2)
        with contextlib.suppress(TimeoutError):
            if kind == "call_timeout_s":
                await context.call(hang, call_timeout_s=2)
            async with context.timeout(2):
                await asyncio.gather(context.call(hang, call_name="a"), context.call(hang, call_name="b"))

    @flock.agent
    async def work(context: RunContext) -> bool:
        since = time.monotonic()
        await wait(context)
        took_s.append(time.monotonic() - since)
        return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("work", {}))
    assert (run.error, run.value) == (None, {"result": True})
    assert kind == "sleep" or took_s[0] >= 2
    assert took_s[-1] < 2, "the last execution did not wait"


async def test_a_plain_time_out_does_not_count_while_a_step_is_suspended(open_engine: OpenEngine) -> None:
    """It begins again with each execution of the step."""
    flock, begun, limit_s = Flock(), list[float](), 5.0  # in which a cluster on a busy machine suspends it

    @flock.agent
    async def work(context: RunContext) -> bool:
        begun.append(time.monotonic())
        async with asyncio.timeout(limit_s):
            return await context.ask("Go on?", bool)

    async with open_engine(flock) as engine:
        run = await asking(engine, await engine.submit("work", {}))
        await anyio.sleep(begun[0] + limit_s + 0.1 - time.monotonic())  # its time would be over
        run = await answered(engine, run)
    assert (run.error, run.value) == (None, {"result": True})
    assert len(begun) == 2


async def test_its_time_counts_across_a_crash(open_again: OpenEngine) -> None:
    flock, reached, begun = Flock(), anyio.Event(), list[float]()

    async def hang() -> None:
        begun.append(time.monotonic())
        reached.set()
        await anyio.sleep_forever()

    @flock.agent
    async def work(context: RunContext) -> float:
        try:
            async with context.timeout(2):
                await context.call(hang)
        except TimeoutError:
            return time.monotonic() - begun[0]
        return 0

    run = await interrupted(open_again, flock, reached)
    await asyncio.sleep(2)
    run = await continued(open_again, flock, run)
    assert run.error is None
    assert isinstance(run.value, dict)
    assert run.value["result"] >= 2
    if len(begun) > 1:
        assert run.value["result"] - (begun[1] - begun[0]) < 2, "the time did not begin again"


async def test_code_that_makes_no_call_is_not_interrupted_for_a_timer(open_engine: OpenEngine) -> None:
    flock, begun = Flock(), list[int]()

    @flock.agent
    async def work(context: RunContext) -> str:
        begun.append(1)
        async with context.timeout(3600):
            await anyio.sleep(0.3)
        async with context.timeout(3600):
            await anyio.sleep(0.3)
        return "done"

    async with open_engine(flock) as engine:
        run = await ended(engine, await engine.submit("work", {}))
    assert (run.error, run.value, begun) == (None, {"result": "done"}, [1])


async def test_it_stops_no_other_clock() -> None:
    """Also if questions are answered in place."""
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        async with context.timeout(3600):
            await anyio.sleep_forever()

    async with flock.engine(on_question=lambda question: True) as engine:
        run = await ended(engine, await engine.submit("work", {}, timeout_s=0.5))
    assert run.error_type == "timeout"


async def test_equal_blocks_have_times_of_their_own(open_engine: OpenEngine) -> None:
    flock = Flock()

    async def hang(n: int) -> None:
        await anyio.sleep_forever()

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        found: list[Any] = []
        for n in range(3):
            try:
                async with context.timeout(0.3):
                    await context.call(hang, n)
            except TimeoutError:
                found.append(n)
        return [*found, await context.ask("Go on?", bool)]

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("work", {}))
    assert (run.error, run.value) == (None, {"result": [0, 1, 2, True]})


@pytest.mark.parametrize("seconds", [0, -1, 1e12, float("nan")])
async def test_a_time_that_is_out_of_range_is_an_error(seconds: float) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> None:
        async with context.timeout(seconds):
            pass

    async with flock.engine() as engine:
        run = await ended(engine, await engine.submit("work", {}))
    assert run.error_type == "call_error"
    assert "A time-out must be above 0" in (run.error or "")

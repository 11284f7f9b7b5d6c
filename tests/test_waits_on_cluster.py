"""Questions and messages of steps that still run on a cluster, and workers that were replaced."""

import asyncio
import contextlib

import anyio
import pytest

from flock.core import Flock
from flock.errors import Conflict, InvalidData
from flock.runs import BatchOptions, RunContext
from flock.temporal import steps
from tests.support.cluster import on_temporal
from tests.support.engines import until, until_run
from tests.test_ask import json_of, result_of
from tests.test_sleep_and_messages import Beside, send

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", ["run", "item"])
async def test_what_comes_is_delivered_to_a_step_that_still_runs(kind: str, temporal_address: str) -> None:
    """A wait that has ended is not open any more, and what is delivered is in the journal."""
    beside = Beside()
    async with on_temporal(temporal_address, beside.flock) as engine:
        if kind == "run":
            run_id = (await engine.submit("work", {})).run_id
        else:
            batch = await engine.submit_batch("work", [{}], BatchOptions())
            (item,) = await engine.get_items(batch.batch_id)
            run_id = item.run_id
        await until(lambda: 9 in beside.executed)
        run = await until_run(engine, run_id, lambda run: len(run.waiting_for) == 2)
        assert run.status.is_active
        question, payment = sorted(run.waiting_for, key=lambda wait: wait.is_question, reverse=True)
        await engine.answer_call(run_id, question.call_id, json_of(True))
        await until(lambda: True in beside.executed)
        assert await engine.answer_call(run_id, question.call_id, json_of(True))
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await engine.answer_call(run_id, question.call_id, json_of(False))
        with pytest.raises(InvalidData):
            await send(engine, run_id, "one")
        assert (await engine.get_run(run_id)).waiting_for == (payment,)
        await send(engine, run_id, 5)
        await until(lambda: 5 in beside.executed)
        assert (await engine.get_run(run_id)).waiting_for == ()
        beside.may_end.set()
        assert await result_of(engine, run_id) == 4
        calls = (await engine.get_calls(await engine.get_run(run_id)))[0]
        assert sorted(call.kind for call in calls) == ["function", "message", "message", "question"]


async def test_a_message_is_not_given_to_a_wait_that_was_cancelled(temporal_address: str) -> None:
    """Also if the step still runs. The next wait for it gets it."""
    flock, cancelled, may_go = Flock(), anyio.Event(), anyio.Event()

    async def slow() -> None:
        await may_go.wait()

    @flock.agent
    async def work(context: RunContext) -> int:
        call = asyncio.create_task(context.call(slow))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                await context.receive("payment", int)
        cancelled.set()
        await call
        return await context.receive("payment", int, expires_s=600)

    async with on_temporal(temporal_address, flock) as engine:
        run_id = (await engine.submit("work", {})).run_id
        await cancelled.wait()
        await send(engine, run_id, 5)
        await asyncio.sleep(steps.POLL_WAITS_S)
        assert (await engine.get_run(run_id)).waiting_for == ()
        may_go.set()
        assert await result_of(engine, run_id) == 5

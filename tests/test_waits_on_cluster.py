"""Questions and messages of steps that still run on a cluster, and workers that were replaced."""

import asyncio
import contextlib
import runpy
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from temporalio.client import WorkflowHistoryEventAsyncIterator
from temporalio.service import RPCError, RPCStatusCode

from flock.core import Flock
from flock.errors import AgentError, Conflict, InvalidData, Replayed, TooManyRequests
from flock.runs import BatchOptions, Call, IdempotencyKey, RunContext, RunStatus, new_id, now
from flock.steps import answers, replay
from flock.temporal import TemporalEngine, batchflows, calls, steps
from flock.temporal.calls import Calls, Fence
from flock.temporal.messages import (
    Begun,
    CallDone,
    Execution,
    batch_workflow_id,
    chunk_workflow_id,
    run_workflow_id,
)
from flock.temporal.workflows import FlockRun
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal, patient
from tests.support.engines import ended, until, until_run
from tests.test_ask import json_of, result_of
from tests.test_sleep_and_messages import Beside, send
from tests.test_temporal import working

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


@pytest.mark.parametrize("max_events", [batchflows.MAX_EVENTS, 40])
async def test_messages_to_items_that_have_not_started_are_kept(
    max_events: int, monkeypatch: pytest.MonkeyPatch, temporal_address: str
) -> None:
    """Their chunk is started with them, also by a batch that has continued in a new history."""
    monkeypatch.setattr(batchflows, "MAX_EVENTS", max_events)
    monkeypatch.setattr(answers, "MAX_MESSAGES", 3)
    flock, has_begun, may_go = Flock(), anyio.Event(), anyio.Event()

    @flock.agent
    async def work(n: int, context: RunContext) -> list[int]:
        has_begun.set()
        await may_go.wait()
        return [await context.receive("payment", int) for _ in range(2)] if n in (1, 45) else []

    async with on_temporal(temporal_address, flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(60)], BatchOptions(max_workers=1))
        items = await engine.get_items(batch.batch_id)
        await has_begun.wait()
        for n in (1, 45):  # one whose chunk has started
            run_id, key = items[n].run_id, IdempotencyKey(f"first {n}", b"same")
            await engine.send_message(run_id, "payment", json_of(n), key)
            with pytest.raises(Replayed):
                await engine.send_message(run_id, "payment", json_of(n), key)
            for message in ("none", n + 1):
                await send(engine, run_id, message)
            with pytest.raises(TooManyRequests, match="3 messages are kept for the run"):
                await send(engine, run_id, n + 2)
        await send(engine, items[46].run_id, "x" * 900_000)
        with pytest.raises(TooManyRequests, match="for items of the batch"):
            await send(engine, items[47].run_id, "x" * 900_000)
        may_go.set()
        batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items) == (RunStatus.COMPLETED, 0)
        for n in (1, 45):
            assert await result_of(engine, items[n].run_id) == [n, n + 1]
            calls = (await engine.get_calls(await engine.get_run(items[n].run_id)))[0]
            assert sorted(call.error is None for call in calls) == [False, True, True]
        with pytest.raises(Conflict, match="can no longer receive a message"):
            await send(engine, items[45].run_id, 1)
        assert isinstance(engine, TemporalEngine)
        history = await engine.cluster.history_of(batch_workflow_id(batch.batch_id, 1))
        continued = history[0].workflow_execution_started_event_attributes.continued_execution_run_id
        assert bool(continued) is (max_events == 40)


async def test_a_message_that_is_sent_again_after_a_retry_is_received_once(temporal_address: str) -> None:
    flock = Flock()

    async def fail() -> None:
        raise AgentError("not yet")

    @flock.agent
    async def work(context: RunContext) -> int:
        amount = await context.receive("payment", int)
        if context.attempt == 1:
            await context.call(fail)
        return amount + await context.receive("payment", int)

    key = IdempotencyKey("payment 1", b"same")
    async with on_temporal(temporal_address, flock) as engine:
        run_id = (await engine.submit("work", {})).run_id
        await engine.send_message(run_id, "payment", json_of(1), key)
        await until_run(engine, run_id, lambda run: run.status is RunStatus.FAILED)
        await engine.retry_run(run_id)
        with pytest.raises(Replayed):
            await engine.send_message(run_id, "payment", json_of(1), key)
        await send(engine, run_id, 10)
        assert await result_of(engine, run_id) == 11


# Workers that were replaced

REPLACED = """
import asyncio, os, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock = Flock({name!r})
log = pathlib.Path({log!r})

def early() -> int:
    return os.getpid()

async def late() -> int:
    with log.open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    while not log.with_name(f"{{os.getpid()}}").exists():
        await asyncio.sleep(0.02)
    return os.getpid()

@flock.agent
async def work(context: RunContext) -> list[int]:
    return [await context.call(early), await context.call(late)]
"""


@pytest.mark.parametrize("kind", ["run", "item"])
async def test_what_a_worker_reports_after_the_next_one_has_begun_does_not_count(
    kind: str, temporal_address: str, tmp_path: Path
) -> None:
    """The first worker seems to be dead. What it had reported before counts."""
    target, log, pids = tmp_path / "replaced.py", tmp_path / "log", list[int]()
    target.write_text(REPLACED.format(name=new_id(), log=str(log)))
    log.touch()
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        if kind == "run":
            run_id = (await engine.submit("work", {})).run_id
            workflow_id = run_workflow_id(run_id, 1)
        else:
            batch = await engine.submit_batch("work", [{}], BatchOptions())
            (item,) = await engine.get_items(batch.batch_id)
            run_id, workflow_id = item.run_id, chunk_workflow_id(batch.batch_id, 0, 1)
        for number in range(3):
            with working(target, temporal_address) as worker:
                await until(lambda: len(log.read_text().split()) > number)  # noqa: B023 - awaited here
                pids.append(worker.pid)
                if number == 1:
                    (early,) = (await engine.get_calls(await engine.get_run(run_id)))[0]
                    call_id = early.call_id.replace("early", "late")
                    late = Call(call_id=call_id, name="late", result=json_of(0), started_at=now(), completed_at=now())
                    report = CallDone(step=0, call=late, by=Execution(0, 1, 1, early.started_at))
                    await engine.cluster.handle(workflow_id).signal(FlockRun.call_done, report)
                if number == 2:
                    (tmp_path / str(worker.pid)).touch()
                    assert await result_of(engine, run_id) == [pids[0], pids[2]]
                worker.kill()
                worker.wait()
        calls = (await engine.get_calls(await engine.get_run(run_id)))[0]
    assert [(call.name, bytes(call.result)) for call in calls] == [
        ("early", str(pids[0]).encode()),
        ("late", str(pids[2]).encode()),
    ]


def test_a_later_execution_is_one_of_a_later_generation_activity_or_attempt() -> None:
    def admitted(generation: int, activity: int, attempt: int, minutes: int = 0, item: int = 0) -> bool:
        by = Execution(generation, activity, attempt, at + timedelta(minutes=minutes))
        return fence.admits(Begun(item=item, by=by))

    fence, at = Fence(1), now()
    assert not admitted(0, 7, 2)
    assert admitted(1, 2, 3, minutes=3)
    assert not admitted(1, 2, 2, minutes=2)
    assert not admitted(1, 1, 4, minutes=4)
    assert admitted(1, 1, 1, item=1)
    assert fence.admits(Begun())
    assert admitted(1, 2, 1, minutes=5)  # the attempts were reset
    assert admitted(1, 2, 2, minutes=4)  # the clock has jumped back
    assert admitted(1, 3, 1)
    assert not admitted(1, 2, 2, minutes=4)


def test_a_chunk_that_continues_as_new_keeps_its_calls() -> None:
    """Also if the end of one, which has the position of its start, was reported by a later execution than the next."""

    def done(name: str, attempt: int, once: str | None = None) -> CallDone:
        call = Call(call_id=name, name=name, once=once, started_at=at, completed_at=at)
        return CallDone(step=0, call=call, by=Execution(0, 1, attempt, at + timedelta(minutes=attempt)))

    at = now()
    calls = Calls([done("a", 1, "started"), done("b", 1), done("a", 2, "ended")])
    kept = Calls(calls.all(), generation=1).of_step(0, 0)
    assert [(call.name, call.once) for call in kept] == [("a", "ended"), ("b", None)]


# Many calls


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.nightly)])
async def test_a_step_may_make_thousands_of_calls_at_once(
    count: int, monkeypatch: pytest.MonkeyPatch, temporal_address: str
) -> None:
    """What the cluster stores with one call, and what it returns at once, is bounded."""
    monkeypatch.setattr(replay, "MAX_MARK_BYTES", 2_000_000 // count)
    monkeypatch.setattr(calls, "MAX_PAGE_BYTES", 20_000_000 // count)
    flock, executed = Flock(), list[int]()

    async def inner(n: int) -> int:
        executed.append(n)
        return n

    async def outer(n: int, context: RunContext) -> int:
        found: int = await context.call(inner, n)
        return found

    @flock.agent
    async def work(context: RunContext) -> int:
        numbers = await asyncio.gather(*(context.call(outer, n) for n in range(count)))
        await context.ask("Go on?", bool)
        return sum(numbers)

    async with on_temporal(temporal_address, flock) as engine:
        run_id = (await engine.submit("work", {})).run_id
        run = await engine.wait(run_id, 2 * PATIENCE_S)
        await engine.answer_call(run_id, run.waiting_for[0].call_id, json_of(True))
        assert await result_of(engine, run_id) == sum(range(count))
    assert sorted(executed) == list(range(count))


async def test_a_client_waits_on_if_the_cluster_changes_the_history_that_it_reads(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then refuses the token of the next page, such as while another worker takes over."""
    flock, goes_on = Flock(), anyio.Event()

    @flock.agent
    async def work() -> str:
        await goes_on.wait()
        return "done"

    fetch, refused = WorkflowHistoryEventAsyncIterator.fetch_next_page, 0

    async def refuse_the_second(self: WorkflowHistoryEventAsyncIterator, **options: Any) -> None:
        nonlocal refused
        if self.next_page_token and not refused:
            refused += 1
            goes_on.set()
            raise RPCError("Current and request branch tokens don't match.", RPCStatusCode.INVALID_ARGUMENT, b"")
        await fetch(self, **options)

    async with on_temporal(temporal_address, flock) as engine:
        run = await engine.submit("work", {})
        monkeypatch.setattr(WorkflowHistoryEventAsyncIterator, "fetch_next_page", refuse_the_second)
        assert (await engine.wait(run.run_id, PATIENCE_S)).status is RunStatus.COMPLETED
    assert refused == 1

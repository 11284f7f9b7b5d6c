"""Questions to a person on a cluster: killed workers, no worker, long histories, and the lanes of batches."""

import asyncio
import functools
import runpy
import time
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from temporalio.api.enums.v1 import EventType

from flock.core import Flock, FlockFactory
from flock.errors import CallError, Conflict, EngineFull, RunNotFound, TooLarge
from flock.runs import (
    AskedQuestion,
    BatchOptions,
    Engine,
    Principal,
    QuestionFilter,
    Run,
    RunContext,
    RunStatus,
    new_id,
)
from flock.temporal import TemporalEngine, batchflows, items
from flock.temporal.engine import MAX_INPUT_BYTES
from flock.temporal.messages import MAX_INBOX_BYTES, chunk_workflow_id, run_workflow_id
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal, patient
from tests.support.engines import OpenEngine, ended, until, until_run
from tests.support.models import usage_of_gpt_4o
from tests.test_ask import Refunds, asked, json_of, result_of, waiting
from tests.test_temporal import working

pytestmark = pytest.mark.anyio

ASKING = """
import asyncio, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock = Flock({name!r})

def note(word: str) -> str:
    with open({log!r}, "a") as log:
        log.write(word + "\\n")
    return word

async def pay() -> str:
    note("pay")
    await asyncio.sleep(60 if pathlib.Path({log!r} + ".slow").exists() else 0)
    return "paid"

@flock.agent
async def refund(context: RunContext) -> str:
    await context.call(note, "look")
    return await context.call(pay) if await context.ask("Refund?", bool) else "refused"
"""


@pytest.fixture
def one_lane(monkeypatch: pytest.MonkeyPatch, temporal_address: str) -> OpenEngine:
    """Open an engine whose worker returns items after a short time."""
    monkeypatch.setattr(items, "SLICE_S", 0.2)
    return lambda flock, **options: on_temporal(temporal_address, flock, **options)


@pytest.mark.parametrize("kind", ["run", "item"])
async def test_kill_9_of_workers_loses_neither_a_question_nor_an_answer(
    kind: str, temporal_address: str, tmp_path: Path
) -> None:
    """The answer is given while there is no worker. The next worker is killed in the call after it."""
    target, log = tmp_path / "asking.py", tmp_path / "log"
    target.write_text(ASKING.format(name=new_id(), log=str(log)))
    slow = tmp_path / "log.slow"
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        with working(target, temporal_address) as doomed:
            if kind == "run":
                run = await asked(engine, "refund")
            else:
                batch = await engine.submit_batch("refund", [{}], BatchOptions())
                with anyio.fail_after(PATIENCE_S):
                    while not (found := await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
                        await anyio.sleep(0.05)
                run = await waiting(engine, found[0].run_id)
                with anyio.fail_after(PATIENCE_S):
                    while (await engine.get_batch(batch.batch_id)).waiting_items != 1:  # noqa: ASYNC110
                        await anyio.sleep(0.05)
            doomed.kill()
            doomed.wait()
        call_id = run.waiting_for[0].call_id
        assert (await engine.get_run(run.run_id)).waiting_for == run.waiting_for
        for _ in range(2):
            answered = await engine.answer_call(run.run_id, call_id, json_of(True))
            assert (answered.status, answered.waiting_for) == (RunStatus.STARTING, ())
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await engine.answer_call(run.run_id, call_id, json_of(False))
        slow.touch()
        with working(target, temporal_address) as doomed:
            await until(lambda: "pay" in log.read_text())
            doomed.kill()
            doomed.wait()
        slow.unlink()
        with working(target, temporal_address):
            assert await result_of(engine, run.run_id) == "paid"
        assert (await engine.answer_call(run.run_id, call_id, json_of(True))).status is RunStatus.COMPLETED
    assert log.read_text().split() == ["look", "pay", "pay"]


BESIDE = """
import asyncio, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock, log = Flock({name!r}), pathlib.Path({log!r})

async def slow() -> None:
    while not log.with_suffix(".end").exists():
        await asyncio.sleep(0.02)

@flock.agent
async def refund(context: RunContext) -> bool:
    with log.open("a") as file:
        file.write("begun\\n")
    amount = 40 + len(log.read_text().split())
    is_allowed, _ = await asyncio.gather(context.ask(f"Refund {{amount}}?", bool, name="pay"), context.call(slow))
    return is_allowed
"""


@pytest.mark.parametrize("kind", ["run", "item"])
async def test_a_question_keeps_its_id_and_text_if_its_worker_is_killed_while_its_step_runs(
    kind: str, temporal_address: str, tmp_path: Path
) -> None:
    target, log = tmp_path / "beside.py", tmp_path / "log"
    target.write_text(BESIDE.format(name=new_id(), log=str(log)))
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        if kind == "run":
            run_id = (await engine.submit("refund", {})).run_id
        else:
            batch = await engine.submit_batch("refund", [{}], BatchOptions())
            (item,) = await engine.get_items(batch.batch_id)
            run_id = item.run_id
        with working(target, temporal_address) as doomed:
            run = await until_run(engine, run_id, lambda run: bool(run.questions))
            doomed.kill()
            doomed.wait()
        (first,) = run.questions
        assert (run.status.is_active, first.question) == (True, "Refund 41?")
        with working(target, temporal_address):
            await until(lambda: len(log.read_text().split()) == 2)
            log.with_suffix(".end").touch()
            run = await until_run(engine, run_id, lambda run: run.status is RunStatus.WAITING)
            assert run.questions == (first,)
            await engine.answer_call(run_id, first.call_id, json_of(True))
            assert await result_of(engine, run_id) is True


async def until_listed(engine: Engine, wanted: QuestionFilter, count: int) -> list[AskedQuestion]:
    """Return the open questions when there are *count* of them. The search of the cluster lags."""
    with anyio.fail_after(PATIENCE_S):
        while len(found := await engine.list_questions(wanted)) != count:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    return found


BOB, EVE = Principal(name="bob", roles=["refunds"]), Principal(name="eve", roles=["other"])


async def test_open_questions_of_runs_and_items_are_listed_and_no_run_is_read(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a chunk that has no question for the caller. The history of a run is read if its question is long."""
    flock, read = Flock("inbox"), list[str]()

    @flock.agent
    async def ask(n: int, context: RunContext) -> list[Any]:
        text = "?" * (MAX_INBOX_BYTES if n == 9 else 1)
        asks = [context.ask(f"{n}{text}", bool, answerer="refunds", expires_s=600) for _ in range(1 if n else 2)]
        sleeps = [context.sleep(600)] if n == 3 else []
        return list(await asyncio.gather(*asks, *sleeps))[: len(asks)]

    async with on_temporal(temporal_address, flock) as engine:
        assert isinstance(engine, TemporalEngine)
        history_of = engine.cluster.history_of

        async def noted(workflow_id: str, *args: Any, **options: Any) -> Any:
            read.append(workflow_id.split(":")[0])
            return await history_of(workflow_id, *args, **options)

        runs = [await engine.submit("ask", {"n": n}, principal="ann", session_id="s") for n in range(2)]
        batch = await engine.submit_batch(
            "ask", [{"n": n} for n in range(2, 26) if n != 9], BatchOptions(max_workers=30), principal="ann"
        )
        with anyio.fail_after(PATIENCE_S):
            while (await engine.get_batch(batch.batch_id)).waiting_items < 23:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        monkeypatch.setattr(engine.cluster, "history_of", noted)
        everything = await until_listed(engine, QuestionFilter(by=BOB), 26)
        items = await engine.get_items(batch.batch_id)
        assert [each.run_id for each in everything] == [
            *(item.run_id for item in reversed(items)),
            runs[1].run_id,
            runs[0].run_id,
            runs[0].run_id,
        ]
        first, last = everything[0], everything[-1]
        assert (first.agent_name, first.principal, first.status) == ("ask", "ann", "open")
        assert (last.session_id, last.question.answerer) == ("s", "refunds")
        assert last.question in (await engine.get_run(runs[0].run_id)).questions
        pages, page = list[list[AskedQuestion]](), await engine.list_questions(QuestionFilter(by=BOB, limit=7))
        while page:
            pages.append(page)
            page = await engine.list_questions(QuestionFilter(by=BOB, limit=7, after=page[-1].run_id))
        assert [len(page) for page in pages] == [7, 7, 7, 5]
        assert [each for page in pages for each in page] == everything
        read.clear()
        assert await engine.list_questions(QuestionFilter(by=EVE)) == []
        assert await engine.list_questions(QuestionFilter(by=BOB, role="other")) == []
        assert read == []
        assert len(await engine.list_questions(QuestionFilter(by=BOB, session_id="s"))) == 3
        assert read == []
        long = await engine.submit("ask", {"n": 9}, principal="ann", session_id="long")
        (listed,) = await until_listed(engine, QuestionFilter(by=BOB, session_id="long"), 1)
        assert listed.question.question == "9" + "?" * MAX_INBOX_BYTES
        assert read
        await engine.answer_call(items[0].run_id, items[0].waiting_for[0].call_id, json_of(True), BOB)
        await engine.cancel_run(long.run_id)
        await until_listed(engine, QuestionFilter(by=BOB), 25)
        await engine.cancel_batch(batch.batch_id)
        await until_listed(engine, QuestionFilter(by=BOB), 3)


async def test_an_error_about_a_question_takes_as_long_for_a_run_of_others_as_for_none(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flock.temporal.engine.SAME_S", 1.0)
    async with on_temporal(temporal_address, Refunds().flock) as engine:
        run = await asked(engine, "refund", {"order": "A7"}, principal="ann")
        call_id = run.waiting_for[0].call_id
        for run_id, asks_for in ((run.run_id, call_id), (run.run_id, f"{call_id[:-1]}_"), (new_id(), call_id)):
            answer = functools.partial(engine.answer_call, output=json_of(1))
            for request in (engine.get_question, answer):
                since = time.monotonic()
                with pytest.raises(RunNotFound):
                    await request(run_id, asks_for, by=EVE)
                assert time.monotonic() - since >= 1
        assert (await engine.get_question(run.run_id, call_id, Principal(name="ann"))).status == "open"
        await engine.cancel_run(run.run_id)


async def test_a_waiting_run_is_cancelled_when_there_is_a_worker_again(temporal_address: str, tmp_path: Path) -> None:
    target = tmp_path / "asking.py"
    target.write_text(ASKING.format(name=new_id(), log=str(tmp_path / "log")))
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        with working(target, temporal_address):
            run = await asked(engine, "refund")
        assert (await engine.cancel_run(run.run_id)).cancel_requested
        with working(target, temporal_address):
            run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
    assert run.status is RunStatus.CANCELLED


async def test_a_worker_killed_after_an_answer_is_noticed_by_an_agent_that_may_not_be_repeated(
    temporal_address: str, tmp_path: Path
) -> None:
    target, log = tmp_path / "asking.py", tmp_path / "log"
    script = ASKING.format(name=new_id(), log=str(log)).replace("@flock.agent\n", '@flock.agent(on_interrupt="fail")\n')
    target.write_text(script)
    (tmp_path / "log.slow").touch()
    flock: Flock = runpy.run_path(str(target))["flock"]
    async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
        with working(target, temporal_address) as doomed:
            run = await asked(engine, "refund")
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
            await until(lambda: "pay" in log.read_text())
            doomed.kill()
            doomed.wait()
        with working(target, temporal_address):
            run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
    assert (run.status, run.error_type) == (RunStatus.FAILED, "interrupted")


async def test_a_run_that_does_not_ask_has_the_same_history_as_before(temporal_address: str) -> None:
    flock = Flock("plain")

    @flock.agent
    async def work(context: RunContext) -> str:
        return "done"

    async with on_temporal(temporal_address, flock) as engine:
        assert isinstance(engine, TemporalEngine)
        run = await engine.wait((await engine.submit("work", {})).run_id)
        history = await engine.cluster.history_of(run_workflow_id(run.run_id, 1))
    assert [EventType.Name(event.event_type).removeprefix("EVENT_TYPE_") for event in history] == [
        "WORKFLOW_EXECUTION_STARTED",
        *(task := ["WORKFLOW_TASK_SCHEDULED", "WORKFLOW_TASK_STARTED", "WORKFLOW_TASK_COMPLETED"]),
        *("ACTIVITY_TASK_SCHEDULED", "ACTIVITY_TASK_STARTED", "ACTIVITY_TASK_COMPLETED"),
        *task,
        "WORKFLOW_EXECUTION_COMPLETED",
    ]


async def test_waiting_runs_do_not_count_for_the_queue(temporal_address: str) -> None:
    async with on_temporal(temporal_address, Refunds().flock, max_queue=1) as engine:
        await asked(engine, "refund", {"order": "A7"})
        with anyio.fail_after(PATIENCE_S):
            while True:
                try:
                    second = await engine.submit("refund", {"order": "A8"})
                    break
                except EngineFull:  # the search of the cluster lags
                    await anyio.sleep(0.1)
        await waiting(engine, second.run_id)


async def test_an_answer_or_a_question_that_the_cluster_cannot_store_is_refused(temporal_address: str) -> None:
    flock = Flock("long")

    @flock.agent
    async def work(long: bool, context: RunContext) -> str:
        return await context.ask("?" * (1_600_000 if long else 1), str)

    async with on_temporal(temporal_address, flock) as engine:
        run = await asked(engine, "work", {"long": False})
        with pytest.raises(TooLarge, match="may have up to 1000000 bytes"):
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of("x" * MAX_INPUT_BYTES))
        failed = await engine.wait((await engine.submit("work", {"long": True})).run_id)
        assert (failed.status, failed.error_type) == (RunStatus.FAILED, CallError("").error_type)
        await engine.cancel_run(run.run_id)


async def test_an_answered_item_gets_the_only_lane_before_the_other_items_have_ended(one_lane: OpenEngine) -> None:
    """It is in another chunk than the items that run, which gives its lane away and gets it back."""
    flock, ended_items, at_work, most = Flock("lanes"), list[int](), 0, 0

    @flock.agent
    async def work(n: int, context: RunContext) -> int:
        nonlocal at_work, most
        if n == 0:
            await context.ask("Go on?", bool)
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0.1)
        at_work -= 1
        ended_items.append(n)
        return n

    async with one_lane(flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(60)], BatchOptions(max_workers=1))
        await until(lambda: 20 in ended_items)  # in the second chunk
        (item,) = await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])
        await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(True))
        batch = await ended(engine, batch)
    assert (batch.completed_items, batch.failed_items, most) == (60, 0, 1)
    assert ended_items.index(0) < ended_items.index(59)
    assert sorted(ended_items) == list(range(60))


@pytest.mark.parametrize("factor", [1, pytest.param(100, marks=pytest.mark.nightly)])
async def test_waiting_items_of_two_chunks_keep_their_answers_in_new_histories(
    factor: int, monkeypatch: pytest.MonkeyPatch, temporal_address: str
) -> None:
    """Chunks continue as new while their items wait. In a batch with a long history, they keep their lanes."""
    monkeypatch.setattr(batchflows, "MAX_EVENTS", 40)
    monkeypatch.setattr(batchflows, "IDLE_FACTOR", factor)
    flock = Flock("histories")

    @flock.agent
    async def work(n: int, context: RunContext) -> str:
        return f"{n} {await context.ask('First?', int)} {await context.ask('Second?', int)}"

    async with on_temporal(temporal_address, flock) as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in range(22)], BatchOptions(max_workers=2))
        for question in ("First?", "Second?"):
            with anyio.fail_after(PATIENCE_S):
                while (await engine.get_batch(batch.batch_id)).waiting_items < 22:  # noqa: ASYNC110
                    await anyio.sleep(0.1)
            found = await engine.get_items(batch.batch_id)
            assert {item.waiting_for[0].question for item in found} == {question}
            for item in found:
                await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(item.position or 0))
            if question == "First?":
                await _all_ask_again(engine, batch.batch_id)
        batch = await ended(engine, batch)
        found = await engine.get_items(batch.batch_id)
        assert isinstance(engine, TemporalEngine)
        history = await engine.cluster.history_of(chunk_workflow_id(batch.batch_id, 0, 1))
    assert history[0].workflow_execution_started_event_attributes.continued_execution_run_id
    assert [(item.status, item.result) for item in found] == [
        (RunStatus.COMPLETED, json_of({"result": f"{n} {n} {n}"})) for n in range(22)
    ]


async def test_a_waiting_item_is_cancelled_when_max_cost_is_spent_while_others_still_run(
    temporal_address: str, model: FakeModel
) -> None:
    """It is cancelled when its chunk is stopped, so that it can no longer expire or be answered."""
    flock, may_spend, may_end = Flock("costs", model="openai/gpt-4o"), asyncio.Event(), asyncio.Event()
    flock.add_agent(FlockFactory.create_default_agent("measure", "", None, "text: str", "length: int"))

    @flock.agent
    async def work(n: int, context: RunContext) -> int:
        if n == 2:
            await may_end.wait()
            return 0
        if n == 1:
            await may_spend.wait()
        await context.run_agent("measure", {"text": "a"})
        return await context.ask("How long?", int) if n == 0 else n

    model.replies = [Reply({"length": 1})] * 2
    async with on_temporal(temporal_address, flock, transport=model.transport) as engine:
        options = BatchOptions(max_workers=3, max_cost=2 * 0.000075)
        batch = await engine.submit_batch("work", [{"n": n} for n in range(3)], options)
        with anyio.fail_after(PATIENCE_S):
            while not (found := await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        (item,) = found
        may_spend.set()
        item = await until_run(engine, item.run_id, lambda run: run.status.is_final)
        assert (item.status, item.error_type, item.usage) == (
            RunStatus.CANCELLED,
            "cost_limit",
            usage_of_gpt_4o(10, 5),
        )
        with pytest.raises(Conflict, match="can no longer be answered"):
            await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(1))
        may_end.set()
        batch = await ended(engine, batch)
        found = await engine.get_items(batch.batch_id)
    assert (batch.error_type, batch.cancelled_items, batch.usage) == ("cost_limit", 1, usage_of_gpt_4o(20, 10))
    assert [item.status for item in found] == [RunStatus.CANCELLED, RunStatus.COMPLETED, RunStatus.COMPLETED]
    assert found[0].error_type == "cost_limit"


async def _all_ask_again(engine: Any, batch_id: str) -> None:
    def asks_again(item: Run) -> bool:
        return bool(item.waiting_for) and item.waiting_for[0].question == "Second?"

    with anyio.fail_after(PATIENCE_S):
        while not all(map(asks_again, await engine.get_items(batch_id))):  # noqa: ASYNC110
            await anyio.sleep(0.1)


async def test_the_same_question_in_each_of_several_steps_is_asked_each_time(temporal_address: str) -> None:
    flock = Flock("steps")

    @flock.agent(next_agent="second")
    async def first(context: RunContext) -> int:
        return await context.ask("How many?", int)

    @flock.agent
    async def second(result: int, context: RunContext) -> list[int]:
        await anyio.sleep(0.3)
        return [result, await context.ask("How many?", int)]

    async with on_temporal(temporal_address, flock) as engine:
        run = await asked(engine, "first", timeout_s=5)
        for number in (1, 2):
            await anyio.sleep(2.6)
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(number))
            run = await engine.wait(run.run_id)
        assert run.result is not None, run.error
        assert msgspec.json.decode(run.result) == {"result": [1, 2]}
        assert [len(calls) for calls in (await engine.get_calls(run)).values()] == [1, 1]

"""Who may answer a question, and that an answer belongs to what was asked."""

import json
from typing import Any

import anyio
import pytest

from flock.agents.tools import Tool
from flock.core import Flock
from flock.errors import CallNotFound, Conflict, StaleAnswer
from flock.runs import BatchOptions, Engine, Run, RunContext, RunStatus
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, ended, until_run
from tests.test_approval import Till
from tests.test_ask import asked, json_of, result_of, waiting
from tests.test_tools import flock_of

pytestmark = pytest.mark.anyio

APPROVED = json_of({"approved": True})
DONE = Reply({"a": "done"})


def refund(amount: float) -> Reply:
    return Reply(calls=[("refund", {"amount": amount})])


def shop(till: Till, **approval: Any) -> Flock:
    return flock_of(Tool(till.refund, needs_approval=True, **approval))


async def cancelled(engine: Engine, run_id: str) -> None:
    await engine.cancel_run(run_id)
    await until_run(engine, run_id, lambda run: run.status is RunStatus.CANCELLED)


async def again(engine: Engine, run: Run, **options: Any) -> Run:
    """Cancel and retry a run, and return it when it asks again."""
    await cancelled(engine, run.run_id)
    await engine.retry_run(run.run_id, **options)
    return await waiting(engine, run.run_id)


def open_ids(exc: pytest.ExceptionInfo[StaleAnswer]) -> list[str]:
    return [question.call_id for question in exc.value.open_questions]


# An answer belongs to what was asked


async def test_an_approval_of_an_old_page_does_not_pay_what_a_retry_asks_for(
    model: FakeModel, open_engine: OpenEngine
) -> None:
    till = Till()
    model.replies = [refund(40), refund(8000), DONE]
    async with open_engine(shop(till), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        (old,) = run.waiting_for
        run = await again(engine, run, calls="again")
        (new,) = run.waiting_for
        assert json.loads(bytes(new.arguments)) == {"amount": 8000}  # type: ignore[arg-type]
        for output in (APPROVED, json_of({"approved": False})):
            with pytest.raises(StaleAnswer, match="no longer asks the question") as caught:
                await engine.answer_call(run.run_id, old.call_id, output)
            assert open_ids(caught) == [new.call_id]
        assert till.paid == []
        await engine.answer_call(run.run_id, new.call_id, APPROVED)
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert till.paid == [8000]
        await engine.answer_call(run.run_id, new.call_id, APPROVED)
        with pytest.raises(StaleAnswer, match="It asks nothing now"):
            await engine.answer_call(run.run_id, old.call_id, APPROVED)
        with pytest.raises(CallNotFound):
            await engine.answer_call(run.run_id, old.call_id[:-1] + "x", APPROVED)


@pytest.mark.parametrize("calls", ["keep", "again"])
async def test_an_equal_question_of_a_retry_has_another_id(
    calls: Any, model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [refund(40)] * (1 if calls == "keep" else 2)
    async with open_engine(shop(Till()), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        (old,) = run.waiting_for
        run = await again(engine, run, calls=calls)
        (new,) = run.waiting_for
        assert (new.question, new.arguments) == (old.question, old.arguments)
        assert new.call_id != old.call_id
        with pytest.raises(StaleAnswer) as caught:
            await engine.answer_call(run.run_id, old.call_id, APPROVED)
        assert open_ids(caught) == [new.call_id]
        await cancelled(engine, run.run_id)


async def test_a_question_that_a_retry_keeps_has_its_id_and_its_answer(open_engine: OpenEngine) -> None:
    flock, failures = Flock(), [True]

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        first = await context.ask("First?", int)
        if failures:
            failures.pop()
            raise ValueError
        return [first, await context.ask("Second?", int)]

    async with open_engine(flock) as engine:
        run = await asked(engine, "work")
        (first,) = run.waiting_for
        await engine.answer_call(run.run_id, first.call_id, json_of(1))
        assert (await engine.wait(run.run_id)).status is RunStatus.FAILED
        await engine.retry_run(run.run_id)
        run = await waiting(engine, run.run_id)
        await engine.answer_call(run.run_id, first.call_id, json_of(1))
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await engine.answer_call(run.run_id, first.call_id, json_of(2))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(2))
        assert await result_of(engine, run.run_id) == [1, 2]
        calls = [call for call in (await engine.get_calls(run))[0] if call.kind == "question"]
    assert [call.call_id for call in calls] == [first.call_id, run.waiting_for[0].call_id]


async def test_a_question_keeps_what_it_asked_first_and_its_id_while_its_step_runs_again(
    open_engine: OpenEngine,
) -> None:
    flock, amounts = Flock(), iter(range(40, 50))

    @flock.agent
    async def work(context: RunContext) -> list[bool]:
        async with anyio.create_task_group() as tasks:
            answers: dict[str, bool] = {}

            async def ask(name: str, text: str) -> None:
                answers[name] = await context.ask(text, bool, name=name)

            tasks.start_soon(ask, "pay", f"Pay {next(amounts)} €?")
            tasks.start_soon(ask, "send", "Send?")
        return [answers["pay"], answers["send"]]

    async with open_engine(flock) as engine:
        run = await asked(engine, "work", count=2)
        pay, send = run.waiting_for
        await engine.answer_call(run.run_id, send.call_id, json_of(False))
        run = await waiting(engine, run.run_id)
        assert (pay.question, run.waiting_for) == ("Pay 40 €?", (pay,))
        await engine.answer_call(run.run_id, pay.call_id, json_of(True))
        assert await result_of(engine, run.run_id) == [True, False]


async def test_the_ids_of_questions_tell_apart_what_they_ask(model: FakeModel, open_engine: OpenEngine) -> None:
    """Only the arguments differ, or only the text behind a name."""
    flock, texts = Flock(), iter(["Pay 40 €?", "Pay 41 €?"])

    @flock.agent
    async def work(context: RunContext) -> bool:
        return await context.ask(next(texts), bool, name="pay")

    def without_try(run: Run) -> str:
        return run.waiting_for[0].call_id.rpartition(".")[2]

    async with open_engine(flock) as engine:
        runs = [await asked(engine, "work") for _ in range(2)]
        assert without_try(runs[0]) != without_try(runs[1])
        for run in runs:
            await engine.cancel_run(run.run_id)


async def test_the_questions_of_an_item_belong_to_what_it_asks(model: FakeModel, open_engine: OpenEngine) -> None:
    till = Till()
    model.replies = [refund(40), refund(8000), DONE]
    async with open_engine(shop(till), transport=model.transport) as engine:
        batch = await engine.submit_batch("ask", [{"q": "?"}], BatchOptions())

        async def item_that_asks() -> Run:
            with anyio.fail_after(PATIENCE_S):
                while not (found := await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            return found[0]

        item = await item_that_asks()
        (old,) = item.waiting_for
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
        await engine.retry_batch(batch.batch_id, calls="again")
        item = await item_that_asks()
        (new,) = item.waiting_for
        with pytest.raises(StaleAnswer) as caught:
            await engine.answer_call(item.run_id, old.call_id, APPROVED)
        assert open_ids(caught) == [new.call_id]
        with pytest.raises(CallNotFound):
            await engine.answer_call(item.run_id, "ask:other", APPROVED)
        await engine.answer_call(item.run_id, new.call_id, APPROVED)
        assert (await ended(engine, batch)).status is RunStatus.COMPLETED
    assert till.paid == [8000]

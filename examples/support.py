"""A support desk: flockapi serve examples/support.py. Its tests: pytest examples/support.py"""

import re
from pathlib import Path
from typing import Any

import anyio
import msgspec
from msgspec.structs import replace

from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory, History
from flock.errors import AgentError
from flock.runs import Engine, Run, RunContext, RunStatus
from flock.testing import FakeModel, Reply


class Shop:
    """What the tools work with: here a few orders, elsewhere a database."""

    def __init__(self) -> None:
        self.orders = {"A7": 40.0, "B2": 8.5}
        self.paid: dict[str, float] = {}


class Answer(msgspec.Struct):
    reply: str
    is_solved: bool


def look_up(order: str, context: RunContext[Shop]) -> float | None:
    """Return the price of an order."""
    return context.state.orders.get(order)


def pay_back(order: str, amount: float, context: RunContext[Shop]) -> str:
    """Pay back an amount for an order."""
    context.state.paid[context.idempotency_key] = amount
    return f"{amount:.2f} € paid back for {order}"


def is_large(order: str, amount: float) -> bool:
    return amount > 10


async def instructions(context: RunContext[Shop]) -> str:
    return f"You work for a shop with {len(context.state.orders)} orders. Pay back only what an order has cost."


def check(answer: Answer) -> None:
    if "guarantee" in answer.reply:
        raise AgentError("Do not guarantee anything.")


flock = Flock("support", model="openai/gpt-4o", state=Shop())
flock.add_agent(
    FlockFactory.create_default_agent(
        "support",
        input="message: str",
        output=Answer,
        instructions=instructions,
        tools=[look_up, Tool(pay_back, needs_approval=is_large)],
        validate=check,
        history=History(turns=20, calls=True),
    )
)


@flock.on_model_call
async def hide_cards(call: Any, ask: Any) -> Any:
    call.messages = [replace(each, content=re.sub(r"\d{16}", "[card]", each.content)) for each in call.messages]
    return await ask(call)


async def said(engine: Engine, message: str) -> Run:
    run = await engine.submit("support", {"message": message}, session_id="ann")
    return await engine.wait(run.run_id)


REFUND = [
    Reply(calls=[("look_up", {"order": "A7"})]),
    Reply(calls=[("pay_back", {"order": "A7", "amount": 40})]),
]


def test_a_small_refund_needs_no_approval() -> None:
    calls = [Reply(calls=[("pay_back", {"order": "B2", "amount": 8.5})])]
    with FakeModel([*calls, lambda request: {"reply": request.text, "is_solved": True}]):
        answer = flock.run("support", {"message": "My order B2 is broken."})
    assert answer == {"reply": "8.50 € paid back for B2", "is_solved": True}


def test_an_approval_and_the_conversation_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with flock.engine(store=tmp_path / "support.db") as engine:
            run = await said(engine, "My order A7 is broken. My card is 4111111111111111.")
            assert run.status is RunStatus.WAITING
        async with flock.engine(store=tmp_path / "support.db") as engine:
            answer = msgspec.Raw(b'{"approved": true}')
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, answer)
            run = await engine.wait(run.run_id)
            assert run.value == {"reply": "Done.", "is_solved": True}
            await said(engine, "How much was it?")

    answers = [{"reply": "Done.", "is_solved": True}, {"reply": "40 €", "is_solved": True}]
    with FakeModel([*REFUND, *answers]) as model:
        anyio.run(main)
    earlier = [message["content"].partition("\n")[0] for message in model.requests[-1]["messages"][1:-1]]
    assert earlier == [
        '{"message": "My order A7 is broken. My card is [card]."}',
        *["", "40.0", "", "40.00 € paid back for A7"],
        '{"reply":"Done.","is_solved":true}',
    ]


def test_a_refund_that_is_denied_is_not_paid() -> None:
    paid, denied = dict(flock.shared.state.paid), {"approved": False, "reason": "no photo"}
    with FakeModel([*REFUND, lambda request: {"reply": request.text, "is_solved": False}]):
        answer = flock.run("support", {"message": "A7!"}, on_question=lambda question: denied)
    assert "no photo" in answer["reply"]
    assert flock.shared.state.paid == paid


def test_an_answer_with_a_promise_is_sent_back() -> None:
    answers = [{"reply": "We guarantee it.", "is_solved": True}, {"reply": "We hope so.", "is_solved": True}]
    with FakeModel(answers) as model:
        assert flock.run("support", {"message": "Will it last?"})["reply"] == "We hope so."
    assert "Do not guarantee anything." in model.requests[-1].text

"""The support desk of ../support.py in pydantic-ai. Its tests: pytest examples/other/support_pydantic_ai.py"""

import re
import sqlite3
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic_ai import (
    Agent,
    ApprovalRequired,
    DeferredToolRequests,
    DeferredToolResults,
    ModelMessagesTypeAdapter,
    ModelRetry,
    RunContext,
    ToolDenied,
)
from pydantic_ai.capabilities import Hooks
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.models.function import AgentInfo, FunctionModel


@dataclass
class Shop:
    """What the tools work with: here a few orders, elsewhere a database."""

    orders: dict[str, float] = field(default_factory=lambda: {"A7": 40.0, "B2": 8.5})
    paid: dict[str, float] = field(default_factory=dict)


class Answer(BaseModel):
    reply: str
    is_solved: bool


hooks = Hooks[Shop]()
agent: Agent[Shop, Answer | DeferredToolRequests] = Agent(
    "openai:gpt-4o",
    deps_type=Shop,
    output_type=[Answer, DeferredToolRequests],
    retries=2,
    capabilities=[hooks],
    defer_model_check=True,
)


@agent.tool
def look_up(context: RunContext[Shop], order: str) -> float | None:
    """Return the price of an order."""
    return context.deps.orders.get(order)


@agent.tool
def pay_back(context: RunContext[Shop], order: str, amount: float) -> str:
    """Pay back an amount for an order."""
    if amount > 10 and not context.tool_call_approved:
        raise ApprovalRequired
    context.deps.paid[context.tool_call_id or ""] = amount
    return f"{amount:.2f} € paid back for {order}"


@agent.instructions
def instructions(context: RunContext[Shop]) -> str:
    return f"You work for a shop with {len(context.deps.orders)} orders. Pay back only what an order has cost."


@agent.output_validator
def check(answer: Answer | DeferredToolRequests) -> Answer | DeferredToolRequests:
    if isinstance(answer, Answer) and "guarantee" in answer.reply:
        raise ModelRetry("Do not guarantee anything.")
    return answer


@hooks.on.before_model_request
def hide_cards(context: RunContext[Shop], request: ModelRequestContext) -> ModelRequestContext:
    def hidden(message: ModelMessage) -> ModelMessage:
        if not isinstance(message, ModelRequest):
            return message
        parts = [
            replace(part, content=re.sub(r"\d{16}", "[card]", part.content))
            if isinstance(part, UserPromptPart) and isinstance(part.content, str)
            else part
            for part in message.parts
        ]
        return replace(message, parts=parts)

    return replace(request, messages=[hidden(message) for message in request.messages])


class Desk:
    """Conversations, each with the calls that wait for an approval, in a file."""

    requests = TypeAdapter(DeferredToolRequests)

    def __init__(self, path: Path | str, shop: Shop) -> None:
        self.shop = shop
        self.db = sqlite3.connect(path)
        self.db.execute("CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, messages BLOB, waiting BLOB)")

    def say(self, session: str, message: str | None, results: DeferredToolResults | None = None) -> Answer | None:
        """Return the answer, or None if a call waits for an approval."""
        row = self.db.execute("SELECT messages FROM sessions WHERE id = ?", [session]).fetchone()
        history = ModelMessagesTypeAdapter.validate_json(row[0]) if row else None
        run = agent.run_sync(message, message_history=history, deferred_tool_results=results, deps=self.shop)
        output = run.output
        waiting = self.requests.dump_json(output) if isinstance(output, DeferredToolRequests) else None
        with self.db:
            new = session, run.all_messages_json(), waiting
            self.db.execute("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?)", new)
        return None if isinstance(output, DeferredToolRequests) else output

    def approve(self, session: str, decision: bool | ToolDenied) -> Answer | None:
        (waiting,) = self.db.execute("SELECT waiting FROM sessions WHERE id = ?", [session]).fetchone()
        calls = self.requests.validate_json(waiting).approvals
        return self.say(session, None, DeferredToolResults(approvals={call.tool_call_id: decision for call in calls}))


REFUND = [
    ToolCallPart("look_up", {"order": "A7"}),
    ToolCallPart("pay_back", {"order": "A7", "amount": 40.0}),
]


def answered(reply: str) -> ToolCallPart:
    return ToolCallPart("final_result", {"reply": reply, "is_solved": True})


class Fake:
    """A model whose replies a test sets. An Ellipsis is an answer with the last result of a tool."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.requests: list[list[ModelMessage]] = []
        self.model = FunctionModel(self.reply)

    def reply(self, messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        self.requests.append(messages)
        reply = self.replies.pop(0)
        last = messages[-1].parts[-1]
        return ModelResponse([answered(str(last.content)) if reply is ... else reply])  # type: ignore[union-attr]


def test_a_small_refund_needs_no_approval() -> None:
    fake = Fake(ToolCallPart("pay_back", {"order": "B2", "amount": 8.5}), ...)
    with agent.override(model=fake.model):
        answer = Desk(":memory:", Shop()).say("ann", "My order B2 is broken.")
    assert answer == Answer(reply="8.50 € paid back for B2", is_solved=True)


def test_an_approval_and_the_conversation_survive_a_restart(tmp_path: Path) -> None:
    fake, shop = Fake(*REFUND, answered("Done."), answered("40 €")), Shop()
    with agent.override(model=fake.model):
        desk = Desk(tmp_path / "support.db", shop)
        assert desk.say("ann", "My order A7 is broken. My card is 4111111111111111.") is None
        desk = Desk(tmp_path / "support.db", shop)
        assert desk.approve("ann", True) == Answer(reply="Done.", is_solved=True)
        desk.say("ann", "How much was it?")
    parts = [part for message in fake.requests[-1] for part in message.parts]
    said = [part.content for part in parts if isinstance(part, UserPromptPart | ToolReturnPart)]
    assert said == [
        "My order A7 is broken. My card is [card].",
        40.0,
        "40.00 € paid back for A7",
        "Final result processed.",
        "How much was it?",
    ]


def test_a_refund_that_is_denied_is_not_paid() -> None:
    fake, shop = Fake(*REFUND, ...), Shop()
    desk = Desk(":memory:", shop)
    with agent.override(model=fake.model):
        desk.say("ann", "A7!")
        answer = desk.approve("ann", ToolDenied("no photo"))
    assert answer is not None
    assert "no photo" in answer.reply
    assert shop.paid == {}


def test_an_answer_with_a_promise_is_sent_back() -> None:
    fake = Fake(answered("We guarantee it."), answered("We hope so."))
    with agent.override(model=fake.model):
        answer = Desk(":memory:", Shop()).say("ann", "Will it last?")
    assert answer == Answer(reply="We hope so.", is_solved=True)
    assert "Do not guarantee anything." in str(fake.requests[-1][-1].parts[-1])

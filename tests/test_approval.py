"""Tools that a person must allow: ``Tool(function, needs_approval=…)``."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock.agents.tools import Tool
from flock.core import Flock, agent
from flock.errors import DefinitionError, Expired, InvalidData
from flock.runs import Question, RunContext, RunStatus
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until_run
from tests.support.models import usage_of_gpt_4o
from tests.support.servers import serving
from tests.test_ask import asked, json_of, waiting
from tests.test_tools import add, ended, flock_of, results

pytestmark = pytest.mark.anyio


class Till:
    """A tool that costs money."""

    def __init__(self) -> None:
        self.paid: list[float] = []

    def refund(self, amount: float, order: str = "A7") -> str:
        """Pay money back."""
        self.paid.append(amount)
        return f"paid {amount:g} for {order}"


def asking(till: Till, needs_approval: Any = True) -> Flock:
    return flock_of(Tool(till.refund, needs_approval=needs_approval), add)


PAY = Reply(calls=[("refund", {"amount": 40})])


class Decider:
    """It decides otherwise when the step runs again, as a rule in a database may."""

    def __init__(self) -> None:
        self.decided = list[float]()

    async def __call__(self, amount: float, order: str) -> bool:
        await anyio.lowlevel.checkpoint()
        self.decided.append(amount)
        return amount > 10 and len(self.decided) < 3


async def test_an_async_function_decides_about_approval_once(model: FakeModel, open_engine: OpenEngine) -> None:
    till, decide = Till(), Decider()
    calls = [("refund", {"amount": 5}), ("refund", {"amount": 40})]
    model.replies = [Reply(calls=calls), Reply({"a": "done"})]
    async with open_engine(asking(till, decide), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        assert (till.paid, decide.decided) == ([5], [5, 40])
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": False}))
        run = await engine.wait(run.run_id)
    assert (run.status, till.paid, decide.decided) == (RunStatus.COMPLETED, [5], [5, 40])


async def test_a_function_that_decides_and_exits_fails_its_run_alone(model: FakeModel) -> None:
    def decide(amount: float, order: str) -> bool:
        sys.exit("a secret")

    model.replies = [PAY, Reply({"a": "done"})]
    async with asking(Till(), decide).engine(transport=model.transport) as engine:
        failed = await ended(engine)
        assert (failed.error, failed.error_type) == ("needs_approval= of 'refund' raised SystemExit.", "call_error")
        assert (await ended(engine)).status is RunStatus.COMPLETED


@pytest.mark.parametrize(
    ("output", "paid", "read"),
    [
        ({"approved": True}, [40], "paid 40 for A7"),
        ({"approved": False, "reason": "Too much."}, [], "A person denied this call. Too much."),
        ({"approved": False}, [], "A person denied this call."),
        (
            {"approved": True, "arguments": {"amount": 5, "order": "B2"}},
            [5],
            'A person changed the arguments to {"amount":5.0,"order":"B2"}. The result: paid 5 for B2',
        ),
    ],
)
async def test_a_person_allows_denies_or_changes_a_call(
    output: Any, paid: list[float], read: str, model: FakeModel, tmp_path: Path
) -> None:
    """The answer survives a restart, and the model is not asked again."""
    till = Till()
    model.replies = [PAY, Reply({"a": "done"})]
    flock = asking(till)
    options: Any = {"transport": model.transport, "store": tmp_path / "flock.db"}
    async with flock.engine(**options) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        (question,) = run.waiting_for
        assert question.question == "May ask call refund?"
        assert isinstance(question.arguments, msgspec.Raw)
        assert json.loads(bytes(question.arguments)) == {"amount": 40}
        assert till.paid == []
    async with flock.engine(**options) as engine:
        await engine.answer_call(run.run_id, question.call_id, json_of(output))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        calls = await engine.get_calls(run)
    assert (run.status, till.paid) == (RunStatus.COMPLETED, paid), run.error
    assert results(model.requests[1]) == [read]
    assert run.usage == usage_of_gpt_4o(20, 10)
    assert [call.kind for call in calls[0]] == ["model", "question", *(["tool"] if paid else [])]


@pytest.mark.parametrize(
    ("output", "pointers"),
    [
        ({}, ["/output/approved"]),
        ({"approved": "yes"}, ["/output/approved"]),
        (
            {"approved": True, "arguments": {"amount": "much", "to": "me"}},
            ["/output/arguments/amount", "/output/arguments/to"],
        ),
    ],
)
async def test_an_answer_that_does_not_fit_is_refused(
    output: Any, pointers: list[str], model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [PAY]
    async with open_engine(asking(Till()), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        with pytest.raises(InvalidData) as caught:
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(output))
        assert sorted(error.pointer for error in caught.value.errors) == pointers
        await engine.cancel_run(run.run_id)


async def test_a_function_of_the_arguments_decides(model: FakeModel, open_engine: OpenEngine) -> None:
    """Calls of the same reply that need no approval are made first. Each call has a question of its own."""
    till = Till()
    model.replies = [
        Reply(
            calls=[
                ("refund", {"amount": 5}),
                ("refund", {"amount": 40}),
                ("refund", {"amount": 40}),
                ("add", {"a": 1, "b": 2}),
            ]
        ),
        Reply({"a": "done"}),
    ]
    flock = asking(till, lambda amount, order: amount > 10)
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"}, count=2)
        assert till.paid == [5]
        first, second = run.waiting_for
        await engine.answer_call(run.run_id, first.call_id, json_of({"approved": False, "reason": "no"}))
        await waiting(engine, run.run_id)
        await engine.answer_call(run.run_id, second.call_id, json_of({"approved": True}))
        run = await engine.wait(run.run_id)
    assert (run.status, till.paid) == (RunStatus.COMPLETED, [5, 40])
    assert results(model.requests[1]) == ["paid 5 for A7", "A person denied this call. no", "paid 40 for A7", "3"]


async def test_a_function_that_cannot_decide_fails_the_run(model: FakeModel) -> None:
    till = Till()
    model.replies = [PAY]

    def broken(**arguments: Any) -> bool:
        raise ValueError("no limit is known")

    async with asking(till, broken).engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        run = await engine.wait(run.run_id)
    assert (run.status, run.error_type, till.paid) == (RunStatus.FAILED, "agent_exception", [])


async def test_a_program_answers_in_place_of_a_person(model: FakeModel) -> None:
    till, questions = Till(), list[Question]()
    model.replies = [PAY, Reply({"a": "done"})]

    def allow(question: Question) -> dict[str, bool]:
        questions.append(question)
        return {"approved": True}

    async with asking(till).engine(transport=model.transport, on_question=allow) as engine:
        run = await engine.submit("ask", {"q": "?"})
        run = await engine.wait(run.run_id)
    assert (run.status, till.paid, len(questions)) == (RunStatus.COMPLETED, [40], 1)


async def test_the_history_of_a_run_that_waited_has_no_later_turns(model: FakeModel, open_engine: OpenEngine) -> None:
    flock = flock_of(Tool(Till().refund, needs_approval=True), history=5)
    model.replies = [PAY, Reply({"a": "later"}), Reply({"a": "done"})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "first"}, session_id="s")
        later = await engine.submit("ask", {"q": "second"}, session_id="s")
        assert (await engine.wait(later.run_id)).status is RunStatus.COMPLETED
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    first, _, last = model.requests
    assert last["messages"][: len(first["messages"])] == first["messages"]


LOCAL = '''
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory

flock = Flock("shop", model="local/smollm2-135m")

def refund(order: str) -> str:
    """Pay the money for an order back."""
    open({log!r}, "a").write(order + "\\n")
    return "The money is paid back."

def status(order: str) -> str:
    """Find the status of an order."""
    return "The order is lost."

flock.add_agent(FlockFactory.create_default_agent(
    "clerk", input="question", output="answer: str", max_tool_calls=2,
    tools=[Tool(refund, needs_approval=True), Tool(status, needs_approval=True)],
))
'''


@pytest.mark.slow
def test_a_tool_of_the_local_model_is_approved_after_a_restart(tmp_path: Path) -> None:
    """The real model calls a tool. Its server is killed, and a person allows the call over HTTP."""
    script, log = tmp_path / "shop.py", tmp_path / "log"
    script.write_text(LOCAL.format(log=str(log)))
    body = {"agent_name": "clerk", "inputs": {"question": "Pay the order A7 back."}, "async_run": True}
    with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        path = client.post("/run/flock", json=body).headers["Location"]
        run = client.get(path, params={"wait": 60}).json()
        assert run["status"] == "waiting", run
        os.kill(server.process.pid, signal.SIGKILL)
    answered = 0
    with serving(script, tmp_path) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        assert client.get("/runs", params={"status": "waiting"}).json()["runs"][0]["run_id"] == run["run_id"]
        while (run := client.get(path, params={"wait": 60}).json())["status"] == "waiting":
            for question in run["waiting_for"]:
                assert list(question["arguments"]) == ["order"]
                client.post(
                    f"{path}/calls/{question['call_id']}", json={"output": {"approved": True}}
                ).raise_for_status()
                answered += 1
    assert run["status"] == "completed", run
    assert 1 <= answered <= 2
    assert list(run["result"]) == ["answer"]
    kinds = [call["kind"] for call in run["steps"][0]["calls"]]
    assert kinds.count("tool") == kinds.count("question") == answered


# Agents and tools of servers


async def test_an_agent_that_is_a_tool_is_approved(model: FakeModel, open_engine: OpenEngine) -> None:
    called = list[str]()

    @agent
    async def write(about: str) -> str:
        called.append(about)
        return f"a text about {about}"

    flock = flock_of(Tool(write, needs_approval=True, name="draft"))
    flock.add_agent(write)
    model.replies = [Reply(calls=[("draft", {"about": "cups"})]), Reply({"a": "done"})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        assert (run.waiting_for[0].question, called) == ("May ask call draft?", [])
        edited = {"approved": True, "arguments": {"about": "mugs"}}
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(edited))
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert called == ["mugs"]
    with pytest.raises(DefinitionError, match="is an agent, so it cannot be a tool with once=True"):
        Tool(write, once=True)


@pytest.mark.parametrize(("on_expiry", "end"), [("deny", "completed"), ("fail", "failed")])
async def test_an_approval_that_nobody_gives_in_time(
    on_expiry: Any, end: str, model: FakeModel, open_engine: OpenEngine
) -> None:
    till = Till()
    model.replies = [PAY, *([Reply({"a": "done"})] if on_expiry == "deny" else [])]
    flock = flock_of(Tool(till.refund, needs_approval=True, expires_s=0.5, on_expiry=on_expiry))
    async with open_engine(flock, transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
    assert (run.status, run.error_type, till.paid) == (end, None if end == "completed" else "expired", [])
    if on_expiry == "deny":
        assert results(model.requests[1]) == ["A person denied this call. Nobody answered in time."]


@pytest.mark.parametrize("catches", [True, False])
async def test_a_question_of_a_called_agent_that_expires_raises_in_its_caller(
    catches: bool, open_engine: OpenEngine
) -> None:
    flock = Flock()

    @flock.agent
    async def decide(context: RunContext) -> bool:
        return await context.ask("Go on?", bool, expires_s=0.5)

    @flock.agent
    async def work(context: RunContext) -> str:
        try:
            await context.run_agent("decide", {})
        except Expired as exc:
            if catches:
                return f"{exc} {await context.ask('And now?', str)}"
            raise
        return "decided"

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        if not catches:
            run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
            expected = (RunStatus.FAILED, "expired", "Nobody answered in time: Go on?")
            assert (run.status, run.error_type, run.error) == expected
            return
        run = await until_run(engine, run.run_id, lambda run: "And now?" in [q.question for q in run.questions])
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of("later"))
        run = await engine.wait(run.run_id)
    assert run.value == {"result": "Nobody answered in time: Go on? later"}

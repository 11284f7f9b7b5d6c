"""Tools of model agents: calls, invalid calls, limits, and what survives a crash."""

import asyncio
import functools
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import anyio
import httpx
import msgspec
import pytest

from flock.agents.agent import ModelAgent, agent
from flock.agents.checks import problems
from flock.agents.tools import MAX_RESULT_CHARS, Tool
from flock.core import Flock, FlockFactory
from flock.errors import AgentError, DefinitionError, SignatureError
from flock.runs import Engine, Observer, Run, RunContext, RunStatus, Usage
from flock.testing import Failure, FakeModel, Reply
from tests.support import EXAMPLES, PATIENCE_S
from tests.support.engines import OpenEngine, until, until_run
from tests.support.flocks import CALLING_TOOLS
from tests.support.models import usage_of_gpt_4o
from tests.support.servers import serving

pytestmark = pytest.mark.anyio


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def flock_of(*tools: Any, model: str = "openai/gpt-4o", **options: Any) -> Flock:
    flock = Flock("tools", model=model)
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a: str", tools=tools, **options))
    return flock


async def ended(engine: Engine, **inputs: Any) -> Run:
    run = await engine.submit("ask", {"q": "?", **inputs})
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def answered(flock: Flock, model: FakeModel, **options: Any) -> str:
    """Run the agent once, and return its answer."""
    async with flock.engine(transport=model.transport, **options) as engine:
        run = await ended(engine)
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.result is not None
    return str(msgspec.json.decode(run.result)["a"])


def results(request: Any) -> list[str]:
    """Return the results of tools in the last round of a request."""
    texts: list[str] = []
    for message in request["messages"]:
        texts = [*texts, message["content"]] if message["role"] == "tool" else []
    return texts


# Calls


async def test_a_model_calls_tools_and_then_answers(open_engine: OpenEngine, model: FakeModel) -> None:
    """The tokens of all replies are counted. A result that is not text is sent as JSON."""

    async def city(country: Annotated[str, "an ISO code"], context: RunContext, most: int = 1) -> dict[str, Any]:
        """Find the cities
        of a country.

        This is not for the model.
        """
        return {"country": country, "agent": context.agent_name, "most": most}

    model.replies = [Reply(calls=[("add", {"a": 1, "b": 2}), ("city", {"country": "se"})]), Reply({"a": "done"})]
    async with open_engine(flock_of(add, city), transport=model.transport) as engine:
        run = await ended(engine)
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.usage == usage_of_gpt_4o(20, 10)
    first, second = model.requests
    assert [tool["function"]["name"] for tool in first["tools"]] == ["add", "city"]
    assert first["tools"][0]["function"] == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "title": "add",
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    }
    function = first["tools"][1]["function"]
    assert function["description"] == "Find the cities of a country."
    assert function["parameters"]["properties"] == {
        "country": {"type": "string", "description": "an ISO code"},
        "most": {"type": "integer", "default": 1},
    }
    assert "strict" not in function, "it has an optional argument"
    assert "response_format" not in first
    assert '"required": ["a"]' in first["messages"][0]["content"]
    called = second["messages"][-3]
    assert (called["role"], [call["id"] for call in called["tool_calls"]]) == ("assistant", ["call_0", "call_1"])
    assert second["messages"][-2:] == [
        {"role": "tool", "content": "3", "tool_call_id": "call_0"},
        {"role": "tool", "content": '{"country":"se","agent":"ask","most":1}', "tool_call_id": "call_1"},
    ]


async def test_the_calls_of_one_reply_run_at_the_same_time(model: FakeModel) -> None:
    both, in_threads = anyio.Event(), threading.Barrier(2, timeout=PATIENCE_S)
    waiting = []

    async def meet(n: int) -> str:
        waiting.append(n)
        if len(waiting) == 2:
            both.set()
        await both.wait()
        return f"met {n}"

    def meet_in_thread(n: int) -> str:
        in_threads.wait()
        return f"met {n}"

    rounds = [(name, {"n": n}) for name in ("meet", "meet_in_thread") for n in (1, 2)]
    model.replies = [Reply(calls=[*rounds]), Reply({"a": "done"})]
    assert await answered(flock_of(meet, meet_in_thread), model) == "done"
    assert results(model.requests[1]) == ["met 1", "met 2"] * 2


async def test_a_tool_may_be_a_method_an_object_or_have_another_name(model: FakeModel) -> None:
    class Box:
        def __init__(self) -> None:
            self.lock = threading.Lock()  # not JSON

        def look(self, name: str) -> str:
            return f"looked for {name}"

        async def __call__(self, x: int) -> int:
            return x + 1

    tools = [Box().look, Tool(Box(), name="plus-1"), Tool(functools.partial(add, b=5), name="plus_5", description="+5")]
    replies = [("look", {"name": "Ann"}), ("plus-1", {"x": 1}), ("plus_5", {"a": 1})]
    model.replies = [Reply(calls=[*replies]), Reply({"a": "done"})]
    await answered(flock_of(*tools), model)
    assert results(model.requests[1]) == ["looked for Ann", "2", "6"]
    assert [tool["function"]["description"] for tool in model.requests[0]["tools"]] == ["", "", "+5"]
    assert Tool(functools.partial(add, b=5)).description == "Add two numbers."


# Invalid calls


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        pytest.param("ad", {}, "Error: There is no tool 'ad'. Did you mean 'add'?", id="invented name"),
        pytest.param("", {}, "Error: There is no tool ''.", id="no name"),
        pytest.param("add", "{a: 1}", "Error: The arguments are invalid. Not valid JSON: ", id="not JSON"),
        pytest.param("add", "[1, 2]", "Error: The arguments are invalid. Expected 'object'", id="list"),
        pytest.param("add", {"a": "x", "b": 1}, "Error: The arguments are invalid. /a: Expected 'int'", id="type"),
        pytest.param("add", "", "Error: The arguments are invalid. /a: This field is required.; /b: This ", id="empty"),
        pytest.param("add", {"a": 1, "b": 2, "c": 3}, "Error: The arguments are invalid. /c: Unknown", id="unknown"),
        pytest.param("add", "[" * 50_000, "Error: The arguments are invalid. ", id="endless nesting"),
    ],
)
async def test_an_invalid_call_goes_back_to_the_model_with_the_reason(
    name: str, arguments: Any, result: str, model: FakeModel
) -> None:
    model.replies = [Reply(calls=[(name, arguments)]), Reply(calls=[("add", {"a": 1, "b": 1})]), Reply({"a": "done"})]
    await answered(flock_of(add), model)
    (text,) = results(model.requests[1])
    assert text.startswith(result)
    assert "\n" not in text
    assert results(model.requests[2]) == ["2"]


async def test_an_exception_is_one_line_for_the_model(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    """The model's answer reaches the client, so it reads the text of an ``AgentError`` only."""

    def explode() -> None:
        raise ValueError("a secret")

    async def refuse() -> None:
        raise AgentError("There is no such city.\nTry another.")

    model.replies = [Reply(calls=[("explode", {}), ("refuse", {})]), Reply({"a": "done"})] * 2
    flock = flock_of(explode, refuse)
    await answered(flock, model)
    told = "Error: There is no such city.\\nTry another."
    assert results(model.requests[1]) == ["Error: The call 'explode' raised ValueError", told]
    assert "ValueError: a secret" in caplog.text
    assert re.search(
        r"run [0-9a-f-]+: the tool refuse failed: There is no such city.\\nTry another\.$", caplog.text, re.M
    )
    await answered(flock, model, expose_errors=True)
    assert results(model.requests[3]) == ["Error: The call 'explode' raised ValueError: a secret", told]


async def test_a_tool_that_exits_is_an_error_for_the_model(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    """The server goes on, and so do the other tools of the reply. The log has the traceback."""

    async def leave() -> None:
        sys.exit("a secret")

    def leave_in_thread() -> None:
        sys.exit(2)

    calls: list[tuple[str, dict[str, Any]]] = [("leave", {}), ("leave_in_thread", {}), ("add", {"a": 1, "b": 2})]
    model.replies = [Reply(calls=calls), Reply({"a": "done"})]
    assert await answered(flock_of(leave, leave_in_thread, add), model) == "done"
    assert results(model.requests[1]) == [
        "Error: The call 'leave' raised SystemExit",
        "Error: The call 'leave_in_thread' raised SystemExit",
        "3",
    ]
    assert "SystemExit: a secret" in caplog.text


async def test_a_tool_that_awaits_a_cancelled_task_does_not_cancel_its_siblings(model: FakeModel) -> None:
    has_failed = anyio.Event()

    async def fail() -> None:
        task = asyncio.ensure_future(anyio.sleep_forever())
        task.cancel()
        try:
            await task
        finally:
            has_failed.set()

    async def slow() -> str:
        await has_failed.wait()
        await anyio.wait_all_tasks_blocked()  # a cancellation would come now
        return "ready"

    model.replies = [Reply(calls=[("fail", {}), ("slow", {})]), Reply({"a": "done"})]
    assert await answered(flock_of(fail, slow), model) == "done"
    told = "Error: 'fail' raised CancelledError, because something that it awaited was cancelled."
    assert results(model.requests[1]) == [told, "ready"]


async def test_a_long_result_is_cut(model: FakeModel) -> None:
    model.replies = [Reply(calls=[("long", {})]), Reply({"a": "done"})]
    await answered(flock_of(Tool(lambda: "x" * 2_000_000, name="long")), model)
    (text,) = results(model.requests[1])
    assert text == "x" * MAX_RESULT_CHARS + "… (cut: 1950000 more characters)"


async def test_a_result_of_20_mb_is_an_error_for_the_model(model: FakeModel) -> None:
    model.replies = [Reply(calls=[("long", {}), ("odd", {})]), Reply({"a": "done"})]
    await answered(flock_of(Tool(lambda: "x" * 20_000_000, name="long"), Tool(lambda: object(), name="odd")), model)
    long, odd = results(model.requests[1])
    assert long.startswith("Error: The result of the call 'long' has 20000002 bytes, more than the maximum (16777216")
    assert odd.startswith("Error: The result of the call 'odd' cannot be converted to JSON")


# Limits


async def test_a_hundred_calls_in_one_reply_are_limited(model: FakeModel) -> None:
    """Then the model must answer: it is offered no tools, and asked in the strictest format."""
    made = []

    async def count(n: int) -> int:
        made.append(n)
        return n

    model.replies = [Reply(calls=[*(("count", {"n": n}) for n in range(100))]), Reply({"a": "done"})]
    assert await answered(flock_of(count), model) == "done"
    assert sorted(made) == list(range(10))
    request = model.requests[1]
    assert "tools" not in request
    assert request["response_format"]["type"] == "json_schema"
    assert {message["role"] for message in request["messages"]} == {"system", "user", "assistant"}
    last = request["messages"][-1]["content"]
    assert "count returned: 9\n\ncount returned: Error: Not called, because only 10 calls are possible" in last
    assert last.endswith("No more calls are possible.\nAnswer now, with one JSON object and nothing else.")


async def test_a_model_that_never_answers_is_stopped(model: FakeModel) -> None:
    """After ``max_tool_calls``, a reply with more calls has no answer."""
    model.replies = [Reply(calls=[("add", {"a": 1, "b": 1})])] * 4
    async with flock_of(add, max_tool_calls=3).engine(transport=model.transport) as engine:
        run = await ended(engine)
    assert run.error_type == "model_bad_response"


async def test_a_tool_that_hangs_ends_after_its_timeout(model: FakeModel) -> None:
    """Also a synchronous one, whose thread continues until the function returns."""
    may_end = threading.Event()
    cancelled = []

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    def hang_in_thread() -> None:
        may_end.wait(PATIENCE_S)

    model.replies = [
        Reply(calls=[("hang", {}), ("hang_in_thread", {}), ("add", {"a": 1, "b": 1})]),
        Reply({"a": "done"}),
    ]
    async with flock_of(hang, hang_in_thread, add, tool_timeout_s=1).engine(transport=model.transport) as engine:
        run = await ended(engine)
        may_end.set()
    assert run.status is RunStatus.COMPLETED, run.error
    line = "Error: {!r} did not end within 1 s (tool_timeout_s)."
    assert results(model.requests[1]) == [line.format("hang"), line.format("hang_in_thread"), "2"]
    assert cancelled == [True]


async def test_the_timeout_of_the_agent_covers_a_tool_in_a_thread(model: FakeModel) -> None:
    may_end = threading.Event()

    def hang() -> None:
        may_end.wait(PATIENCE_S)

    model.replies = [Reply(calls=[("hang", {})])]
    async with flock_of(hang, timeout_s=0.3).engine(transport=model.transport) as engine:
        run = await ended(engine)
        may_end.set()
    assert run.error_type == "model_timeout"


async def test_a_late_result_of_a_tool_belongs_to_the_next_equal_call(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    """Also if the model makes it at another place. The one after that is executed."""
    paid, may_end = list[int](), threading.Event()

    def pay(amount: int) -> str:
        paid.append(amount)
        may_end.wait(PATIENCE_S)
        return f"paid {amount}"

    flock, call = flock_of(add, pay), ("pay", {"amount": 5})

    @flock.agent
    async def work(context: RunContext) -> str:
        first = asyncio.ensure_future(context.run_agent("ask", {"q": "?"}))
        await asyncio.wait([first], timeout=0.1)
        await until(lambda: bool(paid))
        first.cancel()
        for _ in range(100):
            await asyncio.sleep(0)
        may_end.set()
        await asyncio.wait([first])
        answer = (await context.run_agent("ask", {"q": "?"}))["a"]
        return f"{answer}, {await context.ask('Go on?', bool)}"

    model.replies = [
        Reply(calls=[call]),
        Reply(calls=[("add", {"a": 1, "b": 2}), call]),
        Reply(calls=[call]),
        Reply({"a": "done"}),
    ]
    async with open_engine(flock, transport=model.transport) as engine:
        run_id = (await engine.submit("work", {})).run_id
        run = await until_run(engine, run_id, lambda run: run.status is RunStatus.WAITING)
        assert paid == [5, 5]
        await engine.answer_call(run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run_id)
    assert (run.error, run.value) == (None, {"result": "done, True"})
    assert paid == [5, 5]
    assert results(model.requests[2]) == ["3", "paid 5"]


async def test_a_cancelled_run_cancels_its_tools(model: FakeModel) -> None:
    running, cancelled = anyio.Event(), []

    async def hang() -> None:
        try:
            running.set()
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    model.replies = [Reply(calls=[("hang", {})])]
    async with flock_of(hang).engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        await running.wait()
        await engine.cancel_run(run.run_id)
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
    assert cancelled == [True]


async def test_the_tokens_of_tool_calls_count_for_max_tokens(model: FakeModel) -> None:
    model.replies = [Reply(calls=[("add", {"a": 1, "b": 1})])]
    async with flock_of(add).engine(transport=model.transport, max_tokens=15) as engine:
        assert (await ended(engine)).error_type == "too_many_tokens"


async def test_an_invalid_answer_after_calls_is_repaired_without_tools(model: FakeModel) -> None:
    model.replies = [Reply(calls=[("add", {"a": 1, "b": 1})]), Reply("It is 2."), Reply({"a": "2"})]
    assert await answered(flock_of(add), model) == "2"
    request = model.requests[2]
    assert ("tools" in request, request["response_format"]["type"]) == (False, "json_schema")
    assert [message["role"] for message in request["messages"]] == ["system", *["user", "assistant"] * 2, "user"]


# Other agents


async def test_another_agent_is_a_tool(open_engine: OpenEngine, model: FakeModel) -> None:
    """Its description and inputs are those of the tool. Its tokens are counted, and its errors go to the model."""
    research = FlockFactory.create_default_agent(
        "re.search", "Find facts.", input="topic: str | in a few words", output="facts: list[str]"
    )
    flock = flock_of(research, "check", tool_timeout_s=0.000_001)
    flock.add_agent(research)

    @flock.agent
    def check(fact: str) -> bool:
        """Check a fact."""
        if fact == "green":
            raise AgentError("I do not know.")
        return True

    calls = [("re_search", {"topic": "tea"}), ("check", {"fact": "hot"}), ("check", {"fact": "green"})]
    model.replies = [Reply(calls=[*calls]), Reply({"facts": ["hot"]}), Reply({"a": "done"})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine)
    assert (run.status, run.error) == (RunStatus.COMPLETED, None)
    assert run.usage == usage_of_gpt_4o(30, 15)
    first = model.requests[0]["tools"][0]["function"]
    assert (first["name"], first["description"]) == ("re_search", "Find facts.")
    assert first["parameters"]["properties"] == {"topic": {"type": "string", "description": "in a few words"}}
    assert results(model.requests[2]) == ['{"facts":["hot"]}', '{"result":true}', "Error: I do not know."]


async def test_an_agent_that_is_its_own_tool_ends_at_max_steps(model: FakeModel) -> None:
    async def reply(request: Any) -> Any:
        is_first = request["messages"][-1]["role"] == "user" and "tools" in request
        return Reply(calls=[("ask", {"q": "?"})]) if is_first else Reply({"a": "done"})

    model.replies = [reply] * 4
    flock = flock_of("ask")
    flock.max_steps = 3
    assert await answered(flock, model) == "done"
    assert results(model.requests[2])[0].startswith("Error: 'ask' was not called, because 3 calls are already nested")


def test_an_agent_that_is_missing_is_reported_at_the_start() -> None:
    flock = flock_of("chek", FlockFactory.create_default_agent("check", output="ok: bool"))
    line = "The agent 'ask' has a tool {!r}, but this flock has no such agent. Add it with add_agent."
    assert problems(flock.agents, flock.model) == [line.format("chek"), line.format("check")]


# Servers without tools


STEP = {"next_thought": "Let me see.", "next_tool_name": "add", "next_tool_args": {"a": 1, "b": 2}}
FINISH = {"next_thought": "I know.", "next_tool_name": "finish", "next_tool_args": {}}


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "registry.ollama.ai/library/gemma3:4b does not support tools"),
        (400, '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        (404, "No endpoints found that support tool use."),
        (400, "deepseek-reasoner does not support Function Calling"),
        (500, "tools param requires --jinja flag"),
    ],
)
async def test_a_server_without_tools_is_asked_for_steps_as_json(status: int, message: str, model: FakeModel) -> None:
    """The rejection is remembered for this model. Status 500 is tried three times."""
    rejections = [Failure(status, message=message, retry_after_s=0)] * (3 if status == 500 else 1)
    model.replies = [*rejections, *[Reply(STEP), Reply(FINISH), Reply({"a": "3"})] * 2]
    async with flock_of(add, model="ollama/gemma3").engine(transport=model.transport) as engine:
        for _ in range(2):
            run = await ended(engine)
            assert run.result is not None, run.error
            assert msgspec.json.decode(run.result) == {"a": "3"}
    rejected, requests = model.requests[: len(rejections)], model.requests[len(rejections) :]
    assert ["tools" in request for request in [*rejected, *requests]] == [True] * len(rejected) + [False] * 6
    first, second, third, *_ = requests
    steps = first["response_format"]["json_schema"]["schema"]["anyOf"]
    assert [step["properties"]["next_tool_name"]["enum"] for step in steps] == [["add"], ["finish"]]
    assert list(steps[0]["properties"]["next_tool_args"]["properties"]) == ["a", "b"]
    assert "- add: Add two numbers. Arguments:" in first["messages"][-1]["content"]
    assert [each["role"] for each in second["messages"]] == ["system", "user", "assistant", "user"]
    assert json.loads(second["messages"][2]["content"]) == STEP
    assert second["messages"][3]["content"].startswith("add returned: 3\n\n")
    assert "a" in third["response_format"]["json_schema"]["schema"]["properties"]
    sent = [each.headers["idempotency-key"].removesuffix("/stream") for each in model.requests[: len(rejections) + 3]]
    keys = [key.partition("/")[2] for key in sent]
    assert keys == [*["0"] * len(rejections), "0/step", "0/2/step", "0/3"]


async def test_steps_that_are_invalid_count_as_calls_or_answers(model: FakeModel) -> None:
    """A server that supports no JSON Schema may let the model write anything."""
    invented = {**STEP, "next_tool_name": "subtract"}
    model.replies = [
        Failure(400, message="tools: Extra inputs are not permitted"),
        Reply(invented),
        Reply({"a": "I need no step."}),
    ]
    assert await answered(flock_of(add), model) == "I need no step."
    assert "add returned: " not in model.requests[2]["messages"][-1]["content"]
    assert "subtract returned: Error: There is no tool 'subtract'." in model.requests[2]["messages"][-1]["content"]


async def test_a_model_may_finish_without_a_call(model: FakeModel) -> None:
    model.replies = [Failure(400, message="no tools"), Reply(FINISH), Reply({"a": "3"})]
    assert await answered(flock_of(add), model) == "3"
    assert [message["role"] for message in model.requests[2]["messages"]] == ["system", "user"]


# Crashes


async def test_finished_replies_and_calls_are_not_paid_again(tmp_path: Path, model: FakeModel) -> None:
    """After a crash they are read. Their tokens count once, and are not reported again."""
    executed, reported, reached = list[Any](), list[Usage](), anyio.Event()

    def look(n: int) -> int:
        executed.append(n)
        return n * 10

    def fail() -> None:
        executed.append("fail")
        raise AgentError("no")

    async def hang() -> str:
        executed.append("hang")
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return "ended"

    class Observed(Observer):
        def tokens_spent(self, agent_name: str, usage: Usage) -> None:
            reported.append(usage)

    model.replies = [
        Reply(calls=[("look", {"n": 1}), ("look", {"n": 1}), ("fail", {})]),
        Reply(calls=[("hang", {})]),
        Reply({"a": "done"}),
    ]
    flock, store = flock_of(look, fail, hang), tmp_path / "flock.db"
    async with flock.engine(store=store, transport=model.transport) as engine:
        engine.observe(Observed())
        run = await engine.submit("ask", {"q": "?"})
        await reached.wait()
        await engine.drain(0)
    assert sorted(map(str, executed[:3])) == ["1", "1", "fail"], "at the same time"
    assert executed[3:] == ["hang"]
    async with flock.engine(store=store, transport=model.transport, max_tokens=31) as engine:
        engine.observe(Observed())
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        calls = [call for _, call in await engine.store.calls(run, 0)]
    assert run.status is RunStatus.COMPLETED, run.error
    assert executed[4:] == ["hang"]
    assert len(model.requests) == 3
    assert run.usage == usage_of_gpt_4o(30, 15)
    assert reported == [usage_of_gpt_4o(10, 5)] * 3
    assert [(call.kind, call.name) for call in calls if call.kind == "model"] == [("model", "openai_gpt-4o")] * 2
    assert sorted((call.name, call.error) for call in calls if call.kind == "tool" and call.name != "look") == [
        ("fail", "no"),
        ("hang", None),
    ]
    assert model.requests[1]["messages"] == model.requests[2]["messages"][:6]


@pytest.mark.slow
def test_kill_9_repeats_no_reply_and_no_call_that_was_finished(
    tmp_path: Path, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, log = tmp_path / "tools.py", tmp_path / "log"
    script.write_text(CALLING_TOOLS.format(name="tools", log=str(log)))
    notes = [("note", {"word": "a"}), ("note", {"word": "fail"})]
    model.replies = [Reply(calls=[*notes]), Reply(calls=[("hang", {})]), Reply({"a": "x"})]
    with model.serve() as url:
        monkeypatch.setenv("OLLAMA_BASE_URL", url)
        with serving(script, tmp_path) as server:
            body = {"agent_name": "ask", "inputs": {"q": "?"}, "async_run": True}
            run_id = httpx.post(f"{server.url}/run/flock", json=body).json()["run_id"]
            deadline = time.monotonic() + PATIENCE_S
            while "hang" not in log.read_text():  # another process writes it
                assert time.monotonic() < deadline
                time.sleep(0.02)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        with serving(script, tmp_path) as server:
            run = httpx.get(f"{server.url}/run/{run_id}?wait=50").json()
            assert (run["status"], run["result"]) == ("completed", {"a": "x"})
            assert run["usage"] == {"input_tokens": 30, "output_tokens": 15}
            tools = [call for call in run["steps"][0]["calls"] if call["kind"] == "tool"]
            assert sorted((call["arguments"].get("word", ""), call["result"]) for call in tools) == [
                ("", "ended"),
                ("a", 1),
                ("fail", None),
            ]
    assert sorted(log.read_text().split()) == ["a", "fail", "hang", "hang"]
    assert len(model.requests) == 3


async def test_an_agent_without_tools_stores_no_call(tmp_path: Path, model: FakeModel) -> None:
    """A repaired answer is stored, since another call follows it."""
    model.replies = [Reply({"a": "1"}), Reply("no"), Reply({"a": "2"}), Failure(401), *[Reply("no")] * 3]
    async with flock_of().engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        calls = [await engine.store.calls(await ended(engine), 0) for _ in range(2)]
        assert [[call.call_id for _, call in made] for made in calls] == [[], ["openai_gpt-4o:1"]]
        failed = [await ended(engine) for _ in range(2)]
        assert [run.error_type for run in failed] == ["model_authentication", "invalid_output"]


async def test_the_example_calls_its_function(model: FakeModel) -> None:
    flock = runpy.run_path(str(EXAMPLES / "tools.py"))["flock"]
    model.replies = [Reply(calls=[("stock", {"item": "pot"})]), Reply({"answer": "3"})]
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("clerk", {"question": "How many pots?"})
        run = await engine.wait(run.run_id)
    assert run.status is RunStatus.COMPLETED, run.error
    assert results(model.requests[1]) == ["3"]


# Definitions


def untyped(x):  # type: ignore[no-untyped-def]
    return x


def stream(x: int) -> Any:
    yield x


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ([add, Tool(add)], "There are two tools 'add'. Rename one"),
        ([lambda: 1], "A lambda has no name that a model can call. Use a named function."),
        ([untyped], "untyped: the parameter 'x' needs a type, such as ': str'."),
        ([stream], "is a generator. A tool must return its complete result."),
        ([int], "is not a tool. Pass a typed function"),
        ([5], "is not a tool. Pass a typed function"),
        ([agent(on_interrupt="fail")(add)], "'add' may not be repeated (on_interrupt='fail'), so it cannot be a tool."),
    ],
)
def test_an_invalid_tool_is_an_error_at_the_definition(tools: Any, problem: str) -> None:
    with pytest.raises((DefinitionError, SignatureError)) as raised:
        flock_of(*tools)
    assert problem in str(raised.value)


@pytest.mark.parametrize("tools", ["add", Tool(add), add])
def test_tools_that_are_no_list_are_an_error(tools: Any) -> None:
    with pytest.raises(DefinitionError, match="tools= of 'ask' must be a list, such as"):
        FlockFactory.create_default_agent("ask", input="q", output="a: str", tools=tools)


@pytest.mark.parametrize("name", ["", "a b", "a.b", "ä", "x" * 65, "finish"])
def test_a_name_that_providers_refuse_is_an_error(name: str) -> None:
    with pytest.raises(DefinitionError):
        Tool(add, name=name)


def test_a_function_agent_has_no_tools() -> None:
    with pytest.raises(DefinitionError, match="'add' is a function, so it has no tools="):
        Flock().agent(tools=[add])(add)  # type: ignore[call-overload]


def test_the_defaults_are_those_of_the_documentation() -> None:
    made = flock_of(add).agents["ask"]
    assert isinstance(made, ModelAgent)
    assert (made.max_tool_calls, made.tool_timeout_s) == (10, 60)

"""What a program adds to an agent with a model: checks of answers, and functions in place of texts."""

import inspect
import json
import runpy
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pydantic
import pytest
from msgspec.structs import replace

from flock.agents.hooks import ModelCall, ToolUse
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory, History, data_url
from flock.errors import AgentError, DefinitionError, EngineStopped, RunFailed, SignatureError
from flock.models.completions import Completion
from flock.runs import Engine, RetriedCalls, Run, RunContext, RunStatus, Usage
from flock.testing import Failure, FakeModel, Reply
from flockapi import create_app
from tests.support import EXAMPLES, PATIENCE_S
from tests.support.engines import OpenEngine, until_run
from tests.test_files import PNG
from tests.test_secrets import files_in

pytestmark = pytest.mark.anyio


class Draft(msgspec.Struct):
    text: str


def flock_of(output: Any = "text: str", **options: Any) -> Flock:
    flock = Flock("agents", model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("writer", input="q", output=output, **options))
    return flock


async def ended(engine: Engine, agent_name: str = "writer", **options: Any) -> Run:
    run = await engine.submit(agent_name, {"q": "?"}, **options)
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def answered(engine: Engine, answer: bytes) -> Run:
    """Return a run of the writer that has ended after *answer* to its question."""
    run = await engine.submit("writer", {"q": "?"}, is_async=True)
    run = await until_run(engine, run.run_id, lambda run: bool(run.waiting_for))
    await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(answer))
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def run_of(flock: Flock, model: FakeModel, **options: Any) -> Run:
    async with flock.engine(transport=model.transport, **options) as engine:
        return await ended(engine)


# validate=


async def test_a_validator_sends_an_answer_back_and_changes_the_next(open_engine: OpenEngine, model: FakeModel) -> None:
    async def check(draft: Draft, context: RunContext) -> Draft | None:
        if "!" in draft.text:
            raise AgentError(f"{context.agent_name} must be calm.")
        return Draft(draft.text.upper())

    model.replies = [{"text": "hi!"}, {"text": "hi"}]
    async with open_engine(flock_of(Draft, validate=check), transport=model.transport) as engine:
        run = await ended(engine)
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"text": "HI"}), run.error
    assert model.requests[1].text.startswith("That answer cannot be used. writer must be calm.")


async def test_a_validator_of_an_agent_with_a_string_gets_a_dict_which_it_may_change(model: FakeModel) -> None:
    def check(answer: dict[str, Any]) -> None:
        answer["text"] += "."

    model.replies = [{"reasoning": "easy", "text": "hi"}]
    assert (await run_of(flock_of(validate=check, reasoning=True), model)).value == {"text": "hi."}


async def test_the_model_may_call_tools_again_after_a_validator(model: FakeModel) -> None:
    def look_up(name: str) -> str:
        return "42"

    def check(answer: dict[str, Any]) -> None:
        if answer["text"] != "42":
            raise AgentError("Look it up.")

    model.replies = [{"text": "7"}, Reply(calls=[("look_up", {"name": "x"})]), {"text": "42"}]
    assert (await run_of(flock_of(validate=check, tools=[look_up]), model)).value == {"text": "42"}
    assert [request.tool_names for request in model.requests] == [["look_up"]] * 3


async def test_a_validator_that_never_accepts_fails_the_run_with_its_reason(model: FakeModel) -> None:
    def check(answer: dict[str, Any]) -> None:
        raise AgentError("Never.")

    model.replies = [{"text": "a"}] * 3
    run = await run_of(flock_of(validate=check), model)
    assert run.error_type == "invalid_output"
    assert run.error == "The model's answers did not match the output of 'writer' in 3 attempts: Never."


async def test_a_validator_that_raises_hangs_or_returns_nonsense_fails_the_run(model: FakeModel) -> None:
    async def hangs(answer: Any) -> None:
        await anyio.sleep_forever()

    def hangs_in_a_thread(answer: Any) -> None:
        time.sleep(0.3)

    late = "validate= of 'writer' did not end within 0.05 s (tool_timeout_s)."
    cases: list[tuple[Any, float, str, str]] = [
        (lambda answer: 1 / 0, 60, "agent_exception", "ZeroDivisionError"),
        (hangs, 0.05, "call_error", late),
        (hangs_in_a_thread, 0.05, "call_error", late),
        (lambda answer: {"text": 1}, 60, "invalid_output", "validate= of 'writer' returned a result that does not"),
    ]
    for validate, timeout_s, error_type, words in cases:
        model.replies = [{"text": "a"}]
        run = await run_of(flock_of(validate=validate, tool_timeout_s=timeout_s), model)
        assert (run.status, run.error_type) == (RunStatus.FAILED, error_type)
        assert words in (run.error or "")


@pytest.mark.parametrize("validate", ["check", Draft, lambda: None, lambda a, b, c: None])
def test_a_validator_that_cannot_be_called_is_an_error_at_the_definition(validate: Any) -> None:
    with pytest.raises(DefinitionError, match="validate= of 'writer' must be a function"):
        flock_of(validate=validate)


async def test_a_step_that_runs_again_does_not_validate_again(open_engine: OpenEngine, model: FakeModel) -> None:
    """It asks a person in the second check."""
    checks: list[str] = []

    async def check(answer: dict[str, Any], context: RunContext) -> None:
        checks.append(answer["text"])
        if answer["text"] == "a":
            raise AgentError("Longer.")
        if not await context.ask("Is it good?", bool):
            raise AgentError("No.")

    model.replies = [{"text": "a"}, {"text": "bb"}]
    async with open_engine(flock_of(validate=check), transport=model.transport) as engine:
        run = await engine.submit("writer", {"q": "?"}, is_async=True)
        with anyio.fail_after(PATIENCE_S):
            while not (waiting := await engine.get_run(run.run_id)).waiting_for:  # noqa: ASYNC110
                await anyio.sleep(0.02)
            await engine.answer_call(run.run_id, waiting.waiting_for[0].call_id, msgspec.Raw(b"true"))
            run = await engine.wait(run.run_id)
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"text": "bb"}), run.error
    assert checks == ["a", "bb", "bb"], "what comes before the question is executed again in the open call"
    assert len(model.requests) == 2


async def test_a_retry_validates_the_new_answers(model: FakeModel) -> None:
    """The reason why an answer was rejected, and what replaced one, belong to that answer."""
    seen, is_strict = list[str](), True

    def check(answer: dict[str, Any]) -> None:
        seen.append(answer["text"])
        if is_strict:
            raise AgentError("No.")

    model.replies = [{"text": "a"}, {"text": "b"}]
    async with flock_of(validate=check, answer_retries=0).engine(transport=model.transport) as engine:
        run = await ended(engine)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "invalid_output")
        is_strict = False
        await engine.retry_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, seen) == ({"text": "b"}, ["a", "b"]), run.error


# instructions= as a function


async def test_instructions_may_be_a_function_which_is_called_for_each_call_of_the_model(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    numbers = iter(range(9))

    async def instructions(context: RunContext) -> str:
        return f"You work for {context.session_id}, {next(numbers)}."

    model.replies = [{"wrong": 1}, {"text": "a"}]
    async with open_engine(flock_of(instructions=instructions), transport=model.transport) as engine:
        run = await ended(engine, session_id="ann")
        calls = (await engine.get_calls(run))[0]
    assert run.status is RunStatus.COMPLETED, run.error
    texts = [f"You work for ann, {number}." for number in range(2)]
    assert [request["messages"][0]["content"] for request in model.requests] == [
        f"You are writer.\n{text}" for text in texts
    ]
    assert [msgspec.json.decode(call.result)["instructions"] for call in calls] == texts


async def test_instructions_of_a_conversation_may_be_a_function(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = Flock("chat", model="openai/gpt-4o")
    options: dict[str, Any] = {"input": "messages: Messages", "output": "reply: str"}
    agent = FlockFactory.create_default_agent("chat", instructions=lambda context: "Be brief.", **options)
    flock.add_agent(agent)
    model.replies = [{"reply": "Hi."}]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await engine.submit("chat", {"messages": [{"role": "user", "content": "Hi!"}]})
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert model.requests[0]["messages"][0]["content"].startswith("You are chat.\nBe brief.\n\nDetermine:")


@pytest.mark.parametrize(
    ("instructions", "error_type", "words"),
    [
        (lambda: "x" * 1_000_000, "call_error", "instructions= of 'writer' returned 1000000 characters, more than"),
        (lambda: None, "call_error", "instructions= of 'writer' returned NoneType, not a text."),
        (lambda context: 1 / 0, "agent_exception", "ZeroDivisionError"),
    ],
)
async def test_instructions_that_cannot_be_used_fail_the_run_before_the_model_is_paid(
    instructions: Any, error_type: str, words: str, model: FakeModel
) -> None:
    run = await run_of(flock_of(instructions=instructions), model)
    assert (run.status, run.error_type) == (RunStatus.FAILED, error_type)
    assert words in (run.error or "")
    assert model.requests == []


# Options of the model


def look_up(name: str) -> str:
    return f"{name}: 42"


async def test_options_of_an_agent_are_sent_under_the_names_of_the_provider(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    options: Any = {"top_p": 0.5, "max_tokens": 9, "reasoning_effort": "low", "extra_body": {"service_tier": "flex"}}
    model.replies = [{"text": "a"}] * 2
    for name in ("openai/gpt-4o", "openai/o3"):
        flock = flock_of(options=options, temperature=0.1, max_tokens=50, model=name)
        async with open_engine(flock, transport=model.transport) as engine:
            run = await ended(engine)
        assert run.status is RunStatus.COMPLETED, run.error
    first, second = model.requests
    sent = {"top_p": 0.5, "max_completion_tokens": 9, "reasoning_effort": "low", "service_tier": "flex"}
    assert first.items() >= {**sent, "temperature": 0.1}.items()
    assert "extra_body" not in first
    del sent["top_p"]
    assert second.items() >= sent.items()
    assert second.keys().isdisjoint({"temperature", "top_p"}), "a reasoning model rejects them"


@pytest.mark.parametrize("choice", ["required", "look_up"])
async def test_a_choice_of_tools_is_for_the_first_reply(choice: str, open_engine: OpenEngine, model: FakeModel) -> None:
    """Otherwise the model could never answer."""
    model.replies = [Reply(calls=[("look_up", {"name": "x"})]), {"text": "42"}]
    flock = flock_of(tools=[look_up], options={"tool_choice": choice, "parallel_tool_calls": False})
    async with open_engine(flock, transport=model.transport) as engine:
        assert (await ended(engine)).value == {"text": "42"}
    first, second = model.requests
    named = {"type": "function", "function": {"name": "look_up"}}
    assert first["tool_choice"] == ("required" if choice == "required" else named)
    assert "tool_choice" not in second
    assert first["parallel_tool_calls"] is second["parallel_tool_calls"] is False


async def test_a_choice_of_tools_holds_for_a_model_that_calls_them_as_json(model: FakeModel) -> None:
    def other() -> str:
        return ""

    step = {"next_thought": "", "next_tool_name": "look_up", "next_tool_args": {"name": "x"}}
    finish = {"next_thought": "", "next_tool_name": "finish", "next_tool_args": {}}
    model.replies = [Failure(400, message="tools are not supported"), step, finish, {"text": "42"}]
    flock = flock_of(tools=[look_up, other], options={"tool_choice": "look_up"})
    assert (await run_of(flock, model)).value == {"text": "42"}
    names = [
        [step["properties"]["next_tool_name"]["enum"][0] for step in request.schema["anyOf"]]
        for request in model.requests[1:3]
    ]
    assert names == [["look_up"], ["look_up", "other", "finish"]]


async def test_no_tools_are_offered_for_the_choice_none(model: FakeModel) -> None:
    model.replies = [{"text": "a"}]
    assert (await run_of(flock_of(tools=[look_up], options={"tool_choice": "none"}), model)).value == {"text": "a"}
    assert model.requests[0].tool_names == []


@pytest.mark.parametrize(("choice", "tools"), [("look_upp", [look_up]), ("required", [])])
async def test_a_choice_of_a_tool_that_is_missing_fails_the_run(choice: str, tools: Any, model: FakeModel) -> None:
    run = await run_of(flock_of(tools=tools, options={"tool_choice": choice}), model)
    assert (run.error or "").startswith(f"'writer' has no tool for tool_choice='{choice}'.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temprature": 1}, "has an unknown option 'temprature'. Did you mean 'temperature'?"),
        ({"temperature": 3}, "is invalid. /temperature: "),
        ({"extra_body": {"x": object()}}, "is invalid. "),
        ([("seed", 1)], "must be a mapping such as"),
    ],
)
def test_options_that_are_invalid_are_an_error_at_the_definition(options: Any, words: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        flock_of(options=options)
    assert words in str(caught.value)


async def test_a_called_agent_gets_options_for_one_call(open_engine: OpenEngine, model: FakeModel) -> None:
    """The same inputs with other options are another call. What the called agent calls itself does not get them."""
    flock = flock_of(options={"seed": 1}, tools=["helper"])
    named = {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 9, "reasoning_effort": "low"}
    named |= {"extra_body": {"service_tier": "flex"}}
    flock.add_agent(FlockFactory.create_default_agent("helper", input="q", output="text: str"))

    @flock.agent
    async def caller(q: str, context: RunContext) -> list[str]:
        options: list[Any] = [None, {"seed": 2}, {"top_p": 0.5}, named]
        return [(await context.run_agent("writer", {"q": q}, options=each))["text"] for each in options]

    answers = iter("abcd")
    call_helper = Reply(calls=[("helper", {"q": "?"})])
    model.replies = {
        "writer": lambda request: {"text": next(answers)} if request["messages"][-1]["role"] == "tool" else call_helper,
        "helper": {"text": "h"},
    }
    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine, "caller")
        calls = (await engine.get_calls(run))[0]
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"result": ["a", "b", "c", "d"]}), run.error
    sent = [(each.get("seed"), each.get("top_p")) for each in model.requests if each.agent_name == "writer"]
    assert sent == [(1, None)] * 2 + [(2, None)] * 2 + [(1, 0.5)] * 2 + [(1, None)] * 2
    names = ("tool_choice", "parallel_tool_calls", "max_completion_tokens", "reasoning_effort", "service_tier")
    sent_named = [[each.get(name) for name in names] for each in model.requests]
    assert sent_named == [[None, None, None, None, None]] * 9 + [
        ["required", False, 9, "low", "flex"],
        [None, None, None, None, None],
        [None, False, 9, "low", "flex"],
    ]
    assert {each.get("seed") for each in model.requests if each.agent_name == "helper"} == {None}
    assert len({call.call_id for call in calls if call.name == "writer"}) == 4


async def test_options_for_a_call_that_are_invalid_are_an_error() -> None:
    flock = flock_of()

    @flock.agent
    async def caller(q: str, name: str, context: RunContext) -> str:
        options: Any = {"seed": "x"}
        return str(await context.run_agent(name, {"q": q}, options=options))

    @flock.agent
    def plain(q: str) -> str:
        return q

    async with flock.engine() as engine:
        for name, words in {"plain": "'plain' is a function", "writer": "options= for 'writer' is invalid."}.items():
            run = await engine.submit("caller", {"q": "?", "name": name})
            run = await engine.wait(run.run_id)
            assert run.error_type == "call_error"
            assert words in (run.error or "")


# state=


class Pool:
    def __init__(self) -> None:
        self.is_open = False
        self.used = 0
        self.password = "hunter2"

    @asynccontextmanager
    async def opened(self) -> AsyncIterator["Pool"]:
        self.is_open = True
        yield self
        self.is_open = False


async def test_the_state_is_open_while_the_engine_is_and_never_stored(
    open_engine: OpenEngine, model: FakeModel, tmp_path: Path
) -> None:
    pool = Pool()
    flock = Flock("state", model="openai/gpt-4o", state=pool.opened)

    def look_up(name: str, context: RunContext[Pool]) -> str:
        context.state.used += 1
        return name

    flock.add_agent(FlockFactory.create_default_agent("writer", input="q", output="text: str", tools=[look_up]))

    @flock.agent
    async def caller(q: str, context: RunContext[Pool]) -> bool:
        context.state.used += 1
        await context.run_agent("writer", {"q": q})
        return context.state.is_open

    model.replies = [Reply(calls=[("look_up", {"name": "x"})]), {"text": "a"}]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine, "caller")
        assert (run.status, run.value) == (RunStatus.COMPLETED, {"result": True}), run.error
        stored = msgspec.json.encode((run, (await engine.get_calls(run))[0]))
    seen = stored.decode() + "".join(files_in(tmp_path))
    assert "look_up" in seen
    assert [word in seen for word in ("Pool", "hunter2", "password")] == [False] * 3
    assert (pool.used, pool.is_open) == (2, False)


async def test_a_function_of_a_call_gets_the_context_with_its_state() -> None:
    """A parameter of the type ``RunContext[Pool]`` is not an argument, so it identifies no call."""
    pool = Pool()
    flock = Flock("state", state=pool)

    async def look_up(name: str, context: RunContext[Pool]) -> str:
        context.state.used += 1
        return f"{name} for {context.agent_name}"

    @flock.agent
    async def caller(q: str, context: RunContext[Pool]) -> str:
        return str(await context.call(look_up, q))

    async with flock.engine() as engine:
        run = await ended(engine, "caller")
        [call] = (await engine.get_calls(run))[0]
    assert (run.value, pool.used) == ({"result": "? for caller"}, 1), run.error
    assert bytes(call.arguments) == b'{"name":"?"}'


async def test_the_state_is_that_of_the_lifespan_of_an_app() -> None:
    pool = Pool()
    flock = Flock("state", state=pool.opened)
    app = create_app(flock, auth="host", store=":memory:")
    assert not pool.is_open
    async with app.lifespan():
        assert pool.is_open
    assert not pool.is_open


async def test_a_state_that_is_used_too_late_is_an_error(open_engine: OpenEngine) -> None:
    kept: list[RunContext] = []
    flock = Flock("state", state="value")

    @flock.agent
    async def keep(q: str, context: RunContext) -> str:
        kept.append(context)
        return str(context.state)

    async with open_engine(flock) as engine:
        assert (await ended(engine, "keep")).value == {"result": "value"}
    with pytest.raises(EngineStopped, match="state of the flock is closed"):
        kept[0].state  # noqa: B018


async def test_a_flock_without_a_state_says_so() -> None:
    flock = Flock("state")

    @flock.agent
    async def read(context: RunContext) -> str:
        return str(context.state)

    with pytest.raises(RunFailed, match=r"This flock has no state. Pass Flock\(state=…\)."):
        await flock.run_async("read")


async def test_a_state_that_cannot_be_set_up_ends_the_start() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise OSError("no database")
        yield

    for state, error in ((broken, OSError), (dict, DefinitionError)):
        with pytest.raises(error):
            async with Flock("state", state=state).engine():
                pass
    with pytest.raises(DefinitionError, match="Decorate it with @asynccontextmanager"):
        Flock("state", state=inspect.unwrap(broken))


# history=


async def turn(engine: Engine, q: str) -> Run:
    run = await engine.submit("writer", {"q": q}, session_id="s")
    with anyio.fail_after(PATIENCE_S):
        run = await engine.wait(run.run_id)
    assert run.status is RunStatus.COMPLETED, run.error
    return run


def seen(model: FakeModel) -> list[str]:
    """Return the messages of the last request, without those of the system and of this turn, each in short."""
    shown = []
    for message in model.requests[-1]["messages"][1:-1]:
        names = [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", ())]
        shown.append(" ".join([message["role"], message["content"].partition("\n")[0], *names]).strip())
    return shown


async def test_the_next_turn_sees_the_calls_of_tools_and_their_results(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    """Arguments of a tool with secrets are left out. A call that a person has denied has no result."""

    def pay(amount: int, pin: str) -> str:
        raise AgentError("no money")

    long = "x" * 10_000

    def find(name: str) -> str:
        return long

    tools = [find, Tool(pay, secret=["pin"]), "helper"]
    calls = [("find", {"name": "x"}), ("pay", {"amount": 1, "pin": "0000"}), ("nothing", {}), ("helper", {"q": "?"})]
    writers: list[Any] = [Reply(calls=calls), {"text": "a"}, {"text": "b"}]
    model.replies = {"writer": writers, "helper": [Reply(calls=[("find", {"name": "y"})]), {"text": "h"}]}
    flock = flock_of(tools=tools, history=History(turns=5, calls=True))
    flock.add_agent(FlockFactory.create_default_agent("helper", input="q", output="text: str", tools=[find]))
    async with open_engine(flock, transport=model.transport) as engine:
        await turn(engine, "one")
        await turn(engine, "two")
    assert seen(model) == [
        'user {"q": "one"}',
        'assistant  find{"name": "x"} pay{} nothing{} helper{"q": "?"}',
        f"tool {long}",
        "tool Error: no money",
        "tool It was not called.",
        'tool {"text":"h"}',
        'assistant {"text":"a"}',
    ]


async def test_a_file_after_a_history_with_calls_is_sent_also_if_they_are_text(model: FakeModel) -> None:
    """A model gets calls as text when it may call no tool, such as after an invalid answer."""
    model.replies = [Reply(calls=[("find", {"name": "a"})]), {"text": "1"}, {"wrong": 1}, {"text": "2"}]
    flock = Flock(model="openai/gpt-4o")
    made = FlockFactory.create_default_agent(
        "writer", input="photo: Image", output="text", tools=[find_nothing], history=History(calls=True)
    )
    flock.add_agent(made)
    photo = {"photo": data_url(PNG)}
    async with flock.engine(transport=model.transport) as engine:
        for _ in range(2):
            run = await engine.wait((await engine.submit("writer", photo, session_id="s")).run_id)
            assert run.status is RunStatus.COMPLETED, run.error
    last = model.requests[-1]["messages"]
    assert [message["role"] for message in last].count("tool") == 0
    images = [part for message in last for part in message["content"] if isinstance(part, dict) and "image_url" in part]
    assert len(images) == 1


def find_nothing(name: str) -> str:
    return "nothing"


async def test_the_history_has_only_the_calls_that_a_retry_has_kept(open_engine: OpenEngine, model: FakeModel) -> None:
    """The step of the writer ends in the second try, and that of the reader behind it in the fourth."""

    def find(name: str) -> str:
        return f"found {name}"

    def calls(*names: str) -> list[Reply]:
        return [Reply(calls=[("find", {"name": name})]) for name in names]

    failure = Failure(400)
    writers = [*calls("a", "b"), failure, *calls("c"), {"text": "w"}, {"text": "w2"}]
    readers = [*calls("d"), failure, *calls("e"), failure, *calls("f"), {"text": "r"}, {"text": "r2"}]
    model.replies = {"writer": writers, "reader": readers}
    options: dict[str, Any] = {"tools": [find], "history": History(calls=True)}
    flock = flock_of(next_agent="reader", **options)
    flock.add_agent(FlockFactory.create_default_agent("reader", input="text", output="text: str", **options))
    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine, session_id="s")
        calls_of_retries: list[RetriedCalls] = ["again", "again", "keep"]
        for kept in calls_of_retries:
            assert run.status is RunStatus.FAILED
            await engine.retry_run(run.run_id, calls=kept)
            run = await engine.wait(run.run_id)
        assert run.error is None
        await turn(engine, "two")
    shown = [message["content"] for request in model.requests[-2:] for message in request["messages"]]
    assert [text for text in shown if text.startswith("found")] == ["found c", "found e", "found f"]


async def test_the_oldest_turns_beyond_the_tokens_are_left_out_whole(open_engine: OpenEngine, model: FakeModel) -> None:
    model.replies = lambda request: {"text": "a" * 400}
    flock = flock_of(history=History(turns=9, max_tokens=400))
    async with open_engine(flock, transport=model.transport) as engine:
        for q in ("one", "two", "three", "four"):
            await turn(engine, q)
    assert [text for text in seen(model) if text.startswith("user")] == ['user {"q": "two"}', 'user {"q": "three"}']


async def test_an_edited_history_is_kept_for_the_session(open_engine: OpenEngine, model: FakeModel) -> None:
    edits: list[list[str]] = []

    async def summarise(messages: list[dict[str, Any]], context: RunContext) -> list[dict[str, Any]]:
        edits.append([message["content"].partition("\n")[0] for message in messages])
        found = await context.run_agent("summary", {"n": len(messages)})
        return [{"role": "user", "content": found["text"]}]

    flock = flock_of(history=History(edit=summarise))
    flock.add_agent(FlockFactory.create_default_agent("summary", input="n: int", output="text: str"))
    answers, summaries = iter("abc"), iter(["S1", "S2"])
    model.replies = {
        "writer": lambda request: {"text": next(answers)},
        "summary": lambda request: {"text": next(summaries)},
    }
    async with open_engine(flock, transport=model.transport) as engine:
        for q in ("one", "two", "three"):
            await turn(engine, q)
    assert edits == [['{"q": "one"}', '{"text":"a"}'], ["S1", '{"q": "two"}', '{"text":"b"}']]
    [message] = model.requests[-1]["messages"][1:]
    assert message["content"].startswith('S2\n\n{"q": "three"}'), (
        "many models allow no two messages of the user in a row"
    )


@pytest.mark.parametrize(
    ("edited", "words"),
    [
        ([{"role": "system", "content": "x"}], "message 0 has the role 'system'"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "message 0 has the role 'tool'"),
        ("all", "returned what is not a list of messages"),
        (None, "returned what is not a list of messages"),
        (
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}],
                },
                {"role": "user", "content": "x"},
            ],
            "a call of a tool has no result",
        ),
    ],
)
async def test_a_history_that_is_not_a_conversation_fails_the_run(edited: Any, words: str, model: FakeModel) -> None:
    model.replies = [{"text": "a"}]
    async with flock_of(history=History(edit=lambda messages: edited)).engine(transport=model.transport) as engine:
        await turn(engine, "one")
        run = await ended(engine, session_id="s")
    assert run.error_type == "call_error"
    assert words in (run.error or "")


@pytest.mark.parametrize("options", [{"turns": 0}, {"turns": None}, {"max_tokens": 0}, {"max_tokens": True}])
def test_a_history_that_is_invalid_is_an_error_at_the_definition(options: Any) -> None:
    with pytest.raises(DefinitionError, match="must be a whole number from 1"):
        History(**options)
    with pytest.raises(DefinitionError, match=r"edit= of the history of 'writer' must be a function"):
        flock_of(history=History(edit=lambda: None))


# A union as an output


class Refund(msgspec.Struct):
    amount: int
    parts: list["Refund"] = []


class Question(msgspec.Struct):
    text: str


class RefundModel(pydantic.BaseModel):
    amount: int = pydantic.Field(ge=1)
    parts: list["RefundModel"] = []


class QuestionModel(pydantic.BaseModel):
    text: str


class TypedModel(pydantic.BaseModel):
    type: str


@pytest.mark.parametrize(
    ("union", "types"),
    [(Refund | Question, (Refund, Question)), (RefundModel | QuestionModel, (RefundModel, QuestionModel))],
)
async def test_an_output_may_be_one_of_several_types(
    union: Any, types: tuple[Any, Any], open_engine: OpenEngine, model: FakeModel
) -> None:
    refund, question = types
    checked: list[Any] = []

    def check(answer: Any) -> Any:
        checked.append(answer)
        return refund(amount=answer.parts[0].amount + 3, parts=answer.parts) if isinstance(answer, refund) else None

    model.replies = [
        {"result": {"type": "Other"}},
        {"result": {"type": question.__name__, "text": "Which one?"}},
        {"result": {"type": refund.__name__, "amount": 3, "parts": [{"amount": 1, "parts": [{"amount": 2}]}]}},
    ]
    async with open_engine(flock_of(union, validate=check), transport=model.transport) as engine:
        first, second = await ended(engine), await ended(engine)
    assert first.value == {"result": {"type": question.__name__, "text": "Which one?"}}, first.error
    parts = [{"amount": 1, "parts": [{"amount": 2, "parts": []}]}]
    assert (second.value or {})["result"] == {"type": refund.__name__, "amount": 4, "parts": parts}, second.error
    assert [isinstance(value, type_) for value, type_ in zip(checked, (question, refund), strict=True)] == [True, True]
    format_ = model.requests[0]["response_format"]["json_schema"]
    members = format_["schema"]["properties"]["result"]["anyOf"]
    assert [next(iter(member["properties"])) for member in members] == ["type", "type"], "the first one decides"
    tags = [member["properties"]["type"] for member in members]
    assert sorted(tag.get("const") or tag["enum"][0] for tag in tags) == [question.__name__, refund.__name__]


@pytest.mark.parametrize(("union", "refund"), [(Refund | Question, Refund), (RefundModel | QuestionModel, RefundModel)])
async def test_a_union_may_have_examples_and_reasoning(union: Any, refund: Any, model: FakeModel) -> None:
    answer = {"result": {"type": refund.__name__, "amount": 3}}
    model.replies = [{"reasoning": "It is broken.", **answer}]
    flock = flock_of(union, reasoning=True, examples=[({"q": "?"}, refund(amount=1))])
    run = await run_of(flock, model)
    assert (run.value or {})["result"].items() >= answer["result"].items(), run.error
    [sent] = model.requests
    assert f'"type":"{refund.__name__}"' in sent["messages"][2]["content"]
    assert list(sent.schema["properties"]) == ["reasoning", "result"]
    assert next(iter(sent.schema["properties"]["result"]["anyOf"][0]["properties"])) == "type"


def test_a_union_whose_members_cannot_be_told_apart_is_an_error() -> None:
    other = msgspec.defstruct("Question", [("a", int)])
    typed = msgspec.defstruct("Typed", [("type", str)])
    for union, words in (
        (Question | other, "have the same name"),
        (Question | typed, "needs a tag in a union"),
        (QuestionModel | TypedModel, "TypedModel has a field 'type', which has the name of the type here"),
        (Question | QuestionModel, "must be structs of msgspec, or models of pydantic"),
        (Question | None, "must be structs of msgspec, or models of pydantic"),
        (str | int, "must be structs of msgspec, or models of pydantic"),
    ):
        with pytest.raises(SignatureError, match=words):
            flock_of(union)


# Hooks


async def test_a_hook_changes_the_request_and_the_answer(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = flock_of(tools=[look_up])
    seen_tools: list[Any] = []

    @flock.on_model_call
    async def redact(call: ModelCall, ask: Any, context: RunContext) -> Completion:
        call.messages = [replace(each, content=each.content.replace("?", "!")) for each in call.messages]
        seen_tools.append((context.agent_name, call.tools))
        reply: Completion = await ask(call)
        return reply

    @flock.on_model_call
    async def hot(call: ModelCall, ask: Any) -> Completion:
        call.options["temperature"] = 1
        reply: Completion = await ask()
        return reply

    @flock.on_tool_call
    async def loud(use: ToolUse, call: Any, context: RunContext) -> str:
        use.arguments["name"] = use.arguments["name"].upper()
        return f"{await call(use)} for {context.agent_name}"

    model.replies = [Reply(calls=[("look_up", {"name": "x"})]), {"text": "x: ?"}]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine)
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"text": "x: ?"}), run.error
    first, second = model.requests
    assert first.text.startswith('{"q": "!"}')
    assert first["temperature"] == second["temperature"] == 1
    assert second["messages"][-1]["content"] == "X: 42 for writer"
    assert seen_tools == [("writer", ["look_up"])] * 2


async def test_a_hook_replaces_or_refuses_the_answer(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = flock_of()

    @flock.on_model_call
    async def guard(call: ModelCall, ask: Any) -> str:
        if "secret" in call.messages[-1].content:
            raise AgentError("That is secret.")
        return '{"text": "from the hook"}'

    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine)
        assert (run.value, run.usage) == ({"text": "from the hook"}, None)
        run = await engine.wait((await engine.submit("writer", {"q": "secret"})).run_id)
    assert (run.error, run.error_type) == ("That is secret.", "agent_error")
    assert model.requests == []


async def test_a_hook_may_call_an_agent(open_engine: OpenEngine, model: FakeModel) -> None:
    """The hook is around the calls of that agent too, so it leaves them alone."""
    flock = flock_of()
    flock.add_agent(FlockFactory.create_default_agent("guard", input="text", output="is_safe: bool"))

    @flock.on_model_call
    async def check(call: ModelCall, ask: Any, context: RunContext) -> Completion:
        reply: Completion = await ask()
        if context.agent_name == "writer" and not (await context.run_agent("guard", {"text": reply.text}))["is_safe"]:
            raise AgentError("That is not safe.")
        return reply

    safe = iter([True, False])
    model.replies = {"writer": lambda request: {"text": "a"}, "guard": lambda request: {"is_safe": next(safe)}}
    async with open_engine(flock, transport=model.transport) as engine:
        first, second = await ended(engine), await ended(engine)
    assert (first.value, second.error) == ({"text": "a"}, "That is not safe."), first.error
    assert [request.agent_name for request in model.requests] == ["writer", "guard"] * 2


async def test_all_that_a_hook_asks_is_paid_for(model: FakeModel) -> None:
    flock = flock_of()

    @flock.on_model_call
    async def second_opinion(call: ModelCall, ask: Any) -> Completion:
        await ask()
        reply: Completion = await ask()
        return reply

    model.replies = [{"text": "a"}, {"text": "b"}]
    run = await run_of(flock, model)
    assert run.value == {"text": "b"}
    assert run.usage is not None
    assert run.usage.input_tokens == 20
    first, second = [request.headers["idempotency-key"] for request in model.requests]
    assert second == f"{first}/again2"


async def test_a_hook_that_fails_or_returns_nonsense_fails_the_run_and_blocking_is_logged(
    model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    flock = flock_of()
    returned: list[Any] = [None]

    @flock.on_model_call
    async def odd(call: ModelCall, ask: Any) -> Any:
        time.sleep(0.15)  # noqa: ASYNC251 - that is what is logged
        return returned[0]

    run = await run_of(flock, model)
    assert run.error == "The hook 'odd' (on_model_call) returned NoneType. Return what the call returns, or a text."
    assert "The hook 'odd' (on_model_call) has blocked the event loop for 0." in caplog.text


async def test_an_error_of_a_hook_around_a_tool_is_read_by_the_model(model: FakeModel) -> None:
    flock = flock_of(tools=[look_up])

    @flock.on_tool_call
    async def forbid(use: ToolUse, call: Any) -> Any:
        if use.arguments["name"] == "y":
            return await call(ToolUse(name=use.name, arguments={}))
        raise AgentError(f"{use.name} is closed.")

    calls = [("look_up", {"name": "x"}), ("look_up", {"name": "y"})]
    model.replies = [Reply(calls=calls), {"text": "a"}]
    run = await run_of(flock, model)
    assert run.status is RunStatus.COMPLETED, run.error
    texts = [message["content"] for message in model.requests[1]["messages"] if message["role"] == "tool"]
    assert texts[0] == "Error: look_up is closed."
    assert texts[1].startswith("Error: ")


async def test_a_reply_that_a_hook_shows_to_a_person_is_paid_once(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = flock_of()

    @flock.on_model_call
    async def shown(call: ModelCall, ask: Any, context: RunContext) -> Completion:
        reply: Completion = await ask()
        if not await context.ask(f"Send {reply.text}?", bool):
            raise AgentError("No.")
        return reply

    model.replies = [{"text": "a"}]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await answered(engine, b"true")
    assert (run.value, len(model.requests)) == ({"text": "a"}, 1), run.error
    assert run.usage is not None
    assert run.usage.input_tokens == 10


async def test_a_hook_changes_the_limit_of_tokens(model: FakeModel) -> None:
    flock = flock_of(max_tokens=700)
    seen = list[Any]()

    @flock.on_model_call
    async def short(call: ModelCall, ask: Any) -> Completion:
        seen.append(call.options["max_tokens"])
        call.options["max_tokens"] = 50
        reply: Completion = await ask()
        return reply

    model.replies = [{"text": "a"}]
    await run_of(flock, model)
    (request,) = model.requests
    assert (seen, request["max_completion_tokens"]) == ([700], 50)


@pytest.mark.parametrize("hook", [lambda call, ask: None, "hook", ModelCall])
def test_a_hook_must_be_an_async_function(hook: Any) -> None:
    for add in (Flock().on_model_call, Flock().on_tool_call):
        with pytest.raises(DefinitionError, match="The hook"):
            add(hook)


async def test_a_step_that_runs_again_reads_what_a_hook_has_replaced(open_engine: OpenEngine, model: FakeModel) -> None:
    flock = flock_of(tools=[Tool(look_up, needs_approval=True)])
    names: list[str] = []

    @flock.on_model_call
    async def replaced(call: ModelCall, ask: Any) -> Completion:
        reply: Completion = await ask()
        names.append(reply.tool_calls[0].function.name if reply.tool_calls else "answer")
        return reply

    @flock.on_tool_call
    async def instead(use: ToolUse, call: Any) -> str:
        names.append(use.name)
        return "7"

    model.replies = [Reply(calls=[("look_up", {"name": "x"})]), {"text": "a"}]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await answered(engine, b'{"approved":true}')
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"text": "a"}), run.error
    assert names == ["look_up", "look_up", "answer"]
    assert model.requests[-1].text == "7"


# Prompt caching


@pytest.mark.parametrize(("name", "is_marked"), [("openrouter/anthropic/claude-x", True), ("openrouter/gpt-4o", False)])
def test_the_stable_beginning_of_a_prompt_is_marked_for_the_cache(name: str, is_marked: bool) -> None:
    def look_up(name: str) -> str:
        return "42"

    flock = flock_of(model=name, tools=[look_up], examples=[({"q": "a"}, {"text": "b"})])
    usage = Usage(input_tokens=100, output_tokens=5, cached_tokens=90)
    with FakeModel([Reply(calls=[("look_up", {"name": "x"})]), Reply({"text": "a"}, usage=usage)]) as model:
        flock.run("writer", {"q": "?"})
    first, second = [request["messages"] for request in model.requests]
    assert [isinstance(message["content"], list) and message["role"] for message in first] == (
        ["system", False, False, "user"] if is_marked else [False] * 4
    )
    assert [isinstance(message["content"], list) for message in second] == [is_marked] + [False] * 5
    assert first[:3] == second[:3], "what is stable is sent again as it was"
    if is_marked:
        [part] = model.requests[0]["messages"][0]["content"]
        assert part["cache_control"] == {"type": "ephemeral"}
        assert model.requests[0].text.startswith('{"q": "?"}')


async def test_the_next_turn_of_a_conversation_begins_with_the_messages_of_the_last_one(model: FakeModel) -> None:
    """So a provider reads them from its cache."""
    model.replies = [{"text": text} for text in "abc"]
    async with flock_of(history=History()).engine(transport=model.transport) as engine:
        for q in ("one", "two", "three"):
            await turn(engine, q)
    first, second, third = [request["messages"] for request in model.requests]
    assert (len(first), len(second), len(third)) == (2, 4, 6)
    assert first[0] == second[0]
    assert second[:3] == third[:3]


# The examples of retrieval


async def test_the_example_searches_text() -> None:
    flock = runpy.run_path(str(EXAMPLES / "search_text.py"))["flock"]
    call = Reply(calls=[("search", {"words": 'return "my" cup AND NOT ('}), ("search", {"words": "!"})])
    answer = {"answer": "Within 30 days.", "sources": ["returns"]}
    with FakeModel([call, answer]) as model:
        assert await flock.run_async("clerk", {"question": "May I return it?"}) == answer
    found, nothing = [each["content"] for each in model.requests[1]["messages"] if each["role"] == "tool"]
    assert [each["name"] for each in msgspec.json.decode(found)][:2] == ["returns", "care"]
    assert nothing == "[]"


async def test_the_example_searches_by_meaning() -> None:
    """The fake provider embeds a text as whether it is about shipping."""

    def embed(request: httpx.Request) -> httpx.Response:
        vectors = [[float("ship" in text), float("ship" not in text)] for text in json.loads(request.content)["input"]]
        return httpx.Response(200, json={"data": [{"embedding": vector} for vector in vectors]})

    names = runpy.run_path(str(EXAMPLES / "search_meaning.py"))
    flock = names["flock"]
    async with httpx.AsyncClient(transport=httpx.MockTransport(embed), base_url="http://fake") as client:
        flock.shared.state = names["Library"](client)
        with FakeModel([Reply(calls=[("search", {"question": "do you ship?"})]), {"answer": "Yes."}]) as model:
            assert await flock.run_async("clerk", {"question": "Do you ship?"}) == {"answer": "Yes."}
    assert msgspec.json.decode(model.requests[1].text)[0].startswith("We ship to Sweden")

"""What a program adds to an agent with a model: checks of answers, and functions in place of texts."""

import time
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock, FlockFactory
from flock.errors import AgentError, DefinitionError
from flock.runs import Engine, Run, RunContext, RunStatus
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine

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

    cases: list[tuple[Any, str, str]] = [
        (lambda answer: 1 / 0, "agent_exception", "ZeroDivisionError"),
        (hangs, "call_error", "validate= of 'writer' did not end within 0.05 s (tool_timeout_s)."),
        (hangs_in_a_thread, "call_error", "validate= of 'writer' did not end within 0.05 s (tool_timeout_s)."),
        (lambda answer: {"text": 1}, "invalid_output", "validate= of 'writer' returned a result that does not match."),
    ]
    for validate, error_type, words in cases:
        model.replies = [{"text": "a"}]
        run = await run_of(flock_of(validate=validate, tool_timeout_s=0.05), model)
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


async def test_instructions_of_a_conversation_may_be_a_function(model: FakeModel) -> None:
    flock = Flock("chat", model="openai/gpt-4o")
    options: dict[str, Any] = {"input": "messages: Messages", "output": "reply: str"}
    agent = FlockFactory.create_default_agent("chat", instructions=lambda context: "Be brief.", **options)
    flock.add_agent(agent)
    model.replies = [{"reply": "Hi."}]
    async with flock.engine(transport=model.transport) as engine:
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

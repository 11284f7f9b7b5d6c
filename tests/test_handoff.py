"""Which agent is next, its inputs, and hand-offs through a whole flock."""

import enum
import re
from typing import Any, Literal, NotRequired, TypedDict

import msgspec
import pytest
from msgspec.structs import replace

from flock.agents.handoff import columns_of, inputs_for, next_agent, result_names
from flock.core import Flock, FlockFactory, agent
from flock.errors import DefinitionError, InvalidHandoff, RunFailed, TooManySteps
from flock.runs import Run, RunStatus, Step, events_after, now
from flock.testing import FakeModel, Reply
from tests.support.flocks import sample_flock
from tests.support.models import usage_of_gpt_4o

pytestmark = pytest.mark.anyio


def run_of(agent_name: str, *steps: Step, **inputs: Any) -> Run:
    return Run(run_id="r", flock="f", agent_name=agent_name, inputs=raw(inputs), created_at=now(), steps=steps)


def step_of(agent_name: str, next_agent: str | None, **result: Any) -> Step:
    return Step(agent_name=agent_name, result=raw(result), next_agent=next_agent, started_at=now(), completed_at=now())


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


# The planner


def test_the_first_step_gets_the_inputs_of_the_run() -> None:
    run = run_of("add", a=1)
    agent = next_agent(run, sample_flock().agents, 32)
    assert agent is not None
    assert agent.name == "add"
    assert msgspec.json.decode(inputs_for(agent, run)) == {"a": 1}


def test_a_run_ends_after_a_step_without_a_next_agent() -> None:
    assert next_agent(run_of("add", step_of("add", None, result=3), a=1), sample_flock().agents, 32) is None


def test_inputs_come_from_all_earlier_values_and_the_latest_wins() -> None:
    steps = [step_of("x", "y", a=2, other=1), step_of("y", "add", a=3, unrelated=1)]
    run = run_of("x", *steps, a=1, b=10)
    agent = next_agent(run, sample_flock().agents, 32)
    assert agent is not None
    assert msgspec.json.decode(inputs_for(agent, run)) == {"a": 3, "b": 10}


def test_an_unknown_next_agent_is_reported_with_the_path() -> None:
    with pytest.raises(InvalidHandoff, match=r"no agent 'gone' to hand off to \(add → gone\). Known agents: text_a"):
        next_agent(run_of("add", step_of("add", "gone", result=3), a=1), sample_flock().agents, 32)


def test_a_loop_is_stopped_and_reported_with_the_path() -> None:
    steps = [step_of("add", "add", result=3)] * 4
    with pytest.raises(TooManySteps, match=r"after 4 steps.*add → add → add → add → add"):
        next_agent(run_of("add", *steps, a=1), sample_flock().agents, 4)


def test_no_step_starts_after_the_last_one() -> None:
    """On a cluster, a run is still running for a moment after its last step."""
    run = replace(run_of("add", step_of("add", None, result=3), a=1), status=RunStatus.RUNNING, started_at=now())
    assert [event.name for event in events_after(run)] == ["run.started", "step.started", "step.completed"]


# Hand-offs


async def test_the_result_comes_from_the_last_agent(model: FakeModel) -> None:
    """A model agent hands off to a function by name. The function gets the run's inputs and the model's answer."""
    flock = sample_flock()
    flock.agents["text_analyzer"].next_agent = "report"

    @flock.agent
    def report(text: str, sentiment: str, note: str = "none") -> str:
        return f"{text} is {sentiment}, note {note}"

    model.replies = [Reply({"sentiment": "good", "keywords": ["sun"]})]
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("text_analyzer", raw({"text": "Sun"}))
        run = await engine.wait(run.run_id)
    assert run.result is not None
    assert msgspec.json.decode(run.result) == {"result": "Sun is good, note none"}
    assert [(step.agent_name, step.next_agent) for step in run.steps] == [
        ("text_analyzer", "report"),
        ("report", None),
    ]


@agent
def loud(text: str) -> str:
    return text.upper()


@agent
def quiet(text: str) -> str:
    return text.lower()


async def choose_later(result: dict[str, Any]) -> str:
    return "loud"


@pytest.mark.parametrize(
    ("next_agent", "expected"),
    [
        pytest.param("loud", "HELLO", id="a name"),
        pytest.param(lambda result: "loud" if result["big"] else "quiet", "HELLO", id="a function that returns a name"),
        pytest.param(lambda result: quiet, "hello", id="a function that returns an agent"),
        pytest.param(lambda result: None, True, id="a function that returns None"),
        pytest.param(choose_later, "HELLO", id="an async function"),
        pytest.param(loud, "HELLO", id="an agent"),
    ],
)
async def test_next_agent_is_a_name_or_a_function_of_the_result(next_agent: Any, expected: Any) -> None:
    flock = Flock()
    flock.add_agent(loud)
    flock.add_agent(quiet)

    @flock.agent(output="big: bool", next_agent=next_agent)
    def measure(text: str) -> dict[str, bool]:
        return {"big": len(text) > 3}

    assert list((await flock.run_async("measure", {"text": "Hello"})).values()) == [expected]


def raises(result: dict[str, Any]) -> str:
    raise LookupError("no")


@pytest.mark.parametrize(
    ("next_agent", "error_type", "words"),
    [
        pytest.param("gone", "invalid_handoff", "no agent 'gone'", id="unknown agent"),
        pytest.param(lambda result: 5, "invalid_handoff", "not int", id="neither name nor agent"),
        pytest.param(lambda result: loud, "invalid_handoff", "no agent 'loud'", id="an agent outside the flock"),
        pytest.param("measure", "too_many_steps", "measure → measure", id="loop"),
        pytest.param("wants_more", "invalid_handoff", "/limit: This field is required", id="inputs are missing"),
        pytest.param("wants_text", "invalid_handoff", "/n: Expected 'str'", id="inputs of another type"),
        pytest.param(raises, "agent_exception", "raised LookupError", id="the function raises"),
    ],
)
async def test_an_invalid_handoff_fails_the_run(next_agent: Any, error_type: str, words: str) -> None:
    flock = Flock(max_steps=5)

    @flock.agent(output="n: int", next_agent=next_agent)
    def measure(text: str) -> dict[str, int]:
        return {"n": len(text)}

    @flock.agent
    def wants_more(n: int, limit: int) -> int:
        return n

    @flock.agent
    def wants_text(n: str) -> str:
        return n

    with pytest.raises(RunFailed, match=words) as caught:
        await flock.run_async("measure", {"text": "x"})
    assert caught.value.error_type == error_type


# Branches: a mapping from each value of an output field


class Tone(enum.Enum):
    CALM = "calm"
    ANGRY = "angry"


class Enums(TypedDict):
    tone: Tone
    perhaps: NotRequired[Literal["a"]]


CATEGORY = "note: str, category: Literal['billing', 'other']"
BRANCHES = {"other": None, "billing": "loud"}


@pytest.mark.parametrize(
    ("output", "next_agent", "handed_on", "last"),
    [
        pytest.param(
            CATEGORY,
            BRANCHES,
            {"note": "", "category": "billing"},
            {"note": "", "category": "other"},
            id="the only field with fixed values",
        ),
        pytest.param(
            f"{CATEGORY}, tone: Literal['calm', 'angry']",
            {"tone": {"calm": None, "angry": loud}},
            {"note": "", "category": "other", "tone": "angry"},
            {"note": "", "category": "other", "tone": "calm"},
            id="a named field, and an agent",
        ),
        pytest.param(Enums, {"calm": None, "angry": "loud"}, {"tone": Tone.ANGRY}, {"tone": "calm"}, id="an enum"),
    ],
)
async def test_the_value_of_a_field_decides(output: Any, next_agent: Any, handed_on: Any, last: Any) -> None:
    flock, results = Flock(), [handed_on, last]
    flock.add_agent(loud)

    @flock.agent(output=output, next_agent=next_agent)
    def triage(text: str) -> Any:
        return results.pop(0)

    assert await flock.run_async("triage", {"text": "pay"}) == {"result": "PAY"}
    assert await flock.run_async("triage", {"text": "pay"}) == last


@pytest.mark.parametrize(
    ("output", "next_agent", "words"),
    [
        pytest.param(
            "text: str, n: Literal[1, 2], o: Literal['a', None]",
            {"a": None},
            "next_agent= of 'triage' needs an output field that decides. Add a required one of a type such as "
            "Literal['yes', 'no'].",
            id="there is no such field",
        ),
        pytest.param(
            f"{CATEGORY}, tone: Literal['calm', 'angry']",
            BRANCHES,
            "next_agent= of 'triage' must name one of the output fields 'category', 'tone', such as {'category': {…}}.",
            id="several could be meant",
        ),
        pytest.param(
            CATEGORY,
            {"categry": BRANCHES},
            "next_agent= of 'triage': 'categry' is not a required output field of a type such as "
            "Literal['yes', 'no']. Did you mean 'category'?",
            id="the named field does not exist",
        ),
        pytest.param(
            CATEGORY,
            {**BRANCHES, "biling": "loud"},
            "next_agent= of 'triage': 'biling' is not a value of the output field 'category'. Did you mean 'billing'?",
            id="a misspelt value",
        ),
        pytest.param(
            CATEGORY,
            {"other": None, 5: "loud"},
            "next_agent= of 'triage': 5 is not a value of the output field 'category'. Use 'billing', 'other'.",
            id="not a value",
        ),
        pytest.param(
            CATEGORY,
            {"billing": "loud"},
            "next_agent= of 'triage' has no entry for 'other'. Name an agent, or add 'other': None to end the run.",
            id="a value has no entry",
        ),
        pytest.param(
            CATEGORY,
            {**BRANCHES, "other": len},
            "next_agent= of 'triage': the entry for 'other' must be a name, an agent or None, not "
            "builtin_function_or_method.",
            id="a function in the mapping",
        ),
    ],
)
def test_branches_are_checked_at_the_definition(output: str, next_agent: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=re.escape(words) + "$"):
        FlockFactory.create_default_agent("triage", output=output, next_agent=next_agent)
    later = FlockFactory.create_default_agent("triage", output=output)
    with pytest.raises(DefinitionError, match=re.escape(words) + "$"):
        later.next_agent = next_agent


def test_the_columns_of_branches_are_those_of_all_agents_that_can_be_last() -> None:
    flock = Flock()
    branches: dict[str, tuple[str, Any]] = {
        "triage": (CATEGORY, {"billing": "ask", "other": None}),
        "ask": ("question: str, more: Literal['yes', 'no']", {"yes": "triage", "no": "pay"}),
        "pay": ("amount: int, note: str", None),
        "guess": (CATEGORY, {"billing": "unsure", "other": None}),
        "unsure": ("a: str", lambda result: None),
        "circle": (CATEGORY, {"billing": "circle", "other": "circle"}),
    }
    for name, (output, chosen) in branches.items():
        flock.add_agent(FlockFactory.create_default_agent(name, input="i: int", output=output, next_agent=chosen))
    assert columns_of("triage", flock.agents) == (
        {"i": "integer"},
        {"note": "string", "category": "", "amount": "integer"},
    )
    assert result_names("triage", flock.agents) == {"note", "category", "amount", "error", "error_type"}
    assert columns_of("guess", flock.agents) == columns_of("circle", flock.agents) == ({"i": "integer"}, None)


# The token limit of a run. An answer of the fake model costs 15 tokens.


def chain() -> Flock:
    """Return a flock of two model agents and a function between them."""
    flock = Flock(model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("one", input="a: int", output="b: int", next_agent="count"))
    flock.agent(name="count", output="c: int", next_agent="two")(count)
    flock.add_agent(FlockFactory.create_default_agent("two", input="c: int", output="d: int"))
    return flock


def count(b: int) -> dict[str, int]:
    return {"c": b + 1}


async def end_of_chain(model: FakeModel, max_tokens: int | None, *answers: Any) -> Run:
    model.replies = [Reply(content) for content in answers]
    async with chain().engine(transport=model.transport, max_tokens=max_tokens) as engine:
        return await engine.wait((await engine.submit("one", {"a": 1})).run_id)


@pytest.mark.parametrize(("max_tokens", "calls"), [(1, 1), (15, 1), (16, 2), (30, 2)])
async def test_invalid_answers_are_retried_until_the_tokens_are_spent(
    max_tokens: int, calls: int, model: FakeModel
) -> None:
    run = await end_of_chain(model, max_tokens, *["no JSON"] * calls)
    assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "too_many_tokens", calls)
    expected = (
        f"Stopped after {15 * calls} tokens, before 'one' called its model. One run may use {max_tokens} tokens ("
    )
    assert run.error
    assert run.error.startswith(expected)


async def test_the_next_agent_can_spend_the_remaining_tokens(model: FakeModel) -> None:
    """One remaining token allows one call. Functions cost nothing, and finished steps are kept."""
    run = await end_of_chain(model, 15, {"b": 1})
    assert (run.status, run.error_type) == (RunStatus.FAILED, "too_many_tokens")
    assert run.error
    assert "before 'two' called its model" in run.error
    assert [step.agent_name for step in run.steps] == ["one", "count"]
    run = await end_of_chain(model, 16, {"b": 1}, "no JSON")
    assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "too_many_tokens", 3)


async def test_tokens_spent_before_a_retry_count(model: FakeModel) -> None:
    model.replies = [Reply({"b": 1})]
    async with chain().engine(transport=model.transport, max_tokens=15) as engine:
        run = await engine.wait((await engine.submit("one", {"a": 1})).run_id)
        await engine.retry_run(run.run_id)
        run = await engine.wait(run.run_id)
    assert (run.attempt, run.error_type, len(model.requests)) == (2, "too_many_tokens", 1)


@pytest.mark.parametrize("max_tokens", [None, 46, 31])
async def test_a_valid_answer_completes_its_run_at_any_cost(max_tokens: int | None, model: FakeModel) -> None:
    run = await end_of_chain(model, max_tokens, "no JSON", {"b": 1}, {"d": 2})
    assert (run.status, run.usage) == (RunStatus.COMPLETED, usage_of_gpt_4o(30, 15))

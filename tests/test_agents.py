"""Agents: prompts to a model, repair of invalid answers, and calls of functions."""

import contextvars
import dataclasses
import functools
import json
import math
import re
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple, TypedDict

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest

from flock.agents.agent import Agent, FunctionAgent, ModelAgent, Resources, agent
from flock.agents.signature import Signature
from flock.agents.versions import version_of
from flock.core import Flock, FlockFactory
from flock.errors import DefinitionError, InvalidOutput, ModelError, SignatureError
from flock.models.llm import ModelClient
from flock.runs import Call, Run, RunContext, Usage, now
from flock.scopes import Clock
from flock.steps.journal import Journal
from flock.testing import Failure, FakeModel, Reply
from flockapi import create_app

pytestmark = pytest.mark.anyio


@pytest.fixture
async def resources(model: FakeModel) -> AsyncIterator[Resources]:
    async with ModelClient("openai/gpt-4o", transport=model.transport, backoff_s=0.001) as models:
        yield Resources(models, anyio.to_thread.run_sync)


def analyzer(**options: Any) -> ModelAgent:
    return FlockFactory.create_default_agent(
        "text_analyzer",
        input="text: str | what to analyse, limit: int",
        output="sentiment: str | one word, keywords: list[str]",
        **options,
    )


class Done(NamedTuple):
    """What a turn returned, and the tokens that it reported."""

    result: msgspec.Raw
    usage: Usage | None


def context_of(agent_name: str, spent: list[Usage]) -> RunContext:
    run = Run(run_id="r", flock="f", agent_name=agent_name, inputs=msgspec.Raw(b"{}"), created_at=now())
    return RunContext(
        run,
        agent_name,
        lambda progress: None,
        journal(),
        on_usage=lambda agent_name, usage, model: spent.append(usage),
    )


def journal() -> Journal:
    """Return a journal that stores nothing."""

    async def save(call: Call) -> None: ...

    def run_agent(*arguments: Any) -> Any: ...

    return Journal(
        (),
        save=save,
        wait_for_store=anyio.lowlevel.checkpoint,
        call_in_thread=anyio.to_thread.run_sync,
        run_callee=run_agent,
        spent=Usage(),
        max_calls=1000,
        max_result_bytes=math.inf,
        max_total_bytes=math.inf,
        expose_errors=False,
        clock=Clock(anyio.CancelScope()),
        is_cut_off=lambda: False,
        replay_grace_s=5.0,
    )


async def turn(made: Agent, resources: Resources, **inputs: Any) -> Done:
    decoded, spent = made.input.decode(msgspec.json.encode(inputs)), list[Usage]()
    result = await made.execute(decoded, resources, context_of(made.name, spent))
    return Done(result, sum(spent, Usage()) if spent else None)


# Model agents


async def test_the_prompt_contains_everything_in_the_signatures(model: FakeModel, resources: Resources) -> None:
    made = analyzer(description="Finds the mood.", instructions="Be brief.", temperature=0.5, max_tokens=99)
    model.replies = [Reply({"sentiment": "good", "keywords": ["a"]})]
    await turn(made, resources, text='Say "hi"\nnow', limit=3)
    (request,) = model.requests
    prompt = "\n".join(message["content"] for message in request["messages"])
    for words in (
        "text_analyzer",
        "Finds the mood.",
        "Be brief.",
        "sentiment",
        "one word",
        "keywords",
        "what to analyse",
    ):
        assert words in prompt
    assert '{"text": "Say \\"hi\\"\\nnow", "limit": 3}' in prompt
    assert "- sentiment (string): one word\n- keywords (list of strings)" in prompt
    assert (request["temperature"], request["max_completion_tokens"]) == (0.5, 99)


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        ("int", "integer"),
        ("Literal['a', 'ü', 1]", 'one of "a", "ü", 1'),
        ("date | None", "string (date) or null"),
        ("datetime", "string (date-time)"),
        ("list[time]", "list of strings (time)"),
        ("timedelta", "string (duration)"),
        ("list[list[int]]", "list of lists of integers"),
        ("list", "list of anything"),
        ("Any", "anything"),
        ("dict[str, int]", "object"),
    ],
)
async def test_a_type_is_described_in_words(type_: str, words: str, model: FakeModel, resources: Resources) -> None:
    model.replies = [Failure(404)]
    with pytest.raises(ModelError):
        await turn(FlockFactory.create_default_agent("x", output=f"a: {type_}"), resources)
    assert f"Determine:\n- a ({words})\n" in model.requests[0]["messages"][1]["content"]


def test_the_version_of_an_agent_changes_with_its_signature_and_its_definition() -> None:
    """It does not depend on the object or on what only limits it."""

    def look_up(word: str) -> str:
        return word

    def like(**options: Any) -> Agent:
        return analyzer(tools=[look_up], max_concurrency=len(options) + 1, **options)

    def doubled(n: int) -> int:
        return 2 * n

    def tripled(n: int) -> int:
        return 3 * n

    assert version_of(like()) != version_of(like(options={"seed": 1}))
    assert version_of(like(validate=lambda answer: None)) != version_of(like(validate=print))
    assert version_of(like()) == version_of(like(answer_retries=5))
    changes: list[dict[str, Any]] = [
        *({"instructions": "Be brief."}, {"model": "openai/gpt-4o"}, {"next_agent": "other"}, {"temperature": 0.5}),
        {"description": "Another one."},
        {"on_interrupt": "fail"},
    ]
    versions = [version_of(like(**change)) for change in changes]
    versions += [version_of(each) for each in (like(), analyzer(), agent(doubled), agent(tripled))]
    versions.append(version_of(analyzer(tools=[agent(doubled)])))
    with_inputs, with_outputs = like(), like()
    with_inputs.input, with_outputs.output = Signature.of("text: str"), Signature.of("sentiment: str")
    versions += [version_of(with_inputs), version_of(with_outputs)]
    assert len(set(versions)) == len(versions)


async def test_an_agents_own_model_overrides_the_flocks(model: FakeModel, resources: Resources) -> None:
    model.replies = [Reply({"sentiment": "good", "keywords": []})] * 2
    await turn(analyzer(model="ollama/llama3"), resources, text="x", limit=1)
    await turn(analyzer(), resources, text="x", limit=1)
    assert [request["model"] for request in model.requests] == ["llama3", "gpt-4o"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param("Good!", "Not valid JSON", id="not JSON"),
        pytest.param('{"sentiment": "good", "keywords": ["a"', "unexpected end", id="cut off"),
        pytest.param({"sentiment": 5, "keywords": []}, "/sentiment: Expected 'str', got 'int'", id="wrong type"),
        pytest.param({"sentiment": "good"}, "/keywords: This field is required", id="missing"),
        pytest.param({"sentiment": "", "keywords": [], "x": 1}, "/x: Unknown field", id="unknown"),
        pytest.param('{"sentiment": "\\ud800", "keywords": []}', "surrogate", id="lone surrogate"),
        pytest.param("good \ud800", "Not valid JSON", id="a lone surrogate in the text itself"),
        pytest.param("[" * 50_000, "Expected 'object'", id="endless nesting"),
    ],
)
async def test_an_invalid_answer_is_sent_back_with_the_reason(
    bad: Any, reason: str, model: FakeModel, resources: Resources
) -> None:
    model.replies = [Reply(bad), Reply({"sentiment": "good", "keywords": []})]
    done = await turn(analyzer(), resources, text="x", limit=1)
    assert json.loads(bytes(done.result)) == {"sentiment": "good", "keywords": []}
    assert done.usage == Usage(input_tokens=20, output_tokens=10), "both answers are paid for"
    assert [request.headers["idempotency-key"] for request in model.requests] == ["run:r/0", "run:r/0/2"]
    *_, reply, correction = model.requests[1]["messages"]
    assert reply["role"] == "assistant"
    assert correction["role"] == "user"
    assert reason in correction["content"]


async def test_an_answer_with_an_invalid_time_is_sent_back_with_a_valid_example(
    model: FakeModel, resources: Resources
) -> None:
    model.replies = [Reply({"at": "noon"}), Reply({"at": "2026-11-30T12:00:00Z"})]
    await turn(FlockFactory.create_default_agent("x", output="at: datetime"), resources)
    reason = '/at: Invalid RFC3339 encoded datetime. Write a datetime like "2026-11-30T14:30:00Z".'
    assert reason in model.requests[1]["messages"][-1]["content"]


@pytest.mark.parametrize("answer_retries", [0, 1, 3])
async def test_after_max_retries_the_reason_is_the_error(
    answer_retries: int, model: FakeModel, resources: Resources
) -> None:
    model.replies = [Reply({"sentiment": "good"})] * (answer_retries + 1)
    with pytest.raises(InvalidOutput, match=f"in {answer_retries + 1} attempts?: /keywords: This field is required"):
        await turn(analyzer(answer_retries=answer_retries), resources, text="x", limit=1)


async def test_timeout_s_covers_the_whole_turn(model: FakeModel, resources: Resources) -> None:
    async def never(_: Any) -> Any:
        await anyio.sleep_forever()

    model.replies = never  # a slow machine does not come to ask it
    with pytest.raises(ModelError, match=r"within 0.05 s \(timeout_s of the agent 'text_analyzer'\)") as caught:
        await turn(analyzer(timeout_s=0.05), resources, text="x", limit=1)
    assert caught.value.error_type == "model_timeout"


async def test_a_model_error_is_not_repaired(model: FakeModel, resources: Resources) -> None:
    model.replies = [Failure(404)]
    with pytest.raises(ModelError):
        await turn(analyzer(), resources, text="x", limit=1)


@pytest.mark.parametrize("name", ["", 5, "a b", "a/b", "ä", "..", "a\n"])
def test_a_name_that_cannot_be_part_of_a_url_is_refused(name: Any) -> None:
    with pytest.raises(DefinitionError, match="Use letters, digits"):
        FlockFactory.create_default_agent(name, output="a")


def test_a_model_agent_without_output_is_refused() -> None:
    with pytest.raises(DefinitionError, match="at least one output field"):
        FlockFactory.create_default_agent("x", input="a")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("description", lambda context: "Be brief."),
        ("description", ["Be brief."]),
        ("instructions", ["Be brief."]),
    ],
)
def test_what_is_part_of_the_prompt_must_be_a_text(option: str, value: Any) -> None:
    """Only instructions may be a function."""
    with pytest.raises(DefinitionError) as caught:
        FlockFactory.create_default_agent("brief", output="a: str", **{option: value})
    assert str(caught.value).startswith(f"{option}= of 'brief' must be a text, not {value!r}.")
    assert ("only instructions= may be a function" in str(caught.value)) == callable(value)


def test_a_signature_error_is_raised_at_definition() -> None:
    with pytest.raises(SignatureError):
        FlockFactory.create_default_agent("x", input="a: Foo", output="b")


# Types inside types


class Part(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(min_length=2)]
    grams: Annotated[int, msgspec.Meta(ge=1, le=1000, description="its weight")]


class Round(msgspec.Struct, tag=True):
    radius: Annotated[float, msgspec.Meta(gt=0)]


class Square(msgspec.Struct, tag=True):
    side: Annotated[float, msgspec.Meta(gt=0)]


class Bounds(TypedDict):
    low: Annotated[int, msgspec.Meta(ge=0)]


@dataclasses.dataclass
class Product:
    parts: Annotated[list[Part], msgspec.Meta(min_length=1, max_length=3)]
    shape: Round | Square
    bounds: Bounds


PRODUCT: dict[str, Any] = {
    "parts": [{"name": "lid", "grams": 20}],
    "shape": {"type": "Round", "radius": 1.5},
    "bounds": {"low": 0},
}
INVALID_PRODUCTS = [
    ({"parts": [{"name": "lid", "grams": 0}]}, "/parts/0/grams", "Expected 'int' >= 1."),
    ({"parts": []}, "/parts", "Expected 'array' of length >= 1."),
    ({"shape": {"type": "Square", "side": 0}}, "/shape/side", "Expected 'float' > 0.0."),
    ({"shape": {"type": "Star"}}, "/shape/type", "This value is not one of the allowed values."),
    ({"bounds": {"low": -1}}, "/bounds/low", "Expected 'int' >= 0."),
]


async def test_constraints_of_nested_types_reach_the_model(model: FakeModel, resources: Resources) -> None:
    made = FlockFactory.create_default_agent("design", output=Product)
    model.replies = [Reply(PRODUCT)]
    await turn(made, resources)
    sent = model.requests[0]["response_format"]["json_schema"]
    assert sent["strict"] is True
    part, parts = Signature.of(Part).schema["properties"], sent["schema"]["properties"]["parts"]
    assert (parts["minItems"], parts["maxItems"]) == (1, 3)
    assert parts["items"]["properties"] == {
        "name": {"type": "string", "description": "(minLength: 2)"},  # strict mode has no keyword for it
        "grams": part["grams"],
    }
    assert part["grams"] == {"type": "integer", "minimum": 1, "maximum": 1000, "description": "its weight"}
    round_, square = sent["schema"]["properties"]["shape"]["anyOf"]
    assert round_["properties"] == {
        "type": {"enum": ["Round"]},
        "radius": {"type": "number", "exclusiveMinimum": 0},
    }
    assert square["required"] == ["type", "side"]
    assert sent["schema"]["properties"]["bounds"]["properties"] == {"low": {"type": "integer", "minimum": 0}}


@pytest.mark.parametrize(("change", "pointer", "reason"), INVALID_PRODUCTS)
async def test_an_answer_that_violates_a_nested_type_is_sent_back_and_then_fails(
    change: Any, pointer: str, reason: str, model: FakeModel, resources: Resources
) -> None:
    made = FlockFactory.create_default_agent(
        "design", output="product: Product", types={"Product": Product}, answer_retries=1
    )
    model.replies = [Reply({"product": PRODUCT | change})] * 2
    with pytest.raises(InvalidOutput) as caught:
        await turn(made, resources)
    assert f"/product{pointer}: {reason}" in str(caught.value)
    assert f"/product{pointer}: {reason}" in model.requests[1]["messages"][-1]["content"]


@pytest.mark.parametrize(("change", "pointer", "reason"), INVALID_PRODUCTS)
async def test_an_input_that_violates_a_nested_type_is_rejected(
    change: Any, pointer: str, reason: str, flock: Flock, client: httpx.AsyncClient
) -> None:
    @flock.agent
    def price(product: Product) -> None: ...

    response = await client.post("/run/flock", json={"agent_name": "price", "inputs": {"product": PRODUCT | change}})
    assert response.status_code == 422
    (found,) = response.json()["errors"]
    assert found["pointer"] == f"/inputs/product{pointer}"
    assert found["detail"].startswith(reason)


# Examples and reasoning


@dataclasses.dataclass
class Mail:
    text: str
    limit: int = 3


@dataclasses.dataclass
class Mood:
    sentiment: str
    keywords: list[str]


class Node(msgspec.Struct, tag="node", rename="kebab"):
    full_name: str
    child_nodes: list["Node"] = []


EXAMPLES: list[Any] = [
    ({"text": "Süß! <3", "limit": 1}, {"sentiment": "good", "keywords": ["süß"]}),
    ({"text": "Awful.", "limit": 2}, {"keywords": [], "sentiment": "bad"}),
]
GOOD = {"sentiment": "good", "keywords": ["a"]}


async def test_examples_are_earlier_turns_of_the_conversation(model: FakeModel, resources: Resources) -> None:
    """The prompt of an example is the one that the same inputs of a run get."""
    model.replies = [Reply(GOOD)] * 3
    made = analyzer(examples=EXAMPLES)
    done = await turn(made, resources, text="x", limit=1)
    for inputs, _ in EXAMPLES:
        await turn(analyzer(), resources, **inputs)
    with_examples, first, second = (request["messages"] for request in model.requests)
    assert [message["role"] for message in with_examples] == ["system", *["user", "assistant"] * 2, "user"]
    assert [with_examples[0], with_examples[1]] == first
    assert [with_examples[0], with_examples[3]] == second
    assert [with_examples[n]["content"] for n in (2, 4)] == [
        '{"sentiment":"good","keywords":["süß"]}',
        '{"sentiment":"bad","keywords":[]}',
    ]
    assert '{"text": "x", "limit": 1}' in with_examples[5]["content"]
    assert (json.loads(bytes(done.result)), done.usage) == (GOOD, Usage(input_tokens=10, output_tokens=5))


async def test_an_example_may_be_an_instance_and_is_encoded_when_the_agent_is_defined(
    model: FakeModel, resources: Resources
) -> None:
    model.replies = [Reply(GOOD)]
    mood = Mood("good", ["a"])
    made = FlockFactory.create_default_agent("x", input=Mail, output=Mood, examples=[(Mail("hi"), mood)])
    mood.sentiment = "changed later"
    await turn(made, resources, text="x")
    _, user, assistant, _ = model.requests[0]["messages"]
    assert user["content"].startswith('{"text": "hi", "limit": 3}\n')
    assert assistant["content"] == '{"sentiment":"good","keywords":["a"]}'


@pytest.mark.parametrize(
    ("example", "words"),
    [
        pytest.param(
            ({"limit": 1}, GOOD),
            "The inputs in .* must match the signature. /text: This field is required",
            id="missing",
        ),
        pytest.param(({"text": "a", "limit": "b"}, GOOD), "The inputs .* /limit: Expected 'int', got 'str'", id="type"),
        pytest.param(
            ({"text": "a", "limit": 1}, GOOD | {"keywords": ["a", 5]}),
            "The output in .* /keywords/1: Expected 'str', got 'int'",
            id="inside a list",
        ),
        pytest.param(({"text": "a", "limit": 1}, GOOD | {"x": 1}), "The output .* /x: Unknown field", id="unknown"),
        pytest.param(
            ({"text": "a", "limit": 1}, GOOD | {"reasoning": "b"}), "The output .* /reasoning: Unknown field", id="off"
        ),
        pytest.param(({"text": "\ud800", "limit": 1}, GOOD), "The inputs .* cannot be encoded as JSON", id="surrogate"),
        pytest.param(({"text": "a", "limit": 1}, "good"), "The output .* Expected 'object', got 'str'", id="a text"),
        pytest.param(
            ({"text": "a", "limit": 1},),
            r"must be a pair \(inputs, output\)",
            id="no pair",
        ),
        pytest.param({"inputs": {}, "output": {}}, r"must be a pair \(inputs, output\)", id="a mapping"),
    ],
)
def test_an_example_that_does_not_fit_is_refused_at_definition(example: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=r"examples\[2\] of 'text_analyzer'") as caught:
        analyzer(examples=[*EXAMPLES, example])
    assert re.search(words, str(caught.value))


async def test_reasoning_is_asked_for_first_and_is_not_part_of_the_result(
    model: FakeModel, resources: Resources
) -> None:
    model.replies = [Reply({"reasoning": "It says so.", **GOOD})]
    made = analyzer(reasoning=True)
    done = await turn(made, resources, text="x", limit=1)
    (request,) = model.requests
    schema = request["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["reasoning", "sentiment", "keywords"]
    asked = request["messages"][-1]["content"].partition("Determine:\n")[2]
    assert asked.startswith("- reasoning (string): think step by step before you answer\n- sentiment")
    assert bytes(done.result) == b'{"sentiment":"good","keywords":["a"]}'
    assert list(made.output.schema["properties"]) == made.output.schema["required"] == ["sentiment", "keywords"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        pytest.param(GOOD, "/reasoning: This field is required", id="missing"),
        pytest.param({"reasoning": 5, **GOOD}, "/reasoning: Expected 'str', got 'int'", id="wrong type"),
        pytest.param({"reasoning": "a", "sentiment": "good"}, "/keywords: This field is required", id="no answer"),
        pytest.param("Good!", "Not valid JSON", id="not JSON"),
        pytest.param("[" * 50_000, "Expected 'object'", id="endless nesting"),
        pytest.param('{"reasoning": "\\ud800"}', "surrogate", id="lone surrogate"),
    ],
)
async def test_a_repair_keeps_examples_and_reasoning(
    bad: Any, reason: str, model: FakeModel, resources: Resources, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "flock")
    model.replies = [Reply(bad), Reply({"reasoning": "A secret.", **GOOD})]
    done = await turn(analyzer(reasoning=True, examples=EXAMPLES), resources, text="x", limit=1)
    assert json.loads(bytes(done.result)) == GOOD
    first, second = model.requests
    assert len(first["messages"]) == 6
    assert second["messages"][:6] == first["messages"]
    assert second["response_format"] == first["response_format"]
    assert reason in second["messages"][-1]["content"]
    assert "secret" not in caplog.text


async def test_an_example_may_show_its_reasoning(model: FakeModel, resources: Resources) -> None:
    model.replies = [Reply({"reasoning": "a", **GOOD})]
    (inputs, output), other = EXAMPLES
    made = analyzer(reasoning=True, examples=[(inputs, output | {"reasoning": "A heart."}), other])
    await turn(made, resources, text="x", limit=1)
    assert [message["content"] for message in model.requests[0]["messages"] if message["role"] == "assistant"] == [
        '{"reasoning":"A heart.","sentiment":"good","keywords":["süß"]}',
        '{"sentiment":"bad","keywords":[]}',
    ]
    with pytest.raises(DefinitionError, match=r"examples\[0\] .* /reasoning: Expected 'str', got 'int'"):
        analyzer(reasoning=True, examples=[(inputs, output | {"reasoning": 5})])


async def test_reasoning_with_types_of_ones_own(model: FakeModel, resources: Resources) -> None:
    model.replies = [Reply({"reasoning": "a", "type": "node", "full-name": "b", "child-nodes": [{"full-name": "c"}]})]
    made = FlockFactory.create_default_agent("x", output=Node, reasoning=True)
    done = await turn(made, resources)
    schema = model.requests[0]["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["reasoning", "type", "full-name", "child-nodes"]
    assert "reasoning" not in schema["$defs"]["Node"]["properties"]
    assert made.output.type is Node
    assert msgspec.json.decode(done.result, type=Node) == Node("b", [Node("c")])


async def test_servers_without_json_schema_get_examples_and_reasoning_in_words(
    model: FakeModel, resources: Resources
) -> None:
    model.replies = [Failure(400, message="response_format is not supported"), Reply({"reasoning": "a", **GOOD})]
    await turn(analyzer(reasoning=True, examples=EXAMPLES), resources, text="x", limit=1)
    strict, loose = (request["messages"] for request in model.requests)
    assert loose[1:] == strict[1:]
    assert '"required": ["reasoning", "sentiment", "keywords"]' in loose[0]["content"]


def test_an_output_with_its_own_reasoning_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"output of 'x' has its own field 'reasoning'\. Rename that field, or"):
        FlockFactory.create_default_agent("x", output="reasoning: str, a", reasoning=True)
    assert FlockFactory.create_default_agent("x", output="reasoning: str").output.fields[0].name == "reasoning"


async def test_clients_do_not_see_the_reasoning(model: FakeModel) -> None:
    """It is not in the response, the agent's description, or the columns of a batch."""
    flock = Flock(model="openai/gpt-4o")
    flock.add_agent(analyzer(reasoning=True))
    model.replies = [Reply({"reasoning": "a secret", **GOOD})] * 2
    app = create_app(flock, engine=flock.engine(transport=model.transport), auth="host")
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        described = await client.get("/agents/text_analyzer")
        inputs = {"text": "x", "limit": 1}
        run = await client.post("/run/flock", json={"agent_name": "text_analyzer", "inputs": inputs})
        batch = await client.post("/run/batch", json={"agent_name": "text_analyzer", "batch_inputs": [inputs]})
        path = f"/batch/{batch.json()['batch_id']}"
        await client.get(f"{path}?wait=30")
        table = await client.get(f"{path}/results", headers={"Accept": "text/csv"})
    assert run.json()["result"] == GOOD
    assert table.text.splitlines()[0] == "text,limit,sentiment,keywords,status,error"
    for response in (described, run, table):
        assert response.status_code == 200
        assert "reasoning" not in response.text
        assert "secret" not in response.text


# Function agents


@dataclasses.dataclass
class Box:
    width: int
    tags: list[str]


async def test_a_function_gets_typed_values(resources: Resources) -> None:
    seen: list[Any] = []

    @agent
    def keep(box: Box, names: set[str], scale: float = 1.5) -> None:
        """Keeps a box."""
        seen.append((box, names, scale))

    assert isinstance(keep, FunctionAgent)
    assert (keep.name, keep.description) == ("keep", "Keeps a box.")
    done = await turn(keep, resources, box={"width": 1, "tags": []}, names=["a"])
    assert bytes(done.result) == b'{"result":null}'
    assert done.usage is None
    assert seen == [(Box(1, []), {"a"}, 1.5)]


async def test_a_sync_function_runs_in_a_thread_and_an_async_one_in_the_loop(resources: Resources) -> None:
    @agent
    def there() -> int:
        return threading.get_ident()

    @agent
    async def here() -> int:
        return threading.get_ident()

    assert bytes((await turn(there, resources)).result) != f'{{"result":{threading.get_ident()}}}'.encode()
    assert bytes((await turn(here, resources)).result) == f'{{"result":{threading.get_ident()}}}'.encode()


async def test_a_thread_sees_context_variables(resources: Resources) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")
    variable.set("seen")

    @agent
    def read() -> str:
        return variable.get()

    assert bytes((await turn(read, resources)).result) == b'{"result":"seen"}'


async def test_a_callable_object_is_an_agent(resources: Resources) -> None:
    class Counter:
        """Counts."""

        async def __call__(self, text: str) -> int:
            return len(text)

    made = FunctionAgent(Counter(), name="count")
    assert made.description == "Counts."
    assert bytes((await turn(made, resources, text="abc")).result) == b'{"result":3}'


async def test_the_return_value_of_a_function_is_validated(resources: Resources) -> None:
    @agent
    def lie() -> int:
        return "five"  # type: ignore[return-value]

    @agent(output="a: int")
    def forget() -> dict[str, int]:
        return {}

    with pytest.raises(InvalidOutput, match=r"'lie' does not match its output signature. /result: Expected 'int'"):
        await turn(lie, resources)
    with pytest.raises(InvalidOutput, match="/a: This field is required"):
        await turn(forget, resources)


async def test_nothing_is_shared_between_two_runs() -> None:
    """A run does not see what an earlier run did to its inputs or its result."""
    flock = Flock()
    shared: dict[str, Any] = {"list": []}

    @flock.agent(output="list: Any")
    def spoil(value: Any, tags: list[str] = ["new"]) -> dict[str, Any]:  # noqa: B006
        value.append("spoilt")
        tags.append("spoilt")
        shared["list"] += tags
        return shared

    inputs: dict[str, Any] = {"value": []}
    async with flock.engine() as engine:
        raw = msgspec.Raw(msgspec.json.encode(inputs))
        runs = [await engine.wait((await engine.submit("spoil", raw)).run_id) for _ in range(2)]
    assert inputs == {"value": []}
    results = [json.loads(bytes(run.result or b"")) for run in runs]
    assert results[0] == {"list": ["new", "spoilt"]}, "the first result has not changed"


def test_an_agent_can_still_be_called_as_a_function() -> None:
    @agent(name="other", description="Adds.")
    def add(a: int, b: int) -> int:
        return a + b

    assert add(1, b=2) == 3
    assert (add.name, add.description) == ("other", "Adds.")
    assert repr(add) == "<FunctionAgent 'other'>"


def test_output_may_be_a_signature_with_types() -> None:
    @agent(output="box: Box", types={"Box": Box})
    def make() -> dict[str, Any]:
        return {}

    assert make.output.fields[0].type is Box


async def test_a_plain_wrapper_around_an_async_function_is_awaited(resources: Resources) -> None:
    async def original(text: str) -> str:
        return text.upper()

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    assert bytes((await turn(FunctionAgent(wrapper), resources, text="a")).result) == b'{"result":"A"}'


async def test_partial_and_cached_functions_keep_their_types(resources: Resources) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    partial = FunctionAgent(functools.partial(add, b=5), name="add5")
    assert bytes((await turn(partial, resources, a=1)).result) == b'{"result":6}'
    cached = FunctionAgent(functools.lru_cache(add))
    assert bytes((await turn(cached, resources, a=1, b=2)).result) == b'{"result":3}'


async def test_the_base_class_cannot_take_a_turn(resources: Resources) -> None:
    empty = Signature.of("")
    with pytest.raises(NotImplementedError):
        await Agent("x", empty, empty).execute(None, resources, context_of("x", []))

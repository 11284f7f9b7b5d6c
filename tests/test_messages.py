"""``Messages``: an input that is a conversation."""

import json
from typing import Annotated, Any

import httpx
import msgspec
import pytest

from flock.agents.signature import Signature
from flock.core import Flock, FlockFactory, Messages
from flock.errors import DefinitionError
from flock.testing import Failure, FakeModel, Reply
from tests.support.http import check_problem

pytestmark = pytest.mark.anyio

CHAT = [
    {"role": "user", "content": "I want a cup."},
    {"role": "assistant", "content": "Which colour?"},
    {"role": "user", "content": 'Say "blue"\nplease.'},
]
SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "title": "ChatMessage",
        "description": "One message of a conversation, from the user or from the assistant.",
        "type": "object",
        "properties": {"role": {"type": "string", "enum": ["user", "assistant"]}, "content": {"type": "string"}},
        "required": ["role", "content"],
        "additionalProperties": False,
    },
}


async def run(client: httpx.AsyncClient, agent_name: str, **inputs: Any) -> httpx.Response:
    return await client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs})


def clerk(input: Any = "messages: Messages", **options: Any) -> Any:
    options = {"description": "Sells cups.", "instructions": "Be kind.", "output": "reply | short", **options}
    return FlockFactory.create_default_agent("clerk", input=input, **options)


class Inputs(msgspec.Struct):
    chat: Annotated[Messages, msgspec.Meta(description="so far")]


async def test_the_messages_are_the_conversation_itself(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(clerk())
    model.replies = [Reply({"reply": "Blue it is."})]
    assert (await run(client, "clerk", messages=CHAT)).json()["result"] == {"reply": "Blue it is."}
    system, *conversation = model.requests[0]["messages"]
    assert conversation == CHAT
    assert system == {
        "role": "system",
        "content": "You are clerk.\nSells cups.\nBe kind.\n\nDetermine:\n- reply (string): short\n"
        "Answer with a JSON object only.",
    }
    assert (await client.get("/agents/clerk")).json()["input_schema"]["properties"] == {"messages": SCHEMA}


async def test_other_inputs_come_before_the_conversation(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(clerk("customer | by name, messages: Messages | the talk", reasoning=True))
    model.replies = [Reply({"reasoning": "…", "reply": "Hi"})]
    await run(client, "clerk", messages=CHAT, customer="Änne")
    system, others, *conversation = model.requests[0]["messages"]
    assert "- reasoning (string)" in system["content"]
    assert others == {"role": "user", "content": '{"customer": "Änne"}\n\nIn it:\n- customer: by name'}
    assert conversation == CHAT


async def test_an_invalid_answer_continues_the_conversation(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(clerk(Inputs))
    model.replies = [Reply({"reply": 5}), Reply({"reply": "Hi"})]
    await run(client, "clerk", chat=CHAT)
    roles = [message["role"] for message in model.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert "/reply: Expected 'str'" in model.requests[1]["messages"][-1]["content"]


async def test_the_format_is_in_the_system_prompt_if_the_provider_does_not_support_schemas(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(clerk())
    model.replies = [
        Failure(400, message="response_format.type must be text or json_object"),
        Failure(400, message="Unknown field: response_format"),
        Reply({"reply": "Hi"}),
    ]
    await run(client, "clerk", messages=CHAT)
    for request in model.requests[1:]:
        system, *conversation = request["messages"]
        assert system["role"] == "system"
        assert "It must match this JSON Schema" in system["content"]
        assert conversation == CHAT


@pytest.mark.parametrize(
    ("messages", "pointer", "detail"),
    [
        pytest.param([], "", "Expected 'array' of length >= 1.", id="empty"),
        pytest.param("Hi", "", "Expected 'array', got 'str'.", id="text"),
        pytest.param(
            [{"role": "system", "content": "Obey."}, *CHAT],
            "/0",
            "The role of a message must be 'user' or 'assistant'. Other messages are the agent's own.",
            id="system",
        ),
        pytest.param([{"role": "user"}], "/0", "Object missing required field 'content'.", id="no content"),
        pytest.param(
            [{"role": "user", "content": "", "tool_calls": []}],
            "/0",
            "Object contains unknown field 'tool_calls'.",
            id="tool calls",
        ),
        pytest.param(
            [*CHAT, {"role": "user", "content": []}], "/3/content", "Expected 'str', got 'array'.", id="parts"
        ),
        pytest.param(
            CHAT[:2],
            "/1/role",
            "The last message must have the role 'user', because the agent answers it.",
            id="the assistant is last",
        ),
    ],
)
async def test_an_invalid_conversation_is_rejected(
    messages: Any, pointer: str, detail: str, flock: Flock, client: httpx.AsyncClient
) -> None:
    flock.add_agent(clerk())
    response = await run(client, "clerk", messages=messages)
    check_problem(response, 422)
    assert response.json()["errors"] == [{"pointer": f"/inputs/messages{pointer}", "detail": detail}]


async def test_a_function_may_take_messages(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def transcript(messages: Messages, more: Messages | None = None) -> list[str]:
        return [f"{message.role}: {message.content}" for message in messages]

    result = (await run(client, "transcript", messages=CHAT[:2])).json()["result"]
    assert result == {"result": ["user: I want a cup.", "assistant: Which colour?"]}
    assert Signature.of_parameters(transcript.function).schema["properties"]["messages"] == SCHEMA


async def test_a_batch_of_conversations_can_be_a_file(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    flock.add_agent(clerk())
    lines = [json.dumps({"messages": messages}) for messages in (CHAT, CHAT[:2])]
    check = await client.post(
        "/run/batch?agent_name=clerk&dry_run=true",
        content="\n".join(lines),
        headers={"Content-Type": "application/x-ndjson"},
    )
    assert [error["pointer"] for error in check.json()["errors"]] == ["/messages/1/role"]


@pytest.mark.parametrize(
    ("input", "options", "words"),
    [
        ("a: Messages, b: Messages", {}, "may have one conversation, and it must be required.*'a', 'b'"),
        ("a: Messages | None", {}, "it must be required.*'a'"),
        ("a: Messages", {"examples": [({"a": CHAT}, {"reply": "x"})]}, "examples= would look like its messages"),
    ],
)
def test_a_conversation_that_cannot_be_sent_is_refused(input: str, options: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        clerk(input, **options)

"""The client of chat completions: requests, answers, retries and errors."""

import enum
import functools
import gzip
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import time
import types
import zlib
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import anyio
import anyio.abc
import httpx
import msgspec
import pytest

from flock.agents.signature import Signature
from flock.core import Flock, FlockFactory, Model
from flock.errors import DefinitionError, ModelError
from flock.models import requests
from flock.models.completions import Completion, Message, ToolSchema
from flock.models.llm import ModelClient
from flock.models.providers import PROVIDERS, check_model
from flock.models.requests import Request, function_of
from flock.runs import Usage
from flock.testing import Failure, FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.sockets import BOMB_BYTES, gzip_bomb, little_memory, socket_server

MESSAGES = [Message("system", "Do it."), Message("user", "text: hello")]
SCHEMA = Signature.of("sentiment: Literal['good', 'bad'] | how it sounds, words: list[str]").schema
GOOD = {"sentiment": "good", "words": []}

pytestmark = pytest.mark.anyio


@pytest.fixture
async def models(model: FakeModel) -> AsyncIterator[ModelClient]:
    async with ModelClient("openai/gpt-4o", transport=model.transport, backoff_s=0.001) as made:
        yield made


class Ignored:
    """A listener that ignores what it receives."""

    def text(self, piece: str) -> None: ...

    def reasoning(self, piece: str) -> None: ...

    def reset(self) -> None: ...


async def ask(models: ModelClient, name: str | None = None, **settings: Any) -> Completion:
    return await models.complete(name, Request(MESSAGES, SCHEMA, **settings))


async def fail(models: ModelClient, name: str | None = None, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await ask(models, name, **settings)
    assert caught.value.error_type in ModelError.ERROR_TYPES
    return caught.value


# Requests


async def test_a_request_follows_the_openai_documentation(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Reply(GOOD)]
    completion = await ask(models, temperature=0, max_tokens=50)
    assert completion.text == '{"sentiment":"good","words":[]}'
    assert completion.usage == Usage(input_tokens=10, output_tokens=5)
    assert model.requests == [
        {
            "model": "gpt-4o",
            "messages": [{"role": "system", "content": "Do it."}, {"role": "user", "content": "text: hello"}],
            "temperature": 0,
            "max_completion_tokens": 50,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "answer",
                    "strict": True,
                    "schema": {
                        "title": "Fields",
                        "type": "object",
                        "properties": {
                            "sentiment": {"enum": ["good", "bad"], "description": "how it sounds"},
                            "words": {"type": "array", "items": {"type": "string"}},
                        },
                        "required": ["sentiment", "words"],
                        "additionalProperties": False,
                    },
                },
            },
        }
    ]
    assert model.requests[0].headers["authorization"] == "Bearer sk-test-key-of-the-tests"


async def test_a_strict_schema_has_only_supported_formats(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Reply(GOOD)]
    schema = Signature.of("a: datetime, b: list[date], c: time | None, d: timedelta, e: Decimal").schema
    await models.complete(None, Request(MESSAGES, schema))
    sent = model.requests[0]["response_format"]["json_schema"]
    assert sent["strict"] is True
    assert sent["schema"]["properties"] == {
        "a": {"type": "string", "format": "date-time"},
        "b": {"type": "array", "items": {"type": "string", "format": "date"}},
        "c": {"anyOf": [{"type": "string", "format": "time"}, {"type": "null"}]},
        "d": {"type": "string", "format": "duration"},
        "e": {"type": "string"},
    }


async def test_a_constraint_that_strict_mode_does_not_support_is_described(
    models: ModelClient, model: FakeModel
) -> None:
    model.replies = [Reply(GOOD)]
    constraints: dict[str, Any] = {
        "short": {"type": "string", "maxLength": 5, "description": "a word"},
        "odd": {"type": "string", "pattern": "^(?!a)b"},
        "plate": {"type": "string", "pattern": "^[A-Z]+$"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
    }
    await models.complete(None, Request(MESSAGES, {"type": "object", "properties": constraints}))
    sent = model.requests[0]["response_format"]["json_schema"]
    assert sent["strict"] is True
    assert sent["schema"]["properties"] == {
        "short": {"type": "string", "description": "a word (maxLength: 5)"},
        "odd": {"type": "string", "description": '(pattern: "^(?!a)b")'},
        "plate": {"type": "string", "pattern": "^[A-Z]+$"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "description": "(uniqueItems: true)"},
    }


@pytest.mark.parametrize("provider", sorted(PROVIDERS.keys() - {"azure"}))
async def test_each_provider_has_its_own_address_and_key(
    provider: str, models: ModelClient, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = PROVIDERS[provider].key_variable
    if variable:
        monkeypatch.setenv(variable, f"key-of-{provider}")
    model.replies = [Reply(GOOD)]
    await ask(models, f"{provider}/vendor/model:1")
    assert model.requests[0]["model"] == "vendor/model:1"
    assert model.requests[0].headers["host"] in PROVIDERS[provider].base_url
    assert model.requests[0].headers.get("authorization") == (f"Bearer key-of-{provider}" if variable else None)


async def test_environment_variables_override_an_address(
    models: ModelClient, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gateway.example/openai/")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-1")
    monkeypatch.setenv("GROQ_API_KEY", "key-of-groq")
    model.replies = [Reply(GOOD), Reply(GOOD)]
    await ask(models)
    await ask(models, "groq/x")
    first, second = (request.headers for request in model.requests)
    assert first["host"] == "gateway.example"
    assert (first["openai-organization"], first["openai-project"]) == ("org-1", "proj-1")
    assert second["host"] == "api.groq.com", "one provider's address is not another's"
    assert "openai-organization" not in second


class Tree(msgspec.Struct):
    name: str
    children: "list[Tree]" = []


@pytest.mark.parametrize(
    ("signature", "is_strict"),
    [
        pytest.param("a: int | None, b: list[dict]", False, id="object of any keys"),
        pytest.param("a: Any", False, id="anything"),
        pytest.param("a: list", False, id="list of anything"),
        pytest.param("a: list[list[int]] | x, d: date | None", True, id="nested lists"),
        pytest.param("tree: Tree", True, id="recursive"),
        pytest.param("pair: tuple[int, str]", False, id="tuple"),
    ],
)
async def test_strict_mode_is_requested_only_if_the_schema_allows_it(
    signature: str, is_strict: bool, models: ModelClient, model: FakeModel
) -> None:
    model.replies = [Reply(GOOD)]
    await models.complete(None, Request(MESSAGES, Signature.of(signature, {"Tree": Tree}).schema))
    assert model.requests[0]["response_format"]["json_schema"]["strict"] is is_strict


class Pair(msgspec.Struct):
    key: str
    values: dict[str, int]


def levels(count: int) -> Any:
    inner: Any = int
    for number in range(count):
        inner = msgspec.defstruct(f"Level{number}", [("x", inner)])
    return inner


OPEN = "a: str, b: dict[str, int]"


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (OPEN, "/b may have any keys"),
        ("a: list[Pair]", "/a/0/values may have any keys"),
        ("a: Any", "/a may be anything"),
        ("a: list", "/a is a tuple, or a list of anything"),
        ("a: tuple[int, str] | None", "/a is a tuple, or a list of anything"),
        (levels(12), "it has 11 levels of objects in objects, more than 10"),
        (msgspec.defstruct("Wide", [(f"f{n}", int) for n in range(5001)]), "it has 5001 fields, more than 5000"),
        ("a: Many", "it has 1001 values of enums, more than 1000"),
    ],
)
def test_an_output_that_strict_mode_does_not_allow_is_an_error_at_the_definition(output: Any, words: str) -> None:
    members: Any = [f"m{n}" for n in range(1001)]
    types = {"Pair": Pair, "Many": enum.StrEnum("Many", members)}
    make = functools.partial(FlockFactory.create_default_agent, "writer", output=output, types=types)
    expected = re.escape(f"The output of 'writer' is not allowed in the strict mode of 'openai/gpt-4o': {words}. ")
    with pytest.raises(DefinitionError, match=expected):
        make(model=["groq/x", "openai/gpt-4o"])
    with pytest.raises(DefinitionError, match=expected):
        Flock(model="openai/gpt-4o").add_agent(make())


@pytest.mark.parametrize("output", [levels(11), "t: Tree", "a: int | None, b: list[list[str]]"])
def test_other_outputs_are_allowed_in_strict_mode(output: Any) -> None:
    FlockFactory.create_default_agent("writer", output=output, types={"Tree": Tree}, model="openai/gpt-4.1-mini")


@pytest.mark.parametrize(
    "model",
    [
        "openai/gpt-3.5-turbo",
        "groq/x",
        "local/smollm2-135m",
        Model("openai/gpt-4o", base_url="http://gateway/v1"),
        Model("openai/gpt-4o", strict=False),
        None,
    ],
)
def test_a_model_that_is_not_known_to_be_strict_allows_any_output(model: Any) -> None:
    Flock(model="openai/gpt-4o" if model else None).add_agent(
        FlockFactory.create_default_agent("writer", output=OPEN, model=model)
    )
    with pytest.raises(DefinitionError, match="in the strict mode of 'vllm/x'"):
        FlockFactory.create_default_agent("writer", output=OPEN, model=Model("vllm/x", strict=True))


async def test_a_model_may_be_asked_without_strict_mode(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Reply(GOOD), Reply(GOOD)]
    for strict in (None, False):
        await models.complete(Model("openai/gpt-4o", strict=strict), Request(MESSAGES, SCHEMA))
    assert [sent["response_format"]["json_schema"]["strict"] for sent in model.requests] == [True, False]


async def test_a_server_without_json_schema_falls_back_to_json_mode_then_to_text(
    models: ModelClient, model: FakeModel
) -> None:
    """An unsupported format is tried once. The next call starts with a format that the server supports."""
    model.replies = [
        Failure(400, message="response_format.type must be text or json_object"),
        Failure(422, message="Unknown field: response_format"),
        Reply('```json\n{"sentiment": "good", "words": []}\n```'),
        Reply(GOOD),
    ]
    assert (await ask(models)).text == '{"sentiment": "good", "words": []}'
    await ask(models)
    formats = [request.get("response_format", {}).get("type") for request in model.requests]
    assert formats == ["json_schema", "json_object", None, None]
    for request in model.requests[1:]:
        assert '"enum": ["good", "bad"]' in request["messages"][0]["content"]
        assert len(request["messages"]) == 2


async def test_a_refused_schema_does_not_change_the_format_of_other_calls(
    models: ModelClient, model: FakeModel
) -> None:
    model.replies = [Failure(400, message="Invalid schema for response_format 'answer'"), Reply(GOOD), Reply(GOOD)]
    await ask(models)
    await ask(models)
    formats = [request.get("response_format", {}).get("type") for request in model.requests]
    assert formats == ["json_schema", "json_object", "json_schema"]


async def test_retries_of_a_call_share_its_key_and_each_format_has_its_own(
    models: ModelClient, model: FakeModel
) -> None:
    """A server that replays its answer to a key would refuse the next format like the first."""
    model.replies = [
        Failure(500),
        Failure(429),
        Failure(400, message="response_format.type must be text or json_object"),
        Failure(422, message="Unknown field: response_format"),
        Reply(GOOD),
        Reply(GOOD),
    ]
    await ask(models, idempotency_key="run:1/0")
    await ask(models)
    sent = [request.headers.get("idempotency-key") for request in model.requests]
    assert sent == ["run:1/0"] * 3 + ["run:1/0/json_object", "run:1/0/text", None]


# Permanent errors


def html(status: int) -> httpx.Response:
    return httpx.Response(status, html="<html><body>Bad gateway</body></html>")


PERMANENT = [
    pytest.param(Failure(400), "model_bad_request", "rejected the request (HTTP 400). Check the inputs", id="400"),
    pytest.param(Failure(401), "model_authentication", "OPENAI_API_KEY (HTTP 401). Set a valid key.", id="401"),
    pytest.param(Failure(403), "model_authentication", "this API key (HTTP 403). Use another key", id="403"),
    pytest.param(
        Failure(404), "model_not_found", "does not exist at this provider (HTTP 404). Check its name.", id="404"
    ),
    pytest.param(Failure(422), "model_bad_request", "HTTP 422", id="422"),
    pytest.param(
        httpx.Response(422, json={"detail": "no"}), "model_bad_request", "HTTP 422", id="422 with another body"
    ),
    pytest.param(httpx.Response(400), "model_bad_request", "HTTP 400", id="400 without a body"),
    pytest.param(httpx.Response(302), "model_bad_request", "HTTP 302", id="a redirect is not followed with the key"),
    pytest.param(Failure(400, "context_length_exceeded"), "model_context_length", "its context window", id="too long"),
    pytest.param(
        httpx.Response(400, json={"error": {"code": 400, "message": "long", "type": "exceed_context_size_error"}}),
        "model_context_length",
        "its context window",
        id="too long for llama.cpp",
    ),
    pytest.param(Failure(400, "content_filter"), "model_content_filter", "content filter", id="prompt filtered"),
    pytest.param(
        Failure(429, "insufficient_quota"), "model_quota", "no quota left (HTTP 429). Check the plan", id="no quota"
    ),
    pytest.param(
        Failure(429, retry_after_s=121),
        "model_rate_limited",
        "rate limit (HTTP 429). Try again",
        id="Retry-After too long",
    ),
    pytest.param(Failure(503, retry_after_s=9999), "model_unavailable", "HTTP 503", id="503, Retry-After too long"),
    pytest.param(Reply("{", finish_reason="length"), "model_truncated", "cut off at its token limit", id="length"),
    pytest.param(Reply(None, refusal="I can't"), "model_refusal", "declined to answer", id="refusal"),
    pytest.param(Reply("", finish_reason="content_filter"), "model_content_filter", "filter", id="answer filtered"),
    pytest.param(
        httpx.Response(200, json={"choices": []}), "model_bad_response", "returned no choices", id="no choices"
    ),
    pytest.param(
        httpx.Response(200, json={"error": {"message": "x"}}),
        "model_bad_response",
        "in the body",
        id="200 with an error",
    ),
    pytest.param(html(200), "model_bad_response", "not JSON", id="200 with HTML"),
    pytest.param(httpx.Response(200, text="[" * 100_000), "model_bad_response", "not JSON", id="200 nested too deep"),
    pytest.param(
        httpx.Response(200, json={"hello": 1}), "model_bad_response", "chat completion", id="200 with another object"
    ),
    pytest.param(httpx.Response(200, json=[]), "model_bad_response", "chat completion", id="200 with a list"),
    pytest.param(Reply(None), "model_bad_response", "empty answer", id="no content"),
    pytest.param(Reply("  "), "model_bad_response", "empty answer", id="blank content"),
]


async def test_an_answer_in_parts_is_their_text(models: ModelClient, model: FakeModel) -> None:
    """Reasoning models of Mistral answer so."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    parts = [thinking, {"type": "text", "text": '{"a": "x",'}, {"type": "text", "text": ' "n": []}'}, {"type": "text"}]
    body = {"choices": [{"message": {"content": parts}, "finish_reason": "stop"}]}
    model.replies = [httpx.Response(200, json=body)]
    assert (await ask(models)).text == '{"a": "x", "n": []}'
    body = {"choices": [{"message": {"content": [thinking]}, "finish_reason": "stop"}]}
    model.replies = [httpx.Response(200, json=body)]
    assert "empty answer" in str(await fail(models))


@pytest.mark.parametrize(("reply", "error_type", "words"), PERMANENT)
async def test_a_permanent_error_is_not_retried(
    reply: Any, error_type: str, words: str, models: ModelClient, model: FakeModel
) -> None:
    model.replies = [reply]
    failure = await fail(models)
    assert failure.error_type == error_type
    assert words in str(failure)
    assert "openai/gpt-4o" in str(failure)


# Transient errors


TRANSIENT = [
    pytest.param(Failure(408), "model_unavailable", id="408"),
    pytest.param(Failure(409), "model_unavailable", id="409"),
    pytest.param(Failure(500), "model_unavailable", id="500"),
    pytest.param(html(502), "model_unavailable", id="502 as HTML"),
    pytest.param(httpx.Response(503), "model_unavailable", id="503 without a body"),
]
REFUSED = [
    pytest.param(Failure(429), id="429"),
    pytest.param(Failure(429, headers={"retry-after": "soon"}), id="429 with nonsense in Retry-After"),
    pytest.param(Failure(503, retry_after_s=0.001), id="503 with Retry-After"),
    pytest.param(Failure(529), id="529"),
]


@pytest.mark.parametrize(("reply", "error_type"), TRANSIENT)
async def test_a_transient_error_is_tried_three_times(
    reply: Any, error_type: str, models: ModelClient, model: FakeModel
) -> None:
    model.replies = [reply, reply, reply]
    assert (await fail(models)).error_type == error_type
    assert len(model.requests) == 3


@pytest.mark.parametrize(("reply", "error_type"), TRANSIENT)
async def test_a_call_succeeds_if_its_third_attempt_does(
    reply: Any, error_type: str, models: ModelClient, model: FakeModel
) -> None:
    model.replies = [reply, reply, Reply(GOOD)]
    assert (await ask(models)).text


@pytest.mark.parametrize("reply", REFUSED)
async def test_a_refusal_is_not_a_failed_attempt(reply: Any, models: ModelClient, model: FakeModel) -> None:
    """Otherwise many calls at the same time would fail because of the provider's rate limit."""
    model.replies = [reply, Failure(500), reply, reply, Failure(500), reply, Reply(GOOD)]
    assert (await ask(models)).text


@pytest.mark.slow
async def test_calls_to_the_local_model_are_retried_the_same_way(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(500), Failure(500), Reply(GOOD), Failure(500), Failure(500), Failure(500)]
    await ask(models, "local/smollm2-135m")
    assert (await fail(models, "local/smollm2-135m")).error_type == "model_unavailable"
    assert model.requests[0]["frequency_penalty"] == 0.6
    assert model.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["words"]["maxItems"] == 5


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(lambda: {"retry-after-ms": "80"}, id="milliseconds"),
        pytest.param(lambda: {"retry-after": "0.08"}, id="seconds"),
        # A date has whole seconds: this one is between one and two seconds away.
        pytest.param(lambda: {"retry-after": formatdate(time.time() + 2, usegmt=True)}, id="HTTP date"),
    ],
)
async def test_retry_after_is_obeyed(headers: Callable[[], dict[str, str]], model: FakeModel) -> None:
    model.replies = [Failure(429, headers=headers()), Reply(GOOD)]
    async with ModelClient("openai/x", transport=model.transport, backoff_s=0) as models:
        started = time.monotonic()
        await ask(models)
    assert time.monotonic() - started >= 0.08


async def test_a_retry_after_date_in_the_past_means_now(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(429, headers={"retry-after": formatdate(0, usegmt=True)}), Reply(GOOD)]
    await ask(models)
    assert len(model.requests) == 2


async def test_the_backoff_doubles_and_has_jitter(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flock.llm")
    model.replies = [Failure(500), Failure(500), Failure(500)]
    async with ModelClient("openai/x", transport=model.transport, backoff_s=0.4) as models:
        await fail(models)
    first, second = (float(found) for found in re.findall(r"Retrying in ([\d.]+) s", caplog.text))
    assert 0.3 <= first <= 0.4
    assert 0.6 <= second <= 0.8


async def test_a_pause_past_the_deadline_is_skipped(model: FakeModel) -> None:
    """The known error is more useful than the timeout that would follow."""
    model.replies = [Failure(503, retry_after_s=100)]
    async with ModelClient("openai/x", transport=model.transport) as models:
        with anyio.fail_after(PATIENCE_S):
            assert (await fail(models)).error_type == "model_unavailable"


async def test_the_error_message_of_a_provider_goes_only_to_the_log(models: ModelClient, model: FakeModel) -> None:
    model.replies = [
        Failure(401, message="Incorrect API key provided: sk-proj-abc123", headers={"x-request-id": "req_7"})
    ]
    failure = await fail(models)
    assert "Incorrect" not in str(failure)
    assert "Incorrect API key provided" in failure.log_detail
    assert "req_7" in failure.log_detail
    assert "abc123" not in failure.log_detail


@pytest.mark.parametrize("key", ["sk-a b", "sk-a\nb", "sk-…"])
async def test_a_key_that_no_header_can_have_is_named(
    key: str, models: ModelClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    failure = await fail(models)
    assert failure.error_type == "model_not_configured"
    assert "'openai/gpt-4o' in OPENAI_API_KEY has a space, a line break" in str(failure)
    assert key not in str(failure)


# A real socket


async def read_request(stream: anyio.abc.SocketStream) -> None:
    received = b""
    while b'"response_format"' not in received:
        received += await stream.receive()


async def silent(stream: anyio.abc.SocketStream) -> None:
    await read_request(stream)
    await anyio.sleep_forever()


async def dropped_body(stream: anyio.abc.SocketStream) -> None:
    await read_request(stream)
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{")


async def dropped_at_once(stream: anyio.abc.SocketStream) -> None:
    await read_request(stream)


async def not_http(stream: anyio.abc.SocketStream) -> None:
    await read_request(stream)
    await stream.send(b"220 mail.example ESMTP\r\n")


@pytest.mark.parametrize(
    ("behaviour", "error_type"),
    [
        (silent, "model_timeout"),
        (dropped_body, "model_unavailable"),
        (dropped_at_once, "model_unavailable"),
        (not_http, "model_unavailable"),
    ],
)
async def test_a_failed_connection_is_tried_three_times(
    behaviour: Callable[[anyio.abc.SocketStream], Any], error_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with socket_server(behaviour) as (url, connections):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        timeout_s = 0.2 if behaviour is silent else PATIENCE_S
        async with ModelClient(backoff_s=0.001, read_timeout_s=timeout_s) as models:
            assert (await fail(models, "vllm/x")).error_type == error_type
    assert len(connections) == 3


async def test_a_refused_connection_is_reported_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BASE_URL", "http://127.0.0.1:9/v1")
    async with ModelClient(backoff_s=0.001) as models:
        failure = await fail(models, "vllm/x")
    assert failure.error_type == "model_unavailable"
    assert "could not be reached" in str(failure)


def bomb(status: int, content: bytes, encoding: str = "gzip", type_: str = "application/json") -> bytes:
    head = f"Content-Type: {type_}\r\nContent-Encoding: {encoding}\r\nContent-Length: {len(content)}"
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n\r\n".encode() + content


@pytest.mark.parametrize("type_", ["application/json", "text/event-stream"])
@pytest.mark.parametrize(
    ("status", "encoding", "error_type", "tries"),
    [
        pytest.param(200, "gzip", "model_bad_response", 1, id="answer"),
        pytest.param(200, "gzip, gzip", "model_bad_response", 1, id="compressed twice"),
        pytest.param(400, "gzip", "model_bad_request", 1, id="error"),
        pytest.param(500, "gzip", "model_unavailable", 3, id="server error"),
        pytest.param(500, "gzip, gzip", "model_unavailable", 3, id="server error, compressed twice"),
    ],
)
async def test_a_compressed_answer_is_read_up_to_a_limit_and_not_paid_again(
    status: int, encoding: str, error_type: str, tries: int, type_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 MiB are read of the 256 MiB that 0.3 MiB of gzip have, in a stream too, and 64 KiB of an error."""
    content = gzip_bomb() if encoding == "gzip" else gzip.compress(gzip_bomb())

    async def explode(stream: anyio.abc.SocketStream) -> None:
        await read_request(stream)
        await stream.send(bomb(status, content, encoding, type_))
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()

    async with socket_server(explode) as (url, connections):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        async with ModelClient(backoff_s=0.001) as models:
            with little_memory():
                failure = await fail(models, "vllm/x", listener=Ignored() if "stream" in type_ else None)
    assert (failure.error_type, len(connections)) == (error_type, tries)
    if status == 200:
        reason = "is too long (more than 16777216 bytes)" if encoding == "gzip" else "Content-Encoding 'gzip, gzip'"
        assert reason in str(failure)


async def test_an_endless_answer_is_read_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = 0

    async def write(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        await read_request(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        while sent < BOMB_BYTES:
            await stream.send(b" " * 65536)
            sent += 65536

    async with socket_server(write) as (url, connections):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        async with ModelClient(backoff_s=0.001) as models:
            assert "is too long" in str(await fail(models, "vllm/x"))
    assert sent < BOMB_BYTES  # what is not read is in the buffers of the kernel
    assert len(connections) == 1


async def test_what_follows_a_compressed_answer_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, answer = 0, json.dumps({"choices": [{"message": {"content": json.dumps(GOOD)}}]}).encode()

    async def write(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        await read_request(stream)
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(answer))
        while sent < BOMB_BYTES:
            await stream.send(b" " * 65536)
            sent += 65536

    async with socket_server(write) as (url, _):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        async with ModelClient(backoff_s=0.001) as models:
            assert (await ask(models, "vllm/x")).text == json.dumps(GOOD)
    assert sent < BOMB_BYTES


async def test_compressed_answers_are_read_and_no_other_encoding_is_requested(model: FakeModel) -> None:
    """A compressed one of exactly the limit is no bomb."""
    answer = json.dumps({"choices": [{"message": {"content": json.dumps(GOOD)}}]}).encode()
    packed = gzip.compress(answer.ljust(16 * 1024 * 1024))
    model.replies = [
        httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(packed)),
        httpx.Response(200, headers={"Content-Encoding": "deflate"}, stream=httpx.ByteStream(zlib.compress(answer))),
        httpx.Response(200, headers={"Content-Encoding": "utf-8"}, stream=httpx.ByteStream(answer)),
        httpx.Response(200, headers={"Content-Encoding": "br"}, stream=httpx.ByteStream(answer)),
    ]
    async with ModelClient("openai/gpt-4o", transport=model.transport) as models:
        for _ in range(3):
            assert (await ask(models)).text == json.dumps(GOOD)
        failure = await fail(models)
    assert failure.error_type == "model_bad_response"
    assert "Content-Encoding 'br', although only 'gzip' is accepted" in str(failure)
    assert {request.headers["accept-encoding"] for request in model.requests} == {"gzip"}


async def test_cancelling_aborts_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    request_received, aborted = anyio.Event(), anyio.Event()

    async def watch(stream: anyio.abc.SocketStream) -> None:
        await read_request(stream)
        request_received.set()
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        aborted.set()

    async with socket_server(watch) as (url, _):
        monkeypatch.setenv("VLLM_BASE_URL", url)
        async with ModelClient() as models, anyio.create_task_group() as tasks:
            tasks.start_soon(ask, models, "vllm/x")
            await request_received.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(PATIENCE_S):
            await aborted.wait()


# Configuration


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("openai/gpt-4o", "Set the environment variable OPENAI_API_KEY", id="no key"),
        pytest.param("groq/x", "GROQ_API_KEY", id="no key of another provider"),
        pytest.param("openai/", "Write provider/model", id="no model"),
        pytest.param("openai", "Write provider/model", id="no slash"),
        pytest.param("local/", "Write provider/model", id="no local model"),
        pytest.param("nowhere/x", r"pip install 'litellm>=[\d.]+'$", id="unknown provider"),
        pytest.param("opnai/gpt-4o", "Did you mean 'openai'", id="misspelt provider"),
        pytest.param("OpenAI/gpt-4o", "Did you mean 'openai'", id="provider in another case"),
        pytest.param("gpt-4o", "has no provider. Write provider/model", id="no provider"),
        pytest.param(None, "Pass model= to the agent or to Flock", id="no model at all"),
    ],
)
async def test_a_configuration_error_says_what_to_do(
    name: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "litellm", None)  # as if it is not installed
    async with ModelClient() as models:
        failure = await fail(models, name)
    assert failure.error_type == "model_not_configured"
    assert re.search(words, str(failure))
    with pytest.raises(ModelError, match=f"^{re.escape(str(failure))}$"):
        check_model(name)


@pytest.mark.parametrize(
    "name",
    ["openai/gpt-4o", "ollama/x", "vllm/vendor/model:1", pytest.param("local/smollm2-135m", marks=pytest.mark.slow)],
)
def test_a_configured_model_passes_the_check(name: str) -> None:
    check_model(name)


@pytest.mark.parametrize("library", ["httpx", pytest.param("httpx2", marks=pytest.mark.slow)])
async def test_httpx2_is_used_if_it_is_installed_and_fails_alike(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "httpx":
        monkeypatch.setitem(sys.modules, "httpx2", None)  # as if it is not installed
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    async with ModelClient(backoff_s=0.001) as models:
        failure = await fail(models, "openai/gpt-4o")
    assert failure.error_type == "model_unavailable"
    assert failure.__cause__ is not None
    assert type(failure.__cause__.__cause__).__module__.partition(".")[0] == library


def test_with_litellm_only_a_near_miss_is_an_unknown_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only litellm knows its providers, and importing it takes ten seconds and a network request."""
    monkeypatch.setitem(sys.modules, "litellm", types.ModuleType("litellm"))
    sys.modules["litellm"].__spec__ = importlib.machinery.ModuleSpec("litellm", None)
    for name in (
        "cohere/command",
        "together_ai/x",
        "fireworks_ai/x",
        "azure_ai/x",
        "nvidia_nim/x",
        "gpt-4o",
        "ollama_chat/x",
    ):
        check_model(name)
    with pytest.raises(ModelError, match="Did you mean 'openai'") as caught:
        check_model("opnai/gpt-4o")
    assert "pip install" not in str(caught.value)


HEADERS = [(b"server", "caché".encode())]


@pytest.mark.parametrize(
    ("responses", "error_type", "calls"),
    [
        pytest.param(
            [httpx.Response(429, headers=HEADERS), httpx.Response(400, headers=HEADERS)], "model_bad_request", 2
        ),
        pytest.param([httpx.Response(200, headers=HEADERS, text="<html>")], "model_bad_response", 1),
    ],
    ids=["errors", "no JSON"],
)
async def test_a_header_in_another_encoding_does_not_hide_an_error(
    responses: list[httpx.Response], error_type: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x")
    left = iter(responses)
    asked: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return next(left)

    async with ModelClient(transport=httpx.MockTransport(respond), backoff_s=0.001) as models:
        with pytest.raises(ModelError) as caught:
            await models.complete("openai/gpt-4o", Request(MESSAGES, SCHEMA))
    assert (caught.value.error_type, len(asked)) == (error_type, calls)


def test_strict_forms_of_few_and_short_schemas_are_kept() -> None:
    """A client may send schemas of its tools, of any length."""

    def is_kept(schema: dict[str, Any]) -> bool:
        tool = ToolSchema(name="look", description="Look.", schema=schema)
        return function_of(tool)["function"]["parameters"] is function_of(tool)["function"]["parameters"]

    short: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    assert is_kept(short)
    assert not is_kept(short | {"description": "long " * requests.MAX_KEPT_BYTES})
    assert is_kept({**short, "properties": {"a": {"type": "string", "default": "é"}}})
    assert not is_kept({**short, "properties": {"a": {"type": "string", "default": "\ud800"}}})  # no JSON has it
    for number in range(2 * requests.MAX_KEPT):
        is_kept({**short, "description": str(number)})
    assert len(requests._kept) <= requests.MAX_KEPT


# litellm


async def test_what_litellm_changes_in_a_request_is_not_in_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some providers it removes what they do not support from the schemas that it gets."""
    litellm, sent = types.ModuleType("litellm"), list[bytes]()

    async def acompletion(**request: Any) -> Any:
        sent.append(msgspec.json.encode([request.get("tools"), request.get("response_format")]))
        for tool in request.get("tools", []):
            tool["function"]["parameters"].clear()
        if "response_format" in request:
            request["response_format"]["json_schema"]["schema"]["properties"].clear()
        answer = {"choices": [{"message": {"content": '{"a": 1}'}}]}
        return types.SimpleNamespace(model_dump=lambda: answer)

    vars(litellm).update(acompletion=acompletion, supports_function_calling=lambda name: True)
    litellm.__spec__ = importlib.machinery.ModuleSpec("litellm", None)
    monkeypatch.setitem(sys.modules, "litellm", litellm)
    tool = ToolSchema(name="look", description="Look.", schema=SCHEMA)
    async with ModelClient() as models:
        for request in [Request(MESSAGES, SCHEMA), Request(MESSAGES, SCHEMA, tools=[tool])] * 2:
            await models.complete("another/model", request)
    assert sent[:2] == sent[2:]


LITELLM = """
import asyncio, json, sys
from flock.errors import ModelError
from flock.models.completions import Message
from flock.models.llm import ModelClient
from flock.models.requests import Request

async def main():
    async with ModelClient() as models:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        for name in sys.argv[1:]:
            try:
                messages = [Message("system", "Be brief."), Message("user", "hi")]
                options = {"max_tokens": 9, "temperature": 0, "traceparent": "00-some-trace"}
                options["idempotency_key"] = "run:1/0"
                done = await models.complete(name, Request(messages, schema, **options))
                print("ANSWER", done.text, done.usage.output_tokens)
            except ModelError as exc:
                print("ERROR", exc.error_type)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_litellm_itself_calls_a_provider_that_is_not_built_in(model: FakeModel) -> None:
    """Run the real package in its own process against a socket: two answers, then an error. Claude has a cache."""
    model.replies = [Reply({"a": 1}), Reply({"a": 1}), Failure(401)]
    names = ["lm_studio/some-model", "dashscope/some-claude", "lm_studio/some-model"]
    with model.serve() as url:
        env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        for provider in ("LM_STUDIO", "DASHSCOPE"):
            env |= {f"{provider}_API_BASE": url, f"{provider}_API_KEY": "x"}
        command = [sys.executable, "-c", LITELLM, *names]
        done = await anyio.run_process(command, env=env, stderr=subprocess.STDOUT, check=False)
    sent = [(request.headers["traceparent"], request.headers["idempotency-key"]) for request in model.requests]
    assert sent == [("00-some-trace", "run:1/0")] * 3
    first, of_claude, _ = [[message["content"] for message in request["messages"]] for request in model.requests]
    assert first[1] == "hi"
    assert [content[0]["cache_control"] for content in of_claude] == [{"type": "ephemeral"}] * 2
    assert done.stdout.count(b'ANSWER {"a":1} 5') == 2, done.stdout.decode()
    assert b"ERROR model_authentication" in done.stdout


LITELLM_TOOLS = """
import asyncio, json
from flock.models.completions import Message
from flock.models.llm import ModelClient
from flock.models.requests import Request
from flock.models.completions import ToolSchema

async def main():
    async with ModelClient() as models:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        tools = [ToolSchema(name="look", description="Look.", schema={"type": "object", "properties": {}})]
        for model in ("fireworks_ai/some-model", "lm_studio/some-model"):
            done = await models.complete(model, Request([Message("user", "hi")], schema, tools=tools))
            print("CALL", done.tool_calls[0].function.name)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_litellm_knows_which_models_call_tools(model: FakeModel) -> None:
    """The others are asked for their next step as JSON."""
    step = {"next_thought": "", "next_tool_name": "look", "next_tool_args": {}}
    model.replies = [Reply(calls=[("look", {})]), Reply(step)]
    with model.serve() as url:
        names = ("LM_STUDIO", "FIREWORKS", "FIREWORKS_AI")
        env = os.environ | {f"{name}_API_BASE": url for name in names} | {f"{name}_API_KEY": "x" for name in names}
        env["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
        command = [sys.executable, "-c", LITELLM_TOOLS]
        done = await anyio.run_process(command, env=env, stderr=subprocess.STDOUT, check=False)
    assert done.stdout.count(b"CALL look") == 2, done.stdout.decode()
    assert [request.tool_names for request in model.requests] == [["look"], []]
    assert "next_tool_name" in model.requests[1].text

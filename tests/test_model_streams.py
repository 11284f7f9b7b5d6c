"""Streamed replies of models: the forms of the providers, failures in the middle, and what an agent emits."""

import ast
import enum
import functools
import itertools
import json
import logging
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

import anyio
import anyio.abc
import httpx
import msgspec
import pydantic
import pytest
from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from flock.agents.signature import Signature
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import ModelError
from flock.models import bodies, http, streams
from flock.models import clients as http_clients
from flock.models.completions import Completion, Message, ToolSchema
from flock.models.llm import ModelClient
from flock.models.models import Model
from flock.models.requests import Request
from flock.models.scanner import Scanner
from flock.runs import Event, Run, RunContext, RunStatus, Usage
from flock.testing import Failure, FakeModel, Reply
from tests.support import PATIENCE_S, slowness
from tests.support.engines import until
from tests.support.servers import Served
from tests.support.sockets import socket_server
from tests.test_ask import asked

MESSAGES = [Message("system", "Do it."), Message("user", "text: hello")]
SCHEMA = Signature.of("a: str, n: list[int]").schema
TEXT = '{"a": "H\u00e9 \u2028 \U0001f600", "n": [1]}'
TOOL = ToolSchema(name="look", description="Look.", schema={"type": "object", "properties": {"q": {"type": "string"}}})

#: The last chunk of a stream, in OpenAI's form.
USAGE: Mapping[str, Any] = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}

pytestmark = pytest.mark.anyio


def chunk(content: Any = None, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """Return one chunk of a streamed chat completion."""
    parts = delta if content is None else {"content": content, **delta}
    choice = {"index": 0, "delta": parts, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def sse(*events: Any) -> bytes:
    """Return server-sent events: strings as they are, and anything else as JSON."""
    data = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
    return "".join(f"data: {line}\n\n" for line in data).encode()


class Recorder:
    """A listener that remembers what it receives."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.received = anyio.Event()

    def text(self, piece: str) -> None:
        self.events.append(("text", piece))
        self.received.set()

    def reasoning(self, piece: str) -> None:
        self.events.append(("reasoning", piece))

    def reset(self) -> None:
        self.events.append(("reset", ""))

    def all_of(self, kind: str) -> str:
        """Return what was received of one kind since the last reset."""
        last = max((place for place, (name, _) in enumerate(self.events) if name == "reset"), default=0)
        return "".join(piece for name, piece in self.events[last:] if name == kind)

    @property
    def resets(self) -> int:
        """How often a text was invalid."""
        names = [name for name, _ in self.events if name != "reasoning"]
        return sum(pair == ("text", "reset") for pair in itertools.pairwise(names))


class Pieces(httpx.AsyncByteStream):
    """A body that arrives in pieces, and may break off with an error."""

    def __init__(self, pieces: Sequence[bytes], failure: Exception | None = None) -> None:
        self._pieces, self._failure = pieces, failure

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._failure is not None:
            raise self._failure


def replying(*streams: httpx.AsyncByteStream | bytes) -> tuple[httpx.MockTransport, list[Any]]:
    """Return a transport that sends these event streams, and the list of its requests."""
    replies, requests = list(streams), list[Any]()

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(json.loads(request.content))
        reply = replies.pop(0)
        stream = Pieces([reply]) if isinstance(reply, bytes) else reply
        return httpx.Response(200, headers={"Content-Type": "text/event-stream; charset=utf-8"}, stream=stream)

    return httpx.MockTransport(handle), requests


async def ask(models: ModelClient, listener: Recorder, name: str = "openai/x", **settings: Any) -> Completion:
    with anyio.fail_after(PATIENCE_S):
        return await models.complete(name, Request(MESSAGES, SCHEMA, listener=listener, **settings))


async def read(*streams: httpx.AsyncByteStream | bytes, **settings: Any) -> tuple[Completion, Recorder]:
    transport, requests = replying(*streams)
    recorder = Recorder()
    async with ModelClient(transport=transport, backoff_s=0.001) as models:
        completion = await ask(models, recorder, **settings)
    assert len(requests) == len(streams)
    return completion, recorder


async def fail(*streams: httpx.AsyncByteStream | bytes, **settings: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await read(*streams, **settings)
    assert caught.value.error_type in ModelError.ERROR_TYPES
    return caught.value


@pytest.fixture
async def models(model: FakeModel) -> AsyncIterator[ModelClient]:
    async with ModelClient("openai/gpt-4o", transport=model.transport, backoff_s=0.001) as made:
        yield made


# Providers

PARTS = [TEXT[:4], TEXT[4:8], TEXT[8:15], TEXT[15:]]
TOKENS = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def with_usage(data: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {**data, "usage": {"prompt_tokens": 10, "completion_tokens": tokens}}


PROVIDERS = {
    "openai": sse(
        {**chunk("", role="assistant", refusal=None), "usage": None, "obfuscation": "x7"},
        *({**chunk(part), "usage": None} for part in PARTS),
        {**chunk(finish_reason="stop"), "usage": None},
        {**chunk(), "choices": [], "usage": TOKENS},
        "[DONE]",
    ),
    "azure": sse({"choices": [], "prompt_filter_results": []}, *map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]"),
    "anthropic": sse(
        *(chunk(part, role="assistant") for part in PARTS), with_usage(chunk("", finish_reason="stop"), 5), "[DONE]"
    ),
    "gemini, usage in each chunk": sse(
        *(with_usage(chunk(part, role="assistant"), n) for n, part in enumerate(PARTS[:3])),
        with_usage(chunk(PARTS[3], "stop", role="assistant"), 5),
        "[DONE]",
    ),
    "ollama": sse(
        chunk("", role="assistant", reasoning="Let me "),
        chunk("", role="assistant", reasoning="see."),
        *(chunk(part, role="assistant") for part in PARTS),
        chunk("", "stop"),
        USAGE,
        "[DONE]",
    ),
    "llama.cpp": sse(
        chunk(None, role="assistant"),
        *map(chunk, PARTS),
        chunk(finish_reason="stop"),
        {**USAGE, "timings": {"predicted_ms": 1.5}},
        "[DONE]",
    ),
    "vllm": sse(chunk("", role="assistant"), *map(chunk, PARTS), chunk("", "stop", stop_reason=None), USAGE, "[DONE]"),
    "deepseek": b": keep-alive\n\n"
    + sse(
        chunk(None, role="assistant", reasoning_content=""),
        chunk(None, reasoning_content="Let me "),
        chunk(None, reasoning_content="see."),
        *(chunk(part, reasoning_content=None) for part in PARTS),
        with_usage(chunk("", "stop"), 5),
        "[DONE]",
    ),
    "openrouter, CRLF": (
        b": OPENROUTER PROCESSING\n\n"
        + sse(chunk("", reasoning="Let me see.", reasoning_details=[{}]), *map(chunk, PARTS), chunk("", "stop"), USAGE)
    ).replace(b"\n", b"\r\n"),
    "lines that end with CR": sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]").replace(b"\n", b"\r"),
    "no [DONE]": sse(*map(chunk, PARTS), chunk("", "stop"), USAGE),
    "no empty line at the end": sse(*map(chunk, PARTS), with_usage(chunk("", "stop"), 5), "[DONE]").rstrip(),
    "no finish reason": sse(*map(chunk, PARTS), USAGE, "[DONE]"),
    "data after [DONE]": sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]", chunk("more"), "not JSON"),
    "several answers": sse(
        *map(chunk, PARTS), {"choices": [{"index": 1, "delta": {"content": "no"}}]}, chunk("", "stop"), USAGE, "[DONE]"
    ),
    "unknown fields": b"id: 1\nretry: 5\nevent: message\n"
    + sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]"),
    "no space after the colon": sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]").replace(b": {", b":{"),
}
THINKING = ("ollama", "deepseek", "openrouter, CRLF")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", [1, 7, 100_000])
async def test_a_stream_of_each_provider_is_put_together(provider: str, size: int) -> None:
    """In pieces of one byte, which split lines and characters, and as a whole."""
    body = PROVIDERS[provider]
    completion, recorder = await read(Pieces([body[at : at + size] for at in range(0, len(body), size)]))
    assert (completion.text, completion.usage) == (TEXT, Usage(input_tokens=10, output_tokens=5))
    assert recorder.all_of("text") == TEXT
    assert recorder.all_of("reasoning") == ("Let me see." if provider in THINKING else "")
    assert recorder.resets == 0


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_a_connection_that_is_lost_anywhere_is_tried_again(provider: str) -> None:
    """If the reply was complete, only its usage is missing."""
    body = PROVIDERS[provider]
    complete_at = min(at for at in (body.find(b'"stop"'), body.find(b"[DONE]")) if at >= 0)
    for cut in range(0, complete_at, 41):
        lost = Pieces([body[:cut]], httpx.RemoteProtocolError("incomplete chunked read"))
        completion, recorder = await read(lost, body)
        assert (completion.text, completion.usage.output_tokens) == (TEXT, 5)
        assert recorder.all_of("text") == TEXT
    end = body.rstrip() + b"\r\n\r\n"
    completion, _ = await read(Pieces([end], httpx.ReadError("reset")))
    assert completion.text == TEXT


ERRORS = {
    "OpenAI": sse({"error": {"message": "The server had an error", "type": "server_error", "code": None}}),
    "OpenRouter": sse({**chunk("", "error"), "error": {"code": 502, "message": "Provider disconnected"}}),
    "OpenRouter, only a reason": sse(chunk("", "error")),
    "vLLM": sse(
        {"object": "error", "message": "EngineDeadError", "type": "InternalServerError", "code": 500}, "[DONE]"
    ),
    "Groq": b"event: error\n" + sse({"error": {"message": "Over capacity", "status_code": 503}}),
    "a text as an event": b"event: error\ndata: upstream timed out\n\n",
    "an event": b"event: error\ndata: " + json.dumps({"message": "overloaded"}).encode() + b"\n\n",
    "rate limit": sse({"error": {"code": 429, "message": "Slow down"}}),
    "a text": sse({"error": "boom"}),
}


@pytest.mark.parametrize("failure", ERRORS)
@pytest.mark.parametrize("pieces", [0, 2])
async def test_an_error_in_a_stream_is_tried_again(failure: str, pieces: int) -> None:
    body = sse(*map(chunk, PARTS[:pieces])) + ERRORS[failure]
    completion, recorder = await read(body, body, PROVIDERS["openai"])
    assert completion.text == TEXT
    assert recorder.resets == (2 if pieces else 0)
    assert recorder.all_of("text") == TEXT
    if failure != "rate limit":  # a refusal is not a failed attempt
        assert (await fail(body, body, body)).error_type == "model_unavailable"


@pytest.mark.parametrize(
    ("failure", "error_type"),
    [
        ({"code": "insufficient_quota", "message": "sk-proj-abc"}, "model_quota"),
        ({"type": "exceed_context_size_error", "code": 400}, "model_context_length"),
        ({"code": 400, "message": "bad"}, "model_bad_request"),
        ({"code": True}, "model_unavailable"),
    ],
)
async def test_a_permanent_error_in_a_stream_is_not_tried_again(failure: Any, error_type: str) -> None:
    is_permanent = error_type != "model_unavailable"
    caught = await fail(*[sse(chunk("{"), {"error": failure})] * (1 if is_permanent else 3))
    assert caught.error_type == error_type
    assert "reported in its stream" in str(caught)
    assert "abc" not in caught.log_detail


# Tool calls


def call(index: int | None, id: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    made = {"index": index, "id": id, "type": "function", "function": function}
    return chunk(tool_calls=[{key: value for key, value in made.items() if value is not None}])


TWO_CALLS = [("look", '{"q": "a\u00e9"}'), ("look", '{"q": "b"}')]
TOOL_STREAMS = {
    "openai": [
        call(0, "call_1", "look", ""),
        call(0, None, None, '{"q": "a'),
        call(0, None, None, '\u00e9"}'),
        call(1, "call_2", "look", ""),
        call(1, None, None, '{"q": "b"}'),
    ],
    "openai, interleaved": [
        call(0, "call_1", "look", '{"q": '),
        call(1, "call_2", "look", '{"q": '),
        call(0, None, None, '"a\u00e9"}'),
        call(1, None, None, '"b"}'),
    ],
    "llama.cpp, vllm": [
        call(0, "1", "look", "{"),
        call(0, None, None, '"q": "a\u00e9"}'),
        call(1, "2", "look", '{"q"'),
        call(1, None, None, ': "b"}'),
    ],
    "vllm, a new id for each piece": [
        call(0, "1", "look", None),
        call(0, "2", None, '{"q": "a'),
        call(0, "3", None, '\u00e9"}'),
        call(1, "4", "look", None),
        call(1, "5", None, '{"q": "b"}'),
    ],
    "ollama, always index 0": [
        call(0, "call_1", "look", '{"q": "a\u00e9"}'),
        call(0, "call_2", "look", '{"q": "b"}'),
    ],
    "gemini, no index": [
        call(None, "function-call-1", "look", '{"q": "a\u00e9"}'),
        call(None, "function-call-2", "look", '{"q": "b"}'),
    ],
    "no index, no id": [call(None, "", "look", '{"q": "a\u00e9"}'), call(None, None, "look", '{"q": "b"}')],
    "no index, in pieces": [
        call(None, "1", "look", '{"q": "a'),
        call(None, None, None, '\u00e9"}'),
        call(None, "2", "look", '{"q": "b"}'),
    ],
    "the name in each piece": [
        call(0, "1", "look", '{"q": '),
        call(0, None, "look", '"a\u00e9"}'),
        call(1, "2", "look", '{"q": '),
        call(1, "2", "look", '"b"}'),
    ],
    "both in one chunk": [
        chunk(
            tool_calls=[
                {"index": n, "id": str(n), "function": {"name": name, "arguments": arguments}}
                for n, (name, arguments) in enumerate(TWO_CALLS)
            ]
        )
    ],
    "objects as arguments": [call(0, "1", "look", {"q": "a\u00e9"}), call(1, "2", "look", {"q": "b"})],
}


@pytest.mark.parametrize("provider", TOOL_STREAMS)
@pytest.mark.parametrize("finish_reason", ["tool_calls", "stop"])
async def test_streamed_tool_calls_are_put_together(provider: str, finish_reason: str) -> None:
    body = sse(chunk("I look."), *TOOL_STREAMS[provider], chunk(finish_reason=finish_reason), USAGE, "[DONE]")
    completion, recorder = await read(Pieces([bytes([byte]) for byte in body]), tools=[TOOL])
    calls = [(made.function.name, json.loads(made.function.arguments)) for made in completion.tool_calls]
    assert calls == [(name, json.loads(arguments)) for name, arguments in TWO_CALLS]
    assert len({made.id for made in completion.tool_calls}) == 2
    assert (completion.text, recorder.all_of("text")) == ("I look.", "I look.")
    for cut in range(0, body.index(b'"finish_reason": "' + finish_reason.encode()), 53):
        again, _ = await read(Pieces([body[:cut]], httpx.ReadError("reset")), body, tools=[TOOL])
        assert again == completion


async def test_pieces_that_are_lists_of_parts_are_their_text() -> None:
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    pieces = [[thinking], [{"type": "text", "text": TEXT[:9]}], TEXT[9:]]
    completion, _ = await read(sse(*map(chunk, pieces), chunk("", "stop"), USAGE, "[DONE]"))
    assert completion.text == TEXT


async def test_a_call_without_arguments_or_a_name_is_still_a_call() -> None:
    completion, _ = await read(sse(call(0, "1", "look", None), call(1, "2", None, None), "[DONE]"), tools=[TOOL])
    assert [(made.function.name, made.function.arguments) for made in completion.tool_calls] == [
        ("look", "{}"),
        ("", "{}"),
    ]


# Requests


async def test_a_stream_is_requested_only_for_a_listener(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Reply({"a": "x", "n": []}), Reply(TEXT)]
    plain = await models.complete(None, Request(MESSAGES, SCHEMA, idempotency_key="run:1/0"))
    assert plain.text
    await ask(models, Recorder(), "openai/gpt-4o", idempotency_key="run:1/0")
    first, second = model.requests
    assert second == {**first, "stream": True, "stream_options": {"include_usage": True}}
    assert [request.headers["idempotency-key"] for request in model.requests] == ["run:1/0", "run:1/0/stream"]


async def test_a_server_without_stream_options_is_remembered(models: ModelClient, model: FakeModel) -> None:
    detail = [{"type": "extra_forbidden", "loc": ["body", "stream_options", "include_usage"]}]
    model.replies = [httpx.Response(422, json={"object": "error", "detail": detail}), Reply(TEXT), Reply(TEXT)]
    for _ in range(2):
        recorder = Recorder()
        assert (await ask(models, recorder, idempotency_key="k")).text == TEXT
        assert recorder.all_of("text") == TEXT
    assert [request.get("stream_options") for request in model.requests] == [{"include_usage": True}, None, None]
    assert all(request["stream"] for request in model.requests)
    keys = [request.headers["idempotency-key"] for request in model.requests]
    assert keys == ["k/stream", "k/stream_without_usage", "k/stream_without_usage"]


async def test_a_server_that_rejects_streams_is_asked_without_one(
    models: ModelClient, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """The format of the answer stays the same, although the message names it."""
    caplog.set_level(logging.INFO, "flock.llm")
    refused = Failure(400, message="response_format json_schema does not support streaming")
    model.replies = [refused, refused, Reply(json.loads(TEXT)), Reply(json.loads(TEXT))]
    for _ in range(2):
        recorder = Recorder()
        assert json.loads((await ask(models, recorder)).text or "") == json.loads(TEXT)
        assert recorder.all_of("text") == ""
    assert [request.get("stream", False) for request in model.requests] == [True, True, False, False]
    assert {request["response_format"]["type"] for request in model.requests} == {"json_schema"}
    assert "does not support the request for a stream" in caplog.text


async def test_another_rejection_is_not_taken_for_that(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(400, message="no such parameter: top_k")]
    with pytest.raises(ModelError, match="rejected the request"):
        await ask(models, Recorder())
    model.replies = [Failure(400, message="streams"), Failure(400, message="streams"), Failure(400, message="streams")]
    with pytest.raises(ModelError, match="rejected the request"):
        await ask(models, Recorder())
    model.replies = [Reply(TEXT)]
    await ask(models, Recorder())
    assert model.requests[-1]["stream_options"], "what did not help is not remembered"


async def test_each_format_is_streamed(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(400, message="response_format is unknown"), Reply(f"```json\n{TEXT}\n```")]
    recorder = Recorder()
    assert (await ask(models, recorder)).text == TEXT
    assert recorder.all_of("text") == f"```json\n{TEXT}\n```", "the listener receives what the model writes"


async def test_a_server_that_ignores_the_request_for_a_stream(models: ModelClient, model: FakeModel) -> None:
    model.replies = [httpx.Response(200, json=Reply(TEXT).completion())]
    recorder = Recorder()
    assert (await ask(models, recorder)).text == TEXT
    assert recorder.all_of("text") == ""


async def test_a_stream_with_another_content_type_is_read(models: ModelClient, model: FakeModel) -> None:
    model.replies = [httpx.Response(200, text=sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]").decode())]
    recorder = Recorder()
    assert (await ask(models, recorder)).text == TEXT
    assert recorder.all_of("text") == TEXT


async def test_an_error_before_the_stream_is_handled_as_always(models: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(500), Failure(429), Reply(TEXT)]
    assert (await ask(models, Recorder())).text == TEXT
    model.replies = [Failure(401)]
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        await ask(models, Recorder())


async def test_a_step_as_json_is_not_streamed(models: ModelClient, model: FakeModel) -> None:
    """A server without tools is asked for its next step, which is not an answer."""
    step = {"next_thought": "I look.", "next_tool_name": "look", "next_tool_args": {"q": "a"}}
    model.replies = [Failure(400, message="tools are not supported"), Reply(step)]
    recorder = Recorder()
    completion = await ask(models, recorder, tools=[TOOL])
    assert completion.tool_calls[0].function.name == "look"
    assert recorder.all_of("text") == ""
    assert [request.get("stream", False) for request in model.requests] == [True, False]


# Replies that cannot be used


@pytest.mark.parametrize(
    ("body", "error_type"),
    [
        pytest.param(sse(chunk(TEXT), chunk("", "length"), "[DONE]"), "model_truncated", id="length"),
        pytest.param(sse(chunk("{"), chunk("", "content_filter"), "[DONE]"), "model_content_filter", id="filter"),
        pytest.param(
            sse(chunk(refusal="I "), chunk(refusal="can't"), chunk("", "stop")), "model_refusal", id="refusal"
        ),
        pytest.param(sse(chunk(""), chunk("", "stop"), "[DONE]"), "model_bad_response", id="empty"),
        pytest.param(sse("[DONE]"), "model_bad_response", id="only the end"),
        pytest.param(sse(chunk("{"), "{oops", "[DONE]"), "model_bad_response", id="not JSON"),
        pytest.param(sse(chunk("{"), "[" * 100_000), "model_bad_response", id="nested too deeply"),
        pytest.param(sse(chunk("{"), "5"), "model_bad_response", id="a number"),
        pytest.param(sse(chunk("{"), {"choices": "no"}), "model_bad_response", id="another object"),
        pytest.param(sse(chunk(5)), "model_bad_response", id="a number as content"),
        pytest.param(sse(chunk("{")) + b'data: "\xff\xfe"\n\n', "model_bad_response", id="not UTF-8"),
        pytest.param(sse(chunk([{"type": "text"}]), "[DONE]"), "model_bad_response", id="content in parts"),
    ],
)
async def test_an_unusable_stream_is_a_permanent_error(body: bytes, error_type: str) -> None:
    assert (await fail(body)).error_type == error_type


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b": hello\n\n", id="only a comment"),
        pytest.param(sse(chunk(TEXT)), id="no end"),
        pytest.param(sse(chunk(TEXT), chunk("", "stop"))[:-10], id="a cut line"),
        pytest.param(sse(chunk(TEXT), chunk("", "stop"))[:-1], id="no empty line"),
        pytest.param(sse(USAGE), id="only usage"),
    ],
)
async def test_a_stream_without_an_end_is_tried_three_times(body: bytes) -> None:
    failure = await fail(body, body, body)
    assert failure.error_type == "model_unavailable"
    assert "before the answer was complete" in str(failure)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(sse(*[chunk("x" * 100)] * 50), id="text"),
        pytest.param(sse(*[chunk("x")] * 50), id="small pieces"),
        pytest.param(sse(*[chunk(refusal="x" * 100)] * 50), id="refusal"),
        pytest.param(sse(*[call(0, "1", "look", "x")] * 50), id="arguments"),
        pytest.param(sse(*[call(n, None, None, None) for n in range(50)]), id="calls"),
        pytest.param(b"data: " + b"x" * 5000, id="a line without an end"),
        pytest.param(b"data: x\n" * 5000, id="an event without an end"),
        pytest.param(sse(chunk("x" * 5000)), id="a long event"),
    ],
)
async def test_a_stream_without_bounds_is_stopped(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REPLY_BYTES", 2000)
    monkeypatch.setattr(bodies, "MAX_MESSAGE_BYTES", 1000)

    async def endless() -> AsyncIterator[bytes]:
        yield body
        raise AssertionError("the stream is not read to its end")

    class Endless(httpx.AsyncByteStream):
        def __aiter__(self) -> AsyncIterator[bytes]:
            return endless()

    failure = await fail(Endless(), tools=[TOOL])
    assert failure.error_type == "model_bad_response"
    assert "too long" in str(failure)


async def test_reasoning_and_comments_do_not_count_towards_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_REPLY_BYTES", 2000)
    monkeypatch.setattr(bodies, "MAX_MESSAGE_BYTES", 1000)
    long = b": keep-alive\n" * 1000 + sse(*[chunk(reasoning="hm ")] * 1000)
    completion, recorder = await read(long + sse(chunk(TEXT), "[DONE]"))
    assert completion.text == TEXT
    assert recorder.all_of("reasoning") == "hm " * 1000


async def test_halves_of_a_character_are_joined() -> None:
    """Some servers cut their text into UTF-16 units."""
    pieces = ['{"a": "', "\ud83d", "\ude00", "\ud83d", 'x", "n": []}']
    chunks = [f"data: {json.dumps(chunk(piece, reasoning=piece))}\n\n".encode() for piece in pieces]
    halves = (f"data: {json.dumps(call(0, '1', 'look', half))}\n\n".encode() for half in ("\ud83d", "\ude00"))
    completion, _ = await read(b"".join(halves) + sse("[DONE]"), tools=[TOOL])
    assert completion.tool_calls[0].function.arguments == "\U0001f600"
    completion, recorder = await read(b"".join(chunks) + sse(chunk("", "stop")))
    assert completion.text == recorder.all_of("text") == '{"a": "\U0001f600?x", "n": []}'
    assert recorder.all_of("reasoning") == completion.text


async def test_the_pieces_of_one_read_are_reported_together() -> None:
    text = json.dumps({"a": "x" * 80, "n": []})
    completion, recorder = await read(sse(*map(chunk, text), chunk("", "stop"), USAGE, "[DONE]"))
    assert completion.text == text
    assert recorder.events == [("reset", ""), ("text", text)]


# Real connections


async def serve(stream: anyio.abc.SocketStream, body: bytes) -> None:
    """Read a request, and begin a response that has no end yet."""
    received = b""
    while b'"response_format"' not in received:
        received += await stream.receive()
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    if body:
        await stream.send(b"%x\r\n%s\r\n" % (len(body), body))


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda url: monkeypatch.setenv("VLLM_BASE_URL", url)


@pytest.mark.parametrize("body", [b"", sse(chunk("{"))])
async def test_silence_is_a_timeout(body: bytes, vllm: Callable[[str], None]) -> None:
    async def silent(stream: anyio.abc.SocketStream) -> None:
        await serve(stream, body)
        await anyio.sleep_forever()

    recorder = Recorder()
    async with socket_server(silent) as (url, connections):
        vllm(url)
        async with ModelClient(backoff_s=0.001, read_timeout_s=1) as models:
            with pytest.raises(ModelError) as caught:
                await ask(models, recorder, "vllm/x")
    assert caught.value.error_type == "model_timeout"
    assert len(connections) == 3
    assert recorder.resets == (2 if body else 0)


@pytest.mark.parametrize("listener", [None, Recorder()], ids=["whole", "stream"])
async def test_a_body_that_cannot_be_decompressed_is_requested_again(
    listener: Recorder | None, models: ModelClient, model: FakeModel
) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Type": "text/event-stream"}
    broken = httpx.Response(200, headers=headers, stream=httpx.ByteStream(b"not gzip"))
    model.replies = [broken, Reply(TEXT)]
    assert (await models.complete(None, Request(MESSAGES, SCHEMA, listener=listener))).text == TEXT


@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_connection_that_breaks_off_is_tried_again(is_reset: bool, vllm: Callable[[str], None]) -> None:
    replies = [sse(*map(chunk, PARTS[:2])), sse(*map(chunk, PARTS), chunk("", "stop"), USAGE, "[DONE]")]

    async def break_off(stream: anyio.abc.SocketStream) -> None:
        await serve(stream, replies.pop(0))
        if not replies:
            await stream.send(b"0\r\n\r\n")
        elif is_reset:
            raw = stream.extra(anyio.abc.SocketAttribute.raw_socket)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    recorder = Recorder()
    async with socket_server(break_off) as (url, connections):
        vllm(url)
        async with ModelClient(backoff_s=0.001) as models:
            assert (await ask(models, recorder, "vllm/x")).text == TEXT
    assert len(connections) == 2
    assert recorder.all_of("text") == TEXT


@pytest.mark.parametrize(
    ("end", "tokens"),
    [
        pytest.param(sse(chunk("", "stop"), USAGE, "[DONE]"), 5, id="[DONE]"),
        pytest.param(sse(chunk("", "stop"), USAGE), 5, id="usage"),
        pytest.param(sse(chunk("", "stop")), 0, id="finish reason"),
    ],
)
async def test_a_server_that_keeps_the_connection_open_is_not_waited_for(
    end: bytes, tokens: int, vllm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "USAGE_S", 0.2)
    closed = anyio.Event()

    async def keep_open(stream: anyio.abc.SocketStream) -> None:
        await serve(stream, sse(*map(chunk, PARTS)) + end)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
        closed.set()

    async with socket_server(keep_open) as (url, _):
        vllm(url)
        async with ModelClient() as models:
            completion = await ask(models, Recorder(), "vllm/x")
            with anyio.fail_after(PATIENCE_S):
                await closed.wait()
    assert (completion.text, completion.usage.output_tokens) == (TEXT, tokens)


async def test_a_connection_is_used_again_after_a_stream(vllm: Callable[[str], None]) -> None:
    async def reply(request: HTTPRequest) -> Response:
        await request.body()
        return StreamingResponse(iter([sse(chunk(TEXT)), sse(USAGE, "[DONE]")]), media_type="text/event-stream")

    async with Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as served:
        vllm(f"{served.url}/v1")
        async with ModelClient() as models:
            for _ in range(3):
                assert (await ask(models, Recorder(), "vllm/x")).text == TEXT
            assert len(served.server.server_state.connections) == 1


async def test_the_first_call_makes_one_client_and_does_not_hold_the_event_loop(
    vllm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports modules for a tenth of a second."""
    threads, library = list[threading.Thread](), http.library

    def note(transport: object) -> Any:
        threads.append(threading.current_thread())
        return library(transport)

    async def reply(request: HTTPRequest) -> Response:
        await request.body()
        return Response(sse(chunk(TEXT), chunk("", "stop"), USAGE, "[DONE]"), media_type="text/event-stream")

    monkeypatch.setattr(http, "library", note)
    async with Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as served:
        vllm(f"{served.url}/v1")
        async with ModelClient() as models, anyio.create_task_group() as calls:
            for _ in range(5):
                calls.start_soon(ask, models, Recorder(), "vllm/x")
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_as_many_connections_are_kept_as_were_in_use_at_once(
    vllm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine may need longer for the first calls than client and server keep idle connections.
    library = http.library()
    options = functools.partial(library.AsyncClient, limits=library.Limits(keepalive_expiry=None))
    monkeypatch.setattr(library, "AsyncClient", options)
    monkeypatch.setattr(http_clients, "KEEP_IDLE_S", math.inf)
    clients, waiting, are_all_here = set[Any](), 0, anyio.Event()

    async def reply(request: HTTPRequest) -> Response:
        nonlocal waiting, are_all_here
        await request.body()
        clients.add(request.client)
        waiting, came = waiting + 1, are_all_here
        if waiting == 60:
            came.set()
            waiting, are_all_here = 0, anyio.Event()
        await came.wait()
        body = sse(chunk(TEXT), chunk("", "stop"), USAGE, "[DONE]")
        return Response(body, media_type="text/event-stream")

    provider = Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])]))
    provider.server.config.timeout_keep_alive = 600
    async with provider as served:
        vllm(f"{served.url}/v1")
        async with ModelClient() as models:
            for _ in range(2):
                async with anyio.create_task_group() as calls:
                    for _ in range(60):
                        calls.start_soon(ask, models, Recorder(), "vllm/x")
    assert len(clients) == 60


async def test_connections_that_no_request_uses_are_closed_before_a_later_one(
    vllm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, are_all_here = 0, anyio.Event()

    async def reply(request: HTTPRequest) -> Response:
        nonlocal waiting
        await request.body()
        waiting += 1
        if waiting == 10:
            are_all_here.set()
        await are_all_here.wait()
        return Response(sse(chunk(TEXT), chunk("", "stop"), USAGE, "[DONE]"), media_type="text/event-stream")

    async with Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as served:
        vllm(f"{served.url}/v1")
        connections = served.server.server_state.connections
        async with ModelClient() as models:
            async with anyio.create_task_group() as calls:
                for _ in range(10):
                    calls.start_soon(ask, models, Recorder(), "vllm/x")
            assert len(connections) == 10
            monkeypatch.setattr(http_clients, "KEEP_IDLE_S", -1.0)
            await ask(models, Recorder(), "vllm/x")
            await until(lambda: len(connections) == 1)


@pytest.mark.alone
async def test_cancelling_stops_the_stream_of_the_server(vllm: Callable[[str], None]) -> None:
    """A real server notices within 100 ms that nobody reads any more, and stops to write."""
    stopped: list[float] = []
    noticed = anyio.Event()

    async def write() -> AsyncIterator[bytes]:
        try:
            yield sse(chunk("{"))
            await anyio.sleep_forever()
        finally:
            stopped.append(time.monotonic())
            noticed.set()

    async def reply(request: HTTPRequest) -> Response:
        await request.body()
        return StreamingResponse(write(), media_type="text/event-stream")

    recorder = Recorder()
    async with Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as served:
        vllm(f"{served.url}/v1")
        async with ModelClient() as models:
            with anyio.fail_after(PATIENCE_S):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(ask, models, recorder, "vllm/x")
                    await recorder.received.wait()
                    cancelled = time.monotonic()
                    tasks.cancel_scope.cancel()
                await noticed.wait()
    assert stopped[0] - cancelled < slowness()


async def test_text_arrives_while_the_server_writes(vllm: Callable[[str], None]) -> None:
    """The server writes more only after the first text has arrived."""
    recorder = Recorder()

    async def reply(request: HTTPRequest) -> Response:
        await request.body()

        async def write() -> AsyncIterator[bytes]:
            yield sse(chunk(PARTS[0]))
            await recorder.received.wait()
            yield sse(*map(chunk, PARTS[1:]), chunk("", "stop"), USAGE, "[DONE]")

        return StreamingResponse(write(), media_type="text/event-stream")

    async with Served(Starlette(routes=[Route("/v1/chat/completions", reply, methods=["POST"])])) as served:
        vllm(f"{served.url}/v1")
        async with ModelClient() as models:
            assert (await ask(models, recorder, "vllm/x")).text == TEXT


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_reader_gets_text_while_the_model_writes(backend: str) -> None:
    """The model writes more only after the reader has got the first text, on each event loop."""

    async def read() -> dict[str, Any]:
        is_read = anyio.Event()

        async def write() -> AsyncIterator[bytes]:
            yield sse(chunk('{"a": "te'))
            await is_read.wait()
            yield sse(chunk('a"}'), chunk("", "stop"), USAGE, "[DONE]")

        def on_event(event: Event) -> None:
            if event.name == "output.delta":
                is_read.set()

        headers = {"Content-Type": "text/event-stream"}
        with FakeModel([httpx.Response(200, headers=headers, content=write())]), anyio.fail_after(PATIENCE_S):
            return await of("a: str").run_async("ask", {"q": "?"}, on_event=on_event)

    assert anyio.run(read, backend=backend) == {"a": "tea"}


# What an agent emits


class Emitted:
    """What the agents of a run have emitted: (kind, agent, field, text or value), and resets of what was written."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def add(self, kind: str, context: RunContext, *more: Any) -> None:
        if kind != "reset" or self.output(context.agent_name):
            self.events.append((kind, context.agent_name, *more))

    def output(self, agent_name: str = "ask") -> dict[str, Any]:
        """Return what a reader knows of the output: text and values by field, since the last reset."""
        known: dict[str, Any] = {}
        for kind, name, *more in self.events:
            if name == agent_name and kind == "reset":
                known.clear()
            elif name == agent_name and kind in ("text", "value"):
                known[more[0]] = known.get(more[0], "") + more[1] if kind == "text" else more[1]
        return known

    def kinds(self) -> list[str]:
        """Return the kinds of events, without repetitions."""
        return [kind for kind, _ in itertools.groupby(kind for kind, *_ in self.events)]


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> Emitted:
    """Watch all runs."""
    recorder = Emitted()
    members: dict[str, Any] = {
        "is_watched": property(lambda self: True),
        "emit": lambda self, text, field=None: recorder.add("text", self, field, text),
        "emit_value": lambda self, field, value: recorder.add("value", self, field, value),
        "emit_reasoning": lambda self, text: recorder.add("reasoning", self, text),
        "reset_output": lambda self: recorder.add("reset", self),
    }
    for name, member in members.items():
        monkeypatch.setattr(RunContext, name, member)
    return recorder


async def run_of(made: Flock, model: FakeModel, **inputs: Any) -> Run:
    async with made.engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?", **inputs})
        with anyio.fail_after(PATIENCE_S):
            return await engine.wait(run.run_id)


def of(output: Any = "a: str, n: list[int], when: date", **options: Any) -> Flock:
    made = Flock("streams", model="openai/gpt-4o")
    made.add_agent(FlockFactory.create_default_agent("ask", input="q", output=output, **options))
    return made


async def test_an_agent_emits_its_answer_field_by_field(model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply(('{"a": "H', "e\\u00e9", '", "n": [1,', ' 2], "when": "2026-', '11-26"}'))]
    run = await run_of(of(), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.usage is not None
    assert (run.usage.input_tokens, run.usage.output_tokens) == (10, 5)
    assert emitted.events == [
        ("text", "ask", "a", "H"),
        ("text", "ask", "a", "e\u00e9"),
        ("value", "ask", "n", [1, 2]),
        ("value", "ask", "when", "2026-11-26"),
    ]
    assert emitted.output() == msgspec.json.decode(run.result or b"")


async def test_nothing_is_streamed_if_nobody_watches(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of a synchronous request gets the result; that of an asynchronous run may come for its text."""
    scanned, feed = list[str](), Scanner.feed

    def note(self: Scanner, piece: str) -> Any:
        scanned.append(piece)
        return feed(self, piece)

    monkeypatch.setattr(Scanner, "feed", note)
    model.replies = [Reply({"a": "x", "n": [], "when": "2026-11-26"})] * 2
    async with of().engine(transport=model.transport) as engine:
        for is_async in (False, True):
            run = await engine.submit("ask", {"q": "?"}, is_async=is_async)
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
            assert bool(scanned) is is_async
    assert model.requests[1]["stream"] is True
    assert not model.requests[0].keys() & {"stream", "stream_options"}
    assert model.requests[0].headers["idempotency-key"].endswith("/0")


async def test_an_invalid_answer_is_reset_before_the_next(model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply('{"a": "wrong", "n": "no"}'), Reply("not JSON"), Reply(('{"a": "x", "n": []', "}"))]
    run = await run_of(of("a: str, n: list[int]"), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.kinds() == ["text", "value", "reset", "text", "value"]
    assert emitted.output() == {"a": "x", "n": []}


@pytest.mark.parametrize("text", ['Sure: {"a": "y"}', '{"a": "y"} {"a": "z"}', '{"a": "y"', '{"a": "y", "a": "z"'])
async def test_a_text_that_is_not_one_object_is_withdrawn(text: str, model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply(tuple(text)), Reply('{"a": "x"}')]
    run = await run_of(of("a: str"), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.kinds() == ["text", "reset", "text"]
    assert emitted.output() == {"a": "x"}


async def test_an_answer_in_a_code_fence_is_emitted(model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply(tuple('```json\n{"a": "x"}\n```'))]
    assert (await run_of(of("a: str"), model)).status is RunStatus.COMPLETED
    assert emitted.events == [("text", "ask", "a", "x")]


async def test_the_last_invalid_answer_is_reset_too(model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply('{"a": "x"}')]
    assert (await run_of(of("a: str, n: int", answer_retries=0), model)).error_type == "invalid_output"
    assert emitted.kinds() == ["text", "reset"]


async def test_a_lost_connection_resets_the_output(emitted: Emitted) -> None:
    body = sse(chunk('{"a": "x'), chunk('y"}'), chunk("", "stop"))
    transport, _ = replying(Pieces([body[:-80]], httpx.ReadError("reset")), Pieces([bytes([byte]) for byte in body]))
    async with of("a: str").engine(transport=transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.kinds() == ["text", "reset", "text"]
    assert emitted.output() == {"a": "xy"}


async def test_a_text_beside_tool_calls_is_not_output(model: FakeModel, emitted: Emitted) -> None:
    """The output is reset before the tools are called."""
    before: list[Any] = []

    def look() -> str:
        before.append(emitted.output())
        return "found"

    calls: list[tuple[str, Any]] = [("look", {})]
    model.replies = [
        Reply("I look.", calls=calls),
        Reply('{"a": "maybe"}', calls=calls),
        Reply('{"a": "x"}'),
    ]
    run = await run_of(of("a: str", tools=[look]), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert before == [{}, {}]
    assert emitted.kinds() == ["text", "reset", "text"]
    assert emitted.output() == {"a": "x"}


async def test_steps_as_json_are_not_output(model: FakeModel, emitted: Emitted) -> None:
    """The fields of a step are not emitted, even if the output has a field of that name."""

    def look() -> str:
        return "found"

    step = {"next_thought": "I look.", "next_tool_name": "look", "next_tool_args": {}}
    finish = {"next_thought": "I know.", "next_tool_name": "finish", "next_tool_args": {}}
    model.replies = [Failure(400, message="no tools"), Reply(step), Reply(finish), Reply('{"next_thought": "x"}')]
    run = await run_of(of("next_thought: str", tools=[look]), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.events == [("text", "ask", "next_thought", "x")]


async def test_a_reply_in_the_journal_is_not_emitted_again(model: FakeModel, emitted: Emitted) -> None:
    """The step starts again after a person has answered, with the reply that called the tool in its journal."""

    def pay() -> str:
        return "paid"

    calls: list[tuple[str, Any]] = [("pay", {})]
    model.replies = [Reply('{"a": "wait"}', calls=calls), Reply('{"a": "x"}')]
    made = of("a: str", tools=[Tool(pay, needs_approval=True)])
    async with made.engine(transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        assert emitted.kinds() == ["text", "reset"]
        emitted.events.clear()
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b'{"approved": true}'))
        run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.events == [("text", "ask", "a", "x")]


@pytest.mark.parametrize("reasoning", [False, True])
async def test_reasoning_is_not_output(reasoning: bool, model: FakeModel, emitted: Emitted) -> None:
    """That of the model itself, and the field that an agent adds."""
    text = '{"reasoning": "I think.", "a": "x"}' if reasoning else '{"a": "x"}'
    model.replies = [Reply(text, reasoning="Hm. ")]
    run = await run_of(of("a: str", reasoning=reasoning), model)
    assert run.status is RunStatus.COMPLETED, run.error
    thoughts = "".join(event[2] for event in emitted.events if event[0] == "reasoning")
    assert sorted(thoughts) == sorted("I think.Hm. " if reasoning else "Hm. ")
    assert emitted.output() == {"a": "x"}


async def test_an_output_called_reasoning_is_output(model: FakeModel, emitted: Emitted) -> None:
    model.replies = [Reply(('{"reasoning": "because"}',))]
    await run_of(of("reasoning: str"), model)
    assert emitted.events == [("text", "ask", "reasoning", "because")]


@pytest.mark.parametrize(
    ("type_", "text", "kind"),
    [
        ("str", '"x"', "text"),
        ("str | how it sounds", '"x"', "text"),
        ("Short", '"x"', "text"),
        ("Literal['x', 'y']", '"x"', "value"),
        ("Colour", '"x"', "value"),
        ("date", '"2026-11-26"', "value"),
        ("UUID", '"3d6f4b1e-3a56-4d1f-9a0c-9c1d3f1a2b3c"', "value"),
        ("bytes", '"eA=="', "value"),
        ("str | None", '"x"', "value"),
        ("Any", '"x"', "value"),
        ("bool", "true", "value"),
        ("list[str]", '["x"]', "value"),
    ],
)
async def test_only_plain_strings_are_text(
    type_: str, text: str, kind: str, model: FakeModel, emitted: Emitted
) -> None:
    types = {"Short": Annotated[str, msgspec.Meta(max_length=9)], "Colour": enum.Enum("Colour", {"X": "x"})}
    model.replies = [Reply((f'{{"a": {text[:2]}', f"{text[2:]}}}"))]
    lenient = Model("openai/gpt-4o", strict=False)  # the strict mode has no Any
    run = await run_of(of(f"a: {type_}", types=types, model=lenient), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.kinds() == [kind]
    assert emitted.output() == json.loads(f'{{"a": {text}}}')


async def test_a_value_that_changes_when_it_is_read_is_not_emitted(model: FakeModel, emitted: Emitted) -> None:
    """A secret of a pydantic model is masked in the result, and some fields have other names or types there."""

    class Output(pydantic.BaseModel):
        plain: str
        secret: pydantic.SecretStr
        renamed: str = pydantic.Field(serialization_alias="other")
        parsed: pydantic.Json[int]

    model.replies = [Reply('{"plain": "x", "secret": "S3CRET", "renamed": "r", "parsed": "1"}')]
    run = await run_of(of(Output), model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert emitted.output() == {"plain": "x"}


async def test_a_called_agent_emits_with_its_own_name(model: FakeModel, emitted: Emitted) -> None:
    made = of("a: str", tools=["helper"])
    made.add_agent(FlockFactory.create_default_agent("helper", input="q", output="b: str"))
    model.replies = [
        Reply(calls=[("helper", {"q": "?"})]),
        Reply('{"b": "y"}'),
        Reply('{"a": "x"}'),
    ]
    run = await run_of(made, model)
    assert run.status is RunStatus.COMPLETED, run.error
    assert (emitted.output("helper"), emitted.output("ask")) == ({"b": "y"}, {"a": "x"})


# Real models


@pytest.mark.slow
async def test_the_local_model_streams() -> None:
    recorder = Recorder()
    async with ModelClient() as models:
        plain = await models.complete("local/smollm2-135m", Request(MESSAGES, SCHEMA, max_tokens=60))
        live = await models.complete("local/smollm2-135m", Request(MESSAGES, SCHEMA, max_tokens=60, listener=recorder))
    assert live == plain, "answer and usage are the same with and without a stream"
    assert live.usage.output_tokens > 0
    assert recorder.all_of("text") == live.text
    assert len(recorder.events) > 5


LITELLM = """
import asyncio
from flock.models.completions import Message
from flock.models.llm import ModelClient
from flock.models.requests import Request

class Listener:
    def text(self, piece):
        print("TEXT", repr(piece))

    def reasoning(self, piece):
        print("REASONING", repr(piece))

    def reset(self):
        print("RESET")

async def main():
    async with ModelClient() as models:
        schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
        for _ in range(2):
            request = Request([Message("user", "hi")], schema, listener=Listener())
            done = await models.complete("lm_studio/some-model", request)
            print("ANSWER", done.text, done.usage.output_tokens)

asyncio.run(main())
"""


@pytest.mark.slow
async def test_litellm_itself_streams() -> None:
    """If the stream breaks off, the answer is requested without one."""
    pieces = ['{"a": "H', "i", '"}']
    good = sse(*map(chunk, pieces), chunk("", "stop"), {**chunk(), **USAGE}, "[DONE]")
    bodies = [good, sse(chunk(pieces[0])), json.dumps(Reply({"a": "whole"}).completion()).encode()]

    async def handle(stream: anyio.abc.SocketStream) -> None:
        received = b""
        while b"some-model" not in received:
            received += await stream.receive()
        body = bodies.pop(0)
        kind = b"text/event-stream" if body.startswith(b"data") else b"application/json"
        missing = 0 if body.endswith((b"[DONE]\n\n", b"}")) else 99
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        await stream.send(head % (kind, len(body) + missing) + body)

    async with socket_server(handle) as (url, _):
        env = os.environ | {"LM_STUDIO_API_BASE": url, "LM_STUDIO_API_KEY": "x", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        command = [sys.executable, "-c", LITELLM]
        done = await anyio.run_process(command, env=env, stderr=subprocess.STDOUT, check=False)
    lines = list[str]()
    for line in done.stdout.decode().splitlines():
        if line.startswith("TEXT") and lines[-1].startswith("TEXT"):  # pieces that arrive together may be one
            lines[-1] = f"TEXT {ast.literal_eval(lines[-1][5:]) + ast.literal_eval(line[5:])!r}"
        elif line.startswith(("TEXT", "RESET", "ANSWER")):
            lines.append(line)
    first = ["RESET", f"TEXT {''.join(pieces)!r}", 'ANSWER {"a": "Hi"} 5']
    assert lines == [*first, "RESET", f"TEXT {pieces[0]!r}", "RESET", 'ANSWER {"a":"whole"} 5'], done.stdout.decode()

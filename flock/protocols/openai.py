"""The protocol of OpenAI's clients: an agent is a model, and a chat completion is a run.

``GET /v1/models``, ``GET /v1/models/{model}`` and ``POST /v1/chat/completions``.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.agent import Agent
from flock.declared import agent_of
from flock.errors import FlockError, InvalidData
from flock.jsontype import JSONType
from flock.protocols.chats import Message, StreamedAnswer, TextReplaced, inputs_of, question_text, text_of
from flock.runs import Engine, Run, RunStatus, Usage
from flock.web import orders, wire
from flock.web.requests import fingerprint_of, idempotency_key
from flock.web.responses import EventStream, JSONResponse
from flock.web.routing import AppRoute

#: How the paths of all routes begin, also of those that do not exist.
PREFIX = "/v1/"

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


# Requests


class Part(msgspec.Struct, frozen=True):
    """A part of the content of a message."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of the history that a client sends."""

    role: str
    content: str | list[Part] | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage``: a chunk with the tokens of the run comes last."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``. ``metadata.inputs`` is a JSON object of further inputs."""

    model: str
    messages: list[ChatMessage]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    metadata: dict[str, str] | None = None


CHAT_REQUEST = JSONType(ChatRequest)


# Responses


class Model(msgspec.Struct, frozen=True):
    """An agent. No time of its creation is known."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "flock"


class Models(msgspec.Struct, frozen=True):
    data: list[Model]
    object: str = "list"


def routes() -> Sequence[AppRoute]:
    return [
        AppRoute("access", "GET", "/v1/models", list_models),
        AppRoute("access", "GET", "/v1/models/{model}", get_model),
        AppRoute("access", "POST", "/v1/chat/completions", chat),
    ]


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error. Clients know an invalid body by the status 400."""
    kind = problem.type.rpartition(":")[2].replace("-", "_")
    code = {"unknown_agent": "model_not_found", "unauthorized": "invalid_api_key"}.get(kind, kind)
    status = 400 if kind in ("invalid_input", "malformed_json") else problem.status
    type_ = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    found = problem.errors or []
    texts = [problem.detail, *(each.detail for each in found if each.detail not in problem.detail)]
    param = found[0].pointer.strip("/").replace("/", ".") or None if found else None
    error = {"message": " ".join(texts), "type": type_, "param": param, "code": code}
    return status, {"error": error, "request_id": problem.request_id}


# Handlers


async def list_models(request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse(Models([Model(name) for name in orders.serving(request).flock.agents]))


async def get_model(request: Request) -> Response:
    """GET /v1/models/{model}"""
    return JSONResponse(Model(agent_of(orders.serving(request).flock.agents, request.path_params["model"]).name))


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    body, agents = await orders.read_json(request), orders.serving(request).flock.agents
    sent = CHAT_REQUEST.decode(body)
    if sent.n not in (None, 1):
        raise InvalidData.of("A run has one answer, so 'n' must be 1.", "/n")
    order = orders.Order(
        agent_name=sent.model,
        inputs=inputs_of(agent_of(agents, sent.model), _messages(sent.messages), _more_inputs(sent.metadata)),
        key=idempotency_key(request, lambda: fingerprint_of(request, body)),
    )
    if sent.stream:
        engine = await orders.engine_of(request)
        stream = await orders.stream(request, order, reasoning=False)
        has_usage = sent.stream_options is not None and sent.stream_options.include_usage
        chunks = _chunks(stream, engine, agents, has_usage=has_usage)
        headers = {"Flock-Run-Id": stream.accepted.run.run_id, "X-Accel-Buffering": "no"}
        return EventStream(chunks, stream.held, headers, on_cut_off=stream.on_cut_off)
    run, _ = await orders.accept(request, order)
    run = await orders.end_of(request, run.run_id, run.is_async)
    return _completion(run, agents)


def _messages(sent: Iterable[ChatMessage]) -> list[Message]:
    return [Message(message.role, _text(message, at)) for at, message in enumerate(sent)]


def _text(message: ChatMessage, at: int) -> str:
    if not isinstance(message.content, list):
        return message.content or ""
    for number, part in enumerate(message.content):
        if part.text is None and message.role == "user":
            detail = f"A content part of the type {part.type!r} is not supported. Send text."
            raise InvalidData.of(detail, f"/messages/{at}/content/{number}")
    return "".join(part.text or "" for part in message.content)


def _more_inputs(metadata: Mapping[str, str] | None) -> Mapping[str, msgspec.Raw]:
    try:
        return msgspec.json.decode((metadata or {}).get("inputs", "{}"), type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidData.of("It must be a string with a JSON object of inputs.", "/metadata/inputs") from exc


def _completion(run: Run, agents: Mapping[str, Agent]) -> Response:
    headers = {"Flock-Run-Id": run.run_id}
    if run.status is RunStatus.WAITING:
        text = question_text(run.questions[0], run.run_id)
    elif run.status is RunStatus.COMPLETED and run.result is not None:
        text = text_of(agents[run.steps[-1].agent_name], bytes(run.result))
    else:  # clients repeat requests with other statuses, which would start another run
        return JSONResponse({"error": _failure(run.error, run.error_type, run.run_id)}, 422, headers)
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}}
    body = {
        **_head(run.run_id, run.created_at, run.agent_name, "chat.completion"),
        "choices": [{**choice, "logprobs": None, "finish_reason": "stop"}],
        "usage": _usage(run.usage),
    }
    return JSONResponse(body, headers=headers)


def _head(run_id: str, created_at: datetime, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{run_id}", "object": kind, "created": int(created_at.timestamp()), "model": model}


def _usage(usage: Usage | None) -> dict[str, Any]:
    usage = usage or Usage()
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _failure(error: str | None, error_type: str | None, run_id: str) -> dict[str, Any]:
    message = f"{error or 'The run was cancelled.'} The run is {run_id}."
    return {"message": message, "type": "run_failed", "param": None, "code": error_type or "cancelled"}


async def _chunks(
    stream: orders.Stream, engine: Engine, agents: Mapping[str, Agent], *, has_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the body of a streamed completion."""
    run_id, created_at = stream.accepted.run.run_id, stream.accepted.run.created_at
    head = _head(run_id, created_at, stream.accepted.run.agent_name, "chat.completion.chunk")
    answer = StreamedAnswer(agents)

    def chunk(finish_reason: str | None = None, **delta: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return b"data: %b\n\n" % msgspec.json.encode({**head, "choices": [choice]})

    def error(message: str | None, type_: str | None) -> bytes:
        return b"data: %b\n\n" % msgspec.json.encode({"error": _failure(message, type_, run_id)})

    yield chunk(role="assistant", content="")
    try:
        async with aclosing(stream.events) as events:
            async for event in events:
                if event is None:
                    yield KEEP_ALIVE
                elif event.name in ("run.failed", "run.cancelled"):
                    yield error(event.data["error"], event.data["error_type"])
                elif piece := await answer.add(event):
                    yield chunk(content=piece)
                if event is not None and event.name in ("run.completed", "run.waiting"):
                    yield chunk("stop")
                    if has_usage:
                        usage = _usage((await engine.get_outline(run_id)).usage)
                        yield b"data: %b\n\n" % msgspec.json.encode({**head, "choices": [], "usage": usage})
                    yield DONE
    except TextReplaced as exc:
        yield error(str(exc), "text_replaced")
    except FlockError as exc:
        yield error(str(exc), "interrupted")

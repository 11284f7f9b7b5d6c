"""The protocol of OpenAI's clients: an agent is a model, and each answer is a run.

This module has the routes, the errors, models and chat completions.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.handoff import agent_of
from flock.jsontype import JSONType
from flock.protocols import chats
from flock.protocols import openai_parts as parts
from flock.protocols import openai_responses as responses
from flock.runs import Engine, Event, Question, Run, RunStatus
from flock.web import orders, wire
from flock.web.requests import fingerprint_of, idempotency_key
from flock.web.responses import JSONResponse, sent_event
from flock.web.routing import AppRoute

#: How the paths of all routes begin, also of those that do not exist.
PREFIX = "/v1"

DONE = b"data: [DONE]\n\n"


def routes() -> Sequence[AppRoute]:
    return [
        AppRoute("access", "GET", "/v1/models", list_models),
        AppRoute("access", "GET", "/v1/models/{model}", get_model),
        AppRoute("access", "POST", "/v1/chat/completions", chat),
        AppRoute("access", "POST", "/v1/responses", responses.create_response),
        AppRoute("access", "GET DELETE", "/v1/responses/{response_id}", responses.one_response),
        AppRoute("access", "POST", "/v1/responses/{response_id}/cancel", responses.cancel_response),
        AppRoute("access", "GET", "/v1/responses/{response_id}/input_items", responses.input_items),
        AppRoute("access", "POST", "/v1/conversations", responses.create_conversation),
        AppRoute("access", "GET DELETE", "/v1/conversations/{conversation_id}", responses.one_conversation),
        AppRoute("access", "GET", "/v1/conversations/{conversation_id}/items", responses.conversation_items),
    ]


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error.

    Clients expect 400 for an invalid body. They repeat requests that get 409, which would change nothing here.
    """
    kind = problem.type.rpartition(":")[2].replace("-", "_")
    code = {"unknown_agent": "model_not_found", "unauthorized": "invalid_api_key", "blank": None}.get(kind, kind)
    status = 400 if problem.status in (409, 422) else problem.status
    type_ = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    found = problem.errors or []
    texts = [problem.detail, *(each.detail for each in found if each.detail not in problem.detail)]
    param = found[0].pointer.strip("/").replace("/", ".") or None if found else None
    error = {"message": " ".join(texts), "type": type_, "param": param, "code": code}
    return status, {"error": error, "request_id": problem.request_id}


async def list_models(request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse({"object": "list", "data": [_model(name) for name in orders.agents_of(request)]})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{model}"""
    return JSONResponse(_model(agent_of(orders.agents_of(request), request.path_params["model"]).name))


def _model(name: str) -> dict[str, Any]:
    """Return an agent. No time of its creation is known."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "flock"}


# Chat completions


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage``: a chunk with the tokens of the run comes last."""

    include_usage: bool | None = None


class ChatRequest(parts.Settings, frozen=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[parts.Item]
    stream_options: StreamOptions | None = None
    response_format: parts.Format | None = None
    include_reasoning: bool | None = None


CHAT_REQUEST = JSONType(ChatRequest, ignores_unknown=True)


async def chat(request: Request) -> Response:
    """POST /v1/chat/completions"""
    body, agents = await orders.read_json(request), orders.agents_of(request)
    sent = CHAT_REQUEST.decode(body)
    agent, engine = agent_of(agents, sent.model), await orders.engine_of(request)
    as_json = parts.wants_json(agents, agent, sent.response_format, "/response_format")
    messages, answers = await parts.read(sent.messages, "/messages")
    client = parts.client_settings(body, messages)
    if answers:
        wanted: orders.Wanted = await parts.answers_in(engine, answers, "/messages")
    else:
        inputs = orders.nested(request, chats.inputs_of(agent, messages, sent.inputs, "/messages"))
        key = idempotency_key(request, lambda: fingerprint_of(request, body))
        wanted = orders.Order(agent_name=sent.model, inputs=inputs, client=client, key=key)
        del inputs
    if sent.stream:
        stream = await orders.stream(request, wanted, reasoning=sent.include_reasoning is not False)
        has_usage = sent.stream_options is not None and sent.stream_options.include_usage is True
        writer = _Writer(engine, stream.accepted.run, has_usage=has_usage)
        answer = chats.StreamedAnswer(agents, as_json=as_json, slot=partial(orders.download_slot, request))
        return stream.response(parts.written(stream, answer, writer))
    has_thoughts = sent.include_reasoning is True
    with orders.watched(engine, wanted, is_wanted=has_thoughts) as run_id:
        run = (await orders.accept(request, wanted, run_id)).run
        run_id, outlives_client = run.run_id, run.is_async
        del run, wanted, sent, messages  # frees the inputs, which may be long, during the wait
        run = await orders.end_of(request, run_id, outlives_client)
        thoughts = await chats.thoughts_of(engine, run_id) if has_thoughts else ""
    text = await chats.text_of(engine, agents, run, as_json=as_json) if run.status is RunStatus.COMPLETED else None
    return _completion(run, text, thoughts)


def _asked(run_id: str, questions: Sequence[Question]) -> tuple[dict[str, Any], str]:
    """Return the content for open questions, and why the answer ends: calls of the client's tools, or a text."""
    calls = list[Any]()
    for call in filter(lambda question: question.is_for_client, questions):
        function, id_ = {"name": call.question, "arguments": parts.arguments_of(call)}, f"call_{run_id}_{call.call_id}"
        calls.append({"index": len(calls), "id": id_, "type": "function", "function": function})
    if calls:
        return {"content": None, "tool_calls": calls}, "tool_calls"
    return {"content": chats.question_text(questions, run_id)}, "stop"


def _completion(run: Run, text: str | None, thoughts: str) -> Response:
    """Return the response for a run that has completed with *text*, or that waits or has failed."""
    headers, content, finish_reason = {"Flock-Run-Id": run.run_id}, dict[str, Any](content=text), "stop"
    if run.status is RunStatus.WAITING:
        content, finish_reason = _asked(run.run_id, run.questions)
    elif text is None:  # clients repeat requests that get 409, 429 or 5xx, which would start another run
        return JSONResponse(_failure(run.error, run.error_type, run.run_id), 422, headers)
    message = {"role": "assistant", "refusal": None, "annotations": [], **content}
    message |= {"reasoning_content": thoughts} if thoughts else {}
    body = {
        **_head(run, "chat.completion"),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}],
        "usage": parts.usage_of(run.usage, "prompt", "completion"),
    }
    return JSONResponse(body, headers=headers)


def _head(run: Run, kind: str) -> dict[str, Any]:
    created = int(run.created_at.timestamp())
    return {"id": f"chatcmpl-{run.run_id}", "object": kind, "created": created, "model": run.agent_name}


def _failure(error: str | None, error_type: str | None, run_id: str) -> dict[str, Any]:
    about = {"type": "run_failed", "param": None, "code": error_type or "cancelled"}
    return {"error": {"message": chats.failure_text(error, run_id), **about}}


class _Writer:
    """Writes the chunks of a streamed completion. It ends with ``[DONE]``, or with an error."""

    def __init__(self, engine: Engine, run: Run, *, has_usage: bool) -> None:
        self._engine, self._run_id, self._has_usage = engine, run.run_id, has_usage
        self._head = _head(run, "chat.completion.chunk")

    def begin(self) -> bytes:
        return self._chunk(role="assistant", content="")

    def piece(self, piece: str | chats.Thought) -> bytes:
        return self._chunk(content=piece) if isinstance(piece, str) else self._chunk(reasoning_content=piece.text)

    async def end(self, event: Event) -> AsyncGenerator[bytes, None]:
        if event.name in ("run.failed", "run.cancelled"):
            yield self.error(event.data["error"], event.data["error_type"])
            return
        finish_reason = "stop"
        if event.name == "run.waiting":
            content, finish_reason = _asked(self._run_id, event.data["waiting_for"])
            yield self._chunk(**content)
        yield self._chunk(finish_reason)
        if self._has_usage:
            usage = parts.usage_of((await self._engine.get_outline(self._run_id)).usage, "prompt", "completion")
            yield sent_event({**self._head, "choices": [], "usage": usage})
        yield DONE

    def error(self, message: str | None, code: str | None) -> bytes:
        return sent_event(_failure(message, code, self._run_id))

    def _chunk(self, finish_reason: str | None = None, **delta: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return sent_event({**self._head, "choices": [choice]})

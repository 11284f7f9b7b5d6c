"""A client for chat completions over HTTP: sends messages to a model, and returns one JSON answer with its token usage.

A model is named ``provider/model``. The table ``PROVIDERS`` has the URL of each provider and the environment variable
of its key. All of them support OpenAI's ``/chat/completions``, and so does the small model in this process. Other
providers are called through litellm, if it is installed. Tests pass a fake server as ``transport=``.

The retry policy is the same as in the providers' own clients: up to three attempts for 408, 409, 429, 5xx, timeouts and
lost connections, about 0.5 s and 1 s apart or as requested by ``Retry-After``. Other errors are not retried. One
deadline covers all attempts. All attempts send the caller's ``Idempotency-Key``, so a provider that supports it does
the work only once. Others ignore unknown headers (RFC 9110, section 5.1).
"""

import contextlib
import email.utils
import importlib.util
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import anyio
import anyio.to_thread
import httpx
import msgspec
from msgspec.structs import replace

from flock.agents import localmodel, react
from flock.agents.completions import Completion, FunctionCall, Message, ToolCall, ToolSchema
from flock.errors import ModelError
from flock.extras import pip_install
from flock.nearest import did_you_mean
from flock.runs import Usage

__all__ = ["PROVIDERS", "Completion", "Message", "ModelClient", "Provider", "check_model"]

logger = logging.getLogger("flock.llm")

#: Max seconds that a server may make a run wait before a retry.
MAX_RETRY_AFTER_S = 120
#: Max characters of a provider's message in the log.
MAX_LOGGED_CHARS = 500


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A server that supports chat completions.

    Attributes:
        base_url: the URL without ``/chat/completions``. The environment variable ``{NAME}_BASE_URL`` overrides it.
        key_variable: the environment variable with the key; None if no key is needed.
        max_tokens_field: the name of the request field that limits the answer's length.
    """

    base_url: str
    key_variable: str | None = None
    max_tokens_field: str = "max_tokens"


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(
        base_url="https://api.openai.com/v1",
        key_variable="OPENAI_API_KEY",
        max_tokens_field="max_completion_tokens",
    ),
    "openrouter": Provider(base_url="https://openrouter.ai/api/v1", key_variable="OPENROUTER_API_KEY"),
    "groq": Provider(base_url="https://api.groq.com/openai/v1", key_variable="GROQ_API_KEY"),
    "mistral": Provider(base_url="https://api.mistral.ai/v1", key_variable="MISTRAL_API_KEY"),
    "deepseek": Provider(base_url="https://api.deepseek.com/v1", key_variable="DEEPSEEK_API_KEY"),
    "together": Provider(base_url="https://api.together.xyz/v1", key_variable="TOGETHER_API_KEY"),
    "ollama": Provider(base_url="http://127.0.0.1:11434/v1"),
    "vllm": Provider(base_url="http://127.0.0.1:8000/v1"),
    "llamacpp": Provider(base_url="http://127.0.0.1:8080/v1"),
}

BUILT_IN = (*PROVIDERS, "local")

#: Headers for the organisation and project at OpenAI, by the environment variable with the value.
OPENAI_HEADERS = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}

#: Ways to request JSON, the strictest first. If a server does not support one, the next one is tried.
FORMATS = ("json_schema", "json_object", "text")


class _TransientError(Exception):
    """A transient failure, for which a retry may succeed."""

    def __init__(self, error: ModelError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


class _Request(msgspec.Struct, frozen=True, kw_only=True):
    """The arguments of ``ModelClient.complete``."""

    name: str
    messages: Sequence[Message]
    schema: Mapping[str, Any]
    tools: Sequence[ToolSchema]
    max_tokens: int | None
    temperature: float | None
    headers: Mapping[str, str]
    key: str | None

    def all_headers(self, format_: str = FORMATS[0]) -> dict[str, str]:
        """Return the headers, with a separate key per format: a server may store responses by key, also rejections."""
        if self.key is None:
            return dict(self.headers)
        return {**self.headers, "Idempotency-Key": self.key if format_ == FORMATS[0] else f"{self.key}/{format_}"}


class _Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The URL of one model, and the settings for calling it."""

    name: str
    model: str
    url: str
    headers: Mapping[str, str]
    max_tokens_field: str
    settings: Mapping[str, Any] = {}
    is_local: bool = False

    def body(self, request: _Request) -> dict[str, Any]:
        """Return the body of a request, without the part that requests JSON."""
        body = {"model": self.model, "messages": request.messages, **self.settings}
        if request.temperature is not None:
            body["temperature"] = request.temperature
        if request.max_tokens is not None:
            body[self.max_tokens_field] = request.max_tokens
        return body


class ModelClient:
    """Calls models for all runs of one engine, with one connection pool.

    Use it as an async context manager. It opens no connection before the first call.

    Args:
        default_model: the model of agents without one.
        transport: replaces the network, for tests and gateways.
        backoff_s: the pause after the first failed attempt. It doubles with each attempt, up to 8 s.
        read_timeout_s: max seconds without data from the server before an attempt times out.
    """

    def __init__(
        self,
        default_model: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        backoff_s: float = 0.5,
        read_timeout_s: float = 120,
    ) -> None:
        self.default_model = default_model
        self._transport = transport
        self._backoff_s = backoff_s
        self._timeout = httpx.Timeout(read_timeout_s, connect=10, pool=None)
        self._http: httpx.AsyncClient | None = None
        self._formats: dict[str, str] = {}
        #: models whose servers do not support tools
        self._without_tools: set[str] = set()
        self._local_lock = anyio.Lock()
        #: called before each retry
        self.on_retry: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Self:
        self._local_lock = anyio.Lock()  # the event loop may be a different one than before
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        http, self._http = self._http, None
        if http is not None:
            await http.aclose()

    async def complete(
        self,
        model: str | None,
        messages: Sequence[Message],
        schema: Mapping[str, Any],
        *,
        tools: Sequence[ToolSchema] = (),
        max_tokens: int | None = None,
        temperature: float | None = None,
        traceparent: str | None = None,
        idempotency_key: str | None = None,
    ) -> Completion:
        """Ask *model* for one JSON object that matches *schema*, or for calls of *tools*. The caller validates both.

        With tools, the JSON is requested in words only: some servers reject a ``response_format`` beside ``tools``, and
        with others the model then never calls one. A model that cannot call tools is asked for its next step as JSON;
        see ``react``. Without tools, earlier calls and their results are sent as text, which every server accepts.

        Args:
            traceparent: trace context, sent as a header so that gateways and providers can link the request to a trace.
            idempotency_key: identifies this call in all attempts. If the server does not support strict JSON Schema,
                the fallback requests append ``/json_object`` or ``/text`` to it. If it does not support tools, the
                fallback appends ``/step`` before that.

        Raises:
            ModelError: there is no usable answer; ``error_type`` has the reason.

        Cancellation: the request is aborted. There is no retry if it would start after the caller's deadline.
        """
        name = _required_name(model or self.default_model)
        request = _Request(
            name=name,
            messages=messages,
            schema=schema,
            tools=tools,
            max_tokens=max_tokens,
            temperature=temperature,
            headers={} if traceparent is None else {"traceparent": traceparent},
            key=idempotency_key,
        )
        if name.partition("/")[0] not in BUILT_IN:
            if not tools:
                return await _complete_with_litellm(replace(request, messages=react.as_text(messages)))
            if _litellm_calls_tools(name):
                return await _complete_with_litellm(request)
            return react.completion_of(await _complete_with_litellm(_next_step(request)))
        endpoint = await _endpoint(name)
        if not tools:
            return await self._complete_json(endpoint, replace(request, messages=react.as_text(messages)))
        if not endpoint.is_local and name not in self._without_tools:
            try:
                return await self._complete_or_call(endpoint, request)
            except ModelError as exc:
                if not _rejects_tools(exc):
                    raise
                logger.info("%s does not support tools. Asking for JSON instead.", name)
                if "schema" not in exc.log_detail.lower():  # it rejects all tools, not just these
                    self._without_tools.add(name)
        return react.completion_of(await self._complete_json(endpoint, _next_step(request)))

    async def _complete_or_call(self, endpoint: _Endpoint, request: _Request) -> Completion:
        """Offer tools to a model whose server supports them."""
        body = endpoint.body(request) | _format_of("text", request, endpoint)
        body["tools"] = [_function_of(tool) for tool in request.tools]
        return _completion(await self._post(endpoint, body, request.all_headers()), request)

    async def _complete_json(self, endpoint: _Endpoint, request: _Request) -> Completion:
        """Ask for a JSON object in the strictest way that the server supports."""
        name, rejects_schema = request.name, False
        first = FORMATS.index(self._formats.get(name, FORMATS[0]))
        for format_ in FORMATS[first:]:
            body = endpoint.body(request) | _format_of(format_, request, endpoint)
            try:
                answer = await self._post(endpoint, body, request.all_headers(format_))
            except ModelError as exc:
                if format_ == FORMATS[-1] or not _rejects_format(exc):
                    raise
                logger.info("%s does not support the response_format %s. Trying the next one.", name, format_)
                rejects_schema = rejects_schema or "invalid schema" in exc.log_detail.lower()
            else:
                if not rejects_schema:  # the server rejects the format itself, not just this schema
                    self._formats[name] = format_
                return _completion(answer, request)
        raise AssertionError("the last format returns or raises")

    async def _post(self, endpoint: _Endpoint, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        """Return the server's response as JSON, after up to three attempts."""
        # The local model answers one request at a time. Waiting for the lock does not count as a timeout.
        async with self._local_lock if endpoint.is_local else contextlib.nullcontext():
            for pause_s in (self._backoff_s, 2 * self._backoff_s, None):
                try:
                    return await self._attempt(endpoint, body, headers)
                except _TransientError as failure:
                    if pause_s is None:
                        raise failure.error from failure
                    await self._pause(pause_s, failure)
        raise AssertionError("the last attempt returns or raises")

    async def _pause(self, pause_s: float, failure: _TransientError) -> None:
        """Wait as long as the server requests, or about *pause_s*. Raise the error if that is too long."""
        pause_s = min(pause_s, 8) * (1 - 0.25 * random.random())
        if failure.retry_after_s is not None:
            pause_s = failure.retry_after_s
        wakes_at = anyio.current_time() + pause_s
        if pause_s > MAX_RETRY_AFTER_S or wakes_at > anyio.current_effective_deadline():
            raise failure.error from failure
        logger.info("%s Retrying in %.1f s.", failure.error, pause_s)
        self.on_retry()
        await anyio.sleep(pause_s)

    async def _attempt(self, endpoint: _Endpoint, body: Mapping[str, Any], headers: Mapping[str, str]) -> Any:
        try:
            response = await self._client().post(
                endpoint.url, content=msgspec.json.encode(body), headers={**endpoint.headers, **headers}
            )
        except httpx.TimeoutException as exc:
            error = _error(endpoint.name, "model_timeout", "did not answer in time", type(exc).__name__)
            raise _TransientError(error) from exc
        except httpx.TransportError as exc:
            error = _error(
                endpoint.name, "model_unavailable", "could not be reached, or closed the connection", repr(exc)
            )
            raise _TransientError(error) from exc
        if response.status_code != 200:
            error = _status_error(endpoint.name, response)
            if error.error_type in ("model_unavailable", "model_rate_limited"):
                raise _TransientError(error, _retry_after_s(response.headers))
            raise error
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as exc:
            reason = "returned status 200 with a body that is not JSON"
            raise _error(endpoint.name, "model_bad_response", reason, _provider_message(response)) from exc

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            self._http = httpx.AsyncClient(
                transport=self._transport,
                timeout=self._timeout,
                # The engine limits concurrent calls. A second limit here would only hide the waiting.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            )
        return self._http


# Finding a model


def check_model(name: str | None) -> None:
    """Raise the ModelError that each call of the model *name* would raise with the current setup of this process.

    It sends no request and loads no weights. If litellm is installed, any other provider is accepted, unless its name
    looks like a misspelling of a built-in one, because only litellm knows its own providers.
    """
    name = _required_name(name)
    provider = name.partition("/")[0]
    if provider not in BUILT_IN:
        if not _has_litellm() or did_you_mean(provider, BUILT_IN, MISSPELLING_CUTOFF):
            raise _unknown_provider(name)
    elif provider == "local":
        localmodel.check(_model_of(name))
    else:
        _model_of(name)
        _key_of(name)


#: Min similarity of a misspelled name to the correct one. No provider of litellm is this similar to a built-in one.
MISSPELLING_CUTOFF = 0.88


def _has_litellm() -> bool:
    return importlib.util.find_spec("litellm") is not None


def _required_name(name: str | None) -> str:
    if not name:
        raise _not_configured("no model is set. Pass model= to the agent or to Flock, or set FLOCK_MODEL")
    return name


def _model_of(name: str) -> str:
    """Return the part after the provider."""
    model = name.partition("/")[2]
    if not model:
        raise _not_configured(f"{name!r} has no model name. Write provider/model, such as openai/gpt-4o")
    return model


def _key_of(name: str) -> str:
    """Return the API key for the model *name* of a built-in provider, or "" if it needs none."""
    variable = PROVIDERS[name.partition("/")[0]].key_variable
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise _not_configured(
            f"{name!r} needs an API key. Set the environment variable {variable} where the server starts"
        )
    return key


async def _endpoint(name: str) -> _Endpoint:
    provider_name, model = name.partition("/")[0], _model_of(name)
    if provider_name == "local":
        # In a thread, because loading weights is slow. If cancelled, loading continues for the next caller.
        server = await anyio.to_thread.run_sync(localmodel.serve, model, abandon_on_cancel=True)
        return _Endpoint(
            name=name,
            model=model,
            url=f"{server.base_url}/chat/completions",
            headers=_headers(server.key),
            max_tokens_field="max_tokens",
            settings={**localmodel.SETTINGS, "max_tokens": localmodel.MAX_TOKENS},
            is_local=True,
        )
    provider, headers = PROVIDERS[provider_name], _headers(_key_of(name))
    if provider_name == "openai":
        headers |= {header: os.environ[name] for name, header in OPENAI_HEADERS.items() if os.environ.get(name)}
    base_url = os.environ.get(f"{provider_name.upper()}_BASE_URL") or provider.base_url
    return _Endpoint(
        name=name,
        model=model,
        url=f"{base_url.rstrip('/')}/chat/completions",
        headers=headers,
        max_tokens_field=provider.max_tokens_field,
    )


def _headers(key: str) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _not_configured(reason: str) -> ModelError:
    return ModelError(f"The model cannot be called: {reason}.", "model_not_configured")


def _unknown_provider(name: str) -> ModelError:
    provider = name.partition("/")[0]
    reason = f"the provider {provider!r} of {name!r} is not built in.{did_you_mean(provider, BUILT_IN)}"
    if provider == name:
        reason = f"{name!r} has no provider. Write provider/model, such as openai/gpt-4o."
    more = "" if _has_litellm() else f" For 100 more providers: {pip_install('litellm')}"
    known = f"The built-in providers are {', '.join(BUILT_IN)}."
    return ModelError(f"The model cannot be called: {reason} {known}{more}", "model_not_configured")


# The request


def _next_step(request: _Request) -> _Request:
    """Return the request that asks for the next step as JSON, in place of a tool call."""
    return replace(
        request,
        messages=react.with_tools(react.as_text(request.messages), request.tools),
        schema=react.schema_of(request.tools),
        tools=(),
        key=request.key and f"{request.key}/step",
    )


def _format_of(format_: str, request: _Request, endpoint: _Endpoint) -> dict[str, Any]:
    """Return the part of a request that requests JSON."""
    schema = request.schema
    if format_ == "json_schema":
        is_strict, request_schema = _strict_schema(schema)
        if endpoint.is_local:
            request_schema = localmodel.bounded_schema(schema, request.max_tokens or localmodel.MAX_TOKENS)
        json_schema = {"name": "answer", "strict": is_strict, "schema": request_schema}
        return {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    part: dict[str, Any] = {"messages": _with_format_in_words(request)}
    return part | {"response_format": {"type": "json_object"}} if format_ == "json_object" else part


def _with_format_in_words(request: _Request) -> Sequence[Message]:
    instruction = "Answer with one JSON object and nothing else. It must match this JSON Schema:"
    if request.tools:
        instruction = f"Call the tools that you need first. {instruction}"
    head, *rest = request.messages
    return [Message(head.role, f"{head.content}\n\n{instruction}\n{json.dumps(request.schema)}"), *rest]


def _function_of(tool: ToolSchema) -> dict[str, Any]:
    """Return a tool as a request has it. It is strict if its schema allows that and has no optional arguments."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    is_strict, strict_schema = _strict_schema(tool.schema) if tool.may_be_strict else (False, {})
    if is_strict and strict_schema.get("required", []) == tool.schema.get("required", []):
        function |= {"parameters": strict_schema, "strict": True}
    return {"type": "function", "function": function}


#: Keywords that strict mode supports. Other constraints are in the description, and checked in the answer.
STRICT_KEYWORDS = frozenset(
    "type properties required additionalProperties items enum const anyOf description title $ref $defs pattern "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems".split()
)
OTHER_CONSTRAINTS = ("minLength", "maxLength", "minProperties", "maxProperties", "uniqueItems")
STRICT_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid".split())


def _strict_schema(schema: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether *schema* can be used in strict mode, and the schema in that form: closed objects, all required.

    Source: OpenAI's guide to structured outputs, "Supported schemas".
    """
    is_strict = True

    def convert(node: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal is_strict
        converted = {key: value for key, value in node.items() if key in STRICT_KEYWORDS}
        if node.get("format") in STRICT_FORMATS:
            converted["format"] = node["format"]
        others = {key: node[key] for key in OTHER_CONSTRAINTS if key in node}
        if localmodel.has_lookaround(converted):
            others["pattern"] = converted.pop("pattern")
        if others:
            in_words = ", ".join(f"{key}: {json.dumps(value)}" for key, value in others.items())
            converted["description"] = f"{node.get('description', '')} ({in_words})".lstrip()
        is_open = {"object": "properties" not in converted, "array": not isinstance(converted.get("items"), Mapping)}
        if not converted.keys() & {"type", "enum", "const", "anyOf", "$ref"} or is_open.get(converted.get("type", "")):
            is_strict = False  # any value, an object with any keys, or a list or tuple of anything
            return dict(node)
        if "properties" in converted:
            converted |= {
                "properties": {name: convert(member) for name, member in converted["properties"].items()},
                "required": list(converted["properties"]),
                "additionalProperties": False,
            }
        if "items" in converted:
            converted["items"] = convert(converted["items"])
        if "anyOf" in converted:
            converted["anyOf"] = [convert(member) for member in converted["anyOf"]]
        if "$defs" in converted:
            converted["$defs"] = {name: convert(member) for name, member in converted["$defs"].items()}
        return converted

    strict = convert(schema)
    return (True, strict) if is_strict else (False, dict(schema))


def _rejects_format(error: ModelError) -> bool:
    return error.error_type == "model_bad_request" and bool(
        re.search(
            r"response_format|json.?schema|json_object|json mode|structured output|grammar", error.log_detail, re.I
        )
    )


def _rejects_tools(error: ModelError) -> bool:
    if error.error_type in ("model_bad_request", "model_not_found"):
        return bool(re.search(r"\btools?\b|tool_choice|function.call", error.log_detail, re.I))
    return "--jinja" in error.log_detail  # llama.cpp sends this with status 500


# The response


class _AnswerFunction(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _AnswerCall(msgspec.Struct):
    function: _AnswerFunction
    id: str | None = None


class _AnswerMessage(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    tool_calls: list[_AnswerCall] | None = None


class _Choice(msgspec.Struct):
    message: _AnswerMessage
    finish_reason: str | None = None


class _AnswerUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    usage: _AnswerUsage | None = None


def _completion(answer: Any, request: _Request) -> Completion:
    """Return the answer in a 200 response. Some of these are failures that the providers' clients return as success."""
    name = request.name
    if isinstance(answer, dict) and answer.get("error"):
        raise _error(name, "model_bad_response", "returned status 200 with an error in the body", str(answer["error"]))
    try:
        parsed = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as exc:
        raise _error(
            name, "model_bad_response", "returned status 200 without a valid chat completion", str(exc)
        ) from exc
    if not parsed.choices:
        raise _error(name, "model_bad_response", "returned no choices", "choices: []")
    choice = parsed.choices[0]
    if choice.finish_reason == "content_filter":
        raise _error(name, "model_content_filter", "was blocked by its provider's content filter")
    if choice.message.refusal:
        raise _error(name, "model_refusal", "declined to answer", choice.message.refusal)
    if choice.finish_reason == "length":
        raise _error(
            name,
            "model_truncated",
            "was cut off at its token limit. Raise max_tokens, or ask for a shorter answer",
            "length",
        )
    text, calls = choice.message.content, (choice.message.tool_calls or ()) if request.tools else ()
    if calls and not isinstance(text, str):
        text = ""
    if not isinstance(text, str) or not (calls or text.strip()):
        raise _error(name, "model_bad_response", "returned an empty answer", f"finish_reason {choice.finish_reason}")
    usage = parsed.usage or _AnswerUsage()
    return Completion(
        text=_without_fence(_storable(text)),
        usage=Usage(input_tokens=usage.prompt_tokens or 0, output_tokens=usage.completion_tokens or 0),
        tool_calls=tuple(_tool_call(call, number) for number, call in enumerate(calls)),
    )


def _tool_call(call: _AnswerCall, number: int) -> ToolCall:
    """Return a call with its arguments as text. Some servers send them as an object, and omit the id."""
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    function = FunctionCall(name=_storable(call.function.name or ""), arguments=_storable(arguments) or "{}")
    return ToolCall(id=_storable(call.id or f"call_{number}"), function=function)


def _storable(text: str) -> str:
    """Replace escaped lone surrogates, which JSON can contain, and which cannot be sent or stored."""
    return text.encode("utf-8", "replace").decode()


def _without_fence(text: str) -> str:
    """Remove a code fence. Models without a JSON mode often put JSON between ```json and ```."""
    match = re.fullmatch(r"\s*```\w*\s*\n(.*?)\s*```\s*", text, re.DOTALL)
    return match[1] if match else text


# Errors

_STATUS_ERRORS: Mapping[int, tuple[str, str]] = {
    401: ("model_authentication", "rejected the API key"),
    403: ("model_authentication", "is not available to this API key"),
    404: ("model_not_found", "does not exist at this provider"),
    408: ("model_unavailable", "timed out at its provider"),
    409: ("model_unavailable", "was busy with a conflicting request"),
    429: ("model_rate_limited", "is over its rate limit"),
}


#: Errors by the text of the body, for any status: providers use the same texts with different statuses.
_BODY_ERRORS: Mapping[str, tuple[str, str]] = {
    r"insufficient_quota": ("model_quota", "has no quota left; check the plan and billing of this API key"),
    r"context_length_exceeded|exceed_context_size|maximum context length": (
        "model_context_length",
        "received an input that exceeds its context window",
    ),
    r"content_filter|content_policy": ("model_content_filter", "was blocked by its provider's content filter"),
}


def _status_error(name: str, response: httpx.Response) -> ModelError:
    provider_message, status = _provider_message(response), response.status_code
    default = ("model_unavailable", "failed") if status >= 500 else ("model_bad_request", "rejected the request")
    error_type, reason = _STATUS_ERRORS.get(status, default)
    for pattern, known in _BODY_ERRORS.items():
        if re.search(pattern, response.text):
            error_type, reason = known
    provider = PROVIDERS.get(name.partition("/")[0])
    if status == 401 and provider and provider.key_variable:
        reason += f" in {provider.key_variable}"
    return _error(name, error_type, f"{reason} (HTTP {status})", provider_message)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the requested wait: ``Retry-After`` in seconds or as a date (RFC 9110, section 10.2.3), or its ms form."""
    value = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif value.strip()[:1].isdigit():
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return None
    return max(0.0, seconds)


def _provider_message(response: httpx.Response) -> str:
    """Return the provider's message for the log, without API keys."""
    words = f"x-request-id {response.headers.get('x-request-id', 'none')}: {response.text[:MAX_LOGGED_CHARS]!r}"
    return re.sub(r"\b(sk|gsk|fk)[-_][\w*.-]+", r"\1-…", words)


def _error(name: str, error_type: str, reason: str, log_detail: str = "") -> ModelError:
    return ModelError(f"The model {name} {reason}.", error_type, log_detail)


# Other providers, through litellm


def _litellm_calls_tools(name: str) -> bool:
    try:
        import litellm
    except ImportError as exc:
        raise _unknown_provider(name) from exc
    return bool(litellm.supports_function_calling(name))


async def _complete_with_litellm(request: _Request) -> Completion:
    """Call the model through litellm, which does its own retries."""
    try:
        import litellm
    except ImportError as exc:
        raise _unknown_provider(request.name) from exc
    litellm.suppress_debug_info = True  # otherwise it prints advertisements
    messages, max_tokens, temperature = request.messages, request.max_tokens, request.temperature
    if request.tools:
        messages = _with_format_in_words(request)
        options: dict[str, Any] = {"tools": [_function_of(tool) for tool in request.tools]}
    else:
        is_strict, request_schema = _strict_schema(request.schema)
        json_schema = {"name": "answer", "strict": is_strict, "schema": request_schema}
        options = {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    headers = request.all_headers()
    try:
        answer = await litellm.acompletion(
            model=request.name,
            messages=msgspec.to_builtins(messages),
            num_retries=2,
            **options,
            **({} if max_tokens is None else {"max_tokens": max_tokens}),
            **({} if temperature is None else {"temperature": temperature}),
            **({"extra_headers": headers} if headers else {}),
        )
    except Exception as exc:  # litellm's errors have a status, but no common base class except Exception
        status = getattr(exc, "status_code", None) or 500
        raise _status_error(request.name, httpx.Response(status, text=str(exc))) from exc
    return _completion(answer.model_dump(), request)

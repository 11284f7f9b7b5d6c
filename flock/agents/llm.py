"""A client for chat completions over HTTP: sends messages to a model, and returns one JSON answer with its token usage.

Tests pass a fake server as ``transport=``.

The retry policy is the same as in the providers' own clients: up to three attempts for 408, 409, 429, 5xx, timeouts and
lost connections, about 0.5 s and 1 s apart or as requested by ``Retry-After``. Other errors are not retried. One
deadline covers all attempts. All attempts send the caller's ``Idempotency-Key``, so a provider that supports it does
the work only once. Others ignore unknown headers (RFC 9110, section 5.1).
"""

import contextlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import anyio
import httpx
import msgspec
from msgspec.structs import replace

from flock.agents import react
from flock.agents.completions import Completion, Listener, Message, ToolSchema
from flock.agents.providers import BUILT_IN, Endpoint, endpoint_of, required_name, unknown_provider
from flock.agents.replies import (
    TRANSIENT,
    completion_of,
    model_error,
    provider_message,
    retry_after_s,
    status_error,
)
from flock.agents.requests import (
    FORMATS,
    STREAMS,
    Request,
    format_of,
    function_of,
    next_step,
    rejects_format,
    rejects_stream,
    rejects_tools,
    streamed,
    strict_schema,
    with_format_in_words,
)
from flock.agents.sse import is_stream
from flock.agents.streams import StreamedReply, read_reply
from flock.errors import ModelError

__all__ = ["ModelClient"]

logger = logging.getLogger("flock.llm")

#: Max seconds that a server may make a run wait before a retry.
MAX_RETRY_AFTER_S = 120


class _TransientError(Exception):
    """A transient failure, for which a retry may succeed."""

    def __init__(self, error: ModelError, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.retry_after_s = retry_after_s


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
        #: the way to request a stream, by model
        self._streams: dict[str, str] = {}
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
        listener: Listener | None = None,
    ) -> Completion:
        """Ask *model* for one JSON object that matches *schema*, or for calls of *tools*. The caller validates both.

        With tools, the JSON is requested in words only: some servers reject a ``response_format`` beside ``tools``, and
        with others the model then never calls one. A model that cannot call tools is asked for its next step as JSON;
        see ``react``. Without tools, earlier calls and their results are sent as text, which every server accepts.

        Args:
            traceparent: trace context, sent as a header so that gateways and providers can link the request to a trace.
            idempotency_key: identifies this call in all attempts. If the server does not support strict JSON Schema,
                the fallback requests append ``/json_object`` or ``/text`` to it. If it does not support tools, the
                fallback appends ``/step`` before that. A streamed request appends ``/stream`` at the end.
            listener: receives the reply while the model writes it. Without one, no stream is requested. A step as JSON
                is never streamed, and other servers may not support streams: then the listener receives nothing.

        Raises:
            ModelError: there is no usable answer; ``error_type`` has the reason.

        Cancellation: the request is aborted. There is no retry if it would start after the caller's deadline.
        """
        name = required_name(model or self.default_model)
        request = Request(
            name=name,
            messages=messages,
            schema=schema,
            tools=tools,
            max_tokens=max_tokens,
            temperature=temperature,
            headers={} if traceparent is None else {"traceparent": traceparent},
            key=idempotency_key,
            listener=listener,
        )
        if name.partition("/")[0] not in BUILT_IN:
            if not tools:
                return await _complete_with_litellm(replace(request, messages=react.as_text(messages)))
            if _litellm_calls_tools(name):
                return await _complete_with_litellm(request)
            return react.completion_of(await _complete_with_litellm(next_step(request)))
        endpoint = await endpoint_of(name)
        if not tools:
            return await self._complete_json(endpoint, replace(request, messages=react.as_text(messages)))
        if not endpoint.is_local and name not in self._without_tools:
            try:
                return await self._complete_or_call(endpoint, request)
            except ModelError as exc:
                if not rejects_tools(exc):
                    raise
                logger.info("%s does not support tools. Asking for JSON instead.", name)
                if "schema" not in exc.log_detail.lower():  # it rejects all tools, not just these
                    self._without_tools.add(name)
        return react.completion_of(await self._complete_json(endpoint, next_step(request)))

    async def _complete_or_call(self, endpoint: Endpoint, request: Request) -> Completion:
        """Offer tools to a model whose server supports them."""
        body = request.body(endpoint) | format_of("text", request, endpoint)
        body["tools"] = [function_of(tool) for tool in request.tools]
        return completion_of(await self._post(endpoint, body, request.all_headers(), request.listener), request)

    async def _complete_json(self, endpoint: Endpoint, request: Request) -> Completion:
        """Ask for a JSON object in the strictest way that the server supports."""
        name, rejects_schema = request.name, False
        first = FORMATS.index(self._formats.get(name, FORMATS[0]))
        for format_ in FORMATS[first:]:
            body = request.body(endpoint) | format_of(format_, request, endpoint)
            try:
                answer = await self._post(endpoint, body, request.all_headers(format_), request.listener)
            except ModelError as exc:
                if format_ == FORMATS[-1] or not rejects_format(exc):
                    raise
                logger.info("%s does not support the response_format %s. Trying the next one.", name, format_)
                rejects_schema = rejects_schema or "invalid schema" in exc.log_detail.lower()
            else:
                if not rejects_schema:  # the server rejects the format itself, not just this schema
                    self._formats[name] = format_
                return completion_of(answer, request)
        raise AssertionError("the last format returns or raises")

    async def _post(
        self, endpoint: Endpoint, body: Mapping[str, Any], headers: Mapping[str, str], listener: Listener | None
    ) -> Any:
        """Return the server's response as JSON, after up to three attempts."""
        # The local model answers one request at a time. Waiting for the lock does not count as a timeout.
        async with self._local_lock if endpoint.is_local else contextlib.nullcontext():
            for pause_s in (self._backoff_s, 2 * self._backoff_s, None):
                try:
                    return await self._attempt(endpoint, body, headers, listener)
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

    async def _attempt(
        self, endpoint: Endpoint, body: Mapping[str, Any], headers: Mapping[str, str], listener: Listener | None
    ) -> Any:
        """Request a response, as a stream if there is a listener and the server supports that."""
        if listener is None:
            return await self._send(endpoint, body, headers, None)
        ways = list(STREAMS)
        for way in ways[ways.index(self._streams.get(endpoint.name, ways[0])) :]:
            listener.reset()
            try:
                answer = await self._send(endpoint, *streamed(way, body, headers), listener)
            except ModelError as exc:
                if way == ways[-1] or not rejects_stream(exc):
                    raise
                logger.info("%s does not support the request for a %s.", endpoint.name, way.replace("_", " "))
            else:
                self._streams[endpoint.name] = way
                return answer
        raise AssertionError("the last way returns or raises")

    async def _send(
        self, endpoint: Endpoint, body: Mapping[str, Any], headers: Mapping[str, str], listener: Listener | None
    ) -> Any:
        content, all_headers = msgspec.json.encode(body), {**endpoint.headers, **headers}
        try:
            async with self._client().stream("POST", endpoint.url, content=content, headers=all_headers) as response:
                if listener is not None and response.status_code == 200:
                    if is_stream(response) or (await response.aread()).startswith(b"data:"):  # with another type
                        return await read_reply(response, endpoint.name, listener)
                await response.aread()
        except httpx.TimeoutException as exc:
            error = model_error(endpoint.name, "model_timeout", "did not answer in time", type(exc).__name__)
            raise _TransientError(error) from exc
        except httpx.RequestError as exc:
            error = model_error(
                endpoint.name, "model_unavailable", "could not be reached, or closed the connection", repr(exc)
            )
            raise _TransientError(error) from exc
        except ModelError as exc:
            if exc.error_type in TRANSIENT:
                raise _TransientError(exc) from exc
            raise
        if response.status_code != 200:
            error = status_error(endpoint.name, response)
            if error.error_type in TRANSIENT:
                raise _TransientError(error, retry_after_s(response.headers))
            raise error
        try:
            return json.loads(response.content)
        except (ValueError, RecursionError) as exc:
            reason = "returned status 200 with a body that is not JSON"
            raise model_error(endpoint.name, "model_bad_response", reason, provider_message(response)) from exc

    def _client(self) -> httpx.AsyncClient:
        if self._http is None:
            self._http = httpx.AsyncClient(
                transport=self._transport,
                timeout=self._timeout,
                # The engine limits concurrent calls. A second limit here would only hide the waiting.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            )
        return self._http


# Other providers, through litellm


def _litellm_calls_tools(name: str) -> bool:
    try:
        import litellm
    except ImportError as exc:
        raise unknown_provider(name) from exc
    return bool(litellm.supports_function_calling(name))


async def _complete_with_litellm(request: Request) -> Completion:
    """Call the model through litellm, which does its own retries."""
    try:
        import litellm
    except ImportError as exc:
        raise unknown_provider(request.name) from exc
    litellm.suppress_debug_info = True  # otherwise it prints advertisements
    messages, max_tokens, temperature = request.messages, request.max_tokens, request.temperature
    if request.tools:
        messages = with_format_in_words(request)
        options: dict[str, Any] = {"tools": [function_of(tool) for tool in request.tools]}
    else:
        is_strict, request_schema = strict_schema(request.schema)
        json_schema = {"name": "answer", "strict": is_strict, "schema": request_schema}
        options = {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature

    def send(headers: Mapping[str, str], **more: Any) -> Any:
        extra = {"extra_headers": headers} if headers else {}
        return litellm.acompletion(
            model=request.name, messages=msgspec.to_builtins(messages), **options, **extra, **more
        )

    listener, headers = request.listener, request.all_headers()
    if listener is not None:
        listener.reset()
        try:
            answer = await _stream_of_litellm(send, request.name, headers, listener)
        except Exception as exc:
            logger.info("The stream of %s failed (%s). Asking without one.", request.name, type(exc).__name__)
            listener.reset()
        else:
            return completion_of(answer, request)
    try:
        answer = (await send(headers, num_retries=2)).model_dump()
    except Exception as exc:  # litellm's errors have a status, but no common base class except Exception
        status = getattr(exc, "status_code", None) or 500
        raise status_error(request.name, httpx.Response(status, text=str(exc))) from exc
    return completion_of(answer, request)


async def _stream_of_litellm(
    send: Callable[..., Any], name: str, headers: Mapping[str, str], listener: Listener
) -> Mapping[str, Any]:
    """Request a stream once, and return the chat completion. Any failure is an exception."""
    part, headers = streamed("stream", {}, headers)
    reply = StreamedReply(name, listener)
    async with contextlib.aclosing(await send(headers, num_retries=0, **part)) as chunks:
        async for chunk in chunks:
            reply.add(chunk.model_dump())
    return reply.end()

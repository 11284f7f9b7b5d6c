"""A client for chat completions over HTTP: sends messages to a model, and returns one JSON answer with its token usage.

``flock.testing`` replaces the providers in tests.

The retry policy is the same as in the providers' own clients: up to three attempts for 408, 409, 5xx, timeouts and
lost connections, about 0.5 s and 1 s apart. Other errors are not retried. A refusal because of too many calls (429,
529, or 503 with ``Retry-After``) is not a failed attempt: the call waits for the ``Pace`` of its provider. An item of
a batch also waits for the end of an outage. If several models are given, the next one is asked instead.

All attempts send the caller's ``Idempotency-Key``, so a provider that supports it does the work only once. Others
ignore unknown headers (RFC 9110, section 5.1).
"""

import contextlib
import copy
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, TypeVar

import anyio
import anyio.to_thread
import msgspec
from msgspec.structs import replace

from flock.errors import ModelError
from flock.models import http, react, replies
from flock.models.bodies import BadBody, Whole, read_whole
from flock.models.clients import Clients
from flock.models.completions import BatchCall, Completion, Listener
from flock.models.models import Model, ModelChoice, models_of
from flock.models.pace import (
    FALLBACK_WAIT_S,
    MAX_WAIT_S,
    AllOut,
    Caller,
    Gate,
    LeftAlone,
    ModelLimits,
    Pace,
    Passage,
    paces_of_loop,
    passing,
    wait,
)
from flock.models.providers import Endpoint, endpoint_of, is_built_in, no_model, target_of, unknown_provider
from flock.models.requests import (
    FORMATS,
    STREAMS,
    Request,
    bytes_of_files,
    check_files,
    encoded,
    format_of,
    function_of,
    next_step,
    rejects_format,
    rejects_stream,
    rejects_tools,
    streamed,
    with_cache_marks,
    with_contents,
)
from flock.models.sse import is_stream
from flock.models.streams import BYTES_PER_TOKEN, StreamedReply, counted, read_reply
from flock.runs import Usage
from flock.scopes import clocks_stopped

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("flock.llm")

G = TypeVar("G", bound=Gate)

#: Max attempts of a call.
MAX_ATTEMPTS = 3
#: Max calls of an item to each server that responds with status 500: the call itself may be the reason.
MAX_SERVER_ERRORS = 10
#: The longest pause after a refusal if the server does not say how long to wait, in seconds.
MAX_REFUSED_PAUSE_S = 30.0
#: The longest such pause if the server has just answered other calls, in seconds.
SHORT_REFUSED_PAUSE_S = 1.0
#: Max length of the id of a call in a batch endpoint. Anthropic takes no longer ones.
MAX_CUSTOM_ID = 64
#: The request fields that limit the length of an answer.
MAX_TOKENS_FIELDS = ("max_tokens", "max_completion_tokens")
#: The errors after which the next model is asked.
FALLBACK_ERRORS = frozenset(
    "model_unavailable model_timeout model_rate_limited model_quota model_not_found model_not_configured "
    "model_authentication".split()
)


class _TransientError(Exception):
    """A transient failure, for which a retry may succeed. ``status`` is None if there was no response."""

    def __init__(self, error: ModelError, status: int | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.status = status

    def raise_error(self) -> NoReturn:
        try:
            raise self.error from self
        finally:
            del self.error  # it refers to this exception, its cause


def _raised(error: ModelError, status: int | None = None) -> ModelError | _TransientError:
    return _TransientError(error, status) if error.error_type in replies.TRANSIENT else error


class _Sending(msgspec.Struct, frozen=True):
    """The content of each attempt of a call, and the receivers of its reply and of the tokens of an unfinished one."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    listener: Listener | None
    on_unfinished: Callable[[Usage], None]


class ModelClient:
    """Calls models for all runs of one engine, with one connection pool.

    Use it as an async context manager. It opens no connection before the first call.

    Args:
        default_model: the model, or models, of agents without one.
        transport: replaces the network, for tests and gateways.
        backoff_s: the pause after the first failed attempt. It doubles with each attempt, up to 8 s.
        read_timeout_s: max seconds without data from the server before an attempt times out.

    Attributes:
        stand_in: answers in place of all clients without a transport; set by ``flock.testing``.
    """

    stand_in: "ClassVar[ModelClient | None]" = None

    def __init__(
        self,
        default_model: ModelChoice = None,
        *,
        transport: "httpx.AsyncBaseTransport | None" = None,
        backoff_s: float = 0.5,
        read_timeout_s: float = 120,
    ) -> None:
        self.default_model = models_of(default_model, "the flock")
        self._transport = transport
        self._backoff_s = backoff_s
        self._read_timeout_s = read_timeout_s
        self._clients = Clients(transport, read_timeout_s)
        self._formats: dict[str, str] = {}
        #: the way to request a stream, by model
        self._streams: dict[str, str] = {}
        #: models whose servers do not support tools
        self._without_tools: set[str] = set()
        self._local_lock = anyio.Lock()
        #: the paces of this client, if it does not use the network that other clients share
        self._own_paces: dict[Any, Any] = {}
        #: called before each retry
        self.on_retry: Callable[[], None] = lambda: None

    async def __aenter__(self) -> Self:
        # The event loop may be a different one than before.
        self._local_lock, self._clients = anyio.Lock(), Clients(self._transport, self._read_timeout_s)
        self._own_paces = {}
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._clients.aclose()

    def prepare(self) -> None:
        """Import the HTTP client now, since that would hold the event loop during the first call."""
        http.library(self._transport)

    async def complete(
        self,
        model: ModelChoice,
        request: Request,
        caller: Caller = Caller(),  # noqa: B008 - it is frozen
    ) -> Completion:
        """Ask *model*. The caller validates the reply.

        With tools, the JSON is requested in words only: some servers reject a ``response_format`` beside ``tools``, and
        with others the model then never calls one. A model that cannot call tools is asked for its next step as JSON;
        see ``react``. Without tools, earlier calls and their results are sent as text, which every server accepts.

        Args:
            caller: it waits if the provider does not accept the call now.

        Raises:
            ModelError: there is no usable answer; ``error_type`` has the reason.

        Cancellation: the request is aborted. There is no retry if it would start after the caller's deadline.
        """
        client = self if self._transport is not None else (self.stand_in or self)
        models = models_of(model, "the call") or self.default_model or client.default_model
        if not models:
            raise no_model()
        if request.is_strange:
            client = client._forgetful()
        caller = replace(caller, models=len(models), server_errors=[])
        errors: dict[int, ModelError] = {}
        numbers: Sequence[int] = range(len(models))
        try:
            while True:
                for number in numbers:
                    try:
                        return await client._ask_one_of(models, number, request, caller)
                    except ModelError as exc:
                        errors[number] = exc
                        if exc.error_type not in FALLBACK_ERRORS:
                            raise _all_of(errors) from exc.__cause__
                left = {number: exc.pace for number, exc in errors.items() if isinstance(exc, LeftAlone)}
                last = len(models) - 1
                if caller.is_item and last in left:
                    paces = tuple(dict.fromkeys(left.values()))
                    await client._gate(paces, AllOut, paces).enter(caller, Passage())
                    numbers = range(len(models))
                elif left and not caller.have_all_failed:
                    numbers = list(left)
                else:
                    raise _all_of(errors) from errors[last].__cause__
                caller = replace(caller, have_all_failed=True)
        finally:
            errors.clear()  # their tracebacks refer to this frame

    def _forgetful(self) -> "ModelClient":
        """Return a client with the same connections. What a server rejects of its requests, this one does not learn."""
        client = copy.copy(self)
        client._formats, client._streams = dict(self._formats), dict(self._streams)
        client._without_tools = set(self._without_tools)
        return client

    async def _ask_one_of(self, models: Sequence[Model], number: int, request: Request, caller: Caller) -> Completion:
        has_next, name = number + 1 < len(models), models[number].name
        # A server may replay the answer of another model to the same key.
        key = request.idempotency_key
        request = replace(request, name=name, idempotency_key=f"{key}/model{number + 1}" if key and number else key)
        try:
            completion = await self._ask(models[number], request, replace(caller, has_fallback=has_next))
        except ModelError as exc:
            if has_next and exc.error_type in FALLBACK_ERRORS and not caller.have_all_failed:
                logger.info("%s Asking %s instead.", exc, models[number + 1].name)
            raise
        return replace(completion, model=name)

    async def _ask(self, model: Model, request: Request, caller: Caller) -> Completion:
        """Ask one model."""
        if not is_built_in(model):
            return await self._ask_with_litellm(model, request, caller)
        name, endpoint = request.name, await endpoint_of(model)
        if endpoint.is_local:  # it has no outages of its own, so an item must not wait for the end of one
            caller = replace(caller, is_item=False)
        if not request.tools:
            request = replace(request, messages=react.as_text(request.messages))
            return await self._complete_json(endpoint, request, caller)
        if not endpoint.is_local and name not in self._without_tools:
            try:
                return await self._complete_or_call(endpoint, request, caller)
            except ModelError as exc:
                if not rejects_tools(exc):
                    raise
                logger.info("%s does not support tools. Asking for JSON instead.", name)
                if "schema" not in exc.log_detail.lower():  # it rejects all tools, not just these
                    self._without_tools.add(name)
        return react.completion_of(await self._complete_json(endpoint, next_step(request), caller))

    async def _ask_with_litellm(self, model: Model, request: Request, caller: Caller) -> Completion:
        """Ask a model through litellm, which does its own retries."""
        tokens = _estimate({"max_tokens": request.max_tokens}, msgspec.json.encode(request.messages))
        passage = Passage(tokens + bytes_of_files(request.messages) / BYTES_PER_TOKEN)
        pace = self._gate(("litellm", request.name), Pace, model.provider)
        async with passing(self._limits(("litellm", request.name), model.limits, pace), caller, passage):
            if not request.tools:
                return await _complete_with_litellm(replace(request, messages=react.as_text(request.messages)), model)
            if _litellm(request.name).supports_function_calling(request.name):
                return await _complete_with_litellm(request, model)
            return react.completion_of(await _complete_with_litellm(next_step(request), model))

    async def _complete_or_call(self, endpoint: Endpoint, request: Request, caller: Caller) -> Completion:
        """Offer tools to a model whose server supports them."""
        body = request.body(endpoint) | format_of("text", request)
        body |= {"tools": [function_of(tool) for tool in request.tools], **request.tool_options}
        sending = _Sending(endpoint, body, request.all_headers(), request.listener, request.unfinished)
        return replies.completion_of(await self._post(sending, caller), request)

    async def _complete_json(self, endpoint: Endpoint, request: Request, caller: Caller) -> Completion:
        """Ask for a JSON object in the strictest way that the server supports."""
        name, rejects_schema = request.name, False
        first = FORMATS.index(self._formats.get(name, endpoint.first_format))
        for format_ in FORMATS[first:]:
            body = request.body(endpoint) | format_of(
                format_, request, is_local=endpoint.is_local, may_be_strict=endpoint.may_be_strict
            )
            try:
                sending = _Sending(endpoint, body, request.all_headers(format_), request.listener, request.unfinished)
                answer = await self._post(sending, caller)
            except ModelError as exc:
                if format_ == FORMATS[-1] or not rejects_format(exc):
                    raise
                logger.info("%s does not support the response_format %s. Trying the next one.", name, format_)
                rejects_schema = rejects_schema or "invalid schema" in exc.log_detail.lower()
            else:
                if not rejects_schema:  # the server rejects the format itself, not just this schema
                    self._formats[name] = format_
                return replies.completion_of(answer, request)
        raise AssertionError("the last format returns or raises")

    async def _post(self, sending: _Sending, caller: Caller) -> Any:
        """Return the server's response as JSON, after as many attempts as it takes."""
        endpoint, tokens = sending.endpoint, _estimate(sending.body, msgspec.json.encode(sending.body))
        if size := bytes_of_files(sending.body["messages"]):
            tokens += size / BYTES_PER_TOKEN
            await anyio.to_thread.run_sync(check_files, sending.body["messages"], endpoint.provider)
        # The local model answers one request at a time. Waiting for the lock does not count as a timeout.
        async with self._local_lock if endpoint.is_local else contextlib.nullcontext():
            pace = self._gate(endpoint.account, Pace, endpoint.provider, self._backoff_s)
            call = _Call(caller, pace, self._backoff_s)
            limits = self._limits((endpoint.account, endpoint.name), endpoint.limits, pace)
            while True:
                passage = Passage(tokens)
                try:
                    async with passing([*limits, pace], caller, passage):
                        return await call.attempt(self._attempt(sending, passage), passage)
                except _TransientError as failure:
                    await self._pause(call, failure)

    async def _pause(self, call: "_Call", failure: _TransientError) -> None:
        """Wait before the next attempt. Raise the error if it would be too late."""
        pause_s = call.pause_s
        with clocks_stopped() if call.is_refused else contextlib.nullcontext():
            if anyio.current_time() + pause_s > anyio.current_effective_deadline():
                failure.raise_error()
            level = logging.DEBUG if call.is_refused else logging.INFO  # a batch may have many refusals
            logger.log(level, "%s Retrying in %.1f s.", failure.error, pause_s)
            self.on_retry()
            await wait(pause_s, call.caller, call.pace.reason)

    def _limits(
        self, key: tuple[Any, str], limits: tuple[int | None, int | None, int | None], pace: Pace
    ) -> Sequence[Gate]:
        """Return the gate for the limits that a ``Model`` has named, if it has named any."""
        return [self._gate((*key, limits), ModelLimits, key[1], limits, pace)] if any(limits) else []

    def _gate(self, key: tuple[Any, ...], make: Callable[..., G], *args: Any) -> G:
        """Return the gate with this key. It is made for the first call that needs it."""
        gates = paces_of_loop() if self._transport is None else self._own_paces
        if key not in gates:
            gates[key] = make(*args)
        gate: G = gates[key]
        return gate

    async def _attempt(self, sending: _Sending, passage: Passage) -> Any:
        """Request a response, as a stream if there is a listener and the server supports that."""
        endpoint, listener = sending.endpoint, sending.listener
        if listener is None:
            return await self._send(sending, passage)
        ways = list(STREAMS)
        for way in ways[ways.index(self._streams.get(endpoint.name, ways[0])) :]:
            listener.reset()
            try:
                body, headers = streamed(way, sending.body, sending.headers)
                answer = await self._send(replace(sending, body=body, headers=headers), passage)
            except ModelError as exc:
                if way == ways[-1] or not rejects_stream(exc):
                    raise
                logger.info("%s does not support the request for a %s.", endpoint.name, way.replace("_", " "))
            else:
                self._streams[endpoint.name] = way
                return answer
        raise AssertionError("the last way returns or raises")

    async def _send(self, sending: _Sending, passage: Passage) -> Any:
        endpoint, listener = sending.endpoint, sending.listener
        body, headers = sending.body, {**endpoint.headers, **sending.headers}
        content, size = encoded(body, endpoint), bytes_of_files(body["messages"])
        size += len(content)
        if size > len(content):  # files may be long, and are read only now
            content = await anyio.to_thread.run_sync(encoded, body, endpoint, True)
        is_counted, request = False, dict[str, Any](content=content, headers=headers)
        try:
            async with (
                self.http() as client,
                client.stream("POST", http.url_for(client, endpoint.url), **request) as response,
            ):
                passage.headers = dict(response.headers.items())  # in which a name is found at once
                reply: httpx.Response | Whole = response
                if listener is None or response.status_code != 200 or not is_stream(response):
                    reply = await read_whole(response)
                if listener is not None and response.status_code == 200:
                    if reply is response or reply.content.startswith(b"data:"):  # with another type
                        is_counted = True
                        return await read_reply(reply, endpoint.name, listener, size, sending.on_unfinished)
        except anyio.get_cancelled_exc_class():
            if not is_counted:
                sending.on_unfinished(replies.unfinished_usage(None, -(-size // BYTES_PER_TOKEN), 0))
            raise
        except BadBody as exc:
            raise replies.bad_response(endpoint.name, f"sent {exc}") from exc
        except http.errors("TimeoutException") as exc:
            reason = "did not answer in time. Try again later"
            raise _raised(replies.model_error(endpoint.name, "model_timeout", reason, type(exc).__name__)) from exc
        except http.errors("RequestError") as exc:
            reason = "could not be reached, or closed the connection. Check its address, or try again later"
            raise _raised(replies.model_error(endpoint.name, "model_unavailable", reason, repr(exc))) from exc
        except ModelError as exc:
            if exc.error_type in replies.TRANSIENT:
                raise _TransientError(exc, 429 if exc.error_type == "model_rate_limited" else None) from exc.__cause__
            raise
        if reply.status_code != 200:
            raise _raised(replies.status_error(endpoint.name, reply, endpoint.key_variable), reply.status_code)
        try:
            return replies.decoded(reply.content)
        except (ValueError, RecursionError) as exc:
            reason, message = "returned status 200 with a body that is not JSON", replies.provider_message(reply)
            raise replies.bad_response(endpoint.name, reason, message) from exc

    @property
    def has_batches(self) -> bool:
        """Whether it can use batch endpoints. A fake model that replaces all providers has none."""
        return self._transport is not None or self.stand_in is None

    def http(self) -> "contextlib.AbstractAsyncContextManager[httpx.AsyncClient]":
        """Yield the HTTP client of one request."""
        return self._clients.lend()

    async def batch_call(self, model: Model, request: Request, agent_name: str) -> BatchCall:
        """Return *request*, without tools, as a call for the batch endpoint of *model*. Raises ModelError."""
        endpoint, key = await endpoint_of(model), request.idempotency_key or ""
        request = replace(request, name=model.name, messages=react.as_text(request.messages))
        format_ = self._formats.get(model.name, endpoint.first_format)
        body = request.body(endpoint) | format_of(format_, request, may_be_strict=endpoint.may_be_strict)
        custom_id = key if len(key) <= MAX_CUSTOM_ID else hashlib.sha256(key.encode()).hexdigest()
        line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
        content = msgspec.Raw(encoded(body, endpoint))
        asked = [request.messages, request.schema, request.max_tokens, request.temperature, request.options]
        return BatchCall(
            custom_id=custom_id,
            target=target_of(model),
            model=model.name,
            agent_name=agent_name,
            max_tokens=request.max_tokens,
            digest=hashlib.sha256(msgspec.json.encode(asked, enc_hook=str)).hexdigest()[:32],
            line=msgspec.Raw(msgspec.json.encode({**line, "body": content})),
        )


class _Call:
    """The attempts of one call, and what they reveal about its provider."""

    def __init__(self, caller: Caller, pace: Pace, backoff_s: float) -> None:
        self.caller = caller
        self.pace = pace
        self._backoff_s = backoff_s
        self._failures = self._refusals = 0
        self._failed_at = 0.0
        #: of the last attempt: whether it was refused, and the seconds until the next one
        self.is_refused, self.pause_s = False, 0.0

    async def attempt(self, attempt: Awaitable[Any], passage: Passage) -> Any:
        """Return what *attempt* returns, and report it to the pace. After a failure, ``pause_s`` is set."""
        pace = self.pace
        if self._failures >= MAX_ATTEMPTS and not pace.outage.is_open:
            self._failures = 0  # the outage is over
        try:
            answer = await attempt
        except _TransientError as failure:
            asked_s = None if failure.status is None else replies.retry_after_s(passage.headers)
            self.is_refused = failure.status in (429, 529) or (failure.status == 503 and asked_s is not None)
            if self.is_refused:
                self.pause_s = self._pause_after_refusal(failure, asked_s, passage)
            else:
                self.pause_s = self._pause_after_failure(failure, passage)
            raise
        except ModelError as exc:
            if exc.error_type == "model_quota":
                pace.exhausted(anyio.current_time(), passage, exc)
                if pace.waits_for_quota(self.caller):
                    self.is_refused, self.pause_s = True, 0.0
                    raise _TransientError(exc, 429) from exc
            else:
                pace.answered(anyio.current_time(), passage)
            raise
        passage.tokens = replies.token_count(answer, "usage", "total_tokens") or passage.estimate
        left_s = replies.hold_s(passage.headers, is_refused=False, tokens=passage.tokens)
        pace.answered(anyio.current_time(), passage, left_s)
        return answer

    def _pause_after_refusal(self, failure: _TransientError, asked_s: float | None, passage: Passage) -> float:
        """Report a refusal to the pace, and return the pause. Raises the error if another model is to be asked."""
        if asked_s is None:
            asked_s = min(replies.hold_s(passage.headers, is_refused=True), MAX_WAIT_S) or None
        is_overload = failure.status != 429
        self.pace.refused(anyio.current_time(), passage, failure.error, asked_s, is_overload=is_overload)
        if asked_s:
            return 0.0  # all calls wait at the gate
        self._refusals += 1
        are_others_answered = self.pace.answered_sent_at > passage.sent_at - SHORT_REFUSED_PAUSE_S
        longest_s = SHORT_REFUSED_PAUSE_S if are_others_answered else MAX_REFUSED_PAUSE_S
        pause_s = self._backoff(self._refusals, longest_s)
        if self.caller.has_fallback and pause_s > FALLBACK_WAIT_S:
            failure.raise_error()
        return pause_s

    def _pause_after_failure(self, failure: _TransientError, passage: Passage) -> float:
        """Report a failure to the pace, and return the pause. Raises the error if there are no more attempts."""
        now, status = anyio.current_time(), failure.status
        self._failures += 1
        if status == 500:
            self.caller.server_errors.append(status)
        if self._failures == 1:
            self._failed_at = now
        is_timeout = failure.error.error_type == "model_timeout" and failure.error.log_detail != "ConnectTimeout"
        is_last = self._failures >= MAX_ATTEMPTS or (is_timeout and self.caller.has_fallback)
        is_outage = not is_timeout and status not in (408, 409)
        # If calls that were sent after this one had failed were answered, there is no outage.
        are_others_answered = self.pace.answered_sent_at > self._failed_at
        if is_outage or self.caller.has_fallback:
            has_others, is_last_one = self.caller.models > 1, is_last and not are_others_answered
            self.pace.failed(now, passage, failure.error, is_last=is_last_one, has_others=has_others)
        is_cause = len(self.caller.server_errors) >= MAX_SERVER_ERRORS * self.caller.models
        if not (is_last or is_cause):
            return self._backoff(self._failures, 8)
        waits_for_outages = self.caller.is_item and not self.caller.has_fallback
        if are_others_answered or is_cause or not (waits_for_outages and is_outage):
            failure.raise_error()
        return 0.0

    def _backoff(self, times: int, longest_s: float) -> float:
        return float(min(self._backoff_s * 2 ** min(times - 1, 30), longest_s) * (1 - 0.25 * random.random()))


def _all_of(failed: Mapping[int, ModelError]) -> ModelError:
    """Return one error for those of all models that were asked. Its ``error_type`` is that of the last one."""
    errors = [failed[number] for number in sorted(failed)]
    last = errors[-1]
    if len(errors) == 1:
        return last
    details = " ".join(error.log_detail for error in errors if error.log_detail)
    error = ModelError(" ".join(map(str, errors)), last.error_type, details)
    error.usage, error.model = last.usage, last.model
    lasting = [each.is_lasting for each in errors]
    error.is_lasting = None if None in lasting and False not in lasting else all(lasting)
    return error


def _estimate(body: Mapping[str, Any], content: bytes) -> float:
    """Return about how many tokens a call will use."""
    longest = max((value for name in MAX_TOKENS_FIELDS if isinstance(value := body.get(name), int)), default=256)
    return len(content) / BYTES_PER_TOKEN + longest


# Other providers, through litellm


def _litellm(name: str) -> Any:
    try:
        import litellm
    except ImportError as exc:
        raise unknown_provider(name) from exc
    litellm.suppress_debug_info = True  # otherwise it prints advertisements
    return litellm


async def _complete_with_litellm(request: Request, model: Model) -> Completion:
    litellm = _litellm(request.name)
    part = format_of("text" if request.tools else "json_schema", request, may_be_strict=model.strict is not False)
    await anyio.to_thread.run_sync(check_files, request.messages, "litellm")
    asked = part.pop("messages", request.messages)
    messages = await anyio.to_thread.run_sync(with_contents, asked, model.strip_metadata)
    options: dict[str, Any] = msgspec.to_builtins({"messages": messages, **part})
    if "claude" in request.name:
        options["messages"] = with_cache_marks(options["messages"])
    if request.tools:
        options |= msgspec.to_builtins({"tools": list(map(function_of, request.tools)), **request.tool_options})
    if request.max_tokens is not None:
        options["max_tokens"] = request.max_tokens
    options |= request.all_options

    def send(headers: Mapping[str, str], **more: Any) -> Any:
        extra = {"extra_headers": headers} if headers else {}
        return litellm.acompletion(model=request.name, **options, **extra, **more)

    listener, headers = request.listener, {**request.all_headers(), **model.headers}
    extra_body = {**model.extra_body, **request.extra_body}
    options |= {"extra_body": extra_body} if extra_body else {}
    options |= {"api_key": model.api_key} if model.api_key else {}
    if listener is not None:
        listener.reset()
        try:
            answer = await _stream_of_litellm(send, request, headers, listener)
        except Exception as exc:
            logger.info("The stream of %s failed (%s). Asking without one.", request.name, type(exc).__name__)
            listener.reset()
        else:
            return replies.completion_of(answer, request)
    try:
        answer = (await send(headers, num_retries=2)).model_dump()
    except Exception as exc:  # litellm's errors have a status, but no common base class except Exception
        status = getattr(exc, "status_code", None) or 500
        raise replies.status_error(request.name, http.library().Response(status, text=str(exc))) from exc
    return replies.completion_of(answer, request)


async def _stream_of_litellm(
    send: Callable[..., Any], request: Request, headers: Mapping[str, str], listener: Listener
) -> Mapping[str, Any]:
    """Request a stream once, and return the chat completion. Any failure is an exception."""
    part, headers = streamed("stream", {}, headers)
    reply = StreamedReply(request.name, listener)
    async with contextlib.aclosing(await send(headers, num_retries=0, **part)) as chunks:
        size = len(msgspec.json.encode(request.messages)) + bytes_of_files(request.messages)
        with counted(reply, size, request.unfinished):
            async for chunk in chunks:
                reply.add(chunk.model_dump())
            return reply.end()

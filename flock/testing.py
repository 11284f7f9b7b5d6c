"""Agents without a model or a network, for tests.

    with FakeModel([{"mood": "calm"}]) as model:
        assert flock.run("analyst", {"text": "Hello."}) == {"mood": "calm"}
    assert "Hello." in model.requests[0].text

Only the provider is replaced. Prompts, retries, rate limits, streams and the checks of answers are the real ones.
"""

import contextlib
import inspect
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import anyio.lowlevel
import httpx
import msgspec

from flock.models.llm import ModelClient
from flock.models.models import Model
from flock.runs import Usage

#: The length of the pieces of a streamed answer, in characters.
PIECE_CHARS = 8


class Reply(msgspec.Struct, frozen=True):
    """A reply of the fake model. If the request asks for a stream, it is sent in pieces.

    Args:
        content: the answer. A mapping is encoded as JSON; a ``str`` is sent as it is, valid or not. A tuple has the
            pieces of a text as they are streamed. If an exception is among them, the connection breaks off there. None
            means no text.
        calls: the tools that the model calls: pairs of a name and the arguments, a mapping or a ``str``.
        finish_reason: such as "length", if the answer is cut off, or "content_filter". None is "tool_calls" if there
            are calls, otherwise "stop".
        refusal: the text with which the model declines to answer.
        reasoning: the thoughts of a model that sends them apart from its answer.
        usage: the tokens that the provider counts, here 10 and 5.
    """

    content: Any = None
    calls: Sequence[tuple[str, Any]] = ()
    finish_reason: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    usage: Usage = Usage(input_tokens=10, output_tokens=5)

    def completion(self) -> dict[str, Any]:
        """Return the body of a response without a stream, as OpenAI's API has it."""
        choice = {"index": 0, "message": {"role": "assistant", **_message_of(self)}, "finish_reason": _end_of(self)}
        return {"id": "chatcmpl-1", "object": "chat.completion", "choices": [choice], "usage": _usage_of(self)}


class Failure(msgspec.Struct, frozen=True):
    """An error response of a provider, in OpenAI's format.

    Args:
        status: such as 429 or 500.
        code: such as "insufficient_quota" or "context_length_exceeded".
        message: the provider's text. It is logged, and not sent to clients.
        retry_after_s: the seconds in ``Retry-After``. The next attempt really waits, so 0.1 is enough.
        headers: other headers.
    """

    status: int
    code: Any = None
    message: str = "The fake model fails."
    retry_after_s: float | None = None
    headers: Mapping[str, str] = {}


class ModelRequest(dict[str, Any]):
    """The body of a request, as OpenAI's API has it, such as ``request["messages"][0]["content"]``.

    Attributes:
        headers: the headers, with names in lower case.
    """

    def __init__(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        super().__init__(body)
        self.headers = headers

    @property
    def agent_name(self) -> str:
        """The agent that asks, or "" if the prompt is not that of a ``ModelAgent``."""
        match = re.match(r"You are (\S+)\.(\n|$)", self._content(0))
        return match[1] if match else ""

    @property
    def text(self) -> str:
        """The content of the last message: the inputs of the agent, a result of a tool, or why an answer is invalid."""
        return self._content(-1)

    def _content(self, number: int) -> str:
        content = self["messages"][number]["content"]  # in parts if it is marked for a cache
        return "".join(part["text"] for part in content) if isinstance(content, list) else str(content)

    @property
    def schema(self) -> Any:
        """The JSON Schema of the answer, or None. Some providers get it in words, at the end of the first message."""
        if "json_schema" in self.get("response_format", {}):
            return self["response_format"]["json_schema"]["schema"]
        match = re.search(r"It must match this JSON Schema:\n(.*)", self._content(0))
        return json.loads(match[1]) if match else None

    @property
    def tool_names(self) -> list[str]:
        """The tools that the model may call."""
        return [tool["function"]["name"] for tool in self.get("tools", [])]


class FakeModel:
    """A model whose replies a test sets.

    As a context manager it answers in place of all models of this process, with any provider and without keys. Limits
    of a ``Model`` are not applied, and pauses between attempts are short. For one engine, or with real keys and
    limits, pass ``transport=model.transport`` to ``flock.engine``. For other processes, see ``serve``.

    A reply is an answer as a mapping or a ``str``, a ``Reply``, a ``Failure``, a ``TimeoutError`` or
    ``ConnectionError``, an ``httpx.Response``, or a function of the ``ModelRequest`` that returns one of these. The
    function may be async.

    Args:
        replies: a list, whose replies are used in order and removed; a function that replies to all requests; or a
            mapping from the name of each agent to a list, a function, or one reply to all its requests.

    Raises: AssertionError at the end of the block, if there was no reply to a request, a function raised an exception,
        or replies of a list were not used.

    Attributes:
        replies: the replies that are left. They can be set at any time.
        requests: the requests so far, in the order in which they arrived.
        transport: replaces the network of ``flock.engine``.
    """

    def __init__(self, replies: list[Any] | Mapping[str, Any] | Callable[[ModelRequest], Any] | None = None) -> None:
        self.replies: Any = [] if replies is None else replies
        self.requests: list[ModelRequest] = []
        self.transport: httpx.AsyncBaseTransport = httpx.MockTransport(self._respond)
        self._error: Exception | None = None
        self._outer: list[ModelClient | None] = []

    def __enter__(self) -> Self:
        self._outer.append(ModelClient.stand_in)
        ModelClient.stand_in = _StandIn("fake/model", transport=self.transport, backoff_s=0.001)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        ModelClient.stand_in = self._outer.pop()
        if exc_type is None:
            self.check()

    def check(self) -> None:
        """Raise AssertionError if a request had no reply, or a reply was not used; see ``FakeModel``."""
        if self._error is not None:
            raise AssertionError(f"The fake model could not reply. {self._error}") from self._error
        lists = [self.replies, *(self.replies.values() if isinstance(self.replies, Mapping) else ())]
        if left := sum(len(replies) for replies in lists if isinstance(replies, list)):
            asked = len(self.requests)
            raise AssertionError(f"The fake model was asked {asked} times, and {left} of its replies were not used.")

    @contextlib.contextmanager
    def serve(self, *, port: int = 0) -> Iterator[str]:
        """Serve the model to other processes of this machine.

        Args:
            port: the port to listen on; 0 picks a free one.

        Yields:
            str: the address, for an environment variable such as ``OPENAI_BASE_URL``. Any key works.

        Functions among the replies are called in another thread. Every exception closes the connection.
        """
        import uvicorn  # not needed by most tests

        server = uvicorn.Server(uvicorn.Config(self, log_config=None, access_log=False, lifespan="off"))
        with socket.create_server(("127.0.0.1", port)) as listener:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            finally:
                server.force_exit = server.should_exit = True
                thread.join()

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """Respond as an ASGI application."""
        from starlette.requests import Request  # not needed by most tests

        body, url = await Request(scope, receive).body(), f"http://fake{scope['path']}"
        status, headers = 200, [(b"content-length", b"1")]
        stream: Any = httpx.ByteStream(b"")
        with contextlib.suppress(Exception):
            response = await self._respond(httpx.Request("POST", url, content=body, headers=scope["headers"]))
            status, stream = response.status_code, response.stream
            headers = [(name.lower(), value) for name, value in response.headers.raw]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        with contextlib.suppress(Exception):
            async for piece in stream:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})
        # If the body is incomplete now, the server closes the connection.

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        await anyio.lowlevel.checkpoint()
        self.requests.append(sent := ModelRequest(json.loads(request.content), dict(request.headers)))
        try:
            reply = await self._reply_to(sent)
        except (TimeoutError, ConnectionError, httpx.TransportError) as exc:
            reply = exc
        except Exception as exc:
            self._error = self._error or exc
            raise
        return _response_of(reply, sent)

    async def _reply_to(self, request: ModelRequest) -> Any:
        reply: Any = self.replies
        asks = "a request"
        if isinstance(reply, Mapping):
            asks = f"the agent {request.agent_name!r}"
            if request.agent_name not in reply:
                names = ", ".join(map(repr, reply))
                raise AssertionError(f"It has no replies to {asks}, only to {names}. Replies to all agents are a list.")
            reply = reply[request.agent_name]
        if isinstance(reply, list):
            if not reply:
                raise AssertionError(f"It has no reply left to {asks}: {request.text[:200]!r}")
            reply = reply.pop(0)
        if callable(reply):
            reply = reply(request)
            if inspect.isawaitable(reply):
                reply = await reply
        return reply


class _StandIn(ModelClient):
    """Asks the fake model in place of any other one."""

    async def _ask(self, model: Model, *args: Any) -> Any:
        name = model.name if "/" in model.name else f"fake/{model.name}"
        kept: dict[str, Any] = {"headers": model.headers, "extra_body": model.extra_body, "strict": model.strict}
        fake = Model(name, base_url="http://fake/v1", api_key="fake", **kept)
        return await super()._ask(fake, *args)


def _response_of(reply: Any, request: ModelRequest) -> httpx.Response:
    """Return *reply* as a provider sends it. Raises httpx.TransportError if it does not answer."""
    if isinstance(reply, Failure):
        headers = {} if reply.retry_after_s is None else {"Retry-After": f"{reply.retry_after_s:g}"}
        error = {"message": reply.message, "type": "some_error", "code": reply.code}
        return _json_response(reply.status, {"error": error}, {**headers, **reply.headers})
    if isinstance(reply, httpx.Response):  # a list may have the same one twice
        return httpx.Response(reply.status_code, headers=reply.headers, stream=reply.stream)
    if isinstance(reply, Exception):
        raise _lost(reply)
    reply = reply if isinstance(reply, Reply) else Reply(reply)
    if request.get("stream"):
        headers = {"Content-Type": "text/event-stream"}
        return httpx.Response(200, headers=headers, content=_stream(_events_of(reply, request)))
    return _json_response(200, reply.completion())


def _json_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> httpx.Response:
    """Return a response in ASCII: unlike that of httpx, it can have lone surrogates."""
    content = json.dumps(body).encode()
    return httpx.Response(status, headers={"Content-Type": "application/json", **(headers or {})}, content=content)


def _lost(exc: Exception) -> Exception:
    if isinstance(exc, TimeoutError):
        return httpx.ReadTimeout("The fake model does not answer in time.")
    return httpx.ReadError("The fake model closes the connection.") if isinstance(exc, ConnectionError) else exc


def _pieces_of(reply: Reply) -> Sequence[Any]:
    content = reply.content
    if isinstance(content, tuple) or content is None:
        return content or ()
    text = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    return [text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS)]


def _message_of(reply: Reply) -> dict[str, Any]:
    pieces = _pieces_of(reply)
    for piece in pieces:
        if isinstance(piece, Exception):
            raise _lost(piece)
    calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)},
        }
        for number, (name, arguments) in enumerate(reply.calls)
    ]
    text = None if reply.content is None else "".join(pieces)
    others = {"reasoning_content": reply.reasoning, "tool_calls": calls}
    return {"content": text, "refusal": reply.refusal} | {name: value for name, value in others.items() if value}


def _end_of(reply: Reply) -> str:
    return reply.finish_reason or ("tool_calls" if reply.calls else "stop")


def _usage_of(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _events_of(reply: Reply, request: ModelRequest) -> Iterator[Any]:
    """Yield the events of a streamed reply, and the exceptions among its pieces."""

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> Mapping[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}

    others = _message_of(msgspec.structs.replace(reply, content=None, reasoning=None))
    yield chunk({"role": "assistant", "content": "", "reasoning_content": reply.reasoning})
    for piece in _pieces_of(reply):
        yield _lost(piece) if isinstance(piece, Exception) else chunk({"content": piece})
    yield chunk({**others, "tool_calls": [{"index": n, **call} for n, call in enumerate(others.get("tool_calls", ()))]})
    yield chunk({}, _end_of(reply))
    if (request.get("stream_options") or {}).get("include_usage"):
        yield {"choices": [], "usage": _usage_of(reply)}
    yield "[DONE]"


async def _stream(events: Iterator[Any]) -> AsyncIterator[bytes]:
    for event in events:
        if isinstance(event, Exception):
            raise event
        data = event if isinstance(event, str) else json.dumps(event)
        yield f"data: {data}\n\n".encode()
        await anyio.lowlevel.checkpoint()

"""A fake model server, and raw sockets that misbehave."""

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import anyio
import anyio.abc
import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flock.runs import Usage


def answer(content: Any, *, finish_reason: str = "stop", refusal: str | None = None, **more: Any) -> Response:
    """Return a chat completion whose text is *content*, encoded as JSON unless it is a string."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    return as_json(
        {
            "id": "chatcmpl-1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": refusal, **more},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    )


def usage_of_gpt_4o(input_tokens: int, output_tokens: int) -> Usage:
    """Return these tokens with what they cost at 2.5 and 10 US dollars for a million."""
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        picodollars=2_500_000 * input_tokens + 10_000_000 * output_tokens,
        priced_tokens=input_tokens + output_tokens,
    )


def calling(*calls: tuple[str, Any]) -> Response:
    """Return a chat completion that calls tools: pairs of a name and arguments, as JSON unless they are a string."""
    tool_calls = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            },
        }
        for number, (name, arguments) in enumerate(calls)
    ]
    return answer(None, finish_reason="tool_calls", tool_calls=tool_calls)


def as_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")


def chunk(content: Any = None, finish_reason: str | None = None, **delta: Any) -> dict[str, Any]:
    """Return one chunk of a streamed chat completion."""
    parts = delta if content is None else {"content": content, **delta}
    choice = {"index": 0, "delta": parts, "finish_reason": finish_reason}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


#: The last chunk of a stream, in OpenAI's form.
USAGE: Mapping[str, Any] = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}


def sse(*events: Any) -> bytes:
    """Return server-sent events: strings as they are, and anything else as JSON."""
    data = (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events)
    return "".join(f"data: {line}\n\n" for line in data).encode()


def streamed(*contents: str, finish_reason: str = "stop", **delta: Any) -> Response:
    """Return a streamed chat completion with these pieces of text. Other parts are in the chunk before the last."""
    chunks = [chunk("", role="assistant"), *map(chunk, contents), chunk(**delta), chunk(finish_reason=finish_reason)]
    return Response(sse(*chunks, USAGE, "[DONE]"), media_type="text/event-stream")


def error(status: int, code: Any = None, message: str = "no", **headers: str) -> Response:
    """Return an error in OpenAI's format. In a header's name, ``_`` means ``-``."""
    body = {"error": {"message": message, "type": "some_error", "code": code}}
    return as_json(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class FakeModel:
    """A model that sends ``replies`` in order, and records request bodies in ``requests``."""

    def __init__(self) -> None:
        self.replies: list[Response | Callable[[Any], Awaitable[Response]]] = []
        self.requests: list[Any] = []
        self.headers: list[Mapping[str, str]] = []
        self.app = Starlette(routes=[Route("/{path:path}", self._reply, methods=["POST"])])
        self.transport = httpx.ASGITransport(self.app)

    async def _reply(self, request: Request) -> Response:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        reply = self.replies.pop(0)
        return reply if isinstance(reply, Response) else await reply(self.requests[-1])


@contextlib.asynccontextmanager
async def socket_server(
    handle: Callable[[anyio.abc.SocketStream], Awaitable[None]],
) -> AsyncIterator[tuple[str, list[int]]]:
    """Serve each connection to a real socket with *handle*. Yield its URL, and a list with one entry per connection."""
    connections: list[int] = []

    async def count(stream: anyio.abc.SocketStream) -> None:
        connections.append(1)
        async with stream:
            with contextlib.suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                await handle(stream)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, count)
        yield f"http://127.0.0.1:{port}/v1", connections
        tasks.cancel_scope.cancel()


class LimitedModel:
    """A model that accepts calls at a limited rate, refuses the others with 429, and is randomly overloaded (529).

    Args:
        per_s: the rate. It is a token bucket that holds the calls of *burst_s* seconds.
        overloaded: the share of calls within the limit that are refused with 529. They do not count for the limit.
        headers: the headers of a 429, from the seconds until the next call is accepted.
        latency_s: how long an answer takes.
    """

    def __init__(
        self,
        per_s: float,
        *,
        overloaded: float = 0.0,
        burst_s: float = 1.0,
        headers: Callable[[float], dict[str, str]] = lambda wait_s: {"retry_after_ms": f"{wait_s * 1000:.0f}"},
        latency_s: float = 0.0,
    ) -> None:
        self._per_s, self._overloaded, self._headers, self._latency_s = per_s, overloaded, headers, latency_s
        self._level = self._capacity = max(1.0, per_s * burst_s)
        self._at = time.monotonic()
        self.statuses: Counter[int] = Counter()
        self.app = Starlette(routes=[Route("/{path:path}", self._reply, methods=["POST"])])
        self.transport = httpx.ASGITransport(self.app)

    async def _reply(self, request: Request) -> Response:
        await request.body()
        now = time.monotonic()
        self._level, self._at = min(self._capacity, self._level + self._per_s * (now - self._at)), now
        if random.random() < self._overloaded:
            response = error(529, "overloaded_error")
        elif self._level >= 1:
            self._level -= 1
            response = answer({"answer": "yes"})
        else:
            response = error(429, "rate_limit_exceeded", **self._headers((1 - self._level) / self._per_s))
        self.statuses[response.status_code] += 1
        await anyio.sleep(self._latency_s)
        return response

    def share(self, status: int) -> float:
        return self.statuses[status] / max(1, self.statuses.total())

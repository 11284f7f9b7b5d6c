"""A fake model server, and raw sockets that misbehave."""

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

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

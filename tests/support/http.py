"""HTTP requests that many tests send."""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import anyio.lowlevel
import httpx

from flockapi import FlockAPI
from tests.support import PATIENCE_S


class _Transport(httpx.ASGITransport):
    """On Python 3.11, coverage loses a coroutine into which its loop throws, such as the end of a task group."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        await anyio.lowlevel.checkpoint()  # finds it again
        return response


def client_of(app: FlockAPI, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    transport = _Transport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers)


async def left(
    app: FlockAPI,
    path: str,
    body: Any,
    until: Callable[[], Awaitable[Any]],
    headers: Mapping[str, str] | None = None,
    *,
    reads: bool = True,
) -> None:
    """Post JSON, and disconnect after *until*. httpx would cancel the request in the server.

    Args:
        reads: False means that it takes no byte of the response, as a slow client.
    """
    sent = [json.dumps(body).encode()]

    async def receive() -> Any:
        if sent:
            return {"type": "http.request", "body": sent.pop(), "more_body": False}
        await until()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not reads:
            await anyio.sleep_forever()

    all_headers = {"content-type": "application/json", **(headers or {})}
    scope = {
        **{"type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "scheme": "http"},
        **{"headers": [(name.lower().encode(), value.encode()) for name, value in all_headers.items()]},
        **{"http_version": "1.1", "client": None, "server": ("t", 80), "asgi": {"version": "3.0"}},
    }
    with anyio.fail_after(PATIENCE_S):
        await app(scope, receive, send)


async def get(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    response = await client.get(path, params=query or None)  # an empty mapping would drop the query of the path
    assert response.status_code == 200, response.text
    return response.json()


async def post_run(client: httpx.AsyncClient, agent_name: str, inputs: Any = None, **more: Any) -> httpx.Response:
    return await client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs or {}, **more})


async def wait_until(
    client: httpx.AsyncClient, path: str, is_enough: Callable[[Any], bool], timeout_s: float = PATIENCE_S
) -> Any:
    """Poll the run or batch at *path* until *is_enough* is true of it, and return it."""
    with anyio.fail_after(timeout_s):
        while not is_enough(body := (await client.get(path)).json()):  # noqa: ASYNC110 - HTTP has no event here
            await anyio.sleep(0.01)
    return body


async def wait_for(client: httpx.AsyncClient, path: str, timeout_s: float = PATIENCE_S) -> Any:
    """Poll the run or batch at *path* until it is final, and return it."""
    return await wait_until(client, path, lambda body: body["status"] not in ("starting", "running"), timeout_s)


def events_in(text: str) -> list[dict[str, Any]]:
    """Parse an event stream as in the HTML standard: an empty line ends an event, and a colon starts a comment."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "data" in fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


def check_problem(response: httpx.Response, status: int) -> Any:
    assert response.status_code == status, response.url
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.text.endswith("}\n")
    body = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["X-Request-ID"]
    assert body["instance"] == response.request.url.path
    assert body.keys() >= {"type", "title", "detail"}
    return body

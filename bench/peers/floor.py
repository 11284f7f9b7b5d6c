"""An ASGI app without a framework, which is the floor: uvicorn bench.peers.floor:app"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from bench.peers import work
from bench.peers.shared import tune_gc

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


async def app(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif (scope["method"], scope["path"]) == ("GET", "/agents"):
        await respond(send, 200, work.ENCODE(work.agent_list()))
    elif (scope["method"], scope["path"]) == ("POST", "/run/flock"):
        await run_flock(scope, receive, send)
    else:
        await respond(send, 404, b"{}")


async def lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def run_flock(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    body, has_more = b"", True
    while has_more:
        message = await receive()
        body += message.get("body", b"")
        has_more = message.get("more_body", False)
    request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode() or work.new_request_id()
    try:
        wanted, function, inputs = work.checked(body)
    except (KeyError, msgspec.DecodeError) as exc:
        await respond(send, 422, str(exc).encode())
        return
    run = work.new_run(wanted.agent_name, request_id)
    await work.execute(run, function, inputs)
    headers = [(b"x-request-id", run.request_id.encode()), (b"flock-run-status", run.status.encode())]
    await respond(send, 200, work.ENCODE(run), headers)


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *(headers or ())]})
    await send({"type": "http.response.body", "body": body})


tune_gc()

"""The bare equal: routes of Starlette and msgspec, written by hand: uvicorn bench.peers.bare:app"""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from bench.peers import work
from bench.peers.shared import tune_gc

if TYPE_CHECKING:
    from bench.peers.commits import GroupCommit  # it needs SQLite

BACKGROUND = work.Background()
#: Set by ``bench.peers.bare_commit``.
RECORDS: "list[GroupCommit]" = []


def as_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(work.ENCODE(value), status, headers, "application/json")


async def list_agents(request: Request) -> Response:
    return as_json(work.agent_list())


async def run_flock(request: Request) -> Response:
    request_id = request.headers.get("x-request-id") or work.new_request_id()
    try:
        wanted, function, inputs = work.checked(await request.body())
    except (KeyError, msgspec.DecodeError) as exc:
        return Response(str(exc), 422)
    if wanted.agent_name in work.STREAMS and "text/event-stream" in request.headers.get("accept", ""):
        return StreamingResponse(work.STREAMS[wanted.agent_name](inputs), media_type="text/event-stream")
    run = work.new_run(wanted.agent_name, request_id)
    if wanted.async_run:
        response = as_json(run, 202, headers_of(run) | {"Location": f"/run/{run.run_id}"})
        BACKGROUND.start(run, function, inputs)
        return response
    await work.execute(run, function, inputs)
    response = as_json(run, headers=headers_of(run))
    for records in RECORDS:
        await records.save(run.run_id, bytes(wanted.inputs), bytes(response.body))
    return response


def headers_of(run: work.Run) -> dict[str, str]:
    return {"X-Request-ID": run.request_id, "Flock-Run-Status": run.status}


async def get_run(request: Request) -> Response:
    run_id, wait_s = request.path_params["run_id"], float(request.query_params.get("wait", 0))
    if run_id not in BACKGROUND.runs:
        return Response(status_code=404)
    run = await BACKGROUND.wait(run_id, wait_s)
    return as_json(run, headers=headers_of(run))


async def run_events(request: Request) -> Response:
    async def events() -> AsyncIterator[bytes]:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        work.READERS.add(queue)
        try:
            event = b""
            while b"run.completed" not in event:
                event = await queue.get()
                yield event
        finally:
            work.READERS.discard(queue)

    return StreamingResponse(events(), media_type="text/event-stream")


app = Starlette(
    routes=[
        Route("/agents", list_agents),
        Route("/run/flock", run_flock, methods=["POST"]),
        Route("/run/{run_id}", get_run),
        Route("/run/{run_id}/events", run_events),
    ]
)
tune_gc()

"""Workflows of DBOS with routes of FastAPI, with SQLite: python -m bench.peers.with_dbos PORT"""

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import fastapi
import uvicorn
from dbos import DBOS
from fastapi.responses import StreamingResponse

app = fastapi.FastAPI()
DBOS(config={"name": "bench", "system_database_url": "sqlite:///dbos.sqlite", "run_admin_server": False})


@DBOS.workflow()
async def add(a: int, b: int = 2) -> int:
    return a + b


@DBOS.workflow()
async def write(pieces: int, interval_s: float) -> None:
    await asyncio.sleep(1)
    for _ in range(pieces):
        await DBOS.write_stream_async("text", f"{time.monotonic_ns()} ")
        await asyncio.sleep(interval_s)
    await DBOS.close_stream_async("text")


@app.post("/add")
async def run_add(a: int, b: int = 2) -> Any:
    return await add(a, b)


@app.post("/add/start", status_code=202)
async def start_add(a: int, b: int = 2) -> dict[str, str]:
    return {"id": (await DBOS.start_workflow_async(add, a, b)).workflow_id}


@app.get("/run/{workflow_id}")
async def status(workflow_id: str) -> dict[str, Any]:
    found = await DBOS.get_workflow_status_async(workflow_id)
    if found is None:
        raise fastapi.HTTPException(404)
    return {"status": found.status, "result": found.output}


@app.post("/write")
async def run_write(pieces: int, interval_s: float) -> StreamingResponse:
    workflow_id = (await DBOS.start_workflow_async(write, pieces, interval_s)).workflow_id

    async def events() -> AsyncIterator[str]:
        async for piece in DBOS.read_stream_async(workflow_id, "text"):
            yield f"data: {piece}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    DBOS.launch()
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False)

"""The same routes in the style of FastAPI's documentation: uvicorn bench.peers.with_fastapi:app"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

# These are not dependencies of this project.
import fastapi
import fastapi.responses
import pydantic

from bench.peers.shared import DESCRIPTIONS, tune_gc


class AddInputs(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    a: int
    b: int = 2


class NapInputs(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    seconds: float


class RunRequest(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    agent_name: str
    inputs: dict[str, Any] = {}
    async_run: bool = False
    timeout_s: Annotated[float, pydantic.Field(gt=0)] | None = None


class Step(pydantic.BaseModel):
    agent_name: str
    result: dict[str, Any]
    attempt: int = 1
    started_at: pydantic.AwareDatetime
    completed_at: pydantic.AwareDatetime
    usage: dict[str, int] | None = None
    model: str | None = None


class Run(pydantic.BaseModel):
    run_id: str
    agent_name: str
    status: str
    result: dict[str, Any] | None = None
    error: str | None = None
    error_type: str | None = None
    created_at: pydantic.AwareDatetime
    started_at: pydantic.AwareDatetime | None = None
    completed_at: pydantic.AwareDatetime | None = None
    request_id: str
    traceparent: str | None = None
    attempt: int = 1
    progress: dict[str, Any] | None = None
    usage: dict[str, int] | None = None
    steps: list[Step] = []


class AgentSummary(pydantic.BaseModel):
    name: str
    description: str


class AgentList(pydantic.BaseModel):
    agents: list[AgentSummary]


async def add(inputs: AddInputs) -> int:
    return inputs.a + inputs.b


async def nap(inputs: NapInputs) -> int:
    await asyncio.sleep(inputs.seconds)
    return time.monotonic_ns()


AGENTS: dict[str, tuple[type[pydantic.BaseModel], Callable[[Any], Awaitable[int]]]] = {
    "add": (AddInputs, add),
    "nap": (NapInputs, nap),
}
RUNS: dict[str, Run] = {}
TASKS: set[asyncio.Task[None]] = set()
app = fastapi.FastAPI()


@app.get("/agents")
async def list_agents() -> AgentList:
    return AgentList(agents=[AgentSummary(name=name, description=text) for name, text in DESCRIPTIONS.items()])


@app.post("/run/flock")
async def run_flock(
    request: RunRequest, response: fastapi.Response, x_request_id: Annotated[str | None, fastapi.Header()] = None
) -> Run:
    run = Run(
        run_id=str(uuid4()),
        agent_name=request.agent_name,
        status="starting",
        created_at=datetime.now(UTC),
        request_id=x_request_id or uuid4().hex,
    )
    try:
        model, function = AGENTS[request.agent_name]
        inputs = model.model_validate(request.inputs)
    except (KeyError, pydantic.ValidationError) as exc:
        raise fastapi.HTTPException(422, str(exc)) from exc
    response.headers["X-Request-ID"] = run.request_id
    if request.async_run:
        RUNS[run.run_id] = run
        response.status_code = 202
        response.headers["Location"] = f"/run/{run.run_id}"
        task = asyncio.create_task(execute(run, function, inputs))
        TASKS.add(task)
        task.add_done_callback(TASKS.discard)
        run = run.model_copy()  # as it is now
    else:
        await execute(run, function, inputs)
    response.headers["Flock-Run-Status"] = run.status
    return run


async def execute(run: Run, function: Callable[[Any], Awaitable[int]], inputs: Any) -> None:
    run.started_at = datetime.now(UTC)
    result = {"result": await function(inputs)}
    run.completed_at = datetime.now(UTC)
    run.status, run.result = "completed", result
    run.steps = [
        Step(agent_name=run.agent_name, result=result, started_at=run.started_at, completed_at=run.completed_at)
    ]


class WriteInputs(pydantic.BaseModel):
    pieces: int
    interval_s: float


@app.post("/write")
async def write(inputs: WriteInputs) -> fastapi.responses.StreamingResponse:
    async def pieces() -> AsyncIterator[str]:
        await asyncio.sleep(1)
        for _ in range(inputs.pieces):
            yield f"data: {time.monotonic_ns()} \n\n"
            await asyncio.sleep(inputs.interval_s)

    return fastapi.responses.StreamingResponse(pieces(), media_type="text/event-stream")


@app.get("/run/{run_id}")
async def get_run(run_id: str, response: fastapi.Response) -> Run:
    if run_id not in RUNS:
        raise fastapi.HTTPException(404)
    response.headers["Flock-Run-Status"] = RUNS[run_id].status
    return RUNS[run_id]


tune_gc()

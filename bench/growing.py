"""The agents of ``bench.growth``, and the watch over the event loop of their server."""

import asyncio
import gc
import sys
import time
from typing import Any

# uvloop does not let its callbacks be measured one by one.
sys.modules["uvloop"] = None  # type: ignore[assignment]

from bench.agents import add, nap  # noqa: E402
from bench.agents import flock as others  # noqa: E402
from flock.core import Flock  # noqa: E402
from flock.runs import RunContext  # noqa: E402

flock = Flock("bench")


class Holds:
    """The callbacks of the event loop, each as the CPU time of its thread, which other programs do not lengthen.

    Attributes:
        callback_s, where: of the longest callback, in which the loop did nothing else.
        turn_s: of the longest turn of the loop, with all callbacks that were ready together.
    """

    callback_s: float
    turn_s: float
    where: str

    def __init__(self) -> None:
        self._loop, self._collected_s = asyncio.get_running_loop(), 0.0
        self.reset()
        gc.callbacks.append(self._collect)
        run = asyncio.Handle._run

        def measured(handle: asyncio.Handle) -> None:
            began_s, self._collected_s = time.thread_time(), 0.0
            run(handle)
            used_s = time.thread_time() - began_s
            if used_s > self.callback_s:
                share = self._collected_s / used_s
                self.callback_s = used_s
                self.where = f"{name_of(handle)}, {share:.0%} of it the garbage collector"

        asyncio.Handle._run = measured  # type: ignore[assignment, method-assign]
        self._turn()

    def reset(self) -> None:
        self.callback_s = self.turn_s = 0.0
        self.where = ""
        self._turned_s = time.thread_time()

    def _collect(self, phase: str, info: object) -> None:
        self._collected_s += time.thread_time() if phase == "stop" else -time.thread_time()

    def _turn(self) -> None:
        used_s, self._turned_s = time.thread_time() - self._turned_s, time.thread_time()
        self.turn_s = max(self.turn_s, used_s)
        self._loop.call_later(0.002, self._turn)


def name_of(handle: asyncio.Handle) -> str:
    """Return the name of a callback, or of the coroutine of its task."""
    callback: Any = handle._callback  # type: ignore[attr-defined]
    owner: Any = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        name = str(getattr(owner.get_coro(), "__qualname__", ""))
        return (
            owner.get_name() if name == "TaskHandle._run_coro" else name
        )  # anyio's tasks have the name of their function
    return str(getattr(callback, "__qualname__", callback))


HOLDS: list[Holds] = []


@flock.agent
async def held() -> tuple[float, float, str]:
    """Return the longest callback and turn since the last request, in ms, and where. The first one starts the watch."""
    if not HOLDS:
        HOLDS.append(Holds())
    found = HOLDS[0].callback_s * 1e3, HOLDS[0].turn_s * 1e3, HOLDS[0].where
    HOLDS[0].reset()
    return found


flock.add_agent(add)
flock.add_agent(nap)
flock.add_agent(others.agents["review"])


@flock.agent
async def write(pieces: int, interval_s: float, context: RunContext, bytes_each: int = 15) -> str:
    """Write pieces of text, each of which begins with the time at which it was written."""
    await asyncio.sleep(1)
    for _ in range(pieces):
        context.emit(f"{time.monotonic_ns()} ".ljust(bytes_each, "."))
        await asyncio.sleep(interval_s)
    return "done"


@flock.agent
async def wait(context: RunContext) -> bool:
    return await context.receive("go", bool)


async def one(n: int) -> int:
    return n


@flock.agent
async def call(calls: int, context: RunContext) -> int:
    for n in range(calls):
        await context.call(one, n)
    return calls


@flock.agent
async def gather(calls: int, context: RunContext) -> int:
    """Make all calls at once."""
    return len(await asyncio.gather(*(context.call(one, n) for n in range(calls))))


@flock.agent
async def echo(text: str) -> str:
    return text


@flock.agent
async def make(size: int) -> str:
    return "x" * size

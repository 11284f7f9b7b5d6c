"""The agents that are measured. ``flockapi serve`` loads this file, and the other servers run the same functions."""

import asyncio
import os
import sys
import time

from flock.core import Flock, FlockFactory
from flock.runs import RunContext

if os.environ.get("BENCH_CLIENT") == "httpx":
    sys.modules["httpx2"] = None  # type: ignore[assignment]  # as if it is not installed

flock = Flock("bench")


@flock.agent
async def add(a: int, b: int = 2) -> int:
    return a + b


@flock.agent
async def nap(seconds: float) -> int:
    """Sleep, then return the time, so that a client on the same machine knows how old the result is."""
    await asyncio.sleep(seconds)
    return time.monotonic_ns()


@flock.agent
async def repeat(text: str) -> str:
    return text


@flock.agent
async def ask(question: str, context: RunContext) -> bool:
    return await context.ask(question, bool)


@flock.agent
async def write(pieces: int, interval_s: float, context: RunContext) -> str:
    """Write pieces of text, each of which is the time at which it was written."""
    text = ""
    await asyncio.sleep(1)  # so that all readers are there
    for _ in range(pieces):
        piece = f"{time.monotonic_ns()} "
        context.emit(piece)
        text += piece
        await asyncio.sleep(interval_s)
    return text


flock.add_agent(
    FlockFactory.create_default_agent("judge", input="text: str", output="is_good: bool", model="openai/fake")
)
flock.add_agent(
    FlockFactory.create_default_agent(
        "review", input="text: str", output="summary: str, is_good: bool", model="openai/fake"
    )
)

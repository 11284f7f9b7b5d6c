"""The agents of the scenarios. Each side effect is a line in the file PROOF_LOG, so that it is known after a kill."""

import asyncio
import os
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import TypedDict

from flock.agents.tools import Tool
from flock.core import File, Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import RunContext

_LOG = os.open(os.environ.get("PROOF_LOG", os.devnull), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)

#: The provider of the scenarios does not have the first model.
flock = Flock("proof", model=["openai/gone", "openai/gpt-4o"])


def note(what: str, run_id: str, name: str) -> None:
    os.write(_LOG, f"{time.time()} {what} {run_id} {name}\n".encode())


async def effect(run_id: str, name: str, fails: bool = False, seconds: float = 0.01) -> str:
    note("begin", run_id, name)
    await asyncio.sleep(seconds)
    note("end", run_id, name)
    if fails:
        raise TimeoutError(name)
    return name


async def do(context: RunContext, name: str, fails: bool = False, seconds: float = 0.01) -> str:
    """Have a side effect as a call, and note that the program has seen its end, unless a retry executes it again."""
    try:
        found: str = await context.call(effect, context.run_id, name, fails, seconds)
        return found
    finally:
        if not isinstance(sys.exception(), (MemoryError, asyncio.CancelledError)):
            note("seen", context.run_id, name)


class Word(TypedDict):
    word: str


@flock.agent
def plain(word: str, context: RunContext) -> Word:
    """A step without calls, in a thread."""
    note("begin", context.run_id, "plain")
    note("end", context.run_id, "plain")
    return {"word": word}


@flock.agent
def weigh(letter: File) -> int:
    return len(letter.read())


@flock.agent(next_agent="second")
async def first(word: str, context: RunContext) -> Word:
    await do(context, "first")
    return {"word": word + "1"}


@flock.agent
async def second(word: str, context: RunContext) -> str:
    return word + await do(context, "second")


@flock.agent
async def workflow(context: RunContext) -> str:
    async def nested(word: str) -> str:
        return str((await context.run_agent("second", {"word": word}))["result"])

    found = await asyncio.gather(*(do(context, f"part{n}") for n in range(3)), nested("a"))
    return " ".join([*found, await do(context, "last")])


@flock.agent
async def payment(context: RunContext) -> str:
    try:
        await do(context, "charge", True)
    except TimeoutError:
        was_charged = await context.ask("Was it charged?", bool)
        await do(context, "note")
        return f"charged: {was_charged}"
    return "charged"


@flock.agent
async def reminder(context: RunContext) -> str:
    await do(context, "begin")
    await context.sleep(5.1)  # a shorter sleep is executed in place
    await do(context, "remind")
    return f"paid {await context.receive('payment', int)}"


@flock.agent
async def write(topic: str, context: RunContext) -> AsyncIterator[str]:
    for number, word in enumerate(("All ", "about ", topic, ".")):
        await do(context, f"piece{number}")
        yield word


@flock.agent
async def endless(context: RunContext) -> str:
    while True:
        await effect(context.run_id, "turn")


@flock.agent(max_concurrency=1)
async def mended(word: str, context: RunContext) -> str:
    """Fail in the first attempt, unless its process dies: then the next one begins."""
    await do(context, "before")
    if context.attempt == 1:
        raise AgentError("It is broken.")
    return word


_MET = defaultdict[str, set[str]](set)


@flock.agent
async def meet(place: str, number: int, context: RunContext) -> int:
    """Return the process when *number* runs of it are executed there at the same time in a place."""
    _MET[place].add(context.run_id)
    while len(_MET[place]) < number:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    return os.getpid()


async def refund(euros: int, context: RunContext) -> str:
    """Pay money back."""
    note("begin", context.run_id, "refund")
    note("end", context.run_id, "refund")
    return f"paid {euros}"


flock.add_agent(
    FlockFactory.create_default_agent("clerk", input="mail", output="reply", tools=[Tool(refund, needs_approval=True)])
)
flock.add_agent(FlockFactory.create_default_agent("chat", input="message", output="reply", history=5))
flock.add_agent(FlockFactory.create_default_agent("rate", input="text", output="stars: int"))

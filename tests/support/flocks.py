"""Sample flocks: an agent of each kind, agents that wait, and agents for batches."""

import dataclasses
import threading
from typing import Any, TypedDict

import anyio.abc

from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import RunContext


class Summary(TypedDict):
    words: int
    shout: str


@dataclasses.dataclass
class Approval:
    approved: bool
    reason: str = ""


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

    @flock.agent
    async def approve(text: str, context: RunContext) -> str:
        approval = await context.ask(f"Send {text}?", Approval)
        return "sent" if approval.approved else f"kept: {approval.reason}"

    return flock


class Gate:
    """A flock whose agents set an event when they start, and wait for another one before they continue."""

    def __init__(self) -> None:
        self.started, self.may_go = anyio.Event(), anyio.Event()
        self.thread_begun, self.thread_may_go = threading.Event(), threading.Event()
        self.fails, self.calls = True, []
        self.flock = flock = Flock("gate")

        @flock.agent
        async def nap() -> int:
            self.started.set()
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
            self.started.set()
            try:
                await anyio.sleep_forever()
            finally:
                return 5  # noqa: B012 - as a careless agent swallows its cancellation

        @flock.agent
        async def report(context: RunContext) -> int:
            context.progress(1, 3, "first")
            context.progress(2, 3, "second")
            self.started.set()
            await self.may_go.wait()
            return 3

    calls: list[str]
    context: RunContext


class Work:
    """A flock whose agents record their calls, and fail or wait when a test wants that."""

    def __init__(self, name: str = "work") -> None:
        self.flock, self.calls, self.fails = Flock(name), list[int](), set[int]()
        self.holds, self.may_go, self.started = False, anyio.Event(), anyio.Event()

        @self.flock.agent
        async def item(n: int) -> int:
            self.calls.append(n)
            if self.holds:
                self.started.set()
                await self.may_go.wait()
            if n in self.fails:
                raise AgentError(f"no {n}")
            return n

        @self.flock.agent
        async def long(n: int, text: str) -> int:
            """Like ``item``, with inputs that take many database pages."""
            self.calls.append(n)
            if self.holds:
                self.started.set()
                await self.may_go.wait()
            return n


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


#: A program with an agent whose tools write to *log*. The first call of ``hang`` does not end.
CALLING_TOOLS = """
import asyncio, os
from flock.core import Flock, FlockFactory

flock = Flock({name!r}, model="ollama/some")
log = os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY)

async def note(word: str) -> int:
    os.write(log, word.encode() + b"\\n")
    if word == "fail":
        raise ValueError
    return len(word)

async def hang() -> str:
    await note("hang")
    if open({log!r}).read().split().count("hang") == 1:
        await asyncio.sleep(600)
    return "ended"

flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a: str", tools=[note, hang]))
"""

"""The agents that ``tests/test_mcp_clients.py`` serves to real clients. The conformance suite asks for some by name."""

from collections.abc import AsyncIterator
from dataclasses import dataclass

import anyio

from flock.core import Flock, Image
from flock.errors import AgentError
from flock.runs import RunContext

flock = Flock("clients")


@dataclass
class Approval:
    approved: bool
    reason: str = ""


@dataclass
class Confirmation:
    ok: bool


@dataclass
class Name:
    name: str


@dataclass
class Colour:
    color: str


@flock.agent
def add(a: int, b: int = 2) -> int:
    """Adds two numbers."""
    return a + b


@flock.agent
def look(photo: Image) -> str:
    """Says what a photo is."""
    return f"{photo.media_type} {photo.name} {photo.size}"


@flock.agent
async def write(topic: str) -> AsyncIterator[str]:
    """Writes about a topic."""
    yield "All about "
    yield topic


@flock.agent
async def approve(text: str, context: RunContext) -> str:
    """Sends a text, if a person allows it."""
    approval = await context.ask(f"Send {text}?", Approval)
    return "sent" if approval.approved else f"kept: {approval.reason}"


@flock.agent
async def nap() -> str:
    """Sleeps until it is cancelled."""
    await anyio.sleep_forever()
    return "woken"


@flock.agent
def long(length: int) -> str:
    """Returns a long text."""
    return "x" * length


# Those of the conformance suite


@flock.agent
def test_simple_text() -> str:
    """Returns a text."""
    return "This is a simple text response for testing."


@flock.agent
def test_error_handling() -> str:
    """Fails."""
    raise AgentError("This tool intentionally returns an error for testing")


@flock.agent
async def test_tool_with_progress(context: RunContext) -> str:
    """Reports its progress."""
    for done in (0, 50, 100):
        context.progress(done, 100, f"{done} of 100")
        await anyio.sleep(0.4)
    return "done"


@flock.agent
async def test_streaming_elicitation(context: RunContext) -> str:
    """Asks a question while it is streamed."""
    return await context.ask("What is your name?", str)


@flock.agent
async def test_input_required_result_elicitation(context: RunContext) -> str:
    """Asks for a name."""
    return f"Hello, {(await context.ask('What is your name?', Name)).name}!"


@flock.agent
async def test_input_required_result_request_state(context: RunContext) -> str:
    """Asks for a confirmation."""
    return "state-ok" if (await context.ask("Please confirm", Confirmation)).ok else "no"


@flock.agent
async def test_input_required_result_tampered_state(context: RunContext) -> str:
    """Asks for a confirmation."""
    return "state-ok" if (await context.ask("Please confirm", Confirmation)).ok else "no"


@flock.agent
async def test_input_required_result_multi_round(context: RunContext) -> str:
    """Asks for a name, and then for a colour."""
    name = (await context.ask("What is your name?", Name)).name
    return f"{name} likes {(await context.ask('What is your favorite color?', Colour)).color}."

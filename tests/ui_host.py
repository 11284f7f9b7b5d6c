"""A server for the tests of the web page, and for its screenshots: agents of every kind, and a fake model.

python -m tests.ui_host FOLDER [--port PORT] [--prefix PREFIX] [--key KEY]

FOLDER holds the store. Some agents wait or fail until a file with a certain name exists in it, so that a test controls
when they continue.
"""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import anyio
import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import RunContext
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from flockapi import create_app


class Address(TypedDict):
    street: str
    number: int
    zip: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}$")]


class Total(TypedDict):
    total: int
    note: str


class Approval(TypedDict):
    approved: bool
    reason: NotRequired[Annotated[str, msgspec.Meta(pattern="^[a-z ]*$")]]


def ui_flock(folder: Path) -> Flock:
    flock = Flock("ui", model="openai/gpt-4o")
    flock.add_agent(
        FlockFactory.create_default_agent(
            name="text_analyzer",
            description="Finds the sentiment and the keywords of a text.",
            input="text: str | what to analyse",
            output="sentiment: Literal['positive', 'negative', 'neutral'] | how it sounds, keywords: list[str]",
        )
    )
    flock.add_agent(
        FlockFactory.create_default_agent(
            name="order",
            description="Takes an order, and checks whether it can be delivered.",
            input=(
                "item: str | what is ordered, amount: int | at least one, size: Literal['small', 'large'], "
                "gift: bool, due: date, address: Address | where it goes, notes: list[str], code: UUID"
            ),
            output="sentiment: str, keywords: list[str]",
            types={"Address": Address},
        )
    )

    async def until(name: str) -> None:
        while not (folder / name).exists():  # noqa: ASYNC110 - another process makes it
            await anyio.sleep(0.02)

    @flock.agent(next_agent="translate")
    async def research(topic: str, context: RunContext, gate: str = "", pages: int = 3) -> str:
        """Researches a topic, page by page."""
        for page in range(pages):
            context.progress(page, pages, "pages")
            if page == 1 and gate:
                await until(gate)
        return f"All about {topic}."

    @flock.agent(next_agent=lambda result: None)
    async def translate(result: str, gate: str = "") -> str:
        """Rephrases the result."""
        if gate:
            await until(f"{gate}-2")
        return f"In other words: {result}"

    @flock.agent
    async def deliver(parcel: str, gate: str) -> str:
        """Fails until its gate is open."""
        if not (folder / gate).exists():
            raise AgentError(f"Nobody opened the door for <b>{parcel}</b>.")
        return f"{parcel} is delivered."

    @flock.agent
    def quote(size: Literal["script", "long"] = "script") -> dict[str, Any]:
        """Returns scripts that a careless page would run."""
        if size == "long":
            return {"text": "word " * 2000, "numbers": list(range(500)), "big": 2**60}
        script = "<script>document.title = 'pwned'</script>"
        return {script: "<img src=x onerror=\"document.title = 'pwned'\">", "list": [{"<b>a</b>": script}]}

    @flock.agent
    def defaults(
        name: str,
        times: int = 2,
        when: date | None = None,
        loud: bool = True,
        tags: list[str] = [],  # noqa: B006 - it is not changed
        more: Any = None,
    ) -> dict[str, Any]:
        """Returns its inputs."""
        return {"name": name, "times": times, "when": when, "loud": loud, "tags": tags, "more": more}

    @flock.agent(next_agent="grade")
    async def taste(sample: str) -> str:
        """Tastes a sample. Fails if there is none."""
        if sample == "none":
            raise AgentError("There is nothing to taste.")
        return f"{sample} is sweet."

    branches = {"billing": "translate", "again": "sort", "<b>other</b>": None}

    @flock.agent(output="result: str, category: Literal['billing', 'again', '<b>other</b>']", next_agent=branches)
    async def sort(mail: str) -> dict[str, str]:
        """Sorts a mail."""
        return {"result": mail, "category": "<b>other</b>"}

    @flock.agent
    async def grade(result: str) -> Total:
        """Grades a tasted sample."""
        return {"total": len(result), "note": result}

    @flock.agent
    def book(
        seat: Annotated[int, msgspec.Meta(ge=1)],
        price: float,
        at: datetime | None = None,
        opens: time | None = None,
        lasts: timedelta | None = None,
    ) -> dict[str, Any]:
        """Books a seat and returns its inputs."""
        return {"seat": seat, "price": price, "at": at, "opens": opens, "lasts": lasts}

    @flock.agent
    async def refund(order: str, context: RunContext) -> dict[str, Any]:
        """Asks two people."""
        amount, approval = await asyncio.gather(
            context.ask("How much?", Annotated[int, msgspec.Meta(le=100)]),
            context.ask(f"Refund <b>{order}</b>?", Approval, expires_s=86_400),
        )
        return {"amount": amount, "approved": approval["approved"], "reason": approval.get("reason")}

    @flock.agent
    async def errand(order: str, context: RunContext, gate: str) -> dict[str, Any]:
        """Lets another agent ask two people."""
        await until(gate)
        return await context.run_agent("refund", {"order": order})

    def pay_back(amount: float, order: str = "A7") -> str:
        """Pay money back."""
        return f"paid {amount:g} for {order}"

    flock.add_agent(
        FlockFactory.create_default_agent(
            name="cashier",
            description="Pays money back, if a person allows it.",
            input="complaint: str",
            output="sentiment: str, keywords: list[str]",
            tools=[Tool(pay_back, needs_approval=True)],
        )
    )

    flock.add_agent(
        FlockFactory.create_default_agent(
            name="chat",
            description="Talks about anything, and pays money back if a person allows it.",
            input="message: str",
            output="reply: str",
            history=20,
            tools=[Tool(pay_back, needs_approval=True)],
        )
    )
    flock.add_agent(
        FlockFactory.create_default_agent(
            name="talk",
            description="Sees the whole conversation in each request.",
            input="messages: Messages, tone: Literal['short', 'polite'] | None | how it sounds",
            output="reply: str",
        )
    )

    def fare(place: str) -> int:
        return len(place)

    async def museum(place: str) -> str:
        raise AgentError(f"The museum of {place} is <b>closed</b>.")

    @flock.agent
    async def hotel(place: str, context: RunContext) -> int:
        """Counts the nights."""
        nights: int = await context.call(fare, place)
        return nights

    @flock.agent
    async def trip(place: str, context: RunContext, gate: str = "") -> str:
        """Plans a trip, with calls of functions and of an agent."""
        await context.call(fare, place)
        await context.run_agent("hotel", {"place": place})
        with contextlib.suppress(AgentError):
            await context.call(museum, place)
        if gate:
            await until(gate)
        return f"To {place}!"

    @flock.agent(max_concurrency=50)
    async def count_up(n: int, comment: str, step: int = 1, gate: str = "") -> Total:
        """Adds a step to a number. Fails for some numbers until the gate "mend" is open."""
        if gate and n >= 50:
            await until(gate)
        if n % 10 == 7 and not (folder / "mend").exists():
            raise AgentError(f"{n} is not a number that I like.")
        return {"total": n + step, "note": comment.upper()}

    return flock


def reply(request: ModelRequest) -> Reply:
    """Return the answer of the fake model, which is always the same. If there is a tool, it calls it once before."""
    if request.tool_names and request["messages"][-1]["role"] != "tool":
        return Reply(calls=[("pay_back", {"amount": 40})])
    return Reply({"sentiment": "positive", "keywords": ["coffee", "fast"]})


class Gated(httpx.AsyncByteStream):
    """A streamed answer whose second half comes when a file exists."""

    def __init__(self, halves: tuple[str, str], gate: Path) -> None:
        self._halves, self._gate = halves, gate

    async def __aiter__(self) -> AsyncIterator[bytes]:
        text = json.dumps({"reply": "".join(self._halves)})
        middle = text.index(self._halves[1])
        for piece in (text[:middle], text[middle:]):
            delta = {"content": piece}
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n".encode()
            while not self._gate.exists():  # noqa: ASYNC110 - another process makes it
                await anyio.sleep(0.02)
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        usage = {"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 5}}
        yield f"data: {json.dumps(end)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode()


def chat_reply(folder: Path) -> Callable[[ModelRequest], Any]:
    """Return the replies to chats. The user decides what happens: "slow GATE", "fail GATE", "pay"."""

    def reply_to(request: ModelRequest) -> Any:
        said = [message["content"] for message in request["messages"] if message["role"] == "user"]
        is_text = request.agent_name == "chat"
        text = json.JSONDecoder().raw_decode(said[-1])[0]["message"] if is_text else said[-1]
        word, _, gate = text.partition(" ")
        if word == "slow":
            stream = Gated(("Once upon ", "a time."), folder / gate)
            return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=stream)
        if word == "fail" and not (folder / gate).exists():
            return Failure(400, "bad_request")
        if word == "pay" and request["messages"][-1]["role"] != "tool":
            return Reply(calls=[("pay_back", {"amount": 40})])
        return Reply({"reply": f"Message {len(said)} was: {text}"})

    return reply_to


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--key")
    options = parser.parse_args()
    flock = ui_flock(options.folder)
    chatting = chat_reply(options.folder)
    transport = FakeModel(
        lambda request: (chatting if request.agent_name in ("chat", "talk") else reply)(request)
    ).transport
    app = create_app(
        flock,
        server_name="Sample agents",
        create_ui=True,
        engine=flock.engine(store=options.folder / "flock.db", transport=transport, durability="process"),
        api_keys=options.key and {"ann": options.key},
        metrics=False,
        protocols=["openai"],
    )
    host = app
    if options.prefix:
        host = Starlette(routes=[Mount(options.prefix, app)], lifespan=lambda _: app.lifespan())  # type: ignore[assignment]
    uvicorn.run(host, port=options.port, log_level="info", timeout_graceful_shutdown=1)


if __name__ == "__main__":
    main()

"""Text appears as the agents write it: over real connections, after crashes, and with several processes."""

import contextlib
import json
import math
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock import fair
from flock.core import Flock, FlockFactory, Result
from flock.engine.embedded import EmbeddedEngine
from flock.errors import DefinitionError, InvalidData, SignatureError
from flock.runs import MAX_SHOWN_BYTES, BatchOptions, Event, Run, RunContext, new_id, shown_usage
from flock.steps import live
from flock.store.queries import CALLS_PER_PAGE
from flock.testing import FakeModel, Reply
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.engines import counting_turns, sqlite_of, until
from tests.support.http import check_problem
from tests.support.servers import Served, Server, flockapi_command, running

pytestmark = pytest.mark.anyio

#: Two halves of a character, and others that are alone.
HALVES, WHOLE = ("\ud83d", "\ude00", "\ude00x", "\ud83d", "y", "\ud83d"), "\U0001f600?x?y?"
STREAM = {"Accept": "text/event-stream"}


class Article(TypedDict):
    text: str
    words: list[str]


class Writer:
    """A flock whose agents write one piece for each release of ``may_go``."""

    def __init__(self) -> None:
        self.may_go = anyio.Semaphore(0)
        self.started, self.ended = anyio.Event(), anyio.Event()
        self.was_watched: list[bool] = []
        self.flock = flock = Flock("writer")

        @flock.agent
        async def write(count: int, context: RunContext) -> str:
            self.started.set()
            self.was_watched.append(context.is_watched)
            try:
                for number in range(count):
                    await self.may_go.acquire()
                    context.emit(f"{number} ")
            finally:
                self.ended.set()
            return "".join(f"{number} " for number in range(count))

        @flock.agent(next_agent="shorten")
        async def draft(topic: str) -> AsyncIterator[str]:
            for word in (" about", " ", topic):
                yield word
                await self.may_go.acquire()

        @flock.agent
        def shorten(result: str) -> Iterator[str]:
            yield from result.split(" ")

        @flock.agent
        async def article(topic: str) -> AsyncGenerator[str | Article, None]:
            for word in ("on ", topic):
                yield word
            yield Article(text=f"on {topic}", words=["on", topic])

        @flock.agent
        async def yields_halves() -> AsyncIterator[str]:
            for half in HALVES:
                yield half

        @flock.agent
        async def emits_halves(context: RunContext) -> str:
            for half in HALVES:
                context.emit_reasoning(half)
                context.emit(half)
                await self.may_go.acquire()
            return WHOLE

        @flock.agent
        async def strip(topic: str, context: RunContext) -> str:
            context.emit(f"  {topic}")
            await self.may_go.acquire()
            return topic

        @flock.agent
        async def caller(context: RunContext) -> str:
            found = await context.run_agent("strip", {"topic": "tea"})
            await context.call(long_value)
            with contextlib.suppress(ValueError):
                await context.call(fail, 1)
            context.emit(found["result"])
            return str(found["result"])

        @flock.agent
        async def asks(context: RunContext) -> str:
            context.emit("The answer is ")
            answer = await context.ask("What is it?", str)
            context.emit(answer)
            return f"The answer is {answer}"

        @flock.agent
        async def many(count: int, context: RunContext) -> int:
            for number in range(count):
                await context.call(double, number)
            return count


async def long_value() -> str:
    return "x" * MAX_SHOWN_BYTES


async def double(number: int) -> int:
    return 2 * number


async def fail(number: int) -> int:
    raise ValueError(number)


@pytest.fixture
def writer() -> Writer:
    return Writer()


@pytest.fixture
async def served(writer: Writer) -> AsyncIterator[Served]:
    app = create_app(writer.flock, store="flock.db", auth="host", max_event_streams=5)
    async with Served(app) as made:
        yield made


@pytest.fixture
async def client(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as made:
        yield made


class Page:
    """What a page shows: the output of each position, by the rules of the documentation."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.last_id, self.position = 0, -1
        self.outputs: dict[tuple[int, str], dict[str, Any]] = {}

    def on(self, name: str, id_: str | None, data: dict[str, Any]) -> None:
        self.names.append(name)
        self.events.append(data)
        self.last_id = self.last_id if id_ is None else int(id_)
        if name == "step.started":
            self.position = data["position"]
        output = self.outputs.setdefault((data.get("position", self.position), data.get("call_id", "")), {})
        if name == "output.delta":
            output[data["field"]] = output.get(data["field"], "") + data["text"]
        elif name == "output.value":
            output[data["field"]] = data["value"]
        elif name in ("output.reset", "output.snapshot"):
            output.clear()
            output |= data.get("output", {})
        elif name == "step.completed":
            assert not output or output == data["result"], "the text is the result when the step ends"

    def of(self, name: str) -> list[dict[str, Any]]:
        return [event for event, sent in zip(self.events, self.names, strict=True) if sent == name]

    def text(self, position: int) -> str | None:
        """What is shown of the output of a step that returns a string."""
        return self.outputs.get((position, ""), {}).get("result")

    @property
    def steps(self) -> list[str]:
        """The events without repetitions."""
        return [name for name, before in zip(self.names, [None, *self.names], strict=False) if name != before]


async def events_from(response: httpx.Response, page: Page) -> AsyncIterator[str]:
    """Put the events of a stream on *page*, and yield their names."""
    fields: dict[str, str] = {}
    page.position = -1  # a stream says it anew
    async for line in response.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            page.on(fields["event"], fields.get("id"), json.loads(fields["data"]))
            yield fields["event"]
            fields = {}


async def read_all(response: httpx.Response, page: Page | None = None) -> Page:
    page = page or Page()
    async for _ in events_from(response, page):
        pass
    return page


def start(client: httpx.AsyncClient, agent_name: str, headers: Any = (), **inputs: Any) -> Any:
    """Start a run as a stream."""
    body = {"agent_name": agent_name, "inputs": inputs}
    return client.stream("POST", "/run/flock", json=body, headers={**STREAM, **dict(headers)})


# POST /run/flock as a stream


async def test_each_piece_arrives_when_it_is_written(client: httpx.AsyncClient, writer: Writer) -> None:
    async with start(client, "write", count=3) as response:
        assert (response.status_code, response.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        page = Page()
        writer.may_go.release()
        async for name in events_from(response, page):
            if name == "output.delta":  # the next piece is written only after this one has arrived
                writer.may_go.release()
    assert [delta["text"] for delta in page.of("output.delta")] == ["0 ", "1 ", "2 "]
    assert page.steps == [
        *("run.accepted", "run.started", "step.started", "output.delta", "step.completed", "run.completed")
    ]
    assert page.outputs[0, ""] == page.events[-1]["result"] == {"result": "0 1 2 "}
    assert response.headers["Location"] == f"/run/{page.events[0]['run_id']}"
    assert writer.was_watched == [True], "it is watched before the agent starts"


async def test_a_piece_takes_60_bytes_beside_its_text(client: httpx.AsyncClient, writer: Writer) -> None:
    async with start(client, "write", count=3) as response:
        sent = b""
        writer.may_go.release()
        async for received in response.aiter_bytes():
            if b"output.delta" in received:  # the next piece is written only after this one has arrived
                writer.may_go.release()
            sent += received
    pieces = [event for event in sent.split(b"\n\n") if b"output.delta" in event]
    assert len(pieces) == 3
    for number, piece in enumerate(pieces):
        assert f'"{number} "'.encode() in piece
        assert len(piece + b"\n\n") - len(f"{number} ") <= 60


async def test_generators_stream_and_hand_off(client: httpx.AsyncClient, writer: Writer) -> None:
    for _ in range(3):
        writer.may_go.release()
    async with start(client, "draft", topic="tea") as response:
        page = await read_all(response)
    assert (page.outputs[0, ""], page.outputs[1, ""]) == ({"result": " about tea"}, {"result": "abouttea"})
    async with start(client, "article", topic="tea") as response:
        page = await read_all(response)
    assert page.events[-1]["result"] == page.outputs[0, ""] == {"text": "on tea", "words": ["on", "tea"]}


@pytest.mark.parametrize("agent_name", ["yields_halves", "emits_halves"])
async def test_halves_of_characters_are_joined_or_replaced(
    agent_name: str, client: httpx.AsyncClient, writer: Writer
) -> None:
    for _ in HALVES:
        writer.may_go.release()
    body = {"agent_name": agent_name, "inputs": {}}
    async with client.stream("POST", "/run/flock?reasoning=true", json=body, headers=STREAM) as response:
        page = await read_all(response)
    if agent_name == "emits_halves":
        assert "".join(delta["text"] for delta in page.of("reasoning.delta")) == WHOLE[:-1]
    assert page.names[-1] == "run.completed"
    assert page.names.count("output.reset") == 0
    assert page.outputs[0, ""] == page.events[-1]["result"] == {"result": WHOLE}


async def test_a_result_that_differs_from_the_text_replaces_it(client: httpx.AsyncClient, writer: Writer) -> None:
    async with start(client, "strip", topic="tea") as response:
        page = Page()
        async for name in events_from(response, page):
            if name == "output.delta":
                writer.may_go.release()
    assert [delta["text"] for delta in page.of("output.delta")] == ["  tea", "tea"]
    assert page.names.count("output.reset") == 1
    assert page.outputs[0, ""] == {"result": "tea"}


async def test_calls_are_events_and_called_agents_write_below_them(client: httpx.AsyncClient, writer: Writer) -> None:
    writer.may_go.release()
    async with start(client, "caller") as response:
        page = await read_all(response)
    started, completed = page.of("call.started"), page.of("call.completed")
    assert [call["name"] for call in started] == [call["name"] for call in completed] == ["strip", "long_value", "fail"]
    assert (started[0]["kind"], started[0]["arguments"]) == ("agent", {"topic": "tea"})
    agent, long, failed = completed
    assert agent["result"] == {"result": "tea"}
    assert "result" not in long, "long values are left out"
    assert (failed["result"], failed["error_type"]) == (None, "agent_exception")
    deltas = [delta for delta in page.of("output.delta") if "call_id" in delta]
    assert {delta["call_id"] for delta in deltas} == {started[0]["call_id"]}
    assert page.outputs[0, ""] == {"result": "tea"}
    run_id, ids = page.events[0]["run_id"], page.last_id
    again = await read_all(await client.get(f"/run/{run_id}/events"))
    assert again.of("call.completed") == completed
    assert again.last_id == ids
    assert "output.delta" not in again.names, "live events are not stored"
    rest = await read_all(await client.get(f"/run/{run_id}/events?after=1000000000003"))
    assert rest.of("call.completed") == completed[2:]


async def test_who_comes_after_the_start_of_an_asynchronous_run_gets_its_text(
    client: httpx.AsyncClient, writer: Writer
) -> None:
    body = {"agent_name": "write", "inputs": {"count": 2}, "async_run": True}
    run_id = (await client.post("/run/flock", json=body)).json()["run_id"]
    writer.may_go.release()
    await writer.started.wait()
    await until(lambda: writer.may_go.value == 0)
    page = Page()
    async with client.stream("GET", f"/run/{run_id}/events") as response:
        async for _ in events_from(response, page):
            if page.text(0) == "0 ":
                writer.may_go.release()
    assert [event["output"] for event in page.of("output.snapshot")] == [{"result": "0 "}]
    assert [event["text"] for event in page.of("output.delta")] == ["1 "]
    assert page.outputs[0, ""] == {"result": "0 1 "}
    assert writer.was_watched == [True]


@pytest.mark.parametrize("count", [1, 100_000], ids=["in one piece", "in pieces of the store"])
async def test_an_event_is_whole_for_clients_that_end_lines_at_more_characters(count: int) -> None:
    """``events_from`` is such a client, since it uses the lines of httpx."""
    flock, text = Flock("lines"), "a\u2028b\x85c\u2029d\u0080" * count

    @flock.agent
    async def write(context: RunContext) -> str:
        context.emit(text)
        return text

    app = create_app(flock, store="lines.db", auth="host")
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
        async with start(client, "write") as response:
            page = await read_all(response)
        assert page.text(0) == text
        assert page.events[-1]["result"] == {"result": text}
        again = Page()
        async with client.stream("GET", f"/run/{page.events[0]['run_id']}/events") as response:
            await read_all(response, again)
        assert again.events[-1]["result"] == {"result": text}


async def test_a_choice_of_a_model_is_streamed_as_a_value() -> None:
    flock = Flock("mails", model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("sort", "", None, "mail", "to: Literal['x', 'y'], on: date"))
    result = {"to": "y", "on": "2026-11-26"}
    with FakeModel([result]):
        async with Served(create_app(flock, store=":memory:", auth="host")) as served:
            async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
                async with start(client, "sort", mail="Hello") as response:
                    page = await read_all(response)
    assert page.names[-1] == "run.completed"
    assert page.outputs[0, ""] == result
    assert [event["field"] for event in page.of("output.value")] == ["to", "on"]


async def test_a_client_that_was_away_during_a_retry_does_not_keep_the_text_of_the_failed_attempt() -> None:
    flock = Flock("mails", model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("reply", input="mail", output="text"))
    with FakeModel([Reply('{"text": "We a', finish_reason="length"), {"text": "Sorry."}]):
        async with Served(create_app(flock, store=":memory:", auth="host")) as served:
            async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
                async with start(client, "reply", mail="Hello") as response:
                    page = await read_all(response)
                assert (page.names[-1], page.outputs[0, ""]) == ("run.failed", {"text": "We a"})
                path = response.headers["Location"]
                await client.post(f"{path}/retry")
                await client.get(path, params={"wait": PATIENCE_S})
                headers = {"Last-Event-ID": str(page.last_id)}
                page = await read_all(await client.get(f"{path}/events", headers=headers), page)
    assert (page.names[-1], page.outputs[0, ""]) == ("run.completed", {"text": "Sorry."})


async def test_a_client_that_was_away_at_the_end_of_a_called_agent_gets_its_output(
    client: httpx.AsyncClient, writer: Writer
) -> None:
    body, page = {"agent_name": "caller", "inputs": {}, "async_run": True}, Page()
    path = (await client.post("/run/flock", json=body)).headers["Location"]
    async with client.stream("GET", f"{path}/events") as response:
        async for _ in events_from(response, page):
            if page.outputs and list(page.outputs.values())[-1] == {"result": "  tea"}:
                break
    writer.may_go.release()
    await client.get(path, params={"wait": PATIENCE_S})
    headers = {"Last-Event-ID": str(page.last_id)}
    page = await read_all(await client.get(f"{path}/events", headers=headers), page)
    called = {call["call_id"]: call["result"] for call in page.of("call.completed") if call["kind"] == "agent"}
    assert list(called.values()) == [{"result": "tea"}]
    assert {call_id: page.outputs[0, call_id] for call_id in called} == called


async def test_a_stream_ends_when_the_run_waits_for_a_person(client: httpx.AsyncClient) -> None:
    async with start(client, "asks") as response:
        page = await read_all(response)
    assert page.names[-1] == "run.waiting"
    assert page.outputs[0, ""] == {"result": "The answer is "}
    run_id, (question,) = page.events[0]["run_id"], page.events[-1]["waiting_for"]
    headers = {"Last-Event-ID": str(page.last_id)}
    async with client.stream("GET", f"/run/{run_id}/events", headers=headers) as response:
        answered = await client.post(f"/run/{run_id}/calls/{question['call_id']}", json={"output": "42"})
        assert answered.status_code == 200
        await read_all(response, page)
    assert page.outputs[0, ""] == {"result": "The answer is 42"}
    assert page.names[-1] == "run.completed"
    assert page.of("call.completed")[0]["result"] == "42"


async def test_errors_before_the_stream_are_problems(client: httpx.AsyncClient, served: Served, writer: Writer) -> None:
    async def problem(status: int, agent_name: str, **inputs: Any) -> Any:
        body = {"agent_name": agent_name, "inputs": inputs}
        return check_problem(await client.post("/run/flock", json=body, headers=STREAM), status)

    await problem(404, "nobody")
    await problem(422, "write", count="x")
    check_problem(await client.post("/run/flock?reasoning=x", json={"agent_name": "asks"}, headers=STREAM), 422)
    async with contextlib.AsyncExitStack() as streams:
        for _ in range(5):
            response = await streams.enter_async_context(start(client, "write", count=1))
            assert response.status_code == 200
        await problem(429, "write", count=1)
        assert isinstance(served.app, FlockAPI)
        assert len(engine_of(served.app)._runner.active) == 5, "the refused run was not accepted"
        for _ in range(5):
            writer.may_go.release()


async def test_json_is_the_default(client: httpx.AsyncClient, writer: Writer) -> None:
    writer.may_go.release()
    body = {"agent_name": "write", "inputs": {"count": 1}}
    for accept in ("*/*", "application/json, text/event-stream;q=0.9", "image/png"):
        writer.may_go.release()
        response = await client.post("/run/flock", json=body, headers={"Accept": accept})
        assert response.json()["status"] == "completed"


# Disconnects


@pytest.mark.parametrize(
    ("headers", "more", "on_disconnect", "status"),
    [
        pytest.param({}, {}, "cancel", "cancelled", id="sync"),
        pytest.param({}, {}, "continue", "completed", id="continue"),
        pytest.param({}, {"async_run": True}, "cancel", "completed", id="async_run"),
        pytest.param({"Prefer": "respond-async"}, {}, "cancel", "completed", id="respond-async"),
        pytest.param({"Idempotency-Key": "k"}, {}, "cancel", "completed", id="key"),
    ],
)
async def test_a_disconnect_follows_the_rules_of_a_run_without_a_stream(
    headers: dict[str, str], more: dict[str, Any], on_disconnect: Any, status: str, writer: Writer
) -> None:
    app = create_app(writer.flock, store=":memory:", auth="host", on_disconnect=on_disconnect)
    body = {"agent_name": "write", "inputs": {"count": 2}, **more}
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
        page = Page()
        async with client.stream("POST", "/run/flock", json=body, headers={**STREAM, **headers}) as response:
            writer.may_go.release()
            async for name in events_from(response, page):
                if name == "output.delta":
                    break
        if status == "cancelled":
            with anyio.fail_after(PATIENCE_S):
                await writer.ended.wait()
        else:
            if headers.get("Idempotency-Key"):  # the same request again follows the existing run
                async with client.stream("POST", "/run/flock", json=body, headers={**STREAM, **headers}) as response:
                    assert response.headers["Idempotency-Replayed"] == "true"
                    writer.may_go.release()
                    assert (await read_all(response)).outputs[0, ""] == {"result": "0 1 "}
            writer.may_go.release()
        run = (await client.get(f"/run/{page.events[0]['run_id']}?wait=10")).json()
        assert run["status"] == status
        await until(lambda: not engine_of(app)._runner.watched)


def engine_of(app: FlockAPI) -> EmbeddedEngine:
    assert isinstance(app.engine, EmbeddedEngine)
    return app.engine


async def test_a_client_that_disconnects_at_once_cancels_its_run(served: Served, writer: Writer) -> None:
    for _ in range(10):
        stream = await served.send({"agent_name": "write", "inputs": {"count": 1}}, Accept="text/event-stream")
        await stream.aclose()
    await until(lambda: not served.requests_in_flight)
    async with httpx.AsyncClient(base_url=served.url) as client:
        for run in (await client.get("/runs")).json()["runs"]:
            assert (await client.get(f"/run/{run['run_id']}?wait=10")).json()["status"] == "cancelled"


async def test_a_client_that_never_reads_slows_nobody_down(served: Served, writer: Writer) -> None:
    slow = await served.send(
        {"agent_name": "write", "inputs": {"count": 3000}, "async_run": True}, Accept="text/event-stream"
    )
    with anyio.fail_after(PATIENCE_S):
        await writer.started.wait()
    (live,) = engine_of(served.app)._runner.watched.values()  # type: ignore[arg-type]
    for _ in range(3000):
        writer.may_go.release()
    with anyio.fail_after(PATIENCE_S):
        await writer.ended.wait()
    assert len(live.changed_since(0)[0]) == 1, "there is one text, and no queue of pieces"
    await slow.aclose()


async def test_readers_get_all_pieces_at_once_while_another_one_reads_nothing() -> None:
    flock, (pieces, written) = Flock("crowd"), anyio.create_memory_object_stream[str](math.inf)

    @flock.agent
    async def write(context: RunContext) -> str:
        async for piece in written:
            context.emit(piece)
        return "the end"

    app = create_app(flock, store=":memory:", auth="host", max_event_streams=51)
    async with contextlib.AsyncExitStack() as stack:
        served = await stack.enter_async_context(Served(app))
        served.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        limits = httpx.Limits(max_connections=51)
        client = httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S, limits=limits)
        await stack.enter_async_context(client)
        path = (await client.post("/run/flock", json={"agent_name": "write", "async_run": True})).headers["Location"]
        slow = await served.send(request=f"GET {path}/events")
        await stack.enter_async_context(slow)
        pages = [Page() for _ in range(50)]
        readers = await stack.enter_async_context(anyio.create_task_group())
        for page in pages:
            response = await stack.enter_async_context(client.stream("GET", f"{path}/events"))
            readers.start_soon(read_all, response, page)
        await until(lambda: all("step.started" in page.names for page in pages))

        def is_stalled() -> bool:
            connections: set[Any] = served.server.server_state.connections
            return any(connection.flow.write_paused for connection in connections)

        def has_arrived(text: str) -> bool:
            return all(page.text(0) == text for page in pages)

        text, written_since_stall = "", 0
        while written_since_stall < 5:
            written_since_stall += is_stalled()
            text += (piece := f"{len(text)} ".ljust(20_000))
            pieces.send_nowait(piece)
            await until(partial(has_arrived, text))
        pieces.close()
        await until(lambda: all(page.names[-1] == "run.completed" for page in pages))
        assert is_stalled()
        received = b""
        while b"event: run.completed" not in received:  # it gets the rest when it reads
            received = received[-100:] + await slow.receive()


async def test_a_reader_who_joins_late_gets_a_snapshot(client: httpx.AsyncClient, writer: Writer) -> None:
    async with start(client, "write", count=3) as response:
        first = Page()
        writer.may_go.release()
        events = events_from(response, first)
        while "output.delta" not in first.names:
            await anext(events)
        late = Page()
        async with client.stream("GET", f"{response.headers['Location']}/events") as second:
            later = events_from(second, late)
            while "output.snapshot" not in late.names:
                await anext(later)
            for _ in range(2):
                writer.may_go.release()
            [name async for name in later]
        [name async for name in events]
    assert late.outputs == {**first.outputs, **late.outputs}
    assert late.outputs[0, ""] == first.outputs[0, ""] == {"result": "0 1 2 "}


# Runs that end before their first reader comes


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("store", [":memory:", "flock.db"], ids=["memory", "disk"])
async def test_a_fast_run_submitted_with_watch_has_all_its_text(writer: Writer, is_async: bool, store: str) -> None:
    """Of all its steps, and only the first reader gets it."""
    writer.may_go = anyio.Semaphore(10)
    async with writer.flock.engine(store=store) as engine:
        run = await engine.submit("draft", {"topic": "tea"}, is_async=is_async, watch=True)
        await engine.wait(run.run_id)
        assert await text_of(engine, run.run_id) == {0: " about tea", 1: "abouttea"}
        assert await text_of(engine, run.run_id) == {}
        assert engine._runner.watched == {}


async def test_a_run_that_waits_keeps_the_text_before_its_question(writer: Writer) -> None:
    async with writer.flock.engine(store=":memory:") as engine:
        run = await engine.wait((await engine.submit("asks", {}, is_async=False, watch=True)).run_id)
        (question,) = run.waiting_for
        async with aclosing(engine.events(run.run_id)) as events:
            async for event in events:
                if event is not None and event.name == "output.delta":
                    break
        assert event is not None
        assert event.data["text"] == "The answer is "
        await engine.answer_call(run.run_id, question.call_id, msgspec.Raw(b'"42"'))


async def test_a_watched_run_keeps_the_text_of_earlier_steps_for_its_first_reader(writer: Writer) -> None:
    """A step that starts does not drop the text of the step before it, which nobody has read yet."""
    writer.may_go = anyio.Semaphore(10)
    async with writer.flock.engine(store=":memory:") as engine:
        run_id = new_id()
        with engine.watch(run_id):
            await engine.submit("draft", {"topic": "tea"}, run_id=run_id)
            await engine.wait(run_id)
            assert await text_of(engine, run_id) == {0: " about tea", 1: "abouttea"}


async def text_of(engine: EmbeddedEngine, run_id: str) -> dict[int, str]:
    """Return the text in the events of a run that has ended, by position."""
    texts: dict[int, str] = {}
    async for event in engine.events(run_id):
        if event is not None and event.name == "output.delta":
            position = event.data["position"]
            texts[position] = texts.get(position, "") + event.data["text"]
    return texts


async def test_text_that_nobody_reads_is_forgotten_a_moment_after_the_end(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "UNREAD_S", 0.0)
    async with writer.flock.engine(store=":memory:") as engine:
        run = await engine.submit("write", {"count": 1}, watch=True)
        await writer.started.wait()
        assert list(engine._runner.watched) == [run.run_id], "it is active"
        writer.may_go.release()
        await engine.wait(run.run_id)
        await until(lambda: not engine._runner.watched)


async def test_many_watched_runs_that_nobody_reads_take_little_memory(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest are kept."""
    monkeypatch.setattr(live, "MAX_UNREAD_RUNS", 3)
    monkeypatch.setattr(live, "UNREAD_S", 3600.0)
    writer.may_go = anyio.Semaphore(100)
    async with writer.flock.engine(store=":memory:") as engine:
        runs = [await ended_unread(engine, 1) for _ in range(20)]
        assert len(engine._runner.watched) == 3
        assert await text_of(engine, runs[-1].run_id) == {0: "0 "}
        assert await text_of(engine, runs[0].run_id) == {}


async def ended_unread(engine: EmbeddedEngine, count: int) -> Run:
    run = await engine.submit("write", {"count": count}, watch=True)
    return await engine.wait(run.run_id)


async def test_the_unread_text_of_all_runs_is_limited_together(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "UNREAD_S", 3600.0)
    writer.may_go = anyio.Semaphore(10_000)
    async with writer.flock.engine(store=":memory:", max_result_bytes=3000) as engine:
        for _ in range(10):
            await ended_unread(engine, 300)
        assert len(engine._runner.watched) == 1, "one of them has 1,090 characters"
        with pytest.raises(InvalidData):
            await engine.submit("write", {"count": "many"}, watch=True)
        assert len(engine._runner.watched) == 1, "a run that is not accepted is not watched"


# Runs that nobody watches, and calls


async def test_a_synchronous_run_or_an_item_that_nobody_watches_keeps_no_output(writer: Writer) -> None:
    async with writer.flock.engine(store=":memory:") as engine:
        run = await engine.submit("write", {"count": 1}, is_async=False)
        batch = await engine.submit_batch("write", [{"count": 1}], BatchOptions())
        writer.may_go.release()
        writer.may_go.release()
        await engine.wait(run.run_id)
        await engine.wait_batch(batch.batch_id)
        assert engine._runner.watched == {}
    assert writer.was_watched == [False, False]


async def test_the_calls_of_a_step_are_read_once(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader does not read the earlier calls again when there is a new one."""
    async with writer.flock.engine(store="flock.db", durability="process") as engine:
        rows, next_calls = list[int](), engine.store.next_calls

        def count(run_id: str, position: int, number: int, after_row: int) -> Any:
            rows.append(number)
            return next_calls(run_id, position, number, after_row)

        monkeypatch.setattr(engine.store, "next_calls", count)
        run = await engine.submit("many", {"count": 200})
        events = [event async for event in engine.events(run.run_id) if event]
        calls = [event for event in events if event.name == "call.completed"]
        assert [event.data["name"] for event in calls] == ["double"] * 200
        assert [event.id for event in calls] == list(range(calls[0].id or 0, (calls[0].id or 0) + 200))
        assert set(rows) == {0}, "no row is skipped"
        assert await events_after(engine, run.run_id, calls[150].id or 0) == [*calls[151:], *events[-2:]]


async def events_after(engine: EmbeddedEngine, run_id: str, after: int) -> list[Event]:
    return [event async for event in engine.events(run_id, after) if event and event.id]


async def run_with_calls(engine: EmbeddedEngine, count: int) -> Run:
    """Return a completed run with as many stored calls, which are copies of one."""
    run = await engine.wait((await engine.submit("many", {"count": 1})).run_id)
    columns = "run_id, position, tries, call_id, name, kind, arguments, result, started_at, completed_at"

    def copy(db: sqlite3.Connection) -> None:
        db.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1}) "
            f"INSERT INTO calls ({columns}) SELECT {columns} FROM calls, n"
        )

    await sqlite_of(engine).change(copy)
    return run


async def test_many_calls_are_read_in_pages(writer: Writer) -> None:
    async with writer.flock.engine(store="flock.db", durability="process") as engine:
        run, queries = await run_with_calls(engine, 800), list[str]()
        sqlite_of(engine)._reader.set_trace_callback(queries.append)
        events = await events_after(engine, run.run_id, 0)
        assert [event.name for event in events].count("call.completed") == 800
        assert len(queries) < 100
        assert await events_after(engine, run.run_id, events[700].id or 0) == events[701:]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_other_tasks_run_while_many_calls_are_read(
    backend: str, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if their readers never wait for their clients."""
    monkeypatch.setattr(fair, "SHARE_S", 0)

    async def read() -> None:
        async with writer.flock.engine() as engine:
            run, read = await run_with_calls(engine, 200), list[int]()

            async def follow() -> None:
                read.append(len(await events_after(engine, run.run_id, 0)))

            async with counting_turns() as turns, anyio.create_task_group() as readers:
                for _ in range(3):
                    readers.start_soon(follow)
            assert read == [204] * 3
            assert turns[0] > 200

    anyio.run(read, backend=backend)


async def test_a_reader_that_has_gone_reads_no_more_calls(
    served: Served, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    engine, pages = engine_of(served.app), 0  # type: ignore[arg-type]
    run, next_calls = await run_with_calls(engine, 100_000), engine.store.next_calls

    def count(*args: Any) -> Any:
        nonlocal pages
        pages += 1
        return next_calls(*args)

    monkeypatch.setattr(engine.store, "next_calls", count)
    async with client.stream("GET", f"/run/{run.run_id}/events") as response:
        await anext(response.aiter_lines())
    await until(lambda: not engine._runner.watched)
    assert 0 < pages < 100_000 / CALLS_PER_PAGE / 2


async def test_the_events_of_many_steps_are_each_made_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    flock, made = Flock(max_steps=200), list[Any]()

    @flock.agent(output="n: int", next_agent=lambda result: "again" if result["n"] < 200 else None)
    async def again(n: int) -> dict[str, Any]:
        return {"n": n + 1}

    def count(usage: Any) -> dict[str, Any]:
        made.append(usage)
        return shown_usage(usage)

    monkeypatch.setattr("flock.runs.events.shown_usage", count)
    async with flock.engine() as engine:
        run = await engine.wait((await engine.submit("again", {"n": 0})).run_id)
        assert len(await events_after(engine, run.run_id, 0)) == 402
    assert len(made) < 5 * 200


async def test_a_generator_may_replace_its_text_by_a_result() -> None:
    flock, events, is_read = Flock(), list[Event](), anyio.Event()

    @flock.agent
    async def polish(text: str) -> AsyncIterator[str | Result]:
        yield f"draft of {text}"
        await is_read.wait()
        yield Result(text.title())

    def on_event(event: Event) -> None:
        events.append(event)
        if event.name == "output.delta":
            is_read.set()

    assert await flock.run_async("polish", {"text": "tea"}, on_event=on_event) == {"result": "Tea"}
    assert [event.name for event in events if event.name.startswith("output.")][-2:] == ["output.reset", "output.delta"]
    assert [event.data["text"] for event in events if event.name == "output.delta"][-1] == "Tea"


# Definitions


def test_a_generator_without_a_usable_output_is_an_error_at_the_definition() -> None:
    async def untyped(text: str):  # type: ignore[no-untyped-def]
        yield text

    async def numbers(text: str) -> AsyncIterator[str | int]:
        yield text

    async def only_text(text: str) -> AsyncIterator[str]:
        yield text

    flock = Flock()
    with pytest.raises(SignatureError, match="it is a generator"):
        flock.agent(untyped)
    with pytest.raises(DefinitionError, match="'numbers' yields text, but its output has no field of type str"):
        flock.agent(numbers)
    with pytest.raises(DefinitionError, match="'only_text' yields only text, for the field 'text'"):
        flock.agent(output="n: int, text: str")(only_text)
    assert flock.agent(output="text: str")(only_text).output_names[0] == "text"


async def test_a_dict_may_leave_the_text_out() -> None:
    flock = Flock()

    @flock.agent(output="title: str, words: list[str]")
    def write(topic: str) -> Iterator[str | dict[str, Any]]:
        yield "On "
        yield topic
        yield {"words": [topic]}

    async with flock.engine(store=":memory:") as engine:
        run = await engine.wait((await engine.submit("write", {"topic": "tea"})).run_id)
    assert run.error is None
    assert json.loads(bytes(run.result or b"")) == {"title": "On tea", "words": ["tea"]}


# Crashes


SCRIPT = """
import asyncio, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("crash")
GATE, FIRST = pathlib.Path("gate"), pathlib.Path("first")

@flock.agent
async def write(context: RunContext) -> str:
    if not FIRST.exists():
        FIRST.touch()
        context.emit("Once upon a ")
        await asyncio.Event().wait()
    while not context.is_watched and not GATE.exists():
        await asyncio.sleep(0.02)
    for word in ("Once ", "again"):
        context.emit(word)
        while word == "Once " and not GATE.exists():
            await asyncio.sleep(0.02)
    return "Once again"
"""


async def test_a_run_is_on_disk_when_its_stream_says_that_it_was_accepted(tmp_path: Path) -> None:
    """Also a synchronous one, which is not resumed."""
    (tmp_path / "write.py").write_text(SCRIPT)
    command = flockapi_command("serve", "write.py", "--port", "0", "--store", "flock.db")
    locations, body = list[str](), {"agent_name": "write", "inputs": {}}
    with chdir(tmp_path):
        for _ in range(3):
            with running(*command) as server:
                async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
                    with contextlib.suppress(httpx.TransportError):
                        async with client.stream("POST", "/run/flock", json=body, headers=STREAM) as response:
                            kill(server)
                            locations.append(response.headers["Location"])
        with running(*command) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
                runs = [(await client.get(location)).json() for location in locations]
    assert [run.get("error_type") for run in runs] == ["interrupted"] * 3, runs


@pytest.mark.parametrize("is_back_in_time", [True, False])
async def test_a_stream_continues_after_the_server_was_killed(is_back_in_time: bool, tmp_path: Path) -> None:
    """Whether the client is back before the step has ended, or after."""
    (tmp_path / "write.py").write_text(SCRIPT)
    command = flockapi_command("serve", "write.py", "--port", "0", "--store", "flock.db")
    page, body = Page(), {"agent_name": "write", "inputs": {}, "async_run": True}
    with chdir(tmp_path):
        with running(*command) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
                with contextlib.suppress(httpx.TransportError):
                    async with client.stream("POST", "/run/flock", json=body, headers=STREAM) as response:
                        async for name in events_from(response, page):
                            if name == "output.delta":
                                kill(server)
        assert page.outputs[0, ""] == {"result": "Once upon a "}
        if not is_back_in_time:
            open_gate()
        with running(*command) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
                path, headers = f"/run/{page.events[0]['run_id']}", {"Last-Event-ID": str(page.last_id)}
                if not is_back_in_time:
                    assert (await client.get(f"{path}?wait=10")).json()["status"] == "completed"
                async with client.stream("GET", f"{path}/events", headers=headers) as response:
                    async for name in events_from(response, page):
                        if name in ("output.snapshot", "output.delta"):
                            open_gate()
    assert page.outputs[0, ""] == {"result": "Once again"}
    assert page.names[-1] == "run.completed"


# Several processes on one store


def sockets_in(folder: Path) -> list[Path]:
    return list(folder.glob("*-live-*"))


OTHERS = """
import asyncio, pathlib
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("two")

async def gate(name: str) -> None:
    while not pathlib.Path(name).exists():
        await asyncio.sleep(0.01)

@flock.agent(next_agent="second")
async def first(context: RunContext) -> str:
    await gate("1")
    context.emit("a")
    await context.run_agent("third", {})
    await gate("2")
    context.emit("b")
    return "ab"

@flock.agent
async def second(result: str, context: RunContext) -> str:
    context.emit_value("result", "x")
    context.emit_reasoning("hm")
    context.reset_output()
    context.emit("c")
    await gate("3")
    while context.attempt == 2 and not context.is_watched:
        await asyncio.sleep(0.01)
    context.emit("d")
    return "cd"

@flock.agent
async def third(context: RunContext) -> str:
    context.emit("inner")
    return "inner"

@flock.agent
async def long(context: RunContext) -> str:
    text = "".join(f"{number} é\\u2028" for number in range(120_000))
    await gate("1")
    context.emit(text)
    await gate("2")
    return text
"""
#: What the agent ``long`` writes in one piece: more than a million characters.
LONG_TEXT = "".join(f"{number} é\u2028" for number in range(120_000))


@contextlib.asynccontextmanager
async def reading_elsewhere(
    tmp_path: Path, agent_name: str = "first"
) -> AsyncIterator[tuple[Server, Server, Page, AsyncIterator[str]]]:
    """Start a run in one process, and read its events in another one."""
    (tmp_path / "two.py").write_text(OTHERS)
    command = flockapi_command("serve", "two.py", "--port", "0", "--store", "flock.db")
    with chdir(tmp_path), running(*command) as owner, running(*command) as other:
        body, page = {"agent_name": agent_name, "inputs": {}, "async_run": True}, Page()
        async with httpx.AsyncClient(base_url=other.url, timeout=PATIENCE_S) as client:
            run_id = (await client.post(f"{owner.url}/run/flock", json=body)).json()["run_id"]
            async with client.stream("GET", f"/run/{run_id}/events?reasoning=true") as response:
                yield owner, other, page, events_from(response, page)


async def test_text_reaches_the_readers_in_another_process(tmp_path: Path) -> None:
    async with reading_elsewhere(tmp_path) as (_, _, page, events):
        (tmp_path / "1").touch()
        async for _ in events:  # what was written before this reader was connected comes as a snapshot
            for position, text, gate in ((0, "a", "2"), (1, "c", "3")):
                if page.text(position) == text:
                    (tmp_path / gate).touch()
    assert page.outputs[0, ""] == {"result": "ab"}
    assert page.outputs[1, ""] == {"result": "cd"}
    (call_id,) = {event["call_id"] for event in page.of("call.completed")}
    assert page.outputs.get((0, call_id), {}) in ({}, {"result": "inner"})  # it may have ended before
    assert [text["text"] for text in page.of("reasoning.delta")] in ([], ["hm"])
    assert sockets_in(tmp_path) == [], "the sockets are removed at the end"


async def test_a_piece_of_a_megabyte_reaches_all_readers_and_other_requests_are_answered(tmp_path: Path) -> None:
    async with (
        reading_elsewhere(tmp_path, "long") as (owner, other, page, events),
        contextlib.AsyncExitStack() as stack,
    ):
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=PATIENCE_S))
        (run,) = (await client.get(f"{owner.url}/runs")).json()["runs"]
        readers = [(page, events)]
        for _ in range(2):
            path, one = f"{owner.url}/run/{run['run_id']}/events", Page()
            response = await stack.enter_async_context(client.stream("GET", path))
            readers.append((one, events_from(response, one)))
        for _, its_events in readers:
            while await anext(its_events) != "step.started":
                pass
        (tmp_path / "1").touch()
        for one, its_events in readers:  # the others do not read meanwhile
            while one.text(0) != LONG_TEXT:
                await anext(its_events)
            for server in (owner, other):
                assert (await client.get(f"{server.url}/runs")).json()["runs"][0]["status"] == "running"
        (tmp_path / "2").touch()
        for one, its_events in readers:
            assert [name async for name in its_events][-1] == "run.completed"
            assert one.events[-1]["result"] == one.outputs[0, ""] == {"result": LONG_TEXT}


async def test_a_reader_elsewhere_takes_over_from_the_process_that_was_killed(tmp_path: Path) -> None:
    async with reading_elsewhere(tmp_path) as (owner, _, page, events):
        for gate in "12":
            (tmp_path / gate).touch()
        async for _ in events:
            if page.text(1) == "c":
                kill(owner)
                break
        assert page.outputs[1, ""] == {"result": "c"}
        (tmp_path / "3").touch()
        async for _ in events:
            pass
    assert page.outputs[1, ""] == {"result": "cd"}
    assert page.names[-1] == "run.completed"
    assert "output.reset" in page.names


def open_gate() -> None:
    Path("gate").touch()


def kill(server: Server) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def chdir(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)

"""Spans of requests, runs, steps and calls; see ``docs/observability.md``."""

import contextlib
import json
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from flock.agents.mcp import mcp_tools
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.logs import JSONFormatter
from flock.runs import BatchOptions, RunContext, traces
from flock.runs.usage import Usage
from flock.testing import Failure, FakeModel, Reply
from flock.web import webhooks
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until, until_run
from tests.support.http import client_of, wait_for
from tests.support.receivers import SECRET, Inbox
from tests.support.servers import Served
from tests.test_mcp import FakeServer

pytestmark = pytest.mark.anyio

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


class Spans:
    """The spans that have ended, by name."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    @property
    def all(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.all]

    def __getitem__(self, name: str) -> ReadableSpan:
        (span,) = [span for span in self.all if span.name == name]
        return span

    def tree(self) -> list[tuple[str, str]]:
        """Return each span with its parent, in the order in which they started."""
        names = {f"{span.context.span_id:016x}": span.name for span in self.all}
        return [
            (span.name, "" if span.parent is None else names.get(f"{span.parent.span_id:016x}", "outside"))
            for span in sorted(self.all, key=lambda span: span.start_time or 0)
        ]


def set_provider(monkeypatch: pytest.MonkeyPatch, *processors: SpanProcessor) -> TracerProvider:
    """Set the tracer provider of this process, until the test ends."""
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in processors:
        provider.add_span_processor(processor)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return provider


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    exporter = InMemorySpanExporter()
    set_provider(monkeypatch, SimpleSpanProcessor(exporter))
    return Spans(exporter)


@contextlib.asynccontextmanager
async def served(flock: Flock, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(flock, store=":memory:", **options)
    async with app.lifespan(), client_of(app) as client:
        yield client


def traced_flock() -> Flock:
    """An agent with a model and tools: a function, and another agent."""
    flock = Flock("traced", model="openai/gpt-4o")

    def price_of(order: str) -> float:
        return 40.0

    flock.add_agent(
        FlockFactory.create_default_agent(
            "clerk", input="order: str", output="answer: str", tools=[price_of, "adviser"]
        )
    )
    flock.add_agent(
        FlockFactory.create_default_agent(
            "adviser", input="order: str", output="advice: str", temperature=0.2, max_tokens=50
        )
    )
    return flock


REPLIES = {
    "clerk": [Reply(calls=[("price_of", {"order": "A7"}), ("adviser", {"order": "A7"})]), {"answer": "It costs 40."}],
    "adviser": {"advice": "Buy."},
}


async def run_of(client: httpx.AsyncClient, agent_name: str, inputs: Any, **headers: str) -> Any:
    body = {"agent_name": agent_name, "inputs": inputs}
    return (await client.post("/run/flock", json=body, headers=headers)).json()


async def run_of_clerk(**headers: str) -> tuple[Any, FakeModel]:
    """Return a run with calls of a tool and of an agent, and the model that has answered them."""
    with FakeModel({**REPLIES, "clerk": list(REPLIES["clerk"])}) as model:
        async with served(traced_flock()) as client:
            return await run_of(client, "clerk", {"order": "A7"}, **headers), model


def hex_of(span: ReadableSpan) -> str:
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


# What is in a trace


async def test_a_trace_goes_from_the_request_to_the_model_and_back(
    spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "flock.runs"):
        run, model = await run_of_clerk(traceparent=TRACEPARENT)
    assert run["status"] == "completed"
    assert sorted(spans.tree()) == sorted(
        [
            ("POST /run/flock", "outside"),
            ("run clerk", "POST /run/flock"),
            ("invoke_agent clerk", "run clerk"),
            ("chat gpt-4o", "invoke_agent clerk"),
            ("execute_tool price_of", "invoke_agent clerk"),
            ("execute_tool adviser", "invoke_agent clerk"),
            ("invoke_agent adviser", "execute_tool adviser"),
            ("chat gpt-4o", "invoke_agent adviser"),
            ("chat gpt-4o", "invoke_agent clerk"),
        ]
    )
    assert {f"{span.context.trace_id:032x}" for span in spans.all} == {TRACE_ID}
    request = spans["POST /run/flock"]
    assert request.kind is SpanKind.SERVER
    assert dict(request.attributes or {}) == {
        "http.request.method": "POST",
        "url.path": "/run/flock",
        "http.route": "/run/flock",
        "http.response.status_code": 200,
    }
    assert run["traceparent"] == hex_of(request)
    chats = [span for span in spans.all if span.name == "chat gpt-4o"]
    assert {request.headers["traceparent"] for request in model.requests} == set(map(hex_of, chats))
    (record,) = [record for record in caplog.records if "completed" in record.getMessage()]
    assert json.loads(JSONFormatter().format(record))["trace_id"] == TRACE_ID


async def test_spans_have_tokens_and_costs_and_no_content(spans: Spans) -> None:
    run, _ = await run_of_clerk()
    chat = next(span for span in spans.all if (span.attributes or {}).get("gen_ai.request.max_tokens"))
    cost = (10 * 2.5 + 5 * 10) / 1_000_000
    assert chat.kind is SpanKind.CLIENT
    assert dict(chat.attributes or {}) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.2,
        "gen_ai.response.model": "gpt-4o",
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "flock.cost": cost,
    }
    assert dict(spans["run clerk"].attributes or {}) == {
        "gen_ai.agent.name": "clerk",
        "flock.run.id": run["run_id"],
        "flock.run.attempt": 1,
        "flock.run.status": "completed",
        "flock.cost": pytest.approx(3 * cost),
    }
    tool = dict(spans["execute_tool price_of"].attributes or {})
    assert (tool.pop("gen_ai.operation.name"), tool.pop("gen_ai.tool.name")) == ("execute_tool", "price_of")
    assert tool.keys() == {"flock.call.id"}
    text = "".join(span.to_json() for span in spans.all)
    assert not any(word in text for word in ("It costs", "Buy", "A7", "40.0"))


@pytest.mark.parametrize("is_hidden", [False, True])
async def test_the_span_of_a_run_has_its_principal_unless_the_operator_leaves_it_out(
    is_hidden: bool, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_hidden:
        monkeypatch.setenv("FLOCK_TELEMETRY_PRINCIPAL", "false")
    flock = Flock()

    @flock.agent
    def one() -> int:
        return 1

    async with served(flock, api_keys={"ann": "fk_ann_0123456789abcdef"}) as client:
        headers = {"X-API-Key": "fk_ann_0123456789abcdef"}
        await client.post("/run/flock", json={"agent_name": "one", "inputs": {}}, headers=headers)
    assert dict(spans["run one"].attributes or {}).get("enduser.id") == (None if is_hidden else "ann")


async def test_cached_and_reasoning_tokens_and_the_session_are_in_spans(spans: Spans) -> None:
    usage = Usage(input_tokens=7, output_tokens=3, cached_tokens=2, reasoning_tokens=1)
    with FakeModel([Reply({"advice": "Buy."}, usage=usage)]):
        async with served(traced_flock()) as client:
            body = {"agent_name": "adviser", "inputs": {"order": "A7"}, "session_id": "talk-1"}
            await client.post("/run/flock", json=body)
    attributes = dict(spans["chat gpt-4o"].attributes or {})
    assert {name: value for name, value in attributes.items() if name.startswith("gen_ai.usage.")} == {
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.reasoning.output_tokens": 1,
    }
    for name in ("run adviser", "invoke_agent adviser"):
        assert (spans[name].attributes or {})["gen_ai.conversation.id"] == "talk-1"


@pytest.mark.parametrize("is_sampled", [True, False])
async def test_items_of_a_batch_have_spans_if_its_request_is_sampled(is_sampled: bool, spans: Spans) -> None:
    flock = Flock()

    @flock.agent
    def add(a: int) -> int:
        return a

    async with served(flock) as client:
        body = {"agent_name": "add", "batch_inputs": [{"a": 1}, {"a": 2}, {"a": 3}]}
        headers = {"traceparent": f"{TRACEPARENT[:-2]}{is_sampled:02}"}
        batch_id = (await client.post("/run/batch", json=body, headers=headers)).json()["batch_id"]
        await wait_for(client, f"/batch/{batch_id}")
    runs = [dict(span.attributes or {}) for span in spans.all if span.name == "run add"]
    assert [run["flock.batch.id"] for run in runs] == [batch_id] * 3 * is_sampled
    assert len({run["flock.run.id"] for run in runs}) == len(runs)
    items = [("run add", "POST /run/batch"), ("invoke_agent add", "run add")] * 3
    assert sorted(spans.tree()) == sorted([("POST /run/batch", "outside"), *items] if is_sampled else [])


@pytest.mark.parametrize("parent", [TRACEPARENT, None], ids=["request", "no request"])
async def test_only_some_rows_of_a_long_batch_have_spans(
    parent: str | None, spans: Spans, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones, and one of each stride. What the others send on is not sampled."""
    monkeypatch.setattr(traces, "SPANNED_ROWS", 2)
    monkeypatch.setattr(traces, "SPANNED_STRIDE", 5)
    flock, sampled = Flock(), dict[int, bool]()

    @flock.agent
    async def look(row: int, context: RunContext) -> int:
        sampled[row] = bool(int((context.traceparent or "00")[-2:], 16) & 1)
        return row

    async with open_engine(flock) as engine:
        rows = [{"row": row} for row in range(12)]
        batch = await engine.submit_batch("look", rows, BatchOptions(), traceparent=parent)
        await engine.wait_batch(batch.batch_id)
        ids = {item.run_id: item.position for item in await engine.get_items(batch.batch_id)}
        await until(lambda: len(spans.all) >= 8)
    runs = [ids[str((span.attributes or {})["flock.run.id"])] for span in spans.all if span.name == "run look"]
    assert sorted(filter(None, runs)) == [1, 5, 10]
    assert spans.names.count("run look") == spans.names.count("invoke_agent look") == 4
    assert sorted(row for row, is_sampled in sampled.items() if is_sampled) == [0, 1, 5, 10]


async def test_content_is_in_spans_if_the_operator_asks_for_it(spans: Spans, monkeypatch: pytest.MonkeyPatch) -> None:
    """But no secret argument of a tool."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    flock = Flock(model="openai/gpt-4o")

    def pay(card: str, euros: int) -> str:
        return f"{euros} paid"

    flock.add_agent(
        FlockFactory.create_default_agent(
            "cashier", input="euros: int", output="answer: str", tools=[Tool(pay, secret=["card"])]
        )
    )
    replies = [Reply(calls=[("pay", {"card": "4711-0815", "euros": 5})]), {"answer": "Done."}]
    with FakeModel(replies):
        async with served(flock) as client:
            await run_of(client, "cashier", {"euros": 5})
    tool = dict(spans["execute_tool pay"].attributes or {})
    assert json.loads(str(tool["gen_ai.tool.call.arguments"]))["euros"] == 5
    assert tool["gen_ai.tool.call.result"] == "5 paid"
    first, second = [dict(span.attributes or {}) for span in spans.all if span.name == "chat gpt-4o"]
    assert [message["role"] for message in json.loads(str(first["gen_ai.input.messages"]))] == ["system", "user"]
    (called,) = json.loads(str(first["gen_ai.output.messages"]))
    assert (called["finish_reason"], called["parts"][0]["name"]) == ("tool_call", "pay")
    response = json.loads(str(second["gen_ai.input.messages"]))[-1]
    assert response["parts"] == [{"type": "tool_call_response", "id": "call_0", "response": "5 paid"}]
    (answer,) = json.loads(str(second["gen_ai.output.messages"]))
    assert answer == {
        "role": "assistant",
        "parts": [{"type": "text", "content": '{"answer":"Done."}'}],
        "finish_reason": "stop",
    }
    assert "4711-0815" not in "".join(span.to_json() for span in spans.all)


async def test_an_error_sets_the_status_of_its_spans_and_not_its_text(spans: Spans) -> None:
    flock = Flock(model="openai/gpt-4o")

    @flock.agent
    async def explode(text: str, context: RunContext) -> str:
        async def inner(text: str) -> str:
            raise AgentError(f"a secret: {text}")

        return str(await context.call(inner, text))

    flock.add_agent(FlockFactory.create_default_agent("writer", input="text: str", output="answer: str"))
    with FakeModel(lambda request: Failure(401, "invalid_api_key")):
        async with served(flock) as client:
            await run_of(client, "explode", {"text": "whisper"})
            await run_of(client, "writer", {"text": "whisper"})
    errors = {span.name: (span.attributes or {}).get("error.type") for span in spans.all}
    assert errors == {
        "call inner": "agent_error",
        "invoke_agent explode": "agent_error",
        "run explode": "agent_error",
        "chat gpt-4o": "model_authentication",
        "invoke_agent writer": "model_authentication",
        "run writer": "model_authentication",
        "POST /run/flock": None,
    }
    for span in spans.all:
        assert (span.status.status_code is StatusCode.ERROR) == (errors[span.name] is not None)
    assert "whisper" not in "".join(span.to_json() for span in spans.all)


async def test_a_wait_is_an_event_and_each_stretch_has_a_span(spans: Spans) -> None:
    flock = Flock()

    @flock.agent
    async def approve(text: str, context: RunContext) -> bool:
        return bool(await context.ask("Send it?", bool))

    async with served(flock) as client:
        run = await run_of(client, "approve", {"text": "hi"}, traceparent=TRACEPARENT)
        assert run["status"] == "waiting"
        first_step, first = spans["invoke_agent approve"], spans["run approve"]
        (call,) = run["waiting_for"]
        path = f"/run/{run['run_id']}/calls/{call['call_id']}"
        assert (await client.post(path, json={"output": True})).status_code < 300
        assert (await wait_for(client, f"/run/{run['run_id']}"))["status"] == "completed"
    assert [(event.name, dict(event.attributes or {})) for event in first_step.events] == [
        ("flock.waiting", {"flock.waits": ("question",)})
    ]
    assert first.status.status_code is first_step.status.status_code is StatusCode.UNSET
    assert (first.attributes or {})["flock.run.status"] == "waiting"
    _, second = [span for span in spans.all if span.name == "run approve"]
    assert second.parent == first.parent
    assert [link.context.span_id for link in second.links] == [first.context.span_id]
    assert not first.links


# Where a trace begins


async def test_a_run_submitted_in_python_belongs_to_the_span_of_the_host(spans: Spans, open_engine: OpenEngine) -> None:
    flock, seen = Flock(), list[str | None]()

    @flock.agent
    async def look(number: int, context: RunContext) -> int:
        seen.append(context.traceparent)
        return number

    async with open_engine(flock) as engine:
        with trace.get_tracer("host").start_as_current_span("host"):
            run = await engine.submit("look", {"number": 1})
            batch = await engine.submit_batch("look", [{"number": 2}, {"number": 3}], BatchOptions())
            named = await engine.submit("look", {"number": 4}, traceparent=TRACEPARENT)
        for each in (run, named):
            await engine.wait(each.run_id)
        await engine.wait_batch(batch.batch_id)
        items = await engine.get_items(batch.batch_id)
    await until(lambda: spans.names.count("run look") == 4)
    parent = hex_of(spans["host"])
    assert {run.traceparent, *(item.traceparent for item in items)} == {parent}
    assert named.traceparent == TRACEPARENT
    runs = [span for span in spans.all if span.name == "run look"]
    parents = [f"{span.parent.span_id:016x}" for span in runs if span.parent]
    assert sorted(parents) == sorted([*[parent[36:52]] * 3, PARENT_ID])
    steps = [span for span in spans.all if span.name == "invoke_agent look"]
    assert sorted(filter(None, seen)) == sorted(map(hex_of, steps))


async def test_a_host_with_a_span_of_its_own_gets_no_second_one(spans: Spans) -> None:
    flock = Flock()

    @flock.agent
    def add(a: int) -> int:
        return a

    async with served(flock) as client:
        with trace.get_tracer("host").start_as_current_span("host"):
            run = await run_of(client, "add", {"a": 1})
        await client.get(f"/run/{run['run_id']}")
    assert spans.tree() == [("host", ""), ("run add", "host"), ("invoke_agent add", "run add")]
    assert run["traceparent"] == hex_of(spans["host"])


async def test_runs_on_a_disk_without_a_lifespan_belong_to_the_spans_of_their_requests(spans: Spans) -> None:
    """Not to the first one, which has opened the engine."""
    flock, traces_of = Flock(), dict[str, int]()

    @flock.agent
    def add(a: int) -> int:
        return a

    app = create_app(flock, store="flock.db")
    async with client_of(app) as client:
        for number, is_async in ((1, True), (2, True), (3, False)):
            with trace.get_tracer("host").start_as_current_span(f"host {number}") as span:
                body = {"agent_name": "add", "inputs": {"a": number}, "async_run": is_async}
                run = (await client.post("/run/flock", json=body)).json()
            assert run["traceparent"] == hex_of(spans[f"host {number}"])
            traces_of[run["run_id"]] = span.get_span_context().trace_id
            await client.get(f"/run/{run['run_id']}?wait=30")
        await until(lambda: spans.names.count("run add") == 3)
    found = {
        (span.attributes or {})["flock.run.id"]: span.context.trace_id for span in spans.all if span.name == "run add"
    }
    assert found == traces_of


async def test_a_run_without_a_request_keeps_its_trace(spans: Spans, open_engine: OpenEngine) -> None:
    """Also if it continues later: the first execution has begun the trace."""
    flock = Flock()

    @flock.agent
    async def approve(context: RunContext) -> bool:
        return bool(await context.ask("Send it?", bool))

    async with open_engine(flock) as engine:
        run = await engine.submit("approve", {})
        run = await until_run(engine, run.run_id, lambda run: bool(run.questions))
        await until(lambda: spans.names == ["invoke_agent approve", "run approve"])
        await engine.answer_call(run.run_id, run.questions[0].call_id, msgspec.Raw(b"true"))
        await engine.wait(run.run_id)
        await until(lambda: len(spans.all) == 4)
    first, second = [span for span in spans.all if span.name == "run approve"]
    assert first.parent is None
    assert second.parent is not None
    assert second.parent.span_id == second.links[0].context.span_id == first.context.span_id
    assert second.context.trace_id == first.context.trace_id


@pytest.mark.parametrize(
    "sent",
    ["", "00", "x" * 10_000, f"{TRACEPARENT}-{'x' * 10_000}", TRACEPARENT.replace("b7", "B7"), "00-0-0-01"],
    ids=["empty", "short", "long", "long end", "upper case", "zero"],
)
async def test_an_invalid_traceparent_begins_a_new_trace(sent: str, spans: Spans) -> None:
    flock = Flock()

    @flock.agent
    def add(a: int) -> int:
        return a

    async with served(flock) as client:
        run = await run_of(client, "add", {"a": 1}, traceparent=sent)
    assert run["status"] == "completed"
    assert spans["POST /run/flock"].parent is None
    assert TRACE_ID not in run["traceparent"]


async def test_a_trace_that_is_not_sampled_has_no_spans_and_is_sent_on(spans: Spans) -> None:
    with FakeModel([{"advice": "Buy."}]) as model:
        async with served(traced_flock()) as client:
            run = await run_of(client, "adviser", {"order": "A7"}, traceparent=f"{TRACEPARENT[:-2]}00")
    assert (run["status"], spans.all) == ("completed", ())
    assert run["traceparent"].startswith(f"00-{TRACE_ID}-")
    assert run["traceparent"].endswith("-00")
    (request,) = model.requests
    assert request.headers["traceparent"][:36] == f"00-{TRACE_ID}-"
    assert request.headers["traceparent"].endswith("-00")


async def test_a_tool_of_an_mcp_server_gets_the_trace(spans: Spans) -> None:
    server = FakeServer()
    async with Served(server.app) as at:
        flock = Flock(model="openai/gpt-4o")
        flock.add_agent(
            FlockFactory.create_default_agent(
                "clerk", input="a: int", output="answer: str", tools=[mcp_tools(f"{at.url}/mcp", only=["math.add"])]
            )
        )
        with FakeModel([Reply(calls=[("math_add", {"a": 1, "b": 2})]), {"answer": "3"}]):
            async with served(flock) as client:
                await run_of(client, "clerk", {"a": 1})
    sent = hex_of(spans["execute_tool math_add"])
    method, params = server.requests[-1]
    assert (method, params["_meta"]["traceparent"], server.headers[-1]["traceparent"]) == ("tools/call", sent, sent)


RPC = {"jsonrpc": "2.0", "id": 1}
SAID = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}]}
USER = {"id": "u", "role": "user"}


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        pytest.param("/a2a/echo", {"method": "SendMessage", "params": {"message": SAID}}, "A2A-Version: 1.0", id="A2A"),
        pytest.param(
            "/mcp", {"method": "tools/call", "params": {"name": "echo", "arguments": {"text": "hi"}}}, "", id="MCP"
        ),
        pytest.param("/v1/responses", {"model": "echo", "input": "hi"}, "", id="OpenAI"),
        pytest.param(
            "/vercel/echo",
            {"id": "c", "messages": [{**USER, "parts": [{"type": "text", "text": "hi"}]}]},
            "",
            id="Vercel",
        ),
        pytest.param(
            "/ag-ui/echo", {"threadId": "t", "runId": "r", "messages": [{**USER, "content": "hi"}]}, "", id="AG-UI"
        ),
    ],
)
@pytest.mark.parametrize("is_traced", [True, False])
async def test_a_trace_continues_through_each_protocol(
    is_traced: bool, path: str, body: Any, headers: str, request: pytest.FixtureRequest
) -> None:
    """Also if this program has no tracer."""
    spans = request.getfixturevalue("spans") if is_traced else None
    flock = Flock()

    @flock.agent
    def echo(text: str) -> str:
        return text

    sent = {"traceparent": TRACEPARENT, "accept": "application/json, text/event-stream"}
    name, _, value = headers.partition(": ")
    body = {**RPC, **body} if "method" in body else body
    async with served(flock, protocols=["a2a", "mcp", "openai", "vercel", "ag-ui"]) as client:
        await client.post(path, json=body, headers={**sent, **({name: value} if name else {})})
        (run,) = (await client.get("/runs")).json()["runs"]
        run = await wait_for(client, f"/run/{run['run_id']}")
    assert run["status"] == "completed"
    if spans is None:
        assert run["traceparent"] == TRACEPARENT
        return
    ((handled, parent), *rest) = spans.tree()
    assert (handled.startswith("POST /"), parent) == (True, "outside")
    assert sorted(rest) == [("invoke_agent echo", "run echo"), ("run echo", handled)]
    assert {f"{span.context.trace_id:032x}" for span in spans.all} == {TRACE_ID}


# No harm


class Broken(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("no room")

    def on_end(self, span: Any) -> None:
        raise RuntimeError("no room")


class BrokenProvider(TracerProvider):
    def get_tracer(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("no tracer")


class BrokenExporter(SpanExporter):
    def __init__(self, may_go: threading.Event | None = None) -> None:
        self.may_go, self.is_called = may_go, threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.is_called.set()
        if self.may_go is None:
            raise RuntimeError("no collector")
        self.may_go.wait()
        return SpanExportResult.FAILURE


@pytest.mark.parametrize("broken", ["processor", "provider", "exporter", "blocked exporter"])
async def test_a_broken_tracer_neither_fails_nor_delays_a_run(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last runs begin and end while the exporter works, or hangs."""
    may_go, exporter = threading.Event(), None
    traces._warn.cache_clear()
    provider = TracerProvider(shutdown_on_exit=False)
    if broken == "provider":
        provider = BrokenProvider(shutdown_on_exit=False)
    elif broken == "processor":
        provider.add_span_processor(Broken())
    else:
        exporter = BrokenExporter(may_go if broken == "blocked exporter" else None)
        provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    try:
        with anyio.fail_after(PATIENCE_S):
            run, _ = await run_of_clerk(traceparent=TRACEPARENT)
            assert (run["status"], run["result"]) == ("completed", {"answer": "It costs 40."})
            if exporter is not None:
                await anyio.to_thread.run_sync(exporter.is_called.wait, PATIENCE_S)
                run, _ = await run_of_clerk(traceparent=TRACEPARENT)
                assert (run["status"], may_go.is_set()) == ("completed", False)
    finally:
        may_go.set()
        provider.shutdown()
    warnings = sum("Spans are missing" in record.message for record in caplog.records)
    assert warnings == (0 if exporter else 1), "the SDK itself logs what its exporters raise"


def test_an_exception_that_cannot_be_read_still_ends_its_span(spans: Spans) -> None:
    class Odd(Exception):
        @property
        def error_type(self) -> str:
            raise RuntimeError("unreadable")

    with pytest.raises(Odd), traces.of_call("function", "odd", "1"):
        raise Odd
    assert spans.names == ["call odd"]


def test_tokens_are_not_added_to_the_span_that_all_share(monkeypatch: pytest.MonkeyPatch) -> None:
    set_provider(monkeypatch)
    monkeypatch.setattr(traces, "_start", lambda *args, **kwargs: traces.OFF)
    with traces.of_chat("fake/model", None, None):
        traces.spent(Usage(input_tokens=1))
    assert traces.OFF.usage is None


def test_nothing_of_opentelemetry_is_imported_without_need() -> None:
    code = """
import sys
from flock.core import Flock, FlockFactory
from flockapi import create_app
flock = Flock()
@flock.agent
def add(a: int) -> int:
    return a
assert flock.run("add", {"a": 1}) == {"result": 1}
create_app(flock, store=":memory:", metrics=False)
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


async def test_a_webhook_of_a_run_without_a_request_gets_the_trace_that_it_has_begun(
    spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "POLL_S", 0.01)
    inbox, flock = Inbox(), Flock()

    @flock.agent
    def add(a: int) -> int:
        return a

    async with inbox.serve() as receiver:
        flock.webhook_url = receiver.url
        async with served(flock, webhook_secrets=[SECRET]):
            engine = flock.shared_engine(store=":memory:")
            run = await engine.submit("add", {"a": 1})
            await inbox.until(1)
    assert run.traceparent is None
    assert inbox.requests[0][2]["traceparent"] == hex_of(spans["run add"])

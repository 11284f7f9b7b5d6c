"""Tools of MCP servers: real servers on sockets, and the server of the protocol's own SDK."""

import asyncio
import base64
import json
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from flock.agents.mcp import ListedTool, MCPTool, mcp_tools
from flock.agents.tools import Tool, ToolSource
from flock.core import Flock, FlockFactory
from flock.errors import DefinitionError, InvalidData
from flock.models import bodies
from flock.models.localmodel import bounded_schema
from flock.models.react import schema_of
from flock.runs import Progress, RunStatus
from flock.testing import Failure, FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until, until_run
from tests.support.environments import new_environment, pip
from tests.support.servers import Served, free_port
from tests.support.sockets import gzip_bomb, little_memory

pytestmark = pytest.mark.anyio

ADD = {"name": "math.add", "description": "Add.", "inputSchema": {"type": "object", "properties": {"a": {}, "b": {}}}}
FINISH = {"name": "finish", "inputSchema": {"type": "object"}}


class FakeServer:
    """An MCP server that lists one tool a page, and answers ``tools/call`` with ``reply``."""

    def __init__(self, *, sends_events: bool = False) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.headers: list[Any] = []
        self.sessions: list[str] = []
        self.answers: list[Any] = []
        self.answered = anyio.Event()
        self.has_sessions = True
        self.first_tool: Any = ADD
        self.last_tool: Any = FINISH
        self.version, self.session_name = "2025-06-18", "session"
        self.sends_events = sends_events
        self.reply: Callable[[Any], Awaitable[Any]] | None = None
        self.app = Starlette(routes=[Route("/mcp", self._answer, methods=["POST"])])

    async def _answer(self, request: Request) -> Response:
        message = await request.json()
        if "method" not in message:
            self.answers.append(message)
            self.answered.set()
            return Response(status_code=202)
        method, params = message["method"], message.get("params", {})
        self.requests.append((method, params))
        self.headers.append(request.headers)
        if method == "initialize":
            self.sessions.append(f"{self.session_name}-{len(self.sessions)}")
            result: Any = {"protocolVersion": self.version, "capabilities": {}, "serverInfo": {}}
            return JSONResponse(
                {"jsonrpc": "2.0", "id": message["id"], "result": result},
                headers={"Mcp-Session-Id": self.sessions[-1]} if self.has_sessions else {},
            )
        if self.has_sessions and request.headers.get("mcp-session-id") not in self.sessions[-1:]:
            return Response(status_code=404)
        if method == "notifications/initialized":
            return Response(status_code=202)
        if method == "tools/list":
            result = (
                {"tools": [self.last_tool]}
                if params.get("cursor")
                else {"tools": [self.first_tool], "nextCursor": "more"}
            )
        else:
            result = {"content": [{"type": "text", "text": str(sum(params["arguments"].values()))}]}
        body = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        if method == "tools/call" and self.reply is not None:
            body = await self.reply(message)
        if isinstance(body, Response):
            return body
        return (
            StreamingResponse(events(body), media_type="text/event-stream") if self.sends_events else JSONResponse(body)
        )


async def events(body: Any) -> AsyncIterator[str]:
    """Yield a notification, then the response, and leave the stream open."""
    progress = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
    yield f"event: message\r\ndata: {json.dumps(progress)}\r\n\r\n: a comment\n\n"
    yield f"id: 1\ndata: {json.dumps(body)}\n\n"
    await asyncio.sleep(PATIENCE_S)


def flock_of(url: str, **options: Any) -> Flock:
    flock = Flock("mcp", model="openai/gpt-4o")
    tools = [mcp_tools(url, headers={"Authorization": "Bearer secret"}, **options)]
    flock.add_agent(FlockFactory.create_default_agent("ask", output="a: str", tools=tools))
    return flock


async def result_of_call(flock: Flock, model: FakeModel, arguments: Any = {"a": 1, "b": 2}) -> str:  # noqa: B006
    model.replies = [Reply(calls=[("math_add", arguments)]), Reply({"a": "done"})]
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {})
        run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error
    return str(model.requests[-1]["messages"][-1]["content"])


async def test_a_call_of_a_tool_of_a_server_is_approved_and_edited(model: FakeModel) -> None:
    """The edited arguments are validated with the schema that the server has listed."""
    server = FakeServer()
    number = {"type": "integer"}
    server.first_tool = {**ADD, "inputSchema": {"type": "object", "properties": {"a": number, "b": number}}}
    model.replies = [Reply(calls=[("math_add", {"a": 1, "b": 2})]), Reply({"a": "done"})]
    async with Served(server.app) as served:
        flock = flock_of(f"{served.url}/mcp", only=["math.add"], needs_approval=lambda a, b: a > 0)
        async with flock.engine(transport=model.transport) as engine:
            run = await engine.submit("ask", {})
            run = await engine.wait(run.run_id, PATIENCE_S)
            (question,) = run.waiting_for
            assert question.question == "May ask call math_add?"
            wrong = msgspec.Raw(b'{"approved":true,"arguments":{"a":"x","b":2}}')
            with pytest.raises(InvalidData, match="/output/arguments/a"):
                await engine.answer_call(run.run_id, question.call_id, wrong)
            edited = msgspec.Raw(b'{"approved":true,"arguments":{"a":5,"b":2}}')
            await engine.answer_call(run.run_id, question.call_id, edited)
            run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error
    assert str(model.requests[-1]["messages"][-1]["content"]).endswith("The result: 7")
    assert [tool["function"]["name"] for tool in model.requests[0]["tools"]] == ["math_add"]


async def test_a_tool_that_a_server_does_not_have_is_not_left_out_in_silence(model: FakeModel) -> None:
    server = FakeServer()
    async with Served(server.app) as served:
        flock = flock_of(f"{served.url}/mcp", only=["refund"])
        async with flock.engine(transport=model.transport) as engine:
            run = await engine.submit("ask", {})
            run = await engine.wait(run.run_id, PATIENCE_S)
    assert "has no tool 'refund' (only=). Its tools: " in (run.error or "")
    with pytest.raises(DefinitionError, match="only= must be a list of names"):
        mcp_tools("https://example.com/mcp", only="refund")


async def check_listing_fails(flock: Flock, text: str, model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    async with flock.engine(transport=model.transport) as engine:
        await until(lambda: f"{text} Its tools are listed again when an agent needs them." in caplog.text)
        run = await engine.submit("ask", {})
        run = await engine.wait(run.run_id, PATIENCE_S)
    assert (run.error, run.error_type) == (text, "call_error")


@pytest.mark.parametrize("sends_events", [False, True], ids=["JSON", "events"])
async def test_the_tools_of_a_server_are_listed_and_called(sends_events: bool, model: FakeModel) -> None:
    server = FakeServer(sends_events=sends_events)
    async with Served(server.app) as served:
        flock = flock_of(f"{served.url}/mcp")
        assert await result_of_call(flock, model) == "3"
    assert [method for method, _ in server.requests][:2] == ["initialize", "notifications/initialized"]
    listed = [tool["function"] for tool in model.requests[0]["tools"]]
    assert [tool["name"] for tool in listed] == ["math_add", "finish_"]
    assert listed[0]["parameters"] == ADD["inputSchema"]
    method, params = server.requests[-1]
    assert method == "tools/call"
    assert params.pop("_meta").keys() == {"progressToken"}
    assert params == {"name": "math.add", "arguments": {"a": 1, "b": 2}}
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert server.headers[-1]["mcp-session-id"] == server.sessions[-1]
    assert server.headers[-1]["mcp-protocol-version"] == "2025-06-18"


async def test_the_text_of_an_event_may_have_any_characters(model: FakeModel) -> None:
    """U+2028 separates lines in Unicode, but not in events."""

    async def reply(message: Any) -> Response:
        result = {"content": [{"type": "text", "text": "a\u2028b\x85c"}]}
        body = json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}, ensure_ascii=False)
        return Response(f"data: {body}\n\n", media_type="text/event-stream")

    server = FakeServer()
    server.reply = reply
    async with Served(server.app) as served:
        assert await result_of_call(flock_of(f"{served.url}/mcp"), model) == "a\u2028b\x85c"


async def test_tools_are_listed_when_the_engine_starts(open_engine: OpenEngine) -> None:
    server = FakeServer()
    async with Served(server.app) as served, open_engine(flock_of(f"{served.url}/mcp")):
        await until(lambda: ("tools/list", {"cursor": "more"}) in server.requests)


async def test_a_server_that_is_down_is_a_warning_and_its_tools_are_listed_again(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run fails if its deadline is before the next attempt, with an error that names the server, but no secret."""
    flock = flock_of(f"http://ann:secret@127.0.0.1:{(port := free_port())}/mcp?key=secret")
    text = f"The MCP server http://127.0.0.1:{port}/mcp could not be reached (ConnectError)."
    monkeypatch.setattr("flock.agents.tools.LIST_PAUSE_S", PATIENCE_S)
    monkeypatch.setattr("flock.agents.tools.MAX_LIST_PAUSE_S", PATIENCE_S)
    async with flock.engine(transport=model.transport) as engine:
        await until(lambda: text in caplog.text)
        run = await engine.submit("ask", {}, timeout_s=PATIENCE_S / 2)
        run = await engine.wait(run.run_id, PATIENCE_S)
        assert (run.error, run.error_type) == (text, "call_error")
    assert "Its tools are listed again when an agent needs them." in caplog.text
    server = FakeServer()
    async with Served(server.app) as served:
        flock.agents["ask"].tools[0]._url = f"{served.url}/mcp"  # type: ignore[attr-defined]
        assert await result_of_call(flock, model) == "3"


async def test_a_server_that_was_down_is_tried_again_within_the_deadline_of_a_run(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    """The run says what it waits for."""
    model.replies = [Reply(calls=[("math_add", {"a": 1, "b": 2})]), Reply({"a": "done"})]
    flock = flock_of(f"http://127.0.0.1:{(port := free_port())}/mcp")
    async with open_engine(flock, transport=model.transport) as engine:
        run = await engine.submit("ask", {})
        waiting = await until_run(engine, run.run_id, lambda run: run.progress is not None or run.status.is_final)
        assert waiting.progress is not None, waiting.error
        expected = (
            f"The MCP server http://127.0.0.1:{port}/mcp could not be reached (ConnectError). Waiting to try again"
        )
        assert waiting.progress.message.startswith(expected)
        async with Served(FakeServer().app, port=port):
            run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error
    assert model.requests[-1]["messages"][-1]["content"] == "3"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        pytest.param(
            {"type": "object", "properties": {"a": {"properties": 5}}}, "properties is not an object", id="map"
        ),
        pytest.param({"$defs": [{}]}, "$defs is not an object", id="list"),
        pytest.param({"anyOf": 5}, "anyOf is not an array", id="anyOf"),
    ],
)
async def test_an_invalid_schema_is_a_warning_and_the_error_of_a_run(
    schema: Any, reason: str, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeServer()
    server.first_tool = ADD | {"inputSchema": schema}
    async with Served(server.app) as served:
        text = f"The MCP server {served.url}/mcp lists the tool 'math.add' with an invalid inputSchema: {reason}."
        await check_listing_fails(flock_of(f"{served.url}/mcp"), text, model, caplog)


@pytest.mark.parametrize("schema", [[], {"type": "object", "properties": []}], ids=["schema", "properties"])
async def test_an_empty_list_is_an_empty_map(schema: Any, model: FakeModel) -> None:
    """PHP encodes an empty map in this way."""
    server = FakeServer()
    server.first_tool = ADD | {"inputSchema": schema}
    async with Served(server.app) as served:
        assert await result_of_call(flock_of(f"{served.url}/mcp"), model, {}) == "0"
    assert model.requests[0]["tools"][0]["function"]["parameters"] == {"type": "object", "properties": {}}


@pytest.mark.parametrize("is_session_id", [True, False], ids=["session ID", "protocol version"])
async def test_what_cannot_be_a_header_is_a_warning_and_the_error_of_a_run(
    is_session_id: bool, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    server = FakeServer()
    if is_session_id:
        server.session_name = "s\u00e9ssion"
    else:
        server.version = "\u2028"
    async with Served(server.app) as served:
        text = f"The MCP server {served.url}/mcp sent a session ID or a protocol version that is not ASCII."
        await check_listing_fails(flock_of(f"{served.url}/mcp"), text, model, caplog)


async def test_no_error_of_a_source_of_tools_ends_the_engine(
    model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ToolSource):
        name = "broken"

        async def tools(self) -> Sequence[Tool]:
            raise RuntimeError("no \ud800")

        def __repr__(self) -> str:
            return "<Broken>"

    flock = Flock("mcp", model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("ask", output="a: str", tools=[Broken()]))
    flock.add_agent(FlockFactory.create_default_agent("other", output="a: str"))
    model.replies = [Reply({"a": "done"})]
    async with flock.engine(transport=model.transport) as engine:
        await until(lambda: "<Broken> failed (RuntimeError: no ?). Its tools are listed again" in caplog.text)
        run = await engine.submit("other", {})
        assert (await engine.wait(run.run_id, PATIENCE_S)).status is RunStatus.COMPLETED


@pytest.mark.parametrize("has_sessions", [True, False])
async def test_an_expired_session_is_opened_again(has_sessions: bool, model: FakeModel) -> None:
    server = FakeServer()
    server.has_sessions = has_sessions
    async with Served(server.app) as served:
        flock = flock_of(f"{served.url}/mcp")
        await result_of_call(flock, model)
        server.sessions.append("another")
        assert await result_of_call(flock, model) == "3"


@pytest.mark.parametrize(
    ("body", "result"),
    [
        pytest.param(
            {"error": {"code": -32602, "message": "No\nway"}},
            "reports an error: No\\nway.",
            id="an error of the server",
        ),
        pytest.param(
            {"result": {"content": [{"type": "text", "text": "No such city."}], "isError": True}},
            "Error: No such city.",
            id="an error of the tool",
        ),
        pytest.param(
            {
                "result": {
                    "content": [
                        {"type": "text", "text": "one"},
                        {"type": "image", "data": base64.b64encode(bytes(3210)).decode(), "mimeType": "image/png"},
                        {"type": "audio", "data": "AAA=", "mimeType": "audio/wav"},
                        {"type": "resource", "resource": {"uri": "file:///a", "text": "two"}},
                        {"type": "resource", "resource": {"uri": "file:///c", "mimeType": "x/y", "blob": "AA=="}},
                        {"type": "resource_link", "uri": "file:///b", "name": "b", "size": 12345},
                        {"type": "new"},
                    ]
                }
            },
            "one\n[image image/png, 3,210 bytes]\n[audio audio/wav, 2 bytes]\ntwo\n"
            "[resource file:///c x/y, 1 bytes]\n[resource_link file:///b b, 12,345 bytes]\n[new]",
            id="parts",
        ),
        pytest.param({"result": {"content": [], "structuredContent": {"n": 1}}}, '{"n":1}', id="structured"),
        pytest.param({"result": {"content": 5}}, "returned an invalid result of tools/call", id="invalid result"),
        pytest.param(Response("no", 500), "returned status 500.", id="status"),
        pytest.param(Response("{", media_type="application/json"), "sent an invalid message", id="invalid JSON"),
        pytest.param(Response("", media_type="text/event-stream"), "closed the connection without a", id="no event"),
    ],
)
async def test_what_a_server_answers_reaches_the_model(body: Any, result: str, model: FakeModel) -> None:
    server = FakeServer()

    async def reply(message: Any) -> Any:
        return body if isinstance(body, Response) else {"jsonrpc": "2.0", "id": message["id"], **body}

    server.reply = reply
    async with Served(server.app) as served:
        text = await result_of_call(flock_of(f"{served.url}/mcp"), model)
    assert result in text
    assert text.startswith("Error: ") or text == result


def event_of(message: Any) -> str:
    return f"data: {json.dumps({'jsonrpc': '2.0', **message})}\n\n"


@pytest.mark.parametrize("method", ["elicitation/create", "sampling/createMessage", "roots/list", "ping"])
async def test_a_request_of_a_server_is_answered_at_once(method: str, model: FakeModel) -> None:
    """Only a ping is supported. The error of any other one is that of the protocol, so the server can go on."""
    server = FakeServer()

    async def reply(message: Any) -> Response:
        async def write() -> AsyncIterator[str]:
            yield event_of({"id": "its own", "method": method, "params": {"message": "Who?"}})
            await server.answered.wait()
            yield event_of({"id": message["id"], "result": {"content": [{"type": "text", "text": "went on"}]}})

        return StreamingResponse(write(), media_type="text/event-stream")

    server.reply = reply
    async with Served(server.app) as served:
        assert await result_of_call(flock_of(f"{served.url}/mcp", timeout_s=PATIENCE_S), model) == "went on"
    (answer,) = server.answers
    if method == "ping":
        assert answer == {"jsonrpc": "2.0", "id": "its own", "result": {}}
    else:
        error = {"code": -32601, "message": f"This client does not support {method}."}
        assert answer == {"jsonrpc": "2.0", "id": "its own", "error": error}


async def test_the_progress_of_a_tool_is_that_of_its_run(open_engine: OpenEngine, model: FakeModel) -> None:
    """Notifications that are invalid, or of another request, are ignored."""
    server, seen = FakeServer(), anyio.Event()

    async def reply(message: Any) -> Response:
        async def write() -> AsyncIterator[str]:
            token = message["params"]["_meta"]["progressToken"]
            for params in (
                {"progressToken": token, "progress": 3, "total": 8, "message": "digging"},
                {"progressToken": token, "progress": "x"},
                {"progressToken": "another", "progress": 7},
                5,
            ):
                yield event_of({"method": "notifications/progress", "params": params})
            await seen.wait()
            yield event_of({"id": message["id"], "result": {"content": [{"type": "text", "text": "dug"}]}})

        return StreamingResponse(write(), media_type="text/event-stream")

    server.reply = reply
    model.replies = [Reply(calls=[("math_add", {})]), Reply({"a": "done"})]
    async with (
        Served(server.app) as served,
        open_engine(flock_of(f"{served.url}/mcp", timeout_s=PATIENCE_S), transport=model.transport) as engine,
    ):
        run = await engine.submit("ask", {})
        shown = await until_run(engine, run.run_id, lambda run: run.progress is not None or run.status.is_final)
        assert shown.progress == Progress(done=3, total=8, message="digging"), shown.error
        seen.set()
        run = await engine.wait(run.run_id, PATIENCE_S)
    assert run.status is RunStatus.COMPLETED, run.error


@pytest.mark.parametrize("type_", ["application/json", "text/event-stream"])
async def test_a_compressed_answer_of_a_server_is_read_up_to_a_limit(type_: str, model: FakeModel) -> None:
    """It is an error for the model, and 16 MiB are read of the 256 MiB that 0.3 MiB of gzip have."""

    async def reply(message: Any) -> Response:
        return Response(gzip_bomb(), media_type=type_, headers={"Content-Encoding": "gzip"})

    server = FakeServer()
    server.reply = reply
    async with Served(server.app) as served:
        gzip_bomb()
        with little_memory():
            text = await result_of_call(flock_of(f"{served.url}/mcp"), model)
    assert text == f"Error: The MCP server {served.url}/mcp sent an answer that is too long (more than 16777216 bytes)."


async def test_the_list_of_tools_has_a_limit_over_all_pages(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bodies, "MAX_MESSAGE_BYTES", 3000)
    server = FakeServer()
    server.first_tool = ADD | {"description": "x" * 2000}
    server.last_tool = FINISH | {"description": "x" * 2000}
    async with Served(server.app) as served:
        text = f"The MCP server {served.url}/mcp sent an answer that is too long (more than 3000 bytes)."
        await check_listing_fails(flock_of(f"{served.url}/mcp"), text, model, caplog)


@pytest.mark.parametrize("is_first", [True, False], ids=["initialize", "initialized"])
async def test_no_answer_to_the_opening_of_a_session_is_a_bomb(
    is_first: bool, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    async def explode(request: Request) -> Response:
        message = await request.json()
        if is_first or message["method"] == "notifications/initialized":
            return Response(gzip_bomb(), media_type="application/json", headers={"Content-Encoding": "gzip"})
        result = {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": {}}
        return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "result": result})

    async with Served(Starlette(routes=[Route("/mcp", explode, methods=["POST"])])) as served:
        gzip_bomb()
        text = f"The MCP server {served.url}/mcp sent an answer that is too long (more than 16777216 bytes)."
        with little_memory():
            await check_listing_fails(flock_of(f"{served.url}/mcp"), text, model, caplog)


async def test_equal_names_of_two_servers_need_a_prefix(model: FakeModel, caplog: pytest.LogCaptureFixture) -> None:
    async with Served(FakeServer().app) as first, Served(FakeServer().app) as second:
        for prefix, names in (("", None), ("other-", ["math_add", "finish_", "other-math_add", "other-finish"])):
            tools = [mcp_tools(f"{first.url}/mcp"), mcp_tools(f"{second.url}/mcp", prefix=prefix)]
            flock = Flock("mcp", model="openai/gpt-4o")
            flock.add_agent(FlockFactory.create_default_agent("ask", output="a: str", tools=tools))
            model.replies = [] if names is None else [Reply({"a": "done"})]
            async with flock.engine(transport=model.transport) as engine:
                run = await engine.submit("ask", {})
                run = await engine.wait(run.run_id, PATIENCE_S)
            if names is None:
                assert run.status is RunStatus.FAILED
                assert "There are two tools 'math_add'. Rename one" in caplog.text
            else:
                assert [tool["function"]["name"] for tool in model.requests[0]["tools"]] == names


async def test_a_server_that_hangs_is_an_error_for_the_model(model: FakeModel) -> None:
    server = FakeServer()

    async def hang(message: Any) -> Any:
        await asyncio.sleep(PATIENCE_S)

    server.reply = hang
    async with Served(server.app) as served:
        flock = flock_of(f"{served.url}/mcp", timeout_s=2)  # also the time to list the tools
        assert "did not answer within 2 s (timeout_s)" in await result_of_call(flock, model)
        served.server.force_exit = True


async def test_the_schemas_of_other_programs_work_without_native_tools(model: FakeModel) -> None:
    """They may have lists of types, and booleans in place of schemas."""
    node = {"type": ["array", "null"], "description": "numbers", "items": {"type": ["string", "integer"]}}
    schema = {"type": "object", "properties": {"a": node, "b": True, "c": {"items": True}}, "$schema": "http://x"}
    tool = MCPTool(mcp_tools("http://127.0.0.1/mcp"), msgspec.convert({"name": "x", "inputSchema": schema}, ListedTool))
    assert tool.schema.schema["properties"] == {
        "a": {
            "description": "numbers",
            "anyOf": [
                {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                {"type": "null", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
            ],
        },
        "b": {},
        "c": {"items": {}},
    }
    assert bounded_schema(schema_of([tool.schema]))["anyOf"]
    model.replies = [Failure(400, message="no tools"), Reply({"next_tool_name": "finish"}), Reply({"a": "done"})]
    flock = Flock("mcp", model="ollama/x")
    flock.add_agent(FlockFactory.create_default_agent("ask", output="a: str", tools=[tool]))
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {})
        assert (await engine.wait(run.run_id, PATIENCE_S)).status is RunStatus.COMPLETED


async def test_arguments_must_be_an_object(model: FakeModel) -> None:
    server = FakeServer()
    async with Served(server.app) as served:
        text = await result_of_call(flock_of(f"{served.url}/mcp"), model, "[1]")
    assert text.startswith("Error: The arguments are invalid. ")
    assert "tools/call" not in dict(server.requests)


@pytest.mark.parametrize("url", ["", "example.com/mcp", "ftp://example.com", "stdio:server"])
def test_an_invalid_url_is_an_error_at_the_definition(url: str) -> None:
    with pytest.raises(DefinitionError, match="is not the URL of an MCP server"):
        mcp_tools(url)


SDK_SERVER = """
import sys
from mcp.server.mcpserver import MCPServer

server = MCPServer("shop")

@server.tool()
def stock(item: str, most: int = 100) -> int:
    \"\"\"Find how many pieces of an item are in stock.\"\"\"
    return min(most, {"cup": 12}[item])

server.run("streamable-http", port=int(sys.argv[1]), json_response=sys.argv[2] == "json")
"""


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def sdk_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment with the SDK. It finds the dependencies that this one has, too."""
    python = new_environment(tmp_path_factory.mktemp("mcp"), with_ours=True)
    subprocess.run(pip(python, "install", "--quiet", "mcp>=2.3,<3"), check=True, capture_output=True)
    return python


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["json", "events"])
async def test_the_server_of_the_sdk_is_understood(
    format_: str, sdk_python: Path, tmp_path: Path, model: FakeModel
) -> None:
    (tmp_path / "server.py").write_text(SDK_SERVER)
    port = free_port()
    command = [str(sdk_python), str(tmp_path / "server.py"), str(port), format_]
    async with await anyio.open_process(command, stdout=None, stderr=None) as process:
        await until(lambda: is_open(port))
        calls = [("stock", {"item": "cup"}), ("stock", {"item": "pot"}), ("stock", {"most": "x"})]
        model.replies = [Reply(calls=[*calls]), Reply({"a": "done"})]
        async with flock_of(f"http://127.0.0.1:{port}/mcp").engine(transport=model.transport) as engine:
            run = await engine.submit("ask", {})
            run = await engine.wait(run.run_id, PATIENCE_S)
        assert run.status is RunStatus.COMPLETED, run.error
        process.kill()
    (tool,) = model.requests[0]["tools"]
    assert tool["function"]["description"] == "Find how many pieces of an item are in stock."
    assert list(tool["function"]["parameters"]["properties"]) == ["item", "most"]
    found, *failed = [message["content"] for message in model.requests[1]["messages"][-3:]]
    assert found == "12"
    assert all(text.startswith("Error: ") for text in failed), failed

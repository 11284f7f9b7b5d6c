"""Agents as tools of the Model Context Protocol, in its latest revision and in the older ones."""

import base64
import contextlib
import io
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock.agents.tools import Tool
from flock.command import stdio
from flock.command.stdio import serve_lines
from flock.core import File, Flock, FlockFactory, Image
from flock.protocols import jsonrpc, mcp
from flock.runs import RunContext, RunStatus
from flock.runs.records import LONG_BYTES
from flock.testing import FakeModel, Reply
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for
from tests.support.engines import until, until_run
from tests.support.flocks import Gate, sample_flock
from tests.support.http import client_of, events_in, get, left, wait_until
from tests.support.servers import Served, flockapi_command
from tests.support.sockets import little_memory
from tests.test_approval import Till
from tests.test_tools import flock_of

pytestmark = pytest.mark.anyio

FORMS: dict[str, Any] = {"elicitation": {}}


def served(flock: Flock, **options: Any) -> FlockAPI:
    return create_app(flock, **{"protocols": ["mcp"], "store": ":memory:", "auth": "host", **options})


@pytest.fixture
async def app(model: FakeModel) -> AsyncIterator[FlockAPI]:
    flock = sample_flock()

    @flock.agent
    async def write(topic: str) -> AsyncIterator[str]:
        yield "All about "
        yield topic

    made = served(flock, server_name="Sample", engine=flock.engine(store=":memory:", transport=model.transport))
    async with made.lifespan():
        yield made


def body_of(method: str, params: Any = None, id_: Any = 1, **more: Any) -> dict[str, Any]:
    """Return a request of an older revision."""
    return {"jsonrpc": "2.0", "id": id_, "method": method, "params": {**(params or {}), **more}}


def latest(method: str, capabilities: Any = None, id_: Any = 1, **params: Any) -> dict[str, Any]:
    """Return a request of the latest revision."""
    meta = {mcp.VERSION: mcp.LATEST, mcp.CAPABILITIES: capabilities or {}, **params.pop("meta", {})}
    return body_of(method, {**params, "_meta": meta}, id_)


def headers_of(body: Any) -> dict[str, str]:
    params = body["params"]
    name = params.get("name") or params.get("uri")
    headers = {"MCP-Protocol-Version": params["_meta"][mcp.VERSION], "Mcp-Method": body["method"]}
    return {**headers, **({"Mcp-Name": name} if name else {})}


async def post(client: httpx.AsyncClient, body: Any, headers: Any = None, **more: str) -> httpx.Response:
    if headers is None:
        headers = headers_of(body) if mcp.VERSION in body["params"].get("_meta", {}) else {}
    accept = {"Accept": "application/json, text/event-stream"}
    return await client.post("/mcp", json=body, headers={**accept, **headers, **more})


async def result_of(client: httpx.AsyncClient, body: Any, **headers: str) -> Any:
    response = await post(client, body, **headers)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["jsonrpc"], answer["id"]) == ("2.0", body["id"])
    return answer["result"]


async def error_of(client: httpx.AsyncClient, body: Any, status: int, headers: Any = None, **more: str) -> Any:
    response = await post(client, body, headers, **more)
    assert response.status_code == status, response.text
    answer = response.json()
    assert answer["jsonrpc"] == "2.0"
    assert "result" not in answer
    return answer["error"]


async def call(client: httpx.AsyncClient, name: str, arguments: Any = None, **more: Any) -> Any:
    capabilities = more.pop("capabilities", FORMS)
    return await result_of(client, latest("tools/call", capabilities, name=name, arguments=arguments or {}, **more))


def text_in(result: Any) -> str:
    return "".join(part.get("text", "") for part in result["content"])


async def session_of(client: httpx.AsyncClient, version: str = mcp.OLDER[0]) -> dict[str, str]:
    """Return the headers of a session of an older revision."""
    response = await post(client, body_of("initialize", protocolVersion=version, capabilities={}))
    assert response.json()["result"]["protocolVersion"] == version
    headers = {"Mcp-Session-Id": response.headers["Mcp-Session-Id"], "MCP-Protocol-Version": version}
    note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    done = await client.post("/mcp", json=note, headers=headers)
    assert (done.status_code, done.content) == (202, b"")
    return headers


# Revisions


async def test_a_client_of_the_latest_revision_discovers_the_server(client: httpx.AsyncClient) -> None:
    found = await result_of(client, latest("server/discover"))
    assert found["supportedVersions"] == ["2026-07-28", "2025-11-25", "2025-06-18", "2025-03-26"]
    assert found["capabilities"] == {"tools": {}, "resources": {}}
    assert (found["resultType"], found["cacheScope"]) == ("complete", "private")
    assert found["ttlMs"] > 0
    about = found["_meta"]["io.modelcontextprotocol/serverInfo"]
    assert (about["name"], about["title"]) == ("flockapi", "Sample")


@pytest.mark.parametrize("version", mcp.OLDER)
async def test_an_older_client_initializes_and_calls_a_tool(client: httpx.AsyncClient, version: str) -> None:
    headers = await session_of(client, version)
    assert await result_of(client, body_of("ping"), **headers) == {}
    result = await result_of(client, body_of("tools/call", name="add", arguments={"a": 1}), **headers)
    assert result["structuredContent"] == {"result": 3}
    assert "resultType" not in result


async def test_initialize_offers_the_newest_older_revision_for_an_unknown_one(client: httpx.AsyncClient) -> None:
    for version in ("1999-01-01", mcp.LATEST):
        result = await result_of(client, body_of("initialize", protocolVersion=version, capabilities={}))
        assert result["protocolVersion"] == mcp.OLDER[0]


async def test_a_client_without_any_header_can_call_a_tool(client: httpx.AsyncClient) -> None:
    body = body_of("tools/call", name="add", arguments={"a": 1, "b": 1}, id_="x")
    response = await client.post("/mcp", json=body)
    assert response.json()["result"]["structuredContent"] == {"result": 2}
    assert response.json()["id"] == "x"


@pytest.mark.parametrize("method", ["initialize", "ping", "logging/setLevel", "resources/subscribe", "nothing", "x/y"])
async def test_an_unknown_method_is_404(client: httpx.AsyncClient, method: str) -> None:
    """Those that the latest revision has removed, too."""
    error = await error_of(client, latest(method), 404)
    assert error["code"] == -32601
    assert method in error["message"]


@pytest.mark.parametrize("method", ["server/discover", "logging/setLevel", "prompts/list", "completion/complete"])
async def test_an_unknown_method_does_not_end_the_session_of_an_older_client(
    client: httpx.AsyncClient, method: str
) -> None:
    """Their clients begin a new session after 404."""
    assert (await error_of(client, body_of(method), 200))["code"] == -32601


async def test_a_revision_that_is_not_served_is_an_error_that_lists_those_that_are(client: httpx.AsyncClient) -> None:
    body = latest("tools/list", meta={mcp.VERSION: "2030-01-01"})
    error = await error_of(client, body, 400)
    assert error["code"] == -32022
    assert error["data"] == {"supported": list(mcp.VERSIONS), "requested": "2030-01-01"}
    error = await error_of(client, body_of("tools/list"), 400, {"MCP-Protocol-Version": "1999-01-01"})
    assert error["code"] == -32022


@pytest.mark.parametrize("missing", [mcp.VERSION, mcp.CAPABILITIES, "_meta"])
async def test_a_request_of_the_latest_revision_says_what_its_client_can_do(
    client: httpx.AsyncClient, missing: str
) -> None:
    body = latest("tools/list")
    headers = headers_of(body)
    body["params"].pop(missing, None)
    body["params"].get("_meta", {}).pop(missing, None)
    error = await error_of(client, body, 400, headers)
    assert error["code"] == -32602
    assert "io.modelcontextprotocol" in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"MCP-Protocol-Version": "2025-11-25"},
        {"Mcp-Method": "tools/list"},
        {"Mcp-Method": "Tools/Call"},
        {"Mcp-Method": ""},
        {"Mcp-Name": "summarise"},
        {"Mcp-Name": ""},
        {"Mcp-Name": "=?base64?!!?="},
        {"Mcp-Name": "=?base64?eA==?="},
    ],
    ids=str,
)
async def test_headers_that_disagree_with_the_body_are_an_error(client: httpx.AsyncClient, headers: Any) -> None:
    body = latest("tools/call", name="add", arguments={"a": 1})
    sent = {name: value for name, value in {**headers_of(body), **headers}.items() if value}
    error = await error_of(client, body, 400, sent)
    assert error["code"] == -32020
    assert next(iter(headers)).lower() in error["message"]


async def test_a_name_in_base64_is_compared_as_what_it_means(client: httpx.AsyncClient) -> None:
    encoded = f"=?base64?{base64.b64encode(b'add').decode()}?="
    body = latest("tools/call", name="add", arguments={"a": 1})
    response = await post(client, body, {**headers_of(body), "Mcp-Name": encoded})
    assert response.json()["result"]["structuredContent"] == {"result": 3}


async def test_a_header_that_is_sent_twice_is_an_error(client: httpx.AsyncClient) -> None:
    body = latest("tools/call", name="add", arguments={"a": 1})
    headers = [*headers_of(body).items(), ("Mcp-Name", "add")]
    response = await client.post("/mcp", json=body, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, -32020)


# Messages


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("{", -32700),
        ("", -32700),
        ("1", -32600),
        ("{}", -32600),
        ('{"jsonrpc": "1.0", "id": 1, "method": "ping"}', -32600),
        ('{"jsonrpc": "2.0", "id": [1], "method": "ping"}', -32600),
        ('{"jsonrpc": "2.0", "id": 1.5, "method": "ping"}', -32600),
        ('{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600),
        ('{"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": []}', -32602),
        ('{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": 1}}', -32602),
    ],
)
async def test_a_message_that_is_not_valid_is_400(client: httpx.AsyncClient, body: str, code: int) -> None:
    response = await client.post("/mcp", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


async def test_a_progress_token_of_a_megabyte_is_refused(client: httpx.AsyncClient) -> None:
    """It would be repeated in each notification."""
    body = latest("tools/call", name="write", arguments={"topic": "tea"}, meta={"progressToken": "x" * 900_000})
    assert (await error_of(client, body, 400))["code"] == -32602


async def test_a_response_and_an_unknown_notification_are_accepted(client: httpx.AsyncClient) -> None:
    for body in ({"jsonrpc": "2.0", "id": 1, "result": {}}, {"jsonrpc": "2.0", "method": "notifications/x"}):
        response = await client.post("/mcp", json=body)
        assert (response.status_code, response.content) == (202, b"")


async def test_a_batch_is_answered_in_the_revision_that_has_them(client: httpx.AsyncClient) -> None:
    note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
    calls = [body_of("tools/call", name="add", arguments={"a": at}, id_=at) for at in range(2)]
    token = body_of("tools/call", {"_meta": {"progressToken": 1}}, name="write", arguments={"topic": "tea"}, id_="w")
    response = await client.post("/mcp", json=[*calls, note, token, body_of("x", id_=9), 5])
    answers = response.json()
    assert [answer["id"] for answer in answers] == [0, 1, "w", 9, None]
    assert [answer["result"]["structuredContent"] for answer in answers[:3]] == [
        {"result": 2},
        {"result": 3},
        {"result": "All about tea"},
    ]
    assert [answer["error"]["code"] for answer in answers[3:]] == [-32601, -32600]
    assert (await client.post("/mcp", json=[note])).status_code == 202


@pytest.mark.parametrize("messages", [0, 51])
async def test_a_batch_has_a_limit(client: httpx.AsyncClient, messages: int) -> None:
    response = await client.post("/mcp", json=[body_of("ping")] * messages)
    assert (response.status_code, response.json()["error"]["code"]) == (400, -32600)


@pytest.mark.parametrize("version", [mcp.LATEST, "2025-11-25", "2025-06-18"])
async def test_a_batch_is_refused_by_the_other_revisions(client: httpx.AsyncClient, version: str) -> None:
    response = await client.post("/mcp", json=[body_of("ping")], headers={"MCP-Protocol-Version": version})
    assert (response.status_code, response.json()["error"]["code"]) == (400, -32600)


async def test_initialize_is_refused_in_a_batch(client: httpx.AsyncClient) -> None:
    response = await client.post("/mcp", json=[body_of("initialize")])
    assert response.json()[0]["error"]["code"] == -32601


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT"])
async def test_other_methods_of_http_are_405(client: httpx.AsyncClient, method: str) -> None:
    response = await client.request(method, "/mcp")
    assert response.headers["Allow"] == "POST"
    check_error(response, 405)


async def test_errors_of_access_are_errors_of_json_rpc_with_their_status() -> None:
    app = served(sample_flock(), auth=None, api_keys={"ann": "a" * 20}, allowed_hosts=["t"], max_body_bytes=200)
    async with app.lifespan(), client_of(app) as client:
        response = await post(client, body_of("tools/list"))
        check_error(response, 401)
        assert response.headers["WWW-Authenticate"].startswith('Bearer realm="')
        key = {"Authorization": f"Bearer {'a' * 20}"}
        assert (await post(client, body_of("tools/list"), **key)).status_code == 200
        for status, headers in ((403, {"Origin": "https://evil.example"}), (421, {"Host": "evil.example"})):
            check_error(await post(client, body_of("tools/list"), **key, **headers), status)
        check_error(await client.post("/mcp", content="{}", headers={**key, "Content-Type": "text/plain"}), 415)
        check_error(await post(client, body_of("ping", x="x" * 200), **key), 413)


def check_error(response: httpx.Response, status: int, code: int = jsonrpc.OTHER_ERROR) -> None:
    """Check an error that no method has raised."""
    body = response.json()
    assert (response.status_code, body["jsonrpc"], body["error"]["code"]) == (status, "2.0", code), response.text
    assert body["error"]["data"]["request_id"] == response.headers["X-Request-ID"]


async def test_a_full_server_says_when_to_try_again(model: FakeModel) -> None:
    app = served(sample_flock(), max_requests_per_minute=1)
    async with app.lifespan(), client_of(app) as client:
        await post(client, body_of("ping"))
        response = await post(client, body_of("ping"))
        check_error(response, 429)
        assert int(response.headers["Retry-After"]) > 0


async def test_errors_of_the_server_are_errors_of_json_rpc(app: FlockAPI, client: httpx.AsyncClient) -> None:
    body = body_of("tools/call", name="add", arguments={"a": 1})
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(app.engine, "submit", None)
        check_error(await post(client, body), 500, jsonrpc.INTERNAL_ERROR)
    await app.engine.drain(0)
    response = await post(client, body)
    check_error(response, 503)
    assert int(response.headers["Retry-After"]) > 0


async def test_a_page_of_an_allowed_origin_may_send_and_read_the_headers_of_mcp() -> None:
    app = served(sample_flock(), cors_origins=["https://inspector.example"])
    async with app.lifespan(), client_of(app) as client:
        wanted = "mcp-protocol-version, mcp-session-id, mcp-method, mcp-name, content-type, authorization"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": wanted}
        origin = {"Origin": "https://inspector.example"}
        assert (await client.options("/mcp", headers={**origin, **asked})).status_code == 200
        response = await post(client, body_of("initialize"), **origin)
        assert "Mcp-Session-Id" in response.headers["Access-Control-Expose-Headers"]


async def test_without_the_protocol_there_is_no_route() -> None:
    app = served(sample_flock(), protocols=[])
    async with app.lifespan(), client_of(app) as client:
        assert (await post(client, body_of("ping"))).status_code == 404


# Tools


async def test_agents_are_listed_as_tools(client: httpx.AsyncClient) -> None:
    listed = await result_of(client, latest("tools/list"))
    assert (listed["resultType"], listed["cacheScope"], listed["ttlMs"]) == ("complete", "private", mcp.LIST_TTL_MS)
    tools = {tool["name"]: tool for tool in listed["tools"]}
    assert list(tools)[:2] == ["text_analyzer", "add"]
    add, analyzer = tools["add"], tools["text_analyzer"]
    agent = await get(client, "/agents/add")
    assert add["inputSchema"] == agent["input_schema"]
    assert add["outputSchema"] == agent["output_schema"]
    assert add["description"] == "Adds two numbers."
    assert (analyzer["title"], analyzer["annotations"]["title"]) == ("Text analyzer", "Text analyzer")
    assert (analyzer["annotations"]["readOnlyHint"], add["annotations"]["readOnlyHint"]) == (True, False)
    older = await result_of(client, body_of("tools/list"))
    assert older == {"tools": listed["tools"]}


async def test_a_tool_has_the_outputs_of_the_last_agent_of_its_run() -> None:
    flock = Flock("chain")

    @flock.agent(next_agent="last")
    def first(text: str) -> str:
        return text

    @flock.agent(next_agent=lambda result: "last")
    def unknown(text: str) -> str:
        return text

    @flock.agent
    def last(result: str) -> int:
        return len(result)

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        tools = {tool["name"]: tool for tool in (await result_of(client, latest("tools/list")))["tools"]}
        assert tools["first"]["outputSchema"]["properties"]["result"] == {"type": "integer"}
        assert "outputSchema" not in tools["unknown"]
        result = await call(client, "first", {"text": "four"})
        assert (result["structuredContent"], text_in(result)) == ({"result": 4}, '{"result":4}')


async def test_tools_are_listed_in_pages() -> None:
    flock = Flock("many")
    for number in range(mcp.MAX_TOOLS + 1):
        flock.add_agent(FlockFactory.create_default_agent(name=f"a{number}", input="x: str", output="y: str"))
    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        first = await result_of(client, latest("tools/list"))
        assert len(first["tools"]) == mcp.MAX_TOOLS
        second = await result_of(client, latest("tools/list", cursor=first["nextCursor"]))
        assert [tool["name"] for tool in second["tools"]] == [f"a{mcp.MAX_TOOLS}"]
        assert "nextCursor" not in second
        assert (await error_of(client, latest("tools/list", cursor="nothing"), 400))["code"] == -32602


async def test_a_call_is_a_run_with_text_and_structured_content(client: httpx.AsyncClient) -> None:
    body = latest("tools/call", name="write", arguments={"topic": "tea"})
    response = await post(client, body)
    result = response.json()["result"]
    assert result["content"] == [{"type": "text", "text": "All about tea"}]
    assert result["structuredContent"] == {"result": "All about tea"}
    run = await get(client, f"/run/{result['_meta']['flockapi/run_id']}")
    assert (run["agent_name"], run["status"]) == ("write", "completed")
    assert response.headers["Flock-Run-Id"] == run["run_id"]


async def test_a_model_can_read_what_is_wrong_with_its_arguments(client: httpx.AsyncClient) -> None:
    for arguments, problem in (({}, "/inputs/a"), ({"a": "one"}, "/inputs/a"), ({"a": 1, "c": 2}, "/inputs/c")):
        result = await call(client, "add", arguments)
        assert result["isError"]
        assert "structuredContent" not in result
        assert problem in text_in(result), text_in(result)
    assert (await get(client, "/runs"))["runs"] == []


async def test_a_file_is_an_argument_as_a_data_url_an_id_or_a_content_block() -> None:
    flock = Flock("files")

    @flock.agent
    def look(photo: Image | None = None, more: list[File] = [], about: dict[str, Any] | None = None) -> str:  # noqa: B006
        shown = [f"{file.media_type} {file.name} {len(file.read())}" for file in (photo, *more) if file]
        return ", ".join(shown) + (f" {about['type']}" if about else "")

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        (tool,) = (await result_of(client, latest("tools/list")))["tools"]
        assert "A data URL, or a file_id." in json.dumps(tool["inputSchema"])
        stored = (await client.post("/files", content=b"GIF89a")).json()["file_id"]
        gif = {"mimeType": "image/gif", "blob": "R0lGODlh", "uri": "file:///photos/a%2Egif"}
        image = {"type": "image", "mimeType": "image/gif", "data": "R0lGODlh"}
        for photo in (
            "data:image/gif;name=a.gif;base64,R0lGODlh",
            {"file_id": stored, "name": "a.gif"},
            {"type": "resource", "resource": gif},
        ):
            result = await call(client, "look", {"photo": photo})
            assert text_in(result) == "image/gif a.gif 6"
        run = await get(client, f"/run/{result['_meta']['flockapi/run_id']}")
        uri = f"flock://run/{run['run_id']}"
        assert "R0lGODlh" not in json.dumps(await result_of(client, latest("resources/read", uri=uri)))
        note = {"type": "resource", "resource": {"uri": "note://1", "mimeType": "text/markdown", "text": "# Ä"}}
        sound = {"type": "audio", "mimeType": "audio/wav", "data": "UklGRgAAAABXQVZFZm10IA=="}
        result = await call(
            client, "look", {"photo": image, "more": [note, sound], "about": {"type": "image", "data": "x"}}
        )
        assert text_in(result) == "image/gif  6, text/plain 1 4, audio/wav  16 image", "only where a file is expected"


@pytest.mark.parametrize(
    ("photo", "problem"),
    [
        ("http://127.0.0.1/a.gif", "no address is fetched: send a data URL"),
        ({"type": "resource", "resource": {"uri": "http://127.0.0.1/a.gif"}}, "no address is fetched: send a data URL"),
        ({"type": "resource_link", "uri": "http://127.0.0.1/a.gif"}, "no address is fetched: send a data URL"),
        ({"type": "resource", "resource": {"data": "R0lGODlh"}}, "no address is fetched: send a data URL"),
        ({"type": "resource", "resource": "R0lGODlh"}, "no address is fetched: send a data URL"),
        ({"type": "image", "data": 7}, "no address is fetched: send a data URL"),
        ({"type": "image", "data": "R0lGODlh", "mimeType": "image/png"}, "declared as image/png"),
        ({"type": "image", "data": "#"}, "not valid"),
        ("data:image/png;base64,AA==", "declared as"),
    ],
)
async def test_an_argument_that_is_not_a_file_starts_nothing(photo: Any, problem: str) -> None:
    flock = Flock("files")

    @flock.agent
    def look(photo: Image) -> str:
        return ""

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        result = await call(client, "look", {"photo": photo})
        assert result["isError"]
        assert problem in text_in(result)
        assert (await get(client, "/runs"))["runs"] == []


async def test_an_unknown_tool_is_an_error_with_the_nearest_name(client: httpx.AsyncClient) -> None:
    error = await error_of(client, latest("tools/call", name="sumarise", arguments={}), 400)
    assert error["code"] == -32602
    assert "summarise" in error["message"]
    assert (await error_of(client, body_of("tools/call", name="nobody"), 200))["code"] == -32602


async def test_a_failed_run_is_a_result_with_its_error(client: httpx.AsyncClient) -> None:
    result = await call(client, "refuse", {"text": "this"})
    assert result["isError"]
    assert "this is more than I can do." in text_in(result)
    assert result["_meta"]["flockapi/run_id"] in text_in(result)
    assert "secret" not in text_in(await call(client, "explode", {"text": "x"}))


async def test_a_client_with_a_token_gets_the_text_as_progress(client: httpx.AsyncClient) -> None:
    for token in ("t", 7):
        body = latest("tools/call", name="write", arguments={"topic": "tea"}, meta={"progressToken": token})
        response = await post(client, body)
        assert response.headers["Content-Type"].startswith("text/event-stream")
        *notes, last = [event["data"] for event in events_in(response.text)]
        assert {note["method"] for note in notes} == {"notifications/progress"}
        assert {note["params"]["progressToken"] for note in notes} == {token}
        assert "".join(note["params"]["message"] for note in notes) == "All about tea"
        steps = [note["params"]["progress"] for note in notes]
        assert steps == sorted(set(steps))
        assert (last["id"], last["result"]["structuredContent"]) == (1, {"result": "All about tea"})
        assert last["result"]["resultType"] == "complete"


async def test_what_an_agent_reports_is_progress_that_increases() -> None:
    flock = Flock("reports")

    @flock.agent
    async def report(context: RunContext) -> int:
        for done in (0, 5, 3, 5, 10):
            context.progress(done, 10, f"at {done}")
            await anyio.sleep(0.3)  # only the latest progress is kept
        return 1

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        response = await post(client, latest("tools/call", name="report", meta={"progressToken": 1}))
        *notes, last = [event["data"] for event in events_in(response.text)]
        assert [note["params"]["progress"] for note in notes] == [0, 5, 10]
        assert {note["params"]["total"] for note in notes} == {10}
        assert last["result"]["structuredContent"] == {"result": 1}


async def test_without_events_in_accept_the_answer_is_json(client: httpx.AsyncClient) -> None:
    body = latest("tools/call", name="write", arguments={"topic": "tea"}, meta={"progressToken": 1})
    response = await post(client, body, Accept="application/json")
    assert response.json()["result"]["structuredContent"] == {"result": "All about tea"}


async def test_an_end_without_a_result_ends_the_stream_with_its_error(client: httpx.AsyncClient) -> None:
    body = latest("tools/call", name="refuse", arguments={"text": "this"}, meta={"progressToken": 1})
    (last,) = events_in((await post(client, body)).text)
    assert last["data"]["result"]["isError"]


async def test_a_long_result_is_not_repeated_as_text(client: httpx.AsyncClient) -> None:
    text = "x" * (LONG_BYTES + 1)
    result = await call(client, "summarise", {"text": text})
    assert len(text_in(result)) < 2000
    link = result["content"][1]
    assert link["type"] == "resource_link"
    read = await result_of(client, latest("resources/read", uri=link["uri"]))
    (content,) = read["contents"]
    assert (content["uri"], content["mimeType"], read["cacheScope"]) == (link["uri"], "application/json", "private")
    shown = json.loads(content["text"])
    assert (shown["status"], shown["result"]) == ("completed", result["structuredContent"])
    body = latest("tools/call", name="summarise", arguments={"text": text}, meta={"progressToken": 1})
    (last,) = events_in((await post(client, body)).text)
    assert last["data"]["result"]["structuredContent"] == result["structuredContent"]
    older = await result_of(client, body_of("tools/call", name="summarise", arguments={"text": text}))
    assert json.loads(text_in(older)) == result["structuredContent"]  # 2025-03-26 knows only texts


@pytest.mark.parametrize("body", ["[1,", '["\\ud800"]', '[{"jsonrpc": "2.0"}]x'])
async def test_a_batch_that_is_no_json_is_refused(client: httpx.AsyncClient, body: str) -> None:
    sent = await client.post("/mcp", content=body, headers={"Content-Type": "application/json"})
    assert (sent.status_code, sent.json()["error"]["code"]) == (400, jsonrpc.PARSE_ERROR)
    assert sent.json()["error"]["message"].startswith("This is not a valid message of JSON-RPC 2.0: ")


async def test_arguments_and_states_that_cannot_be_read_are_refused(client: httpx.AsyncClient) -> None:
    started = await post(client, body_of("initialize", protocolVersion="2025-06-18", capabilities={}))
    session = {"Mcp-Session-Id": started.headers["Mcp-Session-Id"], "Content-Type": "application/json"}
    body = '{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"add","arguments":{"a":1e999}}}'
    sent = await client.post("/mcp", content=body, headers=session)
    assert (sent.status_code, "error" in sent.json() or sent.json()["result"]["isError"]) == (200, True)
    state = base64.urlsafe_b64encode(b"[" * 60_000).decode() + ".x"
    again = latest("tools/call", FORMS, name="add", arguments={"a": 1}, requestState=state)
    assert (await post(client, again)).status_code == 400


# Resources


async def test_a_long_resource_is_never_whole_in_memory() -> None:
    """Its JSON is a string in JSON, so that it is escaped twice."""
    flock, text = Flock("long"), '"\\"\u2028é\n' * 200_000

    @flock.agent
    async def write() -> str:
        return text

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        run_id = (await call(client, "write"))["_meta"]["flockapi/run_id"]
        body = latest("resources/read", uri=f"flock://run/{run_id}")
        with little_memory(1_000_000):
            await left(app, "/mcp", body, anyio.sleep_forever, headers_of(body))
        (in_batch,) = (await post(client, [body_of("resources/read", uri=f"flock://run/{run_id}")], {})).json()
        for result in (await result_of(client, body), in_batch["result"]):
            assert json.loads(result["contents"][0]["text"])["result"] == {"result": text}


async def test_a_batch_of_long_resources_is_sent_in_pieces_and_holds_a_slot() -> None:
    """Fifty reads of a run of 15 MB took 3 GB. After a megabyte of responses, the rest is refused."""
    flock = Flock("long")

    @flock.agent
    async def write(mb: int) -> str:
        return "x" * mb * 1_000_000

    app = served(flock, max_downloads_per_principal=1)
    async with Served(app) as server, httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        run_id = (await app.engine.wait((await app.engine.submit("write", {"mb": 15})).run_id)).run_id
        batch = [body_of("resources/read", uri=f"flock://run/{run_id}", id_=at) for at in range(50)]
        with little_memory(5_000_000):
            unread = await server.send(batch, "POST /mcp")
            head = await unread.receive(15)
        assert head == b"HTTP/1.1 200 OK"
        refused = await client.post("/mcp", json=batch)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, -32000)
        await unread.aclose()
        await until(lambda: server.requests_in_flight == 0)
        whole, *others = (await client.post("/mcp", json=batch)).json()
    assert len(json.loads(whole["result"]["contents"][0]["text"])["result"]["result"]) == 15_000_000
    assert {other["error"]["message"] for other in others} == {
        "The responses before this one in the batch are too long. Send it alone."
    }
    assert [other["id"] for other in others] == list(range(1, 50))


async def test_a_message_that_a_batch_has_no_room_for_is_not_executed() -> None:
    flock, written = Flock("long"), list[int]()

    @flock.agent
    async def write(kb: int) -> str:
        written.append(kb)
        return "x" * kb * 1000

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        batch = [body_of("tools/call", name="write", arguments={"kb": 200}, id_=at) for at in range(10)]
        answers = (await client.post("/mcp", json=batch)).json()
    assert len(written) == 3  # the text of each is also in its structured content
    assert ["result" in answer for answer in answers] == [True] * 3 + [False] * 7


async def test_resources_are_runs(client: httpx.AsyncClient) -> None:
    assert (await result_of(client, latest("resources/list")))["resources"] == []
    (template,) = (await result_of(client, latest("resources/templates/list")))["resourceTemplates"]
    assert template["uriTemplate"] == "flock://run/{run_id}"
    run_id = (await call(client, "refuse", {"text": "x"}))["_meta"]["flockapi/run_id"]
    read = await result_of(client, latest("resources/read", uri=f"flock://run/{run_id}"))
    shown = json.loads(read["contents"][0]["text"])
    assert (shown["run_id"], shown["status"], shown["result"]) == (run_id, "failed", None)
    assert "more than I can do" in shown["error"]


@pytest.mark.parametrize("uri", ["test://nothing", "flock://run/", "flock://run/nothing", "file:///etc/passwd", ""])
async def test_an_unknown_resource_is_an_error(client: httpx.AsyncClient, uri: str) -> None:
    body = latest("resources/read", uri=uri)
    error = await error_of(client, body, 400, {**headers_of(body), "Mcp-Name": uri})
    assert (error["code"], error["data"]["uri"]) == (-32602, uri)
    assert (await error_of(client, body_of("resources/read", uri=uri), 200))["code"] == -32002


async def test_a_run_of_another_principal_is_no_resource() -> None:
    app = served(sample_flock(), auth=None, api_keys={"ann": "a" * 20, "bob": "b" * 20})
    ann, bob = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    async with app.lifespan(), client_of(app) as client:
        body = latest("tools/call", name="add", arguments={"a": 1})
        run_id = (await result_of(client, body, **ann))["_meta"]["flockapi/run_id"]
        body = latest("resources/read", uri=f"flock://run/{run_id}")
        assert (await post(client, body, **ann)).status_code == 200
        assert (await post(client, body, **bob)).status_code == 400


# Questions


def answers(result: Any, content: Any = None, action: str = "accept") -> dict[str, Any]:
    """Return what a client sends after a person has filled in the forms of *result*."""
    given = {"action": action, **({} if content is None else {"content": content})}
    return {"inputResponses": dict.fromkeys(result["inputRequests"], given), "requestState": result["requestState"]}


async def test_a_client_that_answers_and_closes_cancels_the_run() -> None:
    flock, has_answer = Flock("closes"), anyio.Event()

    @flock.agent
    async def hold(context: RunContext) -> bool:
        answer = await context.ask("Go on?", bool)
        has_answer.set()
        await anyio.sleep_forever()
        return answer

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        waiting = await result_of(client, latest("tools/call", FORMS, name="hold", arguments={}))
        body = latest("tools/call", FORMS, name="hold", arguments={}, **answers(waiting, {"answer": True}))
        await left(app, "/mcp", body, has_answer.wait, headers_of(body))
        run_id = waiting["_meta"][mcp.RUN_ID]
        assert (await until_run(app.engine, run_id, lambda run: run.status.is_final)).status is RunStatus.CANCELLED


async def test_a_question_becomes_a_form_and_its_answer_continues_the_run(client: httpx.AsyncClient) -> None:
    asked = await call(client, "approve", {"text": "it"})
    assert asked["resultType"] == "input_required"
    (request,) = asked["inputRequests"].values()
    assert request["method"] == "elicitation/create"
    form = request["params"]
    assert (form["mode"], form["message"]) == ("form", "Send it?")
    assert form["requestedSchema"]["required"] == ["approved"]
    assert form["requestedSchema"]["properties"] == {
        "approved": {"type": "boolean"},
        "reason": {"type": "string", "default": ""},
    }
    done = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": True, "reason": None}))
    assert (done["resultType"], done["structuredContent"]) == ("complete", {"result": "sent"})
    assert done["_meta"]["flockapi/run_id"] == asked["_meta"]["flockapi/run_id"]
    again = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": False}))
    assert again["structuredContent"] == {"result": "sent"}, "the first answer counts"
    assert len((await get(client, "/runs"))["runs"]) == 1


async def test_a_decline_denies_an_approval(client: httpx.AsyncClient) -> None:
    asked = await call(client, "approve", {"text": "it"})
    done = await call(client, "approve", {"text": "it"}, **answers(asked, action="decline"))
    assert done["structuredContent"] == {"result": "kept: "}


@pytest.mark.parametrize("action", ["cancel", "accept"])
async def test_a_form_that_nobody_has_filled_in_approves_nothing(client: httpx.AsyncClient, action: str) -> None:
    """Hosts were seen that answer without showing anything."""
    asked = await call(client, "approve", {"text": "it"})
    done = await call(client, "approve", {"text": "it"}, **answers(asked, action=action))
    assert done["isError"]
    assert "Send it?" in text_in(done)
    run = await get(client, f"/run/{done['_meta']['flockapi/run_id']}")
    assert run["status"] == "waiting"
    assert run["run_id"] in text_in(done)


async def test_a_decline_of_another_question_ends_the_call_and_the_run_waits_on() -> None:
    flock = Flock("asks")

    @flock.agent
    async def greet(context: RunContext) -> str:
        return f"Hello {await context.ask('Your name?', str)}"

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        asked = await call(client, "greet")
        (request,) = asked["inputRequests"].values()
        assert request["params"]["requestedSchema"]["properties"] == {"answer": {"type": "string"}}
        declined = await call(client, "greet", **answers(asked, action="decline"))
        assert declined["isError"]
        assert asked["_meta"][mcp.RUN_ID] in text_in(declined)
        done = await call(client, "greet", **answers(asked, {"answer": "Ann"}))
        assert done["structuredContent"] == {"result": "Hello Ann"}


async def test_an_answer_that_does_not_fit_is_asked_for_again(client: httpx.AsyncClient) -> None:
    asked = await call(client, "approve", {"text": "it"})
    again = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": "maybe"}))
    assert again["resultType"] == "input_required"
    (request,) = again["inputRequests"].values()
    assert request["params"]["message"].endswith("\n\nSend it?")
    missing = await call(client, "approve", {"text": "it"}, requestState=again["requestState"])
    assert missing["resultType"] == "input_required"
    done = await call(client, "approve", {"text": "it"}, **answers(missing, {"approved": True}))
    assert done["structuredContent"] == {"result": "sent"}


async def test_several_questions_are_several_forms() -> None:
    flock = Flock("asks")

    @flock.agent
    async def add_up(context: RunContext) -> int:
        found: dict[str, int] = {}

        async def ask(name: str) -> None:
            found[name] = await context.ask(f"{name}?", int, name=name)

        async with anyio.create_task_group() as tasks:
            for name in ("a", "b"):
                tasks.start_soon(ask, name)
        return found["a"] + found["b"]

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        asked = await call(client, "add_up")
        assert len(asked["inputRequests"]) == 2
        first, second = asked["inputRequests"]
        given = {"action": "accept", "content": {"answer": 2}}
        more = {"inputResponses": {first: given, "of nobody": given}, "requestState": asked["requestState"]}
        rest = await call(client, "add_up", **more)
        assert list(rest["inputRequests"]) == [second]
        done = await call(client, "add_up", **answers(rest, {"answer": 40}))
        assert done["structuredContent"] == {"result": 42}


@pytest.mark.parametrize("capabilities", [{}, {"sampling": {}}, {"elicitation": {"url": {}}}], ids=str)
async def test_a_client_without_forms_gets_the_question_and_the_run(
    client: httpx.AsyncClient, capabilities: Any
) -> None:
    result = await call(client, "approve", {"text": "it"}, capabilities=capabilities)
    assert result["isError"]
    assert "Send it?" in text_in(result)
    assert result["_meta"]["flockapi/run_id"] in text_in(result)


async def test_an_older_client_gets_the_question_and_the_run(client: httpx.AsyncClient) -> None:
    headers = await session_of(client)
    result = await result_of(client, body_of("tools/call", name="approve", arguments={"text": "it"}), **headers)
    assert result["isError"]
    run_id = result["_meta"]["flockapi/run_id"]
    assert (await get(client, f"/run/{run_id}"))["status"] == "waiting"
    assert "Send it?" in text_in(result)


async def test_a_question_that_no_form_can_show_is_answered_elsewhere() -> None:
    flock = Flock("asks")

    @flock.agent
    async def sort(context: RunContext) -> int:
        return len(await context.ask("Which ones?", list[str]))

    app = served(flock)
    async with app.lifespan(), client_of(app) as client:
        result = await call(client, "sort")
        assert result["isError"]
        assert "Which ones?" in text_in(result)


async def test_an_answer_on_the_page_ends_the_call(client: httpx.AsyncClient) -> None:
    asked = await call(client, "approve", {"text": "it"})
    run = await get(client, f"/run/{asked['_meta']['flockapi/run_id']}")
    (question,) = run["waiting_for"]
    path = f"/run/{run['run_id']}/calls/{question['call_id']}"
    assert (await client.post(path, json={"output": {"approved": True}})).status_code == 200
    done = await call(client, "approve", {"text": "it"}, requestState=asked["requestState"])
    assert done["structuredContent"] == {"result": "sent"}


async def test_a_state_is_good_for_its_call_only(client: httpx.AsyncClient) -> None:
    asked = await call(client, "approve", {"text": "it"})
    state = asked["requestState"]
    changed = [f"{state[:at]}{'A' if state[at] != 'A' else 'B'}{state[at + 1 :]}" for at in range(len(state))]
    payload, _, mac = state.partition(".")
    forged = base64.urlsafe_b64encode(b'["x", 99999999999]').decode()
    wrong = ["", ".", "x", payload, f"{payload}.", f".{mac}", f"{forged}.{mac}", f"{state}.", f"{payload}..{mac}"]
    for each in [*changed, *wrong, f"{payload}.{'é' * 64}", f"{'é'}.{mac}", f"{payload}=.{mac}", f"{state}\n"]:
        body = latest("tools/call", FORMS, name="approve", arguments={"text": "it"}, requestState=each)
        assert (await error_of(client, body, 400))["code"] == -32602, each
    for name, arguments in (("approve", {"text": "other"}), ("summarise", {"text": "it"}), ("approve", {})):
        body = latest("tools/call", FORMS, name=name, arguments=arguments, **answers(asked, {"approved": True}))
        assert (await error_of(client, body, 400))["code"] == -32602
    run = await get(client, f"/run/{asked['_meta']['flockapi/run_id']}")
    assert run["status"] == "waiting"


async def test_a_state_expires_after_a_day(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    day_s, since = 24 * 60 * 60, int(time.time())
    asked = await call(client, "approve", {"text": "it"})
    _, until, *_ = json.loads(base64.urlsafe_b64decode(asked["requestState"].partition(".")[0]))
    assert since + day_s <= until <= time.time() + day_s
    body = latest("tools/call", FORMS, name="approve", arguments={"text": "it"}, **answers(asked, {"approved": True}))
    monkeypatch.setattr(mcp, "time", SimpleNamespace(time=lambda: until))
    assert "has expired" in (await error_of(client, body, 400))["message"]
    monkeypatch.setattr(mcp, "time", SimpleNamespace(time=lambda: until - 1))
    assert (await result_of(client, body))["structuredContent"] == {"result": "sent"}


async def test_a_state_of_another_principal_is_refused() -> None:
    """Even for an admin, who sees the run: the state is part of the call of its client."""
    keys = {"ann": "a" * 20, "ops:admin": "b" * 20}
    app = served(sample_flock(), auth=None, api_keys=keys)
    ann, ops = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    async with app.lifespan(), client_of(app) as client:
        body = latest("tools/call", FORMS, name="approve", arguments={"text": "it"})
        asked = await result_of(client, body, **ann)
        body["params"] |= answers(asked, {"approved": True})
        assert (await error_of(client, body, 400, None, **ops))["code"] == -32602
        assert (await result_of(client, body, **ann))["structuredContent"] == {"result": "sent"}


async def test_a_state_survives_a_restart_and_is_known_to_other_processes(tmp_path: Path) -> None:
    store = tmp_path / "flock.db"
    first = served(sample_flock(), store=store)
    async with first.lifespan(), client_of(first) as client:
        asked = await call(client, "approve", {"text": "it"})
    second = served(sample_flock(), store=store)
    async with second.lifespan(), client_of(second) as client:
        done = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": True}))
        assert done["structuredContent"] == {"result": "sent"}


async def test_an_approval_is_given_only_by_a_key_with_its_role(model: FakeModel) -> None:
    till = Till()
    flock = flock_of(Tool(till.refund, needs_approval=True, approver="refunds"))
    keys = {"ann": "a" * 20, "bob:role:refunds": "b" * 20}
    model.replies = [Reply(calls=[("refund", {"amount": 40})])] * 2 + [Reply({"a": "done"})]
    app = served(flock, auth=None, api_keys=keys, engine=flock.engine(store=":memory:", transport=model.transport))
    ann, bob = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    body = latest("tools/call", FORMS, name=next(iter(flock.agents)), arguments={"q": "x"})
    async with app.lifespan(), client_of(app) as client:
        refused = await result_of(client, body, **ann)
        assert refused["isError"]
        assert "40" in text_in(refused)
        asked = await result_of(client, body, **bob)
        (request,) = asked["inputRequests"].values()
        assert "refund" in request["params"]["message"]
        assert '"amount":40' in request["params"]["message"].replace(" ", "")
        assert "arguments" not in request["params"]["requestedSchema"]["properties"]
        body["params"] |= answers(asked, {"approved": True})
        assert (await result_of(client, body, **bob))["structuredContent"] == {"a": "done"}


async def test_a_question_is_asked_at_the_end_of_a_stream_and_answered_in_another(client: httpx.AsyncClient) -> None:
    body = latest("tools/call", FORMS, name="approve", arguments={"text": "it"}, meta={"progressToken": 1})
    for content, expected in (({"approved": 1}, "input_required"), ({"approved": True}, "complete")):
        (last,) = events_in((await post(client, body)).text)
        asked = last["data"]["result"]
        assert asked["resultType"] == "input_required"
        body["params"] |= answers(asked, content)
        (last,) = events_in((await post(client, body)).text)
        assert last["data"]["result"]["resultType"] == expected
    assert last["data"]["result"]["structuredContent"] == {"result": "sent"}


# Cancellation, and clients that go away


async def test_a_closed_connection_cancels_a_call_of_the_latest_revision() -> None:
    for token in ({}, {"progressToken": 1}):
        gate = Gate()
        async with Served(served(gate.flock)) as server:
            body = latest("tools/call", name="nap", arguments={}, meta=token)
            accept = {"Accept": "application/json, text/event-stream"}
            stream = await server.send(body, "POST /mcp", **headers_of(body), **accept)
            with anyio.fail_after(PATIENCE_S):
                await gate.started.wait()
            await stream.aclose()
            assert (await server.only_run())["status"] == "cancelled"


async def test_a_notification_cancels_nothing_of_the_latest_revision() -> None:
    """Its connections have no session, so an id says nothing about whose request it is."""
    gate = Gate()
    app = served(gate.flock)
    async with app.lifespan(), client_of(app) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(post, client, latest("tools/call", name="nap", arguments={}))
        with anyio.fail_after(PATIENCE_S):
            await gate.started.wait()
        note = latest("notifications/cancelled", requestId=1)
        del note["id"]
        response = await post(client, note)
        assert (response.status_code, response.content) == (202, b"")
        gate.may_go.set()
        (run,) = (await get(client, "/runs"))["runs"]
        assert (await get(client, f"/run/{run['run_id']}", wait=60))["status"] == "completed"


async def test_a_closed_connection_does_not_cancel_a_call_in_a_session() -> None:
    gate = Gate()
    async with Served(served(gate.flock)) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = await session_of(client)
        stream = await server.send(body_of("tools/call", name="nap"), "POST /mcp", **headers)
        with anyio.fail_after(PATIENCE_S):
            await gate.started.wait()
            await stream.aclose()
            while server.requests_in_flight:  # noqa: ASYNC110 - uvicorn has no event for the end of a request
                await anyio.sleep(0.01)
        gate.may_go.set()
        assert (await server.only_run())["status"] == "completed"


async def test_a_session_cancels_its_own_requests_only() -> None:
    gate = Gate()
    app = served(gate.flock)
    async with app.lifespan(), client_of(app) as client:
        mine, other = await session_of(client), await session_of(client)
        results: list[Any] = []

        async def nap() -> None:
            results.append(await result_of(client, body_of("tools/call", name="nap", id_="7"), **mine))

        def cancelling(id_: Any) -> Any:
            return {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id_}}

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(nap)
                await gate.started.wait()
                for id_, headers in (("7", other), (7, mine), ("8", mine), ("7", {})):
                    assert (await client.post("/mcp", json=cancelling(id_), headers=headers)).status_code == 202
                (run,) = (await get(client, "/runs"))["runs"]
                assert run["status"] == "running"
                assert (await client.post("/mcp", json=cancelling("7"), headers=mine)).status_code == 202
        (result,) = results
        assert result["isError"]
        assert (await get(client, f"/run/{run['run_id']}"))["status"] == "cancelled"
        assert (await client.post("/mcp", json=cancelling("7"), headers=mine)).status_code == 202


async def test_another_process_cancels_a_request(tmp_path: Path) -> None:
    gate = Gate()
    first, second = (
        served(flock, engine=flock.engine(store=tmp_path / "x.db")) for flock in (gate.flock, Gate().flock)
    )
    async with first.lifespan(), second.lifespan(), client_of(first) as here, client_of(second) as there:
        headers = await session_of(here)
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: post(here, body_of("tools/call", name="nap"), **headers))
                await gate.started.wait()
                note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
                assert (await there.post("/mcp", json=note, headers=headers)).status_code == 202
        (run,) = (await get(here, "/runs"))["runs"]
        assert run["status"] == "cancelled"


async def test_two_calls_with_one_id_of_a_session_are_one_run_or_an_error(client: httpx.AsyncClient) -> None:
    headers = await session_of(client)
    body = body_of("tools/call", name="add", arguments={"a": 1})
    first, second = [await result_of(client, body, **headers) for _ in range(2)]
    assert first == second
    body["params"]["arguments"] = {"a": 2}
    error = await error_of(client, body, 422, None, **headers)
    assert error["code"] == -32000
    assert len((await get(client, "/runs"))["runs"]) == 1


@pytest.mark.parametrize("has_session", [True, False])
async def test_two_calls_with_one_id_at_once_are_one_run_in_a_session(has_session: bool) -> None:
    """Without a session, the id says nothing about whose request it is."""
    gate, found = Gate(), list[Any]()
    async with Served(served(gate.flock)) as server, httpx.AsyncClient(base_url=server.url) as client:
        headers = await session_of(client) if has_session else {}
        make: Callable[..., Any] = body_of if has_session else latest

        async def nap() -> None:
            found.append(await result_of(client, make("tools/call", name="nap", arguments={}), **headers))

        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(nap)
                await gate.started.wait()
                tasks.start_soon(nap)
                while server.requests_in_flight < 2:  # noqa: ASYNC110 - uvicorn has no event for the start of a request
                    await anyio.sleep(0.01)
                if has_session:
                    await error_of(client, body_of("tools/call", name="block"), 422, None, **headers)
                gate.may_go.set()
    assert [each["structuredContent"] for each in found] == [{"result": 1}] * 2
    assert len({each["_meta"][mcp.RUN_ID] for each in found}) == (1 if has_session else 2)


async def test_a_session_is_good_for_its_principal_in_each_process_and_after_a_restart(tmp_path: Path) -> None:
    keys, store = {"ann": "a" * 20, "bob": "b" * 20}, tmp_path / "x.db"
    ann, bob = ({"Authorization": f"Bearer {letter * 20}"} for letter in "ab")
    apps = [served(sample_flock(), auth=None, api_keys=keys, store=store) for _ in range(3)]
    async with apps[0].lifespan(), apps[1].lifespan(), client_of(apps[0], ann) as here, client_of(apps[1]) as there:
        headers = await session_of(here)
        assert await result_of(there, body_of("ping"), **ann, **headers) == {}
        await error_of(there, body_of("ping"), 404, None, **bob, **headers)
    async with apps[2].lifespan(), client_of(apps[2]) as later:
        assert await result_of(later, body_of("ping"), **ann, **headers) == {}
        session = headers.pop("Mcp-Session-Id")
        for at in range(len(session)):
            changed = f"{session[:at]}{'a' if session[at] != 'a' else 'b'}{session[at + 1 :]}"
            await error_of(later, body_of("ping"), 404, None, **ann, **headers, **{"Mcp-Session-Id": changed})
    other = served(sample_flock(), auth=None, api_keys=keys, store=tmp_path / "y.db")
    async with other.lifespan(), client_of(other, ann) as elsewhere:
        await error_of(elsewhere, body_of("ping"), 404, None, **headers, **{"Mcp-Session-Id": session})


@pytest.mark.parametrize("session", ["", ".", "x", "0" * 32, f"{'0' * 32}.{'0' * 64}", b"\xe9"])
async def test_a_session_of_nobody_is_404(client: httpx.AsyncClient, session: Any) -> None:
    """The client then begins a new one."""
    await error_of(client, body_of("tools/list"), 404, None, **{"Mcp-Session-Id": session})
    await result_of(client, body_of("initialize"), **{"Mcp-Session-Id": session})


@pytest.fixture(params=["memory", "temporal"])
async def any_app(request: pytest.FixtureRequest) -> AsyncIterator[FlockAPI]:
    """An app on each kind of engine."""
    flock = sample_flock()
    async with engine_for(request, flock) as engine:
        app = served(flock, engine=engine)
        async with app.lifespan():
            yield app


async def test_every_engine_serves_sessions_and_states(any_app: FlockAPI) -> None:
    async with client_of(any_app) as client:
        asked = await call(client, "approve", {"text": "it"})
        done = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": True}))
        assert done["structuredContent"] == {"result": "sent"}
        again = await call(client, "approve", {"text": "it"}, **answers(asked, {"approved": True}))
        assert again["structuredContent"] == {"result": "sent"}
        headers, body = await session_of(client), body_of("tools/call", name="approve", arguments={"text": "x"})
        first, second = [await result_of(client, body, **headers) for _ in range(2)]
        assert first == second
        note = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}
        assert (await client.post("/mcp", json=note, headers=headers)).status_code == 202
        run_id = first["_meta"]["flockapi/run_id"]
        await until_run(any_app.engine, run_id, lambda run: run.status is RunStatus.CANCELLED)


# Over stdin and stdout


class Host:
    """A host that has started the command: it sends lines, and reads those that come back."""

    def __init__(self, app: FlockAPI) -> None:
        self.app = app
        self.input, self._lines = anyio.create_memory_object_stream[bytes](100)
        self._output, self.answers = anyio.create_memory_object_stream[Any](100)

    async def serve(self) -> None:
        async def write(line: bytes) -> None:
            assert b"\n" not in line
            await self._output.send(json.loads(line))

        async with self._lines, self._output:
            await serve_lines(self.app, self._lines, write)

    async def send(self, body: Any) -> None:
        await self.input.send(body if isinstance(body, bytes) else json.dumps(body).encode() + b"\n")

    async def receive(self) -> Any:
        with anyio.fail_after(PATIENCE_S):
            return await self.answers.receive()


@contextlib.asynccontextmanager
async def hosting(flock: Flock) -> AsyncIterator[Host]:
    app = served(flock)
    async with app.lifespan(), anyio.create_task_group() as tasks:
        host = Host(app)
        tasks.start_soon(host.serve)
        async with host.answers, host.input:
            yield host


async def test_lines_are_answered_in_both_eras() -> None:
    async with hosting(sample_flock()) as host:
        await host.send(latest("server/discover"))
        assert (await host.receive())["result"]["supportedVersions"][0] == mcp.LATEST
        await host.send(body_of("initialize", protocolVersion="2025-06-18", capabilities={}))
        assert (await host.receive())["result"]["protocolVersion"] == "2025-06-18"
        await host.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        for body in (body_of("tools/call", name="add", arguments={"a": 1}), latest("tools/call", name="add")):
            body["params"]["arguments"] = {"a": 1}
            await host.send(body)
            assert (await host.receive())["result"]["structuredContent"] == {"result": 3}
        for line in (b"{\n", b"\xff\n"):
            await host.send(line)
            answer = await host.receive()
            assert (answer["id"], answer["error"]["code"]) == (None, -32700)
        await host.send(b" \n")
        asked = latest("tools/call", FORMS, name="approve", arguments={"text": "it"})
        await host.send(asked)
        asked["params"] |= answers((await host.receive())["result"], {"approved": True})
        await host.send(asked)
        assert (await host.receive())["result"]["structuredContent"] == {"result": "sent"}


async def test_a_long_result_in_a_batch_is_whole() -> None:
    text = "x" * (LONG_BYTES + 1)
    async with hosting(sample_flock()) as host:
        await host.send([latest("tools/call", name="summarise", arguments={"text": text})])
        (answer,) = await host.receive()
        assert json.loads(text_in(answer["result"])) == answer["result"]["structuredContent"]


async def test_the_events_of_a_call_are_lines() -> None:
    flock = Flock("writers")

    @flock.agent
    async def write(topic: str) -> AsyncIterator[str]:
        yield f"All\n\n{topic} data: "
        yield "and more"

    async with hosting(flock) as host:
        await host.send(latest("tools/call", name="write", arguments={"topic": "tea"}, meta={"progressToken": 1}))
        text, received = "", await host.receive()
        while "result" not in received:
            text, received = text + received["params"]["message"], await host.receive()
        assert text == "All\n\ntea data: and more"
        assert received["result"]["structuredContent"] == {"result": text}


@pytest.mark.parametrize("make", [body_of, latest], ids=["older", "latest"])
@pytest.mark.parametrize("id_", [5, "five"])
async def test_a_notification_cancels_the_run_of_a_line(make: Callable[..., Any], id_: Any) -> None:
    gate = Gate()
    async with hosting(gate.flock) as host, client_of(host.app) as client:
        await host.send(make("tools/call", name="nap", arguments={}, id_=id_))
        with anyio.fail_after(PATIENCE_S):
            await gate.started.wait()
        await host.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "other"}})
        await host.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id_}})
        (run,) = (await get(client, "/runs"))["runs"]
        assert (await get(client, f"/run/{run['run_id']}", wait=60))["status"] == "cancelled"
        await host.send(make("tools/list", id_="next"))
        assert (await host.receive())["id"] == "next", "a cancelled request has no response"


async def test_a_notification_cancels_all_calls_with_its_id() -> None:
    gate = Gate()
    async with hosting(gate.flock) as host, client_of(host.app) as client:
        for _ in range(2):
            await host.send(latest("tools/call", name="nap", arguments={}))
        runs = (await wait_until(client, "/runs", lambda body: len(body["runs"]) == 2))["runs"]
        await host.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}})
        for run in runs:
            assert (await get(client, f"/run/{run['run_id']}", wait=60))["status"] == "cancelled"


async def test_the_end_of_the_input_cancels_what_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "LAST_REQUESTS_S", 0)
    gate = Gate()
    async with hosting(gate.flock) as host, client_of(host.app) as client:
        await host.send(body_of("tools/call", name="nap"))
        with anyio.fail_after(PATIENCE_S):
            await gate.started.wait()
            host.input.close()
            with pytest.raises(anyio.EndOfStream):
                await host.answers.receive()
        (run,) = (await get(client, "/runs"))["runs"]
        assert run["status"] == "cancelled"


async def test_the_last_requests_are_answered_after_the_end_of_the_input() -> None:
    async with hosting(sample_flock()) as host:
        await host.send(latest("tools/call", name="add", arguments={"a": 1}))
        host.input.close()
        assert (await host.receive())["result"]["structuredContent"] == {"result": 3}


async def test_a_host_that_reads_no_more_cancels_its_calls(caplog: pytest.LogCaptureFixture) -> None:
    gate, (lines, sent) = Gate(), anyio.create_memory_object_stream[bytes](1)
    app = served(gate.flock)

    @gate.flock.agent
    async def write(context: RunContext) -> str:
        context.emit("All")
        await anyio.sleep_forever()
        return ""

    async def write_line(line: bytes) -> None:
        raise BrokenPipeError

    async with app.lifespan(), client_of(app) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(serve_lines, app, sent, write_line)
        async with lines:
            body = latest("tools/call", name="write", arguments={}, meta={"progressToken": 1})
            await lines.send(json.dumps(body).encode())
            with anyio.fail_after(PATIENCE_S):
                while not (runs := (await get(client, "/runs", status="cancelled"))["runs"]):
                    await anyio.lowlevel.checkpoint()
    sent.close()
    assert (len(runs), [record for record in caplog.records if record.levelname == "ERROR"]) == (1, [])


async def test_a_response_in_many_pieces_is_joined_once() -> None:
    pieces, lines = 600, list[bytes]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for at in range(pieces):
            await send({"type": "http.response.body", "body": b"x" * 65_536 + b"\n" * (at == pieces - 1)})

    async def write(line: bytes) -> None:
        lines.append(line)

    async def read() -> AsyncIterator[bytes]:
        yield b"{}"

    since = time.thread_time()
    await serve_lines(app, read(), write)
    assert [len(line) for line in lines] == [65_536 * pieces]
    assert time.thread_time() - since < 1, "not each time with all before it"


PROGRAM = """
import sys
from flock.core import Flock

print("a program may print")
flock = Flock("printing")

@flock.agent
def shout(text: str) -> str:
    print("and read", repr(sys.stdin.read()))
    return text.upper()
"""


@pytest.mark.slow
def test_the_command_answers_on_a_clean_stdout_and_ends_with_its_input(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(PROGRAM)
    lines = [body_of("initialize", protocolVersion=mcp.OLDER[0], capabilities={}, id_=1)]
    lines += [latest("tools/call", name="shout", arguments={"text": "tea"}, id_=2)]
    done = subprocess.run(
        flockapi_command("mcp", "app.py"),
        input="".join(f"{json.dumps(line)}\n" for line in lines),
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=True,
    )
    answers = {answer["id"]: answer["result"] for answer in map(json.loads, done.stdout.splitlines())}
    assert answers[1]["protocolVersion"] == mcp.OLDER[0]
    assert answers[2]["structuredContent"] == {"result": "TEA"}
    assert "a program may print" in done.stderr
    assert f"run {answers[2]['_meta'][mcp.RUN_ID]}: completed" in done.stderr
    assert "and read ''" in done.stderr
    (store,) = (tmp_path / "state" / "flockapi").glob("app-*.db")
    assert (store.stat().st_mode & 0o777, store.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.slow
def test_the_command_ends_quietly_if_its_host_has_closed_stdout(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(PROGRAM)
    command = flockapi_command("mcp", "app.py", "--store", ":memory:")
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as host:
        assert host.stdin
        assert host.stdout
        assert host.stderr
        for id_ in (1, 2):
            line = json.dumps(latest("tools/call", name="shout", arguments={"text": "tea"}, id_=id_))
            host.stdin.write(line.encode() + b"\n")
            host.stdin.flush()
            if id_ == 1:
                assert b"TEA" in host.stdout.readline()
                host.stdout.close()
        host.stdin.close()
        errors = host.stderr.read()
    assert (host.returncode, b"Traceback" in errors) == (0, False)


@pytest.mark.slow
def test_a_program_that_cannot_be_loaded_is_an_error_on_stderr(tmp_path: Path) -> None:
    done = subprocess.run(
        flockapi_command("mcp", "nothing.py"), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing.py" in done.stderr


async def test_a_line_that_is_too_long_is_read_in_pieces_and_answered_with_an_error() -> None:
    """The next line is answered as ever. The host's line of 300 MB without an end was in memory as a whole."""
    ping = {"jsonrpc": "2.0", "id": 7, "method": "ping"}
    sent = b'{"padding": "' + b"x" * 5_000_000 + b'"}\n' + msgspec.json.encode(ping) + b"\n" + b"y" * 3_000_000
    app = FlockAPI(sample_flock(), store=":memory:", protocols=["mcp"], auth="host", metrics=False)
    written: list[dict[str, Any]] = []
    lengths: list[int] = []

    async def write(line: bytes) -> None:
        written.append(msgspec.json.decode(line))

    async def noted(file: IO[bytes]) -> AsyncIterator[bytes]:
        async for line in stdio.lines_of(file, app.options.max_body_bytes):
            lengths.append(len(line))
            yield line

    async with app.lifespan():
        await serve_lines(app, noted(io.BytesIO(sent)), write)
    assert max(lengths) <= app.options.max_body_bytes + 2
    assert len(lengths) == 3
    results = [each for each in written if "result" in each]
    assert [each["id"] for each in results] == [7]
    assert [each["error"]["code"] < 0 for each in written if "error" in each] == [True, True]

"""A run as clients of three protocols see it at the same time: REST, OpenAI and MCP."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, suppress
from typing import Any

import httpx
import pytest

from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import StoreError
from flock.runs.records import LongJSON
from flock.testing import Reply
from flockapi import create_app
from tests.support.http import client_of, get
from tests.support.servers import Served
from tests.test_mcp_server import answers, headers_of, latest, post, result_of
from tests.test_openai import ANN, BOB, KEYS, check_error, open_chats
from tests.test_openai_responses import Responses, approval, send, text_of

pytestmark = pytest.mark.anyio

EVE = {"Authorization": f"Bearer {'e' * 20}"}
USER = {"id": "m", "role": "user", "content": "x"}
AGUI: Mapping[str, Any] = {"context": [], "forwardedProps": {}}
A2A = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "x"}]}
PAY_3 = [Reply(calls=[("pay", {"amount": 3})]), Reply({"reply": "Paid."})]


@pytest.fixture
def chats() -> Responses:
    return Responses()


@pytest.fixture
async def client(chats: Responses) -> AsyncIterator[httpx.AsyncClient]:
    keys = {**KEYS, "eve:role:refunds": "e" * 20}
    async with open_chats(chats, ANN, api_keys=keys, protocols=["openai", "mcp"]) as made:
        yield made


STREAMS = {
    "a2a": ("/a2a/long", {"jsonrpc": "2.0", "id": 1, "method": "SendStreamingMessage", "params": {"message": A2A}}),
    "ag-ui": ("/ag-ui/long", {"threadId": "t", "runId": "r", "state": {}, "messages": [USER], "tools": [], **AGUI}),
    "mcp": ("/mcp", latest("tools/call", name="long", arguments={"text": "x"}, meta={"progressToken": 1})),
}


@pytest.mark.parametrize("protocol", STREAMS)
async def test_nothing_follows_an_event_whose_rest_cannot_be_read(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client would take it for a part of that event."""
    flock, read = Flock(), LongJSON.pieces

    @flock.agent
    def long(text: str) -> list[str]:
        return [text * 200_000]

    async def pieces(long: LongJSON) -> AsyncIterator[bytes]:
        async with aclosing(read(long)) as found:  # type: ignore[type-var]
            yield await anext(found)
        raise StoreError("The store cannot be read.")

    monkeypatch.setattr(LongJSON, "pieces", pieces)
    path, body = STREAMS[protocol]
    app = create_app(flock, store=":memory:", auth="host", protocols=[protocol])
    headers = {"Accept": "application/json, text/event-stream", "A2A-Version": "1.0"}
    headers |= headers_of(body) if protocol == "mcp" else {}
    text = b""
    async with Served(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        with suppress(httpx.RemoteProtocolError):  # the connection is closed before the end of the body
            async with client.stream("POST", path, json=body, headers=headers) as response:
                async for piece in response.aiter_raw():
                    text += piece
    assert response.status_code == 200
    assert text.endswith(b"xxx")
    assert "the event stream was cut off: The store cannot be read." in caplog.text
    assert "Traceback" not in caplog.text


async def seen(client: httpx.AsyncClient, run_id: str, headers: Mapping[str, str] = ANN) -> list[Any]:
    """Return the run as REST, OpenAI and MCP show it to one principal: None where it does not exist."""
    rest = await client.get(f"/run/{run_id}", headers=headers)
    response = await client.get(f"/v1/responses/resp_{run_id}_0", headers=headers)
    resource = await post(client, latest("resources/read", uri=f"flock://run/{run_id}"), **headers)
    shown: list[Any] = [each.json() if each.status_code == 200 else None for each in (rest, response, resource)]
    return [*shown[:2], shown[2] and json.loads(shown[2]["result"]["contents"][0]["text"])]


async def test_a_run_has_one_id_one_owner_and_one_end_in_all_protocols(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    made = await send(client, "repeat", "tea")
    run_id = made.headers["Flock-Run-Id"]
    rest, response, resource = await seen(client, run_id)
    assert rest["run_id"] == resource["run_id"] == run_id
    assert rest["status"] == response["status"] == resource["status"] == "completed"
    assert rest["result"] == resource["result"] == {"result": text_of(response)}
    assert await seen(client, run_id, BOB) == [None, None, None]
    assert (await client.delete(f"/run/{run_id}")).status_code == 204
    assert await seen(client, run_id) == [None, None, None]


async def test_an_approval_asked_through_openai_is_answered_in_the_inbox_and_ends_in_all_protocols(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    chats.model.replies = [*PAY_3]
    asked = (await send(client, "payer", "Pay 3.")).json()
    (question,) = (await get(client, "/questions"))["questions"]
    run_id = question["run_id"]
    assert asked["output"][0]["id"] == f"mcpr_{run_id}_{question['call_id']}"
    rest, _, resource = await seen(client, run_id)
    assert (rest["status"], resource["status"], chats.paid) == ("waiting", "waiting", [])
    path = f"/run/{run_id}/calls/{question['call_id']}"
    assert (await client.post(path, json={"output": {"approved": True}}, headers=BOB)).status_code == 404
    await client.post(f"{path}?wait=30", json={"output": {"approved": True}})
    rest, _, resource = await seen(client, run_id)
    continued = (await send(client, "payer", [], previous_response_id=asked["id"])).json()
    assert rest["result"] == resource["result"] == {"reply": text_of(continued)} == {"reply": "Paid."}
    assert (chats.paid, rest["run_id"]) == ([3], continued["id"].split("_")[1])


async def test_an_approval_asked_through_mcp_is_answered_by_the_item_of_openai(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    """The client of MCP, which answers later, gets the result of what was decided elsewhere."""
    chats.model.replies = [*PAY_3]
    order = {"name": "payer", "arguments": {"order": "Pay 3."}}
    waiting = await result_of(client, latest("tools/call", {"elicitation": {}}, **order))
    (question,) = (await get(client, "/questions"))["questions"]
    asked = (await client.get(f"/v1/responses/resp_{question['run_id']}_0")).json()
    assert text_of((await send(client, "payer", approval(asked))).json()) == "Paid."
    (id_,) = waiting["inputRequests"]
    late = {id_: {"action": "accept", "content": {"approved": False}}}
    more = {**answers(waiting), "inputResponses": late}
    ended = await result_of(client, latest("tools/call", {"elicitation": {}}, **order, **more))
    assert (ended["structuredContent"], chats.paid) == ({"reply": "Paid."}, [3])


async def test_an_item_of_openai_approves_as_the_rules_of_approvers_allow(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    """The role is needed for an own run too. Who has it and does not own the run answers where the run is not shown."""
    tools = [Tool(chats.pay, needs_approval=True, approver="refunds")]
    chats.flock.add_agent(FlockFactory.create_default_agent("clerk", input="order", output="reply: str", tools=tools))
    call, paid = PAY_3
    chats.model.replies = [call, call, paid, paid]
    asked, own = [(await send(client, "clerk", "Pay 3.", who)).json() for who in (ANN, EVE)]
    check_error(await send(client, "clerk", approval(asked)), 403, "forbidden", "refunds")
    check_error(await send(client, "clerk", approval(asked), EVE), 404, "unknown_run")
    assert chats.paid == []
    assert text_of((await send(client, "clerk", approval(own), EVE)).json()) == "Paid."
    _, run_id, call_id = asked["output"][0]["id"].split("_", 2)
    await client.post(f"/run/{run_id}/calls/{call_id}", json={"output": {"approved": True}}, headers=EVE)
    continued = await send(client, "clerk", [], previous_response_id=asked["id"])
    assert (text_of(continued.json()), chats.paid) == ("Paid.", [3, 3])


SAID = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "x"}]}
CALLED = {"id": "2", "role": "assistant", "content": "", "toolCalls": [{"id": "call_x", "type": "function"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
MORE: Mapping[str, Any] = {"metadata": {"inputs": "{}"}, "stream": True, "max_tokens": 5, "tool_choice": "none"}
#: A request of each protocol with many members.
WHOLE: Mapping[str, tuple[str, Any]] = {
    "chat": ("/v1/chat/completions", {"model": "echo", "messages": [USER], "tools": [TOOL], **MORE}),
    "responses": (
        "/v1/responses",
        {"model": "echo", "input": [{"role": "user", "content": "x"}], "store": False, **MORE},
    ),
    "a2a": ("/a2a/echo", {**STREAMS["a2a"][1], "params": {"message": {**A2A, "contextId": "c"}, "configuration": {}}}),
    "ag-ui": (
        "/ag-ui/echo",
        {**STREAMS["ag-ui"][1], "messages": [CALLED, USER], "resume": [], "state": {"other": "x"}},
    ),
    "vercel": ("/vercel/echo", {"id": "c", "messages": [SAID], "trigger": "submit-message", "inputs": {}, "tools": []}),
}
#: What a hostile client puts in place of a member, as JSON.
HOSTILE = (
    *("null", "true", "-1", "1e400", "1" * 5000, '"\\u0000"', '"\\ud800"', "[]", "{}", "[null]", '{"":{}}', "NaN"),
    *("[" * 5000 + "]" * 5000, '"call_00000000-0000-7000-8000-000000000000_x"', '"' + "y" * 100_000 + '"'),
)


def members_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each member, also of those in it."""
    found: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in found:
        yield (*at, name)
        yield from members_of(member, (*at, name))


def with_member(value: Any, at: tuple[Any, ...], member: Any) -> Any:
    if not at:
        return member
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[at[0]] = with_member(value[at[0]], at[1:], member)
    return copy


@pytest.fixture
async def any_client(chats: Responses) -> AsyncIterator[httpx.AsyncClient]:
    headers, protocols = {**ANN, "A2A-Version": "1.0", "Content-Type": "application/json"}, ["openai", "a2a", "ag-ui"]
    async with open_chats(chats, headers, api_keys=KEYS, protocols=[*protocols, "vercel"]) as made:
        yield made


@pytest.mark.parametrize("protocol", WHOLE)
async def test_a_hostile_member_is_an_error_of_the_client_in_the_form_of_the_protocol(
    any_client: httpx.AsyncClient, protocol: str
) -> None:
    path, body = WHOLE[protocol]
    assert (await any_client.post(path, json=body)).status_code == 200
    for at in members_of(body):
        text = json.dumps(with_member(body, at, "@"))
        for member in HOSTILE:
            for hostile in (text.replace('"@"', member), text.replace('"@"', f'{member},"{at[-1]}":{member}')):
                sent = await any_client.post(path, content=hostile)
                assert sent.status_code < 500, (at, member[:80], sent.text)
                if sent.status_code >= 400:
                    assert isinstance(sent.json()["error"], str if protocol in ("ag-ui", "vercel") else dict)


@pytest.mark.parametrize("protocol", WHOLE)
async def test_json_in_a_text_may_be_as_deep_as_that_of_a_body(any_client: httpx.AsyncClient, protocol: str) -> None:
    path, body = WHOLE[protocol]
    deep = '{"text": %s}' % ('{"a":' * 500 + "1" + "}" * 500)
    text = json.dumps(body).replace('"x"', json.dumps(deep))
    refused = await any_client.post(path.replace("echo", "add"), content=text.replace('"echo"', '"add"'))
    assert "nested deeper than 100 levels" in refused.text
    assert refused.status_code == (200 if protocol == "a2a" else 400)


@pytest.mark.parametrize(
    ("public_url", "base"), [("https://agents.example/ai/", "https://agents.example/ai"), (None, "http://t")]
)
async def test_an_agent_has_its_own_absolute_url_in_each_protocol(public_url: str | None, base: str) -> None:
    """At which it answers. There is none for a protocol that is not offered."""
    flock = Flock()

    @flock.agent
    def echo(text: str) -> str:
        return text

    async with client_of(create_app(flock, store=":memory:", auth="host", public_url=public_url)) as client:
        assert (await get(client, "/agents/echo"))["urls"] == {}
    offered = ["vercel", "ag-ui", "a2a", "openai"]
    app = create_app(flock, store=":memory:", auth="host", protocols=offered, public_url=public_url)
    async with app.lifespan(), client_of(app) as client:
        urls = (await get(client, "/agents/echo"))["urls"]
        assert urls == {name: f"{base}/{name}/echo" for name in ("a2a", "ag-ui", "vercel")}
        bodies = {
            "a2a": {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": A2A}},
            "ag-ui": {"threadId": "t", "runId": "r", "messages": [USER]},
            "vercel": {"id": "c", "messages": [{"id": "m", "role": "user", "parts": [{"type": "text", "text": "x"}]}]},
        }
        for name, url in urls.items():
            sent = await client.post(url.removeprefix(base), json=bodies[name], headers={"A2A-Version": "1.0"})
            assert sent.status_code == 200, sent.text
        assert [run["agent_name"] for run in (await get(client, "/runs"))["runs"]] == ["echo"] * 3

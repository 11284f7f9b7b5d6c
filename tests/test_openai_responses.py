"""OpenAI's responses and conversations: what is stored, continued, approved, streamed and resumed."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from flock import fair
from flock.agents.messages import Messages
from flock.core import Flock, FlockFactory
from flock.engine.embedded import EmbeddedEngine
from flock.errors import AgentError, StoreError
from flock.protocols import chats as chats_module
from flock.runs import Principal, RunContext, RunStatus, new_id
from flock.store import queries
from flock.testing import Reply
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.engines import counting_turns, until_run
from tests.support.http import client_of, get, left, wait_for
from tests.support.sockets import little_memory
from tests.test_openai import TOKENS, Chats, check_error, open_chats, serve

pytestmark = pytest.mark.anyio


class Responses(Chats):
    """The agents of ``Chats``, and some that keep conversations, ask for approvals, or are cut off."""

    def __init__(self) -> None:
        super().__init__()
        flock = self.flock
        self.texts, self.has_written = ["All about tea", "All about tea"], anyio.Event()

        flock.add_agent(FlockFactory.create_default_agent("pal", input="text: str", output="reply: str", history=5))

        @flock.agent
        async def end(talk: Messages) -> str:
            if talk[-1].content == "fail":
                raise AgentError("no")
            if talk[-1].content == "hang":
                await anyio.sleep_forever()
            return "ended"

        @flock.agent
        async def ask_twice(text: str, context: RunContext) -> str:
            kind = await context.ask("Which one?", str)
            await self.may_go.wait()
            return f"{kind} {await context.ask('How much?', str)}"

        @flock.agent
        async def last(talk: Messages) -> str:
            return talk[-1].content

        @flock.agent
        async def write(text: str, context: RunContext) -> str:
            """Writes half of a text, and the rest when it may."""
            whole = self.texts.pop(0)
            context.emit(whole[:5])
            self.has_written.set()
            await self.may_go.wait()
            context.emit(whole[5:])
            return whole


@pytest.fixture
def chats() -> Responses:
    return Responses()


@pytest.fixture
async def app(chats: Responses) -> AsyncIterator[FlockAPI]:
    engine = chats.flock.engine(transport=chats.model.transport)
    made = create_app(chats.flock, engine=engine, auth="host", protocols=["openai"])
    async with made.lifespan():
        yield made


async def send(client: httpx.AsyncClient, model: str, input: Any = "hi", headers: Any = None, **more: Any) -> Any:
    with anyio.fail_after(PATIENCE_S):
        body = {"model": model, "input": input, **more}
        return await client.post("/v1/responses", json=body, headers=headers)


async def create(client: httpx.AsyncClient, model: str, input: Any = "hi", **more: Any) -> Any:
    response = await send(client, model, input, **more)
    assert response.status_code == 200, response.text
    assert response.json()["id"].startswith(f"resp_{response.headers['Flock-Run-Id']}_")
    return response.json()


def run_id_of(response: Any) -> str:
    _, run_id, _ = response["id"].split("_")
    return str(run_id)


def text_of(response: Any) -> str:
    (item,) = response["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    text: str = item["content"][0]["text"]
    return text


def events_of(response: httpx.Response) -> list[Any]:
    """Return the events of a stream. Each has its type twice, and their numbers increase."""
    assert response.status_code == 200, response.text
    events = list[Any]()
    for block in response.text.split("\n\n"):
        if block and not block.startswith(":"):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
    numbers = [event["sequence_number"] for event in events]
    assert numbers == sorted(set(numbers))
    return events


def approval(response: Any, approve: bool = True, **more: Any) -> list[Any]:
    (request,) = response["output"]
    answer = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": approve}
    return [{**answer, **more}]


# Responses


async def test_a_response_is_a_run_that_can_be_read_again(client: httpx.AsyncClient, chats: Responses) -> None:
    chats.model.replies = [Reply({"reply": "Fine."}, usage=TOKENS)]
    made = await create(client, "chat", "How are you?", metadata={"topic": "mood"})
    assert (made["object"], made["status"], made["model"]) == ("response", "completed", "chat")
    assert (text_of(made), made["metadata"], made["error"]) == ("Fine.", {"topic": "mood"}, None)
    assert made["usage"] == {
        **{"input_tokens": 7, "input_tokens_details": {"cached_tokens": 2}, "total_tokens": 10},
        **{"output_tokens": 3, "output_tokens_details": {"reasoning_tokens": 1}},
    }
    again = await get(client, f"/v1/responses/{made['id']}")
    assert again == {**made, "metadata": {}}
    items = await get(client, f"/v1/responses/{made['id']}/input_items")
    assert [item["content"] for item in items["data"]] == [[{"type": "input_text", "text": "How are you?"}]]
    assert (await client.delete(f"/v1/responses/{made['id']}")).json()["deleted"] is True
    check_error(await client.get(f"/v1/responses/{made['id']}"), 404, "unknown_run")


async def test_all_about_a_response_names_its_run(client: httpx.AsyncClient) -> None:
    made = await create(client, "hello")
    requests = ("GET", ""), ("GET", "?stream=true"), ("GET", "/input_items"), ("POST", "/cancel"), ("DELETE", "")
    for method, more in requests:
        response = await client.request(method, f"/v1/responses/{made['id']}{more}")
        assert (response.status_code, response.headers["Flock-Run-Id"]) == (200, run_id_of(made))


@pytest.mark.parametrize(
    ("model", "input", "more", "answer"),
    [
        pytest.param("repeat", "ha", {"metadata": {"inputs": '{"times": 2}'}}, "haha", id="further inputs"),
        pytest.param("add", '{"a": 1, "b": 2}', {}, '{"result":3}', id="a JSON object of the inputs"),
        pytest.param("hello", "hi", {"text": {"format": {"type": "json_object"}}}, '{"result":"hello"}', id="JSON"),
        pytest.param("hello", "hi", {"instructions": "Obey me.", "tools": []}, "hello", id="without effect"),
        pytest.param(
            "roles",
            [
                {"role": "developer", "content": "Obey me."},
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "summary": []},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
                {"type": "function_call", "name": "x", "arguments": "{}", "call_id": "1"},
                {"type": "function_call_output", "call_id": "1", "output": "forged"},
                {"role": "user", "content": "c"},
            ],
            {},
            "user=a assistant=b user=c",
            id="a history",
        ),
    ],
)
async def test_an_input_becomes_inputs_and_the_result_a_message(
    client: httpx.AsyncClient, model: str, input: Any, more: dict[str, Any], answer: str
) -> None:
    made = await create(client, model, input, **more)
    assert text_of(made) == text_of(await get(client, f"/v1/responses/{made['id']}")) == answer
    *_, last = events_of(await send(client, model, input, **more, stream=True))
    assert (last["type"], text_of(last["response"])) == ("response.completed", answer)


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"input": []}, "input", "There is no message with the role 'user'."),
        ({"input": None}, "input", "There is no message with the role 'user'."),
        ({"input": [{"content": "x"}]}, "input.0.role", "A message needs a role."),
        ({"input": [{"type": "message", "role": None, "content": "x"}]}, "input.0.role", "A message needs a role."),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "'item_reference' is not supported"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://t"}]}]},
            "input.0.content.0",
            "No address is fetched. Send a data URL",
        ),
        ({"background": True, "store": False}, "store", "must be stored"),
        ({"previous_response_id": "x", "conversation": "y"}, "conversation", "not both"),
        ({"max_tool_calls": 5}, "max_tool_calls", "Leave it out."),
        (
            {"text": {"format": {"type": "json_schema", "schema": {}}}},
            "text.format.schema",
            "is not that of the outputs",
        ),
    ],
)
async def test_an_invalid_request_is_400_and_starts_no_run(
    client: httpx.AsyncClient, more: dict[str, Any], param: str | None, words: str
) -> None:
    error = check_error(
        await client.post("/v1/responses", json={"model": "echo", "input": "x", **more}), 400, ..., words
    )
    assert param is None or error["param"] == param
    assert (await get(client, "/runs"))["runs"] == []


async def test_an_unknown_id_is_404(client: httpx.AsyncClient) -> None:
    made = await create(client, "hello")
    for id_ in ("x", "resp_", made["id"][:-1] + "1", "resp_01a20e41-e4ec-74f9-8450-7dd74efe56ba_0", f"{made['id']}0"):
        for path in (f"/v1/responses/{id_}", f"/v1/responses/{id_}/input_items"):
            check_error(await client.get(path), 404, "unknown_run")
        check_error(await client.post(f"/v1/responses/{id_}/cancel"), 404, "unknown_run")
        check_error(await client.delete(f"/v1/responses/{id_}"), 404, "unknown_run")
        check_error(await send(client, "hello", previous_response_id=id_), 404, "unknown_run")
    check_error(await send(client, "hello", previous_response_id=""), 404, "unknown_run")
    check_error(await send(client, "hello", conversation=""), 404, "unknown_session")
    check_error(await send(client, "hello", conversation="mine"), 404, "unknown_session")
    check_error(await client.get("/v1/conversations/mine"), 404, "unknown_session")


async def test_a_failed_run_is_a_failed_response(client: httpx.AsyncClient) -> None:
    made = await create(client, "fail", "That")
    assert (made["status"], made["output"], made["error"]["code"]) == ("failed", [], "server_error")
    assert "That is too much. The run is " in made["error"]["message"]
    *_, last = events_of(await send(client, "fail", "That", stream=True))
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")


async def test_a_response_that_is_not_stored_is_deleted_after_its_answer(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        sent = await send(client, "hello", store=False, stream=stream)
        assert sent.status_code == 200
        check_error(await client.get(f"/v1/responses/resp_{sent.headers['Flock-Run-Id']}_0"), 404, "unknown_run")
    assert (await get(client, "/runs"))["runs"] == []


async def test_a_response_whose_run_cannot_be_deleted_is_sent(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(self: EmbeddedEngine, run_id: str) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(EmbeddedEngine, "delete_run", fail)
    assert (await send(client, "hello", store=False)).status_code == 200
    *_, last = events_of(await send(client, "hello", store=False, stream=True))
    assert last["type"] == "response.completed"
    assert caplog.text.count("could not be deleted: The disk is full.") == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_is_not_stored_is_deleted_if_its_client_leaves(
    chats: Responses, app: FlockAPI, client: httpx.AsyncClient, stream: bool
) -> None:
    body = {"model": "write", "input": "a secret", "store": False, "stream": stream}
    await left(app, "/v1/responses", body, chats.has_written.wait)
    assert (await get(client, "/runs"))["runs"] == []


async def test_a_response_that_is_not_stored_is_deleted_if_its_client_leaves_after_its_end(
    app: FlockAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read its stream, and a host that cancels the request before its response."""

    async def ended() -> None:
        while not (await get(client, "/runs", status="completed"))["runs"]:
            await anyio.lowlevel.checkpoint()

    body = {"model": "hello", "input": "a secret", "store": False}
    await left(app, "/v1/responses", {**body, "stream": True}, ended, reads=False)
    assert (await get(client, "/runs"))["runs"] == []

    async def cut_off(*args: Any, **options: Any) -> str:
        assert (await get(client, "/runs"))["runs"][0]["status"] == "completed"
        host.cancel()
        await anyio.lowlevel.checkpoint()
        return "never"

    monkeypatch.setattr(chats_module, "text_of", cut_off)
    with anyio.CancelScope() as host:
        await left(app, "/v1/responses", body, anyio.sleep_forever)
    assert host.cancelled_caught
    assert (await get(client, "/runs"))["runs"] == []


async def test_outputs_of_some_of_the_calls_are_400(client: httpx.AsyncClient, chats: Responses) -> None:
    chats.model.replies = [Reply(calls=[("look", {"at": "sky"}), ("zoom", {})]), Reply({"reply": "Blue."})]
    tools = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("look", "zoom")]
    asked = await create(client, "open", "What colour?", tools=tools)
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "blue"} for item in asked["output"]
    ]
    assert len(outputs) == 2
    for stream in (False, True):
        refused = await send(client, "open", outputs[:1], stream=stream, previous_response_id=asked["id"])
        check_error(refused, 400, "invalid_input", "The output of 'zoom' is missing. Send all outputs together.")
    assert text_of(await create(client, "open", outputs, previous_response_id=asked["id"])) == "Blue."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_is_not_stored_waits_for_its_key_if_its_client_leaves(
    chats: Responses, app: FlockAPI, client: httpx.AsyncClient, stream: bool
) -> None:
    body, key = {"model": "write", "input": "a secret", "store": False, "stream": stream}, {"Idempotency-Key": "once"}
    await left(app, "/v1/responses", body, chats.has_written.wait, key)
    chats.may_go.set()
    typed = {**key, "Content-Type": "application/json"}
    again = await client.post("/v1/responses", content=json.dumps(body), headers=typed)  # the bytes of left()
    assert (again.status_code, "All about tea" in again.text) == (200, True)
    assert (await get(client, "/runs"))["runs"] == []


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [{}, {"Idempotency-Key": "once"}], ids=["no key", "key"])
async def test_a_client_that_leaves_cancels_its_run_unless_it_has_a_key(
    chats: Responses, app: FlockAPI, client: httpx.AsyncClient, path: str, stream: bool, key: dict[str, str]
) -> None:
    said = {"messages": [{"role": "user", "content": "tea"}], "input": "tea"}
    await left(app, f"/v1/{path}", {"model": "write", "stream": stream, **said}, chats.has_written.wait, key)
    chats.may_go.set()
    (run,) = (await get(client, "/runs"))["runs"]
    assert (await wait_for(client, f"/run/{run['run_id']}"))["status"] == ("completed" if key else "cancelled")


async def test_who_follows_a_response_of_another_request_and_leaves_does_not_cancel_it(
    chats: Responses, app: FlockAPI, client: httpx.AsyncClient
) -> None:
    has_left = anyio.Event()

    async def follow() -> None:
        await chats.has_written.wait()
        (run,) = (await get(client, "/runs"))["runs"]
        await left(app, "/v1/responses", {"model": "write", "previous_response_id": f"resp_{run['run_id']}_0"}, checked)
        has_left.set()
        chats.may_go.set()

    async def checked() -> None:
        for _ in range(100):  # the request has begun to wait for the run
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        made = await create(client, "write", "tea")
    assert (text_of(made), has_left.is_set()) == ("All about tea", True)


async def test_a_run_of_another_version_of_its_agent_is_shown_as_json(
    chats: Responses, client: httpx.AsyncClient
) -> None:
    """Its input and its output had other names, or the input was left out."""
    chats.model.replies = [Reply({"reply": "hello"})]
    id_ = (await client.post("/v1/conversations")).json()["id"]
    made = await create(client, "pal", "hi", conversation=id_)
    other = FlockFactory.create_default_agent("pal", input="words: str", output="answer: str", history=5)
    chats.flock.agents["pal"] = other
    assert json.loads(text_of(await get(client, f"/v1/responses/{made['id']}"))).keys() == {"reply"}
    (item,) = (await get(client, f"/v1/responses/{made['id']}/input_items"))["data"]
    assert json.loads(item["content"][0]["text"]) == {"text": "hi"}
    assert len((await get(client, f"/v1/conversations/{id_}/items"))["data"]) == 2


async def test_a_key_makes_a_repeated_request_one_run(client: httpx.AsyncClient) -> None:
    made = [await create(client, "repeat", headers={"Idempotency-Key": "once"}) for _ in range(2)]
    assert made[0] == made[1]


# Background


@pytest.mark.parametrize("background", [False, True])
async def test_a_response_stays_in_the_background_or_not(client: httpx.AsyncClient, background: bool) -> None:
    """Its run outlives its client in both cases, because it has a key."""
    made = await create(client, "repeat", background=background, headers={"Idempotency-Key": "k"})
    read = await get(client, f"/v1/responses/{made['id']}")
    assert (made["id"], made["background"], read["background"]) == (read["id"], background, background)


async def test_a_response_in_the_background_can_be_read_until_it_ends(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    made = await create(client, "write", background=True)
    assert made["status"] in ("queued", "in_progress")
    assert (made["background"], made["output"], made["usage"]) == (True, [], None)
    await chats.has_written.wait()
    assert (await get(client, f"/v1/responses/{made['id']}"))["status"] == "in_progress"
    check_error(await client.delete(f"/v1/responses/{made['id']}"), 400, "conflict")
    chats.may_go.set()
    await wait_for(client, f"/run/{run_id_of(made)}")
    ended = await get(client, f"/v1/responses/{made['id']}")
    assert (ended["status"], text_of(ended)) == ("completed", "All about tea")


@pytest.mark.parametrize("wait_for_what", ["a time", "a message"])
async def test_a_run_that_sleeps_or_awaits_a_message_is_in_progress(
    client: httpx.AsyncClient, app: FlockAPI, chats: Responses, wait_for_what: str
) -> None:
    @chats.flock.agent
    async def idle(text: str, context: RunContext) -> str:
        await (context.sleep(3600) if wait_for_what == "a time" else context.receive("post", str))
        return text

    made = await create(client, "idle", background=True)
    await until_run(app.engine, run_id_of(made), lambda run: run.status is RunStatus.WAITING)
    read = await get(client, f"/v1/responses/{made['id']}")
    assert (read["status"], read["output"], read["completed_at"], read["usage"]) == ("in_progress", [], None, None)
    assert (await client.post(f"/v1/responses/{made['id']}/cancel")).json()["status"] == "cancelled"


async def test_cancel_returns_when_the_run_has_stopped(client: httpx.AsyncClient) -> None:
    made = await create(client, "hang", background=True)
    cancelled = (await client.post(f"/v1/responses/{made['id']}/cancel")).json()
    assert (cancelled["id"], cancelled["status"], cancelled["output"]) == (made["id"], "cancelled", [])
    again = await client.post(f"/v1/responses/{made['id']}/cancel")
    assert again.json() == cancelled
    done = await create(client, "hello")
    assert (await client.post(f"/v1/responses/{done['id']}/cancel")).json()["status"] == "completed"


# Conversations


async def test_a_response_continues_the_latest_of_its_conversation(client: httpx.AsyncClient) -> None:
    first = await create(client, "roles", "a")
    second = await create(client, "roles", "b", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    assert text_of(second) == "user=a assistant=user=a user=b"
    check_error(await send(client, "roles", "c", previous_response_id=first["id"]), 400, ..., "A later response")
    third = await create(client, "roles", "c", previous_response_id=second["id"])
    assert text_of(third).endswith("user=c")


async def test_a_failed_or_cancelled_response_is_not_the_latest(client: httpx.AsyncClient) -> None:
    """Clients send a request again that was cut off."""
    conversation = (await client.post("/v1/conversations", json={})).json()["id"]
    first = await create(client, "roles", "a", conversation=conversation)
    assert (await create(client, "end", "fail", conversation=conversation))["status"] == "failed"
    hanging = await create(client, "end", "hang", conversation=conversation, background=True)
    error = await send(client, "roles", "d", conversation=conversation)
    assert run_id_of(hanging) in check_error(error, 400, ..., "so nothing can continue it.")["message"]
    await client.post(f"/v1/responses/{hanging['id']}/cancel")
    assert text_of(await create(client, "roles", "d", previous_response_id=first["id"])).endswith("user=d")


async def test_an_agent_with_a_history_reads_the_session(client: httpx.AsyncClient, chats: Responses) -> None:
    chats.model.replies = [Reply({"reply": "one"}), Reply({"reply": "two"})]
    first = await create(client, "pal", "a")
    await create(client, "pal", "b", previous_response_id=first["id"])
    assert "one" in chats.model.requests[-1]["messages"][-2]["content"]


async def test_an_agent_that_reads_nothing_cannot_continue(client: httpx.AsyncClient) -> None:
    first = await create(client, "echo", "a")
    error = check_error(
        await send(client, "echo", "b", previous_response_id=first["id"]), 400, ..., "'echo' cannot cont"
    )
    assert error["param"] == "previous_response_id"


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_a_page_of_a_conversation_ends_at_a_number_of_bytes(order: str) -> None:
    """A page of long answers took 2.3 GB."""
    flock, id_ = Flock("long"), f"conv_{new_id()}"

    @flock.agent
    async def repeat(messages: Messages) -> str:
        return messages[-1].content * 300_000

    engine = flock.engine(max_input_bytes=10_000_000)
    app = create_app(flock, protocols=["openai"], engine=engine, auth="anybody")
    async with app.lifespan(), client_of(app) as client:
        for text in "abcdefgh":
            await create(client, "repeat", text, conversation=id_)
        texts, query, pages = list[str](), dict[str, Any]({"order": order, "limit": 100}), 0
        while True:
            with little_memory(12_000_000):
                page = await get(client, f"/v1/conversations/{id_}/items", **query)
            texts += [item["content"][0]["text"][0] for item in page["data"]]
            query["after"], pages = page["last_id"], pages + 1
            assert 0 < len(page["data"]) < 10
            if not page["has_more"]:
                break
    assert texts == sorted([*"abcdefgh"] * 2, reverse=order == "desc")
    assert pages == 3


async def test_a_conversation_is_a_session(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = (await client.post("/v1/conversations")).json()
    id_ = made["id"]
    assert (made["object"], made["metadata"]) == ("conversation", {})
    assert await get(client, f"/v1/conversations/{id_}") == made
    for text in ("a", "b"):
        response = await create(client, "roles", text, conversation={"id": id_})
        assert response["conversation"] == {"id": id_}
    assert (await get(client, f"/session/{id_}"))["total_runs"] == 2

    async def listed(**query: Any) -> tuple[list[str], Any]:
        page = await get(client, f"/v1/conversations/{id_}/items", **query)
        return [item["content"][0]["text"] for item in page["data"]], page

    texts = ["a", "user=a", "b", "user=a assistant=user=a user=b"]
    assert (await listed(order="asc"))[0] == (await listed())[0][::-1] == texts
    some, page = await listed(order="asc", limit=3)
    assert (some, page["has_more"], page["last_id"]) == (texts[:3], True, page["data"][-1]["id"])
    rest, page = await listed(order="asc", after=page["last_id"])
    assert (rest, page["has_more"]) == (texts[3:], False)
    check_error(await client.get(f"/v1/conversations/{id_}/items?order=up"), 400, "invalid_input")
    check_error(await client.post("/v1/conversations", json={"items": [{}]}), 400, "invalid_input", "without items")
    run_of = EmbeddedEngine.get_run

    async def deleted_meanwhile(engine: EmbeddedEngine, run_id: str) -> Any:
        run = await run_of(engine, run_id)
        if b'"b"' in bytes(run.inputs):
            await engine.delete_run(run_id)
        return await run_of(engine, run_id)

    monkeypatch.setattr(EmbeddedEngine, "get_run", deleted_meanwhile)
    assert (await listed())[0] == texts[1::-1]
    deleted = (await client.delete(f"/v1/conversations/{id_}")).json()
    assert deleted == {"id": id_, "object": "conversation.deleted", "deleted": True}
    assert (await listed())[0] == []
    assert (await client.delete(f"/v1/conversations/{id_}")).status_code == 200


async def test_conversations_and_responses_of_others_do_not_exist(chats: Responses) -> None:
    async def auth(connection: Any) -> Principal:
        return Principal(name=connection.headers["x-user"], admin=connection.headers["x-user"] == "root")

    ann, bob, root = ({"X-User": name} for name in ("ann", "bob", "root"))
    async with open_chats(chats, auth=auth, protocols=["openai"]) as client:
        id_ = (await client.post("/v1/conversations", headers=ann)).json()["id"]
        made = (await send(client, "roles", "a", ann, conversation=id_)).json()
        check_error(await client.get(f"/v1/responses/{made['id']}", headers=bob), 404, "unknown_run")
        check_error(await send(client, "roles", "b", bob, previous_response_id=made["id"]), 404, "unknown_run")
        for other in (bob, root):
            assert text_of((await send(client, "roles", "b", other, conversation=id_)).json()) == "user=b"
            assert len((await client.get(f"/v1/conversations/{id_}/items", headers=other)).json()["data"]) == 2
        await client.delete(f"/v1/conversations/{id_}", headers=root)
        assert (await client.get(f"/v1/responses/{made['id']}", headers=ann)).status_code == 200


async def test_two_continuations_at_once_make_one(
    client: httpx.AsyncClient, app: FlockAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, answers = await create(client, "roles", "a"), list[httpx.Response]()
    list_runs = app.engine.list_runs

    async def slowly(wanted: Any) -> Any:
        page = await list_runs(wanted)
        for _ in range(50):  # in which the others read the same
            await anyio.lowlevel.checkpoint()
        return page

    monkeypatch.setattr(app.engine, "list_runs", slowly)

    async def go_on(text: str) -> None:
        answers.append(await send(client, "roles", text, previous_response_id=first["id"]))

    async with anyio.create_task_group() as tasks:
        for text in "bcd":
            tasks.start_soon(go_on, text)
    refused, _, made = sorted(answers, key=lambda answer: -answer.status_code)
    check_error(refused, 400, "conflict", "has continued this session")
    assert (made.status_code, len((await get(client, "/runs"))["runs"])) == (200, 2)


async def test_two_processes_continue_a_conversation_once(
    chats: Responses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the same latest response before one of them has continued it."""
    apps = [
        create_app(flock, engine=flock.engine(store=tmp_path / "x.db"), auth="host", protocols=["openai"])
        for flock in (chats.flock, Responses().flock)
    ]
    body = {"conversation": f"conv_{new_id()}"}
    async with apps[0].lifespan(), apps[1].lifespan(), client_of(apps[0]) as here, client_of(apps[1]) as there:
        for texts in ("ab", "cd"):
            both, answers = asyncio.Barrier(2), list[httpx.Response]()
            for app in apps:

                async def both_read(wanted: Any, read: Any = app.engine.list_runs, both: Any = both) -> Any:
                    page = await read(wanted)
                    await both.wait()
                    return page

                monkeypatch.setattr(app.engine, "list_runs", both_read)

            async def go_on(client: httpx.AsyncClient, text: str, answers: Any = answers) -> None:
                answers.append(await send(client, "roles", text, **body))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on, here, texts[0])
                tasks.start_soon(go_on, there, texts[1])
            made, refused = sorted(answers, key=lambda answer: answer.status_code)
            check_error(refused, 400, "conflict", "has continued this session")
            assert made.status_code == 200
            monkeypatch.undo()
        said = (await get(here, f"/v1/conversations/{body['conversation']}/items"))["data"]
        assert len(said) == 4


async def test_a_continuation_that_is_sent_again_with_its_key_is_the_same(client: httpx.AsyncClient) -> None:
    first, key = await create(client, "roles", "a"), {"Idempotency-Key": "once"}
    made = [await create(client, "roles", "b", headers=key, previous_response_id=first["id"]) for _ in range(2)]
    assert made[0] == made[1]
    error = await send(client, "roles", "c", key, previous_response_id=first["id"])
    check_error(error, 400, "idempotency_key_reused")


async def test_the_latest_response_is_found_among_many_failed_ones(
    client: httpx.AsyncClient, app: FlockAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    id_ = (await client.post("/v1/conversations")).json()["id"]
    await create(client, "roles", "a", conversation=id_)
    for _ in range(120):
        await app.engine.submit("end", {"talk": [{"role": "user", "content": "fail"}]}, session_id=id_)
    await create(client, "end", "fail", conversation=(await client.post("/v1/conversations")).json()["id"])
    while (await get(client, "/runs", session_id=id_, limit=1, status="starting"))["runs"]:
        await anyio.lowlevel.checkpoint()
    listed, list_runs = 0, app.engine.list_runs

    async def count(wanted: Any) -> Any:
        nonlocal listed
        page = await list_runs(wanted)
        listed += len(page)
        return page

    monkeypatch.setattr(app.engine, "list_runs", count)
    assert text_of(await create(client, "roles", "b", conversation=id_)) == "user=a assistant=user=a user=b"
    assert listed < 5


LONG = [{"role": ("user", "assistant")[at % 2], "content": f"message {at}"} for at in range(4001)]


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
async def test_other_requests_are_served_while_a_long_history_is_read(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(fair, "SHARE_S", 0)
    async with counting_turns() as turns:
        sent = await client.post(f"/v1/{path}", json={"model": "last", "messages": LONG, "input": LONG})
    assert (sent.status_code, turns[0] > len(LONG)) == (200, True)


async def test_a_page_of_a_long_history_holds_only_its_own_items(client: httpx.AsyncClient) -> None:
    made = await create(client, "last", LONG)
    path = f"/v1/responses/{made['id']}/input_items"
    await get(client, path)
    with little_memory(2_500_000):
        (item,) = (await get(client, path, limit=1))["data"]
    assert item["content"][0]["text"] == text_of(made) == "message 4000"


# Questions


async def test_an_approval_is_asked_and_answered_by_items(client: httpx.AsyncClient, chats: Responses) -> None:
    calls = [("pay", {"amount": 3})]
    chats.model.replies = [Reply(calls=calls), Reply({"reply": "Paid."})]
    asked = await create(client, "payer", "Pay 3.")
    (item,) = asked["output"]
    assert (asked["status"], item["type"], item["name"]) == ("completed", "mcp_approval_request", "pay")
    assert json.loads(item["arguments"]) == {"amount": 3}
    refused = await send(client, "payer", "Go on!", previous_response_id=asked["id"])
    check_error(refused, 400, ..., "as an item, without messages")
    answered = await create(client, "payer", approval(asked), previous_response_id=asked["id"])
    assert (answered["id"], text_of(answered), chats.paid) == (asked["id"][:-1] + "1", "Paid.", [3])
    assert (await get(client, f"/v1/responses/{asked['id']}"))["output"] == asked["output"]
    assert (await get(client, f"/v1/responses/{answered['id']}"))["output"] == answered["output"]
    (given,) = (await get(client, f"/v1/responses/{answered['id']}/input_items"))["data"]
    assert given["content"][0]["text"] == "Pay 3."
    *_, last = events_of(await client.get(f"/v1/responses/{asked['id']}?stream=true"))
    assert last["response"]["output"] == asked["output"]


async def test_the_same_answer_again_attaches_and_another_is_refused(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    chats.model.replies = [Reply(calls=[("pay", {"amount": 3})]), Reply({"reply": "Not paid."})]
    asked = await create(client, "payer", "Pay 3.")
    denial = approval(asked, False, reason="No money.")
    answered = await create(client, "payer", denial)  # the id of the request names the run
    assert (text_of(answered), chats.paid) == ("Not paid.", [])
    assert "No money." in json.dumps(chats.model.requests[-1])
    history = [{"role": "user", "content": "Pay 3."}, asked["output"][0], *denial]
    assert await create(client, "payer", history) == answered
    check_error(await send(client, "payer", approval(asked)), 400, "conflict", "answered otherwise")
    forged = [{**denial[0], "approval_request_id": denial[0]["approval_request_id"] + "x"}]
    check_error(await send(client, "payer", forged), 404, "unknown_call")
    mine = [{**denial[0], "approval_request_id": "mine"}]
    check_error(await send(client, "payer", mine), 400, "invalid_input", "not for calls that this server has asked")


async def test_an_approval_that_was_answered_elsewhere_continues_too(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    chats.model.replies = [Reply(calls=[("pay", {"amount": 3})]), Reply({"reply": "Paid."})]
    asked = await create(client, "payer", "Pay 3.")
    (question,) = (await get(client, "/questions"))["questions"]
    path = f"/run/{question['run_id']}"
    await client.post(f"{path}/calls/{question['call_id']}?wait=30", json={"output": {"approved": True}})
    assert (await get(client, f"/v1/responses/{asked['id']}"))["output"] == asked["output"]
    error = await send(client, "payer", "And now?", previous_response_id=asked["id"])
    check_error(error, 400, ..., f"Continue {asked['id'][:-1]}1.")
    assert text_of(await create(client, "payer", [], previous_response_id=asked["id"])) == "Paid."


async def test_a_question_that_is_answered_while_it_is_read_is_shown_once(
    client: httpx.AsyncClient, app: FlockAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A response that has asked ends as it was; the next one is what the run does now."""
    asked, get_calls = await create(client, "ask_twice", "Tea"), app.engine.get_calls
    (question,) = (await get(client, "/questions"))["questions"]

    async def answered_meanwhile(run: Any) -> Any:
        monkeypatch.undo()
        await client.post(f"/run/{question['run_id']}/calls/{question['call_id']}", json={"output": "Assam"})
        return await get_calls(run)

    seen = list[Any]()
    for number in (0, 1):
        monkeypatch.setattr(app.engine, "get_calls", answered_meanwhile)
        seen.append(await get(client, f"/v1/responses/{asked['id'][:-1]}{number}"))
    assert seen[0] == asked
    assert (seen[1]["status"] in ("queued", "in_progress"), seen[1]["output"]) == (True, [])


async def test_responses_of_a_run_with_many_calls_have_their_own_numbers(
    client: httpx.AsyncClient, chats: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only some of the calls are shown."""
    monkeypatch.setattr(queries, "MAX_SHOWN_CALLS", 3)

    @chats.flock.agent
    async def work(text: str, context: RunContext) -> str:
        for n in range(4):
            await context.call(abs, n)
        return "".join([await context.ask(f"Letter {n}?", str) for n in range(2)])

    made = [await create(client, "work")]
    for letter in "ab":
        run_id = made[-1]["id"].split("_")[1]
        (question,) = (await get(client, f"/run/{run_id}"))["waiting_for"]
        path = f"/run/{run_id}/calls/{question['call_id']}?wait={PATIENCE_S}"
        assert (await client.post(path, json={"output": letter})).status_code == 200
        made.append(await create(client, "work", [], previous_response_id=made[-1]["id"]))
    assert [each["id"].rpartition("_")[2] for each in made] == ["0", "1", "2"]
    assert text_of(made[-1]) == "ab"
    for each in made:
        assert (await get(client, f"/v1/responses/{each['id']}"))["output"] == each["output"]


async def test_a_call_of_a_tool_of_the_client_is_an_item(client: httpx.AsyncClient, chats: Responses) -> None:
    tools = [{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": None}]
    chats.model.replies = [Reply(calls=[("look", {"at": "sky"})]), Reply({"reply": "Blue."})]
    said = [{"role": "developer", "content": "Be quick."}, {"role": "user", "content": "What colour?"}]
    events = events_of(await send(client, "open", said, tools=tools, stream=True, instructions="Look well."))
    assert "Look well.\n\nBe quick." in chats.model.requests[0]["messages"][0]["content"]
    asked = events[-1]["response"]
    assert [event["type"] for event in events[2:]] == [
        *("response.output_item.added", "response.function_call_arguments.delta"),
        *("response.function_call_arguments.done", "response.output_item.done", "response.completed"),
    ]
    (item,) = asked["output"]
    assert (asked["status"], item["type"], item["name"]) == ("completed", "function_call", "look")
    assert json.loads(item["arguments"]) == {"at": "sky"}
    output = {"type": "function_call_output", "call_id": item["call_id"], "output": "blue"}
    history = [{"role": "user", "content": "What colour?"}, item, output]
    for input, more in (([output], {"previous_response_id": asked["id"]}), (history, {})):
        answered = await create(client, "open", input, tools=tools, **more)
        assert (answered["id"], text_of(answered)) == (asked["id"][:-1] + "1", "Blue.")
    assert (await get(client, f"/v1/responses/{asked['id']}"))["output"] == asked["output"]
    other = [{**output, "output": "red"}]
    check_error(await send(client, "open", other), 400, "conflict", "answered otherwise")
    foreign = [{**output, "call_id": "call_1"}]
    check_error(await send(client, "open", foreign), 400, "invalid_input", "not for calls that this server has asked")


async def test_another_question_is_an_incomplete_response(client: httpx.AsyncClient) -> None:
    asked = await create(client, "ask", "Tea")
    run_id = run_id_of(asked)
    assert (asked["status"], asked["incomplete_details"]) == ("incomplete", {"reason": "waiting"})
    assert text_of(asked) == f"Which one?\n\n(The run {run_id} waits for the answer.)"
    events = events_of(await send(client, "ask", "Tea", stream=True))
    assert events[-1]["type"] == "response.incomplete"
    (delta,) = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert delta == text_of(events[-1]["response"])
    (question, _) = (await get(client, "/questions"))["questions"][::-1]
    await client.post(f"/run/{run_id}/calls/{question['call_id']}", json={"output": "Assam"})
    assert text_of(await create(client, "ask", [], previous_response_id=asked["id"])) == "Tea: Assam"


# Reasoning


THOUGHTS = {"reasoning": {"summary": "auto"}}


async def test_the_reasoning_of_an_agent_is_an_item_with_a_summary(client: httpx.AsyncClient, chats: Responses) -> None:
    chats.model.replies = [Reply({"reply": "Blue."}, reasoning="The sky?")] * 2
    made = await create(client, "chat", "What colour?", **THOUGHTS)
    thoughts, _ = made["output"]
    assert (thoughts["type"], thoughts["summary"]) == ("reasoning", [{"type": "summary_text", "text": "The sky?"}])
    events = events_of(await send(client, "chat", "What colour?", stream=True, **THOUGHTS))
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["reasoning", "message"]
    assert "".join(event["delta"] for event in events if event["type"].endswith("summary_text.delta")) == "The sky?"
    assert list(dict.fromkeys(event["type"] for event in events)) == [
        *ORDER[:3],
        *("response.reasoning_summary_part.added", "response.reasoning_summary_text.delta"),
        *("response.reasoning_summary_text.done", "response.reasoning_summary_part.done"),
        *("response.output_item.done", *ORDER[3:7], ORDER[8]),
    ]
    for event in events:
        if "output_index" in event:
            item_id = event["item_id"] if "item_id" in event else event["item"]["id"]
            assert event["output_index"] == (0 if item_id.startswith("rs_") else 1)


async def test_thoughts_that_nobody_asked_for_or_that_could_not_be_read_again_are_not_shown(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    chats.model.replies = [Reply({"reply": "Blue."}, reasoning="The sky?")] * 4
    for more in ({}, {"reasoning": {"effort": "low"}}, {"stream": True}):
        answer = await send(client, "chat", "What colour?", **more)
        assert (answer.status_code, "The sky?" in answer.text) == (200, False)
    made = await create(client, "chat", "What colour?", background=True, **THOUGHTS)
    await wait_for(client, f"/run/{run_id_of(made)}")
    assert text_of(await get(client, f"/v1/responses/{made['id']}")) == "Blue."
    check_error(await send(client, "chat", reasoning={"summary": "long"}), 400, "invalid_input")


async def test_thoughts_before_an_invalid_answer_are_kept_apart(client: httpx.AsyncClient, chats: Responses) -> None:
    chats.model.replies = [Reply("{", reasoning="First."), Reply({"reply": "Blue."}, reasoning="Second.")]
    *_, last = events_of(await send(client, "chat", "What colour?", stream=True, **THOUGHTS))
    assert last["response"]["output"][0]["summary"][0]["text"] == "First.\n\nSecond."


# Streams


ORDER = [
    *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
    *("response.output_text.delta", "response.output_text.done", "response.content_part.done"),
    *("response.output_item.done", "response.completed"),
]


async def test_the_events_of_a_stream_have_the_order_that_clients_check(client: httpx.AsyncClient) -> None:
    events = events_of(await send(client, "echo", "All about tea", stream=True))
    types = [event["type"] for event in events]
    assert list(dict.fromkeys(types)) == ORDER
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1
    assert [event["response"]["status"] for event in events if "response" in event] == [
        *["in_progress"] * 2,
        "completed",
    ]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    assert "".join(event["delta"] for event in deltas) == done["text"] == "All about tea "
    assert all(event["logprobs"] == [] for event in (*deltas, done))
    item_ids = {event["item_id"] for event in events if "item_id" in event}
    assert item_ids == {event["item"]["id"] for event in events if "item" in event}
    made = await get(client, f"/v1/responses/{events[-1]['response']['id']}")
    assert made["output"] == events[-1]["response"]["output"]
    empty = events_of(await send(client, "repeat", "", stream=True))
    assert [event["type"] for event in empty] == [type_ for type_ in ORDER if type_ != "response.output_text.delta"]


async def test_a_stream_resumes_after_any_event(client: httpx.AsyncClient) -> None:
    """In the middle of a piece of text too, since another process may have other pieces."""
    for text in ("", "😀 é\u2028x"):
        made = await create(client, "repeat", text)
        path = f"/v1/responses/{made['id']}?stream=true"
        events = events_of(await client.get(path))
        for at, event in enumerate(events):
            rest = events_of(await client.get(f"{path}&starting_after={event['sequence_number']}"))
            assert rest == events[at + 1 :]
    (one,) = [event for event in events if event["type"] == "response.output_text.delta"]
    prefix = await create(client, "repeat", one["delta"][:3])
    other = events_of(await client.get(f"/v1/responses/{prefix['id']}?stream=true"))
    (had,) = [event["sequence_number"] for event in other if event["type"] == "response.output_text.delta"]
    rest = events_of(await client.get(f"{path}&starting_after={had}"))
    assert rest[0] == {**one, "delta": one["delta"][3:]}
    assert rest[1:] == events[events.index(one) + 1 :]
    for number in (had + 1, 50 << 20):
        (*_, last) = events_of(await client.get(f"{path}&starting_after={number}"))
        assert (last["type"], last["code"]) == ("error", "text_replaced")
        assert run_id_of(made) in last["message"]


async def test_a_resumed_stream_goes_on_with_a_run_that_is_running(client: httpx.AsyncClient, chats: Responses) -> None:
    app = client._transport.app  # type: ignore[attr-defined]
    made = await create(client, "write", background=True)
    await chats.has_written.wait()
    path = f"/v1/responses/{made['id']}"
    seen = await serve(app, None, is_delta, path, "stream=true")
    assert (seen[-1]["type"], seen[-1]["delta"]) == ("response.output_text.delta", "All a")
    query = f"stream=true&starting_after={seen[-1]['sequence_number']}"
    chats.may_go.set()
    seen += await serve(app, None, lambda _: False, path, query)
    assert "".join(event.get("delta", "") for event in seen) == text_of(seen[-1]["response"]) == "All about tea"


def is_delta(event: Any) -> bool:
    return bool(event["type"] == "response.output_text.delta")


async def test_the_client_of_a_run_whose_text_was_replaced_gets_an_error(
    client: httpx.AsyncClient, chats: Responses
) -> None:
    chats.texts = ["Never about", "All about tea"]
    app = client._transport.app  # type: ignore[attr-defined]
    made = await create(client, "write", background=True)
    *_, event = await serve(app, None, is_delta, f"/v1/responses/{made['id']}", "stream=true")
    run = f"/run/{run_id_of(made)}"
    await client.post(f"{run}/cancel?wait=30")
    chats.may_go.set()
    await client.post(f"{run}/retry")
    await wait_for(client, run)
    assert text_of(await get(client, f"/v1/responses/{made['id']}")) == "All about tea"
    resumed = f"/v1/responses/{made['id']}?stream=true&starting_after={event['sequence_number']}"
    *_, last = events_of(await client.get(resumed))
    assert (last["type"], last["code"]) == ("error", "text_replaced")
    assert run_id_of(made) in last["message"]


async def test_a_live_text_that_is_replaced_goes_on_or_ends_with_an_error(
    client: httpx.AsyncClient, app: FlockAPI, chats: Responses
) -> None:
    def on_event(event: Any) -> None:
        if is_delta(event):
            chats.may_go.set()

    async def stream(text: str) -> list[Any]:
        chats.may_go = anyio.Event()
        return await serve(app, {"model": "replace", "input": text, "stream": True}, on_event, "/v1/responses")

    events = await stream("The first answer")
    assert "".join(event["delta"] for event in events if is_delta(event)) == "The first answer"
    assert (events[-1]["type"], text_of(events[-1]["response"])) == ("response.completed", "The first answer")
    for text in ("Another", "The"):
        first, *_, last = await stream(text)
        assert (last["type"], last["code"]) == ("error", "text_replaced")
        assert run_id_of(first["response"]) in last["message"]
        assert text_of(await get(client, f"/v1/responses/{first['response']['id']}")) == text


async def test_a_head_request_has_no_stream(client: httpx.AsyncClient) -> None:
    made = await create(client, "hello")
    response = await client.head(f"/v1/responses/{made['id']}?stream=true")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Flock-Run-Id"] == run_id_of(made)

"""A2A: cards, tasks, streams, questions, and what a hostile agent may send. ``test_a2a_clients.py`` runs the SDK."""

import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest

from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory, Image
from flock.engine.embedded import EmbeddedEngine
from flock.protocols import chats as chats_module
from flock.runs import Engine, Event, Run, RunContext, new_id
from flock.testing import Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for
from tests.support.flocks import sample_flock
from tests.support.http import client_of, get, left, wait_for, wait_until
from tests.test_files import PNG
from tests.test_openai import ANN, BOB, KEYS
from tests.test_openai_files import WAV, flock_of_files
from tests.test_vercel import Pages

pytestmark = pytest.mark.anyio

NOT_FOUND, NOT_CANCELABLE, NO_PUSH, UNSUPPORTED, CONTENT_TYPE = range(-32001, -32006, -1)
VERSION, PARSE, INVALID_REQUEST, NO_METHOD, INVALID_PARAMS = -32009, -32700, -32600, -32601, -32602


class Agents(Pages):
    """The agents of ``Pages``, and some more."""

    def __init__(self) -> None:
        super().__init__()

        @self.flock.agent
        async def counts(text: str, context: RunContext) -> str:
            context.progress(1, 2, "half")
            await self.may_go.wait()
            return text

        @self.flock.agent
        async def guess(text: str, context: RunContext) -> int:
            return await context.ask("How many?", int)

        @self.flock.agent
        async def order(text: str, context: RunContext) -> str:
            return f"{await context.ask('How many?', int)} {await context.ask('A note?', str)}"

        @self.flock.agent
        def adds(a: float, b: float = 0) -> float:
            return a + b

        @self.flock.agent
        async def sleeps(text: str, context: RunContext) -> str:
            await context.sleep(3600)
            return text

        @self.flock.agent
        async def long(length: int) -> list[str]:
            return ["x" * length]


@pytest.fixture
def chats() -> Agents:
    return Agents()


@pytest.fixture
async def client(chats: Agents) -> AsyncIterator[httpx.AsyncClient]:
    engine = chats.flock.engine(transport=chats.model.transport)
    app = create_app(chats.flock, engine=engine, api_keys=KEYS, protocols=["a2a"])
    headers = {**ANN, "A2A-Version": "1.0"}
    async with app.lifespan(), client_of(app, headers) as made:
        yield made


async def post(client: httpx.AsyncClient, agent: str, method: str, headers: Any = None, **params: Any) -> Any:
    with anyio.fail_after(PATIENCE_S):
        body = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
        return await client.post(f"/a2a/{agent}", json=body, headers=headers)


async def call(client: httpx.AsyncClient, agent: str, method: str, **params: Any) -> Any:
    """Return the result of a method."""
    response = await post(client, agent, method, **params)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body.keys() == {"jsonrpc", "id", "result"}, body
    assert body["id"] == 7
    return body["result"]


async def refused(client: httpx.AsyncClient, agent: str, method: str, code: int, words: str, **params: Any) -> None:
    check_error(await post(client, agent, method, **params), code, words)


def check_error(response: httpx.Response, code: int, words: str, status: int = 200) -> None:
    body = response.json()
    assert (response.status_code, body["error"]["code"]) == (status, code), response.text
    assert words in body["error"]["message"]


def message(*parts: Any, **more: Any) -> Any:
    """Return a message. A string is the text of a part."""
    made = [{"text": part} if isinstance(part, str) else {"data": part} for part in parts]
    return {"messageId": new_id(), "role": "ROLE_USER", "parts": made, **more}


async def send(client: httpx.AsyncClient, agent: str, *parts: Any, configuration: Any = None, **more: Any) -> Any:
    """Send a message, and return the task."""
    result = await call(
        client, agent, "SendMessage", message=message(*parts, **more), configuration=configuration or {}
    )
    return result["task"]


def state(task: Any) -> str:
    return str(task["status"]["state"].removeprefix("TASK_STATE_").lower())


def results(response: httpx.Response) -> list[Any]:
    """Return the results in a stream."""
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    return [json.loads(block.removeprefix("data: "))["result"] for block in blocks]


async def stream(client: httpx.AsyncClient, agent: str, *parts: Any, **more: Any) -> "Seen":
    return Seen(results(await post(client, agent, "SendStreamingMessage", message=message(*parts, **more))))


class Seen:
    """What a client makes of a stream: it keeps the artifacts by their ids."""

    def __init__(self, events: list[Any]) -> None:
        self.task = events[0]["task"]
        self.states, artifacts = (
            [state(self.task)],
            {each["artifactId"]: [*each["parts"]] for each in self.task.get("artifacts", [])},
        )
        for event in events[1:]:
            ((kind, update),) = event.items()
            assert (update["taskId"], update["contextId"]) == (self.task["id"], self.task["contextId"])
            if kind == "statusUpdate":
                self.states.append(state(update))
                self.status = update["status"]
            elif update["append"]:
                artifacts[update["artifact"]["artifactId"]] += update["artifact"]["parts"]
            else:
                artifacts[update["artifact"]["artifactId"]] = [*update["artifact"]["parts"]]
        self.parts = [part for parts in artifacts.values() for part in parts]
        self.kinds = [next(iter(event)) for event in events]

    @property
    def text(self) -> str:
        return "".join(part["text"] for part in self.parts)


def text_of(task: Any) -> str:
    (artifact,) = task["artifacts"]
    (part,) = artifact["parts"]
    return str(part["text"])


# Tasks


async def test_a_message_is_a_run_of_its_context(client: httpx.AsyncClient) -> None:
    task = await send(client, "echo", "All about tea")
    assert (state(task), text_of(task)) == ("completed", "All about tea ")
    run = await get(client, f"/run/{task['id']}")
    assert (run["status"], run["session_id"], run["agent_name"]) == ("completed", task["contextId"], "echo")
    (said,) = task["history"]
    assert (said["role"], said["parts"]) == ("ROLE_USER", [{"text": "All about tea"}])
    assert await call(client, "echo", "GetTask", id=task["id"]) == task
    assert "history" not in await call(client, "echo", "GetTask", id=task["id"], historyLength=0)
    seen = await stream(client, "echo", "All about tea", contextId="mine")
    assert (seen.text, seen.states[-1], seen.task["contextId"]) == ("All about tea ", "completed", "mine")


async def test_a_stream_has_the_text_as_it_is_written_and_a_subscriber_gets_all_of_it(
    client: httpx.AsyncClient, chats: Agents
) -> None:
    seen = list[Seen]()

    async def follow(method: str, **params: Any) -> None:
        seen.append(Seen(results(await post(client, "write", method, **params))))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: follow("SendStreamingMessage", message=message("tea", contextId="mine")))
        await chats.has_written.wait()
        (task,) = (await call(client, "write", "ListTasks", contextId="mine"))["tasks"]
        assert state(task) == "working"
        tasks.start_soon(lambda: follow("SubscribeToTask", id=task["id"]))
        await wait_until(client, f"/run/{task['id']}", lambda run: run["status"] == "running")
        chats.may_go.set()
    assert [each.text for each in seen] == ["All about tea"] * 2
    assert [each.states[-1] for each in seen] == ["completed"] * 2
    await refused(client, "write", "SubscribeToTask", UNSUPPORTED, "COMPLETED", id=task["id"])


async def test_a_text_that_is_replaced_replaces_the_artifact(client: httpx.AsyncClient, chats: Agents) -> None:
    chats.may_go.set()
    assert (await stream(client, "replaced", "tea")).text == "Another one"


async def test_inputs_are_data_and_a_result_that_is_no_text_is_too(client: httpx.AsyncClient) -> None:
    assert text_of(await send(client, "joins", {"first": "a"}, {"second": "b"})) == "ab"
    for times in (2, 2.0):  # Protocol Buffers have only floats
        assert text_of(await send(client, "repeat", "ha", {"times": times})) == "haha"
    assert text_of(await send(client, "echo", "one", "two")) == "one two "
    mood = {"mood": "good", "words": ["a", "b"]}
    task = await send(client, "mood", "a b")
    assert task["artifacts"] == [{"artifactId": "result", "parts": [{"data": mood}]}]
    seen = await stream(client, "mood", "a b")
    assert (seen.parts, seen.states[-1]) == ([{"data": mood}], "completed")
    length = 200_000
    (artifact,) = (await send(client, "long", {"length": length}))["artifacts"]
    assert len(artifact["parts"][0]["data"]["result"][0]) == length
    assert len((await stream(client, "long", {"length": length})).parts[0]["data"]["result"][0]) == length


async def test_the_context_has_the_history_of_the_server(client: httpx.AsyncClient) -> None:
    first = await send(client, "says", "a", contextId="mine")
    second = await send(client, "says", "b", contextId="mine")
    assert text_of(first) == "user=a"
    assert text_of(second) == "user=a assistant=user=a user=b"
    assert [each["parts"] for each in second["history"]] == [[{"text": "b"}]]
    await send(client, "echo", "of another agent", contextId="mine")
    third = await send(client, "says", "c", contextId="mine")
    assert text_of(third).endswith("user=b assistant=user=a assistant=user=a user=b user=c")
    await refused(client, "says", "SendMessage", INVALID_PARAMS, "The server has", message=message({"talk": []}))


async def test_a_message_returns_at_once_if_it_asks_and_its_task_outlives_its_client(
    client: httpx.AsyncClient, chats: Agents
) -> None:
    task = await send(client, "write", "tea", configuration={"returnImmediately": True, "historyLength": 0})
    assert state(task) in ("submitted", "working")
    assert task.keys() == {"id", "contextId", "status"}
    chats.texts = ["All about tea"]
    for method in ("SendMessage", "SendStreamingMessage"):
        chats.texts, chats.has_written = ["All about tea"], anyio.Event()
        sent = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"message": message("tea", contextId=method)}}
        headers = {**ANN, "A2A-Version": "1.0"}
        await left(client._transport.app, "/a2a/write", sent, chats.has_written.wait, headers)  # type: ignore[attr-defined]
        (run,) = (await get(client, "/runs", session_id=method))["runs"]
        assert run["status"] == "running"
    chats.may_go.set()
    assert (await wait_for(client, f"/run/{run['run_id']}"))["status"] == "completed"


async def test_the_same_message_is_one_task(client: httpx.AsyncClient, chats: Agents) -> None:
    sent, task = message("hi", contextId="mine"), ""
    for _ in range(2):
        for method in ("SendMessage", "SendStreamingMessage"):
            response = await post(client, "says", method, message=sent)
            found = results(response)[0]["task"] if "Streaming" in method else response.json()["result"]["task"]
            assert found["id"] == (task := task or found["id"])
    other = await call(client, "says", "SendMessage", message={**sent, "messageId": "other"})
    again = await call(client, "says", "SendMessage", message={**sent, "parts": [{"text": "ho"}]})
    assert len({task, other["task"]["id"], again["task"]["id"]}) == 3
    bobs = await post(client, "says", "SendMessage", message=sent, headers=BOB)
    assert text_of(bobs.json()["result"]["task"]) == "user=hi"
    unfinished = message("tea", contextId="busy")
    settings = {"returnImmediately": True}
    one, two = [
        (
            await call(
                client,
                "end",
                "SendMessage",
                message={**unfinished, "parts": [{"text": "hang"}]},
                configuration=settings,
            )
        )["task"]
        for _ in range(2)
    ]
    assert one["id"] == two["id"]
    await refused(client, "end", "SendMessage", UNSUPPORTED, "not complete", message=unfinished)


async def post_text(client: httpx.AsyncClient, agent: str, params: str) -> httpx.Response:
    """Send a message with parameters as JSON text."""
    body = f'{{"jsonrpc": "2.0", "id": 7, "method": "SendMessage", "params": {params}}}'
    return await client.post(f"/a2a/{agent}", content=body, headers={"Content-Type": "application/json"})


async def test_a_message_may_be_spelled_otherwise_when_it_is_sent_again(client: httpx.AsyncClient) -> None:
    """Protocol Buffers write the members of an object in any order."""
    sent = '{"message": {"messageId": "m", "role": "ROLE_USER", "parts": [{"data": %s}]}}'
    ids = set[str]()
    for data in ('{"a": 1, "b": 2}', '{"b":2.0,"a":1.0}'):
        ids.add((await post_text(client, "adds", sent % data)).json()["result"]["task"]["id"])
    assert len(ids) == 1


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 5000])
async def test_a_number_out_of_range_is_an_error_of_its_input(client: httpx.AsyncClient, number: str) -> None:
    sent = f'{{"message": {{"messageId": "m", "role": "ROLE_USER", "parts": [{{"data": {{"a": {number}}}}}]%s}}}}'
    check_error(await post_text(client, "adds", sent % ""), INVALID_PARAMS, "")
    task = await send(client, "guess", "x")
    (question,) = (part["data"] for part in task["status"]["message"]["parts"] if "data" in part)
    sent = sent.replace('"a"', f'"{question["call_id"]}"')
    check_error(await post_text(client, "guess", sent % f', "taskId": "{task["id"]}"'), INVALID_PARAMS, "")


async def test_a_failed_task_says_why_and_a_cancelled_one_stops(client: httpx.AsyncClient, chats: Agents) -> None:
    task = await send(client, "fail", "This")
    assert (state(task), task["status"]["message"]["parts"]) == ("failed", [{"text": "This is too much."}])
    seen = await stream(client, "fail", "This")
    assert seen.states[-1] == "failed"
    await refused(client, "fail", "CancelTask", NOT_CANCELABLE, "failed", id=task["id"])
    hanging = await send(client, "hang", "x", configuration={"returnImmediately": True})
    for _ in range(2):
        assert state(await call(client, "hang", "CancelTask", id=hanging["id"])) == "canceled"
    assert (await get(client, f"/run/{hanging['id']}"))["status"] == "cancelled"


async def test_each_status_of_a_stream_is_that_of_the_run_it_shows(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the run ends right after it was read, or is answered by another client before the stream says it waits."""
    engine, pieces, get_run = (
        client._transport.app.engine,  # type: ignore[attr-defined]
        chats_module.StreamedAnswer.pieces,
        EmbeddedEngine.get_run,
    )

    async def read_early(engine: EmbeddedEngine, run_id: str, *principal: Any) -> Run:
        run = await get_run(engine, run_id, *principal)
        while (await get_run(engine, run_id)).is_active:
            await anyio.lowlevel.checkpoint()
        return run

    async def late(answer: Any, events: Any) -> AsyncIterator[Any]:
        async for piece in pieces(answer, events):
            if isinstance(piece, Event) and piece.name == "run.waiting":
                run_id, (question,) = piece.data["run_id"], piece.data["waiting_for"]
                await engine.answer_call(run_id, question.call_id, msgspec.Raw(b"7"))
                await engine.wait(run_id)
            yield piece

    with monkeypatch.context() as patched:
        patched.setattr(EmbeddedEngine, "get_run", read_early)
        seen = await stream(client, "echo", "tea")
        assert (seen.states[-1], seen.text) == ("completed", "tea ")
    monkeypatch.setattr(chats_module.StreamedAnswer, "pieces", late)
    seen = await stream(client, "guess", "x")
    assert (seen.states[-1], seen.parts) == ("input_required", [])
    assert state(await call(client, "guess", "GetTask", id=seen.task["id"])) == "completed"


async def test_a_task_is_read_once(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    task, reads = await send(client, "echo", "tea"), list[str]()
    for name in ("get_run", "get_outline"):
        read = getattr(EmbeddedEngine, name)

        async def counted(*args: Any, read: Any = read) -> Any:
            reads.append(read.__name__)
            return await read(*args)

        monkeypatch.setattr(EmbeddedEngine, name, counted)
    assert await call(client, "echo", "GetTask", id=task["id"]) == task
    assert reads == ["get_run"]


async def test_progress_is_a_status(client: httpx.AsyncClient, chats: Agents) -> None:
    task = await send(client, "counts", "x", configuration={"returnImmediately": True})
    while "message" not in task["status"]:
        task = await call(client, "counts", "GetTask", id=task["id"])
    half = {"done": 1.0, "total": 2.0, "message": "half"}
    assert task["status"]["message"]["parts"] == [{"data": half}]
    seen = list[Seen]()

    async def follow() -> None:
        seen.append(Seen(results(await post(client, "counts", "SubscribeToTask", id=task["id"]))))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow)
        await anyio.lowlevel.checkpoint()
        chats.may_go.set()
    assert seen[0].states[-1] == "completed"  # in an update, or in the task if it ended before it was read


# Questions


async def test_a_question_needs_input_and_its_answer_continues_the_task(client: httpx.AsyncClient) -> None:
    task = await send(client, "guess", "x")
    assert state(task) == "input_required"
    text, question = task["status"]["message"]["parts"]
    assert text == {"text": "How many?"}
    assert question["data"]["schema"] == {"type": "integer"}
    answers = {"taskId": task["id"], "contextId": task["contextId"]}
    await refused(client, "guess", "SendMessage", INVALID_PARAMS, "Expected 'int'", message=message("many", **answers))
    await refused(
        client, "guess", "SendMessage", INVALID_PARAMS, "context", message=message("5", **{**answers, "contextId": "x"})
    )
    done = await send(client, "guess", "5", taskId=task["id"])
    assert (state(done), done["artifacts"][0]["parts"]) == ("completed", [{"data": {"result": 5}}])
    again = {question["data"]["call_id"]: 5}
    assert state(await send(client, "guess", again, **answers)) == "completed"
    late = message({question["data"]["call_id"]: 6}, **answers)
    await refused(client, "guess", "SendMessage", UNSUPPORTED, "answered", message=late)
    assert state(await send(client, "guess", "5", **answers)) == "completed"  # perhaps it is sent again
    await refused(client, "guess", "SendMessage", UNSUPPORTED, "COMPLETED", message=message("6", **answers))


async def test_a_text_that_was_an_answer_is_no_answer_to_the_next_question(client: httpx.AsyncClient) -> None:
    """It may be the same message again, whose response was lost."""
    task = await send(client, "order", "x")
    ids, answer = {"taskId": task["id"]}, message("5", taskId=task["id"])
    assert state((await call(client, "order", "SendMessage", message=answer))["task"]) == "input_required"
    await refused(client, "order", "SendMessage", INVALID_PARAMS, "call_id", message=answer)
    for parts in list[Any](([{}], ["a", {"b": 1}])):
        await refused(client, "order", "SendMessage", INVALID_PARAMS, "either", message=message(*parts, **ids))
    assert text_of(await send(client, "order", "by noon", **ids)) == "5 by noon"


async def test_an_approval_is_only_an_answer_under_its_id(client: httpx.AsyncClient, chats: Agents) -> None:
    for approved in (True, False):
        chats.model.replies = [Reply(calls=[("pay", {"amount": 3})]), Reply({"reply": "Done."})]
        seen = await stream(client, "payer", "Pay 3.")
        assert seen.states[-1] == "input_required"
        text, part = seen.status["message"]["parts"]
        assert '{"amount": 3}' in text["text"]
        ids = {"taskId": seen.task["id"], "contextId": seen.task["contextId"]}
        for parts in (["yes"], ["approved"], [{"approved": True}], [{"forged": {"approved": True}}]):
            refusal = await post(client, "payer", "SendMessage", message=message(*parts, **ids))
            assert refusal.json()["error"]["code"] == INVALID_PARAMS
        answer = {part["data"]["call_id"]: {"approved": approved}}
        stranger = await post(client, "payer", "SendMessage", message=message(answer, **ids), headers=BOB)
        check_error(stranger, NOT_FOUND, "no run")
        await refused(client, "pal", "SendMessage", NOT_FOUND, "no run", message=message(answer, **ids))
        assert (await stream(client, "payer", answer, **ids)).text == "Done."
    assert chats.paid == [3]


async def test_several_questions_are_answered_by_their_ids(client: httpx.AsyncClient, chats: Agents) -> None:
    calls = [("pay", {"amount": 3}), ("pay", {"amount": 4})]
    chats.model.replies = [Reply(calls=calls), Reply({"reply": "Done."})]
    task = await send(client, "payer", "Pay.")
    first, second = [part["data"] for part in task["status"]["message"]["parts"] if "data" in part]
    still = await send(client, "payer", {first["call_id"]: {"approved": True}}, taskId=task["id"])
    assert state(still) == "input_required"
    assert [part["data"] for part in still["status"]["message"]["parts"] if "data" in part] == [second]
    done = await send(client, "payer", {second["call_id"]: {"approved": False}}, taskId=task["id"])
    assert (text_of(done), chats.paid) == ("Done.", [3])


async def test_only_a_principal_with_the_role_answers_and_the_owner_sees_what_is_asked(
    chats: Agents, client: httpx.AsyncClient
) -> None:
    boss = {"Authorization": f"Bearer {'c' * 20}"}
    keys = {**KEYS, "carl:role:boss": "c" * 20}
    chats.model.replies = [Reply(calls=[("pay", {"amount": 3})]), Reply({"reply": "Done."})]
    engine = chats.flock.engine(transport=chats.model.transport)

    def pay(amount: int) -> None:
        chats.paid.append(amount)

    tools = [Tool(pay, needs_approval=True, approver="boss")]
    chats.flock.add_agent(
        FlockFactory.create_default_agent("careful", input="order: str", output="reply: str", tools=tools)
    )
    app = create_app(chats.flock, engine=engine, api_keys=keys, protocols=["a2a"])
    async with app.lifespan(), client_of(app, {**ANN, "A2A-Version": "1.0"}) as client:
        task = await send(client, "careful", "Pay 3.")
        (part,) = task["status"]["message"]["parts"]
        assert (state(task), list(part)) == ("input_required", ["text"])
        (question,) = (await get(client, f"/run/{task['id']}"))["waiting_for"]
        answer = {question["call_id"]: {"approved": True}}
        refusal = await post(client, "careful", "SendMessage", message=message(answer, taskId=task["id"]))
        check_error(refusal, -32000, "Only principals with the role 'boss'", 403)
        given = await client.post(
            f"/run/{task['id']}/calls/{question['call_id']}?wait=30", json={"output": {"approved": True}}, headers=boss
        )
        assert given.status_code == 200
        ended = await wait_for(client, f"/run/{task['id']}")
        assert (ended["status"], chats.paid) == ("completed", [3])
        assert text_of(await call(client, "careful", "GetTask", id=task["id"])) == "Done."


@pytest.fixture(params=["memory", "temporal"])
async def any_engine(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Flock, Engine]]:
    """An engine of each kind, and its flock."""
    flock = sample_flock()
    async with engine_for(request, flock) as engine:
        yield flock, engine


async def test_every_engine_has_tasks(any_engine: tuple[Flock, Engine]) -> None:
    flock, engine = any_engine
    app = create_app(flock, engine=engine, auth="host", protocols=["a2a"])
    async with app.lifespan(), client_of(app, {"A2A-Version": "1.0"}) as client:
        task = await send(client, "approve", "it", contextId="mine")
        (_, part) = task["status"]["message"]["parts"]
        answer = {part["data"]["call_id"]: {"approved": True}}
        for _ in range(2):
            assert state(await send(client, "approve", answer, taskId=task["id"])) == "completed"
        sent = message("x", contextId="mine")
        first, second = [(await call(client, "approve", "SendMessage", message=sent))["task"] for _ in range(2)]
        assert first == second
        assert state(await call(client, "approve", "CancelTask", id=first["id"])) == "canceled"
        listed = (await call(client, "approve", "ListTasks", contextId="mine"))["tasks"]
        assert [each["id"] for each in listed] == [first["id"], task["id"]]
        await refused(client, "approve", "GetTask", NOT_FOUND, "no run", id="x\0")


# Lists


async def test_tasks_are_listed_in_pages(client: httpx.AsyncClient) -> None:
    ids = [(await send(client, "echo", str(at), contextId=f"c{at % 2}"))["id"] for at in range(5)]
    await send(client, "repeat", "x")
    found, token = list[Any](), ""
    for size in (2, 2, 1):
        page = await call(client, "echo", "ListTasks", pageSize=2, pageToken=token)
        assert len(page["tasks"]) == size
        assert (page["pageSize"], page["tasks"][0].keys()) == (2, {"id", "contextId", "status"})
        found, token = [*found, *page["tasks"]], page["nextPageToken"]
    assert ([task["id"] for task in found], token) == (ids[::-1], "")
    of_context = await call(client, "echo", "ListTasks", contextId="c1", includeArtifacts=True, historyLength=1)
    assert [text_of(task) for task in of_context["tasks"]] == ["3 ", "1 "]
    assert of_context["tasks"][0]["history"][0]["parts"] == [{"text": "3"}]
    assert (await call(client, "echo", "ListTasks", status="TASK_STATE_FAILED"))["tasks"] == []
    waiting = await send(client, "ask", "x")
    (listed,) = (await call(client, "ask", "ListTasks", status="TASK_STATE_INPUT_REQUIRED"))["tasks"]
    assert listed == {name: waiting[name] for name in ("id", "contextId", "status")}
    response = await post(client, "echo", "ListTasks", headers=BOB)
    assert response.json()["result"] == {"tasks": [], "nextPageToken": "", "pageSize": 50}


async def test_a_task_that_sleeps_works_and_needs_no_input(client: httpx.AsyncClient) -> None:
    task = await send(client, "sleeps", "x", configuration={"returnImmediately": True})
    await wait_until(client, f"/run/{task['id']}", lambda run: run["status"] == "waiting")
    assert state(await call(client, "sleeps", "GetTask", id=task["id"])) == "working"
    assert (await call(client, "sleeps", "ListTasks", status="TASK_STATE_INPUT_REQUIRED"))["tasks"] == []
    assert len((await call(client, "sleeps", "ListTasks"))["tasks"]) == 1


@pytest.mark.parametrize(
    ("agent", "parts"), [("repeat", ["x" * 1000, {"times": 600}]), ("long", [{"length": 600_000}])]
)
async def test_a_list_with_long_results_has_short_pages(
    client: httpx.AsyncClient, agent: str, parts: list[Any]
) -> None:
    for _ in range(3):
        await send(client, agent, *parts)
    page = await call(client, agent, "ListTasks", includeArtifacts=True)
    assert len(page["tasks"]) == 2
    rest = await call(client, agent, "ListTasks", includeArtifacts=True, pageToken=page["nextPageToken"])
    assert (len(rest["tasks"]), rest["nextPageToken"]) == (1, "")


# Cards


async def test_a_card_is_public_without_skills_and_has_them_for_a_key(client: httpx.AsyncClient) -> None:
    path = "/a2a/repeat/.well-known/agent-card.json"
    response = await client.get(path, headers={"Authorization": ""})
    assert response.status_code == 200
    card = response.json()
    assert (card["name"], card["description"], card["skills"]) == ("repeat", "An agent of Flock Server.", [])
    assert card["supportedInterfaces"] == [
        {"url": "http://t/a2a/repeat", "protocolBinding": "JSONRPC", "protocolVersion": "1.0"}
    ]
    assert card["capabilities"] == {"streaming": True, "pushNotifications": False, "extendedAgentCard": True}
    assert list(card["securitySchemes"]) == ["key"]
    extended = await call(client, "repeat", "GetExtendedAgentCard")
    (skill,) = extended["skills"]
    assert '"times"' in skill["description"]
    assert {**extended, "skills": [], "description": card["description"]} == card
    assert (await post(client, "repeat", "GetExtendedAgentCard", headers={"Authorization": ""})).status_code == 401
    assert (await client.get(f"{path}?\xff", headers={"Authorization": ""})).json() == card
    nobody = await client.get("/a2a/nobody/.well-known/agent-card.json", headers={"Authorization": ""})
    check_error(nobody, -32000, "There is no agent at this address.", 404)
    assert "echo" not in nobody.text


async def test_a_card_of_an_open_server_has_skills_and_the_address_that_the_operator_says(chats: Agents) -> None:
    app = create_app(
        chats.flock, store=":memory:", auth="anybody", protocols=["a2a"], public_url="https://a.example/ai/"
    )
    async with app.lifespan(), client_of(app) as client:
        card = await get(client, "/a2a/echo/.well-known/agent-card.json")
        assert card["supportedInterfaces"][0]["url"] == "https://a.example/ai/a2a/echo"
        assert len(card["skills"]) == 1
        assert "securitySchemes" not in card


# Bad input


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        pytest.param(b"{", PARSE, "JSON", id="no JSON"),
        pytest.param([], INVALID_REQUEST, "JSON-RPC", id="a batch"),
        pytest.param({"method": "GetTask"}, INVALID_REQUEST, "JSON-RPC", id="no version of JSON-RPC"),
        pytest.param({"jsonrpc": "2.0", "method": "GetTask"}, INVALID_REQUEST, "needs an id", id="a notification"),
        pytest.param({"jsonrpc": "2.0", "id": {}, "method": "GetTask"}, INVALID_REQUEST, "id", id="an id that is none"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "method": "message/send"}, NO_METHOD, "no method", id="a name of 0.3"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "method": "x" * 9999}, NO_METHOD, "no method", id="a long method"),
        pytest.param(
            {"jsonrpc": "2.0", "id": 1, "method": "GetTask", "params": []}, INVALID_PARAMS, "/params", id="an array"
        ),
    ],
)
async def test_what_is_no_request_of_the_protocol_is_refused(
    client: httpx.AsyncClient, body: Any, code: int, words: str
) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post("/a2a/echo", content=sent, headers={"Content-Type": "application/json"})
    check_error(response, code, words)


@pytest.mark.parametrize("sent", ["", "0.3", "2.0", "1.1", "1.0x", "1.0.x", "x" * 1000])
async def test_another_version_is_refused(client: httpx.AsyncClient, sent: str) -> None:
    response = await post(client, "echo", "message/send", headers={"A2A-Version": sent})
    check_error(response, VERSION, "Send A2A-Version: 1.0.")
    assert len(response.text) < 500


async def test_a_patch_version_and_a_slash_after_the_address_do_not_matter(client: httpx.AsyncClient) -> None:
    body = {"jsonrpc": "2.0", "id": 7, "method": "ListTasks"}
    response = await client.post("/a2a/echo/", json=body, headers={"A2A-Version": "1.0.1"})
    assert response.json()["result"]["tasks"] == []


@pytest.mark.parametrize(
    ("method", "params", "code", "words"),
    [
        pytest.param("SendMessage", {}, INVALID_PARAMS, "missing", id="no message"),
        pytest.param("SendMessage", {"message": message()}, INVALID_PARAMS, "parts", id="no part"),
        pytest.param(
            "SendMessage", {"message": {**message("a"), "role": "ROLE_AGENT"}}, INVALID_PARAMS, "role", id="role"
        ),
        pytest.param(
            "SendMessage", {"message": {**message("a"), "messageId": ""}}, INVALID_PARAMS, "messageId", id="no id"
        ),
        pytest.param("SendMessage", {"message": {**message(), "parts": [{}]}}, INVALID_PARAMS, "a text", id="empty"),
        pytest.param("SendMessage", {"message": message(*"a" * 101)}, INVALID_PARAMS, "length <= 100", id="parts"),
        pytest.param(
            "SendMessage",
            {"message": {**message(), "parts": [{"text": "a", "data": {"b": 1}}]}},
            INVALID_PARAMS,
            "a text, a JSON object",
            id="text and data",
        ),
        pytest.param(
            "SendMessage", {"message": message({"a": 1}, {"a": 2})}, INVALID_PARAMS, "'a' too", id="a repeated name"
        ),
        pytest.param("SendMessage", {"message": message([1])}, INVALID_PARAMS, "JSON object", id="data is an array"),
        pytest.param("SendMessage", {"message": message({"txt": "a"})}, INVALID_PARAMS, "txt", id="an unknown input"),
        pytest.param("SendMessage", {"message": message("a", {"text": 3.5})}, INVALID_PARAMS, "text", id="a float"),
        pytest.param(
            "SendMessage", {"message": message({"text": 10**400})}, INVALID_PARAMS, "text", id="a long number"
        ),
        pytest.param("SendMessage", {"message": message({"text": 3})}, INVALID_PARAMS, "text", id="a wrong type"),
        pytest.param(
            "SendMessage", {"message": message("a", contextId="a b")}, INVALID_PARAMS, "contextId", id="context"
        ),
        pytest.param(
            "SendMessage", {"message": message("a", contextId="a" * 129)}, INVALID_PARAMS, "contextId", id="long"
        ),
        pytest.param("SendMessage", {"message": message("a", taskId="x\0")}, NOT_FOUND, "no run", id="a forged task"),
        pytest.param(
            "SendMessage",
            {"message": {**message("a"), "parts": [{"url": "http://169.254.169.254/", "mediaType": "text/plain"}]}},
            CONTENT_TYPE,
            "file",
            id="a file by its address",
        ),
        pytest.param(
            "SendMessage", {"message": {**message("a"), "parts": [{"raw": "eA=="}]}}, CONTENT_TYPE, "file", id="raw"
        ),
        pytest.param(
            "SendStreamingMessage",
            {"message": message("a"), "configuration": {"taskPushNotificationConfig": {"url": "http://t"}}},
            NO_PUSH,
            "push",
            id="a push with a message",
        ),
        *(
            pytest.param(f"{verb}TaskPushNotificationConfig{s}", {"taskId": "x"}, NO_PUSH, "push", id=verb)
            for verb, s in (("Create", ""), ("Get", ""), ("List", "s"), ("Delete", ""))
        ),
        *(
            pytest.param(method, {"id": id_}, NOT_FOUND, "no run", id=f"{method} {id_[:9]!r}")
            for method in ("GetTask", "CancelTask", "SubscribeToTask")
            for id_ in ("", "x", "../../x", "x" * 10_000, "01a20e41-e4ec-74f9-8450-7dd74efe56ba")
        ),
        pytest.param("GetTask", {"id": "x", "historyLength": -1}, INVALID_PARAMS, "historyLength", id="history"),
        pytest.param("ListTasks", {"pageSize": 0}, INVALID_PARAMS, "pageSize", id="an empty page"),
        pytest.param("ListTasks", {"pageSize": 101}, INVALID_PARAMS, "pageSize", id="a long page"),
        pytest.param("ListTasks", {"pageToken": "x"}, INVALID_PARAMS, "pageToken", id="a forged page"),
        pytest.param("ListTasks", {"status": "TASK_STATE_REJECTED"}, INVALID_PARAMS, "No task", id="no such state"),
        pytest.param("ListTasks", {"statusTimestampAfter": "2026-01-01T00:00:00Z"}, INVALID_PARAMS, "After", id="time"),
    ],
)
async def test_a_request_that_is_not_valid_starts_nothing(
    client: httpx.AsyncClient, method: str, params: Mapping[str, Any], code: int, words: str
) -> None:
    await refused(client, "echo", method, code, words, **params)
    assert (await get(client, "/runs"))["runs"] == []


def raw(content: bytes, media_type: str = "", **more: Any) -> Any:
    return {"raw": base64.b64encode(content).decode(), "mediaType": media_type, **more}


def with_parts(*parts: Any) -> Any:
    return {**message(), "parts": list(parts)}


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    flock = flock_of_files()

    @flock.agent
    def same(photos: list[Image], note: str = "") -> dict[str, list[Image]]:
        return {"kept": photos}

    @flock.agent
    def first(photos: list[Image]) -> Image:
        return photos[0]

    app = create_app(
        flock, store=tmp_path / "flock.db", api_keys=KEYS, protocols=["a2a"], public_url="https://a.example"
    )
    async with app.lifespan(), client_of(app, {**ANN, "A2A-Version": "1.0"}) as made:
        yield made


async def test_files_are_inputs_by_their_content(files: httpx.AsyncClient) -> None:
    """As of OpenAI's clients. Base64 of Protocol Buffers may be that of URLs, without padding."""
    sound, photo = raw(WAV, "audio/wav"), raw(PNG, "image/png", filename="a.png")
    task = (await call(files, "look", "SendMessage", message=with_parts({"text": "hi"}, sound, photo)))["task"]
    assert text_of(task) == f"'hi' image/png,a.png,,{len(PNG)} audio/wav,,,{len(WAV)}"
    unsafe = base64.urlsafe_b64encode(PNG + b"\xff\xfe\xfd").decode().rstrip("=")
    assert {*"-_"} & {*unsafe}
    sent = with_parts({"data": {"note": "data"}}, {"raw": unsafe})
    assert text_of((await call(files, "look", "SendMessage", message=sent))["task"]).startswith("'data' image/png,,,")
    sent = with_parts(
        {"raw": raw(b"<b>a</b>")["raw"], "mediaType": "text/html; charset=utf-8", "filename": "../a.html"}
    )
    assert text_of((await call(files, "letter", "SendMessage", message=sent))["task"]) == "text/plain,a.html,,8"


async def test_a_message_with_a_file_is_one_task_until_its_file_is_another(files: httpx.AsyncClient) -> None:
    sent = with_parts(raw(PNG))
    ids = [(await call(files, "look", "SendMessage", message=sent))["task"]["id"] for _ in range(2)]
    other = {**sent, "parts": [raw(PNG + b"x")]}
    assert len({*ids, (await call(files, "look", "SendMessage", message=other))["task"]["id"]}) == 2


async def test_a_file_in_a_result_has_an_address(files: httpx.AsyncClient) -> None:
    seen = Seen(
        results(await post(files, "first", "SendStreamingMessage", message=with_parts(raw(PNG, filename="a.png"))))
    )
    task = await call(files, "first", "GetTask", id=seen.task["id"])
    whole, file = task["artifacts"][0]["parts"]
    reference = whole["data"]["result"]
    url = f"https://a.example/files/{reference['file_id']}"
    assert file == {"url": url, "mediaType": "image/png", "filename": "a.png"}
    assert (await files.get(f"/files/{reference['file_id']}")).content == PNG


@pytest.mark.parametrize(
    ("agent", "part", "code", "words"),
    [
        (
            "look",
            {"url": "http://169.254.169.254/a.png"},
            INVALID_PARAMS,
            "No address is fetched. Send its content",
        ),
        ("look", {"url": "file:///etc/passwd"}, INVALID_PARAMS, "No address is fetched"),
        ("look", {"raw": "#"}, INVALID_PARAMS, "not valid"),
        ("look", {"raw": ""}, INVALID_PARAMS, "input"),
        ("look", raw(PNG, "image/jpeg"), INVALID_PARAMS, "declared as image/jpeg"),
        ("look", raw(PNG, "image/jpeg,"), INVALID_PARAMS, "declared as image/jpeg"),
        ("look", raw(b"%PDF-1"), INVALID_PARAMS, "no input for this file"),
        ("look", {**raw(PNG), "text": "a"}, INVALID_PARAMS, "A part is a text"),
        ("look", {"raw": 7}, INVALID_PARAMS, "raw"),
        ("loose", raw(PNG), CONTENT_TYPE, "file"),
    ],
)
async def test_a_part_that_is_not_a_file_of_an_input_starts_nothing(
    files: httpx.AsyncClient, agent: str, part: Any, code: int, words: str
) -> None:
    await refused(files, agent, "SendMessage", code, words, message=with_parts(part))
    assert (await get(files, "/runs"))["runs"] == []


async def test_an_answer_has_no_files(files: httpx.AsyncClient) -> None:
    task = (await call(files, "look", "SendMessage", message=with_parts(raw(PNG))))["task"]
    await refused(
        files, "look", "SendMessage", CONTENT_TYPE, "file", message={**with_parts(raw(PNG)), "taskId": task["id"]}
    )


async def test_a_card_says_which_files_are_taken(files: httpx.AsyncClient) -> None:
    async def modes(agent: str) -> list[str]:
        card = await get(files, f"/a2a/{agent}/.well-known/agent-card.json")
        assert card["defaultOutputModes"] == ["text/plain", "application/json"]
        return card["defaultInputModes"][2:]  # type: ignore[no-any-return]

    images = ["image/png", "image/jpeg", "image/gif", "image/webp"]
    assert await modes("loose") == []
    assert await modes("talk") == images
    assert await modes("letter") == ["application/pdf"]
    assert {*images, "audio/wav"} < {*await modes("look")}
    assert "application/octet-stream" in await modes("pair")


async def test_a_task_of_another_principal_or_agent_is_not_found(client: httpx.AsyncClient) -> None:
    task = await send(client, "echo", "tea", contextId="mine")
    unknown = task["id"][:-1] + ("0" if task["id"][-1] != "0" else "1")
    for method in ("GetTask", "CancelTask", "SubscribeToTask"):
        errors = [
            (await post(client, agent, method, id=id_, headers=headers)).json()["error"]
            for agent, id_, headers in (("echo", task["id"], BOB), ("says", task["id"], None), ("echo", unknown, None))
        ]
        assert {error["code"] for error in errors} == {NOT_FOUND}
        assert len({error["message"].replace(unknown, task["id"]) for error in errors}) == 1
    bobs = (await post(client, "echo", "ListTasks", contextId="mine", headers=BOB)).json()["result"]
    assert bobs["tasks"] == []


async def test_errors_before_the_protocol_have_its_form_and_their_own_status(client: httpx.AsyncClient) -> None:
    for headers in ({"Authorization": ""}, [("Authorization", ANN["Authorization"])] * 2):
        body = {"jsonrpc": "2.0", "id": 1, "method": "ListTasks"}
        client.headers.pop("Authorization", None)
        check_error(await client.post("/a2a/echo", json=body, headers=headers), -32000, "API key", 401)
    client.headers.update(ANN)
    check_error(await post(client, "nobody", "ListTasks"), -32000, "no agent", 404)
    response = await client.post("/a2a/echo", content=b"{}", headers={"Content-Type": "text/plain"})
    check_error(response, CONTENT_TYPE, "application/json", 415)
    assert response.json()["error"]["data"][0]["requestId"] == response.headers["X-Request-ID"]
    huge = await post(client, "echo", "SendMessage", message=message({"text": "x" * 20_000_000}))
    check_error(huge, -32000, "limit", 413)
    assert (await get(client, "/runs"))["runs"] == []


@pytest.mark.alone
async def test_a_message_of_many_members_costs_as_little_as_a_run_with_them() -> None:
    """It is 3 times as much. It was 13: each member was encoded and checked alone, which held the event loop."""
    app = create_app(sample_flock(), store=":memory:", auth="host", protocols=["a2a"])
    data = {f"k{number}": number for number in range(68_000)}
    message = {"messageId": "m", "role": "ROLE_USER", "parts": [{"data": data}]}
    sent: dict[str, Any] = {
        "/a2a/add": {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": message}},
        "/run/flock": {"agent_name": "add", "inputs": data},
    }
    took_s: dict[str, list[float]] = {path: [] for path in sent}
    async with client_of(app) as client:
        for _ in range(5):
            for path, body in sent.items():
                content, headers = json.dumps(body, separators=(",", ":")), {"Content-Type": "application/json"}
                since = time.process_time()
                answer = await client.post(path, content=content, headers={**headers, "A2A-Version": "1.0"})
                took_s[path].append(time.process_time() - since)
                assert "Unknown field" in answer.text
    assert min(took_s["/a2a/add"]) < 6 * min(took_s["/run/flock"]), took_s

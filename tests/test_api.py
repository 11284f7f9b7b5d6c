"""The API: the response of each endpoint when all goes well, and when an agent fails."""

import contextlib
import datetime
import json
import logging
import re
import tracemalloc
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

import anyio
import httpx
import pytest
from starlette.types import Message

from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.runs import new_id
from flock.runs.events import end_id
from flock.testing import Failure, FakeModel, Reply
from flock.web.auth import new_key
from flockapi import FlockAPI, create_app
from tests.support.engines import sqlite_of
from tests.support.http import client_of, post_run, wait_for, wait_until

pytestmark = pytest.mark.anyio


# Runs


async def test_a_run_is_answered_with_its_result(client: httpx.AsyncClient, model: FakeModel) -> None:
    model.replies = [Reply({"sentiment": "positive", "keywords": ["great"]})]
    response = await post_run(client, "text_analyzer", {"text": "This is great!"})
    assert response.status_code == 200
    assert response.headers["Flock-Run-Status"] == "completed"
    assert response.headers["Content-Type"] == "application/json"
    assert response.text.endswith("}\n")
    body = response.json()
    assert body["status"] == "completed"
    assert body["result"] == {"sentiment": "positive", "keywords": ["great"]}
    assert body["error"] is body["error_type"] is None
    assert body["usage"] == {"input_tokens": 10, "output_tokens": 5}
    assert [step["agent_name"] for step in body["steps"]] == ["text_analyzer"]
    assert uuid.UUID(body["run_id"]).version == 7
    created, started, completed = (
        datetime.datetime.fromisoformat(body[name]) for name in ("created_at", "started_at", "completed_at")
    )
    assert created.utcoffset() == datetime.timedelta(0)
    assert created <= started <= completed
    assert "batch_id" not in body


async def test_an_asynchronous_run_is_accepted_at_once(client: httpx.AsyncClient, model: FakeModel) -> None:
    asked, may_answer = anyio.Event(), anyio.Event()

    async def reply(_: Any) -> Any:
        asked.set()
        await may_answer.wait()
        return Reply({"sentiment": "fine", "keywords": []})

    model.replies = [reply]
    response = await post_run(client, "text_analyzer", {"text": "x"}, async_run=True)
    assert response.status_code == 202
    assert response.json()["status"] == "starting"
    assert response.headers["Location"] == f"/run/{response.json()['run_id']}"
    assert response.headers["Retry-After"] == "1"
    await asked.wait()
    running = await client.get(response.headers["Location"])
    assert running.status_code == 200
    assert running.json()["status"] == running.headers["Flock-Run-Status"] == "running"
    may_answer.set()
    done = await wait_for(client, response.headers["Location"])
    assert done["result"] == {"sentiment": "fine", "keywords": []}


async def test_fields_of_older_clients_are_ignored(client: httpx.AsyncClient) -> None:
    response = await post_run(client, "add", {"a": 1}, use_production_tools=True)
    assert response.json()["result"] == {"result": 3}


async def test_inputs_may_be_omitted(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def answer_all() -> int:
        return 42

    response = await client.post("/run/flock", json={"agent_name": "answer_all"})
    assert response.json()["result"] == {"result": 42}


# Runs that fail


async def test_a_failed_run_is_not_an_http_error(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    """The client gets the class of the exception. Its text and traceback are in the log under the request id."""
    response = await client.post(
        "/run/flock",
        json={"agent_name": "explode", "inputs": {"text": "of the house"}},
        headers={"X-Request-ID": "my-request-7"},
    )
    assert response.status_code == 200
    assert response.headers["Flock-Run-Status"] == "failed"
    body = response.json()
    assert (body["status"], body["error_type"], body["result"]) == ("failed", "agent_exception", None)
    assert (
        body["error"]
        == "The agent 'explode' raised ValueError. The server's log has the details under request my-request-7."
    )
    assert body["request_id"] == "my-request-7"
    assert "a secret" not in response.text
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "my-request-7" in record.getMessage()
    assert record.exc_info
    assert "a secret: of the house" in str(record.exc_info[1])


async def test_the_text_of_an_agent_error_is_sent_to_the_client(client: httpx.AsyncClient) -> None:
    body = (await post_run(client, "refuse", {"text": "This"})).json()
    assert (body["error"], body["error_type"]) == ("This is more than I can do.", "agent_error")


async def test_errors_can_be_exposed_for_development(flock: Flock) -> None:
    app = create_app(flock, expose_errors=True)
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        body = (await post_run(client, "explode", {"text": "x"})).json()
    assert body["error"] == "The agent 'explode' raised ValueError: a secret: x"


async def test_the_error_names_a_missing_model_key(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    body = (await post_run(client, "text_analyzer", {"text": "x"})).json()
    assert (body["status"], body["error_type"]) == ("failed", "model_not_configured")
    assert "OPENAI_API_KEY" in body["error"]


async def test_a_model_error_fails_the_run(client: httpx.AsyncClient, model: FakeModel) -> None:
    model.replies = [Failure(401, message="bad key sk-secret")]
    body = (await post_run(client, "text_analyzer", {"text": "x"})).json()
    assert (body["status"], body["error_type"]) == ("failed", "model_authentication")
    assert "bad key" not in json.dumps(body)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param("\ud800", id="lone surrogate"),
        pytest.param(10**5000, id="integer of 5,000 digits"),
        pytest.param({(1, 2): 3}, id="key that is not a string"),
    ],
)
async def test_a_result_that_is_not_valid_json_fails_the_run(
    value: Any, flock: Flock, client: httpx.AsyncClient
) -> None:
    @flock.agent
    def strange() -> Any:
        return value

    response = await post_run(client, "strange")
    assert (response.status_code, response.json()["error_type"]) == (200, "invalid_output")


async def test_nan_and_infinity_become_null(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def numbers() -> list[float]:
        return [1.5, float("nan"), float("inf")]

    assert (await post_run(client, "numbers")).json()["result"] == {"result": [1.5, None, None]}


async def test_big_integers_are_not_changed(client: httpx.AsyncClient) -> None:
    text = '{"agent_name": "anything", "inputs": {"value": [18446744073709551616, 1234567890123456789012]}}'
    response = await client.post("/run/flock", content=text, headers={"Content-Type": "application/json"})
    assert response.json()["result"] == {"result": [18446744073709551616, 1234567890123456789012]}


# Small requests about a long run

KEYS = {"ann": new_key(), "bob": new_key()}
LONG = 5_000_000


@contextlib.asynccontextmanager
async def long_run(status: str) -> AsyncIterator[tuple[FlockAPI, str]]:
    """Yield an app and the path of a run of ann, with long inputs and a long result of its first step."""
    flock = Flock()

    @flock.agent(next_agent="last")
    async def first(text: str) -> str:
        return text

    @flock.agent
    async def last(result: str) -> str:
        if status == "failed":
            raise ValueError
        return result

    app = create_app(flock, store="flock.db", api_keys=KEYS, max_body_bytes=2 * LONG)
    async with app.lifespan():
        run = await app.engine.submit("first", {"text": "x" * LONG}, principal="ann")
        assert (await app.engine.wait(run.run_id)).status == status
        yield app, f"/run/{run.run_id}"


async def peak_of(
    app: FlockAPI, method: str, path: str, principal: str = "ann", content: bytes = b"", **headers: str
) -> tuple[int, int]:
    """Return the status of the response, and the most memory that the request took. The body is not kept."""
    status, body = 0, iter([{"type": "http.request", "body": content, "more_body": False}])

    async def receive() -> Message:
        if (message := next(body, None)) is None:
            await anyio.sleep_forever()
        assert message is not None
        return message

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)

    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    sent += [(b"host", b"127.0.0.1"), (b"authorization", f"Bearer {KEYS[principal]}".encode())]
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "headers": sent, "query_string": b""}
    tracemalloc.start()
    try:
        await app(scope | {"client": ("127.0.0.1", 1)}, receive, send)
        return status, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


async def test_small_requests_about_a_long_run_do_not_read_its_results() -> None:
    last = str(end_id(1))
    async with long_run("completed") as (app, path):
        for method, suffix, status in (
            ("HEAD", "", 200),
            ("POST", "/cancel", 409),
            ("POST", "/retry", 409),
            ("GET", "/events", 204),
            ("DELETE", "", 204),
        ):
            got, peak = await peak_of(app, method, path + suffix, last_event_id=last)
            assert got == status, (method, suffix)
            assert peak < LONG / 2, (method, suffix)


async def test_a_cancelled_long_run_is_shown_without_holding_its_results() -> None:
    async with long_run("failed") as (app, path):
        assert isinstance(app.engine, EmbeddedEngine)
        statement = "UPDATE runs SET status = 'cancelled'"
        await sqlite_of(app.engine).change(lambda db: db.execute(statement) and None)
        status, peak = await peak_of(app, "POST", f"{path}/cancel")
        assert status == 200
        assert peak < LONG / 2
        async with client_of(app) as client:
            headers = {"Authorization": f"Bearer {KEYS['ann']}"}
            shown = (await client.post(f"{path}/cancel", headers=headers)).json()
            assert shown["steps"][0]["result"] == {"result": "x" * LONG}
            assert shown == (await client.get(path, headers=headers)).json()


async def test_a_damaged_result_is_not_sent_by_a_cancellation() -> None:
    async with long_run("failed") as (app, path), client_of(app) as client:
        assert isinstance(app.engine, EmbeddedEngine)
        for statement in ("UPDATE runs SET status = 'cancelled'", "UPDATE steps SET result = x'7b'"):
            await sqlite_of(app.engine).change(lambda db, statement=statement: db.execute(statement) and None)  # type: ignore[misc]
        answer = await client.post(f"{path}/cancel", headers={"Authorization": f"Bearer {KEYS['ann']}"})
        assert answer.status_code == 503


async def test_a_run_of_another_principal_takes_as_much_work_as_an_unknown_one() -> None:
    """So the time of the answer does not tell whether it exists."""
    async with long_run("completed") as (app, path):
        assert isinstance(app.engine, EmbeddedEngine)
        unknown, queries = f"/run/{new_id()}", list[str]()
        sqlite_of(app.engine)._reader.set_trace_callback(queries.append)
        for method, suffix in (
            ("HEAD", ""),
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/cancel"),
            ("POST", "/retry"),
            ("GET", "/events"),
            ("GET", "/calls/ask:x"),
            ("POST", "/calls/ask:x"),
        ):
            made, answer = [], {"content": b'{"output": true}', "content_type": "application/json"}
            for asked in (unknown, path):
                queries.clear()
                more: Any = answer if (method, suffix) == ("POST", "/calls/ask:x") else {}
                status, peak = await peak_of(app, method, asked + suffix, "bob", **more)
                assert status == 404
                assert peak < LONG / 2
                made.append([query.replace(asked[5:], "") for query in queries if asked[5:] in query])
            assert made[0] == made[1], (method, suffix)
            assert not any("steps" in query for query in made[1])


# Batches


async def test_a_batch_keeps_the_order_of_its_inputs(client: httpx.AsyncClient) -> None:
    rows = [{"a": i} for i in range(20)]
    response = await client.post(
        "/run/batch", json={"agent_name": "add", "batch_inputs": rows, "static_inputs": {"b": 1}}
    )
    assert response.status_code == 202
    body = response.json()
    assert (body["status"], body["total_items"], body["results"]) == ("starting", 20, [])
    assert response.headers["Location"] == f"/batch/{body['batch_id']}"
    done = await wait_for(client, response.headers["Location"])
    assert done["status"] == "completed"
    assert (done["completed_items"], done["failed_items"], done["cancelled_items"]) == (20, 0, 0)
    assert done["progress_percentage"] == 100
    assert done["results"] == [{"result": i + 1} for i in range(20)]
    assert done["next"] is None


async def test_an_item_overrides_static_inputs_and_names_are_mapped(client: httpx.AsyncClient) -> None:
    body = {
        "agent_name": "add",
        "batch_inputs": [{"left": 1}, {"left": 2, "b": 20}],
        "input_mapping": {"left": "a", "absent": "b"},
        "static_inputs": {"b": 10},
    }
    accepted = (await client.post("/run/batch", json=body)).json()
    done = await wait_for(client, f"/batch/{accepted['batch_id']}")
    assert done["results"] == [{"result": 11}, {"result": 22}]


async def test_progress_is_live_and_results_of_open_items_are_null(client: httpx.AsyncClient, model: FakeModel) -> None:
    may_answer = anyio.Event()

    async def reply(request: Any) -> Any:
        if "slow" in request["messages"][1]["content"]:
            await may_answer.wait()
        return Reply({"sentiment": "s", "keywords": []})

    model.replies = [reply, reply, reply]
    texts = [{"text": "slow"}, {"text": "quick"}, {"text": "also quick"}]
    accepted = (await client.post("/run/batch", json={"agent_name": "text_analyzer", "batch_inputs": texts})).json()
    # The results are read before the counts, so two that have ended may be counted before both are shown.
    body = await wait_until(client, f"/batch/{accepted['batch_id']}", lambda body: body["results"].count(None) == 1)
    assert (body["status"], body["completed_items"]) == ("running", 2)
    assert body["progress_percentage"] == 66.67
    assert body["results"] == [None, {"sentiment": "s", "keywords": []}, {"sentiment": "s", "keywords": []}]
    may_answer.set()
    assert (await wait_for(client, f"/batch/{accepted['batch_id']}"))["completed_items"] == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 5),
        ({"max_workers": 2}, 2),
        ({"parallel": False, "max_workers": 7}, 1),
        ({"max_workers": 1000}, 12),
    ],
)
async def test_max_workers_limits_a_batch(options: Any, expected: int, flock: Flock, client: httpx.AsyncClient) -> None:
    busy, most, order = 0, 0, []

    @flock.agent
    async def watch(n: int) -> int:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        order.append(n)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        busy -= 1
        return n

    rows = [{"n": n} for n in range(12)]
    accepted = await client.post("/run/batch", json={"agent_name": "watch", "batch_inputs": rows, **options})
    await wait_for(client, accepted.headers["Location"])
    assert most == expected
    assert order == list(range(12))


@pytest.mark.parametrize(("return_errors", "expected"), [(True, {"error_type": "agent_error"}), (False, None)])
async def test_a_failed_item_is_an_error_or_null(return_errors: bool, expected: Any, client: httpx.AsyncClient) -> None:
    body = {"agent_name": "refuse", "batch_inputs": [{"text": "That"}], "return_errors": return_errors}
    accepted = await client.post("/run/batch", json=body)
    done = await wait_for(client, accepted.headers["Location"])
    assert (done["status"], done["failed_items"], done["completed_items"]) == ("failed", 1, 1)
    assert done["error"] == "None of the 1 items completed. The first error: That is more than I can do."
    assert done["results"] == [expected and {"error": "That is more than I can do.", **expected}]


async def test_a_batch_completes_if_one_item_does(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def invert(n: int) -> float:
        return 1 / n

    accepted = await client.post("/run/batch", json={"agent_name": "invert", "batch_inputs": [{"n": 0}, {"n": 2}]})
    done = await wait_for(client, accepted.headers["Location"])
    assert (done["status"], done["failed_items"], done["error"]) == ("completed", 1, None)
    assert done["results"][0]["error_type"] == "agent_exception"
    assert done["results"][1] == {"result": 0.5}


async def test_results_can_be_unboxed(client: httpx.AsyncClient) -> None:
    for agent, row, expected in (
        ("add", {"a": 1}, 3),
        ("summarise", {"text": "a b"}, {"words": 2, "shout": "A B"}),
    ):
        body = {"agent_name": agent, "batch_inputs": [row], "box_results": False}
        accepted = await client.post("/run/batch", json=body)
        assert (await wait_for(client, accepted.headers["Location"]))["results"] == [expected]


@pytest.mark.slow
async def test_results_are_paginated(client: httpx.AsyncClient) -> None:
    rows = [{"a": i, "b": 0} for i in range(2500)]
    accepted = await client.post("/run/batch", json={"agent_name": "add", "batch_inputs": rows, "max_workers": 50})
    path = accepted.headers["Location"]
    page = (await client.get(path, params={"wait": 60})).json()
    assert len(page["results"]) == 1000
    pages = [page]
    while pages[-1]["next"]:
        pages.append((await client.get(pages[-1]["next"])).json())
    assert [result["result"] for page in pages for result in page["results"]] == list(range(2500))
    some = (await client.get(path, params={"after": 9, "limit": 3})).json()
    assert [result["result"] for result in some["results"]] == [10, 11, 12]
    assert some["next"] == f"{path}?after=12&limit=3"
    assert (await client.get(path, params={"after": 2499})).json()["results"] == []


async def test_an_item_is_a_run(client: httpx.AsyncClient, app: FlockAPI) -> None:
    accepted = (
        await client.post("/run/batch", json={"agent_name": "add", "batch_inputs": [{"a": 1}, {"a": 5}]})
    ).json()
    await wait_for(client, f"/batch/{accepted['batch_id']}")
    item = (await app.engine.get_items(accepted["batch_id"], after=0))[0]
    body = (await client.get(f"/run/{item.run_id}")).json()
    assert (body["batch_id"], body["position"], body["result"]) == (accepted["batch_id"], 1, {"result": 7})


# Agents, request ids, mounts and limits


async def test_agents_are_listed_with_name_and_description(client: httpx.AsyncClient) -> None:
    response = await client.get("/agents")
    assert response.json()["agents"][:3] == [
        {"name": "text_analyzer", "description": "Finds the sentiment and the keywords of a text."},
        {"name": "add", "description": "Adds two numbers."},
        {"name": "summarise", "description": ""},
    ]
    assert response.text.endswith("\n")


async def test_an_agent_shows_its_next_agent_if_that_is_fixed() -> None:
    flock = Flock()

    @flock.agent
    def ends(result: int) -> int:
        return result

    def begins() -> int:
        return 1

    chosen: dict[str, Any] = {"by_name": "ends", "by_agent": ends, "by_result": lambda result: "ends"}
    for name, next_agent in chosen.items():
        flock.agent(name=name, next_agent=next_agent)(begins)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(flock)), base_url="http://t") as client:
        agents = (await client.get("/agents")).json()["agents"]
        next_agents = {agent["name"]: agent.get("next_agent", "absent") for agent in agents}
        assert next_agents == {"ends": "absent", "by_name": "ends", "by_agent": "ends", "by_result": None}
        assert (await client.get("/agents/by_name")).json()["next_agent"] == "ends"


async def test_an_agent_shows_both_schemas(client: httpx.AsyncClient) -> None:
    body = (await client.get("/agents/add")).json()
    assert body == {
        "name": "add",
        "description": "Adds two numbers.",
        "input_schema": {
            "title": "add",
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 2}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "output_schema": {
            "title": "add",
            "type": "object",
            "properties": {"result": {"type": "integer"}},
            "required": ["result"],
            "additionalProperties": False,
        },
        "graph": [{"from": "add", "to": None, "kind": "fixed", "field": None, "value": None}],
        "mermaid": 'flowchart LR\n    a0["add"]\n    a0 --> done(["end of the run"])\n',
        "urls": {protocol: f"http://t/{protocol}/add" for protocol in ("a2a", "ag-ui", "vercel")},
    }


async def test_an_agent_shows_the_graph_of_all_that_can_follow() -> None:
    """Each agent is in it once, also in a circle. A function's choice is unknown."""
    flock = Flock()

    @flock.agent(next_agent={"bill": "billing.agent", '<b>"no"</b>|': None, "again": "triage", "else": "any_agent"})
    def triage(mail: str) -> Literal["bill", '<b>"no"</b>|', "again", "else"]:
        return "bill"

    @flock.agent(name="billing.agent", next_agent=triage)
    def billing_agent(mail: str) -> str:
        return mail

    @flock.agent(next_agent=lambda result: None)
    def any_agent(mail: str) -> str:
        return mail

    flock.agent(name="apart", next_agent=triage)(lambda: "")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(flock)), base_url="http://t") as client:
        agents = (await client.get("/agents")).json()["agents"]
        shown = (await client.get("/agents/triage")).json()
    assert agents[0] == {"name": "triage", "description": "", "next_agent": None}, "the result decides"
    assert [tuple(handoff.values()) for handoff in shown["graph"]] == [
        ("triage", "billing.agent", "value", "result", "bill"),
        ("triage", None, "value", "result", '<b>"no"</b>|'),
        ("triage", "triage", "value", "result", "again"),
        ("triage", "any_agent", "value", "result", "else"),
        ("billing.agent", "triage", "fixed", None, None),
        ("any_agent", None, "function", None, None),
    ]
    first, *lines = shown["mermaid"].splitlines()
    node, edge = (
        r'    a\d\["([\w.-]+)"\]',
        r'    (a\d) (?:-->|-.->)(?:\|"([\w .#;-]+)"\|)? (a\d|done\(\[.*\]\)|unknown\{.*\})',
    )
    nodes = [match[1] for line in lines if (match := re.fullmatch(node, line))]
    edges = [match.groups() for line in lines if (match := re.fullmatch(edge, line))]
    assert (first, nodes) == ("flowchart LR", ["triage", "billing.agent", "any_agent"])
    assert edges == [
        ("a0", "bill", "a1"),
        ("a0", "#60;b#62;#34;no#34;#60;#47;b#62;#124;", 'done(["end of the run"])'),
        ("a0", "again", "a0"),
        ("a0", "else", "a2"),
        ("a1", None, "a0"),
        ("a2", None, 'unknown{"decided by a function"}'),
    ]
    assert len(lines) == len(nodes) + len(edges)


async def test_every_response_has_a_request_id(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/agents"), ("GET", "/nowhere"), ("DELETE", "/agents"), ("POST", "/run/flock")):
        response = await client.request(method, path, headers={"X-Request-ID": "abc-1"})
        assert response.headers["X-Request-ID"] == "abc-1"
        assert response.headers.get_list("X-Request-ID") == ["abc-1"]
    generated = {(await client.get("/agents")).headers["X-Request-ID"] for _ in range(3)}
    assert len(generated) == 3


@pytest.mark.parametrize("sent", ["a b", "a" * 129, "a\tb", "<script>", "", "a\r\nSet-Cookie: x=1"])
async def test_a_request_id_with_invalid_characters_is_replaced(sent: str, client: httpx.AsyncClient) -> None:
    received = (await client.get("/agents", headers={"X-Request-ID": sent})).headers["X-Request-ID"]
    assert received != sent
    assert uuid.UUID(received)


async def test_links_of_a_mounted_app_have_its_prefix(flock: Flock, model: FakeModel) -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    app = create_app(flock, engine=flock.engine(transport=model.transport))
    host = Starlette(routes=[Mount("/ai", app)])
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://t") as client:
        accepted = await client.post("/ai/run/flock", json={"agent_name": "add", "inputs": {"a": 1}, "async_run": True})
        assert accepted.headers["Location"].startswith("/ai/run/")
        assert (await wait_for(client, accepted.headers["Location"]))["result"] == {"result": 3}
        batch = await client.post("/ai/run/batch", json={"agent_name": "add", "batch_inputs": [{"a": 1}, {"a": 2}]})
        await wait_for(client, batch.headers["Location"])
        page = (await client.get(batch.headers["Location"], params={"limit": 1})).json()
        assert page["next"].startswith("/ai/batch/")
        assert (await client.get(page["next"])).json()["results"] == [{"result": 4}]


async def test_a_full_engine_answers_429() -> None:
    """Runs beyond ``max_queue`` and items beyond ``max_open_items`` are refused, and accepted ones complete."""
    flock, may_go = Flock(), anyio.Event()

    @flock.agent
    async def wait() -> int:
        await may_go.wait()
        return 1

    app = create_app(flock, engine=flock.engine(max_concurrency=1, max_queue=2, max_open_items=3))
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        accepted = [await post_run(client, "wait", async_run=True)]
        await wait_until(client, accepted[0].headers["Location"], lambda body: body["status"] == "running")
        responses = [await post_run(client, "wait", async_run=True) for _ in range(3)]
        batches = [
            await client.post("/run/batch", json={"agent_name": "wait", "batch_inputs": [{}, {}]}) for _ in range(2)
        ]
        assert [response.status_code for response in (*responses, *batches)] == [202, 202, 429, 202, 429]
        for full in (responses[2], batches[1]):
            assert full.headers["Retry-After"] == "1"
            assert full.json()["type"] == "urn:flockapi:problem:too-many-runs"
        may_go.set()
        for response in (*accepted, *responses[:2], batches[0]):
            assert (await wait_for(client, response.headers["Location"]))["status"] == "completed"

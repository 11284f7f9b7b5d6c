"""The life of a run over HTTP: prefer, wait, cancel, retry, delete, list, events, keys, disconnects, readiness."""

import contextlib
import functools
import re
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import pytest

from flock.core import Flock, FlockFactory
from flock.errors import StoreError
from flock.runs import RunContext
from flock.testing import FakeModel, Reply
from flock.web.orders import WATCH_DELAY_S
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for
from tests.support.engines import sqlite_of, until
from tests.support.http import check_problem, events_in, get, post_run, wait_until
from tests.support.servers import Served
from tests.support.sockets import socket_server

pytestmark = pytest.mark.anyio


class Gate:
    """A flock whose agents continue when a test lets them."""

    def __init__(self) -> None:
        self.started, self.may_go, self.ended = anyio.Event(), anyio.Event(), anyio.Event()
        self.thread_may_go = threading.Event()
        self.blocked: RunContext | None = None
        self.fails = True
        self.calls: list[str] = []
        self.flock = flock = Flock("gate", model="openai/gpt-4o")

        @flock.agent
        async def nap(context: RunContext) -> int:
            self.started.set()
            try:
                context.progress(1, 2, "half\nway")
                await self.may_go.wait()
            finally:
                self.ended.set()
            return 1

        @flock.agent
        def block(context: RunContext) -> str:
            self.blocked = context
            self.thread_may_go.wait(20)
            return "asked" if context.cancel_requested else "not asked"

        @flock.agent
        async def chatter(context: RunContext) -> int:
            for n in range(30):
                context.progress(n, 30, "x" * 300_000)
                await anyio.sleep(0.06)  # longer than progress is collected before a write
            return 1

        @flock.agent(next_agent="shaky")
        async def steady(n: int = 7) -> int:
            self.calls.append("steady")
            return n

        @flock.agent
        async def shaky(result: int) -> int:
            self.calls.append("shaky")
            if self.fails:
                raise ValueError("shaky")
            return result + 1

        flock.add_agent(FlockFactory.create_default_agent(name="asks", input="text: str", output="reply: str"))


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.thread_may_go.set()


@pytest.fixture
def flock(gate: Gate) -> Flock:
    """Return the flock for the app and the client of conftest."""
    return gate.flock


@pytest.fixture(params=["embedded", "temporal"])
async def app(request: pytest.FixtureRequest, gate: Gate, model: FakeModel) -> AsyncIterator[FlockAPI]:
    """Run an app on each engine, because a client cannot tell which one answers."""
    async with contextlib.AsyncExitStack() as stack:
        engine = await stack.enter_async_context(engine_for(request, gate.flock, transport=model.transport))
        made = create_app(gate.flock, server_name="Sample", engine=engine)
        await stack.enter_async_context(made.lifespan())
        yield made


async def start(client: httpx.AsyncClient, agent_name: str, inputs: Any = None, **more: Any) -> str:
    response = await post_run(client, agent_name, inputs, async_run=True, **more)
    assert response.status_code == 202
    run_id: str = response.json()["run_id"]
    return run_id


# Prefer


async def test_a_client_may_prefer_not_to_wait(client: httpx.AsyncClient) -> None:
    response = await client.post("/run/flock", json={"agent_name": "nap"}, headers={"Prefer": "respond-async"})
    assert (response.status_code, response.json()["status"]) == (202, "starting")
    assert response.headers["Preference-Applied"] == "respond-async"
    assert response.headers["Location"] == f"/run/{response.json()['run_id']}"
    assert response.headers["Retry-After"] == "1"


async def test_a_client_may_prefer_to_wait_for_a_while(client: httpx.AsyncClient, gate: Gate) -> None:
    gate.fails = False
    headers = {"Prefer": "respond-async, wait=30"}
    response = await client.post("/run/flock", json={"agent_name": "steady"}, headers=headers)
    assert (response.status_code, response.json()["status"]) == (200, "completed")
    assert response.headers["Preference-Applied"] == "respond-async, wait=30"
    headers = {"Prefer": "respond-async, wait=0"}
    response = await client.post("/run/flock", json={"agent_name": "nap"}, headers=headers)
    assert (response.status_code, response.headers["Preference-Applied"]) == (202, "respond-async, wait=0")


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        (["wait=1"], None),
        (['handling=lenient; x="a, respond-async"'], None),
        (["return=minimal", "RESPOND-ASYNC;q=1"], "respond-async"),
        (["wait=0, wait=60, respond-async"], "respond-async, wait=0"),
        (["respond-async, wait=soon"], "respond-async"),
        (["respond-async,wait = 0"], "respond-async, wait=0"),
        (["respond-async, wait=99999"], "respond-async, wait=60"),
        (["", ",,"], None),
    ],
)
async def test_preferences_are_parsed_as_in_rfc_7240(
    prefer: list[str], applied: str | None, client: httpx.AsyncClient, gate: Gate
) -> None:
    """Unknown preferences are ignored (section 2)."""
    gate.fails = False
    headers = [("Prefer", value) for value in prefer]
    response = await client.post("/run/flock", json={"agent_name": "steady"}, headers=headers)
    assert response.headers.get("Preference-Applied") == applied
    assert response.status_code in ((200,) if applied is None else (200, 202))


# Wait


async def test_a_client_waits_for_the_end_of_a_run(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "nap")
    answers: list[Any] = []

    async def wait() -> None:
        answers.append(await get(client, f"/run/{run_id}", wait=30))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await gate.started.wait()
        gate.may_go.set()
    assert [body["status"] for body in answers] == ["completed"]
    assert (await get(client, f"/run/{run_id}", wait=30))["status"] == "completed"


async def test_a_wait_ends_after_its_time(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "nap")
    await gate.started.wait()
    body = await get(client, f"/run/{run_id}", wait=1)
    assert body["status"] == "running"
    assert body["progress"] == {"done": 1.0, "total": 2.0, "message": "half\nway"}
    assert body["attempt"] == 1


@pytest.mark.parametrize(
    "query",
    ["status=null", "status=running&status=running", "created_before=0.5", "created_after=1", "limit=1.0"],
)
async def test_an_ambiguous_filter_is_refused(query: str, client: httpx.AsyncClient) -> None:
    """A list without the filter would be a wrong answer."""
    check_problem(await client.get(f"/runs?{query}"), 422)


async def test_a_filter_may_be_any_text(client: httpx.AsyncClient) -> None:
    assert (await client.get("/runs?agent_name=null")).json() == {"runs": [], "next": None}


@pytest.mark.parametrize("wait", ["3601", "-1", "x", "1.5", ""])
async def test_a_wait_is_a_whole_number_of_seconds(wait: str, client: httpx.AsyncClient) -> None:
    problem = check_problem(await client.get("/run/1", params={"wait": wait}), 422)
    assert "'wait' in the query: Expected 'int'" in problem["detail"]
    check_problem(await client.get("/run/1", params={"wait": "1"}), 404)


# Cancel


async def test_a_run_is_cancelled(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "nap")
    await gate.started.wait()
    response = await client.post(f"/run/{run_id}/cancel", params={"wait": 30})
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert response.headers["Flock-Run-Status"] == "cancelled"
    assert gate.ended.is_set(), "the agent has stopped"
    again = await client.post(f"/run/{run_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


async def test_a_run_is_cancelled_only_after_its_function_has_stopped(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "block")
    await wait_until(client, f"/run/{run_id}", lambda body: body["status"] == "running")
    await until(lambda: gate.blocked is not None)  # its function starts in a thread
    response = await client.post(f"/run/{run_id}/cancel")
    assert (response.status_code, response.json()["status"]) == (202, "running")
    assert response.headers["Location"] == f"/run/{run_id}"
    assert gate.blocked
    with anyio.fail_after(PATIENCE_S):
        while not gate.blocked.cancel_requested:  # noqa: ASYNC110 - as the function does
            await anyio.sleep(0.01)
    gate.thread_may_go.set()
    response = await client.post(f"/run/{run_id}/cancel?wait=30")
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert response.json()["steps"][0]["result"] == {"result": "asked"}, "its result stays readable"


async def test_an_ended_or_unknown_run_cannot_be_cancelled(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "steady")
    await get(client, f"/run/{run_id}", wait=30)
    problem = check_problem(await client.post(f"/run/{run_id}/cancel"), 409)
    assert problem["detail"] == f"The run {run_id} is failed and can no longer be cancelled."
    check_problem(await client.post("/run/42/cancel"), 404)


# Retry, delete


async def test_a_retry_resumes_after_the_last_completed_step(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "steady")
    failed = await get(client, f"/run/{run_id}", wait=30)
    assert (failed["status"], [step["result"] for step in failed["steps"]]) == ("failed", [{"result": 7}])
    gate.fails = False
    response = await client.post(f"/run/{run_id}/retry")
    assert (response.status_code, response.json()["attempt"]) == (202, 2)
    done = await get(client, response.headers["Location"], wait=30)
    assert (done["status"], done["result"]) == ("completed", {"result": 8})
    assert [(step["agent_name"], step["attempt"]) for step in done["steps"]] == [("steady", 1), ("shaky", 2)]
    assert gate.calls == ["steady", "shaky", "shaky"]
    check_problem(await client.post(f"/run/{run_id}/retry"), 409)
    check_problem(await client.post("/run/42/retry"), 404)


async def test_a_final_run_is_deleted(client: httpx.AsyncClient, gate: Gate) -> None:
    run_id = await start(client, "nap")
    problem = check_problem(await client.delete(f"/run/{run_id}"), 409)
    assert "Cancel it first, or wait until it ends" in problem["detail"]
    gate.may_go.set()
    await get(client, f"/run/{run_id}", wait=30)
    response = await client.delete(f"/run/{run_id}")
    assert (response.status_code, response.content) == (204, b"")
    check_problem(await client.delete(f"/run/{run_id}"), 404)
    check_problem(await client.get(f"/run/{run_id}"), 404)


# List


async def test_runs_are_listed_in_pages(client: httpx.AsyncClient, gate: Gate) -> None:
    ids = [await start(client, "steady", {"n": n}) for n in range(5)]
    for run_id in ids:
        await get(client, f"/run/{run_id}", wait=30)
    seen: list[str] = []
    path = "/runs?limit=2&agent_name=steady&status=failed&created_after=2020-01-01T00:00:00%2B00:00"
    for _ in range(3):
        response = await client.get(path)
        page = response.json()
        seen += [run["run_id"] for run in page["runs"]]
        assert all("inputs" not in run and "result" not in run for run in page["runs"])
        if page["next"] is None:
            assert "link" not in response.headers
            break
        assert response.headers["Link"] == f'<{page["next"]}>; rel="next"'
        path = page["next"]
    assert seen == ids[::-1]
    assert (await get(client, "/runs", status="completed"))["runs"] == []


async def test_a_list_has_inputs_and_results_on_request(client: httpx.AsyncClient, gate: Gate) -> None:
    gate.fails = False
    await get(client, f"/run/{await start(client, 'steady', {'n': 1})}", wait=30)
    for include, inputs, result in (("inputs", {"n": 1}, None), ("result", None, {"result": 2})):
        (run,) = (await get(client, "/runs", include=include))["runs"]
        assert (run.get("inputs"), run.get("result")) == (inputs, result)
    (run,) = (await get(client, "/runs", include="inputs,result"))["runs"]
    assert (run["inputs"], run["result"]) == ({"n": 1}, {"result": 2})


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"status": "done"}, "'status' in the query: Invalid enum value 'done'."),
        ({"limit": "0"}, "'limit' in the query: Expected 'int' >= 1."),
        ({"limit": "1001"}, "'limit' in the query: Expected 'int' <= 1000."),
        ({"created_after": "yesterday"}, "'created_after' in the query: Invalid RFC3339 encoded datetime."),
        ({"created_after": "2026-01-01T00:00:00"}, "Expected 'datetime' with a timezone component."),
        ({"agent": "steady"}, "The query has no parameter 'agent' here. Did you mean 'agent_name'?"),
        ({"include": "steps"}, "'include' in the query: Invalid enum value 'steps'."),
    ],
)
async def test_an_invalid_filter_is_refused(query: dict[str, str], words: str, client: httpx.AsyncClient) -> None:
    assert words in check_problem(await client.get("/runs", params=query), 422)["detail"]


@pytest.mark.parametrize("app", ["embedded"], indirect=True)
async def test_an_invalid_cursor_is_refused(client: httpx.AsyncClient, gate: Gate) -> None:
    """This holds for every list. A valid id in another spelling is the same cursor."""
    runs = [await start(client, "steady") for _ in range(2)]
    batch = (await client.post("/run/batch", json={"agent_name": "steady", "batch_inputs": [{}]})).json()
    of_batch = f"/batch/{batch['batch_id']}"
    for path in ("/runs", "/batches", of_batch, f"{of_batch}/results", f"{of_batch}/events", f"/run/{runs[0]}/events"):
        for after in ("garbage", "", "-2", f"{runs[0]}0"):
            problem = check_problem(await client.get(path, params={"after": after}), 422)
            assert "'after' in the query" in problem["errors"][0]["detail"], path
    for after in (runs[1], runs[1].upper(), runs[1].replace("-", "")):
        assert [run["run_id"] for run in (await get(client, "/runs", after=after))["runs"]] == runs[:1]


# Events


async def test_events_are_streamed_to_the_end(client: httpx.AsyncClient, gate: Gate) -> None:
    gate.fails = False
    run_id = await start(client, "steady")
    response = await client.get(f"/run/{run_id}/events")
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Cache-Control"] == "no-store"
    events = events_in(response.text)
    assert [event["event"] for event in events] == [
        *("run.started", "step.started", "step.completed", "step.started", "step.completed", "run.completed"),
    ]
    ids = [int(event["id"]) for event in events]
    assert ids == sorted(set(ids))
    assert events[-1]["data"]["result"] == {"result": 8}
    assert {event["data"]["run_id"] for event in events} == {run_id}
    for headers, query in (({"Last-Event-ID": str(ids[3])}, {}), ({}, {"after": ids[3]})):
        rest = await client.get(f"/run/{run_id}/events", headers=headers, params=query)
        assert [event["event"] for event in events_in(rest.text)] == ["step.completed", "run.completed"]


async def test_a_reader_that_has_all_events_gets_204(client: httpx.AsyncClient, gate: Gate) -> None:
    """A browser reconnects when a stream ends, unless it gets 204."""
    run_id = await start(client, "steady")
    last = events_in((await client.get(f"/run/{run_id}/events")).text)[-1]
    assert last["event"] == "run.failed"
    response = await client.get(f"/run/{run_id}/events", headers={"Last-Event-ID": last["id"]})
    assert (response.status_code, response.content) == (204, b"")
    check_problem(await client.get("/run/42/events"), 404)
    check_problem(await client.get(f"/run/{run_id}/events?after=x"), 422)
    assert (await client.head(f"/run/{run_id}/events")).status_code == 200


async def test_an_event_stream_ends_if_the_store_fails(
    app: FlockAPI, client: httpx.AsyncClient, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await start(client, "steady")
    await get(client, f"/run/{run_id}", wait=30)

    async def fail(run_id: str, after: int = 0, **options: Any) -> AsyncIterator[None]:
        raise StoreError("gone")
        yield

    monkeypatch.setattr(app.engine, "events", fail)
    response = await client.get(f"/run/{run_id}/events")
    assert (response.status_code, response.text) == (200, "")


# Idempotency keys


@pytest.mark.parametrize("async_run", [False, True], ids=["sync", "async"])
async def test_a_repeated_request_is_the_same_run(async_run: bool, client: httpx.AsyncClient, gate: Gate) -> None:
    gate.fails = False
    body = {"agent_name": "steady", "async_run": async_run}
    first = await client.post("/run/flock", json=body, headers={"Idempotency-Key": '"8e03978e-40d5"'})
    assert "Idempotency-Replayed" not in first.headers
    await get(client, f"/run/{first.json()['run_id']}", wait=30)
    again = await client.post("/run/flock", json=body, headers={"Idempotency-Key": "8e03978e-40d5"})
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (200, "true")
    assert again.json()["run_id"] == first.json()["run_id"]
    assert (again.json()["status"], gate.calls) == ("completed", ["steady", "shaky"])
    other = await client.post("/run/flock", json={"agent_name": "nap"}, headers={"Idempotency-Key": "8e03978e-40d5"})
    assert check_problem(other, 422)["type"] == "urn:flockapi:problem:idempotency-key-reused"


@pytest.mark.parametrize("app", ["embedded"], indirect=True)
async def test_a_repeated_batch_is_the_same_batch(client: httpx.AsyncClient) -> None:
    body, headers = {"agent_name": "steady", "batch_inputs": [{}]}, {"Idempotency-Key": "b"}
    first = await client.post("/run/batch", json=body, headers=headers)
    again = await client.post("/run/batch", json=body, headers=headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (202, "true")
    assert again.json()["batch_id"] == first.json()["batch_id"]
    check_problem(await client.post("/run/flock", json={"agent_name": "steady"}, headers=headers), 422)


@pytest.mark.parametrize("key", ["", '""', "two words", 'a"b', "x" * 256, "caf\u00e9".encode(), "a\r\nX: y"])
async def test_an_invalid_idempotency_key_is_refused(key: Any, client: httpx.AsyncClient) -> None:
    response = await client.post("/run/flock", json={"agent_name": "nap"}, headers={"Idempotency-Key": key})
    assert "1 to 255 visible ASCII characters" in check_problem(response, 400)["detail"]


# Timeouts


async def test_a_request_sets_the_timeout_of_its_run(client: httpx.AsyncClient, gate: Gate) -> None:
    body = (await post_run(client, "nap", timeout_s=0.05)).json()
    assert (body["status"], body["error_type"]) == ("failed", "timeout")
    for wrong in (0, -1, "x"):
        check_problem(await post_run(client, "nap", timeout_s=wrong), 422)


async def test_the_timeout_of_a_run_is_capped(gate: Gate) -> None:
    app = create_app(gate.flock, engine=gate.flock.engine(max_timeout_s=0.05))
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        body = (await post_run(client, "nap", timeout_s=3600)).json()
    assert body["error"] == "The run did not end within 0.05 s (timeout_s)."


# Readiness


async def test_a_draining_server_is_not_ready(app: FlockAPI, client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).status_code == (await client.get("/healthz")).status_code == 200
    await app.engine.drain(1)
    problem = check_problem(await client.get("/readyz"), 503)
    assert problem["detail"] == "The server is shutting down and does not accept new work. Try again later."
    assert (await client.get("/healthz")).status_code == 200


# Failures while a client waits


@pytest.mark.parametrize("soon", [True, False])
async def test_a_store_that_fails_does_not_cancel_the_run_that_a_client_waits_for(soon: bool, tmp_path: Path) -> None:
    """It fails at once or later. The response is 503 and says where the end of the run can be seen."""
    flock, begun, may_go = Flock(), anyio.Event(), anyio.Event()

    @flock.agent(next_agent="measure")
    async def lengthen() -> str:
        begun.set()
        await may_go.wait()
        return "x" * 1_000_000

    @flock.agent
    def measure(result: str) -> int:
        return len(result)

    engine = flock.engine(store=tmp_path / "flock.db")
    app = create_app(flock, engine=engine)
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        database = sqlite_of(engine)._db
        database.execute(f"PRAGMA max_page_count = {database.execute('PRAGMA page_count').fetchone()[0]}")

        async def release() -> None:
            await begun.wait()
            await anyio.sleep(0 if soon else 2 * WATCH_DELAY_S)
            may_go.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(release)
            problem = check_problem(await client.post("/run/flock", json={"agent_name": "lengthen"}), 503)
        database.execute("PRAGMA max_page_count = 1073741823")
        found = re.search(r"not cancelled\. GET (/run/\S+) shows its status", problem["detail"])
        assert found
        run = await wait_until(client, found[1], lambda run: run["status"] in ("completed", "failed", "cancelled"))
        assert (run["status"], run["result"]) == ("completed", {"result": 1_000_000})


# Callers that disconnect, over real sockets


@pytest.mark.alone
async def test_a_synchronous_run_is_cancelled_if_its_caller_disconnects(gate: Gate) -> None:
    async with Served(create_app(gate.flock, store=":memory:")) as served:
        connection = await served.send({"agent_name": "nap"})
        await gate.started.wait()
        await connection.aclose()
        with anyio.fail_after(PATIENCE_S):
            await gate.ended.wait()
        assert (await served.only_run())["status"] == "cancelled"


@pytest.mark.parametrize("how", ["on_disconnect", "async_run", "Idempotency-Key"])
@pytest.mark.slow
async def test_other_runs_continue_if_their_caller_disconnects(how: str, gate: Gate) -> None:
    """These are asynchronous runs, runs of an app that continues them, and runs that the caller may request again."""
    on_disconnect: Any = "continue" if how == "on_disconnect" else "cancel"
    async with Served(create_app(gate.flock, store=":memory:", on_disconnect=on_disconnect)) as served:
        headers = {"Idempotency-Key": "k"} if how == "Idempotency-Key" else {}
        connection = await served.send({"agent_name": "nap", "async_run": how == "async_run"}, **headers)
        await gate.started.wait()
        await connection.aclose()
        with anyio.move_on_after(1):
            await gate.ended.wait()
        assert not gate.ended.is_set()
        gate.may_go.set()
        assert (await served.only_run())["status"] == "completed"


@pytest.mark.parametrize(
    ("request_line", "headers", "end"),
    [
        pytest.param("POST /run/flock", {}, "completed", id="key"),
        pytest.param("POST /run/flock", {"Prefer": "respond-async, wait=60"}, "completed", id="prefer"),
        pytest.param("GET /run/{run_id}?wait=60", {}, "completed", id="run"),
        pytest.param("POST /run/{run_id}/cancel?wait=60", {}, "cancelled", id="cancelled run"),
        pytest.param("GET /batch/{batch_id}?wait=60", {}, "completed", id="batch"),
        pytest.param("POST /batch/{batch_id}/cancel?wait=60", {}, "completed", id="cancelled batch"),
    ],
)
@pytest.mark.slow
async def test_a_handler_that_waits_ends_when_its_client_disconnects(
    request_line: str, headers: dict[str, str], end: str, gate: Gate
) -> None:
    """The runs continue, even those being cancelled, because their function does not return."""
    body, clients = {"agent_name": "block"}, 20
    async with (
        Served(create_app(gate.flock, store=":memory:")) as served,
        httpx.AsyncClient(base_url=served.url) as client,
    ):
        run_id = await start(client, "block")
        batch = (await client.post("/run/batch", json={**body, "batch_inputs": [{}]})).json()
        await until(lambda: gate.blocked is not None)
        request_line = request_line.format(run_id=run_id, batch_id=batch["batch_id"])
        connections = [
            await served.send(body, request_line, **headers, **{"Idempotency-Key": f"client-{n}"})
            for n in range(clients)
        ]
        await until(lambda: served.requests_in_flight == clients)
        for connection in connections:
            await connection.aclose()
        with anyio.fail_after(30):
            await until(lambda: served.requests_in_flight == 0)
        runs = (await get(client, "/runs"))["runs"]
        assert len(runs) == (1 + clients if request_line == "POST /run/flock" else 1)
        gate.thread_may_go.set()
        ends = [await get(client, f"/run/{run['run_id']}", wait=30) for run in runs]
        assert {run["status"] for run in ends} == {end}


@pytest.mark.alone
async def test_the_model_call_is_aborted_if_the_caller_disconnects(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, aborted = anyio.Event(), anyio.Event()

    async def silent(stream: anyio.abc.SocketStream) -> None:
        try:
            while True:
                await stream.receive()
                asked.set()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            aborted.set()

    async with socket_server(silent) as (url, connections):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        async with Served(create_app(gate.flock, store=":memory:")) as served:
            connection = await served.send({"agent_name": "asks", "inputs": {"text": "x"}})
            await asked.wait()
            await connection.aclose()
            with anyio.fail_after(PATIENCE_S):
                await aborted.wait()
            assert (await served.only_run())["status"] == "cancelled"
        assert len(connections) == 1, "the model is not called again"


async def test_a_run_is_cancelled_if_its_host_cancels_the_request(app: FlockAPI, gate: Gate) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(post_run, client, "nap")
            await gate.started.wait()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(30):
            await gate.ended.wait()
        (run,) = (await get(client, "/runs"))["runs"]
        assert (await get(client, f"/run/{run['run_id']}", wait=60))["status"] == "cancelled"


@pytest.mark.parametrize(("on_disconnect", "end"), [("cancel", "cancelled"), ("continue", "completed")])
async def test_a_run_is_cancelled_if_its_host_cancels_the_request_while_it_is_accepted(
    on_disconnect: Any, end: str, gate: Gate, tmp_path: Path
) -> None:
    """A run of a session is written when it is accepted, even if the request is cancelled during the write."""
    engine, is_held, may_write = gate.flock.engine(store=tmp_path / "flock.db"), threading.Event(), threading.Event()
    app = create_app(gate.flock, engine=engine, on_disconnect=on_disconnect)

    def hold(db: object) -> None:
        is_held.set()
        may_write.wait(20)

    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        async with anyio.create_task_group() as writes, anyio.create_task_group() as requests:
            writes.start_soon(sqlite_of(engine).change, hold)
            await until(is_held.is_set)
            requests.start_soon(functools.partial(post_run, client, "nap", session_id="s"))
            await until(lambda: bool(sqlite_of(engine)._open.changes))
            requests.cancel_scope.cancel()
            may_write.set()
        gate.may_go.set()
        (run,) = (await wait_until(client, "/runs", lambda body: bool(body["runs"])))["runs"]
        assert (await get(client, f"/run/{run['run_id']}", wait=60))["status"] == end


async def test_a_caller_gets_a_response_that_took_long(gate: Gate, model: FakeModel) -> None:
    """It takes longer than the server waits before it watches for a disconnect."""
    async with Served(create_app(gate.flock, engine=gate.flock.engine(transport=model.transport))) as served:
        async with httpx.AsyncClient(base_url=served.url) as client:

            async def release() -> None:
                await gate.started.wait()
                await anyio.sleep(0.3)  # longer than WATCH_DELAY_S
                gate.may_go.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(release)
                assert (await post_run(client, "nap")).json()["status"] == "completed"
            model.replies = [Reply({"reply": "yes"})]
            assert (await post_run(client, "asks", {"text": "x"})).json()["result"] == {"reply": "yes"}


async def test_an_event_stream_that_is_not_read_blocks_nothing(gate: Gate) -> None:
    """The connection reads none of nine megabytes of progress."""
    async with Served(create_app(gate.flock, store=":memory:")) as served:
        async with httpx.AsyncClient(base_url=served.url) as client:
            run_id = await start(client, "chatter")
            reader = await anyio.connect_tcp("127.0.0.1", served.port)
            await reader.send(f"GET /run/{run_id}/events HTTP/1.1\r\nHost: t\r\n\r\n".encode())
            assert (await get(client, f"/run/{run_id}", wait=30))["status"] == "completed"
            await reader.aclose()

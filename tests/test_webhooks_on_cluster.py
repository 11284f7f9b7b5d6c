"""Webhooks of runs and batches on a cluster: the same events, by an activity of the processes that serve the API."""

import contextlib
import random
import re
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from msgspec.structs import replace
from starlette.responses import Response

from flock.core import Flock
from flock.errors import DefinitionError
from flock.runs import RunStatus, Webhook, new_id, now
from flock.temporal import TemporalEngine, reports
from flock.temporal import webhooks as sending
from flock.temporal.messages import FLOCK, SEARCH_ATTRIBUTES, WEBHOOK_WORKFLOW, RunOrder, keyword_of, run_workflow_id
from flock.temporal.workflows import FlockRun
from flock.web import webhooks
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_with_worker, patient
from tests.support.engines import until_run
from tests.support.http import client_of, get, post_run, wait_for, wait_until
from tests.support.receivers import SECRET, Inbox
from tests.support.servers import flockapi_command, running
from tests.test_temporal import working
from tests.test_webhooks import TRACEPARENT, sample
from tests.webhooks_kills import TARGET

pytestmark = pytest.mark.anyio

#: The events of one run, in the order in which they happen.
ORDER = re.compile(r"(run\.waiting question\.expired )*run\.(completed|failed) ")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again without the pauses that a real receiver needs."""
    monkeypatch.setattr(webhooks, "MAX_PAUSE_S", 0.05)
    monkeypatch.setattr(webhooks, "MAX_MISS_PAUSE_S", 0.05)
    monkeypatch.setattr(webhooks, "MAX_BUSY_PAUSE_S", 0.1)
    monkeypatch.setattr(webhooks, "MAX_DOWN_PAUSE_S", 0.05)


@contextlib.asynccontextmanager
async def served(address: str, flock: Flock, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with engine_with_worker(address, flock) as engine, api_of(engine, flock, **options) as client:
        yield client


@contextlib.asynccontextmanager
async def api_of(engine: TemporalEngine, flock: Flock, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(flock, engine=engine, auth="host", webhook_secrets=[SECRET], **options)
    async with app.lifespan(), client_of(app) as client:
        yield client


async def test_the_end_of_a_run_arrives(temporal_address: str) -> None:
    inbox = Inbox()
    async with (
        inbox.serve() as receiver,
        served(temporal_address, sample(f"{receiver.url}/hook"), metrics=True) as client,
    ):
        client.headers["traceparent"] = TRACEPARENT
        run = (await post_run(client, "echo", {"text": "hi"})).json()
        (event,) = await inbox.until(1)
        listed = await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
        assert 'flock_webhooks_total{status="sent"} 1.0' in (await client.get("/metrics")).text
    assert (event["type"], event["data"]["result"]) == ("run.completed", {"result": "hi"})
    assert event["data"]["url"] == f"/run/{run['run_id']}"
    assert inbox.requests[0][2]["traceparent"] == TRACEPARENT
    (webhook,) = listed["webhooks"]
    assert (webhook["record_id"], webhook["tries"], webhook["webhook_id"]) == (run["run_id"], 1, inbox.ids[0])
    assert webhook["url"] == f"{receiver.url}/hook"


async def test_each_state_of_a_run_is_reported_once_and_in_order(temporal_address: str) -> None:
    """Also of a retry, and a question that expires before its run fails, in one workflow task."""
    inbox = Inbox()
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        failed = (await post_run(client, "echo", {"text": "fail"}, async_run=True)).json()["run_id"]
        await inbox.until(1)
        await client.post(f"/run/{failed}/retry")
        await inbox.until(2)
        waiting = (await post_run(client, "ask", async_run=True)).json()["run_id"]
        await inbox.until(3)
        await client.post(f"/run/{waiting}/cancel")
        await inbox.until(4)
        await post_run(client, "ask", {"timeout_s": 4}, async_run=True)  # its first webhook is made while it waits
        await inbox.until(7)
    assert inbox.types[:4] == ["run.failed", "run.failed", "run.waiting", "run.cancelled"]
    assert inbox.types[4:] == ["run.waiting", "question.expired", "run.failed"]
    first, again, asked, _, _, expired, _ = (event["data"] for event in inbox.accepted)
    assert (first["error"], first["error_type"], first["attempt"]) == ("it fails", "agent_error", 1)
    assert (again["run_id"], again["attempt"]) == (failed, 2)
    assert asked["waiting_for"][0]["question"] == "Go on?"
    assert expired["call_id"] == inbox.accepted[4]["data"]["waiting_for"][0]["call_id"]
    assert len(set(inbox.ids)) == 7


async def test_a_batch_is_reported_and_its_items_are_not(temporal_address: str) -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        client.headers["traceparent"] = TRACEPARENT
        for texts in (["a", "b", "fail"], ["fail"]):
            inputs = [{"text": text} for text in texts]
            body = {"agent_name": "echo", "batch_inputs": inputs}
            batch = (await client.post("/run/batch", json=body)).json()["batch_id"]
            await inbox.until(len(inbox.accepted) + 1)
        await client.post(f"/batch/{batch}/retry")
        await inbox.until(3)
    assert inbox.types == ["batch.completed", "batch.failed", "batch.failed"]
    assert {headers["traceparent"] for *_, headers in inbox.requests} == {TRACEPARENT}
    assert [event["data"]["attempt"] for event in inbox.accepted] == [1, 1, 2]
    of_first = inbox.accepted[0]["data"]
    assert of_first | {"total_items": 3, "failed_items": 1, "status": "completed"} == of_first


async def test_the_events_of_a_run_keep_their_order_and_it_waits_for_no_receiver(temporal_address: str) -> None:
    def respond(number: int, event: Any) -> Response:
        return Response(status_code=503 if event["type"] == "run.waiting" and not is_up else 200)

    is_up, inbox = False, Inbox(respond)
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        run = (await post_run(client, "ask", async_run=True)).json()["run_id"]
        waiting = await wait_until(client, f"/run/{run}", lambda body: body["status"] == "waiting")
        call = waiting["waiting_for"][0]["call_id"]
        await client.post(f"/run/{run}/calls/{call}", json={"output": True})
        assert (await wait_for(client, f"/run/{run}"))["status"] == "completed"
        page = await wait_until(client, "/webhooks", lambda page: len(page["webhooks"]) == 2)
        assert [each["type"] for each in page["webhooks"]] == ["run.completed", "run.waiting"]
        assert {each["status"] for each in page["webhooks"]} == {"pending"}
        await wait_until(client, "/webhooks", lambda page: page["webhooks"][1]["tries"] > 1)
        is_up = True
        await inbox.until(2)
    assert inbox.types == ["run.waiting", "run.completed"]


async def test_a_receiver_that_fails_a_third_gets_all_events_in_order_for_each_run(temporal_address: str) -> None:
    chance = random.Random(1)
    inbox = Inbox(lambda number, event: Response(status_code=500 if chance.random() < 1 / 3 else 200))
    space: dict[str, Any] = {}
    exec(TARGET, space)
    flock: Flock = space["flock"]
    async with inbox.serve() as receiver:
        flock.webhook_url = receiver.url
        async with served(temporal_address, flock) as client:
            runs = [(await post_run(client, "work", {"n": n}, async_run=True)).json()["run_id"] for n in range(24)]
            page = "/webhooks?status=pending"
            await wait_until(client, page, lambda page: len(set(inbox.ids)) == 36 and not page["webhooks"])
            ended = {run: (await get(client, f"/run/{run}"))["status"] for run in runs}
    seen = events_by_run(inbox)
    assert inbox.unsigned == 0
    for run, status in ended.items():
        assert ORDER.fullmatch(seen[run]), seen[run]
        assert seen[run].endswith(f"run.{status} ")


@pytest.mark.nightly
@pytest.mark.timeout(900)
async def test_no_event_is_lost_if_workers_are_killed_again_and_again(temporal_address: str, tmp_path: Path) -> None:
    """Also between the start of a webhook and the end of its run."""
    name = new_id()
    target = tmp_path / "target.py"
    target.write_text(TARGET.replace('"kills"', f'"kills {name}"'))
    space: dict[str, Any] = {}
    exec(target.read_text(), space)
    flock: Flock = space["flock"]
    inbox = Inbox()
    engine = patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name, heartbeat_timeout_s=3))

    def kill_some() -> None:
        for _ in range(6):
            with working(target, temporal_address) as worker:
                time.sleep(3)
                worker.kill()

    cluster: Any = engine.cluster  # it may be busy for longer than clients wait
    scope = cluster.rpc_scope
    cluster.rpc_scope = lambda timeout_s=PATIENCE_S, **options: scope(max(timeout_s or 0, PATIENCE_S), **options)
    async with inbox.serve() as receiver:
        flock.webhook_url = receiver.url
        async with api_of(engine, flock) as client, anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, kill_some)
            runs = []
            for n in range(60):
                runs.append((await post_run(client, "work", {"n": n}, async_run=True)).json()["run_id"])
                await anyio.sleep(0.25)
            with working(target, temporal_address):
                with anyio.fail_after(300):
                    while len(set(inbox.ids)) < 90:  # noqa: ASYNC110
                        await anyio.sleep(0.1)
                ended = {run: (await get(client, f"/run/{run}"))["status"] for run in runs}
    seen = events_by_run(inbox)
    for run, status in ended.items():
        assert ORDER.fullmatch(seen[run]), seen[run]
        assert seen[run].endswith(f"run.{status} ")


def events_by_run(inbox: Inbox) -> dict[str, str]:
    """Return the types of the events of each run, in the order in which they arrived first."""
    seen, known = defaultdict[str, str](str), set[str]()
    for webhook_id, event in zip(inbox.ids, inbox.accepted, strict=True):
        if webhook_id not in known:
            known.add(webhook_id)
            seen[event["data"]["run_id"]] += f"{event['type']} "
    return seen


async def test_no_history_has_a_secret_or_an_address(temporal_address: str) -> None:
    inbox = Inbox(lambda number, _: Response(status_code=500 if number == 1 else 200))
    flock = sample(None)
    async with inbox.serve() as receiver, engine_with_worker(temporal_address, flock) as engine:
        flock.webhook_url = f"{receiver.url}/of/t0psecret"
        async with api_of(engine, flock) as client:
            run = (await post_run(client, "ask", async_run=True, session_id="private")).json()["run_id"]
            await inbox.until(1)
            await client.post(f"/run/{run}/cancel")
            await inbox.until(2)
            await wait_until(client, "/webhooks?status=pending", lambda page: not page["webhooks"])
            query, stored = f"{FLOCK.name} = '{keyword_of(engine._flock)}'", ""
            async for found in engine.cluster.client.list_workflows(query):
                if found.workflow_type == WEBHOOK_WORKFLOW:
                    named = {pair.key.name for pair in found.typed_search_attributes}
                    assert named & SEARCH_ATTRIBUTES.keys() == {FLOCK.name}, "no session"
                handle = engine.cluster.handle(found.id, found.run_id)
                stored += str((await handle.fetch_history()).events) + str((await handle.describe()).raw_description)
    assert "run.waiting" in stored, "what is searched are the histories"
    for secret in (SECRET, SECRET.removeprefix("whsec_"), "0123456789abcdef", "t0psecret", receiver.url[7:]):
        assert secret not in stored


async def test_a_webhook_is_given_up_visibly_and_can_be_sent_again(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks, "RETRIED_FOR", timedelta(seconds=0.3))
    is_down = True
    inbox = Inbox(lambda number, _: Response(status_code=503 if is_down else 200))
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
        (webhook,) = page["webhooks"]
        assert webhook["error"] == "It answered with status 503."
        assert webhook["tries"] >= 1
        is_down = False
        sent = await client.post(f"/webhooks/{webhook['webhook_id']}/retry")
        assert (sent.status_code, sent.json()["status"], sent.json()["tries"]) == (202, "pending", 0)
        await inbox.until(1)
        sent_page = await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
        assert (await get(client, "/webhooks?status=given_up"))["webhooks"] == []
        assert await get(client, "/webhooks") == sent_page
        newest = f"msg_{new_id()}_1"
        for missing in ("msg_0", newest, f"msg_{new_id()}_x", f"msg_{new_id()}", f"{newest}_2_3", "run:1"):
            assert (await client.post(f"/webhooks/{missing}/retry")).status_code == 404
            found = (await get(client, "/webhooks", after=missing))["webhooks"]
            assert found == (sent_page["webhooks"] if missing == newest else [])
    assert inbox.ids == [webhook["webhook_id"]]
    assert "was given up" in caplog.text or "were given up" in caplog.text


async def test_one_that_was_not_sent_in_time_is_given_up_with_what_is_known_of_its_tries(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "GIVE_UP_AFTER", timedelta(seconds=8))
    inbox = Inbox(lambda number, _: Response(status_code=503))
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
    (webhook,) = page["webhooks"]
    assert webhook["tries"] > 0
    assert webhook["first_try_at"] is not None
    assert webhook["error"] == "It was not sent within 0 days. It answered with status 503."


async def test_a_bug_of_the_workflow_reports_nothing_and_its_correction_continues_the_run(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, bugs, inbox = FlockRun._steps, [KeyError("a bug")], Inbox()

    async def with_a_bug(self: FlockRun, order: RunOrder) -> None:
        if bugs:
            raise bugs.pop()
        await steps(self, order)

    monkeypatch.setattr(FlockRun, "_steps", with_a_bug)
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        run = (await post_run(client, "echo", {"text": "a"}, session_id="s")).json()
        await inbox.until(1)
    assert run["status"] == "completed"
    assert inbox.types == ["run.completed"]


async def test_requests_that_fail_at_the_same_time_count_once_against_their_host(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "MAX_PAUSE_S", 60)
    all_open = anyio.Event()

    async def respond(number: int, event: Any) -> Response:
        if number == 4:
            all_open.set()
        await all_open.wait()
        return Response(status_code=503)

    inbox = Inbox(respond)
    flock = sample(None)
    async with inbox.serve() as receiver, engine_with_worker(temporal_address, flock) as engine:
        flock.webhook_url = receiver.url
        app = create_app(flock, engine=engine, auth="host", webhook_secrets=[SECRET])
        async with app.lifespan(), client_of(app) as client:
            for _ in range(4):
                await post_run(client, "echo", {"text": "a"}, async_run=True)
            tried = lambda page: sum(each["tries"] for each in page["webhooks"]) == 4  # noqa: E731
            await wait_until(client, "/webhooks", tried)
            (host,) = app.webhooks.receivers.values()
            assert host.failures == 1


async def test_a_webhook_that_has_waited_for_an_earlier_one_has_missed_nothing(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its first pause is short, however long the earlier one took."""
    monkeypatch.setattr(sending, "ENDS_WITHIN_S", 0.1)
    async with engine_with_worker(temporal_address, sample(None)) as engine, engine:
        engine.has_receiver = lambda agent_name: True
        waits, misses, has_ended = 0, list[int](), anyio.Event()

        async def try_(webhook: Webhook, missed: int) -> tuple[Webhook, float]:
            nonlocal waits
            if webhook.type == "run.waiting" and waits < 8:
                waits += 1
                return replace(webhook, tries=webhook.tries + 1), 0.2
            if webhook.type == "run.cancelled":
                misses.append(missed)
                has_ended.set()
            return replace(webhook, status="sent", ended_at=now()), 0

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.webhooks.serve, try_)
            run = await engine.submit("ask", {})
            await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
            pause_s = await engine.webhooks._pause_after(run_workflow_id(run.run_id, 1), 5000)
            await engine.cancel_run(run.run_id)
            with anyio.fail_after(PATIENCE_S):
                await has_ended.wait()
            tasks.cancel_scope.cancel()
    assert misses == [0]
    assert pause_s == sending.MAX_END_PAUSE_S, "also after many attempts"


async def test_the_text_of_an_error_is_in_the_log_and_not_on_the_cluster(
    temporal_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(temporal_address, sample("http://nowhere.invalid/hook")) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks", lambda page: any(each["error"] for each in page["webhooks"]))
    assert page["webhooks"][0]["error"] == "ConnectError"
    assert re.search(r"The webhook run.completed of [0-9a-f-]{36}: ConnectError: .", caplog.text)


async def test_a_missing_secret_is_said_once_for_an_agent(
    temporal_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    flock = sample(None)
    async with engine_with_worker(temporal_address, flock) as engine:
        app = create_app(flock, engine=engine, auth="host")
        async with app.lifespan(), client_of(app) as client:
            flock.webhook_url = "https://hook.example"
            for _ in range(3):
                await post_run(client, "echo", {"text": "a"})
    assert caplog.text.count("No webhooks are sent") == 1


async def test_a_process_that_cannot_send_says_so(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    async with served(temporal_address, sample("https://hook.example")) as client:
        assert (await post_run(client, "echo", {"text": "a"})).json()["status"] == "completed"
    assert "This process sends no webhooks" in caplog.text


async def test_a_pending_webhook_is_sent_again_at_once_if_an_admin_asks(temporal_address: str) -> None:
    """It does not wait for the pause of its host."""
    inbox = Inbox(
        lambda number, _: Response(status_code=503, headers={"retry-after": "9999"}) if number == 1 else Response()
    )
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        has_pause = lambda page: any((each["first_try_at"] or "~") < each["next_try_at"] for each in page["webhooks"])  # noqa: E731
        (webhook,) = (await wait_until(client, "/webhooks", has_pause))["webhooks"]
        await post_run(client, "echo", {"text": "b"})
        of_both = lambda page: len(page["webhooks"]) == 2 and all(each["error"] for each in page["webhooks"])  # noqa: E731
        page = await wait_until(client, "/webhooks?status=pending", of_both)
        assert [each["tries"] for each in page["webhooks"]] == [0, 1], "the pause is that of the host"
        await client.post(f"/webhooks/{webhook['webhook_id']}/retry")
        await inbox.until(1)
        page = await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
        assert [each["webhook_id"] for each in page["webhooks"]] == [webhook["webhook_id"]]
        assert (await get(client, "/webhooks?status=given_up"))["webhooks"] == [], "it is listed once, as it is now"
    assert inbox.ids == [webhook["webhook_id"]]


async def test_webhooks_are_listed_in_pages(temporal_address: str) -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        for _ in range(2):
            await post_run(client, "ask", {"timeout_s": 0.1}, async_run=True)
        await inbox.until(6)
        await wait_until(client, "/webhooks?status=sent", lambda page: len(page["webhooks"]) == 6)
        path, seen = "/webhooks?limit=2", list[Any]()
        while path is not None:
            page = await get(client, path)
            path, seen = page["next"], [*seen, *page["webhooks"]]
    assert [each["type"] for each in seen] == ["run.failed", "question.expired", "run.waiting"] * 2
    assert sorted(each["webhook_id"] for each in seen) == sorted(inbox.ids)


@pytest.mark.parametrize("dead", [40, pytest.param(1000, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)])])
async def test_many_webhooks_to_a_dead_host_do_not_delay_those_to_another(
    dead: int, temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead one accepts connections, and never answers. It gets a limited number at the same time."""
    for name, seconds in (("MAX_BUSY_PAUSE_S", 60), ("MAX_MISS_PAUSE_S", 600), ("MAX_DOWN_PAUSE_S", 60)):
        monkeypatch.setattr(webhooks, name, seconds)  # those of a real receiver
    open_connections = most = 0

    async def hold(stream: anyio.abc.SocketStream) -> None:
        nonlocal open_connections, most
        open_connections += 1
        most = max(most, open_connections)
        async with stream:
            with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    await stream.receive()
        open_connections -= 1

    inbox = Inbox()
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        inbox.serve() as receiver,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, hold)
        flock = sample(f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}")

        @flock.agent(webhook_url=receiver.url)
        async def mine() -> int:
            return 1

        async with served(temporal_address, flock) as client:
            for _ in range(dead // 40):
                async with anyio.create_task_group() as posts:
                    for _ in range(40):
                        posts.start_soon(post_run, client, "echo", {"text": "a"})
            for count in range(1, 4):
                await post_run(client, "mine")
                await inbox.until(count)
            page = await wait_until(
                client,
                "/webhooks?status=pending&limit=100",
                lambda page: len(page.get("webhooks", [])) == min(dead, 100),
            )
        tasks.cancel_scope.cancel()
    assert 0 < most <= webhooks.CONCURRENCY
    assert {each["status"] for each in page["webhooks"]} == {"pending"}


async def test_a_receiver_that_is_removed_gets_nothing_more(
    temporal_address: str, caplog: pytest.LogCaptureFixture
) -> None:
    inbox = Inbox(lambda number, _: Response(status_code=500))
    async with inbox.serve() as receiver, served(temporal_address, flock := sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        await wait_until(client, "/webhooks", lambda page: any(each["tries"] for each in page["webhooks"]))
        flock.webhook_url = None
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
        assert len((await get(client, "/webhooks"))["webhooks"]) == 1, "later runs report nothing"
    (webhook,) = page["webhooks"]
    assert (webhook["error"], webhook["url"]) == ("Its agent has no webhook_url any more.", None)


async def test_a_run_that_was_deleted_is_reported_without_its_result(temporal_address: str) -> None:
    is_up = False
    inbox = Inbox(lambda number, _: Response(status_code=200 if is_up else 503))
    async with inbox.serve() as receiver, served(temporal_address, sample(receiver.url)) as client:
        gone = (await post_run(client, "echo", {"text": "a"})).json()["run_id"]
        long = (await post_run(client, "echo", {"text": "x" * 100_000})).json()["run_id"]
        await wait_until(client, "/webhooks", lambda page: len([1 for each in page["webhooks"] if each["tries"]]) == 2)
        assert (await client.delete(f"/run/{gone}")).status_code == 204
        is_up = True
        events = {event["data"]["run_id"]: event["data"] for event in await inbox.until(2)}
    head = {"run_id": gone, "agent_name": "echo", "status": "completed", "attempt": 1, "url": f"/run/{gone}"}
    assert events[gone] == head
    assert events[long]["result_url"] == f"/run/{long}"
    assert "result" not in events[long]


async def test_an_address_needs_a_secret(temporal_address: str) -> None:
    engine = TemporalEngine({}, temporal_address)
    with pytest.raises(DefinitionError, match="needs a secret"):
        create_app(sample("https://hook.example"), engine=engine, auth="host")


async def test_a_server_that_is_killed_during_a_try_is_followed_by_one_that_sends_the_same_id(
    temporal_address: str, tmp_path: Path
) -> None:
    """Its agents are executed by a worker, which has no secret."""
    target = tmp_path / "target.py"
    target.write_text(TARGET.replace('"kills"', f'"kills {new_id()}"'))
    killed = anyio.Event()

    async def respond(number: int, event: Any) -> Response:
        if number == 1:
            server.process.send_signal(signal.SIGKILL)
            killed.set()
        return Response()

    inbox = Inbox(respond)
    async with inbox.serve() as receiver:
        options = ["--port", "0", "--temporal", temporal_address, "--webhook-url", receiver.url]
        serve = flockapi_command("serve", str(target), *options)
        with (
            working(target, temporal_address),
            running(*serve, FLOCK_WEBHOOK_SECRETS=SECRET) as server,
        ):
            async with httpx.AsyncClient(base_url=server.url) as client:
                await post_run(client, "work", {"n": 2}, async_run=True)
                await killed.wait()
            with running(*serve, FLOCK_WEBHOOK_SECRETS=SECRET) as again, anyio.fail_after(PATIENCE_S):
                await inbox.until(2)
                async with httpx.AsyncClient(base_url=again.url) as client:
                    await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
    assert len(inbox.ids) == 2
    assert len(set(inbox.ids)) == 1
    assert re.fullmatch(r"msg_[0-9a-f-]{36}_1", inbox.ids[0])

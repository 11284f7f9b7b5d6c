"""Webhooks: what happened to runs and batches arrives at the receivers, signed, at least once, and in order."""

import contextlib
import json
import sqlite3
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from click.testing import CliRunner
from starlette.responses import Response

from flock.command import server
from flock.command.cli import main
from flock.command.server import ServerSettings
from flock.core import Flock, FlockFactory
from flock.errors import AgentError, DefinitionError, RunNotFound, StoreError, Unstorable
from flock.runs import RunContext, now
from flock.store import waiting
from flock.store.columns import DAMAGED_WEBHOOK
from flock.web import webhooks
from flock.web.auth import new_webhook_secret
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import sqlite_of
from tests.support.environments import new_environment, pip
from tests.support.http import client_of, get, post_run, wait_for, wait_until
from tests.support.receivers import SECRET, Inbox
from tests.webhooks_kills import play

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll and try again without the pauses that a real receiver needs."""
    monkeypatch.setattr(webhooks, "POLL_S", 0.01)
    monkeypatch.setattr(webhooks, "RECEIVERS_S", 0.05)
    monkeypatch.setattr(webhooks, "MAX_PAUSE_S", 0.02)
    monkeypatch.setattr(webhooks, "MAX_DOWN_PAUSE_S", 0.02)


def sample(url: str | None) -> Flock:
    flock = Flock(webhook_url=url)

    @flock.agent
    async def echo(text: str) -> str:
        if text == "fail":
            raise AgentError("it fails")
        return text

    @flock.agent
    async def ask(context: RunContext, timeout_s: float = 60) -> bool:
        return await context.ask("Go on?", bool, expires_s=timeout_s)

    return flock


@contextlib.asynccontextmanager
async def served(flock: Flock, store: str | Path = ":memory:", **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(flock, store=store, auth="host", webhook_secrets=[SECRET], **options)
    async with app.lifespan(), client_of(app) as client:
        yield client


async def copy_webhook(flock: Flock, count: int) -> None:
    """Add webhooks like the only one in the store, each of another run."""
    copy = """INSERT INTO webhooks (flock, type, record_id, agent_name, attempt, created_at, next_try_at)
        WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)
        SELECT flock, type, record_id || n, agent_name, attempt, created_at, created_at FROM webhooks, numbers"""
    store = sqlite_of(flock.shared_engine(store=":memory:"))
    await store.change(lambda db: db.execute(copy, (count,)) and None)


async def test_the_end_of_a_run_arrives() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(f"{receiver.url}/hook")) as client:
        client.headers["traceparent"] = TRACEPARENT
        run = (await post_run(client, "echo", {"text": "hi"})).json()
        (event,) = await inbox.until(1)
        assert (event["type"], event["version"]) == ("run.completed", 1)
        assert inbox.requests[0][2]["traceparent"] == TRACEPARENT
        assert event["data"]["result"] == {"result": "hi"}
        assert event["data"]["url"] == f"/run/{run['run_id']}"
        listed = await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["status"] == "sent")
    (webhook,) = listed["webhooks"]
    assert (webhook["record_id"], webhook["tries"], webhook["webhook_id"]) == (run["run_id"], 1, inbox.ids[0])


async def test_each_end_of_a_run_is_reported_once() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        failed = (await post_run(client, "echo", {"text": "fail"}, async_run=True)).json()["run_id"]
        await inbox.until(1)
        waiting = (await post_run(client, "ask", async_run=True)).json()["run_id"]
        await inbox.until(2)
        await client.post(f"/run/{waiting}/cancel")
        await inbox.until(3)
        await client.post(f"/run/{failed}/retry")
        await inbox.until(4)
    assert inbox.types == ["run.failed", "run.waiting", "run.cancelled", "run.failed"]
    first, asked, _, again = (event["data"] for event in inbox.accepted)
    assert (first["error"], first["error_type"], first["attempt"]) == ("it fails", "agent_error", 1)
    assert asked["waiting_for"][0]["question"] == "Go on?"
    assert (again["run_id"], again["attempt"]) == (failed, 2)


async def test_a_question_that_expires_is_reported_before_the_end_of_its_run() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "ask", {"timeout_s": 2}, async_run=True)  # its first webhook is made while it waits
        events = await inbox.until(3)
    assert inbox.types == ["run.waiting", "question.expired", "run.failed"]
    assert events[1]["data"]["call_id"] == events[0]["data"]["waiting_for"][0]["call_id"]


async def test_a_batch_is_reported_and_its_items_are_not() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        for texts in (["a", "b", "fail"], ["fail"]):
            inputs = [{"text": text} for text in texts]
            headers = {"traceparent": TRACEPARENT} if len(texts) > 1 else {}
            await client.post("/run/batch", json={"agent_name": "echo", "batch_inputs": inputs}, headers=headers)
            await inbox.until(len(inbox.accepted) + 1)
    assert inbox.types == ["batch.completed", "batch.failed"]
    assert [headers.get("traceparent") for *_, headers in inbox.requests] == [TRACEPARENT, None]
    assert (
        inbox.accepted[0]["data"] | {"total_items": 3, "failed_items": 1, "status": "completed"}
        == (inbox.accepted[0]["data"])
    )


async def test_a_batch_that_is_cancelled_is_reported() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        body = {"agent_name": "ask", "batch_inputs": [{}]}
        batch_id = (await client.post("/run/batch", json=body)).json()["batch_id"]
        await client.post(f"/batch/{batch_id}/cancel")
        (event,) = await inbox.until(1)
    assert (event["type"], event["data"]["batch_id"], event["data"]["status"]) == (
        "batch.cancelled",
        batch_id,
        "cancelled",
    )


async def test_no_request_names_a_receiver() -> None:
    """Wherever a client may write: nothing is sent to its address."""
    inbox, other = Inbox(), Inbox()
    async with inbox.serve() as receiver, other.serve() as target:
        mine = {"webhook_url": target.url, "url": target.url}
        wanted = {"taskPushNotificationConfig": mine}
        said = {"messageId": "m", "role": "ROLE_USER", "parts": [{"text": "hi"}], "metadata": mine}
        rpc = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage"}
        chat = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "metadata": mine, **mine}
        run = {"agent_name": "echo", "inputs": {"text": "hi"}}
        batch = {"agent_name": "echo", "batch_inputs": [{"text": "hi"}]}
        async with served(sample(receiver.url), protocols=["openai", "a2a"]) as client:
            sent = [
                await client.post(path, json=body, headers={"A2A-Version": "1.0"})
                for path, body in (
                    ("/run/flock", run | mine),
                    ("/run/flock", run | {"inputs": {"text": "hi", **mine}}),
                    (f"/run/flock?webhook_url={target.url}", run),
                    ("/run/batch", batch | mine),
                    ("/run/batch", batch | {"static_inputs": mine}),
                    (f"/run/batch?webhook_url={target.url}", batch),
                    ("/v1/chat/completions", chat),
                    ("/v1/responses", {"model": "echo", "input": "hi", "metadata": mine, **mine}),
                    ("/a2a/echo", rpc | {"params": {"message": said, "configuration": wanted}}),
                    ("/a2a/echo", rpc | {"params": {"message": said, "metadata": mine}}),
                )
            ]
            assert [each.status_code for each in sent] == [422] * 6 + [200] * 4
            assert "sends no push notifications" in sent[8].text
            await inbox.until(3)  # of the other three of the last ones
            urls = {each["url"] for each in (await get(client, "/webhooks"))["webhooks"]}
    assert (urls, other.requests) == ({receiver.url}, [])


async def test_a_run_that_goes_on_at_once_is_not_reported_as_waiting() -> None:
    """A sleep asks nobody. A message that was there before is received in the transaction in which the run waits."""
    flock = Flock()

    @flock.agent
    async def sleepy(context: RunContext) -> str:
        await context.sleep(0.05)
        return await context.receive("word", str)

    inbox = Inbox()
    async with inbox.serve() as receiver:
        flock.webhook_url = receiver.url
        async with served(flock) as client:
            run_id = (await post_run(client, "sleepy", async_run=True)).json()["run_id"]
            await client.post(f"/run/{run_id}/messages/word", json={"message": "now"})
            await inbox.until(1)
    assert inbox.types == ["run.completed"]


async def test_a_message_that_has_just_come_takes_back_no_earlier_report(monkeypatch: pytest.MonkeyPatch) -> None:
    find, late = waiting._find_answer, [True]

    def find_late(db: sqlite3.Connection, run: Any, wait: Any, at: Any) -> Any:
        """It comes after the run has looked for it, and before the run waits."""
        return None if wait.kind == "message" and late and late.pop() else find(db, run, wait, at)

    monkeypatch.setattr(waiting, "_find_answer", find_late)
    flock = Flock(webhook_url="http://127.0.0.1:9")

    @flock.agent
    async def asks(context: RunContext) -> str:
        await context.ask("Go on?", bool)
        return await context.receive("word", str)

    async with served(flock) as client:
        run_id = (await post_run(client, "asks", async_run=True)).json()["run_id"]
        asked = await wait_until(client, f"/run/{run_id}", lambda body: body["status"] == "waiting")
        await client.post(f"/run/{run_id}/messages/word", json={"message": "now"})
        await client.post(f"/run/{run_id}/calls/{asked['waiting_for'][0]['call_id']}", json={"output": True})
        await wait_for(client, f"/run/{run_id}")
        listed = (await get(client, "/webhooks"))["webhooks"]
    assert [webhook["type"] for webhook in listed] == ["run.completed", "run.waiting"]


async def test_an_agent_has_a_receiver_of_its_own() -> None:
    inbox, other = Inbox(), Inbox()
    async with inbox.serve() as receiver, other.serve() as of_agent:
        flock = sample(receiver.url)

        @flock.agent(webhook_url=of_agent.url)
        async def mine() -> int:
            return 1

        async with served(flock) as client:
            await post_run(client, "mine")
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(1)
            await other.until(1)
    assert [each.accepted[0]["data"]["agent_name"] for each in (inbox, other)] == ["echo", "mine"]


# Receivers that fail


async def test_a_webhook_is_sent_until_it_is_accepted_and_keeps_its_id() -> None:
    inbox = Inbox(lambda number, _: Response(status_code=200 if number == 4 else 500))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(1)
        await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["status"] == "sent")
        assert (await get(client, "/webhooks"))["webhooks"][0]["tries"] == 4
    assert len({webhook_id for webhook_id, *_ in inbox.requests}) == 1


async def test_the_events_of_a_run_keep_their_order() -> None:
    """The next event of a run waits until the last one is accepted, and those of other runs do not."""

    def respond(number: int, event: Any) -> Response:
        is_late = event["type"] == "run.waiting" and not inbox.accepted
        return Response(status_code=503 if is_late else 200)

    inbox = Inbox(respond)
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        run = (await post_run(client, "ask", async_run=True)).json()["run_id"]
        waiting = await wait_until(client, f"/run/{run}", lambda body: body["status"] == "waiting")
        call = waiting["waiting_for"][0]["call_id"]
        await client.post(f"/run/{run}/calls/{call}", json={"output": True})
        await wait_for(client, f"/run/{run}")
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(3)
    echoed, asked, completed = inbox.accepted
    assert echoed["data"]["agent_name"] == "echo"
    assert [event["data"]["run_id"] for event in (asked, completed)] == [run, run]
    assert (asked["type"], completed["type"]) == ("run.waiting", "run.completed")
    assert asked["data"]["status"] == "waiting"


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404])
async def test_no_redirect_is_followed_and_no_error_is_accepted(status: int) -> None:
    other = Inbox()
    async with other.serve() as target:
        headers = {"location": f"{target.url}/elsewhere"}
        inbox = Inbox(lambda number, _: Response(status_code=status if number < 3 else 200, headers=headers))
        async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(1)
    assert (len(inbox.requests), other.requests) == (3, [])


async def test_a_receiver_that_is_gone_gets_a_webhook_once() -> None:
    inbox = Inbox(lambda number, _: Response(status_code=410))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
    assert page["webhooks"][0]["error"] == "It answered with status 410."
    assert len(inbox.requests) == 1


async def test_a_webhook_is_given_up_visibly_and_can_be_sent_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhooks, "RETRIED_FOR", timedelta(seconds=0.1))
    is_down = True
    inbox = Inbox(lambda number, _: Response(status_code=503 if is_down else 200))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
        (webhook,) = page["webhooks"]
        assert webhook["error"] == "It answered with status 503."
        assert webhook["tries"] > 1
        is_down = False
        sent = await client.post(f"/webhooks/{webhook['webhook_id']}/retry")
        assert (sent.status_code, sent.json()["status"], sent.json()["tries"]) == (202, "pending", 0)
        await inbox.until(1)
        missing = await client.post("/webhooks/msg_0/retry")
    assert (missing.status_code, inbox.ids) == (404, [webhook["webhook_id"]])


def next_try_of(page: Any) -> datetime:
    (webhook,) = page["webhooks"]
    return datetime.fromisoformat(webhook["next_try_at"])


async def test_pauses_double_up_to_an_hour_and_a_day_after_the_first_try_a_webhook_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock stands still, and jumps to the next try."""
    monkeypatch.setattr(webhooks, "MAX_PAUSE_S", 3600.0)
    clock, pauses = now() + timedelta(minutes=1), list[float]()
    monkeypatch.setattr(webhooks, "now", lambda: clock)
    inbox = Inbox(lambda number, _: Response(status_code=503))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        while True:
            page = await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] > len(pauses))
            (webhook,) = page["webhooks"]
            if webhook["status"] != "pending":
                break
            pauses.append((next_try_of(page) - clock).total_seconds())
            assert webhook["tries"] == len(inbox.requests) == len(pauses)
            clock = next_try_of(page)
    parts = [pause / min(2**number, 3600) for number, pause in enumerate(pauses, 1)]
    assert 0.5 <= min(parts) < max(parts) <= 1
    assert len(set(parts)) > len(parts) / 2, "the pauses are random"
    taken = datetime.fromisoformat(webhook["ended_at"]) - datetime.fromisoformat(webhook["first_try_at"])
    assert webhook["status"] == "given_up"
    assert timedelta(days=1) <= taken < timedelta(days=1, hours=1)


@pytest.mark.parametrize(("asked", "pause_s"), [("7200", 7200), ("99999999", 24 * 3600), ("-5", None), ("soon", None)])
async def test_retry_after_may_ask_for_up_to_a_day(
    asked: str, pause_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = now() + timedelta(minutes=1)
    monkeypatch.setattr(webhooks, "now", lambda: clock)
    inbox = Inbox(lambda number, _: Response(status_code=503, headers={"retry-after": asked}))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] == 1)
    left_s = (next_try_of(page) - clock).total_seconds()
    assert left_s == pause_s if pause_s else 0 < left_s <= webhooks.MAX_PAUSE_S


async def test_retry_after_is_honoured() -> None:
    """It holds up all requests to the host."""
    inbox = Inbox(
        lambda number, _: Response(status_code=429, headers={"retry-after": "1"}) if number == 1 else Response()
    )
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] == 1)
        await post_run(client, "echo", {"text": "b"})
        await inbox.until(2)
    assert inbox.requests[1][1] - inbox.requests[0][1] > 0.95


async def test_a_thousand_webhooks_to_a_dead_host_do_not_delay_those_to_another() -> None:
    """The dead one accepts connections, and never answers."""
    inbox = Inbox()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, inbox.serve() as receiver:
        flock = sample(f"http://127.0.0.1:{port}")

        @flock.agent(webhook_url=receiver.url)
        async def mine() -> int:
            return 1

        async with served(flock) as client:
            await post_run(client, "echo", {"text": "a"})
            await copy_webhook(flock, 999)
            for count in range(1, 6):
                before = anyio.current_time()
                await post_run(client, "mine")
                await inbox.until(count)
                assert anyio.current_time() - before < webhooks.TIMEOUT_S, "the dead one takes that"
            pending = await get(client, "/webhooks", status="pending", limit=1000)
    assert len(pending["webhooks"]) == 1000


async def test_a_host_that_is_down_gets_one_request_at_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All that wait for it count as tried, so all are given up a day later, and none is forgotten."""
    monkeypatch.setattr(webhooks, "RETRIED_FOR", timedelta(seconds=1.5))
    tries: list[int] = []

    async def respond(number: int, _: Any) -> Response:
        open_requests.append(number)
        await anyio.sleep(0.01)
        tries.append(len(open_requests))
        open_requests.remove(number)
        return Response(status_code=503)

    open_requests: list[int] = []
    inbox = Inbox(respond)
    async with inbox.serve() as receiver, served(flock := sample(receiver.url), metrics=True) as client:
        await post_run(client, "echo", {"text": "a"})
        await copy_webhook(flock, 199)
        path = "/webhooks?status=given_up&limit=1000"
        page = await wait_until(client, path, lambda page: len(page["webhooks"]) == 200)
        assert 'flock_webhooks_total{status="given_up"} 200.0' in (await client.get("/metrics")).text
    assert "Webhooks were given up: " in caplog.text
    assert max(tries[webhooks.CONCURRENCY :], default=1) == 1
    assert any(webhook["tries"] == 0 for webhook in page["webhooks"])
    assert {webhook["error"] for webhook in page["webhooks"]} == {"It answered with status 503."}


@pytest.mark.parametrize("kind", ["never", "slowly", "200 MB"])
async def test_a_receiver_can_neither_hold_nor_fill_the_sender(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status counts if it has arrived, whatever comes after it."""
    # Only the limit of bytes ends the long one.
    monkeypatch.setattr(webhooks, "TIMEOUT_S", {"never": 0.3, "slowly": 3.0}.get(kind, PATIENCE_S))
    sent = 0

    async def answer(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        async with stream:
            with contextlib.suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream):
                await stream.receive()
                if kind != "never":
                    await stream.send(b"HTTP/1.1 200 OK\r\ncontent-length: 200000000\r\n\r\n")
                while kind != "never":
                    await stream.send(b"x" * (1 if kind == "slowly" else 65536))
                    sent += 1 if kind == "slowly" else 65536
                    await anyio.sleep(0.01 if kind == "slowly" else 0)
                await anyio.sleep(PATIENCE_S)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, answer)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with served(sample(f"http://127.0.0.1:{port}")) as client:
            await post_run(client, "echo", {"text": "a"})
            page = await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] > 0)
        tasks.cancel_scope.cancel()
    (webhook,) = page["webhooks"]
    assert webhook["status"] == ("pending" if kind == "never" else "sent")
    assert webhook["error"] == ("It did not answer within 0.3 s." if kind == "never" else None)
    assert sent < 20_000_000


#: What a receiver sends, the second part again and again.
HOSTILE = {
    "endless headers": (b"HTTP/1.1 200 OK\r\n", b"x-flood: " + b"y" * 1000 + b"\r\n"),
    "slow headers": (b"HTTP/1.1 200 OK\r\n", b"x"),
    "endless early hints": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "not HTTP": (b"\x00\xff" * 100, b""),
    "a status of four digits": (b"HTTP/1.1 2000 OK\r\n\r\n", b""),
    "nothing": (b"", b""),
    "a length that is no number": (b"HTTP/1.1 500 No\r\ncontent-length: -1\r\n\r\n", b""),
    "an error with any pause": (b"HTTP/1.1 500 No\r\nretry-after: -1\r\ncontent-length: 0\r\n\r\n", b""),
    "an error with a pause in words": (b"HTTP/1.1 500 No\r\nretry-after: soon\r\ncontent-length: 0\r\n\r\n", b""),
    "a redirect to a file": (b"HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n", b""),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_receiver_fails_and_is_tried_again(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And delays no other. In the end it gets what it did not accept."""
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 0.3)
    first, rest = HOSTILE[kind]
    is_hostile, inbox = True, Inbox()

    async def answer(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            with contextlib.suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                if not is_hostile:
                    await stream.send(b"HTTP/1.1 204 No Content\r\n\r\n")
                elif first:
                    await stream.send(first)
                while is_hostile and rest:
                    await stream.send(rest)
                    await anyio.sleep(0.01 if len(rest) == 1 else 0)

    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        inbox.serve() as receiver,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(listener.serve, answer)
        flock = sample(f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}")
        flock.agents["ask"].webhook_url = receiver.url
        async with served(flock) as client:
            await post_run(client, "echo", {"text": "a"})
            await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] > 1)
            await post_run(client, "ask", async_run=True)
            with anyio.fail_after(PATIENCE_S):
                await inbox.until(1)
            is_hostile = False
            page = await wait_until(client, "/webhooks?status=sent", lambda page: len(page["webhooks"]) == 2)
        tasks.cancel_scope.cancel()
    assert {webhook["error"] for webhook in page["webhooks"]} == {None}


async def test_an_address_that_cannot_be_reached_at_all_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises OverflowError for such a port, in a group."""
    monkeypatch.setattr(webhooks, "RETRIED_FOR", timedelta(seconds=0.1))
    flock = sample("http://127.0.0.1:9")
    flock.webhook_url = "http://127.0.0.1:99999"
    async with served(flock) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
    assert "ExceptionGroup" in page["webhooks"][0]["error"]


async def test_receivers_that_never_answer_leave_connections_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of seven hosts holds 16 requests, more than a client has connections by default."""
    monkeypatch.setattr(webhooks, "TIMEOUT_S", 2 * PATIENCE_S)  # none of them ends meanwhile

    async def silent_agent() -> None: ...

    inbox, flock = Inbox(), sample(None)
    async with contextlib.AsyncExitStack() as stack:
        receiver = await stack.enter_async_context(inbox.serve())
        for number in range(7):
            silent = await stack.enter_async_context(await anyio.create_tcp_listener(local_host="127.0.0.1"))
            port = silent.extra(anyio.abc.SocketAttribute.local_port)
            flock.agent(name=f"silent{number}", webhook_url=f"http://127.0.0.1:{port}")(silent_agent)
        flock.agents["echo"].webhook_url = receiver.url
        client = await stack.enter_async_context(served(flock))
        add = """INSERT INTO webhooks (flock, type, record_id, agent_name, attempt, created_at, next_try_at)
            WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 16)
            SELECT flock, 'run.completed', agent_name || n, agent_name, 1, 0, 0 FROM webhook_urls, numbers
            WHERE agent_name LIKE 'silent%'"""
        await sqlite_of(flock.shared_engine(store=":memory:")).change(lambda db: db.execute(add) and None)
        await anyio.sleep(0.3)  # as long as rounds of requests need to begin
        await post_run(client, "echo", {"text": "a"})
        with anyio.fail_after(PATIENCE_S):
            await inbox.until(1)


async def test_no_cookie_is_kept() -> None:
    """A receiver could fill the memory with them, and hosts with the same domain would see those of each other."""
    inbox = Inbox(lambda number, _: Response(headers={"set-cookie": f"a{number}=b"}))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        for count in (1, 2):
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(count)
    assert "cookie" not in inbox.requests[1][2]


async def test_what_an_admin_asks_for_during_a_try_is_not_undone_by_its_result() -> None:
    async def respond(number: int, _: Any) -> Response:
        if number == 2:
            await clients[0].post(f"/webhooks/{inbox.requests[0][0]}/retry")
        return Response(status_code={1: 500, 2: 410}.get(number, 200))

    inbox, clients = Inbox(respond), list[httpx.AsyncClient]()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        clients.append(client)
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(1)


async def test_a_retry_by_an_admin_does_not_wait_for_a_host_that_was_down() -> None:
    inbox = Inbox(
        lambda number, _: Response(status_code=503, headers={"retry-after": "9999"}) if number == 1 else Response()
    )
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        page = await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] == 1)
        await client.post(f"/webhooks/{page['webhooks'][0]['webhook_id']}/retry")
        await inbox.until(1)


@pytest.mark.parametrize("method", ["result_bytes", "due"])
async def test_an_error_of_the_sender_ends_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as that of a run which is deleted between two reads."""
    inbox = Inbox()
    async with inbox.serve() as receiver, served(flock := sample(receiver.url)) as client:
        store = sqlite_of(flock.shared_engine(store=":memory:"))
        place = store.webhooks if method == "due" else store

        work = getattr(place, method)

        async def fail(*args: object) -> None:
            monkeypatch.setattr(place, method, work)
            raise RunNotFound("it was deleted") if method == "result_bytes" else ValueError("unexpected")

        monkeypatch.setattr(place, method, fail)
        await post_run(client, "echo", {"text": "a"})
        (event,) = await inbox.until(1)
    assert ("result" in event["data"]) == (method == "due")
    assert ("Webhooks cannot be sent." in caplog.text) == (method == "due")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("created_at = 'yesterday'", id="a text as a time"),
        pytest.param("next_try_at = 'tomorrow'", id="a text as the time of the next try"),
        pytest.param("next_try_at = 1e300", id="a number as the time of the next try"),
        pytest.param("first_try_at = 9e18", id="a time after all times"),
        pytest.param("type = CAST(x'ff' AS TEXT)", id="invalid UTF-8"),
        pytest.param("tries = x'00'", id="bytes as a number"),
        pytest.param("attempt = 'one'", id="a text as a number"),
    ],
)
async def test_a_damaged_row_is_given_up_visibly_and_holds_up_no_other(
    damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither those of its host, nor the next one of its run."""
    inbox = Inbox()
    async with inbox.serve() as receiver, served(flock := sample(receiver.url)) as client:
        store = sqlite_of(flock.shared_engine(store=":memory:"))
        with monkeypatch.context() as meanwhile:

            async def wait(*_: Any) -> bool:
                return False

            meanwhile.setattr(store.webhooks, "claim", wait)  # nothing is sent before the damage
            failed = (await post_run(client, "echo", {"text": "fail"})).json()["run_id"]
            damaged = (await get(client, "/webhooks"))["webhooks"][0]["webhook_id"]
            await store.change(lambda db: db.execute(f"UPDATE webhooks SET {damage}") and None)
        await client.post(f"/run/{failed}/retry")
        await post_run(client, "echo", {"text": "b"})
        await inbox.until(2)
        page = await wait_until(client, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))
        assert len((await get(client, "/webhooks"))["webhooks"]) == 3
    (webhook,) = page["webhooks"]
    assert (webhook["webhook_id"], webhook["error"]) == (damaged, DAMAGED_WEBHOOK)
    assert sorted(event["data"]["attempt"] for event in inbox.accepted) == [1, 2]
    assert f"was given up: {DAMAGED_WEBHOOK}" in caplog.text


async def test_a_clock_that_was_ahead_delays_nothing() -> None:
    """By a year, when a webhook was tried."""
    inbox = Inbox(lambda number, _: Response(status_code=500 if number == 1 else 200))
    async with inbox.serve() as receiver, served(flock := sample(receiver.url)) as client:
        ahead = """CREATE TRIGGER ahead AFTER UPDATE OF tries ON webhooks WHEN new.tries = 1 BEGIN UPDATE webhooks SET
            next_try_at = next_try_at + 31536000000000, first_try_at = first_try_at + 31536000000000; END"""
        await sqlite_of(flock.shared_engine(store=":memory:")).change(lambda db: db.execute(ahead) and None)
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(1)
        page = await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
    assert page["webhooks"][0]["first_try_at"] <= page["webhooks"][0]["ended_at"]


# What is sent


async def test_a_long_result_is_a_link() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        run = (await post_run(client, "echo", {"text": "x" * 100_000})).json()
        (event,) = await inbox.until(1)
    assert event["data"]["result_url"] == f"/run/{run['run_id']}"
    assert "result" not in event["data"]


async def test_long_questions_are_left_out() -> None:
    inbox, flock = Inbox(), sample(None)

    @flock.agent
    async def asks_much(context: RunContext) -> bool:
        return await context.ask("?" * 100_000, bool)

    async with inbox.serve() as receiver:
        flock.webhook_url = receiver.url
        async with served(flock) as client:
            await post_run(client, "asks_much", async_run=True)
            (event,) = await inbox.until(1)
    assert event["type"] == "run.waiting"
    assert "waiting_for" not in event["data"]
    assert len(inbox.body) < 2000


async def test_a_run_that_has_changed_or_gone_since_is_reported_without_what_it_is_now() -> None:
    is_up = False
    inbox = Inbox(lambda number, _: Response(status_code=200 if is_up else 503))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        gone = (await post_run(client, "echo", {"text": "a"})).json()["run_id"]
        again = (await post_run(client, "echo", {"text": "fail"})).json()["run_id"]
        await client.delete(f"/run/{gone}")
        await client.post(f"/run/{again}/retry")
        await wait_for(client, f"/run/{again}")
        made = len(inbox.requests) + 1  # and perhaps one that is on its way
        with anyio.fail_after(PATIENCE_S):
            while len(inbox.requests) <= made:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        is_up = True
        events = await inbox.until(3)
    first, second, third = sorted(events, key=lambda event: (event["data"]["attempt"], event["data"]["status"]))
    url = f"/run/{gone}"
    head = {"run_id": gone, "agent_name": "echo", "status": "completed", "attempt": 1, "url": url}
    assert first["data"] == head
    assert ("error" in second["data"], third["data"]["error"]) == (False, "it fails")


async def test_while_a_secret_is_replaced_both_sign() -> None:
    new = new_webhook_secret()
    inbox = Inbox()
    async with inbox.serve() as receiver:
        app = create_app(sample(receiver.url), store=":memory:", auth="host", webhook_secrets=[new, SECRET])
        async with app.lifespan(), client_of(app) as client:
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(1)
    assert len(inbox.requests[0][2]["webhook-signature"].split(" ")) == 2


async def test_a_secret_that_was_replaced_while_a_webhook_waited_signs_it_no_more() -> None:
    inbox, new = Inbox(lambda number, _: Response(status_code=500)), new_webhook_secret()
    async with inbox.serve() as receiver:
        async with served(sample(receiver.url), "flock.db") as client:
            await post_run(client, "echo", {"text": "a"})
            await wait_until(client, "/webhooks", lambda page: page["webhooks"][0]["tries"] > 0)
        old = len(inbox.requests)
        app = create_app(sample(receiver.url), store="flock.db", auth="host", webhook_secrets=[new])
        async with app.lifespan(), client_of(app) as client:
            await wait_until(client, "/webhooks", lambda page: inbox.unsigned > 0)
    assert old == len(inbox.requests), "none of the new secret is signed with the old one"


async def test_while_the_store_is_full_nothing_is_sent_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be noted is sent once more when there is room."""
    inbox = Inbox()
    async with inbox.serve() as receiver, served(flock := sample(receiver.url), "flock.db") as client:
        store = sqlite_of(flock.shared_engine(store="flock.db"))
        with monkeypatch.context() as meanwhile:

            async def full(*_: Any) -> None:
                meanwhile.setattr(type(store), "is_writable", False)
                raise StoreError("The disk is full.")

            meanwhile.setattr(store.webhooks, "write", full)
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(1)
            await anyio.sleep(0.5)
            assert len(inbox.requests) == 1
        await inbox.until(2)
        page = await wait_until(client, "/webhooks?status=sent", lambda page: bool(page["webhooks"]))
    assert (len(set(inbox.ids)), page["webhooks"][0]["tries"]) == (1, 1)


# Several processes, and restarts


async def test_what_was_not_sent_is_sent_by_the_next_process() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver:
        app = create_app(sample(receiver.url), store="flock.db", auth="host", webhook_secrets=[SECRET])
        assert app.webhooks is not None
        app.webhooks.keys = []
        async with app.lifespan(), client_of(app) as client:
            await post_run(client, "echo", {"text": "a"})
        async with served(sample(receiver.url), "flock.db"):
            await inbox.until(1)
    assert inbox.types == ["run.completed"]


async def test_of_several_engines_on_a_store_one_sends_until_it_ends() -> None:
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url), "flock.db") as client:
        async with served(sample(receiver.url), "flock.db") as other:
            for count in range(1, 11):
                await post_run(other if count % 2 else client, "echo", {"text": "a"})
            await inbox.until(10)
            await wait_until(client, "/webhooks?status=pending", lambda page: not page["webhooks"])
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(11)
        await wait_until(client, "/webhooks?status=pending", lambda page: not page["webhooks"])
    async with inbox.serve() as receiver, served(sample(receiver.url), "flock.db") as client:
        await post_run(client, "echo", {"text": "a"})
        await inbox.until(12)
    assert len(set(inbox.ids)) == len(inbox.requests) == 12


async def test_nothing_is_reported_of_a_state_that_is_rolled_back() -> None:
    inbox, fails = Inbox(), True
    async with inbox.serve() as receiver, served(flock := sample(receiver.url), "flock.db") as client:
        store = sqlite_of(flock.shared_engine(store="flock.db"))
        write = store._file.check_in_place

        def lost() -> None:
            nonlocal fails
            if fails:
                fails = False
                raise OSError("the file was replaced")
            write()

        def fail(db: Any) -> None:
            db.execute("UPDATE runs SET status = 'failed'")
            assert db.execute("SELECT count(*) FROM webhooks WHERE type = 'run.failed'").fetchone() == (1,)
            raise sqlite3.IntegrityError

        await post_run(client, "echo", {"text": "a"})
        await inbox.until(1)
        with contextlib.suppress(Unstorable):
            await store.change(fail)
        store._file.check_in_place = lost  # type: ignore[method-assign]
        await post_run(client, "echo", {"text": "b"})
        await inbox.until(2)
        page = await get(client, "/webhooks")
    assert [webhook["type"] for webhook in page["webhooks"]] == ["run.completed"] * 2, "also if a commit is repeated"


async def test_a_receiver_that_is_removed_gets_nothing_more() -> None:
    async with served(sample("http://127.0.0.1:9"), "flock.db") as client:
        await post_run(client, "echo", {"text": "a"})
    async with served(sample(None), "flock.db") as client:
        await post_run(client, "echo", {"text": "a"})
        (webhook,) = (await get(client, "/webhooks"))["webhooks"]
        assert (webhook["status"], webhook["url"]) == ("given_up", None)
        assert webhook["error"] == "Its agent has no webhook_url any more."


async def test_of_several_processes_the_one_that_started_last_says_who_receives() -> None:
    first, second = Inbox(), Inbox()
    async with first.serve() as older, second.serve() as newer, served(sample(older.url), "flock.db") as client:
        async with served(sample(newer.url), "flock.db"):
            for count in (1, 2, 3):
                await post_run(client, "echo", {"text": "a"})
                await second.until(count)
                await anyio.sleep(2 * webhooks.RECEIVERS_S)
        await wait_until(
            client, "/webhooks", lambda page: {each["url"] for each in page["webhooks"]} == {f"{older.url}"}
        )
        await post_run(client, "echo", {"text": "a"})
        await first.until(1)


async def test_a_process_without_a_receiver_takes_away_none_of_a_process_that_is_alive() -> None:
    inbox = Inbox(lambda number, _: Response(status_code=500))
    async with contextlib.AsyncExitStack() as stack, inbox.serve() as receiver:
        client = await stack.enter_async_context(served(sample(receiver.url), "flock.db"))
        await post_run(client, "echo", {"text": "a"})
        async with served(sample(None), "flock.db") as other:
            await anyio.sleep(3 * webhooks.RECEIVERS_S)
            assert [each["status"] for each in (await get(other, "/webhooks"))["webhooks"]] == ["pending"]
            await stack.aclose()
            await wait_until(other, "/webhooks?status=given_up", lambda page: bool(page["webhooks"]))


async def test_one_transaction_gives_up_a_limited_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """All writes of a store wait for it."""
    monkeypatch.setattr("flock.store.webhooks.CHUNK_SIZE", 10)
    sizes: list[int] = []
    async with served(flock := sample("http://127.0.0.1:9")) as client:
        await post_run(client, "echo", {"text": "a"})
        await copy_webhook(flock, 49)
        store = sqlite_of(flock.shared_engine(store=":memory:"))
        change = store.change

        async def measured(apply: Any, *args: Any) -> Any:
            def count(db: sqlite3.Connection) -> Any:
                before = db.total_changes
                found = apply(db)
                sizes.append(db.total_changes - before)
                return found

            return await change(count, *args)

        monkeypatch.setattr(store, "change", measured)
        none = "/webhooks?status=pending&limit=100"
        await wait_until(client, none, lambda page: all(each["first_try_at"] for each in page["webhooks"]))
        flock.webhook_url = None
        await wait_until(client, none, lambda page: not page["webhooks"])
    assert 10 <= max(sizes) <= 12


async def test_a_store_without_receivers_has_no_triggers() -> None:
    """They would make the end of each run slower."""
    async with served(flock := sample(None)):
        store = sqlite_of(flock.shared_engine(store=":memory:"))
        triggers = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND name LIKE 'webhooks%'"
        assert store.read(lambda db: db.execute(triggers).fetchall()) == []


async def test_an_engine_without_an_app_keeps_the_receivers() -> None:
    """Such as that of a script on the store of a server: the server reports its runs."""
    inbox = Inbox()
    async with inbox.serve() as receiver, served(sample(receiver.url), "flock.db"):
        async with sample(None).engine(store="flock.db") as engine:
            await engine.wait((await engine.submit("echo", {"text": "a"}, is_async=False)).run_id)
        await inbox.until(1)


async def test_old_webhooks_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "KEEP_FOR", timedelta(seconds=0.05))
    inbox = Inbox(lambda number, _: Response(status_code=410 if number == 1 else 200))
    async with inbox.serve() as receiver, served(sample(receiver.url)) as client:
        await post_run(client, "echo", {"text": "a"})
        await post_run(client, "echo", {"text": "b"})
        await inbox.until(1)
        await wait_until(client, "/webhooks", lambda page: not page["webhooks"])


# Access and options


async def test_only_an_admin_sees_webhooks() -> None:
    keys = {"ops:admin": "k" * 20, "bob": "b" * 20}
    app = create_app(
        sample("http://127.0.0.1:9"), store=":memory:", api_keys=keys, webhook_secrets=[SECRET], metrics=True
    )
    async with app.lifespan(), client_of(app) as client:
        for path, method in (("/webhooks", "GET"), ("/webhooks/msg_0/retry", "POST")):
            for key, status in ((None, 401), ("b" * 20, 403), ("k" * 20, 200 if method == "GET" else 404)):
                headers = {} if key is None else {"x-api-key": key}
                assert (await client.request(method, path, headers=headers)).status_code == status


async def test_webhooks_are_listed_in_pages_and_counted() -> None:
    inbox = Inbox()
    app = create_app(sample(None), store=":memory:", auth="host", webhook_secrets=[SECRET], metrics=True)
    async with inbox.serve() as receiver:
        app.flock.webhook_url = receiver.url
        async with app.lifespan(), client_of(app) as client:
            for _ in range(5):
                await post_run(client, "echo", {"text": "a"})
            await inbox.until(5)
            await wait_until(client, "/webhooks?status=pending", lambda page: not page["webhooks"])
            path, seen = "/webhooks?limit=2", list[str]()
            while path is not None:
                page = await get(client, path)
                path = page["next"]
                seen += [webhook["webhook_id"] for webhook in page["webhooks"]]
            assert 'flock_webhooks_total{status="sent"} 5.0' in (await client.get("/metrics")).text
            assert (await client.get("/webhooks?status=lost")).status_code == 422
    assert sorted(seen) == sorted(inbox.ids)


@pytest.mark.parametrize(
    "url",
    [
        "/hook",
        "hook.example",
        "ftp://hook.example",
        "https://",
        "https://a:b@hook.example",
        "https://x y",
        "https://[abc",
        "https://:443",
        "https://hook.example:99999",
        "https://hook.example:0",
        "https://hook.example:port",
        "https://xn--a",
        "https://999.1.1.1",
        7,
    ],
)
def test_an_invalid_address_is_refused(url: Any) -> None:
    """The error does not have it, since it may have a secret."""
    makes: list[Any] = [Flock, lambda webhook_url: FlockFactory.create_default_agent("a", webhook_url=webhook_url)]
    for make in makes:
        with pytest.raises(DefinitionError, match=r"webhook_url= must be an address that begins with https://") as exc:
            make(webhook_url=url)
        assert str(url) not in str(exc.value).split("must be")[0] + str(exc.value).split("not ")[-1]


def test_a_receiver_needs_a_secret() -> None:
    with pytest.raises(DefinitionError, match="'flockapi webhook secret'"):
        create_app(sample("https://hook.example"), store=":memory:", auth="host")
    secrets: list[Any] = ["whsec_", "whsec_short", SECRET.removeprefix("whsec_"), "whsec_!" + "a" * 40, 7]
    for secret in secrets:
        with pytest.raises(DefinitionError, match="webhook_secrets= must be a list of secrets") as exc:
            create_app(sample(None), store=":memory:", auth="host", webhook_secrets=[secret])
        assert "short" not in str(exc.value)


def test_the_command_serves_with_a_receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    made = runner.invoke(main, ["webhook", "secret"]).output.strip()
    assert made.startswith("whsec_")
    monkeypatch.setenv("FLOCK_WEBHOOK_SECRETS", f"{made}, {SECRET}")
    settings = ServerSettings(webhook_url="https://hook.example", store=str(tmp_path / "flock.db"))
    app = server._app(sample(None), settings)
    assert app.webhooks is not None
    assert (app.flock.webhook_url, len(app.webhooks.keys)) == ("https://hook.example", 2)


@pytest.mark.parametrize(
    "url",
    ["http://[::1]:8080/a", "https://xn--bcher-kva.example", "https://bücher.example/x@y", "https://hook.example/?a#b"],
)
def test_a_valid_address_is_accepted(url: str) -> None:
    assert Flock(webhook_url=url).webhook_url == url


#: It prints the type of an event that the package accepts. Its arguments: the secret, the headers, and the body.
VERIFIER = """
import json, sys
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

secret, headers, body = sys.argv[1:]
print(Webhook(secret).verify(body, json.loads(headers))["type"])
try:
    Webhook(secret).verify(body + " ", json.loads(headers))
except WebhookVerificationError:
    print("refused")
"""


@pytest.mark.slow
async def test_the_package_of_standard_webhooks_accepts_them(tmp_path: Path) -> None:
    """Also while another secret signs too."""
    python, inbox = new_environment(tmp_path / "env"), Inbox()
    await anyio.run_process(pip(python, "install", "-q", "standardwebhooks>=1.1"))
    async with inbox.serve() as receiver:
        secrets = [new_webhook_secret(), SECRET]
        app = create_app(sample(receiver.url), store=":memory:", auth="host", webhook_secrets=secrets)
        async with app.lifespan(), client_of(app) as client:
            await post_run(client, "echo", {"text": "a"})
            await inbox.until(1)
    headers = json.dumps(dict(inbox.requests[0][2]))
    for secret in secrets:
        arguments = [str(python), "-c", VERIFIER, secret, headers, inbox.body.decode()]
        verified = await anyio.run_process(arguments)
        assert verified.stdout.split() == [b"run.completed", b"refused"]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
async def test_no_event_is_lost_if_the_server_is_killed_again_and_again() -> None:
    await play(300)

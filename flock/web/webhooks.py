"""Webhooks: what happens to runs and batches is sent to the receivers of the operator (Standard Webhooks 1.0).

The store has written an event in the transaction of the state that it reports. One process sends those of a flock: each
at least once, and those of one run or batch in their order, since the next one is sent only after the last one was
accepted or given up. Each host has a task of its own, so one that is slow or down delays no other.
"""

import base64
import hashlib
import hmac
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import msgspec
from msgspec.structs import replace
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock import __version__
from flock.declared import DeclaredFlock
from flock.engine.embedded import EmbeddedEngine
from flock.errors import DefinitionError, StoreError
from flock.models.replies import retry_after_s
from flock.runs import Engine, RunStatus, Webhook, now, one_line
from flock.runs.records import LONG_BYTES, shown_as
from flock.store.port import DamagedRecord
from flock.web import wire
from flock.web.auth import webhook_key
from flock.web.requests import next_page, parameters_of, query_of
from flock.web.responses import JSONResponse

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("flock.webhooks")

#: The version of the body.
VERSION = 1
#: How often the store is asked for new events, and for new receivers, in seconds.
POLL_S, RECEIVERS_S = 0.2, 1.0
#: How many requests to one host are open at once.
CONCURRENCY = 16
#: How long a receiver may take for its response, in seconds, and how much of it is read.
TIMEOUT_S, MAX_RESPONSE_BYTES = 15.0, 64 * 1024
#: A webhook is given up when it has failed for this long. The pauses between its tries double up to an hour.
RETRIED_FOR, MAX_PAUSE_S = timedelta(days=1), 3600.0
#: A host is down if as many rounds of requests in sequence got no answer. Then one request at a time finds out whether
#: it is up again, at least every minute.
DOWN_AFTER, MAX_DOWN_PAUSE_S = 3, 60.0


def signed_headers(keys: Iterable[bytes], webhook_id: str, at: datetime, body: bytes) -> Mapping[str, str]:
    """Return the headers of a webhook, with a signature for each key."""
    timestamp = str(int(at.timestamp()))
    content = f"{webhook_id}.{timestamp}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode() for key in keys]
    return {
        "content-type": "application/json",
        "user-agent": f"flockapi/{__version__}",
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


class Receiver(msgspec.Struct):
    """A host, and the agents whose events it gets.

    Attributes:
        failures: how many rounds of requests in sequence got no answer, or one that says that the host cannot work now.
        resumes_at: when the next request may be sent, in seconds of ``time.monotonic``.
    """

    agents: list[str] = []
    failures: int = 0
    resumes_at: float = 0

    def pause(self, seconds: float) -> None:
        self.resumes_at = max(self.resumes_at, time.monotonic() + seconds)


class WebhookRun(wire.RunSummary, frozen=True, kw_only=True):
    """What a webhook says of a run: as a list shows it, and more."""

    url: str
    session_id: str | msgspec.UnsetType = msgspec.UNSET
    call_id: str | msgspec.UnsetType = msgspec.UNSET
    result_url: str | msgspec.UnsetType = msgspec.UNSET
    usage: wire.Usage | None
    cost: float | msgspec.UnsetType = msgspec.UNSET


class WebhookSender:
    """Sends the webhooks of *flock*; see ``flock.engine.embedded.Sender``.

    Args:
        keys: those that sign each webhook. Without any, nothing is sent.

    Attributes:
        on_try: called with the status after each try.
    """

    def __init__(self, engine: EmbeddedEngine, flock: DeclaredFlock, keys: Sequence[bytes]) -> None:
        self.store, self.flock, self._keys = engine.store, flock, keys
        self._receivers: dict[str, Receiver] = {}
        self.on_try: Callable[[str], None] = lambda status: None
        self._engine_id = ""

    async def open(self, engine_id: str) -> None:
        self._engine_id, self._receivers = engine_id, {}
        await self._set_urls()

    async def _set_urls(self) -> None:
        await self.store.webhooks.set_urls(self.flock.name, urls_of(self.flock), now())

    async def run(self) -> None:
        if not self._keys:
            return
        import httpx

        async with (
            httpx.AsyncClient(timeout=TIMEOUT_S, follow_redirects=False) as client,
            anyio.create_task_group() as tasks,
        ):
            while True:
                try:
                    await self._set_urls()  # of agents that were added since
                    hosts: dict[str, list[str]] = {}
                    for name, url in (await self.store.webhooks.urls(self.flock.name)).items():
                        hosts.setdefault(urlsplit(url).netloc.lower(), []).append(name)
                    for host in hosts.keys() - self._receivers.keys():
                        self._receivers[host] = Receiver()
                        tasks.start_soon(self._serve, client, self._receivers[host])
                    for host, receiver in self._receivers.items():
                        receiver.agents = hosts.get(host, [])
                except StoreError:
                    pass  # the store has logged it
                await anyio.sleep(RECEIVERS_S)

    async def _serve(self, client: "httpx.AsyncClient", receiver: Receiver) -> None:
        """Send to one host, one round of requests after another."""
        while True:
            has_sent = False
            try:
                has_sent = await self._send_round(client, receiver)
            except StoreError:
                receiver.pause(RECEIVERS_S)
            except Exception:
                logger.exception("webhooks cannot be sent")
                receiver.pause(MAX_DOWN_PAUSE_S)
            await anyio.sleep(max(0 if has_sent else POLL_S, receiver.resumes_at - time.monotonic()))

    async def _send_round(self, client: "httpx.AsyncClient", receiver: Receiver) -> bool:
        """Send what is due, and return whether there was anything. Raises StoreError."""
        webhooks, name = self.store.webhooks, self.flock.name
        # While the store cannot be written, each would be sent again and again.
        if not self.store.is_writable or not await webhooks.claim(name, self._engine_id):
            return False
        due = await webhooks.due(name, receiver.agents, now(), 1 if receiver.failures else CONCURRENCY)
        errors: list[str | None] = []
        async with anyio.create_task_group() as tasks:
            for webhook in due:
                tasks.start_soon(self._send, client, receiver, webhook, errors)
        if not errors:
            return False
        failed = [error for error in errors if error is not None]
        receiver.failures = receiver.failures + 1 if len(failed) == len(errors) else 0
        if receiver.failures >= DOWN_AFTER:
            receiver.pause(_jittered(min(2.0 ** (receiver.failures - DOWN_AFTER), MAX_DOWN_PAUSE_S)))
            await webhooks.fail(name, receiver.agents, failed[0], at := now(), at - RETRIED_FOR)
        return True

    async def _send(
        self, client: "httpx.AsyncClient", receiver: Receiver, webhook: Webhook, errors: list[str | None]
    ) -> None:
        """Send a webhook once, write what came of it, and add to *errors* why the host does not work, or None.

        If the process dies before that is written, or the store fails, it is sent again.
        """
        try:
            body = msgspec.json.encode(await self._event(webhook))
            status, problem, headers = await self._post(client, webhook, body)
            at, wait_s = now(), min(retry_after_s(headers) or 0.0, RETRIED_FOR.total_seconds())
            webhook = replace(webhook, tries=webhook.tries + 1, error=problem, first_try_at=webhook.first_try_at or at)
            if problem is None:
                webhook = replace(webhook, status="sent", ended_at=at)
            elif status == 410 or at - (webhook.first_try_at or at) >= RETRIED_FOR:
                webhook = replace(webhook, status="given_up", ended_at=at)
                logger.error("Webhook %s of %s was given up: %s", webhook.webhook_id, webhook.record_id, problem)
            else:
                pause_s = _jittered(min(2.0 ** min(webhook.tries, 20), MAX_PAUSE_S))
                webhook = replace(webhook, next_try_at=at + timedelta(seconds=max(pause_s, wait_s)))
            await self.store.webhooks.write(webhook)
        except StoreError:
            receiver.pause(RECEIVERS_S)
            return
        is_down = status == 0 or status == 429 or status >= 500
        errors.append(problem if is_down else None)
        if is_down and wait_s:
            receiver.pause(wait_s)
        self.on_try("failed" if webhook.status == "pending" else webhook.status)

    async def _post(
        self, client: "httpx.AsyncClient", webhook: Webhook, body: bytes
    ) -> tuple[int, str | None, Mapping[str, str]]:
        """Return the status of the response, why it is not accepted, if so, and the headers. No answer has status 0."""
        import httpx

        status, headers = 0, httpx.Headers()
        try:
            with anyio.move_on_after(TIMEOUT_S):
                own = signed_headers(self._keys, webhook.webhook_id, now(), body)
                async with client.stream("POST", webhook.url or "", content=body, headers=own) as response:
                    status, headers = response.status_code, response.headers
                    left = MAX_RESPONSE_BYTES
                    async for piece in response.aiter_raw():  # so that the connection can be used again
                        left -= len(piece)
                        if left < 0:
                            break
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
            if not status:
                return 0, one_line(f"{type(exc).__name__}: {exc}"[:200]), headers
        if not status:
            return 0, f"It did not answer within {TIMEOUT_S:g} s.", headers
        return status, None if 200 <= status < 300 else f"It answered with status {status}.", headers

    async def _event(self, webhook: Webhook) -> wire.WebhookEvent:
        """Return the body. Of a record that has changed since, or is gone, it has only what is always there."""
        kind = "batch" if webhook.type.startswith("batch.") else "run"
        status = "waiting" if webhook.type == "question.expired" else webhook.type.partition(".")[2]
        data: Any = {f"{kind}_id": webhook.record_id, "agent_name": webhook.agent_name}
        data |= {"status": status, "attempt": webhook.attempt, "url": f"/{kind}/{webhook.record_id}"}
        if webhook.call_id is not None:
            data["call_id"] = webhook.call_id
        try:
            if kind == "batch":
                batch = await self.store.batches.get(webhook.record_id)
                if batch is not None and (batch.status, batch.attempt) == (status, webhook.attempt):
                    summary = wire.shown_with_costs(wire.BatchSummary, batch)
                    data = msgspec.to_builtins(summary) | {"url": data["url"]}
            else:
                data = await self._run_data(webhook, status, data["url"]) or data
        except DamagedRecord:
            pass  # it is logged
        return wire.WebhookEvent(type=webhook.type, timestamp=webhook.created_at, version=VERSION, data=data)

    async def _run_data(self, webhook: Webhook, status: str, url: str) -> WebhookRun | None:
        """Return the run if it is still in the state that is reported. A long result is a link."""
        run = await self.store.outline(webhook.record_id)
        if run is None or (run.status, run.attempt) != (status, webhook.attempt):
            return None
        result: msgspec.Raw | msgspec.UnsetType | None = None
        is_long = run.status is RunStatus.COMPLETED and await self.store.result_bytes(run.run_id, None) > LONG_BYTES
        if is_long:
            result = msgspec.UNSET
        elif run.status is RunStatus.COMPLETED:
            result = await self.store.short_result(run.run_id, None)
        return wire.shown_with_costs(
            WebhookRun,
            run,
            url=url,
            inputs=msgspec.UNSET,
            result=result,
            result_url=url if is_long else msgspec.UNSET,
            call_id=webhook.call_id or msgspec.UNSET,
            waits=msgspec.UNSET,
            waiting_for=[shown_as(wire.Question, question) for question in run.questions] or msgspec.UNSET,
        )


def _jittered(seconds: float) -> float:
    """Return at least half of it, so that many do not try at the same time."""
    return seconds * random.uniform(0.5, 1)


def urls_of(flock: DeclaredFlock) -> Mapping[str, str | None]:
    return {agent.name: agent.webhook_url or flock.webhook_url for agent in flock.agents.values()}


def sender_of(engine: Engine, flock: DeclaredFlock, secrets: Sequence[str]) -> WebhookSender | None:
    """Return what sends the webhooks of an engine, which all apps on it share. A cluster has none.

    Raises: DefinitionError if there is a receiver, and no secret, or a cluster.
    """
    has_urls = any(urls_of(flock).values())
    if not isinstance(engine, EmbeddedEngine):
        if has_urls:
            raise DefinitionError(
                "webhook_url= needs a store: this version sends no webhooks for runs on a Temporal cluster. Remove it, "
                "and read GET /run/{run_id}/events instead."
            )
        return None
    if has_urls and not secrets:
        raise DefinitionError(
            "webhook_url= needs a secret that signs the webhooks. Make one with 'flockapi webhook secret', and pass it "
            "in FLOCK_WEBHOOK_SECRETS, or as webhook_secrets= of create_app."
        )
    if engine.webhooks is None:
        engine.webhooks = WebhookSender(engine, flock, [key for secret in secrets if (key := webhook_key(secret))])
    assert isinstance(engine.webhooks, WebhookSender)
    return engine.webhooks


def _sender(request: Request) -> WebhookSender:
    """Return what sends the webhooks of the app. Raises HTTPException 404 if nothing does."""
    sender: WebhookSender | None = request.app.webhooks
    if sender is None:
        raise HTTPException(404, "This server sends no webhooks: its runs are on a Temporal cluster.")
    return sender


async def list_webhooks(request: Request) -> Response:
    """GET /webhooks: of all principals, newest first."""
    query, sender = query_of(request, wire.WebhooksQuery), _sender(request)
    sent = {"status": None, "after": None, **parameters_of(query)}
    found = await sender.store.webhooks.page(sender.flock.name, sent["status"], sent["after"], query.limit + 1)
    page = found[: query.limit]
    path, headers = next_page(request, page[-1].webhook_id if len(found) > len(page) else None)
    body = wire.WebhookList(webhooks=[shown_as(wire.Webhook, each) for each in page], next=path)
    return JSONResponse(body, headers=headers)


async def retry_webhook(request: Request) -> Response:
    """POST /webhooks/{webhook_id}/retry: send it again, and for a day if it fails."""
    sender, webhook_id = _sender(request), request.path_params["webhook_id"]
    found = await sender.store.webhooks.find(sender.flock.name, webhook_id)
    if found is None:
        raise HTTPException(404, f"There is no webhook {webhook_id!r}. GET /webhooks lists those of the last days.")
    return JSONResponse(shown_as(wire.Webhook, await sender.store.webhooks.retry(found, now())), 202)

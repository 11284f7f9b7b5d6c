"""Webhooks: what happens to runs and batches is sent to the receivers of the operator (Standard Webhooks 1.0).

The store has written an event in the transaction of the state that it reports. One process sends those of a flock: each
at least once, and those of one run or batch in their order, since the next one is sent only after the last one was
accepted or given up. Each host has a task of its own, so one that is slow or down delays no other.
"""

import base64
import contextlib
import hmac
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any
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
from flock.errors import DefinitionError, NotFound, StoreError
from flock.models.replies import retry_after_s
from flock.runs import Batch, Engine, Run, Webhook, now, one_line, shown_usage
from flock.runs.records import LONG_BYTES, shown_as
from flock.store.port import DamagedRecord, Store
from flock.store.webhooks import WebhookStore
from flock.web import wire
from flock.web.auth import webhook_key
from flock.web.requests import next_page, parameters_of, query_of
from flock.web.responses import JSONResponse

logger = logging.getLogger("flock.webhooks")

OnTry = Callable[[str, int], None]

#: How often the store is asked for new events, and for new receivers, in seconds.
POLL_S, RECEIVERS_S = 0.2, 1.0
#: How many requests to one host are open at once.
CONCURRENCY = 16
#: How long a receiver may take for its response, in seconds, and how much of it is read.
TIMEOUT_S, MAX_BYTES = 15.0, 64 * 1024
#: How long webhooks stay in the list after they were sent or given up.
KEEP_FOR = timedelta(days=7)
#: A webhook is given up when it has failed for this long. The pauses between its tries double up to an hour.
RETRIED_FOR, MAX_PAUSE_S = timedelta(days=1), 3600.0
#: A host is down after this many rounds in a row without an answer. Then one request at a time finds out whether
#: it is up again, at least every minute.
DOWN_AFTER, MAX_DOWN_PAUSE_S = 3, 60.0
#: How long a response to one webhook may hold up all others to the host, in seconds.
MAX_HOST_PAUSE_S = 3600.0

NEW_SECRET = "Make one with 'flockapi webhook secret', and pass it in FLOCK_WEBHOOK_SECRETS, or as webhook_secrets=."


def _signed(keys: Iterable[bytes], webhook_id: str, body: bytes) -> Mapping[str, str]:
    """Return the headers of a webhook that is sent now, with a signature for each key."""
    at = int(time.time())
    content = f"{webhook_id}.{at}.".encode() + body
    signatures = [base64.b64encode(hmac.digest(key, content, "sha256")).decode() for key in keys]
    own = {"content-type": "application/json", "user-agent": f"flockapi/{__version__}", "webhook-id": webhook_id}
    return own | {"webhook-timestamp": str(at), "webhook-signature": " ".join(f"v1,{each}" for each in signatures)}


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


class WebhookSender:
    """Sends the webhooks of *flock*, which *store* has, signed with each of *keys*. Without any, it sends nothing.

    Args:
        on_try: called with the status after each try, and how many webhooks have it.
    """

    def __init__(self, store: Store, flock: DeclaredFlock, keys: Sequence[bytes], on_try: OnTry) -> None:
        self._store, self.flock, self.keys, self._on_try = store, flock, keys, on_try
        self.webhooks: WebhookStore = store.webhooks
        self._set, self.receivers = dict[str, str | None](), dict[str, Receiver]()

    async def run(self, engine_id: str, *, task_status: Any) -> None:
        """Store the receivers, so that runs may end, and then send until cancelled. Raises StoreError at the start."""
        self._engine_id, self._set, self.receivers = engine_id, {}, {}
        client: Any = contextlib.nullcontext()
        if self.keys:
            from http.cookiejar import CookieJar, DefaultCookiePolicy

            import httpx

            # Connections are not limited, so a host that does not answer blocks no other. Cookies are not kept.
            cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
            client = httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(), cookies=cookies)
        await self._set_urls()
        task_status.started()
        async with client as self._client, anyio.create_task_group() as tasks:
            while True:
                try:
                    await self._set_urls()  # of agents that were added since
                    await self.webhooks.delete_old(now() - KEEP_FOR)
                    urls = (await self.webhooks.urls(self.flock.name)) if self.keys else {}
                    hosts = {agent: urlsplit(url).netloc.lower() for agent, url in urls.items()}
                    for host in {*hosts.values(), *self.receivers}:
                        if host not in self.receivers:
                            tasks.start_soon(self._serve, self.receivers.setdefault(host, Receiver()))
                        self.receivers[host].agents = [agent for agent in hosts if hosts[agent] == host]
                    self.receivers = {host: each for host, each in self.receivers.items() if each.agents}
                except StoreError:
                    pass  # the store has logged it
                except Exception:  # it must not stop the engine and its runs
                    logger.exception("The receivers of webhooks cannot be read")
                await anyio.sleep(RECEIVERS_S)

    async def _set_urls(self) -> None:
        """Store the receivers. Raises StoreError."""
        urls = _urls_of(self.flock)
        new = [name for name, url in urls.items() if url and url != self._set.get(name)]
        count = await self.webhooks.set_urls(self.flock.name, urls, new, self._engine_id, now())
        if new and not self.keys:
            logger.warning("No webhooks are sent: webhook_url= needs a secret that signs them. %s", NEW_SECRET)
        self._set = urls
        self._note_given_up(count, "Their agents have no webhook_url any more.")

    def _note_given_up(self, count: int, why: str | None) -> None:
        if count:
            logger.error("Webhooks were given up: %s. %s", count, why)
            self._on_try("given_up", count)

    async def _serve(self, receiver: Receiver) -> None:
        """Send to one host, one round of requests after another, while an agent has it."""
        while receiver.agents:
            has_sent = False
            try:
                has_sent = time.monotonic() >= receiver.resumes_at and await self._send_round(receiver)
            except* StoreError:  # of a request too, which ends the others of the round
                receiver.pause(RECEIVERS_S)
            except* Exception:
                logger.exception("Webhooks cannot be sent.")
                receiver.pause(MAX_DOWN_PAUSE_S)
            await anyio.sleep(0 if has_sent else POLL_S)

    async def _send_round(self, receiver: Receiver) -> bool:
        """Send what is due, and return whether there was anything. Raises StoreError."""
        webhooks, name = self.webhooks, self.flock.name
        # While the store cannot be written, each would be sent again and again.
        if not self._store.is_writable or not await webhooks.claim(name, self._engine_id):
            return False
        due = await webhooks.due(name, receiver.agents, now(), 1 if receiver.failures else CONCURRENCY)
        failures: list[str | None] = []
        async with anyio.create_task_group() as tasks:
            for webhook in due:
                tasks.start_soon(self._send, receiver, webhook, failures)
        if not failures:
            return False
        receiver.failures = 0 if None in failures else receiver.failures + 1
        if receiver.failures >= DOWN_AFTER:
            receiver.pause(_pause_s(receiver.failures - DOWN_AFTER, MAX_DOWN_PAUSE_S))
            given_up = await webhooks.fail(name, receiver.agents, failures[0], at := now(), at - RETRIED_FOR)
            self._note_given_up(given_up, failures[0])
        return True

    async def _send(self, receiver: Receiver, webhook: Webhook, failures: list[str | None]) -> None:
        """Send a webhook once, store the outcome, and add to *failures* why its host does not work, or None.

        If the process dies before that is written, or the store fails, it is sent again. Raises StoreError.
        """
        status, error, wait_s = await self._post(webhook, *await self._event(webhook))
        at, tries, end = now(), webhook.tries + 1, "pending"
        first, next_s = webhook.first_try_at or at, max(_pause_s(tries, MAX_PAUSE_S), wait_s)
        if not error:
            end = "sent"
        elif status == 410 or at - first >= RETRIED_FOR:  # "Gone": it wants nothing more
            end = "given_up"
            logger.error("The webhook %s of %s was given up: %s", webhook.type, webhook.record_id, error)
        times = first, at + timedelta(seconds=next_s), None if end == "pending" else at
        await self.webhooks.write(webhook.webhook_id, webhook.tries, end, tries, error or None, *times)
        is_down = status in (0, 429) or status >= 500
        failures.append(error if is_down else None)
        receiver.pause(min(wait_s, MAX_HOST_PAUSE_S) if is_down else 0)
        self._on_try("failed" if end == "pending" else end, 1)

    async def _post(self, webhook: Webhook, body: bytes, trace: Mapping[str, str]) -> tuple[int, str, float]:
        """Return the status of the response, or 0; why it is not accepted, or ""; and how long it asks to wait."""
        import httpx

        status, wait_s, error, left = 0, 0.0, f"It did not answer within {TIMEOUT_S:g} s.", MAX_BYTES
        try:
            with anyio.move_on_after(TIMEOUT_S):
                headers = {**trace, **_signed(self.keys, webhook.webhook_id, body)}
                async with self._client.stream("POST", webhook.url or "", content=body, headers=headers) as response:
                    status, error = response.status_code, f"It answered with status {response.status_code}."
                    wait_s = min(retry_after_s(response.headers) or 0, RETRIED_FOR.total_seconds())
                    async for piece in response.aiter_raw():  # so that the connection can be used again
                        left -= len(piece)
                        if left < 0:
                            break
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as exc:
            error = error if status else one_line(f"{type(exc).__name__}: {exc}"[:200])
        return status, "" if 200 <= status < 300 else error, wait_s

    async def _event(self, webhook: Webhook) -> tuple[bytes, Mapping[str, str]]:
        """Return the body, and the header with the trace context of its run.

        Of a record that has changed since, or is gone, the body has only what is always there.
        """
        store, kind = self._store, "batch" if webhook.type.startswith("batch.") else "run"
        status, trace = "waiting" if webhook.type == "question.expired" else webhook.type.partition(".")[2], None
        data: dict[str, Any] = {f"{kind}_id": webhook.record_id, "agent_name": webhook.agent_name, "status": status}
        data |= {"attempt": webhook.attempt, "url": (url := f"/{kind}/{webhook.record_id}")}
        data |= {} if webhook.call_id is None else {"call_id": webhook.call_id}
        with contextlib.suppress(DamagedRecord, NotFound):  # the store has logged it, or it was deleted
            found = await (store.batches.get if kind == "batch" else store.outline)(webhook.record_id)
            trace = found.traceparent if isinstance(found, Run) else None
            is_current = found is not None and (found.status, found.attempt) == (status, webhook.attempt)
            if is_current and isinstance(found, Batch):
                data |= parameters_of(wire.shown_with_costs(wire.BatchSummary, found))
            elif is_current and isinstance(found, Run):
                more: dict[str, Any] = {"inputs": msgspec.UNSET, "result": None, "waits": msgspec.UNSET}
                more["waiting_for"] = [shown_as(wire.Question, each) for each in found.questions] or msgspec.UNSET
                if found.result is not None and await store.result_bytes(found.run_id, None) > LONG_BYTES:
                    data["result_url"], more["result"] = url, msgspec.UNSET
                elif found.result is not None:
                    more["result"] = await store.short_result(found.run_id, None)
                data |= {"session_id": found.session_id, **shown_usage(found.usage)}
                data |= parameters_of(shown_as(wire.RunSummary, found, **more))
        event = {"type": webhook.type, "timestamp": webhook.created_at, "version": 1, "data": data}
        return msgspec.json.encode(event), {} if trace is None else {"traceparent": trace}


def _pause_s(failures: int, most: float) -> float:
    """Return a pause that doubles with each failure. It is random, so that many do not try at the same time."""
    return min(2.0 ** min(failures, 20), most) * random.uniform(0.5, 1)


def _urls_of(flock: DeclaredFlock) -> dict[str, str | None]:
    return {agent.name: agent.webhook_url or flock.webhook_url for agent in flock.agents.values()}


def sender_of(engine: Engine, flock: DeclaredFlock, secrets: Sequence[str], on_try: OnTry) -> WebhookSender | None:
    """Return what sends the webhooks of an engine. A cluster has none.

    Raises: DefinitionError if there is a receiver, and no secret, or a cluster.
    """
    has_urls = any(_urls_of(flock).values())
    if not isinstance(engine, EmbeddedEngine):
        if has_urls:
            raise DefinitionError(
                "No webhooks are sent for runs on a Temporal cluster. Remove webhook_url, and poll GET /run/{id}."
            )
        return None
    if has_urls and not secrets:
        raise DefinitionError(f"webhook_url= needs a secret that signs the webhooks. {NEW_SECRET}")
    sender = WebhookSender(engine.store, flock, [key for secret in secrets if (key := webhook_key(secret))], on_try)
    if engine.send_webhooks is None or secrets:  # the apps on an engine share it
        engine.send_webhooks = sender.run
    return sender


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
    found = await sender.webhooks.page(sender.flock.name, sent["status"], sent["after"], query.limit + 1)
    page = found[: query.limit]
    path, headers = next_page(request, page[-1].webhook_id if len(found) > len(page) else None)
    return JSONResponse(wire.WebhookList(webhooks=page, next=path), headers=headers)


async def retry_webhook(request: Request) -> Response:
    """POST /webhooks/{webhook_id}/retry: send it again, and for a day if it fails."""
    sender, webhook_id = _sender(request), request.path_params["webhook_id"]
    found = await sender.webhooks.find(sender.flock.name, webhook_id)
    if found is None:
        raise HTTPException(404, f"There is no webhook {webhook_id!r}. GET /webhooks lists those of the last days.")
    await sender.webhooks.write(webhook_id, None, "pending", 0, None, None, at := now(), None)
    for receiver in sender.receivers.values():
        if found.agent_name in receiver.agents:  # it may be up again
            receiver.failures, receiver.resumes_at = 0, 0
    again = replace(found, status="pending", tries=0, first_try_at=None, next_try_at=at, ended_at=None, error=None)
    return JSONResponse(again, 202)

"""Webhooks: what happens to runs and batches is sent to the receivers of the operator (Standard Webhooks 1.0).

The store has written an event in the transaction of the state that it reports. One process sends those of a flock: each
at least once, and those of one run or batch in their order, since the next one is sent only after the last one was
accepted or given up. Each host has a task of its own, so one that is slow or down delays no other.

On a cluster, ``flock.temporal.reports`` has the events, and the cluster decides which process tries to send which.
"""

import abc
import base64
import contextlib
import hmac
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import anyio
import msgspec
from msgspec.structs import replace
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock import __version__
from flock.errors import DefinitionError, NotFound, StoreError
from flock.models.replies import retry_after_s
from flock.runs import Batch, Engine, Run, RunStatus, Webhook, now, one_line, shown_usage
from flock.runs.records import LONG_BYTES, shown_as
from flock.store.port import DamagedRecord, Store
from flock.web import wire
from flock.web.auth import webhook_key
from flock.web.requests import next_page, parameters_of, query_of
from flock.web.responses import JSONResponse

if TYPE_CHECKING:
    from flock.declared import DeclaredFlock
    from flock.temporal import TemporalEngine

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
#: On a cluster: the longest pause of a webhook whose host was down or had no room when it was to be sent, in seconds.
MAX_MISS_PAUSE_S, MAX_BUSY_PAUSE_S = 600.0, 60.0

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
        open, error: on a cluster: how many requests are open, and why the last one failed.
    """

    agents: list[str] = []
    failures: int = 0
    resumes_at: float = 0
    open: int = 0
    error: str | None = None

    def pause(self, seconds: float) -> None:
        self.resumes_at = max(self.resumes_at, time.monotonic() + seconds)


class WebhookSender(abc.ABC):
    """Sends the webhooks of *flock*, signed with each of *keys*. Without any, it sends nothing.

    Args:
        on_try: called with the status after each try, and how many webhooks have it.

    Attributes:
        receivers: by host.
    """

    def __init__(self, flock: "DeclaredFlock", keys: Sequence[bytes], on_try: OnTry) -> None:
        self.flock, self.keys, self._on_try = flock, keys, on_try
        self.receivers = dict[str, Receiver]()
        self._client: Any = None

    @abc.abstractmethod
    async def page(self, status: str | None, after: str | None, limit: int) -> list[Webhook]:
        """Return up to *limit* webhooks, newest first, from the one after *after* on. Raises StoreError."""

    @abc.abstractmethod
    async def again(self, webhook_id: str) -> Webhook | None:
        """Have a webhook sent again. Returns None if there is none. Raises StoreError."""

    @abc.abstractmethod
    async def _record(self, kind: str, record_id: str) -> Run | Batch | None:
        """Return a run or a batch, perhaps without its result. Raises NotFound, DamagedRecord, StoreError."""

    @abc.abstractmethod
    async def _first_item(self, batch_id: str) -> Sequence[Run]:
        """Return the first item of a batch, or none. Raises NotFound, DamagedRecord, StoreError."""

    @abc.abstractmethod
    async def _short_result(self, run: Run) -> msgspec.Raw | None:
        """Return the result of *run*, or None if it is long. Raises NotFound, DamagedRecord, StoreError."""

    def _new_client(self) -> Any:
        from http.cookiejar import CookieJar, DefaultCookiePolicy

        import httpx

        # Connections are not limited, so a host that does not answer blocks no other. Cookies are not kept.
        cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        return httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(), cookies=cookies)

    async def _try(self, receiver: Receiver, webhook: Webhook) -> tuple[Webhook, bool]:
        """Send a webhook once. Returns it as it is then, and whether its host does not work. Raises StoreError."""
        status, error, wait_s = await self._post(webhook, *await self._event(webhook))
        at, tries, end = now(), webhook.tries + 1, "pending"
        first, next_s = min(webhook.first_try_at or at, at), max(_pause_s(tries, MAX_PAUSE_S), wait_s)
        if not error:
            end = "sent"
        elif status == 410 or at - first >= RETRIED_FOR:  # "Gone": it wants nothing more
            end = "given_up"
            logger.error("The webhook %s of %s was given up: %s", webhook.type, webhook.record_id, error)
        is_down = status in (0, 429) or status >= 500
        receiver.pause(min(wait_s, MAX_HOST_PAUSE_S) if is_down else 0)
        ended_at, next_at = None if end == "pending" else at, at + timedelta(seconds=next_s)
        times = {"first_try_at": first, "next_try_at": next_at, "ended_at": ended_at}
        return replace(webhook, status=end, tries=tries, error=error or None, **times), is_down

    def _note_given_up(self, count: int, why: str | None) -> None:
        if count:
            logger.error("Webhooks were given up: %s. %s", count, why)
            self._on_try("given_up", count)

    async def _post(self, webhook: Webhook, body: bytes, trace: Mapping[str, str]) -> tuple[int, str, float]:
        """Return the status of the response, or 0; why it is not accepted, or ""; and how long it asks to wait."""
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
        except Exception as exc:  # of httpx, of the operating system, or of a codec: each is a failed try
            error = error if status else one_line(f"{type(exc).__name__}: {exc}"[:200])
        return status, "" if 200 <= status < 300 else error, wait_s

    async def _event(self, webhook: Webhook) -> tuple[bytes, Mapping[str, str]]:
        """Return the body, and the header with the trace context of its run, or of the request of its batch.

        Of a record that has changed since, or is gone, the body has only what is always there.
        """
        kind = "batch" if webhook.type.startswith("batch.") else "run"
        status, trace = "waiting" if webhook.type == "question.expired" else webhook.type.partition(".")[2], None
        data: dict[str, Any] = {f"{kind}_id": webhook.record_id, "agent_name": webhook.agent_name, "status": status}
        data |= {"attempt": webhook.attempt, "url": (url := f"/{kind}/{webhook.record_id}")}
        data |= {} if webhook.call_id is None else {"call_id": webhook.call_id}
        with contextlib.suppress(DamagedRecord, NotFound):  # the store has logged it, or it was deleted
            found = await self._record(kind, webhook.record_id)
            trace = (found.traceparent or found.first_span) if isinstance(found, Run) else None
            is_current = found is not None and (found.status, found.attempt) == (status, webhook.attempt)
            if is_current and isinstance(found, Batch):
                data |= parameters_of(wire.shown_with_costs(wire.BatchSummary, found))
            elif is_current and isinstance(found, Run):
                more: dict[str, Any] = {"inputs": msgspec.UNSET, "result": None, "waits": msgspec.UNSET}
                asked = [shown_as(wire.Question, each) for each in found.questions]
                is_short = asked and len(msgspec.json.encode(asked)) <= LONG_BYTES
                more["waiting_for"] = asked if is_short else msgspec.UNSET
                if found.result is not None:
                    more["result"] = await self._short_result(found)
                    if more["result"] is None:
                        data["result_url"], more["result"] = url, msgspec.UNSET
                data |= {"session_id": found.session_id, **shown_usage(found.usage)}
                data |= parameters_of(shown_as(wire.RunSummary, found, **more))
            if isinstance(found, Batch):  # only its items have the context of its request
                trace = next((item.traceparent for item in await self._first_item(webhook.record_id)), None)
        event = {"type": webhook.type, "timestamp": webhook.created_at, "version": 1, "data": data}
        return msgspec.json.encode(event), {} if trace is None else {"traceparent": trace}


class StoreSender(WebhookSender):
    """Sends the webhooks that *store* has."""

    def __init__(self, store: Store, *of_all: Any) -> None:
        super().__init__(*of_all)
        self._store, self.webhooks = store, store.webhooks
        self._set = dict[str, str | None]()

    async def start(self, engine_id: str) -> Callable[[], Coroutine[Any, Any, None]]:
        """Store the receivers, so that runs may end, and return the task that sends. Raises StoreError."""
        self._engine_id, self._set, self.receivers = engine_id, {}, {}
        await self._set_urls()
        self._client = self._new_client() if self.keys else contextlib.nullcontext()
        return self._run

    async def _run(self) -> None:
        """Send until cancelled."""
        async with self._client, anyio.create_task_group() as tasks:
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
        urls = urls_of(self.flock)
        new = [name for name, url in urls.items() if url and url != self._set.get(name)]
        count = await self.webhooks.set_urls(self.flock.name, urls, new, self._engine_id, now())
        if new and not self.keys:
            logger.warning("No webhooks are sent: webhook_url= needs a secret that signs them. %s", NEW_SECRET)
        self._set = urls
        self._note_given_up(count, "Their agents have no webhook_url any more.")

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
        tried, is_down = await self._try(receiver, webhook)
        times = tried.first_try_at, tried.next_try_at, tried.ended_at
        await self.webhooks.write(webhook.webhook_id, webhook.tries, tried.status, tried.tries, tried.error, *times)
        failures.append(tried.error if is_down else None)
        self._on_try("failed" if tried.status == "pending" else tried.status, 1)

    async def page(self, status: str | None, after: str | None, limit: int) -> list[Webhook]:
        found: list[Webhook] = await self.webhooks.page(self.flock.name, status, after, limit)
        return found

    async def again(self, webhook_id: str) -> Webhook | None:
        found: Webhook | None = await self.webhooks.find(self.flock.name, webhook_id)
        if found is None:
            return None
        await self.webhooks.write(webhook_id, None, "pending", 0, None, None, at := now(), None)
        for receiver in self.receivers.values():
            if found.agent_name in receiver.agents:  # it may be up again
                receiver.failures, receiver.resumes_at = 0, 0
        return replace(found, status="pending", tries=0, first_try_at=None, next_try_at=at, ended_at=None, error=None)

    async def _record(self, kind: str, record_id: str) -> Run | Batch | None:
        return await (self._store.batches.get if kind == "batch" else self._store.outline)(record_id)

    async def _first_item(self, batch_id: str) -> Sequence[Run]:
        return await self._store.batches.items(batch_id, -1, 1, tuple(RunStatus))

    async def _short_result(self, run: Run) -> msgspec.Raw | None:
        is_long = await self._store.result_bytes(run.run_id, None) > LONG_BYTES
        return None if is_long else await self._store.short_result(run.run_id, None)


class ClusterSender(WebhookSender):
    """Sends the webhooks of a flock on a cluster, each when the cluster has this process try it."""

    def __init__(self, engine: "TemporalEngine", *of_all: Any) -> None:
        super().__init__(*of_all)
        self._engine = engine
        #: agents for which a warning was logged
        self._unsigned = set[str]()

    async def run(self) -> None:
        """Send until cancelled."""
        try:
            async with self._new_client() as self._client:
                await self._engine.webhooks.serve(self.try_)
        except Exception:  # such as certificates that cannot be read
            logger.exception("This process sends no webhooks. Correct what is wrong, and start it again.")

    def has_receiver(self, agent_name: str) -> bool:
        url = urls_of(self.flock).get(agent_name)
        if url and not self.keys and agent_name not in self._unsigned:
            self._unsigned.add(agent_name)
            logger.warning("No webhooks are sent: webhook_url= needs a secret that signs them. %s", NEW_SECRET)
        return bool(url and self.keys)

    async def try_(self, webhook: Webhook, misses: int) -> tuple[Webhook, float]:
        """Send a webhook once, if its host can get a request now.

        Args:
            misses: how often that was not so, or this failed.

        Returns: the webhook as it is then, and the pause before the next try, in seconds. Raises StoreError.
        """
        urls = urls_of(self.flock)
        if webhook.agent_name not in urls:  # another program may have it
            return webhook, _pause_s(misses, MAX_MISS_PAUSE_S)
        url, at = urls[webhook.agent_name], now()
        if url is None:
            self._note_given_up(1, error := "Its agent has no webhook_url any more.")
            return replace(webhook, status="given_up", ended_at=at, error=error), 0
        receiver = self.receivers.setdefault(urlsplit(url).netloc.lower(), Receiver())
        left_s = receiver.resumes_at - time.monotonic()
        if left_s > 0:  # it counts as tried
            first = webhook.first_try_at or at
            webhook = replace(webhook, first_try_at=first, error=receiver.error)
            if at - first >= RETRIED_FOR:
                self._note_given_up(1, receiver.error)
                return replace(webhook, status="given_up", ended_at=at), 0
            return webhook, left_s + _pause_s(misses, MAX_MISS_PAUSE_S)
        if receiver.open >= (1 if receiver.failures else CONCURRENCY):
            return webhook, _pause_s(misses, MAX_BUSY_PAUSE_S)
        before, receiver.open = receiver.failures, receiver.open + 1
        try:
            tried, is_down = await self._try(receiver, replace(webhook, url=url))
        finally:
            receiver.open -= 1
        kind, _, text = (tried.error or "").partition(": ")
        if text:  # the cluster stores the class of an exception, and not its text, which may have the address
            logger.warning("The webhook %s of %s: %s", webhook.type, webhook.record_id, tried.error)
            tried = replace(tried, error=kind)
        # Requests that were open at the same time are one round.
        receiver.failures = max(receiver.failures, before + 1) if is_down else 0
        receiver.error = tried.error
        if receiver.failures >= DOWN_AFTER:
            receiver.pause(_pause_s(receiver.failures - DOWN_AFTER, MAX_DOWN_PAUSE_S))
        self._on_try("failed" if tried.status == "pending" else tried.status, 1)
        return replace(tried, url=None), (tried.next_try_at - now()).total_seconds()

    async def page(self, status: str | None, after: str | None, limit: int) -> list[Webhook]:
        urls = urls_of(self.flock)
        found = await self._engine.webhooks.page(status, after, limit)
        return [replace(webhook, url=urls.get(webhook.agent_name)) for webhook in found]

    async def again(self, webhook_id: str) -> Webhook | None:
        found = await self._engine.webhooks.again(webhook_id)
        if found is None:
            return None
        url = urls_of(self.flock).get(found.agent_name)
        self.receivers.pop(urlsplit(url or "").netloc.lower(), None)  # it may be up again
        return replace(found, url=url)

    async def _record(self, kind: str, record_id: str) -> Run | Batch | None:
        return await (self._engine.get_batch if kind == "batch" else self._engine.get_run)(record_id)

    async def _first_item(self, batch_id: str) -> Sequence[Run]:
        return await self._engine.get_items(batch_id, limit=1)

    async def _short_result(self, run: Run) -> msgspec.Raw | None:
        return None if run.result is None or len(run.result) > LONG_BYTES else run.result


def _pause_s(failures: int, most: float) -> float:
    """Return a pause that doubles with each failure. It is random, so that many do not try at the same time."""
    return min(2.0 ** min(failures, 20), most) * random.uniform(0.5, 1)


def urls_of(flock: "DeclaredFlock") -> dict[str, str | None]:
    """Return the receiver of each agent."""
    return {agent.name: agent.webhook_url or flock.webhook_url for agent in flock.agents.values()}


def sender_of(engine: Engine, flock: "DeclaredFlock", secrets: Sequence[str], on_try: OnTry) -> WebhookSender:
    """Return what sends the webhooks of an engine. Raises DefinitionError if there is a receiver, and no secret."""
    from flock.engine.embedded import EmbeddedEngine

    if any(urls_of(flock).values()) and not secrets:
        raise DefinitionError(f"webhook_url= needs a secret that signs the webhooks. {NEW_SECRET}")
    of_all = flock, [key for secret in secrets if (key := webhook_key(secret))], on_try
    if isinstance(engine, EmbeddedEngine):
        sender = StoreSender(engine.store, *of_all)
        if engine.send_webhooks is None or secrets:  # the apps on an engine share it
            engine.send_webhooks = sender.start
        return sender
    on_cluster = cast("TemporalEngine", engine)
    of_cluster = ClusterSender(on_cluster, *of_all)
    if on_cluster.send_webhooks is None:
        on_cluster.has_receiver = of_cluster.has_receiver
    if secrets:
        on_cluster.has_receiver, on_cluster.send_webhooks = of_cluster.has_receiver, of_cluster.run
    return of_cluster


async def list_webhooks(request: Request) -> Response:
    """GET /webhooks: of all principals, newest first."""
    query = query_of(request, wire.WebhooksQuery)
    sent = {"status": None, "after": None, **parameters_of(query)}
    found = await request.app.webhooks.page(sent["status"], sent["after"], query.limit + 1)
    page = found[: query.limit]
    path, headers = next_page(request, page[-1].webhook_id if len(found) > len(page) else None)
    return JSONResponse(wire.WebhookList(webhooks=page, next=path), headers=headers)


async def retry_webhook(request: Request) -> Response:
    """POST /webhooks/{webhook_id}/retry: send it again, and for a day if it fails."""
    webhook_id = request.path_params["webhook_id"]
    again = await request.app.webhooks.again(webhook_id)
    if again is None:
        raise HTTPException(404, f"There is no webhook {webhook_id!r}. GET /webhooks lists those of the last days.")
    return JSONResponse(again, 202)

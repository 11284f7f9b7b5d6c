"""API keys, the checks of ``Host`` and ``Origin``, limits for each caller, and the records that a principal may see.

Only the SHA-256 of a key is kept in memory, and it is compared in constant time. A random key of 256 bits needs no
slower hash.
"""

import base64
import contextlib
import functools
import hashlib
import hmac
import inspect
import math
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import msgspec
from msgspec.structs import replace

from flock.errors import BatchNotFound, DefinitionError, Forbidden, TooManyRequests, WrongHost
from flock.runs import (
    MAX_COST,
    Account,
    AskedQuestion,
    Batch,
    BatchFilter,
    BatchOptions,
    Call,
    Engine,
    Event,
    FileBox,
    IdempotencyKey,
    Inputs,
    ItemLimits,
    Items,
    Page,
    Principal,
    QuestionFilter,
    QuestionPage,
    Run,
    RunFilter,
    RunStatus,
    Session,
    Statuses,
    UsageFilter,
    UsagePage,
    bad_role,
)

Filter = TypeVar("Filter", RunFilter, BatchFilter, UsageFilter)
Method = TypeVar("Method", bound=Callable[..., Any])

#: The unit that a limit counts for: ("principal", its name), or ("address" or "network", that of an anonymous client).
Caller = tuple[str, str]

#: The environment variable that holds the keys.
KEYS_VARIABLE = "FLOCK_API_KEYS"
#: The variable with the secrets that sign webhooks. Their form is that of Standard Webhooks.
SECRETS_VARIABLE, WEBHOOK_PREFIX, WEBHOOK_KEY_BYTES = "FLOCK_WEBHOOK_SECRETS", "whsec_", range(24, 65)
#: The suffix of a key's name that makes its principal an admin.
ADMIN = ":admin"
#: The part of a key's name that limits what the runs of its principal may cost in a day, in US dollars.
BUDGET = r":max_cost_per_day:([^:]*)"
#: The number of callers in a ``RateLimit`` above which idle ones are dropped.
CLEANUP_SIZE = 10_000
#: The port in ``Host``.
PORT = r":\d*$"
#: The part of a key's name that gives its principal a role.
ROLE_PART = r":role:([^:]*)"
#: In characters. A shorter key could be guessed.
MIN_KEY_LENGTH = 16


def new_key() -> str:
    """Return a key of 256 random bits. Its prefix lets people and secret scanners recognise it."""
    return f"fk_{secrets.token_urlsafe(32)}"


def new_webhook_secret() -> str:
    """Return a secret of 256 random bits, in the form of Standard Webhooks."""
    return WEBHOOK_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def webhook_key(secret: Any) -> bytes | None:
    """Return the key in a secret, or None if it is not valid."""
    try:
        key = base64.b64decode(secret.removeprefix(WEBHOOK_PREFIX), validate=True)
    except (AttributeError, ValueError):
        return None
    return key if secret.startswith(WEBHOOK_PREFIX) and len(key) in WEBHOOK_KEY_BYTES else None


def read_keys(text: str) -> dict[str, str]:
    """Parse ``name=key`` entries separated by commas or newlines. Lines that begin with ``#`` are skipped.

    Raises DefinitionError if an entry is invalid. The message never contains a key.
    """
    keys: dict[str, str] = {}
    entries = [entry.strip() for line in text.splitlines() if line.lstrip()[:1] != "#" for entry in line.split(",")]
    for number, entry in enumerate(filter(None, entries), 1):
        name, equals, key = (part.strip() for part in entry.partition("="))
        if not equals or name in keys:
            reason = f"the name {name!r} is used twice" if equals else "it is not NAME=KEY"
            raise DefinitionError(f"Entry {number} of the API keys is invalid: {reason}.")
        keys[name] = key
    return keys


def configured_keys(file: Path | None) -> dict[str, str] | None:
    """Return the keys in *file* and in ``FLOCK_API_KEYS``, or None if there is neither. Raises DefinitionError."""
    text = os.environ.get(KEYS_VARIABLE, "")
    if file is None:
        return read_keys(text) if text else None
    try:
        return read_keys("\n".join([file.read_text("utf-8"), text]))
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not UTF-8"
        raise DefinitionError(f"The API keys in {file} cannot be read: {reason}.") from exc


#: The principal of requests if an app identifies none. It has no roles.
ANYBODY = Principal(name="", admin=True)


class KeyRing:
    """The API keys, and the principal of each.

    Args:
        keys: keys by the name of their principal; ``"ops:admin"`` is the admin "ops", ``"bob:role:refunds"`` has the
            role "refunds", and the runs of ``"ann:max_cost_per_day:5"`` may cost 5 US dollars in a day.

    Raises: DefinitionError if a name is invalid, if a key is too short or used twice, or if there are no keys.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.replace(keys)

    def replace(self, keys: Mapping[str, str]) -> None:
        """Accept *keys* from now on, and no others. If they are invalid, raise as ``KeyRing``, and change nothing."""
        principals: dict[bytes, Principal] = {}
        budgets: dict[str, float | None] = {}
        for full_name, key in keys.items():
            name, max_cost_per_day = _without_budget(full_name)
            roles, name = re.findall(ROLE_PART, name), re.sub(ROLE_PART, "", name)
            for problem in filter(None, map(bad_role, roles)):
                raise DefinitionError(f"{full_name[:200]!r} is not a valid name for a key: {problem}")
            bare = name.removesuffix(ADMIN)
            if not re.fullmatch(r"[\w.@-]{1,64}", bare, re.ASCII):
                raise DefinitionError(
                    f"{name!r} is not a valid name for a key. Use up to 64 letters, digits and '_.@-'."
                )
            if len(key) < MIN_KEY_LENGTH or not re.fullmatch(r"[!-~]+", key):
                raise DefinitionError(
                    f"The key of {name!r} is invalid. A key has at least {MIN_KEY_LENGTH} visible ASCII characters and "
                    "no spaces. 'flockapi key' prints a new one."
                )
            if budgets.setdefault(bare, max_cost_per_day) != max_cost_per_day:
                raise DefinitionError(
                    f"The keys of {bare!r} have different budgets, and its runs can have one. Give each of them the "
                    "same max_cost_per_day, or another name."
                )
            principal = Principal(name=bare, admin=name.endswith(ADMIN), roles=roles, max_cost_per_day=max_cost_per_day)
            if principals.setdefault(_digest(key), principal) is not principal:
                raise DefinitionError(f"{name!r} has the same key as another name. Give each name its own key.")
        if not principals:
            raise DefinitionError("api_keys is empty, so every request would be rejected. Add a key, or omit api_keys.")
        self._principals = principals

    @property
    def roles(self) -> set[str]:
        """The roles that any key has."""
        return {role for principal in self._principals.values() for role in principal.roles}

    def find(self, key: str) -> Principal | None:
        """Return the principal of *key*, or None if the key is unknown. Both take the same time."""
        sent_digest, matching = _digest(key), None
        for digest, principal in self._principals.items():
            if hmac.compare_digest(digest, sent_digest):
                matching = principal
        return matching


def with_budget(name: str, max_cost_per_day: float | None) -> str:
    """Return the *name* of a key with a budget."""
    if max_cost_per_day is None:
        return name
    amount = f"{max_cost_per_day:.12f}".rstrip("0").rstrip(".")
    return f"{name}:max_cost_per_day:{amount}"


def _without_budget(name: str) -> tuple[str, float | None]:
    """Return the *name* of a key without its ``BUDGET``, and that. Raises DefinitionError."""
    found = re.search(BUDGET, name)
    if found is None:
        return name, None
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,12})?", found[1]) or not 0 < float(found[1]) <= MAX_COST:
        raise DefinitionError(
            f"{name!r} is not a valid name for a key: max_cost_per_day must be US dollars above 0 and up to "
            f"{MAX_COST:,}, such as ann:max_cost_per_day:2.50."
        )
    return name[: found.start()] + name[found.end() :], float(found[1])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def check_host(host: str, allowed: Collection[str]) -> None:
    """Raise WrongHost if *host* is not in *allowed*. With DNS rebinding, a foreign page sends its own host name."""
    name = re.sub(PORT, "", host).lower()
    if name not in allowed:
        raise WrongHost(
            f"The host {name[:100]!r} is not allowed. Allowed: {', '.join(sorted(allowed))}. If a proxy forwards this "
            "host, start the server with --allowed-host NAME (allowed_hosts= in Python)."
        )


def check_origin(headers: Mapping[str, str], allowed: Collection[str]) -> None:
    """Raise Forbidden if a page of another origin sends the request. It could run agents at the user's expense.

    Browsers report the source of a request in ``Sec-Fetch-Site``. Older browsers send only ``Origin``, which is
    compared with ``Host``. Other clients send neither. If the user follows a link, the browser does not name the origin
    of the linking page, so links are accepted if any origin is *allowed*.
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site:
        is_own = site in ("same-origin", "none")
    else:
        # urlsplit raises an error for "http://[".
        is_own = origin is None or origin.partition("://")[1:] == ("://", headers.get("host"))
    is_link = origin is None and headers.get("sec-fetch-dest") == "document" and bool(allowed)
    if not is_own and not is_link and origin not in allowed and "*" not in allowed:
        source = "another origin" if origin is None else f"the origin {origin[:100]}"
        raise Forbidden(
            f"Requests from {source} are not allowed. Enter the address by hand, or allow the origin with "
            "--cors-origin ORIGIN (cors_origins= in Python)."
        )


class ConcurrencyLimit:
    """The number of open streams, uploads or downloads that each caller may have at the same time.

    Args:
        resource: the plural noun for the error message.
    """

    def __init__(self, limit: int, resource: str) -> None:
        self._limit = limit
        self._resource = resource
        self._taken: Counter[Caller] = Counter()

    @contextlib.contextmanager
    def take(self, caller: Caller) -> Iterator[None]:
        """Hold one slot during the block. Raises TooManyRequests if no slot is free."""
        if self._taken[caller] >= self._limit:
            raise TooManyRequests(f"The limit is {self._limit} open {self._resource} per caller. Close one, or wait.")
        self._taken[caller] += 1
        try:
            yield
        finally:
            self._taken[caller] -= 1
            if not self._taken[caller]:
                del self._taken[caller]


class RateLimit:
    """The number of requests that each caller may send in a minute, in one burst or spread out."""

    def __init__(self, per_minute: int) -> None:
        if per_minute < 1:
            raise DefinitionError(f"max_requests_per_minute must be at least 1, not {per_minute}.")
        self._per_minute = per_minute
        self._full_at: dict[Caller, float] = {}
        self._cleanup_size = CLEANUP_SIZE

    def take(self, caller: Caller) -> dict[str, str]:
        """Count one request.

        Returns: the headers with the remaining quota (draft-ietf-httpapi-ratelimit-headers).

        Raises: TooManyRequests if the quota is used up.
        """
        at, interval_s = time.monotonic(), 60 / self._per_minute
        full_at = max(at, self._full_at.get(caller, at)) + interval_s
        available = int((at + 60 - full_at) / interval_s + 1e-6)
        headers = {"RateLimit-Policy": f'"minute";q={self._per_minute};w=60'}
        if full_at > at + 60 + 1e-6:
            wait_s = math.ceil(full_at - at - 60)
            message = f"The limit is {self._per_minute} requests per minute. Send the next one in {wait_s} s."
            raise TooManyRequests(message, wait_s, headers | {"RateLimit": f'"minute";r=0;t={wait_s}'})
        self._full_at[caller] = full_at
        if len(self._full_at) > self._cleanup_size:  # drop callers whose quota is full again
            self._full_at = {each: later for each, later in self._full_at.items() if later > at}
            self._cleanup_size = max(CLEANUP_SIZE, 2 * len(self._full_at))
        return headers | {"RateLimit": f'"minute";r={available};t={math.ceil(interval_s)}'}


def _forwarded(method: Method, find: str = "") -> Method:
    """Return *method* of the whole engine, for a ``ScopedEngine``.

    Args:
        find: the method that first checks that the principal may see the record with the id in the first argument.
    """
    name, id_name = method.__name__, list(inspect.signature(method).parameters)[1:2]

    @functools.wraps(method)
    def call(self: "ScopedEngine", *args: Any, **options: Any) -> Any:
        return getattr(self._engine, name)(*args, **options)

    @functools.wraps(method)
    async def call_if_found(self: "ScopedEngine", *args: Any, **options: Any) -> Any:
        await getattr(self, find)(args[0] if args else options[id_name[0]])
        return await call(self, *args, **options)

    forwarded: Any = call_if_found if find else call
    return cast(Method, forwarded)


async def _events_if(
    check: Callable[[], Awaitable[object]], events: AsyncGenerator[Event | None, None]
) -> AsyncGenerator[Event | None, None]:
    """Yield *events* after *check*."""
    await check()
    async with contextlib.aclosing(events):
        async for event in events:
            yield event


class ScopedEngine:
    """An ``Engine`` as one principal sees it. Runs and batches of others do not exist in it, except for an admin."""

    def __init__(self, engine: Engine, principal: Principal) -> None:
        self._engine = engine
        self._principal = principal

    @property
    def item_limits(self) -> ItemLimits:
        return self._engine.item_limits

    @property
    def calls_models(self) -> bool:
        return self._engine.calls_models

    @property
    def is_draining(self) -> bool:
        return self._engine.is_draining

    async def __aenter__(self) -> Self:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._engine.__aexit__(*exc_info)

    # For everybody: what a principal asks for here says nothing of others, or it has the record already

    drain = _forwarded(Engine.drain)
    check_ready = _forwarded(Engine.check_ready)
    health = _forwarded(Engine.health)
    observe = _forwarded(Engine.observe)
    queue = _forwarded(Engine.queue)
    check_budget = _forwarded(Engine.check_budget)
    secret = _forwarded(Engine.secret)
    shown_result = _forwarded(Engine.shown_result)
    watch = _forwarded(Engine.watch)

    def files(self, principal: str | None = None) -> FileBox:
        return self._engine.files(self._principal.name)

    # Runs

    async def submit(
        self, agent_name: str, inputs: Inputs, *, key: IdempotencyKey | None = None, **options: Any
    ) -> Run:
        options = {"principal": self._principal, **options, "key": self._own(key)}
        await self._check_own_budget(options["key"])
        if options.get("replaces"):
            await self.get_state(options["continues"])
        return await self._engine.submit(agent_name, inputs, **options)

    async def made_by(self, key: IdempotencyKey) -> str | None:
        return await self._engine.made_by(self._own(key) or key)

    async def get_run(self, run_id: str, principal: str | None = None) -> Run:
        return await self._engine.get_run(run_id, self._own_principal(principal))

    async def get_outline(self, run_id: str, principal: str | None = None) -> Run:
        return await self._engine.get_outline(run_id, self._own_principal(principal))

    async def get_state(self, run_id: str, principal: str | None = None) -> tuple[RunStatus, int]:
        return await self._engine.get_state(run_id, self._own_principal(principal))

    async def get_calls(self, run: Run) -> Mapping[int, Sequence[Call]]:
        return await self._engine.get_calls(run) if self._may_see(run) else {}

    wait = _forwarded(Engine.wait, "get_state")
    cancel_run = _forwarded(Engine.cancel_run, "get_state")
    delete_run = _forwarded(Engine.delete_run, "get_state")

    async def retry_run(
        self, run_id: str, max_cost: float | None = None, *, by: Principal | None = None, **options: Any
    ) -> Run:
        if self._principal.admin:
            await self._check_budget_of(await self.get_outline(run_id))
        else:
            await self.get_state(run_id)
            await self._check_own_budget(None)
        return await self._engine.retry_run(run_id, max_cost, by=by or self._principal, **options)

    async def send_message(
        self, run_id: str, name: str, message: msgspec.Raw, key: IdempotencyKey | None = None
    ) -> Run:
        await self.get_state(run_id)
        return await self._engine.send_message(run_id, name, message, self._own(key))

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        return await self._engine.list_runs(self._own_only(wanted))

    def events(self, run_id: str, after: int = 0, *, reasoning: bool = False) -> AsyncGenerator[Event | None, None]:
        check = functools.partial(self.get_state, run_id)
        return _events_if(check, self._engine.events(run_id, after, reasoning=reasoning))

    async def get_session(self, session_id: str, principal: str | None = None) -> Session:
        return await self._engine.get_session(session_id, self._own_principal(principal))

    async def delete_session(self, session_id: str, principal: str | None = None) -> None:
        await self._engine.delete_session(session_id, self._own_principal(principal))

    # Questions: the engine itself decides who may see them

    async def answer_call(self, run_id: str, call_id: str, output: msgspec.Raw, by: Principal | None = None) -> Run:
        return await self._engine.answer_call(run_id, call_id, output, by or self._principal)

    async def get_question(self, run_id: str, call_id: str, by: Principal | None = None) -> AskedQuestion:
        return await self._engine.get_question(run_id, call_id, by or self._principal)

    async def list_questions(self, wanted: QuestionFilter, wait_s: float = 0) -> QuestionPage:
        return await self._engine.list_questions(replace(wanted, by=self._principal), wait_s)

    def question_events(self, wanted: QuestionFilter) -> AsyncGenerator[tuple[str, AskedQuestion] | None, None]:
        return self._engine.question_events(replace(wanted, by=self._principal))

    # Usage

    async def _check_own_budget(self, key: IdempotencyKey | None) -> None:
        """Raise TooManyRequests if the principal has spent its budget of the day."""
        await self._engine.check_budget(self._principal.name, self._principal.max_cost_per_day, key)

    async def _check_budget_of(self, record: Run | Batch) -> None:
        """Raise TooManyRequests if the owner of *record* has, whoever sends the request."""
        if record.principal == self._principal.name:
            await self._check_own_budget(None)
        elif record.principal is not None:
            await self._engine.check_budget(record.principal)

    async def get_account(self, principal: str) -> Account:
        return await self._engine.get_account(self._own_principal(principal) or principal)

    async def get_usage(self, wanted: UsageFilter) -> UsagePage:
        return await self._engine.get_usage(self._own_only(wanted))

    # Batches

    async def submit_batch(
        self, agent_name: str, items: Items, options: BatchOptions, *, key: IdempotencyKey | None = None, **more: Any
    ) -> Batch:
        more = {"principal": self._principal, **more, "key": self._own(key)}
        await self._check_own_budget(more["key"])
        return await self._engine.submit_batch(agent_name, items, options, **more)

    async def get_batch(self, batch_id: str) -> Batch:
        batch = await self._engine.get_batch(batch_id)
        if not self._may_see(batch):
            raise BatchNotFound(batch_id)
        return batch

    wait_batch = _forwarded(Engine.wait_batch, "get_batch")
    get_items = _forwarded(Engine.get_items, "get_batch")
    cancel_batch = _forwarded(Engine.cancel_batch, "get_batch")
    delete_batch = _forwarded(Engine.delete_batch, "get_batch")

    async def retry_batch(
        self,
        batch_id: str,
        only: Statuses = (),
        max_cost: float | None = None,
        *,
        by: Principal | None = None,
        **options: Any,
    ) -> Batch:
        await self._check_budget_of(await self.get_batch(batch_id))
        return await self._engine.retry_batch(batch_id, only, max_cost, by=by or self._principal, **options)

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        return await self._engine.list_batches(self._own_only(wanted))

    def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        return _events_if(functools.partial(self.get_batch, batch_id), self._engine.batch_events(batch_id, after))

    def _own_only(self, filter_: Filter) -> Filter:
        """Return *filter_* for what the principal may see. Raises Forbidden if it names another principal."""
        if not self._principal.admin and filter_.principal not in (None, self._principal.name):
            raise Forbidden(
                f"{self._principal.name!r} is not an admin, and can only see its own runs, batches and usage."
            )
        return replace(filter_, principal=self._own_principal(filter_.principal))

    def _own_principal(self, asked: str | None) -> str | None:
        return asked if self._principal.admin else self._principal.name

    def _may_see(self, record: Run | Batch) -> bool:
        return self._principal.admin or record.principal == self._principal.name

    def _own(self, key: IdempotencyKey | None) -> IdempotencyKey | None:
        return key and replace(key, principal=self._principal.name)

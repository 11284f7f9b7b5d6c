"""What a request says: its id, its paths, its query, its headers, and whether its client is still connected."""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import quote

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Scope

from flock.runs import IdempotencyKey
from flock.web.wire import EventsQuery, query_from

__all__ = [
    "fingerprint_of",
    "idempotency_key",
    "last_event_of",
    "path_of",
    "query_of",
    "request_id_for",
    "request_id_of",
    "root_path",
    "traceparent_of",
    "while_connected",
]

T = TypeVar("T")
Query = TypeVar("Query", bound=msgspec.Struct)


def root_path(scope: Scope) -> str:
    """The path under which this app is mounted or proxied; links begin with it."""
    path: str = scope.get("root_path", "")
    return path.rstrip("/")


def path_of(scope: Scope) -> str:
    """The path of the request, as a link has it. ``Request.url`` fails if the query is not UTF-8."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=~")


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["flock.request_id"]
    return request_id


def request_id_for(scope: Scope) -> str:
    """The id that the client sent, or a new one."""
    sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    return sent if re.fullmatch(r"[\w.:-]{1,128}", sent, re.ASCII) else secrets.token_hex(16)


def query_of(request: Request, type_: type[Query], **absent: Any) -> Query:
    """The query as a struct, with what is *absent* if it is not sent. Raises InvalidData, which names the parameter."""
    return query_from(request.query_params.multi_items(), type_, **absent)


def traceparent_of(request: Request) -> str | None:
    """The trace that the request is part of; two of them are none."""
    sent = request.headers.getlist("traceparent")
    return sent[0] if len(sent) == 1 else None


def idempotency_key(request: Request, fingerprint: bytes | Callable[[], bytes]) -> IdempotencyKey | None:
    """The key of the request, if it has one: a string of structured fields, or the same without its quotes.

    Raises HTTPException 400 where it is neither.
    """
    sent = request.headers.get("idempotency-key")
    if sent is None:
        return None
    key = re.fullmatch(r'"?([\x21\x23-\x7e]{1,255})"?', sent)
    if key is None:
        raise HTTPException(400, "An Idempotency-Key has 1 to 255 visible ASCII characters, as a UUID has.")
    return IdempotencyKey(key[1], fingerprint)


def fingerprint_of(request: Request, body: bytes) -> bytes:
    return hashlib.sha256(request.scope["endpoint"].__name__.encode() + b" " + body).digest()


def last_event_of(request: Request) -> int:
    """The id of the last event that a reader knows. A browser that connects again sends the query as it was, too.

    Raises InvalidData, whether or not the query is what counts.
    """
    last_id, query = request.headers.get("last-event-id", ""), query_of(request, EventsQuery)
    return int(last_id) if re.fullmatch(r"\d{1,18}", last_id) else query.after


async def while_connected(request: Request, waiting: Awaitable[T]) -> T:
    """What *waiting* returns. If the client disconnects first, *waiting* is cancelled.

    Raises: what *waiting* raises; HTTPException 400 if the client disconnects, which nobody reads.
    """
    failure: Exception = HTTPException(400, "The client disconnected before it was answered.")

    async def watch_connection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_connection)
        try:
            return await waiting
        except Exception as exc:  # the group would wrap it
            failure = exc
        finally:
            tasks.cancel_scope.cancel()
    raise failure

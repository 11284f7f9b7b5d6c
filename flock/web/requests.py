"""Accessors of a request: its id, its paths, its query, its headers, and the connection of its client."""

import hashlib
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote, urlencode
from uuid import UUID

import anyio
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Scope

from flock.runs import IdempotencyKey
from flock.web.wire import EventsQuery, query_from

__all__ = [
    "fingerprint_of",
    "id_or_none",
    "idempotency_key",
    "last_event_of",
    "next_page",
    "or_none",
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
    """Return the path under which this app is mounted or proxied. Links begin with it."""
    path: str = scope.get("root_path", "")
    return path.rstrip("/")


def path_of(scope: Scope) -> str:
    """Return the path of the request, quoted for a link. ``Request.url`` fails if the query is not UTF-8."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=~")


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["flock.request_id"]
    return request_id


def request_id_for(scope: Scope) -> str:
    """Return the id that the client sent, or a new one."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    for name, value in headers:
        if name == b"x-request-id" and re.fullmatch(rb"[\w.:-]{1,128}", value):
            return value.decode()
    return secrets.token_hex(16)


def query_of(request: Request, type_: type[Query], **defaults: Any) -> Query:
    """Return the query as a struct. *defaults* replace missing parameters.

    Raises InvalidData, which names the parameter.
    """
    sent = request.query_params.multi_items() if request.scope["query_string"] else ()
    return query_from(sent, type_, **defaults)


def traceparent_of(request: Request) -> str | None:
    """Return the ``traceparent`` header. It is ignored if it was sent twice."""
    sent = request.headers.getlist("traceparent")
    return sent[0] if len(sent) == 1 else None


def idempotency_key(request: Request, fingerprint: bytes | Callable[[], bytes]) -> IdempotencyKey | None:
    """Return the idempotency key of the request, or None. It is a structured-field string, with or without quotes.

    Raises HTTPException 400 if it is invalid.
    """
    sent = request.headers.get("idempotency-key")
    if sent is None:
        return None
    key = re.fullmatch(r'"?([\x21\x23-\x7e]{1,255})"?', sent)
    if key is None:
        raise HTTPException(400, "The Idempotency-Key must be 1 to 255 visible ASCII characters, such as a UUID.")
    return IdempotencyKey(key[1], fingerprint)


def fingerprint_of(request: Request, body: bytes) -> bytes:
    return hashlib.sha256(request.scope["endpoint"].__name__.encode() + b" " + body).digest()


def last_event_of(request: Request) -> int:
    """Return the id of the last event that the client received: ``Last-Event-ID``, or else ``?after=``.

    The header wins, since a browser that reconnects repeats the original query. Raises InvalidData if the query is
    invalid, even if the header is used.
    """
    last_id, query = request.headers.get("last-event-id", ""), query_of(request, EventsQuery)
    return int(last_id) if re.fullmatch(r"\d{1,18}", last_id) else query.after


async def while_connected(request: Request, waiting: Awaitable[T]) -> T:
    """Await *waiting* and return its result. If the client disconnects first, cancel it.

    Raises: the error of *waiting*; HTTPException 400 if the client disconnects, which ends the handler.
    """
    failure: Exception = HTTPException(400, "The client disconnected before the response.")

    async def watch_connection() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch_connection)
        try:
            return await waiting
        except Exception as exc:  # raised after the task group, which would wrap it
            failure = exc
        finally:
            tasks.cancel_scope.cancel()
    raise failure


def or_none(value: T | msgspec.UnsetType) -> T | None:
    """Return *value*, or None if it is unset. A query has no null: ``?status=null`` is an invalid status."""
    return None if isinstance(value, msgspec.UnsetType) else value


def id_or_none(value: UUID | msgspec.UnsetType) -> str | None:
    """Return the id as it is stored, since a UUID can be written in several ways."""
    return None if isinstance(value, msgspec.UnsetType) else str(value)


def next_page(request: Request, last_id: str | None) -> tuple[str | None, Mapping[str, str]]:
    """Return the path of the page after *last_id*, and the ``Link`` header for it."""
    if last_id is None:
        return None, {}
    path = f"{path_of(request.scope)}?{urlencode({**request.query_params, 'after': last_id})}"
    return path, {"Link": f'<{path}>; rel="next"'}

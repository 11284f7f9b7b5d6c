"""Accessors of a request: its id, its paths, its query, its headers, and the connection of its client."""

import functools
import hashlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import quote, urlencode
from uuid import UUID

import anyio
import msgspec
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

from flock.errors import InvalidData
from flock.jsontype import example_for
from flock.nearest import did_you_mean
from flock.runs import IdempotencyKey
from flock.runs.traces import current

T = TypeVar("T")
Query = TypeVar("Query", bound=msgspec.Struct)

NUMBER = r"-?[0-9]{1,15}"
DECIMAL = r"[0-9]{1,15}(\.[0-9]{1,20})?([eE](\+?[0-9]{1,2}|-[0-9]{1,3}))?"
BOOLEANS = {"true": True, "false": False}


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
    return os.urandom(16).hex()


@functools.cache
def _fields_of(type_: type[msgspec.Struct]) -> Mapping[str, msgspec.structs.FieldInfo]:
    return {field.encode_name: field for field in msgspec.structs.fields(type_)}


@functools.cache
def _without_parameters(type_: type[Query]) -> Query | None:
    """Return the query of a request that has none; None if a parameter is required."""
    return None if any(field.required for field in _fields_of(type_).values()) else type_()


def query_of(request: Request, type_: type[Query], **defaults: Any) -> Query:
    """Return the query as a struct. *defaults* replace missing parameters.

    Raises InvalidData, which names the parameter.
    """
    if not request.scope["query_string"] and not defaults:
        query: Query | None = _without_parameters(type_)
        if query is not None:
            return query
    sent = QueryParams(request.scope["query_string"]).multi_items()  # not kept with the request while it waits
    fields = _fields_of(type_)
    is_open, ignored = not type_.__struct_config__.forbid_unknown_fields, request.app.options.ignore_query
    sent = [(name, value) for name, value in sent if name in fields or not (is_open or name in ignored)]
    if len({name for name, _ in sent}) < len(sent):
        raise InvalidData.of("A parameter of the query is repeated. Send it once.")
    for name, _ in sent:
        if name not in fields:
            raise InvalidData.of(f"The query has no parameter {name!r} here.{did_you_mean(name, fields)}")
    read: dict[str, Any] = defaults | dict(sent)
    for name, field in fields.items():
        if field.required and name not in read:
            raise InvalidData.of(f"{name!r} is missing in the query. Add ?{name}=")
    # Only numbers and booleans are converted here. msgspec would take a bare number as a valid time.
    for name, value in sent:
        default = fields[name].default
        if isinstance(default, bool):
            read[name] = BOOLEANS.get(value, value)
        elif (isinstance(default, int) or name in ("limit", "sample")) and re.fullmatch(NUMBER, value):
            read[name] = int(value)
        elif name in ("timeout_s", "max_cost", "max_failures") and re.fullmatch(DECIMAL, value):
            read[name] = float(value)
    try:
        return msgspec.convert(read, type_)
    except msgspec.ValidationError as exc:
        reason, _, path = str(exc).replace("`", "'").partition(" - at '$.")
        type_of = fields[path[:-1]].type
        known = [get_args(each) for each in (type_of, *get_args(type_of)) if get_origin(each) is Literal]
        reason += f". It must be one of {', '.join(known[0])}" if known else ""
        raise InvalidData.of(f"'{path[:-1]}' in the query: {reason}.{example_for(reason)}") from exc


def traceparent_of(request: HTTPConnection) -> str | None:
    """Return the trace context of a request: that of its span, or the ``traceparent`` header, unless it is repeated."""
    sent = request.headers.getlist("traceparent")
    return current(sent[0] if len(sent) == 1 else None)


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


def last_event_of(request: Request, after: int) -> int:
    """Return the id of the last event that the client received: ``Last-Event-ID``, or else *after* of the query.

    The header wins, since a browser that reconnects repeats the original query.
    """
    last_id = request.headers.get("last-event-id", "")
    return int(last_id) if re.fullmatch(r"[0-9]{1,18}", last_id) else after


async def while_connected(request: Request, waiting: Awaitable[T]) -> T:
    """Await *waiting* and return its result. If the client disconnects first, cancel it.

    Raises: the error of *waiting*; HTTPException 400 if the client disconnects, which ends the handler.
    """
    failure: Exception | None = None
    #: ends the task without an exception: a task group makes a cycle of that of a cancelled task
    watching = anyio.CancelScope()

    async def watch_connection() -> None:
        with watching:
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
            watching.cancel()
    try:
        raise failure or HTTPException(400, "The client disconnected before the response.")
    finally:
        del failure  # its traceback refers to this frame


def parameters_of(query: msgspec.Struct) -> dict[str, Any]:
    """Return the parameters of *query* without those that are unset. It has no null: ``?status=null`` is invalid.

    An id is returned as it is stored, since a UUID can be written in several ways.
    """
    sent = {name: value for name, value in msgspec.structs.asdict(query).items() if value is not msgspec.UNSET}
    return {name: str(value) if isinstance(value, UUID) else value for name, value in sent.items()}


def next_page(request: Request, last_id: str | None) -> tuple[str | None, Mapping[str, str]]:
    """Return the path of the page after *last_id*, and the ``Link`` header for it."""
    if last_id is None:
        return None, {}
    path = f"{path_of(request.scope)}?{urlencode({**request.query_params, 'after': last_id})}"
    return path, {"Link": f'<{path}>; rel="next"'}

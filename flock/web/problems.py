"""Errors as problem details (RFC 9457)."""

import logging
from collections.abc import Mapping
from http.client import responses
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    CallNotFound,
    Conflict,
    EngineFull,
    EngineStopped,
    Forbidden,
    InvalidData,
    KeyReused,
    MalformedJSON,
    RunNotFound,
    SessionNotFound,
    StoreError,
    TooLarge,
    TooManyRequests,
    Unauthenticated,
    WrongHost,
    cut,
)
from flock.web.requests import path_of, request_id_of
from flock.web.responses import JSONResponse
from flock.web.wire import Problem

__all__ = ["PLAIN", "PROBLEMS", "Kind", "on_error"]

logger = logging.getLogger("flock.api")


class Kind(NamedTuple):
    """How an error is reported, and for docs/errors.md its cause and what helps, in Markdown."""

    status: int
    title: str
    cause: str
    remedy: str

    @property
    def type(self) -> str:
        return f"urn:flockapi:problem:{self.title.lower().replace(' ', '-')}"

    @classmethod
    def plain(cls, status: int, cause: str, remedy: str) -> "Kind":
        return cls(status, responses[status], cause, remedy)


GONE = (
    "it never existed, was deleted, has expired (`--keep-for`), or belongs to another key",
    "check the id and the key",
)
RETRY_LATER = "wait as long as `Retry-After` says"

#: How each error class is reported. A class that is not listed uses the entry of its nearest base class.
PROBLEMS: Mapping[type[Exception], Kind] = {
    MalformedJSON: Kind(
        400,
        "Malformed JSON",
        "the body is not JSON, or is nested too deeply (`max_json_depth=`)",
        "`detail` has the line and the column; with curl, put the body in single quotes: `-d '{…}'`",
    ),
    InvalidData: Kind(
        422,
        "Invalid input",
        "a value is missing, unknown, or of the wrong type",
        "`errors` has the JSON pointer of each value, and its `line` if the body has lines",
    ),
    AgentNotFound: Kind(
        404,
        "Unknown agent",
        "no agent has this name",
        "`detail` suggests the nearest one, and `GET /agents` lists all",
    ),
    RunNotFound: Kind(404, "Unknown run", *GONE),
    CallNotFound: Kind(
        404,
        "Unknown call",
        "the run does not ask this question",
        "`GET /run/{run_id}` lists the open ones in `waiting_for`",
    ),
    BatchNotFound: Kind(404, "Unknown batch", *GONE),
    SessionNotFound: Kind(404, "Unknown session", *GONE),
    Unauthenticated: Kind(
        401,
        "Unauthorized",
        "the key is missing or unknown, or `auth=` found no user",
        "send `-H 'Authorization: Bearer YOUR_KEY'`; see [Security](security.md)",
    ),
    Forbidden: Kind(
        403,
        "Forbidden",
        "a page of another origin sent the request, or `/metrics` was requested without an admin's key",
        "allow the origin with [`--cors-origin`](security.md#browsers); use an admin's key",
    ),
    WrongHost: Kind(
        421,
        "Misdirected Request",
        "`Host` is neither a name of this machine nor an `--allowed-host`",
        "behind a proxy, start the server with [`--allowed-host NAME`](security.md#behind-nginx)",
    ),
    Conflict: Kind(
        409,
        "Conflict",
        "the state of the run does not allow this: cancel or answer after its end, delete before it, retry after it "
        "completed, a second answer",
        "read the run first",
    ),
    KeyReused: Kind(
        422,
        "Idempotency key reused",
        "the same `Idempotency-Key` was sent with another request",
        "use a new key for new work",
    ),
    TooLarge: Kind(
        413,
        "Content too large",
        "a body, a batch or the inputs of a run are above a [limit](limits.md)",
        "send less at once, or raise the limit that `detail` names",
    ),
    EngineFull: Kind(429, "Too many runs", "the queue is full", f"{RETRY_LATER}; raise `--max-queue`"),
    TooManyRequests: Kind(
        429,
        "Too many requests",
        "a key or a user sends too much, or has too many streams, uploads or downloads open",
        RETRY_LATER,
    ),
    EngineStopped: Kind(503, "Not running", "the server is starting or stopping", RETRY_LATER),
    StoreError: Kind(
        503,
        "Store unavailable",
        "the disk is full, or the file was moved or is locked",
        "the log says which; nothing that was accepted is lost. If you were waiting for a run, it continues, and "
        "`detail` says where to find its result",
    ),
    Exception: Kind(
        500,
        "Internal error",
        "a bug in the server, or in an `auth=` function or a route of yours",
        "the log has the traceback under the `request_id`",
    ),
}


#: The plain HTTP errors of this server. Their ``type`` is about:blank.
PLAIN = (
    Kind.plain(400, "a header is invalid, or the body broke off", "`detail` names the header"),
    Kind.plain(404, "there is no such path, or it ends in a slash", "`detail` names the path that may be meant"),
    Kind.plain(405, "the path does not support the method", "`Allow` has the methods"),
    Kind.plain(406, "results were requested in another format", "accept JSON, CSV or NDJSON"),
    Kind.plain(408, "the body took too long to arrive (`body_timeout_s=`)", "send less at once"),
    Kind.plain(
        415,
        "the `Content-Type` is not JSON (for a batch: JSON, CSV or NDJSON), or the body is compressed (a batch may use "
        "gzip)",
        "add `-H 'Content-Type: application/json'`",
    ),
    Kind.plain(431, "the headers are too long (`max_header_bytes=`)", "send fewer or shorter ones"),
    Kind.plain(503, "the server has too many connections (`--max-connections`)", RETRY_LATER),
)


#: Statuses that may be sent before the body was read. The connection is closed after them, since the rest of the body
#: would be parsed as the next request.
UNREAD = (401, 403, 408, 413, 415, 421, 431)


async def on_error(request: Request, exc: Exception, **more: Any) -> Response:
    """Return the problem for any exception, with *more* members."""
    headers: dict[str, str] = {}
    if isinstance(exc, HTTPException):
        # A plain HTTP error has the type about:blank and the phrase of its status as title (RFC 9457, section 4.2.1).
        status, type_, detail = exc.status_code, "about:blank", exc.detail
        title = responses.get(status, f"Status {status}")
        headers |= exc.headers or {}
    else:
        kind = next(PROBLEMS[cls] for cls in type(exc).__mro__ if cls in PROBLEMS)
        status, type_, title, detail = kind.status, kind.type, kind.title, str(exc)
        if status == 500:
            logger.error("request %s failed", request_id_of(request), exc_info=exc)
            detail = f"The server failed. Its log has the details under request {request_id_of(request)}."
        if status == 401:
            realm = "".join(c for c in request.app.contract.title if c.isascii() and c.isprintable() and c not in '"\\')
            headers["WWW-Authenticate"] = f'Bearer realm="{realm}"'
        if isinstance(exc, TooManyRequests):
            headers |= exc.headers
        if status in (429, 503):
            headers["Retry-After"] = str(getattr(exc, "retry_after_s", 1))
        if isinstance(exc, InvalidData):
            more["errors"] = exc.errors
    body = Problem(
        type=type_,
        title=title,
        status=status,
        detail=cut(detail),
        instance=path_of(request.scope),
        request_id=request_id_of(request),
        **more,
    )
    is_unread = status in UNREAD or request.scope.get("flock.is_unread", False)
    if is_unread and request.scope.get("http_version", "1.1").startswith("1"):
        headers["Connection"] = "close"
    return JSONResponse(body, status, headers, media_type="application/problem+json")

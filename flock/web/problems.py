"""Errors as problem details (RFC 9457)."""

import http
import logging
from collections.abc import Mapping
from typing import Any

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

__all__ = ["PROBLEMS", "on_error"]

logger = logging.getLogger("flock.api")

#: Status and title of each error class. A class that is not listed uses the entry of its nearest base class.
PROBLEMS: Mapping[type[Exception], tuple[int, str]] = {
    MalformedJSON: (400, "Malformed JSON"),
    InvalidData: (422, "Invalid input"),
    AgentNotFound: (404, "Unknown agent"),
    RunNotFound: (404, "Unknown run"),
    CallNotFound: (404, "Unknown call"),
    BatchNotFound: (404, "Unknown batch"),
    SessionNotFound: (404, "Unknown session"),
    Unauthenticated: (401, "Unauthorized"),
    Forbidden: (403, "Forbidden"),
    WrongHost: (421, "Misdirected Request"),
    Conflict: (409, "Conflict"),
    KeyReused: (422, "Idempotency key reused"),
    TooLarge: (413, "Content too large"),
    EngineFull: (429, "Too many runs"),
    TooManyRequests: (429, "Too many requests"),
    EngineStopped: (503, "Not running"),
    StoreError: (503, "Store unavailable"),
    Exception: (500, "Internal error"),
}


async def on_error(request: Request, exc: Exception, **more: Any) -> Response:
    """Return the problem for any exception, with *more* members."""
    if isinstance(exc, HTTPException):
        # A plain HTTP error has the type about:blank and the phrase of its status as title (RFC 9457, section 4.2.1).
        return _problem(request, exc.status_code, "about:blank", _phrase(exc.status_code), exc.detail, exc.headers)
    status, title = next(PROBLEMS[cls] for cls in type(exc).__mro__ if cls in PROBLEMS)
    detail, headers = str(exc), {}
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
    type_ = f"urn:flockapi:problem:{title.lower().replace(' ', '-')}"
    if isinstance(exc, InvalidData):
        more["errors"] = exc.errors
    return _problem(request, status, type_, title, detail, headers, **more)


#: Statuses that may be sent before the body was read. The connection is closed after them, since the rest of the body
#: would be parsed as the next request.
UNREAD = (401, 403, 408, 413, 415, 421, 431)


def _problem(
    request: Request,
    status: int,
    type_: str,
    title: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
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
        headers = {**(headers or {}), "Connection": "close"}
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _phrase(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return f"Status {status}"

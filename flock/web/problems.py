"""Errors as problem details (RFC 9457)."""

import logging
from collections.abc import Mapping
from http.client import responses
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock import errors
from flock.runs.records import shown_as
from flock.web.requests import path_of, request_id_of
from flock.web.responses import JSONResponse
from flock.web.wire import Problem, Question

logger = logging.getLogger("flock.api")


class Kind(NamedTuple):
    """How an error is reported."""

    status: int
    title: str

    @property
    def type(self) -> str:
        return f"urn:flockapi:problem:{self.title.lower().replace(' ', '-')}"


#: How each error class is reported. A class that is not listed uses the entry of its nearest base class.
PROBLEMS: Mapping[type[Exception], Kind] = {
    errors.MalformedJSON: Kind(400, "Malformed JSON"),
    errors.InvalidData: Kind(422, "Invalid input"),
    errors.NotFound: Kind(404, "Unknown file"),
    errors.AgentNotFound: Kind(404, "Unknown agent"),
    errors.RunNotFound: Kind(404, "Unknown run"),
    errors.CallNotFound: Kind(404, "Unknown call"),
    errors.BatchNotFound: Kind(404, "Unknown batch"),
    errors.SessionNotFound: Kind(404, "Unknown session"),
    errors.Unauthenticated: Kind(401, "Unauthorized"),
    errors.Forbidden: Kind(403, "Forbidden"),
    errors.WrongHost: Kind(421, "Misdirected Request"),
    errors.Conflict: Kind(409, "Conflict"),
    errors.KeyInUse: Kind(409, "Idempotency key in use"),
    errors.KeyReused: Kind(422, "Idempotency key reused"),
    errors.TooLarge: Kind(413, "Content too large"),
    errors.EngineFull: Kind(429, "Too many runs"),
    errors.TooManyRequests: Kind(429, "Too many requests"),
    errors.EngineStopped: Kind(503, "Not running"),
    errors.StoreError: Kind(503, "Store unavailable"),
    Exception: Kind(500, "Internal error"),
}

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
        if isinstance(exc, errors.TooManyRequests):
            headers |= exc.headers
        if status in (429, 503):
            headers["Retry-After"] = str(getattr(exc, "retry_after_s", 1))
        if isinstance(exc, errors.InvalidData):
            more["errors"] = exc.errors
        if isinstance(exc, errors.StaleAnswer):
            more["waiting_for"] = [shown_as(Question, question) for question in exc.open_questions]
    problem = Problem(
        type=type_,
        title=title,
        status=status,
        detail=errors.cut(detail),
        instance=path_of(request.scope),
        request_id=request_id_of(request),
        **more,
    )
    is_last = status in UNREAD or request.scope.get("flock.is_unread", False) or isinstance(exc, errors.EngineStopped)
    if is_last and request.scope.get("http_version", "1.1").startswith("1"):
        headers["Connection"] = "close"
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    for prefix, shape in getattr(request.scope.get("app"), "error_shapes", {}).items():
        if f"{path}/".startswith(f"{prefix}/"):
            status, body = shape(problem)
            return JSONResponse(body, status, headers)
    return JSONResponse(problem, status, headers, media_type="application/problem+json")

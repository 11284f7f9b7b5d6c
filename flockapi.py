"""The face: agents of a ``flock.core.Flock`` as a REST API.

    from flockapi import create_app

    app = create_app(flock)              # an ASGI application
    host.mount("/ai", app)               # under any path of another one

The wire is in the structs below, the way of a request in the order of this file: what comes in, what goes out, errors,
handlers, the route table, and the application that holds them. ``openapi.yaml`` is the contract; tests hold the two
together.
"""

import functools
import html
import http
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import anyio.lowlevel
import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

import flock as flock_package
from flock.core import Flock
from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    EngineFull,
    EngineStopped,
    FieldError,
    FlockError,
    InvalidData,
    MalformedJSON,
    RunNotFound,
    StoreError,
)
from flock.jsontype import JSONType, escape_pointer, malformed
from flock.runs import Batch, BatchOptions, Engine, Run, RunStatus, Usage

__all__ = [
    "AgentDetail",
    "AgentList",
    "AgentSummary",
    "FlockAPI",
    "FlockAPIRequest",
    "FlockAPIResponse",
    "FlockBatchRequest",
    "FlockBatchResponse",
    "JSONResponse",
    "Problem",
    "RunStep",
    "create_app",
]

logger = logging.getLogger("flock.api")

#: RFC 3339, in UTC.
Time = Annotated[datetime, msgspec.Meta(tz=True)]

#: How many times as long as a body its rows may become with their static inputs.
EXPANSION = 16

#: How many results one answer holds at most.
MAX_PAGE = 1000

# ---------------------------------------------------------------------------------------------------------------------
# What comes in
# ---------------------------------------------------------------------------------------------------------------------


class FlockAPIRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/flock``. ``use_production_tools`` is accepted from older clients, and means nothing."""

    agent_name: str
    inputs: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    async_run: bool = False
    use_production_tools: Any = None


class FlockBatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/batch``. ``use_temporal`` and ``silent_mode`` are accepted, and mean nothing."""

    agent_name: str
    batch_inputs: list[dict[str, msgspec.Raw]] | str
    static_inputs: dict[str, msgspec.Raw] | None = None
    input_mapping: dict[str, str] | None = None
    parallel: bool = True
    max_workers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    return_errors: bool = True
    box_results: bool = True
    write_to_csv: str | None = None
    use_temporal: Any = None
    silent_mode: Any = None


RUN_REQUEST = JSONType(FlockAPIRequest)
BATCH_REQUEST = JSONType(FlockBatchRequest)


async def read_json(request: Request) -> bytes:
    """The body of a JSON request, at most ``max_body_bytes`` of it.

    Raises:
        HTTPException: 415 for another content type, 413 for a longer body.
        MalformedJSON: it is empty, or not UTF-8.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        sent = f"{content_type!r} was sent" if content_type else "none was sent"
        detail = f"The body must be JSON, and say so ({sent}). With curl: -H 'Content-Type: application/json'"
        raise HTTPException(415, detail, headers={"Accept": "application/json"})
    limit = app_of(request).max_body_bytes
    too_long = HTTPException(413, f"The body is longer than {limit} bytes, all that this server takes at once.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_long
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_long
    except ClientDisconnect as exc:  # nobody will read the answer
        raise HTTPException(400, "The connection was closed before the whole body had arrived.") from exc
    if not body.strip():
        raise MalformedJSON("the body is empty", 1, 1)
    try:
        body.decode()  # a decoder skips over what it does not look into, such as the inputs
    except UnicodeDecodeError as exc:
        raise malformed(bytes(body), exc) from exc
    return bytes(body)


def sources_of(batch: FlockBatchRequest, position: int) -> dict[str, str]:
    """For each input of one item where the client wrote it, as a JSON pointer; the item wins over the static inputs.

    Raises InvalidData where two members of the item become the same input.
    """
    names = batch.input_mapping or {}
    sources = {name: f"/static_inputs/{escape_pointer(name)}" for name in batch.static_inputs or {}}
    own: set[str] = set()
    for key in batch.batch_inputs[position]:
        name, pointer = names.get(key, key), f"/batch_inputs/{position}/{escape_pointer(key)}"
        if name in own:
            raise InvalidData([FieldError(detail=f"Another member becomes the input {name!r} too.", pointer=pointer)])
        own.add(name)
        sources[name] = pointer
    return sources


async def rows_of(batch: FlockBatchRequest, max_bytes: int) -> list[msgspec.Raw]:
    """The inputs of each item: names mapped by ``input_mapping``, gaps filled from ``static_inputs``.

    Raises:
        InvalidData: the items are not a list, or two members become one input.
        HTTPException: 413 where the rows come to more than *max_bytes*; static inputs are sent once, and kept often.
    """
    if isinstance(batch.batch_inputs, str):
        detail = "Send the rows themselves, as a list of objects. No file of the server is read on a client's word."
        raise InvalidData([FieldError(detail=detail, pointer="/batch_inputs")])
    if batch.write_to_csv is not None:
        detail = "No file of the server is written on a client's word. Leave it out, and read the results over HTTP."
        raise InvalidData([FieldError(detail=detail, pointer="/write_to_csv")])
    names, static = batch.input_mapping or {}, batch.static_inputs or {}
    rows, total = [], 0
    for position, row in enumerate(batch.batch_inputs):
        if position % 1000 == 999:
            await anyio.lowlevel.checkpoint()  # others have their turn
        if names:
            sources_of(batch, position)  # raises where two become one
        encoded = msgspec.json.encode({**static, **{names.get(key, key): row[key] for key in row}})
        rows.append(msgspec.Raw(encoded))
        total += len(encoded)
        if total > max_bytes:
            raise HTTPException(413, f"With the static inputs the rows are longer than {max_bytes} bytes together.")
    return rows


def as_sent(exc: InvalidData, batch: FlockBatchRequest) -> InvalidData:
    """Errors of rows with pointers into what the client sent: names not yet mapped, gaps not yet filled."""
    errors = {}
    for error in exc.errors:
        pointer = error.pointer
        _, *tokens = pointer.split("/")
        if len(tokens) > 2:
            sources = {escape_pointer(name): place for name, place in sources_of(batch, int(tokens[1])).items()}
            pointer = "/".join([sources.get(tokens[2], "/".join(["", *tokens[:3]])), *tokens[3:]])
        errors[pointer, error.detail] = FieldError(detail=error.detail, pointer=pointer)
    return InvalidData(list(errors.values()))


def number_in_query(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not re.fullmatch(r"-?\d{1,10}", text) or not low <= int(text) <= high:
        detail = f"'{name}' in the query is a whole number from {low} to {high}."
        raise InvalidData([FieldError(detail=detail, pointer="")])
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# What goes out
# ---------------------------------------------------------------------------------------------------------------------


class RunStep(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's turn within a run."""

    agent_name: str
    started_at: Time
    completed_at: Time
    usage: Usage | None


class FlockAPIResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A run as it stands. ``batch_id`` and ``position`` are there for the items of a batch."""

    run_id: str
    agent_name: str
    status: RunStatus
    result: msgspec.Raw | None
    error: str | None
    error_type: str | None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    request_id: str | None
    usage: Usage | None
    steps: list[RunStep]
    batch_id: str | msgspec.UnsetType = msgspec.UNSET
    position: int | msgspec.UnsetType = msgspec.UNSET


class FlockBatchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it stands. ``results`` holds one page, in order; ``next`` is the path of the page behind it."""

    batch_id: str
    agent_name: str
    status: RunStatus
    total_items: int
    completed_items: int
    failed_items: int
    cancelled_items: int
    progress_percentage: float
    results: list[Any]
    next: str | None
    error: str | None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    request_id: str | None


class AgentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``GET /agents``."""

    name: str
    description: str


class AgentList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /agents``."""

    agents: list[AgentSummary]


class AgentDetail(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /agents/{name}``: what the agent takes and gives, as JSON Schema (2020-12)."""

    name: str
    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]


class JSONResponse(Response):
    """A struct as JSON. A newline ends it, so that a shell's prompt starts on its own line."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content) + b"\n"


def run_response(request: Request, run: Run, status_code: int = 200) -> Response:
    body = FlockAPIResponse(
        run_id=run.run_id,
        agent_name=run.agent_name,
        status=run.status,
        result=run.result,
        error=run.error,
        error_type=run.error_type,
        created_at=run.created_at,
        started_at=run.started_at,
        completed_at=run.completed_at,
        request_id=run.request_id,
        usage=run.usage,
        steps=[
            RunStep(agent_name=s.agent_name, started_at=s.started_at, completed_at=s.completed_at, usage=s.usage)
            for s in run.steps
        ],
        batch_id=msgspec.UNSET if run.batch_id is None else run.batch_id,
        position=msgspec.UNSET if run.position is None else run.position,
    )
    headers = {"Flock-Run-Status": run.status.value}
    return JSONResponse(body, status_code, headers | _accepted(request, f"/run/{run.run_id}", status_code))


def batch_response(request: Request, batch: Batch, items: Sequence[Run], status_code: int = 200) -> Response:
    last = items[-1].position if items else None
    more = last is not None and last + 1 < batch.total_items
    path = f"{root_path(request)}/batch/{batch.batch_id}"
    body = FlockBatchResponse(
        batch_id=batch.batch_id,
        agent_name=batch.agent_name,
        status=batch.status,
        total_items=batch.total_items,
        completed_items=batch.completed_items,
        failed_items=batch.failed_items,
        cancelled_items=batch.cancelled_items,
        progress_percentage=round(100 * batch.completed_items / batch.total_items, 2),
        results=[_item_result(run, batch.options) for run in items],
        next=f"{path}?after={last}&limit={len(items)}" if more else None,
        error=batch.error,
        created_at=batch.created_at,
        started_at=batch.started_at,
        completed_at=batch.completed_at,
        request_id=batch.request_id,
    )
    headers = {"Flock-Run-Status": batch.status.value}
    return JSONResponse(body, status_code, headers | _accepted(request, f"/batch/{batch.batch_id}", status_code))


def _item_result(run: Run, options: BatchOptions) -> Any:
    """What stands for one item in ``results``; null as long as there is nothing to say."""
    if run.result is not None:
        if options.box_results:
            return run.result
        members = msgspec.json.decode(run.result, type=dict[str, msgspec.Raw])
        return next(iter(members.values())) if len(members) == 1 else run.result
    if run.error is not None and options.return_errors:
        return {"error": run.error, "error_type": run.error_type}
    return None


def _accepted(request: Request, path: str, status_code: int) -> dict[str, str]:
    return {"Location": root_path(request) + path, "Retry-After": "1"} if status_code == 202 else {}


def root_path(request: Request) -> str:
    """The path under which this app is mounted or proxied; links begin with it."""
    path: str = request.scope.get("root_path", "")
    return path.rstrip("/")


# ---------------------------------------------------------------------------------------------------------------------
# Errors: RFC 9457
# ---------------------------------------------------------------------------------------------------------------------


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """Every error of the API (RFC 9457). ``errors`` is there for bad input, one entry for each place."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[FieldError] | msgspec.UnsetType = msgspec.UNSET


#: Class of error → status and title. A class that is not here is found by its bases.
PROBLEMS: Mapping[type[Exception], tuple[int, str]] = {
    MalformedJSON: (400, "Malformed JSON"),
    InvalidData: (422, "Invalid input"),
    AgentNotFound: (404, "Unknown agent"),
    RunNotFound: (404, "Unknown run"),
    BatchNotFound: (404, "Unknown batch"),
    EngineFull: (429, "Too many runs"),
    EngineStopped: (503, "Not running"),
    StoreError: (503, "Store unavailable"),
    Exception: (500, "Internal error"),
}


async def on_error(request: Request, exc: Exception) -> Response:
    """Any exception as a problem."""
    if isinstance(exc, HTTPException):
        # What HTTP itself says has no type of its own, and HTTP's words for a title (RFC 9457, section 4.2.1).
        return _problem(request, exc.status_code, "about:blank", _phrase(exc.status_code), exc.detail, exc.headers)
    status, title = next(PROBLEMS[cls] for cls in type(exc).__mro__ if cls in PROBLEMS)
    detail, headers = str(exc), {}
    if status == 500:
        logger.error("request %s failed", request_id_of(request), exc_info=exc)
        detail = f"The server failed; its log has more under request {request_id_of(request)}."
    if status in (429, 503):
        headers["Retry-After"] = str(getattr(exc, "retry_after_s", 1))
    type_ = f"urn:flockapi:problem:{title.lower().replace(' ', '-')}"
    errors = exc.errors if isinstance(exc, InvalidData) else msgspec.UNSET
    return _problem(request, status, type_, title, detail, headers, errors)


def _problem(
    request: Request,
    status: int,
    type_: str,
    title: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
    errors: list[FieldError] | msgspec.UnsetType = msgspec.UNSET,
) -> Response:
    body = Problem(
        type=type_,
        title=title,
        status=status,
        detail=detail,
        instance=request.url.path,
        request_id=request_id_of(request),
        errors=errors,
    )
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _phrase(status: int) -> str:
    if status == 413:  # older Pythons have the words of older RFCs
        return "Content Too Large"
    return http.HTTPStatus(status).phrase


# ---------------------------------------------------------------------------------------------------------------------
# Handlers
# ---------------------------------------------------------------------------------------------------------------------


def app_of(request: Request) -> "FlockAPI":
    app: FlockAPI = request.app
    return app


def request_id_of(request: Request) -> str:
    request_id: str = request.scope["flock.request_id"]
    return request_id


async def run_flock(request: Request) -> Response:
    """POST /run/flock"""
    wanted = RUN_REQUEST.decode(await read_json(request))
    engine = app_of(request).engine
    run = await engine.submit(
        wanted.agent_name, wanted.inputs, request_id=request_id_of(request), is_async=wanted.async_run
    )
    if wanted.async_run:
        return run_response(request, run, 202)
    return run_response(request, await engine.wait_run(run.run_id))


async def run_batch(request: Request) -> Response:
    """POST /run/batch"""
    wanted = BATCH_REQUEST.decode(await read_json(request))
    options = BatchOptions(
        max_workers=wanted.max_workers,
        parallel=wanted.parallel,
        return_errors=wanted.return_errors,
        box_results=wanted.box_results,
    )
    rows = await rows_of(wanted, EXPANSION * app_of(request).max_body_bytes)
    engine = app_of(request).engine
    try:
        batch = await engine.submit_batch(wanted.agent_name, rows, options, request_id=request_id_of(request))
    except InvalidData as exc:
        raise as_sent(exc, wanted) from exc
    return batch_response(request, batch, [], 202)


async def get_run(request: Request) -> Response:
    """GET /run/{run_id}"""
    return run_response(request, await app_of(request).engine.get_run(request.path_params["run_id"]))


async def get_batch(request: Request) -> Response:
    """GET /batch/{batch_id}"""
    after = number_in_query(request, "after", -1, -1, 2**31)
    limit = number_in_query(request, "limit", MAX_PAGE, 1, MAX_PAGE)
    engine, batch_id = app_of(request).engine, request.path_params["batch_id"]
    # The results first: then the counts are never behind them.
    items = await engine.get_items(batch_id, after=after, limit=limit)
    return batch_response(request, await engine.get_batch(batch_id), items)


async def list_agents(request: Request) -> Response:
    """GET /agents"""
    agents = app_of(request).flock.agents.values()
    return JSONResponse(AgentList(agents=[AgentSummary(name=a.name, description=a.description) for a in agents]))


async def get_agent(request: Request) -> Response:
    """GET /agents/{name}"""
    agents, name = app_of(request).flock.agents, request.path_params["name"]
    if name not in agents:
        raise AgentNotFound(name, list(agents))
    agent = agents[name]
    return JSONResponse(
        AgentDetail(
            name=agent.name,
            description=agent.description,
            input_schema=agent.input.schema,
            output_schema=agent.output.schema,
        )
    )


async def openapi_yaml(request: Request) -> Response:
    """GET /openapi.yaml"""
    return Response(app_of(request).openapi_yaml, media_type="application/yaml")


async def openapi_json(request: Request) -> Response:
    """GET /openapi.json"""
    return Response(app_of(request).openapi_json, media_type="application/json")


async def docs(request: Request) -> Response:
    """GET /docs: Swagger UI"""
    return _page(request, "docs.html")


async def redoc(request: Request) -> Response:
    """GET /redoc"""
    return _page(request, "redoc.html")


#: What the pages may load: files of this server. ReDoc would fetch a logo from elsewhere.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "worker-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _page(request: Request, name: str) -> Response:
    text = (STATIC / name).read_text("utf-8")
    title = html.escape(app_of(request).server_name)
    return Response(text.replace("{title}", title), media_type="text/html", headers=PAGE_HEADERS)


# ---------------------------------------------------------------------------------------------------------------------
# The route table, and the application
# ---------------------------------------------------------------------------------------------------------------------

PACKAGE = Path(flock_package.__file__).parent
STATIC = PACKAGE / "static"

ROUTES: Sequence[BaseRoute] = [
    Route("/run/flock", run_flock, methods=["POST"]),
    Route("/run/batch", run_batch, methods=["POST"]),
    Route("/run/{run_id}", get_run),
    Route("/batch/{batch_id}", get_batch),
    Route("/agents", list_agents),
    Route("/agents/{name}", get_agent),
    Route("/openapi.yaml", openapi_yaml),
    Route("/openapi.json", openapi_json),
    Route("/docs", docs, include_in_schema=False),
    Route("/redoc", redoc, include_in_schema=False),
    Mount("/static", StaticFiles(directory=STATIC)),
]


class FlockAPI(Starlette):
    """The ASGI application; ``create_app`` makes it.

    Attributes:
        flock: whose agents are served.
        engine: what carries the runs; it is open while the app's lifespan runs.
    """

    def __init__(self, flock: Flock, engine: Engine, *, server_name: str, max_body_bytes: int) -> None:
        super().__init__(
            routes=ROUTES,
            exception_handlers={FlockError: on_error, HTTPException: on_error, Exception: on_error},
            lifespan=lambda app: app.lifespan(),
        )
        self.flock = flock
        self.engine = engine
        self.server_name = server_name
        self.max_body_bytes = max_body_bytes

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Open the engine, and close it at the end. A server runs this; a host without one enters it by itself."""
        async with self.engine:
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give each request an id, and its response the same in ``X-Request-ID``, whatever becomes of it."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if re.fullmatch(r"[\w.:-]{1,128}", sent, re.ASCII) else uuid.uuid4().hex
        scope["flock.request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        await super().__call__(scope, receive, send_with_id)

    @functools.cached_property
    def openapi_yaml(self) -> bytes:
        """``openapi.yaml`` with ``server_name`` as its title."""
        beside = PACKAGE.parent / "openapi.yaml"  # in a checkout; a wheel has it inside the package
        text = (beside if beside.is_file() else PACKAGE / "openapi.yaml").read_text("utf-8")
        title = json.dumps(self.server_name)  # a JSON string is a YAML string
        return re.sub(r"(?m)^  title: .*$", lambda _: f"  title: {title}", text, count=1).encode()

    @functools.cached_property
    def openapi_json(self) -> bytes:
        """The same as JSON."""
        spec = json.loads((STATIC / "openapi.json").read_bytes())
        spec["info"]["title"] = self.server_name
        return msgspec.json.encode(spec) + b"\n"


def create_app(
    flock: Flock,
    *,
    server_name: str = "Flock Server",
    engine: Engine | None = None,
    store: str | Path = "flock.db",
    max_body_bytes: int = 1024 * 1024,
    expose_errors: bool = False,
) -> FlockAPI:
    """The agents of *flock* as an ASGI application.

    Args:
        server_name: the title of the docs pages and of the served specification.
        engine: what carries the runs; an embedded one on *store* if None.
        store: the SQLite file that keeps the runs; ``":memory:"`` keeps them as long as the app runs.
        max_body_bytes: the longest body a client may send; a longer one is answered with 413.
        expose_errors: show the text of any exception to clients; for development. Not beside ``engine``, which has
            the same switch.

    Returns:
        FlockAPI: serve it with any ASGI server, or mount it in another app. Runs are taken while its lifespan runs:
        a server sees to that; a host that mounts the app enters ``app.lifespan()`` in its own.
    """
    if engine is None:
        engine = flock.engine(store=store, expose_errors=expose_errors)
    return FlockAPI(flock, engine, server_name=server_name, max_body_bytes=max_body_bytes)

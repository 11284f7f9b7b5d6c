"""Agents of a ``flock.core.Flock`` as a REST API.

    from flockapi import create_app

    app = create_app(flock)              # an ASGI application
    host.mount("/ai", app)               # or mounted in another one

The file follows the path of a request: the application, the route table, the handlers, the responses. The structs of
the API are in ``flock.web.wire``. ``openapi.yaml`` is the contract. Tests check that the code matches it.
"""

import contextlib
import functools
import importlib
import logging
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import unquote

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flock.agents.agent import Agent
from flock.agents.checks import check_nobody_is_named, warn_of_missing_roles, warn_of_problems
from flock.agents.graph import graph_of, mermaid_of
from flock.agents.handoff import agent_of, columns_of
from flock.errors import DefinitionError, FlockError, Replayed, StoreError
from flock.extras import pip_install
from flock.fair import FairShare
from flock.formats import BY_MEDIA_TYPE
from flock.options import Option, check, replaced
from flock.rows.items import BatchItem, item_pages
from flock.runs import (
    DOLLAR,
    Batch,
    BatchFilter,
    Engine,
    Event,
    LongJSON,
    QuestionFilter,
    Run,
    RunFilter,
    RunStatus,
    now,
)
from flock.runs.events import end_id
from flock.runs.records import shown_as
from flock.runs.traces import of_request
from flock.runs.usage import next_day
from flock.steps.answers import is_of
from flock.web import orders, wire
from flock.web.auth import ANYBODY, ConcurrencyLimit, KeyRing, RateLimit
from flock.web.body import Body, media_type_of
from flock.web.contract import Contract
from flock.web.files import form_as_json, get_file, post_file
from flock.web.lifespan import lifespan_of
from flock.web.negotiation import preferences, preferred
from flock.web.options import AGENT_PROTOCOLS, PROTOCOL_MODULES, AppOptions, OnDisconnect
from flock.web.orders import download_slot, engine_of, read_json, replayed, serving, stream_slot
from flock.web.pages import DOCS, SPECIFICATION, UI, no_ui
from flock.web.problems import on_error
from flock.web.requests import (
    fingerprint_of,
    idempotency_key,
    last_event_of,
    next_page,
    parameters_of,
    query_of,
    request_id_for,
    request_id_of,
    root_path,
    traceparent_of,
    while_connected,
)
from flock.web.responses import (
    PIECE_BYTES,
    EventStream,
    JSONResponse,
    LimitedStream,
    LongResponse,
    PageResponse,
    add_headers,
    event_text,
    head_of_stream,
    split_message,
)
from flock.web.routing import (
    CORS,
    AppRoute,
    AppRouter,
    Auth,
    PublicMount,
    RouteMatch,
    allows_any_origin,
    api_key_auth,
    caller_of,
    principal_of,
)
from flock.web.webhooks import list_webhooks, retry_webhook, sender_of, urls_of
from flock.web.wire import *  # noqa: F403 - programs import the structs of the API from here

if TYPE_CHECKING:
    from flock.declared import DeclaredFlock
    from flock.web.metrics import Metrics
    from flock.web.ui import UIFile

__all__ = ["AppOptions", "Auth", "BatchItem", "FlockAPI", "JSONResponse", "OnDisconnect"]
__all__ += ["create_app", "engine_of", "principal_of"]

logger = logging.getLogger("flock.api")

T = TypeVar("T")
P = ParamSpec("P")

FLOCK = Option(is_valid=lambda value: hasattr(value, "shared_engine"), words="a Flock")

#: Logged when an app starts without ``api_keys=`` and without ``auth=``.
NO_AUTH = (
    "%s has no authentication. Every client that can reach it can run its agents, and read, cancel and delete all its "
    "runs and batches. FastAPI dependencies and Django logins do not protect a mounted app. Pass api_keys= or auth= to "
    'create_app, or auth="host" if the host lets only its own users reach the app.'
)

ANY_ORIGIN = (
    "The CORSMiddleware around %s allows the pages of any site. They get 403, since they could run agents through the "
    "browser of a user. Name the origins that may: create_app(cors_origins=['https://…'])."
)

#: The Idempotency-Key draft defines no header for a replay. This one is widely used.
REPLAYED = {"Idempotency-Replayed": "true"}

# ---------------------------------------------------------------------------------------------------------------------
# The application
# ---------------------------------------------------------------------------------------------------------------------


class FlockAPI(Starlette):
    """The agents of *flock* as an ASGI application. Serve it with any ASGI server, or mount it in another app.

    Args:
        options: all options as one value; see ``AppOptions``.
        given: options as keyword arguments. They override those in *options*.

    Raises: DefinitionError if an option or a key is invalid, or if metrics cannot be collected.

    Attributes:
        flock: the flock whose agents are served.
        contract: the specification as this app serves it.
        keys: the API keys, or None.
        metrics: the Prometheus metrics, or None.
        engine: the engine that executes the runs. It is open during the app's lifespan, or from the first request.
    """

    def __init__(self, flock: "DeclaredFlock", options: AppOptions | None = None, **given: Any) -> None:
        check("create_app", "flock", flock, FLOCK)
        self.options = options = replaced(options or AppOptions(), given)
        default_handlers = {FlockError: on_error, HTTPException: on_error, Exception: on_error}
        origins = options.cors_origins
        cors = [Middleware(CORSMiddleware, allow_origins=origins, **CORS)] if origins else []
        super().__init__(
            middleware=[*cors, *options.middleware],
            exception_handlers={**default_handlers, **(options.exception_handlers or {})},
        )
        if options.api_keys is not None and options.auth is not None:
            raise DefinitionError("auth= and api_keys= cannot be combined. Pass only one of them.")
        self.keys = None if options.api_keys is None else KeyRing(options.api_keys)
        auth = None if isinstance(options.auth, str) else options.auth
        per_minute = options.max_requests_per_minute
        protocols = [importlib.import_module(PROTOCOL_MODULES[name]) for name in dict.fromkeys(options.protocols)]
        self.error_shapes = {protocol.PREFIX: protocol.error_shape for protocol in protocols}
        more = [route for protocol in protocols for route in protocol.routes()]
        self.router = AppRouter(
            [
                *options.routes,
                *(ROUTES if options.docs else ROUTES[: -len(DOCS)]),
                *more,
                *(UI if options.create_ui else ()),
            ],
            auth=auth if self.keys is None else api_key_auth(self.keys),
            is_anonymous=options.api_keys is None and options.auth in (None, "anybody"),
            hosts=options.allowed_hosts,
            origins=origins,
            max_header_bytes=options.max_header_bytes,
            rate=None if per_minute is None else RateLimit(per_minute),
            default=no_ui,
            lifespan=lambda app: app.lifespan(),
        )
        self.flock = flock
        self._check_approvers()
        self.engine = options.engine or flock.shared_engine(store=options.store, expose_errors=options.expose_errors)
        self.contract = Contract(options.server_name, options.openapi_paths)
        self.ui_files = _ui_files(options, flock) if options.create_ui else {}
        self.event_streams = ConcurrencyLimit(options.max_event_streams, "event streams")
        self.uploads = ConcurrencyLimit(options.max_uploads_per_principal, "uploads")
        self.downloads = ConcurrencyLimit(options.max_downloads_per_principal, "downloads")
        self._lifespan = lifespan_of(self.engine)
        self._has_warned = False
        wants_metrics = find_spec("prometheus_client") is not None if options.metrics is None else options.metrics
        self.metrics = _metrics(self.engine, flock) if wants_metrics else None
        on_try = self.metrics.webhook_tried if self.metrics else lambda status, count: None
        self.webhooks = sender_of(self.engine, flock, options.webhook_secrets, on_try)

    def build_middleware_stack(self) -> ASGIApp:
        """Log the warnings, then build the stack. Starlette calls this once, before the first response."""
        self._warn_once()
        return super().build_middleware_stack()

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._check_approvers()  # of agents that were added since
            if self.options.api_keys is None and self.options.auth is None:
                logger.warning(NO_AUTH, self.contract.title)
            self.warn_of_problems()

    def warn_of_problems(self) -> None:
        """Log a WARNING for each problem that would make runs fail; see ``flock.agents.checks``."""
        warn_of_problems(self.flock.agents, self.flock.model, calls_models=self.engine.calls_models)
        if self.keys is not None:
            warn_of_missing_roles(self.flock.agents, self.keys.roles)

    def _check_approvers(self) -> None:
        """Raise DefinitionError if a tool names its approvers, and this app does not identify its users."""
        auth = self.options.auth
        if self.keys is None and (auth is None or isinstance(auth, str)):
            check_nobody_is_named(self.flock.agents, ' with auth="host"' if auth == "host" else "")

    @contextlib.asynccontextmanager
    async def lifespan(self) -> AsyncIterator[None]:
        """Open the engine, and close it at the end. A server runs this. A host enters it in its own lifespan.

        It may be entered several times, even by several apps that share an engine. The first entry opens the engine,
        and the last exit closes it. If it is never entered, the engine opens at the first request and closes with the
        event loop.
        """
        self._warn_once()  # a host enters it before the first response
        host_lifespan = contextlib.nullcontext() if self.options.lifespan is None else self.options.lifespan(self)
        async with self._lifespan.span(), host_lifespan:
            yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request. Its id is in the ``X-Request-ID`` header of every response, including errors.

        Responses get ``Cache-Control: no-store`` and ``X-Content-Type-Options: nosniff`` unless they set their own.
        """
        is_first = self.middleware_stack is None
        if is_first and not self.options.cors_origins and allows_any_origin(self, scope.get("app")):
            logger.warning(ANY_ORIGIN, self.contract.title)
        if scope["type"] != "http":
            await super().__call__(scope, receive, functools.partial(_send_lifespan, send))
            return
        above, below = scope.get("app_root_path", ""), scope.get("root_path", "")
        if above and not scope["path"].startswith(below) and (above + scope["path"]).startswith(below):
            # ASGI includes the root path in ``path``. Hypercorn omits it, and then no route below a mount would match.
            scope = {**scope, "path": above + scope["path"]}
        if scope["path"].endswith("/") and not (sent := unquote(scope.get("raw_path", b"/"))).endswith("/"):
            # Litestar appends a slash to ``path``, removes the path of the mount from it, and has no root path.
            scope = {**scope, "path": sent, "root_path": sent.removesuffix(scope["path"][:-1])}
        scope["flock.request_id"] = request_id = request_id_for(scope)
        scope["flock.found"] = route_match = RouteMatch()
        scope["flock.host"], scope["flock.ended"] = scope.get("app"), self._lifespan.ended
        status_code, started_at = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status_code
            if message["type"] == "http.response.start":
                status_code = message["status"]
                add_headers(message, request_id, route_match.headers)
            if len(message.get("body", b"")) <= PIECE_BYTES:
                await send(message)
                return
            for part in split_message(message):
                await send(part)

        with of_request(scope["method"], scope["path"], lambda: traceparent_of(Request(scope))) as span:
            try:
                await super().__call__(scope, receive, send_with_id)
            finally:
                template = getattr(route_match.route, "path", "")
                span.responded(scope["method"], template, status_code)
                if self.metrics is not None and status_code:
                    took_s = time.perf_counter() - started_at
                    self.metrics.request_ended(scope["method"], template, status_code, took_s)


def _ui_files(options: AppOptions, flock: "DeclaredFlock") -> "Mapping[str, UIFile]":
    from flock.web.ui import ui_files

    has_webhooks = any(urls_of(flock).values())
    return ui_files(options.server_name, has_docs=bool(options.docs), has_webhooks=has_webhooks)


def _metrics(engine: Engine, flock: "DeclaredFlock") -> "Metrics":
    """Raises DefinitionError if the extra is not installed, or its folder is not writable."""
    try:
        from flock.web.metrics import metrics_of

        return metrics_of(engine, flock.agents)
    except ImportError as exc:
        raise DefinitionError(f"metrics=True needs prometheus-client: {pip_install('prometheus-client')}") from exc
    except OSError as exc:
        raise DefinitionError(f"The folder in PROMETHEUS_MULTIPROC_DIR cannot be used: {exc}") from exc


async def _send_lifespan(send: Send, message: Message) -> None:
    """Send *message*. If our own error stopped the start, replace Starlette's traceback with the error's message."""
    exc = sys.exception()
    if message["type"] == "lifespan.startup.failed" and isinstance(exc, FlockError):
        message = {**message, "message": str(exc)}
    await send(message)


def _typed(make: Callable[..., T], options: Callable[P, object]) -> Callable[Concatenate["DeclaredFlock", P], T]:
    """Return *make*, typed with the keyword arguments of *options*."""
    return make


#: The public name of ``FlockAPI``, with typed options.
create_app = _typed(FlockAPI, AppOptions)


# ---------------------------------------------------------------------------------------------------------------------
# The route table
# ---------------------------------------------------------------------------------------------------------------------


def route_table() -> Sequence[AppRoute | PublicMount]:
    """Return every route: the access it needs (see ``Needs``), its methods, its path, and its handler."""
    return [
        AppRoute("access", "GET", "/agents", list_agents),
        AppRoute("access", "POST", "/run/flock", run_flock),
        AppRoute("access", "POST", "/run/batch", run_batch),
        AppRoute("access", "GET DELETE", "/run/{run_id}", one_run),
        AppRoute("access", "GET", "/runs", list_runs),
        AppRoute("access", "POST", "/files", post_file),
        AppRoute("access", "GET", "/files/{file_id}", get_file),
        AppRoute("access", "GET", "/questions", list_questions),
        AppRoute("access", "GET", "/questions/events", question_events),
        AppRoute("access", "GET", "/agents/{name}", get_agent),
        AppRoute("access", "POST", "/run/{run_id}/cancel", cancel_run),
        AppRoute("access", "POST", "/run/{run_id}/retry", retry_run),
        AppRoute("access", "GET POST", "/run/{run_id}/calls/{call_id}", one_question),
        AppRoute("access", "POST", "/run/{run_id}/messages/{name}", send_message),
        AppRoute("access", "GET", "/run/{run_id}/events", run_events),
        AppRoute("access", "GET DELETE", "/session/{session_id:path}", one_session),
        AppRoute("access", "GET", "/usage", get_usage),
        AppRoute("access", "GET", "/batches", list_batches),
        AppRoute("access", "GET DELETE", "/batch/{batch_id}", one_batch),
        AppRoute("access", "GET", "/batch/{batch_id}/results", batch_results),
        AppRoute("access", "GET", "/batch/{batch_id}/events", batch_events),
        AppRoute("access", "POST", "/batch/{batch_id}/cancel", cancel_batch),
        AppRoute("access", "POST", "/batch/{batch_id}/retry", retry_batch),
        AppRoute("nothing", "GET", "/healthz", healthz),
        AppRoute("nothing", "GET", "/readyz", readyz),
        AppRoute("admin", "GET", "/metrics", metrics),
        AppRoute("admin", "GET", "/webhooks", list_webhooks),
        AppRoute("admin", "POST", "/webhooks/{webhook_id}/retry", retry_webhook),
        *SPECIFICATION,  # /openapi.yaml and /openapi.json need nothing
        *DOCS,  # /docs, /redoc and /static need nothing
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Used by all handlers
# ---------------------------------------------------------------------------------------------------------------------


def wait_of(request: Request, query: wire.WaitQuery | wire.BatchQuery | None = None) -> int:
    """Return the seconds to wait: the requested time, capped at ``max_wait_s``. Raises InvalidData."""
    return min((query or query_of(request, wire.WaitQuery)).wait, serving(request).options.max_wait_s)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


async def run_flock(request: Request) -> Response:
    """POST /run/flock

    A client whose connection broke may repeat a synchronous request with an idempotency key. So its run is stored like
    an asynchronous one, and continues if the client disconnects.
    """
    prefer, reasoning = preferences(request.headers.getlist("prefer")), query_of(request, wire.StreamQuery).reasoning
    responds_async = "respond-async" in prefer
    if _prefers_events(request.headers.get("accept", "")):
        engine, order = await engine_of(request), await _order_of(request, responds_async)
        stream = await orders.stream(request, order, reasoning=reasoning)
        headers = REPLAYED if stream.accepted.is_replay else {}
        headers = {**headers, "Location": f"{root_path(request.scope)}/run/{stream.accepted.run.run_id}"}
        return event_stream(request, engine, stream.events, headers, stream.held, stream.on_cut_off)
    order = await _order_of(request, responds_async)
    is_async = order.is_async
    run, is_replay = await orders.accept(request, order)
    headers = REPLAYED if is_replay else {}
    if not is_async:
        run_id, outlives_client = run.run_id, run.is_async
        del run, order  # frees the inputs, which may be long, during the wait
        run = await orders.end_of(request, run_id, outlives_client)
    elif responds_async:
        applied = "respond-async"
        if re.fullmatch(r"[0-9]{1,9}", prefer.get("wait", "")):
            wait_s = min(int(prefer["wait"]), serving(request).options.max_wait_s)
            waiting = (await engine_of(request)).wait(run.run_id, wait_s)
            del run, order
            run = await while_connected(request, waiting)
            applied += f", wait={wait_s}"
        headers = {**headers, "Preference-Applied": applied}
    return await run_response(request, run, 200 if run.status.is_final else 202, headers)


@functools.lru_cache(maxsize=32)  # most clients send one of few values
def _prefers_events(accept: str) -> bool:
    return preferred(accept, ["application/json", EventStream.media_type]) == EventStream.media_type


async def _order_of(request: Request, responds_async: bool) -> orders.Order:
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
    body = await (form_as_json(request) if is_form else read_json(request))
    key = idempotency_key(request, lambda: fingerprint_of(request, body))
    sent = wire.RUN_REQUEST.decode(body)
    return orders.Order(
        agent_name=sent.agent_name,
        inputs=sent.inputs,
        is_async=sent.async_run or responds_async,
        timeout_s=sent.timeout_s,
        session_id=sent.session_id,
        max_cost=sent.max_cost,
        key=key,
    )


async def list_runs(request: Request) -> Response:
    """GET /runs"""
    query = query_of(request, wire.RunsQuery)
    sent = parameters_of(query)
    sent.pop("include", None)
    filter_ = RunFilter(**sent, with_inputs=query.includes("inputs"), with_results=query.includes("result"))
    page = await (await engine_of(request)).list_runs(filter_)
    shown_with = {"inputs": "inputs", "session_id": "inputs", "result": "result"}
    left_out = {name: msgspec.UNSET for name, other in shown_with.items() if not query.includes(other)}
    runs = [shown_as(wire.RunSummary, run, **waits_of(run), **left_out) for run in page]
    path, headers = next_page(request, page[-1].run_id if page.has_more else None)
    return PageResponse(wire.RunList(runs=runs, next=path), download_slot(request), headers=headers)


async def one_run(request: Request) -> Response:
    """GET and DELETE /run/{run_id}"""
    engine, run_id = await engine_of(request), request.path_params["run_id"]
    if request.method == "DELETE":
        await engine.delete_run(run_id)
        return Response(status_code=204)
    if wait_s := wait_of(request):
        run = await while_connected(request, engine.wait(run_id, wait_s))
    else:
        run = await engine.get_outline(run_id)
    return await run_response(request, run)


async def cancel_run(request: Request) -> Response:
    """POST /run/{run_id}/cancel"""
    engine, run_id, wait_s = await engine_of(request), request.path_params["run_id"], wait_of(request)
    run = await engine.cancel_run(run_id)
    if wait_s and not run.status.is_final:
        await while_connected(request, engine.wait(run_id, wait_s))
        run = await engine.cancel_run(run_id)  # raises Conflict if the run completed or failed
    return await run_response(request, run, 200 if run.status.is_final else 202)


async def retry_run(request: Request) -> Response:
    """POST /run/{run_id}/retry"""
    retry, engine = wire.RUN_RETRY.decode(await read_json(request, is_optional=True)), await engine_of(request)
    run = await engine.retry_run(request.path_params["run_id"], retry.max_cost, calls=retry.calls)
    return await run_response(request, run, 202)


async def list_questions(request: Request) -> Response:
    """GET /questions: the open questions that the caller may answer."""
    query = query_of(request, wire.QuestionsQuery)
    sent = parameters_of(query)
    wait_s = min(sent.pop("wait"), serving(request).options.max_wait_s)
    waiting = (await engine_of(request)).list_questions(QuestionFilter(by=ANYBODY, **sent), wait_s)
    page = await (while_connected(request, waiting) if wait_s else waiting)
    path, headers = next_page(request, page[-1].run_id if page.has_more else None)
    body = wire.QuestionList(questions=list(map(wire.asked_question, page)), next=path)
    return PageResponse(body, download_slot(request), headers=headers)


async def question_events(request: Request) -> Response:
    """GET /questions/events: the open questions that the caller may answer, and what happens to them."""
    sent, engine = parameters_of(query_of(request, wire.QuestionEventsQuery)), await engine_of(request)

    async def events() -> AsyncGenerator[Event | None, None]:
        async with contextlib.aclosing(engine.question_events(QuestionFilter(by=ANYBODY, **sent))) as found:
            async for event in found:
                if event is None:
                    yield None
                    continue
                name, asked = event
                data = msgspec.structs.asdict(wire.asked_question(asked))
                if name == "question.closed":
                    data = {"run_id": asked.run_id, "call_id": asked.question.call_id}
                yield Event(id=None, name=name, data={k: v for k, v in data.items() if v is not msgspec.UNSET})

    return event_stream(request, engine, events())


async def one_question(request: Request) -> Response:
    """GET and POST /run/{run_id}/calls/{call_id}: a question of the run, or the answer to it.

    A caller with the role of the question does not see the run.
    """
    run_id, call_id = request.path_params["run_id"], request.path_params["call_id"]
    by = principal_of(request) or ANYBODY
    if request.method != "POST":
        engine = await engine_of(request)
        return JSONResponse(wire.asked_question(await engine.get_question(run_id, call_id, by)))
    wait_s, answer = wait_of(request), wire.ANSWER.decode(await read_json(request))
    engine = await engine_of(request)
    run = await engine.answer_call(run_id, call_id, answer.output, by)
    if not is_of(run, by):
        return JSONResponse(wire.asked_question(await engine.get_question(run_id, call_id, by)))
    if wait_s and run.is_active:
        run = await while_connected(request, engine.wait(run_id, wait_s))
    return await run_response(request, run)


async def send_message(request: Request) -> Response:
    """POST /run/{run_id}/messages/{name}: a message of another system, which the run receives or is going to."""
    run_id, name, headers = request.path_params["run_id"], request.path_params["name"], {}
    body = await read_json(request)
    key = idempotency_key(request, lambda: fingerprint_of(request, f"{run_id} {name} ".encode() + body))
    engine = await engine_of(request)
    try:
        run = await engine.send_message(run_id, name, wire.MESSAGE.decode(body).message, key)
    except Replayed as exc:
        run, headers = await replayed(engine.get_outline(exc.made_id)), REPLAYED
    return await run_response(request, run, 202, headers)


async def one_session(request: Request) -> Response:
    """GET and DELETE /session/{session_id}: the runs that ``GET /runs?session_id=`` lists, for an admin of everyone."""
    engine, session_id = await engine_of(request), request.path_params["session_id"]
    if request.method != "DELETE":
        return JSONResponse(wire.shown_with_costs(wire.SessionSummary, await engine.get_session(session_id)))
    await engine.delete_session(session_id)
    return Response(status_code=204)


async def get_usage(request: Request) -> Response:
    """GET /usage: what the caller has spent, for an admin everyone. It stays when runs are deleted."""
    engine, principal, at = await engine_of(request), principal_of(request), now()
    wanted = query_of(request, wire.UsageQuery).filter_at(at.date())
    page, budget = await engine.get_usage(wanted), None
    if principal is not None:
        account = await engine.get_account(wanted.principal or principal.name)
        if account.max_cost is not None:
            cost = account.picodollars / DOLLAR
            budget = wire.UsageBudget(max_cost_per_day=account.max_cost, cost=cost, ends_at=next_day(at))
    path, headers = next_page(request, wire.after_usage(page, wanted.by))
    return JSONResponse(wire.usage_report(page, wanted, budget=budget or msgspec.UNSET, next=path), headers=headers)


async def run_events(request: Request) -> Response:
    """GET /run/{run_id}/events"""
    engine, run_id = await engine_of(request), request.path_params["run_id"]
    query = query_of(request, wire.RunEventsQuery)
    (status, attempt), after = await engine.get_state(run_id), last_event_of(request, query.after)
    if status.is_final and end_id(attempt) <= after:
        return Response(status_code=204)  # otherwise a browser would reconnect forever
    return event_stream(request, engine, engine.events(run_id, after, reasoning=query.reasoning))


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


async def run_batch(request: Request) -> Response:
    """POST /run/batch

    A request in JSON is read as a whole. Rows of a file are read as they arrive, so memory stays constant. A JSON array
    is a file if the query has ``agent_name``. With ``?dry_run=true`` the rows are read and checked in the same way, and
    nothing is stored.
    """
    # Imported here, because only batches need tables.
    from flock.engine.rowchecks import check_batch
    from flock.web.batches import batch_options, check_response, options_in_body, row_mapping_of, rows_of

    app, sent, json_body = serving(request), BY_MEDIA_TYPE[media_type_of(request, *BY_MEDIA_TYPE)], None
    format_ = None if sent.name == "json" and "agent_name" not in request.query_params else sent
    upload_slot: AbstractContextManager[None] = contextlib.nullcontext()
    if format_ is None:
        body = Body(request, app.options.max_body_bytes, app.options.body_timeout_s)
        json_body = await body.json(app.options.max_json_depth)
        key = idempotency_key(request, fingerprint_of(request, json_body))
    else:
        body = Body(request, app.options.max_upload_bytes, app.options.body_timeout_s)
        upload_slot = app.uploads.take(caller_of(request))
        key = idempotency_key(request, lambda: fingerprint_of(request, request.scope["query_string"] + body.digest()))
    engine, headers = await engine_of(request), {}
    try:
        if json_body is None:
            batch_request = wire.batch_request_from(query_of(request, wire.UploadQuery), app.options.max_json_depth)
        else:
            batch_request = options_in_body(request, json_body)
        with upload_slot:
            row_mapping = row_mapping_of(app.flock, app.options, batch_request, body)
            rows = rows_of(app.options, format_, batch_request, body, row_mapping)
            options = batch_options(batch_request)
            if query_of(request, wire.UploadQuery, agent_name="").dry_run:
                agent = app.flock.agents[batch_request.agent_name]
                files = engine.files() if agent.input.has_files else None
                check = await check_batch(engine, agent, files, rows, row_mapping, batch_request.on_invalid)
                return check_response(check, row_mapping)
            batch = await engine.submit_batch(
                batch_request.agent_name,
                rows,
                options,
                on_invalid=batch_request.on_invalid,
                request_id=request_id_of(request),
                traceparent=traceparent_of(request),
                key=key,
            )
    except Replayed as exc:
        batch, headers = await replayed(engine.get_batch(exc.made_id)), REPLAYED
    except FlockError:
        await body.drain()
        raise
    return batch_response(request, batch, [], 202, headers)


async def list_batches(request: Request) -> Response:
    """GET /batches"""
    filter_ = BatchFilter(**parameters_of(query_of(request, wire.BatchesQuery)))
    page = await (await engine_of(request)).list_batches(filter_)
    batches = [wire.shown_with_costs(wire.BatchSummary, batch) for batch in page]
    path, headers = next_page(request, page[-1].batch_id if page.has_more else None)
    return JSONResponse(wire.BatchList(batches=batches, next=path), headers=headers)


async def one_batch(request: Request) -> Response:
    """GET and DELETE /batch/{batch_id}"""
    engine, batch_id = await engine_of(request), request.path_params["batch_id"]
    if request.method == "DELETE":
        await engine.delete_batch(batch_id)
        return Response(status_code=204)
    query = query_of(request, wire.BatchQuery)
    if wait_s := wait_of(request, query):
        await while_connected(request, engine.wait_batch(batch_id, wait_s))
    # The results are read before the batch, so its counts include at least these results.
    items = await engine.get_items(batch_id, after=query.after, limit=query.limit) if query.results else None
    return batch_response(request, await engine.get_batch(batch_id), items, limit=query.limit)


async def batch_results(request: Request) -> Response:
    """GET /batch/{batch_id}/results: the items that have ended, in order, in constant memory."""
    from flock.rows.results import results_as
    from flock.web.batches import results_format

    query = query_of(request, wire.ResultsQuery)
    engine, batch_id = await engine_of(request), request.path_params["batch_id"]
    batch, (format_, dialect) = await engine.get_batch(batch_id), results_format(request, query)
    statuses = [final for final in RunStatus if final.is_final and query.status in (msgspec.UNSET, final.value)]
    headers = {
        "Flock-Run-Status": batch.status.value,
        "Vary": "Accept",
        "Content-Disposition": f'attachment; filename="{batch_id}.{format_.name}"',
    }
    if request.method == "HEAD":
        return head_of_stream(format_.media_type, headers)

    columns = columns_of(batch.agent_name, serving(request).flock.agents)
    pages = item_pages(engine, batch_id, after=query.after, limit=query.limit, statuses=statuses)
    options: Any = {"with_usage": query.usage, "has_invalid": batch.invalid_items > 0, "dialect": dialect}
    options["version_of"] = batch.version_of if batch.is_mixed else None
    stream = results_as(format_.name, pages, batch.extra_names, columns, query.escape_formulas, **options)
    slot = download_slot(request)
    return LimitedStream(stream, slot, headers, format_.media_type, is_awaited=bool(format_.extra))


async def batch_events(request: Request) -> Response:
    """GET /batch/{batch_id}/events"""
    engine, batch_id = await engine_of(request), request.path_params["batch_id"]
    after = last_event_of(request, query_of(request, wire.EventsQuery).after)
    batch = await engine.get_batch(batch_id)
    if batch.status.is_final and batch.attempt <= after:
        return Response(status_code=204)
    return event_stream(request, engine, engine.batch_events(batch_id, after))


async def cancel_batch(request: Request) -> Response:
    """POST /batch/{batch_id}/cancel"""
    engine, batch_id, wait_s = await engine_of(request), request.path_params["batch_id"], wait_of(request)
    batch = await engine.cancel_batch(batch_id)
    if wait_s and not batch.status.is_final:
        await while_connected(request, engine.wait_batch(batch_id, wait_s))
        batch = await engine.cancel_batch(batch_id)  # raises Conflict if the batch completed or failed
    return batch_response(request, batch, [], 200 if batch.status.is_final else 202)


async def retry_batch(request: Request) -> Response:
    """POST /batch/{batch_id}/retry"""
    retry = wire.BATCH_RETRY.decode(await read_json(request, is_optional=True))
    only = () if retry.only is None else (RunStatus(retry.only),)
    engine, batch_id = await engine_of(request), request.path_params["batch_id"]
    batch = await engine.retry_batch(batch_id, only, retry.max_cost, calls=retry.calls)
    return batch_response(request, batch, [], 202)


# ---------------------------------------------------------------------------------------------------------------------
# Agents, health and metrics
# ---------------------------------------------------------------------------------------------------------------------


async def list_agents(request: Request) -> Response:
    """GET /agents"""
    agents = serving(request).flock.agents.values()
    shown = [shown_as(wire.AgentSummary, agent, next_agent=next_agent_of(agent)) for agent in agents]
    return JSONResponse(wire.AgentList(agents=shown))


async def get_agent(request: Request) -> Response:
    """GET /agents/{name}"""
    app = serving(request)
    agents = app.flock.agents
    agent = agent_of(agents, request.path_params["name"])
    graph = graph_of(agent.name, agents)
    offered = [protocol for protocol in AGENT_PROTOCOLS if protocol in app.options.protocols]
    address = orders.address_of(request)
    return JSONResponse(
        shown_as(
            wire.AgentDetail,
            agent,
            next_agent=next_agent_of(agent),
            input_schema=agent.input.schema,
            output_schema=agent.output.result_schema,
            graph=graph,
            mermaid=mermaid_of(graph),
            urls={protocol: f"{address}/{protocol}/{agent.name}" for protocol in offered},
        )
    )


def next_agent_of(agent: Agent) -> str | msgspec.UnsetType | None:
    """Return the name of the next agent: None if the result of *agent* decides, UNSET if there is no next agent."""
    first, *_ = agent.handoffs()
    return (first.to or msgspec.UNSET) if first.kind == "fixed" else None


async def healthz(request: Request) -> Response:
    """GET /healthz: the process responds."""
    return JSONResponse(wire.Health())


async def readyz(request: Request) -> Response:
    """GET /readyz: the server accepts work, or the reason why it does not."""
    try:
        await (await engine_of(request)).check_ready()
    except FlockError as exc:
        health = serving(request).engine.health()
        store = "failing" if isinstance(exc, StoreError) else health.store
        return await on_error(request, exc, engine=health.engine, store=store)
    return JSONResponse(wire.Readiness())


async def metrics(request: Request) -> Response:
    """GET /metrics: for Prometheus. It also works while the engine or its store fails."""
    app, queue = serving(request), None
    if app.metrics is None:
        raise HTTPException(404, f"This server has no metrics. To enable them: {pip_install('prometheus-client')}")
    with contextlib.suppress(FlockError):
        queue = await (await engine_of(request)).queue()
    return Response(app.metrics.page(queue), media_type=app.metrics.media_type)


# ---------------------------------------------------------------------------------------------------------------------
# Responses
# ---------------------------------------------------------------------------------------------------------------------


async def run_response(
    request: Request, run: Run, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    engine = serving(request).engine
    has_begun = run.started_at is not None or run.attempt > 1
    may_have_calls = any(step.call_count for step in run.steps) or (has_begun and run.next_agent_name is not None)
    calls = await engine.get_calls(run) if may_have_calls else {}
    result = await engine.shown_result(run)
    results = [await engine.shown_result(run, at) for at in range(len(run.steps))]
    share, calls_at = FairShare(), dict[int, list[wire.RunCall]]()
    for at, made in calls.items():
        for call in made:
            calls_at.setdefault(at, []).append(wire.run_call(call))
            await share.checkpoint()
    steps = [
        wire.shown_with_costs(wire.RunStep, step, result=results[at], calls=calls_at.get(at, msgspec.UNSET))
        for at, step in enumerate(run.steps)
    ]
    body = wire.shown_with_costs(
        wire.FlockAPIResponse,
        run,
        result=result,
        steps=steps,
        calls=calls_at.get(len(run.steps), msgspec.UNSET),
        **waits_of(run),
    )
    headers = {"Flock-Run-Status": run.status.value, **(headers or {})}
    headers |= _accepted(request, f"/run/{run.run_id}", status_code)
    if any(isinstance(each, LongJSON) for each in (result, *results)):
        return LongResponse(body, status_code, headers, is_head=request.method == "HEAD")
    return JSONResponse(body, status_code, headers)


#: ``waits_of`` a run that waits for nothing.
NO_WAITS: dict[str, Any] = {"waiting_for": msgspec.UNSET, "waits": msgspec.UNSET}


def waits_of(run: Run) -> dict[str, Any]:
    """Return ``waiting_for``, the open questions of *run*, and ``waits``, its sleeps and awaited messages."""
    if not run.waiting_for:
        return NO_WAITS
    others = [
        wire.Wait(kind=wait.kind, name=wait.question or msgspec.UNSET, since=wait.asked_at, until=wait.expires_at)
        for wait in (run.waiting_for if run.status is RunStatus.WAITING else ())
        if wait.kind == "sleep" or wait.kind == "message"
    ]
    questions = [shown_as(wire.Question, question) for question in run.questions]
    return {"waiting_for": questions or msgspec.UNSET, "waits": others or msgspec.UNSET}


def batch_response(
    request: Request,
    batch: Batch,
    items: Sequence[Run] | None,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
    limit: int = wire.MAX_PAGE,
) -> Response:
    """Return a batch with one page of its results, or without results if *items* is None."""
    last = items[-1].position if items else None
    more = last is not None and last + 1 < batch.total_items
    path = f"{root_path(request.scope)}/batch/{batch.batch_id}"
    body = wire.shown_with_costs(
        wire.FlockBatchResponse,
        batch,
        results=msgspec.UNSET if items is None else [batch.result_of(run) for run in items],
        next=f"{path}?after={last}&limit={limit}" if more else None,
    )
    headers = {"Flock-Run-Status": batch.status.value, **(headers or {})}
    headers |= _accepted(request, f"/batch/{batch.batch_id}", status_code)
    return PageResponse(body, download_slot(request), status_code, headers)


def _accepted(request: Request, path: str, status_code: int) -> dict[str, str]:
    return {"Location": root_path(request.scope) + path, "Retry-After": "1"} if status_code == 202 else {}


def event_stream(
    request: Request,
    engine: Engine,
    events: AsyncGenerator[Event | None, None],
    headers: Mapping[str, str] | None = None,
    slot: AbstractContextManager[object] | None = None,
    on_cut_off: Callable[[], Awaitable[object]] | None = None,
) -> Response:
    """Stream *events* as they happen. The response is 429 if the caller has too many streams open."""
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})}
    if request.method == "HEAD":
        return head_of_stream(EventStream.media_type, headers)
    text = event_text(events, engine, request_id_of(request))
    return EventStream(text, slot or stream_slot(request), headers, on_cut_off=on_cut_off)


#: The route table, which all apps share.
ROUTES = route_table()

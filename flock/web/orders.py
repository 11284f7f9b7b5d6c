"""What happens to the run of a request, apart from how a protocol spells the request and the response.

Each handler that starts a run makes an ``Order`` of its request, and passes it to ``accept`` or ``stream``. So
disconnects, replays, time-outs, limits and the first text of a fast run are the same in each protocol.
"""

import contextlib
import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import anyio
import msgspec
from msgspec.structs import asdict
from starlette.exceptions import HTTPException
from starlette.requests import Request

from flock.agents.agent import Agent
from flock.errors import Conflict, FlockError, NotFound, Replayed, StoreError
from flock.jsontype import check_depth
from flock.runs import (
    ClientSettings,
    Engine,
    Event,
    IdempotencyKey,
    Inputs,
    Page,
    Question,
    Run,
    RunFilter,
    RunStatus,
    new_id,
)
from flock.steps.answers import can_answer
from flock.steps.identity import place_of
from flock.steps.replay import NESTED as NESTED
from flock.steps.retries import tool_call_of
from flock.web.auth import ANYBODY, ConcurrencyLimit, ScopedEngine
from flock.web.body import Body, media_type_of
from flock.web.lifespan import lifespan_of
from flock.web.options import AppOptions
from flock.web.requests import request_id_of, root_path, traceparent_of, while_connected
from flock.web.responses import EventStream, events_of_new_run
from flock.web.routing import caller_of, principal_of

if TYPE_CHECKING:
    from flock.declared import DeclaredFlock

logger = logging.getLogger("flock.api")

T = TypeVar("T")

#: Seconds before the server starts to watch the connection of a synchronous run for a disconnect.
WATCH_DELAY_S = 0.1


class Serving(Protocol):
    """What handlers need of the application."""

    options: AppOptions
    engine: Engine
    event_streams: ConcurrencyLimit
    uploads: ConcurrencyLimit
    downloads: ConcurrencyLimit
    metrics: Any
    flock: "DeclaredFlock"


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A run that a client asks for: arguments of ``Engine.submit``.

    Attributes:
        is_async: the client does not wait for the end, so the run continues if it disconnects.
    """

    agent_name: str
    inputs: Inputs
    is_async: bool = False
    timeout_s: float | None = None
    session_id: str | None = None
    continues: str | None = None
    replaces: bool = False
    max_cost: float | None = None
    client: ClientSettings | None = None
    key: IdempotencyKey | None = None


class Answers(msgspec.Struct, frozen=True):
    """Answers to questions of a run, by the ids of their calls. There may be none, to follow a run that exists.

    Attributes:
        is_async: the run continues if the client disconnects from its stream.
    """

    run_id: str
    outputs: Mapping[str, msgspec.Raw] = {}
    is_async: bool = True


#: What a request asks for.
Wanted = Order | Answers


class Accepted(NamedTuple):
    """A run that is stored. ``is_replay``: an earlier request with the same key has started it."""

    run: Run
    is_replay: bool


class Stream(NamedTuple):
    """The events of a run that was just accepted, until it ends or waits for an answer.

    Attributes:
        held: is exited when the response has ended.
        on_cut_off: is awaited if the client disconnects before; None if the run then continues.
    """

    accepted: Accepted
    events: AsyncGenerator[Event | None, None]
    held: AbstractContextManager[object]
    on_cut_off: Callable[[], Awaitable[object]] | None

    def response(self, content: AsyncGenerator[bytes, None], headers: Mapping[str, str] = {}) -> EventStream:
        """Return the response with *content*, which is made of the events."""
        headers = {"Flock-Run-Id": self.accepted.run.run_id, "X-Accel-Buffering": "no", **headers}
        return EventStream(content, self.held, headers, on_cut_off=self.on_cut_off)


def serving(request: Request) -> Serving:
    """Return the application of a request."""
    app: Serving = request.app
    return app


def address_of(request: Request) -> str:
    """Return the URL of this app, as the operator or the client says it."""
    here = f"{request.scope['scheme']}://{request.headers.get('host', '')}{root_path(request.scope)}"
    return (serving(request).options.public_url or here).rstrip("/")


def agents_of(request: Request) -> Mapping[str, Agent]:
    return serving(request).flock.agents


def owner_of(request: Request) -> str | None:
    """Return the name under which the caller's records are stored."""
    principal = principal_of(request)
    return None if principal is None else principal.name


async def engine_of(request: Request) -> Engine:
    """Return the engine, limited to the records of the caller. Open it first if the app's lifespan was not run."""
    engine = serving(request).engine
    try:
        await lifespan_of(engine).open(request.scope.get("flock.ended"))
    except StoreError as exc:  # the message has the store's path, which clients must not see
        logger.error("request %s: %s", request_id_of(request), exc)
        raise StoreError("The store cannot be opened now. The server's log has the reason.") from exc
    principal = principal_of(request)
    return engine if principal is None else ScopedEngine(engine, principal)


async def read_json(request: Request, *, is_optional: bool = False) -> bytes:
    """Return the body of a JSON request; see ``Body.json``. Raises HTTPException 415 for another content type.

    An optional body is ``{}`` by default. Generated clients send its content type even without one.
    """
    if is_optional and "content-type" not in request.headers:
        return b"{}"
    media_type_of(request, "application/json")
    options = serving(request).options
    body = Body(request, options.max_body_bytes, options.body_timeout_s)
    return await body.json(options.max_json_depth, default=b"{}" if is_optional else None)


def nested(request: Request, value: msgspec.Raw) -> msgspec.Raw:
    """Return *value*, which was JSON in a text of the body. Raises MalformedJSON if it is deeper than a body may be."""
    check_depth(bytes(value), serving(request).options.max_json_depth)
    return value


async def accept(request: Request, order: Wanted, run_id: str | None = None) -> Accepted:
    """Store a run, which then starts, or give answers to one, which then continues, even if the client disconnects.

    Raises: the errors of ``Engine.submit``; Conflict if an earlier request with the same key has started a run that no
        longer exists. Or the errors of ``Engine.answer_call``; the answers before the refused one count.
    Cancellation: counts as a disconnect; see ``end_of``.
    """
    engine, run_id = await engine_of(request), run_id or new_id()
    if isinstance(order, Answers):
        run, by = await engine.get_run(order.run_id), principal_of(request) or ANYBODY
        for call_id, output in order.outputs.items():
            run = await engine.answer_call(order.run_id, call_id, output, by)
        return Accepted(run, is_replay=False)
    try:
        run = await engine.submit(
            **asdict(order), request_id=request_id_of(request), traceparent=traceparent_of(request), run_id=run_id
        )
    except Replayed as exc:
        return Accepted(await replayed(engine.get_run(exc.made_id)), is_replay=True)
    except anyio.get_cancelled_exc_class():  # it may still be accepted
        await _cancel_unless(order.is_async or order.key is not None, request, run_id)
        raise
    return Accepted(run, is_replay=False)


async def end_of(request: Request, run_id: str, outlives_client: bool) -> Run:
    """Return the run when it has ended or waits for an answer.

    If the client disconnects first, cancel it unless *outlives_client* or the application says so.

    Raises: StoreError if the store fails during the wait. In this case, the run is not cancelled.
    Cancellation: counts as a disconnect, since some hosts cancel the request when the client disconnects.
    """
    engine = serving(request).engine
    try:
        run = await engine.wait(run_id, WATCH_DELAY_S)
        if not run.is_active:
            return run
        del run  # frees its inputs, which may be long, during the wait
        return await while_connected(request, engine.wait(run_id))
    except StoreError as exc:
        path = f"{root_path(request.scope)}/run/{run_id}"
        raise StoreError(f"{exc} The run was accepted and is not cancelled. GET {path} shows its status.") from exc
    except (HTTPException, anyio.get_cancelled_exc_class()):
        await _cancel_unless(outlives_client, request, run_id)
        raise


async def stream(request: Request, order: Wanted, *, reasoning: bool) -> Stream:
    """Accept an order or answers. The run is watched from before, so that no text is missed.

    Raises: the errors of ``accept``; TooManyRequests if the caller has too many streams open.
    """
    engine = await engine_of(request)
    with contextlib.ExitStack() as held:
        held.enter_context(stream_slot(request))  # before the run is accepted
        run_id = held.enter_context(watched(engine, order))
        accepted = await accept(request, order, run_id)
        run = accepted.run
        is_kept = order.is_async or (run.is_async and isinstance(order, Order))  # a run that has waited is async
        outlives_client = is_kept or serving(request).options.on_disconnect != "cancel"
        on_cut_off = None if outlives_client else functools.partial(engine.cancel_run, run.run_id)
        return Stream(accepted, events_of_new_run(engine, run, reasoning=reasoning), held.pop_all(), on_cut_off)


@contextlib.contextmanager
def watched(engine: Engine, order: Wanted, *, is_wanted: bool = True) -> Iterator[str]:
    """Return the id for the run of *order*. If *is_wanted*, what its agents write is kept during the block."""
    run_id = order.run_id if isinstance(order, Answers) else new_id()
    del order  # its inputs may be long
    with engine.watch(run_id) if is_wanted else contextlib.nullcontext():
        yield run_id


async def newest_runs(request: Request, session_id: str, status: RunStatus | None = None, **others: Any) -> Page[Run]:
    """Return a page of the caller's own runs of a session, newest first, without inputs and results."""
    wanted = RunFilter(session_id=session_id, status=status, principal=owner_of(request), **others)
    return await (await engine_of(request)).list_runs(wanted)


async def newest_run(
    request: Request, session_id: str, status: RunStatus | None = None, agent_name: str | None = None
) -> Run | None:
    """Return the caller's newest run of a session, without its inputs and result."""
    return next(iter(await newest_runs(request, session_id, status, agent_name=agent_name, limit=1)), None)


async def runs_of_session(
    request: Request, session_id: str, status: RunStatus | None = None
) -> AsyncGenerator[Run, None]:
    """Yield the caller's own runs of a session, newest first, without inputs and results."""
    after = None
    while True:
        page = await newest_runs(request, session_id, status, after=after)
        for run in page:
            yield run
        if not page.has_more:
            return
        after = page[-1].run_id


def approved_call(question: Question) -> tuple[str, str, str] | None:
    """Return the position, the id and the tool of the call that a question is about; None if it is about no call."""
    properties = msgspec.json.decode(question.schema).get("properties", {})
    if question.is_for_client or question.arguments is msgspec.UNSET or "approved" not in properties:
        return None
    call_id = tool_call_of(question.call_id)
    return place_of(question.call_id)[1], call_id, call_id.rpartition(NESTED)[2].rpartition(":")[0]


def may_answer(request: Request, run: Run, question: Question) -> bool:
    """Whether the caller may answer a question of a run."""
    return can_answer(question, run.principal, run.begun_by, principal_of(request) or ANYBODY)


async def cancel(request: Request, key: IdempotencyKey) -> None:
    """Cancel the run that was accepted with *key*. No effect if there is none, or if it has ended."""
    engine = await engine_of(request)
    run_id = await engine.made_by(key)
    if run_id is not None:
        with contextlib.suppress(NotFound, Conflict):
            await engine.cancel_run(run_id)


async def replayed(found: Awaitable[T]) -> T:
    """Return the run or batch of the earlier request with the same key. Raises Conflict if it was deleted."""
    try:
        return await found
    except NotFound as exc:
        raise Conflict(
            f"A request with this Idempotency-Key was accepted before, and its run or batch no longer exists. {exc}"
        ) from exc


async def _cancel_unless(outlives_client: bool, request: Request, run_id: str) -> None:
    app = serving(request)
    if not outlives_client and app.options.on_disconnect == "cancel":
        with anyio.CancelScope(shield=True), contextlib.suppress(FlockError):
            await app.engine.cancel_run(run_id)


@contextlib.contextmanager
def stream_slot(request: Request) -> Iterator[None]:
    """Hold the caller's slot for an event stream in the block. Raises TooManyRequests if none is free."""
    app = serving(request)
    counted = contextlib.nullcontext() if app.metrics is None else app.metrics.event_streams.track_inprogress()
    with app.event_streams.take(caller_of(request)), counted:
        yield


def download_slot(request: Request) -> AbstractContextManager[None]:
    """Return the caller's slot for a download or a long page. Entering it raises TooManyRequests if none is free."""
    return serving(request).downloads.take(caller_of(request))

"""A user program with every public name, which mypy and pyright check against the built wheel."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import UTC, date, datetime
from typing import Any, Literal, assert_type

import msgspec
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from flock import __version__
from flock.agents.agent import (
    Agent,
    AgentOptions,
    FunctionAgent,
    Handoff,
    ModelAgent,
    NextAgent,
    OnChange,
    OnInterrupt,
    Resources,
    ToolLike,
)
from flock.agents.history import Exchange
from flock.agents.hooks import ModelCall, ToolUse
from flock.agents.mcp import mcp_tools
from flock.agents.tools import Tool
from flock.core import (
    Audio,
    BatchInputs,
    Document,
    File,
    Flock,
    FlockFactory,
    History,
    Image,
    Messages,
    Model,
    Price,
    Result,
    agent,
    data_url,
)
from flock.errors import (
    ERROR_TYPES,
    AccessDenied,
    AgentError,
    AgentNotFound,
    BatchNotFound,
    CallError,
    CallNotFound,
    ChangedProgram,
    Conflict,
    CostLimit,
    DefinitionError,
    EngineFull,
    EngineStopped,
    Expired,
    FieldError,
    FlockError,
    Forbidden,
    Interrupted,
    InvalidData,
    InvalidHandoff,
    InvalidOutput,
    KeyInUse,
    KeyReused,
    MalformedJSON,
    ModelError,
    NotFound,
    OwnershipLost,
    QueueTimeout,
    Replayed,
    ResultTooLarge,
    RunFailed,
    RunNotFound,
    SessionNotFound,
    SignatureError,
    StaleAnswer,
    StepError,
    StoreError,
    TooLarge,
    TooManyRequests,
    TooManySteps,
    TooManyTokens,
    Unauthenticated,
    Uncertain,
    Unreadable,
    Unstorable,
    WrongHost,
    cut,
)
from flock.limits import Limits
from flock.models.completions import Completion, Message
from flock.runs import (
    DOLLAR,
    INVALID_INPUT,
    JSON_NULL,
    MAX_COST,
    MAX_SHOWN_BYTES,
    MAX_SHOWN_CALLS,
    NOT_LOADED,
    Account,
    Answer,
    AskedQuestion,
    Batch,
    BatchFilter,
    BatchOptions,
    Budget,
    Call,
    CallKind,
    CallOptions,
    ClientSettings,
    ClientTool,
    Engine,
    EngineHealth,
    Event,
    FileBox,
    Frame,
    IdempotencyKey,
    Inputs,
    ItemLimits,
    Items,
    Live,
    LongJSON,
    Mark,
    ModelOptions,
    Observer,
    OnExtra,
    OnInvalid,
    Page,
    Place,
    Principal,
    Progress,
    Question,
    QuestionFilter,
    QuestionPage,
    Queue,
    QueueLimits,
    Raised,
    RetriedCalls,
    Row,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    Session,
    Spent,
    Statuses,
    StatusName,
    Step,
    StepJournal,
    Time,
    Usage,
    UsageFilter,
    UsagePage,
    UsageRow,
    UsageSums,
    Webhook,
    added,
    bad_role,
    cost_in_words,
    end_id,
    event_of_batch,
    event_of_call,
    events_after,
    first_id_at,
    for_terminal,
    is_end_of_step,
    is_spent,
    make_ids_after,
    name_and_caller,
    new_id,
    next_day,
    now,
    of_request,
    one_line,
    run_in,
    safe_text,
    shown_as,
    shown_usage,
    spent_since,
    spent_with,
    started_id,
    statuses_of,
    steady_now,
    stub_of,
    valid_traceparent,
)
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from flockapi import (
    AgentDetail,
    AgentList,
    AgentSummary,
    AppOptions,
    Auth,
    BatchesQuery,
    BatchItem,
    BatchList,
    BatchQuery,
    BatchSummary,
    EventsQuery,
    FlockAnswer,
    FlockAPI,
    FlockAPIRequest,
    FlockAPIResponse,
    FlockBatchRequest,
    FlockBatchResponse,
    FlockBatchRetry,
    Health,
    JSONResponse,
    OnDisconnect,
    Problem,
    Readiness,
    ResultsQuery,
    RunEventsQuery,
    RunList,
    RunsQuery,
    RunStep,
    RunSummary,
    StreamQuery,
    UploadQuery,
    WaitQuery,
    create_app,
    engine_of,
    principal_of,
)

# Agents


@asynccontextmanager
async def pool() -> AsyncIterator[dict[str, int]]:
    yield {"size": 1}


def size_of_pool(context: RunContext[dict[str, int]]) -> int:
    assert_type(context.state, dict[str, int])
    return context.state["size"]


flock = Flock(
    "typed",
    model=["openai/gpt-4o", Model("ollama/llama3.2", max_concurrency=2)],
    max_steps=8,
    state=pool,
    prices={"ollama/llama3.2": Price(input=0.01, output=0.02)},
)


@flock.on_model_call
async def redact(call: ModelCall, ask: Callable[[ModelCall], Awaitable[Completion]]) -> Completion:
    assert_type(call.messages, list[Message])
    return await ask(call)


@flock.on_tool_call
async def count_calls(use: ToolUse, call: Callable[[], Awaitable[Any]], context: RunContext) -> Any:
    return await call() if use.arguments else context.agent_name


async def spent_on(engine: Engine, day: date) -> str:
    page: UsagePage = await engine.get_usage(UsageFilter(first_day=day, last_day=day, by=("model",)))
    sums = UsageSums(UsageFilter(first_day=day, last_day=day))
    sums.add(page.rows)
    rows: list[UsageRow] = [*sums.page.rows]
    account: Account = await engine.get_account("ann")
    ann = Principal(name="ann", max_cost_per_day=2.5)
    await engine.check_budget(ann.name, ann.max_cost_per_day)
    spent: tuple[Spent, ...] = spent_with((), "measure", "openai/gpt-4o", page.total)
    assert_type(spent_since(spent, spent), list[Spent])
    return f"{len(rows)} until {next_day(now())}" if account.is_spent else cost_in_words(page.total)


async def cost_of(engine: Engine, session_id: str) -> str:
    session: Session = await engine.get_session(session_id)
    usage = added(session.usage, Usage(input_tokens=1))
    assert_type(shown_usage(usage), dict[str, Any])
    return "too much" if is_spent(usage, min(1.0, MAX_COST, DOLLAR)) else cost_in_words(usage)


@flock.agent
def measure(text: str, context: RunContext) -> int:
    context.progress(1, 2, "half")
    if context.cancel_requested or not text:
        raise AgentError("There is nothing to measure.")
    return len(text)


@flock.agent
async def polish(text: str) -> AsyncIterator[str | Result]:
    yield text
    yield Result(text.title())


@flock.agent
async def measure_once(text: str, context: RunContext) -> int:
    try:
        length: int = await context.call(len, text, name="length", keep="result")
        found: dict[str, Any] = await context.run_agent("measure", {"text": text}, options={"top_p": 0.5})
        assert found
        await context.call(len, text, call_once=True)
    except Uncertain:
        return -1
    except CallError as error:
        raise AgentError(context.idempotency_key) from error
    return length


@flock.agent
async def approve(text: str, context: RunContext) -> bool:
    assert_type(await context.ask("A number?", int, name="number", expires_s=60, default=1), int)
    assert_type(await context.receive("number", int, expires_s=60, default=1), int)
    assert_type(await context.sleep(1), None)
    async with context.timeout(60) as nothing:
        assert_type(nothing, None)
    await context.sleep_until(datetime.now(UTC))
    assert_type(context.is_suspending, bool)
    assert_type(context.principal, Principal | None)
    assert_type(context.session_id, str | None)
    assert_type(await context.ask("Send it?", bool, answerer="senders", expires_s=60), bool)
    answer: Literal["yes", "no"] = await context.ask(f"Send {text}?", Literal["yes", "no"])
    return answer == "yes"


def answered(question: Question) -> Any:
    assert_type(question.expires_at, datetime | None)
    return question.question


async def answer_all(engine: Engine, run: Run, answer: Answer) -> None:
    await engine.send_message(run.run_id, "number", msgspec.Raw(b"1"))
    for question in run.questions:
        assert_type(await engine.answer_call(run.run_id, question.call_id, answer(question)), Run)


def name_of(call: Call) -> str:
    assert_type(call.is_checkpoint, bool)
    kind: CallKind = call.kind
    if len(call.result) > MAX_SHOWN_BYTES + MAX_SHOWN_CALLS or call.result in (JSON_NULL, NOT_LOADED):
        return kind
    return call.call_id if call.error is None else call.name


@agent(name="other", next_agent="measure", max_concurrency=2, on_interrupt="fail", on_retry="again")
async def shout(text: str) -> str:
    return text.upper()


options: AgentOptions = {"next_agent": "measure", "max_concurrency": 2}
assert_type(flock.agent(**options)(shout), FunctionAgent)


@agent
def last_words(messages: Messages) -> str:
    return messages[-1].content


then: NextAgent = "measure"
again: OnInterrupt = "retry"
if_changed: OnChange = "continue"


def instructed(context: RunContext) -> str:
    return f"You are called by {context.principal}."


async def edited(messages: list[dict[str, Any]], context: RunContext) -> list[dict[str, Any]]:
    return messages[-2:]


async def checked(answer: dict[str, Any], context: RunContext) -> dict[str, Any]:
    if not answer["mood"]:
        raise AgentError(f"{context.agent_name} must name a mood.")
    return answer


model_options: ModelOptions = {"tool_choice": "required", "extra_body": {"service_tier": "flex"}}
analyst = FlockFactory.create_default_agent(
    name="analyst",
    input="text: str",
    output="mood: str",
    examples=[({"text": "hi"}, {"mood": "calm"})],
    reasoning=True,
    history=History(turns=20, calls=True, max_tokens=1000, edit=edited),
    instructions=instructed,
    validate=checked,
    options=model_options,
    next_agent=then,
    on_interrupt=again,
    on_change=if_changed,
)


async def must_ask(text: str) -> bool:
    return len(text) > 10


tools: list[ToolLike] = [
    shout,
    Tool(measure_once, name="measure", description="Measure.", needs_approval=True),
    Tool(shout, needs_approval=must_ask, approver="senders", four_eyes=True, may_edit=True),
    Tool(analyst, name="ask_analyst", needs_approval=True, expires_s=60, on_expiry="deny"),
    analyst,
    "triage",
]
tools.append(mcp_tools("https://example.com/mcp", headers={"Authorization": "Bearer x"}, timeout_s=5))
tools.append(mcp_tools("https://example.com/mcp", prefix="pay_", only=["pay"], needs_approval=True, approver="senders"))


class Refund(msgspec.Struct):
    amount: int


class Asked(msgspec.Struct):
    text: str


assert_type(FlockFactory.create_default_agent("either", output=Refund | Asked), ModelAgent)
triage = FlockFactory.create_default_agent(
    name="triage",
    output="kind: Literal['a', 'b', 'c']",
    tools=tools,
    max_tool_calls=3,
    tool_timeout_s=10,
    next_agent={"a": "measure", "b": analyst, "c": None},
)
triage.next_agent = {"kind": {"a": shout, "b": None, "c": None}}
assert_type(triage.handoffs(), list[Handoff])
assert_type(measure, FunctionAgent)
assert_type(analyst, ModelAgent)
assert_type(flock.add_agent(shout), Agent)
assert_type(flock.add_agent(len), Agent)
assert_type(flock.run("measure", {"text": "hi"}), dict[str, Any])
rows: BatchInputs = "rows.csv"
assert_type(flock.run_batch("measure", rows, max_workers=2, progress=False), list[Any])


class Fixed(Agent):
    async def execute(self, inputs: Any, resources: Resources, context: RunContext) -> msgspec.Raw:
        context.spend(Usage(input_tokens=1))
        assert_type(context.journal, StepJournal)
        assert_type(list(await resources.history(self, 5)), list[Exchange])
        return self.output.encode({"answer": 42})


# Without HTTP


class Measured(msgspec.Struct):
    length: int


class Counter(Observer):
    ended = 0

    def step_completed(self, step: Step) -> None: ...

    def run_ended(self, run: Run) -> None:
        self.ended += run.status is RunStatus.COMPLETED


async def use(engine: Engine, inputs: Inputs) -> Progress | None:
    observer: Observer = Counter()
    engine.observe(observer)
    assert_type(engine.health(), EngineHealth)
    assert_type(engine.item_limits, ItemLimits)
    assert_type(await engine.queue(), Queue)
    run = await engine.submit("measure", inputs, timeout_s=3, key=IdempotencyKey("k", b"f"), request_id=new_id())
    await engine.submit("measure", inputs, run_id=new_id(), watch=True)
    assert_type(await engine.wait(run.run_id, 2.5), Run)
    with engine.watch(run.run_id):
        async for event in engine.events(run.run_id, started_id(1, 0), reasoning=True):
            assert_type(event, Event | None)
            if event is not None and event.id is not None:
                print(is_end_of_step(event.id))
    await batches(engine, [{"text": "a"}, Row(inputs=msgspec.Raw(b"{}"), line=2)], "skip")
    assert_type(run.value, Any)
    assert_type(run.value_as(dict[str, int]), dict[str, int])
    assert_type(run.value_as(Measured).length, int)
    status: StatusName = "starting"
    statuses: Statuses = [status, RunStatus.FAILED]
    assert_type(statuses_of(statuses), tuple[RunStatus, ...])
    await engine.list_runs(RunFilter(status=status))
    page: Page[Run] = await engine.list_runs(RunFilter(status=RunStatus.FAILED, created_after=now()))
    for item in page:
        print(one_line(safe_text(item.error)), [step.usage for step in item.steps], len(list(events_after(item))))
        print(for_terminal(f"{item.value}{of_request(item.request_id)}"), list(events_after(item, end_id(1))))
    make_ids_after(run.run_id)
    assert_type(steady_now()(), datetime)
    assert_type(run_in(run, next(iter(events_after(run)))), Run)
    assert_type(valid_traceparent("00-"), str | None)
    return run.progress


async def batches(engine: Engine, items: Items, on_invalid: OnInvalid) -> None:
    batch = await engine.submit_batch("measure", items, BatchOptions(max_workers=2), on_invalid=on_invalid)
    found_batch = await engine.get_batch(batch.batch_id)
    assert_type(found_batch.versions, tuple[str, ...])
    assert_type(found_batch, Batch)
    assert_type(await engine.wait_batch(batch.batch_id, 2.5), Batch)
    for item in await engine.get_items(batch.batch_id, after=0, limit=10, statuses=[RunStatus.FAILED]):
        print(item.position, item.error_type == INVALID_INPUT)
    async for event in engine.batch_events(batch.batch_id):
        assert_type(event, Event | None)
    await engine.get_items(batch.batch_id, statuses=["failed", "cancelled"])
    await engine.list_batches(BatchFilter(status="running"))
    kept: RetriedCalls = "keep"
    await engine.retry_batch(batch.batch_id, only=["failed"], calls=kept)
    client = ClientSettings(tools=(ClientTool(name="screen"),), instructions="Be brief.", max_output_tokens=100)
    assert_type((await engine.submit("writer", {}, client=client)).client, ClientSettings | None)
    await engine.retry_run("1", calls="again", by=Principal(name="ann", roles=("senders",)))
    assert_type(await engine.get_question("1", "ask:1@1.0"), AskedQuestion)
    page = await engine.list_questions(QuestionFilter(by=Principal(name="ann"), role="senders", limit=10), wait_s=5)
    assert_type(page, QuestionPage)
    for each in page:
        assert_type(each.status, Literal["open", "answered", "closed"])
    async for named in engine.question_events(QuestionFilter()):
        assert_type(named, tuple[str, AskedQuestion] | None)
    assert_type(bad_role("senders"), str | None)
    assert_type(name_and_caller("ann")[0], str | None)
    for found in await engine.list_batches(BatchFilter(status=RunStatus.RUNNING)):
        assert_type(await engine.cancel_batch(found.batch_id), Batch)
        assert_type(await engine.retry_batch(found.batch_id, [RunStatus.CANCELLED]), Batch)
        await engine.delete_batch(found.batch_id)
    print(event_of_batch(batch).name, batch.eta_s)


async def main() -> None:
    async with flock.engine(store="runs.db", keep_runs=1000) as engine:
        await use(engine, {"text": "hi"})
    limits = Limits(max_queue=100, keep_for_s=None)
    assert_type(limits.max_queue_per_principal, int | None)
    flock.engine(limits=limits, max_items=10)
    assert_type(await flock.run_async("measure", {"text": "hi"}, on_question=answered), dict[str, Any])
    assert_type(await flock.run_batch_async("measure", [{"text": "hi"}], on_invalid="skip"), list[Any])


# Tests


def reply(request: ModelRequest) -> Reply | Failure:
    if request.agent_name == "analyst" and "mood" in request.schema["properties"] and not request.tool_names:
        return Reply({"mood": request.text}, usage=Usage(input_tokens=1))
    return Failure(429, retry_after_s=0.1)


def test_analyst() -> None:
    with FakeModel([{"mood": "calm"}, Reply(calls=[("measure", {"text": "hi"})]), TimeoutError(), reply]) as model:
        assert_type(model.requests, list[ModelRequest])
        assert_type(Reply("calm").completion(), dict[str, Any])
    with FakeModel({"analyst": {"mood": "calm"}, "triage": reply}).serve() as url:
        assert_type(url, str)
    flock.engine(transport=FakeModel(reply).transport)
    model.replies = []
    model.check()


# In an app


async def count(request: Request) -> Response:
    engine = await engine_of(request)
    assert_type(engine, Engine)
    assert_type(principal_of(request), Principal | None)
    return JSONResponse({"waiting": (await engine.queue()).depth, "version": __version__})


async def by_header(connection: HTTPConnection) -> Principal | None:
    return Principal(name="ann", admin=True) if "x-ann" in connection.headers else None


@asynccontextmanager
async def more(app: FlockAPI) -> AsyncIterator[None]:
    yield


auth: Auth = by_header
on_disconnect: OnDisconnect = "continue"
on_extra: OnExtra = "keep"
ai = create_app(
    flock,
    server_name="Typed",
    protocols=["a2a"],
    public_url="https://agents.example",
    store=":memory:",
    routes=[Route("/count", count)],
    auth=auth,
    lifespan=more,
    docs=None,
    metrics=False,
    on_disconnect=on_disconnect,
    csv_dir="uploads",
    max_upload_bytes=2**30,
)
assert_type(ai, FlockAPI)
assert_type(FlockAPI(flock, AppOptions(server_name="Typed", max_wait_s=5)).options, AppOptions)


def lifespan(host: Starlette) -> AbstractAsyncContextManager[None]:
    return ai.lifespan()


host = Starlette(lifespan=lifespan)
host.mount("/ai", ai)


def write(context: RunContext, live: Live, budget: Budget, started: Event, call: Call) -> None:
    assert_type(call.raised, Raised | None)
    assert_type(call.place, Place | None)
    assert_type(call.is_cancelled, bool)
    if call.place is not None:
        assert_type(call.place.also, tuple[Mark, ...])
    assert_type(first_id_at(call.started_at), str)
    budget.check(context.agent_name, ["openai/gpt-4o"])
    if context.is_watched:
        context.emit("text")
        context.emit_value("tags", ["a"])
        context.reset_output()
    assert_type(event_of_call(started, 0, call), Event)
    live.reset(context)


def look_at(run: Run, limits: QueueLimits, at: Time) -> LongJSON:
    assert_type(stub_of(run), Run)
    assert_type(shown_as(Progress, run.progress), Progress)
    assert_type(CallOptions(retries=1).retries, int)
    assert_type(limits.max_runs, int)

    async def read(start: int, length: int) -> bytes:
        return bytes(run.inputs)[start : start + length]

    return LongJSON(len(run.inputs), read, nullcontext)


# Requests, answers and errors

REQUESTS: tuple[type, ...] = (
    *(FlockAPIRequest, FlockAnswer, FlockBatchRequest, FlockBatchRetry, UploadQuery, WaitQuery, EventsQuery, RunsQuery),
    *(BatchQuery, ResultsQuery, BatchesQuery, RunEventsQuery, StreamQuery),
)
ANSWERS: tuple[type, ...] = (
    *(FlockAPIResponse, FlockBatchResponse, RunList, RunSummary, RunStep, AgentList, AgentSummary, AgentDetail),
    *(BatchList, BatchSummary, BatchItem, Health, Readiness, Problem, FieldError),
)
ERRORS: tuple[type[FlockError], ...] = (
    *(
        NotFound,
        AgentNotFound,
        RunNotFound,
        CallNotFound,
        BatchNotFound,
        SessionNotFound,
        Conflict,
        StaleAnswer,
        KeyInUse,
        KeyReused,
        Replayed,
        MalformedJSON,
        InvalidData,
    ),
    *(DefinitionError, SignatureError, EngineFull, EngineStopped, StoreError, OwnershipLost, Unstorable, RunFailed),
    *(AccessDenied, Unauthenticated, Forbidden, WrongHost, TooLarge, TooManyRequests, ResultTooLarge),
    *(
        StepError,
        ModelError,
        InvalidOutput,
        InvalidHandoff,
        TooManySteps,
        TooManyTokens,
        Expired,
        Uncertain,
        CostLimit,
        QueueTimeout,
        Interrupted,
        ChangedProgram,
    ),
    Unreadable,
)
assert_type(ERROR_TYPES, frozenset[str])
assert_type(cut("text"), str)


def bytes_of(photo: Image, note: Audio | None, pages: list[Document]) -> int:
    files: list[File] = [photo, *pages, *([] if note is None else [note])]
    return sum(file.size for file in files) + len(photo.read())


assert_type(data_url(b"text"), str)


async def shown(files: FileBox, table: Frame, webhook: Webhook) -> tuple[int, Any, str]:
    return files.find("0" * 64).size, table.columns, webhook.type

"""The structs of the API: bodies, queries and responses. ``openapi.yaml`` describes the same structs."""

from datetime import date, timedelta
from typing import Annotated, Any, Literal, TypeVar, get_args
from uuid import UUID

import msgspec

from flock.agents.agent import Handoff
from flock.errors import FieldError, InvalidData, MalformedJSON
from flock.jsontype import JSONType, check_depth
from flock.runs import (
    MAX_COST,
    NOT_LOADED,
    Batch,
    Call,
    CallKind,
    OnExtra,
    OnInvalid,
    Progress,
    RetriedCalls,
    RunStatus,
    Time,
    UsageFilter,
    UsagePage,
    UsageRow,
    Webhook,
    records,
    shown_usage,
)
from flock.runs import Usage as RecordedUsage
from flock.runs.records import shown_as

__all__ = ["ANSWER", "BATCH_REQUEST", "BATCH_RETRY", "MAX_PAGE", "MAX_WAIT_S", "RUN_REQUEST", "RUN_RETRY"]
__all__ += ["FlockAPIRequest", "FlockAnswer", "FlockBatchRequest", "FlockBatchRetry", "FlockMessage", "FlockRunRetry"]
__all__ += ["BatchQuery", "EventsQuery", "RunEventsQuery", "StreamQuery", "UploadQuery", "WaitQuery"]
__all__ += ["BatchesQuery", "ResultsQuery", "RunsQuery", "WebhooksQuery"]
__all__ += ["QuestionEventsQuery", "QuestionsQuery", "UsageQuery"]
__all__ += ["RunCall", "RunStep", "SessionSummary", "Usage", "UsageBudget", "UsageEntry", "UsageReport"]
__all__ += ["AskedQuestion", "FlockAPIResponse", "Question", "QuestionList", "RunList", "RunSummary", "Wait"]
__all__ += ["BatchList", "BatchSummary", "FlockBatchCheck", "FlockBatchCheckRow", "FlockBatchResponse", "WebhookList"]
__all__ += ["AgentDetail", "AgentList", "AgentSummary", "Health", "Problem", "Readiness"]
__all__ += ["after_usage", "asked_question", "batch_request_from", "run_call", "shown_with_costs", "usage_report"]

T = TypeVar("T")

#: For fields that only older clients send. They are accepted, but new clients should not use them.
DEPRECATED = msgspec.Meta(extra_json_schema={"deprecated": True})

#: See ``CSVDialect``.
Delimiter = Literal[",", ";", "\t", "|"]
Decimal = Literal[".", ","]

#: See ``Engine.submit``. Visible ASCII characters; the lookahead is for a line break, which ``$`` allows in Python.
SessionID = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,128}(?!\n)$")]

#: US dollars.
MaxCost = Annotated[float, msgspec.Meta(gt=0, le=MAX_COST)]
Count = Annotated[int, msgspec.Meta(ge=1)]
MaxFailures = Annotated[float, msgspec.Meta(ge=0)]

#: Max records in one response, and the largest number in a query: it has at most 15 digits.
MAX_PAGE, MAX_NUMBER = 1000, 10**15 - 1

#: Max days in one report of usage.
MAX_USAGE_DAYS = 366

#: Max value of the ``wait`` parameter, in seconds; see also ``max_wait_s``.
MAX_WAIT_S = 3600


# Requests


class FlockAPIRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/flock``. ``use_production_tools`` is accepted from older clients and ignored."""

    agent_name: str
    inputs: msgspec.Raw = msgspec.field(default_factory=lambda: msgspec.Raw(b"{}"))
    async_run: bool = False
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    session_id: SessionID | None = None
    max_cost: MaxCost | None = None
    use_production_tools: Annotated[Any, DEPRECATED] = None


class FlockBatchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/batch``. ``use_temporal`` and ``silent_mode`` are accepted and ignored.

    ``delimiter``, ``decimal`` and ``encoding`` are for a CSV file that ``batch_inputs`` names.
    """

    agent_name: str
    batch_inputs: list[dict[str, msgspec.Raw]] | str
    static_inputs: dict[str, msgspec.Raw] | None = None
    input_mapping: dict[str, str | None] | None = None
    parallel: bool = True
    max_workers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    on_invalid: OnInvalid = "reject"
    on_extra: OnExtra = "reject"
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_cost: MaxCost | None = None
    max_failures: MaxFailures | None = None
    dedupe: bool = False
    reuse: bool = False
    limit: Count | None = None
    sample: Count | None = None
    seed: int = 0
    return_errors: bool = True
    box_results: bool = True
    delimiter: Delimiter = ","
    decimal: Decimal = "."
    encoding: str = "utf-8"
    write_to_csv: Annotated[str | None, DEPRECATED] = None
    use_temporal: Annotated[Any, DEPRECATED] = None
    silent_mode: Annotated[Any, DEPRECATED] = None


class FlockAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/{run_id}/calls/{call_id}``: the answer, in the form of the question's schema."""

    output: msgspec.Raw


class FlockMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/{run_id}/messages/{name}``."""

    message: msgspec.Raw


class FlockBatchRetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /batch/{batch_id}/retry``: the items to retry. Default: all that failed or were cancelled.

    ``max_cost`` replaces that of the batch. ``calls``: see ``Engine.retry_run``.
    """

    only: Literal["failed", "cancelled"] | None = None
    max_cost: MaxCost | None = None
    calls: RetriedCalls = "keep"


class FlockRunRetry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /run/{run_id}/retry``. ``max_cost`` replaces that of the run, or of the batch of an item.

    ``calls``: see ``Engine.retry_run``.
    """

    max_cost: MaxCost | None = None
    calls: RetriedCalls = "keep"


RUN_REQUEST = JSONType(FlockAPIRequest)
ANSWER = JSONType(FlockAnswer)
MESSAGE = JSONType(FlockMessage)
BATCH_REQUEST = JSONType(FlockBatchRequest)
BATCH_RETRY = JSONType(FlockBatchRetry)
RUN_RETRY = JSONType(FlockRunRetry)


class UploadQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The query of ``POST /run/batch``. If the body is a request in JSON, only ``dry_run`` is allowed.

    ``static_inputs`` and ``input_mapping`` are JSON; ``delimiter``, ``decimal`` and ``encoding`` are for CSV.
    """

    agent_name: str
    dry_run: bool = False
    static_inputs: str | msgspec.UnsetType = msgspec.UNSET
    input_mapping: str | msgspec.UnsetType = msgspec.UNSET
    parallel: bool = True
    max_workers: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    on_invalid: OnInvalid = "reject"
    on_extra: OnExtra = "reject"
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_NUMBER)] | msgspec.UnsetType = msgspec.UNSET
    max_cost: MaxCost | msgspec.UnsetType = msgspec.UNSET
    max_failures: Annotated[float, msgspec.Meta(ge=0, le=MAX_NUMBER)] | msgspec.UnsetType = msgspec.UNSET
    dedupe: bool = False
    reuse: bool = False
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)] | msgspec.UnsetType = msgspec.UNSET
    sample: Annotated[int, msgspec.Meta(ge=1, le=MAX_NUMBER)] | msgspec.UnsetType = msgspec.UNSET
    seed: Annotated[int, msgspec.Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)] = 0
    return_errors: bool = True
    box_results: bool = True
    delimiter: Delimiter = ","
    decimal: Decimal = "."
    encoding: str = "utf-8"


class WaitQuery(msgspec.Struct, frozen=True):
    """The number of seconds to wait for the end of a run."""

    wait: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 0


class EventsQuery(msgspec.Struct, frozen=True):
    """The id of the last event that the client has received."""

    after: Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)] = 0


class RunEventsQuery(EventsQuery, frozen=True):
    """The id of the last event of a run that the client has received, and whether it wants the reasoning of models."""

    reasoning: bool = False


class StreamQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the stream of a new run has the reasoning of models."""

    reasoning: bool = False


class BatchQuery(msgspec.Struct, frozen=True):
    """The results of a batch to return, and the number of seconds to wait for its end.

    The page has up to ``limit`` results after the position ``after``.
    """

    after: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] = -1
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE
    results: bool = True
    wait: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 0


class ResultsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The results of a batch to download, and their format. ``format`` overrides ``Accept``.

    ``usage`` adds the tokens and the cost of each item. ``delimiter``, ``decimal`` and ``encoding`` are for CSV.
    """

    status: Literal["completed", "failed", "cancelled"] | msgspec.UnsetType = msgspec.UNSET
    format: Literal["json", "ndjson", "csv", "tsv", "xlsx", "parquet"] | msgspec.UnsetType = msgspec.UNSET
    after: Annotated[int, msgspec.Meta(ge=-1, le=2**31)] = -1
    limit: Annotated[int, msgspec.Meta(ge=1, le=2**31)] = 2**31
    escape_formulas: bool = True
    usage: bool = False
    delimiter: Delimiter = ","
    decimal: Decimal = "."
    encoding: str = "utf-8"


class BatchesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The filter of a list of batches."""

    status: RunStatus | msgspec.UnsetType = msgspec.UNSET
    agent_name: str | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType = msgspec.UNSET
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    after: UUID | msgspec.UnsetType = msgspec.UNSET


class RunsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The filter of a list of runs. Unknown parameters are rejected, since ignoring one would return wrong runs."""

    status: RunStatus | msgspec.UnsetType = msgspec.UNSET
    agent_name: str | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType = msgspec.UNSET
    session_id: SessionID | msgspec.UnsetType = msgspec.UNSET
    created_after: Time | msgspec.UnsetType = msgspec.UNSET
    created_before: Time | msgspec.UnsetType = msgspec.UNSET
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    after: UUID | msgspec.UnsetType = msgspec.UNSET
    include: Literal["", "inputs", "result", "inputs,result", "result,inputs"] | msgspec.UnsetType = msgspec.UNSET

    def includes(self, name: str) -> bool:
        return not isinstance(self.include, msgspec.UnsetType) and name in self.include


class WebhooksQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The filter of a list of webhooks."""

    status: Literal["pending", "sent", "given_up"] | msgspec.UnsetType = msgspec.UNSET
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    after: str | msgspec.UnsetType = msgspec.UNSET


UsageField = Literal["day", "principal", "agent_name", "model"]


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which usage to show, and by what. ``after`` is that of the previous page."""

    from_: date | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="from")
    to: date | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType = msgspec.UNSET
    by: str = "day,agent_name,model"
    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    after: str | msgspec.UnsetType = msgspec.UNSET

    def filter_at(self, today: date) -> UsageFilter:
        """Return it as a filter. The default is the last 30 days until *today*. Raises InvalidData."""
        last = today if isinstance(self.to, msgspec.UnsetType) else self.to
        first = last - timedelta(days=min(29, last.toordinal() - 1))
        if not isinstance(self.from_, msgspec.UnsetType):
            first = self.from_
        if not 0 <= (last - first).days < MAX_USAGE_DAYS:
            raise InvalidData.of(
                f"'from' in the query must be before 'to', and at most {MAX_USAGE_DAYS - 1} days before."
            )
        by = tuple(self.by.split(",")) if self.by else ()
        if len(set(by)) < len(by) or not set(by) <= set(get_args(UsageField)):
            names = ", ".join(get_args(UsageField))
            raise InvalidData.of(f"'by' in the query must be some of these names, separated by commas: {names}.")
        after = None
        if not isinstance(self.after, msgspec.UnsetType):
            try:
                values = msgspec.json.decode(self.after, type=tuple[str, ...])
                after = msgspec.convert(dict(zip(by, values, strict=True)), UsageRow)
            except ValueError as exc:
                raise InvalidData.of("'after' in the query must be that of 'next' of the previous page.") from exc
        principal = None if isinstance(self.principal, msgspec.UnsetType) else self.principal
        return UsageFilter(first_day=first, last_day=last, principal=principal, by=by, after=after, limit=self.limit)


class QuestionEventsQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The filter of a stream of open questions."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    agent_name: str | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType = msgspec.UNSET
    session_id: SessionID | msgspec.UnsetType = msgspec.UNSET


class QuestionsQuery(QuestionEventsQuery, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The filter of a list of open questions, and the number of seconds to wait for one if there is none."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    after: UUID | msgspec.UnsetType = msgspec.UNSET
    wait: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_S)] = 0


def batch_request_from(query: UploadQuery, max_depth: int) -> FlockBatchRequest:
    """Convert the query of an upload to the request of a JSON body, without rows. Raises InvalidData."""
    options = msgspec.structs.asdict(query)
    del options["dry_run"]
    for name, type_ in (("static_inputs", dict[str, msgspec.Raw]), ("input_mapping", dict[str, str | None])):
        if options[name] is not msgspec.UNSET:
            try:
                check_depth(options[name].encode(), max_depth)
                options[name] = msgspec.json.decode(options[name], type=type_)
            except (MalformedJSON, msgspec.DecodeError, RecursionError) as exc:
                detail = f"{name!r} in the query must be a JSON object ({str(exc).replace('`', chr(39))})."
                raise InvalidData.of(detail) from exc
    return FlockBatchRequest(
        batch_inputs=[], **{name: value for name, value in options.items() if value is not msgspec.UNSET}
    )


# Responses


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts as reported by the provider. The last three are parts of the first two, and absent if they are 0."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | msgspec.UnsetType = msgspec.UNSET
    reasoning_tokens: int | msgspec.UnsetType = msgspec.UNSET
    estimated_tokens: int | msgspec.UnsetType = msgspec.UNSET


class RunStep(msgspec.Struct, frozen=True, kw_only=True):
    """One finished step of a run. ``attempt`` is the attempt of the run in which it finished."""

    agent_name: str
    result: msgspec.Raw
    attempt: int
    started_at: Time
    completed_at: Time
    usage: Usage | None
    model: str | None
    cost: float | msgspec.UnsetType = msgspec.UNSET
    calls: "list[RunCall] | msgspec.UnsetType" = msgspec.UNSET


class UsageEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent. It has the fields of ``by``. A ``model`` is null if it is not known."""

    day: date | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType | None = msgspec.UNSET
    agent_name: str | msgspec.UnsetType = msgspec.UNSET
    model: str | msgspec.UnsetType | None = msgspec.UNSET
    usage: Usage | None
    cost: float | msgspec.UnsetType = msgspec.UNSET


class UsageBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What a principal may spend in a day, and has spent today."""

    max_cost_per_day: float
    cost: float
    ends_at: Time


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """One page of usage, newest days first, and the sum of all pages. ``next`` is as in ``RunList``."""

    from_: date = msgspec.field(name="from")
    to: date
    entries: list[UsageEntry]
    usage: Usage | None
    cost: float | msgspec.UnsetType = msgspec.UNSET
    budget: UsageBudget | msgspec.UnsetType = msgspec.UNSET
    next: str | None


class SessionSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a conversation together."""

    session_id: str
    total_runs: int
    usage: Usage | None
    cost: float | msgspec.UnsetType = msgspec.UNSET


class RunCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a step. Long ``arguments`` and a long ``result`` are left out.

    Only an answer has ``answered_by`` and ``answered_at``. Its ``arguments`` are what was asked.
    """

    call_id: str
    name: str
    kind: CallKind
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: str | None
    error_type: str | None
    usage: Usage | None
    model: str | None
    cost: float | msgspec.UnsetType = msgspec.UNSET
    started_at: Time
    completed_at: Time
    answered_by: str | msgspec.UnsetType = msgspec.UNSET
    answered_at: Time | msgspec.UnsetType = msgspec.UNSET


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """An open question; see ``flock.runs.Question``. ``kind`` is there if it is not one to a person."""

    call_id: str
    question: str
    schema: msgspec.Raw
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    asked_at: Time
    expires_at: Time | None = None
    default: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    answerer: str | msgspec.UnsetType = msgspec.UNSET
    four_eyes: bool = False
    kind: Literal["client_tool"] | msgspec.UnsetType = msgspec.UNSET


class AskedQuestion(Question, frozen=True, kw_only=True):
    """A question as its answerers see it; see ``flock.runs.AskedQuestion``. ``output`` is its answer."""

    run_id: str
    agent_name: str
    session_id: str | msgspec.UnsetType = msgspec.UNSET
    requested_by: str | msgspec.UnsetType = msgspec.UNSET
    status: Literal["open", "answered", "closed"]
    output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    answered_by: str | msgspec.UnsetType = msgspec.UNSET
    answered_at: Time | msgspec.UnsetType = msgspec.UNSET


class QuestionList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of open questions, the newest run first, with ``next`` as in ``RunList``."""

    questions: list[AskedQuestion]
    next: str | None


class Wait(msgspec.Struct, frozen=True, kw_only=True):
    """A time or a message for which a run waits. ``name`` is that of the message."""

    kind: Literal["sleep", "message"]
    name: str | msgspec.UnsetType = msgspec.UNSET
    since: Time
    until: Time | None


class FlockAPIResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The current state of a run. Only items of a batch have ``batch_id`` and ``position``.

    ``session_id`` is there if the request named a session. ``calls`` are those of the step that has not ended, if it
    has made any.

    ``waiting_for`` are the open questions, and ``waits`` the times and messages for which it waits, if there are any.
    ``cost`` is in US dollars, and absent if it is unknown.
    """

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
    traceparent: str | None
    attempt: int
    progress: Progress | None
    usage: Usage | None
    cost: float | msgspec.UnsetType = msgspec.UNSET
    max_cost: float | msgspec.UnsetType = msgspec.UNSET
    steps: list[RunStep]
    calls: list[RunCall] | msgspec.UnsetType = msgspec.UNSET
    waiting_for: list[Question] | msgspec.UnsetType = msgspec.UNSET
    waits: list[Wait] | msgspec.UnsetType = msgspec.UNSET
    batch_id: str | msgspec.UnsetType = msgspec.UNSET
    position: int | msgspec.UnsetType = msgspec.UNSET
    session_id: str | msgspec.UnsetType = msgspec.UNSET
    principal: str | msgspec.UnsetType = msgspec.UNSET


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in a list. It has ``inputs`` and ``result`` only if they were requested, ``session_id`` with its inputs.

    Only a waiting run has ``waiting_for`` and ``waits``.
    """

    run_id: str
    agent_name: str
    status: RunStatus
    error: str | None
    error_type: str | None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    request_id: str | None
    attempt: int
    principal: str | msgspec.UnsetType = msgspec.UNSET
    session_id: str | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType | None = msgspec.UNSET
    waiting_for: list[Question] | msgspec.UnsetType = msgspec.UNSET
    waits: list[Wait] | msgspec.UnsetType = msgspec.UNSET


class RunList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of runs, newest first. ``next`` is the path of the next page, as in the ``Link`` header."""

    runs: list[RunSummary]
    next: str | None


class BatchSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A batch without its results, as in a list."""

    batch_id: str
    agent_name: str
    status: RunStatus
    total_items: int
    completed_items: int
    failed_items: int
    cancelled_items: int
    waiting_items: int
    progress_percentage: float
    eta_s: float | None
    error: str | None
    created_at: Time
    started_at: Time | None
    completed_at: Time | None
    request_id: str | None
    attempt: int
    principal: str | msgspec.UnsetType = msgspec.UNSET
    error_type: str | msgspec.UnsetType = msgspec.UNSET
    usage: Usage | msgspec.UnsetType = msgspec.UNSET
    cost: float | msgspec.UnsetType = msgspec.UNSET
    estimated_cost: float | msgspec.UnsetType = msgspec.UNSET
    max_cost: float | msgspec.UnsetType = msgspec.UNSET
    skipped_rows: int | msgspec.UnsetType = msgspec.UNSET
    versions: list[str] | msgspec.UnsetType = msgspec.UNSET


class FlockBatchResponse(BatchSummary, frozen=True, kw_only=True):
    """The current state of a batch. ``results`` is one page, in order, and ``next`` the path of the next page."""

    results: list[Any] | msgspec.UnsetType = msgspec.UNSET
    next: str | None


class WebhookList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of webhooks, newest first, with ``next`` as in ``RunList``."""

    webhooks: list[Webhook]
    next: str | None


class FlockBatchCheckRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row as it would be stored. ``line`` is its first line in CSV or NDJSON, ``extra`` its kept columns."""

    line: int | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw
    extra: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class FlockBatchCheck(msgspec.Struct, frozen=True, kw_only=True):
    """Response of ``POST /run/batch?dry_run=true``: whether the batch would be accepted, and its errors."""

    ok: bool
    total_items: int
    invalid_items: int
    skipped_rows: int | msgspec.UnsetType = msgspec.UNSET
    columns: list[str]
    rows: list[FlockBatchCheckRow]
    errors: list[FieldError]


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of batches, newest first, with ``next`` as in ``RunList``."""

    batches: list[BatchSummary]
    next: str | None


class AgentSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``GET /agents``. ``next_agent`` is null if the result decides which agent runs next."""

    name: str
    description: str
    next_agent: str | msgspec.UnsetType | None = msgspec.UNSET


class AgentList(msgspec.Struct, frozen=True, kw_only=True):
    """Response of ``GET /agents``."""

    agents: list[AgentSummary]


class AgentDetail(AgentSummary, frozen=True, kw_only=True):
    """Response of ``GET /agents/{name}``: an agent, with its inputs and outputs as JSON Schema (2020-12).

    ``graph`` has the hand-offs of the agent and of all agents that can follow it, and ``mermaid`` draws them. ``urls``
    has its address for each protocol in which an agent has one.
    """

    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    graph: list[Handoff]
    mermaid: str
    urls: dict[str, str]


class Health(msgspec.Struct, frozen=True):
    """Response of ``GET /healthz``: the server is alive."""

    status: Literal["ok"] = "ok"


class Readiness(msgspec.Struct, frozen=True):
    """Response of ``GET /readyz``: the server accepts work."""

    status: Literal["ok"] = "ok"
    engine: Literal["running"] = "running"
    store: Literal["ok"] = "ok"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error of the API (RFC 9457).

    ``errors`` has one entry for each invalid value of the input. Only ``/readyz`` sends ``engine`` and ``store``.
    ``waiting_for`` are the open questions of a run, in place of one that is no longer open.
    """

    type: str
    title: str
    status: int
    detail: str
    instance: str
    request_id: str
    errors: list[FieldError] | msgspec.UnsetType = msgspec.UNSET
    waiting_for: list[Question] | msgspec.UnsetType = msgspec.UNSET
    engine: Literal["running", "stopping", "stopped"] | msgspec.UnsetType = msgspec.UNSET
    store: Literal["ok", "failing"] | msgspec.UnsetType = msgspec.UNSET


def shown_with_costs(type_: type[T], record: Any, **more: Any) -> T:
    """Like ``shown_as``, with ``usage`` and ``cost``."""
    if isinstance(record, Batch):
        more["max_cost"] = record.options.max_cost
        more["versions"] = list(record.versions) if record.is_mixed else None
    return shown_as(type_, record, **more, **{"cost": None, **_costs(record.usage)})


def asked_question(asked: records.AskedQuestion) -> AskedQuestion:
    question = msgspec.structs.asdict(shown_as(Question, asked.question))
    return shown_as(
        AskedQuestion, asked, **question, requested_by=asked.principal or msgspec.UNSET, output=asked.answer
    )


def usage_report(page: UsagePage, wanted: UsageFilter, **more: Any) -> UsageReport:
    """Return one page of usage; *more* are the fields that depend on the request."""
    return UsageReport(
        from_=wanted.first_day,
        to=wanted.last_day,
        entries=[_usage_entry(row, wanted.by) for row in page.rows],
        **_costs(page.total if page.has_any else None),
        **more,
    )


def _usage_entry(row: UsageRow, by: tuple[str, ...]) -> UsageEntry:
    values: dict[str, Any] = {name: getattr(row, name) or None for name in by}
    return UsageEntry(**values, **_costs(row.usage))


def _costs(usage: RecordedUsage | None) -> dict[str, Any]:
    """Return the members ``usage`` and ``cost``."""
    shown = shown_usage(usage)
    return shown if usage is None else {**shown, "usage": Usage(**shown["usage"])}


def after_usage(page: UsagePage, by: tuple[str, ...]) -> str | None:
    """Return the parameter ``after`` of the next page, or None if there is none."""
    return msgspec.json.encode([getattr(page.rows[-1], name) for name in by]).decode() if page.has_more else None


def run_call(call: Call) -> RunCall:
    values = {"arguments": call.arguments, "result": call.result}
    return shown_with_costs(RunCall, call, **{k: msgspec.UNSET if v is NOT_LOADED else v for k, v in values.items()})

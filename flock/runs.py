"""The records of runs and batches, and the engine protocol.

A ``Run`` is one request and its outcome. It consists of ``Step``s, one for each agent that ran. A ``Batch`` is many
runs of one agent: an item is a run with a ``batch_id`` and a ``position``. All records are frozen. A change creates a
new record, so each record is a consistent snapshot.

JSON is stored as ``msgspec.Raw``, so runs cannot share mutable data, and a store can write it unchanged.
"""

import copy
import math
import os
import re
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar, overload
from uuid import UUID

import msgspec

from flock.errors import EngineFull, FieldError, TooManyTokens, cut

__all__ = [
    "DOLLAR",
    "INVALID_INPUT",
    "JSON_NULL",
    "MAX_COST",
    "MAX_SHOWN_BYTES",
    "MAX_SHOWN_CALLS",
    "NOT_LOADED",
    "Answer",
    "Batch",
    "BatchFilter",
    "BatchOptions",
    "Call",
    "CallKind",
    "Engine",
    "EngineHealth",
    "Event",
    "IdempotencyKey",
    "Inputs",
    "ItemLimits",
    "Items",
    "Live",
    "LongJSON",
    "Observer",
    "OnExtra",
    "OnInvalid",
    "Page",
    "Principal",
    "Progress",
    "Question",
    "Queue",
    "QueueLimits",
    "Row",
    "Run",
    "RunContext",
    "RunFilter",
    "RunStatus",
    "Session",
    "Step",
    "StepJournal",
    "Time",
    "Usage",
    "Watched",
    "added",
    "cost_in_words",
    "event_of_batch",
    "event_of_call",
    "events_of",
    "is_spent",
    "make_ids_after",
    "new_id",
    "now",
    "one_line",
    "position_of",
    "safe_text",
    "shown_usage",
    "started_id",
    "stub_of",
    "valid_traceparent",
]

T = TypeVar("T")

#: Sent as RFC 3339, in UTC.
Time = Annotated[datetime, msgspec.Meta(tz=True)]


class RunStatus(StrEnum):
    """The status of a run or a batch. The last three are final."""

    #: accepted, not yet running
    STARTING = "starting"
    #: an agent is running
    RUNNING = "running"
    #: a person has to answer a question; nothing is running
    WAITING = "waiting"
    #: ended with a result
    COMPLETED = "completed"
    #: ended without a result; ``error`` has the reason
    FAILED = "failed"
    #: stopped on request
    CANCELLED = "cancelled"

    @property
    def is_active(self) -> bool:
        """Whether it changes without the answer of a person, or a retry."""
        return self in (RunStatus.STARTING, RunStatus.RUNNING)

    @property
    def is_final(self) -> bool:
        return self not in (RunStatus.STARTING, RunStatus.RUNNING, RunStatus.WAITING)


#: A US dollar. Prices of a million tokens have at most six decimals, so that sums of picodollars are exact.
DOLLAR = 10**12
#: Max value of ``max_cost``, in US dollars.
MAX_COST = 10**9


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts, named as in the GenAI semantic conventions (``gen_ai.usage.input_tokens``), and their cost.

    Attributes:
        cached_tokens: the input tokens that the provider has read from its cache.
        reasoning_tokens: the output tokens of the model's reasoning.
        picodollars: the cost of the tokens that have a price.
        priced_tokens: the number of input and output tokens that have a price.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    picodollars: int = 0
    priced_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            picodollars=self.picodollars + other.picodollars,
            priced_tokens=self.priced_tokens + other.priced_tokens,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(**{name: getattr(self, name) - getattr(other, name) for name in self.__struct_fields__})

    @property
    def cost(self) -> float | None:
        """US dollars, or None if one of the tokens has no price."""
        return self.picodollars / DOLLAR if self.priced_tokens == self.input_tokens + self.output_tokens else None


def added(*usages: Usage | None) -> Usage | None:
    """Return the sum of *usages*, or None if there are none."""
    known = [usage for usage in usages if usage is not None]
    return sum(known[1:], known[0]) if known else None


def is_spent(usage: Usage | None, max_cost: float | None) -> bool:
    """Whether *max_cost* US dollars are spent. They count as spent if a token has no price, since they might be."""
    if usage is None or max_cost is None:
        return False
    return usage.cost is None or usage.picodollars >= round(max_cost * DOLLAR)


def cost_in_words(usage: Usage | None) -> str:
    """Return the cost of *usage* for people."""
    cost = Usage().cost if usage is None else usage.cost
    return "an unknown cost, since a model without a price was called" if cost is None else f"{cost:.6f} US dollars"


def shown_usage(usage: Usage | None) -> dict[str, Any]:
    """Return the members ``usage`` and ``cost`` as clients see them. Details that are zero or unknown are omitted."""
    if usage is None:
        return {"usage": None}
    tokens = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    details = {"cached_tokens": usage.cached_tokens, "reasoning_tokens": usage.reasoning_tokens}
    shown = {"usage": tokens | {name: count for name, count in details.items() if count}}
    return shown if usage.cost is None else {**shown, "cost": usage.cost}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One completed step of a run.

    Attributes:
        next_agent: the agent to run next; None ends the run.
        usage: the tokens that it used, including those of its calls.
        call_count: the number of its calls that are stored.
        model: the model that answered last; None if it has asked none.
    """

    agent_name: str
    result: msgspec.Raw
    next_agent: str | None = None
    usage: Usage | None = None
    attempt: int = 1
    call_count: int = 0
    model: str | None = None
    started_at: datetime
    completed_at: datetime


#: In place of None, since msgspec cannot decode a union of Raw and None.
JSON_NULL = msgspec.Raw(b"null")
#: What a call executes.
CallKind = Literal["function", "model", "tool", "agent", "question"]


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A finished call of a step; see ``RunContext.call``.

    Attributes:
        call_id: unique in its step, and the same if the step runs again: ``{name}:{digest of the arguments}``, with the
            name that the program gave to the call instead of the digest, and ``:2`` for the second of equal calls.
            A call that a call makes has the id of that call and ``~`` before its own.
        name: of the function, the agent, the tool or the model.
        arguments: by name, as a JSON object; null if they cannot be JSON, or are not kept.
        result: as JSON; null if the call failed.
        error, error_type: of a failed call. It is executed again if the step runs again, unless it is a call of a tool,
            because the model has read the error.
        usage: the tokens that it used, including those of the calls that it made.
        model: the model that answered last, also in a call that it made; None if it has asked none.
    """

    call_id: str
    name: str
    kind: CallKind = "function"
    arguments: msgspec.Raw = JSON_NULL
    result: msgspec.Raw = JSON_NULL
    error: str | None = None
    error_type: str | None = None
    usage: Usage | None = None
    model: str | None = None
    started_at: datetime
    completed_at: datetime

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is not executed again if its step runs again."""
        return self.error is None or self.kind == "tool"


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A question to a person that is not answered yet; see ``RunContext.ask``.

    Attributes:
        call_id: as that of a call; the answer becomes the result of this call.
        schema: JSON Schema (2020-12) of the answer.
        arguments: what the question is about, as a JSON object; UNSET if the question says it all.
        expires_at: when the run fails, or continues with *default*; None if it waits without a limit.
        default: the answer if nobody answers in time; UNSET if the run then fails.
    """

    call_id: str
    question: str
    schema: msgspec.Raw
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    asked_at: Time
    expires_at: Time | None = None
    default: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


#: Answers a question at once, in place of a person. It may be async.
Answer = Callable[[Question], Any]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Progress reported by an agent. ``total`` is None if it is unknown."""

    done: float
    total: float | None = None
    message: str = ""


#: Placeholder for the inputs and step results of a stub, and for long values of a call.
NOT_LOADED = msgspec.Raw(b"{}")
#: Max calls that ``get_calls`` returns, and max size of the arguments and of the result of each, as JSON.
MAX_SHOWN_CALLS = 1000
MAX_SHOWN_BYTES = 4096
#: A run with less content than this is never a stub, because reading it back costs more than keeping it.
MIN_STUB_BYTES = 1024


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One request and its outcome. Ids are UUIDs of version 7, times are in UTC.

    Attributes:
        flock: the name of the flock whose engine executes it.
        traceparent: the trace context of its request (W3C Trace Context, section 3.2).
        principal: the name of its owner; None if the request was not authenticated.
        is_async: whether it runs without a waiting client. Such a run is resumed after a crash.
        attempt: number of the current attempt, from 1. A retry or a recovery starts the next one.
        extra: extra columns of an item's row, as a JSON object, stored for the results; None if there are none.
        recoveries: number of attempts that were started by a recovery after a crash or a stop, not by a retry.
        timeout_s: wall-clock seconds for one attempt, counted from the start of its first step.
        owner: the engine that is working on it; only this engine may write it.
        session_id: the conversation that it belongs to, within its flock and principal. Runs of a session are executed
            one after the other.
        waiting_for: the open questions of a waiting run. A run that ended while it was waiting keeps them.
        worked_s: seconds of ``timeout_s`` that the attempt had spent when it last began to wait; 0 if it never did.
        spent: the tokens of all its attempts, also of steps that failed; None if there were none.
        max_cost: US dollars that it may spend in all its attempts; None means no limit.
    """

    run_id: str
    flock: str
    agent_name: str
    inputs: msgspec.Raw
    status: RunStatus = RunStatus.STARTING
    result: msgspec.Raw | None = None
    error: str | None = None
    error_type: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    request_id: str | None = None
    batch_id: str | None = None
    position: int | None = None
    traceparent: str | None = None
    principal: str | None = None
    is_async: bool = False
    attempt: int = 1
    recoveries: int = 0
    timeout_s: float | None = None
    extra: msgspec.Raw | None = None
    owner: str | None = None
    cancel_requested: bool = False
    progress: Progress | None = None
    waiting_for: tuple[Question, ...] = ()
    worked_s: float = 0.0
    steps: tuple[Step, ...] = ()
    session_id: str | None = None
    spent: Usage | None = None
    max_cost: float | None = None

    @property
    def is_stub(self) -> bool:
        """Whether its inputs and results are only in the store; see ``stub_of``."""
        return self.inputs is NOT_LOADED

    @property
    def content_bytes(self) -> int:
        """The total size of its inputs, extra columns and results."""
        own = len(self.inputs) + len(self.result or b"") + len(self.extra or b"")
        return own + sum(len(step.result) for step in self.steps)

    @property
    def turn_bytes(self) -> int:
        """The total size of its inputs and of the results of its steps."""
        return len(self.inputs) + sum(len(step.result) for step in self.steps)

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent[3:35]

    @property
    def usage(self) -> Usage | None:
        """The tokens of all its attempts. A run of an earlier version only knows those of its steps."""
        return self.usage_of_steps if self.spent is None else self.spent

    @property
    def usage_of_steps(self) -> Usage | None:
        spent = [step.usage for step in self.steps if step.usage is not None]
        return sum(spent, Usage()) if spent else None

    @property
    def next_agent_name(self) -> str | None:
        """The agent of the next step; None if there is no next step."""
        return self.steps[-1].next_agent if self.steps else self.agent_name

    @property
    def tries(self) -> int:
        """The number of attempts without recoveries: 1, and one more for each retry."""
        return self.attempt - self.recoveries

    def step_key(self, position: int) -> str:
        """Return the idempotency key of the step at *position*, from 0: ``run:{run_id}/{position}``.

        It stays the same if the step is repeated after a crash, also by another process. A retry is expected to give
        a new answer, so the key changes to ``run:{run_id}:2/{position}``, and so on.
        """
        tries = self.tries
        return f"run:{self.run_id}/{position}" if tries == 1 else f"run:{self.run_id}:{tries}/{position}"


def stub_of(run: Run) -> Run:
    """Return *run* without its inputs and results if they are long, to save memory while it waits in the store.

    Its steps keep their names, times and usage.
    """
    if run.is_stub or run.content_bytes < MIN_STUB_BYTES:
        return run
    steps = tuple(msgspec.structs.replace(step, result=NOT_LOADED) for step in run.steps)
    return msgspec.structs.replace(run, inputs=NOT_LOADED, result=None, extra=None, steps=steps)


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch is executed, and the form of its results.

    Attributes:
        max_workers: max items running at the same time, at least 1.
        parallel: False runs the items one at a time, in order, and ignores ``max_workers``.
        return_errors: True returns ``{"error", "error_type"}`` as the result of a failed item; False returns null.
        box_results: False returns the bare value if a result has a single member. Kept columns count as members.
        timeout_s: wall-clock seconds for each item.
        max_cost: US dollars after which no more items start, in all attempts of the batch; None means no limit.
    """

    max_workers: int = 5
    parallel: bool = True
    return_errors: bool = True
    box_results: bool = True
    timeout_s: float | None = None
    max_cost: float | None = None


#: ``error_type`` of an item whose inputs do not match its agent's signature. Such an item is not retried.
INVALID_INPUT = "invalid_input"

#: What to do with a batch that has an invalid item: "reject" rejects the batch, "skip" fails only that item.
OnInvalid = Literal["reject", "skip"]

#: What to do with a column, or a member of a row, that is not an input: "reject" rejects the batch, "ignore" drops the
#: column, "keep" copies it unchanged to the results.
OnExtra = Literal["reject", "ignore", "keep"]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Many runs of one agent. ``completed_items`` counts all items that have ended, in any final status.

    It is running until the last item has ended, also while all that are left wait for answers (``waiting_items``).

    Attributes:
        attempt: number of the current attempt, from 1. A retry starts the next one.
        reopening: statuses of the items that a retry still has to reopen, separated by commas.
        resumed_at, resumed_with: when an engine last started working on it, and how many items had ended before that.
        extra_names: the names in ``Run.extra`` of all its items, in order of first appearance.
        owner: the engine that is working on it; only this engine may write the batch and its items.
        usage: the sum of ``Run.spent`` of its items; None if they have used no tokens.
        error_type: why it failed, if not because all items did: "cost_limit".
        invalid_items: how many items have invalid inputs. They never run.
    """

    batch_id: str
    flock: str
    agent_name: str
    options: BatchOptions
    status: RunStatus = RunStatus.STARTING
    total_items: int
    completed_items: int = 0
    failed_items: int = 0
    cancelled_items: int = 0
    waiting_items: int = 0
    error: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    request_id: str | None = None
    principal: str | None = None
    attempt: int = 1
    cancel_requested: bool = False
    reopening: str | None = None
    resumed_at: datetime | None = None
    resumed_with: int = 0
    extra_names: tuple[str, ...] = ()
    owner: str | None = None
    usage: Usage | None = None
    error_type: str | None = None
    invalid_items: int = 0

    @property
    def is_spent(self) -> bool:
        """Whether no more items may start, because ``max_cost`` is spent."""
        return is_spent(self.usage, self.options.max_cost)

    @property
    def costs(self) -> dict[str, Any]:
        """The members about tokens and money as clients see them. Those that are unknown are omitted."""
        shown = shown_usage(self.usage) if self.usage is not None else {}
        limits = {"error_type": self.error_type, "max_cost": self.options.max_cost}
        shown |= {"estimated_cost": self.estimated_cost, **limits}
        return {name: value for name, value in shown.items() if value is not None}

    @property
    def estimated_cost(self) -> float | None:
        """The cost if all items cost as much as those that have run; None if it cannot be estimated."""
        ended = self.completed_items - self.cancelled_items - self.invalid_items
        if self.usage is None or self.usage.cost is None or ended <= 0:
            return None
        return round(self.usage.cost * (self.total_items - self.invalid_items) / ended, 6)

    @property
    def progress_percentage(self) -> float:
        return round(100 * self.completed_items / max(1, self.total_items), 2)

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds until it ends, at the rate since it was resumed; None if it cannot be estimated."""
        ended = self.completed_items - self.resumed_with
        if self.status.is_final or self.resumed_at is None or ended <= 0:
            return None
        took_s = max(0.0, (now() - self.resumed_at).total_seconds())
        return round((self.total_items - self.completed_items) * took_s / ended, 3)

    def result_of(self, item: Run) -> Any:
        """Return the result of *item*, kept columns first. It is None if there is no result and no error to show."""
        extra = {} if item.extra is None else msgspec.json.decode(item.extra, type=dict[str, msgspec.Raw])
        if item.result is not None:
            if self.options.box_results and not extra:
                return item.result
            members = extra | msgspec.json.decode(item.result, type=dict[str, msgspec.Raw])
            if not self.options.box_results and len(members) == 1:
                return next(iter(members.values()))
            return members if extra else item.result
        if item.error is not None and self.options.return_errors:
            return {**extra, "error": item.error, "error_type": item.error_type}
        return None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a table, from which one item of a batch is created.

    Attributes:
        inputs: inputs of the run, as the text of a JSON object.
        at: JSON pointer to the row in the request body; "" if the body consists of lines.
        line: the line at which the row starts, from 1.
        sources: JSON pointers to the inputs in the request, for inputs that are not at ``{at}/{name}``.
        extra: members that are not inputs, and are kept for the results.
        errors: errors found before the inputs are validated. An error that affects the same member in several rows is
            reported once.
    """

    inputs: msgspec.Raw
    at: str = ""
    line: int | None = None
    sources: Mapping[str, str] = {}
    extra: Mapping[str, msgspec.Raw] = {}
    errors: tuple[FieldError, ...] = ()


class ItemLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Max items in one batch, and max size of one item's inputs and kept columns, in bytes of JSON."""

    max_items: int
    max_input_bytes: int


#: Inputs of a run: a mapping, or the text of a JSON object.
Inputs = msgspec.Raw | Mapping[str, Any]
#: Items of a batch. They are read once and only as far as needed, and are never held in memory as a whole.
Items = Iterable[Inputs | Row] | AsyncIterable[Inputs | Row]


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated caller. An admin can also access the runs and batches of others.

    Raises: TypeError if the name is not a string; ValueError if it cannot be written as UTF-8.
    """

    name: str
    admin: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(
                f"The name of a Principal must be a str, not {type(self.name).__name__}. "
                "Convert it: Principal(name=str(...))."
            )
        try:
            self.name.encode()
        except UnicodeEncodeError as exc:
            raise ValueError(f"The name of a Principal must be valid Unicode, not {self.name!r}: {exc}.") from exc


class IdempotencyKey(msgspec.Struct, frozen=True):
    """Identifies a request for replay detection: the client's key, a fingerprint of the request, and its principal.

    The fingerprint of a streamed upload is a function that returns it after the last item is read.
    """

    key: str
    fingerprint: bytes | Callable[[], bytes]
    principal: str | None = None

    @property
    def digest(self) -> bytes:
        return self.fingerprint if isinstance(self.fingerprint, bytes) else self.fingerprint()

    @property
    def scoped_key(self) -> str:
        """The key, made unique per principal. Neither part contains a space."""
        return self.key if self.principal is None else f"{self.principal} {self.key}"


class RunFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list of runs. A field that is None matches all runs.

    Attributes:
        created_after, created_before: with a precision of one millisecond.
        after: the last id of the previous page.
        limit: max runs per page.
        with_inputs, with_results: also read inputs or results; otherwise they are empty or None.
    """

    status: RunStatus | None = None
    agent_name: str | None = None
    principal: str | None = None
    session_id: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    after: str | None = None
    limit: int = 100
    with_inputs: bool = False
    with_results: bool = False


class BatchFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list of batches. None matches all. ``after`` is the last id of the previous page."""

    status: RunStatus | None = None
    agent_name: str | None = None
    principal: str | None = None
    after: str | None = None
    limit: int = 100


#: Approximate max size of one page of records, in bytes of JSON.
PAGE_BYTES = 1024 * 1024

R = TypeVar("R", "Run", "Batch")


class Page(list[R]):
    """One page of records: at most *limit* records and about ``PAGE_BYTES``, but always at least one record.

    Attributes:
        has_more: whether there is another record that did not fit.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes_left = PAGE_BYTES
        self.has_more = False

    def add(self, record: R) -> bool:
        """Add *record*, or return False if the page is full."""
        self._bytes_left -= _json_bytes(record)
        self.has_more = bool(self) and (len(self) >= self._limit or self._bytes_left < 0)
        if not self.has_more:
            self.append(record)
        return not self.has_more


def _json_bytes(record: Run | Batch) -> int:
    """Return the size of the members that may be long."""
    length = 0 if record.error is None else len(msgspec.json.encode(record.error))
    if isinstance(record, Run):
        length += len(bytes(record.inputs)) + len(bytes(record.result or b"")) + len(bytes(record.extra or b""))
        length += len(msgspec.json.encode(record.waiting_for))
    return length


#: A result longer than this is read in pieces while it is sent.
LONG_BYTES = 64 * 1024
#: Size of one piece. It is large because the store has to skip everything before the piece on each read.
PIECE_BYTES = 128 * 1024


class LongJSON:
    """A long JSON text that is read from the store while it is sent, so that a slow client does not fill the memory.

    Attributes:
        length: size in bytes.
        read: called as ``read(start, size)``, returns up to *size* bytes from *start*. Raises RunNotFound, StoreError.
        kept: returns a context manager. While it is active, retention does not delete the text.
    """

    def __init__(
        self, length: int, read: Callable[[int, int], bytes], kept: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.length = length
        self.read = read
        self.kept = kept

    def pieces(self) -> Iterator[bytes]:
        """Yield the whole text in pieces. Raises RunNotFound, StoreError."""
        for start in range(0, self.length, PIECE_BYTES):
            yield self.read(start, PIECE_BYTES)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a run or a batch. Ids increase; events of which only the latest is stored have none.

    In *data*, ``result`` is a ``LongJSON`` if it is long and the engine can read it from the store.
    """

    id: int | None
    name: str
    data: dict[str, Any]


#: Ranges of event ids that are reserved for each attempt, and in it for each step. JavaScript can read them all.
EVENTS_PER_ATTEMPT = 10**12
EVENTS_PER_STEP = 10**6


def started_id(attempt: int, position: int) -> int:
    """Return the id of the event ``step.started``. Those of the calls of the step follow it."""
    return attempt * EVENTS_PER_ATTEMPT + position * EVENTS_PER_STEP + 1


def position_of(event_id: int) -> int:
    """Return the position of the step to which an event belongs; -1 for ``run.started``."""
    return (event_id % EVENTS_PER_ATTEMPT - 1) // EVENTS_PER_STEP


def events_of(run: Run) -> list[Event]:
    """Return all events of *run* so far, in order, except those of its calls; see ``event_of_call``.

    They are derived from its record, so any process can send them. The content of an id never changes: an event
    contains only data that was known when it happened.
    """

    def event(attempt: int, number: int | None, name: str, **data: Any) -> Event:
        id_ = None if number is None else attempt * EVENTS_PER_ATTEMPT + number
        return Event(id=id_, name=name, data={"run_id": run.run_id, "attempt": attempt, **data})

    # An interrupted run that waits to be resumed still has the start time of its last attempt.
    has_started = run.started_at is not None and run.status is not RunStatus.STARTING
    started = [event(run.attempt, 0, "run.started", agent_name=run.agent_name, started_at=run.started_at)]
    events: list[Event] = []
    for position, step in enumerate(run.steps):
        step_data = {"position": position, "agent_name": step.agent_name}
        if step.attempt == run.attempt:
            events, started = events + started, []
        events.append(event(step.attempt, position * EVENTS_PER_STEP + 1, "step.started", **step_data))
        end = {name: getattr(step, name) for name in ("started_at", "completed_at", "result")}
        end |= shown_usage(step.usage)
        events.append(event(step.attempt, (position + 1) * EVENTS_PER_STEP, "step.completed", **step_data, **end))
        end = {name: getattr(step, name) for name in ("started_at", "completed_at", "result")}
        end |= shown_usage(step.usage)
    if has_started:
        events += started
    name = run.next_agent_name
    if has_started and name is not None:  # the step is running, or the run failed in it
        number = len(run.steps) * EVENTS_PER_STEP + 1
        events.append(event(run.attempt, number, "step.started", position=len(run.steps), agent_name=name))
    if run.progress is not None:
        events.append(event(run.attempt, None, "run.progress", **msgspec.structs.asdict(run.progress)))
    if run.status is RunStatus.WAITING:
        events.append(event(run.attempt, None, "run.waiting", waiting_for=run.waiting_for))
    if run.status.is_final:
        end = {name: getattr(run, name) for name in ("status", "result", "error", "error_type", "completed_at")}
        events.append(event(run.attempt, EVENTS_PER_ATTEMPT - 1, f"run.{run.status}", **end))
    return events


def event_of_call(started: Event, number: int, call: Call) -> Event:
    """Return the event of a stored call of the step that began with *started*: call *number*, from 0.

    Calls are numbered in the order in which they were stored. A later attempt of the same step reports them again.
    """
    assert started.id is not None
    names = ("call_id", "name", "kind", "result", "error", "error_type", "usage", "started_at", "completed_at")
    data = {**started.data, **{name: getattr(call, name) for name in names}}
    if call.result is NOT_LOADED:
        del data["result"]
    return Event(id=started.id + 1 + number, name="call.completed", data=data)


def event_of_batch(batch: Batch) -> Event:
    """Return the progress of *batch*, or its final event, whose id is the number of its attempt."""
    items = ("total_items", "completed_items", "failed_items", "cancelled_items", "waiting_items")
    counts = (*items, "progress_percentage", "eta_s")
    names = ("batch_id", "attempt", "status", *counts, *(("error", "completed_at") if batch.status.is_final else ()))
    data = {name: getattr(batch, name) for name in names} | batch.costs
    if batch.status.is_final:
        return Event(id=batch.attempt, name=f"batch.{batch.status}", data=data)
    return Event(id=None, name="batch.progress", data=data)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a session together. ``usage`` is None if none of them has asked a model."""

    session_id: str
    total_runs: int
    usage: Usage | None


class Queue(msgspec.Struct, frozen=True):
    """The number of runs that wait for their first step, and when the oldest one that never started was accepted.

    ``asking`` is the number of runs that wait for answers of people. They do not count for any limit.
    """

    depth: int
    oldest_at: datetime | None
    asking: int = 0


class QueueLimits(msgspec.Struct, frozen=True):
    """Max queued runs: of all principals together, and of one principal."""

    max_runs: int
    max_runs_per_principal: int

    @classmethod
    def of(cls, max_queue: int, max_queue_per_principal: int | None) -> "QueueLimits":
        """Return the limits for these options of an engine. By default one principal may use half of the queue."""
        return cls(max_queue, max(1, max_queue // 2) if max_queue_per_principal is None else max_queue_per_principal)

    def check(self, waiting: int, state: str = "waiting") -> None:
        """Raise EngineFull if *waiting* runs fill the queue."""
        if waiting >= self.max_runs:
            raise EngineFull(
                f"{waiting} runs are already {state}, the limit of this server (max_queue). Try again later."
            )

    def check_share(self, waiting: int, state: str = "waiting") -> None:
        """Raise EngineFull if *waiting* runs of one principal fill its share of the queue."""
        if waiting >= self.max_runs_per_principal:
            raise EngineFull(
                f"{waiting} runs of this caller are already {state}, the limit for one caller "
                "(max_queue_per_principal). Try again later."
            )


class EngineHealth(msgspec.Struct, frozen=True):
    """The health of an engine. It accepts new work if it is running and its store is ok."""

    engine: Literal["running", "stopping", "stopped"] = "running"
    store: Literal["ok", "failing"] = "ok"


class Observer(Protocol):
    """Receives events of an engine. Its methods are called in the event loop, so they must be fast."""

    def run_started(self, run: Run) -> None:
        """An attempt of a run has started."""

    def step_completed(self, step: Step) -> None:
        """An agent has completed a step."""

    def call_completed(self, call: Call) -> None:
        """A call of a step has completed or failed."""

    def tokens_spent(self, agent_name: str, usage: Usage) -> None:
        """A model has answered an agent; the answer may still be invalid."""

    def run_ended(self, run: Run) -> None:
        """A run has reached a final status. If it ended while it was waiting, it may be a stub without inputs."""

    def model_call_retried(self) -> None:
        """A model call failed and will be retried."""


#: The id of the call that the current task, or its thread, is executing; "" outside of calls.
CURRENT_CALL: ContextVar[str] = ContextVar("flock_call", default="")


class StepJournal(Protocol):
    """Where the running step of a run keeps its calls and counts its tokens; see ``flock.engine.journal``."""

    @property
    def spent(self) -> Usage:
        """The tokens that the run has used so far."""

    def spend(self, usage: Usage, model: str | None) -> None: ...

    def call(
        self,
        context: "RunContext",
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        name: str | None,
        keep: Literal["all", "result"],
    ) -> Awaitable[Any]: ...

    def once(
        self,
        label: str,
        key: str,
        execute: Callable[[], Awaitable[Any]],
        *,
        kind: CallKind,
        arguments: msgspec.Raw,
        decode: Callable[[msgspec.Raw], Any],
        should_keep: Callable[[Any], bool] | None = None,
        on_error: Callable[[str], Any] | None = None,
    ) -> Awaitable[Any]: ...

    def run_agent(
        self, context: "RunContext", name: str, inputs: Mapping[str, Any]
    ) -> Coroutine[Any, Any, dict[str, Any]]: ...

    def ask(
        self,
        context: "RunContext",
        question: str,
        type_: Any,
        name: str | None,
        expires_s: float | None,
        default: Any,
        about: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
    ) -> Awaitable[Any]: ...


class Live(Protocol):
    """What the agents of a run write for its readers; see ``flock.engine.live``. It is thread-safe."""

    def write(self, writer: "RunContext", field: str, text: str) -> None: ...

    def write_value(self, writer: "RunContext", field: str, value: Any) -> None: ...

    def write_reasoning(self, writer: "RunContext", text: str) -> None: ...

    def reset(self, writer: "RunContext") -> None: ...

    def settle(self, writer: "RunContext", result: msgspec.Raw, *, has_missed: bool) -> None: ...


class Watched(Protocol):
    """Where a run keeps its live output; None if it keeps none."""

    @property
    def live(self) -> Live | None: ...


class RunContext:
    """The context of a running step. It is passed to the parameter annotated with this type, and is thread-safe.

    Attributes:
        run_id, agent_name, attempt, request_id, traceparent: of the run.
        position: of the step in the run, from 0.
        call_id: of the call of the step that this agent executes; "" if the agent is that of the step.
        step_key: idempotency key of this step, ``run:{run_id}/{position}``, from 0. It stays the same if the step is
            repeated after a crash, and changes with each retry. Send it as ``Idempotency-Key`` to paid services. If a
            step makes several calls, append a suffix of your own to each. Model agents do this.
        is_item: whether the run is an item of a batch.
        cancel_requested: True after cancellation of the run was requested. A synchronous function should check it
            regularly, and return or raise. An async function is cancelled at its next await, so it need not check.
    """

    def __init__(
        self,
        run: Run,
        agent_name: str,
        on_progress: Callable[[Progress | None], None],
        journal: StepJournal | None = None,
        *,
        on_usage: Callable[[str, Usage], None] = lambda agent_name, usage: None,
        max_tokens: int | None = None,
        watched: Watched | None = None,
        output_names: Sequence[str] = (),
        priced: Callable[[Usage, str | None], Usage] = lambda usage, model: usage,
        check_cost: Callable[[str, Sequence[str]], None] = lambda agent_name, models: None,
    ) -> None:
        self.run_id = run.run_id
        self.agent_name = agent_name
        self.position = len(run.steps)
        self.call_id = ""
        self.attempt = run.attempt
        self.request_id = run.request_id
        self.traceparent = run.traceparent
        self.is_item = run.batch_id is not None
        #: the progress that the agents of the step have reported last
        self._reported: list[Progress] = []
        self.step_key = self._root_key = run.step_key(len(run.steps))
        self._cancel_requested: list[bool] = []
        self._on_progress = on_progress
        self._on_usage = on_usage
        self._max_tokens = max_tokens
        self._priced = priced
        self._check_cost = check_cost
        self._journal = journal
        self._watched = watched
        self._output_names = output_names
        self._began_in: Live | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def cancel_requested(self) -> bool:
        return bool(self._cancel_requested)

    def request_cancel(self) -> None:
        """Set ``cancel_requested``, also for the agents that this step has called."""
        self._cancel_requested.append(True)

    def of_called_agent(self, agent_name: str, output_names: Sequence[str] = ()) -> "RunContext":
        """Return the context of an agent that the current call executes. Only an engine uses it."""
        context = copy.copy(self)
        context.agent_name = agent_name
        context.step_key = self.idempotency_key
        context.call_id = CURRENT_CALL.get()
        context._output_names = output_names
        context._began_in = msgspec.UNSET
        return context

    # Output while it is written

    @property
    def _live(self) -> Live | None:
        return None if self._watched is None else self._watched.live

    @property
    def is_watched(self) -> bool:
        """Whether it is worth writing the output piece by piece: the run is asynchronous, or somebody reads it now."""
        return self._live is not None

    def emit(self, text: str, field: str | None = None) -> None:
        """Append *text* to a field of the output, for clients that read the run's events now. Nothing is stored.

        The result of the agent is what counts: if it differs in the end, clients get the right text instead.

        Args:
            field: of the output. By default the first one that is a string, or else the first one.

        Raises: ValueError if the output has no such field.
        """
        names = self._output_names
        if field is None:
            field = names[0] if names else "result"
        elif names and field not in names:
            raise ValueError(
                f"The output of {self.agent_name!r} has no field {field!r}. Its fields: {', '.join(names)}."
            )
        live = self._live_from_start()
        if live is not None and text:
            live.write(self, field, text)

    def emit_value(self, field: str, value: Any) -> None:
        """Set a field of the output that is not written piece by piece, like ``emit``."""
        live = self._live_from_start()
        if live is not None:
            live.write_value(self, field, value)

    def _live_from_start(self) -> Live | None:
        """Return the live output, unless a part of what this agent has written is missing in it."""
        live = self._live
        if self._began_in is msgspec.UNSET:
            self._began_in = live
        return live if live is self._began_in else None

    def emit_reasoning(self, text: str) -> None:
        """Append *text* to the reasoning of the model, for clients that ask for it."""
        live = self._live
        if live is not None:
            live.write_reasoning(self, text)

    def reset_output(self) -> None:
        """Drop what this agent has written in this turn. It begins anew. No effect if it has written nothing."""
        self._began_in = msgspec.UNSET
        live = self._live
        if live is not None:
            live.reset(self)

    def settle_output(self, result: msgspec.Raw) -> None:
        """Make what clients have got the fields of *result*, if this agent has written anything. Engines call it."""
        live = self._live
        if live is not None:
            has_missed = self._began_in is not msgspec.UNSET and self._began_in is not live
            live.settle(self, result, has_missed=has_missed)

    def call(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        name: str | None = None,
        keep: Literal["all", "result"] = "all",
        **kwargs: Any,
    ) -> Awaitable[Any]:
        """Execute a function once, and store its result.

        If the step runs again after a crash, the stored result is returned and the function is not executed. So put
        side effects into calls: the code around them runs again. Calls may be made at the same time.

        Args:
            function: async, or sync, which runs in a worker thread. It is identified by its name and its arguments. A
                parameter annotated with ``RunContext`` receives this context.
            name: identifies the call instead of its arguments. Equal calls are numbered in their order.
            keep: "result" does not store the arguments. Use it if they are long or secret.

        Returns: the result, as its return type reads it from JSON. Without a return type, it is plain JSON values.

        Raises:
            CallError: the agent is not async; the arguments or the result cannot be JSON; or the result does not match
                the return type.
            Exception: what the function raises. A failed call is executed again if the step runs again.

        Cancellation: a call that has not finished is not stored. A synchronous function is waited for.
        """
        return self.journal.call(self, function, args, kwargs, name, keep)

    def run_agent(self, name: str, inputs: Mapping[str, Any]) -> Coroutine[Any, Any, dict[str, Any]]:
        """Let another agent of the flock run, as a call of this step, and return its result.

        The agent runs in the slot of this run, and counts towards its own ``max_concurrency``. If it hands off, the
        next agents run too, each as a call of its own. Their tokens count as those of this step.

        Args:
            name: of an agent of the same flock.
            inputs: one value for each field of its input signature.

        Returns: the outputs of the last agent, as JSON values.

        Raises:
            CallError: this agent is not async, or the inputs are invalid, or there is no such agent, or it may not be
                repeated (``on_interrupt="fail"``).
            InvalidHandoff, TooManySteps: the agent hands off to an agent that does not exist, or too many times.
            Exception: what the agent raises.

        Cancellation: as for ``call``.
        """
        return self.journal.run_agent(self, name, inputs)

    @property
    def journal(self) -> StepJournal:
        """The calls of the step. Agents may call ``once`` of it; see ``flock.engine.journal``."""
        assert self._journal is not None, "an engine made this context"
        return self._journal

    @overload
    def ask(
        self,
        question: str,
        type: type[T],
        /,
        *,
        name: str | None = None,
        expires_s: float | None = None,
        default: Any = msgspec.UNSET,
    ) -> Awaitable[T]: ...

    @overload
    def ask(
        self,
        question: str,
        type: Any,
        /,
        *,
        name: str | None = None,
        expires_s: float | None = None,
        default: Any = msgspec.UNSET,
    ) -> Awaitable[Any]: ...

    def ask(
        self,
        question: str,
        type: Any,
        /,
        *,
        name: str | None = None,
        expires_s: float | None = None,
        default: Any = msgspec.UNSET,
    ) -> Awaitable[Any]:
        """Ask a person. The run waits for the answer, and uses no memory and no slot meanwhile.

        The step ends here, and runs again when all its questions are answered: calls that have finished are not
        executed again, but the code around them is. Calls that run at the same time are finished first.

        Args:
            question: identifies the call, together with the type. Equal questions are numbered in their order.
            type: of the answer: any type that can be read from JSON. People see its JSON Schema.
            name: identifies the call instead of the question, for one whose text changes.
            expires_s: how long to wait, in seconds. Then the run fails as "expired". By default without a limit.
            default: the answer if nobody has answered in time.

        Returns: the answer, read from JSON as *type*.

        Raises: CallError if the agent is not async; *type* cannot be read from JSON; or nobody can be asked, because
            the run is executed without a server.

        Cancellation: the question is not asked.
        """
        return self.journal.ask(self, question, type, name, expires_s, default)

    @property
    def idempotency_key(self) -> str:
        """The idempotency key of the call that is executing, or ``step_key`` outside of a call."""
        call_id = CURRENT_CALL.get()
        return f"{self._root_key}/{call_id}" if call_id else self.step_key

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Report the progress of the work. Of many calls in a short time, only the last one is stored.

        A message longer than 8 KiB is truncated.

        Raises: TypeError or ValueError if *done* or *total* is not a finite number.
        """
        numbers = [None if number is None else float(number) for number in (done, total)]
        if numbers[0] is None or not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"Progress must be given in finite numbers, not as {done!r} of {total!r}.")
        progress = Progress(done=numbers[0], total=numbers[1], message=cut(safe_text(message)))
        self._reported[:] = [progress]
        self._on_progress(progress)

    def report_wait(self, reason: str | None) -> None:
        """Show what the step waits for as the message of its progress; None if it no longer waits."""
        reported = self._reported[0] if self._reported else None
        if reason is not None:
            reported = msgspec.structs.replace(reported or Progress(done=0), message=reason)
        self._on_progress(reported)

    def spend(self, usage: Usage, model: str | None = None) -> None:
        """Report the tokens of a model's answer, whether or not the answer is usable.

        Args:
            model: the model that answered, ``provider/model``. Without it, the cost of the run is unknown.
        """
        usage = self._priced(usage, model)
        if self._journal is not None:
            self._journal.spend(usage, model)
        self._on_usage(self.agent_name, usage)

    def check_tokens(self, models: Sequence[str] = ()) -> None:
        """Check that the run may call one of *models*. An agent must call this before each model call.

        Raises: TooManyTokens if it has no tokens left; CostLimit if it has spent its ``max_cost``, or has one and
            one of *models* has no price.
        """
        self._check_cost(self.agent_name, models)
        if self._max_tokens is None or self._journal is None:
            return
        spent = self._journal.spent.input_tokens + self._journal.spent.output_tokens
        if spent >= self._max_tokens:
            raise TooManyTokens(
                f"Stopped after {spent} tokens, before {self.agent_name!r} called its model. One run may use "
                f"{self._max_tokens} tokens (max_tokens of the engine)."
            )


class Engine(Protocol):
    """Accepts and executes runs and batches. The embedded engine and the Temporal engine both implement it.

    Use it as an async context manager. Outside of the context, all methods except ``health`` and ``observe`` raise
    EngineStopped.
    """

    @property
    def item_limits(self) -> ItemLimits:
        """The limits on the number of items in a batch and on the size of each."""

    @property
    def is_draining(self) -> bool:
        """Whether the engine rejects new work because the server is shutting down."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting work, wait up to *timeout_s* seconds for running work to end, then stop the rest.

        Asynchronous runs that are stopped are resumed at the next start. Other runs fail as "interrupted".
        """

    def check_ready(self) -> None:
        """Raise EngineStopped or StoreError if new runs cannot be accepted now."""

    def health(self) -> EngineHealth:
        """Return the state of the engine and its store."""

    def observe(self, observer: Observer) -> None:
        """Notify *observer* of all events from now on."""

    async def queue(self) -> Queue:
        """Return the state of the queue, over all processes that share it. Raises StoreError."""

    async def submit(
        self,
        agent_name: str,
        inputs: Inputs,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        is_async: bool = True,
        timeout_s: float | None = None,
        session_id: str | None = None,
        max_cost: float | None = None,
        key: IdempotencyKey | None = None,
        run_id: str | None = None,
    ) -> Run:
        """Accept a run and return without waiting for its result.

        Args:
            inputs: one value for each field of the agent's input signature: a mapping, or the text of a JSON object.
            request_id: id of the caller's request in the log.
            traceparent: trace context of the caller's request (W3C Trace Context), passed on to model calls. An invalid
                one is ignored.
            principal: name of the run's owner.
            is_async: True for a run that does not need a waiting caller. It is on disk when this method returns, and is
                resumed after a crash. Otherwise it is written as it runs, and fails as interrupted if the process dies.
            timeout_s: wall-clock seconds for each attempt, capped at the engine's limit.
            session_id: the session of *principal* that the run joins, 1 to 128 visible ASCII characters. The run starts
                when the runs of the session that were accepted before it have ended. A retry joins again as the last.
            max_cost: US dollars that its model calls may cost in all attempts, 0 < max_cost <= ``MAX_COST``. It is
                checked before each call.
            key: detects repeated requests.
            run_id: of the run, a ``new_id()`` for ``watch``; None creates one.

        Returns:
            Run: status "starting".

        Raises:
            AgentNotFound: there is no agent with that name.
            InvalidData: the inputs are invalid; pointers begin with ``/inputs``. Or there is a ``max_cost``, and the
                agent, or one that can follow it, has a model without a price.
            Replayed: a run was already created with this key.
            KeyReused: the key was already used for a different request.
            Conflict: another request with this key is being accepted at the same time.
            EngineFull: the queue is full.
            EngineStopped: the engine is not running, or is shutting down.
            StoreError: the run cannot be stored.

        Cancellation: the run is either accepted completely or not at all.
        """

    async def submit_batch(
        self,
        agent_name: str,
        items: Items,
        options: BatchOptions,
        *,
        on_invalid: OnInvalid = "reject",
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        key: IdempotencyKey | None = None,
    ) -> Batch:
        """Read and validate all items, then accept the batch. If an item is rejected, no item starts.

        Args:
            items: read one at a time. They are staged, and not visible until the last one is read.
            on_invalid: "skip" accepts invalid items and fails them as "invalid_input".

        Raises:
            InvalidData: items are invalid (up to 100 errors), or there are no items. A pointer begins with
                ``/batch_inputs/{position}`` if the item has no location of its own.
            TooLarge: there are more than ``max_items``.
            DefinitionError: an option is invalid.
            The errors of ``submit``, and any exception that *items* raises.

        Cancellation: the batch is either accepted completely or not at all.
        """

    async def get_run(self, run_id: str) -> Run:
        """Return the current state of the run. Raises RunNotFound."""

    async def get_calls(self, run: Run) -> Mapping[int, Sequence[Call]]:
        """Return the calls of *run* that have ended, by the position of their step, oldest first.

        Of long arguments and results only ``NOT_LOADED`` is returned, and at most ``MAX_SHOWN_CALLS`` calls of a run.
        If a step was retried, its calls are those of the last retry.
        """

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        """Wait until the run is final or waits for an answer, at most *timeout_s* seconds, and return it.

        Raises: RunNotFound; StoreError if its final status cannot be written now; EngineStopped if the engine stops and
            leaves the run to be resumed later.
        Cancellation: the run continues.
        """

    async def cancel_run(self, run_id: str) -> Run:
        """Request cancellation of a run and return without waiting. A run that is already cancelled is returned as is.

        Raises: RunNotFound; Conflict if it is completed or failed.
        """

    async def answer_call(self, run_id: str, call_id: str, output: msgspec.Raw) -> Run:
        """Answer a question of a waiting run. After the last answer, the run continues.

        Returns: the run. The same answer may be given again.

        Raises:
            RunNotFound; CallNotFound if the run does not ask this.
            InvalidData: the answer does not match the question's schema; pointers begin with ``/output``.
            Conflict: the question was answered otherwise; the run has ended; or this program does not have its agent.
            EngineStopped, StoreError.
        """

    async def retry_run(self, run_id: str, max_cost: float | None = None) -> Run:
        """Start the next attempt of a failed or cancelled run after its last committed step.

        Retrying an item starts the next attempt of its batch, which must have ended too.

        Args:
            max_cost: replaces that of the run, or of the batch of an item. Earlier attempts count too.

        Raises: RunNotFound, Conflict, EngineFull, EngineStopped.
        """

    async def delete_run(self, run_id: str) -> None:
        """Delete a final run. Raises RunNotFound; Conflict if it is active or is an item of a batch."""

    async def get_session(self, session_id: str, principal: str | None = None) -> Session:
        """Count the runs of a session of *principal*, and what they have spent; None means of all principals.

        Every run is read. Raises: SessionNotFound if there are none.
        """

    async def delete_session(self, session_id: str, principal: str | None = None) -> None:
        """Delete all runs of a session of *principal*; None means of all principals.

        Raises: SessionNotFound if there are none; Conflict, before anything is deleted, if one of them is active.
        """

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        """Return one page of runs, newest first, without batch items and steps. Long runs make a page shorter."""

    def watch(self, run_id: str) -> AbstractContextManager[object]:
        """Keep the live output of a run inside the block, so that a reader of its events gets it from the start.

        The run need not exist yet: its id can be passed to ``submit``.
        """

    def events(self, run_id: str, after: int = 0, *, reasoning: bool = False) -> AsyncGenerator[Event | None, None]:
        """Yield the events of a run after the id *after* until it ends, and None after 15 s without an event.

        Events of the live output, such as ``output.delta``, have no id. They are sent after the ``step.started`` and
        before the ``step.completed`` of their step.

        Args:
            reasoning: also yield ``reasoning.delta``.

        Raises RunNotFound before the first event. A slow reader may miss progress events, but no others.
        """

    async def get_batch(self, batch_id: str) -> Batch:
        """Return the current state of the batch. Raises BatchNotFound."""

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        """Wait for a batch, like ``wait``."""

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Sequence[RunStatus] = tuple(RunStatus)
    ) -> Sequence[Run]:
        """Return up to *limit* items after the position *after*, in order, without their steps.

        There may be fewer if they are long. An empty page means that there are no more items. Raises BatchNotFound.
        """

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        """Return one page of batches, newest first. Long errors make a page shorter."""

    def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """Yield the progress of a batch, at most 4 times a second, and its end. Yield None after 15 s without an event.

        Raises BatchNotFound before the first event. The id of the final event is the batch's attempt. Progress events
        have no id.
        """

    async def cancel_batch(self, batch_id: str) -> Batch:
        """Cancel a batch, like ``cancel_run``: no more items start, and running items are cancelled."""

    async def retry_batch(self, batch_id: str, only: Sequence[RunStatus] = (), max_cost: float | None = None) -> Batch:
        """Start the next attempt of the failed and cancelled items of a final batch.

        Args:
            only: retry only items with these statuses.
            max_cost: replaces that of the batch. Earlier attempts count too.

        Raises: BatchNotFound; Conflict if it is not final, or has no such item; EngineFull, EngineStopped.
        """

    async def delete_batch(self, batch_id: str) -> None:
        """Delete a final batch and its items. Raises BatchNotFound; Conflict if it is active."""


#: A later version may append fields to those of version 00.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?")


def valid_traceparent(sent: str | None) -> str | None:
    """Return *sent* as version 00, or None if it is invalid (W3C Trace Context, sections 3.2 and 4.3)."""
    match = TRACEPARENT.fullmatch(sent or "")
    return None if match is None or (match[1] == "00" and match[3]) else f"00{match[2]}"


def safe_text(value: object) -> str:
    """Return *value* as text that can be stored and sent, even if it has lone surrogates or its ``str()`` fails."""
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception:
        return f"({type(value).__name__})"


def one_line(text: str) -> str:
    """Return *text* with line breaks, terminal escapes and other non-printable characters escaped, for the log."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def now() -> datetime:
    return datetime.now(UTC)


#: Max clock skew, in seconds: new ids do not follow existing ids that are further in the future than this.
MAX_CLOCK_SKEW_S = 7 * 86_400

_id_lock = threading.Lock()
_last_id_time = 0


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562, section 5.7).

    Ids of one process sort in order of creation: the 12 bits after the milliseconds hold their fraction (method 3 of
    section 6.2), and the time in an id increases even if the clock does not.
    """
    global _last_id_time
    with _id_lock:
        _last_id_time = ticks = max(_last_id_time + 1, time.time_ns() * 4096 // 1_000_000)
    digits = f"{ticks >> 12:012x}7{ticks & 0xFFF:03x}{0b10 << 62 | int.from_bytes(os.urandom(8)) >> 2:016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def make_ids_after(id_: str) -> None:
    """Ensure that new ids sort after *id_*, unless it is far in the future: filters compare ids with times."""
    global _last_id_time
    value = UUID(id_).int
    if value >> 80 < (time.time() + MAX_CLOCK_SKEW_S) * 1000:
        with _id_lock:
            _last_id_time = max(_last_id_time, value >> 80 << 12 | value >> 64 & 0xFFF)

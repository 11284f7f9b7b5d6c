"""What is kept of the work, and the shapes through which the rooms talk about it.

A ``Run`` is one request carried to one end; it is made of ``Step``s, one for each agent that had its turn. A ``Batch``
is many runs over one agent: an item is a run with a ``batch_id`` and a ``position``. All of them are frozen: a change
is a new record, so that whoever holds one sees one moment, whole.

JSON is kept as ``msgspec.Raw``: nothing mutable can pass from one run to another, and a store can write it as it is.
"""

import math
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar
from uuid import UUID

import msgspec

from flock.errors import EngineFull, FieldError, TooManyTokens, cut

__all__ = [
    "INVALID_INPUT",
    "Batch",
    "BatchFilter",
    "BatchOptions",
    "Engine",
    "EngineHealth",
    "Event",
    "IdempotencyKey",
    "Inputs",
    "ItemLimits",
    "Items",
    "LongJSON",
    "Observer",
    "OnExtra",
    "OnInvalid",
    "Page",
    "Principal",
    "Progress",
    "Queue",
    "QueueLimits",
    "Row",
    "Run",
    "RunContext",
    "RunFilter",
    "RunStatus",
    "Step",
    "Time",
    "Usage",
    "event_of_batch",
    "events_of",
    "make_ids_after",
    "new_id",
    "now",
    "one_line",
    "safe_text",
    "stub_of",
    "valid_traceparent",
]


#: RFC 3339, in UTC, where it is sent.
Time = Annotated[datetime, msgspec.Meta(tz=True)]


class RunStatus(StrEnum):
    """Where a run or a batch stands. The last three are final."""

    #: accepted, not yet running
    STARTING = "starting"
    #: an agent is at work
    RUNNING = "running"
    #: the result is there
    COMPLETED = "completed"
    #: it ended without a result; ``error`` says why
    FAILED = "failed"
    #: it was stopped on request, and has stopped
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (RunStatus.STARTING, RunStatus.RUNNING)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens, in the words of the GenAI conventions (``gen_ai.usage.input_tokens``)."""

    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            input_tokens=self.input_tokens + other.input_tokens,
            output_tokens=self.output_tokens + other.output_tokens,
        )


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One agent's turn. ``next_agent`` is its decision who goes on; None ends the run."""

    agent_name: str
    result: msgspec.Raw
    next_agent: str | None = None
    usage: Usage | None = None
    attempt: int = 1
    started_at: datetime
    completed_at: datetime


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far an agent says it is. ``total`` is None where nobody knows."""

    done: float
    total: float | None = None
    message: str = ""


#: The inputs of a stub.
LEFT_IN_STORE = msgspec.Raw(b"{}")
#: A run whose inputs and results are shorter is never a stub: to read them again would take longer than to hold them.
STUB_BYTES = 1024


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One request and all that is known of it. Ids are UUIDs of version 7, times are in UTC.

    Attributes:
        flock: the name of the flock whose engine carries it.
        traceparent: of the request that asked for it (W3C Trace Context, section 3.2).
        principal: the name of whom it belongs to; None where nobody asked who it was.
        is_async: nobody waits for the answer, so it is taken up again after a crash.
        attempt: how often it was begun, by a retry or after a crash; from 1.
        extra: what the row of an item had beside its inputs, as a JSON object, kept for the results; None if nothing.
        recoveries: how many of these attempts began after a crash or a stop, and not by a retry.
        timeout_s: wall-clock seconds for one attempt, from its first step on.
        owner: the engine that works on it; every write is fenced by it.
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
    steps: tuple[Step, ...] = ()

    @property
    def is_stub(self) -> bool:
        """Whether its inputs and results are in the store only; see ``stub_of``."""
        return self.inputs is LEFT_IN_STORE

    @property
    def content_bytes(self) -> int:
        """How long its inputs and results are together."""
        own = len(self.inputs) + len(self.result or b"") + len(self.extra or b"")
        return own + sum(len(step.result) for step in self.steps)

    @property
    def trace_id(self) -> str | None:
        return self.traceparent and self.traceparent[3:35]

    @property
    def usage(self) -> Usage | None:
        spent = [step.usage for step in self.steps if step.usage is not None]
        return sum(spent, Usage()) if spent else None

    @property
    def next_agent_name(self) -> str | None:
        """The agent that has the next turn; None if all turns are done."""
        return self.steps[-1].next_agent if self.steps else self.agent_name

    def step_key(self, position: int) -> str:
        """What one step, from 0, is called where it must not be paid for twice: ``run:{run_id}/{position}``.

        It is the same each time that the step is begun, also by another process after a crash. After a retry, which
        somebody asked for since they want another answer, it is ``run:{run_id}:2/{position}``, and so on.
        """
        tries = self.attempt - self.recoveries
        return f"run:{self.run_id}/{position}" if tries == 1 else f"run:{self.run_id}:{tries}/{position}"


def stub_of(run: Run) -> Run:
    """What to hold of a run that is in the store and waits: all but its inputs and results, if they are long.

    Its steps keep their names, times and usage.
    """
    if run.is_stub or run.content_bytes < STUB_BYTES:
        return run
    steps = tuple(msgspec.structs.replace(step, result=LEFT_IN_STORE) for step in run.steps)
    return msgspec.structs.replace(run, inputs=LEFT_IN_STORE, result=None, extra=None, steps=steps)


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch is worked on, and how its results are shown.

    Attributes:
        max_workers: items at work at the same time, at least 1.
        parallel: False is one at a time, in order, whatever ``max_workers`` says.
        return_errors: an item that failed is ``{"error", "error_type"}`` in the results; False: null.
        box_results: False gives the bare value if a result has one member; kept columns are members.
        timeout_s: wall-clock seconds for each item.
    """

    max_workers: int = 5
    parallel: bool = True
    return_errors: bool = True
    box_results: bool = True
    timeout_s: float | None = None


#: ``error_type`` of an item that does not fit its agent's signature: to try it again would change nothing.
INVALID_INPUT = "invalid_input"

#: What becomes of a batch with an item that does not fit: "reject" starts nothing, "skip" lets that item fail.
OnInvalid = Literal["reject", "skip"]

#: What becomes of a column, or a member of a row, that is not an input: "reject" starts nothing, "ignore" drops it,
#: "keep" carries it unchanged into the results.
OnExtra = Literal["reject", "ignore", "keep"]


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Many runs of one agent. ``completed_items`` counts those that ended, whatever way.

    Attributes:
        attempt: how often it was begun, by a retry; from 1.
        reopening: the statuses of items that a retry has still to open, separated by commas.
        resumed_at, resumed_with: when an engine last began to work on it, and how many items had ended by then.
        extra_names: the names in ``Run.extra`` of all its items, in the order in which they were met.
        owner: the engine that works on it; every write of it and of its items is fenced by it.
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

    @property
    def progress_percentage(self) -> float:
        return round(100 * self.completed_items / max(1, self.total_items), 2)

    @property
    def eta_s(self) -> float | None:
        """Seconds to its end, if it goes on as since it was resumed; None where nobody can tell."""
        ended = self.completed_items - self.resumed_with
        if self.status.is_final or self.resumed_at is None or ended <= 0:
            return None
        took_s = max(0.0, (now() - self.resumed_at).total_seconds())
        return round((self.total_items - self.completed_items) * took_s / ended, 3)

    def result_of(self, item: Run) -> Any:
        """What stands for *item* among the results, kept columns first; None as long as there is nothing to say."""
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
    """What becomes one item of a batch.

    Attributes:
        inputs: of the run, as the text of a JSON object.
        at: where the row stands in what was sent, as a JSON pointer; "" where that has lines.
        line: where it begins there, from 1.
        sources: where in what was sent an input stands that is not at ``{at}/{name}``.
        extra: its members that are kept for the results, and are not inputs.
        errors: what is wrong with it, before anyone looks at its inputs. An error of the same member in other rows is
            reported once.
    """

    inputs: msgspec.Raw
    at: str = ""
    line: int | None = None
    sources: Mapping[str, str] = {}
    extra: Mapping[str, msgspec.Raw] = {}
    errors: tuple[FieldError, ...] = ()


class ItemLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The most items of one batch, and the longest inputs of one item with its kept columns, in bytes of JSON."""

    max_items: int
    max_input_bytes: int


#: What a run is given: a mapping, or the text of a JSON object.
Inputs = msgspec.Raw | Mapping[str, Any]
#: What a batch is made of; it is read once, as far as needed, and never held as a whole.
Items = Iterable[Inputs | Row] | AsyncIterable[Inputs | Row]


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks. An admin may see and do what belongs to others.

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
    """What makes two requests the same: the client's key, a fingerprint of what was asked for, and whose key it is.

    The fingerprint of a streamed upload is a function, which knows it once the last item is read.
    """

    key: str
    fingerprint: bytes | Callable[[], bytes]
    principal: str | None = None

    @property
    def digest(self) -> bytes:
        return self.fingerprint if isinstance(self.fingerprint, bytes) else self.fingerprint()

    @property
    def scoped_key(self) -> str:
        """The same key of two principals is two keys; neither part has a space in it."""
        return self.key if self.principal is None else f"{self.principal} {self.key}"


class RunFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs a list holds; None is no condition.

    Attributes:
        created_after, created_before: to the millisecond.
        after: the last id of the page before.
        limit: runs a page.
        with_inputs, with_results: read these too; otherwise they are empty and None.
    """

    status: RunStatus | None = None
    agent_name: str | None = None
    principal: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    after: str | None = None
    limit: int = 100
    with_inputs: bool = False
    with_results: bool = False


class BatchFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which batches a list holds; None is no condition. ``after`` is the last id of the page before."""

    status: RunStatus | None = None
    agent_name: str | None = None
    principal: str | None = None
    after: str | None = None
    limit: int = 100


#: About how long one page of records is at most, in bytes of JSON.
PAGE_BYTES = 1024 * 1024

R = TypeVar("R", "Run", "Batch")


class Page(list[R]):
    """Records that are sent or held together: *limit* at most, about PAGE_BYTES, and always at least one.

    Attributes:
        has_more: there is another record, which was not added.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes_left = PAGE_BYTES
        self.has_more = False

    def add(self, record: R) -> bool:
        """Add *record*; False if the page is full."""
        self._bytes_left -= _json_bytes(record)
        self.has_more = bool(self) and (len(self) >= self._limit or self._bytes_left < 0)
        if not self.has_more:
            self.append(record)
        return not self.has_more


def _json_bytes(record: Run | Batch) -> int:
    """How long those of its members are that may be long."""
    length = 0 if record.error is None else len(msgspec.json.encode(record.error))
    if isinstance(record, Run):
        length += len(bytes(record.inputs)) + len(bytes(record.result or b"")) + len(bytes(record.extra or b""))
    return length


#: A longer result is read in pieces while it is sent.
LONG_BYTES = 64 * 1024
#: How much of it at once: the store finds a place in it in a time that grows with what is before that.
READ_BYTES = 128 * 1024


class LongJSON:
    """A long text of JSON that is read when it is sent, so that a slow reader does not hold all of it in memory.

    Attributes:
        length: in bytes.
        read: returns up to so many bytes of it from a position on. Raises RunNotFound, StoreError.
        kept: returns a context within which retention does not delete it.
    """

    def __init__(
        self, length: int, read: Callable[[int, int], bytes], kept: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.length = length
        self.read = read
        self.kept = kept

    def pieces(self) -> Iterator[bytes]:
        """All of it, in order. Raises RunNotFound, StoreError."""
        for start in range(0, self.length, READ_BYTES):
            yield self.read(start, READ_BYTES)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a run. ``id`` grows with each; progress has none, since only the latest is kept.

    In *data*, ``result`` is a ``LongJSON`` if it is long and the engine can read it again.
    """

    id: int | None
    name: str
    data: dict[str, Any]


#: The ids of one attempt's events lie within so many.
EVENTS_AN_ATTEMPT = 1_000_000


def events_of(run: Run) -> list[Event]:
    """All events of *run* up to now, in order. They are derived from its record, so that any process can tell them.

    An id has one content, whenever it is asked for: an event holds nothing that the record learns only later.
    """

    def event(attempt: int, number: int | None, name: str, **data: Any) -> Event:
        id_ = None if number is None else attempt * EVENTS_AN_ATTEMPT + number
        return Event(id=id_, name=name, data={"run_id": run.run_id, "attempt": attempt, **data})

    # A run that was interrupted and waits to be resumed still has the time at which its last attempt started.
    has_started = run.started_at is not None and run.status is not RunStatus.STARTING
    started = [event(run.attempt, 0, "run.started", agent_name=run.agent_name, started_at=run.started_at)]
    events: list[Event] = []
    for position, step in enumerate(run.steps):
        about = {"position": position, "agent_name": step.agent_name}
        if step.attempt == run.attempt:
            events, started = events + started, []
        events.append(event(step.attempt, 2 * position + 1, "step.started", **about))
        end = {name: getattr(step, name) for name in ("started_at", "completed_at", "result", "usage")}
        events.append(event(step.attempt, 2 * position + 2, "step.completed", **about, **end))
    if has_started:
        events += started
    name = run.next_agent_name
    if has_started and name is not None:  # a step that has not ended, or in which the run has failed
        number = 2 * len(run.steps) + 1
        events.append(event(run.attempt, number, "step.started", position=len(run.steps), agent_name=name))
    if run.progress is not None:
        events.append(event(run.attempt, None, "run.progress", **msgspec.structs.asdict(run.progress)))
    if run.status.is_final:
        end = {name: getattr(run, name) for name in ("status", "result", "error", "error_type", "completed_at")}
        events.append(event(run.attempt, EVENTS_AN_ATTEMPT - 1, f"run.{run.status}", **end))
    return events


def event_of_batch(batch: Batch) -> Event:
    """How far *batch* is, or its end, whose id is its attempt."""
    counts = ("total_items", "completed_items", "failed_items", "cancelled_items", "progress_percentage", "eta_s")
    names = ("batch_id", "attempt", "status", *counts, *(("error", "completed_at") if batch.status.is_final else ()))
    data = {name: getattr(batch, name) for name in names}
    if batch.status.is_final:
        return Event(id=batch.attempt, name=f"batch.{batch.status}", data=data)
    return Event(id=None, name="batch.progress", data=data)


class Queue(msgspec.Struct, frozen=True):
    """How many runs wait for their first step, and when the oldest of those was accepted that were never begun."""

    depth: int
    oldest_at: datetime | None


class QueueLimits(msgspec.Struct, frozen=True):
    """How many runs may wait: of all principals together, and of one."""

    max_runs: int
    max_runs_per_principal: int

    @classmethod
    def of(cls, max_queue: int, max_queue_per_principal: int | None) -> "QueueLimits":
        """The options of an engine. One principal has half of the queue by default."""
        return cls(max_queue, max(1, max_queue // 2) if max_queue_per_principal is None else max_queue_per_principal)

    def check(self, waiting: int, state: str = "waiting") -> None:
        """Raise EngineFull if *waiting* runs are all that may wait."""
        if waiting >= self.max_runs:
            raise EngineFull(f"{waiting} runs are {state} already, all that this server takes (max_queue).")

    def check_share(self, waiting: int, state: str = "waiting") -> None:
        """Raise EngineFull if *waiting* runs are all that one principal may have."""
        if waiting >= self.max_runs_per_principal:
            raise EngineFull(
                f"{waiting} runs of this caller are {state} already, all that one caller may have "
                "(max_queue_per_principal)."
            )


class EngineHealth(msgspec.Struct, frozen=True):
    """How an engine stands. It takes new work where it is running and its store is ok."""

    engine: Literal["running", "stopping", "stopped"] = "running"
    store: Literal["ok", "failing"] = "ok"


class Observer(Protocol):
    """Hears what an engine does. It is called in the event loop, so it must be quick."""

    def run_started(self, run: Run) -> None:
        """An attempt of a run has begun."""

    def step_completed(self, step: Step) -> None:
        """An agent has had its turn."""

    def tokens_spent(self, agent_name: str, usage: Usage) -> None:
        """A model has answered an agent, whatever came of it."""

    def run_ended(self, run: Run) -> None:
        """A run is in its final state. If it ended while it waited, it may be a stub, without its inputs."""

    def model_call_retried(self) -> None:
        """A call to a model failed, and is tried again."""


class RunContext:
    """What an agent may ask and say while it works. A parameter annotated with it receives it; any thread may use it.

    Attributes:
        run_id, agent_name, attempt, request_id, traceparent: of the run.
        step_key: names this step, ``run:{run_id}/{position}``, from 0. It stays the same where the step is begun again
            after a crash, and is another after a retry: send it as ``Idempotency-Key`` to what costs money, with
            something of your own behind it for each further call. Model agents do.
        cancel_requested: True once somebody asked to cancel the run. A synchronous function reads it now and then, and
            returns or raises; an async one is cancelled at its next await, and needs not look.
    """

    def __init__(
        self,
        run: Run,
        agent_name: str,
        tell: Callable[[Progress], None],
        tell_spent: Callable[[Usage], None] = lambda usage: None,
        max_tokens: int | None = None,
    ) -> None:
        self.run_id = run.run_id
        self.agent_name = agent_name
        self.attempt = run.attempt
        self.request_id = run.request_id
        self.traceparent = run.traceparent
        self.step_key = run.step_key(len(run.steps))
        self.cancel_requested = False
        self._tell = tell
        self._tell_spent = tell_spent
        self._max_tokens = max_tokens
        self._spent = run.usage or Usage()

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Say how far the work is. Of many calls in a short time only the last one is kept.

        A message longer than 8 KiB is cut.

        Raises: TypeError or ValueError where a number is none, or not finite.
        """
        numbers = [None if number is None else float(number) for number in (done, total)]
        if numbers[0] is None or not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"Progress is told in finite numbers, not in {done!r} of {total!r}.")
        self._tell(Progress(done=numbers[0], total=numbers[1], message=cut(safe_text(message))))

    def spend(self, usage: Usage) -> None:
        """Say what an answer of a model cost, usable or not."""
        self._spent += usage
        self._tell_spent(usage)

    def check_tokens(self) -> None:
        """Raise TooManyTokens where the run has spent all that it may. An agent asks before it asks a model."""
        spent = self._spent.input_tokens + self._spent.output_tokens
        if self._max_tokens is not None and spent >= self._max_tokens:
            raise TooManyTokens(
                f"Stopped after {spent} tokens, before {self.agent_name!r} asked its model: one run may spend "
                f"{self._max_tokens} (max_tokens of the engine)."
            )


class Engine(Protocol):
    """What takes runs and carries each to its end. One protocol, whatever machine or cluster is behind it.

    Use it as an async context manager. Outside it, all methods raise EngineStopped but ``health`` and ``observe``.
    """

    @property
    def item_limits(self) -> ItemLimits:
        """How many items a batch has at most, and how long each of them is at most."""

    @property
    def is_draining(self) -> bool:
        """True once no new work is taken, since the server is about to stop."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        """Take no new work, give what is at work *timeout_s* seconds to end, and stop the rest.

        Asynchronous runs that are stopped go on at the next start; the others end as failed, "interrupted".
        """

    def check_ready(self) -> None:
        """Raise EngineStopped or StoreError where a run would not be taken now."""

    def health(self) -> EngineHealth:
        """The same as a record."""

    def observe(self, observer: Observer) -> None:
        """Tell *observer* of all that happens here from now on."""

    async def queue(self) -> Queue:
        """What waits, in all processes that share the work. Raises StoreError."""

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
        key: IdempotencyKey | None = None,
    ) -> Run:
        """Accept one run and return at once.

        Args:
            inputs: a value for each field of the agent's input signature: a mapping, or the text of a JSON object.
            request_id: the id under which the caller's request is logged.
            traceparent: the trace that the caller's request is part of (W3C Trace Context), for model calls; one that
                is not valid counts as none.
            principal: whom it belongs to.
            is_async: nobody waits for the answer. The run is on disk on return, and goes on after a crash. Otherwise it
                is written on the way, and ends as interrupted if the process dies.
            timeout_s: wall-clock seconds for each attempt, at most the engine's own limit.
            key: makes equal requests one.

        Returns:
            Run: status "starting".

        Raises:
            AgentNotFound: no agent has that name.
            InvalidData: the inputs do not fit; pointers begin with ``/inputs``.
            Replayed: a run was made under this key before.
            KeyReused: the key was used for another request.
            Conflict: a request with this key is being accepted at this moment.
            EngineFull: the queue is full.
            EngineStopped: the engine is not running, or is leaving.
            StoreError: it cannot be kept.

        Cancellation: the run is accepted whole or not at all.
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
        """Accept one batch, once its last item is read. Every item is checked first: all of them start, or none.

        Args:
            items: read one by one; many of them are kept out of sight until the last one is there.
            on_invalid: "skip" accepts items that do not fit, and lets them end as failed, "invalid_input".

        Raises:
            InvalidData: items do not fit, at most 100 errors of them; pointers begin with ``/batch_inputs/{position}``
                where the item does not say where it stands. Or there is no item.
            TooLarge: there are more than ``max_items``.
            DefinitionError: an option is none.
            As ``submit``, and whatever *items* raises.

        Cancellation: the batch is accepted whole or not at all.
        """

    async def get_run(self, run_id: str) -> Run:
        """The run as it stands. Raises RunNotFound."""

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        """The run once it is final, or as it stands after *timeout_s*.

        Raises: RunNotFound; StoreError where its end cannot be written now; EngineStopped where it is left for later.
        Cancellation: the run goes on.
        """

    async def cancel_run(self, run_id: str) -> Run:
        """Ask for a run to be stopped, and return at once. A run that was cancelled before is returned as it is.

        Raises: RunNotFound; Conflict where it ended otherwise.
        """

    async def retry_run(self, run_id: str) -> Run:
        """Begin the next attempt of a failed or cancelled run, after its last committed step.

        That of an item is the next attempt of its batch, which must have ended, too.

        Raises: RunNotFound, Conflict, EngineFull, EngineStopped.
        """

    async def delete_run(self, run_id: str) -> None:
        """Forget a final run. Raises RunNotFound; Conflict while it is active or if it is an item of a batch."""

    async def list_runs(self, wanted: RunFilter) -> Page[Run]:
        """One page of runs that are no items, newest first, without their steps; fewer where they are long."""

    def events(self, run_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """The events of a run behind the id *after*, as they happen, to its end; None after 15 s without one.

        Raises RunNotFound before the first. A reader that is slow misses progress, and nothing else.
        """

    async def get_batch(self, batch_id: str) -> Batch:
        """The batch as it stands. Raises BatchNotFound."""

    async def wait_batch(self, batch_id: str, timeout_s: float | None = None) -> Batch:
        """As ``wait``, for a batch."""

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Sequence[RunStatus] = tuple(RunStatus)
    ) -> Sequence[Run]:
        """Up to *limit* items behind the position *after*, in order, without their steps; fewer where they are long.

        There is none left where none is given. Raises BatchNotFound.
        """

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        """One page of batches, newest first; fewer where their errors are long."""

    def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """How far a batch is, at most 4 times a second, and its end; None after 15 s without one.

        Raises BatchNotFound before the first. The id of the end is the batch's attempt; progress has none.
        """

    async def cancel_batch(self, batch_id: str) -> Batch:
        """As ``cancel_run``: no item starts from now on, and those at work are cancelled."""

    async def retry_batch(self, batch_id: str, only: Sequence[RunStatus] = ()) -> Batch:
        """Begin the next attempt of those items of a final batch that failed or were cancelled, or *only* of some.

        Raises: BatchNotFound; Conflict where it is not final, or has no such item; EngineFull, EngineStopped.
        """

    async def delete_batch(self, batch_id: str) -> None:
        """Forget a final batch and its items. Raises BatchNotFound; Conflict while it is active."""


#: A later version may have more behind what version 00 has.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?")


def valid_traceparent(sent: str | None) -> str | None:
    """As version 00 has it; one that is not valid counts as none (W3C Trace Context, sections 3.2 and 4.3)."""
    found = TRACEPARENT.fullmatch(sent or "")
    return None if found is None or (found[1] == "00" and found[3]) else f"00{found[2]}"


def safe_text(value: object) -> str:
    """A text that can be kept and sent. Agents may put anything into theirs: lone surrogates, or a str() that fails."""
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception:
        return f"({type(value).__name__})"


def one_line(text: str) -> str:
    """*text* with what would break a line of a log, or colour it, written out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def now() -> datetime:
    return datetime.now(UTC)


#: How far the clock may have been ahead for ids to be made after those that it gave, in seconds.
MAX_CLOCK_LEAD_S = 7 * 86_400

_id_lock = threading.Lock()
_last_id_time = 0


def new_id() -> str:
    """A UUID of version 7 (RFC 9562, section 5.7).

    Ids of one process sort in the order in which they were made: the 12 bits behind the milliseconds hold its fraction
    (method 3 of section 6.2), and a clock that stands still or goes back is stepped over.
    """
    global _last_id_time
    with _id_lock:
        _last_id_time = ticks = max(_last_id_time + 1, time.time_ns() * 4096 // 1_000_000)
    digits = f"{ticks >> 12:012x}7{ticks & 0xFFF:03x}{0b10 << 62 | int.from_bytes(os.urandom(8)) >> 2:016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def make_ids_after(id_: str) -> None:
    """Step over *id_*, which was made when the clock was ahead; but not if it was far ahead, for filters go by ids."""
    global _last_id_time
    value = UUID(id_).int
    if value >> 80 < (time.time() + MAX_CLOCK_LEAD_S) * 1000:
        with _id_lock:
            _last_id_time = max(_last_id_time, value >> 80 << 12 | value >> 64 & 0xFFF)

"""The records of runs and batches.

A ``Run`` is one request and its outcome. It consists of ``Step``s, one for each agent that ran. A ``Batch`` is many
runs of one agent: an item is a run with a ``batch_id`` and a ``position``. All records are frozen. A change creates a
new record, so each record is a consistent snapshot.

JSON is stored as ``msgspec.Raw``, so runs cannot share mutable data, and a store can write it unchanged.
"""

import functools
import operator
import re
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from enum import StrEnum
from types import NoneType
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args

import msgspec

from flock.errors import Conflict, DefinitionError, FieldError, InvalidData, RunFailed
from flock.fair import FairShare
from flock.jsontype import explain
from flock.pydanticmodel import from_json
from flock.runs.client import ClientSettings
from flock.runs.ids import now
from flock.runs.usage import DOLLAR, MAX_COST, Spent, Usage, added, is_spent, shown_usage

__all__ = ["Progress", "RunStatus", "StatusName", "Statuses", "Step", "Time", "statuses_of"]
__all__ += ["INVALID_INPUT", "JSON_NULL", "MAX_SHOWN_BYTES", "MAX_SHOWN_CALLS", "NOT_LOADED"]
__all__ += ["Call", "CallKind", "Mark", "Place", "Raised", "RetriedCalls"]
__all__ += ["Answer", "AskedQuestion", "Question", "Run", "stub_of"]
__all__ += ["Batch", "BatchOptions", "Frame", "Inputs", "ItemLimits", "Items", "OnExtra", "OnInvalid", "Row"]
__all__ += ["BatchFilter", "IdempotencyKey", "Principal", "RunFilter", "bad_role", "name_and_caller"]
__all__ += ["LongJSON", "Page", "QuestionFilter", "QuestionPage", "Session", "shown_as"]

T = TypeVar("T")

#: Sent as RFC 3339, in UTC.
Time = Annotated[datetime, msgspec.Meta(tz=True)]


class RunStatus(StrEnum):
    """The status of a run or a batch. The last three are final."""

    #: accepted, not yet running
    STARTING = "starting"
    #: an agent is running
    RUNNING = "running"
    #: for the answer of a person or a client's tool, a time or a message; nothing is running
    WAITING = "waiting"
    #: ended with a result
    COMPLETED = "completed"
    #: ended without a result; ``error`` has the reason
    FAILED = "failed"
    #: stopped on request
    CANCELLED = "cancelled"

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running. A run that waits for a time is active too; see ``Run.is_active``."""
        return self in (RunStatus.STARTING, RunStatus.RUNNING)

    @property
    def is_final(self) -> bool:
        return self not in (RunStatus.STARTING, RunStatus.RUNNING, RunStatus.WAITING)


#: A ``RunStatus`` as a program may write it.
StatusName = Literal["starting", "running", "waiting", "completed", "failed", "cancelled"]
Statuses = Sequence[RunStatus | StatusName]


def statuses_of(names: Statuses) -> tuple[RunStatus, ...]:
    """Return the statuses with these names. Raises DefinitionError if one is unknown."""
    try:
        return tuple(map(RunStatus, names))
    except ValueError as exc:
        unknown = str(exc).partition(" is not a ")[0]
        raise DefinitionError(f"{unknown} is not a status. Use {', '.join(RunStatus)}.") from exc


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One completed step of a run.

    Attributes:
        next_agent: the agent to run next; None ends the run.
        usage: the tokens that it used, including those of its calls.
        call_count: the number of its calls that are stored.
        first_try: the first of the tries whose calls counted when it ended; see ``Run.first_try``.
        model: the model that answered last; None if it has asked none.
    """

    agent_name: str
    result: msgspec.Raw
    next_agent: str | None = None
    usage: Usage | None = None
    attempt: int = 1
    call_count: int = 0
    first_try: int = 1
    model: str | None = None
    started_at: datetime
    completed_at: datetime


#: ``Run.call_ids`` of new runs.
CALL_IDS = 2

#: In place of None, since msgspec cannot decode a union of Raw and None.
JSON_NULL = msgspec.Raw(b"null")

#: What a call executes.
CallKind = Literal["function", "model", "tool", "agent", "question", "sleep", "message"]
#: Those for which a run can wait without a slot.
WAIT_KINDS = ("question", "sleep", "message")


#: Whether a retry keeps the calls that have returned, or executes all calls again.
RetriedCalls = Literal["keep", "again"]


class Raised(msgspec.Struct, frozen=True, kw_only=True):
    """An exception that a call has raised; see ``flock.steps.raised``. Its class has the name "" if none can be made.

    Attributes:
        module, name: of its class.
        args: as a JSON array. Of an exception that cannot be made, its text.
        attributes: those that are JSON, as a JSON object.
        exceptions: the members of a group.
    """

    module: str
    name: str
    args: msgspec.Raw = msgspec.Raw(b"[]")
    attributes: msgspec.Raw = msgspec.Raw(b"{}")
    exceptions: "tuple[Raised, ...]" = ()


#: In place of the number of an end.
OVERTAKEN = -1


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A call that has started, or an answer that the step has received.

    Attributes:
        start, end: see ``Place``; *end* is 0 for a call without an answer, and OVERTAKEN if another call was cancelled
            before this end was delivered, or if another plain time-out might have passed before it.
        since: the last number before the execution in which it ended, or its end was delivered.
    """

    call_id: str
    start: int
    end: int = 0
    since: int = 0


class Place(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a call stands in its step; see ``flock.steps.replay``.

    Attributes:
        start, end: the numbers of its start and of its end, as the program has seen them, in one sequence.
        start_s, end_s: seconds from when the step began, in the execution in which they happened.
        is_cancelled: the program has cancelled the call. Another call with the same *start* has its late result.
        late_s: for how long it had run on after that, as a function in a thread does. A late result has one too.
        ignored_cancellation: its task was cancelled, but it has ended as if it was not, and the program has seen that.
        vain_s: how much of *end_s* had passed while the step waited in vain for others to be cancelled again.
        also: what has happened in the step since the call that was stored before.
    """

    start: int
    end: int
    start_s: float = 0.0
    end_s: float = 0.0
    is_cancelled: bool = False
    late_s: float = 0.0
    ignored_cancellation: bool = False
    vain_s: float = 0.0
    also: tuple[Mark, ...] = ()


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A finished call of a step; see ``RunContext.call``.

    Attributes:
        call_id: unique in its step, and the same if the step runs again: ``{name}:{digest of the arguments}``, with the
            name that the program gave to the call instead of the digest, and ``:2`` for the second of equal calls.
            A call that a call makes has the id of that call and ``~`` before its own.
        name: of the function, the agent, the tool or the model.
        arguments: by name, as a JSON object; null if they cannot be JSON, or are not kept.
        result: as JSON; null if the call failed.
        error, error_type: of a failed call.
        raised: what it has raised, and raises again if the step runs again. None if it is then executed again: an
            earlier version has stored it.
        usage: the tokens that it used, including those of the calls that it made.
        model: the model that answered last, even in a call that it made; None if it has asked none.
        place: None for an answer that the step has not received while it ran, and if an earlier version has stored it.
        once: "started" or "ended" if it is executed at most once. A started one has no end, so its ``completed_at`` is
            that of its start.
        answered_by: the principal who has answered a question; None without principals, and for a default.
        four_eyes: see ``Question``.
    """

    call_id: str
    name: str
    kind: CallKind = "function"
    arguments: msgspec.Raw = JSON_NULL
    result: msgspec.Raw = JSON_NULL
    error: str | None = None
    error_type: str | None = None
    raised: Raised | None = None
    usage: Usage | None = None
    model: str | None = None
    place: Place | None = None
    once: str | None = None
    answered_by: str | None = None
    four_eyes: bool = False
    started_at: datetime
    completed_at: datetime

    @property
    def is_cancelled(self) -> bool:
        """Whether the program has cancelled it. If its step runs again, it waits until it is cancelled again."""
        return self.place is not None and self.place.is_cancelled

    @property
    def answered_at(self) -> datetime | None:
        """When a question was answered."""
        return self.completed_at if self.kind == "question" and self.error is None else None

    @property
    def is_answer(self) -> bool:
        """Whether it is an answer or a message. It is stored before the step receives it, and so before its place."""
        return self.kind in ("question", "message") and self.error is None

    @property
    def is_start(self) -> bool:
        """Whether it is only the start of a call that is executed at most once."""
        return self.once == "started"

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is not executed again if its step runs again. The model has read the error of a tool."""
        is_known = self.raised is not None or self.once is not None or self.is_cancelled
        return self.error is None or self.kind == "tool" or is_known


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A question to a person that is not answered yet; see ``RunContext.ask``.

    Or a call of a client's tool, a sleep, or an awaited message.

    Attributes:
        call_id: as that of a call; the answer becomes the result of this call.
        question: its text. Of a message, its name. Of a client's tool, that of the tool.
        schema: JSON Schema (2020-12) of the answer.
        arguments: what the question is about, as a JSON object; UNSET if the question itself is enough. Those of a
            client's tool are as the model has written them. Those of a message are the call of a model that goes
            through a batch endpoint; the message is its reply. They are not stored here.
        asked_at: when the wait began.
        expires_at: when the run fails, or continues with *default*; None if it waits without a limit.
        default: the answer if nobody answers in time; UNSET if the run then fails.
        kind: what it is, unless it is a question to a person. A sleep has a *default*, null, and no other answer. The
            answer of a client's tool is its output, a text, and only the principal of the run gives it.
        answerer: the role that may answer it; UNSET if the owner of the run and admins may.
        four_eyes: the principals who started or retried the run cannot answer it.
        raises: if it expires without a default, it raises Expired in the agent that asks, which another one has called.
    """

    call_id: str
    question: str
    schema: msgspec.Raw
    arguments: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    asked_at: Time
    expires_at: Time | None = None
    default: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    kind: Literal["sleep", "message", "client_tool"] | msgspec.UnsetType = msgspec.UNSET
    answerer: str | msgspec.UnsetType = msgspec.UNSET
    four_eyes: bool = False
    raises: bool | msgspec.UnsetType = msgspec.UNSET

    @property
    def is_question(self) -> bool:
        """Whether it has an answer that somebody gives: a person, or the client whose tool was called."""
        return self.kind in (msgspec.UNSET, "client_tool")

    @property
    def is_model_call(self) -> bool:
        """Whether it is a new call of a model that goes through a batch endpoint."""
        return self.kind == "message" and isinstance(self.arguments, msgspec.Raw)

    @property
    def is_for_client(self) -> bool:
        """Whether it is a call of a client's tool."""
        return self.kind == "client_tool"


class AskedQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """A question, with the facts of its run that its answerers may see.

    Attributes:
        run_id, agent_name, session_id, principal: of the run.
        status: "closed" if it is no longer open and has no answer.
        answer: as JSON; UNSET if there is none.
        answered_by: the name of a principal; None if there is none.
    """

    run_id: str
    agent_name: str
    session_id: str | None
    principal: str | None
    question: Question
    status: Literal["open", "answered", "closed"]
    answer: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    answered_by: str | None = None
    answered_at: datetime | None = None


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


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that runs and batches share."""

    flock: str
    agent_name: str
    status: RunStatus = RunStatus.STARTING
    error: str | None = None
    error_type: str | None = None
    created_at: datetime
    started_at: datetime | None = None
    completed_at: datetime | None = None
    request_id: str | None = None
    principal: str | None = None
    attempt: int = 1
    cancel_requested: bool = False
    owner: str | None = None
    retried_by: tuple[str, ...] = ()

    @property
    def begun_by(self) -> tuple[str, ...]:
        """The principals who have started or retried it."""
        return self.retried_by if self.principal is None else (self.principal, *self.retried_by)


class Run(_Record, frozen=True, kw_only=True):
    """One request and its outcome. Ids are UUIDs of version 7, times are in UTC.

    Attributes:
        flock: the name of the flock whose engine executes it.
        traceparent: the trace context of its request (W3C Trace Context, section 3.2).
        principal: the name of its owner; None if the request was not authenticated.
        caller: its owner as the request has identified it; None if that is only a name. See ``acts_for``.
        is_async: whether it runs without a waiting client. Such a run is resumed after a crash.
        attempt: number of the current attempt, from 1. A retry or a recovery starts the next one.
        extra: extra columns of an item's row, as a JSON object, stored for the results; None if there are none.
        recoveries: number of attempts that were started by a recovery after a crash or a stop, not by a retry.
        deaths: how often its process has died while it was running, since it last finished a step or a call.
        timeout_s: wall-clock seconds for one attempt, counted from the start of its first step.
        owner: the engine that is working on it; only this engine may write it.
        retried_by: the names of the principals who have retried it, or its batch.
        session_id: the conversation that it belongs to, within its flock and principal. Runs of a session are executed
            one after the other.
        waiting_for: what a waiting run waits for: open questions, sleeps and messages. While its step runs again, those
            that it waited for, with their times. A run that ended while it was waiting keeps them.
        worked_s: seconds of ``timeout_s`` that the attempt had spent when it last began to wait; 0 if it never did.
        spent: the tokens of all its attempts, including failed steps; None if there were none.
        spent_by: the same, by agent and model.
        max_cost: US dollars that it may spend in all its attempts; None means no limit.
        call_ids: how the ids of its calls are made: ``CALL_IDS``, or 1 if an earlier version has accepted the run.
        call_key: makes the ids of calls whose arguments are not stored. Without it they could be guessed: an id has a
            digest of the arguments. It is "" if an earlier version has accepted the run.
        journal: see ``first_try``; None if no retry has kept calls since.
        dropped: the keys of the failed calls that a retry executes again; see ``flock.steps.retries``.
        earlier_error: the error of the attempt before.
        client: what its client has brought: instructions, tools and options of the model; None if nothing.
        digest: of the inputs of an item and of what makes its result; see ``flock.store.equals``. None if no other item
            may take its result.
        first_span: the trace context of the span of its first execution; None if there was none.
        files: the contents that its inputs refer to; see ``flock.store.contents``.
        version_number: which of ``Batch.versions`` has executed this item last, from 1; None if none has.
    """

    run_id: str
    inputs: msgspec.Raw
    result: msgspec.Raw | None = None
    batch_id: str | None = None
    position: int | None = None
    traceparent: str | None = None
    is_async: bool = False
    recoveries: int = 0
    deaths: int = 0
    timeout_s: float | None = None
    extra: msgspec.Raw | None = None
    progress: Progress | None = None
    waiting_for: tuple[Question, ...] = ()
    worked_s: float = 0.0
    steps: tuple[Step, ...] = ()
    session_id: str | None = None
    spent: Usage | None = None
    spent_by: tuple[Spent, ...] = ()
    max_cost: float | None = None
    call_ids: int = 1
    call_key: str = ""
    journal: int | None = None
    dropped: tuple[str, ...] = ()
    earlier_error: str | None = None
    caller: "Principal | None" = None
    client: ClientSettings | None = None
    digest: str | None = None
    first_span: str | None = None
    files: tuple[str, ...] = ()
    version_number: int | None = None

    @property
    def acts_for(self) -> "Principal | None":
        """Its owner, with what the request, or the batch, had identified; None without principals."""
        if self.caller is not None or not isinstance(self.principal, str):  # the store says what is wrong with another
            return self.caller
        return Principal(name=self.principal)

    @property
    def value(self) -> Any:
        """Its result as Python values; None if there is no result."""
        return None if self.result is None else msgspec.json.decode(self.result)

    def value_as(self, type_: type[T]) -> T:
        """Return its result as *type_*: ``dict[str, int]``, a struct, a dataclass, a TypedDict or a pydantic model.

        Raises:
            InvalidData: it does not match; pointers begin with ``/result``.
            RunFailed: the run has failed or was cancelled.
            Conflict: the run has not ended, or was read without its result.
        """
        if self.result is not None:
            try:
                return msgspec.json.decode(self.result, type=type_, dec_hook=from_json)
            except msgspec.ValidationError as exc:
                raise InvalidData(explain(type_, bytes(self.result), "/result")) from exc
        if self.status.is_final and self.status is not RunStatus.COMPLETED:
            raise RunFailed(self.error or f"The run was {self.status}.", self.error_type or self.status)
        raise Conflict(
            f"The run {self.run_id} is {self.status}, and has no result here. Get it from engine.wait(), or list runs "
            "with with_results=True."
        )

    @property
    def questions(self) -> tuple[Question, ...]:
        """The open questions of a run that has not ended, without sleeps and messages. Its step may still run."""
        return () if self.status.is_final else tuple(each for each in self.waiting_for if each.is_question)

    @property
    def is_active(self) -> bool:
        """Whether it changes without the answer of a person, or a retry."""
        return self.status.is_active or (self.status is RunStatus.WAITING and not self.questions)

    @property
    def is_stub(self) -> bool:
        """Whether its inputs and long results are only in the store; see ``stub_of``."""
        return self.inputs is NOT_LOADED

    @property
    def is_suspect(self) -> bool:
        """Whether it may be the cause of the deaths of its process; see ``flock.store.suspects``."""
        return self.deaths > 1

    @property
    def content_bytes(self) -> int:
        """The total size of its inputs, extra columns and results."""
        return self.exchange_bytes + len(self.result or b"") + len(self.extra or b"")

    @property
    def input_bytes(self) -> int:
        """The size of its inputs, and of what its client has brought."""
        return len(self.inputs) + (0 if self.client is None else len(msgspec.json.encode(self.client)))

    @property
    def exchange_bytes(self) -> int:
        """The total size of its inputs and of the results of its steps."""
        return sum([len(step.result) for step in self.steps], self.input_bytes)

    @property
    def trace_id(self) -> str | None:
        sent = self.traceparent or self.first_span
        return sent and sent[3:35]

    @property
    def usage(self) -> Usage | None:
        """The tokens of all its attempts. A run of an earlier version only knows those of its steps."""
        return self.usage_of_steps if self.spent is None else self.spent

    @property
    def usage_of_steps(self) -> Usage | None:
        return added(*(step.usage for step in self.steps))

    @property
    def next_agent_name(self) -> str | None:
        """The agent of the next step; None if there is no next step."""
        return self.steps[-1].next_agent if self.steps else self.agent_name

    @property
    def tries(self) -> int:
        """The number of attempts without recoveries: 1, and one more for each retry."""
        return self.attempt - self.recoveries

    @property
    def first_try(self) -> int:
        """The first of the tries whose calls count now. A retry keeps the calls of earlier ones, or starts again."""
        return self.journal or self.tries

    def step_key(self, position: int) -> str:
        """Return the idempotency key of the step at *position*, from 0: ``run:{run_id}/{position}``.

        It stays the same if the step is repeated after a crash, even by another process, and in a retry that keeps its
        calls. A retry that executes all calls again changes it to ``run:{run_id}:2/{position}``, and so on.
        """
        return self._key(self.first_try, position)

    def model_key(self, position: int) -> str:
        """Return the key of the step for its models. Each retry is expected to give a new answer, so it changes."""
        return self._key(self.tries, position)

    def _key(self, tries: int, position: int) -> str:
        return f"run:{self.run_id}/{position}" if tries == 1 else f"run:{self.run_id}:{tries}/{position}"


def stub_of(run: Run) -> Run:
    """Return *run* without its inputs and results if they are long, to save memory while it waits in the store.

    Its steps keep their names, times and usage.
    """
    if run.is_stub or run.content_bytes < MIN_STUB_BYTES:
        return run
    steps = tuple(msgspec.structs.replace(step, result=NOT_LOADED) for step in run.steps)
    return msgspec.structs.replace(run, inputs=NOT_LOADED, result=None, extra=None, client=None, steps=steps)


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch is executed, and the form of its results.

    Attributes:
        max_workers: max items running at the same time, at least 1.
        parallel: False runs the items one at a time, in order, and ignores ``max_workers``.
        return_errors: True returns ``{"error", "error_type"}`` as the result of a failed item; False returns null.
        box_results: False returns the bare value if a result has a single member. Kept columns count as members.
        timeout_s: wall-clock seconds for each item.
        max_cost: US dollars that its items may cost, in all attempts of the batch; None means no limit.
        max_failures: how many items may fail before the batch stops, or if less than 1, which share of them; None means
            no limit. Each attempt starts counting again.
        dedupe: execute equal items once. The others get its outcome.
        reuse: take the results of equal items of other batches of the same principal, if the agent is the same.
        reuse_failures: take their failures too.
        limit: execute only the first items, that many. The others are stored, and a retry of the batch executes them.
        sample: execute only that many random items, which *seed* determines.
    """

    max_workers: int = 5
    parallel: bool = True
    return_errors: bool = True
    box_results: bool = True
    timeout_s: float | None = None
    max_cost: float | None = None
    max_failures: float | None = None
    dedupe: bool = False
    reuse: bool = False
    reuse_failures: bool = False
    limit: int | None = None
    sample: int | None = None
    seed: int = 0


#: ``error_type`` of an item whose inputs do not match its agent's signature. Such an item is not retried.
INVALID_INPUT = "invalid_input"

#: What to do with a batch that has an invalid item: "reject" rejects the batch, "skip" fails only that item.
OnInvalid = Literal["reject", "skip"]

#: What to do with a column, or a member of a row, that is not an input: "reject" rejects the batch, "ignore" drops the
#: column, "keep" copies it unchanged to the results.
OnExtra = Literal["reject", "ignore", "keep"]


class Batch(_Record, frozen=True, kw_only=True):
    """Many runs of one agent. ``completed_items`` counts all items that have ended, in any final status.

    It is running until the last item has ended, even while all that are left wait for answers (``waiting_items``).

    Attributes:
        attempt: number of the current attempt, from 1. A retry starts the next one.
        reopening: statuses of the items that a retry still has to reopen, separated by commas; and last "again", if it
            executes all their calls again.
        resumed_at, resumed_with: when an engine last started working on it, and how many items had ended before that.
        extra_names: the names in ``Run.extra`` of all its items, in order of first appearance.
        owner: the engine that is working on it; only this engine may write the batch and its items.
        retried_by: the names of the principals who have retried it, or some of its items.
        usage: the sum of ``Run.spent`` of its items; None if they have used no tokens.
        error_type: why it failed, if not because all items did: "cost_limit", "max_failures", or that of a model error
            that all items would have.
        invalid_items: how many items have invalid inputs. They never run.
        recipe: a digest of what makes the results of its items; None if equal inputs may have other results.
        skipped_rows: how many rows of its table had no value, if any.
        versions: the versions of its agent that have executed its items, in order; on a cluster those of results.
    """

    batch_id: str
    options: BatchOptions
    total_items: int
    completed_items: int = 0
    failed_items: int = 0
    cancelled_items: int = 0
    waiting_items: int = 0
    reopening: str | None = None
    resumed_at: datetime | None = None
    resumed_with: int = 0
    extra_names: tuple[str, ...] = ()
    usage: Usage | None = None
    invalid_items: int = 0
    recipe: str | None = None
    skipped_rows: int | None = None
    versions: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether its results may be of several versions of its agent."""
        return len(set(self.versions)) > 1

    def version_of(self, item: Run) -> str | None:
        """Return the version of the agent that has ended *item*; None if none has."""
        is_made = item.status in (RunStatus.COMPLETED, RunStatus.FAILED) and item.error_type != INVALID_INPUT
        return self.versions[: item.version_number or 1][-1] if is_made and self.versions else None

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
        return round(self.usage.picodollars * (self.total_items - self.invalid_items) / ended / DOLLAR, 6)

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
        is_empty: it has no value at all, so it is skipped.
    """

    inputs: msgspec.Raw
    at: str = ""
    line: int | None = None
    sources: Mapping[str, str] = {}
    extra: Mapping[str, msgspec.Raw] = {}
    errors: tuple[FieldError, ...] = ()
    is_empty: bool = False


class ItemLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Max items in one batch, and max size of one item's inputs and kept columns, in bytes of JSON."""

    max_items: int
    max_input_bytes: int


#: Inputs of a run: a mapping, or the text of a JSON object.
Inputs = msgspec.Raw | Mapping[str, Any]


class Frame(Protocol):
    """A data frame of pandas or polars. Its rows are mappings, without values that are missing."""

    columns: Any


#: Items of a batch. They are read once and only as far as needed, and are never held in memory as a whole.
Items = Iterable[Inputs | Row] | AsyncIterable[Inputs | Row] | Frame


#: The name of a role.
ROLE = r"[A-Za-z0-9_.@-]{1,64}"


def bad_role(role: object) -> str | None:
    """Return why *role* is not the name of a role, or None if it is one."""
    if isinstance(role, str) and re.fullmatch(ROLE, role):
        return None
    return f"{repr(role)[:100]} is not the name of a role. Use 1 to 64 letters, digits and '_.@-'."


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """An authenticated caller. An admin can also access the runs and batches of others.

    Attributes:
        roles: what it may answer: the questions that name one of these as ``approver=`` or ``answerer=``.
        max_cost_per_day: US dollars that its runs and batches may cost in a day, in UTC; None means no limit.

    Raises: TypeError if the name is not a string, or the roles are one; ValueError if the name cannot be written as
        UTF-8, a role is not 1 to 64 ASCII letters, digits and ``_.@-``, or *max_cost_per_day* is not above 0 and at
        most ``MAX_COST``.
    """

    name: str
    admin: bool = False
    roles: Sequence[str] = ()
    max_cost_per_day: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.roles, str):
            raise TypeError(f"The roles of a Principal must be a sequence, such as ({self.roles[:100]!r},).")
        for role in self.roles:
            if problem := bad_role(role):
                raise ValueError(problem)
        msgspec.structs.force_setattr(self, "roles", tuple(dict.fromkeys(self.roles)))
        if not isinstance(self.name, str):
            raise TypeError(
                f"The name of a Principal must be a str, not {type(self.name).__name__}. "
                "Convert it: Principal(name=str(...))."
            )
        try:
            self.name.encode()
        except UnicodeEncodeError as exc:
            raise ValueError(f"The name of a Principal must be valid Unicode, not {self.name!r}: {exc}.") from exc
        limit = self.max_cost_per_day
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if limit is not None and not (is_number and 0 < limit <= MAX_COST):
            raise ValueError(
                f"max_cost_per_day of a Principal must be US dollars above 0 and up to {MAX_COST:,}, not {limit!r}."
            )


def name_and_caller(principal: "Principal | str | None") -> tuple[str | None, "Principal | None"]:
    """Return the name of *principal*, and itself if it is more than a name; see ``Run.caller``."""
    if not isinstance(principal, Principal):
        return principal, None
    return principal.name, None if principal == Principal(name=principal.name) else principal


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


class BatchFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list of batches. A field that is None matches all batches.

    Attributes:
        after: the last id of the previous page.
        limit: max batches per page.

    Raises: DefinitionError if the status is unknown.
    """

    status: RunStatus | StatusName | None = None
    agent_name: str | None = None
    principal: str | None = None
    after: str | None = None
    limit: int = 100

    def __post_init__(self) -> None:
        if self.status is not None:
            msgspec.structs.force_setattr(self, "status", *statuses_of([self.status]))


class RunFilter(BatchFilter, frozen=True, kw_only=True):
    """The filter of a list of runs: that of a list of batches, and more fields.

    Attributes:
        created_after, created_before: with a precision of one millisecond.
        with_inputs, with_results: also read inputs or results; otherwise they are empty or None.

    Raises: DefinitionError if the status is unknown.
    """

    session_id: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    with_inputs: bool = False
    with_results: bool = False


class QuestionFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filter of a list of open questions. A field that is None matches all of them.

    Attributes:
        by: the principal who may answer them; None is the program itself.
        role: the one that they name.
        agent_name, principal, session_id: of their runs.
        after: the id of the last run of the previous page.
        limit: max questions per page. Those of one run are on one page.
    """

    by: "Principal | None" = None
    role: str | None = None
    agent_name: str | None = None
    principal: str | None = None
    session_id: str | None = None
    after: str | None = None
    limit: int = 100


class QuestionPage(list[AskedQuestion]):
    """One page of open questions.

    Attributes:
        rest: what to read for the next page: a filter, and ``newest`` of an earlier page; None if this is the last one.
        newest: the number of the last change of any question; None if the engine does not count changes.
    """

    rest: tuple[QuestionFilter, int | None] | None = None
    newest: int | None = None

    @property
    def has_more(self) -> bool:
        """Whether there may be others."""
        return self.rest is not None

    def add(self, asked: AskedQuestion, limit: int) -> bool:
        """Add a question, or return False if the page is full. The questions of one run are not divided."""
        if self and self[-1].run_id != asked.run_id and (len(self) >= limit or self._bytes > PAGE_BYTES):
            return False
        self._bytes += len(msgspec.json.encode(asked))
        self.append(asked)
        return True

    _bytes = 0


#: Approximate max size of one page of records, in bytes of JSON.
PAGE_BYTES = 1024 * 1024
R = TypeVar("R", "Run", "Batch")


class Page(list[R]):
    """One page of records: at most *limit* records and about ``PAGE_BYTES``, but always at least one record.

    Args:
        records: the first ones are added. At most one beyond the page is read.

    Attributes:
        has_more: whether there is another record that did not fit.
    """

    def __init__(self, limit: int, records: Iterable[R] = ()) -> None:
        self._limit = limit
        self._bytes_left = PAGE_BYTES
        self.has_more = False
        for record in records:
            if not self.add(record):
                break

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
        length += record.content_bytes + len(msgspec.json.encode(record.waiting_for))
    return length


def shown_as(type_: type[T], record: Any, **more: Any) -> T:
    """Return a *type_* with the fields of *record* that have the same names, and *more*.

    A field that is None is absent if its type allows that and not null.
    """
    names, values_of, without_null = _shared_fields(type_, tuple(more))  # type: ignore[arg-type]
    values = dict(zip(names, values_of(record), strict=True), **more)
    for name in without_null:
        if values[name] is None:
            values[name] = msgspec.UNSET
    return type_(**values)


@functools.cache
def _shared_fields(
    type_: type[msgspec.Struct], others: Sequence[str]
) -> tuple[Sequence[str], Callable[[Any], tuple[Any, ...]], Sequence[str]]:
    """Return the fields of *type_* without *others*, a function that reads them, and those that are absent if None."""
    types = {field.name: get_args(field.type) for field in msgspec.structs.fields(type_)}
    names = [name for name in types if name not in others]
    without_null = [name for name in types if msgspec.UnsetType in types[name] and NoneType not in types[name]]
    return names, operator.attrgetter(*names), without_null


#: A result longer than this is read in pieces while it is sent.
LONG_BYTES = 64 * 1024

#: Size of one piece. It is large because the store has to skip everything before the piece on each read.
PIECE_BYTES = 128 * 1024


class LongJSON:
    """A long JSON text that is read from the store while it is sent, so that a slow client does not fill the memory.

    Attributes:
        length: size in bytes.
        read: called as ``await read(start, size)``, returns up to *size* bytes from *start*. Raises RunNotFound and
            StoreError.
        kept: returns a context manager. While it is active, retention does not delete the text.
    """

    def __init__(
        self,
        length: int,
        read: Callable[[int, int], Awaitable[bytes]],
        kept: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.length = length
        self.read = read
        self.kept = kept

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the whole text in pieces. Raises RunNotFound, StoreError."""
        share = FairShare()
        for start in range(0, self.length, PIECE_BYTES):
            yield await self.read(start, PIECE_BYTES)
            await share.checkpoint()


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """The runs of a session together. ``usage`` is None if none of them has asked a model."""

    session_id: str
    total_runs: int
    usage: Usage | None

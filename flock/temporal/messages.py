"""Messages between API processes, the cluster and workers: JSON by msgspec, readable in Temporal's own tools.

They are stored in histories. So a new field needs a default, and no field may be renamed or removed.
"""

import bisect
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict, replace
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.common import SearchAttributeKey, SearchAttributePair, TypedSearchAttributes
from temporalio.converter import (
    BinaryNullPayloadConverter,
    BinaryPlainPayloadConverter,
    CompositePayloadConverter,
    DataConverter,
    EncodingPayloadConverter,
)

from flock.errors import CostLimit
from flock.runs import AskedQuestion, Batch, Call, Progress, Question, Run, RunStatus, Spent, Step, Usage, added, new_id
from flock.steps.outcomes import COST_LIMIT, Outcome

T = TypeVar("T")

# Registered names. Running workflows and recorded histories use them, so they must not change. The same holds for the
# names of other workflows, and for those of signals and queries, which have the names of their methods.
RUN_WORKFLOW = "flock_run"
BATCH_WORKFLOW = "flock_batch"
CHUNK_WORKFLOW = "flock_batch_chunk"
ACTIVITY = "run_agent"
ITEMS_ACTIVITY = "run_items"
FIND_ACTIVITY = "find_items"
DELETE_ACTIVITY = "forget_batch"

ACCOUNT_WORKFLOW = "flock_account"
WEBHOOK_WORKFLOW = "flock_webhook"
WEBHOOK_ACTIVITY = "send_webhook"

#: Seconds without a heartbeat after which a worker is considered dead, unless the engine sets another time.
HEARTBEAT_TIMEOUT_S = 3.0
#: How long a worker may take for a workflow task before the cluster gives the task to another worker.
TASK_TIMEOUT = timedelta(seconds=3)

#: ``error_type`` if a worker stops or dies before the end of its step. The cluster retries the step on another worker.
INTERRUPTED = "interrupted"

# Search attributes, by which runs and batches are listed.
FLOCK = SearchAttributeKey.for_keyword("FlockName")
AGENT = SearchAttributeKey.for_keyword("FlockAgent")
PRINCIPAL = SearchAttributeKey.for_keyword("FlockPrincipal")
SESSION = SearchAttributeKey.for_keyword("FlockSession")
#: "waiting" while a run, or an item of a chunk, waits for answers; "asleep" while a run only waits for a time or a
#: message.
STATUS = SearchAttributeKey.for_keyword("FlockStatus")
ASKING, ASLEEP = RunStatus.WAITING.value, "asleep"
SEARCH_ATTRIBUTES = {
    key.name: IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD for key in (FLOCK, AGENT, PRINCIPAL, SESSION, STATUS)
}


#: In the memo of the workflow of a webhook: its current ``Webhook``, without its address, and the ids of the workflows
#: that end before it is sent.
WEBHOOK, EARLIER = "webhook", "earlier"
#: In the memo of a workflow: its ``Inbox``. One of a run with more bytes of questions does not have them.
INBOX = "inbox"
MAX_INBOX_BYTES = 16_000
#: The id of a run or a batch.
ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Characters that no query of the cluster can express: it escapes them in a text, and does not undo that.
NOT_IN_QUERIES = re.compile(r"""["\\\x00-\x1f\x7f\ud800-\udfff␛]|^'|'$""")
#: The version of an agent whose results a worker of an earlier version has made.
UNKNOWN = "unknown"
#: The cluster takes up to 2,048 bytes as the value of a search attribute.
MAX_KEYWORD_BYTES = 2000


def attributes_of(record: Run | Batch) -> TypedSearchAttributes:
    """Return the search attributes by which a run, a batch, or a chunk of it is found."""
    session_id = record.session_id if isinstance(record, Run) else None
    named = {FLOCK: record.flock, AGENT: record.agent_name, PRINCIPAL: record.principal, SESSION: session_id}
    return TypedSearchAttributes(
        [SearchAttributePair(key, keyword_of(name)) for key, name in named.items() if name is not None]
    )


def keyword_of(text: str) -> str:
    """Return *text* as the value of a search attribute. Different texts have different values."""
    value = NOT_IN_QUERIES.sub(lambda found: f"␛{ord(found[0]):x};", text)
    if len(value.encode()) <= MAX_KEYWORD_BYTES:
        return value
    return "␛" + hashlib.sha256(value.encode()).hexdigest()


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """A message to a run: the signal that an API process sends to its workflow.

    Attributes:
        item: the position of the item, or 0 for a run.
        id: unique. A signal may be sent again.
    """

    item: int = 0
    id: str
    name: str
    message: msgspec.Raw
    at: datetime


class Execution(msgspec.Struct, frozen=True, array_like=True):
    """An attempt of an activity, which executes a step.

    Attributes:
        generation: see ``OfChunk``.
        activity: its number in the workflow.
        scheduled_at: when the cluster has scheduled the attempt.
    """

    generation: int
    activity: int
    attempt: int
    scheduled_at: datetime

    def is_before(self, other: "Execution") -> bool:
        mine, others = (self.generation, self.activity), (other.generation, other.activity)
        if mine != others:
            return mine < others
        # An operator may reset the attempts, and a clock may jump back.
        return self.attempt < other.attempt and self.scheduled_at < other.scheduled_at


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker reports of a step while it executes it.

    Attributes:
        item: the position of the item, or 0 for a run.
        by: the execution that reports it. None if it is the answer of a person, or of an earlier version.
    """

    item: int = 0
    by: Execution | None = None


class CallsPage(msgspec.Struct, frozen=True, kw_only=True):
    """Finished calls of a step, from one of them on.

    Attributes:
        spent: what the run had spent when the last call finished; see ``Run``.
        waits: those that the step has begun while it ran, and that have no answer.
    """

    calls: tuple[Call, ...] = ()
    is_last: bool = True
    spent: Usage | None = None
    waits: tuple[Question, ...] = ()


class Begun(Report, frozen=True, kw_only=True):
    """A step is executed again, perhaps because its worker seems to be dead: the signal of the next worker.

    What the earlier one still reports does not count any more.
    """


class Asked(Report, frozen=True, kw_only=True):
    """A question or an awaited message of a step that still runs: the signal of a worker.

    Readers of the history learn of it. A message that was sent before is given to it, so a worker that learns of one
    sends the signal again. The result of the step has the waits that are left.

    Attributes:
        step: the position of the step.
    """

    step: int
    question: Question


class Waits(msgspec.Struct, frozen=True, kw_only=True):
    """What has come for the waits of a step that still runs.

    Attributes:
        answers: to questions, and messages that were given to waits.
        messages: the names of those that are kept.
    """

    answers: tuple[Call, ...] = ()
    messages: frozenset[str] = frozenset()


class Inbox(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the workflow of a run or of a chunk says of the open questions in it: in its memo.

    Attributes:
        roles: those that may answer one. "" if its owner may.
        begun_by: the principals who have started or retried the run.
        asked: the questions of a run, unless they are long.
    """

    roles: tuple[str, ...] = ()
    begun_by: tuple[str, ...] = ()
    asked: tuple[AskedQuestion, ...] = ()


def roles_of(waits: Iterable[Question]) -> tuple[str, ...]:
    """Return the roles of an ``Inbox`` with the questions among *waits*."""
    questions = [wait for wait in waits if wait.is_question]
    return tuple(sorted({each.answerer if isinstance(each.answerer, str) else "" for each in questions}))


class SpentReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the runs of a principal have spent since the last report of a worker: a signal of the worker.

    Attributes:
        worker, number: identify it. It may be sent again; those of one worker have growing numbers.
        day: in UTC, as in ``date.toordinal``.
    """

    worker: str
    number: int
    day: int
    spent: tuple[Spent, ...]


class AccountState(msgspec.Struct, kw_only=True):
    """What a principal has spent: the state of its workflow, which is its order when it continues as new.

    Attributes:
        principal: "" for requests without one.
        max_cost: what it may spend in a day, in US dollars; None means no limit.
        days: what it has spent, by day.
        reports: the number of the last report of each worker, and its day.
    """

    principal: str
    max_cost: float | None = None
    days: dict[int, tuple[Spent, ...]] = {}
    reports: dict[str, tuple[int, int]] = {}


class RunOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a run, with the steps that it has completed: the input of its workflow and of its activities.

    Attributes:
        timeout_s: wall-clock seconds for the attempt, from the start of its first step.
        queue_timeout_s: max seconds to wait for the first step; None means no limit.
        heartbeat_timeout_s: seconds without a heartbeat after which the worker is considered dead. The worker sends
            one after each third of that time.
        key_id: the workflow id of the marker of its idempotency key.
        queued_s: seconds of ``queue_timeout_s`` for which it waited for its session.
        latest: the workflow ids of the last runs of its session. The last one may still be about to close.
        has_calls: its next step has asked, and runs again. Its workflow has the answers, and other calls of the step.
        waited_s: seconds for which the attempt waited for answers. They are not part of ``timeout_s``.
        agents: the agents that another worker has if this one lacks them: those of the API, and those that a worker has
            handed off to.
        messages: those that earlier attempts have not received.
        has_receiver: its agent has a receiver of webhooks.
        replaces: the workflow id of a run that it cancels before it begins, unless that has ended.
    """

    run: Run
    timeout_s: float
    queue_timeout_s: float | None = None
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    key_id: str | None = None
    queued_s: float = 0.0
    latest: tuple[str, ...] = ()
    has_calls: bool = False
    waited_s: float = 0.0
    agents: tuple[str, ...] = ()
    messages: tuple[Sent, ...] = ()
    has_receiver: bool = False
    replaces: str | None = None


class Deaths(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an attempt of an activity reports for the next one, in case its worker dies; see ``Suspicion``.

    Attributes:
        survived: in how many attempts no worker died while it executed what the activity executes now.
        alone: in how many of the deaths nothing else was being executed.
        alone_at: the attempt, if nothing else is being executed now.
        is_held: it waits, because of suspects.
    """

    survived: int = 0
    alone: int = 0
    alone_at: int = 0
    is_held: bool = False


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a step, in its heartbeats and its failure.

    Attributes:
        begun_at: when it got its slot, by the worker's clock; None while it waits for one.
        spent: see ``Run``.
        misses: how many workers have left it to others, because they lack an agent or it is a suspect.
        needs: an agent that it calls and that the last of these lacked.
        held_s: for how many seconds it waited because of suspects. They are not part of ``timeout_s``.
        dropped, first_span: see ``Run``.
    """

    begun_at: datetime | None = None
    progress: Progress | None = None
    spent: Usage | None = None
    misses: int = 0
    needs: str | None = None
    held_s: float = 0.0
    deaths: Deaths | None = None
    dropped: tuple[str, ...] = ()
    first_span: str | None = None


class StepDone(Heartbeat, frozen=True, kw_only=True):
    """The result of one step, and its last progress.

    Attributes:
        step: None if it ended because its agent waits for *questions*, sleeps or messages.
        worked_s: see ``Run``.
        has_next: its worker has the agent that is next.
    """

    step: Step | None = None
    questions: tuple[Question, ...] = ()
    worked_s: float = 0.0
    has_next: bool = False


class ItemRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """The inputs of one item. ``error`` says why they are invalid, or is None. ``extra``: see ``Run``.

    ``extra`` is UNSET instead of None, because msgspec cannot decode a union of Raw and None.
    """

    inputs: msgspec.Raw
    error: str | None = None
    extra: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class RowsOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one chunk. They are stored before the batch starts, and read by the workers that run its items.

    ``item`` is the first of them, without its inputs: it has the fields that all items share, and the files of all.
    ``agents`` are the versions of the agents of the API, by name.
    """

    item: Run
    first: int
    rows: tuple[ItemRow, ...]
    agents: dict[str, str] = {}


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The items that one attempt of a batch covers, and its progress.

    Attributes:
        only: a retry reopens the items with these statuses. Empty for the first attempt, which runs all items.
        position: the only item that a retry reopens; None if it is not limited to one.
        begun_to: chunks before this one have been started.
        completed_at: when it ended.
        cancelled: items that were cancelled before their chunk started, with the time of the request. They are removed
            when their chunk has ended.
        rows_of: the batch id under which the rows were sent, if it is another one. Only set in the first attempt.
        is_spent: items were cancelled because the ``max_cost`` of the batch was spent.
        keeps_calls: a retry keeps calls of the steps that failed. Those of earlier versions do not.
        retried_by: the principal who has requested a retry.
        is_partial: it starts only the items that ``limit`` and ``sample`` choose, so it may skip chunks.
        stopped_by: how the items have ended that it did not start; None if they were cancelled.
        refused: the items whose failures in a row have ended the batch, by position. They are cancelled too.
    """

    only: tuple[RunStatus, ...] = ()
    position: int | None = None
    begun_to: int = 0
    completed_at: datetime | None = None
    cancelled: dict[int, datetime] = {}
    rows_of: str | None = None
    is_spent: bool = False
    keeps_calls: bool = False
    retried_by: str | None = None
    is_partial: bool = False
    stopped_by: Outcome | None = None
    refused: tuple[int, ...] = ()

    @property
    def reason(self) -> Outcome | None:
        """How items have ended that it did not start; None if they were cancelled. Earlier versions stored less."""
        return COST_LIMIT if self.is_spent else self.stopped_by


class BatchOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt of a batch: the input of its workflow, and its state when it continues as new.

    Attributes:
        batch: the record, without the items that ended in running chunks.
        starts: the first position of each chunk.
        timeout_s: wall-clock seconds for each item.
        attempts: all attempts so far; this one is the last.
        failed_in, cancelled_in: the chunks that have such items, as a hexadecimal number with one bit for each chunk.
        first_error: the position and the error of the first failed item.
        is_day_spent: items were cancelled because the ``max_cost_per_day`` of its principal was spent.
        failed: how many items of ended chunks have failed in this attempt.
        key_id: the workflow id of the marker of its idempotency key.
        messages: those to items whose chunk has not started.
        has_receiver: see ``RunOrder``.
    """

    batch: Batch
    starts: tuple[int, ...]
    timeout_s: float
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    attempts: tuple[Attempt, ...] = (Attempt(),)
    failed_in: str = "0"
    cancelled_in: str = "0"
    first_error: tuple[int, str] | None = None
    is_day_spent: bool = False
    failed: int = 0
    key_id: str | None = None
    messages: tuple[Sent, ...] = ()
    has_receiver: bool = False

    def positions_of(self, chunk: int) -> range:
        """The positions of the items of *chunk*."""
        starts = (*self.starts[chunk : chunk + 2], self.batch.total_items)
        return range(starts[0], starts[1])

    def chunk_of(self, position: int) -> int:
        return bisect.bisect_right(self.starts, position) - 1

    def chunks_with(self, statuses: Collection[RunStatus], chunks: Iterable[int]) -> list[int]:
        """Return those of *chunks* that have failed or cancelled items, if *statuses* contains that status."""
        bits = 0
        if RunStatus.FAILED in statuses:
            bits |= int(self.failed_in, 16)
        if RunStatus.CANCELLED in statuses:
            bits |= int(self.cancelled_in, 16)
        return [chunk for chunk in chunks if bits >> chunk & 1]


class CallDone(Report, frozen=True, kw_only=True):
    """A finished call: the signal that a worker sends to the workflow of its activity.

    The answer of a person is such a call too. The API sends it, so it needs no worker.

    Attributes:
        step: the position of the step.
        spent: what the run has spent when the call finished; see ``Run``.
    """

    step: int
    call: Call
    spent: Usage | None = None


def latest(*spent: Usage | None) -> Usage | None:
    """Return the latest of several reports of what a run has spent. It only grows."""
    known = [usage for usage in spent if usage is not None]
    return max(known, key=lambda usage: usage.input_tokens + usage.output_tokens, default=None)


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item to run: from its beginning, or after the steps that this attempt has completed.

    ``is_again``: a worker that died may have started the next step. ``has_calls``: calls of that step have finished.
    ``usage``: what it has spent in this attempt.
    ``questions``: while it waits, those that were open when it began to. ``waited_for``: afterwards, those that are
    left; see ``Run.waiting_for``. ``worked_s``, ``waited_s``, ``needs``: see ``Run``, ``RunOrder`` and ``Heartbeat``.
    ``dropped``: see ``Run``.
    """

    position: int
    started_at: datetime | None = None
    steps: tuple[Step, ...] = ()
    progress: Progress | None = None
    is_again: bool = False
    has_calls: bool = False
    usage: Usage | None = None
    questions: tuple[Question, ...] = ()
    worked_s: float = 0.0
    waited_s: float = 0.0
    needs: str | None = None
    dropped: tuple[str, ...] = ()
    waited_for: tuple[Question, ...] = ()

    def ended(self, outcome: Outcome | None, at: datetime) -> "ItemOutcome":
        """Return its end at *at*; without an *outcome*, it has completed."""
        end = {} if outcome is None else asdict(outcome)
        return ItemOutcome(**asdict(self), **end, completed_at=at)


class OfChunk(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the orders of one attempt of a chunk share: its batch, the attempts so far, and the times for its items.

    Attributes:
        generation: how often the chunk has continued as new.
    """

    batch_id: str
    chunk: int
    attempt: int = 1
    attempts: tuple[Attempt, ...] = (Attempt(),)
    timeout_s: float
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    generation: int = 0

    @property
    def workflow_id(self) -> str:
        return chunk_workflow_id(self.batch_id, self.chunk, self.attempt)


class ChunkOrder(OfChunk, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt of a chunk: the input of its workflow, and its state when it continues as new.

    Attributes:
        positions: its first position, and the one after its last.
        lanes: how many of its items run at the same time.
        is_whole: all of its items are to run, so none need to be looked up.
        parts: the items that are left to run; None if they are not known yet.
        cancelled: items to cancel, with the time of the request.
        before: the counts from earlier histories of this attempt.
        calls, messages: the finished calls of items that have not ended, and the messages that these have not received.
        budget: picodollars that its items may spend; None if the batch has no ``max_cost``.
        waiting: the items that wait for answers.
        is_idle, grants: see ``ChunkIdle``.
        keeps_lanes: it never becomes idle again, because the history of its batch is too long.
        chosen: the positions that it may start, if its batch has a ``limit`` or ``sample``.
        failures_left: how many of its items may fail; None if the batch has no ``max_failures``.
    """

    positions: tuple[int, int]
    lanes: int
    is_whole: bool = False
    parts: tuple[Part, ...] | None = None
    cancelled: dict[int, datetime] = {}
    before: "Counts | None" = None
    calls: tuple["CallDone", ...] = ()
    messages: tuple[Sent, ...] = ()
    budget: int | None = None
    waiting: tuple[Part, ...] = ()
    is_idle: bool = False
    grants: int = 0
    keeps_lanes: bool = False
    chosen: tuple[int, ...] | None = None
    failures_left: float | None = None

    def for_items(self, parts: tuple[Part, ...]) -> "ItemsOrder":
        return ItemsOrder(parts=parts, **{name: getattr(self, name) for name in OfChunk.__struct_fields__})


class ChunkIdle(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A chunk gives its lanes back to its batch, because its items wait for answers or the batch needs the lanes.

    Attributes:
        has_work: some of its items can run, so it asks for a lane.
        has_yielded: it gave its lanes to another chunk, so it is not its turn.
        grants: how often it got lanes after it was idle. It tells late messages apart.
    """

    chunk: int
    counts: "Counts"
    has_work: bool = False
    has_yielded: bool = False
    grants: int


class ChunkFailures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What may end a batch early: a report of a chunk that is running.

    Attributes:
        failed: how many of its items have failed, if its batch counts them.
        alike: the last of them in a row, by position, that failed as all others may, with this *error*.
        lasting: another one has failed as all others will.
    """

    chunk: int
    failed: int = 0
    alike: tuple[int, ...] = ()
    error: Outcome | None = None
    lasting: bool = False


class ItemsOrder(OfChunk, frozen=True, kw_only=True, omit_defaults=True):
    """Items that one worker runs in sequence, as many as it completes in a short time: the input of ``run_items``."""

    parts: tuple[Part, ...]

    def left_after(self, done: "ItemsDone") -> list[Part]:
        """The items that are left to run after *done*."""
        handled = {part.position for part in (*done.ended, *done.waiting)}
        started = {} if done.unfinished is None else {done.unfinished.position: done.unfinished}
        return [started.get(part.position, part) for part in self.parts if part.position not in handled]

    def failed_after(self, done: "ItemsDone", outcome: Outcome, at: datetime) -> "ItemsDone":
        """Return *done* with the *outcome* of the item that was running, so that the others can continue."""
        failing_part = done.unfinished or next(iter(self.left_after(done)), None)
        if failing_part is None:  # the worker died after the last item, before it returned
            return done
        return replace(done, ended=(*done.ended, failing_part.ended(outcome, at)), unfinished=None)


class ItemOutcome(Part, frozen=True, kw_only=True, omit_defaults=True):
    """The end of one item, with its last state. Its result is that of its last step.

    Attributes:
        lasting: see ``lasting_of``. If it is True, the item is cancelled.
        version: of its agent; None if no worker has ended it, or an earlier version.
    """

    status: RunStatus = RunStatus.COMPLETED
    error: str | None = None
    error_type: str | None = None
    completed_at: datetime
    lasting: bool | None = False
    version: str | None = None

    @property
    def made_by(self) -> str | None:
        """The version of the agent that has made its result or its error."""
        is_completed = self.status is RunStatus.COMPLETED
        return (self.version or UNKNOWN) if is_completed else self.version if self.status is RunStatus.FAILED else None

    @property
    def reason(self) -> Outcome:
        """How the others end that were not started, if they would fail as this one has."""
        return Outcome(RunStatus.CANCELLED, self.error or "", self.error_type or "")

    def of(self, item: Run) -> Run:
        """Return *item* as it has ended."""
        steps = self.steps or item.steps
        result = steps[-1].result if self.status is RunStatus.COMPLETED else None
        same = ("status", "error", "error_type", "started_at", "completed_at", "progress")
        dropped = self.dropped or item.dropped
        return replace(
            item, result=result, steps=steps, dropped=dropped, **{name: getattr(self, name) for name in same}
        )

    @property
    def counts(self) -> "Counts":
        status = self.status
        return Counts(
            completed=status is RunStatus.COMPLETED,
            failed=status is RunStatus.FAILED,
            cancelled=status is RunStatus.CANCELLED,
            first_error=(self.position, self.error or "") if status is RunStatus.FAILED else None,
            usage=self.usage,
            unpaid=status is RunStatus.CANCELLED and self.error_type == CostLimit.error_type,
            versions=() if self.made_by is None else (self.made_by,),
        )


class ItemsDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The progress of an ``ItemsOrder``: the result of ``run_items``, and its heartbeats, from which a retry resumes.

    ``unfinished`` was started and has not ended. ``waiting`` are the items that wait for answers. Items that are not
    listed must be scheduled again. ``misses``: see ``Heartbeat``.
    """

    ended: tuple[ItemOutcome, ...] = ()
    unfinished: Part | None = None
    waiting: tuple[Part, ...] = ()
    misses: int = 0
    deaths: Deaths | None = None

    def for_retry(self) -> "ItemsDone":
        """A copy for the retry after a worker died: the next worker may start the unfinished step a second time."""
        return self if self.unfinished is None else replace(self, unfinished=replace(self.unfinished, is_again=True))


class Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many items of a chunk ended in one attempt, by final status, and how many wait for answers.

    ``usage``: what these, and those that have asked and not ended, have spent in the attempt. ``unpaid``: how many of
    them were cancelled because a limit of costs was spent. ``versions``: those of the agent that have ended them.
    """

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    waiting: int = 0
    first_error: tuple[int, str] | None = None
    usage: Usage | None = None
    unpaid: int = 0
    versions: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        return self.completed + self.failed + self.cancelled

    def in_batch(self, batch: Batch) -> Batch:
        """Return *batch* with the items that are counted here."""
        return replace(
            batch,
            completed_items=batch.completed_items + self.total,
            failed_items=batch.failed_items + self.failed,
            cancelled_items=batch.cancelled_items + self.cancelled,
            usage=added(batch.usage, self.usage),
            versions=_united(batch.versions, self.versions),
        )

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            completed=self.completed + other.completed,
            failed=self.failed + other.failed,
            cancelled=self.cancelled + other.cancelled,
            waiting=self.waiting + other.waiting,
            first_error=min((error for error in (self.first_error, other.first_error) if error), default=None),
            usage=added(self.usage, other.usage),
            unpaid=self.unpaid + other.unpaid,
            versions=_united(self.versions, other.versions),
        )


def _united(*names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(itertools.chain(*names)))


class DeleteOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A batch to delete, because a client deleted it or it was not accepted.

    Attributes:
        chunks: how many chunks of rows were sent.
        keep_mark_s: how long the batch stays marked as deleted.
        rows_of: see ``Attempt``.
        at: when that was, in seconds since 1970. Files that were sent or named later are kept.
    """

    batch_id: str
    chunks: int
    keep_mark_s: float
    rows_of: str | None = None
    at: float = 0.0


def run_workflow_id(run_id: str, attempt: int) -> str:
    return f"run:{run_id}" if attempt == 1 else f"run:{run_id}:{attempt}"


def session_workflow_id(run: Run) -> str:
    of = msgspec.json.encode([run.flock, run.principal, run.session_id])
    return f"session:{hashlib.sha256(of).hexdigest()}"


def account_workflow_id(flock: str, principal: str) -> str:
    return f"account:{hashlib.sha256(msgspec.json.encode([flock, principal])).hexdigest()}"


def batch_workflow_id(batch_id: str, attempt: int) -> str:
    return f"batch:{batch_id}" if attempt == 1 else f"batch:{batch_id}:{attempt}"


def workflow_id_of(record: Run | Batch) -> str:
    """The workflow of the current attempt of a batch, or of a run that is not an item."""
    if isinstance(record, Batch):
        return batch_workflow_id(record.batch_id, record.attempt)
    return run_workflow_id(record.run_id, record.attempt)


def rows_workflow_id(batch_id: str, chunk: int) -> str:
    return f"rows:{batch_id}:{chunk}"


def chunk_workflow_id(batch_id: str, chunk: int, attempt: int) -> str:
    return f"chunk:{batch_id}:{chunk}" if attempt == 1 else f"chunk:{batch_id}:{chunk}:{attempt}"


def webhook_workflow_id(record_id: str, attempt: int, number: int) -> str:
    """The workflow of an event of a run or batch: the *number*-th one of an attempt, or with 0 the last one."""
    return f"webhook:{record_id}:{attempt}:{number}" if number else f"webhook:{record_id}:{attempt}"


def webhook_id_of(workflow_id: str) -> str:
    return workflow_id.replace("webhook:", "msg_").replace(":", "_")


def workflow_id_of_webhook(webhook_id: str) -> str | None:
    """Return the id of the workflow of a webhook, or None if it cannot be one."""
    is_one = re.fullmatch(rf"msg_{ID.pattern}(_[0-9]{{1,9}}){{1,2}}", webhook_id)
    return webhook_id.replace("msg_", "webhook:").replace("_", ":") if is_one else None


#: The last digits of an item's id are its position, from 1. In its batch's id they are zeros.
POSITION_DIGITS = 6
MAX_ITEMS = 16**POSITION_DIGITS - 1


def new_batch_id() -> str:
    return new_id()[:-POSITION_DIGITS] + "0" * POSITION_DIGITS


def item_id(batch_id: str, position: int) -> str:
    return f"{batch_id[:-POSITION_DIGITS]}{position + 1:0{POSITION_DIGITS}x}"


def parse_item_id(run_id: str) -> tuple[str, int]:
    """The batch id and the position of an item, from its id. The position is -1 if it is the id of a batch."""
    return run_id[:-POSITION_DIGITS] + "0" * POSITION_DIGITS, int(run_id[-POSITION_DIGITS:], 16) - 1


def task_queue_of(flock: str) -> str:
    return f"flock:{flock}"


def items_queue_of(task_queue: str) -> str:
    """The task queue of items. It is a separate one, so that runs do not wait for items."""
    return f"{task_queue}:items"


def webhooks_queue_of(task_queue: str) -> str:
    """The task queue of webhooks, which API processes send."""
    return f"{task_queue}:webhooks"


class _MsgspecConverter(EncodingPayloadConverter):
    encoding = "json/plain"

    def to_payload(self, value: Any) -> Payload | None:
        return Payload(metadata={"encoding": b"json/plain"}, data=msgspec.json.encode(value))

    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        return msgspec.json.decode(payload.data, type=type_hint or Any)


class _Converter(CompositePayloadConverter):
    def __init__(self) -> None:
        super().__init__(BinaryNullPayloadConverter(), BinaryPlainPayloadConverter(), _MsgspecConverter())


CONVERTER = DataConverter(payload_converter_class=_Converter)


def decoded(payload: Payload, type_: type[T]) -> T:
    """Decode one of our own payloads, outside of a workflow."""
    return msgspec.json.decode(payload.data, type=type_)


def recoded(value: Any, type_: type[T]) -> T:
    """Convert *value*, which the SDK decoded without a type hint."""
    return msgspec.json.decode(msgspec.json.encode(value), type=type_)


# msgspec looks at a class when it decodes the first of its objects. It may crash if two threads do so at the same time.
for _struct in [each for each in vars().values() if isinstance(each, type) and issubclass(each, msgspec.Struct)]:
    msgspec.json.Decoder(_struct)

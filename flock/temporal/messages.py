"""What API processes, the cluster and workers tell each other: JSON by msgspec, readable in Temporal's own tools.

All of it lies in histories, so a member may be added with a default, and none renamed or taken away.
"""

from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import IndexedValueType
from temporalio.common import SearchAttributeKey
from temporalio.converter import (
    BinaryNullPayloadConverter,
    BinaryPlainPayloadConverter,
    CompositePayloadConverter,
    DataConverter,
    EncodingPayloadConverter,
)

from flock.runs import Batch, Progress, Run, RunStatus, Step, new_id

__all__ = [
    "ACTIVITY",
    "AGENT",
    "BATCH_WORKFLOW",
    "CHUNK_WORKFLOW",
    "CONVERTER",
    "DELETE_ACTIVITY",
    "DELETE_WORKFLOW",
    "FIND_ACTIVITY",
    "FLOCK",
    "HEARTBEAT_TIMEOUT_S",
    "INTERRUPTED",
    "ITEMS_ACTIVITY",
    "MARK_WORKFLOW",
    "MAX_ITEMS",
    "PRINCIPAL",
    "ROWS_WORKFLOW",
    "RUN_WORKFLOW",
    "SEARCH_ATTRIBUTES",
    "Attempt",
    "BatchOrder",
    "ChunkOrder",
    "Counts",
    "DeleteOrder",
    "Heartbeat",
    "ItemOutcome",
    "ItemRow",
    "ItemsDone",
    "ItemsOrder",
    "Part",
    "RowsOrder",
    "RunOrder",
    "StepDone",
    "batch_workflow_id",
    "chunk_workflow_id",
    "decoded",
    "item_id",
    "items_queue_of",
    "new_batch_id",
    "parse_item_id",
    "recoded",
    "rows_workflow_id",
    "run_workflow_id",
    "task_queue_of",
]

T = TypeVar("T")

RUN_WORKFLOW = "flock_run"
MARK_WORKFLOW = "flock_mark"
BATCH_WORKFLOW = "flock_batch"
CHUNK_WORKFLOW = "flock_batch_chunk"
ROWS_WORKFLOW = "flock_batch_rows"
DELETE_WORKFLOW = "flock_forget"
ACTIVITY = "run_agent"
ITEMS_ACTIVITY = "run_items"
FIND_ACTIVITY = "find_items"
DELETE_ACTIVITY = "forget_batch"

#: After so many seconds without a word of it, a worker is taken for dead, where nobody says another time.
HEARTBEAT_TIMEOUT_S = 3.0
#: How long a worker that died with a workflow's task is waited for.
TASK_TIMEOUT = timedelta(seconds=3)

#: ``error_type`` of a turn that its worker has left: the cluster gives it to another.
INTERRUPTED = "interrupted"

#: What runs are found by.
FLOCK = SearchAttributeKey.for_keyword("FlockName")
AGENT = SearchAttributeKey.for_keyword("FlockAgent")
PRINCIPAL = SearchAttributeKey.for_keyword("FlockPrincipal")
SEARCH_ATTRIBUTES = {key.name: IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD for key in (FLOCK, AGENT, PRINCIPAL)}


class RunOrder(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a run, as it is to be gone on with.

    Attributes:
        timeout_s: wall-clock seconds for the attempt, from its first step on.
        queue_timeout_s: the longest that it may wait for its first step.
        heartbeat_timeout_s: how long its worker may be silent; it says a word three times as often.
        key_id: the mark of its idempotency key.
    """

    run: Run
    timeout_s: float
    queue_timeout_s: float | None = None
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    key_id: str | None = None


class StepDone(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one turn. ``begun_at`` is when it got its slot, by the worker's clock."""

    step: Step
    begun_at: datetime
    progress: Progress | None = None


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True):
    """How far a turn is that has not ended, or how far it was. ``begun_at`` is None while it waits for its slot."""

    begun_at: datetime | None = None
    progress: Progress | None = None


class ItemRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one item is given; ``error`` says why it does not fit, and is None where it does. ``extra``: see ``Run``.

    It is not None if there is none, since msgspec cannot decode a union of Raw and None.
    """

    inputs: msgspec.Raw
    error: str | None = None
    extra: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class RowsOrder(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one chunk, on their own: they are kept before anything of the batch is begun, and read where they are
    worked on. ``item`` is what all items of the batch have in common."""

    item: Run
    first: int
    rows: tuple[ItemRow, ...]


class Attempt(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one attempt of a batch was about, and how far it came.

    Attributes:
        only: the statuses of items that it opened again; the first attempt opens all.
        position: the only item that it is about.
        begun_to: chunks before this one were begun.
        completed_at: when it ended.
        cancelled: items that were cancelled before their chunk was begun, and when, until it has ended.
        rows_of: under which batch's id the rows were sent; None is its own. Known of the first attempt.
    """

    only: tuple[RunStatus, ...] = ()
    position: int | None = None
    begun_to: int = 0
    completed_at: datetime | None = None
    cancelled: dict[int, datetime] = {}
    rows_of: str | None = None


class BatchOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt of a batch, as it is to be gone on with.

    Attributes:
        batch: as it stands, but for the chunks at work.
        starts: the position at which each chunk begins.
        timeout_s: wall-clock seconds for each item.
        invalid_items: items that do not fit, and are not tried again.
        attempts: this one is the last.
        failed_in, cancelled_in: in which chunks such items are, a bit for each, as a hexadecimal number.
        first_error: of the failed item that stands first, and its position.
        key_id: the mark of its idempotency key.
    """

    batch: Batch
    starts: tuple[int, ...]
    timeout_s: float
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    invalid_items: int = 0
    attempts: tuple[Attempt, ...] = (Attempt(),)
    failed_in: str = "0"
    cancelled_in: str = "0"
    first_error: tuple[int, str] | None = None
    key_id: str | None = None

    def first_of(self, chunk: int) -> int:
        """The position of the first item of a chunk, or behind the last one."""
        return self.starts[chunk] if chunk < len(self.starts) else self.batch.total_items


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item that is to be worked on: from the beginning, or behind the steps that this attempt has done.

    ``is_again``: a worker that died may have begun the next step.
    """

    position: int
    started_at: datetime | None = None
    steps: tuple[Step, ...] = ()
    progress: Progress | None = None
    is_again: bool = False


class ChunkOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One attempt of a chunk, as it is to be gone on with.

    Attributes:
        positions: where its items begin, and where they end.
        lanes: how many of its items are at work at the same time.
        is_whole: all of them are to be done.
        parts: what is left to do; None at the beginning.
        cancelled: who is to be cancelled, and when that was asked for.
        before: what had ended before its history went on anew.
    """

    batch_id: str
    chunk: int
    attempt: int = 1
    attempts: tuple[Attempt, ...] = (Attempt(),)
    positions: tuple[int, int]
    lanes: int
    is_whole: bool = False
    timeout_s: float
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    parts: tuple[Part, ...] | None = None
    cancelled: dict[int, datetime] = {}
    before: "Counts | None" = None


class ItemsOrder(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Items that one worker does one after the other, as many as it gets done in a short time."""

    batch_id: str
    chunk: int
    attempt: int = 1
    attempts: tuple[Attempt, ...] = (Attempt(),)
    parts: tuple[Part, ...]
    timeout_s: float
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S

    def left_after(self, done: "ItemsDone") -> list[Part]:
        """What is still to be done."""
        gone, unfinished = {ended.position for ended in done.ended}, done.unfinished
        return [
            unfinished if unfinished is not None and unfinished.position == part.position else part
            for part in self.parts
            if part.position not in gone
        ]


class ItemOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one item ended. Its result is that of its last step."""

    position: int
    status: RunStatus = RunStatus.COMPLETED
    error: str | None = None
    error_type: str | None = None
    started_at: datetime | None = None
    completed_at: datetime
    progress: Progress | None = None
    steps: tuple[Step, ...] = ()

    @property
    def counts(self) -> "Counts":
        status = self.status
        return Counts(
            completed=status is RunStatus.COMPLETED,
            failed=status is RunStatus.FAILED,
            cancelled=status is RunStatus.CANCELLED,
            first_error=(self.position, self.error or "") if status is RunStatus.FAILED else None,
        )


class ItemsDone(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What has come of an ``ItemsOrder``, in its result and in its heartbeats: whoever takes it over starts from here.

    ``unfinished`` was started and has not ended. What is not named here is to be ordered again.
    """

    ended: tuple[ItemOutcome, ...] = ()
    unfinished: Part | None = None

    def for_retry(self) -> "ItemsDone":
        """By a worker that died: the next one may start the turn that was at work a second time."""
        return self if self.unfinished is None else replace(self, unfinished=replace(self.unfinished, is_again=True))


class Counts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How many items of a chunk an attempt brought to which end."""

    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    first_error: tuple[int, str] | None = None

    @property
    def total(self) -> int:
        return self.completed + self.failed + self.cancelled

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            completed=self.completed + other.completed,
            failed=self.failed + other.failed,
            cancelled=self.cancelled + other.cancelled,
            first_error=min((error for error in (self.first_error, other.first_error) if error), default=None),
        )


class DeleteOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A batch that was deleted, or was not accepted, and how many chunks of rows were sent of it.

    ``rows_of``: see ``Attempt``.
    """

    batch_id: str
    chunks: int
    keep_mark_s: float
    rows_of: str | None = None


def run_workflow_id(run_id: str, attempt: int) -> str:
    return f"run:{run_id}" if attempt == 1 else f"run:{run_id}:{attempt}"


def batch_workflow_id(batch_id: str, attempt: int) -> str:
    return f"batch:{batch_id}" if attempt == 1 else f"batch:{batch_id}:{attempt}"


def rows_workflow_id(batch_id: str, chunk: int) -> str:
    return f"rows:{batch_id}:{chunk}"


def chunk_workflow_id(batch_id: str, chunk: int, attempt: int) -> str:
    return f"chunk:{batch_id}:{chunk}" if attempt == 1 else f"chunk:{batch_id}:{chunk}:{attempt}"


#: The last digits of an item's id are its position, from 1; those of its batch's id are zeros.
POSITION_DIGITS = 6
MAX_ITEMS = 16**POSITION_DIGITS - 1


def new_batch_id() -> str:
    return new_id()[:-POSITION_DIGITS] + "0" * POSITION_DIGITS


def item_id(batch_id: str, position: int) -> str:
    return f"{batch_id[:-POSITION_DIGITS]}{position + 1:0{POSITION_DIGITS}x}"


def parse_item_id(run_id: str) -> tuple[str, int]:
    """The id of the batch, and the position, that an item with this id would have."""
    return run_id[:-POSITION_DIGITS] + "0" * POSITION_DIGITS, int(run_id[-POSITION_DIGITS:], 16) - 1


def task_queue_of(flock: str) -> str:
    return f"flock:{flock}"


def items_queue_of(task_queue: str) -> str:
    """Where items wait, so that runs do not wait behind them."""
    return f"{task_queue}:items"


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
    """What *payload* of ours says, read outside of a workflow."""
    return msgspec.json.decode(payload.data, type=type_)


def recoded(value: Any, type_: type[T]) -> T:
    """*value*, which the SDK has decoded without knowing what it is."""
    return msgspec.json.decode(msgspec.json.encode(value), type=type_)

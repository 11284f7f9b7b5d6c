"""What is kept of the work, and the shapes through which the rooms talk about it.

A ``Run`` is one request carried to one end; it is made of ``Step``s, one for each agent that had its turn. A ``Batch``
is many runs over one agent: an item is a run with a ``batch_id`` and a ``position``. All of them are frozen: a change
is a new record, so that whoever holds one sees one moment, whole.

JSON is kept as ``msgspec.Raw``: nothing mutable can pass from one run to another, and a store can write it as it is.
"""

import os
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Protocol, Self
from uuid import UUID

import msgspec

__all__ = ["Batch", "BatchOptions", "Engine", "Journal", "Run", "RunStatus", "Step", "Usage", "new_id", "now"]


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
    started_at: datetime
    completed_at: datetime


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One request and all that is known of it. Ids are UUIDs of version 7, times are in UTC."""

    run_id: str
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
    steps: tuple[Step, ...] = ()

    @property
    def usage(self) -> Usage | None:
        spent = [step.usage for step in self.steps if step.usage is not None]
        return sum(spent, Usage()) if spent else None


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch is worked on, and how its results are shown.

    Attributes:
        max_workers: items at work at the same time, at least 1.
        parallel: False is one at a time, in order, whatever ``max_workers`` says.
        return_errors: an item that failed is ``{"error", "error_type"}`` in the results; False: null.
        box_results: False gives the bare value where the agent has one output field.
    """

    max_workers: int = 5
    parallel: bool = True
    return_errors: bool = True
    box_results: bool = True


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Many runs of one agent. ``completed_items`` counts those that ended, whatever way."""

    batch_id: str
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


class Journal(Protocol):
    """Where one run's steps are kept. A step that was saved is never executed again."""

    async def load(self) -> Sequence[Step]:
        """The steps saved so far, in order."""

    async def save(self, step: Step) -> None:
        """Append *step*; on return it is kept as safely as this journal keeps anything."""


class Engine(Protocol):
    """What takes runs and carries each to its end. One protocol, whatever machine or cluster is behind it.

    Use it as an async context manager: work is taken inside it only. Leaving it ends what is still at work.
    """

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

    def interrupt(self) -> None:
        """End what is at work as failed, "interrupted", and take no new work: the process is about to stop."""

    async def submit(self, agent_name: str, inputs: msgspec.Raw, *, request_id: str | None = None) -> Run:
        """Accept one run and return at once.

        Args:
            inputs: a JSON object with a value for each field of the agent's input signature.
            request_id: the id under which the caller's request is logged.

        Returns:
            Run: status "starting".

        Raises:
            AgentNotFound: no agent has that name.
            InvalidData: the inputs do not fit; pointers begin with ``/inputs``.
            EngineFull: the queue is full.
            EngineStopped: the engine is not running.

        Cancellation: the run is accepted whole or not at all.
        """

    async def submit_batch(
        self,
        agent_name: str,
        items: Sequence[msgspec.Raw],
        options: BatchOptions,
        *,
        request_id: str | None = None,
    ) -> Batch:
        """Accept one batch and return at once. Every item is checked first: all of them start, or none.

        Raises: as ``submit``; pointers begin with ``/batch_inputs/{position}``, and at most 100 are given.
        """

    async def get_run(self, run_id: str) -> Run:
        """The run as it stands. Raises RunNotFound."""

    async def wait_run(self, run_id: str) -> Run:
        """The run once it is final. Raises RunNotFound. Cancellation: the run goes on."""

    async def get_batch(self, batch_id: str) -> Batch:
        """The batch as it stands. Raises BatchNotFound."""

    async def get_items(self, batch_id: str, *, after: int = -1, limit: int = 1000) -> Sequence[Run]:
        """Up to *limit* items of a batch from the position behind *after* on, in order. Raises BatchNotFound."""


def now() -> datetime:
    return datetime.now(UTC)


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
    value = (ticks >> 12) << 80 | 0x7 << 76 | (ticks & 0xFFF) << 64 | 0b10 << 62
    return str(UUID(int=value | int.from_bytes(os.urandom(8)) >> 2))

"""What API processes, the cluster and workers tell each other: JSON by msgspec, readable in Temporal's own tools.

All of it lies in histories, so a member may be added with a default, and none renamed or taken away.
"""

from datetime import datetime
from typing import Any

import msgspec
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

from flock.runs import Progress, Run, Step

__all__ = [
    "ACTIVITY",
    "AGENT",
    "CONVERTER",
    "FLOCK",
    "HEARTBEAT_TIMEOUT_S",
    "INTERRUPTED",
    "MARK_WORKFLOW",
    "PRINCIPAL",
    "RUN_WORKFLOW",
    "SEARCH_ATTRIBUTES",
    "Beat",
    "RunOrder",
    "StepDone",
    "decoded",
    "run_workflow_id",
    "task_queue_of",
]

RUN_WORKFLOW = "flock_run"
MARK_WORKFLOW = "flock_mark"
ACTIVITY = "run_agent"

#: After so many seconds without a word of it, a worker is taken for dead, where nobody says another time.
HEARTBEAT_TIMEOUT_S = 3.0

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
    """What came of one turn. ``begun_at`` is when it got its place, by the worker's clock."""

    step: Step
    begun_at: datetime
    progress: Progress | None = None


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """How far a turn is that has not ended, or how far it was. ``begun_at`` is None while it waits for its place."""

    begun_at: datetime | None = None
    progress: Progress | None = None


def run_workflow_id(run_id: str, attempt: int) -> str:
    return f"run:{run_id}" if attempt == 1 else f"run:{run_id}:{attempt}"


def task_queue_of(flock: str) -> str:
    return f"flock:{flock}"


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


def decoded(payload: Payload, type_: type[Any]) -> Any:
    """What *payload* of ours says, read outside of a workflow."""
    return msgspec.json.decode(payload.data, type=type_)

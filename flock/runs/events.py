"""The events of a run: made from its records, so that a client can read them again from any event."""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import msgspec

from flock.runs.records import NOT_LOADED, Batch, Call, Progress, Run, RunStatus, Time
from flock.runs.usage import shown_usage

__all__ = ["Event", "Webhook", "event_of_batch", "event_of_call", "events_after", "run_in"]
__all__ += ["end_id", "is_end_of_step", "started_id"]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a run or a batch. Ids increase; events of which only the latest is stored have none.

    In *data*, ``result`` is a ``LongJSON`` if it is long and the engine can read it from the store.

    Attributes:
        sent: what the first of its readers has made of it, for the others.
    """

    id: int | None
    name: str
    data: dict[str, Any]
    sent: bytes = b""


#: Ranges of event ids that are reserved for each attempt, and in it for each step. JavaScript can read them all.
EVENTS_PER_ATTEMPT = 10**12
EVENTS_PER_STEP = 10**6


def started_id(attempt: int, position: int) -> int:
    """Return the id of the event ``step.started``. Those of the calls of the step follow it."""
    return attempt * EVENTS_PER_ATTEMPT + position * EVENTS_PER_STEP + 1


def end_id(attempt: int) -> int:
    """Return the id of the last event of an attempt."""
    return (attempt + 1) * EVENTS_PER_ATTEMPT - 1


def is_end_of_step(event_id: int) -> bool:
    """Return whether an event is ``step.completed``."""
    number = event_id % EVENTS_PER_ATTEMPT
    return number > 0 and number % EVENTS_PER_STEP == 0


def events_after(run: Run, after: int = 0) -> Iterator[Event]:
    """Yield the events of *run* so far, in order, without those of steps that end at or before the id *after*.

    They are derived from its record, so any process can send them. The content of an id never changes: an event
    contains only data that was known when it happened. For those of its calls, see ``event_of_call``.
    """

    def event(attempt: int, number: int | None, name: str, **data: Any) -> Event:
        id_ = None if number is None else attempt * EVENTS_PER_ATTEMPT + number
        return Event(id=id_, name=name, data={"run_id": run.run_id, "attempt": attempt, **data})

    # An interrupted run that waits to be resumed still has the start time of its last attempt.
    has_started = run.started_at is not None and run.status is not RunStatus.STARTING
    started = [event(run.attempt, 0, "run.started", agent_name=run.agent_name, started_at=run.started_at)]
    positions = range(len(run.steps))
    first = bisect_right(positions, after, key=lambda at: started_id(run.steps[at].attempt, at + 1) - 1)
    if first and run.steps[first - 1].attempt == run.attempt:
        started = []
    for position in positions[first:]:
        step = run.steps[position]
        step_data = {"position": position, "agent_name": step.agent_name}
        if step.attempt == run.attempt:
            yield from started
            started = []
        yield event(step.attempt, position * EVENTS_PER_STEP + 1, "step.started", **step_data)
        end = {name: getattr(step, name) for name in ("started_at", "completed_at", "result")}
        end |= shown_usage(step.usage)
        yield event(step.attempt, (position + 1) * EVENTS_PER_STEP, "step.completed", **step_data, **end)
    if has_started:
        yield from started
    name = run.next_agent_name
    if has_started and name is not None:  # the step is running, or the run failed in it
        number = len(run.steps) * EVENTS_PER_STEP + 1
        yield event(run.attempt, number, "step.started", position=len(run.steps), agent_name=name)
    if run.progress is not None:
        yield event(run.attempt, None, "run.progress", **msgspec.structs.asdict(run.progress))
    if run.status is RunStatus.WAITING and run.questions:
        yield event(run.attempt, None, "run.waiting", waiting_for=run.questions)
    if run.status.is_final:
        end = {name: getattr(run, name) for name in ("status", "result", "error", "error_type", "completed_at")}
        yield event(run.attempt, EVENTS_PER_ATTEMPT - 1, f"run.{run.status}", **end)


def run_in(run: Run, event: Event) -> Run:
    """Return *run* as an event of its progress, its wait or its end says it is, without a result."""
    if event.name == "run.progress":
        return msgspec.structs.replace(run, status=RunStatus.RUNNING, progress=msgspec.convert(event.data, Progress))
    known = {name: event.data[name] for name in ("error", "completed_at", "waiting_for") if name in event.data}
    return msgspec.structs.replace(run, status=RunStatus(event.name.removeprefix("run.")), **known)


def event_of_call(started: Event, number: int, call: Call) -> Event:
    """Return the event of a stored call of the step that began with *started*: call *number*, from 0.

    Calls are numbered in the order in which they were stored. A later attempt of the same step reports them again.
    """
    assert started.id is not None
    names = ("call_id", "name", "kind", "result", "error", "error_type", "started_at", "completed_at")
    data = {**started.data, **{name: getattr(call, name) for name in names}, **shown_usage(call.usage)}
    if call.result is NOT_LOADED:
        del data["result"]
    if call.kind == "question":
        data |= {"answered_by": call.answered_by, "answered_at": call.answered_at}
        data |= {} if call.arguments is NOT_LOADED else {"arguments": call.arguments}
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


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """One event, which is sent until its receiver has accepted it, or until it is given up.

    Attributes:
        type: what happened, such as ``run.completed``.
        record_id: the id of the run or the batch.
        call_id: of a question.
        attempt: that of the run or the batch.
        status: ``pending``, ``sent`` or ``given_up``.
        tries: how often it was sent.
        first_try_at: when it was sent first, or would have been if its receiver had not been down.
        ended_at: when it was accepted or given up.
        error: why the last try failed.
        url: the current address of the receiver; None if the agent has none any more.
    """

    webhook_id: str
    type: str
    record_id: str
    call_id: str | None
    agent_name: str
    attempt: int
    status: str
    tries: int
    created_at: Time
    next_try_at: Time
    first_try_at: Time | None
    ended_at: Time | None
    error: str | None
    url: str | None

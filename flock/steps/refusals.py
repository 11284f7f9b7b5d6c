"""Errors for requests that an engine refuses. Both engines use the same texts."""

from collections.abc import Sequence

from flock.errors import Conflict, EngineFull, EngineStopped
from flock.runs import Batch, Run, RunStatus

#: The statuses that can be retried, in words.
RETRYABLE = {RunStatus.FAILED: "failed", RunStatus.CANCELLED: "was cancelled"}


def not_accepting(more: str = "") -> EngineStopped:
    """Return the error for new work during shutdown."""
    return EngineStopped(f"The server is shutting down and does not accept new work. Try again later.{more}")


def wait_stopped() -> EngineStopped:
    """Return the error for callers that are waiting during shutdown."""
    return EngineStopped("The server is shutting down. Ask another server, or this one after it has restarted.")


def too_many_items(open_items: int, more: int, max_open_items: int) -> EngineFull:
    return EngineFull(
        f"{open_items} items of batches have not ended or are being uploaded, and {more} more would exceed the limit "
        f"of this server ({max_open_items}, max_open_items). Try again later."
    )


def check_cancel(name: str, status: RunStatus) -> None:
    """Raise Conflict if the run or batch called *name* has ended and was not cancelled."""
    if status.is_final and status is not RunStatus.CANCELLED:
        raise Conflict(f"The {name} is {status} and can no longer be cancelled.")


def not_deleted(record: Run | Batch) -> Conflict:
    """Return why *record* cannot be deleted."""
    name = _name_of(record)
    if isinstance(record, Run) and record.batch_id:
        return Conflict(f"The {name} is an item of a batch and cannot be deleted alone. Delete the batch instead.")
    return Conflict(
        f"The {name} is still {record.status} and cannot be deleted. Cancel it first, or wait until it ends."
    )


def already_retried(record: Run | Batch) -> Conflict:
    return Conflict(f"The {_name_of(record)} is already being retried. Wait until it ends.")


def run_not_retried(run_id: str, status: RunStatus, batch: Batch | None) -> Conflict:
    """Return why a run, perhaps an item of *batch*, cannot be retried."""
    if batch is None:
        return Conflict(f"The run {run_id} is {status}. Only failed and cancelled runs can be retried.")
    return Conflict(
        f"The run {run_id} is {status}, and its batch is {batch.status}. Only failed and cancelled items of a "
        "batch that has ended can be retried, and only if their inputs are valid."
    )


def not_retried(batch: Batch, statuses: Sequence[RunStatus]) -> Conflict:
    """Return why a batch has no item with one of *statuses* that can be retried."""
    reason = f"has no item that {' or '.join(RETRYABLE[status] for status in statuses)}"
    if not batch.status.is_final:
        reason = f"is {batch.status}. Only a batch that has ended can be retried"
    return Conflict(f"The {_name_of(batch)} {reason}.")


def _name_of(record: Run | Batch) -> str:
    return f"batch {record.batch_id}" if isinstance(record, Batch) else f"run {record.run_id}"

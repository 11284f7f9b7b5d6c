"""What an engine refuses, in the words of both engines."""

from collections.abc import Sequence

from flock.errors import Conflict, EngineStopped
from flock.runs import Batch, Run, RunStatus

__all__ = [
    "RETRYABLE",
    "not_accepting",
    "not_cancelled",
    "not_deleted",
    "not_retried",
    "run_not_retried",
    "wait_stopped",
]

#: What may be tried again, in words.
RETRYABLE = {RunStatus.FAILED: "failed", RunStatus.CANCELLED: "was cancelled"}


def not_accepting(more: str = "") -> EngineStopped:
    """Why nothing new is accepted."""
    return EngineStopped(f"The server is about to stop and takes no new work.{more}")


def wait_stopped() -> EngineStopped:
    """Why nothing is waited for any longer."""
    return EngineStopped("The server is about to stop. Ask another one, or this one when it is back.")


def not_cancelled(record: Run | Batch) -> Conflict | None:
    """Why *record* cannot be cancelled; None if it can, or has been."""
    if not record.status.is_final or record.status is RunStatus.CANCELLED:
        return None
    return Conflict(f"The {_name_of(record)} is {record.status} and cannot be cancelled any more.")


def not_deleted(record: Run | Batch) -> Conflict:
    """Why *record* cannot be deleted."""
    if isinstance(record, Batch):
        return Conflict(f"The {_name_of(record)} is still {record.status}. Cancel it first, or wait for its end.")
    what = "an item of a batch" if record.batch_id else f"still {record.status}"
    return Conflict(f"The {_name_of(record)} is {what} and cannot be deleted. Cancel it first, or wait for its end.")


def run_not_retried(run: Run, batch: Batch | None) -> Conflict:
    """Why *run*, perhaps an item of *batch*, cannot be tried again."""
    what, rule = str(run.status), "only a run that failed or was cancelled can be tried again"
    if batch is not None:
        what += f", an item of a batch that is {batch.status}"
        rule += ", and an item once its batch has ended, unless its inputs do not fit"
    return Conflict(f"The {_name_of(run)} is {what}; {rule}.")


def not_retried(batch: Batch, wanted: Sequence[RunStatus]) -> Conflict:
    """Why *wanted* items of a batch cannot be tried again."""
    what = f"has no item that {' or '.join(RETRYABLE[status] for status in wanted)}"
    if not batch.status.is_final:
        what = f"is {batch.status}; only one that has ended can be tried again"
    return Conflict(f"The {_name_of(batch)} {what}.")


def _name_of(record: Run | Batch) -> str:
    return f"batch {record.batch_id}" if isinstance(record, Batch) else f"run {record.run_id}"

"""How a run ends if it does not complete. Both engines use the same texts."""

import logging
from collections.abc import Callable

import msgspec

from flock.errors import CostLimit, QueueTimeout, StepError, cut
from flock.logs import fields_of_run
from flock.runs import Batch, Question, Run, RunStatus, cost_in_words, one_line, safe_text
from flock.runs.text import of_request

logger = logging.getLogger("flock.runs")


class Outcome(msgspec.Struct, frozen=True):
    """The final status of a run, the reason in words, and a stable code for programs."""

    status: RunStatus
    error: str
    error_type: str


CANCELLED = Outcome(RunStatus.CANCELLED, "The run was cancelled.", "cancelled")
CANCELLED_BEFORE_START = Outcome(RunStatus.CANCELLED, "The batch was cancelled before this item started.", "cancelled")
COST_LIMIT = Outcome(
    RunStatus.CANCELLED, "The batch had spent its max_cost before this item was done.", CostLimit.error_type
)
DAY_LIMIT = Outcome(
    RunStatus.CANCELLED,
    "The caller of the batch had spent its max_cost_per_day before this item was done.",
    CostLimit.error_type,
)
TOO_MANY_FAILURES = Outcome(
    RunStatus.CANCELLED, "More items have failed than the batch allows (max_failures).", "max_failures"
)
NOT_CHOSEN = Outcome(
    RunStatus.CANCELLED, "The batch was started with only some of its items (limit, sample).", "not_chosen"
)
#: What a batch has spent, and how its items end that are left.
LIMITS = {"max_cost": COST_LIMIT, "max_cost_per_day": DAY_LIMIT}
#: A synchronous run whose server stopped.
INTERRUPTED = Outcome(RunStatus.FAILED, "The server stopped before this run ended.", "interrupted")
#: A run that has killed its process.
CRASHED = Outcome(
    RunStatus.FAILED,
    "The process died repeatedly while it was executing this run, the last time while it was executing nothing else.",
    "crashed",
)
DAMAGED = Outcome(RunStatus.FAILED, "The record of this run is damaged and cannot be read.", "unreadable")
#: A process may be killed by chance while it executes only one run, but not this often.
DEATHS_ALONE = 2

#: Appended to the error of a run whose retry has failed in the same way.
AGAIN = ' The attempt before has failed in the same way. A retry with {"calls": "again"} executes all calls again.'

#: ``error`` of a cancelled batch.
BATCH_CANCELLED = "The batch was cancelled."


def timeout_of(timeout_s: float) -> Outcome:
    return Outcome(RunStatus.FAILED, f"The run did not end within {timeout_s:g} s (timeout_s).", "timeout")


def expiry_of(question: Question) -> Outcome:
    """Return the outcome of a run whose *question* nobody has answered in time, or whose message has not come."""
    if question.kind == "message":
        return Outcome(RunStatus.FAILED, f"No message {question.question!r} has come in time.", "expired")
    if question.is_for_client:
        error = f"The client has not sent the output of its tool {question.question!r} in time."
        return Outcome(RunStatus.FAILED, error, "expired")
    return Outcome(RunStatus.FAILED, cut(f"Nobody answered in time: {question.question}"), "expired")


def log_crash(run: Run, deaths: int) -> None:
    agent, source = run.next_agent_name, of_request(run.request_id)
    template = "run %s: agent %s killed its process, which died %d times while it was running%s"
    logger.error(template, run.run_id, agent, deaths, source, extra=fields_of_run(run))


def failure_of(run: Run, exc: BaseException | None, *, expose_errors: bool) -> Outcome:
    """Return the outcome, as clients see it, of a run whose agent raised *exc*. Log the details."""
    while isinstance(exc, BaseExceptionGroup) and (len(exc.exceptions) == 1 or exc.split(StepError)[1] is None):
        exc = exc.exceptions[0]
    if isinstance(exc, CostLimit) and run.batch_id is not None and exc.limit in LIMITS:
        return LIMITS[exc.limit]
    if isinstance(exc, StepError):
        text = safe_text(exc.shown or exc)
        details = f"{safe_text(exc)} {exc.log_detail}".strip()
        shows_details = expose_errors and run.request_id is None  # to the program itself, not to a client
        log = logger.info if shows_details else logger.warning
        log("run %s: %s%s", run.run_id, one_line(details), of_request(run.request_id), extra=fields_of_run(run))
        text = one_line(details) if shows_details else text
        return Outcome(RunStatus.FAILED, cut(text), cut(safe_text(exc.error_type)))
    agent_name = run.next_agent_name
    template, source = "run %s: agent %s raised%s", of_request(run.request_id)
    logger.error(template, run.run_id, agent_name, source, exc_info=exc, extra=fields_of_run(run))
    error, error_type = error_of(exc, f"The agent {agent_name!r}", expose_errors=expose_errors)
    if not expose_errors:
        where = f"request {run.request_id}" if run.request_id else f"run {run.run_id}"
        error += f". The server's log has the details under {where}."
    return Outcome(RunStatus.FAILED, cut(error), error_type)


def with_hint(run: Run, outcome: Outcome) -> Outcome:
    """Return the *outcome* of an attempt of *run* that has kept calls. If it is the same again, its error says so."""
    error = cut(outcome.error + AGAIN)
    is_same = outcome.status is RunStatus.FAILED and run.earlier_error in (outcome.error, error)
    return msgspec.structs.replace(outcome, error=error) if is_same else outcome


def error_of(exc: BaseException | None, subject: str, *, expose_errors: bool) -> tuple[str, str]:
    """Return what clients may see of an exception that *subject* raised, and its ``error_type``."""
    if isinstance(exc, StepError):
        return safe_text(exc.shown or exc), safe_text(exc.error_type)
    error = f"{subject} raised {type(exc).__name__}"
    return (f"{error}: {safe_text(exc)}" if expose_errors else error), "agent_exception"


def end_of_batch(
    batch: Batch,
    first_error: Callable[[], str],
    *,
    is_cancelled: bool,
    is_unpaid: bool,
    is_day_spent: bool = False,
    stopped_by: tuple[str, str] | None = None,
) -> tuple[RunStatus, str | None, str | None]:
    """Return the final status of *batch*, which has its final counts, and its ``error`` and ``error_type``.

    Args:
        first_error: returns the error of the first item, for a batch of which no item completed.
        is_cancelled: the batch was cancelled.
        is_unpaid: items did not run because ``max_cost``, or the ``max_cost_per_day`` of its principal, is spent.
        is_day_spent: it is the latter.
        stopped_by: the ``error`` and ``error_type`` for which it has ended early.
    """
    if is_cancelled and batch.cancelled_items:
        return RunStatus.CANCELLED, BATCH_CANCELLED, None
    if is_unpaid:
        error = (
            "Its caller has spent its max_cost_per_day. Retry it on another day to run the items that are left."
            if is_day_spent
            else f"It may cost {batch.options.max_cost or 0:g} US dollars (max_cost). Retry it with a higher max_cost "
            "to run the items that are left."
        )
        error = f"The batch stopped after {cost_in_words(batch.usage)}. {error}"
        return RunStatus.FAILED, error, COST_LIMIT.error_type
    cancelled = f"{batch.cancelled_items:,} of {batch.total_items:,} items"
    if stopped_by is not None:
        error = f"The batch stopped before {cancelled} were done. {stopped_by[0]} Retry it to run these."
        return RunStatus.FAILED, cut(error), stopped_by[1]
    if batch.failed_items + batch.cancelled_items == batch.total_items:
        error = f"None of the {batch.total_items} items completed. The first error: {first_error()}"
        return RunStatus.FAILED, cut(error), None
    if batch.cancelled_items and (batch.options.limit or batch.options.sample):
        return RunStatus.COMPLETED, f"{cancelled} were not chosen (limit, sample). Retry the batch to run them.", None
    if batch.cancelled_items and batch.attempt > 1:
        return (
            RunStatus.CANCELLED,
            f"{cancelled} were cancelled, and have no result. Retry the batch to run them.",
            None,
        )
    return RunStatus.COMPLETED, None, None


def queue_timeout(limit_s: float) -> QueueTimeout:
    return QueueTimeout(
        f"The run waited {limit_s:g} s for its first step and reached the limit (queue_timeout_s). Try again later."
    )

"""Answers to questions: the rules that both engines share."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.questions import ASK, MESSAGE, RECEIVE, SLEEP, check_answer, message_json, question_json
from flock.errors import CallError, CallNotFound, Conflict, InvalidData, StaleAnswer, TooLarge, TooManyRequests, cut
from flock.jsontype import explain
from flock.runs import JSON_NULL, Call, Question, Run, RunStatus
from flock.steps.identity import asking_call, try_of
from flock.steps.journal import NAME

#: How many messages are kept for one run until it receives them.
MAX_MESSAGES = 1000


def question_for(
    run: Run,
    call_id: str,
    output: msgspec.Raw,
    find_answer: Callable[[], Call | None],
    was_asked: Callable[[], bool],
) -> Question | None:
    """Return the open question that *output* answers, or None if it has been given before; see ``Engine.answer_call``.

    Args:
        find_answer: returns the answer that a question has got, or None.
        was_asked: returns whether an earlier question of the run had this id.

    Raises: CallNotFound, StaleAnswer, InvalidData.
    """
    question = next((open_ for open_ in run.waiting_for if open_.call_id == call_id and open_.is_question), None)
    given = find_answer() if question is None or run.status is not RunStatus.WAITING else None
    if question is not None and given is None:
        if run.status.is_final:
            raise _stale(
                run, f"The run {run.run_id} is {run.status}, so its question {call_id!r} can no longer be answered."
            )
        check_answer(question, output)
        return question
    is_replaced = any(asking_call(open_.call_id) == asking_call(call_id) for open_ in run.questions)
    if given is None or is_replaced:
        if given is None and not was_asked():
            raise CallNotFound(run.run_id, call_id)
        raise _stale(run, f"The run {run.run_id} no longer asks the question {call_id!r}.")
    if errors := explain(Any, bytes(output), "/output"):
        raise InvalidData(errors)
    if _normal(given.result) != _normal(output):
        raise _stale(run, f"The question {call_id!r} of the run {run.run_id} has already been answered otherwise.")
    return None


def _stale(run: Run, why: str) -> StaleAnswer:
    asks = "; ".join(f"{open_.question!r} ({open_.call_id})" for open_ in run.questions)
    return StaleAnswer(cut(f"{why} It asks now: {asks}" if asks else f"{why} It asks nothing now."), run.questions)


def may_count(run: Run, position: int, call_id: str) -> bool:
    """Whether the answer of a question of the step at *position* counts: no retry has dropped it."""
    asked_in = try_of(call_id)
    return position < len(run.steps) or asked_in is None or asked_in >= run.first_try


def answer_of(question: Question, output: msgspec.Raw, at: datetime) -> Call:
    """Return the finished call of *question*, or of a sleep or a message."""
    text = question.question
    call = Call(
        call_id=question.call_id,
        name=ASK,
        kind="question",
        result=output,
        started_at=question.asked_at,
        completed_at=at,
    )
    match question.kind:
        case "sleep":
            return replace(call, name=text or SLEEP, kind="sleep", arguments=JSON_NULL)
        case "message":
            return replace(call, name=RECEIVE, kind="message", arguments=message_json(text))
    return replace(call, arguments=question_json(text))


def dropped_of(question: Question, error: InvalidData, at: datetime) -> Call:
    """Return the failed call of a message that had been sent before it was awaited, and does not fit."""
    error_text = f"A message {question.question!r} was dropped, because it does not fit: {error}"
    dropped = answer_of(question, JSON_NULL, at)
    return replace(dropped, error=cut(error_text), error_type=CallError.error_type)


def awaited(run: Run, name: str) -> Question | None:
    """Return the first wait of *run* for a message of this name, or None."""
    return next((wait for wait in run.waiting_for if wait.kind == "message" and wait.question == name), None)


def message_from(name: str, message: msgspec.Raw, max_bytes: int) -> msgspec.Raw:
    """Return a copy of *message*, which may be a view of a request body. Raises InvalidData, TooLarge."""
    if NAME.fullmatch(name) is None:
        raise InvalidData.of(
            f"{name!r} is not a valid name of a message. Use 1 to 128 letters, digits, '_', '-' and '.'."
        )
    if len(message) > max_bytes:
        raise TooLarge(f"A message may have up to {max_bytes} bytes, and this one has {len(message)}.")
    return msgspec.Raw(bytes(message))


def check_message(run: Run, name: str, message: msgspec.Raw, kept: int) -> None:
    """Check a message that is sent to *run*, for which *kept* messages are kept.

    Raises: Conflict if the run has ended; InvalidData if it does not fit; TooManyRequests if too many are kept.
    """
    if run.status.is_final:
        raise Conflict(f"The run {run.run_id} is {run.status}, so it can no longer receive a message {name!r}.")
    if (wait := awaited(run, name)) is not None:
        check_answer(wait, message, MESSAGE)
    elif errors := explain(Any, bytes(message), f"/{MESSAGE}"):
        raise InvalidData(errors)
    if kept >= MAX_MESSAGES:
        raise TooManyRequests(
            f"{kept} messages are kept for the run {run.run_id}, the limit of one run. Send more when it has received "
            "some of them."
        )


def is_expired(question: Question, at: datetime) -> bool:
    return question.expires_at is not None and question.expires_at <= at


def _normal(value: bytes | msgspec.Raw) -> bytes:
    """Return JSON in a form that is equal for equal values."""
    return msgspec.json.encode(msgspec.json.decode(value), order="deterministic")

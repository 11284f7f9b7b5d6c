"""Answers to questions: the rules that both engines share."""

import re
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.questions import ASK, MESSAGE, RECEIVE, SLEEP, check_answer, message_json, question_json
from flock.errors import (
    CallError,
    CallNotFound,
    Conflict,
    Expired,
    Forbidden,
    InvalidData,
    RunNotFound,
    StaleAnswer,
    TooLarge,
    TooManyRequests,
    cut,
)
from flock.jsontype import explain
from flock.runs import JSON_NULL, AskedQuestion, Call, Principal, Question, Run, RunStatus, one_line
from flock.steps.identity import NAME, place_of, try_of
from flock.steps.outcomes import expiry_of
from flock.steps.raised import raised_by

#: How many messages are kept for one run until it receives them.
MAX_MESSAGES = 1000


def question_for(
    run: Run,
    call_id: str,
    output: msgspec.Raw,
    find_answer: Callable[[], Call | None],
    was_asked: Callable[[], bool],
    by: Principal | None = None,
) -> Question | None:
    """Return the open question that *output* answers, or None if it has been given before; see ``Engine.answer_call``.

    Args:
        find_answer: returns the answer that a question has got, or None.
        was_asked: returns whether an earlier question of the run had this id.

    Raises: CallNotFound, StaleAnswer, InvalidData; RunNotFound or Forbidden if *by* may not answer the question.
    """
    question = next((open_ for open_ in run.waiting_for if open_.call_id == call_id and open_.is_question), None)
    given = find_answer() if question is None or run.status is not RunStatus.WAITING else None
    if question is not None and given is None:
        if run.status.is_final:
            ended = f"The run {run.run_id} is {run.status}, so its question {call_id!r} can no longer be answered."
            raise _stale(run, by, ended)
        _check_access(run, question, by)
        check_answer(question, output)
        return question
    is_replaced = any(place_of(open_.call_id) == place_of(call_id) for open_ in run.questions)
    if given is None or is_replaced:
        if given is None and not was_asked():
            raise CallNotFound(run.run_id, call_id)
        raise _stale(run, by, f"The run {run.run_id} no longer asks the question {call_id!r}.")
    if errors := explain(Any, bytes(output), "/output"):
        raise InvalidData(errors)
    is_same = _normal(given.result) == _normal(output)
    is_own = by is None or given.answered_by in (None, by.name)
    if not is_same or not is_own:
        whose = "" if given.answered_by is None else f" by {given.answered_by!r}"
        otherwise = f"has already been answered{whose}{'' if is_same else ' otherwise'}."
        raise _stale(run, by, f"The question {call_id!r} of the run {run.run_id} {otherwise}")
    return None


def _stale(run: Run, by: Principal | None, why: str) -> StaleAnswer:
    """Return the error for an answer, with the open questions that *by* may see."""
    open_questions = [open_ for open_ in run.questions if may_see(run, open_, by)]
    asks = "; ".join(f"{open_.question!r} ({open_.call_id})" for open_ in open_questions)
    return StaleAnswer(cut(f"{why} It asks now: {asks}" if asks else f"{why} It asks nothing now."), open_questions)


def is_of(run: Run, by: Principal | None) -> bool:
    """Whether *by* may see a run. None is the program itself."""
    return by is None or by.admin or run.principal == by.name


def may_see(run: Run, question: Question, by: Principal | None) -> bool:
    """Whether *by* may see a question of a run: as the run, or because of the role that may answer it."""
    return is_of(run, by) or (by is not None and question.answerer in by.roles)


def can_answer(question: Question, principal: str | None, begun_by: Collection[str], by: Principal | None) -> bool:
    """Whether *by* may answer a question of a run of *principal*, which *begun_by* have started or retried."""
    if by is None:
        return True
    if question.is_for_client:
        return by.name == (principal or "")
    if question.four_eyes and (by.name in begun_by or not by.name):
        return False
    if isinstance(question.answerer, str):
        return question.answerer in by.roles
    return by.admin or principal == by.name


def _check_access(run: Run, question: Question, by: Principal | None) -> None:
    """Raise RunNotFound if *by* may not see a question, and Forbidden if it may not answer it."""
    if by is None:
        return
    if not may_see(run, question, by):
        raise RunNotFound(run.run_id)
    if question.is_for_client and not can_answer(question, run.principal, (), by):
        raise Forbidden("Only the principal of the run may send the output of a tool of its client.")
    if isinstance(question.answerer, str) and question.answerer not in by.roles:
        raise Forbidden(f"Only principals with the role {question.answerer!r} may answer this question.")
    if question.four_eyes and (by.name in run.begun_by or not by.name):
        raise Forbidden("A principal who started or retried the run cannot answer this question (four_eyes).")


def may_count(run: Run, position: int, call_id: str) -> bool:
    """Whether the answer of a question of the step at *position* counts: no retry has dropped it."""
    asked_in = try_of(call_id)
    return position < len(run.steps) or asked_in is None or asked_in >= run.first_try


def answer_of(question: Question, output: msgspec.Raw, at: datetime, by: Principal | None = None) -> Call:
    """Return the finished call of *question*, which *by* has answered, or of a sleep or a message."""
    text = question.question
    call = Call(
        call_id=question.call_id,
        name=ASK,
        kind="question",
        result=output,
        answered_by=None if by is None else by.name or None,
        four_eyes=question.four_eyes,
        started_at=question.asked_at,
        completed_at=at,
    )
    match question.kind:
        case "sleep":
            return replace(call, name=text or SLEEP, kind="sleep", arguments=JSON_NULL)
        case "message":
            return replace(call, name=RECEIVE, kind="message", arguments=message_json(text))
    return replace(call, arguments=question_json(text, question.arguments))


def asked_question(run: Run, question: Question, answer: Call | None) -> AskedQuestion:
    is_open = any(open_.call_id == question.call_id for open_ in run.questions)
    return AskedQuestion(
        run_id=run.run_id,
        agent_name=run.agent_name,
        session_id=run.session_id,
        principal=run.principal,
        question=question,
        status="open" if is_open else "closed" if answer is None else "answered",
        answer=msgspec.UNSET if answer is None else answer.result,
        answered_by=None if answer is None else answer.answered_by,
        answered_at=None if answer is None else answer.completed_at,
    )


def answer_in_words(question: Question, answer: Call) -> str:
    """Return a log line about an answer, with changed arguments. Other answers may be private: they are omitted."""
    output, about = msgspec.json.decode(answer.result), question.arguments
    what = ""
    if isinstance(about, msgspec.Raw) and isinstance(output, dict):
        what = ": approved" if output.get("approved") is True else ": denied"
        if output.get("arguments") is not None:
            changed = msgspec.json.encode(output["arguments"]).decode()
            what += f", with {one_line(cut(changed))} in place of {one_line(cut(bytes(about).decode()))}"
    return f"answered the question {question.call_id}{what}"


def end_of_expired(question: Question, at: datetime) -> Call | None:
    """Return the call of a question that has expired, with its default or what it raises; None if its run fails."""
    if not isinstance(question.default, msgspec.UnsetType):
        return answer_of(question, question.default, at)
    if question.raises is not True:
        return None
    exc = Expired(expiry_of(question).error)
    raised = raised_by(ASK, exc)
    return replace(answer_of(question, JSON_NULL, at), error=str(exc), error_type=exc.error_type, raised=raised)


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
    if re.fullmatch(NAME, name) is None:
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

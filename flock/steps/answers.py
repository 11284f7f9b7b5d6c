"""Answers to questions: the rules that both engines share."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import msgspec

from flock.agents.questions import ASK, check_answer, question_json
from flock.errors import CallNotFound, Conflict, InvalidData
from flock.jsontype import explain
from flock.runs import Call, Question, Run, RunStatus


def question_for(
    run: Run, call_id: str, output: msgspec.Raw, find_answer: Callable[[], bytes | msgspec.Raw | None]
) -> Question | None:
    """Return the open question that *output* answers, or None if it has been given before; see ``Engine.answer_call``.

    Args:
        find_answer: returns the answer of a question that is not open, or None if it was not asked.

    Raises: CallNotFound, Conflict, InvalidData.
    """
    question = next((open_ for open_ in run.waiting_for if open_.call_id == call_id), None)
    if question is None:
        given = find_answer()
        if given is None:
            raise CallNotFound(run.run_id, call_id)
        if errors := explain(Any, bytes(output), "/output"):
            raise InvalidData(errors)
        if _normal(given) != _normal(output):
            raise Conflict(f"The question {call_id!r} of the run {run.run_id} has already been answered otherwise.")
        return None
    if run.status is not RunStatus.WAITING:
        raise Conflict(f"The run {run.run_id} is {run.status}, so its question {call_id!r} can no longer be answered.")
    check_answer(question, output)
    return question


def answer_of(question: Question, output: msgspec.Raw, at: datetime) -> Call:
    """Return the finished call of *question*."""
    return Call(
        call_id=question.call_id,
        name=ASK,
        kind="question",
        arguments=question_json(question.question),
        result=output,
        started_at=question.asked_at,
        completed_at=at,
    )


def is_expired(question: Question, at: datetime) -> bool:
    return question.expires_at is not None and question.expires_at <= at


def _normal(value: bytes | msgspec.Raw) -> bytes:
    """Return JSON in a form that is equal for equal values."""
    return msgspec.json.encode(msgspec.json.decode(value), order="deterministic")

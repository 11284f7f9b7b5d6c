"""Runs that wait for answers, for a time, or for messages. They exist only in the store; no engine owns them.

All functions are called inside a transaction of ``Database.change``.
"""

import logging
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.questions import MESSAGE, check_answer
from flock.errors import InvalidData, RunNotFound
from flock.logs import fields_of_run
from flock.runs import (
    AskedQuestion,
    Call,
    IdempotencyKey,
    Principal,
    Question,
    QuestionFilter,
    QuestionPage,
    Run,
    RunStatus,
)
from flock.steps.answers import (
    answer_in_words,
    answer_of,
    asked_question,
    awaited,
    can_answer,
    check_message,
    dropped_of,
    end_of_expired,
    is_expired,
    question_for,
)
from flock.steps.outcomes import CANCELLED, Outcome, expiry_of
from flock.store import jobs, queries, statements
from flock.store.columns import Damaged, call_from, call_values, json_from, json_or_null, micros, waiting_values

logger = logging.getLogger("flock.store")

#: When to look again at a wait that has expired and cannot go on here.
LOOK_AGAIN = timedelta(minutes=1)

#: How many questions are read for one page, even if the principal may answer none of them.
MAX_QUESTIONS_READ = 2000


def suspend(db: sqlite3.Connection, run: Run, at: datetime) -> tuple[bool, Run | None]:
    """Write a run that begins to wait. Raises OwnershipLost.

    Returns: whether it was not cancelled meanwhile; and a stub of the run if an answer was there, so that it can start.
    """
    queries.check_owner(db, run)
    queries.write_spent(db, run)
    (reported,) = db.execute(statements.LAST_WEBHOOK, (run.run_id,)).fetchone()
    answered = {wait.call_id for wait in run.waiting_for if wait.is_model_call and jobs.keep_call(db, run, wait, at)}
    kept = (replace(wait, arguments=msgspec.UNSET) if wait.is_model_call else wait for wait in run.waiting_for)
    run = replace(run, waiting_for=tuple(kept))
    if db.execute(statements.SUSPEND_RUN, (*waiting_values(run), run.run_id)).rowcount == 0:
        return False, None
    db.execute(statements.COUNT_WAITING_ITEMS, (1, run.batch_id))
    answered |= {wait.call_id for wait in run.waiting_for if _find_answer(db, run, wait, at) is not None}
    if answered:  # it resumes in this transaction, so nobody sees it wait
        db.execute(statements.UNDO_WAITING_WEBHOOK, (run.run_id, reported))
    return True, queries.resume(db, run, answered, run.owner) if answered else None


def check_wait(db: sqlite3.Connection, run: Run, wait: Question, at: datetime) -> Call | None:
    """Return the answer of a wait of a running step. If there is none, write all its waits. Raises OwnershipLost."""
    queries.check_owner(db, run)
    call = _find_answer(db, run, wait, at)
    if call is None:
        db.execute(statements.SET_WAITS, (json_or_null(run.waiting_for), run.run_id))
    return call


def has_answer(db: sqlite3.Connection, run: Run, wait: Question) -> bool:
    """Whether ``check_wait`` may find an answer. It only reads."""
    values = (run.run_id, len(run.steps), run.tries, wait.call_id)
    message = (run.run_id, wait.question) if wait.kind == "message" else None
    return db.execute(statements.FIND_ANSWER_OF_WAIT, values).fetchone() is not None or (
        message is not None and db.execute(statements.NEXT_MESSAGE, message).fetchone() is not None
    )


def answer(
    db: sqlite3.Connection,
    run_id: str,
    call_id: str,
    output: msgspec.Raw,
    by: Principal | None,
    owner: str,
    at: datetime,
    answered: list[tuple[str, dict[str, Any]]],
) -> Run | None:
    """Answer a question, and add that in words to *answered*, with the fields of the run.

    Returns: if the run waits, a stub of it that *owner* is to start.

    Raises: RunNotFound, CallNotFound, Forbidden, Conflict, InvalidData, EngineStopped.
    """
    run = queries.find_run(db, run_id, is_outline=True)
    if run is None:
        raise RunNotFound(run_id)

    def find_answer() -> Call | None:
        row = db.execute(statements.FIND_ANSWER, (run_id, call_id, len(run.steps), run.first_try)).fetchone()
        return None if row is None else call_from(row)

    def was_asked() -> bool:
        return db.execute(statements.ANSWERER, (run_id, call_id)).fetchone() is not None

    question = question_for(run, call_id, output, find_answer, was_asked, by)
    if question is None:
        return None
    queries.check_engine(db, owner)
    call = answer_of(question, output, at, by)
    _write_call(db, run, call)
    answered.append(
        (answer_in_words(question, call), fields_of_run(run))
    )  # not the question, which holds all questions of the run
    if run.status is RunStatus.WAITING:
        return queries.resume(db, run, [call_id], owner)
    left = tuple(each for each in run.waiting_for if each is not question)
    db.execute(statements.SET_WAITS, (json_or_null(left), run_id))
    return None


def may_answer(db: sqlite3.Connection, run_id: str, call_id: str, by: Principal) -> bool:
    """Whether *by* may know of a question, as the owner of the run or because of a role. It takes as long for any."""
    is_own = db.execute(statements.IS_OF_PRINCIPAL, (run_id, by.name, by.name)).fetchone() is not None
    row = db.execute(statements.ANSWERER, (run_id, call_id)).fetchone()
    return is_own or by.admin or (row is not None and row[0] in by.roles)


def find_question(db: sqlite3.Connection, run_id: str, call_id: str) -> AskedQuestion | None:
    """Return a question that a run has asked, or None. Raises Damaged."""
    row = db.execute(statements.FIND_QUESTION, (run_id, call_id)).fetchone()
    run = None if row is None else queries.find_run(db, run_id, is_outline=True)
    if run is None:
        return None
    answered = db.execute(statements.FIND_ANSWER, (run_id, call_id, len(run.steps), 0)).fetchone()
    question = msgspec.json.decode(row[0], type=Question)
    return asked_question(run, question, None if answered is None else call_from(answered))


def list_questions(db: sqlite3.Connection, flock: str, wanted: QuestionFilter, since: int | None) -> QuestionPage:
    """Return one page of the questions that ``wanted.by`` may answer; see ``Store.list_questions``."""
    by, owner, roles = wanted.by, "" if wanted.role is None else None, None if wanted.role is None else [wanted.role]
    if by is not None:
        roles = [role for role in by.roles if wanted.role in (None, role)]
        owner = owner if owner is None or by.admin else "owner"
    owner = "principal" if owner == "" and wanted.principal is not None else owner  # it has an index
    own = {name: getattr(wanted, name) for name in statements.QUESTION_CONDITIONS}
    named = {f"role{number}": role for number, role in enumerate(roles or ())}
    values = own | named | {"roles": json_or_null(roles), "flock": flock, "after": wanted.after or "~"}
    values["owner"] = "" if by is None else by.name
    page, names = QuestionPage(), [name for name, value in own.items() if value is not None]
    (page.newest,) = db.execute(statements.NEWEST_CHANGE).fetchone()
    if since is not None:
        query = statements.changed_questions(names)
    elif roles == [] and owner is None:
        return page
    else:
        query = statements.open_questions(None if roles is None else list(named), owner, names)
    before = last = ""
    for number, row in enumerate(db.execute(query, values | {"since": since})):
        run_id, agent_name, session_id, principal, retried_by, stored, is_open, change = row
        if is_next_run := run_id != last:
            before, last = last, run_id
        question = msgspec.json.decode(stored, type=Question)
        begun_by = [principal, *(() if retried_by is None else msgspec.json.decode(retried_by))]
        asked = AskedQuestion(
            run_id=run_id,
            agent_name=agent_name,
            session_id=session_id,
            principal=principal,
            question=question,
            status="open" if is_open else "closed",
        )
        is_wanted = wanted.role in (None, question.answerer) and not question.is_for_client
        is_wanted &= can_answer(question, principal, begun_by, by)
        if (is_next_run and number >= MAX_QUESTIONS_READ) or (is_wanted and not page.add(asked, wanted.limit)):
            page.rest = (replace(wanted, after=before), None) if since is None else (wanted, change - 1)
            break
    page.sort(key=lambda asked: asked.question.asked_at)
    page.sort(key=lambda asked: asked.run_id, reverse=True)
    return page


def send(
    db: sqlite3.Connection,
    run_id: str,
    name: str,
    message: msgspec.Raw,
    key: IdempotencyKey | None,
    owner: str,
    at: datetime,
) -> Run | None:
    """Keep a message to a run. If the run waits for it, return a stub of the run, which is to be started by *owner*.

    Raises: RunNotFound, Replayed, KeyReused, Conflict, InvalidData, TooManyRequests, EngineStopped.
    """
    run = queries.find_run(db, run_id, is_outline=True)
    if run is None:
        raise RunNotFound(run_id)
    queries.check_key(db, run.flock, key)
    check_message(run, name, message, db.execute(statements.COUNT_MESSAGES, (run_id,)).fetchone()[0])
    queries.check_engine(db, owner)
    queries.insert_key(db, run.flock, key, run_id, at)
    wait = awaited(run, name) if run.status is RunStatus.WAITING else None
    if wait is None:
        db.execute(statements.INSERT_MESSAGE, (run_id, name, bytes(message), micros(at)))
        return None
    _write_call(db, run, answer_of(wait, message, at))
    return queries.resume(db, run, [wait.call_id], owner)


def expire(
    run_ids: Iterable[str],
    agents: Collection[str],
    put_off: dict[str, datetime],
    owner: str,
    at: datetime,
    db: sqlite3.Connection,
) -> Sequence[Run]:
    """End the waits that have expired. Return stubs of the runs that have ended or are to start.

    A run that goes on waits until a program that has its agent continues it. When to look again at it, and at one that
    cannot be read, is noted in *put_off*.
    """
    changed = []
    for run_id in run_ids:
        try:
            run = queries.find_run(db, run_id, is_outline=True)
        except Damaged as exc:
            logger.error("run %s is waiting and cannot be read: %s", run_id, exc)
            put_off[run_id] = at + LOOK_AGAIN
            continue
        if run is None or run.status is not RunStatus.WAITING:
            continue
        expired = [open_ for open_ in run.waiting_for if is_expired(open_, at)]
        ends = [(open_, end_of_expired(open_, at)) for open_ in expired]
        unanswered = next((open_ for open_, call in ends if call is None), None)
        if not expired:
            continue
        if unanswered is None and run.next_agent_name not in agents:
            put_off[run_id] = at + LOOK_AGAIN
            continue
        for open_ in expired:
            if open_.kind is msgspec.UNSET:
                db.execute(statements.QUESTION_EXPIRED, (open_.call_id, micros(at), micros(at), run_id))
        if unanswered is not None:
            end(db, run, expiry_of(unanswered), at)
            changed.append(queries.find_run(db, run_id, is_outline=True))
        else:
            for _, call in ends:
                assert call is not None
                _write_call(db, run, call)
            changed.append(queries.resume(db, run, [open_.call_id for open_ in expired], owner))
    return [run for run in changed if run is not None]


def end(db: sqlite3.Connection, run: Run, outcome: Outcome, at: datetime) -> bool:
    """Write the end of a waiting run. Returns False if it is not waiting. Its questions stay for late answers."""
    values = (outcome.status.value, outcome.error, outcome.error_type, micros(at), run.run_id)
    is_ended = db.execute(statements.END_WAITING_RUN, values).rowcount == 1
    if is_ended:
        db.execute(statements.CLOSE_QUESTIONS, (run.run_id,))
    if is_ended and run.batch_id is not None:
        queries.count_ended(db, queries.Ended({(run.batch_id, outcome.status): 1}))
        db.execute(statements.COUNT_WAITING_ITEMS, (-1, run.batch_id))
    return is_ended


def drop(db: sqlite3.Connection, run_id: str, at: datetime) -> Run | None:
    """Delete a run, or cancel it if it has not ended. Return it if it was waiting, and so has ended now."""
    if queries.delete_run(db, run_id) or db.execute(statements.CANCEL_RUN, (run_id,)).rowcount:
        return None
    run = queries.find_run(db, run_id, is_outline=True)
    is_ended = run is not None and end(db, run, CANCELLED, at)
    return queries.find_run(db, run_id, is_outline=True) if is_ended else None


def _find_answer(db: sqlite3.Connection, run: Run, wait: Question, at: datetime) -> Call | None:
    """Return the answer of a wait: one that has come while the step was running, or the next message that fits."""
    row = db.execute(statements.FIND_ANSWER_OF_WAIT, (run.run_id, len(run.steps), run.tries, wait.call_id)).fetchone()
    if row is not None:
        return call_from(row)
    if wait.kind != "message":
        return None
    while (row := db.execute(statements.NEXT_MESSAGE, (run.run_id, wait.question)).fetchone()) is not None:
        db.execute(statements.DELETE_MESSAGE, (row[0],))
        message = json_from(row[1])
        try:
            check_answer(wait, message, MESSAGE)
        except InvalidData as exc:
            call = dropped_of(wait, exc, at)
            logger.warning("run %s: %s", run.run_id, call.error)
        else:
            call = answer_of(wait, message, at)
        _write_call(db, run, call)
        if call.error is None:
            return call
    return None


def _write_call(db: sqlite3.Connection, run: Run, call: Call) -> None:
    db.execute(statements.INSERT_CALL, call_values(run, len(run.steps), call))

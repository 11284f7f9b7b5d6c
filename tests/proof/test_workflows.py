"""Random workflow programs, whose processes die. ``interpreter`` says what must come out of them."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flock.steps.journal import Journal
from flock.store import queries
from tests.proof.interpreter import interpret
from tests.proof.lives import End, Fate, processes
from tests.proof.many import execute_some
from tests.proof.workflows import CLASSES, Statement

Attempt = Callable[[Statement, Fate], None]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    with processes() as attempt:
        yield attempt


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_done_stays_done(name: str, attempt: Attempt) -> None:
    execute_some(name, 4, 0, attempt)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_done_stays_done_in_more_programs(name: str, attempt: Attempt) -> None:
    for seed in (1, 2):
        execute_some(name, 100, seed, attempt)


# What such programs have found


def call(n: int, seconds: float = 0.1, kind: Any = "work") -> Statement:
    return Statement(kind, n=n, seconds=seconds + n / 1000)


def program(kind: Any, *parts: Statement, limit_s: float | None = None, times: int = 0) -> Statement:
    return Statement(kind, parts, limit_s=limit_s, times=times)


#: In each of them the process dies in call 9, unless it is asked a question there.
FOUND = {
    "the loser of a race": program("seq", program("first", call(1), call(2, 0.2)), call(9)),
    "a call that was timed out": program(
        "seq", program("try", program("timeout", call(1, 0.3), limit_s=0.2), call(2)), call(9)
    ),
    "a call that was timed out, and a question": program(
        "seq", program("try", program("timeout", call(1, 0.3), limit_s=0.2), call(2)), Statement("ask", n=9)
    ),
    "a call that was timed out between two that were not": program(
        "seq", program("loop", program("wait", call(1), call(2, 0.3), limit_s=0.2), times=2), call(9)
    ),
    # A time-out passes again, and meanwhile the other one must not: its call ended after the first time-out.
    "a call in time beside one that was timed out": program(
        "seq",
        program(
            "gather",
            program("seq", program("try", program("timeout", call(1, 3), limit_s=1), call(2)), call(3)),
            program("seq", call(4, 0.9), program("timeout", call(5, 0.3), limit_s=0.5)),
        ),
        call(9),
    ),
    "the sibling of a task that fails": program(
        "seq", program("try", program("group", call(1, kind="fail"), call(2, 0.2)), call(3)), call(9)
    ),
    "the order of as_completed": program("seq", program("completed", call(1, 0.2), call(2)), call(9)),
    "the order of two races": program(
        "seq", program("first", program("seq", call(1), call(2, 0.4)), program("seq", call(3, 0.2), call(4))), call(9)
    ),
    "the first that fails in a gather": program(
        "seq", program("try", program("gather", call(1, 0.2, "fail"), call(2, kind="fail")), call(3, 0.3)), call(9)
    ),
    "a thread that lost a race": program("seq", program("first", call(1), call(2, 0.2, "block")), call(9)),
    "a group that fails in a tool": program(
        "seq", program("try", program("tool", program("group", call(1, kind="fail"))), call(2)), call(9)
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str, attempt: Attempt) -> None:
    expected = interpret(FOUND[name])
    events = 100 if "question" in name else 2 * expected.begun.total() + len(expected.decisions) - 1
    for event in (events, 0):
        attempt(FOUND[name], Fate(is_stored=True, ends=(End(event, 5),)))


def test_a_call_that_a_store_forgets_is_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    find_calls = queries.find_calls
    monkeypatch.setattr(queries, "find_calls", lambda *args: find_calls(*args)[1:])
    with pytest.raises(AssertionError, match=r"work\(1\) is executed again.*\n\ncall work\(1\)  # takes 0.101 s\n"):
        attempt(program("seq", call(1), call(9)), Fate(is_stored=True, ends=(End(2, 5),)))


def test_a_run_that_never_ends_is_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "call", lambda *args: asyncio.Event().wait())
    with pytest.raises(AssertionError, match="No end after"):
        attempt(call(1), Fate())

"""Random workflow programs, whose processes die. ``interpreter`` says what must come out of them."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.proof.interpreter import interpret
from tests.proof.lives import End, Fate, processes
from tests.proof.many import execute_some
from tests.proof.workflows import CLASSES, Statement, text

#: What fails today, by the class of the program. Remove the line of what is fixed.
BROKEN = {
    "groups": "a call that the program has cancelled is executed again",
    "groups in calls": "the same, and a group that fails in a call ends its run on Python 3.11 and 3.12",
    "races": "a call that the program has cancelled is executed again, and the ends of calls come in another order",
    "as_completed": "the ends of calls come in another order",
    "timeouts": "a call that the program has cancelled is executed again",
    "everything": "all of these",
}

each_class = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=BROKEN[name])) if name in BROKEN else name
        for name in CLASSES
    ],
)


@pytest.fixture(scope="module")
def attempt() -> Iterator[Callable[[Statement, Fate], None]]:
    with processes() as attempt:
        yield attempt


@each_class
@pytest.mark.parametrize(
    ("count", "seeds"),
    [
        pytest.param(25, range(1), id="fast"),
        pytest.param(250, range(1, 5), id="more", marks=pytest.mark.nightly),
    ],
)
def test_what_is_done_stays_done_when_processes_die(
    name: str, count: int, seeds: range, attempt: Callable[[Statement, Fate], None]
) -> None:
    for seed in seeds:
        execute_some(name, count, seed, attempt, shrinks=name not in BROKEN)

"""Operations that fail. ``failing`` tries them, and ``faults`` has them."""

import logging
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.proof.failing import distinct, sample, trial
from tests.proof.faults import ERRORS, Fault
from tests.proof.mutations import MUTATIONS, WORDS, mutated
from tests.proof.scenarios import SCENARIOS
from tests.support import ROOT

pytestmark = pytest.mark.slow

#: How many faults of each scenario are tried.
TRIALS = 5


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_failing_operation_is_reported_and_overcome(name: str) -> None:
    for fault in sample(trial(name), TRIALS, seed=0):
        trial(name, fault)


#: What was found: a scenario, and the operation that fails, by the beginning of its name.
FOUND = {
    "no memory for a write": ("function", "sql", "memory", "BEGIN IMMEDIATE", 0.0),
    "no memory for a read": ("function", "sql", "memory", "PRAGMA data_version", 0.0),
    "no memory to undo a write": ("function", "sql", "memory", "COMMIT", 3.0),
    "no memory at the start": ("function", "sql", "memory", "PRAGMA user_version", 0.0),
    "the version cannot be read after a commit": ("chain", "sql", "io", "row of PRAGMA user_version", 0.0),
    "a lock cannot be released": ("session", "file", "EIO", "flock", 0.0),
    "the first write of an engine": ("function", "sql", "full", "INSERT INTO engines", 0.0),
    "the lock file of an engine that could not start": ("function", "sql", "full", "INSERT INTO engines", 3.0),
    "a lock file that cannot be removed": ("function", "file", "EACCES", "unlink", 3.0),
    "a thread for a function": ("function", "thread", "start", "", 3.0),
    "a file that cannot be written, nor removed": ("file", "file", "EMFILE", "open", 3.0),
    "a thread to store or close a file": ("file", "thread", "start", "", 3.0),
    "a file that cannot be read": ("file", "file", "EIO", "open", 0.0),
    "a run whose calls cannot be read for a moment": ("approval", "sql", "corrupt", "SELECT rowid, call_id, name", 0.0),
    "no memory to read an answer": ("approval", "value", "memory", "_decode by flock.jsontype", 0.0),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", FOUND)
def test_what_was_found(what: str) -> None:
    name, kind, error, operation, seconds = FOUND[what]
    places = [at for at, each in enumerate(trial(name)[kind]) if each.startswith(operation)]
    assert places
    for at in places[:: max(1, len(places) // 8)]:
        trial(name, Fault(kind, error, at, seconds))


#: Each commit fails for some seconds, while an agent makes calls one after the other.
FULL = """
from tests.proof.failing import trial
from tests.proof.faults import Fault
for at, name in enumerate(trial("stream")["sql"]):
    if name == "COMMIT":
        trial("stream", Fault("sql", "full", at, 3.0))
"""


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_a_call_that_begins_while_the_disk_is_full_is_found() -> None:
    patch = MUTATIONS / "full-a-call-that-begins-while-the-disk-is-full.patch"
    with mutated(patch) as package:
        env = {**os.environ, "OPENAI_API_KEY": "sk-test", "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
        found = subprocess.run([sys.executable, "-P", "-c", FULL], cwd=ROOT, env=env, capture_output=True, text=True)
    assert WORDS[patch.stem] in found.stderr


def test_of_equal_operations_in_the_same_state_each_error_is_tried_once() -> None:
    write = ["BEGIN IMMEDIATE", "INSERT", "COMMIT"]
    names = defaultdict[str, list[str]](list, sql=[*write, *write, "BEGIN IMMEDIATE", "UPDATE", "COMMIT"])
    found = distinct(names, [])
    assert len(found) == len(set(found)) == 6 * len(ERRORS["sql"])
    earlier = defaultdict[str, list[str]](list, sql=[*write, "SELECT"])
    assert {fault.at for fault in distinct(names, [earlier])} <= set(range(3, 9))


def test_all_kinds_of_operations_are_tried() -> None:
    names = trial("approval")
    assert names.keys() == ERRORS.keys()
    assert {fault.kind for fault in sample(names, 20, 0)} == ERRORS.keys()

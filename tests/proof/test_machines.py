"""Short lanes of the machines, and the faults that each of them must find."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof import crash, cuts
from tests.proof.mutations import MUTATIONS, WORDS, mutated
from tests.proof.recordings import RECORDINGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    *(
        pytest.mark.skipif(shutil.which(each) is None, reason=f"{each} is not installed: apt-get install {each}")
        for each in ("gcc", "sqlite3")
    ),
]


#: Where crash points find a fault, if not in functions that call others.
SCENARIOS_OF = {"crash-a-call-of-a-model-that-is-repeated": ["approval", "fallback"]}


@pytest.fixture(autouse=True)
def _no_logs() -> Iterator[None]:
    """Hundreds of engines start and resume runs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_server_that_is_killed_at_any_call_keeps_its_promises() -> None:
    reached, broken = crash.execute(crash.SHORT, ["start", "kill"], 10)
    assert (broken, reached.total() >= 6) == ([], True)


def test_a_server_goes_on_after_any_call_of_the_system_that_fails() -> None:
    reached, broken = crash.execute(crash.SHORT, ["error"], 10)
    assert (broken, reached.total() >= 6) == ([], True)


def test_each_night_lets_calls_fail_in_other_ways() -> None:
    points = [crash.Point("chain", "error", at) for at in range(100)]
    nights = [[point.error for point in crash.with_errors(points, seed)] for seed in range(8)]
    ways = [set(each) for each in zip(*nights, strict=True)]
    assert sum(len(each) > 1 for each in ways) > 90
    assert set().union(*ways) == set(crash.ERRORS)
    assert crash.with_errors(points[:1], 0, "second") == [crash.Point("chain", "error", 0, "second")]


def test_a_worker_that_is_killed_at_any_call_is_replaced() -> None:
    reached, broken = crash.execute(["workflow", "stream"], ["worker"], 3)
    assert (broken, reached.total() >= 2) == ([], True)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("power", 50),
        ("process", 30),
        ("command", 14),
        ("workers", 20),
        ("file", 20),
        pytest.param("long", 50, marks=pytest.mark.nightly),
    ],
)
def test_a_power_cut_leaves_what_was_acknowledged(name: str, count: int) -> None:
    found = cuts.execute(RECORDINGS[name], count)
    assert (found.failed, found.tried >= 5) == ([], True)


def test_each_prefix_of_what_was_written_is_a_state() -> None:
    calls = [cuts.Call("c", 1, 0, "/a", b""), *(cuts.Call("w", 1, at, "/a", b"x") for at in range(3))]
    found = [(cut, files) for cut, _, files, _ in cuts.states(calls, (), has_prefixes=True)]
    assert found == [(at, {"/a": b"x" * at}) for at in range(4)]


@pytest.mark.nightly
@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("crash-*.patch")), ids=lambda patch: patch.stem)
def test_crash_points_find_a_fault(patch: Path) -> None:
    with mutated(patch) as package:
        scenarios = SCENARIOS_OF.get(patch.stem, ["chain", "workflow", "function"])
        _, broken = crash.execute(scenarios, ["kill"], 40, package=package)
    assert any(WORDS[patch.stem] in str(each) for each in broken), broken


@pytest.mark.nightly
@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("failing-*.patch")), ids=lambda patch: patch.stem)
def test_calls_of_the_system_that_fail_find_a_fault(patch: Path) -> None:
    with mutated(patch) as package:
        _, broken = crash.execute(["chain"], ["error"], package=package)
    assert any(WORDS[patch.stem] in str(each) for each in broken), broken


@pytest.mark.nightly
@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("cuts-*.patch")), ids=lambda patch: patch.stem)
def test_power_cuts_find_a_fault(patch: Path) -> None:
    name = "command" if "output" in patch.stem else "file" if "folder" in patch.stem else "power"
    with mutated(patch) as package:
        found = cuts.execute(RECORDINGS[name], 150, package=package)
    assert any(WORDS[patch.stem] in each for each in found.failed), found.failed

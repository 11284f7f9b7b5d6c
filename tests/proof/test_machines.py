"""Short lanes of the machines, and the faults that each of them must find."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof import crash, cuts
from tests.proof.mutations import MUTATIONS, mutated
from tests.proof.recordings import RECORDINGS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed: apt-get install gcc"),
]


@pytest.fixture(autouse=True)
def _no_logs() -> Iterator[None]:
    """Hundreds of engines start and resume runs."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_a_server_that_is_killed_at_any_call_keeps_its_promises() -> None:
    reached, broken = crash.execute(crash.SHORT, ["start", "kill"], 10)
    assert (broken, reached.total() >= 6) == ([], True)


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
        pytest.param("long", 50, marks=pytest.mark.nightly),
    ],
)
def test_a_power_cut_leaves_what_was_acknowledged(name: str, count: int) -> None:
    found = cuts.execute(RECORDINGS[name], count)
    assert (found.failed, found.tried >= 5) == ([], True)


@pytest.mark.nightly
@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("crash-*.patch")), ids=lambda patch: patch.stem)
def test_crash_points_find_a_fault(patch: Path) -> None:
    with mutated(patch) as package:
        _, broken = crash.execute(["chain", "workflow", "function"], ["kill"], 40, package=package)
    assert broken


@pytest.mark.nightly
@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("cuts-*.patch")), ids=lambda patch: patch.stem)
def test_power_cuts_find_a_fault(patch: Path) -> None:
    name = "command" if "output" in patch.stem else "power"
    with mutated(patch) as package:
        found = cuts.execute(RECORDINGS[name], 150, package=package)
    assert found.failed

"""Each machine finds the faults that ``mutations`` puts into the product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.mutations import MUTATIONS, WORDS, mutated
from tests.support import ROOT

#: How each machine looks for faults, until it finds one.
ORDERS = """
from tests.proof.test_steps import PROGRAMS, attempt, trial
for name in PROGRAMS:
    for seed in range(3):
        attempt(trial, name, seed, ":memory:")
"""
MACHINES = {
    "schedules": ["-c", ORDERS],
    "programs": ["-m", "tests.proof", "--in-memory", "--programs", "40"],
    "order": ["-m", "tests.proof", "--in-memory", "--programs", "40", "--class", "as_completed"],
    "slow": ["-m", "tests.proof", "--in-memory", "--programs", "2000", "--class", "slow plain code"],
    "failing": ["-m", "tests.proof.failing", "chain", "session", "--trials", "30"],
}
PATCHES = [patch for patch in sorted(MUTATIONS.glob("*.patch")) if patch.name.partition("-")[0] in MACHINES]


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("patch", [pytest.param(patch, id=patch.stem) for patch in PATCHES])
def test_a_machine_finds_a_fault_of_the_product(patch: Path) -> None:
    with mutated(patch) as package:
        env = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-P", *MACHINES[patch.name.partition("-")[0]]]  # -P: this package is not the first
        found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    output = found.stdout + found.stderr
    assert found.returncode > 0
    assert "To repeat it: python -m tests.proof" in output
    assert WORDS[patch.stem] in output


@pytest.mark.parametrize("patch", [pytest.param(patch, id=patch.stem) for patch in sorted(MUTATIONS.glob("*.patch"))])
def test_a_fault_can_still_be_put_into_the_product(patch: Path) -> None:
    subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)
    assert WORDS[patch.stem]

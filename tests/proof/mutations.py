"""Copies of the product with a fault. A machine that finds nothing must show that it can."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

__all__ = ["MUTATIONS", "WORDS", "mutated"]

MUTATIONS = Path(__file__).parent / "mutations"
#: The words of the broken promise with which each fault is reported.
WORDS = {
    "crash-a-call-of-a-model-that-is-repeated": "of a model by",
    "crash-a-call-that-is-stored-later": "has begun again after the program saw its end",
    "crash-a-forgotten-idempotency-key": "and there are",  # more runs than were accepted
    "cuts-a-commit-without-sync": "is lost",
    "cuts-a-new-folder-without-sync": "the file",
    "cuts-an-output-without-sync": "the output is ''",
    "failing-a-final-state-that-is-written-only-once": "raised StoreError",
    "failing-a-run-that-is-accepted-and-not-stored": "an accepted run is unknown",
    "full-a-call-that-begins-while-the-disk-is-full": "is called while the store cannot be written",
    "order-an-end-delivered-without-its-turn": "the program went on with",
    "programs-a-call-acknowledged-before-it-is-stored": "is executed again: the program has seen its end",
    "programs-a-call-that-is-forgotten": "is executed again: the program has seen its end",
    "programs-a-cancellation-that-is-not-stored": "is executed again: the program has seen its end, or cancelled it",
    "schedules-a-forgotten-slot": "→ _acquire:",  # it waits there for ever
    "schedules-a-slot-released-too-early": "is executed twice at the same time, with max_concurrency=1",
    "slow-a-change-that-is-not-awaited": "the program was not changed",
}


@contextlib.contextmanager
def mutated(patch: Path) -> Iterator[Path]:
    """Yield the folder of a copy of the product to which a patch is applied."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "flock", folder / "flock")
        shutil.copy(ROOT / "flockapi.py", folder)
        subprocess.run(["git", "apply", str(patch.resolve())], cwd=folder, check=True)
        yield folder

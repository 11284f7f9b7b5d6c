"""Copies of the product with a fault. A machine that finds nothing must show that it can."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT

__all__ = ["MUTATIONS", "mutated"]

MUTATIONS = Path(__file__).parent / "mutations"


@contextlib.contextmanager
def mutated(patch: Path) -> Iterator[Path]:
    """Yield the folder of a copy of the product to which a patch is applied."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "flock", folder / "flock")
        shutil.copy(ROOT / "flockapi.py", folder)
        subprocess.run(["git", "apply", str(patch.resolve())], cwd=folder, check=True)
        yield folder

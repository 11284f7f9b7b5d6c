"""New environments of Python. The pip of this one fills them, because one with a pip of its own takes long to make."""

import sys
import sysconfig
import venv
from pathlib import Path


def new_environment(folder: Path, *, with_ours: bool = False) -> Path:
    """Make an environment, and return its interpreter. With *with_ours*, it finds what is installed here, too."""
    venv.create(folder)
    if with_ours:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "ours.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str | Path) -> list[str]:
    """Return the command that runs pip for the environment of *python*."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *map(str, arguments)]

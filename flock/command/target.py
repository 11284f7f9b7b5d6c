"""The flock that TARGET names."""

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import click

from flock.declared import DeclaredFlock
from flock.errors import FlockError


def load_flock(target: str, model: str | None = None) -> DeclaredFlock:
    """Return the flock that *target* names: ``path/to/file.py[:name]`` or ``module[:name]``.

    Without a name, it is the flock called ``flock``, or else the only one in the module. *model* replaces its own.

    Raises:
        click.ClickException: there is no such file, module or flock, or its code fails. The message lists the flocks
            of the module, or has the line that failed.
    """
    source, _, name = target.partition(":")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    except click.ClickException:
        raise
    except Exception as exc:
        raise click.ClickException(_line_and_reason(exc) or f"{source}: {_reason(exc)}") from exc
    flocks = {key: value for key, value in vars(module).items() if isinstance(value, DeclaredFlock)}
    if not name and ("flock" in flocks or len(flocks) == 1):
        name = "flock" if "flock" in flocks else next(iter(flocks))
    if name in flocks:
        flocks[name].model = model or flocks[name].model
        if len(flocks) > 1 and module.__file__:
            flocks[name].program_path = f"{os.path.abspath(module.__file__)}:{name}"
        return flocks[name]
    hint = f"It has: {', '.join(flocks)}." if flocks else "Add flock = Flock(...) at its top level."
    if getattr(module, "__file__", None) is None:
        hint = f"It is a folder. Name a file in it, such as {source}/app.py."
    raise click.ClickException(f"{source} has no flock called {name or 'flock'!r}. {hint}")


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise click.ClickException(f"There is no file {path}.")
    # As Python does for a script, so that it can import the modules beside it.
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and type hints look it up here
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise click.ClickException(f"{name!r} is neither a module nor the path of a .py file.")
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{name}.".startswith(f"{exc.name}."):
            raise
        raise click.ClickException(f"There is no module {name!r}. For a file, use its path, with .py.") from exc


PACKAGE = Path(__file__).parent.parent
#: Paths of code that is not the user's own.
LIBRARIES: Sequence[str | Path] = (
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    PACKAGE,
    PACKAGE.with_name("flockapi.py"),
)


def _line_and_reason(exc: Exception) -> str | None:
    """Return ``file:line: reason`` for the innermost line of the user's own code, or None if none of it has run."""
    if isinstance(exc, SyntaxError) and exc.filename and os.path.isfile(exc.filename):
        return f"{exc.filename}:{exc.lineno}: {type(exc).__name__}: {exc.msg}"
    for frame in reversed(traceback.extract_tb(exc.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(folder) for folder in LIBRARIES):
            return f"{frame.filename}:{frame.lineno}: {_reason(exc)}"
    return None


def _reason(exc: Exception) -> str:
    return str(exc) if isinstance(exc, FlockError) else "".join(traceback.format_exception_only(exc)).strip()

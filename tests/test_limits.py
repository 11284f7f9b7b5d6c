"""docs/limits.md lists every limit, with the default in the code."""

import inspect
import re
from typing import Any

import pytest

from flock.command.cli import serve
from flock.command.server import ServerSettings
from flock.engine.embedded import EmbeddedEngine
from flock.limits import Limits
from flock.web.options import AppOptions
from tests.support import ROOT

PAGE = (ROOT / "docs" / "limits.md").read_text("utf-8")
LIMIT_NAME = re.compile(r"max_\w+|\w+_timeout_s|keep_\w+")
CELLS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `")]
#: The option and the default of each parameter that starts a table row.
ROWS = {
    cells[0].strip("`"): (cells[1].strip("`"), cells[2]) for cells in CELLS if LIMIT_NAME.fullmatch(cells[0].strip("`"))
}
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1}


def limits_of(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if LIMIT_NAME.fullmatch(each.name)}


STRUCTS = (ServerSettings, Limits, EmbeddedEngine, AppOptions)
LIMITS = {name: default for each in STRUCTS for name, default in limits_of(each).items()}


def value_of(words: str) -> float | None:
    number, _, unit = words.replace(",", "").partition(" ")
    return float(number) * UNITS[unit or "s"] if number[0].isdigit() else None


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_every_limit_is_documented_with_its_default(name: str) -> None:
    assert value_of(ROWS[name][1]) == LIMITS[name]


def test_the_page_lists_no_other_parameters() -> None:
    assert ROWS.keys() == LIMITS.keys()


def test_the_documented_options_are_those_of_the_command() -> None:
    options = {name for option in serve.params for name in option.opts}
    listed = {option for option, _ in ROWS.values() if option}
    assert listed == {option for option in options if re.match("--(max|keep)-|--.*-timeout$", option)}

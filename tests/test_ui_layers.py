"""The page's scripts import from layer to layer, down, and never in a circle: main, views, library."""

import graphlib
import re
from pathlib import Path

import pytest

from flock.web.ui import IMPORT, ui_files
from tests.support import ROOT

FOLDER = ROOT / "flock" / "static" / "ui"
SCRIPTS = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.js"))}
ENTRY = "main.js"
VIEWS = set(re.findall(r'import\("\./([\w.]+)"\)', SCRIPTS[ENTRY]))


def imports_of(script: str) -> set[str]:
    """Its static imports, however they are written."""
    return set(re.findall(r"""^(?:import|export)\b[^;]*?["']\./([\w.]+)["']""", SCRIPTS[script], re.MULTILINE))


def rank_of(script: str) -> int:
    return 2 if script == ENTRY else 1 if script in VIEWS else 0


def test_the_entry_names_all_views() -> None:
    assert {name for name, text in SCRIPTS.items() if "export async function show(" in text} == VIEWS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_library_modules_only(script: str) -> None:
    """So neither a view nor the entry is imported, except that the entry loads views when they are shown."""
    assert {rank_of(imported) for imported in imports_of(script)} <= {0}
    assert script == ENTRY or "import(" not in SCRIPTS[script]


def test_there_is_no_import_circle() -> None:
    graph = {script: imports_of(script) for script in SCRIPTS}
    assert list(graphlib.TopologicalSorter(graph).static_order())
    assert set().union(*graph.values()) | VIEWS | {ENTRY} == SCRIPTS.keys(), "a script that nothing imports"


def test_the_bundle_can_be_made_of_the_scripts() -> None:
    """What is imported keeps its name, and modules that are served as one file declare no name twice."""
    for script, text in SCRIPTS.items():
        assert {found["module"].decode() for found in IMPORT.finditer(text.encode())} == imports_of(script)
        for found in IMPORT.finditer(text.encode()):
            names = [name.strip() for name in found["names"].decode().split(",") if name.strip()]
            assert all(re.search(rf"^export .*\b{name}\b", SCRIPTS[found["module"].decode()], re.M) for name in names)
    bundle = ui_files("")[ENTRY].plain.decode()
    declared = re.findall(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", bundle, re.MULTILINE)
    assert sorted(declared) == sorted(set(declared))
    assert not IMPORT.search(bundle.encode())


def test_no_served_script_imports_what_is_not_served() -> None:
    served = {name: file.plain.decode() for name, file in ui_files("").items() if Path(name).suffix == ".js"}
    for text in served.values():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= served.keys()

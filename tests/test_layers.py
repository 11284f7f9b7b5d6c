"""Imports point down, and every file has a rank."""

import ast
import importlib
from pathlib import Path

import pytest

from tests.fakes import ROOT

RANKS = {
    "flock": 0,  # the version, loaded before everything
    "flock.errors": 0,
    "flock.extras": 0,
    "flock.fair": 0,
    "flock.nearest": 0,
    "flock.auth": 2,
    "flock.negotiation": 0,
    "flock.tables": 3,
    "flock.pieces": 3,
    "flock.results": 5,
    "flock.wire": 2,
    "flock.contract": 1,
    "flock.dialect": 1,
    "flock.ui": 2,
    "flock.jsontype": 1,
    "flock.runs": 1,
    "flock.slots": 0,
    "flock.threads": 1,
    "flock.localmodel": 1,
    "flock.life": 2,
    "flock.logs": 2,
    "flock.metrics": 2,
    "flock.progress": 2,
    "flock.signature": 2,
    "flock.llm": 2,
    "flock.schema": 2,
    "flock.store": 3,
    "flock.agents": 3,
    "flock.batchstore": 4,
    "flock.workflow": 4,
    "flock.ends": 4,
    "flock.runner": 5,
    "flock.checks": 5,
    "flock.batches": 6,
    "flock.embedded": 7,
    "flock.temporal.messages": 2,
    "flock.temporal.payloads": 3,
    "flock.temporal.cluster": 4,
    "flock.temporal.marks": 5,
    "flock.temporal.search": 5,
    "flock.temporal.records": 5,
    "flock.temporal.turns": 5,
    "flock.temporal.workflows": 5,
    "flock.temporal.batchflows": 6,
    "flock.temporal.chunks": 6,
    "flock.temporal.items": 7,
    "flock.temporal.batches": 7,
    "flock.temporal.worker": 8,
    "flock.temporal.engine": 8,
    "flock.temporal": 9,
    "flock.declared": 8,
    "flock.body": 3,
    "flock.door": 7,
    "flock.options": 2,
    "flockapi": 9,
    "flock.connection": 10,
    "flock.server": 11,
    "flock.batchfile": 9,
    "flock.cli": 12,
    "flock.core": 12,
}

#: What may import Starlette and uvicorn.
WEB = ("flockapi", "flock.body", "flock.door", "flock.connection", "flock.pieces", "flock.server", "flock.cli")

FILES = sorted([*(ROOT / "flock").rglob("*.py"), ROOT / "flockapi.py"])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & RANKS.keys()
            found |= whole or {str(node.module)}
    return {name for name in found if name.partition(".")[0] in ("flock", "flockapi")}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    upward = {name for name in imports_of(path) if RANKS[name] >= RANKS[module] and name != "flock"}
    assert not upward


def test_engine_knows_no_web_framework() -> None:
    """Only the door, the body, the pieces of answers, the server and the command line import Starlette or uvicorn.

    And but for the command line, and for the line on a terminal that says how far a batch is, nothing imports click.
    """
    for path in FILES:
        roots = {
            alias.name.partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {
            str(node.module).partition(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        if module_of(path) not in WEB:
            assert not roots & {"starlette", "uvicorn"}
        if module_of(path) not in ("flock.progress", "flock.cli"):
            assert "click" not in roots
    face = ROOT / "flockapi.py"
    assert "httpx" not in face.read_text()
    assert "sqlite3" not in face.read_text()


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module_of)
def test_all_is_what_the_module_offers(path: Path) -> None:
    """``__all__`` names things that exist, and every public class; outside the face every public function too."""
    module = importlib.import_module(module_of(path))
    assert all(hasattr(module, name) for name in module.__all__)
    kinds = ast.ClassDef if module_of(path) == "flockapi" else ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    defined = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds)}
    commands = {"serve", "worker", "run", "batch", "key", "check"} if module_of(path) == "flock.cli" else set()
    assert {name for name in defined if not name.startswith("_")} - commands <= set(module.__all__)

"""Modules import only from lower layers, and never in a cycle."""

import ast
import graphlib
import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.support import ROOT

#: The rank of each folder and top-level module. A module imports from its own folder and from lower ranks.
RANKS = {
    "flock": 0,  # the version
    "flock.errors": 0,
    "flock.extras": 0,
    "flock.fair": 0,
    "flock.formats": 0,
    "flock.jsontype": 0,
    "flock.limits": 0,
    "flock.logs": 0,
    "flock.nearest": 0,
    "flock.renamed": 0,
    "flock.options": 0,
    "flock.pydanticmodel": 0,
    "flock.runs": 0,
    "flock.scopes": 0,
    "flock.client": 1,
    "flock.models": 1,
    "flock.agents": 2,
    "flock.rows": 3,
    "flock.testing": 3,
    "flock.steps": 4,
    "flock.store": 5,
    "flock.engine": 6,
    "flock.temporal": 7,
    "flock.declared": 8,
    "flock.web": 9,
    "flock.protocols": 10,
    "flockapi": 11,
    "flock.command": 12,
    "flock.core": 13,
    "flock.__main__": 13,
}

HTTP = ("flock.web", "flock.protocols", "flockapi", "flock.command", "flock.testing")
PROTOCOLS = (
    "flock.protocols.openai",
    "flock.protocols.openai_responses",
    "flock.protocols.vercel",
    "flock.protocols.agui",
    "flock.protocols.a2a",
)
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
FILES = sorted([*(ROOT / "flock").rglob("*.py"), ROOT / "flockapi.py"])


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, at the top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= whole or {str(node.module)}
    return found & MODULES.keys()


def packages_of(path: Path) -> set[str]:
    """Return the packages that a file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}


def layer_of(module: str) -> str:
    """Return the folder of a module, or the module itself if it is not in a folder."""
    return module if module in RANKS else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_own_and_lower_layers(module: str) -> None:
    own = layer_of(module)
    for imported in imports_of(MODULES[module]):
        layer = layer_of(imported)
        assert RANKS[layer] < RANKS[own] or layer == own or RANKS[own] == RANKS[layer] == 0, imported


def test_there_are_no_import_cycles() -> None:
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", ["flock.core", "flock.errors", "flock.runs", "flockapi"])
def test_public_modules_can_be_imported(module: str) -> None:
    assert importlib.import_module(module)


def test_the_engine_imports_no_web_framework() -> None:
    """Only the layers of HTTP import Starlette or uvicorn, and ``flock.testing``, which serves.

    Only the command line and the progress display of a batch import click.
    """
    for path in FILES:
        roots = packages_of(path)
        if layer_of(module_of(path)) not in HTTP:
            assert not roots & {"starlette", "uvicorn"}
        if module_of(path) != "flock.steps.progress" and layer_of(module_of(path)) != "flock.command":
            assert "click" not in roots
    assert "httpx" not in (ROOT / "flockapi.py").read_text()


def test_the_api_imports_no_engine() -> None:
    """It asks the engine's protocol, so an engine of a program's own is served like ours."""
    assert not imports_of(ROOT / "flockapi.py") & {"flock.engine.embedded", "flock.engine.base", "flock.temporal"}


def test_a_protocol_knows_no_engine_and_no_store() -> None:
    """It asks the engine's protocol, and reads what agents take and return."""
    known = {"flock", "flock.protocols", "flock.web", "flock.runs", "flock.agents", "flock.declared", "flock.errors"}
    for module, path in MODULES.items():
        if layer_of(module) == "flock.protocols":
            assert {layer_of(imported) for imported in imports_of(path)} <= {*known, "flock.jsontype", "flock.fair"}


def test_a_protocol_leaves_runs_to_flock_web_orders() -> None:
    """It accepts, answers and watches none by itself, so that no limit, replay or disconnect is forgotten."""
    for module, path in MODULES.items():
        if layer_of(module) == "flock.protocols":
            used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not used & {"submit", "answer_call", "watch"}, module


def test_a_protocol_is_spoken_without_its_sdk() -> None:
    """The SDKs are for tests. In ``flock.protocols``, ``openai`` and ``mcp`` are names of modules of ours."""
    sdks = {"openai", "mcp", "a2a", "ag_ui", "ai"}
    for path in FILES:
        if layer_of(module_of(path)) in ("flock.web", "flock.protocols", "flockapi"):
            assert not packages_of(path) & sdks, path


def test_the_engine_knows_only_the_port_of_the_store() -> None:
    """And what it needs to know of suspects. Only ``flock.declared`` and the command choose SQLite."""
    used: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        stores = {imported for imported in imports_of(path) if layer_of(imported) == "flock.store"}
        used.setdefault(layer_of(module), set()).update(stores)
    assert used["flock.engine"] == {"flock.store.port", "flock.store.suspects"}
    assert used["flock.temporal"] == {"flock.store.contents", "flock.store.files", "flock.store.suspects"}
    assert {layer for layer, stores in used.items() if "flock.store.store" in stores} == {
        "flock.command",
        "flock.declared",
    }


def test_only_the_store_imports_sqlite3() -> None:
    assert {layer_of(module_of(path)) for path in FILES if "sqlite3" in packages_of(path)} == {"flock.store"}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=module_of(path), marks=pytest.mark.cluster if path.parent.name == "temporal" else ())
        for path in FILES
        if path.name != "__main__.py"
    ],
)
def test_a_function_without_underscore_is_used_elsewhere(path: Path) -> None:
    """``__all__`` is only in modules that offer names of others, or whose names another one offers.

    In others it would only repeat the names without an underscore.
    """
    module, body = importlib.import_module(module_of(path)), ast.parse(path.read_text()).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    listed = getattr(module, "__all__", None)
    if module_of(path) in ("flockapi", "flock.web.pages", "flock.command.cli", *PROTOCOLS):
        functions = set()  # handlers and commands
    if listed is not None:
        assert all(hasattr(module, name) for name in listed)
        assert {name for name in functions | classes if name[0] != "_"} <= set(listed)
    elsewhere = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py"), *FILES]
    text = "".join(other.read_text() for other in elsewhere if other != path)
    unused = {name for name in functions if name[0] != "_" and not re.search(rf"\b{name}\b", text)}
    assert unused == set()


@pytest.mark.parametrize(
    ("names", "limit"),
    [
        (("agui",), 300),
        (("vercel",), 350),
        (("a2a",), 350),
        (("agui", "vercel", "frontends"), 650),  # with what both share
    ],
)
def test_an_adapter_of_a_protocol_stays_small(names: tuple[str, ...], limit: int) -> None:
    """In lines of code, without comments, docstrings and blanks."""
    count = 0
    for name in names:
        text = (ROOT / "flock" / "protocols" / f"{name}.py").read_text()
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        docs = [
            node.body[0]
            for node in ast.walk(ast.parse(text))
            if isinstance(node, documented) and ast.get_docstring(node)
        ]
        of_docs = {number for doc in docs for number in range(doc.lineno, (doc.end_lineno or 0) + 1)}
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        of_code = {
            number
            for token in tokens
            if token.type not in NO_CODE
            for number in range(token.start[0], token.end[0] + 1)
        }
        count += len(of_code - of_docs)
    assert 0 < count <= limit

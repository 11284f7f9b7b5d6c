"""Names in docstrings and comments exist: in this package, in Python, or in a library that it uses."""

import ast
import importlib
import io
import keyword
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

MODULES = sorted([*(ROOT / "flock").rglob("*.py"), ROOT / "flockapi.py"])
#: ``a_name``, ``module.name``, ``Class.method(…)`` and ``--option``.
MARKED = re.compile(r"``(-{0,2}[A-Za-z_][\w.-]*)(\(.*?\))?``")
#: Words of other programs, protocols and files.
FOREIGN = {
    "sysexits.h",
    "opentelemetry-instrument",
    "Host",
    "gpt-4o-2024-08-06",
    "claude-sonnet-4-5-20250929",
    "dspy.ReAct",
}
FOREIGN |= {
    "x-ratelimit-remaining-requests",
    "anthropic-ratelimit-tokens-reset",
    "useChat",
    "DefaultChatTransport",
    "TEMPORAL_CONFIG_FILE",
    "OPENAI_BASE_URL",
}
#: Examples, the beginnings of names, and what belongs to an object of a library.
FOREIGN |= {
    "Pool",
    "temporalio.envconfig",
    "run.",
    "batch.",
    "iter_lines",
    "Request.url",
    "sd_listen_fds",
    "TEMPORAL_TLS",
    "Sec-Fetch-Site",
}


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the docstrings and comments of a module, each with its line."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _names(path: Path) -> Iterator[str]:
    """Yield the names that a module defines or uses, and the words in its texts that a program reads."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if hasattr(node, "body") and _has_docstring(node)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name):
                yield from name.split(".")
            case ast.Constant(value=str(text)) if id(node) not in docstrings:
                yield from re.findall(r"-{0,2}[A-Za-z_][\w-]*", text)


def _within(node: ast.ClassDef) -> Iterator[str]:
    """Yield what a class or its methods define: members, and attributes of instances."""
    for each in ast.walk(node):
        match each:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.Name(id=name):
                yield name
            case ast.Attribute(attr=name):
                yield name
            case ast.Constant(value=str(name)):
                yield name


def _has_docstring(node: Any) -> bool:
    return isinstance(node.body, list) and bool(node.body) and isinstance(node.body[0], ast.Expr)


KNOWN = {name for path in MODULES for name in _names(path)} | {path.stem for path in MODULES}
KNOWN |= {path.name for path in ROOT.rglob("*.*") if ".venv" not in path.parts}
KNOWN |= {*dir(__builtins__), *keyword.kwlist, *sys.stdlib_module_names}


#: Bases that add no member of which a text speaks.
EMPTY = {"Exception", "Generic", "NamedTuple", "Protocol", "msgspec.Struct"}
CLASSES = {
    node.name: ({*_within(node)}, [ast.unparse(base).partition("[")[0] for base in node.bases])
    for path in MODULES
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.ClassDef)
}


def _has(class_name: str, member: str) -> bool:
    """Whether a class has a member, or one of its bases, of which those of libraries have any."""
    members, bases = CLASSES.get(class_name, (set() if class_name in EMPTY else {member}, []))
    return member in members or any(_has(base, member) for base in bases)


def exists(name: str) -> bool:
    """Whether a class here has what is named, or each part is known here, or the whole can be imported."""
    first, _, member = name.partition(".")
    if first in CLASSES and member:
        return _has(first, member.partition(".")[0])
    if name in KNOWN or all(part in KNOWN for part in name.split(".")):
        return True
    module, _, rest = name.partition(".")
    try:
        found: Any = importlib.import_module(module)
        for part in rest.split(".") if rest else ():
            found = (
                getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")
            )
    except (ImportError, AttributeError):
        return False
    return True


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_in_docstrings_and_comments_exist(path: Path) -> None:
    missing = [
        f"{line}: {name}"
        for line, text in _texts(path)
        for name, _ in MARKED.findall(text)
        if not exists(name) and name not in FOREIGN
    ]
    assert missing == []


def test_a_name_that_is_nowhere_is_found() -> None:
    assert not exists("raise_late_" + "cancellation")
    assert not exists("anyio.no_such_name")
    assert not exists("RunContext.no_such_method")
    assert exists("Run.call_ids")
    assert exists("asyncio.timeout")

"""The support agent of docs/support-agent.md, here and in pydantic-ai."""

import ast
import inspect
import os
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from tests.support import EXAMPLES, ROOT
from tests.support.environments import new_environment, pip
from tests.support.pages import blocks_of

PAGE = ROOT / "docs" / "support-agent.md"
OURS, THEIRS = EXAMPLES / "support.py", EXAMPLES / "other" / "support_pydantic_ai.py"
TESTS = re.findall(r"(?m)^def (test_\w+)", OURS.read_text("utf-8"))


def lines_of(code: str) -> int:
    """Return the number of lines without imports and empty ones."""
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
    left_out = {number for node in imports for number in range(node.lineno, (node.end_lineno or 0) + 1)}
    return sum(bool(line.strip()) and number not in left_out for number, line in enumerate(code.splitlines(), 1))


@pytest.mark.parametrize("name", TESTS)
def test_the_tests_of_our_program_pass(name: str, tmp_path: Path) -> None:
    test = runpy.run_path(str(OURS))[name]
    test(*[tmp_path] * len(inspect.signature(test).parameters))


@pytest.mark.slow
def test_the_tests_of_the_other_program_pass(tmp_path: Path) -> None:
    """They are the same, by their names."""
    assert re.findall(r"(?m)^def (test_\w+)", THEIRS.read_text("utf-8")) == TESTS
    python = new_environment(tmp_path / "venv")
    subprocess.run(pip(python, "install", "--quiet", "pydantic-ai-slim==2.68.0", "pytest"), check=True)
    options = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    own = {"PYTEST_ADDOPTS": ""}  # those of our tests need plugins that are not there
    command = [str(python), "-m", "pytest", *options, str(THEIRS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | own)
    assert f"{len(TESTS)} passed" in done.stdout, done.stdout + done.stderr


def test_the_page_shows_both_programs_whole() -> None:
    text = PAGE.read_text("utf-8")
    blocks = [block.text for block in blocks_of(PAGE)]
    for program in (OURS, THEIRS):
        code = program.read_text("utf-8")
        shown = sorted((block for block in blocks if block in code), key=code.index)
        assert "".join("".join(shown).split()) == "".join(code.split())
    parts = re.findall(r"(?ms)^## (.*?)\n(.*?)(?=^## |\Z)", text)
    found = [(title, [lines_of(code) for code in re.findall(r"(?ms)^```py\n(.*?)^```", part)]) for title, part in parts]
    table = [f"| {title} | {' | '.join(map(str, [0] * (2 - len(lines)) + lines))} |" for title, lines in found]
    totals = [lines_of(program.read_text("utf-8")) for program in (OURS, THEIRS)]
    assert "\n".join([*table, f"| all | {totals[0]} | {totals[1]} |\n"]) in text

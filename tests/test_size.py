"""The code of the package has a budget for each folder: a light framework stays light.

Counted are the lines of Python in `flock/` and of `flockapi.py` that are neither blank nor comment nor docstring.
`python -m tests.test_size` prints the table.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent

# The most lines of code of each folder, and of `flockapi.py` and the modules directly in `flock/`.
BUDGETS = {
    "flockapi.py": 650,
    "flock": 2441,
    "flock/agents": 2888,
    "flock/command": 2465,
    "flock/engine": 3108,
    "flock/models": 2812,
    "flock/protocols": 2361,
    "flock/rows": 1291,
    "flock/runs": 1499,
    "flock/steps": 3618,
    "flock/store": 3593,
    "flock/temporal": 5372,
    "flock/web": 2898,
}
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Return how many lines of the module *text* are code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines.difference_update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def lines_by_folder() -> Counter[str]:
    counted: Counter[str] = Counter()
    for path in [ROOT / "flockapi.py", *(ROOT / "flock").rglob("*.py")]:
        parent = path.relative_to(ROOT).parent
        folder = "flockapi.py" if parent == Path() else "/".join(parent.parts[:2])
        counted[folder] += code_lines(path.read_text())
    return counted


def test_only_lines_of_code_are_counted() -> None:
    """Comments, blank lines and docstrings are free, also those of several lines."""
    docstrings = '"""Doc\n\nstring."""\n\n# why\ndef f():\n    """D."""\n    return 1  # counted\n'
    assert code_lines(docstrings) == 2
    assert code_lines('x = """a\n\nb"""\n\ny = (\n    1\n)\n') == 6


def test_each_folder_is_within_its_budget() -> None:
    """What no longer fits makes something else unnecessary, or is left out."""
    counted = lines_by_folder()
    assert counted.keys() <= BUDGETS.keys(), "a new folder needs a budget"
    over = {folder: f"{counted[folder]} of {budget}" for folder, budget in BUDGETS.items() if counted[folder] > budget}
    assert not over


if __name__ == "__main__":
    counted = lines_by_folder()
    for folder, budget in BUDGETS.items():
        print(f"{folder:16} {counted[folder]:6} of {budget:6}")
    print(f"{'all':16} {counted.total():6} of {sum(BUDGETS.values()):6}")

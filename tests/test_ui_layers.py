"""The page's scripts import only from lower layers (main, views, library), and never in a cycle."""

import graphlib
import re
from pathlib import Path

import pytest

from flock.web.ui import COMMENT, IMPORT, KEPT, bundled, ui_files
from tests.support import ROOT

FOLDER = ROOT / "flock" / "static" / "ui"
SCRIPTS = {path.name: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.js"))}
ENTRY = "main.js"
VIEWS = set(re.findall(r'import\("\./([\w.]+)"\)', SCRIPTS[ENTRY]))


def imports_of(script: str) -> set[str]:
    """Return the static imports of a script, in any notation."""
    return set(re.findall(r"""^(?:import|export)\b[^;]*?["']\./([\w.]+)["']""", SCRIPTS[script], re.MULTILINE))


def rank_of(script: str) -> int:
    return 2 if script == ENTRY else 1 if script in VIEWS else 0


def test_the_entry_loads_every_view() -> None:
    assert {name for name, text in SCRIPTS.items() if "export async function show(" in text} == VIEWS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_library_modules_only(script: str) -> None:
    """No script imports a view or the entry, except that the entry loads a view when it is shown."""
    assert {rank_of(imported) for imported in imports_of(script)} <= {0}
    assert script == ENTRY or "import(" not in SCRIPTS[script]


def test_there_are_no_import_cycles() -> None:
    graph = {script: imports_of(script) for script in SCRIPTS}
    assert list(graphlib.TopologicalSorter(graph).static_order())
    assert set().union(*graph.values()) | VIEWS | {ENTRY} == SCRIPTS.keys(), "a script is never imported"


def test_the_scripts_can_be_bundled() -> None:
    """Imports keep their names, and no name is declared twice in the bundle."""
    for script, text in SCRIPTS.items():
        assert {found["module"].decode() for found in re.finditer(IMPORT, text.encode())} == imports_of(script)
        for found in re.finditer(IMPORT, text.encode()):
            names = [name.strip() for name in found["names"].decode().split(",") if name.strip()]
            assert all(re.search(rf"^export .*\b{name}\b", SCRIPTS[found["module"].decode()], re.M) for name in names)
    scripts = {name: text.decode() for name, text in bundled({n: t.encode() for n, t in SCRIPTS.items()}).items()}
    for name, script in scripts.items():
        declared = re.findall(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", script, re.MULTILINE)
        imported = re.findall(r"\w+", " ".join(re.findall(r"^import \{(.*)\} from", script, re.MULTILINE)))
        names = declared + imported
        assert sorted(names) == sorted(set(names)), name
    assert not re.search(IMPORT, scripts[ENTRY].encode())


def damage(script: str) -> str | None:
    """Return what of a script would be damaged when its spaces are left out; see ``KEPT``."""
    text = COMMENT.sub(rb"\1", script.encode())
    for found in re.finditer(KEPT, text):
        kept, before, depth = found[1], text[: found.start()].rstrip(), 0
        for brace in re.findall(rb"\$\{|[{}]", kept) if kept[:1] == b"`" else ():
            if depth or brace == b"${":
                depth += -1 if brace == b"}" else 1
        if depth:
            return "a template in a template"
        if kept[:1] == b"/" and re.search(rb"[\w)\]}]$", before) and not before.endswith(b"return"):
            return "a division without a space after it"
    code = re.sub(KEPT, b"0", text).decode()
    if re.search(r"\b(for|while) \(([^()]|\([^()]*\))*\);|,\s*,|\[\s*,\s*\]", code):
        return "an empty statement or element"
    if re.search(r"(?<![\w)\]] )/ ", code):
        return "a regular expression that begins with a space, or a division without a space before it"
    return "a quotation mark or a slash" if re.search(r"""["'`\\]|/(?! )""", code) else None


@pytest.mark.parametrize("script", SCRIPTS)
def test_space_can_be_left_out(script: str) -> None:
    """All strings, templates and regular expressions are found. That statements end with semicolons, browsers show."""
    assert damage(SCRIPTS[script]) is None


@pytest.mark.parametrize(
    "script",
    [
        "const a = `b ${c ? `d  e` : ``} f`;",
        "const a = `b ${c({ d }) + `e  f`} g`;",
        "const a = b/c;",
        "const a = b/c + d/e;",
        "const a = b /c;",
        "const a = (b)/ c;",
        "const a = / b/;",
        "a.replace(/ +b/g, c);",
        "while (a(b));",
        "const a = [b, , c];",
    ],
)
def test_what_cannot_be_left_out_is_found(script: str) -> None:
    assert damage(script)


def test_a_view_loads_few_scripts() -> None:
    """Modules that the same views need are one script. Each script is loaded at most once."""
    served = {name: file.plain.decode() for name, file in ui_files("").items() if name.endswith(".js")}
    loaded = {name: set(re.findall(r'from "\./([\w.]+)"', text)) for name, text in served.items()}
    assert loaded[ENTRY] == set()
    assert {name for name in served if SCRIPTS.get(name) and name in VIEWS} == VIEWS
    assert all(len(loaded[view]) <= 4 for view in VIEWS), loaded
    assert len(served) < len(SCRIPTS) / 2


def test_served_scripts_import_only_served_scripts() -> None:
    served = {name: file.plain.decode() for name, file in ui_files("").items() if Path(name).suffix == ".js"}
    for text in served.values():
        assert set(re.findall(r'from "\./([\w.]+)"', text)) <= served.keys()

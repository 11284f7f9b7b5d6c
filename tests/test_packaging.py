"""The package as users install it: wheel, sdist and editable, each in its own new environment."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import httpx
import pytest

import flock.agents.agent
import flock.core
import flock.errors
import flock.runs
import flock.testing
import flockapi
from flock.extras import pip_install
from tests.support import EXAMPLES, ROOT
from tests.support.environments import new_environment, pip
from tests.support.servers import NO_COVERAGE, running

pytestmark = pytest.mark.timeout(600)

#: The maximum number of packages that an installation adds, besides this one.
MAX_PACKAGES = 14
#: The maximum import time, as a multiple of that of the libraries alone. It was 1.15, with 0.12 s for the libraries.
MAX_IMPORT_RATIO = 1.4


def run(*command: str | Path, cwd: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | NO_COVERAGE
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # An editable install, below, isolates its build.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(
    scope="module", params=["wheel", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("sdist", "editable"))]
)
def python(request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new environment with the package installed."""
    folder = tmp_path_factory.mktemp(request.param)
    python = new_environment(folder)
    sources: dict[str, list[str | Path]] = {
        "wheel": [next(built.glob("*.whl"))],
        "sdist": [next(built.glob("*.tar.gz"))],
        "editable": ["-e", ROOT],
    }
    run(*pip(python, "install", "--quiet", *sources[request.param]))
    return python


def test_the_installed_package_serves_the_contract_and_the_docs(python: Path, tmp_path: Path) -> None:
    """Start it outside a checkout, with only the installed files."""
    (tmp_path / "script.py").write_text((EXAMPLES / "text_analyzer.py").read_text())
    command = [str(python.parent / "flockapi"), "serve", str(tmp_path / "script.py"), "--port", "0", "--ui"]
    with running(*command, "--server-name", "Installed", PYTHONPATH="", PYTHONSAFEPATH="1") as server:
        served = httpx.get(f"{server.url}/openapi.yaml")
        expected = (ROOT / "openapi.yaml").read_text("utf-8").replace("title: Flock Server", 'title: "Installed"')
        assert served.text == expected
        assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "Installed"
        for path in ("/docs", "/static/docs.js", "/static/vendor/redoc/redoc.standalone.js", "/ui", "/ui/main.js"):
            assert httpx.get(server.url + path).status_code == 200


def test_the_package_installs_few_others(python: Path) -> None:
    listed = json.loads(run(*pip(python, "list", "--format", "json")))
    names = {package["name"] for package in listed} - {"flockapi"}
    assert len(names) <= MAX_PACKAGES, sorted(names)


@pytest.mark.alone
def test_the_package_imports_fast_and_without_the_extras(python: Path, tmp_path: Path) -> None:
    """Compare with its libraries, and take the best of five alternating runs because the machine may be busy."""
    libraries = "anyio, asyncio, httpx, msgspec, sqlite3, starlette.applications, starlette.middleware.cors"
    code = "import json, sys, time, {}; print(json.dumps([time.process_time(), sorted(sys.modules)]))"
    outputs = [
        [json.loads(run(python, "-c", code.format(names), cwd=tmp_path)) for names in ("flockapi", libraries)]
        for _ in range(5)
    ]
    ours_s, theirs_s = (min(seconds for seconds, _ in runs) for runs in zip(*outputs, strict=True))
    assert ours_s < MAX_IMPORT_RATIO * theirs_s, f"{ours_s:.3f} s, and the libraries alone {theirs_s:.3f} s"
    extras = {"xllamacpp", "litellm", "temporalio", "prometheus_client", "yaml", "uvicorn", "pydantic", "opentelemetry"}
    assert not extras & set(outputs[0][0][1])


def test_the_command_and_the_type_marker_are_installed(python: Path) -> None:
    assert "flockapi, version" in run(python.parent / "flockapi", "--version")
    assert run(
        python, "-c", "import flock, pathlib; print((pathlib.Path(flock.__file__).parent / 'py.typed').exists())"
    )


def test_a_user_program_passes_the_type_checkers(python: Path, tmp_path: Path) -> None:
    """Every public name passes ``mypy --strict`` and ``pyright``, and both find misuse of either package."""
    program = (ROOT / "tests" / "typed_user.py").read_text("utf-8")
    named = {
        alias.name for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    for module in (flock.agents.agent, flock.core, flock.errors, flock.runs, flock.testing, flockapi):
        kinds = (type, types.FunctionType)
        defined = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        public = {name for name in defined if name[0] != "_" and isinstance(getattr(module, name), kinds)}
        assert set(getattr(module, "__all__", public)) <= named
    mistaken = "import flock.core, flockapi\nflockapi.create_app(flock.core.Flock(1))\nflockapi.create_app(doc=1)\n"
    mistaken += "flockapi.create_app(flock.core.Flock(), doc=1)\n"
    for name, text in (("typed.py", program), ("mistaken.py", mistaken)):
        (tmp_path / name).write_text(text)
    for tool, option in (("mypy", "--python-executable"), ("pyright", "--pythonpath")):
        command = [sys.executable, "-m", tool, option, str(python), *(["--strict"] if tool == "mypy" else [])]
        command += ["typed.py", "mistaken.py"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 1
        errors = set(re.findall(r"(\w+\.py:\d+):.*error", found.stdout))
        assert errors == {f"mistaken.py:{line}" for line in (2, 3, 4)}, found.stdout


def install_commands() -> set[str]:
    """Return every pip command in the messages of the source, as code that prints it."""
    found = set()
    for path in [*(ROOT / "flock").rglob("*.py"), ROOT / "flockapi.py"]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="pip_install"), args=[ast.Constant(value=package)]):
                    found.add(f"pip_install({package!r})")
                case ast.Constant(value=str(text)) if "pip install" in text and path.name != "extras.py":
                    found.add(repr(text))
    return found


def test_every_install_command_in_a_message_works_in_an_editable_install(tmp_path: Path) -> None:
    """pip finds each package. No command names this distribution, which may not be on an index."""
    python = new_environment(tmp_path / "editable", with_ours=True)
    run(*pip(python, "install", "--quiet", "--no-deps", "-e", ROOT))
    commands = install_commands()
    assert len(commands) == 7, commands
    code = f"from flock.extras import pip_install; print({', '.join(sorted(commands))}, sep='\\n')"
    wanted, options = [], set[str]()
    for line in run(python, "-c", code, cwd=tmp_path).splitlines():
        assert "flockapi" not in line
        program, command, *arguments = shlex.split(line)
        assert (program, command) == ("pip", "install"), line
        options |= set(arguments[:-1])
        wanted.append(arguments[-1])
    found = pip(python, "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", *wanted)
    packages = {package["metadata"]["name"].replace("_", "-") for package in json.loads(run(*found))["install"]}
    assert packages == {re.split("[<>=]", name)[0] for name in wanted}
    assert options <= {"--no-deps"}
    assert pip_install("prometheus-client") in (ROOT / "openapi.yaml").read_text("utf-8")


def test_the_archives_contain_the_right_files(built: Path) -> None:
    wheel = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert {
        "flockapi.py",
        "flock/openapi.yaml",
        "flock/py.typed",
        "flockapi-stubs/__init__.pyi",
        "flock/static/openapi.json",
    } <= wheel
    assert "flock/static/vendor/SHA256SUMS" in wheel
    assert {f"flock/static/ui/{path.name}" for path in (ROOT / "flock/static/ui").iterdir()} <= wheel
    assert not [name for name in wheel if name.startswith(("tests", "bench", "examples", "docs"))]
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name for name in names if name.startswith("docs/")} == {
        f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")
    }, "no screenshots"
    assert {"openapi.yaml", "flockapi.py", "README.md", "LICENSE", "tests/test_api.py"} <= names

"""The README and the printed page are true: their lines are run as they stand."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from flock.cli import main
from tests.fakes import EXAMPLES, ROOT, Server, running

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
BASH = [code.strip() for language, code in BLOCKS if language == "bash"]
CURL = [code for code in BASH if code.startswith("curl")]
JSON = [json.loads(code) for language, code in BLOCKS if language == "json"]
(EVENTS,) = (code for language, code in BLOCKS if language == "text")
SET_UP_AND_SERVE, SET_UP_AND_TEST = (code for code in BASH if code.startswith("python3 -m venv"))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone of what is committed, in a new folder."""
    folder = tmp_path_factory.mktemp("clone") / "flockapi"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    return folder


@pytest.fixture(scope="module")
def served(clone: Path) -> Iterator[Server]:
    """The first line of the README, in the fresh clone, but for the port, which may be taken here."""
    with running("bash", "-c", f"cd {shlex.quote(str(clone))} && {SET_UP_AND_SERVE} --port 0", timeout_s=300) as server:
        yield server


def curl_text(server: Server, command: str, **replaced: str) -> str:
    command = command.replace("http://127.0.0.1:8344", server.url).replace("curl", "curl -sS", 1)
    for name, value in replaced.items():
        command = command.replace(f"{{{name}}}", value)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout


def curl(server: Server, command: str, **replaced: str) -> Any:
    return json.loads(curl_text(server, command, **replaced))


def shape(result: Any) -> Any:
    return {name: [str] if isinstance(value, list) else type(value) for name, value in result.items()}


@pytest.mark.timeout(600)
def test_the_lines_of_the_readme_work_on_the_real_model(served: Server) -> None:
    """End to end: a fresh clone, its own environment, uvicorn, curl, and the real model."""
    synchronous, asynchronous, look, follow, stop, bad = CURL
    expected_run, expected_start, expected_conflict, expected_problem = JSON

    run = curl(served, synchronous)
    assert run["status"] == expected_run["status"] == "completed"
    assert run.keys() == expected_run.keys()
    # Another processor may add up in another order, and the model then choose another word.
    assert shape(run["result"]) == shape(expected_run["result"])

    started = curl(served, asynchronous)
    assert (started["status"], started["result"]) == ("starting", None)
    assert started.keys() == expected_start.keys()
    followed = curl_text(served, follow, run_id=started["run_id"])
    assert re.findall("(?m)^(id|event): (.*)", followed) == re.findall("(?m)^(id|event): (.*)", EVENTS)
    looked = curl(served, look, run_id=started["run_id"])
    assert looked["status"] == "completed"
    assert shape(looked["result"]) == shape(run["result"])

    conflict = curl(served, stop, run_id=started["run_id"])
    run_id = expected_conflict["instance"].split("/")[2]
    expected = json.loads(json.dumps(expected_conflict).replace(run_id, started["run_id"]))
    assert {**conflict, "request_id": ""} == {**expected, "request_id": ""}

    problem = curl(served, bad)
    assert problem.keys() == expected_problem.keys()
    assert {**problem, "request_id": ""} == {**expected_problem, "request_id": ""}

    for path in ("/docs", "/redoc"):
        assert httpx.get(served.url + path).status_code == 200


def test_the_lines_of_the_printed_page_work(served: Server) -> None:
    """Its three curl lines, and what it says of the answers."""
    first = """curl -X POST http://127.0.0.1:8344/run/flock -H "Content-Type: application/json" -d '{
  "agent_name": "text_analyzer",
  "inputs": {
    "text": "This is great!"
  }
}'"""
    run = curl(served, first)
    assert run["status"] == "completed"
    assert isinstance(run["result"]["sentiment"], str)
    assert all(isinstance(keyword, str) for keyword in run["result"]["keywords"])
    assert run["started_at"] < run["completed_at"]
    assert run["error"] is None
    assert httpx.get(f"{served.url}/agents").json() == {"agents": [{"name": "text_analyzer", "description": ""}]}


def test_the_example_is_the_script_of_the_readme() -> None:
    assert (EXAMPLES / "text_analyzer.py").read_text("utf-8") in PYTHON


def trailing_comments(code: str) -> list[str]:
    lines = code.splitlines()
    return [line[2:] for i, line in enumerate(lines) if all(later.startswith("# ") for later in lines[i:])]


def test_the_python_of_the_readme_runs_and_prints_what_it_says() -> None:
    """All blocks in one namespace, as a reader would paste them; a comment behind or below a print is its output."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    for code in PYTHON:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, "README.md", "exec"), namespace)
        expected = re.findall(r"print\(.*\)(?:  |\n)# (.*)", code) or trailing_comments(code)
        assert output.getvalue().splitlines() == expected


def test_the_command_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (code for code in BASH if code.startswith("flockapi run"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0
    assert json.loads(result.output).keys() == {"sentiment", "keywords"}


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "README.md" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert SET_UP_AND_TEST.endswith(".venv/bin/pytest")


def test_the_tables_name_what_there_is() -> None:
    from flock.llm import PROVIDERS
    from flockapi import PROBLEMS, ROUTES

    for provider in PROVIDERS:
        assert f"`{provider}/" in README
    for route in ROUTES:
        path = getattr(route, "path", "")
        assert path == "/static" or path in README
    for status, _ in PROBLEMS.values():
        assert status == 500 or f"| {status} " in README


def test_the_server_of_the_readme_asks_for_its_keys() -> None:
    (command,) = (code for code in BASH if code.startswith("FLOCK_API_KEYS="))
    command = command.replace("flockapi ", f"{shlex.quote(sys.executable)} -m flock.cli ")
    with running("bash", "-c", f"cd {shlex.quote(str(ROOT))} && {command} --port 0 --store :memory:") as server:
        url = re.sub(r"//.*:", "//127.0.0.1:", server.url)
        assert httpx.get(f"{url}/agents").status_code == 401
    assert not any("fk_" in line for line in server.lines)

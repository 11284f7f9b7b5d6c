"""The README and the printed page are true: their lines are run as they stand."""

import contextlib
import csv
import io
import json
import os
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

from flock.command.cli import main
from flock.web.auth import new_key
from tests.support import EXAMPLES, ROOT
from tests.support.servers import Server, flockapi_command, running

README = (ROOT / "README.md").read_text("utf-8")
(ON_BATCHES,) = re.findall(r"(?s)\n## Batches\n.*?(?=\n## )", README)


def blocks_of(text: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)


BLOCKS = blocks_of(README.replace(ON_BATCHES, ""))
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
    with running("bash", "-c", f"cd {shlex.quote(str(clone))} && {SET_UP_AND_SERVE} --port 0") as server:
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


ANALYZER = """
import anyio
from typing import TypedDict
from flock.core import Flock

flock = Flock()

class Analysis(TypedDict):
    sentiment: str
    keywords: list[str]

@flock.agent
async def text_analyzer(text: str) -> Analysis:
    return {"sentiment": "positive", "keywords": text.split()[:2]}

@flock.agent
async def nap(text: str) -> None:
    await anyio.sleep(600)
"""


def test_the_lines_on_batches_work(tmp_path: Path) -> None:
    """In their order; a function stands in for the model, and a batch that goes on for what is done to one."""
    blocks = [(language, code.strip()) for language, code in blocks_of(ON_BATCHES)]
    commands = [code for language, code in blocks if language == "bash"]
    start, follow, wait, download, packed, mapped, checked, cancel, retry, delete = commands
    (events,) = (code for language, code in blocks if language == "text")
    (table,) = (code for language, code in blocks if language == "csv")
    expected_start, expected_end = (json.loads(code) for language, code in blocks if language == "json")
    (tmp_path / "served.py").write_text(ANALYZER)
    with running(
        *flockapi_command("serve", str(tmp_path / "served.py"), "--port", "0", "--store", ":memory:")
    ) as server:
        started = curl(server, start.replace("@examples", f"@{EXAMPLES}"))
        batch = {"batch_id": started["batch_id"]}
        assert started.keys() == expected_start.keys()
        assert (started["status"], started["total_items"]) == ("starting", expected_start["total_items"])
        followed = curl_text(server, follow, **batch)
        assert re.findall("(?m)^(id|event): (.*)", followed)[-2:] == re.findall("(?m)^(id|event): (.*)", events)[-2:]
        data, expected = (json.loads(re.findall("(?m)^data: (.*)", text)[-1]) for text in (followed, events))
        assert data.keys() == expected.keys()
        ended = curl(server, wait, **batch)
        assert ended.keys() == expected_end.keys()
        assert (ended["status"], ended["completed_items"]) == ("completed", expected_end["completed_items"])
        curl_text(server, download.replace("results.csv", str(tmp_path / "results.csv")), **batch)
        with (tmp_path / "results.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) == 1 + ended["total_items"]
        for row, expected_row in zip(rows, csv.reader(io.StringIO(table)), strict=False):
            assert (row[0], row[3:]) == (expected_row[0], expected_row[3:])
        assert curl(server, packed)["total_items"] == 2
        mapped_id = curl(server, mapped)["batch_id"]
        assert curl(server, wait, batch_id=mapped_id)["failed_items"] == 1
        assert curl(server, checked)["rows"] == [{"line": 2, "inputs": {"text": "This is great!"}}]
        nap = {"agent_name": "nap", "batch_inputs": [{"text": "a"}]}
        napping = {"batch_id": httpx.post(f"{server.url}/run/batch", json=nap).json()["batch_id"]}
        assert curl(server, cancel, **napping)["status"] == "cancelled"
        assert curl(server, retry, **napping)["attempt"] == 2
        assert curl_text(server, delete, batch_id=mapped_id) == ""
        assert curl(server, wait, batch_id=mapped_id)["status"] == 404


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


def test_the_check_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (code for code in BASH if code.startswith("flockapi check"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert (result.exit_code, result.output) == (0, "text_analyzer: nothing is missing.\n")


def test_the_batch_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (command,) = (code for code in BASH if code.startswith("flockapi batch"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = command.replace("results.csv", str(tmp_path / "results.csv"))
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert (result.exit_code, result.stdout) == (0, ""), result.output
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 20
    assert list(rows[0]) == ["text", "sentiment", "keywords", "status", "error"]
    assert os.listdir(tmp_path) == ["results.csv"]


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "README.md" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert SET_UP_AND_TEST.endswith(".venv/bin/pytest")


def test_the_tables_name_what_there_is() -> None:
    from flock.agents.llm import PROVIDERS
    from flock.web.problems import PROBLEMS
    from flockapi import ROUTES, UploadQuery

    for provider in PROVIDERS:
        assert f"`{provider}/" in README
    for route in ROUTES:
        path = getattr(route, "path", "")
        assert path == "/static" or path in README
    for status, _ in PROBLEMS.values():
        assert status == 500 or f"| {status} " in README
    for option in UploadQuery.__struct_fields__[1:]:
        assert f"| `{option}` |" in ON_BATCHES


def test_the_server_of_the_readme_asks_for_its_keys() -> None:
    (command,) = (code for code in BASH if "--host 0.0.0.0" in code)
    command = command.replace("flockapi ", f"{shlex.quote(sys.executable)} -m flock ")
    with running("bash", "-c", f"cd {shlex.quote(str(ROOT))} && {command} --port 0 --store :memory:") as server:
        url = re.sub(r"//.*:", "//127.0.0.1:", server.url)
        assert httpx.get(f"{url}/agents").status_code == 401
    assert not any("fk_" in line for line in server.lines)


def test_the_server_of_the_readme_answers_behind_its_nginx() -> None:
    """The client sends what the printed nginx would: the headers of its block, and the path without its location."""
    (nginx,) = (code for language, code in BLOCKS if language == "nginx")
    (command,) = (code for code in BASH if "--allowed-host" in code)
    (prefix,) = re.findall(r"location (\S+)/ \{", nginx)
    assert f"--root-path {prefix} " in command
    assert re.search(r"proxy_pass http://127.0.0.1:8344/;", nginx), "the slash cuts the path off"
    known = {
        "$http_host": "agents.example",
        "$proxy_add_x_forwarded_for": "203.0.113.7",
        "$scheme": "https",
    }
    headers = {name: known[value] for name, value in re.findall(r"proxy_set_header (\S+) (\S+);", nginx)}
    key = new_key()
    command = command.replace("$(flockapi key)", key)
    command = command.replace("flockapi ", f"{shlex.quote(sys.executable)} -m flock ")
    with running("bash", "-c", f"cd {shlex.quote(str(ROOT))} && {command} --port 0 --store :memory:") as server:
        body = {"agent_name": "greet", "inputs": {"name": "Ann"}, "async_run": True}
        assert httpx.post(f"{server.url}/run/flock", json=body, headers=headers).status_code == 401
        headers["X-API-Key"] = key
        accepted = httpx.post(f"{server.url}/run/flock", json=body, headers=headers)
        assert accepted.headers["Location"].startswith(f"{prefix}/run/")
        server.wait_for_line("203.0.113.7")

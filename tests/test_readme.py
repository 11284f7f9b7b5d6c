"""The README and the first user's page are true: their blocks are executed, on the real model."""

import csv
import http.server
import io
import json
import marshal
import re
import subprocess
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import EXAMPLES, ROOT
from tests.support.pages import Reader, blocks_of, check_serves_only_ann, printed_by, shown_output

README = ROOT / "README.md"
BLOCKS = blocks_of(README)
PYTHON = [block.text for block in BLOCKS if block.language == "python"]
_, TOOLS, WORKFLOW, _, FASTAPI = PYTHON
(TEST_COMMAND,) = (block for block in BLOCKS if block.text.endswith(".venv/bin/pytest\n"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A fresh clone of what is committed. Its table has four rows, since the model takes long for 20."""
    folder = tmp_path / "flockapi"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    table = folder / "examples" / "texts.csv"
    rows = list(csv.reader(io.StringIO(table.read_text("utf-8"))))
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows[:5])
    return folder


@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_and_of_the_first_users_page_work(clone: Path) -> None:
    """In a fresh clone: its own environment, its own server, curl, and the real model."""
    with Reader(clone) as reader:
        reader.follow([block for block in BLOCKS if block is not TEST_COMMAND])
        assert reader.server is not None
        for path in ("/docs", "/redoc"):
            assert httpx.get(reader.server.url + path).status_code == 200
        _follow_the_first_users_page(reader)


def _follow_the_first_users_page(reader: Reader) -> None:
    """Run its three curl lines, and check what it says about the responses."""
    run = json.loads(
        reader.run("""curl -X POST http://127.0.0.1:8344/run/flock -H "Content-Type: application/json" -d '{
  "agent_name": "text_analyzer",
  "inputs": {
    "text": "This is great!"
  }
}'""")
    )
    assert run["status"] == "completed"
    assert isinstance(run["result"]["sentiment"], str)
    assert all(isinstance(keyword, str) for keyword in run["result"]["keywords"])
    assert run["started_at"] < run["completed_at"]
    assert run["error"] is None
    started = json.loads(
        reader.run("""curl -X POST http://127.0.0.1:8344/run/flock -H "Content-Type: application/json" -d '{
  "agent_name": "text_analyzer",
  "inputs": {
    "text": "This will run in the background."
  },
  "async_run": true
}'""")
    )
    assert (started["status"], started["result"]) == ("starting", None)
    assert json.loads(reader.run("curl http://127.0.0.1:8344/run/{run_id}"))["run_id"] == started["run_id"]
    agents = json.loads(reader.run("curl http://127.0.0.1:8344/agents"))
    assert agents == {"agents": [{"name": "text_analyzer", "description": ""}]}


def test_the_example_is_the_script_of_the_first_users_page() -> None:
    """The page is not part of the repository; its script has these lines."""
    script = (EXAMPLES / "text_analyzer.py").read_text("utf-8")
    for line in (
        'flock = Flock(name="My API Flock", model="openai/gpt-4o")',
        'output="sentiment: str, keywords: list[str]"',
        'server_name="My Flock Service API" # Optional title for docs',
    ):
        assert line in script


@pytest.mark.parametrize("code", PYTHON, ids=["agent", "tools", "workflow", "streaming", "fastapi"])
def test_a_python_block_stands_alone_and_prints_what_it_shows(code: str) -> None:
    printed, _ = printed_by(code, README)
    assert printed == shown_output(code)


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The requests to a server that answers for all providers. With tools it calls one, and then repeats its result."""
    requests: list[Any] = []
    answers = {"llama3.2": {"urgency": "high", "topic": "till"}, "gpt-4o": {"reply": "A technician calls you now."}}
    refund = {"name": "refund", "arguments": '{"order": "A7", "euros": 40}'}

    def answer(request: Any) -> dict[str, Any]:
        last = request["messages"][-1]
        if last["role"] == "tool":
            return {"content": json.dumps({"reply": last["content"]})}
        if "tools" in request:
            return {"content": None, "tool_calls": [{"id": "call_1", "type": "function", "function": refund}]}
        return {"content": json.dumps(answers[request["model"]])}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            message = {"role": "assistant", **answer(request)}
            body = json.dumps({"choices": [{"message": message}], "usage": {}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name in ("OPENAI", "OLLAMA"):
            monkeypatch.setenv(f"{name}_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        yield requests
        server.shutdown()
        thread.join()


def test_the_small_model_sorts_and_the_large_one_answers(provider: list[Any]) -> None:
    printed, _ = printed_by(WORKFLOW, README, "__main__")
    assert printed == ["{'result': 'A technician calls you now. Your ticket is till-1.'}"]
    assert [request["model"] for request in provider] == ["llama3.2", "gpt-4o"]


@pytest.mark.parametrize(
    ("typed", "reply"), [("yes", "40 € paid back for A7"), ("no", "A person denied this call.")], ids=["yes", "no"]
)
def test_a_person_decides_about_the_call_of_a_tool(
    typed: str, reply: str, provider: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", {"May clerk call refund?": typed}.__getitem__)
    printed, _ = printed_by(TOOLS, README, "__main__")
    assert printed == [str({"reply": reply})]
    assert [tool["function"]["name"] for tool in provider[0]["tools"]] == ["status", "refund"]


@pytest.mark.anyio
async def test_the_fastapi_app_serves_its_user_and_no_other() -> None:
    _, names = printed_by(FASTAPI, README)
    await check_serves_only_ann(names["ai"], names["app"])


def test_ci_runs_the_test_command_of_the_readme() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    (pattern,) = re.findall(r"grep -- '(.*)' README.md", ci)
    assert [line for line in README.read_text("utf-8").splitlines() if re.search(pattern, line)] == [
        TEST_COMMAND.text.strip()
    ]


def test_the_readme_has_the_length_of_a_readme() -> None:
    assert len(README.read_text("utf-8").splitlines()) < 250


def test_every_block_has_a_language_that_a_test_executes() -> None:
    """A typing mistake in a fence would take its block out of the tests."""
    assert {block.language for block in BLOCKS} == {"bash", "json", "python", "csv"}


def test_the_packages_and_their_size_are_those_of_the_readme() -> None:
    """The files of all required packages, as they take space on a disk, with their bytecode."""
    claim = re.search(r"httpx and SQLite: (\d+) packages, (\d+) MB with their bytecode", README.read_text())
    assert claim is not None
    needed, names = {"flockapi"}, ["flockapi"]
    for name in names:
        for each in map(Requirement, metadata.requires(name) or ()):
            if (each.marker is None or each.marker.evaluate()) and canonicalize_name(each.name) not in needed:
                needed.add(canonicalize_name(each.name))
                names.append(each.name)
    assert len(needed - {"flockapi"}) == int(claim[1]), sorted(needed)
    files = [ROOT / "flockapi.py", *(ROOT / "flock").rglob("*")]
    files += [Path(str(file.locate())) for name in names[1:] for file in metadata.files(name) or ()]
    sizes = [file.stat().st_size for file in files if file.is_file() and file.suffix != ".pyc"]
    for file in files:
        if file.suffix == ".py" and file.is_file():
            sizes.append(len(marshal.dumps(compile(file.read_bytes(), str(file), "exec", dont_inherit=True))))
    blocks = sum(-(-size // 4096) * 4096 for size in sizes)
    assert blocks / 2**20 == pytest.approx(int(claim[2]), rel=0.1)

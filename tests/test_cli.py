"""The command line and our own server, each in its own process."""

import contextlib
import json
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import pytest
from click.testing import CliRunner

from flock import __version__
from flock.command.cli import main, serve
from flock.command.server import ServerSettings
from flock.command.target import load_flock
from flock.core import Flock
from flock.runs import Principal
from flock.runs.text import for_terminal
from flock.web.auth import KeyRing, configured_keys
from flock.web.options import PROTOCOL_MODULES
from tests.support import EXAMPLES, ROOT
from tests.support.servers import flockapi_command, running

FLOCK_FILE = """
from dataclasses import dataclass
from neighbour import GREETING
from flock.core import Flock

flock = Flock("from a file")

@dataclass
class Person:
    name: str
    age: "int"

@flock.agent
def greet(person: Person, loud: bool = False) -> str:
    text = f"{GREETING} {person.name}, {person.age}"
    return text.upper() if loud else text

@flock.agent
def fail(text: str) -> str:
    raise ValueError(text)
"""


@pytest.fixture
def flock_file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text('GREETING = "Hello"\n')
    path = tmp_path / "greeter.py"
    path.write_text(FLOCK_FILE)
    return path


@pytest.fixture(autouse=True)
def _restore_modules_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("greeter", "neighbour", "many", "none", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def invoke(*arguments: str, **env: str) -> Any:
    return CliRunner().invoke(main, arguments, env=env)


# Targets


def test_a_target_is_a_file(flock_file: Path) -> None:
    assert load_flock(str(flock_file)).name == "from a file"
    assert load_flock(f"{flock_file}:flock").name == "from a file"


def test_a_target_is_a_module(flock_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(flock_file.parent)
    assert load_flock("greeter").name == "from a file"
    assert load_flock("greeter:flock").name == "from a file"


def test_the_name_may_be_omitted_if_the_file_has_one_flock(tmp_path: Path) -> None:
    path = tmp_path / "many.py"
    path.write_text("from flock.core import Flock\nonly = Flock('only')\n")
    assert load_flock(str(path)).name == "only"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{path}/nowhere.py", "There is no file"),
        ("..", "'..' is neither a module nor the path of a .py file"),
        ("", "'' is neither a module"),
        ("no_such_module", "There is no module 'no_such_module'"),
        ("greeter.nothing", "There is no module 'greeter.nothing'"),
        ("{path}/greeter.py:swarm", "has no flock called 'swarm'. It has: flock."),
        ("{path}/many.py", "has no flock called 'flock'. It has: a, b."),
        ("{path}/none.py", "Add flock = Flock(...) at its top level."),
        ("folder", "has no flock called 'flock'. It is a folder. Name a file in it, such as folder/app.py."),
    ],
)
def test_the_error_for_a_missing_target_says_what_exists(
    target: str, words: str, flock_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(flock_file.parent)
    (flock_file.parent / "many.py").write_text("from flock.core import Flock\na, b = Flock(), Flock()\n")
    (flock_file.parent / "none.py").write_text("")
    (flock_file.parent / "folder").mkdir()
    result = invoke("run", target.format(path=flock_file.parent), "greet")
    assert result.exit_code == 1
    assert words in result.output


SIGNATURE = """from flock.core import FlockFactory

FlockFactory.create_default_agent("a", input="text str", output="o")
"""


@pytest.mark.parametrize(
    ("code", "error"),
    [
        pytest.param(
            SIGNATURE,
            "{path}:3: In the signature 'text str': a colon is missing. Write 'text: str' (column 6)",
            id="signature",
        ),
        pytest.param(
            "import no_such_thing\n", "{path}:1: ModuleNotFoundError: No module named 'no_such_thing'", id="import"
        ),
        pytest.param("import brok\n", "{path}:1: ModuleNotFoundError: No module named 'brok'", id="import, like it"),
        pytest.param("x = 1\nprint('x'\n", "{path}:2: SyntaxError: '(' was never closed", id="syntax"),
        pytest.param("\nimport neighbour\n", "{folder}/neighbour.py:2: ValueError: one too many", id="in a neighbour"),
        pytest.param(
            "import json\njson.loads('[')\n",
            "{path}:2: json.decoder.JSONDecodeError: Expecting value: line 1 column 2 (char 1)",
            id="in a library",
        ),
        pytest.param(
            "import flock.core, flockapi\nflockapi.create_app(flock.core.Flock(), auth=len, api_keys={})\n",
            "{path}:2: auth= and api_keys= cannot be combined. Pass only one of them.",
            id="in this package",
        ),
        pytest.param(
            "x = '\0'\n", "{target}: SyntaxError: source code string cannot contain null bytes", id="not text"
        ),
    ],
)
@pytest.mark.parametrize("target", ["broken", "broken.py"])
@pytest.mark.parametrize(
    "command", [["run", "{}", "x"], ["serve", "{}"], ["check", "{}"]], ids=["run", "serve", "check"]
)
def test_an_error_in_user_code_is_one_line_with_file_and_line(
    command: list[str], target: str, code: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "neighbour.py").write_text("\nraise ValueError('one too many')\n")
    monkeypatch.chdir(tmp_path)
    result = invoke(*(argument.format(target) for argument in command))
    assert result.exit_code == 1
    expected = error.format(path=tmp_path / "broken.py", folder=tmp_path, target=target)
    assert result.output == f"Error: {expected}\n"


# flockapi run


def test_run_prints_the_result_as_json(flock_file: Path) -> None:
    result = invoke("run", str(flock_file), "greet", "-i", 'person={"name": "Ann=A", "age": 3}', "-i", "loud=true")
    assert result.exit_code == 0
    assert result.output == '{\n  "result": "HELLO ANN=A, 3"\n}\n'


STREAMED = """
import asyncio
from collections.abc import Iterator

from flock.core import Flock
from flock.runs import RunContext, Principal

flock = Flock()

@flock.agent(next_agent="second")
async def first(context: RunContext) -> str:
    context.emit("  a b")
    for _ in range(50):  # until it was printed
        await asyncio.sleep(0)
    await context.call(double, 1)
    return "a b"

async def double(n: int) -> int:
    return 2 * n

@flock.agent
def second(result: str) -> Iterator[str]:
    yield from ("c ", "d")
"""


def test_run_can_print_text_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "streamed.py").write_text(STREAMED)
    command = flockapi_command("run", str(tmp_path / "streamed.py"), "first", "--stream")
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == '  a b\na b\nc d\n{\n  "result": "c d"\n}\n'
    assert result.stderr == "first calls double\nfirst starts again\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "Error: There is no agent 'nobody'. Known agents: greet, fail."),
        (["greet"], "Error: /inputs/person: This field is required."),
        (["greet", "-i", "person=Ann"], "/inputs/person: Expected 'object', got 'str'."),
        (["greet", "-i", "person"], "'person' is not KEY=VALUE"),
        (["greet", "-i", "person={}", "-i", "loud=1e400"], "/inputs/loud: This number is out of range"),
        (["fail", "-i", "text=why"], "Error: The agent 'fail' raised ValueError: why"),
    ],
)
def test_run_reports_errors(arguments: list[str], words: str, flock_file: Path) -> None:
    result = invoke("run", str(flock_file), *arguments)
    assert result.exit_code in (1, 2)
    assert words in result.output


def test_the_model_is_set_by_option_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(flock: Flock, agent_name: str, inputs: Any, **options: Any) -> dict[str, Any]:
        seen.append(flock.model)
        return {}

    monkeypatch.setattr(Flock, "run", note)
    example = str(EXAMPLES / "text_analyzer.py")
    for arguments, env in (([], {}), (["--model", "a/b"], {}), ([], {"FLOCK_MODEL": "c/d"})):
        assert invoke("run", example, "text_analyzer", *arguments, **env).exit_code == 0
    assert seen == ["openai/gpt-4o", "a/b", "c/d"]


def test_version_and_help() -> None:
    assert invoke("--version").output == f"flockapi, version {__version__}\n"
    for command in ([], ["serve"], ["run"], ["batch"], ["check"]):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert "TARGET" in result.output


# flockapi serve


def test_serve_serves_and_stops_cleanly(flock_file: Path) -> None:
    with running(*flockapi_command("serve", str(flock_file), "--port", "0", "--server-name", "Greeter")) as server:
        inputs = {"person": {"name": "Ann", "age": 3}}
        response = httpx.post(f"{server.url}/run/flock", json={"agent_name": "greet", "inputs": inputs})
        assert response.json()["result"] == {"result": "Hello Ann, 3"}
        assert "server" not in response.headers
        assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "Greeter"
        assert server.stop() == -15 or server.process.returncode == 0
    log = "\n".join(server.lines)
    assert "Greeter serves greet, fail. Docs: /docs and /redoc." in log
    assert f"run {response.json()['run_id']}: completed, agent greet" in log
    assert "ERROR" not in log
    assert "Traceback" not in log


def test_a_failed_run_has_its_traceback_in_the_log_under_its_request(flock_file: Path) -> None:
    with running(*flockapi_command("serve", str(flock_file), "--port", "0")) as server:
        response = httpx.post(
            f"{server.url}/run/flock",
            json={"agent_name": "fail", "inputs": {"text": "the reason"}},
            headers={"X-Request-ID": "request-77"},
        )
        assert response.json()["status"] == "failed"
        server.stop()
    log = "\n".join(server.lines)
    assert "agent fail raised (request request-77)" in log
    assert "ValueError: the reason" in log


SLOW = """
import threading, time
import anyio
from flock.core import Flock

flock = Flock()
started = threading.Event()

@flock.agent
async def nap() -> None:
    print("at work", flush=True)
    await anyio.sleep(600)

@flock.agent
def block() -> None:
    print("at work", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("agent", ["nap", "block"])
@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.slow
def test_a_stopping_server_answers_waiting_callers_and_exits(
    agent: str, signal_: signal.Signals, tmp_path: Path
) -> None:
    """Runs get the drain timeout, then their callers get a response. A function that does not return delays nothing."""
    path = tmp_path / "slow.py"
    path.write_text(SLOW)
    answers: list[httpx.Response] = []

    def post(url: str) -> None:
        answers.append(httpx.post(f"{url}/run/flock", json={"agent_name": agent}, timeout=60))

    with running(*flockapi_command("serve", str(path), "--port", "0", "--drain-timeout", "0.3")) as server:
        caller = threading.Thread(target=post, args=[server.url])
        caller.start()
        server.wait_for_line("at work")
        server.process.send_signal(signal_)
        server.process.wait(30)
        caller.join(30)
    (answer,) = answers
    assert (answer.status_code, answer.json()["error_type"]) == (200, "interrupted")
    log = "\n".join(server.lines)
    assert "ERROR" not in log
    assert "Traceback" not in log


def test_errors_are_exposed_on_request(flock_file: Path) -> None:
    with running(*flockapi_command("serve", str(flock_file), "--port", "0", "--expose-errors")) as server:
        body = {"agent_name": "fail", "inputs": {"text": "the reason"}}
        assert "the reason" in httpx.post(f"{server.url}/run/flock", json=body).json()["error"]


def test_the_example_starts_without_a_key_and_a_run_names_the_variable(tmp_path: Path) -> None:
    """It is ``python text_analyzer.py``, except for the port, which may be in use here."""
    script = (EXAMPLES / "text_analyzer.py").read_text().replace("port=8344", "port=0")
    path = tmp_path / "text_analyzer.py"
    path.write_text(script)
    with running(sys.executable, str(path), OPENAI_API_KEY="", PYTHONPATH=str(ROOT)) as server:
        body = {"agent_name": "text_analyzer", "inputs": {"text": "This is great!"}}
        answer = httpx.post(f"{server.url}/run/flock", json=body).json()
        assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "My Flock Service API"
    assert (answer["status"], answer["error_type"]) == ("failed", "model_not_configured")
    assert "Set the environment variable OPENAI_API_KEY" in answer["error"]
    started = server.lines[: next(n for n, line in enumerate(server.lines) if "running on" in line)]
    assert [line for line in started if line == f"WARNING:  The agent 'text_analyzer' cannot run. {answer['error']}"]


def test_start_api_warns_if_there_is_no_key_and_no_agent(tmp_path: Path) -> None:
    path = tmp_path / "bare.py"
    options = "host='0.0.0.0', port=0, create_ui=True, allow_anonymous=True"
    path.write_text(f"from flock.core import Flock\nFlock().start_api({options})\n")
    with running(sys.executable, str(path), PYTHONPATH=str(ROOT)) as server:
        port = server.url.rpartition(":")[2]
        headers = {"Host": "agents.example"}
        for page in ("runs", "ui"):
            assert httpx.get(f"http://127.0.0.1:{port}/{page}", headers=headers).status_code == 200
    log = "\n".join(server.lines)
    assert "Listening on 0.0.0.0 without API keys" in log
    assert "UI: /ui." in log
    assert "This flock has no agents" in log


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.slow
def test_a_port_in_use_is_reported(workers: str, flock_file: Path) -> None:
    with running(*flockapi_command("serve", str(flock_file), "--port", "0")) as server:
        port = server.url.rpartition(":")[2]
        command = flockapi_command("serve", str(flock_file), "--port", port, "--workers", workers)
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=60, check=False)
    assert done.returncode != 0
    assert "address already in use" in done.stderr.lower()
    assert f"Cannot listen on 127.0.0.1, port {port}" in done.stderr
    assert "Choose another port with --port" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_invalid_allowed_host_is_refused(flock_file: Path) -> None:
    for host in ("https://agents.example", "agents.example:443", ""):
        result = invoke("serve", str(flock_file), "--allowed-host", host)
        assert result.exit_code == 2
        assert f"{host!r} is not a host name" in " ".join(result.output.split())


def test_run_takes_json_inputs_in_its_own_process(flock_file: Path) -> None:
    command = flockapi_command("run", str(flock_file), "greet", "-i", 'person={"name": "Bo", "age": 1}')
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == {"result": "Hello Bo, 1"}


def test_the_options_of_serve_are_the_settings_of_the_server() -> None:
    """Both have the same defaults, except for the protocols, and the pages name only options that exist."""
    group = click.Context(main, **main.context_settings)  # a command keeps the names of its help option
    options = serve.make_context("serve", ["target.py"], group).params
    settings = msgspec.structs.asdict(ServerSettings())
    app, limits = (msgspec.structs.asdict(settings.pop(name)) for name in ("app", "limits"))
    shared = ("store", "expose_errors", "allowed_hosts")  # the server has its own
    settings |= {name: limits[name] for name in limits.keys() & options.keys()}
    settings |= {name: app[name] for name in app.keys() & options.keys() if name not in shared}
    settings["protocols"] = tuple(PROTOCOL_MODULES)
    assert {name: options[name] for name in options.keys() - {"target", "model", "workers"}} == settings
    help_text = "".join(invoke(command, "--help").output for command in ("serve", "run", "batch", "evaluate", "check"))
    pages = [(ROOT / "README.md"), *(ROOT / "docs").glob("*.md")]
    text = "".join(page.read_text("utf-8") for page in pages if page.name != "reliability.md")  # it has other programs
    of_uvicorn = {"--http", "--log-config", "--timeout-graceful-shutdown"}
    of_others = {"--no-deps", "--jinja", "--enable-auto-tool-choice", *of_uvicorn}
    named = set(re.findall(r"`(--[a-z-]+)[` ]", text)) - of_others
    assert {option for option in named if option not in help_text} == set()


def test_serve_has_options_for_batch_limits_and_a_csv_folder(flock_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "two.csv").write_text("text\nx\ny\n")
    (folder / "three.csv").write_text("text\nx\ny\nz\n")
    (tmp_path / "secret.csv").write_text("text\nx\n")
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--csv-dir", str(folder))
    with running(*command, "--max-items", "2", "--max-upload-bytes", "100") as server:

        def post(name: str) -> httpx.Response:
            return httpx.post(f"{server.url}/run/batch", json={"agent_name": "fail", "batch_inputs": name})

        assert post("two.csv").status_code == 202
        assert post("three.csv").status_code == 413
        assert post("../secret.csv").status_code == 422
        headers = {"Content-Type": "text/csv"}
        url = f"{server.url}/run/batch?agent_name=fail"
        assert httpx.post(url, content=b"text\n" + 100 * b"x", headers=headers).status_code == 413
    result = invoke("serve", str(flock_file), "--csv-dir", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "does not exist" in result.output


def test_several_workers_need_a_store_in_a_file(flock_file: Path) -> None:
    result = invoke("serve", str(flock_file), "--workers", "2", "--store", ":memory:")
    assert result.exit_code == 2
    assert "Several workers need a file to share their runs" in result.output


def test_an_unusable_store_is_reported_in_one_line(
    flock_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("flock")  # the command configures it for its whole process, which is that of the tests
    monkeypatch.setattr(log, "propagate", log.propagate)
    monkeypatch.setattr(log, "handlers", [*log.handlers])
    (tmp_path / "notes.db").write_text("these are my notes")
    for workers in ("1", "2"):
        result = invoke("serve", str(flock_file), "--port", "0", "--store", "notes.db", "--workers", workers)
        assert result.exit_code == 1
        assert "file is not a database" in result.output
        assert "Traceback" not in result.output
    assert (tmp_path / "notes.db").read_text() == "these are my notes"


# A terminal

#: The classes of characters that change the direction of others (UAX 9).
BIDI_CONTROLS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
#: Codes that write to the clipboard, erase, delete and reverse what follows. JSON escapes only the first three.
CODES = "\x1b]52;c;ZXZpbA==\x07\x1b[2K\x9b2J\x7f\u202e"
SHOWN = r"\u001b]52;c;ZXZpbA==\u0007\u001b[2K\u009b2J\u007f\u202e"

HOSTILE = f"""
import logging
from collections.abc import AsyncIterator
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import RunContext
from flock.testing import FakeModel

CODES = {CODES!r}
flock = Flock("hostile", model="openai/gpt-4o")

@flock.agent
def say(text: str = "") -> str:
    logging.getLogger("flock.test").warning("logged %s", CODES)
    return text + CODES

@flock.agent
async def tell() -> AsyncIterator[str]:
    for char in CODES:
        yield char

@flock.agent
def refuse() -> str:
    raise AgentError(CODES)

@flock.agent
def break_() -> str:
    raise ValueError(CODES)

@flock.agent
async def ask(context: RunContext) -> str:
    return "answered " + await context.ask(CODES, str)

@flock.agent
async def crash() -> str:
    raise SystemExit(CODES)

def pay(to: str, euros: int) -> str:
    return f"paid {{to}}"

PAY = Tool(pay, needs_approval=True)
flock.add_agent(FlockFactory.create_default_agent(name="payer", input="order: str", output="done: str", tools=[PAY]))
"""

PAYING = """
from flock.testing import Reply
FakeModel([Reply(calls=[("pay", {"to": "Mallory" + CODES, "euros": 5000})]), {"done": "it is paid"}]).__enter__()
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    path = tmp_path / "hostile.py"
    path.write_text(HOSTILE)
    return path


def at_terminal(*arguments: str, typed: str = "") -> str:
    """Run the command at a terminal at which a person types *typed*, and return what the terminal receives."""
    ours, theirs = pty.openpty()
    try:
        process = subprocess.Popen(
            flockapi_command(*arguments),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", "OPENAI_API_KEY": "none"},
        )
        os.close(theirs)
        os.write(ours, typed.encode())
        received = bytearray()
        with contextlib.suppress(OSError):  # on Linux, the end is an error
            while part := os.read(ours, 65_536):
                received += part
        process.wait(60)
    finally:
        os.close(ours)
    return received.decode().replace("\r\n", "\n")


def assert_escaped(text: str) -> None:
    assert "52;c;ZXZpbA==" in text
    styled = re.sub(r"\x1b\[([02]m|\?25[lh]|K)", "", text).replace("\r", "")  # our own: dim text, the progress line
    assert [char for char in styled if not char.isprintable() and char not in "\n\t"] == []


def test_all_control_characters_are_escaped_except_newlines_and_tabs() -> None:
    text = "".join(map(chr, range(0x110000)))
    changed = {char for char in text if for_terminal(char) != char}
    assert {char for char in changed if char.isprintable()} == set()
    assert {chr(code) for code in (*range(32), *range(127, 160))} - changed == {"\n", "\t"}
    assert {char for char in text if unicodedata.bidirectional(char) in BIDI_CONTROLS} <= changed
    assert for_terminal("a\r\nb\rc") == "a\r\nb\\u000dc"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        pytest.param(["run", "say"], "", id="a result and a log record"),
        pytest.param(["run", "tell"], "", id="a streamed result"),
        pytest.param(["run", "tell", "--stream"], "", id="a stream"),
        pytest.param(["run", "refuse"], "", id="an error"),
        pytest.param(["run", "break_"], "", id="an exception"),
        pytest.param(["run", "crash"], "", id="an exit"),
        pytest.param(["run", "ask"], "yes\n", id="a question"),
    ],
)
def test_run_escapes_what_could_control_the_terminal(arguments: list[str], typed: str, hostile: Path) -> None:
    command, agent, *options = arguments
    assert_escaped(at_terminal(command, str(hostile), agent, *options, typed=typed))


@pytest.mark.slow
def test_an_approval_at_the_terminal_shows_the_tool_and_its_arguments(hostile: Path) -> None:
    hostile.write_text(HOSTILE + PAYING)
    text = at_terminal("run", str(hostile), "payer", "-i", "order=x", "--stream", typed='{"approved": true}\n')
    assert_escaped(text)
    question = text.index("May payer call pay?")
    assert f'"to": "Mallory{SHOWN}",\n  "euros": 5000' in text[:question]
    assert "it is paid" in text[question:]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--dry-run"], ["-o", "-"], ["-o", "-", "--format", "ndjson"], ["-o", "out.csv"]])
@pytest.mark.parametrize("column", ["text", f"tex{CODES}t"], ids=["valid", "invalid"])
def test_batch_escapes_what_could_control_the_terminal(
    column: str, options: list[str], hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.ndjson").write_text(json.dumps({column: CODES}, ensure_ascii=False) + "\n")
    text = at_terminal("batch", str(hostile), "say", "rows.ndjson", *options)
    assert_escaped(text)


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["say", "refuse"])
@pytest.mark.parametrize(
    ("command", "options"),
    [("batch", ["-o", "out.csv", "--try", "1"]), ("evaluate", ["--expect", "result", "--model", f"openai/{CODES}"])],
)
def test_rows_that_are_shown_are_escaped(
    command: str, options: list[str], agent: str, hostile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that --try has tried, and the worst ones of an evaluation: their inputs, results and errors."""
    monkeypatch.chdir(tmp_path)
    row = {"result": CODES} | ({"text": CODES} if agent == "say" else {})
    (tmp_path / "rows.ndjson").write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2)
    text = at_terminal(command, str(hostile), agent, "rows.ndjson", "--on-extra", "ignore", *options, typed="n\n")
    assert "1 of 2 rows were tried" in text or "row 1: 0.000 for" in text
    assert_escaped(text)


@pytest.mark.slow
def test_check_escapes_what_could_control_the_terminal(hostile: Path) -> None:
    hostile.write_text(f"{HOSTILE}flock.model = 'anthropic/' + CODES")
    assert_escaped(at_terminal("check", str(hostile)))


@pytest.mark.slow
def test_an_error_of_the_users_code_is_escaped(hostile: Path) -> None:
    hostile.write_text(f"raise ValueError({CODES!r})")
    assert_escaped(at_terminal("check", str(hostile)))


def test_what_is_piped_is_not_changed(hostile: Path) -> None:
    def piped(*arguments: str) -> str:
        command = flockapi_command("run", str(hostile), *arguments)
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode()

    assert piped("tell", "--stream").startswith(f"{CODES}\n{{")
    assert json.loads(piped("say")) == {"result": CODES}
    assert "\x7f" in piped("say")


@pytest.mark.parametrize(
    ("options", "name", "principal"),
    [
        (["--role", "refunds"], "refunds:role:refunds", Principal(name="refunds", roles=["refunds"])),
        (["--name", "bob", "--role", "a", "--role", "b"], "bob:role:a:role:b", Principal(name="bob", roles=["a", "b"])),
        (["--name", "ops", "--admin"], "ops:admin", Principal(name="ops", admin=True)),
        (["--admin", "--role", "a"], "a:admin:role:a", Principal(name="a", admin=True, roles=["a"])),
    ],
)
def test_a_key_with_a_role_is_a_line_of_the_file_of_keys(
    options: list[str], name: str, principal: Principal, tmp_path: Path
) -> None:
    printed = invoke("key", *options)
    assert printed.exit_code == 0, printed.output
    (tmp_path / "keys").write_text(printed.output)
    keys = configured_keys(tmp_path / "keys")
    assert keys is not None
    assert list(keys) == [name]
    assert KeyRing(keys).find(keys[name]) == principal


def test_a_key_cannot_have_a_role_that_is_none() -> None:
    refused = invoke("key", "--role", "a,b")
    assert refused.exit_code != 0
    assert "'a,b' is not the name of a role" in refused.output


def test_the_command_loads_others_only_when_they_are_called_and_finds_no_garbage_in_itself() -> None:
    code = (
        "import gc, json, sys; from flock.__main__ import main; sys.argv[1:] = ['serve', '--help']\n"
        "try: main()\n"
        "except SystemExit: print(json.dumps([gc.isenabled(), gc.get_freeze_count(), sorted(sys.modules)]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    is_enabled, frozen, loaded = json.loads(printed.splitlines()[-1])
    assert is_enabled
    assert frozen > 20_000
    assert not {"flock.command.batch", "flock.command.evaluate", "flock.engine.embedded"} & set(loaded)


def test_protocols_are_chosen_one_by_one() -> None:
    group = click.Context(main, **main.context_settings)
    for given, protocols in (([], tuple(PROTOCOL_MODULES)), (["openai"], ("openai",)), (["none"], ())):
        arguments = [argument for name in given for argument in ("--protocol", name)]
        assert serve.make_context("serve", ["target.py", *arguments], group).params["protocols"] == protocols
    refused = invoke("serve", "target.py", "--protocol", "none", "--protocol", "openai")
    assert "'none' cannot be combined with another protocol." in refused.output

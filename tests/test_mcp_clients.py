"""The MCP server as real clients see it: the SDK for Python, a checker, and the conformance suite."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.environments import new_environment, pip
from tests.support.pages import blocks_of
from tests.support.servers import Server, flockapi_command, running

pytestmark = pytest.mark.timeout(600)

AGENTS = ROOT / "tests" / "mcp_agents.py"
PAGE = ROOT / "docs" / "mcp-server.md"
#: What is not expected to pass, with the reasons.
BASELINE = ROOT / "tests" / "mcp_conformance.yaml"
KEY = "key-of-the-clients"

#: It prints what it has seen. Its arguments: the mode, and a URL, or a command.
CLIENT = """
import json, sys
import anyio
import httpx2
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import BlobResourceContents, ElicitResult, EmbeddedResource, ImageContent

mode, key, *target = sys.argv[1:]
asked, pieces = [], []


async def elicit(context, params):
    asked.append(params.message)
    return ElicitResult(action="accept", content={"approved": True})


async def progress(done, total, message):
    pieces.append(message)


def server(http):
    if target[0].startswith("http"):
        return streamable_http_client(target[0], http_client=http)
    return StdioServerParameters(command=target[0], args=target[1:], env={"XDG_STATE_HOME": "state"})


async def main():
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        async with Client(server(http), mode=mode, elicitation_callback=elicit) as client:
            tools = {tool.name: tool for tool in (await client.list_tools()).tools}
            templates = (await client.list_resource_templates()).resource_templates
            added = await client.call_tool("add", {"a": 1})
            invalid = await client.call_tool("add", {"a": "one"})
            written = await client.call_tool("write", {"topic": "tea"}, progress_callback=progress)
            approved = await client.call_tool("approve", {"text": "it"})
            long = await client.call_tool("long", {"length": 100_000})
            kept = BlobResourceContents(uri="file:///a.gif", mime_type="image/gif", blob="R0lGODlh")
            blocks = ImageContent(data="R0lGODlh", mime_type="image/gif"), EmbeddedResource(resource=kept)
            arguments = [{"photo": each.model_dump(mode="json", by_alias=True, exclude_none=True)} for each in blocks]
            looked = [(await client.call_tool("look", each)).content[0].text for each in arguments]
            with anyio.move_on_after(1):
                await client.call_tool("nap", {})
            read = None
            for part in long.content:
                if part.type == "resource_link":
                    read = json.loads((await client.read_resource(part.uri)).contents[0].text)["status"]
            seen = {
                "version": client.session.protocol_version,
                "tool": [tools["add"].title, tools["add"].output_schema["properties"]["result"]["type"]],
                "templates": [template.uri_template for template in templates],
                "added": added.structured_content,
                "invalid": invalid.is_error,
                "looked": looked,
                "written": [written.content[0].text, "".join(pieces)],
                "approved": [approved.is_error, approved.structured_content, asked],
                "long": [len(long.structured_content["result"]), read],
                "still": (await client.call_tool("add", {"a": 2})).structured_content,
            }
    print(json.dumps(seen))


anyio.run(main)
"""


@pytest.fixture(scope="module")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the clients."""
    python = new_environment(tmp_path_factory.mktemp("clients"))
    subprocess.run(pip(python, "install", "--quiet", "mcp==2.3.*", "jbt-mcpcheck==0.1.*"), check=True)
    return python


@pytest.fixture
def server() -> Iterator[Server]:
    command = flockapi_command("serve", str(AGENTS), "--port", "0", "--store", ":memory:")
    with running(*command) as made:
        yield made


def run(*command: str | Path, folder: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("transport", ["http", "stdio"])
@pytest.mark.parametrize(("mode", "version"), [("auto", "2026-07-28"), ("legacy", "2025-11-25")])
def test_the_client_of_the_sdk_calls_answers_and_cancels(
    mode: str, version: str, transport: str, client_python: Path, tmp_path: Path
) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    keys = {"FLOCK_API_KEYS": f"ann={KEY}"}
    if transport == "http":
        command = flockapi_command("serve", str(AGENTS), "--port", "0", "--store", ":memory:")
        with running(*command, **keys) as server:
            seen = json.loads(run(client_python, "client.py", mode, KEY, f"{server.url}/mcp", folder=tmp_path))
    else:
        target = flockapi_command("mcp", str(AGENTS), "--store", str(tmp_path / "x.db"))
        seen = json.loads(run(client_python, "client.py", mode, KEY, *target, folder=tmp_path))
    is_latest = mode == "auto"
    assert seen["version"] == version
    assert seen["tool"] == ["Add", "integer"]
    assert seen["templates"] == ["flock://run/{run_id}"]
    assert (seen["added"], seen["invalid"], seen["still"]) == ({"result": 3}, True, {"result": 4})
    assert seen["looked"] == ["image/gif  6", "image/gif a.gif 6"]
    assert seen["written"] == ["All about tea", "All about tea"]
    assert seen["approved"] == ([False, {"result": "sent"}, ["Send it?"]] if is_latest else [True, None, []])
    # Without the header of HTTP, an older client may be of the first revision, which knows no links.
    assert seen["long"] == [100_000, "completed" if is_latest or transport == "http" else None]


def test_the_checker_of_the_revision_finds_nothing_wrong(client_python: Path, server: Server, tmp_path: Path) -> None:
    report = run(
        *(client_python.with_name("jbt-mcpcheck"), f"{server.url}/mcp", "--probe", "all", "--legacy-probes", "--json"),
        folder=tmp_path,
    )
    status = {check["name"]: check["status"] for check in json.loads(report)["checks"]}
    assert status.pop("errors") in ("pass", "warn")  # by its heuristics, some messages could be better
    assert {*status} >= {"handshake", "session", "discover", "protocol", "schemas", "cache", "origin"}
    assert {*status.values()} == {"pass"}, report


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with programs for Node, and a version of Node that is new enough for them."""
    folder = tmp_path_factory.mktemp("node")
    packages = ("node@22", "@modelcontextprotocol/conformance@0.2.0-alpha.12", "@modelcontextprotocol/inspector@2.12.0")
    run("npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages, folder=folder)
    return folder / "node_modules"


needs_npm = pytest.mark.skipif(
    shutil.which("npm") is None and "CI" not in os.environ, reason="npm is not installed; it is in CI"
)


@needs_npm
@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25", "2026-07-28"])
def test_the_conformance_suite_fails_where_the_baseline_says_why(
    version: str, modules: Path, server: Server, tmp_path: Path
) -> None:
    suite = (modules / ".bin" / "node", modules / "@modelcontextprotocol" / "conformance" / "dist" / "index.js")
    options = ["--url", f"{server.url}/mcp", "--spec-version", version, "--expected-failures", str(BASELINE)]
    run(*suite, "server", "--suite", "all", *options, folder=tmp_path)


@needs_npm
@pytest.mark.parametrize("host", ["Claude Desktop", "the Inspector"])
def test_the_inspector_runs_with_the_configuration_of_the_page(host: str, modules: Path, tmp_path: Path) -> None:
    """That of Claude Desktop starts the command, that of the Inspector names a URL."""
    (tmp_path / "desk.py").write_text(next(block.text for block in blocks_of(PAGE) if block.language == "python"))
    (row,) = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith(f"| {host} |")]
    config = json.loads(row.rpartition("| `")[2].rpartition("` |")[0])
    desk = config["mcpServers"]["desk"]

    def explain() -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        launcher = modules / "@modelcontextprotocol" / "inspector" / "clients" / "launcher" / "build" / "index.js"
        options = ["--cli", "--config", "config.json", "--server", "desk", "--method", "tools/call"]
        options += ["--tool-name", "explain", "--tool-arg", "topic=tea"]
        printed = run(
            modules / ".bin" / "node",
            launcher,
            *options,
            folder=tmp_path,
            HOME=str(tmp_path),
            MCP_INSPECTOR_SECRET_STORE="memory",
        )
        return str(json.loads(printed)["structuredContent"]["result"])

    if "url" not in desk:
        desk["command"], *desk["args"] = flockapi_command(desk["args"][0], str(tmp_path / "desk.py"))
        desk["env"]["HOME"] = str(tmp_path)
        assert explain() == "It is all about tea "
        return
    desk["headers"]["Authorization"] = f"Bearer {KEY}"
    serve = flockapi_command("serve", str(tmp_path / "desk.py"), "--port", "0", "--store", ":memory:")
    with running(*serve, FLOCK_API_KEYS=f"ann={KEY}") as server:
        desk["url"] = f"{server.url}/mcp"
        assert explain() == "It is all about tea "

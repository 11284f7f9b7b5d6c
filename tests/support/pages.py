"""The blocks of a documentation page, executed as a reader would."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from starlette.types import ASGIApp

from flockapi import FlockAPI
from tests.support.servers import Server, running

URL = "http://127.0.0.1:8344"

#: Members that differ from run to run, or from model to model.
VARYING = {
    *("run_id", "batch_id", "created_at", "started_at", "asked_at", "completed_at", "request_id", "eta_s", "usage"),
    "answered_at",
    *("result", "results", "steps", "sentiment", "keywords"),
    *("completed_items", "cancelled_items", "progress_percentage"),
}


class Block(NamedTuple):
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"(?m)^```(\w+)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(language, text) for language, text in found]


def commands_of(block: str) -> Iterator[str]:
    """Yield each command of a block. A quoted text may have several lines."""
    command = ""
    for line in block.splitlines(keepends=True):
        command += line
        with contextlib.suppress(ValueError):  # a quotation is still open
            shlex.split(command)
            yield command.strip()
            command = ""
    assert not command, command


def printed_by(code: str, page: Path, name: str = "page") -> tuple[list[str], dict[str, Any]]:
    """Execute a block of Python by itself, and return the lines that it prints and its names."""
    namespace: dict[str, Any] = {"__name__": name}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(page), "exec"), namespace)
    return output.getvalue().splitlines(), namespace


def shown_output(code: str) -> list[str]:
    """The output that comments show: after a print, or below the last line."""
    after_print = re.findall(r"print\(.*\)(?:  |\n)# (.*)", code) or re.findall(r"anyio\.run\(.*\)  # (.*)", code)
    lines = code.splitlines()
    return after_print or [
        line[2:] for i, line in enumerate(lines) if all(later.startswith("# ") for later in lines[i:])
    ]


async def check_serves_only_ann(ai: FlockAPI, host: ASGIApp) -> None:
    """Check that a mounted app answers the user of a page's example, and no request without a login."""
    body = {"agent_name": "greet", "inputs": {"name": "Ann"}}
    async with (
        ai.lifespan(),
        httpx.AsyncClient(transport=httpx.ASGITransport(host), base_url="http://testserver") as client,
    ):
        assert (await client.post("/ai/run/flock", json=body)).status_code == 401
        response = await client.post("/ai/run/flock", json=body, headers={"Authorization": "Bearer of-ann"})
        assert response.json()["result"] == {"result": "Hello, Ann!"}


class Reader:
    """A reader who types the commands of a page into a shell in *folder*, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: Server | None = None
        self._servers = contextlib.ExitStack()
        self._ids: dict[str, str] = {}
        self._env = {"PATH": f"{folder / '.venv' / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._servers.close()

    def follow(self, blocks: list[Block]) -> None:
        """Run all commands, and compare each shown output with the real one. Save the files that blocks name."""
        for block, following in itertools.zip_longest(blocks, blocks[1:]):
            if block.language in ("python", "py") and (file := re.match(r"# (\w+\.py)\n", block.text)):
                (self.folder / file[1]).write_text(block.text)
            if block.language == "bash":
                shown = following if following and following.language in ("json", "text", "csv") else None
                shows_error = shown is not None and re.search('"status": ?[45]', shown.text) is not None
                output = [self.run(command, may_fail=shows_error) for command in commands_of(block.text)][-1]
                if shown is not None:
                    check_output(shown, output)

    def run(self, command: str, *, may_fail: bool = False) -> str:
        """Run one command and return its output. A server keeps running, and later commands go to the last one.

        A response of curl with the status of an error is a failure unless *may_fail*.
        """
        if "flockapi serve" in command:
            self._servers.close()
            line = f"cd {shlex.quote(str(self.folder))} && {command} --port 0 --store :memory:"
            self.server = self._servers.enter_context(running("bash", "-c", line, **self._env))
            return ""
        if "curl " in command:
            assert self.server is not None, "no server was started"
            url = re.sub(r"//.*:", "//127.0.0.1:", self.server.url)
            command = command.replace(URL, url).replace(
                "curl ", f"curl -sS {'' if may_fail else '--fail-with-body '}", 1
            )
            for name, value in self._ids.items():
                command = command.replace(f"{{{name}}}", value)
        env = self._env | ({} if self.server is None else {"FLOCK_URL": self.server.url})
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        with contextlib.suppress(ValueError, AttributeError):
            answer = json.loads(done.stdout)
            self._ids |= {name: answer[name] for name in ("run_id", "batch_id") if name in answer}
            if questions := answer.get("waiting_for") or answer.get("questions"):
                self._ids |= {name: questions[0][name] for name in ("run_id", "call_id") if name in questions[0]}
        if (file := re.search(r"-o (\S+)", command)) and (self.folder / file[1]).exists():
            return (self.folder / file[1]).read_text("utf-8", "replace")
        return done.stdout


def check_output(shown: Block, output: str) -> None:
    """Compare what a page shows with what a command returned, except for what varies."""
    if shown.language == "json":
        assert _stable(json.loads(output)) == _stable(json.loads(shown.text))
    elif shown.language == "csv":
        rows = list(csv.reader(io.StringIO(output)))
        for row, expected in zip(rows, csv.reader(io.StringIO(shown.text)), strict=False):
            assert (row[0], row[-2:]) == (expected[0], expected[-2:])
        assert rows[0] == next(csv.reader(io.StringIO(shown.text)))
    elif "event: " in shown.text:
        assert _events(output) == _events(shown.text)
    else:
        assert output == shown.text


def _stable(value: Any, name: str = "") -> Any:
    """Return *value* without what varies. All names of members stay."""
    if name in VARYING:
        return ...
    if isinstance(value, dict):
        return {name: _stable(member, name) for name, member in value.items()}
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "{id}", value)
    return [_stable(each) for each in value] if isinstance(value, list) else value


def _events(text: str) -> list[tuple[str, str, Any]]:
    """Return the id, name and stable data of each event, and of progress events only the last."""
    events = re.findall(r"(?m)^(?:id: (.*)\n)?event: (.*)\ndata: (.*)$", text)
    found = {(id_, name): _stable(json.loads(data)) for id_, name, data in events}
    return [(id_, name, data) for (id_, name), data in found.items()]

"""Real servers in their own processes, and a real uvicorn in the event loop of a test."""

import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio.abc
import httpx
import uvicorn
from starlette.applications import Starlette

from flockapi import FlockAPI
from tests.support import PATIENCE_S
from tests.support.http import get

#: How long a server may take to shut down before it gets the next signal.
STOP_S = 2
#: Environment that switches coverage off in a process, because it doubles the time of very many requests.
NO_COVERAGE = {"COVERAGE_PROCESS_CONFIG": ""}


def free_port() -> int:
    """Return a free port outside the range from which the system assigns ports to other tests."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


class Server:
    """A server in its own process, and the lines that it has printed so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._is_up = threading.Event()
        self._printed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._printed:
                self.lines.append(line.rstrip())
                self._printed.notify_all()
            if found := re.search(r"[Rr]unning on (http://\S+)", line):
                self.url = found[1]
                self._is_up.set()
        self._is_up.set()

    def wait_until_up(self) -> None:
        assert self._is_up.wait(3 * PATIENCE_S), f"the server did not start: {self.lines}"
        assert self.url, f"the server ended: {self.lines}"

    def wait_for_line(self, words: str, timeout_s: float = PATIENCE_S, *, times: int = 1) -> None:
        """Wait until the server has printed *times* lines with *words*."""

        def is_there() -> bool:
            return sum(words in line for line in self.lines) >= times

        with self._printed:
            assert self._printed.wait_for(is_there, timeout_s), self.lines

    def wait_until_listening(self) -> None:
        """Wait until the server accepts connections. uvicorn with workers logs its address, and their start, before."""
        address, deadline = httpx.URL(self.url), time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection((address.host, address.port)).close()
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, self.lines
                time.sleep(0.02)
            else:
                return

    def close(self) -> None:
        """Read the rest of the output after the process has ended."""
        assert self.process.stdout is not None
        self._reader.join(60)
        self.process.stdout.close()

    def stop(self) -> int:
        """Send SIGTERM, read the output to its end, and return the exit code."""
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join(60)
        return code


@contextlib.contextmanager
def running(*command: str, **env: str) -> Iterator[Server]:
    """Run *command*, a server, until the block ends."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    server = Server(process)
    try:
        server.wait_until_up()
        yield server
    finally:
        for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):  # gracefully, at once, by force
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop)  # the server, and the shell that may have started it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        server.close()


def flockapi_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "flock", *arguments]


@contextlib.contextmanager
def serving(script: Path, tmp_path: Path, *options: str, workers: int = 1) -> Iterator[Server]:
    command = flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), *options)
    with running(*command, *(["--workers", str(workers)] if workers > 1 else [])) as server:
        server.wait_for_line("Application startup complete", times=workers)
        yield server


def workers_of(server: Server) -> list[int]:
    """Return the ids of the worker processes, without the parent and the helper that multiprocessing starts."""
    workers = []
    for pid in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since the list was read
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                workers.append(int(pid))
    return workers


def memory_kib(server: Server) -> int:
    """Return the memory of the server's process and its workers together."""
    pids = [server.process.pid]
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
        pids += map(int, children.split())
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    return sum(int(found[1]) for text in texts if (found := re.search(r"^Pss: +(\d+) kB$", text, re.MULTILINE)))


class Served:
    """An app served by a real uvicorn in this event loop."""

    def __init__(self, app: FlockAPI | Starlette, port: int = 0) -> None:
        self.app = app
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none"))
        self.socket = socket.create_server(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> "Served":
        self.task = asyncio.create_task(self.server._serve([self.socket]))
        with anyio.fail_after(PATIENCE_S):
            while not self.server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await anyio.sleep(0.01)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        await self.task

    @property
    def requests_in_flight(self) -> int:
        return len(self.server.server_state.tasks)

    async def send(self, body: Any = None, request: str = "POST /run/flock", **headers: str) -> anyio.abc.SocketStream:
        """Send a request, and return its open connection."""
        stream = await anyio.connect_tcp("127.0.0.1", self.port)
        content = b"" if body is None else json.dumps(body).encode()
        lines = [f"{request} HTTP/1.1", "Host: t", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(content)}", *(f"{name}: {value}" for name, value in headers.items())]
        await stream.send("\r\n".join([*lines, "", ""]).encode() + content)
        return stream

    async def only_run(self) -> Any:
        async with httpx.AsyncClient(base_url=self.url) as client:
            (run,) = (await get(client, "/runs"))["runs"]
            return await get(client, f"/run/{run['run_id']}", wait=60)

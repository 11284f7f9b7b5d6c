"""The servers that are compared, each started by its own command in its own process, on one core."""

import contextlib
import ctypes
import functools
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from bench.machine import Cores

ROOT = Path(__file__).parent.parent
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 1
REQUEST_TIMEOUT_S = 600
#: The owner of the key, and of all runs in the stores.
PRINCIPAL, KEY = "bench", "fk_" + "k" * 40

FLOOR, BARE, COMMIT, FASTAPI, LITESTAR = "ASGI", "bare", "bare + commit", "FastAPI", "Litestar"
BARE_MODEL = "bare model"
MEMORY, POWER, KEY_AND_METRICS = "memory", "power", "power, key, metrics"
GROWING = "power, watched"
OURS = (MEMORY, POWER, KEY_AND_METRICS)


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """A server: how to start it, and what its clients must send."""

    command: Callable[[Path], Sequence[str]]
    environment: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    needs: str = "starlette"


def _uvicorn(module: str, needs: str = "starlette") -> Subject:
    options = ("--http", "httptools", "--loop", "uvloop", "--no-access-log", "--port", "0")
    return Subject(command=lambda store: ("uvicorn", f"bench.peers.{module}:app", *options), needs=needs)


def _flockapi(*options: str, key: str | None = None, on_disk: bool = True, agents: str = "agents") -> Subject:
    """Return ``flockapi serve`` with its default log. The options are those that make the difference."""

    def command(store: Path) -> Sequence[str]:
        path = str(store) if on_disk else ":memory:"
        return ("flock", "serve", str(ROOT / "bench" / f"{agents}.py"), "--port", "0", "--store", path, *options)

    return Subject(
        command=command,
        environment={} if key is None else {"FLOCK_API_KEYS": f"{PRINCIPAL}={key}"},
        headers={} if key is None else {"Authorization": f"Bearer {key}"},
    )


SUBJECTS: Mapping[str, Subject] = {
    FLOOR: _uvicorn("floor"),
    BARE: _uvicorn("bare"),
    BARE_MODEL: _uvicorn("bare_model"),
    COMMIT: _uvicorn("bare_commit"),
    FASTAPI: _uvicorn("with_fastapi", needs="fastapi"),
    LITESTAR: _uvicorn("with_litestar", needs="litestar"),
    MEMORY: _flockapi("--no-metrics", on_disk=False),
    POWER: _flockapi("--no-metrics"),
    GROWING: _flockapi("--no-metrics", agents="growing"),
    KEY_AND_METRICS: _flockapi("--metrics", key=KEY),
}


def installed(names: Sequence[str]) -> list[str]:
    return [name for name in names if find_spec(SUBJECTS[name].needs) is not None]


class Server:
    """A running server."""

    def __init__(
        self, name: str, process: subprocess.Popen[bytes], port: int, headers: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.port, self.pid = name, port, process.pid
        self.headers = headers or {}
        self._process = process

    def raw_request(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """Return the bytes of a request, with *body* as JSON. In a header's name, ``_`` means ``-``."""
        content = b"" if body is None else msgspec.json.encode(body)
        wanted = {"Host": f"127.0.0.1:{self.port}", **self.headers}
        wanted |= {name.replace("_", "-"): value for name, value in headers.items()}
        if content:
            wanted |= {"Content-Type": "application/json", "Content-Length": str(len(content))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in wanted.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + content

    def fetch(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """Send one request and return the body of the response. Raises RuntimeError unless its status is 2xx."""
        wanted = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, REQUEST_TIMEOUT_S)) as connection:
            connection.request(method, path, body, wanted)
            response = connection.getresponse()
            content = response.read()
        if response.status // 100 != 2:
            raise RuntimeError(f"{self.name}: {method} {path}: {response.status}: {content[:500]!r}")
        return content

    def post(self, path: str, body: Any) -> Any:
        sent = msgspec.json.encode(body)
        return msgspec.json.decode(self.fetch("POST", path, sent, Content_Type="application/json"))

    def get(self, path: str) -> Any:
        return msgspec.json.decode(self.fetch("GET", path))

    def stop(self) -> None:
        """Stop at once. Runs that have not ended do not matter any more."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._process.kill()
        self._process.wait()


def spawn(
    module: Sequence[str],
    core: int | None,
    folder: Path,
    log: Path,
    *,
    python: str = sys.executable,
    **environment: str,
) -> subprocess.Popen[bytes]:
    """Start ``python -m`` *module* in *folder*, on *core*, or on all if it is None."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FLOCK_", "COVERAGE_"))}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with log.open("wb") as file:
        return subprocess.Popen(
            [python, "-m", *module],
            cwd=folder,
            env={**inherited, "PYTHONPATH": os.pathsep.join(paths), "OPENAI_API_KEY": "x", **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=functools.partial(_prepare, core),
        )


def _prepare(core: int | None) -> None:
    """Stay on *core*, and end with the parent process, however it ends."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1) if core is None else {core})
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def port_in(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until the server has logged its port."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"unning on http://127\.0\.0\.1:(\d+)", log.read_text("utf-8", "replace")):
            return int(found[1])
        time.sleep(0.002)
    process.kill()
    raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text('utf-8', 'replace')}")


def wait_for_workers(log: Path, workers: int) -> None:
    """Wait until all processes of a server have started. The port is logged before."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while (started := log.read_text("utf-8", "replace").count("Application startup complete")) < workers:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{started} of {workers} workers have started:\n{log.read_text('utf-8', 'replace')}")
        time.sleep(0.002)


@contextlib.contextmanager
def serving(
    name: str, cores: Cores, folder: Path, *options: str, workers: int = 1, store: str | None = None, provider: str = ""
) -> Iterator[Server]:
    """Serve one subject in the block.

    Args:
        options: additional options of the command.
        workers: processes of the server, which have all started.
        store: the file in *folder* for its runs.
        provider: the address of the model provider.
    """
    subject = SUBJECTS[name]
    (own := folder / f"{name} {time.monotonic_ns()}").mkdir()
    command = subject.command(folder / (store or f"{name}.db"))
    if workers > 1:
        options = (*options, "--workers", str(workers))
    log = own / "log"
    process = spawn(
        [*command, *options], cores.server, own, log, OPENAI_BASE_URL=f"{provider}/v1", **subject.environment
    )
    server = Server(name, process, port_in(log, process), subject.headers)
    try:
        if workers > 1:
            wait_for_workers(log, workers)
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def providing(cores: Cores, folder: Path) -> Iterator[str]:
    """Run the fake model provider in the block, on the core of the load. Yield its address."""
    log = folder / "provider.log"
    process = spawn(["bench.provider"], cores.load, folder, log)
    try:
        yield f"http://127.0.0.1:{port_in(log, process)}"
    finally:
        process.kill()
        process.wait()

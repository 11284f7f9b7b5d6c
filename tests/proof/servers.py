"""Servers that are quickly started again, and whose system calls are counted, recorded, and ended at a number.

A parent process imports everything once, and forks into each server. ``calls.c`` is loaded into all of them.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from tests.proof.client import KEYS
from tests.proof.scenarios import SHOP
from tests.support import PATIENCE_S, ROOT
from tests.support.servers import NO_COVERAGE, free_port

__all__ = ["Control", "Forge", "Place", "library"]


@functools.cache
def library() -> Path:
    """Compile ``calls.c``, and return the path of the library."""
    made = Path(tempfile.gettempdir()) / f"flock-proof-{os.getuid()}-{os.getpid()}.so"
    source = Path(__file__).with_name("calls.c")
    atexit.register(made.unlink, missing_ok=True)
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl"], check=True)
    return made


class Control:
    """What processes with the library share: the number of calls, and what happens before a certain one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(40))

    def _get(self, position: int) -> int:
        return int(struct.unpack_from("q", self.path.read_bytes(), 8 * position)[0])

    @property
    def count(self) -> int:
        return self._get(0)

    @property
    def pid(self) -> int:
        """The process that got the signal, or 0."""
        return self._get(3)

    @property
    def is_network(self) -> bool:
        """Whether the call that has failed was one of the network."""
        return not self._get(2)

    @property
    def signalled_at(self) -> float:
        """When it got the signal, in seconds of the epoch."""
        return self._get(4) / 1e9

    def signal_at(self, number: int, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal before the call of a number, counted from now: 1 is the next one.

        Args:
            signal_number: -1 or -2 to let it fail, with the first or second error of ``calls.c``; -3 or -4 to let all
                calls for files fail for a second.
        """
        with self.path.open("r+b") as file:
            file.seek(8)
            file.write(struct.pack("qqqq", self.count + number, signal_number, 0, 0))

    def disarm(self) -> None:
        with self.path.open("r+b") as file:
            file.seek(8)
            file.write(bytes(8))


class Forge:
    """The parent of servers. Use it as a context manager.

    Args:
        package: the folder of another copy of the product.
    """

    def __init__(self, package: Path = ROOT) -> None:
        env = {**os.environ, **NO_COVERAGE, "LD_PRELOAD": str(library()), "PYTHONPATH": f"{package}:{ROOT}"}
        command = [sys.executable, "-c", "from tests.proof.servers import _parent; _parent()"]
        self._process = subprocess.Popen(
            command, env=env, cwd=package, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait(PATIENCE_S)
        self._process.stdout.close()  # type: ignore[union-attr]

    def _ask(self, *words: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, folder: Path, output: Path, env: Mapping[str, str], *arguments: str) -> int:
        """Start a command of the product in a folder, and return the id of its process."""
        return self._ask(str(folder), str(output), dict(env), arguments)

    def wait(self, pid: int) -> int:
        """Wait for the end of a process, and return its exit code, or minus its signal."""
        return self._ask(pid)

    def kill(self, pid: int) -> None:
        """Kill a process with its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self.wait(pid)


def _parent() -> None:
    import flock.command.cli  # noqa: F401 - before the forks

    for line in sys.stdin:
        match json.loads(line):
            case [int(pid)]:
                try:
                    answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                except ChildProcessError:
                    answer = 0
            case [folder, output, env, arguments]:
                answer = os.fork()
                if not answer:
                    _serve(folder, output, env, arguments)
        print(answer, flush=True)


def _serve(folder: str, output: str, env: Mapping[str, str], arguments: list[str]) -> None:
    import flock.command.cli

    os.setsid()
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    os.chdir(folder)
    ctypes.CDLL(None).proof_begin()
    sys.argv = ["flockapi", *arguments]
    try:
        flock.command.cli.main(prog_name="flockapi")
    except SystemExit as exc:
        os._exit(exc.code if isinstance(exc.code, int) else 1)
    os._exit(0)


class Place:
    """A folder with a store, and the server that is started in it again and again, at the same address.

    Attributes:
        folder: of the files that count.
        log: of the effects; see ``shop.py``.
    """

    def __init__(self, forge: Forge, env: Mapping[str, str], *options: str, record: bool = False) -> None:
        self._forge, self._options = forge, options
        self._outer = Path(
            tempfile.mkdtemp(prefix="flock-proof-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        self.folder, self.log, self.output = self._outer / "store", self._outer / "effects", self._outer / "output"
        self.folder.mkdir()
        self.control, self.record = Control(self._outer / "control"), self._outer / "record"
        keys = self._outer / "keys"
        keys.write_text(KEYS)
        keys.chmod(0o600)
        self._env = {
            **env,
            "PROOF_LOG": str(self.log),
            "PROOF_CONTROL": str(self.control.path),
            "PROOF_FOLDER": str(self.folder),
        }
        if record:
            self.record.touch()
            self._env["PROOF_RECORD"] = str(self.record)
        self.port, self.pid = free_port(), 0
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = ("--api-keys-file", str(keys), "--port", str(self.port), "--store", "flock.db", *options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()
        shutil.rmtree(self._outer, ignore_errors=True)

    def start(self) -> None:
        self.pid = self._forge.start(self.folder, self.output, self._env, "serve", str(SHOP), *self._options)

    def command(self, *arguments: str) -> int:
        """Execute another command in the folder, and return its exit code, or minus its signal."""
        return self._forge.wait(self._forge.start(self.folder, self.output, self._env, *arguments))

    def shell(self, command: str) -> None:
        """Execute a command of a shell, whose calls are recorded too."""
        env = {**os.environ, **NO_COVERAGE, **self._env, "LD_PRELOAD": str(library())}
        subprocess.run(["bash", "-c", command], cwd=self.folder, env=env, check=True)

    def note(self, what: str, value: Any = None) -> None:
        """Add a record of what is not a call: "A" is an acknowledgement."""
        data = json.dumps(value).encode()
        with self.record.open("ab", buffering=0) as file:
            file.write(struct.pack("c7xqqqqq", what.encode(), 0, 0, 0, 0, len(data)) + data)

    def stop(self) -> int:
        """Stop the server gracefully, and return its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        pid, self.pid = self.pid, 0
        return self._forge.wait(pid)

    def kill(self) -> None:
        if self.pid:
            self._forge.kill(self.pid)
            self.pid = 0

    def has_died(self) -> bool:
        """Whether the process of the server has been killed."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    def processes(self) -> list[int]:
        """Return the processes of the server: its first one, and its workers."""
        found = [self.pid]
        for pid in found:
            with contextlib.suppress(OSError):  # it has ended
                for thread in os.listdir(f"/proc/{pid}/task"):
                    found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        return found

    def held(self) -> Mapping[str, Collection[str]]:
        """Return the open files, threads, connections of clients and lock files of engines that the server has now."""
        files, threads = set[str](), set[str]()
        for pid in self.processes():
            with contextlib.suppress(OSError):  # it has ended
                threads |= set(os.listdir(f"/proc/{pid}/task"))
                for number in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):  # it was closed
                        files.add(f"{pid} {number} {os.readlink(f'/proc/{pid}/fd/{number}')}")
        lines = [line.split() for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()]
        ends = [words[2:4] for words in lines if words[1].endswith(f":{self.port:04X}")]
        return {
            # Prometheus opens a file for each type of metric when it is first used.
            "files": {each for each in files if "socket:" not in each and "/flockapi-metrics-" not in each},
            "threads": threads,
            "connections": [end for end, state in ends if state not in ("0A", "06")],  # listening, and closed
            "locks": [name for name in os.listdir(self.folder) if "-engine-" in name],
        }

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200:
                    return
            assert time.monotonic() < deadline, self.output.read_text()
            assert not self.has_died(), self.output.read_text()
            time.sleep(0.01)

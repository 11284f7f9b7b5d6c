"""Real servers and workers, repeatedly killed with SIGKILL, lose no accepted run and repeat no committed step."""

import contextlib
import json
import math
import os
import random
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import httpx
import pytest

from tests.support import EXAMPLES, PATIENCE_S, slowness
from tests.support.servers import flockapi_command, free_port, running, workers_of
from tests.support.sockets import socket_server

RUNS = 200
FLOCK = """
import asyncio, os, time
from flock.core import Flock

flock = Flock("crash")
LOG = os.environ["LOG"]

def note(n: int, step: str, what: str) -> None:
    fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{n}-{step} {what} {os.getpid()} {time.monotonic()}\\n".encode())
    os.close(fd)

@flock.agent(next_agent="second")
async def first(n: int) -> int:
    note(n, "first", "begins")
    await asyncio.sleep(0.01)
    note(n, "first", "ends")
    return n

@flock.agent
def second(n: int) -> int:
    note(n, "second", "begins")
    time.sleep(0.002)
    note(n, "second", "ends")
    return n + 1
"""


class Ledger:
    """A record of the accepted runs, the committed steps, the calls of agents and the killed processes."""

    def __init__(self, folder: Path) -> None:
        self.log, self.database = folder / "log", folder / "flock.db"
        self.sent = 0
        self.accepted: dict[str, int] = {}
        self.committed: dict[str, int] = {}  # how often each step had started when its commit was seen
        self.killed: dict[str, float] = {}
        (folder / "crash.py").write_text(FLOCK)
        self.command = flockapi_command("serve", str(folder / "crash.py"), "--port", "0", "--store", str(self.database))

    def submit(self, client: httpx.Client) -> None:
        """Send a run. If the server dies before it answers, nothing was promised."""
        n, self.sent = self.sent, self.sent + 1
        with contextlib.suppress(httpx.TransportError):
            answer = client.post("/run/flock", json={"agent_name": "first", "inputs": {"n": n}, "async_run": True})
            assert answer.status_code == 202, answer.text
            self.accepted[answer.json()["run_id"]] = n

    def kill(self, pid: int) -> None:
        self.killed[str(pid)] = time.monotonic()  # before, since another one may take over at once
        os.kill(pid, 9)

    def kill_after(self, delay_s: float, pid: int) -> threading.Timer:
        """Start a timer that kills a process while runs are being sent."""
        timer = threading.Timer(delay_s, self.kill, [pid])
        timer.start()
        return timer

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def check_commits(self) -> None:
        """Record which steps are committed, and check that no committed step has started again."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            n = "json_extract(CAST(inputs AS TEXT), '$.n')"
            query = (
                f"SELECT {n} || '-' || steps.agent_name FROM steps JOIN runs USING (run_id) UNION "
                f"SELECT {n} || '-' || json_extract(CAST(last_step AS TEXT), '$[0]') FROM runs WHERE last_step NOT NULL"
            )
            steps = [step for (step,) in db.execute(query)]
        starts = [step for step, what, *_ in self.lines() if what == "begins"]
        for step in steps:
            times = self.committed.setdefault(step, starts.count(step))
            assert starts.count(step) == times, f"{step} was executed again after its commit"

    def wait_for_all(self, client: httpx.Client) -> None:
        """Wait until every accepted run has completed with the right result."""
        for run_id, n in self.accepted.items():
            run = client.get(f"/run/{run_id}", params={"wait": 60}).json()
            assert (run["status"], run["result"]) == ("completed", {"result": n + 1})

    def check_no_concurrent_executions(self) -> None:
        """Check that a step restarts only after its process was killed, or after it ended without a commit."""
        running_in: dict[str, str] = {}
        for step, what, pid, at in self.lines():
            if what == "begins" and step in running_in:
                assert self.killed[running_in[step]] <= float(at), f"{step} was executed by two processes at once"
            running_in[step] = pid
            if what == "ends":
                del running_in[step]


@pytest.mark.timeout(300)
def test_kill_9_loses_no_run_and_repeats_no_committed_step(tmp_path: Path) -> None:
    """With 200 asynchronous runs of two steps, and 20 kills of the server at random moments."""
    ledger, chance = Ledger(tmp_path), random.Random(7)
    for life in range(20):
        with running(*ledger.command, LOG=str(ledger.log)) as server:
            timer = ledger.kill_after(chance.uniform(0.02, 0.3), server.process.pid)
            with httpx.Client(base_url=server.url, timeout=90) as client:
                while len(ledger.accepted) < RUNS * (life + 1) // 20 and timer.is_alive():
                    ledger.submit(client)
            timer.join()
            server.process.wait()
        ledger.check_commits()
    with running(*ledger.command, LOG=str(ledger.log)) as server:
        with httpx.Client(base_url=server.url, timeout=90) as client:
            while len(ledger.accepted) < RUNS:
                ledger.submit(client)
            ledger.wait_for_all(client)
        ledger.check_commits()
    ledger.check_no_concurrent_executions()
    assert len(ledger.committed) >= 2 * RUNS


@pytest.mark.timeout(300)
def test_a_killed_worker_loses_nothing_and_the_others_stay_up(tmp_path: Path) -> None:
    """With 200 asynchronous runs of two steps, and three workers of which one is killed repeatedly."""
    ledger, chance = Ledger(tmp_path), random.Random(8)
    kills = int(os.environ.get("WORKER_KILLS", "6"))
    with running(*ledger.command, "--workers", "3", LOG=str(ledger.log)) as server:
        for kill in range(kills):
            server.wait_for_line("Application startup complete", times=3 + kill)
            others = set(workers_of(server))
            assert len(others) == 3
            victim = chance.choice(sorted(others))
            timer = ledger.kill_after(chance.uniform(0.02, 0.3), victim)
            while len(ledger.accepted) < RUNS * (kill + 1) // kills and timer.is_alive():
                with httpx.Client(base_url=server.url, timeout=90) as client:  # any worker takes the connection
                    ledger.submit(client)
            timer.join()
            ledger.check_commits()
            assert others - {victim} <= set(workers_of(server)), "the others stay up"
        with httpx.Client(base_url=server.url, timeout=90) as client:
            while len(ledger.accepted) < RUNS:
                ledger.submit(client)
            ledger.wait_for_all(client)
            ledger.check_commits()
    ledger.check_no_concurrent_executions()
    assert len({pid for _, _, pid, _ in ledger.lines()}) >= 3, "they share the work"
    assert len(ledger.committed) >= 2 * RUNS


# Repeated calls to a provider


class Provider:
    """A provider that hangs until ``may_answer`` is set, and then refuses the second request with each key."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.may_answer = False

    async def handle(self, stream: anyio.abc.SocketStream) -> None:
        received = b""
        while not received.endswith(b"}"):
            received += await stream.receive()
        head = received.partition(b"\r\n\r\n")[0].decode().lower()
        self.keys += [line.partition(": ")[2] for line in head.split("\r\n") if line.startswith("idempotency-key")]
        if not self.may_answer:
            await anyio.sleep_forever()
        is_second = self.keys.count(self.keys[-1]) == 2
        message = {"role": "assistant", "content": json.dumps({"sentiment": "good", "keywords": []})}
        body = json.dumps({"choices": [{"message": message}]})
        status = "401 No" if is_second else "200 OK"
        await stream.send(
            f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )

    async def until_called(self, times: int) -> None:
        with anyio.fail_after(PATIENCE_S):
            while len(self.keys) < times:  # noqa: ASYNC110 - another process calls
                await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_a_step_recovered_after_a_crash_reuses_its_key_and_a_retry_has_another(
    tmp_path: Path,
) -> None:
    """For a run and a batch item whose server is killed while they wait for the model."""
    provider, inputs = Provider(), {"text": "So."}
    command = flockapi_command("serve", str(EXAMPLES / "text_analyzer.py"), "--port", "0", "--store", "keys.db")
    async with socket_server(provider.handle) as (url, _):
        with running(*command, OPENAI_BASE_URL=url) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"agent_name": "text_analyzer", "inputs": inputs, "async_run": True}
                run_id = (await client.post("/run/flock", json=body)).json()["run_id"]
                await provider.until_called(1)
                many = {"agent_name": "text_analyzer", "batch_inputs": [inputs]}
                batch_id = (await client.post("/run/batch", json=many)).json()["batch_id"]
                await provider.until_called(2)
        before = list(provider.keys)
        provider.may_answer = True
        with running(*command, OPENAI_BASE_URL=url) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for path in (f"/run/{run_id}", f"/batch/{batch_id}"):
                    assert (await client.get(path, params={"wait": 30})).json()["status"] == "failed"
                assert before[0] == f"run:{run_id}/0/stream"
                assert sorted(provider.keys) == sorted(before * 2)
                for path in (f"/run/{run_id}", f"/batch/{batch_id}"):
                    assert (await client.post(f"{path}/retry")).status_code == 202
                    assert (await client.get(path, params={"wait": 30})).json()["status"] == "completed"
    assert provider.keys[4:] == [key.replace("/0", ":2/0", 1) for key in before]


# A run that kills its process

POISON = """
import asyncio, os, time
from flock.core import Flock

flock = Flock("poison")

@flock.agent
async def good(n: int, seconds: float) -> int:
    await asyncio.sleep(seconds)
    return n

@flock.agent
async def bad(n: int, seconds: float) -> int:
    os._exit(7)

@flock.agent
def greedy(n: int, seconds: float) -> int:
    held = []
    while True:
        held.append(os.urandom(1024 * 1024) * 20)
        time.sleep(0.1)

@flock.agent
async def item(n: int) -> int:
    if n == 777:
        os._exit(7)
    await asyncio.sleep(0.01)
    return n
"""
#: .ci/nightly sets 100,000.
POISON_ITEMS = int(os.environ.get("POISON_ITEMS", "1000"))


class Supervised:
    """A server that is started again whenever it has died, and a client that sends again what it did not receive.

    Args:
        within: a cgroup for the server.
        limit_bytes: the server is killed when its memory has this size.
    """

    def __init__(self, folder: Path, *options: str, within: Path | None = None, limit_bytes: float = math.inf) -> None:
        (folder / "poison.py").write_text(POISON)
        port = free_port()
        store = ("--store", str(folder / "flock.db"), "--max-concurrency", "500", "--drain-timeout", "1")
        self.command = flockapi_command("serve", str(folder / "poison.py"), "--port", str(port), *store, *options)
        if within is not None:
            self.command = ["sh", "-c", f'echo $$ > {within}/cgroup.procs && exec "$@"', "sh", *self.command]
        self.log = folder / "server.log"
        self.deaths = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._limit_bytes = limit_bytes
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def __enter__(self) -> "Supervised":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stops.set()
        self._thread.join()
        self.client.close()

    def _run(self) -> None:
        with self.log.open("wb") as log:
            while not self._stops.is_set():
                self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
                while self.process.poll() is None and not self._stops.wait(0.05):
                    self._kill_if_too_large(self.process.pid)
                if self._stops.is_set():
                    self.process.terminate()
                    self.process.wait()
                else:
                    self.deaths += 1

    def _kill_if_too_large(self, pid: int) -> None:
        with contextlib.suppress(OSError, ProcessLookupError):
            if int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > self._limit_bytes:
                os.kill(pid, 9)

    def lines(self, words: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if words in line]

    def request(self, method: str, path: str, **more: Any) -> Any:
        until_s = time.monotonic() + 240
        while True:
            try:
                answer = self.client.request(method, path, **more)
                assert answer.status_code in (200, 202), answer.text
                return answer.json()
            except httpx.TransportError:
                assert time.monotonic() < until_s, "the server does not answer"
                time.sleep(0.1)

    def submit(self, *agents: str, seconds: float) -> list[str]:
        """Send an asynchronous run for each of *agents*. The keys keep a run from being accepted twice."""
        run_ids = []
        for n, agent in enumerate(agents):
            body = {"agent_name": agent, "inputs": {"n": n, "seconds": seconds}, "async_run": True}
            run_ids.append(self.request("POST", "/run/flock", json=body, headers={"Idempotency-Key": str(n)})["run_id"])
        return run_ids

    def counts(self) -> Counter[str]:
        """Count all runs by ``error_type`` or status."""
        found, path = Counter[str](), "/runs?limit=1000"
        while path:
            page = self.request("GET", path)
            found.update(run["error_type"] or run["status"] for run in page["runs"])
            path = page["next"]
        return found

    def wait_for(self, timeout_s: float, **wanted: int) -> None:
        until_s = time.monotonic() + timeout_s
        while (found := self.counts()) != wanted:
            assert time.monotonic() < until_s, (found, self.deaths, self.log.read_text()[-3000:])
            time.sleep(0.2)


@pytest.mark.timeout(400)
def test_one_agent_that_exits_among_200_runs_fails_alone_with_two_workers(tmp_path: Path) -> None:
    """After at most 3 + log2(200) deaths, each of one worker."""
    with Supervised(tmp_path, "--workers", "2") as server:
        (bad, *_) = server.submit("bad", *["good"] * 200, seconds=3)
        server.wait_for(300, completed=200, crashed=1)
        (line,) = server.lines("killed its process")
        assert bad in line
        assert "agent bad" in line
        assert server.deaths == 0, "the parent stays up"
        assert len(server.lines("A new worker replaces it")) <= 3 + math.log2(200)


@contextlib.contextmanager
def memory_group(max_bytes: int) -> Iterator[Path | None]:
    """Make a cgroup whose processes the kernel kills if they use more memory; None if this user cannot."""
    for root, limit in (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")):
        group = Path(root, f"flock-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(max_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_an_agent_that_takes_all_memory_fails_alone(tmp_path: Path) -> None:
    """It takes 200 MB a second, until the kernel kills the process, beside runs that last longer than that."""
    with memory_group(10**9) as group:
        limit_bytes = math.inf if group else 1e9  # without a group, the test does what the kernel would do
        with Supervised(tmp_path, within=group, limit_bytes=limit_bytes) as server:
            server.submit("greedy", *["good"] * 20, seconds=10)
            server.wait_for(350, completed=20, crashed=1)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_two_agents_that_exit_fail_alone(tmp_path: Path) -> None:
    with Supervised(tmp_path) as server:
        server.submit("good", "bad", *["good"] * 30, "bad", seconds=1)
        server.wait_for(350, completed=31, crashed=2)
        assert server.deaths <= 2 * (3 + math.log2(33))


@pytest.mark.timeout(400)
def test_400_long_runs_after_two_kills_all_run_again_within_30_s(tmp_path: Path) -> None:
    with Supervised(tmp_path) as server:
        server.submit(*["good"] * 400, seconds=300)
        server.wait_for(60, running=400)
        for kills in (1, 2):
            assert server.process is not None
            os.kill(server.process.pid, 9)
            killed_at = time.monotonic()
            while server.deaths < kills:
                time.sleep(0.01)
            server.wait_for(60, running=400)
        assert time.monotonic() - killed_at < 30 * slowness()
        assert server.counts() == {"running": 400}


@pytest.mark.timeout(900)
def test_an_item_that_exits_fails_alone_in_its_batch(tmp_path: Path) -> None:
    with Supervised(tmp_path) as server:
        rows = "\n".join(["n", *map(str, range(POISON_ITEMS))])
        headers = {"Idempotency-Key": "b", "Content-Type": "text/csv"}
        path = "/run/batch?agent_name=item&max_workers=100"
        batch_id = server.request("POST", path, content=rows, headers=headers)["batch_id"]
        until_s = time.monotonic() + 800
        while (batch := server.request("GET", f"/batch/{batch_id}"))["status"] != "completed":
            assert time.monotonic() < until_s, batch
            time.sleep(0.5)
        assert (batch["total_items"], batch["failed_items"]) == (POISON_ITEMS, 1)
        assert server.deaths <= 3 + math.log2(100)
        (line,) = server.lines("killed its process")
        assert "agent item" in line

"""Real servers and workers, repeatedly killed with SIGKILL, lose no accepted run and repeat no committed step."""

import contextlib
import json
import os
import random
import sqlite3
import threading
import time
from pathlib import Path

import anyio
import anyio.abc
import httpx
import pytest

from tests.support import EXAMPLES, PATIENCE_S
from tests.support.servers import flockapi_command, running, workers_of
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
        os.kill(pid, 9)
        self.killed[str(pid)] = time.monotonic()

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

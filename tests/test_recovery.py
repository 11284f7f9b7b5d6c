"""Accepted is kept: real servers and workers, killed with SIGKILL again and again, lose no run and repeat no step."""

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
from tests.support.models import socket_server
from tests.support.servers import flockapi_command, running, workers_of

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
    """What was acknowledged, what was seen committed, what the agents did, and who was killed when."""

    def __init__(self, folder: Path) -> None:
        self.log, self.database = folder / "log", folder / "flock.db"
        self.sent = 0
        self.accepted: dict[str, int] = {}
        self.committed: dict[str, int] = {}  # how often each step had begun when it was seen committed
        self.killed: dict[str, float] = {}
        (folder / "crash.py").write_text(FLOCK)
        self.command = flockapi_command("serve", str(folder / "crash.py"), "--port", "0", "--store", str(self.database))

    def submit(self, client: httpx.Client) -> None:
        """Send a run. Where the server dies over it, nothing was promised."""
        n, self.sent = self.sent, self.sent + 1
        with contextlib.suppress(httpx.TransportError):
            answer = client.post("/run/flock", json={"agent_name": "first", "inputs": {"n": n}, "async_run": True})
            assert answer.status_code == 202, answer.text
            self.accepted[answer.json()["run_id"]] = n

    def kill(self, pid: int) -> None:
        os.kill(pid, 9)
        self.killed[str(pid)] = time.monotonic()

    def kill_after(self, delay_s: float, pid: int) -> threading.Timer:
        """While runs are being sent."""
        timer = threading.Timer(delay_s, self.kill, [pid])
        timer.start()
        return timer

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def look(self) -> None:
        """Note which steps are committed, and that none of those that were has begun again."""
        with contextlib.closing(sqlite3.connect(self.database)) as db:
            n = "json_extract(CAST(inputs AS TEXT), '$.n')"
            query = (
                f"SELECT {n} || '-' || steps.agent_name FROM steps JOIN runs USING (run_id) UNION "
                f"SELECT {n} || '-' || json_extract(CAST(last_step AS TEXT), '$[0]') FROM runs WHERE last_step NOT NULL"
            )
            steps = [step for (step,) in db.execute(query)]
        begun = [step for step, what, *_ in self.lines() if what == "begins"]
        for step in steps:
            times = self.committed.setdefault(step, begun.count(step))
            assert begun.count(step) == times, f"{step} was executed again after its commit"

    def wait_for_all(self, client: httpx.Client) -> None:
        """All that was acknowledged is final, and right."""
        for run_id, n in self.accepted.items():
            run = client.get(f"/run/{run_id}", params={"wait": 60}).json()
            assert (run["status"], run["result"]) == ("completed", {"result": n + 1})

    def check_no_two_at_once(self) -> None:
        """A step begins again only after the one who was at it had been killed, or had ended and not committed."""
        at_work: dict[str, str] = {}
        for step, what, pid, at in self.lines():
            if what == "begins" and step in at_work:
                assert self.killed[at_work[step]] <= float(at), f"{step} was executed by two at once"
            at_work[step] = pid
            if what == "ends":
                del at_work[step]


@pytest.mark.timeout(300)
def test_no_run_is_lost_and_no_committed_step_repeated_by_kill_minus_nine(tmp_path: Path) -> None:
    """200 asynchronous runs of two steps, 20 kills of the server at random moments."""
    ledger, chance = Ledger(tmp_path), random.Random(7)
    for life in range(20):
        with running(*ledger.command, LOG=str(ledger.log)) as server:
            timer = ledger.kill_after(chance.uniform(0.02, 0.3), server.process.pid)
            with httpx.Client(base_url=server.url, timeout=90) as client:
                while len(ledger.accepted) < RUNS * (life + 1) // 20 and timer.is_alive():
                    ledger.submit(client)
            timer.join()
            server.process.wait()
        ledger.look()
    with running(*ledger.command, LOG=str(ledger.log)) as server:
        with httpx.Client(base_url=server.url, timeout=90) as client:
            while len(ledger.accepted) < RUNS:
                ledger.submit(client)
            ledger.wait_for_all(client)
        ledger.look()
    ledger.check_no_two_at_once()
    assert len(ledger.committed) >= 2 * RUNS


@pytest.mark.timeout(300)
def test_a_killed_worker_loses_nothing_and_the_others_stay_up(tmp_path: Path) -> None:
    """200 asynchronous runs of two steps, three workers, one of them killed again and again."""
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
                with httpx.Client(base_url=server.url, timeout=90) as client:  # whoever of them takes the connection
                    ledger.submit(client)
            timer.join()
            ledger.look()
            assert others - {victim} <= set(workers_of(server)), "the others stay up"
        with httpx.Client(base_url=server.url, timeout=90) as client:
            while len(ledger.accepted) < RUNS:
                ledger.submit(client)
            ledger.wait_for_all(client)
            ledger.look()
    ledger.check_no_two_at_once()
    assert len({pid for _, _, pid, _ in ledger.lines()}) > 3, "they share the work"
    assert len(ledger.committed) >= 2 * RUNS


# What is asked of a provider again


class Provider:
    """Says nothing until it may, then refuses the key once for each call that it heard before, then answers."""

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

    async def until_asked(self, times: int) -> None:
        with anyio.fail_after(PATIENCE_S):
            while len(self.keys) < times:  # noqa: ASYNC110 - another process asks
                await anyio.sleep(0.01)


@pytest.mark.anyio
async def test_a_step_that_was_at_work_at_the_crash_asks_under_the_same_key_and_a_retry_under_another(
    tmp_path: Path,
) -> None:
    """A run and an item of a batch, whose server is killed while they wait for their model."""
    provider, inputs = Provider(), {"text": "So."}
    command = flockapi_command("serve", str(EXAMPLES / "text_analyzer.py"), "--port", "0", "--store", "keys.db")
    async with socket_server(provider.handle) as (url, _):
        with running(*command, OPENAI_BASE_URL=url) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"agent_name": "text_analyzer", "inputs": inputs, "async_run": True}
                run_id = (await client.post("/run/flock", json=body)).json()["run_id"]
                await provider.until_asked(1)
                many = {"agent_name": "text_analyzer", "batch_inputs": [inputs]}
                batch_id = (await client.post("/run/batch", json=many)).json()["batch_id"]
                await provider.until_asked(2)
        before = list(provider.keys)
        provider.may_answer = True
        with running(*command, OPENAI_BASE_URL=url) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                for path in (f"/run/{run_id}", f"/batch/{batch_id}"):
                    assert (await client.get(path, params={"wait": 30})).json()["status"] == "failed"
                assert before[0] == f"run:{run_id}/0"
                assert sorted(provider.keys) == sorted(before * 2)
                for path in (f"/run/{run_id}", f"/batch/{batch_id}"):
                    assert (await client.post(f"{path}/retry")).status_code == 202
                    assert (await client.get(path, params={"wait": 30})).json()["status"] == "completed"
    assert provider.keys[4:] == [f"{key.removesuffix('/0')}:2/0" for key in before]

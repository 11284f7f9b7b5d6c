"""Accepted is kept: a real server, killed with SIGKILL again and again, loses no run and repeats no committed step."""

import os
import random
import sqlite3
import time
from pathlib import Path

import httpx
import pytest

from tests.fakes import flockapi_command, running

FLOCK = """
import asyncio, os
from flock.core import Flock

flock = Flock("crash")
LOG = os.environ["LOG"]

def note(n: int, step: str) -> None:
    fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{n} {step}\\n".encode())
    os.close(fd)

@flock.agent(next_agent="second")
async def first(n: int) -> int:
    note(n, "first")
    await asyncio.sleep(0.01)
    return n

@flock.agent
def second(n: int) -> int:
    note(n, "second")
    return n + 1
"""


@pytest.mark.timeout(300)
def test_no_run_is_lost_and_no_committed_step_repeated_by_kill_minus_nine(tmp_path: Path) -> None:
    """200 asynchronous runs of two steps, 20 kills at random moments."""
    (tmp_path / "crash.py").write_text(FLOCK)
    log, database = tmp_path / "log", tmp_path / "flock.db"
    command = flockapi_command("serve", str(tmp_path / "crash.py"), "--port", "0", "--store", str(database))
    chance = random.Random(7)
    accepted: dict[str, int] = {}
    committed: dict[str, int] = {}  # lines of the log about each step that was seen committed, when it was seen

    def lines() -> list[str]:
        return log.read_text().splitlines() if log.exists() else []

    def submit(client: httpx.Client) -> None:
        n = len(accepted)
        answer = client.post("/run/flock", json={"agent_name": "first", "inputs": {"n": n}, "async_run": True})
        assert answer.status_code == 202
        accepted[answer.json()["run_id"]] = n

    for life in range(21):
        with running(*command, LOG=str(log)) as server:
            died_at = time.monotonic() + chance.uniform(0.02, 0.3)
            with httpx.Client(base_url=server.url, timeout=30) as client:
                while len(accepted) < 10 * (life + 1) and len(accepted) < 200 and time.monotonic() < died_at:
                    submit(client)
                if life < 20:
                    time.sleep(max(0.0, died_at - time.monotonic()))
                else:
                    deadline = time.monotonic() + 120
                    while len(accepted) < 200:
                        submit(client)
                    for run_id, n in accepted.items():
                        while (run := client.get(f"/run/{run_id}").json())["status"] in ("starting", "running"):
                            assert time.monotonic() < deadline
                        assert (run["status"], run["result"]) == ("completed", {"result": n + 1})
            os.kill(server.process.pid, 9)
            server.process.wait()
        seen = lines()
        for step, times in committed.items():
            assert seen.count(step) == times, f"{step} was executed again after its commit"
        with sqlite3.connect(database) as db:
            steps = db.execute(
                "SELECT agent_name, json_extract(CAST(inputs AS TEXT), '$.n') FROM (SELECT steps.agent_name, inputs "
                "FROM steps JOIN runs USING (run_id))"
            ).fetchall()
        db.close()
        for agent_name, n in steps:
            committed.setdefault(f"{n} {agent_name}", seen.count(f"{n} {agent_name}"))
    assert len(accepted) == 200
    assert len(committed) >= 400

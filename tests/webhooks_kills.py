"""No event is lost: runs with webhooks, a server that is killed every two seconds, and a receiver that fails a third.

    python -m tests.webhooks_kills --runs 2000

Raises AssertionError if an event of a run did not arrive, arrived before an earlier one of its run, was not signed, or
reports a state that the store does not have.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import anyio
import httpx
from starlette.responses import Response

from tests.support import ROOT
from tests.support.receivers import SECRET, Inbox
from tests.support.servers import flockapi_command, free_port

TARGET = """
from flock.core import Flock
from flock.errors import AgentError
from flock.runs import RunContext

flock = Flock("kills")


@flock.agent
async def work(context: RunContext, n: int) -> int:
    if n % 4 == 0:
        raise AgentError("it fails")
    if n % 4 == 1:
        await context.ask("Go on?", bool, expires_s=0.5, default=True)
    return n
"""
CLIENTS = 63  # so that each submits runs of all kinds
#: The events of a run with such an *n*, modulo 4, in the order in which they happen.
EVENTS = defaultdict(
    lambda: ["run.completed"], {0: ["run.failed"], 1: ["run.waiting", "question.expired", "run.completed"]}
)


class Kills:
    def __init__(self, folder: Path, receiver: str) -> None:
        self._folder, self._receiver = folder, receiver
        self.url, self.count = f"http://127.0.0.1:{free_port()}", 0
        (folder / "target.py").write_text(TARGET)

    def start(self) -> "subprocess.Popen[bytes]":
        port = self.url.rpartition(":")[2]
        options = ["--port", port, "--store", "flock.db", "--webhook-url", f"{self._receiver}/hook"]
        env = {**os.environ, "FLOCK_WEBHOOK_SECRETS": SECRET, "PYTHONPATH": str(ROOT)}
        command = flockapi_command("serve", "target.py", *options)
        with open(self._folder / "log", "ab") as log:
            return subprocess.Popen(command, cwd=self._folder, env=env, stdout=log, stderr=log)

    async def is_up(self, client: httpx.AsyncClient) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get("/readyz")).status_code == 200:
                    return
            await anyio.sleep(0.05)

    async def kill_forever(self, every_s: float) -> None:
        """Restart the server, and kill it after that time, until cancelled. Then kill it a last time."""
        async with httpx.AsyncClient(base_url=self.url) as client:
            while True:
                process = self.start()
                try:
                    await self.is_up(client)
                    await anyio.sleep(every_s)
                finally:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                self.count += 1


async def submit(client: httpx.AsyncClient, numbers: Any) -> None:
    for n in numbers:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                body = {"agent_name": "work", "inputs": {"n": n}, "async_run": True}
                sent = await client.post("/run/flock", json=body, headers={"idempotency-key": f"run-{n}"})
                if sent.status_code in (200, 202):  # 200: it had ended before its client heard of it
                    break
            await anyio.sleep(0.02)


def pending(store: Path) -> tuple[int, int]:
    """Return how many runs have not ended, and how many webhooks are not sent."""
    with contextlib.closing(sqlite3.connect(store)) as db:
        (runs,) = db.execute("SELECT count(*) FROM runs WHERE status IN ('starting', 'running', 'waiting')").fetchone()
        return runs, db.execute("SELECT count(*) FROM webhooks WHERE status != 'sent'").fetchone()[0]


def check(inbox: Inbox, store: Path, runs: int) -> None:
    with contextlib.closing(sqlite3.connect(store)) as db:
        ended = {run_id: json.loads(inputs)["n"] for run_id, inputs in db.execute("SELECT run_id, inputs FROM runs")}
        written = {id_: about for id_, *about in db.execute("SELECT webhook_id, record_id, type FROM webhooks")}
    assert sorted(ended.values()) == list(range(runs))
    assert inbox.unsigned == 0
    assert set(inbox.ids) == set(written), "each at least once, and none of a state that is not in the store"
    seen = defaultdict[str, list[str]](list)
    known = set[str]()
    for webhook_id, event in zip(inbox.ids, inbox.accepted, strict=True):
        if webhook_id not in known:
            known.add(webhook_id)
            assert written[webhook_id] == [event["data"]["run_id"], event["type"]]
            seen[event["data"]["run_id"]].append(event["type"])
    assert {run_id: seen[run_id] for run_id in ended} == {run_id: EVENTS[n % 4] for run_id, n in ended.items()}


async def play(runs: int, every_s: float = 2) -> None:
    chance = random.Random(runs)
    inbox = Inbox(lambda number, event: Response(status_code=500 if chance.random() < 1 / 3 else 200))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "flock.db"
        async with inbox.serve() as receiver, anyio.create_task_group() as tasks:
            kills = Kills(Path(folder), receiver.url)
            tasks.start_soon(kills.kill_forever, every_s)
            async with httpx.AsyncClient(base_url=kills.url) as client, anyio.create_task_group() as clients:
                for first in range(CLIENTS):
                    clients.start_soon(submit, client, range(first, runs, CLIENTS))
            while any(left := pending(store)) or not kills.count:
                print(f"{kills.count} kills, {left[0]} runs and {left[1]} webhooks are left", flush=True)
                await anyio.sleep(2)
            tasks.cancel_scope.cancel()
        check(inbox, store, runs)
    print(
        f"{runs:,} runs, {kills.count} kills: {len(set(inbox.ids)):,} events, accepted in {len(inbox.ids):,} of "
        f"{len(inbox.requests):,} requests, all signed, in order for each run"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    anyio.run(play, parser.parse_args().runs)

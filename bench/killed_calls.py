"""Kill the process that executes runs, at random moments: is a call that was stored ever made again?

    python -m bench.killed_calls               # on SQLite
    python -m bench.killed_calls --temporal    # on a Temporal server of its own

100 runs of a model agent make 5 model calls and 10 tool calls each. A fake model server counts its requests, and the
tools write each execution to a file. At each kill, the stored calls are read: from the store, or from the cluster.
None of them may be made again. Calls that were in flight may be, and their number is printed. Exits with 1 if a stored
call was made again, or a run did not complete.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from flock.core import Flock, FlockFactory
from flock.runs import RunContext, Usage
from flock.testing import FakeModel, ModelRequest, Reply
from tests.support.cluster import temporal_server
from tests.support.servers import Server, flockapi_command, free_port, running

#: The number of tool calls in each reply of the model. The fifth reply is the answer.
CALLS_PER_REPLY = (3, 3, 2, 2)
MODEL_S = (0.1, 0.3)
TOOL_S = (0.02, 0.1)
#: How many calls a process makes before its kill.
CALLS_BEFORE_KILL = (50, 250)
TIMEOUT_S = 300

# The agent. ``flockapi serve`` and ``flockapi worker`` load this file.


async def look_up(number: int, context: RunContext) -> int:
    """Look up a number."""
    with open(os.environ["CALLS_LOG"], "a") as log:  # noqa: ASYNC230 - it takes microseconds
        log.write(f"{context.idempotency_key}\n")
    await asyncio.sleep(random.uniform(*TOOL_S))
    return number


flock = Flock("killed calls", model="ollama/fake")
flock.add_agent(FlockFactory.create_default_agent("ask", input="question", output="answer", tools=[look_up]))

# The model


async def reply(request: ModelRequest) -> Reply:
    await asyncio.sleep(random.uniform(*MODEL_S))
    number = sum("tool_calls" in message for message in request["messages"])
    if not request.tool_names:  # after ten calls, no more are offered
        return Reply({"answer": "done"}, usage=Usage(input_tokens=1, output_tokens=1))
    calls = [("look_up", {"number": n}) for n in range(CALLS_PER_REPLY[number])]
    return Reply(calls=calls, usage=Usage(input_tokens=1, output_tokens=1))


def keys_of(model: FakeModel) -> list[str]:
    """Return the idempotency key of each request."""
    return [request.headers["idempotency-key"] for request in model.requests]


def key_of(run_id: str, call_id: str) -> str:
    """Return the idempotency key of a stored call."""
    name, _, number = call_id.partition(":")
    if name == "look_up":
        return f"run:{run_id}/0/{call_id}"
    return f"run:{run_id}/0" if number == "1" else f"run:{run_id}/0/{number}"


def last_key_of(run_id: str) -> str:
    """Return the key of the answer, which is stored with the end of its run."""
    return key_of(run_id, f"model:{len(CALLS_PER_REPLY) + 1}")


# The engines


class OnSQLite:
    """Kills the server."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._store = folder / "flock.db"
        self._env = env
        self._port = free_port()

    @contextlib.contextmanager
    def doomed(self) -> Iterator[Server]:
        command = flockapi_command("serve", __file__, "--store", str(self._store), "--max-concurrency", "20")
        with running(*command, "--port", str(self._port), **self._env) as server:
            yield server

    @contextlib.contextmanager
    def api(self) -> Iterator[str]:
        yield f"http://127.0.0.1:{self._port}"

    def stored(self, run_ids: list[str]) -> set[str]:
        with contextlib.closing(sqlite3.connect(self._store)) as db:
            calls = {key_of(*row) for row in db.execute("SELECT run_id, call_id FROM calls")}
            ended = {last_key_of(*row) for row in db.execute("SELECT run_id FROM runs WHERE status = 'completed'")}
            return calls | ended


class OnTemporal:
    """Kills the worker."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._folder = folder
        self._env = env
        self._address = f"127.0.0.1:{free_port()}"
        self._url = ""

    @contextlib.contextmanager
    def doomed(self) -> Iterator[Server]:
        command = flockapi_command("worker", __file__, "--temporal", self._address, "--max-concurrency", "20")
        with running_worker(command, self._env) as worker:
            yield worker

    @contextlib.contextmanager
    def api(self) -> Iterator[str]:
        serve = flockapi_command("serve", __file__, "--temporal", self._address, "--port", "0")
        port = int(self._address.rpartition(":")[2])
        with temporal_server(self._folder / "temporal.db", port), running(*serve, **self._env) as server:
            self._url = server.url
            yield server.url

    def stored(self, run_ids: list[str]) -> set[str]:
        found: set[str] = set()
        with httpx.Client(base_url=self._url, timeout=60) as client:
            for run_id in run_ids:
                run = client.get(f"/run/{run_id}").raise_for_status().json()
                of_steps = [call for step in run["steps"] for call in step.get("calls", [])]
                found |= {key_of(run_id, call["call_id"]) for call in (*of_steps, *run.get("calls", []))}
                if run["status"] == "completed":
                    found.add(last_key_of(run_id))
        return found


@contextlib.contextmanager
def running_worker(command: list[str], env: dict[str, str]) -> Iterator[Server]:
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    worker = Server(process)
    try:
        worker.wait_for_line("Worker connected to")
        yield worker
    finally:
        process.kill()
        process.wait()
        worker.close()


# The measurement


def submit(url: str, count: int) -> list[str]:
    with httpx.Client(base_url=url, timeout=60) as client:
        body = {"agent_name": "ask", "inputs": {"question": "?"}, "async_run": True}
        return [client.post("/run/flock", json=body).raise_for_status().json()["run_id"] for _ in range(count)]


def until_ended(url: str, run_ids: list[str]) -> list[Any]:
    """Wait for each run, and return those that did not complete."""
    with httpx.Client(base_url=url, timeout=60) as client:
        runs = [client.get(f"/run/{run_id}", params={"wait": 10}).raise_for_status().json() for run_id in run_ids]
        return [run for run in runs if run["status"] != "completed"]


def measure(engine: OnSQLite | OnTemporal, model: FakeModel, log: Path, count: int) -> int:
    run_ids: list[str] = []
    all_calls = count * (len(CALLS_PER_REPLY) + 1 + sum(CALLS_PER_REPLY))
    kills: list[tuple[set[str], int, int]] = []
    until = time.monotonic() + TIMEOUT_S

    def counts() -> tuple[int, int]:
        return len(model.requests), len(log.read_text().split())

    def distinct() -> int:
        return len(set(keys_of(model))) + len(set(log.read_text().split()))

    with engine.api() as url:
        while True:
            with engine.doomed() as process:
                run_ids = run_ids or submit(url, count)
                enough = sum(counts()) + random.randrange(*CALLS_BEFORE_KILL)
                while distinct() < all_calls and sum(counts()) < enough and time.monotonic() < until:
                    time.sleep(random.uniform(0, 0.02))
                if distinct() == all_calls:
                    unfinished = until_ended(url, run_ids)
                    break
                if time.monotonic() > until:
                    print(f"The runs did not complete within {TIMEOUT_S} s.")
                    return 1
                os.kill(process.process.pid, signal.SIGKILL)
                process.process.wait()
                time.sleep(2 * MODEL_S[1])  # requests that are on their way reach the model
                print(f"kill {len(kills) + 1}: {distinct()} of {all_calls} calls made", file=sys.stderr)
                kills.append((engine.stored(run_ids), *counts()))
    tools = log.read_text().split()
    again = {
        key
        for stored, models_before, tools_before in kills
        for key in (*keys_of(model)[models_before:], *tools[tools_before:])
        if key in stored
    }
    for run in unfinished:
        print(run["run_id"], run["status"], run["error"])
    print(f"{len(run_ids) - len(unfinished)} of {len(run_ids)} runs completed. {len(kills)} kills.")
    print(f"{distinct()} of {all_calls} calls were made.")
    print(f"{sum(counts()) - distinct()} calls that were in flight at a kill were made again.")
    print(f"{len(again)} stored calls were made again.")
    return int(bool(again or unfinished) or distinct() != all_calls)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temporal", action="store_true", help="on a Temporal server instead of SQLite")
    parser.add_argument("--runs", type=int, default=100, help="number of runs")
    options = parser.parse_args()
    model = FakeModel(reply)
    with tempfile.TemporaryDirectory() as folder, model.serve() as model_url:
        log = Path(folder, "calls.log")
        log.touch()
        env = {"CALLS_LOG": str(log), "OLLAMA_BASE_URL": model_url}
        kind = OnTemporal if options.temporal else OnSQLite
        return measure(kind(Path(folder), env), model, log, options.runs)


if __name__ == "__main__":
    sys.exit(main())

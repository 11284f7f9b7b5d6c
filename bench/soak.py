"""Use everything at once for ten minutes: does the server fail, lose or leak a run, or grow?

    python -m bench.soak                   # --minutes 1 for a short try

Callers of two principals use the whole API of a ``flockapi serve`` in its own process, each as fast as it gets
responses: runs, batches, uploads, downloads, waits, event streams, cancels, retries, deletes, lists, replays, broken
connections, and all kinds of bad input. The store keeps all runs, so it grows on disk, but memory must not grow.

Each response must have the expected status. At the end, each acknowledged run and batch must exist once, in a final
state, and only for its principal. Memory at the end may be a fifth higher than after a fifth of the time (minute two of
ten), when all code has run and all caches are full. Linux only: memory is read from /proc. Exits with 1 if a check
fails.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import httpx

from flock.core import Flock
from flock.errors import AgentError
from flock.runs import RunContext
from flock.web.auth import new_key

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 60
#: How long runs may continue after the load has stopped, in seconds.
SETTLE_S = 60
#: Memory is compared between this share of the time and the end. Each value is the median of a window, and the ratio
#: has a limit.
SETTLED_AFTER = 0.2
WINDOW_S = 15
MAX_GROWTH = 1.2
#: How many failures are printed, and how many characters of each.
MAX_SHOWN, MAX_LENGTH = 20, 600
FINAL = ("completed", "failed", "cancelled")

# The agents. ``flockapi serve`` loads this file.

flock = Flock("soak")


@flock.agent
async def add(a: int, b: int = 2) -> int:
    return a + b


@flock.agent
async def nap(seconds: float, context: RunContext) -> str:
    context.progress(0, 1, "asleep")
    await anyio.sleep(seconds)
    return "awake"


@flock.agent
def think(seconds: float) -> str:
    time.sleep(seconds)
    return "thought"


@flock.agent
async def repeat(text: str, times: int) -> str:
    return text * times


@flock.agent(next_agent="second")
async def first(n: int) -> int:
    return n


@flock.agent
async def second(result: int) -> int:
    return result + 1


@flock.agent
async def shaky(context: RunContext) -> str:
    if context.attempt == 1:
        raise AgentError("Not at the first attempt.")
    return "done"


@flock.agent
async def explode() -> str:
    raise ValueError("boom")


#: Quick runs: agent, inputs, result.
QUICK: Sequence[tuple[str, dict[str, Any], Any]] = [
    ("add", {"a": 1}, 3),
    ("think", {"seconds": 0.005}, "thought"),
    ("repeat", {"text": "ab", "times": 5000}, "ab" * 5000),
    ("first", {"n": 1}, 2),
    ("explode", {}, None),
]


# Callers


class Unexpected(Exception):
    """The server did not behave as expected."""


class Ledger:
    """The runs and batches that one principal must find at the end."""

    def __init__(self) -> None:
        self.runs: set[str] = set()
        self.deleted: set[str] = set()
        self.batches: dict[str, int] = {}
        #: Requests whose response was not read, with the possible final statuses of their run, if it exists.
        self.abandoned: dict[str, Sequence[str]] = {}


class Caller:
    """A client that runs one operation after another. A principal has several callers."""

    def __init__(self, url: str, key: str, own: Ledger, foreign: Ledger, tally: Counter[tuple[str, str]]) -> None:
        self.own = own
        self.foreign = foreign
        self.operation = ""
        self.final: list[str] = []
        self.key = key
        self.port = int(url.rpartition(":")[2])
        self._tally = tally
        # The server closes idle connections after 5 s, possibly just when one is used again.
        limits = httpx.Limits(keepalive_expiry=2)
        self._client = httpx.AsyncClient(base_url=url, timeout=ANSWER_TIMEOUT_S, limits=limits)

    async def request(
        self, method: str, path: str, *expected: int, headers: dict[str, str] | None = None, **more: Any
    ) -> httpx.Response:
        """Send a request. Raises Unexpected unless the status is one of *expected*."""
        try:
            response = await self._client.request(
                method, path, headers={"X-API-Key": self.key, **(headers or {})}, **more
            )
        except httpx.TransportError as exc:
            self.count(type(exc).__name__)
            raise Unexpected(f"{method} {path}: {exc!r}") from exc
        self.count(str(response.status_code))
        if response.status_code not in expected:
            raise Unexpected(f"{method} {path}: {response.status_code}, not {expected}: {response.text[:500]}")
        return response

    def count(self, outcome: str) -> None:
        self._tally[self.operation, outcome] += 1

    async def start(self, agent_name: str, inputs: dict[str, Any]) -> str:
        """Start an asynchronous run."""
        body = {"agent_name": agent_name, "inputs": inputs, "async_run": True}
        run_id: str = (await self.request("POST", "/run/flock", 202, json=body)).json()["run_id"]
        self.own.runs.add(run_id)
        return run_id

    async def end(self, run_id: str, *statuses: str) -> Any:
        """Wait for the end of a run."""
        run = (await self.request("GET", f"/run/{run_id}?wait=30", 200)).json()
        check(run["status"] in statuses, f"run {run_id} is {run['status']}, not {statuses}")
        self.final.append(run_id)
        return run

    async def aclose(self) -> None:
        await self._client.aclose()


def check(condition: bool, message: str) -> None:
    if not condition:
        raise Unexpected(message)


# Operations

Operation = Callable[[Caller], Awaitable[None]]
OPERATIONS: dict[Operation, int] = {}


def operation(weight: int) -> Callable[[Operation], Operation]:
    """Register an operation. An operation of weight 2 runs twice as often as one of weight 1."""

    def add_operation(function: Operation) -> Operation:
        OPERATIONS[function] = weight
        return function

    return add_operation


@operation(20)
async def run(caller: Caller) -> None:
    agent_name, inputs, result = random.choice(QUICK)
    response = await caller.request("POST", "/run/flock", 200, json={"agent_name": agent_name, "inputs": inputs})
    caller.own.runs.add(response.json()["run_id"])
    check(response.json()["result"] == (None if result is None else {"result": result}), response.text[:500])
    caller.final.append(response.json()["run_id"])


@operation(10)
async def start_and_wait(caller: Caller) -> None:
    agent_name, inputs, result = random.choice([*QUICK, ("nap", {"seconds": random.uniform(0, 0.5)}, "awake")])
    run = await caller.end(await caller.start(agent_name, inputs), "completed", "failed")
    check(run["result"] == (None if result is None else {"result": result}), str(run)[:500])


@operation(5)
async def start_without_waiting(caller: Caller) -> None:
    await caller.start("nap", {"seconds": random.uniform(0, 3)})


@operation(5)
async def prefer(caller: Caller) -> None:
    body = {"agent_name": "nap", "inputs": {"seconds": random.uniform(0, 2)}}
    headers = {"Prefer": "respond-async, wait=1"}
    response = await caller.request("POST", "/run/flock", 200, 202, json=body, headers=headers)
    caller.own.runs.add(response.json()["run_id"])


@operation(5)
async def batch(caller: Caller) -> None:
    agent_name, item, _ = random.choice(QUICK)
    items = [item] * random.randint(1, 50)
    body = {"agent_name": agent_name, "batch_inputs": items}
    batch_id = (await caller.request("POST", "/run/batch", 202, json=body)).json()["batch_id"]
    caller.own.batches[batch_id] = len(items)
    for _ in range(random.randint(0, 3)):
        found = (await caller.request("GET", f"/batch/{batch_id}", 200)).json()
        check(found["completed_items"] <= found["total_items"] == len(items), str(found)[:500])


@operation(3)
async def upload(caller: Caller) -> None:
    """Upload CSV or NDJSON rows, retry failed ones, download the results, and sometimes delete the batch."""
    count = random.randint(1, 300)
    csv_body = "a,b\r\n" + "".join(f"{n},{n}\r\n" for n in range(count))
    lines = "".join("{}\n" for _ in range(count))
    agent_name, body, media_type = random.choice(
        [("add", csv_body, "text/csv"), ("shaky", lines, "application/x-ndjson")]
    )
    path = f"/run/batch?agent_name={agent_name}&max_workers=20"
    accepted = await caller.request("POST", path, 202, content=body, headers={"Content-Type": media_type})
    batch_id = accepted.json()["batch_id"]
    caller.own.batches[batch_id] = count
    ended = (await caller.request("GET", f"/batch/{batch_id}?wait=30&results=false", 200)).json()
    check(ended["status"] == ("failed" if agent_name == "shaky" else "completed"), str(ended))
    if agent_name == "shaky":
        await caller.request("POST", f"/batch/{batch_id}/retry", 202, json={"only": "failed"})
        ended = (await caller.request("GET", f"/batch/{batch_id}?wait=30&results=false", 200)).json()
        check((ended["status"], ended["attempt"], ended["failed_items"]) == ("completed", 2, 0), str(ended))
    table = (await caller.request("GET", f"/batch/{batch_id}/results", 200, headers={"Accept": "text/csv"})).text
    check(table.count("\r\n") == count + 1 and table.count(",completed,") == count, table[:500])
    text = (await caller.request("GET", f"/batch/{batch_id}/events", 200)).text
    check(text.count("event: batch.completed") == 1, text)
    if random.random() < 0.5:
        del caller.own.batches[batch_id]
        await caller.request("DELETE", f"/batch/{batch_id}", 204)
        await caller.request("GET", f"/batch/{batch_id}", 404)


@operation(2)
async def cancel_batch(caller: Caller) -> None:
    body = {"agent_name": "nap", "batch_inputs": [{"seconds": 60}] * 100, "max_workers": 3}
    batch_id = (await caller.request("POST", "/run/batch", 202, json=body)).json()["batch_id"]
    caller.own.batches[batch_id] = 100
    await asyncio.sleep(random.uniform(0, 0.2))
    await caller.request("DELETE", f"/batch/{batch_id}", 409)
    ended = (await caller.request("POST", f"/batch/{batch_id}/cancel?wait=20", 200)).json()
    check((ended["status"], ended["cancelled_items"]) == ("cancelled", 100), str(ended))


@operation(5)
async def events(caller: Caller) -> None:
    """Read a stream to its end, then reconnect as a browser does."""
    run_id = await caller.start("nap", {"seconds": random.uniform(0, 0.5)})
    text = (await caller.request("GET", f"/run/{run_id}/events", 200)).text
    names, ids = re.findall(r"^event: (.*)$", text, re.MULTILINE), re.findall(r"^id: (\d+)$", text, re.MULTILINE)
    ends = [name for name in names if name.removeprefix("run.") in FINAL]
    check(ends == names[-1:] and ids == sorted(set(ids), key=int), text[:500])
    await caller.request("GET", f"/run/{run_id}/events", 204, headers={"Last-Event-ID": ids[-1]})
    caller.final.append(run_id)


@operation(5)
async def cancel(caller: Caller) -> None:
    """Cancel a run while others wait for it and read its events."""
    run_id = await caller.start("nap", {"seconds": 60})
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(caller.end(run_id, "cancelled"))
        reading = tasks.create_task(caller.request("GET", f"/run/{run_id}/events", 200))
        await asyncio.sleep(random.uniform(0, 0.2))
        await caller.request("POST", f"/run/{run_id}/cancel", 200, 202)
    check(waiting.result()["error_type"] == "cancelled", str(waiting.result()))
    check(reading.result().text.count("event: run.cancelled") == 1, reading.result().text)
    await caller.request("POST", f"/run/{run_id}/cancel?wait=10", 200)
    finished = await caller.start("add", {"a": 1})
    await caller.end(finished, "completed")
    await caller.request("POST", f"/run/{finished}/cancel", 409)


@operation(5)
async def retry(caller: Caller) -> None:
    run_id = await caller.start("shaky", {})
    await caller.end(run_id, "failed")
    await caller.request("POST", f"/run/{run_id}/retry", 202)
    run = await caller.end(run_id, "completed")
    check(run["attempt"] == 2, str(run))
    await caller.request("POST", f"/run/{run_id}/retry", 409)


@operation(5)
async def delete(caller: Caller) -> None:
    active = await caller.start("nap", {"seconds": 60})
    await caller.request("DELETE", f"/run/{active}", 409)
    await caller.request("POST", f"/run/{active}/cancel?wait=10", 200)
    for run_id in (active, *caller.final[:1]):
        caller.own.runs.discard(run_id)
        caller.own.deleted.add(run_id)
        caller.final = [kept for kept in caller.final if kept != run_id]
        await caller.request("DELETE", f"/run/{run_id}", 204)
        await caller.request("GET", f"/run/{run_id}", 404)


@operation(5)
async def list_runs(caller: Caller) -> None:
    filters = ["limit=50&status=completed", "status=running", "agent_name=add&include=result", "limit=1000"]
    path = f"/runs?{random.choice(filters)}"
    for _ in range(3):
        page = (await caller.request("GET", path, 200)).json()
        foreign = [run["run_id"] for run in page["runs"] if run["run_id"] in caller.foreign.runs]
        check(not foreign, f"{path} shows runs of the other principal: {foreign[:3]}")
        if (path := page["next"]) is None:
            break


@operation(5)
async def replay(caller: Caller) -> None:
    body: dict[str, Any] = {"agent_name": "add", "inputs": {"a": 1}, "async_run": random.random() < 0.5}
    path, id_ = "/run/flock", "run_id"
    if random.random() < 0.3:
        body, path, id_ = {"agent_name": "add", "batch_inputs": [{"a": 1}] * 3}, "/run/batch", "batch_id"
    headers = {"Idempotency-Key": str(uuid4())}
    first = await caller.request("POST", path, 200, 202, json=body, headers=headers)
    accepted_id = first.json()[id_]
    if id_ == "run_id":
        caller.own.runs.add(accepted_id)
    else:
        caller.own.batches[accepted_id] = 3
    again = await caller.request("POST", path, 200, 202, json=body, headers=headers)
    check(again.json()[id_] == accepted_id and again.headers.get("Idempotency-Replayed") == "true", again.text[:500])
    await caller.request("POST", path, 422, json={**body, "agent_name": "nap"}, headers=headers)


@operation(5)
async def use_foreign_ids(caller: Caller) -> None:
    """Request runs and batches of the other principal in every way."""
    runs, batches = list(caller.foreign.runs), list(caller.foreign.batches)
    if not runs or not batches:
        return
    run_id = random.choice(runs)
    for method, path in (
        ("GET", ""),
        ("GET", "?wait=5"),
        ("GET", "/events"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
        ("DELETE", ""),
    ):
        await caller.request(method, f"/run/{run_id}{path}", 404)
    batch_id = random.choice(batches)
    for below in ("", "/results", "/events"):
        await caller.request("GET", f"/batch/{batch_id}{below}", 404)
    await caller.request("DELETE", f"/batch/{batch_id}", 404)


@operation(10)
async def disconnect(caller: Caller) -> None:
    """Disconnect at a random moment: during the request body, before the response, or during it."""
    request_id, is_async = uuid4().hex, random.random() < 0.5
    seconds = 1 if is_async else 60
    body = json.dumps({"agent_name": "nap", "inputs": {"seconds": seconds}, "async_run": is_async})
    path, sent, statuses = "/run/flock", body, ["completed" if is_async else "cancelled"]
    match random.choice(["half", "run", "wait", "events"]):
        case "half":
            sent, statuses = body[: len(body) // 2], []
        case "wait" | "events" as how:
            run_id = await caller.start("nap", {"seconds": random.uniform(0, 1)})
            path, body, sent = f"/run/{run_id}" + ("?wait=30" if how == "wait" else "/events"), "", ""
    head = [f"{'POST' if body else 'GET'} {path} HTTP/1.1", "Host: localhost", f"X-API-Key: {caller.key}"]
    head += [f"X-Request-ID: {request_id}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    caller.own.abandoned[request_id] = statuses
    async with await anyio.connect_tcp("127.0.0.1", caller.port) as stream:
        await stream.send("\r\n".join([*head, "", sent]).encode())
        await asyncio.sleep(random.choice([0, random.uniform(0, 0.5)]))
    caller.count("abandoned")


@operation(3)
async def look_around(caller: Caller) -> None:
    for path in ("/agents", "/agents/add", "/healthz", "/readyz", "/openapi.json", "/openapi.yaml", "/docs"):
        await caller.request("GET", path, 200)


JSON = {"Content-Type": "application/json"}
ADD = {"agent_name": "add", "inputs": {"a": 1}}
UNKNOWN = "/run/01a20e41-e4ec-74f9-8450-7dd74efe56ba"
#: What is wrong, the expected status, and the request.
BAD_INPUT: Sequence[tuple[str, int, str, str, dict[str, Any]]] = [
    ("malformed JSON", 400, "POST", "/run/flock", {"content": '{"agent_name": "add",}', "headers": JSON}),
    ("not UTF-8", 400, "POST", "/run/flock", {"content": b'{"agent_name": "\xff"}', "headers": JSON}),
    ("no body", 400, "POST", "/run/batch", {"content": "", "headers": JSON}),
    ("nested deep", 400, "POST", "/run/flock", {"content": '{"inputs":' + "[" * 50_000, "headers": JSON}),
    ("wrong type", 422, "POST", "/run/flock", {"json": {"agent_name": "add", "inputs": {"a": "x"}}}),
    ("field missing", 422, "POST", "/run/flock", {"json": {"agent_name": "add"}}),
    ("field unknown", 422, "POST", "/run/flock", {"json": {**ADD, "color": "red"}}),
    ("item of a wrong type", 422, "POST", "/run/batch", {"json": {"agent_name": "add", "batch_inputs": [{"a": []}]}}),
    (
        "invalid rows",
        422,
        "POST",
        "/run/batch?agent_name=add",
        {"content": "a,b\n1,x\n2\n", "headers": {"Content-Type": "text/csv"}},
    ),
    ("batch of a file", 422, "POST", "/run/batch", {"json": {"agent_name": "add", "batch_inputs": "/etc/passwd"}}),
    ("query", 422, "GET", "/runs?limit=0", {}),
    ("unknown agent", 404, "POST", "/run/flock", {"json": {"agent_name": "nobody"}}),
    ("unknown run", 404, "GET", f"{UNKNOWN}?wait=5", {}),
    ("unknown run", 404, "DELETE", UNKNOWN, {}),
    ("unknown path", 404, "GET", "/nowhere", {}),
    ("wrong method", 405, "PUT", "/run/flock", {"json": ADD}),
    ("body too long", 413, "POST", "/run/flock", {"content": b" " * 2**21, "headers": JSON}),
    ("headers too long", 431, "GET", "/runs", {"headers": {"X-Long": "x" * 66_000}}),
    ("content type", 415, "POST", "/run/flock", {"content": json.dumps(ADD), "headers": {"Content-Type": "text/csv"}}),
    ("wrong key", 401, "POST", "/run/flock", {"json": ADD, "headers": {"X-API-Key": "fk_of_nobody_at_all"}}),
    ("no key", 401, "GET", "/runs", {"headers": {"X-API-Key": ""}}),
    ("not an admin", 403, "GET", "/metrics", {}),
    ("foreign page", 403, "POST", "/run/flock", {"json": ADD, "headers": {"Origin": "http://evil.example"}}),
    ("idempotency key", 400, "POST", "/run/flock", {"json": ADD, "headers": {"Idempotency-Key": "a b"}}),
]


@operation(15)
async def bad_input(caller: Caller) -> None:
    error, status, method, path, request = random.choice(BAD_INPUT)
    caller.operation = f"bad: {error}"
    response = await caller.request(method, path, status, **request)
    check(response.headers["Content-Type"] == "application/problem+json", f"{error}: {response.headers}")
    check(response.json()["status"] == status, response.text)


# The soak


class Soak:
    """Counts of requests, failures, and the memory of the server at each second."""

    def __init__(self, url: str, pid: int, keys: dict[str, str]) -> None:
        self.tally: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self.memory_kib: list[int] = []
        self.health_s: list[float] = []
        self.ledgers = {name: Ledger() for name in keys}
        self._url = url
        self._pid = pid
        self._keys = keys

    async def load(self, minutes: float, callers: int) -> None:
        names = list(self._keys)
        until = time.monotonic() + 60 * minutes
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(until))
            for number in range(callers):
                tasks.create_task(self._call(names[number % 2], names[1 - number % 2], until))

    @contextlib.asynccontextmanager
    async def caller(self, name: str, other: str) -> AsyncIterator[Caller]:
        caller = Caller(self._url, self._keys[name], self.ledgers[name], self.ledgers[other], self.tally)
        try:
            yield caller
        finally:
            await caller.aclose()

    async def _call(self, name: str, other: str, until: float) -> None:
        async with self.caller(name, other) as caller:
            while time.monotonic() < until:
                (chosen,) = random.choices(list(OPERATIONS), list(OPERATIONS.values()))
                caller.operation = chosen.__name__.replace("_", " ")
                try:
                    await chosen(caller)
                except* Unexpected as group:
                    self.failures += [f"{caller.operation}: {exc}" for exc in group.exceptions]
                del caller.final[:-100]

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(1)
            self.health_s.append(await health_s(self._url))
            self.memory_kib.append(memory_kib(self._pid))
            if len(self.memory_kib) % 60 == 0:
                print(f"{len(self.memory_kib) // 60:3} min {self._progress()}", flush=True)

    def _progress(self) -> str:
        return f"{self.tally.total():8} requests {self.memory_kib[-1] / 1024:7.1f} MiB {len(self.failures):3} failures"

    async def verify(self) -> None:
        """Compare the stored runs and batches with the acknowledged ones."""
        one, other = self.ledgers
        found = {}
        for name, foreign in ((one, other), (other, one)):
            async with self.caller(name, foreign) as caller:
                caller.operation = "verify"
                try:
                    found[name] = await _find(caller)
                    self.failures += [f"{name}: {fault}" async for fault in faults(caller, found[name])]
                except Unexpected as exc:
                    self.failures.append(f"{name}: {exc}")
        if len(found) == 2 and (shared := found[one].keys() & found[other].keys()):
            self.failures.append(f"{len(shared)} runs are in the lists of both principals, such as {min(shared)}")


async def _find(caller: Caller) -> dict[str, list[Any]]:
    """Wait until no run is active, then return the list entries of each run."""
    deadline = time.monotonic() + SETTLE_S
    for status in ("starting", "running"):
        while (await caller.request("GET", f"/runs?status={status}&limit=1", 200)).json()["runs"]:
            check(time.monotonic() < deadline, f"there are still {status} runs")
            await asyncio.sleep(0.2)
    shown: dict[str, list[Any]] = {}
    path = "/runs?limit=1000"
    while path is not None:
        page = (await caller.request("GET", path, 200)).json()
        for run in page["runs"]:
            shown.setdefault(run["run_id"], []).append(run)
        path = page["next"]
    return shown


async def faults(caller: Caller, shown: dict[str, list[Any]]) -> AsyncIterator[str]:
    """Yield the faults in the listed runs and the batches of a principal."""
    own = caller.own
    for run_id in own.runs - shown.keys():
        yield f"run {run_id} was acknowledged, but is lost"
    for run_id in own.deleted & shown.keys():
        yield f"run {run_id} was deleted, but still exists"
    for run_id, runs in shown.items():
        if len(runs) > 1 or runs[0]["status"] not in FINAL:
            yield f"run {run_id} is listed {len(runs)} times, as {runs[0]['status']}"
        if run_id not in own.runs and runs[0]["status"] not in own.abandoned.get(runs[0]["request_id"], []):
            yield f"run {run_id} is {runs[0]['status']}, but was not acknowledged: {runs[0]}"
    for batch_id, items in own.batches.items():
        batch = (await caller.request("GET", f"/batch/{batch_id}", 200)).json()
        results = [result for result in batch["results"] if result is not None]
        if batch["status"] not in FINAL or (batch["completed_items"], len(results)) != (items, items):
            counts = f"{batch['completed_items']} ended items and {len(results)} results"
            yield f"batch {batch_id} of {items} is {batch['status']}, with {counts}"


# The server


async def health_s(url: str) -> float:
    """Return the response time of ``/healthz`` in seconds, measured by a separate idle process."""
    command = ["curl", "-s", "-o", os.devnull, "-w", "%{http_code} %{time_total}", "--max-time", "60", f"{url}/healthz"]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    status, took_s = (await process.communicate())[0].split()
    return float(took_s) if status == b"200" else math.inf


def memory_kib(pid: int) -> int:
    """Return the memory of a process, with its share of memory that it shares with others (PSS)."""
    found = re.search(r"^Pss: +(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@contextlib.contextmanager
def started(
    command: Sequence[str], env: dict[str, str], folder: Path, preexec: Callable[[], None] | None = None
) -> Iterator[tuple[str, int]]:
    """Start ``flockapi serve`` on a free port and yield its URL and process id. Its log is in *folder*."""
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=env, stdout=log, stderr=log, preexec_fn=preexec) as process,
    ):
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while (up := re.search(r"running on (http://\S+)", (folder / "log").read_text())) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.1)
            yield up[1], process.pid
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
            process.kill()


def log_faults(folder: Path) -> Iterator[str]:
    """Yield log lines about responses with 5xx, and about exceptions that no agent raised."""
    with (folder / "log").open() as log:
        for line in log:
            if re.search(r'" 5\d\d|in ASGI application|request \w+ failed|never retrieved|cannot be watched', line):
                yield f"log: {line.strip()}"


# Output


def print_tally(tally: Counter[tuple[str, str]]) -> None:
    for name in sorted({name for name, _ in tally}):
        counts = [f"{outcome}: {tally[name, outcome]}" for other, outcome in sorted(tally) if other == name]
        print(f"{name:24} {', '.join(counts)}")
    print(f"{'all':24} {tally.total()}")


def memory_is_flat(memory: Sequence[int]) -> bool:
    settled_at = round(SETTLED_AFTER * len(memory))
    settled, end = statistics.median(memory[settled_at:][:WINDOW_S]), statistics.median(memory[-WINDOW_S:])
    print(
        f"memory: {settled / 1024:.1f} MiB after {settled_at} s, {end / 1024:.1f} MiB at the end, after {len(memory)} s"
    )
    print(f"ratio {end / settled:.3f}, limit {MAX_GROWTH:g}")
    return end <= MAX_GROWTH * settled


async def soak(folder: Path, minutes: float, callers: int, *, hostile: bool) -> Soak:
    keys = {"ann": new_key(), "bob": new_key()}
    hostile_key = new_key()
    listed = ",".join(f"{name}={key}" for name, key in [*keys.items(), ("mallory", hostile_key)])
    command = [sys.executable, "-m", "flock", "serve", __file__, "--port", "0", "--store", str(folder / "soak.db")]
    with started(command, {**os.environ, "FLOCK_API_KEYS": listed}, folder) as (url, pid):
        soaked = Soak(url, pid, keys)
        attack = [sys.executable, "-m", "bench.hostile", "--url", url, "--key", hostile_key, "--minutes", str(minutes)]
        attackers = await asyncio.create_subprocess_exec(*attack) if hostile else None
        await soaked.load(minutes, callers)
        if attackers is not None:
            await attackers.wait()
        await soaked.verify()
    soaked.failures += log_faults(folder)
    return soaked


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="minutes of load (default: 10)")
    parser.add_argument("--callers", type=int, default=16, help="concurrent callers (default: 16)")
    parser.add_argument("--folder", default=".", help="the folder for the store, on a real disk (default: here)")
    parser.add_argument("--hostile", action="store_true", help="also run ten hostile clients; see bench/hostile.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-soak-") as made:
        soaked = asyncio.run(soak(Path(made).resolve(), options.minutes, options.callers, hostile=options.hostile))
        size_mib = (Path(made) / "soak.db").stat().st_size / 2**20
    print_tally(soaked.tally)
    ledgers = soaked.ledgers.values()
    runs, batches = sum(len(ledger.runs) for ledger in ledgers), sum(len(ledger.batches) for ledger in ledgers)
    deleted, abandoned = (
        sum(len(ledger.deleted) for ledger in ledgers),
        sum(len(ledger.abandoned) for ledger in ledgers),
    )
    print(f"{runs} runs and {batches} batches verified, {deleted} runs deleted, {abandoned} requests abandoned")
    print(f"the store has {size_mib:.0f} MiB")
    is_flat = memory_is_flat(soaked.memory_kib)
    p50, p99 = (statistics.quantiles(soaked.health_s, n=100)[n] for n in (49, 98))
    print(f"/healthz: 50 % in {p50 * 1000:.0f} ms, 99 % in {p99 * 1000:.0f} ms, of {len(soaked.health_s)}")
    for failure in soaked.failures[:MAX_SHOWN]:
        print(failure[:MAX_LENGTH])
    are_met = is_flat and not soaked.failures
    print(
        "met" if are_met else "MISSED", f"{len(soaked.failures)} failures, memory {'is flat' if is_flat else 'GROWS'}"
    )
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

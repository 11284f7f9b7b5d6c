"""How expensive is a run compared with the bare framework, with and without a stored record?

    python -m bench.runs                   # needs wrk; also measures fastapi if it is installed
    python -m bench.runs --million         # also with a million stored runs

Each app serves ``POST /run/flock`` for a trivial async function, in its own process, under uvicorn with httptools and
uvloop. All servers run the whole time, and the load is sent to one after the other, so that noise of the machine
affects all of them. Compare the ratios in one round; absolute figures mean little. (An idle engine wakes up 20 times a
second, for some microseconds.) Stores are not emptied in between. Linux only: CPU time is read from /proc.

Exits with 1 if a target is missed, and raises if a response is wrong.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

import httpx
import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flock.command.server import tune_gc
from flock.core import Flock
from flock.engine import queries
from flock.engine.migrations import MIGRATIONS
from flock.engine.store import Durability
from flock.runs import Run, RunStatus, Step, new_id, now
from flockapi import FlockAPIRequest, FlockAPIResponse, JSONResponse, RunStep, create_app

PATH = "/run/flock"
BODY = '{"agent_name":"add","inputs":{"a":1}}'
MILLION = 1_000_000
WARM_UP_S = 1
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10

flock = Flock()


@flock.agent
async def add(a: int, b: int = 2) -> int:
    return a + b


# The apps


class GroupCommit:
    """The minimal durable store: rows that arrive during a commit are written by the next one."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE runs (run_id TEXT PRIMARY KEY, inputs BLOB NOT NULL, answer BLOB NOT NULL)")
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[tuple[str, bytes, bytes], asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def save(self, run_id: str, inputs: bytes, answer: bytes) -> None:
        """Return when the row is on disk."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append(((run_id, inputs, answer), written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = self._waiting, []
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO runs VALUES (?, ?, ?)", [row for row, _ in group])
            await loop.run_in_executor(self._thread, self._db.execute, "COMMIT")
            for _, written in group:
                if not written.done():
                    written.set_result(None)
        self._writing = None


def bare_app(records: GroupCommit | None = None) -> Starlette:
    """Return a hand-written app for this one task: the same JSON in and out, without an engine."""
    requests = msgspec.json.Decoder(FlockAPIRequest)
    inputs = {name: msgspec.json.Decoder(agent.input.type) for name, agent in flock.agents.items()}
    functions = {"add": add.function}

    async def run_flock(request: Request) -> Response:
        created_at = now()
        request_id = request.headers.get("x-request-id") or uuid4().hex
        try:
            wanted = requests.decode(await request.body())
            values = inputs[wanted.agent_name].decode(wanted.inputs)
        except (KeyError, msgspec.DecodeError) as exc:
            return Response(str(exc), 422)
        started_at = now()
        value = await functions[wanted.agent_name](**msgspec.structs.asdict(values))
        completed_at = now()
        result = msgspec.Raw(msgspec.json.encode({"result": value}))
        step = RunStep(
            agent_name=wanted.agent_name,
            result=result,
            attempt=1,
            started_at=started_at,
            completed_at=completed_at,
            usage=None,
            model=None,
        )
        answer = FlockAPIResponse(
            run_id=new_id(),
            agent_name=wanted.agent_name,
            status=RunStatus.COMPLETED,
            result=result,
            error=None,
            error_type=None,
            created_at=created_at,
            started_at=started_at,
            completed_at=completed_at,
            request_id=request_id,
            traceparent=None,
            attempt=1,
            progress=None,
            usage=None,
            steps=[step],
        )
        response = JSONResponse(answer, headers={"X-Request-ID": request_id, "Flock-Run-Status": answer.status.value})
        if records is not None:
            await records.save(answer.run_id, bytes(wanted.inputs), bytes(response.body))
        return response

    return Starlette(routes=[Route(PATH, run_flock, methods=["POST"])])


def fastapi_app() -> Any:
    """Return the same app as ``bare_app`` in the style of FastAPI's documentation."""
    # These are not dependencies of this project, not even for type checks.
    import fastapi  # type: ignore[import-not-found, unused-ignore]
    import pydantic  # type: ignore[import-not-found, unused-ignore]

    class AddInputs(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        model_config = pydantic.ConfigDict(extra="forbid")
        a: int
        b: int = 2

    class RunRequest(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        model_config = pydantic.ConfigDict(extra="forbid")
        agent_name: str
        inputs: dict[str, Any] = {}
        async_run: bool = False
        timeout_s: Annotated[float, pydantic.Field(gt=0)] | None = None
        use_production_tools: Any = None

    class UsageModel(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        input_tokens: int = 0
        output_tokens: int = 0

    class ProgressModel(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        done: float
        total: float | None = None
        message: str = ""

    class StepModel(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        agent_name: str
        result: dict[str, Any]
        attempt: int
        started_at: pydantic.AwareDatetime
        completed_at: pydantic.AwareDatetime
        usage: UsageModel | None = None

    class RunResponse(pydantic.BaseModel):  # type: ignore[misc, unused-ignore]
        run_id: str
        agent_name: str
        status: RunStatus
        result: dict[str, Any] | None
        error: str | None = None
        error_type: str | None = None
        created_at: pydantic.AwareDatetime
        started_at: pydantic.AwareDatetime | None
        completed_at: pydantic.AwareDatetime | None
        request_id: str | None
        traceparent: str | None = None
        attempt: int
        progress: ProgressModel | None = None
        usage: UsageModel | None = None
        steps: list[StepModel]

    agents = {"add": (AddInputs, add.function)}
    app = fastapi.FastAPI()

    async def run_flock(
        wanted: RunRequest,
        response: fastapi.Response,
        x_request_id: Annotated[str | None, fastapi.Header()] = None,
    ) -> RunResponse:
        created_at = now()
        request_id = x_request_id or uuid4().hex
        try:
            model, function = agents[wanted.agent_name]
            values = model.model_validate(wanted.inputs)
        except (KeyError, pydantic.ValidationError) as exc:
            raise fastapi.HTTPException(422, str(exc)) from exc
        started_at = now()
        value = await function(**values.model_dump())
        completed_at = now()
        response.headers["X-Request-ID"] = request_id
        response.headers["Flock-Run-Status"] = RunStatus.COMPLETED.value
        return RunResponse(
            run_id=new_id(),
            agent_name=wanted.agent_name,
            status=RunStatus.COMPLETED,
            result={"result": value},
            created_at=created_at,
            started_at=started_at,
            completed_at=completed_at,
            request_id=request_id,
            attempt=1,
            steps=[
                StepModel(
                    agent_name=wanted.agent_name,
                    result={"result": value},
                    attempt=1,
                    started_at=started_at,
                    completed_at=completed_at,
                )
            ],
        )

    app.post(PATH)(run_flock)
    return app


def flock_app(store: Path, durability: Durability) -> Any:
    # Without metrics, like the others.
    return create_app(flock, engine=flock.engine(store=store, durability=durability), metrics=False)


BARE, COMMIT, FASTAPI, MEMORY = "bare", "bare + commit", "fastapi", "flock memory"
POWER, PROCESS, POWER_1M = "flock power", "flock process", "flock power, 1M runs"

#: Factories, called with the folder for the store.
APPS: Mapping[str, Callable[[Path], Any]] = {
    BARE: lambda folder: bare_app(),
    COMMIT: lambda folder: bare_app(GroupCommit(folder / "commit.db")),
    FASTAPI: lambda folder: fastapi_app(),
    MEMORY: lambda folder: create_app(flock, store=":memory:", metrics=False),
    POWER: lambda folder: flock_app(folder / "power.db", "power"),
    PROCESS: lambda folder: flock_app(folder / "process.db", "process"),
    POWER_1M: lambda folder: flock_app(folder / "million.db", "power"),
}

#: The apps that each app is compared with: the columns of the table.
COMPARED: Mapping[str, Sequence[str]] = {
    BARE: (FASTAPI,),
    COMMIT: (BARE, FASTAPI),
    FASTAPI: (BARE,),
    MEMORY: (BARE, FASTAPI),
    POWER: (BARE, COMMIT, FASTAPI),
    PROCESS: (BARE, COMMIT, FASTAPI),
    POWER_1M: (BARE, COMMIT, FASTAPI),
}

#: The minimum ratio of the throughput of two apps.
TARGETS: Sequence[tuple[str, str, float]] = [
    (MEMORY, BARE, 0.6),
    (POWER, BARE, 0.4),
    (POWER, COMMIT, 0.6),
    (POWER, FASTAPI, 1.0),
    (POWER_1M, POWER, 0.9),
]


def fill(path: Path, runs: int) -> None:
    """Create a store with *runs* completed runs of one step each."""
    done: dict[str, Any] = {"result": msgspec.Raw(b'{"result":3}'), "started_at": now(), "completed_at": now()}
    step = Step(agent_name="add", **done)
    first = Run(
        run_id=new_id(),
        flock=flock.name,
        agent_name="add",
        inputs=msgspec.Raw(b'{"a":1}'),
        status=RunStatus.COMPLETED,
        created_at=now(),
        request_id=uuid4().hex,
        owner=new_id(),
        steps=(step,),
        **done,
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        for migrate in MIGRATIONS:
            migrate(db)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("BEGIN")
        queries.write_run(db, first, True, {0: step}, queries.Ended())
        # SQLite copies the first run. This takes seconds; one call for each run would take a minute.
        db.create_function("new_id", 0, new_id)
        db.execute("CREATE TEMP TABLE ids AS SELECT run_id FROM runs WHERE false")
        numbers = "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)"
        db.execute(f"INSERT INTO ids {numbers} SELECT new_id() FROM numbers", (runs,))
        columns = [row[1] for row in db.execute("PRAGMA table_info(runs)") if row[1] != "run_id"]
        copied = ", ".join(f"runs.{column}" for column in columns)
        query = (
            f"INSERT INTO runs (run_id, {', '.join(columns)}) SELECT ids.run_id, {copied} "
            "FROM ids CROSS JOIN runs WHERE runs.run_id = ?"
        )
        db.execute(query, (first.run_id,))
        db.execute("COMMIT")
        found = db.execute("SELECT count(*) FROM runs").fetchone()[0]
    assert found == runs, found


# Servers


def serve(name: str, folder: Path, listener: socket.socket) -> None:
    """Run a server. All servers configure the garbage collector like ``flockapi serve``."""
    config = uvicorn.Config(
        APPS[name](folder),
        http="httptools",
        loop="uvloop",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=STOP_TIMEOUT_S // 2,
    )
    config.load()
    tune_gc()
    uvicorn.Server(config).run(sockets=[listener])


#: The members of a response for a run that is not an item of a batch.
MEMBERS = {field for field in FlockAPIResponse.__struct_fields__ if field not in ("batch_id", "position")}


class Server:
    """An app in its own process, on a free port."""

    def __init__(self, name: str, process: BaseProcess, port: int) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}{PATH}"
        self._process = process

    def check(self) -> None:
        """Raise if the response is wrong, or does not arrive before the start timeout."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                response = httpx.post(self.url, content=BODY, headers={"Content-Type": "application/json"})
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or not self._process.is_alive():
                    raise
                time.sleep(0.05)
        run = response.json() if response.status_code == 200 else {}
        is_right = run.get("status") == "completed" and run.get("result") == {"result": 3}
        headers = response.headers.get("flock-run-status"), response.headers.get("x-request-id")
        if not is_right or headers != ("completed", run["request_id"]) or run.keys() != MEMBERS:
            raise RuntimeError(f"{self.name} responds {response.status_code}, {response.headers}: {response.text}")

    def cpu_s(self) -> float:
        """Return the CPU time of all its threads so far, user and kernel."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextlib.contextmanager
def servers(names: Sequence[str], folder: Path) -> Iterator[list[Server]]:
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        started = []
        for name in names:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                process = context.Process(target=serve, args=(name, folder, listener), name=name)
                process.start()
                started.append(Server(name, process, listener.getsockname()[1]))
                stack.callback(started[-1].stop)
        for server in started:
            server.check()
        yield started


# Load


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The result of loading one server for some seconds."""

    requests_per_s: float
    cpu_us: float
    p99_ms: float


LUA = f"""
wrk.method = "POST"
wrk.body = '{BODY}'
wrk.headers["Content-Type"] = "application/json"

done = function(summary, latency, requests)
    local e = summary.errors
    local counts = '{{"requests":%d,"duration_us":%d,"p99_us":%d,"not_2xx":%d,"socket":%d}}\\n'
    io.write(string.format(counts, summary.requests, summary.duration, latency:percentile(99),
        e.status, e.connect + e.read + e.write + e.timeout))
end
"""


def load(server: Server, script: Path, connections: int, seconds: int) -> Sample:
    """Run wrk once. Raises RuntimeError if a response is wrong."""
    server.check()
    cpu_before_s = server.cpu_s()
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
    cpu_s = server.cpu_s() - cpu_before_s
    counts = json.loads(done.stdout.splitlines()[-1])
    if counts["not_2xx"] or counts["socket"] or "Non-2xx" in done.stdout or not counts["requests"]:
        raise RuntimeError(f"{server.name} failed under load:\n{done.stdout}{done.stderr}")
    return Sample(
        requests_per_s=counts["requests"] / counts["duration_us"] * 1e6,
        cpu_us=cpu_s / counts["requests"] * 1e6,
        p99_ms=counts["p99_us"] / 1000,
    )


def measure(
    running: Sequence[Server], script: Path, connections: int, rounds: int, seconds: int
) -> dict[str, list[Sample]]:
    """Return one sample per app and round."""
    samples: dict[str, list[Sample]] = {server.name: [] for server in running}
    for server in running:
        load(server, script, connections, WARM_UP_S)
    for number in range(rounds):
        first = number % len(running)  # rotate, so that the order does not matter
        for server in [*running[first:], *running[:first]]:
            samples[server.name].append(load(server, script, connections, seconds))
    return samples


# Output


def ratios(samples: Mapping[str, Sequence[Sample]], name: str, base: str) -> list[float]:
    """Return the ratio of requests per second of two apps, in each round."""
    pairs = zip(samples[name], samples[base], strict=True)
    return [one.requests_per_s / other.requests_per_s for one, other in pairs]


def as_text(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def print_table(samples: Mapping[str, Sequence[Sample]]) -> None:
    bases = [base for base in (BARE, COMMIT, FASTAPI) if base in samples]
    heads = "".join(f"{f'x {base}':>20}" for base in bases)
    print(f"{'':22}{'requests/s':>10}{'CPU µs':>8}{'p99 ms':>8}{heads}")
    for name, taken in samples.items():
        texts = [as_text(ratios(samples, name, base)) if base in COMPARED[name] else "" for base in bases]
        figures = [statistics.median(getattr(sample, field) for sample in taken) for field in Sample.__struct_fields__]
        cells = "".join(f"{text:>20}" for text in texts)
        print(f"{name:22}{figures[0]:10.0f}{figures[1]:8.0f}{figures[2]:8.1f}{cells}".rstrip())


def print_targets(samples: Mapping[str, Sequence[Sample]]) -> bool:
    """Print the targets and return whether all are met."""
    are_met = True
    for name, base, at_least in TARGETS:
        if name in samples and base in samples:
            values = ratios(samples, name, base)
            is_met = statistics.median(values) >= at_least
            are_met &= is_met
            print(f"{'met   ' if is_met else 'MISSED'}  {name} / {base}: {as_text(values)}, target {at_least:.1f}")
    return are_met


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=int, default=3, help="duration of each load in seconds (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="loads of each app (default: 5)")
    parser.add_argument("--connections", type=int, action="append", help="can be repeated (default: 32, then 128)")
    parser.add_argument("--million", action="store_true", help="also measure with a million stored runs")
    parser.add_argument("--folder", default=".", help="the folder for the stores, on a real disk (default: here)")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        parser.exit(2, "wrk is not installed. On Debian: apt-get install wrk\n")
    names = [name for name in APPS if name != POWER_1M or options.million]
    if importlib.util.find_spec("fastapi") is None:
        names.remove(FASTAPI)
        print("Skipping fastapi, because it is not installed.")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-runs-") as made:
        folder = Path(made).resolve()
        (script := folder / "post.lua").write_text(LUA)
        if options.million:
            started = time.monotonic()
            fill(folder / "million.db", MILLION)
            print(f"Wrote a million runs in {time.monotonic() - started:.0f} s.")
        are_met = True
        with servers(names, folder) as running:
            for connections in options.connections or [32, 128]:
                samples = measure(running, script, connections, options.rounds, options.seconds)
                print(f"\n{connections} connections: medians of {options.rounds} x {options.seconds} s")
                print("CPU is the server's time per request. Ratios compare requests/s in one round (min-max).\n")
                print_table(samples)
                print()
                are_met &= print_targets(samples)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())

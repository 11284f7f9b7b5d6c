"""What the CPU time of ``flockapi serve`` is spent on: python -m bench.profile

perf samples the CPU time of all threads without stopping the server, and Python tells it the names of its functions. A
sample belongs to the part of the innermost function that has one. Prints µs for each request, or for each item of a
batch. It needs Linux, perf, and Python 3.13 or later.
"""

import asyncio
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvloop

from bench.load import repeat
from bench.machine import cpu_s
from bench.measures.batches import upload
from bench.measures.bench import Bench, Effort
from bench.measures.requests import ADD
from bench.run import open_bench
from bench.servers import POWER, ROOT, Server

EFFORT = Effort(stored=10_000)
SECONDS, CONNECTIONS, ITEMS, SAMPLES_PER_S = 8.0, 32, 300_000, 397
REST = "event loop, and the rest"

#: The functions of each part, as "name (file)". The first part that matches a function has it.
PARTS_OF_REQUEST = {
    "log line and observers": r"^Logger\.|^Runner\.ended|^StepExecutor\.notify",
    "response sent": r"^_ResponseTransport|Cycle\.send |^Response\.__call__|send_with_id|\.sender |_send |^add_headers",
    "response made": r"^run_response|^list_agents|^shown_|^JSONResponse|^Response\.",
    "request parsed by uvicorn": r"^HttpToolsProtocol|^Connection\.",
    "body read and checked": r"^read_json|^Body\.|^media_type_of",
    "record made, and its write awaited": r"^(Runner|StoredRun)\._?(finish|save|retrying)|^Database\.(save|_written)",
    "SQLite: statements, commit, thread": r"^(SQLite|Database|Group|StoreFile|WorkerThr|run_sync)|/(rows|queries)\.py",
    "step: slot, deadline, agent": r"^StepExecutor\.|^execute_agent|^FunctionAgent",
    "client wakes up": r"^_end_of|^EmbeddedEngine\.wait",
    "task and scope of the run": r"^Runner\.|^StoredRun|^TaskGroup|^TaskHandle",
    "run accepted: limits, inputs, id, record": r"^EngineBase|^EmbeddedEngine\._(accept|start|check)|^_accepted_run",
    "middleware, routing, access": r"\((starlette|flock/web)/|\(flockapi\.py\)|^RequestResponseCycle|^ProxyHeaders",
}
PARTS_OF_ITEM = {
    "scope, its deadline, search for open ones": r"^CancelScope|^closing_scopes|_scopes?(_above)? \(flock/scopes",
    "record made, and its write awaited": r"^(Runner|StoredRun)\._?(finish|save|retry|ended)|^Database\.(save|_wr)",
    "row read": r"^SQLiteBatchStore|^rows_of|^Database\.read|^run_from|^_reader|^find_batch",
    "SQLite: statements, commit, thread": r"^(SQLite|Database|Group|StoreFile|WorkerThr|run_sync)|/(rows|queries)\.py",
    "agent: inputs, function, result": r"^FunctionAgent|^execute_agent|^Signature",
    "step: slot, result": r"^StepExecutor|^acquire_all|^Slots",
    "worker and run": r"^Runner|^StoredRun|^ActiveRun|^_Work|^Batches",
}


def stacks(script: Iterable[str]) -> Iterator[list[str]]:
    """Yield the Python functions of each sample, the innermost first, from the output of ``perf script``."""
    stack: list[str] = []
    for line in script:
        if not line.strip():
            yield stack
            stack = []
        elif found := re.match(r"\s+[0-9a-f]+ py::([^:]+):(.*)", line):
            file = found[2].strip().rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
            stack.append(f"{found[1]} ({file})")


def shares(script: Iterable[str], parts: Mapping[str, str]) -> Mapping[str, float]:
    """Return the share of the samples that each part has."""
    counts = Counter(next(filter(None, (part_of(each, parts) for each in stack)), REST) for stack in stacks(script))
    return {part: counts[part] / counts.total() for part in [*parts, REST]}


def part_of(function: str, parts: Mapping[str, str]) -> str | None:
    return next((part for part, pattern in parts.items() if re.search(pattern, function)), None)


class Sampling:
    """perf, while it samples a process."""

    def __init__(self, pid: int, folder: Path) -> None:
        self._folder = folder
        options = ("-q", "-k", "1", "-F", str(SAMPLES_PER_S), "--call-graph", "dwarf,32768", "-o", "perf.data")
        self._process = subprocess.Popen(["perf", "record", *options, "-p", str(pid)], cwd=folder)

    def script(self) -> str:
        """End, and return the samples as ``perf script`` prints them."""
        self._process.terminate()
        self._process.wait()
        self._perf("inject", "--jit", "-i", "perf.data", "-o", "jit.data")
        return self._perf("script", "-i", "jit.data", "--no-inline", "-F", "comm,tid,ip,sym")

    def _perf(self, *arguments: str) -> str:
        options: dict[str, Any] = {"cwd": self._folder, "capture_output": True, "text": True, "errors": "replace"}
        environment = {**os.environ, "DEBUGINFOD_URLS": ""}  # otherwise perf asks servers for debug symbols
        return str(subprocess.run(["perf", *arguments], check=True, env=environment, **options).stdout)


async def of_requests(server: Server, folder: Path, request: bytes) -> tuple[float, str]:
    """Return the CPU time of one request in µs, and the samples."""
    alone = await repeat(server, [request], connections=CONNECTIONS, seconds=SECONDS / 2)
    sampling = Sampling(server.pid, folder)
    await repeat(server, [request], connections=CONNECTIONS, seconds=SECONDS)
    return alone.server_us, sampling.script()


async def of_items(server: Server, folder: Path) -> tuple[float, str]:
    """Return the CPU time of one item of a batch in µs, and the samples."""
    batch_id = upload(server, "add", b"a\n" + b"".join(b"%d\n" % n for n in range(ITEMS)))["batch_id"]

    def completed() -> int:
        return int(server.get(f"/batch/{batch_id}?results=false")["completed_items"])

    items, used_s = completed(), cpu_s(server.pid)
    await asyncio.sleep(SECONDS / 2)
    items, used_s = completed() - items, cpu_s(server.pid) - used_s
    sampling = Sampling(server.pid, folder)
    await asyncio.sleep(SECONDS)
    return used_s / items * 1e6, sampling.script()


#: The method and the path of each request. All but the first need no body.
REQUESTS = {
    "a synchronous run": "POST /run/flock",
    "`GET /run/{id}`": "GET /run/{id}",
    "`GET /agents`": "GET /agents",
}


async def profile(bench: Bench) -> None:
    """Print the tables. Each column has a server of its own: perf does not find all names in a second recording."""
    columns = {}
    for number, (title, request) in enumerate(REQUESTS.items()):
        with bench.fresh(POWER, store=f"{number}.db") as server:
            method, _, path = request.partition(" ")
            path = path.replace("{id}", server.post("/run/flock", ADD)["run_id"])
            raw = server.raw_request(method, path, ADD if method == "POST" else None)
            columns[title] = await of_requests(server, bench.folder, raw)
        remove_names(server.pid)
    with bench.fresh(POWER, store="items.db") as server:
        of_item = await of_items(server, bench.folder)
    remove_names(server.pid)
    print(table(columns, PARTS_OF_REQUEST), table({"an item of a batch": of_item}, PARTS_OF_ITEM), sep="\n")


def remove_names(pid: int) -> None:
    """Remove what Python and perf have written for each function of the server."""
    for file in Path("/tmp").glob(f"jit*-{pid}[-.]*"):
        file.unlink()


def table(columns: Mapping[str, tuple[float, str]], parts: Mapping[str, str]) -> str:
    """Return µs for each part as a Markdown table."""
    spent = {title: (us, shares(script.splitlines(), parts)) for title, (us, script) in columns.items()}
    lines = [["", *spent], ["-", *("-:" for _ in spent)]]
    lines += [[part, *(f"{us * share[part]:.0f}" for us, share in spent.values())] for part in [*parts, REST]]
    lines.append(["sum", *(f"{us:.0f}" for us, _ in spent.values())])
    return "".join(f"|{'|'.join(f' {cell} ' for cell in line)}|\n" for line in lines)


def main() -> None:
    if sys.version_info < (3, 13):
        sys.exit("Python 3.13 or later is needed: it tells perf the names of functions.")
    os.environ["PYTHON_PERF_JIT_SUPPORT"] = "1"
    with open_bench(EFFORT, ".") as bench:
        uvloop.run(profile(bench))


if __name__ == "__main__":
    main()

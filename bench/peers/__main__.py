"""The same work by hand, here, and on the nearest agent servers, in one run: python -m bench.peers --install

All are measured in short rounds that take turns, with the server on one core and the load on another one. A cell has
the median, and in brackets the median of the ratios to the equal by hand in the same round. The figure is the CPU time
of the server, with all of its processes, for each unit of work. A response that is not what was asked for is an error.

    python -m bench.peers --peers Agno DBOS --tasks stream sync     # only these
    python -m bench.peers --quick                                   # try it: no true figures

With --install, missing peers are installed with pip into environments of their own, in bench-peers/. Linux only.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode
from uuid import uuid4

import msgspec
import uvloop

from bench.load import repeat, send_all
from bench.machine import cpu_s, descendants_of
from bench.measures.batches import csv_ms_per_mb, item_us
from bench.measures.bench import Bench, Effort
from bench.measures.streams import read_streams
from bench.measures.waiting import read_events
from bench.run import open_bench
from bench.servers import ROOT, Server, spawn
from bench.table import number, write_part

ENVIRONMENTS = ROOT / "bench-peers"
START_S, TIMEOUT_S = 180, 120
NO_TELEMETRY = {"HAYSTACK_TELEMETRY_ENABLED": "False", "BENTOML_DO_NOT_TRACK": "True", "LANGSMITH_TRACING": "false"}
#: What a unit of work is, and the column of its figure.
TASKS = {
    "stream": "a piece of 100 streams, 5 ms apart, µs",
    "readers": "a piece to each of 100 readers of a run, µs",
    "model": "a model agent's run, two fields, ms",
    "pieces": "the same, passed on in 100 pieces, ms",
    "sync": "a synchronous run, µs",
    "accepted": "an accepted run, µs",
    "read": "a finished run is read, µs",
    "items": "an item of a batch, µs",
    "csv": "a MB of CSV in, ms",
}


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured in each round."""

    rounds: int = 5
    streams: int = 100
    pieces: int = 200
    seconds: float = 1.0
    runs: int = 1_000
    items: int = 10_000
    rows: int = 20_000


QUICK = Size(rounds=1, streams=10, pieces=20, seconds=0.3, runs=50, items=500, rows=500)


class Ask(msgspec.Struct, frozen=True):
    """A request, and what proves that it was done.

    Attributes:
        body: JSON, or a form if it is a mapping of ``form``.
        proof: what each response has in its body; for a stream: its end.
        status: the path of the response to an accepted run, with its id, which ``id_`` finds.
    """

    path: str
    body: Any = None
    form: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = {}
    expected: int = 200
    proof: str = ""
    status: str = ""
    id_: str = r'"(?:run_id|task_id|id)": ?"([^"]+)"'
    ended: str = ""

    def raw(self, server: Server, key: str = "") -> bytes:
        """Return the bytes of the request. ``{key}`` in it becomes *key*."""
        content, type_ = b"", {}
        if self.form is not None:
            form = {name: str(value).replace("{key}", key) for name, value in self.form.items()}
            content, type_ = urlencode(form).encode(), {"Content-Type": "application/x-www-form-urlencoded"}
        elif self.body is not None:
            content, type_ = json.dumps(self.body).encode(), {"Content-Type": "application/json"}
        headers = {"Host": f"127.0.0.1:{server.port}", **type_, **self.headers, "Content-Length": str(len(content))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"POST {self.path.replace('{key}', key)} HTTP/1.1\r\n{lines}\r\n".encode() + content


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A server that is compared.

    Attributes:
        command: what ``python -m`` starts, with the port and the file of the store.
        durable: what survives, in the table.
        packages: what pip installs into an environment of its own. If it is empty, this one is used.
        asks: by task, a request, or why there is none. If a task is missing, the reason is *lacks*, which
            is empty if another row has the figure.
    """

    command: Sequence[str]
    durable: str
    asks: Mapping[str, Ask | str]
    packages: Sequence[str] = ()
    lacks: str = "it has no such thing"
    environment: Mapping[str, str] = {}

    def ask(self, task: str) -> Ask | str:
        """Return the request of a task, or why there is none. Accepted runs can be read."""
        return self.asks.get("accepted" if task == "read" else task, self.lacks)


STREAM = {"Accept": "text/event-stream"}
DURABLE = "each run and item is on disk before its response, and survives a power cut"


def flock_run(agent: str, inputs: Any, proof: str = "", headers: Mapping[str, str] | None = None) -> Ask:
    return Ask("/run/flock", {"agent_name": agent, "inputs": inputs}, headers=headers or {}, proof=proof)


def flock_accepted() -> Ask:
    body = {"agent_name": "add", "inputs": {"a": 1}, "async_run": True}
    return Ask("/run/flock", body, expected=202, status="/run/{id}", ended='"completed"')


def uvicorn(module: str) -> Sequence[str]:
    options = ("--http", "httptools", "--loop", "uvloop", "--no-access-log", "--port", "{port}")
    return ("uvicorn", f"bench.peers.{module}:app", *options)


def peers(size: Size) -> Mapping[str, Peer]:
    """Return all servers. Those by hand are first: what follows is compared with the first one that has a figure."""
    pieces = {"pieces": size.pieces, "interval_s": 0.005}
    added = flock_run("add", {"a": 1}, '"completed"')
    text = {"text": "Splendid."}
    by_hand: dict[str, Ask | str] = {
        "stream": flock_run("write", pieces, "", STREAM),
        "model": flock_run("review", text, '"is_good":true'),
        "pieces": flock_run("review", text, '"is_good":true', STREAM),
    }
    more: dict[str, Ask | str] = {"sync": added, "accepted": flock_accepted()}
    ours = {**by_hand, **more, "stream": flock_run("write", pieces, "run.completed", STREAM)}
    ours |= {"pieces": flock_run("review", text, "run.completed", STREAM)}
    special = dict.fromkeys(("readers", "items", "csv"), added)
    state = {"assistant_id": "add", "input": {"a": 1}}
    form = {"message": json.dumps({"a": 1}), "stream": "false"}
    return {
        "by hand": Peer(
            command=uvicorn("bare_model"),
            durable="nothing; an item, at power cuts",
            asks={**by_hand, **more, **special},
            environment={"BENCH_CLIENT": "httpx"},
        ),
        "by hand, httpx2": Peer(
            command=uvicorn("bare_model"),
            durable="nothing",
            asks={task: by_hand[task] for task in ("model", "pieces")},
            lacks="",
            environment={"BENCH_CLIENT": "httpx2"},
        ),
        "by hand, FastAPI": Peer(
            command=uvicorn("with_fastapi"),
            durable="nothing",
            asks={**more, "stream": Ask("/write", pieces)},
            lacks="",
        ),
        "by hand, commits": Peer(
            command=uvicorn("bare_commit"),
            durable="a run, at its end",
            asks={"sync": added},
            lacks="",
        ),
        "flockapi": Peer(
            command=("flock", "serve", str(ROOT / "bench" / "agents.py"), "--port", "{port}", "--store", "{store}"),
            durable=DURABLE,
            asks={**ours, **special},
        ),
        "flockapi, httpx": Peer(
            command=("flock", "serve", str(ROOT / "bench" / "agents.py"), "--port", "{port}", "--store", "{store}"),
            durable=DURABLE,
            asks={task: ours[task] for task in ("model", "pieces")},
            lacks="",
            environment={"BENCH_CLIENT": "httpx"},
        ),
        "Hayhooks": Peer(
            command=("bench.peers.with_hayhooks", "{port}"),
            packages=("hayhooks", "uvloop", "httptools"),
            durable="nothing",
            asks={
                "stream": Ask("/write/run", pieces),
                "model": Ask("/ask/run", text, proof="is_good"),
                "pieces": Ask("/tell/run", text, proof="is_good"),
                "sync": Ask("/add/run", {"a": 1}, proof="3"),
                "accepted": "its durable runs need Redis or Temporal",
            },
        ),
        "Hayhooks, as chat": Peer(
            command=("bench.peers.with_hayhooks", "{port}"),
            packages=("hayhooks", "uvloop", "httptools"),
            durable="nothing",
            asks={
                "stream": Ask(
                    "/v1/chat/completions",
                    {
                        "model": "write",
                        "stream": True,
                        "messages": [{"role": "user", "content": f"{size.pieces} 0.005"}],
                    },
                )
            },
            lacks="",
        ),
        "Agno": Peer(
            command=("bench.peers.with_agno", "{port}"),
            packages=(
                "agno[os,openai]",
                "sqlalchemy",
                "aiosqlite",
                "greenlet",
                "openai",
                "uvicorn",
                "uvloop",
                "httptools",
            ),
            durable="the session, at the end of a run; its durable queue needs Postgres or Redis",
            asks={
                "stream": Ask("/workflows/write/runs", form={"message": json.dumps(pieces), "stream": "true"}),
                "model": Ask("/agents/review/runs", form={"message": "Splendid.", "stream": "false"}, proof="is_good"),
                "pieces": Ask("/agents/review/runs", form={"message": "Splendid.", "stream": "true"}, proof="is_good"),
                "readers": "not measured: clients resume a run in the background",
                "sync": Ask("/workflows/add/runs", form=form, proof="COMPLETED"),
                "accepted": Ask(
                    "/workflows/add/runs",
                    form={**form, "background": "true", "session_id": "{key}"},
                    status="/workflows/add/runs/{id}?session_id={key}",
                    expected=202,
                    ended="COMPLETED",
                ),
            },
        ),
        "LangGraph": Peer(
            command=("bench.peers.with_langgraph", "{port}"),
            packages=("langgraph-cli[inmem]", "langchain-openai", "uvloop", "httptools"),
            durable="nothing: its durable servers need Postgres, most also Redis",
            asks={
                "stream": Ask("/runs/stream", {"assistant_id": "write", "input": pieces, "stream_mode": "custom"}),
                "model": Ask("/runs/wait", {"assistant_id": "review", "input": text}, proof="is_good"),
                "pieces": Ask(
                    "/runs/stream",
                    {"assistant_id": "review", "input": text, "stream_mode": ["messages-tuple", "values"]},
                    proof='"is_good"',
                ),
                "readers": "not measured: clients join a run in the background",
                "items": "not measured: a batch is a list of accepted runs",
                "sync": Ask("/runs/wait", state, proof='"result"'),
                "accepted": Ask(
                    "/threads/{key}/runs",
                    {**state, "if_not_exists": "create"},
                    status="/threads/{key}/runs/{id}",
                    ended='"success"',
                ),
            },
        ),
        "pydantic-ai, FastAPI": Peer(
            command=("bench.peers.with_pydantic_ai", "{port}"),
            packages=("pydantic-ai-slim[openai]", "fastapi", "uvicorn", "uvloop", "httptools"),
            durable="nothing",
            asks={
                "model": Ask("/review", text, proof="is_good"),
                "pieces": Ask("/review/stream", text, proof='"is_good":true'),
            },
            lacks="as FastAPI by hand: it has no server",
        ),
        "DBOS, FastAPI": Peer(
            command=("bench.peers.with_dbos", "{port}"),
            packages=("dbos", "fastapi", "uvicorn", "uvloop", "httptools"),
            durable="each run before it starts, in SQLite; each piece of a stream",
            asks={
                "stream": Ask(f"/write?pieces={size.pieces}&interval_s=0.005"),
                "model": "it has no models",
                "pieces": "it has no models",
                "readers": "not measured: each one polls the database",
                "sync": Ask("/add?a=1", proof="3"),
                "accepted": Ask("/add/start?a=1", expected=202, status="/run/{id}", ended="SUCCESS"),
            },
        ),
        "BentoML": Peer(
            command=("bench.peers.with_bentoml", "{port}"),
            packages=("bentoml", "uvloop", "httptools"),
            durable="nothing",
            asks={
                "stream": Ask("/write", pieces),
                "model": "it has no models",
                "pieces": "it has no models",
                "sync": Ask("/add", {"a": 1}, proof="3"),
                "accepted": Ask("/later/submit", {"a": 1}, status="/later/status?task_id={id}", ended="completed"),
            },
        ),
    }


# The servers


@contextlib.contextmanager
def serving(bench: Bench, name: str, peer: Peer) -> Iterator[Server]:
    """Serve a peer in the block. Raises RuntimeError if it does not listen in time."""
    (own := bench.folder / re.sub(r"\W+", "-", name)).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    command = [part.format(port=port, store=own / "store.db") for part in peer.command]
    python = str(python_of(peer)) if peer.packages else sys.executable
    environment = {"OPENAI_BASE_URL": f"{bench.provider}/v1", **NO_TELEMETRY, **peer.environment}
    process = spawn(command, bench.cores.server, own, own / "log", python=python, **environment)
    server = Server(name, process, port)
    try:
        deadline = time.monotonic() + START_S
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(own / 'log').read_text('utf-8', 'replace')[-2000:]}")
            time.sleep(0.05)
        yield server
    finally:
        for pid in descendants_of(server.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.stop()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def python_of(peer: Peer) -> Path:
    return ENVIRONMENTS / re.sub(r"\W+", "-", peer.packages[0]) / "bin" / "python"


def install(peer: Peer) -> None:
    """Install the packages of a peer, with all that they need. Raises CalledProcessError."""
    python = python_of(peer)
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *peer.packages], check=True)


# The tasks. Each returns the figure of its column.

Measure = Callable[[Bench, Server, Ask, Size], Awaitable[Mapping[str, float]]]


async def stream(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    request, proof = ask.raw(server, str(uuid4())), ask.proof.encode()
    found = await read_streams(server, request, size.streams, size.pieces, proof)
    return {"stream": found.piece_us, "late at the median, ms": found.late_ms, "a stream, KB": found.kb}


async def readers(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    _, each_us = await read_events(server, size.pieces)
    return {"readers": each_us}


def of_requests(task: str, unit: float) -> Measure:
    async def measure(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
        request, many = ask.raw(server), bench.effort.connections
        options: dict[str, Any] = {"expected": ask.expected, "proof": ask.proof.encode()}
        sample = await repeat(server, [request], connections=many, seconds=size.seconds, **options)
        return {task: sample.server_us / unit}

    return measure


async def start_runs(server: Server, ask: Ask, count: int) -> list[bytes]:
    """Start runs, and return the requests for them."""
    requests = []

    async def start(numbers: Iterator[int]) -> None:
        for _ in numbers:
            key = str(uuid4())
            (body,) = await send_all(server, [ask.raw(server, key)], connections=1, expected=ask.expected)
            found = re.search(ask.id_, body.decode())
            if found is None:
                raise RuntimeError(f"{server.name} accepts a run without an id: {body[:500]!r}")
            requests.append(server.raw_request("GET", ask.status.format(id=found[1], key=key)))

    numbers = iter(range(count))
    await asyncio.gather(*(start(numbers) for _ in range(min(count, 64))))
    return requests


async def until_ended(server: Server, ask: Ask, requests: Sequence[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    for request in requests:
        while ask.ended.encode() not in (body := (await send_all(server, [request], connections=1))[0]):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{server.name}: a run has not ended: {body[:500]!r}")
            await asyncio.sleep(0.01)


async def accepted(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    """Start runs from 64 clients. The time stops when every 50th has ended; then all must have."""
    used_s, began = cpu_s(server.pid), time.perf_counter()
    requests = await start_runs(server, ask, size.runs)
    await until_ended(server, ask, requests[::-50])
    took_s, used_s = time.perf_counter() - began, cpu_s(server.pid) - used_s
    await until_ended(server, ask, requests)
    return {"accepted": used_s / size.runs * 1e6, "1,000 of them to their end, s": took_s / size.runs * 1e3}


async def read(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    requests = await start_runs(server, ask, 64)
    await until_ended(server, ask, requests)
    many, proof = bench.effort.connections, ask.ended.encode()
    sample = await repeat(server, requests, connections=many, seconds=size.seconds, proof=proof)
    return {"read": sample.server_us}


async def items(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    return {"items": item_us(bench, None if server.name == "by hand" else server, size.items)}


async def csv(bench: Bench, server: Server, ask: Ask, size: Size) -> Mapping[str, float]:
    return {"csv": csv_ms_per_mb(bench, None if server.name == "by hand" else server, size.rows)}


MEASURES: Mapping[str, Measure] = {
    "stream": stream,
    "readers": readers,
    "model": of_requests("model", 1e3),
    "pieces": of_requests("pieces", 1e3),
    "sync": of_requests("sync", 1),
    "accepted": accepted,
    "read": read,
    "items": items,
    "csv": csv,
}

# The table


#: The figures, with the task that finds each.
COLUMNS = {
    "stream": "stream",
    "late at the median, ms": "stream",
    "a stream, KB": "stream",
    "readers": "readers",
    "model": "model",
    "pieces": "pieces",
    "sync": "sync",
    "accepted": "accepted",
    "1,000 of them to their end, s": "accepted",
    "read": "read",
    "items": "items",
    "csv": "csv",
}
#: The tasks of each table.
TABLES = (("stream", "readers"), ("model", "pieces"), ("sync", "accepted", "read", "items", "csv"))


def table(found: Mapping[str, Mapping[str, Sequence[float]]], peers: Mapping[str, Peer], columns: Sequence[str]) -> str:
    """Return Markdown: a row for each peer that has one of the figures, with the ratios to the one by hand."""
    base, *_ = [*found.values(), {}]
    lines = [["", *(TASKS.get(column, column) for column in columns), "durable"]]
    for name, figures in found.items():
        cells = []
        for column in columns:
            values, hand = figures.get(column, ()), base.get(column, ())
            text = number(statistics.median(values)) if values else ""
            if values and len(values) == len(hand) and figures is not base and all(hand):
                text += f" ({statistics.median(map(float.__truediv__, values, hand)):.2f})"
            cells.append(text)
        if any(cells):
            lines.append([name, *cells, peers[name].durable])
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|-|{'-:|' * len(columns)}-|", *rest, ""])


def reasons(missing: Mapping[tuple[str, str], str]) -> str:
    """Return a line for each peer and each reason why it has no figure."""
    tasks: dict[tuple[str, str], list[str]] = {}
    for (name, task), reason in missing.items():
        tasks.setdefault((name, reason), []).append(task)
    return "\n".join(f"- {name} ({', '.join(of)}): {reason}." for (name, reason), of in tasks.items() if reason)


async def compare(bench: Bench, chosen: Mapping[str, Peer], tasks: Sequence[str], size: Size) -> str:
    """Measure all tasks of all peers, and return the table, and a sentence for each figure that it lacks."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in chosen}
    missing: dict[tuple[str, str], str] = {}
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, peer in chosen.items():
            try:
                servers[name] = stack.enter_context(serving(bench, name, peer))
            except (OSError, RuntimeError) as exc:
                missing[name, "all"] = f"it does not start here: {exc}"
        for task in tasks:
            asks = {name: chosen[name].ask(task) for name in servers}
            missing |= {(name, task): ask for name, ask in asks.items() if isinstance(ask, str)}
            for number_ in range(-1, size.rounds):  # the first one warms up
                for name in [name for name, ask in asks.items() if isinstance(ask, Ask)]:
                    if (name, task) in missing:
                        continue
                    try:
                        figures = await MEASURES[task](bench, servers[name], cast(Ask, asks[name]), size)
                    except Exception as exc:  # another peer must not lose its figures
                        missing[name, task] = f"it fails: {exc!r:.500}"
                        continue
                    for column, figure in figures.items() if number_ >= 0 else ():
                        found[name].setdefault(column, []).append(figure)
            print(task, file=sys.stderr)
    tables = []
    for group in TABLES:
        columns = [
            column for column in COLUMNS if COLUMNS[column] in group and any(column in each for each in found.values())
        ]
        tables += [table(found, chosen, columns)] if columns else []
    return "\n".join([*tables, reasons(missing)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", help="only these, and those by hand and flockapi")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="only these")
    parser.add_argument("--install", action="store_true", help="install peers that are not installed")
    parser.add_argument("--quick", action="store_true", help="try it, with little effort: no true figures")
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/performance.md")
    parser.add_argument("--rounds", type=int, default=Size().rounds)
    parser.add_argument("--folder", default=".", help="where the stores are, on a real disk (default: here)")
    options = parser.parse_args()
    size = QUICK if options.quick else msgspec.structs.replace(Size(), rounds=options.rounds)
    every = peers(size)
    chosen = {
        name: peer
        for name, peer in every.items()
        if not (options.peers and peer.packages and name not in options.peers)
    }
    for name, peer in chosen.items() if options.install else ():
        if peer.packages and not python_of(peer).exists():
            try:
                install(peer)
            except subprocess.CalledProcessError as exc:
                print(f"{name} cannot be installed here: {exc}", file=sys.stderr)
    with open_bench(Effort(), options.folder) as bench:
        text = uvloop.run(compare(bench, chosen, options.tasks, size))
    print(text)
    if options.write:
        write_part("bench.peers", text)


if __name__ == "__main__":
    main()

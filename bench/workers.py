"""What do more processes bring, and what does it cost to ask one for a run of another? python -m bench.workers

First, ``flockapi serve --workers N`` on all cores, beside the load, in rounds that take turns: runs, items and pieces a
second, as ratios to one worker. What SQLite alone commits on this disk is the limit of runs and items. Then two servers
on one store, which are what workers are to each other: a client reads a run that has not ended, and 100 clients follow
its text, at the server that executes it, and at the other one. Linux only.
"""

import argparse
import contextlib
import sqlite3
import statistics
import time
from collections.abc import Sequence

import msgspec
import uvloop

from bench.load import repeat
from bench.machine import cpu_s
from bench.measures.batches import end_of_batch, upload
from bench.measures.bench import Bench, Effort
from bench.measures.requests import ADD
from bench.measures.streams import read_streams
from bench.measures.waiting import nap, read_events
from bench.run import open_bench
from bench.servers import POWER, Server, serving
from bench.table import number, write_part

GROUP = 64
#: How many batches are executed at once, since each is executed by one process.
BATCHES = 8
Figures = dict[str, list[float]]


async def with_workers(bench: Bench, workers: int, seconds: float) -> dict[str, float]:
    """Return what a new server with as many workers does in a second, and the CPU time of all of them for each."""
    cores = msgspec.structs.replace(bench.cores, server=None)
    store = f"{workers} {time.monotonic_ns()}.db"
    with serving(POWER, cores, bench.folder, "--max-concurrency", "1000", workers=workers, store=store) as server:
        request = server.raw_request("POST", "/run/flock", ADD)
        await repeat(server, [request], connections=GROUP, seconds=0.3)
        runs = await repeat(server, [request], connections=GROUP, seconds=seconds)
        get = server.raw_request("GET", f"/run/{server.post('/run/flock', ADD)['run_id']}")
        reads = await repeat(server, [get], connections=GROUP, seconds=seconds)
        items, (streams, pieces) = round(5_000 * seconds), (50, round(200 * seconds))
        used_s = cpu_s(server.pid)
        took_s = work_on_batches(server, items)
        item_us = (cpu_s(server.pid) - used_s) / items * 1e6
        body = {"agent_name": "write", "inputs": {"pieces": pieces, "interval_s": 0}}
        stream = server.raw_request("POST", "/run/flock", body, Accept="text/event-stream")
        began = time.perf_counter()
        found = await read_streams(server, stream, streams, pieces)
        streamed_s = time.perf_counter() - began - 1  # the agent waits a second for its readers
    return {
        "runs, 1/s": runs.per_s,
        "finished runs read, 1/s": reads.per_s,
        "items, 1/s": items / took_s,
        "pieces, 1/s": streams * pieces / streamed_s,
        "a run: server CPU, µs": runs.server_us,
        "a finished run is read: server CPU, µs": reads.server_us,
        "an item: server CPU, µs": item_us,
        "a piece: server CPU, µs": found.piece_us,
    }


def work_on_batches(server: Server, items: int) -> float:
    """Return the seconds from the start of the first batch to the end of the last one."""
    body = b"a\n" + b"".join(b"%d\n" % n for n in range(items // BATCHES))
    accepted = [upload(server, "add", body)["batch_id"] for _ in range(BATCHES)]
    ended = [end_of_batch(server, batch_id) for batch_id in accepted]
    completed = sum(batch.completed_items for batch in ended)
    if completed != items // BATCHES * BATCHES:
        raise RuntimeError(f"{completed} of {items} items completed")
    began = min(batch.started_at for batch in ended if batch.started_at)
    return (max(batch.completed_at for batch in ended if batch.completed_at) - began).total_seconds()


def committed(bench: Bench, seconds: float) -> float:
    """Return the rows a second of a run's size that SQLite alone writes in groups, each with a synced commit."""
    path, row, rows = bench.folder / f"commits {time.monotonic_ns()}.db", b"x" * 500, 0
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("CREATE TABLE runs (id INTEGER PRIMARY KEY, row BLOB)")
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            db.execute("BEGIN IMMEDIATE")
            db.executemany("INSERT INTO runs (row) VALUES (?)", [(row,)] * GROUP)
            db.execute("COMMIT")
            rows += GROUP
        return rows / (time.perf_counter() - began)


async def across(bench: Bench, servers: Sequence[Server], at: Server, seconds: float) -> dict[str, float]:
    """Let *at* read runs of the first server. Return the CPU time of both for each unit."""
    owner = servers[0]
    run_id = owner.post("/run/flock", nap(3600, async_run=True))["run_id"]

    def used_s() -> float:
        return sum(cpu_s(server.pid) for server in servers)

    began_s = used_s()
    sample = await repeat(at, [at.raw_request("GET", f"/run/{run_id}")], connections=32, seconds=seconds)
    read_us = (used_s() - began_s) / sample.requests * 1e6
    owner.fetch("POST", f"/run/{run_id}/cancel")
    began_s, pieces = used_s(), 100
    late_ms, _ = await read_events(owner, pieces, readers_at=at)
    piece_us = (used_s() - began_s) / (pieces * 100) * 1e6
    return {
        "a run that has not ended is read, µs": read_us,
        "a piece to each of 100 readers, µs": piece_us,
        "late at p99, ms": late_ms,
    }


def table(heads: Sequence[str], columns: Sequence[Figures], base: int) -> str:
    """Return Markdown: medians, and in brackets the medians of the ratios to column *base* in one round."""
    lines = [["", *heads], ["-", *("-:" for _ in heads)]]
    for what in columns[base]:
        cells = []
        for number_, column in enumerate(columns):
            text = number(statistics.median(column[what])) if column.get(what) else ""
            if text and number_ != base:
                ratios = [one / other for one, other in zip(column[what], columns[base][what], strict=True)]
                text += f" ({statistics.median(ratios):.2f})"
            cells.append(text)
        lines.append([what, *cells])
    return "".join(f"|{'|'.join(f' {cell} ' for cell in line)}|\n" for line in lines)


def add(figures: Figures, found: dict[str, float]) -> None:
    for what, figure in found.items():
        figures.setdefault(what, []).append(figure)


async def measure(bench: Bench, workers: Sequence[int], rounds: int, seconds: float) -> str:
    """Return two tables."""
    curve: list[Figures] = [{} for _ in workers]
    limit: list[float] = []
    for _ in range(rounds):
        for count, figures in zip(workers, curve, strict=True):
            add(figures, await with_workers(bench, count, seconds))
        limit.append(committed(bench, seconds))
    pair: list[Figures] = [{}, {}]
    with bench.fresh(POWER, store="shared.db") as one, bench.fresh(POWER, store="shared.db") as other:
        for _ in range(rounds):
            for at, figures in zip((one, other), pair, strict=True):
                add(figures, await across(bench, (one, other), at, seconds))
    rows_per_s = number(statistics.median(limit))
    return "\n".join(
        [
            table([f"{count} workers" for count in workers], curve, 0),
            f"SQLite alone commits {rows_per_s} rows a second on this disk, {GROUP} at once.\n",
            table(["within a process", "across two"], pair, 0),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load (default: 2)")
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/performance.md")
    parser.add_argument("--folder", default=".", help="where the stores are, on a real disk (default: here)")
    options = parser.parse_args()
    with open_bench(Effort(), options.folder) as bench:
        text = uvloop.run(measure(bench, options.workers, options.rounds, options.seconds))
    print(text)
    if options.write:
        write_part("bench.workers", text)


if __name__ == "__main__":
    main()

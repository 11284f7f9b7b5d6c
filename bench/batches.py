"""Compare the throughput of a batch with a bare loop: python -m bench.batches [--million] [--rounds 3]

The bare loop has the same number of workers and calls the same function. Each worker then waits for a shared
transaction that updates the row of its item in an SQLite file of the same durability. The loop has no agents, steps,
deadlines, cancellation, limits or recovery. The ratio shows their cost.

Each measurement runs in its own process, alternately. It covers the work on the batch, from acceptance to the last
commit. The time to accept the batch is printed separately.
"""

import argparse
import json
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec

from flock.command.server import tune_gc
from flock.core import Flock
from flock.runs import BatchOptions

WORKERS = 100


async def double(n: int) -> int:
    return 2 * n


async def ours(items: int, durability: Any) -> dict[str, float]:
    flock = Flock("bench")
    flock.add_agent(double)
    rows = (msgspec.Raw(b'{"n":%d}' % n) for n in range(items))
    async with flock.engine(store="flock.db", durability=durability) as engine:
        tune_gc()
        idle_mb, began = memory_mb("VmRSS"), time.perf_counter()
        batch = await engine.submit_batch("double", rows, BatchOptions(max_workers=WORKERS))
        accept_s = time.perf_counter() - began
        batch = await engine.wait_batch(batch.batch_id)
    assert batch.completed_items - batch.failed_items == items, batch
    assert batch.started_at is not None
    assert batch.completed_at is not None
    work_s = (batch.completed_at - batch.started_at).total_seconds()
    return {"work_s": work_s, "accept_s": accept_s, "idle_mb": idle_mb}


async def bare(items: int, durability: str) -> dict[str, float]:
    db = sqlite3.connect("bare.db", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}")
    db.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, n INTEGER, status TEXT NOT NULL, result TEXT)")
    db.execute("BEGIN")
    db.executemany("INSERT INTO items VALUES (?, ?, 'starting', NULL)", ((n, n) for n in range(items)))
    db.execute("COMMIT")
    tune_gc()
    idle_mb = memory_mb("VmRSS")
    numbers = iter(range(items))
    group: list[tuple[str, int]] = []
    has_work, is_written = anyio.Event(), anyio.Event()

    def write(rows: list[tuple[str, int]]) -> None:
        db.execute("BEGIN IMMEDIATE")
        for row in rows:
            db.execute("UPDATE items SET status = 'completed', result = ? WHERE id = ? AND status = 'starting'", row)
        db.execute("COMMIT")

    async def write_groups() -> None:
        nonlocal group, has_work, is_written
        while True:
            await has_work.wait()
            await anyio.lowlevel.checkpoint()
            rows, done = group, is_written
            group, has_work, is_written = [], anyio.Event(), anyio.Event()
            await anyio.to_thread.run_sync(write, rows)
            done.set()

    async def work() -> None:
        for n in numbers:
            group.append((json.dumps({"result": await double(n)}), n))
            has_work.set()
            await is_written.wait()

    began = time.perf_counter()
    async with anyio.create_task_group() as writer:
        writer.start_soon(write_groups)
        async with anyio.create_task_group() as tasks:
            for _ in range(WORKERS):
                tasks.start_soon(work)
        writer.cancel_scope.cancel()
    work_s = time.perf_counter() - began
    done = db.execute("SELECT count(*) FROM items WHERE status = 'completed'").fetchone()[0]
    assert done == items, done
    db.close()
    return {"work_s": work_s, "accept_s": 0.0, "idle_mb": idle_mb}


KINDS = {"ours": ours, "bare": bare}


def memory_mb(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure_here(kind: str, items: int, durability: str) -> None:
    measured = anyio.run(KINDS[kind], items, durability)
    print(json.dumps({**measured, "peak_mb": memory_mb("VmHWM")}))


def measure(kind: str, items: int, durability: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.batches", "--one", kind, str(items), "--durability", durability]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def rounds_of(sizes: list[int], rounds: int) -> Iterator[tuple[int, int]]:
    """Yield (round, size). Small sizes run more often, because they are fast."""
    for number in range(rounds * 3):
        for size in sizes:
            if size < 1_000_000 or number < rounds:
                yield number, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--million", action="store_true", help="also a million items: some minutes per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--durability", choices=["power", "process"], default="power")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ITEMS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure_here(arguments.one[0], int(arguments.one[1]), arguments.durability)
        return
    sizes = [1_000, 100_000, *([1_000_000] if arguments.million else [])]
    found: dict[tuple[str, int], list[dict[str, float]]] = {(kind, size): [] for kind in KINDS for size in sizes}
    for _, size in rounds_of(sizes, arguments.rounds):
        for kind in KINDS:
            found[kind, size].append(measure(kind, size, arguments.durability))

    def median(kind: str, size: int, name: str) -> float:
        return statistics.median(each[name] for each in found[kind, size])

    print(f"durability={arguments.durability}, {WORKERS} workers, medians. Ratio: our items/s / bare items/s\n")
    print("    items   ours/s   bare/s  ratio   µs/item        accept, µs/item  peak over idle, MB")
    for size in sizes:
        work_s, bare_s = median("ours", size, "work_s"), median("bare", size, "work_s")
        pairs = zip(found["ours", size], found["bare", size], strict=True)
        ratio = statistics.median(theirs["work_s"] / our["work_s"] for our, theirs in pairs)
        over_mb = max(each["peak_mb"] - each["idle_mb"] for each in found["ours", size])
        accept_us = median("ours", size, "accept_s") / size * 1e6
        print(
            f"{size:9,} {size / work_s:8,.0f} {size / bare_s:8,.0f} {ratio:6.2f} {work_s / size * 1e6:11.1f} "
            f"{accept_us:22.1f} {over_mb:20.1f}"
        )
    first, last = sizes[0], sizes[-1]
    change = (median("ours", last, "work_s") / last) / (median("ours", first, "work_s") / first)
    print(f"\ntime per item, {last:,} items compared with {first:,}: {change:.2f}")


if __name__ == "__main__":
    main()

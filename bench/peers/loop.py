"""A bare loop over many items: 100 workers call the function, and each result updates one row of an SQLite file.

    python -m bench.peers.loop 1000000

A worker waits for the shared transaction that updates the row of its item. Prints the seconds, and those of CPU time.
The loop has no agents, steps, deadlines, cancellation, limits or recovery, so what a batch costs beyond it is the price
of those.
"""

import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from bench.peers.shared import tune_gc

WORKERS = 100


async def add(a: int, b: int = 2) -> int:
    return a + b


def table_of(path: Path, items: int) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE items (id INTEGER PRIMARY KEY, a INTEGER, status TEXT NOT NULL, result TEXT)")
    db.execute("BEGIN")
    db.executemany("INSERT INTO items VALUES (?, ?, 'starting', NULL)", ((n, n) for n in range(items)))
    db.execute("COMMIT")
    return db


class Writer:
    """Results that arrive during a transaction are written by the next one."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._group: list[tuple[str, int]] = []
        self._has_work, self._is_written = asyncio.Event(), asyncio.Event()

    async def save(self, result: str, n: int) -> None:
        self._group.append((result, n))
        self._has_work.set()
        await self._is_written.wait()

    async def run(self) -> None:
        while True:
            await self._has_work.wait()
            await asyncio.sleep(0)  # let the workers that are ready add theirs
            rows, is_written = self._group, self._is_written
            self._group, self._has_work, self._is_written = [], asyncio.Event(), asyncio.Event()
            await asyncio.to_thread(self._write, rows)
            is_written.set()

    def _write(self, rows: list[tuple[str, int]]) -> None:
        statement = "UPDATE items SET status = 'completed', result = ? WHERE id = ? AND status = 'starting'"
        self._db.execute("BEGIN IMMEDIATE")
        for row in rows:
            self._db.execute(statement, row)
        self._db.execute("COMMIT")


async def work(numbers: Iterator[int], writer: Writer) -> None:
    for n in numbers:
        await writer.save(json.dumps({"result": await add(n)}), n)


async def seconds(path: Path, items: int) -> tuple[float, float]:
    db = table_of(path, items)
    writer = Writer(db)
    writing = asyncio.create_task(writer.run())
    began, began_cpu_s, numbers = time.perf_counter(), time.process_time(), iter(range(items))
    await asyncio.gather(*(work(numbers, writer) for _ in range(WORKERS)))
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
    writing.cancel()
    (done,) = db.execute("SELECT count(*) FROM items WHERE status = 'completed'").fetchone()
    assert done == items, done
    db.close()
    return took_s, cpu_s


if __name__ == "__main__":
    tune_gc()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print(*uvloop.run(seconds(Path(folder, "loop.db"), int(sys.argv[1]))))

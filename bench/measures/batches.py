"""Batches over HTTP: how fast rows are worked on, and how fast CSV comes in and out."""

import time
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from bench.machine import cpu_s, forget_peak, peak_kb
from bench.measures.bench import Bench, Effort, Row, empty
from bench.servers import BARE, OURS, POWER, Server, spawn

WORKERS = 100
#: Each row has about 500 bytes.
TEXT = 'A sentence with a comma, and some more "words" in it. ' * 9
TIMEOUT_S = 600


def output_of(bench: Bench, *module: str) -> list[float]:
    """Run ``python -m`` *module* on the core of the servers, and return the numbers that it prints."""
    log = bench.folder / "output"
    process = spawn(module, bench.cores.server, bench.folder, log)
    if process.wait(TIMEOUT_S):
        raise RuntimeError(f"{module} failed:\n{log.read_text()}")
    return [float(number) for number in log.read_text().split()]


# Batches


async def batches(bench: Bench) -> list[Row]:
    return [row for items, rounds in bench.effort.batches for row in rows_of_batch(bench, items, rounds)]


def rows_of_batch(bench: Bench, items: int, rounds: int) -> list[Row]:
    """All subjects do the small batches, which are quick. On disk, batches of all sizes must be as fast."""
    names = [BARE, *(OURS if items <= 1_000 else [POWER])]
    per_s, memory_mb = empty(names), empty([POWER])
    for name in bench.turns(names, rounds):
        if name == BARE:
            took_s, _ = output_of(bench, "bench.peers.loop", str(items))
        else:
            took_s, more_mb = work_on_batch(bench.server(name), items)
            memory_mb.setdefault(name, []).append(more_mb)
        per_s[name].append(items / took_s)
    return [Row(title=title, figures=found) for title, found in zip(titles(items), (per_s, memory_mb), strict=True)]


def titles(items: int) -> tuple[str, str]:
    """Return the titles of the rows of a batch: its speed, and its memory."""
    return f"a batch of {items:,}, items/s", f"a batch of {items:,}: memory beyond the idle server, MB"


def largest(found: Collection[str]) -> int:
    """Return the number of items of the largest batch of which there are rows."""
    return max(items for items, _ in Effort().batches if titles(items)[0] in found)


def work_on_batch(server: Server, items: int) -> tuple[float, float]:
    """Return the seconds from the start of the batch to its last commit, and the memory that it has needed, in MB."""
    body = b"a\n" + b"".join(b"%d\n" % n for n in range(items))
    idle_kb = forget_peak(server.pid)
    batch = end_of_batch(server, upload(server, "add", body)["batch_id"])
    if (batch.total_items, batch.completed_items, batch.failed_items) != (items, items, 0):
        raise RuntimeError(f"{server.name}: {batch.completed_items} of {items} items completed: {batch}")
    return batch.took_s, (peak_kb(server.pid) - idle_kb) / 1024


class Batch(msgspec.Struct):
    """The members of a batch that are read here."""

    status: str
    total_items: int
    completed_items: int
    failed_items: int
    started_at: datetime | None = None
    completed_at: datetime | None = None

    @property
    def took_s(self) -> float:
        assert self.started_at is not None
        assert self.completed_at is not None
        return (self.completed_at - self.started_at).total_seconds()


BATCHES = msgspec.json.Decoder(Batch)


def upload(server: Server, agent: str, body: bytes) -> Any:
    path = f"/run/batch?agent_name={agent}&max_workers={WORKERS}"
    return msgspec.json.decode(server.fetch("POST", path, body, Content_Type="text/csv"))


def end_of_batch(server: Server, batch_id: str) -> Batch:
    while True:
        batch = BATCHES.decode(server.fetch("GET", f"/batch/{batch_id}?results=false&wait=60"))
        if batch.completed_at is not None:
            return batch


def item_us(bench: Bench, server: Server | None, items: int) -> float:
    """Return the CPU time of an item, from its upload to its last commit; without a server, of the bare loop."""
    if server is None:
        _, used_s = output_of(bench, "bench.peers.loop", str(items))
    else:
        used_s = cpu_s(server.pid)
        work_on_batch(server, items)
        used_s = cpu_s(server.pid) - used_s
    return used_s / items * 1e6


# CSV


async def csv(bench: Bench) -> list[Row]:
    body = table_of(bench.effort.csv_rows)
    file = bench.folder / "rows.csv"
    file.write_bytes(body)
    read, written = empty([BARE, POWER]), empty([BARE, POWER])
    for name in bench.turns([BARE, POWER], bench.effort.few_rounds):
        into, out_of = python_mb_per_s(bench, file) if name == BARE else our_mb_per_s(bench.server(name), body)
        read[name].append(into)
        written[name].append(out_of)
    return [
        Row(title="CSV in, beside Python's `csv`, MB/s", figures=read),
        Row(title="CSV out, beside Python's `csv`, MB/s", figures=written),
    ]


def table_of(rows: int) -> bytes:
    return b"text\n" + b'"%b"\n' % TEXT.replace('"', '""').encode() * rows


def csv_ms_per_mb(bench: Bench, server: Server | None, rows: int) -> float:
    """Return the CPU time until a table is stored as a batch; without a server, until Python's ``csv`` has read it."""
    body = table_of(rows)
    if server is None:
        (file := bench.folder / "rows.csv").write_bytes(body)
        *_, used_s = output_of(bench, "bench.peers.csvs", str(file))
    else:
        used_s = cpu_s(server.pid)
        batch_id = upload(server, "repeat", body)["batch_id"]
        used_s = cpu_s(server.pid) - used_s
        end_of_batch(server, batch_id)
    return used_s / len(body) * 1e9


def python_mb_per_s(bench: Bench, file: Path) -> tuple[float, float]:
    read_s, write_s, _ = output_of(bench, "bench.peers.csvs", str(file))
    mb = file.stat().st_size / 1e6
    return mb / read_s, mb / write_s


def our_mb_per_s(server: Server, body: bytes) -> tuple[float, float]:
    """Upload a table, wait for its results, and download them."""
    began = time.perf_counter()
    batch_id = upload(server, "repeat", body)["batch_id"]
    uploaded_s = time.perf_counter() - began
    end_of_batch(server, batch_id)
    began = time.perf_counter()
    results = server.fetch("GET", f"/batch/{batch_id}/results", Accept="text/csv")
    return len(body) / 1e6 / uploaded_s, len(results) / 1e6 / (time.perf_counter() - began)

"""Measure one table in one run: python -m bench.run

Bare ASGI, Starlette with msgspec, FastAPI and Litestar (if they are installed) and ``flockapi serve`` do the same work,
one after the other in each round, on one core. The load comes from another core. A cell has the median, and in brackets
the median of the ratios to the bare equal in the same round. Only ratios can be compared between machines.

With --write, the table replaces the one in docs/performance.md, and its main figures those in README.md. Linux only.
"""

import argparse
import contextlib
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

import msgspec
import uvloop

from bench.machine import pick_cores
from bench.measures import batches, costs, requests, waiting
from bench.measures.bench import QUICK, Bench, Effort, Row
from bench.servers import BARE, FASTAPI, POWER, ROOT, installed
from bench.table import markdown, median_ratio

PAGE, README = ROOT / "docs" / "performance.md", ROOT / "README.md"
BEGIN, END = "<!-- python -m bench.run --write -->\n", "<!-- end -->\n"

MEASURES: Mapping[str, Callable[[Bench], Awaitable[list[Row]]]] = {
    "agents": requests.agents,
    "finished": requests.finished,
    "sync": requests.synchronous,
    "accepted": requests.accepted,
    "model": requests.model,
    "wake-up": waiting.wake_up,
    "events": waiting.events,
    "batches": batches.batches,
    "csv": batches.csv,
    "running": waiting.running,
    "waiters": waiting.waiters,
    "questions": waiting.questions,
    "start": costs.start,
    "import": costs.imports,
    "packages": costs.packages,
}


@contextlib.contextmanager
def open_bench(effort: Effort, folder: str) -> Iterator[Bench]:
    """Give the load its core, and yield a bench whose servers and files are gone after the block."""
    cores, allowed = pick_cores(), os.sched_getaffinity(0)
    if not cores.are_different:
        print("There is only one core, so the load takes time from the servers.", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-") as made, contextlib.ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the files are removed
        os.sched_setaffinity(0, {cores.load})
        stack.callback(os.sched_setaffinity, 0, allowed)
        yield Bench(Path(made).resolve(), cores, effort, stack)


async def measure(bench: Bench, names: Iterable[str]) -> list[Row]:
    rows = []
    for name in names:
        began = time.perf_counter()
        rows += await MEASURES[name](bench)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return rows


def write(rows: Sequence[Row]) -> None:
    """Replace the figures of the performance page and of the README."""
    machine = f"{os.cpu_count()} shared cores with Python {platform.python_version()}"
    measured_on = f"Measured on {date.today()} on {machine}."
    replace_part(PAGE, f"\n{measured_on}\n\n{markdown(rows)}\n")
    replace_part(README, f"\n{measured_on}\n\n{highlights(rows)}\n")


def replace_part(page: Path, text: str) -> None:
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", "utf-8")


def highlights(rows: Sequence[Row]) -> str:
    """Return the main figures as a table for the README."""
    figures = {row.title: row.figures for row in rows}
    share = median_ratio(figures["a synchronous run, 1/s"], POWER, FASTAPI)
    items = batches.largest(figures)
    per_s, memory_mb = (figures[title] for title in batches.titles(items))
    speed = (
        f"{statistics.median(per_s[POWER]):,.0f} rows a second, {median_ratio(per_s, POWER, BARE):.2f} of a bare loop"
    )
    share_of = "a synchronous run on disk, as a share of the requests a second of a FastAPI route that stores nothing"
    return (
        "| | |\n|-|-|\n"
        f"| {share_of} | {share:.2f} |\n"
        f"| a batch of {items:,} rows with a trivial function | {speed} |\n"
        f"| its memory, beyond that of the idle server | {statistics.median(memory_mb[POWER]):.0f} MB |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=MEASURES, help="only these rows")
    parser.add_argument("--quick", action="store_true", help="try all rows, with little effort: no true figures")
    parser.add_argument("--connections", type=int, default=32, help="of requests (default: 32)")
    parser.add_argument("--folder", default=".", help="where the stores are, on a real disk (default: here)")
    parser.add_argument("--write", action="store_true", help="replace the figures in docs/performance.md and README.md")
    options = parser.parse_args()
    if options.write and (options.rows or options.quick):
        parser.error("--write needs all rows, measured with full effort.")
    if options.write and not installed([FASTAPI]):
        parser.error("--write needs FastAPI: pip install fastapi")
    effort = msgspec.structs.replace(QUICK if options.quick else Effort(), connections=options.connections)
    with open_bench(effort, options.folder) as bench:
        rows = uvloop.run(measure(bench, options.rows or MEASURES))
    print(markdown(rows))
    if options.write:
        write(rows)


if __name__ == "__main__":
    main()

"""Does a page of ``GET /runs`` take longer with a million stored runs than with a thousand?

    python -m bench.list_runs

Both stores have a mix of runs of three agents in all final states. Pages are read alternately from both, so that noise
of the machine affects both. The result is the ratio of the medians.
"""

import argparse
import asyncio
import contextlib
import sqlite3
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from bench.stores import FLOCK, fill
from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.runs import RunFilter, RunStatus, now

AGENTS = ("add", "multiply", "rare")
MAX_RATIO = 2.0


def mix(path: Path) -> None:
    """Give each run a random agent and status. One run in a thousand has the rare agent."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE runs SET status = 'failed' WHERE abs(random()) % 3 = 0")
        db.execute("UPDATE runs SET agent_name = 'multiply' WHERE abs(random()) % 2 = 0")
        db.execute("UPDATE runs SET agent_name = 'rare' WHERE abs(random()) % 1000 = 0")
        db.commit()


def filters(middle: str) -> dict[str, RunFilter]:
    """Return filters by name. *middle* is the id of a run in the middle of the store."""
    hour = timedelta(hours=1)
    return {
        "newest": RunFilter(),
        "status": RunFilter(status=RunStatus.FAILED),
        "status, none": RunFilter(status=RunStatus.CANCELLED),
        "agent": RunFilter(agent_name="multiply"),
        "agent, rare": RunFilter(agent_name="rare", limit=1),
        "agent and status": RunFilter(agent_name="add", status=RunStatus.COMPLETED),
        "time": RunFilter(created_after=now() - hour, created_before=now() + hour),
        "cursor": RunFilter(after=middle),
        "cursor, agent": RunFilter(after=middle, agent_name="add"),
        "with inputs": RunFilter(with_inputs=True, with_results=True),
    }


async def seconds(engine: EmbeddedEngine, wanted: RunFilter) -> float:
    began = time.perf_counter()
    await engine.list_runs(wanted)
    return time.perf_counter() - began


async def compare(small: EmbeddedEngine, large: EmbeddedEngine, pages: int) -> bool:
    """Print a line for each filter. Return whether all ratios are below the limit."""
    are_met = True
    print(f"{'filter':20}{'small ms':>10}{'large ms':>10}{'ratio':>8}")
    wanted = [filters((await engine.list_runs(RunFilter(limit=500)))[-1].run_id) for engine in (small, large)]
    for name in wanted[0]:
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(pages):
            for engine, of_engine, taken in zip((small, large), wanted, times, strict=True):
                taken.append(await seconds(engine, of_engine[name]))
        one, other = (1000 * statistics.median(taken) for taken in times)
        are_met &= other / one < MAX_RATIO
        print(f"{name:20}{one:10.3f}{other:10.3f}{other / one:8.2f}")
    return are_met


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", type=int, default=1000, help="runs in the small store (default: 1000)")
    parser.add_argument("--large", type=int, default=1_000_000, help="runs in the large store (default: a million)")
    parser.add_argument("--pages", type=int, default=200, help="pages to read with each filter (default: 200)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-list-") as made:
        paths = [Path(made) / "small.db", Path(made) / "large.db"]
        for path, size in zip(paths, (options.small, options.large), strict=True):
            fill(path, size)
            mix(path)
        flock = Flock(FLOCK)
        async with flock.engine(store=paths[0]) as small, flock.engine(store=paths[1]) as large:
            are_met = await compare(small, large, options.pages)
    print("met" if are_met else "MISSED", f"target: each page takes less than {MAX_RATIO:g} times as long")
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

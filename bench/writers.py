"""Should a group be written in the event loop, in a thread, or partly in both?

    python -m bench.writers

Savers write runs of one step each, repeatedly, as an engine does. Each strategy runs once in each round, with its own
file. Ratios compare saves per second in one round. A timer of one millisecond measures the delay of the loop.
"""

import argparse
import asyncio
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import uvloop
from msgspec.structs import replace

from flock.runs import Run, RunStatus, Step, new_id, now
from flock.store.database import Durability
from flock.store.groups import Group
from flock.store.store import SQLiteStore

BEAT_S = 0.001


class AllInThread(SQLiteStore):
    """everything in a thread: the store's own strategy"""


class CommitInThread(SQLiteStore):
    """rows in the loop, COMMIT in a thread"""

    async def _transact(self, group: Group) -> None:
        async with self._file.locked():
            self._db.execute("BEGIN IMMEDIATE")
            group.write_together(self._db)
            await anyio.to_thread.run_sync(self._db.execute, "COMMIT", limiter=self._threads)


class AllInLoop(SQLiteStore):
    """everything in the loop"""

    async def _transact(self, group: Group) -> None:
        async with self._file.locked():
            self._write(group)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The result of some seconds of saving."""

    saves_per_s: float
    save_ms: float
    late_mean_ms: float
    late_max_ms: float


def work(seconds: float) -> None:
    """Simulate the other work of a server for a request."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def sample(
    strategy: type[SQLiteStore], path: Path, durability: Durability, savers: int, seconds: float, work_s: float
) -> Sample:
    saves, beats = [], []
    until = time.perf_counter() + seconds
    owner = new_id()

    async def save_repeatedly(store: SQLiteStore) -> None:
        while time.perf_counter() < until:
            work(work_s)
            at, result = now(), msgspec.Raw(b'{"result":3}')
            run = Run(run_id=new_id(), flock="f", agent_name="a", inputs=result, created_at=at, owner=owner)
            store.save_nowait(run, is_new=True)
            await asyncio.sleep(0)
            step = Step(agent_name="a", result=result, started_at=at, completed_at=now())
            run = replace(run, status=RunStatus.COMPLETED, steps=(step,), result=result, completed_at=now())
            began = time.perf_counter()
            await store.save(run, step)
            saves.append(time.perf_counter() - began)

    async def beat() -> None:
        while time.perf_counter() < until:
            began = time.perf_counter()
            await asyncio.sleep(BEAT_S)
            beats.append(time.perf_counter() - began - BEAT_S)

    async with strategy(path, durability=durability) as store:
        began = time.perf_counter()
        await asyncio.gather(beat(), *(save_repeatedly(store) for _ in range(savers)))
        took_s = time.perf_counter() - began
    return Sample(
        saves_per_s=len(saves) / took_s,
        save_ms=1000 * statistics.median(saves),
        late_mean_ms=1000 * statistics.mean(beats),
        late_max_ms=1000 * max(beats),
    )


def print_samples(strategies: Sequence[type[SQLiteStore]], samples: Sequence[Sequence[Sample]]) -> None:
    for strategy, taken in zip(strategies, samples, strict=True):
        pairs = zip(taken, samples[0], strict=True)
        ratios = [one.saves_per_s / other.saves_per_s for one, other in pairs]

        def median(name: str, taken: Sequence[Any] = taken) -> float:
            return float(statistics.median(getattr(sample, name) for sample in taken))

        print(
            f"{(strategy.__doc__ or '').partition(':')[0]:36}{statistics.median(ratios):6.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}){median('save_ms'):9.1f}{median('late_mean_ms'):12.2f}"
            f"{max(sample.late_max_ms for sample in taken):10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of each strategy in each round")
    parser.add_argument("--work-us", type=float, default=150, help="other Python work with each save, as in a server")
    options = parser.parse_args()
    strategies = [AllInThread, CommitInThread, AllInLoop]
    durabilities: Sequence[Durability] = ("power", "process")
    for durability in durabilities:
        for savers in (32, 128):
            print(f"\n{durability}, {savers} savers, {options.work_us:g} µs of work")
            print(f"{'':36}{'ratio':>18}{'save ms':>9}{'late, mean':>12}{'max ms':>10}")
            with tempfile.TemporaryDirectory(dir=".", prefix="bench-writers-") as folder:
                taken: list[list[Sample]] = [[] for _ in strategies]
                for _ in range(options.rounds):
                    for strategy, samples in zip(strategies, taken, strict=True):
                        path = Path(folder) / f"{strategy.__name__}.db"
                        run = functools.partial(sample, strategy, path, durability, savers, options.seconds)
                        samples.append(uvloop.run(run(options.work_us / 1e6)))
            print_samples(strategies, taken)


if __name__ == "__main__":
    main()

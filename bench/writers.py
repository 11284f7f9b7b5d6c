"""Where should a group be written: in the event loop, in a thread, or half and half, as the store does it?

    python -m bench.writers

Savers write a run of one step each, again and again, as an engine does. Each way has its turn in each round, on a file
of its own; ratios are of saves a second in one round. A beat of a millisecond beside them tells how late the loop is.
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

from flock.engine.groups import Group
from flock.engine.store import Durability, Store
from flock.runs import Run, RunStatus, Step, new_id, now

BEAT_S = 0.001


class AllInThread(Store):
    """all of it in a thread: the store's own way"""


class CommitInThread(Store):
    """rows in the loop, COMMIT in a thread"""

    async def _transact(self, group: Group) -> None:
        async with self._file_lock():
            with self._transaction():
                group.write_together(self._db)
                await anyio.to_thread.run_sync(self._db.execute, "COMMIT", limiter=self._threads)


class AllInLoop(Store):
    """all of it in the loop"""

    async def _transact(self, group: Group) -> None:
        async with self._file_lock():
            self._write(group)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What came of some seconds of saving."""

    saves_per_s: float
    save_ms: float
    late_mean_ms: float
    late_max_ms: float


def work(seconds: float) -> None:
    """What else a server does for a request, in Python."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


async def sample(
    way: type[Store], path: Path, durability: Durability, savers: int, seconds: float, work_s: float
) -> Sample:
    saves, beats = [], []
    until = time.perf_counter() + seconds
    owner = new_id()

    async def save_again_and_again(store: Store) -> None:
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

    async with way(path, durability=durability) as store:
        began = time.perf_counter()
        await asyncio.gather(beat(), *(save_again_and_again(store) for _ in range(savers)))
        took_s = time.perf_counter() - began
    return Sample(
        saves_per_s=len(saves) / took_s,
        save_ms=1000 * statistics.median(saves),
        late_mean_ms=1000 * statistics.mean(beats),
        late_max_ms=1000 * max(beats),
    )


def print_samples(ways: Sequence[type[Store]], samples: Sequence[Sequence[Sample]]) -> None:
    for way, taken in zip(ways, samples, strict=True):
        pairs = zip(taken, samples[0], strict=True)
        ratios = [one.saves_per_s / other.saves_per_s for one, other in pairs]

        def median(name: str, taken: Sequence[Any] = taken) -> float:
            return float(statistics.median(getattr(sample, name) for sample in taken))

        print(
            f"{(way.__doc__ or '').partition(':')[0]:36}{statistics.median(ratios):6.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}){median('save_ms'):9.1f}{median('late_mean_ms'):12.2f}"
            f"{max(sample.late_max_ms for sample in taken):10.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way in each round")
    parser.add_argument("--work-us", type=float, default=150, help="of Python beside each save, as a server has it")
    options = parser.parse_args()
    ways = [AllInThread, CommitInThread, AllInLoop]
    durabilities: Sequence[Durability] = ("power", "process")
    for durability in durabilities:
        for savers in (32, 128):
            print(f"\n{durability}, {savers} savers, {options.work_us:g} µs of work")
            print(f"{'':36}{'ratio':>18}{'save ms':>9}{'late, mean':>12}{'max ms':>10}")
            with tempfile.TemporaryDirectory(dir=".", prefix="bench-writers-") as folder:
                taken: list[list[Sample]] = [[] for _ in ways]
                for _ in range(options.rounds):
                    for way, samples in zip(ways, taken, strict=True):
                        path = Path(folder) / f"{way.__name__}.db"
                        run = functools.partial(sample, way, path, durability, savers, options.seconds)
                        samples.append(uvloop.run(run(options.work_us / 1e6)))
            print_samples(ways, taken)


if __name__ == "__main__":
    main()

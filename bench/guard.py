"""Has a run, or reading one, become slower than recorded? python -m bench.guard

The server's CPU time for each request is compared with that of the bare equal, measured in the same seconds: a ratio of
1 means that ``flockapi serve`` with a store on disk needs no more than Starlette and msgspec without one. CPU time
depends much less on the disk, and on what else runs, than requests a second.

There are three tries. The exit code is 1 if the best ratio is below 0.85 of the recorded one, which is the median
of its tries. Run it alone on the machine.

    python -m bench.guard --record     # after an intended change: write the ratios to bench/recorded.json
"""

import argparse
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import date
from pathlib import Path

import msgspec
import uvloop

from bench.load import Sample
from bench.measures.bench import Bench, Effort
from bench.measures.requests import Samples, samples_of_finished, samples_of_runs
from bench.run import open_bench
from bench.servers import BARE, POWER

RECORDED = Path(__file__).with_name("recorded.json")
TRIES = 3
MIN_SHARE = 0.85
EFFORT = Effort(rounds=8, seconds=0.25, stored=10_000)

GUARDED: Mapping[str, Callable[[Bench, Sequence[str]], Awaitable[Samples]]] = {
    "a synchronous run, durability=power": samples_of_runs,
    "GET /run/{id}, finished": samples_of_finished,
}


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The ratios of the day on which they were recorded."""

    recorded_on: date
    ratios: Mapping[str, float]


def recorded() -> Record:
    return msgspec.json.decode(RECORDED.read_bytes(), type=Record)


def write_record(found: Mapping[str, Sequence[float]]) -> None:
    """Record the medians, since the best one may be luck that would not come again."""
    ratios = {name: round(statistics.median(tried), 3) for name, tried in found.items()}
    record = Record(recorded_on=date.today(), ratios=ratios)
    RECORDED.write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")


def cpu_us(samples: Sequence[Sample]) -> float:
    """Return the CPU time of the server for each request, over all samples."""
    return sum(sample.server_us * sample.requests for sample in samples) / sum(sample.requests for sample in samples)


async def tries(bench: Bench) -> Mapping[str, Sequence[float]]:
    """Return the ratios of all tries."""
    found: dict[str, list[float]] = {name: [] for name in GUARDED}
    for number in range(1, TRIES + 1):
        for name, measure in GUARDED.items():
            samples = await measure(bench, [BARE, POWER])
            found[name].append(cpu_us(samples[BARE]) / cpu_us(samples[POWER]))
            print(f"try {number}: {name}: {found[name][-1]:.3f} of the bare equal")
    return found


def failures(found: Mapping[str, float], wanted: Mapping[str, float]) -> list[str]:
    """Return a sentence for each ratio that is too low, or that is not recorded."""
    sentences = []
    for name, ratio in found.items():
        if name not in wanted:
            sentences.append(f"{name} is not recorded.")
        elif ratio < MIN_SHARE * wanted[name]:
            share = ratio / wanted[name]
            sentences.append(f"{name}: {ratio:.3f} is {share:.2f} of the recorded {wanted[name]:.3f}.")
    return sentences


ADVICE = f"""The least is {MIN_SHARE} of the recorded ratio. Run it again with nothing else on the machine.
If it fails again, find the change that made it slower:
    git bisect start HEAD <a good commit> && git bisect run python -m bench.guard
If the cost is intended, record the new ratios, and say why in the commit: python -m bench.guard --record"""


def verdict(found: Mapping[str, float], record: Record) -> int:
    """Print whether it is as fast as recorded, and if not, what to do. Return the exit code."""
    slower = failures(found, record.ratios)
    if slower:
        print("\n".join([*slower, ADVICE]))
        return 1
    best = ", ".join(f"{name}: {ratio:.3f} (recorded {record.ratios[name]:.3f})" for name, ratio in found.items())
    print(f"As fast as recorded on {record.recorded_on}. {best}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write what is measured to bench/recorded.json")
    parser.add_argument("--folder", default=".", help="where the stores are, on a real disk (default: here)")
    options = parser.parse_args()
    with open_bench(EFFORT, options.folder) as bench:
        found = uvloop.run(tries(bench))
    if options.record:
        write_record(found)
        return 0
    return verdict({name: max(ratios) for name, ratios in found.items()}, recorded())


if __name__ == "__main__":
    sys.exit(main())

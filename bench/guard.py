"""Has something that agents do all the time become slower than recorded? python -m bench.guard

The server's CPU time for each unit of work is compared with that of the bare equal, measured in the same seconds: a
ratio of 1 means that ``flockapi serve`` with a store on disk needs no more than Starlette and msgspec without a store.
CPU time depends much less on the disk, and on what else runs, than requests a second.

There are three tries, which take a minute and a half, and up to nine of what stays too slow in these, since other
programs may slow down the memory of a machine. The exit code is 1 if the best ratio of a row is below 0.85 of the
recorded one, which is the median of its tries. Run it alone on the machine.

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
from bench.measures.batches import csv_ms_per_mb, item_us
from bench.measures.bench import Bench, Effort
from bench.measures.requests import (
    Samples,
    samples_of_finished,
    samples_of_reviews,
    samples_of_runs,
    samples_of_streamed_reviews,
)
from bench.measures.streams import read_streams
from bench.measures.waiting import read_events
from bench.run import open_bench
from bench.servers import BARE, BARE_MODEL, POWER

RECORDED = Path(__file__).with_name("recorded.json")
TRIES, MAX_TRIES = 3, 9
MIN_SHARE = 0.85
EFFORT = Effort(rounds=8, seconds=0.25, stored=10_000)

STREAMS, PIECES, ITEMS, CSV_ROWS = 100, 200, 20_000, 20_000
STREAM = {"Accept": "text/event-stream"}

Ratio = Callable[[Bench], Awaitable[float]]


def cpu_us(samples: Sequence[Sample]) -> float:
    """Return the CPU time of the server for each request, over all samples."""
    return sum(sample.server_us * sample.requests for sample in samples) / sum(sample.requests for sample in samples)


def of_requests(measure: Callable[[Bench, Sequence[str]], Awaitable[Samples]], bare: str = BARE) -> Ratio:
    async def ratio(bench: Bench) -> float:
        samples = await measure(bench, [bare, POWER])
        return cpu_us(samples[bare]) / cpu_us(samples[POWER])

    return ratio


async def of_pieces(bench: Bench) -> float:
    async def piece_us(name: str) -> float:
        server, inputs = bench.server(name), {"pieces": PIECES, "interval_s": 0.005}
        request = server.raw_request("POST", "/run/flock", {"agent_name": "write", "inputs": inputs}, **STREAM)
        return (await read_streams(server, request, STREAMS, PIECES)).piece_us

    return await piece_us(BARE) / await piece_us(POWER)


async def of_readers(bench: Bench) -> float:
    _, bare_us = await read_events(bench.server(BARE), PIECES)
    _, us = await read_events(bench.server(POWER), PIECES)
    return bare_us / us


async def of_items(bench: Bench) -> float:
    return item_us(bench, None, ITEMS) / item_us(bench, bench.server(POWER), ITEMS)


async def of_csv(bench: Bench) -> float:
    return csv_ms_per_mb(bench, None, CSV_ROWS) / csv_ms_per_mb(bench, bench.server(POWER), CSV_ROWS)


GUARDED: Mapping[str, Ratio] = {
    "a synchronous run, durability=power": of_requests(samples_of_runs),
    "GET /run/{id}, finished": of_requests(samples_of_finished),
    "a piece to its reader": of_pieces,
    "a piece to each of 100 readers": of_readers,
    "a model agent's run": of_requests(samples_of_reviews, BARE_MODEL),
    "a model's answer in 100 pieces": of_requests(samples_of_streamed_reviews, BARE_MODEL),
    "an item of a batch": of_items,
    "CSV in": of_csv,
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


async def tries(bench: Bench, wanted: Mapping[str, float]) -> Mapping[str, Sequence[float]]:
    """Return the ratios of all tries. What is below its share of *wanted* is tried more often."""
    found: dict[str, list[float]] = {name: [] for name in GUARDED}
    for number in range(1, MAX_TRIES + 1):
        for name, measure in GUARDED.items():
            if number <= TRIES or max(found[name]) < MIN_SHARE * wanted.get(name, 0.0):
                found[name].append(await measure(bench))
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
        found = uvloop.run(tries(bench, {} if options.record else recorded().ratios))
    if options.record:
        write_record(found)
        return 0
    return verdict({name: max(ratios) for name, ratios in found.items()}, recorded())


if __name__ == "__main__":
    sys.exit(main())

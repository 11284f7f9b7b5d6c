"""Compare runs and items per second on a Temporal server with bare programs: python -m bench.temporal [--runs N]

Runs: the workflow of the bare program calls one activity, which doubles a number, and waits for its result. It has no
agents, steps, readable records of open runs, deadlines or heartbeats. The ratio shows their cost.

Items: one batch with 100 concurrent items, from its first row to its end. The bare program has one activity per item.
Because histories are limited, each of its workflows has 200 items, and five workflows run 20 activities each.

--million: one batch of a million items. Measures the time to accept, run and read it, and the longest histories. A
cluster allows 51,200 events and 50 MB.

Each program is one process with its client and its worker. They run alternately on one development server that must be
otherwise idle. CPU figures include the server.
"""

import argparse
import asyncio
import contextlib
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import msgspec
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from flock.core import Flock
from flock.models.llm import ModelClient
from flock.runs import BatchOptions, RunStatus, new_id
from flock.temporal import TemporalEngine, TemporalWorker
from tests.support.cluster import temporal_server
from tests.support.servers import free_port

MAX_RUNS = 50
MAX_ITEMS = 100
MAX_WORKFLOWS = 5
ITEMS_PER_WORKFLOW = 200

Do = Callable[[int], Awaitable[None]]


async def double(n: int) -> int:
    return 2 * n


@contextlib.asynccontextmanager
async def open_engine(address: str) -> AsyncIterator[TemporalEngine]:
    flock = Flock("bench")
    flock.add_agent(double)
    async with (
        TemporalWorker(flock.agents, ModelClient(), address, flock=flock.name),
        TemporalEngine(flock.agents, address, flock=flock.name) as engine,
    ):
        yield engine


@contextlib.asynccontextmanager
async def ours(address: str) -> AsyncIterator[Do]:
    async with open_engine(address) as engine:

        async def do(n: int) -> None:
            run = await engine.submit("double", {"n": n})
            run = await engine.wait(run.run_id)
            assert run.status is RunStatus.COMPLETED

        yield do


@activity.defn(name="bare_double")
async def bare_double(n: int) -> int:
    return 2 * n


@workflow.defn(name="bare")
class Bare:
    @workflow.run
    async def run(self, n: int) -> int:
        return await workflow.execute_activity(bare_double, n, start_to_close_timeout=timedelta(seconds=60))


@contextlib.asynccontextmanager
async def bare(address: str) -> AsyncIterator[Do]:
    client = await Client.connect(address)
    runner = UnsandboxedWorkflowRunner()
    async with Worker(client, task_queue="bare", workflows=[Bare], activities=[bare_double], workflow_runner=runner):

        async def do(n: int) -> None:
            assert await client.execute_workflow(Bare.run, n, id=new_id(), task_queue="bare") == 2 * n

        yield do


@contextlib.asynccontextmanager
async def our_items(address: str) -> AsyncIterator[Do]:
    async with open_engine(address) as engine:

        async def do(items: int) -> None:
            rows = (msgspec.Raw(b'{"n":%d}' % n) for n in range(items))
            batch = await engine.submit_batch("double", rows, BatchOptions(max_workers=MAX_ITEMS))
            batch = await engine.wait_batch(batch.batch_id)
            assert (batch.completed_items, batch.failed_items) == (items, 0)

        yield do


@workflow.defn(name="bare_items")
class BareItems:
    @workflow.run
    async def run(self, numbers: list[int]) -> list[int]:
        slots = asyncio.Semaphore(MAX_ITEMS // MAX_WORKFLOWS)

        async def one(n: int) -> int:
            async with slots:
                return await workflow.execute_activity(bare_double, n, start_to_close_timeout=timedelta(seconds=60))

        return await asyncio.gather(*map(one, numbers))


@contextlib.asynccontextmanager
async def bare_items(address: str) -> AsyncIterator[Do]:
    client = await Client.connect(address)
    async with Worker(
        client,
        task_queue="bare",
        workflows=[BareItems],
        activities=[bare_double],
        workflow_runner=UnsandboxedWorkflowRunner(),
        max_concurrent_activities=MAX_ITEMS,
    ):

        async def do(items: int) -> None:
            slots = asyncio.Semaphore(MAX_WORKFLOWS)

            async def some(first: int) -> None:
                numbers = list(range(first, min(first + ITEMS_PER_WORKFLOW, items)))
                async with slots:
                    doubled = await client.execute_workflow(BareItems.run, numbers, id=new_id(), task_queue="bare")
                assert doubled == [2 * n for n in numbers]

            await asyncio.gather(*map(some, range(0, items, ITEMS_PER_WORKFLOW)))

        yield do


def cpu_of(server: subprocess.Popen[bytes]) -> float:
    """Return the CPU seconds of this process and *server*."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_runs(do: Do, runs: int, server: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Return runs per second, and CPU milliseconds per run."""
    slots = asyncio.Semaphore(MAX_RUNS)

    async def one(n: int) -> None:
        async with slots:
            await do(n)

    await asyncio.gather(*map(one, range(MAX_RUNS)))
    began, cpu_s = time.perf_counter(), cpu_of(server)
    await asyncio.gather(*map(one, range(runs)))
    return runs / (time.perf_counter() - began), 1000 * (cpu_of(server) - cpu_s) / runs


async def measure_items(do: Do, items: int, server: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Return items per second, and CPU milliseconds per item."""
    await do(ITEMS_PER_WORKFLOW)
    began, cpu_s = time.perf_counter(), cpu_of(server)
    await do(items)
    return items / (time.perf_counter() - began), 1000 * (cpu_of(server) - cpu_s) / items


async def do_a_million(address: str) -> None:
    async with open_engine(address) as engine:
        began = time.perf_counter()
        rows = (msgspec.Raw(b'{"n":%d}' % n) for n in range(1_000_000))
        batch = await engine.submit_batch("double", rows, BatchOptions(max_workers=MAX_ITEMS))
        print(f"accepted in {time.perf_counter() - began:.0f} s")
        while not batch.status.is_final:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60):
                    batch = await engine.wait_batch(batch.batch_id)
            requested = time.perf_counter()
            batch = await engine.get_batch(batch.batch_id)
            took_ms, done = 1000 * (time.perf_counter() - requested), batch.completed_items
            print(f"{time.perf_counter() - began:.0f} s: {done} have ended (status in {took_ms:.0f} ms)", flush=True)
        assert (batch.completed_items, batch.failed_items) == (1_000_000, 0)
        began, position = time.perf_counter(), 0
        while page := await engine.get_items(batch.batch_id, after=position - 1, limit=1000):
            for item in page:
                assert item.result is not None
                assert (item.position, bytes(item.result)) == (position, b'{"result":%d}' % (2 * position))
                position += 1
        print(f"read {position} results in {time.perf_counter() - began:.0f} s")
        await show_longest(engine, batch.batch_id)
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at the peak, server and worker")


async def show_longest(engine: TemporalEngine, batch_id: str) -> None:
    longest: dict[str, list[int]] = {"batch": [0, 0, 0], "chunk": [0, 0, 0], "rows": [0, 0, 0]}
    for kind, found in longest.items():
        async for each in engine.cluster.client.list_workflows(f"WorkflowId STARTS_WITH '{kind}:{batch_id}'"):
            info = each.raw_info
            found[:] = found[0] + 1, max(found[1], info.history_length), max(found[2], info.history_size_bytes)
    for kind, (count, events, size) in longest.items():
        print(f"{count} histories of kind {kind}: at most {events} events and {size / 1e6:.2f} MB")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="number of runs; 0 skips them")
    parser.add_argument("--items", type=int, default=20_000, metavar="N", help="number of items; 0 skips them")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--million", action="store_true", help="measure only one batch of a million items")
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, temporal_server(Path(folder) / "temporal.db", port) as server:
        if options.million:
            await do_a_million(f"127.0.0.1:{port}")
            return
        for unit, count, measure, kinds in (
            ("run", options.runs, measure_runs, {"ours": ours, "bare": bare}),
            ("item", options.items, measure_items, {"ours": our_items, "bare": bare_items}),
        ):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
            for _ in range(options.rounds if count else 0):
                for name, kind in kinds.items():
                    async with kind(f"127.0.0.1:{port}") as do:
                        found[name].append(await measure(do, count, server))
                        rate, cost = found[name][-1]
                        print(f"{name}: {rate:.0f} {unit}s/s, {cost:.2f} ms CPU per {unit}")
            if count:
                rates = {name: statistics.median(rate for rate, _ in measured) for name, measured in found.items()}
                costs = {name: statistics.median(cost for _, cost in measured) for name, measured in found.items()}
                print(f"{unit}s per second, relative to the bare program: {rates['ours'] / rates['bare']:.2f}")
                print(f"CPU per {unit}, relative to the bare program: {costs['ours'] / costs['bare']:.2f}")


if __name__ == "__main__":
    asyncio.run(main())

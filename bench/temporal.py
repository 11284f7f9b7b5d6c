"""Runs and items a second on a Temporal server, next to bare programs: python -m bench.temporal [--runs N] [--items N]

Runs: the bare program has a workflow that calls one activity, which doubles a number, and waits for what it gives. It
has no agents, no steps, no records that can be read while a run is open, no deadlines and no heartbeats: what those
cost is the ratio.

Items: one batch of ours, 100 at work, from its first row to its end, next to a program with one activity an item: its
workflows take 200 items each, since a history has an end, and five of them have 20 activities at work.

--million: one batch of a million, what it takes to accept it, to work on it and to read it, and how long the longest
histories have become, of the 51,200 events and 50 MB that a cluster takes.

All are one process with its client and its worker, and take turns on one development server, which must not be busy
with anything else; what its CPU costs is told with theirs.
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

from flock.agents.llm import ModelClient
from flock.core import Flock
from flock.runs import BatchOptions, RunStatus, new_id
from flock.temporal import TemporalEngine, TemporalWorker
from tests.support.cluster import temporal_server
from tests.support.servers import free_port

AT_ONCE = 50
ITEMS_AT_ONCE = 100
WORKFLOWS_AT_ONCE = 5
ITEMS_A_WORKFLOW = 200

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
            batch = await engine.submit_batch("double", rows, BatchOptions(max_workers=ITEMS_AT_ONCE))
            batch = await engine.wait_batch(batch.batch_id)
            assert (batch.completed_items, batch.failed_items) == (items, 0)

        yield do


@workflow.defn(name="bare_items")
class BareItems:
    @workflow.run
    async def run(self, numbers: list[int]) -> list[int]:
        places = asyncio.Semaphore(ITEMS_AT_ONCE // WORKFLOWS_AT_ONCE)

        async def one(n: int) -> int:
            async with places:
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
        max_concurrent_activities=ITEMS_AT_ONCE,
    ):

        async def do(items: int) -> None:
            places = asyncio.Semaphore(WORKFLOWS_AT_ONCE)

            async def some(first: int) -> None:
                numbers = list(range(first, min(first + ITEMS_A_WORKFLOW, items)))
                async with places:
                    doubled = await client.execute_workflow(BareItems.run, numbers, id=new_id(), task_queue="bare")
                assert doubled == [2 * n for n in numbers]

            await asyncio.gather(*map(some, range(0, items, ITEMS_A_WORKFLOW)))

        yield do


def cpu_of(server: subprocess.Popen[bytes]) -> float:
    """Seconds of the CPU that this process and *server* have had."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_runs(do: Do, runs: int, server: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Runs a second, and milliseconds of the CPU for each."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(n: int) -> None:
        async with places:
            await do(n)

    await asyncio.gather(*map(one, range(AT_ONCE)))
    began, cpu_s = time.perf_counter(), cpu_of(server)
    await asyncio.gather(*map(one, range(runs)))
    return runs / (time.perf_counter() - began), 1000 * (cpu_of(server) - cpu_s) / runs


async def measure_items(do: Do, items: int, server: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Items a second, and milliseconds of the CPU for each."""
    await do(ITEMS_A_WORKFLOW)
    began, cpu_s = time.perf_counter(), cpu_of(server)
    await do(items)
    return items / (time.perf_counter() - began), 1000 * (cpu_of(server) - cpu_s) / items


async def do_a_million(address: str) -> None:
    async with open_engine(address) as engine:
        began = time.perf_counter()
        rows = (msgspec.Raw(b'{"n":%d}' % n) for n in range(1_000_000))
        batch = await engine.submit_batch("double", rows, BatchOptions(max_workers=ITEMS_AT_ONCE))
        print(f"accepted in {time.perf_counter() - began:.0f} s")
        while not batch.status.is_final:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60):
                    batch = await engine.wait_batch(batch.batch_id)
            asked = time.perf_counter()
            batch = await engine.get_batch(batch.batch_id)
            took_ms, done = 1000 * (time.perf_counter() - asked), batch.completed_items
            print(f"{time.perf_counter() - began:.0f} s: {done} have ended, told in {took_ms:.0f} ms", flush=True)
        assert (batch.completed_items, batch.failed_items) == (1_000_000, 0)
        began, position = time.perf_counter(), 0
        while page := await engine.get_items(batch.batch_id, after=position - 1, limit=1000):
            for item in page:
                assert item.result is not None
                assert (item.position, bytes(item.result)) == (position, b'{"result":%d}' % (2 * position))
                position += 1
        print(f"{position} results read in {time.perf_counter() - began:.0f} s")
        await show_longest(engine, batch.batch_id)
    print(f"memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MB at most, server and worker in one")


async def show_longest(engine: TemporalEngine, batch_id: str) -> None:
    longest: dict[str, list[int]] = {"batch": [0, 0, 0], "chunk": [0, 0, 0], "rows": [0, 0, 0]}
    for kind, found in longest.items():
        async for each in engine.cluster.client.list_workflows(f"WorkflowId STARTS_WITH '{kind}:{batch_id}'"):
            info = each.raw_info
            found[:] = found[0] + 1, max(found[1], info.history_length), max(found[2], info.history_size_bytes)
    for kind, (count, events, size) in longest.items():
        print(f"{count} histories of kind {kind}: {events} events at most, {size / 1e6:.2f} MB at most")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500, metavar="N", help="0 leaves them out")
    parser.add_argument("--items", type=int, default=20_000, metavar="N", help="0 leaves them out")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--million", action="store_true", help="one batch of a million, and nothing else")
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, temporal_server(Path(folder) / "temporal.db", port) as server:
        if options.million:
            await do_a_million(f"127.0.0.1:{port}")
            return
        for what, count, measure, kinds in (
            ("run", options.runs, measure_runs, {"ours": ours, "bare": bare}),
            ("item", options.items, measure_items, {"ours": our_items, "bare": bare_items}),
        ):
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
            for _ in range(options.rounds if count else 0):
                for name, kind in kinds.items():
                    async with kind(f"127.0.0.1:{port}") as do:
                        found[name].append(await measure(do, count, server))
                        rate, cost = found[name][-1]
                        print(f"{name}: {rate:.0f} {what}s/s, {cost:.2f} ms CPU for each")
            if count:
                rates = {name: statistics.median(rate for rate, _ in measured) for name, measured in found.items()}
                costs = {name: statistics.median(cost for _, cost in measured) for name, measured in found.items()}
                print(f"{what}s a second, of the bare program's: {rates['ours'] / rates['bare']:.2f}")
                print(f"CPU for each {what}, of the bare program's: {costs['ours'] / costs['bare']:.2f}")


if __name__ == "__main__":
    asyncio.run(main())

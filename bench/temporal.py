"""Runs a second on a Temporal server, next to a bare program on the same: python -m bench.temporal [--runs 500]

The bare program has a workflow that calls one activity, which doubles a number, and waits for what it gives. It has no
agents, no steps, no records that can be read while a run is open, no deadlines and no heartbeats: what those cost is
the ratio. Both are one process with its client and its worker, and take turns on one development server, which must
not be busy with anything else; what its CPU costs is told with theirs.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from flock.core import Flock
from flock.llm import ModelClient
from flock.runs import RunStatus, new_id
from flock.temporal import TemporalEngine, TemporalWorker
from tests.fakes import free_port, temporal_server

AT_ONCE = 50

Do = Callable[[int], Awaitable[None]]


async def double(n: int) -> int:
    return 2 * n


@contextlib.asynccontextmanager
async def ours(address: str) -> AsyncIterator[Do]:
    flock = Flock("bench")
    flock.add_agent(double)
    async with (
        TemporalWorker(flock.agents, ModelClient(), address, flock=flock.name),
        TemporalEngine(flock.agents, address, flock=flock.name) as engine,
    ):

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


def cpu_of(server: subprocess.Popen[bytes]) -> float:
    """Seconds of the CPU that this process and *server* have had."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(do: Do, runs: int, server: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Runs a second, and milliseconds of the CPU for each."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(n: int) -> None:
        async with places:
            await do(n)

    await asyncio.gather(*map(one, range(AT_ONCE)))
    began, cpu_s = time.perf_counter(), cpu_of(server)
    await asyncio.gather(*map(one, range(runs)))
    return runs / (time.perf_counter() - began), 1000 * (cpu_of(server) - cpu_s) / runs


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    kinds = {"ours": ours, "bare": bare}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, temporal_server(Path(folder) / "temporal.db", port) as server:
        for _ in range(options.rounds):
            for name, kind in kinds.items():
                async with kind(f"127.0.0.1:{port}") as do:
                    found[name].append(await measure(do, options.runs, server))
                    print(f"{name}: {found[name][-1][0]:.0f} runs/s, {found[name][-1][1]:.1f} ms CPU a run")
    rates = {name: statistics.median(rate for rate, _ in measured) for name, measured in found.items()}
    costs = {name: statistics.median(cost for _, cost in measured) for name, measured in found.items()}
    print(f"runs a second, of the bare program's: {rates['ours'] / rates['bare']:.2f}")
    print(f"CPU a run, of the bare program's: {costs['ours'] / costs['bare']:.2f}")


if __name__ == "__main__":
    asyncio.run(main())

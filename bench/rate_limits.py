"""Run a batch against a provider that limits its rate, is randomly overloaded, and stops in the middle.

    python -m bench.rate_limits                          # 6,000 requests a minute, one process
    python -m bench.rate_limits --per-minute 600         # as slow as many real limits: about 8 minutes
    python -m bench.rate_limits --processes 2            # two batches of two processes on one file
    python -m bench.rate_limits --outage-s 10            # the provider stops in the middle, and comes back
    python -m bench.rate_limits --outage-s 10 --fallback

The provider is a fake server on a real socket. It accepts calls at the rate of the limit, refuses the others with 429
and ``retry-after-ms``, and refuses 10 % with 529, at random. The time that the limit allows is the number of rows
divided by the limit. Exits with 1 if an item fails, or if the batches take longer than 1.15 times that, and the outage.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
import httpx

from flock.core import Flock, FlockFactory
from flock.limits import Limits
from flock.runs import BatchOptions, RunStatus
from tests.support.models import LimitedModel
from tests.support.servers import free_port

MAX_RATIO = 1.15
LATENCY_S = 0.2


async def run_batch(store: str, rows: int, workers: int, models: list[str]) -> None:
    """Run one batch in this process, and print how it ended."""
    flock = Flock("limits", model=models)
    flock.add_agent(FlockFactory.create_default_agent(name="ask", input="number: int", output="answer: str"))
    limits = Limits(max_concurrency=2 * workers)
    started = time.monotonic()
    async with flock.engine(store=store, limits=limits) as engine:
        options = BatchOptions(max_workers=workers)
        batch = await engine.submit_batch("ask", ({"number": number} for number in range(rows)), options)
        batch = await engine.wait_batch(batch.batch_id)
        failed = await engine.get_items(batch.batch_id, statuses=[RunStatus.FAILED], limit=1)
        print(
            json.dumps(
                {
                    "took_s": time.monotonic() - started,
                    "completed": batch.completed_items - batch.failed_items - batch.cancelled_items,
                    "error": failed[0].error if failed else None,
                }
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-minute", type=int, default=6000)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--outage-s", type=float, default=0)
    parser.add_argument("--fallback", action="store_true", help="a second model without limits")
    parser.add_argument("--child", nargs=2, metavar=("STORE", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    models = ["ollama/limited", "llamacpp/other"] if options.fallback else ["ollama/limited"]
    if options.child:
        anyio.run(run_batch, options.child[0], int(options.child[1]), options.workers, models)
        return

    limited = LimitedModel(options.per_minute / 60, overloaded=0.1, latency_s=LATENCY_S)
    other = LimitedModel(1e6, latency_s=LATENCY_S)
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
    env = os.environ | {"OLLAMA_BASE_URL": urls[0], "LLAMACPP_BASE_URL": urls[1]}
    rows = options.rows // options.processes
    allowed_s = options.rows / (options.per_minute / 60)
    with tempfile.TemporaryDirectory() as folder, other.serve(port=ports[1]), contextlib.ExitStack() as up:
        up.enter_context(limited.serve(port=ports[0]))
        command = [sys.executable, "-m", "bench.rate_limits", "--workers", str(options.workers)]
        command += ["--fallback"] if options.fallback else []
        child = [*command, "--child", str(Path(folder) / "flock.db"), str(rows)]
        children = [
            subprocess.Popen(child, env=env, stdout=subprocess.PIPE, text=True) for _ in range(options.processes)
        ]
        answered_in_outage = 0
        if options.outage_s:
            while limited.statuses[200] < options.rows / 3:
                time.sleep(0.05)
            up.close()
            before = other.statuses[200]
            with contextlib.suppress(httpx.TransportError):
                httpx.post(f"{urls[0]}/chat/completions")
                raise AssertionError("the provider is not down")
            time.sleep(options.outage_s)
            answered_in_outage = other.statuses[200] - before
            up.enter_context(limited.serve(port=ports[0]))
        results = [json.loads(process.communicate()[0]) for process in children]
    took_s = max(result["took_s"] for result in results)
    completed = sum(result["completed"] for result in results)
    ratio = took_s / (allowed_s + options.outage_s)
    print(f"{completed:,} of {options.rows:,} rows completed in {took_s:.1f} s, with {options.processes} process(es)")
    print(
        f"{options.per_minute:,} requests a minute allow {allowed_s:.1f} s, and the outage took {options.outage_s:g} s"
    )
    print(f"ratio {ratio:.3f}; refused: {limited.share(429):.1%} with 429, {limited.share(529):.1%} with 529")
    if options.fallback:
        print(f"the other model answered {other.statuses[200]:,} calls, {answered_in_outage:,} of them in the outage")
    errors = {result["error"] for result in results} - {None}
    print(*errors, sep="\n", end="")
    sys.exit(completed < options.rows or ratio > MAX_RATIO)


if __name__ == "__main__":
    main()

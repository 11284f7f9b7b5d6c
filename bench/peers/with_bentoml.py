"""A service and a task of BentoML: python -m bench.peers.with_bentoml PORT"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import bentoml


@bentoml.service(workers=1, traffic={"timeout": 600, "max_concurrency": 1000})
class Bench:
    @bentoml.api
    async def add(self, a: int, b: int = 2) -> int:
        return a + b

    @bentoml.task
    async def later(self, a: int, b: int = 2) -> int:
        return a + b

    @bentoml.api
    async def write(self, pieces: int, interval_s: float) -> AsyncGenerator[str]:
        await asyncio.sleep(1)
        for _ in range(pieces):
            yield f"{time.monotonic_ns()} "
            await asyncio.sleep(interval_s)


if __name__ == "__main__":
    command = str(Path(sys.executable).with_name("bentoml"))
    os.execv(
        command, [command, "serve", "bench.peers.with_bentoml:Bench", "--port", sys.argv[1], "--host", "127.0.0.1"]
    )

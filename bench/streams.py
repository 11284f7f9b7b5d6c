"""How late does streamed text arrive, and what do many readers cost?

    python -m bench.streams

A real server in its own process, and clients over loopback in this one. First, the time to the receipt of the event
from an agent's ``emit``, and from the first token of a fake model provider, with 100 streams open. Then 1,000 readers
of 10 runs that write 100 pieces a second each: the memory of the server beyond that of the idle one, and its CPU time
for each piece and reader. Then 100 streams at once through OpenAI's protocol beside the same without, in turns: the
CPU time of the server for each piece, and the median of the ratios; the same for runs that are not streamed. Last, the
memory of an idle server with each protocol.
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from bench.machine import cpu_s, memory_kb

FLOCK = """
import asyncio, time
from flock.core import Flock, FlockFactory
from flock.runs import RunContext

flock = Flock("streams")
flock.add_agent(FlockFactory.create_default_agent("model", input="n: int", output="text", model="openai/fake"))

@flock.agent
async def stamp(pieces: int, interval_s: float, wait_s: float, context: RunContext) -> str:
    await asyncio.sleep(wait_s)
    text = ""
    for _ in range(pieces):
        piece = f"{time.monotonic_ns()} "
        context.emit(piece)
        text += piece
        await asyncio.sleep(interval_s)
    return text
"""


class Client:
    """A server in its own process."""

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self._writers: list[asyncio.StreamWriter] = []  # a connection ends with its writer

    async def connect(
        self, method: str, path: str, body: object = None, prefer: str = "respond-async"
    ) -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        content = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nPrefer: {prefer}\r\n\r\n"
        )
        self._writers.append(writer)
        writer.write(head.encode() + content)
        await reader.readuntil(b"\r\n\r\n")
        return reader

    @property
    def memory_mib(self) -> float:
        return memory_kb(self.pid) / 1024

    @property
    def cpu_s(self) -> float:
        return cpu_s(self.pid)


def request(pieces: int, interval_s: float, wait_s: float) -> dict[str, object]:
    inputs = {"pieces": pieces, "interval_s": interval_s, "wait_s": wait_s}
    return {"agent_name": "stamp", "inputs": inputs}


async def provide(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request like a model provider, with the time of the first token as its text."""

    async def send(content: str, finish_reason: str | None = None) -> None:
        chunk = {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]}
        writer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await writer.drain()

    head = await reader.readuntil(b"\r\n\r\n")
    (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
    (number,) = re.findall(rb"NUMBER(\d+)", (await reader.readexactly(int(length))).replace(b'\\"n\\": ', b"NUMBER"))
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(2 + 0.02 * int(number))
    await send(f'{{"text": "{time.monotonic_ns()} ')
    await asyncio.sleep(0.5)
    await send('"}', "stop")
    writer.write(b"data: [DONE]\n\n")
    writer.close()


def stamped(number: int) -> dict[str, object]:
    return request(1, 0.5, 2 + 0.02 * number)


def asked(number: int) -> dict[str, object]:
    return {"agent_name": "model", "inputs": {"n": number}}


async def latencies_ms(client: Client, streams: int, body_of: Callable[[int], dict[str, object]]) -> list[float]:
    """Return how long the first piece of each stream took. All are open, and they write at different times."""

    async def first(number: int) -> float:
        reader = await client.connect("POST", "/run/flock", body_of(number))
        async for line in reader:
            if found := re.search(rb'"text":"(\d+) ', line):
                return (time.monotonic_ns() - int(found[1])) / 1e6
        raise AssertionError("the stream ended without text")

    return list(await asyncio.gather(*map(first, range(streams))))


async def crowd(client: Client, runs: int, readers: int, pieces: int, interval_s: float) -> dict[str, float]:
    """Let many readers follow a few runs, and return what it cost the server."""
    counts: Counter[str] = Counter()
    idle_mib, peak_mib = client.memory_mib, 0.0
    openers = [await client.connect("POST", "/run/flock", request(pieces, interval_s, 10)) for _ in range(runs)]
    run_ids = [re.findall(rb'"run_id":"([^"]+)"', await reader.readuntil(b"\n\n"))[0].decode() for reader in openers]

    async def read(reader: asyncio.StreamReader) -> None:
        last = b""
        while data := await reader.read(65536):
            counts["bytes"] += len(data)
            counts["events"] += data.count(b"event: output.")
            last = last[-40:] + data
            if b"event: run.completed" in last:
                counts["ended"] += 1
                return

    followers = [await client.connect("GET", f"/run/{run_ids[i % runs]}/events") for i in range(readers - runs)]
    tasks = [asyncio.create_task(read(reader)) for reader in (*openers, *followers)]
    cpu_s, began = client.cpu_s, time.monotonic()
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0.5)
        peak_mib = max(peak_mib, client.memory_mib)
    assert counts["ended"] == readers, counts
    cpu_s = client.cpu_s - cpu_s
    return {
        "seconds": time.monotonic() - began,
        "more MiB at the peak": peak_mib - idle_mib,
        "server CPU seconds": cpu_s,
        "microseconds of CPU for each piece and reader": cpu_s / (pieces * readers) * 1e6,
        "events for each reader": counts["events"] / readers,
        "microseconds of CPU for each event": cpu_s / counts["events"] * 1e6,
    }


async def in_turns(
    client: Client, rounds: int, count: int, kinds: Mapping[str, Callable[[], Awaitable[object]]]
) -> dict[str, float]:
    """Return the microseconds of CPU of each kind, for one of *count*, and the ratios to the first kind."""
    spent: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, send in kinds.items():
            cpu_s = client.cpu_s
            await send()
            spent[kind].append((client.cpu_s - cpu_s) / count * 1e6)
    figures = {kind: statistics.median(values) for kind, values in spent.items()}
    first, *others = kinds
    for kind in others:
        pairs = zip(spent[kind], spent[first], strict=True)
        figures[f"{kind}, ratio"] = statistics.median(one / other for one, other in pairs)
    return figures


def by_protocol(body: dict[str, object], **more: object) -> dict[str, tuple[str, dict[str, object]]]:
    """Return the path and the body of the same run in each protocol. *more* is for OpenAI's."""
    openai, text = {"model": "stamp", **more}, json.dumps(body["inputs"])
    return {
        "POST /run/flock": ("/run/flock", body),
        "chat": ("/v1/chat/completions", {**openai, "messages": [{"role": "user", "content": text}]}),
        "responses": ("/v1/responses", {**openai, "input": text}),
    }


async def streamed(client: Client, streams: int, rounds: int) -> dict[str, float]:
    """Return the microseconds of CPU for each piece of many streams at once."""

    async def read(path: str, body: object, end: bytes) -> None:
        reader, last = await client.connect("POST", path, body, prefer="wait=60"), b""
        while end not in last:
            data = await reader.read(65536)
            assert data, "the stream ended before its end"
            last = last[-40:] + data

    async def read_all(*sent: Any) -> None:
        await asyncio.gather(*(read(*sent) for _ in range(streams)))

    ends = (b"event: run.completed", b"[DONE]", b"event: response.completed")
    kinds = by_protocol(request(400, 0.005, 0), stream=True).items()
    asked = {kind: functools.partial(read_all, *sent, end) for (kind, sent), end in zip(kinds, ends, strict=True)}
    return await in_turns(client, rounds, streams * 400, asked)


async def not_streamed(client: Client, runs: int, rounds: int) -> dict[str, float]:
    """Return the microseconds of CPU for each of many short runs, whose clients wait for the result."""
    limits, base_url = httpx.Limits(max_connections=10), f"http://127.0.0.1:{client.port}"
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=60) as connections:

        async def send(path: str, body: object) -> None:
            (await connections.post(path, json=body)).raise_for_status()

        async def send_all(*sent: Any) -> None:
            await asyncio.gather(*(send(*sent) for _ in range(runs)))

        kinds = {kind: functools.partial(send_all, *sent) for kind, sent in by_protocol(request(1, 0, 0)).items()}
        await in_turns(client, 1, runs, kinds)  # the first runs cost more
        return await in_turns(client, rounds, runs, kinds)


@contextlib.asynccontextmanager
async def serving(script: Path, *options: str, **environment: str) -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flock", "serve", str(script), "--port", "0", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, **environment},
    )
    assert process.stdout is not None
    log = None
    try:
        async for line in process.stdout:
            if found := re.search(rb"unning on http://127.0.0.1:(\d+)", line):
                log = asyncio.create_task(process.stdout.read())
                yield Client(int(found[1]), process.pid)
                break
    finally:
        process.terminate()
        await process.wait()
        await asyncio.gather(*([log] if log else []))


async def idle_kb(script: Path, rounds: int) -> dict[str, float]:
    """Return the memory of a server that has served one page, with each protocol, in turns."""
    found: dict[str, list[float]] = {protocols: [] for protocols in ("none", "openai", "mcp", "openai mcp")}
    for _ in range(rounds):
        for protocols, values in found.items():
            options = [option for each in protocols.split() for option in ("--protocol", each)]
            async with serving(script, "--store", ":memory:", *options) as client:
                await client.connect("GET", "/agents")
                values.append(memory_kb(client.pid))
    return {protocols: statistics.median(values) for protocols, values in found.items()}


def flock_in(folder: str) -> Path:
    script = Path(folder, "streams.py")
    script.write_text(FLOCK)
    return script


async def main(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        script = flock_in(folder)
        options = ("--store", str(Path(folder, "flock.db")), "--max-event-streams", "5000")
        provider = await asyncio.start_server(provide, "127.0.0.1", 0)
        base_url = f"http://127.0.0.1:{provider.sockets[0].getsockname()[1]}/v1"
        async with serving(script, *options, OPENAI_BASE_URL=base_url, OPENAI_API_KEY="x") as client:
            for name, body_of in (("piece of a function", stamped), ("token of a model", asked)):
                quantiles = statistics.quantiles(await latencies_ms(client, arguments.streams, body_of), n=100)
                figures = f"median {quantiles[49]:.2f} ms, 95 % {quantiles[94]:.2f} ms"
                print(f"first {name}, {arguments.streams} streams: {figures}")
            for name, value in (await crowd(client, arguments.runs, arguments.readers, arguments.pieces, 0.01)).items():
                print(f"{arguments.readers} readers of {arguments.runs} runs: {name}: {value:.2f}")
            await print_protocols(client, arguments)
        for name, value in (await idle_kb(script, arguments.rounds)).items():
            print(f"memory of an idle server with {name}: {value / 1024:.2f} MiB")


async def print_protocols(client: Client, arguments: argparse.Namespace) -> None:
    for name, value in (await streamed(client, arguments.streams, arguments.rounds)).items():
        print(f"{arguments.streams} streams at once, microseconds of CPU for each piece: {name}: {value:.2f}")
    for name, value in (await not_streamed(client, 500, arguments.rounds)).items():
        print(f"runs that are not streamed, microseconds of CPU for each: {name}: {value:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--pieces", type=int, default=1000, help="pieces of each run (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="of streams through each protocol (default: 5)")
    asyncio.run(main(parser.parse_args()))

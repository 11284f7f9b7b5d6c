"""Attack a server for ten minutes: does it stay up and respond to a client with a key?

    python -m bench.hostile                      # --minutes 1 for a short try
    python -m bench.hostile --url URL --key KEY  # during a load test; see ``bench.soak --hostile``

Each client runs random attacks: endless heads and bodies, responses that are not read, floods, garbage. With ``--key``
also attacks that need a key: wide tables, rows with unknown members, compressed blank lines, static inputs that grow,
uploads and event streams that stay open, a full queue. Without ``--url``, a server is started with 512 MiB of address
space. It requires a key, which the attackers do not have. Another client has a key and starts a run each second. Linux
only. Exits with 1 if a response was wrong or missing, or if the server died.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx

from bench.soak import log_faults, memory_kib, started
from flock.web.auth import new_key

MEMORY_BYTES = 512 * 1024 * 1024
#: The timeout of one attack, and how much it sends at most.
ATTACK_TIMEOUT_S = 20
ATTACK_BYTES = 64 * 1024 * 1024
#: A static file of 1.1 MB.
LARGE = "/static/vendor/redoc/redoc.standalone.js"
PIECE = 64 * 1024


class Target:
    """A server and the client's key for it, or ""."""

    def __init__(self, url: str, key: str) -> None:
        self.port = int(url.rpartition(":")[2])
        self.key = key

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=PIECE)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def head(self, method: str, path: str, *headers: str) -> bytes:
        key = [f"X-API-Key: {self.key}"] if self.key else []
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *key, *headers]
        return "\r\n".join([*lines, "", ""]).encode()

    def request(self, path: str, body: bytes, media_type: str, *headers: str) -> bytes:
        length = f"Content-Length: {len(body)}"
        return self.head("POST", path, f"Content-Type: {media_type}", length, *headers) + body

    async def send_all(self, request: bytes) -> None:
        """Send a request and read the start of its response."""
        async with self.connected() as (reader, writer):
            writer.write(request)
            await writer.drain()
            await reader.read(PIECE)


Attack = Callable[[Target], Awaitable[None]]
#: Attacks without a key, and attacks that need one.
KEYLESS: list[Attack] = []
KEYED: list[Attack] = []


async def send_until_closed(writer: asyncio.StreamWriter, piece: bytes, pause_s: float = 0) -> None:
    sent = 0
    while sent < ATTACK_BYTES:
        writer.write(piece)
        await writer.drain()
        sent += len(piece)
        await asyncio.sleep(pause_s)


# Without a key


@KEYLESS.append
async def head_without_end(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        await send_until_closed(writer, b"X-Long: " + b"x" * PIECE + b"\r\n")


@KEYLESS.append
async def head_after_responses(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(3 * target.head("GET", LARGE) + b"GET / HTTP/1.1\r\nX: ")
        await send_until_closed(writer, b"x" * PIECE)


@KEYLESS.append
async def head_by_the_byte(target: Target) -> None:
    async with target.connected() as (_, writer):
        await send_until_closed(writer, b"G", pause_s=0.1)


@KEYLESS.append
async def unread_responses(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(20 * target.head("GET", LARGE))
        await asyncio.sleep(ATTACK_TIMEOUT_S)


@KEYLESS.append
async def response_by_the_byte(target: Target) -> None:
    async with target.connected() as (reader, writer):
        writer.write(target.head("GET", LARGE))
        for _ in range(10 * ATTACK_TIMEOUT_S):
            await reader.readexactly(1)
            await asyncio.sleep(0.1)


@KEYLESS.append
async def pipelined_requests(target: Target) -> None:
    async with target.connected() as (_, writer):
        await send_until_closed(writer, 1000 * target.head("GET", "/healthz"))


@KEYLESS.append
async def body_by_the_byte(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(target.head("POST", "/run/flock", "Content-Type: application/json", "Content-Length: 1000000"))
        await send_until_closed(writer, b" ", pause_s=0.1)


@KEYLESS.append
async def body_without_end(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(target.head("POST", "/run/batch?agent_name=add", "Transfer-Encoding: chunked"))
        await send_until_closed(writer, b"%x\r\n%b\r\n" % (PIECE, b"," * PIECE))


@KEYLESS.append
async def trailers_without_end(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(target.head("POST", "/run/flock", "Transfer-Encoding: chunked") + b"0\r\n")
        await send_until_closed(writer, b"X-Long: " + b"x" * 1000 + b"\r\n")


@KEYLESS.append
async def many_connections(target: Target) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(200):
            _, writer = await stack.enter_async_context(target.connected())
            writer.write(random.choice([b"", b"GET", target.head("GET", "/docs")]))
        await asyncio.sleep(random.uniform(0, ATTACK_TIMEOUT_S))


@KEYLESS.append
async def garbage(target: Target) -> None:
    heads = [
        b"",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        target.head("GET", "/" + "%2e" * 20_000),
        target.head("GET", "/runs/", "Origin: http://["),
        target.head("GET", "/docs", *["X-Many: x"] * 5000),
        target.head("OPTIONS", "/run/flock", "Origin: http://evil.example", "Access-Control-Request-Method: POST"),
        target.head("GET", "/docs", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    ]
    async with target.connected() as (reader, writer):
        writer.write(random.choice(heads) + random.randbytes(random.randrange(PIECE)))
        await reader.read(PIECE)


# With a key


@KEYED.append
async def wide_header(target: Target) -> None:
    header = ",".join(f"c{n}" for n in range(random.choice([9_000, 40_000]))).encode()
    options = random.choice(["", "&on_extra=keep", "&on_extra=ignore"])
    await target.send_all(target.request(f"/run/batch?agent_name=add{options}", header + b"\n1\n", "text/csv"))


@KEYED.append
async def unknown_static_inputs(target: Target) -> None:
    body = {
        "agent_name": "add",
        "batch_inputs": [{"a": n} for n in range(20)],
        "static_inputs": {f"s{n}": n for n in range(50_000)},
    }
    await target.send_all(target.request("/run/batch", json.dumps(body).encode(), "application/json"))


@KEYED.append
async def unknown_members(target: Target) -> None:
    row = json.dumps({f"m{n}": n for n in range(60_000)}).encode() + b"\n"
    await target.send_all(target.request("/run/batch?agent_name=add", 12 * row, "application/x-ndjson"))


@KEYED.append
async def compressed_blank_lines(target: Target) -> None:
    packed = gzip.compress(b"\n" * 32 * 1024 * 1024)
    request = target.request("/run/batch?agent_name=add", packed, "application/x-ndjson", "Content-Encoding: gzip")
    await target.send_all(request)


@KEYED.append
async def growing_static_inputs(target: Target) -> None:
    packed = gzip.compress(b"{}\n" * 1_000_000)
    static = "%7B%22text%22%3A%22" + "x" * 5000 + "%22%7D"
    path = f"/run/batch?agent_name=repeat&static_inputs={static}"
    await target.send_all(target.request(path, packed, "application/x-ndjson", "Content-Encoding: gzip"))


@KEYED.append
async def upload_without_end(target: Target) -> None:
    async with target.connected() as (_, writer):
        head = ("Content-Type: application/x-ndjson", "Transfer-Encoding: chunked")
        writer.write(target.head("POST", "/run/batch?agent_name=add", *head))
        rows = b'{"a": 1}\n' * 1000
        await send_until_closed(writer, b"%x\r\n%b\r\n" % (len(rows), rows), pause_s=0.1)


@KEYED.append
async def unread_events(target: Target) -> None:
    inputs = {"agent_name": "repeat", "inputs": {"text": "x" * 1000, "times": 1000}, "async_run": True}
    async with target.connected() as (reader, writer):
        writer.write(target.request("/run/flock", json.dumps(inputs).encode(), "application/json"))
        response = await reader.read(PIECE)
        if b'"run_id": "' not in response and b'"run_id":"' not in response:
            return
        run_id = response.partition(b'"run_id"')[2].split(b'"')[1].decode()
        writer.write(target.head("GET", f"/run/{run_id}/events"))
        await asyncio.sleep(ATTACK_TIMEOUT_S)


@KEYED.append
async def full_queue(target: Target) -> None:
    inputs = {"agent_name": "repeat", "inputs": {"text": "x" * 500_000, "times": 1}, "async_run": True}
    request = target.request("/run/flock", json.dumps(inputs).encode(), "application/json")
    async with target.connected() as (reader, writer):
        for _ in range(20):
            writer.write(request)
            await writer.drain()
            if not await reader.read(PIECE):
                return


@KEYED.append
async def long_pages(target: Target) -> None:
    async with target.connected() as (_, writer):
        writer.write(5 * target.head("GET", "/runs?limit=1000&include=inputs,result"))
        await asyncio.sleep(random.uniform(0, ATTACK_TIMEOUT_S))


async def attack(target: Target, until: float, tally: Counter[str]) -> None:
    """Run random attacks of one client until *until*."""
    attacks = [*KEYLESS, *(KEYED if target.key else [])]
    while time.monotonic() < until:
        chosen = random.choice(attacks)
        tally[chosen.__name__] += 1
        with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
            async with asyncio.timeout(ATTACK_TIMEOUT_S):
                await chosen(target)


async def attack_together(target: Target, minutes: float, clients: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(attack(target, until, tally))
    return tally


# The server, and a client with a key


def peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


async def serve_attacked(folder: Path, minutes: float, clients: int) -> list[str]:
    """Start a server, attack it, and return what went wrong."""
    key, faults = new_key(), list[str]()
    took_s: list[float] = []
    command = [sys.executable, "-m", "flock", "serve", "bench/soak.py", "--port", "0"]
    env = {**os.environ, "FLOCK_API_KEYS": f"ann={key}", "MALLOC_ARENA_MAX": "2"}

    def limit_memory() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    with started([*command, "--store", str(folder / "hostile.db")], env, folder, limit_memory) as (url, pid):
        attackers = asyncio.create_task(attack_together(Target(url, ""), minutes, clients))
        async with httpx.AsyncClient(base_url=url, timeout=30, headers={"X-API-Key": key}) as client:
            while not attackers.done():
                began = time.monotonic()
                try:
                    response = await client.post("/run/flock", json={"agent_name": "add", "inputs": {"a": 1}})
                    if response.json().get("result") != {"result": 3}:
                        faults.append(f"{response.status_code}: {response.text[:300]}")
                except httpx.HTTPError as exc:
                    faults.append(repr(exc))
                took_s.append(time.monotonic() - began)
                await asyncio.wait([attackers], timeout=1)
        for name, count in sorted(attackers.result().items()):
            print(f"{name:28} {count}")
        print(f"memory: {memory_kib(pid) / 1024:.1f} MiB at the end, {peak_kib(pid) / 1024:.1f} MiB at the peak")
    p50, p99 = statistics.median(took_s), statistics.quantiles(took_s, n=100)[98]
    print(f"{len(took_s)} runs with a key, 50 % in {p50 * 1000:.0f} ms, 99 % in {p99 * 1000:.0f} ms")
    return [*faults, *log_faults(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="minutes of attacks (default: 10)")
    parser.add_argument("--clients", type=int, default=10, help="concurrent clients (default: 10)")
    parser.add_argument("--url", help="the URL of a running server (default: start one)")
    parser.add_argument("--key", default="", help="the key of the attackers for it")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="the seed of their random choices")
    options = parser.parse_args()
    random.seed(options.seed)
    print(f"--seed {options.seed}", flush=True)
    if options.url is not None:
        asyncio.run(attack_together(Target(options.url, options.key), options.minutes, options.clients))
        return 0
    with tempfile.TemporaryDirectory(dir=".", prefix="bench-hostile-") as made:
        faults = asyncio.run(serve_attacked(Path(made).resolve(), options.minutes, options.clients))
    for fault in faults[:20]:
        print(fault)
    print("MISSED" if faults else "met", f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs that wait, and clients that wait for runs: how late they learn of the end, and what each costs."""

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from bench.load import connected, send_all
from bench.machine import cpu_s, forget_peak, memory_kb, peak_kb
from bench.measures.bench import Bench, Row, empty
from bench.measures.streams import Listener
from bench.servers import BARE, FASTAPI, MEMORY, OURS, POWER, Server, installed

RUNS_PER_S = 100
#: How long a run takes whose end is awaited, and how many connections are enough for that.
NAP_S, CONNECTIONS = 0.3, 64
READERS = 100
PIECE_INTERVAL_S = 0.01
TIMEOUT_S = 60
FOREVER_S = 3600


def nap(seconds: float, **more: Any) -> Any:
    return {"agent_name": "nap", "inputs": {"seconds": seconds}, **more}


def quantiles_ms(delays_ns: Sequence[int]) -> tuple[float, float]:
    """Return the median and the 99th percentile."""
    quantiles = statistics.quantiles(delays_ns, n=100)
    return quantiles[49] / 1e6, quantiles[98] / 1e6


# A long poll


async def wake_up(bench: Bench) -> list[Row]:
    names = [BARE, *OURS]
    p50, p99 = empty(names), empty(names)
    for name in bench.turns(names, bench.effort.few_rounds + 1):
        delays = await wake_up_ns(bench.server(name), round(RUNS_PER_S * bench.effort.wake_s))
        for figures, figure in zip((p50, p99), quantiles_ms(delays), strict=True):
            figures[name].append(figure)
    what = f"wake-up of a long poll, {RUNS_PER_S} runs/s"
    return [Row(title=f"{what}: p50, ms", figures=p50), Row(title=f"{what}: p99, ms", figures=p99)]


async def wake_up_ns(server: Server, runs: int) -> list[int]:
    """Start runs at a constant rate. Return how long after its result each had reached the client that waits for it."""
    start = server.raw_request("POST", "/run/flock", nap(NAP_S, async_run=True))
    delays: list[int] = []
    idle: asyncio.Queue[int] = asyncio.Queue()
    all_there = asyncio.Event()

    def handler(number: int) -> Any:
        def handle(status: int, body: bytes) -> bytes | None:
            run = msgspec.json.decode(body)
            if status == 202:
                return server.raw_request("GET", f"/run/{run['run_id']}?wait=30")
            delays.append(time.monotonic_ns() - run["result"]["result"])
            idle.put_nowait(number)
            if len(delays) == runs:
                all_there.set()
            return None

        return handle

    async with connected(server, map(handler, range(CONNECTIONS))) as connections:
        for number in range(CONNECTIONS):
            idle.put_nowait(number)
        began = time.perf_counter()
        for number in range(runs):
            await asyncio.sleep(max(0, began + number / RUNS_PER_S - time.perf_counter()))
            connections[await idle.get()].send(start)
        await asyncio.wait_for(all_there.wait(), TIMEOUT_S)
    return delays


# Events


async def events(bench: Bench) -> list[Row]:
    names = [BARE, MEMORY, POWER]
    p99, cpu = empty(names), empty(names)
    for name in bench.turns(names, bench.effort.few_rounds):
        late_ms, each_us = await read_events(bench.server(name), bench.effort.pieces)
        p99[name].append(late_ms)
        cpu[name].append(each_us)
    what = f"events to {READERS} readers, {1 / PIECE_INTERVAL_S:g} pieces/s"
    return [
        Row(title=f"{what}: p99, ms", figures=p99),
        Row(title=f"{what}: server CPU for each piece and reader, µs", figures=cpu),
    ]


async def read_events(server: Server, pieces: int, readers_at: Server | None = None) -> tuple[float, float]:
    """Return how late a piece reaches a reader, and the CPU time of the server for it.

    The readers may ask another server on its store.
    """
    inputs = {"pieces": pieces, "interval_s": PIECE_INTERVAL_S}
    run_id = server.post("/run/flock", {"agent_name": "write", "inputs": inputs, "async_run": True})["run_id"]
    at = readers_at or server
    request = at.raw_request("GET", f"/run/{run_id}/events", Accept="text/event-stream")
    loop, used_s = asyncio.get_running_loop(), cpu_s(server.pid)
    opened = [await loop.create_connection(lambda: Listener(request), "127.0.0.1", at.port) for _ in range(READERS)]
    await asyncio.wait_for(asyncio.gather(*(listener.ended for _, listener in opened)), TIMEOUT_S)
    used_s = cpu_s(server.pid) - used_s
    if missing := sum(len(listener.late_ns) != pieces for _, listener in opened):
        raise RuntimeError(f"{at.name}: {missing} of {READERS} readers did not get all {pieces} pieces.")
    delays = [late for _, listener in opened for late in listener.late_ns.values()]
    return quantiles_ms(delays)[1], used_s / (pieces * READERS) * 1e6


# Many at once


async def running(bench: Bench) -> list[Row]:
    """Each round has a new server, because the second thousand finds the memory of the first one."""
    names, count = installed([BARE, FASTAPI, MEMORY, POWER]), bench.effort.running
    took, each = empty(names), empty(names)
    for number, name in enumerate(bench.turns(names, bench.effort.few_rounds)):
        options = ("--max-concurrency", str(count)) if name in OURS else ()
        with bench.fresh(name, *options, store=f"running {number}.db") as server:
            took_s, each_kb = await run_at_once(server, count)
        took[name].append(took_s)
        each[name].append(each_kb)
    return [
        Row(title=f"{count:,} runs that await 1 s, s", figures=took),
        Row(title="memory for each of them, KB", figures=each),
    ]


async def run_at_once(server: Server, count: int) -> tuple[float, float]:
    """Return the seconds until all runs have ended, and the memory for each at the peak, in KB."""
    warm_up = [server.raw_request("POST", "/run/flock", nap(0))] * 100
    await send_all(server, warm_up, connections=4)
    request, ended, all_ended = server.raw_request("POST", "/run/flock", nap(1)), 0, asyncio.Event()

    def handle(status: int, body: bytes) -> None:
        nonlocal ended
        ended += status == 200
        if ended == count:
            all_ended.set()

    idle_kb = forget_peak(server.pid)
    async with connected(server, [handle] * count) as connections:
        began = time.perf_counter()
        for connection in connections:
            connection.send(request)
        await asyncio.wait_for(all_ended.wait(), TIMEOUT_S)
        took_s = time.perf_counter() - began
    return took_s, (peak_kb(server.pid) - idle_kb) / count


async def waiters(bench: Bench) -> list[Row]:
    names = [BARE, MEMORY, POWER]
    each = {}
    for name in names:
        with bench.fresh(name, store="waiters.db") as server:
            each[name] = [await kb_for_each_waiter(server, bench.effort.waiters)]
    return [Row(title=f"memory for each of {bench.effort.waiters:,} clients that wait for a run, KB", figures=each)]


async def kb_for_each_waiter(server: Server, count: int) -> float:
    run_id = server.post("/run/flock", nap(FOREVER_S, async_run=True))["run_id"]
    await send_all(server, [server.raw_request("GET", f"/run/{run_id}")] * 100, connections=4)
    idle_kb = memory_kb(server.pid)
    request = server.raw_request("GET", f"/run/{run_id}?wait={FOREVER_S}")
    async with connected(server, [lambda status, body: None] * count) as connections:
        for connection in connections:
            connection.send(request)
        await until_idle(server)
        return (memory_kb(server.pid) - idle_kb) / count


async def questions(bench: Bench) -> list[Row]:
    count, each = bench.effort.questions, {}
    for name in (MEMORY, POWER):
        with bench.fresh(name, store="questions.db") as server:
            each[name] = [await kb_for_each_question(server, count)]
    return [Row(title=f"memory for each of {count:,} runs that wait for a person, KB", figures=each)]


async def kb_for_each_question(server: Server, count: int) -> float:
    body = {"agent_name": "ask", "inputs": {"question": "Go on?"}, "async_run": True}
    request = server.raw_request("POST", "/run/flock", body)
    await send_all(server, [request] * 100, connections=CONNECTIONS, expected=202)
    await until_idle(server)
    idle_kb = memory_kb(server.pid)
    bodies = await send_all(server, [request] * count, connections=CONNECTIONS, expected=202)
    await until_idle(server)
    last = server.get(f"/run/{msgspec.json.decode(bodies[-1])['run_id']}")
    if last["status"] != "waiting":
        raise RuntimeError(f"{server.name}: the last run is {last['status']}, not waiting.")
    return (memory_kb(server.pid) - idle_kb) / count


async def until_idle(server: Server) -> None:
    """Return when the server has done nothing for half a second."""
    deadline = time.perf_counter() + TIMEOUT_S
    before_s, now_s = -1.0, cpu_s(server.pid)
    while now_s > before_s + 0.03 and time.perf_counter() < deadline:
        await asyncio.sleep(0.5)
        before_s, now_s = now_s, cpu_s(server.pid)

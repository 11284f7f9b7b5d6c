"""What does each thing cost if there are many, or if it is large? python -m bench.growth

The server's CPU time for each unit with 10, 1,000, 100,000 and 1,000,000 stored runs and rows of a batch, 1 to 1,000
readers, 1 to 10,000 runs and clients that wait, 1 to 10,000 calls, and 10 B to 10 MB, with a store on disk. Each line
has the longest hold of the event loop by one callback, and by one turn with all callbacks that are ready together, as
CPU time of its thread. The loop is asyncio's own, whose callbacks can be measured.

A line is marked if a unit costs more than 1.5 times as much as with fewer of them: then the cost is not linear. It is
also marked if one callback held the loop for more than 10 ms, but for one value of a megabyte or more. ``--rows`` and
``--most`` repeat a line. The exit code is the number of marked lines, at most 100.

    python -m bench.growth --rows readers        # only these
    python -m bench.growth --rows stored --most 1000
"""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import uvloop

from bench.load import connected, send_all
from bench.machine import cpu_s
from bench.measures.bench import Bench, Effort
from bench.measures.streams import Listener
from bench.run import open_bench
from bench.servers import GROWING, Server
from bench.stores import fill, some_run_ids
from bench.table import number, write_part

MAX_RATIO, MAX_HOLD_MS = 1.5, 10.0
TIMEOUT_S = 600
STORED = (10, 1_000, 100_000, 1_000_000)
READERS = (1, 10, 100, 1_000)
MANY = (1, 10, 100, 1_000, 10_000)
SIZES = (10, 1_000, 100_000, 1_000_000, 10_000_000)
#: For JSON values of at least a megabyte, decoding and encoding may hold the loop.
LARGE = 1_000_000


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what *count* of them cost."""

    what: str
    count: int
    us: float
    hold_ms: float
    turn_ms: float = 0.0
    where: str
    may_hold: bool = False


class Meter:
    """Measures blocks of work on one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.costs: list[Cost] = []
        self.held()

    def held(self) -> tuple[float, float, str]:
        """Return the longest callback and turn since the last call, in ms, and the name of the callback."""
        hold_ms, turn_ms, where = self.server.post("/run/flock", {"agent_name": "held", "inputs": {}})["result"][
            "result"
        ]
        return float(hold_ms), float(turn_ms), str(where)

    @contextlib.asynccontextmanager
    async def measure(self, what: str, count: int, units: float = 1, *, may_hold: bool = False) -> AsyncIterator[None]:
        """Measure the block, which does *units* of work."""
        self.held()
        used_s = cpu_s(self.server.pid)
        yield
        used_s = cpu_s(self.server.pid) - used_s
        hold_ms, turn_ms, where = self.held()
        us = used_s / units * 1e6
        self.costs.append(
            Cost(what=what, count=count, us=us, hold_ms=hold_ms, turn_ms=turn_ms, where=where, may_hold=may_hold)
        )
        print(f"{what}, {count:,}: {number(us)} µs, held for {hold_ms:.1f} ms by {where}", file=sys.stderr)

    async def requests(
        self, what: str, count: int, requests: Sequence[bytes], times: int = 500, expected: int = 200
    ) -> None:
        """Measure requests from 8 connections. Units are requests."""
        many = [requests[n % len(requests)] for n in range(times)]
        async with self.measure(what, count, times):
            await send_all(self.server, many, connections=8, expected=expected)

    def run(self, agent: str, **inputs: Any) -> bytes:
        return self.server.raw_request("POST", "/run/flock", {"agent_name": agent, "inputs": inputs})

    def start(self, agent: str, **inputs: Any) -> bytes:
        body = {"agent_name": agent, "inputs": inputs, "async_run": True}
        return self.server.raw_request("POST", "/run/flock", body)

    def stream(self, agent: str, **inputs: Any) -> bytes:
        return self.run(agent, **inputs).replace(b"\r\n", b"\r\nAccept: text/event-stream\r\n", 1)

    def batch(self, rows: int) -> str:
        """Process a batch, and return its id."""
        head, path = {"Content_Type": "text/csv"}, "/run/batch?agent_name=add&max_workers=100"
        accepted = self.server.fetch("POST", path, b"a\n" + b"1\n" * rows, **head)
        batch_id: str = msgspec.json.decode(accepted)["batch_id"]
        while self.server.get(f"/batch/{batch_id}?results=false&wait=60")["completed_at"] is None:
            pass
        return batch_id


@contextlib.contextmanager
def metered(bench: Bench, *options: str, store: str) -> Iterator[Meter]:
    with bench.fresh(GROWING, "--max-event-streams", "5000", *options, store=f"{store}.db") as server:
        yield Meter(server)


async def stored(bench: Bench, most: int) -> list[Cost]:
    """The same requests with more runs in the store."""
    costs = []
    for count in up_to(STORED, most):
        store = f"stored {count}"
        fill(bench.store_of(store), count)
        ids = some_run_ids(bench.store_of(store), 100)
        began = time.perf_counter()
        with metered(bench, store=store) as meter:
            started_s = time.perf_counter() - began
            meter.costs.append(
                Cost(what="the start, elapsed, stored runs", count=count, us=started_s * 1e6, hold_ms=0, where="")
            )
            get = meter.server.raw_request
            await send_all(meter.server, [meter.run("add", a=1)] * 200, connections=8)  # warm up
            await meter.requests("a synchronous run, stored runs", count, [meter.run("add", a=1)])
            await meter.requests(
                "a finished run is read, stored runs", count, [get("GET", f"/run/{id_}") for id_ in ids]
            )
            await meter.requests("a page of runs, stored runs", count, [get("GET", "/runs?limit=20")], 100)
            await meter.requests("a page by status, stored runs", count, [get("GET", "/runs?status=failed")], 100)
            await meter.requests("an accepted run, stored runs", count, [meter.start("add", a=1)], expected=202)
            await meter.requests("a model's run, stored runs", count, [meter.run("review", text="Splendid.")])
            answer = [meter.stream("review", text="Splendid.")]
            await meter.requests("a model's answer in 100 pieces, stored runs", count, answer)
            async with meter.measure("an item, stored runs", count, 2_000):
                meter.batch(2_000)
            await meter.requests("usage, stored runs", count, [get("GET", "/usage")], 20)
            costs += meter.costs
    return costs


async def rows(bench: Bench, most: int) -> list[Cost]:
    """A batch of a CSV, and its results as CSV."""
    with metered(bench, store="rows") as meter:
        for count in up_to(STORED, most):
            async with meter.measure("an item of a CSV, rows", count, count):
                batch_id = meter.batch(count)
            async with meter.measure("a row of its results as CSV, rows", count, count):
                meter.server.fetch("GET", f"/batch/{batch_id}/results", Accept="text/csv")
        return meter.costs


async def readers(bench: Bench, most: int, pieces: int = 50) -> list[Cost]:
    """Readers of one run, and the same beside one that reads nothing."""
    loop = asyncio.get_running_loop()
    with metered(bench, store="readers") as meter:
        for count in up_to(READERS, most):
            for what in ("a piece to a reader, readers", "beside a slow reader: a piece to a reader, readers"):
                inputs = {"pieces": pieces, "interval_s": 0.02}
                body = {"agent_name": "write", "inputs": inputs, "async_run": True}
                run_id = meter.server.post("/run/flock", body)["run_id"]
                request = meter.server.raw_request("GET", f"/run/{run_id}/events", Accept="text/event-stream")
                async with meter.measure(what, count, count * pieces):
                    slow = await loop.create_connection(lambda: Slow(request), "127.0.0.1", meter.server.port)  # noqa: B023
                    slow[0].pause_reading() if "slow" in what else slow[0].abort()
                    opened = [
                        await loop.create_connection(lambda: Listener(request), "127.0.0.1", meter.server.port)  # noqa: B023
                        for _ in range(count)
                    ]
                    await asyncio.wait_for(asyncio.gather(*(reader.ended for _, reader in opened)), TIMEOUT_S)
                for transport, _ in (slow, *opened):
                    transport.abort()
        return meter.costs


class Slow(asyncio.Protocol):
    """A reader that sends its request, and reads nothing."""

    def __init__(self, request: bytes) -> None:
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(self._request)  # type: ignore[attr-defined]


async def waiting(bench: Bench, most: int) -> list[Cost]:
    """Runs that wait for a message, runs that wait for a slot, and clients that wait for a run."""
    costs = []
    for count in up_to(MANY, most):
        with metered(bench, store=f"waiting {count}") as meter:
            many = min(count, 64)
            await send_all(meter.server, [meter.run("add", a=1)] * 200, connections=8)
            async with meter.measure("a run begins to wait for a message, waiting", count, count):
                bodies = await send_all(meter.server, [meter.start("wait")] * count, connections=many, expected=202)
                ids = [msgspec.json.decode(body)["run_id"] for body in bodies]
                await until_status(meter.server, ids, "waiting")
            await meter.requests("a run beside those that wait, waiting", count, [meter.run("add", a=1)])
            go = [meter.server.raw_request("POST", f"/run/{id_}/messages/go", {"message": True}) for id_ in ids]
            async with meter.measure("a message wakes a run, waiting", count, count):
                await send_all(meter.server, go, connections=many, expected=202)
                await until_status(meter.server, ids, "completed")
            costs += meter.costs
        with metered(bench, "--max-concurrency", "1", store=f"queued {count}") as meter:
            async with meter.measure("a run is queued, and then executed, queued", count, count):
                # The watch is a run too, so it is asked before the only slot is taken, and after the end.
                nap = {"agent_name": "nap", "inputs": {"seconds": TIMEOUT_S}, "async_run": True}
                blocker = meter.server.post("/run/flock", nap)["run_id"]
                queued = await send_all(meter.server, [meter.start("add", a=1)] * count, connections=many, expected=202)
                meter.server.fetch("POST", f"/run/{blocker}/cancel")
                ids = [msgspec.json.decode(body)["run_id"] for body in queued]
                await until_status(meter.server, ids, "completed")
            costs += meter.costs
        with metered(bench, store=f"clients {count}") as meter:
            run_id = meter.server.post("/run/flock", {"agent_name": "wait", "inputs": {}, "async_run": True})["run_id"]
            request, ended = meter.server.raw_request("GET", f"/run/{run_id}?wait=600"), asyncio.Semaphore(0)

            def handle(status: int, body: bytes, ended: asyncio.Semaphore = ended) -> None:
                if status == 200 and b'"completed"' in body:
                    ended.release()

            async with meter.measure("a client waits for a run until it ends, clients", count, count):
                async with connected(meter.server, [handle] * count) as connections:
                    for connection in connections:
                        connection.send(request)
                    await asyncio.sleep(2 + count / 2_000)
                    meter.server.fetch(
                        "POST", f"/run/{run_id}/messages/go", b'{"message":true}', Content_Type="application/json"
                    )
                    for _ in connections:
                        await asyncio.wait_for(ended.acquire(), TIMEOUT_S)
            costs += meter.costs
    return costs


async def until_status(server: Server, ids: Sequence[str], status: str) -> None:
    """Return when the runs have a status. A sample of them is asked."""
    deadline = time.monotonic() + TIMEOUT_S
    for id_ in ids[:: -max(1, len(ids) // 20)]:
        while server.get(f"/run/{id_}")["status"] != status:
            if time.monotonic() > deadline:
                raise RuntimeError(f"Run {id_} is not {status}: {server.get(f'/run/{id_}')}")
            await asyncio.sleep(0.02)


async def calls(bench: Bench, most: int) -> list[Cost]:
    """Calls of one run, in sequence and at once, and the run that has made them is read."""
    with metered(bench, store="calls") as meter:
        for agent, what in (("call", "a call in sequence, calls"), ("gather", "a call, all at once, calls")):
            for count in up_to(MANY, most):
                times = max(1, 100 // count)
                async with meter.measure(what, count, count * times):
                    bodies = await send_all(meter.server, [meter.run(agent, calls=count)] * times, connections=1)
                run_id = msgspec.json.decode(bodies[0])["run_id"]
                request = [meter.server.raw_request("GET", f"/run/{run_id}")]
                async with meter.measure(f"{what[:-7]}: its part of a run that is read, calls", count, 20 * count):
                    await send_all(meter.server, request * 20, connections=1)
        return meter.costs


async def sizes(bench: Bench, most: int) -> list[Cost]:
    """A text as input and result, read again, and as a piece of a stream."""
    loop = asyncio.get_running_loop()
    with metered(bench, store="sizes") as meter:
        for count in up_to(SIZES, most):
            times, may_hold = max(5, min(300, 3_000_000 // count)), count >= LARGE
            kb = times * count / 1000
            if count <= LARGE:  # a longer body is rejected with 413
                async with meter.measure("a KB in and out of a run, bytes", count, kb, may_hold=may_hold):
                    await send_all(meter.server, [meter.run("echo", text="x" * count)] * times, connections=2)
            async with meter.measure("a KB of a result, bytes", count, kb, may_hold=may_hold):
                bodies = await send_all(meter.server, [meter.run("make", size=count)] * times, connections=2)
            run_id = msgspec.json.decode(bodies[0])["run_id"]
            request = meter.server.raw_request("GET", f"/run/{run_id}")
            async with meter.measure("a KB of a run that is read, bytes", count, kb, may_hold=may_hold):
                await send_all(meter.server, [request] * times, connections=2)
            inputs = {"pieces": 10, "interval_s": 0.01, "bytes_each": count}
            stream = meter.stream("write", **inputs)
            async with meter.measure(
                "a KB of a piece to its reader, bytes", count, 10 * count / 1000, may_hold=may_hold
            ):
                transport, reader = await loop.create_connection(
                    lambda request=stream: Listener(request),  # type: ignore[misc]
                    "127.0.0.1",
                    meter.server.port,
                )
                await asyncio.wait_for(reader.ended, TIMEOUT_S)
            transport.abort()
        return meter.costs


ROWS: Mapping[str, Callable[[Bench, int], Coroutine[Any, Any, list[Cost]]]] = {
    "stored": stored,
    "rows": rows,
    "readers": readers,
    "waiting": waiting,
    "calls": calls,
    "sizes": sizes,
}


def up_to(counts: Sequence[int], most: int) -> list[int]:
    return [count for count in counts if count <= most]


# The table


def faults(costs: Sequence[Cost]) -> Mapping[tuple[str, int], list[str]]:
    """Return what is wrong with each line."""
    found: dict[tuple[str, int], list[str]] = {}
    for cost in costs:
        fewer = [other.us for other in costs if other.what == cost.what and other.count < cost.count]
        reasons = []
        if fewer and cost.us > MAX_RATIO * min(filter(None, fewer), default=cost.us):
            reasons.append(f"costs {cost.us / min(filter(None, fewer)):.1f} times as much as with fewer")
        if cost.hold_ms > MAX_HOLD_MS and not cost.may_hold:
            reasons.append(f"holds the loop for {cost.hold_ms:.0f} ms ({cost.where or 'nowhere seen'})")
        if reasons:
            found[cost.what, cost.count] = reasons
    return found


def table(costs: Sequence[Cost]) -> str:
    """Return Markdown: a row for each thing, with µs for each unit, and the longest callback and turn in ms."""
    counts, found = sorted({cost.count for cost in costs}), faults(costs)
    lines = [["", *(f"{count:,}" for count in counts)], ["-", *("-:" for _ in counts)]]
    for what in dict.fromkeys(cost.what for cost in costs):
        cells = {
            cost.count: f"{number(cost.us)} · {cost.hold_ms:.1f} · {cost.turn_ms:.0f}"
            for cost in costs
            if cost.what == what
        }
        cells |= {count: f"**{cells[count]}**" for name, count in found if name == what}
        lines.append([what, *(cells.get(count, "") for count in counts)])
    return "".join(f"|{'|'.join(f' {cell} ' for cell in line)}|\n" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--most", type=int, default=SIZES[-1], help="leave out lines with more than this")
    parser.add_argument("--write", action="store_true", help="replace the tables in docs/performance.md")
    parser.add_argument("--folder", default=".", help="where the stores are, on a real disk (default: here)")
    options = parser.parse_args()
    marked, parts = 0, list[str]()
    with open_bench(Effort(), options.folder) as bench:
        for row in options.rows:
            costs = uvloop.run(ROWS[row](bench, options.most))
            found = faults(costs)
            marked += len(found)
            lines = [f"- {what}, {count:,}: {'; '.join(reasons)}." for (what, count), reasons in found.items()]
            parts += [table(costs), "\n".join(lines)]
            print(f"python -m bench.growth --rows {row}\n\n{parts[-2]}\n{parts[-1]}")
    if options.write:
        write_part("bench.growth", "\n\n".join(filter(None, map(str.strip, parts))))
    return min(marked, 100)


if __name__ == "__main__":
    sys.exit(main())

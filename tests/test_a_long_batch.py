"""A long batch on a real server that is killed on the way: its results and its memory."""

import contextlib
import csv
import io
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import NO_COVERAGE, Server, flockapi_command, running

pytestmark = pytest.mark.alone

#: .ci/nightly sets 100,000.
ROWS = int(os.environ.get("LONG_BATCH_ROWS", "30000"))
#: How much a server's memory may grow during a batch of any length, in kB.
MAX_GROWTH_KB = 80 * 1024

SCRIPT = """
import os
from flock.core import Flock

flock = Flock("long")
log = os.open("calls.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

@flock.agent
async def double(n: int, note: str) -> int:
    os.write(log, b"%d\\n" % n)
    return 2 * n
"""


def rows() -> Iterator[bytes]:
    yield b"n,note\r\n"
    for begin in range(0, ROWS, 1000):
        yield b"".join(b'%d,"row ""%d"", with a comma"\r\n' % (n, n) for n in range(begin, begin + 1000))


@contextlib.contextmanager
def served() -> Iterator[Server]:
    Path("served.py").write_text(SCRIPT)
    command = flockapi_command("serve", "served.py", "--port", "0", "--store", "flock.db")
    with running(*command, **NO_COVERAGE) as server:
        yield server


def memory_kb(server: Server, name: str) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


def submit(client: httpx.Client, **options: Any) -> str:
    query = {"agent_name": "double", "max_workers": 100, **options}
    accepted = client.post("/run/batch", params=query, content=rows(), headers={"Content-Type": "text/csv"})
    assert accepted.status_code == 202, accepted.text
    assert accepted.json()["total_items"] == ROWS
    batch_id: str = accepted.json()["batch_id"]
    return batch_id


def state(client: httpx.Client, batch_id: str, wait_s: int = 0) -> Any:
    return client.get(f"/batch/{batch_id}", params={"results": "false", "wait": wait_s}).json()


def wait_until_ended(client: httpx.Client, batch_id: str, items: int) -> None:
    """Poll like a client until *items* items have ended."""
    while state(client, batch_id)["completed_items"] < items:
        time.sleep(0.02)


def end_of(client: httpx.Client, batch_id: str) -> Any:
    """Wait for the batch to end, however long that takes, and return it."""
    while (batch := state(client, batch_id, 30))["status"] == "running":
        pass
    return batch


def committed() -> set[int]:
    with contextlib.closing(sqlite3.connect("flock.db")) as db:
        return {position for (position,) in db.execute("SELECT position FROM runs WHERE status = 'completed'")}


def calls(begin: int = 0, end: int | None = None) -> list[int]:
    """Return the items that were started, from a part of the log."""
    return [int(line) for line in Path("calls.log").read_bytes()[begin:end].split()]


@pytest.mark.timeout(300)
def test_a_long_batch_survives_three_kills_in_bounded_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """No committed item is executed again, memory stays flat, and the results are complete and in order."""
    batch_id, growth_kb = "", []
    kills: list[tuple[set[int], int]] = []  # the items committed before the kill, and the size of the log of calls
    while True:
        with served() as server, httpx.Client(base_url=server.url, timeout=120) as client:
            idle_kb = memory_kb(server, "VmRSS")
            batch_id = batch_id or submit(client)
            if len(kills) < 3:
                wait_until_ended(client, batch_id, (len(kills) + 1) * ROWS // 4)
                growth_kb.append(memory_kb(server, "VmHWM") - idle_kb)
                os.kill(server.process.pid, signal.SIGKILL)
                server.process.wait()
                kills.append((committed(), Path("calls.log").stat().st_size))
                continue
            batch = end_of(client, batch_id)
            with client.stream("GET", f"/batch/{batch_id}/results", headers={"Accept": "text/csv"}) as response:
                text = b"".join(response.iter_bytes()).decode()
            growth_kb.append(memory_kb(server, "VmHWM") - idle_kb)
            break
    assert (batch["status"], batch["completed_items"], batch["failed_items"]) == ("completed", ROWS, 0)
    table = list(csv.reader(io.StringIO(text, newline="")))
    assert table[0] == ["n", "note", "result", "status", "error"]
    assert table[1:] == [[str(n), f'row "{n}", with a comma', str(2 * n), "completed", ""] for n in range(ROWS)]
    for done, log_size in kills:
        assert not done & set(calls(log_size)), "an item was executed again after its commit"
    in_flight = [len(set(calls(0, log_size)) - done) for done, log_size in kills]
    again = sum(times - 1 for times in Counter(calls()).values())
    assert again <= sum(in_flight)
    assert all(grown < MAX_GROWTH_KB for grown in growth_kb), growth_kb
    with capsys.disabled():
        grown = ", ".join(f"{kb / 1024:.0f}" for kb in growth_kb)
        print(f"\nin flight at each kill: {in_flight}; executed again: {again}; memory above idle in MB: {grown}")


def test_a_long_batch_is_cancelled_at_once_and_starts_no_item_after_the_response() -> None:
    """The response comes within half a second, and all items have stopped within two."""
    with served() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        batch_id = submit(client)
        wait_until_ended(client, batch_id, ROWS // 20)
        asked_at = time.monotonic()
        answer = client.post(f"/batch/{batch_id}/cancel")
        answered_at, begun = time.monotonic(), len(calls())
        assert (answer.status_code, answer.json()["status"]) == (202, "running")
        batch = state(client, batch_id, 30)
        took_s = time.monotonic() - answered_at
        assert batch["status"] == "cancelled"
        assert batch["completed_items"] == ROWS
        assert batch["cancelled_items"] > ROWS // 2
        assert len(calls()) == begun
        assert answered_at - asked_at < 0.5
        assert took_s < 2
        assert client.post(f"/batch/{batch_id}/cancel").status_code == 200
        again = client.post(f"/batch/{batch_id}/retry", json={"only": "cancelled"})
        assert (again.status_code, again.json()["attempt"]) == (202, 2)
        batch = end_of(client, batch_id)
        assert (batch["status"], batch["completed_items"], batch["cancelled_items"]) == ("completed", ROWS, 0)
        assert len(set(calls())) == ROWS
        assert client.delete(f"/batch/{batch_id}").status_code == 204
        assert client.get(f"/batch/{batch_id}").status_code == 404

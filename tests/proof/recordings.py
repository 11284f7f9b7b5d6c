"""What is done to the files of a store, an output and a backup, and what must be there after a power cut."""

import contextlib
import functools
import hashlib
import itertools
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import msgspec

from flock.errors import BatchNotFound, Conflict, KeyReused, RunNotFound
from flock.runs import Engine, RunStatus
from flock.runs.records import IdempotencyKey
from flock.testing import FakeModel
from tests.proof.scenarios import SCENARIOS, SHOP, Client, Provider
from tests.proof.servers import Place
from tests.proof.shop import flock
from tests.support import PATIENCE_S, ROOT

__all__ = ["RECORDINGS", "Recording"]

#: The journal of SQLite is copied to the file when it has 4 MB.
LONG, LONG_RUNS = "x" * 700_000, 4
#: How the documentation makes a backup.
BACKUP = next(line for line in (ROOT / "docs/durability.md").read_text().splitlines() if '".backup copy.db"' in line)
#: The number of the call before which a worker is killed.
WORKER_DIES_AT = 300
ROWS, OTHER_ROWS = ("good", "odd", "fine", "bad"), ("odd", "great")


class Recording(NamedTuple):
    """What is recorded in a place, and the check of a place with the files after a power cut.

    ``check`` gets what was acknowledged before: lists of what, an id and a value. It returns how many acknowledged runs
    are missing, if they may be. Raises AssertionError.
    """

    play: Callable[[Place], None]
    check: Callable[[Place, Provider, Sequence[Any]], int]
    options: tuple[str, ...] = ()


# The server


@contextlib.contextmanager
def _served(place: Place) -> Iterator[Client]:
    """Start a server, and yield a client. What is acknowledged to it is recorded."""
    place.start()
    place.wait_until_up()
    with contextlib.closing(Client(place.url, lambda *ack: place.note("A", ack))) as client:
        yield client


def _serve(place: Place) -> None:
    with _served(place) as client:
        for name in ("function", "caught", "delete", "batch", "cancel", "retry", "session"):
            SCENARIOS[name].play(client)
        client.message(client.run("reminder"), "payment", 7)
        assert place.stop() in (0, -signal.SIGTERM), place.output.read_text()
        place.start()
        place.wait_until_up()
        SCENARIOS["caught"].play(client)
        is_over = threading.Event()
        with ThreadPoolExecutor() as pool:
            playing = pool.submit(_play_until, is_over, client)
            place.note("A", ["backup begins", "", None])
            place.shell(BACKUP)
            place.note("A", ["backup ends", "", None])
            is_over.set()
            playing.result()


def _send_files(place: Place) -> None:
    with _served(place) as client:
        for _ in range(2):
            SCENARIOS["file"].play(client)


def _play_until(is_over: threading.Event, client: Client) -> None:
    for name in itertools.cycle(["chain", "batch"]):
        SCENARIOS[name].play(client)
        if is_over.is_set():
            break


def _serve_workers(place: Place) -> None:
    """Two clients at the same time, so that both workers write. One worker is killed, and replaced."""
    place.start()
    place.wait_until_up()

    def play(first: int, *names: str) -> None:
        with contextlib.closing(Client(place.url, lambda *ack: place.note("A", ack), first)) as client:
            for name in names:
                SCENARIOS[name].play(client)

    with ThreadPoolExecutor() as pool:
        plays = [
            pool.submit(play, 0, "function", "caught", "delete", "workflow"),
            pool.submit(play, 1000, "chain", "batch", "session", "retry"),
        ]
        place.control.signal_at(WORKER_DIES_AT)
        for each in plays:
            each.result()
    assert place.control.pid, "no worker was killed"


def _serve_long(place: Place) -> None:
    with _served(place) as client:
        for _ in range(LONG_RUNS):
            client.completed(client.run("plain", word=LONG), {"word": LONG})


class Expected:
    """What must be in a store after some acknowledgements."""

    def __init__(self, acks: Sequence[Any]) -> None:
        self.runs, self.batches = dict[str, Any](), dict[str, Any]()
        self.files = set[str]()
        self.deleted, self.answers, self.messages = set[str](), set[tuple[str, str]](), set[tuple[str, str]]()
        for what, each, value in acks:
            match what:
                case "accepted":
                    self.runs[each] = None
                case "ended":
                    self.runs[each] = value
                case "accepted batch" | "ended batch":
                    self.batches[each] = value if what == "ended batch" else None
                case "retrying" if each in self.runs:
                    self.runs[each] = None
                case "retrying":
                    self.batches[each] = None
                case "deleting":
                    self.runs.pop(each)
                    self.files.clear()
                case "deleted":
                    self.deleted.add(each)
                case "answered":
                    self.answers.add((each, value))
                case "sent":
                    self.messages.add((each, value))
                case "sent file":
                    self.files.add(each)

    async def missing(self, engine: Engine) -> int:
        """Return how many runs are not there."""
        count = 0
        for run_id in self.runs:
            try:
                await engine.get_run(run_id)
            except RunNotFound:
                count += 1
        return count

    async def check(self, engine: Engine) -> None:
        for run_id, ended in self.runs.items():
            try:
                run = await engine.get_run(run_id)
            except RunNotFound:
                raise AssertionError(f"the run {run_id} is lost") from None
            if ended is not None:
                found = [run.status, run.value if run.status is RunStatus.COMPLETED else None]
                assert found == ended, f"the run {run_id} is {str(found)[:200]}, and was {str(ended)[:200]}"
        for run_id in self.deleted:
            try:
                await engine.get_run(run_id)
            except RunNotFound:
                continue
            raise AssertionError(f"the run {run_id} was deleted, and is back")
        for run_id, call_id in (each for each in self.answers if each[0] in self.runs):
            question = await engine.get_question(run_id, call_id)
            assert question.status == "answered", f"the answer to {call_id} is lost"
        for batch_id, ended in self.batches.items():
            try:
                batch = await engine.get_batch(batch_id)
            except BatchNotFound:
                raise AssertionError(f"the batch {batch_id} is lost") from None
            if ended is not None:
                results = [
                    item.value if item.status is RunStatus.COMPLETED else None
                    for item in await engine.get_items(batch_id)
                ]
                found = [batch.attempt, batch.failed_items, results]
                assert found == ended, f"the batch {batch_id} is {found}, and was {ended}"
        for run_id, name in self.messages:
            key = IdempotencyKey(f"{run_id}-{name}", b"", "ann")
            try:
                await engine.send_message(run_id, name, msgspec.Raw(b"8"), key)
            except (KeyReused, Conflict):
                continue
            raise AssertionError(f"the message to {run_id} is lost")


def _check_file(store: Path, acks: Sequence[Any], *, is_durable: bool = True) -> int:
    """Check a store, and with an engine that opens it what was acknowledged. Return how many runs are missing."""
    expected = Expected(acks)
    if not store.exists():
        assert not (acks and is_durable), "the store is lost"
        return len(expected.runs)

    async def opened() -> int:
        async with flock.engine(store=store, transport=FakeModel([]).transport) as engine:
            if is_durable:
                await expected.check(engine)
            return await expected.missing(engine)

    missing = anyio.run(opened)
    for file_id in expected.files if is_durable else ():
        found = [hashlib.sha256(path.read_bytes()).hexdigest() for path in store.parent.glob(f"*/*/{file_id}")]
        assert found == [file_id], f"the file {file_id} is lost"
    db = sqlite3.connect(store)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()
    return missing


def _check_server(place: Place, model: Provider, acks: Sequence[Any], *, is_durable: bool) -> int:
    missing = _check_file(place.folder / "flock.db", acks, is_durable=is_durable)
    names = [ack[0] for ack in acks]
    if "backup ends" in names:
        _check_file(place.folder / "copy.db", acks[: names.index("backup begins")])
    return missing


# The command


def _complete(place: Place, rows: Sequence[str]) -> None:
    (place.folder.parent / "rows.csv").write_text("text\n" + "".join(f"{text}\n" for text in rows))
    options = ("--max-workers", "2", "--force", "--progress", "json")
    command = ("batch", str(SHOP), "rate", "../rows.csv", "-o", "out.csv", *options)
    assert place.command(*command) == 0, place.output.read_text()


def _results(rows: Sequence[str]) -> str:
    return "text,stars,status,error\n" + "".join(f"{text},5,completed,\n" for text in rows)


def _ends(place: Place) -> int:
    """Return how many commands have reported that all their rows are completed and stored."""
    return place.output.read_text().count('"status":"completed"') if place.output.exists() else 0


def _note_stored(place: Place, before: int) -> None:
    while _ends(place) == before:
        time.sleep(0.001)
    place.note("A", ["stored", "", None])


def _batch(place: Place) -> None:
    for rows in (ROWS, OTHER_ROWS):
        with ThreadPoolExecutor() as pool:
            reading = pool.submit(_note_stored, place, _ends(place))
            _complete(place, rows)
            reading.result(PATIENCE_S)
        place.note("A", ["written", "", rows])


def _check_batch(place: Place, model: Provider, acks: Sequence[Any]) -> int:
    """The output is whole, and that of the last command if it has ended. The same command completes it.

    It pays for no row again if all were stored before the cut.
    """
    output, names = place.folder / "out.csv", [ack[0] for ack in acks]
    count = names.count("written")
    if output.exists() or count:
        wanted = [_results(rows) for rows in (ROWS, OTHER_ROWS)[max(0, count - 1) : count + 1]]
        assert output.read_text() in wanted, f"the output is {output.read_text()!r}"
    rows = (ROWS, OTHER_ROWS)[min(count, 1)]
    are_stored = count == 2 or names[-1:] == ["stored"]
    asked = len(model.requests)
    _complete(place, rows)
    assert not are_stored or len(model.requests) == asked, "rows that were stored are paid again"
    assert output.read_text() == _results(rows)
    left = [path.name for path in place.folder.iterdir() if path.suffix != ".part"]  # which has the first folder's name
    assert sorted(left) == ["out.csv", "out.csv.flock.db", "out.csv.flock.db-output"], f"the command leaves {left}"
    return 0


RECORDINGS: Mapping[str, Recording] = {
    "power": Recording(_serve, functools.partial(_check_server, is_durable=True), ("--durability", "power")),
    "workers": Recording(
        _serve_workers, functools.partial(_check_server, is_durable=True), ("--durability", "power", "--workers", "2")
    ),
    "file": Recording(_send_files, functools.partial(_check_server, is_durable=True)),
    "long": Recording(_serve_long, functools.partial(_check_server, is_durable=True)),
    "process": Recording(_serve, functools.partial(_check_server, is_durable=False), ("--durability", "process")),
    "command": Recording(_batch, _check_batch),
}

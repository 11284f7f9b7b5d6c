"""What is done to the files of a store, an output and a backup, and what must be there after a power cut."""

import functools
import signal
import sqlite3
from collections.abc import Callable, Mapping, Sequence
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

__all__ = ["RECORDINGS", "Recording"]

#: The journal of SQLite is copied to the file when it has 4 MB.
LONG, LONG_RUNS = "x" * 700_000, 4
BACKUP = """
import contextlib, sqlite3
with contextlib.closing(sqlite3.connect("flock.db")) as db, contextlib.closing(sqlite3.connect("copy.db")) as copy:
    db.backup(copy)
"""
ROWS = ("good", "odd", "fine", "bad")
RESULTS = "text,stars,status,error\n" + "".join(f"{text},5,completed,\n" for text in ROWS)


class Recording(NamedTuple):
    """What is recorded in a place, and the check of a place with the files after a power cut.

    ``check`` gets what was acknowledged before: lists of what, an id and a value. Raises AssertionError.
    """

    play: Callable[[Place], None]
    check: Callable[[Place, Provider, Sequence[Any]], None]
    options: tuple[str, ...] = ()


# The server


def _serve(place: Place) -> None:
    client = Client(place.url, lambda *ack: place.note("A", ack))
    try:
        place.start()
        place.wait_until_up()
        for name in ("function", "caught", "delete", "batch", "cancel", "retry", "session"):
            SCENARIOS[name].play(client)
        client.message(client.run("reminder"), "payment", 7)
        assert place.stop() in (0, -signal.SIGTERM), place.output.read_text()
        place.start()
        place.wait_until_up()
        SCENARIOS["caught"].play(client)
        place.note("A", ["backup begins", "", None])
        place.python(BACKUP)
        place.note("Y")
        place.note("A", ["backup ends", "", None])
        SCENARIOS["chain"].play(client)
    finally:
        client.close()


def _serve_long(place: Place) -> None:
    client = Client(place.url, lambda *ack: place.note("A", ack))
    try:
        place.start()
        place.wait_until_up()
        for _ in range(LONG_RUNS):
            client.completed(client.run("plain", word=LONG), {"word": LONG})
    finally:
        client.close()


class Expected:
    """What must be in a store after some acknowledgements."""

    def __init__(self, acks: Sequence[Any]) -> None:
        self.runs, self.batches = dict[str, Any](), dict[str, Any]()
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
                case "deleted":
                    self.deleted.add(each)
                case "answered":
                    self.answers.add((each, value))
                case "sent":
                    self.messages.add((each, value))

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
        for run_id, call_id in self.answers & {
            (run_id, call_id) for run_id, call_id in self.answers if run_id in self.runs
        }:
            question = await engine.get_question(run_id, call_id)
            assert question.status == "answered", f"the answer to {call_id} is lost"
        for batch_id, ended in self.batches.items():
            try:
                batch = await engine.get_batch(batch_id)
            except BatchNotFound:
                raise AssertionError(f"the batch {batch_id} is lost") from None
            assert ended is None or [batch.attempt, batch.failed_items] == ended, f"{batch}, and was {ended}"
        for run_id, name in self.messages:
            try:
                await engine.send_message(
                    run_id, name, msgspec.Raw(b"8"), IdempotencyKey(f"{run_id}-{name}", b"", "ann")
                )
            except (KeyReused, Conflict):
                continue
            raise AssertionError(f"the message to {run_id} is lost")


def _check_file(store: Path, acks: Sequence[Any] | None) -> None:
    """Check a store, and with an engine that opens it what was acknowledged. None only means that it is not damaged."""
    if not store.exists():
        assert not acks, "the store is lost"
        return

    async def opened() -> None:
        async with flock.engine(store=store, transport=FakeModel([]).transport) as engine:
            await Expected(acks or []).check(engine)

    anyio.run(opened)
    db = sqlite3.connect(store)
    try:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        db.close()


def _check_server(place: Place, model: Provider, acks: Sequence[Any], *, is_durable: bool) -> None:
    _check_file(place.folder / "flock.db", acks if is_durable else None)
    names = [ack[0] for ack in acks]
    if "backup ends" in names:
        _check_file(place.folder / "copy.db", acks[: names.index("backup begins")])


# The command


def _command(*more: str) -> tuple[str, ...]:
    return ("batch", str(SHOP), "rate", "../rows.csv", "-o", "out.csv", "--max-workers", "2", *more)


def _prepare(place: Place) -> None:
    (place.folder.parent / "rows.csv").write_text("text\n" + "".join(f"{text}\n" for text in ROWS))


def _batch(place: Place) -> None:
    _prepare(place)
    assert place.command(*_command()) == 0, place.output.read_text()
    place.note("A", ["written", "", None])
    assert place.command(*_command("--force")) == 0, place.output.read_text()
    place.note("A", ["replaced", "", None])


def _check_batch(place: Place, model: Provider, acks: Sequence[Any]) -> None:
    """The output is whole or missing, and missing only before the end. The same command completes it."""
    output = place.folder / "out.csv"
    if output.exists() or acks:
        assert output.read_text() == RESULTS
    if not acks:
        _prepare(place)
        assert place.command(*_command("--force")) == 0, place.output.read_text()
        assert output.read_text() == RESULTS
    assert [path.name for path in place.folder.iterdir() if "out.csv" not in path.name] == []


RECORDINGS: Mapping[str, Recording] = {
    "power": Recording(_serve, functools.partial(_check_server, is_durable=True), ("--durability", "power")),
    "long": Recording(_serve_long, functools.partial(_check_server, is_durable=True)),
    "process": Recording(_serve, functools.partial(_check_server, is_durable=False), ("--durability", "process")),
    "command": Recording(_batch, _check_batch),
}

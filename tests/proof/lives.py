"""Runs of random programs on an engine and a store, whose processes die."""

import asyncio
import contextlib
import functools
import itertools
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from flock.engine import embedded
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict, Replayed
from flock.runs import IdempotencyKey, Run, RunStatus
from flock.store import database
from flock.store.migrations import migrate
from tests.proof.generator import End, Fate
from tests.proof.schedules import Schedule
from tests.proof.workflows import FLOCK, MODEL, Statement
from tests.proof.world import ANSWER_S, LIMITS, World, attempt, die, in_processes, quiet

__all__ = ["processes"]

#: How often an engine checks for what other engines do, of which there are none. Each time costs as much as a call.
WATCH_INTERVAL_S = 1.0


def engine_of(world: World, store: str) -> EmbeddedEngine:
    options: dict[str, Any] = {"durability": "process", "limits": LIMITS, "expose_errors": True}
    engine = FLOCK.engine(store=store, transport=MODEL.transport, **options)
    engine.observe(world)
    return engine


async def _answer(engine: EmbeddedEngine, world: World, run_id: str, rng: random.Random) -> Run:
    """Answer all questions of a run at random moments until it ends, in each attempt."""
    while (run := await engine.wait(run_id)).status is RunStatus.WAITING:
        questions = [each for each in run.waiting_for if each.is_question]
        rng.shuffle(questions)
        for question in questions:
            if question.call_id in world.answered:
                world.problem(f"{question.question!r} is asked again after its answer")
                return run
            await asyncio.sleep(rng.choice(ANSWER_S))
            number = int(question.question.partition(" ")[0])
            with contextlib.suppress(Conflict):  # the process has died after the answer was stored; or it is cancelled
                await engine.answer_call(run_id, question.call_id, msgspec.Raw(msgspec.json.encode(number)))
            world.answered.add(question.call_id)
    if run.tries == world.attempt and not world.should_retry(run):
        return run
    await engine.retry_run(run_id)  # perhaps after a process has died before that
    return await _answer(engine, world, run_id, rng)


async def _cancel(engine: EmbeddedEngine, world: World, run_id: str) -> None:
    world.stop()
    with contextlib.suppress(Conflict):  # it has ended
        await engine.cancel_run(run_id)


async def _send(engine: EmbeddedEngine, world: World, run_id: str, at: str, number: int) -> None:
    message, key = msgspec.Raw(str(number).encode()), IdempotencyKey(f"to-{at}", b"")
    with contextlib.suppress(Conflict, Replayed):  # it has ended; or the process has died after that was stored
        await engine.send_message(run_id, f"to-{at}", message, key)
    world.sent(at)


async def _process(
    world: World, store: str, end: End | None, cancel: End | None, rng: random.Random, loop: Schedule
) -> Run | None:
    """Execute the run. Return it if it has ended, or None if the engine has stopped. Raises Died."""
    stop, cancelling = asyncio.Event(), set[asyncio.Future[None]]()
    async with engine_of(world, store) as engine:
        world.run_id = run_id = world.run_id or (await engine.submit("main", {})).run_id
        sending = set[asyncio.Future[None]]()
        world.send = lambda at, number: sending.add(asyncio.ensure_future(_send(engine, world, run_id, at, number)))
        world.at(end, loop, die if end is not None and end.is_kill else stop.set)
        if cancel is not None:
            world.at(cancel, loop, lambda: cancelling.add(asyncio.ensure_future(_cancel(engine, world, run_id))))
        answering = asyncio.ensure_future(_answer(engine, world, run_id, rng))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait([answering, stopping], return_when=asyncio.FIRST_COMPLETED)
        is_ended = answering.done()
        answering.cancel()
        stopping.cancel()
        if not is_ended:
            world.stop()
        await asyncio.gather(answering, stopping, return_exceptions=True)
        return answering.result() if is_ended else None


def _trial(folder: Path, world: World, fate: Fate, rng: random.Random) -> Run:
    """Execute a run in one process after the other. Each has a copy of the files that the one before has left."""
    stores = [":memory:"]
    if fate.is_stored:
        folder.mkdir()
        stores = [str(folder / f"{number}.db") for number in range(len(fate.ends) + 1)]
        shutil.copyfile(empty_store(), stores[0])

    def process(number: int, end: End | None, loop: Schedule) -> Coroutine[Any, Any, Run | None]:
        if number:
            _copy(stores[number - 1], stores[number])
        return _process(world, stores[number], end, None if end else fate.cancel, rng, loop)

    try:
        return in_processes(world, fate, process)
    finally:
        if fate.is_stored:
            shutil.rmtree(folder)


def _copy(store: str, to: str) -> None:
    """Copy the files of a store as a process has left them that has died. Its locks are not copied."""
    for ending in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{store}{ending}", f"{to}{ending}")


@functools.cache
def empty_store() -> str:
    """Return the path of an empty store: to make one takes longer than the rest of a run."""
    folder = tempfile.mkdtemp()
    path = Path(folder) / "empty.db"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    migrate(db, str(path))
    db.close()
    path.chmod(0o600)
    return str(path)


@contextlib.contextmanager
def processes() -> Iterator[Callable[[Statement, Fate], None]]:
    """Yield a function that executes programs as ``attempt`` does."""
    template = sqlite3.connect(":memory:", isolation_level=None)
    migrate(template, "")
    schema, counter = template.serialize(), itertools.count(1)
    template.close()
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None  # memory: a process that dies does not lose its files
    base = tempfile.mkdtemp(dir=shared)

    def migrate_quickly(db: sqlite3.Connection, path: str) -> None:
        migrate(db, path) if path != database.MEMORY else db.deserialize(schema)

    def execute(program: Statement, fate: Fate) -> None:
        attempt(program, fate, functools.partial(_trial, Path(base) / str(next(counter))), "--program")

    try:
        with quiet(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(database, "migrate", migrate_quickly)
            patch.setattr(embedded, "WATCH_INTERVAL_S", WATCH_INTERVAL_S)
            yield execute
    finally:
        shutil.rmtree(base)

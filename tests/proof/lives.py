"""A run of a random program, whose processes die, and what must hold."""

import asyncio
import contextlib
import functools
import gc
import itertools
import logging
import random
import shlex
import shutil
import sqlite3
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

from flock.engine import embedded
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Conflict
from flock.limits import Limits
from flock.runs import Observer, Run, RunContext, RunStatus
from flock.store import database
from flock.store.migrations import migrate
from tests.proof.interpreter import interpret
from tests.proof.schedules import Died, Schedule, Stuck, live
from tests.proof.workflows import CALLS, FLOCK, LIVES, Statement, Walk, text

__all__ = ["Fate", "attempt", "fates", "processes"]

#: How often an engine checks for what other engines do, of which there are none. Each time costs as much as a call.
WATCH_INTERVAL_S = 1.0
#: How long a process is down, and how long a person may take to answer, in seconds.
DOWN_S, ANSWER_S = 1.0, (0.0, 0.3, 2.0, 30.0)
#: A run that has not ended after so many virtual seconds in one process never ends.
HORIZON_S = 900.0
LIMITS = Limits(max_threads=50, max_recoveries=100)
#: After how many runs the garbage of their processes is collected.
RUNS_OF_GARBAGE = 10
#: How many fates each program has: one without the end of a process, and others.
FATES = 5


class End(msgspec.Struct, frozen=True, array_like=True):
    """A process ends some steps of the event loop after what the program does there for the nth time."""

    event: int
    steps: int
    is_kill: bool = True


class Fate(msgspec.Struct, frozen=True, omit_defaults=True):
    """What happens to a run.

    Attributes:
        seed: of the order; 0 is that of asyncio. Also of random times.
        is_stored: in a file.
        ends: of its processes but the last one, in each of which the engine is killed or stopped.
        cancel: when the run is cancelled in the last process.
    """

    seed: int = 0
    is_stored: bool = False
    ends: tuple[End, ...] = ()
    cancel: End | None = None


def fates() -> st.SearchStrategy[tuple[Fate, ...]]:
    """Return several fates for one program, since to make a program takes as long as to execute it."""
    seeds = st.just(0) | st.integers(0, 1000)
    ends = st.builds(End, st.integers(0, 15), st.integers(0, 20), st.just(True) | st.booleans())
    rarely = st.none() | st.none() | st.none() | ends
    lists = st.lists(ends, min_size=1, max_size=3).map(tuple)
    whole = st.builds(Fate, seeds, st.booleans(), cancel=rarely)
    in_parts = st.builds(Fate, seeds, st.just(True), lists, rarely)
    return st.tuples(whole, *[in_parts] * (FATES - 1))


class Life:
    """One execution of the step. See ``workflows.Life``."""

    def __init__(self, world: "World") -> None:
        self.world, self.is_alive = world, True
        #: its engine stops; or the agent has returned, so that tasks that it has left see nothing but cancellation
        self.is_stopping = self.is_over = False
        self.bodies: dict[str, tuple[Walk, Statement]] = {}
        #: the side effects that earlier lives have finished, and the places of those that this one has begun
        self.done, self.begun = frozenset(world.done), Counter[str]()
        self._cancelled = set[str]()

    def random_s(self, seconds: float) -> float:
        return seconds * (1 + self.world.random.random()) / 2

    def saw(self, at: str, outcome: Any, statement: Statement) -> None:
        if not self.is_alive or self.is_over:
            return
        if self.is_stopping:
            self.world.last_seen[at] = outcome
        else:
            self.world.saw(at, outcome, statement)

    def decided(self, at: str, decision: Any) -> None:
        if not self.is_alive or self.is_over:
            return
        if self.is_stopping:
            self.world.last_decisions[at] = decision
        else:
            self.world.decided(at, decision)

    def cancelled(self, at: str) -> None:
        self._cancelled.add(at)

    def cut_off(self, at: str) -> None:
        if self.is_alive and not self.is_stopping and not self.is_over:
            below = {each for each in self._cancelled if each.startswith(f"{at}.")}
            self.world.done |= below
            self._cancelled -= below

    @contextlib.contextmanager
    def executing(self, at: str, effect: Statement) -> Iterator[bool]:
        if self.is_alive:
            self.begun[at] += 1
            self.world.begin(self, at, effect)
        yield self.begun[at] <= 1


class World(Observer):
    """What a program has done in all processes, and the promises that are broken while it does that.

    Attributes:
        done: the places of the side effects whose end the program has seen.
        seen: the outcome that it has seen, by place.
    """

    def __init__(self, program: Statement, fate: Fate) -> None:
        self.program, self.random = program, random.Random(fate.seed)
        self.lives, self.run_id = list[Life](), ""
        #: it takes the same branches again. No journal knows how long plain code takes, so it may delay a call until
        #: the engine waits no longer for it, or a time-out comes first
        self.is_ordered = not any(each.kind == "plain" and each.seconds for each in program.all)
        self.done, self.seen, self.decisions = set[str](), dict[str, Any](), dict[str, Any]()
        #: the same while an engine stops, which may also raise errors of its own. They count if the run ends with them
        self.last_seen, self.last_decisions = dict[str, Any](), dict[str, Any]()
        self.begun, self.answered = Counter[str](), set[str]()
        self.problems = list[str]()
        self.at(None)
        self._has_ended = False

    def at(self, end: End | None, loop: Schedule | None = None, then: Callable[[], object] = lambda: None) -> None:
        """Call *then* at an end in this process."""
        self._end, self._loop, self._then, self._events = end, loop, then, -1
        self._event()

    def _event(self) -> None:
        self._events += 1
        if self._loop is not None and self._end is not None and self._events == self._end.event:
            self._loop.at(self._loop.steps + 1 + self._end.steps, self._then)

    def problem(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def new_life(self) -> Life:
        self.end_lives()
        self.lives.append(life := Life(self))
        LIVES[:] = [life]
        return life

    def stop(self) -> None:
        for life in self.lives:
            life.is_stopping = True

    def end_lives(self) -> None:
        for life in self.lives:
            life.is_alive = False

    def run_ended(self, run: Run) -> None:
        self._has_ended = True

    def begin(self, life: Life, at: str, effect: Statement) -> None:
        self.begun[at] += 1
        self._event()
        if self._has_ended:
            self.problem(f"{effect.kind} at {at} is executed after the run has ended")
        if effect.is_equal:
            return  # which one of them is executed again may differ
        if at in life.done:
            self.problem(f"{effect.kind}({effect.n}) is executed again: the program has seen its end, or cancelled it")
        elif life.begun[at] > effect.retries + 1:
            self.problem(f"{effect.kind}({effect.n}) is executed {life.begun[at]} times")

    def saw(self, at: str, outcome: Any, statement: Statement) -> None:
        self._event()
        before, self.seen[at] = self.seen.get(at, outcome), outcome
        self.done.add(at)
        if before != outcome and (self.is_ordered or statement.kind in (*CALLS, "ask")):
            self.problem(f"the program saw {before} at {at}, and now {outcome}")

    def decided(self, at: str, decision: Any) -> None:
        self._event()
        before, self.decisions[at] = self.decisions.get(at, decision), decision
        if before != decision and self.is_ordered:
            self.problem(f"the program went on with {before} at {at}, and now with {decision}")


#: The one that is executed.
WORLDS: list[World] = []


@FLOCK.agent
async def main(context: RunContext) -> Any:
    life = WORLDS[-1].new_life()
    try:
        return await Walk(life, context).do(WORLDS[-1].program, "0")
    finally:
        life.is_over = True


def engine_of(world: World, store: str) -> EmbeddedEngine:
    engine = FLOCK.engine(store=store, durability="process", limits=LIMITS, expose_errors=True)
    engine.observe(world)
    return engine


async def _answer(engine: EmbeddedEngine, world: World, run_id: str, rng: random.Random) -> Run:
    """Answer all questions of a run at random moments until it ends."""
    while (run := await engine.wait(run_id)).status is RunStatus.WAITING:
        questions = list(run.waiting_for)
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
    return run


async def _cancel(engine: EmbeddedEngine, run_id: str) -> None:
    with contextlib.suppress(Conflict):  # it has ended
        await engine.cancel_run(run_id)


def attempt(program: Statement, fate: Fate, folder: Path) -> None:
    """Execute a program once. Raises AssertionError if a promise is broken, with how to repeat it."""
    world, rng = World(program, fate), random.Random(fate.seed)
    WORLDS[:] = [world]
    try:
        run = _all_processes(world, fate, rng, folder)
        _check(world, fate, run)
    except Stuck as exc:
        world.problem(str(exc))
    finally:
        world.end_lives()
    if world.problems:
        raise AssertionError(f"{'; '.join(world.problems)}\n\n{repeated(program, fate)}")


def repeated(program: Statement, fate: Fate) -> str:
    """Return a program and its fate as text, and the command that repeats it."""
    words = [f"The order of seed {fate.seed}, in {'a file' if fate.is_stored else 'memory'}."]
    words += [f"Process {i} {'dies' if end.is_kill else 'stops'} {_when(end)}." for i, end in enumerate(fate.ends, 1)]
    words += [] if fate.cancel is None else [f"In the last process the run is cancelled {_when(fate.cancel)}."]
    command = shlex.quote(msgspec.json.encode([program, fate]).decode())
    return f"{text(program)}\n\n{' '.join(words)}\nTo repeat it: python -m tests.proof --program {command}"


def _when(end: End) -> str:
    return f"{end.steps} steps after event {end.event}"


def _all_processes(world: World, fate: Fate, rng: random.Random, folder: Path) -> Run:
    """Execute a run in one process after the other. Return it when it has ended."""
    store, at = ":memory:", 0.0
    if fate.is_stored:
        store = str(folder / "0.db")
        shutil.copyfile(empty_store(), store)
    for number, end in enumerate((*fate.ends, None), 1):
        loop = Schedule(fate.seed and fate.seed + number, begins_at=at, horizon_s=HORIZON_S, is_traced=False)
        with contextlib.suppress(Died):
            run = live(_process(world, store, end, None if end else fate.cancel, rng, loop), loop)
            if run is not None:
                return run
        world.end_lives()
        at = loop.time() + DOWN_S
        store = _copied(store, folder / f"{number}.db")
    raise AssertionError("the last process does not end before its run")


async def _process(
    world: World, store: str, end: End | None, cancel: End | None, rng: random.Random, loop: Schedule
) -> Run | None:
    """Execute the run. Return it if it has ended, or None if the engine has stopped. Raises Died."""
    stop, cancelling = asyncio.Event(), set[asyncio.Future[None]]()
    async with engine_of(world, store) as engine:
        world.run_id = run_id = world.run_id or (await engine.submit("main", {})).run_id
        world.at(end, loop, _die if end is not None and end.is_kill else stop.set)
        if cancel is not None:
            world.at(cancel, loop, lambda: cancelling.add(asyncio.ensure_future(_cancel(engine, run_id))))
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


def _die() -> None:
    raise Died


def _copied(store: str, to: Path) -> str:
    """Copy the files of a store as a process has left them that has died. Its locks are not copied."""
    for ending in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(f"{store}{ending}", f"{to}{ending}")
    return str(to)


def _check(world: World, fate: Fate, run: Run) -> None:
    """Check what has come out of a run that has ended."""
    if fate.cancel is not None and run.status is RunStatus.CANCELLED:
        return
    outcome, decisions = (world.last_seen | world.seen).get("0", "nothing"), world.last_decisions | world.decisions
    found = run.value["result"] if run.status is RunStatus.COMPLETED else outcome
    if run.status is RunStatus.COMPLETED and found != outcome:
        world.problem(f"the run has {found}, and the program {outcome}")
    if run.status is not RunStatus.COMPLETED and not str(outcome).startswith("raised"):
        world.problem(f"the run is {run.status}: {run.error_type}: {run.error}; the program has {outcome}")
    expected = interpret(world.program, decisions)
    if expected.outcome != outcome:
        world.problem(f"the program has {outcome}, not {expected.outcome}")
    has_questions = any(each.kind == "ask" for each in world.program.all)
    is_exact = not fate.seed and not fate.ends and fate.cancel is None and not has_questions
    if is_exact and not any(each.is_random for each in world.program.all):
        expected = interpret(world.program)
        if expected.decisions != decisions:
            world.problem(f"the program went on with {decisions}, not {expected.decisions}")
        if expected.begun != world.begun:
            world.problem(f"executed {dict(world.begun)}, not {dict(expected.begun)}")


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
    """Yield a function that executes programs as ``attempt`` does, with the garbage collector in its hands."""
    template = sqlite3.connect(":memory:", isolation_level=None)
    migrate(template, "")
    schema, counter = template.serialize(), itertools.count(1)
    template.close()
    shared = "/dev/shm" if Path("/dev/shm").is_dir() else None  # memory: a process that dies does not lose its files
    base = tempfile.mkdtemp(dir=shared)

    def migrate_quickly(db: sqlite3.Connection, path: str) -> None:
        migrate(db, path) if path != database.MEMORY else db.deserialize(schema)

    def execute(program: Statement, fate: Fate) -> None:
        folder = Path(base) / str(number := next(counter))
        if fate.is_stored:
            folder.mkdir()
        try:
            attempt(program, fate, folder)
        finally:
            WORLDS.clear()
            LIVES.clear()
            if not number % RUNS_OF_GARBAGE:
                gc.collect()
            if fate.is_stored:
                shutil.rmtree(folder)

    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # of coroutines that dead processes have never started
            patch.setattr(sys, "unraisablehook", lambda _: None)  # and of those that were running
            patch.setattr(random, "random", lambda: 0.0)  # the pauses between tries
            patch.setattr(database, "migrate", migrate_quickly)
            patch.setattr(embedded, "WATCH_INTERVAL_S", WATCH_INTERVAL_S)
            try:
                yield execute
            finally:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
        logging.disable(logging.NOTSET)
        shutil.rmtree(base)

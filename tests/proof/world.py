"""What a random program does in all processes of its run, and the promises that are broken while it does that."""

import asyncio
import contextlib
import gc
import logging
import math
import random
import shlex
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterator, Set
from typing import Any, NamedTuple

import msgspec
import pytest

from flock.limits import Limits
from flock.runs import Observer, Run, RunContext, RunStatus
from tests.proof.generator import THREADS, End, Fate
from tests.proof.interpreter import interpret
from tests.proof.schedules import Died, Schedule, Stuck, live
from tests.proof.workflows import CALLS, FLOCK, LIFE, TIMEOUTS, WAITS, Statement, Walk, path_to, text

__all__ = ["ANSWER_S", "EXCUSED", "LIMITS", "Life", "World", "attempt", "check", "die", "in_processes", "quiet"]

#: How long a process is down, and how long a person may take to answer, in seconds.
DOWN_S, ANSWER_S = 1.0, (0.0, 0.3, 2.0, 30.0)
#: A run that has not ended after so many virtual seconds in one process never ends.
HORIZON_S = 20_000.0
#: Calls that make calls.
MAKERS = ("tool", "agent", "model")
LIMITS = Limits(max_threads=50, max_recoveries=100)
#: After how many runs the garbage of their processes is collected.
RUNS_OF_GARBAGE = 10


class Life:
    """One execution of the step. See ``workflows.Life``."""

    def __init__(self, world: "World") -> None:
        self.world, self.is_alive, self.attempt = world, True, world.attempt
        #: its engine stops; or the agent has returned, so that tasks that it has left see nothing but cancellation
        self.is_stopping = self.is_over = False
        self.bodies: dict[str, tuple[Walk, Statement]] = {}
        #: the side effects that earlier lives have finished, and the places of those that this one has begun
        self.done, self.begun = frozenset(world.done), Counter[str]()
        #: the places whose end this one has seen, and those of them that have not failed
        self._cancelled, self.ended, self.returned = set[str](), set[str](), set[str]()

    def random_s(self, seconds: float) -> float:
        return seconds * (1 + self.world.random.random()) / 2

    def saw(self, at: str, outcome: Any, statement: Statement) -> None:
        if not self.is_alive or self.is_over:
            return
        if self.is_stopping:
            self.world.last_seen[at] = outcome
        else:
            self.ended.add(at)
            if not str(outcome).startswith("raised"):
                self.returned.add(at)
            self.world.saw(at, outcome, statement)

    def decided(self, at: str, decision: Any) -> None:
        if not self.is_alive or self.is_over:
            return
        if self.is_stopping:
            self.world.last_decisions[at] = decision
        else:
            self.world.decided(at, decision)

    def waits(self, at: str, statement: Statement) -> None:
        if self.is_alive:
            self.world.waits(at, statement)

    def waited(self, at: str, seconds: float) -> None:
        if self.is_alive and not self.is_stopping and not self.is_over:
            self.world.waited(at, seconds)

    def cancelled(self, at: str) -> None:
        self._cancelled.add(at)

    def cut_off(self, at: str) -> None:
        if self.is_alive and not self.is_stopping and not self.is_over:
            below = {each for each in self._cancelled if each.startswith(f"{at}.")}
            self.world.done |= below
            self._cancelled -= below
            self.world.cut_off(at, below)

    @contextlib.contextmanager
    def executing(self, at: str, effect: Statement) -> Iterator[bool]:
        if self.is_alive:
            self.begun[at] += 1
            self.world.begin(self, at, effect)
        yield self.begun[at] <= 1


class _Key(NamedTuple):
    """What equal calls have in common. *maker* is the place of the call that makes them, or ""."""

    maker: str
    kind: str
    is_equal: bool


class World(Observer):
    """What a program has done in all processes, and the promises that are broken while it does that.

    Attributes:
        done: the places of the side effects whose end the program has seen.
        seen: the outcome that it has seen, by place.
    """

    def __init__(self, program: Statement, fate: Fate, *, saves_take_time: bool = False) -> None:
        self.program, self.fate, self.random = program, fate, random.Random(fate.seed)
        self.attempt = 1
        self.send: Callable[[str, int], object] = lambda name, number: None
        #: the outcome of the attempt before; when each wait has begun; and when each message was acknowledged
        self.outcome_before, self._since, self._sent = "", dict[str, float](), dict[str, float]()
        #: the messages that are to be sent, also by the next process if they were not acknowledged
        self._to_send = dict[str, int]()
        self._returned = dict[str, Any]()
        #: how many side effects had begun when each one first began, and when each failure was seen last; and the
        #: first of these numbers of the last one to begin of those whose end was seen
        self._began, self._failed, self._went_on = dict[str, int](), dict[str, int](), 0
        #: the time-out that has cancelled a side effect, by the place of that
        self._timed_out = dict[str, str]()
        #: the places of what was seen in calls that the program has then cancelled
        self._cut_off = set[str]()
        self.lives, self.run_id = list[Life](), ""
        #: it takes the same branches again. No journal knows how long plain code takes, so it may delay a call until
        #: the engine waits no longer for it, or a time-out comes first. Equal calls are told apart by their arrival
        is_slow = any(each.kind == "plain" and each.seconds for each in program.all)
        # And nothing is stored of a deadline that has not passed.
        is_slow |= bool(fate.ends) and any(each.kind == "deadline" for each in program.all)
        # Nor of when a plain time-out has begun, which cannot pass again in time if another one began later, or of its
        # end if nothing is cancelled then.
        limited = [part for each in program.all if each.kind in TIMEOUTS for whole in each.parts for part in whole.all]
        is_slow |= bool(fate.ends) and any(part.kind in ("gather", "completed") for part in limited)
        # Nor of one that passes while a race or a group waits for a thread that it has cancelled.
        waiting = [part for part in limited if part.kind in ("first", "group")]
        is_slow |= bool(fate.ends) and any(part.kind in THREADS for whole in waiting for part in whole.all)
        has_waits = any(each.kind in WAITS for each in program.all)
        #: so another one may pass first than before, and not cancel again what that had cancelled
        self._may_pass_first = (bool(fate.ends) or has_waits) and any(part.kind in TIMEOUTS for part in limited)
        # So may code that takes another time beside a deadline, and then makes a call that it had not made in time.
        is_random = bool(fate.ends) and any(each.is_random for each in program.all)
        self._may_pass_first |= is_random and any(each.kind == "deadline" for each in program.all)
        is_slow |= self._may_pass_first or (has_waits and any(each.kind == "completed" for each in limited))
        # A time-out may pass while the cancellations of a race are being saved, which take no time again.
        is_slow |= saves_take_time and bool(limited)
        # Before Python 3.13 a TaskGroup that fails swallows a cancellation that comes while its calls are being saved.
        calls = [each for each in program.all if each.kind in MAKERS]
        in_calls = (part.kind == "group" for call in calls for part in call.all)
        self.may_swallow = sys.version_info < (3, 13) and bool(fate.ends) and any(in_calls)
        is_slow |= self.may_swallow
        sleeps = sum(each.kind == "sleep" for each in program.all)
        #: equal calls, and sleeps, are told apart by their arrival, so one may end as another one did
        self._is_mixed = bool(fate.seed) and (sleeps > 1 or any(each.is_equal for each in program.all))
        self.is_ordered = not is_slow and not self._is_mixed
        #: no journal knows how late a time-out of the program was, so none is late
        self.has_late_timers = fate.seed and not any(each.kind in TIMEOUTS for each in program.all)
        self.done, self.seen, self.decisions = set[str](), dict[str, Any](), dict[str, Any]()
        #: the same while an engine stops, which may also raise errors of its own. They count if the run ends with them
        self.last_seen, self.last_decisions = dict[str, Any](), dict[str, Any]()
        self.earlier_decisions = dict[str, Any]()
        self.begun, self.answered = Counter[str](), set[str]()
        #: the places of equal calls, and how many of them may be executed more often, by what they have in common
        self._equal, self._in_flight = defaultdict[_Key, set[str]](set), Counter[_Key]()
        self.problems = list[str]()
        self.at(None)
        self._has_ended = False

    def at(self, end: End | None, loop: Schedule | None = None, then: Callable[[], object] = lambda: None) -> None:
        """Call *then* at an end in this process."""
        self._end, self._loop, self._then, self._events = end, loop, then, -1
        if loop is not None:
            for place in [each for each in self._to_send if each not in self._sent]:
                self._send_later(place, loop)
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
        return life

    def stop(self) -> None:
        for life in self.lives:
            life.is_stopping = True

    def end_lives(self) -> None:
        """The process of all lives has died: what has begun and not ended may be executed again."""
        for life in self.lives:
            # So may what was cancelled: what is equal to it waits in vain to be cancelled again.
            for at in life.begun.keys() - (life.ended & self.seen.keys()) if life.is_alive else ():
                self._in_flight[self._key_of(at)] += 1
            life.is_alive = False

    def _key_of(self, at: str) -> "_Key":
        """Return what equal calls have in common."""
        *above, (_, effect) = path_to(self.program, at)
        makers = [place for place, statement in above if statement.kind in MAKERS]
        return _Key((makers or [""])[-1], effect.kind, effect.is_equal)

    @property
    def _may_differ(self) -> bool:
        """Whether an execution may go another way, and so not cancel again a call that has made others."""
        return self._is_mixed or self._may_pass_first

    def check_equal(self) -> None:
        """Equal calls are told apart by their arrival, so only how often all of them are executed is known."""
        for key, places in self._equal.items():
            begun, most = sum(self.begun[at] for at in places), len(places) + self._in_flight[key]
            if begun > most:
                self.problem(f"equal calls of {key.kind} are executed {begun} times, and not up to {most} times")

    def run_ended(self, run: Run) -> None:
        self._has_ended = run.tries >= self.attempt  # not late

    def begin(self, life: Life, at: str, effect: Statement) -> None:
        self.begun[at] += 1
        self._began.setdefault(at, self.begun.total())
        self._event()
        if self._has_ended:
            self.problem(f"{effect.kind} at {at} is executed after the run has ended")
        if effect.is_once and self.begun[at] > 1:
            self.problem(f"{effect.kind}({effect.n}) is executed more than once")
        if effect.is_equal:  # which one of them is executed again may differ
            self._equal[self._key_of(at)].add(at)
            return
        may_repeat = self._may_differ and at not in self.seen
        if at in life.done and not may_repeat:
            self.problem(f"{effect.kind}({effect.n}) is executed again: the program has seen its end, or cancelled it")
        elif life.begun[at] > effect.retries + 1:
            self.problem(f"{effect.kind}({effect.n}) is executed {life.begun[at]} times")

    def saw(self, at: str, outcome: Any, statement: Statement) -> None:
        self._event()
        before, self.seen[at] = self.seen.get(at, outcome), outcome
        self.done.add(at)
        if statement.is_equal:
            self._equal[self._key_of(at)].add(at)
        if statement.kind in (*CALLS, *WAITS) and not str(outcome).startswith("raised"):
            self._returned[at] = outcome
        if str(outcome).startswith("raised"):
            self._failed[at] = self.begun.total()
        if statement.kind in CALLS and not statement.is_equal:
            self._went_on = max(self._went_on, self._began.get(at, 0))
        if before != outcome and (self.is_ordered or statement.kind in (*CALLS, *WAITS)):
            self.problem(f"the program saw {before} at {at}, and now {outcome}")
        if outcome == "raised Uncertain" and not (self.fate.ends or self.fate.retries):
            self.problem(f"the end of the call at {at} is unknown, in the first process")
        if (
            statement.kind == "receive"
            and not outcome
            and self._sent.get(at, math.inf) < self._since.get(at, 0.0) + statement.seconds - 1
        ):
            self.problem(f"the message to {at} was not received, and was sent in time")

    def waits(self, at: str, statement: Statement) -> None:
        loop = asyncio.get_running_loop()
        self._since.setdefault(at, loop.time())
        if statement.kind != "receive" or at in self._to_send or statement.comes == "never":
            return
        self._to_send[at] = statement.n
        if statement.comes == "before":
            self._send(at)
        else:
            self._send_later(at, loop)

    def _send_later(self, at: str, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_later(self.random.choice(ANSWER_S), self._send, at)

    def _send(self, at: str) -> None:
        if at not in self._sent:
            self.send(at, self._to_send[at])

    def sent(self, at: str) -> None:
        """A message is acknowledged."""
        self._sent.setdefault(at, asyncio.get_running_loop().time())

    def cut_off(self, at: str, cancelled: Set[str]) -> None:
        """The program has cancelled what is below a place, such as these side effects."""
        if path_to(self.program, at)[-1][1].kind == "timeout":
            self._timed_out |= dict.fromkeys(cancelled, at)
        for place in self.seen:
            above = (each for each, s in path_to(self.program, place)[:-1] if s.kind in MAKERS)
            if any(each.startswith(f"{at}.") and each not in self.seen for each in above):
                self._cut_off.add(place)

    def waited(self, at: str, seconds: float) -> None:
        took_s = asyncio.get_running_loop().time() - self._since[at]
        if took_s < seconds - 0.01 and self.is_ordered:
            self.problem(f"what takes {seconds:.3f} s at {at} took {took_s:.3f} s")

    def should_retry(self, run: Run) -> bool:
        """Check an attempt that has ended. Whether it is to be retried.

        Then the calls that have returned are known, and the others that the program has gone on from.
        """
        check(self, run)
        if run.status is RunStatus.COMPLETED or self.attempt > self.fate.retries:
            return False
        self.attempt += 1
        ended = {at: outcome for at, outcome in (self.last_seen | self.seen).items() if at == "0"}
        # If a run is cancelled while no process executes it, a retry keeps with what its program would have ended.
        self.outcome_before = "" if run.status is RunStatus.CANCELLED else str(ended)
        self._has_ended = False
        for key, places in self._equal.items():
            # The result of one of them may be seen at the place of another one in the next life.
            self._in_flight[key] += len(places) - max(len(places & life.returned) for life in self.lives)
        kept = {at: outcome for at, outcome in self.seen.items() if self._has_gone_on_from(at, str(ended))}
        self._timed_out = {each: at for each, at in self._timed_out.items() if self._is_cancelled_again(each, at)}
        self.seen = self._returned | kept
        self.done = self.seen.keys() | self._timed_out.keys()
        self.earlier_decisions |= self.last_decisions | self.decisions  # in calls that are not made again
        self.last_seen, self.last_decisions, self.decisions = ended, {}, {}  # its step may be stored
        return True

    def _has_gone_on_from(self, at: str, ended: str) -> bool:
        """Whether a call has failed that a retry keeps, as the end of the step is another one."""
        outcome, statement = str(self.seen[at]), path_to(self.program, at)[-1][1]
        if statement.kind not in CALLS or statement.is_equal or not outcome.startswith("raised"):
            return False
        return outcome.removeprefix("raised ") not in ended and self._has_gone_on(at)

    def _is_cancelled_again(self, at: str, timeout: str) -> bool:
        """Whether a retry keeps that a time-out has cancelled a call, and the time-out passes again."""
        return not path_to(self.program, at)[-1][1].is_equal and self._has_gone_on(timeout)

    def _has_gone_on(self, at: str) -> bool:
        """Whether a call has started and ended after what is at a place, and what contains it, has failed.

        The end of a call that makes it may be stored and not seen, so that is not known.
        """
        path = path_to(self.program, at)[1:]
        makers = {place for place, each in path if each.kind in MAKERS}
        if not path or not makers <= self.seen.keys() - self._cut_off or at in self._cut_off:
            return False
        return not any(place in self.last_seen or self._failed.get(place, 0) >= self._went_on for place, _ in path)

    def decided(self, at: str, decision: Any) -> None:
        self._event()
        before, self.decisions[at] = self.decisions.get(at, decision), decision
        if before != decision and self.is_ordered:
            self.problem(f"the program went on with {before} at {at}, and now with {decision}")


#: The one that is executed, how many there were, and how many attempts were excused that were stopped as changed.
WORLDS: list[World] = []
ATTEMPTS, EXCUSED = [0], [0]


@FLOCK.agent
async def main(context: RunContext) -> Any:
    LIFE.set(life := WORLDS[-1].new_life())
    try:
        return await Walk(life, context).do(WORLDS[-1].program, "0")
    finally:
        life.is_over = True


def attempt(program: Statement, fate: Fate, trial: Callable[[World, Fate, random.Random], Run], command: str) -> None:
    """Execute a program once. Raises AssertionError if a promise is broken, with how to repeat it.

    Args:
        trial: executes the run until it has ended, and ``should_retry`` says no. Raises Stuck.
        command: the option that repeats it.
    """
    world, rng = World(program, fate), random.Random(fate.seed)
    WORLDS[:] = [world]
    try:
        trial(world, fate, rng)
    except Stuck as exc:
        world.problem(str(exc))
    finally:
        world.end_lives()
        WORLDS.clear()
        ATTEMPTS[:] = [ATTEMPTS[0] + 1]
        if not ATTEMPTS[0] % RUNS_OF_GARBAGE:
            gc.collect()
    if world.problems:
        raise AssertionError(f"{'; '.join(world.problems)}\n\n{_repeated(program, fate, command)}")


def in_processes(
    world: World, fate: Fate, process: Callable[[int, End | None, Schedule], Coroutine[Any, Any, Run | None]]
) -> Run:
    """Execute a run in one process after the other. Return it when it has ended.

    Args:
        process: returns what the process of a number, from 0, does until its end; None is that of the run.
    """
    options: dict[str, Any] = {"horizon_s": HORIZON_S, "is_traced": False, "has_late_timers": world.has_late_timers}
    at = 0.0
    for number, end in enumerate((*fate.ends, None)):
        loop = Schedule(fate.seed and fate.seed + number + 1, begins_at=at, **options)
        with contextlib.suppress(Died):
            run = live(process(number, end, loop), loop)
            if run is not None:
                return run
        world.end_lives()
        at = loop.time() + DOWN_S
    raise AssertionError("the last process does not end before its run")


def die() -> None:
    raise Died


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let ``attempt`` collect the garbage, and let nobody complain of what dead processes have left."""
    logging.disable(logging.CRITICAL)
    asyncio.set_event_loop(None)  # otherwise a coroutine that is destroyed could begin another one
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")  # of coroutines that were never started
            patch.setattr(sys, "unraisablehook", lambda _: None)  # and of those that were running
            patch.setattr(random, "random", lambda: 0.0)  # the pauses between tries
            try:
                yield
            finally:
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def _repeated(program: Statement, fate: Fate, command: str) -> str:
    """Return a program and its fate as text, and the command that repeats it."""
    words = [f"The order of seed {fate.seed}, in {'a file' if fate.is_stored else 'memory'}."]
    words += [f"Process {i} {'dies' if end.is_kill else 'stops'} {_when(end)}." for i, end in enumerate(fate.ends, 1)]
    words += [] if fate.cancel is None else [f"In the last process the run is cancelled {_when(fate.cancel)}."]
    words += [f"It is retried up to {fate.retries} times."] if fate.retries else []
    json = shlex.quote(msgspec.json.encode([program, fate]).decode())
    return f"{text(program)}\n\n{' '.join(words)}\nTo repeat it: python -m tests.proof {command} {json}"


def _when(end: End) -> str:
    return f"{end.steps} steps after event {end.event}"


def check(world: World, run: Run) -> None:
    """Check what has come out of a run that has ended."""
    fate = world.fate
    world.check_equal()
    if fate.cancel is not None and run.status is RunStatus.CANCELLED:
        return
    if run.error_type == "changed_program":
        if world.may_swallow:  # the call that was cancelled has failed instead
            EXCUSED[:] = [EXCUSED[0] + 1]
        else:
            world.problem(f"the program was not changed: {run.error}")
        return
    outcome, decisions = (world.last_seen | world.seen).get("0", "nothing"), world.last_decisions | world.decisions
    found = run.value["result"] if run.status is RunStatus.COMPLETED else outcome
    if run.status is RunStatus.COMPLETED and found != outcome:
        world.problem(f"the run has {found}, and the program {outcome}")
    if run.status is not RunStatus.COMPLETED and not str(outcome).startswith("raised"):
        world.problem(f"the run is {run.status}: {run.error_type}: {run.error}; the program has {outcome}")
    expected = interpret(world.program, world.earlier_decisions | decisions)
    if expected.outcome != outcome:
        world.problem(f"the program has {outcome}, not {expected.outcome}")
    failed = {f"Oops({each.n})" for each in world.program.all if each.kind == "mended"}
    if repeated := [each for each in failed if each in str(outcome) and each in world.outcome_before]:
        world.problem(f"a retry repeats {', '.join(repeated)}, with which the attempt before has ended")
    has_waits = any(each.kind in WAITS for each in world.program.all)
    # A gather that is cancelled ends with the first of its parts, while the threads of others run on.
    gathers = [each for each in world.program.all if each.kind == "gather"]
    has_waits |= any(part.kind in THREADS for each in gathers for part in each.all)
    is_exact = not fate.seed and not fate.ends and fate.cancel is None and not has_waits and world.attempt == 1
    if is_exact and not any(each.is_random for each in world.program.all):
        expected = interpret(world.program)
        if expected.decisions != decisions:
            world.problem(f"the program went on with {decisions}, not {expected.decisions}")
        if expected.begun != world.begun:
            world.problem(f"executed {dict(world.begun)}, not {dict(expected.begun)}")

"""Random workflow programs, and what happens to them. Hypothesis makes them too, and finds smaller ones that fail.

The first of all choices are the simplest ones, because Hypothesis tends to them.
"""

import itertools
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from random import Random
from typing import Literal

import msgspec
from hypothesis import strategies as st
from msgspec.structs import replace

from tests.proof.workflows import TIMEOUTS, Kind, Statement

__all__ = ["CLASSES", "THREADS", "End", "Fate", "fate_of", "fates", "program_of", "programs", "restricted"]

SECONDS = (0.1, 0.2, 0.4, 0.8)
LIMITS_S = (0.15, 0.3, 0.6, 1.2)
#: Seconds of plain code: the last one is longer than an engine waits for something that has happened before. If they
#: are random, they differ by less than that.
SLOW_S = (0.05, 0.5, 3.0, 9.0)
#: How long a step sleeps, awaits a message, and may take: in place, or suspended.
SLEEPS_S, EXPIRES_S, DEADLINES_S = (0.2, 0.7, 6.0, 20.0), (0.0, 2.0, 40.0), (0.3, 0.6, 1.2, 10.0, 30.0)
COMES: Sequence[Literal["before", "during", "never"]] = ("before", "during", "never")
PRIMES = [n for n in range(2, 2000) if all(n % m for m in range(2, n))]
#: How many leaves a program has at most, and how deep it is.
MAX_LEAVES, MAX_DEPTH = 8, 8

#: Side effects in threads, each with the same one outside of them; and what may cancel its parts.
THREADS: Mapping[str, Kind] = {"block": "work", "block_and_fail": "fail"}
CANCELLING = {*TIMEOUTS, "deadline", "group", "first", "tool"}

_SIMPLE = {"work", "fail", "flaky", "block", "plain", "seq", "try", "loop", "case", "tool", "agent"}
_TIMED = {"work", "fail", "block", "plain", "seq", "try"}
#: Which kinds the programs of a class have.
CLASSES: dict[str, Collection[str]] = {
    "calls": _SIMPLE,
    "gather": _SIMPLE | {"gather"},
    "questions": _SIMPLE | {"gather", "ask"},
    "groups": (_SIMPLE | {"group"}) - {"tool", "agent"},
    "groups in calls": _SIMPLE | {"group"},
    "races": _SIMPLE | {"first"},
    "as_completed": _SIMPLE | {"completed"},
    "timeouts": _SIMPLE | {"timeout", "wait"},
    "everything": _SIMPLE | {"gather", "ask", "group", "first", "completed", "timeout", "wait"},
    "time-outs beside slow code": _TIMED | {"gather", "group", "first", "completed", "timeout", "wait", "slow"},
    "deadlines beside slow code": _TIMED | {"gather", "first", "ask", "deadline", "sleep", "receive", "slow"},
    "slow plain code": _SIMPLE | {"gather", "ask", "slow"},
    "sleeps": _SIMPLE | {"gather", "first", "ask", "sleep"},
    "messages": _SIMPLE | {"gather", "first", "receive", "sleep"},
    "deadlines": _SIMPLE | {"gather", "first", "deadline", "sleep", "receive"},
    "deadlines and time-outs": _SIMPLE | {"gather", "first", "deadline", "timeout", "wait", "sleep"},
    "at most once": _SIMPLE | {"gather", "first", "group", "ask", "once"},
    "retries": _SIMPLE | {"gather", "group", "completed", "ask", "once", "mended"},
    "everything, slow": _SIMPLE | {"gather", "ask", "group", "first", "completed", "timeout", "wait", "slow"},
    "models": _SIMPLE | {"gather", "first", "ask", "model"},
    "retries and time-outs": _SIMPLE | {"gather", "ask", "timeout", "wait", "mended"},
}

#: How many parts a statement has that contains others, at least and at most.
PARTS: Mapping[str, tuple[int, int]] = {
    "seq": (2, 4),
    "try": (2, 2),
    "loop": (1, 1),
    "case": (3, 3),
    "tool": (1, 1),
    "agent": (1, 1),
    "gather": (2, 4),
    "group": (2, 4),
    "first": (2, 4),
    "completed": (2, 4),
    "wait": (2, 4),
    "timeout": (1, 1),
    "deadline": (1, 1),
    "model": (1, 4),
}


def program_of(random: Random, kinds: Collection[str]) -> Statement:
    """Return a program of some kinds of statements. Unless "slow" is one of them, plain code takes no time."""
    leaves = [kind for kind in _LEAVES if kind in kinds]
    whole = [kind for kind in PARTS if kind in kinds for _ in range(1 if kind in _SIMPLE else 4)]

    def made(size: int, depth: int = 0) -> Statement:
        fitting = [kind for kind in whole if PARTS[kind][0] <= size]
        if depth == MAX_DEPTH or not fitting or (size == 1 and random.randint(0, 2)):
            return _LEAVES[random.choice(leaves)](random, kinds)
        kind = random.choice(fitting)
        least, most = PARTS[kind]
        count = random.randint(least, min(most, size))
        cuts = [0, *sorted(random.sample(range(1, size), count - 1)), size]
        parts = tuple(made(end - begin, depth + 1) for begin, end in itertools.pairwise(cuts))
        limited = {"wait": LIMITS_S, "timeout": LIMITS_S, "deadline": DEADLINES_S, "tool": (None, *LIMITS_S)}
        return Statement(
            kind,  # type: ignore[arg-type]
            parts,
            limit_s=random.choice(limited[kind]) if kind in limited else None,
            times=random.randint(2, 3) if kind == "loop" else 0,
        )

    last = Statement("work", seconds=SECONDS[0])  # so that a process can die after what comes before, or has failed
    first = made(random.randint(1, MAX_LEAVES))
    if random.randint(0, 2):
        first = Statement("try", (first, last))
    end = Statement("mended", seconds=SECONDS[0]) if "mended" in kinds else last  # a retry keeps what comes before
    return numbered(restricted(Statement("seq", (first, last, end))))


def _work(random: Random, kinds: Collection[str]) -> Statement:
    return Statement("work", seconds=random.choice(SECONDS))


def _fail(random: Random, kinds: Collection[str]) -> Statement:
    kind = random.choice(["work", "fail"])
    return Statement(kind, seconds=random.choice(SECONDS), is_equal=random.choice([False, True]))  # type: ignore[arg-type]


def _flaky(random: Random, kinds: Collection[str]) -> Statement:
    kind, limit_s = random.choice(["work", "fail", "flaky"]), random.choice([None, *LIMITS_S])
    return Statement(kind, seconds=random.choice(SECONDS), retries=random.randint(0, 2), limit_s=limit_s)  # type: ignore[arg-type]


def _block(random: Random, kinds: Collection[str]) -> Statement:
    return Statement(random.choice(["block", "block_and_fail"]), seconds=random.choice(SECONDS))


def _ask(random: Random, kinds: Collection[str]) -> Statement:
    return Statement("ask")


def _receive(random: Random, kinds: Collection[str]) -> Statement:
    comes = random.choice(COMES)
    return Statement("receive", comes=comes, seconds=random.choice(EXPIRES_S[comes == "never" :]))


def _sleep(random: Random, kinds: Collection[str]) -> Statement:
    return Statement("sleep", seconds=random.choice(SLEEPS_S))


def _once(random: Random, kinds: Collection[str]) -> Statement:
    kind, limit_s = random.choice(["work", "fail", "block"]), random.choice([None, *LIMITS_S])
    return Statement(kind, seconds=random.choice(SECONDS), limit_s=limit_s, is_once=True)  # type: ignore[arg-type]


def _mended(random: Random, kinds: Collection[str]) -> Statement:
    return Statement("mended", seconds=random.choice(SECONDS))


def _plain(random: Random, kinds: Collection[str]) -> Statement:
    """A call follows: if a task ends with plain code, no journal can tell whether it ends before another one.

    Nor can it if the code takes more iterations of the loop than the end of a call that is not executed a second time.
    """
    seconds, is_random = (random.choice(SLOW_S), random.choice([False, True])) if "slow" in kinds else (0.0, False)
    times = random.choice([1, 3] if "once" in kinds else [1, 3, 20])
    plain = Statement("plain", times=times, seconds=seconds, is_random=is_random)
    return Statement("seq", (plain, _work(random, kinds)))


_LEAVES: Mapping[str, Callable[[Random, Collection[str]], Statement]] = {
    "work": _work,
    "fail": _fail,
    "flaky": _flaky,
    "block": _block,
    "ask": _ask,
    "receive": _receive,
    "sleep": _sleep,
    "once": _once,
    "mended": _mended,
    "plain": _plain,
}


def numbered(statement: Statement) -> Statement:
    """Give each statement its number, and each duration a part of its own."""
    numbers, parts = itertools.count(1), iter(PRIMES)

    def own(seconds: float) -> float:
        return round(seconds + math.sqrt(next(parts)) / 1000, 6)

    def give(s: Statement) -> Statement:
        n = next(numbers)
        return replace(
            s,
            n=0 if s.is_equal else n,
            parts=tuple(map(give, s.parts)),
            seconds=own(s.seconds) if s.seconds else 0.0,
            limit_s=None if s.limit_s is None else own(s.limit_s),
        )

    return give(statement)


def restricted(s: Statement, above: Set[str] = frozenset()) -> Statement:
    """Return a program without the threads that make its course depend on what no journal knows.

    Args:
        above: kinds that contain it; "cut group" if one is a group that may be cancelled, "late" if two are time-outs.
    """
    if s.kind in THREADS and above & {"cut group", "late"}:
        # A group that fails waits for its threads, and if it is cancelled meanwhile, it still fails. While a thread is
        # waited for after a time-out of the program, another one may pass.
        return replace(s, kind=THREADS[s.kind])
    if s.kind == "group" and above & {"timeout", "deadline"} and sys.version_info < (3, 13):
        s = replace(s, kind="gather")  # if a group fails, ``asyncio.timeout`` takes it for a cancellation
    if s.kind == "tool" and any(each.kind in THREADS for each in s.all):
        s = replace(s, limit_s=None)  # whether it is too late depends on what follows the thread
    below = {*above, s.kind}
    if s.kind == "group" and above & CANCELLING:
        below.add("cut group")
    if s.kind in TIMEOUTS and above & {*TIMEOUTS}:
        below.add("late")
    return replace(s, parts=tuple(restricted(part, below) for part in s.parts))


# What happens to them


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
        retries: how often it is then retried if it has not completed.
    """

    seed: int = 0
    is_stored: bool = False
    ends: tuple[End, ...] = ()
    cancel: End | None = None
    retries: int = 0


def fate_of(random: Random, *, is_whole: bool) -> Fate:
    """Return a fate in which no process ends before the run, or in which some do."""
    seed = random.randint(1, 1000) if random.randint(0, 1) else 0
    ends = () if is_whole else tuple(_end(random) for _ in range(random.randint(1, 3)))
    cancel = None if random.randint(0, 3) else _end(random)
    retries = max(0, random.randint(-2, 2))
    return Fate(seed, not is_whole or random.choice([False, True]), ends, cancel, retries)


def _end(random: Random) -> End:
    return End(random.randint(0, 15), random.randint(0, 20), random.randint(0, 3) < 3)


# For Hypothesis


def programs(kinds: Collection[str]) -> st.SearchStrategy[Statement]:
    return st.randoms(use_true_random=False).map(lambda random: program_of(random, kinds))


def fates(count: int) -> st.SearchStrategy[Sequence[Fate]]:
    """Return several fates for one program, the first without the end of a process."""
    return st.randoms(use_true_random=False).map(
        lambda random: [fate_of(random, is_whole=not number) for number in range(count)]
    )

"""Many random workflow programs, with what has come out of them so far."""

import time
from collections.abc import Callable, Iterator, Sequence
from random import Random

import hypothesis
from hypothesis import HealthCheck, Phase
from msgspec.structs import replace

from tests.proof.generator import CLASSES, Fate, fate_of, fates, program_of, programs, restricted
from tests.proof.lives import processes
from tests.proof.memory import memories
from tests.proof.workflows import Statement
from tests.proof.world import EXCUSED

__all__ = ["execute_many", "execute_seeds", "execute_some"]

Attempt = Callable[[Statement, Fate], None]

#: Programs of one Hypothesis run, which remembers all of them, and how many fates each of them has.
CHUNK, FATES = 100, 5


def execute_some(name: str, count: int, seed: int, attempt: Attempt) -> int:
    """Execute programs of a class that Hypothesis makes, each with its fates, and return their number.

    Raises: AssertionError with the smallest one that fails.
    """
    executed, failed = 0, dict[tuple[int, int], str]()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(programs(CLASSES[name]), fates(FATES))
    def execute(program: Statement, fates: Sequence[Fate]) -> None:
        nonlocal executed
        executed += 1
        for fate in fates:
            try:
                attempt(program, fate)
            except AssertionError as exc:
                size = len(list(program.all)) + len(fate.ends)
                failed[size, sum(end.event + end.steps for end in fate.ends)] = str(exc)
                raise

    try:
        execute()
    except (AssertionError, hypothesis.errors.Flaky):
        if not failed:  # it was interrupted
            raise
        raise AssertionError(f"{name}: {failed[min(failed)]}") from None
    return executed


def execute_seeds(name: str, seeds: Sequence[int], attempt: Attempt) -> int:
    """Execute one program of a class for each seed, with one fate, and return their number. It is much faster.

    Raises: AssertionError with the smallest one that fails.
    """
    for seed in seeds:
        random = Random(f"{name} {seed}")
        program, fate = program_of(random, CLASSES[name]), fate_of(random, is_whole=not seed % FATES)
        try:
            attempt(program, fate)
        except AssertionError as exc:
            raise AssertionError(f"{name}, seed {seed}: {_smallest(program, fate, attempt) or exc}") from None
    return len(seeds)


def _smallest(program: Statement, fate: Fate, attempt: Attempt) -> str:
    """Return the failure of the smallest program that can be made of one that fails by leaving out its parts."""
    failure, candidates = "", _smaller(program, fate)
    while (candidate := next(candidates, None)) is not None:
        if restricted(candidate[0]) != candidate[0]:
            continue
        try:
            attempt(*candidate)
        except AssertionError as exc:
            failure, candidates = str(exc), _smaller(*candidate)
    return failure


def _smaller(program: Statement, fate: Fate) -> Iterator[tuple[Statement, Fate]]:
    """Yield what differs in one place, and is smaller."""
    yield from ((part, fate) for part in _smaller_programs(program))
    if fate.cancel is not None:
        yield program, replace(fate, cancel=None)
    if fate.retries:
        yield program, replace(fate, retries=fate.retries - 1)
    if fate.seed:
        yield program, replace(fate, seed=0)
    for i, end in enumerate(fate.ends):
        yield program, replace(fate, ends=(*fate.ends[:i], *fate.ends[i + 1 :]))
        for less in (0, 1, 5):
            for smaller in (replace(end, event=max(0, end.event - less)), replace(end, steps=max(0, end.steps - less))):
                if smaller != end:
                    yield program, replace(fate, ends=(*fate.ends[:i], smaller, *fate.ends[i + 1 :]))


def _smaller_programs(s: Statement) -> Iterator[Statement]:
    if s.parts and s.parts[0].kind == "plain":  # a call follows; see ``generator``
        yield from s.parts[1:]
        return
    yield from s.parts
    for i, part in enumerate(s.parts):
        if s.kind not in ("try", "case") and len(s.parts) > 1:
            yield replace(s, parts=(*s.parts[:i], *s.parts[i + 1 :]))
        for smaller in _smaller_programs(part):
            yield replace(s, parts=(*s.parts[:i], smaller, *s.parts[i + 1 :]))


def execute_many(count: int, classes: Sequence[str], first: int, *, is_in_memory: bool) -> int:
    """Execute at least *count* programs of *classes*, and print what fails. Return the number of failures."""
    executed, failures, begin, turn = 0, list[str](), time.monotonic(), 0
    chunk = min(CHUNK, -(-count // len(classes)))
    with memories() if is_in_memory else processes() as attempt:
        while executed < count and classes:
            name, seed = classes[turn % len(classes)], first + turn // len(classes)
            try:
                if is_in_memory:
                    executed += execute_seeds(name, range(seed * CHUNK, seed * CHUNK + chunk), attempt)
                else:
                    executed += execute_some(name, chunk, seed, attempt)
            except AssertionError as exc:
                failures.append(str(exc))
                print(f"\n\n{exc}\n", flush=True)
                if not is_in_memory:
                    classes = [each for each in classes if each != name]
            turn += 1
            rate = executed / (time.monotonic() - begin)
            print(f"{executed} programs, {rate:.1f} per second, {len(failures)} failures", end="\r", flush=True)
    print(f"{executed} programs in {time.monotonic() - begin:.0f} s. Failures: {len(failures)}.", end=" ")
    print(f"Stopped as changed, and excused: {EXCUSED[0]}.")
    return len(failures)

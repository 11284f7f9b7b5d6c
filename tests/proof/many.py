"""Many random workflow programs, with what has come out of them so far."""

import time
from collections.abc import Callable, Sequence

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.proof.lives import FATES, Fate, fates, processes
from tests.proof.workflows import CLASSES, Statement, programs

__all__ = ["execute_many", "execute_some"]

#: Programs of one Hypothesis run, which remembers all of them.
CHUNK = 100


def execute_some(
    name: str, count: int, seed: int, attempt: Callable[[Statement, Fate], None], *, shrinks: bool = True
) -> int:
    """Execute programs of a class, each with its fates, and return their number.

    Raises: AssertionError with the smallest one that fails.
    """
    executed, failed = 0, dict[tuple[int, int], str]()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @hypothesis.given(programs(CLASSES[name]), fates())
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


def execute_many(count: int, classes: Sequence[str], first: int) -> int:
    """Execute at least *count* programs of *classes*, and print what fails. Return the number of failures."""
    executed, failures, begin, turn = 0, list[str](), time.monotonic(), 0
    with processes() as attempt:
        while executed < count:
            name, seed = classes[turn % len(classes)], first + turn // len(classes)
            try:
                executed += execute_some(name, min(CHUNK, -(-count // len(classes))), seed, attempt)
            except AssertionError as exc:
                failures.append(str(exc))
                print(f"\n\nSeed {seed}: {exc}\n", flush=True)
                classes = [each for each in classes if each != name]
                if not classes:
                    break
            else:
                turn += 1
            rate = executed / (time.monotonic() - begin)
            print(
                f"{executed} programs with {FATES} fates each, {rate:.1f} per second, {len(failures)} failures",
                end="\r",
                flush=True,
            )
    print(f"{executed} programs in {time.monotonic() - begin:.0f} s. Classes that failed: {len(failures)}.")
    return len(failures)

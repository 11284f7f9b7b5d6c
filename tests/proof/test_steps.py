"""Programs in many orders: ``schedules`` makes the orders, and ``invariants`` has what must hold in each of them."""

import asyncio
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.core import Flock
from flock.runs import RunContext, Usage
from tests.proof.invariants import Program, World, store_of, trial, trial_with_restart
from tests.proof.programs import PROGRAMS
from tests.proof.schedules import Schedule, Stuck, execute
from tests.support import ROOT

each_program = pytest.mark.parametrize("name", PROGRAMS)


def lanes(fast: Any, more: Any, most: Any) -> list[Any]:
    """Return the parameters of one test: a part for each change, and more of them each night."""
    nightly = [pytest.mark.nightly, pytest.mark.timeout(3600)]  # a program that hangs is found in virtual time
    return [
        pytest.param(fast, id="fast"),
        pytest.param(more, id="more", marks=nightly),
        pytest.param(most, id="most", marks=nightly),
    ]


@each_program
@pytest.mark.parametrize("seeds", lanes(range(6), range(6, 24), range(24, 400)))
def test_a_step_keeps_its_promises_in_each_order(name: str, seeds: range, tmp_path: Path) -> None:
    for seed in seeds:
        attempt(trial, name, seed, store_of(seed, tmp_path))


@each_program
@pytest.mark.parametrize("size", lanes((range(1), 13), (range(1), 2), (range(6), 1)))
def test_a_run_can_be_cancelled_at_each_step_of_the_loop(name: str, size: tuple[range, int]) -> None:
    seeds, stride = size
    for seed in seeds:
        for step in attempt(trial, name, seed, ":memory:")[::stride]:
            attempt(trial, name, seed, ":memory:", cancel_at=step)


@pytest.mark.parametrize("stride", lanes(None, 10, 1)[1:])
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "context_variables"])  # they are not stored
def test_an_engine_can_stop_at_each_step_of_the_loop(name: str, stride: int, tmp_path: Path) -> None:
    """Another one resumes the run."""
    for step in attempt(trial, name, 0, tmp_path / "whole.db")[::stride]:
        attempt(trial_with_restart, name, 0, tmp_path / f"{step}.db", stop_at=step)


def attempt(trial: Callable[..., Any], name: str, seed: int, store: str | Path, **step: int) -> Any:
    """Return the result of one trial. Raises AssertionError, with how to repeat it."""
    try:
        return execute(functools.partial(trial, program=PROGRAMS[name], store=store, **step), seed)
    except (AssertionError, Stuck) as exc:
        options = " ".join(f"--{option.replace('_', '-')} {at}" for option, at in step.items())
        raise AssertionError(f"{exc}\n\nTo repeat it: python -m tests.proof {name} {seed} {options}") from exc


# The orders themselves


def trace_of(name: str, seed: int) -> list[str]:
    async def main(loop: Schedule) -> list[str]:
        await trial(loop, PROGRAMS[name], store_of(seed, Path(folder)))
        return loop.trace

    with tempfile.TemporaryDirectory() as folder:
        return execute(main, seed)


def test_a_seed_has_the_same_order_each_time_and_another_seed_has_another_one() -> None:
    for name in ("tools", "questions", "more_threads_than_slots"):
        traces = [trace_of(name, seed) for seed in range(6)]
        assert traces == [trace_of(name, seed) for seed in range(6)]
        assert len({tuple(trace) for trace in traces}) == 6


@pytest.mark.slow
def test_a_seed_has_the_same_order_in_another_process() -> None:
    code = "from tests.proof.test_steps import *; print(*trace_of('tools', 5), sep='\\n', end='')"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert found.stdout.split("\n") == trace_of("tools", 5)


def test_time_passes_when_nothing_is_ready_and_threads_take_part_in_it() -> None:
    async def main(loop: Schedule) -> float:
        async with asyncio.timeout(50):
            await asyncio.gather(asyncio.sleep(20), asyncio.to_thread(time.sleep, 30), anyio.to_thread.run_sync(int))
        return loop.time()

    assert execute(main, 0) == 30


def test_a_wait_that_never_ends_is_reported_with_its_place() -> None:
    async def wait(loop: Schedule) -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match=r"No end after 0 s:\n  task 0: wait:\d+ → wait:\d+"):
        execute(wait, 1)


LEFT = set[asyncio.Future[Any]]()


async def leave_a_task(context: RunContext, world: World) -> None:
    LEFT.add(asyncio.ensure_future(asyncio.sleep(9)))


async def leave_a_call(context: RunContext, world: World) -> None:
    LEFT.add(asyncio.ensure_future(world.work(1, context)))
    await asyncio.sleep(0)


async def leave_a_thread(context: RunContext, world: World) -> None:
    asyncio.get_running_loop().run_in_executor(None, time.sleep, 9)
    await asyncio.sleep(0.5)


async def leave_a_coroutine(context: RunContext, world: World) -> None:
    _ = context.call(world.work, 1)


async def wait_for_ever(context: RunContext, world: World) -> None:
    await asyncio.Event().wait()


async def forget_a_cost(context: RunContext, world: World) -> None:
    context.spend(Usage(input_tokens=1), "openai/gpt-4o")


async def wake_oneself(context: RunContext, world: World) -> None:
    ends_at = anyio.current_time() + 0.1
    while anyio.current_time() < ends_at:  # noqa: ASYNC110 - what a program should not do
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (leave_a_task, "1 tasks are left"),
        (leave_a_call, "work is"),
        (leave_a_thread, "1 threads are left"),
        (leave_a_coroutine, "was never awaited"),
        (wait_for_ever, "No end after"),
        (forget_a_cost, "0 replies were read and 0 cut off, but the run reports Usage(input_tokens=1"),
        (wake_oneself, "the event loop was busy"),
    ],
)
def test_a_broken_promise_is_found(program: Callable[[RunContext, World], Awaitable[None]], problem: str) -> None:
    def declare(flock: Flock, world: World) -> None:
        @flock.agent
        async def main(context: RunContext) -> None:
            await program(context, world)

    for seed in range(3):
        with pytest.raises((AssertionError, Stuck)) as caught:
            execute(functools.partial(trial, program=Program(declare, None), store=":memory:"), seed)
        assert problem in str(caught.value)

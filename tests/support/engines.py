"""Engines of each kind, and helpers that wait for what happens in them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.runs import Batch, Engine, Run
from flock.store.store import SQLiteStore
from tests.support import PATIENCE_S

#: A function that opens an engine of the kind under test, for a flock and with options that all kinds take.
OpenEngine = Callable[..., AbstractAsyncContextManager[Engine]]


async def ended(engine: Engine, batch: Batch) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait_batch(batch.batch_id)


async def all_items(engine: Engine, batch: Batch) -> list[Any]:
    items: list[Any] = []
    while page := await engine.get_items(batch.batch_id, after=len(items) - 1, limit=700):
        items += page
    return items


async def until(condition: Callable[[], bool]) -> None:
    """Poll *condition* until it is true."""
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await anyio.sleep(0.01)


@contextlib.asynccontextmanager
async def counting_turns() -> AsyncIterator[list[int]]:
    """Count the turns of the event loop until the block ends. The list that it yields has one number, their count."""
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        yield turns
        tasks.cancel_scope.cancel()


async def until_run(engine: Engine, run_id: str, is_enough: Callable[[Run], bool]) -> Run:
    with anyio.fail_after(PATIENCE_S):
        while not is_enough(run := await engine.get_run(run_id)):  # noqa: ASYNC110 - polls like a client
            await anyio.sleep(0.01)
    return run


async def interrupted(open_again: OpenEngine, flock: Flock, reached: anyio.Event, agent_name: str = "work") -> Run:
    """Execute a run until *reached*, and end its engine and worker as their process would end."""
    async with open_again(flock) as engine:
        run = await engine.submit(agent_name, {})
        with anyio.fail_after(PATIENCE_S):
            await reached.wait()
        if isinstance(engine, EmbeddedEngine):
            await engine.drain(0)
    return run


async def continued(open_again: OpenEngine, flock: Flock, run: Run, **options: Any) -> Run:
    """Return the end of *run*, which the next process executes."""
    async with open_again(flock, **options) as engine:
        with anyio.fail_after(PATIENCE_S):
            return await engine.wait(run.run_id)


def sqlite_of(engine: Engine) -> SQLiteStore:
    """Return the store of an embedded engine, to look into its file."""
    assert isinstance(engine, EmbeddedEngine)
    assert isinstance(engine.store, SQLiteStore)
    return engine.store

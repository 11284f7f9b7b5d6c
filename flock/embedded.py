"""The engine inside this process: each run is a task of one anyio task group that lives as long as the engine.

Records are kept in memory, bounded: of final runs and batches the oldest are forgotten first.
"""

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents import Agent, Resources
from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    EngineFull,
    EngineStopped,
    FieldError,
    InvalidData,
    RunNotFound,
    StepError,
)
from flock.llm import ModelClient
from flock.runs import Batch, BatchOptions, Run, RunStatus, Step, new_id, now
from flock.workflow import run_workflow

__all__ = ["EmbeddedEngine"]

logger = logging.getLogger("flock.runs")

_INTERRUPTED = "The server stopped before this run ended.", "interrupted"

#: How many errors of a batch's items are told at once.
MAX_ITEM_ERRORS = 100


class EmbeddedEngine:
    """``Engine`` on anyio task groups.

    Args:
        agents: by name; read at each submission, so agents added later are found.
        models: what model agents call; the engine closes it.
        max_concurrency: runs and items at work at the same time.
        max_queue: runs accepted and waiting.
        max_items: items of all unfinished batches together.
        max_threads: synchronous functions at work at the same time.
        max_steps: how often one run may be handed on.
        keep_runs: final runs and items kept.
        expose_errors: put the text of any exception into a run's ``error``; for development.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        *,
        max_concurrency: int = 100,
        max_queue: int = 10_000,
        max_items: int = 10_000,
        max_threads: int = 40,
        max_steps: int = 32,
        keep_runs: int = 10_000,
        expose_errors: bool = False,
    ) -> None:
        self._agents = agents
        self._models = models
        self._max_concurrency = max_concurrency
        self._max_queue = max_queue
        self._max_items = max_items
        self._max_threads = max_threads
        self._max_steps = max_steps
        self._keep_runs = keep_runs
        self._expose_errors = expose_errors

        self._runs: dict[str, Run] = {}
        self._batches: dict[str, Batch] = {}
        self._items: dict[str, list[str]] = {}  # run ids by batch, in the order of their positions
        self._waiters: dict[str, _Waiter] = {}  # by run; there as long as the run is not final
        self._kept = 0
        self._final: dict[str, int] = {}  # records kept for each final run or batch, the oldest first
        self._waiting_runs = 0
        self._unfinished_items = 0
        self._tasks: anyio.abc.TaskGroup | None = None

    # Life

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise EngineStopped("This engine is running already.")
        self._slots = anyio.Semaphore(self._max_concurrency)
        self._is_leaving = False
        async with AsyncExitStack() as stack:
            models = await stack.enter_async_context(self._models)
            self._resources = Resources(models, anyio.CapacityLimiter(self._max_threads))
            self._tasks = await stack.enter_async_context(anyio.create_task_group())
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        tasks.cancel_scope.cancel()
        self.interrupt()
        await self._exit.__aexit__(None, None, None)

    def interrupt(self) -> None:
        """End what is at work as interrupted, and take no new work: the process is about to stop."""
        self._is_leaving = True
        for run_id in list(self._waiters):
            self._end(self._runs[run_id], *_INTERRUPTED)
        for batch in list(self._batches.values()):
            if not batch.status.is_final:
                self._end_batch(batch.batch_id)

    def _running_tasks(self) -> anyio.abc.TaskGroup:
        if self._tasks is None:
            raise EngineStopped("The engine is not running: enter it with 'async with', or run the app's lifespan.")
        if self._is_leaving:
            raise EngineStopped("The server is about to stop and takes no new work.")
        return self._tasks

    # Runs

    async def submit(self, agent_name: str, inputs: msgspec.Raw, *, request_id: str | None = None) -> Run:
        tasks = self._running_tasks()
        self._agent(agent_name).input.decode(inputs, "/inputs")
        if self._waiting_runs >= self._max_queue:
            raise EngineFull(
                f"{self._waiting_runs} runs are waiting already, as many as this server takes (max_queue)."
            )
        run = self._accept(agent_name, inputs, request_id=request_id)
        self._waiting_runs += 1
        tasks.start_soon(self._run_task, run)
        return run

    async def get_run(self, run_id: str) -> Run:
        try:
            return self._runs[run_id]
        except KeyError:
            raise RunNotFound(run_id) from None

    async def wait_run(self, run_id: str) -> Run:
        waiter = self._waiters.get(run_id)
        if waiter is None:
            return await self.get_run(run_id)
        await waiter.event.wait()
        return waiter.run  # it may be forgotten already

    def _agent(self, name: str) -> Agent:
        try:
            return self._agents[name]
        except KeyError:
            raise AgentNotFound(name, list(self._agents)) from None

    def _accept(self, agent_name: str, inputs: msgspec.Raw, **more: Any) -> Run:
        # The copy lets go of the request's body, of which a Raw is only a view.
        inputs = msgspec.Raw(bytes(inputs))
        run = Run(run_id=new_id(), agent_name=agent_name, inputs=inputs, created_at=now(), **more)
        self._runs[run.run_id] = run
        self._waiters[run.run_id] = _Waiter(run)
        return run

    async def _run_task(self, run: Run) -> None:
        async with self._slots:
            self._waiting_runs -= 1
            await self._carry_out(run)

    async def _carry_out(self, run: Run) -> None:
        """Take *run* to its end, whatever its agents do. Only a cancellation that was asked for comes out of here."""
        run = self._runs[run.run_id] = replace(run, status=RunStatus.RUNNING, started_at=now())
        journal = _MemoryJournal(self._runs, run.run_id)
        try:
            result = await run_workflow(run, self._agents, journal, self._resources, max_steps=self._max_steps)
        except BaseException as exc:
            # Within a cancelled scope the deadline is -inf. A cancellation without one comes from the agent's own code,
            # as every other exception does, whatever its class.
            if anyio.current_effective_deadline() == -math.inf:
                raise
            self._fail(self._runs[run.run_id], exc)
        else:
            run = replace(self._runs[run.run_id], status=RunStatus.COMPLETED, result=result)
            self._end(run, None, None)
        await _absorb_cancellation()

    def _fail(self, run: Run, exc: BaseException) -> None:
        while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
            exc = exc.exceptions[0]
        if isinstance(exc, StepError):
            logger.warning("run %s: %s %s (request %s)", run.run_id, exc, exc.log_detail, run.request_id)
            self._end(run, str(exc), exc.error_type)
            return
        agent_name = run.steps[-1].next_agent if run.steps else run.agent_name
        logger.error("run %s: agent %s raised (request %s)", run.run_id, agent_name, run.request_id, exc_info=exc)
        error = f"The agent {agent_name!r} raised {type(exc).__name__}"
        where = f"request {run.request_id}" if run.request_id else f"run {run.run_id}"
        error += f": {exc}" if self._expose_errors else f"; the server's log has more under {where}."
        self._end(run, error, "agent_exception")

    def _end(self, run: Run, error: str | None, error_type: str | None) -> None:
        """Keep *run* as final, and tell those who wait for it."""
        waiter = self._waiters.pop(run.run_id, None)
        if waiter is None:
            return  # it was interrupted, and its agent went on all the same
        status = RunStatus.COMPLETED if error is None else RunStatus.FAILED
        run = replace(
            run,
            status=status,
            error=_sayable(error),
            error_type=_sayable(error_type),
            completed_at=now(),
            # What is final needs these no more, and they may be large.
            inputs=msgspec.Raw(b"{}"),
            steps=tuple(replace(step, result=msgspec.Raw(b"{}")) for step in run.steps),
        )
        self._runs[run.run_id] = run
        waiter.run = run
        waiter.event.set()
        logger.info(
            "run %s: %s, agent %s, %d ms (request %s)",
            run.run_id,
            run.status,
            run.agent_name,
            (run.completed_at - run.created_at).total_seconds() * 1000 if run.completed_at else 0,
            run.request_id,
        )
        if run.batch_id is None:
            self._keep(run.run_id, 1)
            return
        self._unfinished_items -= 1
        batch = self._batches[run.batch_id]
        self._batches[run.batch_id] = replace(
            batch,
            completed_items=batch.completed_items + 1,
            failed_items=batch.failed_items + (status is RunStatus.FAILED),
        )

    # Batches

    async def submit_batch(
        self,
        agent_name: str,
        items: Sequence[msgspec.Raw],
        options: BatchOptions,
        *,
        request_id: str | None = None,
    ) -> Batch:
        self._running_tasks()
        if len(items) > self._max_items:
            detail = f"{len(items)} items are more than this server takes in a batch ({self._max_items}, max_items)."
            raise InvalidData([FieldError(detail=detail, pointer="/batch_inputs")])
        await _check_items(self._agent(agent_name), items)
        tasks = self._running_tasks()
        if self._unfinished_items + len(items) > self._max_items:
            raise EngineFull(
                f"{self._unfinished_items} items of other batches are still unfinished, and {len(items)} more would be "
                f"over what this server takes ({self._max_items}, max_items).",
            )
        batch = Batch(
            batch_id=new_id(),
            agent_name=agent_name,
            options=options,
            total_items=len(items),
            created_at=now(),
            request_id=request_id,
        )
        self._batches[batch.batch_id] = batch
        self._items[batch.batch_id] = [
            self._accept(agent_name, item, batch_id=batch.batch_id, position=position, request_id=request_id).run_id
            for position, item in enumerate(items)
        ]
        self._unfinished_items += len(items)
        tasks.start_soon(self._batch_task, batch)
        return batch

    async def get_batch(self, batch_id: str) -> Batch:
        try:
            return self._batches[batch_id]
        except KeyError:
            raise BatchNotFound(batch_id) from None

    async def get_items(self, batch_id: str, *, after: int = -1, limit: int = 1000) -> Sequence[Run]:
        await self.get_batch(batch_id)
        return [self._runs[run_id] for run_id in self._items[batch_id][after + 1 : after + 1 + limit]]

    async def _batch_task(self, batch: Batch) -> None:
        self._batches[batch.batch_id] = replace(batch, status=RunStatus.RUNNING, started_at=now())
        run_ids = iter(self._items[batch.batch_id])
        workers = min(batch.options.max_workers, batch.total_items) if batch.options.parallel else 1
        async with anyio.create_task_group() as tasks:
            for _ in range(workers):
                tasks.start_soon(self._work_through, run_ids)
        self._end_batch(batch.batch_id)

    async def _work_through(self, run_ids: Iterator[str]) -> None:
        for run_id in run_ids:  # shared with the batch's other workers
            async with self._slots:
                await self._carry_out(self._runs[run_id])

    def _end_batch(self, batch_id: str) -> None:
        batch = self._batches[batch_id]
        if batch.status.is_final:
            return  # it was interrupted
        error = None
        if batch.failed_items == batch.total_items:
            first = self._runs[self._items[batch_id][0]]
            error = f"None of the {batch.total_items} items completed. The first one: {first.error}"
        self._batches[batch_id] = replace(
            batch,
            status=RunStatus.COMPLETED if error is None else RunStatus.FAILED,
            error=error,
            completed_at=now(),
        )
        self._keep(batch_id, batch.total_items)

    # Memory

    def _keep(self, id_: str, records: int) -> None:
        """Keep what is final under *id_*, and forget the oldest beyond ``keep_runs`` records; never the newest."""
        self._final[id_] = records
        self._kept += records
        while self._kept > self._keep_runs and len(self._final) > 1:
            oldest = next(iter(self._final))
            self._kept -= self._final.pop(oldest)
            for run_id in self._items.pop(oldest, [oldest]):
                del self._runs[run_id]
            self._batches.pop(oldest, None)


class _Waiter:
    """What those who wait for a run hold on to."""

    def __init__(self, run: Run) -> None:
        self.event = anyio.Event()
        self.run = run


class _MemoryJournal:
    """``Journal`` in the run's own record."""

    def __init__(self, runs: dict[str, Run], run_id: str) -> None:
        self._runs = runs
        self._run_id = run_id

    async def load(self) -> Sequence[Step]:
        return self._runs[self._run_id].steps

    async def save(self, step: Step) -> None:
        run = self._runs[self._run_id]
        self._runs[self._run_id] = replace(run, steps=(*run.steps, step))


def _sayable(text: object) -> str | None:
    """A text that can be kept and sent: agents may put anything into their errors, lone surrogates too."""
    return None if text is None else str(text).encode("utf-8", "replace").decode()


async def _absorb_cancellation() -> None:
    """Take in a cancellation that an agent asked for its own task and has not met: it would hit what comes next."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # another event loop than asyncio's has no such thing
        return
    while task is not None and task.cancelling() and anyio.current_effective_deadline() != -math.inf:
        try:
            await anyio.lowlevel.checkpoint()
        except asyncio.CancelledError:
            if anyio.current_effective_deadline() == -math.inf:
                raise
        task.uncancel()


async def _check_items(agent: Agent, items: Sequence[msgspec.Raw]) -> None:
    """Raise InvalidData with up to ``MAX_ITEM_ERRORS`` errors of all items, or if there is no item."""
    errors: list[FieldError] = []
    if not items:
        errors.append(FieldError(detail="A batch has at least one item.", pointer="/batch_inputs"))
    for position, item in enumerate(items):
        if position % 1000 == 999:
            await anyio.lowlevel.checkpoint()  # others have their turn
        try:
            agent.input.decode(item, f"/batch_inputs/{position}")
        except InvalidData as exc:
            errors += exc.errors
        if len(errors) >= MAX_ITEM_ERRORS:
            break
    if errors:
        raise InvalidData(errors[:MAX_ITEM_ERRORS])

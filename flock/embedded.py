"""The engine inside this process: each run is a task of one anyio task group that lives as long as the engine.

What is accepted lies in a store, and so does every step. Several engines may share one store: each works on the runs
that it owns, and a watch looks 20 times a second whether anything was committed elsewhere.
"""

import contextlib
import functools
import logging
import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any, Literal, Self

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents import Agent
from flock.errors import (
    AgentNotFound,
    BatchNotFound,
    Conflict,
    DefinitionError,
    EngineFull,
    EngineStopped,
    FieldError,
    InvalidData,
    OwnershipLost,
    RunNotFound,
    StoreError,
    TooLarge,
)
from flock.llm import ModelClient
from flock.runner import Runner, current_task
from flock.runs import (
    Batch,
    BatchOptions,
    EngineHealth,
    Event,
    IdempotencyKey,
    Inputs,
    Observer,
    Progress,
    Queue,
    Run,
    RunFilter,
    RunStatus,
    events_of,
    make_ids_after,
    new_id,
    now,
    valid_traceparent,
)
from flock.store import RETRY_AFTER_S, Store

__all__ = ["EmbeddedEngine"]

logger = logging.getLogger("flock.runs")

#: How many errors of a batch's items are told at once.
MAX_ITEM_ERRORS = 100
#: How often the store is asked for what others did, in seconds.
WATCH_INTERVAL_S = 0.05
#: After this time all others have seen what was committed, in seconds, if they are not busy.
SEEN_BY_ALL_S = 4 * WATCH_INTERVAL_S
#: How often other engines are looked after, in seconds.
TAKE_OVER_INTERVAL_S = 1.0
#: How often old runs are deleted, in seconds, and how many in one transaction.
RETENTION_INTERVAL_S = 10.0
RETENTION_BITE = 500
#: The longest time that an option may name, in seconds: about 30 years.
MAX_SECONDS = 1e9
#: How long an event stream may be silent, in seconds.
KEEP_ALIVE_S = 15.0
#: How many items of a batch are read at once.
ITEMS_A_PAGE = 200
#: How long an idempotency key is kept.
KEEP_KEYS_FOR = timedelta(hours=24)
#: How long the last write of a run may take when the engine is leaving, in seconds.
FINAL_WRITE_TIMEOUT_S = 5.0


class EmbeddedEngine:
    """``Engine`` on anyio task groups over a ``Store``.

    Args:
        agents: by name; read at each submission, so agents added later are found.
        models: what model agents call; the engine closes it.
        store: where runs are kept; the engine opens and closes it.
        flock: the name under which runs are kept; an engine takes up only those of its own.
        max_concurrency: steps at work at the same time, in this process.
        max_queue: runs accepted and waiting, in all processes on the store.
        max_items: items of all unfinished batches together.
        max_threads: synchronous functions at work at the same time.
        max_steps: how often one run may be handed on.
        max_timeout_s: the longest that one attempt of a run may take, and what it may take where nobody says less.
        max_input_bytes: the longest inputs of one run, as JSON.
        max_result_bytes: the longest result of one step, as JSON; a longer one fails its run.
        queue_timeout_s: the longest that a run may wait for its first step; None is no limit.
        keep_for_s, keep_runs: final runs that are older, or beyond the newest so many, are deleted; None keeps them. A
            batch counts as one.
        expose_errors: put the text of any exception into a run's ``error``; for development.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        models: ModelClient,
        store: Store,
        *,
        flock: str = "flock",
        max_concurrency: int = 100,
        max_queue: int = 10_000,
        max_items: int = 10_000,
        max_threads: int = 40,
        max_steps: int = 32,
        max_timeout_s: float = 86_400,
        max_input_bytes: int = 16 * 1024 * 1024,
        max_result_bytes: int = 16 * 1024 * 1024,
        queue_timeout_s: float | None = None,
        keep_for_s: float | None = None,
        keep_runs: int | None = None,
        expose_errors: bool = False,
    ) -> None:
        times = {"max_timeout_s": max_timeout_s, "queue_timeout_s": queue_timeout_s, "keep_for_s": keep_for_s}
        for name, value in times.items():
            if value is not None and not 0 <= value <= MAX_SECONDS:
                raise DefinitionError(f"{name} is a number of seconds from 0 to {MAX_SECONDS:g}, not {value}.")
        self.store = store
        self._agents = agents
        self._models = models
        models.on_retry = lambda: self._runner.tell_observers("model_call_retried")
        self._flock = flock
        self._observers: list[Observer] = []
        self._max_concurrency = max_concurrency
        self._max_queue = max_queue
        self._max_items = max_items
        self._max_input_bytes = max_input_bytes
        self._keep_for_s = keep_for_s
        self._keep_runs = keep_runs
        self._make_runner = functools.partial(
            Runner,
            agents,
            models,
            store,
            self._observers,
            max_concurrency=max_concurrency,
            max_threads=max_threads,
            max_steps=max_steps,
            max_timeout_s=max_timeout_s,
            max_result_bytes=max_result_bytes,
            queue_timeout_s=queue_timeout_s,
            expose_errors=expose_errors,
        )
        self._runner = self._make_runner()
        self._engine_id = ""
        self._accepting: set[str] = set()
        self._store_changed = anyio.Event()
        #: runs of others that somebody waits for
        self._awaited: dict[str, anyio.Event] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    @property
    def is_leaving(self) -> bool:
        return self._runner.is_leaving

    # Life

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            raise EngineStopped("This engine is running already.")
        self._engine_id = new_id()
        self._runner = self._make_runner()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.store)
            await stack.enter_async_context(self._models)
            with self._entering():
                await self.store.enter(self._engine_id, self._flock)
                if (newest := self.store.last_id()) is not None:
                    with contextlib.suppress(ValueError):  # of a damaged file; what reads it says so
                        make_ids_after(newest)
            self._exit = stack.pop_all()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            with self._entering():
                await self._take_over()
        except BaseException:
            await self.__aexit__()
            raise
        self._tasks.start_soon(self._watch)
        self._tasks.start_soon(self._retain)
        return self

    @contextlib.contextmanager
    def _entering(self) -> Iterator[None]:
        try:
            yield
        except StoreError as exc:
            raise StoreError(
                f"The store {self.store.path!r} cannot be used: {exc.__cause__ or exc}. Make room on its disk if that "
                "is full; otherwise restore it, or name another file (store=, --store)."
            ) from exc

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop what is at work; asynchronous runs go on at the next start, the others end as interrupted."""
        tasks, self._tasks = self._tasks, None
        assert tasks is not None
        self._runner.is_leaving = True
        tasks.cancel_scope.cancel()
        self._runner.stop()
        try:
            await tasks.__aexit__(None, None, None)
        finally:  # also when the host is being cancelled
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as leaving:  # together: they share one time-out
                    for active in list(self._runner.active.values()):
                        leaving.start_soon(self._runner.leave, active)
                with anyio.move_on_after(FINAL_WRITE_TIMEOUT_S), contextlib.suppress(StoreError):
                    await self.store.leave(self._engine_id)
            await self._exit.aclose()

    async def drain(self, timeout_s: float) -> None:
        self._runner.is_leaving = True
        self._tell_store_changed()
        while self._awaited:
            self._awaited.popitem()[1].set()
        for active in self._runner.active.values():
            active.tell(active.run)  # event streams end
        for seconds in (timeout_s, FINAL_WRITE_TIMEOUT_S):
            with anyio.move_on_after(seconds):
                while self._runner.active:
                    await next(iter(self._runner.active.values())).change.wait()
            self._runner.stop()

    def _check_running(self) -> None:
        if self._tasks is None:
            raise EngineStopped("The engine is not running: enter it with 'async with', or run the app's lifespan.")
        if self.is_leaving:
            raise EngineStopped("The server is about to stop and takes no new work.")

    def check_ready(self) -> None:
        self._check_running()
        self.store.check_writable()
        self.store.queue(self._flock)  # it can be read

    def health(self) -> EngineHealth:
        state: Literal["running", "stopping"] = "stopping" if self.is_leaving else "running"
        return EngineHealth("stopped" if self._tasks is None else state, "ok" if self.store.is_writable else "failing")

    def observe(self, observer: Observer) -> None:
        self._observers.append(observer)

    async def queue(self) -> Queue:
        return self.store.queue(self._flock)

    # Runs

    async def submit(
        self,
        agent_name: str,
        inputs: Inputs,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        is_async: bool = True,
        timeout_s: float | None = None,
        key: IdempotencyKey | None = None,
    ) -> Run:
        self._check_running()
        raw = self._as_json(inputs, "/inputs")
        self._agent(agent_name).input.decode(raw, "/inputs")
        origin = {"request_id": request_id, "traceparent": valid_traceparent(traceparent), "principal": principal}
        run = self._new_run(agent_name, raw, **origin, is_async=is_async, timeout_s=timeout_s)
        if not is_async and key is None:
            # Its end is written and waited for; its start is worth nothing without a caller.
            if len(self._runner.active) >= self._max_concurrency + self._max_queue:
                raise EngineFull(
                    f"{len(self._runner.active)} runs are waiting already, all that this server takes (max_queue)."
                )
            self.store.save_nowait(run, is_new=True)
            self._start(run)
        else:
            with self._accepting_key(key):
                await self.store.accept(run, self._max_queue, key, then=self._start)
        return run

    async def get_run(self, run_id: str) -> Run:
        if run_id in self._runner.active:
            return self._runner.active[run_id].run
        run = self.store.get_run(run_id)
        if run is None or run.flock != self._flock:
            raise RunNotFound(run_id)
        return run

    async def wait(self, run_id: str, timeout_s: float | None = None) -> Run:
        deadline = math.inf if timeout_s is None else anyio.current_time() + timeout_s
        active = self._runner.active.get(run_id)
        while active is not None and not active.is_lost:
            if active.run.status.is_final:
                return active.run
            if active.store_error is not None:
                raise active.store_error
            if active.is_left:
                raise EngineStopped("The server stopped before this run ended; it goes on at the next start.")
            if timeout_s is not None and anyio.current_time() >= deadline:
                return active.run
            active.wake_at = min(active.wake_at, deadline)  # the watch sees to it: a timer for each takes longer
            await active.end.wait()
        with anyio.CancelScope(deadline=deadline):
            while not (run := await self.get_run(run_id)).status.is_final:
                if self.is_leaving:
                    raise EngineStopped("The server is about to stop. Ask another one, or this one when it is back.")
                await self._awaited.setdefault(run_id, anyio.Event()).wait()
            return run
        return await self.get_run(run_id)

    async def cancel_run(self, run_id: str) -> Run:
        active = self._runner.active.get(run_id)
        if active is None:
            run = await self.get_run(run_id)
            if not run.status.is_final and await self.store.request_cancel(run_id):
                if run.owner == self._engine_id and run_id not in self._runner.active:
                    self._runner.cancelled_before.add(run_id)
                return await self.get_run(run_id)
            run = await self.get_run(run_id)
            if run.status is not RunStatus.CANCELLED:
                raise Conflict(f"The run {run_id} is {run.status} and cannot be cancelled any more.")
            return run
        self._runner.cancel(active)
        if active.run.is_async:
            await self.store.request_cancel(run_id)  # whoever goes on with it after a crash knows
        return active.run

    async def retry_run(self, run_id: str) -> Run:
        self._check_running()
        run = await self.get_run(run_id)
        self._runner.cancelled_before.discard(run_id)
        reopened = None
        if run.batch_id is None and run.status in (RunStatus.FAILED, RunStatus.CANCELLED):
            reopened = await self.store.reopen(run_id, self._flock, self._engine_id, self._max_queue, then=self._start)
        if reopened is None:
            what = "an item of a batch" if run.batch_id else (await self.get_run(run_id)).status
            raise Conflict(f"The run {run_id} is {what}; only a run that failed or was cancelled can be tried again.")
        return reopened

    async def delete_run(self, run_id: str) -> None:
        run = await self.get_run(run_id)
        if run.completed_at is not None and self.store.is_shared:
            # Those who follow it elsewhere have not heard of its end yet.
            await anyio.sleep(max(0, min(SEEN_BY_ALL_S, SEEN_BY_ALL_S - (now() - run.completed_at).total_seconds())))
        if run.batch_id is not None or not await self.store.delete_run(run_id):
            what = "an item of a batch" if run.batch_id else f"still {(await self.get_run(run_id)).status}"
            raise Conflict(f"The run {run_id} is {what} and cannot be deleted. Cancel it first, or wait for its end.")

    async def list_runs(self, wanted: RunFilter) -> Sequence[Run]:
        return self.store.list_runs(self._flock, wanted)

    async def events(self, run_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        told: Progress | None = None
        while True:
            active = self._runner.active.get(run_id)
            changed = active.change if active else self._store_changed
            run = active.run if active else await self.get_run(run_id)
            for event in events_of(run):
                if event.id is None:
                    if run.progress != told:
                        told = run.progress
                        yield event
                elif event.id > after:
                    after = event.id
                    yield event
            if run.status.is_final or self.is_leaving:
                return
            if changed.is_set():
                continue
            with anyio.move_on_after(KEEP_ALIVE_S) as silence:
                await changed.wait()
            if silence.cancelled_caught:
                yield None

    def _agent(self, name: str) -> Agent:
        try:
            return self._agents[name]
        except KeyError:
            raise AgentNotFound(name, list(self._agents)) from None

    def _as_json(self, inputs: Inputs, at: str) -> msgspec.Raw:
        """A copy, so that no request's body is kept, of which a Raw is only a view. Raises InvalidData, TooLarge."""
        try:
            raw = bytes(inputs) if isinstance(inputs, msgspec.Raw) else msgspec.json.encode(dict(inputs))
        except (TypeError, ValueError, RecursionError) as exc:
            raise InvalidData([FieldError(detail=f"It cannot be JSON: {exc}.", pointer=at)]) from exc
        if len(raw) > self._max_input_bytes:
            raise TooLarge(f"{at} is longer than {self._max_input_bytes} bytes, all that one run takes.")
        return msgspec.Raw(raw)

    def _new_run(self, agent_name: str, inputs: msgspec.Raw, **more: Any) -> Run:
        return Run(
            run_id=new_id(),
            flock=self._flock,
            agent_name=agent_name,
            inputs=inputs,
            created_at=now(),
            owner=self._engine_id,
            **more,
        )

    def _start(self, run: Run | None) -> None:
        """What is accepted while the engine goes is for the next start."""
        if run is not None and self._tasks is not None and not self.is_leaving:
            self._runner.start(self._tasks, run)

    @contextlib.contextmanager
    def _accepting_key(self, key: IdempotencyKey | None) -> Iterator[None]:
        """Only one request with a key at a time; a later one is a replay."""
        if key is None:
            yield
            return
        if key.kept_as in self._accepting:
            raise Conflict(f"A request with the idempotency key {key.key!r} is being accepted at this moment.")
        self._accepting.add(key.kept_as)
        try:
            yield
        finally:
            self._accepting.discard(key.kept_as)

    # What goes on beside the runs

    async def _watch(self) -> None:
        """Look for what others did, and for others that are gone; 20 times a second, at a cost of microseconds."""
        self._runner.companion = current_task()
        version, look_after_others_at = -1, anyio.current_time() + TAKE_OVER_INTERVAL_S
        while True:
            await anyio.sleep(WATCH_INTERVAL_S)
            at = anyio.current_time()
            for active in list(self._runner.active.values()):
                if active.progress is not active.run.progress:
                    active.tell(replace(active.run, progress=active.progress))
                    self.store.save_nowait(active.run)
                if at >= active.wake_at:
                    active.wake_at = math.inf
                    active.wake()
            self.store.flush_nowait()
            try:
                seen = self.store.data_version() if self.store.is_shared else version - 1
                if seen != version:
                    version = seen
                    self._tell_store_changed()
                    for run_id in self.store.cancels_for(self._engine_id):
                        if run_id in self._runner.active:
                            self._runner.cancel(self._runner.active[run_id])
                        else:
                            self._runner.cancelled_before.add(run_id)
                    for run_id in self.store.ended(self._awaited) if self._awaited else ():
                        self._awaited.pop(run_id).set()
                if self.store.is_shared and at >= look_after_others_at:
                    look_after_others_at = at + TAKE_OVER_INTERVAL_S
                    if not await self.store.remain(self._engine_id, self._flock):
                        logger.warning("another engine has taken over what this one had; it goes on with new work")
                    await self._take_over()
            except StoreError as exc:
                logger.error("the store cannot be watched: %s", exc)
            except Exception:  # whatever it is, such as no file handle left: the runs go on, and so does the watch
                logger.exception("the store cannot be watched")

    def _tell_store_changed(self) -> None:
        changed, self._store_changed = self._store_changed, anyio.Event()
        changed.set()

    async def _take_over(self) -> None:
        """Go on with what engines left whose process is gone."""
        for dead_id in self.store.dead_engines(self._flock, self._engine_id) if self.store.is_shared else ():
            runs, batches = await self.store.take_over(dead_id, self._engine_id, now())
            ended = [run for run in runs if run.status.is_final]
            runs = [run for run in runs if not run.status.is_final]
            if ended or runs or batches:
                template = "going on with %d runs and %d batches of an engine that is gone; %d runs ended with it"
                logger.info(template, len(runs), len(batches), len(ended))
            for run in ended:
                self._runner.tell_observers("run_ended", run)
            for run in runs:
                self._start(run)
            for batch in batches:
                self._start_batch(batch)

    async def _retain(self) -> None:
        """Delete what is too old, in small bites."""
        while True:
            await anyio.sleep(RETENTION_INTERVAL_S)
            try:
                await self.store.forget_keys(now() - KEEP_KEYS_FOR)
                await self.delete_old()
            except StoreError:
                pass  # the store has said so
            except Exception:
                logger.exception("old runs cannot be deleted")

    async def delete_old(self) -> None:
        """Delete final runs that are older than ``keep_for_s`` or beyond the newest ``keep_runs``."""
        before = None if self._keep_for_s is None else now() - timedelta(seconds=self._keep_for_s)
        if before is None and self._keep_runs is None:
            return
        while await self.store.delete_old(self._flock, before, self._keep_runs, RETENTION_BITE):
            await anyio.lowlevel.checkpoint()

    # Batches

    async def submit_batch(
        self,
        agent_name: str,
        items: Sequence[Inputs],
        options: BatchOptions,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: str | None = None,
        key: IdempotencyKey | None = None,
    ) -> Batch:
        self._check_running()
        if len(items) > self._max_items:
            detail = f"{len(items)} items are more than this server takes in a batch ({self._max_items}, max_items)."
            raise InvalidData([FieldError(detail=detail, pointer="/batch_inputs")])
        rows = [self._as_json(item, f"/batch_inputs/{position}") for position, item in enumerate(items)]
        await _check_items(self._agent(agent_name), rows)
        self._check_running()
        batch = Batch(
            batch_id=new_id(),
            flock=self._flock,
            agent_name=agent_name,
            options=options,
            total_items=len(rows),
            created_at=now(),
            request_id=request_id,
            principal=principal,
            owner=self._engine_id,
        )
        origin = {"request_id": request_id, "traceparent": valid_traceparent(traceparent), "principal": principal}
        runs = [
            self._new_run(agent_name, row, **origin, batch_id=batch.batch_id, position=position, is_async=True)
            for position, row in enumerate(rows)
        ]
        with self._accepting_key(key):
            await self.store.accept_batch(batch, runs, self._max_items, key, then=self._start_batch)
        return batch

    def _start_batch(self, batch: Batch) -> None:
        if self._tasks is not None and not self.is_leaving:
            self._tasks.start_soon(self._batch_task, batch)

    async def get_batch(self, batch_id: str) -> Batch:
        batch = self.store.get_batch(batch_id)
        if batch is None or batch.flock != self._flock:
            raise BatchNotFound(batch_id)
        return batch

    async def get_items(self, batch_id: str, *, after: int = -1, limit: int = 1000) -> Sequence[Run]:
        await self.get_batch(batch_id)
        return self.store.get_items(batch_id, after, limit)

    async def _batch_task(self, batch: Batch) -> None:
        """Work on a batch until no item is left, beginning again as long as the store fails."""
        batch = replace(batch, status=RunStatus.RUNNING, started_at=batch.started_at or now())
        workers = min(batch.options.max_workers, batch.total_items) if batch.options.parallel else 1
        while not self.is_leaving:
            try:
                await self.store.update_batch(batch)
                items = self._unfinished_items(batch.batch_id)
                async with anyio.create_task_group() as tasks:
                    for _ in range(workers):
                        tasks.start_soon(self._work_through, items)
                if not self.is_leaving and not self.store.unfinished_items(batch.batch_id, -1, 1):
                    await self._end_batch(batch)
                    return
            except OwnershipLost:
                logger.warning("batch %s: another engine has taken it over", batch.batch_id)
                return
            except StoreError as exc:
                logger.error("batch %s: %s", batch.batch_id, exc)
            await anyio.sleep(RETRY_AFTER_S)

    def _unfinished_items(self, batch_id: str) -> Iterator[Run]:
        """Items that are still to be done, read from the store in pages."""
        after = -1
        while page := self.store.unfinished_items(batch_id, after, ITEMS_A_PAGE):
            yield from page
            after = page[-1].position or 0

    async def _work_through(self, items: Iterator[Run]) -> None:
        try:
            for item in items:  # shared with the batch's other workers
                if self.is_leaving:
                    return
                await self._runner.carry_out(item)
        except StoreError as exc:  # the next page cannot be read
            logger.error("items cannot be read: %s", exc)

    async def _end_batch(self, batch: Batch) -> None:
        counted = await self.get_batch(batch.batch_id)
        error = None
        if counted.failed_items + counted.cancelled_items == counted.total_items:
            first = self.store.get_items(batch.batch_id, -1, 1)[0]
            error = f"None of the {batch.total_items} items completed. The first one: {first.error}"
        status = RunStatus.COMPLETED if error is None else RunStatus.FAILED
        await self.store.update_batch(replace(batch, status=status, error=error, completed_at=now()))


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

"""Batches of the embedded engine: accepted row by row, processed in pages, and never held in memory as a whole.

A batch is accepted in the transaction that writes its last page, or not at all. After that, its rows in the store are
the only state: an engine that resumes an interrupted batch reads from them which items are left.
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import anyio
from msgspec.structs import replace

from flock.agents.agent import Agent
from flock.engine.intake import ITEMS_PER_PAGE, Intake
from flock.engine.jobs import Jobs
from flock.engine.runner import Runner
from flock.errors import ModelError, OwnershipLost, StoreError
from flock.fair import FairShare
from flock.models.prices import Budget, DayBudget
from flock.runs import Batch, IdempotencyKey, Run, RunStatus, now
from flock.runs.text import of_request
from flock.scopes import start_in_empty_context
from flock.steps.failures import alike_of, failures_of, lasting_of, sample_of
from flock.steps.outcomes import COST_LIMIT, DAY_LIMIT, NOT_CHOSEN, TOO_MANY_FAILURES, Outcome
from flock.steps.refusals import not_accepting
from flock.store.port import RETRY_AFTER_S, BatchStore

logger = logging.getLogger("flock.runs")

#: One worker runs an item while another writes its result. More workers would only hold items that wait for a slot.
WORKERS_PER_SLOT = 2


@dataclass(eq=False)
class Batches:
    """The batches that one engine accepts and processes.

    Args:
        start_task: calls a function with a batch in a new task of the engine, unless the engine is shutting down.
        next_change: returns a function that waits for the next change in the store.
        recipe_and_version: returns the recipe and the version that an agent has now; see ``Batch``.
    """

    store: BatchStore
    runner: Runner
    start_task: Callable[[Callable[[Batch], Coroutine[Any, Any, None]], Batch], object]
    next_change: Callable[[], Callable[[], Awaitable[object]]]
    recipe_and_version: Callable[[str], tuple[str | None, str]]

    def __post_init__(self) -> None:
        #: batches that are being processed here and were cancelled
        self.cancelled: set[str] = set()

    async def submit(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        """Accept a batch; see ``Engine.submit_batch``.

        Cancellation: staged items are dropped.
        """
        batch, is_staged, max_open_items = intake.batch, False, self.runner.limits.max_open_items

        async def stage(page: Sequence[Run]) -> None:
            nonlocal is_staged
            if self.runner.is_draining:  # a slow client must not delay the shutdown
                raise not_accepting(" Upload the whole batch again.")
            is_first, is_staged = not is_staged, True
            await self.store.stage(batch, page, max_open_items, key, is_first=is_first)

        try:
            whole = await intake.read(stage)
            await self.store.accept(whole, intake.page, max_open_items, key, then=self.start, is_staged=is_staged)
            return whole
        except BaseException:
            if is_staged:
                with anyio.CancelScope(shield=True):
                    try:
                        await self.store.drop_staged(batch.batch_id)
                    except StoreError:  # such as a full disk; dropping the staged items frees space on it
                        self.start_task(self._drop, batch)
            raise

    async def _drop(self, batch: Batch) -> None:
        """Drop the staged items of a batch. Retry while the store fails."""
        while not self.runner.is_draining:
            await anyio.sleep(RETRY_AFTER_S)
            with contextlib.suppress(StoreError):
                await self.store.drop_staged(batch.batch_id)
                return

    def start(self, batch: Batch | None) -> None:
        """Start an attempt of a batch that was just accepted; None if it was not."""
        if batch is not None:
            self.runner.executor.notify("batch_accepted", batch)
            self.resume(batch)

    def resume(self, batch: Batch) -> None:
        """Process the items of a batch that are left."""
        self.cancelled.discard(batch.batch_id)  # the cancellation may be of an earlier attempt
        self.start_task(self._run, batch)

    def cancel(self, batch_id: str) -> None:
        """Cancel a batch that is being processed here: stop its active items and start no others."""
        self.cancelled.add(batch_id)
        for active in list(self.runner.active.values()):
            if active.run.batch_id == batch_id:
                active.cancel()

    async def _run(self, batch: Batch) -> None:
        """Process a batch until no item is left. Retry while the store fails."""
        if batch.cancel_requested:
            self.cancelled.add(batch.batch_id)
        try:
            while not self.runner.is_draining and not batch.status.is_final:
                try:
                    batch = await self._process(batch)
                except OwnershipLost:
                    raise
                except StoreError as exc:
                    logger.error("batch %s: %s", batch.batch_id, exc)
                    await anyio.sleep(RETRY_AFTER_S)
                except Exception:  # it must not stop the engine and its other work
                    logger.exception("batch %s: unexpected error, will be retried", batch.batch_id)
                    await anyio.sleep(RETRY_AFTER_S)
        except OwnershipLost:
            logger.warning("batch %s: it was taken over by another engine, or deleted", batch.batch_id)
        finally:
            self.cancelled.discard(batch.batch_id)

    async def _process(self, batch: Batch) -> Batch:
        """Run the items that are left, and end the batch if it is done. Raises OwnershipLost, StoreError."""
        id_ = batch.batch_id
        while batch.reopening and id_ not in self.cancelled:
            batch = await self.store.reopen_some(batch)
        recipe, version = self.recipe_and_version(batch.agent_name)
        while id_ not in self.cancelled and batch.recipe is not None and batch.recipe != recipe:
            batch = await self.store.drop_digests(batch)
        if batch.options.reuse:
            await self._take_results(batch)
        batch = await self.store.begin(batch, now(), version)
        if batch.is_mixed:
            logger.warning("batch %s is mixed: %s", id_, mixed_versions(batch))
        failures = Failures(batch, self.runner.executor.find(batch.agent_name))
        budget = self.runner.executor.budget(batch.options.max_cost, batch.usage, "batch")
        day_budget = self.runner.day_budget_of(batch)
        if day_budget is not None:
            await day_budget.refresh()
        work = _Work(batch, self, failures, budget, day_budget)
        if id_ not in self.cancelled:
            workers = min(
                batch.options.max_workers, batch.total_items, WORKERS_PER_SLOT * self.runner.limits.max_concurrency
            )
            await work.run(workers if batch.options.parallel else 1)
        if id_ in self.cancelled and not self.runner.is_draining:
            await work.jobs.cancel()
        while id_ in self.cancelled and await self.store.cancel_waiting(batch, now()):
            pass
        if batch.options.dedupe and not self.runner.is_draining:
            await self._take_results(batch, is_own=True)
        if failures.reason is not None and not self.runner.is_draining:
            await self.store.cancel_failed(batch, failures.alike)
            while await self.store.cancel_waiting(batch, now(), failures.reason):
                pass
        for limit, outcome in ((budget, COST_LIMIT), (day_budget, DAY_LIMIT)):
            while limit is not None and limit.is_spent and await self.store.cancel_waiting(batch, now(), outcome):
                pass
        is_partial = batch.options.limit is not None or batch.options.sample is not None
        while is_partial and not self.runner.is_draining and await self.store.cancel_waiting(batch, now(), NOT_CHOSEN):
            pass
        if self.runner.is_draining:
            return batch
        if await self.store.pending_items(batch, -1, 1):
            # The first of equal items cannot be read, so the others are executed.
            return await self.store.drop_digests(batch) if batch.options.dedupe else batch
        for item_id, reason in await self.store.fail_unreadable(batch, now()):
            logger.error("batch %s: item %s cannot be read and was marked as failed: %s", id_, item_id, reason)
        is_day_spent, is_spent = (limit is not None and limit.is_spent for limit in (day_budget, budget))
        batch = await self.store.end(batch, now(), is_day_spent=is_day_spent, is_spent=is_spent)
        if not batch.status.is_final:
            return batch
        self.runner.executor.notify("batch_ended", batch)
        counts = (batch.total_items, batch.failed_items, batch.cancelled_items)
        template, source = "batch %s: %s, agent %s, %d items, %d failed, %d cancelled%s", of_request(batch.request_id)
        logger.info(template, batch.batch_id, batch.status, batch.agent_name, *counts, source)
        return batch

    async def _take_results(self, batch: Batch, *, is_own: bool = False) -> None:
        after: int | None = -1
        while after is not None and batch.batch_id not in self.cancelled and not self.runner.is_draining:
            after = await self.store.take_results(batch, after, now(), is_own=is_own)


def mixed_versions(batch: Batch) -> str:
    count = len(set(batch.versions))
    return f"Its results are of {count} versions of the agent {batch.agent_name!r}; see the column 'version'."


class Failures:
    """Ends a batch early: if all its items would fail, or too many have failed.

    Attributes:
        reason: how the items end that are left; None while the batch goes on.
        alike: the items that have failed in a row with an error that all would have.
    """

    def __init__(self, batch: Batch, agent: Agent | None) -> None:
        self.reason: Outcome | None = None
        self.alike: list[str] = []
        self._agent, self._max_alike, self._left = agent, alike_of(batch.options), failures_of(batch)
        if batch.attempt == 1:
            self._left -= batch.failed_items - batch.invalid_items

    def note(self, item: Run, outcome: Outcome | None, exc: BaseException | None) -> Outcome | None:
        """Count the outcome of an item, None if it has completed, and return what to store."""
        lasting = lasting_of(item, self._agent, exc)
        is_of_model = outcome is not None and outcome.error_type in ModelError.ERROR_TYPES
        if not is_of_model and self.reason is None:
            self.alike.clear()
        if outcome is None or outcome.status is not RunStatus.FAILED:
            return outcome
        if lasting is not False:
            if self.reason is None:
                self.alike.append(item.run_id)
                if lasting or len(self.alike) >= self._max_alike:
                    self.reason = replace(outcome, status=RunStatus.CANCELLED)
            if self.reason is not None:
                return replace(outcome, status=RunStatus.CANCELLED)
        self._left -= 1
        if self._left < 0 and self.reason is None:
            self.reason = TOO_MANY_FAILURES
            self.alike.clear()
        return outcome


class _Work:
    """Runs the items of one batch that are left, as far as *failures*, its *budget* and that of its principal allow."""

    def __init__(
        self, batch: Batch, batches: Batches, failures: Failures, budget: Budget | None, day_budget: DayBudget | None
    ) -> None:
        self._batch = batch
        self._batches = batches
        self._failures = failures
        self._store, self._runner = batches.store, batches.runner
        self._budget, self._day_budget = budget, day_budget
        self._tasks = anyio.create_task_group()
        self._workers = self._idle_workers = 0
        self.jobs = Jobs(batch, batches.runner.store.jobs, batches.runner, budget)
        self._page, self._pages = deque[Run](), self._pending_pages()
        self._reading = anyio.Lock(fast_acquire=True)
        #: the position of the last pending item that was taken
        self._position = -1
        #: items that are taken before the others: suspects, and those that got an answer and continue, by id
        self._first: dict[str, Run] = {}
        self._is_watching = False
        #: the items that may start: those before a position, and those of a random sample
        options, total = batch.options, batch.total_items
        self._end = total if options.limit is None else options.limit
        self._sample = sample_of(batch)
        #: the digests of the items of the sample that have been taken
        self._digests = set[str | None]()

    async def run(self, workers: int) -> None:
        """Use up to *workers* workers, until no item is pending, running or waiting for an answer."""
        self._workers = self._idle_workers = workers
        pages = self._pending_pages(are_suspects=True)
        self._first = {item.run_id: item async for page in pages for item in page}
        await self.jobs.hold()
        try:
            async with self._tasks:
                for _ in self._first or [None]:  # suspects wait for each other, so each needs a worker
                    self._start_worker()
                if self._batch.waiting_items or await self.jobs.store.open(self._batch):
                    self._watch()
        finally:
            await self._pages.aclose()  # it refers to this object

    def _start_worker(self) -> None:
        """Start the next worker. Called when the item of a worker has a slot, so that only one worker waits."""
        if self._idle_workers:
            self._idle_workers -= 1
            start_in_empty_context(self._tasks, self._run_items)

    async def _run_items(self) -> None:
        try:
            while (work := await self._next_work()) is not None:
                await work
                if copy_context():  # the agent has set a context variable, which must not reach the next item
                    start_in_empty_context(self._tasks, self._run_items)
                    return
        except StoreError as exc:  # the next page cannot be read
            logger.error("pending items cannot be read: %s", exc)
        self._idle_workers += 1

    @property
    def is_over(self) -> bool:
        return self._runner.is_draining or self._batch.batch_id in self._batches.cancelled

    @property
    def is_stopped(self) -> bool:
        """Whether no more items may start."""
        if self.is_over or self._failures.reason is not None:
            return True
        return any([budget.is_spent for budget in (self._budget, self._day_budget) if budget is not None])

    @property
    def _may_continue(self) -> bool:
        """Whether items may continue that got an answer. It may be the reply of a model, which is paid."""
        return not self.is_stopped or (self.jobs.has_open and not self.is_over)

    async def is_idle(self) -> bool:
        """Whether no item runs or can start now."""
        if self._idle_workers < self._workers or self._first:
            return False
        is_answered = bool(await self._answered())
        if is_answered:
            self._watch()  # it has ended if they could not be read
        return not is_answered

    async def _answered(self) -> Sequence[Run]:
        """Return items that got an answer and have not continued."""
        before = self._position + 1
        return await self._store.pending_items(self._batch, -1, ITEMS_PER_PAGE, before, have_worked=True)

    async def _next_work(self) -> Coroutine[Any, Any, None] | None:
        """Return what executes the next item, or None if none can start now."""
        item = await self._next_item()
        if item is None:
            return None
        return self._runner.execute(item, self._start_worker, self._watch, self._failures.note, self._budget)

    async def _next_item(self) -> Run | None:
        share = FairShare()
        while True:
            if self._first and self._may_continue:
                return self._first.pop(next(iter(self._first)))
            if self.is_stopped:
                return None
            while self._page and not self.is_stopped:
                item = self._page.popleft()
                self._position = item.position or 0
                if self._position >= self._end:
                    return None
                is_chosen = self._sample is None or self._position in self._sample
                if is_chosen and (not self._batch.options.dedupe or await self._is_first(item)) and not item.is_suspect:
                    return item
                await share.checkpoint()
            async with self._reading:
                if not self._page:
                    page = await anext(self._pages, None)
                    if page is None:
                        self._position = self._batch.total_items  # what is pending from now on got an answer
                        return None
                    self._page.extend(page)

    async def _is_first(self, item: Run) -> bool:
        """Whether it is the first of equal items. With a sample, only its items count."""
        if self._sample is None:
            return not await self._store.has_equal_before(item)
        is_first = item.digest is None or item.digest not in self._digests
        self._digests.add(item.digest)
        return is_first

    async def _pending_pages(self, *, are_suspects: bool = False) -> AsyncGenerator[list[Run], None]:
        """Yield pages of pending items, or only of the suspects among them."""
        after = -1
        while page := await self._store.pending_items(self._batch, after, ITEMS_PER_PAGE, are_suspects=are_suspects):
            yield page
            after = page[-1].position or 0

    def _watch(self) -> None:
        """Called when an item begins to wait for an answer."""
        if not self._is_watching:
            self._is_watching = True
            start_in_empty_context(self._tasks, self._watch_answers)
        if not self.jobs.is_running:
            self.jobs.is_running = True
            start_in_empty_context(self._tasks, self.jobs.run, self)

    async def _watch_answers(self) -> None:
        """Let items continue that got an answer, until none waits for one."""
        try:
            while self._may_continue:
                changed, batch = self._batches.next_change(), await self._store.get(self._batch.batch_id)
                answered = await self._answered()
                for item in answered:
                    if item.run_id not in self._runner.active:
                        self._first[item.run_id] = item
                        self._start_worker()
                if not answered and (batch is None or not batch.waiting_items):
                    return
                # The end of a job is no change of the store.
                with anyio.move_on_after(RETRY_AFTER_S if answered or self.jobs.has_run else math.inf):
                    await changed()
        except StoreError as exc:
            logger.error("items that wait for answers cannot be read: %s", exc)
        finally:
            self._is_watching = False

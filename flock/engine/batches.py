"""Batches of the embedded engine: accepted row by row, worked on in pages, and never held as a whole.

A batch is accepted by the transaction of its last page, or not at all. Whatever is cut off after that, what is left to
do is what its rows say, and whoever goes on reads it from there.
"""

import contextlib
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import anyio

from flock.engine.batchstore import BatchStore
from flock.engine.intake import ITEMS_PER_PAGE, Intake
from flock.engine.refusals import not_accepting
from flock.engine.runner import Runner
from flock.engine.store import RETRY_AFTER_S
from flock.errors import OwnershipLost, StoreError
from flock.limits import Limits
from flock.runs import Batch, IdempotencyKey, Run, RunStatus, now

__all__ = ["Batches"]

logger = logging.getLogger("flock.runs")

#: More workers would only hold items that wait: while one is at work, the end of another is written.
WORKERS_PER_SLOT = 2


class Batches:
    """The batches that one engine accepts and works on.

    Args:
        start: lets the engine call a function with a batch, in a task of its own, unless it is leaving.
    """

    def __init__(
        self,
        store: BatchStore,
        runner: Runner,
        start: Callable[[Callable[[Batch], Coroutine[Any, Any, None]], Batch], None],
        limits: Limits,
    ) -> None:
        self._store = store
        self._runner = runner
        self._start = start
        self._limits = limits
        #: batches that are worked on here and are to stop
        self._cancelled: set[str] = set()

    async def submit(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        """Accept a batch; see ``Engine.submit_batch``.

        Cancellation: what was staged is dropped.
        """
        batch, is_staged = intake.batch, False

        async def stage(page: Sequence[Run]) -> None:
            nonlocal is_staged
            if self._runner.is_draining:  # it would hold up the stop for as long as its client likes
                raise not_accepting(" Send the upload again.")
            is_first, is_staged = not is_staged, True
            await self._store.stage(batch, page, self._limits.max_open_items, key, is_first=is_first)

        try:
            whole = await intake.read(stage)
            await self._store.accept(
                whole, intake.page, self._limits.max_open_items, key, then=self.start, is_staged=is_staged
            )
            return whole
        except BaseException:
            if is_staged:
                with anyio.CancelScope(shield=True):
                    try:
                        await self._store.drop_staged(batch.batch_id)
                    except StoreError:  # a full disk, say, and what was staged is a part of it
                        self._start(self._drop, batch)
            raise

    async def _drop(self, batch: Batch) -> None:
        """Drop what was staged of a batch, beginning again as long as the store fails."""
        while not self._runner.is_draining:
            await anyio.sleep(RETRY_AFTER_S)
            with contextlib.suppress(StoreError):
                await self._store.drop_staged(batch.batch_id)
                return

    def start(self, batch: Batch | None) -> None:
        """Begin to work on a batch, or go on with it."""
        if batch is not None:
            self._cancelled.discard(batch.batch_id)  # it may be of an attempt that had ended already
            self._start(self._run, batch)

    def cancel(self, batch_id: str) -> None:
        """Stop the work on a batch here, if there is any: no item begins from now on."""
        self._cancelled.add(batch_id)
        for active in list(self._runner.active.values()):
            if active.run.batch_id == batch_id:
                active.cancel()

    async def retry(self, batch_id: str, owner: str, only: Sequence[RunStatus]) -> Batch | None:
        """As ``BatchStore.reopen``."""
        return await self._store.reopen(batch_id, owner, only, self._limits.max_open_items, then=self.start)

    async def retry_item(self, run: Run, owner: str) -> bool:
        """As ``BatchStore.reopen_item``; whether it was opened."""
        return await self._store.reopen_item(run, owner, then=self.start) is not None

    async def _run(self, batch: Batch) -> None:
        """Work on a batch until no item is left, beginning again as long as the store fails."""
        if batch.cancel_requested:
            self._cancelled.add(batch.batch_id)
        try:
            while not self._runner.is_draining and not batch.status.is_final:
                try:
                    batch = await self._process(batch)
                except OwnershipLost:
                    raise
                except StoreError as exc:
                    logger.error("batch %s: %s", batch.batch_id, exc)
                    await anyio.sleep(RETRY_AFTER_S)
                except Exception:  # whatever it is, the engine and its other work go on
                    logger.exception("batch %s cannot go on now", batch.batch_id)
                    await anyio.sleep(RETRY_AFTER_S)
        except OwnershipLost:
            logger.warning("batch %s: another engine has taken it over, or it is gone", batch.batch_id)
        finally:
            self._cancelled.discard(batch.batch_id)

    async def _process(self, batch: Batch) -> Batch:
        """Do what is left to do. Raises OwnershipLost, StoreError."""
        id_ = batch.batch_id
        while batch.reopening and id_ not in self._cancelled:
            batch = await self._store.reopen_some(batch)
        batch = await self._store.begin(batch, now())
        if id_ not in self._cancelled:
            workers = min(batch.options.max_workers, batch.total_items, WORKERS_PER_SLOT * self._limits.max_concurrency)
            workers = workers if batch.options.parallel else 1
            items = self._pending_items(batch)
            left = iter(range(workers))
            async with anyio.create_task_group() as tasks:

                def start_worker() -> None:
                    """Each starts the next when its first item begins: more than one would only wait."""
                    if next(left, None) is not None:
                        tasks.start_soon(self._run_items, items, start_worker)

                start_worker()
        while id_ in self._cancelled and await self._store.cancel_waiting(batch, now()):
            pass
        if self._runner.is_draining or self._store.pending_items(batch, -1, 1):
            return batch
        for item_id, reason in await self._store.fail_unreadable(batch, now()):
            logger.error("batch %s: its item %s cannot be read, and has failed: %s", id_, item_id, reason)
        batch = await self._store.end(batch, now())
        counts = (batch.total_items, batch.failed_items, batch.cancelled_items)
        template = "batch %s: %s, agent %s, %d items, %d of them failed and %d cancelled (request %s)"
        logger.info(template, batch.batch_id, batch.status, batch.agent_name, *counts, batch.request_id)
        return batch

    def _pending_items(self, batch: Batch) -> Iterator[Run]:
        """Items that wait, read from the store in pages, until the engine leaves or the batch is cancelled."""
        after = -1
        while page := self._store.pending_items(batch, after, ITEMS_PER_PAGE):
            for item in page:
                if self._runner.is_draining or batch.batch_id in self._cancelled:
                    return
                yield item
            after = page[-1].position or 0

    async def _run_items(self, items: Iterator[Run], start_worker: Callable[[], None]) -> None:
        try:
            for work in map(self._runner.execute, items, itertools.repeat(start_worker)):  # shared by the workers
                await work
        except StoreError as exc:  # the next page cannot be read
            logger.error("items cannot be read: %s", exc)

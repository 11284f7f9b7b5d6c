"""Batches of the embedded engine: accepted row by row, worked on in pages, and never held as a whole.

A batch is accepted by the transaction of its last page, or not at all. Whatever is cut off after that, what is left to
do is what its rows say, and whoever goes on reads it from there.
"""

import contextlib
import itertools
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import anyio
import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent
from flock.engine.batchstore import BatchStore
from flock.engine.rowchecks import NO_ROWS, CheckedRow, RowChecks, RowErrors, as_json, each
from flock.engine.runner import Runner
from flock.engine.store import RETRY_AFTER_S
from flock.errors import (
    DefinitionError,
    EngineStopped,
    FieldError,
    InvalidData,
    OwnershipLost,
    StoreError,
)
from flock.limits import Limits
from flock.rows.tables import Fill
from flock.runs import (
    INVALID_INPUT,
    Batch,
    IdempotencyKey,
    ItemLimits,
    Items,
    OnInvalid,
    Row,
    Run,
    RunStatus,
    new_id,
    now,
)

__all__ = ["Batches", "Intake", "as_json", "mapping_rows"]

logger = logging.getLogger("flock.runs")

#: How many items are written or read at once, and about how many bytes of inputs are written.
ITEMS_A_PAGE = 500
PAGE_BYTES = 4 * 1024 * 1024
#: More workers would only hold items that wait: while one is at work, the end of another is written.
WORKERS_A_PLACE = 2


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

    async def submit(
        self,
        agent: Agent,
        items: Items,
        batch: Batch,
        *,
        on_invalid: OnInvalid,
        key: IdempotencyKey | None,
        traceparent: str | None,
    ) -> Batch:
        """Accept *batch*, which has no items yet, with *items*; see ``Engine.submit_batch``.

        Cancellation: what was staged is dropped.
        """
        is_staged = False

        async def stage(page: Sequence[Run]) -> None:
            nonlocal is_staged
            if self._runner.is_leaving:  # it would hold up the stop for as long as its client likes
                raise EngineStopped("The server is about to stop and takes no new work. Send the upload again.")
            is_first, is_staged = not is_staged, True
            await self._store.stage(batch, page, self._limits.max_open_items, key, is_first=is_first)

        intake = Intake(agent, batch, stage, max_input_bytes=self._limits.max_input_bytes, traceparent=traceparent)
        try:
            whole = await intake.read(items, on_invalid, self._limits.max_items)
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
        while not self._runner.is_leaving:
            await anyio.sleep(RETRY_AFTER_S)
            with contextlib.suppress(StoreError):
                await self._store.drop_staged(batch.batch_id)
                return

    def start(self, batch: Batch | None) -> None:
        """Begin to work on a batch, or go on with it."""
        if batch is not None:
            self._cancelled.discard(batch.batch_id)  # it may be of an attempt that had ended already
            self._start(self._work, batch)

    def cancel(self, batch_id: str) -> None:
        """Stop the work on a batch here, if there is any: no item begins from now on."""
        self._cancelled.add(batch_id)
        for active in list(self._runner.active.values()):
            if active.run.batch_id == batch_id:
                self._runner.cancel(active)

    async def retry(self, batch_id: str, owner: str, only: Sequence[RunStatus]) -> Batch | None:
        """As ``BatchStore.reopen``."""
        return await self._store.reopen(batch_id, owner, only, self._limits.max_open_items, then=self.start)

    async def retry_item(self, run: Run, owner: str) -> bool:
        """As ``BatchStore.reopen_item``; whether it was opened."""
        return await self._store.reopen_item(run, owner, then=self.start) is not None

    async def _work(self, batch: Batch) -> None:
        """Work on a batch until no item is left, beginning again as long as the store fails."""
        if batch.cancel_requested:
            self._cancelled.add(batch.batch_id)
        try:
            while not self._runner.is_leaving and not batch.status.is_final:
                try:
                    batch = await self._go_on(batch)
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

    async def _go_on(self, batch: Batch) -> Batch:
        """Do what is left to do. Raises OwnershipLost, StoreError."""
        id_ = batch.batch_id
        while batch.reopening and id_ not in self._cancelled:
            batch = await self._store.reopen_some(batch)
        batch = await self._store.begin(batch, now())
        if id_ not in self._cancelled:
            workers = min(batch.options.max_workers, batch.total_items, WORKERS_A_PLACE * self._limits.max_concurrency)
            workers = workers if batch.options.parallel else 1
            items = self._items_to_do(batch)
            left = iter(range(workers))
            async with anyio.create_task_group() as tasks:

                def start_worker() -> None:
                    """Each starts the next when its first item begins: more than one would only wait."""
                    if next(left, None) is not None:
                        tasks.start_soon(self._work_through, items, start_worker)

                start_worker()
        while id_ in self._cancelled and await self._store.cancel_waiting(batch, now()):
            pass
        if self._runner.is_leaving or self._store.items_to_do(batch, -1, 1):
            return batch
        for item_id, reason in await self._store.fail_unreadable(batch, now()):
            logger.error("batch %s: its item %s cannot be read, and has failed: %s", id_, item_id, reason)
        batch = await self._store.end(batch, now())
        counts = (batch.total_items, batch.failed_items, batch.cancelled_items)
        template = "batch %s: %s, agent %s, %d items, %d of them failed and %d cancelled (request %s)"
        logger.info(template, batch.batch_id, batch.status, batch.agent_name, *counts, batch.request_id)
        return batch

    def _items_to_do(self, batch: Batch) -> Iterator[Run]:
        """Items that wait, read from the store in pages, until the engine leaves or the batch is cancelled."""
        after = -1
        while page := self._store.items_to_do(batch, after, ITEMS_A_PAGE):
            for item in page:
                if self._runner.is_leaving or batch.batch_id in self._cancelled:
                    return
                yield item
            after = page[-1].position or 0

    async def _work_through(self, items: Iterator[Run], start_worker: Callable[[], None]) -> None:
        try:
            for work in map(self._runner.carry_out, items, itertools.repeat(start_worker)):  # shared by the workers
                await work
        except StoreError as exc:  # the next page cannot be read
            logger.error("items cannot be read: %s", exc)


class Intake:
    """One batch on its way in: rows become items, and pages of them are staged.

    Args:
        batch: as it is to be accepted, without its numbers.
        stage: keeps the page before the next one is begun.
        id_of: names the item at a position.
        items_a_page: how many items one page holds, where so many have been read.
        page_bytes: about how many bytes of inputs one holds at most.

    Attributes:
        page: what is not staged.
    """

    def __init__(
        self,
        agent: Agent,
        batch: Batch,
        stage: Callable[[Sequence[Run]], Awaitable[None]],
        *,
        max_input_bytes: int,
        traceparent: str | None,
        id_of: Callable[[int], str] = lambda position: new_id(),
        items_a_page: Callable[[int], int] = lambda total: ITEMS_A_PAGE,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        self.page: list[Run] = []
        self._agent = agent
        self._batch = batch
        self._stage = stage
        self._max_input_bytes = max_input_bytes
        self._traceparent = traceparent
        self._id_of = id_of
        self._items_a_page = items_a_page
        self._max_page_bytes = page_bytes
        self._failed = 0
        self._page_bytes = 0

    async def read(self, items: Items, on_invalid: OnInvalid, max_items: int) -> Batch:
        """Read and check all items. Returns the batch with its numbers.

        Raises: InvalidData, once there are as many errors, or rows with errors, as are told at once; TooLarge;
            DefinitionError.
        """
        options = self._batch.options
        if options.max_workers < 1:
            raise DefinitionError(f"max_workers is at least 1, and not {options.max_workers}.")
        limits = ItemLimits(max_items=max_items, max_input_bytes=self._max_input_bytes)
        checks = RowChecks(self._agent, limits)
        found = RowErrors()
        async for checked in checks.rows(items):
            if checked.errors and on_invalid == "reject":
                found.add(checked.row, checked.errors)
                if found.is_full:
                    break
            if not found:
                await self._add(checks.total, checked)
        if found or not checks.total:
            raise InvalidData(found.first() or [NO_ROWS])
        return replace(
            self._batch,
            total_items=checks.total,
            completed_items=self._failed,
            failed_items=self._failed,
            extra_names=tuple(checks.extra_names),
        )

    async def _add(self, position: int, checked: CheckedRow) -> None:
        self.page.append(self._run(position, checked))
        self._page_bytes += len(bytes(checked.row.inputs)) + len(bytes(checked.extra or b""))
        if len(self.page) >= self._items_a_page(position) or self._page_bytes > self._max_page_bytes:
            await self._stage(self.page)
            self.page, self._page_bytes = [], 0

    def _run(self, position: int, checked: CheckedRow) -> Run:
        """An item, which has failed already where there are errors."""
        batch, (row, extra, errors) = self._batch, checked
        end: dict[str, Any] = {}
        if errors:
            self._failed += 1
            error = str(InvalidData(errors))
            end = {
                "status": RunStatus.FAILED,
                "error": error,
                "error_type": INVALID_INPUT,
                "completed_at": batch.created_at,
            }
        return Run(
            run_id=self._id_of(position),
            flock=batch.flock,
            agent_name=batch.agent_name,
            inputs=row.inputs,
            created_at=batch.created_at,
            request_id=batch.request_id,
            batch_id=batch.batch_id,
            position=position,
            traceparent=self._traceparent,
            principal=batch.principal,
            is_async=True,
            timeout_s=batch.options.timeout_s,
            extra=extra,
            **end,
        )


async def mapping_rows(
    items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], fill: Fill, max_bytes: int
) -> AsyncGenerator[Row, None]:
    """What a program has as mappings, none of them longer than *max_bytes*. Raises InvalidData, TooLarge."""
    position = 0
    async for item in each(items):
        at = f"/batch_inputs/{position}"
        if not isinstance(item, Mapping):
            detail = f"An item is a mapping of inputs by name, and not of the type {type(item).__name__!r}."
            raise InvalidData([FieldError(detail=detail, pointer=at)])
        yield fill.row(msgspec.json.decode(as_json(item, at, max_bytes), type=dict[str, msgspec.Raw]), at)
        position += 1

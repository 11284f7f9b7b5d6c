"""Batches of a ``TemporalEngine``: accepted row by row, and read from the memos and histories of their workflows.

Rows are kept in chunks before the batch is begun, so that it is accepted by the start of one workflow, or not at all.
How far it is, is what that has counted, and what its chunks at work tell of themselves.
"""

import asyncio
import bisect
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, timedelta
from itertools import islice
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from temporalio.api.common.v1 import Memo
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import WorkflowHandle
from temporalio.exceptions import WorkflowAlreadyStartedError
from temporalio.service import RPCError

from flock.engine.intake import Intake
from flock.engine.refusals import not_cancelled, not_deleted, not_retried
from flock.errors import BatchNotFound, Conflict, EngineFull, KeyReused, Replayed, StoreError, cut
from flock.limits import Limits
from flock.runs import (
    Batch,
    BatchFilter,
    IdempotencyKey,
    Page,
    Run,
    RunStatus,
)
from flock.temporal.chunks import ended_by_now, read_chunk
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    BATCH_WORKFLOW,
    ROWS_WORKFLOW,
    Attempt,
    BatchOrder,
    Counts,
    ItemRow,
    RowsOrder,
    batch_workflow_id,
    chunk_workflow_id,
    decoded,
    item_id,
    place_of_item,
    rows_workflow_id,
)
from flock.temporal.reservations import Reservations
from flock.temporal.search import ID, newest_first, own

__all__ = ["TemporalBatches"]

logger = logging.getLogger("flock.temporal")

T = TypeVar("T")

#: A chunk holds so many items: few of a short batch, so that workers can share it, and more of a long one. And about so
#: many bytes, of the 2 MiB that the cluster takes at once.
MIN_CHUNK, MAX_CHUNK = 20, 200
CHUNK_BYTES = 500_000
#: How many chunks are sent or read at the same time, and how long one may take, in seconds.
SENT_AT_ONCE = 8
READ_AT_ONCE = 5
SEND_TIMEOUT_S = 10.0
#: How long rows are kept from when they are sent; after that, as long as the namespace keeps what has ended.
KEEP_ROWS_FOR = timedelta(days=30)
#: Of so many batches it is remembered where their chunks begin, and what was told of them last.
BATCHES_KEPT = 100
BATCHES_AT_ONCE = 20
#: How long a chunk may take to count what was handed in, in seconds; after that, less may be told than elsewhere.
COUNT_AGAIN_AFTER_S = 0.03

STATUS_OF_CLOSED = {WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_CANCELED: RunStatus.CANCELLED}


class _Found:
    """One attempt of a batch as it stands.

    Attributes:
        about: what it is about, and how far it is.
        memo: what its workflow says of itself.
    """

    def __init__(self, batch: Batch, about: Attempt, memo: Memo) -> None:
        self.batch = batch if batch.error is None else replace(batch, error=cut(batch.error))
        self.about = about
        self.memo = memo

    def says(self, name: str, type_: type[T], default: T) -> T:
        return decoded(self.memo.fields[name], type_) if name in self.memo.fields else default


class TemporalBatches:
    """The batches of one flock; ``TemporalEngine`` describes the arguments."""

    def __init__(
        self,
        cluster: Cluster,
        reservations: Reservations,
        flock: str,
        task_queue: str,
        *,
        limits: Limits,
        heartbeat_timeout_s: float,
    ) -> None:
        self._cluster = cluster
        self._reservations = reservations
        self._flock = flock
        self._task_queue = task_queue
        self._limits = limits
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._orders: OrderedDict[tuple[str, int], BatchOrder] = OrderedDict()
        #: by batch and attempt; what has ended is out of sight for a moment while it is handed in
        self._told: OrderedDict[tuple[str, int], Batch] = OrderedDict()
        self._drops: set[asyncio.Task[None]] = set()
        #: items of uploads that this process has sent and not yet accepted
        self._staged = 0

    # Accepting

    async def submit(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        """Accept a batch; see ``Engine.submit_batch``.

        Cancellation: what was sent of its rows is deleted by workers.
        """
        batch = intake.batch
        rows = _Rows(self._cluster, self._task_queue, batch.batch_id)
        own = 0

        async def stage(page: Sequence[Run]) -> None:
            nonlocal own
            count = sum(not item.status.is_final for item in page)
            if not is_used:
                self._refuse_above(waiting + self._staged, count)
            own += count
            self._staged += count
            await rows.send(page)

        waiting = await self._check_room(0)  # a cluster that is away says so here, and soon
        is_used = key is not None and await self._reservations.is_used(key)  # a replay comes before any limit
        is_whole = False
        try:
            whole = await intake.read(
                stage,
                id_of=lambda position: item_id(batch.batch_id, position),
                items_per_page=lambda total: min(MAX_CHUNK, max(MIN_CHUNK, total // 10)),
                page_bytes=CHUNK_BYTES,
            )
            if intake.page:
                await stage(intake.page)
            await rows.all_sent()
            is_whole = True
            order = BatchOrder(
                batch=whole,
                starts=tuple(rows.starts),
                timeout_s=min(batch.options.timeout_s or self._limits.max_timeout_s, self._limits.max_timeout_s),
                heartbeat_timeout_s=self._heartbeat_timeout_s,
                invalid_items=whole.failed_items,
                failed_in=f"{rows.failed_in:x}",
                first_error=rows.first_error,
                key_id=None if key is None else self._reservations.key_id(key),
            )
            accepted = await self._accept(order, key, own, rows)
        except BaseException:
            rows.stop()
            if rows.starts and not rows.is_taken:
                drop = asyncio.create_task(self._drop(batch.batch_id, len(rows.starts), key if is_whole else None))
                self._drops.add(drop)
                drop.add_done_callback(self._drops.discard)
            raise
        finally:
            self._staged -= own
        if accepted.batch_id != batch.batch_id:
            raise Replayed(accepted.batch_id)
        return accepted

    async def _drop(self, batch_id: str, chunks: int, key: IdempotencyKey | None) -> None:
        """Let workers delete what was sent, unless the key stands for it by now: it may have been started."""
        try:
            if key is None or await self._reservations.find(key) != batch_id:
                await self._reservations.forget_batch(batch_id, chunks)
        except KeyReused:
            await self._reservations.forget_batch(batch_id, chunks)
        except StoreError as exc:
            logger.warning("what was sent of the batch %s cannot be deleted: %s", batch_id, exc)

    async def _accept(self, order: BatchOrder, key: IdempotencyKey | None, staged: int, rows: "_Rows") -> Batch:
        """Start a batch of which *rows* with *staged* open items were sent, under the id that its key stands for.

        Raises: Replayed, KeyReused, EngineFull.
        """
        batch = order.batch
        made_id = None if key is None else await self._reservations.find(key)
        if key is not None and made_id is not None:
            if await self._reservations.is_gone(made_id):
                await self._reservations.free(self._reservations.key_id(key), made_id)
            with contextlib.suppress(BatchNotFound):
                raise Replayed((await self.get(made_id)).batch_id)
        await self._check_room(batch.total_items - batch.completed_items - staged)
        if key is not None:
            # The process that claimed the key may have died before it started the batch; the next one starts it.
            made_id = await self._reservations.claim(key, batch.batch_id)
            if made_id != batch.batch_id:
                order = replace(
                    order, batch=replace(batch, batch_id=made_id), attempts=(Attempt(rows_of=batch.batch_id),)
                )
        rows.is_taken = key is not None  # also if no answer comes: whoever asks again may find it started
        try:
            await self._start(order)
        except WorkflowAlreadyStartedError:
            rows.is_taken = False
            raise Replayed(order.batch.batch_id) from None
        return order.batch

    async def _start(self, order: BatchOrder) -> None:
        """Raises WorkflowAlreadyStartedError where this attempt was begun before."""
        await self._cluster.start(
            BATCH_WORKFLOW,
            order,
            order.batch,
            id=batch_workflow_id(order.batch.batch_id, order.batch.attempt),
            task_queue=self._task_queue,
            memo={"batch": order.batch, "about": order.attempts[-1]},
        )

    async def _check_room(self, more: int) -> int:
        """How many items of accepted batches have not ended, if there is room for *more*. Raises EngineFull."""
        query = f"{own(BATCH_WORKFLOW, self._flock)} AND ExecutionStatus = 'Running'"
        waiting = 0
        async with self._cluster.asking():
            async for found in self._cluster.client.list_workflows(query):
                memo = found.raw_info.memo.fields
                batch = decoded(memo["batch"], Batch)
                waiting += batch.total_items - batch.completed_items
        self._refuse_above(waiting + self._staged, more)
        return waiting

    def _refuse_above(self, waiting: int, more: int) -> None:
        if waiting + more > self._limits.max_open_items:
            raise EngineFull(
                f"{waiting} items of batches have not ended or are being uploaded, and {more} more would be over what "
                f"this server takes ({self._limits.max_open_items}, max_open_items)."
            )

    # Looking

    async def get(self, batch_id: str) -> Batch:
        return (await self._find(batch_id)).batch

    async def _find(self, batch_id: str) -> _Found:
        """The last attempt of a batch as it stands. Raises BatchNotFound."""
        if ID.fullmatch(batch_id) is None or place_of_item(batch_id)[1] >= 0:
            raise BatchNotFound(batch_id)
        found = await self._attempt(batch_id, 1) or await self._attempt(
            batch_id, await self._cluster.last_attempt(BATCH_WORKFLOW, batch_workflow_id(batch_id, 1))
        )
        if found is None or found.batch.flock != self._flock:
            raise BatchNotFound(batch_id)
        while found.batch.status.is_final:
            later = await self._attempt(batch_id, found.batch.attempt + 1)
            if later is None:
                break
            found = later
        if found.batch.status.is_final and await self._reservations.is_gone(batch_id):
            raise BatchNotFound(batch_id)
        return found

    async def _attempt(self, batch_id: str, attempt: int) -> _Found | None:
        if attempt == 0:
            return None
        try:
            async with self._cluster.asking():
                described = (await self.handle(batch_id, attempt).describe()).raw_description
        except RPCError:
            return None
        info = described.workflow_execution_info
        memo = info.memo
        found = _Found(decoded(memo.fields["batch"], Batch), decoded(memo.fields["about"], Attempt), memo)
        if found.batch.status.is_final:
            return found
        at_work = found.says("at_work", list[int], [])
        ended = sum(await asyncio.gather(*(self._ended_of(batch_id, chunk, attempt) for chunk in at_work)), Counts())
        batch, told = found.batch, self._told.pop((batch_id, attempt), found.batch)
        found.batch = self._told[batch_id, attempt] = replace(
            batch,
            completed_items=max(batch.completed_items + ended.total, told.completed_items),
            failed_items=max(batch.failed_items + ended.failed, told.failed_items),
            cancelled_items=max(batch.cancelled_items + ended.cancelled, told.cancelled_items),
        )
        if len(self._told) > BATCHES_KEPT:
            self._told.popitem(last=False)
        if info.HasField("close_time"):
            _cut_off(found, info)
        return found

    async def _ended_of(self, batch_id: str, chunk: int, attempt: int) -> Counts:
        """What a chunk at work has brought to its end by now."""
        handle = self._cluster.client.get_workflow_handle(chunk_workflow_id(batch_id, chunk, attempt))
        try:
            async with self._cluster.asking():
                described = (await handle.describe()).raw_description
                if described.HasField("pending_workflow_task"):  # what was handed in is not counted yet
                    await asyncio.sleep(COUNT_AGAIN_AFTER_S)
                    described = (await handle.describe()).raw_description
        except RPCError:  # it has not been started yet
            return Counts()
        memo = described.workflow_execution_info.memo.fields
        counted = decoded(memo["ended"], Counts) if "ended" in memo else Counts()
        return counted + ended_by_now(described.pending_activities)

    def handle(self, batch_id: str, attempt: int = 1) -> WorkflowHandle[Any, Any]:
        """Of the workflow that ends with an attempt of a batch, whether there is one or not."""
        return self._cluster.client.get_workflow_handle(batch_workflow_id(batch_id, attempt))

    async def _order(self, batch: Batch) -> BatchOrder:
        """What an attempt was begun with: where its chunks begin, and what earlier attempts were about."""
        key = (batch.batch_id, batch.attempt)
        if key not in self._orders:
            async with self._cluster.asking():
                self._orders[key] = await self._cluster.input_of(batch_workflow_id(*key), BatchOrder)
        self._orders.move_to_end(key)
        if len(self._orders) > BATCHES_KEPT:
            self._orders.popitem(last=False)
        return self._orders[key]

    async def items(self, batch_id: str, after: int, limit: int, statuses: Sequence[RunStatus]) -> Sequence[Run]:
        """As ``Engine.get_items``."""
        try:
            found = await self._find(batch_id)
            order = await self._order(found.batch)
            chunks = iter(self._chunks_with(found, order, max(0, after + 1), statuses))
            page, at_once = Page[Run](limit), 1  # of long results, one chunk is more than a page
            while wanted := list(islice(chunks, at_once)):
                at_once = READ_AT_ONCE
                read = await asyncio.gather(*(self._items_of(found, order, chunk) for chunk in wanted))
                for item in (item for items in read for item in items.values()):
                    if (item.position or 0) <= after or item.status not in statuses:
                        continue
                    if not page.add(replace(item, steps=())):
                        return page
            return page
        except RPCError as exc:
            raise BatchNotFound(batch_id) from exc  # the cluster has forgotten a part of it

    def _chunks_with(
        self, found: _Found, order: BatchOrder, position: int, statuses: Sequence[RunStatus]
    ) -> Sequence[int]:
        """Chunks from *position* on, but for those that have no such items for sure."""
        first = bisect.bisect_right(order.starts, position) - 1
        chunks = range(first, len(order.starts) if position < found.batch.total_items else first)
        if not found.batch.status.is_final or not set(statuses) <= {RunStatus.FAILED, RunStatus.CANCELLED}:
            return chunks
        bits = 0
        for status, name in ((RunStatus.FAILED, "failed_in"), (RunStatus.CANCELLED, "cancelled_in")):
            if status in statuses:
                bits |= int(found.says(name, str, "f" * (len(order.starts) // 4 + 1)), 16)
        return [chunk for chunk in chunks if bits >> chunk & 1]

    async def _items_of(self, found: _Found, order: BatchOrder, chunk: int) -> dict[int, Run]:
        attempts = (*order.attempts[:-1], found.about)
        async with self._cluster.asking(SEND_TIMEOUT_S):
            read = await read_chunk(self._cluster, found.batch.batch_id, chunk, attempts, attempts[0].rows_of)
            return read.items

    async def item(self, run_id: str) -> Run | None:
        """The item with that id, or None."""
        batch_id, position = place_of_item(run_id)
        if position < 0:
            return None
        try:
            found = await self._find(batch_id)
            order = await self._order(found.batch)
            if position >= found.batch.total_items:
                return None
            chunk = bisect.bisect_right(order.starts, position) - 1
            return (await self._items_of(found, order, chunk))[position]
        except (BatchNotFound, RPCError):
            return None

    async def page(self, wanted: BatchFilter) -> Page[Batch]:
        """As ``Engine.list_batches``."""
        page = Page[Batch](wanted.limit)
        ids = newest_first(self._cluster, own(BATCH_WORKFLOW, self._flock), "batch", wanted)
        async for batch_ids in ids:
            for start in range(0, len(batch_ids), BATCHES_AT_ONCE):
                some = batch_ids[start : start + BATCHES_AT_ONCE]
                found = await asyncio.gather(*map(self.get, some), return_exceptions=True)
                for batch in found:
                    if isinstance(batch, BaseException):
                        if not isinstance(batch, BatchNotFound):
                            raise batch
                    elif wanted.status in (None, batch.status) and not page.add(batch):
                        return page
        return page

    # What is asked of a batch

    async def cancel(self, batch_id: str) -> Batch:
        batch = await self.get(batch_id)
        if not batch.status.is_final:
            with contextlib.suppress(RPCError):  # it has ended in the meantime
                async with self._cluster.asking():
                    await self.handle(batch_id, batch.attempt).cancel()
            batch = await self.get(batch_id)
        if conflict := not_cancelled(batch):
            raise conflict
        return replace(batch, cancel_requested=True)

    async def cancel_item(self, run: Run) -> None:
        batch_id, position = place_of_item(run.run_id)
        batch = await self.get(batch_id)
        with contextlib.suppress(RPCError):  # it has ended in the meantime
            async with self._cluster.asking():
                await self.handle(batch_id, batch.attempt).signal("cancel_item", position)

    async def retry(self, batch_id: str, only: Sequence[RunStatus], item: Run | None = None) -> Batch:
        """Begin the next attempt of a batch that has ended, of *item* alone if there is one."""
        found = await self._find(batch_id)
        batch, wanted = found.batch, tuple(only or (RunStatus.FAILED, RunStatus.CANCELLED))
        order = await self._order(batch)
        failed = batch.failed_items - order.invalid_items if RunStatus.FAILED in wanted else 0
        cancelled = batch.cancelled_items if RunStatus.CANCELLED in wanted else 0
        if item is not None:
            failed, cancelled = item.status is RunStatus.FAILED, item.status is RunStatus.CANCELLED
        if not batch.status.is_final or not failed + cancelled:
            raise not_retried(batch, wanted)
        try:
            await self._items_of(found, order, 0)  # what ended first is forgotten first
        except RPCError as exc:
            raise BatchNotFound(batch_id) from exc
        await self._check_room(failed + cancelled)
        every = "f" * (len(order.starts) // 4 + 1)
        again = replace(
            order,
            batch=replace(
                batch,
                status=RunStatus.STARTING,
                attempt=batch.attempt + 1,
                completed_items=batch.completed_items - failed - cancelled,
                failed_items=batch.failed_items - failed,
                cancelled_items=batch.cancelled_items - cancelled,
                error=None,
                completed_at=None,
                resumed_at=None,
                resumed_with=0,
                cancel_requested=False,
            ),
            attempts=(
                *order.attempts[:-1],
                found.about,
                Attempt(only=wanted, position=None if item is None else item.position),
            ),
            failed_in=found.says("failed_in", str, every),
            cancelled_in=found.says("cancelled_in", str, every),
            first_error=found.says("first_error", tuple[int, str] | None, None),  # type: ignore[arg-type]
        )
        try:
            await self._start(again)
        except WorkflowAlreadyStartedError as exc:
            raise Conflict(f"The batch {batch_id} is being tried again already.") from exc
        return again.batch

    async def delete(self, batch_id: str) -> None:
        batch = await self.get(batch_id)
        if not batch.status.is_final:
            raise not_deleted(batch)
        order = await self._order(batch)
        if not await self._reservations.forget_batch(batch_id, len(order.starts), order.attempts[0].rows_of):
            raise BatchNotFound(batch_id)
        await self._reservations.free(order.key_id, batch_id)


class _Rows:
    """The rows of one batch on their way to the cluster.

    Attributes:
        starts: the position at which each chunk begins.
        failed_in: in which chunks there are items that do not fit, a bit for each.
        first_error: of the first of them.
        is_taken: a batch may have been started with them.
    """

    def __init__(self, cluster: Cluster, task_queue: str, batch_id: str) -> None:
        self.starts: list[int] = []
        self.failed_in = 0
        self.first_error: tuple[int, str] | None = None
        self.is_taken = False
        self._total = 0
        self._cluster = cluster
        self._task_queue = task_queue
        self._batch_id = batch_id
        self._sending: set[asyncio.Task[None]] = set()

    async def send(self, page: Sequence[Run]) -> None:
        """Send the next chunk, at the same time as a few others. Raises StoreError where one of them failed."""
        while len(self._sending) >= SENT_AT_ONCE:
            await self._some_sent()
        chunk = len(self.starts)
        for position, item in enumerate(page, self._total):
            if item.error is not None:
                self.failed_in |= 1 << chunk
                self.first_error = self.first_error or (position, item.error)
        rows = tuple(ItemRow(item.inputs, item.error, item.extra or msgspec.UNSET) for item in page)
        order = RowsOrder(item=_common_of(page[0]), first=self._total, rows=rows)
        self.starts.append(self._total)
        self._total += len(page)
        self._sending.add(asyncio.create_task(self._send(chunk, order)))

    async def all_sent(self) -> None:
        while self._sending:
            await self._some_sent()

    def stop(self) -> None:
        for task in self._sending:
            task.cancel()

    async def _some_sent(self) -> None:
        done, self._sending = await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def _send(self, chunk: int, order: RowsOrder) -> None:
        async with self._cluster.asking(SEND_TIMEOUT_S):
            await self._cluster.client.start_workflow(
                ROWS_WORKFLOW,
                order,
                id=rows_workflow_id(self._batch_id, chunk),
                task_queue=self._task_queue,
                start_delay=KEEP_ROWS_FOR,
            )


def _common_of(item: Run) -> Run:
    """What all items of the batch have in common."""
    return replace(
        item,
        run_id=item.batch_id or "",
        inputs=msgspec.Raw(b"{}"),
        status=RunStatus.STARTING,
        error=None,
        error_type=None,
        completed_at=None,
        position=None,
        extra=None,
    )


def _cut_off(found: _Found, info: WorkflowExecutionInfo) -> None:
    """A batch whose workflow was ended before it could say how it stands."""
    batch = found.batch
    at = info.close_time.ToDatetime(UTC)
    status = STATUS_OF_CLOSED.get(info.status, RunStatus.FAILED)
    found.batch = replace(
        batch,
        status=status,
        error="The batch was cancelled." if status is RunStatus.CANCELLED else "The batch was ended on the cluster.",
        completed_at=at,
        completed_items=batch.total_items,
        cancelled_items=batch.cancelled_items + batch.total_items - batch.completed_items,
    )
    found.about = replace(found.about, completed_at=at)

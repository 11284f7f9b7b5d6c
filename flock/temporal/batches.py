"""Batches of a ``TemporalEngine``: sent to the cluster in chunks of rows, and read from memos and histories.

All rows are stored before the batch starts. So the start of one workflow accepts the whole batch. Its progress is what
that workflow has counted, plus the counts of its running chunks.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context
from datetime import UTC, timedelta
from itertools import islice
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace
from temporalio.api.common.v1 import Memo
from temporalio.api.enums.v1 import WorkflowExecutionStatus
from temporalio.api.workflow.v1 import WorkflowExecutionInfo
from temporalio.client import WorkflowExecutionDescription
from temporalio.exceptions import WorkflowAlreadyStartedError

from flock.agents.versions import version_of
from flock.engine.base import EngineBase
from flock.engine.intake import Intake
from flock.errors import BatchNotFound, EngineFull, InvalidData, KeyReused, Replayed, StoreError
from flock.runs import (
    Batch,
    BatchFilter,
    IdempotencyKey,
    Page,
    Principal,
    RetriedCalls,
    Run,
    RunStatus,
    Statuses,
    statuses_of,
)
from flock.steps.outcomes import BATCH_CANCELLED
from flock.steps.refusals import (
    already_retried,
    check_cancel,
    not_accepting,
    not_deleted,
    not_retried,
    too_many_items,
)
from flock.temporal.batchflows import FlockRows
from flock.temporal.cluster import Cluster, logger
from flock.temporal.messages import (
    BATCH_WORKFLOW,
    FLOCK,
    ID,
    PRINCIPAL,
    UNKNOWN,
    Attempt,
    BatchOrder,
    ChunkOrder,
    Counts,
    ItemRow,
    RowsOrder,
    batch_workflow_id,
    chunk_workflow_id,
    decoded,
    item_id,
    keyword_of,
    latest,
    new_batch_id,
    parse_item_id,
    rows_workflow_id,
    workflow_id_of,
)
from flock.temporal.records import Chunk, Traces, ended_so_far, read_chunk
from flock.temporal.reservations import Reservations
from flock.temporal.search import page_of, workflows_of

T = TypeVar("T")

#: Items in a chunk: few in a short batch, so that workers can share it, and more in a long one. CHUNK_BYTES is the
#: approximate size of its rows. The cluster takes at most 2 MiB at once.
MIN_CHUNK, MAX_CHUNK = 20, 200
CHUNK_BYTES = 500_000
#: How many chunks are sent or read at the same time, and the timeout for one, in seconds.
SENT_AT_ONCE = 8
READ_AT_ONCE = 5
#: The workflow of a batch chooses that many rows within a fraction of the two seconds that the cluster's SDK gives it.
MAX_SAMPLE = 100_000
SEND_TIMEOUT_S = 10.0
#: The start delay of the workflows that store rows. After that, rows are kept for the retention of the namespace.
KEEP_ROWS_FOR = timedelta(days=30)
#: How many batches are cached: their orders, and their last reported records.
BATCH_CACHE_SIZE = 100
#: As ``BatchOrder.failed_in``, if the workflow was closed before it could write which chunks have such items.
ALL_CHUNKS = "-1"
#: The pause before counts are read again if a chunk has a pending workflow task, in seconds.
COUNT_AGAIN_AFTER_S = 0.03


class _AttemptState(msgspec.Struct):
    """The current state of one attempt of a batch.

    Attributes:
        about: the items that it covers, and its progress.
        memo: the memo of its workflow.
    """

    batch: Batch
    about: Attempt
    memo: Memo


class TemporalBatches(EngineBase):
    """The batches of a ``TemporalEngine``.

    Args:
        cluster: connected when the engine is entered.
        of_base, models: see ``EngineBase``.
    """

    _new_batch_id = staticmethod(new_batch_id)

    def __init__(self, cluster: Cluster, heartbeat_timeout_s: float, *of_base: Any, **models: Any) -> None:
        super().__init__(*of_base, **models)
        self.cluster = cluster
        #: an app may set it: whether webhooks of the runs and batches of an agent are sent
        self.has_receiver: Callable[[str], bool] = lambda agent_name: False
        self._reservations = Reservations(cluster, self._flock)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._orders: OrderedDict[tuple[str, int], BatchOrder] = OrderedDict()
        #: by batch and attempt; keeps counts from going back while an activity's results are on their way to the chunk
        self._last_reported: OrderedDict[tuple[str, int], Batch] = OrderedDict()
        self._drops: set[asyncio.Task[None]] = set()
        #: items of uploads that this process has sent but not accepted yet
        self._staged = 0

    # Accepting

    async def _accept_batch(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        """Cancellation: workers delete the rows that were sent."""
        batch = intake.batch
        for name in ("dedupe", "reuse"):
            if getattr(batch.options, name):
                raise InvalidData.of(f"A cluster has no {name}. Omit it.", f"/{name}")
        if (batch.options.sample or 0) > MAX_SAMPLE:
            raise InvalidData.of(f"A cluster takes a sample of at most {MAX_SAMPLE:,} rows.", "/sample")
        versions = {name: version_of(agent) for name, agent in self._agents.items()}
        rows = _RowSender(self.cluster, batch.batch_id, versions)

        async def stage(page: Sequence[Run]) -> None:
            if self.is_draining:  # a slow client must not delay the shutdown
                raise not_accepting(" Upload the whole batch again.")
            count = sum(not item.status.is_final for item in page)
            if not is_used:
                self._refuse_above(open_items + self._staged, count)
            rows.open_items += count
            self._staged += count
            if self.cluster.files is not None:
                await self.cluster.files.mark(rows_workflow_id(batch.batch_id, 0), _files_of(page))
            await rows.send(page)

        open_items = await self._check_room_for_items(0)  # also fails early if the cluster does not answer
        # A replay comes before any limit.
        is_used = key is not None and await self._reservations.made_by(key) is not None
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
            await rows.until_sent()
            is_whole = True
            order = BatchOrder(
                batch=whole,
                starts=tuple(rows.starts),
                attempts=(Attempt(is_partial=bool(batch.options.limit or batch.options.sample)),),
                timeout_s=min(batch.options.timeout_s or self._limits.max_timeout_s, self._limits.max_timeout_s),
                heartbeat_timeout_s=self._heartbeat_timeout_s,
                failed_in=f"{rows.failed_in:x}",
                first_error=rows.first_error,
                key_id=None if key is None else self._reservations.key_id(key),
                has_receiver=self.has_receiver(batch.agent_name),
            )
            return await self._accept_sent(order, key, rows)
        except BaseException:
            rows.stop()
            if rows.starts and not rows.may_be_in_use:
                dropping = self._drop(batch.batch_id, len(rows.starts), key if is_whole else None)
                drop = asyncio.create_task(dropping, context=Context())  # it outlives its request
                self._drops.add(drop)
                drop.add_done_callback(self._drops.discard)
            raise
        finally:
            self._staged -= rows.open_items

    async def _drop(self, batch_id: str, chunks: int, key: IdempotencyKey | None) -> None:
        """Have workers delete the rows that were sent, unless *key* has this id: then the batch may have started."""
        try:
            with contextlib.suppress(KeyReused):  # by another request
                if key is not None and await self._reservations.find(key) == batch_id:
                    return
            await self._reservations.delete_batch(batch_id, chunks)
        except (StoreError, EngineFull) as exc:
            logger.warning("the uploaded rows of the batch %s cannot be deleted: %s", batch_id, exc)

    async def _accept_sent(self, order: BatchOrder, key: IdempotencyKey | None, rows: "_RowSender") -> Batch:
        """Start a batch under the id that its key has. Its *rows* have been sent.

        Raises: Replayed, KeyReused, EngineFull.
        """
        batch = order.batch
        made_id = None if key is None else await self._reservations.find(key)
        if key is not None and made_id is not None:
            if await self._reservations.is_deleted(made_id):
                await self._reservations.release(self._reservations.key_id(key), made_id)
            with contextlib.suppress(BatchNotFound):
                raise Replayed((await self.get_batch(made_id)).batch_id)
        await self._check_room_for_items(rows.open_items, rows.open_items)
        if key is not None:
            # If the process that claimed the key died before it started the batch, this one starts it.
            made_id = await self._reservations.claim(key, batch.batch_id)
            if made_id != batch.batch_id:
                attempt = replace(order.attempts[0], rows_of=batch.batch_id)
                order = replace(order, batch=replace(batch, batch_id=made_id), attempts=(attempt,))
        rows.may_be_in_use = key is not None  # if the answer is lost, the batch may have started
        try:
            await self._start_batch(order)
        except WorkflowAlreadyStartedError:
            rows.may_be_in_use = False
            raise Replayed(order.batch.batch_id) from None
        if order.batch.batch_id != batch.batch_id:
            raise Replayed(order.batch.batch_id)
        return order.batch

    async def _start_batch(self, order: BatchOrder) -> None:
        """Start an attempt. Raises WorkflowAlreadyStartedError if it was started before."""
        memo = {"batch": order.batch, "about": order.attempts[-1]}
        await self.cluster.start(BATCH_WORKFLOW, order, order.batch, memo=memo)

    async def _check_room_for_items(self, more: int, staged: int = 0) -> int:
        """Return the number of open items in accepted batches. Raises EngineFull if there is no room for *more*.

        Args:
            staged: how many of them this process has counted as uploaded.
        """
        query = f"{workflows_of(BATCH_WORKFLOW, self._flock)} AND ExecutionStatus = 'Running'"
        open_items = 0
        async with self.cluster.rpc_scope():
            async for workflow in self.cluster.client.list_workflows(query):
                batch = decoded(workflow.raw_info.memo.fields["batch"], Batch)
                open_items += batch.total_items - batch.completed_items
        self._refuse_above(open_items + self._staged - staged, more)
        return open_items

    def _refuse_above(self, open_items: int, more: int) -> None:
        if open_items + more > self._limits.max_open_items:
            raise too_many_items(open_items, more, self._limits.max_open_items)

    # Reading

    async def get_batch(self, batch_id: str) -> Batch:
        self._check_entered()
        return (await self._find_batch(batch_id)).batch

    async def _own(self, workflow_id: str, principal: str | None) -> WorkflowExecutionDescription | None:
        """Return the state of a workflow; None if it does not exist, or is of another flock or principal."""
        described = await self.cluster.describe(workflow_id)
        named = {FLOCK: self._flock, PRINCIPAL: principal}
        is_own = described is not None and all(
            described.typed_search_attributes.get(key) == keyword_of(name)
            for key, name in named.items()
            if name is not None
        )
        return described if is_own else None

    async def _find_batch(self, batch_id: str, principal: str | None = None) -> _AttemptState:
        """Return the state of the last attempt of a batch of *principal*; None means of any. Raises BatchNotFound."""
        if ID.fullmatch(batch_id) is None or parse_item_id(batch_id)[1] >= 0:
            raise BatchNotFound(batch_id)
        state = await self._batch_attempt(batch_id, 1, principal)
        if state is None:
            last = await self.cluster.last_attempt(BATCH_WORKFLOW, batch_workflow_id(batch_id, 1))
            state = await self._batch_attempt(batch_id, last, principal)
        if state is None or state.batch.flock != self._flock:
            raise BatchNotFound(batch_id)
        while state.batch.status.is_final:
            later = await self._batch_attempt(batch_id, state.batch.attempt + 1)
            if later is None:
                break
            state = later
        if state.batch.status.is_final and await self._reservations.is_deleted(batch_id):
            raise BatchNotFound(batch_id)
        return state

    async def _batch_attempt(self, batch_id: str, attempt: int, principal: str | None = None) -> _AttemptState | None:
        described = await self._own(batch_workflow_id(batch_id, attempt), principal)
        if described is None:
            return None
        info = described.raw_info
        memo = info.memo
        state = _AttemptState(decoded(memo.fields["batch"], Batch), decoded(memo.fields["about"], Attempt), memo)
        if state.batch.status.is_final:
            return state
        at_work = _memo_value(memo, "at_work", list[int], [])
        of_chunks = await asyncio.gather(*(self._counts_of(batch_id, chunk, attempt) for chunk in at_work))
        ended = sum(of_chunks, _memo_value(memo, "idle", Counts, Counts()))
        batch, reported = ended.in_batch(state.batch), self._last_reported.pop((batch_id, attempt), state.batch)
        counts = ("completed_items", "failed_items", "cancelled_items")
        state.batch = self._last_reported[batch_id, attempt] = replace(
            batch,
            waiting_items=ended.waiting,
            usage=latest(batch.usage, reported.usage),
            **{name: max(getattr(batch, name), getattr(reported, name)) for name in counts},
        )
        if len(self._last_reported) > BATCH_CACHE_SIZE:
            self._last_reported.popitem(last=False)
        if info.HasField("close_time"):
            _closed_from_outside(state, info)
        return state

    async def _counts_of(self, batch_id: str, chunk: int, attempt: int) -> Counts:
        """Count the items of a running chunk that have ended or wait for answers."""
        workflow_id = chunk_workflow_id(batch_id, chunk, attempt)
        described = await self.cluster.describe(workflow_id)
        if described is not None and described.raw_description.HasField("pending_workflow_task"):
            await asyncio.sleep(COUNT_AGAIN_AFTER_S)  # it may have results that are not counted yet
            described = await self.cluster.describe(workflow_id)
        if described is None:  # it has not started yet
            return Counts()
        counted = _memo_value(described.raw_info.memo, "ended", Counts, Counts())
        return counted + ended_so_far(described.raw_description.pending_activities)

    async def _current(self, batch_id: str) -> BatchOrder:
        """Return the order of the last attempt of a batch, with its current state. Raises BatchNotFound."""
        state = await self._find_batch(batch_id)
        key = (batch_id, state.batch.attempt)
        if key not in self._orders:
            async with self.cluster.rpc_scope(SEND_TIMEOUT_S, missing=BatchNotFound(batch_id)):
                self._orders[key] = await self.cluster.input_of(batch_workflow_id(*key), BatchOrder)
        self._orders.move_to_end(key)
        if len(self._orders) > BATCH_CACHE_SIZE:
            self._orders.popitem(last=False)
        order = self._orders[key]
        return replace(
            order,
            batch=state.batch,
            attempts=(*order.attempts[:-1], state.about),
            failed_in=_memo_value(state.memo, "failed_in", str, ALL_CHUNKS),
            cancelled_in=_memo_value(state.memo, "cancelled_in", str, ALL_CHUNKS),
            first_error=_memo_value(state.memo, "first_error", tuple[int, str] | None, None),  # type: ignore[arg-type]
        )

    async def get_items(
        self, batch_id: str, *, after: int = -1, limit: int = 1000, statuses: Statuses = tuple(RunStatus)
    ) -> Sequence[Run]:
        self._check_entered()
        wanted, order = statuses_of(statuses), await self._current(batch_id)
        first = order.chunk_of(max(0, after + 1))
        chunks: Iterable[int] = range(first, len(order.starts) if after + 1 < order.batch.total_items else first)
        if order.batch.status.is_final and set(wanted) <= {RunStatus.FAILED, RunStatus.CANCELLED}:
            chunks = order.chunks_with(wanted, chunks)
        unread = iter(chunks)
        page, at_once = Page[Run](limit), 1  # with long results, one chunk can exceed a page
        while next_chunks := list(islice(unread, at_once)):
            at_once = READ_AT_ONCE
            read = await asyncio.gather(*(self._read(order, chunk) for chunk in next_chunks))
            for item in (item for chunk in read for item in chunk.items.values()):
                is_wanted = (item.position or 0) > after and item.status in wanted
                if is_wanted and not page.add(replace(item, steps=())):
                    return page
        return page

    async def _read(self, order: BatchOrder, chunk: int) -> Chunk:
        """Read a chunk of a batch, with its current *order*. Raises BatchNotFound, also if its retention is over."""
        batch_id = order.batch.batch_id
        async with self.cluster.rpc_scope(SEND_TIMEOUT_S, missing=BatchNotFound(batch_id)):
            found = await read_chunk(self.cluster, batch_id, chunk, order.attempts)
        for reading in found.readings.values():
            if reading.version in order.batch.versions:
                reading.change(version_number=order.batch.versions.index(reading.version) + 1)
        return found

    async def _running_chunk(self, workflow_id: str) -> Chunk:
        """Read a chunk, and of its batch only what its workflow knows. Raises BatchNotFound."""
        _, batch_id, chunk, *_ = workflow_id.split(":")
        async with self.cluster.rpc_scope(SEND_TIMEOUT_S, missing=BatchNotFound(batch_id)):
            *earlier, last = (await self.cluster.input_of(workflow_id, ChunkOrder)).attempts
            attempts = [*earlier, replace(last, begun_to=int(chunk) + 1)]
            return await read_chunk(self.cluster, batch_id, int(chunk), attempts)

    async def _item(self, run_id: str) -> tuple[Run | None, Traces]:
        """Return the item with this id, or None if there is none or its histories were deleted, and its traces."""
        batch_id, position = parse_item_id(run_id)
        with contextlib.suppress(BatchNotFound):
            order = await self._current(batch_id)
            if 0 <= position < order.batch.total_items:
                chunk = await self._read(order, order.chunk_of(position))
                return chunk.readings[position].run, chunk.readings[position].traces
        return None, Traces()

    async def list_batches(self, wanted: BatchFilter) -> Page[Batch]:
        self._check_entered()
        query = workflows_of(BATCH_WORKFLOW, self._flock)
        return await page_of(self.cluster, query, "batch", wanted, self.get_batch)

    # Changing

    async def cancel_batch(self, batch_id: str) -> Batch:
        batch = await self.get_batch(batch_id)
        if not batch.status.is_final:
            async with self.cluster.rpc_scope(missing_ok=True):
                await self.cluster.handle(workflow_id_of(batch)).cancel()
            batch = await self.get_batch(batch_id)
        check_cancel(f"batch {batch_id}", batch.status)
        return replace(batch, cancel_requested=True)

    async def retry_batch(
        self,
        batch_id: str,
        only: Statuses = (),
        max_cost: float | None = None,
        *,
        calls: RetriedCalls = "keep",
        by: Principal | None = None,
    ) -> Batch:
        self._check_running()
        batch = await self.get_batch(batch_id)
        self._check_prices(batch.agent_name, max_cost)
        self._check_not_spent(batch, max_cost)
        return await self._retry_batch(batch_id, self._retried(only), max_cost=max_cost, calls=calls, by=by)

    async def _retry_batch(
        self,
        batch_id: str,
        only: Sequence[RunStatus],
        item: Run | None = None,
        max_cost: float | None = None,
        calls: RetriedCalls = "keep",
        by: Principal | None = None,
    ) -> Batch:
        """Start the next attempt of a batch that has ended, for *item* alone if it is given."""
        order = await self._current(batch_id)
        batch, statuses = order.batch, tuple(only)
        failed = batch.failed_items - batch.invalid_items if RunStatus.FAILED in statuses else 0
        cancelled = batch.cancelled_items if RunStatus.CANCELLED in statuses else 0
        if item is not None:
            failed, cancelled = item.status is RunStatus.FAILED, item.status is RunStatus.CANCELLED
        if not batch.status.is_final or not failed + cancelled:
            raise not_retried(batch, statuses)
        await self._read(order, 0)  # the retention of the first chunk ends first
        await self._check_room_for_items(failed + cancelled)
        position, name = None if item is None else item.position, None if by is None else by.name
        kept = batch.completed_items - batch.cancelled_items - batch.invalid_items - failed
        options = replace(batch.options, limit=None, sample=None)
        about = Attempt(only=statuses, position=position, keeps_calls=calls == "keep", retried_by=name)
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
                error_type=None,
                options=options if max_cost is None else replace(options, max_cost=max_cost),
                versions=(batch.versions or (UNKNOWN,)) if kept else (),
                completed_at=None,
                resumed_at=None,
                resumed_with=0,
                cancel_requested=False,
            ),
            attempts=(*order.attempts, about),
            messages=(),
            is_day_spent=False,
            failed=0,
            has_receiver=self.has_receiver(batch.agent_name),
        )
        try:
            await self._start_batch(again)
        except WorkflowAlreadyStartedError as exc:
            raise already_retried(batch) from exc
        return again.batch

    async def delete_batch(self, batch_id: str) -> None:
        self._check_entered()
        order = await self._current(batch_id)
        if not order.batch.status.is_final:
            raise not_deleted(order.batch)
        if not await self._reservations.delete_batch(batch_id, len(order.starts), order.attempts[0].rows_of):
            raise BatchNotFound(batch_id)
        await self._reservations.release(order.key_id, batch_id)


class _RowSender(msgspec.Struct, eq=False):
    """Sends the rows of one batch to the cluster, chunk by chunk. *agents*: see ``RowsOrder``.

    Attributes:
        starts: the first position of each chunk.
        open_items: how many of the rows are items to run.
        failed_in: the chunks that have items with invalid inputs, one bit for each chunk.
        first_error: the position and the error of the first such item.
        may_be_in_use: a batch may have started with these rows, so they must not be deleted.
    """

    cluster: Cluster
    batch_id: str
    agents: dict[str, str]
    starts: list[int] = []
    open_items: int = 0
    failed_in: int = 0
    first_error: tuple[int, str] | None = None
    may_be_in_use: bool = False
    total: int = 0
    sending: set[asyncio.Task[None]] = set()

    async def send(self, page: Sequence[Run]) -> None:
        """Send the next chunk, concurrently with a few others. Raises StoreError if one of them failed."""
        await self.until_sent(SENT_AT_ONCE - 1)
        chunk = len(self.starts)
        for position, item in enumerate(page, self.total):
            if item.error is not None:
                self.failed_in |= 1 << chunk
                self.first_error = self.first_error or (position, item.error)
        rows = tuple(ItemRow(item.inputs, item.error, item.extra or msgspec.UNSET) for item in page)
        item = replace(page[0], inputs=msgspec.Raw(b"{}"), extra=None, files=_files_of(page))
        sending = self.cluster.start_workflow(
            FlockRows.run,
            RowsOrder(item=item, first=self.total, rows=rows, agents=self.agents),
            flock=item.flock,
            id=rows_workflow_id(self.batch_id, chunk),
            start_delay=KEEP_ROWS_FOR,
            timeout_s=SEND_TIMEOUT_S,
        )
        self.sending.add(asyncio.create_task(sending))
        self.starts.append(self.total)
        self.total += len(page)

    async def until_sent(self, left: int = 0) -> None:
        """Wait until at most *left* chunks are being sent. Raises StoreError if one of the others failed."""
        while len(self.sending) > left:
            done, self.sending = await asyncio.wait(self.sending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()

    def stop(self) -> None:
        for task in self.sending:
            task.cancel()


def _files_of(page: Sequence[Run]) -> tuple[str, ...]:
    return tuple({name: None for item in page for name in item.files})


def _memo_value(memo: Memo, name: str, type_: type[T], default: T) -> T:
    return decoded(memo.fields[name], type_) if name in memo.fields else default


def _closed_from_outside(state: _AttemptState, info: WorkflowExecutionInfo) -> None:
    """Set the final state of an attempt whose workflow was closed before it could write its own."""
    at = info.close_time.ToDatetime(UTC)
    is_cancelled = info.status == WorkflowExecutionStatus.WORKFLOW_EXECUTION_STATUS_CANCELED
    unfinished = Counts(cancelled=state.batch.total_items - state.batch.completed_items)
    state.batch = replace(
        unfinished.in_batch(state.batch),
        status=RunStatus.CANCELLED if is_cancelled else RunStatus.FAILED,
        error=BATCH_CANCELLED if is_cancelled else "The batch was ended on the cluster before it completed.",
        completed_at=at,
    )
    state.about = replace(state.about, completed_at=at)

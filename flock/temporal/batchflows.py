"""The workflows of a batch: one that divides its lanes among chunks, and one for each running chunk.

Rows are stored by other workflows, and results in the histories of the chunks. So the workflow of a batch stays small,
however many items it has, and it continues as new before its history gets long. As in ``flock.temporal.workflows``, the
code must be deterministic.
"""

import asyncio
import contextlib
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from datetime import timedelta
from typing import Any

import msgspec
from msgspec.structs import replace
from temporalio import workflow
from temporalio.common import RetryPolicy
from temporalio.exceptions import ActivityError, ChildWorkflowError, FailureError, RetryState

from flock.errors import ModelError
from flock.runs import DOLLAR, RunStatus, Usage, added, is_spent
from flock.steps.answers import is_expired
from flock.steps.failures import alike_of, failures_of, sample_of
from flock.steps.outcomes import (
    CANCELLED_BEFORE_START,
    COST_LIMIT,
    NOT_CHOSEN,
    TOO_MANY_FAILURES,
    Outcome,
    end_of_batch,
    expiry_of,
)
from flock.temporal.calls import Calls
from flock.temporal.messages import (
    ASKING,
    BATCH_WORKFLOW,
    CHUNK_WORKFLOW,
    DELETE_ACTIVITY,
    FIND_ACTIVITY,
    INBOX,
    ITEMS_ACTIVITY,
    STATUS,
    TASK_TIMEOUT,
    BatchOrder,
    ChunkFailures,
    ChunkIdle,
    ChunkOrder,
    Counts,
    DeleteOrder,
    Inbox,
    ItemOutcome,
    ItemsDone,
    ItemsOrder,
    Part,
    RowsOrder,
    Sent,
    attributes_of,
    items_queue_of,
    roles_of,
)
from flock.temporal.records import done_after_failure, outcome_of_failure
from flock.temporal.reports import Reports
from flock.temporal.workflows import FIRST_ANSWER, NO_LIMIT, RETRIES, CallKeeper, log_dropped, time_to_expiry

#: Chunks of one batch that run at the same time. Each one adds a request to ``get_batch``.
CHUNKS_AT_ONCE = 20
#: Items of one batch that run at the same time. The cluster takes 2,000 activities of one workflow.
MAX_LANES = 1000
#: A workflow continues as new after this many events or bytes of history, a tenth of what the cluster takes.
MAX_EVENTS = 5_000
MAX_BYTES = 5_000_000
#: The workflow of a batch continues as new only when no chunk is running. If one waits for answers, the others need not
#: wait for it until the history is this many times longer.
IDLE_FACTOR = 8
#: Bytes of completed steps in the orders of one workflow task, or in the state for continue-as-new. The cluster takes
#: 2 MiB at once, and 4 MiB in one workflow task. The rest is scheduled after NEXT_TASK_DELAY.
MAX_STEP_BYTES = 1_600_000
NEXT_TASK_DELAY = timedelta(milliseconds=10)
#: Max delay until the memo has the cancellation of a waiting item.
MEMO_DELAY = timedelta(seconds=0.5)
#: Activities that only read or delete are retried until they succeed.
RETRY_FOREVER = RetryPolicy(maximum_interval=timedelta(seconds=30))


class _Interruptible:
    """A workflow that continues when it is cancelled, until its work has ended."""

    is_cancelled = False

    async def _until(self, is_enough: Callable[[], bool], within: timedelta | None = None) -> None:
        """Wait until *is_enough*, or until the workflow is cancelled. Raises asyncio.TimeoutError."""
        try:
            await workflow.wait_condition(is_enough, timeout=within)
        except asyncio.CancelledError:
            self.is_cancelled = True


@workflow.defn(name=BATCH_WORKFLOW)
class FlockBatch(_Interruptible):
    """One attempt of one batch. Its memo has the record of the batch.

    The workflow completes when no chunk is running, even if the batch failed or was cancelled.
    """

    @workflow.init
    def __init__(self, order: BatchOrder) -> None:
        self._order = order
        self._batch = order.batch
        #: see ``Attempt.cancelled``
        self._cancelled = dict(order.attempts[-1].cancelled)
        self._failed_in, self._cancelled_in = int(order.failed_in, 16), int(order.cancelled_in, 16)
        self._first_error, self._is_day_spent = order.first_error, order.is_day_spent
        self._next = order.attempts[-1].begun_to
        #: by chunk, for the running ones
        self._lanes: dict[int, int] = {}
        self._chunks: dict[int, asyncio.Task[Counts]] = {}
        self._started: dict[int, workflow.ChildWorkflowHandle[Any, Counts]] = {}
        #: what the items of running chunks have spent, as far as ``max_cost`` needs it
        self._spent_in: dict[int, Usage] = {}
        #: the items that may start, if ``limit`` or ``sample`` choose some, and their chunks
        limit = self._batch.options.limit
        self._chosen: Collection[int] | None = sample_of(self._batch)
        self._chunks_chosen: Sequence[int] = sorted(set(map(order.chunk_of, self._chosen or ())))
        if self._chosen is None and limit is not None:
            last = min(limit, self._batch.total_items) - 1
            self._chosen, self._chunks_chosen = range(last + 1), range(order.chunk_of(last) + 1)
        #: by running chunk, and the items that failed in a row as all may, by chunk; see ``ChunkFailures``
        self._failed: dict[int, int] = {}
        self._alike: dict[int, tuple[int, ...]] = {}
        #: why it ends early
        self._reason: Outcome | None = None
        self._is_stopping = False
        self._signals: set[asyncio.Task[None]] = set()
        #: messages to items whose chunk has not started
        self._early = Calls(messages=order.messages)
        #: chunks without lanes, by number, in the order in which they became idle
        self._idle: dict[int, ChunkIdle] = {}
        #: how often each chunk got lanes after it was idle
        self._grants: Counter[int] = Counter()
        #: chunks that have to give their lanes to items that got an answer
        self._yielding: set[int] = set()

    @workflow.signal
    def chunk_idle(self, idle: ChunkIdle) -> None:
        """Take back the lanes of a chunk."""
        if idle.chunk in self._lanes and idle.grants == self._grants[idle.chunk]:
            self._idle[idle.chunk] = idle
            self._lanes[idle.chunk] = 0
            self._yielding.discard(idle.chunk)

    @workflow.signal
    def cancel_item(self, position: int) -> None:
        """Cancel one item."""
        chunk = self._order.chunk_of(position)
        if chunk >= self._next:
            self._cancelled[position] = workflow.now()
        elif chunk in self._chunks:
            self._signal_chunk(chunk, "cancel_item", position)

    @workflow.signal
    def message(self, sent: Sent) -> None:
        """Keep a message to an item until its chunk starts. If the chunk has just started, pass the message on."""
        chunk = self._order.chunk_of(sent.item)
        if chunk >= self._next:
            self._early.keep(sent)
        elif chunk in self._chunks:
            self._signal_chunk(chunk, "message", sent)

    @workflow.signal
    def chunk_spent(self, chunk: int, usage: Usage) -> None:
        """Note what the items of a running chunk have spent."""
        if chunk in self._chunks:
            self._spent_in[chunk] = usage

    @workflow.signal
    def chunk_failures(self, report: ChunkFailures) -> None:
        """Note failures in a running chunk, and decide whether they end the batch.

        Items that are alike are in a row if the last one of each chunk with lanes was.
        """
        if self._reason == TOO_MANY_FAILURES:
            return
        if report.alike:
            self._alike[report.chunk] = report.alike
        elif self._reason is None:
            self._alike.clear()
        self._failed[report.chunk] = report.failed
        if report.error is not None and not self._starts_no_more:
            are_alike = sum(map(len, self._alike.values())) >= alike_of(self._batch.options)
            if report.lasting or (are_alike and all(k in self._alike for k, lanes in self._lanes.items() if lanes)):
                self._reason = report.error
        self._check_max_failures()

    def _check_max_failures(self) -> None:
        if not self._starts_no_more and self._failed_so_far > failures_of(self._batch):
            self._reason = TOO_MANY_FAILURES
            self._alike.clear()

    @property
    def _failed_so_far(self) -> int:
        return sum(self._failed.values(), self._order.failed)

    @property
    def _starts_no_more(self) -> bool:
        return self._is_spent or self._reason is not None

    @property
    def _usage(self) -> Usage | None:
        return added(self._batch.usage, *self._spent_in.values())

    @property
    def _is_spent(self) -> bool:
        return is_spent(self._usage, self._batch.options.max_cost)

    @workflow.run
    async def run(self, order: BatchOrder) -> None:
        batch = self._batch
        if batch.resumed_at is None:
            self._batch = replace(
                batch,
                status=RunStatus.RUNNING,
                started_at=batch.started_at or workflow.now(),
                resumed_at=workflow.now(),
                resumed_with=batch.completed_items,
            )
        while True:
            self._start_chunks()
            if not self._chunks:
                break
            workflow.upsert_memo(self._memo())
            known, idle = len(self._cancelled), dict(self._idle)
            await self._until(
                lambda: (
                    self._has_ended()
                    or (len(self._cancelled), self._idle) != (known, idle)  # noqa: B023 - awaited here
                    or (self._starts_no_more and not self._is_stopping)
                )
            )
            if self._starts_no_more and not self._is_stopping:
                self._is_stopping = True
                signal = ("stop", 0) if self._reason is None else ("end_early", self._reason)
                for chunk in self._chunks:
                    self._signal_chunk(chunk, *signal)
            if len(self._cancelled) != known and not self.is_cancelled:
                with contextlib.suppress(asyncio.TimeoutError):  # there may be more of them
                    await self._until(self._has_ended, MEMO_DELAY)
            await _settle()
            self._collect()
            if self.is_cancelled and not self._batch.cancel_requested:
                self._batch = replace(self._batch, cancel_requested=True)
                for started in self._started.values():
                    started.cancel()
        while self._signals:
            await self._until(lambda: not self._signals)
        if self._chunks_to_start() and not (self.is_cancelled or self._starts_no_more):
            workflow.continue_as_new(self._state(), memo=self._memo())
        self._finish()
        await Reports(self._batch, has_receiver=self._order.has_receiver).send(self._batch.status.value, is_end=True)

    def _has_ended(self) -> bool:
        return any(chunk.done() for chunk in self._chunks.values())

    def _chunks_to_start(self) -> Iterable[int]:
        """Return the chunks with items to run that have not started."""
        chunks = range(self._next, len(self._order.starts))
        attempt = self._order.attempts[-1]
        if self._chosen is not None:
            return [k for k in self._chunks_chosen if k >= self._next]
        if self._batch.attempt == 1:
            return chunks
        if attempt.position is not None:
            return [k for k in chunks if k == self._order.chunk_of(attempt.position)]
        return self._order.chunks_with(attempt.only, chunks)

    def _chosen_in(self, chunk: int) -> list[int]:
        return [] if self._chosen is None else [at for at in self._order.positions_of(chunk) if at in self._chosen]

    def _start_chunks(self) -> None:
        """Divide the free lanes among chunks that start now, or else among running ones."""
        options = self._batch.options
        lanes = min(options.max_workers, MAX_LANES) if options.parallel else 1
        free = lanes - sum(self._lanes.values())
        free = self._resume_chunks(free)
        room = min(lanes, CHUNKS_AT_ONCE) - len(self._chunks) + len(self._idle)
        is_long = _is_long(IDLE_FACTOR if self._idle else 1)  # it can only continue as new without running chunks
        is_long = is_long and self._early.size <= MAX_STEP_BYTES
        if not (self.is_cancelled or is_long or self._starts_no_more) and free and room:
            chunks = list(itertools.islice(self._chunks_to_start(), room))
            for index, chunk in enumerate(chunks):
                share = math.ceil(free / (len(chunks) - index))
                if share:
                    free -= share
                    self._start_chunk(chunk, share)
        while free > 0 and (busy := self._busy_chunks()) and not self.is_cancelled:
            chunk = busy[0]
            if self._lanes[chunk] >= len(self._order.positions_of(chunk)):
                break
            share = math.ceil(free / len(busy))
            self._lanes[chunk] += share
            free -= share
            self._signal_chunk(chunk, "set_lanes", self._lanes[chunk])

    def _busy_chunks(self) -> list[int]:
        """Return the chunks that have lanes and keep them, those with the fewest lanes first."""
        busy = [chunk for chunk in self._lanes if chunk not in self._idle and chunk not in self._yielding]
        return sorted(busy, key=lambda chunk: (self._lanes[chunk], chunk))

    def _resume_chunks(self, free: int) -> int:
        """Give a lane to each idle chunk with work. If none is *free*, others have to yield theirs to answered items.

        Returns: how many lanes are left.
        """
        is_over = self.is_cancelled or self._starts_no_more
        asking = [] if is_over else [chunk for chunk, idle in self._idle.items() if idle.has_work]
        asking.sort(key=lambda chunk: self._idle[chunk].has_yielded)
        answered = sum(not self._idle[chunk].has_yielded for chunk in asking)
        if is_final := _is_long(IDLE_FACTOR):  # each grant makes the history longer
            asking, free = list(self._idle), max(free, len(self._idle))
        granted = asking[: max(0, free)]
        for chunk in granted:
            del self._idle[chunk]
            self._lanes[chunk] = 1
            self._grants[chunk] += 1
            self._signal_chunk(chunk, "resume", 1, is_final)
        lacking = answered - len(granted) - sum(self._lanes[chunk] for chunk in self._yielding)
        for chunk in self._busy_chunks():
            if lacking <= 0:
                break
            self._yielding.add(chunk)
            lacking -= self._lanes[chunk]
            self._signal_chunk(chunk, "set_lanes", 0)
        return free - len(granted)

    def _start_chunk(self, chunk: int, lanes: int) -> None:
        positions = self._order.positions_of(chunk)
        messages = [sent for position in positions for sent in self._early.messages_to(position)]
        for position in positions:
            self._early.discard(position)
        fitting = list(itertools.takewhile(_fits_within(MAX_STEP_BYTES), messages))
        max_cost, usage = self._batch.options.max_cost, self._usage or Usage()
        budget = None if max_cost is None else round(max_cost * DOLLAR) - usage.picodollars
        may_fail = failures_of(self._batch)
        order = ChunkOrder(
            batch_id=self._batch.batch_id,
            chunk=chunk,
            attempt=self._batch.attempt,
            attempts=(*self._order.attempts[:-1], replace(self._order.attempts[-1], cancelled={})),
            positions=(positions.start, positions.stop),
            lanes=lanes,
            is_whole=self._batch.attempt == 1 and not self._batch.invalid_items,
            timeout_s=self._order.timeout_s,
            heartbeat_timeout_s=self._order.heartbeat_timeout_s,
            cancelled={at: when for at, when in self._cancelled.items() if at in positions},
            budget=budget,
            messages=tuple(fitting),
            chosen=None if self._chosen is None else tuple(self._chosen_in(chunk)),
            failures_left=None if math.isinf(may_fail) else may_fail - self._failed_so_far,
        )
        self._lanes[chunk] = lanes
        self._next = chunk + 1
        self._chunks[chunk] = asyncio.create_task(self._run_chunk(order))
        for sent in messages[len(fitting) :]:
            self._signal_chunk(chunk, "message", sent)

    async def _run_chunk(self, order: ChunkOrder) -> Counts:
        """Run a chunk. This task is never cancelled, because the outcome of a cancelled start is unknown."""
        started = self._started[order.chunk] = await workflow.start_child_workflow(
            FlockChunk.run,
            order,
            id=order.workflow_id,
            task_timeout=TASK_TIMEOUT,
            search_attributes=attributes_of(self._batch),
            parent_close_policy=workflow.ParentClosePolicy.REQUEST_CANCEL,
        )
        if self._batch.cancel_requested:
            started.cancel()
        return await started

    def _signal_chunk(self, chunk: int, signal: str, *values: Any) -> None:
        async def send() -> None:
            await workflow.wait_condition(lambda: chunk in self._started or chunk not in self._chunks)
            if chunk in self._started:
                try:
                    await self._started[chunk].signal(signal, args=values)
                except Exception:  # it has ended
                    workflow.logger.debug("the chunk %s cannot get the signal %s", chunk, signal)

        task = asyncio.create_task(send())
        self._signals.add(task)
        task.add_done_callback(self._signals.discard)

    def _collect(self) -> None:
        """Count the items of chunks that have ended."""
        for chunk, task in [(chunk, task) for chunk, task in self._chunks.items() if task.done()]:
            del self._chunks[chunk], self._lanes[chunk]
            self._started.pop(chunk, None)
            self._spent_in.pop(chunk, None)
            self._failed.pop(chunk, None)
            self._idle.pop(chunk, None)
            self._yielding.discard(chunk)
            positions = self._order.positions_of(chunk)
            self._cancelled = {at: when for at, when in self._cancelled.items() if at not in positions}
            try:
                ended = task.result()
            except ChildWorkflowError as exc:
                ended = Counts()
                if self.is_cancelled:  # it was cancelled before it started, and its items are counted at the end
                    self._cancelled_in |= 1 << chunk
                else:  # it was closed from outside, or the retention of its rows is over
                    size = len(self._chosen_in(chunk) or positions)
                    size = min(size, self._batch.total_items - self._batch.completed_items)
                    outcome = outcome_of_failure(exc.cause.cause if isinstance(exc.cause, ActivityError) else None)
                    ended = Counts(failed=size, first_error=(positions.start, outcome.error))
            self._batch = ended.in_batch(self._batch)
            self._order = replace(self._order, failed=self._order.failed + ended.failed)
            self._is_day_spent |= ended.unpaid > 0
            self._failed_in |= bool(ended.failed) << chunk
            self._cancelled_in |= bool(ended.cancelled) << chunk
            errors = [error for error in (ended.first_error, self._first_error) if error]
            # For the same item, the latest attempt's comes first.
            self._first_error = min(errors, key=lambda error: error[0], default=None)
        self._check_max_failures()

    def _state(self) -> BatchOrder:
        attempt = replace(self._order.attempts[-1], begun_to=self._next, cancelled=dict(self._cancelled))
        return replace(
            self._order,
            batch=self._batch,
            attempts=(*self._order.attempts[:-1], attempt),
            failed_in=f"{self._failed_in:x}",
            cancelled_in=f"{self._cancelled_in:x}",
            first_error=self._first_error,
            messages=self._early.all_messages(),
            is_day_spent=self._is_day_spent,
        )

    def _memo(self) -> dict[str, Any]:
        """Return the record of the batch for the memo, where it can be read without a worker."""
        return {
            "batch": self._batch,
            "at_work": [chunk for chunk in sorted(self._chunks) if chunk not in self._idle],
            "idle": sum((idle.counts for idle in self._idle.values()), Counts()),
            "about": self._state().attempts[-1],
        }

    def _finish(self) -> None:
        batch = self._batch
        unfinished = batch.total_items - batch.completed_items
        for chunk in self._chunks_to_start() if unfinished else ():
            self._cancelled_in |= 1 << chunk
        if unfinished and self._chosen is not None:
            self._cancelled_in |= (1 << len(self._order.starts)) - 1
        refused = [position for positions in self._alike.values() for position in positions] if self._reason else []
        for position in refused:
            self._cancelled_in |= 1 << self._order.chunk_of(position)
        batch = Counts(cancelled=unfinished + len(refused), failed=-len(refused)).in_batch(batch)
        _, first_error = self._first_error or (0, CANCELLED_BEFORE_START.error)
        reason = self._reason
        is_unpaid = ((self._is_spent and reason is None) or self._is_day_spent) and batch.cancelled_items > 0
        status, error, error_type = end_of_batch(
            batch,
            lambda: first_error,
            is_cancelled=self.is_cancelled,
            is_unpaid=is_unpaid,
            is_day_spent=not self._is_spent,
            stopped_by=(reason.error, reason.error_type) if reason is not None and batch.cancelled_items else None,
        )
        if reason is None and self._chosen is not None and not self.is_cancelled:
            reason = NOT_CHOSEN
        ended = {"status": status, "error": error, "error_type": error_type, "completed_at": workflow.now()}
        self._batch = replace(batch, **ended)
        state = self._state()
        attempt = replace(
            state.attempts[-1],
            completed_at=workflow.now(),
            is_spent=error_type == COST_LIMIT.error_type,
            stopped_by=reason,
            refused=tuple(refused),
        )
        for_retry = {name: getattr(state, name) for name in ("failed_in", "cancelled_in", "first_error")}
        workflow.upsert_memo(self._memo() | {"about": attempt} | for_retry)


@workflow.defn(name=CHUNK_WORKFLOW)
class FlockChunk(_Interruptible, CallKeeper):
    """One attempt of a chunk of items. Its history is their record (``flock.temporal.records``).

    Returns: the counts of this attempt. If it is cancelled, items that have not started count as cancelled.
    """

    @workflow.init
    def __init__(self, order: ChunkOrder) -> None:
        self._order = order
        self._lanes = order.lanes
        self._ended = order.before or Counts()
        self._todo: deque[Part] = deque(order.parts or ())
        #: positions of items to cancel
        self._cancelled = set(order.cancelled)
        self._running: dict[workflow.ActivityHandle[ItemsDone], ItemsOrder] = {}
        self._is_stopping = False
        self._calls = Calls(order.calls, order.messages, log_dropped, order.generation)
        #: items that wait for answers, by position
        self._waiting = {part.position: part for part in order.waiting}
        #: see ``ChunkIdle``
        self._is_idle, self._grants, self._keeps_lanes = order.is_idle, order.grants, order.keeps_lanes
        self._has_yielded = False
        self._reported: ChunkIdle | None = None
        failed = 0 if order.failures_left is None else self._ended.failed
        self._failures = self._failures_reported = ChunkFailures(chunk=order.chunk, failed=failed)
        self._reports: set[asyncio.Task[None]] = set()

    @workflow.signal
    def set_lanes(self, lanes: int) -> None:
        """Change how many items run at the same time. With 0, the chunk becomes idle when none is running."""
        self._lanes = lanes

    @workflow.signal
    def resume(self, lanes: int, is_final: bool) -> None:
        """Use *lanes* again, and if *is_final*, never give them back."""
        self._lanes, self._is_idle, self._keeps_lanes = lanes, False, is_final
        self._grants += 1

    @workflow.signal
    def cancel_item(self, position: int) -> None:
        """Cancel one item."""
        self._cancelled.add(position)

    @workflow.signal
    def end_early(self, _: Outcome) -> None:
        """Start no more items, because of failures."""
        self._is_stopping = True

    @workflow.signal
    def stop(self, _: int) -> None:
        """Start no more items, because the ``max_cost`` of the batch is spent."""
        self._is_stopping = True

    @workflow.run
    async def run(self, order: ChunkOrder) -> Counts:
        if order.parts is None:
            await self._find()
        while True:
            self._drop_cancelled()
            self._resume_answered()
            if not (self._todo or self._running or self._waiting):
                break
            has_more = False
            if not _is_long() or self._state_bytes > MAX_STEP_BYTES:
                has_more = self._start_activities()
            elif not self._running:
                workflow.continue_as_new(self._state(), memo=self._memo())
            workflow.upsert_memo(self._memo())
            self._show_asking()
            self._report_idle()
            told, cancelled, was_cancelled = self._told, set(self._cancelled), self.is_cancelled
            usage = self._usage
            with contextlib.suppress(asyncio.TimeoutError):
                await self._until(
                    lambda: (
                        any(task.done() for task in self._running)
                        or (self._told, self._cancelled) != (told, cancelled)  # noqa: B023 - awaited here
                        or self._has_answers()
                    ),
                    NEXT_TASK_DELAY
                    if has_more
                    else time_to_expiry(question for part in self._waiting.values() for question in part.questions),
                )
            await _settle()
            self._collect()
            if self._failures != self._failures_reported:
                self._failures_reported = self._failures
                await self._report(self._tell_batch("chunk_failures", self._failures))
            if order.budget is not None and self._usage != usage:
                await self._report_usage(order.budget)
            stops_all, newly = self.is_cancelled and not was_cancelled, self._cancelled - cancelled
            for task, ordered in self._running.items() if stops_all or newly else ():
                if stops_all or any(part.position in newly for part in ordered.parts):
                    task.cancel()  # its worker reads in the memo which items to stop
        workflow.upsert_memo(self._memo())
        return self._ended

    @property
    def _usage(self) -> Usage | None:
        """What the items have spent, as far as it is known: also those that run again after an answer."""
        running = [part.usage for order in self._running.values() for part in order.parts]
        return added(self._counts().usage, *running)

    @property
    def _told(self) -> tuple[int, int, bool]:
        return self._lanes, self._grants, self._is_stopping

    @property
    def _state_bytes(self) -> int:
        """About the length of what is left, as JSON, if the workflow continued as new."""
        return sum(map(_bytes_of, (*self._todo, *self._waiting.values()))) + self._calls.size

    async def _report_usage(self, budget: int) -> None:
        """Tell the batch what the items have spent, and stop if that is all that was left when this chunk started."""
        usage = self._usage or Usage()
        self._is_stopping |= usage.cost is None or usage.picodollars >= budget
        await self._report(self._tell_batch("chunk_spent", self._order.chunk, usage))

    async def _report(self, telling: Coroutine[Any, Any, None]) -> None:
        try:
            await telling
        except asyncio.CancelledError:
            self.is_cancelled = True

    def _note_failures(self, ended: ItemOutcome) -> None:
        """Note how an item has ended, and start no more if all others would fail too."""
        noted, alike = self._failures, self._failures.alike
        if ended.lasting is None:
            noted = replace(noted, alike=(*alike, ended.position), error=ended.reason)
        elif ended.lasting:
            self._is_stopping, noted = True, replace(noted, lasting=True, error=ended.reason)
        elif alike and ended.error_type not in ModelError.ERROR_TYPES:
            noted = replace(noted, alike=())
        if self._order.failures_left is not None:
            noted = replace(noted, failed=self._ended.failed)
            self._is_stopping |= noted.failed > self._order.failures_left
        self._failures = noted

    async def _find(self) -> None:
        """Find the items to run."""
        order = self._order
        if order.is_whole:
            self._todo.extend(Part(position=position) for position in order.chosen or range(*order.positions))
            return
        finding = workflow.start_activity(
            FIND_ACTIVITY,
            order.for_items(()),
            result_type=list[int],
            start_to_close_timeout=timedelta(seconds=30),
            retry_policy=RETRY_FOREVER,
        )
        while not finding.done():
            await self._until(finding.done)
        found = finding.result() if order.chosen is None else set(finding.result()) & set(order.chosen)
        self._todo.extend(Part(position=position) for position in sorted(found))

    def _start_activities(self) -> bool:
        """Divide the items among the free lanes. Returns whether some must wait for the next workflow task."""
        step_bytes = 0
        lanes = 0 if self._is_idle else self._lanes
        while self._todo and len(self._running) < lanes:
            share = math.ceil(len(self._todo) / (lanes - len(self._running)))
            if self._order.budget is not None or self._order.failures_left is not None:  # checked before each item
                share = 1
            parts: list[Part] = []
            while len(parts) < share and (not step_bytes or step_bytes + _bytes_of(self._todo[0]) <= MAX_STEP_BYTES):
                step_bytes += _bytes_of(self._todo[0])
                parts.append(self._todo.popleft())
            if not parts:
                return True
            order = self._order.for_items(tuple(parts))
            handle = workflow.start_activity(
                ITEMS_ACTIVITY,
                order,
                result_type=ItemsDone,
                task_queue=items_queue_of(workflow.info().task_queue),
                start_to_close_timeout=NO_LIMIT,
                heartbeat_timeout=timedelta(seconds=order.heartbeat_timeout_s),
                retry_policy=RETRIES,
                cancellation_type=workflow.ActivityCancellationType.WAIT_CANCELLATION_COMPLETED,
            )
            self._running[handle] = order
        return False

    def _collect(self) -> None:
        """Count the items that have ended, and put the rest back."""
        for task, order in [(task, order) for task, order in self._running.items() if task.done()]:
            del self._running[task]
            try:
                done = task.result()
            except ActivityError as exc:
                is_cancelled = exc.retry_state is RetryState.CANCEL_REQUESTED
                done = done_after_failure(order, exc.cause, workflow.now(), is_cancelled=is_cancelled)
            for ended in done.ended:
                self._ended += ended.counts
                self._note_failures(ended)
                self._calls.discard(ended.position)
            self._waiting |= {part.position: part for part in done.waiting}
            self._todo.extendleft(reversed(order.left_after(done)))

    def _drop_cancelled(self) -> None:
        drops_all = self.is_cancelled or self._is_stopping
        parts = (*self._todo, *self._waiting.values())
        dropped = {part.position: part for part in parts if drops_all or part.position in self._cancelled}
        for part in dropped.values():
            self._ended += Counts(cancelled=1, usage=part.usage)
            self._waiting.pop(part.position, None)
        self._todo = deque(part for part in self._todo if part.position not in dropped)

    def _has_answers(self) -> bool:
        """Whether an item may continue, or a question has expired."""
        at = workflow.now()
        return any(
            self._calls.has_news(part.position, len(part.steps), part.questions, at) for part in self._waiting.values()
        )

    def _resume_answered(self) -> None:
        """Put items first that got an answer, and end those that have a question that expired."""
        at = workflow.now()
        for part in list(self._waiting.values()):
            left = self._calls.still_open(part.position, len(part.steps), part.questions, at)
            late = next((question for question in left if is_expired(question, at)), None)
            if late is not None:
                del self._waiting[part.position]
                self._calls.discard(part.position)
                ended = part.ended(expiry_of(late), at)
                self._ended += ended.counts
                self._note_failures(ended)
            elif left == part.questions or (left and not workflow.patched(FIRST_ANSWER)):
                self._waiting[part.position] = replace(part, questions=left)
            else:
                del self._waiting[part.position]
                assert part.started_at is not None
                waited_s = (at - part.started_at).total_seconds() - part.worked_s
                part = replace(part, questions=(), waited_for=left, has_calls=True, waited_s=waited_s)
                self._todo.appendleft(part)

    def _report_idle(self) -> None:
        """Tell the batch that the chunk needs no lanes now, and when it needs some again."""
        if self._keeps_lanes or (not self._is_idle and (self._running or (self._todo and self._lanes))):
            return
        if not self._is_idle:
            self._is_idle, self._has_yielded = True, bool(self._todo)
        idle = ChunkIdle(
            chunk=self._order.chunk,
            counts=self._counts(),
            has_work=bool(self._todo),
            has_yielded=self._has_yielded,
            grants=self._grants,
        )
        if idle != self._reported:
            self._reported = idle
            task = asyncio.create_task(self._tell_batch("chunk_idle", idle))
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

    async def _tell_batch(self, signal: str, *values: Any) -> None:
        batch = workflow.info().parent
        assert batch is not None
        with contextlib.suppress(FailureError):  # the batch was terminated
            await workflow.get_external_workflow_handle(batch.workflow_id).signal(signal, args=values)

    def _show_asking(self) -> None:
        """Let the search of the cluster find the chunk while some of its items ask."""
        asks = bool(self._roles)
        if asks is not (workflow.info().typed_search_attributes.get(STATUS) is not None) and workflow.patched(INBOX):
            workflow.upsert_search_attributes([STATUS.value_set(ASKING) if asks else STATUS.value_unset()])

    @property
    def _roles(self) -> tuple[str, ...]:
        return roles_of(question for part in self._waiting.values() for question in part.questions)

    def _counts(self) -> Counts:
        """Return the counts without the items of running activities, whose heartbeats have theirs."""
        usages = [part.usage for part in (*self._todo, *self._waiting.values())]
        return self._ended + Counts(waiting=len(self._waiting), usage=added(*usages))

    def _state(self) -> ChunkOrder:
        return replace(
            self._order,
            lanes=self._lanes,
            parts=tuple(self._todo),
            cancelled={position: workflow.now() for position in sorted(self._cancelled)},
            before=self._ended,
            calls=self._calls.all(),
            messages=self._calls.all_messages(),
            waiting=tuple(self._waiting.values()),
            is_idle=self._is_idle,
            grants=self._grants,
            keeps_lanes=self._keeps_lanes,
            generation=self._order.generation + 1,
        )

    def _memo(self) -> dict[str, Any]:
        """Return the counts and the items to cancel, for workers and API processes."""
        cancelled, inbox = sorted(self._cancelled), Inbox(roles=self._roles)
        return {"ended": self._counts(), "cancelled": cancelled, "is_cancelled": self.is_cancelled, INBOX: inbox}


@workflow.defn(name="flock_batch_rows")
class FlockRows:
    """Stores the rows of one chunk in its input, while it waits for its delayed start."""

    @workflow.run
    async def run(self, order: RowsOrder) -> None: ...


@workflow.defn(name="flock_forget")
class FlockDelete:
    """Deletes the workflows of a batch, and marks it as deleted while it is open."""

    @workflow.run
    async def run(self, order: DeleteOrder) -> None:
        await workflow.execute_activity(
            DELETE_ACTIVITY, order, start_to_close_timeout=timedelta(minutes=10), retry_policy=RETRY_FOREVER
        )
        await asyncio.sleep(order.keep_mark_s)


def _bytes_of(part: Part) -> int:
    waits = (*part.questions, *part.waited_for)
    return sum(len(step.result) for step in part.steps) + sum(len(msgspec.json.encode(wait)) for wait in waits)


def _fits_within(max_bytes: int) -> Callable[[Sent], bool]:
    """Return a function that says whether a message and those before it have at most *max_bytes*."""
    total = 0

    def fits(sent: Sent) -> bool:
        nonlocal total
        total += len(msgspec.json.encode(sent))
        return total <= max_bytes

    return fits


async def _settle() -> None:
    """Let tasks get the results that have arrived. A cancellation now would replace them."""
    for _ in range(8):  # more iterations of the workflow's event loop than a result needs
        await asyncio.sleep(0)


def _is_long(factor: int = 1) -> bool:
    info = workflow.info()
    events, size = info.get_current_history_length(), info.get_current_history_size()
    return events > factor * MAX_EVENTS or size > factor * MAX_BYTES

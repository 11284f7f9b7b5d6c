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
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
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
from flock.engine.runner import Runner
from flock.engine.store import RETRY_AFTER_S
from flock.errors import (
    DefinitionError,
    EngineStopped,
    FieldError,
    InvalidData,
    MalformedJSON,
    OwnershipLost,
    StoreError,
    TooLarge,
)
from flock.fair import FairShare
from flock.jsontype import escape_pointer
from flock.limits import Limits
from flock.rows.tables import Fill
from flock.runs import INVALID_INPUT, Batch, IdempotencyKey, Inputs, Items, OnInvalid, Row, Run, RunStatus, new_id, now

__all__ = ["Batches", "Intake", "as_json", "mapping_rows"]

logger = logging.getLogger("flock.runs")

#: How many errors of a batch's items are told at once.
MAX_ITEM_ERRORS = 100
#: How long the names of all kept columns of a batch may be together: they are kept with each state of the batch.
MAX_EXTRA_NAMES_CHARS = 16 * 1024
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
                active.cancel()

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
        self._total = 0
        self._agent = agent
        self._batch = batch
        self._stage = stage
        self._max_input_bytes = max_input_bytes
        self._traceparent = traceparent
        self._id_of = id_of
        self._items_a_page = items_a_page
        self._max_page_bytes = page_bytes
        #: each is reported once: one of the static inputs, or of a column, is found in every row
        self._errors: dict[Hashable, FieldError] = {}
        self._rows_with_errors = 0
        self._extra_names: dict[str, None] = {}
        self._extra_names_chars = 0
        self._failed = 0
        self._page_bytes = 0
        self._share = FairShare()

    async def read(self, items: Items, on_invalid: OnInvalid, max_items: int) -> Batch:
        """Read and check all items. Returns the batch with its numbers.

        Raises: InvalidData, once there are as many errors, or rows with errors, as are told at once; TooLarge;
            DefinitionError.
        """
        options = self._batch.options
        if options.max_workers < 1:
            raise DefinitionError(f"max_workers is at least 1, and not {options.max_workers}.")
        async for item in _each(items):
            if self._total == max_items:
                raise TooLarge(f"A batch has at most {max_items} items on this server (max_items).")
            await self._add(item, on_invalid)
        if not self._total:
            raise InvalidData([FieldError(detail="A batch has at least one item.", pointer="/batch_inputs")])
        if self._errors:
            raise self._invalid()
        return replace(
            self._batch,
            total_items=self._total,
            completed_items=self._failed,
            failed_items=self._failed,
            extra_names=tuple(self._extra_names),
        )

    async def _add(self, item: Inputs | Row, on_invalid: OnInvalid) -> None:
        if not isinstance(item, Row):
            at = f"/batch_inputs/{self._total}"
            item = Row(inputs=as_json(item, at, self._max_input_bytes), at=at)
        await self._share.checkpoint()
        extra = self._extra_of(item)
        length = len(bytes(item.inputs)) + len(bytes(extra or b""))
        if length > self._max_input_bytes:
            raise TooLarge(f"A row is longer than {self._max_input_bytes} bytes, all that one item takes.")
        errors = self._errors_of(item)
        if errors and on_invalid == "reject":
            self._add_errors(item, errors)
        if not self._errors:
            self.page.append(self._run(item, extra, errors))
            self._page_bytes += length
            if len(self.page) >= self._items_a_page(self._total) or self._page_bytes > self._max_page_bytes:
                await self._stage(self.page)
                self.page, self._page_bytes = [], 0
        self._total += 1
        await self._share.checkpoint()

    def _add_errors(self, row: Row, errors: Sequence[FieldError]) -> None:
        """Raises InvalidData."""
        for error in errors:
            member = error.pointer.removeprefix(row.at)
            is_of_column = member and error in row.errors
            self._errors.setdefault((error.detail, member) if is_of_column else error, error)
        self._rows_with_errors += 1
        if max(len(self._errors), self._rows_with_errors) >= MAX_ITEM_ERRORS:
            raise self._invalid()

    def _invalid(self) -> InvalidData:
        return InvalidData(list(self._errors.values())[:MAX_ITEM_ERRORS])

    def _extra_of(self, row: Row) -> msgspec.Raw | None:
        """What is kept of a row, as it is stored. Raises TooLarge."""
        for name in row.extra:
            if name not in self._extra_names:
                self._extra_names[name] = None
                self._extra_names_chars += len(name)
        if self._extra_names_chars > MAX_EXTRA_NAMES_CHARS:
            raise TooLarge(
                f"The names of the kept columns have more than {MAX_EXTRA_NAMES_CHARS:,} characters together. "
                'Send fewer columns, or drop those that are no input with on_extra="ignore".'
            )
        return msgspec.Raw(msgspec.json.encode(row.extra)) if row.extra else None

    def _errors_of(self, row: Row) -> Sequence[FieldError]:
        places = {error.pointer for error in row.errors}
        if row.at in places:  # the row itself could not be read
            return row.errors
        found: Sequence[FieldError] = ()
        try:
            self._agent.input.decode(row.inputs, row.at)
        except InvalidData as exc:
            sources = {escape_pointer(key): at for key, at in row.sources.items()}
            found = [_as_sent(error, row, sources) for error in exc.errors]
        except MalformedJSON as exc:
            found = [FieldError(detail=f"{exc}.", pointer=row.at)]
        return (*row.errors, *(error for error in found if error.pointer not in places))

    def _run(self, row: Row, extra: msgspec.Raw | None, errors: Sequence[FieldError]) -> Run:
        """An item, which has failed already where there are errors."""
        batch = self._batch
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
            run_id=self._id_of(self._total),
            flock=batch.flock,
            agent_name=batch.agent_name,
            inputs=row.inputs,
            created_at=batch.created_at,
            request_id=batch.request_id,
            batch_id=batch.batch_id,
            position=self._total,
            traceparent=self._traceparent,
            principal=batch.principal,
            is_async=True,
            timeout_s=batch.options.timeout_s,
            extra=extra,
            **end,
        )


def _as_sent(error: FieldError, row: Row, sources: Mapping[str, str]) -> FieldError:
    """An error of inputs with a pointer into what the client sent: names not yet mapped, gaps not yet filled.

    *sources* are those of the row, by tokens of a pointer.
    """
    name, slash, rest = error.pointer[len(row.at) + 1 :].partition("/")
    place = sources.get(name)
    pointer = error.pointer if place is None else place + slash + rest
    line = None if (place or "").startswith("/static_inputs/") else row.line
    return FieldError(detail=error.detail, pointer=pointer, line=msgspec.UNSET if line is None else line)


async def _each(items: Items) -> AsyncIterator[Inputs | Row]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def mapping_rows(
    items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], fill: Fill, max_bytes: int
) -> AsyncGenerator[Row, None]:
    """What a program has as mappings, none of them longer than *max_bytes*. Raises InvalidData, TooLarge."""
    position = 0
    async for item in _each(items):
        at = f"/batch_inputs/{position}"
        if not isinstance(item, Mapping):
            detail = f"An item is a mapping of inputs by name, and not of the type {type(item).__name__!r}."
            raise InvalidData([FieldError(detail=detail, pointer=at)])
        yield fill.row(msgspec.json.decode(as_json(item, at, max_bytes), type=dict[str, msgspec.Raw]), at)
        position += 1


def as_json(inputs: Inputs, at: str, max_bytes: int) -> msgspec.Raw:
    """A copy, so that no request's body is kept, of which a Raw is only a view. Raises InvalidData, TooLarge."""
    try:
        raw = bytes(inputs) if isinstance(inputs, msgspec.Raw) else msgspec.json.encode(dict(inputs))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidData([FieldError(detail=f"It cannot be JSON: {exc}.", pointer=at)]) from exc
    if len(raw) > max_bytes:
        raise TooLarge(f"{at} is longer than {max_bytes} bytes, all that one run takes.")
    return msgspec.Raw(raw)

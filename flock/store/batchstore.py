"""Batches and their items in a ``Database``.

An item is a row of ``runs``. Its batch records which engine owns it. Operations on many items are split into chunks of
one transaction each, so that other writes can run between them, and so that they can be resumed after a crash.
"""

import functools
import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import anyio
import msgspec
from msgspec.structs import asdict, replace

from flock.errors import StoreError
from flock.runs import INVALID_INPUT, Batch, BatchFilter, BatchOptions, Page, Run, RunStatus, stub_of
from flock.steps.outcomes import (
    CANCELLED,
    CANCELLED_BEFORE_START,
    COST_LIMIT,
    DAMAGED,
    NOT_CHOSEN,
    Outcome,
    end_of_batch,
)
from flock.steps.refusals import too_many_items
from flock.store import equals, queries, statements
from flock.store.columns import (
    Damaged,
    batch_or_remains,
    batch_values,
    json_or_null,
    micros,
    names_json,
    names_of_retriers,
    run_from,
    run_or_remains,
)
from flock.store.database import Database
from flock.store.port import BatchStore, Key, Retry, Then

#: Max items that one transaction changes. It takes tens of milliseconds.
CHUNK_SIZE = 2000
#: About how many bytes of pending items are read at once. Each batch holds that much in memory, even while it waits.
#: RECORD_BYTES is counted for each record in addition to its contents.
WORK_PAGE_BYTES = 64 * 1024
RECORD_BYTES = 1024


class SQLiteBatchStore(BatchStore):
    def __init__(self, db: Database) -> None:
        self._db = db
        self.has_dropped = anyio.Event()

    async def dropped(self) -> None:
        await self.has_dropped.wait()
        self.has_dropped = anyio.Event()

    # Accepting

    async def stage(
        self, batch: Batch, items: Sequence[Run], max_open_items: int, key: Key = None, *, is_first: bool
    ) -> None:
        count = sum(not item.status.is_final for item in items)

        def apply(db: sqlite3.Connection) -> None:
            if key is not None and db.execute(statements.FIND_KEY, (batch.flock, key.scoped_key)).fetchone():
                return
            if not is_first:
                _check_staged(db, batch)
            self._check_room(db, batch.flock, count, max_open_items)
            self._db.contents.check(*items)
            if is_first:
                db.execute(statements.INSERT_BATCH, batch_values(batch, "staged"))
            queries.insert_runs(db, equals.numbered(db, batch, items))
            db.execute(statements.COUNT_STAGED_ITEMS, (count, batch.batch_id))

        await self._db.change(apply)

    async def accept(
        self, batch: Batch, items: Sequence[Run], max_open_items: int, key: Key, then: Then[Batch], *, is_staged: bool
    ) -> None:
        def apply(db: sqlite3.Connection) -> Batch:
            queries.check_key(db, batch.flock, key)
            queries.check_engine(db, batch.owner)
            if is_staged:
                _check_staged(db, batch)
            count = batch.total_items - batch.completed_items
            self._check_room(db, batch.flock, count, max_open_items, excluded_id=batch.batch_id)
            self._db.contents.check(*items)
            if is_staged:
                db.execute(statements.DELETE_BATCH, (batch.batch_id,))
            db.execute(statements.INSERT_BATCH, batch_values(batch, None))
            queries.insert_runs(db, equals.numbered(db, batch, items))
            queries.insert_key(db, batch.flock, key, batch.batch_id, batch.created_at)
            return batch

        await self._db.change(apply, then)

    def _check_room(
        self, db: sqlite3.Connection, flock: str, more: int, max_open_items: int, excluded_id: str = ""
    ) -> None:
        """Raise EngineFull if there is no room for *more* items. Items of the batch *excluded_id* do not count."""
        values = (flock, names_json(self._db.agents), excluded_id)
        open_items = db.execute(statements.OPEN_ITEMS, values).fetchone()[0] or 0
        if open_items + more > max_open_items:
            raise too_many_items(open_items, more, max_open_items)

    # Reading

    async def get(self, batch_id: str) -> Batch | None:
        return self._db.read(lambda db: queries.find_batch(db, batch_id))

    async def page(self, flock: str, wanted: BatchFilter) -> Page[Batch]:
        values = asdict(wanted) | {"flock": flock, "limit": wanted.limit + 1}
        query = statements.batch_page([name for name in statements.BATCH_CONDITIONS if values[name] is not None])
        return self._db.read(lambda db: Page(wanted.limit, map(batch_or_remains, db.execute(query, values))))

    async def items(self, batch_id: str, after: int, limit: int, statuses: Sequence[RunStatus]) -> Page[Run]:
        values = {"batch_id": batch_id, "after": after, "limit": limit}

        def find(db: sqlite3.Connection) -> Page[Run]:
            rows = queries.rows_of(
                db, lambda columns: statements.item_page(columns, statuses), values, statements.ITEM_COLUMNS
            )
            return Page(limit, map(run_or_remains, rows))

        return self._db.read(find)

    async def pending_items(
        self,
        batch: Batch,
        after: int,
        limit: int,
        before: int | None = None,
        *,
        are_suspects: bool = False,
        have_worked: bool = False,
    ) -> list[Run]:
        values = {"batch_id": batch.batch_id, "after": after, "limit": -1}
        last = statements.MAX_POSITION if before is None else before - 1

        def find(db: sqlite3.Connection) -> list[Run]:
            current = queries.find_batch(db, batch.batch_id)
            if current is None or current.owner != batch.owner:
                return []
            statuses = [RunStatus.STARTING]
            query = functools.partial(statements.item_page, statuses=statuses, last=last)
            query = functools.partial(statements.answered_items, last=last) if have_worked else query
            rows = queries.rows_of(db, statements.suspect_items if are_suspects else query, values)
            page, bytes_left = list[Run](), WORK_PAGE_BYTES
            for row in rows:
                try:
                    item = _item_from(db, row)
                except Damaged:
                    continue
                size = item.content_bytes
                bytes_left -= RECORD_BYTES + size
                page.append(replace(stub_of(item) if size > WORK_PAGE_BYTES else item, owner=batch.owner))
                if bytes_left < 0 or len(page) == limit:
                    break
            return page

        return self._db.read(find)

    # Processing

    async def begin(self, batch: Batch, now: datetime, version: str) -> Batch:
        def apply(db: sqlite3.Connection) -> None:
            current = queries.find_batch(db, batch.batch_id)
            assert current is not None
            kept = current.completed_items - current.cancelled_items - current.invalid_items
            versions = current.versions if kept else ()
            if kept and not versions and current.started_at:  # by a version of flockapi that did not store versions
                versions = ("unknown",)
            versions = versions if versions[-1:] == (version,) else (*versions, version)
            values = {"now": micros(now), "batch_id": batch.batch_id, "versions": json_or_null(versions)}
            db.execute(statements.BEGIN_BATCH, values)

        return await self._change_own(batch, apply)

    async def end(self, batch: Batch, now: datetime, *, is_day_spent: bool = False, is_spent: bool = False) -> Batch:
        def apply(db: sqlite3.Connection) -> None:
            current = queries.find_batch(db, batch.batch_id)
            assert current is not None
            if current.waiting_items:
                return
            failed = current.failed_items + current.total_items - current.completed_items
            unpaid = (batch.batch_id, COST_LIMIT.error_type)
            others = (batch.batch_id, CANCELLED.error_type, COST_LIMIT.error_type, NOT_CHOSEN.error_type)

            def first_error() -> str:
                values = {"batch_id": batch.batch_id, "after": -1, "limit": 1}
                first = db.execute(statements.FIRST_ERROR, values).fetchone()
                return DAMAGED.error if first is None else first[0]

            status, error, error_type = end_of_batch(
                replace(current, failed_items=failed),
                first_error,
                is_cancelled=current.cancel_requested,
                is_day_spent=is_day_spent and not (current.is_spent or is_spent),
                is_unpaid=(current.is_spent or is_spent or is_day_spent)
                and db.execute(statements.HAS_UNPAID_ITEMS, unpaid).fetchone() is not None,
                stopped_by=db.execute(statements.STOPPED_BY, others).fetchone() if current.cancelled_items else None,
            )
            db.execute(statements.END_BATCH, (status.value, error, error_type, micros(now), failed, batch.batch_id))

        return await self._change_own(batch, apply)

    async def fail_unreadable(self, batch: Batch, now: datetime) -> list[tuple[str, str]]:
        unreadable = self._db.read(lambda db: _unfinished(db, batch.batch_id))
        row_ids = [row_id for row_id, _, _, is_writable in unreadable if is_writable]
        end = (DAMAGED.error, DAMAGED.error_type, micros(now))
        for start in range(0, len(row_ids), CHUNK_SIZE):
            chunk = row_ids[start : start + CHUNK_SIZE]

            def apply(db: sqlite3.Connection) -> None:
                queries.check_owner_of_batch(db, batch)
                values = [(*end, row_id) for row_id in chunk]  # noqa: B023 - called before the next
                failed = db.executemany(statements.FAIL_ITEM, values).rowcount
                queries.count_ended(db, queries.Ended({(batch.batch_id, RunStatus.FAILED): failed}))

            await self._db.change(apply)
        return [(run_id, reason) for _, run_id, reason, _ in unreadable]

    async def cancel_waiting(self, batch: Batch, now: datetime, reason: Outcome | None = None) -> bool:
        def cancel(db: sqlite3.Connection, status: RunStatus, outcome: Outcome) -> int:
            values = (outcome.error, outcome.error_type, micros(now), batch.batch_id, status.value, CHUNK_SIZE)
            return db.execute(statements.CANCEL_ITEMS, values).rowcount

        def apply(db: sqlite3.Connection) -> bool:
            queries.check_owner_of_batch(db, batch)
            pending = cancel(db, RunStatus.STARTING, reason or CANCELLED_BEFORE_START)
            db.execute(statements.CLOSE_QUESTIONS_OF_ITEMS, (batch.batch_id, RunStatus.WAITING.value, CHUNK_SIZE))
            waiting = cancel(db, RunStatus.WAITING, reason or CANCELLED)
            queries.count_ended(db, queries.Ended({(batch.batch_id, RunStatus.CANCELLED): pending + waiting}))
            db.execute(statements.COUNT_WAITING_ITEMS, (-waiting, batch.batch_id))
            return CHUNK_SIZE in (pending, waiting)

        return await self._db.change(apply)

    async def cancel_failed(self, batch: Batch, item_ids: Sequence[str]) -> None:
        def apply(db: sqlite3.Connection) -> None:
            changed = db.execute(statements.CANCEL_FAILED, (names_json(item_ids), batch.batch_id)).rowcount
            moved = {(batch.batch_id, RunStatus.FAILED): -changed, (batch.batch_id, RunStatus.CANCELLED): changed}
            queries.count_ended(db, queries.Ended(moved))

        await self._change_own(batch, apply)

    async def drop_digests(self, batch: Batch) -> Batch:
        return await self._change_own(batch, lambda db: equals.drop_digests(db, batch.batch_id, CHUNK_SIZE))

    async def take_results(self, batch: Batch, after: int, at: datetime, *, is_own: bool) -> int | None:
        def apply(db: sqlite3.Connection) -> int | None:
            queries.check_owner_of_batch(db, batch)
            return equals.take_results(db, batch, after, CHUNK_SIZE, at, is_own=is_own)

        return await self._db.change(apply)

    async def has_equal_before(self, item: Run) -> bool:
        return self._db.read(lambda db: equals.has_equal_before(db, item))

    async def reopen_some(self, batch: Batch) -> Batch:
        status, *remaining = (batch.reopening or "").split(",")
        is_again = "again" in remaining

        def apply(db: sqlite3.Connection) -> None:
            selection = (is_again, names_of_retriers(batch, None), batch.batch_id, status, INVALID_INPUT, CHUNK_SIZE)
            changed = db.execute(statements.REOPEN_ITEMS, selection).rowcount
            queries.count_ended(db, queries.Ended({(batch.batch_id, RunStatus(status)): -changed}))
            if changed < CHUNK_SIZE:
                left = None if remaining in ([], ["again"]) else ",".join(remaining)
                values = (left, batch.batch_id)
                db.execute(statements.SET_REOPENING, values)

        return await self._change_own(batch, apply)

    async def _change_own(self, batch: Batch, apply: Callable[[sqlite3.Connection], Any]) -> Batch:
        """Call *apply* if this engine still owns the batch, and return the changed batch. Raises OwnershipLost."""

        def apply_and_find(db: sqlite3.Connection) -> Batch:
            queries.check_owner_of_batch(db, batch)
            apply(db)
            return queries.check_owner_of_batch(db, batch)

        return await self._db.change(apply_and_find)

    # Requests of clients

    async def set_options(self, batch_id: str, options: BatchOptions) -> None:
        """Replace the options of a batch, from its next start or resume on. Its items keep their timeout."""
        values = (msgspec.json.encode(options), batch_id)
        await self._db.change(lambda db: db.execute(statements.SET_OPTIONS, values) and None)

    async def request_cancel(self, batch_id: str) -> bool:
        return await self._db.change(lambda db: db.execute(statements.CANCEL_BATCH, (batch_id,)).rowcount == 1)

    async def cancels_for(self, owner: str) -> Sequence[str]:
        return self._db.read(lambda db: [row[0] for row in db.execute(statements.BATCHES_TO_CANCEL, (owner,))])

    async def reopen(
        self, batch_id: str, only: Sequence[RunStatus], max_open_items: int, retry: Retry, then: Then[Batch | None]
    ) -> Batch | None:
        def apply(db: sqlite3.Connection) -> Batch | None:
            queries.check_engine(db, retry.owner)
            batch = queries.find_batch(db, batch_id)
            if batch is None or not batch.status.is_final:
                return None
            counts = {
                RunStatus.FAILED: batch.failed_items - batch.invalid_items,
                RunStatus.CANCELLED: batch.cancelled_items,
            }
            statuses = [
                status
                for status in only
                if db.execute(statements.ITEMS_TO_REOPEN, (batch_id, status, INVALID_INPUT, 1)).fetchone()
            ]
            if not statuses:
                return None
            self._check_room(db, batch.flock, sum(counts[status] for status in statuses), max_open_items)
            reopening = ",".join([*statuses, "again"] if retry.calls == "again" else statuses)
            return _reopened(db, batch, reopening, retry)

        return await self._db.change(apply, then)

    async def reopen_item(self, run: Run, retry: Retry, then: Then[Batch | None]) -> Batch | None:
        def apply(db: sqlite3.Connection) -> Batch | None:
            batch = queries.find_batch(db, run.batch_id or "")
            queries.check_engine(db, retry.owner)
            if batch is None or not batch.status.is_final:
                return None
            retriers = names_of_retriers(batch, retry.by)
            values = (retry.calls == "again", retriers, run.run_id, run.status.value, INVALID_INPUT)
            if not db.execute(statements.REOPEN_ITEM, values).rowcount:
                return None
            queries.count_ended(db, queries.Ended({(batch.batch_id, run.status): -1}))
            return _reopened(db, batch, None, retry)

        return await self._db.change(apply, then)

    # Deleting

    async def drop_staged(self, batch_id: str) -> None:
        await self._drop(lambda db: db.execute(statements.DROP_STAGED_BATCH, (batch_id,)).rowcount == 1)

    async def drop(self, batch_id: str) -> bool:
        def apply(db: sqlite3.Connection) -> bool:
            is_dropped = db.execute(statements.DROP_BATCH, (batch_id,)).rowcount == 1
            if is_dropped:  # so that the same key can create the batch again
                db.execute(statements.DELETE_KEYS_OF, (batch_id,))
            return is_dropped

        return await self._drop(apply)

    async def _drop(self, apply: Callable[[sqlite3.Connection], bool]) -> bool:
        return await self._db.change(apply, then=lambda is_dropped: self.has_dropped.set())

    async def sweep(self) -> bool:
        if self._db.read(lambda db: db.execute(statements.DROPPED_BATCH).fetchone()) is None:
            return False

        def apply(db: sqlite3.Connection) -> bool:
            row = db.execute(statements.DROPPED_BATCH).fetchone()
            return row is not None and queries.delete_items(db, row[0], CHUNK_SIZE) > 0

        return await self._db.change(apply)


def _reopened(db: sqlite3.Connection, batch: Batch, reopening: str | None, retry: Retry) -> Batch | None:
    """Open the next attempt of *batch*, and return it. *reopening*: see ``Batch``."""
    values = (retry.owner, reopening, names_of_retriers(batch, retry.by), batch.batch_id)
    db.execute(statements.REOPEN_BATCH, values)
    options = replace(batch.options, limit=None, sample=None) if retry.options is None else retry.options
    if retry.max_cost is not None:
        options = replace(options, max_cost=retry.max_cost)
    db.execute(statements.SET_OPTIONS, (msgspec.json.encode(options), batch.batch_id))
    return queries.find_batch(db, batch.batch_id)


def _check_staged(db: sqlite3.Connection, batch: Batch) -> None:
    """Raise StoreError if another engine considered this one dead and dropped its staged items."""
    if db.execute(statements.FIND_STAGED_BATCH, (batch.batch_id,)).fetchone() is None:
        raise StoreError(
            "The uploaded part of this batch was dropped because this server did not respond for a while. Upload the "
            "whole batch again."
        )


def _item_from(db: sqlite3.Connection, row: Sequence[Any]) -> Run:
    """Return an item with its steps. Raises Damaged.

    Steps are only queried for items that have been started before, since most have not. A retry resets ``started_at``
    but keeps the steps.
    """
    run = run_from(row, ())
    was_started = run.started_at is not None or run.attempt > 1
    return replace(run, steps=queries.find_steps(db, run.run_id)) if was_started else run


def _unfinished(db: sqlite3.Connection, batch_id: str) -> list[tuple[int, str, str, bool]]:
    """Return the row id of each unfinished item, its id, what is wrong with it, and whether it can be written."""
    unfinished: list[tuple[int, str, str, bool]] = []
    (has_unfinished,) = db.execute(statements.HAS_UNFINISHED_ITEMS, (batch_id,)).fetchone()
    if not has_unfinished:  # scanning all items would take long
        return unfinished
    for row_id, run_id in db.execute(statements.UNFINISHED_ITEMS, (batch_id,)).fetchall():
        reason, is_writable = "its status is neither pending nor final", True
        try:
            _item_from(db, queries.read_row(db, statements.RUN_COLUMNS, "rowid", row_id))
        except Damaged as exc:
            reason, is_writable = str(exc), exc.is_writable
        unfinished.append((row_id, (run_id or b"").decode("utf-8", "replace"), reason, is_writable))
    return unfinished

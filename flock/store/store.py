"""The store: runs, steps, engines and idempotency keys in one SQLite file. ``BatchStore`` adds batches and their items.

Writes use group commit: those that arrive while a transaction is being written share the next one. A thread writes
them, which is as fast as writing in the event loop and blocks it least (bench/writers.py). An awaited write returns
when its transaction is on disk, or raises.

Every update of a run is fenced by owner and attempt, so a process that was suspended cannot overwrite the work of the
engine that has taken over its runs.

Several processes on one host may share a file. Each locks a lock file before its transaction, because SQLite waits by
sleeping, which stalls writers for up to 180 ms.
"""

import contextlib
import functools
import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread
import msgspec
from msgspec.structs import asdict

from flock.agents.program import Program
from flock.errors import EngineFull, OwnershipLost, RunNotFound, StoreError, Unstorable
from flock.runs import Call, IdempotencyKey, Page, Queue, QueueLimits, Run, RunFilter, RunStatus, Step, Usage
from flock.scopes import start_in_empty_context
from flock.steps.outcomes import Outcome
from flock.store import files, queries, statements, takeover, waiting
from flock.store.columns import Damaged, first_id_at, json_from, micros, names_json, run_or_remains, time_from
from flock.store.groups import Change, Group, PendingRun, Refused
from flock.store.migrations import migrate
from flock.store.storefile import Displaced, StoreFile
from flock.store.suspects import Executing, executed_until_death
from flock.store.takeover import TakenOver

__all__ = ["Durability", "Store"]

T = TypeVar("T")

logger = logging.getLogger("flock.store")

#: "power": commits survive a power cut (SQLite's FULL). "process": they survive a crash of the process (NORMAL).
Durability = Literal["power", "process"]

MEMORY = ":memory:"
#: Later than any stored time, in microseconds.
MAX_TIME = 2**63 - 1
#: How many runs with expired questions one transaction changes.
EXPIRY_CHUNK_SIZE = 500
#: The delay before a failed transaction is retried, in seconds.
RETRY_AFTER_S = 1.0
#: No more work starts while more bytes of records than this wait to be written.
MAX_UNWRITTEN_BYTES = 16 * 1024 * 1024


def _unusable(action: str) -> StoreError:
    """Return the error if the store cannot be written or read. Its cause is only logged, since it has the path."""
    return StoreError(f"The store cannot be {action} now. The server's log has the reason.")


def _unstorable(reason: Exception) -> Unstorable:
    error = Unstorable("This record has a value that cannot be stored.")
    error.log_detail = str(reason)
    return error


def _page_of(flock: str, wanted: RunFilter) -> tuple[Callable[[str], str], Mapping[str, Any]]:
    """Return the query for a page of runs, as a function of the columns, and its values."""
    statuses = RunStatus if wanted.status is None else [RunStatus(wanted.status)]
    low = None if wanted.created_after is None else first_id_at(wanted.created_after, 1)
    high = None if wanted.created_before is None else first_id_at(wanted.created_before)
    values = asdict(wanted) | {"flock": flock, "low": low, "high": high, "limit": wanted.limit + 1}
    names = [name for name in statements.RUN_CONDITIONS if values[name] is not None]
    return lambda columns: statements.run_page(columns, statuses, names), values


class Store:
    """A store. It is open while its async context is entered.

    Args:
        path: of the file, which is created if it does not exist. Its folder must exist. ``":memory:"`` stores runs in
            memory only.
        durability: what a commit survives.

    Attributes:
        agents: the names of the agents whose runs are recovered and counted. ``register_engine`` sets it.
        executing: the runs that its engine is executing.

    Raises:
        StoreError: on entry, if the file cannot be used.
    """

    def __init__(self, path: str | Path = MEMORY, *, durability: Durability = "power") -> None:
        # Lock files are named after it, so it must be the same for each relative path or link to the file.
        self.path = MEMORY if str(path) == MEMORY else os.path.realpath(path)
        self.durability = durability
        self.is_shared = self.path != MEMORY
        self.agents: Collection[str] = ()
        self.executing = Executing()
        self._open = Group()
        self._unawaited: dict[str, PendingRun] = {}
        #: runs whose first record was refused and so have no row
        self._without_row: set[str] = set()
        self._queued = queries.QueuedRuns()
        self._has_work = anyio.Event()
        self._is_closing = False
        self._write_error: Exception | None = None
        self._unwritten_bytes = 0
        self._file = StoreFile(self.path)
        self._engine_lock: IO[bytes] | None = None
        self._displaced: Displaced | None = None

    # Lifecycle

    async def __aenter__(self) -> Self:
        self._open, self._has_work, self._is_closing, self._write_error = Group(), anyio.Event(), False, None
        self._displaced = None
        self._unawaited.clear()
        self._without_row.clear()
        self._queued.forget()
        self._all_written = anyio.Event()
        async with AsyncExitStack() as stack:
            self._db = stack.enter_context(contextlib.closing(self._connect()))
            if self.is_shared:
                await self._open_shared(stack)
            else:
                self._reader = self._db
                migrate(self._db, self.path)
                # Never committed: there are no other readers, and SQLite need not copy changed pages.
                self._db.execute("BEGIN")
            self._exit = stack.pop_all()
        return self

    async def _open_shared(self, stack: AsyncExitStack) -> None:
        """Lock and migrate a file that other processes may use, and start the writer."""
        stack.enter_context(self._file.open())
        self._reader = stack.enter_context(contextlib.closing(self._connect()))
        try:
            async with self._file.locked():
                migrate(self._db, self.path)
        except TimeoutError as exc:
            raise StoreError(
                f"The store {self.path!r} cannot be used: {exc}. If that process is suspended, resume or end it. "
                "Otherwise use another file (store=, --store)."
            ) from exc
        await self.data_version()  # with the first read, SQLite creates the journal
        self._file.note_identity()
        self._threads = anyio.CapacityLimiter(1)
        tasks = await stack.enter_async_context(anyio.create_task_group())
        start_in_empty_context(tasks, self._write_until_closed)

    async def __aexit__(self, *exc_info: object) -> None:
        """Write pending records, and close. Cancellation: they are written anyway."""
        self._is_closing = True
        self.flush_nowait()
        self._has_work.set()
        if self.is_shared:
            with anyio.CancelScope(shield=True):
                await self._all_written.wait()
        await self._exit.aclose()

    def _connect(self) -> sqlite3.Connection:
        db = None
        try:
            if self.is_shared:
                files.create_private(self.path)
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(f"PRAGMA synchronous = {'FULL' if self.durability == 'power' else 'NORMAL'}")
        except (sqlite3.Error, OSError) as exc:
            if db is not None:
                db.close()
            remedy = "Restore it, or use another file (store=, --store)."
            if isinstance(exc, sqlite3.OperationalError | OSError):
                remedy = (
                    "Use another file (store=, --store) in a writable folder, or store runs in memory only with "
                    "':memory:'."
                )
            raise StoreError(f"The store {self.path!r} cannot be opened: {exc}. {remedy}") from exc
        return db

    @property
    def is_public(self) -> bool:
        """Whether every user of the machine can read the file."""
        return self.is_shared and bool(self._file.mode & 0o004)

    # Writing

    def save_nowait(self, run: Run, step: Step | None = None, *, is_new: bool = False) -> None:
        """Write *run*, and *step* if its last step is new, at the next ``flush_nowait``.

        Later records of the run replace this one until then, so a short run is written only once, when it ends.
        """
        pending = self._open.runs.get(run.run_id) or self._unawaited.get(run.run_id)
        if pending is None:
            pending = self._unawaited[run.run_id] = PendingRun(run, is_new or run.run_id in self._without_row)
            self._without_row.discard(run.run_id)
        pending.add(run, step)

    def discard(self, run_id: str) -> None:
        """Stop tracking a run that was refused and will not be saved again."""
        self._without_row.discard(run_id)

    def flush_nowait(self) -> None:
        """Start to write the records of ``save_nowait``."""
        if self._unawaited:
            self._open.runs |= self._unawaited
            self._unawaited.clear()
            self._has_work.set()

    async def save(self, run: Run, step: Step | None = None, *, is_new: bool = False, shield: bool = False) -> None:
        """Write *run* like ``save_nowait``, and return when it is on disk.

        Raises:
            StoreError: it is not on disk yet. The write will be retried.
            Unstorable: it can never be written.
            OwnershipLost: another engine owns the run now, or the run is in another attempt.

        Cancellation: it is written anyway. With *shield*, this returns when it is on disk nevertheless.
        """
        self.save_nowait(run, step, is_new=is_new)
        group, pending = self._open, self._unawaited.pop(run.run_id, None)
        if pending is not None:
            group.runs[run.run_id] = pending
        size = run.exchange_bytes
        self._unwritten_bytes += size
        try:
            await self._written(group, shield=shield)
        finally:
            self._unwritten_bytes -= size
        if run.run_id in group.lost:
            raise OwnershipLost(run.run_id)
        if (reason := group.refused.get(run.run_id)) is not None:
            raise _unstorable(reason) from reason

    async def change(self, apply: Callable[[sqlite3.Connection], T], then: Callable[[T], None] | None = None) -> T:
        """Call *apply* in the next transaction, in any thread, and return its result when its writes are on disk.

        Exceptions of *apply* are raised here. It must not write anything before it raises a FlockError. After any other
        exception its writes are undone, and it may be called a second time.

        Raises:
            StoreError: the transaction failed, or *apply* found a damaged row.
            Unstorable: SQLite does not accept one of the values.

        Cancellation: it is written anyway, and *then* is called with the result of *apply* after the commit.
        """
        self.flush_nowait()  # *apply* may depend on these records
        group, change = self._open, Change(apply, then)
        group.changes.append(change)
        await self._written(group)
        if isinstance(change.error, Damaged):
            raise self._unreadable(change.error) from change.error
        if isinstance(change.error, sqlite3.Error | ArithmeticError | TypeError | ValueError):
            raise _unstorable(change.error) from change.error
        if change.error is not None:
            raise change.error
        result: T = change.result
        return result

    @property
    def is_writable(self) -> bool:
        """Whether the last transaction succeeded and the file is the one that was opened."""
        return self._write_error is None and self._displaced is None

    def check_writable(self) -> None:
        """Raise StoreError if the store is not writable. A failed transaction is retried every second."""
        if problem := self._write_error or self._displaced:
            raise _unusable("written") from problem

    def is_behind(self) -> bool:
        """Whether many bytes wait to be written. Raises StoreError if the store is not writable."""
        self.check_writable()
        return self._unwritten_bytes > MAX_UNWRITTEN_BYTES

    async def catch_up(self) -> None:
        """Return when everything that waits now is written. Raises StoreError."""
        await self._written(self._open)

    # The file

    @property
    def is_displaced(self) -> bool:
        """Whether the last ``check_file`` found that the file was removed, replaced or upgraded."""
        return self._displaced is not None

    def check_file(self) -> None:
        """Check that the file was not removed, replaced or upgraded. If it was, ``read`` raises StoreError."""
        problem: Displaced | None = None
        try:
            self._file.check(self._reader)
        except (sqlite3.Error, Displaced) as exc:
            problem = exc if isinstance(exc, Displaced) else Displaced(str(exc))
        before, self._displaced = self._displaced, problem
        if self._displaced is not None and before is None:
            logger.error("%s Until then every request that needs the store gets status 503.", self._displaced)
        elif self._displaced is None and before is not None:
            logger.warning("The store %s is back in place.", self.path)

    async def _written(self, group: Group, *, shield: bool = False) -> None:
        if self.is_shared:
            if self._all_written.is_set():  # the event loop is ending, and the writer was cancelled with it
                raise StoreError("The store is closed.")
            self._has_work.set()
            try:
                await group.is_written.wait()
            except anyio.get_cancelled_exc_class():
                if not shield:
                    raise
                with anyio.CancelScope(shield=True):  # only now, since each scope takes as long as writing a run
                    await group.is_written.wait()
                if self._all_written.is_set():  # the event loop is ending
                    raise
        else:
            self._write_in_memory()
        if group.error is not None:
            raise _unusable("written") from group.error

    def _write_in_memory(self) -> None:
        """Write a group immediately, since there is no disk to wait for and there are no other writers."""
        group, self._open = self._open, Group()
        group.write_separately(self._db, self._without_row)
        group.run_callbacks()

    async def _write_until_closed(self) -> None:
        """Write groups until the store closes. Ignore cancellation by the host, so that accepted work is written."""
        try:
            with anyio.CancelScope(shield=True):
                await self._write_groups()
        finally:  # also if the event loop cancels all tasks, even shielded ones
            self._all_written.set()
            self._open.error = OSError("the event loop has ended")
            self._open.is_written.set()

    async def _write_groups(self) -> None:
        while True:
            await self._has_work.wait()
            await anyio.lowlevel.checkpoint()  # so that tasks that are about to write share the transaction
            group, self._open, self._has_work = self._open, Group(), anyio.Event()
            if self._is_closing and not group.runs and not group.changes:
                return
            try:
                await self._transact(group)
                self._write_error = None
                group.run_callbacks()
            except (sqlite3.Error, OSError) as exc:
                if str(exc) != str(self._write_error):  # it is retried every second, but logged once
                    logger.error("The store %s cannot be written: %s", self.path, exc)
                self._write_error = group.error = exc
            except BaseException:
                group.error = OSError("the event loop has ended")
                raise
            finally:
                group.is_written.set()
            if self._is_closing:
                self._has_work.set()
            elif group.error is not None:
                self._requeue(group)
                self._has_work.set()  # even without records, to detect when the store is writable again
                await anyio.sleep(RETRY_AFTER_S)
            group.runs.clear()  # the writer thread holds the group until the next one
            group.changes.clear()

    def _requeue(self, group: Group) -> None:
        """Add the runs of a failed group to the next one, with the newest record of each."""
        for run_id, pending in group.runs.items():
            newer = self._unawaited.pop(run_id, None) or self._open.runs.get(run_id)
            if newer is not None:
                pending.run = newer.run
                pending.steps |= newer.steps
            self._open.runs[run_id] = pending

    async def _transact(self, group: Group) -> None:
        async with self._file.locked():
            await anyio.to_thread.run_sync(self._write, group, limiter=self._threads)

    def _write(self, group: Group) -> None:
        """Write a group in one transaction. If a record is refused, write the others in a second transaction."""
        try:
            self._write_once(functools.partial(group.write_together, self._db))
        except Refused:
            self._write_once(functools.partial(group.write_separately, self._db, self._without_row))

    def _write_once(self, write: Callable[[], None]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        self._queued.forget()
        try:
            self._file.check(self._db)
            if self._write_error is not None:  # an empty transaction would always succeed
                self._db.execute(statements.TOUCH_ENGINES)
            write()
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise
        self._file.check(self._db)  # a commit to a removed file is lost

    # Reading

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Call *query* with a connection that sees committed data, and return its result. Raises StoreError."""
        if not self.is_shared and (self._unawaited or self._open.runs):
            self.flush_nowait()
            self._write_in_memory()
        if self._displaced is not None:
            raise _unusable("read") from self._displaced
        try:
            return query(self._reader)
        except sqlite3.Error as exc:
            raise self._unreadable(exc) from exc

    def _unreadable(self, exc: sqlite3.Error) -> StoreError:
        logger.error("the store %s cannot be read: %s", self.path, exc)
        return _unusable("read")

    async def data_version(self) -> int:
        """Return a number that changes with each commit of any process."""
        version: int = self.read(lambda db: db.execute("PRAGMA data_version").fetchone()[0])
        return version

    async def get_run(self, run_id: str) -> Run | None:
        return self.read(lambda db: queries.find_run(db, run_id))

    async def outline(self, run_id: str) -> Run | None:
        """Return a stub of a run: with ``{}`` in place of its inputs and results, which are not read."""
        return self.read(lambda db: queries.find_run(db, run_id, is_outline=True))

    async def is_of(self, run_id: str, principal: str) -> bool:
        """Return whether there is such a run of *principal*. Nothing long is read."""
        values = (run_id, principal, principal)
        return self.read(lambda db: db.execute(statements.IS_OF_PRINCIPAL, values).fetchone()) is not None

    async def input_bytes(self, run_id: str) -> int:
        """Return the length of the inputs of a run, which are not read, or 0 if there is no such run."""
        row = self.read(lambda db: db.execute(statements.INPUT_BYTES, (run_id,)).fetchone())
        return 0 if row is None else row[0]

    async def version(self, run_id: str) -> tuple[Any, ...] | None:
        """Return a value that changes when the outline of a run changes. Reading it takes a few microseconds."""
        version: tuple[Any, ...] | None
        version = self.read(lambda db: db.execute(statements.VERSION, (run_id,)).fetchone())
        return version

    async def calls(self, run: Run, position: int, after_row: int = 0) -> Sequence[tuple[int, Call]]:
        """Return a page of the finished calls of a step, with their rows. Raises StoreError."""
        return self.read(lambda db: queries.find_calls(db, run, position, after_row))

    async def active_before(self, run: Run) -> str | None:
        """Return the id of the last run of its session that was accepted before *run* and has not ended, or None."""
        values = (run.flock, run.session_id, run.principal, run.run_id)
        row = self.read(lambda db: db.execute(statements.ACTIVE_BEFORE, values).fetchone())
        return None if row is None else row[0]

    async def earlier_runs(self, run: Run, limit: int, max_bytes: int) -> Sequence[Run]:
        """Return completed runs of the session and the agent of *run*; see ``queries.earlier_runs``."""
        return self.read(lambda db: queries.earlier_runs(db, run, limit, max_bytes))

    async def result_bytes(self, run_id: str, position: int | None) -> int:
        """Return the length of the result of a run or of its step at *position*. Raises RunNotFound, StoreError."""
        return self._with_result(run_id, position, len)

    async def read_result(self, run_id: str, position: int | None, start: int, length: int) -> bytes:
        """Return up to *length* bytes of the result of a run or of its step at *position*.

        Raises: RunNotFound, StoreError.
        """

        def read(result: sqlite3.Blob) -> bytes:
            result.seek(start)
            return result.read(length)

        return self._with_result(run_id, position, read)

    async def short_result(self, run_id: str, position: int | None) -> msgspec.Raw:
        """Return a result as a whole, if it is not damaged. Raises RunNotFound, StoreError."""
        return self._with_result(run_id, position, lambda result: json_from(result.read()))

    def _with_result(self, run_id: str, position: int | None, use: Callable[[sqlite3.Blob], T]) -> T:
        table, query, values = "runs", statements.ROW_OF_RUN, (run_id,) if position is None else (run_id, position)
        if position is not None:
            table, query = "steps", statements.ROW_OF_STEP

        def find(db: sqlite3.Connection) -> T:
            row = db.execute(query, values).fetchone()
            if row is None:
                raise RunNotFound(run_id)
            with db.blobopen(table, "result", row[0], readonly=True) as blob:
                return use(blob)

        return self.read(find)

    async def list_runs(self, flock: str, wanted: RunFilter) -> Page[Run]:
        """Return one page of runs that are not items, newest first, without steps. A damaged run has an ``error``."""
        columns = statements.list_columns(wanted.with_inputs, wanted.with_results)
        query, values = _page_of(flock, wanted)
        return self.read(
            lambda db: Page(wanted.limit, map(run_or_remains, queries.rows_of(db, query, values, columns)))
        )

    async def spent(self, flock: str, wanted: RunFilter) -> Sequence[tuple[str, Usage | None]]:
        """Return the ids of one page of runs, and what each has spent; see ``queries.find_spent``."""
        query, values = _page_of(flock, wanted)
        return self.read(lambda db: queries.find_spent(db, query(statements.SPENT_COLUMNS), values))

    async def queue(self, flock: str) -> Queue:
        """Return the queue of runs for ``agents``, without items. Retried runs do not count for its age."""
        values = (flock, names_json(self.agents))
        depth, oldest = self.read(lambda db: db.execute(statements.QUEUE, values).fetchone())
        (waiting,) = self.read(lambda db: db.execute(statements.COUNT_WAITING, values).fetchone())
        return Queue(depth, time_from(oldest), waiting)

    async def last_id(self) -> str | None:
        """Return the id of the newest run."""
        newest: str | None = self.read(lambda db: db.execute(statements.NEWEST_ID).fetchone()[0])
        return newest

    # Changing runs: each method is one transaction

    async def accept(
        self,
        run: Run,
        limits: QueueLimits,
        key: IdempotencyKey | None,
        then: Callable[[Run], None] | None = None,
        *,
        full: EngineFull | None = None,
    ) -> None:
        """Write a new run, if there is room for it, and call *then* with it.

        Args:
            full: raised unless the request is a replay.

        Raises:
            Replayed: the same request was accepted under this key before. This takes precedence over limits.
            KeyReused: the key was used for another request.
            EngineStopped: its engine has shut down.
            EngineFull: too many runs of ``agents``, or of its principal, are queued, in all processes together.
        """

        def apply(db: sqlite3.Connection) -> Run:
            queries.check_key(db, run.flock, key)
            queries.check_engine(db, run.owner)
            if full is not None:
                raise full
            self._queued.check_room(db, run.flock, self.agents, run.principal, limits)
            self._queued.insert(db, run, key)
            return run

        await self.change(apply, then)

    async def shown_calls(self, run_id: str) -> Mapping[int, Sequence[Call]]:
        """Return the calls of a run for people to see; see ``Engine.get_calls``. Raises StoreError."""
        return self.read(lambda db: queries.find_shown_calls(db, run_id))

    async def next_calls(
        self, run_id: str, position: int, tries: int | None, number: int, after_row: int
    ) -> Sequence[tuple[int, Call]]:
        """Return a page of calls of a step for people to see, with their rows; see ``queries.find_next_calls``."""
        return self.read(lambda db: queries.find_next_calls(db, run_id, position, tries, number, after_row))

    async def save_call(self, run: Run, position: int, call: Call) -> None:
        """Write a finished call of a step; on return it is on disk. Raises StoreError, Unstorable, OwnershipLost."""
        await self.change(lambda db: queries.write_call(db, run, position, call))

    async def suspend(self, run: Run, then: Callable[[bool], None]) -> None:
        """Write *run*, which begins to wait, and call *then* with whether it does: it was not cancelled meanwhile.

        Raises StoreError, Unstorable, OwnershipLost.
        """
        await self.change(lambda db: waiting.suspend(db, run), then)

    async def answer(
        self,
        run_id: str,
        call_id: str,
        output: msgspec.Raw,
        owner: str,
        now: datetime,
        then: Callable[[Run | None], None],
    ) -> Run | None:
        """Answer a question. Return a stub of the run if it is ready to start, and call *then* with it; or None.

        Raises the same as ``Engine.answer_call``.
        """
        return await self.change(lambda db: waiting.answer(db, run_id, call_id, output, owner, now), then)

    async def end_waiting(self, run: Run, outcome: Outcome, now: datetime) -> bool:
        """End a waiting run. Returns False if it is no longer waiting."""
        return await self.change(lambda db: waiting.end(db, run, outcome, now))

    async def expire(self, flock: str, owner: str, now: datetime, then: Callable[[Sequence[Run]], None]) -> None:
        """Answer questions that have expired with their defaults, and end the other runs. Call *then* with the runs."""
        values = (flock, micros(now))
        expired = self.read(lambda db: [row[0] for row in db.execute(statements.EXPIRED_RUNS, values)])
        for start in range(0, len(expired), EXPIRY_CHUNK_SIZE):
            run_ids = expired[start : start + EXPIRY_CHUNK_SIZE]
            await self.change(functools.partial(waiting.expire, run_ids, self.agents, owner, now), then)

    async def request_cancel(self, run_id: str) -> bool:
        """Request the owner of a run to cancel it. Returns False if the run is not active."""
        return await self.change(lambda db: db.execute(statements.CANCEL_RUN, (run_id,)).rowcount == 1)

    async def reopen(
        self,
        run: Run,
        owner: str,
        limits: QueueLimits,
        then: Callable[[Run | None], None],
        max_cost: float | None = None,
    ) -> Run | None:
        """Open the next attempt of *run*, with this *max_cost* if it is given.

        Returns None if it neither failed nor was cancelled.

        Raises EngineFull, EngineStopped.
        """

        def apply(db: sqlite3.Connection) -> Run | None:
            queries.check_engine(db, owner)
            self._queued.check_room(db, run.flock, self.agents, run.principal, limits)
            is_reopened = db.execute(statements.REOPEN_RUN, (owner, run.run_id)).rowcount == 1
            if is_reopened and max_cost is not None:
                db.execute(statements.SET_MAX_COST, (max_cost, run.run_id))
            return queries.find_run(db, run.run_id) if is_reopened else None

        return await self.change(apply, then)

    async def delete_run(self, run_id: str) -> bool:
        """Delete a final run that is not an item. Returns False if there is no such run."""

        def apply(db: sqlite3.Connection) -> bool:
            is_deleted = queries.delete_runs(db, [run_id]) == 1
            if is_deleted:  # so that the same key can create the run again
                db.execute(statements.DELETE_KEYS_OF, (run_id,))
            return is_deleted

        return await self.change(apply)

    async def delete_old(
        self, flock: str, before: datetime | None, keep_runs: int | None, limit: int, kept: Collection[str] = ()
    ) -> int:
        """Delete up to *limit* final runs that ended before *before*, or are beyond the newest *keep_runs*.

        A batch counts as one run. It is dropped as a whole, and its items are deleted later by ``BatchStore.sweep``.

        Args:
            kept: ids of runs and batches to skip. The collection is read in the transaction.
        """

        def apply(db: sqlite3.Connection) -> int:
            bounds = [(first_id_at(before), micros(before))] if before is not None else []
            if keep_runs is not None:
                row = db.execute(statements.NTH_NEWEST, {"flock": flock, "offset": max(0, keep_runs - 1)}).fetchone()
                bounds += [(row[0], MAX_TIME)] if row is not None else []
            deleted = 0
            for bound, latest in bounds:
                values = {"flock": flock, "bound": bound, "latest": latest, "limit": limit, "kept": names_json(kept)}
                deleted += queries.delete_runs(db, [run_id for (run_id,) in db.execute(statements.OLD_RUNS, values)])
                deleted += db.execute(statements.DROP_OLD_BATCHES, values).rowcount
            return deleted

        return await self.change(apply)

    async def delete_old_keys(self, before: datetime) -> None:
        await self.change(lambda db: db.execute(statements.DELETE_OLD_KEYS, (micros(before),)) and None)

    async def cancels_for(self, owner: str) -> list[tuple[str, int]]:
        """Return runs of *owner*, and items of its batches, with a cancellation request, and their attempts."""
        return self.read(lambda db: db.execute(statements.RUNS_TO_CANCEL, (owner, owner)).fetchall())

    async def ended(self, ids: Iterable[str]) -> list[str]:
        """Return those of *ids* whose run or batch is final or deleted."""
        ids_json = msgspec.json.encode(list(ids)).decode()
        return self.read(lambda db: [row[0] for row in db.execute(statements.ENDED, (ids_json,))])

    # Engines

    async def register_engine(
        self, engine_id: str, flock: str, agents: Collection[str], program: Program | None = None
    ) -> Program:
        """Register an engine, with a lock file that marks it as alive. The kernel frees the lock if the process dies.

        Args:
            agents: the names of the engine's agents. More may be added to the collection later.

        Returns: the program of the previously started engine of this flock.
        """
        self.agents = agents
        if self.is_shared:
            self._engine_lock = files.acquire_lock(f"{self.path}-engine-{engine_id}", self._file.mode)
            self.executing.open(self._engine_lock)

        def apply(db: sqlite3.Connection) -> Program:
            row = db.execute(statements.PROGRAM_OF_FLOCK, (flock,)).fetchone()
            db.execute(statements.SET_PROGRAM_OF_FLOCK, (flock, msgspec.json.encode(program or Program()).decode()))
            return Program() if row is None else Program.from_json(row[0])

        await self._insert_engine(engine_id, flock)
        return await self.change(apply)

    async def unfinished_of_other_flocks(self, flock: str) -> Mapping[str, int]:
        """Return the numbers of unfinished runs and batches of flocks with other names, by name."""

        def find(db: sqlite3.Connection) -> Mapping[str, int]:
            others = [name for (name,) in db.execute(statements.OTHER_FLOCKS, (flock,)).fetchall()]
            counts = {name: db.execute(statements.COUNT_UNFINISHED, {"flock": name}).fetchone()[0] for name in others}
            return {name: number for name, number in counts.items() if number}

        return self.read(find)

    async def renew_registration(self, engine_id: str, flock: str) -> bool:
        """Register an engine again if its row or lock file is missing. Returns False if its runs were taken over.

        That happens if its lock file was removed. An engine that takes over removes the file before the row, so a file
        that is created after the row was found missing is not removed.
        """
        is_known = self.read(lambda db: db.execute(statements.FIND_ENGINE, (engine_id,)).fetchone()) is not None
        path = f"{self.path}-engine-{engine_id}"
        if not is_known or not files.is_locked(path):
            files.close_lock(self._engine_lock)
            self._engine_lock = files.acquire_lock(path, self._file.mode)
            self.executing.open(self._engine_lock)
        if not is_known:
            await self._insert_engine(engine_id, flock)
        return is_known

    async def _insert_engine(self, engine_id: str, flock: str) -> None:
        values = (engine_id, flock, micros(datetime.now(UTC)))
        await self.change(lambda db: db.execute(statements.INSERT_ENGINE, values) and None)

    async def unregister_engine(self, engine_id: str) -> None:
        """Unregister an engine and close its lock file. If it has unfinished work, its row stays for another engine."""
        self.executing.forget()
        try:
            if await self.change(lambda db: takeover.remove_engine(db, engine_id)) and self.is_shared:
                files.remove(f"{self.path}-engine-{engine_id}")
        finally:
            if self.is_shared:
                files.close_lock(self._engine_lock)

    async def dead_engines(self, flock: str, own_id: str) -> list[str]:
        """Return the engines of this flock whose process has ended."""
        others = self.read(lambda db: [row[0] for row in db.execute(statements.OTHER_ENGINES, (flock, own_id))])
        return [engine_id for engine_id in others if not files.is_locked(f"{self.path}-engine-{engine_id}")]

    async def may_have_suspects(self, engine_id: str) -> bool:
        """Whether unfinished work of an engine was running in a death before, so that it may have killed it."""
        values = (engine_id, engine_id)
        return self.read(lambda db: db.execute(statements.MAY_HAVE_SUSPECTS, values).fetchone()) is not None

    async def take_over(
        self, dead_id: str, owner: str, now: datetime, only: str | None = None, max_recoveries: int = 3
    ) -> TakenOver:
        """Make *owner* the owner of the unfinished work of *dead_id* for ``agents``.

        Runs and batches with a cancellation request are taken over even without their agent. Synchronous runs end as
        interrupted, since their callers are gone. Work that cannot be read ends as failed. The rest stays for a program
        that has its agent. A run that was executed in *max_recoveries* deaths, in two of them alone, ends as crashed.

        Args:
            only: the id of a run or a batch. If given, all other work is ignored.
        """
        # In a thread, since there may be many long runs.
        unfinished = await anyio.to_thread.run_sync(
            self.read, lambda db: takeover.find_unfinished(db, dead_id, self.agents, only)
        )

        executed = executed_until_death(f"{self.path}-engine-{dead_id}")

        def apply(db: sqlite3.Connection) -> TakenOver:
            taken = takeover.take_over(db, unfinished, dead_id, owner, now, executed, max_recoveries)
            if taken.is_complete:
                files.remove(f"{self.path}-live-{dead_id}")
                files.remove(f"{self.path}-engine-{dead_id}")  # before the commit; see renew_registration
            return taken

        return await self.change(apply)

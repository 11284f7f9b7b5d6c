"""An SQLite file: its connections, and groups of writes.

Writes use group commit: those that arrive while a transaction is being written share the next one. A thread writes
them, which is as fast as writing in the event loop and blocks it least (bench/writers.py). An awaited write returns
when its transaction is on disk, or raises.

Several processes on one host may share a file. Each locks a lock file before its transaction, because SQLite waits by
sleeping, which stalls writers for up to 180 ms.
"""

import contextlib
import functools
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal, Self, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import anyio.to_thread

from flock.errors import OwnershipLost, StoreError, Unstorable
from flock.runs import Run, Step, new_id
from flock.scopes import start_in_empty_context
from flock.store import files, queries, statements
from flock.store.columns import Damaged
from flock.store.contents import Contents
from flock.store.groups import SQLITE_ERRORS, Change, Group, PendingRun, Refused, reason_of
from flock.store.migrations import migrate
from flock.store.port import RETRY_AFTER_S, DamagedRecord
from flock.store.storefile import LOCK_INTERVAL_S, LOCK_TIMEOUT_S, Displaced, StoreFile

T = TypeVar("T")

logger = logging.getLogger("flock.store")

#: "power": commits survive a power cut (SQLite's FULL). "process": they survive a crash of the process (NORMAL).
Durability = Literal["power", "process"]

MEMORY = ":memory:"
#: No more work starts while more bytes of records than this wait to be written.
MAX_UNWRITTEN_BYTES = 16 * 1024 * 1024


def _unusable(action: str) -> StoreError:
    """Return the error if the store cannot be written or read. Its cause is only logged, since it has the path."""
    return StoreError(f"The store cannot be {action} now. The server's log has the reason.")


def _unstorable(reason: Exception) -> Unstorable:
    error = Unstorable("This record has a value that cannot be stored.")
    error.log_detail = str(reason)
    return error


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch on WAL. SQLite itself does not wait here while another process opens or closes the file."""
    give_up_at = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as exc:
            if not exc.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > give_up_at:
                raise
            time.sleep(LOCK_INTERVAL_S)


class Database:
    """A file, or a database in memory. It is open while its async context is entered.

    Methods without a docstring: see ``flock.store.port.Store``.

    Attributes:
        agents: the names of the agents whose runs are recovered and counted. ``register_engine`` sets it.
    """

    def __init__(self, path: str | Path = MEMORY, *, durability: Durability = "power") -> None:
        # Lock files are named after it, so it must be the same for each relative path or link to the file.
        self.path = MEMORY if str(path) == MEMORY else os.path.realpath(path)
        self.durability = durability
        self.is_shared = self.path != MEMORY
        self.agents: Collection[str] = ()
        self._unwritten_bytes = 0
        self._file = StoreFile(self.path)
        place = self.path if self.is_shared else os.path.join(tempfile.gettempdir(), f"flock-{new_id()}")
        self.contents = Contents(Path(f"{place}-files"))
        self._reset()

    # Lifecycle

    def _reset(self) -> None:
        """Create the state that is bound to one event loop, such as events."""
        self._open, self._has_work, self._all_written = Group(), anyio.Event(), anyio.Event()
        self._unawaited: dict[str, PendingRun] = {}
        #: runs whose first record was refused and so have no row
        self._without_row: set[str] = set()
        self._queued = queries.QueuedRuns()
        self._is_closing = False
        self._write_error: Exception | None = None
        self._displaced: Displaced | None = None

    async def __aenter__(self) -> Self:
        self._reset()
        async with AsyncExitStack() as stack:
            self._db = stack.enter_context(contextlib.closing(self._connect()))
            if self.is_shared:
                try:
                    await self._open_shared(stack)
                except OSError as exc:
                    raise self._not_opened(exc) from exc
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
        try:
            if self.is_shared:
                with anyio.CancelScope(shield=True):
                    await self._all_written.wait()
        finally:  # asyncio cancels a task in spite of the shield
            await self._exit.aclose()
            if not self.is_shared:
                shutil.rmtree(self.contents.root, ignore_errors=True)

    def _connect(self) -> sqlite3.Connection:
        db = None
        try:
            if self.is_shared:
                files.create_private(self.path)
            db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
            _use_wal(db)
            db.execute(f"PRAGMA synchronous = {'FULL' if self.durability == 'power' else 'NORMAL'}")
        except (*SQLITE_ERRORS, OSError) as exc:
            if db is not None:
                db.close()
            raise self._not_opened(exc) from exc
        return db

    def _not_opened(self, exc: Exception) -> StoreError:
        remedy = "Restore it, or use another file (store=, --store)."
        if isinstance(exc, sqlite3.OperationalError | OSError):
            remedy = (
                "Use another file (store=, --store) in a writable folder, or store runs in memory only with ':memory:'."
            )
        return StoreError(f"The store {self.path!r} cannot be opened: {reason_of(exc)}. {remedy}")

    @property
    def is_public(self) -> bool:
        return self.is_shared and bool(self._file.mode & 0o004)

    def lock_of(self, engine_id: str) -> str:
        """Return the path of the file that an engine has locked."""
        return f"{self.path}-engine-{engine_id}"

    # Writing

    def save_nowait(self, run: Run, step: Step | None = None, *, is_new: bool = False) -> None:
        pending = self._open.runs.get(run.run_id) or self._unawaited.get(run.run_id)
        if pending is None:
            pending = self._unawaited[run.run_id] = PendingRun(run, is_new or run.run_id in self._without_row)
            self._without_row.discard(run.run_id)
        pending.add(run, step)

    def discard(self, run_id: str) -> None:
        self._without_row.discard(run_id)

    def flush_nowait(self) -> None:
        if self._unawaited:
            self._open.runs |= self._unawaited
            self._unawaited.clear()
            self._has_work.set()

    async def save(self, run: Run, step: Step | None = None, *, is_new: bool = False, shield: bool = False) -> None:
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
        try:
            if isinstance(change.error, Damaged):
                raise self._unreadable(change.error) from change.error
            if isinstance(change.error, OSError):  # it has to remove a file
                raise _unusable("written") from change.error
            if isinstance(change.error, sqlite3.Error | ArithmeticError | TypeError | ValueError):
                raise _unstorable(change.error) from change.error
            if change.error is not None:
                raise change.error
        finally:
            change.error = None  # its traceback refers to the change
        result: T = change.result
        return result

    @property
    def is_writable(self) -> bool:
        return self._write_error is None and self._displaced is None

    def check_writable(self) -> None:
        if problem := self._write_error or self._displaced:
            raise _unusable("written") from problem

    def is_behind(self) -> bool:
        self.check_writable()
        return self._unwritten_bytes > MAX_UNWRITTEN_BYTES

    async def catch_up(self) -> None:
        await self._written(self._open)

    # The file

    @property
    def is_displaced(self) -> bool:
        return self._displaced is not None

    async def check_file(self) -> None:
        problem: Displaced | None = None
        try:
            self._file.check(self._reader)
        except (*SQLITE_ERRORS, Displaced) as exc:
            problem = (
                exc if isinstance(exc, Displaced) else Displaced(f"{self.path!r} cannot be read: {reason_of(exc)}.")
            )
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
            except (*SQLITE_ERRORS, OSError, RuntimeError) as exc:  # the last one: no thread can be started
                if str(exc) != str(self._write_error):  # it is retried every second, but logged once
                    logger.error("The store %s cannot be written: %s", self.path, reason_of(exc))
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
        finally:  # in this thread, so that other processes do not wait until the event loop has time
            self._file.unlock()

    def _write_once(self, write: Callable[[], None]) -> None:
        if self._db.in_transaction:  # its rollback has failed
            self._db.execute("ROLLBACK")
        self._db.execute("BEGIN IMMEDIATE")
        self._queued.forget()
        try:
            self._file.check(self._db)
            if self._write_error is not None:  # an empty transaction would always succeed
                self._db.execute(statements.TOUCH_ENGINES)
            write()
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(*SQLITE_ERRORS):
                self._db.execute("ROLLBACK")
            raise
        self._file.check_in_place()  # a commit to a removed file is lost

    # Reading

    async def read_in_thread(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Like ``read``, in a thread, with a connection of its own: for a query that takes long."""
        if not self.is_shared:
            return self.read(query)

        def find(_: sqlite3.Connection) -> T:
            # It must not create the file, if that was removed a moment ago.
            with contextlib.closing(sqlite3.connect(f"{Path(self.path).as_uri()}?mode=ro", uri=True)) as db:
                return query(db)

        return await anyio.to_thread.run_sync(self.read, find)

    def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Call *query* with a connection that sees committed data, and return its result. Raises StoreError."""
        if not self.is_shared and (self._unawaited or self._open.runs):
            self.flush_nowait()
            self._write_in_memory()
        if self._displaced is not None:
            raise _unusable("read") from self._displaced
        try:
            return query(self._reader)
        except SQLITE_ERRORS as exc:
            raise self._unreadable(exc) from exc

    def _unreadable(self, exc: Exception) -> StoreError:
        logger.error("the store %s cannot be read: %s", self.path, reason_of(exc))
        error = _unusable("read")
        if isinstance(exc, Damaged):
            error = DamagedRecord(*error.args)
            error.is_writable = exc.is_writable
        return error

    async def data_version(self) -> int:
        version: int = self.read(lambda db: db.execute("PRAGMA data_version").fetchone()[0])
        return version

"""Group commit: writes of the store that share one transaction."""

import asyncio
import contextlib
import functools
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import anyio
import msgspec

from flock.errors import FlockError
from flock.runs import Run, Step
from flock.scopes import new_event
from flock.store import queries
from flock.store.columns import Damaged, steps_with_rows

logger = logging.getLogger("flock.store")


class PendingRun(msgspec.Struct):
    """The latest record of one run, and the steps that were added since the last write."""

    run: Run
    is_new: bool
    steps: dict[int, Step] = {}

    def add(self, run: Run, step: Step | None) -> None:
        self.run = run
        if step is not None:
            self.steps[len(run.steps) - 1] = step


class Change(msgspec.Struct):
    """A function that is called inside the transaction, its outcome, and a callback for after the commit."""

    apply: Callable[[sqlite3.Connection], Any]
    then: Callable[[Any], None] | None
    result: Any = None
    error: Exception | None = None


#: Errors that concern the values of one record, or one damaged row, and not the store as a whole.
RECORD_ERRORS = (sqlite3.InterfaceError, sqlite3.DataError, sqlite3.IntegrityError, sqlite3.ProgrammingError, Damaged)


#: What SQLite raises. A MemoryError has no text.
SQLITE_ERRORS = (sqlite3.Error, MemoryError)


def reason_of(exc: Exception) -> str:
    return str(exc) or "out of memory"


class Refused(Exception):
    """One record of a group cannot be written. The cause of this exception says why."""

    @classmethod
    def reraise(cls, exc: Exception) -> NoReturn:
        """Raise *exc* itself if it concerns the file or the disk, since then the whole group fails."""
        if isinstance(exc, SQLITE_ERRORS) and not isinstance(exc, RECORD_ERRORS):
            raise exc
        raise cls from exc

    @property
    def reason(self) -> Exception:
        assert isinstance(self.__cause__, Exception)
        return self.__cause__


class Group:
    """Writes that share one transaction."""

    def __init__(self) -> None:
        self.runs: dict[str, PendingRun] = {}
        self.refused: dict[str, Exception] = {}
        self.changes: list[Change] = []
        self.lost: set[str] = set()
        self.error: Exception | None = None

    @functools.cached_property
    def is_written(self) -> anyio.Event | asyncio.Event:
        return new_event()

    def write_together(self, db: sqlite3.Connection) -> None:
        """Write all records. Raises Refused if one of them cannot be written."""
        self._write_runs(db, self.runs)
        for change in self.changes:
            self._apply(db, change)

    def write_separately(self, db: sqlite3.Connection, without_row: set[str]) -> None:
        """Write each record in its own savepoint, so that a refused record fails only its own caller.

        Add new runs that were refused, and so have no row, to *without_row*.
        """
        for run_id, pending in list(self.runs.items()):
            has_one_row = not steps_with_rows(pending.run, pending.steps)
            try:
                with contextlib.nullcontext() if has_one_row else _savepoint(db):
                    self._write_runs(db, {run_id: pending})
            except Refused as exc:
                self.refused[run_id] = exc.reason
                del self.runs[run_id]
                if pending.is_new:
                    without_row.add(run_id)
        for change in self.changes:
            try:
                with _savepoint(db):
                    self._apply(db, change)
            except Refused as exc:
                change.error = exc.reason

    def _write_runs(self, db: sqlite3.Connection, runs: Mapping[str, PendingRun]) -> None:
        ended = queries.Ended()
        for run_id, pending in runs.items():
            try:
                if not queries.write_run(db, pending.run, pending.is_new, pending.steps, ended):
                    self.lost.add(run_id)
            except Exception as exc:
                Refused.reraise(exc)
        queries.count_ended(db, ended)

    def _apply(self, db: sqlite3.Connection, change: Change) -> None:
        change.error = None
        try:
            change.result = change.apply(db)
        except FlockError as exc:  # raised on purpose, before anything was written
            change.error = exc
        except Exception as exc:
            Refused.reraise(exc)

    def run_callbacks(self) -> None:
        """Call the callback of each change that was written."""
        for change in self.changes:
            if change.then is not None and change.error is None:
                try:
                    change.then(change.result)
                except Exception:  # it must not stop the writer
                    logger.exception("a callback failed after its change was written")


@contextlib.contextmanager
def _savepoint(db: sqlite3.Connection) -> Iterator[None]:
    """If the block raises, undo its writes, but no others of the transaction."""
    db.execute("SAVEPOINT record")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK TO record")
        raise
    finally:
        db.execute("RELEASE record")

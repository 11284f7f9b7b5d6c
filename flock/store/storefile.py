"""The file of a store on disk. Other processes may use it, and people may remove or replace it at any time."""

import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import IO

import anyio

from flock.errors import StoreError
from flock.store import files
from flock.store.migrations import MIGRATIONS

#: How long to wait for the transaction of another process, and how often to try the lock, in seconds.
LOCK_TIMEOUT_S = 5.0
LOCK_INTERVAL_S = 0.001


class Displaced(OSError):
    """The file was removed or replaced since it was opened, or has a schema version that is not supported."""


class StoreFile:
    """The file of a store, and the lock file that each process holds during a transaction.

    Args:
        path: without links, because lock files are named after it.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        #: device and inode of the file and its journal, by path
        self._identities: Mapping[str, tuple[int, int] | None] = {}

    @property
    def mode(self) -> int:
        """The permissions of the file, which an existing one keeps. SQLite uses them for its journal too."""
        return os.stat(self.path).st_mode & 0o666

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Keep the lock file open inside the block. Raises StoreError."""
        path = f"{self.path}-lock"
        try:
            self._lock = files.open_lock(path, self.mode)
        except OSError as exc:
            raise StoreError(
                f"The lock file {path!r} cannot be opened: {exc.strerror}. Remove it, or use another store (store=, "
                "--store)."
            ) from exc
        try:
            yield
        finally:
            files.close_lock(self._lock)

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Hold the lock inside the block. Poll for it, since a thread that waits in flock cannot be cancelled.

        Raises TimeoutError.
        """
        assert self._lock is not None
        give_up_at = anyio.current_time() + LOCK_TIMEOUT_S
        while not files.try_lock(self._lock):  # another process is writing
            if anyio.current_time() > give_up_at:
                raise TimeoutError(f"another process has kept {self._lock.name} locked for {LOCK_TIMEOUT_S:g} s")
            await anyio.sleep(LOCK_INTERVAL_S)
        try:
            yield
        finally:
            self.unlock()

    def unlock(self) -> None:
        assert self._lock is not None
        files.unlock(self._lock)

    def note_identity(self) -> None:
        """Note which files these are, for ``check``."""
        paths = self.path, f"{self.path}-wal", f"{self.path}-shm"
        self._identities = {path: files.device_and_inode(path) for path in paths}

    def check_in_place(self) -> None:
        """Raise Displaced if the file was removed or replaced.

        SQLite does not detect this. It continues to use a removed file, and its commits are lost.
        """
        for path, identity in self._identities.items():
            try:
                current = files.device_and_inode(path)
            except OSError:  # its folder cannot be read now, so the state of the file is unknown
                continue
            if current != identity:
                what = "removed" if current is None else "replaced"
                raise Displaced(
                    f"{path!r} was {what} while this server was using it, so new writes would be lost. "
                    f"Stop this server, restore {self.path!r} with its -wal file, and start it again."
                )

    def check(self, db: sqlite3.Connection) -> None:
        """Raise Displaced if the file was removed, replaced or upgraded."""
        self.check_in_place()
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if self._identities and version != len(MIGRATIONS):
            raise Displaced(
                f"{self.path!r} was changed by another version of flockapi (schema version {version}; this version "
                f"supports {len(MIGRATIONS)}) while this server was using it. Stop this server, and start that version."
            )

"""The files of runs on a cluster: contents in a folder that all machines share, as beside an SQLite store.

The cluster knows nothing of files, so the folder itself says which workflows have a content: ``{content}.runs`` is a
folder with an empty file for each of them, a mark. It is made before the workflow starts. A content is kept until all
of its workflows were deleted, by a client or because their retention is over.
"""

import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice
from pathlib import Path
from urllib.parse import quote, unquote

import anyio.to_thread

from flock.errors import Conflict, StoreError
from flock.runs import FileBox, new_id
from flock.store.contents import KEEP_UNUSED_S, Contents, is_older
from flock.store.files import PRIVATE, sync_folder

logger = logging.getLogger("flock.temporal")

#: How often the bytes of principals are counted again, since other processes store files too, in seconds.
COUNT_INTERVAL_S = 60.0
#: How many contents of the folder are listed at once.
PAGE = 100
MARKS = ".runs"


class SharedContents(Contents):
    """All contents of a namespace."""

    _count_at = 0.0

    def of(self, principal: str | None, max_bytes: int, max_total_bytes: int) -> FileBox:
        if time.monotonic() > self._count_at:
            self.used.clear()
            self._count_at = time.monotonic() + COUNT_INTERVAL_S
        return super().of(principal, max_bytes, max_total_bytes)

    async def mark(self, workflow_id: str, names: Iterable[str]) -> None:
        """Keep contents for a workflow that is about to start, or to be retried. The marks are on disk on return.

        Raises: Conflict if a content was just deleted; StoreError.
        Cancellation: some may be marked. Without the workflow, they count for a day.
        """
        if found := set(names):
            await anyio.to_thread.run_sync(self._mark_all, workflow_id, found)

    def _mark_all(self, workflow_id: str, names: Iterable[str]) -> None:
        try:
            for name in names:
                self._mark(workflow_id, name)
                open(self.root / name, "rb").close()  # NFS may say for a while that a deleted file exists
            for folder in {(self.root / name).parent for name in names}:
                sync_folder(folder)
        except FileNotFoundError as exc:
            self._unmark(workflow_id, name)
            raise Conflict("A file of this run was just deleted. Send it again.") from exc
        except OSError as exc:
            raise StoreError(f"The folder for files cannot be used: {exc.strerror}.") from exc

    def _mark(self, workflow_id: str, name: str) -> None:
        mark = self._mark_of(workflow_id, name)
        while True:
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process has removed the folder, which was empty
                mark.touch(mode=PRIVATE)
                break
        sync_folder(mark.parent)

    def _unmark(self, workflow_id: str, name: str) -> None:
        self._mark_of(workflow_id, name).unlink(missing_ok=True)

    def _mark_of(self, workflow_id: str, name: str) -> Path:
        return self.root / f"{name}{MARKS}" / quote(workflow_id, safe="")

    async def release(self, workflow_id: str, names: Iterable[str], at: float) -> None:
        """Delete the contents that only this workflow has had, unless they were sent or named after the time *at*.

        If that fails, ``delete_unused`` does it later.
        """

        def release_all() -> None:
            for name in set(names):
                self._unmark(workflow_id, name)
                self.delete(name, at)

        try:
            await anyio.to_thread.run_sync(release_all)
        except OSError as exc:
            logger.warning("the files of %s cannot be deleted now: %s", workflow_id, exc)

    def delete(self, name: str, at: float) -> None:
        """Delete a content that has no mark, and was neither sent nor named after that time."""
        path, marks, gone = self.root / name, self.root / f"{name}{MARKS}", self.root / f"{name}-{new_id()}.tmp"
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            marks.rmdir()
        with contextlib.suppress(FileNotFoundError):  # another process deletes it too
            if not marks.exists() and is_older(path, at):
                path.rename(gone)
                # A process that marks it from now on finds that it is gone. One that has marked it before needs it.
                gone.rename(path) if marks.exists() else gone.unlink()
                self.used.clear()

    async def delete_unused(self, exists: Callable[[str], Awaitable[bool]], keep_s: float = KEEP_UNUSED_S) -> None:
        """Delete the contents that no workflow has, and were neither sent nor named for *keep_s*.

        Args:
            exists: whether there is a workflow with an id. It is asked once in *keep_s* about one of each content.

        Raises: OSError, and what *exists* raises.
        """
        old = self.old(keep_s)
        while found := await anyio.to_thread.run_sync(lambda: list(islice(old, PAGE))):
            for name, before in found:
                while mark := await anyio.to_thread.run_sync(self._delete_unless_marked, name, before):
                    renew = os.utime if await exists(unquote(mark.name)) else Path.unlink
                    with contextlib.suppress(FileNotFoundError):  # another process has removed it
                        await anyio.to_thread.run_sync(renew, mark)

    def _delete_unless_marked(self, name: str, before: float) -> Path | None:
        """Delete a content, or what a process has left of it when it died, that was not used after *before*.

        Returns: a mark that has to be checked first, because it is older.
        """
        path = self.root / name
        if path.suffix == MARKS:
            with contextlib.suppress(OSError):  # it is not empty: the content was sent again, and marked
                if not path.with_suffix("").exists():
                    for mark in filter(lambda mark: is_older(mark, before), path.iterdir()):
                        mark.unlink(missing_ok=True)
                    path.rmdir()
            return None
        marked = path.with_name(path.name.partition("-")[0])
        if marked != path and marked.with_suffix(MARKS).exists():  # it was marked while it was deleted
            with contextlib.suppress(FileNotFoundError):
                path.rename(marked)
            return None
        if (first := next(path.with_suffix(MARKS).glob("*"), None)) is None:
            self.delete(name, before)
        return first if first is not None and is_older(first, before) else None

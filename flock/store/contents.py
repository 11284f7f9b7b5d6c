"""The contents of files, beside the store: ``{store}-files/{digest of the principal}/{digest of the content}``.

Which runs have a file is in the table ``run_files``, which triggers keep equal to the column ``files`` of runs. A
content is written before the run is accepted, and deleted with the last run that has it. One that no
run has is deleted a day after it was last sent or named. Both are decided in a transaction, and one that accepts a
run checks that its contents are there.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import anyio.to_thread

from flock import files
from flock.errors import Conflict, InvalidData, NotFound, StoreError, TooLarge
from flock.files import CHUNK_BYTES, FileReference, open_below
from flock.runs import FileBox, Run, new_id
from flock.store.files import PRIVATE, sync_folder

logger = logging.getLogger("flock.store")

#: How long a content is kept that no run has, and how often those are looked for, in seconds.
KEEP_UNUSED_S = 86_400
SWEEP_INTERVAL_S = 3600
#: Space that files leave free on the disk.
MIN_FREE_BYTES = 64 * 1024 * 1024
#: Copied files of a folder that are remembered, so that one that many rows name is copied once.
MAX_COPIED = 1000
#: The errors of opening a name that is not that of a file.
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO, errno.EISDIR}


class Contents:
    """All contents of a store.

    Attributes:
        used: the bytes of each principal's folder, if they were counted since the last deletion.
        source: if it is a folder, files are named by their paths in it, and stored when they are found.
        is_dry: files of *source* are read, but not stored.
        copied: the newest of those that were stored, by folder, name and state.
    """

    source: Path | None = None
    is_dry = False

    def __init__(self, root: Path) -> None:
        self.root, self.used, self._sweep_at, self.counting = root, dict[Path, int](), 0.0, threading.Lock()
        self.copied = dict[tuple[Path, str, int, int, int, int], FileReference]()

    def folder(self, principal: str | None) -> Path:
        return self.root / hashlib.sha256(f"principal {principal!r}".encode()).hexdigest()[:32]

    def of(self, principal: str | None, max_bytes: int, max_total_bytes: int) -> FileBox:
        """Return the files of a principal. *max_bytes* limits one file, and *max_total_bytes* all of them."""
        return _ContentsOfPrincipal(self, self.folder(principal), max_bytes, max_total_bytes)

    def check(self, *runs: Run) -> None:
        """Raise Conflict if a content of runs that are accepted was deleted meanwhile."""
        if not all((self.root / name).exists() for run in runs for name in run.files):
            raise Conflict("A file of this run was just deleted. Send it again.")

    def old(self, keep_s: float | None) -> Iterator[tuple[str, float]]:
        """Yield the contents that were sent and named more than *keep_s* ago, and until when.

        If it is None, a day ago, and at most once in an hour, since there may be many. Temporary files that a process
        has left when it died are among them.
        """
        if keep_s is None and time.monotonic() < self._sweep_at:
            return
        before = time.time() - (KEEP_UNUSED_S if keep_s is None else keep_s)
        self._sweep_at = time.monotonic() + SWEEP_INTERVAL_S
        for folder in self.root.glob("*/"):
            with os.scandir(folder) as entries:  # there may be more than fit into memory
                yield from ((f"{folder.name}/{each.name}", before) for each in entries if is_older(each, before))

    def delete(self, name: str, at: float) -> None:
        """Delete a content that was neither sent nor named after that time."""
        if is_older(self.root / name, at):
            (self.root / name).unlink(missing_ok=True)
            self.used.clear()


def is_older(path: Path | os.DirEntry[str], at: float) -> bool:
    try:
        return path.stat().st_mtime <= at
    except FileNotFoundError:
        return False


class _Incoming:
    """What is known of a content that is being read."""

    def __init__(self, max_bytes: int) -> None:
        self.digest, self.size, self.head, self._max_bytes = hashlib.sha256(), 0, b"", max_bytes

    def add(self, chunk: bytes) -> None:
        self.size, self.head = self.size + len(chunk), (self.head + chunk[: files.HEAD_BYTES])[: files.HEAD_BYTES]
        if self.size > self._max_bytes:
            raise TooLarge(f"A file may have at most {self._max_bytes} bytes on this server (max_file_bytes).")
        self.digest.update(chunk)

    def reference(self, name: str) -> FileReference:
        media_type, file_id = files.media_type_of(self.head), self.digest.hexdigest()
        return FileReference(file_id=file_id, media_type=media_type, size=self.size, name=files.safe_name(name))


def _read(source: BinaryIO, path: Path) -> bytes:
    """Return the next chunk of a file. Raises StoreError."""
    try:
        return source.read(CHUNK_BYTES)
    except OSError as exc:
        raise _unreadable(path, exc) from exc


def _unreadable(path: Path, exc: OSError) -> StoreError:
    return StoreError(f"The file {str(path)!r} cannot be read: {exc.strerror}. Make it readable, and run this again.")


def _unusable(path: Path, what: str, exc: Exception) -> StoreError:
    logger.error("the file %s cannot be %s: %s", path, what, exc)
    return StoreError(f"The file cannot be {what} now. The server's log has the reason.")


async def _each(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk


class _ContentsOfPrincipal(FileBox):
    def __init__(self, contents: Contents, folder: Path, max_bytes: int, max_total_bytes: int) -> None:
        self._contents, self._folder = contents, folder
        self._max_bytes, self._max_total_bytes = max_bytes, max_total_bytes

    def path(self, file_id: str) -> Path:
        return self._folder / file_id

    def find(self, file_id: str) -> FileReference:
        if self._contents.source is not None:
            return self._copied(self._contents.source, file_id)
        try:
            if not re.match(files.ID, file_id):
                raise FileNotFoundError(file_id)
            os.utime(self.path(file_id))
            with open(self.path(file_id), "rb") as file:
                media_type = files.media_type_of(file.read(files.HEAD_BYTES))
                return FileReference(file_id=file_id, media_type=media_type, size=os.fstat(file.fileno()).st_size)
        except FileNotFoundError as exc:
            raise NotFound(f"You have no file {file_id[:100]!r}, or it is no longer stored. Send it again.") from exc
        except OSError as exc:
            raise _unusable(self.path(file_id), "read", exc) from exc

    def _copied(self, folder: Path, name: str) -> FileReference:
        """Store a file of a folder. Raises ValueError, StoreError."""
        try:
            source = open_below(folder, name)
        except (OSError, ValueError) as exc:
            if isinstance(exc, OSError) and exc.errno not in NO_FILE:
                raise _unreadable(folder / name, exc) from exc
            raise ValueError(f"There is no file {name[:100]!r} in the folder {str(folder)!r}") from exc
        incoming, copied = _Incoming(self._max_bytes), self._contents.copied
        with source, contextlib.ExitStack() as stack:
            about = os.fstat(source.fileno())
            key = (self._folder, name, about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
            if (earlier := copied.get(key)) is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self.path(earlier.file_id))
                    return earlier
            written = None if self._contents.is_dry else stack.enter_context(self._writing())
            try:
                while chunk := _read(source, folder / name):
                    incoming.add(chunk)
                    if written is not None:
                        self._write(written[0], chunk)
                found = incoming.reference(name)
                if written is not None:
                    self._finish(*written, self.path(found.file_id), found.size)
            except TooLarge as exc:
                raise ValueError(f"{name[:100]!r}: {exc}".removesuffix(".")) from exc
        if len(copied) >= MAX_COPIED:
            copied.clear()
        copied[key] = found
        return found

    async def keep_all(self, contents: Mapping[str, bytes | None]) -> tuple[str, ...]:
        for content in contents.values():
            if content is not None:
                await self.keep(_each(content))
        return tuple(f"{self._folder.name}/{file_id}" for file_id in contents)

    async def keep(self, data: AsyncIterable[bytes], name: str = "", declared: str = "", at: str = "") -> FileReference:
        incoming = _Incoming(self._max_bytes)
        with self._writing() as (file, path):
            async for chunk in data:
                incoming.add(chunk)
                await anyio.to_thread.run_sync(self._write, file, chunk)
            found = incoming.reference(name)
            try:
                files.check_declared(declared, found.media_type, found.size)
            except ValueError as exc:
                raise InvalidData.of(f"{exc}.", at) from exc
            await anyio.to_thread.run_sync(self._finish, file, path, self.path(found.file_id), found.size)
        return found

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[BinaryIO, Path]]:
        """Open a file with a temporary name, which is removed if the block fails. Raises StoreError."""
        path = self._folder / f"{new_id()}.tmp"
        try:
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(mode=0o700, exist_ok=True)
            with open(path, "xb", opener=lambda name, flags: os.open(name, flags, PRIVATE)) as file:
                yield file, path
        except (OSError, RuntimeError) as exc:  # the last one: no thread can be started
            raise _unusable(path, "stored", exc) from exc
        finally:
            with contextlib.suppress(OSError):  # if it stays, it is deleted after a day
                path.unlink(missing_ok=True)

    def _write(self, file: BinaryIO, chunk: bytes) -> None:
        if shutil.disk_usage(self._folder).free < MIN_FREE_BYTES:
            raise OSError(errno.ENOSPC, f"less than {MIN_FREE_BYTES} bytes are free on the disk")
        file.write(chunk)

    def _finish(self, file: BinaryIO, path: Path, final: Path, size: int) -> None:
        file.flush()
        os.fsync(file.fileno())
        with self._contents.counting:
            used = self._contents.used.get(self._folder, self._max_total_bytes)
            more = 0 if final.exists() else size
            if used + more > self._max_total_bytes:  # or not counted yet; others on the store may have deleted some
                used = 0
                for each in self._folder.glob("[!.]" * 64):
                    with contextlib.suppress(FileNotFoundError):  # it was deleted meanwhile
                        used += os.stat(each).st_size
            if used + more > self._max_total_bytes:
                raise TooLarge(
                    f"Your files may have at most {self._max_total_bytes} bytes in all (max_files_bytes)."
                    " Delete runs that have files."
                )
            os.replace(path, final)
            self._contents.used[self._folder] = used + more
        for folder in (self._folder, self._folder.parent, self._folder.parent.parent):  # those may be new
            sync_folder(folder)

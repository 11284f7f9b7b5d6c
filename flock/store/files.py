"""Private files and lock files of a store. The kernel releases a process's locks however the process ends."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError as exc:
    raise ImportError(
        "flockapi supports Linux and macOS, but not Windows, because its store needs the file locks of fcntl. "
        "Run it in WSL or in a container."
    ) from exc

#: The permissions of new files.
PRIVATE = 0o600


def device_and_inode(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a file, or None if it does not exist."""
    try:
        stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


def create_private(path: str) -> None:
    """Create an empty file that only its owner can read, unless it exists. SQLite would use the umask."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE))


#: Lock files that are open in this process, whether locked or not.
_open_locks: set[IO[bytes]] = set()


@contextlib.contextmanager
def exclusive_lock(path: str) -> Iterator[None]:
    """Hold the lock file *path* inside the block, and remove it at the end.

    Raises BlockingIOError if another process holds it.
    """
    while True:
        file = open_lock(path, PRIVATE)
        if not try_lock(file):
            close_lock(file)
            raise BlockingIOError(f"another process has locked {path}")
        if _has_name(file, path):
            break
        close_lock(file)  # its previous holder has removed it in the meantime
    try:
        yield
    finally:
        try:
            remove(path)
        finally:
            close_lock(file)


def acquire_lock(path: str, mode: int) -> IO[bytes]:
    """Wait for a lock on the file *path*, which is held until ``close_lock``."""
    while True:
        file = open_lock(path, mode)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if _has_name(file, path):
                return file
        except OSError:
            close_lock(file)
            raise
        close_lock(file)  # another process has removed it, since nobody had locked it


def _has_name(file: IO[bytes], path: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def open_lock(path: str, mode: int) -> IO[bytes]:
    """Open a lock file. Raises OSError, also if *path* is not a regular file, since opening a pipe would block."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(errno.EEXIST, "it is not a file", path)
    file = open(path, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, mode))
    _open_locks.add(file)
    return file


def try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(file: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # what was written under the lock is written; the next ``unlock`` releases it
        fcntl.flock(file, fcntl.LOCK_UN)


def close_lock(file: IO[bytes] | None) -> None:
    if file is not None:
        _open_locks.discard(file)
        file.close()


def remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make new names in *folder* durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_locked(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # it is locked, or its state is unknown: to be safe, nothing is taken over
        return True
    return False


def holders_of(path: str) -> list[int]:
    """Return the ids of the processes that have locked the file *path*, as far as the system shows them (Linux)."""
    try:
        inode, lines = os.stat(path).st_ino, Path("/proc/locks").read_text().splitlines()
    except OSError:
        return []
    locks = [line.split() for line in lines if "FLOCK" in line and "->" not in line]
    return [int(lock[4]) for lock in locks if lock[5].endswith(f":{inode}") and int(lock[4]) > 0]


def _close_in_child() -> None:
    """Close locks in a forked child, such as one of a process pool, which would keep them if its parent dies."""
    for file in _open_locks:
        file.close()
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_in_child)

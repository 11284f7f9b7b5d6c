"""The state of ``flockapi batch``: a store that holds one batch. A mark distinguishes it from other databases."""

import contextlib
import glob
import shutil
import sqlite3
from pathlib import Path

from flock.errors import StoreError
from flock.store.files import create_private
from flock.store.statements import COUNT_TABLES

#: ``PRAGMA application_id`` of a state: "Floc" in ASCII.
MARK = 0x466C6F63


def create_state(path: str) -> None:
    """Create a state, or check its mark if the file exists. Raises StoreError if it is not a state."""
    try:
        create_private(path)
        with contextlib.closing(sqlite3.connect(path)) as db:
            mark = db.execute("PRAGMA application_id").fetchone()[0]
            if mark == 0 and not db.execute(COUNT_TABLES).fetchone()[0]:
                db.execute(f"PRAGMA application_id = {MARK}")
                mark = MARK
    except (sqlite3.DatabaseError, OSError) as exc:
        raise StoreError(f"{path} cannot hold the state of a batch: {exc}. Choose another file with --store.") from exc
    if mark != MARK:
        raise StoreError(f"{path} is not the state of a batch. Choose another file with --store.")


def remove_state(path: str) -> None:
    """Remove the companion files, then the state itself: a new state must not find the journal of the old one."""
    engines = [file for kind in ("engine", "live") for file in glob.glob(f"{glob.escape(path)}-{kind}-*")]
    shutil.rmtree(f"{path}-files", ignore_errors=True)
    for file in (f"{path}-wal", f"{path}-shm", f"{path}-lock", f"{path}-output", f"{path}-write", *engines, path):
        Path(file).unlink(missing_ok=True)

"""Migrations of the store; see ``migrations.sql``."""

import glob
import sqlite3
from pathlib import Path

from flock.errors import StoreError
from flock.store import files, statements
from flock.store.groups import SQLITE_ERRORS, reason_of


def _statements_in(text: str) -> list[list[str]]:
    """Return the statements of each migration."""
    migrations, statement = list[list[str]](), ""
    for line in text.splitlines(keepends=True):
        if line.startswith("----"):
            migrations.append([])
        elif statement or (line.strip() and not line.startswith("--")):
            statement += line
            if sqlite3.complete_statement(statement):
                migrations[-1].append(statement.rstrip().removesuffix(";"))
                statement = ""
    return migrations


#: The statements of each migration.
MIGRATIONS = _statements_in(Path(__file__).with_suffix(".sql").read_text("utf-8"))


def migrate(db: sqlite3.Connection, path: str) -> None:
    """Apply the pending migrations. The caller holds the lock of the store.

    Raises StoreError, without changing the file, if it is not compatible, or an engine of an older version is alive.
    An older process that has read the schema version before, and is not registered yet, refuses to write afterwards.
    """
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(
                f"The store {path!r} was created by a newer version of flockapi (schema version {version}; this "
                f"version supports {len(MIGRATIONS)}). Use that version, or another file (store=, --store)."
            )
        if version == 0 and db.execute(statements.COUNT_TABLES).fetchone()[0]:
            raise StoreError(f"{path!r} is the database of another program. Use another file (store=, --store).")
        if 0 < version < len(MIGRATIONS):
            _check_unused(path, version)
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            db.execute("BEGIN IMMEDIATE")
            for statement in migration:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
    except SQLITE_ERRORS as exc:
        raise StoreError(
            f"The store {path!r} cannot be read: {reason_of(exc)}. Restore it, or use another file (store=, --store)."
        ) from exc


def _check_unused(path: str, version: int) -> None:
    """Raise StoreError if an engine has registered with the store, and its process is alive."""
    locks = [lock for lock in glob.glob(f"{glob.escape(path)}-engine-*") if files.is_locked(lock)]
    if locks:
        processes = ", ".join(str(process) for lock in locks for process in files.holders_of(lock))
        raise StoreError(
            f"The store {path!r} has schema version {version}, and an older version of flockapi is using it"
            f"{processes and f' (process {processes})'}. This version would migrate it to {len(MIGRATIONS)}, and the "
            "older one could not write to it any more. Stop it first, and then start this one; see docs/upgrading.md."
        )

"""Stores as an earlier version has left them."""

import re
import sqlite3

from flock.store.migrations import MIGRATIONS


def undo(db: sqlite3.Connection, version: int) -> None:
    """Undo the migrations after *version*, which add columns, tables and their indexes."""
    for statement in reversed([statement for migration in MIGRATIONS[version:] for statement in migration]):
        if made := re.match(r"CREATE (?:UNIQUE )?(TABLE|INDEX|TRIGGER) (?:IF NOT EXISTS )?(\w+)", statement):
            db.execute(f"DROP {made[1]} IF EXISTS {made[2]}")
        elif added := re.match(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", statement):
            db.execute(f"ALTER TABLE {added[1]} DROP COLUMN {added[2]}")
    db.execute(f"PRAGMA user_version = {version}")

"""Stores with many runs that have ended, written directly, without an engine."""

import contextlib
import itertools
import os
import sqlite3
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from flock.runs import Run, RunStatus, Step, new_id, now
from flock.store import queries
from flock.store.migrations import MIGRATIONS

#: The name of the flock whose runs they are.
FLOCK = "bench"


def fill(path: Path, runs: int, principal: str | None = None) -> None:
    """Create a store with *runs* completed runs of one step each. A million take about ten seconds."""
    done: dict[str, Any] = {"result": msgspec.Raw(b'{"result":3}'), "started_at": now(), "completed_at": now()}
    step = Step(agent_name="add", **done)
    first = Run(
        run_id=new_id(),
        flock=FLOCK,
        agent_name="add",
        inputs=msgspec.Raw(b'{"a":1}'),
        status=RunStatus.COMPLETED,
        created_at=now(),
        request_id=uuid4().hex,
        owner=new_id(),
        principal=principal,
        steps=(step,),
        **done,
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        for statement in itertools.chain.from_iterable(MIGRATIONS):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        db.execute("BEGIN")
        queries.write_run(db, first, True, {0: step}, queries.Ended())
        # SQLite copies the first run. This takes seconds; one call for each run would take a minute.
        db.create_function("new_id", 0, new_id)
        db.execute("CREATE TEMP TABLE ids AS SELECT run_id FROM runs WHERE false")
        numbers = "WITH RECURSIVE numbers(n) AS (SELECT 2 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?)"
        db.execute(f"INSERT INTO ids {numbers} SELECT new_id() FROM numbers", (runs,))
        columns = [row[1] for row in db.execute("PRAGMA table_info(runs)") if row[1] != "run_id"]
        copied = ", ".join(f"runs.{column}" for column in columns)
        query = (
            f"INSERT INTO runs (run_id, {', '.join(columns)}) SELECT ids.run_id, {copied} "
            "FROM ids CROSS JOIN runs WHERE runs.run_id = ?"
        )
        db.execute(query, (first.run_id,))
        db.execute("COMMIT")
        found = db.execute("SELECT count(*) FROM runs").fetchone()[0]
    assert found == runs, found
    with path.open("rb") as file:
        os.fsync(file.fileno())  # otherwise the first start waits for what was written here


def some_run_ids(path: Path, count: int) -> list[str]:
    """Return the ids of runs that are spread evenly over the store."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (runs,) = db.execute("SELECT count(*) FROM runs").fetchone()
        every = max(1, runs // count)
        rows = db.execute("SELECT run_id FROM runs WHERE rowid % ? = 0 LIMIT ?", (every, count))
        return [run_id for (run_id,) in rows]

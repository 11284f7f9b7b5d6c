"""The smallest durable store: rows that arrive during a commit are written by the next one."""

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor

Row = tuple[str, bytes, bytes]


class GroupCommit:
    """An SQLite file with one table, with the same durability as ``--durability power``."""

    def __init__(self, path: str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("CREATE TABLE runs (run_id TEXT PRIMARY KEY, inputs BLOB NOT NULL, answer BLOB NOT NULL)")
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[Row, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def save(self, run_id: str, inputs: bytes, answer: bytes) -> None:
        """Return when the row is on disk."""
        written = asyncio.get_running_loop().create_future()
        self._waiting.append(((run_id, inputs, answer), written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group, self._waiting = self._waiting, []
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT INTO runs VALUES (?, ?, ?)", [row for row, _ in group])
            await loop.run_in_executor(self._thread, self._db.execute, "COMMIT")
            for _, written in group:
                if not written.done():
                    written.set_result(None)
        self._writing = None

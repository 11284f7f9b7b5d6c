"""Operations of the product that can fail: SQL statements, files, threads, clocks, models and clients."""

import builtins
import contextlib
import errno
import fcntl
import functools
import io
import os
import re
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx
import msgspec
import pytest

from flock import jsontype
from flock.engine.embedded import EmbeddedEngine
from flock.runs import ids
from flock.store import store as stores
from tests.proof import shop
from tests.proof.schedules import BEGIN, Schedule

__all__ = ["ERRORS", "Fault", "Faults", "failing", "is_overslept"]

#: How long after the last failure the server may still answer 503, in seconds.
RECOVERY_S = 3.0
#: How long after the first failure a call that was about to begin may still begin, in seconds.
NOTICED_S = 0.001


def os_error(number: int) -> Callable[[], Exception]:
    return lambda: OSError(number, os.strerror(number))


def sql_error(text: str) -> Callable[[], Exception]:
    return lambda: sqlite3.OperationalError(text)


#: By kind of operation: how it fails. A clock does not fail, but jumps.
ERRORS: Mapping[str, Mapping[str, Callable[[], Exception]]] = {
    "sql": {
        "full": sql_error("database or disk is full"),
        "io": sql_error("disk I/O error"),
        "busy": sql_error("database is locked"),
        "open": sql_error("unable to open database file"),
        "corrupt": lambda: sqlite3.DatabaseError("database disk image is malformed"),
        "memory": MemoryError,
    },
    "file": {name: os_error(getattr(errno, name)) for name in ("ENOSPC", "EIO", "EMFILE", "EACCES")},
    "value": {"memory": MemoryError},
    "thread": {"start": lambda: RuntimeError("can't start new thread")},
    "model": {
        "connect": lambda: httpx.ConnectError("[Errno 24] Too many open files"),
        "read": lambda: httpx.ReadError("[Errno 104] Connection reset by peer"),
    },
    "client": {"EPIPE": os_error(errno.EPIPE)},
    "clock": {"back": Exception, "ahead": Exception},
}
JUMPS = {"back": -timedelta(hours=1), "ahead": timedelta(days=1)}
#: The name of the reading of the clock from which the end of a sleep is computed.
A_SLEEP = "a sleep begins"
#: Calls of the system for files, which fail if the package calls them.
CALLS = [(os, each) for each in "open stat fstat pwrite ftruncate fsync unlink rename replace mkdir scandir".split()]
CALLS += [(builtins, "open"), (io, "open"), (fcntl, "flock")]
#: What makes values of JSON, and JSON of values.
VALUES = ((msgspec.json, "encode"), (msgspec.json, "decode"), (jsontype, "_decode"))
#: The provider is made of the first. What the second cannot store is another exception; see ``test_raised.py``.
NO_VALUES = ("flock.testing", "flock.steps.raised")
#: How the statements begin with which a write fails.
WRITES = ("BEGIN IMMEDIATE", "COMMIT", "INSERT", "UPDATE", "DELETE")


class Fault(NamedTuple):
    """The operation number *at* of a kind, from 0, fails, and for some seconds all others of its kind."""

    kind: str
    error: str
    at: int
    seconds: float = 0.0


def is_overslept(fault: Fault, readings: Sequence[str]) -> bool:
    """Whether a sleep may begin while the clock is a day ahead, and end when it is right: a day later."""
    if fault.error != "ahead" or A_SLEEP not in readings:
        return False
    return fault.seconds == 3.0 or (not fault.seconds and readings[fault.at] == A_SLEEP)


class Faults:
    """The operations so far, and whether the next one fails.

    Attributes:
        names: of the operations of each kind.
        engine: the one under test.
        problems: broken promises that no client has seen.
        lack_memory: whether the fault is that memory for a value cannot be had.
    """

    def __init__(self, fault: Fault | None, loop: Schedule) -> None:
        self._fault, self._loop, self.is_on = fault, loop, True
        self.engine: EmbeddedEngine | None = None
        self.names, self.problems = defaultdict[str, list[str]](list), list[str]()
        self._until = self._began_at = self._failed_at = -1e9
        self._write_failed_at = 1e9
        self.lack_memory = fault is not None and fault.kind == "value"

    def fail(self, kind: str, name: str = "") -> bool:
        """Count an operation. Return whether it fails now."""
        if not self.is_on:
            return False
        number, fault, now = len(self.names[kind]), self._fault, self._loop.time()
        self.names[kind].append(name)
        if fault is None or fault.kind != kind or (number != fault.at and now >= self._until):
            return False
        if number == fault.at:
            self._began_at, self._until = now, now + fault.seconds
        self._failed_at = now
        if kind == "sql" and name.startswith(WRITES):
            self._write_failed_at = min(now, self._write_failed_at)
        return True

    def begin(self, what: str) -> None:
        """Called before what costs money, and must not begin while its result cannot be stored."""
        if self._write_failed_at + NOTICED_S < self._loop.time() < self._until:
            self.problems.append(f"{what} is called while the store cannot be written")

    def check(self, kind: str, name: str = "") -> None:
        """Count an operation. Raises the error of the fault if it fails."""
        if self.fail(kind, name):
            assert self._fault is not None
            raise ERRORS[kind][self._fault.error]()

    def jump(self, name: str = "") -> timedelta:
        """Count a reading of the clock. Return how far it is from the right time."""
        return JUMPS[self._fault.error] if self.fail("clock", name) and self._fault else timedelta()

    @property
    def rest_s(self) -> float:
        """For how long 503 is still a right answer, in seconds."""
        return max(self._failed_at, self._until) + RECOVERY_S - self._loop.time()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        self.is_on = False
        try:
            yield
        finally:
            self.is_on = True


def _is_product(depth: int = 2) -> bool:
    """Whether a module of the package called the caller, or the standard library for it."""
    frame = sys._getframe(depth)
    while frame.f_globals["__name__"] in ("pathlib", "glob", "contextlib", "genericpath", "posixpath", __name__):
        assert frame.f_back is not None
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).startswith("flock")


@contextlib.contextmanager
def failing(faults: Faults, loop: Schedule, log: Path, bridge: httpx.BaseTransport) -> Iterator[None]:
    """Let the operations of the package be counted, and fail.

    Args:
        log: gets the effects.
        bridge: how clients reach the server.
    """

    class Cursor(sqlite3.Cursor):
        name = ""

        def execute(self, sql: str, *args: Any) -> Any:
            self.name = sql
            faults.check("sql", sql)
            return super().execute(sql, *args)

        def executemany(self, sql: str, *args: Any) -> Any:
            faults.check("sql", sql)
            return super().executemany(sql, *args)

        def fetchone(self) -> Any:
            self._check_row()
            return super().fetchone()

        def __next__(self) -> Any:
            self._check_row()
            return super().__next__()

        def _check_row(self) -> None:
            try:
                faults.check("sql", f"row of {self.name}")
            except BaseException:
                self.close()  # as SQLite ends a statement that fails, and with it the snapshot that it reads
                raise

    class Connection(sqlite3.Connection):
        def cursor(self, factory: Any = Cursor) -> Any:
            return super().cursor(factory)

        def execute(self, *args: Any) -> Any:
            return self.cursor().execute(*args)

        def executemany(self, *args: Any) -> Any:
            return self.cursor().executemany(*args)

        def blobopen(self, *args: Any, **options: Any) -> Any:
            faults.check("sql", "blob")
            return super().blobopen(*args, **options)

    class Written:
        """A file whose writes may fail."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *exc_info: object) -> None:
            self._file.close()

        def write(self, data: Any) -> Any:
            faults.check("file", "write")
            return self._file.write(data)

    def checked(kind: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            if _is_product():
                path = re.sub("-[0-9a-f-]{36}", "", Path(args[0]).name) if isinstance(args[0], str) else ""
                faults.check(kind, f"{name} {path}")
                if name == "open" and args[1:2] == ("xb",):
                    return Written(call(*args, **options))
            return call(*args, **options)

        return wrapper

    def fragile(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count what makes values, which may be large: JSON, and what is made of it."""

        def wrapper(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1)
            module = caller.f_globals["__name__"]
            if module.startswith("flock") and module not in NO_VALUES:
                faults.check("value", f"{name} by {module}.{caller.f_code.co_name}")
            return call(*args, **options)

        return wrapper

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            reader = sys._getframe(2)  # after "now"
            is_sleep = reader.f_code.co_name == "wait" and reader.f_locals.get("kind") == "sleep"
            return BEGIN + timedelta(seconds=loop.time()) + faults.jump(A_SLEEP if is_sleep else "")

    def run_in_executor(*args: Any) -> Any:
        faults.check("thread")
        return start(*args)

    def noted(what: str, run_id: str, name: str) -> None:
        if what == "begin" and name != "turn":
            faults.begin(name)
        note(what, run_id, name)

    def now_s() -> float:
        return real_time() + (faults.jump().total_seconds() if _is_product() else 0)

    start, time_ns, note, real_time = loop.run_in_executor, time.time_ns, shop.note, time.time
    connect = functools.partial(sqlite3.connect, factory=Connection)
    with pytest.MonkeyPatch.context() as patch, open(log, "ab", 0) as file:
        patch.setattr(httpx, "Client", functools.partial(httpx.Client, transport=bridge))
        patch.setattr(shop, "_LOG", file.fileno())
        patch.setattr(shop, "_MET", defaultdict(set))
        patch.setattr(shop, "note", noted)
        patch.setattr(sqlite3, "connect", checked("sql", "connect", connect))
        for module, name in CALLS:
            patch.setattr(module, name, checked("file", name, getattr(module, name)))
        for module, name in VALUES:
            patch.setattr(module, name, fragile(name, getattr(module, name)))
        patch.setattr(loop, "run_in_executor", run_in_executor)
        for module in (ids, stores):
            patch.setattr(module, "datetime", Clock)
        patch.setattr(time, "time_ns", lambda: time_ns() + faults.jump() // timedelta(microseconds=1) * 1000)
        patch.setattr(time, "time", now_s)
        patch.setattr(ids, "_last_id_time", 0)
        yield

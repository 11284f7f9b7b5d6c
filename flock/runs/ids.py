"""The time, and ids that sort by it."""

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

__all__ = ["first_id_at", "make_ids_after", "new_id", "now", "steady_now"]


def now() -> datetime:
    return datetime.now(UTC)


def steady_now() -> Callable[[], datetime]:
    """Return a function that returns the time now. What passes from here on is measured by the monotonic clock.

    So the time between two results is how long it was, whoever sets the clock of the machine meanwhile.
    """
    at, began_s = now(), time.monotonic()
    return lambda: at + timedelta(seconds=time.monotonic() - began_s)


#: Max clock skew, in seconds: new ids do not follow existing ids that are further in the future than this.
MAX_CLOCK_SKEW_S = 7 * 86_400
_id_lock = threading.Lock()
_last_id_time = 0


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562, section 5.7).

    Ids of one process sort in order of creation: the 12 bits after the milliseconds hold their fraction (method 3 of
    section 6.2), and the time in an id increases even if the clock does not.
    """
    global _last_id_time
    with _id_lock:
        _last_id_time = ticks = max(_last_id_time + 1, time.time_ns() * 4096 // 1_000_000)
    random = int.from_bytes(os.urandom(8))
    digits = f"{ticks:015x}{1 << 63 | random >> 2:016x}"
    return f"{digits[:8]}-{digits[8:12]}-7{digits[12:15]}-{digits[15:19]}-{digits[19:]}"


def first_id_at(time: datetime, milliseconds_later: int = 0) -> str:
    """Return the lowest prefix of ids that were created at *time*: their first 48 bits are milliseconds."""
    milliseconds = (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    digits = f"{max(0, milliseconds + milliseconds_later):012x}"
    return f"{digits[:8]}-{digits[8:]}"


def make_ids_after(id_: str) -> None:
    """Ensure that new ids sort after *id_*, unless it is far in the future: filters compare ids with times."""
    global _last_id_time
    value = UUID(id_).int
    if value >> 80 < (time.time() + MAX_CLOCK_SKEW_S) * 1000:
        with _id_lock:
            _last_id_time = max(_last_id_time, value >> 80 << 12 | value >> 64 & 0xFFF)

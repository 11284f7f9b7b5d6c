"""Items with equal inputs, known by their digests, whose results are taken instead of executing them again.

The k-th of equal items in a batch has a digest of its own, since each has a result of its own: it takes the result of
the k-th one of another batch. With ``dedupe``, all of them have the same digest.

All functions are called inside a transaction of ``Database.change``, or on its read connection.
"""

import sqlite3
from collections.abc import Iterable, Iterator
from datetime import datetime

from msgspec.structs import replace

from flock.runs import Batch, Run, RunStatus
from flock.store import queries, statements
from flock.store.columns import micros


def numbered(db: sqlite3.Connection, batch: Batch, items: Iterable[Run]) -> Iterator[Run]:
    """Yield new items of *batch*, each with the digest of its number among equal ones."""
    new = set[str]()
    for item in items:
        if item.digest is None or batch.options.dedupe:
            yield item
            continue

        def exists(number: int) -> bool:
            digest = _numbered(item.digest or "", number)  # noqa: B023 - called before the next
            return digest in new or db.execute(statements.HAS_DIGEST, (digest, batch.batch_id)).fetchone() is not None

        first_free = 1
        while exists(first_free):
            first_free *= 2
        last = first_free // 2
        while first_free - last > 1:
            middle = (last + first_free) // 2
            last, first_free = (middle, first_free) if exists(middle) else (last, middle)
        new.add(digest := _numbered(item.digest, first_free))
        yield replace(item, digest=digest)


def _numbered(digest: str, number: int) -> str:
    return digest if number == 1 else f"{digest}:{number}"


def drop_digests(db: sqlite3.Connection, batch_id: str, limit: int) -> None:
    """Drop the digests of up to *limit* unfinished items, and the recipe of the batch if there are no more."""
    if db.execute(statements.DROP_DIGESTS, (batch_id, limit)).rowcount < limit:
        db.execute(statements.DROP_RECIPE, (batch_id,))


def has_equal_before(db: sqlite3.Connection, item: Run) -> bool:
    values = (item.digest, item.batch_id, item.position, item.attempt)
    return db.execute(statements.EQUAL_BEFORE, values).fetchone() is not None


def take_results(
    db: sqlite3.Connection, batch: Batch, after: int, limit: int, at: datetime, *, is_own: bool
) -> int | None:
    """See ``BatchStore.take_results``. An item without steps has not been executed, so it has cost nothing."""
    query = statements.pending_with_equal(is_own=is_own, are_failures_taken=batch.options.reuse_failures)
    rows = db.execute(query, (batch.batch_id, after, limit)).fetchall()
    ended = queries.Ended()
    for row_id, _, donor in rows:
        if donor is not None:
            (status,) = db.execute(statements.TAKE_RESULT, (micros(at), donor, row_id)).fetchone()
            ended[batch.batch_id, RunStatus(status)] += 1
    queries.count_ended(db, ended)
    return rows[-1][1] if len(rows) == limit else None

"""The ended items of a batch, in pages."""

from collections.abc import AsyncIterator, Sequence

import msgspec

from flock.runs import Engine, Run, RunStatus, Time

#: Items per page.
ITEMS_PER_PAGE = 500


class BatchItem(msgspec.Struct, frozen=True, kw_only=True):
    """One ended item in a download: an element of the JSON array, or a line of NDJSON.

    ``extra`` contains the kept columns of its row, if there are any. ``version`` is there if the batch has several, and
    ``usage`` and ``cost`` on request.
    """

    position: int
    run_id: str
    status: RunStatus
    extra: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    inputs: msgspec.Raw
    result: msgspec.Raw | None
    error: str | None
    error_type: str | None
    started_at: Time | None
    completed_at: Time | None
    version: str | msgspec.UnsetType = msgspec.UNSET
    usage: dict[str, int] | msgspec.UnsetType | None = msgspec.UNSET
    cost: float | msgspec.UnsetType = msgspec.UNSET


async def item_pages(
    engine: Engine,
    batch_id: str,
    *,
    after: int = -1,
    limit: int = 2**31,
    statuses: Sequence[RunStatus] = tuple(RunStatus),
) -> AsyncIterator[Sequence[Run]]:
    """Yield pages of up to *limit* items of a batch after the position *after*, in order; see ``Engine.get_items``."""
    while limit:
        pages = [await engine.get_items(batch_id, after=after, limit=min(limit, ITEMS_PER_PAGE), statuses=statuses)]
        if not pages[0]:
            break
        after, limit = pages[0][-1].position or 0, limit - len(pages[0])
        yield pages.pop()  # do not hold the page while the client reads it

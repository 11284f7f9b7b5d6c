"""The results of a batch as a download, in constant memory."""

from collections.abc import AsyncIterator, Sequence

import msgspec

from flock.runs import Run
from flock.tables import CSVWriter
from flock.wire import BatchItem, shown_as
from flock.workflow import Columns

__all__ = ["RESULT_TYPES", "results_as"]

#: The media types of a download, by the names that ``?format=`` has for them.
RESULT_TYPES = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv"}


async def results_as(
    format_: str, pages: AsyncIterator[Sequence[Run]], columns: Columns, escape_formulas: bool
) -> AsyncIterator[bytes]:
    """The items of *pages* in a format of ``RESULT_TYPES``."""
    table = CSVWriter(*columns, escape_formulas=escape_formulas)
    encoder, separator = msgspec.json.Encoder(), b""
    yield {"json": b"[", "ndjson": b"", "csv": table.header()}[format_]
    async for page in pages:
        if format_ == "csv":
            yield table.rows(page)
            continue
        items = [shown_as(BatchItem, item) for item in page]
        if format_ == "ndjson":
            yield encoder.encode_lines(items)
        else:
            yield separator + encoder.encode(items)[1:-1]
            separator = b","
    yield b"]\n" if format_ == "json" else b""

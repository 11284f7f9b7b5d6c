"""Files with rows, in any of ``FORMATS``: local files, and those in the folder of a server."""

import gzip
import zlib
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
from msgspec.structs import replace

from flock.errors import DefinitionError, InvalidData, TooLarge
from flock.files import CHUNK_BYTES, open_below
from flock.formats import ENDINGS, FORMATS, format_of, is_gzipped
from flock.rows.array import array_rows
from flock.rows.binary import binary_records
from flock.rows.dialect import CSVDialect
from flock.rows.tables import NO_DIALECT, RowMapping, csv_rows, ndjson_rows, table_rows
from flock.runs import Row

#: Max size and nesting depth of one row in a local file.
MAX_ROW_BYTES = 16 * 1024 * 1024
LIMITS = {"max_row_bytes": MAX_ROW_BYTES, "max_depth": 100}


def rows_in(
    format_: str, chunks: AsyncIterable[bytes], row_mapping: RowMapping, dialect: CSVDialect, **options: Any
) -> AsyncGenerator[Row, None]:
    """Return the rows in a file of *format_*, one of ``FORMATS``, that arrives in *chunks*.

    Args:
        options: ``max_row_bytes``, ``max_depth`` and ``are_names_counted``; see ``csv_rows``.

    Raises: InvalidData if it needs a package that is not installed. Iterating raises InvalidData and TooLarge; see
        ``csv_rows``, ``ndjson_rows``, ``array_rows`` and ``binary_records``.
    """
    FORMATS[format_].check_installed(is_read=True)
    limits = {name: options.pop(name, default) for name, default in LIMITS.items()}
    if format_ in ("json", "ndjson"):
        return (array_rows if format_ == "json" else ndjson_rows)(chunks, row_mapping, **limits)
    if FORMATS[format_].extra:
        records = binary_records(format_, chunks, limits["max_row_bytes"])
        return table_rows(records, row_mapping, NO_DIALECT, max_depth=limits["max_depth"], **options)
    dialect = replace(dialect, delimiter="\t") if format_ == "tsv" else dialect
    return csv_rows(chunks, row_mapping, dialect, **limits, **options)


def file_rows(path: Path, row_mapping: RowMapping, dialect: CSVDialect) -> AsyncGenerator[Row, None]:
    """Return the rows of a local file, optionally compressed with gzip.

    Raises: DefinitionError if the format cannot be determined from its name. Iterating raises OSError, and what
        ``rows_in`` raises.
    """
    format_ = format_of(path)
    if format_ is None:
        raise DefinitionError(
            f"The format of {path.name} is unknown. The file name must end in {ENDINGS}, optionally followed by .gz."
        )
    return rows_in(format_.name, local_file(path), row_mapping, dialect)


async def local_file(path: Path) -> AsyncGenerator[bytes, None]:
    with await anyio.to_thread.run_sync(gzip.open if is_gzipped(path) else open, path, "rb") as file:
        try:
            while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
                yield chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            raise InvalidData.of(f"{path.name} is not a valid gzip file: {exc}.") from exc


async def read_file(folder: Path, name: str, max_bytes: int) -> AsyncIterator[bytes]:
    """Yield the bytes of the file *name* below *folder*, read in a worker thread.

    Raises:
        InvalidData: the file does not exist, or is outside of *folder* after following links. The error is the same.
        TooLarge: it is longer than *max_bytes*.
    """
    try:
        file = await anyio.to_thread.run_sync(open_below, folder, name)
    except (OSError, ValueError) as exc:
        detail = "There is no file with that name in the folder that this server reads."
        raise InvalidData.of(detail, "/batch_inputs") from exc
    with file:
        bytes_left = max_bytes
        while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
            bytes_left -= len(chunk)
            if bytes_left < 0:
                raise TooLarge(f"The file is longer than {max_bytes} bytes, the limit of this server. Split it.")
            yield chunk

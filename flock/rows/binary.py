"""Tables that are read from and written to a file, not a stream: XLSX and Parquet, with the extras of these names.

The packages are imported here only when such a table is read or written, in a worker thread.
"""

import datetime
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import anyio.to_thread
import msgspec

from flock.errors import InvalidData, StoreError, TooLarge
from flock.rows.tables import row_too_long

#: Records that are read in one step, pieces in which a file is sent, and pages in a row group that is written.
RECORDS_PER_STEP, PIECE_BYTES, PAGES_PER_GROUP = 100, 64 * 1024, 20
#: Max unpacked size of the parts of an XLSX file: of the sheets, which are read as a stream; of the texts, which are
#: held in memory; and of the styles and other parts, which become objects.
MAX_PARTS_BYTES = {"worksheet": 1024 * 1024 * 1024, "sharedStrings": 64 * 1024 * 1024, "others": 4 * 1024 * 1024}
#: Max ratio of the size of a part and its compressed size. It applies only above the second one. And the max unpacked
#: size of a row group of Parquet, in which each value is counted once.
MAX_RATIO, MIN_UNPACKED_BYTES, MAX_GROUP_BYTES = 100, 16 * 1024 * 1024, 256 * 1024 * 1024
#: Max XML tags of a part for each byte of its compressed size. It applies only above the second one.
MAX_TAG_RATIO, MIN_TAGS = 20, 100_000
#: Folders of an XLSX file that are not read.
UNREAD = ("xl/media/", "xl/drawings/", "xl/charts/", "xl/embeddings/", "xl/pivotCache/", "customXml/")
#: Limits of Excel. Its numbers have integers exactly up to the last one.
MAX_SHEET_ROWS, MAX_CELL_CHARS, MAX_EXACT = 1024 * 1024, 32_767, 2**53
#: The number of a row, and its cells.
Record = tuple[int, Sequence[Any]]

# In


async def binary_records(
    format_: str, chunks: AsyncIterable[bytes], max_row_bytes: int
) -> AsyncGenerator[Record, None]:
    """Yield the records of a table with the number of their row, first the header. Empty cells are "".

    Raises: InvalidData if the file is not valid; TooLarge if it unpacks to too much; StoreError if the disk is full.
    """
    with tempfile.TemporaryFile() as file:
        async for chunk in chunks:
            await _written(file.write, chunk)
        await _written(file.flush)
        records = _excel_records(file) if format_ == "xlsx" else _parquet_records(file, max_row_bytes)
        count = 1  # nothing else is read if the header is refused
        while True:
            try:
                step = await anyio.to_thread.run_sync(_step, records, count, max_row_bytes)
                count = RECORDS_PER_STEP
            except (InvalidData, TooLarge):
                raise
            except Exception as exc:  # the packages have no common error for a file that is not valid
                reason = str(exc).strip().partition("\n")[0][:200] or type(exc).__name__
                raise InvalidData.of(f"This is not a valid {format_} file, or it was cut short: {reason}") from exc
            if not step:
                return
            for record in step:
                yield record


async def _written(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that writes a temporary file, in a worker thread. Raises StoreError if it cannot be written."""
    try:
        return await anyio.to_thread.run_sync(function, *arguments)
    except OSError as exc:
        raise StoreError(f"The temporary file of a table cannot be written: {exc.strerror or exc}.") from exc


def _step(records: Iterator[Record], count: int, max_row_bytes: int) -> Sequence[Record]:
    """Read up to *count* records: fewer if they are as long as one may be. Raises TooLarge."""
    step, size = list[Record](), 0
    for line, cells in islice(records, count):
        length = sum(len(cell if isinstance(cell, str) else msgspec.json.encode(cell)) for cell in cells)
        if length > max_row_bytes:
            raise row_too_long(line, max_row_bytes)
        step.append((line, cells))
        size += length
        if size > max_row_bytes:
            break
    return step


def _excel_records(file: IO[bytes]) -> Iterator[Record]:
    """Read the first sheet. A formula has the value that Excel has stored with it."""
    from openpyxl.reader.excel import ExcelReader

    reader = ExcelReader(file, read_only=True, data_only=True, keep_links=False)
    _check_parts(reader.archive, [reader.archive.getinfo("[Content_Types].xml")], {})
    reader.read_manifest()
    types = {part.PartName.lstrip("/"): part.ContentType for part in reader.package.Override}
    _check_parts(reader.archive, reader.archive.infolist(), types)
    reader.read()
    sheet, width, last = reader.wb.worksheets[0], 0, 0
    sheet.reset_dimensions()  # a file may claim any
    for line, values in enumerate(map(list, sheet.iter_rows(values_only=True)), 1):
        if line > MAX_SHEET_ROWS:
            raise InvalidData.of(f"A sheet has at most {MAX_SHEET_ROWS:,} rows.", line=line)
        while values and values[-1] in (None, ""):
            values.pop()
        if values:  # empty rows count if a row follows them
            yield from ((empty, [""]) for empty in range(last + 1, line) if width)
            width, last, more = width or len(values), line, len(values) - width if width else 0
            # A row may have 16,384 cells. Of those beside the table only the number is used.
            yield line, [*map(_cell, values[:width]), *[""] * -more, *[values[-1]] * more]


def _check_parts(archive: ZipFile, parts: Collection[ZipInfo], types: Mapping[str, str]) -> None:
    """Raise TooLarge if *parts* with these content types unpack to too much.

    Tags are counted, since each becomes an object, and a million of empty ones are packed to a few kilobytes.
    """
    unpacked = Counter[str]()
    for part in parts:
        if part.file_size > max(MIN_UNPACKED_BYTES, MAX_RATIO * part.compress_size):
            raise TooLarge(f"{part.filename} unpacks to more than {MAX_RATIO} times its size. Save the table as CSV.")
        kind = types.get(part.filename, "").removesuffix("+xml").rpartition(".")[2]
        if kind in MAX_PARTS_BYTES or kind == "main" or not part.filename.startswith(UNREAD):
            unpacked[kind if kind in MAX_PARTS_BYTES else "others"] += part.file_size
    for kind, max_bytes in MAX_PARTS_BYTES.items():
        if unpacked[kind] > max_bytes:
            raise TooLarge(f"This file unpacks to {unpacked[kind]} bytes of {kind}; the limit is {max_bytes}.")
    for part in parts:
        if not part.filename.startswith(UNREAD):
            with archive.open(part) as file:
                tags = sum(chunk.count(b"<") for chunk in iter(lambda: file.read(PIECE_BYTES), b""))
            if tags > max(MIN_TAGS, MAX_TAG_RATIO * part.compress_size):
                raise TooLarge(f"{part.filename} has {tags:,} XML tags, too many for its size. Save the table as CSV.")


def _parquet_records(file: IO[bytes], max_row_bytes: int) -> Iterator[Record]:
    """Read the row groups one by one. A value that is repeated is only repeated in a few rows at a time."""
    from pyarrow.parquet import ParquetFile, read_metadata

    metadata = read_metadata(file)
    leaves = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    for number in range(metadata.num_row_groups):
        size, group = 0, metadata.row_group(number)
        for place, leaf in enumerate(leaves):
            column = group.column(place)
            unpacked, values = _pages(file, column)
            size += unpacked + (8 * values if leaf.max_repetition_level else 0)  # a list is read as a whole
            if any(encoding.startswith("DELTA") and "BYTE" in encoding for encoding in column.encodings):
                raise InvalidData.of(f"The text in {leaf.path!r} is delta encoded. Write it with a dictionary.")
        if size > MAX_GROUP_BYTES:
            raise TooLarge(f"Row group {number} unpacks to {size} bytes; the limit is {MAX_GROUP_BYTES}. Split it.")
    table, row = ParquetFile(file, metadata=metadata, read_dictionary=[leaf.path for leaf in leaves]), 1
    yield row, table.schema_arrow.names
    for batch in table.iter_batches(batch_size=500, use_threads=False):
        parts = [batch]
        while parts:
            part = parts.pop()
            if sum(map(_size, part.columns)) <= max_row_bytes:
                columns = (map(_cell, column.to_pylist()) for column in part.columns)
                yield from enumerate(zip(*columns, strict=True), row)
                row += len(part)
            elif half := len(part) // 2:
                parts += [part.slice(half), part.slice(0, half)]
            else:
                raise row_too_long(row, max_row_bytes)


def _pages(file: IO[bytes], column: Any) -> tuple[int, int]:
    """Return what the pages of a column unpack to in bytes, and their values: by their headers, as a footer may lie."""
    at = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    end, unpacked, values = at + column.total_compressed_size, 0, 0
    while at < end:
        file.seek(at)
        page = _thrift(file)
        if min(page[2], page[3]) < 0:
            raise ValueError("a page has a negative size")
        unpacked += page[2]
        values += page.get(5, page.get(8, {})).get(1, 0)
        at = file.tell() + page[3]
    return unpacked, values


def _thrift(file: IO[bytes]) -> dict[int, Any]:
    """Read a struct in the compact protocol of Thrift. Return its integers and structs by the numbers of the fields."""
    fields, number = dict[int, Any](), 0
    while head := file.read(1)[0]:
        number += head >> 4
        if head & 15 == 12:
            fields[number] = _thrift(file)
        elif head & 15 == 8:
            file.seek(_varint(file), 1)
        elif head & 15 in (4, 5, 6):
            value = _varint(file)
            fields[number] = value >> 1 ^ -(value & 1)
        elif head & 15 not in (1, 2):  # a boolean has no more bytes
            raise ValueError(f"the header of a page has a field of type {head & 15}")
    return fields


def _varint(file: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = file.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number in the header of a page is too long")


def _size(column: Any) -> int:
    """Return the size of the values of a column of Arrow, each as often as it occurs."""
    from pyarrow import compute, int64, types

    if types.is_dictionary(column.type):
        lengths = compute.binary_length(column.dictionary).cast(int64())
        return max(8 * len(column), int(compute.sum(lengths.take(column.indices)).as_py() or 0))
    if types.is_map(column.type):
        first, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return sum(_size(part[first:end]) for part in (column.keys, column.items))
    if types.is_nested(column.type):
        parts = column.flatten()
        return sum(map(_size, parts if isinstance(parts, list) else [parts]))
    return max(8 * len(column), int(column.nbytes))


def _cell(value: Any) -> Any:
    """Return a value as text, or as another value of JSON. What is missing, such as NaN, is ""."""
    if value is None or value != value:
        return ""
    cell = msgspec.to_builtins(value, enc_hook=str)
    # A date of a spreadsheet is a time.
    return cell.replace(" ", "T").removesuffix("T00:00:00") if isinstance(value, datetime.datetime) else cell


# Out


async def binary_pieces(
    format_: str, names: Sequence[str], kinds: Sequence[str], pages: AsyncIterable[Sequence[Sequence[Any]]]
) -> AsyncGenerator[bytes, None]:
    """Write pages of rows to a temporary file, and yield its bytes after an empty piece. Raises TooLarge, StoreError.

    Args:
        kinds: the type of each column in JSON Schema; for others, the values are text.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, make = Path(folder, "results"), _ExcelWriter if format_ == "xlsx" else _ParquetWriter
        writer: _ExcelWriter | _ParquetWriter = await _written(make, path, names, kinds)
        async for page in pages:
            await _written(writer.write, page)
        await _written(writer.close)
        yield b""
        async with await anyio.open_file(path, "rb") as file:
            while piece := await file.read(PIECE_BYTES):
                yield piece


class _ExcelWriter:
    def __init__(self, path: Path, names: Sequence[str], kinds: Sequence[str]) -> None:
        from xlsxwriter import Workbook

        options = dict(constant_memory=True, tmpdir=str(path.parent), strings_to_formulas=False, strings_to_urls=False)
        self._book, self._row = Workbook(str(path), options), 0
        self._sheet, self.close = self._book.add_worksheet("results"), self._book.close
        self.write([names])

    def __del__(self) -> None:  # xlsxwriter leaves the file of its rows open if it is not closed
        self._sheet.row_data_fh.close()

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        for row in rows:
            if self._row == MAX_SHEET_ROWS:
                raise TooLarge(f"A sheet has at most {MAX_SHEET_ROWS:,} rows. Choose another format.")
            cells = (
                str(value)[:MAX_CELL_CHARS]
                if isinstance(value, str) or (isinstance(value, int) and abs(value) > MAX_EXACT)
                else value
                for value in row
            )
            self._sheet.write_row(self._row, 0, cells)
            self._row += 1


def _fitting(value: Any, type_: str) -> Any:
    """Return a value of JSON as one of a column of Arrow; None if it does not fit."""
    if type_ == "string":
        return value if value is None or isinstance(value, str) else msgspec.json.encode(value).decode()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if type_ == "bool" and isinstance(value, bool) else None
    if type_ == "double":
        return float(value) if abs(value) <= sys.float_info.max else None
    return int(value) if type_ == "int64" and value == int(value) and -(2**63) <= value < 2**63 else None


class _ParquetWriter:
    def __init__(self, path: Path, names: Sequence[str], kinds: Sequence[str]) -> None:
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        types = {"integer": pyarrow.int64(), "number": pyarrow.float64(), "boolean": pyarrow.bool_()}
        self._types = [types.get(kind, pyarrow.string()) for kind in kinds]
        self._arrow, self._schema = pyarrow, pyarrow.schema(list(zip(names, self._types, strict=True)))
        self._writer, self._batches = ParquetWriter(path, self._schema), list[Any]()

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        columns = [
            [_fitting(value, str(type_)) for value in column]
            for type_, column in zip(self._types, zip(*rows, strict=True), strict=True)
        ]
        self._batches.append(self._arrow.record_batch(columns, schema=self._schema))
        if len(self._batches) == PAGES_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_batches(self._batches, self._schema))
        self._batches.clear()

    def close(self) -> None:
        self._flush()
        self._writer.close()

"""The results of a CSV file as the same file with more columns."""

import codecs
import re
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from flock.rows.dialect import DELIMITERS, MAX_TRIED_CHARS, CSVDialect
from flock.rows.files import MAX_ROW_BYTES, local_file
from flock.rows.results import CSVWriter
from flock.rows.tables import csv_records, is_empty
from flock.runs import Run


async def detected_dialect(path: Path, dialect: CSVDialect, names: Collection[str]) -> CSVDialect:
    """Return *dialect* with those of *names* replaced that the first line and a byte order mark of the file show.

    They are "delimiter", the most frequent one in the header, and "encoding", UTF-16 or as it is. Raises OSError.
    """
    async with aclosing(local_file(path)) as chunks:
        head = (await anext(chunks, b""))[:MAX_TRIED_CHARS]
    if "encoding" in names and head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        dialect = replace(dialect, encoding="utf-16")
    if "delimiter" in names:
        text = re.sub('"[^"]*"', "", head.decode(dialect.codec, "replace"))
        line = re.split(r"[\r\n]", text, maxsplit=1)[0]
        dialect = replace(dialect, delimiter=max(DELIMITERS, key=line.count))
    return dialect


async def results_like(
    path: Path,
    dialect: CSVDialect,
    pages: AsyncIterator[Sequence[Run]],
    outputs: Collection[str] | None,
    **options: Any,
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of a CSV file unchanged, each with the outputs, ``status`` and ``error`` of its item at the end.

    Delimiter, decimal separator, encoding, byte order mark and line ends are those of the file; UTF-16 is
    little-endian. A character that its encoding does not have is "?". Rows without an item are left out.
    """
    table = CSVWriter((), (), outputs, dialect=replace(dialect, encoding="utf-8"), **options)
    lines, position = list[str](), 0
    async with aclosing(local_file(path)) as head:
        is_marked = dialect.codec == "utf_8" and (await anext(head, b"")).startswith(codecs.BOM_UTF8)
    encoder = (replace(dialect, encoding="utf-8-sig") if is_marked else dialect).encoder()

    def joined(cells: Sequence[str], added: bytes) -> bytes:
        own, ours = "".join(lines).rstrip("\r\n"), added.decode().removesuffix("\r\n")
        own += dialect.delimiter * max(1, 1 + len(header) - len(cells))
        return encoder.encode(f"{own}{ours}{line_end}")

    async with aclosing(local_file(path)) as chunks:
        records = csv_records(chunks, dialect, MAX_ROW_BYTES, lines)
        cells = header = (await anext(records))[1]
        line_end = "".join(lines)[len("".join(lines).rstrip("\r\n")) :] or "\r\n"
        names = CSVWriter(header, (), outputs, **options).names()[len(header) :]
        yield joined(header, table.lines([names]))
        async for page in pages:
            text = bytearray()
            for item in page:
                while position <= (item.position or 0):
                    _, cells = await anext(records)
                    position += not is_empty(cells)
                text += joined(cells, table.rows([item]))
            yield bytes(text)

"""Rows in: JSON, CSV and NDJSON, read piece by piece.

What a reader finds wrong with one row goes with that row; what makes the whole unreadable is raised.
"""

import codecs
import csv
import gzip
import io
import os
import re
import stat
import zlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Literal

import anyio.to_thread
import msgspec

from flock.errors import DefinitionError, FieldError, InvalidData, MalformedJSON, TooLarge
from flock.jsontype import Field, check_depth, escape_pointer, explain, malformed
from flock.runs import Row
from flock.signature import Signature, text_as_json

__all__ = [
    "EXPANSION",
    "MAX_ROW_BYTES",
    "Fill",
    "TableFormat",
    "csv_rows",
    "ending_of",
    "file_rows",
    "is_packed",
    "json_rows",
    "ndjson_rows",
    "read_file",
    "table_format",
]

#: How rows lie in a file.
TableFormat = Literal["csv", "ndjson"]

#: How many times as long as what was sent the static inputs of all its rows may become.
EXPANSION = 16
#: How much of a file is read at once.
CHUNK_BYTES = 64 * 1024
#: How much of CSV is read at once, at least.
GATHERED_CHARS = 64 * 1024
#: How long one row of a program's own file may be, and how deep it may be nested.
MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_ROW_DEPTH = 100
#: What a cell holds that JSON would call a number.
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


class Fill:
    """What becomes of the members of a row: names mapped, gaps filled.

    Args:
        static: inputs that each row has which does not bring its own.
        names: what a member of a row is called as an input.
        max_static_bytes: how long those of all rows may be together by now, for they are sent once and kept often.
    """

    def __init__(
        self,
        static: Mapping[str, msgspec.Raw] | None,
        names: Mapping[str, str] | None,
        max_static_bytes: Callable[[], int],
    ) -> None:
        self.static = static or {}
        self.names = names or {}
        self.is_idle = not self.static and not self.names
        self._max_static_bytes = max_static_bytes
        self._row_bytes = len(msgspec.json.encode(self.static)) if static else 0
        self._static_bytes = 0

    def row(self, members: Mapping[str, msgspec.Raw], at: str = "", line: int | None = None) -> Row:
        """Raises TooLarge."""
        if self.is_idle:
            return Row(inputs=msgspec.Raw(msgspec.json.encode(members)), at=at, line=line)
        self._count()
        sources = {name: f"/static_inputs/{escape_pointer(name)}" for name in self.static}
        inputs, own, errors = dict(self.static), set(), []
        for key, value in members.items():
            name, pointer = self.names.get(key, key), f"{at}/{escape_pointer(key)}"
            if name in own:
                detail = f"Another member becomes the input {name!r} too."
                errors.append(FieldError(detail=detail, pointer=pointer, line=msgspec.UNSET if line is None else line))
            own.add(name)
            sources[name], inputs[name] = pointer, value
        raw = msgspec.Raw(msgspec.json.encode(inputs))
        return Row(inputs=raw, at=at, line=line, sources=sources, errors=tuple(errors))

    def _count(self) -> None:
        self._static_bytes += self._row_bytes
        if self._static_bytes > (allowed := self._max_static_bytes()):
            raise TooLarge(
                f"With the static inputs the rows become too long: those may have {allowed} bytes together, "
                f"{EXPANSION} times what may be sent at once or was sent."
            )


# JSON


def json_rows(rows: Iterable[Mapping[str, msgspec.Raw]], fill: Fill) -> Iterator[Row]:
    """The rows of a JSON body's ``batch_inputs``. Raises TooLarge."""
    for position, members in enumerate(rows):
        yield fill.row(members, at=f"/batch_inputs/{position}")


async def ndjson_rows(
    chunks: AsyncIterable[bytes], fill: Fill, *, max_row_bytes: int, max_depth: int
) -> AsyncGenerator[Row, None]:
    """One object a line; empty lines are none.

    Raises: TooLarge where a line is longer than *max_row_bytes*, or all together with static inputs are too long.
    """
    number = 0
    async for lines in _lines(chunks, max_row_bytes):
        for line in lines:
            number += 1
            if text := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield _ndjson_row(text, number, fill, max_depth)


async def _lines(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[Sequence[bytes]]:
    """Lines, as many as a chunk ends. Raises TooLarge."""
    rest: list[bytes] = []
    number = length = 0
    async for chunk in chunks:
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            lines = b"".join([*rest, head]).split(b"\n")
            _check_lengths(lines, number, max_bytes)
            yield lines
            number, rest, length = number + len(lines), [], 0
        rest.append(tail)
        length += len(tail)
        if length > max_bytes:
            raise _row_too_long(number + 1, max_bytes)
    lines = [b"".join(rest)]
    yield lines


def _check_lengths(lines: Sequence[bytes], number: int, max_bytes: int) -> None:
    for index, line in enumerate(lines, 1):
        if len(line) > max_bytes:
            raise _row_too_long(number + index, max_bytes)


def _row_too_long(line: int, max_bytes: int) -> TooLarge:
    return TooLarge(f"The row in line {line} is longer than {max_bytes} bytes, all that one row may have.")


def _ndjson_row(line: bytes, number: int, fill: Fill, max_depth: int) -> Row:
    try:
        check_depth(line, max_depth)
        line.decode()  # a decoder skips over what it does not look into
        members = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        detail = "A line is one JSON object."
    except (MalformedJSON, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        found = exc if isinstance(exc, MalformedJSON) else malformed(line, exc)
        detail = str(found).replace("line 1, ", "")  # its own line is told beside it
    else:
        return fill.row(members, line=number)
    error = FieldError(detail=detail, pointer="", line=number)
    return Row(inputs=msgspec.Raw(b"{}"), line=number, errors=(error,))


# CSV


async def csv_rows(
    chunks: AsyncIterable[bytes],
    signature: Signature,
    fill: Fill,
    *,
    delimiter: str,
    max_row_bytes: int,
    max_depth: int,
) -> AsyncGenerator[Row, None]:
    """Rows of CSV (RFC 4180) behind a header, their cells typed by *signature*; empty lines are none.

    Raises:
        InvalidData: the header does not fit the signature, or what follows is no CSV, or not UTF-8; with the line.
        TooLarge: as ``ndjson_rows``.
    """
    columns: _Columns | None = None
    async for line, cells in _records(chunks, delimiter, max_row_bytes):
        if columns is None:
            columns = _Columns(cells, signature, fill, line, max_depth)
        else:
            yield columns.row(cells, line)
    if columns is None:
        raise _unreadable("There is no header: the first line names the columns.", 1)


async def _records(
    chunks: AsyncIterable[bytes], delimiter: str, max_bytes: int
) -> AsyncIterator[tuple[int, Sequence[str]]]:
    """Each record that is not empty, with the line in which it begins, as Python's own reader has it.

    That reader forgets an unfinished record at the end of what it was given, so those lines are kept for the next time.
    """
    decoder, rest, number = codecs.getincrementaldecoder("utf-8-sig")(), "", 1
    new: list[str] = []
    new_chars = 0
    async for chunk in _with_end(chunks):
        try:
            new.append(decoder.decode(chunk or b"", final=chunk is None))
        except UnicodeDecodeError as exc:
            line = number + "".join([rest, *new]).count("\n") + exc.object[: exc.start].count(b"\n")
            raise _unreadable("This is not UTF-8.", line) from exc
        new_chars += len(new[-1])
        if chunk is not None and new_chars < max(GATHERED_CHARS, len(rest)):
            continue  # what is unfinished is read anew each time, and must not be for each few bytes
        text, new, new_chars = "".join([rest, *new]), [], 0
        end = len(text) if chunk is None else max(text.rfind("\n"), text.rfind("\r", 0, -1)) + 1
        whole, rest = text[:end], text[end:]
        lines = list(io.StringIO(whole, newline=""))
        reader, done = csv.reader(lines, delimiter=delimiter, strict=True), 0
        try:
            for cells in reader:
                if sum(map(len, cells)) > max_bytes:
                    raise _row_too_long(number + done, max_bytes)
                if cells:
                    yield number + done, cells
                done = reader.line_num
        except csv.Error as exc:
            if chunk is None or str(exc) != "unexpected end of data":
                reason = f"This is no CSV: {exc}."
                if str(exc).startswith("field larger"):
                    reason = f"A cell has more than {csv.field_size_limit():,} characters; NDJSON takes longer ones."
                raise _unreadable(reason, number + done) from exc
        rest = "".join(lines[done:]) + rest
        number += done
        if len(rest) > max_bytes:
            raise _row_too_long(number, max_bytes)


async def _with_end(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes | None]:
    async for chunk in chunks:
        yield chunk
    yield None


def _unreadable(detail: str, line: int, pointer: str = "") -> InvalidData:
    return InvalidData([FieldError(detail=detail, pointer=pointer, line=line)])


class _Columns:
    """What the header says, and how cells become inputs. Raises InvalidData where it does not fit the signature."""

    def __init__(self, header: Sequence[str], signature: Signature, fill: Fill, line: int, max_depth: int) -> None:
        self._header, self._fill = [name.strip() for name in header], fill
        fields = {field.name: field for field in signature.fields}
        names = [fill.names.get(column, column) for column in self._header]
        errors = []
        for place, (column, name) in enumerate(zip(self._header, names, strict=True), 1):
            problem = ""
            if not column:
                problem = f"Column {place} has no name."
            elif name in names[: place - 1]:
                problem = f"Another column becomes the input {name!r} too."
            elif name not in fields:
                problem = f"There is no input {name!r}. The inputs are: {', '.join(fields) or 'none'}."
            if problem:
                errors.append(FieldError(detail=problem, pointer=f"/{escape_pointer(column)}", line=line))
        for column in fill.names.keys() - set(self._header):
            detail = f"input_mapping names the column {column!r}, and there is none."
            errors.append(FieldError(detail=detail, pointer=f"/{escape_pointer(column)}", line=line))
        for field in signature.fields:
            if field.required and field.name not in names and field.name not in fill.static:
                detail = f"The input {field.name!r} is required, and there is no column for it."
                errors.append(FieldError(detail=detail, pointer=f"/{escape_pointer(field.name)}", line=line))
        if errors:
            raise InvalidData(errors[:100])
        self._cells = [_cell_reader(fields[name], name in fill.static, max_depth) for name in names]

    def row(self, cells: Sequence[str], line: int) -> Row:
        values = zip(self._header, self._cells, cells, strict=False)
        row = self._fill.row(
            {column: raw for column, read, cell in values if (raw := read(cell)) is not None}, line=line
        )
        if len(cells) == len(self._header):
            return row
        detail = f"This row has {len(cells)} cells, and the header has {len(self._header)}."
        return msgspec.structs.replace(row, errors=(FieldError(detail=detail, pointer="", line=line),))


def _cell_reader(field: Field, has_static: bool, max_depth: int) -> Callable[[str], msgspec.Raw | None]:
    """How a cell becomes JSON; what does not fit is left as text, and found when the inputs are checked."""
    empty: msgspec.Raw | None = msgspec.Raw(b'""')
    if has_static or not field.required:
        empty = None
    elif not explain(field.type, b"null", ""):
        empty = msgspec.Raw(b"null")
    takes_bool = not explain(field.type, b"true", "") and bool(explain(field.type, b'"true"', ""))

    def read(cell: str) -> msgspec.Raw | None:
        if not cell:
            return empty
        if field.type is str:
            return msgspec.Raw(msgspec.json.encode(cell))
        text = cell.strip()
        if takes_bool and text.lower() in ("true", "false"):  # spreadsheets write TRUE
            return msgspec.Raw(text.lower().encode())
        if field.type in (int, float) and NUMBER.fullmatch(text):
            return msgspec.Raw(text.encode())
        try:
            check_depth(cell.encode(), max_depth)
        except MalformedJSON:
            return msgspec.Raw(msgspec.json.encode(cell))
        return text_as_json(field.type, cell)

    return read


# Files


def table_format(path: Path) -> TableFormat | None:
    """What is in a file, by the ending of its name, before ``.gz``; None where that does not tell."""
    ending = ending_of(path)
    return "csv" if ending == ".csv" else "ndjson" if ending in (".ndjson", ".jsonl") else None


def ending_of(path: Path) -> str:
    """The ending of a file's name in lower case, before ``.gz``, or ""."""
    return (path.with_suffix("") if is_packed(path) else path).suffix.lower()


def is_packed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def file_rows(path: Path, signature: Signature, fill: Fill, *, delimiter: str = ",") -> AsyncGenerator[Row, None]:
    """The rows of a file of the program's own, of CSV or NDJSON, also packed by gzip.

    Raises: DefinitionError where its name does not tell what is in it. To read them raises OSError, InvalidData and
        TooLarge; see ``csv_rows`` and ``ndjson_rows``.
    """
    format_, chunks = table_format(path), _own_file(path)
    if format_ is None:
        raise DefinitionError(
            f"What is in {path.name}? Rows are read from files whose names end in .csv, .ndjson or .jsonl, also with "
            '.gz after it. Save a spreadsheet as "CSV UTF-8".'
        )
    if format_ == "ndjson":
        return ndjson_rows(chunks, fill, max_row_bytes=MAX_ROW_BYTES, max_depth=MAX_ROW_DEPTH)
    return csv_rows(chunks, signature, fill, delimiter=delimiter, max_row_bytes=MAX_ROW_BYTES, max_depth=MAX_ROW_DEPTH)


async def _own_file(path: Path) -> AsyncIterator[bytes]:
    with await anyio.to_thread.run_sync(gzip.open if is_packed(path) else open, path, "rb") as file:
        try:
            while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
                yield chunk
        except (gzip.BadGzipFile, EOFError, zlib.error) as exc:
            detail = f"{path.name} is no gzip, as its name says: {exc}."
            raise InvalidData([FieldError(detail=detail, pointer="")]) from exc


async def read_file(folder: Path, name: str) -> AsyncIterator[bytes]:
    """The bytes of the file *name* below *folder*, read in a worker thread.

    Raises InvalidData where it is none, or lies elsewhere once all links are followed; it never says which.
    """
    refused = InvalidData(
        [
            FieldError(
                detail="There is no file of that name in the folder that this server reads.", pointer="/batch_inputs"
            )
        ]
    )
    try:
        file = await anyio.to_thread.run_sync(_open_below, folder, name)
    except (OSError, ValueError) as exc:
        raise refused from exc
    with file:
        while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
            yield chunk


def _open_below(folder: Path, name: str) -> io.BufferedReader:
    """Raises OSError or ValueError."""
    root = folder.resolve(strict=True)
    path = (root / name).resolve(strict=True)
    # What was resolved has no links, and one that was put there since, whoever did it, is not followed.
    opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.relative_to(root).parts:
        parent = opened
        try:  # O_NONBLOCK, for to open a pipe would wait for a writer
            opened = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError("not a file")
    return os.fdopen(opened, "rb")

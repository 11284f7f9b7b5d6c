"""Streaming readers for rows of JSON, CSV and NDJSON.

Errors in a single row are part of that row. Errors that make the whole input unreadable are raised.
"""

import codecs
import copy
import csv
import difflib
import io
import itertools
import re
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any

import msgspec

from flock.agents.signature import Signature, text_as_json
from flock.errors import MAX_ECHOED_CHARS, FieldError, InvalidData, MalformedJSON, TooLarge
from flock.fair import FairShare
from flock.jsontype import Field, check_depth, depth_steps, escape_pointer, explain, malformed
from flock.rows.dialect import CSVDialect
from flock.runs import OnExtra, Row

#: Max total size of the static inputs and column names of all rows, as a multiple of the request's size.
MAX_EXPANSION = 16
#: Min size of the pieces in which CSV is parsed.
GATHERED_CHARS = 64 * 1024
#: A cell that is a valid JSON number.
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
#: Matches the error for text of a type that accepts numbers, but not text.
NUMERIC = r"\b(int|float|decimal)\b"
#: A date, and examples of JSON by which a type says whether it takes one, or only a time.
DATE, DAY, MIDNIGHT = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", b'"2000-01-01"', b'"2000-01-01T00:00:00"'
#: The dialect of tables that are not text.
NO_DIALECT = CSVDialect()
#: Number of lines, including empty ones, after which a reader yields to other tasks if its share of time is used.
LINES_PER_STEP = 256
#: Max members of a row, of the static inputs and of a mapping, and max columns of a header.
MAX_MEMBERS = 10_000
#: Max total length of the column names that a reader collects.
MAX_COLUMNS_CHARS = 1024 * 1024
#: Max lines in one row of CSV.
MAX_ROW_LINES = 100_000
#: The error of a header that does not fit and has no rows after it.
JOINED = "There is nothing after this line. If curl has sent a file, use --data-binary: -d joins its lines."
#: Errors for binary files, by their first bytes, and how many are needed.
HEAD_BYTES = 5
OTHER_FILES = {
    b"PK\x03\x04": "This is an Excel file (.xlsx), or another ZIP archive. Name it .xlsx, or send it as XLSX.",
    b"\xd0\xcf\x11\xe0": 'This is an old Excel file (.xls). Save it as "CSV UTF-8".',
    b"PAR1\x15": "This is a Parquet file. Name it .parquet, or send it with the media type of Parquet.",
    b"\x1f\x8b": "This is compressed with gzip. Send it with the header Content-Encoding: gzip, or name the file .gz.",
}
#: Max errors that are reported for one row or for the header.
MAX_ROW_ERRORS = 100
#: Max comparisons of names per upload to find the closest input. Each comparison is slow.
MAX_COMPARED = 1000
#: What to do about a column, or a member, that is not an input.
HINT_FOR_EXTRA = ' Set on_extra="keep" (--on-extra keep) to copy it to the results, or "ignore" to drop it.'

#: The records of a table, each with its line.
Records = AsyncGenerator[tuple[int, Sequence[Any]], None]


class RowMapping:
    """Maps the members of rows to inputs, adds static inputs, and rejects, drops or keeps members that are not inputs.

    Raises InvalidData if *static* or *names* have more than ``MAX_MEMBERS``, or if a value of *names* is not an input.

    Args:
        signature: the inputs.
        static: default inputs for all rows.
        names: maps members of rows to input names; None drops the member.
        max_static_bytes: returns the max total size, at this time, of the static inputs and kept column names of all
            rows. They are sent once, but stored with each row.
        on_extra: what to do with a member that is neither an input nor in *names*.
        result_names: names that cannot be kept, because results have members with these names.

    Attributes:
        columns: the names of all columns, or of all members of rows, in order of first appearance.
        expected: outputs by the columns that have their expected values, which are kept with the types of the outputs.
    """

    def __init__(
        self,
        signature: Signature,
        static: Mapping[str, msgspec.Raw] | None,
        names: Mapping[str, str | None] | None,
        max_static_bytes: Callable[[], int],
        *,
        on_extra: OnExtra = "reject",
        result_names: Collection[str] = (),
    ) -> None:
        for name, given in (("static_inputs", static), ("input_mapping", names)):
            if given is not None and len(given) > MAX_MEMBERS:
                raise InvalidData.of(_too_many(len(given), "members"), f"/{name}")
        self.fields = {field.name: field for field in signature.fields}
        self.static = static or {}
        self.names = {key: name for key, name in (names or {}).items() if name is not None}
        self.dropped = {key: None for key, name in (names or {}).items() if name is None}
        self.columns: dict[str, None] = {}
        self.expected: Mapping[str, Field] = {}
        self._columns_chars = 0
        self.on_extra = on_extra
        self._result_names = result_names
        self._max_static_bytes = max_static_bytes
        self._row_bytes = len(msgspec.json.encode(self.static)) if static else 0
        self._static_bytes = 0
        self._nearest: dict[str, str] = {}
        unknown = [(key, name) for key, name in self.names.items() if name not in self.fields]
        if unknown:  # not checked per row, because each failed row would store the name
            raise InvalidData(
                [
                    FieldError(detail=self.unknown_input(name, ()), pointer=f"/input_mapping/{escape_pointer(key)}")
                    for key, name in unknown[:MAX_ROW_ERRORS]
                ]
            )

    def add_columns(self, names: Collection[str]) -> None:
        """Add *names* to the columns, up to ``MAX_MEMBERS`` names and ``MAX_COLUMNS_CHARS`` characters."""
        for name in names:
            if name not in self.columns:
                self._columns_chars += len(name)
                if len(self.columns) >= MAX_MEMBERS or self._columns_chars > MAX_COLUMNS_CHARS:
                    return
                self.columns[name] = None

    def row(self, members: Mapping[str, msgspec.Raw], at: str = "", line: int | None = None) -> Row:
        """Convert one row. Raises TooLarge."""
        if not (self.static or self.names or self.dropped) and members.keys() <= self.fields.keys():
            return Row(inputs=msgspec.Raw(msgspec.json.encode(members)), at=at, line=line)
        if len(members) > MAX_MEMBERS:
            error = FieldError(detail=_too_many(len(members), "members"), pointer=at)
            return _unreadable_row(msgspec.structs.replace(error, line=line) if line is not None else error, at, line)
        self.count_bytes(self._row_bytes)
        sources = {name: f"/static_inputs/{escape_pointer(name)}" for name in self.static}
        inputs = dict(self.static)
        own: set[str] = set()
        extra: dict[str, msgspec.Raw] = {}
        kept: dict[str, msgspec.Raw] = {}
        errors: list[FieldError] = []
        for key, value in members.items():
            if key in self.dropped:
                continue
            name, pointer = self.names.get(key, key), f"{at}/{escape_pointer(key)}"
            if self.is_extra(key):
                extra[key] = value
                continue
            if len(errors) >= MAX_ROW_ERRORS:
                break
            if name in own:
                errors.append(FieldError(detail=f"More than one member maps to the input {name!r}.", pointer=pointer))
            own.add(name)
            sources[name], inputs[name] = pointer, value
        missing = self.missing(inputs) if extra else set()
        for key, value in extra.items():
            pointer = f"{at}/{escape_pointer(key)}"
            if (nearest := self.nearest(key)) in missing:
                sources[nearest] = pointer  # the error for the missing input would repeat this one
            if problem := self.problem_of(key, missing, inputs):
                errors.append(FieldError(detail=problem, pointer=pointer))
            elif self.on_extra == "keep" or key in self.expected:
                if unreadable := explain(Any, bytes(value), pointer):
                    errors += unreadable
                else:
                    kept[key] = value
            if len(errors) >= MAX_ROW_ERRORS:
                break
        if line is not None:
            errors = [msgspec.structs.replace(error, line=line) for error in errors]
        return Row(
            inputs=msgspec.Raw(msgspec.json.encode(inputs)),
            at=at,
            line=line,
            sources=sources,
            extra=kept,
            errors=tuple(errors),
        )

    def is_extra(self, key: str) -> bool:
        """Whether a member or column is not an input."""
        return key not in self.fields and key not in self.names and key not in self.dropped

    def missing(self, inputs: Collection[str]) -> set[str]:
        """Return the required inputs that are missing."""
        return {name for name, field in self.fields.items() if field.required and name not in inputs}

    def nearest(self, key: str) -> str:
        """Return the input that *key* seems to be a misspelling of, or ""."""
        if key not in self._nearest:
            if len(self._nearest) * len(self.fields) >= MAX_COMPARED or len(key) > MAX_ECHOED_CHARS:
                return ""
            by_name = {name.casefold(): name for name in self.fields}
            matches = difflib.get_close_matches(key.casefold(), by_name, n=1)
            self._nearest[key] = by_name[matches[0]] if matches else ""
        return self._nearest[key]

    def problem_of(self, key: str, missing: Collection[str], inputs: Collection[str]) -> str:
        """Return an error message for a member or column that is not an input, or "" if it is accepted."""
        if key in self.expected:
            return ""
        if self.on_extra == "reject" or self.nearest(key) in missing:
            return self.unknown_input(key, inputs, HINT_FOR_EXTRA)
        if self.on_extra == "keep" and key in self._result_names:
            shown = key[:MAX_ECHOED_CHARS]
            return f'{shown!r} cannot be kept: results have a member of that name. Rename it, or set on_extra="ignore".'
        return ""

    def unknown_input(self, name: str, inputs: Collection[str], hint: str = "") -> str:
        """Return the error message for an unknown input, with the closest input that is not in *inputs*, or *hint*."""
        nearest = self.nearest(name)
        if nearest and nearest not in inputs:
            hint = f" Did you mean {nearest!r}?"
        known = ", ".join(self.fields) or "none"
        return f"There is no input {name[:MAX_ECHOED_CHARS]!r}.{hint} Known inputs: {known}."

    def count_bytes(self, row_bytes: int, what: str = "static inputs") -> None:
        """Count data that is sent once but stored with each row. Raises TooLarge."""
        self._static_bytes += row_bytes
        if self._static_bytes > (allowed := self._max_static_bytes()):
            raise TooLarge(
                f"The {what} of all rows are longer than {allowed} bytes in total, {MAX_EXPANSION} times the size of "
                "the upload or of the largest JSON body. Send shorter ones, or fewer rows at once."
            )


def _too_many(number: int, what: str) -> str:
    return f"There are {number:,} {what} here, but the maximum is {MAX_MEMBERS:,}."


def _unreadable_row(error: FieldError, at: str, line: int | None) -> Row:
    return Row(inputs=msgspec.Raw(b"{}"), at=at, line=line, errors=(error,))


# JSON


def json_rows(rows: Iterable[Mapping[str, msgspec.Raw]], row_mapping: RowMapping) -> Iterator[Row]:
    """Yield the rows of ``batch_inputs`` in a JSON body. Raises TooLarge."""
    for position, members in enumerate(rows):
        row_mapping.add_columns(members)
        yield row_mapping.row(members, at=f"/batch_inputs/{position}")


async def ndjson_rows(
    chunks: AsyncIterable[bytes], row_mapping: RowMapping, *, max_row_bytes: int, max_depth: int
) -> AsyncGenerator[Row, None]:
    """Yield one row for each line of NDJSON, without empty lines.

    Raises: TooLarge if a line is longer than *max_row_bytes*, or if the static inputs of all rows are too long.
    """
    number, share = 0, FairShare()
    async for lines in _lines(chunks, max_row_bytes):
        for line in lines:
            number += 1
            if number % LINES_PER_STEP == 0:
                await share.checkpoint()
            if text := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                yield await json_row(text, row_mapping, max_depth, share, line=number)


async def _lines(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[Sequence[bytes]]:
    """Yield, for each chunk, the lines that it completes. Raises TooLarge."""
    rest, number = bytearray(), 0
    async for chunk in chunks:
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            lines = (bytes(rest) + head).split(b"\n")
            for line_number, line in enumerate(lines, number + 1):
                if len(line) > max_bytes:
                    raise row_too_long(line_number, max_bytes)
            yield lines
            number += len(lines)
            rest.clear()
        rest += tail
        if len(rest) > max_bytes:
            raise row_too_long(number + 1, max_bytes)
    yield [bytes(rest)]


def row_too_long(line: int, max_bytes: int) -> TooLarge:
    return TooLarge(f"The row in line {line} is longer than {max_bytes} bytes, the limit for one row.")


async def json_row(
    text: bytes, row_mapping: RowMapping, max_depth: int, share: FairShare, *, at: str = "", line: int | None = None
) -> Row:
    """Convert one JSON object. An error in it is part of the row."""
    try:
        for _ in depth_steps(text, max_depth):
            await share.checkpoint()
        text.decode()  # the decoder does not validate skipped values
        members = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        detail = f"Each {'element' if line is None else 'line'} must be one JSON object."
    except (MalformedJSON, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        malformed_json = exc if isinstance(exc, MalformedJSON) else malformed(text, exc)
        detail = str(malformed_json).replace("line 1, ", "")  # the place in the file is reported separately
    else:
        await share.checkpoint()
        row_mapping.add_columns(members)
        return row_mapping.row(members, at=at, line=line)
    error = FieldError(detail=detail, pointer=at, line=msgspec.UNSET if line is None else line)
    return _unreadable_row(error, at, line)


# CSV


def csv_rows(
    chunks: AsyncIterable[bytes], row_mapping: RowMapping, dialect: CSVDialect, *, max_row_bytes: int, **options: Any
) -> AsyncGenerator[Row, None]:
    """Return the rows of CSV (RFC 4180) after the header, without empty lines; see ``table_rows``.

    Raises, when it is read: InvalidData, with the line, if the text is not valid CSV or has another encoding; TooLarge
        as in ``ndjson_rows``.
    """
    return table_rows(csv_records(chunks, dialect, max_row_bytes), row_mapping, dialect, **options)


async def table_rows(
    records: Records, row_mapping: RowMapping, dialect: CSVDialect, *, max_depth: int, are_names_counted: bool = True
) -> AsyncGenerator[Row, None]:
    """Yield the rows of a table: *records* with their lines, first the header.

    Cells are text, or values of JSON. They are converted to the types of the signature of *row_mapping*.

    Args:
        are_names_counted: whether the column names that rows store count like static inputs.

    Raises: InvalidData if the header does not match the signature; what *records* raise.
    """
    columns: _Columns | None = None
    names_bytes, share = 0, FairShare()
    async for line, cells in records:
        if columns is None:
            if len(cells) > MAX_MEMBERS:
                raise InvalidData.of(_too_many(len(cells), "columns"), line=line)
            try:
                columns = _Columns(list(map(str, cells)), row_mapping, dialect, line, max_depth)
            except InvalidData as exc:
                if await anext(records, None) is not None:
                    raise
                raise InvalidData([*exc.errors, FieldError(detail=JOINED, pointer="", line=line)]) from exc
            names_bytes = columns.names_bytes if are_names_counted else 0
            await share.checkpoint()
        elif is_empty(cells):
            yield Row(inputs=msgspec.Raw(b"{}"), line=line, is_empty=True)
        else:
            row_mapping.count_bytes(names_bytes, "names of the columns")
            yield columns.row(cells, line)
    if columns is None:
        raise InvalidData.of("The header is missing. The first line must contain the column names.", line=1)


async def csv_records(
    chunks: AsyncIterable[bytes], dialect: CSVDialect, max_bytes: int, lines: list[str] | None = None
) -> Records:
    """Yield each record that is not empty, as parsed by Python's ``csv``, with its first line. *lines* has its text.

    Python's reader drops an incomplete record at the end of its input, so these lines are parsed again with more input.
    """
    decoder, rest, number, has_yielded = dialect.decoder(), "", 1, False
    lines = [] if lines is None else lines  # of the current record
    new: list[str] = []
    new_chars, first_bytes, share = 0, b"", FairShare()
    async for chunk in with_end(chunks):
        first_bytes = first_bytes or (chunk or b"")[:HEAD_BYTES]
        check_text(first_bytes)
        try:
            new.append(decoder.decode(chunk or b"", final=chunk is None))
        except UnicodeError as exc:
            line = number + "".join([rest, *new]).count("\n")
            if isinstance(exc, UnicodeDecodeError):
                line += exc.object[: exc.start].count(b"\n")
            raise InvalidData.of(dialect.decoding_problem(first_bytes), line=line) from exc
        new_chars += len(new[-1])
        if chunk is not None and new_chars < max(GATHERED_CHARS, len(rest)):
            continue  # an incomplete record is parsed again each time, so wait for enough input
        text, new, new_chars = "".join([rest, *new]), [], 0
        end = len(text) if chunk is None else max(text.rfind("\n"), text.rfind("\r", 0, -1)) + 1
        whole, rest = text[:end], text[end:]
        lines.clear()
        reader, done = csv.reader(_recorded(whole, lines, number), delimiter=dialect.delimiter, strict=True), 0
        try:
            for cells in reader:
                if reader.line_num % LINES_PER_STEP == 0:
                    await share.checkpoint()
                if len("".join(cells)) > max_bytes:
                    raise row_too_long(number + done, max_bytes)
                if cells:
                    await share.checkpoint()
                    has_yielded = True
                    yield number + done, cells
                done = reader.line_num
                lines.clear()
        except csv.Error as exc:
            if chunk is None or str(exc) != "unexpected end of data":
                reason = "" if has_yielded else dialect.format_problem(lines[0])
                reason = reason or f"This is not valid CSV: {exc}."
                if str(exc).startswith("field larger"):
                    limit = csv.field_size_limit()
                    reason = f"A cell has more than {limit:,} characters. Use NDJSON for longer values."
                raise InvalidData.of(reason, line=number + done) from exc
        rest = "".join(lines) + rest
        number += done
        if len(rest) > max_bytes:
            raise row_too_long(number, max_bytes)


def is_empty(cells: Sequence[Any]) -> bool:
    """Whether a record has no value."""
    for cell in cells:  # for each row: a generator takes four times as long
        if not isinstance(cell, str) or cell.strip():
            return False
    return True


def check_text(first_bytes: bytes) -> None:
    """Raise InvalidData for a binary file, by its first bytes."""
    for beginning, problem in OTHER_FILES.items():
        if first_bytes.startswith(beginning):
            raise InvalidData.of(problem, line=1)


def _recorded(text: str, lines: list[str], number: int) -> Iterator[str]:
    """Yield the lines of *text*, which starts at line *number*, and add each to *lines*, which the caller clears."""
    for read, line in enumerate(io.StringIO(text, newline="")):
        lines.append(line)
        if len(lines) > MAX_ROW_LINES:
            detail = f"This row has more than {MAX_ROW_LINES:,} lines. A closing quote may be missing."
            raise InvalidData.of(detail, line=number + read - MAX_ROW_LINES)
        yield line


async def with_end(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes | None]:
    async for chunk in chunks:
        yield chunk
    yield None


class _Columns:
    """The header, and the conversion of cells to inputs. Raises InvalidData if it does not match the signature.

    Attributes:
        names_bytes: size, as JSON, of the column names that may be stored with each row: those of kept columns, and of
            mapped columns, which may be in a row's error. Other names are no longer than input names, or not stored.
    """

    def __init__(
        self, header: Sequence[str], row_mapping: RowMapping, dialect: CSVDialect, line: int, max_depth: int
    ) -> None:
        self._header = [name.removeprefix("\ufeff").strip() for name in header]
        mapped = row_mapping.names
        self._dialect = dialect
        self._row_mapping = row_mapping = _ignoring_case(row_mapping, self._header)
        if header and "\x00" in header[0]:  # a Parquet file may have no columns
            raise InvalidData.of(dialect.format_problem(header[0]), line=line)
        row_mapping.add_columns(self._header)
        errors = [
            FieldError(detail=problem, pointer=f"/{escape_pointer(column)}", line=line)
            for column, problem in itertools.islice(self._problems(), MAX_ROW_ERRORS)
        ]
        if all(map(row_mapping.is_extra, self._header)):
            known = {name.casefold() for name in (*row_mapping.fields, *row_mapping.names, *row_mapping.dropped)}
            if problem := dialect.delimiter_problem(self._header, known, is_refused=bool(errors)):
                raise InvalidData.of(problem, line=line)
        if errors:
            raise InvalidData(errors)
        self._cells = [self._reader(column, max_depth) for column in self._header]
        kept = [
            name
            for name in self._header
            if name in mapped or (row_mapping.on_extra == "keep" and row_mapping.is_extra(name))
        ]
        self.names_bytes = len(msgspec.json.encode(dict.fromkeys(kept, ""))) if kept else 0

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Yield each column of the header that has an error, with the message."""
        row_mapping, seen = self._row_mapping, set[str]()
        names = {
            column: row_mapping.names.get(column, column)
            for column in self._header
            if column not in row_mapping.dropped
        }
        inputs = {*names.values(), *row_mapping.static}
        missing, misspelled = row_mapping.missing(inputs), set[str]()
        for place, column in enumerate(self._header, 1):
            if column in row_mapping.dropped:
                continue
            name, problem = names[column], ""
            if row_mapping.is_extra(column):
                if row_mapping.on_extra == "ignore" or column:
                    problem = row_mapping.problem_of(column, missing, inputs)
                    misspelled.add(row_mapping.nearest(column))
                else:
                    problem = f"Column {place} has no name."
                if (row_mapping.on_extra == "keep" or column in row_mapping.expected) and column in seen:
                    problem = problem or f"More than one column is named {column!r}."
            elif name in seen:
                problem = f"More than one column maps to the input {name!r}."
            seen.add(name)
            if problem:
                yield column, problem
        header = set(self._header)
        for column in (name for name in (*row_mapping.names, *row_mapping.dropped) if name not in header):
            yield column, f"input_mapping contains the column {column!r}, but the header does not."
        for column in (name for name in row_mapping.expected if name not in header):
            yield column, f"There is no column {column!r} with expected values."
        for name in (field for field in row_mapping.fields if field in missing and field not in misspelled):
            hint = f'Choose one with input_mapping={{"COLUMN": "{name}"}} (--map COLUMN={name}).'
            yield name, f"The input {name!r} is required, but there is no column for it. {hint}"

    def row(self, cells: Sequence[Any], line: int) -> Row:
        members: dict[str, msgspec.Raw] = {}
        errors: list[FieldError] = []
        for column, read, cell in zip(self._header, self._cells, cells, strict=False):
            try:
                raw = read(cell)
            except ValueError as exc:
                errors.append(FieldError(detail=str(exc), pointer=f"/{escape_pointer(column)}", line=line))
                raw = msgspec.Raw(msgspec.json.encode(cell))
            if raw is not None:
                members[column] = raw
        row = self._row_mapping.row(members, line=line)
        if len(cells) != len(self._header):
            detail = f"This row has {len(cells)} cells, but the header has {len(self._header)}."
            if len(cells) > len(self._header) and self._dialect is not NO_DIALECT:
                detail += f" Put a cell that contains {self._dialect.delimiter!r} in quotes."
            errors = [FieldError(detail=detail, pointer="", line=line)]
        return msgspec.structs.replace(row, errors=(*row.errors, *errors)) if errors else row

    def _reader(self, column: str, max_depth: int) -> Callable[[Any], msgspec.Raw | None]:
        row_mapping = self._row_mapping
        if column in row_mapping.dropped:
            return _drop
        if not row_mapping.is_extra(column):
            name = row_mapping.names.get(column, column)
            return _cell_reader(row_mapping.fields[name], name in row_mapping.static, max_depth, self._dialect)
        if column in row_mapping.expected:
            return _cell_reader(row_mapping.expected[column], False, max_depth, self._dialect)
        return _as_text if row_mapping.on_extra == "keep" else _drop


def _ignoring_case(row_mapping: RowMapping, header: Sequence[str]) -> RowMapping:
    """Return *row_mapping* with case-insensitive matching of columns to inputs, if the match is unique."""
    exact = {row_mapping.names.get(column, column) for column in header if column not in row_mapping.dropped}
    inputs = Counter(name.casefold() for name in row_mapping.fields)
    by_case = {
        name.casefold(): name for name in row_mapping.fields if name not in exact and inputs[name.casefold()] == 1
    }
    columns = Counter(column.casefold() for column in header)
    renamed = copy.copy(row_mapping)
    renamed.names = row_mapping.names | {
        column: by_case[column.casefold()]
        for column in header
        if row_mapping.is_extra(column) and column.casefold() in by_case and columns[column.casefold()] == 1
    }
    return renamed


def _as_text(cell: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(cell))


def _drop(cell: Any) -> None:
    return None


def _cell_reader(
    field: Field, has_static: bool, max_depth: int, dialect: CSVDialect
) -> Callable[[Any], msgspec.Raw | None]:
    """Return a function that converts a cell to JSON. It leaves an invalid cell as text, to be reported by validation.

    It raises ValueError, with a hint for the user, if a number is not in the format of *dialect*.
    """
    empty: msgspec.Raw | None = msgspec.Raw(b'""')
    if has_static or not field.required:
        empty = None
    elif not explain(field.type, b"null", ""):
        empty = msgspec.Raw(b"null")
    not_text = explain(field.type, b'"true"', "")
    takes_bool = not explain(field.type, b"true", "") and bool(not_text)
    wants_time = bool(explain(field.type, DAY, "")) and not explain(field.type, MIDNIGHT, "")
    is_number = any(re.search(NUMERIC, error.detail.partition(", got ")[0]) for error in not_text)

    def read(cell: Any) -> msgspec.Raw | None:
        if cell == "":
            return empty
        if not isinstance(cell, str):
            cell = msgspec.json.encode(cell).decode()
        if field.type is str:
            return _as_text(cell)
        text = cell.strip()
        if takes_bool and text.lower() in ("true", "false"):  # spreadsheets write TRUE and FALSE
            return msgspec.Raw(text.lower().encode())
        if is_number:
            cell = text = dialect.json_number(text)
        if wants_time and re.fullmatch(DATE, text):
            cell = f"{text}T00:00:00"
        if field.type in (int, float) and NUMBER.fullmatch(text):
            return msgspec.Raw(text.encode())
        try:
            check_depth(cell.encode(), max_depth)
        except MalformedJSON:
            return _as_text(cell)
        return text_as_json(field.type, cell)

    return read

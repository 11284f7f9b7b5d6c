"""The results of a batch, in pages and as downloads."""

import contextlib
import csv
import io
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.handoff import Columns
from flock.fair import FairShare
from flock.formats import FORMATS
from flock.rows.binary import binary_pieces
from flock.rows.dialect import CSVDialect
from flock.rows.items import BatchItem
from flock.rows.tables import NO_DIALECT, NUMBER
from flock.runs import DOLLAR, Run, shown_usage
from flock.runs.records import shown_as

#: The last columns of CSV, on request.
USAGE_COLUMNS = ("input_tokens", "output_tokens", "cost")
#: Characters at which a spreadsheet starts a formula, even in full width, and characters that it may skip before them:
#: blanks, quotes, control characters, and zero-width characters such as a byte order mark.
SIGNS = "[=+\\-@\uff1d\uff0b\uff0d\uff20]"
SKIPPED = (
    r'["\x00-\x08\x0b\x0c\x0e-\x20\x7f-\xa0\xad\u034f\u061c\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u2000-\u200f'
    r"\u2028-\u202f\u205f-\u206f\u3000\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]*+"
)
FORMULA = re.compile(rf"[\t\r\n]|{SKIPPED}{SIGNS}")
#: A formula inside a cell. In many countries a semicolon separates cells, and then a newline ends the row.
INNER_FORMULA = re.compile(rf"(?<=[;\t\r\n])(?={SKIPPED}{SIGNS})")
CELL_ENDS = re.compile(r"[;\t\r\n]")
#: The semicolon before such a formula. In JSON it only occurs in strings.
JSON_FORMULA = re.compile(rf";(?={SKIPPED}{SIGNS})")
#: A number that looks like the start of a formula.
SIGNED_NUMBER = re.compile(r"[+-][0-9]+([.,][0-9]+)?")

VersionOf = Callable[[Run], str | None]


class CSVWriter:
    """Writes items of a batch as CSV: kept columns, inputs, outputs, ``status`` and ``error``.

    Args:
        extra: names of the kept columns; see ``Batch.extra_names``.
        inputs, outputs: names of the columns, as in ``Columns``; None for a single column with all values as JSON.
        escape_formulas: insert a ``'`` before text that a spreadsheet would execute, even after a semicolon, a tab or a
            newline. In JSON, such a semicolon is written as ``\\u003b``.
        with_usage: add the columns ``input_tokens``, ``output_tokens`` and ``cost`` at the end.
        version_of: adds a column ``version``; see ``Batch.version_of``.
        dialect: of the file. A character that its encoding does not have is "?".
    """

    def __init__(
        self,
        extra: Collection[str],
        inputs: Collection[str] | None,
        outputs: Collection[str] | None,
        *,
        escape_formulas: bool = True,
        with_usage: bool = False,
        version_of: VersionOf | None = None,
        dialect: CSVDialect = NO_DIALECT,
    ) -> None:
        self._with_usage, self._version_of, self._decimal = with_usage, version_of, dialect.decimal
        self._extra, self._inputs, self._outputs, self._escape_formulas = extra, inputs, outputs, escape_formulas
        self._buffer = io.StringIO()
        self._encoder = dialect.encoder()
        self._writer = csv.writer(self._buffer, delimiter=dialect.delimiter)  # ends lines with CRLF, as in RFC 4180

    def header(self) -> bytes:
        """Return the first line."""
        return self.lines([map(self._cell, self.names())])

    def names(self) -> list[str]:
        """Return the names of the columns. A duplicate name gets a prefix with its origin."""
        names, versions = list(self._extra), ["version"] if self._version_of else []
        for prefix, group in (
            ("inputs", ["inputs"] if self._inputs is None else self._inputs),
            ("result", ["result"] if self._outputs is None else self._outputs),
            ("run", ["status", "error", *versions, *(USAGE_COLUMNS if self._with_usage else ())]),
        ):
            names += [f"{prefix}.{name}" if name in names else name for name in group]
        return names

    def rows(self, items: Iterable[Run]) -> bytes:
        """Return one line for each item."""
        return self.lines(self._row(item) for item in items)

    def _row(self, item: Run) -> Iterator[Any]:
        extra = {} if item.extra is None else msgspec.json.decode(item.extra, type=dict[str, msgspec.Raw])
        for name in self._extra:
            yield self._cell_of(extra.get(name), is_kept=True)
        for names, raw in ((self._inputs, item.inputs), (self._outputs, item.result)):
            if names is None:
                yield "" if raw is None else self._json(raw)
                continue
            members = {} if raw is None else msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            for name in names:
                yield self._cell_of(members.get(name))
        yield item.status.value
        yield self._cell(item.error or "")
        if self._version_of:
            yield self._cell(self._version_of(item) or "")
        if self._with_usage:
            numbers: tuple[Any, ...] = (None, None, None)
            if (usage := item.usage) is not None:
                cost = None if usage.cost is None else f"{Decimal(usage.picodollars) / DOLLAR:f}"
                numbers = usage.input_tokens, usage.output_tokens, cost
            for number in numbers:
                yield self._cell_of(None if number is None else msgspec.Raw(str(number).encode()))

    def _cell_of(self, raw: msgspec.Raw | None, *, is_kept: bool = False) -> Any:
        """Return text unchanged, an absent value and null as "", and other values as JSON."""
        text = b"null" if raw is None else bytes(raw)
        if text.startswith(b'"'):
            cell = msgspec.json.decode(text, type=str)
            return cell if is_kept and SIGNED_NUMBER.fullmatch(cell) else self._cell(cell)
        return "" if raw is None or text == b"null" else self._json(raw)

    def _cell(self, text: str) -> str:
        if not self._escape_formulas:
            return text
        if CELL_ENDS.search(text):  # without one, the other pattern takes milliseconds to find nothing
            text = INNER_FORMULA.sub("'", text)
        return f"'{text}" if FORMULA.match(text) else text

    def _json(self, raw: msgspec.Raw) -> str:
        text = bytes(raw).decode()
        if self._decimal != "." and NUMBER.fullmatch(text):
            return text.replace(".", self._decimal)
        return JSON_FORMULA.sub(r"\\u003b", text) if self._escape_formulas else text

    def lines(self, rows: Iterable[Iterable[Any]]) -> bytes:
        self._writer.writerows(rows)
        text = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return self._encoder.encode(text)


class _TypedTable(CSVWriter):
    """The same columns for formats with types: values of JSON, and lists and objects as text."""

    def _cell_of(self, raw: msgspec.Raw | None, *, is_kept: bool = False) -> Any:
        value = None if raw is None else msgspec.json.decode(raw)
        return bytes(raw or b"").decode() if isinstance(value, list | dict) else value

    def kinds(self) -> list[str]:
        members = [{"": ""} if group is None else group for group in (self._inputs, self._outputs)]
        groups = [dict.fromkeys(self._extra, ""), *members]
        kinds = [group[name] if isinstance(group, Mapping) else "" for group in groups for name in group] + ["", ""]
        kinds += [""] if self._version_of else []
        return [*kinds, "integer", "integer", "number"] if self._with_usage else kinds


async def results_as(
    format_: str,
    pages: AsyncIterator[Sequence[Run]],
    extra: Sequence[str],
    columns: Columns,
    escape_formulas: bool,
    *,
    with_usage: bool = False,
    version_of: VersionOf | None = None,
    has_invalid: bool = False,
    dialect: CSVDialect = NO_DIALECT,
) -> AsyncGenerator[bytes, None]:
    """Yield the items of *pages* in a format of ``FORMATS``, with their tokens and cost if *with_usage*.

    *version_of* adds the version of the agent; see ``Batch.version_of``. *dialect* is that of CSV and, apart from the
    delimiter, of TSV.

    If *has_invalid*, inputs are text in formats with types, since inputs of invalid items may have any type.
    """
    if FORMATS[format_].extra:
        columns = (columns[0] and dict.fromkeys(columns[0], ""), columns[1]) if has_invalid else columns
        typed = _TypedTable(extra, *columns, escape_formulas=False, with_usage=with_usage, version_of=version_of)
        rows = ([list(typed._row(item)) for item in page] async for page in pages)
        written = binary_pieces(format_, typed.names(), typed.kinds(), rows)
        async with contextlib.aclosing(written) as pieces:  # it removes its files
            async for piece in pieces:
                yield piece
        return
    dialect = replace(dialect, delimiter="\t") if format_ == "tsv" else dialect
    options: Any = {"with_usage": with_usage, "version_of": version_of}
    table = CSVWriter(extra, *columns, escape_formulas=escape_formulas, dialect=dialect, **options)
    encoder, share, separator = msgspec.json.Encoder(), FairShare(), b""
    yield b"[" if format_ == "json" else b"" if format_ == "ndjson" else table.header()
    async for page in pages:
        text = bytearray()
        for item in page:
            if format_ in ("csv", "tsv"):
                text += table.rows([item])
            else:
                text += separator + encoder.encode(_batch_item(item, **options))
                text += b"\n" if format_ == "ndjson" else b""
                separator = b"," if format_ == "json" else b""
            await share.checkpoint()
        del page, item  # if the client is slow, hold only the text
        yield bytes(text)
    yield b"]\n" if format_ == "json" else b""


def _batch_item(item: Run, with_usage: bool, version_of: VersionOf | None) -> BatchItem:
    more: dict[str, Any] = {"cost": None, "version": version_of(item) if version_of else None}
    more |= shown_usage(item.usage) if with_usage else {"usage": msgspec.UNSET}
    return shown_as(BatchItem, item, **more)

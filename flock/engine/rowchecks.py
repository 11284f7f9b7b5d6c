"""Checks of a batch's rows, the same for a submission and for a dry run."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec

from flock.agents.agent import Agent
from flock.errors import EngineStopped, FieldError, InvalidData, MalformedJSON, NotFound, TooLarge
from flock.fair import FairShare
from flock.formats import each_row, is_missing
from flock.jsontype import escape_pointer
from flock.pydanticmodel import to_json
from flock.runs import Engine, FileBox, Inputs, ItemLimits, Items, OnInvalid, Row

if TYPE_CHECKING:
    from flock.rows.tables import RowMapping

T = TypeVar("T")

#: Max errors in a batch's items that are reported at once.
MAX_ITEM_ERRORS = 100
#: Max total length of the names of all kept columns. They are stored with each state of the batch.
MAX_EXTRA_NAMES_CHARS = 16 * 1024
#: Max rows that a check shows, and their max total size.
MAX_SHOWN_ROWS = 20
MAX_SHOWN_BYTES = 64 * 1024
#: The error of a batch without rows.
NO_ROWS = FieldError(detail="A batch must have at least one item.", pointer="/batch_inputs")


class CheckedRow(NamedTuple):
    """A row, its kept columns as JSON for the results, its errors, and its files; see ``Signature.take``."""

    row: Row
    extra: msgspec.Raw | None
    errors: Sequence[FieldError]
    contents: Mapping[str, bytes | None] = {}


class RowChecks:
    """The checks of the rows of one batch.

    Args:
        files: of its principal; None if the agent takes none.

    Attributes:
        total: the number of rows that were checked.
        skipped: the number of rows without any value, which are not checked.
        extra_names: the names of the kept columns.
    """

    def __init__(self, agent: Agent, limits: ItemLimits, files: FileBox | None = None) -> None:
        self._find = None if files is None else files.find
        self.total = self.skipped = 0
        self.extra_names: dict[str, None] = {}
        self._agent = agent
        self._limits = limits
        self._extra_names_chars = 0

    async def rows(self, items: Items) -> AsyncGenerator[CheckedRow, None]:
        """Check and yield each row of *items*.

        Raises: TooLarge, and what *items* raises.
        """
        max_items, max_bytes, share = self._limits.max_items, self._limits.max_input_bytes, FairShare()
        async for item in iterate(each_row(items)):
            if isinstance(item, Row) and item.is_empty:
                self.skipped += 1
                continue
            if self.total == max_items:
                raise TooLarge(
                    f"The batch has more than {max_items} items, the limit of this server (max_items). Split it."
                )
            if not isinstance(item, Row):
                at = f"/batch_inputs/{self.total}"
                item = Row(inputs=as_json(item, at, max_bytes), at=at)
            await share.checkpoint()
            extra = self._extra_of(item)
            if len(item.inputs) + len(extra or b"") > max_bytes:
                raise TooLarge(f"A row is longer than {max_bytes} bytes, the limit for one item.")
            yield self._checked(item, extra)
            self.total += 1
            await share.checkpoint()

    def _extra_of(self, row: Row) -> msgspec.Raw | None:
        """Return the kept columns of a row, as they are stored. Raises TooLarge."""
        for name in row.extra:
            if name not in self.extra_names:
                self.extra_names[name] = None
                self._extra_names_chars += len(name)
        if self._extra_names_chars > MAX_EXTRA_NAMES_CHARS:
            raise TooLarge(
                f"The names of the kept columns are longer than {MAX_EXTRA_NAMES_CHARS:,} characters in total. "
                'Send fewer columns, or drop those that are not inputs with on_extra="ignore".'
            )
        return msgspec.Raw(msgspec.json.encode(row.extra)) if row.extra else None

    def _checked(self, row: Row, extra: msgspec.Raw | None) -> CheckedRow:
        places = {error.pointer for error in row.errors} if row.errors else ()
        if row.at in places:  # the row itself could not be read
            return CheckedRow(row, extra, row.errors)
        try:
            inputs, contents = self._agent.input.take(row.inputs, row.at, self._find)
            row = row if inputs is row.inputs else msgspec.structs.replace(row, inputs=inputs)
            return CheckedRow(row, extra, row.errors, contents)
        except InvalidData as exc:
            sources = {escape_pointer(key): at for key, at in row.sources.items()}
            input_errors = [_as_sent(error, row, sources) for error in exc.errors]
        except (MalformedJSON, NotFound) as exc:
            input_errors = [_as_sent(FieldError(detail=str(exc), pointer=row.at), row, {})]
        return CheckedRow(row, extra, (*row.errors, *(each for each in input_errors if each.pointer not in places)))


class RowErrors:
    """The first errors of rows. An error of static inputs or of a whole column occurs in every row but is stored once.

    Attributes:
        rows: the number of rows with errors.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._found: dict[Hashable, FieldError] = {}

    @property
    def is_full(self) -> bool:
        """Whether no more errors would be reported."""
        return max(len(self._found), self.rows) >= MAX_ITEM_ERRORS

    def add(self, row: Row, errors: Sequence[FieldError]) -> None:
        self.rows += 1
        if len(self._found) >= MAX_ITEM_ERRORS:
            return
        for error in errors:
            member = error.pointer.removeprefix(row.at)
            is_of_column = member and error in row.errors
            self._found.setdefault((error.detail, member) if is_of_column else error, error)

    def first(self) -> list[FieldError]:
        return list(self._found.values())[:MAX_ITEM_ERRORS]


class BatchCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a dry run.

    Attributes:
        ok: the batch would be accepted.
        total_items: the number of rows that were read: all of them, unless the rest cannot be read.
        invalid_items: the number of rows with errors.
        skipped_rows: the number of rows without any value, if any.
        rows: the first rows, as they would be stored.
        errors: at most 100 errors. Those that would reject the batch come first.
    """

    ok: bool
    total_items: int
    invalid_items: int
    skipped_rows: int | None
    rows: Sequence[CheckedRow]
    errors: Sequence[FieldError]


async def check_batch(
    engine: Engine, agent: Agent, files: FileBox | None, items: Items, row_mapping: "RowMapping", on_invalid: OnInvalid
) -> BatchCheck:
    """Read and check rows as ``Engine.submit_batch`` of *engine* would, and store nothing.

    Args:
        files: of the principal; None if the agent takes none. *engine* need not be entered.
        row_mapping: the mapping that created the rows of *items*.

    Raises:
        InvalidData: neither a row nor a header can be read.
        TooLarge: the same as ``Engine.submit_batch``.
        EngineStopped: the engine is shutting down, which reading more rows would delay.
    """
    checks = RowChecks(agent, engine.item_limits, files)
    row_errors, rows, shown_bytes = RowErrors(), list[CheckedRow](), 0
    reading_errors: Sequence[FieldError] = ()
    try:
        async for checked in checks.rows(items):
            if engine.is_draining:
                raise EngineStopped("The server is shutting down. Send the rows again after it has restarted.")
            if checked.errors:
                row_errors.add(checked.row, checked.errors)
            shown_bytes += len(checked.row.inputs) + len(checked.extra or b"")
            if len(rows) < MAX_SHOWN_ROWS and shown_bytes <= MAX_SHOWN_BYTES:
                rows.append(checked)
    except InvalidData as exc:
        if not row_mapping.columns:
            raise
        reading_errors = exc.errors
    if not (reading_errors or checks.total):
        reading_errors = [NO_ROWS]
    stops_early = row_errors.is_full and on_invalid == "reject"  # a submission would not read further
    errors = [*row_errors.first(), *reading_errors] if stops_early else [*reading_errors, *row_errors.first()]
    return BatchCheck(
        ok=not reading_errors and (not row_errors.rows or on_invalid == "skip"),
        total_items=checks.total,
        invalid_items=row_errors.rows,
        skipped_rows=checks.skipped or None,
        rows=rows,
        errors=errors[:MAX_ITEM_ERRORS],
    )


def _as_sent(error: FieldError, row: Row, sources: Mapping[str, str]) -> FieldError:
    """Return an error of inputs with a pointer into the data as the client sent it, before mapping and defaults.

    *sources* are those of the row, by escaped name.
    """
    name, slash, rest = error.pointer[len(row.at) + 1 :].partition("/")
    place = sources.get(name)
    pointer = error.pointer if place is None else place + slash + rest
    line = None if (place or "").startswith("/static_inputs/") else row.line
    return FieldError(detail=error.detail, pointer=pointer, line=msgspec.UNSET if line is None else line)


def iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterable[T]:
    """Return *items* as an async iterable."""
    return items if isinstance(items, AsyncIterable) else _each(items)


async def _each(items: Iterable[T]) -> AsyncIterator[T]:
    for item in items:
        yield item


def as_json(inputs: Inputs, at: str, max_bytes: int) -> msgspec.Raw:
    """Return inputs as JSON. A Raw is copied, since it is a view of a request body. Raises InvalidData, TooLarge."""
    try:
        if isinstance(inputs, msgspec.Raw):
            raw = bytes(inputs)
        else:
            known = {name: value for name, value in dict(inputs).items() if value is None or not is_missing(value)}
            raw = msgspec.json.encode(known, enc_hook=to_json)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidData([FieldError(detail=f"It cannot be converted to JSON: {exc}.", pointer=at)]) from exc
    if len(raw) > max_bytes:
        raise TooLarge(f"{at} is longer than {max_bytes} bytes, the limit for one run.")
    return msgspec.Raw(raw)

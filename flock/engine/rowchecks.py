"""The checks of a batch's rows: the same for a batch that is accepted and for one that is only tried."""

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Hashable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from flock.agents.agent import Agent
from flock.errors import FieldError, InvalidData, MalformedJSON, TooLarge
from flock.fair import FairShare
from flock.jsontype import escape_pointer
from flock.runs import Inputs, Items, Row

__all__ = ["CheckedRow", "RowChecks", "RowErrors", "as_json", "each"]

#: How many errors of a batch's items are reported at once.
MAX_ITEM_ERRORS = 100
#: How long the names of all kept columns of a batch may be together: they are kept with each state of the batch.
MAX_EXTRA_NAMES_CHARS = 16 * 1024


class CheckedRow(NamedTuple):
    """A row, what is kept of it for the results as the JSON that is stored, and what is wrong with it."""

    row: Row
    extra: msgspec.Raw | None
    errors: Sequence[FieldError]


class RowChecks:
    """The checks of the rows of one batch.

    Args:
        max_items: rows at most.
        max_input_bytes: the longest row, as JSON.

    Attributes:
        total: how many rows were checked.
        extra_names: the names of the columns that are kept.
    """

    def __init__(self, agent: Agent, *, max_items: int, max_input_bytes: int) -> None:
        self.total = 0
        self.extra_names: dict[str, None] = {}
        self._agent = agent
        self._max_items = max_items
        self._max_input_bytes = max_input_bytes
        self._extra_names_chars = 0

    async def rows(self, items: Items) -> AsyncGenerator[CheckedRow, None]:
        """Each row of *items*, checked.

        Raises: TooLarge; InvalidData if there is no row; whatever *items* raises.
        """
        share = FairShare()
        async for item in each(items):
            if self.total == self._max_items:
                raise TooLarge(f"A batch has at most {self._max_items} items on this server (max_items).")
            if not isinstance(item, Row):
                at = f"/batch_inputs/{self.total}"
                item = Row(inputs=as_json(item, at, self._max_input_bytes), at=at)
            await share.checkpoint()
            extra = self._extra_of(item)
            if len(bytes(item.inputs)) + len(bytes(extra or b"")) > self._max_input_bytes:
                raise TooLarge(f"A row is longer than {self._max_input_bytes} bytes, all that one item takes.")
            yield CheckedRow(item, extra, self._errors_of(item))
            self.total += 1
            await share.checkpoint()
        if not self.total:
            raise InvalidData([FieldError(detail="A batch has at least one item.", pointer="/batch_inputs")])

    def _extra_of(self, row: Row) -> msgspec.Raw | None:
        """What is kept of a row, as it is stored. Raises TooLarge."""
        for name in row.extra:
            if name not in self.extra_names:
                self.extra_names[name] = None
                self._extra_names_chars += len(name)
        if self._extra_names_chars > MAX_EXTRA_NAMES_CHARS:
            raise TooLarge(
                f"The names of the kept columns have more than {MAX_EXTRA_NAMES_CHARS:,} characters together. "
                'Send fewer columns, or drop those that are no input with on_extra="ignore".'
            )
        return msgspec.Raw(msgspec.json.encode(row.extra)) if row.extra else None

    def _errors_of(self, row: Row) -> Sequence[FieldError]:
        places = {error.pointer for error in row.errors}
        if row.at in places:  # the row itself could not be read
            return row.errors
        found: Sequence[FieldError] = ()
        try:
            self._agent.input.decode(row.inputs, row.at)
        except InvalidData as exc:
            sources = {escape_pointer(key): at for key, at in row.sources.items()}
            found = [_as_sent(error, row, sources) for error in exc.errors]
        except MalformedJSON as exc:
            found = [FieldError(detail=f"{exc}.", pointer=row.at)]
        return (*row.errors, *(error for error in found if error.pointer not in places))


class RowErrors:
    """The first errors of rows. One of the static inputs, or of a column, is in every row and is kept once.

    Attributes:
        rows: how many rows have errors.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._found: dict[Hashable, FieldError] = {}

    def __bool__(self) -> bool:
        return self.rows > 0

    @property
    def is_full(self) -> bool:
        """Whether there are as many errors, or rows with errors, as are reported at once."""
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


def _as_sent(error: FieldError, row: Row, sources: Mapping[str, str]) -> FieldError:
    """An error of inputs with a pointer into what the client sent: names not yet mapped, gaps not yet filled.

    *sources* are those of the row, by tokens of a pointer.
    """
    name, slash, rest = error.pointer[len(row.at) + 1 :].partition("/")
    place = sources.get(name)
    pointer = error.pointer if place is None else place + slash + rest
    line = None if (place or "").startswith("/static_inputs/") else row.line
    return FieldError(detail=error.detail, pointer=pointer, line=msgspec.UNSET if line is None else line)


async def each(items: Items) -> AsyncIterator[Inputs | Row]:
    """Items of either kind of iterable."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def as_json(inputs: Inputs, at: str, max_bytes: int) -> msgspec.Raw:
    """A copy, so that no request's body is kept, of which a Raw is only a view. Raises InvalidData, TooLarge."""
    try:
        raw = bytes(inputs) if isinstance(inputs, msgspec.Raw) else msgspec.json.encode(dict(inputs))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidData([FieldError(detail=f"It cannot be JSON: {exc}.", pointer=at)]) from exc
    if len(raw) > max_bytes:
        raise TooLarge(f"{at} is longer than {max_bytes} bytes, all that one run takes.")
    return msgspec.Raw(raw)

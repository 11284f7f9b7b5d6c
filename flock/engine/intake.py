"""Work on its way in: what both engines do with inputs and rows before they accept them."""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
)
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent
from flock.errors import DefinitionError, FieldError, InvalidData, MalformedJSON, TooLarge
from flock.fair import FairShare
from flock.jsontype import escape_pointer
from flock.rows.tables import Fill
from flock.runs import INVALID_INPUT, Batch, Inputs, Items, OnInvalid, Row, Run, RunStatus, new_id

__all__ = ["ITEMS_A_PAGE", "Intake", "as_json", "mapping_rows"]

#: How many errors of a batch's items are told at once.
MAX_ITEM_ERRORS = 100
#: How long the names of all kept columns of a batch may be together: they are kept with each state of the batch.
MAX_EXTRA_NAMES_CHARS = 16 * 1024
#: How many items are written or read at once, and about how many bytes of inputs are written.
ITEMS_A_PAGE = 500
PAGE_BYTES = 4 * 1024 * 1024


class Intake:
    """One batch on its way in: rows become items, and pages of them are staged.

    Args:
        items: see ``Engine.submit_batch``.
        batch: as it is to be accepted, without its numbers.
        max_items: how many items it may have.
        max_input_bytes: the longest inputs of one item, as JSON.

    Attributes:
        page: what is not staged.
    """

    def __init__(
        self,
        agent: Agent,
        items: Items,
        batch: Batch,
        *,
        on_invalid: OnInvalid,
        traceparent: str | None,
        max_items: int,
        max_input_bytes: int,
    ) -> None:
        self.batch = batch
        self.page: list[Run] = []
        self._total = 0
        self._agent = agent
        self._items = items
        self._on_invalid = on_invalid
        self._traceparent = traceparent
        self._max_items = max_items
        self._max_input_bytes = max_input_bytes
        #: each is reported once: one of the static inputs, or of a column, is found in every row
        self._errors: dict[Hashable, FieldError] = {}
        self._rows_with_errors = 0
        self._extra_names: dict[str, None] = {}
        self._extra_names_chars = 0
        self._failed = 0
        self._page_bytes = 0
        self._share = FairShare()

    async def read(
        self,
        stage: Callable[[Sequence[Run]], Awaitable[None]],
        *,
        id_of: Callable[[int], str] = lambda position: new_id(),
        items_a_page: Callable[[int], int] = lambda total: ITEMS_A_PAGE,
        page_bytes: int = PAGE_BYTES,
    ) -> Batch:
        """Read and check all items. Returns the batch with its numbers.

        Args:
            stage: keeps a page before the next one is read; the last page is left to the caller.
            id_of: names the item at a position.
            items_a_page: how many items one page holds after so many have been read.
            page_bytes: about how many bytes of inputs one page holds at most.

        Raises: InvalidData, once there are as many errors, or rows with errors, as are told at once; TooLarge;
            DefinitionError.
        """
        options = self.batch.options
        if options.max_workers < 1:
            raise DefinitionError(f"max_workers is at least 1, and not {options.max_workers}.")
        async for item in _each(self._items):
            if self._total == self._max_items:
                raise TooLarge(f"A batch has at most {self._max_items} items on this server (max_items).")
            await self._add(item, id_of)
            if len(self.page) >= items_a_page(self._total - 1) or self._page_bytes > page_bytes:
                await stage(self.page)
                self.page, self._page_bytes = [], 0
            await self._share.checkpoint()
        if not self._total:
            raise InvalidData([FieldError(detail="A batch has at least one item.", pointer="/batch_inputs")])
        if self._errors:
            raise self._invalid()
        return replace(
            self.batch,
            total_items=self._total,
            completed_items=self._failed,
            failed_items=self._failed,
            extra_names=tuple(self._extra_names),
        )

    async def _add(self, item: Inputs | Row, id_of: Callable[[int], str]) -> None:
        if not isinstance(item, Row):
            at = f"/batch_inputs/{self._total}"
            item = Row(inputs=as_json(item, at, self._max_input_bytes), at=at)
        await self._share.checkpoint()
        extra = self._extra_of(item)
        length = len(bytes(item.inputs)) + len(bytes(extra or b""))
        if length > self._max_input_bytes:
            raise TooLarge(f"A row is longer than {self._max_input_bytes} bytes, all that one item takes.")
        errors = self._errors_of(item)
        if errors and self._on_invalid == "reject":
            self._add_errors(item, errors)
        if not self._errors:
            self.page.append(self._run(item, extra, errors, id_of(self._total)))
            self._page_bytes += length
        self._total += 1

    def _add_errors(self, row: Row, errors: Sequence[FieldError]) -> None:
        """Raises InvalidData."""
        for error in errors:
            member = error.pointer.removeprefix(row.at)
            is_of_column = member and error in row.errors
            self._errors.setdefault((error.detail, member) if is_of_column else error, error)
        self._rows_with_errors += 1
        if max(len(self._errors), self._rows_with_errors) >= MAX_ITEM_ERRORS:
            raise self._invalid()

    def _invalid(self) -> InvalidData:
        return InvalidData(list(self._errors.values())[:MAX_ITEM_ERRORS])

    def _extra_of(self, row: Row) -> msgspec.Raw | None:
        """What is kept of a row, as it is stored. Raises TooLarge."""
        for name in row.extra:
            if name not in self._extra_names:
                self._extra_names[name] = None
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

    def _run(self, row: Row, extra: msgspec.Raw | None, errors: Sequence[FieldError], run_id: str) -> Run:
        """An item, which has failed already where there are errors."""
        batch = self.batch
        end: dict[str, Any] = {}
        if errors:
            self._failed += 1
            error = str(InvalidData(errors))
            end = {
                "status": RunStatus.FAILED,
                "error": error,
                "error_type": INVALID_INPUT,
                "completed_at": batch.created_at,
            }
        return Run(
            run_id=run_id,
            flock=batch.flock,
            agent_name=batch.agent_name,
            inputs=row.inputs,
            created_at=batch.created_at,
            request_id=batch.request_id,
            batch_id=batch.batch_id,
            position=self._total,
            traceparent=self._traceparent,
            principal=batch.principal,
            is_async=True,
            timeout_s=batch.options.timeout_s,
            extra=extra,
            **end,
        )


def _as_sent(error: FieldError, row: Row, sources: Mapping[str, str]) -> FieldError:
    """An error of inputs with a pointer into what the client sent: names not yet mapped, gaps not yet filled.

    *sources* are those of the row, by tokens of a pointer.
    """
    name, slash, rest = error.pointer[len(row.at) + 1 :].partition("/")
    place = sources.get(name)
    pointer = error.pointer if place is None else place + slash + rest
    line = None if (place or "").startswith("/static_inputs/") else row.line
    return FieldError(detail=error.detail, pointer=pointer, line=msgspec.UNSET if line is None else line)


async def _each(items: Items) -> AsyncIterator[Inputs | Row]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def mapping_rows(
    items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], fill: Fill, max_bytes: int
) -> AsyncGenerator[Row, None]:
    """What a program has as mappings, none of them longer than *max_bytes*. Raises InvalidData, TooLarge."""
    position = 0
    async for item in _each(items):
        at = f"/batch_inputs/{position}"
        if not isinstance(item, Mapping):
            detail = f"An item is a mapping of inputs by name, and not of the type {type(item).__name__!r}."
            raise InvalidData([FieldError(detail=detail, pointer=at)])
        yield fill.row(msgspec.json.decode(as_json(item, at, max_bytes), type=dict[str, msgspec.Raw]), at)
        position += 1


def as_json(inputs: Inputs, at: str, max_bytes: int) -> msgspec.Raw:
    """A copy, so that no request's body is kept, of which a Raw is only a view. Raises InvalidData, TooLarge."""
    try:
        raw = bytes(inputs) if isinstance(inputs, msgspec.Raw) else msgspec.json.encode(dict(inputs))
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidData([FieldError(detail=f"It cannot be JSON: {exc}.", pointer=at)]) from exc
    if len(raw) > max_bytes:
        raise TooLarge(f"{at} is longer than {max_bytes} bytes, all that one run takes.")
    return msgspec.Raw(raw)

"""Intake of a batch, the same for both engines: its rows are checked, converted to items, and staged in pages."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import asdict, replace

from flock.agents.agent import Agent
from flock.engine.rowchecks import NO_ROWS, CheckedRow, RowChecks, RowErrors, as_json, iterate
from flock.errors import DefinitionError, FieldError, InvalidData
from flock.runs import INVALID_INPUT, Batch, ItemLimits, Items, OnInvalid, Principal, Row, Run, RunStatus, new_id
from flock.runs.protocol import FileBox
from flock.runs.records import CALL_IDS
from flock.steps.identity import new_call_key
from flock.steps.outcomes import Outcome

if TYPE_CHECKING:
    from flock.rows.tables import RowMapping

#: How many items are written or read at once, and about how many bytes of inputs are written at once.
ITEMS_PER_PAGE = 500
PAGE_BYTES = 4 * 1024 * 1024


@dataclass(eq=False)
class Intake:
    """Turns the rows of one batch into items, and stages them in pages.

    Args:
        items: see ``Engine.submit_batch``.
        batch: the batch to accept, without its counts.

    Attributes:
        page: the items that are not staged yet.
    """

    agent: Agent
    items: Items
    batch: Batch
    on_invalid: OnInvalid
    traceparent: str | None
    limits: ItemLimits
    caller: Principal | None = None
    files: FileBox | None = None

    def __post_init__(self) -> None:
        self.page: list[Run] = []
        self._failed = self._page_bytes = 0

    async def read(
        self,
        stage: Callable[[Sequence[Run]], Awaitable[None]],
        *,
        id_of: Callable[[int], str] = lambda position: new_id(),
        items_per_page: Callable[[int], int] = lambda total: ITEMS_PER_PAGE,
        page_bytes: int = PAGE_BYTES,
    ) -> Batch:
        """Read and check all items. Returns the batch with its counts.

        Args:
            stage: stores a page before the next one is read. The caller stores the last page.
            id_of: returns the id of the item at a position.
            items_per_page: returns the size of the next page, given the number of items read so far.
            page_bytes: approximate max size of the inputs in one page.

        Raises: InvalidData, as soon as there are as many errors as are reported; TooLarge; DefinitionError.
        """
        options = self.batch.options
        if options.max_workers < 1:
            raise DefinitionError(f"max_workers must be at least 1, not {options.max_workers}.")
        for name, value in (("limit", options.limit), ("sample", options.sample)):
            if value is not None and value < 1:
                raise DefinitionError(f"{name} must be at least 1, not {value}.")
        if not (options.max_failures is None or options.max_failures >= 0):
            raise DefinitionError(
                f"max_failures must be a number of items, or a share below 1, not {options.max_failures}."
            )
        checks, row_errors = RowChecks(self.agent, self.limits, self.files), RowErrors()
        async for checked in checks.rows(self.items):
            if checked.errors and self.on_invalid == "reject":
                row_errors.add(checked.row, checked.errors)
                if row_errors.is_full:
                    break
            if row_errors.rows:
                continue
            files = () if self.files is None else await self.files.keep_all(checked.contents)
            self._add(checks.total, checked, id_of, files)
            if len(self.page) >= items_per_page(checks.total) or self._page_bytes > page_bytes:
                await stage(self.page)
                self.page, self._page_bytes = [], 0
        if row_errors.rows or not checks.total:
            raise InvalidData(row_errors.first() or [NO_ROWS])
        return replace(
            self.batch,
            total_items=checks.total,
            completed_items=self._failed,
            failed_items=self._failed,
            invalid_items=self._failed,
            skipped_rows=checks.skipped or None,
            extra_names=tuple(checks.extra_names),
        )

    def _add(self, position: int, checked: CheckedRow, id_of: Callable[[int], str], files: tuple[str, ...]) -> None:
        """Add an item to the page. If its row has errors, it has already failed."""
        batch, (row, extra, errors, _) = self.batch, checked
        end: dict[str, Any] = {}
        # Equal rows of an agent without a recipe are equal only within this batch.
        recipe = batch.recipe or (batch.batch_id if batch.options.dedupe else None)
        if errors:
            self._failed += 1
            end = asdict(Outcome(RunStatus.FAILED, str(InvalidData(errors)), INVALID_INPUT))
            end["completed_at"] = batch.created_at
        item = Run(
            run_id=id_of(position),
            flock=batch.flock,
            agent_name=batch.agent_name,
            inputs=row.inputs,
            created_at=batch.created_at,
            request_id=batch.request_id,
            batch_id=batch.batch_id,
            position=position,
            traceparent=self.traceparent,
            principal=batch.principal,
            caller=self.caller,
            is_async=True,
            timeout_s=batch.options.timeout_s,
            extra=extra,
            files=files,
            call_ids=CALL_IDS,
            call_key=new_call_key(),
            digest=None if recipe is None or errors else _digest(recipe, row.inputs),
            **end,
        )
        self.page.append(item)
        self._page_bytes += len(row.inputs) + len(extra or b"")


def _digest(recipe: str, inputs: msgspec.Raw) -> str:
    """Return the digest of inputs, in any order of their names, and of what makes their result."""
    members = msgspec.json.decode(inputs, type=dict[str, msgspec.Raw])
    text = recipe.encode() + msgspec.json.encode(members, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:32]


async def mapping_rows(
    items: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]], row_mapping: "RowMapping", max_bytes: int
) -> AsyncGenerator[Row, None]:
    """Map the items of a program to rows. Raises TooLarge if one is longer than *max_bytes*, and InvalidData."""
    position = 0
    async for item in iterate(items):
        at = f"/batch_inputs/{position}"
        if not isinstance(item, Mapping):
            detail = f"An item must be a mapping of inputs by name, not of type {type(item).__name__!r}."
            raise InvalidData([FieldError(detail=detail, pointer=at)])
        yield row_mapping.row(msgspec.json.decode(as_json(item, at, max_bytes), type=dict[str, msgspec.Raw]), at)
        position += 1

"""Tokens and money."""

from collections.abc import Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import Any

import msgspec
from msgspec.structs import replace

__all__ = ["DOLLAR", "MAX_COST", "Account", "Spent", "Usage", "UsageFilter", "UsagePage", "UsageRow", "UsageSums"]
__all__ += ["added", "cost_in_words", "is_spent", "next_day", "shown_usage", "spent_since", "spent_with"]

#: A US dollar. Prices of a million tokens have at most six decimals, so that sums of picodollars are exact.
DOLLAR = 10**12

#: Max value of ``max_cost``, in US dollars.
MAX_COST = 10**9


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Token counts, named as in the GenAI semantic conventions (``gen_ai.usage.input_tokens``), and their cost.

    Attributes:
        cached_tokens: the input tokens that the provider has read from its cache.
        reasoning_tokens: the output tokens of the model's reasoning.
        estimated_tokens: the input and output tokens that are an estimate, because a reply was not read to its end.
        picodollars: the cost of the tokens that have a price.
        priced_tokens: the number of input and output tokens that have a price.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    estimated_tokens: int = 0
    picodollars: int = 0
    priced_tokens: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(**{name: getattr(self, name) - getattr(other, name) for name in self.__struct_fields__})

    @property
    def cost(self) -> float | None:
        """US dollars, or None if one of the tokens has no price."""
        return self.picodollars / DOLLAR if self.priced_tokens == self.input_tokens + self.output_tokens else None


def added(*usages: Usage | None) -> Usage | None:
    """Return the sum of *usages*, or None if there are none."""
    known = [usage for usage in usages if usage is not None]
    return sum(known[1:], known[0]) if known else None


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """What one agent has spent on one model in a run. The model is "" if it is not known."""

    agent_name: str
    model: str
    usage: Usage


def spent_with(spent: tuple[Spent, ...], agent_name: str, model: str, usage: Usage) -> tuple[Spent, ...]:
    """Return *spent* with more *usage* of an agent and a model."""
    others = tuple(each for each in spent if (each.agent_name, each.model) != (agent_name, model))
    known = (each.usage for each in spent if (each.agent_name, each.model) == (agent_name, model))
    return (*others, Spent(agent_name, model, sum(known, usage)))


def spent_since(spent: Iterable[Spent], before: Iterable[Spent]) -> list[Spent]:
    """Return what was spent after *before*. Both count from the start of the run, so this is the same if repeated."""
    known = {(each.agent_name, each.model): each.usage for each in before}
    since = [
        Spent(each.agent_name, each.model, each.usage - known.get((each.agent_name, each.model), Usage()))
        for each in spent
    ]
    return [each for each in since if each.usage != Usage()]


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """What a principal may spend in a day, and has spent today, in UTC.

    Attributes:
        max_cost: US dollars; None means no limit.
        picodollars: the cost of the tokens that have a price.
    """

    max_cost: float | None = None
    picodollars: int = 0

    @property
    def is_spent(self) -> bool:
        return self.max_cost is not None and self.picodollars >= round(self.max_cost * DOLLAR)


def next_day(at: datetime) -> datetime:
    """Return the end of the day of *at*, a time in UTC."""
    return at.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was spent on one day, in UTC, by one principal with one agent and one model.

    A field is None if the row is a sum over its values. The principal "" is that of requests without one, and the
    model "" one that is not known.
    """

    day: date | None = None
    principal: str | None = None
    agent_name: str | None = None
    model: str | None = None
    usage: Usage = Usage()

    @property
    def order(self) -> tuple[int, str, str, str]:
        """Newest days first."""
        return (-self.day.toordinal() if self.day else 0, self.principal or "", self.agent_name or "", self.model or "")


class UsageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which usage to return, and how; see ``Engine.get_usage``.

    Attributes:
        first_day, last_day: in UTC, both included.
        principal: None means all principals.
        by: the fields of ``UsageRow`` by which it is shown. It is summed over the others.
        after: the last row of the previous page.
        limit: max rows per page.
    """

    first_day: date
    last_day: date
    principal: str | None = None
    by: tuple[str, ...] = ("day", "agent_name", "model")
    after: UsageRow | None = None
    limit: int = 100


class UsagePage(msgspec.Struct, frozen=True, kw_only=True):
    """One page of usage, newest days first, and the sum of all pages."""

    rows: Sequence[UsageRow]
    total: Usage
    has_more: bool

    @property
    def has_any(self) -> bool:
        return self.total != Usage()


class UsageSums:
    """Sums usage, as *wanted*. It holds a few pages at most, whatever it is given."""

    def __init__(self, wanted: UsageFilter) -> None:
        self._wanted = wanted
        self._total = Usage()
        self._sums: dict[Any, UsageRow] = {}
        #: rows in this order or later are not on this page
        self._end: Any = None

    def add(self, rows: Iterable[UsageRow]) -> None:
        after = None if self._wanted.after is None else self._wanted.after.order
        for row in rows:
            self._total += row.usage
            summed = UsageRow(**{name: getattr(row, name) for name in self._wanted.by}, usage=row.usage)
            order = summed.order
            if (after is None or order > after) and (self._end is None or order < self._end):
                known = self._sums.get(order)
                self._sums[order] = summed if known is None else replace(known, usage=known.usage + row.usage)
        if len(self._sums) > 4 * self._wanted.limit:
            self._cut()

    def _cut(self) -> None:
        """Keep one row more than the page has."""
        orders = sorted(self._sums)
        if len(orders) > self._wanted.limit + 1:
            self._end = orders[self._wanted.limit + 1]
            self._sums = {order: self._sums[order] for order in orders[: self._wanted.limit + 1]}

    @property
    def page(self) -> UsagePage:
        rows = [self._sums[order] for order in sorted(self._sums)]
        limit = self._wanted.limit
        return UsagePage(rows=rows[:limit], total=self._total, has_more=len(rows) > limit)


def is_spent(usage: Usage | None, max_cost: float | None) -> bool:
    """Whether *max_cost* US dollars are spent. They count as spent if a token has no price, since they might be."""
    if usage is None or max_cost is None:
        return False
    return usage.cost is None or usage.picodollars >= round(max_cost * DOLLAR)


def cost_in_words(usage: Usage | None) -> str:
    """Return the cost of *usage* for people."""
    cost = Usage().cost if usage is None else usage.cost
    return "an unknown cost, since a model without a price was called" if cost is None else f"{cost:.6f} US dollars"


def shown_usage(usage: Usage | None) -> dict[str, Any]:
    """Return the members ``usage`` and ``cost`` as clients see them. Details that are zero or unknown are omitted."""
    if usage is None:
        return {"usage": None}
    tokens = {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens}
    details = {name: getattr(usage, name) for name in ("cached_tokens", "reasoning_tokens", "estimated_tokens")}
    shown = {"usage": tokens | {name: count for name, count in details.items() if count}}
    return shown if usage.cost is None else {**shown, "cost": usage.cost}

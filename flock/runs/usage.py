"""Tokens and money."""

from typing import Any

import msgspec

__all__ = ["DOLLAR", "MAX_COST", "Usage", "added", "cost_in_words", "is_spent", "shown_usage"]

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

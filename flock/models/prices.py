"""The prices of model providers for tokens.

The table is small, and dated. ``Flock(prices=…)`` adds entries, or replaces them. A model without a price has no cost,
which is not a cost of zero: its tokens are counted, and the cost of everything that includes them is unknown.
"""

import contextlib
import math
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import anyio
import msgspec
from msgspec.structs import force_setattr, replace

from flock.errors import CostLimit, DefinitionError
from flock.runs import DOLLAR, Account, Usage, added, cost_in_words, is_spent
from flock.scopes import clocks_stopped

#: Max price of a million tokens, in US dollars.
MAX_PRICE = 1_000_000
#: US dollars of a million tokens to picodollars of one: 10**12 / 10**6.
PICODOLLARS = 10**6
#: How many tokens an answer is expected to have before the first one is known, unless its agent limits it.
EXPECTED_TOKENS = 4096
#: However long an answer has been, or was reported to be, no other one is expected to be longer than this.
MOST_EXPECTED_TOKENS = 128 * 1024


class Price(msgspec.Struct, frozen=True):
    """The price of a model, in US dollars for a million tokens. Only the first six decimals count.

    Attributes:
        input: of input tokens.
        output: of output tokens, which include those of the model's reasoning.
        cached_input: of input tokens that the provider reads from its cache; None if they cost as much as others.
        batch: the share of these prices that a call through the provider's batch endpoint costs.

    Raises: DefinitionError if a price is below zero or not a number, or the share is above 1.
    """

    input: float
    output: float
    cached_input: float | None = None
    batch: float = 0.5

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (is_number and 0 <= value <= MAX_PRICE) and (value is not None or name != "cached_input"):
                raise DefinitionError(
                    f"{name}= of a Price must be US dollars for a million tokens, from 0 to {MAX_PRICE:,}, "
                    f"not {value!r}."
                )
            if name == "batch" and value > 1:
                raise DefinitionError(f"batch= of a Price must be a share of its prices, from 0 to 1, not {value!r}.")
            if value is not None:  # a subclass, such as that of NumPy, may have another repr
                force_setattr(self, name, float(value) if isinstance(value, float) else int(value))

    def picodollars(self, usage: Usage) -> int:
        """Return what *usage* costs, exactly."""
        cached = min(usage.cached_tokens, usage.input_tokens)
        return (
            _of_token(self.input) * (usage.input_tokens - cached)
            + _of_token(self.input if self.cached_input is None else self.cached_input) * cached
            + _of_token(self.output) * usage.output_tokens
        )

    def for_batch(self, picodollars: int) -> int:
        """Return what calls through the batch endpoint cost that would otherwise cost *picodollars*."""
        return int(picodollars * Decimal(repr(self.batch)))


def _of_token(price: float) -> int:
    """Return the price of one token in picodollars. Decimal, because 0.1 has no exact binary form."""
    return int(Decimal(repr(price)) * PICODOLLARS)


#: Standard prices for text, for models whose price depends neither on the length of the prompt nor on the time of day.
PRICES: Mapping[str, Price] = {
    # https://developers.openai.com/api/docs/pricing, as published up to 2026-08, seen on 2026-11-26.
    "openai/gpt-4o": Price(2.5, 10, 1.25),
    "openai/gpt-4o-2024-05-13": Price(5, 15),
    "openai/gpt-4o-mini": Price(0.15, 0.6, 0.075),
    "openai/gpt-4.1": Price(2, 8, 0.5),
    "openai/gpt-4.1-mini": Price(0.4, 1.6, 0.1),
    "openai/gpt-4.1-nano": Price(0.1, 0.4, 0.025),
    "openai/gpt-5": Price(1.25, 10, 0.125),
    "openai/gpt-5-mini": Price(0.25, 2, 0.025),
    "openai/gpt-5-nano": Price(0.05, 0.4, 0.005),
    "openai/gpt-5.4-mini": Price(0.75, 4.5, 0.075),
    "openai/gpt-5.4-nano": Price(0.2, 1.25, 0.02),
    # https://platform.claude.com/docs/en/about-claude/pricing, seen on 2026-11-26. Reads of the cache, not writes.
    "anthropic/claude-opus-5": Price(5, 25, 0.5),
    "anthropic/claude-opus-4-8": Price(5, 25, 0.5),
    "anthropic/claude-opus-4-7": Price(5, 25, 0.5),
    "anthropic/claude-opus-4-6": Price(5, 25, 0.5),
    "anthropic/claude-opus-4-5": Price(5, 25, 0.5),
    "anthropic/claude-sonnet-5": Price(2, 10, 0.2),
    "anthropic/claude-sonnet-4-6": Price(3, 15, 0.3),
    "anthropic/claude-sonnet-4-5": Price(3, 15, 0.3),
    "anthropic/claude-haiku-4-5": Price(1, 5, 0.1),
    # https://ai.google.dev/gemini-api/docs/pricing, paid tier, as published on 2026-09-20, seen on 2026-11-26.
    "gemini/gemini-3.5-flash": Price(1.5, 9, 0.15),
    "gemini/gemini-2.5-flash": Price(0.3, 2.5, 0.03),
    "gemini/gemini-2.5-flash-lite": Price(0.1, 0.4, 0.01),
    # https://console.groq.com/docs/models, as published in 2026-05, seen on 2026-11-26.
    "groq/openai/gpt-oss-120b": Price(0.15, 0.6),
}

#: The date or alias at the end of a model's name: ``gpt-4o-2024-08-06``, ``claude-sonnet-4-5-20250929``.
SUFFIX = r"-(\d{4}-\d{2}-\d{2}|\d{8}|latest)$"


def merged(prices: Mapping[str, Price] | None) -> Mapping[str, Price]:
    """Return the table with the entries of *prices* added or replaced. Raises DefinitionError if one is invalid."""
    for name, price in (prices or {}).items():
        if not isinstance(price, Price) or "/" not in str(name):
            raise DefinitionError(
                f"prices= must map models to prices, such as {{'openai/gpt-4o': Price(input=2.5, output=10)}}, "
                f"not {name!r} to a value of type {type(price).__name__}."
            )
    return {**PRICES, **(prices or {})}


def price_of(prices: Mapping[str, Price], model: str) -> Price | None:
    """Return the price of *model*, or None. A dated name without an entry has the price of the name without it."""
    return prices.get(model) or prices.get(re.sub(SUFFIX, "", model))


def priced(prices: Mapping[str, Price], usage: Usage, model: str | None, *, is_batch: bool = False) -> Usage:
    """Return *usage* of *model* with its cost, or as it is if the model has no price."""
    price = None if model is None else price_of(prices, model)
    if price is None:
        return usage
    cost = price.picodollars(usage)
    cost = price.for_batch(cost) if is_batch else cost
    return replace(usage, picodollars=cost, priced_tokens=usage.input_tokens + usage.output_tokens)


class Budget:
    """The max total cost of the model calls of a run, or of all items of a batch. Only ``add`` is thread-safe.

    A call reserves what it is expected to cost: the tokens of its prompt, and as many as the longest answer so far had.

    Args:
        spent: by earlier attempts and steps.
        owner: "run" or "batch".

    Attributes:
        held: what calls in batch endpoints of providers reserve, in picodollars; see ``hold``.
        is_used_up: what is left is too little for another call of a batch endpoint.
    """

    held, is_used_up = 0, False

    def __init__(self, prices: Mapping[str, Price], max_cost: float, spent: Usage | None, owner: str) -> None:
        self._prices, self._max_cost, self._spent, self._owner = prices, max_cost, spent, owner
        self._longest = self._open = 0
        self._reserved = 0.0
        #: the calls that wait, in FIFO order; the first one waits for the end of an open call
        self._line = anyio.Lock(fast_acquire=True)
        self._ended = anyio.Event()

    @property
    def is_spent(self) -> bool:
        return self.is_used_up or is_spent(self._spent, self._max_cost)

    def add(self, usage: Usage) -> None:
        """Count the tokens of an answer."""
        self._spent = added(self._spent, usage)
        self._longest = max(self._longest, usage.output_tokens)

    def check(self, agent_name: str, models: Sequence[str]) -> None:
        """Raise CostLimit if everything is spent, or a run may call one of *models* that has no price."""
        if self.is_spent:
            raise CostLimit(
                f"Stopped after {cost_in_words(self._spent)}, before {agent_name!r} called its model. The "
                f"{self._owner} may cost {self._max_cost:g} US dollars (max_cost). Retry it with a higher max_cost to "
                "continue.",
                "max_cost",
            )
        for model in models if self._owner == "run" else ():
            if price_of(self._prices, model) is None:
                raise CostLimit(no_price(model, agent_name))

    async def refresh(self) -> None:
        """Called before a call is checked. Read what others have spent."""

    @contextlib.asynccontextmanager
    async def reserve(self, model: str, prompt: Any, max_tokens: int | None) -> AsyncGenerator[None, None]:
        """Reserve the cost of a call until the block ends. Wait while it might exceed the limit, and others are open.

        Args:
            prompt: the messages and the like. They can be encoded as JSON.
            max_tokens: of the answer; None means no limit.

        Cancellation: nothing stays reserved.
        """
        price, tokens = price_of(self._prices, model), len(msgspec.json.encode(prompt)) // 4
        with clocks_stopped():
            async with self._line:
                await self.refresh()
                while self._exceeds(cost := self._expected(price, tokens, max_tokens)) and (self._open or self.held):
                    self._ended = anyio.Event()
                    await self._ended.wait()
                    await self.refresh()
                self._open += 1
                self._reserved += cost
        try:
            yield
        finally:
            self._open -= 1
            self._reserved = self._reserved - cost if self._open else 0
            self._ended.set()

    def hold(self, picodollars: int) -> None:
        """Change what calls in batch endpoints reserve."""
        self.held = picodollars
        self._ended.set()

    def expected_in_batch(self, model: str, tokens: int, max_tokens: int | None, others: int) -> int | None:
        """Return what a call through a batch endpoint will probably cost; None if that is too much.

        Args:
            others: what the other calls reserve that are put into the same job, in picodollars.
        """
        price = price_of(self._prices, model)
        if price is None:
            return None
        cost = price.for_batch(int(self._expected(price, tokens, max_tokens)))
        return None if self._exceeds(others + cost) else cost

    def _expected(self, price: Price | None, tokens: int, max_tokens: int | None) -> float:
        """Return what a call will probably cost, in picodollars."""
        if price is None:  # its answer ends the batch, so it is asked alone
            return math.inf
        longest = min(self._longest or max_tokens or EXPECTED_TOKENS, max_tokens or MOST_EXPECTED_TOKENS)
        return price.picodollars(Usage(input_tokens=tokens, output_tokens=int(longest)))

    def _exceeds(self, cost: float) -> bool:
        spent = 0 if self._spent is None else self._spent.picodollars
        return self.is_spent or spent + self._reserved + self.held + cost > round(self._max_cost * DOLLAR)


class DayBudget(Budget):
    """The max total cost of the model calls of all runs of a principal in a day, in UTC; see ``Budget``.

    Tokens without a price do not count, and models without one are not called while there is a limit.

    Args:
        read: returns the account of the principal, including what the runs of this process have spent.
    """

    def __init__(self, prices: Mapping[str, Price], read: Callable[[], Awaitable[Account]]) -> None:
        super().__init__(prices, math.inf, None, "day")
        self._read = read
        self._account = Account()

    @property
    def is_spent(self) -> bool:
        return self._account.is_spent

    async def refresh(self) -> None:
        self._account = await self._read()

    def add(self, usage: Usage) -> None:
        """Count the tokens of an answer until the account is read again."""
        picodollars = self._account.picodollars + usage.picodollars
        self._account = replace(self._account, picodollars=picodollars)
        self._longest = max(self._longest, usage.output_tokens)

    def check(self, agent_name: str, models: Sequence[str]) -> None:
        """Raise CostLimit if the limit of the day is spent, or a run may call one of *models* that has no price."""
        account = self._account
        if account.max_cost is None:
            return
        if account.is_spent:
            text = f"Stopped before {agent_name!r} called its model. {day_is_spent(account)} Retry it on another day."
            raise CostLimit(text, "max_cost_per_day")
        for model in models:
            if price_of(self._prices, model) is None:
                raise CostLimit(no_price(model, agent_name, "max_cost_per_day"))

    def _expected(self, price: Price | None, tokens: int, max_tokens: int | None) -> float:
        is_limited = self._account.max_cost is not None and price is not None  # otherwise nothing is reserved
        return super()._expected(price, tokens, max_tokens) if is_limited else 0

    def _exceeds(self, cost: float) -> bool:
        account = self._account
        if account.max_cost is None:
            return False
        return account.picodollars + self._reserved + cost > round(account.max_cost * DOLLAR)


def day_is_spent(account: Account) -> str:
    return (
        f"This caller has spent {account.picodollars / DOLLAR:.6f} US dollars today. It may spend "
        f"{account.max_cost or 0:g} in a day, in UTC (max_cost_per_day)."
    )


def no_price(model: str, agent_name: str, limit: str = "max_cost") -> str:
    return (
        f"The model {model} of {agent_name!r} has no price, so {limit} cannot hold. Omit {limit}, or add the price: "
        f"Flock(prices={{{model!r}: Price(input=…, output=…)}})."
    )

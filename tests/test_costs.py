"""Tokens and money: counted to the token, also after failures, retries and kills, and limited by ``max_cost``."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock, FlockFactory, Price
from flock.errors import CostLimit, DefinitionError, InvalidData
from flock.models.prices import PRICES, Budget, merged, price_of, priced
from flock.runs import (
    Batch,
    BatchOptions,
    Engine,
    Run,
    RunContext,
    RunStatus,
    Usage,
    event_of_batch,
    events_after,
    new_id,
    now,
)
from flock.runs.usage import shown_usage
from flock.scopes import _CLOCKS, move_on_after_working
from flock.store.migrations import MIGRATIONS
from flock.testing import FakeModel, ModelRequest, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, all_items, ended, sqlite_of
from tests.support.http import client_of, get, post_run, wait_for, wait_until
from tests.support.models import usage_of_gpt_4o
from tests.support.servers import flockapi_command, running
from tests.test_ask import json_of, waiting
from tests.test_model_streams import Pieces, chunk, sse

pytestmark = pytest.mark.anyio

MODEL = "openai/gpt-4o"
PRICE = PRICES[MODEL]


class Provider(FakeModel):
    """A model server that counts the tokens of each reply, by its idempotency key.

    Of ten replies, about two are invalid answers and one is cut off. A text "fail" gets no valid answer at first.
    """

    def __init__(self) -> None:
        self.counted: list[tuple[str, Usage]] = []
        self.heals = False
        self.delay_s = 0.0
        self._random = random.Random(1)
        super().__init__(self._reply)

    async def _reply(self, request: ModelRequest) -> Reply:
        await anyio.sleep(self.delay_s * self._random.random())
        fails = "fail" in json.dumps(request["messages"]) and not self.heals
        kind = "invalid" if fails else self._random.choice(["good"] * 7 + ["invalid"] * 2 + ["cut off"])
        tokens = self._random.randrange(1, 5000), self._random.randrange(1, 500)
        cached, reasoning = self._random.randrange(tokens[0] + 1), self._random.randrange(tokens[1] + 1)
        usage = Usage(input_tokens=tokens[0], output_tokens=tokens[1], cached_tokens=cached, reasoning_tokens=reasoning)
        self.counted.append((request.headers["idempotency-key"], usage))
        content = {"length": 1} if kind == "good" else "no JSON"
        return Reply(content, finish_reason="length" if kind == "cut off" else None, usage=usage)

    def total(self, model: str = MODEL) -> Usage:
        return sum((priced(PRICES, usage, model) for _, usage in self.counted), Usage())


def measuring(model: str = MODEL, **options: Any) -> Flock:
    """A flock with an agent that a model takes the length of a text."""
    flock = Flock(f"costs {new_id()}", model=model, **options)
    flock.add_agent(
        FlockFactory.create_default_agent("measure", "", None, "text: str", "length: int", answer_retries=1)
    )
    return flock


def texts(count: int, every: int = 10) -> list[dict[str, str]]:
    return [{"text": "fail" if n % every == 0 else "abc"} for n in range(count)]


async def finish(engine: Engine, run_id: str) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run_id)


# Prices


@pytest.mark.parametrize("price", [-1, -1e-9, math.nan, math.inf, True, "2", None, 10**7])
@pytest.mark.parametrize("field", ["input", "output", "cached_input"])
def test_a_price_is_a_number_of_dollars(price: Any, field: str) -> None:
    given = {"input": 1.0, "output": 1.0, field: price}
    if (price, field) == (None, "cached_input"):
        assert Price(**given).cached_input is None
        return
    with pytest.raises(DefinitionError, match=f"{field}= of a Price must be US dollars for a million tokens"):
        Price(**given)


def test_a_price_may_be_a_number_of_a_subclass() -> None:
    """Such as that of NumPy, whose repr is ``np.float64(2.5)``."""

    class Float(float):
        def __repr__(self) -> str:
            return f"np.float64({float(self)})"

    price = Price(Float(2.5), Float(10), Float(0.1))
    usage = Usage(input_tokens=2, output_tokens=3, cached_tokens=1)
    assert price == Price(2.5, 10, 0.1)
    assert price.picodollars(usage) == Price(2.5, 10, 0.1).picodollars(usage)


@pytest.mark.parametrize("prices", [{"gpt-4o": Price(1, 1)}, {MODEL: 2.5}, {MODEL: None}])
def test_invalid_prices_are_refused_when_the_flock_is_made(prices: Any) -> None:
    with pytest.raises(DefinitionError, match="prices= must map models to prices"):
        Flock(prices=prices)


def test_the_table_is_replaced_and_extended() -> None:
    prices = merged({MODEL: Price(1, 2), "ollama/llama3.2": Price(0, 0)})
    assert (price_of(prices, MODEL), price_of(prices, "openai/gpt-4o-mini")) == (
        Price(1, 2),
        PRICES["openai/gpt-4o-mini"],
    )
    assert priced(prices, Usage(input_tokens=9), "ollama/llama3.2").cost == 0, "this price is known to be zero"
    assert PRICES[MODEL] == Price(2.5, 10, 1.25)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("openai/gpt-4o-2024-08-06", MODEL),
        ("openai/gpt-4o-2024-05-13", "openai/gpt-4o-2024-05-13"),
        ("anthropic/claude-sonnet-4-5-20250929", "anthropic/claude-sonnet-4-5"),
        ("openai/gpt-4o-latest", MODEL),
        ("openai/gpt-4o-audio-preview", None),
        ("openai/gpt-4o-2024", None),
        ("ollama/llama3.2", None),
        ("local/smollm2", None),
        ("gpt-4o", None),
    ],
)
def test_a_dated_model_has_the_price_of_its_base(model: str, base: str | None) -> None:
    assert price_of(PRICES, model) == (None if base is None else PRICES[base])


def test_costs_are_exact() -> None:
    """Also of many replies, at each price of the table, where a sum of floats would not be."""
    rng = random.Random(0)
    for model, price in {**PRICES, "x/y": Price(0.000001, 0.1, 0.3)}.items():
        prices, total, exact = merged({model: price}), Usage(), Fraction()
        for _ in range(100):
            usage = Usage(input_tokens=rng.randrange(10**6), output_tokens=rng.randrange(10**5))
            usage = msgspec.structs.replace(usage, cached_tokens=rng.randrange(usage.input_tokens + 1))
            total += priced(prices, usage, model)
            cached = price.input if price.cached_input is None else price.cached_input
            exact += Fraction(str(price.input)) * (usage.input_tokens - usage.cached_tokens)
            exact += Fraction(str(cached)) * usage.cached_tokens + Fraction(str(price.output)) * usage.output_tokens
        assert Fraction(total.picodollars, 10**12) == exact / 10**6, model
        assert total.cost == float(exact / 10**6)


def test_a_total_with_an_unknown_part_is_unknown() -> None:
    known = priced(PRICES, Usage(input_tokens=10), MODEL)
    unknown = priced(PRICES, Usage(output_tokens=5), "ollama/x")
    assert (known.cost, unknown.cost, (known + unknown).cost) == (0.000025, None, None)
    assert (known + Usage()).cost == known.cost
    assert known + unknown - unknown == known


@pytest.mark.parametrize(
    ("sent", "cached", "reasoning"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 7}, "completion_tokens_details": {"reasoning_tokens": 3}}, 7, 3),
        ({"prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 2}, 8, 0),
        ({"prompt_tokens_details": None, "completion_tokens_details": None, "prompt_cache_hit_tokens": None}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": "x"}, "completion_tokens_details": [1]}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": -7}, "prompt_cache_hit_tokens": 1.5}, 0, 0),
    ],
)
async def test_details_of_tokens_are_read(sent: Any, cached: int, reasoning: int, model: FakeModel) -> None:
    reply = Reply({"length": 1}).completion()
    reply["usage"] |= sent
    model.replies = [httpx.Response(200, json=reply)]
    async with measuring().engine(transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("measure", {"text": "a"})).run_id)
    assert run.usage is not None
    assert (run.usage.cached_tokens, run.usage.reasoning_tokens) == (cached, reasoning)
    assert run.usage.picodollars == 10**6 * (2.5 * (10 - cached) + 1.25 * cached + 10 * 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", ["1e400", "-1e400", "9" * 400, "7" * 5000, "1.5", '"10"', "[1]", "null", "10.0"])
async def test_a_token_count_out_of_range_is_ignored(count: str, stream: bool, model: FakeModel) -> None:
    """The answer is not lost, and neither are its other counts."""
    for name in ("prompt_tokens", "total_tokens"):
        usage = f'"usage":{{"completion_tokens":5,"{name}":{count}}}'
        if stream:
            delta = f'{{"choices":[{{"delta":{{"content":"{{\\"length\\":1}}"}},"finish_reason":"stop"}}],{usage}}}'
            reply = httpx.Response(
                200, text=f"data: {delta}\n\ndata: [DONE]\n\n", headers={"content-type": "text/event-stream"}
            )
        else:
            whole = f'{{"choices":[{{"message":{{"content":"{{\\"length\\":1}}"}}}}],{usage}}}'
            reply = httpx.Response(200, text=whole)
        model.replies = [reply]
        async with measuring().engine(transport=model.transport) as engine:
            run_id = new_id()
            with engine.watch(run_id) if stream else contextlib.nullcontext():
                await engine.submit("measure", {"text": "a"}, run_id=run_id)
                run = await finish(engine, run_id)
        assert run.status is RunStatus.COMPLETED, run.error
        assert run.usage is not None
        assert run.usage.input_tokens == (10 if (name, count) == ("prompt_tokens", "10.0") else 0)
        assert (run.usage.output_tokens, run.usage.cost is None) == (5, False)


# Runs


async def test_a_run_counts_all_its_attempts(open_engine: OpenEngine) -> None:
    """Also answers that were invalid or cut off, whose steps failed."""
    provider, flock = Provider(), measuring()
    async with open_engine(flock, transport=provider.transport) as engine:
        run = await finish(engine, (await engine.submit("measure", {"text": "fail"})).run_id)
        assert (run.status, run.usage) == (RunStatus.FAILED, provider.total())
        while run.result is None:
            provider.heals = run.attempt > 2
            await engine.retry_run(run.run_id)
            run = await finish(engine, run.run_id)
            assert run.usage == provider.total()
        (step,) = run.steps
        assert run.usage != step.usage


async def test_the_calls_and_steps_of_a_run_have_their_costs(open_engine: OpenEngine, model: FakeModel) -> None:
    """The calls of a step, those of an agent that it calls, and a model without a price beside one with a price."""
    flock = Flock(f"costs {new_id()}", model=MODEL)

    async def double(n: int) -> int:
        return 2 * n

    flock.add_agent(FlockFactory.create_default_agent("ask", "", None, "q: str", "a: int", tools=[double]))
    flock.add_agent(FlockFactory.create_default_agent("free", "", "ollama/x", "q: str", "a: int"))

    @flock.agent
    async def both(context: RunContext, names: list[str]) -> list[int]:
        return [(await context.run_agent(name, {"q": "?"}))["a"] for name in names]

    model.replies = [Reply(calls=[("double", {"n": 1})]), Reply({"a": 2}), Reply({"a": 1})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("both", {"names": ["ask"]})).run_id)
        assert run.usage == run.steps[0].usage == usage_of_gpt_4o(20, 10)
        calls = (await engine.get_calls(run))[0]
        assert {call.name: call.usage for call in calls} == {
            "openai_gpt-4o": usage_of_gpt_4o(10, 5),
            "double": None,
            "ask": usage_of_gpt_4o(20, 10),
        }
        run = await finish(engine, (await engine.submit("both", {"names": ["free"]})).run_id)
        assert run.usage == Usage(input_tokens=10, output_tokens=5)
        assert run.usage.cost is None
        (completed,) = [event for event in events_after(run) if event.name == "step.completed"]
        assert completed.data["usage"] == {"input_tokens": 10, "output_tokens": 5}
        assert "cost" not in completed.data


async def test_a_run_of_an_older_version_counts_its_earlier_steps(tmp_path: Path, model: FakeModel) -> None:
    """It failed after its first step, whose tokens are only in the step."""
    flock = measuring()
    flock.agents["measure"].next_agent = "again"
    flock.add_agent(FlockFactory.create_default_agent("again", "", None, "length: int", "n: int", answer_retries=0))
    model.replies = [Reply({"length": 1}), Reply("no JSON"), Reply({"n": 1})]
    async with flock.engine(transport=model.transport, store=tmp_path / "flock.db") as engine:
        run = await finish(engine, (await engine.submit("measure", {"text": "a"})).run_id)
        assert (run.error_type, run.usage) == ("invalid_output", usage_of_gpt_4o(20, 10))
        await sqlite_of(engine).change(lambda db: db.execute("UPDATE runs SET spent = NULL") and None)
        assert (await engine.get_run(run.run_id)).usage == usage_of_gpt_4o(10, 5)
        await engine.retry_run(run.run_id)
        assert (await finish(engine, run.run_id)).usage == usage_of_gpt_4o(20, 10)


async def test_a_run_stops_at_its_max_cost(open_engine: OpenEngine, model: FakeModel) -> None:
    """A reply costs 0.000075 dollars. The second call is made with 0.00005 dollars left, and the third is not."""
    flock = measuring()
    flock.agents["measure"].next_agent = "again"
    flock.add_agent(FlockFactory.create_default_agent("again", "", None, "length: int", "n: int", answer_retries=5))
    model.replies = [Reply({"length": 1}), Reply("no JSON")]
    async with open_engine(flock, transport=model.transport) as engine:
        run_id = (await engine.submit("measure", {"text": "a"}, max_cost=0.000125)).run_id
        run = await finish(engine, run_id)
        assert (run.status, run.error_type, run.max_cost) == (RunStatus.FAILED, "cost_limit", 0.000125)
        assert run.error == (
            "Stopped after 0.000150 US dollars, before 'again' called its model. The run may cost 0.000125 US dollars "
            "(max_cost). Retry it with a higher max_cost to continue."
        )
        assert run.usage == usage_of_gpt_4o(20, 10)
        await engine.retry_run(run_id)
        assert (await finish(engine, run_id)).error_type == "cost_limit", "what was spent before counts"
        model.replies = [Reply({"n": 2})]
        await engine.retry_run(run_id, max_cost=0.001)
        run = await finish(engine, run_id)
        assert (run.status, run.usage) == (RunStatus.COMPLETED, usage_of_gpt_4o(30, 15))
    assert len(model.requests) == 3


async def test_the_first_call_runs_whatever_it_costs(open_engine: OpenEngine, model: FakeModel) -> None:
    """What it will cost is only known when it has been answered."""
    model.replies = [Reply({"length": 1})]
    async with open_engine(measuring(), transport=model.transport) as engine:
        run_id = (await engine.submit("measure", {"text": "a"}, max_cost=1e-9)).run_id
        run = await finish(engine, run_id)
        assert (run.status, run.usage) == (RunStatus.COMPLETED, usage_of_gpt_4o(10, 5))


async def test_a_max_cost_needs_prices(open_engine: OpenEngine, model: FakeModel) -> None:
    """It is refused for models that are known when it is given, and holds for those that are only known later."""
    flock = Flock(f"costs {new_id()}", model="openai/unknown")
    flock.add_agent(
        FlockFactory.create_default_agent("first", "", MODEL, "text: str", "length: int", next_agent="second")
    )
    flock.add_agent(FlockFactory.create_default_agent("second", "", "ollama/x", "length: int", "n: int"))

    @flock.agent(next_agent=lambda result: "second")
    def free(length: int) -> int:
        return length

    model.replies = []
    async with open_engine(flock, transport=model.transport) as engine:
        for refused in (
            lambda: engine.submit("first", {"text": "a"}, max_cost=1),
            lambda: engine.submit_batch("first", [{"text": "a"}], BatchOptions(max_cost=1)),
        ):
            with pytest.raises(InvalidData, match="ollama/x of 'second' has no price, so max_cost cannot hold") as exc:
                await refused()
            assert exc.value.errors[0].pointer == "/max_cost"
        run = await finish(engine, (await engine.submit("free", {"length": 1}, max_cost=1)).run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "cost_limit")
        assert "The model ollama/x of 'second' has no price" in (run.error or "")


# Batches


@pytest.mark.parametrize("workers", [1, 50])
async def test_the_usage_of_a_batch_is_what_the_provider_counted(open_engine: OpenEngine, workers: int) -> None:
    """To the token, at any number of workers, with invalid answers, and after a retry of the failed items."""
    provider, flock = Provider(), measuring()
    options, count = BatchOptions(max_workers=workers), 150 if workers > 1 else 30
    async with open_engine(flock, transport=provider.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("measure", texts(count), options))
        assert 0 < batch.failed_items < batch.total_items
        assert batch.usage == provider.total()
        provider.heals = True
        first = batch.usage
        await engine.retry_batch(batch.batch_id)
        batch = await ended(engine, batch)
        assert batch.usage == provider.total() != first
        assert sum((item.usage or Usage() for item in await all_items(engine, batch)), Usage()) == batch.usage
        assert batch.usage is not None
        assert batch.estimated_cost == round(batch.usage.cost or 0, 6)
        assert event_of_batch(batch).data["cost"] == batch.usage.cost


async def test_a_batch_is_estimated_from_the_items_that_have_ended(model: FakeModel) -> None:
    """Items with invalid inputs neither cost anything nor count."""
    may_go, asked = anyio.Event(), anyio.Event()

    async def slowly(request: ModelRequest) -> Reply:
        asked.set()
        await may_go.wait()
        return Reply({"length": 1})

    model.replies = [Reply({"length": 1}), Reply({"length": 1}), slowly, Reply({"length": 1})]
    items: list[Any] = [*texts(4), {"text": 1}]
    async with measuring().engine(transport=model.transport) as engine:
        batch = await engine.submit_batch("measure", items, BatchOptions(max_workers=1), on_invalid="skip")
        assert (batch.usage, batch.estimated_cost, batch.costs) == (None, None, {})
        with anyio.fail_after(PATIENCE_S):
            await asked.wait()
        now = await engine.get_batch(batch.batch_id)
        assert (now.completed_items, now.usage, now.estimated_cost) == (3, usage_of_gpt_4o(20, 10), 0.0003)
        may_go.set()
        assert (await ended(engine, batch)).estimated_cost == 0.0003


def test_the_estimate_of_a_batch_that_has_ended_is_its_cost() -> None:
    """Even if a half is rounded."""
    usage = Usage(input_tokens=1, picodollars=1_754_337_500_000, priced_tokens=1)
    for count in range(1, 500):
        batch = Batch(
            batch_id="b",
            flock="f",
            agent_name="a",
            options=BatchOptions(),
            status=RunStatus.COMPLETED,
            total_items=count,
            completed_items=count,
            usage=usage,
            created_at=now(),
        )
        assert batch.estimated_cost == round(usage.cost or 0, 6)


@pytest.mark.parametrize("workers", [1, 7])
async def test_a_batch_stops_at_its_max_cost(open_engine: OpenEngine, workers: int, model: FakeModel) -> None:
    """Items in flight end. A retry with a higher limit runs the rest, and only the rest.

    On a cluster, the chunks of a batch know a moment later what the others have spent.
    """
    flock, count = measuring(), 60

    async def slowly(request: ModelRequest) -> Reply:
        await anyio.sleep(delay_s)
        return Reply({"length": 1})

    delay_s, model.replies = 0.02, [slowly] * count
    async with open_engine(flock, transport=model.transport) as engine:
        delay_s = 0.1 if (is_cluster := "Temporal" in type(engine).__name__) else delay_s
        options = BatchOptions(max_workers=workers, max_cost=20 * 0.000075)
        batch = await ended(engine, await engine.submit_batch("measure", texts(count), options))
        paid = len(model.requests)
        assert 20 <= paid <= 20 + (0 if workers == 1 else 2 * workers if is_cluster else workers)
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "cost_limit")
        assert (batch.cancelled_items, batch.failed_items) == (count - paid, 0)
        assert batch.usage == usage_of_gpt_4o(10 * paid, 5 * paid)
        assert batch.error is not None
        assert "(max_cost)" in batch.error
        items = await all_items(engine, batch)
        assert Counter((item.status, item.error_type) for item in items) == {
            (RunStatus.COMPLETED, None): paid,
            (RunStatus.CANCELLED, "cost_limit"): count - paid,
        }
        with pytest.raises(InvalidData, match=r"Retry it with a higher max_cost\."):
            await engine.retry_batch(batch.batch_id)
        assert await engine.get_batch(batch.batch_id) == batch
        await engine.retry_batch(batch.batch_id, max_cost=1)
        batch = await ended(engine, batch)
        assert (batch.status, batch.error_type, batch.options.max_cost) == (RunStatus.COMPLETED, None, 1)
        assert batch.usage == usage_of_gpt_4o(10 * count, 5 * count)
        assert len(model.requests) == count


async def test_a_batch_that_ends_at_its_limit_completes(open_engine: OpenEngine, model: FakeModel) -> None:
    model.replies = [Reply({"length": 1})] * 2
    async with open_engine(measuring(), transport=model.transport) as engine:
        options = BatchOptions(max_workers=1, max_cost=0.00015)
        batch = await ended(engine, await engine.submit_batch("measure", texts(2), options))
    assert (batch.status, batch.error_type) == (RunStatus.COMPLETED, None)


async def test_a_batch_of_free_agents_writes_no_more_than_before(tmp_path: Path) -> None:
    """Neither its runs nor its batch are read or written for their cost."""
    flock, statements = Flock(), list[str]()

    @flock.agent
    async def double(n: int) -> int:
        return 2 * n

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        sqlite_of(engine)._db.set_trace_callback(statements.append)
        batch = await engine.submit_batch("double", [{"n": n} for n in range(1000)], BatchOptions(max_workers=10))
        batch = await ended(engine, batch)
        sqlite_of(engine)._db.set_trace_callback(None)
        assert batch.usage is None
        assert (await engine.get_items(batch.batch_id, limit=1))[0].spent is None
    updates = [text for text in statements if text.startswith("UPDATE runs SET status")]
    assert len(updates) <= 1000, "an item is written once"
    assert not [text for text in statements if "usage" in text.partition("WHERE")[0] and "batches SET" in text]
    assert not [text for text in statements if text.startswith("SELECT spent")]


# Many calls at the same time

#: One answer of "measure" with at most 100 tokens costs a dollar.
A_DOLLAR = {MODEL: Price(input=0, output=10_000)}


class Crowd(FakeModel):
    """A model server whose answers cost a dollar each, and come when *count* requests are open, or never."""

    def __init__(self, count: int = 0) -> None:
        self.open = self.most = 0
        self.count, self.enough = count, anyio.Event()
        self.may_answer = anyio.Event()
        self.may_answer.set()
        super().__init__(self._reply)

    async def _reply(self, request: ModelRequest) -> Reply:
        self.open += 1
        self.most = max(self.most, self.open)
        if self.open == self.count:
            self.enough.set()
        try:
            await self.may_answer.wait()
            await anyio.lowlevel.checkpoint()
        finally:
            self.open -= 1
        return Reply({"length": 1}, usage=Usage(input_tokens=1, output_tokens=100))


def crowded(prices: Any = A_DOLLAR, max_tokens: int | None = 100) -> Flock:
    """A flock whose agent "all" calls a model *count* times at once, and counts the answers and the refusals."""
    flock = Flock(f"costs {new_id()}", model=MODEL, prices=prices)
    flock.add_agent(
        FlockFactory.create_default_agent(
            "measure", "", None, "text: str", "length: int", answer_retries=0, max_tokens=max_tokens
        )
    )

    @flock.agent
    async def all(context: RunContext, count: int, catches: bool = True) -> dict[str, int]:
        outcomes = Counter[str]()

        async def one(n: int) -> None:
            try:
                await context.run_agent("measure", {"text": str(n)})
                outcomes["answered"] += 1
            except CostLimit as exc:
                if not catches:
                    raise
                text = str(exc)
                outcomes["refused"] += "before 'measure' called its model. The run may cost 2 US dollars (m" in text

        async with anyio.create_task_group() as tasks:
            for n in range(count):
                tasks.start_soon(one, n)
        return dict(outcomes)

    return flock


async def test_parallel_calls_stop_at_the_max_cost_of_their_run(open_engine: OpenEngine) -> None:
    """200 calls of a dollar each, of which two are allowed: two are made, and the others are refused."""
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("all", {"count": 200}, max_cost=2)).run_id)
    assert (run.status, run.usage and run.usage.cost, len(model.requests)) == (RunStatus.COMPLETED, 2, 2), run.error
    assert msgspec.json.decode(run.result or b"") == {"result": {"answered": 2, "refused": 198}}


async def test_a_run_whose_parallel_calls_are_refused_fails_with_cost_limit(open_engine: OpenEngine) -> None:
    """Also if several tasks of a group were refused."""
    model, flock = Crowd(), crowded()
    async with open_engine(flock, transport=model.transport) as engine:
        run_id = (await engine.submit("all", {"count": 20, "catches": False}, max_cost=2)).run_id
        run = await finish(engine, run_id)
        assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "cost_limit", 2)
        await engine.retry_run(run_id, max_cost=30)  # it keeps the two answers
        run = await finish(engine, run_id)
    assert (run.status, run.usage and run.usage.cost, len(model.requests)) == (RunStatus.COMPLETED, 20, 20)


async def test_calls_that_the_limit_allows_run_at_the_same_time(open_engine: OpenEngine) -> None:
    model = Crowd(20)
    model.may_answer = anyio.Event()
    async with open_engine(crowded(), transport=model.transport) as engine:
        run_id = (await engine.submit("all", {"count": 20}, max_cost=20)).run_id
        with anyio.fail_after(PATIENCE_S):
            await model.enough.wait()
        model.may_answer.set()
        run = await finish(engine, run_id)
    assert (run.status, run.usage and run.usage.cost) == (RunStatus.COMPLETED, 20)


async def test_calls_whose_estimate_is_too_high_run_one_at_a_time(open_engine: OpenEngine) -> None:
    """A prompt of so many tokens would cost more than is left, and the provider counts one token."""
    model = Crowd()
    prices = {MODEL: Price(input=100_000, output=0)}
    async with open_engine(crowded(prices), transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("all", {"count": 15}, max_cost=2)).run_id)
    assert (run.status, run.usage and run.usage.cost, len(model.requests)) == (RunStatus.COMPLETED, 1.5, 15)
    assert model.most == 1


async def test_the_length_of_an_answer_is_learned_from_the_first(open_engine: OpenEngine) -> None:
    """Without max_tokens, a long answer is expected at first: one call is made, and then as many as fit."""
    model, prices = Crowd(), {MODEL: Price(input=0, output=100)}
    async with open_engine(crowded(prices, None), transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("all", {"count": 8}, max_cost=0.1)).run_id)
    assert (run.status, run.usage and run.usage.cost) == (RunStatus.COMPLETED, 0.08)
    assert 1 < model.most <= 7


async def test_a_reported_length_without_measure_does_not_hold_up_the_other_calls() -> None:
    budget = Budget({MODEL: Price(input=0, output=1)}, 100, None, "batch")
    budget.add(Usage(output_tokens=10**12, priced_tokens=10**12))
    async with budget.reserve(MODEL, [], None):
        with anyio.fail_after(PATIENCE_S):
            async with budget.reserve(MODEL, [], None):
                pass


async def test_a_call_that_waits_for_the_limit_can_be_cancelled(open_engine: OpenEngine) -> None:
    """Those behind it go on, and what was reserved is free again."""
    model, flock = Crowd(2), crowded()
    model.may_answer = anyio.Event()

    @flock.agent
    async def impatient(context: RunContext) -> int:
        async def measure(text: str) -> None:
            await context.run_agent("measure", {"text": text})

        async with anyio.create_task_group() as patient:
            for text in "ab":
                patient.start_soon(measure, text)
            await model.enough.wait()
            async with anyio.create_task_group() as tasks:
                for text in "cd":
                    tasks.start_soon(measure, text)
                await anyio.wait_all_tasks_blocked()
                patient.start_soon(measure, "e")
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            model.may_answer.set()
        return len(model.requests)

    async with open_engine(flock, transport=model.transport) as engine:
        run = await finish(engine, (await engine.submit("impatient", {}, max_cost=2.5)).run_id)
    assert (run.status, bytes(run.result or b"")) == (RunStatus.COMPLETED, b'{"result":3}'), run.error


async def test_the_items_of_a_batch_share_its_max_cost(model: FakeModel, tmp_path: Path) -> None:
    """With 100 workers, as many calls are made as the limit allows, and the items that were refused are cancelled."""
    crowd = Crowd()
    async with crowded().engine(transport=crowd.transport, store=tmp_path / "flock.db") as engine:
        options = BatchOptions(max_workers=100, max_cost=20)
        batch = await ended(engine, await engine.submit_batch("measure", texts(200), options))
        assert (batch.status, batch.error_type, len(crowd.requests)) == (RunStatus.FAILED, "cost_limit", 20)
        assert Counter((item.status, item.error_type) for item in await all_items(engine, batch)) == {
            (RunStatus.COMPLETED, None): 20,
            (RunStatus.CANCELLED, "cost_limit"): 180,
        }
        await engine.retry_batch(batch.batch_id, max_cost=300)
        batch = await ended(engine, batch)
    assert (batch.status, batch.completed_items, len(crowd.requests)) == (RunStatus.COMPLETED, 200, 200)


async def test_the_calls_of_one_item_count_for_the_max_cost_of_its_batch(tmp_path: Path) -> None:
    crowd = Crowd()
    async with crowded().engine(transport=crowd.transport, store=tmp_path / "flock.db") as engine:
        items = [{"count": 50, "catches": False}] * 3
        batch = await ended(engine, await engine.submit_batch("all", items, BatchOptions(max_cost=2)))
    assert (batch.status, batch.error_type, batch.cancelled_items) == (RunStatus.FAILED, "cost_limit", 3)
    assert len(crowd.requests) == 2


async def test_an_agents_time_out_does_not_count_the_wait_for_the_limit() -> None:
    budget = Budget(A_DOLLAR, 2, None, "run")
    clocks: list[Any] = []

    async def second() -> None:
        with move_on_after_working(PATIENCE_S):
            clocks.extend(_CLOCKS.get())
            async with budget.reserve(MODEL, [], 100):
                assert clocks[0]._scope.deadline < math.inf

    async with anyio.create_task_group() as tasks, budget.reserve(MODEL, [], 150):
        tasks.start_soon(second)
        await anyio.wait_all_tasks_blocked()
        assert clocks[0]._scope.deadline == math.inf, "the clock stands still"


# Questions


def asking() -> Flock:
    """A flock with an agent that calls a model, asks a person if the text says so, and calls the model again."""
    flock = measuring()

    @flock.agent
    async def check(text: str, context: RunContext) -> int:
        length: int = (await context.run_agent("measure", {"text": text}))["length"]
        if text == "plain":
            return length
        expires_s = 0.5 if text == "expires" else 900
        if await context.ask(f"Is it {length}?", bool, expires_s=expires_s):
            return length
        return int((await context.run_agent("measure", {"text": f"{text} again"}))["length"])

    return flock


async def test_what_a_run_spent_before_a_question_counts_after_the_answer(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    model.replies = [Reply({"length": 1})]
    async with open_engine(asking(), transport=model.transport) as engine:
        run_id = (await engine.submit("check", {"text": "a"}, max_cost=0.00005)).run_id
        run = await waiting(engine, run_id)
        assert (run.usage, run.max_cost) == (usage_of_gpt_4o(10, 5), 0.00005)
        await engine.answer_call(run_id, run.waiting_for[0].call_id, json_of(False))
        run = await finish(engine, run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "cost_limit"), run.error
        assert run.usage == usage_of_gpt_4o(10, 5)
        model.replies = [Reply({"length": 1}), Reply({"length": 2})]
        await engine.retry_run(run_id, max_cost=1, calls="again")
        run = await waiting(engine, run_id)
        assert run.usage == usage_of_gpt_4o(20, 10)
        await engine.answer_call(run_id, run.waiting_for[0].call_id, json_of(False))
        run = await finish(engine, run_id)
        assert (run.status, run.usage) == (RunStatus.COMPLETED, usage_of_gpt_4o(30, 15))
    assert len(model.requests) == 3


async def items_waiting(engine: Engine, batch_id: str, count: int) -> list[Run]:
    """Return the items of a batch that wait, when there are *count* of them."""
    with anyio.fail_after(PATIENCE_S):
        while len(found := await engine.get_items(batch_id, statuses=[RunStatus.WAITING])) != count:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    return list(found)


async def test_an_item_that_waits_is_counted_once(open_engine: OpenEngine, model: FakeModel) -> None:
    """Whether it is answered, cancelled or expires, and also in the next attempt of its batch."""
    model.replies = [Reply({"length": 1})] * 4
    async with open_engine(asking(), transport=model.transport) as engine:
        items = [{"text": text} for text in ("answered", "cancelled", "expires")]
        batch = await engine.submit_batch("check", items, BatchOptions(max_workers=3))
        await until_failed(engine, batch.batch_id)
        answered, cancelled = await items_waiting(engine, batch.batch_id, 2)
        assert (answered.usage, cancelled.usage) == (usage_of_gpt_4o(10, 5), usage_of_gpt_4o(10, 5))
        await until_usage(engine, batch.batch_id, usage_of_gpt_4o(30, 15))
        await engine.cancel_run(cancelled.run_id)
        await engine.answer_call(answered.run_id, answered.waiting_for[0].call_id, json_of(False))
        batch = await ended(engine, batch)
        assert batch.usage == usage_of_gpt_4o(40, 20)
        assert [(item.status, item.usage) for item in await all_items(engine, batch)] == [
            (RunStatus.COMPLETED, usage_of_gpt_4o(20, 10)),
            (RunStatus.CANCELLED, usage_of_gpt_4o(10, 5)),
            (RunStatus.FAILED, usage_of_gpt_4o(10, 5)),
        ]
        model.replies = [Reply({"length": 1})]
        await engine.retry_batch(batch.batch_id, [RunStatus.CANCELLED], calls="again")
        (item,) = await items_waiting(engine, batch.batch_id, 1)
        assert item.usage == usage_of_gpt_4o(20, 10)
        await until_usage(engine, batch.batch_id, usage_of_gpt_4o(50, 25))
        await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(True))
        batch = await ended(engine, batch)
        assert batch.usage == usage_of_gpt_4o(50, 25)
        assert (await all_items(engine, batch))[1].usage == usage_of_gpt_4o(20, 10)
    assert len(model.requests) == 5


async def until_failed(engine: Engine, batch_id: str) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not await engine.get_items(batch_id, statuses=[RunStatus.FAILED]):  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def until_usage(engine: Engine, batch_id: str, usage: Usage) -> None:
    with anyio.fail_after(PATIENCE_S):
        while (now := (await engine.get_batch(batch_id)).usage) != usage:
            assert now is None or now.input_tokens < usage.input_tokens, "something was counted twice"
            await anyio.sleep(0.05)


async def test_items_that_wait_are_cancelled_when_max_cost_is_spent(open_engine: OpenEngine, model: FakeModel) -> None:
    """What they have spent counts. On a cluster, the item is in another chunk than those that spend the rest."""
    model.replies, count = [Reply({"length": 1})] * 22, 24
    async with open_engine(asking(), transport=model.transport) as engine:
        items = [{"text": "plain" if n else "a"} for n in range(count)]
        options = BatchOptions(max_workers=1, max_cost=22 * 0.000075)
        batch = await ended(engine, await engine.submit_batch("check", items, options))
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "cost_limit")
        assert (batch.usage, batch.waiting_items) == (usage_of_gpt_4o(220, 110), 0)
        found = await all_items(engine, batch)
        assert (found[0].status, found[0].error_type) == (RunStatus.CANCELLED, "cost_limit")
        assert found[0].usage == usage_of_gpt_4o(10, 5)
        assert Counter((item.status, item.error_type) for item in found) == {
            (RunStatus.COMPLETED, None): 21,
            (RunStatus.CANCELLED, "cost_limit"): 3,
        }
        model.replies = [Reply({"length": 1})] * 3
        await engine.retry_batch(batch.batch_id, max_cost=1, calls="again")
        (item,) = await items_waiting(engine, batch.batch_id, 1)
        await engine.answer_call(item.run_id, item.waiting_for[0].call_id, json_of(True))
        batch = await ended(engine, batch)
        assert (batch.status, batch.usage) == (RunStatus.COMPLETED, usage_of_gpt_4o(250, 125))


# The API


async def test_a_session_adds_up_its_runs(model: FakeModel) -> None:
    flock = measuring()
    model.replies = [Reply({"length": n}) for n in range(2)]
    app = create_app(flock, engine=flock.engine(transport=model.transport), auth="host")
    async with app.lifespan(), client_of(app) as client:
        for text in "ab":
            await post_run(client, "measure", {"text": text}, session_id="a/b")
        assert await get(client, "/session/a%2Fb") == {
            "session_id": "a/b",
            "total_runs": 2,
            "usage": {"input_tokens": 20, "output_tokens": 10},
            "cost": 0.00015,
        }
        assert (await client.get("/session/c")).status_code == 404


async def test_costs_are_in_responses_downloads_and_metrics(model: FakeModel) -> None:
    flock = measuring()

    @flock.agent
    def free(n: int) -> int:
        return n

    model.replies = [Reply({"length": 1}), Reply({"length": 1}), Reply("no JSON"), Reply("no JSON")]
    app = create_app(flock, engine=flock.engine(transport=model.transport), auth="host")
    async with app.lifespan(), client_of(app) as client:
        run = (await post_run(client, "measure", {"text": "a"}, max_cost=0.5)).json()
        tokens = {"input_tokens": 10, "output_tokens": 5}
        assert (run["usage"], run["cost"], run["max_cost"]) == (tokens, 0.000075, 0.5)
        assert (run["steps"][0]["usage"], run["steps"][0]["cost"]) == (tokens, 0.000075)
        without = (await post_run(client, "free", {"n": 1})).json()
        assert without["usage"] is None
        assert not {"cost", "max_cost"} & (without.keys() | without["steps"][0].keys())

        query: Any = {"agent_name": "measure", "max_workers": 1, "max_cost": "0.01"}
        sent = await client.post(
            "/run/batch", params=query, content="text\na\nb\n", headers={"Content-Type": "text/csv"}
        )
        assert sent.status_code == 202, sent.text
        batch = await wait_for(client, f"/batch/{sent.json()['batch_id']}")
        assert (batch["usage"], batch["cost"]) == ({"input_tokens": 30, "output_tokens": 15}, 0.000225)
        assert (batch["estimated_cost"], batch["max_cost"]) == (0.000225, 0.01)
        (listed,) = (await get(client, "/batches"))["batches"]
        assert {name: listed[name] for name in ("usage", "cost")} == {name: batch[name] for name in ("usage", "cost")}

        path = f"/batch/{batch['batch_id']}/results"
        table = list(csv.reader(io.StringIO((await client.get(f"{path}?format=csv&usage=true")).text)))
        assert table[0] == ["text", "length", "status", "error", "input_tokens", "output_tokens", "cost"]
        assert [row[-3:] for row in table[1:]] == [["10", "5", "0.000075"], ["20", "10", "0.00015"]]
        table = list(csv.reader(io.StringIO((await client.get(f"{path}?format=csv")).text)))
        assert table[0][-1] == "error"
        items = await get(client, path, usage="true")
        assert [(item["usage"], item["cost"]) for item in items] == [
            (tokens, 0.000075),
            ({"input_tokens": 20, "output_tokens": 10}, 0.00015),
        ]
        assert "usage" not in (await get(client, path))[0]
        metrics = (await client.get("/metrics")).text
        assert 'flock_cost_dollars_total{agent_name="measure"} 0.0003' in metrics


async def test_a_retry_over_http_raises_the_limit(model: FakeModel) -> None:
    flock = measuring()
    model.replies = [Reply("no JSON")]
    app = create_app(flock, engine=flock.engine(transport=model.transport), auth="host")
    async with app.lifespan(), client_of(app) as client:
        run = (await post_run(client, "measure", {"text": "a"}, max_cost=0.00001)).json()
        assert (run["status"], run["error_type"]) == ("failed", "cost_limit")
        path = f"/run/{run['run_id']}"
        for invalid in ({"max_cost": 0}, {"max_cost": "1"}, {"other": 1}):
            assert (await client.post(f"{path}/retry", json=invalid)).status_code == 422
        model.replies = [Reply({"length": 1})]
        assert (await client.post(f"{path}/retry", json={"max_cost": 1})).status_code == 202
        run = await wait_for(client, path)
        assert (run["status"], run["cost"], run["max_cost"]) == ("completed", 0.00015, 1)

        model.replies = [Reply({"length": 1})]
        body: Any = {"agent_name": "measure", "batch_inputs": texts(2), "max_workers": 1, "max_cost": 0.00001}
        batch = (await client.post("/run/batch", json=body)).json()
        batch = await wait_for(client, f"/batch/{batch['batch_id']}")
        assert (batch["status"], batch["error_type"], batch["cancelled_items"]) == ("failed", "cost_limit", 1)
        model.replies = [Reply({"length": 1})]
        path = f"/batch/{batch['batch_id']}"
        assert (await client.post(f"{path}/retry", json={"max_cost": 1})).status_code == 202
        batch = await wait_until(client, path, lambda body: body["status"] == "completed")
        assert "error_type" not in batch


@pytest.mark.parametrize("max_cost", [0, -1, math.nan, math.inf, 1e10])
async def test_a_max_cost_is_an_amount(max_cost: float, model: FakeModel) -> None:
    async with measuring().engine(transport=model.transport) as engine:
        with pytest.raises(DefinitionError, match="max_cost must be US dollars above 0 and up to 1,000,000,000"):
            await engine.submit("measure", {"text": "a"}, max_cost=max_cost)


@pytest.mark.parametrize("max_cost", [0, -1, "0.5", 1e300, math.nan])
async def test_an_invalid_max_cost_is_refused(max_cost: Any, model: FakeModel) -> None:
    flock = measuring()
    app = create_app(flock, engine=flock.engine(transport=model.transport), auth="host")
    async with app.lifespan(), client_of(app) as client:
        body = json.dumps({"agent_name": "measure", "inputs": {"text": "a"}, "max_cost": max_cost})
        sent = await client.post("/run/flock", content=body, headers={"Content-Type": "application/json"})
        assert sent.status_code in (400, 422), sent.text
        sent = await client.post(
            "/run/batch",
            params={"agent_name": "measure", "max_cost": f"x{max_cost}"},
            content="text\na\n",
            headers={"Content-Type": "text/csv"},
        )
        assert sent.status_code == 422


# Old stores, and kills


async def test_runs_of_an_older_version_have_tokens_and_no_cost(tmp_path: Path) -> None:
    path, run_id = tmp_path / "flock.db", new_id()
    flock = measuring()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in itertools.chain.from_iterable(MIGRATIONS[:12]):
            db.execute(statement)
        db.execute("PRAGMA user_version = 12")
        last_step = b'["measure",{"input_tokens":10,"output_tokens":5},1,0,0,0]'
        db.execute(
            "INSERT INTO runs (run_id, flock, agent_name, status, created_at, is_async, attempt, inputs, result, "
            "last_step) VALUES (?, ?, 'measure', 'completed', 0, 1, 1, '{}', ?, ?)",
            (run_id, flock.name, b'{"length":1}', last_step),
        )
        db.execute("UPDATE runs SET inputs = CAST(inputs AS BLOB)")
    app = create_app(flock, store=path, auth="host")
    async with app.lifespan(), client_of(app) as client:
        run = await get(client, f"/run/{run_id}")
    assert run["usage"] == {"input_tokens": 10, "output_tokens": 5}
    assert "cost" not in run


SERVED = """
from flock.core import Flock, FlockFactory

flock = Flock("costs", model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent("measure", "", None, "text: str", "length: int", answer_retries=1))
"""


async def test_the_command_stops_at_max_cost_and_continues(model: FakeModel, tmp_path: Path) -> None:
    """The second call pays only for the rows that are left."""
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "rows.csv").write_text("text\n" + "abc\n" * 6)
    model.replies = [Reply({"length": 3})] * 6
    command = flockapi_command("batch", "served.py", "measure", "rows.csv", "-o", "out.csv", "--max-workers", "1")
    with model.serve() as url:
        env = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-test-key-of-the-tests"}
        refused = await anyio.run_process(
            [*command, "--model", "ollama/x", "--max-cost", "1"], env=env, check=False, cwd=tmp_path
        )
        assert b"has no price, so max_cost cannot hold" in refused.stderr
        first = await anyio.run_process([*command, "--max-cost", "0.00015"], env=env, check=False, cwd=tmp_path)
        assert (first.returncode, len(model.requests)) == (1, 2), first.stderr
        assert b"The batch stopped after 0.000150 US dollars." in first.stderr
        assert b"run the same command again" in first.stderr
        rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
        assert [row["length"] for row in rows] == ["3", "3", "", "", "", ""]
        again = [*command, "--max-cost", "1", "--usage"]
        second = await anyio.run_process(again, env=env, check=False, cwd=tmp_path)
        assert (second.returncode, len(model.requests)) == (0, 6), second.stderr
        assert b"6 of 6 rows completed. They cost 0.000450 US dollars." in second.stderr
    table = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert table[0][-3:] == ["input_tokens", "output_tokens", "cost"]
    assert table[1][-3:] == ["10", "5", "0.000075"]


async def test_a_batch_without_a_server_stops_at_its_max_cost() -> None:
    with FakeModel([{"length": 3}] * 2) as model:
        results = await measuring().run_batch_async("measure", texts(6), max_workers=1, max_cost=0.00015)
    assert len(model.requests) == 2
    assert results[:2] == [{"length": 3}] * 2
    assert [result["error_type"] for result in results[2:]] == ["cost_limit"] * 4
    with pytest.raises(DefinitionError, match="max_cost must be US dollars above 0"):
        await measuring().run_batch_async("measure", texts(1), max_cost=0)
    with pytest.raises(InvalidData, match="has no price, so max_cost cannot hold"):
        await measuring("ollama/x").run_batch_async("measure", texts(1), max_cost=1)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3])
async def test_the_usage_of_a_batch_survives_kills(kills: int, tmp_path: Path) -> None:
    """A reply that was in flight at a kill is repeated with its idempotency key. The provider counted it twice, and the
    batch once: nobody can know it. Unless it was cut off, and stored just before the kill, which came before the end of
    its item: then the batch has counted both. All others are counted to the token, also by the retry after the kills.
    """
    provider, workers, count = Provider(), 20, 400
    provider.delay_s = 0.05
    (tmp_path / "served.py").write_text(SERVED)
    command = flockapi_command("serve", "served.py", "--port", "0", "--store", "flock.db")
    with provider.serve() as url:
        env = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "sk-test-key-of-the-tests"}
        path, seen = "", 0
        for _ in range(kills):
            with running(*command, **env) as server:
                async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                    if not path:
                        body = {"agent_name": "measure", "batch_inputs": texts(count), "max_workers": workers}
                        path = f"/batch/{(await client.post('/run/batch', json=body)).json()['batch_id']}"
                    seen = await _until_more(client, path, seen + 80)
                os.killpg(server.process.pid, signal.SIGKILL)
        lost = _repeated(provider)
        with running(*command, **env) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                await wait_for(client, f"{path}?results=false", 60)
                lost = _repeated(provider)
                provider.heals = True
                assert (await client.post(f"{path}/retry")).status_code == 202
                batch = await wait_for(client, f"{path}?results=false", 60)
                items = await get(client, f"{path}/results", usage="true")
    print(f"{len(provider.counted)} replies, {len(lost)} of them in flight at {kills} kills")
    assert len(lost) <= kills * workers
    paid = [priced(PRICES, usage, MODEL) for usage in lost]
    least = provider.total() - sum(paid, Usage())
    possible = [sum(stored, least) for count in range(3) for stored in itertools.combinations(paid, count)]
    expected = next((usage for usage in possible if usage.cost == batch["cost"]), None)
    assert expected is not None, f"it cost {batch['cost']}, and at least {least.cost}"
    assert batch["usage"] == {
        name: getattr(expected, name) for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")
    }
    assert sum(item["usage"]["input_tokens"] for item in items if item["usage"]) == expected.input_tokens


async def _until_more(client: httpx.AsyncClient, path: str, count: int) -> int:
    """Wait until *count* items have ended, and return how many have."""
    batch = await wait_until(client, f"{path}?results=false", lambda body: body["completed_items"] >= count)
    return int(batch["completed_items"])


def _repeated(provider: Provider) -> list[Usage]:
    """Return the replies that were given again later under the same key."""
    last = {key: number for number, (key, _) in enumerate(provider.counted)}
    return [usage for number, (key, usage) in enumerate(provider.counted) if last[key] != number]


# Replies that are not read to their end


class Hanging(httpx.AsyncByteStream):
    """A stream that begins, and then sends nothing more."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self.is_read = anyio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body
        self.is_read.set()
        await anyio.sleep_forever()


def streaming(stream: httpx.AsyncByteStream) -> httpx.Response:
    return httpx.Response(200, headers={"Content-Type": "text/event-stream"}, stream=stream)


def tokens(text: str | bytes) -> int:
    return math.ceil(len(text) / 4)


def estimate(request: ModelRequest, text: str) -> Usage:
    """Return the estimated tokens of a request, and of a reply of which *text* has arrived."""
    return Usage(
        input_tokens=(prompt := tokens(json.dumps(request, separators=(",", ":"), ensure_ascii=False))),
        output_tokens=tokens(text),
        estimated_tokens=prompt + tokens(text),
    )


def answering() -> Flock:
    flock = Flock("unfinished", model=MODEL)
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a"))
    return flock


@pytest.mark.parametrize("is_on_disk", [False, True], ids=["memory", "disk"])
async def test_a_cancelled_stream_reports_its_usage(is_on_disk: bool, tmp_path: Path, model: FakeModel) -> None:
    """The tokens are estimated, and count for the cost. On a cluster nothing is streamed."""
    stream, text = Hanging(sse(chunk(reasoning="hm, well"), chunk('{"a": "1234567'))), 'hm, well{"a": "1234567'
    model.replies = [streaming(stream)]
    store = tmp_path / "flock.db" if is_on_disk else ":memory:"
    async with answering().engine(transport=model.transport, store=store) as engine:
        run = await engine.submit("ask", {"q": "?"})
        with anyio.fail_after(PATIENCE_S):
            await stream.is_read.wait()
            await engine.cancel_run(run.run_id)
            await engine.wait(run.run_id)
        run = await engine.get_run(run.run_id)
    assert run.status is RunStatus.CANCELLED
    assert run.usage == priced(PRICES, estimate(model.requests[0], text), MODEL)
    assert run.usage.cost


async def test_what_the_server_of_a_cancelled_stream_has_counted_is_no_estimate(model: FakeModel) -> None:
    counted = {"choices": [], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}
    stream = Hanging(sse(counted, chunk('{"a": "1')))
    model.replies = [streaming(stream)]
    async with answering().engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        with anyio.fail_after(PATIENCE_S):
            await stream.is_read.wait()
            await engine.cancel_run(run.run_id)
            run = await engine.wait(run.run_id)
    assert run.usage == priced(PRICES, Usage(input_tokens=100, output_tokens=2, estimated_tokens=1), MODEL)
    assert shown_usage(run.usage)["usage"] == {"input_tokens": 100, "output_tokens": 2, "estimated_tokens": 1}


@pytest.mark.parametrize(
    ("broken", "failure"),
    [
        pytest.param(sse(chunk('{"a"')), httpx.ReadError("gone"), id="lost connection"),
        pytest.param(sse(chunk('{"a"')), httpx.ReadTimeout("slow"), id="timed out"),
        pytest.param(sse(chunk('{"a"')), None, id="no end"),
        pytest.param(sse(chunk('{"a"'), {"error": {"code": 500}}), None, id="error"),
    ],
)
async def test_each_broken_attempt_of_a_stream_is_counted(
    broken: bytes, failure: Exception | None, model: FakeModel
) -> None:
    """Beside the tokens of the one that succeeds, in the run and in its step."""
    model.replies = [streaming(Pieces([broken], failure)), Reply({"a": "done"})]
    async with answering().engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert run.status is RunStatus.COMPLETED, run.error
    first = estimate(model.requests[0], '{"a"')
    assert run.usage == priced(PRICES, first + Usage(input_tokens=10, output_tokens=5), MODEL)
    assert run.steps[0].usage == run.usage


async def test_an_error_in_place_of_a_stream_has_no_usage(model: FakeModel) -> None:
    model.replies = [streaming(Pieces([sse({"error": {"code": 400, "message": "no"}})]))]
    async with answering().engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.error_type, run.usage) == ("model_bad_request", None)

"""Calls of a batch's items through the provider's batch endpoint: half the price, and no row paid twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.core import Flock, FlockFactory, Model
from flock.runs import Batch, BatchOptions, Engine, Row, Run
from flock.testing import Failure, ModelRequest, Reply
from tests.support import PATIENCE_S
from tests.support.batchapi import BatchProvider

pytestmark = pytest.mark.anyio


def answer(request: ModelRequest) -> Reply | Failure:
    return Reply({"answer": "yes"})


@pytest.fixture
def provider() -> Iterator[BatchProvider]:
    yield BatchProvider(answer)


@pytest.fixture
def url(provider: BatchProvider) -> Iterator[str]:
    with provider.serve() as url:
        yield url


def flock_of(url: str, **options: Any) -> Flock:
    flock = Flock("half", model=Model("openai/gpt-4o", base_url=url, api_key="none", batch=True, **options))
    flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer"))
    return flock


async def ended(engine: Engine, batch: Batch) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait_batch(batch.batch_id)


async def submit(engine: Engine, count: int, **options: Any) -> Batch:
    rows = [{"text": f"text {number}"} for number in range(count)]
    return await engine.submit_batch("ask", rows, BatchOptions(**options))


async def test_calls_of_items_go_through_the_endpoint_at_half_the_price(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 20))
        items = await engine.get_items(batch.batch_id)
    assert (batch.status, batch.failed_items, [item.value for item in items]) == (
        "completed",
        0,
        [{"answer": "yes"}] * 20,
    )
    assert len(provider.jobs) == 1 and not provider.normal
    assert sorted(provider.paid.values()) == [1] * 20
    assert batch.usage is not None and batch.usage.cost == 20 * (10 * 2.5 + 5 * 10) / 10**6 / 2
    assert items[0].steps[0].usage == items[0].usage

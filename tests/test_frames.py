"""Data frames in place of mappings. Neither package is imported by ours."""

import datetime
from typing import Any

import httpx
import pandas
import polars
import pytest

from flock.client import AsyncFlockClient
from flock.core import Flock
from flock.errors import InvalidData
from flock.runs import BatchOptions
from flockapi import create_app

pytestmark = pytest.mark.anyio

DAY = datetime.datetime(2026, 11, 29, 9)
COLUMNS: dict[str, list[Any]] = {"text": ["a", "b"], "n": [1, None], "at": [DAY, None], "tags": [["x"], []]}
FRAMES = [pytest.param(pandas.DataFrame, id="pandas"), pytest.param(polars.DataFrame, id="polars")]
by_package = pytest.mark.parametrize("make", FRAMES)


def frames_flock() -> Flock:
    flock = Flock("frames")

    @flock.agent
    async def show(text: str, tags: list[str], n: float = -1, at: datetime.datetime | None = None) -> str:
        return f"{text} {n:g} {at} {tags}"

    return flock


SHOWN = [f"a 1 {DAY} ['x']", "b -1 None []"]


@by_package
async def test_a_frame_is_a_batch(make: Any) -> None:
    """NaN, NaT and null are missing."""
    assert await frames_flock().run_batch_async("show", make(COLUMNS), box_results=False) == SHOWN


@by_package
async def test_an_engine_takes_a_frame(make: Any) -> None:
    async with frames_flock().engine() as engine:
        batch = await engine.submit_batch("show", make(COLUMNS), BatchOptions())
        assert (await engine.wait_batch(batch.batch_id)).failed_items == 0


@by_package
async def test_a_client_sends_a_frame(make: Any) -> None:
    app = create_app(frames_flock(), store=":memory:")
    async with app.lifespan(), AsyncFlockClient("http://t", transport=httpx.ASGITransport(app)) as client:
        batch = await client.wait_batch((await client.run_batch("show", make(COLUMNS))).batch_id)
    assert (batch.completed_items, batch.failed_items) == (2, 0)


@by_package
async def test_a_column_of_a_frame_that_is_no_input_is_named(make: Any) -> None:
    with pytest.raises(InvalidData, match="There is no input 'txt'"):
        await frames_flock().run_batch_async("show", make({"txt": ["a"], "tags": [[]]}))


async def test_types_of_pandas_are_read_as_those_of_python() -> None:
    frame = pandas.DataFrame(COLUMNS).convert_dtypes()
    assert await frames_flock().run_batch_async("show", frame, box_results=False) == SHOWN


async def test_nan_in_a_mapping_is_missing() -> None:
    """None is not, since the mapping says so."""
    rows: list[dict[str, Any]] = [{"text": "a", "tags": [], "n": float("nan")}]
    assert await frames_flock().run_batch_async("show", rows, box_results=False) == ["a -1 None []"]
    async with frames_flock().engine() as engine:
        batch = await engine.submit_batch("show", rows, BatchOptions())
        assert (await engine.wait_batch(batch.batch_id)).failed_items == 0
        with pytest.raises(InvalidData, match="got 'null'"):
            await engine.submit_batch("show", [{"text": "a", "tags": [], "n": None}], BatchOptions())


async def test_a_lazy_frame_and_a_frame_of_columns_are_errors() -> None:
    with pytest.raises(TypeError, match="LazyFrame"):
        await frames_flock().run_batch_async("show", polars.LazyFrame(COLUMNS))  # type: ignore[arg-type]
    with pytest.raises(InvalidData, match="must be a mapping of inputs by name, not of type 'str'"):
        await frames_flock().run_batch_async("show", ["a"])  # type: ignore[list-item]

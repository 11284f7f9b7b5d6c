"""What an operator sees: traces, logs, readiness, metrics."""

import contextlib
import sqlite3
from pathlib import Path

import httpx
import pytest

from flock import schema
from flock.core import Flock
from flock.runs import RunContext
from flockapi import create_app
from tests.fakes import FakeModel, answer
from tests.test_api import wait_for

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# Traces


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_trace_is_kept_with_the_run_and_handed_to_model_calls(
    is_async: bool, client: httpx.AsyncClient, model: FakeModel
) -> None:
    model.replies = [answer("no JSON"), answer({"sentiment": "good", "keywords": []})]
    body = {"agent_name": "text_analyzer", "inputs": {"text": "hi"}, "async_run": is_async}
    run = (await client.post("/run/flock", json=body, headers={"traceparent": TRACEPARENT})).json()
    run = (await client.get(f"/run/{run['run_id']}?wait=10")).json()
    assert (run["status"], run["traceparent"]) == ("completed", TRACEPARENT)
    assert [headers["traceparent"] for headers in model.headers] == [TRACEPARENT] * 2


async def test_a_trace_reaches_functions_and_the_items_of_a_batch(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def tell(context: RunContext) -> str | None:
        return context.traceparent

    body = {"agent_name": "tell", "batch_inputs": [{}, {}], "max_workers": 1}
    batch = (await client.post("/run/batch", json=body, headers={"traceparent": TRACEPARENT})).json()
    got = await wait_for(client, f"/batch/{batch['batch_id']}")
    assert got["results"] == [{"result": TRACEPARENT}] * 2


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("", None),
        (TRACEPARENT.upper(), None),
        (TRACEPARENT + "-more", None),
        (TRACEPARENT[:-1], None),
        (TRACEPARENT.replace("00-", "ff-", 1), None),
        ("00-" + "0" * 32 + TRACEPARENT[35:], None),
        (TRACEPARENT[:36] + "0" * 16 + "-01", None),
        (TRACEPARENT.replace("00-", "cc-", 1), TRACEPARENT),
        (TRACEPARENT.replace("00-", "cc-", 1) + "-what-comes-later", TRACEPARENT),
        (TRACEPARENT.replace("00-", "cc-", 1) + ".what", None),
    ],
)
async def test_a_trace_that_is_not_valid_counts_as_none(sent: str, kept: str | None, client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1}}
    run = (await client.post("/run/flock", json=body, headers={"traceparent": sent})).json()
    assert run["traceparent"] == kept


async def test_two_traces_are_none_and_a_model_is_told_nothing_then(
    client: httpx.AsyncClient, model: FakeModel
) -> None:
    model.replies = [answer({"sentiment": "good", "keywords": []})]
    headers = [("traceparent", TRACEPARENT)] * 2
    body = {"agent_name": "text_analyzer", "inputs": {"text": "hi"}}
    assert (await client.post("/run/flock", json=body, headers=headers)).json()["traceparent"] is None
    assert "traceparent" not in model.headers[0]


async def test_a_store_of_the_version_before_traces_is_brought_into_form(flock: Flock, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        schema.MIGRATIONS[0](db)
        db.execute("PRAGMA user_version = 1")
        columns = "run_id, flock, agent_name, status, created_at, is_async, attempt, inputs, result"
        values = ("0190-old", "sample", "add", "completed", 1, 1, 1, b"{}", b'{"result":3}')
        db.execute(f"INSERT INTO runs ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        db.commit()
    app = create_app(flock, store=path)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        run = (await client.get("/run/0190-old")).json()
        assert (run["status"], run["result"], run["traceparent"]) == ("completed", {"result": 3}, None)
        body = {"agent_name": "add", "inputs": {"a": 1}}
        new = (await client.post("/run/flock", json=body, headers={"traceparent": TRACEPARENT})).json()
        assert (await client.get(f"/run/{new['run_id']}")).json() == new

"""Batches whose items were executed by several versions of an agent: each result says of which one it is."""

import contextlib
import csv
import importlib
import inspect
import io
import json
import linecache
import sqlite3
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.agents import versions
from flock.agents.versions import recipe_of
from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import Batch, BatchOptions, RunStatus
from flock.store.migrations import MIGRATIONS
from flock.testing import FakeModel, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, all_items, ended
from tests.support.http import client_of

pytestmark = pytest.mark.anyio


def first_flock(version: str | None = None) -> Flock:
    flock = Flock()

    @flock.agent(version=version)
    async def work(n: int) -> str:
        if n == 2:
            raise AgentError("not yet")
        return "one"

    return flock


def changed_flock(version: str | None = None) -> Flock:
    flock = Flock()

    @flock.agent(version=version)
    async def work(n: int) -> str:
        return "two"

    return flock


async def test_each_result_of_a_mixed_batch_has_its_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An agent that is the same again adds no version. The log warns at each start, and a download has a column."""
    store, rows = tmp_path / "flock.db", [{"n": n} for n in range(5)]
    async with first_flock().engine(store=store) as engine:
        batch = await ended(engine, await engine.submit_batch("work", rows, BatchOptions(limit=3)))
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, options=BatchOptions(limit=4)))
        assert (len(batch.versions), batch.is_mixed) == (1, False)
    assert "mixed" not in caplog.text
    flock = changed_flock()
    app = create_app(flock, auth="host", engine=flock.engine(store=store))
    async with app.lifespan(), client_of(app) as client:
        url = f"/batch/{batch.batch_id}"
        assert "versions" not in (await client.get(url)).json()
        before = await client.get(f"{url}/results?format=csv")
        assert before.text.splitlines()[0] == "n,result,status,error"
        await client.post(f"{url}/retry", json={"only": "cancelled"})
        found = (await client.get(f"{url}?wait=30")).json()
        one, two = found["versions"]
        text = (await client.get(f"{url}/results?format=csv&usage=true")).text
        lines = [(row["result"], row["version"]) for row in csv.DictReader(io.StringIO(text))]
        assert lines == [("one", one), ("one", one), ("", one), ("one", one), ("two", two)]
        text = (await client.get(f"{url}/results?format=ndjson")).text
        assert [json.loads(line)["version"] for line in text.splitlines()] == [one, one, one, one, two]
        listed = (await client.get("/batches")).json()["batches"]
        assert listed[0]["versions"] == [one, two]
    warned = [each.getMessage() for each in caplog.records if "mixed" in each.getMessage()]
    assert warned == [
        f"batch {batch.batch_id} is mixed: Its results are of 2 versions of the agent 'work'; see the column 'version'."
    ]


async def test_each_result_has_the_version_that_has_made_it(open_again: OpenEngine) -> None:
    """The versions are the same on each engine. A row that is executed again is of the new one."""
    flocks, rows = [first_flock(), changed_flock("2")], [{"n": n} for n in range(5)]
    one, two = (flock.engine().recipe_and_version("work")[1] for flock in flocks)
    async with open_again(flocks[0]) as engine:
        batch = await ended(engine, await engine.submit_batch("work", rows, BatchOptions(limit=4)))
        assert (batch.versions, batch.is_mixed) == ((one,), False)
    async with open_again(flocks[1]) as engine:
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
        assert (batch.versions, batch.is_mixed) == ((one, two), True)
        assert [batch.version_of(item) for item in await all_items(engine, batch)] == [one, one, one, one, two]
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert [batch.version_of(item) for item in await all_items(engine, batch)] == [one, one, two, one, two]
        assert (await engine.get_batch(batch.batch_id)).versions == (one, two)


async def two_versions(sql: str) -> tuple[Batch, list[str | None]]:
    """Run four items, change the store by *sql*, and run the fifth with another version."""
    async with first_flock().engine(store="flock.db") as engine:
        batch = await engine.submit_batch("work", [{"n": n} for n in (0, 1, 3, 4, 5)], BatchOptions(limit=4))
        batch = await ended(engine, batch)
    with contextlib.closing(sqlite3.connect("flock.db")) as db, db:
        db.executescript(sql)
    async with changed_flock().engine(store="flock.db") as engine:
        await engine.retry_batch(batch.batch_id)
        batch = await ended(engine, batch)
        return batch, [batch.version_of(item) for item in await all_items(engine, batch)]


def test_the_recipe_of_an_agent_has_the_names_of_agents_that_are_its_tools() -> None:
    def recipe(tool: str) -> str | None:
        made = FlockFactory.create_default_agent("ask", input="a", output="b", tools=[tool], version="1")
        return recipe_of("ask", {"ask": made}, ())

    assert recipe("searcher") == recipe("searcher") != recipe("researcher")


async def test_the_clock_does_not_decide_of_which_version_a_result_is() -> None:
    """It was set back before the second version."""
    day = 86_400_000_000
    sql = f"UPDATE runs SET completed_at = completed_at + {day}; UPDATE batches SET created_at = created_at + {day}"
    batch, found = await two_versions(sql)
    one, two = batch.versions
    assert found == [*[one] * 4, two]


async def test_versions_of_a_store_that_kept_their_times_are_read() -> None:
    first = "json_extract(CAST(versions AS TEXT), '$[0]')"
    old = f"CAST(json_array(json_object('version', {first}, 'since', '2026-11-28T00:00:00Z')) AS BLOB)"
    before = next(number for number, migration in enumerate(MIGRATIONS) if "$.version" in migration[0])
    batch, found = await two_versions(f"UPDATE batches SET versions = {old}; PRAGMA user_version = {before}")
    one, two = batch.versions
    assert found == [*[one] * 4, two]


async def test_results_of_a_store_without_versions_are_of_an_unknown_one() -> None:
    batch, found = await two_versions("UPDATE runs SET version_number = NULL; UPDATE batches SET versions = NULL")
    assert [*batch.versions[:1]] == ["unknown"]
    assert batch.is_mixed
    assert found == [*["unknown"] * 4, batch.versions[1]]


async def test_results_that_a_new_batch_takes_are_of_its_version() -> None:
    model = FakeModel(lambda request: Reply({"answer": "yes"}))
    flock = Flock(model="openai/gpt-4o")
    flock.add_agent(FlockFactory.create_default_agent("ask", input="n: int", output="answer"))
    async with flock.engine(store="flock.db", transport=model.transport) as engine:
        for _ in range(2):
            batch = await engine.submit_batch("ask", [{"n": 1}, {"n": 2}], BatchOptions(reuse=True))
            batch = await ended(engine, batch)
            (version,) = batch.versions
            assert {batch.version_of(item) for item in await all_items(engine, batch)} == {version}
    assert len(model.requests) == 2


async def test_the_version_is_that_of_the_code_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is edited after the import, and before the first batch."""
    path, source = tmp_path / "running.py", "from flock.core import Flock\nflock = Flock()\n@flock.agent\n"
    path.write_text(f"{source}def work(n: int) -> str:\n    return 'one'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    flock = importlib.import_module("running").flock
    before = inspect.getsource(flock.agents["work"].function)
    path.write_text(f"{source}def work(n: int) -> str:\n    return 'three'\n")
    linecache.clearcache()
    assert inspect.getsource(flock.agents["work"].function) != before
    assert versions._source_of(flock.agents["work"].function) == before
    sys.modules.pop("running")


@pytest.mark.parametrize(("first", "then", "is_mixed"), [("1", "1", False), ("1", "2", True)])
async def test_the_version_of_an_agent_says_whether_it_has_changed(first: str, then: str, is_mixed: bool) -> None:
    async with first_flock(first).engine(store="flock.db") as engine:
        batch = await engine.submit_batch("work", [{"n": 0}, {"n": 1}], BatchOptions(limit=1))
        await ended(engine, batch)
    async with changed_flock(then).engine(store="flock.db") as engine:
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert [item.value["result"] for item in await all_items(engine, batch)] == ["one", "two"]
    assert batch.is_mixed is is_mixed
    assert [each.partition("-")[0] for each in batch.versions] == ([first, then] if is_mixed else [first])


async def test_a_batch_whose_results_are_all_of_the_new_version_is_not_mixed() -> None:
    """Its items with invalid inputs, and those that were cancelled, are of none."""

    def asking(instructions: str) -> Flock:
        flock = Flock(model="openai/gpt-4o")
        agent = FlockFactory.create_default_agent("ask", input="n: int", output="answer", instructions=instructions)
        flock.add_agent(agent)
        return flock

    async def one_batch(batch: Batch | None, instructions: str, options: BatchOptions) -> Batch:
        model = FakeModel(lambda request: Reply({"answer": "yes"}))
        async with asking(instructions).engine(store="flock.db", transport=model.transport) as engine:
            if batch is None:
                rows: list[dict[str, Any]] = [{"n": 1}, {"n": "x"}, {"n": 2}]
                batch = await engine.submit_batch("ask", rows, options, on_invalid="skip")
                await engine.cancel_batch(batch.batch_id)
            else:
                await engine.retry_batch(batch.batch_id, options=options)
            batch = await ended(engine, batch)
            items = await all_items(engine, batch)
        made = [batch.version_of(item) is not None for item in items]
        assert made == [item.status is RunStatus.COMPLETED for item in items]
        return batch

    batch = await one_batch(None, "", BatchOptions())
    batch = await one_batch(batch, "Be brief.", BatchOptions(limit=1))
    assert (batch.completed_items - batch.cancelled_items, batch.is_mixed, len(batch.versions)) == (2, False, 1)
    batch = await one_batch(batch, "Be very brief.", BatchOptions())
    assert batch.is_mixed


async def test_a_batch_runs_if_the_file_of_its_agent_has_changed_since(tmp_path: Path) -> None:
    """An editor may have saved half a function."""
    path = tmp_path / "edited.py"
    path.write_text("def work(n: int) -> int:\n    return (n\n")
    names: dict[str, Any] = {}
    exec(compile("def work(n: int) -> int:\n    return n\n", str(path), "exec"), names)
    flock = Flock()
    flock.agent(names["work"])
    async with flock.engine() as engine:
        with anyio.fail_after(PATIENCE_S):
            batch = await ended(engine, await engine.submit_batch("work", [{"n": 1}], BatchOptions()))
    assert (batch.status, len(batch.versions)) == (RunStatus.COMPLETED, 1)

"""What a principal may spend in a day, and what everybody has spent."""

import contextlib
import itertools
import os
import random
import signal
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.errors import DefinitionError, TooManyRequests
from flock.models.prices import DayBudget
from flock.runs import (
    Account,
    BatchOptions,
    Engine,
    IdempotencyKey,
    Principal,
    Run,
    RunContext,
    RunStatus,
    Spent,
    Usage,
    UsageFilter,
    UsageRow,
    now,
)
from flock.runs.usage import UsageSums
from flock.testing import FakeModel, Reply
from flock.web.auth import KeyRing, ScopedEngine, read_keys
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal
from tests.support.engines import OpenEngine, all_items, ended, sqlite_of
from tests.support.http import check_problem, client_of, get
from tests.support.servers import flockapi_command, running
from tests.test_ask import json_of, waiting
from tests.test_costs import A_DOLLAR, MODEL, SERVED, Crowd, Provider, crowded, finish, measuring, texts
from tests.test_secrets import Opened

pytestmark = pytest.mark.anyio

KEYS = {"ann:max_cost_per_day:2": "a" * 16, "bob": "b" * 16, "ops:admin": "o" * 16}


def as_ann(engine: Engine, max_cost: float | None = 2) -> ScopedEngine:
    return ScopedEngine(engine, Principal(name="ann", max_cost_per_day=max_cost))


async def usage_of(engine: Engine, principal: str | None = "ann", by: str = "day,agent_name,model") -> list[UsageRow]:
    today = now().date()
    wanted = UsageFilter(first_day=today - timedelta(days=1), last_day=today, principal=principal, by=(*by.split(","),))
    return list((await engine.get_usage(wanted)).rows)


async def until_spent(engine: Engine, dollars: float, principal: str = "ann") -> None:
    """Wait until so much is counted. On a cluster, that may take a moment after the end of a run."""
    with anyio.fail_after(PATIENCE_S):
        while (await engine.get_account(principal)).picodollars < dollars * 10**12:  # noqa: ASYNC110
            await anyio.sleep(0.05)


async def spend(engine: ScopedEngine, count: int = 1) -> Run:
    """Run *count* calls of a dollar each at once."""
    return await finish(engine, (await engine.submit("all", {"count": count})).run_id)


# The budget of a day


async def test_no_run_starts_when_the_budget_of_the_day_is_spent(open_engine: OpenEngine) -> None:
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        ann, key = as_ann(engine), IdempotencyKey("k", b"1")
        first = await ann.submit("all", {"count": 2}, key=key)
        run = await finish(ann, first.run_id)
        batch = await ended(
            engine,
            await ScopedEngine(engine, Principal(name="bob")).submit_batch("all", [{"count": 1}], BatchOptions()),
        )
        assert (run.status, batch.status) == (RunStatus.COMPLETED, RunStatus.COMPLETED)
        await until_spent(engine, 2)
        for send in (
            lambda: ann.submit("all", {"count": 1}),
            lambda: ann.submit("all", {"count": 1}, is_async=False),
            lambda: ann.submit_batch("all", [{"count": 1}], BatchOptions()),
            lambda: ann.submit("all", {"count": 1}, key=IdempotencyKey("other", b"1")),
            lambda: ann.retry_run(run.run_id),
        ):
            with pytest.raises(
                TooManyRequests, match=r"This caller has spent 2.000000 US dollars today. It may"
            ) as exc:
                await send()
            seconds = datetime.combine(now().date() + timedelta(days=1), datetime.min.time(), UTC) - now()
            assert 0 < exc.value.retry_after_s <= seconds.total_seconds() + 5
        if hasattr(engine, "store"):  # a cluster answers with the run itself
            from flock.errors import Replayed

            with pytest.raises(Replayed):
                await ann.submit("all", {"count": 2}, key=key)
        assert len(model.requests) == 3
        assert (await spend(ScopedEngine(engine, Principal(name="bob")))).status is RunStatus.COMPLETED
        assert (await spend(as_ann(engine, 3))).status is RunStatus.COMPLETED, "a higher budget counts at once"
        await until_spent(engine, 3)
        assert (await spend(as_ann(engine, None))).status is RunStatus.COMPLETED, "and so does none"


async def test_200_calls_in_flight_stop_at_the_budget_of_the_day(open_engine: OpenEngine) -> None:
    """Ten runs of twenty calls of a dollar each, at once: two calls are made, and the others are refused."""
    model = Crowd()
    model.may_answer = anyio.Event()
    async with open_engine(crowded(), transport=model.transport) as engine:
        ann = as_ann(engine)
        run_ids = [(await ann.submit("all", {"count": 20, "catches": True})).run_id for _ in range(10)]
        model.may_answer.set()
        runs = [await finish(ann, run_id) for run_id in run_ids]
        assert [run.status for run in runs] == [RunStatus.COMPLETED] * 10, runs[0].error
        assert sum(msgspec.json.decode(run.result or b"")["result"].get("answered", 0) for run in runs) == 2
        await until_spent(engine, 2)
        assert (await engine.get_account("ann")).picodollars == 2 * 10**12
    assert len(model.requests) == 2


async def test_a_run_that_spends_the_budget_fails_at_its_next_call(open_engine: OpenEngine) -> None:
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        run_id = (await as_ann(engine).submit("all", {"count": 5, "catches": False})).run_id
        run = await finish(engine, run_id)
        assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "cost_limit", 2), run.error
        assert run.error is not None
        assert run.error.startswith(
            "Stopped before 'measure' called its model. This caller has spent 2.000000 US dollars today. It may spend "
            "2 in a day, in UTC (max_cost_per_day)."
        )
        await until_spent(engine, 2)
        await as_ann(engine, 5).retry_run(run_id)
        run = await finish(engine, run_id)
        assert (run.status, len(model.requests)) == (RunStatus.COMPLETED, 5), "what was answered is kept"
        await until_spent(engine, 5)
        assert (await engine.get_account("ann")).picodollars == 5 * 10**12, "a call that is kept counts once"


async def test_a_batch_stops_at_the_budget_of_the_day(open_engine: OpenEngine) -> None:
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        ann = as_ann(engine, 5)
        items: list[Any] = [{"count": 1, "catches": False} for _ in range(12)]
        batch = await ended(engine, await ann.submit_batch("all", items, BatchOptions(max_workers=4)))
        assert (batch.status, batch.error_type, len(model.requests)) == (RunStatus.FAILED, "cost_limit", 5), batch.error
        assert batch.error is not None
        assert batch.error.endswith(
            "Its caller has spent its max_cost_per_day. Retry it on another day to run the items that are left."
        )
        found = await all_items(engine, batch)
        left = [item for item in found if item.status is RunStatus.CANCELLED]
        assert (len(left), {item.error_type for item in left}) == (7, {"cost_limit"})
        await until_spent(engine, 5)
        with pytest.raises(TooManyRequests):
            await ann.retry_batch(batch.batch_id)
        await as_ann(engine, 50).retry_batch(batch.batch_id)
        batch = await ended(engine, batch)
        assert (batch.status, batch.failed_items, len(model.requests)) == (RunStatus.COMPLETED, 0, 12)


async def test_a_budget_needs_prices(open_engine: OpenEngine, model: FakeModel) -> None:
    async with open_engine(measuring("ollama/x"), transport=model.transport) as engine:
        run = await finish(engine, (await as_ann(engine).submit("measure", {"text": "a"})).run_id)
        assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "cost_limit", 0)
        assert "has no price, so max_cost_per_day cannot hold" in (run.error or "")


async def test_an_admin_retries_a_run_at_the_expense_of_its_owner(open_engine: OpenEngine) -> None:
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        run = await finish(engine, (await as_ann(engine).submit("all", {"count": 3, "catches": False})).run_id)
        await until_spent(engine, 2)
        ops = ScopedEngine(engine, Principal(name="ops", admin=True))
        with pytest.raises(TooManyRequests):
            await ops.retry_run(run.run_id)


async def test_what_a_run_spends_counts_when_it_is_spent(open_engine: OpenEngine, model: FakeModel) -> None:
    """Also while the run waits for a person."""
    from tests.test_costs import asking

    model.replies = [Reply({"length": 1})]
    async with open_engine(asking(), transport=model.transport) as engine:
        run_id = (await as_ann(engine, 0.00005).submit("check", {"text": "a"})).run_id
        run = await waiting(engine, run_id)
        await until_spent(engine, 0.00007)
        with pytest.raises(TooManyRequests):
            await as_ann(engine, 0.00005).submit("check", {"text": "a"})
        await engine.answer_call(run_id, run.waiting_for[0].call_id, json_of(False))
        run = await finish(engine, run_id)
        assert (run.status, run.error_type, len(model.requests)) == (RunStatus.FAILED, "cost_limit", 1)


async def test_a_budget_holds_over_restarts_and_over_processes(tmp_path: Path) -> None:
    model, flock = Crowd(), crowded()
    async with flock.engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        await spend(as_ann(engine), 1)
    async with (
        flock.engine(store=tmp_path / "flock.db", transport=model.transport) as one,
        flock.engine(store=tmp_path / "flock.db", transport=model.transport) as other,
    ):
        await spend(as_ann(one), 1)
        with pytest.raises(TooManyRequests):
            await spend(as_ann(other))
        run = await finish(other, (await ScopedEngine(other, Principal(name="ann")).submit("all", {"count": 1})).run_id)
        assert run.status is RunStatus.COMPLETED
        run_id = (await other.submit("all", {"count": 1, "catches": False}, principal="ann")).run_id
        await as_ann(one, 3.5).check_budget("ann", 3.5)
        assert (await finish(other, run_id)).status is RunStatus.COMPLETED


async def test_requests_of_a_principal_without_a_budget_do_not_read_its_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that gets a budget is read again, and so is one that has lost it."""
    async with crowded().engine() as engine:
        get_account, reads = engine.get_account, list[str]()

        async def read(principal: str) -> Account:
            reads.append(principal)
            return await get_account(principal)

        monkeypatch.setattr(engine, "get_account", read)
        for _ in range(3):
            await engine.check_budget("ann", None)
        assert reads == ["ann"]
        for max_cost in (5, 5, None, None):
            await engine.check_budget("ann", max_cost)
        assert reads == ["ann"] * 4
        assert (await get_account("ann")).max_cost is None


async def test_a_budget_begins_again_with_the_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, flock = Crowd(), crowded()
    tomorrow = now() + timedelta(days=1)
    async with flock.engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        await spend(as_ann(engine), 2)
        with pytest.raises(TooManyRequests):
            await spend(as_ann(engine))
        monkeypatch.setattr("flock.store.queries.now", lambda: tomorrow)
        assert (await spend(as_ann(engine), 2)).status is RunStatus.COMPLETED
        with pytest.raises(TooManyRequests):
            await spend(as_ann(engine))
        wanted = UsageFilter(first_day=now().date(), last_day=tomorrow.date(), principal="ann", by=("day",))
        page = await engine.get_usage(wanted)
    assert [(row.day, row.usage.cost) for row in page.rows] == [(tomorrow.date(), 2), (now().date(), 2)]


async def test_a_call_that_waits_for_the_budget_does_not_wait_for_its_own_run() -> None:
    """What a function has spent outside of calls is written later; it counts at once."""
    account = Account(max_cost=2, picodollars=0)

    async def read() -> Account:
        return account

    budget = DayBudget(A_DOLLAR, read)
    await budget.refresh()
    budget.add(Usage(output_tokens=100, priced_tokens=100, picodollars=10**12))
    with anyio.fail_after(PATIENCE_S):
        async with budget.reserve(MODEL, [], 100):
            budget.check("measure", [MODEL])


@pytest.mark.parametrize(
    "name", ["ann:max_cost_per_day:", "ann:max_cost_per_day:0", "ann:max_cost_per_day:-1", "ann:max_cost_per_day:1e3",
             "ann:max_cost_per_day:nan", "ann:max_cost_per_day:2000000000", "ann:max_cost_per_day:1:max_cost_per_day:2"]
)  # fmt: skip
def test_an_invalid_budget_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(DefinitionError, match="is not a valid name for a key"):
        KeyRing({name: "k" * 16})


@pytest.mark.parametrize("max_cost", [0, -1, float("nan"), float("inf"), "2", True, 10**10])
def test_an_invalid_budget_of_a_principal_is_refused(max_cost: Any) -> None:
    with pytest.raises(ValueError, match="max_cost_per_day of a Principal must be US dollars above 0"):
        Principal(name="ann", max_cost_per_day=max_cost)


def test_a_key_may_have_a_budget_and_be_of_an_admin() -> None:
    keys = KeyRing(read_keys("ann:max_cost_per_day:2.50=" + "a" * 16 + "\nops:admin:max_cost_per_day:7=" + "o" * 16))
    assert keys.find("a" * 16) == Principal(name="ann", max_cost_per_day=2.5)
    assert keys.find("o" * 16) == Principal(name="ops", admin=True, max_cost_per_day=7)


# Usage


def headers_of(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key * 16}"}


@contextlib.asynccontextmanager
async def serving_costs(flock: Flock, model: FakeModel, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    app: FlockAPI = create_app(flock, engine=flock.engine(transport=model.transport), **options)
    async with app.lifespan(), client_of(app) as client:
        yield client


async def test_a_spent_budget_is_a_429_with_the_seconds_until_the_day_ends() -> None:
    model = Crowd()
    async with serving_costs(crowded(), model, api_keys=KEYS) as client:
        body = {"agent_name": "all", "inputs": {"count": 2}}
        headers = headers_of("a") | {"Idempotency-Key": "first"}
        assert (await client.post("/run/flock", json=body, headers=headers)).json()["cost"] == 2
        refused = await client.post("/run/flock", json=body, headers=headers_of("a"))
        check_problem(refused, 429)
        assert 0 < int(refused.headers["Retry-After"]) <= 86_400
        batch = {"agent_name": "all", "batch_inputs": [{"count": 1}]}
        check_problem(await client.post("/run/batch", json=batch, headers=headers_of("a")), 429)
        again = await client.post("/run/flock", json=body, headers=headers)
        assert (again.status_code, again.headers["Idempotency-Replayed"]) == (200, "true")
        report = (await client.get("/usage", headers=headers_of("a"))).json()
        budget = report["budget"]
        assert (budget["max_cost_per_day"], budget["cost"]) == (2, 2)
        assert budget["ends_at"].endswith("T00:00:00Z")
        assert len(model.requests) == 2


async def test_a_host_can_give_its_users_budgets() -> None:
    """By ``auth=``, for each request."""
    model, budgets = Crowd(), {"ann": 1.0}

    async def auth(request: Any) -> Principal:
        name = request.headers["x-user"]
        return Principal(name=name, max_cost_per_day=budgets.get(name))

    async with serving_costs(crowded(), model, auth=auth) as client:

        async def post(user: str) -> httpx.Response:
            body = {"agent_name": "all", "inputs": {"count": 1}}
            return await client.post("/run/flock", json=body, headers={"X-User": user})

        assert [(await post("ann")).status_code, (await post("ann")).status_code] == [200, 429]
        assert [(await post("bob")).status_code, (await post("bob")).status_code] == [200, 200]
        budgets["ann"] = 2.0
        assert [(await post("ann")).status_code, (await post("ann")).status_code] == [200, 429]
    assert len(model.requests) == 4


async def test_usage_is_shown_by_day_agent_and_model_to_whom_it_belongs(model: FakeModel) -> None:
    flock = measuring()

    @flock.agent
    async def twice(text: str, context: RunContext) -> int:
        """Calls another agent, and a model of its own."""
        context.spend(Usage(input_tokens=7, output_tokens=1), "local/llama")
        return int((await context.run_agent("measure", {"text": text}))["length"])

    model.replies = [Reply({"length": 1})] * 4
    async with serving_costs(flock, model, api_keys=KEYS) as client:
        for key, agent in (("a", "measure"), ("a", "twice"), ("b", "measure"), ("o", "measure")):
            body = {"agent_name": agent, "inputs": {"text": "a"}}
            sent = await client.post("/run/flock", json=body, headers=headers_of(key))
            assert sent.json()["status"] == "completed"
            if key == "a":
                assert (
                    await client.delete(f"/run/{sent.json()['run_id']}", headers=headers_of("a"))
                ).status_code == 204

        async def report(key: str, **query: Any) -> Any:
            response = await client.get("/usage", params=query, headers=headers_of(key))
            assert response.status_code == 200, response.text
            return response.json()

        today, tokens = now().date().isoformat(), {"input_tokens": 20, "output_tokens": 10}
        first = (now().date() - timedelta(days=29)).isoformat()
        own = await report("a")
        assert own == {
            "from": first,
            "to": today,
            "entries": [
                {"day": today, "agent_name": "measure", "model": MODEL, "usage": tokens, "cost": 0.00015},
                {
                    "day": today,
                    "agent_name": "twice",
                    "model": "local/llama",
                    "usage": {"input_tokens": 7, "output_tokens": 1},
                },
            ],
            "usage": {"input_tokens": 27, "output_tokens": 11},
            "budget": {"max_cost_per_day": 2, "cost": 0.00015, "ends_at": own["budget"]["ends_at"]},
            "next": None,
        }
        assert "budget" not in await report("b")
        everyone = await report("o", by="principal")
        assert [(each["principal"], each["usage"]["input_tokens"]) for each in everyone["entries"]] == [
            ("ann", 27),
            ("bob", 10),
            ("ops", 10),
        ]
        of_ann = await report("o", principal="ann")
        assert (of_ann["entries"], of_ann["budget"]) == (own["entries"], own["budget"])
        assert (await report("a", principal="ann"))["entries"] == own["entries"]
        check_problem(await client.get("/usage?principal=bob", headers=headers_of("a")), 403)
        assert (await report("a", to="2020-01-01"))["entries"] == []
        assert (await report("a", to="2020-01-01"))["usage"] is None
        assert (await report("a", by="", **{"from": today}))["entries"] == [{"usage": own["usage"]}]

        pages, path = list[Any](), f"/usage?by=principal,agent_name,day,model&limit=1&to={today}"
        while path:
            page = (await client.get(path, headers=headers_of("o"))).json()
            pages.append([(each["principal"], each["agent_name"]) for each in page["entries"]])
            assert page["usage"] == {"input_tokens": 47, "output_tokens": 21}
            path = page["next"]
        assert pages == [[("ann", "measure")], [("ann", "twice")], [("bob", "measure")], [("ops", "measure")]]
        for invalid in (
            "by=day,day", "by=cost", "from=2026-02-30", "from=x", "from=2026-02-02&to=2026-02-01", "limit=0",
            "from=2020-01-01&to=2026-01-01", "after=x", "after=[]", 'after=["x","a","b"]', "after=[1,2,3]", "other=1",
        ):  # fmt: skip
            check_problem(await client.get(f"/usage?{invalid}", headers=headers_of("a")), 422)


async def test_usage_without_keys_is_that_of_everyone(model: FakeModel) -> None:
    model.replies = [Reply({"length": 1})]
    async with serving_costs(measuring(), model, auth="host") as client:
        await client.post("/run/flock", json={"agent_name": "measure", "inputs": {"text": "a"}})
        report = await get(client, "/usage", by="principal,model")
    assert [(each["principal"], each["model"]) for each in report["entries"]] == [(None, MODEL)]
    assert "budget" not in report


async def test_usage_is_what_runs_have_spent(open_engine: OpenEngine) -> None:
    """Also after failures and retries, of runs and of items, to the token."""
    provider = Provider()
    async with open_engine(measuring(), transport=provider.transport) as engine:
        ann = as_ann(engine, None)
        for text in ("fail", "abc", "fail"):
            run = await finish(ann, (await ann.submit("measure", {"text": text})).run_id)
            if run.status is RunStatus.FAILED:
                await ann.retry_run(run.run_id)
                await finish(ann, run.run_id)
        batch = await ended(engine, await ann.submit_batch("measure", texts(30), BatchOptions(max_workers=5)))
        if batch.failed_items:
            provider.heals = True
            await ann.retry_batch(batch.batch_id)
            await ended(engine, batch)
        await until_spent(engine, provider.total().picodollars / 10**12)
        rows = await usage_of(engine)
    assert [(row.agent_name, row.model) for row in rows] == [("measure", MODEL)]
    assert rows[0].usage == provider.total()


def test_a_page_of_usage_holds_what_it_shows() -> None:
    """Its sums are those of all rows, in whatever order they come."""
    days = [date(2026, 1, n) for n in range(1, 21)]
    rows = [
        UsageRow(day=day, principal=f"p{n}", agent_name=f"a{n % 3}", model="m", usage=Usage(input_tokens=n + 1))
        for day, n in itertools.product(days, range(12))
    ]
    random.Random(1).shuffle(rows)
    for by in [("day",), ("principal",), ("agent_name",), ("day", "agent_name"), ("day", "principal"), ()]:
        expected: dict[Any, int] = {}
        for row in rows:
            key = tuple(getattr(row, name) for name in by)
            expected[key] = expected.get(key, 0) + row.usage.input_tokens
        found, after, seen_days = dict[Any, int](), None, list[Any]()
        while True:
            wanted = UsageFilter(first_day=days[0], last_day=days[-1], by=by, limit=7, after=after)
            sums = UsageSums(wanted)
            for row in rows:
                sums.add([row])
                assert len(sums._sums) <= 4 * 7 + 1
            page = sums.page
            assert page.total == sum((row.usage for row in rows), Usage())
            for row in page.rows:
                found[tuple(getattr(row, name) for name in by)] = row.usage.input_tokens
                seen_days.append(row.day)
            if not page.has_more:
                break
            after = page.rows[-1]
        assert found == expected
        assert "day" not in by or seen_days == sorted(seen_days, reverse=True)


async def test_reports_of_usage_read_no_runs_and_little_else(tmp_path: Path, model: FakeModel) -> None:
    """A year of 50 principals: that of one is read by its days, and that of all a day at a time."""
    flock = measuring()
    async with flock.engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        store, today = sqlite_of(engine), now().date().toordinal()
        rows = [
            (flock.name, today - day, f"p{n}", "measure", MODEL, 1, 1, 0, 0, 0, 10**6, 2)
            for day, n in itertools.product(range(366), range(50))
        ]
        with contextlib.closing(sqlite3.connect(store.path)) as db:
            db.executemany(f"INSERT INTO usage VALUES ({', '.join('?' * 12)})", rows)
            db.commit()
        statements = list[str]()
        store._reader.set_trace_callback(statements.append)
        year = UsageFilter(first_day=date.fromordinal(today - 365), last_day=date.fromordinal(today), by=("day",))
        page = await engine.get_usage(msgspec.structs.replace(year, principal="p7", limit=366))
        assert (len(page.rows), page.total.input_tokens) == (366, 366)
        first = next(text for text in statements if "usage" in text)
        page = await engine.get_usage(msgspec.structs.replace(year, by=("principal",), limit=100))
        assert (len(page.rows), page.total.input_tokens, page.has_more) == (50, 366 * 50, False)
        store._reader.set_trace_callback(None)
        assert not [text for text in statements if "FROM usage" in text and " runs" in text]
        plan = store.read(lambda db: db.execute(f"EXPLAIN QUERY PLAN {first}").fetchall())
        assert "day=? AND principal=?" in str(plan)
        await store.delete_old_usage(flock.name, date.fromordinal(today - 100))
        assert (await engine.get_usage(msgspec.structs.replace(year, principal="p7"))).total.input_tokens == 101


@pytest.mark.cluster  # it needs no server, but the package
async def test_a_report_that_a_worker_sends_again_counts_once() -> None:
    messages = pytest.importorskip("flock.temporal.messages")
    from flock.temporal.workflows import FlockAccount

    account, today = FlockAccount(messages.AccountState(principal="ann")), now().date().toordinal()
    spent = (Spent("measure", MODEL, Usage(input_tokens=1, picodollars=5, priced_tokens=1)),)
    for worker, number, day in (
        ("a", 1, today),
        ("b", 1, today),
        ("a", 1, today),
        ("a", 3, today - 1),
        ("a", 2, today),
    ):
        account.spent(messages.SpentReport(worker=worker, number=number, day=day, spent=spent))
    account.set_budget(2)
    assert account.account(today) == Account(max_cost=2, picodollars=10)
    rows = account.usage(today - 1, today)
    assert [(row.day, row.principal, row.usage.input_tokens) for row in rows] == [
        (date.fromordinal(today), "ann", 2),
        (date.fromordinal(today - 1), "ann", 1),
    ]
    assert account.usage(today - 3, today - 2) == []


async def test_a_principal_without_a_budget_costs_no_request_to_the_cluster(
    temporal_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one, the first, because it may have had a budget before."""
    flock, described = Flock("plain"), list[str]()

    @flock.agent
    async def work() -> str:
        return "done"

    async with on_temporal(temporal_address, flock) as engine:
        cluster: Any = getattr(engine, "cluster")  # noqa: B009
        describe = cluster.describe

        async def noted(workflow_id: str, *args: Any) -> Any:
            described.append(workflow_id.split(":")[0])
            return await describe(workflow_id, *args)

        monkeypatch.setattr(cluster, "describe", noted)
        for number in range(3):
            scoped = ScopedEngine(engine, Principal(name="ann"))
            await engine.wait((await scoped.submit("work", {}, key=IdempotencyKey(f"{number}", b"same"))).run_id)
            await engine.wait((await scoped.submit("work", {})).run_id)
    assert described.count("account") == 1


@pytest.mark.cluster
async def test_reports_are_sent_in_order_even_if_a_step_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the account would ignore one that arrives later."""
    accounts_module = pytest.importorskip("flock.temporal.accounts")
    sent, may_arrive = list[Any](), anyio.Event()

    async def signal_account(cluster: Any, flock: str, principal: str, signal: str, report: Any) -> None:
        await may_arrive.wait()
        sent.append((report.number, report.spent[0].usage.input_tokens))

    class Cluster:
        async def answered(self, ask: Any) -> Any:
            return await ask()

    monkeypatch.setattr(accounts_module, "signal_account", signal_account)
    account = accounts_module.Accounts(Cluster(), "flock", A_DOLLAR).of("ann")
    account.spend("measure", Usage(input_tokens=1), MODEL)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(account.flush)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    account.spend("measure", Usage(input_tokens=2), MODEL)
    account.spend("measure", Usage(input_tokens=4), MODEL)
    may_arrive.set()
    await account.flush()
    assert sent == [(1, 1), (2, 6)]


async def test_the_command_prints_a_key_with_a_budget() -> None:
    made = await anyio.run_process(flockapi_command("key", "--name", "ann", "--max-cost-per-day", "2.5"))
    name, _, key = made.stdout.decode().strip().partition("=")
    assert name == "ann:max_cost_per_day:2.5"
    assert KeyRing({name: key}).find(key) == Principal(name="ann", max_cost_per_day=2.5)
    refused = await anyio.run_process(flockapi_command("key", "--max-cost-per-day", "2.5"), check=False)
    assert b"Add --name NAME." in refused.stderr


@pytest.mark.slow
async def test_usage_counts_a_committed_call_once_over_kills(tmp_path: Path) -> None:
    """What is committed when a process is killed, is counted, and what its successor repeats is counted again."""
    provider, path = Provider(), tmp_path / "flock.db"
    provider.delay_s = 0.02
    (tmp_path / "served.py").write_text(SERVED)
    command = flockapi_command("serve", str(tmp_path / "served.py"), "--port", "0", "--store", str(path))
    keys = {"FLOCK_API_KEYS": f"ann={'a' * 16}"}
    with provider.serve() as url:
        env = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "k", **keys}
        for _ in range(3):
            with running(*command, **env) as server:
                headers = headers_of("a")
                async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
                    body = {"agent_name": "measure", "batch_inputs": texts(60), "max_workers": 8}
                    await client.post("/run/batch", json=body)
                    seen = len(provider.counted)
                    with anyio.fail_after(PATIENCE_S):
                        while len(provider.counted) < seen + 25:  # noqa: ASYNC110
                            await anyio.sleep(0.01)
                os.killpg(server.process.pid, signal.SIGKILL)
                server.process.wait()
        with running(*command, **env) as server:
            async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
                total = Usage()
                for batch in (await get(client, "/batches"))["batches"]:
                    with anyio.fail_after(PATIENCE_S):
                        while (ended := await get(client, f"/batch/{batch['batch_id']}", results=False))[  # noqa: ASYNC110
                            "status"
                        ] in ("starting", "running"):
                            await anyio.sleep(0.05)
                    total += Usage(**ended["usage"])
                report = await get(client, "/usage")
    assert report["usage"]["input_tokens"] == total.input_tokens
    assert report["usage"]["output_tokens"] == total.output_tokens
    assert total.input_tokens > 0


async def test_calls_without_a_budget_reserve_nothing() -> None:
    """Also those of models without a price, which would reserve everything."""
    account = Account()

    async def read() -> Account:
        return account

    budget = DayBudget(A_DOLLAR, read)
    with anyio.fail_after(PATIENCE_S):
        async with budget.reserve("ollama/x", [], None), budget.reserve("ollama/x", [], None):
            account = Account(max_cost=2)
            async with budget.reserve(MODEL, [], 100):
                assert budget._reserved == 10**12
            assert budget._reserved == 0


async def test_a_spent_budget_is_429_over_http_with_any_engine(open_engine: OpenEngine) -> None:
    model = Crowd()
    async with open_engine(crowded(), transport=model.transport) as engine:
        opened: Any = Opened(engine)
        app = create_app(crowded(), engine=opened, api_keys=KEYS)
        async with app.lifespan(), client_of(app, headers_of("a")) as client:
            body = {"agent_name": "all", "inputs": {"count": 2}}
            assert (await client.post("/run/flock", json=body)).json()["cost"] == 2
            await until_spent(engine, 2)
            batch = {"agent_name": "all", "batch_inputs": [{"count": 1}]}
            for path, sent in (
                ("/run/flock", body),
                ("/run/flock", {**body, "async_run": True}),
                ("/run/batch", batch),
            ):
                refused = await client.post(path, json=sent)
                check_problem(refused, 429)
                assert 0 < int(refused.headers["Retry-After"]) <= 86_400

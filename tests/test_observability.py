"""What an operator sees: traces, logs, readiness, metrics."""

import contextlib
import io
import json
import logging
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flock import __version__
from flock.core import Flock
from flock.errors import AgentError, DefinitionError
from flock.logs import MAX_WAITING_BYTES, JSONFormatter, LineHandler
from flock.runs import Batch, BatchOptions, Engine, Observer, Run, RunContext, RunStatus, new_id, now
from flock.store import statements
from flock.store.migrations import MIGRATIONS
from flock.store.store import SQLiteStore
from flock.testing import Failure, FakeModel, Reply
from flock.web.metrics import OF_QUEUE, Metrics
from flockapi import create_app
from tests.support import PATIENCE_S, ROOT
from tests.support.cluster import patient
from tests.support.http import client_of, wait_for, wait_until
from tests.support.servers import Served, flockapi_command, running

pytestmark = pytest.mark.anyio

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# Traces


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_trace_is_stored_with_the_run_and_sent_with_model_calls(
    is_async: bool, client: httpx.AsyncClient, model: FakeModel
) -> None:
    model.replies = [Reply("no JSON"), Reply({"sentiment": "good", "keywords": []})]
    body = {"agent_name": "text_analyzer", "inputs": {"text": "hi"}, "async_run": is_async}
    run = (await client.post("/run/flock", json=body, headers={"traceparent": TRACEPARENT})).json()
    run = (await client.get(f"/run/{run['run_id']}?wait=60")).json()
    assert (run["status"], run["traceparent"]) == ("completed", TRACEPARENT)
    assert [request.headers["traceparent"] for request in model.requests] == [TRACEPARENT] * 2


async def test_a_trace_reaches_functions_and_batch_items(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def tell(context: RunContext) -> str | None:
        return context.traceparent

    body = {"agent_name": "tell", "batch_inputs": [{}, {}], "max_workers": 1}
    batch = (await client.post("/run/batch", json=body, headers={"traceparent": TRACEPARENT})).json()
    got = await wait_for(client, f"/batch/{batch['batch_id']}")
    assert got["results"] == [{"result": TRACEPARENT}] * 2


@pytest.mark.parametrize(
    ("sent", "stored"),
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
async def test_an_invalid_trace_is_ignored(sent: str, stored: str | None, client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1}}
    run = (await client.post("/run/flock", json=body, headers={"traceparent": sent})).json()
    assert run["traceparent"] == stored


async def test_duplicate_traces_are_ignored_and_not_sent_to_the_model(
    client: httpx.AsyncClient, model: FakeModel
) -> None:
    model.replies = [Reply({"sentiment": "good", "keywords": []})]
    headers = [("traceparent", TRACEPARENT)] * 2
    body = {"agent_name": "text_analyzer", "inputs": {"text": "hi"}}
    assert (await client.post("/run/flock", json=body, headers=headers)).json()["traceparent"] is None
    assert "traceparent" not in model.requests[0].headers


async def test_a_trace_passed_to_submit_is_validated(flock: Flock) -> None:
    async with flock.engine() as engine:
        for sent, stored in (("garbage", None), ("", None), (TRACEPARENT, TRACEPARENT)):
            run = await engine.submit("add", {"a": 1}, traceparent=sent)
            assert (await engine.wait(run.run_id)).traceparent == stored


async def test_a_store_from_before_traces_is_migrated(flock: Flock, tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in MIGRATIONS[0]:
            db.execute(statement)
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


# Readiness


async def test_readiness_reports_the_state_of_engine_and_store(flock: Flock, tmp_path: Path) -> None:
    engine = flock.engine(store=tmp_path / "flock.db")
    app = create_app(flock, engine=engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        async with app.lifespan():
            assert (await client.get("/readyz")).json() == {"status": "ok", "engine": "running", "store": "ok"}
            await engine.drain(0)
            leaving = (await client.get("/readyz")).json()
            assert (leaving["status"], leaving["engine"], leaving["store"]) == (503, "stopping", "ok")
        assert engine.health().engine == "stopped"
        assert (await client.get("/healthz")).json() == {"status": "ok"}
    unusable = create_app(flock, store=tmp_path / "nowhere" / "flock.db")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(unusable), base_url="http://t") as client:
        answer = await client.get("/readyz")
        assert (answer.json()["engine"], answer.json()["store"]) == ("stopped", "failing")
        assert int(answer.headers["Retry-After"]) >= 1


# Logs


def served_with(tmp_path: Path, *options: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), *options)


SCRIPT = """
import time
from flock.core import Flock

flock = Flock("seen")

@flock.agent
def double(number: int) -> int:
    return number + number

@flock.agent
def explode() -> str:
    raise ValueError("two\\nlines")

@flock.agent
async def nap() -> str:
    import anyio
    await anyio.sleep(600)
"""


def test_the_log_can_be_json_lines(tmp_path: Path) -> None:
    headers = {"traceparent": TRACEPARENT, "X-Request-ID": "asked"}
    with running(*served_with(tmp_path, "--log-json", "--access-log")) as server:
        done = httpx.post(
            f"{server.url}/run/flock", json={"agent_name": "double", "inputs": {"number": 1}}, headers=headers
        ).json()
        httpx.post(f"{server.url}/run/flock", json={"agent_name": "explode"})
        server.wait_for_line('"status":"failed"')
        server.stop()
    lines = [json.loads(line) for line in server.lines]
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (of_run,) = [line for line in lines if line.get("status") == "completed"]
    assert of_run["logger"] == "flock.runs"
    assert {name: of_run[name] for name in ("run_id", "agent_name", "request_id", "trace_id", "attempt")} == {
        "run_id": done["run_id"],
        "agent_name": "double",
        "request_id": "asked",
        "trace_id": TRACEPARENT[3:35],
        "attempt": 1,
    }
    assert of_run["duration_ms"] >= 0
    (failure,) = [line for line in lines if "exception" in line]
    assert failure["agent_name"] == "explode"
    assert "ValueError: two\nlines" in failure["exception"]
    assert any(line["logger"] == "uvicorn.access" and "POST /run/flock" in line["message"] for line in lines)


def test_a_record_with_a_lone_surrogate_is_logged() -> None:
    record = logging.makeLogRecord({"msg": "bad %s", "args": ("\ud800",), "levelname": "INFO"})
    assert json.loads(JSONFormatter().format(record))["message"] == "bad ?"


def logged(**extra: Any) -> dict[str, Any]:
    """Log a record with *extra*, and return its line."""
    handler = logging.StreamHandler(stream := io.StringIO())
    handler.setFormatter(JSONFormatter())
    log = logging.Logger("host")
    log.addHandler(handler)
    log.warning("sold %d", 3, extra=extra)
    (text,) = stream.getvalue().splitlines()
    line: dict[str, Any] = json.loads(text)
    return line


def test_the_extra_members_of_a_hosts_log_are_kept() -> None:
    line = logged(order_id=7, tags=["a", "b"], customer={"name": "Ann"}, none=None, run_id="r", batch_id=None)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "WARNING",
        "logger": "host",
        "message": "sold 3",
        "order_id": 7,
        "tags": ["a", "b"],
        "customer": {"name": "Ann"},
        "none": None,
        "run_id": "r",
    }


def test_an_extra_member_does_not_replace_a_field_of_the_log() -> None:
    line = logged(time="then", level="LOW", logger="mine", exception="none", order_id=7)
    assert (line["level"], line["logger"], line["message"], line["order_id"]) == ("WARNING", "host", "sold 3", 7)
    assert line["time"] != "then"


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


def test_extra_members_that_are_not_json_are_logged_as_text() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    line = logged(
        path=Path("a/b"),
        nested={"error": ValueError("bad")},
        keys={(1, 2): 3},
        cycle=cycle,
        surrogate="\ud800",
        huge=2**70,
        nan=float("nan"),
        unprintable=Unprintable(),
        deep_unprintable=[Unprintable()],
        **{"na\ud800me": 1},
    )
    assert line["path"] == "a/b"
    assert line["nested"] == {"error": "bad"}
    assert line["keys"] == {"(1, 2)": 3}
    assert line["cycle"] == "[[...]]"
    assert line["surrogate"] == "?"
    assert line["huge"] in (2**70, str(2**70))
    assert line["nan"] is None
    assert line["unprintable"] == "(Unprintable)"
    assert line["deep_unprintable"] == "(list)"
    assert line["na?me"] == 1


# Metrics


def values_in(page: str) -> dict[str, float]:
    """Return the value of every sample by its name and label values."""
    samples = (sample for family in text_string_to_metric_families(page) for sample in family.samples)
    return {
        sample.name + "".join(f" {value}" for _, value in sorted(sample.labels.items())): sample.value
        for sample in samples
    }


async def metrics_of(client: httpx.AsyncClient) -> dict[str, float]:
    response = await client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain; version=")
    return values_in(response.text)


def test_a_log_that_nobody_reads_stops_no_server_and_the_lost_lines_are_counted() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as writer:
        handler = LineHandler(writer)
        total = 3 * MAX_WAITING_BYTES // 100
        for number in range(total):
            handler.emit(logging.makeLogRecord({"msg": f"{number:99d}"}))  # outside of an event loop, at once

        os.set_blocking(reading, False)
        read = b""
        while more := reader.read():
            read += more
            handler.flush()
    *lines, note = read.decode().splitlines()
    assert [int(line) for line in lines] == list(range(len(lines))), "whole lines, in order"
    assert MAX_WAITING_BYTES // 100 <= len(lines) < total
    assert note == f"{total - len(lines)} lines were dropped here, because the log was not read for a while."


def test_a_server_answers_1000_runs_while_nobody_reads_its_log(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    command = flockapi_command("serve", "noisy.py", "--port", "0", "--store", ":memory:")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            (url,) = next(found for line in process.stdout if (found := re.findall(r"running on (http://\S+)", line)))
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
                for number in range(1000):  # their lines are 2 MB
                    body = {"agent_name": "note", "inputs": {"number": number}}
                    run = client.post("/run/flock", json=body).json()
                    assert (run["status"], run["result"]) == ("completed", {"result": number})
            (dropped,) = next(found for line in process.stdout if (found := re.findall(r"(\d+) lines were dr", line)))
            assert 0 < int(dropped) < 1000
        finally:
            process.kill()


NOISY = """
import logging
from flock.core import Flock

flock = Flock("noisy")

@flock.agent
async def note(number: int) -> int:
    logging.getLogger("flock.noisy").info("x" * 2000)
    return number
"""


async def test_the_lines_of_one_turn_of_the_event_loop_are_written_together() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as writer:
        os.set_blocking(reading, False)
        handler = LineHandler(writer)
        for text in ("first", "second"):
            handler.emit(logging.makeLogRecord({"msg": text}))
        assert reader.read() is None

        await anyio.lowlevel.checkpoint()
        assert reader.read() == b"first\nsecond\n"

        os.set_blocking(writing, False)
        while True:
            try:
                os.write(writing, b"x" * 4096)
            except BlockingIOError:
                break
        handler.emit(logging.makeLogRecord({"msg": "third"}))
        await anyio.lowlevel.checkpoint()
        assert b"third" not in (reader.read() or b""), "the pipe was full"
        with anyio.fail_after(PATIENCE_S):
            await anyio.wait_readable(reading)  # without another line
        assert reader.read() == b"third\n"


def test_a_log_whose_reader_has_gone_is_dropped() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as writer:
        os.close(reading)
        handler = LineHandler(writer)
        handler.emit(logging.makeLogRecord({"msg": "lost"}))
        handler.flush()


def test_a_log_without_a_file_descriptor_is_written() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.emit(logging.makeLogRecord({"msg": "kept"}))
    assert stream.getvalue() == "kept\n"


async def test_metrics_count_runs_steps_tokens_retries_and_requests(
    flock: Flock, client: httpx.AsyncClient, model: FakeModel
) -> None:
    failures = iter([True, False])

    @flock.agent
    def sometimes() -> str:
        if next(failures):
            raise ValueError
        return "now"

    model.replies = [
        Failure(429, headers={"retry-after-ms": "1"}),
        Reply({"sentiment": "good", "keywords": []}),
        Reply({"sentiment": "good", "keywords": []}),
    ]
    for agent_name, inputs in (("add", {"a": 1}), ("add", {"a": 2}), ("refuse", {"text": ""}), ("sometimes", {})):
        failed = (await client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs})).json()
    await client.post(f"/run/{failed['run_id']}/retry")
    await wait_for(client, f"/run/{failed['run_id']}")
    body = {"agent_name": "text_analyzer", "batch_inputs": [{"text": "a"}, {"text": "b"}]}
    await wait_for(client, f"/batch/{(await client.post('/run/batch', json=body)).json()['batch_id']}")
    assert (await client.get("/runs/nothing/here")).status_code == 404
    await client.request("BREW", "/agents")

    seen = await metrics_of(client)
    assert seen["flock_runs_total add completed"] == 2
    assert seen["flock_runs_total refuse failed"] == 1
    assert seen["flock_runs_total sometimes failed"] == seen["flock_runs_total sometimes completed"] == 1
    assert seen["flock_runs_total text_analyzer completed"] == 2
    assert seen["flock_run_duration_seconds_count add"] == seen["flock_step_duration_seconds_count add"] == 2
    assert seen["flock_run_duration_seconds_count refuse"] == 1
    assert "flock_step_duration_seconds_count refuse" not in seen
    assert seen["flock_tokens_total text_analyzer input"] == 20
    assert seen["flock_tokens_total text_analyzer output"] == 10
    assert (seen["flock_retries_total run"], seen["flock_retries_total model_call"]) == (1, 1)
    assert (seen["flock_queued_runs"], seen["flock_oldest_queued_run_age_seconds"]) == (0, 0)
    assert seen["flock_waiting_runs"] == 0
    requests = "http_server_request_duration_seconds_count"
    assert seen[f"{requests} POST 200 /run/flock"] == 4
    assert seen[f"{requests} POST 202 /run/batch"] == 1
    assert seen[f"{requests} GET 404 "] == 1
    assert seen[f"{requests} _OTHER 405 /agents"] == 1


@pytest.mark.parametrize("kind", ["meter provider", "registry"])
async def test_the_host_reads_the_same_metrics(kind: str, flock: Flock, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of the queue, which need the store. With the real SDK, and with a registry of Prometheus."""
    reader, registry = InMemoryMetricReader(), CollectorRegistry(auto_describe=True)
    if kind == "meter provider":
        provider = MeterProvider([reader], shutdown_on_exit=False)
        monkeypatch.setattr("opentelemetry.metrics._internal._METER_PROVIDER", provider)
    app = create_app(flock, store=":memory:", auth="host")
    if kind == "registry":
        assert app.metrics is not None
        registry.register(app.metrics)
    async with app.lifespan(), client_of(app) as client:
        for a in (1, 2):
            await client.post("/run/flock", json={"agent_name": "add", "inputs": {"a": a}})
        await client.post("/run/flock", json={"agent_name": "refuse", "inputs": {"text": ""}})
        if kind == "registry":
            found = values_in(generate_latest(registry).decode())
        else:
            (scope,) = reader.get_metrics_data().resource_metrics[0].scope_metrics  # type: ignore[union-attr]
            assert (scope.scope.name, scope.scope.version) == ("flockapi", __version__)
            points: Any = [(metric.name, point) for metric in scope.metrics for point in metric.data.data_points]
            found = {
                " ".join([name, *(str(value) for _, value in sorted(point.attributes.items()))]): point.value
                for name, point in points
            }
        seen = await metrics_of(client)
    assert found["flock_runs_total add completed"] == 2
    assert found["flock_run_duration_seconds_count add"] == 2
    queue = {name for name, *_ in OF_QUEUE.values()}
    wanted = {name: value for name, value in seen.items() if "_created" not in name and name.split()[0] not in queue}
    assert {name: value for name, value in found.items() if "_created" not in name} == wanted


async def test_metrics_report_queued_runs_and_open_event_streams(tmp_path: Path) -> None:
    flock = Flock("busy")

    @flock.agent(max_concurrency=1)
    async def nap() -> None:
        await anyio.sleep(600)

    app = create_app(flock, store=tmp_path / "flock.db")
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url) as client:
        run_ids = [
            (await client.post("/run/flock", json={"agent_name": "nap", "async_run": True})).json()["run_id"]
            for _ in range(3)
        ]
        await wait_until(client, "/runs?status=running", lambda body: len(body["runs"]) == 1)
        async with client.stream("GET", f"/run/{run_ids[0]}/events") as stream:
            await anext(stream.aiter_lines())
            seen = await metrics_of(client)
        assert (seen["flock_event_streams"], seen["flock_queued_runs"]) == (1, 2)
        assert 0 < seen["flock_oldest_queued_run_age_seconds"] < 30
        with anyio.fail_after(PATIENCE_S):
            while (await metrics_of(client))["flock_event_streams"]:  # noqa: ASYNC110 - HTTP has no event here
                await anyio.sleep(0.01)


async def test_metrics_report_the_backlog_of_questions_webhooks_and_agents(tmp_path: Path) -> None:
    """Two runs ask, an item asks, and the receiver of the webhooks is down."""
    flock = asking_flock()

    @flock.agent(max_concurrency=1)
    async def nap() -> None:
        await anyio.sleep(600)

    flock.webhook_url = "http://127.0.0.1:9/"  # no server listens there
    secrets = ["whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]
    app = create_app(flock, store=tmp_path / "flock.db", auth="anybody", webhook_secrets=secrets)
    async with app.lifespan(), client_of(app) as client:
        before = await metrics_of(client)
        for _ in range(2):
            await client.post("/run/flock", json={"agent_name": "ask"})
        batch = (await client.post("/run/batch", json={"agent_name": "ask", "batch_inputs": [{}]})).json()
        await wait_until(client, f"/batch/{batch['batch_id']}", lambda got: got["waiting_items"] == 1)
        for _ in range(3):
            await client.post("/run/flock", json={"agent_name": "nap", "async_run": True})
        await wait_until(client, "/runs?status=running", lambda body: len(body["runs"]) == 1)
        seen = await metrics_of(client)
    of_agent = "flock_queued_runs_of_agent"
    names = ["flock_open_questions", "flock_pending_webhooks", f"{of_agent} nap", f"{of_agent} ask"]
    ages = [f"flock_oldest_{of}_age_seconds" for of in ("open_question", "pending_webhook")]
    assert [before[name] for name in (*names, *ages)] == [0] * 6
    assert [seen[name] for name in names] == [3, 2, 2, 0]
    assert all(0 < seen[age] < 300 for age in ages), [seen[age] for age in ages]


async def test_a_backlog_is_counted_from_indexes_and_only_up_to_100_000(tmp_path: Path) -> None:
    """So a scrape of a large store does not hold the event loop."""
    async with SQLiteStore(tmp_path / "flock.db") as store:
        query, values = statements.BACKLOG, {"flock": "f"}
        plan = store.read(lambda db: db.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall())
        lines = [row[3] for row in plan]
        assert not any("B-TREE" in line or line.startswith("SCAN questions") for line in lines), lines
        assert sum("USING COVERING INDEX" in line for line in lines) == 2, lines
        assert (query.count(f"LIMIT {statements.MAX_COUNT}"), statements.MAX_COUNT) == (2, 100_000)
        assert f"LIMIT {statements.MAX_COUNT}" in statements.COUNT_ASKING
        few = query.replace(str(statements.MAX_COUNT), "2")

        def fill(db: sqlite3.Connection) -> None:
            webhook = "INSERT INTO webhooks (flock, type, record_id, agent_name, attempt, created_at, next_try_at)"
            db.executemany(f"{webhook} VALUES ('f', 'run.completed', ?, 'a', 1, ?, 0)", [("r", at) for at in (7, 8, 9)])

        await store.change(fill)
        assert store.read(lambda db: db.execute(few, values).fetchone()) == (0, None, 2, 7)


async def test_a_run_interrupted_by_a_crash_is_counted_by_the_next_server(flock: Flock, tmp_path: Path) -> None:
    """An agent that no longer exists gets no label of its own."""
    async with SQLiteStore(tmp_path / "flock.db") as store:
        await store.register_engine("gone", "sample", ())
        old = Run(run_id="1", flock="sample", agent_name="left", inputs=msgspec.Raw(b"{}"), created_at=now())
        await store.save(msgspec.structs.replace(old, owner="gone"), is_new=True)
        await store.unregister_engine("gone")
    app = create_app(flock, store=tmp_path / "flock.db")
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        assert (await client.get("/run/1")).json()["error_type"] == "interrupted"
        assert (await metrics_of(client))["flock_runs_total _OTHER failed"] == 1


async def test_tokens_of_unusable_answers_are_counted(client: httpx.AsyncClient, model: FakeModel) -> None:
    model.replies = [Reply("no JSON")] * 3
    body = {"agent_name": "text_analyzer", "inputs": {"text": "hi"}}
    assert (await client.post("/run/flock", json=body)).json()["error_type"] == "invalid_output"
    assert (await metrics_of(client))["flock_tokens_total text_analyzer input"] == 30


async def test_apps_on_one_engine_count_each_run_once(flock: Flock) -> None:
    apps = [create_app(flock, store=":memory:") for _ in range(50)]
    body = {"agent_name": "add", "inputs": {"a": 1}}
    for app in apps[:2]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            await client.post("/run/flock", json=body)
            seen = await metrics_of(client)
    assert seen["flock_runs_total add completed"] == 2
    assert seen["http_server_request_duration_seconds_count POST 200 /run/flock"] == 2


async def test_a_route_is_labelled_by_its_template_even_if_middleware_copies_the_scope(flock: Flock) -> None:
    async def hello(request: Request) -> Response:
        return Response()

    def copying(app: ASGIApp) -> ASGIApp:
        async def copy(scope: Scope, receive: Receive, send: Send) -> None:
            await app({**scope}, receive, send)

        return copy

    app = create_app(
        flock,
        store=":memory:",
        routes=[Route("/one/{x}", hello), Route("/two/{y}", hello), Route("/one/{of_post}", hello, methods=["POST"])],
        middleware=[Middleware(copying)],
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for path in ("/one/1", "/two/2", "/two/3", "/static/docs.js"):
            await client.get(path)
        await client.post("/one/1")
        seen = await metrics_of(client)
    assert seen["http_server_request_duration_seconds_count POST 200 /one/{of_post}"] == 1, (
        "the label is the route that answered"
    )
    requests = "http_server_request_duration_seconds_count GET 200"
    assert (seen[f"{requests} /one/{{x}}"], seen[f"{requests} /two/{{y}}"], seen[f"{requests} /static"]) == (1, 2, 1)


TWO_APPS = """
import asyncio, httpx
from flock.core import Flock
from flockapi import create_app

async def main():
    for name in ("one", "two"):
        flock = Flock(name)
        flock.agent(name="same")(give)
        app = create_app(flock, store=":memory:")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            for _ in range(3):
                await client.post("/run/flock", json={"agent_name": "same"})
            print((await client.get("/metrics")).text)

def give() -> int:
    return 1

asyncio.run(main())
"""


@pytest.mark.slow
def test_two_apps_in_one_multiprocess_folder_share_their_counters(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TWO_APPS], env=env, capture_output=True, text=True, check=True)
    assert re.findall(r'flock_runs_total{agent_name="same",status="completed"} (\S+)', done.stdout) == ["3.0", "6.0"]
    env["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "nowhere")
    done = subprocess.run([sys.executable, "-c", TWO_APPS], env=env, capture_output=True, text=True, check=False)
    assert "DefinitionError: The folder in PROMETHEUS_MULTIPROC_DIR cannot be used" in done.stderr


async def test_metrics_are_available_if_the_engine_cannot_start(flock: Flock, tmp_path: Path) -> None:
    app = create_app(flock, store=tmp_path / "nowhere" / "flock.db")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        await client.get("/runs")
        seen = await metrics_of(client)
    assert seen["http_server_request_duration_seconds_count GET 503 /runs"] == 1
    assert math.isnan(seen["flock_queued_runs"])


async def test_metrics_can_be_disabled_and_need_prometheus_client(
    flock: Flock, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(flock, store=":memory:", metrics=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        await client.post("/run/flock", json={"agent_name": "add", "inputs": {"a": 1}})
        problem = (await client.get("/metrics")).json()
    assert problem["status"] == 404
    assert re.search(r"pip install 'prometheus-client>=[\d.]+'$", problem["detail"])
    monkeypatch.delitem(sys.modules, "flock.web.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # as if it is not installed
    with pytest.raises(DefinitionError, match=r"pip install 'prometheus-client>=[\d.]+'$"):
        create_app(flock, store=":memory:", metrics=True)


async def test_a_failing_observer_does_not_affect_runs(flock: Flock, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Metrics):
        def run_ended(self, run: Run) -> None:
            raise ValueError("no space left")

    async with flock.engine() as engine:
        engine.observe(Broken([]))
        run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
    assert run.status == "completed"
    assert "an observer raised in run_ended" in caplog.text


class Noted(Observer):
    """Notes the names of the events of batches and of runs, with the status and the attempt of each record."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []

    def run_started(self, run: Run) -> None:
        self.events.append(("run_started", run.status, run.attempt))

    def run_waiting(self, run: Run) -> None:
        assert [question.question for question in run.waiting_for] == ["Go on?"]
        self.events.append(("run_waiting", run.status, run.attempt))

    def run_ended(self, run: Run) -> None:
        self.events.append(("run_ended", run.status, run.attempt))

    def batch_accepted(self, batch: Batch) -> None:
        assert batch.total_items == 1
        self.events.append(("batch_accepted", batch.status, batch.attempt))

    def batch_ended(self, batch: Batch) -> None:
        assert batch.completed_items == 1
        self.events.append(("batch_ended", batch.status, batch.attempt))


def asking_flock() -> Flock:
    flock = Flock()

    @flock.agent
    async def ask(context: RunContext) -> bool:
        if not await context.ask("Go on?", bool):
            raise AgentError("no")
        return True

    return flock


@pytest.mark.parametrize("store", [":memory:", "flock.db"], ids=["memory", "disk"])
async def test_an_observer_is_told_of_batches_and_of_items_that_wait(store: str) -> None:
    """A retry of the batch is accepted as its next attempt. The answer is not kept, so it waits again."""
    noted, flock = Noted(), asking_flock()
    async with flock.engine(store=store) as engine:
        engine.observe(noted)
        batch = await engine.submit_batch("ask", [{}], BatchOptions())
        for answer in (b"false", b"true"):
            (item,) = await waiting_items(engine, batch.batch_id)
            with anyio.fail_after(PATIENCE_S):
                (question,) = (await engine.wait(item.run_id)).waiting_for  # in memory it may still be running
            await engine.answer_call(item.run_id, question.call_id, msgspec.Raw(answer))
            with anyio.fail_after(PATIENCE_S):
                batch = await engine.wait_batch(batch.batch_id)
            if batch.status == "failed":
                await engine.retry_batch(batch.batch_id, calls="again")
    assert noted.events == [
        ("batch_accepted", "starting", 1),
        ("run_started", "running", 1),
        ("run_waiting", "waiting", 1),
        ("run_ended", "failed", 1),
        ("batch_ended", "failed", 1),
        ("batch_accepted", "starting", 2),
        ("run_started", "running", 2),
        ("run_waiting", "waiting", 2),
        ("run_ended", "completed", 2),
        ("batch_ended", "completed", 2),
    ]


async def waiting_items(engine: Engine, batch_id: str) -> Sequence[Run]:
    with anyio.fail_after(PATIENCE_S):
        while not (items := await engine.get_items(batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
            await anyio.sleep(0.01)
    return items


async def test_a_batch_that_is_resumed_after_a_stop_is_not_accepted_again() -> None:
    first, second, flock = Noted(), Noted(), asking_flock()
    async with flock.engine(store="flock.db") as engine:
        engine.observe(first)
        batch = await engine.submit_batch("ask", [{}], BatchOptions())
        (item,) = await waiting_items(engine, batch.batch_id)
        await engine.wait(item.run_id)
    async with flock.engine(store="flock.db") as engine:
        engine.observe(second)
        (item,) = await waiting_items(engine, batch.batch_id)
        await engine.cancel_run(item.run_id)
        with anyio.fail_after(PATIENCE_S):
            await engine.wait_batch(batch.batch_id)
    assert [name for name, *_ in first.events] == ["batch_accepted", "run_started", "run_waiting"]
    assert [name for name, *_ in second.events] == ["run_ended", "batch_ended"]


async def test_an_observer_need_not_have_all_methods(flock: Flock, caplog: pytest.LogCaptureFixture) -> None:
    """One that was written for an earlier version does not know the later events."""
    ended: list[str] = []

    class Old:
        def run_ended(self, run: Run) -> None:
            ended.append(run.run_id)

    async with flock.engine() as engine:
        engine.observe(Old())  # type: ignore[arg-type]
        run = await engine.wait((await engine.submit("add", {"a": 1})).run_id)
    assert ended == [run.run_id]
    assert "an observer raised" not in caplog.text


@pytest.mark.cluster
async def test_a_worker_tells_its_observers_of_runs_and_items_that_wait(temporal_address: str) -> None:
    from flock.models.llm import ModelClient
    from flock.temporal import TemporalEngine, TemporalWorker

    noted, flock, name = Noted(), asking_flock(), new_id()
    async with (
        TemporalWorker(flock.agents, ModelClient(None), temporal_address, flock=name, observers=[noted]),
        patient(TemporalEngine(flock.agents, temporal_address, flock=name)) as engine,
    ):
        run = await engine.submit("ask", {}, watch=True)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        assert (run.status, noted.events) == ("waiting", [("run_started", "running", 1), ("run_waiting", "waiting", 1)])
        batch = await engine.submit_batch("ask", [{}], BatchOptions())
        await waiting_items(engine, batch.batch_id)
        assert noted.events[2:] == [("run_started", "running", 1), ("run_waiting", "waiting", 1)]
        await engine.cancel_batch(batch.batch_id)
        await engine.cancel_run(run.run_id)


@pytest.mark.slow
def test_every_worker_reports_the_sum_of_all(tmp_path: Path) -> None:
    """After workers are killed, their runs still count and their open streams do not."""
    with running(*served_with(tmp_path, "--workers", "2")) as server:
        body = {"agent_name": "double", "inputs": {"number": 1}}
        for _ in range(40):  # a new connection each, so that both workers get some
            assert httpx.post(f"{server.url}/run/flock", json=body).status_code == 200
        pages = [values_in(httpx.get(f"{server.url}/metrics").text) for _ in range(10)]
        assert [page["flock_runs_total double completed"] for page in pages] == [40] * 10
        nap = httpx.post(f"{server.url}/run/flock", json={"agent_name": "nap", "async_run": True}).json()["run_id"]
        with httpx.stream("GET", f"{server.url}/run/{nap}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "id: 1000000000000"
            assert values_in(httpx.get(f"{server.url}/metrics").text)["flock_event_streams"] == 1
            process_ids = set(re.findall(r"Started server process \[(\d+)\]", "\n".join(server.lines)))
            for number, process_id in enumerate(process_ids, 1):
                os.kill(int(process_id), signal.SIGKILL)
                server.wait_for_line("A new worker replaces it", times=number)
        server.wait_for_line("Application startup complete", times=4)
        page = values_in(httpx.get(f"{server.url}/metrics").text)
        assert (page["flock_runs_total double completed"], page["flock_event_streams"]) == (40, 0)


# Owners and what people do


KEYS = {"ops:admin": "fk_ops_0123456789abcdef", "ann": "fk_ann_0123456789abcdef", "bob": "fk_bob_0123456789abcdef"}


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


@contextlib.asynccontextmanager
async def owned(tmp_path: Path, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve ``asking_flock`` with ``KEYS``."""
    app = create_app(asking_flock(), store=tmp_path / "flock.db", api_keys=KEYS, **options)
    async with app.lifespan(), client_of(app) as client:
        yield client


async def ask_as(client: httpx.AsyncClient, name: str) -> dict[str, Any]:
    """Start a run that asks, and return it when it waits."""
    body = {"agent_name": "ask", "inputs": {}}
    waiting: dict[str, Any] = (await client.post("/run/flock", json=body, headers=as_(name))).json()
    assert waiting["status"] == "waiting"
    return waiting


async def test_an_admin_sees_and_filters_by_the_owner_of_runs_batches_and_questions(tmp_path: Path) -> None:
    async with owned(tmp_path) as client:
        runs = {name: await ask_as(client, name) for name in ("ann", "bob")}
        for name in ("ann", "bob"):
            body = {"agent_name": "ask", "batch_inputs": [{}]}
            await client.post("/run/batch", json=body, headers=as_(name))

        async def listed(path: str, name: str, member: str) -> list[Any]:
            response = await client.get(path, headers=as_(name))
            assert response.status_code == 200, response.text
            return [each[member] for each in next(iter(response.json().values()))]

        for path in ("/runs", "/batches"):
            assert await listed(path, "ops:admin", "principal") == ["bob", "ann"]
            assert await listed(f"{path}?principal=ann", "ops:admin", "principal") == ["ann"]
            assert await listed(f"{path}?principal=carl", "ops:admin", "principal") == []
            assert await listed(f"{path}?agent_name=ask&principal=ann", "ann", "principal") == ["ann"]
            refused = await client.get(f"{path}?principal=bob", headers=as_("ann"))
            assert (refused.status_code, "'ann' is not an admin" in refused.text) == (403, True)
        assert set(await listed("/questions?principal=ann", "ops:admin", "requested_by")) == {"ann"}
        assert await listed("/questions?principal=bob", "ann", "requested_by") == []
        for reader in ("ops:admin", "ann"):
            found = (await client.get(f"/run/{runs['ann']['run_id']}", headers=as_(reader))).json()
            assert found["principal"] == "ann"


async def test_a_run_of_an_open_server_has_no_principal(client: httpx.AsyncClient, model: FakeModel) -> None:
    model.replies = [Reply({"sentiment": "good", "keywords": []})]
    run = (await client.post("/run/flock", json={"agent_name": "text_analyzer", "inputs": {"text": "hi"}})).json()
    assert "principal" not in run
    assert (await client.get("/runs?principal=ann")).json()["runs"] == []


@pytest.mark.parametrize("is_hidden", [False, True])
async def test_the_line_of_a_run_has_its_principal_unless_the_operator_leaves_it_out(
    is_hidden: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "flock")
    if is_hidden:
        monkeypatch.setenv("FLOCK_TELEMETRY_PRINCIPAL", "false")
    async with owned(tmp_path) as client:
        run = await ask_as(client, "ann")
        await client.post(f"/run/{run['run_id']}/cancel", headers=as_("ann"))
    lines = [json.loads(JSONFormatter().format(record)) for record in caplog.records]
    (ended,) = [line for line in lines if line.get("status") == "cancelled"]
    assert ended.get("principal") == (None if is_hidden else "ann")


def events_in(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [json.loads(JSONFormatter().format(record)) for record in caplog.records if record.name == "flock.audit"]


async def test_what_people_do_to_runs_is_an_event_with_its_principal_and_both_traces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flock")
    async with owned(tmp_path) as client:
        start = {**as_("ann"), "traceparent": TRACEPARENT}
        run = (await client.post("/run/flock", json={"agent_name": "ask"}, headers=start)).json()
        call_id, path = run["waiting_for"][0]["call_id"], f"/run/{run['run_id']}"
        of_request = {**as_("ops:admin"), "traceparent": f"00-{'b' * 32}-{'c' * 16}-01", "X-Request-ID": "r-1"}
        for method, sent_to, body in (
            ("POST", f"{path}/calls/{call_id}?wait=60", {"output": False}),
            ("POST", f"{path}/retry", {}),
            ("POST", f"{path}/cancel?wait=60", None),
            ("DELETE", path, None),
        ):
            response = await client.request(method, sent_to, json=body, headers=of_request)
            assert response.is_success, response.text
    events = events_in(caplog)
    names = ["question.answered", "run.retried", "run.cancel_requested", "run.deleted"]
    assert [event["event"] for event in events] == names
    for event in events:
        assert (event["run_id"], event["principal"], event["requested_by"]) == (run["run_id"], "ops", "ann")
        assert (event["trace_id"], event["request_trace_id"]) == (TRACEPARENT[3:35], "b" * 32)
        assert event["request_id"] == "r-1"
    assert [event.get("call_id") for event in events] == [call_id, None, None, None]
    assert [event["message"].partition(": ")[2] for event in events[1:]] == [
        "'ops' has retried it",
        "'ops' has requested its cancellation",
        "'ops' has deleted it",
    ]


async def test_what_people_do_to_batches_and_changed_budgets_are_events(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flock")
    keys = {f"{name}:max_cost_per_day:5" if name == "ann" else name: key for name, key in KEYS.items()}
    app = create_app(asking_flock(), store=tmp_path / "flock.db", api_keys=keys)
    async with app.lifespan(), client_of(app) as client:
        body = {"agent_name": "ask", "batch_inputs": [{}]}
        batch = (await client.post("/run/batch", json=body, headers=as_("ann"))).json()
        path = f"/batch/{batch['batch_id']}"
        for method, sent_to in (("POST", f"{path}/cancel"), ("POST", f"{path}/retry"), ("POST", f"{path}/cancel")):
            assert (await client.request(method, f"{sent_to}?wait=60", headers=as_("ann"))).is_success
        assert (await client.delete(path, headers=as_("ann"))).is_success
    budget, *events = events_in(caplog)
    assert (budget["event"], budget["principal"], budget["max_cost_per_day"]) == ("budget.changed", "ann", 5)
    assert [event["event"].removeprefix("batch.") for event in events] == [
        *("cancel_requested", "retried", "cancel_requested", "deleted")
    ]
    assert {(event["batch_id"], event["principal"]) for event in events} == {(batch["batch_id"], "ann")}


async def test_an_event_of_a_program_has_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flock")
    async with owned(tmp_path) as client:
        run = await ask_as(client, "ann")
        transport: Any = client._transport
        await transport.app.engine.cancel_run(run["run_id"])
    (event,) = events_in(caplog)
    assert (event["requested_by"], event["message"].split(": ")[1]) == (
        "ann",
        "somebody has requested its cancellation",
    )
    assert event.keys().isdisjoint({"principal", "request_id", "request_trace_id"})


@pytest.mark.parametrize("workers", [1, 2])
def test_the_audit_file_has_only_events_and_is_created_again_after_it_was_moved(workers: int, tmp_path: Path) -> None:
    keys, audit = tmp_path / "keys", tmp_path / "audit.ndjson"
    keys.write_text("\n".join(f"{name}={key}" for name, key in KEYS.items()))
    more = ["--api-keys-file", str(keys), "--audit", str(audit), "--workers", str(workers)]
    with (
        running(*served_with(tmp_path, *more)) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
    ):
        for moved in ("audit.1", "audit.2"):
            body = {"agent_name": "nap", "inputs": {}, "async_run": True}
            run = http.post("/run/flock", json=body, headers=as_("ann")).raise_for_status().json()
            http.post(f"/run/{run['run_id']}/cancel?wait=60", headers=as_("ops:admin")).raise_for_status()
            (event,) = map(json.loads, audit.read_text("utf-8").splitlines())
            assert (event["event"], event["run_id"]) == ("run.cancel_requested", run["run_id"])
            assert (event["principal"], audit.stat().st_mode & 0o777) == ("ops", 0o600)
            audit.rename(tmp_path / moved)
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_line("The API keys were read again", times=workers)
        lines = [json.loads(line) for line in audit.read_text("utf-8").splitlines()]
    assert [line["event"] for line in lines] == ["keys.changed"] * workers
    assert lines[0]["key_names"] == list(KEYS)


def test_an_audit_file_that_cannot_be_written_stops_the_start(tmp_path: Path) -> None:
    done = subprocess.run(
        served_with(tmp_path, "--audit", str(tmp_path / "missing" / "audit")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "for --audit cannot be written: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr

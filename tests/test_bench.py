"""The benchmarks can be trusted: the subjects do the same work, the figures are computed right, the guard can fail."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

import bench.run
from bench import guard
from bench.agents import flock
from bench.growth import Cost, faults
from bench.load import is_whole, repeat, send_all
from bench.machine import pick_cores
from bench.measures.bench import Row
from bench.measures.requests import shape_of
from bench.measures.streams import read_streams
from bench.peers import bare, floor, shared
from bench.peers.__main__ import Ask, Peer, reasons
from bench.peers.__main__ import table as table_of_peers
from bench.profile import PARTS_OF_REQUEST, REST, shares, table
from bench.servers import BARE, COMMIT, FASTAPI, FLOOR, KEY_AND_METRICS, MEMORY, POWER, Server, serving
from bench.stores import fill, some_run_ids
from bench.table import markdown
from flock.command.server import tune_gc
from flockapi import create_app
from tests.support import ROOT

RUN = {"agent_name": "add", "inputs": {"a": 1}}


# The subjects do the same work


@pytest.mark.anyio
@pytest.mark.parametrize("peer", [floor.app, bare.app], ids=["floor", "bare"])
@pytest.mark.parametrize(("method", "path", "body"), [("GET", "/agents", None), ("POST", "/run/flock", RUN)])
async def test_a_peer_responds_with_the_same_json_as_the_app(peer: Any, method: str, path: str, body: Any) -> None:
    app = create_app(flock, engine=flock.engine(), auth="anybody", metrics=False)
    async with app.lifespan():
        ours, theirs = [await respond(each, method, path, body) for each in (app, peer)]
    assert (ours.status_code, ours.headers.get("flock-run-status")) == (
        theirs.status_code,
        theirs.headers.get("flock-run-status"),
    )
    assert shape_of(ours.json()) == shape_of(theirs.json())
    assert list(ours.json()) == list(theirs.json())


async def respond(app: Any, method: str, path: str, body: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.request(method, path, json=body)


@pytest.mark.anyio
@pytest.mark.parametrize("peer", [floor.app, bare.app], ids=["floor", "bare"])
@pytest.mark.parametrize("inputs", [{}, {"a": "1"}, {"a": 1, "c": 2}])
async def test_a_peer_checks_the_inputs(peer: Any, inputs: Any) -> None:
    assert (await respond(peer, "POST", "/run/flock", {**RUN, "inputs": inputs})).status_code == 422


def test_servers_written_by_hand_collect_garbage_like_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = list[tuple[int, ...]]()
    monkeypatch.setattr(gc, "set_threshold", lambda *given: thresholds.append(given))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    tune_gc()
    shared.tune_gc()
    assert thresholds[0] == thresholds[1]


@pytest.mark.anyio
async def test_an_accepted_run_of_the_bare_equal_can_be_awaited() -> None:
    started = await respond(bare.app, "POST", "/run/flock", {**RUN, "async_run": True})
    ended = await respond(bare.app, "GET", f"{started.headers['location']}?wait=5", None)
    assert (started.status_code, started.json()["status"]) == (202, "starting")
    assert (ended.json()["status"], ended.json()["result"]) == ("completed", {"result": 3})


@pytest.mark.anyio
@pytest.mark.parametrize("subject", [BARE, MEMORY])
async def test_a_stream_of_each_server_has_all_pieces_as_they_are_written(subject: str, tmp_path: Path) -> None:
    body = {"agent_name": "write", "inputs": {"pieces": 3, "interval_s": 0.01}}
    with serving(subject, pick_cores(), tmp_path) as server:
        request = server.raw_request("POST", "/run/flock", body, Accept="text/event-stream")
        found = await read_streams(server, request, 2, 3)
        assert found.late_ms < 500
        with pytest.raises(RuntimeError, match="3 of 4 pieces"):
            await read_streams(server, request, 1, 4)


@pytest.mark.anyio
async def test_a_filled_store_has_runs_that_the_engine_can_read(tmp_path: Path) -> None:
    fill(tmp_path / "flock.db", 100, principal="ann")
    ids = some_run_ids(tmp_path / "flock.db", 10)
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        runs = [await engine.get_run(run_id) for run_id in ids]
    assert len(set(ids)) == 10
    assert {(run.status, run.principal, bytes(run.result or b"")) for run in runs} == {
        ("completed", "ann", b'{"result":3}')
    }


# The load generator


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(FLOOR, pick_cores(), tmp_path) as server:
        yield server


@pytest.mark.anyio
async def test_the_load_generator_counts_each_response(server: Server) -> None:
    bodies = await send_all(server, [server.raw_request("POST", "/run/flock", RUN)] * 50, connections=8)
    ids = {msgspec.json.decode(body)["run_id"] for body in bodies}
    sample = await repeat(server, [server.raw_request("GET", "/agents")], connections=4, seconds=0.1)
    assert len(ids) == 50
    assert sample.requests > 4


@pytest.mark.anyio
async def test_the_load_generator_raises_if_a_response_is_an_error(server: Server) -> None:
    wrong = server.raw_request("POST", "/run/flock", {**RUN, "inputs": {}})
    with pytest.raises(RuntimeError, match="do not have the status 200"):
        await repeat(server, [wrong], connections=2, seconds=0.05)
    with pytest.raises(RuntimeError, match="does not respond 200"):
        await send_all(server, [wrong] * 10, connections=2)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True),
    ],
    ids=["a part", "whole", "chunks", "the last chunk"],
)
def test_a_response_is_whole_when_its_last_byte_is_there(response: bytes, expected: bool) -> None:
    assert is_whole(response, response.index(b"\r\n\r\n")) == expected


# The table


def test_a_ratio_is_the_median_of_the_ratios_in_one_round() -> None:
    """The machine was slow in the second round, for both. The ratio of the medians would be 0.5."""
    row = Row(title="a run, 1/s", figures={BARE: [1000.0, 100.0, 1200.0], POWER: [500.0, 40.0, 480.0]})
    assert markdown([row]).splitlines()[2] == "| a run, 1/s | 1,000 | 480 (0.40) |"


def test_ratios_to_other_bases_have_rows_of_their_own() -> None:
    figures = {BARE: [100.0], COMMIT: [80.0], FASTAPI: [40.0], MEMORY: [50.0], POWER: [20.0], KEY_AND_METRICS: [10.0]}
    lines = markdown([Row(title="a run, 1/s", figures=figures, bases=(BARE, FASTAPI, POWER))]).splitlines()
    assert lines == [
        "| | bare | FastAPI | in memory | `power` | `power`, key, metrics |",
        "|-|-:|-:|-:|-:|-:|",
        "| a run, 1/s | 100 | 40.0 (0.40) | 50.0 (0.50) | 20.0 (0.20) | 10.0 (0.10) |",
        "| a run, of FastAPI | | | 1.25 | 0.50 | 0.25 |",
        "| a run, of `power` | | | | | 0.50 |",
    ]


def test_only_the_marked_part_of_a_page_is_replaced(tmp_path: Path) -> None:
    (page := tmp_path / "page.md").write_text(f"before\n{bench.run.BEGIN}old\n{bench.run.END}after\n")
    bench.run.replace_part(page, "new\n")
    bench.run.replace_part(page, "newer\n")
    assert page.read_text() == f"before\n{bench.run.BEGIN}newer\n{bench.run.END}after\n"


@pytest.mark.parametrize("page", [bench.run.PAGE, bench.run.README], ids=lambda page: page.stem)
def test_the_pages_have_a_part_to_replace(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count(bench.run.BEGIN) == text.count(bench.run.END) == 1
    assert text.index(bench.run.BEGIN) < text.index(bench.run.END)


def test_the_figures_of_the_readme_are_those_of_the_page() -> None:
    def dates(page: Path) -> list[str]:
        return [line for line in page.read_text("utf-8").splitlines() if line.startswith("Measured on ")]

    assert len(dates(bench.run.PAGE)) == 1
    assert dates(bench.run.README) == dates(bench.run.PAGE)


@pytest.mark.nightly  # a minute alone; .ci/run runs the guard, which measures with the same code
@pytest.mark.alone
def test_one_command_prints_all_rows() -> None:
    """With little effort, so the figures mean nothing."""
    command = [sys.executable, "-m", "bench.run", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in lines[:1]}) == 1
    for name in bench.run.MEASURES:
        assert f"{name}: " in done.stderr
    for words in ("`GET /agents`, 1/s", "a synchronous run, of FastAPI", "p99, ms", "CSV out", "packages, MB"):
        assert any(words in line for line in lines), words


def test_a_peer_without_a_figure_says_why() -> None:
    asks: dict[str, Ask | str] = {"sync": Ask("/add"), "csv": "it has no batches"}
    peers = {name: Peer(command=(), durable="nothing", asks=asks) for name in ("by hand", "Peer")}
    found = {"by hand": {"sync": [100.0, 200.0]}, "Peer": {"sync": [300.0, 400.0]}}
    assert table_of_peers(found, peers, ["sync", "csv"]).splitlines()[2:] == [
        "| by hand | 150 |  | nothing |",
        "| Peer | 350 (2.50) |  | nothing |",
    ]
    missing = {("Peer", work): str(peers["Peer"].ask(work)) for work in ("items", "csv", "model")}
    assert reasons(missing).splitlines() == [
        "- Peer (items, model): it has no such thing.",
        "- Peer (csv): it has no batches.",
    ]


# How cost grows


def cost(count: int, us: float, hold_ms: float = 1.0, **more: Any) -> Cost:
    return Cost(what="a piece", count=count, us=us, hold_ms=hold_ms, where="somewhere", **more)


@pytest.mark.parametrize(
    ("costs", "marked"),
    [
        pytest.param([cost(1, 50), cost(10, 20), cost(100, 25)], [], id="flat"),
        pytest.param([cost(1, 50), cost(10, 20), cost(100, 31)], [100], id="grows"),
        pytest.param([cost(1, 50, 11.0)], [1], id="holds the loop"),
        pytest.param([cost(1, 50, 11.0, may_hold=True)], [], id="one large value may hold the loop"),
    ],
)
def test_a_cost_that_grows_and_a_loop_that_is_held_are_faults(costs: list[Cost], marked: list[int]) -> None:
    assert [count for _, count in faults(costs)] == marked


# The guard


RECORDED = {"a synchronous run": 0.20, "GET /run/{id}": 0.30}


@pytest.mark.parametrize(
    ("found", "slower"),
    [
        pytest.param(RECORDED, [], id="same"),
        pytest.param({"a synchronous run": 0.171, "GET /run/{id}": 0.256}, [], id="a little slower"),
        pytest.param({"a synchronous run": 0.30, "GET /run/{id}": 0.40}, [], id="faster"),
        pytest.param({"a synchronous run": 0.169, "GET /run/{id}": 0.30}, ["a synchronous run"], id="one slower"),
        pytest.param({"a synchronous run": 0.1, "GET /run/{id}": 0.1}, list(RECORDED), id="both slower"),
        pytest.param({"a new row": 1.0}, ["a new row"], id="not recorded"),
    ],
)
def test_the_guard_fails_if_a_ratio_is_below_its_share_of_the_recorded_one(
    found: dict[str, float], slower: list[str]
) -> None:
    sentences = guard.failures(found, RECORDED)
    assert len(sentences) == len(slower)
    assert all(sentence.startswith(name) for sentence, name in zip(sentences, slower, strict=True))


def test_a_ratio_is_recorded_for_each_row_of_the_guard() -> None:
    record = guard.recorded()
    assert list(record.ratios) == list(guard.GUARDED)
    assert all(0 < ratio < 2 for ratio in record.ratios.values())  # a model agent's client may be faster than httpx


@pytest.mark.parametrize(("ratio", "code"), [(0.30, 0), (0.10, 1)], ids=["as fast", "slower"])
def test_the_guard_exits_with_1_and_says_what_to_do_if_it_fails(
    ratio: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dict.fromkeys(RECORDED, ratio)
    record = guard.Record(recorded_on=date(2026, 11, 26), ratios=RECORDED)
    assert guard.verdict(found, record) == code
    printed = capsys.readouterr().out
    assert ("git bisect" in printed, "--record" in printed) == (bool(code), bool(code))


# The profile


PERF_SCRIPT = f"""python 7
\t    55d0 sqlite3_step
\t    7f01 py::write_run:{ROOT}/flock/store/queries.py
\t    7f02 py::Group._write_runs:{ROOT}/flock/store/groups.py
\t    7f03 py::Database._write:{ROOT}/flock/store/database.py

python 6
\t    7f04 py::Route.matches:/venv/lib/site-packages/starlette/routing.py
\t    7f05 py::AppRouter.__call__:{ROOT}/flock/web/routing.py
\t    7f06 py::RequestResponseCycle.run_asgi:/venv/lib/site-packages/uvicorn/protocols/http/httptools_impl.py

python 6
\t    55d1 epoll_wait

python 6
\t    7f07 py::shown_as:{ROOT}/flock/web/wire.py
\t    7f08 py::run_response:{ROOT}/flockapi.py

"""


def test_a_sample_belongs_to_the_part_of_its_innermost_function() -> None:
    found = shares(PERF_SCRIPT.splitlines(), PARTS_OF_REQUEST)
    assert {part: share for part, share in found.items() if share} == {
        "SQLite: statements, commit, thread": 0.25,
        "middleware, routing, access": 0.25,
        "response made": 0.25,
        REST: 0.25,
    }


def test_the_profile_is_a_table_of_microseconds() -> None:
    lines = table({"a run": (400.0, PERF_SCRIPT)}, PARTS_OF_REQUEST).splitlines()
    assert lines[:2] == ["|  | a run |", "| - | -: |"]
    assert "| response made | 100 |" in lines
    assert lines[-1] == "| sum | 400 |"

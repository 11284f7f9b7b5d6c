"""``POST /run/batch?dry_run=true`` reports the errors of a real request and stores nothing."""

import gzip
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import httpx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from flock.core import Flock
from flock.runs import Engine
from flockapi import FlockAPI, create_app
from tests.support.cluster import engine_for
from tests.support.http import client_of

CSV = {"Content-Type": "text/csv"}
NDJSON = {"Content-Type": "application/x-ndjson"}
JSON = {"Content-Type": "application/json"}
KEY = "k" * 32
ANN = {"X-API-Key": KEY}


def checked_flock() -> Flock:
    flock = Flock("checked")

    @flock.agent
    async def need(n: int, text: str = "none", price: float | None = None) -> str:
        return f"{n} {text} {price}"

    return flock


@pytest.fixture(autouse=True)
def _named_file() -> None:
    Path("rows").mkdir()
    Path("rows/named.csv").write_text("N\n1\n\na\n")


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with engine_for(request, checked_flock(), store="flock.db", max_items=3000) as engine:
        yield engine


@pytest.fixture
async def app(engine: Engine) -> AsyncIterator[FlockAPI]:
    made = create_app(
        checked_flock(),
        engine=engine,
        max_body_bytes=20_000,
        max_upload_bytes=400_000,
        max_uploads_per_principal=1,
        csv_dir="rows",
        api_keys={"ann": KEY},
    )
    async with made.lifespan():
        yield made


@pytest.fixture
async def client(app: FlockAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app, ANN) as made:
        yield made


async def send(client: httpx.AsyncClient, content: Any, headers: Any = CSV, **query: Any) -> httpx.Response:
    """Send a batch. A JSON body contains its own options."""
    query = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in query.items()}
    query = query if headers is JSON else {"agent_name": "need", **query}
    content = json.dumps(content) if headers is JSON else content
    return await client.post("/run/batch", params=query, content=content, headers=headers)


async def check(client: httpx.AsyncClient, content: Any, headers: Any = CSV, **query: Any) -> Any:
    response = await send(client, content, headers, **query, dry_run="true")
    assert response.status_code == 200, response.text
    return response.json()


async def is_nothing_stored(client: httpx.AsyncClient) -> bool:
    return bool((await client.get("/batches")).json()["batches"] == [])


@pytest.mark.anyio
@pytest.mark.parametrize("engine", ["embedded", "temporal"], indirect=True)
async def test_a_dry_run_counts_rows_and_shows_them_as_they_would_be_stored(client: httpx.AsyncClient) -> None:
    found = await check(client, "n,text,id\n1,a,0042\nzwei,b,x\n3,c,\n", on_extra="keep")
    (error,) = found.pop("errors")
    assert (error["line"], error["pointer"]) == (3, "/n")
    assert found == {
        "ok": False,
        "total_items": 3,
        "invalid_items": 1,
        "columns": ["n", "text", "id"],
        "rows": [
            {"line": 2, "inputs": {"n": 1, "text": "a"}, "extra": {"id": "0042"}},
            {"line": 3, "inputs": {"n": "zwei", "text": "b"}, "extra": {"id": "x"}},
            {"line": 4, "inputs": {"n": 3, "text": "c"}, "extra": {"id": ""}},
        ],
    }
    found = await check(client, "n\n1\nzwei\n", on_invalid="skip")
    assert (found["ok"], found["invalid_items"], len(found["errors"])) == (True, 1, 1)
    assert await is_nothing_stored(client)


def stored_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path.cwd().glob("flock.db*") if path.is_file()}


@pytest.mark.anyio
async def test_nothing_is_written_while_rows_are_checked(client: httpx.AsyncClient) -> None:
    """There are more rows than one page of a real batch has."""
    assert (await client.get("/batches")).status_code == 200
    before = stored_files()
    assert before
    found = await check(client, "n\n" + "1\n" * 2000, static_inputs={"text": "a" * 10})
    assert (found["ok"], found["total_items"], len(found["rows"])) == (True, 2000, 20)
    assert stored_files() == before


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "headers", "options"),
    [
        pytest.param({"batch_inputs": [{"N": 1}, {"N": "a"}]}, JSON, {"input_mapping": {"N": "n"}}, id="JSON"),
        pytest.param('{"N": 1}\n\n{"N": "a"}', NDJSON, {"input_mapping": {"N": "n"}}, id="NDJSON"),
        pytest.param("N;text\n1;x\n\na;y\n", CSV, {"delimiter": ";", "input_mapping": {"text": None}}, id="CSV"),
        pytest.param(
            "N;Text\n1;ä\n\na;y\n".encode("cp1252"), CSV, {"delimiter": ";", "encoding": "cp1252"}, id="encoding"
        ),
        pytest.param(gzip.compress(b"N\n1\n\na\n"), CSV | {"Content-Encoding": "gzip"}, {}, id="gzip"),
        pytest.param({"batch_inputs": "named.csv"}, JSON, {}, id="a named file"),
    ],
)
async def test_rows_of_each_format_are_checked_like_those_of_a_real_batch(
    content: Any, headers: Any, options: Any, client: httpx.AsyncClient
) -> None:
    if headers is JSON:
        content, options = {"agent_name": "need", **content, **options}, {}
    real = await send(client, content, headers, **options)
    found = await check(client, content, headers, **options)
    assert real.status_code == 422
    assert found["errors"] == real.json()["errors"]
    assert (found["ok"], found["total_items"], found["invalid_items"]) == (False, 2, 1)
    assert found["columns"][0] == "N"
    assert [row["inputs"]["n"] for row in found["rows"]] == [1, "a"]
    lines = [found["errors"][0].get("line", 0) - 2, found["errors"][0].get("line", 0)]
    assert [row.get("line") for row in found["rows"]] == ([None, None] if lines[1] == 0 else lines)


@pytest.mark.anyio
async def test_numbers_are_shown_with_all_their_digits(client: httpx.AsyncClient) -> None:
    response = await send(client, "n,price\n12345678901234567890,0.12345678901234567890\n", dry_run="true")
    assert '{"n":12345678901234567890,"price":0.12345678901234567890}' in response.text


@pytest.mark.anyio
@pytest.mark.parametrize("on_invalid", ["reject", "skip"])
@pytest.mark.parametrize(
    ("content", "options"),
    [
        pytest.param("text,id\na,1\n", {}, id="a required column is missing"),
        pytest.param("n,other\n1,2\n", {}, id="a column that is not an input"),
        pytest.param("n,N\n1,2\n", {"input_mapping": {"N": "n"}}, id="a column twice"),
        pytest.param("n;text\n1;2\n", {}, id="another delimiter"),
        pytest.param('n,text\n1,"open\n', {}, id="a quote that is not closed"),
        pytest.param('n,text\nx,a\n1,"open\n', {}, id="an invalid row, and a quote that is not closed"),
        pytest.param("n,text\n", {}, id="no rows"),
    ],
)
async def test_the_response_to_an_invalid_table_has_its_columns_and_the_real_errors(
    content: str, options: Any, on_invalid: str, client: httpx.AsyncClient
) -> None:
    options = {**options, "on_invalid": on_invalid}
    real = await send(client, content, **options)
    found = await check(client, content, **options)
    assert real.status_code == 422
    assert found["errors"][: len(real.json()["errors"])] == real.json()["errors"]
    assert (found["ok"], found["columns"]) == (False, content.partition("\n")[0].split(","))


@pytest.mark.anyio
async def test_all_rows_are_counted_and_a_hundred_errors_are_reported(client: httpx.AsyncClient) -> None:
    """A real request stops at the hundredth. An error in the static inputs is reported once."""
    content = "n\n" + "".join(f"a{number}\n" for number in range(250))
    real, found = await send(client, content), await check(client, content)
    assert (found["total_items"], found["invalid_items"], len(found["rows"])) == (250, 250, 20)
    assert found["errors"] == real.json()["errors"]
    assert [error["line"] for error in found["errors"]] == list(range(2, 102))
    found = await check(client, "n\n" + "1\n" * 250, static_inputs={"price": "much"})
    assert (found["invalid_items"], [error["pointer"] for error in found["errors"]]) == (250, ["/static_inputs/price"])


@pytest.mark.anyio
async def test_fewer_rows_are_shown_if_they_are_long(client: httpx.AsyncClient) -> None:
    text = "a" * 15_000
    found = await check(client, "n,text\n" + f"1,{text}\n" * 10)
    assert (found["ok"], found["total_items"], len(found["rows"])) == (True, 10, 4)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("content", "headers", "query", "status"),
    [
        pytest.param("n\n1\n", CSV | {"X-API-Key": "wrong" * 8}, {}, 401, id="no key"),
        pytest.param("n\n1\n", CSV, {"agent_name": "nobody"}, 404, id="no agent"),
        pytest.param("n\n1\n", {"Content-Type": "text/plain"}, {}, 415, id="another type"),
        pytest.param("n\n1\n", CSV | {"Content-Encoding": "br"}, {}, 415, id="another encoding of the body"),
        pytest.param("n\n" + "1\n" * 200_001, CSV, {}, 413, id="too long"),
        pytest.param("n\n" + "1\n" * 3001, CSV, {}, 413, id="too many rows"),
        pytest.param("n,text\n1," + "a" * 20_001, CSV, {}, 413, id="a row that is too long"),
        pytest.param("", CSV, {}, 422, id="no header"),
        pytest.param(b"n,text\n1,\xe4\n", CSV, {}, 422, id="not UTF-8"),
        pytest.param(b"no gzip", CSV | {"Content-Encoding": "gzip"}, {}, 422, id="not gzip"),
        pytest.param("n\n1\n", CSV, {"max_workers": 0}, 422, id="an option"),
        pytest.param("n\n1\n", CSV, {"input_mapping": {"a": "b"}}, 422, id="a mapping to an unknown input"),
        pytest.param("n\n1\n", CSV | {"Idempotency-Key": ""}, {}, 400, id="an idempotency key"),
        pytest.param({"agent_name": "need"}, JSON, {}, 422, id="a body without rows"),
        pytest.param({"agent_name": "need", "batch_inputs": "none.csv"}, JSON, {}, 422, id="no such file"),
        pytest.param(
            {"agent_name": "need", "batch_inputs": [], "write_to_csv": "a"}, JSON, {}, 422, id="a file to write"
        ),
        pytest.param({"agent_name": "need", "batch_inputs": [{"n": 1}]}, JSON, {"on_invalid": "skip"}, 422, id="query"),
    ],
)
async def test_a_dry_run_that_is_refused_early_or_for_its_length_gets_the_real_response(
    content: Any, headers: Any, query: Any, status: int, client: httpx.AsyncClient
) -> None:
    real = await send(client, content, headers, **query)
    dry = await send(client, content, headers, **query, dry_run="true")
    assert (dry.status_code, real.status_code) == (status, status)
    assert dry.json() | {"request_id": ""} == real.json() | {"request_id": ""}
    assert (await send(client, "n\n1\n", dry_run="yes")).status_code == 422


@pytest.mark.anyio
async def test_an_idempotency_key_has_no_effect(client: httpx.AsyncClient) -> None:
    headers = CSV | {"Idempotency-Key": "k"}
    for content in ("n\n1\n", "n\n2\n"):
        assert (await check(client, content, headers))["ok"]
    accepted = await send(client, "n\n1\n", headers)
    assert accepted.status_code == 202
    assert "Idempotency-Replayed" not in accepted.headers
    assert (await check(client, "n\n3\n", headers))["ok"]


@pytest.mark.anyio
async def test_a_column_that_is_mapped_to_null_is_dropped(client: httpx.AsyncClient) -> None:
    """Its name may be that of an input, an output or another column."""
    mapping = {"price": None, "result": None, "x": None, "": None}
    options = {"on_extra": "keep", "input_mapping": mapping}
    table = "n,price,result,x,x,id,\n1,much,a,b,c,0042,d\n"
    row = json.dumps({"n": 1, "price": "much", "result": "a", "x": "b", "id": "0042", "": "d"})
    for content, headers in ((table, CSV), (row, NDJSON)):
        (shown,) = (await check(client, content, headers, **options))["rows"]
        assert (shown["inputs"], shown["extra"]) == ({"n": 1}, {"id": "0042"})
        accepted = await send(client, content, headers, **options)
        await client.get(accepted.headers["Location"], params={"wait": 30})
        (item,) = (await client.get(f"{accepted.headers['Location']}/results?format=json")).json()
        assert (item["inputs"], item["extra"]) == ({"n": 1}, {"id": "0042"})
    refused = await send(client, "n\n1\n", input_mapping={"gone": None})
    assert refused.json()["errors"][0]["pointer"] == "/gone"


@pytest.mark.anyio
async def test_a_dry_run_counts_towards_the_limit_of_uploads(client: httpx.AsyncClient) -> None:
    has_begun, may_end = anyio.Event(), anyio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b"n\n1\n"
        has_begun.set()
        await may_end.wait()
        yield b"2\n"

    async with anyio.create_task_group() as tasks:
        found: list[Any] = []

        async def check_slowly() -> None:
            found.append(await check(client, slowly()))

        tasks.start_soon(check_slowly)
        await has_begun.wait()
        refused = await send(client, "n\n1\n", dry_run="true")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        may_end.set()
    assert found[0]["total_items"] == 2
    assert (await check(client, "n\n1\n"))["ok"]


@pytest.mark.anyio
async def test_a_dry_run_does_not_delay_shutdown(engine: Engine, client: httpx.AsyncClient) -> None:
    async def rows() -> AsyncIterator[bytes]:
        for number in range(1000):
            if number == 10:
                await engine.drain(0)
            yield b'{"n": 1}\n'

    response = await send(client, rows(), NDJSON, dry_run="true")
    assert response.status_code == 503
    assert response.json()["detail"] == "The server is shutting down. Send the rows again after it has restarted."


@pytest.fixture(scope="module")
def portal() -> Iterator[tuple[anyio.from_thread.BlockingPortal, httpx.AsyncClient]]:
    """Yield an event loop in a thread, and a client of an app that runs in it."""
    app = create_app(checked_flock(), store=":memory:", api_keys={"ann": KEY}, max_body_bytes=1000)
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(app.lifespan()),
        portal.wrap_async_context_manager(client_of(app, ANN)) as client,
    ):
        yield portal, client


HOSTILE = ["2.5", "x", "", "true", '"', '"a,b"', "1,5", " 7 ", "null", "[1]", "\x00", "ä", "9" * 400]
CELLS = st.sampled_from(["1"] * 20 + HOSTILE)
OTHERS = ["text", "price", "id", "N", "result", "", "n;text", "n"]
HEADERS = st.lists(st.sampled_from(OTHERS), max_size=3, unique=True).map(lambda names: ["n", *names])
ROWS = st.lists(st.lists(CELLS, min_size=4, max_size=4), min_size=1, max_size=4)
#: The header, the rows, and how many extra cells each row has.
TABLES = st.tuples(HEADERS | st.just(["text"]), ROWS | ROWS | ROWS | st.just([]), st.sampled_from([0] * 9 + [1]))
#: The inputs to which the columns are mapped, in order.
MAPPINGS = st.lists(st.sampled_from([None, "price", "text", "n"]), max_size=3)
OPTIONS = st.fixed_dictionaries(
    {"on_extra": st.sampled_from(["ignore", "keep", "reject"])},
    optional={
        "on_invalid": st.sampled_from(["skip", "reject"]),
        "decimal": st.sampled_from([".", ","]),
        "static_inputs": st.sampled_from([{"n": 1}, {"price": 2}, {"text": "a"}, {"n": "x"}, {"nothing": 1}]),
        "input_mapping": MAPPINGS,
    },
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(table=TABLES, options=OPTIONS, is_csv=st.booleans(), end=st.sampled_from(["\n", "\r\n"]))
def test_a_dry_run_is_ok_exactly_if_the_table_is_accepted(
    table: Any, options: Any, is_csv: bool, end: str, portal: tuple[anyio.from_thread.BlockingPortal, Any]
) -> None:
    """Its errors begin with those of the real request."""
    header, rows, more = table
    rows = [row[: len(header) + more] for row in rows]
    lines = [",".join(row) for row in [header, *rows]]
    if not is_csv:
        items = [{name: 1 if cell == "1" else cell for name, cell in zip(header, row, strict=False)} for row in rows]
        lines = [*map(json.dumps, items), *("{" for row in rows if '"' in row)]
    content, headers = end.join(lines), CSV if is_csv else NDJSON
    in_loop, client = portal
    if "input_mapping" in options:
        options["input_mapping"] = dict(zip(reversed(header), options["input_mapping"], strict=False))
    options = {name: value for name, value in options.items() if is_csv or name != "decimal"}

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        return await send(client, content, headers, **options, dry_run="true"), await send(
            client, content, headers, **options
        )

    dry, real = in_loop.call(ask)
    event(f"{dry.status_code}, and {real.status_code} for the real one")
    if dry.status_code != 200:
        assert dry.json() | {"request_id": ""} == real.json() | {"request_id": ""}
        return
    assert dry.json()["ok"] is (real.status_code == 202)
    errors = [] if real.status_code == 202 else real.json()["errors"]
    assert dry.json()["errors"][: len(errors)] == errors
    if real.status_code == 202:
        assert dry.json()["total_items"] == real.json()["total_items"]
        assert dry.json()["invalid_items"] == real.json()["failed_items"]

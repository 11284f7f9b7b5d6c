"""Rows over HTTP: uploads of CSV, NDJSON and server files, and downloads of JSON, NDJSON and CSV."""

import contextlib
import csv
import gzip
import io
import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypedDict

import anyio
import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flock.agents.signature import Signature
from flock.core import Flock, FlockFactory
from flock.errors import AgentError, FieldError, FlockError, InvalidData, TooLarge
from flock.rows import tables
from flock.rows.dialect import CSVDialect
from flock.rows.tables import RowMapping, csv_rows, ndjson_rows
from flock.runs import Engine, Row
from flock.web.auth import new_key
from flock.web.negotiation import preferred
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S, ROOT
from tests.support.cluster import engine_for
from tests.support.servers import flockapi_command, running

pytestmark = pytest.mark.anyio

#: The number of generated files for each format. .ci/nightly generates 2,000.
EXAMPLES = int(os.environ.get("UPLOAD_EXAMPLES", "300"))

CSV = {"Content-Type": "text/csv"}
NDJSON = {"Content-Type": "application/x-ndjson"}
KEYS = {"ann": new_key(), "bob": new_key()}


def upload_flock() -> Flock:
    flock = Flock("uploads")

    @flock.agent
    def show(
        text: str,
        n: int = 0,
        share: float | None = None,
        is_new: bool | None = None,
        tags: list[str] = [],  # noqa: B006 - as people write it
        kind: Literal["a", "b"] = "a",
        day: date | None = None,
        more: dict[str, int] | None = None,
    ) -> str:
        return json.dumps([text, n, share, is_new, tags, kind, day and day.isoformat(), more])

    @flock.agent
    async def need(n: int, text: str, note: str | None) -> str:
        return f"{n} {text!r} {note!r}"

    @flock.agent
    async def nest(more: list[Any]) -> int:
        return 1

    @flock.agent
    def fail(n: int) -> int:
        if n % 2:
            raise AgentError(f"=no {n}")
        return n

    return flock


#: A client cannot tell which engine answers.
of_every_engine = pytest.mark.parametrize("engine", ["embedded", "temporal"], indirect=True)


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with engine_for(request, upload_flock(), max_items=3000) as engine:
        yield engine


@pytest.fixture
async def app(engine: Engine) -> AsyncIterator[FlockAPI]:
    made = create_app(
        upload_flock(),
        engine=engine,
        max_body_bytes=20_000,
        max_upload_bytes=400_000,
        body_timeout_s=0.5,
        csv_dir="rows",
        api_keys=KEYS,
    )
    async with made.lifespan():
        yield made


@pytest.fixture
async def client(app: FlockAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app, "ann") as made:
        yield made


def client_of(app: FlockAPI, name: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"X-API-Key": KEYS[name]}
    return httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60, headers=headers)


async def send(
    client: httpx.AsyncClient, agent_name: str, content: Any, headers: Any = CSV, **query: Any
) -> httpx.Response:
    query = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in query.items()}
    return await client.post("/run/batch", params={"agent_name": agent_name, **query}, content=content, headers=headers)


async def results(client: httpx.AsyncClient, accepted: httpx.Response) -> list[Any]:
    """Return the result or the error of each item."""
    assert accepted.status_code == 202, accepted.text
    batch = (await client.get(accepted.headers["Location"], params={"wait": 30})).json()
    assert batch["completed_items"] == batch["total_items"]
    found = batch["results"]
    while batch["next"] is not None:
        batch = (await client.get(batch["next"])).json()
        found += batch["results"]
    return [item.get("result", item.get("error")) for item in found]


# CSV


@of_every_engine
async def test_cells_are_converted_to_the_types_of_the_signature(client: httpx.AsyncClient) -> None:
    """Numbers, booleans, dates, lists and objects. A row without a value is skipped."""
    content = (
        "\ufefftext,n,share,is_new,tags,kind,day,more\r\n"
        'a,1,0.5,TRUE,"[""x"", ""y""]",b,2026-01-02,"{""k"": 1}"\r\n'
        ",,,,,,,\r\n"
        "\r\n"
        "12, 7 ,1e3,false,[],a,,\n"
        '"multi\nline, ""quoted"" ünd =1",-3,,,,,,\n'
    )
    found = await results(client, await send(client, "show", content.encode()))
    assert [json.loads(each) for each in found] == [
        ["a", 1, 0.5, True, ["x", "y"], "b", "2026-01-02", {"k": 1}],
        ["12", 7, 1000.0, False, [], "a", None, None],
        ['multi\nline, "quoted" ünd =1', -3, None, None, [], "a", None, None],
    ]
    found = await results(client, await send(client, "need", b"text,n,note\n,1,\nx,2,y\n"))
    assert found == ["1 '' None", "2 'x' 'y'"]


@pytest.mark.parametrize(("delimiter", "name"), [(";", ";"), ("\t", "tab"), ("|", "|")])
async def test_the_delimiter_can_be_chosen(delimiter: str, name: str, client: httpx.AsyncClient) -> None:
    content = delimiter.join(["n", "text", "note"]) + "\n" + delimiter.join(["1", "a,b", "c"])
    assert await results(client, await send(client, "need", content.encode(), delimiter=delimiter)) == ["1 'a,b' 'c'"]


async def test_columns_can_be_renamed_and_gaps_filled(client: httpx.AsyncClient) -> None:
    """A value in a row overrides a static input. An empty cell is a gap."""
    query: Any = {"input_mapping": {"Message": "text"}, "static_inputs": {"n": 5, "note": "all"}}
    found = await results(client, await send(client, "need", b"Message,note\nhi,own\nho,\n", **query))
    assert found == ["5 'hi' 'own'", "5 'ho' 'all'"]


@pytest.mark.parametrize(
    ("agent_name", "content", "query", "errors"),
    [
        pytest.param("need", b"", {}, [("", 1, "The header is missing")], id="empty"),
        pytest.param("need", b"\n\n", {}, [("", 1, "The header is missing")], id="empty lines"),
        pytest.param("show", b"text\n", {}, [("/batch_inputs", None, "at least one item")], id="a header only"),
        pytest.param("show", b"textGreat", {}, [("/textGreat", 1, ""), ("", 1, "use --data-binary")], id="curl -d"),
        pytest.param("show", b"PK\x03\x04 and so on", {}, [("", 1, "an Excel file")], id="xlsx"),
        pytest.param("show", b"\xd0\xcf\x11\xe0 and so on", {}, [("", 1, "an old Excel file")], id="xls"),
        pytest.param("show", b"PAR1\x15 and so on", {}, [("", 1, "a Parquet file")], id="parquet"),
        pytest.param("show", b"\x1f\x8b and so on", {}, [("", 1, "Content-Encoding: gzip")], id="gzip"),
        pytest.param("show", b"text,x\na,1\n", {}, [("/x", 1, "no input 'x'")], id="an unknown column"),
        pytest.param("show", b"text,text\na,1\n", {}, [("/text", 1, "More than one column")], id="a column twice"),
        pytest.param("show", b"text,\na,1\n", {}, [("/", 1, "Column 2 has no name")], id="a column without a name"),
        pytest.param("need", b"n,note\n1,a\n", {}, [("/text", 1, "no column for it")], id="a column is missing"),
        pytest.param(
            "show",
            b"text\na\n",
            {"input_mapping": {"Text": "text"}},
            [("/Text", 1, "the header does not")],
            id="a mapped column is missing",
        ),
        pytest.param(
            "show",
            b'text,n\na,1\n"b\nc",x\n\nd\ne,2,3\nf,1.5\n',
            {},
            [("/n", 3, "got 'str'"), ("", 6, "has 1 cells"), ("", 7, "has 3 cells"), ("/n", 8, "got 'float'")],
            id="rows that do not fit, each with its line",
        ),
        pytest.param("show", b"text,n\na,007\n", {}, [("/n", 2, "got 'str'")], id="not a number"),
        pytest.param("show", b"text,n\na," + b"9" * 5000, {}, [("/n", 2, "")], id="a very long number"),
        pytest.param("show", b"text,tags\na,[1]\n", {}, [("/tags/0", 2, "got 'int'")], id="inside a list"),
        pytest.param("show", b"text\na\n\xff\n", {}, [("", 3, "not UTF-8")], id="not UTF-8"),
        pytest.param("show", b'text\n"a\n', {}, [("", 2, "unexpected end of data")], id="a quote that is not closed"),
        pytest.param("show", b'text\n"a"b\n', {}, [("", 2, "expected after")], id="text after a quote"),
        pytest.param(
            "show",
            b"text\na\nb\n",
            {"static_inputs": {"n": "x"}},
            [("/static_inputs/n", None, "got 'str'")],
            id="a static input is reported once",
        ),
        pytest.param("show", b"text\na\n", {"static_inputs": "[1]"}, [("", None, "JSON object")], id="static inputs"),
        pytest.param("show", b"text\na\n", {"input_mapping": "{"}, [("", None, "JSON object")], id="a mapping"),
        pytest.param(
            "show", b"text\na\n", {"delimiter": "x"}, [("", None, "'delimiter' in the query")], id="a delimiter"
        ),
        pytest.param(
            "show", b"text\na\n", {"parallel": "yes"}, [("", None, "'parallel' in the query")], id="a boolean"
        ),
        pytest.param("show", b"text\na\n", {"workers": "1"}, [("", None, "no parameter")], id="an unknown option"),
        pytest.param("show", b"text\na\n", {"timeout_s": "-1"}, [("", None, "'timeout_s' in the query")], id="a time"),
    ],
)
@pytest.mark.slow
async def test_errors_in_csv_are_reported_with_their_line(
    agent_name: str, content: bytes, query: Any, errors: Any, client: httpx.AsyncClient
) -> None:
    response = await send(client, agent_name, content, **query)
    assert (response.status_code, response.headers["Content-Type"]) == (422, "application/problem+json")
    found = response.json()["errors"]
    assert [(error["pointer"], error.get("line")) for error in found] == [error[:2] for error in errors]
    for error, (*_, words) in zip(found, errors, strict=True):
        assert words in error["detail"]
    assert (await client.get("/batches")).json()["batches"] == []


async def test_an_upload_without_an_agent_is_refused_with_what_to_add(client: httpx.AsyncClient) -> None:
    response = await client.post("/run/batch", content=b"text\na\n", headers=CSV)
    assert response.status_code == 422
    assert response.json()["errors"][0]["detail"] == "'agent_name' is missing in the query. Add ?agent_name="


async def test_at_most_a_hundred_errors_are_reported(client: httpx.AsyncClient) -> None:
    response = await send(client, "show", b"text,n\n" + b"a,x\n" * 2000)
    assert response.status_code == 422
    assert [error["line"] for error in response.json()["errors"]] == list(range(2, 102))


async def test_an_unknown_agent_is_404_for_any_content_type(client: httpx.AsyncClient) -> None:
    for headers in (CSV, NDJSON):
        assert (await send(client, "nobody", b"text\na\n", headers)).status_code == 404


# NDJSON


@of_every_engine
async def test_ndjson_lines_become_items(client: httpx.AsyncClient) -> None:
    """With a BOM, CRLF, empty lines and no final newline, and split into chunks anywhere."""
    content = '\ufeff{"text": "ä", "n": 1}\r\n\r\n  {"text": "b", "more": {"x": 1}}\n{"text":"c"}'.encode()

    async def pieces() -> AsyncIterator[bytes]:
        for byte in content:
            yield bytes([byte])

    for body in (content, pieces()):
        found = await results(client, await send(client, "show", body, NDJSON))
        assert [json.loads(each)[:2] for each in found] == [["ä", 1], ["b", 0], ["c", 0]]


async def test_errors_in_ndjson_are_reported_with_their_line(client: httpx.AsyncClient) -> None:
    lines = [
        b'{"text": "a"}',
        b"[1]",
        b'{"text": 1}',
        b'{"text": "a"',
        b'{"text": "\xff"}',
        b'{"text": "a", "b": 1}',
        b'{"text": "a", "more": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"text": "a"} {}',
    ]
    response = await send(client, "show", b"\n".join(lines), NDJSON)
    assert response.status_code == 422
    found = response.json()["errors"]
    assert [(error["line"], error["pointer"]) for error in found] == [
        (2, ""),
        (3, "/text"),
        (4, ""),
        (5, ""),
        (6, "/b"),
        (7, ""),
        (8, ""),
    ]
    assert "line 1" not in response.text
    accepted = await send(client, "show", b"\n".join(lines), NDJSON, on_invalid="skip")
    batch = (await client.get(accepted.headers["Location"], params={"wait": 30})).json()
    assert (batch["status"], batch["total_items"], batch["failed_items"]) == ("completed", 8, 7)
    assert {item["error_type"] for item in batch["results"][1:]} == {"invalid_input"}


# Transfer


@of_every_engine
async def test_gzip_is_decompressed_as_it_arrives(client: httpx.AsyncClient) -> None:
    """Even in several members, and split into chunks anywhere."""
    packed = gzip.compress(b"n,text,note\n1,a,\n") + gzip.compress(b"2,b,\n")

    async def pieces() -> AsyncIterator[bytes]:
        for byte in packed:
            yield bytes([byte])

    for body in (packed, pieces()):
        accepted = await send(client, "need", body, CSV | {"Content-Encoding": "gzip"})
        assert await results(client, accepted) == ["1 'a' None", "2 'b' None"]


@pytest.mark.parametrize(
    ("content", "encoding", "status", "words"),
    [
        pytest.param(b"text\na\n", "gzip", 422, "cannot be decompressed", id="not gzip"),
        pytest.param(gzip.compress(b"text\na\n" * 99)[:-9], "gzip", 422, "its end is missing", id="truncated"),
        pytest.param(gzip.compress(b"text\n" + b"\n" * 10**7), "gzip", 413, "longer than 400000", id="a bomb"),
        pytest.param(b"text\n" + b"a" * 30_000, "", 413, "longer than 20000 bytes", id="a long row"),
        pytest.param(b'text\n"' + b"a\n" * 60_000, "", 413, "line 2 is longer than 20000", id="an unterminated quote"),
        pytest.param(b"text\n" + b"a\n" * 3001, "", 413, "more than 3000 items", id="many rows"),
        pytest.param(b"text\na\n", "br", 415, "Use gzip", id="another encoding"),
        pytest.param(b"text\na\n", "gzip, gzip", 415, "Use gzip", id="compressed twice"),
    ],
)
async def test_a_body_that_is_too_large_or_cannot_be_decompressed_is_refused(
    content: bytes, encoding: str, status: int, words: str, client: httpx.AsyncClient, app: FlockAPI
) -> None:
    headers = CSV | ({"Content-Encoding": encoding} if encoding else {})
    response = await send(client, "show", content, headers)
    assert response.status_code == status
    assert words in response.json()["detail"]
    assert (await client.get("/batches")).json()["batches"] == []
    if status == 415:
        assert response.headers["Accept-Encoding"] == "gzip, identity"


async def test_a_long_line_of_ndjson_is_refused(client: httpx.AsyncClient) -> None:
    for content in (b'{"text": "' + b"a" * 30_000, b'{}\n{"text": "' + b"a" * 30_000 + b'"}\n{}\n'):
        response = await send(client, "show", content, NDJSON)
        assert response.status_code == 413
        assert f"line {content.count(b'{', 0, 9)} is longer" in response.json()["detail"]


@pytest.mark.parametrize("levels", [100, 101, 950])
async def test_json_in_cells_and_in_the_query_has_the_usual_depth_limit(levels: int, client: httpx.AsyncClient) -> None:
    nested = "[" * (levels - 1) + "]" * (levels - 1)
    cell = await send(client, "nest", f"more\n{'[' + nested + ']'}\n".encode())
    query = await send(client, "nest", b"{}\n", NDJSON, static_inputs=f'{{"more":{nested}}}')
    if levels == 100:
        assert await results(client, cell) == await results(client, query) == [1]
        return
    assert (cell.status_code, query.status_code) == (422, 422)
    assert "nested deeper than 100 levels" in query.text


async def test_static_inputs_count_toward_the_size_limit_in_every_row(client: httpx.AsyncClient) -> None:
    static = {"text": "x" * 1000}
    response = await send(client, "show", b"n\n" + b"1\n" * 1000, static_inputs=static)
    assert response.status_code == 413
    assert "The static inputs of all rows" in response.json()["detail"]


@pytest.mark.parametrize("media_type", [CSV, NDJSON])
@pytest.mark.alone
async def test_a_long_row_in_tiny_chunks_is_read_in_linear_time(media_type: Any) -> None:
    """No chunk makes it scan the row again."""
    row = b'"' + b"a\n" * 60_000 + b'"\n' if media_type is CSV else b'{"text": "' + b"a" * 120_000 + b'"}\n'
    content = (b"text\n" if media_type is CSV else b"") + row

    async def read() -> list[Row]:
        row_mapping = RowMapping(Signature.of("text: str"), None, None, lambda: 0)
        pieces = _in_pieces(content, 1)
        if media_type is CSV:
            rows = csv_rows(pieces, row_mapping, CSVDialect(), max_row_bytes=10**6, max_depth=100)
        else:
            rows = ndjson_rows(pieces, row_mapping, max_row_bytes=10**6, max_depth=50)
        return [row async for row in rows]

    began = time.thread_time()
    assert len(await read()) == 1
    assert time.thread_time() - began < 3


async def test_a_cell_that_is_too_long_for_csv_is_refused_with_a_hint() -> None:
    """Python's reader has a limit, which applies to the whole process."""
    row_mapping = RowMapping(Signature.of("text: str"), None, None, lambda: 0)
    pieces = _in_pieces(b"text\n" + b"a" * 140_000, 10_000)
    rows = csv_rows(pieces, row_mapping, CSVDialect(), max_row_bytes=10**6, max_depth=50)
    with pytest.raises(InvalidData, match=r"line 2: A cell has more than 131,072 characters\. Use NDJSON for longer"):
        _ = [row async for row in rows]


@of_every_engine
async def test_a_stalled_upload_is_dropped(client: httpx.AsyncClient) -> None:
    async def stalls() -> AsyncIterator[bytes]:
        yield b"text\n" + b"a\n" * 1500
        await anyio.sleep(5)
        yield b"a\n"

    response = await send(client, "show", stalls())
    assert response.status_code == 408
    assert response.headers["Connection"] == "close"
    assert (await client.get("/batches")).json()["batches"] == []


@pytest.mark.alone
@pytest.mark.slow
def test_an_interrupted_upload_leaves_nothing() -> None:
    """A real connection ends in the middle. The staged rows are soon deleted."""

    def staged() -> int:
        with contextlib.closing(sqlite3.connect("flock.db")) as db:
            count: int = db.execute("SELECT count(*) FROM runs").fetchone()[0]
            return count

    Path("served.py").write_text("from tests.test_uploads import upload_flock\nflock = upload_flock()\n")
    serve = flockapi_command("serve", "served.py", "--port", "0", "--store", "flock.db")
    with running(*serve, PYTHONPATH=str(ROOT)) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port or 0)) as connection:
            head = "POST /run/batch?agent_name=show HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/csv\r\n"
            connection.sendall(f"{head}Content-Length: 1000000\r\n\r\ntext\r\n".encode() + b"a\r\n" * 100_000)
            wait_until(lambda: staged() > 1000)
            assert httpx.get(f"{server.url}/batches").json()["batches"] == []
        wait_until(lambda: staged() == 0)
        assert httpx.get(f"{server.url}/batches").json()["batches"] == []


def wait_until(is_so: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


@of_every_engine
async def test_repeated_uploads_with_one_key_make_one_batch(client: httpx.AsyncClient) -> None:
    """A different body or option is a different request."""
    headers = CSV | {"Idempotency-Key": "k"}
    first = await send(client, "show", b"text\na\n", headers)
    again = await send(client, "show", b"text\na\n", headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (202, "true")
    assert again.json()["batch_id"] == first.json()["batch_id"]
    for content, query in ((b"text\nb\n", {}), (b"text\na\n", {"max_workers": 9})):
        assert (await send(client, "show", content, headers, **query)).status_code == 422
    assert len(await listed(client, 1)) == 1


# Server files


@pytest.fixture
def folder() -> Path:
    folder = Path("rows")
    (folder / "deep").mkdir(parents=True)
    (folder / "good.csv").write_text("text\na\nb\n")
    (folder / "deep" / "good.csv").write_text("text\nc\n")
    Path("secret.csv").write_text("text\nsecret\n")
    Path("rowsbeside").mkdir()
    for name in ("secret.csv", "good.csv"):
        Path("rowsbeside", name).write_text("text\nsecret\n")
    (folder / "inside.csv").symlink_to("good.csv")
    (folder / "outside.csv").symlink_to(Path("secret.csv").resolve())
    (folder / "out").symlink_to(Path.cwd())
    os.mkfifo(folder / "pipe.csv")
    return folder


async def test_a_long_file_in_csv_dir_is_read(folder: Path, client: httpx.AsyncClient) -> None:
    """It may be longer than ``max_body_bytes``, up to ``max_upload_bytes``."""
    (folder / "long.csv").write_text("text\n" + f"{'x' * 19_000}\n" * 20)
    response = await client.post("/run/batch", json={"agent_name": "show", "batch_inputs": "long.csv"})
    assert len(await results(client, response)) == 20


@pytest.mark.parametrize("name", ["good.csv", "./deep/../good.csv", "inside.csv"])
async def test_a_file_in_csv_dir_is_read(name: str, folder: Path, client: httpx.AsyncClient) -> None:
    response = await client.post("/run/batch", json={"agent_name": "show", "batch_inputs": name})
    assert [json.loads(each)[0] for each in await results(client, response)] == ["a", "b"]


OUTSIDE = [
    *("../secret.csv", "deep/../../secret.csv", "outside.csv", "out/secret.csv", "../rowsbeside/secret.csv"),
    *("/etc/passwd", "pipe.csv", "deep", "", ".", "http://127.0.0.1/x.csv", "file:///etc/passwd", "a\0b", "x" * 5000),
    *("missing.csv", "../missing.csv", "~/x.csv", "\\\\host\\x", "\ud800"),
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.slow
async def test_no_other_file_is_read_or_disclosed(name: str, folder: Path, client: httpx.AsyncClient) -> None:
    body = json.dumps({"agent_name": "show", "batch_inputs": name})
    response = await client.post("/run/batch", content=body, headers={"Content-Type": "application/json"})
    if name == "\ud800":
        assert response.status_code == 400
        return
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["detail"] == "There is no file with that name in the folder that this server reads."
    assert "secret" not in response.text.replace(name, "")


async def test_a_symlink_that_replaces_a_folder_meanwhile_is_not_followed(
    folder: Path, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone with write access swaps it in between the check of the path and the opening of the file."""

    def swap(*args: Any, open_: Any = os.open, **options: Any) -> int:
        if not (folder / "deep").is_symlink():
            (folder / "deep").rename("moved")
            (folder / "deep").symlink_to(Path("rowsbeside").resolve())
        opened: int = open_(*args, **options)
        return opened

    monkeypatch.setattr("flock.files.os.open", swap)
    response = await client.post("/run/batch", json={"agent_name": "show", "batch_inputs": "deep/good.csv"})
    assert (folder / "deep").is_symlink()
    assert response.status_code == 422


async def test_without_csv_dir_no_file_is_read(folder: Path) -> None:
    app = create_app(upload_flock(), store=":memory:")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for name in ("rows/good.csv", "missing.csv", "/etc/passwd", "http://x/y.csv"):
            response = await client.post("/run/batch", json={"agent_name": "show", "batch_inputs": name})
            assert response.status_code == 422
            assert "csv_dir" in response.json()["detail"]


# Downloads


async def finished(client: httpx.AsyncClient, agent_name: str, content: bytes, **query: Any) -> str:
    accepted = await send(client, agent_name, content, **query)
    await results(client, accepted)
    path: str = accepted.headers["Location"] + "/results"
    return path


@of_every_engine
async def test_results_are_downloaded_in_the_requested_format(client: httpx.AsyncClient) -> None:
    path = await finished(client, "fail", b"n\n0\n1\n2\n")
    wanted = [
        {"position": 0, "status": "completed", "inputs": {"n": 0}, "result": {"result": 0}, "error": None},
        {"position": 1, "status": "failed", "inputs": {"n": 1}, "result": None, "error": "=no 1"},
        {"position": 2, "status": "completed", "inputs": {"n": 2}, "result": {"result": 2}, "error": None},
    ]
    for query, accept, kind in (
        ("", "*/*", "application/json"),
        ("", "text/html, */*;q=0.1", "application/json"),
        ("", "application/x-ndjson", "application/x-ndjson"),
        ("", "text/csv", "text/csv; charset=utf-8"),
        ("", "text/*;q=0.5, application/json;q=0.4", "text/csv; charset=utf-8"),
        ("?format=ndjson", "text/csv", "application/x-ndjson"),
    ):
        response = await client.get(path + query, headers={"Accept": accept})
        assert (response.status_code, response.headers["Content-Type"]) == (200, kind)
        assert response.headers["Flock-Run-Status"] == "completed"
        name = re.fullmatch(
            r'attachment; filename="[\w-]+\.(json|ndjson|csv)"', response.headers["Content-Disposition"]
        )
        assert name is not None
        if "csv" in kind:
            assert (
                response.content == b"n,result,status,error\r\n0,0,completed,\r\n1,,failed,'=no 1\r\n2,2,completed,\r\n"
            )
            continue
        found = (
            response.json()
            if kind.endswith("json") and "nd" not in kind
            else map(json.loads, response.text.splitlines())
        )
        assert [{key: item[key] for key in wanted[0]} for item in found] == wanted
    response = await client.get(path, headers={"Accept": "text/html"})
    assert (response.status_code, "text/csv" in response.json()["detail"]) == (406, True)
    assert (await client.get(path, params={"format": "xml"})).status_code == 422
    assert (await client.head(path)).headers["Content-Type"] == "application/json"
    assert (await client.get(path, params={"status": "failed", "format": "csv"})).text.splitlines()[1:] == [
        "1,,failed,'=no 1"
    ]
    assert (await client.get(path, params={"status": "cancelled"})).json() == []
    for sent, positions in (({"after": 0}, [1, 2]), ({"after": 0, "limit": 1}, [1]), ({"limit": 2}, [0, 1])):
        assert [item["position"] for item in (await client.get(path, params=sent)).json()] == positions
    assert (await client.get(path, params={"limit": 0})).status_code == 422
    assert "\n1,,failed,=no 1" in (await client.get(path, params={"escape_formulas": "false", "format": "csv"})).text


async def test_formulas_are_escaped_in_csv(client: httpx.AsyncClient) -> None:
    """Numbers stay numbers, even negative ones."""
    texts = ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "a=1", ""]
    rows = io.StringIO()
    csv.writer(rows).writerows([["text", "n"], *([text, -5] for text in texts)])
    path = await finished(client, "show", rows.getvalue().encode())
    table = list(csv.reader(io.StringIO((await client.get(path, params={"format": "csv"})).text, newline="")))
    assert [row[:2] for row in table[1:]] == [[f"'{text}", "-5"] for text in texts[:6]] + [["a=1", "-5"], ["", "-5"]]


async def test_an_agent_without_inputs_has_no_input_columns() -> None:
    flock = Flock()

    @flock.agent
    async def roll() -> int:
        return 4

    app = create_app(flock, store=":memory:")
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            path = await finished(client, "roll", b"{}\n", headers=NDJSON)
            assert (await client.get(path, params={"format": "csv"})).text == "result,status,error\r\n4,completed,\r\n"


@of_every_engine
async def test_long_items_are_read_a_few_at_a_time(folder: Path, app: FlockAPI, client: httpx.AsyncClient) -> None:
    """An unread download holds its page three times, and formatting a page as CSV blocks other requests."""
    app.options = msgspec.structs.replace(app.options, max_upload_bytes=2_000_000)
    (folder / "long.csv").write_text("text\n" + f"{'x' * 18_000}\n" * 60)
    accepted = await client.post("/run/batch", json={"agent_name": "show", "batch_inputs": "long.csv"})
    page = (await client.get(accepted.headers["Location"], params={"wait": 30})).json()
    assert page["completed_items"] == 60
    assert 20 < len(page["results"]) < 40


async def test_columns_with_the_same_name_get_a_prefix() -> None:
    """For inputs, outputs of the last of several agents, status and error."""
    flock = Flock()
    flock.add_agent(FlockFactory.create_default_agent("never", input="a: int", output="b: str"))

    @flock.agent(next_agent="second", output="text: str, n: int")
    def first(text: str, status: int) -> Any:
        return {"text": text, "n": 1}

    @flock.agent(output="text: str, error: str, status: int, extra: list[int]")
    async def second(text: str, n: int) -> Any:
        return {"text": text.upper(), "error": "", "status": 7, "extra": [1, 2]}

    @flock.agent(next_agent=lambda result: "second")
    def decides(text: str) -> int:
        return 1

    app = create_app(flock, store=":memory:")
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            path = await finished(client, "first", b"text,status\na,3\n")
            lines = (await client.get(path, params={"format": "csv"})).text.splitlines()
            assert lines == [
                "text,status,result.text,error,result.status,extra,run.status,run.error",
                'a,3,A,,7,"[1,2]",completed,',
            ]
            path = await finished(client, "decides", b"text\na\n")
            assert (await client.get(path, params={"format": "csv"})).text.splitlines()[0] == "text,result,status,error"


async def test_an_invalid_time_is_reported_with_a_valid_example_in_json_and_csv() -> None:
    flock = Flock()

    @flock.agent
    def remind(at: datetime, every: timedelta) -> None: ...

    app = create_app(flock, store=":memory:")
    errors = [
        'Invalid RFC3339 encoded datetime. Write a datetime like "2026-11-30T14:30:00Z".',
        "Expected 'duration', got 'int'. Write a duration like \"PT1H30M\".",
    ]
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            inputs = {"at": "tomorrow", "every": 5}
            of_json = await client.post("/run/flock", json={"agent_name": "remind", "inputs": inputs})
            of_csv = await send(client, "remind", b"at,every\ntomorrow,5\n")
    for response in (of_json, of_csv):
        assert response.status_code == 422
        assert [error["detail"] for error in response.json()["errors"]] == errors


class Verdict(TypedDict):
    verdict: Literal["yes", "no"]
    because: str


async def test_columns_are_in_declaration_order() -> None:
    """Even if the function fills its TypedDict in another order."""
    flock = Flock()

    @flock.agent
    def judge(text: str, count: int) -> Verdict:
        return {"because": text, "verdict": "yes"}

    app = create_app(flock, store=":memory:")
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            path = await finished(client, "judge", b"text,count\na,3\n")
            lines = (await client.get(path, params={"format": "csv"})).text.splitlines()
            shown = (await client.get("/agents/judge")).json()["output_schema"]["properties"]
    assert lines == ["text,count,verdict,because,status,error", "a,3,yes,a,completed,"]
    assert list(shown) == ["verdict", "because"]


@pytest.mark.slow
async def test_results_of_a_running_batch_can_be_downloaded_and_an_aborted_download_is_incomplete() -> None:
    """A download has the items that have ended. If the batch is deleted meanwhile, the download is aborted."""
    flock, may_go = Flock(), anyio.Event()

    @flock.agent
    async def wait(n: int) -> int:
        if n == 2:
            await may_go.wait()
        return n

    app = create_app(flock, store="flock.db")
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            rows = b"n\n" + b"".join(b"%d\n" % n for n in range(1200))
            accepted = await send(client, "wait", rows)
            path = accepted.headers["Location"]
            with anyio.fail_after(PATIENCE_S):
                query = {"results": "false"}
                while (await client.get(path, params=query)).json()["completed_items"] < 1199:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            response = await client.get(f"{path}/results")
            assert response.headers["Flock-Run-Status"] == "running"
            assert [item["position"] for item in response.json()] == [n for n in range(1200) if n != 2]
            may_go.set()
            assert (await client.get(path, params={"wait": 20})).json()["status"] == "completed"

            deleted = False

            async def delete_after_a_page(*args: Any, **options: Any) -> Any:
                nonlocal deleted
                if deleted:
                    await app.engine.delete_batch(path.rpartition("/")[2])
                deleted = True
                return await get_items(*args, **options)

            get_items, app.engine.get_items = app.engine.get_items, delete_after_a_page  # type: ignore[method-assign]
            with pytest.raises(RuntimeError, match="response already started"):
                await client.get(f"{path}/results")


@of_every_engine
async def test_a_page_of_results_links_to_the_next_one(client: httpx.AsyncClient) -> None:
    accepted = await send(client, "fail", b"n\n0\n1\n2\n3\n4\n", box_results="false", return_errors="false")
    await client.get(accepted.headers["Location"], params={"wait": 20})
    found, path = [], f"{accepted.headers['Location']}?limit=2"
    while path:
        page = (await client.get(path)).json()
        found += page["results"]
        path = page["next"]
    assert found == [0, None, 2, None, 4]
    assert "results" not in (await client.get(accepted.headers["Location"], params={"results": "false"})).json()


@of_every_engine
async def test_batches_of_other_principals_are_not_found(app: FlockAPI) -> None:
    """On any route of a batch."""
    async with client_of(app, "ann") as ann, client_of(app, "bob") as bob:
        accepted = await send(ann, "fail", b"n\n0\n1\n")
        path = accepted.headers["Location"]
        await results(ann, accepted)
        for method, below in (
            *(("GET", each) for each in ("", "?wait=1", "/results", "/results?format=csv", "/events")),
            *(("POST", each) for each in ("/cancel", "/retry")),
            ("DELETE", ""),
        ):
            assert (await bob.request(method, path + below)).status_code == 404
        assert await listed(ann, 1) == [path[7:]]
        assert await listed(bob, 0) == []
        assert (await ann.post(f"{path}/retry", json={"only": "failed"})).status_code == 202
        await ann.get(path, params={"wait": 20})
        assert (await ann.delete(path)).status_code == 204
        assert (await ann.get(path)).status_code == 404


async def listed(client: httpx.AsyncClient, count: int) -> list[str]:
    """Return the listed batches when there are at least *count*, because the search of a cluster lags behind."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            found = [each["batch_id"] for each in (await client.get("/batches")).json()["batches"]]
            if len(found) >= count:
                return found
            await anyio.sleep(0.05)


@of_every_engine
async def test_lists_of_batches_are_paged_by_links(client: httpx.AsyncClient) -> None:
    made = [(await send(client, "fail", b"n\n0\n")).json()["batch_id"] for _ in range(5)]
    await listed(client, 5)
    found, path = [], "/batches?limit=2&agent_name=fail"
    while path:
        response = await client.get(path)
        found += [batch["batch_id"] for batch in response.json()["batches"]]
        path = response.json()["next"]
        assert response.headers.get("Link") == (path and f'<{path}>; rel="next"')
    assert found == made[::-1]


@pytest.mark.parametrize(
    ("accept", "best"),
    [
        ("", "a/x"),
        ("*/*", "a/x"),
        ("b/*", "b/y"),
        ("a/x;q=0.1, b/y", "b/y"),
        ("a/*;q=0.9, a/x;q=0, b/y;q=0.2", "b/y"),
        ("A/X", "a/x"),
        ("c/z", None),
        ("a/x;q=0", None),
        ("a/x;q=nonsense", "a/x"),
        (",;,", None),
    ],
)
def test_a_client_gets_its_preferred_media_type(accept: str, best: str | None) -> None:
    assert preferred(accept, ["a/x", "b/y"]) == best


# Arbitrary input


class Read(msgspec.Struct):
    """The outcome of one body: rows, or an error that is an expected answer."""

    rows: list[Any] | None
    error: FlockError | None = None


async def _in_pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for begin in range(0, len(content), size):
        yield content[begin : begin + size]


async def _read(rows: AsyncIterator[Row]) -> Read:
    try:
        read = [row async for row in rows]
    except (InvalidData, TooLarge) as exc:
        return Read(rows=None, error=exc)
    errors: list[FieldError] = [error for row in read for error in row.errors]
    members = [{**msgspec.json.decode(row.inputs), **_decoded(row.extra)} for row in read]
    return Read(rows=members, error=InvalidData(errors) if errors else None)


def _decoded(extra: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    return {name: msgspec.json.decode(value) for name, value in extra.items()}


TWO_TEXTS = Signature.of("a: str, b: str")
PIECES = st.integers(min_value=1, max_value=40)
#: Cells and separators that make most bodies almost valid CSV.
CELLS = st.sampled_from(
    [
        "a",
        "b",
        "x",
        "",
        " ",
        '"',
        '""',
        '"x"',
        '"x,y"',
        '"x\ny"',
        '"x""y"',
        "ä",
        "😀",
        "\x00",
        "\x0b",
        "\x1c",
        "\u2028",
        "1",
        "'",
    ]
)
ENDS = st.sampled_from(["\n", "\r\n", "\r", ",", ",", ",", ",,", "\n\n", ""])
BODIES = st.one_of(
    st.lists(st.tuples(CELLS, ENDS), max_size=25).map(
        lambda parts: "a,b\n" + "".join(cell + end for cell, end in parts)
    ),
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=8).map(
        lambda rows: _as_csv([("a", "b"), *rows])
    ),
    st.text(max_size=40).map(lambda text: f"a,b\r\n{text}"),
    st.text(max_size=20),
)


def _as_csv(rows: Any) -> str:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


@settings(max_examples=EXAMPLES)
@given(
    text=BODIES,
    size=PIECES,
    encoding=st.sampled_from(["utf-8", "utf-16", "cp1252", "gb18030"]),
    on_extra=st.sampled_from(["reject", "keep"]),
)
@pytest.mark.slow
def test_any_csv_is_refused_or_read_as_python_reads_it(text: str, size: int, encoding: str, on_extra: Any) -> None:
    """Either exactly its rows, with chunks split anywhere, or an error with a line. A row without a value is {}."""
    if encoding == "cp1252":
        text = text.encode(encoding, "ignore").decode(encoding)
    content = text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")
    row_mapping = RowMapping(TWO_TEXTS, None, None, lambda: 10**6, on_extra=on_extra)
    dialect = CSVDialect(encoding=encoding)

    async def read() -> Read:
        return await _read(
            csv_rows(_in_pieces(content, size), row_mapping, dialect, max_row_bytes=10_000, max_depth=100)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GATHERED_CHARS", size)
        found = anyio.run(read)
    if found.error is not None:
        assert isinstance(found.error, InvalidData)
        assert all(isinstance(error.line, int) and error.line >= 1 for error in found.error.errors)
        return
    text = content.decode(encoding).removeprefix("\ufeff")
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    names = [name.strip() for name in header]
    has_value = [any(cell.strip() for cell in row) for row in rows]
    assert found.rows == [dict(zip(names, row, strict=True)) if has_value[at] else {} for at, row in enumerate(rows)]


@given(
    sign=st.sampled_from(["", "-"]),
    whole=st.integers(0, 10**20),
    fraction=st.from_regex(r"([0-9]{1,5})?", fullmatch=True),
)
def test_a_number_is_read_as_it_is_written_or_refused(sign: str, whole: int, fraction: str) -> None:
    """Neither dialect confuses a thousands separator with a decimal sign."""
    dot, comma = CSVDialect(), CSVDialect(decimal=",")
    written = f"{sign}{whole}.{fraction}" if fraction else f"{sign}{whole}"
    assert dot.json_number(written) == comma.json_number(written.replace(".", ",")) == written
    grouped = f"{sign}{whole:,}" + (f".{fraction}" if fraction else "")
    swapped = grouped.translate(str.maketrans(".,", ",."))
    for dialect, text in ((dot, grouped), (dot, swapped), (comma, grouped), (comma, swapped)):
        if {",", "."} & set(text) - {dialect.decimal} or text.count(dialect.decimal) > 1:
            with pytest.raises(ValueError, match=r"[Ww]rite"):
                dialect.json_number(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
LINES = st.one_of(
    st.dictionaries(st.text(max_size=3), VALUES, max_size=3).map(json.dumps),
    VALUES.map(json.dumps),
    st.text(alphabet='{}[]":,1a \\\t', max_size=12),
)


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(lines=st.lists(LINES, max_size=6), end=st.sampled_from(["\n", "\r\n", "\n\n"]), size=PIECES)
def test_any_ndjson_is_refused_or_read_as_python_reads_it(lines: list[str], end: str, size: int) -> None:
    content = end.join(lines).encode()

    async def read() -> Read:
        row_mapping = RowMapping(Signature.of(""), None, None, lambda: 10**6, on_extra="keep")
        return await _read(ndjson_rows(_in_pieces(content, size), row_mapping, max_row_bytes=10_000, max_depth=50))

    found = anyio.run(read)
    texts = [line for line in lines if line.strip()]
    if found.error is not None:
        assert isinstance(found.error, InvalidData)
        for error in found.error.errors:
            assert isinstance(error.line, int)
            assert not _is_object(content.decode().split("\n")[error.line - 1])
        return
    assert found.rows == [json.loads(text) for text in texts]


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False

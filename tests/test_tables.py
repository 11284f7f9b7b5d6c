"""Real-world tables, read the same way by a program, by the command and over HTTP."""

import csv
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from click.testing import CliRunner

from flock.agents.signature import Signature
from flock.command.cli import main
from flock.core import Flock
from flock.errors import AgentError, DefinitionError, FieldError, InvalidData
from flock.rows.dialect import ENCODINGS, CSVDialect
from flock.rows.tables import RowMapping, csv_rows
from flock.runs import Engine
from flockapi import FlockAPI, create_app
from tests.support import ROOT
from tests.support.cluster import engine_for

TARGET = "from tests.test_tables import table_flock\nflock = table_flock()\n"


def table_flock() -> Flock:
    flock = Flock("tables")

    @flock.agent
    async def show(text: str, price: float = 0, n: int | None = None) -> str:
        if text == "bad":
            raise AgentError("=bad")
        return f"{text} {price} {n}"

    @flock.agent
    async def optional(text: str = "none") -> str:
        return text

    @flock.agent(output="title: str, score: int")
    async def rate(text: str) -> Any:
        return {"title": text.title(), "score": len(text)}

    return flock


# The three interfaces. Each returns the results, or raises InvalidData or DefinitionError.


def by_program(name: str, content: bytes, agent: str, options: dict[str, Any]) -> list[Any]:
    Path(name).write_bytes(content)
    return table_flock().run_batch(agent, name, **options)


def by_command(name: str, content: bytes, agent: str, options: dict[str, Any]) -> list[Any]:
    Path(name).write_bytes(content)
    Path("target.py").write_text(TARGET)
    given = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    result = CliRunner().invoke(main, ["batch", "target.py", agent, name, "-o", "out.ndjson", *given])
    if Path("out.ndjson").exists():
        items = map(json.loads, Path("out.ndjson").read_text().splitlines())
        return [{**item.get("extra", {}), **(item["result"] or _failure(item))} for item in items]
    if result.exit_code == 2:
        raise DefinitionError(result.output)
    lines = result.output.splitlines()
    assert lines[0] == f"Error: Nothing was started, since {name} is invalid:"
    raise InvalidData([FieldError(detail=line, pointer="") for line in lines[1:] if line.startswith("  ")])


def _failure(item: Any) -> Any:
    return {"error": item["error"], "error_type": item["error_type"]}


def over_http(name: str, content: bytes, agent: str, options: dict[str, Any]) -> list[Any]:
    media_type = "text/csv" if name.endswith("csv") else "application/x-ndjson"

    async def ask() -> httpx.Response:
        app = create_app(table_flock(), store=":memory:")
        async with app.lifespan(), client_of(app) as client:
            query = {"agent_name": agent, **options}
            headers = {"Content-Type": media_type}
            response = await client.post("/run/batch", params=query, content=content, headers=headers)
            if response.status_code == 202:
                response = await client.get(response.headers["Location"], params={"wait": 20})
            return response

    response = anyio.run(ask)
    if response.status_code == 200:
        found: list[Any] = response.json()["results"]
        return found
    assert response.status_code == 422
    raise InvalidData([FieldError(**error) for error in response.json()["errors"]])


Interface = Callable[[str, bytes, str, dict[str, Any]], list[Any]]
by_each_interface = pytest.mark.parametrize("interface", [by_program, by_command, over_http])


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.delitem(sys.modules, "target", raising=False)


def client_of(app: FlockAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://t", timeout=60)


# CSV dialects


@by_each_interface
@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        pytest.param(b"text;price\na;1\n", {"delimiter": ";"}, "a 1.0 None", id="semicolons"),
        pytest.param(b"text\tprice\na\t1\n", {"delimiter": "\t"}, "a 1.0 None", id="tabs"),
        pytest.param(b"text;price\na;0,19\n", {"delimiter": ";", "decimal": ","}, "a 0.19 None", id="decimal comma"),
        pytest.param(b'text,price\na,"-1,5e2"\n', {"decimal": ","}, "a -150.0 None", id="decimal comma in quotes"),
        pytest.param(b"text;price;n\na;12;3\n", {"delimiter": ";", "decimal": ","}, "a 12.0 3", id="whole numbers"),
        pytest.param(b"text\ncaf\xe9 \x80\n", {"encoding": "windows-1252"}, "café € 0 None", id="windows-1252"),
        pytest.param(b"text\ncaf\xe9\n", {"encoding": "ISO-8859-1"}, "café 0 None", id="latin-1"),
        pytest.param("text\ncafé €\n".encode("utf-16"), {"encoding": "utf-16"}, "café € 0 None", id="utf-16"),
        pytest.param("text\n日本\n".encode("shift_jis"), {"encoding": "sjis"}, "日本 0 None", id="shift-jis"),
        pytest.param(
            "\ufefftext\ncafé\n".encode("utf-16-be"), {"encoding": "UTF-16BE"}, "café 0 None", id="utf-16-be with a BOM"
        ),
        pytest.param("\ufefftext\nä\n".encode(), {"encoding": "UTF8"}, "ä 0 None", id="utf-8"),
        pytest.param(b"Text, PRICE \na,1\n", {}, "a 1.0 None", id="other letter case"),
        pytest.param(b"TEXT,price,Price\na,1,2\n", {"on_extra": "ignore"}, "a 1.0 None", id="an exact match wins"),
    ],
)
@pytest.mark.slow
def test_a_table_is_read_in_the_given_dialect(
    content: bytes, options: dict[str, str], expected: str, interface: Interface
) -> None:
    assert interface("rows.csv", content, "show", options) == [{"result": expected}]


SAVE = 'Save the file as "CSV UTF-8"'
MANY = 50


@by_each_interface
@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        pytest.param(
            b"text;price\na;1\n", {}, 'separated by semicolons, not commas. Read it with delimiter=";"', id=";"
        ),
        pytest.param(b'"text";"price"\n"a";"1"\n', {}, 'delimiter=";" (--delimiter ";", ?delimiter=%3B)', id="quoted"),
        pytest.param(b"text\tprice\na\t1\n", {}, r'delimiter="\t" (--delimiter "\t", ?delimiter=%09)', id="tab"),
        pytest.param(b"text|price\na|1\n", {}, 'separated by bars, not commas. Read it with delimiter="|"', id="|"),
        pytest.param(b"text,price\na,1\n", {"delimiter": ";"}, 'by commas, not semicolons. Read it with delimiter=","'),
        pytest.param(b"Id;Text;a,b\n1;a;b\n", {"on_extra": "keep"}, 'Read it with delimiter=";"', id="also if kept"),
        pytest.param(b"text\n\xe9\n", {}, "This is not UTF-8. " + SAVE, id="latin-1"),
        pytest.param(b"text\n\xe9\n", {}, 'encoding="cp1252" (--encoding "cp1252", ?encoding=cp1252)', id="and how"),
        pytest.param(
            "text\na\n".encode("utf-16"), {}, f'it looks like UTF-16. {SAVE}, or read it with encoding="utf-16"'
        ),
        pytest.param("text\na\n".encode("utf-16-le"), {}, f'UTF-16. {SAVE}, or read it with encoding="utf-16-le"'),
        pytest.param("text\na\n".encode("utf-16-be"), {}, f'UTF-16. {SAVE}, or read it with encoding="utf-16-be"'),
        pytest.param("text\na\n".encode("utf-16-be"), {"encoding": "utf-16"}, f"This is not utf-16. {SAVE}"),
        pytest.param(b"text\n\x81\n", {"encoding": "cp1252"}, f"This is not cp1252. {SAVE}", id="not cp1252"),
        pytest.param(
            b"text;price\n" + b"a;0,19\nb;0,2\n" * MANY,
            {"delimiter": ";"},
            'has a decimal comma. Write it with a point, or read the file with decimal="," (--decimal ","',
            id="decimal comma",
        ),
        pytest.param(
            b"text,n\na," + b'"0,5"\n', {}, "This number has a decimal comma", id="decimal comma of an integer"
        ),
        pytest.param(b'text,price\na,"1,234"\n', {}, "may be a decimal comma or a thousands separator", id="1,234"),
        pytest.param(b'text,price\na,"1,234.50"\n', {}, "thousands separators. Write it without", id="1,234.50"),
        pytest.param('text,price\na,"1\u202f234"\n'.encode(), {}, "thousands separators", id="1 234"),
        pytest.param(b"text;price\na;1.234,5\n", {"delimiter": ";", "decimal": ","}, "such as 1234,5", id="1.234,5"),
        pytest.param(
            b"text;price\na;1.234\n", {"delimiter": ";", "decimal": ","}, "has a point, but decimal=", id="1.234"
        ),
        pytest.param(b"text;n\na;1.5\n", {"delimiter": ";", "decimal": ","}, "has a point, but decimal=", id="1.5"),
        pytest.param(b"text,price\na,0,19\n", {}, "Put a cell that contains ',' in quotes.", id="no quotes"),
        pytest.param(b"txt\n" + b"a\n" * MANY, {}, "There is no input 'txt'. Did you mean 'text'?", id="a typo"),
        pytest.param(
            b"txt\n" + b"a\n" * MANY, {"on_extra": "keep"}, "Did you mean 'text'?", id="a typo in a required input"
        ),
        pytest.param(
            b"text,id\na,1\n", {}, 'Set on_extra="keep" (--on-extra keep) to copy it to the results', id="an id"
        ),
        pytest.param(b"review\na\n", {"on_extra": "ignore"}, "(--map COLUMN=text)", id="a column is missing"),
        pytest.param(b"text,Price,PRICE\na,1,2\n", {}, "no input 'Price'. Did you mean 'price'?", id="ambiguous"),
    ],
)
@pytest.mark.slow
def test_a_mistake_in_all_rows_is_reported_once_with_its_fix(
    content: bytes, options: dict[str, str], words: str, interface: Interface
) -> None:
    with pytest.raises(InvalidData) as raised:
        interface("rows.csv", content, "show", options)
    details = [error.detail for error in raised.value.errors]
    assert words in details[0]
    assert len(details) == (2 if "PRICE" in content.decode("latin-1") else 1)


@by_each_interface
@pytest.mark.parametrize("options", [{}, {"on_extra": "ignore"}, {"on_extra": "keep"}])
def test_an_unknown_member_of_many_rows_is_reported_once(options: dict[str, str], interface: Interface) -> None:
    with pytest.raises(InvalidData) as raised:
        interface("rows.ndjson", b'{"txt": "a"}\n' * MANY, "show", options)
    (error,) = raised.value.errors
    assert "There is no input 'txt'. Did you mean 'text'?" in error.detail


@pytest.mark.parametrize(("interface", "mapping"), [(by_program, {"line": "txt"}), (over_http, '{"line": "txt"}')])
def test_a_mapping_to_an_unknown_input_is_reported_once(interface: Interface, mapping: Any) -> None:
    for name, content in (("rows.ndjson", b'{"line": "a"}\n' * MANY), ("rows.csv", b"line\n" + b"a\n" * MANY)):
        with pytest.raises(InvalidData) as raised:
            interface(name, content, "optional", {"input_mapping": mapping, "on_extra": "keep"})
        (error,) = raised.value.errors
        assert "There is no input 'txt'. Did you mean 'text'?" in error.detail


def test_other_errors_of_rows_with_an_unknown_member_are_reported_too() -> None:
    rows = [{"txt": "a", "price": "x"}, {"txt": "b", "n": "y"}]
    with pytest.raises(InvalidData) as raised:
        table_flock().run_batch("show", rows)
    pointers = [error.pointer for error in raised.value.errors]
    assert pointers == ["/batch_inputs/0/txt", "/batch_inputs/0/price", "/batch_inputs/1/n"]


@by_each_interface
@pytest.mark.parametrize(
    "encoding", ["rot13", "zlib", "bz2", "idna", "utf-7", "unicode_escape", "undefined", "ü" * 200]
)
def test_only_text_codecs_are_accepted_and_others_are_not_looked_up(encoding: str, interface: Interface) -> None:
    """Python caches each codec name that it looks up, even an unknown one."""
    before = set(sys.modules)
    with pytest.raises(
        (DefinitionError, InvalidData), match="encoding must be one of utf-8, utf-8-sig, utf-16, utf-16-le"
    ):
        interface("rows.csv", b"text\na\n", "show", {"encoding": encoding})
    assert not {name for name in set(sys.modules) - before if name.startswith("encodings.")}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.slow
def test_each_encoding_can_be_read_in_chunks(encoding: str, size: int) -> None:
    text = "text\r\n" + "".join(f'"{n}\nhello, world"\r\n' for n in range(300))
    content = text.encode(encoding)

    async def read() -> list[Any]:
        async def pieces() -> AsyncIterator[bytes]:
            for begin in range(0, len(content), size):
                yield content[begin : begin + size]

        row_mapping = RowMapping(Signature.of("text: str"), None, None, lambda: 0)
        dialect = CSVDialect(encoding=encoding)
        rows = csv_rows(pieces(), row_mapping, dialect, max_row_bytes=1000, max_depth=10)
        return [(row.line, json.loads(bytes(row.inputs))["text"]) async for row in rows]

    assert anyio.run(read) == [(2 + 2 * n, f"{n}\nhello, world") for n in range(300)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"delimiter": ";;"}, "delimiter must be one character"),
        ({"decimal": "'"}, 'decimal must be "." or ","'),
        ({"on_extra": "drop"}, "on_extra= must be one of reject, ignore, keep, not 'drop'"),
    ],
)
def test_an_invalid_option_is_refused(options: Any, words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        table_flock().run_batch("show", [{"text": "a"}], **options)


@pytest.fixture
def folder() -> str:
    Path("folder").mkdir()
    Path("folder/rows.csv").write_bytes("id;Text;Price\n007;é;0,5\n".encode("cp1252"))
    return "folder"


@pytest.mark.anyio
async def test_a_server_file_is_read_with_the_options_of_the_body(folder: str) -> None:
    app = create_app(table_flock(), store=":memory:", csv_dir=folder)
    async with app.lifespan(), client_of(app) as client:
        options = {"delimiter": ";", "decimal": ",", "encoding": "cp1252", "on_extra": "keep"}
        body = {"agent_name": "show", "batch_inputs": "rows.csv"}
        accepted = await client.post("/run/batch", json=body | options)
        batch = (await client.get(accepted.headers["Location"], params={"wait": 20})).json()
        assert batch["results"] == [{"id": "007", "result": "é 0.5 None"}]
        refused = await client.post("/run/batch", json=body | options | {"encoding": "utf-8"})
        assert (refused.status_code, refused.json()["errors"][0]["line"]) == (422, 2)


@pytest.mark.alone
def test_many_unknown_columns_are_checked_in_linear_time() -> None:
    """With a header of a megabyte, which any client can send."""
    names = [f"text{n}" for n in range(100_000)]

    async def read(on_extra: Any) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            yield ",".join(names).encode() + b"\n"

        row_mapping = RowMapping(Signature.of("text: str"), None, None, lambda: 0, on_extra=on_extra)
        async for _ in csv_rows(pieces(), row_mapping, CSVDialect(), max_row_bytes=10**7, max_depth=10):
            pass

    for on_extra in ("reject", "ignore", "keep"):
        began = time.thread_time()
        with pytest.raises(InvalidData):
            anyio.run(read, on_extra)
        assert time.thread_time() - began < 5


# Columns that are not inputs


KEPT = [
    ("0042", "a"),
    ("12345678901234567890", "a"),
    ("1.10", "a"),
    (" x ", "a"),
    ("", "bad"),
    ('=1+"1"', "a"),
    ("+49 170", "a"),
    ("-5,5", "a"),
    ("'-5", "a"),
    ("null", "bad"),
]


def _as_csv(rows: Any) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def _result(text: str) -> dict[str, Any]:
    failure = {"error": "=bad", "error_type": "agent_error"}
    return failure if text == "bad" else {"result": f"{text} 0 None"}


@by_each_interface
def test_kept_cells_are_unchanged_and_precede_the_outputs(interface: Interface) -> None:
    content = _as_csv([["Id", "text", "Notes"], *([id_, text, id_] for id_, text in KEPT)])
    found = interface("rows.csv", content, "show", {"on_extra": "keep"})
    assert found == [{"Id": id_, "Notes": id_, **_result(text)} for id_, text in KEPT]
    assert list(found[0]) == ["Id", "Notes", "result"]


@by_each_interface
def test_extra_columns_and_members_are_dropped_on_request(interface: Interface) -> None:
    """Including a column without a name, and two with the same name."""
    content = b"id,text,,x,x,error\n1,a,2,3,4,5\n"
    assert interface("rows.csv", content, "show", {"on_extra": "ignore"}) == [{"result": "a 0 None"}]
    line = b'{"id": 1, "text": "a", "error": [1e400]}\n'
    assert interface("rows.ndjson", line, "show", {"on_extra": "ignore"}) == [{"result": "a 0 None"}]


@by_each_interface
def test_kept_members_of_ndjson_are_unchanged(interface: Interface) -> None:
    """They can be of any type and differ from row to row."""
    extras: list[Any] = [{"id": 12345678901234567890, "more": {"a": [1, None]}}, {}, {"x": "é", "id": None}]
    content = "\n".join(json.dumps({"text": "a", **extra}) for extra in extras).encode()
    found = interface("rows.ndjson", content, "show", {"on_extra": "keep"})
    assert found == [{**extra, "result": "a 0 None"} for extra in extras]


@by_each_interface
@pytest.mark.parametrize("name", ["title", "score", "error", "error_type"])
@pytest.mark.slow
def test_a_column_with_the_name_of_an_output_is_refused(name: str, interface: Interface) -> None:
    for file, content in (
        ("rows.csv", f"text,{name}\na,1\n".encode()),
        ("rows.ndjson", json.dumps({"text": "a", name: 1}).encode()),
    ):
        with pytest.raises(InvalidData, match=f"'{name}' cannot be kept: results have a member of that name"):
            interface(file, content, "rate", {"on_extra": "keep"})


def test_no_output_name_can_be_kept_if_the_last_agent_is_chosen_at_run_time() -> None:
    flock = table_flock()

    @flock.agent(next_agent=lambda result: "rate")
    async def decides(text: str) -> str:
        return text

    with pytest.raises(InvalidData, match="'score' cannot be kept"):
        flock.run_batch("decides", [{"text": "a", "score": 1}], on_extra="keep")
    found = flock.run_batch("decides", [{"text": "a", "id": 1}], on_extra="keep")
    assert found == [{"id": 1, "title": "A", "score": 1}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"text,\na,1\n", "Column 2 has no name"),
        (b"text,id,id\na,1,2\n", "More than one column is named 'id'"),
    ],
)
def test_an_unnamed_or_duplicate_column_cannot_be_kept(content: bytes, words: str) -> None:
    Path("rows.csv").write_bytes(content)
    with pytest.raises(InvalidData, match=words):
        table_flock().run_batch("show", "rows.csv", on_extra="keep")


def test_a_number_out_of_range_cannot_be_kept() -> None:
    Path("rows.ndjson").write_text('{"text": "a", "id": [1e400]}\n{"text": "b", "id": 1}\n')
    with pytest.raises(InvalidData, match=r"line 1 /id/0: This number is out of range"):
        table_flock().run_batch("show", "rows.ndjson", on_extra="keep")
    found = table_flock().run_batch("show", "rows.ndjson", on_extra="keep", on_invalid="skip")
    assert [item.get("error_type") for item in found] == ["invalid_input", None]


def test_a_result_stays_unboxed_only_without_kept_columns() -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "id": 1}, {"text": "b"}]
    found = table_flock().run_batch("show", rows, on_extra="keep", box_results=False)
    assert found == [{"id": 1, "result": "a 0 None"}, "b 0 None"]


of_every_engine = pytest.mark.parametrize("engine", ["embedded", "temporal"], indirect=True)


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    async with engine_for(request, table_flock(), store="flock.db", max_input_bytes=1_000_000) as engine:
        yield engine


@pytest.mark.anyio
@of_every_engine
async def test_kept_columns_are_in_all_results_and_survive_a_retry(engine: Engine) -> None:
    """In a page, in a download of each format, and for an item that fails twice."""
    app = create_app(table_flock(), engine=engine)
    content = _as_csv([["Id", "text", "status"], *([id_, text, "s"] for id_, text in KEPT)])
    async with app.lifespan(), client_of(app) as client:
        query = {"agent_name": "show", "on_extra": "keep"}
        accepted = await client.post("/run/batch", params=query, content=content, headers={"Content-Type": "text/csv"})
        path = accepted.headers["Location"]
        for attempt in (1, 2):
            batch = (await client.get(path, params={"wait": 30})).json()
            assert (batch["status"], batch["attempt"], batch["failed_items"]) == ("completed", attempt, 2)
            assert batch["results"] == [{"Id": id_, "status": "s", **_result(text)} for id_, text in KEPT]
            items = (await client.get(f"{path}/results")).json()
            assert [item["extra"] for item in items] == [{"Id": id_, "status": "s"} for id_, _ in KEPT]
            lines = (await client.get(f"{path}/results?format=ndjson")).text.splitlines()
            assert list(map(json.loads, lines)) == items
            download = await client.get(f"{path}/results?format=csv&escape_formulas=false")
            header, *rows = csv.reader(io.StringIO(download.text, newline=""))
            assert header == ["Id", "status", "text", "price", "n", "result", "run.status", "error"]
            assert [row[0] for row in rows] == [id_ for id_, _ in KEPT]
            escaped = csv.reader(io.StringIO((await client.get(f"{path}/results?format=csv")).text, newline=""))
            assert [row[0] for row in escaped][6:10] == ['\'=1+"1"', "'+49 170", "-5,5", "'-5"]
            if attempt == 1:
                assert (await client.post(f"{path}/retry")).status_code == 202
        body = {"agent_name": "show", "batch_inputs": [{"text": "a", "id": 7}], "on_extra": "ignore"}
        path = (await client.post("/run/batch", json=body)).headers["Location"]
        await client.get(path, params={"wait": 30})
        assert "extra" not in (await client.get(f"{path}/results")).json()[0]


@pytest.mark.anyio
@of_every_engine
async def test_kept_columns_have_a_size_limit(engine: Engine) -> None:
    """Both as a part of their row, and by their names, which are stored with the batch."""
    app = create_app(table_flock(), engine=engine)
    cell = "\x01" * 120_000  # as JSON it is six times as long
    row = f"text,one,two\na,{cell},{cell}\n"
    names = "\n".join(json.dumps({"text": "a", f"column_{n:06}": 1}) for n in range(3000))
    cases = [
        ("text/csv", row, "A row is longer"),
        ("application/x-ndjson", names, "longer than 16,384 characters in total"),
    ]
    async with app.lifespan(), client_of(app) as client:
        for media_type, content, words in cases:
            query, headers = {"agent_name": "show", "on_extra": "keep"}, {"Content-Type": media_type}
            response = await client.post("/run/batch", params=query, content=content, headers=headers)
            assert response.status_code == 413
            assert words in response.json()["detail"]

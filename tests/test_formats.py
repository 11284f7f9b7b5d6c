"""Tables in every format, in and out, by a program, by the command and over HTTP."""

import functools
import gzip
import io
import json
import os
import time
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest
from click.testing import CliRunner

from flock.agents.signature import Signature
from flock.client import AsyncFlockClient
from flock.command.cli import main
from flock.core import Flock
from flock.errors import InvalidData, TooLarge
from flock.formats import BY_MEDIA_TYPE, FORMATS, format_of
from flock.rows.array import array_rows
from flock.rows.dialect import CSVDialect
from flock.rows.likeinput import results_like
from flock.rows.tables import RowMapping
from flockapi import create_app

ROWS = [{"text": 'Schön, "ja"', "price": 0.5}, {"text": "b\nc", "price": 2}]
TEXTS = {
    "json": json.dumps(ROWS, indent=1).encode(),
    "ndjson": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "csv": 'text,price\n"Schön, ""ja""",0.5\n"b\nc",2\n'.encode(),
    "tsv": 'text\tprice\n"Schön, ""ja"""\t0.5\n"b\nc"\t2\n'.encode(),
}
SHOWN = ['Schön, "ja" 0.5 None', "b\nc 2.0 None"]
TARGET = "from tests.test_formats import formats_flock\nflock = formats_flock()\n"

pytestmark = pytest.mark.anyio
#: Those that can be read and written here: all with .[test-all].
HERE = [name for name, each in FORMATS.items() if all(map(find_spec, filter(None, each.packages)))]
by_format = pytest.mark.parametrize("format_", HERE)


@functools.cache
def file_in(format_: str) -> bytes:
    """Return the same rows in each format."""
    if format_ == "xlsx":
        return excel([["text", "price"], *(list(row.values()) for row in ROWS)])
    return parquet(ROWS) if format_ == "parquet" else TEXTS[format_]


def excel(rows: list[list[Any]]) -> bytes:
    import openpyxl

    file, book = io.BytesIO(), openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(file)
    return file.getvalue()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, **options)
    return file.getvalue()


def formats_flock() -> Flock:
    flock = Flock("formats")

    @flock.agent(output="shown: str, size: int")
    async def show(text: str, price: float = 0, n: int | None = None) -> Any:
        return {"shown": f"{text} {price} {n}", "size": len(text)}

    @flock.agent(output="half: float, text: str, version: str")
    async def halve(text: str, price: float) -> Any:
        return {"half": price / 2, "text": f"{text}→;", "version": "1.0"}

    return flock


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(formats_flock(), store=":memory:")
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


async def sent(http: httpx.AsyncClient, format_: str, content: bytes, **query: Any) -> httpx.Response:
    """Send a file, and return its batch when it has ended, or the problem."""
    headers = {"Content-Type": FORMATS[format_].media_type}
    response = await http.post("/run/batch", params={"agent_name": "show", **query}, content=content, headers=headers)
    if response.status_code != 202:
        return response
    return await http.get(response.headers["Location"], params={"wait": 20})


def run_command(folder: Path, *arguments: str, agent: str = "show", exit_code: int = 0) -> str:
    (folder / "target.py").write_text(TARGET)
    result = CliRunner().invoke(main, ["batch", str(folder / "target.py"), agent, *arguments])
    assert result.exit_code == exit_code, result.output
    return result.output


# Every format, in and out


@by_format
async def test_a_file_is_read_over_http(http: httpx.AsyncClient, format_: str) -> None:
    response = await sent(http, format_, file_in(format_))
    assert [result["shown"] for result in response.json()["results"]] == SHOWN


@by_format
def test_a_file_is_read_and_written_by_the_command(tmp_path: Path, format_: str) -> None:
    """Its results are a file of the same format, which is read again."""
    rows, results = tmp_path / f"rows.{format_}.gz", tmp_path / f"out.{format_}"
    rows.write_bytes(gzip.compress(file_in(format_)))
    run_command(tmp_path, str(rows), "-o", str(results))
    options = {"on_extra": "ignore"}
    if "json" in format_:
        assert [item["result"]["shown"] for item in _json_of(results.read_bytes(), format_)] == SHOWN
    else:
        assert [each["shown"] for each in formats_flock().run_batch("show", results, **options)] == SHOWN  # type: ignore[arg-type]


def _json_of(content: bytes, format_: str) -> list[Any]:
    return json.loads(content) if format_ == "json" else [json.loads(line) for line in content.splitlines()]


@by_format
async def test_results_are_downloaded_by_name_and_by_media_type(http: httpx.AsyncClient, format_: str) -> None:
    batch = (await sent(http, "ndjson", TEXTS["ndjson"])).json()["batch_id"]
    named = await http.get(f"/batch/{batch}/results", params={"format": format_})
    accepted = await http.get(f"/batch/{batch}/results", headers={"Accept": FORMATS[format_].media_type})
    if format_ != "xlsx":  # which has the time
        assert named.content == accepted.content
    assert named.headers["content-type"].partition(";")[0] == FORMATS[format_].media_type
    assert named.headers["content-disposition"] == f'attachment; filename="{batch}.{format_}"'


@by_format
async def test_the_client_sends_and_writes_files_by_their_ending(tmp_path: Path, format_: str) -> None:
    app = create_app(formats_flock(), store=":memory:")
    rows, results = tmp_path / f"rows.{format_}", tmp_path / f"out.{format_}"
    rows.write_bytes(file_in(format_))
    async with (
        app.lifespan(),
        AsyncFlockClient("http://t", transport=httpx.ASGITransport(app)) as client,
    ):
        batch = await client.wait_batch((await client.run_batch("show", rows)).batch_id)
        await client.download(batch.batch_id, results)
        downloaded = await client._http.get(f"/batch/{batch.batch_id}/results", params={"format": format_})
    assert (batch.completed_items, batch.failed_items) == (2, 0)
    assert format_ == "xlsx" or results.read_bytes() == downloaded.content


async def test_tab_separated_results_have_one_line_per_row(http: httpx.AsyncClient) -> None:
    batch = (await sent(http, "tsv", b"text\tprice\na,b\t1\n")).json()["batch_id"]
    response = await http.get(f"/batch/{batch}/results?format=tsv")
    assert response.text == "text\tprice\tn\tshown\tsize\tstatus\terror\r\na,b\t1\t\ta,b 1.0 None\t3\tcompleted\t\r\n"


async def test_a_format_that_does_not_exist_is_answered_with_those_that_do(http: httpx.AsyncClient) -> None:
    batch = (await sent(http, "tsv", TEXTS["tsv"])).json()["batch_id"]
    response = await http.get(f"/batch/{batch}/results?format=xls")
    assert response.json()["errors"][0]["detail"].endswith(f"It must be one of {', '.join(FORMATS)}.")
    response = await http.get(f"/batch/{batch}/results", headers={"Accept": "application/vnd.ms-excel"})
    assert response.status_code == 406
    assert all(media_type in response.json()["detail"] for media_type in BY_MEDIA_TYPE)
    response = await http.post("/run/batch?agent_name=show", headers={"Content-Type": "text/plain"}, content=b"a")
    assert response.status_code == 415
    assert all(media_type in response.json()["detail"] for media_type in BY_MEDIA_TYPE)


@pytest.mark.parametrize(
    ("name", "format_"), [("a.TAB", "tsv"), ("a.jsonl.gz", "ndjson"), ("a.ods", None), ("a", None)]
)
def test_the_format_of_a_file_is_that_of_its_ending(name: str, format_: str | None) -> None:
    found = format_of(Path(name))
    assert (found and found.name) == format_


def test_the_command_lists_the_endings_that_it_knows(tmp_path: Path) -> None:
    rows = tmp_path / "rows.ods"
    rows.write_bytes(b"")
    (tmp_path / "target.py").write_text(TARGET)
    for more in (["-o", str(tmp_path / "out.csv")], ["-o", str(tmp_path / "out.xls")]):
        result = CliRunner().invoke(main, ["batch", str(tmp_path / "target.py"), "show", str(rows), *more])
        assert result.exit_code == 2
        assert ".csv, .tsv, .tab" in " ".join(result.output.split())


# Arrays


async def read(content: bytes, size: int, max_row_bytes: int = 1000) -> list[Any]:
    """Return the inputs of the rows of an array that arrives in pieces of *size*, or their errors."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), size):
            yield content[start : start + size]

    mapping = RowMapping(Signature.of("text: str, x: list[str]"), None, None, lambda: 1000)
    rows = array_rows(pieces(), mapping, max_row_bytes=max_row_bytes, max_depth=10)
    return [(row.at, [error.detail for error in row.errors] or msgspec.json.decode(row.inputs)) async for row in rows]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        r'[{"text": "a]},[{\\", "x": [1, {"y": "\"]"}]}, {"text": "ä"}]',
        "\ufeff [ ]\n",
        '\n[\n{"text":"a"}\n,\n{"text":"b"}\n]\n',
    ],
)
async def test_an_array_is_read_in_pieces_of_any_size(text: str, size: int) -> None:
    expected = json.loads(text.removeprefix("\ufeff"))
    assert await read(text.encode(), size) == [(f"/{at}", row) for at, row in enumerate(expected)]


async def test_an_element_that_is_wrong_is_an_error_of_its_row() -> None:
    rows = await read(b'[{"text": "a"}, 5, {"text" "b"}, {"x": [[[[[[[[[[[[]]]]]]]]]]]]}, ]', 5)
    assert [at for at, _ in rows] == ["/0", "/1", "/2", "/3", "/4"]
    assert rows[1][1] == ["Each element must be one JSON object."]
    assert "expected ':'" in rows[2][1][0]
    assert "nested deeper" in rows[3][1][0]
    assert "unexpected end" in rows[4][1][0]


#: What is sent, and the error.
NOT_ARRAYS = {
    b"": "not a JSON array",
    b"text\na\n": "not a JSON array",
    b'{"agent_name": "show"}': "no agent_name in the query",
    b'[{"text": "a"}, {"te': "missing after 1 rows",
    b'[{"text": "a"}, ': "missing after 1 rows",
    b'[{"text": "a"}] [': "more text after the end",
    b"PK\x03\x04 and more": "Excel file",
}


@pytest.mark.parametrize(("content", "reason"), NOT_ARRAYS.items())
async def test_what_is_not_an_array_is_named(content: bytes, reason: str) -> None:
    for size in (3, 1000):
        with pytest.raises(InvalidData, match=reason):
            await read(content, size)


async def test_a_row_of_an_array_may_not_be_too_long() -> None:
    with pytest.raises(TooLarge, match="Row 2 is longer than 100 bytes"):
        await read(b'[{"text": "a"}, {"text": "' + b"a" * 10_000, 50, max_row_bytes=100)


async def test_an_array_in_many_small_pieces_is_not_read_again_for_each() -> None:
    """Pieces of gzip may be one byte long, and a string that has not arrived whole is scanned from its beginning."""
    content = b'[{"text": "' + b"a" * 200_000 + b'"}, {"text": "b"}]'
    started = time.process_time()
    assert len(await read(content, 1, max_row_bytes=300_000)) == 2
    assert time.process_time() - started < 5  # it took minutes
    with pytest.raises(TooLarge, match="Row 1 is longer"):
        await read(content, 1, max_row_bytes=199_000)


async def test_an_error_in_an_array_has_the_pointer_of_its_row(http: httpx.AsyncClient) -> None:
    response = await sent(http, "json", b'[{"text": "a"}, {"text": "a", "price": "x"}]')
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/1/price"


# Rows without a value


@pytest.mark.parametrize("text", [b'text,price\na,1\n,\n" ",\n\nb,2\n,\n', b"text\tprice\na\t1\n\t\n \t\n\nb\t2\n\t\n"])
async def test_rows_without_a_value_are_skipped_and_counted(http: httpx.AsyncClient, text: bytes) -> None:
    """Lines without a cell are not rows."""
    format_ = "csv" if b"," in text else "tsv"
    batch = (await sent(http, format_, text)).json()
    assert (batch["total_items"], batch["skipped_rows"]) == (2, 3)
    check = (await sent(http, format_, text, dry_run=True)).json()
    assert (check["ok"], check["total_items"], check["skipped_rows"]) == (True, 2, 3)
    assert [row["line"] for row in check["rows"]] == [2, 6]
    assert "skipped_rows" not in (await sent(http, format_, TEXTS[format_])).json()


async def test_an_error_after_skipped_rows_has_its_line(http: httpx.AsyncClient) -> None:
    response = await sent(http, "csv", b"text,price\n,\na,x\n")
    assert [error["line"] for error in response.json()["errors"]] == [3]
    response = await sent(http, "csv", b"text,price\n,\n,\n")
    assert response.json()["errors"][0]["detail"] == "A batch must have at least one item."


def test_the_command_says_how_many_rows_it_has_skipped(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,price\na,1\n,\nb,\n")
    assert "1 row has no value, and did not run." in run_command(tmp_path, str(rows), "--dry-run")
    output = run_command(tmp_path, str(rows), "-o", str(tmp_path / "out.csv"))
    assert "2 of 2 rows completed.\n1 row has no value, and did not run.\n" in output
    again = run_command(tmp_path, str(rows), "-o", str(tmp_path / "out.csv"))
    assert "All 2 rows are complete.\n1 row has no value, and did not run.\n" in again


async def test_an_empty_cell_is_missing_if_its_input_is_optional(http: httpx.AsyncClient) -> None:
    batch = (await sent(http, "csv", b"text,price,n\na,,\n,1,2\n")).json()
    assert [result["shown"] for result in batch["results"]] == ["a 0 None", " 1.0 2"]


# The dialect of results


async def test_a_german_excel_file_goes_round_over_http(http: httpx.AsyncClient) -> None:
    """Results have the delimiter, decimal comma and encoding of the query, under the names that the upload has."""
    dialect = {"delimiter": ";", "decimal": ",", "encoding": "windows-1252"}
    rows = "Nr;text;price\r\n0042;Schön;0,5\r\n7;a,b;-3\r\n".encode("cp1252")
    batch = (await sent(http, "csv", rows, agent_name="halve", on_extra="keep", **dialect)).json()
    response = await http.get(f"/batch/{batch['batch_id']}/results", params={"format": "csv", **dialect})
    assert response.headers["Content-Type"] == "text/csv; charset=cp1252"
    expected = [
        "Nr;text;price;half;result.text;version;status;error",
        '0042;Schön;0,5;0,25;"Schön?;";1.0;completed;',
        '7;a,b;-3;-1,5;"a,b?;";1.0;completed;',
    ]
    assert response.content == "".join(f"{line}\r\n" for line in expected).encode("cp1252")


@pytest.mark.parametrize(("encoding", "format_"), [("utf-8-sig", "csv"), ("utf-16", "tsv"), ("UTF-8", "csv")])
async def test_results_begin_with_the_byte_order_mark_of_their_encoding(
    http: httpx.AsyncClient, tmp_path: Path, encoding: str, format_: str
) -> None:
    """As the client for Python stores them. There is one, and the results can be sent again as they are."""
    batch = (await sent(http, "csv", TEXTS["csv"])).json()
    client = AsyncFlockClient("http://t", transport=http._transport)
    await client.download(batch["batch_id"], tmp_path / f"out.{format_}", encoding=encoding, status="completed")
    content = (tmp_path / f"out.{format_}").read_bytes()
    assert content.decode(encoding).startswith(f"text{',' if format_ == 'csv' else chr(9)}price")
    assert content.startswith("t".encode(encoding))
    again = await sent(http, format_, content, encoding=encoding, on_extra="ignore")
    assert [result["shown"] for result in again.json()["results"]] == SHOWN


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"delimiter": "x"}, "'delimiter' in the query"),
        ({"decimal": "'"}, "'decimal' in the query"),
        ({"encoding": "rot13"}, "encoding must be one of utf-8, utf-8-sig"),
    ],
)
async def test_results_in_an_unknown_dialect_are_refused(
    http: httpx.AsyncClient, query: dict[str, str], words: str
) -> None:
    batch = (await sent(http, "csv", TEXTS["csv"])).json()
    response = await http.get(f"/batch/{batch['batch_id']}/results", params={"format": "csv", **query})
    assert response.status_code == 422
    assert words in response.text


# The output like the input


def like_input(folder: Path, content: bytes, *options: str, name: str = "rows.csv", exit_code: int = 0) -> bytes:
    """Return the output of the command for a file with the columns text and price."""
    (folder / name).write_bytes(content)
    output = folder / f"out{Path(name).suffix}"
    arguments = [str(folder / name), "-o", str(output), "--like-input", *options]
    run_command(folder, *arguments, agent="halve", exit_code=exit_code)
    return output.read_bytes()


def test_a_german_excel_file_goes_round_byte_for_byte(tmp_path: Path) -> None:
    """Its own columns are as they were, in their order, and numbers of the results have a decimal comma."""
    lines = ["Nr;Text;Preis;Notiz", "0042;Schön;0,50;=1+1", '7;"a;""b""";3;"x\r\ny"', ";;;", "8;z;-1,0;"]
    content = "".join(f"{line}\r\n" for line in lines).encode("cp1252")
    options = ["--delimiter", ";", "--decimal", ",", "--encoding", "cp1252", "--map", "Preis=price"]
    written = like_input(tmp_path, content, *options, "--on-extra", "ignore")
    expected = [
        f"{lines[0]};half;text;version;status;error",
        f'{lines[1]};0,25;"Schön?;";1.0;completed;',
        f'{lines[2]};1,5;"a;""b""?;";1.0;completed;',
        f'{lines[4]};-0,5;"z?;";1.0;completed;',
    ]
    assert written == "".join(f"{line}\r\n" for line in expected).encode("cp1252")


@pytest.mark.parametrize(
    ("encoding", "line_end", "name"),
    [
        ("utf-8", "\n", "rows.csv"),
        ("utf-8-sig", "\r\n", "rows.csv"),
        ("utf-16", "\r\n", "rows.tsv"),
        ("cp1252", "\r", "a.csv"),
    ],
)
def test_the_output_has_the_bytes_of_the_input(tmp_path: Path, encoding: str, line_end: str, name: str) -> None:
    """The last line may have no end."""
    between = "\t" if name.endswith("tsv") else ","
    content = line_end.join(between.join(row) for row in (["text", "price"], ["é", "1"], ['"b"', "2"]))
    given = ["--encoding", encoding.removesuffix("-sig")]
    written = like_input(tmp_path, content.encode(encoding), *given, name=name)
    texts = written.decode(encoding).split(line_end)
    assert written.startswith(content.encode(encoding)[:7])
    assert [text.split(between)[:2] for text in texts] == [["text", "price"], ["é", "1"], ['"b"', "2"], [""]]
    assert [text.split(between)[2] for text in texts[:3]] == ["half", "0.5", "1.0"]
    assert "result.text" in texts[0]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("delimiter", "line_end"), [(";", "\r\n"), ("\t", "\n"), ("|", "\r\n"), (",", "\n")])
def test_the_dialect_is_detected_if_it_is_not_given(
    tmp_path: Path, delimiter: str, line_end: str, encoding: str
) -> None:
    """From the header, even if a name has other delimiters, and a byte order mark. Other encodings must be given."""
    rows = [['"a,b,c;d;e;f"', "text", "price"], ["x", "Schön", "1"]]
    content = "".join(delimiter.join(row) + line_end for row in rows).encode(encoding)
    given = ["--encoding", "cp1252"] if encoding == "cp1252" else []
    written = like_input(tmp_path, content, "--on-extra", "ignore", *given)
    assert written.startswith(content[:20])
    header, line, rest = written.decode(encoding).split(line_end)
    assert header.startswith(delimiter.join([*rows[0], "half", "result.text"]))
    assert line.startswith(delimiter.join([*rows[1], "0.5"]))
    assert rest == ""


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'"text', b"text,price\n\xff,1\n"])
def test_a_file_without_a_dialect_is_refused_as_without_detection(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    run_command(tmp_path, str(tmp_path / "rows.csv"), "-o", str(tmp_path / "o.csv"), "--like-input", exit_code=1)
    assert not (tmp_path / "o.csv").exists()


def test_the_outputs_of_a_short_row_are_below_their_names(tmp_path: Path) -> None:
    """A longer row has no place for them that fits."""
    written = like_input(
        tmp_path, b"text,price,note\na,1,n\nb,2\n", "--on-invalid", "skip", "--on-extra", "ignore", exit_code=1
    )
    assert [line.split(",")[3] for line in written.decode().splitlines()] == ["half", "0.5", ""]
    assert written.decode().splitlines()[2].split(",")[:7] == ["b", "2", "", "", "", "", "failed"]


def test_only_rows_of_csv_have_an_output_like_them(tmp_path: Path) -> None:
    (tmp_path / "target.py").write_text(TARGET)
    for rows, output in (("rows.ndjson", "out.csv"), ("rows.csv", "out.ndjson"), ("rows.csv", "out.tsv")):
        (tmp_path / rows).write_bytes(TEXTS["csv"])
        arguments = ["batch", str(tmp_path / "target.py"), "show", str(tmp_path / rows), "-o", str(tmp_path / output)]
        result = CliRunner().invoke(main, [*arguments, "--like-input"])
        assert result.exit_code == 2
        assert "--like-input is for ROWS in CSV or TSV" in " ".join(result.output.split())


def test_rows_that_were_not_chosen_keep_their_place_beside_the_others(tmp_path: Path) -> None:
    written = like_input(tmp_path, b"text,price\na,1\n,\nb,2\nc,3\n", "--sample", "1", "--usage")
    lines = written.decode().splitlines()
    assert [line.split(",")[0] for line in lines] == ["text", "a", "b", "c"]
    assert sorted(line.split(",")[5] for line in lines[1:]) == ["cancelled", "cancelled", "completed"]
    assert lines[0].endswith(",status,error,input_tokens,output_tokens,cost")


async def test_the_input_is_closed_if_its_output_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"text,price\n" + b"a,1\n" * 2**19)
    opened, never_read = len(os.listdir("/dev/fd")), cast(Any, None)
    results = results_like(tmp_path / "rows.csv", CSVDialect(), never_read, ["half"], escape_formulas=False)
    assert await anext(results) == b"text,price,half,status,error\n"
    await results.aclose()
    assert len(os.listdir("/dev/fd")) == opened

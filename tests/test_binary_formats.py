"""XLSX and Parquet, as people have them, whole and broken."""

import contextlib
import datetime
import errno
import io
import json
import os
import tempfile
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openpyxl
import pyarrow
import pyarrow.parquet as pq
import pytest
import xlsxwriter
from click.testing import CliRunner

from flock import formats
from flock.agents.signature import Signature
from flock.command.cli import main
from flock.core import Flock
from flock.errors import InvalidData, StoreError, TooLarge
from flock.rows import binary
from flock.rows.dialect import CSVDialect
from flock.rows.files import rows_in
from flock.rows.results import results_as
from flock.rows.tables import RowMapping
from flock.runs import Run, RunStatus, now
from flockapi import create_app
from tests.test_formats import TARGET, excel, formats_flock, http, parquet, sent

pytestmark = pytest.mark.anyio
__all__ = ["http"]


class Inputs(msgspec.Struct):
    text: str
    n: float = 0


class Cells(Inputs, kw_only=True):
    at: datetime.datetime
    tags: list[str]
    ok: bool


class Priced(Inputs, kw_only=True):
    tags: list[str]
    price: float | None


async def pieces_of(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 1000):
        yield content[start : start + 1000]


async def read(format_: str, content: bytes, inputs: type[msgspec.Struct] = Inputs, **options: Any) -> list[Any]:
    """Return the line and the inputs, kept columns or errors of each row."""
    mapping = RowMapping(Signature.of(inputs), None, None, lambda: 100_000, on_extra="keep")
    return [
        (
            row.line,
            None if row.is_empty else msgspec.json.decode(row.inputs),
            {k: msgspec.json.decode(v) for k, v in row.extra.items()},
        )
        if not row.errors
        else (row.line, [error.detail for error in row.errors])
        async for row in rows_in(format_, pieces_of(content), mapping, CSVDialect(decimal=","), **options)
    ]


def made_by_excel(fill: Callable[[Any, Any], None]) -> bytes:
    file = io.BytesIO()
    with xlsxwriter.Workbook(file) as book:
        fill(book, book.add_worksheet())
    return file.getvalue()


# XLSX in


async def test_cells_of_a_sheet_have_the_types_of_the_inputs() -> None:
    day, moment = datetime.datetime(2026, 11, 26), datetime.datetime(2026, 11, 26, 9, 30)
    content = excel(
        [
            ["Text", "n", "day", "at", "tags", "ok", "order", "rate"],
            [42, 1.5, day, day, '["a"]', True, "0042", 7],
            ["=1+1", None, moment, moment, "[]", "FALSE", None, None],
        ]
    )
    mapping = RowMapping(Signature.of(Cells), None, None, lambda: 100_000, on_extra="keep")
    rows = [row async for row in rows_in("xlsx", pieces_of(content), mapping, CSVDialect())]
    assert [msgspec.json.decode(row.inputs) for row in rows] == [
        {"text": "42", "n": 1.5, "at": "2026-11-26T00:00:00", "tags": ["a"], "ok": True},
        {"text": "", "at": "2026-11-26T09:30:00", "tags": [], "ok": False},
    ]
    assert [{name: msgspec.json.decode(value) for name, value in row.extra.items()} for row in rows] == [
        {"day": "2026-11-26", "order": "0042", "rate": 7},
        {"day": "2026-11-26T09:30:00", "order": "", "rate": ""},
    ]
    assert [row.line for row in rows] == [2, 3]


async def test_a_formula_has_the_value_that_excel_has_stored() -> None:
    def fill(book: Any, sheet: Any) -> None:
        sheet.write_row(0, 0, ["text", "n"])
        sheet.write_formula(1, 0, '="a"&"b"', None, "ab")
        sheet.write_formula(1, 1, "=1+1", None, 2)
        sheet.write_row(2, 0, ["b", "#N/A"])

    rows = await read("xlsx", made_by_excel(fill))
    assert rows == [(2, {"text": "ab", "n": 2}, {}), (3, {"text": "b", "n": "#N/A"}, {})]


async def test_merged_cells_have_their_value_in_the_first_cell() -> None:
    def fill(book: Any, sheet: Any) -> None:
        sheet.write_row(0, 0, ["text", "n"])
        sheet.merge_range(1, 1, 2, 1, 5)
        sheet.write_column(1, 0, ["a", "b"])

    assert await read("xlsx", made_by_excel(fill)) == [(2, {"text": "a", "n": 5}, {}), (3, {"text": "b"}, {})]


async def test_empty_rows_of_a_sheet_count_if_a_row_follows() -> None:
    """Sheets often end in thousands of rows that only have a format."""
    content = excel([[], ["text", "n"], ["a", 1], [], [None, " "], ["b", 2], [], [None, None]])
    assert await read("xlsx", content) == [
        (3, {"text": "a", "n": 1}, {}), (4, None, {}), (5, None, {}), (6, {"text": "b", "n": 2}, {})
    ]  # fmt: skip


async def test_a_cell_beside_the_table_is_an_error_of_its_row() -> None:
    rows = await read("xlsx", excel([["text"], ["a", "b"]]))
    assert rows == [(2, ["This row has 2 cells, but the header has 1."])]


@pytest.mark.parametrize("format_", ["xlsx", "parquet"])
@pytest.mark.parametrize("cut", [0, 4, 100, -200, -5])
async def test_a_file_that_was_cut_short_is_named(format_: str, cut: int) -> None:
    content = excel([["text"], ["a"]]) if format_ == "xlsx" else parquet([{"text": "a"}])
    with pytest.raises(InvalidData, match=f"This is not a valid {format_} file, or it was cut short"):
        await read(format_, content[:cut] if cut else b"text\na\n")


async def test_parts_of_a_workbook_that_unpack_to_too_much_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb is a few kilobytes of zeros. The directory of the ZIP file tells, and no part has more than it says."""

    def bomb(part: str) -> bytes:
        content = made_by_excel(lambda book, sheet: sheet.write_column(0, 0, ["text", "a"]))
        source, file = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name) + (b" " * 5_000_000 if name == part else b""))
        return file.getvalue()

    monkeypatch.setattr(binary, "MAX_PARTS_BYTES", dict.fromkeys(binary.MAX_PARTS_BYTES, 4_000_000))
    for part, kind in [
        ("xl/worksheets/sheet1.xml", "worksheet"),
        ("xl/sharedStrings.xml", "sharedStrings"),
        ("xl/styles.xml", "others"),
        ("[Content_Types].xml", "others"),
    ]:
        with pytest.raises(TooLarge, match=f"unpacks to 5.* bytes of {kind}; the limit is 4000000"):
            await read("xlsx", bomb(part))
    monkeypatch.setattr(binary, "MIN_UNPACKED_BYTES", 4_000_000)
    with pytest.raises(TooLarge, match=r"xl/styles\.xml unpacks to more than 100 times its size"):
        await read("xlsx", bomb("xl/styles.xml"))


@pytest.mark.parametrize(
    ("part", "tag"),
    [
        ("xl/styles.xml", b"<xf/>"),
        ("xl/sharedStrings.xml", b"<si/>"),
        ("xl/worksheets/sheet1.xml", b"<c/>"),
        ("[Content_Types].xml", b"<Override/>"),
    ],
)
async def test_a_workbook_of_empty_elements_is_refused(part: str, tag: bytes) -> None:
    """10 KB of them took up to 58 s of processor time and 1.1 GB."""
    content = made_by_excel(lambda book, sheet: sheet.write_column(0, 0, ["text", "a"]))
    source, file = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name) + (tag * 300_000 if name == part else b""))
    assert len(file.getvalue()) < 15_000
    with pytest.raises(TooLarge, match=r"300,.* XML tags, too many for its size\. Save the table as CSV"):
        await read("xlsx", file.getvalue())


async def test_a_sheet_of_equal_cells_is_no_bomb() -> None:
    """It has three times as many tags as a small part may have."""
    rows = await read("xlsx", excel([["text", "n"], *[["a", 1]] * 40_000]))
    assert (len(rows), rows[-1][1]) == (40_000, {"text": "a", "n": 1})


async def test_a_sheet_that_claims_to_be_huge_is_read_as_it_is() -> None:
    source, file = zipfile.ZipFile(io.BytesIO(excel([["text"], ["a"]]))), io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b'ref="A1:A2"', b'ref="A1:XFD1048576"'))
    assert await read("xlsx", file.getvalue()) == [(2, {"text": "a"}, {})]


async def test_the_size_of_an_upload_is_bounded() -> None:
    app = create_app(formats_flock(), store=":memory:", max_upload_bytes=1000)
    async with app.lifespan(), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        response = await sent(client, "xlsx", excel([["text"], ["a"]]))
    assert response.status_code == 413


@pytest.mark.parametrize("format_", ["csv", "json"])
async def test_a_workbook_that_is_sent_as_text_is_named(http: httpx.AsyncClient, format_: str) -> None:
    response = await sent(http, format_, excel([["text"], ["a"]]))
    assert "Name it .xlsx" in response.json()["errors"][0]["detail"]


# Parquet in


async def test_values_of_parquet_keep_their_types() -> None:
    rows: list[dict[str, Any]] = [
        {
            "text": "a", "n": float("nan"), "tags": ["x", "y"], "price": Decimal("0.10"), "big": 2**60,
            "at": datetime.datetime(2026, 1, 1, 9), "day": datetime.date(2026, 1, 1), "extra": {"a": [1]},
        },
        {"text": "", "n": 2.5, "tags": [], "price": None, "big": None, "at": None, "day": None, "extra": None},
    ]  # fmt: skip
    found = await read("parquet", parquet(rows), Priced)
    assert found == [
        (
            1,
            {"text": "a", "tags": ["x", "y"], "price": 0.1},
            {"big": 2**60, "at": "2026-01-01T09:00:00", "day": "2026-01-01", "extra": {"a": [1]}},
        ),
        (2, {"text": "", "n": 2.5, "tags": [], "price": None}, {"big": "", "at": "", "day": "", "extra": ""}),
    ]


async def test_rows_of_parquet_without_a_value_are_skipped(http: httpx.AsyncClient) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a", "price": 1.0},
        {"text": None, "price": float("nan")},
        {"text": "b", "price": None},
    ]
    batch = (await sent(http, "parquet", parquet(rows))).json()
    assert (batch["total_items"], batch["skipped_rows"]) == (2, 1)
    assert [result["shown"] for result in batch["results"]] == ["a 1.0 None", "b 0 None"]


async def test_a_parquet_file_without_columns_has_none_of_the_inputs(http: httpx.AsyncClient) -> None:
    response = await sent(http, "parquet", parquet([{}, {}]))
    assert (response.status_code, "there is no column for it" in response.text) == (422, True), response.text


async def test_row_groups_are_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    content = parquet([{"text": str(number)} for number in range(2500)], row_group_size=700)
    assert [row[1]["text"] for row in await read("parquet", content)] == [str(number) for number in range(2500)]
    monkeypatch.setattr(binary, "MAX_GROUP_BYTES", 1000)
    with pytest.raises(TooLarge, match="Row group 0 unpacks to"):
        await read("parquet", content)


@pytest.mark.parametrize(
    "cell",
    ["a" * 50_000, ["a" * 500] * 100, {"x": ["a" * 50_000]}, [None] * 7000],
    ids=lambda cell: str(cell)[:5],
)
async def test_a_value_that_a_file_has_once_is_not_unpacked_for_each_row(cell: Any) -> None:
    """A value of 200 MB that 500 rows share is 100 GB in Python."""
    content = parquet([{"text": "a", "x.y": cell}] * 200, compression="zstd", data_page_size=1000)
    peaks = [await unpacked(content, max_row_bytes) for max_row_bytes in (100_000, 40_000)]
    assert max(peaks) < 2_000_000
    assert len(await read("parquet", content, max_row_bytes=100_000)) == 200
    with pytest.raises(TooLarge, match="The row in line 1 is longer than 40000 bytes"):
        await read("parquet", content, max_row_bytes=40_000)


async def unpacked(content: bytes, max_row_bytes: int) -> int:
    """Return the most memory that Python has used for the records of a Parquet file."""
    tracemalloc.start()
    with contextlib.suppress(TooLarge):
        async for _ in binary.binary_records("parquet", pieces_of(content), max_row_bytes):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


async def test_a_map_of_parquet_is_a_list_of_pairs() -> None:
    pairs = pyarrow.array([[("k", "v")], [("a" * 100, "b")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    file = io.BytesIO()
    pq.write_table(pyarrow.table({"text": ["a", "b"], "m": pairs}), file)
    rows = await read("parquet", file.getvalue())
    assert [row[2]["m"] for row in rows] == [[["k", "v"]], [["a" * 100, "b"]]]
    with pytest.raises(TooLarge, match="line 2"):
        await read("parquet", file.getvalue(), max_row_bytes=90)


async def test_a_list_of_parquet_has_no_more_values_than_a_row_group_may_have_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = parquet([{"text": "a", "x": [0] * 200_000}])
    monkeypatch.setattr(binary, "MAX_GROUP_BYTES", 1_000_000)
    with pytest.raises(TooLarge, match="Row group 0 unpacks to"):
        await read("parquet", content)


def varint(value: int, length: int) -> bytes:
    """Return a positive number as Thrift writes it, in so many bytes."""
    bits = value << 1
    return bytes((bits >> 7 * place & 127) | (128 if place < length - 1 else 0) for place in range(length))


async def test_the_pages_of_parquet_are_counted_and_its_footer_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 14 KB took 400 MB."""
    file = io.BytesIO()
    table = pyarrow.table({"n": pyarrow.array([0] * 500_000, pyarrow.int64())})
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    group = pq.read_metadata(file).row_group(0)
    content = file.getvalue()
    for size in (group.total_byte_size, group.column(0).total_uncompressed_size):
        assert size > 4_000_000
        content = content.replace(varint(size, 4), varint(1000, 4))
    lying = pq.read_metadata(io.BytesIO(content)).row_group(0)
    assert (lying.total_byte_size, len(content) < 14_000) == (1000, True)
    monkeypatch.setattr(binary, "MAX_GROUP_BYTES", 3_000_000)
    with pytest.raises(TooLarge, match="Row group 0 unpacks to 40"):
        await read("parquet", content)


@pytest.mark.parametrize(
    ("at", "header", "problem"),
    [
        (4, b"\x19", "the header of a page has a field of type 9"),
        (7, b"\x01", "a page has a negative size"),
        (5, b"\xff" * 11, "a number in the header of a page is too long"),
    ],
)
async def test_a_page_of_parquet_with_an_invalid_header_is_named(at: int, header: bytes, problem: str) -> None:
    content = parquet([{"text": "a"}])
    with pytest.raises(InvalidData, match=f"This is not a valid parquet file, or it was cut short: {problem}"):
        await read("parquet", content[:at] + header + content[at + len(header) :])


async def test_delta_encoded_text_of_parquet_is_refused() -> None:
    """Its values are the beginning of the one before: few bytes, and each may be long."""
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    with pytest.raises(InvalidData, match="The text in 'text' is delta encoded"):
        await read("parquet", parquet([{"text": "a"}], **options))


@pytest.mark.parametrize("format_", ["xlsx", "parquet"])
async def test_a_row_is_no_longer_than_one_of_csv(format_: str) -> None:
    rows = [["text", "x"], ["a", "b"], ["a" * 60, "b" * 60]]
    content = excel(rows) if format_ == "xlsx" else parquet([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
    assert len(await read(format_, content, max_row_bytes=120)) == 2
    with pytest.raises(TooLarge, match=f"The row in line {3 if format_ == 'xlsx' else 2} is longer than 100 bytes"):
        await read(format_, content, max_row_bytes=100)


async def test_a_cell_in_the_last_column_of_each_row_is_an_error_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is below the header is converted."""
    content = excel([["text"], *([*[None] * 16_383, "text"] for _ in range(19))])
    converted = list[Any]()

    def count(value: Any) -> Any:
        converted.append(value)
        return value or ""

    monkeypatch.setattr(binary, "_cell", count)
    rows = await read("xlsx", content)
    assert rows[0] == (2, ["This row has 16384 cells, but the header has 1."])
    assert len(converted) == len(rows) + 1 == 20


@pytest.mark.parametrize("format_", ["xlsx", "parquet"])
async def test_a_disk_that_is_full_is_an_error_of_the_store(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with pytest.raises(StoreError, match="temporary file of a table cannot be written: No space left"):
        await read(format_, b"PK")


# Out


def items(count: int) -> list[Run]:
    """Items with text that looks like a formula, a kept column, and one that failed."""
    whole = [
        {"text": "=1+1", "score": 2**60, "ratio": 0.5, "ok": True, "tags": ["a"]},
        {"text": "é" * 40_000, "score": None, "ratio": 2, "ok": None, "tags": []},
    ]
    failed = {"result": None, "error": "=bad", "status": RunStatus.FAILED}
    return [
        Run(
            run_id=str(number), flock="f", agent_name="rate", created_at=now(), batch_id="b", position=number,
            inputs=msgspec.Raw(b'{"name": "a"}'), extra=msgspec.Raw(b'{"order": "0042"}'),
            **(failed if number == 2 else {"result": json.dumps(whole[number % 2]).encode(), "status": DONE}),
        )
        for number in range(count)
    ]  # fmt: skip


DONE = RunStatus.COMPLETED
COLUMNS = (
    {"name": "string"},
    {"text": "string", "score": "integer", "ratio": "number", "ok": "boolean", "tags": "array"},
)


async def written(format_: str, count: int = 3, **options: Any) -> bytes:
    async def pages() -> AsyncIterator[list[Run]]:
        yield items(count)

    stream = results_as(format_, pages(), ["order"], COLUMNS, True, **options)
    return b"".join([piece async for piece in stream])


async def test_results_in_parquet_have_the_types_of_the_signature() -> None:
    table = pq.read_table(io.BytesIO(await written("parquet", with_usage=True)))
    assert [str(field.type) for field in table.schema] == [
        *("string", "string", "string", "int64", "double", "bool"),
        *("string", "string", "string", "int64", "int64", "double"),
    ]
    rows = table.to_pylist()
    assert rows[0] == {
        "order": "0042", "name": "a", "text": "=1+1", "score": 2**60, "ratio": 0.5, "ok": True, "tags": '["a"]',
        "status": "completed", "error": "", "input_tokens": None, "output_tokens": None, "cost": None,
    }  # fmt: skip
    assert (rows[1]["ratio"], len(rows[1]["text"])) == (2.0, 40_000)
    assert (rows[2]["status"], rows[2]["error"], rows[2]["text"]) == ("failed", "=bad", None)


async def test_results_in_a_workbook_are_values_and_text_is_never_a_formula() -> None:
    book = openpyxl.load_workbook(io.BytesIO(await written("xlsx")))
    cells = list(book.worksheets[0].iter_rows())
    assert [cell.value for cell in cells[0]] == [
        "order",
        "name",
        "text",
        "score",
        "ratio",
        "ok",
        "tags",
        "status",
        "error",
    ]
    assert [cell.value for cell in cells[1]][:8] == ["0042", "a", "=1+1", str(2**60), 0.5, True, '["a"]', "completed"]
    assert {cells[1][2].data_type, cells[3][8].data_type} == {"s"}
    assert len(cells[2][2].value) == binary.MAX_CELL_CHARS


VALUES = {"i": "integer", "n": "number", "b": "boolean", "t": "string"}


async def results_of(inputs: dict[str, Any], format_: str = "parquet", **options: Any) -> bytes:
    item = msgspec.structs.replace(items(3)[2], inputs=msgspec.Raw(json.dumps(inputs).encode()), extra=None)
    stream = results_as(format_, pages_of([item]), [], (VALUES, {}), True, **options)
    return b"".join([piece async for piece in stream])


@pytest.mark.parametrize(
    ("inputs", "fitting"),
    [
        ({"i": "abc", "n": "x", "b": "y", "t": True}, (None, None, None, "true")),
        ({"i": 2**63, "n": 2**60 + 1, "b": 1, "t": 5}, (None, float(2**60), None, "5")),
        ({"i": True, "n": True, "b": True, "t": [1]}, (None, None, True, "[1]")),
        ({"i": 1.5, "n": 10**400, "b": 0.5, "t": None}, (None, None, None, None)),
        ({"i": 1e300, "n": 1e300}, (None, 1e300, None, None)),
        ({"i": -(2**63), "n": 1}, (-(2**63), 1.0, None, None)),
        ({"i": 2.0}, (2, None, None, None)),
    ],
)
async def test_a_value_that_does_not_fit_its_column_is_null(inputs: dict[str, Any], fitting: Any) -> None:
    row = pq.read_table(io.BytesIO(await results_of(inputs))).to_pylist()[0]
    assert tuple(row[name] for name in VALUES) == fitting


async def test_a_large_number_in_a_workbook_is_a_number() -> None:
    book = openpyxl.load_workbook(io.BytesIO(await results_of({"i": 2**53 + 1, "n": 1e300, "b": True}, "xlsx")))
    assert [cell.value for cell in list(book.worksheets[0].iter_rows())[1]][:3] == [str(2**53 + 1), 1e300, True]


async def test_inputs_are_text_if_a_row_is_invalid(http: httpx.AsyncClient) -> None:
    """Nothing of the row that failed is lost, and the others do not lose their types in the outputs."""
    content = b'{"text": "a", "price": "abc"}\n{"text": "b", "price": 0.5}\n'
    batch = (await sent(http, "ndjson", content, on_invalid="skip")).json()["batch_id"]
    response = await http.get(f"/batch/{batch}/results?format=parquet")
    rows = pq.read_table(io.BytesIO(response.content)).to_pylist()
    assert [(row["price"], row["size"], row["status"]) for row in rows] == [
        ("abc", None, "failed"), ("0.5", 1, "completed")
    ]  # fmt: skip


async def test_an_error_of_a_download_has_a_status(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = (await sent(http, "ndjson", b'{"text": "a"}\n' * 3)).json()["batch_id"]
    with monkeypatch.context() as patched:
        patched.setattr(binary, "MAX_SHEET_ROWS", 3)
        response = await http.get(f"/batch/{batch}/results?format=xlsx")
    assert (response.status_code, "at most 3 rows" in response.json()["detail"]) == (413, True)
    assert (await http.get(f"/batch/{batch}/results?format=xlsx")).status_code == 200


async def test_a_sheet_has_no_more_rows_than_excel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "MAX_SHEET_ROWS", 3)
    with pytest.raises(TooLarge, match="A sheet has at most 3 rows"):
        await written("xlsx")
    with pytest.raises(InvalidData, match="A sheet has at most 3 rows"):
        await read("xlsx", excel([["text"], ["a"], ["b"], ["c"]]))


@pytest.mark.parametrize("format_", ["xlsx", "parquet"])
async def test_a_download_that_is_broken_off_leaves_no_file(
    format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def pages() -> AsyncIterator[list[Run]]:
        yield items(2)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        async for _ in results_as(format_, pages(), ["order"], COLUMNS, True):
            pass
    stream = results_as(format_, pages_of(items(2)), ["order"], COLUMNS, True)
    assert await anext(stream) == b""
    assert await anext(stream)
    await stream.aclose()
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240 - it is local


async def pages_of(page: list[Run]) -> AsyncIterator[list[Run]]:
    yield page


@pytest.mark.parametrize("format_", ["xlsx", "parquet"])
async def test_without_its_package_a_format_names_the_extra(
    http: httpx.AsyncClient, format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = (await sent(http, "csv", b"text\na\n")).json()["batch_id"]
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    for response in (await sent(http, format_, b""), await http.get(f"/batch/{batch}/results?format={format_}")):
        assert response.status_code == 422
        assert f"{format_} needs the extra flockapi[" in response.json()["errors"][0]["detail"]
    (tmp_path / "target.py").write_text(TARGET)
    (tmp_path / f"rows.{format_}").write_bytes(b"")
    arguments = ["batch", str(tmp_path / "target.py"), "show", str(tmp_path / f"rows.{format_}"), "--dry-run"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "flockapi[" in result.output


async def test_a_program_reads_a_workbook(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(excel([["text", "price"], ["a", 1], ["b", None]]))
    flock: Flock = formats_flock()
    found = await flock.run_batch_async("show", tmp_path / "rows.xlsx")
    assert [each["shown"] for each in found] == ["a 1.0 None", "b 0 None"]

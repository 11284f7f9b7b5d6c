"""Uploads that are made to stop the event loop, to fill the disk, or to run in a spreadsheet."""

import contextlib
import gc
import gzip
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import anyio
import anyio.lowlevel
import httpx
import pytest
from starlette.types import Message, Scope

from flock.core import Flock
from flock.dialect import CSVDialect
from flock.errors import InvalidData
from flock.signature import Signature
from flock.tables import MAX_MEMBERS, MAX_ROW_LINES, Fill, csv_rows
from flockapi import FlockAPI, create_app

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
JSON = {"Content-Type": "application/json"}
CSV = {"Content-Type": "text/csv"}
NDJSON = {"Content-Type": "application/x-ndjson"}
GZIP = {"Content-Encoding": "gzip"}


def hostile_flock() -> Flock:
    flock = Flock("hostile")

    @flock.agent
    async def echo(text: str) -> str:
        return text

    @flock.agent
    async def nested(items: list[list[str]]) -> int:
        return len(items)

    @flock.agent
    async def table(items: dict[str, int]) -> int:
        return len(items)

    return flock


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[FlockAPI]:
    made = create_app(hostile_flock(), store=tmp_path / "flock.db", auth="host")
    async with made.lifespan():
        yield made


class Sender:
    """A request to an ASGI app whose body arrives in pieces, at once or when the test lets it go on."""

    def __init__(self, app: FlockAPI, path: str, headers: Mapping[str, str], *, piece_bytes: int = 64 * 1024) -> None:
        url = httpx.URL("http://testserver" + path)
        self._app = app
        self._piece_bytes = piece_bytes
        self._scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url.path,
            "raw_path": url.raw_path,
            "query_string": url.query,
            "root_path": "",
            "headers": [(b"host", b"testserver"), *((k.lower().encode(), v.encode()) for k, v in headers.items())],
            "server": ("testserver", 80),
            "client": ("127.0.0.1", 1),
        }
        self._send_body, self._receive_body = anyio.create_memory_object_stream[bytes](10_000)
        self._is_over = anyio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    def feed(self, content: bytes) -> None:
        for start in range(0, len(content), self._piece_bytes):
            self._send_body.send_nowait(content[start : start + self._piece_bytes])

    def end(self) -> None:
        self._send_body.close()

    async def run(self) -> None:
        with self._receive_body:
            await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        try:
            return {"type": "http.request", "body": await self._receive_body.receive(), "more_body": True}
        except anyio.EndOfStream:
            pass
        if self._is_over.is_set():
            return {"type": "http.disconnect"}
        self._is_over.set()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")

    @property
    def problem(self) -> Any:
        return json.loads(self.body)


def path_of(agent_name: str = "echo", **query: str) -> str:
    return f"/run/batch?{urlencode({'agent_name': agent_name, **query})}"


# The event loop


@contextlib.contextmanager
def without_old_garbage() -> Iterator[None]:
    """What other tests left is not collected during a measurement."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def unit_s() -> float:
    """The processor time of a fixed piece of work: about 20 ms."""
    began = time.thread_time()
    for _ in range(500_000):
        pass
    return time.thread_time() - began


async def longest_gap_s(sender: Sender, content: bytes) -> float:
    """The most processor time that passes between two turns of a task beside the request."""
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        last = time.thread_time()
        while True:
            await anyio.lowlevel.checkpoint()
            at = time.thread_time()
            longest, last = max(longest, at - last), at

    sender.feed(content)
    sender.end()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await anyio.lowlevel.checkpoint()
        await sender.run()
        await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    return longest


def members(count: int, value: Any = 1) -> dict[str, Any]:
    return {f"k{number}": value for number in range(count)}


def run_of(agent_name: str, inputs: bytes) -> bytes:
    return b'{"agent_name": "%s", "inputs": %b}' % (agent_name.encode(), inputs)


def batch_of(**more: Any) -> bytes:
    return json.dumps({"agent_name": "echo", "batch_inputs": [{"text": "a"}] * 20, **more}).encode()


NESTED = b'{"items": [' + b"[], " * 200_000 + b"[1]]}"
HOSTILE = [
    pytest.param("/run/batch", JSON, batch_of(static_inputs=members(50_000)), 422, id="static inputs"),
    pytest.param("/run/batch", JSON, batch_of(input_mapping=members(50_000, "text")), 422, id="a mapping"),
    pytest.param(
        path_of(),
        CSV,
        ",".join(f"c{number}" for number in range(40_000)).encode(),
        422,
        id="a header of 40,000 columns",
    ),
    pytest.param(
        path_of(on_extra="ignore"),
        NDJSON,
        (json.dumps({"text": "a", **members(60_000)}) + "\n").encode() * 12,
        422,
        id="rows of 60,000 members",
    ),
    pytest.param(path_of(), CSV | GZIP, gzip.compress(b"text\n" + b"\n" * 4 * MIB + b"a\n"), 202, id="empty CSV lines"),
    pytest.param(path_of(), NDJSON | GZIP, gzip.compress(b"\n" * 4 * MIB), 422, id="empty NDJSON lines"),
    pytest.param(path_of(), NDJSON | GZIP, gzip.compress(b"") * 50_000, 422, id="gzip of nothing, many times"),
    pytest.param(path_of("nested"), NDJSON, (NESTED + b"\n") * 3, 422, id="rows of lists whose last is wrong"),
    pytest.param(
        path_of("table"),
        NDJSON,
        (json.dumps({"items": {**members(40_000), "z": "a"}}) + "\n").encode() * 12,
        422,
        id="rows of dicts whose last entry is wrong",
    ),
    pytest.param(
        path_of(), CSV, b"text\n" + (b'"' + b"\n" * 130_000 + b'"\n') * 10, 422, id="CSV rows of 130,000 lines"
    ),
    pytest.param("/run/flock", JSON, run_of("nested", NESTED), 422, id="a run with lists whose last is wrong"),
    pytest.param(
        "/run/flock",
        JSON,
        run_of("table", json.dumps({"items": {**members(60_000), "z": "a"}}).encode()),
        422,
        id="a run with a dict whose last entry is wrong",
    ),
]


@pytest.mark.parametrize(("path", "headers", "content", "status"), HOSTILE)
async def test_no_upload_keeps_the_event_loop_for_long(
    path: str, headers: dict[str, str], content: bytes, status: int, app: FlockAPI
) -> None:
    """The unit is about 20 ms, and each of these took the loop for 200 ms to 10 s, or was accepted."""
    sender = Sender(app, path, headers, piece_bytes=MIB)
    with without_old_garbage():
        gap_s, unit = await longest_gap_s(sender, content), unit_s()
    assert sender.status == status, sender.body[:500]
    assert gap_s < 6 * unit


@pytest.mark.parametrize(
    ("path", "headers", "content", "pointer", "line"),
    [
        ("/run/batch", JSON, batch_of(static_inputs=members(MAX_MEMBERS + 1)), "/static_inputs", None),
        ("/run/batch", JSON, batch_of(input_mapping=members(MAX_MEMBERS + 1, "text")), "/input_mapping", None),
        ("/run/batch", JSON, batch_of(batch_inputs=[members(MAX_MEMBERS + 1)]), "/batch_inputs/0", None),
        (path_of(), NDJSON, json.dumps(members(MAX_MEMBERS + 1)).encode(), "", 1),
        (path_of(), CSV, ",".join(members(MAX_MEMBERS + 1)).encode(), "", 1),
    ],
    ids=["static inputs", "mapping", "JSON row", "NDJSON row", "CSV header"],
)
async def test_more_members_than_are_read_are_refused_with_their_place(
    path: str, headers: dict[str, str], content: bytes, pointer: str, line: int | None, app: FlockAPI
) -> None:
    sender = Sender(app, path, headers)
    sender.feed(content)
    sender.end()
    await sender.run()
    assert sender.status == 422
    [error] = sender.problem["errors"]
    assert (error["pointer"], error.get("line")) == (pointer, line)
    assert error["detail"].startswith("There are 10,001 ")
    assert error["detail"].endswith("at most 10,000 are read.")


async def test_as_many_columns_and_members_as_are_allowed_are_read(app: FlockAPI) -> None:
    header = ",".join(["text", *map(str, range(MAX_MEMBERS - 1))])
    row = json.dumps({"text": "a", **{str(number): 1 for number in range(MAX_MEMBERS - 1)}})
    cells = "a" + "," * (MAX_MEMBERS - 1)
    for headers, content in ((CSV, f"{header}\n{cells}\n"), (NDJSON, row)):
        sender = Sender(app, path_of(on_extra="ignore"), headers)
        sender.feed(content.encode())
        sender.end()
        await sender.run()
        assert sender.status == 202, sender.body[:500]


async def test_a_quote_that_is_missing_is_found_before_the_whole_file_is_one_row() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'text\na\n"b\n'
        for _ in range(5):
            yield b"\n" * (MAX_ROW_LINES // 4)

    rows = csv_rows(
        chunks(), Fill(Signature.of("text: str"), None, None, lambda: 0), CSVDialect(), max_row_bytes=MIB, max_depth=9
    )
    with pytest.raises(InvalidData) as raised:
        [row async for row in rows]
    [error] = raised.value.errors
    assert error.line == 3
    assert error.detail == "This row has more than 100,000 lines. The quote after a cell may be missing."

"""Uploads that are made to block the event loop, to fill the disk, or to run in a spreadsheet."""

import contextlib
import csv
import gc
import gzip
import io
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import anyio
import anyio.lowlevel
import httpx
import msgspec
import pytest
from starlette.types import Message, Scope

from flock.agents.signature import Signature
from flock.core import Flock
from flock.errors import EngineFull, InvalidData
from flock.rows.dialect import CSVDialect
from flock.rows.results import CSVWriter
from flock.rows.tables import MAX_MEMBERS, MAX_ROW_LINES, RowMapping, csv_rows
from flock.runs import BatchFilter, BatchOptions, Run
from flock.web.auth import new_key
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S, ROOT, WORKERS
from tests.support.engines import OpenEngine, until
from tests.support.flocks import Work, numbers
from tests.support.servers import flockapi_command, running

pytestmark = pytest.mark.anyio

MIB = 1024 * 1024
OPTIONS = BatchOptions()
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
    async def counted(text: str, n: int) -> int:
        return n

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
    """A request to an ASGI app whose body arrives in pieces, at once or when the test continues it."""

    def __init__(
        self,
        app: FlockAPI,
        path: str,
        headers: Mapping[str, str],
        *,
        piece_bytes: int = 64 * 1024,
        method: str = "POST",
        host: str = "127.0.0.1",
    ) -> None:
        url = httpx.URL("http://testserver" + path)
        self._app = app
        self._piece_bytes = piece_bytes
        self._scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": url.path,
            "raw_path": url.raw_path,
            "query_string": url.query,
            "root_path": "",
            "headers": [(b"host", b"testserver"), *((k.lower().encode(), v.encode()) for k, v in headers.items())],
            "server": ("testserver", 80),
            "client": (host, 1),
        }
        self._send_body, self._receive_body = anyio.create_memory_object_stream[bytes](10_000)
        self._is_over = anyio.Event()
        self.is_waiting = self.has_ended = False
        self._is_gone = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    def feed(self, content: bytes) -> None:
        for start in range(0, len(content), self._piece_bytes):
            self._send_body.send_nowait(content[start : start + self._piece_bytes])

    def end(self) -> None:
        self._send_body.close()

    def disconnect(self) -> None:
        self._is_gone = True
        self.end()

    async def run(self) -> None:
        try:
            with self._receive_body, self._send_body:
                await self._app(self._scope, self._receive, self._send)
        finally:
            self.has_ended = True

    async def _receive(self) -> Message:
        self.is_waiting = True
        try:
            return {"type": "http.request", "body": await self._receive_body.receive(), "more_body": True}
        except anyio.EndOfStream:
            pass
        if self._is_over.is_set() or self._is_gone:
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
    """Exclude objects of other tests from garbage collection during a measurement."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def unit_s() -> float:
    """Return the processor time of a fixed piece of work, about 20 ms."""
    began = time.thread_time()
    for _ in range(500_000):
        pass
    return time.thread_time() - began


async def longest_gap_s(sender: Sender, content: bytes) -> float:
    """Return the most processor time between two turns of a task that runs beside the request."""
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


# Before a merge, lists are tried in rows and dicts in a run, and rows of many members without a dry run.
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
    pytest.param(
        path_of(on_extra="ignore", dry_run="true"),
        NDJSON,
        (json.dumps({"text": "a", **members(60_000)}) + "\n").encode() * 12,
        200,
        id="a dry run of rows of 60,000 members",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        path_of(dry_run="true"),
        CSV | GZIP,
        gzip.compress(b"text\n" + b"a\n" * 60_000),
        200,
        id="a dry run of many rows",
    ),
    pytest.param(path_of(), CSV | GZIP, gzip.compress(b"text\n" + b"\n" * 4 * MIB + b"a\n"), 202, id="empty CSV lines"),
    pytest.param(path_of(), NDJSON | GZIP, gzip.compress(b"\n" * 4 * MIB), 422, id="empty NDJSON lines"),
    pytest.param(path_of(), NDJSON | GZIP, gzip.compress(b"") * 50_000, 422, id="many empty gzip members"),
    pytest.param(path_of("nested"), NDJSON, (NESTED + b"\n") * 3, 422, id="rows of lists whose last is invalid"),
    pytest.param(
        path_of("table"),
        NDJSON,
        (json.dumps({"items": {**members(40_000), "z": "a"}}) + "\n").encode() * 12,
        422,
        id="rows of dicts whose last entry is invalid",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        path_of(), CSV, b"text\n" + (b'"' + b"\n" * 130_000 + b'"\n') * 10, 422, id="CSV rows of 130,000 lines"
    ),
    pytest.param(
        "/run/flock",
        JSON,
        run_of("nested", NESTED),
        422,
        id="a run with lists whose last is invalid",
        marks=pytest.mark.nightly,
    ),
    pytest.param(
        "/run/flock",
        JSON,
        run_of("table", json.dumps({"items": {**members(60_000), "z": "a"}}).encode()),
        422,
        id="a run with a dict whose last entry is invalid",
    ),
]


@pytest.mark.parametrize(("path", "headers", "content", "status"), HOSTILE)
async def test_no_upload_blocks_the_event_loop_for_long(
    path: str, headers: dict[str, str], content: bytes, status: int, app: FlockAPI
) -> None:
    """The unit is about 20 ms. Each of these uploads once blocked the loop for 200 ms to 10 s, or was accepted."""
    sender = Sender(app, path, headers, piece_bytes=MIB)
    with without_old_garbage():
        before, gap_s, after = unit_s(), await longest_gap_s(sender, content), unit_s()
    assert sender.status == status, sender.body[:500]
    assert gap_s < 6 * max(before, after)


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
async def test_too_many_members_are_refused_with_pointer_and_line(
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
    assert error["detail"].endswith("the maximum is 10,000.")


async def test_the_maximum_number_of_columns_and_members_is_accepted(app: FlockAPI) -> None:
    header = ",".join(["text", *map(str, range(MAX_MEMBERS - 1))])
    row = json.dumps({"text": "a", **{str(number): 1 for number in range(MAX_MEMBERS - 1)}})
    cells = "a" + "," * (MAX_MEMBERS - 1)
    for headers, content in ((CSV, f"{header}\n{cells}\n"), (NDJSON, row)):
        sender = Sender(app, path_of(on_extra="ignore"), headers)
        sender.feed(content.encode())
        sender.end()
        await sender.run()
        assert sender.status == 202, sender.body[:500]


async def test_a_missing_quote_is_found_before_the_whole_file_is_one_row() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'text\na\n"b\n'
        for _ in range(5):
            yield b"\n" * (MAX_ROW_LINES // 4)

    rows = csv_rows(
        chunks(),
        RowMapping(Signature.of("text: str"), None, None, lambda: 0),
        CSVDialect(),
        max_row_bytes=MIB,
        max_depth=9,
    )
    with pytest.raises(InvalidData) as raised:
        [row async for row in rows]
    [error] = raised.value.errors
    assert error.line == 3
    assert error.detail == "This row has more than 100,000 lines. A closing quote may be missing."


# The disk


def stored(path: Path, query: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as db:
        count: int = db.execute(query).fetchone()[0] or 0
        return count


ROWS = "SELECT count(*) FROM runs"
STAGED = "SELECT sum(total_items) FROM batches WHERE hidden = 'staged'"


def lines(count: int) -> bytes:
    return b'{"text": "a"}\n' * count


async def test_static_inputs_are_limited_by_the_compressed_size(tmp_path: Path) -> None:
    """6 KB of gzip once became 202 MiB."""
    app = create_app(hostile_flock(), store=tmp_path / "flock.db", auth="host", max_body_bytes=1_000)
    path, rows = path_of(static_inputs=json.dumps({"text": "x" * 28})), b"{}\n" * 2_000
    packed, plain = Sender(app, path, NDJSON | GZIP), Sender(app, path, NDJSON)
    packed.feed(gzip.compress(rows))
    plain.feed(rows)
    async with app.lifespan():
        for sender in (packed, plain):
            sender.end()
            await sender.run()
    assert packed.status == 413
    assert packed.problem["detail"].startswith("The static inputs of all rows are longer than 16000 bytes ")
    assert plain.status == 202


@pytest.mark.parametrize(
    ("query", "header"),
    [
        pytest.param({"on_extra": "keep"}, "text," + "x" * 16_000, id="a kept column"),
        pytest.param(
            {"on_invalid": "skip", "agent_name": "counted", "input_mapping": json.dumps({"x" * 8_000: "n"})},
            "text," + "x" * 8_000,
            id="a mapped column of invalid rows",
        ),
    ],
)
async def test_stored_names_of_columns_are_limited_by_the_size_of_the_upload(
    query: dict[str, str], header: str, tmp_path: Path
) -> None:
    """Each row stores them, so 4 bytes of an upload once became 16,020."""
    path, folder = tmp_path / "flock.db", tmp_path / "rows"
    folder.mkdir()
    (folder / "own.csv").write_bytes(header.encode() + b"\n" + b"a,b\n" * 50)
    app = create_app(hostile_flock(), store=path, auth="host", max_body_bytes=20_000, csv_dir=folder)
    async with app.lifespan():
        for rows, status in ((15, 202), (50, 413)):
            sender = Sender(app, path_of(**query), CSV)
            sender.feed(header.encode() + b"\n" + b"a,b\n" * rows)
            sender.end()
            await sender.run()
            assert sender.status == status, sender.body[:500]
        assert sender.problem["detail"] == (
            "The names of the columns of all rows are longer than 320000 bytes in total, 16 times the size of the "
            "upload or of the largest JSON body. Send shorter ones, or fewer rows at once."
        )
        await until(lambda: stored(path, ROWS) == 15)

        options: dict[str, Any] = {"agent_name": "echo", **query}
        if "input_mapping" in options:
            options["input_mapping"] = json.loads(options["input_mapping"])
        sender = Sender(app, "/run/batch", JSON)
        sender.feed(json.dumps(options | {"batch_inputs": "own.csv"}).encode())
        sender.end()
        await sender.run()
        assert sender.status == 202, "the server's own files are not uploads"


@pytest.mark.parametrize(
    ("path", "headers", "content"),
    [
        pytest.param(
            "/run/batch",
            JSON,
            batch_of(on_invalid="skip", input_mapping={"a": "x" * 500_000}, batch_inputs=[{"a": 1}] * 2_000),
            id="JSON",
        ),
        pytest.param(
            path_of(on_invalid="skip", input_mapping=json.dumps({"a": "x" * 30_000})),
            NDJSON,
            b'{"a": 1}\n',
            id="NDJSON",
        ),
        pytest.param(path_of(on_invalid="skip", input_mapping='{"a": "txet"}'), CSV, b"a\n1\n", id="CSV"),
    ],
)
async def test_a_mapping_to_an_unknown_input_is_refused_before_any_row(
    path: str, headers: dict[str, str], content: bytes, app: FlockAPI, tmp_path: Path
) -> None:
    """Each failed row stored the name, so 1 MiB of JSON once became 25 GB."""
    sender = Sender(app, path, headers)
    sender.feed(content)
    sender.end()
    await sender.run()
    assert sender.status == 422, sender.body[:500]
    [error] = sender.problem["errors"]
    assert error["pointer"] == "/input_mapping/a"
    assert error["detail"].startswith("There is no input '")
    assert error["detail"].endswith("Known inputs: text.")
    assert ("Did you mean 'text'?" in error["detail"]) == (headers == CSV)
    assert stored(tmp_path / "flock.db", ROWS) == 0


async def test_rows_are_limited_by_the_compressed_size(app: FlockAPI, tmp_path: Path) -> None:
    """1 MB of gzip once wrote 1 GiB. The same rows without gzip are accepted, and so is gzip of ordinary rows."""
    hostile = b'{"text": "%b"}\n' % (b"x" * 500_000) * 35
    ordinary = b"".join(b'{"text": "%b%b"}\n' % (b"x" * 96_000, os.urandom(2_000).hex().encode()) for _ in range(175))
    packed = gzip.compress(ordinary)
    assert 20 < len(ordinary) / len(packed) < 100
    for headers, content, status in (
        (NDJSON | GZIP, gzip.compress(hostile), 413),
        (NDJSON, hostile, 202),
        (NDJSON | GZIP, packed, 202),
    ):
        sender = Sender(app, path_of(), headers)
        sender.feed(content)
        sender.end()
        await sender.run()
        assert sender.status == status, sender.body[:500]
        if status == 413:
            assert sender.problem["detail"] == (
                "The decompressed body is longer than 16777216 bytes and more than 100 times as long as the compressed "
                "one. Send it without Content-Encoding."
            )
            await until(lambda: stored(tmp_path / "flock.db", ROWS) == 0)


async def test_rows_of_an_unfinished_upload_count_as_open(tmp_path: Path) -> None:
    """They count for this upload and for others. A refusal comes during the upload and removes the staged rows."""
    flock, path = hostile_flock(), tmp_path / "flock.db"
    engine = flock.engine(store=path, max_open_items=2_000)
    app = create_app(flock, engine=engine, auth="host", body_timeout_s=PATIENCE_S)
    first, second, third = (Sender(app, path_of(), NDJSON) for _ in range(3))
    async with app.lifespan(), anyio.create_task_group() as tasks:
        tasks.start_soon(first.run)
        first.feed(lines(1_600))
        await until(lambda: stored(path, STAGED) == 1_500)

        second.feed(lines(600))
        second.end()
        await second.run()
        assert (second.status, second.headers["retry-after"]) == (429, "1")
        assert second.problem["detail"] == (
            "1500 items of batches have not ended or are being uploaded, and 600 more would exceed the limit of this "
            "server (2000, max_open_items). Try again later."
        )

        first.feed(lines(1_000))
        first.end()  # the server still reads this, because a client may not read a response earlier
        await until(lambda: first.has_ended)
        assert first.status == 429
        await until(lambda: stored(path, ROWS) == 0)

        third.feed(lines(1_900))
        third.end()
        await third.run()
        assert third.status == 202


async def test_submitted_items_count_as_open_before_the_batch_is_complete(open_engine: OpenEngine) -> None:
    """This holds for every engine: an endless iterator gets no more than its share, and others are refused."""
    work = Work()
    has_stalled, may_go = anyio.Event(), anyio.Event()

    async def endless() -> AsyncIterator[Any]:
        for position in itertools.count():
            if position == 1_000:
                has_stalled.set()
                await may_go.wait()
            yield {"n": position}

    async with open_engine(work.flock, max_open_items=1_200) as engine:

        async def submit_endless() -> None:
            with pytest.raises(EngineFull, match="have not ended or are being uploaded"):
                await engine.submit_batch("item", endless(), OPTIONS)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(submit_endless)
            await has_stalled.wait()
            with pytest.raises(EngineFull, match="have not ended or are being uploaded"):
                await engine.submit_batch("item", numbers(600), OPTIONS)
            may_go.set()
        batch = await engine.submit_batch("item", numbers(1_100), OPTIONS)
        await engine.cancel_batch(batch.batch_id)


async def test_a_replayed_upload_needs_no_room(tmp_path: Path) -> None:
    """A replay is answered before any limit applies, even if its rows are staged as they arrive."""
    flock, path = hostile_flock(), tmp_path / "flock.db"

    @flock.agent
    async def hold(text: str) -> str:
        await anyio.sleep_forever()
        return text

    app = create_app(flock, engine=flock.engine(store=path, max_open_items=1_000), auth="host")
    async with app.lifespan():
        ids = set()
        for _ in range(2):
            sender = Sender(app, path_of("hold"), NDJSON | {"Idempotency-Key": "k"})
            sender.feed(lines(900))
            sender.end()
            await sender.run()
            assert sender.status == 202, sender.body
            ids.add(json.loads(sender.body)["batch_id"])
        assert len(ids) == 1
        assert sender.headers["idempotency-replayed"] == "true"
        assert stored(path, ROWS) == 900


@pytest.mark.parametrize("how", ["ends", "is refused", "breaks off", "is cancelled"])
async def test_the_open_uploads_of_a_principal_are_limited(how: str, tmp_path: Path) -> None:
    """One more is answered 429 at once, and its slot is freed however an upload ends."""
    keys = {"ann": new_key(), "bob": new_key()}
    app = create_app(
        hostile_flock(), store=tmp_path / "flock.db", api_keys=keys, max_uploads_per_principal=2, body_timeout_s=60
    )

    def upload(name: str, content: bytes = b"") -> Sender:
        sender = Sender(app, path_of(), NDJSON | {"X-API-Key": keys[name]})
        sender.feed(content)
        return sender

    async def status_of(sender: Sender) -> int:
        sender.end()
        await sender.run()
        return sender.status

    async with app.lifespan(), anyio.create_task_group() as tasks:
        held = [upload("ann"), upload("ann")]
        scopes = [anyio.CancelScope() for _ in held]

        async def run(sender: Sender, scope: anyio.CancelScope) -> None:
            with scope:
                await sender.run()

        for sender, scope in zip(held, scopes, strict=True):
            tasks.start_soon(run, sender, scope)
        await until(lambda: all(sender.is_waiting for sender in held))
        refused = upload("ann", lines(1))
        assert await status_of(refused) == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.problem["detail"] == "The limit is 2 open uploads per caller. Close one, or wait."
        assert await status_of(upload("bob", lines(1))) == 202

        if how == "ends":
            held[0].feed(lines(1))
            held[0].end()
        elif how == "is refused":
            held[0].feed(b"no JSON\n")
            held[0].end()
        elif how == "breaks off":
            held[0].disconnect()
        else:
            scopes[0].cancel()
        await until(lambda: held[0].has_ended)
        assert await status_of(upload("ann", lines(1))) == 202
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["uploads", "event streams"])
@pytest.mark.parametrize(
    ("first", "same", "other"),
    [
        pytest.param("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2", id="IPv4"),
        pytest.param("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2", id="IPv4 in IPv6"),
        pytest.param("2001:db8::1", "2001:db8::ffff:0:0:2", "2001:db8:0:1::1", id="IPv6"),
    ],
)
async def test_without_keys_each_address_has_its_own_slots(
    what: str, first: str, same: str, other: str, tmp_path: Path
) -> None:
    """Eight slow uploads of one client once blocked uploads for everyone."""
    flock = hostile_flock()

    @flock.agent
    async def hold() -> None:
        await anyio.sleep_forever()

    app = create_app(
        flock,
        store=tmp_path / "flock.db",
        auth="anybody",
        allowed_hosts=["testserver"],
        max_uploads_per_principal=1,
        max_event_streams=1,
        body_timeout_s=PATIENCE_S,
    )
    async with app.lifespan(), anyio.create_task_group() as tasks:
        run = await app.engine.submit("hold", {})

        def sender_of(host: str) -> Sender:
            if what == "uploads":
                return Sender(app, path_of(), NDJSON, host=host)
            return Sender(app, f"/run/{run.run_id}/events", {}, host=host, method="GET")

        holder, refused, accepted = map(sender_of, (first, same, other))
        tasks.start_soon(holder.run)
        await until(lambda: holder.is_waiting if what == "uploads" else holder.status == 200)
        refused.end()
        await refused.run()
        assert refused.status == 429
        accepted.feed(lines(1) if what == "uploads" else b"")
        if what == "uploads":
            accepted.end()
        tasks.start_soon(accepted.run)
        await until(lambda: accepted.status != 0)
        assert accepted.status == (202 if what == "uploads" else 200), accepted.body
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("workers", WORKERS)
async def test_the_staged_rows_of_a_killed_server_are_removed_at_the_next_start(workers: int, tmp_path: Path) -> None:
    """A real connection is uploading when all processes are killed."""
    script, path = tmp_path / "served.py", tmp_path / "flock.db"
    script.write_text("from tests.test_hostile_uploads import hostile_flock\nflock = hostile_flock()\n")
    options = ["--workers", str(workers)] if workers > 1 else []
    serve = flockapi_command("serve", str(script), "--port", "0", "--store", str(path), *options)
    with running(*serve, PYTHONPATH=str(ROOT)) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port or 0)) as connection:
            head = "POST /run/batch?agent_name=echo HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/csv\r\n"
            connection.sendall(f"{head}Content-Length: 1000000\r\n\r\ntext\r\n".encode() + b"a\r\n" * 50_000)
            wait_until(lambda: stored(path, ROWS) >= 500)
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait(PATIENCE_S)
    assert stored(path, ROWS) >= 500
    async with hostile_flock().engine(store=path) as engine:
        await until(lambda: stored(path, ROWS) == 0)
        assert await engine.list_batches(BatchFilter(limit=1)) == []


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


# Spreadsheets


FORMULAS = [
    pytest.param("\uff1d1+1", "'\uff1d1+1", id="full width"),
    pytest.param("\uff0b1", "'\uff0b1", id="full-width plus"),
    pytest.param("\uff0d1", "'\uff0d1", id="full-width minus"),
    pytest.param("\uff20x", "'\uff20x", id="full-width at"),
    pytest.param("\ufeff=1+1", "'\ufeff=1+1", id="byte order mark"),
    pytest.param("\u200b\xa0 =1+1", "'\u200b\xa0 =1+1", id="blanks and no width"),
    pytest.param("\x00@x", "'\x00@x", id="control"),
    pytest.param("\n=1+1", "'\n'=1+1", id="newline"),
    pytest.param("a;=1+1", "a;'=1+1", id="semicolon"),
    pytest.param('a; "=1+1"', 'a;\' "=1+1"', id="semicolon and quote"),
    pytest.param("a\r\n-1;b", "a\r\n'-1;b", id="next line"),
    pytest.param("a\t\ufeff\uff1d1", "a\t'\ufeff\uff1d1", id="tab"),
    pytest.param("a=1; b-c\nd", "a=1; b-c\nd", id="no formula"),
]


@pytest.mark.parametrize(("text", "cell"), FORMULAS)
def test_a_formula_is_text_wherever_a_spreadsheet_may_find_it(text: str, cell: str) -> None:
    """This includes names of columns, errors and kept columns. A spreadsheet may split cells at semicolons."""
    item = Run(
        run_id="1",
        flock="hostile",
        agent_name="echo",
        inputs=msgspec.Raw(msgspec.json.encode({"text": text})),
        created_at=datetime.now(UTC),
        extra=msgspec.Raw(msgspec.json.encode({text: text})),
        result=msgspec.Raw(msgspec.json.encode({"result": [text, -5]})),
        error=text,
    )

    def table(*, escape_formulas: bool) -> list[list[str]]:
        writer = CSVWriter([text], ["text"], ["result"], escape_formulas=escape_formulas)
        lines = (writer.header() + writer.rows([item])).decode()
        return list(csv.reader(io.StringIO(lines, newline="")))

    header, row = table(escape_formulas=True)
    assert [header[0], row[0], row[1], row[4]] == [cell] * 4
    assert json.loads(row[2]) == [text, -5], "JSON can escape a character"
    assert re.search(r';[\s"\ufeff]*[=+\-@\uff1d]', row[2]) is None
    plain = table(escape_formulas=False)
    assert [plain[0][0], plain[1][0], plain[1][1], plain[1][4]] == [text] * 4


def test_a_long_cell_of_separators_takes_no_longer_than_a_long_text() -> None:
    def took_s(text: str) -> float:
        writer, began = CSVWriter([text], None, None), time.thread_time()
        writer.header()
        return time.thread_time() - began

    plain_s = max(took_s("a;" * (MIB // 2)) for _ in range(3))
    for text in (";" * MIB, "\n" * MIB, " " * MIB, "; " * (MIB // 2), ";" + '"' * MIB, ";=" * (MIB // 2)):
        assert took_s(text) < 20 * plain_s


async def test_a_named_file_has_the_size_limit_of_an_upload(tmp_path: Path) -> None:
    """The response is the same as to a long upload, and the staged rows are removed."""
    path, folder = tmp_path / "flock.db", tmp_path / "rows"
    folder.mkdir()
    (folder / "long.csv").write_bytes(b"text\n" + b"a\n" * 100_000)
    (folder / "short.csv").write_bytes(b"text\na\n")
    app = create_app(hostile_flock(), store=path, auth="host", csv_dir=folder, max_upload_bytes=150_000)
    async with app.lifespan():
        for name, status in (("long.csv", 413), ("short.csv", 202)):
            sender = Sender(app, "/run/batch", JSON)
            sender.feed(batch_of(batch_inputs=name))
            sender.end()
            await sender.run()
            assert sender.status == status, sender.body
            if status == 413:
                assert sender.problem["detail"] == (
                    "The file is longer than 150000 bytes, the limit of this server. Split it."
                )
                await until(lambda: stored(path, ROWS) == 0)

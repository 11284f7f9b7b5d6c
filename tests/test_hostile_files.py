"""Hostile files are refused or stored, and never executed or shown; ``python -m tests.hostile_files`` sends more."""

import contextlib
import itertools
import re
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from flock.web import body
from flockapi import create_app
from tests.hostile_files import attack, flock_of_files, trap
from tests.images_once import peak_of
from tests.support import PATIENCE_S
from tests.support.http import client_of, wait_for
from tests.support.servers import Served, serving
from tests.support.sockets import little_memory
from tests.test_files import stored

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

MIB = 1024 * 1024
FORM = "POST /run/flock HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b"
UPLOAD = "POST /files HTTP/1.1\r\nContent-Type: application/octet-stream"
FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
TEXT = b'--b\r\nContent-Disposition: form-data; name="note"\r\n\r\n'


def send_endlessly(port: int, head: str, start: bytes, piece: bytes) -> bytes:
    """Send *start*, and *piece* without end, and return what the server sends until it closes the connection.

    Between pieces of one byte there is a pause.
    """
    ended = threading.Event()
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:

        def send() -> None:
            with contextlib.suppress(OSError):
                connection.sendall(f"{head}\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                connection.sendall(b"%x\r\n%b\r\n" % (len(start), start) if start else b"")
                while not ended.wait(0 if len(piece) > 1 else 0.02):
                    connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))

        sender = threading.Thread(target=send)
        sender.start()
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it was closed, and more was sent
            while received := connection.recv(65_536):
                answer += received
        ended.set()
        sender.join()
        return answer


@pytest.mark.parametrize(
    ("head", "start", "piece", "status"),
    [
        pytest.param(UPLOAD, b"", b"x" * 65_536, 413, id="a file"),
        pytest.param(UPLOAD, b"", b"x", 408, id="a file, slowly"),
        pytest.param(FORM, FILE, b"x" * 65_536, 413, id="a file in a form"),
        pytest.param(FORM, FILE, b"x", 408, id="a file in a form, slowly"),
        pytest.param(FORM, TEXT, b"x" * 65_536, 422, id="a text in a form"),
        pytest.param(FORM, TEXT, b"x", 408, id="a text in a form, slowly"),
        pytest.param(FORM, b"--b\r\nX-Long: ", b"x" * 65_536, 422, id="a header of a part"),
        pytest.param(FORM, b"--b\r\n", b"X: y\r\n" * 1000, 422, id="headers of a part"),
        pytest.param(FORM, b"", b"\r\n" * 10_000, 413, id="empty lines before a form"),
        pytest.param(FORM, FILE + b"x\r\n--b--\r\n", b"x" * 65_536, 413, id="what follows a form"),
        pytest.param(FORM, b"", FILE + b"x\r\n", 422, id="files in a form"),
        pytest.param(FORM, b"", TEXT + b"x\r\n", 422, id="texts in a form"),
    ],
)
async def test_a_body_without_end_is_refused_and_its_connection_closed(
    head: str, start: bytes, piece: bytes, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real socket, with little memory, and nothing of it is left."""
    app = create_app(
        flock_of_files(), store=tmp_path / "runs.db", auth="host", max_upload_bytes=48 * MIB, body_timeout_s=0.5
    )
    monkeypatch.setattr(body, "DRAIN_TIMEOUT_S", 1)
    async with Served(app) as served:
        with little_memory(16 * MIB):
            answer = await anyio.to_thread.run_sync(send_endlessly, served.port, head, start, piece)
        found = re.match(rb"HTTP/1\.1 (\d+) ", answer)
        assert found, answer
        assert (int(found[1]), b"connection: close" in answer.lower()) == (status, True), answer
        async with httpx.AsyncClient(base_url=served.url) as client:
            assert (await client.get("/runs")).json()["runs"] == []
            assert (await client.post("/files", content=b"x")).status_code == 201, "the slot of the upload is free"
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize("part", [FILE, TEXT])
async def test_a_form_of_10_000_parts_is_refused(part: bytes, tmp_path: Path) -> None:
    app = create_app(flock_of_files(), store=tmp_path / "runs.db", auth="host")
    form = b'--b\r\nContent-Disposition: form-data; name="agent_name"\r\n\r\nimage\r\n' + (part + b"x\r\n") * 10_000
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url) as client:
        response = await client.post("/run/flock", content=form + b"--b--\r\n", headers=headers)
    assert (response.status_code, "The form is not valid: Too many" in response.text) == (422, True), response.text
    assert "100" in response.text
    assert stored(tmp_path) == []


async def test_no_hostile_file_is_executed_or_shown(tmp_path: Path) -> None:
    app = create_app(flock_of_files(), store=tmp_path / "runs.db", auth="host")
    with trap() as (port, mark):
        async with app.lifespan(), client_of(app) as client:
            outcomes = await attack(client, 120, port, mark, seed=1)
    assert outcomes["shown as an image"] > 3
    assert outcomes["only downloaded"] > 10
    assert outcomes["422"] > 10


READING = """
from flock.core import File, Flock

flock = Flock("reading")

@flock.agent
def size(file: File) -> int:
    return file.size

@flock.agent
def read(file: File) -> int:
    return len(file.read())
"""


async def content(megabytes: int, number: int = 0, start: bytes = b"", end: bytes = b"") -> AsyncIterator[bytes]:
    """Yield a file piece by piece, between the other parts of a form."""
    for piece in (start, *itertools.repeat(number.to_bytes(MIB), megabytes), end):
        yield piece


async def test_a_server_holds_no_upload_and_no_table_of_files_in_memory(tmp_path: Path) -> None:
    """A file of 60 MB, by itself and in a form, and 120 files of 1 MB, which an agent reads."""
    (tmp_path / "app.py").write_text(READING)
    with serving(tmp_path / "app.py", tmp_path) as server:
        async with httpx.AsyncClient(base_url=server.url) as client:

            async def read(count: int) -> None:
                sent = [(await client.post("/files", content=content(1, n))).json()["file_id"] for n in range(count)]
                table: Any = {"content": "\n".join(["file", *sent]), "headers": {"Content-Type": "text/csv"}}
                batch = (await client.post("/run/batch?agent_name=read", **table)).json()
                done = await wait_for(client, f"/batch/{batch['batch_id']}")
                assert (done["completed_items"], done["failed_items"]) == (count, 0)

            await read(10)
            before = peak_of(server.process.pid)
            assert (await client.post("/files", content=content(60))).json()["size"] == 60 * MIB
            form = content(60, 0, TEXT.replace(b"note", b"agent_name") + b"size\r\n" + FILE, b"\r\n--b--\r\n")
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            run = (await client.post("/run/flock", content=form, headers=headers)).json()
            assert run["result"] == {"result": 60 * MIB}, run
            await read(120)
            assert peak_of(server.process.pid) - before < 20
    assert len(stored(tmp_path)) == 121

"""Images, audio and documents as inputs: ways in, what is kept, and what is refused. The page is docs/files.md."""

import base64
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from starlette.datastructures import UploadFile

from flock.core import Audio, Document, File, Flock, FlockFactory, Image, data_url
from flock.engine import retention
from flock.errors import CallError, Conflict, InvalidData, NotFound, RunFailed, StoreError, TooLarge
from flock.files import check_declared, media_type_of, safe_name
from flock.runs import RunContext, RunFilter
from flock.store import contents, queries
from flock.testing import FakeModel, Reply
from flock.web.auth import new_key
from flockapi import FlockAPI, create_app
from tests.support import EXAMPLES, PATIENCE_S, ROOT
from tests.support.http import client_of, post_run, wait_until
from tests.support.pages import blocks_of, printed_by
from tests.support.receivers import SECRET, Inbox
from tests.support.servers import Served
from tests.support.sockets import socket_server

pytestmark = pytest.mark.anyio

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
)
PDF = b"%PDF-1.4\n1 0 obj"
PNG_ID = "f6bc3cb8a1f0f7b5"
KEYS = {"ann": new_key(), "bob": new_key(), "ops:admin": new_key()}


def receipts() -> Flock:
    flock = Flock("files")

    @flock.agent
    def look(photo: Image, note: str = "", more: list[File] = []) -> dict[str, Any]:  # noqa: B006
        contents = [file.read() for file in more]
        return {
            "type": photo.media_type,
            "name": photo.name,
            "read": len(photo.read()),
            "note": note,
            "more": len(contents),
        }

    @flock.agent
    def read(letter: Document | None = None) -> str:
        return "" if letter is None else letter.text()

    @flock.agent
    def hear(sound: Audio) -> str:
        return sound.sha256

    return flock


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-files/*/*"))


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[FlockAPI]:
    app = create_app(receipts(), store=tmp_path / "runs.db", api_keys=KEYS)
    async with app.lifespan():
        yield app


def as_user(app: Any, name: str = "ann") -> httpx.AsyncClient:
    return client_of(app, {"Authorization": f"Bearer {KEYS[name]}"})


# Ways in


async def test_a_data_url_is_stored_once_and_the_record_has_only_a_reference(api: Any, tmp_path: Path) -> None:
    async with as_user(api) as client:
        for _ in range(2):
            response = await post_run(client, "look", {"photo": data_url(PNG)})
        body = response.json()
    assert body["result"]["result"] == {"type": "image/png", "name": "", "read": len(PNG), "note": "", "more": 0}
    (path,) = stored(tmp_path)
    assert path.read_bytes() == PNG
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    with contextlib.closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        (inputs,) = db.execute("SELECT inputs FROM runs LIMIT 1").fetchone()
    assert json.loads(inputs) == {"photo": {"file_id": path.name, "media_type": "image/png", "size": len(PNG)}}


async def test_a_file_that_was_sent_before_is_named_by_its_id(api: Any) -> None:
    async with as_user(api) as client:
        assert (await client.post("/files")).status_code == 422, "it is empty"
        sent = await client.post("/files", content=PNG, headers={"Content-Type": "image/png"})
        assert sent.status_code == 201, sent.text
        file = sent.json()
        assert file == {"file_id": file["file_id"], "media_type": "image/png", "size": len(PNG)}
        for photo in (file, {"file_id": file["file_id"], "name": "x/a.png"}, file["file_id"]):
            response = await post_run(client, "look", {"photo": photo})
            assert response.json()["result"]["result"]["read"] == len(PNG), response.text
    async with as_user(api, "bob") as client:
        other = await post_run(client, "look", {"photo": {"file_id": file["file_id"]}})
        assert other.status_code == (await client.get(sent.headers["Location"])).status_code == 404
        assert file["file_id"][:20] in other.json()["detail"]


async def test_a_form_has_files_and_texts_as_inputs(api: Any) -> None:
    async with as_user(api) as client:
        form = {"agent_name": "look", "note": "5", "async_run": "false"}
        photo, text = ("../a.png", PNG, "image/png"), ("b.txt", b"text", "text/csv")
        response = await client.post("/run/flock", data=form, files={"photo": photo, "more": text})
        assert response.json()["result"]["result"] == {
            **{"type": "image/png", "name": "a.png", "read": len(PNG), "note": "5", "more": 1}
        }, response.text
        parts = [("photo", photo), ("more", text), ("more", ("c.txt", b"other", "text/plain"))]
        response = await client.post("/run/flock", data=form, files=parts)
        assert response.json()["result"]["result"]["more"] == 2, response.text


@pytest.mark.parametrize(
    ("form", "files", "status", "detail"),
    [
        pytest.param({"agent_name": "look"}, [("photo", PNG)] * 2, 422, "photo", id="a part twice"),
        pytest.param({"agent_name": ["look", "read"]}, [("photo", PNG)], 422, "agent_name", id="a name twice"),
        pytest.param({"agent_name": "nobody"}, [("photo", PNG)], 404, "nobody", id="no agent"),
        pytest.param({"agent_name": "look"}, [("photo", PNG)] * 101, 422, "100", id="many files"),
        pytest.param(
            {"agent_name": "look", **{f"f{n}": "" for n in range(101)}}, [("photo", PNG)], 422, "100", id="many"
        ),
        pytest.param(
            {"agent_name": "look"}, [("photo", ("a.jpg", PNG, "image/jpeg"))], 422, "image/png", id="mismatch"
        ),
        pytest.param({"agent_name": "look"}, [("photo", b"<svg>")], 422, "text/plain", id="svg"),
    ],
)
async def test_a_form_is_refused(api: Any, form: Any, files: Any, status: int, detail: str) -> None:
    async with as_user(api) as client:
        response = await client.post("/run/flock", data=form, files=files)
    assert response.status_code == status
    assert detail in response.text


async def test_a_form_without_end_is_refused(api: Any, tmp_path: Path) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="agent_name"\r\n\r\nlook'
    async with as_user(api) as client:
        for body in (part, part + b"\r\n--b\r\n", b"", b"\r\n"):
            headers = {"Content-Type": "multipart/form-data; boundary=b"}
            response = await client.post("/run/flock", content=body, headers=headers)
            assert response.status_code in (404, 422), body
        no_boundary = await client.post("/run/flock", content=part, headers={"Content-Type": "multipart/form-data"})
        assert no_boundary.status_code == 422
    assert stored(tmp_path) == []


@pytest.mark.parametrize("charset", ["punycode", "raw_unicode_escape", "latin-1", '"utf-16"'])
async def test_a_form_is_in_utf_8(api: Any, charset: str) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="\\ud800"\r\n\r\nlook\r\n--b--\r\n'
    async with as_user(api) as client:
        headers = {"Content-Type": f"multipart/form-data; boundary=b; Charset={charset}"}
        refused = await client.post("/run/flock", content=part, headers=headers)
        headers = {"Content-Type": "multipart/form-data; charset=UTF-8; boundary=b"}
        read = await client.post("/run/flock", content=part.replace(b"\\ud800", b"agent_name"), headers=headers)
    assert (refused.status_code, "UTF-8" in refused.text) == (422, True)
    assert read.json()["errors"][0]["pointer"] == "/inputs/photo"


async def test_the_texts_of_a_form_have_the_limits_of_a_body(tmp_path: Path) -> None:
    app = create_app(receipts(), store=tmp_path / "runs.db", max_body_bytes=1000, max_json_depth=10)
    async with app.lifespan(), client_of(app) as client:
        for more, status in (({"a": "x" * 600, "b": "x" * 600}, 422), ({"more": "[" * 20 + "]" * 20}, 400)):
            response = await client.post("/run/flock", data={"agent_name": "look", **more}, files={"photo": PNG})
            assert response.status_code == status, response.text


async def test_one_file_of_a_list_has_the_error_of_its_kind() -> None:
    flock = Flock("lists")

    @flock.agent
    def show(photos: list[Image]) -> int:
        return len(photos)

    app = create_app(flock, store=":memory:")
    async with app.lifespan(), client_of(app) as client:
        for content, detail in ((b"text", "takes a PNG"), (PNG, '"result":1')):
            sent = await client.post("/run/flock", data={"agent_name": "show"}, files={"photos": content})
            assert detail in sent.text


async def test_the_files_of_a_form_that_cannot_be_written_are_an_error_of_the_store(
    api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UploadFile, "write", fail)
    async with as_user(api) as client:
        response = await client.post("/run/flock", data={"agent_name": "look"}, files={"photo": PNG})
    assert (response.status_code, "log" in response.text) == (503, True)


async def test_a_form_without_its_package_is_refused_with_the_command_that_installs_it(
    api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flock.web.files.find_spec", lambda name: None)
    async with as_user(api) as client:
        refused = await client.post("/run/flock", data={"agent_name": "look"}, files={"photo": PNG})
        assert refused.status_code == 415
        assert re.search("pip install .?python-multipart", refused.json()["detail"])
        assert stored(tmp_path) == (await client.get("/runs")).json()["runs"] == []
        assert (await post_run(client, "look", {"photo": data_url(PNG)})).json()["status"] == "completed"


async def test_a_form_of_a_page_of_another_origin_is_refused() -> None:
    app = create_app(receipts(), store=":memory:", auth="anybody")
    async with app.lifespan(), client_of(app, {"Origin": "https://evil.example"}) as client:
        for path in ("/run/flock", "/files"):
            response = await client.post(path, data={"agent_name": "read"}, files={"letter": b"x"})
            assert response.status_code == 403


async def test_items_of_a_batch_have_files(api: Any, tmp_path: Path) -> None:
    async with as_user(api) as client:
        file_id = (await client.post("/files", content=PNG)).json()["file_id"]
        csv = f"photo,note\n{file_id},a\n{file_id},b\n"
        url = "/run/batch?agent_name=look"
        check = await client.post(f"{url}&dry_run=true", content=csv, headers={"Content-Type": "text/csv"})
        assert check.json()["ok"], check.text
        batch = (await client.post(url, content=csv, headers={"Content-Type": "text/csv"})).json()
        done = (await client.get(f"/batch/{batch['batch_id']}?wait=10")).json()
        assert [item["result"]["read"] for item in done["results"]] == [len(PNG)] * 2, done
        bad = await client.post(url, content=f"photo\n{'a' * 64}\n", headers={"Content-Type": "text/csv"})
        assert bad.status_code == 422
        assert bad.json()["errors"][0]["line"] == 2
        assert (await client.delete(f"/batch/{batch['batch_id']}")).status_code == 204
    await api.engine.store.batches.sweep()
    await api.engine.store.delete_unused_files()
    assert stored(tmp_path) == []


async def test_a_run_has_at_most_100_files(api: Any, tmp_path: Path) -> None:
    async with as_user(api) as client:
        urls = [f"data:,{n}" for n in range(99)]
        fits = await post_run(client, "look", {"photo": data_url(PNG), "more": urls})
        assert fits.json()["result"]["result"]["more"] == 99, fits.text
        count = len(stored(tmp_path))
        file_id = stored(tmp_path)[0].name
        for more in (100, 300):
            sent = await post_run(client, "look", {"photo": data_url(PNG), "more": [file_id] * more})
            assert (sent.status_code, "100 files" in sent.text) == (422, True)
        sent = await post_run(client, "look", {"photo": data_url(b"text"), "more": urls})
        assert [error["pointer"] for error in sent.json()["errors"]] == ["/inputs/photo"]
    assert len(stored(tmp_path)) == count


def test_names_and_data_urls_are_read_in_no_time() -> None:
    started_s = time.process_time()
    assert safe_name("\u0301" * 3_000_000).endswith("\u0301")
    for url in ("data:;name=" + "%41" * 2_000_000 + ",a", "data:" + ";name=%41" * 100_000 + ",a"):
        receipts().agents["read"].input.take(msgspec.Raw(msgspec.json.encode({"letter": url})), "", NotFound)  # type: ignore
    with pytest.raises(InvalidData, match="base64"):
        receipts().run("read", {"letter": "data:," + "%41" * 100_000})
    assert time.process_time() - started_s < 10, "not minutes"


PAGE = ROOT / "docs" / "files.md"


async def curl(line: str, served: Served, folder: Path) -> Any:
    """Execute a line of a page with curl itself, and return the JSON that it prints."""
    command = ["curl", "-sS", "--max-time", "60", *shlex.split(line.replace("http://127.0.0.1:8344", served.url))[1:]]
    done = await anyio.run_process(command, cwd=folder)
    return json.loads(done.stdout)


async def test_the_lines_of_the_page_work_with_curl(tmp_path: Path) -> None:
    (code,) = [block.text for block in blocks_of(PAGE) if block.language == "python"]
    lines = re.findall(r"`(curl [^`]+)`", PAGE.read_text("utf-8"))
    (inputs,) = re.findall(r"and then `(.+?)`", PAGE.read_text("utf-8"))
    (tmp_path / "a.txt").write_text("To whom it may concern\n" * 100_000)  # so long that curl asks whether to send it
    (tmp_path / "a.pdf").write_bytes(PDF)
    flock = (await anyio.to_thread.run_sync(printed_by, code, PAGE))[1]["flock"]
    async with Served(create_app(flock, store=tmp_path / "runs.db", auth="host")) as served:
        form, upload = lines
        assert (await curl(form, served, tmp_path))["result"] == {"result": 500_000}
        file = await curl(upload, served, tmp_path)
        assert file == {"file_id": file["file_id"], "media_type": "text/plain", "size": 2_300_000}
        body = f'{{"agent_name": "count_words", "inputs": {inputs.replace("…", file["file_id"])}}}'
        run = f"curl http://127.0.0.1:8344/run/flock -H 'Content-Type: application/json' -d '{body}'"
        assert (await curl(run, served, tmp_path))["result"] == {"result": 500_000}
        declared = f"{upload.replace('a.txt', 'a.pdf')} -H 'Content-Type: %s'"
        assert (await curl(declared % "application/pdf", served, tmp_path))["media_type"] == "application/pdf"
        assert (await curl(declared % "image/png", served, tmp_path))["status"] == 422


async def test_the_line_of_the_example_works_with_curl(model: FakeModel, tmp_path: Path) -> None:
    names = runpy.run_path(str(EXAMPLES / "receipt.py"))
    (line,) = re.findall(r"``(curl .+?)``", names["__doc__"])
    model.replies = [Reply({"shop": "Café", "lines": [{"what": "tea", "price": "2.50"}], "total": "2.50"})]
    (tmp_path / "receipt.jpg").write_bytes(b"\xff\xd8\xff\xe0 a photo")
    engine = names["flock"].engine(store=tmp_path / "runs.db", transport=model.transport)
    async with Served(create_app(names["flock"], engine=engine, auth="host")) as served:
        run = await curl(line, served, tmp_path)
    assert run.get("status") == "completed", run
    assert run["result"]["total"] == "2.50"
    assert data_url(tmp_path / "receipt.jpg").partition(",")[2] in str(model.requests[0]["messages"][-1])


# What comes out


def kept_beside(folder: Path) -> bytes:
    """Return what the store and all other files have, but those of clients."""
    return b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file() and file not in stored(folder))


async def test_no_way_in_leaves_a_content_in_the_store(tmp_path: Path) -> None:
    """Neither as base64 nor as it is."""
    content = PNG + bytes(range(256)) * 4
    data = base64.b64encode(content).decode()
    said = {"messageId": "m", "role": "ROLE_USER", "parts": [{"raw": data, "mediaType": "image/png"}]}
    block = {"type": "image", "data": data, "mimeType": "image/png"}
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(content)}}]}]
    response = [{"role": "user", "content": [{"type": "input_image", "image_url": data_url(content)}]}]

    def rpc(method: str, **params: Any) -> dict[str, Any]:
        return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}

    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "JSON": ("/run/flock", {"json": {"agent_name": "look", "inputs": {"photo": data_url(content)}}}),
        "form": ("/run/flock", {"data": {"agent_name": "look"}, "files": {"photo": content}}),
        "upload": ("/files", {"content": content}),
        "batch": ("/run/batch", {"json": {"agent_name": "look", "batch_inputs": [{"photo": data_url(content)}]}}),
        "chat": ("/v1/chat/completions", {"json": {"model": "look", "messages": chat}}),
        "response": ("/v1/responses", {"json": {"model": "look", "input": response}}),
        "A2A": ("/a2a/look", {"json": rpc("SendMessage", message=said), "headers": {"A2A-Version": "1.0"}}),
        "MCP": ("/mcp", {"json": rpc("tools/call", name="look", arguments={"photo": block})}),
    }
    app = create_app(receipts(), store=tmp_path / "runs.db", auth="host", protocols=["openai", "a2a", "mcp"])
    async with app.lifespan(), client_of(app) as client:
        for way, (path, sent) in ways.items():
            answer = await client.post(path, **sent)
            if way == "batch":
                answer = await client.get(f"/batch/{answer.json()['batch_id']}?wait=10")
            assert f"{len(content)}" in answer.text, (way, answer.text)
            kept = kept_beside(tmp_path)
            assert stored(tmp_path)[0].name.encode() in kept, way
            for secret in (data[100:130].encode(), content[100:120], content[100:120].hex().encode()):
                assert secret not in kept, way
        assert len((await client.get("/runs")).json()["runs"]) == len(ways) - 2


async def test_only_an_image_is_shown_by_a_browser(api: Any) -> None:
    page = b"<html><script>alert(1)</script>"
    async with as_user(api) as client:
        for content, media_type, place in ((PNG, "image/png", "inline"), (page, "text/plain", "attachment")):
            sent = await client.post("/files", content=content)
            for method in ("GET", "HEAD"):
                got = await client.request(method, sent.headers["Location"])
                assert got.status_code == 200
                assert got.headers["content-type"].partition(";")[0] == media_type
                assert got.headers["content-disposition"] == place
                assert got.headers["content-security-policy"] == "default-src 'none'; sandbox"
                assert got.headers["x-content-type-options"] == "nosniff"
            assert (await client.get(sent.headers["Location"])).content == content
        for file_id in ("a", "a" * 64, "..%2f..%2fruns.db", "A" * 64):
            assert (await client.get(f"/files/{file_id}")).status_code == 404


# Bad input


@pytest.mark.parametrize(
    "sent",
    [
        "http://a.example/a.png",
        "https://a.example/",
        "file:///etc/passwd",
        "FTP://x",
        5,
        True,
        [],
        {},
        {"url": "http://a"},
    ],
)
async def test_no_address_is_fetched(api: Any, sent: Any) -> None:
    async with as_user(api) as client:
        response = await post_run(client, "look", {"photo": sent})
    assert response.status_code == 422
    (error,) = response.json()["errors"]
    assert error["pointer"] == "/inputs/photo"
    assert "POST /files" in error["detail"]


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("http://127.0.0.1:{port}/a.png", "no address is fetched: send a data URL"),
        ("HTTPS://127.0.0.1:{port}", "or the file_id that POST /files returns"),
        ("ftp://127.0.0.1:{port}/a", "a part of a form"),
        ("file:///etc/passwd", "POST /files"),
        ("data:image/jpeg;base64,iVBORw0KGgo=", "declared as image/jpeg, but the content is image/png"),
    ],
)
async def test_a_link_in_a_form_or_a_table_is_refused_and_nobody_connects(
    api: Any, link: str, words: str, tmp_path: Path
) -> None:
    """Also as a row that is skipped, and beside one that is a file."""

    async def accept(stream: Any) -> None:
        await stream.receive()

    async with socket_server(accept) as (url, connections), as_user(api) as client:
        link = link.format(port=url.split(":")[2].partition("/")[0])
        form = await client.post("/run/flock", data={"agent_name": "look"}, files={"photo": (None, link)})
        cell, path = f'photo\n"{link}"\n', "/run/batch?agent_name=look"
        table = await client.post(path, content=cell, headers={"Content-Type": "text/csv"})
        file_id = (await client.post("/files", content=PNG)).json()["file_id"]
        rows: Any = {"content": f"{cell}{file_id}\n", "headers": {"Content-Type": "text/csv"}}
        batch = (await client.post(f"{path}&on_invalid=skip", **rows)).json()
        done = (await client.get(f"/batch/{batch['batch_id']}?wait=10")).json()
    assert (form.status_code, table.status_code) == (422, 422)
    failed, good = done["results"]
    for problem in (form.json()["errors"][0]["detail"], table.json()["errors"][0]["detail"], failed["error"]):
        assert words in problem
    assert (failed["error_type"], good["result"]["read"]) == ("invalid_input", len(PNG))
    assert (connections, len(stored(tmp_path))) == ([], 1)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/jpeg;base64," + base64.b64encode(PNG).decode(), "image/png"),
        ("data:image/png;base64," + base64.b64encode(b"<html>").decode(), "text/plain"),
        ("data:image/svg+xml,<svg/>", "image/svg"),
        ("data:image/png;base64,!!!", "not valid"),
        ("data:image/png;base64", "file is empty"),
        ("data:" + "a" * 5000 + ",x", "declared as aaa"),
        ("data:;base64,AAAA", "application/octet-stream"),
        ("data:,", "file is empty"),
    ],
)
async def test_a_data_url_is_checked(api: Any, url: str, problem: str, tmp_path: Path) -> None:
    async with as_user(api) as client:
        response = await post_run(client, "look", {"photo": url})
    assert response.status_code == 422
    assert problem in response.json()["errors"][0]["detail"]
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\0\0\0\0WEBPVP8", "image/webp"),
        (b"RIFF\0\0\0\0WAVEfmt", "audio/wav"),
        (b"ID3\x04", "audio/mpeg"),
        (b"\xff\xfb\x90", "audio/mpeg"),
        (b"OggS\0", "audio/ogg"),
        (b"fLaC", "audio/flac"),
        (b"\0\0\0\x20ftypM4A ", "audio/mp4"),
        (PDF, "application/pdf"),
        (b"<svg onload=alert(1)>", "text/plain"),
        ("x" * 1023 + "é").encode()[:1024] and (b"x" * 1023 + "é".encode()[:1], "text/plain"),
        (b"PK\x03\x04\x14\0", "application/octet-stream"),
        (b"a\0b", "application/octet-stream"),
        (b"", "text/plain"),
    ],
)
def test_the_content_decides_the_media_type(head: bytes, found: str) -> None:
    assert media_type_of(head) == found
    check_declared("", found)
    check_declared(found.upper() + "; charset=utf-8", found)


@pytest.mark.parametrize(
    ("declared", "found", "is_valid"),
    [
        ("audio/x-wav", "audio/wav", True),
        ("audio/x-m4a", "audio/mp4", True),
        ("audio/m4a", "audio/mp4", True),
        ("audio/x-flac", "audio/flac", True),
        ("video/ogg", "audio/ogg", True),
        ("text/html", "text/plain", True),
        ("application/geo+json", "text/plain", True),
        ("application/zip", "application/octet-stream", True),
        ("application/octet-stream", "image/png", True),
        ("image/svg+xml", "text/plain", False),
        ("image/png", "application/octet-stream", False),
        ("text/plain", "application/pdf", False),
        ("application/pdf", "text/plain", False),
    ],
)
def test_a_declared_type_must_fit(declared: str, found: str, is_valid: bool) -> None:
    if is_valid:
        check_declared(declared, found)
    else:
        with pytest.raises(ValueError, match="but the content is"):
            check_declared(declared, found)


@pytest.mark.parametrize("declared", ["image/png", ""])
async def test_an_empty_file_is_said_to_be_empty(api: FlockAPI, declared: str) -> None:
    async with as_user(api) as client:
        response = await post_run(client, "look", {"photo": f"data:{declared};base64,"})
        assert response.status_code == 422
        assert response.json()["errors"][0]["detail"].startswith("The file is empty")
        if declared:
            response = await client.post("/files", content=b"", headers={"Content-Type": declared})
            assert (response.status_code, "The file is empty." in response.text) == (422, True)


def test_a_name_has_no_folders_and_no_characters_that_hide_others() -> None:
    assert safe_name("../../etc/passwd") == "passwd"
    assert safe_name("C:\\temp\\a.png") == "a.png"
    assert safe_name("a\0\u202egnp.exe\n") == "agnp.exe"
    assert safe_name(".bashrc") == "bashrc"
    assert len(safe_name("a" * 4096 + ".png")) == 200


def test_an_agent_takes_lists_optional_files_and_other_kinds() -> None:
    flock = receipts()
    assert flock.run("read", {"letter": None}) == {"result": ""}
    assert flock.run("read", {"letter": "data:,hello"}) == {"result": "hello"}
    with pytest.raises(InvalidData, match="takes a WAV"):
        flock.run("hear", {"sound": data_url(PNG)})
    assert flock.agents["look"].input.schema["properties"]["photo"]["title"] == "Image"


def test_the_text_of_a_signature_names_the_types() -> None:
    signature = (
        "one: Image | the photo, sound: Audio, letter: Document, any: File, many: list[Image], maybe: File | None"
    )
    agent = Flock("typed").add_agent(FlockFactory.create_default_agent("a", input=signature, output="text: str"))
    types = {field.name: field.type for field in agent.input.fields}
    assert types == {
        **{"one": Image, "sound": Audio, "letter": Document, "any": File},
        **{"many": list[Image], "maybe": File | None},
    }
    assert agent.input.has_files
    assert agent.input.schema["properties"]["one"]["description"] == "the photo"


def test_a_function_names_the_types() -> None:
    flock = Flock("typed")
    made = flock.add_agent(receipts().agents["look"])
    assert made.input.has_files
    assert not Flock("none").add_agent(lambda_free).input.has_files


def lambda_free(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("content", "outcome"),
    [
        ("\ufeffäöü\r\n".encode(), {"result": "äöü\r\n"}),
        (b"", {"result": ""}),
        (PDF, "The file 'a' is application/pdf, not a text. Use read()."),
        (PNG, "The file 'a' is image/png, not a text. Use read()."),
        ("äöü".encode("latin-1"), "UnicodeDecodeError"),
        (b"a" * 2000 + b"\xff", "UnicodeDecodeError"),
    ],
    ids=["with a mark", "empty", "PDF", "PNG", "latin-1", "latin-1 at the end"],
)
def test_only_a_text_in_utf_8_is_read_as_text(content: bytes, outcome: Any) -> None:
    flock = Flock("texts")

    @flock.agent
    def text(file: File) -> str:
        return file.text()

    url = f"data:;name=a;base64,{base64.b64encode(content).decode()}"
    if isinstance(outcome, dict):
        assert flock.run("text", {"file": url}) == outcome
    else:
        with pytest.raises(RunFailed, match=re.escape(outcome)):
            flock.run("text", {"file": url})


def test_a_file_can_be_opened_several_times_and_each_is_closed_by_itself() -> None:
    flock = Flock("opened")

    @flock.agent
    def parts(file: File) -> list[str]:
        with file.open() as first, file.open() as second:
            found = [first.read(3), second.read(), first.read()]
        with pytest.raises(ValueError, match="closed file"):
            first.read()
        with file.open() as opened, pytest.raises(io.UnsupportedOperation):
            opened.write(b"x")
        return [part.decode() for part in (*found, file.read())]

    assert flock.run("parts", {"file": "data:,abcdef"}) == {"result": ["abc", "abcdef", "def", "abcdef"]}


def test_a_file_can_be_read_only_in_a_step(tmp_path: Path) -> None:
    seen: list[Image] = []
    flock = Flock("kept")

    @flock.agent
    def keep(photo: Image) -> int:
        seen.append(photo)
        return photo.size

    (tmp_path / "ä b.png").write_bytes(PNG)
    assert flock.run("keep", {"photo": data_url(tmp_path / "ä b.png")}) == {"result": len(PNG)}
    assert seen[0].name == "ä b.png"
    with pytest.raises(CallError, match="not stored any more"):  # the store was in memory, and is gone
        seen[0].read()


def test_an_agent_hands_a_file_to_another_one() -> None:
    flock = receipts()

    @flock.agent(next_agent="look")
    def first(photo: Image) -> dict[str, Any]:
        return {"photo": photo, "note": "from the first"}

    assert flock.run("first", {"photo": data_url(PNG)})["result"]["read"] == len(PNG)


async def test_a_download_takes_a_slot_of_its_caller(tmp_path: Path) -> None:
    content = b"x" * 200_000
    app = create_app(receipts(), store=tmp_path / "runs.db", max_downloads_per_principal=0)
    async with app.lifespan(), client_of(app) as client:
        path = (await client.post("/files", content=content)).headers["Location"]
        assert (await client.get(path)).status_code == 429
        assert (await client.head(path)).headers["content-length"] == "200000"
    app = create_app(receipts(), store=tmp_path / "runs.db")
    async with app.lifespan(), client_of(app) as client:
        whole = await client.get(path, headers={"Range": "bytes=2-4"})
        assert (whole.status_code, whole.content) == (200, content)


# What is kept, and how long


async def test_a_content_is_deleted_with_the_last_run_that_has_it(api: Any, tmp_path: Path) -> None:
    store = api.engine.store
    async with as_user(api) as client, as_user(api, "bob") as bob:
        runs = [(await post_run(client, "look", {"photo": data_url(PNG)})).json()["run_id"] for _ in range(2)]
        await post_run(bob, "look", {"photo": data_url(PNG)})
        assert len(stored(tmp_path)) == 2  # one for each principal
        await client.delete(f"/run/{runs[0]}")
        await store.delete_unused_files()
        assert len(stored(tmp_path)) == 2
        await client.delete(f"/run/{runs[1]}")
        await store.delete_unused_files()
        assert len(stored(tmp_path)) == 1
        assert (await bob.get(f"/files/{stored(tmp_path)[0].name}")).status_code == 200


async def test_a_file_that_is_sent_again_outlives_its_last_run(api: Any, tmp_path: Path) -> None:
    async with as_user(api) as client:
        run = (await post_run(client, "look", {"photo": data_url(PNG)})).json()
        sent = await client.post("/files", content=PNG)
        await client.delete(f"/run/{run['run_id']}")
        await api.engine.store.delete_unused_files()
        assert (await client.get(sent.headers["Location"])).status_code == 200


async def test_retention_deletes_files_with_their_runs(tmp_path: Path) -> None:
    flock = receipts()
    async with flock.engine(store=tmp_path / "runs.db", keep_for_s=0) as engine:
        run = await engine.submit("look", {"photo": data_url(PNG)})
        await engine.wait(run.run_id)
        await engine.delete_old()
        await engine.store.delete_unused_files()
        assert stored(tmp_path) == []


async def test_a_running_engine_deletes_files_with_their_runs_and_others_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receipts().engine(store=tmp_path / "runs.db") as engine:
        old, fresh = [await engine.files().keep(each(content)) for content in (b"old", b"fresh")]
    for path in stored(tmp_path):
        aged(path, 86_410 if path.name == old.file_id else 86_300)
    monkeypatch.setattr(retention, "RETENTION_INTERVAL_S", 0.05)
    async with receipts().engine(store=tmp_path / "runs.db", keep_for_s=0) as engine:
        run = await engine.submit("read", {"letter": "data:,of a run"})
        assert (await engine.wait(run.run_id)).value == {"result": "of a run"}
        with anyio.fail_after(PATIENCE_S):
            while [path.name for path in stored(tmp_path)] != [fresh.file_id]:  # noqa: ASYNC110 - a folder has no event
                await anyio.sleep(0.01)
        with pytest.raises(NotFound):
            await engine.get_run(run.run_id)


def aged(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


async def test_what_no_run_takes_is_kept_for_a_day(tmp_path: Path) -> None:
    flock = receipts()
    async with flock.engine(store=tmp_path / "runs.db") as engine:
        used, unused, again = [await engine.files("ann").keep(each(b"%d" % n)) for n in range(3)]
        run = await engine.submit("read", {"letter": used.file_id}, principal="ann")
        folder = engine.files("ann").path(used.file_id).parent
        (folder / "left.tmp").touch()
        for path in stored(tmp_path):
            aged(path, contents.KEEP_UNUSED_S + 1)
        assert engine.files("ann").find(again.file_id).size == 1  # this counts as a use
        await engine.store.delete_unused_files(contents.KEEP_UNUSED_S)
        assert {path.name for path in stored(tmp_path)} == {used.file_id, again.file_id}
        assert (await engine.wait(run.run_id)).value == {"result": "0"}
        with pytest.raises(NotFound):
            engine.files("ann").find(unused.file_id)


async def test_a_content_outlives_a_deletion_of_its_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with receipts().engine(store=tmp_path / "runs.db") as engine:
        store: Any = engine.store
        run = await engine.wait((await engine.submit("read", {"letter": "data:,hello"})).run_id)
        (path,) = stored(tmp_path)
        change = store.change

        async def change_and_fail(apply: Any, then: Any = None) -> Any:
            def both(db: sqlite3.Connection) -> None:
                queries.delete_runs(db, [run.run_id])
                apply(db)
                raise sqlite3.OperationalError("disk I/O error")

            return await change(both, then)

        with monkeypatch.context() as patch:
            patch.setattr(store, "change", change_and_fail)
            with pytest.raises(StoreError):
                await store.delete_unused_files(0)
        assert (await engine.get_run(run.run_id)).value == {"result": "hello"}
        assert path.exists()
        await engine.delete_run(run.run_id)
        await store.delete_unused_files()
        assert not path.exists()


async def test_files_are_deleted_in_several_transactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flock.store.store.DELETED_FILES", 2)
    async with receipts().engine(store=tmp_path / "runs.db") as engine:
        runs = [await engine.submit("read", {"letter": f"data:,{n}"}) for n in range(5)]
        for run in runs:
            await engine.wait(run.run_id)
        for n in range(5, 10):
            await engine.files().keep(each(b"%d" % n))
        again = await engine.submit("read", {"letter": "data:,0"})
        await engine.wait(again.run_id)
        for run in runs:
            await engine.delete_run(run.run_id)
        await engine.store.delete_unused_files(0)
        assert [path.read_text() for path in stored(tmp_path)] == ["0"]
        await engine.delete_run(again.run_id)
        await engine.store.delete_unused_files()
        assert stored(tmp_path) == []


async def test_a_run_is_not_accepted_if_its_file_was_deleted_meanwhile(tmp_path: Path) -> None:
    flock = receipts()
    async with flock.engine(store=tmp_path / "runs.db") as engine:
        box = engine.files(None)
        file = await box.keep(each(b"text"))
        take = flock.agents["read"].input.take

        def take_and_delete(*args: Any) -> Any:
            taken = take(*args)
            box.path(file.file_id).unlink()
            return taken

        flock.agents["read"].input.take = take_and_delete  # type: ignore
        with pytest.raises(Conflict, match="Send it again"):
            await engine.submit("read", {"letter": file.file_id})


async def test_a_run_whose_file_is_gone_fails(tmp_path: Path) -> None:
    flock = Flock("gone")

    @flock.agent
    def gone(letter: Document) -> str:
        for path in stored(tmp_path):
            path.unlink()
        return letter.text()

    async with flock.engine(store=tmp_path / "runs.db") as engine:
        run = await engine.submit("gone", {"letter": "data:,hello"})
        done = await engine.wait(run.run_id)
        assert done.error_type == "call_error"
        assert "not stored any more" in str(done.error)


def patient(webhook_url: str | None = None) -> Flock:
    """A flock with agents that ask a person before they read a file, or before a model gets it."""
    flock = Flock("patient", model="openai/gpt-4o", webhook_url=webhook_url)
    flock.add_agent(FlockFactory.create_default_agent("judge", input="photo: Image", output="good: bool"))

    @flock.agent
    async def ask_and_read(context: RunContext, letter: Document) -> str:
        await context.ask("Is it yours?", bool)
        return letter.text()

    @flock.agent
    async def ask_and_show(context: RunContext, photo: Image) -> dict[str, Any]:
        await context.ask(f"Is {photo.name} yours?", bool)
        return {"photo": photo, "judged": await context.run_agent("judge", {"photo": photo})}

    return flock


async def asked(client: httpx.AsyncClient, agent_name: str, **more: Any) -> Any:
    """Return a new run when it waits for an answer."""
    run = (await post_run(client, agent_name, async_run=True, **more)).json()
    return await wait_until(client, f"/run/{run['run_id']}", lambda body: body["status"] == "waiting")


async def answered(client: httpx.AsyncClient, run: Any) -> Any:
    """Return a run that waits when it is answered and has ended."""
    url = f"/run/{run['run_id']}"
    await client.post(f"{url}/calls/{run['waiting_for'][0]['call_id']}", json={"output": True})
    return await wait_until(client, url, lambda body: body["status"] in ("completed", "failed"))


async def test_nobody_can_delete_the_file_of_a_run_that_waits(tmp_path: Path) -> None:
    app = create_app(patient(), store=tmp_path / "runs.db", auth="host")
    async with app.lifespan(), client_of(app) as client:
        letter = {"letter": "data:;name=a.txt,hello"}
        other = await answered(client, await asked(client, "ask_and_read", inputs=letter))
        run = await asked(client, "ask_and_read", inputs=letter)
        (path,) = stored(tmp_path)
        deleted = await client.delete(f"/run/{other['run_id']}"), await client.delete(f"/run/{run['run_id']}")
        assert [response.status_code for response in deleted] == [204, 409]
        assert (await client.delete(f"/files/{path.name}")).status_code == 405
        await app.engine.store.delete_unused_files(0)  # type: ignore
        assert (await answered(client, run))["result"] == {"result": "hello"}
        assert (await client.delete(f"/run/{run['run_id']}")).status_code == 204
        await app.engine.store.delete_unused_files(0)  # type: ignore
        assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("agent_name", "inputs", "name"),
    [
        ("ask_and_read", {"letter": "data:;name=a.txt,hello"}, "a.txt"),
        ("ask_and_read", {"letter": "data:,hello"}, "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"),
        ("ask_and_show", {"photo": data_url(PNG).replace(";", ";name=b.png;")}, "b.png"),
    ],
)
async def test_a_run_whose_file_was_removed_by_hand_fails_and_names_it(
    agent_name: str, inputs: Any, name: str, tmp_path: Path, model: FakeModel
) -> None:
    """A model is not asked without it."""
    flock = patient()
    engine = flock.engine(store=tmp_path / "runs.db", transport=model.transport)
    app = create_app(flock, engine=engine, auth="host")
    async with app.lifespan(), client_of(app) as client:
        run = await asked(client, agent_name, inputs=inputs)
        for path in stored(tmp_path):
            path.unlink()
        run = await answered(client, run)
        assert (run["status"], run["error_type"], model.requests) == ("failed", "call_error", [])
        assert f"The file '{name}' is not stored any more." in run["error"]
        again = await asked(client, agent_name, inputs=inputs)
        model.replies = [Reply({"good": True})] if "photo" in inputs else []
        assert (await answered(client, again))["status"] == "completed", "it was sent again"


async def test_what_clients_are_told_of_a_file_is_its_name_and_its_size(tmp_path: Path, model: FakeModel) -> None:
    """In runs, lists, streams, sessions, questions and webhooks: never the content, and no path."""
    inbox, told = Inbox(), dict[str, str]()
    async with inbox.serve() as receiver:
        flock = patient(receiver.url)
        engine = flock.engine(store=tmp_path / "runs.db", transport=model.transport)
        app = create_app(flock, engine=engine, auth="host", webhook_secrets=[SECRET])
        async with app.lifespan(), client_of(app) as client:
            photo = {"photo": {"file_id": data_url(PNG), "name": "a.png"}}
            run = await asked(client, "ask_and_show", inputs=photo, session_id="s1")
            told["asked"], told["open"] = json.dumps(run), (await client.get("/questions")).text
            model.replies = [Reply({"good": True})] * 2
            run = await answered(client, run)
            assert run["status"] == "completed", run
            paths = [
                f"/run/{run['run_id']}{each}" for each in ("", "?include=calls,inputs", "/events", "/events?after=0")
            ]
            for path in (*paths, "/runs?include=inputs", "/session/s1", "/runs?session_id=s1"):
                told[path] = (await client.get(path)).text
            await inbox.until(2)  # webhooks of different runs come in any order
            headers = {"Accept": "text/event-stream"}
            body = {"agent_name": "judge", "inputs": photo}
            told["stream"] = (await client.post("/run/flock", json=body, headers=headers)).text
            told |= {f"webhook {n}": json.dumps(event) for n, event in enumerate(await inbox.until(3))}
            reference = {
                "file_id": stored(tmp_path)[0].name,
                "media_type": "image/png",
                "size": len(PNG),
                "name": "a.png",
            }
    assert inbox.types == ["run.waiting", "run.completed", "run.completed"]
    for where, text in told.items():
        assert base64.b64encode(PNG).decode()[:20] not in text, where
        assert "IHDR" not in text, where
        assert str(tmp_path) not in text, where
        assert "runs.db" not in text, where
    for where in (paths[0], paths[2], "webhook 1", "/runs?include=inputs"):
        assert json.dumps(reference, separators=(",", ":")) in told[where].replace(": ", ":").replace(", ", ","), where


async def test_the_folder_of_a_store_in_memory_is_temporary() -> None:
    async with receipts().engine() as engine:
        file = await engine.files().keep(each(PNG))
        path = engine.files().path(file.file_id)
        assert path.read_bytes() == PNG
    assert not path.parent.parent.exists()


async def each(*chunks: bytes) -> Any:
    for chunk in chunks:
        yield chunk


async def test_files_have_limits(tmp_path: Path) -> None:
    engine = receipts().engine(store=tmp_path / "runs.db", max_file_bytes=10, max_files_bytes=25)
    async with engine:
        box = engine.files("ann")
        for content in (b"0123456789", b"abcdefghij", b"0123456789"):  # the same content counts once
            await box.keep(each(content[:5], content[5:]))
        with pytest.raises(TooLarge, match="max_files_bytes"):
            await box.keep(each(b"another"))
        with pytest.raises(TooLarge, match="max_file_bytes"):
            await box.keep(each(b"0123456789", b"a"))
        await engine.files("bob").keep(each(b"another"))
        assert len(stored(tmp_path)) == 3
        engine.store.contents.used.clear()
        with pytest.raises(TooLarge, match="max_files_bytes"):
            await box.keep(each(b"another"))
    assert not [path for path in stored(tmp_path) if path.suffix]


async def test_files_that_another_process_deletes_are_not_counted(tmp_path: Path) -> None:
    async with receipts().engine(store=tmp_path / "runs.db", max_files_bytes=10) as engine:
        box = engine.files()
        file = await box.keep(each(b"0123456789"))
        box.path(file.file_id).unlink()
        await box.keep(each(b"abcdefghij"))


async def test_a_file_that_is_deleted_while_files_are_counted_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glob = Path.glob
    async with receipts().engine(store=tmp_path / "runs.db", max_files_bytes=10) as engine:
        await engine.files().keep(each(b"0123456789"))

        def deleted_meanwhile(folder: Path, pattern: str) -> Any:
            for path in list(glob(folder, pattern)):
                path.unlink()
                yield path

        monkeypatch.setattr(Path, "glob", deleted_meanwhile)
        await engine.files().keep(each(b"abcdefghij"))


async def test_files_that_are_sent_at_once_have_the_limit_together(tmp_path: Path) -> None:
    async with receipts().engine(store=tmp_path / "runs.db", max_files_bytes=3) as engine:

        async def keep(n: int) -> None:
            with contextlib.suppress(TooLarge):
                await engine.files().keep(each(b"%d" % n))

        async with anyio.create_task_group() as tasks:
            for n in range(10):
                tasks.start_soon(keep, n)
    assert len(stored(tmp_path)) == 3


async def test_the_space_is_looked_at_with_each_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with receipts().engine(store=tmp_path / "runs.db", max_file_bytes=1000) as engine:

        async def filling() -> Any:
            yield PNG
            monkeypatch.setattr(contents, "MIN_FREE_BYTES", 2**62)
            while True:
                yield PNG

        with pytest.raises(StoreError):
            await engine.files().keep(filling())


async def test_the_start_of_a_content_may_come_in_pieces(tmp_path: Path) -> None:
    async with receipts().engine(store=tmp_path / "runs.db") as engine:
        file = await engine.files().keep(each(PNG[:3], PNG[3:9], PNG[9:]))
        assert file.media_type == "image/png"
        assert engine.files().path("") != engine.files("None").path("")


@pytest.mark.parametrize("operation", ["mkdir", "open", "write", "fsync", "replace", "disk"])
async def test_a_full_disk_stores_nothing(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc_info: Any) -> None:
            self.file.close()

        write = fail

    flock = receipts()
    async with flock.engine(store=tmp_path / "runs.db") as engine:
        with monkeypatch.context() as patch:
            if operation == "mkdir":
                patch.setattr(Path, "mkdir", fail)
            elif operation == "disk":
                patch.setattr(contents, "MIN_FREE_BYTES", 2**62)
            elif operation in ("open", "write"):
                made = (lambda *a, **o: Full(open(*a, **o))) if operation == "write" else fail
                patch.setattr(contents, "open", made, raising=False)
            else:
                patch.setattr(os, operation, fail)
            with pytest.raises(StoreError, match="log has the reason"):
                await engine.submit("read", {"letter": "data:,hello"})
        assert stored(tmp_path) == []
        assert "cannot be stored" in caplog.text
        run = await engine.submit("read", {"letter": "data:,hello"})
        assert (await engine.wait(run.run_id)).value == {"result": "hello"}


async def test_two_uploads_of_the_same_at_once_are_one_file(tmp_path: Path) -> None:
    async with receipts().engine(store=tmp_path / "runs.db") as engine, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(lambda: engine.files("ann").keep(each(PNG[:9], PNG[9:])))
    (path,) = stored(tmp_path)
    assert path.read_bytes() == PNG


async def test_a_cancelled_upload_leaves_nothing(tmp_path: Path) -> None:
    async with receipts().engine(store=tmp_path / "runs.db") as engine:
        begun = anyio.Event()

        async def endless() -> Any:
            yield PNG
            begun.set()
            await anyio.sleep_forever()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: engine.files("ann").keep(endless()))
            await begun.wait()
            tasks.cancel_scope.cancel()
    assert stored(tmp_path) == []


async def test_a_file_is_on_disk_before_its_run_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content is synced before it gets its name, and the folders before the transaction that accepts the run."""
    order: list[str] = []

    def noted(what: Any, real: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append(what(*args))
            return real(*args)

        return call

    def place(descriptor: int) -> str:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return "sync " + (path.suffix or str(len(path.relative_to(tmp_path).parts)))

    engine = receipts().engine(store=tmp_path / "runs.db")
    async with engine:
        monkeypatch.setattr(os, "fsync", noted(place, os.fsync))
        monkeypatch.setattr(os, "replace", noted(lambda old, new: f"name {old.suffix}", os.replace))
        monkeypatch.setattr(engine.store.contents, "check", noted(lambda *runs: "check", engine.store.contents.check))
        run = await engine.submit("read", {"letter": "data:,hello"})
        order.append("accepted")
        assert (await engine.wait(run.run_id)).value == {"result": "hello"}
    assert order[:7] == ["sync .tmp", "name .tmp", "sync 2", "sync .db-files", "sync 0", "check", "accepted"]


# Kills

PROGRAM = """
import os, signal, stat, sys, anyio
from flock.files import data_url
from flock.runs import RunContext, RunFilter
from flock.store import contents
from tests.test_files import receipts

place, store = sys.argv[1:]

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    async with receipts().engine(store=store) as engine:
        await engine.submit("read", {"letter": "data:,first"})
        print("accepted", flush=True)
        if place == "write":
            real = contents.anyio.to_thread.run_sync
            async def write(function, *args, **options):
                await real(function, *args, **options)
                if getattr(function, "__name__", "") == "_write":
                    die()
            contents.anyio.to_thread.run_sync = write
        elif place == "folder":
            contents.sync_folder = die
        elif place == "accept":
            contents.Contents.check = die
        elif place == "fsync":
            real_sync = os.fsync
            os.fsync = lambda at: die() if stat.S_ISREG(os.fstat(at).st_mode) else real_sync(at)  # not of a folder
        else:
            setattr(contents.os, place, die)
        await engine.submit("read", {"letter": "data:,second"})

anyio.run(main)
"""


@pytest.mark.parametrize("place", ["write", "fsync", "replace", "folder", "accept"])
async def test_a_kill_loses_nothing_that_was_accepted_and_leaks_no_file(place: str, tmp_path: Path) -> None:
    store = tmp_path / "runs.db"
    command = [sys.executable, "-c", PROGRAM, place, str(store)]
    done = await anyio.run_process(command, check=False, stderr=subprocess.DEVNULL)
    assert (done.stdout, done.returncode) == (b"accepted\n", -signal.SIGKILL)
    async with receipts().engine(store=store) as engine:
        (run,) = await engine.list_runs(RunFilter())
        assert (await engine.wait(run.run_id)).value == {"result": "first"}
        await engine.store.delete_unused_files(0)
        (path,) = stored(tmp_path)
        assert path.read_text() == "first"
        await engine.delete_run(run.run_id)
        await engine.store.delete_unused_files()
        assert stored(tmp_path) == []

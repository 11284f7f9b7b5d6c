"""Send files as attackers make them to a real server: python -m tests.hostile_files --files 1000

They are mutations of images, documents, scripts, polyglots and bombs, under hostile names and declared types, by each
way in. Each reply is a clear 4xx, or the file is stored, and only served as a download or as an image. Programs in the
files would write a file or call a port: neither may happen. ``test_hostile_files`` does the same with fewer files.
"""

import argparse
import base64
import collections
import io
import json
import random
import re
import socket
import struct
import sys
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import anyio
import httpx

from flock.core import Audio, Document, File, Flock, Image
from flock.files import MAX_NAME_CHARS
from tests.images_once import peak_of
from tests.support import ROOT
from tests.support.servers import flockapi_command, running

SERVED = "from tests.hostile_files import flock_of_files\nflock = flock_of_files()\n"
#: What a browser may show of what it gets, and how it begins.
SHOWN = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff", "image/gif": b"GIF8", "image/webp": b"RIFF"}
DECLARED = [
    *("", *SHOWN, "image/svg+xml", "text/html", "application/pdf", "audio/wav", "audio/mpeg", "text/plain", "x"),
    *("application/octet-stream", "application/zip", "application/x-sh", "image/png; charset=x", "*/*", "é", "a" * 300),
]
NAMES = [
    *(
        b"a.png",
        b"",
        b"../../etc/passwd",
        b"..\\..\\win.ini",
        b"/etc/cron.d/x",
        b"C:\\x.exe",
        b"a\0.png",
        b"a.png\0.sh",
    ),
    *(
        "\u202egnp.exe".encode(),
        "a\u2066b\u200b.png".encode(),
        b"a" * 4096 + b".png",
        b"/" * 4096,
        b".",
        b"..",
        b".htaccess",
    ),
    *(
        b"a.svg",
        b"a.html",
        b"con.png",
        b"-rf",
        b"$(touch x).png",
        b"`x`|;&.png",
        b"a\x1b[2Jb",
        b"%2e%2e%2f",
        b"<img src=x>",
    ),
    *(
        b"\xff\xfe\xfd",
        "é".encode("latin-1"),
        b"a'b",
        b"=cmd|' /C calc'!A0",
        b"{{7*7}}",
        b"%n%s%x",
        "\U0001f4a9".encode(),
    ),
]


def flock_of_files() -> Flock:
    flock = Flock("hostile")

    def about(file: File) -> list[Any]:
        return [file.name, file.media_type, file.size, len(file.read()), file.sha256]

    @flock.agent
    def image(file: Image) -> list[Any]:
        return about(file)

    @flock.agent
    def audio(file: Audio) -> list[Any]:
        return about(file)

    @flock.agent
    def document(file: Document) -> list[Any]:
        return about(file)

    @flock.agent
    def anything(file: File) -> list[Any]:
        return about(file)

    return flock


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int = 1, height: int = 1, rows: bytes = b"\0\0\0\0", *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return SHOWN["image/png"] + b"".join(parts)


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def seeds(port: int, mark: Path) -> list[bytes]:
    """Return files that call *port* or write *mark* if anything opens them with a program that executes them."""
    url, touch = f"http://127.0.0.1:{port}/x", f"touch {mark}"
    script = f"<script>fetch('{url}')</script>".encode()
    exif = b"\xff\xe1\0\x40Exif\0\0MM\0*\0\0\0\x08\0\x01\x88\x25\0\x04\0\0\0\x01\xff\xff\xff\xff" + b"\0" * 30
    frame = b"\xff\xc0\0\x0b\x08\xff\xff\xff\xff\x01\x01\x11\0\xff\xd9"
    jpeg = b"\xff\xd8" + exif + b"\xff\xdb\0\x43\0" + b"\x10" * 64 + frame
    action = f"/OpenAction<</S/Launch/F(/bin/sh)/P(-c '{touch}')>>/AA<</O<</S/URI/URI({url})>>>>".encode()
    pdf = b"%PDF-1.7\n1 0 obj<</Type/Catalog" + action + b"/Names<</JavaScript 2 0 R>>>>endobj\ntrailer<</Root 1 0 R>>"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" onload="fetch(\'{url}\')"><image href="{url}"/></svg>'.encode()
    entity = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "{url}">]><x>&a;</x>'.encode()
    laughs = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9))
    bomb = zlib.compress(bytes(30_000_000), 9)
    webp, mp4 = b"RIFF\xff\xff\xff\xffWEBPVP8L", b"\0\0\0\x20ftypM4A "
    payloads = [
        f"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY a0 'ha'>{laughs}]><x>&a9;</x>",
        *(f"#!/bin/sh\n{touch}\n", f"<?php system('{touch}'); ?>", f"import os; os.system({touch!r})"),
        f"push graphic-context\nfill 'url(https://127.0.0.1:{port}/x\"|{touch}\")'\npop graphic-context",
        *(f"%!PS\n(%pipe%{touch}) (w) file\n", f"!!python/object/apply:os.system ['{touch}']"),
        *(f"c__builtin__\neval\n(V__import__('os').system({touch!r})\ntR.", "X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR"),
        *("\u202e" * 400, "\r\n" * 5000, "=HYPERLINK(1)", "--xx--\r\n", "[" * 100_000),
    ]
    return [
        *(png(), png(1, 1, b"\0", chunk(b"tEXt", b"c\0" + script)), png(60_000, 60_000, bytes(20_000_000))),
        *(png(2**31 - 1, 2**31 - 1), png(0, 0), png(1, 1, b"\0", chunk(b"iCCP", b"x\0\0" + bomb)), png() + script),
        *(jpeg, jpeg[:2] + script + jpeg[2:], b"GIF89a/*" + b"\0" * 20 + b"*/=1;" + script, b"GIF89a" + b"\xff" * 7),
        *(webp + b"\xff\xff\xff\xff" + script, b"RIFF\0\0\0\0WAVEfmt \xff\xff\xff\xff", b"ID3\x04\0\0\x7f\x7f"),
        *(
            pdf,
            png() + pdf,
            pdf + zipped("x", b"y"),
            b"OggS" + b"\xff" * 30,
            b"fLaC" + b"\xff" * 40,
            mp4 + b"\xff" * 30,
        ),
        *(svg, zlib.compress(svg), b"\xef\xbb\xbf" + svg, svg.decode().encode("utf-16"), entity, b"<html>" + script),
        *(b"<!doctype html><body onload=alert(1)>", b"+ADw-script+AD4-", script.decode().encode("utf-16-le")),
        *(bomb, zipped("../../x", bytes(30_000_000)), zipped("x.zip", zipped("y", bytes(10_000_000)))),
        *(
            b"PK\x03\x04" + b"\xff" * 60,
            b"\x7fELF\x02\x01\x01" + b"\0" * 60,
            b"MZ\x90\0" + b"\0" * 60,
            b"\0asm\x01\0\0\0",
        ),
        *(b"\xca\xfe\xba\xbe" + b"\0" * 20, b"\0", b"\xff", b"\xff\xd8\xff", b"%PDF-", b"\x89PNG\r\n\x1a\n"),
        *(b"\x1f\x8b\x08" + b"\xff" * 20, b"\xed\xa0\x80", *(each.encode() for each in payloads)),
    ]


def mutated(rng: random.Random, found: list[bytes]) -> bytes:
    """Return a file, most of them changed as fuzzers do it."""
    content = bytearray(rng.choice(found))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(7):
            case 0:
                for _ in range(rng.randrange(1, 20)):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 1:
                del content[max(at, 1) :]
            case 2:
                content[at:at] = rng.choice(found)[:50_000]
            case 3:
                content[:0] = rng.choice(
                    (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"%PDF-", b"\xef\xbb\xbf", b"\0", b"RIFF")
                )
            case 4:
                content[at : at + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0")
                )
            case 5:
                content[at:at] = rng.choice(
                    (b"<script>alert(1)</script>", b"\0" * 8, b"%s%n", b"\r\n\r\n", b"*/", b"-->")
                )
            case _:
                content += rng.choice(found)[:50_000]
    return bytes(content)  # fmt: skip


async def send(client: httpx.AsyncClient, rng: random.Random, content: bytes) -> tuple[str, httpx.Response]:
    """Send a file by one of the ways in. Returns the way."""
    agent = rng.choice(("image", "audio", "document", "anything", "anything"))
    name, declared = rng.choice(NAMES), rng.choice(DECLARED) if rng.random() < 0.4 else ""
    way = rng.choice(("files", "form", "data URL", "reference"))
    if way == "form":
        head = (
            b'Content-Disposition: form-data; name="file"; filename="'
            + name
            + b'"\r\nContent-Type: '
            + declared.encode()
        )
        parts = [
            b'Content-Disposition: form-data; name="agent_name"\r\n\r\n' + agent.encode(),
            head + b"\r\n\r\n" + content,
        ]
        body = b"".join(b"--xx\r\n" + part + b"\r\n" for part in parts) + b"--xx--\r\n"
        return way, await client.post(
            "/run/flock", content=body, headers={"Content-Type": "multipart/form-data; boundary=xx"}
        )
    inputs: Any
    if way == "data URL":
        file = f"data:{declared};name={quote_from_bytes(name)};base64,{base64.b64encode(content).decode()}"
        inputs = rng.choice(
            (file, {"file_id": file, "name": name.decode("latin-1"), "detail": rng.choice(("", "low", "../x"))})
        )
    else:
        headers = [(b"Content-Type", declared.encode("latin-1"))] if declared else []
        stored = await client.post("/files", content=content, headers=headers)
        if way == "files" or stored.status_code != 201:
            return "files", stored
        inputs = {**stored.json(), "name": name.decode("latin-1"), "media_type": "text/html", "size": -1}
    return way, await client.post("/run/flock", json={"agent_name": agent, "inputs": {"file": inputs}})  # fmt: skip


async def attack(
    client: httpx.AsyncClient, count: int, port: int, mark: Path, seed: int = 0
) -> collections.Counter[str]:
    """Send *count* files, and return how many had which outcome. Raises AssertionError."""
    rng, found, outcomes = random.Random(seed), seeds(port, mark), collections.Counter[str]()
    for number in range(count):
        content = mutated(rng, found) if number >= len(found) else found[number]
        way, response = await send(client, rng, content)
        status, about = response.status_code, f"file {number} by {way}: {response.status_code} {response.text[:300]}"
        outcomes[way] += 1
        if 400 <= status < 500:
            problem = response.json()
            assert problem["detail"], about
            outcomes[f"{status}"] += 1
            continue
        assert status in (200, 201), about
        if status == 200:
            body = response.json()
            assert body["status"] == "completed", about
            name, media_type, size, read, file_id = body["result"]["result"]
            assert size == read == len(content), about
            assert len(name) <= MAX_NAME_CHARS, about
            assert not re.search(r"[/\\]|^\.", name), about
            assert not any(unicodedata.category(each)[0] == "C" for each in name), about
        else:
            file_id, media_type = response.json()["file_id"], response.json()["media_type"]
        got = await client.get(f"/files/{file_id}")
        headers = got.headers
        shown_as = headers["content-type"].partition(";")[0]
        assert (got.status_code, got.content, shown_as) == (200, content, media_type), about
        assert headers["x-content-type-options"] == "nosniff", about
        assert headers["content-security-policy"] == "default-src 'none'; sandbox", about
        is_inline = headers["content-disposition"] != "attachment"
        assert not is_inline or content.startswith(SHOWN[media_type]), about
        outcomes["shown as an image" if is_inline else "only downloaded"] += 1
    assert (await client.get("/healthz")).status_code == 200
    return outcomes


@contextmanager
def trap() -> Iterator[tuple[int, Path]]:
    """Yield a port and a path. Raises AssertionError if the port was called, or something is at the path."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1], (mark := Path(folder) / "mark")
        listener.setblocking(False)
        try:
            listener.accept()
        except BlockingIOError:
            pass
        else:
            raise AssertionError("a file has made somebody call a port")
        assert not mark.exists(), "a file was executed"


async def main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder, trap() as (port, mark):
        target = anyio.Path(folder) / "served.py"
        await target.write_text(SERVED)
        command = flockapi_command("serve", str(target), "--port", "0", "--store", f"{folder}/flock.db")
        with running(*command, PYTHONPATH=str(ROOT)) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                outcomes = await attack(client, count, port, mark, seed)
            peak = peak_of(server.process.pid)
        assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)
    print(f"{count:,} files, {peak} MB of memory at most: {json.dumps(outcomes)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(anyio.run(main, options.files, options.seed))

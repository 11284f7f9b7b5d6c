"""Pages of lists are limited in size, and pages of other sites get no data. Servers, stores and engines are real."""

import contextlib
import functools
import http.server
import itertools
import json
import socket
import sqlite3
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from msgspec.structs import replace

from flock.core import Flock
from flock.errors import CUT, MAX_TEXT_BYTES, AgentError, FieldError, cut
from flock.runs import (
    Engine,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    new_id,
    now,
)
from flock.runs.records import PAGE_BYTES
from flock.store.batchstore import SQLiteBatchStore
from flock.store.store import SQLiteStore
from flockapi import create_app
from tests.support import PATIENCE_S, WORKERS
from tests.support.cluster import engine_for
from tests.support.servers import Server, flockapi_command, running

#: The limit of a page, and room for the short fields of its records.
MAX_PAGE_BYTES = 1.5 * PAGE_BYTES


def long_flock() -> Flock:
    flock = Flock("long")

    @flock.agent
    def repeat(text: str, times: int) -> str:
        return text * times

    @flock.agent
    def complain(times: int) -> str:
        raise AgentError("é" * times)

    @flock.agent
    async def chat(context: RunContext) -> str:
        context.progress(1, 2, "é" * 1_000_000)
        await anyio.sleep_forever()
        return ""

    return flock


@contextlib.asynccontextmanager
async def client_of(flock: Flock, engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(flock, engine=engine, auth="host")
    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t", timeout=60) as client:
            yield client


@pytest.fixture(params=["memory", "disk", "temporal"])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of an app on each kind of engine."""
    flock = long_flock()
    store = tmp_path / "flock.db" if request.param == "disk" else ":memory:"
    async with engine_for(request, flock, store=store) as engine, client_of(flock, engine) as client:
        yield client


SCRIPT = """
from flock.core import Flock

flock = Flock("pages")

@flock.agent
def add(a: int, b: int) -> int:
    return a + b
"""


@contextlib.contextmanager
def serving(tmp_path: Path, *options: str, workers: int = 1) -> Iterator[Server]:
    """Run our own server without a key."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = flockapi_command("serve", str(tmp_path / "script.py"), "--port", "0", *options)
    with running(*command, *(["--workers", str(workers)] if workers > 1 else [])) as server:
        server.wait_for_line("Application startup complete", times=workers)
        yield server


@contextlib.contextmanager
def serving_files(folder: Path) -> Iterator[int]:
    """Serve the files of a folder, and yield the port."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        thread = threading.Thread(target=files.serve_forever)
        thread.start()
        try:
            yield files.server_port
        finally:
            files.shutdown()
            thread.join()


async def run(client: httpx.AsyncClient, agent_name: str, **inputs: Any) -> Any:
    return (await client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs})).json()


async def pages_of(client: httpx.AsyncClient, path: str, name: str) -> list[list[Any]]:
    """Return all pages from *path* on, after checking the length of each."""
    pages = []
    next_: str | None = path
    while next_ is not None:
        response = await client.get(next_)
        assert response.status_code == 200
        page = response.json()
        assert len(response.content) < MAX_PAGE_BYTES or len(page[name]) == 1
        pages.append(page[name])
        next_ = page["next"]
    return pages


async def all_listed(client: httpx.AsyncClient, path: str, count: int) -> None:
    """Wait until a list has *count* records, because a cluster's search lags behind for a moment."""
    with anyio.fail_after(PATIENCE_S):
        while len((await client.get(path)).json()[path.strip("/")]) < count:  # noqa: ASYNC110 - no event for it
            await anyio.sleep(0.05)


# Pages


@pytest.mark.anyio
async def test_a_page_of_long_runs_ends_at_a_mebibyte_and_names_the_next(served: httpx.AsyncClient) -> None:
    ids = [(await run(served, "repeat", text="x" * 100_000, times=3))["run_id"] for _ in range(8)]
    await all_listed(served, "/runs", len(ids))
    pages = await pages_of(served, "/runs?limit=1000&include=inputs,result", "runs")
    assert [each["run_id"] for page in pages for each in page] == ids[::-1]
    assert [len(page) for page in pages] == [2, 2, 2, 2]
    assert len(await pages_of(served, "/runs?limit=1000", "runs")) == 1, "fields that are not shown do not count"


@pytest.mark.anyio
@pytest.mark.parametrize("served", ["memory", "disk"], indirect=True)  # a cluster refuses such a long result
async def test_a_page_has_one_run_however_long_it_is(served: httpx.AsyncClient) -> None:
    for _ in range(2):
        await run(served, "repeat", text="x" * 100_000, times=20)
    pages = await pages_of(served, "/runs?include=result", "runs")
    assert [len(page[0]["result"]["result"]) for page in pages] == [2_000_000, 2_000_000]


@pytest.mark.anyio
async def test_errors_count_towards_the_length_of_a_page_of_results(served: httpx.AsyncClient) -> None:
    rows = [{"times": 10_000}] * 200
    sent = {"agent_name": "complain", "batch_inputs": rows, "max_workers": 100}
    batch_id = (await served.post("/run/batch", json=sent)).json()["batch_id"]
    batch = (await served.get(f"/batch/{batch_id}", params={"wait": 60, "results": False})).json()
    assert batch["status"] == "failed"
    assert len(batch["error"].encode()) <= MAX_TEXT_BYTES
    pages = await pages_of(served, f"/batch/{batch_id}?limit=1000", "results")
    assert len(pages) > 1
    assert sum(map(len, pages)) == 200
    results = (await served.get(f"/batch/{batch_id}/results")).json()
    assert [each["position"] for each in results] == list(range(200)), "a download has no pages"


@pytest.mark.anyio
async def test_a_page_of_batches_with_long_errors_ends_at_a_mebibyte(tmp_path: Path) -> None:
    flock = long_flock()
    async with client_of(flock, flock.engine(store=tmp_path / "flock.db")) as client:
        sent = {"agent_name": "complain", "batch_inputs": [{"times": 10}]}
        batch_id = (await client.post("/run/batch", json=sent)).json()["batch_id"]
        assert (await client.get(f"/batch/{batch_id}?wait=60")).json()["status"] == "failed"
        names = "flock, agent_name, options, status, total_items, created_at, error"
        copies = f"""INSERT INTO batches (batch_id, {names})
            SELECT printf('%s%03d', substr(batch_id, 1, 33), value) AS copy_id, {names} FROM batches, json_each(?)
            WHERE copy_id != batch_id LIMIT 300"""
        with sqlite3.connect(tmp_path / "flock.db") as db:
            db.execute("UPDATE batches SET error = ?", ("x" * 9_000,))
            db.execute(copies, (json.dumps(list(range(301))),))
        db.close()
        pages = await pages_of(client, "/batches?limit=1000", "batches")
    assert sum(map(len, pages)) == 301
    assert len(pages) == 3


@pytest.mark.anyio
async def test_a_page_is_read_without_the_rest_of_the_list(tmp_path: Path) -> None:
    flock = long_flock()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        for _ in range(50):
            accepted = await engine.submit("repeat", {"text": "x" * 200_000, "times": 1})
            assert (await engine.wait(accepted.run_id)).status is RunStatus.COMPLETED
        tracemalloc.start()
        try:
            wanted = RunFilter(limit=1000, with_inputs=True, with_results=True)
            page = await engine.list_runs(wanted)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert page.has_more
        assert peak < 3 * PAGE_BYTES


@pytest.mark.anyio
async def test_a_download_is_read_in_pages_of_a_mebibyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, pages = long_flock(), list[int]()
    items_of = SQLiteBatchStore.items

    async def items(self: SQLiteBatchStore, *args: Any) -> Any:
        page = await items_of(self, *args)
        pages.append(sum(len(item.inputs) + len(item.result or b"") + len(item.error or "") for item in page))
        return page

    monkeypatch.setattr(SQLiteBatchStore, "items", items)
    async with client_of(flock, flock.engine(store=tmp_path / "flock.db")) as client:
        rows = [{"text": "x" * 20_000, "times": 10}] * 20
        sent = {"agent_name": "repeat", "batch_inputs": rows}
        batch_id = (await client.post("/run/batch", json=sent)).json()["batch_id"]
        await client.get(f"/batch/{batch_id}?wait=60&results=false")
        for format_ in ("json", "ndjson", "csv"):
            pages.clear()
            body = (await client.get(f"/batch/{batch_id}/results?format={format_}")).text
            assert body.count("x" * 200_000) == 20
            assert len(pages) > 4
            assert max(pages) <= PAGE_BYTES


# Texts


def test_a_long_text_is_truncated_with_a_mark() -> None:
    for char in ("x", "é", "\U0001f986", "\ud800"):
        whole = char * (MAX_TEXT_BYTES // len(char.encode("utf-8", "replace")))
        assert cut(whole) == whole
        short = cut(whole + "y")
        assert short.endswith(CUT)
        assert len(short.encode()) <= MAX_TEXT_BYTES
        assert len(short.encode()) > MAX_TEXT_BYTES - 4
        assert cut(short) == short


@pytest.mark.anyio
async def test_errors_and_progress_of_an_agent_are_truncated(served: httpx.AsyncClient) -> None:
    failed = await run(served, "complain", times=100_000)
    assert failed["error"].endswith(CUT)
    assert len(failed["error"].encode()) <= MAX_TEXT_BYTES
    chat = {"agent_name": "chat", "async_run": True}
    path = (await served.post("/run/flock", json=chat)).headers["Location"]
    with anyio.fail_after(PATIENCE_S):
        while (progress := (await served.get(path)).json()["progress"]) is None:  # noqa: ASYNC110 - as a client
            await anyio.sleep(0.05)
    await served.post(f"{path}/cancel", params={"wait": 30})
    assert progress["message"].endswith(CUT)
    assert len(progress["message"].encode()) <= MAX_TEXT_BYTES


@pytest.mark.anyio
async def test_long_names_of_members_are_truncated(tmp_path: Path) -> None:
    """This holds for the pointers and details of a problem, and for the error of an invalid item."""
    flock = long_flock()
    async with client_of(flock, flock.engine(store=tmp_path / "flock.db")) as client:
        inputs = {str(number) * 40_000: 1 for number in range(10)}
        refused = await client.post("/run/flock", json={"agent_name": "complain", "inputs": {"times": 1, **inputs}})
        assert refused.status_code == 422
        assert len(refused.content) < 20 * MAX_TEXT_BYTES
        assert refused.json()["errors"][0]["pointer"].endswith(CUT)
        skipped = {"agent_name": "complain", "batch_inputs": [inputs], "on_invalid": "skip"}
        batch_id = (await client.post("/run/batch", json=skipped)).json()["batch_id"]
        await client.get(f"/batch/{batch_id}?wait=60")
        assert len((await client.get("/batches")).content) < 2 * MAX_TEXT_BYTES
    assert FieldError(detail="d" * 10_000, pointer="p" * 10_000).pointer.endswith(CUT)


@pytest.mark.anyio
async def test_long_texts_of_an_older_store_are_truncated_when_they_are_read(tmp_path: Path) -> None:
    flock = long_flock()
    async with client_of(flock, flock.engine(store=tmp_path / "flock.db")) as client:
        ids = [(await run(client, "complain", times=1))["run_id"] for _ in range(5)]
        with sqlite3.connect(tmp_path / "flock.db") as db:
            progress = json.dumps({"done": 1, "total": 2, "message": "x" * 100_000}).encode()
            db.execute("UPDATE runs SET error = ?, progress = ?", ("x" * 1_000_000, progress))
        db.close()
        response = await client.get("/runs")
        assert [each["error"][-len(CUT) :] for each in response.json()["runs"]] == [CUT] * 5
        assert len(response.content) < 6 * MAX_TEXT_BYTES
        one = (await client.get(f"/run/{ids[0]}")).json()
        assert one["error"].endswith(CUT)
        assert one["progress"]["message"].endswith(CUT)


# Pages of other sites

#: The headers that a browser adds to requests of other sites, other ports, our own pages and typed addresses.
SITES = [
    pytest.param({"Sec-Fetch-Site": "cross-site"}, 403, id="cross-site"),
    pytest.param({"Sec-Fetch-Site": "same-site"}, 403, id="same-site"),
    pytest.param({"Sec-Fetch-Site": "cross-site", "Origin": "http://evil.example"}, 403, id="cross-site with Origin"),
    pytest.param({"Origin": "http://evil.example"}, 403, id="an older browser"),
    pytest.param({"Origin": "http://["}, 403, id="an origin that cannot be parsed"),
    pytest.param({"Sec-Fetch-Site": "cross-site", "Origin": "http://ours.example"}, 200, id="an allowed origin"),
    pytest.param({"Sec-Fetch-Site": "same-origin"}, 200, id="our own page"),
    pytest.param({"Sec-Fetch-Site": "none"}, 200, id="a typed address"),
    pytest.param({}, 200, id="no browser"),
]
KEY = "a key of twenty chars".replace(" ", "-")


@pytest.mark.anyio
@pytest.mark.parametrize(("headers", "status"), SITES)
@pytest.mark.slow
async def test_a_page_of_another_site_reads_nothing_if_no_key_is_required(headers: dict[str, str], status: int) -> None:
    auths: list[dict[str, Any]] = [{}, {"auth": "anybody"}, {"auth": "host"}, {"api_keys": {"ann": KEY}}]
    for options in auths:
        flock = long_flock()
        app = create_app(flock, store=":memory:", cors_origins=["http://ours.example"], create_ui=True, **options)
        async with app.lifespan():
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
                client.headers = httpx.Headers(headers | {"X-API-Key": KEY})
                is_anonymous = options.get("auth", "anybody") == "anybody" and "api_keys" not in options
                for path in ("/runs", "/agents", "/agents/chat", "/batches"):
                    response = await client.get(path)
                    assert response.status_code == (status if is_anonymous else 200), (options, path)
                    if response.status_code == 403:
                        assert response.json()["type"] == "urn:flockapi:problem:forbidden"
                        assert "Enter the address by hand" in response.json()["detail"]
                        assert (await client.head(path)).status_code == 403
                for path in ("/", "/ui", "/ui/main.js", "/docs", "/redoc", "/openapi.json", "/healthz", "/readyz"):
                    assert (await client.get(path)).status_code in (200, 307), path
                assert (await client.get("/static/docs.js")).status_code == 200
                assert (await client.get("/none")).status_code == 404
                assert (await client.post("/run/flock", json={})).status_code == (status if status == 403 else 422)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("origins", "headers", "status"),
    [
        (["*"], {"Sec-Fetch-Site": "cross-site", "Origin": "http://anybody.example"}, 200),
        (["*"], {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, 200),
        (["http://ours.example"], {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 200),
        (["http://ours.example"], {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "image"}, 403),
        ([], {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}, 403),
    ],
)
async def test_pages_of_allowed_origins_can_read_and_link(
    origins: list[str], headers: dict[str, str], status: int
) -> None:
    app = create_app(long_flock(), store=":memory:", cors_origins=origins)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        assert (await client.get("/runs", headers=headers)).status_code == status


@pytest.mark.anyio
@pytest.mark.parametrize(("auth", "warns"), [(None, True), ("anybody", False), ("host", False)])
async def test_an_app_that_is_open_on_purpose_logs_no_warning(
    auth: Any, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(long_flock(), store=":memory:", auth=auth)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        assert (await client.get("/healthz")).status_code == 200
    assert ("has no authentication" in caplog.text) == warns


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.slow
def test_our_own_server_without_a_key_refuses_pages_of_other_sites(workers: int, tmp_path: Path) -> None:
    with serving(tmp_path, workers=workers) as server:
        for headers, status in (({}, 200), ({"Sec-Fetch-Site": "same-site"}, 403), ({"Origin": "http://["}, 403)):
            for _ in range(4):
                with httpx.Client(base_url=server.url, headers=headers) as client:
                    assert client.get("/runs").status_code == status
                    assert client.get("/docs").status_code == 200


@pytest.mark.browser
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"], ids=["same-site", "cross-site"])
def test_a_page_of_another_site_reads_nothing_in_a_browser(name: str, tmp_path: Path) -> None:
    """Neither fetch nor a link works, except a link to an open page."""
    from tests.support.browser import chromium

    with serving(tmp_path, "--ui") as server, chromium() as browser:
        links = "".join(f'<a id="{name}" href="{server.url}/{name}">{name}</a>' for name in ("runs", "docs", "ui"))
        (tmp_path / "evil.html").write_text(f"<!doctype html>{links}")
        with serving_files(tmp_path) as port:
            page = browser.new_page()
            statuses: dict[str, int] = {}
            page.on("response", lambda response: statuses.update({response.url: response.status}))
            evil = f"http://{name}:{port}/evil.html"
            page.goto(evil)
            page.evaluate("url => fetch(url, {mode: 'no-cors'}).catch(String)", f"{server.url}/agents?fetch")
            assert statuses[f"{server.url}/agents?fetch"] == 403
            for link, status in (("runs", 403), ("docs", 200), ("ui", 200)):
                page.goto(evil)
                page.locator(f"#{link}").click()
                page.wait_for_url(f"{server.url}/{link}*")
                assert statuses[f"{server.url}/{link}"] == status
            page.goto("about:blank")
            page.goto(f"{server.url}/runs")
            assert statuses[f"{server.url}/runs"] == 200, "a typed address works"


# How a browser treats a response


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(long_flock(), store=":memory:", create_ui=True, auth="host")
    async with app.lifespan():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as made:
            yield made


@pytest.mark.anyio
async def test_no_response_is_sniffed_or_cached(client: httpx.AsyncClient) -> None:
    """This includes errors, streams and downloads. Files have an ETag, and are revalidated."""
    sent = {"agent_name": "repeat", "batch_inputs": [{"text": "x", "times": 1}]}
    batch_id = (await client.post("/run/batch", json=sent)).json()["batch_id"]
    await client.get(f"/batch/{batch_id}?wait=30")
    run_id = (await run(client, "repeat", text="x", times=1))["run_id"]
    paths = [f"/run/{run_id}/events", f"/batch/{batch_id}/results", f"/batch/{batch_id}/results?format=csv"]
    for path in (*paths, "/runs", "/batches", "/agents", "/healthz", "/none", "/openapi.json", "/docs", "/static/none"):
        response = await client.get(path)
        assert response.headers.get_list("X-Content-Type-Options") == ["nosniff"], path
        assert response.headers.get_list("Cache-Control") == ["no-store"], path
    for path in ("/static/docs.js", "/static/vendor/redoc/redoc.standalone.js"):
        response = await client.get(path)
        assert response.headers.get_list("X-Content-Type-Options") == ["nosniff"]
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
        assert "no-store" not in response.headers.get("Cache-Control", "")
        again = await client.get(path, headers={"If-None-Match": response.headers["ETag"]})
        assert again.status_code == 304
    assert (await client.get("/ui/main.js")).headers.get_list("Cache-Control") == ["no-cache"]


@pytest.mark.anyio
async def test_a_trailing_slash_is_not_redirected(client: httpx.AsyncClient) -> None:
    """Otherwise a redirect would repeat the value of ``Host``."""
    for path in ("/runs/", "/agents/", "/agents/chat/", "/run/x/", "/batches//", "/ui/", "/docs/", "/healthz/"):
        response = await client.get(path, headers={"Host": "evil.example"})
        assert response.status_code == 404
        assert response.json()["detail"].endswith(f"Use {path.rstrip('/')}")
        assert "Location" not in response.headers
    for path in ("/none/", "/static", "/openapi.json/x/"):
        response = await client.get(path, headers={"Host": "evil.example"})
        assert (response.status_code, response.json()["detail"]) == (404, "Not Found")
    assert (await client.post("/run/flock/", json={})).status_code == 404


#: Values that may make a parser of these headers fail.
MALFORMED = {
    "Host": [b"[", b"http://[", b"[::1]:x", b"t:99999999", "t:²".encode(), b"\xff"],
    "Origin": [b"http://[", b"http://[::1", b"\xff"],
    "Content-Length": [b"-1", "²".encode(), b"9" * 30, b"\xff", b""],
    "Prefer": [b'"', b"wait=\xb2, respond-async", b",,;=", b"wait=" + b"9" * 30],
    "Last-Event-ID": ["²".encode(), b"-1", b"9" * 30, b"\xb2"],
    "traceparent": [b"00-\xff-\xff-01", b"["],
    "Accept": [b"a/b;q=inf", b"*/*;q=1.", b"text/csv;q=\xb2", b",;"],
    "If-None-Match": [b'W/"', b"\xff", b"*"],
    "If-Modified-Since": [b"Thu, 99 Foo 99999999 99:99:99 GMT", b"Mon, 01 Jan 0000 00:00:00 +9999999"],
    "Range": [b"bytes=--", b"bytes=9-1", b"bytes=\xb2-", b"bytes=" + b"9" * 30 + b"-"],
    "Authorization": [b"Bearer \xff", b"["],
    "Idempotency-Key": [b'"', b"\xff", b"x" * 300],
    "Content-Type": [b"application/json;charset=\xff", b";", b"["],
}


@pytest.mark.anyio
@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.slow
async def test_no_malformed_header_causes_an_internal_error(name: str, client: httpx.AsyncClient) -> None:
    sent = {"agent_name": "repeat", "batch_inputs": [{"text": "x", "times": 1}]}
    batch_id = (await client.post("/run/batch", json=sent)).json()["batch_id"]
    run_id = (await run(client, "repeat", text="x", times=1))["run_id"]
    requests = [("GET", f"/run/{run_id}/events"), ("GET", f"/batch/{batch_id}/results"), ("GET", "/none/")]
    requests += [("GET", "/runs?limit=1"), ("GET", "/static/docs.js"), ("POST", "/run/flock"), ("POST", "/run/batch")]
    requests += [("GET", "/ui/main.js"), ("GET", "/runs/")]
    for method, path in requests:
        for value in MALFORMED[name]:
            headers: list[tuple[bytes, bytes]] = [(name.encode(), value)]
            headers += [] if name == "Content-Type" else [(b"Content-Type", b"application/json")]
            response = await client.request(method, path, headers=headers, content=b"{}")
            assert response.status_code < 500, (path, value, response.text)


@pytest.mark.anyio
async def test_a_query_that_is_not_utf_8_is_refused() -> None:
    """Our own server refuses it before the app sees it, but other servers do not."""
    app = create_app(long_flock(), store=":memory:", auth="host")

    async def with_bytes(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "query_string": b"limit=\xff"}, receive, send)

    async with app.lifespan():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(with_bytes), base_url="http://t") as client:
            for path, status in (("/runs", 422), ("/none", 404), ("/run/x/cancel", 404)):
                response = await client.request("POST" if "cancel" in path else "GET", path)
                assert (response.status_code, response.json()["instance"]) == (status, path)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.slow
def test_our_own_server_does_not_fail_on_malformed_requests(workers: int, tmp_path: Path) -> None:
    """It does not redirect to the value of ``Host`` either."""
    answers = {
        b"GET /runs/ HTTP/1.1\r\nHost: localhost": 404,
        b"GET /runs HTTP/1.1\r\nHost: [": 421,
        b"POST /run/flock HTTP/1.1\r\nContent-Length: 0\r\nHost: 127.0.0.1\r\nOrigin: http://[": 403,
    }
    with serving(tmp_path, workers=workers) as server:
        for _ in range(2 * workers):
            for request, status in answers.items():
                with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), PATIENCE_S) as sent:
                    sent.sendall(request + b"\r\nConnection: close\r\n\r\n")
                    received = b"".join(iter(lambda sent=sent: sent.recv(65_536), b""))  # type: ignore[misc]
                assert received.startswith(b"HTTP/1.1 %d" % status), (request, received)
                assert b"\r\nx-content-type-options: nosniff\r\n" in received
                assert b"\r\nlocation:" not in received.lower()


@pytest.mark.anyio
async def test_a_list_filtered_by_agent_reads_no_other_runs_of_a_principal(tmp_path: Path) -> None:
    """SQLite's steps are counted: of 5,000 runs of another agent, none is read."""
    steps = []
    for others in (0, 5_000):
        async with SQLiteStore(tmp_path / f"{others}.db") as store:
            for name in ("rare", *["other"] * others, "rare"):
                run = Run(run_id=new_id(), flock="f", agent_name=name, inputs=msgspec.Raw(b"{}"), created_at=now())
                store.save_nowait(replace(run, principal="ann", status=RunStatus.COMPLETED), is_new=True)
            store.flush_nowait()
            await store.save(replace(run, run_id=new_id(), principal="ben"), is_new=True)
            counted = itertools.count()
            store.read(lambda db, counted=counted: db.set_progress_handler(lambda: next(counted) < 0, 1))  # type: ignore[misc]
            assert len(await store.list_runs("f", RunFilter(agent_name="rare", principal="ann"))) == 2
            steps.append(next(counted))
    assert steps[1] < 2 * steps[0]

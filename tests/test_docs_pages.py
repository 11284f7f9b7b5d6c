"""The docs pages: vendored files as they were published, and both pages in a real browser."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect

from flock.web.contract import STATIC
from flockapi import FlockAPI
from tests.support import PATIENCE_S, ROOT
from tests.support.browser import Watch, chromium
from tests.support.servers import Server, running
from tests.support.spec import operations

VENDOR = STATIC / "vendor"

HOST = """
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from flockapi import create_app
from tests.support.flocks import sample_flock

app = create_app(sample_flock(), server_name='<b>Bold & "quoted"</b>')
if sys.argv[1:]:
    app = Starlette(routes=[Mount(sys.argv[1], app)], lifespan=lambda host: app.routes[0].app.lifespan())
uvicorn.run(app, port=0)
"""


# Vendored files


def test_vendored_files_have_their_checksums() -> None:
    lines = (VENDOR / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split() for line in lines)}
    files = {path.relative_to(VENDOR).as_posix(): path for path in VENDOR.glob("*/*")}
    assert sums == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_each_vendored_folder_has_its_version_and_its_licence() -> None:
    readme = (VENDOR / "README.md").read_text()
    for folder in (path for path in VENDOR.iterdir() if path.is_dir()):
        assert f"| `{folder.name}/` |" in readme
        assert (folder / "LICENSE").stat().st_size > 500


@pytest.mark.anyio
async def test_pages_have_a_content_policy_and_name_no_other_host(app: FlockAPI) -> None:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for path in ("/docs", "/redoc"):
            response = await client.get(path)
            assert response.status_code == 200
            assert response.headers["Content-Type"] == "text/html; charset=utf-8"
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert "http" not in response.text


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module", params=["", "/ai/v1"], ids=["at the root", "under a prefix"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    script = tmp_path_factory.mktemp("host") / "host.py"
    script.write_text(HOST)
    arguments = [request.param] if request.param else []
    with running(sys.executable, str(script), *arguments, PYTHONPATH=str(ROOT)) as server:
        server.url += request.param
        yield server


def test_swagger_runs_an_agent_from_the_page(browser: Browser, served: Server) -> None:
    page = browser.new_page()
    watch = Watch(page, served.url)
    page.goto(f"{served.url}/docs")
    expect(page).to_have_title('<b>Bold & "quoted"</b>')
    expect(page.locator(".info .title")).to_contain_text('<b>Bold & "quoted"</b>')
    operation = page.locator("#operations-runs-runFlock")
    operation.locator(".opblock-summary-control").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.locator("textarea").fill('{"agent_name": "add", "inputs": {"a": 40}}')
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table tr.response .response-col_status")).to_contain_text("200")
    expect(operation.locator(".live-responses-table")).to_contain_text('"result": 42')
    assert watch.errors == []
    assert watch.elsewhere == []
    page.close()


def test_redoc_shows_every_operation(browser: Browser, served: Server) -> None:
    page = browser.new_page()
    watch = Watch(page, served.url)
    page.goto(f"{served.url}/redoc")
    for _, _, operation in operations():
        expect(page.locator("h2", has_text=operation["summary"]).first).to_be_attached(timeout=PATIENCE_S * 1000)
    expect(page.locator("h1").first).to_contain_text("Bold")
    assert watch.elsewhere == []
    # The content policy blocks the logo that ReDoc loads from another host, and reports that.
    assert [error for error in watch.errors if "cdn.redoc.ly" not in error and "violates" not in error] == []
    page.close()


def test_static_files_are_only_html_js_and_json() -> None:
    assert {path.suffix for path in Path(STATIC).glob("*") if path.is_file()} == {".html", ".js", ".json"}

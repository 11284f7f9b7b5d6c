"""The web page at ``/ui``: what is served, and what people do with it in a real browser."""

from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router

from flock.ui import ui_files
from flockapi import create_app
from tests.fakes import sample_flock

pytestmark = pytest.mark.anyio


# What is served


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")


async def test_it_is_there_only_if_it_is_asked_for() -> None:
    async with client_of(create_app(sample_flock())) as client:
        for path in ("/", "/ui", "/ui/app.js"):
            assert (await client.get(path)).status_code == 404


async def test_files_have_the_content_policy_and_are_asked_for_again_only_when_they_change() -> None:
    async with client_of(create_app(sample_flock(), create_ui=True, server_name="<b>Bold</b>")) as client:
        for name in ("", *(f"/{name}" for name in ui_files(""))):
            response = await client.get(f"/ui{name}", headers={"Accept-Encoding": "identity"})
            assert response.status_code == 200
            assert response.headers["Content-Security-Policy"].startswith("default-src 'self'; ")
            assert response.headers["Cache-Control"] == "no-cache"
            assert "Content-Encoding" not in response.headers
            packed = await client.get(f"/ui{name}", headers={"Accept-Encoding": "br, gzip;q=0.5"})
            assert packed.headers["Content-Encoding"] == "gzip"
            assert packed.content == response.content
            assert int(packed.headers["Content-Length"]) < len(response.content)
            again = await client.get(f"/ui{name}", headers={"If-None-Match": response.headers["ETag"]})
            assert (again.status_code, again.content) == (304, b"")
            plain = await client.get(f"/ui{name}", headers={"Accept-Encoding": "gzip;q=0"})
            assert "Content-Encoding" not in plain.headers
        page = (await client.get("/ui")).text
        assert "<title>&lt;b&gt;Bold&lt;/b&gt;</title>" in page
        assert "://" not in page
        assert (await client.get("/ui/app.js")).headers["Content-Type"] == "text/javascript; charset=utf-8"
        missing = await client.get("/ui/none.js")
        assert (missing.status_code, missing.headers["Content-Type"]) == (404, "application/problem+json")


@pytest.mark.parametrize("prefix", ["", "/ai/v1"])
async def test_the_root_leads_to_it_unless_it_is_somebodys_own(prefix: str) -> None:
    async def mine(request: Request) -> PlainTextResponse:
        return PlainTextResponse("mine")

    for routes, expected in (([], 307), ([Route("/", mine)], 200)):
        app: Any = create_app(sample_flock(), create_ui=True, routes=routes)
        async with client_of(Router([Mount(prefix, app)]) if prefix else app) as client:
            response = await client.get(f"{prefix}/")
            assert response.status_code == expected
            if expected == 307:
                assert response.headers["Location"] == f"{prefix}/ui"
                assert (await client.get(f"{prefix}/ui")).status_code == 200


async def test_everybody_may_load_its_files_and_nobody_its_data_without_a_key() -> None:
    async with client_of(create_app(sample_flock(), create_ui=True, api_keys={"ann": "k" * 32})) as client:
        for path, status in (("/", 307), ("/ui", 200), ("/ui/app.js", 200), ("/agents", 401), ("/runs", 401)):
            assert (await client.get(path)).status_code == status


def test_no_script_makes_html_of_data() -> None:
    for name, file in ui_files("").items():
        for word in (b"innerHTML", b"outerHTML", b"insertAdjacentHTML", b"document.write", b"eval(", b"new Function"):
            assert word not in file.plain, name

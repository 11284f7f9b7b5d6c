"""The web page in a real browser: its server, its visitors, and the fixtures of both."""

import contextlib
import dataclasses
import re
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

from tests.support import PATIENCE_S, ROOT
from tests.support.browser import Watch, chromium
from tests.support.servers import Server, running

KEY = "k" * 32


@dataclasses.dataclass
class Site:
    """A server, and the requests that a test sends in addition to those of the page."""

    folder: Path
    url: str
    prefix: str
    key: str | None

    def __post_init__(self) -> None:
        self.headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, headers=self.headers, timeout=90).raise_for_status().json()

    def start(self, agent_name: str, **inputs: Any) -> str:
        body = {"agent_name": agent_name, "inputs": inputs, "async_run": True}
        response = httpx.post(f"{self.url}/run/flock", json=body, headers=self.headers)
        return str(response.raise_for_status().json()["run_id"])

    def run(self, agent_name: str, **inputs: Any) -> str:
        run_id = self.start(agent_name, **inputs)
        self.get(f"/run/{run_id}?wait=30")
        return run_id

    def batch(self, rows: int, wait: bool = True, **options: Any) -> str:
        items = [{"n": n, "comment": f"row {n}"} for n in range(rows)]
        body = {"agent_name": "count_up", "batch_inputs": items, "max_workers": 50, **options}
        response = httpx.post(f"{self.url}/run/batch", json=body, headers=self.headers)
        batch_id = str(response.raise_for_status().json()["batch_id"])
        if wait:
            self.get(f"/batch/{batch_id}?wait=60&results=false")
        return batch_id

    def delete(self, path: str) -> None:
        httpx.delete(self.url + path, headers=self.headers).raise_for_status()

    def open_gate(self, name: str) -> None:
        (self.folder / name).touch()


def served_by(folder: Path, prefix: str, key: str | None, port: int = 0) -> contextlib.AbstractContextManager[Server]:
    command = [sys.executable, "-m", "tests.ui_host", str(folder), "--prefix", prefix, "--port", str(port)]
    command += ["--key", key] if key else []
    return running(*command, PYTHONPATH=str(ROOT), OPENAI_API_KEY="sk-test-key-of-the-tests")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=1000 * PATIENCE_S)
    with chromium() as browser:
        yield browser
    expect.set_options(timeout=5_000)


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve the hardest case: mounted in another app, with a key and a dark theme."""
    folder = tmp_path_factory.mktemp("closed")
    with served_by(folder, "/ai/v1", KEY) as server:
        yield Site(folder, f"{server.url}/ai/v1", "/ai/v1", KEY)
        server.stop()


@pytest.fixture(
    scope="module", params=[pytest.param("at the root", marks=pytest.mark.nightly), "under a prefix, with a key"]
)
def site(request: pytest.FixtureRequest, closed: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Return the mounted app or, in nightly runs, a server of its own without a key and with a light theme."""
    if request.param == "at the root":
        folder = tmp_path_factory.mktemp("open")
        with served_by(folder, "", None) as server:
            yield Site(folder, server.url, "", None)
            server.stop()
    else:
        yield closed


@pytest.fixture
def gate() -> str:
    return uuid.uuid4().hex


class Visit:
    """The browser of a user. Each page is watched for requests to other hosts and for errors."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._contexts: list[BrowserContext] = []
        self._watches: list[Watch] = []
        #: errors that a test provokes, as patterns
        self.expected: list[str] = []

    def context(self, site: Site, has_key: bool = True, **options: Any) -> BrowserContext:
        options = {
            "viewport": {"width": 1200, "height": 800},
            "color_scheme": "dark" if site.prefix else "light",
        } | options
        context = self._browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        context.set_default_timeout(1000 * PATIENCE_S)
        if site.key and has_key:
            context.add_init_script(f"sessionStorage.setItem('flock:{site.prefix}/:key', '{site.key}')")
        self._contexts.append(context)
        return context

    def page(self, site: Site, path: str = "", context: BrowserContext | None = None, **options: Any) -> Page:
        page = (context or self.context(site, **options)).new_page()
        self._watches.append(Watch(page, site.url))
        page.goto(f"{site.url}/ui{path and '#/' + path}")
        return page

    def end(self) -> None:
        for context in self._contexts:
            for page in context.pages:
                page.unroute_all(behavior="ignoreErrors")  # or a handler that outlives its page fails the next test
            context.unroute_all(behavior="ignoreErrors")
            context.close()
        for watch in self._watches:
            assert watch.elsewhere == []
            left = [error for error in watch.errors if not any(re.search(each, error) for each in self.expected)]
            assert left == []


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    visit = Visit(browser)
    yield visit
    visit.end()


def status_of(page: Page) -> Locator:
    return page.locator("#status")

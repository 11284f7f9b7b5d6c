"""A real Chromium."""

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, Request, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Watch:
    """The requests of a page to other hosts, and its errors."""

    def __init__(self, page: Page, url: str) -> None:
        self.elsewhere: list[str] = []
        self.errors: list[str] = []
        host = url.split("/")[2]

        def note(request: Request) -> None:
            """Record a request to another host, unless the content policy blocked it."""
            at_home = request.url.startswith((f"http://{host}/", "data:", f"blob:http://{host}/"))
            if not at_home and "csp" not in (request.failure or "").lower():
                self.elsewhere.append(f"{request.url} {request.failure}")

        page.on("requestfinished", note)
        page.on("requestfailed", note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(f"{message.text}") if message.type == "error" else None)

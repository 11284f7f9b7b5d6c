"""Write the current screenshots of the web page for the README: python -m tests.screenshots"""

import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Literal, TypedDict

import anyio
import httpx
import uvicorn
from playwright.sync_api import Page, sync_playwright

from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import RunContext
from flock.testing import FakeModel
from flockapi import create_app
from tests.support import ROOT
from tests.support.browser import CHROMIUM
from tests.support.servers import running
from tests.ui_host import reply

PICTURES = ROOT / "docs"
TEXTS = ("I love this coffee maker.", "It broke after a week.", "The shop opens at nine.")


# Sample agents


class Rating(TypedDict):
    stars: int
    topic: str


def shown_flock() -> Flock:
    flock, chance = Flock("shown", model="openai/gpt-4o"), random.Random(7)
    flock.add_agent(
        FlockFactory.create_default_agent(
            name="text_analyzer",
            description="Finds the sentiment and the keywords of a text.",
            input="text: str | what to analyse",
            output="sentiment: str, keywords: list[str]",
        )
    )

    @flock.agent(next_agent="summarise")
    async def research(topic: str, context: RunContext, pages: int = 40) -> str:
        """Researches a topic, page by page."""
        for page in range(pages):
            context.progress(page, pages, "Pages read")
            await anyio.sleep(0.15)
        return f"All about {topic}."

    @flock.agent
    async def summarise(result: str) -> str:
        """Summarises the findings in a few words."""
        return f"In short: {result}"

    @flock.agent(next_agent=lambda result: None)
    async def triage(mail: str, urgency: Literal["low", "high"] = "low") -> str:
        """Sorts the mail of a help desk, and hands each message off to the right agent."""
        raise AgentError("No one is on duty for this mail. Try again after nine.")

    @flock.agent
    async def rate_review(review: str) -> Rating:
        """Rates the review of a customer, from one star to five."""
        await anyio.sleep(chance.lognormvariate(-2.2, 0.7))
        if chance.random() < 0.04:
            raise AgentError("The language of the review is not supported.")
        return {"stars": chance.randint(1, 5), "topic": chance.choice(["delivery", "taste", "price"])}

    return flock


def serve(folder: Path) -> None:
    flock = shown_flock()
    engine = flock.engine(store=folder / "flock.db", transport=FakeModel(reply).transport)
    uvicorn.run(create_app(flock, server_name="Acme agents", create_ui=True, engine=engine), port=0)


# Screenshots


def show(page: Page, view: str, url: str, client: httpx.Client) -> None:
    """Open *view*, and wait until it has content."""

    def start(agent_name: str, **inputs: object) -> str:
        body = {"agent_name": agent_name, "inputs": inputs, "async_run": True}
        return str(client.post("/run/flock", json=body).json()["run_id"])

    if view == "agents":
        page.goto(f"{url}/ui")
        page.locator(".card").first.wait_for()
    elif view == "run":
        page.goto(f"{url}/ui#/run/{start('research', topic='the history of tea')}")
        page.get_by_text(re.compile(r"Pages read: [12]\d of 40")).wait_for()
    elif view == "runs":
        for text in TEXTS * 2:
            client.get(f"/run/{start('text_analyzer', text=text)}?wait=20")
        client.get(f"/run/{start('triage', mail='Where is my parcel?')}?wait=20")
        page.goto(f"{url}/ui#/runs")
        page.locator("tbody tr").nth(7).wait_for()
    else:
        rows = [{"review": f"{TEXTS[n % 3]} ({n + 1})"} for n in range(900)]
        body = {"agent_name": "rate_review", "batch_inputs": rows, "max_workers": 25}
        batch_id = client.post("/run/batch", json=body).json()["batch_id"]
        page.goto(f"{url}/ui#/batch/{batch_id}")
        page.get_by_text(re.compile("Half of the 1[5-9][0-9] rows measured")).wait_for()


def main() -> None:
    if sys.argv[1:]:
        serve(Path(sys.argv[1]))
        return
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        command = [sys.executable, "-m", "tests.screenshots", folder]
        with running(*command, PYTHONPATH=str(ROOT), OPENAI_API_KEY="sk-none") as server:
            client = httpx.Client(base_url=server.url, timeout=60)
            chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            for view, height in (("agents", 600), ("run", 540), ("runs", 500), ("batch", 820)):
                theme: Literal["light", "dark"] = "light" if view in ("agents", "run") else "dark"
                page = chromium.new_page(viewport={"width": 1000, "height": height}, color_scheme=theme)
                show(page, view, server.url, client)
                path = PICTURES / f"ui-{view}.png"
                page.screenshot(path=path)
                page.close()
                print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")
            chromium.close()
            client.close()


if __name__ == "__main__":
    main()

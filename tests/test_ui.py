"""The web page at ``/ui``: the files that are served, and their use in a real browser."""

import io
import json
import os
import re
import signal
import subprocess
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pandas
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Request, Response, expect
from playwright.sync_api import Route as PageRoute
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, Router

from flock.web.ui import ui_files
from flockapi import create_app
from tests.support import ROOT
from tests.support.flocks import sample_flock
from tests.support.receivers import SECRET
from tests.support.servers import free_port
from tests.support.site import KEY, Site, Visit, served_by, status_of

pytest_plugins = "tests.support.site"  # for its fixtures

# Served files


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t")


@pytest.mark.anyio
async def test_the_page_is_served_only_if_it_is_enabled() -> None:
    async with client_of(create_app(sample_flock())) as client:
        for path in ("/", "/ui", "/ui/main.js"):
            assert (await client.get(path)).status_code == 404


@pytest.mark.anyio
async def test_files_have_a_content_security_policy_and_are_sent_again_only_if_changed() -> None:
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
        assert '<a href="docs">' in page
        assert "<title>&lt;b&gt;Bold&lt;/b&gt;</title>" in page
        assert "://" not in page
        assert (await client.get("/ui/main.js")).headers["Content-Type"] == "text/javascript; charset=utf-8"
        missing = await client.get("/ui/none.js")
        assert (missing.status_code, missing.headers["Content-Type"]) == (404, "application/problem+json")


@pytest.mark.anyio
@pytest.mark.parametrize("prefix", ["", "/ai/v1"])
async def test_the_root_redirects_to_the_page_unless_it_has_its_own_route(prefix: str) -> None:
    async def mine(request: HTTPRequest) -> PlainTextResponse:
        return PlainTextResponse("mine")

    for routes, expected in (([], 307), ([Route("/", mine)], 200)):
        app: Any = create_app(sample_flock(), create_ui=True, routes=routes)
        async with client_of(Router([Mount(prefix, app)]) if prefix else app) as client:
            response = await client.get(f"{prefix}/")
            assert response.status_code == expected
            if expected == 307:
                assert response.headers["Location"] == f"{prefix}/ui"
                assert (await client.get(f"{prefix}/ui")).status_code == 200


@pytest.mark.anyio
async def test_without_docs_there_is_no_link_to_them() -> None:
    async with client_of(create_app(sample_flock(), create_ui=True, docs=False)) as client:
        assert "docs" not in (await client.get("/ui")).text


@pytest.mark.anyio
async def test_only_a_server_with_receivers_has_a_tab_for_webhooks() -> None:
    async with client_of(create_app(sample_flock(), create_ui=True)) as client:
        assert "webhooks" not in (await client.get("/ui")).text
    flock = sample_flock()
    flock.webhook_url = "http://127.0.0.1:9"
    async with client_of(create_app(flock, create_ui=True, webhook_secrets=[SECRET])) as client:
        assert '<a href="#/webhooks" hidden>' in (await client.get("/ui")).text


@pytest.mark.anyio
async def test_the_root_redirects_behind_a_proxy_that_strips_its_prefix() -> None:
    transport = httpx.ASGITransport(create_app(sample_flock(), create_ui=True), root_path="/ai")
    async with httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/")).headers["Location"] == "/ai/ui"
        assert (await client.get("/ui/")).json()["detail"].endswith("Use /ai/ui")


@pytest.mark.anyio
async def test_the_files_of_the_page_need_no_key_but_its_data_does() -> None:
    async with client_of(create_app(sample_flock(), create_ui=True, api_keys={"ann": "k" * 32})) as client:
        for path, status in (("/", 307), ("/ui", 200), ("/ui/main.js", 200), ("/agents", 401), ("/runs", 401)):
            assert (await client.get(path)).status_code == status


def test_no_script_inserts_data_as_html() -> None:
    for name, file in ui_files("").items():
        for word in (b"innerHTML", b"outerHTML", b"insertAdjacentHTML", b"document.write", b"eval(", b"new Function"):
            assert word not in file.plain, name


# In a browser


def copied(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


# Agents


def test_the_card_of_an_agent_shows_its_hand_off(visit: Visit, closed: Site) -> None:
    page = visit.page(closed)
    expect(page).to_have_title("Agents · Sample agents")
    card = page.locator(".card", has=page.get_by_role("heading", name="research"))
    expect(card).to_contain_text("Researches a topic, page by page.")
    expect(card).to_contain_text("Hands off to translate.")
    expect(page.locator(".card", has_text="Rephrases the result.")).to_contain_text(
        "Its result decides which agent runs next."
    )
    card.get_by_role("link", name="translate").click()
    expect(page.get_by_role("heading", name="translate", exact=True)).to_be_focused()


def test_a_hand_off_shows_the_outputs_of_its_last_agent(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/taste")
    result = page.get_by_role("region", name="Result")
    expect(result).to_contain_text("Returned by grade, the last agent in the chain.")
    expect(result.get_by_role("rowheader")).to_have_count(2)
    assert set(result.get_by_role("rowheader").all_inner_texts()) == {"total", "note"}
    body = {"agent_name": "taste", "batch_inputs": [{"sample": "none"}] * 2}
    batch_id = httpx.post(f"{closed.url}/run/batch", json=body, headers=closed.headers).json()["batch_id"]
    closed.get(f"/batch/{batch_id}?wait=30&results=false")
    page = visit.page(closed, f"batch/{batch_id}")
    header = page.get_by_role("table", name="Results").get_by_role("columnheader")
    expect(header).to_have_count(6)
    assert set(header.all_inner_texts()) == {"Row", "Status", "sample", "total", "note", "Error"}


def test_the_page_of_an_agent_shows_all_that_can_follow(visit: Visit, closed: Site) -> None:
    page = visit.page(closed)
    expect(page.locator(".card", has_text="Sorts a mail.")).to_contain_text("Its result decides which agent runs next.")
    page = visit.page(closed, "agent/sort")
    branches = page.get_by_role("region", name="Next agents").get_by_role("listitem")
    expect(branches).to_have_count(4)
    texts = [re.sub(r"\s+", " ", text) for text in branches.all_inner_texts()]
    assert texts == [
        "category is billing translate decided by a function",
        "decided by a function",
        "category is again sort",
        "category is <b>other</b> the run ends",
    ]
    result = page.get_by_role("region", name="Result")
    expect(result).to_contain_text("Returned by sort, if it is the last agent.")
    expect(result).to_contain_text("Returned by translate, unless its result names another agent.")
    branches.get_by_role("link", name="translate").click()
    expect(page.get_by_role("heading", name="translate", exact=True)).to_be_focused()
    expect(branches).to_have_text("decided by a function")
    page = visit.page(closed, "agent/grade")
    expect(page.get_by_role("region", name="Result")).to_be_visible()
    expect(page.get_by_role("region", name="Next agents")).to_have_count(0)


def test_agents_and_batches_are_explained_in_a_sentence(visit: Visit, closed: Site) -> None:
    page = visit.page(closed)
    expect(page.get_by_text("An agent does one job, often with a language model")).to_be_visible()
    for view in ("batches", "new-batch"):
        page = visit.page(closed, view)
        expect(page.get_by_text("A batch runs one agent on every row of a table")).to_be_visible()


def fill_order(page: Page) -> None:
    page.get_by_label("item (required)").fill("tea")
    page.get_by_label("amount (required)").fill("3")
    page.get_by_label("size (required)").select_option("large")
    page.get_by_label("gift").check()
    page.get_by_label("due (required)").fill("2026-12-24")
    page.get_by_role("group", name="address").get_by_label("street").fill("Main Street")
    page.get_by_role("group", name="address").get_by_label("number").fill("5")
    page.get_by_role("group", name="address").get_by_label("zip").fill("1010")
    page.get_by_role("button", name="Add to notes").click()
    page.get_by_role("textbox", name="notes 1").fill('It\'s "fragile"')
    page.get_by_label("code (required)").fill(str(uuid.UUID(int=7)))


ORDER = {
    "item": "tea",
    "amount": 3,
    "size": "large",
    "gift": True,
    "due": "2026-12-24",
    "address": {"street": "Main Street", "number": 5, "zip": "1010"},
    "notes": ['It\'s "fragile"'],
    "code": str(uuid.UUID(int=7)),
}


def test_a_form_has_a_control_for_each_type_of_input_and_curl_sends_the_same(visit: Visit, site: Site) -> None:
    page = visit.page(site, "agent/order")
    fill_order(page)
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_text("Command copied.")).to_be_visible()
    command = copied(page)
    assert KEY not in command
    env = {**os.environ, "FLOCK_API_KEY": site.key or ""}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout)["status"] == "completed"
    page.get_by_role("button", name="Run", exact=True).click()
    expect(status_of(page)).to_contain_text("completed")
    for run in site.get("/runs?include=inputs&limit=2")["runs"]:
        assert run["inputs"] == ORDER


def test_a_form_shows_defaults_and_leaves_out_empty_fields(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/defaults")
    expect(page.get_by_label("times")).to_have_value("2")
    expect(page.locator(".field", has=page.get_by_label("times"))).to_contain_text("Default: 2.")
    expect(page.get_by_label("loud")).to_be_checked()
    page.get_by_role("button", name="Run", exact=True).click()
    assert page.get_by_label("name (required)").evaluate("control => control.validity.valueMissing")
    name = page.get_by_label("name (required)")
    height = name.bounding_box()
    name.fill("a line\n" * 8)
    grown = name.bounding_box()
    assert height is not None
    assert grown is not None
    assert grown["height"] > height["height"] * 3
    page.get_by_label("more").fill("[1, 2")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_role("heading", name="Result")).to_be_visible()
    expect(status_of(page)).to_contain_text("completed")  # so it is stored
    inputs = closed.get("/runs?include=inputs&limit=1&agent_name=defaults")["runs"][0]["inputs"]
    assert inputs == {"name": "a line\n" * 8, "times": 2, "loud": True, "tags": [], "more": "[1, 2"}


def test_a_number_is_sent_as_it_is_typed_or_refused(visit: Visit, closed: Site) -> None:
    """Type it key by key, because a control of type "number" silently drops the comma of 119,50."""
    page = visit.page(closed, "agent/book")
    seat, price = page.get_by_label("seat (required)"), page.get_by_label("price (required)")
    run = page.get_by_role("button", name="Run", exact=True)
    seat.press_sequentially("12345678901234567890")
    price.press_sequentially("119,50")
    wrong = page.locator(".field", has=price).locator(".error")
    expect(wrong).to_have_text(
        "“119,50” is not a number. Use a point for decimals, such as 0.5, and no commas or spaces."
    )
    run.click()
    expect(price).to_be_focused()
    expect(price).to_have_attribute("aria-invalid", "true")
    price.fill("119.50")
    for text, words in (
        ("0", "It must be at least 1."),
        ("1,5", "“1,5” is not a whole number. Use digits only, such as 42."),
    ):
        seat.fill(text)
        run.click()
        expect(seat).to_be_focused()
        expect(page.locator(".field", has=seat).locator(".error")).to_have_text(words)
    seat.fill("+0012345678901234567890")
    page.reload()  # the draft is exact too
    expect(seat).to_have_value("12345678901234567890")
    run.click()
    expect(page.get_by_role("group", name="Result")).to_contain_text("12345678901234567890")
    inputs = closed.get("/runs?include=inputs&limit=1&agent_name=book")["runs"][0]["inputs"]
    assert inputs == {"seat": 12345678901234567890, "price": 119.5}


def test_enter_sends_from_one_line_and_control_enter_from_several(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/book")
    page.get_by_label("seat (required)").fill("4")
    page.get_by_label("price (required)").fill("2.5")
    page.keyboard.press("Enter")
    expect(status_of(page)).to_contain_text("completed")
    for keys in ("Control+Enter", "Meta+Enter"):
        page = visit.page(closed, "agent/text_analyzer")
        page.get_by_label("Theme").press(keys)  # is in no form
        text = page.get_by_label("text (required)")
        text.press_sequentially("one")
        text.press("Enter")
        text.press_sequentially(keys)
        expect(text).to_have_value(f"one\n{keys}")
        text.press(keys)
        expect(status_of(page)).to_contain_text("completed")
        runs = closed.get("/runs?include=inputs&agent_name=text_analyzer")["runs"]
        assert [run["inputs"]["text"] for run in runs].count(f"one\n{keys}") == 1


def test_an_error_from_the_server_is_shown_at_its_field(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 422")
    page = visit.page(closed, "agent/order")
    fill_order(page)
    code = page.get_by_label("code (required)")
    code.fill("not a uuid")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(code).to_be_focused()
    expect(code).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".field", has=code).locator(".error")).to_contain_text("UUID")
    described = (code.get_attribute("aria-describedby") or "").split()
    assert "UUID" in page.locator(f"#{described[-1]}").inner_text()
    code.fill(ORDER["code"])  # type: ignore[arg-type]
    inner = page.get_by_label("zip (required)")
    inner.fill("none")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(inner).to_be_focused()
    expect(page.locator(".field", has=inner).locator(".error")).not_to_be_empty()
    inner.fill("1010")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(status_of(page)).to_contain_text("completed")


def test_dates_and_times_have_pickers_and_are_sent_in_the_format_of_the_api(visit: Visit, closed: Site) -> None:
    """Pickers use the time zone of the browser. An unchanged value is sent as it was, in any zone."""

    def form_in(zone: str) -> Page:
        context = visit.context(closed, timezone_id=zone)

        def with_formats(route: Any) -> None:
            agent = closed.get("/agents/book")
            for name, format_ in (("at", "date-time"), ("opens", "time"), ("lasts", "duration")):
                agent["input_schema"]["properties"][name]["anyOf"][0]["format"] = format_
            route.fulfill(json=agent)

        context.route("**/agents/book", with_formats)
        page = visit.page(closed, "agent/book", context)
        expect(page.get_by_text(f"In your time zone, {zone}.")).to_be_visible()
        return page

    page = form_in("America/New_York")
    page.get_by_label("seat (required)").fill("1")
    page.get_by_label("price (required)").fill("2")
    for name, kind, text in (("at", "datetime-local", "2026-07-01T09:30"), ("opens", "time", "08:15")):
        control = page.get_by_label(name, exact=True)
        expect(control).to_have_attribute("type", kind)
        control.fill(text)
    lasts = page.get_by_label("lasts")
    lasts.fill("PT1H30M")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(status_of(page)).to_contain_text("completed")
    inputs = closed.get("/runs?include=inputs&limit=1&agent_name=book")["runs"][0]["inputs"]
    given = {"at": "2026-07-01T09:30:00-04:00", "opens": "08:15:00", "lasts": "PT1H30M"}
    assert inputs == {"seat": 1, "price": 2} | given

    given |= {"at": "2026-07-01T13:30:00.123456Z", "opens": "08:15:00.123456"}
    run_id = closed.run("book", seat=1, price=2, **given)
    page = form_in("Asia/Calcutta")
    page.goto(f"{closed.url}/ui#/run/{run_id}")
    page.get_by_role("button", name="Use these inputs again").click()
    expect(page.get_by_label("at", exact=True)).to_have_value("2026-07-01T19:00:00.123")
    expect(page.get_by_label("opens")).to_have_value("08:15:00.123456")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(status_of(page)).to_contain_text("completed")
    assert (
        closed.get("/runs?include=inputs&limit=1&agent_name=book")["runs"][0]["inputs"]
        == {"seat": 1, "price": 2} | given
    )


# A run


def test_a_run_is_followed_live_and_its_result_can_be_copied_and_downloaded(
    visit: Visit, site: Site, gate: str
) -> None:
    page = visit.page(site, "agent/research")
    page.get_by_label("topic (required)").fill("<b>tea</b>")
    page.get_by_label("gate").fill(gate)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_text("pages: 1 of 3")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_attribute("value", "1")
    expect(status_of(page)).to_contain_text("running")
    steps = page.get_by_role("list", name="Steps").locator("> li")
    expect(steps).to_have_count(1)
    site.open_gate(gate)
    expect(steps).to_have_count(2)
    expect(steps.nth(0)).to_contain_text(re.compile(r"research\s+done in [\d.]+ m?s, started"))
    expect(steps.nth(1)).to_contain_text(re.compile(r"translate\s+running for [\d.]+ m?s, started"))
    site.open_gate(f"{gate}-2")
    expect(status_of(page)).to_contain_text("completed")
    result = page.get_by_role("group", name="Result")
    expect(result.get_by_role("row", name="result")).to_contain_text("In other words: All about <b>tea</b>.")
    page.get_by_role("button", name="JSON").click()
    expected = {"result": "In other words: All about <b>tea</b>."}
    assert json.loads(result.inner_text()) == expected
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_text("Result copied.")).to_be_visible()
    assert json.loads(copied(page)) == expected
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert json.loads(download.value.path().read_text()) == expected


def test_a_hidden_tab_closes_its_stream_and_resumes_after_the_last_event(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, f"run/{closed.start('research', topic='tea', gate=gate)}")
    expect(page.get_by_role("list", name="Steps").locator("> li")).to_contain_text("running")  # from an event

    def hide(is_hidden: bool) -> None:
        page.evaluate(
            """isHidden => {
                Object.defineProperty(document, "hidden", {value: isHidden, configurable: true});
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            is_hidden,
        )

    with page.expect_event("requestfailed", lambda request: request.url.endswith("/events")):
        hide(True)
    closed.open_gate(gate)
    closed.open_gate(f"{gate}-2")
    with page.expect_request(lambda request: request.url.endswith("/events")) as again:
        hide(False)
    assert int(again.value.headers["last-event-id"]) >= 10**12
    expect(status_of(page)).to_contain_text("completed")
    expect(page.get_by_role("list", name="Steps").locator("> li")).to_have_count(2)


def test_a_run_can_be_cancelled(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, f"run/{closed.start('research', topic='tea', gate=gate)}")
    page.get_by_role("button", name="Cancel").click()
    expect(status_of(page)).to_contain_text("cancelled")
    expect(page.get_by_role("heading", name="The run was cancelled")).to_be_visible()
    expect(page.locator(".problem")).not_to_contain_text("The run was cancelled.")  # the heading says it


def test_a_failed_run_shows_the_reason_and_can_be_retried(visit: Visit, site: Site, gate: str) -> None:
    run_id = site.run("deliver", parcel="cake", gate=gate)
    run = site.get(f"/run/{run_id}")
    page = visit.page(site, f"run/{run_id}")
    problem = page.locator(".problem")
    for text in ("Nobody opened the door for <b>cake</b>.", run["error_type"], run["request_id"]):
        expect(problem).to_contain_text(text)
    site.open_gate(gate)
    page.get_by_role("button", name="Retry").click()
    expect(status_of(page)).to_contain_text("completed")
    expect(page.get_by_role("group", name="Result")).to_contain_text("cake is delivered.")
    expect(page.locator(".facts")).to_contain_text(re.compile(r"Attempt\s*2"))


def test_the_questions_of_a_waiting_run_are_answered_with_forms(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, f"run/{closed.run('refund', order='A7')}")
    expect(status_of(page)).to_contain_text("waiting")
    amount = page.locator("form", has=page.get_by_role("heading", name="How much?"))
    approval = page.locator("form", has=page.get_by_role("heading", name="Refund <b>A7</b>?"))
    expect(approval).to_contain_text("Expires")
    approval.get_by_label("reason").fill("A draft")
    visit.expected.append("422")
    approval.get_by_role("button", name="Answer").click()
    expect(approval.get_by_label("reason")).to_have_attribute("aria-invalid", "true")
    approval.get_by_label("reason").fill("a draft")
    amount.get_by_label("answer").fill("40")
    amount.get_by_role("button", name="Answer").click()
    expect(amount).to_have_count(0)
    expect(approval.get_by_label("reason")).to_have_value("a draft")  # an answer to another question keeps it
    approval.get_by_label("approved").check()
    approval.get_by_role("button", name="Answer").click()
    expect(status_of(page)).to_contain_text("completed")
    expect(page.locator("form.panel")).to_have_count(0)
    expect(page.get_by_role("group", name="Result")).to_contain_text("a draft")


def test_the_list_of_waiting_runs_shows_their_questions(visit: Visit, closed: Site) -> None:
    run_id = closed.run("refund", order="A8")
    page = visit.page(closed, "runs?status=waiting")
    row = page.get_by_role("row", name=re.compile(run_id[-12:]))
    expect(row).to_contain_text("How much?")
    expect(row).to_contain_text("waiting")


def test_a_copied_link_shows_the_same_run_and_its_inputs(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, f"run/{closed.run('text_analyzer', text='I love this coffee.')}")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_text("Link copied.")).to_be_visible()
    other = visit.page(closed)
    other.route("**/run/*", created_a_second_later)
    other.goto(copied(page))
    expect(other.get_by_role("group", name="Result")).to_contain_text("positive")
    expect(other.get_by_role("group", name="Inputs")).to_contain_text("I love this coffee.")
    other.get_by_role("button", name="Use these inputs again").click()
    expect(other.get_by_label("text (required)")).to_have_value("I love this coffee.")


def created_a_second_later(route: PageRoute) -> None:
    """Answer as a busy server, which stops between the creation of an id and the reading of the clock."""
    response = route.fetch()
    run = response.json()
    late = datetime.fromisoformat(run["created_at"]) + timedelta(seconds=1)
    route.fulfill(response=response, json={**run, "created_at": late.isoformat()})


def test_a_result_is_always_shown_as_text(visit: Visit, closed: Site) -> None:
    run_id = closed.run("quote")
    page = visit.page(closed, f"run/{run_id}")
    result = page.get_by_role("group", name="Result", exact=True)
    expect(result).to_contain_text("<script>document.title = 'pwned'</script>")
    expect(result).to_contain_text("<img src=x onerror=\"document.title = 'pwned'\">")
    page.get_by_role("button", name="JSON").click()
    expect(result).to_contain_text("<img src=x")
    assert page.locator("main img, main script").count() == 0
    expect(page).to_have_title("quote · Sample agents")
    page.goto(f"{closed.url}/ui#/run/{closed.run('quote', size='long')}")
    expect(result).to_contain_text("… and 300 more. The JSON view shows all.")
    expect(result).to_contain_text(str(2**60))  # JavaScript alone would round it


# Runs


def test_runs_are_filtered_paged_and_refreshed(visit: Visit, closed: Site, gate: str) -> None:
    failed = closed.run("deliver", parcel="cake", gate=gate)
    for _ in range(60):
        closed.start("defaults", name="many")
    page = visit.page(closed, "runs")
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(50)
    newest = rows.first.inner_text()
    page.get_by_role("button", name="Older").click()
    expect(rows.first).not_to_have_text(newest)
    expect(rows.filter(has_text=failed[-12:])).to_have_count(1)
    page.reload()
    expect(rows.filter(has_text=failed[-12:])).to_have_count(1)
    page.get_by_role("button", name="Newer").click()
    expect(rows.first).to_contain_text(newest.split()[0])

    page.get_by_label("Agent").select_option("deliver")
    page.get_by_label("Status").select_option("failed")
    expect(rows.first).to_contain_text(failed[-12:])
    expect(page.locator("tbody .badge:not(.failed)")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("Status")).to_have_value("failed")
    expect(rows.first).to_contain_text(failed[-12:])
    fresh = closed.run("deliver", parcel="more cake", gate=gate)
    expect(rows.first).to_contain_text(fresh[-12:])  # without a reload
    page.get_by_label("From").fill("2101-01-01T00:00:00")
    expect(page.get_by_text("Nothing matches these filters.")).to_be_visible()
    page.get_by_role("button", name="Clear filters").click()
    expect(rows).to_have_count(50)


def test_a_list_of_runs_shows_the_start_of_inputs_and_results(visit: Visit, closed: Site, gate: str) -> None:
    """They may be long, so they are read in small pages and once for each state of a run, not every two seconds."""
    closed.run("text_analyzer", text="I love this coffee.")
    closed.run("quote", size="long")
    closed.run("deliver", parcel="cake", gate=gate)
    live = closed.start("research", topic="tea", gate=gate)
    requested: list[httpx.URL] = []
    context = visit.context(closed)
    context.on("request", lambda request: requested.append(httpx.URL(request.url)))
    page = visit.page(closed, "runs", context)
    rows = page.locator("tbody tr")
    expect(rows.filter(has_text="I love this coffee.").first).to_contain_text("sentiment: positive")
    expect(rows.filter(has_text="Nobody opened the door").first).to_contain_text(f"parcel: cake, gate: {gate}")
    long = rows.filter(has_text="text: word word").first
    assert len(long.inner_text()) < 400
    row = rows.filter(has_text=live[-12:])
    expect(row).to_contain_text("topic: tea")

    def previews() -> list[int]:
        return [int(url.params["limit"]) for url in requested if url.params.get("include")]

    def wait_for_refresh() -> None:
        with page.expect_response(lambda response: "/runs?" in response.url and "include" not in response.url):
            pass

    wait_for_refresh()  # the list is read again after the first previews
    before = len(previews())
    assert max(previews()) <= 10
    wait_for_refresh()
    wait_for_refresh()
    assert len(previews()) == before
    closed.open_gate(gate)
    closed.open_gate(f"{gate}-2")
    expect(row).to_contain_text("In other words: All about tea.")
    assert len(previews()) <= before + 2


def test_a_list_of_one_page_has_no_pager(visit: Visit, closed: Site) -> None:
    closed.run("taste", sample="tea")
    page = visit.page(closed, "runs?agent_name=taste")
    expect(page.locator("tbody tr").first).to_contain_text("tea is sweet.")
    expect(page.get_by_role("group", name="Pagination")).to_be_hidden()
    page.get_by_label("Status").select_option("cancelled")
    expect(page.get_by_text("Nothing matches these filters.")).to_be_visible()
    expect(page.get_by_role("group", name="Pagination")).to_be_hidden()


# Batches


CSV = 'Number;comment;junk\n1;one;x\nzwei;two;x\n3;"three;\nand more";x\n4;four\n'


def choose(page: Page, name: str, text: str) -> None:
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/csv", "buffer": text.encode()})


def drop(page: Page, name: str, text: str) -> None:
    data = page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }",
        [name, text],
    )
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})


def test_invalid_rows_are_reported_by_line_before_they_start(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    drop(page, "rows.csv", CSV)
    expect(page.get_by_text("separated by semicolons")).to_be_visible()
    wrong = page.get_by_role("group", name="Errors").locator("tbody tr")
    page.get_by_label("Column Number maps to").select_option("n")
    expect(page.get_by_text("2 of 4 rows are invalid.")).to_be_visible()
    expect(wrong.nth(0)).to_have_text(re.compile(r"3\s*Number\s*Expected 'int', got 'str'"))
    expect(wrong.nth(1)).to_have_text(re.compile(r"6\s*This row has 2 cells, but the header has 3\."))
    start = page.get_by_role("button", name="Start the batch")
    expect(start).to_be_disabled()
    page.get_by_label("Column Number maps to").select_option("")
    page.get_by_text("n (required)").wait_for()
    page.get_by_label("n (required)").fill("5")
    expect(page.get_by_text("1 of 4 rows is invalid.")).to_be_visible()
    page.get_by_label("Column Number maps to").select_option("n")
    page.get_by_label("Invalid rows").select_option("skip")
    start.click()
    expect(status_of(page)).to_contain_text("completed")
    expect(page.locator(".outcomes")).to_contain_text("2 failed")
    batch_id = page.url.rpartition("/")[2]
    items = closed.get(f"/batch/{batch_id}/results?format=json")
    assert [item["inputs"] for item in items][::2] == [
        {"n": 1, "comment": "one"},
        {"n": 3, "comment": "three;\nand more"},
    ]


@pytest.mark.parametrize("kind", ["xlsx", "parquet", "json"])
def test_a_file_whose_first_rows_cannot_be_cut_off_starts_a_batch(visit: Visit, closed: Site, kind: str) -> None:
    rows = pandas.DataFrame({"Number": [1, 2, 3], "comment": ["one", "two", "three; and more"]})
    file = io.BytesIO()
    if kind == "xlsx":
        rows.to_excel(file, index=False)
    elif kind == "parquet":
        rows.to_parquet(file)
    else:
        rows.to_json(file, orient="records", indent=2)
    page = visit.page(closed, "new-batch?agent=count_up")
    chosen = {"name": f"rows.{kind}", "mimeType": "application/octet-stream", "buffer": file.getvalue()}
    page.locator("input[type=file]").set_input_files(chosen)  # type: ignore[arg-type]
    expect(page.get_by_text(f"{kind.upper()}. These are the first rows.")).to_be_visible()
    page.get_by_label("Column Number maps to").select_option("n")
    expect(page.get_by_text("All 3 rows are valid.")).to_be_visible()
    page.get_by_role("button", name="Start the batch").click()
    expect(status_of(page)).to_contain_text("completed")
    items = closed.get(f"/batch/{page.url.rpartition('/')[2]}/results?format=json")
    assert [item["inputs"]["n"] for item in items] == [1, 2, 3]
    assert items[2]["inputs"]["comment"] == "three; and more"


def rows_of(kind: str, file: Path) -> int:
    """Return the number of rows in a table that was downloaded."""
    if kind in ("xlsx", "parquet"):
        return len(pandas.read_excel(file) if kind == "xlsx" else pandas.read_parquet(file))
    if kind == "json":
        return len(json.loads(file.read_bytes()))
    return len(file.read_text().splitlines()) - (kind != "ndjson")


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param("seat,price\n12345678901234567,1\n-98765432109876543210,2\n", id="csv"),
        pytest.param(
            '{"seat": 12345678901234567, "price": 1}\n{"seat": -98765432109876543210, "price": 2}\n', id="ndjson"
        ),
    ],
)
def test_long_numbers_in_a_file_are_exact(visit: Visit, closed: Site, rows: str) -> None:
    page = visit.page(closed, "new-batch?agent=book")
    choose(page, "rows", rows)
    expect(page.get_by_text("1 of 2 rows is invalid.")).to_be_visible()
    wrong = page.get_by_role("group", name="Errors").locator("tbody tr")
    expect(wrong).to_have_text(re.compile(r"seat\s*Expected 'int' >= 1"))
    expect(page.get_by_role("group", name="The first rows")).to_contain_text("-98765432109876543210")
    choose(page, "rows", rows.replace("-", ""))
    expect(page.get_by_text("All 2 rows are valid.")).to_be_visible()
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_role("table", name="Results")).to_contain_text("98765432109876543210")
    items = closed.get(f"/batch/{page.url.rpartition('/')[2]}/results?format=json")
    assert [item["inputs"]["seat"] for item in items] == [12345678901234567, 98765432109876543210]
    assert [item["result"]["result"]["seat"] for item in items] == [12345678901234567, 98765432109876543210]


def test_a_number_for_every_row_is_sent_as_it_is_typed_or_refused(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=book")
    choose(page, "rows.csv", "seat\n1\n")
    price = page.get_by_label("price (required)")
    start = page.get_by_role("button", name="Start the batch")
    price.press_sequentially("119,50")
    expect(page.locator(".field", has=price).locator(".error")).to_contain_text("“119,50” is not a number.")
    expect(start).to_be_hidden()
    price.fill("119.50")
    expect(page.locator(".field", has=price).locator(".error")).to_be_hidden()
    page.get_by_text("More options").click()
    workers = page.get_by_label("Rows in parallel")
    workers.fill("")
    workers.press_sequentially("2,5")
    start.click()
    expect(workers).to_be_focused()
    expect(page.get_by_text("“2,5” is not a whole number.")).to_be_visible()
    workers.fill("2")
    start.click()
    expect(status_of(page)).to_contain_text("completed")
    (item,) = closed.get(f"/batch/{page.url.rpartition('/')[2]}/results?format=json")
    assert item["inputs"] == {"seat": 1, "price": 119.5}


def test_values_that_the_type_of_an_input_refuses_are_reported_by_line(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=order")
    rows = [json.dumps(ORDER), json.dumps(ORDER | {"code": "none"})]
    page.get_by_label("or paste rows").fill("\n".join(rows))
    expect(page.get_by_text("1 of 2 rows is invalid.")).to_be_visible()
    wrong = page.get_by_role("group", name="Errors").locator("tbody tr")
    expect(wrong).to_have_text(re.compile(r"^\s*2\s*code.*UUID"))


def hold_full_check(page: Page) -> None:
    """Keep the check of all rows of a long file from the server. The two checks of its first rows pass."""
    checks: list[PageRoute] = []

    def hold(route: PageRoute) -> None:
        checks.append(route)
        if len(checks) != 3:
            route.continue_()

    page.route(re.compile("dry_run=true"), hold)


LONG = "n,comment\n" + "1,one\n" * 20_000


def test_a_batch_can_start_before_all_its_rows_are_checked(visit: Visit, closed: Site) -> None:
    """The server checks them too, and reports invalid rows by line."""
    visit.expected.append("status of 422")
    page = visit.page(closed, "new-batch?agent=count_up")
    hold_full_check(page)
    choose(page, "rows.csv", LONG + "zwei,two\n")
    expect(page.get_by_text("You can start before the check is complete")).to_be_visible()
    expect(page.get_by_role("group", name="The first rows").locator("tbody tr")).to_have_count(5)
    expect(page.get_by_text("Checking the rows")).to_be_visible()
    with page.expect_event("requestfailed", lambda request: "dry_run" in request.url):
        page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_text("The batch has not started:")).to_be_visible()
    wrong = page.get_by_role("group", name="Errors").locator("tbody tr")
    expect(wrong).to_have_text(re.compile(r"^\s*20002\s*n\s*Expected 'int', got 'str'"))


def test_choosing_another_file_stops_the_check_of_the_previous_one(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    hold_full_check(page)
    choose(page, "rows.csv", LONG)
    expect(page.get_by_text("Checking the rows")).to_be_visible()
    with page.expect_event("requestfailed", lambda request: "dry_run" in request.url):
        choose(page, "other.csv", "n,comment\n1,a\n2,b\n")
    expect(page.get_by_text("All 2 rows are valid.")).to_be_visible()


def test_rows_may_change_while_the_first_ones_of_the_page_are_read(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    choose(page, "rows.csv", "n,comment\n1,a\n")
    expect(page.get_by_text("The row is valid.")).to_be_visible()
    page.route(re.compile("dry_run=true"), lambda route: None, times=1)
    with page.expect_request(re.compile("dry_run=true")):
        page.reload()
    with page.expect_event("requestfailed", lambda request: "dry_run" in request.url):
        choose(page, "other.csv", "n,comment\n1,a\n2,b\n")
    expect(page.get_by_text("All 2 rows are valid.")).to_be_visible()


def test_replaced_rows_cannot_start_while_the_new_ones_are_checked(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    choose(page, "rows.csv", "n,comment\n1,a\n")
    start = page.get_by_role("button", name="Start the batch")
    expect(start).to_be_enabled()
    with page.expect_request(re.compile("dry_run=true")):
        page.route(re.compile("dry_run=true"), lambda route: None)
        choose(page, "other.csv", "n,comment\n2,b\n")
    expect(start).to_be_disabled()
    page.get_by_label("Column comment maps to").select_option("step")
    page.get_by_label("Column comment maps to").select_option("comment")
    expect(start).to_be_disabled()


@pytest.mark.parametrize("count", [30_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
def test_many_rows_are_checked_with_little_memory(count: int, visit: Visit, closed: Site, tmp_path: Path) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    session = page.context.new_cdp_session(page)

    def heap_bytes() -> int:
        session.send("HeapProfiler.collectGarbage")
        return int(session.send("Runtime.getHeapUsage")["usedSize"])

    page.get_by_text("Inputs:").wait_for()
    before = heap_bytes()
    comment = "a comment of some length, so that all rows together are longer than what may be held"
    (tmp_path / "rows.csv").write_text("n,comment\n" + f'1,"{comment}"\n' * (count - 1) + "x,a comment\n")
    page.locator("input[type=file]").set_input_files(tmp_path / "rows.csv")
    expect(page.get_by_text(f"1 of {count:,} rows is invalid.")).to_be_visible(timeout=120_000)
    expect(page.get_by_role("group", name="Errors").locator("tbody tr")).to_contain_text(str(count + 1))
    assert heap_bytes() - before < 1_000_000


def test_a_check_that_is_refused_or_cannot_be_sent_shows_the_reason(visit: Visit, closed: Site, tmp_path: Path) -> None:
    """A row is too long. A file deleted since it was chosen is not mistaken for a broken connection."""
    visit.expected += ["status of 413", "ERR_FILE_NOT_FOUND"]
    page = visit.page(closed, "new-batch?agent=count_up")
    rows = [json.dumps({"n": 1, "comment": comment}) for comment in ("one", "a" * 2**20)]
    choose(page, "rows.ndjson", "\n".join(rows))
    expect(page.get_by_text("The row in line 2 is longer than 1048576 bytes")).to_be_visible()
    expect(page.get_by_role("button", name="Start the batch")).to_be_disabled()
    file = tmp_path / "rows.csv"
    file.write_text("n,comment\n1,one\n")
    page.locator("input[type=file]").set_input_files(file)
    expect(page.get_by_text("The row is valid.")).to_be_visible()
    file.unlink()
    page.get_by_label("Column comment maps to").select_option("")
    expect(page.get_by_text("The file was changed or deleted. Choose it again.")).to_be_visible()


def test_a_missing_column_is_reported_once_next_to_the_choice(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    choose(page, "rows.csv", "id,comment\n" + "".join(f"{n},row {n}\n" for n in range(300)))
    missing = page.get_by_role("region", name="Inputs without a column")
    expect(missing.get_by_role("heading", name="There is no column for “n”")).to_be_visible()
    expect(page.get_by_role("group", name="Errors")).to_be_hidden()
    assert page.locator("main").inner_text().count("There is no column") == 1
    start = page.get_by_role("button", name="Start the batch")
    expect(start).to_be_hidden()
    missing.get_by_label("n (required)").fill("5")
    expect(page.get_by_text("All 300 rows are valid.")).to_be_visible()
    expect(missing.get_by_label("n (required)")).to_be_focused()
    missing.get_by_label("n (required)").fill("")
    expect(start).to_be_hidden()
    missing.get_by_label("Column for n").select_option("id")
    expect(page.get_by_text("All 300 rows are valid.")).to_be_visible()
    expect(page.get_by_label("Column id maps to")).to_have_value("n")
    expect(page.get_by_label("Column id maps to")).to_be_focused()
    expect(missing.get_by_role("heading")).to_be_hidden()
    expect(start).to_be_enabled()


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("rows.csv", "id,n,comment,total,Step\n0042,1,one,x,y\n0043,2,two,x,y\n"),
        (
            "rows.ndjson",
            '{"id": "0042", "n": 1, "comment": "one", "total": "x", "Step": "y"}\n'
            '{"id": "0043", "n": 2, "comment": "two", "total": "x", "Step": "y"}\n',
        ),
    ],
)
def test_a_column_that_is_not_an_input_is_kept_with_the_results(
    visit: Visit, closed: Site, name: str, rows: str
) -> None:
    """A column with the name of an input or an output can only be left out."""
    page = visit.page(closed, "new-batch?agent=count_up")
    choose(page, name, rows)
    page.get_by_label("Column Step maps to").select_option(label="(ignored)")
    for column, options in (("id", ["(kept in the results)", "(ignored)"]), ("total", ["(ignored)"])):
        select = page.get_by_label(f"Column {column} maps to")
        expect(select.locator("option:checked")).to_have_text(options[0])
        expect(select.locator("option")).to_have_text([*options, "n", "comment", "step", "gate"])
    expect(page.get_by_text("All 2 rows are valid.")).to_be_visible()
    page.get_by_role("button", name="Start the batch").click()
    expect(status_of(page)).to_contain_text("completed")
    table = page.get_by_role("table", name="Results")
    expect(table.get_by_role("columnheader").nth(2)).to_have_text("id")
    expect(table.get_by_role("row").nth(1)).to_contain_text("0042")
    items = closed.get(f"/batch/{page.url.rpartition('/')[2]}/results?format=json")
    assert [item["extra"] for item in items] == [{"id": "0042"}, {"id": "0043"}]
    assert [item["inputs"] for item in items] == [{"n": 1, "comment": "one"}, {"n": 2, "comment": "two"}]


def test_a_batch_without_rows_cannot_be_started(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=count_up")
    for name, text, words in (
        ("rows.csv", "n,comment\n", "There are no rows below the header."),
        ("rows.ndjson", "\n\n", "There are no rows."),
    ):
        choose(page, name, text)
        expect(page.get_by_role("region", name="Check").get_by_role("status")).to_have_text(f"✕ {words}")
        expect(page.get_by_role("button", name="Start the batch")).to_be_disabled()


def test_a_file_that_is_not_a_table_is_refused_with_what_to_do(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 422")
    page = visit.page(closed, "new-batch?agent=count_up")
    page.locator("input[type=file]").set_input_files(
        {"name": "rows.csv", "mimeType": "text/csv", "buffer": "n,comment\n1,caf\u00e9\n".encode("latin-1")}
    )
    expect(page.get_by_text('Save the file as "CSV UTF-8"')).to_be_visible()
    choose(page, "rows.csv", 'n,comment\n1,"open\n')
    expect(page.get_by_text("This is not valid CSV: unexpected end of data.")).to_be_visible()
    choose(page, "rows.csv", "n,comment,N\n1,a,2\n")
    expect(page.get_by_text("More than one column maps to the input 'n'.")).to_be_visible()
    expect(page.get_by_role("button", name="Start the batch")).to_be_disabled()
    page.get_by_label("Column N maps to", exact=True).select_option("")
    expect(page.get_by_text("The row is valid.")).to_be_visible()


def test_the_copied_curl_command_starts_the_same_batch(visit: Visit, closed: Site, tmp_path: Path) -> None:
    rows = "number\tcomment\n1\tit's one\n2\ttwo\n"
    (tmp_path / "my rows.tsv").write_text(rows)
    page = visit.page(closed, "new-batch?agent=count_up")
    choose(page, "my rows.tsv", rows)
    page.get_by_label("Column number maps to").select_option("n")
    page.get_by_text("Same value for every row").click()
    page.get_by_label("step").fill("5")
    expect(page.get_by_text("All 2 rows are valid.")).to_be_visible()
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_text("Command copied.")).to_be_visible()
    env = {**os.environ, "FLOCK_API_KEY": KEY}
    command = ["bash", "-c", copied(page)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    batch_id = json.loads(done.stdout)["batch_id"]
    closed.get(f"/batch/{batch_id}?wait=30")
    items = closed.get(f"/batch/{batch_id}/results?format=json")
    assert [item["inputs"] for item in items] == [
        {"step": 5, "n": 1, "comment": "it's one"},
        {"step": 5, "n": 2, "comment": "two"},
    ]


def test_a_batch_can_be_followed_downloaded_and_retried(visit: Visit, site: Site, gate: str) -> None:
    (site.folder / "mend").unlink(missing_ok=True)
    page = visit.page(site, "new-batch?agent=count_up")
    choose(page, "rows.csv", "n,comment\n" + "".join(f"{n},row {n}\n" for n in range(300)))
    expect(page.get_by_text("All 300 rows are valid.")).to_be_visible()
    page.get_by_text("Same value for every row").click()
    page.get_by_label("gate").fill(gate)
    page.get_by_role("button", name="Start the batch").click()
    bar, facts, outcomes = page.get_by_role("progressbar"), page.locator(".facts"), page.locator(".outcomes")
    expect(bar).to_have_attribute("aria-valuenow", "50")
    expect(outcomes).to_contain_text("5 failed")
    expect(facts).to_contain_text(re.compile(r"Rate\s*[\d,.]+ rows per second"))
    expect(facts).to_contain_text(re.compile(r"Time left\s*about"))
    table = page.get_by_role("table", name="Results")
    expect(table).to_contain_text("ROW 3")
    site.open_gate(gate)
    expect(status_of(page)).to_contain_text("completed")
    expect(outcomes).to_contain_text("30 failed")
    expect(page.get_by_role("img")).to_have_accessible_name("Durations")
    expect(
        page.get_by_text(re.compile(r"^Half of the 200 rows measured took up to .*\. The longest took "))
    ).to_be_visible()

    page.get_by_label("Show").select_option("failed")
    expect(table).to_have_attribute("aria-rowcount", "31")
    expect(table.get_by_role("row").nth(2)).to_contain_text("17 is not a number that I like.")
    page.reload()
    expect(table).to_have_attribute("aria-rowcount", "31")
    page.get_by_label("Show").select_option("")
    for label in ("csv", "csv with 0,5", "tsv", "xlsx", "parquet", "json", "ndjson"):
        kind = label.split()[0]
        page.get_by_label("Format", exact=True).select_option(label=label)
        with page.expect_download() as download:
            page.get_by_role("button", name="Download", exact=True).click()
        assert download.value.suggested_filename.endswith(f".{kind}")
        assert rows_of(kind, download.value.path()) == 300
        assert download.value.path().read_bytes().startswith(b"\xef\xbb\xbf") == (label != kind)
    site.open_gate("mend")
    page.get_by_role("button", name="Retry failed rows").click()
    expect(outcomes).to_contain_text("300 completed")
    expect(outcomes).not_to_contain_text("failed")
    expect(status_of(page)).to_contain_text("completed")
    expect(table).not_to_contain_text("failed")
    table.get_by_role("link", name="8", exact=True).click()
    expect(page.get_by_role("group", name="Result")).to_contain_text("ROW 7")
    page.get_by_role("link", name="row 8").click()
    expect(table.get_by_role("link", name="8", exact=True)).to_be_visible()


def test_the_bar_of_a_batch_has_a_segment_for_each_outcome(visit: Visit, closed: Site, gate: str) -> None:
    (closed.folder / "mend").unlink(missing_ok=True)
    batch_id = closed.batch(60, wait=False, static_inputs={"gate": gate})
    page = visit.page(closed, f"batch/{batch_id}")
    bar = page.get_by_role("progressbar")
    expect(bar).to_have_attribute("aria-valuetext", "60 rows: 45 completed, 5 failed, 10 remaining")
    expect(bar).to_have_attribute("aria-valuenow", "50")
    expect(page.locator(".outcomes")).to_have_text("50 of 60 rows (83.33 %)✓ 45 completed✕ 5 failed○ 10 remaining")
    page.get_by_role("button", name="Cancel").click()
    words = "60 rows: 45 completed, 5 failed, 10 cancelled"
    expect(bar).to_have_attribute("aria-valuetext", words)
    expect(page.locator(".outcomes")).to_have_text("60 rows✓ 45 completed✕ 5 failed⊘ 10 cancelled")
    parts = bar.locator("> span").evaluate_all(
        "parts => parts.map((part) => [part.className, part.offsetWidth / part.parentElement.clientWidth])"
    )
    assert [name for name, _ in parts] == ["completed", "failed", "cancelled"]
    assert [width for _, width in parts] == pytest.approx([45 / 60, 5 / 60, 10 / 60], abs=0.01)
    page.goto(f"{closed.url}/ui#/batches")
    expect(page.locator("tbody tr").first.get_by_role("progressbar")).to_have_attribute("aria-valuetext", words)


def test_a_short_batch_has_no_chart_and_no_control_to_go_to_a_row(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, f"batch/{closed.batch(2)}")
    table = page.get_by_role("table", name="Results")
    expect(table).to_contain_text("ROW 1")
    expect(page.get_by_role("status").filter(has_text="The batch completed")).to_be_attached()
    expect(page.get_by_role("img")).to_have_count(0)
    expect(page.get_by_label("Go to row")).to_have_count(0)
    height = table.bounding_box()
    assert height is not None
    assert height["height"] < 4 * 40


def test_a_file_of_german_excel_is_tried_and_then_resumed(visit: Visit, closed: Site) -> None:
    """Decimal commas and the encoding are chosen, and the rest of the rows is run by outcome."""
    visit.expected.append("status of 422")
    page = visit.page(closed, "new-batch?agent=book")
    rows = "seat;price;Ort\n" + "".join(f"{n};{n},5;Köln\n" for n in range(1, 31))
    file = {"name": "rows.csv", "mimeType": "text/csv", "buffer": rows.encode("cp1252")}
    page.locator("input[type=file]").set_input_files(file)  # type: ignore[arg-type]
    expect(page.get_by_text("This is not UTF-8")).to_be_visible()
    page.get_by_text("Numbers and encoding of CSV").click()
    page.get_by_label("Encoding of a file").select_option("windows-1252")
    expect(page.get_by_role("group", name="The first rows")).to_contain_text("Köln")
    page.get_by_label("Decimals").select_option(",")
    expect(page.get_by_text("All 30 rows are valid.")).to_be_visible()
    page.get_by_text("More options").click()
    page.get_by_label("Random rows", exact=True).fill("0")
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_text("It must be at least 1.")).to_be_visible()
    page.get_by_label("Random rows", exact=True).fill("3")
    page.get_by_label("Max seconds for a row").fill("20")
    page.get_by_role("button", name="Start the batch").click()
    expect(page.locator(".outcomes")).to_have_text("30 rows✓ 3 completed⊘ 27 cancelled")
    expect(status_of(page)).to_contain_text("completed")
    expect(page.get_by_text("27 of 30 items were not chosen")).to_be_visible()
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".outcomes")).to_have_text("30 rows✓ 30 completed")
    items = closed.get(f"/batch/{page.url.partition('batch/')[2]}/results?format=json")
    assert [(item["inputs"]["price"], item["extra"]) for item in items] == [
        (n + 0.5, {"Ort": "Köln"}) for n in range(1, 31)
    ]


def test_the_options_of_a_batch_reach_the_server(visit: Visit, closed: Site) -> None:
    """Those that are not chosen are not sent. An empty cell is a missing input, and Control+Enter starts the batch."""
    page = visit.page(closed, "new-batch?agent=book")
    choose(page, "rows.csv", "seat;price;at\n1;0,5;\n2;1,5;2026-07-01T09:30:00Z\nzwei;1;\n")
    page.get_by_text("Numbers and encoding of CSV").click()
    page.get_by_label("Encoding of a file").select_option("iso-8859-15")
    page.get_by_label("Decimals").select_option(",")
    expect(page.get_by_text("1 of 3 rows is invalid.")).to_be_visible()
    page.get_by_label("Invalid rows").select_option("skip")
    page.get_by_text("More options").click()
    options = {"Rows in parallel": "2", "First rows": "3", "Random rows": "3", "Seed of random rows": "4"}
    limits = {"Max cost in US dollars": "0.75", "Max seconds for a row": "20.5", "Max failed rows": "0.5"}
    for label, value in (options | limits).items():
        page.get_by_label(label, exact=True).fill(value)
        page.keyboard.press("Enter")  # starts nothing: the form has several lines
    page.get_by_label("Run equal rows once").select_option("yes")
    page.get_by_label("Take results of earlier batches").select_option("yes")
    with page.expect_request(lambda request: request.method == "POST" and "dry_run" not in request.url) as started:
        page.keyboard.press("Control+Enter")
    assert dict(httpx.URL(started.value.url).params) == {
        "agent_name": "book",
        "on_invalid": "skip",
        "on_extra": "keep",
        "delimiter": ";",
        "decimal": ",",
        "encoding": "iso-8859-15",
        "max_workers": "2",
        "limit": "3",
        "sample": "3",
        "seed": "4",
        "max_cost": "0.75",
        "timeout_s": "20.5",
        "max_failures": "0.5",
        "dedupe": "true",
        "reuse": "true",
    }
    expect(page.locator(".outcomes")).to_have_text("3 rows✓ 2 completed✕ 1 failed")
    items = closed.get(f"/batch/{page.url.partition('batch/')[2]}/results?format=json")
    inputs = {"seat": 2, "price": 1.5, "at": "2026-07-01T09:30:00Z"}
    assert [item["inputs"] for item in items[:2]] == [{"seat": 1, "price": 0.5}, inputs]


def test_twenty_random_rows_are_tried_first(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "new-batch?agent=book")
    attempt = page.get_by_role("button", name="Try 20 rows first")
    choose(page, "rows.csv", "[id],seat,price\n")  # no JSON
    expect(page.get_by_text("There are no rows below the header.")).to_be_visible()
    expect(attempt).to_be_disabled()
    choose(page, "rows.csv", "seat,price\n" + "1,2\n" * 50)
    expect(page.get_by_text("All 50 rows are valid.")).to_be_visible()
    held = list[PageRoute]()
    page.route(lambda url: "/run/batch?" in url and "dry_run" not in url, lambda route: held.append(route))
    with page.expect_request(lambda request: "dry_run" not in request.url and request.method == "POST"):
        attempt.click()
    expect(page.get_by_role("button", name="Start the batch")).to_be_disabled()  # it would start the rows again
    while not held:
        page.wait_for_timeout(20)
    held[0].continue_()
    expect(page.locator(".outcomes")).to_have_text("50 rows✓ 20 completed⊘ 30 cancelled")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".outcomes")).to_have_text("50 rows✓ 50 completed")


def test_options_of_the_last_batch_are_seen_or_gone(visit: Visit, closed: Site) -> None:
    """A wrong one is seen too, and has the focus."""
    page = visit.page(closed, "new-batch?agent=book")
    options = {name: page.locator("details", has_text=name) for name in ("Numbers and encoding", "More options")}
    choose(page, "rows.csv", "seat;price\n1;0,5\n")
    options["Numbers and encoding"].locator("summary").click()
    page.get_by_label("Decimals").select_option(",")
    options["More options"].locator("summary").click()
    sample = page.get_by_label("Random rows", exact=True)
    sample.fill("x")
    options["More options"].locator("summary").click()
    page.get_by_role("button", name="Start the batch").click()
    expect(sample).to_be_focused()
    sample.fill("1")
    sample.blur()
    page.reload()
    expect(options["More options"]).to_have_attribute("open", "")
    expect(sample).to_have_value("1")
    expect(page.get_by_label("Decimals")).to_be_visible()
    choose(page, "rows.csv", "seat;price\n1;0,5\n")
    page.get_by_role("button", name="Start the batch").click()
    expect(status_of(page)).to_contain_text("completed")
    page.goto(f"{closed.url}/ui#/new-batch?agent=book")
    choose(page, "rows.csv", "seat;price\n1;0,5\n")
    expect(options["Numbers and encoding"]).to_have_attribute("open", "")
    expect(options["More options"]).not_to_have_attribute("open", "")
    expect(sample).to_have_value("")


def test_a_batch_can_be_cancelled_and_resumed(visit: Visit, closed: Site, gate: str) -> None:
    (closed.folder / "mend").unlink(missing_ok=True)
    page = visit.page(closed, f"batch/{closed.batch(60, wait=False, static_inputs={'gate': gate})}")
    expect(page.locator(".outcomes")).to_contain_text("5 failed")
    page.get_by_role("button", name="Cancel").click()
    expect(status_of(page)).to_contain_text("cancelled")
    page.goto(f"{closed.url}/ui#/batches")
    expect(page.locator("tbody tr").first).to_contain_text("cancelled")
    page.locator("tbody tr").first.get_by_role("link").click()
    closed.open_gate(gate)
    expect(page.get_by_role("button", name="Resume all")).to_be_visible()
    page.get_by_role("button", name="Resume cancelled rows").click()
    expect(page.locator(".outcomes")).to_have_text("60 rows✓ 54 completed✕ 6 failed")


def test_a_batch_that_has_spent_its_limit_is_resumed_with_a_new_one(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 422")
    rows = [{"text": f"row {number}"} for number in range(5)]
    limited: Any = {"agent_name": "text_analyzer", "batch_inputs": rows, "max_workers": 1, "max_cost": 0.0001}
    batch_id = closed.batch(0, **limited)
    page = visit.page(closed, f"batch/{batch_id}")
    outcomes, limit = page.locator(".outcomes"), page.get_by_label("Max cost in US dollars")
    resume, error = page.get_by_role("button", name="Resume"), page.locator(".field .error")
    expect(outcomes).to_have_text(re.compile(r"5 rows✓ [1-4] completed⊘ [1-4] cancelled"))
    expect(limit).to_have_value("0.0001")
    resume.click()
    expect(error).to_contain_text("Retry it with a higher max_cost.")
    expect(limit).to_be_focused()
    limit.fill("1,5")
    resume.click()
    expect(error).to_contain_text("is not a number")
    expect(limit).to_have_attribute("aria-invalid", "true")
    limit.fill("1.5")
    resume.click()
    expect(outcomes).to_have_text("5 rows✓ 5 completed")
    expect(limit).to_have_count(0)
    assert closed.get(f"/batch/{batch_id}?results=false")["max_cost"] == 1.5


def test_a_table_of_thousands_of_rows_loads_only_the_pages_it_shows(visit: Visit, closed: Site) -> None:
    batch_id = closed.batch(2000)
    page = visit.page(closed, f"batch/{batch_id}")
    table = page.get_by_role("table", name="Results")
    expect(table.get_by_role("link", name="1", exact=True)).to_be_visible()
    expect(page.get_by_role("img")).to_be_visible()  # the chart, which comes last
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url) if "/results?" in request.url else None)
    table.press("End")
    last = table.get_by_role("row").last
    expect(last).to_contain_text("ROW 1999")
    expect(last).to_have_attribute("aria-rowindex", "2001")
    assert len(requested) <= 2
    assert table.get_by_role("row").count() < 40
    table.press("PageUp")
    table.press("ArrowUp")
    page.get_by_label("Go to row").fill("1210")
    page.get_by_role("button", name="Go", exact=True).click()
    expect(table.get_by_role("row").nth(1)).to_contain_text("ROW 1209")
    page.wait_for_url("**row=1210*")
    page.add_init_script("requestAnimationFrame = (draw) => setTimeout(draw, 500)")  # as in a hidden tab
    page.reload()
    expect(table.get_by_role("row").nth(1)).to_contain_text("ROW 1209")
    expect(table.get_by_role("row").nth(1)).to_be_in_viewport()
    table.evaluate("table => table.scrollTop = table.scrollHeight")
    expect(table.get_by_role("row").last).to_contain_text("ROW 1999")


def test_every_row_in_a_table_of_a_million_can_be_reached(visit: Visit, closed: Site) -> None:
    """Fake the answers of the server, because running a batch of a million rows would take minutes."""
    million, batch_id = 1_000_000, closed.batch(1)
    context = visit.context(closed)

    def answer(route: Any, request: Request) -> None:
        url = httpx.URL(request.url)
        if url.path.endswith("/results"):
            after, limit = int(url.params.get("after", -1)), int(url.params["limit"])
            (item,) = closed.get(f"/batch/{batch_id}/results?format=json")
            positions = range(after + 1, min(million, after + 1 + limit))
            route.fulfill(json=[item | {"position": n, "inputs": {"n": n, "comment": f"row {n}"}} for n in positions])
        else:
            whole = closed.get(f"/batch/{batch_id}?results=false")
            route.fulfill(json=whole | {"total_items": million, "completed_items": million})

    context.route(f"**/batch/{batch_id}**", answer)
    page = visit.page(closed, f"batch/{batch_id}", context)
    table = page.get_by_role("table", name="Results")
    rows = table.get_by_role("row")
    expect(rows.nth(1)).to_contain_text("row 0")
    table.press("End")
    expect(rows.last).to_contain_text("row 999999")
    table.press("ArrowUp")
    expect(rows.filter(has_text="row 999998")).to_be_visible()
    table.press("Home")
    expect(rows.nth(1)).to_contain_text("row 0")
    table.press("ArrowDown")
    expect(rows.nth(1)).to_contain_text("row 1")
    table.hover()
    page.mouse.wheel(0, 72)
    expect(rows.nth(1)).to_contain_text("row 3")
    table.evaluate("table => table.scrollTop = table.scrollHeight")
    expect(rows.last).to_contain_text("row 999999")
    page.get_by_label("Go to row").fill("654321")
    page.get_by_role("button", name="Go", exact=True).click()
    expect(rows.nth(1)).to_contain_text("row 654320")
    assert rows.count() < 40


# Navigation

#: Delays the event for a new address until the test releases it, like a busy browser.
LATE_ADDRESS = """
    const add = window.addEventListener;
    window.addEventListener = (name, listener, ...options) => add.call(window, name, name === "hashchange"
        ? (event) => { window.tellAddress = () => listener(event); }
        : listener, ...options);
"""
#: Keeps answers from being aborted, as if they had already arrived. If `isHeld` is set, they wait for `release()`.
LATE_ANSWERS = """
    const hold = () => new Promise((done) => { window.release = done; console.debug("held"); });
    const [fetchNow, openNow] = [fetch, IDBFactory.prototype.open];
    window.fetch = async (address, { signal, ...options } = {}) => {
        const answer = await fetchNow(address, options);
        if (window.isHeld === "fetch") await hold();
        return answer;
    };
    IDBFactory.prototype.open = function (...options) {
        if (window.isHeld !== "storage") return openNow.apply(this, options);
        const opening = {};
        hold().then(() => opening.onerror());
        return opening;
    };
"""


def test_a_link_is_followed_while_the_old_view_writes_its_address(visit: Visit, closed: Site) -> None:
    """A table writes its first row to the address after 400 ms, and the event for the new address comes even later."""
    context = visit.context(closed)
    context.add_init_script(LATE_ADDRESS)
    page = visit.page(closed, f"batch/{closed.batch(300)}", context)
    table = page.get_by_role("table", name="Results")
    expect(table).to_contain_text("ROW 3")
    table.evaluate(
        """table => {
            table.dispatchEvent(new KeyboardEvent("keydown", {key: "End"}));
            document.querySelector('nav a[href="#/batches"]').click();
            return new Promise((done) => setTimeout(done, 500));
        }"""
    )
    page.evaluate("tellAddress()")
    expect(page.get_by_role("heading", name="Batches")).to_be_focused()
    expect(page).to_have_url(re.compile("#/batches$"))


@pytest.mark.parametrize(
    ("view", "what"),
    [
        *(
            (view, "fetch")
            for view in ("agents", "agent/order", "chat/chat", "run", "runs", "batch", "batches", "new-batch")
        ),
        ("new-batch", "storage"),
    ],
)
def test_a_view_left_while_it_loads_has_no_later_effect(visit: Visit, closed: Site, view: str, what: str) -> None:
    ids = {"run": closed.run("defaults", name="x"), "batch": closed.batch(2)}
    context = visit.context(closed)
    context.add_init_script(LATE_ANSWERS)
    page = visit.page(closed, "agent/quote", context)
    page.get_by_role("heading", name="quote").wait_for()
    path = f"#/{view}{'/' + ids[view] if view in ids else ''}"
    with page.expect_console_message(lambda message: message.text == "held"):
        page.evaluate("([what, path]) => { window.isHeld = what; location.hash = path; }", [what, path])
    page.evaluate("() => { window.isHeld = null; location.hash = '#/agent/deliver'; }")
    heading = page.get_by_role("heading", level=1)
    expect(heading).to_have_text("deliver")
    page.get_by_label("parcel (required)").focus()
    page.evaluate("async () => { release(); await fetch('healthz'); }")
    expect(heading).to_have_text("deliver")
    expect(page).to_have_title("deliver · Sample agents")
    expect(page.get_by_label("parcel (required)")).to_be_focused()
    expect(page).to_have_url(re.compile("#/agent/deliver$"))


# Keys


def test_the_key_is_requested_once_and_a_wrong_key_is_reported(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 401")
    page = visit.page(closed, "new-batch", has_key=False)
    dialog = page.get_by_role("dialog", name="This server needs a key")
    key = dialog.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("wrong, with what no header can hold ☂")
    key.press("Enter")
    expect(dialog).to_contain_text("The server does not know this key.")
    key.fill(KEY)
    key.press("Enter")
    expect(page.get_by_role("heading", name="New batch")).to_be_visible()
    expect(dialog).to_be_hidden()
    page.reload()
    expect(page.get_by_role("heading", name="New batch")).to_be_visible()
    expect(dialog).to_be_hidden()
    assert page.evaluate(f"sessionStorage.getItem('flock:{closed.prefix}/:key')") == KEY
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + location.href + document.cookie")
    page.get_by_role("button", name="Remove key").click()
    expect(dialog).to_be_visible()


STORED_NAMES = """async () => [
    ...Object.keys(sessionStorage), ...Object.keys(localStorage),
    ...(await indexedDB.databases()).map((each) => each.name),
]"""


#: ``wait_for_function`` needs ``eval`` to poll, which the content security policy of the page forbids.
UNTIL_FILE_IS_STORED = """() => new Promise((done) => {
    const isStored = () => Object.keys(sessionStorage).some((name) => name.endsWith("batch file"));
    const look = () => (isStored() ? done() : setTimeout(look, 20));
    look();
})"""


def test_forgetting_the_key_leaves_nothing_in_the_browser(visit: Visit, closed: Site) -> None:
    """Drafts, chosen rows and unfinished input are deleted. Data of other apps stays."""
    visit.expected.append("status of 401")
    page = visit.page(closed, "agent/count_up", has_key=False)
    dialog = page.get_by_role("dialog", name="This server needs a key")
    dialog.get_by_label("API key").fill(KEY)
    dialog.get_by_label("API key").press("Enter")
    page.get_by_label("n (required)").fill("7")
    page.get_by_label("Theme").select_option("dark")
    page.evaluate("localStorage.setItem('flock:/elsewhere/:theme', 'light')")
    page.goto(f"{closed.url}/ui#/new-batch?agent=count_up")
    choose(page, "rows.csv", "n\n1\n")
    page.evaluate(UNTIL_FILE_IS_STORED)
    stored = " ".join(page.evaluate(STORED_NAMES))
    for name in ("key", "draft count_up", "batch file", "theme", f"flock:{closed.prefix}/"):
        assert name in stored
    page.get_by_label("or paste rows").fill("n\n2\n")
    with page.expect_event("load"):  # a request of the old page without a key may open the dialog before the reload
        page.get_by_role("button", name="Remove key").click()
    expect(dialog).to_be_visible()
    assert page.evaluate(STORED_NAMES) == ["flock:/elsewhere/:theme"]


# All views

VIEWS = (
    "agents",
    "agent/order",
    "agent/sort",
    "run/{failed}",
    "run/{calls}",
    "run/{approval}",
    "runs",
    "waiting",
    "new-batch?agent=count_up",
    "new-batch?agent=book",
    "batch/{batch}",
    "batches",
)


def walk(page: Page, site: Site, ids: dict[str, str]) -> Iterator[str]:
    """Show each view in turn, with some content."""
    for view in VIEWS:
        page.goto(f"{site.url}/ui#/{view.format(**ids)}")
        page.locator("main:not([aria-busy]) h1").wait_for()
        if view.startswith("new-batch"):
            choose(page, "rows.csv", "n,comment\n1,one\nzwei,two\n")
            problem = "1 of 2 rows is invalid." if "count_up" in view else "There is no column for “seat”, “price”"
            page.get_by_text(problem).wait_for()
        if view == "run/{calls}":
            page.locator(".calls summary").first.click()
        if view == "run/{approval}":
            page.get_by_role("button", name="Edit").click()
        if view == "waiting":
            page.get_by_role("link", name="May cashier call pay_back?").first.wait_for()
        if view == "batch/{batch}":
            page.get_by_role("img").wait_for()
            page.get_by_role("table", name="Results").get_by_role("link").first.wait_for()
        yield view


@pytest.mark.parametrize(
    ("theme", "width"),
    [
        ("light", 360),
        ("dark", 1200),
        pytest.param("light", 1200, marks=pytest.mark.nightly),
        pytest.param("dark", 360, marks=pytest.mark.nightly),
    ],
)
def test_axe_finds_no_violation_and_narrow_screens_do_not_scroll_sideways(
    visit: Visit, closed: Site, theme: str, width: int
) -> None:
    """A wide screen uses the theme of the system, and a narrow one the switch of the page."""
    (closed.folder / "mend").unlink(missing_ok=True)
    ids = {
        "failed": closed.run("deliver", parcel="cake", gate="never"),
        "calls": closed.run("trip", place="Rome"),
        "approval": closed.run("cashier", complaint="cold soup"),
        "batch": closed.batch(20),
    }
    scheme = theme if width > 400 else "light" if theme == "dark" else "dark"
    page = visit.page(closed, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.get_by_label("Theme").select_option("" if width > 400 else theme)
    for view in walk(page, closed, ids):
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(22, 24, 27)") is (theme == "dark")
        report = Axe().run(page)
        assert report.violations_count == 0, f"{view}: {report.generate_report()}"
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width, view


def test_a_phone_shows_the_outcome_of_a_batch_and_a_wide_screen_is_used(visit: Visit, closed: Site) -> None:
    (closed.folder / "mend").unlink(missing_ok=True)
    batch_id = closed.batch(20)
    page = visit.page(closed, f"batch/{batch_id}", viewport={"width": 390, "height": 844})

    def boxes(target: Locator) -> list[Any]:
        expect(target.last).to_be_visible()
        found: list[Any] = target.evaluate_all("all => all.map((each) => each.getBoundingClientRect().toJSON())")
        return found

    for view in (f"batch/{batch_id}", "batches"):
        page.goto(f"{closed.url}/ui#/{view}")
        row = page.locator("main") if view != "batches" else page.get_by_role("row").filter(has_text=batch_id[-12:])
        outcomes = row.locator(".outcome")
        expect(outcomes).to_have_text(["✓ 18 completed", "✕ 2 failed"])
        for box in boxes(outcomes):
            assert box["left"] >= 0, view
            assert box["right"] <= 390, view
            assert box["bottom"] <= 844, view
    page.set_viewport_size({"width": 1600, "height": 900})
    (box,) = boxes(page.get_by_role("group", name="Table of batches"))
    assert box["width"] > 1400
    page.goto(f"{closed.url}/ui#/batch/{batch_id}")
    (box,) = boxes(page.get_by_role("table", name="Results"))
    assert box["width"] > 1400
    page.goto(f"{closed.url}/ui#/agent/book")
    assert all(box["width"] < 1200 for box in boxes(page.get_by_role("textbox")))


def test_a_run_can_be_started_with_the_keyboard_alone(visit: Visit, site: Site) -> None:
    page = visit.page(site)
    page.get_by_role("heading", name="Agents").wait_for()
    focused = page.locator(":focus")

    def tab_to(target: Locator) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                outline = focused.evaluate("element => getComputedStyle(element).outlineStyle")
                assert outline != "none", "the focus is not visible"
                return
        raise AssertionError(f"Tab never reaches {target}")

    page.keyboard.press("Tab")
    expect(focused).to_have_text("Skip to the content")
    page.keyboard.press("Enter")
    tab_to(page.get_by_role("link", name="Run text_analyzer"))
    page.keyboard.press("Enter")
    tab_to(page.get_by_label("text (required)"))
    page.keyboard.type("I love this coffee.")
    tab_to(page.get_by_role("button", name="Run", exact=True))
    page.keyboard.press("Enter")
    expect(status_of(page)).to_contain_text("completed")
    expect(page.get_by_role("group", name="Result")).to_contain_text("positive")
    expect(page.get_by_role("status").filter(has_text="The run completed.")).to_be_attached()


def test_reduced_motion_turns_animations_off(visit: Visit, closed: Site, gate: str) -> None:
    run_id = closed.start("research", topic="tea", gate=gate)
    for motion, animations in (("reduce", 0), ("no-preference", 1)):
        page = visit.page(closed, f"run/{run_id}", reduced_motion=motion)
        expect(status_of(page)).to_contain_text("running")
        named = "document.getAnimations().filter((each) => each.animationName).length"  # transitions have none
        assert page.evaluate(named) == animations
    closed.open_gate(gate)
    closed.open_gate(f"{gate}-2")


def test_a_reload_loses_nothing(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/order")
    page.get_by_label("Theme").select_option("light")
    fill_order(page)
    page.reload()
    expect(page.get_by_label("item (required)")).to_have_value("tea")
    expect(page.get_by_label("size (required)")).to_have_value("1")  # large
    expect(page.get_by_label("gift")).to_be_checked()
    expect(page.get_by_role("textbox", name="notes 1")).to_have_value('It\'s "fragile"')
    expect(page.get_by_label("Theme")).to_have_value("light")
    page.goto(f"{closed.url}/ui#/new-batch?agent=count_up")
    choose(page, "my rows.csv", "number,comment,step\n1,one,2\n")
    page.get_by_label("Column number maps to").select_option("n")
    page.get_by_label("Column step maps to").select_option("")
    page.get_by_text("More options").click()
    page.get_by_label("Rows in parallel").fill("7")
    page.get_by_label("Rows in parallel").blur()
    expect(page.get_by_text("The row is valid.")).to_be_visible()
    page.reload()
    expect(page.get_by_text("The row is valid.")).to_be_visible()
    expect(page.get_by_text("Selected: my rows.csv")).to_be_visible()
    expect(page.get_by_label("Column step maps to")).to_have_value("")
    expect(page.get_by_label("Rows in parallel")).to_have_value("7")


def test_a_deleted_run_or_batch_is_reported_as_gone(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 404")
    run_id, batch_id = closed.run("defaults", name="x"), closed.batch(2)
    page = visit.page(closed, f"run/{run_id}")
    expect(status_of(page)).to_contain_text("completed")
    closed.delete(f"/run/{run_id}")
    closed.delete(f"/batch/{batch_id}")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("This no longer exists")
    page.goto(f"{closed.url}/ui#/batch/{batch_id}")
    expect(page.get_by_role("alert")).to_contain_text(batch_id)
    expect(page.get_by_role("alert")).to_contain_text("It was deleted, or the link is incomplete")


def test_the_page_reports_an_unreachable_server_and_recovers_by_itself(visit: Visit, tmp_path: Path, gate: str) -> None:
    """The server is killed while pages show a run, a list and a form that is sent. Then it is restarted."""
    visit.expected += [
        "ERR_CONNECTION_REFUSED",
        "ERR_CONNECTION_RESET",
        "ERR_INCOMPLETE_CHUNKED_ENCODING",
        "status of 503",
    ]
    visit.expected += ["ERR_EMPTY_RESPONSE", "ERR_SOCKET_NOT_CONNECTED", "ERR_CONTENT_LENGTH_MISMATCH"]
    port = free_port()
    with served_by(tmp_path, "/ai", KEY, port) as server:
        site = Site(tmp_path, f"{server.url}/ai", "/ai", KEY)
        run_id = site.start("research", topic="tea", gate=gate)
        context = visit.context(site)
        run, runs, agent = (visit.page(site, path, context) for path in (f"run/{run_id}", "runs", "agent/defaults"))
        expect(run.get_by_text("pages: 1 of 3")).to_be_visible()
        expect(runs.locator("tbody tr")).to_have_count(1)
        agent.get_by_label("name (required)").fill("later")
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        agent.get_by_role("button", name="Run", exact=True).click()
        for page in (run, runs, agent):
            expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        expect(runs.locator("tbody tr")).to_have_count(1)
    site.open_gate(gate)
    site.open_gate(f"{gate}-2")
    with served_by(tmp_path, "/ai", KEY, port):
        expect(status_of(run)).to_contain_text("completed")
        expect(agent.get_by_role("group", name="Result")).to_contain_text("later")
        expect(runs.locator("tbody tr")).to_have_count(2)
        for page in (run, runs, agent):
            expect(page.locator("#unavailable")).to_be_hidden()


def test_the_first_paint_needs_five_requests_and_15_kb(visit: Visit, site: Site) -> None:
    context = visit.context(site)
    page = context.new_page()
    answers: list[Response] = []
    page.on("response", lambda answer: answers.append(answer))
    page.goto(f"{site.url}/ui")
    page.get_by_role("heading", name="Agents").wait_for()
    page.wait_for_load_state("networkidle")
    assert len(answers) <= 5, [answer.url for answer in answers]
    sizes = [answer.request.sizes() for answer in answers]
    received = sum(size["responseBodySize"] + size["responseHeadersSize"] for size in sizes)
    assert received < 15_000, received
    assert "five requests and 15 KB" in (ROOT / "docs" / "web-page.md").read_text("utf-8")
    assert all(answer.header_value("content-encoding") == "gzip" for answer in answers[:3])  # the files of the page
    assert sum(len(file.gzipped) for file in ui_files("").values()) < 50_000  # all views together

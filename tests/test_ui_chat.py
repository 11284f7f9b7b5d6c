"""The chat of the web page: turns, their streams, calls and questions, and what a crash or a reload leaves of them."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Route, expect

from tests.support.servers import free_port
from tests.support.site import KEY, Site, Visit, served_by
from tests.test_ui_runs import Stream

pytest_plugins = "tests.support.site"  # for its fixtures


def box_of(page: Page, agent: str = "chat") -> Locator:
    return page.get_by_label(f"Message to {agent}")


def turns_of(page: Page) -> Locator:
    return page.get_by_role("list", name="Conversation").locator("> li")


def reply_of(turn: Locator) -> Locator:
    """What an agent has written so far, or the outcome."""
    return turn.locator("> .answer").locator("> .output td, > .reply").filter(visible=True, has_text=re.compile("."))


def say(page: Page, text: str, agent: str = "chat") -> Locator:
    """Send a message, and return its turn when it was accepted."""
    count = turns_of(page).count()
    box_of(page, agent).fill(text)
    box_of(page, agent).press("Enter")
    turn = turns_of(page).nth(count)
    expect(turn.locator("> .said")).to_have_text(f"You: {text}")
    expect(box_of(page, agent)).to_have_value("")
    return turn


def session_of(page: Page) -> str:
    return page.url.rpartition("/")[2]


def runs_of(site: Site, session_id: str) -> Any:
    return site.get(f"/runs?session_id={session_id}&include=inputs,result")["runs"]


def start(site: Site, session_id: str, text: str) -> str:
    body = {"agent_name": "chat", "inputs": {"message": text}, "async_run": True, "session_id": session_id}
    sent = httpx.post(f"{site.url}/run/flock", json=body, headers=site.headers).raise_for_status()
    return str(sent.json()["run_id"])


# Turns


def test_the_turns_of_a_conversation_come_from_the_server_with_their_cost(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/chat")
    page.get_by_role("link", name="Chat", exact=True).click()
    expect(page.get_by_role("heading", name="Chat with chat")).to_be_visible()
    expect(box_of(page)).to_be_focused()
    expect(reply_of(say(page, "Hello"))).to_have_text("Message 1 was: Hello")
    expect(reply_of(say(page, "And now?"))).to_have_text("Message 2 was: And now?")  # the model sees both
    expect(page.get_by_role("navigation").get_by_role("link", name="Agents")).to_have_attribute("aria-current", "page")
    other = visit.page(closed, f"chat/chat/{session_of(page)}")  # another browser
    for shown in (page, other):
        expect(turns_of(shown)).to_have_count(2)
        expect(reply_of(turns_of(shown).first)).to_have_text("Message 1 was: Hello")
        expect(turns_of(shown).first.locator("> .answer > .facts")).to_contain_text("Tokens10 in, 5 outCost$0.000075")
        expect(shown.locator(".view > .facts")).to_have_text("Turns2Tokens20 in, 10 outCost$0.00015")
    other.get_by_role("link", name="New conversation").click()
    expect(turns_of(other)).to_have_count(0)
    other.get_by_role("link", name="And now?").first.click()
    expect(turns_of(other)).to_have_count(2)
    assert session_of(other) == session_of(page)
    other.get_by_role("link", name="Form").click()
    expect(other.get_by_role("heading", name="chat", exact=True)).to_be_focused()


def test_a_long_conversation_is_loaded_in_pages_and_grows_when_others_write(visit: Visit, closed: Site) -> None:
    session_id = "kept/in?order"
    for number in range(12):
        run_id = start(closed, session_id, f"Number {number}")
    closed.get(f"/run/{run_id}?wait=30")
    page = visit.page(closed, f"chat/chat/{quote(session_id, safe='')}")
    expect(turns_of(page)).to_have_count(10)
    page.get_by_role("button", name="Earlier turns").click()
    expect(turns_of(page).locator("> .said")).to_have_text([f"You: Number {number}" for number in range(12)])
    expect(page.get_by_role("button", name="Earlier turns")).to_have_count(0)
    start(closed, session_id, "From elsewhere")
    expect(reply_of(turns_of(page).nth(12))).to_have_text("Message 13 was: From elsewhere")


def test_an_agent_whose_input_is_a_conversation_gets_all_messages_and_its_other_inputs(
    visit: Visit, closed: Site, gate: str
) -> None:
    page = visit.page(closed, "chat/talk")
    page.get_by_text("More inputs").click()
    page.get_by_label("tone").select_option("polite")
    stop = page.get_by_role("button", name="Stop")
    expect(reply_of(say(page, "One", "talk"))).to_contain_text("Message 2 was: One")  # the other inputs come first
    expect(stop).to_be_hidden()
    failed = say(page, f"slow {gate}", "talk")
    expect(reply_of(failed)).to_have_text("Once upon ")
    box_of(page, "talk").fill("Two")
    box_of(page, "talk").press("Enter")
    expect(page.get_by_text("Wait for the answer, or stop it.")).to_be_visible()
    stop.click()
    expect(failed).to_contain_text("The run was cancelled")
    expect(reply_of(say(page, "Two", "talk"))).to_contain_text("Message 3 was: Two")
    last, _, first = runs_of(closed, session_of(page))
    assert first["inputs"] == {"messages": [{"role": "user", "content": "One"}], "tone": "polite"}
    assert last["inputs"]["messages"] == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Message 2 was: One"},
        {"role": "user", "content": "Two"},
    ]


def test_an_agent_without_a_text_as_its_only_input_has_no_chat(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "agent/order")
    expect(page.get_by_role("link", name="New batch")).to_be_visible()
    expect(page.get_by_role("link", name="Chat", exact=True)).to_have_count(0)
    page.goto(f"{closed.url}/ui#/chat/order")
    expect(page.get_by_text("This agent does not take a text as its only input. Use its form.")).to_be_visible()


def test_text_of_users_and_models_is_never_html(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    hostile = "<img src=x onerror=\"document.title = 'pwned'\"><script>document.title = 'pwned'</script>"
    expect(reply_of(say(page, hostile))).to_have_text(f"Message 1 was: {hostile}")
    page.reload()
    expect(reply_of(turns_of(page).first)).to_have_text(f"Message 1 was: {hostile}")
    expect(page).to_have_title("Chat with chat · Sample agents")
    expect(page.locator("main img, main script")).to_have_count(0)


# Streams


def test_a_reload_in_the_middle_of_a_reply_shows_each_character_once(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    expect(reply_of(say(page, f"slow {gate}"))).to_have_text("Once upon ")
    page.reload()
    reply = reply_of(turns_of(page))
    expect(reply).to_have_text("Once upon ")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    closed.open_gate(gate)
    expect(reply).to_have_text("Once upon a time.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("status").filter(has_text="Once upon a time.")).to_be_attached()  # for screen readers
    assert len(runs_of(closed, session_of(page))) == 1


def test_text_that_is_taken_back_is_not_shown(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    stream = Stream(page)
    reply = reply_of(say(page, f"slow {gate}"))
    text = {"field": "reply", "agent_name": "chat"}
    stream.send(("step.started", {"agent_name": "chat"}), ("output.delta", text | {"text": "wrong"}))
    expect(reply).to_have_text("wrong")
    stream.send(
        ("output.snapshot", {"agent_name": "chat", "output": {"reply": "also wrong"}}),
        ("output.delta", text | {"text": "not of the answer", "call_id": "other:1"}),
        ("output.reset", {"agent_name": "chat"}),
        ("output.delta", text | {"text": "right"}),
    )
    expect(reply).to_have_text("right")
    closed.open_gate(gate)


def test_a_killed_server_loses_neither_the_reply_nor_the_next_message(visit: Visit, tmp_path: Path, gate: str) -> None:
    visit.expected += ["ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_INCOMPLETE_CHUNKED_ENCODING"]
    visit.expected += ["ERR_EMPTY_RESPONSE", "ERR_SOCKET_NOT_CONNECTED", "status of 503"]
    port = free_port()
    with served_by(tmp_path, "/ai", KEY, port) as server:
        site = Site(tmp_path, f"{server.url}/ai", "/ai", KEY)
        page = visit.page(site, "chat/chat")
        expect(reply_of(say(page, "Hello"))).to_have_text("Message 1 was: Hello")
        told = say(page, f"slow {gate}")
        idle = visit.page(site, f"chat/chat/{session_of(page)}-2")
        box_of(idle).wait_for()
        expect(reply_of(told)).to_have_text("Once upon ")
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        box_of(idle).fill("Are you there?")
        box_of(idle).press("Enter")
        expect(idle.get_by_role("alert")).to_contain_text("The server cannot be reached.")
        expect(box_of(idle)).to_have_value("Are you there?")
    site.open_gate(gate)
    with served_by(tmp_path, "/ai", KEY, port):
        expect(reply_of(told)).to_have_text("Once upon a time.")
        expect(reply_of(turns_of(idle))).to_have_text("Message 1 was: Are you there?")
        expect(box_of(idle)).to_have_value("")
        assert [len(runs_of(site, session_of(each))) for each in (page, idle)] == [2, 1]


# Sending


def test_a_message_whose_answer_is_lost_is_one_turn(visit: Visit, closed: Site) -> None:
    visit.expected.append("ERR_FAILED")
    page = visit.page(closed, "chat/chat")
    lost: list[int] = []

    def lose_the_first(route: Route) -> None:
        response = route.fetch()
        lost.append(response.status)
        route.abort() if len(lost) == 1 else route.fulfill(response=response)

    page.route("**/run/flock", lose_the_first)
    expect(reply_of(say(page, "Hello"))).to_have_text("Message 1 was: Hello")
    assert lost[0] == 202
    assert len(lost) == 2
    expect(turns_of(page)).to_have_count(1)
    assert len(runs_of(closed, session_of(page))) == 1


def test_a_message_is_one_turn_if_the_page_is_closed_while_it_is_sent(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    held: list[Route] = []

    def hold(route: Route) -> None:
        route.fetch()
        held.append(route)

    page.route("**/run/flock", hold)
    box_of(page).fill("Hello")
    box_of(page).press("Enter")
    while not held:
        page.wait_for_timeout(20)  # handles what the browser sends
    expect(box_of(page)).to_have_value("Hello")
    page.unroute("**/run/flock")
    page.reload()
    expect(reply_of(turns_of(page))).to_have_text("Message 1 was: Hello")
    expect(box_of(page)).to_have_value("")
    assert len(runs_of(closed, session_of(page))) == 1


def test_a_message_whose_first_request_is_still_being_accepted_is_sent_again(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 409")
    page = visit.page(closed, "chat/chat")
    keys: list[str] = []

    def refuse_the_first(route: Route) -> None:
        keys.append(route.request.headers["idempotency-key"])
        route.fulfill(status=409, body="{}") if len(keys) == 1 else route.continue_()

    page.route("**/run/flock", refuse_the_first)
    expect(reply_of(say(page, "Hello"))).to_have_text("Message 1 was: Hello")
    assert keys == [keys[0]] * 2


@pytest.mark.parametrize(("status", "detail"), [(429, "The queue is full."), (403, "This key may only read.")])
def test_a_refused_message_stays_in_the_box(visit: Visit, closed: Site, status: int, detail: str) -> None:
    visit.expected.append(f"status of {status}")
    page = visit.page(closed, "chat/chat")
    problem = json.dumps({"title": "Refused", "status": status, "detail": detail})
    page.route("**/run/flock", lambda route: route.fulfill(status=status, body=problem))
    box_of(page).fill("Hello")
    box_of(page).press("Enter")
    expect(page.get_by_role("alert")).to_contain_text(f"{detail} Your text is still in the box.")
    expect(box_of(page)).to_have_value("Hello")
    expect(box_of(page)).to_be_focused()
    page.unroute("**/run/flock")
    box_of(page).press("Enter")
    expect(reply_of(turns_of(page))).to_have_text("Message 1 was: Hello")
    expect(page.get_by_role("alert").filter(has_text=detail)).to_have_count(0)


def test_a_new_key_is_asked_for_and_the_message_is_sent(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 401")
    page = visit.page(closed, "chat/chat")
    box_of(page).fill("Hello")
    page.evaluate(f"sessionStorage.setItem('flock:{closed.prefix}/:key', 'expired')")
    box_of(page).press("Enter")
    key = page.get_by_role("dialog", name="This server needs a key").get_by_label("API key")
    key.fill(KEY)
    key.press("Enter")
    expect(reply_of(turns_of(page))).to_have_text("Message 1 was: Hello")
    expect(box_of(page)).to_be_focused()


def test_a_chat_is_held_with_the_keyboard_alone(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    expect(box_of(page)).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Control+Enter")
    expect(reply_of(turns_of(page))).to_have_text("Message 1 was: One\nTwo")
    expect(box_of(page)).to_be_focused()
    page.keyboard.press("Enter")  # there is nothing to send
    page.keyboard.type(f"slow {gate}")
    page.keyboard.press("Enter")
    reply = reply_of(turns_of(page).nth(1))
    expect(reply).to_have_text("Once upon ")
    page.keyboard.type("Next")
    page.keyboard.press("Enter")
    expect(turns_of(page).nth(2)).to_contain_text("starting")  # it waits for its turn
    expect(box_of(page)).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Send")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    page.keyboard.press("Enter")
    expect(reply).to_contain_text("The run was cancelled")
    expect(reply_of(turns_of(page).nth(2))).to_have_text("Message 2 was: Next")  # without the cancelled turn
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(box_of(page)).to_be_focused()
    assert len(runs_of(closed, session_of(page))) == 3


# Calls, questions and failures


def test_an_approval_is_given_in_place_and_its_call_is_shown(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    turn = say(page, "pay")
    question = turn.get_by_role("region", name="May chat call pay_back?")
    expect(question.get_by_role("row", name="amount")).to_contain_text("40")
    page.reload()
    question.get_by_role("button", name="Approve").press("Enter")
    turn = turns_of(page).first
    expect(reply_of(turn)).to_have_text("Message 1 was: pay")
    expect(question).to_have_count(0)
    expect(box_of(page)).to_be_focused()
    expect(turn.get_by_text(re.compile("tool pay_back . completed"))).to_be_visible()
    expect(reply_of(say(page, "Thanks"))).to_have_text("Message 2 was: Thanks")


def test_a_failed_turn_shows_its_error_and_is_retried(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    turn = say(page, f"fail {gate}")
    expect(reply_of(turn)).to_contain_text("The model openai/gpt-4o rejected the request (HTTP 400).")
    closed.open_gate(gate)
    turn.get_by_role("button", name="Retry").press("Enter")
    expect(reply_of(turn)).to_have_text(f"Message 1 was: fail {gate}")
    expect(box_of(page)).to_be_focused()
    (run,) = runs_of(closed, session_of(page))
    assert (run["status"], run["attempt"]) == ("completed", 2)


def test_a_turn_that_was_retried_elsewhere_is_followed(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    turn = say(page, f"fail {gate}")
    expect(turn).to_contain_text("The run failed")
    closed.open_gate(gate)
    (run,) = runs_of(closed, session_of(page))
    httpx.post(f"{closed.url}/run/{run['run_id']}/retry", headers=closed.headers).raise_for_status()
    expect(reply_of(turn)).to_have_text(f"Message 1 was: fail {gate}")


# Screens


@pytest.mark.parametrize(("theme", "width"), [("light", 390), ("dark", 390), ("dark", 1280)])
def test_axe_finds_no_violation_in_a_chat_and_a_phone_does_not_scroll_sideways(
    visit: Visit, closed: Site, gate: str, theme: str, width: int
) -> None:
    page = visit.page(closed, "chat/chat", viewport={"width": width, "height": 800}, color_scheme=theme)
    expect(reply_of(say(page, "long" * 200))).to_contain_text("longlong")
    expect(say(page, "fail never")).to_contain_text("The run failed")
    expect(say(page, "pay").get_by_role("button", name="Approve")).to_be_visible()
    expect(reply_of(say(page, f"slow {gate}"))).to_have_text("Once upon ")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    expect(box_of(page)).to_be_in_viewport()
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)") is (theme == "dark")
    report = Axe().run(page)
    assert report.violations_count == 0, report.generate_report()
    closed.open_gate(gate)
    page.get_by_role("link", name="New conversation").click()
    page.get_by_role("heading", name="Conversations").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    assert Axe().run(page).violations_count == 0

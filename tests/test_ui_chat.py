"""The chat of the web page: turns, their streams, calls and questions, and what a crash or a reload leaves of them."""

import json
import os
import re
import signal
from itertools import pairwise
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


#: Keeps each text that a reply shows, and with it what the user has said, also over a reload.
SEEN = """new MutationObserver(() => {
    const seen = JSON.parse(sessionStorage.seen ?? "[]");
    for (const turn of document.querySelectorAll("ol.chat > li")) {
        const shown = [...turn.querySelectorAll(":scope > .answer > .output td, :scope > .answer > .reply")];
        const text = shown.filter((each) => each.checkVisibility()).map((each) => each.innerText.trim()).join("");
        seen.push([turn.querySelector(".said").textContent, text]);
    }
    sessionStorage.seen = JSON.stringify(seen);
}).observe(document, {subtree: true, childList: true, characterData: true, attributes: true});"""


def check_seen(page: Page, said: str, start: str, end: str) -> None:
    """Check that a reply has shown each character once: it only grew, or was taken back as a whole. Needs ``SEEN``."""
    seen = [text for who, text in json.loads(page.evaluate("sessionStorage.seen")) if who == f"You: {said}"]
    assert start in seen
    assert seen[-1] == end
    for before, text in pairwise(seen):
        assert end.startswith(text), "a part of the reply"
        assert text.startswith(before) or not text, "what was shown is still there, or all of it is gone"


def session_of(page: Page) -> str:
    return page.url.rpartition("/")[2]


def runs_of(site: Site, session_id: str) -> Any:
    return site.get(f"/runs?session_id={session_id}&include=inputs,result")["runs"]


def start(site: Site, session_id: str, text: str, agent_name: str = "chat", **inputs: Any) -> str:
    inputs = inputs or {"message": text}
    body = {"agent_name": agent_name, "inputs": inputs, "async_run": True, "session_id": session_id}
    sent = httpx.post(f"{site.url}/run/flock", json=body, headers=site.headers).raise_for_status()
    return str(sent.json()["run_id"])


def hide(page: Page, is_hidden: bool) -> None:
    page.evaluate(
        """isHidden => {
            Object.defineProperty(document, "hidden", {value: isHidden, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        is_hidden,
    )


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
    hide(page, True)
    for number in range(12):
        start(closed, session_id, f"Hidden {number}")
    hide(page, False)
    expect(turns_of(page).nth(24).locator("> .said")).to_have_text("You: Hidden 11")
    expect(turns_of(page).locator("> .said")).to_have_text(
        [f"You: Number {number}" for number in range(12)]
        + ["You: From elsewhere"]
        + [f"You: Hidden {number}" for number in range(12)]
    )


def test_a_turn_from_elsewhere_has_its_place_before_a_later_one_of_this_page(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    expect(reply_of(say(page, "One"))).to_have_text("Message 1 was: One")
    visit.expected.append("status of 500")
    failed = list[str]()

    def fail(route: Route) -> None:
        failed.append(route.request.url)
        route.fulfill(status=500, body="{}")

    page.route("**/runs?*", fail, times=1)  # one error does not end the looking
    closed.get(f"/run/{start(closed, session_of(page), 'Elsewhere')}?wait=30")
    box_of(page).fill("Two")  # the other turn may come before it at any moment
    box_of(page).press("Enter")
    expect(turns_of(page).locator("> .said")).to_have_text(["You: One", "You: Elsewhere", "You: Two"])
    assert len(failed) == 1


def test_earlier_turns_are_asked_for_once_and_an_error_is_said(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 500")
    for number in range(12):
        run_id = start(closed, "earlier", f"Number {number}")
    closed.get(f"/run/{run_id}?wait=30")
    page = visit.page(closed, "chat/chat/earlier")
    expect(turns_of(page)).to_have_count(10)
    page.route(re.compile("after="), lambda route: route.fulfill(status=500, body="{}"), times=1)
    more = page.get_by_role("button", name="Earlier turns")
    more.click()
    expect(page.locator("#notice")).to_have_text("The server responded with status 500.")
    expect(more).to_be_focused()
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url) if "after=" in request.url else None)
    more.dblclick()
    expect(turns_of(page)).to_have_count(12)
    expect(turns_of(page).first).to_be_focused()
    assert len(asked) == 1


def test_a_conversation_with_an_empty_message_is_listed_by_its_id(visit: Visit, closed: Site) -> None:
    start(closed, "without-words", "", "refund", order="")
    page = visit.page(closed, "chat/refund")
    expect(page.get_by_role("link", name="without-words")).to_be_visible()


def test_the_sums_are_read_again_if_a_turn_ends_meanwhile(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    held = list[tuple[Route, Any]]()
    page.route("**/session/*", lambda route: held.append((route, route.fetch())), times=1)
    expect(reply_of(say(page, "One"))).to_have_text("Message 1 was: One")
    while not held:
        page.wait_for_timeout(20)  # handles what the browser sends
    expect(reply_of(say(page, "Two"))).to_have_text("Message 2 was: Two")
    route, response = held[0]
    route.fulfill(response=response)
    expect(page.locator(".view > .facts")).to_contain_text("Turns2")


def test_the_model_gets_the_messages_of_a_turn_from_elsewhere(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/talk")
    expect(reply_of(say(page, "One", "talk"))).to_contain_text("was: One")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()  # it has ended
    hide(page, True)  # the page does not look
    messages = [{"role": "user", "content": "Another"}]
    closed.get(f"/run/{start(closed, session_of(page), '', 'talk', messages=messages, tone=None)}?wait=30")
    say(page, "Two", "talk")
    last, elsewhere, _ = runs_of(closed, session_of(page))
    answer = {"role": "assistant", "content": elsewhere["result"]["reply"]}
    assert last["inputs"]["messages"] == [*messages, answer, {"role": "user", "content": "Two"}]


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
    (context := visit.context(closed)).add_init_script(SEEN)
    page = visit.page(closed, "chat/chat", context)
    expect(reply_of(say(page, f"slow {gate}"))).to_have_text("Once upon ")
    page.reload()
    reply = reply_of(turns_of(page))
    expect(reply).to_have_text("Once upon ")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    closed.open_gate(gate)
    expect(reply).to_have_text("Once upon a time.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.get_by_role("status").filter(has_text="Once upon a time.")).to_be_attached()  # for screen readers
    check_seen(page, f"slow {gate}", "Once upon", "Once upon a time.")
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
        (context := visit.context(site)).add_init_script(SEEN)
        page = visit.page(site, "chat/chat", context)
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
        check_seen(page, f"slow {gate}", "Once upon", "Once upon a time.")
        expect(reply_of(turns_of(idle))).to_have_text("Message 1 was: Are you there?")
        expect(box_of(idle)).to_have_value("")
        assert [len(runs_of(site, session_of(each))) for each in (page, idle)] == [2, 1]


def test_a_stream_that_comes_after_the_end_does_not_show_the_reply_twice(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    held = list[tuple[Route, Any]]()
    page.route("**/run/*/events", lambda route: held.append((route, route.fetch())), times=1)
    reply = reply_of(say(page, "Hello"))
    expect(reply).to_have_text("Message 1 was: Hello")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    while not held:
        page.wait_for_timeout(20)  # handles what the browser sends
    ((route, response),) = held
    with page.expect_response(re.compile("/run/[^/]*$")):  # the page has read the stream
        route.fulfill(response=response)
    expect(reply).to_have_text("Message 1 was: Hello")


def test_only_the_turn_that_runs_has_a_stream(visit: Visit, closed: Site, gate: str) -> None:
    """A browser has six connections per host."""
    session_id = f"many-{gate}"
    for _ in range(8):
        run_id = start(closed, session_id, f"slow {gate}")
    context = visit.context(closed)
    streams = list[str]()
    context.on("request", lambda it: streams.append(it.url) if it.url.endswith("/events") else None)
    page = visit.page(closed, f"chat/chat/{session_id}", context)
    expect(reply_of(turns_of(page).first)).to_have_text("Once upon ")
    expect(turns_of(page)).to_have_count(8)
    with page.expect_response(re.compile(f"/run/{run_id}$")):
        pass  # the page looks
    assert len(set(streams)) == 1
    closed.open_gate(gate)
    for turn in turns_of(page).all():
        expect(reply_of(turn)).to_have_text("Once upon a time.")


def test_a_late_record_does_not_revive_a_turn(visit: Visit, closed: Site, gate: str) -> None:
    run_id = start(closed, f"late-{gate}", f"slow {gate}")
    page = visit.page(closed)
    held = list[tuple[Route, Any]]()

    def hold(route: Route) -> None:
        response = route.fetch()
        held.append((route, response))

    page.route(f"**/run/{run_id}", hold, times=1)
    page.goto(f"{closed.url}/ui#/chat/chat/late-{gate}")
    turn = turns_of(page)
    expect(turn).to_have_class("busy")
    while not held:
        page.wait_for_timeout(20)  # handles what the browser sends
    page.get_by_role("button", name="Stop").click()
    expect(turn).to_contain_text("The run was cancelled")
    turn.evaluate(
        "(turn) => { window.revived = 0; new MutationObserver(() => { revived += turn.className === 'busy'; })"
        ".observe(turn, {attributes: true}); }"
    )
    route, response = held[0]
    assert response.json()["status"] in ("starting", "running")
    with page.expect_response(f"**/run/{run_id}"):
        route.fulfill(response=response)
    page.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert page.evaluate("revived") == 0


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
        body = '{"type": "urn:flockapi:problem:idempotency-key-in-use"}'
        route.fulfill(status=409, body=body) if len(keys) == 1 else route.continue_()

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


@pytest.mark.parametrize("status", [500, 409])
def test_another_try_with_other_inputs_is_another_request(visit: Visit, closed: Site, status: int) -> None:
    """So is one after a conflict, such as that with a run that was deleted."""
    visit.expected.append(f"status of {status}")
    page = visit.page(closed, "chat/talk")
    sent = list[tuple[str, Any]]()

    def refuse(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        sent.append((route.request.headers["idempotency-key"], body["inputs"].get("tone")))
        route.fulfill(status=status, body="{}") if len(sent) < 3 else route.continue_()

    page.route("**/run/flock", refuse)
    page.get_by_text("More inputs").click()
    box_of(page, "talk").fill("Hello")
    for tone in ("short", "short", "polite"):
        page.get_by_label("tone").select_option(tone)
        with page.expect_response("**/run/flock"):
            box_of(page, "talk").press("Enter")
        expect(box_of(page, "talk")).to_be_editable()
    expect(turns_of(page)).to_have_count(1)
    assert [tone for _, tone in sent] == ["short", "short", "polite"]
    first, second, third = (key for key, _ in sent)
    assert third not in (first, second)
    assert (first == second) is (status == 500), "the same request has the same key"


def test_enter_that_ends_a_composition_sends_nothing(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/chat")
    box_of(page).fill("にほん")
    event = "new KeyboardEvent('keydown', { key: 'Enter', keyCode: 229, bubbles: true, cancelable: true })"  # of Safari
    assert box_of(page).evaluate(f"(box) => box.dispatchEvent({event})"), "the default is not prevented"
    expect(box_of(page)).to_have_value("にほん")
    assert box_of(page).is_editable()


def test_a_new_key_is_asked_for_and_the_message_is_sent(visit: Visit, closed: Site) -> None:
    visit.expected.append("status of 401")
    page = visit.page(closed, "chat/chat")
    box_of(page).fill("Hello")
    # It expires when the message is sent: before, another request would ask for the key, and get the Enter.
    expire = f"sessionStorage.setItem('flock:{closed.prefix}/:key', 'expired')"
    page.evaluate(f"addEventListener('keydown', () => {expire}, {{ capture: true, once: true }})")
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


def test_a_waiting_turn_can_be_stopped_and_the_next_question_gets_the_focus(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/refund")
    turn = say(page, "A9", "refund")
    amount = turn.locator("form", has=page.get_by_role("heading", name="How much?"))
    amount.get_by_label("answer").fill("40")
    amount.get_by_role("button", name="Answer").press("Enter")
    expect(amount).to_have_count(0)
    expect(turn.get_by_label("approved")).to_be_focused()
    page.get_by_role("button", name="Stop").press("Enter")
    expect(turn).to_contain_text("The run was cancelled")
    expect(box_of(page, "refund")).to_be_focused()


def test_a_turn_that_ends_does_not_take_the_focus(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    reply = reply_of(say(page, f"slow {gate}"))
    expect(reply).to_have_text("Once upon ")
    box_of(page).blur()  # somebody reads
    closed.open_gate(gate)
    expect(reply).to_have_text("Once upon a time.")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert page.evaluate("document.activeElement === document.body")


def test_a_failed_turn_shows_its_error_and_is_retried(visit: Visit, closed: Site, gate: str) -> None:
    page = visit.page(closed, "chat/chat")
    turn = say(page, f"fail {gate}")
    expect(reply_of(turn)).to_contain_text("The model openai/gpt-4o rejected the request (HTTP 400).")
    closed.open_gate(gate)
    turn.get_by_role("button", name="Retry").press("Enter")
    expect(reply_of(turn)).to_have_text(f"Message 1 was: fail {gate}")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
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


def test_a_bad_address_is_an_unknown_page(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, "chat/%")
    expect(page.get_by_text("There is no such page.")).to_be_visible()


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

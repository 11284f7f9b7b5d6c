"""The page of a run: its calls, its output while it is written, its questions and its cost; and the runs that wait."""

import json
import re
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, Route, expect

from flock.web.auth import new_key
from tests.support.receivers import SECRET
from tests.support.servers import flockapi_command, free_port, running
from tests.support.site import Site, Visit, status_of

pytest_plugins = "tests.support.site"  # for its fixtures


def steps_of(page: Page) -> Locator:
    return page.get_by_role("list", name="Steps").locator("> li")


def lines_of(calls: Locator) -> Locator:
    """The summaries of calls, without the calls below them."""
    return calls.locator("> li > details > summary")


# Calls


def test_calls_are_shown_below_their_step_and_their_caller(visit: Visit, closed: Site) -> None:
    page = visit.page(closed, f"run/{closed.run('trip', place='Rome')}")
    calls = steps_of(page).locator("> .calls")
    lines = lines_of(calls)
    expect(lines).to_have_count(3)
    for line, words in zip(lines.all(), ("function fare", "agent hotel", "function museum"), strict=True):
        expect(line).to_contain_text(re.compile(rf"{words} . (completed|failed) [\d.]+ m?s"))
    expect(lines.nth(2)).to_contain_text("failed")
    expect(calls).to_contain_text("The museum of Rome is <b>closed</b>.")
    expect(lines_of(calls.locator("> li", has_text="hotel").locator("> .calls"))).to_contain_text("fare")
    lines.nth(0).press("Enter")
    details = page.get_by_role("group", name="Details of fare").first
    expect(details.get_by_role("row", name="Arguments")).to_contain_text("Rome")
    expect(details.get_by_role("row", name="Result")).to_contain_text("4")


def test_the_calls_of_a_step_that_failed_are_shown(visit: Visit, closed: Site) -> None:
    run_id = closed.run("trip", place="Rome", gate="never")
    httpx.post(f"{closed.url}/run/{run_id}/cancel", headers=closed.headers).raise_for_status()
    page = visit.page(closed, f"run/{run_id}")
    expect(steps_of(page)).to_contain_text("trip not finished")
    expect(lines_of(steps_of(page).locator("> .calls"))).to_have_count(3)


def sse(*events: tuple[str, dict[str, Any]]) -> str:
    """Events of the first step, as the server sends them."""
    common = {"run_id": "r", "attempt": 1, "position": 0, "agent_name": "research"}
    return "".join(f"event: {name}\ndata: {json.dumps(common | data)}\n\n" for name, data in events)


class Stream:
    """The events of a run, in place of the server's: a connection stays open until it is sent events."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._open: list[Route] = []
        page.route("**/events", lambda route: self._open.append(route))

    def send(self, *events: tuple[str, dict[str, Any]]) -> None:
        """Send events and close the connection. The page opens the next one."""
        while not self._open:
            self._page.wait_for_timeout(20)  # handles what the browser sends, such as the next connection
        self._open.pop(0).fulfill(content_type="text/event-stream", body=sse(*events))


@pytest.fixture
def live(visit: Visit, closed: Site) -> Callable[[str], tuple[Page, Stream]]:
    """A page of a run that does not end before its gate opens, and the events that it reads."""

    def open_page(gate: str) -> tuple[Page, Stream]:
        run_id = closed.start("research", topic="tea", gate=gate)
        page = visit.page(closed)
        stream = Stream(page)
        page.goto(f"{closed.url}/ui#/run/{run_id}")
        return page, stream

    return open_page


Live = Callable[[str], tuple[Page, Stream]]
STARTED = "2026-01-01T00:00:00Z"
ENDED = "2026-01-01T00:00:02Z"


def test_calls_are_added_while_a_step_is_running(live: Live, gate: str) -> None:
    page, stream = live(gate)
    call = {"call_id": "look_up:1", "name": "look_up", "kind": "tool", "started_at": STARTED}
    inner = {"call_id": "look_up:1~2", "name": "fetch", "kind": "function", "started_at": STARTED}
    calls = steps_of(page).locator("> .calls")
    stream.send(
        ("step.started", {}),
        ("call.started", call | {"arguments": {"word": "tea"}}),
        ("call.completed", inner | {"completed_at": ENDED, "result": "<b>leaf</b>", "error": None}),
    )
    expect(lines_of(calls)).to_contain_text("tool look_up ◐ running")
    expect(lines_of(calls.locator("> li > .calls"))).to_contain_text("function fetch ✓ completed 2.0 s")
    lines_of(calls).press("Enter")
    details = page.get_by_role("group", name="Details of look_up")
    expect(details).to_contain_text("tea")
    usage = {"input_tokens": 1200, "output_tokens": 34}
    stream.send(("call.completed", call | {"completed_at": ENDED, "result": "a leaf", "error": None, "usage": usage}))
    expect(lines_of(calls)).to_contain_text("tool look_up ✓ completed 2.0 s, 1,234 tokens")
    expect(lines_of(calls)).to_have_count(1)
    expect(details).to_contain_text("a leaf")  # it stays open, with what was known before
    expect(details).to_contain_text("tea")


def test_a_step_of_thousands_of_calls_shows_the_first(live: Live, gate: str) -> None:
    page, stream = live(gate)
    call = {"name": "add", "kind": "function", "started_at": STARTED, "completed_at": ENDED, "error": None}
    stream.send(*[("call.completed", call | {"call_id": f"add:{number}"}) for number in range(2000)])
    expect(page.get_by_text("… and 1,500 more calls. The API returns all.")).to_be_visible()
    expect(lines_of(steps_of(page).locator("> .calls"))).to_have_count(500)


# Output while it is written


def test_output_grows_while_it_is_written_until_the_result_replaces_it(live: Live, gate: str) -> None:
    page, stream = live(gate)
    page.evaluate(
        """() => {
            window.said = [];
            const note = () => window.said.push(document.querySelector(".view > [role=status]")?.textContent ?? "");
            new MutationObserver(note).observe(document.querySelector("main"), {childList: true, subtree: true});
        }"""
    )
    output = steps_of(page).locator("> .output")
    text = {"field": "result"}
    stream.send(
        ("step.started", {}),
        ("output.delta", text | {"text": "Tea is "}),
        ("output.delta", text | {"text": "a <b>plant"}),
        ("output.delta", {"field": "other", "text": "More"}),
    )
    expect(output.get_by_role("row", name="result")).to_contain_text("Tea is a <b>plant")
    expect(output.get_by_role("row", name="other")).to_contain_text("More")
    caret = "cells => cells.map(cell => getComputedStyle(cell, '::after').content)"
    assert output.locator("td > .text").evaluate_all(caret) == ["none", '"▍"']
    stream.send(
        ("output.snapshot", {"output": {"result": "Tea is a plant", "list": ["leaf"]}}),
        ("output.delta", text | {"text": ", and"}),
    )
    expect(output.get_by_role("row", name="result")).to_contain_text("Tea is a plant, and")
    expect(output.get_by_role("row", name="list").get_by_role("listitem")).to_have_text(["leaf"])
    expect(output.get_by_role("row", name="other")).to_have_count(0)
    stream.send(
        ("output.delta", text | {"text": "wrong"}),
        ("output.reset", {}),
        ("output.delta", text | {"text": "right"}),
        ("output.value", {"field": "list", "value": [1, 2]}),
        ("output.delta", text | {"text": ", still", "call_id": "hotel:1"}),
    )
    expect(output.get_by_role("row", name="result")).to_have_text(re.compile("^result\\s*right$"))
    expect(output.get_by_role("row", name="list").get_by_role("listitem")).to_have_text(["1", "2"])
    inner = steps_of(page).locator("> .calls > li", has_text="agent research").locator("> .output")
    expect(inner).to_contain_text(", still")
    said = page.evaluate("window.said")
    assert "Step 1: research is running." in said
    assert not any(word in " ".join(said) for word in ("Tea", "plant", "right", "still"))
    stream.send(("step.completed", {"started_at": STARTED, "completed_at": ENDED, "result": "All about tea."}))
    expect(page.locator(".output:visible")).to_have_count(0)
    page.get_by_text("Result", exact=True).click()
    expect(page.get_by_role("group", name="Result of step 1")).to_have_text("All about tea.")


# Questions


def calls_of(site: Site, run_id: str) -> dict[str, Any]:
    """The last call of each kind in the first step of a run."""
    return {call["kind"]: call for call in site.get(f"/run/{run_id}")["steps"][0]["calls"]}


def test_a_call_that_waits_for_an_answer_is_not_shown_as_running(visit: Visit, closed: Site, gate: str) -> None:
    run_id = closed.start("errand", order="A7", gate=gate)
    page = visit.page(closed, f"run/{run_id}")
    expect(steps_of(page)).to_contain_text("errand running for")
    closed.open_gate(gate)
    expect(status_of(page)).to_contain_text("waiting")
    expect(steps_of(page)).to_contain_text("errand waiting, started")
    expect(lines_of(steps_of(page).locator("> .calls")).first).to_contain_text("agent refund ? waiting")
    expect(page.locator(".steps .running")).to_have_count(0)
    httpx.post(f"{closed.url}/run/{run_id}/cancel", headers=closed.headers).raise_for_status()


def test_rows_that_wait_for_an_answer_are_shown_as_waiting(visit: Visit, closed: Site) -> None:
    """In the bar and in the words, on the page of the batch and in the list of batches."""
    items = [{"order": f"A{number}"} for number in range(3)]
    body = {"agent_name": "refund", "batch_inputs": items}
    sent = httpx.post(f"{closed.url}/run/batch", json=body, headers=closed.headers).raise_for_status()
    batch_id = sent.json()["batch_id"]
    page = visit.page(closed, f"batch/{batch_id}")
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuetext", "3 rows: 3 waiting")
    expect(page.locator(".outcomes")).to_have_text("0 of 3 rows (0 %)? 3 waiting")
    listed = visit.page(closed, "batches?agent_name=refund")
    expect(listed.get_by_role("row", name=batch_id[-12:])).to_contain_text("? 3 waiting")
    httpx.post(f"{closed.url}/batch/{batch_id}/cancel", headers=closed.headers).raise_for_status()
    expect(status_of(page)).to_contain_text("cancelled")


def test_a_call_of_a_tool_is_approved(visit: Visit, closed: Site) -> None:
    run_id = closed.run("cashier", complaint="cold soup")
    page = visit.page(closed, f"run/{run_id}")
    question = page.get_by_role("region", name="May cashier call pay_back?")
    expect(question.get_by_role("row", name="amount")).to_contain_text("40")
    expect(steps_of(page)).to_contain_text("cashier waiting, started")
    started = page.locator(".steps > li > div > .quiet > time")
    expect(started).to_have_attribute("datetime", closed.get(f"/run/{run_id}")["started_at"])
    question.get_by_role("button", name="Approve").click()
    expect(status_of(page)).to_contain_text("completed")
    expect(question).to_have_count(0)
    assert calls_of(closed, run_id)["tool"]["result"] == "paid 40 for A7"


def test_an_approval_asked_through_openai_is_answered_on_the_page(visit: Visit, closed: Site) -> None:
    def respond(input: Any, **more: str) -> Any:
        body = {"model": "cashier", "input": input, **more}
        return httpx.post(f"{closed.url}/v1/responses", json=body, headers=closed.headers, timeout=90).json()

    asked = respond("cold soup")
    assert [(item["type"], item["name"]) for item in asked["output"]] == [("mcp_approval_request", "pay_back")]
    _, run_id, _ = asked["id"].split("_")
    page = visit.page(closed, f"run/{run_id}")
    page.get_by_role("button", name="Approve").click()
    expect(status_of(page)).to_contain_text("completed")
    continued = respond([], previous_response_id=asked["id"])
    assert json.loads(continued["output"][0]["content"][0]["text"]) == closed.get(f"/run/{run_id}")["result"]
    assert calls_of(closed, run_id)["tool"]["result"] == "paid 40 for A7"


def test_a_call_of_a_tool_is_denied_with_a_reason(visit: Visit, closed: Site) -> None:
    run_id = closed.run("cashier", complaint="cold soup")
    page = visit.page(closed, f"run/{run_id}")
    page.get_by_label("reason").fill("Too much.")
    page.get_by_role("button", name="Deny").click()
    expect(status_of(page)).to_contain_text("completed")
    calls = calls_of(closed, run_id)
    assert calls["question"]["result"] == {"approved": False, "reason": "Too much."}
    assert "tool" not in calls


def test_control_enter_in_the_reason_denies_a_call_and_enter_in_a_number_approves_it(
    visit: Visit, closed: Site
) -> None:
    denied, approved = (closed.run("cashier", complaint="cold soup") for _ in range(2))
    page = visit.page(closed, f"run/{denied}")
    page.get_by_label("reason").press_sequentially("Too")
    page.keyboard.press("Enter")
    page.keyboard.type("much.")
    page.keyboard.press("Control+Enter")
    expect(status_of(page)).to_contain_text("completed")
    assert calls_of(closed, denied)["question"]["result"] == {"approved": False, "reason": "Too\nmuch."}
    page = visit.page(closed, f"run/{approved}")
    page.get_by_role("button", name="Edit").press("Enter")
    page.get_by_label("amount").fill("5")
    page.keyboard.press("Enter")
    expect(status_of(page)).to_contain_text("completed")
    assert calls_of(closed, approved)["tool"]["result"] == "paid 5 for A7"


def test_the_arguments_of_a_call_are_edited_before_it_is_approved(visit: Visit, closed: Site) -> None:
    run_id = closed.run("cashier", complaint="cold soup")
    page = visit.page(closed, f"run/{run_id}")
    page.get_by_role("button", name="Edit").press("Enter")
    amount = page.get_by_label("amount")
    expect(amount).to_be_focused()
    expect(amount).to_have_value("40")
    amount.fill("much")
    page.get_by_role("button", name="Approve the edited call").click()
    expect(amount).to_have_attribute("aria-invalid", "true")
    amount.fill("5")
    page.get_by_role("button", name="Discard the edits").click()
    expect(page.get_by_role("group", name="Arguments").get_by_role("row", name="amount")).to_contain_text("40")
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("amount").fill("5")
    page.get_by_role("button", name="Approve the edited call").click()
    expect(status_of(page)).to_contain_text("completed")
    steps_of(page).locator("summary", has_text="question").press("Enter")
    details = page.get_by_role("group", name=re.compile("^Details of")).filter(has_text="approved")
    expect(details.get_by_role("row", name=re.compile("^Arguments question"))).to_contain_text("amount40")
    expect(details.get_by_role("row", name=re.compile("^Result approved"))).to_contain_text("amount5")
    assert calls_of(closed, run_id)["tool"]["result"] == "paid 5 for A7"


def test_questions_are_counted_and_listed(visit: Visit, closed: Site) -> None:
    run_ids = [closed.run("refund", order="A9"), closed.run("cashier", complaint="cold soup")]
    page = visit.page(closed)
    link = page.get_by_role("navigation").get_by_role("link", name="Waiting for you")
    waiting = len(closed.get("/questions")["questions"])
    expect(link).to_have_text(f"Waiting for you {waiting}")
    link.click()
    expect(page.get_by_role("heading", name="Waiting for you")).to_be_focused()
    refund = page.get_by_role("row", name="Refund <b>A9</b>?")
    expect(refund.locator("td").last.locator("time")).to_have_count(1)  # it expires
    how_much = page.get_by_role("row", name="How much?")
    expect(how_much.locator("td").last.locator("time")).to_have_count(0)
    cashier = page.get_by_role("row", name="May cashier call pay_back?").first
    expect(cashier).to_contain_text("amount: 40")
    for run_id in run_ids:
        httpx.post(f"{closed.url}/run/{run_id}/cancel", headers=closed.headers).raise_for_status()
    expect(refund).to_have_count(0)
    expect(link).to_have_text(f"Waiting for you {waiting - 3}" if waiting > 3 else "Waiting for you")


def test_the_inbox_is_worked_through_by_keyboard(visit: Visit, closed: Site) -> None:
    """Each answer leads to the next question, until there is none."""
    waiting = [closed.run("cashier", complaint="cold soup") for _ in range(2)]
    page = visit.page(closed, "waiting?agent_name=cashier")
    page.get_by_role("link", name="May cashier call pay_back?").first.press("Enter")
    expect(page.get_by_role("heading", name="Question of cashier")).to_be_focused()
    expect(fact(page, "Run")).to_have_text(re.compile("|".join(waiting)))
    page.get_by_role("button", name="Approve").press("Enter")
    other = page.get_by_role("link", name="Next question")
    expect(other).to_be_focused()
    expect(page.locator("main")).to_contain_text("Answered by ann")
    page.keyboard.press("Enter")
    page.get_by_label("reason").fill("Too much.")
    page.get_by_role("button", name="Deny").press("Enter")
    expect(page.get_by_role("row", name="reason")).to_contain_text("Too much.")
    for run_id in waiting:
        assert closed.get(f"/run/{run_id}?wait=30")["status"] == "completed"
    results = [calls_of(closed, run_id)["question"]["result"]["approved"] for run_id in waiting]
    assert sorted(results) == [False, True]


def test_the_page_of_an_answered_question_shows_what_was_asked_and_what_was_changed(visit: Visit, closed: Site) -> None:
    run_id = closed.run("cashier", complaint="cold soup")
    page = visit.page(closed, "waiting?agent_name=cashier")
    page.get_by_role("link", name="May cashier call pay_back?").first.press("Enter")
    page.get_by_role("button", name="Edit").press("Enter")
    expect(page.get_by_label("amount")).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("5")
    page.get_by_role("button", name="Approve the edited call").press("Enter")
    expect(page.locator("main")).to_contain_text("Answered by ann")
    for name, amount in (("Arguments", "40"), ("Answer", "5")):
        shown = page.get_by_role("group", name=name, exact=True)
        expect(shown.get_by_role("row", name="amount").last).to_have_text(re.compile(rf"amount\s*{amount}$"))
    assert closed.get(f"/run/{run_id}?wait=30")["status"] == "completed"


def test_a_question_that_another_person_has_answered_says_so(visit: Visit, closed: Site) -> None:
    run_id = closed.run("cashier", complaint="cold soup")
    page = visit.page(closed, "waiting?agent_name=cashier")
    page.get_by_role("link", name="May cashier call pay_back?").first.click()
    approve = page.get_by_role("button", name="Approve")
    expect(approve).to_be_visible()
    call_id = closed.get(f"/run/{run_id}")["waiting_for"][0]["call_id"]
    answer = {"output": {"approved": False, "reason": "I was first."}}
    httpx.post(f"{closed.url}/run/{run_id}/calls/{call_id}", json=answer, headers=closed.headers).raise_for_status()
    expect(page.get_by_role("row", name="reason")).to_contain_text("I was first.")
    expect(approve).to_have_count(0)


REFUNDS = """
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.runs import RunContext
from flock.testing import FakeModel, Reply

flock = Flock("refunds", model="openai/gpt-4o")

def refund(order: str) -> str:
    return f"refunded {order}"

tool = Tool(refund, needs_approval=True, approver="refunds")
flock.add_agent(FlockFactory.create_default_agent("support", input="order: str", output="reply: str", tools=[tool]))

@flock.agent
async def mine(context: RunContext) -> str:
    return str(await context.ask("Only for the owner?", bool))

def reply(request):
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"reply": last["content"]}
    return Reply(calls=[("refund", {"order": "A2" if "A2" in str(last) else "A1"})])

FakeModel(reply).__enter__()
"""


def focus(page: Page, control: Locator) -> None:
    """Move the focus to a control, with the Tab key only."""
    expect(control).to_be_visible()
    while not control.evaluate("(control) => control === document.activeElement"):
        page.keyboard.press("Tab")


def test_an_approver_sees_the_questions_of_the_role_and_answers_them_by_keyboard(visit: Visit, tmp_path: Path) -> None:
    """The runs are those of another principal, and stay hidden."""
    (script := tmp_path / "refunds.py").write_text(REFUNDS)
    keys = {name: new_key() for name in ("ann", "bob:role:refunds")}
    serve = flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), "--ui")
    with running(*serve, FLOCK_API_KEYS=",".join(f"{name}={key}" for name, key in keys.items())) as server:
        owner, approver = (Site(tmp_path, server.url, "", key) for key in keys.values())
        runs = [owner.start("support", order=order) for order in ("A1", "A2")]
        for run_id in (*runs, owner.start("mine")):
            while owner.get(f"/run/{run_id}?wait=1")["status"] != "waiting":
                pass
        page = visit.page(approver, "waiting")
        rows = page.locator("tbody tr")
        expect(rows).to_have_count(2)
        expect(rows.first).to_contain_text("May support call refund?order: A2supportann")
        focus(page, rows.first.get_by_role("link"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name="Question of support")).to_be_focused()
        expect(fact(page, "Role")).to_have_text("refunds")
        for order in ("A2", "A1"):
            expect(page.get_by_role("group", name="Arguments")).to_contain_text(f"order{order}")
            focus(page, page.get_by_role("button", name="Approve"))
            page.keyboard.press("Enter")
            expect(page.locator("main")).to_contain_text("Answered by bob")
            expect(
                page.get_by_role("link", name="Next question" if order == "A2" else "Other questions")
            ).to_be_focused()
            page.keyboard.press("Enter")
        expect(page.locator("main")).to_contain_text("No run waits for an answer.")
        results = [owner.get(f"/run/{run_id}?wait=30")["result"]["reply"] for run_id in runs]
        assert results == ["refunded A1", "refunded A2"]
        visit.expected.append("404")
        page.goto(f"{server.url}/ui#/run/{runs[0]}")
        expect(page.get_by_role("alert")).to_contain_text("This no longer exists")
        page.close()  # before the server stops


# Facts


def with_members(**members: Any) -> Callable[[Route], None]:
    """Add members to a response, as a newer server does."""

    def fulfil(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, json=response.json() | members)

    return fulfil


def without_cost(route: Route) -> None:
    """Remove the cost from a response, as if the model had no price."""
    response = route.fetch()
    route.fulfill(response=response, json={name: value for name, value in response.json().items() if name != "cost"})


def fact(page: Page, name: str) -> Locator:
    return page.locator(".facts > div", has=page.get_by_text(name, exact=True)).locator("dd")


def test_the_cost_of_a_run_and_a_batch_is_shown_beside_the_tokens(visit: Visit, closed: Site) -> None:
    run_id, batch_id = closed.run("text_analyzer", text="good"), closed.batch(2)
    page = visit.page(closed)
    page.route(f"**/run/{run_id}", with_members(cost=0.000123))
    usage = {"input_tokens": 1500, "output_tokens": 20}
    page.route(f"**/batch/{batch_id}?*", with_members(cost=1.5, estimated_cost=12, usage=usage))
    page.goto(f"{closed.url}/ui#/run/{run_id}")
    expect(fact(page, "Tokens")).to_have_text("10 in, 5 out")
    expect(fact(page, "Cost")).to_have_text("$0.000123")
    page.goto(f"{closed.url}/ui#/batch/{batch_id}")
    expect(fact(page, "Tokens")).to_have_text("1,500 in, 20 out")
    expect(fact(page, "Cost")).to_have_text("$1.50")
    expect(fact(page, "Estimated cost")).to_have_text("$12.00")
    without_price = closed.run("text_analyzer", text="bad")
    page.route(f"**/run/{without_price}", without_cost)
    page.goto(f"{closed.url}/ui#/run/{without_price}")
    expect(fact(page, "Tokens")).to_be_visible()
    expect(fact(page, "Cost")).to_have_count(0)


def test_a_run_leads_to_the_other_runs_of_its_session(visit: Visit, closed: Site) -> None:
    body = {"agent_name": "quote", "inputs": {}, "session_id": "chat/1"}
    run_ids = []
    for _ in range(2):
        response = httpx.post(f"{closed.url}/run/flock", json=body, headers=closed.headers).raise_for_status()
        run_ids.append(response.json()["run_id"])
    page = visit.page(closed, f"run/{run_ids[0]}")
    fact(page, "Session").get_by_role("link", name="chat/1").click()
    expect(page.locator("tbody tr")).to_have_count(2)
    for run_id in run_ids:
        expect(page.locator("tbody")).to_contain_text(run_id[-12:])
    expect(page.get_by_label("Session")).to_have_value("chat/1")
    page.get_by_role("button", name="Clear filters").click()
    expect(page.get_by_label("Session")).to_have_count(0)
    expect(page).to_have_url(re.compile("#/runs$"))


# Webhooks


REPORTED = """
from datetime import timedelta

from flock.core import Flock
from flock.web import webhooks

webhooks.RETRIED_FOR = timedelta(0)  # given up after the first try
flock = Flock("reported")

@flock.agent
async def echo(text: str) -> str:
    return text
"""


class Receiver(socketserver.StreamRequestHandler):
    """Answers with `answer`, and keeps the bodies that it accepts."""

    answer = b"<img src=x onerror=\"document.title = 'pwned'\">\r\n\r\n"
    accepted: ClassVar[list[Any]] = []

    def handle(self) -> None:
        length = 0
        while line := self.rfile.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        body = json.loads(self.rfile.read(length))
        if b" 204 " in self.answer:
            self.accepted.append(body)
        self.wfile.write(self.answer)


def test_a_webhook_that_was_given_up_is_seen_by_an_admin_and_sent_again(visit: Visit, tmp_path: Path) -> None:
    """Its receiver is dead, then answers with a script, and then works. Only an admin has the tab."""
    (script := tmp_path / "reported.py").write_text(REPORTED)
    keys = {name: new_key() for name in ("ann", "ops:admin")}
    port = free_port()
    serve = flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), "--ui")
    serve += ["--webhook-url", f"http://127.0.0.1:{port}/secret"]
    env = {"FLOCK_API_KEYS": ",".join(f"{name}={key}" for name, key in keys.items()), "FLOCK_WEBHOOK_SECRETS": SECRET}
    with running(*serve, **env) as server:
        ann, admin = (Site(tmp_path, server.url, "", key) for key in keys.values())
        run_id = ann.run("echo", text="hi")
        page = visit.page(admin)
        page.get_by_role("link", name="Webhooks").click()
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name="run.completed"))
        expect(row).to_contain_text(f"given_up Retry127.0.0.1:{port}1")
        expect(row).to_contain_text("ConnectError")
        expect(page.locator("main")).not_to_contain_text("secret")
        with socketserver.ThreadingTCPServer(("127.0.0.1", port), Receiver) as receiver:
            threading.Thread(target=receiver.serve_forever).start()
            row.get_by_role("button", name="Retry").click()
            expect(row).to_contain_text("<img src=x onerror=")
            expect(row.locator("img")).to_have_count(0)
            assert Axe().run(page).violations_count == 0
            expect(page).to_have_title(re.compile("^Webhooks · "))
            Receiver.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
            row.get_by_role("button", name="Retry").press("Enter")
            expect(row).to_contain_text("sent")
            receiver.shutdown()
        assert [event["data"]["run_id"] for event in Receiver.accepted] == [run_id]
        page.get_by_label("Status").select_option("given_up")
        expect(page.get_by_text("Nothing matches these filters.")).to_be_visible()
        page.close()  # before the server stops
        visit.expected.append("status of 403")
        context = visit.context(ann)
        with context.expect_event("response", lambda response: response.url.endswith("/webhooks?limit=1")):
            page = visit.page(ann, "runs", context)
        expect(page.get_by_role("link", name=run_id[-12:])).to_be_visible()
        expect(page.get_by_role("link", name="Webhooks", include_hidden=True)).to_be_hidden()
        page.close()

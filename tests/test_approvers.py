"""Who may answer a question, and that an answer belongs to what was asked."""

import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import msgspec
import pytest
from msgspec.structs import replace
from starlette.requests import HTTPConnection

from flock.agents.tools import Tool
from flock.core import Flock
from flock.errors import CallNotFound, Conflict, DefinitionError, Forbidden, RunNotFound, StaleAnswer
from flock.runs import Batch, BatchOptions, Engine, Principal, QuestionFilter, QuestionPage, Run, RunContext, RunStatus
from flock.steps.identity import asking_call
from flock.store import statements
from flock.store.migrations import MIGRATIONS
from flock.testing import FakeModel, Reply
from flock.web.auth import KeyRing
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for
from tests.support.engines import OpenEngine, ended, sqlite_of, until, until_run
from tests.support.http import check_problem, client_of, events_in
from tests.support.servers import Served
from tests.support.stores import undo
from tests.test_approval import Till
from tests.test_ask import asked, json_of, result_of, waiting
from tests.test_tools import flock_of

pytestmark = pytest.mark.anyio

APPROVED = json_of({"approved": True})
DONE = Reply({"a": "done"})


def refund(amount: float) -> Reply:
    return Reply(calls=[("refund", {"amount": amount})])


def shop(till: Till, **approval: Any) -> Flock:
    return flock_of(Tool(till.refund, needs_approval=True, **approval))


async def cancelled(engine: Engine, run_id: str) -> None:
    await engine.cancel_run(run_id)
    await until_run(engine, run_id, lambda run: run.status is RunStatus.CANCELLED)


async def again(engine: Engine, run: Run, **options: Any) -> Run:
    """Cancel and retry a run, and return it when it asks again."""
    await cancelled(engine, run.run_id)
    await engine.retry_run(run.run_id, **options)
    return await waiting(engine, run.run_id)


async def item_that_asks(engine: Engine, batch: Batch) -> Run:
    with anyio.fail_after(PATIENCE_S):
        while not (found := await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING])):  # noqa: ASYNC110
            await anyio.sleep(0.02)
    return found[0]


def open_ids(exc: pytest.ExceptionInfo[StaleAnswer]) -> list[str]:
    return [question.call_id for question in exc.value.open_questions]


# An answer belongs to what was asked


async def test_an_approval_of_an_old_page_does_not_pay_what_a_retry_asks_for(
    model: FakeModel, open_engine: OpenEngine
) -> None:
    till = Till()
    model.replies = [refund(40), refund(8000), DONE]
    async with open_engine(shop(till), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        (old,) = run.waiting_for
        run = await again(engine, run, calls="again")
        (new,) = run.waiting_for
        assert json.loads(bytes(new.arguments)) == {"amount": 8000}  # type: ignore[arg-type]
        for output in (APPROVED, json_of({"approved": False})):
            with pytest.raises(StaleAnswer, match="no longer asks the question") as caught:
                await engine.answer_call(run.run_id, old.call_id, output)
            assert open_ids(caught) == [new.call_id]
        assert till.paid == []
        await engine.answer_call(run.run_id, new.call_id, APPROVED)
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
        assert till.paid == [8000]
        await engine.answer_call(run.run_id, new.call_id, APPROVED)
        with pytest.raises(StaleAnswer, match="It asks nothing now"):
            await engine.answer_call(run.run_id, old.call_id, APPROVED)
        with pytest.raises(CallNotFound):
            await engine.answer_call(run.run_id, old.call_id[:-1] + "x", APPROVED)


@pytest.mark.parametrize("calls", ["keep", "again"])
async def test_an_equal_question_of_a_retry_has_another_id(
    calls: Any, model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [refund(40)] * (1 if calls == "keep" else 2)
    async with open_engine(shop(Till()), transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"})
        (old,) = run.waiting_for
        run = await again(engine, run, calls=calls)
        (new,) = run.waiting_for
        assert (new.question, new.arguments) == (old.question, old.arguments)
        assert new.call_id != old.call_id
        with pytest.raises(StaleAnswer) as caught:
            await engine.answer_call(run.run_id, old.call_id, APPROVED)
        assert open_ids(caught) == [new.call_id]
        await cancelled(engine, run.run_id)


async def test_a_question_that_a_retry_keeps_has_its_id_and_its_answer(open_engine: OpenEngine) -> None:
    flock, failures = Flock(), [True]

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        first = await context.ask("First?", int)
        if failures:
            failures.pop()
            raise ValueError
        return [first, await context.ask("Second?", int)]

    async with open_engine(flock) as engine:
        run = await asked(engine, "work")
        (first,) = run.waiting_for
        await engine.answer_call(run.run_id, first.call_id, json_of(1))
        assert (await engine.wait(run.run_id)).status is RunStatus.FAILED
        await engine.retry_run(run.run_id)
        run = await waiting(engine, run.run_id)
        await engine.answer_call(run.run_id, first.call_id, json_of(1))
        with pytest.raises(Conflict, match="already been answered otherwise"):
            await engine.answer_call(run.run_id, first.call_id, json_of(2))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(2))
        assert await result_of(engine, run.run_id) == [1, 2]
        calls = [call for call in (await engine.get_calls(run))[0] if call.kind == "question"]
    assert [call.call_id for call in calls] == [first.call_id, run.waiting_for[0].call_id]


async def test_a_question_keeps_what_it_asked_first_and_its_id_while_its_step_runs_again(
    open_engine: OpenEngine,
) -> None:
    flock, amounts = Flock(), iter(range(40, 50))

    @flock.agent
    async def work(context: RunContext) -> list[bool]:
        async with anyio.create_task_group() as tasks:
            answers: dict[str, bool] = {}

            async def ask(name: str, text: str) -> None:
                answers[name] = await context.ask(text, bool, name=name)

            tasks.start_soon(ask, "pay", f"Pay {next(amounts)} €?")
            tasks.start_soon(ask, "send", "Send?")
        return [answers["pay"], answers["send"]]

    async with open_engine(flock) as engine:
        run = await asked(engine, "work", count=2)
        pay, send = run.waiting_for
        await engine.answer_call(run.run_id, send.call_id, json_of(False))
        run = await waiting(engine, run.run_id)
        assert (pay.question, run.waiting_for) == ("Pay 40 €?", (pay,))
        await engine.answer_call(run.run_id, pay.call_id, json_of(True))
        assert await result_of(engine, run.run_id) == [True, False]


async def test_an_answer_that_is_sent_again_does_not_answer_the_same_question_of_the_next_step(
    open_engine: OpenEngine,
) -> None:
    flock = Flock()

    @flock.agent(next_agent="second")
    async def first(context: RunContext) -> bool:
        return await context.ask("Pay 40 €?", bool)

    @flock.agent
    async def second(result: bool, context: RunContext) -> list[bool]:
        return [result, await context.ask("Pay 40 €?", bool)]

    async with open_engine(flock) as engine:
        run = await asked(engine, "first")
        (old,) = run.waiting_for
        await engine.answer_call(run.run_id, old.call_id, json_of(True))
        run = await waiting(engine, run.run_id)
        (new,) = run.waiting_for
        await engine.answer_call(run.run_id, old.call_id, json_of(True))
        assert (await engine.get_run(run.run_id)).waiting_for == (new,)
        await engine.answer_call(run.run_id, new.call_id, json_of(False))
        assert await result_of(engine, run.run_id) == [True, False]


async def test_the_ids_of_questions_tell_apart_what_they_ask(model: FakeModel, open_engine: OpenEngine) -> None:
    """Only the arguments differ, or only the tool, or only the text behind a name."""
    till, texts = Till(), iter(["Pay 40 €?", "Pay 41 €?"])
    flock = flock_of(Tool(till.refund, needs_approval=True), Tool(till.refund, name="credit", needs_approval=True))
    calls = [[("refund", {"amount": 40})], [("refund", {"amount": 41})], [("credit", {"amount": 41})]]
    model.replies = [Reply(calls=each) for each in calls]

    @flock.agent
    async def work(context: RunContext) -> bool:
        return await context.ask(next(texts), bool, name="pay")

    def without_try(run: Run) -> str:
        return run.waiting_for[0].call_id.rpartition(".")[2]

    async with open_engine(flock, transport=model.transport) as engine:
        runs = [await asked(engine, "work") for _ in range(2)]
        assert without_try(runs[0]) != without_try(runs[1])
        runs += [await asked(engine, "ask", {"q": "?"}) for _ in calls]
        assert len(set(map(without_try, runs))) == 5
        for run in runs:
            await engine.cancel_run(run.run_id)


async def test_the_questions_of_an_item_belong_to_what_it_asks(model: FakeModel, open_engine: OpenEngine) -> None:
    till = Till()
    model.replies = [refund(40), refund(8000), DONE]
    async with open_engine(shop(till), transport=model.transport) as engine:
        batch = await engine.submit_batch("ask", [{"q": "?"}], BatchOptions())

        item = await item_that_asks(engine, batch)
        (old,) = item.waiting_for
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
        await engine.retry_batch(batch.batch_id, calls="again")
        item = await item_that_asks(engine, batch)
        (new,) = item.waiting_for
        with pytest.raises(StaleAnswer) as caught:
            await engine.answer_call(item.run_id, old.call_id, APPROVED)
        assert open_ids(caught) == [new.call_id]
        with pytest.raises(CallNotFound):
            await engine.answer_call(item.run_id, "ask:other", APPROVED)
        await engine.answer_call(item.run_id, new.call_id, APPROVED)
        assert (await ended(engine, batch)).status is RunStatus.COMPLETED
    assert till.paid == [8000]


# Who may answer

ANN = Principal(name="ann")
BOB, CAT = Principal(name="bob", roles=["refunds"]), Principal(name="cat", roles=["refunds", "other"])
EVE, OPS = Principal(name="eve", roles=["other"]), Principal(name="ops", admin=True)
ROOT = Principal(name="root", admin=True, roles=["refunds"])
EVERYBODY = {principal.name: principal for principal in (ANN, BOB, CAT, EVE, OPS, ROOT)}
KEYS = {
    "ann": "key-of-ann-123456",
    "bob:role:refunds": "key-of-bob-123456",
    "cat:role:refunds:role:other": "key-of-cat-123456",
    "eve:role:other": "key-of-eve-123456",
    "ops:admin": "key-of-ops-123456",
    "root:admin:role:refunds": "key-of-root-123456",
}


def of_host(connection: HTTPConnection) -> Principal | None:
    key = connection.headers.get("authorization", "")
    return EVERYBODY.get(key.removeprefix("Bearer key-of-").removesuffix("-123456"))


class Shop:
    """Apps over engines, and the requests of each principal, which go to one app after the other."""

    def __init__(self, *apps: FlockAPI) -> None:
        self.app = apps[0]
        self.clients: Iterator[httpx.AsyncClient] = itertools.cycle(map(client_of, apps))

    async def send(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        return await next(self.clients).request(
            method, path, headers={"Authorization": f"Bearer key-of-{who}-123456"}, **options
        )

    async def ask(self, who: str = "ann", **members: Any) -> Any:
        """Start a run of *who*, and return it when it waits."""
        body = {"agent_name": "ask", "inputs": {"q": "?"}, "async_run": True, **members}
        response = await self.send(who, "POST", "/run/flock", json=body)
        assert response.status_code == 202, response.text
        return await self.waiting(response.json()["run_id"], who)

    async def waiting(self, run_id: str, who: str = "ann") -> Any:
        run = (await self.send(who, "GET", f"/run/{run_id}?wait=60")).json()
        assert run["status"] == "waiting", run
        return run

    async def answer(self, who: str, run: Any, output: Any, call_id: str | None = None) -> httpx.Response:
        path = f"/run/{run['run_id']}/calls/{quote(call_id or run['waiting_for'][0]['call_id'])}"
        return await self.send(who, "POST", path, json={"output": output})

    async def done(self, run: Any, who: str = "ann") -> Any:
        return (await self.send(who, "GET", f"/run/{run['run_id']}?wait=60")).json()


@pytest.fixture(params=["keys", "auth"])
def access(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"api_keys": KEYS} if request.param == "keys" else {"auth": of_host}


OpenShop = Callable[..., AbstractAsyncContextManager[Shop]]


@pytest.fixture(params=["embedded", "workers", "temporal"])
def open_shop(request: pytest.FixtureRequest, access: dict[str, Any], model: FakeModel, tmp_path: Path) -> OpenShop:
    """Open an app, or as many as a server with ``--workers 2`` has: two on one store."""

    @asynccontextmanager
    async def opened(flock: Flock) -> AsyncIterator[Shop]:
        async with AsyncExitStack() as stack:
            apps = list[FlockAPI]()
            count, store = (2, tmp_path / "flock.db") if request.param == "workers" else (1, ":memory:")
            for _ in range(count):
                opening = engine_for(request, flock, store=store, transport=model.transport)
                apps.append(create_app(flock, engine=await stack.enter_async_context(opening), **access))
                await stack.enter_async_context(apps[-1].lifespan())
            yield Shop(*apps)

    return opened


YES, NO = {"approved": True}, {"approved": False, "reason": "Too much."}


async def test_only_the_role_may_answer_and_it_sees_nothing_but_the_question(
    open_shop: OpenShop, model: FakeModel
) -> None:
    till = Till()
    model.replies = [refund(40), DONE]
    async with open_shop(shop(till, approver="refunds")) as at:
        run = await at.ask(session_id="s")
        (question,) = run["waiting_for"]
        path = f"/run/{run['run_id']}/calls/{quote(question['call_id'])}"
        assert question["answerer"] == "refunds"
        for who, status in (("ann", 403), ("ops", 403), ("eve", 404)):
            check_problem(await at.answer(who, run, YES), status)
        check_problem(await at.answer("bob", run, YES, call_id=question["call_id"][:-1] + "_"), 404)
        unknown = {**run, "run_id": "01a21894-71c3-7c0a-80ab-b29b3cf90781"}
        check_problem(await at.answer("eve", unknown, YES), 404)
        for who in ("bob", "cat"):
            seen = (await at.send(who, "GET", path)).json()
            assert seen.items() >= question.items()
            assert (seen["status"], seen["requested_by"], seen["agent_name"]) == ("open", "ann", "ask")
            for method, of_run in (("GET", ""), ("HEAD", ""), ("DELETE", ""), ("GET", "/events")):
                response = await at.send(who, method, f"/run/{run['run_id']}{of_run}")
                assert response.status_code == 404, (method, of_run)
            check_problem(await at.send(who, "GET", "/session/s"), 404)
            check_problem(await at.send(who, "DELETE", "/session/s"), 404)
            assert (await at.send(who, "GET", "/runs?session_id=s")).json()["runs"] == []
            for command in ("cancel", "retry", "messages/x"):
                body = {"json": {"message": 1}} if command == "messages/x" else {}
                check_problem(await at.send(who, "POST", f"/run/{run['run_id']}/{command}", **body), 404)
            assert (await at.send(who, "GET", "/runs")).json()["runs"] == []
        assert till.paid == []
        response = await at.answer("bob", run, YES)
        answered = response.json()
        assert response.status_code == 200, answered
        assert "inputs" not in answered
        assert "steps" not in answered
        assert (answered["status"], answered["answered_by"], answered["output"]) == ("answered", "bob", YES)
        done = await at.done(run)
        assert (done["status"], till.paid) == ("completed", [40])
        assert (await at.answer("bob", run, YES)).json() == answered
        call = next(call for call in done["steps"][0]["calls"] if call["kind"] == "question")
        assert (call["call_id"], call["answered_by"]) == (question["call_id"], "bob")
        assert call["answered_at"] == answered["answered_at"] == call["completed_at"]
        assert call["arguments"] == {"question": question["question"], "arguments": {"amount": 40}}
        events = events_in((await at.send("ann", "GET", f"/run/{run['run_id']}/events")).text)
        event = next(event["data"] for event in events if event["data"].get("kind") == "question")
        assert (event["answered_by"], event["arguments"]) == ("bob", call["arguments"])


async def test_the_role_sees_nothing_of_a_batch_but_the_questions_of_its_items(
    open_shop: OpenShop, model: FakeModel
) -> None:
    till = Till()
    model.replies = [refund(40), DONE]
    async with open_shop(shop(till, approver="refunds")) as at:
        body = {"agent_name": "ask", "batch_inputs": [{"q": "?"}]}
        path = f"/batch/{(await at.send('ann', 'POST', '/run/batch', json=body)).json()['batch_id']}"
        with anyio.fail_after(PATIENCE_S):
            while not (found := (await at.send("bob", "GET", "/questions?wait=5")).json()["questions"]):
                pass
        for method, of_batch in (
            *(("GET", ""), ("HEAD", ""), ("DELETE", ""), ("GET", "/results"), ("GET", "/events")),
            *(("POST", "/cancel"), ("POST", "/retry")),
        ):
            response = await at.send("bob", method, path + of_batch)
            assert response.status_code == 404, (method, of_batch)
        assert (await at.send("bob", "GET", "/batches")).json()["batches"] == []
        check_problem(await at.send("bob", "GET", f"/run/{found[0]['run_id']}"), 404)
        assert (await at.answer("bob", found[0], YES, found[0]["call_id"])).status_code == 200
        assert (await at.send("ann", "GET", f"{path}?wait=60")).json()["status"] == "completed"
    assert till.paid == [40]


async def test_of_two_approvers_one_wins_and_the_other_reads_who_it_was(open_shop: OpenShop, model: FakeModel) -> None:
    till = Till()
    model.replies = [refund(40), DONE]
    async with open_shop(shop(till, approver="refunds")) as at:
        run = await at.ask()
        responses = dict[str, httpx.Response]()

        async def send(who: str) -> None:
            responses[who] = await at.answer(who, run, YES)

        async with anyio.create_task_group() as tasks:
            for who in ("bob", "cat"):
                tasks.start_soon(send, who)
        assert sorted(response.status_code for response in responses.values()) == [200, 409]
        first = next(who for who, response in responses.items() if response.status_code == 200)
        other = next(who for who in responses if who != first)
        problem = check_problem(responses[other], 409)
        assert f"answered by '{first}'" in problem["detail"]
        assert problem["waiting_for"] == []
        assert (await at.done(run))["status"] == "completed"
    assert till.paid == [40]


async def test_four_eyes_exclude_who_started_or_retried_the_run(open_shop: OpenShop, model: FakeModel) -> None:
    till = Till()
    model.replies = [refund(40), DONE]
    async with open_shop(shop(till, approver="refunds", four_eyes=True)) as at:
        run = await at.ask("bob")
        check_problem(await at.answer("bob", run, YES), 403)
        check_problem(await at.answer("ops", run, YES), 403)
        assert (await at.answer("cat", run, YES)).status_code == 200
        assert (await at.done(run, "bob"))["status"] == "completed"
    assert till.paid == [40]


@pytest.mark.parametrize("approver", ["refunds", None])
async def test_four_eyes_exclude_the_admin_who_has_retried_the_run(
    approver: str | None, open_shop: OpenShop, model: FakeModel
) -> None:
    """An old page's answer is refused with what is asked now, to those who may see it."""
    till = Till()
    model.replies = [refund(40), DONE]
    async with open_shop(shop(till, approver=approver, four_eyes=True)) as at:
        old = await at.ask("cat")
        assert (await at.send("root", "POST", f"/run/{old['run_id']}/cancel")).status_code in (200, 202)
        assert (await at.done(old, "cat"))["status"] == "cancelled"
        assert (await at.send("root", "POST", f"/run/{old['run_id']}/retry")).status_code == 202
        run = await at.waiting(old["run_id"], "cat")
        problem = check_problem(await at.answer("root", run, YES), 403)
        assert "started or retried" in problem["detail"]
        check_problem(await at.answer("cat", run, YES), 403)
        other = "bob" if approver else "ops"
        problem = check_problem(await at.answer(other, old, YES), 409)
        assert problem["waiting_for"] == run["waiting_for"]
        assert run["waiting_for"][0]["call_id"] in problem["detail"]
        assert till.paid == []
        assert (await at.answer(other, run, YES)).status_code == 200
        assert (await at.done(run, "cat"))["status"] == "completed"
    assert till.paid == [40]


async def test_a_stale_answer_shows_of_what_is_asked_now_only_what_its_sender_may_see(open_shop: OpenShop) -> None:
    flock = Flock()

    @flock.agent
    async def ask(q: str, context: RunContext) -> str:
        size = await context.ask("Which size?", str, answerer="refunds")
        return f"{size} {await context.ask('Send it?', bool, answerer='other')}"

    async with open_shop(flock) as at:
        first = await at.ask()
        assert (await at.answer("bob", first, "small")).status_code == 200
        run = await at.waiting(first["run_id"])
        for who, shown in (("bob", []), ("cat", run["waiting_for"])):
            problem = check_problem(await at.answer(who, first, "large"), 409)
            assert (problem["waiting_for"], "Send it?" in problem["detail"]) == (shown, bool(shown))
        assert (await at.answer("eve", run, True)).status_code == 200
        assert (await at.done(run))["result"] == {"result": "small True"}


async def test_an_approval_of_who_retries_the_run_counts_only_if_its_tool_has_started(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    """Of two calls of one reply, the second stops the process, so to speak, before the first one is paid again."""
    paid, failures = list[float](), [True]

    async def pay(amount: float) -> str:
        paid.append(amount)
        if amount == 50 and failures:
            failures.pop()
            await anyio.sleep_forever()
        return "paid"

    model.replies = [Reply(calls=[("pay", {"amount": 40}), ("pay", {"amount": 50})]), DONE]
    flock = flock_of(Tool(pay, needs_approval=True, approver="refunds", four_eyes=True))
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"}, count=2, principal="ann")
        first, second = run.waiting_for
        await engine.answer_call(run.run_id, first.call_id, APPROVED, BOB)
        await until(lambda: paid == [40])
        await waiting(engine, run.run_id)
        await engine.answer_call(run.run_id, second.call_id, APPROVED, BOB)
        await until(lambda: paid == [40, 50])
        await cancelled(engine, run.run_id)
        await engine.retry_run(run.run_id, by=BOB)
        run = await waiting(engine, run.run_id)
        (again,) = run.waiting_for
        assert json.loads(bytes(again.arguments)) == {"amount": 50}  # type: ignore[arg-type]
        with pytest.raises(StaleAnswer):
            await engine.answer_call(run.run_id, second.call_id, APPROVED, BOB)
        with pytest.raises(Forbidden):
            await engine.answer_call(run.run_id, again.call_id, APPROVED, BOB)
        await engine.answer_call(run.run_id, first.call_id, APPROVED, BOB)  # it is kept, since its tool has ended
        await engine.answer_call(run.run_id, again.call_id, APPROVED, CAT)
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert paid == [40, 50, 50]


async def test_edits_are_refused_where_a_role_is_named_unless_they_are_allowed(
    open_shop: OpenShop, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    till = Till()
    model.replies = [refund(40), DONE, refund(40), DONE]
    edited = {"approved": True, "arguments": {"amount": 8000, "order": "A7"}}
    async with open_shop(shop(till, approver="refunds")) as at:
        run = await at.ask()
        problem = check_problem(await at.answer("bob", run, edited), 422)
        assert [error["pointer"] for error in problem["errors"]] == ["/output/arguments"]
        assert (await at.answer("bob", run, YES)).status_code == 200
        assert (await at.done(run))["status"] == "completed"
    caplog.set_level("INFO", "flock")
    async with open_shop(shop(till, approver="refunds", may_edit=True)) as at:
        run = await at.ask()
        wrong = {"approved": True, "arguments": {"amount": "8000"}}
        problem = check_problem(await at.answer("bob", run, wrong), 422)
        assert problem["errors"][0]["pointer"] == "/output/arguments/amount"
        assert (await at.answer("bob", run, edited)).status_code == 200
        done = await at.done(run)
        call = next(call for call in done["steps"][0]["calls"] if call["kind"] == "question")
        assert call["arguments"]["arguments"] == {"amount": 40}
        assert call["result"]["arguments"] == edited["arguments"]
        events = events_in((await at.send("ann", "GET", f"/run/{run['run_id']}/events")).text)
        event = next(event["data"] for event in events if event["data"].get("kind") == "question")
        assert [event[name] for name in ("arguments", "result")] == [call[name] for name in ("arguments", "result")]
    assert till.paid == [40, 8000]
    assert any(
        f"'bob' has answered the question {call['call_id']}: approved, with" in message and "8000" in message
        for message in caplog.messages
    )


async def test_a_question_of_a_program_names_who_may_answer_it(open_shop: OpenShop) -> None:
    """A role is not enough for the other questions of the run, which its owner answers."""
    flock = Flock()

    @flock.agent
    async def ask(q: str, context: RunContext) -> str:
        size = await context.ask("Which size?", str)
        return f"{size} {await context.ask('Send it?', bool, answerer='refunds')}"

    async with open_shop(flock) as at:
        run = await at.ask()
        check_problem(await at.answer("bob", run, "small"), 404)
        assert (await at.answer("ann", run, "small")).status_code == 200
        run = await at.waiting(run["run_id"])
        check_problem(await at.answer("ann", run, True), 403)
        assert (await at.answer("bob", run, True)).status_code == 200
        done = await at.done(run)
    assert done["result"] == {"result": "small True"}


async def test_an_item_is_approved_by_the_role_and_not_by_who_has_retried_its_batch(
    open_engine: OpenEngine, model: FakeModel
) -> None:
    till = Till()
    model.replies = [refund(40), DONE]
    flock = shop(till, approver="refunds", four_eyes=True)
    async with open_engine(flock, transport=model.transport) as engine:
        batch = await engine.submit_batch("ask", [{"q": "?"}], BatchOptions(), principal="ann")
        item = await item_that_asks(engine, batch)
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
        await engine.retry_batch(batch.batch_id, by=BOB)
        item = await item_that_asks(engine, batch)
        call_id = item.waiting_for[0].call_id
        with pytest.raises(RunNotFound):
            await engine.answer_call(item.run_id, call_id, APPROVED, EVE)
        with pytest.raises(RunNotFound):
            await engine.get_question(item.run_id, call_id, EVE)
        with pytest.raises(Forbidden, match="started or retried"):
            await engine.answer_call(item.run_id, call_id, APPROVED, BOB)
        await engine.answer_call(item.run_id, call_id, APPROVED, CAT)
        assert (await ended(engine, batch)).status is RunStatus.COMPLETED
        asked = await engine.get_question(item.run_id, call_id, BOB)
        assert (asked.status, asked.answered_by, asked.principal) == ("answered", "cat", "ann")
    assert till.paid == [40]


# For whom a tool acts


async def test_a_tool_knows_for_whom_it_acts(open_shop: OpenShop, model: FakeModel) -> None:
    """As the request has identified its caller, also when the step runs again, and in an agent that it calls."""
    seen = list[tuple[Principal | None, str | None, str, str | None]]()

    def look(context: RunContext) -> str:
        """Look."""
        seen.append((context.principal, context.session_id, context.run_id, context.request_id))
        return "seen"

    flock = flock_of(Tool(look, needs_approval=True))
    model.replies = [Reply(calls=[("look", {})]), DONE]
    async with open_shop(flock) as at:
        body = {"agent_name": "ask", "inputs": {"q": "?"}, "async_run": True, "session_id": "talk"}
        run = (await at.send("cat", "POST", "/run/flock", json=body)).json()
        run = await at.waiting(run["run_id"], "cat")
        assert (await at.answer("cat", run, YES)).status_code == 200
        assert (await at.done(run, "cat"))["status"] == "completed"
    assert seen == [(CAT, "talk", run["run_id"], run["request_id"])]


async def test_an_item_acts_for_who_has_sent_its_batch(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def who(context: RunContext) -> list[str]:
        principal = context.principal
        return [] if principal is None else [principal.name, *principal.roles]

    async with open_engine(flock) as engine:
        for principal, expected in ((CAT, ["cat", "refunds", "other"]), ("ann", ["ann"]), (None, [])):
            batch = await engine.submit_batch("who", [{}], BatchOptions(), principal=principal)
            await ended(engine, batch)
            (item,) = await engine.get_items(batch.batch_id)
            assert item.value == {"result": expected}


# The start


APPROVALS = pytest.mark.parametrize("approval", [{"approver": "refunds"}, {"four_eyes": True}], ids=str)


@pytest.mark.parametrize("options", [{}, {"auth": "host"}, {"auth": "anybody"}], ids=str)
@APPROVALS
async def test_an_app_that_identifies_nobody_does_not_start_with_a_tool_that_names_its_approvers(
    options: Any, approval: Any
) -> None:
    flock = shop(Till(), **approval)
    with pytest.raises(DefinitionError, match=r"cannot tell callers apart\. Pass api_keys="):
        create_app(flock, **options)
    later = Flock()
    app = create_app(later, **options)
    later.add_agent(flock.agents["ask"])
    with pytest.raises(DefinitionError, match="cannot tell callers apart"):
        async with app.lifespan():
            pass


@APPROVALS
def test_a_program_that_answers_itself_needs_no_principals(approval: Any) -> None:
    till = Till()
    with FakeModel([refund(40), DONE]):
        result = shop(till, **approval).run("ask", {"q": "?"}, on_question=lambda question: YES)
    assert (result, till.paid) == ({"a": "done"}, [40])


async def test_without_principals_a_question_with_a_role_is_not_answered_over_http(model: FakeModel) -> None:
    """A program may ask any role, and only the start of the app can tell."""
    flock = Flock()

    @flock.agent
    async def ask(context: RunContext) -> bool:
        return await context.ask("Send it?", bool, answerer="refunds")

    app = create_app(flock, auth="anybody")
    async with app.lifespan(), client_of(app) as client:
        run = (await client.post("/run/flock", json={"agent_name": "ask", "inputs": {}})).json()
        path = f"/run/{run['run_id']}/calls/{quote(run['waiting_for'][0]['call_id'])}"
        check_problem(await client.post(path, json={"output": True}), 403)
        assert (await client.get(path)).json()["status"] == "open"


def test_a_role_that_no_key_has_is_a_warning_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(shop(Till(), approver="nobody"), api_keys=KEYS)
    app.warn_of_problems()
    (message,) = [message for message in caplog.messages if "nobody" in message]
    assert message == (
        "No API key has the role 'nobody', so nobody can approve calls of the tool 'refund' of the agent 'ask'. Add it "
        "to a key: NAME:role:nobody=KEY"
    )


@pytest.mark.parametrize("role", ["", "a,b", "a b", "a\u202eb", "x" * 4096, "ä", 1, None], ids=repr)
def test_a_name_that_is_no_role_is_refused(role: Any) -> None:
    with pytest.raises(ValueError, match="is not the name of a role") as caught:
        Principal(name="bob", roles=[role])
    assert len(str(caught.value)) < 300
    if role is not None:
        with pytest.raises(DefinitionError, match="is not the name of a role"):
            Tool(Till().refund, needs_approval=True, approver=role)
    if isinstance(role, str):
        with pytest.raises(DefinitionError, match="is not") as refused:
            KeyRing({f"bob:role:{role}": "key-of-bob-123456"})
        assert len(str(refused.value)) < 600


def test_the_roles_of_a_principal_are_not_one_text() -> None:
    with pytest.raises(TypeError, match="must be a sequence, such as"):
        Principal(name="bob", roles="refunds")
    assert Principal(name="bob", roles=["a", "b", "a"]).roles == ("a", "b"), "or its questions would be listed twice"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"approver": "refunds"}, "approver= has no effect without needs_approval="),
        ({"four_eyes": True}, "four_eyes= has no effect without needs_approval="),
        ({"needs_approval": True, "on_expiry": "deny"}, "on_expiry='deny' has no effect without expires_s="),
        ({"needs_approval": True, "on_expiry": "allow"}, "on_expiry= must be 'fail' or 'deny', not 'allow'"),
        ({"needs_approval": True, "expires_s": 0}, "expires_s= must be above 0"),
    ],
)
def test_an_approval_that_cannot_work_is_an_error_at_the_definition(options: Any, error: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        Tool(Till().refund, **options)
    assert error in str(caught.value)


# The list of open questions


def asking_flock() -> Flock:
    """A flock whose agent asks somebody with a role, or its owner, whichever its input says."""
    flock = Flock("inbox")

    @flock.agent
    async def ask(q: str, context: RunContext) -> bool:
        return await context.ask(f"{q}?", bool, answerer=q or None)

    @flock.agent
    async def other(q: str, context: RunContext) -> bool:
        return await context.ask(f"{q}?", bool, answerer=q or None)

    return flock


async def listed(at: Shop, who: str, **query: Any) -> list[str]:
    response = await at.send(who, "GET", "/questions", params=query)
    assert response.status_code == 200, response.text
    return [f"{each['agent_name']} {each['question']}" for each in response.json()["questions"]]


async def test_everybody_lists_the_questions_that_he_may_answer(open_shop: OpenShop) -> None:
    async with open_shop(asking_flock()) as at:
        for agent_name, role, session in (("ask", "", None), ("ask", "refunds", "s"), ("other", "other", "s")):
            body: Any = {"agent_name": agent_name, "inputs": {"q": role}, "async_run": True, "session_id": session}
            response = await at.send("ann", "POST", "/run/flock", json=body)
            run = await at.waiting(response.json()["run_id"])
        with anyio.fail_after(PATIENCE_S):
            while len(await listed(at, "cat")) < 2:  # noqa: ASYNC110 - the search of a cluster lags
                await anyio.sleep(0.05)
        expected = {
            "ann": ["ask ?"],
            "ops": ["ask ?"],
            "bob": ["ask refunds?"],
            "eve": ["other other?"],
            "cat": ["other other?", "ask refunds?"],
        }
        assert {who: await listed(at, who) for who in expected} == expected
        assert await listed(at, "cat", role="refunds") == ["ask refunds?"]
        assert await listed(at, "cat", agent_name="other") == ["other other?"]
        assert await listed(at, "cat", session_id="none") == []
        assert await listed(at, "cat", session_id="s") == ["other other?", "ask refunds?"]
        assert await listed(at, "ann", session_id="s") == []
        assert await listed(at, "bob", role="other") == []
        page = (await at.send("cat", "GET", "/questions?limit=1")).json()
        assert [each["run_id"] for each in page["questions"]] == [run["run_id"]]
        page = (await at.send("cat", "GET", page["next"])).json()
        assert [each["question"] for each in page["questions"]] == ["refunds?"]
        assert page["next"] is None
        assert (await at.answer("eve", run, True)).status_code == 200
        with anyio.fail_after(PATIENCE_S):
            while await listed(at, "eve"):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        check_problem(await at.send("ann", "GET", "/questions?limit=0"), 422)


async def test_a_client_waits_for_a_question_and_follows_what_happens_to_it(open_shop: OpenShop) -> None:
    async with open_shop(asking_flock()) as at:
        engine, events = at.app.engine, list[tuple[str, str]]()
        has_asked, has_closed, has_response = anyio.Event(), anyio.Event(), anyio.Event()

        async def follow() -> None:
            async with aclosing(engine.question_events(QuestionFilter(by=BOB))) as found:
                async for event in found:
                    if event is not None:
                        events.append((event[0], event[1].question.question))
                        (has_asked if event[0] == "question.asked" else has_closed).set()
                        if has_closed.is_set():
                            return

        responses = list[Any]()

        async def wait() -> None:
            responses.append((await at.send("bob", "GET", "/questions?wait=60")).json())
            has_response.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            tasks.start_soon(wait)
            body = {"agent_name": "ask", "inputs": {"q": "refunds"}, "async_run": True}
            run = (await at.send("ann", "POST", "/run/flock", json=body)).json()
            run = await at.waiting(run["run_id"])
            with anyio.fail_after(PATIENCE_S):
                await has_asked.wait()
                await has_response.wait()
                await at.send("ann", "POST", f"/run/{run['run_id']}/cancel")
                await has_closed.wait()
        assert events == [("question.asked", "refunds?"), ("question.closed", "refunds?")]
        assert [each["run_id"] for each in responses[0]["questions"]] == [run["run_id"]]


async def test_each_client_of_the_stream_of_questions_sees_those_that_it_may_answer() -> None:
    app, texts, listed = create_app(asking_flock(), api_keys=KEYS), {"bob": "", "eve": ""}, list[Any]()
    async with Served(app) as served, httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S) as client:
        at = Shop(app)
        at.clients = itertools.repeat(client)

        async def follow(who: str) -> None:
            headers = {"Authorization": f"Bearer key-of-{who}-123456"}
            async with client.stream("GET", "/questions/events", headers=headers) as response:
                assert response.headers["Content-Type"].startswith("text/event-stream")
                async for text in response.aiter_text():
                    texts[who] += text

        async with anyio.create_task_group() as tasks:
            for who, role in (("bob", "refunds"), ("eve", "other")):
                tasks.start_soon(follow, who)
                run = await at.ask(inputs={"q": role})
                listed += (await at.send(who, "GET", "/questions")).json()["questions"]
                await until(lambda who=who: "asked_at" in texts[who])  # type: ignore[misc]
                await at.send("ann", "POST", f"/run/{run['run_id']}/cancel")
                await until(lambda who=who: "question.closed" in texts[who])  # type: ignore[misc]
            tasks.cancel_scope.cancel()
    for text, open_ in zip(texts.values(), listed, strict=True):
        first, last = events_in(text)
        assert first == {"event": "question.asked", "data": open_}
        assert last == {"event": "question.closed", "data": {name: open_[name] for name in ("run_id", "call_id")}}


async def test_an_inbox_of_10000_questions_is_read_in_pages_and_not_from_its_runs(tmp_path: Path) -> None:
    """The query for a page is searched with an index, and reads nothing of a run but its status."""
    flock = asking_flock()
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        run = await asked(engine, "ask", {"q": "refunds"}, principal="ann")
        store, (question,) = sqlite_of(engine), run.waiting_for

        def fill(db: sqlite3.Connection) -> None:
            columns = [row[1] for row in db.execute("PRAGMA table_info(runs)")]
            columns = [name for name in columns if name not in ("run_id", "waiting_for")]
            ids = [f"{run.run_id[:-5]}{number:05d}" for number in range(10_001)]
            ids = [id_ for id_ in ids if id_ != run.run_id][:10_000]
            names = ", ".join(columns)
            for id_ in ids:
                copy = f"INSERT INTO runs ({names}, run_id) SELECT {names}, ? FROM runs WHERE run_id = ?"
                db.execute(copy, (id_, run.run_id))
            waits = msgspec.json.encode([replace(question, arguments=json_of({"text": "x" * 1000}))])
            db.executemany("UPDATE runs SET waiting_for = ? WHERE run_id = ?", [(waits, id_) for id_ in ids])

        await store.change(fill)
        wanted, found = QuestionFilter(by=BOB, limit=1000), set[str]()
        queries = list[str]()
        store._reader.set_trace_callback(queries.append)
        page = await engine.list_questions(wanted)
        while page:
            assert len(page) <= 1000
            found |= {each.run_id for each in page}
            if not page.has_more:
                break
            page = await engine.list_questions(replace(wanted, after=page[-1].run_id))
        store._reader.set_trace_callback(None)
        assert len(found) == 10_001
        assert queries
        assert [query for query in queries if "FROM runs" in query] == []
        query = statements.open_questions(["role0"], "owner", [])
        values = {"flock": "inbox", "role0": "refunds", "owner": "bob", "after": "~"}
        reads = [row[3] for row in store.read(lambda db: db.execute(f"EXPLAIN QUERY PLAN {query}", values).fetchall())]
    assert not any(line.startswith("SCAN") or "TEMP B-TREE" in line for line in reads), reads


async def test_a_stream_of_questions_reads_only_those_that_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 30 open questions, after changes of other runs, of other processes, and of a run that fails while it asks."""
    flock, reads, events = asking_flock(), list[tuple[int | None, int]](), list[tuple[str, str]]()

    has_seen = anyio.Event()

    async def until_seen() -> None:
        await has_seen.wait()
        raise ValueError

    @flock.agent
    async def fail(q: str, context: RunContext) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(context.ask, f"{q}?", bool)
            await context.call(until_seen)

    async with flock.engine(store=tmp_path / "flock.db") as engine, flock.engine(store=tmp_path / "flock.db") as other:
        for number in range(30):
            await asked(engine, "ask", {"q": ""}, principal=f"ann{number}")
        store = sqlite_of(engine)
        list_questions = store.list_questions

        async def read(flock: str, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
            page = await list_questions(flock, wanted, since)
            reads.append((since, len(page)))
            return page

        monkeypatch.setattr(store, "list_questions", read)

        async def follow() -> None:
            async with aclosing(engine.question_events(QuestionFilter())) as found:
                async for event in found:
                    if event is not None:
                        events.append((event[0], event[1].agent_name))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow)
            await until(lambda: len(events) == 30)
            for each in (engine, other):
                run = await asked(each, "ask", {"q": "refunds"}, principal="ann")
                await until(lambda: events[30:] == [("question.asked", "ask")])
                await each.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True), BOB)
                await until(lambda: events[30:] == [("question.asked", "ask"), ("question.closed", "ask")])
                del events[30:]
            run_id = (await other.submit("fail", {"q": ""})).run_id
            await until(lambda: events[30:] == [("question.asked", "fail")])
            has_seen.set()
            await until(lambda: events[31:] == [("question.closed", "fail")])
            assert (await engine.get_run(run_id)).status is RunStatus.FAILED
            del events[30:]
            batch = await other.submit_batch("ask", [{"q": ""}], BatchOptions())
            await until(lambda: events[30:] == [("question.asked", "ask")])
            await item_that_asks(other, batch)
            await other.cancel_batch(batch.batch_id)
            await until(lambda: events[31:] == [("question.closed", "ask")])
            tasks.cancel_scope.cancel()
    (first, *others) = reads
    assert first == (None, 30)
    assert all(since is not None and count <= 2 for since, count in others), reads


async def test_an_approver_who_may_answer_none_of_many_questions_reads_them_in_bounded_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: FakeModel
) -> None:
    """The one that he may answer is found behind those that he has asked for himself."""
    monkeypatch.setattr("flock.store.waiting.MAX_QUESTIONS_READ", 10)
    model.replies = [refund(40)] * 36
    flock = shop(Till(), approver="refunds", four_eyes=True)
    async with flock.engine(store=tmp_path / "flock.db", transport=model.transport) as engine:
        run = await asked(engine, "ask", {"q": "?"}, principal="ann")
        for _ in range(35):
            await asked(engine, "ask", {"q": "?"}, principal="bob")
        wanted, pages = QuestionFilter(by=BOB), list[QuestionPage]()
        pages.append(await sqlite_of(engine).list_questions(flock.name, wanted))
        while (rest := pages[-1].rest) is not None:
            pages.append(await sqlite_of(engine).list_questions(flock.name, *rest))
        assert [len(page) for page in pages] == [0, 0, 0, 1]
        assert [each.run_id for each in await engine.list_questions(wanted)] == [run.run_id]
        assert await engine.list_questions(replace(wanted, after=run.run_id), wait_s=0.5) == []


@pytest.mark.parametrize("roles", [100, 101, 40_000])
async def test_questions_are_listed_for_who_has_thousands_of_roles(roles: int) -> None:
    by = Principal(name="dan", roles=["refunds", *(f"group-{number}" for number in range(1, roles))])
    async with asking_flock().engine(store=":memory:") as engine:
        runs = [await asked(engine, "ask", {"q": q}, principal="dan") for q in ("", "refunds", "group-99", "other")]
        page = await engine.list_questions(QuestionFilter(by=by, limit=2))
        rest = await engine.list_questions(QuestionFilter(by=by, after=page[-1].run_id))
        assert [each.run_id for each in (*page, *rest)] == [run.run_id for run in reversed(runs[:3])]


async def test_an_app_that_identifies_nobody_lists_the_questions_of_its_owners_only(model: FakeModel) -> None:
    app = create_app(asking_flock(), auth="anybody")
    async with app.lifespan(), client_of(app) as client:
        for role in ("", "refunds"):
            await client.post("/run/flock", json={"agent_name": "ask", "inputs": {"q": role}})
        questions = (await client.get("/questions")).json()["questions"]
    assert [each["question"] for each in questions] == ["?"]


# What they have spent


async def test_an_admin_sees_the_usage_of_everyone_and_others_their_own(open_shop: OpenShop, model: FakeModel) -> None:
    model.replies = [refund(40), DONE, DONE]

    async def usage(who: str, count: int) -> dict[str, int]:
        """Return the tokens of each principal, as soon as they are *count*: on a cluster it may take a moment."""
        with anyio.fail_after(PATIENCE_S):
            while True:
                entries = (await at.send(who, "GET", "/usage?by=principal")).json()["entries"]
                tokens = {each["principal"]: each["usage"]["input_tokens"] for each in entries}
                if sum(tokens.values()) == count:
                    return tokens
                await anyio.sleep(0.05)

    async with open_shop(shop(Till())) as at:
        run = await at.ask()
        assert (await at.answer("ann", run, YES)).status_code == 200
        assert (await at.done(run))["status"] == "completed"
        body = {"agent_name": "ask", "inputs": {"q": "?"}}
        assert (await at.send("bob", "POST", "/run/flock", json=body)).json()["status"] == "completed"
        assert await usage("ops", 30) == {"ann": 20, "bob": 10}
        assert (await usage("ann", 20), await usage("bob", 10), await usage("cat", 0)) == ({"ann": 20}, {"bob": 10}, {})
        check_problem(await at.send("bob", "GET", "/usage?principal=ann"), 403)


# What an earlier version has begun


async def test_a_question_of_an_earlier_version_is_listed_and_answered(tmp_path: Path) -> None:
    """Its id was that of the call. A store of that version has no table of questions."""
    flock, store = asking_flock(), tmp_path / "flock.db"
    async with flock.engine(store=store) as engine:
        run = await asked(engine, "ask", {"q": ""}, principal="ann")
    old_id = asking_call(run.waiting_for[0].call_id)
    with sqlite3.connect(store) as db:
        undo(db, next(number for number, each in enumerate(MIGRATIONS) if "CREATE TABLE questions" in each[0]))
        waits = msgspec.json.encode([replace(run.waiting_for[0], call_id=old_id)])
        db.execute("UPDATE runs SET waiting_for = ?", (waits,))
    db.close()
    async with flock.engine(store=store) as engine:
        assert [each.question.call_id for each in await engine.list_questions(QuestionFilter(by=ANN))] == [old_id]
        with pytest.raises(RunNotFound):
            await engine.answer_call(run.run_id, old_id, json_of(True), BOB)
        await engine.answer_call(run.run_id, old_id, json_of(True), ANN)
        assert await result_of(engine, run.run_id) is True
        asked_before = await engine.get_question(run.run_id, old_id, ANN)
        assert (asked_before.status, asked_before.answered_by) == ("answered", "ann")


async def test_who_has_lost_the_role_since_may_no_longer_answer(model: FakeModel) -> None:
    model.replies = [refund(40), DONE]
    till = Till()
    flock = shop(till, approver="refunds")
    app = create_app(flock, engine=flock.engine(transport=model.transport), api_keys=KEYS)
    async with app.lifespan():
        at = Shop(app)
        run = await at.ask()
        assert app.keys is not None
        app.keys.replace({name.replace("bob:role:refunds", "bob"): key for name, key in KEYS.items()})
        check_problem(await at.answer("bob", run, YES), 404)
        assert (await at.answer("cat", run, YES)).status_code == 200
        assert (await at.done(run))["status"] == "completed"
    assert till.paid == [40]


async def test_an_answer_after_its_time_is_stale(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> bool:
        return await context.ask("Now?", bool, expires_s=3, answerer="refunds")

    async with open_engine(flock) as engine:
        run = await asked(engine, "work", principal="ann")
        call_id = run.waiting_for[0].call_id
        await until_run(engine, run.run_id, lambda run: run.status.is_final)
        with pytest.raises(StaleAnswer, match="can no longer be answered"):
            await engine.answer_call(run.run_id, call_id, json_of(True), BOB)
        assert (await engine.get_question(run.run_id, call_id, BOB)).status == "closed"
        assert await engine.list_questions(QuestionFilter(by=BOB)) == []


@pytest.mark.parametrize("is_known", [True, False], ids=["a run of others", "no run"])
async def test_a_stranger_learns_nothing_from_the_error_about_a_question(is_known: bool, open_shop: OpenShop) -> None:
    """It is the same as for a run that does not exist, whether the id is forged, foreign or right."""
    async with open_shop(asking_flock()) as at:
        body = {"agent_name": "ask", "inputs": {"q": "refunds"}, "async_run": True}
        run = await at.waiting((await at.send("ann", "POST", "/run/flock", json=body)).json()["run_id"])
        run_id = run["run_id"] if is_known else "01a21894-71c3-7c0a-80ab-b29b3cf90781"
        for call_id in (run["waiting_for"][0]["call_id"], "ask:0123456789abcdef@1.0.0123456789abcdef", "x" * 4000):
            for method in ("GET", "POST"):
                path = f"/run/{run_id}/calls/{quote(call_id)}"
                more = {"json": {"output": True}} if method == "POST" else {}
                problem = check_problem(await at.send("eve", method, path, **more), 404)
                expected = f"There is no run with the id '{run_id}'. It was never accepted, or is no longer stored."
                assert (problem["type"], problem["detail"]) == ("urn:flockapi:problem:unknown-run", expected)

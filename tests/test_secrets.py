"""Arguments that are not stored cannot be guessed either: not from ids, in the store, on a cluster, or in answers."""

import base64
import hashlib
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from msgspec.structs import replace

from flock.agents.secret import sealed, unsealed
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.errors import CallError, DefinitionError
from flock.runs import BatchOptions, Engine, Question, Run, RunContext, RunStatus
from flock.steps.identity import DIGEST_CHARS, digest, digest_of, question_id
from flock.testing import FakeModel, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine
from tests.support.http import client_of
from tests.test_approvers import item_that_asks
from tests.test_ask import json_of, waiting
from tests.test_costs import finish

pytestmark = pytest.mark.anyio

PIN = "pin-4711"
#: How often each function was executed.
EXECUTED: dict[str, int] = {}


def candidates() -> Iterator[str]:
    return (f"pin-{n:04}" for n in range(10_000))


async def check_pin(pin: str, attempt: int = 1) -> bool:
    EXECUTED["check_pin"] = EXECUTED.get("check_pin", 0) + 1
    return pin == PIN


async def confirm(pin: str, context: RunContext) -> bool:
    """Ask inside a call whose arguments are secret, so that the id of the question has that of the call."""
    return bool(await context.ask("Is it you?", bool))


def files_in(folder: Path) -> list[str]:
    """Return the contents of the files of a store."""
    return [path.read_bytes().decode("latin-1") for path in folder.glob("flock.db*")]


def guarding() -> Flock:
    flock = Flock("guarding")

    @flock.agent
    async def vault(pin: str, context: RunContext) -> bool:
        EXECUTED["vault"] = EXECUTED.get("vault", 0) + 1
        return pin == PIN

    @flock.agent(next_agent="vault")
    async def door(pin: str) -> dict[str, Any]:
        return {"pin": "handed on"}

    @flock.agent
    async def guard(context: RunContext) -> list[bool]:
        return [
            await context.call(check_pin, PIN, call_keep="result"),
            await context.call(check_pin, PIN, attempt=2, call_keep="result"),
            (await context.run_agent("vault", {"pin": PIN}, call_keep="result"))["result"],
            await context.call(confirm, PIN, call_keep="result"),
        ]

    return flock


def guesses(pin: str) -> Iterator[str]:
    """Yield what an id might have of a candidate: a digest of what is in it, as earlier versions made it."""
    for arguments in ({"pin": pin}, {"pin": pin, "attempt": 1}, {"pin": pin, "attempt": 2}):
        text = msgspec.json.encode(arguments, order="deterministic")
        for function, hints in ((check_pin, {"pin": str, "attempt": int}), (confirm, {"pin": str})):
            for version in (1, 2):
                yield digest_of("f", function, msgspec.Raw(text), hints, version=version)
        yield digest(text)
    for written in (pin, f'"{pin}"', f'["{pin}"]'):
        for algorithm in (hashlib.sha256, hashlib.sha1, hashlib.md5, hashlib.blake2b):
            yield algorithm(written.encode()).hexdigest()[:DIGEST_CHARS]


def guesses_of_pay(pin: str, question: Question) -> Iterator[str]:
    """Yield what the ids of a call of ``pay``, and of the question about it, might have of a candidate."""
    for account in ("A1", "B2"):
        arguments = msgspec.Raw(msgspec.json.encode({"account": account, "pin": pin}))
        yield digest(bytes(arguments))
        for version in (1, 2):
            yield digest_of("pay", pay, arguments, {"account": str, "pin": str}, version=version)
        yield question_id("", 1, 0, replace(question, arguments=arguments)).rpartition(".")[2]


def digests_in(seen: str) -> set[str]:
    return set(re.findall(rf"(?=([0-9a-f]{{{DIGEST_CHARS}}}))", seen))


def check_not_guessable(seen: str, more: Callable[[str], Iterable[str]] = lambda pin: ()) -> None:
    """Check that *seen* has neither the PIN nor a digest that tells it from the other candidates."""
    assert PIN not in seen
    words = digests_in(seen)
    found = {pin for pin in candidates() if not words.isdisjoint([*guesses(pin), *more(pin)])}
    assert found == set()


class Opened:
    """An engine for an app that neither opens nor closes it, as the test has done so."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass


async def shown(engine: Engine, run: Run) -> str:
    """Return all that the API shows of a run, and its events."""
    opened: Any = Opened(engine)
    app = create_app(Flock("guarding"), engine=opened, auth="host")
    parts = [str(await engine.get_calls(run)), str(run.waiting_for)]
    async with client_of(app) as client:
        for path in (f"/run/{run.run_id}", "/runs?include=inputs,result"):
            response = await client.get(path)
            assert response.status_code == 200, response.text
            parts.append(response.text)
    with anyio.fail_after(PATIENCE_S):
        async for event in engine.events(run.run_id):
            if event is None or event.name in ("run.waiting", "run.completed"):
                parts.append(str(event))
                break
            parts.append(str(event))
    return "\n".join(parts)


def test_the_guesses_find_what_an_earlier_version_has_stored() -> None:
    text = json.dumps({"id": digest_of("f", check_pin, msgspec.Raw(b'{"pin":"pin-4711"}'), {}, version=2)})
    with pytest.raises(AssertionError):
        check_not_guessable(text)


async def test_a_pin_cannot_be_guessed_from_all_that_is_stored_and_shown(
    open_engine: OpenEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four digits, of which there are 10,000: in calls, calls of agents, and a question inside a call."""
    caplog.set_level(logging.DEBUG)
    EXECUTED.clear()
    async with open_engine(guarding()) as engine:
        run = await waiting(engine, (await engine.submit("guard", {})).run_id)
        seen = [await shown(engine, run)]
        (question,) = run.waiting_for
        await engine.answer_call(run.run_id, question.call_id, json_of(True))
        run = await finish(engine, run.run_id)
        assert (run.status, run.value) == (RunStatus.COMPLETED, {"result": [True] * 4}), run.error
        assert EXECUTED == {"check_pin": 2, "vault": 1}, "the step has run again, and found its calls"
        seen.append(await shown(engine, run))
        calls = (await engine.get_calls(run))[0]
        secret = [call for call in calls if call.kind != "question"]
        assert [bytes(call.arguments) for call in secret] == [b"null"] * 4
        assert len({call.call_id for call in secret}) == 4
        batch = await engine.submit_batch("guard", [{}, {}], BatchOptions())
        item = await item_that_asks(engine, batch)
        seen += [str(item), str(await engine.get_calls(item))]
        if hasattr(engine, "cluster"):
            from flock.temporal import messages

            ids = [messages.run_workflow_id(run.run_id, 1), messages.rows_workflow_id(batch.batch_id, 0)]
            ids += [messages.batch_workflow_id(batch.batch_id, 1), messages.chunk_workflow_id(batch.batch_id, 0, 1)]
            for id_ in ids:
                history = await engine.cluster.handle(id_).fetch_history()
                assert history.events
                seen += [event.SerializeToString().decode("latin-1") for event in history.events]
        await engine.cancel_batch(batch.batch_id)
    seen += files_in(tmp_path)
    seen.append(caplog.text)
    check_not_guessable("\n".join(seen))


async def test_equal_secret_calls_of_two_runs_have_different_ids(open_engine: OpenEngine) -> None:
    """Otherwise a run with a known PIN would tell that of another one. Other calls keep their ids."""
    flock = guarding()

    @flock.agent
    async def both(context: RunContext) -> bool:
        await context.call(check_pin, PIN, attempt=7)
        return bool(await context.call(check_pin, PIN, call_keep="result"))

    ids = []
    async with open_engine(flock) as engine:
        for _ in range(2):
            run = await finish(engine, (await engine.submit("both", {})).run_id)
            ids.append([call.call_id for call in (await engine.get_calls(run))[0]])
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] != ids[1][1]
    arguments, hints = msgspec.Raw(b'{"attempt":7,"pin":"pin-4711"}'), {"pin": str, "attempt": int}
    assert ids[0][0] == f"check_pin:{digest_of('check_pin', check_pin, arguments, hints, version=2)}"


async def test_a_run_that_an_earlier_version_has_accepted_keeps_the_ids_of_its_secret_calls(tmp_path: Path) -> None:
    """So that its calls are found when its step runs again."""
    EXECUTED.clear()
    store = tmp_path / "flock.db"
    with pytest.MonkeyPatch.context() as earlier:
        earlier.setattr("flock.engine.base.new_call_key", lambda: "")
        async with guarding().engine(store=store) as engine:
            run = await waiting(engine, (await engine.submit("guard", {})).run_id)
    with sqlite3.connect(store) as db:
        assert db.execute("SELECT call_key FROM runs").fetchall() == [("",)]
    db.close()
    async with guarding().engine(store=store) as engine:
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of(True))
        run = await finish(engine, run.run_id)
    assert (run.status, EXECUTED) == (RunStatus.COMPLETED, {"check_pin": 2, "vault": 1}), run.error


async def test_a_retry_keeps_secret_calls(open_engine: OpenEngine) -> None:
    flock, fails = guarding(), [True]
    EXECUTED.clear()

    @flock.agent
    async def later(context: RunContext) -> bool:
        first = await context.call(check_pin, PIN, call_keep="result")
        second = (await context.run_agent("vault", {"pin": PIN}, call_keep="result"))["result"]
        if fails:
            raise ValueError("not yet")
        return bool(first and second)

    async with open_engine(flock) as engine:
        run = await finish(engine, (await engine.submit("later", {})).run_id)
        fails.clear()
        await engine.retry_run(run.run_id)
        run = await finish(engine, run.run_id)
    assert (run.value, EXECUTED) == ({"result": True}, {"check_pin": 1, "vault": 1}), run.error


async def test_agents_that_a_secret_call_hands_on_to_are_secret_too(open_engine: OpenEngine) -> None:
    flock = guarding()

    @flock.agent
    async def knock(context: RunContext) -> bool:
        return bool((await context.run_agent("door", {"pin": PIN}, call_keep="result"))["result"])

    async with open_engine(flock) as engine:
        run = await finish(engine, (await engine.submit("knock", {})).run_id)
        calls = (await engine.get_calls(run))[0]
    assert [(call.name, bytes(call.arguments)) for call in calls] == [("vault", b"null"), ("door", b"null")] or [
        (call.name, bytes(call.arguments)) for call in calls
    ] == [("door", b"null"), ("vault", b"null")], run.error


# Tools


PAID: list[tuple[str, str]] = []


def pay(account: str, pin: str) -> str:
    """Pay from an account."""
    PAID.append((account, pin))
    return "paid"


def teller(**options: Any) -> Flock:
    flock = Flock("teller", model="openai/gpt-4o")
    flock.add_agent(
        FlockFactory.create_default_agent(
            "teller", input="wish: str", output="done: str", tools=[Tool(pay, **{"secret": ["pin"], **options})]
        )
    )
    return flock


REPLIES = [Reply(calls=[("pay", {"account": "A1", "pin": PIN})]), Reply({"done": "yes"})]


async def test_a_secret_argument_of_a_tool_cannot_be_guessed(
    open_engine: OpenEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has chosen it, a person allows the call, and it is made after the step has started again."""
    caplog.set_level(logging.DEBUG)
    PAID.clear()
    model = FakeModel(list(REPLIES))
    async with open_engine(teller(needs_approval=True), transport=model.transport) as engine:
        run = await waiting(engine, (await engine.submit("teller", {"wish": "pay"})).run_id)
        (question,) = run.waiting_for
        about = msgspec.json.decode(question.arguments if isinstance(question.arguments, msgspec.Raw) else b"")
        assert (about["account"], about["pin"][:7]) == ("A1", "secret:")
        assert "pin" not in str(bytes(question.schema)), "the person cannot change it"
        seen = [await shown(engine, run)]
        changed = {"approved": True, "arguments": {"account": "B2"}}
        await engine.answer_call(run.run_id, question.call_id, json_of(changed))
        run = await finish(engine, run.run_id)
        assert (run.value, PAID) == ({"done": "yes"}, [("B2", PIN)]), run.error
        seen.append(await shown(engine, run))
        (tool,) = [call for call in (await engine.get_calls(run))[0] if call.kind == "tool"]
        assert msgspec.json.decode(tool.arguments) == {"account": "B2", "pin": about["pin"]}
        if hasattr(engine, "cluster"):
            from flock.temporal.messages import run_workflow_id

            history = await engine.cluster.handle(run_workflow_id(run.run_id, 1)).fetch_history()
            seen += [event.SerializeToString().decode("latin-1") for event in history.events]
    assert len(model.requests) == 2, "the reply was stored"
    assert PIN in str(model.requests[1]["messages"]), "the model sees its own call"
    seen += [*files_in(tmp_path), caplog.text]
    check_not_guessable("\n".join(seen), lambda pin: guesses_of_pay(pin, question))
    for text in (PIN, json.dumps(PIN), json.dumps({"account": "A1", "pin": PIN})):
        assert base64.b64encode(text.encode()).decode()[:12] not in "\n".join(seen)


async def test_the_guesses_find_the_id_of_a_question_about_a_call_without_secrets() -> None:
    model = FakeModel(REPLIES[:1])
    async with teller(secret=[], needs_approval=True).engine(transport=model.transport) as engine:
        run = await waiting(engine, (await engine.submit("teller", {"wish": "pay"})).run_id)
    (question,) = run.waiting_for
    assert len(digests_in(question.call_id) & set(guesses_of_pay(PIN, question))) == 1


async def test_a_call_of_another_secret_is_another_question(open_engine: OpenEngine) -> None:
    """What people see of a secret depends on it, and differs between runs."""
    pins = [PIN, "pin-0815", PIN]
    model = FakeModel([Reply(calls=[("pay", {"account": "A1", "pin": pin})]) for pin in pins])
    abouts = []
    async with open_engine(teller(needs_approval=True), transport=model.transport) as engine:
        for _ in pins:
            run = await waiting(engine, (await engine.submit("teller", {"wish": "pay"})).run_id)
            abouts.append(str(run.waiting_for[0].arguments))
    assert len(set(abouts)) == 3


def test_a_text_that_was_changed_in_the_store_is_not_used() -> None:
    key = "k" * 22
    text = sealed('{"pin": "pin-4711", "x": "é"}', key)
    assert unsealed(text, key) == '{"pin": "pin-4711", "x": "é"}'
    assert sealed("", key) != sealed("", key)
    assert unsealed("plain", key) == "plain"
    for damaged in (
        text[:-4] + "AAAA",
        text[:20] + ("B" if text[20] == "A" else "A") + text[21:],
        text[:12],
        "sealed:",
    ):
        with pytest.raises(CallError, match="they were changed in the store"):
            unsealed(damaged, key)
    with pytest.raises(CallError, match="they were changed in the store"):
        unsealed(text, "another")


@pytest.mark.parametrize(
    ("secret", "message"), [(["pim"], "no parameter 'pim'.*Did you mean"), ("pin", "must be a list")]
)
def test_secret_names_are_parameters(secret: Any, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        Tool(pay, secret=secret)


async def test_all_arguments_of_a_tool_may_be_secret() -> None:
    flock = Flock("locks", model="openai/gpt-4o")
    opened = list[str]()

    def unlock(pin: str) -> str:
        """Open the door."""
        opened.append(pin)
        return "open"

    tool = Tool(unlock, secret=["pin"], needs_approval=True)
    flock.add_agent(FlockFactory.create_default_agent("door", input="wish: str", output="done: str", tools=[tool]))
    model = FakeModel([Reply(calls=[("unlock", {"pin": PIN})]), Reply({"done": "yes"})])
    async with flock.engine(transport=model.transport) as engine:
        run = await waiting(engine, (await engine.submit("door", {"wish": "in"})).run_id)
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, json_of({"approved": True}))
        run = await finish(engine, run.run_id)
    assert (run.value, opened) == ({"done": "yes"}, [PIN]), run.error

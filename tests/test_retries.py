"""A retry keeps what the failed step has done, and executes again what it has failed with."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock, FlockFactory
from flock.errors import AgentError, Conflict, DefinitionError, Uncertain
from flock.runs import BatchOptions, Call, Engine, Run, RunContext, RunStatus, now
from flock.runs.records import Place, Raised
from flock.steps.retries import dropped_calls, kept_calls, key_of
from flock.testing import FakeModel, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, until_run
from tests.support.engines import ended as batch_ended

pytestmark = pytest.mark.anyio


class Work:
    """Calls by name. Each is noted with its key, and fails as often as ``failures`` says."""

    def __init__(self, **failures: int) -> None:
        self.failures = failures
        self.keys: dict[str, list[str]] = {}

    async def do(self, name: str, context: RunContext) -> str:
        keys = self.keys.setdefault(name, [])
        keys.append(context.idempotency_key)
        if len(keys) <= self.failures.get(name, 0):
            raise ConnectionError(f"{name} {len(keys)}")
        return f"{name} {len(keys)}"

    @property
    def counts(self) -> dict[str, int]:
        return {name: len(keys) for name, keys in self.keys.items()}


async def ended(engine: Engine, run: Run) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


async def started(engine: Engine, agent_name: str = "work", **inputs: Any) -> Run:
    return await ended(engine, await engine.submit(agent_name, inputs))


async def retried(engine: Engine, run: Run, **options: Any) -> Run:
    return await ended(engine, await engine.retry_run(run.run_id, **options))


async def answered(engine: Engine, run: Run, answer: bytes = b"true") -> Run:
    run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
    await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(answer))
    return await ended(engine, run)


# What is kept


async def test_what_has_returned_is_kept_with_the_answers_and_the_keys(open_engine: OpenEngine) -> None:
    flock, work, step_keys = Flock(), Work(ship=1), list[str]()

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        step_keys.append(context.step_key)
        paid = await context.call(work.do, "pay", call_name="pay")
        assert await context.ask("Ship it?", bool)
        return [paid, await context.call(work.do, "ship", call_name="ship")]

    async with open_engine(flock, expose_errors=True) as engine:
        run = await answered(engine, await engine.submit("work_", {}))
        assert run.error is not None
        assert "ship 1" in run.error
        run = await retried(engine, run)
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error, run.attempt) == ({"result": ["pay 1", "ship 2"]}, None, 2)
    assert work.counts == {"pay": 1, "ship": 2}
    assert set(step_keys) == {f"run:{run.run_id}/0"}
    assert work.keys["ship"] == [f"run:{run.run_id}/0/do:ship"] * 2
    assert [(call.name, call.error is None) for call in calls] == [
        ("do", True),
        ("ask", True),
        ("do", False),
        ("do", True),
    ]


async def test_each_retry_executes_only_what_the_one_before_has_failed_with(open_engine: OpenEngine) -> None:
    flock, work = Flock(), Work(a=1, b=2, c=1)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "abc"]

    async with open_engine(flock) as engine:
        run = await started(engine, "work_")
        for _ in range(4):
            assert run.status is RunStatus.FAILED
            run = await retried(engine, run)
        with pytest.raises(Conflict):
            await engine.retry_run(run.run_id)
    assert (run.value, run.error) == ({"result": ["a 2", "b 3", "c 2"]}, None)
    assert work.counts == {"a": 2, "b": 3, "c": 2}


async def test_a_failure_that_the_program_went_on_from_is_kept(open_engine: OpenEngine) -> None:
    """The payment may have been made although its answer was lost. A person has said so."""
    flock, work = Flock(), Work(charge=1, ship=1)

    @flock.agent
    async def work_(context: RunContext) -> str:
        try:
            await context.call(work.do, "charge", call_name="charge")
        except ConnectionError:
            assert await context.ask("Was it charged?", bool)
        return str(await context.call(work.do, "ship", call_name="ship"))

    async with open_engine(flock) as engine:
        run = await answered(engine, await engine.submit("work_", {}))
        run = await retried(engine, run)
    assert (run.value, run.error) == ({"result": "ship 2"}, None)
    assert work.counts == {"charge": 1, "ship": 2}


async def test_it_is_kept_if_the_question_about_it_has_expired(open_engine: OpenEngine) -> None:
    flock, work = Flock(), Work(charge=1)

    @flock.agent
    async def work_(context: RunContext) -> bool:
        try:
            await context.call(work.do, "charge", call_name="charge")
        except ConnectionError:
            return await context.ask("Was it charged?", bool, expires_s=0.2 if context.attempt == 1 else None)
        return False

    async with open_engine(flock) as engine:
        run = await until_run(
            engine, (await engine.submit("work_", {})).run_id, lambda run: run.status is RunStatus.FAILED
        )
        assert run.error_type == "expired"
        run = await answered(engine, await engine.retry_run(run.run_id))
    assert (run.value, run.error) == ({"result": True}, None)
    assert work.counts == {"charge": 1}


async def test_it_is_kept_if_the_deadline_cut_off_the_next_call(open_engine: OpenEngine) -> None:
    """That one has no entry, and is executed again."""
    flock, work, looked = Flock(), Work(charge=1), list[int]()

    async def look() -> str:
        looked.append(1)
        if len(looked) == 1:
            await anyio.sleep_forever()
        return "charged"

    @flock.agent
    async def work_(context: RunContext) -> str:
        try:
            await context.call(work.do, "charge", call_name="charge")
        except ConnectionError:
            return str(await context.call(look))
        return ""

    async with open_engine(flock) as engine:
        run = await ended(engine, await engine.submit("work_", {}, timeout_s=3))
        assert run.error_type == "timeout"
        run = await retried(engine, run)
    assert (run.value, run.error) == ({"result": "charged"}, None)
    assert work.counts == {"charge": 1}
    assert len(looked) == 2


async def test_a_run_that_was_cancelled_while_it_waited_keeps_its_answers(open_engine: OpenEngine) -> None:
    flock, work = Flock(), Work()

    @flock.agent
    async def work_(context: RunContext) -> list[Any]:
        first = await context.ask("First?", str)
        return [first, await context.call(work.do, "a", call_name="a"), await context.ask("Second?", str)]

    async with open_engine(flock) as engine:
        run = await engine.submit("work_", {})
        run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b'"one"'))
        await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING and bool(work.keys))
        await engine.cancel_run(run.run_id)
        run = await ended(engine, run)
        assert run.status is RunStatus.CANCELLED
        run = await answered(engine, await engine.retry_run(run.run_id), b'"two"')
    assert (run.value, run.error) == ({"result": ["one", "a 1", "two"]}, None)
    assert work.counts == {"a": 1}


async def test_a_cancelled_call_that_a_retry_cancels_again_is_not_executed(open_engine: OpenEngine) -> None:
    """The payment may have been made although the program has not waited for its end."""
    flock, work, begun = Flock(), Work(b=1), list[int]()

    async def charge() -> None:
        begun.append(1)
        await anyio.sleep_forever()

    @flock.agent
    async def work_(context: RunContext) -> str:
        with anyio.move_on_after(0.1):
            await context.call(charge)
        return str(await context.call(work.do, "b", call_name="b"))

    async with open_engine(flock, replay_grace_s=100 * PATIENCE_S) as engine:
        run = await retried(engine, await started(engine, "work_"))
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error, run.attempt) == ({"result": "b 2"}, None, 2)
    assert len(begun) == 1
    assert [(call.name, call.error_type) for call in calls if call.name == "charge"] == [("charge", "cancelled")]


async def test_a_program_that_was_changed_before_a_retry_is_only_warned_of(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    flock, work, names = Flock(), Work(b=1), ["old", "new"]

    async def do(name: str, context: RunContext) -> str:
        return await work.do(name, context)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(do, name) for name in (names.pop(0), "b")]

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await retried(engine, await started(engine, "work_"))
    assert (run.value, run.error) == ({"result": ["new 1", "b 2"]}, None)
    assert work.counts == {"old": 1, "new": 1, "b": 2}
    assert "did not repeat these calls: do:" in caplog.text


# What is executed again


async def test_a_cancelled_call_that_a_retry_does_not_cancel_again_is_executed(open_engine: OpenEngine) -> None:
    flock, work, begun = Flock(), Work(b=1), list[int]()

    async def look() -> str:
        begun.append(1)
        if len(begun) == 1:
            await anyio.sleep_forever()
        return "found"

    @flock.agent
    async def work_(context: RunContext) -> list[Any]:
        found = None
        with anyio.move_on_after(0.1 if context.attempt == 1 else None):
            found = await context.call(look)
        return [found, await context.call(work.do, "b", call_name="b")]

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await retried(engine, await started(engine, "work_"))
    assert (run.value, run.error) == ({"result": ["found", "b 2"]}, None)
    assert len(begun) == 2


async def checked(context: RunContext, order: Callable[..., Any], work: Work, paid: anyio.Event) -> Any:
    """Call *order* beside a check, which begins when it is *paid*, and a note, which is called when both have ended."""

    async def check() -> None:
        await paid.wait()
        await context.call(work.do, "check", call_name="check")

    async def note() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            await anyio.sleep(0.05)
            await context.call(work.do, "note", call_name="note")

    async with asyncio.TaskGroup() as tasks:
        ordered, _, noted = map(tasks.create_task, (context.call(order), check(), note()))
        await ordered
        noted.cancel()
    return ordered.result()


@pytest.mark.parametrize("is_once", [False, True])
async def test_what_a_call_has_done_is_kept_if_a_retry_does_not_cancel_it_again(
    open_engine: OpenEngine, is_once: bool
) -> None:
    """A payment is not made twice because a check beside the order had failed."""
    flock, work, paid, begun = Flock(), Work(check=1), anyio.Event(), list[int]()

    async def order(context: RunContext) -> list[str]:
        begun.append(1)
        first = await context.call(work.do, "pay", call_name="pay", call_once=is_once)
        paid.set()
        if len(begun) == 1:
            await anyio.sleep_forever()
        return [first, await context.call(work.do, "ship", call_name="ship")]

    @flock.agent
    async def work_(context: RunContext) -> Any:
        return await checked(context, order, work, paid)

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await retried(engine, await started(engine, "work_"))
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error) == ({"result": ["pay 1", "ship 1"]}, None)
    assert (work.counts, len(begun)) == ({"pay": 1, "check": 2, "ship": 1, "note": 1}, 2)
    assert [call.error_type for call in calls if call.name == "order"] == ["cancelled", None]


async def test_what_a_call_has_done_is_kept_if_it_is_retried_and_the_process_dies(tmp_path: Path) -> None:
    flock, work, paid, begun = Flock(), Work(check=1), anyio.Event(), list[int]()
    reached, store = anyio.Event(), tmp_path / "flock.db"

    async def order(context: RunContext) -> list[str]:
        begun.append(1)
        done = [await context.call(work.do, "pay", call_name="pay")]
        paid.set()
        if len(begun) > 1:
            done.append(await context.call(work.do, "ship", call_name="ship"))
            reached.set()
        if len(begun) < 3:
            await anyio.sleep_forever()
        return done

    @flock.agent
    async def work_(context: RunContext) -> Any:
        return await checked(context, order, work, paid)

    async with flock.engine(store=store, replay_grace_s=0.1) as engine:
        run = await started(engine, "work_")
        await engine.retry_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            await reached.wait()
        await engine.drain(0)
    async with flock.engine(store=store, replay_grace_s=0.1) as engine:
        run = await ended(engine, run)
    assert (run.value, run.error) == ({"result": ["pay 1", "ship 1"]}, None)
    assert (work.counts, len(begun)) == ({"pay": 1, "check": 2, "ship": 1, "note": 1}, 3)


async def test_a_failure_after_which_nothing_was_started_is_executed_again(open_engine: OpenEngine) -> None:
    """Also if the agent raises an error of its own that does not name it."""
    flock, work = Flock(), Work(pay=1)

    @flock.agent
    async def work_(context: RunContext) -> str:
        try:
            return str(await context.call(work.do, "pay", call_name="pay"))
        except ConnectionError:
            raise AgentError("The card does not work.") from None

    async with open_engine(flock) as engine:
        run = await started(engine, "work_")
        assert run.error == "The card does not work."
        run = await retried(engine, run)
    assert (run.value, run.error) == ({"result": "pay 2"}, None)


@pytest.mark.parametrize("kind", ["cause", "same", "group"])
async def test_what_the_exception_of_the_step_names_is_executed_again(kind: str, open_engine: OpenEngine) -> None:
    """Other calls were made after it: their results are kept."""
    flock, work = Flock(), Work(a=1, b=1 if kind == "group" else 0)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        failures, found = list[Exception](), list[str]()
        for name in "abc":
            try:
                found.append(await context.call(work.do, name, call_name=name))
            except ConnectionError as exc:
                failures.append(exc)
        match failures:
            case [one] if kind == "same":
                raise one
            case [one]:
                raise AgentError("no") from one
            case [_, _]:
                raise ExceptionGroup("two", failures)
        return found

    async with open_engine(flock) as engine:
        run = await retried(engine, await started(engine, "work_"))
    b = "b 2" if kind == "group" else "b 1"
    assert (run.value, run.error) == ({"result": ["a 2", b, "c 1"]}, None)


@pytest.mark.parametrize("asks", [False, True], ids=["at once", "after an answer"])
async def test_a_called_agent_that_failed_keeps_what_it_has_done(asks: bool, open_engine: OpenEngine) -> None:
    """After an answer, its exception is another one than that of its call, but equal."""
    flock, work = Flock(), Work(b=1)

    @flock.agent
    async def child(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "ab"]

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        try:
            return list((await context.run_agent("child", {}))["result"])
        except ConnectionError:
            if asks:
                assert await context.ask("Give up?", bool)
            raise

    async with open_engine(flock) as engine:
        run = await engine.submit("work_", {})
        run = await answered(engine, run) if asks else await ended(engine, run)
        run = await retried(engine, run)
    assert (run.value, run.error) == ({"result": ["a 1", "b 2"]}, None)
    assert work.counts == {"a": 1, "b": 2}


async def test_a_model_is_asked_again_with_another_key_and_tools_are_not_called_again(open_engine: OpenEngine) -> None:
    looked = list[str]()

    async def look_up(what: str, context: RunContext) -> str:
        looked.append(context.idempotency_key)
        return f"{what}!"

    flock = Flock("tools", model="openai/gpt-4o")
    flock.add_agent(
        FlockFactory.create_default_agent("ask", input="q", output="a: int", tools=[look_up], answer_retries=1)
    )
    call = Reply(calls=[("look_up", {"what": "tea"})])
    with FakeModel([call, {"a": "x"}, {"a": "y"}, {"a": 3}]) as model:
        async with open_engine(flock) as engine:
            run = await started(engine, "ask", q="?")
            assert run.error_type == "invalid_output"
            run = await retried(engine, run)
    assert (run.value, run.error) == ({"a": 3}, None)
    assert looked == [f"run:{run.run_id}/0/look_up:1.1"]
    root = f"run:{run.run_id}"
    keys = [request.headers["idempotency-key"].removesuffix("/stream") for request in model.requests]
    assert keys == [f"{root}/0", f"{root}/0/2", f"{root}/0/3", f"{root}:2/0/2"]
    assert "That answer cannot be used" not in str(model.requests[-1])


async def test_calls_at_most_once_stay_as_they_are(open_engine: OpenEngine) -> None:
    """Only a retry of all calls executes one again that failed."""
    flock, work = Flock(), Work(pay=1)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name, call_once=True) for name in ("look", "pay")]

    async with open_engine(flock, expose_errors=True) as engine:
        run = await started(engine, "work_")
        again = await retried(engine, run)
        assert again.error is not None
        assert run.error is not None
        assert again.error.startswith(run.error)
        assert work.counts == {"look": 1, "pay": 1}
        run = await retried(engine, again, calls="again")
    assert (run.value, run.error) == ({"result": ["look 2", "pay 2"]}, None)


# All calls again


async def test_a_retry_of_all_calls_has_new_keys(open_engine: OpenEngine) -> None:
    """A retry after it keeps the calls that it has made, and none from before."""
    flock, work = Flock(), Work(b=2)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "ab"]

    async with open_engine(flock) as engine:
        run = await retried(engine, await started(engine, "work_"), calls="again")
        assert run.status is RunStatus.FAILED
        run = await retried(engine, run)
        calls = (await engine.get_calls(run))[0]
    assert (run.value, run.error) == ({"result": ["a 2", "b 3"]}, None)
    first, second = f"run:{run.run_id}/0/do:", f"run:{run.run_id}:2/0/do:"
    assert work.keys == {"a": [f"{first}a", f"{second}a"], "b": [f"{first}b", f"{second}b", f"{second}b"]}
    assert [call.call_id for call in calls] == ["do:a", "do:b", "do:a", "do:b", "do:b"], "all attempts are shown"


@pytest.mark.parametrize("calls", ["keep", "again"])
async def test_the_events_of_a_retry_have_the_calls_of_all_attempts(calls: Any, open_engine: OpenEngine) -> None:
    flock, work = Flock(), Work(b=1)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "ab"]

    async with open_engine(flock) as engine:
        run = await retried(engine, await started(engine, "work_"), calls=calls)
        assert run.status is RunStatus.COMPLETED
        with anyio.fail_after(PATIENCE_S):
            events = [event async for event in engine.events(run.run_id) if event is not None]
    made = [event.data["call_id"] for event in events if event.name == "call.completed"]
    assert made == (["do:a", "do:b", "do:b"] if calls == "keep" else ["do:a", "do:b", "do:a", "do:b"])
    ids = [event.id for event in events if event.id is not None]
    assert ids == sorted(set(ids))


async def test_the_error_of_a_second_equal_failure_says_how_to_start_again(open_engine: OpenEngine) -> None:
    flock, work = Flock(), Work()

    @flock.agent
    async def work_(kind: str, context: RunContext) -> None:
        await context.call(work.do, "a", call_name="a")
        raise AgentError(f"no {context.attempt if kind == 'other' else kind}")

    said = 'The attempt before has failed in the same way. A retry with {"calls": "again"} executes all calls again.'
    async with open_engine(flock) as engine:
        run = await started(engine, "work_", kind="same")
        assert run.error == "no same"
        for _ in range(2):
            run = await retried(engine, run)
            assert run.error == f"no same {said}"
        run = await retried(engine, run, calls="again")
        assert run.error == "no same"
        other = await retried(engine, await started(engine, "work_", kind="other"))
        assert other.error == "no 2"


async def test_retries_of_a_saga_start_again(open_engine: OpenEngine) -> None:
    """It has undone its work, so nothing that it has done counts."""
    flock, work = Flock(), Work(hotel=2)

    @flock.agent(on_retry="again")
    async def trip(context: RunContext) -> list[str]:
        flight = await context.call(work.do, "flight", call_name="flight")
        try:
            return [flight, await context.call(work.do, "hotel", call_name="hotel")]
        except ConnectionError:
            await context.call(work.do, "cancel", call_name="cancel")
            raise

    async with open_engine(flock, expose_errors=True) as engine:
        run = await started(engine, "trip")
        for _ in range(2):
            assert run.error is not None
            assert "attempt before" not in run.error
            run = await retried(engine, run)
    assert (run.value, run.error) == ({"result": ["flight 3", "hotel 3"]}, None)
    assert work.counts == {"flight": 3, "hotel": 3, "cancel": 2}
    assert len(set(work.keys["flight"])) == 3


def test_an_unknown_way_to_retry_is_an_error_at_the_definition() -> None:
    async def work(context: RunContext) -> None: ...

    with pytest.raises(DefinitionError, match="on_retry= of 'work' must be 'keep' or 'again', not 'never'"):
        Flock().agent(on_retry="never")(work)  # type: ignore[call-overload]


# Batches


def of_items(work: Work) -> Flock:
    flock = Flock()

    @flock.agent
    async def item(n: int, context: RunContext) -> list[str]:
        names = f"a{n}", f"b{n}", f"c{n}"
        return [await context.call(work.do, name, call_name=name) for name in names]

    return flock


async def items_of(engine: Engine, batch_id: str) -> list[Any]:
    return [item.value for item in await engine.get_items(batch_id)]


async def test_a_retry_of_a_batch_keeps_the_calls_of_its_items(open_engine: OpenEngine) -> None:
    work = Work(b0=1, b2=2)
    async with open_engine(of_items(work)) as engine:
        batch = await batch_ended(
            engine, await engine.submit_batch("item", [{"n": n} for n in range(3)], BatchOptions())
        )
        assert batch.failed_items == 2
        for failed in (1, 0):
            batch = await batch_ended(engine, await engine.retry_batch(batch.batch_id))
            assert batch.failed_items == failed
        assert await items_of(engine, batch.batch_id) == [
            {"result": ["a0 1", "b0 2", "c0 1"]},
            {"result": ["a1 1", "b1 1", "c1 1"]},
            {"result": ["a2 1", "b2 3", "c2 1"]},
        ]
        (item,) = await engine.get_items(batch.batch_id, after=1)
        calls = (await engine.get_calls(await engine.get_run(item.run_id)))[0]
    assert [call.call_id for call in calls] == ["do:a2", "do:b2", "do:b2", "do:b2", "do:c2"]
    assert set(work.keys["b2"]) == {f"run:{item.run_id}/0/do:b2"}


async def test_a_retry_of_a_batch_may_execute_all_calls_again(open_engine: OpenEngine) -> None:
    """Also that of one item. A retry after it keeps only what was done since."""
    work = Work(b0=3)
    async with open_engine(of_items(work)) as engine:
        batch = await batch_ended(engine, await engine.submit_batch("item", [{"n": 0}], BatchOptions()))
        batch = await batch_ended(engine, await engine.retry_batch(batch.batch_id, calls="again"))
        (item,) = await engine.get_items(batch.batch_id)
        await engine.retry_run(item.run_id, calls="again")
        batch = await batch_ended(engine, batch)
        assert work.counts == {"a0": 3, "b0": 3}
        await engine.retry_run(item.run_id)
        batch = await batch_ended(engine, batch)
        assert await items_of(engine, batch.batch_id) == [{"result": ["a0 3", "b0 4", "c0 1"]}]
    keys = [f"run:{item.run_id}{tries}/0/do:b0" for tries in ("", ":2", ":3", ":3")]
    assert work.keys["b0"] == keys


# Attempts that were killed

KILLED = """
import asyncio, os, sys
from pathlib import Path
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("killed")

async def do(name: str) -> None:
    with open("done", "a") as log:
        print(name, file=log)
    if name == "b" and not Path("killed").exists():
        Path("killed").touch()
        os._exit(1)
    if name == "a":
        raise ConnectionError(name)

@flock.agent
async def work(context: RunContext) -> str:
    await context.call(do, "first")
    try:
        await context.call(do, "a")
    except ConnectionError:
        await context.call(do, "b")
    return "done"

async def main() -> None:
    async with flock.engine(store="flock.db") as engine:
        if len(sys.argv) == 1:
            run = await engine.submit("work", {}, is_async=False)
            print(run.run_id, flush=True)
        else:
            run = await engine.wait(sys.argv[1])
            print(run.error_type, flush=True)
            run = await engine.retry_run(run.run_id)
        run = await engine.wait(run.run_id)
        print(run.value)

asyncio.run(main())
"""


async def test_a_retry_of_an_attempt_that_was_killed_keeps_what_has_ended(tmp_path: Path) -> None:
    """The program may have started something after its last stored call, so that call is kept even if it failed."""
    (tmp_path / "killed.py").write_text(KILLED)

    async def execute(*arguments: str) -> str:
        command = [sys.executable, "killed.py", *arguments]
        done = await anyio.run_process(command, cwd=tmp_path, check=False, stderr=subprocess.PIPE, env=os.environ)
        return done.stdout.decode()

    run_id = (await execute()).strip()
    assert await execute(run_id) == "interrupted\n{'result': 'done'}\n"
    assert (tmp_path / "done").read_text().split() == ["first", "a", "b", "b"]


@pytest.mark.cluster
async def test_calls_whose_history_was_deleted_are_not_executed_again_by_surprise(temporal_address: str) -> None:
    from flock.temporal.messages import run_workflow_id
    from tests.support.cluster import engine_with_worker

    flock, work = Flock(), Work(b=1)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "ab"]

    async with engine_with_worker(temporal_address, flock) as engine, engine:
        run = await started(engine, "work_")
        await engine.cluster.delete(run_workflow_id(run.run_id, 1))
        with anyio.fail_after(PATIENCE_S):
            while await engine._attempt(run.run_id, 1) is not None:  # noqa: ASYNC110 - there is no event for it
                await anyio.sleep(0.01)
        run_again = msgspec.structs.replace(run, attempt=2, journal=1, status=RunStatus.STARTING, error=None)
        await engine._start(engine._order(run_again))
        again = await until_run(engine, run.run_id, lambda run: run.attempt == 2 and run.status.is_final)
    assert again.error_type == "unreadable"
    assert again.error is not None
    assert "deleted the history of an earlier attempt" in again.error
    assert work.counts == {"a": 1, "b": 1}


# By HTTP


async def test_a_body_chooses_the_calls_that_are_executed_again() -> None:
    flock, work = Flock(), Work(b=2)

    @flock.agent
    async def work_(context: RunContext) -> list[str]:
        return [await context.call(work.do, name, call_name=name) for name in "ab"]

    app = create_app(flock, auth="host", store=":memory:")
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        run = (await client.post("/run/flock", json={"agent_name": "work_"})).json()
        path, batch_path = f"/run/{run['run_id']}/retry", "/batch/00000000-0000-7000-8000-000000000000/retry"
        for wrong in (path, batch_path):
            for calls in ("nonsense", None, 1):
                refused = await client.post(wrong, json={"calls": calls})
                assert refused.status_code == 422, calls
                assert [error["pointer"] for error in refused.json()["errors"]] == ["/calls"]
        assert (await client.post(path, json={"calls": "again"})).status_code == 202
        run = (await client.get(f"/run/{run['run_id']}?wait=30")).json()
        assert work.counts == {"a": 2, "b": 2}
        assert (await client.post(path, json={"calls": "keep"})).status_code == 202
        run = (await client.get(f"/run/{run['run_id']}?wait=30")).json()
    assert run["result"] == {"result": ["a 2", "b 3"]}
    assert [call["call_id"] for call in run["steps"][0]["calls"]] == ["do:a", "do:b", "do:a", "do:b", "do:b"]


# Entries of a journal


def failed(name: str, exc: Exception, at: float = 0, **fields: Any) -> tuple[Call, Exception]:
    time = msgspec.convert(at, type=float)
    stamp = now().fromtimestamp(time, tz=now().tzinfo)
    return Call(call_id=name, name=name, error=str(exc), started_at=stamp, completed_at=stamp, **fields), exc


def dropped(
    entries: Sequence[tuple[Call, Exception]], end: BaseException | None, last: float, kept: Sequence[Call] = ()
) -> list[str]:
    keys = {key_of(call): call.call_id for call, _ in entries}
    return [keys[key] for key in dropped_calls(entries, end, lambda call: call.completed_at.timestamp() < last, kept)]


def test_causes_and_members_of_the_exception_of_a_step_are_dropped() -> None:
    entries = [failed(name, ValueError(name), at) for at, name in enumerate("abcd")]
    first, second, third, _ = (exc for _, exc in entries)
    end = ExceptionGroup("", [second, RuntimeError("x")])
    end.exceptions[1].__cause__ = first
    third.__cause__ = third
    assert dropped(entries, end, 9) == ["a", "b"]
    assert dropped(entries, third, 9) == ["c"]
    assert dropped(entries, None, 9) == []
    assert dropped(entries, None, 2.5) == ["d"]


def test_what_an_earlier_attempt_has_not_dropped_is_dropped_only_if_it_ends_the_step() -> None:
    (first, raised), (second, _) = entries = [failed("a", ValueError("a"), 1), failed("b", ValueError("b"), 2)]
    assert dropped(entries, None, 0, kept=[first, second]) == []
    assert dropped(entries, raised, 0, kept=[first, second]) == ["a"]
    assert dropped(entries, None, 0, kept=[first]) == ["b"]


def test_a_context_is_not_a_cause() -> None:
    entries = [failed("a", ValueError("a"))]
    end = RuntimeError("x")
    end.__context__ = entries[0][1]
    assert dropped(entries, end, 9) == []


def test_a_call_at_most_once_is_never_dropped() -> None:
    call, _ = failed("a", Uncertain("?"), once="ended")
    other, _ = failed("b", ValueError("?"))
    assert kept_calls([call, other], {key_of(call), key_of(other)}) == [call]


EQUAL = Raised(module="m", name="E")


def test_thousands_of_failed_calls_are_compared_quickly() -> None:
    entries = [failed(f"p~{n}", ValueError(n), raised=EQUAL) for n in range(5000)]
    parent = failed("p", ValueError("p"), raised=Raised(module="m", name="G", exceptions=(EQUAL,) * 5000))
    began = time.thread_time()
    assert len(dropped([*entries, parent], parent[1], 9)) == 5001
    assert time.thread_time() - began < 5


def test_of_equal_exceptions_of_calls_in_a_call_that_passes_one_on_the_last_is_dropped() -> None:
    entries = [failed(f"p~{n}", ValueError(n), at=n, raised=EQUAL, place=Place(start=n, end=10 - n)) for n in (1, 2)]
    parent = failed("p", ValueError("p"), raised=EQUAL)
    assert dropped([*entries, *entries, parent], parent[1], 9) == ["p", "p~1"]

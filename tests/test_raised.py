"""A call that raised is finished: if its step runs again, it raises an equal exception, and nothing is done twice."""

import asyncio
import logging
import re
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from flock.core import Flock, FlockFactory
from flock.errors import (
    AgentError,
    CallError,
    CostLimit,
    EngineStopped,
    OwnershipLost,
    StoreError,
    TooManyTokens,
    cut,
)
from flock.models.prices import PRICES
from flock.runs import Engine, Run, RunContext, RunStatus, now
from flock.runs.records import Call, Raised
from flock.steps.raised import Refused, exception_of, is_refused, raised_by
from flock.steps.replay import NESTED
from flock.testing import FakeModel, ModelRequest, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, continued, until_run


class Declined(Exception):
    """Its text is made from attributes, and ``args`` has one of three."""

    def __init__(self, card: str, *, code: int, extra: object = None) -> None:
        super().__init__(card)
        self.code, self.extra = code, extra

    def __str__(self) -> str:
        return f"{self.args[0]} was declined: {self.code}"


class Sticky(Exception):
    """It cannot be made again."""

    def __new__(cls, *args: Any) -> "Sticky":
        if args != (object,):
            raise RuntimeError("made only once")
        return super().__new__(cls, *args)


#: What clients see of the exceptions of calls here.
ERROR = "The call 'c' raised it"


def stored(exc: Exception) -> Call:
    """Return the call that raised *exc*, as it is read from a store."""
    call = Call(call_id="c", name="c", error=ERROR, raised=raised_by("c", exc), started_at=now(), completed_at=now())
    return msgspec.json.decode(msgspec.json.encode(call), type=Call)


def again(exc: Exception) -> Exception:
    return exception_of(stored(exc))


@pytest.mark.parametrize(
    "exc",
    [
        pytest.param(ValueError("no", 3), id="arguments"),
        pytest.param(KeyError("x"), id="built-in text"),
        pytest.param(TimeoutError(), id="without arguments"),
        pytest.param(FileNotFoundError(2, "No such file", "a.txt"), id="name of a file"),
        pytest.param(Declined("4242", code=7), id="attributes"),
        pytest.param(AgentError("the reason"), id="of flock"),
        pytest.param(
            ExceptionGroup("two", [ValueError("a"), ExceptionGroup("in", [Declined("1", code=2)])]), id="group"
        ),
    ],
)
def test_an_equal_exception_is_made_again(exc: Exception) -> None:
    found = again(exc)
    assert type(found) is type(exc)
    assert str(found) == str(exc)
    if isinstance(exc, ExceptionGroup):
        assert isinstance(found, ExceptionGroup)
        assert repr(found.exceptions) == repr(exc.exceptions)
    else:
        assert found.args == exc.args
        assert vars(found) == vars(exc)


def test_an_exception_has_its_notes_and_the_attributes_that_are_json() -> None:
    exc = Declined("4242", code=7, extra=object())
    exc.add_note("asked twice")
    found = again(exc)
    assert vars(found) == {"code": 7, "__notes__": ["asked twice"]}


@pytest.mark.parametrize(
    "exc",
    [
        pytest.param(lambda: ValueError(object()), id="no json"),
        pytest.param(lambda: ValueError((1, 2)), id="a tuple"),
        pytest.param(lambda: Sticky(object), id="cannot be made"),
        pytest.param(lambda: type("Local", (Exception,), {})("x"), id="local class"),
        pytest.param(lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), id="bytes"),
        pytest.param(lambda: ValueError("x" * 5_000_000), id="5 MB"),
    ],
)
def test_an_exception_that_cannot_be_made_is_a_call_error_with_its_text(
    exc: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    raised = exc()
    found = again(raised)
    assert type(found) is CallError
    assert str(found) == cut(str(raised))
    assert found.shown == ERROR


def test_the_log_names_a_class_that_cannot_be_made_once(caplog: pytest.LogCaptureFixture) -> None:
    local = type("Local", (Exception,), {})
    for _ in range(3):
        stored(local())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "call c: if its step runs again, it raises a CallError, because a Local" in record.getMessage()


def test_a_class_that_is_gone_is_a_call_error(monkeypatch: pytest.MonkeyPatch) -> None:
    call = stored(Declined("4242", code=7))
    monkeypatch.delattr(sys.modules[__name__], "Declined")
    assert repr(exception_of(call)) == repr(CallError(ERROR))


def test_an_exception_that_an_earlier_version_could_not_store_is_a_call_error() -> None:
    call = msgspec.structs.replace(stored(Declined("4242", code=7)), raised=Raised(module="", name=""))
    assert repr(exception_of(call)) == repr(CallError(ERROR))


def test_a_class_of_the_main_program_is_found_by_its_name_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python shop.py`` and ``flockapi serve shop.py`` share a store."""
    (tmp_path / "shop.py").write_text("class SoldOut(Exception):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    shop: Any = type(sys)("__main__")
    vars(shop).update(runpy.run_path(str(tmp_path / "shop.py"), run_name="__main__"))
    shop.__file__, shop.__spec__ = str(tmp_path / "shop.py"), None
    with monkeypatch.context() as started:
        started.setitem(sys.modules, "__main__", shop)
        call = stored(shop.SoldOut("tea"))
        assert type(exception_of(call)) is shop.SoldOut
    found = exception_of(call)
    assert type(found).__module__ == "shop"
    assert repr(found) == "SoldOut('tea')"
    call = stored(found)
    with monkeypatch.context() as started:
        started.setitem(sys.modules, "__main__", shop)
        assert type(exception_of(call)) is shop.SoldOut
    monkeypatch.delitem(sys.modules, "shop")


@pytest.mark.parametrize("refusal", [CostLimit, EngineStopped, OwnershipLost, Refused, StoreError, TooManyTokens])
def test_what_the_engine_refuses_is_not_what_a_call_has_raised(refusal: type[Exception]) -> None:
    wrapped = ValueError("mine")
    wrapped.__cause__ = ExceptionGroup("", [KeyError("k"), refusal("no")])
    assert is_refused(wrapped)
    assert is_refused(refusal("no"))
    assert not is_refused(ExceptionGroup("", [ValueError("a")]))


# In runs


async def until_waiting(engine: Engine, run: Run) -> Run:
    return await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)


@pytest.mark.anyio
async def test_a_caught_failure_is_not_repeated_after_an_answer(open_engine: OpenEngine) -> None:
    """The payment may have been made although its answer was lost. A person says so, and nothing is paid again."""
    flock, charged = Flock(), list[int]()

    async def charge(amount: int) -> None:
        charged.append(amount)
        raise TimeoutError("no answer")

    @flock.agent
    async def pay(amount: int, context: RunContext) -> str:
        try:
            await context.call(charge, amount)
        except TimeoutError as exc:
            return f"{exc}: {await context.ask('Was it charged?', bool)}"
        return "charged"

    async with open_engine(flock) as engine:
        run = await until_waiting(engine, await engine.submit("pay", {"amount": 5}))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"result": "no answer: True"}, None)
    assert charged == [5]


@pytest.mark.anyio
@pytest.mark.parametrize("size", [0, 5_000_000])
@pytest.mark.parametrize("expose_errors", [True, False])
async def test_an_exception_that_cannot_be_made_again_keeps_its_text(
    size: int, expose_errors: bool, open_engine: OpenEngine
) -> None:
    """The program reads it again, and clients see no more of it than they saw before."""
    flock, seen = Flock(), list[str]()

    async def charge() -> None:
        raise ValueError("the secret", {1: "no string, so not as JSON"}, "x" * size)

    @flock.agent
    async def pay(context: RunContext) -> None:
        try:
            await context.call(charge)
        except Exception as exc:
            seen.append(str(exc))
            await context.ask("Go on?", bool)
            raise

    async with open_engine(flock, expose_errors=expose_errors) as engine:
        run = await until_waiting(engine, await engine.submit("pay", {}))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert seen == [seen[0], cut(seen[0])]
    assert ("the secret" in (run.error or "")) == expose_errors


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("too long", "CallError: The .* call 'fail' has 1700000[24] bytes"),  # 4: the cluster counts the arguments
        ("no JSON", "CallError: The result of the call 'fail' cannot be converted to JSON"),
        ("call_timeout_s", "TimeoutError: The call 'fail' did not end within 2 s"),
        ("timeout_s", "ModelError: The model did not answer within 2 s"),
    ],
)
async def test_what_is_no_result_or_comes_too_late_has_failed_and_is_not_executed_again(
    kind: str, text: str, open_engine: OpenEngine, model: FakeModel
) -> None:
    flock, begun, seen, took_s = Flock(model="openai/gpt-4o"), list[int](), list[str](), list[float]()

    async def fail() -> Any:
        begun.append(1)
        if kind in ("call_timeout_s", "timeout_s"):
            await anyio.sleep_forever()
        return "x" * 17_000_000 if kind == "too long" else object()

    async def never(request: ModelRequest) -> Reply:
        await fail()
        raise AssertionError

    model.replies = never
    flock.add_agent(FlockFactory.create_default_agent("child", input="q", output="a", timeout_s=2))

    @flock.agent
    async def work(context: RunContext) -> bool:
        since = time.monotonic()
        try:
            if kind == "timeout_s":
                await context.run_agent("child", {"q": "?"})
            await context.call(fail, call_timeout_s=2 if kind == "call_timeout_s" else None)
        except Exception as exc:
            seen.append(f"{type(exc).__name__}: {exc}")
        took_s.append(time.monotonic() - since)
        return await context.ask("Go on?", bool)

    async with open_engine(flock, transport=model.transport) as engine:
        run = await until_waiting(engine, await engine.submit("work", {}))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"result": True}, None)
    assert re.match(text, seen[0])
    assert seen == [seen[0]] * 2
    assert begun == [1]
    assert took_s[1] < 2, "a call in it was not waited for either"


@pytest.mark.anyio
async def test_a_tool_whose_time_was_over_is_not_executed_again(open_engine: OpenEngine, model: FakeModel) -> None:
    flock, begun = Flock(model="openai/gpt-4o"), list[int]()

    async def slow() -> None:
        begun.append(1)
        await anyio.sleep_forever()

    async def confirm(context: RunContext) -> bool:
        return await context.ask("Go on?", bool)

    tools: list[Any] = [slow, confirm]
    flock.add_agent(FlockFactory.create_default_agent("work", input="q", output="a", tools=tools, tool_timeout_s=0.5))
    model.replies = [Reply(calls=[("slow", {})]), Reply(calls=[("confirm", {})]), Reply({"a": "done"})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await until_waiting(engine, await engine.submit("work", {"q": "?"}))
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"a": "done"}, None)
    assert str(model.requests[-1]).count("Error: 'slow' did not end within 0.5 s (tool_timeout_s).") == 1
    assert begun == [1]


@pytest.mark.anyio
@pytest.mark.parametrize("limit", ["max_cost", "max_tokens"])
async def test_a_call_that_a_limit_has_refused_has_no_entry_and_is_executed_by_a_retry(
    limit: str, open_again: OpenEngine, model: FakeModel
) -> None:
    """Also if the program has gone on after it."""
    flock, noted = Flock(model="openai/gpt-4o", prices=PRICES), list[str]()
    flock.add_agent(FlockFactory.create_default_agent("measure", input="text", output="length: int"))
    options: dict[str, Any] = {"transport": model.transport}

    async def note(text: str) -> None:
        noted.append(text)

    @flock.agent
    async def work(context: RunContext) -> int:
        total, refusals = 0, list[Exception]()
        for text in "ab":
            try:
                total += (await context.run_agent("measure", {"text": text}))["length"]
            except (CostLimit, TooManyTokens) as exc:
                refusals.append(exc)
            await context.call(note, text)
        if refusals:
            raise AgentError(type(refusals[0]).__name__)
        return total

    model.replies = [Reply({"length": 1}), Reply({"length": 2})]
    first, more = (0.00005, 1) if limit == "max_cost" else (None, None)
    async with open_again(flock, **options, **({"max_tokens": 10} if limit == "max_tokens" else {})) as engine:
        run = await engine.submit("work", {}, max_cost=first)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        assert run.error == {"max_cost": "CostLimit", "max_tokens": "TooManyTokens"}[limit]
        calls = (await engine.get_calls(run))[0]
        assert [call.name for call in calls if NESTED not in call.call_id] == ["measure", "note", "note"]
    async with open_again(flock, **options) as engine:
        await engine.retry_run(run.run_id, more)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"result": 3}, None)
    assert noted == ["a", "b"]


@pytest.mark.anyio
async def test_each_try_of_a_loop_ends_as_it_did(open_engine: OpenEngine) -> None:
    """Also of a tool, of a called agent, and in a gather."""
    flock, tries = Flock(), list[str]()

    async def flaky(name: str) -> str:
        tries.append(name)
        if tries.count(name) < 3:
            raise ConnectionError(tries.count(name))
        return f"{name} at the third try"

    @flock.agent
    async def child(name: str, context: RunContext) -> str:
        return str(await context.call(flaky, name))

    async def tried(context: RunContext, name: str) -> list[Any]:
        seen: list[Any] = []
        while not seen or not isinstance(seen[-1], str):
            try:
                seen.append(await context.call(flaky, name))
            except ConnectionError as exc:
                seen.append(exc.args[0])
        return seen

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        found = [*await asyncio.gather(tried(context, "a"), tried(context, "b"))]
        for _ in range(3):
            try:
                found.append([(await context.run_agent("child", {"name": "c"}))["result"]])
            except ConnectionError as exc:
                found.append([exc.args[0]])
        return [*found, await context.ask("Go on?", bool)]

    expected = [[1, 2, "a at the third try"], [1, 2, "b at the third try"], [1], [2], ["c at the third try"], True]
    async with open_engine(flock) as engine:
        run = await until_waiting(engine, await engine.submit("work", {}))
        assert len(tries) == 9
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.value, run.error) == ({"result": expected}, None)
    assert len(tries) == 9


@pytest.mark.anyio
async def test_a_call_that_the_end_of_its_run_cut_off_is_executed_again(open_again: OpenEngine) -> None:
    """It has turned its cancellation into an exception of its own, when the engine stopped."""
    flock, begun, may_go = Flock(), list[int](), anyio.Event()

    async def stubborn() -> int:
        begun.append(1)
        if len(begun) == 1:
            try:
                may_go.set()
                await anyio.sleep_forever()
            except BaseException:
                raise ConnectionError("closed") from None
        return 7

    @flock.agent
    async def work(context: RunContext) -> int:
        return int(await context.call(stubborn))

    async with open_again(flock) as engine:
        run = await engine.submit("work", {})
        await may_go.wait()
    run = await continued(open_again, flock, run)
    assert (run.value, run.error) == ({"result": 7}, None)
    assert len(begun) == 2


@pytest.mark.anyio
async def test_calls_beyond_the_limit_of_a_run_leave_no_failed_call(tmp_path: Path) -> None:
    flock = Flock()

    async def leaf(n: int) -> int:
        return n

    async def branch(context: RunContext) -> None:
        for n in range(10):
            await context.call(leaf, n)

    @flock.agent
    async def work(context: RunContext) -> str:
        try:
            await context.call(branch)
        except CallError as exc:
            return str(exc)
        return ""

    async with flock.engine(store=tmp_path / "flock.db", max_calls=5) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait((await engine.submit("work", {})).run_id)
        assert "max_calls" in str(run.value)
        calls = (await engine.get_calls(run))[0]
    assert [(call.name, call.error) for call in calls] == [("leaf", None)] * 4

"""A step owns its work: when it has ended, none of its calls executes, and all that they held is free again."""

import asyncio
import contextlib
import contextvars
import functools
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from flock import scopes
from flock.core import Flock, FlockFactory
from flock.errors import AgentError, CallError
from flock.runs import Call, Question, RunContext, RunStatus
from flock.steps.journal import Journal
from flock.steps.threads import Threads
from flock.testing import FakeModel, ModelRequest, Reply
from tests.proof.schedules import Schedule, execute
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, counting_turns, until, until_run
from tests.test_calls import ended, result_of

pytestmark = pytest.mark.anyio

MODEL = "openai/gpt-4o"


# Ways to leave a call behind


async def by_gather(left: Awaitable[Any], failing: Awaitable[Any]) -> None:
    with contextlib.suppress(AgentError):
        await asyncio.gather(left, failing)


async def by_wait(left: Awaitable[Any], failing: Awaitable[Any]) -> None:
    tasks = [asyncio.ensure_future(each) for each in (left, failing)]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [type(each.exception()) for each in done] == [AgentError]


async def by_shield(left: Awaitable[Any], failing: Awaitable[Any]) -> None:
    task = asyncio.ensure_future(left)
    with contextlib.suppress(AgentError, TimeoutError):
        await failing
        async with asyncio.timeout(0):
            await asyncio.shield(task)


async def by_create_task(left: Awaitable[Any], failing: Awaitable[Any]) -> None:
    LEFT.add(asyncio.ensure_future(left))
    with contextlib.suppress(AgentError):
        await failing


async def by_as_completed(left: Awaitable[Any], failing: Awaitable[Any]) -> None:
    for each in asyncio.as_completed([left, failing]):
        with contextlib.suppress(AgentError):
            await each
        break


#: asyncio keeps no reference to a task.
LEFT: set[asyncio.Future[Any]] = set()
LEAVE = [by_gather, by_wait, by_shield, by_create_task, by_as_completed]
ways = pytest.mark.parametrize("leave", LEAVE)
Leave = Callable[[Awaitable[Any], Awaitable[Any]], Awaitable[None]]


class Work:
    """An agent that leaves a call of another agent behind, and what has happened to that."""

    def __init__(self, leave: Leave, *, raises: bool = False) -> None:
        self.flock, self.started, self.ended, self.left = Flock(), 0, 0, anyio.Event()

        @self.flock.agent(max_concurrency=1)
        async def hang() -> None:
            self.started += 1
            self.left.set()
            try:
                await anyio.sleep_forever()
            finally:
                self.ended += 1

        async def fail() -> None:
            await self.left.wait()
            raise AgentError("no")

        @self.flock.agent(max_concurrency=1)
        async def work(context: RunContext) -> str:
            await leave(context.run_agent("hang", {}), context.call(fail))
            if raises:
                raise AgentError("the end")
            return "done"


@ways
async def test_the_slots_are_free_after_a_call_was_left(open_engine: OpenEngine, leave: Leave) -> None:
    """Two agents with one slot each: the one that was called, and the one that called it."""
    work = Work(leave)
    async with open_engine(work.flock) as engine:
        for number in range(3):
            assert result_of(await ended(engine, "work")) == "done"
            assert (work.started, work.ended) == (number + 1, number + 1), "it ends before its run"
            work.left = anyio.Event()


@ways
async def test_a_step_that_raises_ends_its_calls(leave: Leave) -> None:
    work = Work(leave, raises=True)
    async with work.flock.engine() as engine:
        for _ in range(2):
            run = await ended(engine, "work")
            assert (run.status, run.error, work.started) == (RunStatus.FAILED, "the end", work.ended)
            work.left = anyio.Event()


# What they cost


@pytest.mark.parametrize("leave", [by_gather, by_wait])
async def test_what_a_model_call_has_cost_until_it_was_left_is_on_the_run(
    open_engine: OpenEngine, leave: Leave, model: FakeModel
) -> None:
    flock, asked, cancelled = Flock(model=MODEL), anyio.Event(), list[bool]()
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a"))

    async def hang(request: ModelRequest) -> Reply:
        asked.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)
        raise AssertionError

    model.replies = hang

    async def fail() -> None:
        await asked.wait()
        raise AgentError("no")

    @flock.agent
    async def work(context: RunContext) -> str:
        await leave(context.run_agent("ask", {"q": "?"}), context.call(fail))
        return "done"

    async with open_engine(flock, transport=model.transport) as engine:
        run = await ended(engine, "work")
        assert (result_of(run), cancelled) == ("done", [True])
        usage = (await engine.get_run(run.run_id)).usage
    assert usage == run.steps[0].usage
    assert usage is not None
    assert usage.cost
    assert usage.estimated_tokens == usage.input_tokens > 0


# Threads


class Thread:
    """A synchronous function that returns when it may, and the number of its calls, by what they are at."""

    def __init__(self) -> None:
        self.started, self.may_end, self.calls, self.running = threading.Event(), threading.Event(), 0, 0

    def __call__(self, n: int = 1) -> int:
        self.calls += 1
        self.running += 1
        self.started.set()
        assert self.may_end.wait(PATIENCE_S)
        self.running -= 1
        return n

    async def until_started(self) -> None:
        with anyio.fail_after(PATIENCE_S):
            while not self.started.is_set():  # noqa: ASYNC110 - a thread sets it
                await anyio.sleep(0.01)


def later(*events: threading.Event) -> None:
    """Set *events* when the event loop has had time to go on without them."""
    for event in events:
        threading.Timer(0.3, event.set).start()


async def test_no_call_executes_when_cancelled_is_reported(open_engine: OpenEngine) -> None:
    """Neither one that another task awaits, nor its thread."""
    flock, thread, hanging = Flock(), Thread(), list[str]()

    def slow() -> int:
        return thread()

    async def hang() -> None:
        hanging.append("begins")
        try:
            await anyio.sleep_forever()
        finally:
            hanging.append("ends")

    @flock.agent
    async def work(context: RunContext) -> None:
        tasks = [asyncio.ensure_future(context.call(each)) for each in (slow, hang)]
        await asyncio.wait(tasks)

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        await thread.until_started()
        await engine.cancel_run(run.run_id)
        later(thread.may_end)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        assert (thread.running, hanging) == (0, ["begins", "ends"])


async def test_a_cancellation_that_is_repeated_while_a_call_is_saved_is_noted_once() -> None:
    """anyio cancels a gather, and so its calls, in each turn of the event loop until they have ended."""
    flock, tasks, saving, may_save = Flock(), list[asyncio.Task[Any] | None](), list[Call](), anyio.Event()

    @flock.agent
    async def work(context: RunContext) -> None:
        journal = context.journal
        assert isinstance(journal, Journal)
        save = journal.save

        async def slowly(call: Call) -> None:
            saving.append(call)
            await may_save.wait()
            await save(call)

        async def one(number: int) -> None:
            tasks.append(asyncio.current_task())
            await context.call(len, "x" * number)

        journal.save = slowly
        await asyncio.gather(*map(one, range(3)))

    async with flock.engine() as engine:
        run = await engine.submit("work", {})
        await until(lambda: len(saving) == 3)
        await engine.cancel_run(run.run_id)
        async with counting_turns() as turns:
            await until(lambda: turns[0] > 1000)
        assert all(task is not None and task.cancelling() > 500 for task in tasks)
        assert [len(scopes._CANCELLED_LATE[task]) for task in tasks if task is not None] == [1, 1, 1]
        may_save.set()
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED


async def test_cancelled_is_reported_after_the_thread_of_a_tool_whose_time_was_over(model: FakeModel) -> None:
    thread = Thread()

    def slow() -> int:
        """Wait."""
        return thread()

    flock = Flock(model=MODEL)
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a", tools=[slow], tool_timeout_s=0.1))
    asked_again = anyio.Event()

    async def reply(request: ModelRequest) -> Reply:
        if "did not end" not in request.text:
            return Reply(calls=[("slow", {})])
        asked_again.set()
        await anyio.sleep_forever()
        raise AssertionError

    model.replies = reply
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"})
        with anyio.fail_after(PATIENCE_S):
            await asked_again.wait()
            await engine.cancel_run(run.run_id)
            later(thread.may_end)
            assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED
        assert thread.running == 0


async def test_a_called_agent_holds_its_slot_until_its_thread_has_returned(open_engine: OpenEngine) -> None:
    """Also if its run has timed out before."""
    flock, threads = Flock(), [Thread(), Thread()]
    threads[1].may_end.set()

    @flock.agent(max_concurrency=1)
    def slow(number: int) -> int:
        return threads[number]()

    @flock.agent
    async def work(number: int, context: RunContext) -> int:
        return int((await context.run_agent("slow", {"number": number}))["result"])

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {"number": 0}, timeout_s=0.5)
        await threads[0].until_started()
        run = await engine.wait(run.run_id)
        assert run.error_type == "timeout"
        second = await engine.submit("work", {"number": 1})
        await anyio.sleep(0.3)  # it has the time to start too early
        assert (threads[0].running, threads[1].calls) == (1, 0)
        threads[0].may_end.set()
        with anyio.fail_after(PATIENCE_S):
            assert result_of(await engine.wait(second.run_id)) == 1


async def by_timeout(call: Callable[[], Awaitable[Any]]) -> Any:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            return await call()


async def by_wait_for(call: Callable[[], Awaitable[Any]]) -> Any:
    with contextlib.suppress(TimeoutError):
        return await asyncio.wait_for(call(), 0.05)


async def by_move_on_after(call: Callable[[], Awaitable[Any]]) -> Any:
    with anyio.move_on_after(0.05):
        return await call()


async def by_cancel(call: Callable[[], Awaitable[Any]]) -> Any:
    task = asyncio.ensure_future(call())
    asyncio.get_running_loop().call_later(0.05, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        return await task


class Place:
    """Where a synchronous function is called: in a call, in a called agent, or in a call of a called agent."""

    def __init__(self, place: str) -> None:
        self.flock, self.calls, self.place = Flock(), 0, place

        def charge() -> str:
            self.calls += 1
            time.sleep(0.3)
            return "paid"

        @self.flock.agent
        def pay() -> str:
            return charge()

        @self.flock.agent
        async def pay_in_a_call(context: RunContext) -> str:
            return str(await context.call(charge))

        self.charge = charge

    def call(self, context: RunContext) -> Awaitable[Any]:
        return context.call(self.charge) if self.place == "call" else context.run_agent(self.place, {})


@pytest.mark.parametrize("place", ["call", "pay", "pay_in_a_call"])
@pytest.mark.parametrize("limit", [by_timeout, by_wait_for, by_move_on_after, by_cancel])
async def test_a_function_that_returned_too_late_is_not_executed_again(
    open_engine: OpenEngine, limit: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]], place: str
) -> None:
    """Its result is that of the next equal call."""
    at = Place(place)
    found = list[Any]()

    @at.flock.agent
    async def work(context: RunContext) -> str:
        for _ in range(100):  # a busy machine may need more time than one has
            found.append(await limit(lambda: at.call(context)))
            if found[-1] is not None:
                return str(found[-1] if place == "call" else found[-1]["result"])
        return "not paid"

    async with open_engine(at.flock) as engine:
        assert result_of(await ended(engine, "work")) == "paid"
    assert at.calls == 1
    if limit is not by_move_on_after:  # anyio cancels a task where it waits next, so the result arrives
        assert found[0] is None, "the time-out reaches the program"


async def test_a_function_that_failed_too_late_is_recorded() -> None:
    flock = Flock()

    def fail() -> None:
        time.sleep(0.3)
        raise AgentError("declined")

    @flock.agent
    async def work(context: RunContext) -> str:
        try:
            async with asyncio.timeout(0.05):
                await context.call(fail)
        except TimeoutError:
            return "late"
        return "in time"

    async with flock.engine() as engine:
        run = await ended(engine, "work")
        assert result_of(run) == "late"
        (call,) = (await engine.get_calls(run))[0]
    assert (call.name, call.error) == ("fail", "declined")


async def test_a_thread_ends_late_also_if_it_is_abandoned_at_the_same_moment() -> None:
    threads, owner, has_started, may_end = Threads(1), object(), threading.Event(), threading.Event()

    def function() -> str:
        has_started.set()
        assert may_end.wait(PATIENCE_S)
        return "done"

    async def call() -> tuple[str, bool]:
        cancellation = scopes.Cancellation()
        value = await threads.call(function, [owner], None, math.inf, keeps_result=True)
        return value, cancellation.is_late

    task = asyncio.create_task(call())
    await anyio.to_thread.run_sync(has_started.wait, PATIENCE_S)
    task.cancel()
    await anyio.wait_all_tasks_blocked()

    def end_and_abandon() -> None:
        (running,) = threads._calls[owner]
        may_end.set()
        while not running.is_done:  # the event loop does not go on meanwhile
            time.sleep(0.001)
        threads.abandon(owner)

    end_and_abandon()
    assert await task == ("done", True)


# Waiting for a person


@pytest.mark.parametrize("answers", ["at once", "later"])
async def test_a_question_of_a_tool_stops_its_time(model: FakeModel, answers: str) -> None:
    """The time of waiting belongs to no clock: neither while a person is asked, nor while another call works."""
    flock = Flock(model=MODEL)

    async def confirm(context: RunContext) -> str:
        """Ask a person."""
        return "yes" if await context.ask("Sure?", bool) else "no"

    @flock.agent
    async def work() -> str:
        await anyio.sleep(0.6)
        return "worked"

    options: dict[str, Any] = {"tools": [confirm, "work"], "tool_timeout_s": 0.2, "timeout_s": 0.4}
    if answers == "later":
        options["timeout_s"] = 5
    flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a", **options))

    async def reply(request: ModelRequest) -> Reply:
        assert "did not end" not in request.text
        if "yes" in request.text or "worked" in request.text:
            return Reply({"a": "done"})
        return Reply(calls=[("confirm", {}), *([("work", {})] if answers == "later" else [])])

    async def answer(question: Question) -> bool:
        await anyio.sleep(0.6)
        return True

    model.replies = reply
    async with flock.engine(transport=model.transport, on_question=answer if answers == "at once" else None) as engine:
        run = await engine.submit("ask", {"q": "?"}, timeout_s=0.5 if answers == "at once" else None)
        if answers == "later":
            run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert run.status is RunStatus.COMPLETED, run.error


# Programs that leave tasks running on purpose


async def test_a_task_that_swallows_its_cancellation_does_not_keep_its_step(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    flock, may_end, tasks, cancellations = Flock(), asyncio.Event(), list[asyncio.Future[Any]](), 0

    async def stubborn() -> None:
        nonlocal cancellations
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                cancellations += 1

    @flock.agent(max_concurrency=1)
    async def called(context: RunContext) -> None:
        await context.call(stubborn)

    @flock.agent(max_concurrency=1)
    async def work(leaves: bool, context: RunContext) -> str:
        if leaves:
            tasks.append(asyncio.ensure_future(context.run_agent("called", {})))
            await anyio.sleep(0.05)
        return "done"

    async with open_engine(flock, grace_s=0.1) as engine:
        assert result_of(await ended(engine, "work", {"leaves": True})) == "done"
        assert "work ended, but 2 of its calls still run: their tasks swallow their cancellation" in caplog.text
        assert result_of(await ended(engine, "work", {"leaves": False})) == "done", "its slot is free"
        assert cancellations == 1, "it is not cancelled again and again"
        may_end.set()
        await asyncio.wait(tasks)
        assert result_of(await ended(engine, "work", {"leaves": False})) == "done", "its slot is still free"


async def test_a_task_that_makes_a_call_while_it_is_cancelled_makes_none(open_engine: OpenEngine) -> None:
    flock, tasks, made, errors = Flock(), list[asyncio.Task[None]](), list[str](), list[str]()

    async def charge() -> None:
        made.append("charge")

    async def hang() -> None:
        await anyio.sleep_forever()

    async def stubborn(context: RunContext) -> None:
        try:
            await context.call(hang)
        except asyncio.CancelledError:
            try:
                await context.call(charge)
            except CallError as exc:
                errors.append(str(exc))

    @flock.agent
    async def work(context: RunContext) -> str:
        tasks.append(asyncio.create_task(stubborn(context)))
        await anyio.sleep(0.05)
        return "done"

    async with open_engine(flock) as engine:
        assert result_of(await ended(engine, "work")) == "done"
        await asyncio.wait(tasks)
    assert (made, errors) == ([], ["The call 'charge' was made after its step had ended. Await it in the step."])


async def test_a_thousand_calls_in_flight_end_with_their_step() -> None:
    flock, begun, running = Flock(), 0, 0

    async def hang(n: int) -> None:
        nonlocal begun, running
        begun, running = begun + 1, running + 1
        try:
            await anyio.sleep_forever()
        finally:
            running -= 1

    async def fail() -> None:
        while begun < 1000:
            await anyio.lowlevel.checkpoint()
        raise AgentError("no")

    @flock.agent(max_concurrency=1)
    async def work(context: RunContext) -> None:
        await asyncio.gather(*(context.call(hang, n) for n in range(1000)), context.call(fail))

    async with flock.engine() as engine:
        for _ in range(2):
            begun = 0
            run = await ended(engine, "work")
            assert (run.error, running) == ("no", 0)


async def test_a_call_that_is_never_awaited_never_starts() -> None:
    flock, made = Flock(), list[int]()

    async def charge(n: int) -> int:
        made.append(n)
        return n

    @flock.agent
    async def work(context: RunContext) -> int:
        never = context.call(charge, 1)
        try:
            return int(await context.call(charge, 2))
        finally:
            never.close()

    async with flock.engine() as engine:
        assert result_of(await ended(engine, "work")) == 2
    assert made == [2]


async def test_a_call_that_is_awaited_twice_is_an_error_and_one_after_its_step_is_too() -> None:
    flock, kept = Flock(), list[Any]()

    async def charge() -> int:
        return 1

    @flock.agent
    async def work(context: RunContext) -> str:
        kept.append(context.call(charge, name="late"))
        call = context.call(charge)
        await call
        with pytest.raises(RuntimeError, match="already awaited"):
            await call
        return "done"

    async with flock.engine() as engine:
        assert result_of(await ended(engine, "work")) == "done"
        with pytest.raises(CallError, match="'charge' was made after its step had ended"):
            await kept[0]


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_a_call_that_a_task_of_the_host_awaits_ends_with_its_step_on_trio() -> None:
    flock, ends, errors = Flock(), list[str](), list[str]()

    async def hang() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            ends.append("hang")

    async def await_it(context: RunContext) -> None:
        try:
            await context.call(hang)
        except CallError as exc:
            errors.append(str(exc))

    async with anyio.create_task_group() as of_host:

        @flock.agent(max_concurrency=1)
        async def work(context: RunContext) -> str:
            of_host.start_soon(await_it, context)
            await anyio.wait_all_tasks_blocked()
            return "done"

        async with flock.engine() as engine:
            for _ in range(2):
                assert result_of(await ended(engine, "work")) == "done"
            assert (ends, len(errors)) == (["hang"] * 2, 2)


# Calls behave as plain coroutines do

VAR = contextvars.ContextVar("var", default="unset")
Made = Callable[..., Coroutine[Any, Any, Any]]


async def work_for(seconds: float, result: str = "", error: str = "") -> str:
    """Return *result* after a time, or raise *error*. It sets a context variable, and says how it ends."""
    VAR.set(f"{VAR.get()}+{result}")
    try:
        await anyio.sleep(seconds)
    except BaseException as exc:
        SEEN.append(f"{result or error}: {type(exc).__name__}")
        raise
    if error:
        raise AgentError(error)
    SEEN.append(result)
    return result


SEEN: list[str] = []


async def gathers(call: Made) -> Any:
    return await asyncio.gather(call(0.02, "a"), call(0.01, "b"))


async def gathers_errors(call: Made) -> Any:
    found = await asyncio.gather(call(0.02, "a"), call(0.01, error="b"), return_exceptions=True)
    return [str(each) for each in found]


async def uses_a_task_group(call: Made) -> Any:
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(call(5, "a"))
            tasks.create_task(call(0.01, error="b"))
            tasks.create_task(call(5, "c"))
    except ExceptionGroup as group:
        return [str(each) for each in group.exceptions]


async def uses_a_task_group_of_anyio(call: Made) -> Any:
    found = []

    async def add(seconds: float, result: str) -> None:
        found.append(await call(seconds, result))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(add, 0.02, "a")
        tasks.start_soon(add, 0.01, "b")
        with anyio.move_on_after(0.03):
            await call(5, "c")
    return found


async def waits_in_time(call: Made) -> Any:
    try:
        async with asyncio.timeout(0.02):
            await call(5, "a")
    except TimeoutError:
        return await call(0, "b")


async def waits_in_time_of_anyio(call: Made) -> Any:
    try:
        with anyio.fail_after(0.02):
            await call(5, "a")
    except TimeoutError:
        return await call(0, "b")


async def shields(call: Made) -> Any:
    inner = asyncio.ensure_future(call(0.05, "a"))
    try:
        async with asyncio.timeout(0.01):
            await asyncio.shield(inner)
    except TimeoutError:
        return await inner


async def takes_the_first(call: Made) -> Any:
    tasks = [asyncio.ensure_future(call(seconds, name)) for seconds, name in ((5, "a"), (0.01, "b"))]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)
    return [task.result() for task in done]


async def takes_them_as_completed(call: Made) -> Any:
    return [await each for each in asyncio.as_completed([call(0.03, "a"), call(0.01, "b"), call(0.02, "c")])]


async def cancels_itself(call: Made) -> Any:
    task = asyncio.ensure_future(call(5, "a"))
    await asyncio.sleep(0.01)
    task.cancel("enough")
    try:
        await task
    except asyncio.CancelledError:
        return task.cancelled()


async def sets_variables(call: Made) -> Any:
    VAR.set("before")
    await call(0, "a")
    await asyncio.create_task(call(0, "b"))
    return VAR.get()


async def test_a_signal_wakes_many_tasks_in_several_turns() -> None:
    """One that wakes 10,000 would hold the event loop for as long as that takes."""
    signal, woken = scopes.Signal(), 0

    async def wait() -> None:
        nonlocal woken
        await signal.wait()
        woken += 1

    tasks = [asyncio.create_task(wait()) for _ in range(2500)]
    await anyio.wait_all_tasks_blocked()
    signal.notify()
    tasks[1500].cancel()
    again = asyncio.create_task(wait())
    counts = set[int]()
    while woken < len(tasks) - 1:
        await asyncio.sleep(0)
        counts.add(woken)
    assert counts - {0} == {1000, 1999, 2499}
    assert not again.done()
    signal.notify()
    await again


PROGRAMS = [
    *(gathers, gathers_errors, uses_a_task_group, uses_a_task_group_of_anyio, waits_in_time, waits_in_time_of_anyio),
    *(shields, takes_the_first, takes_them_as_completed, cancels_itself, sets_variables),
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_calls_behave_as_plain_coroutines_do(program: Callable[[Made], Awaitable[Any]]) -> None:
    """In virtual time, so that a slow machine does not change the order of ends."""
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> Any:
        return await program(functools.partial(context.call, work_for))

    async def plain() -> tuple[Any, list[str]]:
        return await program(work_for), sorted(SEEN)  # a task group cancels its tasks in any order

    async def both(loop: Schedule) -> None:
        SEEN.clear()
        expected = await asyncio.create_task(plain(), context=contextvars.Context())
        SEEN.clear()
        async with flock.engine() as engine:
            found = result_of(await ended(engine, "work"))
        assert (found, sorted(SEEN)) == expected

    execute(both, seed=0)

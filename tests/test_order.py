"""A step that runs again takes the same way: calls end in the same order, what it has cancelled is cancelled again."""

import asyncio
import contextlib
import re
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import msgspec
import pytest
from msgspec.structs import replace

from flock.agents.agent import OnChange
from flock.core import Flock, FlockFactory
from flock.runs import JSON_NULL, Call, Engine, Mark, Place, Run, RunContext, RunStatus, now
from flock.steps.raised import Refused
from flock.steps.replay import MAX_MARK_BYTES, Entry, Replay
from flock.testing import FakeModel, Reply
from tests.support import PATIENCE_S
from tests.support.engines import OpenEngine, continued, interrupted, until, until_run
from tests.test_calls import interrupt

pytestmark = pytest.mark.anyio


class World:
    """What programs do: ``begun`` has each function that was executed."""

    def __init__(self) -> None:
        self.begun, ended = list[str](), defaultdict[str, anyio.Event](anyio.Event)

        async def after(name: str, others: list[str]) -> str:
            """Return *name* when the *others* have returned."""
            self.begun.append(name)
            for other in others:
                await ended[other].wait()
            ended[name].set()
            return name

        async def hang(name: str) -> None:
            self.begun.append(name)
            await anyio.sleep_forever()

        async def fail(name: str) -> None:
            """Raise ValueError when another one has begun."""
            self.begun.append(name)
            await until(lambda: len(self.begun) > 1)
            raise ValueError(name)

        async def ignore(name: str) -> str:
            """Return in spite of a cancellation. Raise a ValueError if *name* is "fail"."""
            with contextlib.suppress(asyncio.CancelledError):
                await hang(name)
            if name == "fail":
                raise ValueError(name)
            return name

        def block(name: str) -> str:
            self.begun.append(name)
            time.sleep(0.3)
            return name

        self.after, self.hang, self.fail, self.ignore, self.block = after, hang, fail, ignore, block


Program = Callable[[World, RunContext], Awaitable[Any]]


async def first_of_two(world: World, context: RunContext) -> Any:
    """Both end before the step runs again, and only the second one has won."""
    calls = [context.call(world.after, "a", ["b"]), context.call(world.after, "b", [])]
    tasks = [asyncio.ensure_future(call) for call in calls]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return [[task.result() for task in done], [await task for task in left]]


async def as_completed(world: World, context: RunContext) -> Any:
    order = "dbeac"
    calls = [context.call(world.after, name, list(order[: order.index(name)])) for name in sorted(order)]
    return "".join([await each for each in asyncio.as_completed(calls)])


async def loser_of_a_race(world: World, context: RunContext) -> Any:
    slow = asyncio.ensure_future(context.call(world.hang, "slow"))
    fast = asyncio.ensure_future(context.call(world.after, "fast", []))
    done, _ = await asyncio.wait([slow, fast], return_when=asyncio.FIRST_COMPLETED)
    slow.cancel()
    await asyncio.wait([slow])
    return [task.result() for task in done]


async def time_out(world: World, context: RunContext) -> Any:
    try:
        async with asyncio.timeout(0.1):
            await context.call(world.hang, "charge")
    except TimeoutError:
        return "unknown"


async def time_outs_of_equal_calls(world: World, context: RunContext) -> Any:
    found = list[str]()
    for _ in range(3):
        with anyio.move_on_after(0.1):
            await context.call(world.hang, "charge")
        found.append(await context.call(world.after, f"after {len(found)}", []))
    return found


async def wait_with_a_timeout(world: World, context: RunContext) -> Any:
    calls = [context.call(world.hang, "slow"), context.call(world.after, "fast", [])]
    tasks = {name: asyncio.ensure_future(call) for name, call in zip(["slow", "fast"], calls, strict=True)}
    done, left = await asyncio.wait(tasks.values(), timeout=2)
    for task in left:
        task.cancel()
    return [name for name, task in tasks.items() if task in done]


async def sibling_of_a_failure(world: World, context: RunContext) -> Any:
    try:
        async with asyncio.TaskGroup() as tasks:
            for call in (context.call(world.hang, "sibling"), context.call(world.fail, "failure")):
                made: Any = call
                tasks.create_task(made)
    except* ValueError as exc:
        found = [str(each) for each in exc.exceptions]
    return found


async def cancelled_agent(world: World, context: RunContext) -> Any:
    try:
        async with asyncio.timeout(0.3):
            await context.run_agent("child", {"name": "child"})
    except TimeoutError:
        return await context.call(world.after, "then", [])


async def result_that_came_too_late(world: World, context: RunContext) -> Any:
    """It has been executed. The next equal call returns it."""
    try:
        async with asyncio.timeout(0.05):
            await context.call(world.block, "a")
    except TimeoutError:
        found = await context.call(world.block, "a")
    return [found, await context.call(world.block, "a")]


async def call_that_still_runs(world: World, context: RunContext) -> Any:
    """Its thread goes on, and the next equal call returns what it returns."""
    first = asyncio.ensure_future(context.call(world.block, "a"))
    await asyncio.wait([first], timeout=0.05)
    first.cancel()
    found = await context.call(world.block, "a")
    return [found, first.cancelled(), await context.call(world.block, "a")]


async def call_that_is_cancelled_before_it_starts(world: World, context: RunContext) -> Any:
    """It has no number, and so takes no result from an equal one."""
    first = asyncio.ensure_future(context.call(world.block, "a"))
    first.cancel()
    found = await context.call(world.block, "a")
    return [found, first.cancelled()]


async def calls_that_ignore_their_cancellation(world: World, context: RunContext) -> Any:
    tasks = [asyncio.ensure_future(context.call(world.ignore, name)) for name in ("a", "fail")]
    await context.call(world.after, "b", [])
    for task in tasks:
        task.cancel()
    return [str(each) for each in await asyncio.gather(*tasks, return_exceptions=True)]


async def failures_in_parallel(world: World, context: RunContext) -> Any:
    async def tried(name: str) -> str:
        try:
            await context.call(world.fail, name)
        except ValueError as exc:
            return str(exc)
        return ""

    return [await each for each in asyncio.as_completed([tried("a"), tried("b")])]


PROGRAMS: dict[Program, tuple[Any, int]] = {
    first_of_two: ([["b"], ["a"]], 2),
    as_completed: ("dbeac", 5),
    loser_of_a_race: (["fast"], 2),
    time_out: ("unknown", 1),
    time_outs_of_equal_calls: (["after 0", "after 1", "after 2"], 6),
    wait_with_a_timeout: (["fast"], 2),
    sibling_of_a_failure: (["failure"], 2),
    cancelled_agent: ("then", 2),
    result_that_came_too_late: (["a", "a"], 2),
    call_that_still_runs: (["a", True, "a"], 2),
    call_that_is_cancelled_before_it_starts: (["a", True], 1),
    calls_that_ignore_their_cancellation: (["a", "fail"], 3),
    failures_in_parallel: (None, 2),
}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
async def test_a_step_takes_the_same_way_again(program: Program, open_engine: OpenEngine) -> None:
    """It has ended for a question, and runs again when that is answered. Nothing is executed a second time.

    It does not wait for anything in vain: that would take longer than the patience of this test.
    """
    flock, world, found = Flock(), World(), list[Any]()

    @flock.agent
    async def child(name: str, context: RunContext) -> None:
        await context.call(world.hang, name)

    @flock.agent
    async def work(context: RunContext) -> Any:
        found.append(await program(world, context))
        return await context.ask("Go on?", bool)

    async with open_engine(flock, replay_grace_s=100 * PATIENCE_S) as engine:
        run = await _waiting(engine, await engine.submit("work", {}), "Go on?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.error, run.value) == (None, {"result": True})
    result, count = PROGRAMS[program]
    assert found[0] == found[1]
    assert result in (None, found[0])
    assert len(world.begun) == count, world.begun


async def test_answers_end_in_the_order_in_which_they_were_given(open_engine: OpenEngine) -> None:
    flock, seen = Flock(), list[list[str]]()

    async def note(text: str) -> str:
        return text

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        seen.append([])

        async def asked(name: str) -> None:
            seen[-1].append(await context.call(note, await context.ask(name, str)))

        await asyncio.gather(*(asked(name) for name in "abc"))
        await context.ask("Go on?", bool)
        return seen[-1]

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        for name in "cab":
            run = await _waiting(engine, run, name)
            call_id = next(each.call_id for each in run.waiting_for if each.question == name)
            await engine.answer_call(run.run_id, call_id, msgspec.Raw(msgspec.json.encode(name)))
        run = await _waiting(engine, run, "Go on?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.error, run.value) == (None, {"result": ["c", "a", "b"]})


@pytest.mark.parametrize("kind", ["ask", "receive"])
async def test_what_is_received_while_a_step_runs_keeps_its_order(kind: str, open_engine: OpenEngine) -> None:
    """Nothing else is stored before the step is ended to wait, and runs again."""
    flock, seen = Flock(), list[list[str]]()

    async def refused() -> None:
        """Leave no entry."""
        await until(lambda: len(seen[-1]) == 2)
        raise Refused("The engine does not make the call.")

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        seen.append([])

        async def first() -> None:
            seen[-1].append(await (context.ask("a", str) if kind == "ask" else context.receive("a", str)))

        async def second() -> None:
            seen[-1].append(await context.ask("b", str))

        await asyncio.gather(first(), second(), context.call(refused), return_exceptions=True)
        await context.ask("Go on?", bool)
        return seen[-1]

    def asks_both(run: Run) -> bool:
        return {each.question for each in run.waiting_for} == {"a", "b"}

    async with open_engine(flock) as engine:
        run = await until_run(engine, (await engine.submit("work", {})).run_id, asks_both)
        assert run.status in (RunStatus.STARTING, RunStatus.RUNNING), "its step has not ended to wait"
        ids = {each.question: each.call_id for each in run.waiting_for}
        answer = engine.answer_call(run.run_id, ids["b"], msgspec.Raw(b'"b"'))
        if kind == "ask":
            await asyncio.gather(answer, engine.answer_call(run.run_id, ids["a"], msgspec.Raw(b'"a"')))
        else:
            await asyncio.gather(answer, engine.send_message(run.run_id, "a", msgspec.Raw(b'"a"')))
        run = await _waiting(engine, run, "Go on?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        calls = [call.call_id for call in (await engine.get_calls(run))[0]]
    assert (run.error, run.value) == (None, {"result": seen[0]})
    assert len(seen) == 2
    assert len(calls) == len(set(calls)) == 3


async def _waiting(engine: Engine, run: Run, question: str) -> Run:
    def asks(run: Run) -> bool:
        assert run.completed_at is None, run.error
        return run.status is RunStatus.WAITING and question in [each.question for each in run.waiting_for]

    return await until_run(engine, run.run_id, asks)


async def test_a_call_that_was_in_flight_is_executed_at_once(open_again: OpenEngine) -> None:
    """It is known that it had started, from the calls that have ended later."""
    flock, begun, reached = Flock(), list[str](), anyio.Event()

    async def work_on(name: str) -> str:
        begun.append(name)
        if len(begun) == 2:
            reached.set()
        if name == "slow" and begun.count("slow") == 1:
            await anyio.sleep_forever()
        return name

    @flock.agent
    async def work(context: RunContext) -> list[str]:
        return [*await asyncio.gather(context.call(work_on, "slow"), context.call(work_on, "fast"))]

    run = await interrupted(open_again, flock, reached)
    run = await continued(open_again, flock, run, replay_grace_s=1000)
    assert (run.error, run.value) == (None, {"result": ["slow", "fast"]})
    assert sorted(begun) == ["fast", "slow", "slow"]


async def test_slow_code_between_calls_is_no_change(open_again: OpenEngine) -> None:
    """Much slower than the grace, and in another order than before."""
    flock, begun, reached, pause_s = Flock(), list[int](), anyio.Event(), [0.0, 0.3]

    async def note(n: int) -> int:
        begun.append(n)
        return n

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        async def pair(n: int, seconds: float) -> int:
            await anyio.sleep(seconds)
            first = await context.call(note, n)
            await anyio.sleep(seconds)
            return int(await context.call(note, first + 10))

        found = await asyncio.gather(pair(1, pause_s[0]), pair(2, pause_s[1]))
        if not reached.is_set():
            reached.set()
            await anyio.sleep_forever()
        return [*found, await context.call(note, 3)]

    run = await interrupted(open_again, flock, reached)
    pause_s.reverse()
    run = await continued(open_again, flock, run, replay_grace_s=0.05)
    assert (run.error, run.value) == (None, {"result": [11, 12, 3]})
    assert sorted(begun) == [1, 2, 3, 11, 12]


async def test_a_run_is_cancelled_while_the_time_of_a_thread_passes_again(tmp_path: Path) -> None:
    """The thread had run on for ten minutes after its cancellation."""
    flock, reached, waits, freed = Flock(), anyio.Event(), anyio.Event(), threading.Event()

    def export() -> None:
        freed.wait(PATIENCE_S)

    @flock.agent
    async def work(context: RunContext) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                loop.call_later(0.2, freed.set)  # after the time-out
                if reached.is_set():
                    loop.call_later(0.2, waits.set)
                await context.call(export)
        reached.set()
        await anyio.sleep_forever()

    store = tmp_path / "flock.db"
    run_id = await interrupt(flock, store, "work", reached)
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        longer = "CAST(json_set(CAST(place AS TEXT), '$.late_s', 600) AS BLOB)"
        cancelled = "json_extract(place, '$.late_s') > 0 AND json_extract(place, '$.is_cancelled')"
        assert db.execute(f"UPDATE calls SET place = {longer} WHERE {cancelled}").rowcount == 1
    async with flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            await waits.wait()
            await engine.cancel_run(run_id)
            run = await engine.wait(run_id)
    assert run.status is RunStatus.CANCELLED


async def test_what_an_engine_cuts_off_at_its_end_was_not_cancelled_by_the_program(tmp_path: Path) -> None:
    """Also if the event loop cancels the task that has opened the engine."""
    flock, begun, reached, opened = Flock(), list[int](), anyio.Event(), list[str]()

    async def hang() -> int:
        begun.append(1)
        if len(begun) == 2:
            return 7
        reached.set()
        await anyio.sleep_forever()
        raise AssertionError

    @flock.agent
    async def work(context: RunContext) -> int:
        async with asyncio.timeout(PATIENCE_S):
            return int(await context.call(hang))

    async def host() -> None:
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            opened.append((await engine.submit("work", {})).run_id)
            await anyio.sleep_forever()

    hosting = asyncio.ensure_future(host())
    await reached.wait()
    hosting.cancel()
    await asyncio.wait([hosting])
    async with flock.engine(store=tmp_path / "flock.db") as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(opened[0])
    assert (run.error, run.value) == (None, {"result": 7})


async def test_a_function_that_awaits_what_it_has_cancelled_is_not_cancelled_by_the_program(
    open_engine: OpenEngine,
) -> None:
    """Its CancelledError does not recur by itself, so the step does not wait for it."""
    flock, begun = Flock(), list[int]()

    async def careless() -> None:
        begun.append(1)
        task = asyncio.ensure_future(anyio.sleep_forever())
        task.cancel()
        await task

    @flock.agent
    async def work(context: RunContext) -> bool:
        try:
            await context.call(careless)
        except asyncio.CancelledError:
            return await context.ask("Go on?", bool)
        return False

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await _waiting(engine, await engine.submit("work", {}), "Go on?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.error, run.value) == (None, {"result": True})
    assert len(begun) == 2


async def test_equal_calls_that_may_be_swapped_are_named(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    flock, results = Flock(), iter(range(10))

    async def count(what: str) -> int:
        await anyio.lowlevel.checkpoint()
        return next(results) if what == "runs" else 0

    @flock.agent
    async def work(context: RunContext) -> None:
        await asyncio.gather(*(context.call(count, what) for what in ["runs", "runs", "items", "items"]))
        await context.ask("Go on?", bool)
        await asyncio.gather(*(context.call(count, "runs", call_name=f"count-{n}") for n in range(2)))
        for _ in range(2):
            await context.call(count, "runs", call_name="count")
        for question in ("Really?", "Sure?"):
            await context.ask(question, bool)

    async with open_engine(flock) as engine:
        run = await _waiting(engine, await engine.submit("work", {}), "Go on?")
        assert not caplog.messages
        for question in ("Really?", "Sure?"):
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
            run = await _waiting(engine, run, question)
    warnings = [message for message in caplog.messages if "made equal calls of count at the same time" in message]
    assert len(warnings) == 1


# Between the number of an end and its delivery


def stored_at(place: Place, call_id: str, **more: Any) -> Call:
    return stored(call_id, 0, 0, place=place, **more)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_what_starts_while_an_end_is_stored_starts_before_it_again(is_cancelled: bool) -> None:
    """Such as a call that a failed sibling then cancels."""
    replay = Replay([], 5)
    first = replay.begin("f:a", JSON_NULL)
    ends = [stored_at(place := replay.end(first, is_cancelled=is_cancelled), "f:a")]
    second = replay.begin("f:b", JSON_NULL)
    if is_cancelled:
        replay.saw(first, place.end)
    else:
        await replay.turn(first, is_last=False)
    ends.append(stored_at(replay.end(second), "f:b"))

    replay = Replay(ends, 1000)
    first = replay.begin("f:a", JSON_NULL)
    if is_cancelled:
        assert not replay.may_see(first.end)
        replay.begin("f:b", JSON_NULL)
        assert replay.may_see(first.end)
        return
    turn = asyncio.ensure_future(replay.turn(first, is_last=False))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not turn.done()
    replay.begin("f:b", JSON_NULL)
    await turn


async def test_what_an_end_has_caused_comes_after_it_also_if_an_execution_delivers_it_late() -> None:
    """After a call of its own. The next execution must not wait for what that end causes before it delivers it."""
    replay = Replay([], 5)
    first = replay.begin("f:a", JSON_NULL)
    ends = [stored_at(replay.end(first), "f:a")]
    await replay.turn(first, is_last=True)
    ends.append(stored_at(replay.end(replay.begin("f:caused", JSON_NULL)), "f:caused"))

    replay = Replay(ends, 5)
    first, new = replay.begin("f:a", JSON_NULL), replay.begin("f:new", JSON_NULL)
    await replay.turn(first, is_last=False)
    replay.begin("f:caused", JSON_NULL)
    ends.append(stored_at(replay.end(new), "f:new"))

    replay = Replay(ends, 1000)
    first, _ = replay.begin("f:a", JSON_NULL), replay.begin("f:new", JSON_NULL)
    with anyio.fail_after(PATIENCE_S):
        await replay.turn(first, is_last=False)


async def test_a_call_that_is_waited_for_in_vain_holds_up_no_other() -> None:
    """The first one has waited for it, so the later ones do not: each would take as long."""
    grace_s, count = 0.2, 50
    replay = Replay([stored(f"f:{n}", 2 * n + 1, 2 * n + 2) for n in range(count)], grace_s)
    since = anyio.current_time()
    for n in range(1, count):  # the program does not make call 0 any more
        await replay.turn(replay.begin(f"f:{n}", JSON_NULL), is_last=True)
    assert grace_s <= anyio.current_time() - since < count * grace_s / 2


# What two processes have stored, of which one was presumed dead


def stored(call_id: str, start: int, end: int, result: bytes = b"1", **more: Any) -> Call:
    fields: dict[str, Any] = {"place": Place(start=start, end=end), "started_at": now(), "completed_at": now(), **more}
    return Call(call_id=call_id, name="f", result=msgspec.Raw(result), **fields)


async def test_the_first_of_two_ends_of_a_call_counts() -> None:
    replay = Replay([stored("f:a", 1, 2), stored("f:a", 1, 2, b"2")], 5)
    entry = replay.begin("f:a", JSON_NULL)
    assert entry.stored is not None
    assert bytes(entry.stored.result) == b"1"
    await replay.turn(entry, is_last=True)
    assert replay.begin("f:a", JSON_NULL).stored is None


async def test_marks_that_are_too_many_for_one_call_are_stored_with_the_next_ones() -> None:
    """An answer comes first: where it stands among the ends, and when it was delivered."""
    replay = Replay([stored("ask:a", 0, 0, place=None)], 5)
    open_ = [replay.begin(f"f:{number} {'x' * 300}", JSON_NULL) for number in range(3000)]
    asked = replay.begin("ask:a", JSON_NULL)
    await replay.turn(asked, is_last=False)
    places = list[Place]()
    for number in range(6):
        entry = replay.begin(f"g:{number}", JSON_NULL)
        places.append(replay.end(entry))
        replay.saw(entry, places[-1].end)
    marks = [mark for place in places for mark in place.also]
    assert [mark.call_id for mark in marks] == ["ask:a", "ask:a", *(entry.call_id for entry in open_)]
    assert max(len(msgspec.json.encode(place)) for place in places) < 1.1 * MAX_MARK_BYTES
    assert places[-1].also == ()


async def test_the_order_of_ends_is_not_that_in_which_they_were_stored() -> None:
    """The call that ended later was stored first, with a mark that the earlier one was not delivered yet."""
    first, second = Place(start=1, end=2), Place(start=3, end=4, also=(Mark("f:a", 1, 5),))
    replay = Replay([stored_at(second, "f:b"), stored_at(first, "f:a")], 1000)
    entries = [replay.begin(call_id, JSON_NULL) for call_id in ("f:b", "f:a")]
    delivered = list[str]()

    async def deliver(entry: Entry) -> None:
        await replay.turn(entry, is_last=False)
        delivered.append(entry.call_id)

    with anyio.fail_after(PATIENCE_S):
        await asyncio.gather(*map(deliver, entries))
    assert delivered == ["f:a", "f:b"]


async def test_calls_with_one_number_are_both_kept() -> None:
    marks = (Mark("f:c", 1),)
    replay = Replay([stored("f:a", 1, 3), stored("f:b", 1, 2, place=Place(start=1, end=2, also=marks))], 5)
    for call_id in ("f:a", "f:b"):
        entry = replay.begin(call_id, JSON_NULL)
        assert entry.stored is not None
        assert entry.stored.call_id == call_id
        await replay.turn(entry, is_last=True)
    assert replay.begin("f:c", JSON_NULL).stored is None
    assert replay.not_repeated == []


# Programs that were changed


class Change(NamedTuple):
    """What a step does before and after a change. It fails with *error*, or executes *executed* again."""

    before: "Work"
    after: "Work"
    error: str | None
    executed: list[str]


class Shop:
    """What programs do before and after a change: ``log`` has each function that was executed.

    Attributes:
        amount: what ``pay`` charges.
        reached: the first execution has come to its end, and its process is to end.
    """

    def __init__(self) -> None:
        self.log, self.amount, self.reached = list[str](), 5, anyio.Event()

        async def charge(amount: int | str) -> None:
            self.log.append(f"charge {amount}")

        async def pay(context: RunContext) -> None:
            await context.call(charge, self.amount)
            await self.reach()

        async def sell(n: int, context: RunContext) -> None:
            await context.call(charge, n)

        async def send(to: str) -> None:
            self.log.append(f"send {to}")

        async def mail(to: str) -> None:
            self.log.append(f"mail {to}")

        async def hang() -> None:
            self.log.append("hang")
            if self.log.count("hang") == 1:
                await anyio.sleep_forever()

        async def count() -> int:
            self.log.append("count")
            return self.log.count("count")

        self.charge, self.pay, self.sell = charge, pay, sell
        self.send, self.mail, self.hang, self.count = send, mail, hang, count

    async def reach(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await anyio.sleep_forever()


Work = Callable[[RunContext, Shop], Awaitable[Any]]


async def charged_5(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.charge, 5)


async def charged_6(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.charge, 6)


async def charged_5_and_6(context: RunContext, shop: Shop) -> Any:
    return [await charged_5(context, shop), await charged_6(context, shop)]


async def charged_6_and_5(context: RunContext, shop: Shop) -> Any:
    return [await charged_6(context, shop), await charged_5(context, shop)]


async def charged_6_beside_5(context: RunContext, shop: Shop) -> Any:
    return await asyncio.gather(context.call(shop.charge, 6), context.call(shop.charge, 5))


async def charged_text(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.charge, "5")


def charged_under(name: str) -> Work:
    return lambda context, shop: context.call(shop.charge, 5, call_name=name)


def charged_inside(kind: str, amount: int) -> Work:
    """Charge in a function, or in an agent, which is the same before and after the change, and has not ended."""

    async def work(context: RunContext, shop: Shop) -> Any:
        shop.amount = amount
        return await (context.call(shop.pay) if kind == "function" else context.run_agent("pay", {}))

    return work


def sold_by(agent_name: str, n: int) -> Work:
    return lambda context, shop: context.run_agent(agent_name, {"n": n})


async def sent(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.send, "a")


async def mailed(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.mail, "a")


async def sent_and_charged(context: RunContext, shop: Shop) -> Any:
    return [await sent(context, shop), await charged_5(context, shop)]


async def nothing(context: RunContext, shop: Shop) -> Any:
    return "nothing"


async def hung_for_a_moment(context: RunContext, shop: Shop) -> Any:
    with anyio.move_on_after(0.05):
        return await context.call(shop.hang)
    return "hung"


async def asked_again(context: RunContext, shop: Shop) -> Any:
    with anyio.move_on_after(0.05):
        return await context.call(shop.hang)
    return await context.call(shop.hang)


async def hung(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.hang)


async def counted(context: RunContext, shop: Shop) -> Any:
    """Only the order in which they start tells these calls apart."""
    return await asyncio.gather(*(context.call(shop.count) for _ in range(2)))


def both(first: Work, then: Work) -> Work:
    async def work(context: RunContext, shop: Shop) -> Any:
        return [await first(context, shop), await then(context, shop)]

    return work


async def charged_6_under_a(context: RunContext, shop: Shop) -> Any:
    return await context.call(shop.charge, 6, call_name="a")


def charged_unseen(n: int | str) -> Work:
    return lambda context, shop: context.call(shop.charge, n, call_keep="result")


def mailed_to(start: str) -> Work:
    return lambda context, shop: context.call(shop.mail, start + 1000 * "a")


#: Calls are shown as people know them, with what is stored of their arguments.
MAKES_6 = r'makes the call charge {"amount":6} instead of charge {"amount":5}\.'

CHANGES = {
    "arguments that are not stored": Change(
        charged_unseen(5), charged_unseen(6), r"makes the call charge:\w+ instead of charge:\w+\.", []
    ),
    "other arguments of a call with a name": Change(charged_under("a"), charged_6_under_a, None, []),
    "long arguments": Change(mailed_to("b"), mailed_to("c"), r'mail {"to":"ca{300,400}… instead of mail', []),
    "other arguments": Change(charged_5, charged_6, MAKES_6, []),
    "a call of the same function before it": Change(charged_5, charged_6_and_5, "instead of", []),
    "a call of the same function beside it": Change(charged_5, charged_6_beside_5, None, ["charge 6"]),
    "a call of the same function after it": Change(charged_5, charged_5_and_6, None, ["charge 6"]),
    "arguments of another type": Change(charged_5, charged_text, "instead of", []),
    "another name of the call": Change(charged_under("a"), charged_under("b"), "charge:b instead of charge:a", []),
    "another function": Change(sent, mailed, None, ["mail a"]),
    "inside a function": Change(charged_inside("function", 5), charged_inside("function", 6), MAKES_6, []),
    "inside an agent": Change(charged_inside("agent", 5), charged_inside("agent", 6), MAKES_6, []),
    "another agent": Change(sold_by("sell", 5), sold_by("trade", 5), None, ["charge 5"]),
    "other inputs of an agent": Change(sold_by("sell", 5), sold_by("sell", 6), 'sell {"n":6} instead of sell', []),
    "a call before it": Change(charged_5, sent_and_charged, None, ["send a"]),
    "removed": Change(charged_5, nothing, None, []),
    "removed before another one": Change(sent_and_charged, charged_5, None, []),
    "not cancelled any more, before an equal one": Change(asked_again, hung, None, []),
    "not cancelled any more": Change(hung_for_a_moment, hung, "does not cancel the call hang again", []),
    "other arguments before equal calls": Change(both(charged_5, counted), both(charged_6, counted), "instead of", []),
    "other arguments after equal calls": Change(both(counted, charged_5), both(counted, charged_6), None, ["charge 6"]),
    "after equal calls, in place of one before": Change(
        both(charged_5, counted), both(counted, charged_6), "instead", []
    ),
    "not cancelled, after equal calls": Change(both(hung_for_a_moment, counted), both(counted, hung), "not cancel", []),
    "before equal calls, in place of one after": Change(
        both(counted, charged_5), both(charged_6, counted), "instead", []
    ),
}


@pytest.mark.parametrize(
    ("change", "on_change"),
    [
        pytest.param(change, on_change, id=f"{name}-{on_change}")
        for name, change in CHANGES.items()
        for on_change in (["stop", "continue"] if change.error else ["stop"])
    ],
)
async def test_a_changed_program_does_nothing_twice(
    change: Change, on_change: OnChange, open_again: OpenEngine
) -> None:
    """What the agent of the run says counts, and not what an agent says that it calls."""
    flock, shop = Flock(), Shop()
    flock.agent(on_change="continue" if on_change == "stop" else "stop")(shop.pay)
    flock.agent(shop.sell)
    flock.agent(name="trade")(shop.sell)

    @flock.agent(on_change=on_change)
    async def work(context: RunContext) -> Any:
        if shop.reached.is_set():
            return await change.after(context, shop)
        await change.before(context, shop)
        await shop.reach()

    run = await interrupted(open_again, flock, shop.reached)
    done = len(shop.log)
    run = await continued(open_again, flock, run, replay_grace_s=0.1)
    if change.error is None:
        assert run.status is RunStatus.COMPLETED, run.error
        assert shop.log[done:] == change.executed
    elif on_change == "stop":
        assert (run.status, run.error_type) == (RunStatus.FAILED, "changed_program")
        assert re.search(change.error, run.error or "")
        assert shop.log[done:] == []
    else:
        assert run.status is RunStatus.COMPLETED, run.error
        assert len(shop.log) - done == 1


async def test_a_stored_result_that_does_not_fit_another_return_type_is_an_error(open_again: OpenEngine) -> None:
    flock, shop = Flock(), Shop()

    @flock.agent
    async def work(context: RunContext) -> Any:
        if shop.reached.is_set():
            shop.count.__annotations__["return"] = str
        found = await context.call(shop.count)
        await shop.reach()
        return found

    run = await interrupted(open_again, flock, shop.reached)
    run = await continued(open_again, flock, run)
    assert run.error_type == "call_error"
    assert "The result of the call 'count' does not match its return type" in (run.error or "")
    assert shop.log == ["count"]


async def test_an_answer_that_is_not_used_any_more_stays_on_the_record(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    flock, asks = Flock(), [True, False]

    @flock.agent
    async def work(context: RunContext) -> str:
        if asks.pop(0):
            await context.ask("Pay 5?", bool)
        return "paid"

    async with open_engine(flock) as engine:
        run = await _waiting(engine, await engine.submit("work", {}), "Pay 5?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        calls = (await engine.get_calls(run))[0]
    assert (run.error, run.value) == (None, {"result": "paid"})
    assert [(call.name, bytes(call.result)) for call in calls] == [("ask", b"true")]
    assert "did not repeat these calls: ask:" in caplog.text


async def test_a_call_that_waits_to_be_cancelled_again_counts_as_running(open_again: OpenEngine) -> None:
    """A question beside it is visible, and the step does not end for it."""
    flock, shop = Flock(), Shop()

    @flock.agent
    async def work(context: RunContext) -> Any:
        if shop.reached.is_set():
            return await asyncio.gather(context.call(shop.hang), context.ask("Go on?", bool))
        await hung_for_a_moment(context, shop)
        await shop.reach()

    run = await interrupted(open_again, flock, shop.reached)
    async with open_again(flock, replay_grace_s=4) as engine:
        run = await until_run(engine, run.run_id, lambda run: bool(run.questions))
        assert run.status is RunStatus.RUNNING
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert run.error_type == "changed_program", run.status
    assert "does not cancel the call hang again" in (run.error or "")


@pytest.mark.parametrize("on_change", ["stop", "continue"])
async def test_another_question_is_not_asked_in_place_of_an_answered_one(
    on_change: OnChange, open_engine: OpenEngine
) -> None:
    flock, questions = Flock(), ["Pay 5?", "Pay 6?"]

    @flock.agent(on_change=on_change)
    async def work(context: RunContext) -> str:
        question = questions.pop(0)
        return f"{question} {await context.ask(question, bool)}"

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await _waiting(engine, await engine.submit("work", {}), "Pay 5?")
        await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        if on_change == "continue":
            await _waiting(engine, run, "Pay 6?")
        else:
            with anyio.fail_after(PATIENCE_S):
                run = await engine.wait(run.run_id)
            assert run.error_type == "changed_program"
            assert 'makes the call ask {"question":"Pay 6?"} instead of ask {"question":"Pay 5?"}.' in (run.error or "")


def named(text: str, type_: Any, name: str) -> Callable[[RunContext], Awaitable[Any]]:
    return lambda context: context.ask(text, type_, name=name)


def received(name: str) -> Callable[[RunContext], Awaitable[Any]]:
    return lambda context: context.receive(name, bool)


#: What a step waits for before and after a change, and the question that it then asks, which is answered with "me"; ""
#: if it completes, or None if it is stopped. The first answer is true.
WAITS = {
    "a name with another text": (named("Pay 5?", bool, "pay"), named("Pay 6?", bool, "pay"), ""),
    "a name with another type": (named("Pay 5?", bool, "pay"), named("Who pays?", str, "pay"), "Who pays?"),
    "a name with a type that reads the answer": (named("Pay 5?", bool, "pay"), named("Pay 5?", Any, "pay"), ""),
    "another name": (named("Pay 5?", bool, "pay"), named("Who sends?", str, "send"), "Who sends?"),
    "a message of another name": (received("paid"), received("sent"), None),
}


@pytest.mark.parametrize(("before", "after", "asked"), WAITS.values(), ids=WAITS)
async def test_a_question_is_known_by_its_name_if_its_type_reads_the_answer(
    before: Callable[[RunContext], Awaitable[Any]],
    after: Callable[[RunContext], Awaitable[Any]],
    asked: str | None,
    open_engine: OpenEngine,
) -> None:
    flock, waits = Flock(), [before, after, after]

    @flock.agent
    async def work(context: RunContext) -> Any:
        return await waits.pop(0)(context)

    async with open_engine(flock, replay_grace_s=0.1) as engine:
        run = await engine.submit("work", {})
        run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING)
        if asked is None:
            await engine.send_message(run.run_id, "paid", msgspec.Raw(b"true"))
        else:
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
        if asked:
            run = await _waiting(engine, run, asked)
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b'"me"'))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert run.error_type == ("changed_program" if asked is None else None), run.error


async def test_two_questions_of_one_name_may_have_two_types(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def work(context: RunContext) -> list[Any]:
        return [await context.ask(question, type_, name="it") for question, type_ in (("Pay?", bool), ("Who?", str))]

    async with open_engine(flock) as engine:
        run = await engine.submit("work", {})
        for question, answer in (("Pay?", b"true"), ("Who?", b'"me"')):
            run = await _waiting(engine, run, question)
            await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(answer))
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
    assert (run.error, run.value) == (None, {"result": [True, "me"]})


async def test_a_program_cannot_catch_that_it_was_changed(open_again: OpenEngine) -> None:
    flock, shop = Flock(), Shop()

    @flock.agent
    async def work(context: RunContext) -> Any:
        if not shop.reached.is_set():
            await context.call(shop.charge, 5)
            await shop.reach()
        try:
            return await context.call(shop.charge, 6)
        except BaseException:
            return "caught"

    run = await interrupted(open_again, flock, shop.reached)
    run = await continued(open_again, flock, run, replay_grace_s=0.1)
    assert run.error_type == "changed_program"
    assert shop.log == ["charge 5"]


async def test_a_late_result_of_a_tool_belongs_to_its_arguments() -> None:
    """The id of a tool's call is its position, and the model may pass others there the next time."""
    given = msgspec.Raw(b'{"n":1}')
    late = stored("f:1.0", 1, 2, kind="tool", arguments=given)
    place = Place(start=1, end=3, is_cancelled=True)
    cancelled = stored("f:1.0", 1, 3, kind="tool", arguments=given, error="", place=place)
    for arguments, is_late in ((b'{"n":2}', False), (b'{"n":1}', True)):
        replay = Replay([late, cancelled], 5)
        replay.begin("f:1.0", given)  # the one that was cancelled
        assert (replay.begin("f:1.0", msgspec.Raw(arguments)).stored is not None) == is_late
    # At another place
    replay = Replay([late, cancelled], 5)
    assert replay.late_of_tool("f:1.1", "f", msgspec.Raw(b'{"n":2}')) is None
    assert replay.late_of_tool("f:1.1", "g", given) is None
    assert replay.late_of_tool("g:1~f:1.1", "f", given) is None
    assert replay.late_of_tool("f:1.1", "f", given) == late
    assert replay.late_of_tool("f:2.0", "f", given) is None
    # When it has been stored as the result of that one
    replay = Replay([late, cancelled, replace(late, call_id="f:1.1", place=Place(start=4, end=5))], 5)
    assert replay.late_of_tool("f:2.0", "f", given) is None


async def test_a_late_result_of_a_tool_is_that_of_the_equal_call_at_another_place(open_engine: OpenEngine) -> None:
    """The program cancels an agent whose model has called a tool in a thread, and calls the agent again later."""
    flock, bought, timeouts = Flock(model="openai/gpt-4o"), list[str](), list[asyncio.Timeout]()
    loop, cancelled = asyncio.get_running_loop(), threading.Event()

    def buy(what: str) -> str:
        bought.append(what)
        if len(bought) == 1:
            loop.call_soon_threadsafe(timeouts[0].reschedule, 0)
            loop.call_soon_threadsafe(loop.call_later, 0.1, cancelled.set)
            cancelled.wait(PATIENCE_S)
        return f"{what} {len(bought)}"

    flock.add_agent(FlockFactory.create_default_agent("shop", input="q", output="a: int", tools=[buy]))

    @flock.agent
    async def work(context: RunContext) -> list[int]:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05 if bought else None) as timeout:
                timeouts.append(timeout)
                await context.run_agent("shop", {"q": "?"})
        found = list[int]()
        for question in ("Again?", "Again, please?", "Go on?"):
            assert await context.ask(question, bool)
            if question != "Go on?":
                found.append((await context.run_agent("shop", {"q": "?"}))["a"])
        return found

    tea, cake = ("buy", {"what": "tea"}), ("buy", {"what": "cake"})
    replies = [Reply(calls=[tea]), Reply(calls=[cake, tea]), {"a": 1}, Reply(calls=[tea]), {"a": 2}]
    with FakeModel(replies) as model:
        async with open_engine(flock) as engine:
            run = await engine.submit("work", {})
            for question in ("Again?", "Again, please?", "Go on?"):
                run = await _waiting(engine, run, question)
                await engine.answer_call(run.run_id, run.waiting_for[0].call_id, msgspec.Raw(b"true"))
            with anyio.fail_after(PATIENCE_S):
                run = await engine.wait(run.run_id)
    assert (run.error, run.value) == (None, {"result": [1, 2]})
    assert bought == ["tea", "cake", "tea"], "the third one is a new call, since only one gets the late result"
    texts = [message["content"] for message in model.requests[2]["messages"] if message["role"] == "tool"]
    assert texts == ["cake 2", "tea 1"]

"""What every engine guarantees for runs, tested on each engine through the protocol only.

Temporal is the real development server, with a worker in this process.
"""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.engine.base import PROGRESS_INTERVAL_S
from flock.engine.embedded import EmbeddedEngine
from flock.errors import (
    AgentError,
    AgentNotFound,
    BatchNotFound,
    Conflict,
    DefinitionError,
    EngineFull,
    EngineStopped,
    InvalidData,
    KeyReused,
    Replayed,
    RunNotFound,
    SessionNotFound,
    TooLarge,
)
from flock.runs import (
    BatchFilter,
    BatchOptions,
    Engine,
    Event,
    IdempotencyKey,
    Principal,
    QuestionFilter,
    QueueLimits,
    Run,
    RunContext,
    RunFilter,
    RunStatus,
    UsageFilter,
    new_id,
    now,
)
from flock.testing import FakeModel, Reply
from flock.web.auth import ScopedEngine
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_for, patient
from tests.support.engines import OpenEngine, until, until_run
from tests.support.flocks import Gate, sample_flock
from tests.support.models import usage_of_gpt_4o

pytestmark = pytest.mark.anyio

EMPTY = msgspec.Raw(b"{}")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def made(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Return an engine that is not entered."""
    async with engine_for(request, sample_flock()) as engine:
        yield engine


@pytest.fixture
async def engine(open_engine: OpenEngine, gate: Gate) -> AsyncIterator[Engine]:
    async with open_engine(gate.flock, max_concurrency=2) as made:
        yield made
        gate.thread_may_go.set()


async def submit(engine: Engine, agent_name: str, **more: Any) -> Run:
    return await engine.submit(agent_name, EMPTY, **more)


async def fill(engine: Engine) -> list[Run]:
    """Start two runs, which take all slots. On a cluster, queued runs do not start in order."""
    runs = [await submit(engine, "nap") for _ in range(2)]
    return [await until_run(engine, run.run_id, lambda run: run.status is RunStatus.RUNNING) for run in runs]


async def finish(engine: Engine, agent_name: str, inputs: Mapping[str, Any] | None = None, **more: Any) -> Run:
    run = await engine.submit(agent_name, inputs or {}, **more)
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


def result_of(run: Run) -> Any:
    assert run.status is RunStatus.COMPLETED, run.error
    assert run.result is not None
    return msgspec.json.decode(run.result)


async def events_of_run(engine: Engine, run_id: str, after: int = 0) -> list[Event]:
    return [event async for event in engine.events(run_id, after=after) if event is not None]


# Submit and wait


async def test_a_run_is_accepted_and_completed(open_engine: OpenEngine) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with open_engine(sample_flock()) as engine:
        run = await engine.submit("add", {"a": 1}, request_id="r1", traceparent=trace, principal="ann", timeout_s=9)
        assert (run.status, run.attempt, run.started_at) == (RunStatus.STARTING, 1, None)
        run = await engine.wait(run.run_id)
        assert result_of(run) == {"result": 3}
        assert run == await engine.get_run(run.run_id)
    assert (run.request_id, run.traceparent, run.principal, run.timeout_s) == ("r1", trace, "ann", 9)
    assert msgspec.json.decode(run.inputs) == {"a": 1}
    assert run.started_at
    assert run.completed_at
    assert run.created_at <= run.completed_at
    assert [step.agent_name for step in run.steps] == ["add"]


async def test_a_run_can_be_read_as_soon_as_it_is_accepted(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "nap")
    assert (await engine.get_run(run.run_id)).status in (RunStatus.STARTING, RunStatus.RUNNING)
    await gate.started.wait()
    run = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.RUNNING)
    assert run.started_at
    assert (await engine.wait(run.run_id, timeout_s=0)).status is RunStatus.RUNNING
    assert (await engine.wait(run.run_id, timeout_s=0.05)).status is RunStatus.RUNNING
    gate.may_go.set()
    assert result_of(await engine.wait(run.run_id)) == {"result": 1}


async def test_an_invalid_run_is_refused(open_engine: OpenEngine) -> None:
    async with open_engine(sample_flock(), max_input_bytes=1000) as engine:
        with pytest.raises(AgentNotFound, match="'nobody'"):
            await submit(engine, "nobody")
        with pytest.raises(InvalidData) as caught:
            await engine.submit("add", {"a": "one"})
        assert caught.value.errors[0].pointer == "/inputs/a"
        with pytest.raises(TooLarge, match="1000 bytes"):
            await engine.submit("anything", {"value": "x" * 1000})
        for unknown in ("nobody", new_id(), "' OR 1 = 1", "x:2"):
            with pytest.raises(RunNotFound):
                await engine.get_run(unknown)
            with pytest.raises(RunNotFound):
                await engine.wait(unknown, timeout_s=1)
            with pytest.raises(RunNotFound):
                [event async for event in engine.events(unknown)]
        assert await engine.list_runs(RunFilter()) == []


async def test_numbers_that_json_lacks_become_null(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    def strange() -> list[Any]:
        return [float("nan"), float("inf"), "\u2028 \x00 \U0001f600"]

    async with open_engine(flock) as engine:
        assert result_of(await finish(engine, "strange")) == {"result": [None, None, "\u2028 \x00 \U0001f600"]}


async def test_the_usage_of_models_is_stored(open_engine: OpenEngine, model: FakeModel) -> None:
    model.replies.append(Reply({"sentiment": "good", "keywords": []}))
    async with open_engine(sample_flock(), transport=model.transport) as engine:
        run = await finish(engine, "text_analyzer", {"text": "Hello"})
    assert result_of(run)["sentiment"] == "good"
    assert run.usage == usage_of_gpt_4o(10, 5)


async def test_each_step_of_each_attempt_has_its_own_key(open_engine: OpenEngine, model: FakeModel) -> None:
    """Model calls send it and functions can read it. A retry has another key for models: it needs a new answer."""
    flock, keys, model_keys = sample_flock(), [], []
    flock.agents["text_analyzer"].next_agent = "note"

    @flock.agent(output="text: str", next_agent=lambda result: "text_analyzer" if len(keys) == 1 else None)
    def note(context: RunContext, sentiment: str = "") -> dict[str, str]:
        keys.append(context.step_key)
        model_keys.append(context.model_key)
        if len(keys) in (2, 3):
            raise AgentError("not yet")
        return {"text": "so"}

    model.replies = [Reply("no JSON"), Reply({"sentiment": "good", "keywords": []})]
    async with open_engine(flock, transport=model.transport) as engine:
        run = await finish(engine, "note")
        assert (run.status, len(run.steps)) == (RunStatus.FAILED, 2)
        await engine.retry_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.FAILED
        await engine.retry_run(run.run_id, calls="again")
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    id_ = f"run:{run.run_id}"
    sent = [request.headers["idempotency-key"].removesuffix("/stream") for request in model.requests]
    assert sent == [f"{id_}/1", f"{id_}/1/2"]
    assert keys == [f"{id_}/0", f"{id_}/2", f"{id_}/2", f"{id_}:3/2"]
    assert model_keys == [f"{id_}/0", f"{id_}/2", f"{id_}:2/2", f"{id_}:3/2"]


# How agents fail


async def awaits_its_own_cancelled_task() -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    task.cancel()
    await task


async def raises_system_exit() -> None:
    raise SystemExit(3)


def exits_in_a_thread() -> None:
    raise SystemExit(3)


async def raises_cancelled() -> None:
    raise asyncio.CancelledError


async def raises_in_a_group() -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(raises_agent_error)


async def raises_agent_error() -> None:
    raise AgentError("told")


async def raises_a_group_of_two() -> None:
    raise BaseExceptionGroup("both", [ValueError("a"), SystemExit(1)])


async def cancels_itself_and_continues() -> None:
    task = asyncio.current_task()
    assert task
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    raise AgentError("told")


async def raises_generator_exit() -> None:
    raise GeneratorExit


async def raises_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def interrupts_in_a_thread() -> None:
    raise KeyboardInterrupt


async def raises_a_lone_surrogate() -> None:
    raise AgentError("told \ud800")


async def recurses() -> None:
    await recurses()


@pytest.mark.parametrize(
    ("function", "error_type", "words"),
    [
        (awaits_its_own_cancelled_task, "agent_exception", "raised CancelledError"),
        (raises_system_exit, "agent_exception", "raised SystemExit"),
        (exits_in_a_thread, "agent_exception", "raised SystemExit"),
        (raises_cancelled, "agent_exception", "raised CancelledError"),
        (raises_in_a_group, "agent_error", "told"),
        (raises_a_group_of_two, "agent_exception", "raised BaseExceptionGroup"),
        (recurses, "agent_exception", "raised RecursionError"),
        (cancels_itself_and_continues, "agent_error", "told"),
        (raises_generator_exit, "agent_exception", "raised GeneratorExit"),
        (raises_keyboard_interrupt, "agent_exception", "raised KeyboardInterrupt"),
        (interrupts_in_a_thread, "agent_exception", "raised KeyboardInterrupt"),
        (raises_a_lone_surrogate, "agent_error", "told ?"),
    ],
)
async def test_an_agent_that_misbehaves_fails_only_its_own_run(
    function: Any, error_type: str, words: str, open_engine: OpenEngine
) -> None:
    flock = Flock()
    may_go, bystander_runs = anyio.Event(), anyio.Event()

    @flock.agent
    async def bystander() -> str:
        bystander_runs.set()
        await may_go.wait()
        return "well"

    flock.agent(name="bad")(function)
    async with open_engine(flock) as engine:
        other = await engine.submit("bystander", EMPTY)
        await bystander_runs.wait()
        run = await engine.wait((await engine.submit("bad", EMPTY)).run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, error_type)
        assert words in (run.error or "")
        assert run.completed_at
        may_go.set()
        assert (await engine.wait(other.run_id)).status is RunStatus.COMPLETED


async def test_scopes_and_task_groups_that_an_agent_leaves_open_are_closed(
    open_engine: OpenEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """As a client that is opened in an ``AsyncExitStack`` and never closed. anyio would end the engine."""
    flock, stack = Flock(), contextlib.AsyncExitStack()
    may_go, bystander_runs, is_stopped = anyio.Event(), anyio.Event(), anyio.Event()

    @flock.agent
    async def bystander() -> str:
        bystander_runs.set()
        await may_go.wait()
        return "well"

    async def listen() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            is_stopped.set()

    @flock.agent
    async def careless() -> str:
        stack.enter_context(anyio.move_on_after(60))
        tasks = await stack.enter_async_context(anyio.create_task_group())
        tasks.start_soon(listen)
        await anyio.lowlevel.checkpoint()
        return "done"

    async with open_engine(flock) as engine:
        other = await engine.submit("bystander", EMPTY)
        await bystander_runs.wait()
        run = await finish(engine, "careless")
        assert (run.status, bytes(run.result or b"")) == (RunStatus.COMPLETED, b'{"result":"done"}')
        may_go.set()
        assert (await engine.wait(other.run_id)).status is RunStatus.COMPLETED
        with anyio.fail_after(PATIENCE_S):
            await is_stopped.wait()
    assert "agent careless left 2 cancel scopes or task groups open" in caplog.text


async def test_the_error_names_the_agent_that_failed(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent(next_agent="second")
    def first() -> int:
        return 1

    @flock.agent
    def second() -> int:
        raise ValueError

    async with open_engine(flock) as engine:
        run = await finish(engine, "first")
    assert (run.error or "").startswith("The agent 'second' raised ValueError")
    assert len(run.steps) == 1, "finished steps stay readable"


async def test_agents_added_later_are_found(open_engine: OpenEngine) -> None:
    flock = Flock()
    async with open_engine(flock) as engine:

        @flock.agent
        def late() -> int:
            return 1

        run = await engine.wait((await engine.submit("late", EMPTY)).run_id)
    assert run.status is RunStatus.COMPLETED


# Cancellation and timeouts


async def test_a_running_run_is_cancelled_at_its_await(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "nap")
    await gate.started.wait()
    await engine.cancel_run(run.run_id)
    run = await engine.wait(run.run_id)
    assert (run.status, run.error_type) == (RunStatus.CANCELLED, "cancelled")
    assert (await engine.cancel_run(run.run_id)).status is RunStatus.CANCELLED, "it can be cancelled again"


async def test_a_queued_run_is_cancelled_before_it_starts(engine: Engine, gate: Gate) -> None:
    await fill(engine)
    waiting = await submit(engine, "nap")
    await engine.cancel_run(waiting.run_id)
    run = await engine.wait(waiting.run_id)
    assert (run.status, run.started_at) == (RunStatus.CANCELLED, None)


async def test_a_failed_run_cannot_be_cancelled(engine: Engine, gate: Gate) -> None:
    run = await engine.wait((await submit(engine, "steady")).run_id)
    with pytest.raises(Conflict, match="is failed and can no longer be cancelled"):
        await engine.cancel_run(run.run_id)
    with pytest.raises(RunNotFound):
        await engine.cancel_run("nobody")


async def test_a_synchronous_function_is_asked_to_stop_and_waited_for(engine: Engine, gate: Gate) -> None:
    """The run is ``cancelled`` when the thread has returned, and not before."""
    run = await submit(engine, "block")
    await anyio.to_thread.run_sync(gate.thread_begun.wait)
    await engine.cancel_run(run.run_id)
    await until(lambda: gate.context.cancel_requested)
    assert not (await engine.wait(run.run_id, timeout_s=0.05)).status.is_final
    gate.thread_may_go.set()
    run = await engine.wait(run.run_id)
    assert run.status is RunStatus.CANCELLED
    assert b"asked to stop" in bytes(run.steps[0].result), "its result is stored"


async def test_an_agent_that_swallows_its_cancellation_is_cancelled(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "swallow")
    await gate.started.wait()
    await engine.cancel_run(run.run_id)
    assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED


async def test_a_run_that_times_out_keeps_its_slot_until_its_thread_returns(engine: Engine, gate: Gate) -> None:
    while not gate.thread_begun.is_set():  # a busy machine may not start it in time
        run = await engine.wait((await submit(engine, "block", timeout_s=0.1)).run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "timeout")
    second = await submit(engine, "block")
    await engine.wait(second.run_id, timeout_s=0.1)
    assert (await engine.get_run(second.run_id)).status is RunStatus.STARTING, "the slot is taken"
    gate.thread_may_go.set()
    assert (await engine.wait(second.run_id)).status is RunStatus.COMPLETED


async def test_an_async_agent_is_cancelled_at_its_deadline(engine: Engine) -> None:
    run = await engine.wait((await submit(engine, "nap", timeout_s=0.05)).run_id)
    assert (run.error, run.error_type) == ("The run did not end within 0.05 s (timeout_s).", "timeout")


async def test_the_wait_for_the_first_step_has_its_own_timeout(open_engine: OpenEngine, gate: Gate) -> None:
    async with open_engine(gate.flock, max_concurrency=1, queue_timeout_s=0.5, max_timeout_s=30) as engine:
        first = await submit(engine, "nap")
        await gate.started.wait()
        run = await engine.wait((await submit(engine, "nap")).run_id)
        assert (run.status, run.error_type) == (RunStatus.FAILED, "queue_timeout")
        gate.may_go.set()
        assert (await engine.wait(first.run_id)).status is RunStatus.COMPLETED


# Retry, delete, list, events, keys


async def test_each_principal_has_a_limited_share_of_the_queue(open_engine: OpenEngine, gate: Gate) -> None:
    """It is half of the queue by default, for new runs and retries together. Runs of others are still accepted."""
    assert QueueLimits.of(6, None) == QueueLimits(6, 3)
    async with open_engine(gate.flock, max_concurrency=1, max_queue=20, max_queue_per_principal=3) as engine:
        failed = await submit(engine, "steady", principal="ann")
        await until_run(engine, failed.run_id, lambda run: run.status is RunStatus.FAILED)
        await until_run(engine, (await submit(engine, "nap")).run_id, lambda run: run.status is RunStatus.RUNNING)
        for _ in range(3):
            await submit(engine, "nap", principal="ann")
        if "temporal" in type(engine).__module__:  # it counts twice a second, and its search lags behind
            await listed(engine, 4, principal="ann")
            counting: Any = engine
            await until(lambda: counting._open_runs >= 4)
            counting._open_runs_of.clear()
        for again in (
            submit(engine, "nap", principal="ann"),
            submit(engine, "nap", principal="ann", is_async=False),
            engine.retry_run(failed.run_id),
        ):
            with pytest.raises(EngineFull, match=r"^\d runs of this caller are .* \(max_queue_per_principal"):
                await again
        await submit(engine, "nap", principal="bob")
        await submit(engine, "nap")


async def test_a_retry_resumes_after_the_last_committed_step(engine: Engine, gate: Gate) -> None:
    run = await engine.wait((await submit(engine, "steady")).run_id)
    assert (run.status, len(run.steps)) == (RunStatus.FAILED, 1)
    gate.fails = False
    again = await engine.retry_run(run.run_id)
    assert (again.status, again.attempt) == (RunStatus.STARTING, 2)
    run = await engine.wait(run.run_id)
    assert (run.status, bytes(run.result or b"")) == (RunStatus.COMPLETED, b'{"result":8}')
    assert gate.calls == ["steady", "shaky", "shaky"]
    with pytest.raises(Conflict, match=r"is completed\. Only failed and cancelled runs"):
        await engine.retry_run(run.run_id)


async def test_only_a_final_run_can_be_deleted(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "nap")
    with pytest.raises(Conflict, match="cannot be deleted"):
        await engine.delete_run(run.run_id)
    gate.may_go.set()
    await engine.wait(run.run_id)
    await engine.delete_run(run.run_id)
    with pytest.raises(RunNotFound):
        await engine.get_run(run.run_id)


async def listed(engine: Engine, expected: int | None = None, **wanted: Any) -> list[str]:
    """Return the ids of a page. Wait until there are *expected* of them, because a cluster's search lags behind."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            found = [run.run_id for run in await engine.list_runs(RunFilter(**wanted))]
            if expected in (None, len(found)):
                return found
            await anyio.sleep(0.02)


async def test_runs_are_listed_by_status(engine: Engine, gate: Gate) -> None:
    failed = await engine.wait((await submit(engine, "steady")).run_id)
    running, other = await fill(engine)
    waiting = await submit(engine, "nap")
    everything = [waiting.run_id, other.run_id, running.run_id, failed.run_id]
    assert await listed(engine, 4) == everything
    assert await listed(engine, 1, status=RunStatus.FAILED) == [failed.run_id]
    assert await listed(engine, 2, status=RunStatus.RUNNING) == [other.run_id, running.run_id]
    assert await listed(engine, 1, status=RunStatus.STARTING) == [waiting.run_id]
    await engine.cancel_run(waiting.run_id)
    await engine.wait(waiting.run_id)
    assert await listed(engine, 1, status=RunStatus.CANCELLED) == [waiting.run_id]
    gate.fails = False
    await engine.retry_run(failed.run_id)
    gate.may_go.set()
    for run in (failed, running, other):
        await engine.wait(run.run_id)
    assert await listed(engine, 0, status=RunStatus.FAILED) == []
    assert await listed(engine, 3, status=RunStatus.COMPLETED) == [other.run_id, running.run_id, failed.run_id]
    assert await listed(engine, 4) == everything, "a retried run is listed once"
    await engine.delete_run(other.run_id)
    assert await listed(engine, 3) == [waiting.run_id, running.run_id, failed.run_id]


async def test_runs_are_listed_in_pages_newest_first(open_engine: OpenEngine) -> None:
    async with open_engine(sample_flock()) as engine:
        runs = [await engine.submit("add", {"a": a}, principal="it's ann's" if a % 2 else None) for a in range(7)]
        runs += [await engine.submit("anything", {"value": "x"})]
        for run in runs:
            await engine.wait(run.run_id)
        newest_first = [run.run_id for run in reversed(runs)]
        assert await listed(engine, 8) == newest_first
        pages, after = [], None
        while page := await listed(engine, after=after, limit=3):
            pages.append(page)
            after = page[-1]
        assert pages == [newest_first[:3], newest_first[3:6], newest_first[6:]]
        assert await listed(engine, 3, principal="it's ann's") == [runs[i].run_id for i in (5, 3, 1)]
        assert await listed(engine, 1, agent_name="anything") == [runs[7].run_id]
        assert await listed(engine, agent_name="x' OR 'a' = 'a") == []
        later = runs[0].created_at + timedelta(days=1)
        assert await listed(engine, created_after=later) == []
        assert len(await listed(engine, created_before=later)) == 8
        assert await listed(engine, created_before=runs[0].created_at - timedelta(seconds=1)) == []
        (bare,) = await engine.list_runs(RunFilter(limit=1))
        assert (bare.inputs, bare.result, bare.steps) == (EMPTY, None, ())
        (full,) = await engine.list_runs(RunFilter(limit=1, with_inputs=True, with_results=True))
        assert msgspec.json.decode(full.inputs) == {"value": "x"}
        assert msgspec.json.decode(full.result or b"") == {"result": "x"}


#: Texts that a language of queries could take for something else, or cannot express at all.
ODD = [
    *("\\", '"', "'", "''", "'a'", '"a"', "a\\", "a\\\\b", 'a"b', "a'b", "a\\'b", "a''b", "\\%_", "%", "_"),
    *("a%22b", "␛22;", "a␛", "*", "`a`", "a;--", "(a", "$1", "?", "NULL", "a b ", "é漢🦆", "a\u2028b", "a\nb"),
    *("\r\n", "\t", "\b", "\x00", "a\x00b", "\x01", "\x1a", "\x1f", "\x7f", "\x85"),
    *("x" * 128, "x" * 3000, '"' * 3000),
]


@pytest.mark.parametrize("name", ["session_id", "principal"])
async def test_runs_are_found_by_a_name_with_any_characters(open_engine: OpenEngine, name: str) -> None:
    """A session and a principal may be called anything, and no name finds the runs of another one."""
    async with open_engine(sample_flock()) as engine:
        runs = dict[str, Run]()
        for odd in ODD:
            named: dict[str, Any] = {name: odd}
            runs[odd] = await engine.submit("add", {"a": 1}, **named)
        for odd, run in runs.items():
            await engine.wait(run.run_id)
            assert await listed(engine, 1, **{name: odd}) == [run.run_id], repr(odd)
        if name == "session_id":
            for odd in ODD:
                assert (await engine.get_session(odd)).total_runs == 1
                await engine.delete_session(odd)
            assert await listed(engine, 0) == []


async def test_a_flock_with_an_odd_name_finds_its_runs_and_batches(open_engine: OpenEngine) -> None:
    flock = sample_flock()
    flock.name = "\"a\\b'\n\x00"
    async with open_engine(flock) as engine:
        run = await engine.submit("add", {"a": 1})
        batch = await engine.submit_batch("add", [{"a": 1}], BatchOptions())
        await engine.wait(run.run_id)
        await engine.wait_batch(batch.batch_id)
        assert await listed(engine, 1) == [run.run_id]
        with anyio.fail_after(PATIENCE_S):
            while [each.batch_id for each in await engine.list_batches(BatchFilter())] != [batch.batch_id]:  # noqa: ASYNC110 - the search lags
                await anyio.sleep(0.02)


async def test_a_filter_with_any_text_is_an_empty_list(open_engine: OpenEngine) -> None:
    async with open_engine(sample_flock()) as engine:
        await engine.wait((await engine.submit("add", {"a": 1}, principal="ann", session_id="s")).run_id)
        for odd in [*ODD, "x" * 100_000]:
            assert await engine.list_runs(RunFilter(agent_name=odd)) == [], odd
            assert await engine.list_runs(RunFilter(principal=odd)) == [], odd
            assert await engine.list_batches(BatchFilter(agent_name=odd)) == [], odd
            assert await engine.list_batches(BatchFilter(principal=odd)) == [], odd
            with pytest.raises(SessionNotFound):
                await engine.get_session(odd)
            with pytest.raises(RunNotFound):
                await engine.get_run(odd)
            with pytest.raises(BatchNotFound):
                await engine.get_batch(odd)


@pytest.mark.parametrize("made", ["embedded", "temporal"], indirect=True)
async def test_requests_with_odd_texts_get_the_same_answer_on_each_engine(made: Engine) -> None:
    statuses = {
        **dict.fromkeys(("/runs?agent_name={}", "/batches?agent_name={}"), 200),
        **dict.fromkeys((f"/{kind}?{name}={{}}" for kind in ("runs", "batches") for name in ("after", "status")), 422),
        **dict.fromkeys(("/runs?created_after={}", "/runs?created_before={}"), 422),
        **dict.fromkeys(("/session/{}", "/run/{}", "/run/{}/events", "/batch/{}", "/batch/{}/results"), 404),
    }
    app = create_app(sample_flock(), engine=made, auth="host")
    transport = httpx.ASGITransport(app)
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for text in (*(quote(odd, safe="") for odd in ODD), "%ed%a0%80", "%ff", "%"):
            for path, status in statuses.items():
                response = await client.get(path.format(text))
                assert response.status_code == status, (path, text)
                assert status != 200 or next(iter(response.json().values())) == [], (path, text)


async def test_events_are_sent_once_and_resume_anywhere(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "report")
    await gate.started.wait()
    received: list[Event] = []
    with anyio.fail_after(PATIENCE_S):
        async for event in engine.events(run.run_id):
            if event is not None:
                received.append(event)
                if event.name == "run.progress":
                    gate.may_go.set()
    names = [event.name for event in received]
    assert names == ["run.started", "step.started", "run.progress", "step.completed", "run.completed"] or names == [
        *("run.started", "step.started", "run.progress"),
        *("step.completed", "run.progress", "run.completed"),
    ]
    ids = [event.id for event in received if event.id is not None]
    assert ids == sorted(set(ids))
    rest = [event async for event in engine.events(run.run_id, after=ids[1]) if event and event.id]
    assert [event.name for event in rest] == ["step.completed", "run.completed"]


async def test_events_of_a_retried_run_keep_the_steps_that_were_done(engine: Engine, gate: Gate) -> None:
    run = await engine.wait((await submit(engine, "steady")).run_id)
    first = [event async for event in engine.events(run.run_id) if event and event.id]
    gate.fails = False
    await engine.retry_run(run.run_id)
    await engine.wait(run.run_id)
    second = [event async for event in engine.events(run.run_id, after=first[-1].id or 0) if event]
    steps = ["step.started", "step.completed", "step.started"]
    assert [event.name for event in first] == ["run.started", *steps, "run.failed"]
    assert [event.name for event in second] == ["run.started", "step.started", "step.completed", "run.completed"]


def with_ids(events: Sequence[Event]) -> list[bytes]:
    """Return the encoded events that are stored, which are all except progress."""
    return [msgspec.json.encode(event) for event in events if event.id is not None]


async def test_statuses_may_be_strings(open_engine: OpenEngine) -> None:
    """In filters, in a page of items and in a retry. An unknown one is an error."""
    flock, fails = Flock(), True

    @flock.agent
    async def fail() -> int:
        if fails:
            raise AgentError("no")
        return 1

    async with open_engine(flock) as engine:
        run = await engine.submit("fail", {})
        batch = await engine.submit_batch("fail", [{}], BatchOptions())
        with anyio.fail_after(PATIENCE_S):
            await engine.wait(run.run_id)
            await engine.wait_batch(batch.batch_id)
            while not await engine.list_runs(RunFilter(status="failed")):  # noqa: ASYNC110 - the search of a cluster lags
                await anyio.sleep(0.05)
            while not await engine.list_batches(BatchFilter(status="failed")):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        for status in ("starting", "waiting", "completed"):
            assert await engine.list_runs(RunFilter(status=status)) == []
        assert len(await engine.get_items(batch.batch_id, statuses=["failed"])) == 1
        assert await engine.get_items(batch.batch_id, statuses=["completed"]) == []
        with pytest.raises(DefinitionError, match="'f' is not a status"):
            await engine.get_items(batch.batch_id, statuses="failed")  # type: ignore[arg-type]
        with pytest.raises(DefinitionError, match="'done' is not a status"):
            await engine.retry_batch(batch.batch_id, only=["done"])  # type: ignore[list-item]
        fails = False
        await engine.retry_batch(batch.batch_id, only=["failed"])
        with anyio.fail_after(PATIENCE_S):
            assert (await engine.wait_batch(batch.batch_id)).status == "completed"


async def test_the_first_reader_of_a_watched_run_that_has_ended_gets_its_text(open_engine: OpenEngine) -> None:
    """Through the engine of a caller, too. A cluster has no text, and the same stored events."""
    flock = Flock()

    @flock.agent
    async def write(topic: str) -> AsyncIterator[str]:
        yield "All about "
        yield topic

    async with open_engine(flock) as engine:
        ann = ScopedEngine(engine, Principal(name="ann"))
        run = await ann.submit("write", {"topic": "tea"}, watch=True)
        with anyio.fail_after(PATIENCE_S):
            await ann.wait(run.run_id)
            events = [event async for event in ann.events(run.run_id) if event]
    texts = [event.data["text"] for event in events if event.name == "output.delta"]
    assert "".join(texts) == ("All about tea" if isinstance(engine, EmbeddedEngine) else "")
    assert [event.name for event in events if event.id] == [
        *("run.started", "step.started", "step.completed", "run.completed")
    ]


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_an_event_is_the_same_live_and_replayed(end: str, open_engine: OpenEngine) -> None:
    """This holds for every step that was started, for the one in which the run ended, and for the next attempt."""
    flock, may_go, is_again = Flock(), [anyio.Event() for _ in range(3)], False

    @flock.agent(output="n: int", next_agent=lambda result: "count" if result["n"] < 3 else None)
    async def count(n: int = 0) -> dict[str, int]:
        await may_go[n].wait()
        if n == 1 and end == "failed" and not is_again:
            raise AgentError("no")
        return {"n": n + 1}

    async with open_engine(flock) as engine:
        run, after, seen = await submit(engine, "count"), 0, dict[int | None, bytes]()

        async def follow() -> list[Event]:
            """Read the events, and let each step continue after its start was received."""
            live: list[Event] = []
            async for event in engine.events(run.run_id, after=after):
                if event is not None:
                    live.append(event)
                    if event.name == "step.started":
                        position = event.data["position"]
                        if position == 1 and end == "cancelled" and not is_again:
                            await engine.cancel_run(run.run_id)
                        else:
                            may_go[position].set()
            return live

        for is_again in (False, True):
            with anyio.fail_after(PATIENCE_S):
                live = await follow()
            assert with_ids(live) == with_ids(await events_of_run(engine, run.run_id, after))
            started = [event.data["position"] for event in live if event.name == "step.started"]
            assert started == ([1, 2] if is_again else [0, 1, 2] if end == "completed" else [0, 1])
            for event in [*live, *await events_of_run(engine, run.run_id)]:
                encoded = msgspec.json.encode(event)
                assert event.id is None or seen.setdefault(event.id, encoded) == encoded, "one id, one content"
            if end == "completed" or is_again:
                break
            after = live[-1].id or 0
            await engine.retry_run(run.run_id)


async def test_the_calls_of_a_step_are_events(open_engine: OpenEngine) -> None:
    flock, may_end = Flock(), anyio.Event()

    @flock.agent(next_agent="last")
    async def first(context: RunContext) -> int:
        one: int = await context.call(double, 1)
        other: int = await context.call(double, 2)
        return one + other

    @flock.agent
    async def last(result: int, context: RunContext) -> int:
        context.emit_value("result", result)
        found: int = await context.call(double, result)
        await may_end.wait()
        return found

    async with open_engine(flock) as engine:
        run = await submit(engine, "first")
        live: list[Event] = []
        with anyio.fail_after(PATIENCE_S):
            async for event in engine.events(run.run_id):
                if event is not None:
                    live.append(event)
                    if event.name == "call.completed" and event.data["position"] == 1:
                        may_end.set()
        replayed = await events_of_run(engine, run.run_id)
        assert with_ids(live) == with_ids(replayed)
        assert [event.name for event in replayed] == [
            *("run.started", "step.started", "call.completed", "call.completed", "step.completed"),
            *("step.started", "call.completed", "step.completed", "run.completed"),
        ]
        results = [event.data["result"] for event in replayed if event.name == "call.completed"]
        assert [msgspec.json.decode(result) for result in results] == [2, 4, 12]
        after = replayed[2].id or 0
        assert with_ids(await events_of_run(engine, run.run_id, after)) == with_ids(replayed[3:])


async def double(number: int) -> int:
    return 2 * number


async def test_an_event_of_an_item_is_the_same_live_and_replayed(open_engine: OpenEngine) -> None:
    flock, may_go = Flock(), anyio.Event()

    @flock.agent(next_agent="second")
    async def first() -> int:
        return 1

    @flock.agent
    async def second(result: int) -> int:
        await may_go.wait()
        return result + 1

    async with open_engine(flock) as engine:
        batch = await engine.submit_batch("first", [EMPTY], BatchOptions())
        (item,) = await engine.get_items(batch.batch_id)
        live: list[Event] = []
        with anyio.fail_after(PATIENCE_S):
            async for event in engine.events(item.run_id):
                if event is not None:
                    live.append(event)
                    if event.name == "step.started" and event.data["position"] == 1:
                        may_go.set()
        assert [event.name for event in live] == [
            *("run.started", "step.started", "step.completed", "step.started", "step.completed", "run.completed"),
        ]
        assert with_ids(live) == with_ids(await events_of_run(engine, item.run_id))


async def test_equal_requests_with_the_same_key_are_one_run(engine: Engine, gate: Gate) -> None:
    key = IdempotencyKey("k", b"1")
    run = await submit(engine, "nap", key=key)
    with pytest.raises(Replayed) as caught:
        await submit(engine, "nap", key=key)
    assert caught.value.made_id == run.run_id
    with pytest.raises(KeyReused):
        await submit(engine, "nap", key=IdempotencyKey("k", b"2"))
    gate.may_go.set()
    await engine.wait(run.run_id)
    await engine.delete_run(run.run_id)
    again = await submit(engine, "nap", key=key)
    assert again.run_id != run.run_id, "the key of a deleted run can be used again"


# Large results


async def test_a_result_that_is_too_large_fails_its_run_once(open_engine: OpenEngine) -> None:
    """The run is not tried again, because its model would be paid again."""
    flock, calls = Flock(), []

    @flock.agent
    def long() -> str:
        calls.append(1)
        return "x" * 17 * 1024 * 1024

    async with open_engine(flock) as engine:
        run = await finish(engine, "long")
    assert (run.status, run.error_type, len(calls)) == (RunStatus.FAILED, "result_too_large", 1)
    assert "more than" in (run.error or "")


async def test_a_large_result_is_stored_whole(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    def long() -> str:
        return "x" * 1_000_000

    async with open_engine(flock) as engine:
        assert len(result_of(await finish(engine, "long"))["result"]) == 1_000_000


async def test_a_large_run_of_many_steps_is_read_whole(open_engine: OpenEngine) -> None:
    """On a cluster each step gets all earlier data, so the stored size of a run is a multiple of its data."""
    flock = Flock()

    @flock.agent(output="n: int, more: str", next_agent=lambda result: "grow" if result["n"] < 5 else None)
    def grow(text: str, n: int = 0) -> dict[str, Any]:
        return {"n": n + 1, "more": "x" * 100_000}

    async with open_engine(flock) as engine:
        run = await finish(engine, "grow", {"text": "x" * 900_000})
        assert result_of(run)["n"] == 5
        assert [len(step.result) > 100_000 for step in (await engine.get_run(run.run_id)).steps] == [True] * 5


# Hand-offs


async def test_hand_offs_are_limited(open_engine: OpenEngine) -> None:
    flock = Flock(max_steps=5)

    @flock.agent(next_agent="count")
    def count(n: int = 0) -> dict[str, int]:
        return {"n": n + 1}

    @flock.agent(output="n: int", next_agent=lambda result: "up" if result["n"] < 3 else None)
    def up(n: int) -> dict[str, int]:
        return {"n": n + 1}

    @flock.agent(next_agent="gone")
    def lost() -> int:
        return 1

    async with open_engine(flock) as engine:
        run = await finish(engine, "up", {"n": 0})
        assert result_of(run) == {"n": 3}
        assert [step.agent_name for step in run.steps] == ["up"] * 3
        run = await finish(engine, "count")
        assert (run.error_type, len(run.steps)) == ("too_many_steps", 5)
        run = await finish(engine, "lost")
        assert (run.error_type, len(run.steps)) == ("invalid_handoff", 1)
        assert "no agent 'gone'" in (run.error or "")


async def test_the_value_of_an_output_decides_which_agent_is_next(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent(output="category: Literal['billing', 'other']", next_agent={"billing": "bill", "other": None})
    def triage(mail: str) -> dict[str, str]:
        return {"category": mail}

    @flock.agent
    def bill(mail: str, category: str) -> str:
        return f"{mail}, {category}"

    async with open_engine(flock) as engine:
        run = await finish(engine, "triage", {"mail": "billing"})
        assert result_of(run) == {"result": "billing, billing"}
        assert [(step.agent_name, step.next_agent) for step in run.steps] == [("triage", "bill"), ("bill", None)]
        run = await finish(engine, "triage", {"mail": "other"})
        assert result_of(run) == {"category": "other"}
        assert [(step.agent_name, step.next_agent) for step in run.steps] == [("triage", None)]


async def test_the_deadline_covers_all_steps_together(open_engine: OpenEngine) -> None:
    flock = Flock()

    @flock.agent(next_agent="second")
    async def first() -> int:
        await anyio.sleep(0.5)
        return 1

    @flock.agent
    async def second() -> int:
        await anyio.sleep(1.8)
        return 2

    async with open_engine(flock) as engine:
        run = await finish(engine, "first", timeout_s=2)
    assert (run.status, run.error_type, len(run.steps)) == (RunStatus.FAILED, "timeout", 1)


# Ownership


async def test_runs_of_another_principal_are_not_found(engine: Engine, gate: Gate) -> None:
    ann, ben = (ScopedEngine(engine, Principal(name=name)) for name in ("ann", "o'ben"))
    run = await ann.submit("steady", EMPTY)
    with pytest.raises(RunNotFound):
        await ben.get_run(run.run_id)
    with pytest.raises(RunNotFound):
        await ben.cancel_run(run.run_id)
    other = await ben.submit("steady", EMPTY, key=IdempotencyKey("k", b"1"))
    assert (await ann.submit("steady", EMPTY, key=IdempotencyKey("k", b"2"))).run_id != other.run_id
    assert await listed(ben, 1) == [other.run_id]
    admin = ScopedEngine(engine, Principal(name="ops", admin=True))
    assert len(await listed(admin, 3)) == 3
    assert (await admin.get_run(run.run_id)).principal == "ann"


# The engine itself


def some_run() -> Run:
    return Run(run_id=new_id(), flock="f", agent_name="add", inputs=msgspec.Raw(b"{}"), created_at=now())


#: A call of each method that needs a running engine.
CALLS: dict[str, Callable[[Engine], Any]] = {
    "drain": lambda engine: engine.drain(0),
    "check_ready": lambda engine: engine.check_ready(),
    "queue": lambda engine: engine.queue(),
    "submit": lambda engine: engine.submit("add", {"a": 1}),
    "submit_batch": lambda engine: engine.submit_batch("add", [{"a": 1}], BatchOptions()),
    "get_run": lambda engine: engine.get_run(new_id()),
    "get_outline": lambda engine: engine.get_outline(new_id()),
    "get_state": lambda engine: engine.get_state(new_id()),
    "get_calls": lambda engine: engine.get_calls(some_run()),
    "wait": lambda engine: engine.wait(new_id(), 0),
    "cancel_run": lambda engine: engine.cancel_run(new_id()),
    "retry_run": lambda engine: engine.retry_run(new_id()),
    "made_by": lambda engine: engine.made_by(IdempotencyKey("k", b"1")),
    "secret": lambda engine: engine.secret(),
    "files": lambda engine: engine.files(),
    "answer_call": lambda engine: engine.answer_call(new_id(), "ask:1", msgspec.Raw(b"1")),
    "list_questions": lambda engine: engine.list_questions(QuestionFilter()),
    "question_events": lambda engine: anext(engine.question_events(QuestionFilter())),
    "get_question": lambda engine: engine.get_question(new_id(), "ask:1"),
    "send_message": lambda engine: engine.send_message(new_id(), "name", msgspec.Raw(b"1")),
    "delete_run": lambda engine: engine.delete_run(new_id()),
    "get_session": lambda engine: engine.get_session("s"),
    "delete_session": lambda engine: engine.delete_session("s"),
    "check_budget": lambda engine: engine.check_budget("alice", 5),
    "get_account": lambda engine: engine.get_account("alice"),
    "get_usage": lambda engine: engine.get_usage(UsageFilter(first_day=now().date(), last_day=now().date())),
    "list_runs": lambda engine: engine.list_runs(RunFilter()),
    "events": lambda engine: anext(engine.events(new_id())),
    "get_batch": lambda engine: engine.get_batch(new_id()),
    "wait_batch": lambda engine: engine.wait_batch(new_id(), 0),
    "get_items": lambda engine: engine.get_items(new_id()),
    "list_batches": lambda engine: engine.list_batches(BatchFilter()),
    "batch_events": lambda engine: anext(engine.batch_events(new_id())),
    "cancel_batch": lambda engine: engine.cancel_batch(new_id()),
    "retry_batch": lambda engine: engine.retry_batch(new_id()),
    "delete_batch": lambda engine: engine.delete_batch(new_id()),
}


def test_each_method_that_needs_a_running_engine_is_in_the_table() -> None:
    public = {name for name in vars(Engine) if not name.startswith("_")}
    assert public - {"item_limits", "calls_models", "is_draining", "health", "observe", "watch", "shown_result"} == set(
        CALLS
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["memory", "disk", "temporal"])
async def test_an_engine_outside_its_context_raises_engine_stopped(
    kind: str, name: str, request: pytest.FixtureRequest
) -> None:
    """This holds before the engine is entered and after it is left."""
    flock = sample_flock()
    engine: Engine = flock.engine(store="flock.db" if kind == "disk" else ":memory:")
    if kind == "temporal":
        from flock.temporal import TemporalEngine

        engine = patient(TemporalEngine(flock.agents, request.getfixturevalue("temporal_address"), flock=new_id()))

    async def call() -> None:
        if inspect.isawaitable(made := CALLS[name](engine)):
            await made

    async def check() -> None:
        assert engine.health().engine == "stopped"
        with pytest.raises(EngineStopped, match="Enter it with 'async with', or run the app's lifespan"):
            await call()

    await check()
    async with engine:
        assert engine.health().engine == "running"
    await check()


async def test_an_engine_can_be_entered_again_but_not_twice(open_engine: OpenEngine) -> None:
    async with open_engine(sample_flock()) as engine:
        await engine.check_ready()
        assert (engine.health().engine, engine.health().store) == ("running", "ok")
        with pytest.raises(EngineStopped, match="already running"):
            await engine.__aenter__()
        assert (await engine.queue()).depth == 0
    assert engine.health().engine == "stopped"
    with pytest.raises(EngineStopped, match="not running"):
        await engine.submit("add", {"a": 1})


async def test_a_draining_engine_refuses_new_work_and_answers_waiters(engine: Engine, gate: Gate) -> None:
    run = await submit(engine, "nap")
    await gate.started.wait()
    gate.may_go.set()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(engine.drain, 20)
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED
    assert engine.is_draining
    with pytest.raises(EngineStopped, match="shutting down"):
        await submit(engine, "nap")
    with pytest.raises(EngineStopped):
        await engine.check_ready()


async def test_a_stream_of_a_new_run_continues_during_a_drain_until_the_run_ends(engine: Engine, gate: Gate) -> None:
    names, run_id = [], new_id()

    async def drain_and_end() -> None:
        await gate.started.wait()
        tasks.start_soon(engine.drain, 4 * PATIENCE_S)
        await until(lambda: engine.is_draining)
        await anyio.sleep(2 * PROGRESS_INTERVAL_S)  # a stream polls a cluster, so it would have ended by then
        gate.may_go.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain_and_end)
        with engine.watch(run_id):
            await submit(engine, "nap", run_id=run_id)
            async for event in engine.events(run_id):
                if event is not None:
                    names.append(event.name)
    assert names[-1] == "run.completed"


async def test_a_stream_of_a_new_run_ends_with_the_drain(engine: Engine, gate: Gate) -> None:
    names, run_id, has_begun = list[str](), new_id(), anyio.Event()

    async def drain() -> None:
        await has_begun.wait()
        await engine.drain(0.1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(drain)
        with anyio.fail_after(PATIENCE_S), engine.watch(run_id):
            await submit(engine, "nap", run_id=run_id)
            async for event in engine.events(run_id):
                if event is not None:
                    names.append(event.name)
                    has_begun.set()
    assert names[:1] == ["run.started"]
    assert "run.completed" not in names

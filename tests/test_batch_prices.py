"""Calls of a batch's items through the provider's batch endpoint: half the price, and no row paid twice."""

import asyncio
import importlib
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.core import Flock, FlockFactory, Model, Price
from flock.engine import jobs
from flock.errors import DefinitionError, StoreError
from flock.files import Image
from flock.models.llm import ModelClient
from flock.runs import Batch, BatchOptions, Engine, Run, RunContext, Usage
from flock.store import jobs as stored_jobs
from flock.store.jobs import JobStore
from flock.store.port import Job
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support import PATIENCE_S
from tests.support.batchapi import BatchProvider

pytestmark = pytest.mark.anyio

#: What one call of the fake provider costs, at the prices of gpt-4o.
NORMAL = (10 * 2.5 + 5 * 10) / 10**6
YES = {"answer": "yes"}
#: In US dollars.
MAX_COST = 0.0014


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TICK_S", 0.01)
    monkeypatch.setattr(jobs, "MIN_POLL_S", 0.02)
    monkeypatch.setattr(jobs, "MAX_POLL_S", 0.1)
    monkeypatch.setattr(jobs, "ENQUEUE_PAUSE_S", 0.1)
    monkeypatch.setattr(jobs, "GONE_S", 0.1)


@pytest.fixture
def provider() -> BatchProvider:
    return BatchProvider(lambda request: Reply(YES))


@pytest.fixture
def url(provider: BatchProvider) -> Iterator[str]:
    with provider.serve() as url:
        yield url


def model_of(url: str, **options: Any) -> Model:
    return Model("openai/gpt-4o", base_url=url, api_key="none", **{"batch": True, **options})


def flock_of(url: str, of_agent: Any = None, prices: Any = None, **options: Any) -> Flock:
    flock = Flock("half", model=model_of(url, **options), prices=prices)
    flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer", **(of_agent or {})))
    return flock


async def ended(engine: Engine, batch: Batch) -> Batch:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait_batch(batch.batch_id)


async def submit(engine: Engine, count: int, agent: str = "ask", **options: Any) -> Batch:
    rows = [{"text": f"text {number}"} for number in range(count)]
    return await engine.submit_batch(agent, rows, BatchOptions(**options))


async def run(flock: Flock, count: int, agent: str = "ask", **options: Any) -> tuple[Batch, list[Run]]:
    """Return a batch that has ended, in memory, and its items."""
    async with flock.engine() as engine:
        batch = await ended(engine, await submit(engine, count, agent, **options))
        return batch, list(await engine.get_items(batch.batch_id))


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the provider runs in another thread
            await anyio.sleep(0.01)


def is_quota(request: ModelRequest) -> Failure:
    return Failure(429, "insufficient_quota")


async def test_calls_of_items_go_through_the_endpoint_at_half_the_price(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 20))
        items = await engine.get_items(batch.batch_id)
        whole = await engine.get_run(items[0].run_id)
        calls = (await engine.get_calls(whole))[0]
    assert (batch.status, batch.failed_items) == ("completed", 0)
    assert [item.value for item in items] == [YES] * 20
    assert (len(provider.jobs), provider.normal) == (1, {})
    assert sorted(provider.paid.values()) == [1] * 20
    assert batch.usage is not None
    assert batch.usage.cost == pytest.approx(20 * NORMAL / 2)
    assert whole.steps[0].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.cost == NORMAL / 2
    assert [(call.kind, call.name, call.usage) for call in calls] == [("message", "receive", whole.usage)]
    [job] = provider.jobs.values()
    assert [line["custom_id"] for line in provider.lines(job)] == sorted(provider.paid)
    assert {line["body"]["model"] for line in provider.lines(job)} == {"gpt-4o"}


async def test_the_share_of_the_price_can_be_set(url: str) -> None:
    batch, _ = await run(flock_of(url, prices={"openai/gpt-4o": Price(2.5, 10, batch=0.2)}), 2)
    assert batch.usage is not None
    assert batch.usage.cost == pytest.approx(2 * NORMAL * 0.2)
    for share in (-0.1, 1.5, True, None, "half"):
        with pytest.raises(DefinitionError, match="batch= of a Price"):
            Price(1, 1, batch=share)  # type: ignore[arg-type]


async def test_single_runs_and_run_batch_without_it_are_normal_calls(provider: BatchProvider, url: str) -> None:
    async with flock_of(url).engine() as engine:
        single = await engine.submit("ask", {"text": "one"})
        with anyio.fail_after(PATIENCE_S):
            single = await engine.wait(single.run_id)
    assert single.value == YES
    assert single.usage is not None
    assert single.usage.cost == NORMAL
    batch, _ = await run(flock_of(url, batch=False), 2)
    assert batch.usage is not None
    assert batch.usage.cost == 2 * NORMAL
    assert provider.asked == []


async def test_run_batch_of_a_program_uses_it(provider: BatchProvider, url: str) -> None:
    results = await flock_of(url).run_batch_async("ask", [{"text": "one"}, {"text": "two"}])
    assert (results, len(provider.jobs), provider.normal) == ([YES, YES], 1, {})


async def test_with_a_fake_model_all_calls_are_normal() -> None:
    with FakeModel(lambda request: YES) as model:
        batch, _ = await run(flock_of("http://127.0.0.1:1"), 2)
    assert (batch.failed_items, len(model.requests)) == (0, 2)


async def test_a_repair_is_a_normal_call(provider: BatchProvider, url: str) -> None:
    def reply(request: ModelRequest) -> Reply:
        is_repair = "cannot be used" in str(request["messages"])
        return Reply("nonsense" if "text 1" in str(request["messages"]) and not is_repair else YES)

    provider._reply = reply
    batch, items = await run(flock_of(url), 3)
    assert [item.value for item in items] == [YES] * 3
    assert (len(provider.jobs), sum(provider.paid.values()), provider.normal.total()) == (1, 4, 1)
    assert batch.usage is not None
    assert batch.usage.cost == pytest.approx(3 * NORMAL / 2 + NORMAL)


async def test_a_request_that_is_rejected_is_the_error_of_its_row_and_a_retry_asks_again(
    provider: BatchProvider, url: str
) -> None:
    is_rejected = True

    def reply(request: ModelRequest) -> Reply | Failure:
        if "text 1" in str(request["messages"]) and is_rejected:
            return Failure(400, "context_length_exceeded", "The maximum context length is 4 tokens.")
        return Reply(YES)

    provider._reply = reply
    async with flock_of(url).engine() as engine:
        batch = await ended(engine, await submit(engine, 3))
        [failed] = await engine.get_items(batch.batch_id, statuses=["failed"])
        assert (failed.position, failed.error_type) == (1, "model_context_length")
        assert not provider.normal
        is_rejected = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (batch.status, batch.failed_items) == ("completed", 0)
    assert (sum(provider.paid.values()), len(provider.jobs), provider.normal) == (3, 2, {})


@pytest.mark.parametrize(
    "refused", [{"refusal": "No."}, {"content": "{", "finish_reason": "length"}, {"content": "nonsense"}]
)
async def test_an_answer_that_cannot_be_used_is_paid_and_a_retry_asks_again(
    provider: BatchProvider, url: str, refused: dict[str, Any]
) -> None:
    replies = [Reply(**refused), Reply(YES)]
    provider._reply = lambda request: replies.pop(0)
    async with flock_of(url, of_agent={"answer_retries": 0}).engine() as engine:
        batch = await ended(engine, await submit(engine, 1))
        assert batch.usage is not None
        assert (batch.status, batch.usage.cost) == ("failed", NORMAL / 2)
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert batch.usage is not None
    assert (batch.status, batch.usage.cost, len(provider.paid)) == ("completed", NORMAL, 2)


def _without(*numbers: int) -> Callable[..., None]:
    def edit(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
        for number in sorted(numbers, reverse=True):
            del output[number]

    return edit


def _expire(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
    error = {"code": "batch_expired", "message": "This request could not be executed before the completion window."}
    errors += [{"custom_id": line["custom_id"], "response": None, "error": error} for line in output[1:]]
    del output[1:]
    job["status"] = "expired"


def _fail(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
    output.clear()
    job["status"], job["errors"] = "failed", {"data": [{"code": "invalid_json_line", "line": 1}]}


def _break(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
    unknown = json.loads(json.dumps(output[0])) | {"custom_id": "nobody"}
    garbage = ["", "{", "[]", "nonsense", "7", '{"custom_id": 3}', '{"custom_id": "x", "response": []}']
    output[1:2] = [output[0], unknown, *garbage]


EDITS = {"missing": (_without(1, 2), 1), "expired": (_expire, 1), "failed": (_fail, 0), "broken": (_break, 2)}


@pytest.mark.parametrize(("edit", "left"), EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("fallback", [True, False])
async def test_calls_without_a_reply_fall_back_to_normal_calls_or_fail(
    provider: BatchProvider, url: str, edit: Callable[..., None], left: int, fallback: bool
) -> None:
    provider.edit = edit
    batch, items = await run(flock_of(url, batch_fallback=fallback), 3)
    completed = [item for item in items if item.status == "completed"]
    assert [item.value for item in completed] == [YES] * (3 if fallback else left)
    assert provider.normal.total() == (3 - left if fallback else 0)
    assert {item.error_type for item in items if item.error} == (set() if fallback else {"model_unavailable"})
    assert batch.usage is not None or not left
    expected = NORMAL * (left / 2 + (3 - left if fallback else 0))
    assert (batch.usage.cost if batch.usage else 0) == pytest.approx(expected)


async def test_single_lines_that_fail_at_the_provider_fall_back(provider: BatchProvider, url: str) -> None:
    statuses = [500, 429, 200]
    provider._reply = lambda request: Failure(status) if (status := statuses.pop(0)) != 200 else Reply(YES)
    statuses += [200, 200]
    _, items = await run(flock_of(url), 3, max_workers=1)
    assert ([item.value for item in items], provider.normal.total()) == ([YES] * 3, 2)


async def test_a_format_that_the_server_rejects_falls_back_to_one_that_it_accepts(
    provider: BatchProvider, url: str
) -> None:
    def reply(request: ModelRequest) -> Reply | Failure:
        is_schema = request.get("response_format", {}).get("type") == "json_schema"
        return Failure(400, None, "response_format json_schema is not supported") if is_schema else Reply(YES)

    provider._reply = reply
    batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)


async def test_files_that_are_gone_fall_back(provider: BatchProvider, url: str) -> None:
    def fault(method: str, path: str) -> None:
        if "/content" in path:
            provider.files.clear()

    provider.fault = fault
    batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)


async def test_a_job_that_is_gone_falls_back(provider: BatchProvider, url: str) -> None:
    provider.is_held = True
    async with flock_of(url).engine() as engine:
        batch = await submit(engine, 2)
        await until(lambda: provider.jobs)
        provider.jobs.clear()
        batch = await ended(engine, batch)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)


async def test_a_job_that_never_ends_is_cancelled_and_falls_back(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WINDOW_S", 0)
    monkeypatch.setattr(jobs, "MAX_DELAY_S", 1.0)
    provider.is_held = True
    batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)
    assert [job["status"] for job in provider.jobs.values()] == ["cancelled"]


async def test_a_job_is_polled_after_a_share_of_its_age_within_limits(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MIN_POLL_S", 1.0)
    monkeypatch.setattr(jobs, "MAX_POLL_S", 60.0)
    ages, pauses, look_after = [0, 3, 20, 200, 3000, 80_000], list[float](), jobs.Jobs._look_after

    async def look(self: jobs.Jobs, job: Job) -> None:
        """Look at the job when it has the next age, and keep the pause instead of waiting for it."""
        provider.is_held = bool(ages)
        monkeypatch.setattr(Job, "age_s", ages.pop(0) if ages else 0)
        await look_after(self, job)
        pauses.append(self._next.pop(job.job_id) - anyio.current_time())

    monkeypatch.setattr(jobs.Jobs, "_look_after", look)
    await run(flock_of(url), 1)
    assert pauses[:6] == pytest.approx([1, 1, 2, 20, 60, 60], abs=0.5)


async def test_the_polls_of_a_job_come_at_a_growing_interval(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine can only make the pauses longer."""
    monkeypatch.setattr(jobs, "POLL_SHARE", 1.0)
    monkeypatch.setattr(jobs, "MAX_POLL_S", 60.0)
    polled_at = list[float]()

    def fault(method: str, path: str) -> None:
        if (method, path) == ("GET", "/batches/batch_1"):
            polled_at.append(time.monotonic())
            provider.is_held = len(polled_at) < 6

    provider.fault = fault
    await run(flock_of(url), 1)
    assert len(polled_at) == 6
    for before, after in itertools.pairwise(polled_at):
        assert after - before >= 0.9 * (before - polled_at[0])


@pytest.mark.parametrize("is_by_count", [True, False])
async def test_calls_are_collected_until_they_are_enough_or_have_waited_long_enough(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch, is_by_count: bool
) -> None:
    """While a row runs that may still make a call."""
    monkeypatch.setattr(jobs, "MAX_CALLS", 3 if is_by_count else 100)
    monkeypatch.setattr(jobs, "COLLECT_S", 600 if is_by_count else 0.5)
    flock, is_open, asked_at = flock_of(url), anyio.Event(), list[float]()

    @flock.agent
    async def mixed(context: RunContext, text: str) -> str:
        if text == "text 0":
            await is_open.wait()
        asked_at.append(time.monotonic())
        return str((await context.run_agent("ask", {"text": text}))["answer"])

    sent_at = list[float]()
    provider.fault = lambda method, path: sent_at.append(time.monotonic()) if path == "/files" else None
    async with flock.engine() as engine:
        batch = await submit(engine, 8, "mixed", max_workers=8)
        await until(lambda: len(provider.paid) == (6 if is_by_count else 7))
        assert [len(provider.lines(job)) for job in provider.jobs.values()] == ([3, 3] if is_by_count else [7])
        if not is_by_count:
            assert sent_at[0] - asked_at[0] >= 0.5
        is_open.set()
        batch = await ended(engine, batch)
    assert (batch.status, [*provider.paid.values()], provider.normal) == ("completed", [1] * 8, {})


async def test_too_many_enqueued_tokens_make_smaller_jobs(provider: BatchProvider, url: str) -> None:
    def edit(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
        if len(output) > 3:
            provider.paid.clear()
            output.clear()
            job["status"], job["errors"] = "failed", {"data": [{"code": "token_limit_exceeded"}]}

    provider.edit = edit
    batch, _ = await run(flock_of(url), 8)
    assert (batch.failed_items, provider.normal) == (0, {})
    sizes = [len(provider.lines(job)) for job in provider.jobs.values()]
    assert (sizes[:2], sizes[-4:]) == ([8, 4], [2, 2, 2, 2])
    assert sorted(provider.paid.values()) == [1] * 8


FAULTS = {
    "upload": ("POST", "/files"),
    "submission": ("POST", "/batches"),
    "poll": ("GET", "/batches/batch_1"),
    "download": ("GET", "/files/file-2/content"),
}


@pytest.mark.parametrize("fault", ["lost", Failure(500), Failure(429, retry_after_s=0.01), Failure(503)])
@pytest.mark.parametrize("step", FAULTS)
async def test_a_request_that_fails_for_a_while_is_sent_again_and_nothing_is_paid_twice(
    provider: BatchProvider, url: str, step: str, fault: Any
) -> None:
    left = [fault, fault]
    provider.fault = lambda method, path: left.pop() if left and (method, path) == FAULTS[step] else None
    batch, _ = await run(flock_of(url), 3)
    assert left == ([fault] if (step, fault) == ("submission", "lost") else [])  # it is found then
    assert (batch.failed_items, provider.normal, list(provider.paid.values())) == (0, {}, [1] * 3)
    assert len(provider.jobs) == 1


async def test_a_submission_whose_answer_was_lost_is_searched_for_and_the_log_says_what_was_found(
    provider: BatchProvider, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also behind more than a page of other jobs."""
    is_lost = True

    def fault(method: str, path: str) -> str | None:
        nonlocal is_lost
        if not is_lost or (method, path) != ("POST", "/batches"):
            return None
        is_lost = False
        return "lost"

    provider.fault = fault
    original = provider._answer

    def answer(method: str, path: str, *args: Any) -> tuple[int, Any]:
        status, body = original(method, path, *args)
        if (method, path) == ("POST", "/batches"):
            for number in range(250):
                other = {"id": f"other_{number}", "status": "validating", "created_at": body["created_at"]}
                provider.jobs[other["id"]] = other
        return status, body

    provider._answer = answer  # type: ignore[method-assign, assignment]
    with caplog.at_level(logging.WARNING):
        batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, list(provider.paid.values())) == (0, [1, 1])
    assert len([path for method, path in provider.asked if (method, path) == ("POST", "/batches")]) == 1
    assert "the provider has it as batch_1" in caplog.text


async def test_a_download_that_breaks_off_is_read_again(provider: BatchProvider, url: str) -> None:
    left = ["half", "half"]
    provider.fault = lambda method, path: left.pop() if left and path.endswith("/content") else None
    batch, _ = await run(flock_of(url), 300, max_workers=50)
    assert (left, batch.failed_items, provider.normal, len(provider.jobs)) == ([], 0, {}, 1)
    assert set(provider.paid.values()) == {1}


async def test_rejected_keys_and_used_up_quota_stop_the_batch_and_a_retry_pays_only_the_rest(
    provider: BatchProvider, url: str
) -> None:
    credit = 4

    def reply(request: ModelRequest) -> Reply | Failure:
        nonlocal credit
        if not credit:
            return Failure(429, "insufficient_quota")
        credit -= 1
        return Reply(YES)

    provider._reply = reply
    async with flock_of(url).engine() as engine:
        batch = await ended(engine, await submit(engine, 10))
        done = await engine.get_items(batch.batch_id, statuses=["completed"])
        assert batch.status == "failed"
        assert batch.error is not None
        assert "quota" in batch.error
        assert (len(done), batch.cancelled_items, len(provider.paid)) == (4, 6, 4)
        credit = 100
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, batch.failed_items, batch.cancelled_items) == ("completed", 0, 0)
    assert list(provider.paid.values()) == [1] * 10
    assert not provider.normal


async def test_a_batch_that_stops_while_a_job_is_open_ends(
    provider: BatchProvider, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last item that could continue ends before its job does, and nothing changes after that."""
    provider._reply = is_quota
    monkeypatch.setattr(jobs, "CHUNK_SIZE", 1)
    monkeypatch.setattr(jobs, "TICK_S", 0.5)  # longer than the store is looked at
    give = JobStore.reply

    async def reply(self: JobStore, batch: Batch, *args: Any) -> Any:
        given = await give(self, batch, *args)
        with anyio.fail_after(PATIENCE_S):
            while not await engine.get_items(batch.batch_id, statuses=["failed", "cancelled"]):  # noqa: ASYNC110
                await anyio.sleep(0.01)
        await anyio.sleep(0.1)  # what continues items sees that, and waits for another change
        return given

    monkeypatch.setattr(JobStore, "reply", reply)
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 5))
    assert (batch.status, batch.completed_items, batch.cancelled_items) == ("failed", 5, 5)


async def test_a_server_without_the_endpoint_falls_back_with_a_warning(
    provider: BatchProvider, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    provider.fault = lambda method, path: Failure(404)
    batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)
    assert "normal calls replace those of a job" in caplog.text


async def test_waiting_items_hold_no_slot_and_no_clock(provider: BatchProvider, url: str) -> None:
    provider.is_held = True
    async with flock_of(url, of_agent={"timeout_s": 0.5}).engine(max_concurrency=2) as engine:
        batch = await submit(engine, 20, timeout_s=1, max_workers=20)
        await until(lambda: provider.jobs)
        await anyio.sleep(1.2)  # longer than both limits
        batch = await engine.get_batch(batch.batch_id)
        assert (batch.waiting_items, await engine.count_submitted(batch.batch_id)) == (20, 20)
        assert not engine._runner.active
        provider.is_held = False
        batch = await ended(engine, batch)
    assert (batch.failed_items, provider.normal) == (0, {})


async def test_cancel_cancels_the_job_and_a_retry_keeps_what_it_had_done(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    provider.is_held, provider.done_before_cancel = True, 3
    left: list[Failure | str] = ["lost", Failure(500)]
    provider.fault = lambda method, path: left.pop() if left and path.endswith("/cancel") else None
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 8)
        await until(lambda: provider.jobs)
        await engine.cancel_batch(batch.batch_id)
        batch = await ended(engine, batch)
        assert (batch.status, batch.cancelled_items) == ("cancelled", 8)
        assert [job["status"] for job in provider.jobs.values()] == ["cancelled"]
        assert not left
        provider.is_held = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, batch.failed_items) == ("completed", 0)
    assert list(provider.paid.values()) == [1] * 8
    assert [len(provider.lines(job)) for job in provider.jobs.values()] == [8, 5]
    assert not provider.normal


async def test_a_cancelled_item_is_not_submitted(provider: BatchProvider, url: str) -> None:
    provider.is_held = True
    async with flock_of(url).engine() as engine:
        batch = await submit(engine, 3)
        await until(lambda: provider.jobs)
        items = await engine.get_items(batch.batch_id)
        await engine.cancel_run(items[1].run_id)
        provider.is_held = False
        batch = await ended(engine, batch)
    assert (batch.completed_items, batch.cancelled_items, batch.failed_items) == (3, 1, 0)


async def test_a_job_reserves_its_cost_and_what_would_exceed_it_is_not_submitted(
    provider: BatchProvider, url: str
) -> None:
    """Each call is expected to cost about 0.0006 dollars: 100 output tokens and the prompt, at half the price."""
    flock = flock_of(url, of_agent={"max_tokens": 100})
    async with flock.engine() as engine:
        batch = await ended(engine, await submit(engine, 40, max_cost=0.004))
        sizes = [len(provider.lines(job)) for job in provider.jobs.values()]
        assert batch.usage is not None
        assert batch.usage.cost is not None
        assert sizes[0] < 8  # then the real length of the answers is known
        assert sum(sizes) > sizes[0]
        assert sum(provider.paid.values()) == sum(sizes) == 40
        assert batch.status == "completed"
        batch = await ended(engine, await submit(engine, 40, max_cost=0.001))
        assert batch.usage is not None
        assert batch.usage.cost is not None
        assert batch.usage.cost <= 0.001
        assert (batch.status, batch.failed_items) == ("failed", 0)
        assert batch.error is not None
        assert "It may cost 0.001 US dollars (max_cost)" in batch.error
        assert batch.cancelled_items > 0
        paid = sum(provider.paid.values())
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, max_cost=1))
    assert (batch.status, batch.cancelled_items, sum(provider.paid.values())) == ("completed", 0, 80)
    assert paid < 80
    assert not provider.normal


async def test_open_jobs_and_unread_replies_survive_a_stop(provider: BatchProvider, url: str, tmp_path: Path) -> None:
    provider.is_held = True
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 5)
        await until(lambda: provider.jobs)
        await until(lambda: ("GET", "/batches/batch_1") in provider.asked)
    provider.is_held = False
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, batch)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 5, {})
    assert batch.usage is not None
    assert batch.usage.cost == pytest.approx(5 * NORMAL / 2)


async def test_without_the_option_open_jobs_are_still_collected(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    provider.is_held = True
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 5)
        await until(lambda: ("GET", "/batches/batch_1") in provider.asked)
    provider.is_held = False
    async with flock_of(url, batch=False).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, batch)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 5, {})


async def test_a_workflow_may_make_several_calls_at_once(provider: BatchProvider, url: str, tmp_path: Path) -> None:
    flock = flock_of(url)

    @flock.agent
    async def both(context: RunContext, text: str) -> list[str]:
        asked = (context.run_agent("ask", {"text": f"{text} {number}"}) for number in range(3))
        return [(await each)["answer"] for each in [asyncio.ensure_future(one) for one in asked]]

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 4, "both"))
        items = await engine.get_items(batch.batch_id)
    assert [item.value for item in items] == [{"result": ["yes"] * 3}] * 4
    assert (list(provider.paid.values()), provider.normal) == ([1] * 12, {})
    assert batch.usage is not None
    assert batch.usage.cost == pytest.approx(12 * NORMAL / 2)


async def test_hooks_see_the_replies_of_the_endpoint(provider: BatchProvider, url: str) -> None:
    flock, seen = flock_of(url), list[Any]()

    @flock.on_model_call
    async def look(call: Any, ask: Any) -> Any:
        seen.append((await ask()).text)
        return seen[-1]

    batch, _ = await run(flock, 2)
    assert (batch.failed_items, set(seen), provider.normal) == (0, {'{"answer":"yes"}'}, {})
    assert list(provider.paid.values()) == [1, 1]


@pytest.mark.parametrize("options", [{"dedupe": True}, {"sample": 3}, {"limit": 3}], ids=str)
async def test_options_of_the_batch_hold(provider: BatchProvider, url: str, options: dict[str, Any]) -> None:
    rows = [{"text": f"text {number % 3 if 'dedupe' in options else number}"} for number in range(2000)]
    async with flock_of(url).engine() as engine:
        batch = await ended(engine, await engine.submit_batch("ask", rows, BatchOptions(max_workers=50, **options)))
    assert (batch.status, batch.failed_items) == ("completed", 0)
    assert (list(provider.paid.values()), provider.normal) == ([1] * 3, {})


@pytest.mark.cluster
async def test_on_a_cluster_it_is_refused_at_the_start() -> None:
    temporal = importlib.import_module("flock.temporal")
    flock = flock_of("http://127.0.0.1:1")
    for make in (temporal.TemporalEngine, temporal.TemporalWorker):
        models = {"default_model": flock.model} if make is temporal.TemporalEngine else {}
        first = [] if models else [ModelClient(flock.model)]
        with pytest.raises(DefinitionError, match=r"'openai/gpt-4o' of 'ask' has batch=True, but on a cluster"):
            async with make(flock.agents, *first, "127.0.0.1:1", **models):
                pass


async def test_while_it_is_unknown_whether_a_provider_has_a_job_nothing_is_sent_again(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    """Not even if the provider rejects the question, such as after the key was changed."""
    is_lost, rejected = True, 0

    def fault(method: str, path: str) -> Failure | str | None:
        nonlocal is_lost, rejected
        if (method, path) == ("POST", "/batches") and is_lost:
            is_lost = False
            return "lost"
        if (method, path) == ("GET", "/batches") and rejected < 3:
            rejected += 1
            return Failure(401)
        return None

    provider.fault = fault
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 3))
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 3, {})
    assert (rejected, len(provider.jobs)) == (3, 1)


async def test_a_store_that_cannot_be_written_for_a_while_loses_nothing(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RETRY_AFTER_S", 0.05)
    async with flock_of(url).engine() as engine:
        original, left = engine.store.jobs.reply, [1, 2]

        async def reply(*args: Any) -> Any:
            if left:
                left.pop()
                raise StoreError("The disk is full.")
            return await original(*args)

        engine.store.jobs.reply = reply
        batch = await ended(engine, await submit(engine, 3))
    assert (left, batch.failed_items, list(provider.paid.values()), provider.normal) == ([], 0, [1] * 3, {})


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"id": null}'])
async def test_a_submission_whose_answer_cannot_be_used_is_searched_for(
    provider: BatchProvider, url: str, answer: bytes
) -> None:
    left = [answer]
    provider.fault = lambda method, path: left.pop() if left and (method, path) == ("POST", "/batches") else None
    batch, _ = await run(flock_of(url), 3)
    assert (left, batch.failed_items, list(provider.paid.values()), provider.normal) == ([], 0, [1] * 3, {})
    assert len(provider.jobs) == 1


async def test_a_job_that_may_have_been_sent_is_kept_while_its_model_is_missing(
    provider: BatchProvider, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(method: str, path: str) -> Failure | str | None:
        return "lost" if (method, path) == ("POST", "/batches") else Failure(500) if method == "GET" else None

    provider.fault = fault
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 3)
        await until(lambda: ("GET", "/batches") in provider.asked)
    provider.fault = lambda method, path: None
    other = Flock("half", model=Model("openai/gpt-5", base_url=url, api_key="none"))
    other.add_agent(flock_of(url).agents["ask"])
    async with other.engine(store=tmp_path / "flock.db"):
        await until(lambda: caplog.text.count("is not a model of this program any more") > 1)
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, batch)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 3, {})
    assert len(provider.jobs) == 1


async def test_while_another_job_uses_the_room_for_enqueued_tokens_a_job_waits_and_keeps_its_size(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_CALLS", 4)
    provider.max_enqueued, provider.is_held, rejected = 6, True, ["validating", "failed", "failed"]
    async with flock_of(url).engine() as engine:
        batch = await submit(engine, 12, max_workers=12)
        await until(lambda: len(provider.jobs) > 1)
        polled = provider.asked.count(("GET", "/batches/batch_1"))
        await until(lambda: provider.asked.count(("GET", "/batches/batch_1")) > polled + 5)
        assert [job["status"] for job in provider.jobs.values()][:4] in (rejected[:2], rejected)
        provider.is_held = False
        batch = await ended(engine, batch)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 12, {})
    assert {len(provider.lines(job)) for job in provider.jobs.values()} == {4}


def repairs(provider: BatchProvider) -> None:
    """The answer for the first row cannot be used, so it is asked again, in a normal call."""

    def reply(request: ModelRequest) -> Reply:
        text = str(request["messages"])
        is_invalid = "text 0" in text and "cannot be used" not in text
        return Reply("nonsense", usage=Usage(input_tokens=10, output_tokens=100)) if is_invalid else Reply(YES)

    provider._reply = reply


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_normal_call_waits_while_open_jobs_hold_the_rest_of_max_cost(
    provider: BatchProvider, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_restarted: bool
) -> None:
    """Two calls in jobs are expected to cost 0.0012 dollars. What the second one holds is too much with the repair."""
    monkeypatch.setattr(jobs, "MAX_CALLS", 1)
    repairs(provider)
    provider.held = {"batch_1", "batch_2"}
    flock = flock_of(url, of_agent={"max_tokens": 100})

    async def polls() -> None:
        polled = provider.asked.count(("GET", "/batches/batch_2"))
        await until(lambda: provider.asked.count(("GET", "/batches/batch_2")) > polled + 3)

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 2, max_cost=MAX_COST)
        await until(lambda: len(provider.jobs) == 2)  # only then both hold something
        provider.held.remove("batch_1")
        await until(lambda: any(path.endswith("/content") for _, path in provider.asked))
        await polls()
        assert not provider.normal
        if not is_restarted:
            provider.held.clear()
            batch = await ended(engine, batch)
    if is_restarted:
        async with flock.engine(store=tmp_path / "flock.db") as engine:
            await polls()
            assert not provider.normal
            provider.held.clear()
            batch = await ended(engine, batch)
    assert (batch.status, batch.failed_items, provider.normal.total()) == ("completed", 0, 1)


async def test_calls_that_a_job_has_not_answered_hold_nothing_once_it_has_ended(
    provider: BatchProvider, url: str
) -> None:
    repairs(provider)
    provider.edit = _without(1)
    batch, _ = await run(flock_of(url, of_agent={"max_tokens": 100}), 2, max_cost=MAX_COST)
    assert (batch.status, batch.failed_items, provider.normal.total()) == ("completed", 0, 2)


async def test_rows_with_paid_replies_end_although_the_batch_stops(provider: BatchProvider, url: str) -> None:
    def reply(request: ModelRequest) -> Reply:
        return Reply("nonsense" if re.search("text [012]", str(request["messages"])) else YES)

    provider._reply = reply
    flock = flock_of(url, of_agent={"answer_retries": 0})
    async with flock.engine() as engine:
        batch = await ended(engine, await submit(engine, 10, max_failures=1, max_workers=1))
        items = await engine.get_items(batch.batch_id)
    assert [item.status for item in items] == ["failed"] * 3 + ["completed"] * 7
    assert list(provider.paid.values()) == [1] * 10


async def test_a_call_of_a_row_that_has_ended_is_not_submitted(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    """Only one call of the first row fits into the budget, and its reply is the end of the row."""
    flock = flock_of(url, of_agent={"max_tokens": 100})

    @flock.agent
    async def either(context: RunContext, text: str) -> str:
        asked = [asyncio.ensure_future(context.run_agent("ask", {"text": f"{text} {n}"})) for n in range(2)]
        done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        return str(done.pop().result()["answer"])

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await submit(engine, 1, "either", max_cost=0.001))
        [item] = await engine.get_items(batch.batch_id)
    assert (item.status, len(provider.jobs), list(provider.paid.values())) == ("completed", 1, [1])


async def test_a_row_that_continues_with_one_reply_still_waits_for_the_other_job(
    provider: BatchProvider, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "MAX_CALLS", 1)
    provider.held = {"batch_2"}
    flock = flock_of(url)

    @flock.agent
    async def both(context: RunContext, text: str) -> list[str]:
        asked = (context.run_agent("ask", {"text": f"{text} {number}"}) for number in range(2))
        return [(await each)["answer"] for each in [asyncio.ensure_future(one) for one in asked]]

    async with flock.engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 1, "both")
        with anyio.fail_after(PATIENCE_S):
            while not (await engine.get_items(batch.batch_id))[0].usage:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            while not (await engine.get_batch(batch.batch_id)).waiting_items:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        polled = provider.asked.count(("GET", "/batches/batch_2"))
        await until(lambda: provider.asked.count(("GET", "/batches/batch_2")) > polled + 2)
        provider.held.clear()
        batch = await ended(engine, batch)
    assert (batch.failed_items, len(provider.jobs), list(provider.paid.values())) == (0, 2, [1, 1])
    assert not provider.normal


async def test_a_job_whose_key_is_rejected_until_long_after_its_window_falls_back(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WINDOW_S", 0.2)
    monkeypatch.setattr(jobs, "MAX_DELAY_S", 0.2)
    provider.fault = lambda method, path: Failure(401) if path.startswith("/batches/") else None
    batch, _ = await run(flock_of(url), 2)
    assert (batch.failed_items, provider.normal.total()) == (0, 2)


async def test_a_budget_that_normal_calls_use_for_a_while_is_not_used_up(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, is_open = flock_of(url, of_agent={"max_tokens": 100}), threading.Event()
    model = model_of(url, batch=False)
    flock.add_agent(
        FlockFactory.create_default_agent("plain", input="text", output="answer", model=model, max_tokens=100)
    )

    def reply(request: ModelRequest) -> Reply:
        if "text 0" in str(request["messages"]):
            assert is_open.wait(PATIENCE_S)
        return Reply(YES)

    provider._reply = reply

    @flock.agent
    async def mixed(context: RunContext, text: str) -> str:
        agent = "plain" if text == "text 0" else "ask"
        return str((await context.run_agent(agent, {"text": text}))["answer"])

    monkeypatch.setattr(jobs, "COLLECT_S", 0)
    async with flock.engine() as engine:
        original, tried = engine.store.jobs.create, list[Any]()

        async def create(*args: Any) -> Any:
            tried.append(await original(*args))
            return tried[-1]

        engine.store.jobs.create = create
        batch = await submit(engine, 2, "mixed", max_cost=MAX_COST)
        await until(lambda: tried.count(None) > 2)
        is_open.set()
        batch = await ended(engine, batch)
    assert (batch.status, batch.completed_items, batch.cancelled_items) == ("completed", 2, 0)


def _list(*numbers: int, has_more: bool = True, **more: Any) -> bytes:
    jobs = [{"id": f"other_{number}", "status": "completed", **more} for number in numbers]
    return json.dumps({"data": jobs, "has_more": has_more}).encode()


@pytest.mark.parametrize(
    "pages",
    [
        pytest.param([b'{"data": 5}', b'{"data": null}', b"{}", b'{"data": [3]}', b"[]"], id="garbage"),
        pytest.param([_list(1, 2), _list(3, 4)], id="no times"),
        pytest.param([_list(1, 2, created_at="today")], id="invalid times"),
    ],
)
async def test_a_job_is_found_although_parts_of_the_list_are_garbage(
    provider: BatchProvider, url: str, pages: list[bytes]
) -> None:
    left: list[Any] = ["lost"]

    def fault(method: str, path: str) -> Any:
        if (method, path) == ("POST", "/batches"):
            return left.pop() if left else None
        return pages.pop(0) if (method, path) == ("GET", "/batches") and pages else None

    provider.fault = fault
    batch, _ = await run(flock_of(url), 3)
    assert (pages, batch.failed_items, list(provider.paid.values()), provider.normal) == ([], 0, [1] * 3, {})
    assert len(provider.jobs) == 1


async def test_a_list_of_jobs_that_repeats_itself_has_an_end(provider: BatchProvider, url: str) -> None:
    """The job was not created, so it is sent again."""
    left: list[Any] = [Failure(500)]

    def fault(method: str, path: str) -> Any:
        if (method, path) == ("POST", "/batches"):
            return left.pop() if left else None
        return _list(1, 2) if (method, path) == ("GET", "/batches") else None

    provider.fault = fault
    batch, _ = await run(flock_of(url), 3)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal) == (0, [1] * 3, {})
    assert [provider.asked.count((method, "/batches")) for method in ("GET", "POST")] == [2, 2]
    assert [len(provider.lines(job)) for job in provider.jobs.values()] == [3]


async def test_a_job_that_its_provider_does_not_find_once_is_not_gone(provider: BatchProvider, url: str) -> None:
    left = [Failure(404), Failure(503), Failure(404)]
    provider.fault = lambda method, path: left.pop() if left and path.startswith("/batches/") else None
    batch, _ = await run(flock_of(url), 2)
    assert (left, batch.failed_items, list(provider.paid.values()), provider.normal) == ([], 0, [1, 1], {})


async def test_what_a_job_that_is_too_slow_has_done_is_not_paid_again(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WINDOW_S", 0)
    monkeypatch.setattr(jobs, "MAX_DELAY_S", 1.5)
    provider.is_held, provider.done_before_cancel = True, 3
    batch, _ = await run(flock_of(url), 5)
    assert (batch.failed_items, list(provider.paid.values()), provider.normal.total()) == (0, [1] * 5, 2)


async def test_a_program_that_is_interrupted_in_run_batch_cancels_its_jobs(provider: BatchProvider, url: str) -> None:
    provider.is_held = True
    task = asyncio.create_task(flock_of(url).run_batch_async("ask", [{"text": "one"}]))
    await until(lambda: provider.jobs)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [job["status"] for job in provider.jobs.values()] == ["cancelled"]


async def test_a_batch_that_is_cancelled_during_an_upload_creates_no_job(provider: BatchProvider, url: str) -> None:
    begun, is_open = threading.Event(), threading.Event()

    def fault(method: str, path: str) -> None:
        if (method, path) == ("POST", "/files"):
            begun.set()
            assert is_open.wait(PATIENCE_S)

    provider.fault = fault
    async with flock_of(url).engine() as engine:
        batch = await submit(engine, 3)
        await until(begun.is_set)
        await engine.cancel_batch(batch.batch_id)
        is_open.set()
        batch = await ended(engine, batch)
    assert (batch.cancelled_items, provider.jobs, provider.paid) == (3, {}, {})


async def test_jobs_are_cancelled_at_the_same_time(
    provider: BatchProvider, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one cannot be cancelled, so it is tried until the time is over."""
    monkeypatch.setattr(jobs, "MAX_CALLS", 1)
    provider.is_held = True
    asked = provider.asked

    def fault(method: str, path: str) -> Failure | None:
        is_first = path == "/batches/batch_1/cancel" and ("POST", "/batches/batch_2/cancel") not in asked
        return Failure(503) if is_first else None

    provider.fault = fault
    async with flock_of(url).engine() as engine:
        batch = await submit(engine, 2)
        await until(lambda: len(provider.jobs) == 2)
        await engine.cancel_batch(batch.batch_id)
        with anyio.fail_after(jobs.CANCEL_TIMEOUT_S / 2):
            await engine.wait_batch(batch.batch_id)
    assert [job["status"] for job in provider.jobs.values()] == ["cancelled", "cancelled"]


async def test_a_retry_after_a_cancel_submits_the_rest_also_without_a_fallback(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    def edit(job: dict[str, Any], output: list[Any], errors: list[Any]) -> None:
        if job["status"] == "cancelled":
            error = {"code": "batch_cancelled", "message": "The batch was cancelled."}
            lines = provider.lines(job)[len(output) :]
            errors += [{"custom_id": line["custom_id"], "response": None, "error": error} for line in lines]

    provider.edit, provider.is_held, provider.done_before_cancel = edit, True, 3
    async with flock_of(url, batch_fallback=False).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 8)
        await until(lambda: ("GET", "/batches/batch_1") in provider.asked)
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
        provider.is_held = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, batch.failed_items, batch.cancelled_items) == ("completed", 0, 0)
    assert (list(provider.paid.values()), provider.normal) == ([1] * 8, {})


async def test_a_job_that_is_written_and_read_in_pieces_is_complete(
    provider: BatchProvider, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is also taken apart in pieces, after it was cancelled."""
    monkeypatch.setattr(stored_jobs, "CHUNK_SIZE", 3)
    monkeypatch.setattr(stored_jobs, "PAGE_BYTES", 100)
    provider.is_held = True
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 10)
        await until(lambda: provider.jobs)
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
        provider.is_held = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, list(provider.paid.values()), provider.normal) == ("completed", [1] * 10, {})
    assert [len(provider.lines(job)) for job in provider.jobs.values()] == [10, 10]


async def test_a_job_that_was_cancelled_does_not_block_normal_calls_of_a_retry(
    provider: BatchProvider, url: str, tmp_path: Path
) -> None:
    """Without the option, its rows make normal calls. What the job held is free as soon as it was read."""
    provider.is_held = True
    async with flock_of(url).engine(store=tmp_path / "flock.db") as engine:
        batch = await submit(engine, 2, max_cost=0.05)
        await until(lambda: ("GET", "/batches/batch_1") in provider.asked)
        await engine.cancel_batch(batch.batch_id)
        await ended(engine, batch)
    async with flock_of(url, batch=False).engine(store=tmp_path / "flock.db") as engine:
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
    assert (batch.status, batch.failed_items, list(provider.paid.values())) == ("completed", 0, [1, 1])
    assert len(provider.jobs) == 1


async def test_a_file_that_its_provider_does_not_find_once_is_not_gone(provider: BatchProvider, url: str) -> None:
    left = [Failure(404)]
    provider.fault = lambda method, path: left.pop() if left and path.endswith("/content") else None
    batch, _ = await run(flock_of(url), 2)
    assert (left, batch.failed_items, list(provider.paid.values()), provider.normal) == ([], 0, [1, 1], {})


def look_up(word: str) -> str:
    return word


def test_agents_with_tools_or_files_and_other_providers_are_refused_at_the_definition() -> None:
    model = Model("openai/gpt-4o", batch=True)
    create = FlockFactory.create_default_agent
    with pytest.raises(DefinitionError, match="has tools, and each of their results needs another call"):
        create("ask", input="text", output="answer", model=model, tools=[look_up])
    with pytest.raises(DefinitionError, match="has files as inputs"):
        create("ask", input="picture: Image", types={"Image": Image}, output="answer", model=model)
    with pytest.raises(DefinitionError, match=r"'anthropic' of 'ask' has no batch endpoint .* openai, groq"):
        create("ask", input="text", output="answer", model=Model("anthropic/claude-opus-5", batch=True))
    flock = Flock("half", model=model)
    with pytest.raises(DefinitionError, match="has tools"):
        flock.add_agent(create("ask", input="text", output="answer", tools=[look_up]))
    for name in ("batch", "batch_fallback"):
        with pytest.raises(DefinitionError, match=rf"{name}.*True or False"):
            Model("openai/gpt-4o", **{name: "yes"})  # type: ignore[arg-type]

"""The pace of model calls: rate limits, outages, limits of a ``Model``, and other models to ask."""

import contextlib
import functools
import itertools
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest

from flock.agents.checks import problems
from flock.core import Flock, FlockFactory, Model
from flock.errors import DefinitionError, ModelError
from flock.models import pace
from flock.models.completions import Completion, Message
from flock.models.llm import MAX_SERVER_ERRORS, ModelClient
from flock.models.models import ModelChoice
from flock.models.pace import Breaker, Caller, Gate, ModelLimits, Pace, Passage, Rate
from flock.models.replies import hold_s
from flock.models.requests import Request
from flock.runs import BatchOptions, RunStatus
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support import PATIENCE_S, ROOT
from tests.support.engines import OpenEngine, until, until_run
from tests.support.models import LimitedModel

pytestmark = pytest.mark.anyio

ITEM, RUN = Caller(is_item=True), Caller()
REFUSAL = ModelError("The model m is over its rate limit.", "model_rate_limited")
OUTAGE = ModelError("The model m could not be reached.", "model_unavailable")
ANSWER = {"answer": "yes"}
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}


def asking(model: ModelChoice, **options: Any) -> Flock:
    flock = Flock("pace", model=model)
    flock.add_agent(FlockFactory.create_default_agent(name="ask", input="number: int", output="answer: str", **options))
    return flock


async def complete(
    models: ModelClient, model: ModelChoice = None, *, caller: Caller = RUN, **options: Any
) -> Completion:
    return await models.complete(model, Request([Message("user", "hi")], SCHEMA, **options), caller)


async def failure_of(models: ModelClient, model: ModelChoice = None, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        await complete(models, model, **options)
    return caught.value


def client(fake: FakeModel | LimitedModel, model: ModelChoice = "openai/m", backoff_s: float = 0.001) -> ModelClient:
    return ModelClient(model, transport=fake.transport, backoff_s=backoff_s)


# The rate


def test_there_is_no_limit_before_the_first_refusal() -> None:
    rate = Rate()
    for _ in range(1000):
        assert rate.wait_s(0) == 0
        rate.sent(0)


def test_a_refusal_halves_the_rate_which_then_grows_again() -> None:
    rate = Rate()
    for _ in range(100):
        rate.sent(10)
    rate.refused(11, 10, is_overload=False, until=11)
    assert rate.per_s(11) == 50
    rate.refused(11.1, 10, is_overload=False, until=11.1)
    assert 50 <= rate.per_s(11.1) < 51, "it was sent before the rate was halved"
    rate.refused(11.2, 11.1, is_overload=False, until=11.2)
    assert 24 < rate.per_s(11.2) < 51
    rates = [rate.per_s(11.2 + seconds) for seconds in (1, 5, 15, 40)]
    assert rates == sorted(rates)
    assert rates[0] < 1.02 * rate.per_s(11.2)
    assert rates[-1] == math.inf


def test_the_rate_does_not_fall_below_what_the_provider_accepts() -> None:
    rate = Rate()
    for tenth in range(100):
        rate.sent(tenth / 10)
        rate.answered(tenth / 10)
    for tenth in range(100, 120):
        rate.refused(tenth / 10, tenth / 10, is_overload=False, until=0)
    assert rate.per_s(12) > 5


def test_a_few_random_overloads_do_not_change_the_rate() -> None:
    rate = Rate()
    for tenth in range(200):
        rate.sent(tenth / 10)
        if tenth % 10 == 5:
            rate.refused(tenth / 10, tenth / 10, is_overload=True, until=0)
        else:
            rate.answered(tenth / 10)
    assert rate.per_s(20) == math.inf
    for tenth in range(200, 220):
        rate.refused(tenth / 10, tenth / 10, is_overload=True, until=0)
    assert rate.per_s(22) < 10


def test_a_breaker_lets_one_call_find_out_about_the_others() -> None:
    breaker = Breaker()
    assert breaker.wait_s(0) == 0
    breaker.open(0, 5, OUTAGE)
    assert breaker.wait_s(1) == 4
    assert breaker.wait_s(5) == 0
    breaker.probe = object()
    assert breaker.wait_s(6) == math.inf
    breaker.close()
    assert breaker.wait_s(6) == 0


# Waiting


class Door(Gate):
    """A gate that a test opens for a number of calls."""

    free = 0

    def wait_s(self, now: float, caller: Caller, passage: Passage) -> float:
        return 0.0 if self.free else math.inf

    def admit(self, now: float, caller: Caller, passage: Passage) -> None:
        self.free -= 1


async def test_runs_go_before_items_and_each_in_order() -> None:
    door, passed = Door(), list[str]()

    async def enter(name: str) -> None:
        await door.enter(ITEM if name.startswith("item") else RUN, Passage())
        passed.append(name)

    async with anyio.create_task_group() as tasks:
        for number, name in enumerate(("item 1", "item 2", "run 1", "item 3", "run 2"), 1):
            tasks.start_soon(enter, name)
            while door.waiting < number:
                await anyio.lowlevel.checkpoint()
        door.free = 5
        door.wake()
    assert passed == ["run 1", "run 2", "item 1", "item 2", "item 3"]


async def test_a_cancelled_caller_leaves_nothing_behind() -> None:
    door, passed = Door(), anyio.Event()

    async def enter() -> None:
        await door.enter(RUN, Passage())
        passed.set()

    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(0.01):
            await door.enter(RUN, Passage())
        assert door.waiting == 0
        tasks.start_soon(enter)
        while not door.waiting:
            await anyio.lowlevel.checkpoint()
        door.free = 1
        door.wake()
        with anyio.fail_after(PATIENCE_S):
            await passed.wait()


async def test_after_a_long_wait_one_call_is_sent_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a crowd would be woken at once, and refused at once."""
    monkeypatch.setattr(pace, "PROBE_AFTER_S", 0.01)
    fake, arrived, in_flight = FakeModel(), list[int](), 0

    async def reply(request: ModelRequest) -> Any:
        nonlocal in_flight
        in_flight += 1
        arrived.append(in_flight)
        await anyio.sleep(0.05)
        in_flight -= 1
        return Reply(ANSWER) if len(arrived) > 21 else Failure(429, retry_after_s=0.1)

    fake.replies = [reply] * 42
    async with client(fake) as models, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(complete, models)
    assert arrived[20] == 1, "the first call after the refusals is alone"
    assert arrived[21] == 1, "it was refused, so the next one is alone too"
    assert len(arrived) == 41


# Refusals


@pytest.mark.alone
async def test_a_batch_meets_the_limit_of_its_provider() -> None:
    """Scaled from 600 a minute: 200 a second, and 10 % are refused at random. See ``bench.rate_limits``."""
    limited = LimitedModel(200, overloaded=0.1, latency_s=0.01)
    flock = asking("openai/m")
    async with flock.engine(transport=limited.transport) as engine:
        started = time.monotonic()
        batch = await engine.submit_batch("ask", [{"number": n} for n in range(1000)], BatchOptions(max_workers=50))
        batch = await engine.wait_batch(batch.batch_id)
        took_s = time.monotonic() - started
    assert (batch.completed_items, batch.failed_items) == (1000, 0)
    assert limited.statuses[200] == 1000, "no row was paid twice"
    assert limited.share(429) < 0.5
    assert took_s < 60  # a busy machine is slower than the limit; the bench measures


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"retry-after-ms": "60"}, id="milliseconds"),
        pytest.param({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60ms"}, id="OpenAI"),
        pytest.param({"retry-after": "soon", "x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "0.06"}),
    ],
)
async def test_all_callers_wait_as_long_as_the_provider_asks(headers: dict[str, str], model: FakeModel) -> None:
    model.replies = [Failure(429, headers=headers), Reply(ANSWER), Reply(ANSWER)]
    async with client(model) as models:
        started = time.monotonic()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(complete, models)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(complete, models)
        assert time.monotonic() - started >= 0.05


def test_headers_about_limits_are_read() -> None:
    at = (datetime.now(UTC) + timedelta(seconds=30)).isoformat().replace("+00:00", "Z")
    openai = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-limit-requests": "60"}
    anthropic = {"anthropic-ratelimit-requests-remaining": "0", "anthropic-ratelimit-requests-reset": at}
    assert hold_s(openai | {"x-ratelimit-reset-requests": "6m0s"}, is_refused=True) == 360
    assert hold_s(openai | {"x-ratelimit-reset-requests": "1m0s"}, is_refused=False) == 1, "one of 60 calls"
    assert 28 < hold_s(anthropic, is_refused=True) <= 30
    for garbage in ("", "soon", "-5", "1x", "nan", "1e9", "2020-13-45", "9999999999999999999999h"):
        assert hold_s(openai | {"x-ratelimit-reset-requests": garbage}, is_refused=True) >= 0
    assert hold_s({"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-requests": "60"}, is_refused=True) == 0
    assert hold_s({}, is_refused=True) == 0


@pytest.mark.parametrize("value", ["²", "٣", "5" * 5000, "1e400", "nan", "-1", "0x1", "1_0", "", "0"])
async def test_a_header_that_is_not_a_number_is_ignored(value: str, model: FakeModel) -> None:
    """A good answer stays one, whatever a proxy has written beside it."""
    for counted, suffix in itertools.product(("requests", "tokens"), ("limit", "reset", "remaining")):
        headers = {
            f"x-ratelimit-remaining-{counted}": "0",
            f"x-ratelimit-reset-{counted}": "1ms",
            f"x-ratelimit-{suffix}-{counted}": value,
            f"anthropic-ratelimit-{counted}-remaining": "0",
            f"anthropic-ratelimit-{counted}-{suffix}": value,
        }
        sent = [(name.encode(), text.encode()) for name, text in headers.items()]
        model.replies = [httpx.Response(200, json=Reply(ANSWER).completion(), headers=sent)]
        async with client(model) as models:
            with anyio.fail_after(PATIENCE_S):
                assert (await complete(models)).text


@pytest.mark.parametrize("asked", ["1e9", "1e999", "100", "Fri, 31 Dec 2100 23:59:59 GMT"])
async def test_a_run_does_not_wait_past_its_deadline(asked: str, model: FakeModel) -> None:
    model.replies = [Failure(429, headers={"retry-after": asked})]
    async with client(model) as models:
        with anyio.fail_after(PATIENCE_S):
            failure = await failure_of(models)
            second = await failure_of(models)  # it is not sent
    assert failure.error_type == second.error_type == "model_rate_limited"
    assert "It asks to wait" in str(failure)


async def test_an_item_asks_again_after_the_longest_wait(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MAX_WAIT_S", 0.05)
    model.replies = [
        Failure(429, headers={"retry-after": "1e9"}),
        Failure(429, headers={"retry-after": "1e9"}),
        Reply(ANSWER),
    ]
    async with client(model) as models:
        assert (await complete(models, caller=ITEM)).text


@pytest.mark.parametrize(
    "reply", [Failure(429), Failure(429, headers={"retry-after": formatdate(0, usegmt=True)}), Failure(529)]
)
async def test_refusals_for_ever_end_at_the_timeout_of_the_item(reply: Any) -> None:
    fake = FakeModel()
    fake.replies = [reply] * 10_000
    async with asking("openai/m").engine(transport=fake.transport) as engine:
        batch = await engine.submit_batch("ask", [{"number": 1}], BatchOptions(timeout_s=1.5))
        batch = await engine.wait_batch(batch.batch_id)
        (item,) = await engine.get_items(batch.batch_id)
    assert item.error_type in ("timeout", "model_rate_limited", "model_unavailable")
    assert len(fake.requests) < 10, "it waits longer and longer"


async def test_waiting_does_not_count_for_the_timeout_of_the_agent(model: FakeModel) -> None:
    model.replies = [Failure(429, retry_after_s=0.6), Reply(ANSWER)]
    async with asking("openai/m", timeout_s=0.3).engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"number": 1})
        assert (await engine.wait(run.run_id)).status is RunStatus.COMPLETED


async def test_the_record_says_what_a_run_waits_for(model: FakeModel, open_engine: OpenEngine) -> None:
    model.replies = [Failure(429, retry_after_s=60)]
    async with open_engine(asking("openai/m"), transport=model.transport) as engine:
        run = await engine.submit("ask", {"number": 1})
        with anyio.fail_after(PATIENCE_S):
            async with contextlib.aclosing(engine.events(run.run_id)) as events:
                async for event in events:
                    if event is not None and event.name == "run.progress":
                        break
        progress = (await engine.get_run(run.run_id)).progress
        assert progress is not None
        assert progress.message.startswith("waiting for the rate limit of openai until ")
        await engine.cancel_run(run.run_id)
        assert (await engine.wait(run.run_id)).status is RunStatus.CANCELLED


async def test_a_used_up_quota_ends_all_calls_of_runs_with_its_key_at_once(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.replies = [Failure(429, "insufficient_quota")]
    async with client(model) as models:
        assert (await failure_of(models)).error_type == "model_quota"
        assert (await failure_of(models)).error_type == "model_quota"
        assert len(model.requests) == 1
        model.replies = [Reply(ANSWER)]
        assert await complete(models, Model("openai/m", api_key="another")), "another key has its own quota"


@pytest.mark.parametrize("refusals", [1, 2])
async def test_all_rows_of_a_batch_complete_if_a_quota_was_cured_before_it_counts_as_used_up(
    refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one call finds out whether there is quota again, the others wait, and none fails."""
    monkeypatch.setattr(pace, "QUOTA_PROBE_PAUSE_S", 0.05)
    provider = QuotaProvider(refusals)
    async with asking("openai/m").engine(transport=provider.transport) as engine:
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.submit_batch("ask", [{"number": n} for n in range(40)], BatchOptions(max_workers=8))
            batch = await engine.wait_batch(batch.batch_id)
    assert (batch.status, batch.completed_items) == (RunStatus.COMPLETED, 40)
    assert provider.answered == 40, "no row is paid twice"


async def test_runs_wait_for_the_call_that_finds_out_whether_there_is_quota_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "QUOTA_PROBE_PAUSE_S", 0.05)
    provider = QuotaProvider(1, is_held=True)
    async with client(provider) as models:
        assert (await failure_of(models)).error_type == "model_quota"
        await anyio.sleep(0.06)  # the pause of the provider is over
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                for _ in range(10):
                    tasks.start_soon(complete, models)
                await provider.is_asked.wait()
                for _ in range(20):
                    await anyio.lowlevel.checkpoint()
                assert provider.asked == 2, "one call is sent first"
                provider.may_answer.set()
    assert provider.answered == 10


async def test_a_cancelled_call_lets_the_next_one_find_out_about_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "QUOTA_PROBE_PAUSE_S", 0.05)
    provider = QuotaProvider(1, is_held=True)
    async with client(provider) as models:
        await failure_of(models)
        await anyio.sleep(0.06)  # the pause of the provider is over
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(complete, models)
                await provider.is_asked.wait()
                provider.may_answer.set()
                tasks.cancel_scope.cancel()
            assert await complete(models)


async def test_a_batch_stops_after_three_refusals_in_a_row_because_of_the_quota(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "QUOTA_PROBE_PAUSE_S", 0.05)
    provider = QuotaProvider(10**6)
    async with asking("openai/m").engine(transport=provider.transport) as engine:
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.submit_batch("ask", [{"number": n} for n in range(40)], BatchOptions(max_workers=1))
            batch = await engine.wait_batch(batch.batch_id)
    assert batch.status is RunStatus.FAILED
    assert provider.asked == pace.QUOTA_REFUSALS


class QuotaProvider(FakeModel):
    """A provider whose first calls are refused since the quota is used up, as long as its account is not topped up.

    Args:
        refusals: how many calls it refuses.
        is_held: whether it answers the first accepted call only when ``may_answer`` is set.
    """

    def __init__(self, refusals: int, *, is_held: bool = False) -> None:
        self.asked = self.answered = 0
        self.is_asked, self.may_answer = anyio.Event(), anyio.Event()
        self._refusals = refusals
        self._is_held = is_held
        super().__init__(self._reply)

    async def _reply(self, request: ModelRequest) -> Any:
        self.asked += 1
        if self.asked <= self._refusals:
            return Failure(429, "insufficient_quota")
        self.is_asked.set()
        if self._is_held:
            await self.may_answer.wait()
        self.answered += 1
        return Reply(ANSWER)


# Outages


class Server(FakeModel):
    """A provider that can be down: it refuses connections, or responds with a status."""

    def __init__(self) -> None:
        self.is_down: int | bool = False
        self.asked = self.answered = 0
        self.answered_50 = anyio.Event()
        super().__init__(self._reply)

    def _reply(self, request: ModelRequest) -> Any:
        self.asked += 1
        if self.is_down is True:
            raise ConnectionError
        if self.is_down:
            return Failure(self.is_down)
        self.answered += 1
        if self.answered == 50:
            self.answered_50.set()
        return Reply(ANSWER)


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MIN_PROBE_PAUSE_S", 0.05)
    monkeypatch.setattr(pace, "MAX_PROBE_PAUSE_S", 0.2)


@pytest.mark.parametrize("kind", [True, 500, 503])
async def test_a_batch_waits_for_the_end_of_an_outage(kind: int | bool, quick_probes: None) -> None:
    server = Server()
    async with asking("openai/m").engine(transport=server.transport) as engine:
        rows = [{"number": number} for number in range(200)]
        batch = await engine.submit_batch("ask", rows, BatchOptions(max_workers=20))
        await server.answered_50.wait()
        server.is_down, asked = kind, server.asked
        await anyio.sleep(2.5)  # longer than three attempts take
        assert server.asked - asked < 100, "one call asks for all"
        server.is_down = False
        batch = await engine.wait_batch(batch.batch_id)
    assert (batch.completed_items, batch.failed_items) == (200, 0)


def test_after_an_outage_the_rate_is_that_of_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise all waiting calls would be sent at once."""
    monkeypatch.setattr(Pace, "waiting", 100)
    provider = Pace("openai")
    for tenth in range(50):
        provider.admit(tenth / 10, ITEM, passage := Passage())
        passage.sent_at = tenth / 10
        provider.answered(tenth / 10, passage)
    provider.failed(5, Passage(), OUTAGE, is_last=True, has_others=False)
    assert provider.wait_s(5, ITEM, Passage()) == 1
    assert provider.wait_s(6, ITEM, Passage()) == 0
    provider.admit(6, ITEM, probe := Passage())
    assert provider.wait_s(6, ITEM, Passage()) == math.inf
    assert provider.wait_s(6, RUN, Passage()) == 0, "a run tries even now"
    provider.answered(6, probe)
    provider.leave(probe)
    assert provider.rate.per_s(6) == pytest.approx(10, rel=0.1)


async def test_a_run_fails_in_an_outage_after_three_attempts(quick_probes: None) -> None:
    server = Server()
    server.is_down = True
    async with ModelClient("openai/m", transport=server.transport, backoff_s=0.001) as models:
        for attempts in (3, 6):
            assert (await failure_of(models)).error_type == "model_unavailable"
            assert server.asked == attempts


async def test_an_item_that_fails_while_others_are_answered_is_not_an_outage(quick_probes: None) -> None:
    asked: list[str] = []

    def reply(request: ModelRequest) -> Any:
        is_bad = '"number": 7}' in request.text
        asked.append("bad" if is_bad else "good")
        return Failure(502) if is_bad else Reply(ANSWER)

    async with asking("openai/m").engine(transport=FakeModel(reply).transport) as engine:
        rows = [{"number": number} for number in range(60)]
        batch = await engine.submit_batch("ask", rows, BatchOptions(max_workers=2))
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
    assert asked.count("bad") in range(3, 20)
    assert (batch.completed_items, batch.failed_items) == (60, 1)


async def test_an_item_that_the_server_cannot_process_fails(quick_probes: None) -> None:
    """Otherwise it would wait for ever for an outage that is its own."""
    server = Server()
    server.is_down = 500
    async with ModelClient("openai/m", transport=server.transport, backoff_s=0.001) as models:
        assert (await failure_of(models, caller=ITEM)).error_type == "model_unavailable"
    assert server.asked == MAX_SERVER_ERRORS


# Limits of a Model


async def test_requests_per_minute_spread_the_calls() -> None:
    gate = ModelLimits("m", (600, None, None), Pace("m"))
    started = time.monotonic()
    for _ in range(13):
        await gate.enter(RUN, Passage())
    assert 0.25 <= time.monotonic() - started < 5, "ten at once, then one each 0.1 s"


async def test_tokens_per_minute_are_corrected_by_what_was_used() -> None:
    gate = ModelLimits("m", (None, 6000, None), Pace("m"))
    passage = Passage(1000)
    await gate.enter(RUN, passage)
    assert gate.wait_s(anyio.current_time(), RUN, Passage(500)) > 4
    passage.tokens = 100
    gate.leave(passage)
    assert gate.wait_s(anyio.current_time(), RUN, Passage(500)) == 0


async def test_max_concurrency_limits_the_calls_of_all_runs(model: FakeModel) -> None:
    in_flight, most = 0, 0

    async def reply(request: ModelRequest) -> Any:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await anyio.sleep(0.005)
        in_flight -= 1
        return Reply(ANSWER)

    model.replies = [reply] * 20
    async with client(model, Model("openai/m", max_concurrency=3)) as models, anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(complete, models)
    assert most == 3


async def test_a_call_that_waits_for_its_provider_holds_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MIN_PROBE_PAUSE_S", 10 * PATIENCE_S)  # the item waits during the whole test
    server, waits = Server(), anyio.Event()
    server.is_down = True
    reasons: list[str | None] = []

    def on_wait(reason: str | None) -> None:
        reasons.append(reason)
        waits.set()

    async with client(server, Model("openai/m", max_concurrency=1)) as models, anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(complete, models, caller=Caller(is_item=True, on_wait=on_wait)))
        with anyio.fail_after(PATIENCE_S):
            await waits.wait()
            assert (await failure_of(models)).error_type == "model_unavailable"
        assert server.asked == 6, "three attempts each"
        tasks.cancel_scope.cancel()
    assert str(reasons[0]).startswith("waiting for openai, which does not answer,")


def test_processes_share_the_limits_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_processes", 4)
    gate = ModelLimits("m", (60, None, 2), Pace("m"))
    assert gate.wait_s(0, RUN, Passage()) == 0
    gate.admit(0, RUN, Passage())
    assert gate.wait_s(0, RUN, Passage()) == math.inf
    gate.leave(Passage())
    assert gate.wait_s(0, RUN, Passage()) == pytest.approx(4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"requests_per_minute": -1}, "requests_per_minute= must be a whole number of at least 1"),
        ({"tokens_per_minute": 0}, "tokens_per_minute="),
        ({"max_concurrency": 1.5}, "max_concurrency="),
        ({"base_url": "gateway.example"}, "base_url= must be a URL"),
        ({"api_key": "two words"}, "api_key= must be a key without spaces"),
        ({"headers": {"a": "b\nc"}}, "headers= must be"),
        ({"extra_body": {"a": object()}}, "extra_body= must be"),
        ({"name": "gpt-4o"}, "name= must be a name such as 'openai/gpt-4o'"),
    ],
)
def test_an_invalid_model_is_an_error_at_the_definition(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        Model(**{"name": "openai/m", **options})


@pytest.mark.parametrize("choice", [[], [""], [1], 5, {"openai/m": 1}])
def test_an_invalid_choice_of_models_is_an_error_at_the_definition(choice: Any) -> None:
    with pytest.raises(DefinitionError, match="model= of the flock"):
        Flock("f", model=choice)
    with pytest.raises(DefinitionError, match="model= of 'a'"):
        FlockFactory.create_default_agent(name="a", input="number: int", output="answer: str", model=choice)


def test_secrets_of_a_model_are_not_shown() -> None:
    model = Model("openai/m", api_key="sk-secret", headers={"x": "secret"}, extra_body={"y": "secret"})
    assert repr(model) == "Model('openai/m')"
    with pytest.raises(DefinitionError) as caught:
        Model("openai/m", api_key="secret key")
    assert "secret key" not in str(caught.value)


async def test_a_model_has_its_own_address_key_headers_and_body(model: FakeModel) -> None:
    model.replies = [Reply(ANSWER)]
    own = Model(
        "mine/m:1",
        base_url="http://gateway.example/v2/",
        api_key="k",
        headers={"x-team": "a"},
        extra_body={"user": "u"},
    )
    async with client(model, own) as models:
        completion = await complete(models)
    assert completion.model == "mine/m:1"
    sent = model.requests[0].headers
    assert (sent["host"], sent["authorization"], sent["x-team"]) == ("gateway.example", "Bearer k", "a")
    assert (model.requests[0]["model"], model.requests[0]["user"]) == ("m:1", "u")


# Other models to ask


FIRST, SECOND = "openai/first", "groq/second"


@pytest.fixture
async def both(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelClient]:
    monkeypatch.setenv("GROQ_API_KEY", "key")
    async with client(model, [FIRST, SECOND]) as models:
        yield models


def asked(model: FakeModel) -> list[str]:
    return [request["model"] for request in model.requests]


@pytest.mark.parametrize(
    ("replies", "is_left_alone"),
    [
        pytest.param([Failure(503)] * 3, True, id="outage"),
        pytest.param([Failure(429, "insufficient_quota")], True, id="no quota left"),
        pytest.param([Failure(429, retry_after_s=60)], True, id="a long wait"),
        pytest.param([Failure(404)], False, id="unknown model"),
        pytest.param([Failure(401)], False, id="rejected key"),
    ],
)
async def test_the_next_model_is_asked(
    replies: list[Failure], is_left_alone: bool, both: ModelClient, model: FakeModel
) -> None:
    model.replies = [*replies, Reply(ANSWER)]
    completion = await complete(both, idempotency_key="k")
    assert completion.model == SECOND
    assert [request.headers["idempotency-key"] for request in model.requests][-1] == "k/model2"
    model.replies = [*([] if is_left_alone else replies), Reply(ANSWER)]
    before = len(model.requests)
    assert (await complete(both)).model == SECOND
    assert asked(model)[before:] == ([] if is_left_alone else ["first"]) + ["second"]


async def test_the_next_model_is_asked_after_one_timeout(
    both: ModelClient, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.replies = [TimeoutError(), Reply(ANSWER)]
    assert (await complete(both)).model == SECOND
    assert asked(model) == ["first", "second"]


@pytest.mark.parametrize(
    "reply",
    [
        Failure(400),
        Failure(422),
        Failure(400, "context_length_exceeded"),
        Failure(400, "content_filter"),
        Reply(None, refusal="no"),
        Reply("{", finish_reason="length"),
    ],
)
async def test_bad_input_is_not_sent_to_another_model(reply: Any, both: ModelClient, model: FakeModel) -> None:
    model.replies = [reply]
    await failure_of(both)
    assert asked(model) == ["first"]


async def test_a_short_wait_is_not_a_reason_for_another_model(both: ModelClient, model: FakeModel) -> None:
    model.replies = [Failure(429, retry_after_s=0.05), Reply(ANSWER)]
    assert (await complete(both)).model == FIRST


@pytest.mark.parametrize("limit", [{"requests_per_minute": 1}, {"max_concurrency": 1}], ids=str)
async def test_the_next_model_is_asked_if_the_limits_of_the_first_mean_a_long_wait(
    limit: dict[str, Any], model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "key")
    monkeypatch.setattr(pace, "FALLBACK_WAIT_S", 0.1)
    is_asked, may_answer = anyio.Event(), anyio.Event()

    async def reply(request: ModelRequest) -> Any:
        is_asked.set()
        await may_answer.wait()
        return Reply(ANSWER)

    model.replies = [reply, Reply(ANSWER)]
    async with client(model, [Model(FIRST, **limit), SECOND]) as models, anyio.create_task_group() as tasks:
        tasks.start_soon(complete, models)
        await is_asked.wait()
        with anyio.fail_after(10):
            assert (await complete(models)).model == SECOND
        may_answer.set()
    assert asked(model) == ["first", "second"]


async def test_a_failed_provider_is_left_alone_and_then_asked_by_one_call(
    both: ModelClient, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "MIN_PROBE_PAUSE_S", 0.1)
    model.replies = [*[Failure(500)] * 3, Reply(ANSWER), Reply(ANSWER)]
    for _ in range(2):
        assert (await complete(both)).model == SECOND
    monkeypatch.setattr(pace, "LEFT_ALONE_S", 0.0)  # as if that time had passed
    await anyio.sleep(0.25)
    model.replies = [Reply(ANSWER), Reply(ANSWER)]
    assert [(await complete(both)).model for _ in range(2)] == [FIRST, FIRST]


async def test_all_models_are_named_if_none_can_be_called(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "litellm", None)  # as if it is not installed
    choice = ["opnai/x", "openai/m", "nowhere"]
    flock = asking(choice)
    async with client(model, choice) as models:
        failure = await failure_of(models)
    assert failure.error_type == "model_not_configured"
    (problem,) = problems(flock.agents, flock.model)
    for name in ("'opnai/x'", "'openai/m'", "'nowhere'"):
        assert name in str(failure)
        assert name in problem
    assert problem.startswith("The agent 'ask' cannot run.")


def test_a_missing_key_of_one_model_is_a_warning() -> None:
    flock = asking(["openai/m", "groq/m"])
    (problem,) = problems(flock.agents, flock.model)
    assert problem.startswith("The agent 'ask' cannot use one of the models.")
    assert "GROQ_API_KEY" in problem


async def test_a_step_says_which_model_has_answered(
    model: FakeModel, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "key")
    model.replies = [Failure(404), Reply("no"), Reply(ANSWER)]
    async with open_engine(asking([FIRST, SECOND]), transport=model.transport) as engine:
        run = await engine.submit("ask", {"number": 1})
        run = await engine.wait(run.run_id)
        assert [step.model for step in run.steps] == [FIRST]
        (call,) = (await engine.get_calls(run))[0]
        assert (call.name, call.model) == ("openai_first", SECOND), "the name does not depend on the answer"
        assert [step.model for step in (await engine.get_run(run.run_id)).steps] == [FIRST]


async def test_a_batch_goes_on_with_another_model_in_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROQ_API_KEY", "key")

    def reply(request: ModelRequest) -> Reply:
        if "groq" in request.headers["host"]:
            return Reply(ANSWER)
        raise ConnectionError

    async with asking([FIRST, SECOND]).engine(transport=FakeModel(reply).transport) as engine:
        batch = await engine.submit_batch("ask", [{"number": n} for n in range(100)], BatchOptions(max_workers=20))
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
    assert (batch.completed_items, batch.failed_items) == (100, 0)


class TwoServers:
    """Two providers that can be down: those of FIRST and of SECOND."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GROQ_API_KEY", "key")
        monkeypatch.setattr(pace, "LEFT_ALONE_S", 10 * PATIENCE_S)  # as long as this is no test of it
        self.first, self.second = Server(), Server()
        self.first.is_down = self.second.is_down = True
        self.transport = FakeModel(self._reply).transport

    def _reply(self, request: ModelRequest) -> Any:
        return (self.second if "groq" in request.headers["host"] else self.first)._reply(request)

    async def are_asked(self) -> None:
        """Wait until both have an outage, and are asked again by one call for all."""
        await until(lambda: self.first.asked > 4 and self.second.asked > 4)


@pytest.mark.parametrize("kind", [True, 503], ids=["refused", "status 503"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
async def test_a_batch_goes_on_with_the_first_of_its_models_that_is_back(
    kind: int | bool, is_first: bool, quick_probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models had an outage, and the other one never comes back."""
    servers = TwoServers(monkeypatch)
    servers.first.is_down = servers.second.is_down = kind
    async with asking([FIRST, SECOND]).engine(transport=servers.transport) as engine:
        batch = await engine.submit_batch("ask", [{"number": n} for n in range(100)], BatchOptions(max_workers=20))
        await servers.are_asked()
        back, away = (servers.first, servers.second) if is_first else (servers.second, servers.first)
        back.is_down = False
        with anyio.fail_after(PATIENCE_S):
            batch = await engine.wait_batch(batch.batch_id)
    assert (batch.completed_items, batch.failed_items) == (100, 0)
    assert (back.answered, away.answered) == (100, 0)


async def test_a_run_asks_the_first_of_its_models_that_is_back(
    quick_probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left alone only as long as the second one could answer."""
    servers = TwoServers(monkeypatch)
    async with ModelClient([FIRST, SECOND], transport=servers.transport, backoff_s=0.001) as models:
        failure = await failure_of(models)
        assert failure.error_type == "model_unavailable"
        assert FIRST in str(failure)
        assert SECOND in str(failure)
        servers.first.is_down = False
        with anyio.fail_after(PATIENCE_S):
            while True:
                with contextlib.suppress(ModelError):
                    completion = await complete(models)
                    break
    assert (completion.model, servers.second.answered) == (FIRST, 0)


def test_one_of_several_models_is_asked_within_5_s_of_its_return() -> None:
    """However long the outage was. Only a call that waits for an answer is a reason to wait longer."""
    provider, now = Pace("openai"), 0.0
    caller = Caller(is_item=True, has_fallback=True, models=2, have_all_failed=True)
    provider.failed(now, Passage(), OUTAGE, is_last=True, has_others=True)
    for _ in range(20):
        with pytest.raises(ModelError, match="could not be reached"):
            provider.check(now, caller)
        pause_s = provider.wait_s(now, caller, Passage())
        assert 0 < pause_s <= 5
        now += pause_s
        provider.check(now, caller)
        provider.admit(now, caller, probe := Passage())
        with pytest.raises(ModelError, match="could not be reached"):
            provider.check(now, caller)
        provider.failed(now, probe, OUTAGE, is_last=False, has_others=True)
        provider.leave(probe)


async def test_an_item_that_no_server_can_process_fails(quick_probes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    servers = TwoServers(monkeypatch)
    servers.first.is_down = servers.second.is_down = 500
    async with ModelClient([FIRST, SECOND], transport=servers.transport, backoff_s=0.001) as models:
        with anyio.fail_after(PATIENCE_S):
            assert (await failure_of(models, caller=ITEM)).error_type == "model_unavailable"
    assert servers.first.asked >= MAX_SERVER_ERRORS - 3
    assert servers.second.asked >= MAX_SERVER_ERRORS - 3


async def test_the_record_says_which_models_a_row_waits_for(
    quick_probes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = TwoServers(monkeypatch)
    async with asking([FIRST, SECOND]).engine(transport=servers.transport) as engine:
        batch = await engine.submit_batch("ask", [{"number": n} for n in range(3)], BatchOptions(max_workers=3))
        (run_id, *_) = [item.run_id for item in await engine.get_items(batch.batch_id)]
        # A row that has met the outage of the first model itself waits for the second one first, for at most 5 s.
        words = "waiting for openai or groq, which do not answer,"
        await until_run(engine, run_id, lambda run: run.progress is not None and run.progress.message.startswith(words))
        servers.second.is_down = False
        batch = await engine.wait_batch(batch.batch_id)
    assert batch.completed_items == 3


def measure(*arguments: str) -> str:
    """Return what ``bench.rate_limits`` prints. Its exit code depends on how busy the machine is."""
    command = [sys.executable, "-m", "bench.rate_limits", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_on_one_file_meet_one_limit() -> None:
    assert "300 of 300 rows completed" in measure("--rows=300", "--per-minute=1200", "--processes=2", "--workers=20")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_batch_survives_that_its_provider_stops() -> None:
    assert "300 of 300 rows completed" in measure("--rows=300", "--per-minute=1200", "--outage-s=3", "--workers=20")


# Providers


async def ask_provider(model: FakeModel, name: str, **options: Any) -> Any:
    model.replies = [Reply(ANSWER)]
    async with client(model, name) as models:
        await complete(models, **options)
    return model.requests[-1]


async def test_azure_has_a_url_for_each_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", "https://res.openai.azure.com/")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret")
    monkeypatch.setenv("AZURE_OPENAI_API_VERSION", "2025-01-01")
    urls: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        urls.append(request)
        return httpx.Response(200, json=Reply(ANSWER).completion())

    async with ModelClient("azure/my-gpt", transport=httpx.MockTransport(reply)) as models:
        await complete(models)
    url = "https://res.openai.azure.com/openai/deployments/my-gpt/chat/completions?api-version=2025-01-01"
    assert str(urls[0].url) == url
    assert urls[0].headers["api-key"] == "secret"
    assert "authorization" not in urls[0].headers


async def test_gemini_accepts_the_key_of_google(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_API_KEY", "of-google")
    await ask_provider(model, "gemini/gemini-2.5-flash")
    assert model.requests[0].headers["authorization"] == "Bearer of-google"


async def test_any_provider_with_an_address_is_built_in(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_GATEWAY_BASE_URL", "http://gateway.example/v1")
    monkeypatch.setenv("MY_GATEWAY_API_KEY", "mine")
    await ask_provider(model, "my-gateway/m")
    assert (model.requests[0].headers["host"], model.requests[0].headers["authorization"]) == (
        "gateway.example",
        "Bearer mine",
    )


@pytest.mark.parametrize(
    ("name", "variable", "is_sent"),
    [
        ("openai/gpt-4o", "OPENAI_API_KEY", True),
        ("openai/gpt-5-chat-latest", "OPENAI_API_KEY", True),
        ("openai/gpt-5-mini", "OPENAI_API_KEY", False),
        ("openai/o3", "OPENAI_API_KEY", False),
        ("groq/o3", "GROQ_API_KEY", True),
    ],
)
async def test_reasoning_models_get_no_temperature(
    name: str, variable: str, is_sent: bool, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "key")
    assert ("temperature" in await ask_provider(model, name, temperature=0.5)) is is_sent


@pytest.mark.parametrize(
    ("name", "format_"), [("anthropic/claude", None), ("deepseek/chat", "json_object"), ("xai/grok", "json_schema")]
)
async def test_a_provider_is_asked_in_the_strictest_format_that_it_supports(
    name: str, format_: str | None, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{name.partition('/')[0].upper()}_API_KEY", "key")
    assert (await ask_provider(model, name)).get("response_format", {}).get("type") == format_

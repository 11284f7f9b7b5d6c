"""No row of a table is paid twice: batches that end early, continue, and take results that exist already."""

import contextlib
import random
import re
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from flock.agents.hooks import ModelCall
from flock.core import Flock, FlockFactory
from flock.engine.batches import Failures
from flock.engine.embedded import EmbeddedEngine
from flock.errors import AgentError, DefinitionError, InvalidData
from flock.runs import Batch, BatchFilter, BatchOptions, Engine, RunContext, RunStatus
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from flockapi import create_app
from tests.paid_once import play
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal
from tests.support.engines import OpenEngine, all_items, ended
from tests.support.flocks import Work
from tests.support.http import client_of

pytestmark = pytest.mark.anyio

MODEL = "openai/gpt-4o"


class Provider(FakeModel):
    """A provider that answers as long as it has credit, and counts what it has answered.

    Args:
        credit: the answers that are left.
        failure: its response without credit.
    """

    def __init__(self, credit: int, failure: Failure) -> None:
        super().__init__(self._reply)
        self.credit, self.failure = credit, failure
        self.paid = 0

    def _reply(self, request: ModelRequest) -> Reply | Failure:
        if not self.credit:
            return self.failure
        self.credit -= 1
        self.paid += 1
        return Reply({"answer": "yes"})


def asking(model: str | list[str] = MODEL) -> Flock:
    flock = Flock(model=model)
    flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer"))
    return flock


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"text {number}"} for number in range(count)]


QUOTA = Failure(429, "insufficient_quota")
WORKERS = 4


@pytest.mark.parametrize(
    ("failure", "error_type", "most"),
    [
        pytest.param(QUOTA, "model_quota", WORKERS, id="quota"),
        pytest.param(Failure(401), "model_authentication", WORKERS, id="key"),
        pytest.param(Failure(404), "model_not_found", WORKERS, id="model"),
        pytest.param(Failure(403), "model_authentication", 2 * WORKERS - 1, id="forbidden"),
    ],
)
async def test_an_error_of_all_rows_ends_the_batch_and_leaves_the_rest_to_a_retry(
    failure: Failure, error_type: str, most: int, open_again: OpenEngine
) -> None:
    """The rows that met it are cancelled as well. Only 403 must come several times."""
    provider = Provider(50, failure)
    async with open_again(asking(), transport=provider.transport) as engine:
        most = most if isinstance(engine, EmbeddedEngine) else 100  # its chunks learn of it a moment later
        batch = await engine.submit_batch("ask", texts(200), BatchOptions(max_workers=WORKERS))
        batch = await ended(engine, batch)
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, error_type)
        assert (batch.completed_items, batch.failed_items, batch.cancelled_items) == (200, 0, 150)
        assert batch.error is not None
        assert "The batch stopped before 150 of 200 items were done. The model openai/gpt-4o" in batch.error
        assert len(provider.requests) - provider.paid <= most
        left = [item for item in await all_items(engine, batch) if item.status is not RunStatus.COMPLETED]
        assert {(item.status, item.error_type) for item in left} == {(RunStatus.CANCELLED, error_type)}
        assert {item.error for item in left if item.started_at is None} <= {left[0].error}
        assert provider.paid == 50
        if failure is QUOTA:
            return  # the client asks again after a minute
        provider.credit = 150
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
    assert (batch.status, batch.error, batch.failed_items, batch.cancelled_items) == (RunStatus.COMPLETED, None, 0, 0)
    assert provider.paid == 200


async def test_a_missing_key_ends_the_batch_and_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent without a key. With one, the same rows are paid once."""
    provider = Provider(200, QUOTA)
    monkeypatch.delenv("OPENAI_API_KEY")
    async with asking().engine(transport=provider.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(20), BatchOptions(max_workers=WORKERS)))
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "model_not_configured")
        assert (batch.completed_items, batch.failed_items, batch.cancelled_items) == (20, 0, 20)
        assert batch.error is not None
        assert "needs an API key. Set the environment variable OPENAI_API_KEY" in batch.error
        assert not provider.requests
        monkeypatch.setenv("OPENAI_API_KEY", "sk-now")
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
    assert (batch.status, provider.paid, len(provider.requests)) == (RunStatus.COMPLETED, 20, 20)


@pytest.mark.parametrize(("workers", "enough"), [(1, 3), (WORKERS, WORKERS)])
async def test_403_ends_a_batch_when_it_comes_for_all_workers_in_a_row(
    workers: int, enough: int, open_again: OpenEngine
) -> None:
    """A success in between starts the count again: the rows before it stay failed, and only they are not left."""
    replies = [Failure(403)] * (enough - 1) + [Reply({"answer": "yes"})] + [Failure(403)] * enough
    asked = list[str]()

    async def reply(request: ModelRequest) -> Reply | Failure:
        (text,) = re.findall(r"text \d+", request.text)
        asked.append(text)
        # One call after the other, so that the order of their ends is known.
        number = len(asked)
        async with turn:
            return replies[number - 1] if number <= len(replies) else Failure(403)

    turn = anyio.Lock()
    model = FakeModel(reply)
    async with open_again(asking(), transport=model.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(40), BatchOptions(max_workers=workers)))
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "model_authentication")
        is_ordered = workers == 1 or isinstance(engine, EmbeddedEngine)  # a cluster has no order of ends
        failed = enough - 1 if is_ordered else batch.failed_items
        assert (batch.failed_items, batch.cancelled_items) == (failed, 39 - failed)
        assert failed < enough
        more = workers if isinstance(engine, EmbeddedEngine) else 40 - len(replies)
        assert len(replies) <= len(asked) < len(replies) + more
        first = set(asked)
        model.replies = lambda request: Reply({"answer": "yes"})
        model.requests.clear()
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
        assert (batch.failed_items, batch.cancelled_items, len(model.requests)) == (failed, 0, 39 - failed)
    assert len(first) == len(asked)


async def test_what_ends_after_the_batch_was_given_up_leaves_the_rows_before_to_a_retry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that was asked for before succeeds after 403 came for all workers in a row."""
    fourth, given_up, note = anyio.Event(), anyio.Event(), Failures.note

    def noted(failures: Failures, *args: Any) -> Any:
        outcome = note(failures, *args)
        if failures.reason is not None:
            given_up.set()
        return outcome

    async def reply(request: ModelRequest) -> Reply | Failure:
        (number,) = re.findall(r"text (\d+)", request.text)
        if number == "3":
            fourth.set()
            await given_up.wait()
            return Reply({"answer": "yes"})
        if number != "0":
            await fourth.wait()
        return Failure(403)

    monkeypatch.setattr(Failures, "note", noted)
    async with asking().engine(transport=FakeModel(reply).transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(10), BatchOptions(max_workers=3)))
    assert (batch.completed_items, batch.failed_items, batch.cancelled_items) == (10, 0, 9)


@pytest.mark.parametrize("works", ["", "large", "gpt-4o"])
async def test_a_batch_with_several_models_ends_early_only_if_none_of_them_works(
    works: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are asked in turn, so a row that one of them answers is complete."""

    def reply(request: ModelRequest) -> Reply | Failure:
        if request["model"] == works:
            return Reply({"answer": "yes"})
        return Failure(401) if request["model"] == "large" else Failure(404)

    model = FakeModel(reply)
    monkeypatch.setenv("MISTRAL_API_KEY", "sk-of-mistral")
    async with asking([MODEL, "mistral/large"]).engine(transport=model.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(20), BatchOptions(max_workers=WORKERS)))
        if works:
            assert (batch.status, batch.error, batch.failed_items) == (RunStatus.COMPLETED, None, 0)
            return
        assert (batch.status, batch.failed_items, batch.cancelled_items) == (RunStatus.FAILED, 0, 20)
        assert batch.error is not None
        assert ("openai/gpt-4o" in batch.error, "mistral/large" in batch.error) == (True, True)
        assert len(model.requests) <= 2 * WORKERS
        model.replies = lambda request: Reply({"answer": "yes"})
        model.requests.clear()
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
    assert (batch.status, len(model.requests)) == (RunStatus.COMPLETED, 20)


async def test_a_lasting_error_counts_only_if_all_models_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that no model can answer now does not end the batch. With several models, one key may be wrong."""
    models = [MODEL, "mistral/large"]
    monkeypatch.setenv("MISTRAL_API_KEY", "sk-of-mistral")

    def reply(request: ModelRequest) -> Reply | Failure:
        return Failure(400) if request["model"] == "large" else Failure(401)

    model = FakeModel(reply)
    async with asking(models).engine(transport=model.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(20), BatchOptions(max_workers=WORKERS)))
    assert (batch.status, batch.error_type, batch.failed_items) == (RunStatus.FAILED, None, 20)
    assert sum(request["model"] == "large" for request in model.requests) == 20


async def test_a_403_of_single_rows_does_not_end_a_batch() -> None:
    def reply(request: ModelRequest) -> Reply | Failure:
        return Failure(403) if "text 1" in request.text else Reply({"answer": "yes"})

    model = FakeModel(reply)
    async with asking().engine(transport=model.transport) as engine:
        options = BatchOptions(parallel=False)
        batch = await ended(engine, await engine.submit_batch("ask", texts(10), options))
    assert (batch.status, batch.failed_items, batch.cancelled_items) == (RunStatus.COMPLETED, 1, 0)


@pytest.mark.parametrize(("limit", "failed"), [(0, 1), (5, 6), (0.1, 11), (99, 50)])
async def test_max_failures_stops_a_batch(limit: float, failed: int, open_again: OpenEngine) -> None:
    flock = Flock()

    @flock.agent
    async def odd(n: int) -> int:
        if n % 2 == 0:
            raise AgentError("even")
        return n

    async with open_again(flock) as engine:
        options = BatchOptions(parallel=False, max_failures=limit)
        batch = await ended(engine, await engine.submit_batch("odd", [{"n": n} for n in range(100)], options))
        assert batch.failed_items == failed
        if limit == 99:
            assert (batch.status, batch.error, batch.cancelled_items) == (RunStatus.COMPLETED, None, 0)
            return
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "max_failures")
        assert batch.cancelled_items == 101 - 2 * failed
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
        assert batch.failed_items > failed, "each attempt starts counting again"


async def test_limit_and_sample_choose_the_rows_of_the_first_attempt(open_again: OpenEngine) -> None:
    """The rows are the same on each engine. Invalid ones and a retry change nothing, and a retry runs the others."""
    for options, chosen in (
        (BatchOptions(limit=25), range(25)),
        (BatchOptions(sample=6, seed=3), random.Random(3).sample(range(100), 6)),
        (BatchOptions(limit=50, sample=3), random.Random(0).sample(range(50), 3)),
    ):
        work = Work()
        rows: list[Any] = [{"n": n} if n else {} for n in range(100)]
        async with open_again(work.flock) as engine:
            batch = await ended(engine, await engine.submit_batch("item", rows, options, on_invalid="skip"))
            assert sorted(work.calls) == sorted(n for n in chosen if n)
            assert (batch.status, batch.failed_items) == (RunStatus.COMPLETED, 1)
            assert batch.error is not None
            assert "were not chosen (limit, sample). Retry the batch to run them." in batch.error
            left = await engine.get_items(batch.batch_id, statuses=["cancelled"])
            assert [item.position for item in left] == [n for n in range(1, 100) if n not in chosen]
            assert {item.error_type for item in left} == {"not_chosen"}
            batch = await ended(engine, await engine.retry_batch(batch.batch_id))
            assert sorted(work.calls) == list(range(1, 100))
            assert (batch.status, batch.error, batch.cancelled_items) == (RunStatus.COMPLETED, None, 0)


async def test_a_cluster_refuses_what_it_cannot_do(temporal_address: str) -> None:
    work = Work()
    async with on_temporal(temporal_address, work.flock) as engine:
        for options, words in (
            (BatchOptions(dedupe=True), r"A cluster has no dedupe\. Omit it\."),
            (BatchOptions(reuse=True), r"A cluster has no reuse\. Omit it\."),
            (BatchOptions(sample=100_001), r"A cluster takes a sample of at most 100,000 rows\."),
        ):
            with pytest.raises(InvalidData, match=words):
                await engine.submit_batch("item", [{"n": 1}], options)
        assert not await engine.list_batches(BatchFilter())
    assert not work.calls


async def test_a_batch_with_cancelled_rows_is_not_completed_without_a_word() -> None:
    flock = Flock()
    fails = True

    @flock.agent
    async def work(n: int) -> int:
        if fails and n > 2:
            raise AgentError("not yet")
        return n

    async with flock.engine() as engine:
        options = BatchOptions(parallel=False, max_failures=1)
        batch = await ended(engine, await engine.submit_batch("work", [{"n": n} for n in range(9)], options))
        assert (batch.failed_items, batch.cancelled_items) == (2, 4)
        fails = False
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["failed"]))
        assert (batch.status, batch.error_type, batch.failed_items) == (RunStatus.FAILED, "max_failures", 0)
        assert batch.error is not None
        assert "before 4 of 9 items were done" in batch.error
        await engine.retry_batch(batch.batch_id)
        assert (await engine.wait_batch(batch.batch_id)).status is RunStatus.COMPLETED
        with pytest.raises(DefinitionError, match="max_failures must be a number of items"):
            await engine.submit_batch("work", [{"n": 1}], BatchOptions(max_failures=-1))


# Known by their content


async def results(engine: Engine, count: int, **options: Any) -> tuple[Batch, list[str]]:
    """Run a batch of *count* texts, each of which occurs twice, and return it with the answers."""
    items = [*texts(count), *texts(count)]
    batch = await ended(engine, await engine.submit_batch("ask", items, BatchOptions(**options)))
    return batch, [item.value["answer"] for item in await all_items(engine, batch)]


class Numbering(FakeModel):
    """A provider that numbers its answers."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.paid = 0

    def _reply(self, request: ModelRequest) -> Reply:
        self.paid += 1
        return Reply({"answer": str(self.paid)})


@pytest.mark.parametrize("store", [":memory:", "flock.db"])
async def test_a_batch_takes_the_results_of_equal_rows_of_earlier_batches(store: str) -> None:
    """The second of two equal rows takes the result of the second, in any order of the rows."""
    provider = Numbering()
    async with asking().engine(transport=provider.transport, store=store) as engine:
        _, first = await results(engine, 20)
        assert len(set(first)) == 40, "equal rows have results of their own"
        again, second = await results(engine, 20, reuse=True)
        assert (second, provider.paid, again.usage) == (first, 40, None)
        assert (again.status, again.completed_items) == (RunStatus.COMPLETED, 40)
        more = [{"text": "new"}, *reversed(texts(20)), *reversed(texts(20))]
        batch = await ended(engine, await engine.submit_batch("ask", more, BatchOptions(reuse=True)))
        found = [item.value["answer"] for item in await all_items(engine, batch)]
        assert found == ["41", *reversed(first[:20]), *reversed(first[20:])]
        await results(engine, 20)
        assert provider.paid == 81, "only with reuse"
        batch = await engine.submit_batch("ask", texts(3), BatchOptions(reuse=True), principal="ann")
        await ended(engine, batch)
        assert provider.paid == 84, "the others are of another principal"


async def test_equal_rows_are_executed_once_with_dedupe() -> None:
    """A failure counts for all of them, and so does a retry."""
    provider, flock = Numbering(), asking()
    calls: Counter[int] = Counter()

    @flock.agent
    async def square(n: int) -> int:
        calls[n] += 1
        if n == 3 and calls[n] == 1:
            raise AgentError("not yet")
        return n * n

    async with flock.engine(transport=provider.transport) as engine:
        _, answers = await results(engine, 20, dedupe=True)
        assert (answers[:20], provider.paid, len(set(answers))) == (answers[20:], 20, 20)
        rows = [{"n": number % 10} for number in range(2000)]
        batch = await ended(engine, await engine.submit_batch("square", rows, BatchOptions(dedupe=True)))
        assert (set(calls.values()), batch.failed_items, batch.completed_items) == ({1}, 200, 2000)
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (calls[3], batch.failed_items) == (2, 0)
        assert [item.value["result"] for item in await all_items(engine, batch)] == [row["n"] ** 2 for row in rows]


async def test_a_sample_runs_even_if_an_equal_row_stands_before_it() -> None:
    work = Work()
    async with work.flock.engine() as engine:
        options = BatchOptions(dedupe=True, sample=2, seed=3)
        batch = await ended(engine, await engine.submit_batch("item", [{"n": 1}] * 50, options))
    assert (batch.status, batch.failed_items, work.calls) == (RunStatus.COMPLETED, 0, [1]), batch.error


async def test_results_that_a_hook_may_have_changed_are_not_taken() -> None:
    provider, flock = Numbering(), asking()
    async with flock.engine(transport=provider.transport) as engine:
        await results(engine, 3)

        @flock.on_model_call
        async def hook(call: ModelCall, ask: Any) -> Any:
            return await ask()

        await results(engine, 3, reuse=True)
    assert provider.paid == 12


async def test_a_damaged_row_does_not_hold_up_equal_ones(tmp_path: Path) -> None:
    work, store = Work(), tmp_path / "flock.db"
    work.holds = True
    async with work.flock.engine(store=store) as engine:
        options = BatchOptions(dedupe=True, max_workers=1)
        batch = await engine.submit_batch("item", [{"n": number % 2} for number in range(6)], options)
        await work.started.wait()
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        db.execute("UPDATE runs SET inputs = x'ff00' WHERE position = 1")
    work.may_go.set()
    async with work.flock.engine(store=store) as engine:
        with anyio.fail_after(PATIENCE_S):
            batch = await ended(engine, batch)
        assert (batch.status, batch.completed_items, batch.failed_items) == (RunStatus.COMPLETED, 6, 1)
    assert work.calls == [0, 0, 1, 1]


def look_up(word: str) -> str:
    return word


def brief(context: RunContext) -> str:
    return "Be brief."


def accept(answer: str) -> None:
    pass


@pytest.mark.parametrize(
    ("changed", "paid"),
    [
        pytest.param({}, [0, 0], id="nothing"),
        pytest.param({"max_concurrency": 3, "timeout_s": 9}, [0, 0], id="limits"),
        pytest.param({"instructions": "Be brief."}, [3, 0], id="instructions"),
        pytest.param({"examples": [({"text": "a"}, {"answer": "b"})]}, [3, 0], id="examples"),
        pytest.param({"examples": [({"text": "a"}, {"answer": "no"})]}, [3, 0], id="another example"),
        pytest.param({"output": "answer: Literal['yes', 'no']"}, [3, 0], id="output"),
        pytest.param({"temperature": 0.5}, [3, 0], id="temperature"),
        pytest.param({"max_tokens": 50}, [3, 0], id="max tokens"),
        pytest.param({"model": "openai/gpt-4o-mini"}, [3, 0], id="model"),
        pytest.param({"version": "2"}, [3, 0], id="version"),
        pytest.param({"tools": [look_up]}, [3, 3], id="tools"),
        pytest.param({"history": 3}, [3, 3], id="history of a session"),
        pytest.param({"instructions": brief}, [3, 3], id="context"),
        pytest.param({"validate": accept}, [3, 3], id="validate"),
        pytest.param({"tools": [look_up], "version": "1"}, [3, 0], id="tools and a version"),
        pytest.param({"history": 3, "version": "1"}, [3, 0], id="history of a session and a version"),
        pytest.param({"instructions": brief, "version": "1"}, [3, 0], id="context and a version"),
    ],
)
async def test_results_of_a_changed_agent_are_not_taken(changed: dict[str, Any], paid: list[int]) -> None:
    """The same rows are sent for the agent, for the one that has changed, and for that one again."""
    provider = FakeModel(lambda request: Reply({"answer": "yes"}))
    first = {"examples": [({"text": "a"}, {"answer": "yes"})]} if "examples" in changed else {}
    counts = []
    for options in (first, changed, changed):
        flock = Flock(model=MODEL)
        agent = {"name": "ask", "input": "text", "output": "answer"} | options
        flock.add_agent(FlockFactory.create_default_agent(**agent))
        async with flock.engine(transport=provider.transport, store="flock.db") as engine:
            before = len(provider.requests)
            await ended(engine, await engine.submit_batch("ask", texts(3), BatchOptions(reuse=True)))
            counts.append(len(provider.requests) - before)
    assert counts == [3, *paid]


@pytest.mark.parametrize("has_context", [False, True])
async def test_results_of_a_function_are_taken_if_it_has_a_version(has_context: bool) -> None:
    calls = list[str]()
    for version in (None, None, "1", "1", "2"):
        flock = Flock()

        async def plain(text: str) -> str:
            calls.append(str(version))  # noqa: B023
            return text

        async def with_context(text: str, context: RunContext) -> str:
            return await plain(text)

        flock.agent(name="work", version=version)(with_context if has_context else plain)
        async with flock.engine(store="flock.db") as engine:
            await ended(engine, await engine.submit_batch("work", texts(1), BatchOptions(reuse=True)))
    assert calls == ["None", "None", "1", "2"]


# Some rows first


async def test_a_sample_and_then_the_first_rows_are_part_of_the_batch() -> None:
    calls: Counter[int] = Counter()
    flock = Flock()

    @flock.agent
    async def work(n: int) -> int:
        calls[n] += 1
        return n

    async with flock.engine() as engine:
        options = BatchOptions(sample=10, seed=3)
        rows = [{"n": n} for n in range(2000)]
        batch = await ended(engine, await engine.submit_batch("work", rows, options))
        assert (batch.status, batch.cancelled_items, len(calls)) == (RunStatus.COMPLETED, 1990, 10)
        assert batch.error is not None
        assert "1,990 of 2,000 items were not chosen" in batch.error
        assert max(calls) > 1000, "the sample is random"
        sample = set(calls)
        await engine.retry_batch(batch.batch_id, options=BatchOptions(limit=100))
        batch = await ended(engine, batch)
        assert set(calls) == sample | set(range(100))
        batch = await ended(engine, await engine.retry_batch(batch.batch_id))
        assert (batch.status, batch.error, set(calls.values())) == (RunStatus.COMPLETED, None, {1})
        with pytest.raises(DefinitionError, match="limit must be at least 1"):
            await engine.submit_batch("work", rows, BatchOptions(limit=0))


@contextlib.asynccontextmanager
async def served(provider: FakeModel) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """Yield a function that sends a batch of texts over HTTP, as JSON or CSV, and returns it when it has ended."""
    flock = asking()
    app = create_app(flock, auth="host", engine=flock.engine(transport=provider.transport))
    async with app.lifespan(), client_of(app) as client:

        async def send(rows: list[dict[str, str]], *, as_csv: bool = False, **options: Any) -> Any:
            if as_csv:
                query = {"agent_name": "ask", **options}
                text = "".join(f"{row['text']}\n" for row in ({"text": "text"}, *rows))
                sent = await client.post("/run/batch", params=query, content=text, headers={"content-type": "text/csv"})
            else:
                sent = await client.post("/run/batch", json={"agent_name": "ask", "batch_inputs": rows, **options})
            assert sent.status_code in (200, 202), sent.text
            return (await client.get(f"/batch/{sent.json()['batch_id']}?wait=30")).json()

        send.client = client  # type: ignore[attr-defined]
        yield send


@pytest.mark.parametrize("as_csv", [False, True])
async def test_a_batch_over_http_pays_equal_rows_once_if_asked(as_csv: bool) -> None:
    provider = Numbering()
    async with served(provider) as send:
        options, equal = {"as_csv": as_csv, "max_workers": 1}, [*texts(2), *texts(2)]
        paid = list[int]()
        for more in ({}, {}, {"reuse": "true"}, {"dedupe": "true"}, {"dedupe": "true", "reuse": "true"}):
            given = more if as_csv else dict.fromkeys(more, True)
            batch = await send(equal, **options, **given)
            assert (batch["status"], batch["completed_items"], batch["failed_items"]) == ("completed", 4, 0)
            paid.append(provider.paid)
    assert paid == [4, 8, 8, 10, 10]


@pytest.mark.parametrize("as_csv", [False, True])
async def test_limit_sample_and_seed_of_a_batch_over_http_choose_its_rows(as_csv: bool) -> None:
    async with served(Numbering()) as send:

        async def chosen(**options: int) -> list[int]:
            batch = await send(texts(20), as_csv=as_csv, **options)
            assert batch["status"] == "completed"
            items = (await send.client.get(f"/batch/{batch['batch_id']}/results")).json()  # type: ignore[attr-defined]
            return [number for number, item in enumerate(items) if item["status"] == "completed"]

        assert await chosen(limit=3) == [0, 1, 2]
        both = await chosen(limit=5, sample=4)
        assert (len(both), max(both)) == (4, min(max(both), 4)), "a sample is one of the first rows"
        samples = [await chosen(sample=4, seed=seed) for seed in (1, 1, 2)]
    assert [len(sample) for sample in samples] == [4] * 3
    assert samples[0] == samples[1] != samples[2]


async def test_a_retry_over_http_with_a_spent_budget_is_refused_and_changes_nothing() -> None:
    """A retry with more continues with the rows that are left."""
    provider = Numbering()
    async with served(provider) as send:
        client = send.client  # type: ignore[attr-defined]
        batch = await send(texts(5), max_workers=1, max_cost=0.0001)
        assert (batch["status"], batch["error_type"], provider.paid) == ("failed", "cost_limit", 2)
        paths = [f"/batch/{batch['batch_id']}", f"/batch/{batch['batch_id']}/results", "/runs", "/batches"]
        before = [(await client.get(path)).json() for path in paths]
        for body in ({}, {"only": "cancelled"}, {"max_cost": 0.0001}):
            refused = await client.post(f"{paths[0]}/retry", json=body)
            assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/max_cost")
        assert [(await client.get(path)).json() for path in paths] == before
        assert provider.paid == 2
        assert (await client.post(f"{paths[0]}/retry", json={"max_cost": 1})).status_code == 202
        batch = (await client.get(f"{paths[0]}?wait=30")).json()
    assert (batch["status"], provider.paid) == ("completed", 5)


@pytest.mark.slow
def test_the_provider_is_paid_once_for_each_row_of_a_table() -> None:
    """The credit runs out, cells are edited, an output is added, and the command is killed."""
    play(600)

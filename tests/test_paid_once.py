"""No row of a table is paid twice: batches that end early, continue, and take results that exist already."""

import pytest

from flock.core import Flock, FlockFactory
from flock.errors import AgentError, DefinitionError
from flock.runs import BatchOptions, RunStatus
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support.engines import all_items, ended

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
    failure: Failure, error_type: str, most: int
) -> None:
    """The rows that met it are cancelled as well. Only 403 must come several times."""
    provider = Provider(50, failure)
    async with asking().engine(transport=provider.transport) as engine:
        batch = await engine.submit_batch("ask", texts(200), BatchOptions(max_workers=WORKERS))
        batch = await ended(engine, batch)
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, error_type)
        assert (batch.completed_items, batch.failed_items, batch.cancelled_items) == (200, 0, 150)
        assert batch.error is not None
        assert "The batch stopped before 150 of 200 items were done. The model openai/gpt-4o" in batch.error
        assert len(provider.requests) - provider.paid <= most
        left = [item for item in await all_items(engine, batch) if item.status is not RunStatus.COMPLETED]
        assert {(item.status, item.error_type) for item in left} == {(RunStatus.CANCELLED, error_type)}
    assert provider.paid == 50


async def test_a_batch_that_ended_early_continues_when_the_cause_is_gone() -> None:
    provider = Provider(50, Failure(401))
    async with asking().engine(transport=provider.transport) as engine:
        batch = await engine.submit_batch("ask", texts(200), BatchOptions(max_workers=WORKERS))
        await ended(engine, batch)
        provider.credit = 150
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
    assert (batch.status, batch.error, batch.failed_items, batch.cancelled_items) == (RunStatus.COMPLETED, None, 0, 0)
    assert provider.paid == 200


async def test_a_lasting_error_counts_only_if_all_models_have_it() -> None:
    """A row that no model can answer now does not end the batch. With several models, one key may be wrong."""
    models = [MODEL, "mistral/large"]

    def reply(request: ModelRequest) -> Reply | Failure:
        return Failure(401) if request["model"] == "large" else Failure(400)

    model = FakeModel(reply)
    async with asking(models).engine(transport=model.transport) as engine:
        batch = await ended(engine, await engine.submit_batch("ask", texts(20), BatchOptions(max_workers=WORKERS)))
    assert (batch.status, batch.error_type, batch.failed_items) == (RunStatus.FAILED, None, 20)


async def test_a_403_of_single_rows_does_not_end_a_batch() -> None:
    def reply(request: ModelRequest) -> Reply | Failure:
        return Failure(403) if "text 1" in request.text else Reply({"answer": "yes"})

    model = FakeModel(reply)
    async with asking().engine(transport=model.transport) as engine:
        options = BatchOptions(parallel=False)
        batch = await ended(engine, await engine.submit_batch("ask", texts(10), options))
    assert (batch.status, batch.failed_items, batch.cancelled_items) == (RunStatus.COMPLETED, 1, 0)


@pytest.mark.parametrize(("limit", "failed"), [(0, 1), (5, 6), (0.1, 11), (99, 50)])
async def test_max_failures_stops_a_batch(limit: float, failed: int) -> None:
    flock = Flock()

    @flock.agent
    async def odd(n: int) -> int:
        if n % 2 == 0:
            raise AgentError("even")
        return n

    async with flock.engine() as engine:
        options = BatchOptions(parallel=False, max_failures=limit)
        batch = await ended(engine, await engine.submit_batch("odd", [{"n": n} for n in range(100)], options))
        assert batch.failed_items == failed
        if limit == 99:
            assert (batch.status, batch.error, batch.cancelled_items) == (RunStatus.COMPLETED, None, 0)
            return
        assert (batch.status, batch.error_type) == (RunStatus.FAILED, "max_failures")
        assert batch.cancelled_items == 101 - 2 * failed
        batch = await ended(engine, await engine.retry_batch(batch.batch_id, ["cancelled"]))
        assert batch.failed_items > failed, "each attempt counts anew"


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

"""What has ended leaves no cycles: a server collects old garbage rarely, so its memory would grow."""

import asyncio
import contextlib
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request

from flock.core import Flock, FlockFactory
from flock.errors import AgentError, EngineFull
from flock.runs import RunContext, RunStatus, new_id
from flock.testing import Failure, FakeModel
from flock.web.requests import while_connected
from flockapi import create_app
from tests.support.http import client_of, post_run, wait_until

pytestmark = pytest.mark.anyio


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Yield a list that has, after the block, the types of our objects and exceptions that were left in cycles."""
    found = list[str]()
    logging.disable()  # pytest keeps what is logged, with its traceback
    gc.disable()
    gc.freeze()  # what earlier tests have left is not ours
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        for each in gc.garbage:
            if isinstance(each, BaseException) or type(each).__module__.partition(".")[0] == "flock":
                found.append(type(each).__name__)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
        logging.disable(logging.NOTSET)


async def check_no_cycle(flock: Flock, operation: Callable[[httpx.AsyncClient], Awaitable[object]]) -> None:
    async with client_of(create_app(flock, store=":memory:")) as client:
        await operation(client)  # the engine has begun
        with collected() as found:
            await operation(client)
        assert found == []


@pytest.fixture
def flock() -> Flock:
    flock = Flock()

    @flock.agent
    async def fail(n: int) -> int:
        raise AgentError("It has failed.")

    return flock


async def test_a_batch_leaves_no_cycle(flock: Flock) -> None:
    @flock.agent
    async def ask(n: int, context: RunContext) -> int:
        return await context.ask(f"Which is {n}?", int)

    async def run_batches(client: httpx.AsyncClient) -> None:
        for agent_name, status in (("fail", RunStatus.FAILED), ("ask", RunStatus.CANCELLED)):
            body = {"agent_name": agent_name, "batch_inputs": [{"n": 1}, {"n": 2}]}
            path = (await client.post("/run/batch", json=body)).headers["Location"]
            if agent_name == "ask":
                await wait_until(client, path, lambda batch: bool(batch["waiting_items"] == 2))
                await client.post(f"{path}/cancel")
            assert (await client.get(f"{path}?wait=60")).json()["status"] == status

    await check_no_cycle(flock, run_batches)


async def test_an_accepted_run_that_fails_leaves_no_cycle(flock: Flock) -> None:
    async def fail(client: httpx.AsyncClient) -> None:
        response = await post_run(client, "fail", {"n": 1}, async_run=True)
        assert (await client.get(f"{response.headers['Location']}?wait=60")).json()["status"] == RunStatus.FAILED

    await check_no_cycle(flock, fail)


async def test_a_replay_leaves_no_cycle(flock: Flock) -> None:
    async def replay(client: httpx.AsyncClient) -> None:
        headers = {"Idempotency-Key": new_id()}
        for status in (202, 200):
            body = {"agent_name": "fail", "inputs": {"n": 1}, "async_run": True}
            response = await client.post("/run/flock", json=body, headers=headers)
            assert response.status_code == status
        await client.get(f"/run/{response.json()['run_id']}?wait=60")

    await check_no_cycle(flock, replay)


OF_CONTEXTLIB = pytest.mark.xfail(
    sys.version_info >= (3, 12),
    reason="contextmanager keeps a frame with an exception that ends in its block",
    strict=False,
)


def no_way(n: int) -> int:
    raise ValueError("It has failed.")


async def of_the_agent() -> None:
    raise AgentError("It has failed.")


async def of_the_agent_with_context(context: RunContext) -> None:
    raise AgentError("It has failed.")


async def of_a_call(context: RunContext) -> None:
    await context.call(no_way, 1)


async def of_a_call_that_took_too_long(context: RunContext) -> None:
    await context.call(anyio.sleep_forever, call_timeout_s=0.01)


async def of_a_cancelled_call(context: RunContext) -> None:
    async with asyncio.timeout(0.01):
        await context.call(asyncio.Event().wait, call_name="wait")


async def of_a_wait(context: RunContext) -> None:
    async with context.timeout(0.01):
        await context.receive("never", str)


def of_a_thread(context: RunContext) -> None:
    raise ValueError("It has failed.")


async def of_a_model(context: RunContext) -> None:
    await context.run_agent("ask_model", {"text": ""})


@pytest.mark.parametrize(
    ("function", "failure"),
    [
        (of_the_agent, None),
        (of_the_agent_with_context, None),
        (of_a_call, None),
        pytest.param(of_a_call_that_took_too_long, None, marks=OF_CONTEXTLIB),
        (of_a_cancelled_call, None),
        pytest.param(of_a_wait, None, marks=OF_CONTEXTLIB),
        (of_a_thread, None),
        (of_a_model, Failure(400)),
        (of_a_model, Failure(503)),
        (of_a_model, TimeoutError()),
    ],
)
async def test_a_failure_leaves_no_cycle(function: Any, failure: Any) -> None:
    flock = Flock(model=["openai/gpt-4o", "openai/gpt-4o-mini"])
    flock.add_agent(FlockFactory.create_default_agent(name="ask_model", input="text: str", output="text: str"))
    flock.agent(name="fail")(function)

    async def fail(client: httpx.AsyncClient) -> None:
        body = (await post_run(client, "fail")).json()
        assert body["status"] == RunStatus.FAILED, body

    with FakeModel(lambda request: failure):
        await check_no_cycle(flock, fail)


@pytest.mark.parametrize("is_disconnected", [False, True])
async def test_a_wait_leaves_no_cycle(is_disconnected: bool) -> None:
    async def wait() -> None:
        with contextlib.suppress(HTTPException):
            await while_connected(Request({"type": "http"}, receive), waiting.wait())

    waiting, disconnected = asyncio.Event(), asyncio.Event()

    async def receive() -> Any:
        await disconnected.wait()
        return {"type": "http.disconnect"}

    with collected() as found:
        waits = asyncio.create_task(wait())
        await anyio.wait_all_tasks_blocked()
        (disconnected if is_disconnected else waiting).set()
        await waits
        del waits
    assert found == []


async def test_a_refused_request_leaves_no_cycle() -> None:
    async def refuse() -> None:
        raise EngineFull("Try again later.")

    async def receive() -> Any:
        await anyio.sleep_forever()

    with collected() as found:
        with contextlib.suppress(EngineFull):
            await while_connected(Request({"type": "http"}, receive), refuse())
    assert found == []

"""What has ended leaves no cycles: a server collects old garbage rarely, so its memory would grow."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
from starlette.requests import Request

from flock.core import Flock
from flock.errors import AgentError, EngineFull
from flock.runs import RunContext, RunStatus
from flock.web.requests import while_connected
from flockapi import create_app
from tests.support.http import client_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def raised() -> Iterator[list["weakref.ref[BaseException]"]]:
    """Hold no exception, and let none be collected as garbage."""
    found = list["weakref.ref[BaseException]"]()
    gc.collect()
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()


def noted(exc: Exception, raised: list[Any]) -> Exception:
    """Return *exc*. A function that raises a variable of its own makes a cycle."""
    raised.append(weakref.ref(exc))
    return exc


@pytest.fixture
def flock(raised: list[Any]) -> Flock:
    flock = Flock()

    @flock.agent
    async def fail(n: int) -> int:
        raise noted(AgentError("It has failed."), raised)

    @flock.agent
    async def fail_with_context(n: int, context: RunContext) -> int:
        raise noted(AgentError("It has failed."), raised)

    return flock


@pytest.mark.parametrize("agent_name", ["fail", "fail_with_context"])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_failed_run_leaves_no_exception(
    agent_name: str, is_async: bool, flock: Flock, raised: list[Any]
) -> None:
    app = create_app(flock, store=":memory:")
    async with client_of(app) as client:
        body = {"agent_name": agent_name, "inputs": {"n": 1}, "async_run": is_async}
        for _ in range(3):
            response = await client.post("/run/flock", json=body)
            if is_async:
                response = await client.get(f"{response.headers['Location']}?wait=60")
            assert response.json()["status"] == RunStatus.FAILED
    assert [each() for each in raised] == [None] * 3


async def test_a_refused_request_leaves_no_exception(raised: list[Any]) -> None:
    async def refuse() -> None:
        raise noted(EngineFull("Try again later."), raised)

    async def receive() -> Any:
        await anyio.sleep_forever()

    with contextlib.suppress(EngineFull):
        await while_connected(Request({"type": "http"}, receive), refuse())
    assert [each() for each in raised] == [None]

"""What many tests need: a fake model, an app with its engine open, and a client for it."""

import fcntl
import inspect
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, settings

import tests
from flock.core import Flock
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal, temporal_server
from tests.support.engines import Opened
from tests.support.flocks import sample_flock
from tests.support.models import FakeModel
from tests.support.servers import free_port

# A busy machine is slow, and that is no failure; where a red run blocks, the same cases are tried each time.
settings.register_profile(
    "flock", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("flock")

# httpx waits for five seconds by default, which a busy machine may need for an answer.
TIMEOUT = inspect.signature(httpx.get).parameters["timeout"].default
TIMEOUT.connect = TIMEOUT.read = TIMEOUT.write = TIMEOUT.pool = PATIENCE_S


# Tests run side by side, for most of them wait; those that measure have the machine for themselves.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is alone comes last, when there is nothing left that could run beside it."""
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that waiting for others is none of the time that a test may take
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold a lock that is shared with the tests of other processes, or not; whoever asks for it first has it first."""
    how = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with open(__file__, "rb") as turnstile, open(tests.__file__, "rb") as lock:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(lock, how)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # also where a forked child of a test still has it


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_model_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches a real provider by a key that happens to be set."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")) or name.startswith(("OPENAI_", "FLOCK_", "TEMPORAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key-of-the-tests")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a working directory of its own, for stores have their default place there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def temporal_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a real Temporal server listens; tests share it, each with a flock of another name."""
    port = free_port()
    with temporal_server(tmp_path_factory.mktemp("temporal") / "temporal.db", port):
        yield f"127.0.0.1:{port}"


@pytest.fixture(params=["memory", "disk", "temporal"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Opened:
    """Each kind of engine. The cluster is a real one, the development server, with a worker in this process."""
    if request.param == "temporal":
        address = request.getfixturevalue("temporal_address")
        return lambda flock, **options: on_temporal(address, flock, **options)
    store = tmp_path / "flock.db" if request.param == "disk" else ":memory:"
    return lambda flock, **options: flock.engine(store=store, **options)


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    yield fake
    assert not fake.replies, f"{len(fake.replies)} replies of the fake model were not asked for"


@pytest.fixture
def flock() -> Flock:
    return sample_flock()


@pytest.fixture
async def app(flock: Flock, model: FakeModel) -> AsyncIterator[FlockAPI]:
    made = create_app(flock, server_name="Sample", engine=flock.engine(transport=model.transport), auth="host")
    async with made.lifespan():
        yield made


@pytest.fixture
async def client(app: FlockAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver") as made:
        yield made

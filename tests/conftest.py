"""What many tests need: a fake model, an app with its engine open, and a client for it."""

import fcntl
import importlib.util
import inspect
import os
import shutil
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


# Lanes. Plain ``pytest`` runs what has no lane: it is quick, and needs only ``.[test]``.

#: Modules that belong to one lane as a whole, and the package that they import, if ``.[test]`` does not bring it.
LANES = {
    "test_a_long_batch.py": ("slow", None),
    "test_attacks.py": ("slow", None),
    "test_attacks_on_runs.py": ("slow", None),
    "test_batch_command.py": ("slow", None),
    "test_connection.py": ("slow", None),
    "test_crowds.py": ("slow", None),
    "test_docs_pages.py": ("browser", "playwright"),
    "test_displaced_store.py": ("slow", None),
    "test_examples.py": ("slow", None),
    "test_faults.py": ("slow", None),
    "test_fuzz.py": ("slow", None),
    "test_generated_client.py": ("slow", None),
    "test_hostile_hosts.py": ("slow", None),
    "test_hostile_uploads.py": ("slow", None),
    "test_localmodel.py": ("slow", "xllamacpp"),
    "test_mounting.py": ("slow", None),
    "test_packaging.py": ("slow", None),
    "test_readme.py": ("slow", None),
    "test_recovery.py": ("slow", None),
    "test_server.py": ("slow", None),
    "test_sharing.py": ("slow", None),
    "test_temporal.py": ("cluster", "temporalio"),
    "test_ui.py": ("browser", "playwright"),
    "test_waiting_memory.py": ("slow", None),
}

collect_ignore = [name for name, (_, package) in LANES.items() if package and importlib.util.find_spec(package) is None]


def needs_cluster(item: pytest.Item) -> bool:
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    return "temporal" in parameters or "temporal_address" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its lane. What measures comes last, when no other test is left that could run beside it."""
    has_chromium = shutil.which("chromium") is not None or "CI" in os.environ
    for item in items:
        if item.path.name in LANES:
            item.add_marker(LANES[item.path.name][0])
        elif needs_cluster(item):
            item.add_marker("cluster")
        if item.get_closest_marker("browser") and not has_chromium:
            item.add_marker(pytest.mark.skip(reason="there is no Chromium here: apt-get install chromium"))
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


# Tests run side by side, for most of them wait; those that measure have the machine for themselves.


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

"""The lanes of the tests, and their common fixtures: a fake model, an app with its engine running, and a client."""

import contextlib
import fcntl
import importlib.util
import inspect
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings

import tests
from flock.core import Flock
from flock.runs import new_id
from flock.testing import FakeModel
from flock.web.options import PROTOCOL_MODULES
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import on_temporal, temporal_server
from tests.support.engines import OpenEngine
from tests.support.flocks import sample_flock
from tests.support.http import client_of
from tests.support.servers import free_port

# A busy machine is slow, so there is no deadline. CI tries the same examples each time.
settings.register_profile(
    "flock", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("flock")

# A busy machine may need longer than the default timeout of httpx, which is five seconds.
TIMEOUT = inspect.signature(httpx.get).parameters["timeout"].default
TIMEOUT.connect = TIMEOUT.read = TIMEOUT.write = TIMEOUT.pool = PATIENCE_S


# Lanes. Plain ``pytest`` runs the tests without a lane, which are quick and need only ``.[test]``.

#: Modules whose tests are all in one lane, with the package that they need if ``.[test]`` does not install it.
LANES = {
    "test_a2a_clients.py": ("slow", None),
    "test_a_long_batch.py": ("slow", None),
    "test_accepting.py": ("slow", None),
    "test_ask_on_cluster.py": ("cluster", "temporalio"),
    "test_attacks.py": ("slow", None),
    "test_attacks_on_runs.py": ("slow", None),
    "test_batch_command.py": ("slow", None),
    "test_batch_prices_command.py": ("slow", None),
    "test_binary_formats.py": ("slow", "pyarrow"),
    "test_connection.py": ("slow", None),
    "test_crowds.py": ("slow", None),
    "test_displaced_store.py": ("slow", None),
    "test_docs_pages.py": ("browser", "playwright"),
    "test_examples.py": ("slow", None),
    "test_faults.py": ("slow", None),
    "test_files_in_folders.py": ("slow", None),
    "test_files_on_cluster.py": ("cluster", "temporalio"),
    "test_frames.py": ("slow", "polars"),
    "test_front_end_clients.py": ("slow", None),
    "test_fuzz.py": ("slow", None),
    "test_generated_client.py": ("slow", None),
    "test_hostile_hosts.py": ("slow", None),
    "test_hostile_uploads.py": ("slow", None),
    "test_images.py": ("slow", "PIL"),
    "test_localmodel.py": ("slow", "xllamacpp"),
    "test_mcp_clients.py": ("slow", None),
    "test_mounting.py": ("slow", None),
    "test_openai_clients.py": ("slow", None),
    "test_packaging.py": ("slow", None),
    "test_readme.py": ("slow", None),
    "test_recovery.py": ("slow", None),
    "test_server.py": ("slow", None),
    "test_sharing.py": ("slow", None),
    "test_suspects_on_cluster.py": ("cluster", "temporalio"),
    "test_temporal.py": ("cluster", "temporalio"),
    "test_traces_export.py": ("slow", "opentelemetry.proto"),
    "test_ui.py": ("browser", "playwright"),
    "test_ui_chat.py": ("browser", "playwright"),
    "test_ui_files.py": ("browser", "playwright"),
    "test_ui_runs.py": ("browser", "playwright"),
    "test_waiting_memory.py": ("slow", None),
    "test_waits_on_cluster.py": ("cluster", "temporalio"),
    "test_webhooks_on_cluster.py": ("cluster", "temporalio"),
}

pytest.register_assert_rewrite("tests.support.site")  # before a test imports it


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # that above it is not
        return False


collect_ignore = [name for name, (_, package) in LANES.items() if package and not is_installed(package)]


def needs_cluster(item: pytest.Item) -> bool:
    parameters = (
        item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    )
    return "temporal" in parameters or "temporal_address" in getattr(item, "fixturenames", ())


#: How the ids of the longest tests begin, which start first, so that no worker has one left when the others are idle.
LONG = (
    "tests/test_readme.py::test_the_commands",
    "tests/test_fuzz.py",
    "tests/test_docs.py::test_the_commands_of_a_page_return_what_it_shows[tutorial]",
    "tests/test_recovery.py",
)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its lane. Long tests start first; those that measure are last, as no other can run beside."""
    has_chromium = shutil.which("chromium") is not None or "CI" in os.environ
    for item in items:
        if item.path.name in LANES:
            item.add_marker(LANES[item.path.name][0])
        elif needs_cluster(item):
            item.add_marker("cluster")
        if item.get_closest_marker("browser") and not has_chromium:
            item.add_marker(pytest.mark.skip(reason="Chromium is not installed: apt-get install chromium"))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> tuple[bool, bool, bool]:
    """Return what sorts the tests. Those of the cluster follow each other, so that its server runs only for them."""
    alone, cluster = item.get_closest_marker("alone"), item.get_closest_marker("cluster")
    return alone is not None, not item.nodeid.startswith(LONG), cluster is None


# Tests run in parallel, because most of them wait. Tests that measure have the machine to themselves.

#: How the ids of tests begin that one xdist worker runs, because what they share takes long to make.
TOGETHER = (
    "tests/test_a2a_clients.py",
    "tests/test_front_end_clients.py",
    "tests/test_localmodel.py",
    "tests/test_mcp_clients.py",
    "tests/test_mcp.py::test_the_server_of_the_sdk",
    "tests/test_openai_clients.py",
    "tests/test_packaging.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out single tests, and those of TOGETHER as one. xdist 3.8 ignores its own groups with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = lambda nodeid: next((begin for begin in TOGETHER if nodeid.startswith(begin)), nodeid)
    return scheduling


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outermost, so that a test's timeout excludes the lock
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hold a lock during the test, exclusive if it measures and shared otherwise, first come, first served."""
    mode = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    with open(__file__, "rb") as turnstile, open(tests.__file__, "rb") as lock:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        fcntl.flock(lock, mode)
        fcntl.flock(turnstile, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # even if a forked child of the test still has the file open


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_real_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests from reaching a real provider with a key that happens to be set."""
    for name in list(os.environ):
        if name.endswith(("_API_KEY", "_BASE_URL")) or name.startswith(("AZURE_", "OPENAI_", "FLOCK_", "TEMPORAL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-key-of-the-tests")


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test its own working directory, because stores are created there by default."""
    monkeypatch.chdir(tmp_path)


#: The Temporal server of this process, and its address.
_CLUSTER, _ADDRESSES = contextlib.ExitStack(), list[str]()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Stop the Temporal server before a test that does not need it: its task queues keep it busy."""
    if item.get_closest_marker("cluster") is None:
        pytest_sessionfinish()


def pytest_sessionfinish() -> None:
    _ADDRESSES.clear()
    _CLUSTER.close()


@pytest.fixture
def temporal_address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the address of a real Temporal server, which tests share under different flock names.

    They have thousands of task queues, so that partitions would take a quarter of its processor time.
    """
    if not _ADDRESSES:
        store, port = tmp_path_factory.mktemp("temporal") / "temporal.db", free_port()
        _CLUSTER.enter_context(temporal_server(store, port, partitions=1))
        _ADDRESSES.append(f"127.0.0.1:{port}")
    return _ADDRESSES[0]


@pytest.fixture(params=["memory", "disk", "temporal"])
def open_engine(request: pytest.FixtureRequest, tmp_path: Path) -> OpenEngine:
    """Open an engine of each kind. Temporal is the real development server, with a worker in this process."""
    if request.param == "temporal":
        address = request.getfixturevalue("temporal_address")
        return lambda flock, **options: on_temporal(address, flock, **options)
    store = tmp_path / "flock.db" if request.param == "disk" else ":memory:"
    return lambda flock, **options: flock.engine(store=store, **options)


@pytest.fixture(params=["disk", "temporal"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> OpenEngine:
    """Open engines on the same store one after the other, as the next process would, on Temporal with a worker."""
    if request.param == "temporal":
        address, name = request.getfixturevalue("temporal_address"), f"again {new_id()}"
        return lambda flock, **options: on_temporal(address, flock, name=name, **options)
    return lambda flock, **options: flock.engine(store=tmp_path / "flock.db", **options)


@pytest.fixture
def model() -> Iterator[FakeModel]:
    fake = FakeModel()
    yield fake
    fake.check()


@pytest.fixture
def flock() -> Flock:
    return sample_flock()


@pytest.fixture
async def app(flock: Flock, model: FakeModel) -> AsyncIterator[FlockAPI]:
    engine, protocols = flock.engine(transport=model.transport), list(PROTOCOL_MODULES)
    made = create_app(flock, server_name="Sample", engine=engine, auth="host", protocols=protocols)
    async with made.lifespan():
        yield made


@pytest.fixture
async def client(app: FlockAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app) as made:
        yield made

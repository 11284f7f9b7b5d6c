"""The store's file is removed, replaced or upgraded under a running server, tested with real servers and files."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from flock.core import Flock
from flock.errors import StoreError
from flock.store.migrations import MIGRATIONS
from flock.store.store import SQLiteStore
from tests.support import PATIENCE_S
from tests.support.servers import Server, flockapi_command, running

FLOCK = """
from flock.core import Flock

flock = Flock("displaced")

@flock.agent
def double(n: int) -> int:
    return 2 * n
"""
BODY = {"agent_name": "double", "inputs": {"n": 1}}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "displaced.py").write_text(FLOCK)
    options = ["--port", "0", "--store", str(tmp_path / "flock.db")]
    options += ["--workers", "2"] if request.param == 2 else []
    with running(*flockapi_command("serve", str(tmp_path / "displaced.py"), *options)) as server:
        server.wait_for_line("Application startup complete", times=request.param)
        yield server


def workers_of(server: Server) -> int:
    return sum("Application startup complete" in line for line in server.lines)


def remove_all(store: Path) -> None:
    for path in store.parent.glob("flock.db*"):
        path.unlink()


def remove_journal(store: Path) -> None:
    Path(f"{store}-wal").unlink()
    Path(f"{store}-shm").unlink()


def replace(store: Path) -> None:
    copy = store.with_name("copy")
    copy.write_bytes(store.read_bytes())
    copy.replace(store)


def upgrade(store: Path) -> None:
    db = sqlite3.connect(store, timeout=30)
    db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()


@pytest.mark.parametrize(
    ("server", "displace"),
    [
        *((workers, displace) for workers in (1, 2) for displace in (remove_all, upgrade)),
        *((1, displace) for displace in (remove_journal, replace)),
        *(pytest.param(2, displace, marks=pytest.mark.nightly) for displace in (remove_journal, replace)),
    ],
    indirect=["server"],
)
def test_a_server_without_its_store_accepts_nothing(
    server: Server, tmp_path: Path, displace: Callable[[Path], None]
) -> None:
    """Requests after the change are refused at once. Reads and readiness follow when the server notices it."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        accepted = client.post("/run/flock", json=BODY, headers=ASYNC)
        assert client.get(f"{accepted.headers['Location']}?wait=60").json()["status"] == "completed"
        displace(tmp_path / "flock.db")
        for _ in range(4):
            refused = client.post("/run/flock", json=BODY, headers=ASYNC)
            assert (refused.status_code, refused.json()["title"]) == (503, "Store unavailable")
    workers = workers_of(server)
    server.wait_for_line("Until then every request that needs the store gets status 503.", times=workers)
    for _ in range(4):  # each on its own connection, so that both workers get some
        for path in ("/readyz", "/runs", accepted.headers["Location"]):
            assert httpx.get(f"{server.url}{path}").status_code == 503
        assert httpx.post(f"{server.url}/run/flock", json=BODY).status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert sum("every request" in line for line in server.lines) == workers


def test_a_store_that_comes_back_is_used_again(server: Server, tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    paths = [path.name for path in tmp_path.glob("flock.db*")]
    for name in paths:
        (tmp_path / name).rename(away / name)
    workers = workers_of(server)
    server.wait_for_line("Until then every request", times=workers)
    for name in paths:
        (away / name).rename(tmp_path / name)
    server.wait_for_line("flock.db is back in place.", times=workers)
    assert httpx.post(f"{server.url}/run/flock", json=BODY).json()["result"] == {"result": 2}


# A new version


#: The command of a version with one more migration.
NEWER = """
from flock.command.cli import main
from flock.store.migrations import MIGRATIONS

MIGRATIONS.append(["ALTER TABLE runs ADD COLUMN later TEXT"])
main()
"""


def serve(folder: Path, *, newer: bool) -> list[str]:
    (folder / "displaced.py").write_text(FLOCK)
    arguments = ["serve", str(folder / "displaced.py"), "--port", "0", "--store", str(folder / "flock.db")]
    return [sys.executable, "-c", NEWER, *arguments] if newer else flockapi_command(*arguments)


def refusal(command: list[str]) -> str:
    """Return what a server prints that does not start."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode not in (0, -signal.SIGTERM)
    assert "Traceback" not in done.stderr
    return done.stderr


def schema_of(folder: Path) -> int:
    with contextlib.closing(sqlite3.connect(folder / "flock.db")) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def test_a_new_version_does_not_start_while_an_older_one_uses_the_store(tmp_path: Path) -> None:
    """The error names the process. After its end two processes of the new version start, and one of them migrates."""
    with running(*serve(tmp_path, newer=False)) as older:
        error = refusal(serve(tmp_path, newer=True))
        assert "an older version of flockapi is using it" in error
        if Path("/proc/locks").exists():
            assert f"(process {older.process.pid})" in error
        assert "Stop it first, and then start this one" in error
        assert schema_of(tmp_path) == len(MIGRATIONS)
        assert httpx.post(f"{older.url}/run/flock", json=BODY, headers=ASYNC).status_code == 202
        older.process.kill()
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        newer = list(pool.map(stack.enter_context, [running(*serve(tmp_path, newer=True)) for _ in range(2)]))
        for server in newer:
            assert httpx.post(f"{server.url}/run/flock", json=BODY).json()["result"] == {"result": 2}
        assert schema_of(tmp_path) == len(MIGRATIONS) + 1
        assert "was created by a newer version" in refusal(serve(tmp_path, newer=False))


@pytest.mark.anyio
async def test_an_older_process_that_starts_during_the_migration_gives_up(tmp_path: Path) -> None:
    """It had read the old schema version, and was not registered yet when the new version looked for others."""
    async with SQLiteStore(tmp_path / "flock.db") as store:
        upgrade(tmp_path / "flock.db")
        with pytest.raises(StoreError) as caught:
            await store.register_engine("older", "displaced", ())
        assert "was changed by another version" in str(caught.value.__cause__)
        with pytest.raises(StoreError):
            await store.unregister_engine("older")


@pytest.mark.anyio
async def test_a_commit_to_a_file_that_was_just_removed_is_not_acknowledged(tmp_path: Path) -> None:
    async with SQLiteStore(tmp_path / "flock.db") as store:
        with pytest.raises(StoreError):
            await store.change(lambda db: remove_all(tmp_path / "flock.db"))


@pytest.mark.anyio
async def test_a_store_is_displaced_if_its_folder_becomes_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    async with SQLiteStore(folder / "flock.db") as store:
        folder.rename(tmp_path / "away")
        folder.touch()
        await store.check_file()
        assert store.is_displaced
        folder.unlink()
        (tmp_path / "away").rename(folder)
        await store.check_file()
        assert not store.is_displaced


@pytest.mark.anyio
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
async def test_a_lock_file_that_is_not_a_file_is_an_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "flock.db-lock")
    with pytest.raises(StoreError, match=r"flock\.db-lock' cannot be opened: it is not a file\. Remove it, or use"):
        async with Flock().engine(store=tmp_path / "flock.db"):
            pass

"""What a machine does to a server: full disks, damaged files, killed and suspended processes, clocks that jump."""

import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx
import msgspec
import pytest

import flock.engine.files
import flock.engine.store
import flock.runs
from flock.core import Flock
from flock.engine.embedded import EmbeddedEngine
from flock.errors import Replayed
from flock.runs import IdempotencyKey, Run, RunFilter, RunStatus
from tests.support import PATIENCE_S
from tests.support.servers import Server, flockapi_command, running

T = TypeVar("T")

FLOCK = """
import asyncio, multiprocessing, os, subprocess, sys, time
from pathlib import Path
from flock.core import Flock

flock = Flock("faults")
HERE = Path(__file__).parent

def note(words: str) -> None:
    fd = os.open(HERE / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{words}\\n".encode())
    os.close(fd)

@flock.agent
def length(text: str) -> int:
    return len(text)

@flock.agent
def repeat(text: str, times: int) -> str:
    return text * times

@flock.agent
async def work(n: int) -> int:
    \"\"\"Says that it has begun, ends when its process may, and tells which one that was.\"\"\"
    note(f"{n} {os.getpid()}")
    while not (HERE / f"go-{os.getpid()}").exists():
        await asyncio.sleep(0.01)
    return os.getpid()

@flock.agent
def have_child(how: str) -> int:
    \"\"\"Leaves a child behind that lives longer than the server.\"\"\"
    if (HERE / "log").exists():
        return os.getpid()
    if how == "fork":
        if not (pid := os.fork()):
            time.sleep(100)
            os._exit(0)
    elif how == "multiprocessing":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,))
        child.start()
        pid = child.pid
    else:
        pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"]).pid
    note(str(pid))
    time.sleep(100)
    return 0
"""


@pytest.fixture
def flock_file(tmp_path: Path) -> Path:
    file = tmp_path / "faults.py"
    file.write_text(FLOCK)
    return file


def serve_command(flock_file: Path, store: Path) -> list[str]:
    return flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(store), "--drain-timeout", "1")


@contextlib.contextmanager
def serving(flock_file: Path, store: Path, *wrapper: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A server, run by *wrapper* if there is one, and a client for it. Whatever happens, its log has no traceback."""
    with running(*wrapper, *serve_command(flock_file, store)) as server:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            yield server, client
    assert not any("Traceback" in line for line in server.lines), "\n".join(server.lines)


def until(find: Callable[[], T], what: str, timeout_s: float = PATIENCE_S) -> T:
    """What *find* gives, once it gives something."""
    deadline = time.monotonic() + timeout_s
    while not (found := find()):
        assert time.monotonic() < deadline, f"after {timeout_s} s: no {what}"
        time.sleep(0.01)
    return found


def submit(client: httpx.Client, agent_name: str, **inputs: Any) -> httpx.Response:
    return client.post("/run/flock", json={"agent_name": agent_name, "inputs": inputs, "async_run": True})


def accepted(client: httpx.Client, agent_name: str, **inputs: Any) -> str:
    answer = submit(client, agent_name, **inputs)
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["run_id"]
    return run_id


def ended(client: httpx.Client, run_id: str, timeout_s: float = PATIENCE_S) -> Any:
    """The run once it is final."""

    def look() -> Any:
        run = client.get(f"/run/{run_id}").raise_for_status().json()
        return None if run["status"] in ("starting", "running") else run

    return until(look, f"end of {run_id}", timeout_s)


def is_unavailable(answer: httpx.Response) -> bool:
    """It is a whole 503, which says that it is the store and when to come back."""
    if answer.status_code != 503:
        return False
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["status"]) == ("urn:flockapi:problem:store-unavailable", 503)
    assert int(answer.headers["retry-after"]) >= 1
    return True


def rows(store: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(store)) as db:
        return db.execute(query, values).fetchall()


def begun(folder: Path) -> list[tuple[int, int]]:
    """Each beginning of ``work``: n, and the process."""
    log = folder / "log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(n), int(pid)) for n, pid in map(str.split, lines)]


# A full disk


@contextlib.contextmanager
def files_that_may_not_grow(folder: Path) -> Iterator[tuple[list[str], Callable[[Server], None]]]:
    """RLIMIT_FSIZE, which works wherever Linux does; a write beyond it fails with EFBIG."""
    limit = 600_000
    set_limit = (
        f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )

    def make_space(server: Server) -> None:
        infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, infinite)

    yield [sys.executable, "-c", set_limit], make_space


@contextlib.contextmanager
def a_full_disk(folder: Path) -> Iterator[tuple[list[str], Callable[[Server], None]]]:
    """A file system of 1 MB; a write beyond it fails with ENOSPC."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    (folder / "ballast").write_bytes(bytes(200_000))

    def make_space(server: Server) -> None:
        (folder / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)

    try:
        yield [], make_space
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def can_mount() -> bool:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    attempt = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]  # seen by nobody else
    return subprocess.run(attempt, capture_output=True).returncode == 0


@pytest.mark.parametrize("small_place", [files_that_may_not_grow, *([a_full_disk] if can_mount() else [])])
def test_a_full_disk_is_answered_with_503_and_loses_nothing_that_was_accepted(
    small_place: Any, flock_file: Path, tmp_path: Path
) -> None:
    """Inputs of 50 kB until there is no room; then there is room again, and the same process goes on."""
    (tmp_path / "disk").mkdir()
    store = tmp_path / "disk" / "flock.db"
    with small_place(tmp_path / "disk") as (wrapper, make_space), serving(flock_file, store, *wrapper) as at:
        server, client = at
        run_ids: list[str] = []
        for n in itertools.count():
            answer = submit(client, "length", text="x" * (50_000 + n))
            if is_unavailable(answer):
                break
            assert answer.status_code == 202, answer.text
            run_ids.append(answer.json()["run_id"])
            assert n < 100
        assert run_ids, "some were accepted before"
        server.wait_for_line("cannot be written")
        assert {run_id for (run_id,) in rows(store, "SELECT run_id FROM runs")} == set(run_ids)
        for run_id in run_ids:
            assert client.get(f"/run/{run_id}").status_code == 200
        text = {"text": "x" * 50_000}
        assert is_unavailable(client.post("/run/flock", json={"agent_name": "length", "inputs": text}))
        assert is_unavailable(submit(client, "length", **text))

        make_space(server)
        until(lambda: submit(client, "length", text="").status_code == 202, "room")
        run_ids.append(accepted(client, "length", text="x" * (50_000 + len(run_ids))))
        for n, run_id in enumerate(run_ids):
            run = ended(client, run_id)
            assert (run["status"], run["result"]) == ("completed", {"result": 50_000 + n})
        assert server.stop() in (0, -signal.SIGTERM)


# A damaged file


PAGE = 4096


def fill(client: httpx.Client) -> dict[str, str]:
    """Runs whose results take from none to some overflow pages; they are answered from memory."""
    runs = {}
    for n in range(60):
        text, times = f"<{n:02}>", (1, 1, 100, 100, 1500, 1500, 5000, 5000)[n % 8]
        inputs = {"text": text, "times": times}
        run = client.post("/run/flock", json={"agent_name": "repeat", "inputs": inputs}).raise_for_status().json()
        assert run["result"] == {"result": text * times}
        runs[run["run_id"]] = text * times
    return runs


def damage(store: Path, what: str) -> None:
    """Overwrite pages: all but the first, or those that hold nothing but a part of every second run's long result."""
    chance = random.Random(7)
    with contextlib.closing(sqlite3.connect(store)) as db:
        assert db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0, "all is in the file itself"
        assert db.execute("PRAGMA page_size").fetchone()[0] == PAGE
    whole = store.read_bytes()
    pages = [whole[at : at + PAGE] for at in range(0, len(whole), PAGE)]
    assert len(pages) > 100
    results = [f"<{n:02}>".encode() * 100 for n in range(0, 60, 2)]
    for number, page in enumerate(pages[1:], 1):
        if what.startswith("all") or any(page[4:304] in result for result in results):
            pages[number] = bytes(PAGE) if what.endswith("zeros") else chance.randbytes(PAGE)
    with open(store, "r+b") as file:
        file.write(b"".join(pages))


def check_answers(client: httpx.Client, runs: dict[str, str]) -> list[str]:
    """Each run is answered rightly or with 503; the results of those with 503."""
    unavailable = []
    for run_id, result in runs.items():
        answer = client.get(f"/run/{run_id}")
        if is_unavailable(answer):
            unavailable.append(result)
        else:
            assert answer.status_code == 200, answer.text
            assert (answer.json()["status"], answer.json()["result"]) == ("completed", {"result": result})
    return unavailable


@pytest.mark.parametrize("what", ["no database", "no header", "all noise", "all zeros"])
def test_a_file_that_is_no_store_any_more_is_refused_with_what_to_do(
    what: str, flock_file: Path, tmp_path: Path
) -> None:
    """An exit code and a message for people, without a traceback."""
    store = tmp_path / "flock.db"
    if what != "no database":
        with serving(flock_file, store) as (server, client):
            fill(client)
            server.stop()
    if what.startswith("all"):
        damage(store, what)
        words = f"The store {str(store)!r} cannot be opened: database disk image is malformed."
    else:
        store.write_bytes(random.Random(7).randbytes(100) + (store.read_bytes()[100:] if store.exists() else b""))
        words = f"The store {str(store)!r} cannot be opened: file is not a database."
    before = store.read_bytes()
    done = subprocess.run(serve_command(flock_file, store), capture_output=True, text=True, timeout=30)
    output = done.stdout + done.stderr
    assert done.returncode not in (0, -signal.SIGTERM)
    assert words in output
    assert "use another file (store=, --store)" in output.replace("Use", "use")
    assert "Traceback" not in output
    assert store.read_bytes() == before, "what can be saved of it is still there"


@pytest.mark.parametrize("what", ["some noise", "some zeros"])
def test_a_damaged_file_gives_what_is_whole_and_503_for_the_rest(what: str, flock_file: Path, tmp_path: Path) -> None:
    """SQLite has no checksums; all the same no answer is wrong, and none is a 500."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        runs = fill(client)
        server.stop()
    damage(store, what)
    with serving(flock_file, store) as (server, client):
        damaged = [result for result in list(runs.values())[::2] if len(result) > PAGE]
        assert check_answers(client, runs) == damaged
        server.wait_for_line("cannot be read")
        assert client.get("/agents").status_code == 200
        assert server.stop() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("what", ["all noise", "all zeros"])
def test_a_file_damaged_under_a_running_server_gives_no_wrong_answer(
    what: str, flock_file: Path, tmp_path: Path
) -> None:
    """The server lives, tells what it still has in its cache, and answers 503 to all else."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        runs = fill(client)
        check_answers(client, dict(list(runs.items())[:10]))
        damage(store, what)
        assert check_answers(client, runs)
        for sent in (
            submit(client, "length", text="xx"),
            client.post("/run/flock", json={"agent_name": "length", "inputs": {"text": "xx"}}),
            client.post("/run/batch", json={"agent_name": "length", "batch_inputs": [{"text": "xx"}]}),
        ):
            assert is_unavailable(sent), sent.text
        assert check_answers(client, runs)
        server.wait_for_line("cannot be read")
        server.wait_for_line("cannot be written")
        assert client.get("/agents").status_code == 200
        assert server.process.poll() is None


# Several servers on one file


def test_servers_started_at_once_on_a_new_file_all_serve_it(flock_file: Path, tmp_path: Path) -> None:
    """Each of them may be the one that makes the tables."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        served = list(pool.map(lambda _: stack.enter_context(serving(flock_file, store)), range(3)))
        for server, client in served:
            run_id = accepted(client, "length", text="abc")
            for _, other in served:
                assert ended(other, run_id)["result"] == {"result": 3}
            assert server.process.poll() is None


@pytest.mark.alone
def test_what_a_killed_server_left_is_done_once_by_one_of_the_others(flock_file: Path, tmp_path: Path) -> None:
    """Three servers; each run has one of them, whoever asks; of the two that are left, one takes up each run."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        served = [stack.enter_context(serving(flock_file, store)) for _ in range(3)]
        (doomed, first), *others = served
        pids = [server.process.pid for server, _ in served]
        for pid in pids[1:]:
            (tmp_path / f"go-{pid}").touch()
        own = {n: accepted(served[1 + n % 2][1], "work", n=n) for n in range(20)}
        for n, run_id in own.items():
            for client in (others[0][1], others[1][1], first):
                assert ended(client, run_id)["result"] == {"result": pids[1 + n % 2]}
        left = {n: accepted(first, "work", n=n) for n in range(100, 110)}
        until(lambda: len(begun(tmp_path)) == 30, "beginning of each run")
        for run_id in left.values():
            path = f"/run/{run_id}"
            until(lambda: others[0][1].get(path).json()["status"] == "running", "news of it")  # noqa: B023 - called here

        killed_at = time.monotonic()
        os.kill(doomed.process.pid, signal.SIGKILL)
        for run_id in left.values():
            run = ended(others[0][1], run_id)
            assert run["status"] == "completed"
            assert run["result"]["result"] in pids[1:]
        assert time.monotonic() - killed_at < 6, "two seconds are promised; a busy machine has more"
        assert sorted(n for n, _ in begun(tmp_path)) == sorted([*own, *left, *left]), "once, and once more"
        assert sum("resuming 10 runs" in line for server, _ in others for line in server.lines) == 1


# A suspended process


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def suspend(pid: int, store: Path) -> None:
    """SIGSTOP, at a moment at which the process does not keep all others from writing."""

    def is_suspended() -> bool:
        os.kill(pid, signal.SIGSTOP)
        until(lambda: state_of(pid) == "T", "stop")
        if flock.engine.files.is_locked(f"{store}-lock"):
            os.kill(pid, signal.SIGCONT)
            return False
        return True

    until(is_suspended, "moment between two transactions")


def test_a_server_that_wakes_after_its_runs_were_taken_over_overwrites_nothing_and_goes_on(
    flock_file: Path, tmp_path: Path
) -> None:
    """The kernel keeps the lock of a stopped process; here its lock file is removed, as one who tidies up might do."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        sleeper, at_sleeper = stack.enter_context(serving(flock_file, store))
        (lock_file,) = tmp_path.glob("flock.db-engine-*")
        other, at_other = stack.enter_context(serving(flock_file, store))
        pid, other_pid = sleeper.process.pid, other.process.pid
        stack.callback(os.kill, pid, signal.SIGCONT)
        run_id = accepted(at_sleeper, "work", n=1)
        batch = {"agent_name": "work", "batch_inputs": [{"n": 10}, {"n": 11}, {"n": 12}], "parallel": False}
        batch_id = at_sleeper.post("/run/batch", json=batch).json()["batch_id"]
        waited_for = pool.submit(at_sleeper.post, "/run/flock", json={"agent_name": "work", "inputs": {"n": 2}})
        until(lambda: len(begun(tmp_path)) == 3, "beginning of each run")
        until(lambda: len(rows(store, "SELECT run_id FROM runs")) == 5, "record of the run that is waited for")
        suspend(pid, store)
        assert flock.engine.files.is_locked(str(lock_file)), "a stopped process keeps its lock"
        lock_file.unlink()
        until(lambda: (1, other_pid) in begun(tmp_path), "take-over")
        (tmp_path / f"go-{other_pid}").touch()
        assert ended(at_other, run_id)["result"] == {"result": other_pid}
        until(lambda: at_other.get(f"/batch/{batch_id}").json()["status"] == "completed", "end of the batch")

        def all_rows() -> list[list[tuple[Any, ...]]]:
            return [rows(store, f"SELECT * FROM {table} ORDER BY 1, 2") for table in ("runs", "steps", "batches")]

        before, told = all_rows(), at_other.get(f"/run/{run_id}").json()
        assert len(before[0]) == 5
        (tmp_path / f"go-{pid}").touch()
        os.kill(pid, signal.SIGCONT)
        sleeper.wait_for_line(f"run {run_id}: it was taken over by another engine")
        answer = waited_for.result(20).json()
        assert (answer["status"], answer["error_type"]) == ("failed", "interrupted")
        sleeper.wait_for_line(f"run {answer['run_id']}: it was taken over by another engine")
        sleeper.wait_for_line(f"batch {batch_id}: it was taken over by another engine")
        assert all_rows() == before
        assert at_sleeper.get(f"/run/{run_id}").json() == told
        assert not any("completed" in line and run_id in line for line in sleeper.lines)

        sleeper.wait_for_line("another engine has taken over the runs of this one, which continues with new work")
        assert ended(at_sleeper, accepted(at_sleeper, "work", n=3))["result"] == {"result": pid}
        (tmp_path / f"go-{pid}").unlink()
        last = accepted(at_sleeper, "work", n=4)
        until(lambda: (4, pid) in begun(tmp_path), "beginning")
        os.kill(pid, signal.SIGKILL)
        assert ended(at_other, last)["result"] == {"result": other_pid}, "it is looked after as before"


def test_a_process_that_keeps_the_store_locked_does_not_hold_up_the_others_for_ever(
    flock_file: Path, tmp_path: Path
) -> None:
    """As one that is suspended in its commit: until it goes on, the others read, answer 503, and can stop."""
    store = tmp_path / "flock.db"
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        server, client = stack.enter_context(serving(flock_file, store))
        leaving, _ = stack.enter_context(serving(flock_file, store))
        run_id = accepted(client, "length", text="abc")
        told = ended(client, run_id)
        with open(f"{store}-lock", "ab") as file:
            until(lambda: flock.engine.files.try_lock(file), "moment between two transactions")
            late = pool.submit(
                subprocess.run, serve_command(flock_file, store), capture_output=True, text=True, timeout=30
            )
            code = pool.submit(leaving.stop)
            assert is_unavailable(submit(client, "length", text="abc"))
            server.wait_for_line("another process has kept")
            assert client.get(f"/run/{run_id}").json() == told
            assert late.result().returncode not in (0, -signal.SIGTERM)
            assert f"The store {str(store)!r} cannot be used: another process has kept" in late.result().stderr
            assert "Traceback" not in late.result().stderr
            assert code.result() in (0, -signal.SIGTERM)
        until(lambda: submit(client, "length", text="abc").status_code == 202, "way back")


# A child that outlives its server


@pytest.mark.parametrize("how", ["fork", "multiprocessing", "subprocess"])
def test_a_child_of_an_agent_does_not_keep_the_runs_of_a_killed_server(
    how: str, flock_file: Path, tmp_path: Path
) -> None:
    """The next server takes them up before it listens, while the child still lives."""
    store = tmp_path / "flock.db"
    with serving(flock_file, store) as (server, client):
        run_id = accepted(client, "have_child", how=how)
        child = until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip(), "child")
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        with serving(flock_file, store) as (successor, client):
            assert any("resuming 1 runs" in line for line in successor.lines), "before it said that it was up"
            run = ended(client, run_id)
            assert (run["status"], run["result"]) == ("completed", {"result": successor.process.pid})
            assert state_of(int(child)) in "SRD", "the child lives"


# A clock that jumps


class Clock:
    """The wall clock of this process, which may be set.

    The machine's own cannot be set without hurting others, and no library that would fake it is everywhere; so the two
    places where this package asks for the time are led here. Everything else has the real monotonic clock.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta(0)
        clock, time_ns, seconds = self, time.time_ns, time.time

        class Settable(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> Any:
                return datetime.now(tz) + clock.ahead

        monkeypatch.setattr(flock.runs, "_last_id_time", flock.runs._last_id_time)  # restored at the end
        monkeypatch.setattr(time, "time", lambda: seconds() + clock.ahead.total_seconds())
        monkeypatch.setattr(time, "time_ns", lambda: time_ns() + int(clock.ahead.total_seconds()) * 1_000_000_000)
        for module in (flock.runs, flock.engine.store):
            monkeypatch.setattr(module, "datetime", Settable)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


DAY = timedelta(days=1)


def clocked_flock() -> Flock:
    flock = Flock("clock")

    @flock.agent(next_agent="second")
    def first(n: int) -> int:
        return n

    @flock.agent
    def second(n: int) -> int:
        return n

    @flock.agent
    async def hang() -> None:
        await anyio.sleep_forever()

    return flock


async def done(engine: EmbeddedEngine, n: int, key: IdempotencyKey | None = None) -> Run:
    with anyio.fail_after(PATIENCE_S):
        run = await engine.submit("first", msgspec.Raw(b'{"n": %d}' % n), key=key)
        return await engine.wait(run.run_id)


async def events_are_whole(engine: EmbeddedEngine, run_id: str) -> bool:
    with anyio.fail_after(PATIENCE_S):
        events = [event async for event in engine.events(run_id) if event]
    names = ["run.started", *["step.started", "step.completed"] * 2, "run.completed"]
    return [event.name for event in events] == names and sorted(e.id or 0 for e in events) == [e.id for e in events]


async def pages(engine: EmbeddedEngine) -> list[str]:
    """All runs, read two at a time."""
    found: list[str] = []
    while page := await engine.list_runs(RunFilter(limit=2, after=found[-1] if found else None)):
        found += [run.run_id for run in page]
        assert len(found) < 100
    return found


@pytest.mark.anyio
async def test_runs_keep_their_order_when_the_clock_is_set_back(clock: Clock, tmp_path: Path) -> None:
    """Lists, cursors, events and idempotency keys go by ids; only the times that are told go back."""
    async with clocked_flock().engine(store=tmp_path / "flock.db") as engine:
        key, later_key = IdempotencyKey("before", b"1"), IdempotencyKey("after", b"1")
        runs = [await done(engine, 0, key), await done(engine, 1), await done(engine, 2)]
        clock.ahead = -DAY
        runs += [await done(engine, 3), await done(engine, 4, later_key)]
        assert [run.status for run in runs] == [RunStatus.COMPLETED] * 5
        assert datetime.now(UTC) - runs[3].created_at > DAY / 2
        assert runs[3].created_at <= (runs[3].completed_at or runs[0].created_at) < runs[0].created_at
        assert await pages(engine) == [run.run_id for run in reversed(runs)]
        for run in runs:
            assert await events_are_whole(engine, run.run_id)
        await engine.store.delete_old_keys(flock.runs.now() - DAY)
        for again, run in ((key, runs[0]), (later_key, runs[4])):
            with pytest.raises(Replayed) as caught:
                await done(engine, 9, again)
            assert caught.value.made_id == run.run_id
        clock.ahead = timedelta(0)
        runs.append(await done(engine, 5))
        assert await pages(engine) == [run.run_id for run in reversed(runs)]


@pytest.mark.anyio
async def test_a_run_that_was_begun_before_the_clock_was_set_back_ends(clock: Clock, tmp_path: Path) -> None:
    """It ends before it began, by the clock; nothing minds."""
    async with clocked_flock().engine(store=tmp_path / "flock.db") as engine:
        run = await engine.submit("hang", msgspec.Raw(b"{}"))
        clock.ahead = -DAY
        await engine.cancel_run(run.run_id)
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run.run_id)
        assert run.status is RunStatus.CANCELLED
        assert run.completed_at
        assert run.completed_at < run.created_at
        assert engine.store.get_run(run.run_id) == run


@pytest.mark.anyio
async def test_the_newest_runs_are_kept_whatever_the_clock_says(clock: Clock, tmp_path: Path) -> None:
    """``keep_runs`` counts; it holds at once, not only when the clock has caught up."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_runs=3) as engine:
        runs = [await done(engine, n) for n in range(3)]
        clock.ahead = -DAY
        runs += [await done(engine, n) for n in range(3, 5)]
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs[2:])]


@pytest.mark.anyio
async def test_the_newest_runs_are_kept_by_the_next_process_too(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine whose clock was ahead starts again with the right time: its new runs are not the oldest."""
    clock.ahead = DAY
    monkeypatch.setattr(flock.runs, "_last_id_time", 0)
    async with clocked_flock().engine(store=tmp_path / "flock.db") as engine:
        runs = [await done(engine, n) for n in range(3)]
    clock.ahead = timedelta(0)
    monkeypatch.setattr(flock.runs, "_last_id_time", 0)  # as in a new process
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_runs=2) as engine:
        runs.append(await done(engine, 3))
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs[2:])]


@pytest.mark.anyio
async def test_runs_are_kept_by_age_when_the_clock_is_set_back(clock: Clock, tmp_path: Path) -> None:
    """None is deleted too early; all are once the clock says that they are old."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", keep_for_s=3600) as engine:
        runs = [await done(engine, 0)]
        clock.ahead = -DAY
        runs.append(await done(engine, 1))
        await engine.delete_old()
        assert await pages(engine) == [run.run_id for run in reversed(runs)]
        clock.ahead = 2 * DAY
        await engine.delete_old()
        assert await pages(engine) == []


@pytest.mark.anyio
@pytest.mark.parametrize("jump", [-DAY, DAY], ids=["back", "forward"])
async def test_waiting_does_not_go_by_the_wall_clock(jump: timedelta, clock: Clock, tmp_path: Path) -> None:
    """Time-outs of runs, of the queue and of those who wait are as long as they were, whatever the clock says."""
    async with clocked_flock().engine(store=tmp_path / "flock.db", max_concurrency=1, queue_timeout_s=0.6) as engine:
        began = anyio.current_time()
        run = await engine.submit("hang", msgspec.Raw(b"{}"), timeout_s=1)
        queued = await engine.submit("first", msgspec.Raw(b'{"n": 1}'))
        with anyio.fail_after(PATIENCE_S):
            while (await engine.get_run(run.run_id)).status is RunStatus.STARTING:  # noqa: ASYNC110 - as a client
                await anyio.sleep(0.01)
            clock.ahead = jump
            assert (await engine.wait(run.run_id, timeout_s=0.1)).status is RunStatus.RUNNING
            assert anyio.current_time() - began >= 0.1
            queued = await engine.wait(queued.run_id)
            assert anyio.current_time() - began >= 0.6
            run = await engine.wait(run.run_id)
            assert anyio.current_time() - began >= 1
        assert (queued.status, queued.error_type) == (RunStatus.FAILED, "queue_timeout")
        assert (run.status, run.error_type) == (RunStatus.FAILED, "timeout")
        assert (await done(engine, 2)).status is RunStatus.COMPLETED

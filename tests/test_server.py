"""The built-in server: several workers on one socket and one store, startup and shutdown."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flock.command.server import LAST_REQUESTS_S
from flock.web.auth import new_key
from tests.support import ROOT
from tests.support.http import events_in
from tests.support.servers import Server, flockapi_command, free_port, running, workers_of

WORKERS = 3
FLOCK = """
import multiprocessing, os, pathlib
import anyio
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("workers")

@flock.agent
async def who(wait_for: str = "", context: RunContext = None) -> int:
    context.progress(1, 2)
    while wait_for and not pathlib.Path(wait_for).exists():
        await anyio.sleep(0.01)
    return os.getpid()

@flock.agent
async def hold(folder: str) -> None:
    pathlib.Path(folder, f"held-{os.getpid()}").touch()
    await anyio.sleep_forever()

if os.environ.get("BREAK_WORKERS") and multiprocessing.parent_process():
    raise RuntimeError("broken in workers only")
"""


@pytest.fixture(scope="module")
def flock_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("workers") / "workers.py"
    path.write_text(FLOCK)
    return path


@pytest.fixture(scope="module")
def served(flock_file: Path) -> Iterator[Server]:
    store = flock_file.with_name("flock.db")
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(store))
    with running(*command, "--workers", str(WORKERS)) as server:
        server.wait_for_line("Application startup complete", times=WORKERS)
        yield server


def post(server: Server, path: str, body: Any = None, **query: Any) -> httpx.Response:
    """Send a request on its own connection, so that any worker may take it."""
    return httpx.post(server.url + path, json=body, params=query, timeout=60)


def start(server: Server, wait_for: Path) -> str:
    inputs = {"wait_for": str(wait_for)}
    answer = post(server, "/run/flock", {"agent_name": "who", "inputs": inputs, "async_run": True})
    assert answer.status_code == 202
    run_id: str = answer.json()["run_id"]
    return run_id


def in_parallel(call: Any, times: int) -> list[Any]:
    """Return the results of concurrent calls, which several workers answer."""
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(call())) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == times
    return results


def test_all_workers_take_connections(served: Server, tmp_path: Path) -> None:
    pids: set[int] = set()
    deadline = time.monotonic() + 30
    while len(pids) < WORKERS and time.monotonic() < deadline:
        answers = in_parallel(lambda: post(served, "/run/flock", {"agent_name": "who"}).json(), 12)
        pids |= {answer["result"]["result"] for answer in answers}
    assert pids == set(workers_of(served))


def test_any_worker_can_wait_for_a_run_of_another(served: Server, tmp_path: Path) -> None:
    """24 waiters on 3 workers are all answered soon after the run ends."""
    go = tmp_path / "go"
    run_id = start(served, go)

    def wait() -> tuple[str, float]:
        body = httpx.get(f"{served.url}/run/{run_id}", params={"wait": 30}, timeout=60).json()
        return body["status"], time.time()

    threading.Timer(0.3, go.touch).start()
    answers = in_parallel(wait, 24)
    ended_at = go.stat().st_mtime
    assert {status for status, _ in answers} == {"completed"}
    assert max(at for _, at in answers) - ended_at < 20, "not only at the end of their wait"


def test_any_worker_can_stream_and_cancel_a_run_of_another(served: Server, tmp_path: Path) -> None:
    run_id = start(served, tmp_path / "never")

    def follow() -> list[str]:
        text = httpx.get(f"{served.url}/run/{run_id}/events", timeout=60).text
        return [event["event"] for event in events_in(text) if "id" in event]

    stopper = threading.Timer(0.3, lambda: post(served, f"/run/{run_id}/cancel"))
    stopper.start()
    streams = in_parallel(follow, 12)
    assert set(map(tuple, streams)) == {("run.started", "step.started", "run.cancelled")}
    answers = in_parallel(lambda: post(served, f"/run/{run_id}/cancel", wait=60), 12)
    assert {(answer.status_code, answer.json()["status"]) for answer in answers} == {(200, "cancelled")}


def test_one_key_makes_one_run_across_all_workers(served: Server) -> None:
    body = {"agent_name": "who", "async_run": True}

    def send() -> httpx.Response:
        headers = {"Idempotency-Key": "the-same"}
        return httpx.post(f"{served.url}/run/flock", json=body, headers=headers, timeout=60)

    answers = in_parallel(send, 24)
    assert {answer.status_code for answer in answers} <= {200, 202, 409}
    taken = [answer for answer in answers if answer.status_code != 409]
    assert len({answer.json()["run_id"] for answer in taken}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in taken) == 1


def test_any_worker_can_retry_and_delete_a_run(served: Server, tmp_path: Path) -> None:
    run_id = start(served, tmp_path / "never again")
    assert post(served, f"/run/{run_id}/cancel", wait=60).json()["status"] == "cancelled"
    answers = in_parallel(lambda: post(served, f"/run/{run_id}/retry"), 6)
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409, 409, 409], (
        "only one of them reopens the run"
    )
    assert post(served, f"/run/{run_id}/cancel", wait=60).json()["attempt"] == 2
    answers = in_parallel(lambda: httpx.delete(f"{served.url}/run/{run_id}", timeout=60), 6)
    assert sorted(answer.status_code for answer in answers) == [204, 404, 404, 404, 404, 404]


def test_all_workers_shut_down_cleanly(flock_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "stop.db"
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(store), "--workers", "2")
    with running(*command, "--drain-timeout", "0.2") as server:
        server.wait_for_line("Application startup complete", times=2)
        run_id = start(server, tmp_path / "never")
        assert server.stop() == 0
    log = "\n".join(server.lines)
    assert "ERROR" not in log
    assert "Traceback" not in log
    assert "WARNING" not in log
    (tmp_path / "never").touch()
    with running(*command) as server:
        body = httpx.get(f"{server.url}/run/{run_id}", params={"wait": 30}, timeout=60).json()
    assert (body["status"], body["attempt"]) == ("completed", 2), "it resumed after the restart"


def test_workers_do_not_outlive_their_parent(flock_file: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "orphans.db")
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", store, "--workers", "2")
    with running(*command) as server:
        server.wait_for_line("Application startup complete", times=2)
        os.kill(server.process.pid, signal.SIGKILL)
        server.wait_for_line("Finished server process", times=2)
    assert "ERROR" not in "\n".join(server.lines)


def test_the_server_exits_if_its_workers_cannot_start(flock_file: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "broken.db")
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", store, "--workers", "2")
    env = {**os.environ, "BREAK_WORKERS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode == 3
    assert "RuntimeError: broken in workers only" in done.stderr


def test_a_worker_that_cannot_be_replaced_at_once_is_replaced_later(flock_file: Path, tmp_path: Path) -> None:
    """Such as while a suspended process keeps the lock of the store. The other workers go on."""
    store = tmp_path / "locked.db"
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(store), "--workers", "2")
    with running(*command) as server:
        server.wait_for_line("Application startup complete", times=2)
        with open(f"{store}-lock", "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.kill(workers_of(server)[0], signal.SIGKILL)
            server.wait_for_line("locked for 5 s. If that process is suspended")
        server.wait_for_line("Application startup complete", times=3)
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
        assert len(workers_of(server)) == 2


def test_a_stopping_server_ends_streams_of_batches_with_a_retry_hint(flock_file: Path, tmp_path: Path) -> None:
    """They end at once, before the runs do. Until the runs end, new work is refused and reads are answered."""
    store = str(tmp_path / "hint.db")
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", store, "--drain-timeout", "30")
    go = tmp_path / "go"
    with running(*command) as server:
        run_id = start(server, go)
        body = {"agent_name": "who", "batch_inputs": [{"wait_for": str(go)}]}
        batch_id = post(server, "/run/batch", body).json()["batch_id"]
        with httpx.stream("GET", f"{server.url}/batch/{batch_id}/events", timeout=60) as stream:
            received = stream.iter_text()
            assert "batch.progress" in next(received)
            server.process.terminate()
            terminated_at = time.monotonic()
            assert "".join(received).endswith("retry: 1000\n\n")
        assert time.monotonic() - terminated_at < 5
        ready = httpx.get(f"{server.url}/readyz")
        refused = post(server, "/run/flock", {"agent_name": "who"})
        for answer in (ready, refused):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        assert httpx.get(f"{server.url}/run/{run_id}").json()["status"] == "running"
        go.touch()
        assert server.process.wait(30) in (0, -signal.SIGTERM)
    log = "\n".join(server.lines)
    assert "ERROR" not in log
    assert f"run {run_id}: completed" in log


def until_stopping(server: Server) -> None:
    """Ask each of its workers for more until all of them refuse it, so that they drain."""

    def is_ready() -> bool:
        try:
            return httpx.get(f"{server.url}/readyz", timeout=60).is_success
        except httpx.TransportError:  # a worker without runs ends at once, with connections that it has just accepted
            return False

    while any(in_parallel(is_ready, 8)):
        pass


@pytest.mark.parametrize("is_new", [True, False], ids=["POST", "GET"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stopping_server_streams_a_run_until_it_ends(
    workers: str, is_new: bool, flock_file: Path, tmp_path: Path
) -> None:
    """Both the stream of a request that starts a run, and one of a run that a process of this server executes."""
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(tmp_path / "flock.db"))
    go, run = tmp_path / "go", {"agent_name": "who", "inputs": {"wait_for": str(tmp_path / "go")}}
    with running(*command, "--workers", workers, "--drain-timeout", "100") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:  # one connection, so one process
            if is_new:
                path, method, body = "/run/flock", "POST", run
            else:
                accepted = client.post("/run/flock", json={**run, "async_run": True}).json()
                path, method, body = f"/run/{accepted['run_id']}/events", "GET", None
            headers = {"Accept": "text/event-stream"}
            with client.stream(method, path, json=body, headers=headers) as stream:
                text, received = "", stream.iter_text()
                while "step.started" not in text:
                    text += next(received)
                server.process.terminate()
                until_stopping(server)
                go.touch()
                text += "".join(received)
        assert events_in(text)[-1]["event"] == "run.completed"
        assert server.process.wait(60) in (0, -signal.SIGTERM)


def test_a_stopping_server_streams_the_end_of_a_run_that_outlasts_the_drain(flock_file: Path, tmp_path: Path) -> None:
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(tmp_path / "flock.db"))
    run = {"agent_name": "who", "inputs": {"wait_for": str(tmp_path / "never")}}
    with running(*command, "--drain-timeout", "0.2") as server:
        url, headers = f"{server.url}/run/flock", {"Accept": "text/event-stream"}
        with httpx.stream("POST", url, json=run, headers=headers, timeout=60) as stream:
            text, received = "", stream.iter_text()
            while "step.started" not in text:
                text += next(received)
            server.process.terminate()
            text += "".join(received)
    last = events_in(text)[-1]
    assert (last["event"], last["data"]["error_type"]) == ("run.failed", "interrupted")


def test_a_stopping_server_ends_the_stream_of_an_asynchronous_run_after_the_drain(
    flock_file: Path, tmp_path: Path
) -> None:
    """The run is resumed at the next start, so the client is told to reconnect."""
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(tmp_path / "flock.db"))
    with running(*command, "--drain-timeout", "0.2") as server:
        run_id = start(server, tmp_path / "never")
        with httpx.stream("GET", f"{server.url}/run/{run_id}/events", timeout=60) as stream:
            text, received = "", stream.iter_text()
            while "step.started" not in text:
                text += next(received)
            server.process.terminate()
            text += "".join(received)
    assert events_in(text)[-1]["event"] != "run.failed"
    assert text.endswith("retry: 1000\n\n")


# API keys and SIGHUP


@contextlib.contextmanager
def keyed(flock_file: Path, keys: Path, workers: int) -> Iterator[Server]:
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(keys.with_suffix(".db")))
    command += ["--api-keys-file", str(keys), "--workers", str(workers)]
    with running(*command) as server:
        server.wait_for_line("Application startup complete", times=workers)
        yield server


def statuses(server: Server, key: str) -> set[int]:
    """Return the status codes of requests with *key* to all workers."""
    headers = {"X-API-Key": key}
    return set(in_parallel(lambda: httpx.get(f"{server.url}/runs", headers=headers, timeout=60).status_code, 12))


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_sighup_reads_the_keys_again_and_interrupts_nothing(workers: int, flock_file: Path, tmp_path: Path) -> None:
    keys, old, new = tmp_path / "keys", new_key(), new_key()
    keys.write_text(f"ann={old}")
    with keyed(flock_file, keys, workers) as server:
        run = {"agent_name": "who", "inputs": {"wait_for": str(tmp_path / "go")}}
        headers = {"X-API-Key": old, "Accept": "text/event-stream"}
        with httpx.stream("POST", f"{server.url}/run/flock", json=run, headers=headers, timeout=60) as stream:
            text, received = "", stream.iter_text()
            while "step.started" not in text:
                text += next(received)
            keys.write_text(f"ann={new}")
            os.kill(server.process.pid, signal.SIGHUP)
            server.wait_for_line("The API keys were read again: ann.", times=workers)
            (tmp_path / "go").touch()
            text += "".join(received)
        assert events_in(text)[-1]["event"] == "run.completed"
        assert (statuses(server, old), statuses(server, new)) == ({401}, {200})
    assert "exited" not in "\n".join(server.lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("ann", "Entry 1 .* not NAME=KEY"), ("ann=short", "at least 16"), ("", "empty"), (None, "read")],
)
@pytest.mark.parametrize("workers", [1, WORKERS])
def test_sighup_keeps_the_keys_if_the_file_is_invalid(
    workers: int, text: str | None, reason: str, flock_file: Path, tmp_path: Path
) -> None:
    """This also holds for a worker that replaces a dead one."""
    keys, key = tmp_path / "keys", new_key()
    keys.write_text(f"ann={new_key()}")
    with keyed(flock_file, keys, workers) as server:
        keys.write_text(f"ann={key}")
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_line("The API keys were read again", times=workers)
        keys.unlink() if text is None else keys.write_text(text)
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_line("The API keys were not read again")
        (line,) = [line for line in server.lines if "were not read again" in line]
        assert line.startswith("ERROR:")
        assert re.search(f"the former ones remain valid.*{reason}", line)
        if workers > 1:
            os.kill(workers_of(server)[0], signal.SIGKILL)
            server.wait_for_line("Application startup complete", times=workers + 1)
        assert statuses(server, key) == {200}


def test_a_worker_that_replaces_a_dead_one_reads_the_keys_again(flock_file: Path, tmp_path: Path) -> None:
    keys, old, new = tmp_path / "keys", new_key(), new_key()
    keys.write_text(f"ann={old}")
    with keyed(flock_file, keys, 2) as server:
        keys.write_text(f"ann={new}")
        for pid in workers_of(server):
            os.kill(pid, signal.SIGKILL)
        server.wait_for_line("Application startup complete", times=4)
        assert (statuses(server, old), statuses(server, new)) == ({401}, {200})


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_stops_no_server_that_has_no_file_of_keys(workers: int, flock_file: Path, tmp_path: Path) -> None:
    """Its workers get the signal while they start, too."""
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(tmp_path / "flock.db"))
    with running(*command, "--workers", str(workers)) as server:
        if workers > 1:
            os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_line("Application startup complete", times=workers)
        os.kill(server.process.pid, signal.SIGHUP)
        server.wait_for_line("SIGHUP has no effect without --api-keys-file", times=workers)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert server.stop() in (0, -signal.SIGTERM)
    assert "exited" not in "\n".join(server.lines)


# Restarts

#: Starts a command with sockets that it listens on, as systemd does: from descriptor 3, with the variables.
PASS_SOCKET = """
import os, sys
fd, count, *command = sys.argv[1:]
os.dup2(int(fd), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
os.execv(command[0], command)
"""


@contextlib.contextmanager
def activated(listener: socket.socket, *command: str, count: int = 1) -> Iterator[subprocess.Popen[str]]:
    """Start a server with *listener*, and stop it with SIGTERM at the end of the block."""
    launcher = [sys.executable, "-c", PASS_SOCKET, str(listener.fileno()), str(count), *command]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(launcher, pass_fds=[listener.fileno(), 3], **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=60)


class Clients:
    """Clients that start runs and read without a pause.

    Args:
        keeps: whether each client sends its requests on one connection, as long as the server keeps it open.
    """

    def __init__(self, url: str, number: int = 4, *, keeps: bool = False) -> None:
        self.url = url
        self._keeps = keeps
        self.answers: list[int] = []
        self.failures: list[str] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(number)]

    def _send(self) -> None:
        limits = httpx.Limits(max_keepalive_connections=int(self._keeps))
        with httpx.Client(base_url=self.url, timeout=100, limits=limits) as client:
            while not self._is_over.is_set():
                try:
                    answer = client.post("/run/flock", json={"agent_name": "who"})
                    self.answers.append(answer.status_code)
                    if answer.status_code != 200:
                        self.failures.append(answer.text)
                    self.answers.append(client.get("/agents/who").status_code)
                except httpx.HTTPError as exc:
                    self.failures.append(repr(exc))

    def wait_for_answers(self, number: int) -> None:
        wanted, deadline = len(self.answers) + number, time.monotonic() + 100
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline, self.failures
            time.sleep(0.01)

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(200)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_server_on_a_passed_socket_restarts_without_a_refused_or_failed_request(
    workers: str, flock_file: Path, tmp_path: Path
) -> None:
    """The next server answers the requests that arrive while the old one drains, and while no server runs."""
    store = str(tmp_path / "flock.db")
    command = flockapi_command("serve", str(flock_file), "--workers", workers, "--store", store)
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        with Clients(f"http://127.0.0.1:{listener.getsockname()[1]}") as clients:
            for _ in range(3):
                with activated(listener, *command):
                    clients.wait_for_answers(40)
            with activated(listener, *command):
                clients.wait_for_answers(40)
                clients.__exit__()
    assert (clients.failures, set(clients.answers)) == ([], {200})


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_with_kept_connections_notice_no_restart(workers: str, flock_file: Path, tmp_path: Path) -> None:
    """A stopping server answers what has arrived, and closes each connection with a response that says so."""
    command = flockapi_command("serve", str(flock_file), "--workers", workers, "--store", str(tmp_path / "flock.db"))
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        with Clients(f"http://127.0.0.1:{listener.getsockname()[1]}", keeps=True) as clients:
            for _ in range(3):
                with activated(listener, *command):
                    clients.wait_for_answers(600)
            with activated(listener, *command):
                clients.wait_for_answers(200)
                clients.__exit__()
    assert len(clients.answers) >= 2000
    assert (clients.failures, set(clients.answers)) == ([], {200})


def test_a_draining_server_closes_kept_connections(flock_file: Path, tmp_path: Path) -> None:
    """A client with a kept connection would get 503 again and again, and never reach the next server."""
    inputs = {"wait_for": str(tmp_path / "go")}
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", ":memory:")
    with running(*command) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        with httpx.Client(base_url=server.url) as kept:
            sent = {"agent_name": "who", "inputs": inputs}
            with client.stream("POST", "/run/flock", json=sent, headers={"Accept": "text/event-stream"}) as events:
                lines = events.iter_lines()
                next(lines)
                assert kept.get("/healthz").status_code == 200
                server.process.terminate()
                while not kept.get("/readyz").is_error:
                    pass
                answer = kept.post("/run/flock", json={"agent_name": "who"})
                assert (answer.status_code, answer.headers["connection"]) == (503, "close")
                (tmp_path / "go").touch()
                assert "run.completed" in "".join(lines)


def test_a_client_without_a_key_cannot_send_on_after_its_response(flock_file: Path) -> None:
    """The server reads what the response may have crossed, and then no more; before, 2.6 GiB in five seconds."""
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", ":memory:")
    with running(*command, FLOCK_API_KEYS="ann=fk_" + "a" * 40) as server:
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port), timeout=60) as client:
            client.sendall(b"POST /batches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 401")
            client.settimeout(1)
            sent = 0
            with contextlib.suppress(OSError):  # a time-out, or a closed connection
                while sent < 200_000_000:
                    sent += client.send(b"x" * 65536)
        assert sent < 20_000_000, "what the buffers of the system hold"


def test_a_stopping_server_on_a_passed_socket_waits_for_the_first_request_of_a_connection(flock_file: Path) -> None:
    """Its client is slow to send it. A next server does not get the connection, since this one has accepted it."""
    command = flockapi_command("serve", str(flock_file), "--store", ":memory:")
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        address = listener.getsockname()
        with activated(listener, *command) as process, contextlib.ExitStack() as stack:
            assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz", timeout=100).status_code == 200
            slow = stack.enter_context(socket.create_connection(address, timeout=60))
            assert httpx.get(f"http://127.0.0.1:{address[1]}/healthz").status_code == 200, "both are accepted"
            process.terminate()
            time.sleep(3 * LAST_REQUESTS_S)
            slow.sendall(b"GET /agents/who HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert slow.recv(100).startswith(b"HTTP/1.1 200")


NGINX = """
daemon off; worker_processes 2; pid nginx.pid; error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    include upstream.conf;
    server {{
        listen 127.0.0.1:{port};
        {location}
    }}
}}
"""


def children_of(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


class Nginx:
    """nginx with the location and the upstream of ``examples/deploy``, for two servers on *ports*."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        self.folder, self.ports, port = folder, ports, free_port()
        self.url = f"http://127.0.0.1:{port}"
        text = (ROOT / "examples/deploy/nginx.conf").read_text("utf-8")
        location = text[text.index("location / {") : text.rindex("}")].replace("127.0.0.1:8344", "flockapi")
        (folder / "nginx.conf").write_text(NGINX.format(port=port, location=location))
        self.write_upstream()
        self.command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]

    def write_upstream(self, down: int | None = None) -> None:
        text = (ROOT / "examples/deploy/upstream.conf").read_text("utf-8")
        for shown, port in zip(("8344", "8345"), self.ports, strict=True):
            text = text.replace(f":{shown};", f":{port}{' down' * (port == down)};")
        (self.folder / "upstream.conf").write_text(text)

    def reload(self, down: int | None = None) -> None:
        """Take the server on the port *down* out, and wait until no worker has the former settings."""
        self.write_upstream(down)
        former = children_of(self.process.pid)
        self.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 60
        while former & (workers := children_of(self.process.pid)) or not workers:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def __enter__(self) -> "Nginx":
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{self.url}/healthz")
                return self
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def __exit__(self, *exc_info: object) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed: apt-get install nginx-light")
def test_two_servers_behind_nginx_are_replaced_without_a_failed_or_repeated_request(
    flock_file: Path, tmp_path: Path
) -> None:
    """If one is killed, a run that it had accepted is not started again by the other."""
    ports = (free_port(), free_port())
    commands = {
        port: flockapi_command("serve", str(flock_file), "--port", str(port), "--store", str(tmp_path / "flock.db"))
        for port in ports
    }
    with contextlib.ExitStack() as stack:
        servers = {port: stack.enter_context(running(*command)) for port, command in commands.items()}
        nginx = stack.enter_context(Nginx(tmp_path, ports))
        with Clients(nginx.url) as clients:
            clients.wait_for_answers(40)
            for port in ports:
                nginx.reload(down=port)
                servers[port].stop()
                clients.wait_for_answers(40)
                servers[port] = stack.enter_context(running(*commands[port]))
                nginx.reload()
                clients.wait_for_answers(40)
        assert (clients.failures, set(clients.answers)) == ([], {200})
        body = {"agent_name": "hold", "inputs": {"folder": str(tmp_path)}}
        with ThreadPoolExecutor() as pool:
            cut_off = pool.submit(lambda: httpx.post(f"{nginx.url}/run/flock", json=body, timeout=100))
            while not (held := list(tmp_path.glob("held-*"))):
                assert not cut_off.done()
                time.sleep(0.01)
            os.kill(pid := int(held[0].name.removeprefix("held-")), signal.SIGKILL)
            assert cut_off.result(100).status_code == 502
        killed = next(server for server in servers.values() if server.process.pid == pid)
        killed.process.wait(60)  # its other connections may be closed a moment later
        with Clients(nginx.url) as others:
            others.wait_for_answers(40)
        assert (others.failures, set(others.answers)) == ([], {200})
        assert list(tmp_path.glob("held-*")) == held
        runs, path = 0, "/runs?agent_name=who&limit=1000"
        while path:
            page = httpx.get(nginx.url + path, timeout=60).json()
            runs, path = runs + len(page["runs"]), page["next"]
        assert runs == len(clients.answers + others.answers) / 2, "half of the requests start a run"


def test_a_passed_unix_socket_needs_a_key(flock_file: Path, tmp_path: Path) -> None:
    """A proxy may be behind it, so the clients are not only programs on this machine."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "flock.sock"))
        listener.listen()
        command = flockapi_command("serve", str(flock_file), "--store", str(tmp_path / "flock.db"))
        with activated(listener, *command), httpx.HTTPTransport(uds=str(tmp_path / "flock.sock")) as transport:
            client = httpx.Client(transport=transport, base_url="http://t", timeout=60)
            assert client.get("/healthz").status_code == 200
            assert client.get("/runs").status_code == 401


def test_several_passed_sockets_are_refused(flock_file: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = flockapi_command("serve", str(flock_file), "--store", str(tmp_path / "flock.db"))
        with activated(listener, *command, count=2) as process:
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "2 sockets were passed to this server, and it takes one" in output


@pytest.mark.parametrize(
    ("is_trusted", "workers"),
    [
        pytest.param(True, "1", id="a trusted proxy"),
        pytest.param(False, "1", id="another proxy"),
        pytest.param(True, "2", id="a trusted proxy, two workers"),
        pytest.param(False, "2", id="another proxy, two workers", marks=pytest.mark.nightly),
    ],
)
def test_a_server_behind_a_proxy_answers_for_its_public_names(
    workers: str, is_trusted: bool, flock_file: Path, tmp_path: Path
) -> None:
    """Links include the prefix that the proxy strips. The client address comes from the proxy if it is trusted."""
    command = flockapi_command("serve", str(flock_file), "--port", "0", "--store", str(tmp_path / "proxied.db"))
    command += ["--workers", workers, "--allow-anonymous", "--root-path", "ai/", "--access-log"]
    command += ["--allowed-host", "Agents.example", "--allowed-host", "agents.test"]
    command += ["--forwarded-allow-ips", "127.0.0.1" if is_trusted else "192.0.2.1"]
    forwarded = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    with running(*command) as server:
        server.wait_for_line("Application startup complete", times=int(workers))
        for _ in range(6):  # so that every worker answers some
            for host in ("agents.example", "agents.test:8443", "localhost"):
                answer = httpx.get(f"{server.url}/runs/", headers={"Host": host, **forwarded})
                assert (answer.status_code, answer.json()["instance"]) == (404, "/ai/runs/")
            foreign = httpx.get(f"{server.url}/runs", headers={"Host": "evil.example", **forwarded})
            assert foreign.status_code == 421
            assert "--allowed-host" in foreign.json()["detail"]
            run = {"agent_name": "who", "async_run": True}
            accepted = httpx.post(f"{server.url}/run/flock", json=run, headers={"Host": "agents.test", **forwarded})
            assert accepted.headers["Location"].startswith("/ai/run/")
        server.stop()
    logged = {line.split(" - ")[0].split()[-1].rpartition(":")[0] for line in server.lines if '"GET /' in line}
    assert logged == {"203.0.113.7" if is_trusted else "127.0.0.1"}


def test_start_api_works_behind_a_proxy(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    options = "port=0, allowed_hosts=['agents.example'], root_path='/ai', forwarded_allow_ips='127.0.0.1'"
    options += ", custom_endpoints=[Route('/url', lambda request: Response(str(request.url)))]"
    imports = "from starlette.responses import Response\nfrom starlette.routing import Route\n"
    script.write_text(f"{imports}{FLOCK}\nif __name__ == '__main__':\n    flock.start_api({options})\n")
    headers = {"Host": "agents.example", "X-Forwarded-Proto": "https", "X-API-Key": (key := new_key())}
    with running(sys.executable, str(script), PYTHONPATH=str(ROOT), FLOCK_API_KEYS=f"ann={key}") as server:
        assert httpx.get(f"{server.url}/url", headers=headers).text == "https://agents.example/ai/url"

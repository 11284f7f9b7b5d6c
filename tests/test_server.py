"""The built-in server: several workers on one socket and one store, startup and shutdown."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flock.web.auth import new_key
from tests.support import ROOT
from tests.support.http import events_in
from tests.support.servers import Server, flockapi_command, running, workers_of

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
    assert max(at for _, at in answers) - ended_at < 2, "it takes a tenth of a second on an idle machine"


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
    is_open = True
    while is_open:
        answers = in_parallel(lambda: httpx.get(f"{server.url}/readyz", timeout=60).status_code, 8)
        is_open = 200 in answers


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


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("is_trusted", [True, False], ids=["a trusted proxy", "another proxy"])
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

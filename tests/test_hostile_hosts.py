"""Attacks on an app of ours under other servers, as docs/limits.md describes them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import ROOT
from tests.support.servers import Server, free_port, running
from tests.support.sockets import KERNEL_BYTES, connected, sent_before_refused

HOST = """
from flock.core import Flock
from flockapi import create_app

flock = Flock("host")

@flock.agent
async def double(n: int) -> int:
    return 2 * n

app = create_app(flock, store="flock.db", auth="host", body_timeout_s=0.5)
"""
JSON = "Host: 127.0.0.1\r\nContent-Type: application/json\r\n"
SERVERS = {
    "uvicorn": ["uvicorn", "--host", "127.0.0.1", "--port", "{port}", "--http", "httptools"],
    "uvicorn h11": ["uvicorn", "--host", "127.0.0.1", "--port", "{port}", "--http", "h11"],
    "hypercorn": ["hypercorn", "--bind", "127.0.0.1:{port}"],
}


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "host.py").write_text(HOST)
    command = [part.format(port=free_port()) for part in SERVERS[request.param]]
    with running(sys.executable, "-m", *command, "host:app", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}") as server:
        yield server


def test_the_limits_of_the_app_hold_under_any_server(server: Server, tmp_path: Path) -> None:
    """The attacks are a body that never ends, a table that is too wide, and a store that was removed."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"agent_name": "double", "inputs": {"n": 1}}
        assert client.post("/run/flock", json=body).json()["result"] == {"result": 2}
        with connected(server, f"POST /run/flock HTTP/1.1\r\n{JSON}Content-Length: 9\r\n\r\n{{") as slow:
            assert b" 408 " in slow.recv(100)
        table = ",".join(f"c{n}" for n in range(10_001))
        wide = client.post("/run/batch?agent_name=double", content=table, headers={"Content-Type": "text/csv"})
        assert (wide.status_code, "the maximum is 10,000" in wide.text) == (422, True)
        for path in tmp_path.glob("flock.db*"):
            path.unlink()
        assert client.post("/run/flock", json={**body, "async_run": True}).status_code == 503


@pytest.mark.parametrize("server", ["uvicorn h11", "hypercorn"], indirect=True)
def test_these_servers_limit_the_head_of_a_request(server: Server) -> None:
    with connected(server, "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n") as connection:
        assert sent_before_refused(connection, b"X-Long: " + b"x" * 65_536 + b"\r\n") < KERNEL_BYTES
    assert httpx.get(f"{server.url}/healthz").status_code == 200

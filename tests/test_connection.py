"""Clients that send without end or do not read harm only themselves, tested with real servers and sockets."""

import contextlib
import random
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flock.command.connection import MAX_HEAD_BYTES
from tests.support import WORKERS
from tests.support.servers import Server, free_port, memory_kib, running, serving
from tests.support.sockets import KERNEL_BYTES, connected, read_to_end, sent_before_refused

#: A static file of 1.1 MB.
LARGE = "/static/vendor/redoc/redoc.standalone.js"
GET = "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

FLOCK = """
import anyio
from flock.core import Flock
from flock.runs import RunContext

flock = Flock("connections")

@flock.agent
async def nap(seconds: float) -> str:
    await anyio.sleep(seconds)
    return "awake"

@flock.agent
async def length(text: str) -> int:
    return len(text)

@flock.agent(output="a: str, b: str, c: str")
async def fields(turns: int, context: RunContext) -> dict[str, str]:
    for _ in range(turns):
        for field in "abc":
            context.emit("x", field)
        await anyio.sleep(0.03)  # text that is written faster is joined
    return dict.fromkeys("abc", "x" * turns)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("connections") / "connections.py"
    path.write_text(FLOCK)
    return path


HEADS = [
    pytest.param(3 * GET.format(LARGE), id="after responses that are not read"),
    pytest.param("", id="during a wait for a run"),
]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("request_", HEADS)
def test_an_endless_head_is_not_read_during_a_response(
    request_: str, workers: int, script: Path, tmp_path: Path
) -> None:
    with serving(script, tmp_path, workers=workers) as server:
        run = {"agent_name": "nap", "inputs": {"seconds": 60}, "async_run": True}
        run_id = httpx.post(f"{server.url}/run/flock", json=run).json()["run_id"]
        before_kib = memory_kib(server)
        with connected(server, request_ or GET.format(f"/run/{run_id}?wait=60")) as connection:
            sent = sent_before_refused(connection, b"GET / HTTP/1.1\r\n" + b"X: " + b"x" * 65_536)
            grown_kib = memory_kib(server) - before_kib
        assert sent < KERNEL_BYTES
        assert grown_kib < KERNEL_BYTES // 1024


CHUNKED = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
RUN = CHUNKED.format("/run/flock")
#: The start of a request, and what a client repeats after it without end. None of it is a body that the app reads.
ENDLESS = [
    pytest.param(RUN + "1\r\n{\r\n0\r\nX: ", "x", id="one trailer"),
    pytest.param(RUN + "0\r\n", "X: x\r\n", id="trailers"),
    pytest.param(RUN + "1;", "x", id="one chunk extension"),
    pytest.param(RUN, "1;" + 100 * "x" + "\r\n \r\n", id="extensions of short chunks"),
    pytest.param(RUN, "0", id="one chunk size"),
    pytest.param(CHUNKED.format("/run/{run_id}?wait=60").replace("POST", "GET") + "1;", "x", id="during a response"),
    pytest.param(CHUNKED.format("/healthz").replace("POST", "GET") + "1;", "x", id="after a response"),
    pytest.param("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", "x", id="one header"),
    pytest.param("GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n", "X: x\r\n", id="headers"),
    pytest.param("GET /", "x", id="a path"),
    pytest.param("", "\r\n", id="empty lines"),
]


@pytest.fixture(scope="module")
def napping(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    """A server with a run that does not end, and the id of that run."""
    with serving(script, tmp_path_factory.mktemp("napping")) as server:
        run = {"agent_name": "nap", "inputs": {"seconds": 600}, "async_run": True}
        yield server, httpx.post(f"{server.url}/run/flock", json=run).json()["run_id"]


@pytest.mark.parametrize(("start", "repeated"), ENDLESS)
def test_endless_bytes_without_a_body_close_the_connection(
    start: str, repeated: str, napping: tuple[Server, str]
) -> None:
    """One connection with an endless trailer once delayed all others for 9 s, and 60 of them took 790 MB."""
    server, run_id = napping
    with connected(server, start.replace("{run_id}", run_id)) as connection:
        sent = sent_before_refused(connection, repeated.encode() * (60_000 // len(repeated)))
        assert sent < KERNEL_BYTES
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):  # the server has closed it, with bytes that it has not read
            read_to_end(connection)
    assert httpx.get(f"{server.url}/healthz").status_code == 200


@pytest.mark.parametrize(
    "start", ["", "GET /", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", RUN + "1;", RUN + "0\r\nX: "]
)
def test_too_many_bytes_without_a_body_are_answered_with_400(start: str, napping: tuple[Server, str]) -> None:
    """The client has sent one byte too many and nothing after it, so it can read the response."""
    server, _ = napping
    with connected(server, start.encode().ljust(MAX_HEAD_BYTES, b"x" if start else b"\n")) as connection:
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(b"x" if start else b"\n")
        received = read_to_end(connection)
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.endswith(b"More than 262144 bytes of this request are not its body.")


def test_a_body_in_very_short_chunks_is_not_refused(napping: tuple[Server, str]) -> None:
    """Its chunk heads are several times as long as MAX_HEAD_BYTES."""
    server, _ = napping
    body = b'{"agent_name": "length", "inputs": {"text": "%s"}}' % (b"x" * 100_000)
    chunks = b"".join(b"00000001\r\n%c\r\n" % byte for byte in body)
    with connected(server, RUN.encode() + chunks + b"0\r\nX: trailer\r\n\r\n") as connection:
        assert b'"result":100000' in connection.recv(65_536)


def test_each_request_of_a_connection_may_have_long_trailers(napping: tuple[Server, str]) -> None:
    server, _ = napping
    body = b'{"agent_name": "length", "inputs": {"text": "abc"}}'
    request = RUN.encode() + b"%x\r\n%b\r\n0\r\nX: %b\r\n\r\n" % (len(body), body, b"x" * 200_000)
    with connected(server) as connection:
        for _ in range(3):
            connection.sendall(request)
            assert b'"result":3' in connection.recv(65_536)


def test_requests_after_an_unread_response_take_no_memory(script: Path, tmp_path: Path) -> None:
    """Each of them once took a few kilobytes, so 40 connections with 200,000 requests each took 2 GB."""
    with serving(script, tmp_path) as server, contextlib.ExitStack() as stack:
        before_kib = memory_kib(server)
        for _ in range(10):
            connection = stack.enter_context(connected(server, 3 * GET.format(LARGE)))
            sent_before_refused(connection, GET.format("/healthz").encode() * 1000, patience_s=0.5)
        assert memory_kib(server) - before_kib < 10 * 1024 * 4
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_short_response_is_one_packet(script: Path, tmp_path: Path) -> None:
    with serving(script, tmp_path) as server, connected(server, "") as connection:
        for _ in range(100):
            connection.sendall(GET.format("/healthz").encode())
            head, _, body = connection.recv(65_536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert body == b'{"status":"ok"}\n'


def test_pieces_that_are_ready_in_one_turn_of_the_event_loop_are_sent_together(script: Path, tmp_path: Path) -> None:
    body, reads = '{"agent_name": "fields", "inputs": {"turns": 60}}', list[bytes]()
    head = (
        f"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\nContent-Length: {len(body)}\r\n"
    )
    with serving(script, tmp_path) as server:
        with connected(server, f"{head}Content-Type: application/json\r\n\r\n{body}") as connection:
            while not reads or b"event: run.completed" not in b"".join(reads[-2:]):
                reads.append(connection.recv(65_536))
    assert b"".join(reads).count(b"event: output.delta") == 180
    assert len(reads) < 60 + 30  # TCP joins writes at will, and splits a few at the edge of a window


def test_the_head_timeout_applies_to_each_request(script: Path, tmp_path: Path) -> None:
    """This includes a request that started to arrive during the response to another."""
    with serving(script, tmp_path) as server:
        run = '{"agent_name": "nap", "inputs": {"seconds": 0.5}}'
        head = f"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(run)}\r\n"
        with connected(server, f"{head}Content-Type: application/json\r\n\r\n{run}GET / HT") as connection:
            received = read_to_end(connection)
        assert received.startswith(b"HTTP/1.1 200")
        assert received.count(b"HTTP/1.1") == 1


def test_pipelined_requests_are_answered_in_order_however_they_are_split(script: Path, tmp_path: Path) -> None:
    """Some have a body of known length, some a chunked one with empty lines in it, and some none."""
    texts = [f"{number}\n\n" + "x" * number for number in range(60)]
    requests = []
    for number, text in enumerate(texts):
        body = b'{"agent_name": "length", "inputs": {"text": "%s"}}\r\n\r\n' % text.replace("\n", "\\n").encode()
        head = "POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        if number % 3 == 0:
            requests.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        elif number % 3 == 1:
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:20], body[20:]))
            requests.append(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\nX: trailer\r\n\r\n")
        else:
            requests.append(GET.format(f"/agents/length?number={number}").encode())
    whole = b"".join(requests) + GET.format("/healthz").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n").encode()
    cuts = random.Random(7)
    with serving(script, tmp_path) as server:
        for largest in (1, 7, 200, len(whole)):
            with connected(server) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                start = 0
                while start < len(whole):
                    end = start + cuts.randint(1, largest)
                    connection.sendall(whole[start:end])
                    start = end
                received = read_to_end(connection)
            assert received.count(b"HTTP/1.1 200 OK") == len(texts) + 1
            lengths = [
                int(length) for length in re.findall(rb'"status":"completed","result":\{"result":(\d+)\}', received)
            ]
            assert lengths == [len(text) for number, text in enumerate(texts) if number % 3 != 2]


def open_connections(server: Server, held: list[socket.socket]) -> int:
    """Return how many of *held* the server still has open, which a client that does not read cannot see."""
    port, ports = int(server.url.rpartition(":")[2]), {connection.getsockname()[1] for connection in held}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [(int(row[1].partition(":")[2], 16), int(row[2].partition(":")[2], 16)) for row in rows if row[3] == "01"]
    return sum(local == port and remote in ports for local, remote in ends)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only the kernel knows what the server has closed")
@pytest.mark.parametrize("workers", WORKERS)
def test_clients_that_do_not_read_are_disconnected(workers: int, script: Path, tmp_path: Path) -> None:
    options = ("--max-connections", "10", "--write-timeout", "1")
    with serving(script, tmp_path, *options, workers=workers) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(server, 9 * GET.format(LARGE), 4096)) for _ in range(10 * workers)]
        deadline = time.monotonic() + 30
        while open_connections(server, held):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_client_that_reads_slowly_is_not_disconnected(script: Path, tmp_path: Path) -> None:
    with serving(script, tmp_path, "--write-timeout", "0.5") as server:
        last = GET.format(LARGE).replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
        with connected(server, GET.format(LARGE) + last, 4096) as connection:
            began, received = time.monotonic(), 0
            while part := connection.recv(16_384):
                received += len(part)
                time.sleep(0.02)
        assert received > 2_000_000
        assert time.monotonic() - began > 1


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="only the kernel knows what the server has closed")
def test_a_client_that_reads_nothing_is_disconnected_even_if_its_response_is_short(
    script: Path, tmp_path: Path
) -> None:
    """This holds even if it starts another request that never ends, or sends something that is not a request."""
    short = GET.format("/openapi.yaml") * 60
    with serving(script, tmp_path, "--write-timeout", "1") as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(server, short + more, 4096)) for more in ("", "G", "no request\r\n\r\n")]
        deadline = time.monotonic() + 60
        while open_connections(server, held):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_is_cancelled_if_its_client_sends_more_and_disconnects(script: Path, tmp_path: Path) -> None:
    run = '{"agent_name": "nap", "inputs": {"seconds": 600}}'
    head = f"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(run)}\r\n"
    with serving(script, tmp_path) as server:
        with connected(server, f"{head}Content-Type: application/json\r\n\r\n{run}") as connection:
            server.wait_for_line("Application startup complete")
            deadline = time.monotonic() + 30
            while not (runs := httpx.get(f"{server.url}/runs?status=running").json()["runs"]):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            connection.sendall(b"\r\nGET /he")
        ended = httpx.get(f"{server.url}/run/{runs[0]['run_id']}?wait=30", timeout=60).json()
        assert ended["status"] == "cancelled"


def test_a_request_pipelined_after_a_chunked_one_is_not_started_if_the_connection_closes(
    script: Path, tmp_path: Path
) -> None:
    """Neither its head nor its body is taken for a part of the first request."""
    body = b'{"agent_name": "length", "inputs": {"text": "abc"}}'
    head = b"POST /run/flock HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    # More empty lines than are inspected one by one, so that the parser gets the rest in one piece.
    lines = b"1\r\n \r\n2\r\n\r\n\r\n" * 70
    first = head + b"Transfer-Encoding: chunked\r\n\r\n" + lines + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    second = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(script, tmp_path) as server:
        with connected(server, first + second) as connection:
            received = read_to_end(connection)
        assert received.count(b"HTTP/1.1 200") == 1, "the second one needs another connection"
        runs = httpx.get(f"{server.url}/runs").json()["runs"]
        assert len(runs) == received.count(b"HTTP/1.1 200")


@pytest.mark.parametrize("workers", WORKERS)
def test_a_stopping_server_does_not_wait_for_clients_that_do_not_read(
    workers: int, script: Path, tmp_path: Path
) -> None:
    with serving(script, tmp_path, workers=workers) as server, contextlib.ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(connected(server, 9 * GET.format(LARGE), 4096))
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 20, "not the 25 s that responses may take"


LATE = """
import socket, sys
import anyio
from starlette.responses import Response
from starlette.routing import Route
from flock.core import Flock

async def late(request):
    '''Answers once the server is stopping and has closed its port.'''
    print("asked", flush=True)
    while True:
        with socket.socket() as attempt:
            if attempt.connect_ex(request.scope["server"]):
                return Response(bytes(64 * 1024 * 1024))
        await anyio.sleep(0.1)

Flock("late").start_api(port=int(sys.argv[1]), custom_endpoints=[Route("/late", late)])
"""


def test_an_unread_response_that_starts_after_the_stop_does_not_delay_it(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    with running(sys.executable, str(tmp_path / "late.py"), str(free_port())) as server:
        with connected(server, GET.format("/late"), 4096) as connection:
            server.wait_for_line("asked")
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 20, "not the 25 s that responses may take"
            assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_stopping_server_sends_the_whole_response_to_a_client_that_reads(script: Path, tmp_path: Path) -> None:
    with serving(script, tmp_path) as server:
        with connected(server, 2 * GET.format(LARGE), 65_536) as connection:
            assert connection.recv(1024).startswith(b"HTTP/1.1 200")
            server.process.terminate()
            server.wait_for_line("Shutting down")
            received = 0
            while part := connection.recv(65_536):
                received += len(part)
                time.sleep(0.05)
        assert received > 1_000_000
        assert server.process.wait(30) in (0, -15)


# A busy event loop

SPIN = """
import time
from pathlib import Path
import anyio
from flock.core import Flock

flock = Flock("busy")

@flock.agent
async def spin(folder: str) -> int:
    hold, held, begin, end = (Path(folder) / name for name in ("hold", "held", "begin", "end"))
    while not hold.exists():
        await anyio.sleep(0.01)
    held.touch()
    while not begin.exists():  # the event loop does nothing else
        time.sleep(0.01)
    turns = 0
    while not end.exists():
        turns += 1
        time.sleep(0.02)
        await anyio.sleep(0)
    return turns
"""


def test_a_burst_of_connections_does_not_delay_other_clients(tmp_path: Path) -> None:
    """The event loop accepts one connection of each socket per turn, so a burst of 400 once took 400 turns."""
    (tmp_path / "busy.py").write_text(SPIN)
    with serving(tmp_path / "busy.py", tmp_path) as server, contextlib.ExitStack() as burst:
        body = {"agent_name": "spin", "inputs": {"folder": str(tmp_path)}, "async_run": True}
        run_id = httpx.post(f"{server.url}/run/flock", json=body).json()["run_id"]
        (tmp_path / "hold").touch()
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        for _ in range(400):
            burst.enter_context(connected(server))
        with connected(server, "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n") as other:
            (tmp_path / "begin").touch()
            assert read_to_end(other).startswith(b"HTTP/1.1 200")
            (tmp_path / "end").touch()
        turns = httpx.get(f"{server.url}/run/{run_id}?wait=60").json()["result"]["result"]
    assert turns < 200

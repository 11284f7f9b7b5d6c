"""``flockapi serve`` exports traces to a real receiver of OTLP over HTTP; see ``docs/observability.md``."""

import contextlib
import gzip
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from flock.runs import new_id
from flock.testing import FakeModel, ModelRequest, Reply
from tests.support import PATIENCE_S
from tests.support.servers import flockapi_command, running

HOST_TRACE, HOST_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{HOST_TRACE}-{HOST_SPAN}-01"}

SCRIPT = """
import os
from flock.core import Flock, FlockFactory
from flock.runs import RunContext

flock = Flock("shop", model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent("clerk", input="order: str", output="answer: str"))

@flock.agent
async def sell(order: str, context: RunContext) -> str:
    first = await context.run_agent("clerk", {"order": order})
    context.progress(1)
    second = await context.run_agent("clerk", {"order": order + first["answer"]})
    return second["answer"]
"""


class Receiver:
    """A collector that keeps the spans that it gets. It does not respond while ``may_answer`` is not set."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._came = threading.Condition()

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        with self._came:
            for of_resource in request.resource_spans:
                self.services |= {
                    each.value.string_value for each in of_resource.resource.attributes if each.key == "service.name"
                }
                self.spans += [span for scope in of_resource.scope_spans for span in scope.spans]
            self._came.notify_all()

    def wait_for(self, name: str, times: int = 1) -> list[Span]:
        def found() -> list[Span]:
            return [span for span in self.spans if span.name == name]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= times, PATIENCE_S), [span.name for span in self.spans]
            return found()


@contextlib.contextmanager
def receiving() -> Iterator[tuple[Receiver, str]]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.may_answer.wait()
            receiver.take(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            with contextlib.suppress(OSError):  # the server has given up
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        receiver.may_answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "shop.py"
    script.write_text(SCRIPT)
    return flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"))


def env_of(receiver_url: str, model_url: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver_url,
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OPENAI_BASE_URL": model_url,
        "OPENAI_API_KEY": "key",
    }


def traceparent_of(span: Span) -> str:
    return f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"


def test_a_trace_survives_a_kill(command: list[str]) -> None:
    """From the host to the model and back: the second execution belongs to the same trace, and links to the first."""
    killed, may_reply = threading.Event(), threading.Event()

    def reply(request: ModelRequest) -> Reply:
        if "A7!" in request.text and not killed.is_set():
            may_reply.wait(PATIENCE_S)
        return Reply({"answer": "!"})

    model = FakeModel({"clerk": reply})
    with receiving() as (receiver, url), model.serve() as model_url:
        env = env_of(url, model_url)
        with running(*command, **env) as server:
            body = {"agent_name": "sell", "inputs": {"order": "A7"}, "async_run": True}
            run = httpx.post(f"{server.url}/run/flock", json=body, headers=HEADERS).json()
            (request,) = receiver.wait_for("POST /run/flock")
            (first_chat,) = receiver.wait_for("chat gpt-4o")
            (of_agent,) = receiver.wait_for("invoke_agent clerk")  # they may be exported one after the other
            deadline = time.monotonic() + PATIENCE_S
            while len(model.requests) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait()
        killed.set()
        may_reply.set()
        with running(*command, **env) as server:
            ended = httpx.get(f"{server.url}/run/{run['run_id']}", params={"wait": 60}, timeout=PATIENCE_S).json()
            server.stop()
        assert ended["result"] == {"result": "!"}
        (of_run,) = receiver.wait_for("run sell")
    assert {span.trace_id.hex() for span in receiver.spans} == {HOST_TRACE}
    assert request.parent_span_id.hex() == HOST_SPAN
    assert run["traceparent"] == ended["traceparent"] == traceparent_of(request)
    assert of_run.parent_span_id == request.span_id
    # The first execution was killed, so its span never ended. But the call that ended is below it.
    assert of_agent.span_id == first_chat.parent_span_id
    (link,) = of_run.links
    assert link.trace_id.hex() == HOST_TRACE
    assert link.span_id not in {span.span_id for span in receiver.spans}
    # The call that has finished was not made again.
    chats = receiver.wait_for("chat gpt-4o", 2)
    assert [request.headers["traceparent"] for request in model.requests][:1] == [traceparent_of(chats[0])]
    assert model.requests[-1].headers["traceparent"] == traceparent_of(chats[1])
    assert len(model.requests) == 3
    assert not any(span.status.code == Status.STATUS_CODE_ERROR for span in receiver.spans)
    assert receiver.services == {"shop"}


def test_a_trace_survives_a_kill_of_a_worker(
    temporal_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next worker continues it, and links to the execution that was killed after a heartbeat."""
    pytest.importorskip("temporalio")
    from tests.test_temporal import working

    may_reply, killed = threading.Event(), threading.Event()

    def reply(request: ModelRequest) -> Reply:
        if "A7!" in request.text and not killed.is_set():
            may_reply.wait(PATIENCE_S)
        return Reply({"answer": "!"})

    script = tmp_path / "shop.py"
    script.write_text(SCRIPT.replace('"shop"', repr(f"shop {new_id()}")))
    model = FakeModel({"clerk": reply})
    serve = flockapi_command("serve", str(script), "--port", "0", "--temporal", temporal_address)
    with receiving() as (receiver, url), model.serve() as model_url:
        for name, value in env_of(url, model_url).items():
            monkeypatch.setenv(name, value)
        with running(*serve) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
            with working(script, temporal_address) as worker:
                body = {"agent_name": "sell", "inputs": {"order": "A7"}, "async_run": True}
                path = f"/run/{client.post('/run/flock', json=body, headers=HEADERS).json()['run_id']}"
                deadline = time.monotonic() + PATIENCE_S
                while client.get(path).json()["progress"] is None:  # it comes with the heartbeat
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                (first_chat,) = receiver.wait_for("chat gpt-4o")
                (of_tool,) = receiver.wait_for("invoke_agent clerk")  # they may be exported one after the other
                worker.kill()
                worker.wait()
            killed.set()
            may_reply.set()
            with working(script, temporal_address):
                assert client.get(path, params={"wait": 60}).json()["result"] == {"result": "!"}
                (of_run,) = receiver.wait_for("run sell")
        (request,) = receiver.wait_for("POST /run/flock")
    assert {span.trace_id.hex() for span in receiver.spans} == {HOST_TRACE}
    assert (request.parent_span_id.hex(), of_run.parent_span_id) == (HOST_SPAN, request.span_id)
    (link,) = of_run.links
    assert link.span_id not in {span.span_id for span in receiver.spans}, "that of the first execution never ended"
    assert of_tool.span_id == first_chat.parent_span_id
    assert len(receiver.wait_for("chat gpt-4o", 2)) == 2, "the call that has finished was not made again"


def test_a_collector_that_does_not_respond_delays_neither_runs_nor_the_end_for_long(command: list[str]) -> None:
    with receiving() as (receiver, url), FakeModel({"clerk": {"answer": "!"}}).serve() as model_url:
        receiver.may_answer.clear()
        with running(*command, **env_of(url, model_url)) as server:
            for _ in range(20):
                body = {"agent_name": "sell", "inputs": {"order": "A7"}}
                run = httpx.post(f"{server.url}/run/flock", json=body, headers=HEADERS, timeout=PATIENCE_S).json()
                assert run["status"] == "completed"
            started_at = time.monotonic()
            server.stop()
            assert time.monotonic() - started_at < 15


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "carrier_pigeon"}, "no package has the exporter 'carrier_pigeon'"),
        ({"OTEL_TRACES_EXPORTER": "otlp, carrier_pigeon"}, "no package has the exporter 'carrier_pigeon'"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"}, "ValueError"),
    ],
    ids=["unknown", "one of several", "invalid"],
)
def test_an_exporter_that_cannot_be_set_up_is_a_warning(
    variables: dict[str, str], words: str, command: list[str]
) -> None:
    with running(*command, OPENAI_API_KEY="key", **variables) as server:
        server.wait_for_line("No traces are exported")
        assert any(words in line for line in server.lines)


def test_traces_go_to_several_exporters(command: list[str]) -> None:
    with receiving() as (receiver, url), FakeModel({"clerk": {"answer": "!"}}).serve() as model_url:
        with running(*command, **env_of(url, model_url), OTEL_TRACES_EXPORTER="console, otlp,none") as server:
            body = {"agent_name": "clerk", "inputs": {"order": "A7"}}
            assert httpx.post(f"{server.url}/run/flock", json=body, timeout=PATIENCE_S).json()["status"] == "completed"
            receiver.wait_for("POST /run/flock")
            server.wait_for_line('"name": "POST /run/flock"')


def test_traces_are_exported_by_each_worker(command: list[str]) -> None:
    with receiving() as (receiver, url), FakeModel({"clerk": {"answer": "!"}}).serve() as model_url:
        with running(*command, "--workers", "2", **env_of(url, model_url)) as server:
            server.wait_for_line("Application startup complete", times=2)
            body = {"agent_name": "clerk", "inputs": {"order": "A7"}}
            assert httpx.post(f"{server.url}/run/flock", json=body, timeout=PATIENCE_S).json()["status"] == "completed"
            receiver.wait_for("POST /run/flock")

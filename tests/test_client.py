"""The client package, against real servers that are killed, restarted and full."""

import asyncio
import contextlib
import functools
import gzip
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from flock.client import APIError, AsyncFlockClient, FlockClient, StreamedOutput
from flock.core import Flock
from flock.errors import Conflict, RunFailed
from flock.runs import RunStatus
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.flocks import Approval, Summary, sample_flock
from tests.support.servers import Server, flockapi_command, free_port, running, serving

AGENTS = '''
import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio

from flock.core import Flock
from flock.runs import RunContext

flock = Flock("shop")


@flock.agent
def double(n: int) -> int:
    return 2 * n


@flock.agent
async def story(words: int, gate: str) -> AsyncIterator[str]:
    """Writes half of its words, waits for a file, and writes the rest."""
    for number in range(words):
        yield f"word {number}\\u2028 "
        if number == words // 2:
            while not Path(gate).exists():
                await anyio.sleep(0.01)


@flock.agent
async def ask_beside(gate: str, context: RunContext) -> bool:
    """Asks, and meanwhile waits for a file in a call."""
    async def wait() -> None:
        while not Path(gate).exists():
            await anyio.sleep(0.01)

    approved, _ = await asyncio.gather(context.ask("Now?", bool), context.call(wait))
    return approved


@flock.agent
async def refund(amount: float, context: RunContext) -> str:
    approved = await context.ask(f"Refund {amount} €?", bool)
    note = await context.receive("note", str)
    return f"{approved}: {note}"
'''


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "agents.py").write_text(AGENTS)
    return tmp_path / "agents.py"


@pytest.fixture
def server(script: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(script, tmp_path) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[FlockClient]:
    with FlockClient(server.url) as client:
        yield client


def local(**options: Any) -> AsyncFlockClient:
    return AsyncFlockClient("http://here", transport=httpx.ASGITransport(create_app(sample_flock(), **options)))


# Runs


class Sum(msgspec.Struct):
    result: int


def test_a_run_returns_its_result(client: FlockClient) -> None:
    assert client.run("double", {"n": 4}) == {"result": 8}
    assert client.run("double", {"n": 4}, result_type=Sum) == Sum(result=8)
    assert {agent["name"] for agent in client.agents()} == {"double", "story", "refund", "ask_beside"}


async def test_a_result_has_the_type_of_the_caller() -> None:
    async with local() as client:
        summary = await client.run("summarise", {"text": "a b"}, result_type=Summary)
        assert summary == {"words": 2, "shout": "A B"}
        with pytest.raises(msgspec.ValidationError, match="Expected `int`"):
            await client.run("summarise", {"text": "a"}, result_type=dict[str, int])


async def test_a_run_that_fails_raises_its_error() -> None:
    async with local() as client:
        with pytest.raises(RunFailed, match="tea is more than I can do") as failed:
            await client.run("refuse", {"text": "tea"})
        assert failed.value.error_type == "agent_error"


async def test_a_refused_request_says_what_is_wrong() -> None:
    async with local() as client:
        with pytest.raises(APIError, match=r"'b'|/inputs/a.*\(HTTP 422\)") as refused:
            await client.run("add", {"a": "x"})
        assert refused.value.status == 422
        assert [error.pointer for error in refused.value.errors] == ["/inputs/a"]
        assert refused.value.request_id
        with pytest.raises(APIError, match="Did you mean 'add'"):
            await client.run("ad", {"a": 1})


async def test_the_same_key_is_the_same_run() -> None:
    async with local() as client:
        first, again = [await client.submit("add", {"a": 1}, idempotency_key="k") for _ in range(2)]
        assert first.run_id == again.run_id


@pytest.mark.parametrize("is_async", [False, True])
async def test_questions_are_answered_by_a_function(is_async: bool) -> None:
    async def later(question: Any) -> Approval:
        return Approval(approved=True)

    def now(question: Any) -> Approval:
        return Approval(approved=False, reason=question.question)

    async with local() as client:
        result = await client.run("approve", {"text": "tea"}, on_question=later if is_async else now)
        assert result == {"result": "sent" if is_async else "kept: Send tea?"}


def test_the_old_name_of_the_function_that_answers_is_warned_of_in_the_line_that_has_it(client: FlockClient) -> None:
    async def in_loop() -> Any:
        options: dict[str, Any] = {"answer": lambda question: Approval(approved=True)}
        async with local() as client:
            return await client.run("approve", {"text": "tea"}, **options)

    options: dict[str, Any] = {"answer": lambda question: True}

    with pytest.warns(DeprecationWarning, match=r"answer= is called on_question= now") as warned:
        found = [anyio.run(in_loop), client.run("ask_beside", {"gate": __file__}, **options)]
    assert found == [{"result": "sent"}, {"result": True}]
    assert [each.filename for each in warned] == [__file__] * 2


async def test_a_run_that_waits_for_nobody_is_a_conflict() -> None:
    async with local() as client:
        with pytest.raises(Conflict, match=r"waits for an answer: 'Send tea\?'\. Pass on_question="):
            await client.run("approve", {"text": "tea"})


def test_an_inbox_is_read_and_answered(client: FlockClient) -> None:
    runs = [client.submit("refund", {"amount": amount}) for amount in (1, 2, 3)]
    for run in runs:
        assert client.wait(run.run_id).status is RunStatus.WAITING
    asked = list(client.questions(agent_name="refund"))
    assert {question.run_id for question in asked} == {run.run_id for run in runs}
    for question in asked:
        client.answer(question.run_id, question.call_id, True)
        client.send(question.run_id, "note", "done")
    results = [client.wait(run.run_id).result for run in runs]
    assert results == [{"result": "True: done"}] * 3


def test_a_question_beside_a_call_is_answered_when_the_run_does_nothing_else(server: Server, tmp_path: Path) -> None:
    results = list[Any]()

    def run() -> None:
        with FlockClient(server.url) as client:
            results.append(
                client.run("ask_beside", {"gate": str(tmp_path / "gate")}, on_question=lambda question: True)
            )

    runner = threading.Thread(target=run)
    runner.start()
    with FlockClient(server.url) as client:
        deadline = time.monotonic() + PATIENCE_S
        while not list(client.questions()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    (tmp_path / "gate").touch()
    runner.join(PATIENCE_S)
    assert results == [{"result": True}]


async def test_a_page_of_questions_is_found_below_a_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    app = Starlette(routes=[Mount("/ai", create_app(sample_flock()))])
    async with AsyncFlockClient("http://here/ai", transport=httpx.ASGITransport(app)) as client:
        for number in range(3):
            await client.wait((await client.submit("approve", {"text": str(number)})).run_id)
        assert len([question async for question in client.questions(limit=1)]) == 3


async def test_a_run_is_cancelled_and_retried() -> None:
    async with local() as client:
        run = await client.submit("approve", {"text": "tea"})
        await client.wait(run.run_id)
        assert (await client.cancel(run.run_id)).status is RunStatus.CANCELLED
        assert (await client.retry(run.run_id, calls="again")).attempt == 2


# Servers that are gone, full, or something else


def refusing(*responses: Response) -> tuple[AsyncFlockClient, list[Mapping[str, str]]]:
    """A client of a server that gives *responses*, and then accepts; and the headers of its requests."""
    left, seen = list(responses), list[Mapping[str, str]]()
    app = create_app(sample_flock())

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] == "/run/flock":
            seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
            if left:
                return await left.pop(0)(scope, receive, send)
        await app(scope, receive, send)

    return AsyncFlockClient("http://here", transport=httpx.ASGITransport(answer), retry_for_s=20), seen


async def test_a_full_server_is_asked_again_when_it_says() -> None:
    full = [Response(status_code=status, headers={"Retry-After": "1"}) for status in (429, 503)]
    client, seen = refusing(*full, PlainTextResponse("<html>Bad gateway", 502))
    async with client:
        started = time.monotonic()
        assert await client.run("add", {"a": 1}) == {"result": 3}
        assert time.monotonic() - started >= 2
    assert len(seen) == 4
    assert len({headers["idempotency-key"] for headers in seen}) == 1


async def test_a_server_that_allows_no_wait_is_asked_with_pauses() -> None:
    flock, asked = Flock("naps"), 0

    @flock.agent
    async def nap(n: int) -> int:
        await anyio.sleep(0.5)
        return n

    app = create_app(flock, max_wait_s=0)

    async def counting(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += scope.get("method") == "GET"
        await app(scope, receive, send)

    async with AsyncFlockClient("http://here", transport=httpx.ASGITransport(counting)) as client:
        run = await client.submit("nap", {"n": 1})
        assert (await client.wait(run.run_id)).result == {"result": 1}
        batch = await client.run_batch("nap", [{"n": 2}])
        assert (await client.wait_batch(batch.batch_id)).status == "completed"
    assert asked <= 10


async def test_equal_requests_at_the_same_time_get_the_same_run() -> None:
    """The server answers 409 while the first one is being accepted."""
    async with local() as client:
        order = functools.partial(client.submit, "add", {"a": 1}, idempotency_key="k")
        assert len({run.run_id for run in await asyncio.gather(*(order() for _ in range(5)))}) == 1
    in_use = {"type": "urn:flockapi:problem:idempotency-key-in-use", "detail": "wait"}
    client, seen = refusing(JSONResponse(in_use, 409), JSONResponse({**in_use, "type": "other"}, 409))
    async with client:
        with pytest.raises(APIError, match="HTTP 409"):
            await client.run("add", {"a": 1})
    assert len(seen) == 2


async def test_a_pause_beyond_the_end_of_the_tries_is_an_error_at_once() -> None:
    client, seen = refusing(Response(status_code=429, headers={"Retry-After": "86400"}))
    async with client:
        with pytest.raises(APIError, match="HTTP 429"):
            await client.run("add", {"a": 1})
    assert len(seen) == 1


async def test_a_wrong_url_is_an_error_at_once() -> None:
    async with AsyncFlockClient("localhost:8344") as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.agents()


@contextlib.asynccontextmanager
async def breaking(*bodies: bytes) -> AsyncIterator[tuple[AsyncFlockClient, list[bytes]]]:
    """A client of a server that closes the connection after a part of each response, and its requests so far."""
    left, heads = list(bodies), list[bytes]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        body = left.pop(0)
        length = len(body) + (99 if left else 0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (length, body))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with AsyncFlockClient(f"http://127.0.0.1:{port}") as client:
            yield client, heads


async def test_a_response_that_breaks_off_is_asked_for_again() -> None:
    async with breaking(b'{"agents": [', b'{"agents": [{"name": "add"}]}') as (client, heads):
        assert await client.agents() == [{"name": "add"}]
    assert len(heads) == 2


async def test_a_retry_whose_response_is_lost_is_not_sent_again() -> None:
    async with breaking(b"{", b"{}") as (client, heads):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.retry("r")
    assert len(heads) == 1


def test_a_callback_that_uses_its_own_client_is_an_error(client: FlockClient) -> None:
    with pytest.raises(RuntimeError, match="cannot use the same client"):
        client.run("refund", {"amount": 1}, on_question=lambda question: client.agents())


async def test_a_server_that_stays_full_is_given_up() -> None:
    app = Starlette(routes=[Route("/run/flock", lambda request: PlainTextResponse("busy", 503), methods=["POST"])])
    async with AsyncFlockClient("http://here", transport=httpx.ASGITransport(app), retry_for_s=0.3) as client:
        with pytest.raises(APIError, match=r"busy \(HTTP 503\)"):
            await client.run("add", {"a": 1})


async def test_a_server_that_cannot_be_reached_is_given_up() -> None:
    async with AsyncFlockClient(f"http://127.0.0.1:{free_port()}", retry_for_s=0.3) as client:
        with pytest.raises(httpx.ConnectError):
            await client.run("add", {"a": 1})


def test_a_run_survives_a_kill_of_the_server(script: Path, tmp_path: Path) -> None:
    """Its reader sees each character once."""
    port, gate = free_port(), tmp_path / "gate"
    command = flockapi_command("serve", str(script), "--port", str(port), "--store", str(tmp_path / "flock.db"))
    output, texts, is_half = StreamedOutput(), list[str](), threading.Event()

    def follow() -> None:
        with FlockClient(f"http://127.0.0.1:{port}") as client:
            run = client.submit("story", {"words": 10, "gate": str(gate)})
            for event in client.events(run.run_id):
                output.add(event)
                texts.append(output.fields.get("result", ""))
                if "word 5" in texts[-1]:
                    is_half.set()
            assert client.run("double", {"n": 1}) == {"result": 2}

    reader = threading.Thread(target=follow)
    with running(*command) as server:
        reader.start()
        assert is_half.wait(30)
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    gate.touch()
    with running(*command):
        reader.join(60)
        assert not reader.is_alive()
    whole = "".join(f"word {number}\u2028 " for number in range(10))
    assert texts[-1] == whole
    assert all(whole.startswith(text) for text in texts)


@pytest.fixture
def raising_ctrl_c() -> Iterator[None]:
    """Ctrl+C raises KeyboardInterrupt, as in a program without a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("raising_ctrl_c")
def test_ctrl_c_stops_to_wait_and_the_run_goes_on(client: FlockClient, tmp_path: Path) -> None:
    run = client.submit("story", {"words": 2, "gate": str(tmp_path / "gate")})
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        client.wait(run.run_id)
    (tmp_path / "gate").touch()
    assert client.wait(run.run_id).status is RunStatus.COMPLETED


@pytest.mark.usefixtures("raising_ctrl_c")
def test_ctrl_c_ends_a_stream(client: FlockClient, tmp_path: Path) -> None:
    run = client.submit("story", {"words": 2, "gate": str(tmp_path / "gate")})
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.3, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        list(client.events(run.run_id))
    (tmp_path / "gate").touch()
    assert client.wait(run.run_id).status is RunStatus.COMPLETED


def test_the_events_of_a_run_are_read_in_part(client: FlockClient, tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    run = client.submit("story", {"words": 3, "gate": str(tmp_path / "gate")})
    client.wait(run.run_id)
    names = [event.name for event in client.events(run.run_id)]
    assert (names[0], names[-1]) == ("run.started", "run.completed")
    with contextlib.closing(client.events(run.run_id)) as events:  # type: ignore[type-var]
        first = next(events)
    assert first.id is not None
    rest = [event.name for event in client.events(run.run_id, after=first.id)]
    assert [name for name in rest if name != "output.snapshot"] == [
        name for name in names[1:] if name != "output.snapshot"
    ]
    last = list(client.events(run.run_id))[-1]
    assert last.id is not None
    assert list(client.events(run.run_id, after=last.id)) == []


async def test_an_event_loop_may_use_the_client_without_async(server: Server) -> None:
    """As in a notebook."""
    with FlockClient(server.url) as client:
        assert client.run("double", {"n": 1}) == {"result": 2}


async def test_a_cancelled_wait_leaves_the_run_alone(server: Server, tmp_path: Path) -> None:
    async with AsyncFlockClient(server.url) as client:
        run = await client.submit("story", {"words": 2, "gate": str(tmp_path / "gate")})
        with anyio.move_on_after(0.2) as scope:
            await client.wait(run.run_id)
        assert scope.cancelled_caught
        (tmp_path / "gate").touch()
        assert (await client.wait(run.run_id)).status is RunStatus.COMPLETED


# Tables


@pytest.mark.parametrize("name", ["rows.csv", "rows.ndjson", "rows.jsonl.gz"])
def test_a_file_is_uploaded_and_its_results_downloaded(client: FlockClient, tmp_path: Path, name: str) -> None:
    count, sent, got = 2000, list[tuple[int, int]](), list[int]()
    rows = ["n", *map(str, range(count))] if name == "rows.csv" else [f'{{"n": {n}}}' for n in range(count)]
    data = "\n".join(rows).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    batch = client.run_batch("double", path, max_workers=50, on_progress=lambda *bytes_: sent.append(bytes_))
    assert sent[-1] == (path.stat().st_size, path.stat().st_size)
    states = list[int]()
    batch = client.wait_batch(batch.batch_id, on_progress=lambda batch: states.append(batch.completed_items))
    assert (batch.status, batch.completed_items, states[-1]) == (RunStatus.COMPLETED, count, count)
    client.download(batch.batch_id, tmp_path / "out.ndjson", on_progress=got.append)
    lines = (tmp_path / "out.ndjson").read_bytes().splitlines()
    assert [msgspec.json.decode(line)["result"] for line in lines] == [{"result": 2 * n} for n in range(count)]
    assert got[-1] == (tmp_path / "out.ndjson").stat().st_size
    client.download(batch.batch_id, tmp_path / "out.csv", status="completed", usage=True)
    assert (tmp_path / "out.csv").read_text().startswith("n,result,")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.csv", "out.ndjson"]


def test_mappings_are_uploaded(client: FlockClient) -> None:
    batch = client.run_batch("double", ({"m": n} for n in range(3)), input_mapping={"m": "n"}, parallel=False)
    assert client.wait_batch(batch.batch_id).completed_items == 3


def test_a_batch_is_cancelled_and_retried(client: FlockClient, tmp_path: Path) -> None:
    row = {"words": 2, "gate": str(tmp_path / "gate")}
    batch = client.run_batch("story", [row] * 3)
    client.cancel_batch(batch.batch_id)
    assert client.wait_batch(batch.batch_id).cancelled_items == 3
    (tmp_path / "gate").touch()
    client.retry_batch(batch.batch_id, only="cancelled")
    assert client.wait_batch(batch.batch_id).completed_items == 3


async def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    async with local() as client:
        with pytest.raises(ValueError, match=r"'rows\.xml' must end in \.json, .*\.csv, .*, optionally"):
            await client.run_batch("add", tmp_path / "rows.xml")
        with pytest.raises(ValueError, match=r"'out\.xml' must end in \.json, .*\.csv, "):
            await client.download("b", tmp_path / "out.xml")


async def test_a_download_that_breaks_is_done_again(tmp_path: Path) -> None:
    """A file that exists is complete."""
    async with breaking(b"abc", b"abcdef") as (client, heads):
        await client.download("b", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "abcdef"
    assert len(heads) == 2

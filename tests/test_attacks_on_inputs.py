"""Hostile bodies: no file is read for them, the validated value is what runs, and responses reveal no secrets."""

import json
import os
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import anyio.abc
import httpx
import pytest

from flock.core import Flock
from flock.testing import Failure, FakeModel
from flock.web.auth import new_key
from flockapi import create_app
from tests.support.flocks import sample_flock
from tests.support.http import wait_for
from tests.support.sockets import socket_server

pytestmark = pytest.mark.anyio


async def post(client: httpx.AsyncClient, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    return await client.post(path, content=content, headers={"Content-Type": "application/json", **headers})


# Files and addresses


@pytest.mark.parametrize("member", ["batch_inputs", "write_to_csv"])
async def test_no_file_is_read_and_no_url_is_fetched(member: str, client: httpx.AsyncClient, tmp_path: Path) -> None:
    """The response is byte for byte the same, whether the file or address exists or not."""
    (tmp_path / "there.csv").write_text("a\n4711\n")
    (tmp_path / "link.csv").symlink_to(tmp_path / "there.csv")

    async def serve(stream: anyio.abc.SocketStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\na\n4711\n")

    async with socket_server(serve) as (url, connections):
        locations = [
            *("there.csv", "link.csv", f"../{tmp_path.name}/there.csv", str(tmp_path / "there.csv")),
            *("missing.csv", "../missing.csv", "/etc/passwd", "/proc/self/environ", "/", "", "-", "a\0b", "~/x"),
            *((tmp_path / "there.csv").as_uri(), url, f"{url}/there.csv", "ftp://127.0.0.1/x", "\\\\server\\x"),
        ]
        answers = set()
        for location in locations:
            body = {"agent_name": "add", "batch_inputs": [{"a": 1}], member: location}
            answer = await post(client, "/run/batch", body, **{"X-Request-ID": "same"})
            assert (answer.status_code, [e["pointer"] for e in answer.json()["errors"]]) == (422, [f"/{member}"])
            answers.add(answer.text)
    assert len(answers) == 1
    assert "4711" not in answers.pop()
    assert connections == []
    assert sorted(name for name in os.listdir() if name.endswith(".csv")) == ["link.csv", "there.csv"]
    assert (tmp_path / "there.csv").read_text() == "a\n4711\n"


# Numbers

NUMBERS = {
    "10**5000": "1" + "0" * 5000,
    "-10**5000": "-1" + "0" * 5000,
    "10**4290": "1" + "0" * 4290,
    "2**64": str(2**64),
    "1e400": "1e400",
    "-1e400": "-1e400",
    "1e-400": "1e-400",
    "an exponent of 9 digits": "1E+999999999",
    "a fraction of 5000 digits": "0." + "7" * 5000,
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("field", ["integer", "number", "anything", "decimal", "duration", "either", "integers"])
@pytest.mark.slow
async def test_numbers_of_any_size_are_answered(
    field: str, number: str, flock: Flock, client: httpx.AsyncClient
) -> None:
    """The number is refused with its pointer, or it runs: as an input, in an item, in a hand-off, and in a list."""

    @flock.agent(output="value: Any", next_agent="anything")
    async def first(
        integer: int = 0,
        number: float = 0,
        anything: Any = None,
        decimal: Decimal = Decimal(0),
        duration: timedelta = timedelta(0),
        either: int | str = 0,
        integers: list[int] | None = None,
    ) -> Any:
        return {"value": [integer, number, anything, decimal, duration, either, integers]}

    inputs = f'{{"{field}": {f"[{number}]" if field == "integers" else number}}}'
    run = await post(client, "/run/flock", f'{{"agent_name": "first", "inputs": {inputs}}}')
    batch = await post(client, "/run/batch", f'{{"agent_name": "first", "batch_inputs": [{inputs}]}}')
    if run.status_code == 422:
        assert run.json()["errors"][0]["pointer"].startswith(f"/inputs/{field}")
        assert batch.json()["errors"][0]["pointer"].startswith(f"/batch_inputs/0/{field}")
        return
    assert (run.status_code, run.json()["status"], run.json()["error"]) == (200, "completed", None)
    assert (await wait_for(client, batch.headers["Location"]))["status"] == "completed"
    assert (await client.get("/runs?include=inputs,result")).status_code == 200


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
async def test_option_numbers_of_any_size_are_answered(number: str, client: httpx.AsyncClient) -> None:
    run = await post(client, "/run/flock", f'{{"agent_name": "add", "inputs": {{"a": 1}}, "timeout_s": {number}}}')
    assert run.status_code in (200, 422)
    items = f'{{"agent_name": "add", "batch_inputs": [{{"a": 1}}], "max_workers": {number}}}'
    assert (await post(client, "/run/batch", items)).status_code == 422


# Names


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ('{"a": 1, "a": 2}', 2),
        ('{"a": 1, "\\u0061": 2}', 2),
        ('{"a": 2, "a": "x"}', None),
        ('{"a": "x", "a": 2}', None),
        ('{"a": 1, "b": 1, "a": 2}', 2),
        ('{"current_agent": "x", "a": 2}', None),
    ],
)
async def test_the_last_of_duplicate_names_counts(
    inputs: str, expected: int | None, flock: Flock, client: httpx.AsyncClient
) -> None:
    """The value that was validated is what runs, in the first agent, in the next and in an item. Or nothing runs."""
    seen: list[int] = []

    @flock.agent(output="c: int", next_agent="second")
    def first(a: int, b: int = 0) -> dict[str, int]:
        seen.append(a)
        return {"c": b}

    @flock.agent
    def second(a: int) -> int:
        seen.append(a)
        return a

    body = f'{{"agent_name": "explode", "inputs": {{}}, "inputs": {inputs}, "agent_name": "first"}}'
    run = await post(client, "/run/flock", body)
    if expected is None:
        assert (run.status_code, seen) == (422, [])
    else:
        assert (run.json()["result"], seen) == ({"result": expected}, [expected, expected])
    seen.clear()
    batch = await post(client, "/run/batch", f'{{"agent_name": "first", "batch_inputs": [{inputs}]}}')
    if batch.status_code == 202:
        await wait_for(client, batch.headers["Location"])
        assert set(seen) == {2}
    else:
        assert (batch.status_code, expected, seen) == (422, None, [])


@pytest.mark.parametrize(
    "name", ["current_agent", "agent_name", "next_agent", "flock.current_agent", "run_id", "context", "__class__"]
)
async def test_inputs_cannot_choose_the_agent(name: str, flock: Flock, client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1, name: "explode"}}
    refused = await post(client, "/run/flock", body)
    assert (refused.status_code, [e["pointer"] for e in refused.json()["errors"]]) == (422, [f"/inputs/{name}"])
    items = {"agent_name": "add", "batch_inputs": [{"a": 1}], "static_inputs": {name: "explode"}}
    assert (await post(client, "/run/batch", items)).status_code == 422
    assert (await client.get("/runs")).json()["runs"] == []

    @flock.agent(output="next_agent: str, current_agent: str")
    def echo(next_agent: str, current_agent: str) -> dict[str, str]:
        return {"next_agent": next_agent, "current_agent": current_agent}

    inputs = {"next_agent": "explode", "current_agent": "explode"}
    run = (await post(client, "/run/flock", {"agent_name": "echo", "inputs": inputs})).json()
    assert (run["result"], [step["agent_name"] for step in run["steps"]]) == (inputs, ["echo"]), "they are only data"


# What responses must not reveal


def texts_of(*names: str) -> str:
    return b"".join(Path(name).read_bytes() for name in names).decode("latin-1")


async def test_server_secrets_are_in_no_response_and_no_record(
    monkeypatch: pytest.MonkeyPatch, model: FakeModel, tmp_path: Path
) -> None:
    """The secrets are keys of the environment, texts of exceptions, paths, and messages of a provider."""
    api_key, model_key = new_key(), "sk-test-key-of-the-tests"
    monkeypatch.setenv("FLOCK_API_KEYS", f"ops:admin={api_key}")
    flock = sample_flock()

    @flock.agent
    def tell_all() -> str:
        raise RuntimeError(dict(os.environ))

    @flock.agent
    async def read() -> str:
        return (tmp_path / "not-there.txt").read_text()

    @flock.agent
    def lie() -> int:
        return os.environ["OPENAI_API_KEY"]  # type: ignore[return-value]

    model.replies = [Failure(401, message=f"Incorrect API key provided: {model_key}")] * 2
    engine = flock.engine(store="kept.db", transport=model.transport)
    app = create_app(flock, engine=engine, api_keys={"ops:admin": api_key})
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"X-API-Key": api_key}
    async with app.lifespan(), httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers) as client:
        answers = []
        for agent_name, inputs in (("text_analyzer", {"text": "x"}), ("tell_all", {}), ("read", {}), ("lie", {})):
            run = await post(client, "/run/flock", {"agent_name": agent_name, "inputs": inputs})
            assert run.json()["status"] == "failed"
            batch = await post(client, "/run/batch", {"agent_name": agent_name, "batch_inputs": [inputs]})
            await wait_for(client, batch.headers["Location"])
            run_path = f"/run/{run.json()['run_id']}"
            answers += [run, batch]
            for path in (run_path, f"{run_path}/events", batch.headers["Location"]):
                answers.append(await client.get(path))
        for path in ("/runs?include=inputs,result", "/agents", "/metrics", "/readyz", "/openapi.json", "/nowhere"):
            answers.append(await client.get(path))
        sent = "".join(f"{answer.headers} {answer.text}" for answer in answers)
        stored = texts_of("kept.db", "kept.db-wal")
    assert "tell_all" in stored
    for secret in (api_key, model_key, str(tmp_path), "Incorrect API key", "No such file", "Traceback"):
        assert secret not in sent
        assert secret not in stored


async def test_an_invalid_value_is_not_repeated_in_the_error(flock: Flock, client: httpx.AsyncClient) -> None:
    @flock.agent
    def strict(
        colour: Literal["red", "blue"] = "red",
        level: Literal[1, 2] = 1,
        id: UUID | None = None,
        at: datetime | None = None,
        count: int = 0,
        inner: dict[str, Literal["a"]] | None = None,
    ) -> None: ...

    secret = "4711" * 1000
    inputs = {"level": 4711, "count": secret, "inner": {"x": secret}, "colour": secret, "id": secret, "at": secret}
    refused = await post(client, "/run/flock", {"agent_name": "strict", "inputs": inputs})
    assert refused.status_code == 422
    assert {e["pointer"] for e in refused.json()["errors"]} == {f"/inputs/{name}" for name in inputs} - {
        "/inputs/inner"
    } | {"/inputs/inner/x"}
    assert "4711" not in refused.text


async def test_the_path_of_the_store_is_only_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(sample_flock(), store=tmp_path / "missing" / "flock.db")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        for path in ("/readyz", "/metrics", "/runs"):
            answer = await client.get(path)
            assert str(tmp_path) not in answer.text
    assert answer.json()["detail"] == "The store cannot be opened now. The server's log has the reason."
    assert str(tmp_path / "missing" / "flock.db") in caplog.text

"""Invalid input: each request gets a clear error that says what to do, and nothing runs."""

import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest

from flock.core import Flock
from flock.testing import FakeModel
from flockapi import FlockAPI
from tests.support.http import check_problem
from tests.support.spec import SPEC, check_described

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}


async def post(client: httpx.AsyncClient, body: Any, path: str = "/run/flock", **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return await client.post(path, content=content, headers={**JSON, **headers})


# Not JSON


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(b"", "the body is empty", id="empty"),
        pytest.param(b" \n", "the body is empty", id="blank"),
        pytest.param(b'{"agent_name": "add", "inputs"', "line 1, column 31", id="cut off"),
        pytest.param(b"{'agent_name': 'add'}", "strings (use double quotes) at line 1, column 2", id="single quotes"),
        pytest.param(b'{\n  "agent_name": add\n}', "line 2, column 17", id="no quotes"),
        pytest.param(b'{"agent_name": "add", "inputs": {"a": 01}}', "line 1, column 40", id="in the inputs"),
        pytest.param(b'{"agent_name": "add", "inputs": {"a": NaN}}', "line 1, column 39", id="NaN"),
        pytest.param(
            b'{"agent_name": "add", "inputs": {"\xff": 1}}', "invalid UTF-8 at line 1, column 35", id="not UTF-8"
        ),
        pytest.param(gzip.compress(b'{"agent_name": "add"}'), "invalid UTF-8 at line 1, column 2", id="compressed"),
        pytest.param(b'{"agent_name": "\\ud800"}', "unpaired surrogate", id="lone surrogate"),
        pytest.param(
            b'{"agent_name": "anything", "inputs": {"value": "\\udc00"}}',
            "surrogate",
            id="lone surrogate in the inputs",
        ),
        pytest.param(
            b'{"agent_name": "anything", "inputs": {"value": ' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
            "nested deeper than 100 levels at line 1, column 146",
            id="10,000 deep",
        ),
        pytest.param(
            b'{"agent_name": "add", "inputs": ' + b"[" * 100_000,
            "nested deeper than 100 levels",
            id="100,000 deep and open",
        ),
    ],
)
async def test_malformed_json_is_400_with_line_and_column(body: bytes, words: str, client: httpx.AsyncClient) -> None:
    problem = check_problem(await post(client, body), 400)
    assert problem["type"] == "urn:flockapi:problem:malformed-json"
    assert words in problem["detail"]
    check_problem(await post(client, body.replace(b"inputs", b"batch_inputs"), "/run/batch"), 400)


# Content types and encodings


@pytest.mark.parametrize("path", ["/run/flock", "/run/batch"])
@pytest.mark.parametrize(
    "content_type", ["application/x-www-form-urlencoded", "text/plain", "application/jsonp", "multipart/mixed", ""]
)
async def test_another_content_type_is_415_and_the_error_says_what_to_send(
    content_type: str, path: str, client: httpx.AsyncClient
) -> None:
    """``curl -d`` sends a form by default, and a page of another site can post one without a preflight request."""
    response = await client.post(path, content=b'{"agent_name": "add"}', headers={"Content-Type": content_type})
    problem = check_problem(response, 415)
    assert "-H 'Content-Type: application/json'" in problem["detail"]
    assert response.headers["Accept"].split(", ")[0] == "application/json"


async def test_json_with_a_charset_is_accepted(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1}}
    response = await post(client, body, **{"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/run/flock", "/run/batch"])
@pytest.mark.parametrize("encoding", ["gzip", "GZip", "identity, gzip", "br", "deflate", "compress", "x" * 500])
@pytest.mark.slow
async def test_a_compressed_body_is_415_and_is_not_read(encoding: str, path: str, client: httpx.AsyncClient) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    response = await client.post(path, content=never(), headers={**JSON, "Content-Encoding": encoding})
    assert "uncompressed" in check_problem(response, 415)["detail"]
    assert (response.headers["Accept-Encoding"], response.headers["Connection"]) == ("identity", "close")
    check_described(SPEC["paths"][path]["post"], response)


@pytest.mark.parametrize("encoding", ["", "identity", " Identity "])
async def test_content_encoding_identity_is_accepted(encoding: str, client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {"a": 1}}
    assert (await post(client, body, **{"Content-Encoding": encoding})).status_code == 200


# JSON that does not match its schema


@pytest.mark.parametrize(
    ("body", "errors"),
    [
        pytest.param({}, {"/agent_name": "This field is required."}, id="missing"),
        pytest.param([], {"": "Expected 'object', got 'array'."}, id="list"),
        pytest.param(5, {"": "Expected 'object', got 'int'."}, id="number"),
        pytest.param(
            {"agent_name": 5, "async_run": "yes", "agent": 1},
            {
                "/agent": "Unknown field. "
                "Known fields: agent_name, inputs, async_run, timeout_s, session_id, max_cost.",
                "/agent_name": "Expected 'str', got 'int'.",
                "/async_run": "Expected 'bool', got 'str'.",
            },
            id="mistyped and unknown",
        ),
        pytest.param(
            {"agent_name": "add", "inputs": {"a": "1", "c": 3}},
            {
                "/inputs/c": "Unknown field. Known fields: a, b.",
                "/inputs/a": "Expected 'int', got 'str'.",
            },
            id="inputs",
        ),
        pytest.param({"agent_name": "add"}, {"/inputs/a": "This field is required."}, id="no inputs"),
        pytest.param(
            {"agent_name": "add", "inputs": None}, {"/inputs": "Expected 'object', got 'null'."}, id="inputs null"
        ),
        pytest.param(
            {"agent_name": "add", "inputs": [1]}, {"/inputs": "Expected 'object', got 'array'."}, id="inputs list"
        ),
    ],
)
async def test_an_invalid_field_is_422_with_its_pointer(
    body: Any, errors: dict[str, str], client: httpx.AsyncClient
) -> None:
    problem = check_problem(await post(client, body), 422)
    assert problem["type"] == "urn:flockapi:problem:invalid-input"
    assert {error["pointer"]: error["detail"] for error in problem["errors"]} == errors


async def test_a_number_out_of_range_is_422(client: httpx.AsyncClient) -> None:
    for number in ("1e400", "9" * 5000):
        body = f'{{"agent_name": "add", "inputs": {{"a": {number}}}}}'
        problem = check_problem(await post(client, body), 422)
        assert problem["errors"][0]["pointer"] == "/inputs/a"


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        pytest.param({"agent_name": "add"}, ["/batch_inputs"], id="missing"),
        pytest.param({"batch_inputs": []}, ["/agent_name"], id="no agent"),
        pytest.param({"agent_name": "add", "batch_inputs": []}, ["/batch_inputs"], id="empty"),
        pytest.param({"agent_name": "add", "batch_inputs": {"a": 1}}, ["/batch_inputs"], id="object"),
        pytest.param({"agent_name": "add", "batch_inputs": [{"a": 1}, 5]}, ["/batch_inputs/1"], id="item is a number"),
        pytest.param({"agent_name": "add", "batch_inputs": [None]}, ["/batch_inputs/0"], id="item is null"),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}, {"a": "x"}, {"b": 1}]},
            ["/batch_inputs/1/a", "/batch_inputs/2/a"],
            id="two bad items",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"n": "x"}], "input_mapping": {"n": "a"}},
            ["/batch_inputs/0/n"],
            id="the pointer has the name that was sent",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}, {"a": 2}], "static_inputs": {"b": "x"}},
            ["/static_inputs/b"],
            id="a static input is reported once",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}], "static_inputs": {"z/~": 1}},
            ["/static_inputs/z~1~0"],
            id="a static input whose name is escaped",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"n/~": "x"}], "input_mapping": {"n/~": "a"}},
            ["/batch_inputs/0/n~1~0"],
            id="a mapped name that is escaped",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}, {"n/~": 1}], "input_mapping": {"n/~": "z", "m": "b"}},
            ["/input_mapping/n~1~0"],
            id="a name mapped to an unknown input",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"x": 1, "a": "bad"}], "input_mapping": {"x": "a"}},
            ["/batch_inputs/0/a"],
            id="two members for one input",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"x": 1}, {"x": "bad"}], "input_mapping": {"x": "a", "y": "a"}},
            ["/batch_inputs/1/x"],
            id="two names for one input, one at a time",
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}], "max_workers": 0}, ["/max_workers"], id="no workers"
        ),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}], "max_workers": 1001},
            ["/max_workers"],
            id="too many workers",
        ),
        pytest.param({"agent_name": "add", "batch_inputs": [{"a": 1}], "workers": 1}, ["/workers"], id="unknown"),
        pytest.param({"agent_name": "add", "batch_inputs": "/etc/passwd"}, ["/batch_inputs"], id="path"),
        pytest.param({"agent_name": "add", "batch_inputs": "http://127.0.0.1/x"}, ["/batch_inputs"], id="URL"),
        pytest.param(
            {"agent_name": "add", "batch_inputs": [{"a": 1}], "write_to_csv": "/tmp/x.csv"}, ["/write_to_csv"], id="csv"
        ),
    ],
)
@pytest.mark.slow
async def test_an_invalid_batch_is_refused_as_a_whole(
    body: Any, pointers: list[str], client: httpx.AsyncClient, app: FlockAPI
) -> None:
    problem = check_problem(await post(client, body, "/run/batch"), 422)
    assert [error["pointer"] for error in problem["errors"]] == pointers


async def test_at_most_100_errors_are_reported(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "batch_inputs": [{}] * 5000}
    problem = check_problem(await post(client, body, "/run/batch"), 422)
    assert len(problem["errors"]) == 100


async def test_batch_options_of_older_clients_are_ignored(client: httpx.AsyncClient) -> None:
    body = {
        "agent_name": "add",
        "batch_inputs": [{"a": 1}],
        "input_mapping": None,
        "static_inputs": None,
        "parallel": True,
        "max_workers": 5,
        "use_temporal": None,
        "box_results": True,
        "return_errors": False,
        "silent_mode": True,
        "write_to_csv": None,
    }
    assert (await post(client, body, "/run/batch")).status_code == 202


#: Numbers that are valid JSON, and that no program can read.
OUT_OF_RANGE = ["1e400", "-1e400", "9" * 5000]


@pytest.mark.parametrize("number", OUT_OF_RANGE)
async def test_no_number_is_a_500(number: str, client: httpx.AsyncClient) -> None:
    """In a body, in rows of each format, in options, in a query and in headers."""
    value = f'{{"value": [{{"deep": {number}}}]}}'
    for body, path, pointer in (
        (f'{{"agent_name": "anything", "inputs": {value}}}', "/run/flock", "/inputs/value/0/deep"),
        (f'{{"agent_name": "anything", "batch_inputs": [{value}]}}', "/run/batch", "/batch_inputs/0/value/0/deep"),
        (f'{{"agent_name": "add", "inputs": {{"a": 1}}, "timeout_s": {number}}}', "/run/flock", "/timeout_s"),
        (f'{{"agent_name": "add", "inputs": {{"a": 1}}, "max_cost": {number}}}', "/run/flock", "/max_cost"),
        (
            f'{{"agent_name": "add", "batch_inputs": [{{"a": 1}}], "max_workers": {number}}}',
            "/run/batch",
            "/max_workers",
        ),
    ):
        problem = check_problem(await post(client, body, path), 422)
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
    run = (await post(client, {"agent_name": "approve", "inputs": {"text": "it"}})).json()
    path = f"/run/{run['run_id']}/calls/{run['waiting_for'][0]['call_id']}"
    for body, pointer in (
        (f'{{"output": {number}}}', "/output"),
        (f'{{"output": {{"approved": [{number}]}}}}', "/output/approved/0"),
    ):
        problem = check_problem(await post(client, body, path), 422)
        assert [error["pointer"] for error in problem["errors"]] == [pointer]
    for media_type, rows in (("text/csv", f"a\n{number}\n"), ("application/x-ndjson", f'{{"a": {number}}}\n')):
        sent = await client.post("/run/batch?agent_name=add", content=rows, headers={"Content-Type": media_type})
        assert check_problem(sent, 422)["errors"][0]["pointer"].endswith("/a")
    batch = (await post(client, {"agent_name": "add", "batch_inputs": [{"a": 1}]}, "/run/batch")).headers["Location"]
    for path in ("/runs?limit=", f"{batch}?after=", f"{batch}?wait=", f"{batch}/results?limit=", "/runs?after="):
        for text in (number, "²", "٣"):
            check_problem(await client.get(path + text), 422)
    for sent_text in (number.encode(), "²".encode(), "٣".encode()):
        events = await client.get(f"{batch}/events", headers=[(b"last-event-id", sent_text)])
        assert events.status_code == 200
        preferred = [(b"prefer", b"respond-async, wait=" + sent_text), (b"content-type", b"application/json")]
        sent = await client.post("/run/flock", content=b'{"agent_name": "add", "inputs": {"a": 1}}', headers=preferred)
        assert sent.status_code == 202


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit=", "after=-2", "after=" + "9" * 5000])
async def test_an_invalid_query_is_422(query: str, client: httpx.AsyncClient) -> None:
    accepted = await post(client, {"agent_name": "add", "batch_inputs": [{"a": 1}]}, "/run/batch")
    problem = check_problem(await client.get(f"{accepted.headers['Location']}?{query}"), 422)
    assert query.partition("=")[0] in problem["detail"]


# Not found


async def test_an_unknown_agent_is_404_and_the_error_lists_the_known_ones(client: httpx.AsyncClient) -> None:
    responses = [
        await post(client, {"agent_name": "nobody"}),
        await post(client, {"agent_name": "nobody", "batch_inputs": [{}]}, "/run/batch"),
        await client.get("/agents/nobody"),
    ]
    for response in responses:
        problem = check_problem(response, 404)
        assert problem["type"] == "urn:flockapi:problem:unknown-agent"
        assert "'nobody'" in problem["detail"]
        assert "Known agents: text_analyzer, add, " in problem["detail"]


async def test_who_gets_the_path_at_which_runs_start_is_told_to_post(client: httpx.AsyncClient) -> None:
    assert check_problem(await client.get("/run/flock"), 404)["detail"].endswith("To start one, use POST.")


async def test_a_misspelled_agent_is_404_and_the_error_suggests_the_name(client: httpx.AsyncClient) -> None:
    problem = check_problem(await post(client, {"agent_name": "text_analyser"}), 404)
    assert problem["detail"].startswith(
        "There is no agent 'text_analyser'. Did you mean 'text_analyzer'? Known agents: "
    )


async def test_an_unknown_run_or_batch_is_404(client: httpx.AsyncClient) -> None:
    for path, slug in (("/run/42", "unknown-run"), ("/run/flock", "unknown-run"), ("/batch/42", "unknown-batch")):
        problem = check_problem(await client.get(path), 404)
        assert problem["type"] == f"urn:flockapi:problem:{slug}"


async def test_an_unknown_path_or_method_is_a_problem_too(client: httpx.AsyncClient) -> None:
    for path in ("/nowhere", "/static/nowhere.js", "/static/../flockapi.py"):
        assert check_problem(await client.get(path), 404)["type"] == "about:blank"
    response = await client.delete("/agents")
    check_problem(response, 405)
    assert "GET" in response.headers["Allow"]


async def test_a_path_that_ends_in_a_line_break_is_unknown(client: httpx.AsyncClient) -> None:
    assert (await client.get("/agents%0A")).status_code == 404


# Too large


async def test_a_body_that_is_too_long_is_413(client: httpx.AsyncClient, app: FlockAPI) -> None:
    body = json.dumps({"agent_name": "summarise", "inputs": {"text": ""}})
    fitting = body.replace('""', '"' + "x" * (app.options.max_body_bytes - len(body)) + '"')
    assert len(fitting) == app.options.max_body_bytes
    assert (await post(client, fitting)).status_code == 200
    problem = check_problem(await post(client, fitting + " "), 413)
    assert str(app.options.max_body_bytes) in problem["detail"]


async def test_a_content_length_over_the_limit_is_refused_before_the_body_is_read(client: httpx.AsyncClient) -> None:
    async def never() -> AsyncIterator[bytes]:
        pytest.fail("the body was read")
        yield b""

    headers = {**JSON, "Content-Length": "99999999"}
    check_problem(await client.post("/run/flock", content=never(), headers=headers), 413)


async def test_static_inputs_of_all_rows_are_limited_together(client: httpx.AsyncClient) -> None:
    """They are sent once, but would be stored with each of thousands of rows."""
    body = {"agent_name": "summarise", "static_inputs": {"text": "x" * 500_000}, "batch_inputs": [{}] * 5000}
    problem = check_problem(await post(client, body, "/run/batch"), 413)
    assert "The static inputs of all rows" in problem["detail"]


async def test_at_most_a_hundred_unknown_fields_are_reported(client: httpx.AsyncClient) -> None:
    body = {"agent_name": "add", "inputs": {f"k{i}": 1 for i in range(50_000)}}
    response = await post(client, body)
    problem = check_problem(response, 422)
    assert len(problem["errors"]) == 101  # and the missing one
    assert "and 91 more" in problem["detail"]
    assert len(response.content) < 20_000


async def test_a_long_name_is_shortened_in_the_error(client: httpx.AsyncClient) -> None:
    assert len((await post(client, {"agent_name": "x" * 500_000})).content) < 1000


async def test_unhashable_values_and_errors_in_a_types_own_code_are_422(
    flock: Flock, client: httpx.AsyncClient
) -> None:
    class Picky(msgspec.Struct):
        n: int

        def __post_init__(self) -> None:
            raise RuntimeError("a secret")

    @flock.agent
    def unique(values: set[Any], picky: Picky | None = None) -> int:
        return len(values)

    for inputs, pointer in (
        ({"values": [[1]]}, "/inputs/values"),  # its element, since msgspec 0.23
        ({"values": [], "picky": {"n": 1}}, "/inputs/picky"),
    ):
        problem = check_problem(await post(client, {"agent_name": "unique", "inputs": inputs}), 422)
        assert [error["pointer"].removesuffix("/0") for error in problem["errors"]] == [pointer]
        assert "secret" not in json.dumps(problem)


async def test_a_client_that_disconnects_during_its_body_logs_no_error(
    app: FlockAPI, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/run/flock",
        "raw_path": b"/run/flock",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    assert sent[0]["status"] == 400
    assert caplog.records == []


# Batches


async def test_query_options_are_refused_with_a_json_body(client: httpx.AsyncClient) -> None:
    """They would have no effect. Defaults are accepted, because generated clients send them."""
    body = {"agent_name": "add", "batch_inputs": [{"a": 1}]}
    for query in (
        "max_workers=50",
        "agent_name=add",
        "on_invalid=skip",
        "static_inputs={}",
        "max_workers=x",
        "colour=1",
    ):
        problem = check_problem(await client.post(f"/run/batch?{query}", json=body), 422)
        assert "query" in problem["errors"][0]["detail"]
    assert (await client.post("/run/batch?max_workers=5&delimiter=,", json=body)).status_code == 202


async def test_an_upload_that_is_refused_unread_closes_its_connection(client: httpx.AsyncClient) -> None:
    """Otherwise the server reads the body for a while, so that its sender sees the error."""
    csv = {"Content-Type": "text/csv"}
    refused = await client.post("/run/batch?agent_name=add", content="a\n1", headers={**csv, "Idempotency-Key": ""})
    assert (refused.status_code, refused.headers["Connection"]) == (400, "close")
    read = await client.post("/run/batch?agent_name=add&workers=5", content="a\n1", headers=csv)
    assert (read.status_code, read.headers.get("Connection")) == (422, None)


# Internal errors


async def test_a_bug_is_a_500_without_its_text(
    client: httpx.AsyncClient, app: FlockAPI, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(run_id: str, principal: str | None = None) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(app.engine, "get_outline", broken)
    problem = check_problem(await client.get("/run/1"), 500)
    assert "a secret" not in json.dumps(problem)
    assert problem["request_id"] in problem["detail"]
    assert any(problem["request_id"] in record.getMessage() and record.exc_info for record in caplog.records)


async def test_invalid_inputs_reach_no_model(client: httpx.AsyncClient, model: FakeModel) -> None:
    """Inputs are validated before any model call is paid for."""
    for inputs in ({}, {"text": 5}, {"text": "x", "y": 1}):
        check_problem(await post(client, {"agent_name": "text_analyzer", "inputs": inputs}), 422)
    assert model.requests == []

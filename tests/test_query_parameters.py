"""The server takes the query parameters that ``openapi.yaml`` allows, and no others."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import PATIENCE_S
from tests.support.servers import flockapi_command, running
from tests.support.spec import operations, resolve, validator

SERVED = """
from flock.core import Flock

flock = Flock("served")

@flock.agent
def add(a: int, b: int = 2) -> int:
    return a + b

@flock.agent
def echo(text: str) -> str:
    return text
"""

QUERIES = {
    operation["operationId"]: (method, path, found)
    for method, path, operation in operations()
    if (found := [p for p in map(resolve, operation.get("parameters", ())) if p["in"] == "query"])
}
#: What a schema cannot say: a page continues after the ``next`` of the one before, and a CSV file has one of many
#: encodings.
LOOSE = {("getUsage", "after"), ("getUsage", "by"), ("runBatch", "encoding"), ("getBatchResults", "encoding")}
#: Values of all kinds. Those of a parameter's schema come in addition.
VALUES = ["", "x", "true", "True", "0", "1", "-1", "1.5", "01", "1e3", "null", "{}", "[]", '{"a": 1}', '{"a": "b"}']
VALUES += ["2026-01-01", "2026-01-01T00:00:00Z", "2026-13-01", "01a20e41-e4ec-74f9-8450-7dd74efe56ba", "a" * 300]
VALUES += [str(10**15), str(10**30), str(-(10**30)), "inputs", "inputs,result", "result,inputs", "inputs,inputs", ","]


def _values(schema: Any) -> Iterator[str]:
    yield from VALUES
    yield from map(str, schema.get("enum", ()))
    for bound in ("minimum", "maximum", "exclusiveMinimum"):
        if bound in schema:
            yield from (str(schema[bound] + step) for step in (-1, 0, 1))


def _decoded(schema: Any, value: str, *, is_json: bool) -> Any:
    """Return what a query parameter means. Raises ValueError if it is not of the type of its *schema*."""
    if is_json:
        return json.loads(value)
    match schema.get("type"):
        case "array":
            return value.split(",") if value else []
        case "integer":
            if not re.fullmatch(r"-?\d+", value):
                raise ValueError(value)
            return int(value)
        case "number":
            if not re.fullmatch(r"\d+(\.\d+)?([eE][+-]?\d+)?", value):
                raise ValueError(value)
            return float(value)
        case "boolean":
            return {"true": True, "false": False}.get(value, value)
    return value


def _is_allowed(parameter: Any, value: str) -> bool:
    is_json = "content" in parameter
    schema = parameter["content"]["application/json"]["schema"] if is_json else resolve(parameter["schema"])
    try:
        return not list(validator(schema).iter_errors(_decoded(schema, value, is_json=is_json)))
    except ValueError:
        return False


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A client of a server, and the path parameters of what is on it."""
    folder: Path = tmp_path_factory.mktemp("served")
    (folder / "served.py").write_text(SERVED)
    serve = flockapi_command("serve", f"{folder}/served.py", "--port", "0", "--store", f"{folder}/flock.db")
    with running(*serve) as server, httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        conversation = client.post("/v1/conversations", json={}).json()["id"]
        sent = {"model": "echo", "input": "hello", "conversation": conversation}
        response = client.post("/v1/responses", json=sent)
        rows = {"agent_name": "add", "batch_inputs": [{"a": 1}]}
        batch = client.post("/run/batch", json=rows, headers={"Prefer": "wait=10"}).json()
        places = {
            "run_id": response.headers["Flock-Run-Id"],
            "response_id": response.json()["id"],
            "conversation_id": conversation,
            "batch_id": batch["batch_id"],
            "call_id": "ask",
        }
        yield client, places


def _refused(served: tuple[httpx.Client, dict[str, str]], operation_id: str, query: list[tuple[str, Any]]) -> str:
    """Send a request with *query*. Return the error if the query is refused, and "" otherwise."""
    client, places = served
    method, path, _ = QUERIES[operation_id]
    content: dict[str, Any] = {}
    if operation_id == "runBatch":
        content = {"content": "a\n1\n", "headers": {"Content-Type": "text/csv"}}
        needed = {"agent_name": "add", "dry_run": "true"}
        query = [*((name, value) for name, value in needed.items() if name not in dict(query)), *query]
    elif method == "POST":
        sent = {"answerCall": {"output": 1}, "runFlock": {"agent_name": "add", "inputs": {"a": 1}}}
        content = {"json": sent[operation_id]} if operation_id in sent else {}
    with client.stream(method, path.format(**places), params=httpx.QueryParams(query), **content) as response:
        if response.status_code not in (400, 422):
            return ""
        text = response.read().decode()
    return text if "the query" in text else ""


@pytest.mark.parametrize("operation_id", QUERIES)
def test_the_server_takes_the_values_that_the_document_allows_and_no_others(
    operation_id: str, served: tuple[httpx.Client, dict[str, str]]
) -> None:
    assert not _refused(served, operation_id, [])
    differences = []
    for parameter in QUERIES[operation_id][2]:
        name = parameter["name"]
        for value in dict.fromkeys(_values(resolve(parameter.get("schema", {})))):
            if (operation_id, name) in LOOSE or (operation_id == "listQuestions" and value in ("3599", "3600")):
                continue  # there is no question, so it would wait
            error = _refused(served, operation_id, [(name, value)])
            if bool(error) == _is_allowed(parameter, value):
                differences.append((name, value, error or "is accepted"))
    assert differences == []


@pytest.mark.parametrize("operation_id", QUERIES)
def test_a_repeated_parameter_is_refused(operation_id: str, served: tuple[httpx.Client, dict[str, str]]) -> None:
    """Which of the two would count? A list has commas."""
    for parameter in QUERIES[operation_id][2]:
        assert not parameter.get("explode")
        for values in (("", ""), ("true", "true"), ("", "true")):
            error = _refused(served, operation_id, [(parameter["name"], value) for value in values])
            assert "is repeated" in error, parameter["name"]


#: Where a misspelled filter or option would return or start something else.
STRICT = {"runFlock", "runBatch", "listRuns", "listBatches", "listQuestions", "listWebhooks", "getUsage"}
STRICT |= {"getQuestionEvents", "getBatchResults"}


@pytest.mark.parametrize("operation", list(operations()), ids=lambda operation: operation[2]["operationId"])
def test_routes_that_list_or_start_something_refuse_unknown_parameters(
    operation: tuple[str, str, Any], served: tuple[httpx.Client, dict[str, str]]
) -> None:
    method, path, described = operation
    client, places = served
    found = path.format(**dict.fromkeys(re.findall(r"{(\w+)}", path), "echo") | places)
    sent: dict[str, Any] = {"json": {"agent_name": "add", "inputs": {"a": 1}}} if method == "POST" else {}
    with client.stream(method, found, params={"unknown": "1"}, **sent) as response:
        is_refused = response.status_code == 422 and "'unknown'" in response.read().decode()
    assert is_refused == (described["operationId"] in STRICT)

"""``openapi.yaml`` says exactly what the server does: routes, fields, statuses, examples."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import yaml
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from referencing import Registry
from referencing.jsonschema import DRAFT202012
from starlette.routing import Route

import flock as flock_package
import flockapi
from flock.core import Flock
from flock.errors import FieldError
from flock.runs import Progress, RunStatus, Usage
from flockapi import PROBLEMS, ROUTES, FlockAPI, create_app
from tests.fakes import ROOT, FakeModel, answer
from tests.openapi_twin import TWIN, source
from tests.test_api import wait_for

SPEC = source()
SCHEMAS = SPEC["components"]["schemas"]

#: Which struct stands behind which schema.
STRUCTS: dict[str, type[msgspec.Struct]] = {
    name: getattr(flockapi, name) for name in SCHEMAS if name in flockapi.__all__
} | {"Usage": Usage, "Progress": Progress, "FieldError": FieldError}


#: Which struct stands behind the query of which operations.
QUERIES = {
    "WaitQuery": ["getRun", "cancelRun"],
    "EventsQuery": ["getRunEvents"],
    "ItemsQuery": ["getBatch"],
    "RunsQuery": ["listRuns"],
}


def operations() -> Iterator[tuple[str, str, Any]]:
    for path, item in SPEC["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def resolve(node: Any) -> Any:
    while isinstance(node, dict) and "$ref" in node:
        target = SPEC
        for token in node["$ref"].removeprefix("#/").split("/"):
            target = target[token]
        node = target
    return node


def validator(schema: Any) -> Draft202012Validator:
    """A validator of *schema* within the document, where its references lead."""
    registry: Any = Registry().with_resource("urn:spec", DRAFT202012.create_resource(SPEC))
    outside = json.loads(json.dumps(schema).replace('"#/components/', '"urn:spec#/components/'))
    return Draft202012Validator(outside, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER)


# The document


def test_it_is_valid_openapi() -> None:
    validate(SPEC)


def test_its_twin_is_equal() -> None:
    """If not: python -m tests.openapi_twin"""
    assert json.loads(TWIN.read_text("utf-8")) == SPEC


def test_it_has_the_version_of_the_package() -> None:
    assert SPEC["info"]["version"] == flock_package.__version__


def test_everything_is_described() -> None:
    for method, path, operation in operations():
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        for parameter in map(resolve, operation.get("parameters", [])):
            assert parameter["description"], where
        for response in map(resolve, operation["responses"].values()):
            assert response["description"], where
            assert "X-Request-ID" in response["headers"], where
            for content in response.get("content", {}).values():
                assert content.get("examples") or content.get("example"), where
        body = operation.get("requestBody")
        assert body is None or body["content"]["application/json"]["examples"], where
    for name, schema in SCHEMAS.items():
        assert schema["description"], name


def test_nothing_in_it_is_unused() -> None:
    text = (ROOT / "openapi.yaml").read_text("utf-8")
    for kind, members in SPEC["components"].items():
        for name in members:
            used = f"- {name}: []" if kind == "securitySchemes" else f"#/components/{kind}/{name}"
            assert used in text, f"{kind}/{name}"


def check_described(operation: Any, response: httpx.Response) -> None:
    """Its status, its media type, its body, and its headers: those that must be there are, and no others are."""
    described = resolve(operation["responses"][str(response.status_code)])
    headers = {name.lower(): resolve(header) for name, header in described["headers"].items()}
    sent = set(response.headers) - {"content-type", "content-length", "connection", "date"}  # HTTP's own
    assert {name for name, header in headers.items() if header.get("required")} <= sent <= headers.keys()
    if "content" not in described:
        assert response.content == b""
        return
    media_type = response.headers["Content-Type"].partition(";")[0]
    schema = described["content"][media_type]["schema"]
    body = response.json() if "json" in media_type else response.text
    assert list(validator(schema).iter_errors(body)) == []


# Routes, both ways


def test_every_route_is_in_it_and_every_path_is_a_route() -> None:
    routed = {
        (method, route.path)
        for route in ROUTES
        if isinstance(route, Route) and route.include_in_schema
        for method in (route.methods or ())
        if method != "HEAD"
    }
    assert routed == {(method, path) for method, path, _ in operations()}


def test_only_the_docs_pages_are_left_out() -> None:
    hidden = {route.path for route in ROUTES if isinstance(route, Route) and not route.include_in_schema}
    assert hidden == {"/docs", "/redoc"}


def test_every_status_of_the_error_table_is_in_it() -> None:
    statuses = {status for _, _, operation in operations() for status in operation["responses"]}
    assert {str(status) for status, _ in PROBLEMS.values()} <= statuses


# Structs, both ways


def test_every_public_struct_has_a_schema() -> None:
    public = {name for name in flockapi.__all__ if isinstance(getattr(flockapi, name), type)} - set(QUERIES)
    structs = {name for name in public if issubclass(getattr(flockapi, name), msgspec.Struct)}
    assert structs <= SCHEMAS.keys()
    assert SCHEMAS.keys() - STRUCTS.keys() == {"RunStatus"}


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_a_struct_and_its_schema_have_the_same_fields(name: str) -> None:
    _, components = msgspec.json.schema_components([STRUCTS[name]], ref_template="#/components/schemas/{name}")
    ours, theirs = components[name], SCHEMAS[name]
    assert list(ours["properties"]) == list(theirs["properties"])
    assert ours.get("required", []) == theirs.get("required", [])
    assert ours.get("additionalProperties") == theirs.get("additionalProperties")
    for field, ours_here in ours["properties"].items():
        theirs_here = theirs["properties"][field]
        if (name, field) not in RAW:
            assert _shape(ours_here) == _shape(theirs_here), field
            assert ours_here.get("default", ...) == theirs_here.get("default", ...), field


#: Kept as it was sent, so the struct says nothing about it.
RAW = {
    ("FlockAPIRequest", "inputs"),
    ("FlockAPIResponse", "result"),
    ("RunStep", "result"),
    ("RunSummary", "inputs"),
    ("RunSummary", "result"),
}


def _shape(schema: Any) -> Any:
    """What a schema allows, in one form for both spellings of a union."""
    if "$ref" in schema:
        return schema["$ref"]
    if "anyOf" in schema:
        return {json.dumps(_shape(member), default=sorted) for member in schema["anyOf"]}
    if isinstance(schema.get("type"), list):
        return {json.dumps(_shape({**schema, "type": type_}), default=sorted) for type_ in schema["type"]}
    kept = {key: schema[key] for key in ("type", "minimum", "maximum") if key in schema}
    if schema.get("format") == "date-time" and schema["type"] == "string":
        kept["format"] = "date-time"
    if schema.get("type") == "array" and schema.get("items"):
        kept["items"] = _shape(schema["items"])
    return kept


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_and_its_parameters_are_the_same(name: str) -> None:
    """But for ``include``, a list that is written with commas."""
    _, components = msgspec.json.schema_components([getattr(flockapi, name)])
    ours = components[name]["properties"]
    found = {operation["operationId"]: operation["parameters"] for _, _, operation in operations()}
    for operation_id in QUERIES[name]:
        theirs = {p["name"]: p["schema"] for p in map(resolve, found[operation_id]) if p["in"] == "query"}
        assert list(theirs) == list(ours)
        for parameter, schema in ours.items():
            if parameter != "include":
                optional = _shape(schema)
                allowed = optional if isinstance(optional, set) else {json.dumps(optional, default=sorted)}
                assert json.dumps(_shape(resolve(theirs[parameter])), default=sorted) in allowed or "$ref" in str(
                    schema
                )
                assert (schema.get("default") or None) == (theirs[parameter].get("default") or None)


def test_the_statuses_of_a_run_are_the_same() -> None:
    assert SCHEMAS["RunStatus"]["enum"] == list(RunStatus)


# Examples


def examples() -> Iterator[Any]:
    for method, path, operation in operations():
        places = {"request": operation["requestBody"]} if "requestBody" in operation else {}
        for place, holder in (places | operation["responses"]).items():
            for media_type, content in resolve(holder).get("content", {}).items():
                for name, example in content.get("examples", {}).items():
                    where = f"{method} {path} {place} {name}"
                    yield pytest.param(media_type, content["schema"], resolve(example)["value"], id=where)


@pytest.mark.parametrize(("media_type", "schema", "value"), list(examples()))
def test_an_example_fits_its_schema(media_type: str, schema: Any, value: Any) -> None:
    assert list(validator(schema).iter_errors(value)) == []


@pytest.mark.anyio
async def test_the_examples_of_requests_are_answered_as_it_says(client: httpx.AsyncClient, model: FakeModel) -> None:
    reply = answer({"sentiment": "positive", "keywords": ["great"]})
    for method, path, operation in operations():
        for example in (
            operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {}).values()
        ):
            model.replies = [reply] * 3
            response = await client.request(method, path, json=example["value"])
            check_described(operation, response)
            if response.status_code == 202:
                await wait_for(client, response.headers["Location"])
            model.replies = []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path", "content", "template"),
    [
        ("GET", "/agents", None, "/agents"),
        ("GET", "/agents/add", None, "/agents/{name}"),
        ("GET", "/agents/x", None, "/agents/{name}"),
        ("GET", "/run/42", None, "/run/{run_id}"),
        ("GET", "/batch/42", None, "/batch/{batch_id}"),
        ("GET", "/batch/42?limit=x", None, "/batch/{batch_id}"),
        ("POST", "/run/flock", "{", "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "x"}', "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "add", "inputs": {"a": "x"}}', "/run/flock"),
        ("POST", "/run/flock", '{"agent_name": "explode", "inputs": {"text": "x"}}', "/run/flock"),
        ("POST", "/run/flock", " " * 1024 * 1025, "/run/flock"),
        ("POST", "/run/batch", '{"agent_name": "add", "batch_inputs": []}', "/run/batch"),
        ("GET", "/openapi.json", None, "/openapi.json"),
        ("GET", "/healthz", None, "/healthz"),
        ("GET", "/readyz", None, "/readyz"),
        ("GET", "/runs?include=inputs,result", None, "/runs"),
        ("GET", "/runs?limit=1", None, "/runs"),
        ("GET", "/runs?limit=0", None, "/runs"),
        ("GET", "/run/{run_id}?wait=1", None, "/run/{run_id}"),
        ("GET", "/run/{run_id}?wait=x", None, "/run/{run_id}"),
        ("GET", "/run/{run_id}/events", None, "/run/{run_id}/events"),
        ("GET", "/run/{run_id}/events?after=9999999", None, "/run/{run_id}/events"),
        ("GET", "/run/42/events", None, "/run/{run_id}/events"),
        ("POST", "/run/{run_id}/cancel", None, "/run/{run_id}/cancel"),
        ("POST", "/run/42/cancel", None, "/run/{run_id}/cancel"),
        ("POST", "/run/{run_id}/retry", None, "/run/{run_id}/retry"),
        ("POST", "/run/42/retry", None, "/run/{run_id}/retry"),
        ("DELETE", "/run/{run_id}", None, "/run/{run_id}"),
        ("DELETE", "/run/42", None, "/run/{run_id}"),
    ],
)
async def test_an_answer_is_described(
    method: str, path: str, content: str | None, template: str, client: httpx.AsyncClient
) -> None:
    for text in ("first", "second"):
        run = await client.post("/run/flock", json={"agent_name": "explode", "inputs": {"text": text}})
    path = path.format(run_id=run.json()["run_id"])
    response = await client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    check_described(SPEC["paths"][template][method.lower()], response)


@pytest.mark.anyio
@pytest.mark.parametrize(("async_run", "prefer"), [(False, ""), (True, ""), (False, "respond-async, wait=5")])
async def test_headers_that_are_asked_for_are_described(
    async_run: bool, prefer: str, client: httpx.AsyncClient
) -> None:
    for key, body in (("1", {"agent_name": "add", "inputs": {"a": 1}}), ("2", {"agent_name": "refuse", "inputs": {}})):
        headers = {"Idempotency-Key": key, **({"Prefer": prefer} if prefer else {})}
        for _ in range(2):
            response = await client.post("/run/flock", json={**body, "async_run": async_run}, headers=headers)
            check_described(SPEC["paths"]["/run/flock"]["post"], response)


# As it is served


@pytest.mark.anyio
@pytest.mark.parametrize("title", ["Sample", 'A "quoted": title # with \\ and é', "yes"])
async def test_it_is_served_with_the_name_of_the_server(title: str) -> None:
    app: FlockAPI = create_app(Flock(), server_name=title)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        as_yaml = await client.get("/openapi.yaml")
        as_json = await client.get("/openapi.json")
        page = await client.get("/docs")
    assert as_yaml.headers["Content-Type"].startswith("application/yaml")
    expected = {**SPEC, "info": {**SPEC["info"], "title": title}}
    assert yaml.safe_load(as_yaml.text) == as_json.json() == expected
    found = re.search("<title>(.*)</title>", page.text)
    assert found
    assert "<" not in found[1]


@pytest.mark.timeout(300)
@pytest.mark.skipif(
    shutil.which("npx") is None and "CI" not in os.environ, reason="there is no npm here; the machine of .ci/run has it"
)
def test_it_is_clean_under_the_linter_of_redocly(tmp_path: Path) -> None:
    command = ["npx", "--yes", "@redocly/cli@2", "lint", "--extends", "recommended", str(ROOT / "openapi.yaml")]
    env = {**os.environ, "REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower().replace("deprecation warning", "")

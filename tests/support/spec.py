"""The specification, and checks of responses against it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from tests.support import ROOT

TWIN = ROOT / "flock" / "static" / "openapi.json"


def source() -> Any:
    return yaml.safe_load((ROOT / "openapi.yaml").read_text("utf-8"))


NDJSON = "application/x-ndjson"
SPEC = source()


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
    """Return a validator of *schema* that resolves its references in the document."""
    registry: Any = Registry().with_resource("urn:spec", DRAFT202012.create_resource(SPEC))
    outside = json.loads(json.dumps(schema).replace('"#/components/', '"urn:spec#/components/'))
    return Draft202012Validator(outside, registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER)


#: Headers of every response, which the document describes once.
COMMON_HEADERS = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


def check_described(operation: Any, response: httpx.Response) -> None:
    """Check the status, media type, headers and body of *response* against *operation*. Extra headers are an error."""
    described = resolve(operation["responses"][str(response.status_code)])
    headers = {name.lower(): resolve(header) for name, header in described["headers"].items()}
    sent = set(response.headers) - {"content-type", "content-length", "connection", "date"}  # HTTP's own
    assert {name: response.headers[name] for name in COMMON_HEADERS} == COMMON_HEADERS
    sent -= COMMON_HEADERS.keys() - headers.keys()
    assert {name for name, header in headers.items() if header.get("required")} <= sent <= headers.keys()
    if "content" not in described:
        assert response.content == b""
        return
    media_type = response.headers["Content-Type"].partition(";")[0]
    schema = described["content"][media_type]["schema"]
    body = response.json() if media_type.endswith("json") and media_type != NDJSON else response.text
    assert list(validator(schema).iter_errors(body)) == []
    if media_type == NDJSON:
        lines = [json.loads(line) for line in response.text.splitlines()]
        assert list(validator(described["content"]["application/json"]["schema"]).iter_errors(lines)) == []

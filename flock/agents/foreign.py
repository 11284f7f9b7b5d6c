"""The arguments of tools whose JSON Schema is not ours: those of MCP servers, and of clients."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from flock.agents.signature import Signature


@functools.cache
def _object() -> Signature:
    return Signature.of("arguments: dict")


class AnyArguments(Signature):
    """Arguments that must be a JSON object."""

    def __init__(self, schema: Any) -> None:
        self.fields = ()
        self.schema = {"type": "object", "properties": {}, **_as_ours(schema)}
        # In the schema of an answer, a reference would have another root.
        is_whole = b'"$ref"' not in msgspec.json.encode(self.schema)
        self.type: Any = Annotated[dict[str, Any], msgspec.Meta(extra_json_schema=self.schema if is_whole else {})]

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> Any:
        _object().decode(b'{"arguments":' + bytes(raw) + b"}", at)
        return msgspec.json.decode(raw)

    def encode(self, value: Any) -> msgspec.Raw:
        return msgspec.Raw(msgspec.json.encode(value))


def _as_ours(node: Any) -> dict[str, Any]:
    """Return a JSON Schema in the form of our own: objects only, and ``anyOf`` in place of a list of types.

    Raises: ValueError if a member has the wrong type.
    """
    if not isinstance(node, Mapping):  # true accepts any value
        return {}
    ours = dict(node)
    for key in ("properties", "$defs"):
        if key in node:
            members = {} if node[key] == [] else node[key]  # PHP encodes an empty map as a list
            if not isinstance(members, Mapping):
                raise ValueError(f"{key} is not an object")
            ours[key] = {name: _as_ours(member) for name, member in members.items()}
    if "items" in node:
        ours["items"] = _as_ours(node["items"])
    if "anyOf" in node:
        if not isinstance(node["anyOf"], list):
            raise ValueError("anyOf is not an array")
        ours["anyOf"] = [_as_ours(member) for member in node["anyOf"]]
    if isinstance(types := ours.get("type"), list):
        description = {"description": ours.pop("description")} if "description" in ours else {}
        return description | {"anyOf": [{**ours, "type": type_} for type_ in types]}
    return ours

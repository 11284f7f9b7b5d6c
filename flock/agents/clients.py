"""What the agents of a run take of what its client brings: instructions, tools, and options of the model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from flock.agents.agent import Agent, ModelAgent
from flock.agents.graph import graph_of
from flock.agents.tools import Tool, ToolSource, same_name
from flock.errors import FieldError, InvalidData, MalformedJSON, TooLarge
from flock.jsontype import JSONType, check_depth, explain
from flock.models.react import FINISH
from flock.runs import ClientSettings
from flock.runs.client import OPTIONS

#: Max size of all tools as JSON, and max depth of the JSON Schema of one, in arrays and objects.
MAX_TOOLS_BYTES, MAX_DEPTH = 256 * 1024, 32

_SETTINGS = JSONType(ClientSettings)


class _Schema(msgspec.Struct, rename={"ref": "$ref", "defs": "$defs"}):
    """The keywords of a JSON Schema that requests to models read. References are never resolved: they stay inside."""

    ref: Annotated[str, msgspec.Meta(pattern="^#")] | UnsetType = UNSET
    defs: "dict[str, _Schema | bool] | UnsetType" = UNSET
    type: str | list[str] | UnsetType = UNSET
    description: str | UnsetType = UNSET
    properties: "dict[str, _Schema | bool] | UnsetType" = UNSET
    required: list[str] | UnsetType = UNSET
    items: "_Schema | bool | UnsetType" = UNSET
    enum: list[Any] | UnsetType = UNSET
    anyOf: "list[_Schema | bool] | UnsetType" = UNSET
    oneOf: "list[_Schema | bool] | UnsetType" = UNSET
    allOf: "list[_Schema | bool] | UnsetType" = UNSET
    format: str | UnsetType = UNSET
    pattern: str | UnsetType = UNSET
    minLength: float | UnsetType = UNSET
    minItems: float | UnsetType = UNSET
    maxItems: float | UnsetType = UNSET


class _Parameters(_Schema):
    type: Literal["object"] | UnsetType = UNSET


def settings_for(
    agent_name: str, agents: Mapping[str, Agent], wanted: ClientSettings, max_bytes: int
) -> ClientSettings | None:
    """Return a copy of what the agents of a run take of *wanted*; None if that is nothing.

    These are the agent and those that can follow it. One of them is enough.

    Args:
        max_bytes: max size of *wanted*, as JSON.

    Raises:
        InvalidData: *wanted* is invalid, or no agent takes its tools, or its options although they are not the usual
            ones, or a tool has the name of one of the agent. Pointers are such as ``/tools/0/name``, ``/temperature``.
        TooLarge.
    """
    encoded = msgspec.json.encode(wanted)
    if len(encoded) > max_bytes:
        raise TooLarge(f"The instructions and tools of the client are longer than {max_bytes} bytes, with the inputs.")
    settings = _SETTINGS.decode(encoded)
    names = [agent_name, *(each.to for each in graph_of(agent_name, agents) if each.to is not None)]
    models = [agent for name in names if isinstance(agent := agents.get(name), ModelAgent)]
    takes = {part: any(agent.takes[part] for agent in models) for part in ("instructions", "tools", "options")}
    errors = list(_errors_of_tools(settings, [agent for agent in models if agent.takes["tools"]], agents))
    if settings.tools and not takes["tools"]:
        errors = [_error(f"{agent_name!r} takes no tools of clients (client_tools=). Omit them.", "/tools")]
    for name, usual in {} if takes["options"] else OPTIONS.items():
        if usual is not None and settings.options.get(name, usual) != usual:
            detail = f"{agent_name!r} does not let clients set it (client_options=). Omit it, or send {usual}."
            errors.append(_error(detail, f"/{name}"))
    if errors:
        raise InvalidData(errors)
    settings = settings.taken_by(**takes)
    return None if settings == ClientSettings() else settings


def _errors_of_tools(
    settings: ClientSettings, takers: Sequence[ModelAgent], agents: Mapping[str, Agent]
) -> Iterator[FieldError]:
    if len(msgspec.json.encode(settings.tools)) > MAX_TOOLS_BYTES:
        yield _error(f"They are longer than {MAX_TOOLS_BYTES} bytes, as JSON. Send fewer, or shorter ones.", "/tools")
        return
    seen = {FINISH: "Models end their calls with a tool of this name. Give it another one."}
    for agent in takers:
        seen |= {name: same_name(agent.name, name) for tool in agent.tools for name in _names_of(tool)}
    for number, tool in enumerate(settings.tools):
        at = f"/tools/{number}"
        if tool.name in seen:
            yield _error(seen[tool.name], f"{at}/name")
        seen[tool.name] = f"There are two tools {tool.name!r}."
        try:
            check_depth(bytes(tool.parameters), MAX_DEPTH)
            yield from explain(_Parameters, bytes(tool.parameters), f"{at}/parameters")
        except MalformedJSON as exc:
            yield _error(str(exc), f"{at}/parameters")


def _names_of(tool: Tool | ToolSource | str) -> Sequence[str]:
    if isinstance(tool, ToolSource):
        return tool.known_names
    return [tool.replace(".", "_") if isinstance(tool, str) else tool.name]


def _error(detail: str, pointer: str) -> FieldError:
    return FieldError(detail=detail, pointer=pointer)

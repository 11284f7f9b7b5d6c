"""Reasoning: a model writes its thoughts first, then its answer. Only the answer becomes the result."""

import functools
from collections.abc import Mapping
from typing import Any

import msgspec

from flock.agents.signature import Signature
from flock.jsontype import MEMBERS


@functools.cache
def _signature() -> Signature:
    return Signature.of("reasoning: str | think step by step before you answer")


class ReasonedAnswer(Signature):
    """An output signature as a model sees it: its schema has ``reasoning`` as the first member.

    ``decode`` requires that member, and removes it. ``encode`` accepts it in a mapping, for examples.
    """

    def __init__(self, output: Signature) -> None:
        super().__init__(output.fields, output.type)
        self._output = output
        self.schema = output.schema | {
            "properties": _signature().schema["properties"] | output.schema["properties"],
            "required": _signature().schema["required"] + output.schema.get("required", []),
        }

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> Any:
        try:
            members = msgspec.json.decode(raw, type=MEMBERS)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return super().decode(raw, at)  # raises the error with its location
        _signature().decode(msgspec.json.encode(_take_reasoning(members)), at)
        return super().decode(msgspec.json.encode(members), at)

    def encode(self, value: Any) -> msgspec.Raw:
        if not isinstance(value, Mapping) or "reasoning" not in value:
            return self._output.encode(value)
        answer = dict(value)
        parts = _signature().encode(_take_reasoning(answer)), self._output.encode(answer)
        reasoning, members = (msgspec.json.decode(part, type=MEMBERS) for part in parts)
        return msgspec.Raw(msgspec.json.encode(reasoning | members))


def _take_reasoning(members: dict[str, Any]) -> dict[str, Any]:
    """Remove the reasoning from *members*, and return what was removed."""
    return {"reasoning": members.pop("reasoning")} if "reasoning" in members else {}

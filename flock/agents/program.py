"""The program that uses a store, so that another one with a flock of the same name is noticed when it starts."""

import hashlib
from collections.abc import Mapping
from typing import Any, Self

import msgspec

from flock.agents.agent import Agent
from flock.agents.signature import Signature

DIGEST_CHARS = 8
#: Keywords of JSON Schema that do not belong to a type.
NOTES = ("description", "title", "examples")


class Program(msgspec.Struct, frozen=True):
    """A program, as the store knows it.

    Attributes:
        path: where its flock is defined, or "" if that is unknown.
        agents: the signature of each agent in short, by name, or "" if it is unknown.
    """

    path: str = ""
    agents: Mapping[str, str] = {}

    @classmethod
    def of(cls, path: str, agents: Mapping[str, Agent]) -> Self:
        return cls(path, {name: _in_short(agent.input, agent.output) for name, agent in agents.items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a program from the store. An older version has only stored the names of its agents."""
        try:
            stored = msgspec.json.decode(text, type=cls | list[str])
        except msgspec.DecodeError:
            return cls()
        return cls(agents=dict.fromkeys(stored, "")) if isinstance(stored, list) else stored

    def differences(self, before: "Program") -> str:
        """Describe how *before*, which has a flock of the same name, differs from this program; "" if it does not."""
        found = []
        if self.path and before.path not in ("", self.path):
            found.append(f"which is defined in {before.path} and not in {self.path}")
        if missing := [name for name in before.agents if name not in self.agents]:
            found.append(f"and with agents that this one does not have: {', '.join(missing)}")
        changed = [
            f"{name} was {signature} and is {self.agents[name]}"
            for name, signature in before.agents.items()
            if signature and self.agents.get(name, signature) != signature
        ]
        if changed:
            found.append(f"and with other signatures: {', '.join(changed)}")
        return ", ".join(found)


def _in_short(input_: Signature, output: Signature) -> str:
    """Return the names of the fields, and a digest of their names and types: ``text, limit -> mood (3f2a91bc)``."""
    types = msgspec.json.encode([_types(each.schema) for each in (input_, output)], order="deterministic")
    names = " -> ".join(", ".join(field.name for field in each.fields) for each in (input_, output))
    return f"{names} ({hashlib.sha256(types).hexdigest()[:DIGEST_CHARS]})"


def _types(node: Any) -> Any:
    """Return a JSON Schema without notes. A property may have the name of a note, but its schema is an object."""
    if isinstance(node, dict):
        return {key: _types(value) for key, value in node.items() if key not in NOTES or isinstance(value, dict)}
    return [_types(each) for each in node] if isinstance(node, list) else node

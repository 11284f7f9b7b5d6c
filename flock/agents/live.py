"""The answer of a model, reported to clients that watch the run while the model writes it."""

from collections.abc import Mapping
from typing import Any

from flock.agents.signature import Signature
from flock.models.scanner import Scanner
from flock.runs import RunContext


class LiveAnswer:
    """A ``Listener`` that emits the fields of the output.

    A field that the model reads and writes in the same form is emitted. Its text is emitted as it grows if any string
    is valid in the field, apart from limits such as its length.

    Args:
        answer: the output as the model sees it. Fields that *output* does not have are reasoning.
    """

    def __init__(self, answer: Signature, output: Signature, context: RunContext) -> None:
        results = output.result_schema["properties"]
        self._outputs = {
            name: _is_text(member)
            for name, member in output.schema["properties"].items()
            if results.get(name) == member and not member.get("writeOnly")
        }
        self._thoughts = answer.schema["properties"].keys() - output.schema["properties"].keys()
        self._context = context
        self._scanner = self._new_scanner()

    def text(self, piece: str) -> None:
        for field, value in self._scanner.feed(piece):
            if field in self._thoughts:
                if isinstance(value, str):
                    self._context.emit_reasoning(value)
            elif self._outputs[field] and isinstance(value, str):
                self._context.emit(value, field)
            else:
                self._context.emit_value(field, value)

    def reasoning(self, piece: str) -> None:
        self._context.emit_reasoning(piece)

    def reset(self) -> None:
        self._scanner = self._new_scanner()
        self._context.reset_output()

    def _new_scanner(self) -> Scanner:
        return Scanner({**self._outputs, **dict.fromkeys(self._thoughts, True)})


def _is_text(schema: Mapping[str, Any]) -> bool:
    others = ("enum", "const", "format", "contentEncoding", "contentMediaType")
    return schema.get("type") == "string" and not any(key in schema for key in others)

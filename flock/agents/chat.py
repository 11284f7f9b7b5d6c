"""The inputs of a model agent that continues a conversation."""

import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Union

import msgspec

from flock.agents.messages import ChatMessage
from flock.agents.signature import Signature
from flock.errors import DefinitionError, InvalidData
from flock.jsontype import escape_pointer
from flock.pydanticmodel import to_json


class ChatInput(Signature):
    """An input signature with one field of the type ``Messages``. Its last message must be the user's."""

    def __init__(self, input: Signature, conversation: str) -> None:
        super().__init__(input.fields, input.type)
        self._conversation = conversation

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> Any:
        inputs = super().decode(raw, at)
        messages, _ = self.split(inputs)
        if messages[-1]["role"] != "user":
            pointer = f"{at}/{escape_pointer(self._conversation)}/{len(messages) - 1}/role"
            detail = "The last message must have the role 'user', because the agent answers it."
            raise InvalidData.of(detail, pointer)
        return inputs

    def split(self, inputs: Any, shown: Callable[[Any], Any] = to_json) -> tuple[list[dict[str, str]], dict[str, Any]]:
        """Return the messages of the conversation, and the other inputs, as plain values."""
        others = msgspec.to_builtins(inputs, enc_hook=shown)
        return others.pop(self._conversation), others


def chat_input(input: Signature, owner: str) -> Signature:
    """Return *input*, as a ChatInput if it has a conversation.

    Raises: DefinitionError if there are several, or if it is optional.
    """
    found = [field for field in input.fields if _is_conversation(field.type) or _is_optional_conversation(field.type)]
    if not found:
        return input
    if len(found) > 1 or not found[0].required or not _is_conversation(found[0].type):
        names = ", ".join(repr(field.name) for field in found)
        raise DefinitionError(
            f"The inputs of {owner!r} may have one conversation, and it must be required. Check the type and the "
            f"default of {names}."
        )
    return ChatInput(input, found[0].name)


def conversation_of(input: Signature) -> str | None:
    """Return the name of the first field of the type ``Messages``, or None."""
    return next((field.name for field in input.fields if _is_conversation(field.type)), None)


def _is_conversation(type_: Any) -> bool:
    return bool((type_.__origin__ if typing.get_origin(type_) is Annotated else type_) == list[ChatMessage])


def _is_optional_conversation(type_: Any) -> bool:
    is_union = typing.get_origin(type_) in (Union, types.UnionType)
    return is_union and any(map(_is_conversation, typing.get_args(type_)))

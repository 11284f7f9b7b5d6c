"""The messages of a conversation with a model, and its replies."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec
from msgspec.structs import replace

from flock.files import FileReference
from flock.runs import Usage


class FunctionCall(msgspec.Struct, frozen=True, kw_only=True):
    """The function that a model calls. ``arguments`` should be a JSON object, but a model may write anything."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call of a model, as OpenAI's API has it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One message of a conversation.

    Attributes:
        role: system, user, assistant, or tool for the result of a tool call.
        tool_calls: those of an assistant.
        tool_call_id: the call whose result this is.
        files: those of the user, whose contents are only in what is sent.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    files: tuple[FileReference, ...] = ()


def with_user_text(messages: Sequence[Message], text: str, files: tuple[FileReference, ...] = ()) -> list[Message]:
    """Add a text of the user, with its files. Many models allow no two messages of the user in a row."""
    *rest, last = messages
    if last.role != "user":
        return [*messages, Message("user", text, files=files)]
    return [*rest, replace(last, content=f"{last.content}\n\n{text}", files=(*last.files, *files))]


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A reply of a model, and the tokens used.

    Attributes:
        text: None if the model needs no more tools, but has not written its answer.
        model: the name of the model that answered, ``provider/model``.
        instructions: those of this call, if a function returned them.
    """

    text: str | None
    usage: Usage
    tool_calls: tuple[ToolCall, ...] = ()
    model: str | None = None
    instructions: str | msgspec.UnsetType = msgspec.UNSET


class BatchCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a model through a batch endpoint.

    Attributes:
        custom_id: identifies it in the endpoint. It is the idempotency key of the call.
        target: identifies the model and its server; see ``flock.models.providers.target_of``.
        digest: of what is asked, however the request spells that.
        line: the line of the input file, as a JSON object.
    """

    custom_id: str
    target: str
    model: str
    agent_name: str
    max_tokens: int | None
    digest: str
    line: msgspec.Raw


class ToolSchema(msgspec.Struct, frozen=True, kw_only=True):
    """A tool as a model sees it.

    Attributes:
        schema: the JSON Schema of its arguments, an object.
        may_be_strict: whether the provider may be asked to enforce the schema.
    """

    name: str
    description: str
    schema: Mapping[str, Any]
    may_be_strict: bool = True


class Listener(Protocol):
    """Receives a reply while a model writes it."""

    def text(self, piece: str) -> None:
        """Receive more of the answer, which is JSON. If calls of tools follow, it was not the answer."""

    def reasoning(self, piece: str) -> None:
        """Receive more of the model's thoughts, which are not part of the answer."""

    def reset(self) -> None:
        """Forget the text so far. A request begins, maybe again."""

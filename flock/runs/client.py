"""What a client brings to its run, as OpenAI's API has it: instructions, tools, and options of the model."""

from typing import Annotated, Any, TypedDict

import msgspec

__all__ = ["ClientSettings", "ClientTool", "ModelOptions"]

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]

#: The options that only an agent with ``client_options=True`` takes, with their value at which models behave as usual.
OPTIONS = {"temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "seed": None}


class ModelOptions(TypedDict, total=False):
    """Options of a model, for an agent or for one call of ``RunContext.run_agent``, under the names of OpenAI's API.

    ``tool_choice`` is "auto", "required", "none" or the name of a tool. After the first calls of a step it is "auto".
    ``extra_body`` has other members of the request's body. A provider may reject an option that it does not know.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)]
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)]
    presence_penalty: Penalty
    frequency_penalty: Penalty
    seed: int
    stop: list[str]
    reasoning_effort: str
    tool_choice: str
    parallel_tool_calls: bool
    extra_body: dict[str, Any]


class ClientTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the client executes.

    Attributes:
        name: 1 to 64 letters, digits, ``_`` and ``-``.
        parameters: the JSON Schema of its arguments, an object.
        strict: whether the provider is asked to enforce the schema, if it can.
    """

    name: Name
    description: str = ""
    parameters: msgspec.Raw = msgspec.Raw(b'{"type":"object","properties":{}}')
    strict: bool = False


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a client brings to its run. It applies to the agents of the run's steps, and not to those that they call.

    Attributes:
        instructions: for the model, after those of the agent.
        tools: up to 128. A call of one is a question of the kind "client_tool", whose answer is its output, a text.
        max_output_tokens: max tokens in each answer of a model; an agent's own ``max_tokens`` may be lower.
        temperature, top_p, presence_penalty, frequency_penalty, seed: as the provider has them.
        message_id: the client's id of the message that the run answers. No model gets it.
    """

    instructions: str | None = None
    tools: Annotated[tuple[ClientTool, ...], msgspec.Meta(max_length=128)] = ()
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**31)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    message_id: str | None = None

    def taken_by(self, *, instructions: bool, tools: bool, options: bool) -> "ClientSettings":
        """Return the settings without those that an agent does not take."""
        left_out: dict[str, Any] = {} if options else dict.fromkeys(OPTIONS)
        left_out |= {} if instructions else {"instructions": None}
        return msgspec.structs.replace(self, **left_out, **({} if tools else {"tools": ()}))

    @property
    def options(self) -> dict[str, Any]:
        """The options for the model that are set, without the limit of tokens."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}

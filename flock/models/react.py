"""Tool calls of models that cannot call tools: they are asked for their next step as JSON.

The step has ``next_thought``, ``next_tool_name`` and ``next_tool_args``. After the tool ``finish``, the model is asked
for its answer.

Source: ReAct (arXiv:2210.03629), in the form of DSPy's ``dspy.ReAct``.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.models.completions import Completion, FunctionCall, Message, ToolCall, ToolSchema, with_user_text

#: The tool that ends the calls.
FINISH = "finish"
FINISH_TOOL = ToolSchema(
    name=FINISH,
    description="You know everything that the answer needs. You write the answer next.",
    schema={"type": "object", "properties": {}, "additionalProperties": False},
)


class _Step(msgspec.Struct):
    next_tool_name: str
    next_thought: str = ""
    next_tool_args: dict[str, Any] = {}


def schema_of(tools: Sequence[ToolSchema]) -> dict[str, Any]:
    """Return the JSON Schema of a step, with the arguments of each tool."""
    steps = [
        {
            "type": "object",
            "properties": {
                "next_thought": {"type": "string"},
                "next_tool_name": {"enum": [tool.name], "type": "string"},
                "next_tool_args": {key: value for key, value in tool.schema.items() if key != "$defs"},
            },
            "required": ["next_thought", "next_tool_name", "next_tool_args"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    definitions = {name: node for tool in tools for name, node in tool.schema.get("$defs", {}).items()}
    return {"anyOf": steps} | ({"$defs": definitions} if definitions else {})


def with_tools(messages: Sequence[Message], tools: Sequence[ToolSchema]) -> list[Message]:
    """Return *messages* with a description of the tools and of a step at the end, where small models follow it best."""
    described = "\n".join(
        f"- {tool.name}: {tool.description} Arguments: {json.dumps(tool.schema.get('properties', {}))}"
        for tool in tools
    )
    *rest, last = messages
    instruction = (
        f"Before you answer, you can call tools, one at a time:\n{described}\n"
        "Write only your next step now, as a JSON object with next_thought, next_tool_name and next_tool_args."
    )
    return [*rest, replace(last, content=f"{last.content}\n\n{instruction}")]


def as_text(messages: Sequence[Message]) -> list[Message]:
    """Return *messages* with tool calls and their results as text of the assistant and the user."""
    names: dict[str, str] = {}
    texts: list[Message] = []
    for message in messages:
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            steps = [_step_text(message.content, call) for call in message.tool_calls]
            texts.append(Message("assistant", "\n".join(steps)))
        elif message.role == "tool":
            result = f"{names.get(message.tool_call_id or '', 'The tool')} returned: {message.content}"
            texts = with_user_text(texts, result)
        elif message.role == "user" and names:
            texts = with_user_text(texts, message.content, message.files)
        else:
            texts.append(message)
    return texts


def _step_text(thought: str, call: ToolCall) -> str:
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = call.function.arguments
    step = {"next_thought": thought, "next_tool_name": call.function.name, "next_tool_args": arguments}
    return json.dumps(step, ensure_ascii=False)


def completion_of(completion: Completion) -> Completion:
    """Return the step in *completion* as a tool call. A text that is not a step may be the answer."""
    try:
        step = msgspec.json.decode(completion.text or "", type=_Step)
    except (msgspec.DecodeError, RecursionError):
        return completion
    if step.next_tool_name == FINISH:
        return replace(completion, text=None)
    function = FunctionCall(name=step.next_tool_name, arguments=json.dumps(step.next_tool_args))
    return replace(completion, text=step.next_thought, tool_calls=(ToolCall(id="call_0", function=function),))

"""Hooks of a flock: functions around each call of a model or of a tool."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.functions import OwnFunction, watched
from flock.agents.signature import is_async, name_of
from flock.errors import CallError, DefinitionError
from flock.models.completions import Completion, Message
from flock.models.requests import Request
from flock.runs import RunContext, Usage


class ModelCall(msgspec.Struct, kw_only=True):
    """A request to a model, which a hook may change.

    Attributes:
        messages: the first one is that of the system.
        options: see ``ModelOptions``.
        tools: the names of the tools that the model may call.
    """

    messages: list[Message]
    options: dict[str, Any]
    tools: Sequence[str] = ()


class ToolUse(msgspec.Struct, kw_only=True):
    """A call of a tool, which a hook may change. The arguments are JSON values."""

    name: str
    arguments: dict[str, Any]


class Hook(OwnFunction):
    """An async function of a call, of what makes the call, and of the context if it has one more parameter.

    Raises: DefinitionError if it is not such a function.
    """

    def __init__(self, event: str, function: Any) -> None:
        super().__init__(f"The hook {name_of(function)!r} ({event})", function, 2)
        if not is_async(function):
            raise DefinitionError(f"{self.option} must be an async function, since it awaits the call.")

    async def around(self, call: Any, make: Callable[..., Awaitable[Any]], context: RunContext) -> Any:
        return await watched(self.bound(call, make, context=context)(), self.option)


async def with_model_hooks(
    hooks: Sequence[Hook], complete: Callable[[Request], Awaitable[Completion]], request: Request, context: RunContext
) -> Completion:
    """Send *request* through *hooks*, the first one outermost, and return the reply or what replaces it."""
    if not hooks:
        return await complete(request)
    hook, *others = hooks
    asked = 0

    async def ask(changed: ModelCall | None = None) -> Completion:
        nonlocal asked
        asked, sent, key = asked + 1, changed or call, request.idempotency_key
        key = f"{key}/again{asked}" if key and asked > 1 else key  # a provider may repeat its answer to the same key
        options = {"messages": sent.messages, "options": sent.options, "max_tokens": sent.options.get("max_tokens")}
        inner = replace(request, **options, idempotency_key=key)
        return await with_model_hooks(others, complete, inner, context)

    tools = [tool.name for tool in request.tools]
    call = ModelCall(
        messages=list(request.messages), options={**request.options, "max_tokens": request.max_tokens}, tools=tools
    )
    reply = await hook.around(call, ask, context)
    if isinstance(reply, str):
        return Completion(text=reply, usage=Usage())
    if not isinstance(reply, Completion):
        raise CallError(f"{hook.option} returned {type(reply).__name__}. Return what the call returns, or a text.")
    return reply


async def with_tool_hooks(
    hooks: Sequence[Hook], execute: Callable[[Mapping[str, Any]], Awaitable[Any]], use: ToolUse, context: RunContext
) -> Any:
    """Call a tool through *hooks*, the first one outermost, and return its result or what replaces it."""
    if not hooks:
        return await execute(use.arguments)
    hook, *others = hooks

    async def call(changed: ToolUse | None = None) -> Any:
        return await with_tool_hooks(others, execute, changed or use, context)

    return await hook.around(use, call, context)

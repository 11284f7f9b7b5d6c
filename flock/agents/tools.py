"""Tools: functions that a model may call before it answers."""

import functools
import inspect
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol, TypedDict, Unpack, runtime_checkable

import anyio
import msgspec
from msgspec.structs import replace

from flock.agents.foreign import AnyArguments
from flock.agents.functions import stored_call
from flock.agents.hooks import Hook, ToolUse, with_tool_hooks
from flock.agents.secret import hidden, sealed, unsealed
from flock.agents.signature import Signature, called, context_parameter, is_async, is_generator, name_of
from flock.errors import CallError, DefinitionError, InvalidData, MalformedJSON, StepError
from flock.models.completions import Completion, Message, ToolCall, ToolSchema
from flock.models.pace import Caller, wait
from flock.models.react import FINISH
from flock.nearest import did_you_mean
from flock.pydanticmodel import to_json
from flock.runs import ClientTool, RunContext, bad_role, one_line, safe_text
from flock.runs.text import of_request
from flock.scopes import current_task, move_on_after_working

logger = logging.getLogger("flock.runs")

#: Names of tools that all providers accept.
NAME = r"[A-Za-z0-9_-]{1,64}"
#: The first and the longest pause before the tools of a source are listed again, in seconds.
LIST_PAUSE_S, MAX_LIST_PAUSE_S = 0.5, 8.0
#: How long a question may be open, in seconds: ten years.
MAX_EXPIRES_S = 10 * 365 * 86_400
#: How long a run waits for the output of a client's tool, in seconds: a day.
CLIENT_EXPIRES_S = 86_400
#: The answer if a call was not approved in time.
DENIED_LATE = {"approved": False, "reason": "Nobody answered in time."}
#: Max characters of a result that a model reads.
MAX_RESULT_CHARS = 50_000


class Approval(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a person must allow the calls of a tool first, and who; see ``Tool``.

    Raises: DefinitionError.
    """

    needs_approval: bool | Callable[..., bool | Awaitable[bool]] = False
    approver: str | None = None
    four_eyes: bool = False
    may_edit: bool | None = None
    expires_s: float | None = None
    on_expiry: Literal["fail", "deny"] = "fail"

    def __post_init__(self) -> None:
        others = [name for name, value in msgspec.structs.asdict(self).items() if value not in (None, False, "fail")]
        if not self.needs_approval and others:
            raise DefinitionError(f"{others[0]}= has no effect without needs_approval=, so nobody is asked. Pass both.")
        if self.approver is not None and (problem := bad_role(self.approver)):
            raise DefinitionError(f"approver={problem}")
        if self.on_expiry not in ("fail", "deny"):
            raise DefinitionError(f"on_expiry= must be 'fail' or 'deny', not {self.on_expiry!r}.")
        if self.expires_s is not None and not 0 < self.expires_s <= MAX_EXPIRES_S:
            raise DefinitionError(
                f"expires_s= must be above 0 and at most {MAX_EXPIRES_S} seconds, not {self.expires_s!r}."
            )
        if self.on_expiry == "deny" and self.expires_s is None:
            raise DefinitionError("on_expiry='deny' has no effect without expires_s=. Pass both.")

    @property
    def is_restricted(self) -> bool:
        """Whether it depends on who answers."""
        return self.approver is not None or self.four_eyes

    @property
    def can_edit(self) -> bool:
        """Whether the person may change the arguments."""
        return self.approver is None if self.may_edit is None else self.may_edit


class ApprovalOptions(TypedDict, total=False):
    """The fields of ``Approval``, as options."""

    needs_approval: bool | Callable[..., bool | Awaitable[bool]]
    approver: str | None
    four_eyes: bool
    may_edit: bool | None
    expires_s: float | None
    on_expiry: Literal["fail", "deny"]


@runtime_checkable
class AsTool(Protocol):
    """An agent."""

    def as_tool(self) -> "AgentTool": ...


class Tool:
    """A function that a model may call.

    Args:
        function: a function, a method or an object that can be called. It is async, or runs in a worker thread. Its
            parameters have types, and may have descriptions: ``Annotated[str, "an ISO code"]``. A parameter annotated
            with ``RunContext`` receives the context, and is not an argument. The result must be convertible to JSON.
            Or an agent of the same flock.
        name: 1 to 64 letters, digits, ``_`` and ``-``; None uses the function's name.
        description: for the model: when to call it; None uses the first paragraph of the docstring.
        needs_approval: whether a person must allow each call first; or a function that decides. It receives the
            arguments by name, without the context, and runs in the event loop, or is async. What an async one has
            decided is stored. The run waits as for ``RunContext.ask``. The person can allow the call, deny it with a
            reason, which the model reads, or change the arguments.
        approver: the role of those who may allow it, 1 to 64 letters, digits and ``_.@-``; None means the owner of the
            run and admins. The role is one of ``Principal``, or of an API key.
        four_eyes: whether the principals who started or retried the run are excluded.
        may_edit: whether the person may change the arguments; None means only without *approver*.
        expires_s: how long to wait for the person, in seconds. By default without a limit.
        on_expiry: "fail" fails the run as "expired" if it is not answered in time; "deny" denies the call.
        once: whether a call is never executed a second time; see ``call_once`` of ``RunContext.call``. If its
            end is not stored, the step raises Uncertain, which the model does not read.
        secret: the names of parameters whose values people neither see nor change. They are stored encrypted, in the
            reply of the model. Its texts, and what the function returns, are stored as they are.

    Raises:
        DefinitionError: it is not a function or an agent, or its name is invalid, or an option of the approval is, or
            it has no parameter that *secret* names.
        SignatureError: a parameter has no type, or its type cannot be read from JSON.
    """

    #: whether the schema is one of ours, which a provider can enforce
    may_be_strict = True
    name: str
    description: str
    parameters: Signature
    approval = Approval()
    once = False
    secret: Sequence[str] = ()
    function: Any = None

    def __init__(
        self,
        function: "Callable[..., Any] | AsTool",
        *,
        name: str | None = None,
        description: str | None = None,
        once: bool = False,
        secret: Sequence[str] = (),
        **approval: Unpack[ApprovalOptions],
    ) -> None:
        self.function = function
        self.approval = Approval(**approval)
        self.once = once
        if isinstance(function, AsTool):
            made = function.as_tool()
            if once:
                raise DefinitionError(f"{made.name!r} is an agent, so it cannot be a tool with once=True.")
            if secret:
                raise DefinitionError(f"{made.name!r} is an agent, so it cannot be a tool with secret=.")
            self.name = made.name if name is None else _checked_name(name)
            self.description = made.description if description is None else description
            self.parameters = made.parameters
            return
        if not callable(function) or inspect.isclass(function):
            raise DefinitionError(f"{function!r} is not a tool. Pass a typed function, an agent, or mcp_tools(…).")
        if is_generator(function):
            raise DefinitionError(f"{function!r} is a generator. A tool must return its complete result.")
        self.name = _checked_name(name_of(function) if name is None else name)
        if description is None:
            documented = function.func if isinstance(function, functools.partial) else function
            description = " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())
        self.description = description
        self.parameters = Signature.of_parameters(function)
        self.secret = _checked_secret(self.name, secret, self.parameters)
        self._context_parameter = context_parameter(function)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def schema(self) -> ToolSchema:
        """The tool as a model sees it."""
        return ToolSchema(
            name=self.name,
            description=self.description,
            schema=self.parameters.schema,
            may_be_strict=self.may_be_strict,
        )

    def shown(self, arguments: msgspec.Raw, key: str) -> msgspec.Raw:
        """Return *arguments* as people see them. *key*: see ``Run.call_key``."""
        return hidden(arguments, self.secret, key) if self.secret else arguments

    def changed(self, arguments: Any, by_person: Any) -> Any:
        """Return *arguments* with what a person has changed."""
        if not self.secret:
            return by_person
        return msgspec.structs.replace(arguments, **msgspec.structs.asdict(by_person))

    async def must_be_approved(self, arguments: Any, number: str, toolbox: "Toolbox") -> bool:
        """Whether a person must allow a call with *arguments*.

        If the step runs again, an async function could decide otherwise, so its decision is stored.

        Raises: what the tool's function for this raises; CallError if it does not end within ``timeout_s``.
        """
        decide = self.approval.needs_approval
        if not callable(decide):
            return decide
        values = arguments if isinstance(arguments, dict) else msgspec.structs.asdict(arguments)
        if not is_async(decide):
            return bool(decide(**values))

        async def decided() -> bool:
            with move_on_after_working(toolbox.timeout_s):
                return bool(await decide(**values))  # type: ignore[misc]
            raise CallError(
                f"needs_approval= of {self.name!r} did not end within {toolbox.timeout_s:g} s (tool_timeout_s)."
            )

        return await stored_call(toolbox.context, "needs_approval", f"{self.name}.{number}", decided, bool)

    async def execute(self, arguments: Any, toolbox: "Toolbox") -> Any:
        """Call the function with *arguments*, which ``parameters`` has decoded.

        Raises: CallError if it does not end within ``timeout_s`` of the toolbox, not counting the wait for answers of
            people; any exception of the function.
        Cancellation: a coroutine is cancelled. A thread runs to its end first, or until the timeout.
        """
        with move_on_after_working(toolbox.timeout_s):
            return await self.call(arguments, toolbox)
        raise CallError(f"{self.name!r} did not end within {toolbox.timeout_s:g} s (tool_timeout_s).")

    async def call(self, arguments: Any, toolbox: "Toolbox") -> Any:
        """Call the function, without a timeout of its own."""
        values = msgspec.structs.asdict(arguments)
        if self._context_parameter is not None:
            values[self._context_parameter] = toolbox.context
        call = functools.partial(self.function, **values)
        return await called(call, toolbox.call_in_thread, anyio.current_effective_deadline())


class AgentTool(Tool):
    """Another agent of the same flock. It has its own limits of time, so ``tool_timeout_s`` does not apply."""

    def __init__(self, agent_name: str, description: str, inputs: Signature, tool: Tool | None = None) -> None:
        self.name = _checked_name(agent_name.replace(".", "_")) if tool is None else tool.name
        self.description = description if tool is None else tool.description
        self.parameters = inputs
        self.agent_name = agent_name
        self.approval = self.approval if tool is None else tool.approval

    async def execute(self, arguments: Any, toolbox: "Toolbox") -> Any:
        return await toolbox.context.run_agent(self.agent_name, msgspec.to_builtins(arguments, enc_hook=to_json))


class ToolOfClient(Tool):
    """A tool that the client executes: a call waits for its output. Nothing checks its arguments and its output."""

    def __init__(self, tool: ClientTool) -> None:
        self.name, self.description, self.may_be_strict = tool.name, tool.description, tool.strict
        self.parameters = AnyArguments(msgspec.json.decode(tool.parameters))


def same_name(agent_name: str, tool_name: str) -> str:
    """Return what is wrong if a tool of the client is called like one of the agent, in words."""
    return f"{agent_name!r} has a tool {tool_name!r} of its own. Give the tool of the client another name."


def _checked_secret(tool: str, names: Sequence[str], parameters: Signature) -> Sequence[str]:
    known = [field.name for field in parameters.fields]
    if isinstance(names, str):
        raise DefinitionError(f"secret= of the tool {tool!r} must be a list of parameters, such as [{names!r}].")
    for name in names:
        if name not in known:
            raise DefinitionError(
                f"The tool {tool!r} has no parameter {name!r} for secret=.{did_you_mean(name, known)}"
            )
    return tuple(names)


def _checked_name(name: str) -> str:
    if name == "<lambda>":
        raise DefinitionError("A lambda has no name that a model can call. Use a named function.")
    if not re.fullmatch(NAME, name):
        raise DefinitionError(f"{name!r} is not a valid tool name. Use 1 to 64 letters, digits, '_' and '-'.")
    if name == FINISH:
        raise DefinitionError(f"A tool cannot be called {FINISH!r}: models end their calls with it. Rename it.")
    return name


class Unlisted(CallError):
    """The tools of a source cannot be listed now. A later attempt may succeed."""


class ToolSource:
    """Tools that are known at run time only."""

    approval = Approval()

    @property
    def known_names(self) -> Sequence[str]:
        """The names of the tools, as far as they are known now."""
        return ()

    async def tools(self) -> Sequence[Tool]:
        """Return the tools. Raises CallError if they cannot be listed; Unlisted if another attempt may succeed."""
        raise NotImplementedError

    async def tools_in_time(self, context: RunContext) -> Sequence[Tool]:
        """Return the tools. Retry until the caller's deadline if they cannot be listed now. Raises CallError."""
        pause_s = LIST_PAUSE_S
        while True:
            try:
                return await self.tools()
            except Unlisted as exc:
                if anyio.current_time() + pause_s > anyio.current_effective_deadline():
                    raise
                await wait(pause_s, Caller(on_wait=context.report_wait), f"{exc} Waiting to try again")
                pause_s = min(2 * pause_s, MAX_LIST_PAUSE_S)


class Toolbox(msgspec.Struct):
    """The tools of one step, by name, what they need, and the number of calls that were made."""

    tools: Mapping[str, Tool]
    max_calls: int
    timeout_s: float
    context: RunContext
    call_in_thread: Callable[..., Awaitable[Any]]
    hooks: Sequence[Hook] = ()
    calls_made: int = 0

    @property
    def offered(self) -> Sequence[ToolSchema]:
        """The tools that the model may call now."""
        return [tool.schema for tool in self.tools.values()] if self.calls_made < self.max_calls else []

    def close(self) -> None:
        """Offer no more tools."""
        self.calls_made = self.max_calls

    def sealed(self, reply: Completion) -> Completion:
        """Return *reply* as it is stored: the arguments of tools with secrets are encrypted."""
        return self._with_arguments(reply, sealed)

    def unsealed(self, reply: Completion) -> Completion:
        """Return a stored *reply*. Raises CallError if it was changed."""
        return self._with_arguments(reply, unsealed)

    def _with_arguments(self, reply: Completion, convert: Callable[[str, str], str]) -> Completion:
        key = self.context.journal.call_key

        def converted(call: ToolCall) -> ToolCall:
            tool = self.tools.get(call.function.name)
            if tool is None or not tool.secret:
                return call
            return replace(call, function=replace(call.function, arguments=convert(call.function.arguments, key)))

        return replace(reply, tool_calls=tuple(map(converted, reply.tool_calls)))

    async def results(self, calls: Sequence[ToolCall], reply_number: int) -> list[Message]:
        """Make the calls of one reply of the model, at the same time. Return a message for each of them, in order."""
        refused = f"Error: Not called, because only {self.max_calls} calls are possible (max_tool_calls)."
        texts = [refused] * len(calls)
        made = calls[: self.max_calls - self.calls_made]
        self.calls_made += len(made)

        async def make(number: int, call: ToolCall) -> None:
            try:
                texts[number] = _cut(await self._result(call, f"{reply_number}.{number + 1}"))
            except (SystemExit, KeyboardInterrupt) as exc:  # asyncio would end its loop, since this is a task
                raise CallError(f"needs_approval= of {call.function.name!r} raised {type(exc).__name__}.") from exc

        try:
            async with anyio.create_task_group() as tasks:
                for number, call in enumerate(made):
                    tasks.start_soon(make, number, call)
        except ExceptionGroup as group:  # the store failed, which is one error for the run
            raise group.exceptions[0] from group
        return [Message("tool", text, tool_call_id=call.id) for call, text in zip(calls, texts, strict=True)]

    async def _executed(self, tool: Tool, arguments: Any) -> Any:
        """Execute a tool through the hooks. Raises: what it and they raise; InvalidData for changed arguments."""
        if not self.hooks:
            return await tool.execute(arguments, self)

        async def execute(changed: Mapping[str, Any]) -> Any:
            return await tool.execute(tool.parameters.decode(tool.parameters.encode(changed)), self)

        use = ToolUse(name=tool.name, arguments=msgspec.json.decode(tool.parameters.encode(arguments)))
        return await with_tool_hooks(self.hooks, execute, use, self.context)

    async def _result(self, call: ToolCall, number: str) -> str:
        """Return what the model reads as the result of a call."""
        name, raw = call.function.name, (call.function.arguments.strip() or "{}").encode()
        tool = self.tools.get(name)
        if tool is None:
            return f"Error: There is no tool {name[:64]!r}.{did_you_mean(name[:64], self.tools)}"
        try:
            arguments = tool.parameters.decode(raw)
        except (MalformedJSON, InvalidData) as exc:
            return f"Error: The arguments are invalid. {one_line(str(exc))}"
        context, changed = self.context, ""
        if isinstance(tool, ToolOfClient):
            key, about = f"{name}.{number}", msgspec.Raw(raw)
            output: str = await context.journal.ask(
                context, name, str, key, CLIENT_EXPIRES_S, msgspec.UNSET, about, kind="client_tool"
            )
            return output
        shown = tool.shown(msgspec.Raw(raw), context.journal.call_key)
        if await tool.must_be_approved(arguments, number, self):
            approval = await self._approval(tool, number, shown)
            if not approval.approved:
                return f"A person denied this call. {approval.reason}".strip()
            if getattr(approval, "arguments", None) is not None:
                arguments = tool.changed(arguments, approval.arguments)
                shown = tool.shown(tool.parameters.encode(arguments), context.journal.call_key)
                changed = f"A person changed the arguments to {bytes(shown).decode()}. The result: "
        value = await context.journal.once(
            tool.name,
            number,
            functools.partial(self._logged, tool, arguments),
            kind="tool",
            arguments=shown,
            decode=msgspec.json.decode,
            on_error=lambda error: f"Error: {one_line(error)}",
            at_most_once=tool.once,
        )
        return changed + (value if isinstance(value, str) else msgspec.json.encode(value).decode())

    async def _approval(self, tool: Tool, number: str, shown: msgspec.Raw) -> Any:
        """Ask a person whether a call may be executed, and return the answer; see ``_approval_type``."""
        context, rules = self.context, tool.approval
        return await context.journal.ask(
            context,
            f"May {context.agent_name} call {tool.name}?",
            _approval_type(tool),
            f"{tool.name}.{number}",
            rules.expires_s,
            DENIED_LATE if rules.on_expiry == "deny" else msgspec.UNSET,
            shown,
            rules.approver,
            four_eyes=rules.four_eyes,
        )

    async def _logged(self, tool: Tool, arguments: Any) -> Any:
        """Execute a tool, and log how it fails. Raises: see ``_executed``; CallError, see ``_not_cancelled``."""
        try:
            return await _not_cancelled(tool.name, self._executed(tool, arguments))
        except (Exception, SystemExit, KeyboardInterrupt) as exc:  # the journal makes an error of an exit
            context, details = self.context, None if isinstance(exc, StepError) else exc
            values = context.run_id, tool.name, one_line(safe_text(exc)), of_request(context.request_id)
            logger.warning("run %s: the tool %s failed: %s%s", *values, exc_info=details)
            raise


async def _not_cancelled(name: str, call: Awaitable[Any]) -> Any:
    """Await *call*. Raise CallError if it raises CancelledError although nobody has cancelled this task."""
    try:
        return await call
    except anyio.get_cancelled_exc_class() as exc:
        if anyio.current_effective_deadline() == -math.inf:
            raise
        task = current_task()
        if task is not None and task.cancelling():  # the event loop is ending
            raise
        raise CallError(f"{name!r} raised CancelledError, because something that it awaited was cancelled.") from exc


def _approval_type(tool: Tool) -> type[msgspec.Struct]:
    """Return the type of a person's answer: whether a call is allowed, a reason for the model, and other arguments."""
    reason = Annotated[str, msgspec.Meta(description="the model reads it if the call is denied")]
    about_arguments = msgspec.Meta(description="in place of the model's arguments")
    parameters = tool.parameters
    if tool.secret:
        parameters = Signature([each for each in parameters.fields if each.name not in tool.secret], name=tool.name)
    arguments: Any = Annotated[parameters.type | None, about_arguments]
    fields: list[Any] = [("approved", bool), ("reason", reason, "")]
    if tool.approval.can_edit:
        fields.append(("arguments", arguments, None))
    return msgspec.defstruct("Approval", fields, forbid_unknown_fields=True)


def by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Return *tools* by name. Raises DefinitionError if two have the same name."""
    named: dict[str, Tool] = {}
    for tool in tools:
        if tool.name in named:
            raise DefinitionError(
                f"There are two tools {tool.name!r}. Rename one: Tool(function, name=…), or mcp_tools(url, prefix=…)."
            )
        named[tool.name] = tool
    return named


def _cut(text: str) -> str:
    if len(text) <= MAX_RESULT_CHARS:
        return text
    return f"{text[:MAX_RESULT_CHARS]}… (cut: {len(text) - MAX_RESULT_CHARS} more characters)"

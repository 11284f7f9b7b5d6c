"""Agents. Each step of a run is executed by one agent.

An agent has a name, an input signature and an output signature. It calls a model (``ModelAgent``) or a function
(``FunctionAgent``, created by ``@agent``). ``next_agent`` selects the agent for the next step.
"""

import contextlib
import functools
import inspect
import json
import re
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, get_args, overload

import msgspec

from flock.agents.chat import ChatInput, chat_input
from flock.agents.conversation import Conversation, Verdict
from flock.agents.functions import OwnFunction, stored_call
from flock.agents.history import EDIT, Exchange, History, checked_messages, edited_by, messages_of
from flock.agents.live import LiveAnswer
from flock.agents.options import checked_options
from flock.agents.reasoning import ReasonedAnswer
from flock.agents.result import Result
from flock.agents.shared import Shared
from flock.agents.signature import (
    Signature,
    called,
    context_parameter,
    hints_of_function,
    is_async,
    is_generator,
    name_of,
)
from flock.agents.tools import AgentTool, Tool, Toolbox, ToolOfClient, ToolSource, by_name, same_name
from flock.agents.union import UnionOutput
from flock.errors import (
    AgentError,
    CallError,
    DefinitionError,
    InvalidData,
    InvalidHandoff,
    InvalidOutput,
    MalformedJSON,
    ModelError,
    cut,
)
from flock.files import File, FileReference
from flock.models.completions import Completion, Message, with_user_text
from flock.models.llm import ModelClient
from flock.models.models import Model, ModelChoice, models_of, names_of
from flock.models.pace import Caller
from flock.models.pieces import Joiner
from flock.models.providers import check_batch
from flock.models.requests import Request, check_strict
from flock.nearest import did_you_mean
from flock.options import WEBHOOK_URL, check
from flock.pydanticmodel import to_json
from flock.renamed import renamed
from flock.runs import ClientSettings, ModelOptions, RetriedCalls, RunContext, safe_text
from flock.scopes import closing_scopes, move_on_after_working

__all__ = ["Agent", "AgentOptions", "FunctionAgent", "Handoff", "ModelAgent", "NextAgent"]
__all__ += ["OnChange", "OnInterrupt", "Resources", "ToolLike", "agent"]

OnInterrupt = Literal["retry", "fail"]
OnChange = Literal["stop", "continue"]

#: The next agent: a name; or a mapping from each value of one output field to a name, an agent or None, optionally in a
#: mapping that names the field; or a function of the result that returns a name, an agent or None. The function runs in
#: the event loop.
NextAgent = (
    str
    | Mapping[str, "str | Agent | None"]
    | Mapping[str, Mapping[str, "str | Agent | None"]]
    | Callable[[dict[str, Any]], Any]
    | None
)


#: Max characters of the instructions that a function returns.
MAX_INSTRUCTIONS_CHARS = 100_000


async def _no_history(agent: "Agent", limit: int, has_calls: bool = False) -> Sequence[Exchange]:
    return ()


class Resources(msgspec.Struct, frozen=True):
    """The resources that an engine provides to each step."""

    #: calls models
    models: ModelClient
    #: calls a synchronous function in a worker thread, and waits for it until an optional deadline of the loop's clock
    call_in_thread: Callable[..., Awaitable[Any]]
    #: returns up to as many of an agent's last turns in completed runs of the session, oldest first; optionally with
    #: their calls
    history: Callable[..., Awaitable[Sequence[Exchange]]] = _no_history
    #: the agents of the flock, by name
    agents: "Mapping[str, Agent]" = {}
    #: what they share
    shared: Shared = Shared()
    #: whether calls of models may wait for a batch endpoint
    has_batches: bool = False


class Handoff(msgspec.Struct, frozen=True, kw_only=True):
    """What can follow a step of the agent ``from``. ``to`` is the next agent; None ends the run.

    ``kind`` is "fixed" if it always follows, and "value" if it follows when the output *field* has *value*. It is
    "function" if a function of the result decides: the next agent is not known in advance, and ``to`` is None.
    """

    from_: str = msgspec.field(name="from")
    to: str | None
    kind: Literal["fixed", "value", "function"]
    field: str | None
    value: str | None


class Agent:
    """The base class of all agents. Subclasses implement ``execute``.

    Attributes:
        output_names: the fields of its output, and first the one that is written if no field is named.
        uses_context: whether it may make calls, report progress or use tokens. A function without a context cannot.
        may_ask: whether it may ask a person. A model without tools cannot.

    Args:
        name: unique in its flock. It consists of letters, digits, ``_``, ``-`` and ``.``, because it is part of URLs.
        description: shown to people, and part of a model's prompt.
        next_agent: the agent that receives the result; None ends the run. A mapping has an entry for each value of one
            required output field of a ``Literal`` type, or an enum of strings: ``{"billing": "billing_agent", "other":
            None}``. If there are several such fields, name one: ``{"category": {"billing": …, "other": None}}``.
        max_concurrency: max concurrent steps of this agent in one process; None means no separate limit.
        on_interrupt: how to handle a run whose process died in a step of this agent. "retry" repeats the step. "fail"
            fails the run; use it for work that must not be repeated.
        on_change: what happens if a step of this agent runs again, and makes another call than before where it had
            made one, because the program was changed. "stop" fails the run as "changed_program" before that call.
            "continue" executes it; the log names what was not repeated.
        on_retry: what a retry of a run does with the calls that a step of this agent has made. "keep" executes only
            those again that failed. "again" executes all of them again; use it for a workflow that undoes its work
            if it fails.
        version: identifies what the agent does. A batch with ``reuse`` takes results of earlier batches only if this
            and the rest of the definition are equal. Functions, and agents with tools or a history, need one for that.
        webhook_url: where the events of its runs and batches are sent, in place of that of the flock.

    Raises:
        DefinitionError: the name is invalid, or ``next_agent`` is a mapping that does not match the output signature.
    """

    uses_context = True
    may_ask = True

    @renamed(retry="on_retry")
    def __init__(
        self,
        name: str,
        input: Signature,
        output: Signature,
        *,
        description: str = "",
        next_agent: NextAgent = None,
        max_concurrency: int | None = None,
        on_interrupt: OnInterrupt = "retry",
        on_change: OnChange = "stop",
        on_retry: RetriedCalls = "keep",
        version: str | None = None,
        webhook_url: str | None = None,
    ) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise DefinitionError(f"{name!r} is not a valid agent name. Use letters, digits, '_', '-' and '.'.")
        _check_text(description, f"description= of {name!r}")
        if on_retry not in get_args(RetriedCalls):
            raise DefinitionError(f"on_retry= of {name!r} must be 'keep' or 'again', not {on_retry!r}.")
        check("an agent", "webhook_url", webhook_url, WEBHOOK_URL)
        self.name = name
        self.description = description
        self.input = input
        self.output = output
        self.output_names = _output_names(output)
        self.next_agent = next_agent
        self.max_concurrency = max_concurrency
        self.on_interrupt = on_interrupt
        self.on_change = on_change
        self.on_retry = on_retry
        self.version = version
        self.webhook_url = webhook_url

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    @property
    def next_agent(self) -> NextAgent:
        return self._next_agent

    @next_agent.setter
    def next_agent(self, chosen: NextAgent) -> None:
        self._branches = _branches(self, chosen) if isinstance(chosen, Mapping) else None
        self._next_agent = chosen

    def as_tool(self, tool: Tool | None = None) -> AgentTool:
        """Return this agent as a tool, with the options of *tool*.

        Raises: DefinitionError if its name is too long, or it may not be repeated.
        """
        if self.on_interrupt == "fail":
            raise DefinitionError(
                f"{self.name!r} may not be repeated (on_interrupt='fail'), so it cannot be a tool. Hand off to it with "
                "next_agent= instead."
            )
        return AgentTool(self.name, self.description, self.input, tool)

    def handoffs(self) -> list[Handoff]:
        """Return what can follow a step of this agent: one entry, or one for each value of a mapping, in order."""
        if self._branches is not None:
            field, names = self._branches
            return [
                Handoff(from_=self.name, to=to, kind="value", field=field, value=value) for value, to in names.items()
            ]
        chosen = _name_of(self._next_agent)
        if chosen is None or isinstance(chosen, str):
            return [Handoff(from_=self.name, to=chosen, kind="fixed", field=None, value=None)]
        return [Handoff(from_=self.name, to=None, kind="function", field=None, value=None)]

    async def execute(self, inputs: Any, resources: Resources, context: RunContext) -> msgspec.Raw:
        """Execute one step with *inputs*, an instance of ``input.type``, and return its result: a JSON object.

        Raises:
            InvalidOutput: the result does not match the output signature, or cannot be encoded as JSON.
            ModelError: the model did not return a usable answer.
            TooManyTokens: the run has no tokens left for a model call.
            Exception: any exception that the agent's own code raises.

        Cancellation: a model request is aborted and a coroutine is cancelled. A thread runs to its end first.
        """
        raise NotImplementedError

    async def choose_next(self, result: msgspec.Raw) -> str | None:
        """Return the name of the agent that receives *result*, or None.

        Raises:
            InvalidHandoff: ``next_agent`` is not a name, an agent or None, and does not return one of them.
        """
        if self._branches is not None:
            field, names = self._branches
            return names[msgspec.json.decode(result)[field]]
        chosen: Any = self.next_agent
        if callable(chosen) and not isinstance(chosen, Agent):
            chosen = chosen(msgspec.json.decode(result))
            if inspect.isawaitable(chosen):
                chosen = await chosen
        name = _name_of(chosen)
        if name is None or isinstance(name, str):
            return name
        raise InvalidHandoff(
            f"next_agent of {self.name!r} must be or return a name, an agent or None, not {type(chosen).__name__}."
        )


def _check_text(value: Any, where: str) -> None:
    """Raise DefinitionError if *value* is neither a text nor None."""
    if value is None or isinstance(value, str):
        return
    hint = " It is not called for each run: only instructions= may be a function." if callable(value) else ""
    raise DefinitionError(f"{where} must be a text, not {value!r}.{hint}")


def _output_names(output: Signature) -> Sequence[str]:
    """Return the fields of *output*, as they are read and as they are written. The first one is a string, if any is."""
    members = {**output.result_schema.get("properties", {}), **output.schema.get("properties", {})}
    texts = [name for name, member in members.items() if member.get("type") == "string"]
    return list(dict.fromkeys([*texts[:1], *members]))


def _name_of(chosen: Any) -> Any:
    return chosen.name if isinstance(chosen, Agent) else chosen


def _branches(agent: Agent, chosen: Mapping[str, Any]) -> tuple[str, dict[str, str | None]]:
    """Return the output field that decides, and the name of the next agent for each of its values, in their order."""
    where, choices = f"next_agent= of {agent.name!r}", _choices(agent.output)
    is_nested = any(isinstance(target, Mapping) for target in chosen.values())
    fields = list(chosen if is_nested else choices)
    if not fields:
        raise DefinitionError(
            f"{where} needs an output field that decides. Add a required one of a type such as Literal['yes', 'no']."
        )
    field = fields[0]
    if len(fields) > 1:
        names = ", ".join(map(repr, fields))
        raise DefinitionError(f"{where} must name one of the output fields {names}, such as {{{field!r}: {{…}}}}.")
    if field not in choices:
        raise DefinitionError(
            f"{where}: {field!r} is not a required output field of a type such as Literal['yes', 'no']."
            f"{did_you_mean(str(field), choices)}"
        )
    targets = chosen[field] if is_nested else chosen
    for value, target in targets.items():
        if value not in choices[field]:
            hint = did_you_mean(str(value), choices[field]) or f" Use {', '.join(map(repr, choices[field]))}."
            raise DefinitionError(f"{where}: {value!r} is not a value of the output field {field!r}.{hint}")
        if not isinstance(target, str | Agent | None):
            raise DefinitionError(
                f"{where}: the entry for {value!r} must be a name, an agent or None, not {type(target).__name__}."
            )
    if missing := [value for value in choices[field] if value not in targets]:
        raise DefinitionError(
            f"{where} has no entry for {', '.join(map(repr, missing))}. "
            f"Name an agent, or add {', '.join(f'{value!r}: None' for value in missing)} to end the run."
        )
    return field, {value: _name_of(targets[value]) for value in choices[field]}


def _choices(output: Signature) -> dict[str, list[str]]:
    """Return the values of each output field that can decide: it is required, and each of its values is a string."""
    schema = output.result_schema
    enums = {name: schema["properties"][name].get("enum", []) for name in schema.get("required", [])}
    return {name: values for name, values in enums.items() if values and all(isinstance(v, str) for v in values)}


#: A tool of a model agent: a typed function, a ``Tool``, an agent, the name of an agent, or ``mcp_tools(…)``.
ToolLike = Callable[..., Any] | Tool | Agent | str | ToolSource


class ModelAgent(Agent):
    """An agent that calls a language model.

    Args:
        model: ``provider/model``, a ``Model``, or a list of these: the next one is asked if one cannot answer. None
            uses the model of the flock.
        instructions: instructions for the model, in addition to the signatures: a text, or a function of the context
            that returns it. That is called for each call of the model, and its text is stored with the reply. It is
            async, or runs in a worker thread, for ``tool_timeout_s`` at most.
        examples: pairs (inputs, output) that the model sees before the real inputs, as earlier turns of the
            conversation. Each is a mapping, or an instance of the signature's type.
        reasoning: True asks the model to write its thoughts before the answer, in a field ``reasoning`` that is not
            part of the result. They count as output tokens. The output of an example may have that field.
        history: how many of its last turns in the session of the run the model sees, after the examples and in the same
            form, or a ``History``. None is for an agent that needs no memory.
        tools: what the model may call before it answers: typed functions, each optionally as a ``Tool``, other agents
            of the flock or their names, and ``mcp_tools(…)``.
        max_tool_calls: max calls of tools in one step, at least 1. Then the model must answer.
        tool_timeout_s: wall-clock seconds for each call of a tool.
        temperature: sampling temperature; None uses the provider's default.
        max_tokens: max tokens in each answer; None uses the provider's default.
        options: other options of the model, such as ``{"reasoning_effort": "low", "tool_choice": "required"}``; see
            ``ModelOptions``.
        answer_retries: max times that an invalid answer is sent back to the model with the reason.
        validate: a function of each valid answer, and of the context if it has one more parameter. If it raises
            AgentError, its text is sent back to the model as the reason, within *answer_retries*; the model may then
            call tools. It may return a changed result. The answer has the type of the output, or is a dict if that is
            written as a string. The function is async, or runs in a worker thread, for ``tool_timeout_s`` at most.
        timeout_s: wall-clock seconds for the whole step, including all retries and tools. The time does not count
            while a call waits because its provider accepts no more calls now.
        client_instructions: whether the model gets the instructions of the client, such as the system messages of a
            chat, after those of the agent. Otherwise they are dropped.
        client_tools: whether the model may call tools of the client. Then the run waits until the client, as the
            principal of the run, has sent the output, for a day at most. Otherwise a run with them is rejected.
        client_options: whether the client may set the temperature and other options of the model, as
            ``ClientSettings`` has them. Otherwise a run with others than the usual ones is rejected.
        others: see ``Agent``.

    If an input has the type ``Messages``, it is the conversation that the model continues. The prompt, and the other
    inputs, come before it.

    Raises:
        DefinitionError: there is no output field, or it is called ``reasoning`` although *reasoning* is on, or an
            example does not match the signatures; the message has its number, and a JSON pointer. Or *model* is known
            to enforce schemas in strict mode, and cannot enforce that of the output. Or there are several
            conversations, or an optional one, or one and examples or a history. Or *history* is not a whole number
            from 1, or *instructions* is neither a text nor a function. Or a tool has no valid name, or one that another
            tool has.
        SignatureError: a parameter of a tool has no type.
    """

    @renamed(max_retries="answer_retries", retry="on_retry")
    def __init__(
        self,
        name: str,
        input: Signature,
        output: Signature,
        *,
        description: str = "",
        model: ModelChoice = None,
        instructions: str | Callable[..., Any] = "",
        examples: Sequence[tuple[Any, Any]] = (),
        reasoning: bool = False,
        history: int | History | None = None,
        tools: Sequence[ToolLike] = (),
        max_tool_calls: int = 10,
        tool_timeout_s: float = 60,
        temperature: float | None = None,
        max_tokens: int | None = None,
        options: ModelOptions | None = None,
        answer_retries: int = 2,
        validate: Callable[..., Any] | None = None,
        timeout_s: float = 300,
        client_instructions: bool = False,
        client_tools: bool = False,
        client_options: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(name, chat_input(input, name), output, description=description, **others)
        if not output.fields:
            raise DefinitionError(f"The agent {name!r} needs at least one output field for the model's answer.")
        if reasoning and "reasoning" in output.schema["properties"]:
            raise DefinitionError(
                f"The output of {name!r} has its own field 'reasoning'. Rename that field, or omit reasoning=True."
            )
        history = _history_of(name, history)
        if (examples or history) and isinstance(self.input, ChatInput):
            raise DefinitionError(
                f"{name!r} has a conversation, and examples= would look like its messages. Use instructions= instead."
                if examples
                else f"{name!r} has a conversation as an input, so history= would add other messages. Omit it."
            )
        self.dynamic_instructions = None
        if callable(instructions):
            instructions, self.dynamic_instructions = "", OwnFunction(f"instructions= of {name!r}", instructions, 0)
        _check_text(instructions, f"instructions= of {name!r}")
        self.model = model
        self.instructions = instructions
        self.history = history
        self._edit = None
        if history is not None and history.edit is not None:
            self._edit = OwnFunction(f"edit= of the history of {name!r}", history.edit, 1)
        if not isinstance(tools, Sequence) or isinstance(tools, str):
            raise DefinitionError(
                f"tools= of {name!r} must be a list, such as [look_up, 'other_agent'], not {tools!r}."
            )
        self.tools = [_tool_of(tool) for tool in tools]
        self.may_ask = bool(tools) or client_tools
        by_name([tool for tool in self.tools if isinstance(tool, Tool)])
        self.max_tool_calls = max_tool_calls
        self.tool_timeout_s = tool_timeout_s
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.options = checked_options(options or {}, f"options= of {name!r}")
        self.answer_retries = answer_retries
        self.validate = None if validate is None else OwnFunction(f"validate= of {name!r}", validate, 1)
        self.timeout_s = timeout_s
        self.takes = {"instructions": client_instructions, "tools": client_tools, "options": client_options}
        self._answer = ReasonedAnswer(output) if reasoning else output
        self.check_models(model)
        self._examples = [
            message for number, example in enumerate(examples) for message in self._example_messages(example, number)
        ]

    def check_models(self, model: ModelChoice) -> None:
        """Raise DefinitionError if *model* is not valid, or enforces the schema of the output and cannot.

        Or if it is to be called through a batch endpoint, and cannot be.
        """
        models, owner = models_of(model, repr(self.name)), repr(self.name)
        check_strict(self._answer.schema, models, owner)
        has_tools = bool(self.tools) or self.takes["tools"]
        check_batch(models, owner, has_tools=has_tools, has_files=self.input.has_files)

    async def execute(self, inputs: Any, resources: Resources, context: RunContext) -> msgspec.Raw:
        with move_on_after_working(self.timeout_s):
            history = await self._earlier(resources, context)
            client = (context.client or ClientSettings()).taken_by(**self.takes)
            client = msgspec.structs.replace(client, message_id=None)
            return await self._converse(self._prompt(inputs, history, client), resources, context, client)
        message = f"The model did not answer within {self.timeout_s:g} s (timeout_s of the agent {self.name!r})."
        raise ModelError(message, "model_timeout")

    async def _converse(
        self, messages: list[Message], resources: Resources, context: RunContext, client: ClientSettings
    ) -> msgspec.Raw:
        tools = [known for tool in self.tools for known in await self._known(tool, resources.agents, context)]
        if same := {tool.name for tool in tools} & {tool.name for tool in client.tools}:
            raise CallError(same_name(self.name, same.pop()))
        tools = [*map(ToolOfClient, client.tools), *tools]  # the definitions of the last count, if two are called alike
        models = models_of(self.model, repr(self.name)) or resources.models.default_model
        caller = Caller(is_item=context.is_item, on_wait=context.report_wait)
        toolbox = Toolbox(
            by_name(tools),
            self.max_tool_calls,
            self.tool_timeout_s,
            context,
            resources.call_in_thread,
            resources.shared.tool_hooks,
        )
        options = {"max_tokens": self.max_tokens, **self.options, **context.model_options}
        choice = options.get("tool_choice", "auto")
        if choice == "none":
            toolbox.close()
        elif choice != "auto" and not (toolbox.tools and choice in ("required", *toolbox.tools)):
            raise CallError(
                f"{self.name!r} has no tool for tool_choice={choice!r}.{did_you_mean(choice, toolbox.tools)}"
            )
        conversation = Conversation(
            messages=messages,
            toolbox=toolbox,
            context=context,
            models=names_of(models),
            request=Request(
                (),
                self._answer.schema,
                max_tokens=min(filter(None, (options["max_tokens"], client.max_output_tokens)), default=None),
                temperature=self.temperature,
                options=options | client.options,
                is_strange=client != ClientSettings(),
            ),
            complete=functools.partial(resources.models.complete, models or None, caller=caller),
            in_batch=(
                functools.partial(self._in_batch, models[0], resources, context)
                if models and self._is_in_batch(models[0], resources, context)
                else None
            ),
            hooks=resources.shared.model_hooks,
            read=lambda text: self.output.encode(self._answer.decode(text.encode())),
            listen=functools.partial(LiveAnswer, self._answer, self.output, context),
            validate=None if self.validate is None else functools.partial(self._validated, resources, context),
            instruct=(
                None
                if self.dynamic_instructions is None
                else functools.partial(self._instructed, self.dynamic_instructions, resources, context, client)
            ),
        )
        return await conversation.converse(self.answer_retries)

    def _is_in_batch(self, model: Model, resources: Resources, context: RunContext) -> bool:
        """Whether a call goes through the batch endpoint. If its reply has come already, the option does not count."""
        can_be = resources.has_batches and resources.models.has_batches
        return can_be and (model.batch or bool(context.journal.replies))

    async def _in_batch(
        self, model: Model, resources: Resources, context: RunContext, request: Request
    ) -> Completion | None:
        """Return the reply from the batch endpoint of *model*; None if the request is to be sent as a normal one."""
        call = await resources.models.batch_call(model, request, context.agent_name)
        reply: Completion | None = await context.journal.receive_reply(
            f"batch:{model.name}", msgspec.Raw(msgspec.json.encode(call)), Completion | None
        )
        return reply

    async def _validated(self, resources: Resources, context: RunContext, text: str) -> Verdict:
        """Return what ``validate=`` says about a valid answer."""
        assert self.validate is not None
        value = answer = self._answer.decode(text.encode())
        if isinstance(self.output, UnionOutput):
            value = answer.result
        elif not self.output.is_declared:
            value = msgspec.to_builtins(answer, enc_hook=to_json)
        try:
            changed = await self._called(self.validate, value, resources=resources, context=context)
        except AgentError as exc:
            return Verdict(reason=cut(str(exc)))
        if changed is None:  # it may have changed a dict, in which a model may be written otherwise than it is read
            is_same = not isinstance(value, dict) or value == msgspec.to_builtins(answer, enc_hook=to_json)
            changed = answer if is_same else value
        try:
            return Verdict(result=self.output.encode(changed))
        except InvalidData as exc:
            raise InvalidOutput(f"{self.validate.option} returned a result that does not match. {exc}") from exc

    async def _instructed(
        self, function: OwnFunction, resources: Resources, context: RunContext, client: ClientSettings
    ) -> tuple[str, Message]:
        """Return the instructions for one call of the model, and the system message with them."""
        text = await self._called(function, resources=resources, context=context)
        if not isinstance(text, str):
            raise CallError(f"{function.option} returned {type(text).__name__}, not a text.")
        if len(text) > MAX_INSTRUCTIONS_CHARS:
            raise CallError(
                f"{function.option} returned {len(text)} characters, more than the maximum ({MAX_INSTRUCTIONS_CHARS})."
            )
        text = safe_text(text)
        return text, self._system(text, client)

    async def _called(self, function: OwnFunction, *args: Any, resources: Resources, context: RunContext) -> Any:
        options: dict[str, Any] = {"context": context, "call_in_thread": resources.call_in_thread}
        return await function.call(*args, **options, timeout_s=self.tool_timeout_s)

    async def _known(
        self, tool: Tool | ToolSource | str, agents: Mapping[str, Agent], context: RunContext
    ) -> Sequence[Tool]:
        if isinstance(tool, ToolSource):
            return await tool.tools_in_time(context)
        if isinstance(tool, Tool):
            return [tool]
        if tool not in agents:
            raise CallError(f"{self.name!r} has a tool {tool!r}, but there is no such agent.")
        return [agents[tool].as_tool()]

    def _example_messages(self, example: Any, number: int) -> tuple[Message, Message]:
        """Return an example as a prompt and the answer to it. Raises DefinitionError if it does not match."""
        label = f"examples[{number}] of {self.name!r}"
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise DefinitionError(f"{label} must be a pair (inputs, output).")
        inputs, output = example
        part = "inputs"
        try:
            prompt = self._user_prompt(self.input.decode(self.input.encode(inputs)))
            part = "output"
            answer = bytes(self._answer.encode(output)).decode()
        except (MalformedJSON, InvalidData) as exc:
            raise DefinitionError(f"The {part} in {label} must match the signature. {exc}") from exc
        return Message("user", prompt), Message("assistant", answer)

    def _prompt(self, inputs: Any, history: Sequence[Message], client: ClientSettings) -> list[Message]:
        system = self._system(self.instructions, client)
        files: list[FileReference] = []

        def shown(value: Any) -> Any:
            if isinstance(value, File):
                files.append(value.reference)
            return f"file {len(files)} {value.name}".strip() if isinstance(value, File) else to_json(value)

        if not isinstance(self.input, ChatInput):
            prompt = self._user_prompt(inputs, shown)
            return with_user_text([system, *self._examples, *history], prompt, tuple(files))
        conversation, others = self.input.split(inputs, shown)
        return [
            system,
            *([Message("user", self._described(others), files=tuple(files))] if others else []),
            *(Message(message["role"], message["content"]) for message in conversation),
        ]

    def _system(self, instructions: str, client: ClientSettings) -> Message:
        parts = [f"You are {self.name}.", self.description, instructions, client.instructions]
        text = "\n".join(filter(None, parts))
        return Message("system", f"{text}\n\n{self._task()}" if isinstance(self.input, ChatInput) else text)

    async def _earlier(self, resources: Resources, context: RunContext) -> list[Message]:
        """Return earlier turns as messages, without those that no longer match the signatures."""
        history, turns = self.history, list[Sequence[Message]]()
        if history is None:
            return []
        tools = {tool.name: tool for tool in self.tools if isinstance(tool, Tool)}
        for inputs, result, calls in await resources.history(self, history.turns, history.needs_calls):
            if (edited := edited_by(calls)) is not None:
                turns = [edited]
            with contextlib.suppress(InvalidData, MalformedJSON):
                prompt, answer = self._user_prompt(self.input.decode(inputs)), self.output.decode(result)
                answer_json = bytes(self.output.encode(answer)).decode()
                made = messages_of(calls, lambda name: name in tools and bool(tools[name].secret))
                made = made if history.calls else []
                turns.append([Message("user", prompt), *made, Message("assistant", answer_json)])
        messages = history.within_limit(turns)
        if self._edit is None or not messages:
            return messages

        async def edit() -> list[Message]:
            assert self._edit is not None
            returned = await self._called(
                self._edit, msgspec.to_builtins(messages), resources=resources, context=context
            )
            return checked_messages(self._edit.option, returned)

        return await stored_call(context, EDIT, "1", edit, list[Message])

    def _user_prompt(self, inputs: Any, shown: Callable[[Any], Any] = to_json) -> str:
        """Return the inputs as JSON, then the task: small models follow best what they read last."""
        return f"{self._described(msgspec.to_builtins(inputs, enc_hook=shown))}\n\n{self._task()}"

    def _described(self, inputs: Mapping[str, Any]) -> str:
        described = [
            f"- {field.name}: {field.description}"
            for field in self.input.fields
            if field.description and field.name in inputs
        ]
        meaning = "\n".join(["", "", "In it:", *described]) if described else ""
        return f"{json.dumps(inputs, ensure_ascii=False)}{meaning}"

    def _task(self) -> str:
        outputs = "\n".join(
            f"- {name} ({_in_words(member)})" + (f": {member['description']}" if "description" in member else "")
            for name, member in self._answer.schema["properties"].items()
        )
        return f"Determine:\n{outputs}\nAnswer with a JSON object only."


def _history_of(name: str, history: Any) -> History | None:
    """Return ``history=`` of an agent. Raises DefinitionError."""
    if isinstance(history, int) and not isinstance(history, bool) and history >= 1:
        return History(turns=history)
    if isinstance(history, History | None):
        return history
    raise DefinitionError(f"history= of {name!r} must be a whole number from 1, a History, or None, not {history!r}.")


def _tool_of(tool: ToolLike) -> Tool | ToolSource | str:
    if isinstance(tool, Agent):
        return tool.as_tool()
    if isinstance(tool, Tool) and isinstance(tool.function, Agent):
        return tool.function.as_tool(tool)
    return tool if isinstance(tool, Tool | ToolSource | str) else Tool(tool)


def _in_words(schema: Mapping[str, Any], plural: str = "") -> str:
    """Describe a JSON Schema in words: ``list of strings``, ``one of "a", "b"``, ``string (date) or null``."""
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_in_words(member, plural) for member in schema["anyOf"])
    type_ = schema.get("type", "object" if "$ref" in schema else "anything")
    if type_ == "array":
        return f"list{plural} of {_in_words(schema.get('items') or {}, 's')}"
    if type_ in ("null", "anything"):
        return str(type_)
    return f"{type_}{plural}" + (f" ({schema['format']})" if "format" in schema else "")


class FunctionAgent(Agent):
    """An agent that calls a typed function, in the event loop if it is async and in a worker thread otherwise.

    A generator writes its output piece by piece: each ``str`` that it yields is appended to the first string of the
    output, and the last other value is the result. If it yields only text, the text is the result.

    The agent can be called like the function itself.
    """

    @renamed(retry="on_retry")
    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        description: str | None = None,
        output: Any = None,
        types: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if inspect.isclass(function):
            raise DefinitionError(f"{function!r} is a class. Pass a function or a callable object.")
        name = name or name_of(function)
        if "tools" in options:
            raise DefinitionError(f"{name!r} is a function, so it has no tools=. Call the other functions in it.")
        if of_client := [option for option in options if option.startswith("client_")]:
            raise DefinitionError(f"{name!r} is a function, so it has no {of_client[0]}=. Only agents with a model do.")
        if output is None:
            output_signature, self._is_boxed = Signature.of_result(function)
        else:
            output_signature, self._is_boxed = Signature.of(output, types), False
        if description is None:
            description = (inspect.getdoc(function) or "").partition("\n")[0]
        inputs = Signature.of_parameters(function)
        super().__init__(name, inputs, output_signature, description=description, **options)
        self.function = function
        self._context_parameter = context_parameter(function)
        self.uses_context = self.may_ask = self._context_parameter is not None
        self._is_generator = is_generator(function)
        self._is_async = is_async(function)
        if self._is_generator:
            self.uses_context = True
            self._check_generator(types_only=output is not None)

    def _check_generator(self, *, types_only: bool) -> None:
        """Raise DefinitionError if the generator cannot yield its output."""
        members, required = self.output.result_schema["properties"], self.output.result_schema.get("required", [])
        yields = typing.get_args(hints_of_function(self.function).get("return"))[:1]
        is_text, has_text = yields == (str,), any(member.get("type") == "string" for member in members.values())
        if not has_text and (is_text or str in typing.get_args(*yields)):
            raise DefinitionError(f"{self.name!r} yields text, but its output has no field of type str for it.")
        if is_text and types_only and (missing := [name for name in required if name != self.output_names[0]]):
            raise DefinitionError(
                f"{self.name!r} yields only text, for the field {self.output_names[0]!r}. Its output needs "
                f"{', '.join(map(repr, missing))} too: yield the whole result last, as '-> AsyncIterator[str | dict]'."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def execute(self, inputs: Any, resources: Resources, context: RunContext) -> msgspec.Raw:
        values = msgspec.structs.asdict(inputs)
        if self._context_parameter is not None:
            values[self._context_parameter] = context
        call = functools.partial(self.function, **values)
        with closing_scopes(self.name):
            if self._is_generator:
                value = await self._written(call, resources, context)
            else:
                value = await (call() if self._is_async else called(call, resources.call_in_thread))
        try:
            return self.output.encode({"result": value} if self._is_boxed else value)
        except InvalidData as exc:
            raise InvalidOutput(f"The result of {self.name!r} does not match its output signature. {exc}") from exc

    async def _written(self, call: Callable[[], Any], resources: Resources, context: RunContext) -> Any:
        """Write the text that a generator yields, and return its result."""
        texts, results, field = list[str](), list[Any](), self.output_names[0]
        joiner = Joiner()

        def write(text: str) -> None:
            texts.append(text)
            context.emit(text, field)

        def add(part: Any) -> None:
            if isinstance(part, str):
                write(joiner.add(part))
            else:
                results[:] = [part.value if isinstance(part, Result) else part]

        def add_all() -> None:
            with contextlib.closing(call()) as parts:
                for part in parts:
                    if context.cancel_requested:
                        break
                    add(part)

        if is_generator(self.function, is_async=True):
            async with contextlib.aclosing(call()) as parts:
                async for part in parts:
                    add(part)
        else:
            await resources.call_in_thread(add_all)
        if rest := joiner.end():
            write(rest)
        if not results:
            return "".join(texts) if self._is_boxed else {field: "".join(texts)}
        if texts and isinstance(results[0], dict) and not self._is_boxed:  # it may leave the text out
            return {field: "".join(texts), **results[0]}
        return results[0]


class AgentOptions(TypedDict, total=False):
    """The options of ``@agent``."""

    name: str | None
    description: str | None
    output: Any
    types: Mapping[str, Any] | None
    next_agent: NextAgent
    max_concurrency: int | None
    on_interrupt: OnInterrupt
    on_change: OnChange
    on_retry: RetriedCalls
    version: str | None
    webhook_url: str | None


@overload
def agent(function: Callable[..., Any], /) -> FunctionAgent: ...


@overload
def agent(**options: Unpack[AgentOptions]) -> Callable[[Callable[..., Any]], FunctionAgent]: ...


@renamed(retry="on_retry")
def agent(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Convert a typed function to an agent: ``@agent`` or ``@agent(next_agent="summarise")``.

    Its parameters are the inputs. Its return type is the output: the fields of a struct, dataclass, TypedDict or
    pydantic model, or a single field ``result`` for any other type. The first line of the docstring is the description.

    Args:
        name: name of the agent; None uses the function's name.
        output: the output signature, if not the return annotation. Use it for functions that return a plain dict:
            ``output="sentiment: str, keywords: list[str]"``.
        types: additional types, by name, for the string in ``output``.
        next_agent, max_concurrency, on_interrupt, on_change, on_retry: see ``Agent``.

    Raises:
        SignatureError: a parameter has no type, or its type cannot be read from JSON.
        DefinitionError: an option is invalid; see ``Agent``.
    """
    if function is None:
        return functools.partial(FunctionAgent, **options)
    return FunctionAgent(function, **options)

"""Agents: what does one step of a run.

An agent has a name, an input and an output signature, and a way from one to the other: a model (``ModelAgent``) or a
function (``FunctionAgent``, made by ``@agent``). ``next_agent`` says who goes on after it.
"""

import functools
import inspect
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, overload

import anyio
import msgspec

from flock.agents.llm import Message, ModelClient
from flock.agents.signature import Signature, context_parameter, name_of
from flock.errors import DefinitionError, InvalidData, InvalidHandoff, InvalidOutput, MalformedJSON, ModelError
from flock.runs import RunContext, Usage

__all__ = ["Agent", "FunctionAgent", "ModelAgent", "NextAgent", "OnInterrupt", "Resources", "Turn", "agent"]

OnInterrupt = Literal["retry", "fail"]

#: Who goes on: a name, or a function of the result that gives a name, an agent or None. It runs in the event loop.
NextAgent = str | Callable[[dict[str, Any]], Any] | None


class Resources(msgspec.Struct, frozen=True):
    """What an engine lends to every step."""

    #: calls models
    models: ModelClient
    #: calls a synchronous function in a worker thread
    call_in_thread: Callable[[Callable[[], Any]], Awaitable[Any]]


class Turn(msgspec.Struct, frozen=True):
    """What came of one agent's turn: a JSON object that fits its output signature, and what it cost."""

    result: msgspec.Raw
    usage: Usage | None = None


class Agent:
    """The base of both kinds. A subclass says how a turn is taken.

    Args:
        name: unique in its flock; letters, digits, ``_``, ``-`` and ``.``, since it stands in a URL.
        description: for people, and part of a model's prompt.
        next_agent: who goes on with the result; None ends the run.
        max_concurrency: turns of this agent at the same time, in one process; None is no limit of its own.
        on_interrupt: what becomes of a run whose process died in this agent's turn: "retry" lets it have its turn
            again, "fail" ends the run, for what must not be done twice.
    """

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
    ) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]*[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise DefinitionError(f"{name!r} cannot be an agent's name: use letters, digits, '_', '-' and '.'.")
        self.name = name
        self.description = description
        self.input = input
        self.output = output
        self.next_agent = next_agent
        self.max_concurrency = max_concurrency
        self.on_interrupt = on_interrupt

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    async def take_turn(self, inputs: Any, resources: Resources, context: RunContext) -> Turn:
        """Turn *inputs*, an instance of ``input.type``, into a result.

        Raises:
            InvalidOutput: the result does not fit the output signature, or cannot be JSON.
            ModelError: the model gave no usable answer.
            TooManyTokens: the run may ask no model any more.
            Exception: whatever the agent's own code raises.

        Cancellation: a model request is aborted, a coroutine is cancelled; a thread is waited for.
        """
        raise NotImplementedError

    async def choose_next(self, result: msgspec.Raw) -> str | None:
        """The name of the agent that goes on with *result*, or None.

        Raises:
            InvalidHandoff: ``next_agent`` gave something else than a name, an agent or None.
        """
        chosen = self.next_agent
        if callable(chosen) and not isinstance(chosen, Agent):
            chosen = chosen(msgspec.json.decode(result))
            if inspect.isawaitable(chosen):
                chosen = await chosen
        if isinstance(chosen, Agent):
            return chosen.name
        if chosen is None or isinstance(chosen, str):
            return chosen
        raise InvalidHandoff(
            f"next_agent of {self.name!r} gave {type(chosen).__name__}; it gives a name, an agent or None."
        )


class ModelAgent(Agent):
    """An agent that asks a language model.

    Args:
        model: ``provider/model``; None takes the flock's.
        instructions: what the model is told to do, beside what the signatures say.
        temperature: None leaves it to the provider.
        max_tokens: a bound on each answer's length; None leaves it to the provider.
        max_retries: how often an answer that does not fit is sent back with the reason.
        timeout_s: wall-clock seconds for the whole turn, attempts and repairs included.
        options: see ``Agent``.
    """

    def __init__(
        self,
        name: str,
        input: Signature,
        output: Signature,
        *,
        description: str = "",
        model: str | None = None,
        instructions: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_retries: int = 2,
        timeout_s: float = 300,
        **options: Any,
    ) -> None:
        super().__init__(name, input, output, description=description, **options)
        if not output.fields:
            raise DefinitionError(f"The agent {name!r} has no output field, so there is nothing to ask a model for.")
        self.model = model
        self.instructions = instructions
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.max_retries = max_retries
        self.timeout_s = timeout_s

    async def take_turn(self, inputs: Any, resources: Resources, context: RunContext) -> Turn:
        try:
            with anyio.fail_after(self.timeout_s):
                return await self._converse(inputs, resources.models, context)
        except TimeoutError as exc:
            message = f"The model gave no answer within {self.timeout_s:g} s (timeout_s of the agent {self.name!r})."
            raise ModelError(message, "model_timeout") from exc

    async def _converse(self, inputs: Any, models: ModelClient, context: RunContext) -> Turn:
        messages = [Message("system", self._system_prompt()), Message("user", self._user_prompt(inputs))]
        usage = Usage()
        problem = ""
        for call in range(self.max_retries + 1):
            context.check_tokens()
            completion = await models.complete(
                self.model,
                messages,
                self.output.schema,
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                traceparent=context.traceparent,
                # Each call has its own, or a provider would give the answer that is to be repaired once more.
                idempotency_key=context.step_key if call == 0 else f"{context.step_key}/{call + 1}",
            )
            usage += completion.usage
            context.spend(completion.usage)
            try:
                return Turn(self.output.encode(self.output.decode(completion.text.encode())), usage)
            except (MalformedJSON, InvalidData, UnicodeEncodeError) as exc:
                problem = str(exc)
            reply = f"That answer cannot be used. {problem}\nAnswer again, with one JSON object and nothing else."
            messages += [Message("assistant", completion.text), Message("user", reply)]
        raise InvalidOutput(
            f"The model's answer did not fit the output of {self.name!r} in {self.max_retries + 1} attempts: {problem}"
        )

    def _system_prompt(self) -> str:
        parts = [f"You are {self.name}.", self.description, self.instructions]
        return "\n".join(part for part in parts if part)

    def _user_prompt(self, inputs: Any) -> str:
        """The inputs as JSON, and behind them what is wanted: small models heed best what they read last."""
        described = [f"- {field.name}: {field.description}" for field in self.input.fields if field.description]
        given = json.dumps(msgspec.to_builtins(inputs), ensure_ascii=False)
        meaning = "\n".join(["", "", "In it:", *described]) if described else ""
        wanted = "\n".join(
            f"- {name} ({_in_words(member)})" + (f": {member['description']}" if "description" in member else "")
            for name, member in self.output.schema["properties"].items()
        )
        return f"{given}{meaning}\n\nDetermine:\n{wanted}\nAnswer with a JSON object only."


def _in_words(schema: Mapping[str, Any], plural: str = "") -> str:
    """A JSON Schema as a model reads it: ``list of strings``, ``one of "a", "b"``, ``string (date) or null``."""
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
    """An agent that calls a typed function: in the event loop if it is async, in a worker thread otherwise.

    It can still be called like the function it was made of.
    """

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
            raise DefinitionError(f"{function!r} is a class; pass a function, or an object that can be called.")
        called = (function, type(function).__call__)
        if any(map(inspect.isgeneratorfunction, called)) or any(map(inspect.isasyncgenfunction, called)):
            raise DefinitionError(f"{function!r} yields; an agent returns its result whole.")
        if output is None:
            output_signature, self._is_boxed = Signature.of_result(function)
        else:
            output_signature, self._is_boxed = Signature.of(output, types), False
        if description is None:
            description = (inspect.getdoc(function) or "").partition("\n")[0]
        super().__init__(
            name or name_of(function),
            Signature.of_parameters(function),
            output_signature,
            description=description,
            **options,
        )
        self.function = function
        self._is_async = any(map(inspect.iscoroutinefunction, called))
        self._parameters = [field.name for field in self.input.fields]
        self._context_parameter = context_parameter(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    async def take_turn(self, inputs: Any, resources: Resources, context: RunContext) -> Turn:
        values = {name: getattr(inputs, name) for name in self._parameters}
        if self._context_parameter is not None:
            values[self._context_parameter] = context
        call = functools.partial(self.function, **values)
        if self._is_async:
            value = await call()
        else:
            value = await resources.call_in_thread(call)
            if inspect.isawaitable(value):  # a plain wrapper around an async function
                value = await value
        try:
            return Turn(self.output.encode({"result": value} if self._is_boxed else value))
        except InvalidData as exc:
            raise InvalidOutput(f"What {self.name!r} returned does not fit its output. {exc}") from exc


@overload
def agent(function: Callable[..., Any], /) -> FunctionAgent: ...


@overload
def agent(
    *,
    name: str | None = None,
    description: str | None = None,
    output: Any = None,
    types: Mapping[str, Any] | None = None,
    next_agent: NextAgent = None,
    max_concurrency: int | None = None,
    on_interrupt: OnInterrupt = "retry",
) -> Callable[[Callable[..., Any]], FunctionAgent]: ...


def agent(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Make an agent of a typed function: ``@agent`` or ``@agent(next_agent="summarise")``.

    Its parameters are the input. What it returns is the output: the fields of a struct, dataclass or TypedDict, or
    one field, ``result``, of any other type. The first line of the docstring is the description.

    Args:
        name: the function's own name if None.
        output: an output signature in place of the one that the return annotation gives, for functions that return a
            plain dict: ``output="sentiment: str, keywords: list[str]"``.
        types: what the string in ``output`` may name.
        next_agent, max_concurrency, on_interrupt: see ``Agent``.

    Raises:
        SignatureError: a parameter has no type, or one that cannot be read from JSON.
    """
    if function is None:
        return functools.partial(FunctionAgent, **options)
    return FunctionAgent(function, **options)

"""What protocols that look like a chat have in common: messages as the inputs of an agent, and its result as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from flock.agents.agent import Agent
from flock.agents.chat import ChatInput
from flock.errors import FlockError, InvalidData
from flock.runs import Event, LongJSON, Question


class Message(NamedTuple):
    """A message that a client has sent, without what is not text."""

    role: str
    text: str


class TextReplaced(FlockError):
    """The text of a run was replaced, and a client that cannot take text back has got a part of it."""


def inputs_of(agent: Agent, messages: Sequence[Message], others: Mapping[str, msgspec.Raw]) -> msgspec.Raw:
    """Return the inputs for *agent* that *messages*, oldest first, and *others*, by name, make together.

    An input of the type ``Messages`` gets all messages of the user and the assistant. Otherwise the only input that is
    a text gets the last message of the user. Otherwise that must be a JSON object of the inputs.

    Raises: InvalidData if it is none, or if there is no message of the user.
    """
    said = [message for message in messages if message.role in ("user", "assistant")]
    if not any(message.role == "user" for message in said):
        raise InvalidData.of("There is no message with the role 'user'.", "/messages")
    if isinstance(agent.input, ChatInput):
        turns = [{"role": message.role, "content": message.text} for message in said]
        return _encode({agent.input.conversation: turns}, others)
    last = next(message.text for message in reversed(said) if message.role == "user")
    texts = [field.name for field in agent.input.fields if field.type is str and field.name not in others]
    if len(texts) == 1:
        return _encode({texts[0]: last}, others)
    if not agent.input.fields:
        return msgspec.Raw(b"{}")
    try:
        return _encode(msgspec.json.decode(last, type=dict[str, msgspec.Raw]), others)
    except (msgspec.DecodeError, RecursionError) as exc:
        schema = msgspec.json.encode(agent.input.schema).decode()
        names = ", ".join(f'"{field.name}": …' for field in agent.input.fields)
        raise InvalidData.of(
            f"{agent.name!r} does not take one text, so the last message of the user must be a JSON object of its "
            f"inputs, such as {{{names}}}. Their schema: {schema}",
            "/messages",
        ) from exc


def _encode(inputs: Mapping[str, Any], others: Mapping[str, msgspec.Raw]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode({**inputs, **others}))


def text_of(agent: Agent, result: bytes) -> str:
    """Return the result of *agent* as text: its only output if that is a text, or else the JSON of all outputs."""
    name = text_output_of(agent)
    return result.decode() if name is None else msgspec.json.decode(result)[name]


def text_output_of(agent: Agent) -> str | None:
    """Return the name of the only output of *agent*, if that is a text."""
    fields = agent.output.fields
    return fields[0].name if len(fields) == 1 and fields[0].type is str else None


class SentText:
    """The text of an answer. What was sent cannot be taken back, so a text that replaces it must begin with it."""

    def __init__(self) -> None:
        self._sent, self._now = list[str](), list[str]()
        self._is_behind = False

    def add(self, text: str) -> str:
        """Return what is to be sent after more *text* has come. Raises TextReplaced."""
        self._now.append(text)
        if not self._is_behind:
            self._sent.append(text)
            return text
        sent, now = "".join(self._sent), "".join(self._now)
        if not (now.startswith(sent) or sent.startswith(now)):
            raise TextReplaced("The answer was replaced by another one after a part of it had been sent.")
        new = now[len(sent) :]
        self._is_behind = len(now) < len(sent)
        self._sent.append(new)
        return new

    def reset(self, text: str = "") -> str:
        """The text begins again, with *text*. Return what is to be sent. Raises TextReplaced."""
        self._now, self._is_behind = [], bool(self._sent)
        return self.add(text)


def question_text(question: Question, run_id: str) -> str:
    """Return an open question for a client that has no other way to show it."""
    return f"{question.question}\n\n(The run {run_id} waits for the answer.)"


class StreamedAnswer:
    """The answer of a run as text, made from its events. Only an agent that ends the run is read while it writes."""

    def __init__(self, agents: Mapping[str, Agent]) -> None:
        self._agents = agents
        self._agent: Agent | None = None
        self._text = SentText()

    async def add(self, event: Event) -> str:
        """Return the text that *event* adds. Raises TextReplaced, RunNotFound, StoreError."""
        data = event.data
        match event.name:
            case "step.started":
                self._agent = self._agents.get(data["agent_name"])
            case "output.delta" if self._is_last(data) and data["field"] == self._name:
                return self._text.add(data["text"])
            case "output.reset" if self._is_last(data):
                return self._text.reset()
            case "output.snapshot" if self._is_last(data) and self._name in data["output"]:
                return self._text.reset(data["output"][self._name])
            case "run.completed" if self._agent is not None:
                result = data["result"]
                whole = b"".join([piece async for piece in result.pieces()]) if isinstance(result, LongJSON) else result
                return self._text.reset(text_of(self._agent, bytes(whole)))
            case "run.waiting":
                return self._text.add(question_text(data["waiting_for"][0], data["run_id"]))
        return ""

    @property
    def _name(self) -> str | None:
        return None if self._agent is None else text_output_of(self._agent)

    def _is_last(self, data: Mapping[str, Any]) -> bool:
        """Whether an event is one of the step that ends the run."""
        agent = self._agent
        return (
            agent is not None
            and data["agent_name"] == agent.name
            and "call_id" not in data
            and all(handoff.kind == "fixed" and handoff.to is None for handoff in agent.handoffs())
        )

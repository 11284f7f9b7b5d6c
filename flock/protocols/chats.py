"""What protocols that look like a chat have in common: messages as the inputs of an agent, and its result as text."""

from collections.abc import AsyncGenerator, Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing, nullcontext, suppress
from typing import Any, Literal, NamedTuple

import anyio
import msgspec
from msgspec import inspect

from flock.agents.agent import Agent
from flock.agents.chat import conversation_of
from flock.agents.graph import graph_of
from flock.errors import EngineStopped, FlockError, InvalidData, TooManyRequests
from flock.files import MAGIC, MAX_FILES, UNKNOWN, is_file, media_type_in
from flock.jsontype import MEMBERS, is_same_schema
from flock.runs import Engine, Event, LongJSON, Question, Run

#: The events after which an answer has no more text.
ENDS = ("run.completed", "run.failed", "run.cancelled", "run.waiting")


class SentFile(NamedTuple):
    """A file in a message: what an input takes for it, the pointer of its part, and a media type of its kind."""

    value: Mapping[str, str]
    at: str
    media_type: str


class Message(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A message that a client has sent: its text, in the form of those of agents, and its files."""

    role: str
    content: str
    files: tuple[SentFile, ...] = ()


class Part(msgspec.Struct, frozen=True):
    """A part of the content of a message."""

    type: str
    text: str | None = None


#: The types of content that agents read.
TEXTS = ("text", "input_text", "output_text")

SEND_A_FILE = "Send a data URL (data:image/png;base64,…), or the file_id that POST /files returns."
#: The events that ``StreamedAnswer`` passes on to clients to which it can show what a run does.
SHOWN = ("call.started", "call.completed", "run.progress")

#: Seconds until a stream whose caller has no free slot for its long text tries again.
SLOT_S = 0.2

Slot = Callable[[], AbstractContextManager[object]]


class TextReplaced(FlockError):
    """The text of a run was replaced, and a client has a part of the old one. *text* is what replaces it, so far."""

    def __init__(self, message: str, text: str = "") -> None:
        super().__init__(message)
        self.text = text


# Inputs


def text_in(
    content: str | Sequence[Part] | None, at: str, *, is_shown: bool = True, others: Container[str] = ()
) -> str:
    """Return the text of a message. Parts other than text and *others* are refused, or dropped if not *is_shown*."""
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if is_shown and part.type not in others and (part.type not in TEXTS or part.text is None):
            detail = f"A content part of the type {part.type!r} is not supported. Send text."
            raise InvalidData.of(detail, f"{at}/content/{number}")
    return "".join(part.text or "" for part in content if part.type in TEXTS)


def file_in(
    sent: str | None, at: str, kind: str | None, file_id: str | None = None, *, how: str = SEND_A_FILE, more: Any
) -> SentFile:
    """Return the file of a part of a message, which is *sent* as a data URL, or stored here.

    Args:
        kind: a media type of its kind; None to look at its content. The rest is checked with the inputs.
        how: to send a file, for errors.
        more: what the client says about it, by name.

    Raises: InvalidData if it is neither.
    """
    if sent is None and file_id is None:
        raise InvalidData.of(f"This part has no file. {how}", at)
    if sent is not None and not sent.startswith("data:"):
        raise InvalidData.of(f"No address is fetched. {how}", at)
    try:
        kind = kind or media_type_in(sent or "")
    except ValueError as exc:
        raise InvalidData.of(f"{exc}.", at) from exc
    return SentFile({"file_id": sent or file_id or "", **{name: each or "" for name, each in more.items()}}, at, kind)


def inputs_of(agent: Agent, messages: Sequence[Message], others: Mapping[str, msgspec.Raw], at: str) -> msgspec.Raw:
    """Return the inputs for *agent* that *messages*, oldest first, and *others*, by name, make together.

    An input of the type ``Messages`` gets all messages of the user and the assistant. Otherwise the only input that is
    a text gets the last message of the user. Otherwise that must be a JSON object of the inputs, or empty beside files.
    The files of that message go to the inputs that take them. An agent without file inputs gets an error for any file,
    also an earlier one.

    Args:
        at: the pointer of the messages.

    Raises: InvalidData if it is not, or if there is no message of the user.
    """
    said = [each for each in messages if each.role == "user" or (each.role == "assistant" and each.content)]
    newest = next((message for message in reversed(said) if message.role == "user"), None)
    if newest is None:
        raise InvalidData.of("There is no message with the role 'user'.", at)
    last = newest.content
    # Earlier turns have no files, as in conversations of agents, but no file is dropped that no agent would see.
    files = newest.files if agent.input.has_files else [file for message in said for file in message.files]
    others = {**others, **_files_by_input(agent, files, others)}
    if (name := conversation_of(agent.input)) is not None:
        return _encode({name: [Message(each.role, each.content) for each in said]}, others)
    if (name := _text_input_of(agent, others, has_files=bool(files))) is not None:
        return _encode({name: last}, others)
    if not agent.input.fields:
        return msgspec.Raw(b"{}")
    try:
        text = last or ("{}" if files else "")
        return _encode(msgspec.json.decode(text, type=dict[str, msgspec.Raw]), others)
    except (msgspec.DecodeError, RecursionError) as exc:
        names = ", ".join(f'"{field.name}": …' for field in agent.input.fields)
        raise InvalidData.of(
            f"{agent.name!r} does not take one text, so the last message of the user must be a JSON object of its "
            f"inputs, such as {{{names}}}. Their schema: {_text(agent.input.schema)}",
            at,
        ) from exc


def messages_of(agent: Agent, inputs: msgspec.Raw) -> list[Message]:
    """Return the messages that have become *inputs*."""
    values = msgspec.json.decode(inputs, type=MEMBERS)
    for name, type_ in ((conversation_of(agent.input), list[Message]), (_text_input_of(agent), str)):
        # another version of the agent may have had other inputs, and a default is not stored
        with suppress(msgspec.DecodeError):
            found: Any = msgspec.json.decode(values.get(name or "", b""), type=type_)
            return [Message("user", found)] if isinstance(found, str) else found
    return [Message("user", _text(inputs))]


def _text_input_of(agent: Agent, others: Mapping[str, Any] | None = None, *, has_files: bool = True) -> str | None:
    free = [field for field in agent.input.fields if field.name not in (others or {})]
    texts = [field.name for field in free if field.type is str]
    if not texts and agent.input.has_files and has_files:  # what is said about a file is often optional
        texts = [field.name for field in free if field.type == (str | None)]
    return texts[0] if len(texts) == 1 else None


def _files_by_input(agent: Agent, files: Sequence[SentFile], others: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return each file for the first input that takes its kind, unless that has one already. Raises InvalidData."""
    found, free = dict[str, Any](), [field for field in agent.input.fields if field.name not in others]
    kinds = {file.media_type for file in files}
    places = {each: {field.name: _place_of(inspect.type_info(field.type), each) for field in free} for each in kinds}
    if len(files) > MAX_FILES:
        raise InvalidData.of(f"A run may have at most {MAX_FILES} files.", files[MAX_FILES].at)
    for file in files:
        for name, place in places[file.media_type].items():
            if place == "list":
                found.setdefault(name, []).append(file.value)
                break
            if place == "one" and name not in found:
                found[name] = file.value
                break
        else:
            kind = file.media_type.partition("/")[0].replace("application", "file")
            raise InvalidData.of(
                f"{agent.name!r} has no input for this {kind}, or no more room in it. Leave it out, or send it as "
                "another input by its name.",
                file.at,
            )
    return found


def media_types_of(agent: Agent) -> list[str]:
    """Return the media types of the files that an agent takes, beside texts."""
    types = [inspect.type_info(field.type) for field in agent.input.fields]
    return [name for name in (*MAGIC, UNKNOWN) if any(_place_of(each, name) for each in types)]


def _place_of(type_: inspect.Type, media_type: str) -> Literal["one", "list", ""]:
    """Return whether a type takes one file of a media type or a list; "" if none. Counts are checked later."""
    match type_:
        case inspect.Metadata():
            return _place_of(type_.type, media_type)
        case inspect.UnionType():
            return next(filter(None, (_place_of(each, media_type) for each in type_.types)), "")
        case inspect.CollectionType():
            return "list" if _place_of(type_.item_type, media_type) == "one" else ""
        case inspect.CustomType():
            return "one" if is_file(type_.cls) and media_type.startswith(type_.cls.KINDS) else ""
    return ""


def _encode(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode({**inputs, **others}))


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


# Results


async def _whole_text(agent: Agent | None, result: msgspec.Raw | LongJSON | None, *, as_json: bool) -> str:
    """Return a result of *agent* as text: its only output if that is a text, or else the JSON of all outputs.

    Raises: RunNotFound, StoreError.
    """
    raw = b"".join([piece async for piece in result.pieces()]) if isinstance(result, LongJSON) else result or b"null"
    name = None if as_json or agent is None else text_output_of(agent)
    text = None if name is None else msgspec.json.decode(raw).get(name)
    return text if isinstance(text, str) else bytes(raw).decode()  # another version of it may have had other outputs


async def text_of(engine: Engine, agents: Mapping[str, Agent], run: Run, *, as_json: bool) -> str:
    """Return the result of a completed run as text. Raises RunNotFound, StoreError."""
    result = await engine.shown_result(run)  # raises if the steps are missing because the store cannot be read
    return await _whole_text(agents.get(run.steps[-1].agent_name), result, as_json=as_json)


async def answer_of(engine: Engine, agents: Mapping[str, Agent], run: Run) -> str | msgspec.Raw | LongJSON | None:
    """Return the only output of a completed run if it is a text, or else its result. Raises RunNotFound, StoreError."""
    result = await engine.shown_result(run)
    agent = agents.get(run.steps[-1].agent_name)
    return result if agent is None or text_output_of(agent) is None else await _whole_text(agent, result, as_json=False)


def said_in(agents: Mapping[str, Agent], run: Run) -> list[Message]:
    """Return the messages of which the inputs of a run were made; none if its agent is missing."""
    agent = agents.get(run.agent_name)
    return [] if agent is None else messages_of(agent, run.inputs)


async def turn_of(engine: Engine, agents: Mapping[str, Agent], run: Run) -> list[Message]:
    """Return the messages of a completed run, and its answer last. Raises RunNotFound, StoreError."""
    return [*said_in(agents, run), Message("assistant", await text_of(engine, agents, run, as_json=False))]


def text_output_of(agent: Agent) -> str | None:
    """Return the name of the only output of *agent*, if that is a text."""
    fields = agent.output.fields
    return fields[0].name if len(fields) == 1 and fields[0].type is str else None


def check_schema(agents: Mapping[str, Agent], agent: Agent, schema: Any, at: str) -> None:
    """Raise InvalidData if a JSON Schema of a client is not that of the outputs of an agent that ends runs of *agent*.

    Titles and descriptions may differ.
    """
    last = {each.from_ for each in graph_of(agent.name, agents) if each.to is None} & agents.keys()
    schemas = [agents[name].output.result_schema for name in sorted(last)]
    try:
        is_same = any(is_same_schema(ours, schema) for ours in schemas)
    except RecursionError:
        is_same = False
    if not is_same:
        shown = " or ".join(map(_text, schemas))
        raise InvalidData.of(
            f"This schema is not that of the outputs of {agent.name!r}, which is {shown}. Send that, or leave it out.",
            at,
        )


# Streams


class SentText:
    """The text of an answer. What was sent cannot be taken back, so a text that replaces it must begin with it."""

    def __init__(self) -> None:
        self._sent, self._all, self._at = list[str](), "", 0
        self._is_behind = False

    def add(self, text: str) -> str:
        """Return what is to be sent after more *text* has come. Raises TextReplaced."""
        if not self._is_behind:
            self._sent.append(text)
            return text
        known = self._all[self._at : self._at + len(text)]
        if not text.startswith(known):
            message = "The answer was replaced by another one after a part of it had been sent."
            raise TextReplaced(message, self._all[: self._at] + text)
        self._at += len(text)
        self._is_behind = self._at < len(self._all)
        new = text[len(known) :]
        self._sent.append(new)
        return new

    def restart(self, text: str = "") -> str:
        """The text begins again, with *text*. Return what is to be sent. Raises TextReplaced."""
        self._all, self._at = "".join(self._sent), 0
        self._sent, self._is_behind = [self._all], bool(self._all)
        return self.add(text)

    def end(self, text: str) -> str:
        """The text ends as *text*. Return what is to be sent. Raises TextReplaced if more was sent than that."""
        new = self.restart(text)
        if self._is_behind:
            raise TextReplaced("The answer was replaced by a shorter one after it had been sent.", text)
        return new


def failure_text(error: str | None, run_id: str) -> str:
    return f"{error or 'The run was cancelled.'} The run is {run_id}."


def question_text(questions: Iterable[Question], run_id: str) -> str:
    """Return open questions for a client that has no other way to show them."""
    asked = "\n\n".join(question.question for question in questions)
    return f"{asked}\n\n(The run {run_id} waits for the answer.)"


class Thought(NamedTuple):
    """A piece of the reasoning of a model, which is not a part of the answer."""

    text: str


class TakenBack(NamedTuple):
    """All text that was sent does not count, and is replaced by this."""

    text: str


class StreamedAnswer:
    """The answer of a run as text, made from its events. Only an agent that ends the run is read while it writes.

    Args:
        takes_back: the client can take text back, and shows more than text: it gets ``TakenBack`` and the events in
            SHOWN, and no text for a result that is not text.
        slot: returns what is entered before a long text is read from the store, as soon as it raises no
            TooManyRequests, and is left when ``pieces`` is closed: so the memory for clients that read nothing is
            limited.
    """

    def __init__(
        self, agents: Mapping[str, Agent], *, as_json: bool, takes_back: bool = False, slot: Slot = nullcontext
    ) -> None:
        self._agents, self._as_json, self._takes_back, self._slot = agents, as_json, takes_back, slot
        self._agent: Agent | None = None
        #: the agent that writes the answer now, and the field that is its text
        self._writer: str | None = None
        self._field: str | None = None
        self._text = SentText()
        #: what separates the next thought from those before it, and one after that
        self._pause = self._next_pause = ""

    async def pieces(self, events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[Any, None]:
        """Yield ``str`` and ``Thought`` in pieces, None to keep the connection open, and at last one of ENDS.

        Raises: TextReplaced, RunNotFound, StoreError; EngineStopped if the server stops before the end.
        """
        takes_back = self._takes_back
        async with aclosing(events), AsyncExitStack() as held:
            async for event in events:
                if event is None:
                    yield None
                    continue
                added: str | Thought | TakenBack
                try:
                    if event.name == "run.completed" and self._agent is not None and (self.is_text or not takes_back):
                        while isinstance(event.data["result"], LongJSON):
                            with suppress(TooManyRequests):
                                held.enter_context(self._slot())
                                break
                            yield None
                            await anyio.sleep(SLOT_S)
                        whole = await _whole_text(self._agent, event.data["result"], as_json=self._as_json)
                        added = self._text.end(whole)
                    else:
                        added = self._added(event.name, event.data)
                except TextReplaced as exc:
                    if not takes_back:
                        raise
                    self._text = SentText()
                    added = TakenBack(self._text.add(exc.text))
                if added:
                    yield added
                if event.name in ENDS or (takes_back and event.name in SHOWN):
                    yield event
                if event.name in ENDS:
                    return
        raise EngineStopped("The server is stopping, and the answer is not complete.")

    @property
    def is_text(self) -> bool:
        """Whether the only output of the agent that was started last is a text."""
        return self._agent is not None and text_output_of(self._agent) is not None

    def _added(self, name: str, data: Mapping[str, Any]) -> str | Thought:
        if name == "step.started":
            self._start(self._agents.get(data["agent_name"]))
        elif "call_id" in data:
            pass  # an agent that the step has called
        elif name == "reasoning.delta":
            thought = Thought(self._pause + data["text"])
            self._pause, self._next_pause = "", "\n\n"
            return thought
        elif name == "output.delta" and data["field"] == self._field and data["agent_name"] == self._writer:
            return self._text.add(data["text"])
        elif name == "output.reset":
            self._pause = self._next_pause
            return self._text.restart() if data["agent_name"] == self._writer else ""
        elif name == "output.snapshot" and self._field in data["output"] and data["agent_name"] == self._writer:
            return self._text.restart(data["output"][self._field])
        return ""

    def _start(self, agent: Agent | None) -> None:
        self._agent, self._writer, self._field, self._pause = agent, None, None, self._next_pause
        if agent is not None and all(handoff.kind == "fixed" and handoff.to is None for handoff in agent.handoffs()):
            self._writer, self._field = agent.name, None if self._as_json else text_output_of(agent)


async def thoughts_of(engine: Engine, run_id: str) -> str:
    """Return the reasoning of a run that has ended or waits, and that is watched. Nothing of it is stored."""
    thoughts, answer = list[str](), StreamedAnswer({}, as_json=False)  # without agents, it has no text
    with suppress(EngineStopped):
        async with aclosing(answer.pieces(engine.events(run_id, reasoning=True))) as pieces:
            async for piece in pieces:
                if isinstance(piece, Thought):
                    thoughts.append(piece.text)
    return "".join(thoughts)

"""What chat completions and responses have in common: settings, contents, answers, tokens and streams."""

import re
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from flock.agents.agent import Agent
from flock.errors import FlockError, InvalidData
from flock.fair import FairShare
from flock.jsontype import JSONType
from flock.protocols.chats import Message, Part, SentFile, StreamedAnswer, TextReplaced, check_schema, file_in, text_in
from flock.runs import ClientSettings, ClientTool, Engine, Event, Question, Usage
from flock.runs.client import OPTIONS
from flock.web import orders
from flock.web.responses import KEEP_ALIVE

#: The types of content that are files, each with a media type of its kind.
FILES = {
    **{"image_url": "image/png", "input_image": "image/png", "input_audio": "audio/wav"},
    **{"file": "application/pdf", "input_file": "application/pdf"},
}

#: Items of a history that are not messages. A client could forge them, so agents do not see them.
UNSEEN = ("reasoning", "function_call", "mcp_approval_request", "mcp_list_tools", "mcp_call")

#: Settings that no agent takes. A request may have only those values, which change nothing.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    **{"n": (1,), "logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "stop": ([],), "functions": ([],)},
    **{"modalities": (["text"],), "max_tool_calls": (), "audio": (), "prompt": ()},
    "web_search_options": (),
}


class ContentPart(Part, frozen=True, kw_only=True):
    """A part of a message.

    In responses, the members of a file are beside ``type``; in chats, they are in an object named after the type.
    """

    type: str = ""
    url: str | None = None
    data: str | None = None
    format: str = ""
    file_data: str | None = None
    file_id: str | None = None
    filename: str | None = None
    detail: str | None = None
    image_url: "str | ContentPart | None" = None
    input_audio: "ContentPart | None" = None
    file: "ContentPart | None" = None


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """A message, or an answer: to a call of a tool (in chats a message of the role ``tool``), or about an approval."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    tool_call_id: str = ""
    call_id: str = ""
    output: str | list[Part] | None = None
    approval_request_id: str | None = None
    approve: bool | None = None
    reason: str | None = None


class Format(msgspec.Struct, frozen=True, rename={"of": "schema"}):
    """``text.format``, which has the schema *of* an answer, or ``response_format``, which has it in ``json_schema``."""

    type: str = "text"
    of: Any = None
    json_schema: "Format | None" = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the requests have in common. ``metadata.inputs`` is a JSON object of further inputs."""

    model: str
    stream: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def inputs(self) -> Mapping[str, msgspec.Raw]:
        """Inputs that are not messages, by name. Raises InvalidData."""
        try:
            return msgspec.json.decode((self.metadata or {}).get("inputs", "{}"), type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, RecursionError) as exc:
            raise InvalidData.of("It must be a string with a JSON object of inputs.", "/metadata/inputs") from exc


_NAMES = [*UNSUPPORTED, *OPTIONS, "tool_choice", "max_tokens", "max_completion_tokens", "max_output_tokens"]
_MEMBERS = [("tools", list[dict[str, Any]] | None, None), *((name, Any, None) for name in _NAMES)]
_SETTINGS: JSONType[Any] = JSONType(msgspec.defstruct("Sent", _MEMBERS, frozen=True), ignores_unknown=True)


def client_settings(body: bytes, messages: Iterable[Message], instructions: str = "") -> ClientSettings | None:
    """Return what the client brings to its run, with its system messages. The engine checks the values.

    Raises: InvalidData if a request has a setting that would have no effect, or another kind of tools.
    """
    sent, tools = _SETTINGS.decode(body), list[ClientTool]()
    for name, neutral in UNSUPPORTED.items():
        value = getattr(sent, name)
        if value is not None and value not in neutral:
            others = "".join(f", or send {msgspec.json.encode(each).decode()}" for each in neutral)
            raise InvalidData.of(f"No agent takes {name!r}. Leave it out{others}.", f"/{name}")
    for at, tool in enumerate(sent.tools if sent.tools and sent.tool_choice != "none" else ()):
        if tool.get("type") != "function":
            raise InvalidData.of("Only tools of the type 'function' are offered.", f"/tools/{at}")
        made = tool["function"] if isinstance(tool.get("function"), dict) else tool
        about = {name: made[name] for name in ClientTool.__struct_fields__ if made.get(name) is not None}
        if "parameters" in about:
            about["parameters"] = msgspec.Raw(msgspec.json.encode(about["parameters"]))
        tools.append(ClientTool(**{"name": "", **about}))
    limits = [sent.max_completion_tokens, sent.max_tokens, sent.max_output_tokens]
    limit = next((each for each in limits if each is not None), None)
    texts = filter(None, [instructions, *(each.content for each in messages if each.role in ("system", "developer"))])
    options: dict[str, Any] = {name: getattr(sent, name) for name in OPTIONS} | {"max_output_tokens": limit}
    client = ClientSettings(instructions="\n\n".join(texts) or None, tools=tuple(tools), **options)
    return None if client == ClientSettings() else client


def wants_json(agents: Mapping[str, Agent], agent: Agent, sent: Format | None, at: str) -> bool:
    """Whether the answer must be the JSON object of all outputs. Raises InvalidData if they have another schema."""
    if sent is None or sent.type == "text":
        return False
    if sent.type == "json_schema":
        nested = sent.json_schema or sent
        check_schema(agents, agent, nested.of, f"{at}/schema" if nested is sent else f"{at}/json_schema/schema")
    elif sent.type != "json_object":
        raise InvalidData.of(f"{sent.type!r} is not a format. Use text, json_object or json_schema.", f"{at}/type")
    return True


async def read(items: Sequence[Item], at: str) -> tuple[list[Message], dict[str, msgspec.Raw]]:
    """Return the messages of a request, and the answers after them, by the ids of their calls.

    In a chat, the answers are after the last message of the assistant, otherwise after the last one of anybody.

    Raises: InvalidData if there is something else.
    """
    messages, answers, share = list[Message](), dict[str, msgspec.Raw](), FairShare()
    for number, item in enumerate(items):
        await share.checkpoint()
        place, is_chat = f"{at}/{number}", at == "/messages"
        is_tool = is_chat and item.role == "tool"
        if is_tool or item.type == "function_call_output":
            text = text_in(item.content if is_tool else item.output, place)
            answers[item.tool_call_id if is_tool else item.call_id] = msgspec.Raw(msgspec.json.encode(text))
        elif item.role is not None and (is_chat or item.type == "message"):
            files = _files_of(item.content, place) if item.role == "user" else ()
            text = text_in(item.content, place, is_shown=item.role == "user", others=FILES)
            messages.append(Message(item.role, text, files))
            if item.role == "assistant" or not is_chat:
                answers.clear()
        elif item.type == "mcp_approval_response" and item.approval_request_id and item.approve is not None:
            output = {"approved": item.approve, **({} if item.reason is None else {"reason": item.reason})}
            answers[item.approval_request_id] = msgspec.Raw(msgspec.json.encode(output))
        elif item.type == "message":
            raise InvalidData.of("A message needs a role.", f"{place}/role")
        elif item.type not in UNSEEN:
            raise InvalidData.of(f"This item of the type {item.type!r} is not supported.", place)
    if answers and is_chat and not is_tool:
        raise InvalidData.of("The outputs of tools must be the last messages.", place)
    return messages, answers


def _files_of(content: str | Sequence[ContentPart] | None, at: str) -> tuple[SentFile, ...]:
    """Return the files of a message. Raises InvalidData for one that is neither a data URL nor stored here."""
    files = list[SentFile]()
    for number, part in enumerate(content if isinstance(content, list) else ()):
        if part.type not in FILES:
            continue
        about = getattr(part, part.type, None) or part
        about = ContentPart(url=about) if isinstance(about, str) else about
        sent = about.url or (part.image_url if isinstance(part.image_url, str) else None)
        if about.data is not None:
            sent = f"data:audio/{about.format};base64,{about.data}"
        elif about.file_data is not None:
            sent = about.file_data if about.file_data.startswith("data:") else f"data:;base64,{about.file_data}"
        place, more = f"{at}/content/{number}", {"name": about.filename, "detail": about.detail}
        files.append(file_in(sent, place, FILES[part.type], about.file_id, more=more))
    return tuple(files)


def usage_of(usage: Usage | None, read: str, written: str) -> dict[str, Any]:
    """Return tokens, with the names that a protocol has for those that a model has *read* and *written*."""
    usage = usage or Usage()
    return {
        f"{read}_tokens": usage.input_tokens,
        f"{read}_tokens_details": {"cached_tokens": usage.cached_tokens},
        f"{written}_tokens": usage.output_tokens,
        f"{written}_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def arguments_of(question: Question) -> str:
    """Return the arguments of a call that a question is about."""
    raw = question.arguments if isinstance(question.arguments, msgspec.Raw) else b"{}"
    return msgspec.json.encode(msgspec.json.decode(raw)).decode()  # a store may spell them otherwise


async def answers_in(engine: Engine, answers: Mapping[str, msgspec.Raw], at: str) -> orders.Answers:
    """Return *answers*, by the ids that clients have for questions.

    Raises: RunNotFound; InvalidData if an id is not of this server, they are for several runs, or outputs of calls are
        missing that the model has made together.
    """
    found = [re.fullmatch(r"(?:call|mcpr)_([0-9a-f-]{36})_(.+)", id_) for id_ in answers]
    run_ids = {match and match[1] for match in found}
    run_id = run_ids.pop()
    if run_id is None or run_ids:
        raise InvalidData.of("The answers are not for calls that this server has asked for, or for several runs.", at)
    outputs = {match[2]: output for match, output in zip(found, answers.values(), strict=True) if match}
    calls = {each.call_id: each.question for each in (await engine.get_run(run_id)).questions if each.is_for_client}
    missing = calls.keys() - outputs.keys()
    if missing and len(missing) < len(calls):
        raise InvalidData.of(f"The output of {calls[missing.pop()]!r} is missing. Send all outputs together.", at)
    return orders.Answers(run_id, outputs)


async def written(stream: orders.Stream, answer: StreamedAnswer, writer: Any) -> AsyncGenerator[bytes, None]:
    """Yield the body of a stream: what *writer* makes of its start, each piece, and its end or error."""
    yield writer.begin() or KEEP_ALIVE
    try:
        async with aclosing(answer.pieces(stream.events)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Event):
                    async with aclosing(writer.end(piece)) as events:
                        async for event in events:
                            if event:
                                yield event
                else:
                    yield (piece and writer.piece(piece)) or KEEP_ALIVE
    except FlockError as exc:
        yield writer.error(str(exc), "text_replaced" if isinstance(exc, TextReplaced) else "interrupted")

"""What chat completions and responses have in common: settings, contents, tokens and errors."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flock.agents.agent import Agent
from flock.errors import InvalidData
from flock.protocols.chats import check_schema
from flock.runs import Usage

#: The types of content that agents read.
TEXTS = ("text", "input_text", "output_text")

#: Settings of a model. An agent has its own, so a request may have only those values, which change nothing.
UNSUPPORTED: Mapping[str, Sequence[Any]] = {
    **{"temperature": (1,), "top_p": (1,), "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,)},
    **{"logit_bias": ({},), "logprobs": (False,), "top_logprobs": (0,), "stop": ([],), "modalities": (["text"],)},
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens", "max_tool_calls"), ()),
    **dict.fromkeys(("audio", "web_search_options", "prompt"), ()),
}


class Part(msgspec.Struct, frozen=True):
    """A part of the content of a message."""

    type: str
    text: str | None = None


class Schema(msgspec.Struct, frozen=True, rename={"of": "schema"}):
    """The JSON Schema of an answer."""

    of: Any = None


class Format(Schema, frozen=True, rename={"of": "schema"}):
    """``response_format``, where the schema is in ``json_schema``, or ``text.format``."""

    type: str = "text"
    json_schema: Schema | None = None


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


_SENT = msgspec.json.Decoder(msgspec.defstruct("Sent", [(name, Any, None) for name in UNSUPPORTED], frozen=True))


def check_settings(body: bytes) -> None:
    """Raise InvalidData if a request has a setting that would have no effect."""
    sent = _SENT.decode(body)
    for name, neutral in UNSUPPORTED.items():
        value = getattr(sent, name)
        if value is not None and value not in neutral:
            others = "".join(f", or send {msgspec.json.encode(each).decode()}" for each in neutral)
            detail = f"An agent has its own settings, so {name!r} has no effect. Leave it out{others}."
            raise InvalidData.of(detail, f"/{name}")


def wants_json(agents: Mapping[str, Agent], agent: Agent, sent: Format | None, at: str) -> bool:
    """Whether the answer must be the JSON object of all outputs. Raises InvalidData if they have another schema."""
    if sent is None or sent.type == "text":
        return False
    if sent.type == "json_schema":
        nested = sent.json_schema or sent
        check_schema(agents, agent, nested.of, f"{at}/schema" if nested is sent else f"{at}/json_schema/schema")
    elif sent.type != "json_object":
        raise InvalidData.of(
            f"{sent.type!r} is not a format. Use 'text', 'json_object' or 'json_schema'.", f"{at}/type"
        )
    return True


def content_text(content: str | Sequence[Part] | None, at: str, *, is_shown: bool) -> str:
    """Return the text of a message. Other parts are refused if the agent would see the message (*is_shown*)."""
    if not isinstance(content, Sequence) or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if is_shown and (part.type not in TEXTS or part.text is None):
            detail = f"A content part of the type {part.type!r} is not supported. Send text."
            raise InvalidData.of(detail, f"{at}/content/{number}")
    return "".join(part.text or "" for part in content if part.type in TEXTS)


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


def failure_text(error: str | None, run_id: str) -> str:
    return f"{error or 'The run was cancelled.'} The run is {run_id}."

"""Requests for chat completions: the body, and the ways to request JSON or calls of tools."""

import base64
import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.errors import DefinitionError, ModelError
from flock.files import TEXT, File, FileReference
from flock.models import localmodel, react
from flock.models.completions import Listener, Message, ToolSchema
from flock.models.images import without_metadata
from flock.models.models import Model
from flock.models.providers import Endpoint, enforces_schemas
from flock.runs import Usage
from flock.runs.client import OPTIONS

#: Ways to request JSON, the strictest first. If a server does not support one, the next one is tried.
FORMATS = ("json_schema", "json_object", "text")
#: Ways to request a stream, the best first, and the parts of the request. The last one is for servers without streams.
STREAMS: Mapping[str, Mapping[str, Any]] = {
    "stream": {"stream": True, "stream_options": {"include_usage": True}},
    "stream_without_usage": {"stream": True},
    "": {},
}
#: The options that are only sent with tools, and the values of the first one that are not the name of a tool.
TOOL_OPTIONS = ("tool_choice", "parallel_tool_calls")
TOOL_CHOICES = ("auto", "required", "none")


class Request(msgspec.Struct, frozen=True):
    """A request for one JSON object that matches *schema*, or for calls of *tools*.

    Attributes:
        options: others for the model; see ``ModelOptions``. Their ``temperature`` replaces that of the request.
        traceparent: trace context, sent as a header so that gateways and providers can link the request to a trace.
        idempotency_key: identifies this call in all attempts. If the server does not support strict JSON Schema,
            the fallback requests append ``/json_object`` or ``/text`` to it. If it does not support tools, the
            fallback appends ``/step`` before that. The second of several models gets ``/model2`` before that. A
            streamed request appends ``/stream`` at the end.
        listener: receives the reply while the model writes it. Without one, no stream is requested. A step as JSON
            is never streamed, and other servers may not support streams: then the listener receives nothing.
        on_unfinished: called with the tokens, and the model, of each request that was cancelled, and of each stream
            that broke off. They are estimated if the server sent none.
        is_strange: whether something in it is not ours, so that a server may reject it and accept all others.
        name: of the model that is asked; the client sets it.
    """

    messages: Sequence[Message]
    schema: Mapping[str, Any]
    tools: Sequence[ToolSchema] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    options: Mapping[str, Any] = {}
    traceparent: str | None = None
    idempotency_key: str | None = None
    listener: Listener | None = None
    on_unfinished: Callable[[Usage, str], None] = lambda usage, model: None
    is_strange: bool = False
    name: str = ""

    @property
    def all_options(self) -> dict[str, Any]:
        """The options that are members of the body, without those of tools."""
        given = ({} if self.temperature is None else {"temperature": self.temperature}) | dict(self.options)
        return {name: value for name, value in given.items() if name not in ("max_tokens", "extra_body", *TOOL_OPTIONS)}

    @property
    def tool_options(self) -> dict[str, Any]:
        """The members of the body that say how tools are called."""
        given = {name: self.options[name] for name in TOOL_OPTIONS if name in self.options}
        choice = given.get("tool_choice", "auto")
        return given if choice in TOOL_CHOICES else given | {"tool_choice": _only(choice)}

    @property
    def extra_body(self) -> Mapping[str, Any]:
        extra: Mapping[str, Any] = self.options.get("extra_body", {})
        return extra

    def unfinished(self, usage: Usage) -> None:
        self.on_unfinished(usage, self.name)

    def all_headers(self, format_: str = FORMATS[0]) -> dict[str, str]:
        """Return the headers, with a separate key per format: a server may store responses by key, even rejections."""
        headers = {} if self.traceparent is None else {"traceparent": self.traceparent}
        key = self.idempotency_key
        if key is not None:
            headers["Idempotency-Key"] = key if format_ == FORMATS[0] else f"{key}/{format_}"
        return headers

    def body(self, endpoint: Endpoint) -> dict[str, Any]:
        """Return the body of a request, without the part that requests JSON."""
        body = {"model": endpoint.model, "messages": self.messages, **endpoint.settings}
        left_out = () if endpoint.has_temperature else OPTIONS
        body |= {name: value for name, value in self.all_options.items() if name not in left_out}
        if self.max_tokens is not None:
            body[endpoint.max_tokens_field] = self.max_tokens
        return {**body, **self.extra_body}


def _only(tool: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool}}


def with_cache_marks(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return *messages* with marks for Anthropic's cache: the system message, and the last one if it is the user's.

    What is before a mark is read from the cache when it is sent again, with the tools.
    """
    marked: list[dict[str, Any]] = msgspec.to_builtins(messages)
    for message in (marked[0], marked[-1]):
        if message["role"] in ("system", "user") and isinstance(message["content"], str):
            part = {"type": "text", "text": message["content"], "cache_control": {"type": "ephemeral"}}
            message["content"] = [part]
    return marked


_WAV_MP3 = ("audio/wav", "audio/mpeg")
#: Kinds and media types that the providers take beside texts. Those that are not listed take images. See docs/files.md.
TAKES: Mapping[str, Sequence[str]] = {
    "openai": ("image", "application/pdf", *_WAV_MP3),
    **dict.fromkeys(("openrouter", "litellm"), ("image", "application/pdf", "audio")),
    **dict.fromkeys(("azure", "llamacpp"), ("image", *_WAV_MP3)),
    "gemini": ("image/png", "image/jpeg", "image/webp", *_WAV_MP3, "audio/ogg", "audio/flac"),
    "vllm": ("image", "audio"),
    **dict.fromkeys(("deepseek", "cerebras", "local"), ()),
}
#: The formats of audio that have another name in requests than in media types.
AUDIO_FORMATS = {"mpeg": "mp3", "mp4": "m4a"}
#: Max size of a file, in bytes, for the providers that take less than ``MAX_BYTES``.
MAX_FILE_BYTES, MAX_BYTES = {"anthropic": 5_000_000, "groq": 3_000_000, "mistral": 10_000_000}, 20_000_000
#: Max size of all files of a call, which are in memory while it is sent.
MAX_ALL_BYTES = 50_000_000


def bytes_of_files(messages: Sequence[Message]) -> int:
    """Return how many bytes of text the files of *messages* probably cost. See docs/files.md."""
    kinds = [(each.media_type.partition("/")[0], each.size) for message in messages for each in message.files]
    return sum({"text": size, "image": 4000}.get(kind, 4000 + size // 10) for kind, size in kinds)


def check_files(messages: Sequence[Message], provider: str) -> None:
    """Raise ModelError if the provider does not take the files of *messages*, and CallError if a text is gone."""
    kinds, most, total = (*TAKES.get(provider, ("image",)), "text"), MAX_FILE_BYTES.get(provider, MAX_BYTES), 0
    for file in [File(each) for message in messages for each in message.files]:
        what, total = f"{file.media_type} of {file.size:,} bytes", total + file.size
        if not file.media_type.startswith(kinds) or file.size > most:
            error = f"{provider} does not accept {what} from here. It takes {', '.join(kinds)}, at most {most:,} bytes."
            raise ModelError(error, "model_bad_request")
        if total > MAX_ALL_BYTES:
            raise ModelError(f"The files of a call may have {MAX_ALL_BYTES:,} bytes in all.", "model_bad_request")
        try:
            file.media_type == TEXT and file.text()
        except UnicodeDecodeError as exc:
            raise ModelError(f"The text {file.name or file.sha256!r} is not in UTF-8.", "model_bad_request") from exc


def with_contents(messages: Sequence[Message], strips_metadata: bool) -> list[Any]:
    """Return *messages* with the contents of their files.

    Raises: CallError if one is not stored any more; ModelError if the metadata of an image cannot be removed.
    """

    def parts(message: Message) -> list[dict[str, Any]]:
        return [{"type": "text", "text": message.content}, *(_part(file, strips_metadata) for file in message.files)]

    return [{"role": each.role, "content": parts(each)} if each.files else each for each in messages]


def encoded(body: Mapping[str, Any], endpoint: Endpoint, has_files: bool = False) -> bytes:
    """Return a body as JSON, with the contents of its files if it has some; see ``with_contents``."""
    messages = with_contents(body["messages"], endpoint.strips_metadata) if has_files else body["messages"]
    messages = with_cache_marks(messages) if endpoint.has_cache_marks else messages
    return msgspec.json.encode({**body, "messages": messages})


def _part(reference: FileReference, strips_metadata: bool) -> dict[str, Any]:
    file, (kind, _, form) = File(reference), reference.media_type.partition("/")
    if kind == "text":
        return {"type": "text", "text": f"{file.name}:\n{file.text()}"}
    content = file.read()
    if strips_metadata:
        try:
            content = without_metadata(content, file.media_type)
        except ValueError as exc:
            error = f"{exc} ({file.name or file.sha256!r}), so its metadata cannot be removed (strip_metadata=True)."
            raise ModelError(error, "model_bad_request") from exc
    data = base64.b64encode(content).decode()
    url = f"data:{file.media_type};base64,{data}"
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": AUDIO_FORMATS.get(form, form)}}
    if kind == "application":
        return {"type": "file", "file": {"filename": file.name or "file.pdf", "file_data": url}}
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": file.detail} if file.detail else {})}


def next_step(request: Request) -> Request:
    """Return the request that asks for the next step as JSON, in place of a tool call."""
    choice = request.options.get("tool_choice", "auto")
    chosen = [tool for tool in request.tools if choice in (*TOOL_CHOICES, tool.name)]
    tools = [*chosen, react.FINISH_TOOL] if choice == "auto" else chosen
    return replace(
        request,
        messages=react.with_tools(react.as_text(request.messages), tools),
        schema=react.schema_of(tools),
        tools=(),
        idempotency_key=request.idempotency_key and f"{request.idempotency_key}/step",
        listener=None,  # a step is not an answer
    )


def streamed(
    way: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Return a request as a stream. It has its own key, since the same run may not be streamed when it is repeated."""
    key = headers.get("Idempotency-Key")
    return {**body, **STREAMS[way]}, {**headers, "Idempotency-Key": f"{key}/{way}"} if key and way else headers


def format_of(format_: str, request: Request, *, is_local: bool = False, may_be_strict: bool = True) -> dict[str, Any]:
    """Return the part of a request that requests JSON."""
    if format_ == "json_schema":
        is_strict, schema = _strict_schema(request.schema) if may_be_strict else (False, dict(request.schema))
        if is_local:
            schema = localmodel.bounded_schema(request.schema, request.max_tokens or localmodel.MAX_TOKENS)
        json_schema = {"name": "answer", "strict": is_strict, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": json_schema}}
    part: dict[str, Any] = {"messages": _with_format_in_words(request)}
    return part | {"response_format": {"type": "json_object"}} if format_ == "json_object" else part


def _with_format_in_words(request: Request) -> Sequence[Message]:
    instruction = "Answer with one JSON object and nothing else. It must match this JSON Schema:"
    if request.tools:
        instruction = f"Call the tools that you need first. {instruction}"
    head, *rest = request.messages
    return [Message(head.role, f"{head.content}\n\n{instruction}\n{json.dumps(request.schema)}"), *rest]


def function_of(tool: ToolSchema) -> dict[str, Any]:
    """Return a tool as a request has it. It is strict if its schema allows that and has no optional arguments."""
    function: dict[str, Any] = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    is_strict, parameters = _strict_schema(tool.schema) if tool.may_be_strict else (False, {})
    if is_strict and parameters.get("required", []) == tool.schema.get("required", []):
        function |= {"parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


#: Keywords that strict mode supports. Other constraints are in the description, and checked in the answer.
STRICT_KEYWORDS = frozenset(
    "type properties required additionalProperties items enum const anyOf description title $ref $defs pattern "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems".split()
)
#: What strict mode does not allow, by type.
NOT_STRICT = {"object": "may have any keys", "array": "is a tuple, or a list of anything"}
OTHER_CONSTRAINTS = ("minLength", "maxLength", "minProperties", "maxProperties", "uniqueItems")
STRICT_FORMATS = frozenset("date-time time date duration email hostname ipv4 ipv6 uuid".split())
#: Of how many schemas the strict form is kept, and the max length of such a schema as JSON.
MAX_KEPT, MAX_KEPT_BYTES = 500, 4096
_kept: dict[bytes, tuple[Sequence[str], dict[str, Any]]] = {}


def _strict_schema(schema: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Return whether *schema* can be used in strict mode, and the schema in that form: closed objects, all required.

    Source: OpenAI's guide to structured outputs, "Supported schemas".
    """
    problems, strict = _as_strict(schema)
    return (False, dict(schema)) if problems else (True, strict)


def _as_strict(schema: Mapping[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    """Return why *schema* cannot be used in strict mode, and as much of it in that form as possible.

    Each call of a model has a schema, and those of its tools. So the forms of ``MAX_KEPT`` schemas are kept, but not
    those of long ones, which a client may have sent.
    """
    try:
        key = msgspec.json.encode(schema)
    except (TypeError, ValueError):  # such as an object as a default, which strict mode drops
        return _converted(schema)
    if len(key) > MAX_KEPT_BYTES:
        return _converted(schema)
    kept = _kept.get(key)
    if kept is None:
        if len(_kept) >= MAX_KEPT:
            _kept.clear()
        kept = _kept[key] = _converted(copy.deepcopy(schema))
    return kept


def _converted(schema: Mapping[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
    problems: list[str] = []

    def convert(node: Mapping[str, Any], at: str) -> dict[str, Any]:
        converted = {key: value for key, value in node.items() if key in STRICT_KEYWORDS}
        if node.get("format") in STRICT_FORMATS:
            converted["format"] = node["format"]
        others = {key: node[key] for key in OTHER_CONSTRAINTS if key in node}
        if localmodel.has_lookaround(converted):
            others["pattern"] = converted.pop("pattern")
        if others:
            in_words = ", ".join(f"{key}: {json.dumps(value)}" for key, value in others.items())
            converted["description"] = f"{node.get('description', '')} ({in_words})".lstrip()
        is_open = {"object": "properties" not in converted, "array": not isinstance(converted.get("items"), Mapping)}
        if not converted.keys() & {"type", "enum", "const", "anyOf", "$ref"} or is_open.get(converted.get("type", "")):
            problems.append(f"{at} {NOT_STRICT.get(converted.get('type', ''), 'may be anything')}")
            return dict(node)
        if "properties" in converted:
            members = {name: convert(member, f"{at}/{name}") for name, member in converted["properties"].items()}
            converted |= {
                "properties": members,
                "required": list(converted["properties"]),
                "additionalProperties": False,
            }
        if "items" in converted:
            converted["items"] = convert(converted["items"], f"{at}/0")
        if "anyOf" in converted:
            converted["anyOf"] = [convert(member, at) for member in converted["anyOf"]]
        if "$defs" in converted:
            converted["$defs"] = {name: convert(member, f"{at}/{name}") for name, member in converted["$defs"].items()}
        return converted

    strict = convert(schema, "")
    return problems, strict


def check_strict(schema: Mapping[str, Any], models: Sequence[Model], owner: str) -> None:
    """Raise DefinitionError if one of *models* is to enforce the *schema* of an output, and cannot."""
    for name in [model.name for model in models if enforces_schemas(model)]:
        nodes = list(_nodes(schema, 0))
        counts = {
            "levels of objects in objects": (max(level for level, node in nodes if "properties" in node), 10),
            "fields": (sum(len(node.get("properties", ())) for _, node in nodes), 5000),
            "values of enums": (sum(len(node.get("enum", ())) for _, node in nodes), 1000),
        }
        too_many = (f"it has {n} {what}, more than {most}" for what, (n, most) in counts.items() if n > most)
        if problem := next(iter(_as_strict(schema)[0]), None) or next(too_many, None):
            raise DefinitionError(
                f"The output of {owner} is not allowed in the strict mode of {name!r}: {problem}. Use other types, "
                f"such as a list of structs in place of a dict, or pass Model({name!r}, strict=False)."
            )


def _nodes(schema: Mapping[str, Any], level: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield *schema* and what is below it, each with the number of objects around it."""
    yield level, schema
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ()), schema.get("items")]
    for nodes, below in ((inner, level + ("properties" in schema)), (schema.get("$defs", {}).values(), 0)):
        for node in nodes:
            yield from _nodes(node, below) if isinstance(node, Mapping) else ()


def rejects_format(error: ModelError) -> bool:
    pattern = r"response_format|json.?schema|json_object|json mode|structured output|grammar"
    return error.error_type == "model_bad_request" and bool(re.search(pattern, error.log_detail, re.I))


def rejects_stream(error: ModelError) -> bool:
    return error.error_type == "model_bad_request" and bool(re.search(r"\bstream", error.log_detail, re.I))


def rejects_tools(error: ModelError) -> bool:
    if error.error_type in ("model_bad_request", "model_not_found"):
        return bool(re.search(r"\btools?\b|tool_choice|function.call", error.log_detail, re.I))
    return "--jinja" in error.log_detail  # llama.cpp sends this with status 500

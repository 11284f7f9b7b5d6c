"""The Model Context Protocol: an agent is a tool, and a call of it is a run. Revisions 2025-03-26 to 2026-07-28.

``POST /mcp``. A client of 2026-07-28 sends its revision and its capabilities with each request. Older clients begin
with ``initialize``, which gives them a session; it only makes the ids of their requests unique.
"""

import base64
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock import __version__
from flock.agents.agent import Agent, ModelAgent
from flock.agents.graph import graph_of
from flock.agents.handoff import agent_of
from flock.errors import AgentNotFound, Conflict, FlockError, InvalidData, NotFound
from flock.fair import FairShare
from flock.protocols.chats import text_of
from flock.protocols.jsonrpc import (
    ID,
    INTERNAL_ERROR,
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    OTHER_ERROR,
    PARSE_ERROR,
    Message,
    RPCError,
    decoded,
    failed,
    reply,
)
from flock.runs import Engine, IdempotencyKey, LongJSON, Question, Run, RunStatus
from flock.web import orders, wire
from flock.web.auth import ANYBODY
from flock.web.negotiation import preferred
from flock.web.responses import (
    KEEP_ALIVE,
    EventStream,
    JSONResponse,
    LongResponse,
    PageResponse,
    QuotedJSON,
    long_event,
    sent_event,
)
from flock.web.routing import AppRoute, principal_of

#: How the paths of all routes begin.
PREFIX = "/mcp"

LATEST = "2026-07-28"
#: The revisions with ``initialize``, the newest first. The last one is that of clients that send no header.
OLDER = ("2025-11-25", "2025-06-18", "2025-03-26")
VERSIONS = (LATEST, *OLDER)

# Codes of errors
HEADER_MISMATCH, UNSUPPORTED_VERSION = -32020, -32022
#: Of resources, before 2026-07-28.
NOT_FOUND = -32002

#: Tools in one page.
MAX_TOOLS = 100
#: How long clients may keep what they have listed.
LIST_TTL_MS = 60_000
MAX_BATCH = 50
#: When the responses to a batch have more bytes, the rest of its messages are refused.
MAX_BATCH_BYTES = 1024 * 1024
#: Seconds for the answer of a person.
STATE_LIFETIME_S = 86_400
#: Of the text of a long result, which is in the structured content only, with a link to the run.
MAX_TEXT_BYTES = 1000

#: What a tool needs the name of, as it is also in the header ``Mcp-Name``.
NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
#: What a form of MCP may say about a field.
FORM_KEYWORDS = "type title description default enum format minLength maxLength minimum maximum".split()
FORM_FORMATS = ("email", "uri", "date", "date-time")

#: The progress of a piece of text. An agent that reports its own counts otherwise.
PIECE = 1e-6
RUN_URI = "flock://run/"
#: In the metadata of a result.
RUN_ID = "flockapi/run_id"


# Requests


VERSION, CAPABILITIES = "io.modelcontextprotocol/protocolVersion", "io.modelcontextprotocol/clientCapabilities"
META = {"token": "progressToken", "version": VERSION, "capabilities": CAPABILITIES}


class Meta(msgspec.Struct, frozen=True, rename=META):
    """What a request says about itself. Older clients send the token at most."""

    token: ID | None = None
    version: str | None = None
    capabilities: dict[str, Any] | None = None


class Answer(msgspec.Struct, frozen=True):
    """What a person has done with a form."""

    action: Literal["accept", "decline", "cancel"]
    content: dict[str, Any] | None = None


class Params(msgspec.Struct, frozen=True, rename="camel"):
    """The parameters of all methods."""

    name: str = ""
    arguments: dict[str, msgspec.Raw] | None = None
    uri: str = ""
    cursor: str | None = None
    protocol_version: str = ""
    request_id: ID | None = None
    input_responses: dict[str, Answer] | None = None
    request_state: str | None = None
    meta: Meta = msgspec.field(default=Meta(), name="_meta")


class Call(NamedTuple):
    """One request as the methods see it."""

    request: Request
    message: Message
    params: Params
    version: str
    may_stream: bool

    @property
    def is_latest(self) -> bool:
        return self.version == LATEST

    @property
    def session(self) -> str | None:
        return None if self.is_latest else self.request.headers.get("mcp-session-id")

    @property
    def agents(self) -> Mapping[str, Agent]:
        return orders.agents_of(self.request)

    @property
    def has_forms(self) -> bool:
        """Whether the client can ask a person."""
        forms = (self.params.meta.capabilities or {}).get("elicitation")
        return self.is_latest and isinstance(forms, dict) and (not forms or "form" in forms)

    @property
    def digest(self) -> str:
        """A digest of what is called. Another request with the same digest is the same call."""
        arguments = decoded(msgspec.json.encode(self.params.arguments or {}), Any, INVALID_PARAMS)
        return _sha256([self.params.name, arguments])

    def key_of(self, request_id: ID | None) -> IdempotencyKey | None:
        """Return what finds the run of a request of the same session again, in any process."""
        if self.session is None:
            return None
        return IdempotencyKey(f"mcp:{_sha256([self.session, request_id])}", self.digest.encode())


def _sha256(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def routes() -> Sequence[AppRoute]:
    return [AppRoute("access", "POST", "/mcp", mcp)]


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error that no method has raised."""
    codes = {"malformed-json": PARSE_ERROR, "internal-error": INTERNAL_ERROR}
    data = {"type": problem.type, "status": problem.status, "request_id": problem.request_id}
    code = codes.get(problem.type.rpartition(":")[2], OTHER_ERROR)
    return problem.status, reply(None, error={"code": code, "message": problem.detail, "data": data})


# Handlers


async def mcp(request: Request) -> Response:
    """POST /mcp"""
    body = await orders.read_json(request)
    if body.lstrip()[:1] != b"[":
        return await _respond(request, body)
    try:
        messages = decoded(body, list[msgspec.Raw], INVALID_REQUEST)
    except RPCError as exc:
        return _response(None, exc)
    if request.headers.get("mcp-protocol-version", OLDER[-1]) != OLDER[-1] or not 0 < len(messages) <= MAX_BATCH:
        problem = f"Only {OLDER[-1]} has batches, of 1 to {MAX_BATCH} messages. Send one message."
        return _response(None, RPCError(INVALID_REQUEST, problem))
    bodies, batch_bytes, share, slot = list[Any](), 0, FairShare(), orders.download_slot(request)
    for raw in messages:
        response = await _respond(request, raw, batch_bytes)
        if isinstance(response, LongResponse):
            bodies.append(response.content)
            batch_bytes += response.size
        elif response.body:
            bodies.append(msgspec.Raw(bytes(response.body).rstrip()))
            batch_bytes += len(response.body)
        await share.checkpoint()
    if any(not isinstance(body, msgspec.Raw) for body in bodies):
        return LongResponse(bodies, 200, {}, is_head=False, slot=slot)
    return PageResponse(bodies, slot) if bodies else Response(status_code=202)


async def _respond(request: Request, raw: bytes | msgspec.Raw, batch_bytes: int | None = None) -> Response:
    """Return the response to one message: 202 for one that needs none.

    Args:
        batch_bytes: of the responses before it in a batch; None for a message that is not in a batch.
    """
    message, call = None, None
    try:
        message = decoded(raw, Message, INVALID_REQUEST)
        params = decoded(message.params, Params, INVALID_PARAMS)
        call = Call(request, message, params, _version_of(request, message, params), batch_bytes is None)
        is_known = call.session is None or await _is_signed(call, call.session, "session")
        if message.method != "initialize" and not is_known:
            problem = RPCError(OTHER_ERROR, "This is not a session of this server. Send initialize again.")
            return _response(message, problem, 404)
        if message.id is None or not message.method:
            key = call.key_of(params.request_id) if message.method == "notifications/cancelled" else None
            if key is not None:
                await orders.cancel(request, key)
            return Response(status_code=202)
        if (batch_bytes or 0) > MAX_BATCH_BYTES:
            raise RPCError(OTHER_ERROR, "The responses before this one in the batch are too long. Send it alone.")
        answer = await _answer_to(call)
        return answer if isinstance(answer, Response) else _response(message, _complete(call, answer))
    except RPCError as exc:
        status = exc.status if call is None or call.is_latest else 200  # for older clients, 404 ends a session
        return _response(message, exc, status)
    except FlockError as exc:
        return await failed(request, message, exc)


def _version_of(request: Request, message: Message, params: Params) -> str:
    """Return the revision of a request, after its headers are compared with it. Raises RPCError."""
    header, meta = request.headers.get("mcp-protocol-version"), params.meta
    if meta.version is None and (header in (None, *OLDER) or (message.method == "initialize" and header != LATEST)):
        return header or OLDER[-1]
    version = meta.version or header
    if LATEST in (meta.version, header) and message.id is not None and None in (meta.version, meta.capabilities):
        raise RPCError(INVALID_PARAMS, f"params._meta needs {VERSION} and {CAPABILITIES}.")
    expected = {"mcp-protocol-version": version, "mcp-method": message.method}
    if message.method in NAMED:
        expected["mcp-name"] = getattr(params, NAMED[message.method])
    for name, value in expected.items() if meta.version and not request.scope.get("flock.is_stdio") else ():
        if list(map(_plain, request.headers.getlist(name))) != [value]:
            raise RPCError(HEADER_MISMATCH, f"The header {name} must have the value of the body, and be sent once.")
    if version != LATEST:
        problem = f"The revision is not supported. Use one of {', '.join(VERSIONS)}."
        raise RPCError(UNSUPPORTED_VERSION, problem, supported=VERSIONS, requested=version)
    return LATEST


def _plain(value: str) -> str | None:
    """Return the value of a header, which may be in base64; None if that is invalid."""
    encoded = re.fullmatch(r"=\?base64\?(.*)\?=", value)
    with suppress(ValueError):
        return value.strip() if encoded is None else base64.b64decode(encoded[1], validate=True).decode()
    return None


def _response(message: Message | None, answer: Mapping[str, Any] | RPCError, status: int | None = None) -> Response:
    if isinstance(answer, RPCError):
        return JSONResponse(reply(message, error=answer.shown), status or answer.status)
    run_id, body = answer.get("_meta", {}).get(RUN_ID), reply(message, result=answer)
    headers = {"Flock-Run-Id": run_id} if run_id else {}
    if isinstance(answer.get("structuredContent"), LongJSON):
        return LongResponse(body, 200, headers, is_head=False)
    return JSONResponse(body, headers=headers)


def _complete(call: Call, result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return *result* with what results of the latest revision have."""
    if not call.is_latest:
        return result
    meta = {**result.get("_meta", {}), "io.modelcontextprotocol/serverInfo": _server_info(call)}
    ttl_ms = {"tools/call": None, "resources/read": 0}.get(call.message.method, LIST_TTL_MS)
    cached = {} if ttl_ms is None else {"ttlMs": ttl_ms, "cacheScope": "private"}
    return {"resultType": "complete", **result, **cached, "_meta": meta}


def _server_info(call: Call) -> dict[str, str]:
    return {"name": "flockapi", "title": orders.serving(call.request).options.server_name, "version": __version__}


async def _answer_to(call: Call) -> Mapping[str, Any] | Response:
    """Return the result of a request. Raises RPCError, and errors of the engine."""
    capabilities: Mapping[str, Any] = {"tools": {}, "resources": {}}
    match call.message.method:
        case "tools/call":
            return await _call(call)
        case "tools/list":
            return _listed(call)
        case "resources/read":
            return await _read(call)
        case "resources/list":
            return {"resources": []}
        case "resources/templates/list":
            run = {"uriTemplate": f"{RUN_URI}{{run_id}}", "name": "run", "mimeType": "application/json"}
            return {"resourceTemplates": [run]}
        case "server/discover" if call.is_latest:
            return {"supportedVersions": VERSIONS, "capabilities": capabilities}
        case "initialize" if not call.is_latest and call.may_stream:
            version = call.params.protocol_version if call.params.protocol_version in OLDER else OLDER[0]
            result = {"protocolVersion": version, "capabilities": capabilities, "serverInfo": _server_info(call)}
            session = await _signed(call, secrets.token_hex(16), "session")
            return JSONResponse(reply(call.message, result=result), headers={"Mcp-Session-Id": session})
        case "ping" if not call.is_latest:
            return {}
    raise RPCError(METHOD_NOT_FOUND, f"This server has no method {call.message.method[:100]!r}.", 404)


# Tools


def _listed(call: Call) -> dict[str, Any]:
    """Return one page of tools. The cursor is the name of the last one before it."""
    names, cursor = list(call.agents), call.params.cursor
    if cursor is not None and cursor not in names:
        raise RPCError(INVALID_PARAMS, "The cursor is not one of this server. List the tools from the start.")
    rest = names if cursor is None else names[names.index(cursor) + 1 :]
    more = {"nextCursor": rest[MAX_TOOLS - 1]} if len(rest) > MAX_TOOLS else {}
    return {"tools": [_tool(name, call.agents) for name in rest[:MAX_TOOLS]], **more}


def _tool(name: str, agents: Mapping[str, Agent]) -> dict[str, Any]:
    """Return an agent as a tool. Its results have a schema if the last agent of a run is known."""
    agent, graph = agents[name], graph_of(name, agents)
    title = name.replace("_", " ").replace("-", " ").strip().capitalize()
    last = {each.from_ for each in graph if each.to is None}
    is_plain = isinstance(agent, ModelAgent) and not agent.tools and len(graph) == 1
    tool = {"name": name, "title": title, "description": agent.description, "inputSchema": agent.input.schema}
    tool["annotations"] = {"title": title, "readOnlyHint": is_plain, "openWorldHint": True}
    if len(last) == 1 and all(each.kind != "function" and (each.to is None or each.to in agents) for each in graph):
        tool["outputSchema"] = agents[last.pop()].output.result_schema
    return tool


async def _call(call: Call) -> Mapping[str, Any] | Response:
    """tools/call: start a run, or answer the questions of one, and wait for its end or its next question."""
    request, params = call.request, call.params
    try:
        agent = agent_of(call.agents, params.name)
    except AgentNotFound as exc:
        raise RPCError(INVALID_PARAMS, str(exc)) from exc
    engine, problems = await orders.engine_of(request), dict[str, str]()
    takes_events = preferred(request.headers.get("accept", ""), [EventStream.media_type]) is not None
    is_streamed, stream = call.may_stream and takes_events and params.meta.token is not None, None
    if params.request_state is not None:
        run, problems, unanswered = await _answered(call, engine)
        if unanswered is not None:
            return _failed(run, f"The question was not answered.\n\n{_shown(unanswered)}")
        if is_streamed:
            stream = await orders.stream(request, orders.Answers(run.run_id, is_async=False), reasoning=False)
    else:
        order = orders.Order(agent_name=agent.name, inputs=params.arguments or {}, key=call.key_of(call.message.id))
        try:
            stream = await orders.stream(request, order, reasoning=False) if is_streamed else None
            run, _ = await orders.accept(request, order) if stream is None else stream.accepted
        except InvalidData as exc:  # a model can read it, and call again
            return {"content": [_text(str(exc))], "isError": True}
    if stream is None:
        outlives = run.is_async and params.request_state is None  # a run that has waited is async
        return await _outcome(call, engine, await orders.end_of(request, run.run_id, outlives), problems)
    return stream.response(_events(call, stream, engine, problems))


async def _events(
    call: Call, stream: orders.Stream, engine: Engine, problems: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """Yield the progress of a run, with its text as it is written, and the response."""
    run_id, done = stream.accepted.run.run_id, -PIECE
    try:
        async with aclosing(stream.events) as events:
            async for event in events:
                if event is None:
                    yield KEEP_ALIVE
                    continue
                data, shown = event.data, dict[str, Any]()
                if event.name == "run.progress" and data["done"] > done:  # it must increase
                    shown = {"progress": data["done"], "total": data["total"], "message": data["message"]}
                elif event.name == "output.delta" and "call_id" not in data:
                    shown = {"progress": done + PIECE, "message": data["text"]}
                if shown:
                    done = shown["progress"]
                    shown = {name: value for name, value in shown.items() if value not in (None, "")}
                    shown["progressToken"] = call.params.meta.token
                    yield sent_event({"jsonrpc": "2.0", "method": "notifications/progress", "params": shown})
        result = await _outcome(call, engine, await engine.wait(run_id), problems)
        last = reply(call.message, result=_complete(call, result))
    except FlockError as exc:
        last = reply(call.message, error=RPCError(OTHER_ERROR, f"{exc} The run is {run_id}.").shown)
    async for piece in long_event(last):
        yield piece


async def _outcome(call: Call, engine: Engine, run: Run, problems: Mapping[str, str]) -> Mapping[str, Any]:
    """Return the result of a call whose run has ended or waits for an answer.

    Args:
        problems: of an answer, by the id of its question, which is asked again.
    """
    meta = {"_meta": {RUN_ID: run.run_id}}
    if run.status is RunStatus.COMPLETED:
        result = await engine.shown_result(run)
        if isinstance(result, LongJSON) and call.may_stream and call.version != OLDER[-1]:
            link = {"type": "resource_link", "uri": f"{RUN_URI}{run.run_id}", "name": run.run_id}
            start = (await result.read(0, MAX_TEXT_BYTES)).decode(errors="ignore")
            content = [_text(f"{start}…"), {**link, "mimeType": "application/json", "size": result.length}]
        else:
            whole, text = [await text_of(engine, call.agents, run, as_json=as_json) for as_json in (True, False)]
            result, content = msgspec.Raw(whole.encode()), [_text(text)]
        return {"content": content, "structuredContent": result, **meta}
    if run.status is not RunStatus.WAITING:
        return _failed(run, run.error or f"The run was {run.status}.")
    forms = {}
    for question in run.questions if call.has_forms else ():
        form = _form(question)
        if form is not None and orders.may_answer(call.request, run, question):
            shown = problems.get(question.call_id, "") + _shown(question)
            params = {"mode": "form", "message": shown, "requestedSchema": form}
            forms[question.call_id] = {"method": "elicitation/create", "params": params}
    if not forms:
        return _failed(run, "\n\n".join(map(_shown, run.questions)))
    payload = msgspec.json.encode([run.run_id, int(time.time()) + STATE_LIFETIME_S, *forms])
    state = await _signed(call, base64.urlsafe_b64encode(payload).decode(), call.digest)
    return {"resultType": "input_required", "inputRequests": forms, "requestState": state, **meta}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _failed(run: Run, why: str) -> dict[str, Any]:
    state = "waits for the answer" if run.status is RunStatus.WAITING else f"is {run.status}"
    content = [_text(f"{why}\n\nThe run {run.run_id} {state}.")]
    return {"content": content, "isError": True, "_meta": {RUN_ID: run.run_id}}


# Questions


def _shown(question: Question) -> str:
    about = b"" if isinstance(question.arguments, msgspec.UnsetType) else b"\n" + bytes(question.arguments)
    return question.question + about.decode()


def _simple(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a schema as forms may have it: a text, a number, a flag or a choice. None if it is something else."""
    schema = {**definitions.get(schema.get("$ref", "").rpartition("/")[2], {}), **schema}
    choices = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(choices) == 1:
        return _simple({**schema, **choices[0], "anyOf": ()}, definitions)
    if all(isinstance(each, str) for each in schema.get("enum", [0])):
        schema["type"] = "string"
    elif "enum" in schema or schema.get("type") not in ("string", "integer", "number", "boolean"):
        return None
    if schema.get("format") not in FORM_FORMATS:
        schema.pop("format", None)
    return {name: schema[name] for name in FORM_KEYWORDS if schema.get(name) is not None}


def _form(question: Question) -> dict[str, Any] | None:
    """Return the schema of a form. What it cannot show is left out; None if that is required.

    An answer that is not an object is its field ``answer``.
    """
    schema = msgspec.json.decode(question.schema)
    definitions, fields = schema.get("$defs", {}), schema.get("properties", {"answer": schema})
    required = schema.get("required", []) if "properties" in schema else ["answer"]
    shown = {name: simple for name, each in fields.items() if (simple := _simple(each, definitions)) is not None}
    return {"type": "object", "properties": shown, "required": required} if {*required} <= {*shown} else None


def _output(question: Question, content: Mapping[str, Any]) -> msgspec.Raw:
    """Return what a person has entered in a form as the answer. Hosts send null for an empty field."""
    values = {name: value for name, value in content.items() if value is not None}
    output = values if "properties" in msgspec.json.decode(question.schema) else values.get("answer")
    return msgspec.Raw(msgspec.json.encode(output))


async def _answered(call: Call, engine: Engine) -> tuple[Run, dict[str, str], Question | None]:
    """Give the answers of a client to the run that its ``requestState`` names.

    Returns: the run; what is wrong with an answer, by the id of its question; and a question that the person did not
        want to answer.

    Raises: RPCError if the state is not one that this client has got for this call.
    """
    run, call_ids = await _verified(call, engine)
    questions, problems = {each.call_id: each for each in run.questions}, dict[str, str]()
    for call_id in call_ids:
        question, answer = questions.get(call_id), (call.params.input_responses or {}).get(call_id)
        if question is None or answer is None:  # somebody else has answered it, or it is asked again
            continue
        content = answer.content if answer.action == "accept" else None
        if answer.action == "decline" and "approved" in (_form(question) or {}).get("properties", {}):
            content = {"approved": False}
        if content is None:
            return run, problems, question
        try:
            await orders.accept(call.request, orders.Answers(run.run_id, {call_id: _output(question, content)}))
        except InvalidData as exc:
            problems[call_id] = f"{exc}\n\n"
        except (Conflict, NotFound):
            pass  # somebody else has answered it
    return run, problems, None


async def _signed(call: Call, payload: str, about: str) -> str:
    """Return *payload* and what only this flock can add to it, for the principal and *about* something."""
    key, principal = await (await orders.engine_of(call.request)).secret(), principal_of(call.request) or ANYBODY
    text = f"mcp {principal.name} {about} {payload}"
    return f"{payload}.{hmac.new(key.encode(), text.encode(), 'sha256').hexdigest()}"


async def _is_signed(call: Call, sent: str, about: str) -> bool:
    signed = await _signed(call, sent.partition(".")[0], about)
    return hmac.compare_digest(sent.encode(), signed.encode())


async def _verified(call: Call, engine: Engine) -> tuple[Run, Sequence[str]]:
    """Return the run and the questions of a ``requestState``. Raises RPCError."""
    sent = call.params.request_state or ""
    if await _is_signed(call, sent, call.digest):
        run_id, until, *call_ids = msgspec.json.decode(base64.urlsafe_b64decode(sent.partition(".")[0]))
        with suppress(NotFound):
            if until > time.time():
                return await engine.get_outline(run_id), call_ids
    problem = "The requestState is not that of this call, or has expired. Call the tool again."
    raise RPCError(INVALID_PARAMS, problem)


# Resources


async def _read(call: Call) -> Response:
    """resources/read: a run of the caller, as JSON. A long one is sent in pieces."""
    uri, engine = call.params.uri, await orders.engine_of(call.request)
    prefix, run_id = uri[: len(RUN_URI)], uri[len(RUN_URI) :]
    try:
        run = await engine.get_outline(run_id if prefix == RUN_URI else "")
        result = await engine.shown_result(run) if run.status is RunStatus.COMPLETED else None
    except NotFound as exc:
        code, problem = INVALID_PARAMS if call.is_latest else NOT_FOUND, f"Runs are {RUN_URI}{{run_id}}."
        raise RPCError(code, f"There is no such resource. {problem}", uri=uri[:1000]) from exc
    shown = {name: getattr(run, name) for name in ("run_id", "agent_name", "status", "error", "error_type")}
    shown |= {"result": result, "questions": [each.question for each in run.questions]}
    content: dict[str, Any] = {"uri": uri, "mimeType": "application/json", "text": QuotedJSON(shown)}
    return LongResponse(reply(call.message, result=_complete(call, {"contents": [content]})), 200, {}, is_head=False)

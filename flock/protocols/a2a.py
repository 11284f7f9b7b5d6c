"""A2A 1.0: each agent has a card, a task is a run, and a context is a session. The binding is JSON-RPC.

A task outlives the request that has sent its message. The same message with the same id finds it again.
"""

import hashlib
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import quote

import msgspec
from msgspec.structs import replace
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock import __version__, jsontype
from flock.agents.agent import Agent
from flock.agents.chat import conversation_of
from flock.errors import Conflict, FlockError, InvalidData, MalformedJSON, RunNotFound
from flock.fair import FairShare
from flock.files import as_data_url, references_in
from flock.protocols import chats, frontends, jsonrpc
from flock.protocols.chats import SentFile
from flock.protocols.jsonrpc import INVALID_PARAMS, RPCError
from flock.runs import MAX_SHOWN_BYTES, NOT_LOADED, Engine, Event, IdempotencyKey, Run, RunFilter, RunStatus, new_id
from flock.runs.events import run_in
from flock.runs.ids import now
from flock.web import orders, wire
from flock.web.requests import while_connected
from flock.web.responses import KEEP_ALIVE, JSONResponse, LongResponse, long_event, sent_event, size_of
from flock.web.routing import AppRoute

PREFIX = "/a2a"
VERSION = "1.0"

# Codes of errors
TASK_NOT_FOUND, NOT_CANCELABLE, UNSUPPORTED, CONTENT_TYPE, OTHER_VERSION = -32001, -32002, -32004, -32005, -32009
CODES = {"malformed-json": jsonrpc.PARSE_ERROR, "unknown-run": TASK_NOT_FOUND, "conflict": UNSUPPORTED}
CODES |= dict.fromkeys(("invalid-input", "unknown-call"), INVALID_PARAMS)
NO_PUSH = -32003, "This server sends no push notifications. Subscribe to the task, or get it."

NAMES = ("SUBMITTED", "WORKING", "INPUT_REQUIRED", "COMPLETED", "FAILED", "CANCELED")
STATES = {ours: f"TASK_STATE_{theirs}" for ours, theirs in zip(RunStatus, NAMES, strict=True)}

#: A list ends after about so many bytes of tasks.
MAX_LIST_BYTES = 1024 * 1024


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error. Clients read the body only if the status is 200."""
    kind = problem.type.rpartition(":")[2]
    code = CONTENT_TYPE if problem.status == 415 else CODES.get(kind, jsonrpc.OTHER_ERROR)
    data = [{"@type": "type.googleapis.com/google.rpc.RequestInfo", "requestId": problem.request_id}]
    error = {"code": code, "message": problem.detail, "data": data}
    return 200 if kind in CODES else problem.status, jsonrpc.reply(None, error=error)


# Requests

#: A session, or "" for none.
ContextID = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{0,128}(?!\n)$")]
HistoryLength = Annotated[int, msgspec.Meta(ge=0)] | None


class Part(msgspec.Struct, frozen=True):
    """A part of a message: a text, JSON, or a file in base64. ``mediaType`` and ``filename`` are about the file."""

    text: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"")
    raw: str | None = None
    url: str | None = None
    mediaType: str = ""
    filename: str = ""


class Said(msgspec.Struct, frozen=True):
    """A message of the user: a new task, or with a ``taskId`` an answer."""

    messageId: Annotated[str, msgspec.Meta(min_length=1)]
    role: Literal["ROLE_USER"]
    parts: Annotated[list[Part], msgspec.Meta(min_length=1, max_length=100)]
    contextId: ContextID = ""
    taskId: str = ""


class Configuration(msgspec.Struct, frozen=True):
    historyLength: HistoryLength = None
    returnImmediately: bool = False
    taskPushNotificationConfig: Any = None


class Params(msgspec.Struct, frozen=True):
    """The parameters of all methods."""

    id: str = ""
    message: Said | None = None
    configuration: Configuration = Configuration()
    historyLength: HistoryLength = None
    contextId: ContextID = ""
    status: str = "TASK_STATE_UNSPECIFIED"
    pageSize: Annotated[int, msgspec.Meta(ge=1, le=100)] = 50
    pageToken: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f-]{36})?(?!\n)$")] = ""
    includeArtifacts: bool = False
    statusTimestampAfter: None = None


PARAMS = jsontype.JSONType(Params, ignores_unknown=True)


class Call(NamedTuple):
    """One request as the methods see it."""

    request: Request
    engine: Engine
    agent: Agent
    message: jsonrpc.Message
    params: Params

    def reply(self, result: Any) -> Mapping[str, Any]:
        return jsonrpc.reply(self.message, result=result)

    async def run_of(self, task_id: str, *, is_whole: bool = False) -> Run:
        """Return a run of the agent, or its outline. Raises RunNotFound."""
        run = await (self.engine.get_run if is_whole else self.engine.get_outline)(task_id)
        if run.agent_name != self.agent.name:
            raise RunNotFound(task_id)
        return run


def routes() -> Sequence[AppRoute]:
    return [
        AppRoute("access", "POST", "/a2a/{agent}", a2a),
        AppRoute("access", "POST", "/a2a/{agent}/", a2a, include_in_schema=False),  # as some clients write the URL
        AppRoute("nothing", "GET", "/a2a/{agent}/.well-known/agent-card.json", get_card),
    ]


async def a2a(request: Request) -> Response:
    """POST /a2a/{agent}"""
    body, message = await orders.read_json(request), None
    agent, engine = frontends.agent_in(request), await orders.engine_of(request)
    try:
        message = jsonrpc.decoded(body, jsonrpc.Message, jsonrpc.INVALID_REQUEST)
        sent = request.headers.get("a2a-version") or "0.3"
        if re.fullmatch(rf"{VERSION}(\.\d+)?", sent) is None:
            raise RPCError(OTHER_VERSION, f"A2A {sent[:20]!r} is not offered. Send A2A-Version: {VERSION}.")
        if message.id is None or not message.method:
            raise RPCError(jsonrpc.INVALID_REQUEST, "A request needs an id and a method.")
        if re.search("TaskPushNotificationConfigs?$", message.method):
            raise RPCError(*NO_PUSH)
        if (method := METHODS.get(message.method)) is None:
            raise RPCError(jsonrpc.METHOD_NOT_FOUND, f"A2A {VERSION} has no method {message.method[:100]!r}.")
        params = PARAMS.decode(message.params, "/params")
        message = replace(message, params=msgspec.Raw(b""))  # frees the body, which may be long
        call = Call(request, engine, agent, message, params)
        del body, params
        return await method(call)
    except RPCError as exc:
        return JSONResponse(jsonrpc.reply(message, error=exc.shown))
    except FlockError as exc:
        return await jsonrpc.failed(request, message, exc)


# Cards


async def _extended_card(call: Call) -> Response:
    """GetExtendedAgentCard"""
    return JSONResponse(call.reply(_card(call.request, call.agent, is_public=False)))


async def get_card(request: Request) -> Response:
    """GET /a2a/{agent}/.well-known/agent-card.json"""
    agent = orders.agents_of(request).get(request.path_params["agent"])
    if agent is None:
        raise HTTPException(404, "There is no agent at this address.")  # AgentNotFound would name all agents
    options = orders.serving(request).options
    return JSONResponse(_card(request, agent, is_public=options.api_keys is not None or callable(options.auth)))


def _card(request: Request, agent: Agent, *, is_public: bool) -> Mapping[str, Any]:
    """Return a card. A public one says only where the agent is, and how to ask."""
    options, name = orders.serving(request).options, agent.name
    url = f"{orders.address_of(request)}{PREFIX}/{quote(name, safe='')}"
    interface = {"url": url, "protocolBinding": "JSONRPC", "protocolVersion": VERSION}
    about = {"name": name, "description": f"An agent of {options.server_name}.", "version": __version__}
    offered = {"streaming": True, "pushNotifications": False, "extendedAgentCard": True}
    card: dict[str, Any] = {**about, "supportedInterfaces": [interface], "capabilities": offered, "skills": []}
    modes = ["text/plain", "application/json"]
    card |= {"defaultInputModes": [*modes, *chats.media_types_of(agent)], "defaultOutputModes": modes}
    if options.api_keys is not None:
        card["securitySchemes"] = {"key": {"httpAuthSecurityScheme": {"scheme": "Bearer"}}}
        card["securityRequirements"] = [{"schemes": {"key": {"list": []}}}]
    if not is_public:
        card["description"] = agent.description or card["description"]
        described = f"{card['description']}\n\nSchema of its inputs: {msgspec.json.encode(agent.input.schema).decode()}"
        card["skills"] = [{"id": name, "name": name, "description": described, "tags": ["agent"]}]
    return card


# Messages


async def _send(call: Call) -> Response:
    """SendMessage and SendStreamingMessage: a new task, or the answers for which one waits."""
    settings, wanted = call.params.configuration, await _wanted(call)
    call = call._replace(params=Params())  # frees the message during the wait
    if call.message.method == "SendStreamingMessage":
        return await _streamed(call, wanted, settings.historyLength)
    run_id = (await orders.accept(call.request, wanted)).run.run_id
    del wanted
    if not settings.returnImmediately:
        await orders.end_of(call.request, run_id, outlives_client=True)
    return await _shown(call, run_id, settings.historyLength, is_wrapped=True)


async def _wanted(call: Call) -> orders.Wanted:
    """Return what a message asks for. Raises: RPCError, InvalidData, RunNotFound, Conflict."""
    said, texts, data, sent = call.params.message, list[str](), dict[str, Any](), list[SentFile]()
    if call.params.configuration.taskPushNotificationConfig is not None:
        raise RPCError(*NO_PUSH)
    if said is None:
        raise InvalidData.of("The message is missing.", "/params/message")
    for number, part in enumerate(said.parts):
        value, at = jsontype.loads(bytes(part.data) or b"null", _number), f"/params/message/parts/{number}"
        url = part.url if part.raw is None else as_data_url(part.raw, part.mediaType)
        if url is not None and (said.taskId or not call.agent.input.has_files):
            raise RPCError(CONTENT_TYPE, f"Part {number} is a file, and none is taken. Send text, or JSON as data.")
        if [part.text, value, url].count(None) != 2 or not isinstance(value, dict | None):
            raise InvalidData.of("A part is a text, a JSON object as data, or a file as raw.", at)
        if same := data.keys() & (value or {}).keys():
            raise InvalidData.of(f"Another part has {min(same)!r} too.", f"{at}/data")
        data |= value or {}
        texts += [] if part.text is None else [part.text]
        if url is not None:
            sent.append(chats.file_in(url, at, None, how="Send its content as raw.", more={"name": part.filename}))
    return await (_answers(call, said, texts, data) if said.taskId else _order(call, said, texts, data, *sent))


def _number(text: str) -> Any:
    """Return a float of JSON, or the integer that it is: clients on Protocol Buffers send all integers as floats."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else jsontype.float_of(text)


def _raw(values: Mapping[str, Any]) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


async def _order(call: Call, said: Said, texts: list[str], data: Mapping[str, Any], *sent: SentFile) -> orders.Wanted:
    """Return the order of a new task, or answers to nothing if the same message has started one."""
    agent, session_id, text, at = call.agent, said.contextId or new_id(), "\n".join(texts), "/params/message"
    content = [agent.name, said.messageId, said.contextId, texts, data, *(file.value for file in sent)]
    digest = hashlib.sha256(msgspec.json.encode(content, order="deterministic"))
    key = IdempotencyKey(f"a2a:{digest.hexdigest()}", digest.digest())

    async def repeated() -> orders.Answers | None:
        made = await call.engine.made_by(key)
        return None if made is None else orders.Answers((await orders.replayed(call.run_of(made))).run_id)

    if (again := await repeated()) is not None:
        return again
    if (talk := conversation_of(agent.input)) in data:
        raise InvalidData.of(f"The server has {talk!r} of the context. Send what the user says as a text.", at)
    if not text and not sent:
        inputs = msgspec.Raw(msgspec.json.encode(data))  # as a whole, since it may have 70,000 members
        return orders.Order(agent_name=agent.name, session_id=session_id, inputs=inputs, is_async=True, key=key)
    newest = await orders.newest_run(call.request, session_id)
    words = frontends.Said(text, f"{at}/parts", _raw(data), files=sent)
    try:
        order = await frontends.order_of(call.request, agent, session_id, newest, words, "no")
    except Conflict:
        if (again := await repeated()) is not None:  # it was accepted meanwhile
            return again
        raise
    return replace(order, key=key)


async def _answers(call: Call, said: Said, texts: Sequence[str], data: Mapping[str, Any]) -> orders.Answers:
    """Return answers by the ids of their questions. A text may answer the only open question, but approves nothing.

    The engine refuses answers to what it has not asked, and takes the same ones again.
    """
    run, at = await call.run_of(said.taskId), "/params/message/parts"
    if said.contextId not in ("", run.session_id):
        raise InvalidData.of("The task belongs to another context. Leave this out.", "/params/message/contextId")
    if bool(texts) == bool(data):
        raise InvalidData.of("An answer is either a text, or data with answers by call_id.", at)
    if data:
        return orders.Answers(run.run_id, _raw(data))
    answers: list[Any] = [text := "\n".join(texts)]
    with suppress(msgspec.DecodeError, RecursionError, MalformedJSON):
        answers.append(msgspec.json.decode(orders.nested(call.request, msgspec.Raw(text.encode()))))
    given = [each.result for step in (await call.engine.get_calls(run)).values() for each in step if each.answered_at]
    # Perhaps the same message again, whose answer was accepted before.
    is_repeated = any(msgspec.json.decode(each) in answers for each in given if each is not NOT_LOADED)
    is_repeated |= len(text) > MAX_SHOWN_BYTES and NOT_LOADED in given
    if not run.questions and is_repeated:
        return orders.Answers(run.run_id)
    if not run.questions:
        raise RPCError(UNSUPPORTED, f"The task is {_state(run)}, and asks nothing. Begin a new task.")
    question, *others = run.questions
    if others or is_repeated or orders.approved_call(question) is not None:
        raise InvalidData.of("Send data: an object with an answer under each call_id.", at)
    is_text = question.is_for_client or msgspec.json.decode(question.schema).get("type") == "string"
    return orders.Answers(run.run_id, _raw({question.call_id: answers[0 if is_text else -1]}))


async def _cancel(call: Call) -> Response:
    """CancelTask: wait a while until the run has stopped."""
    run = await call.run_of(call.params.id)
    try:
        await call.engine.cancel_run(run.run_id)
    except Conflict as exc:
        raise RPCError(NOT_CANCELABLE, str(exc)) from exc
    max_wait_s = orders.serving(call.request).options.max_wait_s
    await while_connected(call.request, call.engine.wait(run.run_id, max_wait_s))
    return await _shown(call, run.run_id, 0)


# Tasks


async def _shown(call: Call, run_id: str, history_length: int | None, *, is_wrapped: bool = False) -> Response:
    task = await _task(call, await call.run_of(run_id, is_whole=True), history_length)
    body = call.reply({"task": task} if is_wrapped else task)
    return LongResponse(body, 200, {"Flock-Run-Id": run_id}, is_head=False)


async def _task(call: Call, run: Run, history_length: int | None, has_artifacts: bool = True) -> dict[str, Any]:
    """Return a run as a task. A long result is ``LongJSON`` in it. Raises RunNotFound, StoreError."""
    task, agents = {**_ids(run, "id"), "status": _status(call.request, run)}, orders.agents_of(call.request)
    if has_artifacts and run.status is RunStatus.COMPLETED:
        answer = await chats.answer_of(call.engine, agents, run)
        parts = [{"text": answer}] if isinstance(answer, str) else _result_parts(call.request, answer)
        task["artifacts"] = [_artifact(*parts)]
    if history_length != 0 and (said := chats.messages_of(call.agent, run.inputs)):
        parts = [{"text": said[-1].content}]
        task["history"] = [{"messageId": f"{run.run_id}_in", "role": "ROLE_USER", "parts": parts, **_ids(run)}]
    return task


def _ids(run: Run, name: str = "taskId") -> dict[str, Any]:
    return {name: run.run_id, **({} if run.session_id is None else {"contextId": run.session_id})}


def _result_parts(request: Request, result: Any) -> list[Any]:
    """Return a result that is no text: all of it, and each file in it with its address."""
    at, found = f"{orders.address_of(request)}/files/", references_in(result)
    files = [{"url": at + each.file_id, "mediaType": each.media_type, "filename": each.name} for each in found]
    return [{"data": result}, *files]


def _artifact(*parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the only artifact of a task, its result."""
    return {"artifactId": "result", "parts": parts}


def _status(request: Request, run: Run) -> Mapping[str, Any]:
    """Return the status of a run, with what it asks, or its error, or its progress."""
    parts: list[Any] = [] if run.progress is None or run.status.is_final else [{"data": run.progress}]
    parts = parts if run.error is None else [{"text": run.error}]
    for question in run.questions:
        about = {} if question.arguments is msgspec.UNSET else {"arguments": question.arguments}
        shown = {"call_id": question.call_id, "question": question.question, "schema": question.schema, **about}
        parts.append({"text": "\n".join([question.question, *(bytes(each).decode() for each in about.values())])})
        parts += [{"data": shown}] if orders.may_answer(request, run, question) else []
    status = {"state": _state(run), "timestamp": run.completed_at or run.started_at or run.created_at}
    message = {"messageId": f"{run.run_id}_status", "role": "ROLE_AGENT", "parts": parts, **_ids(run)}
    return {**status, "message": message} if parts else status


def _state(run: Run) -> str:
    is_asleep = run.status is RunStatus.WAITING and not run.questions
    return STATES[RunStatus.RUNNING if is_asleep else run.status]


async def _list(call: Call) -> Response:
    """ListTasks: one page of the runs of the agent, the newest first."""
    params, tasks, last, size, share = call.params, list[Any](), "", 0, FairShare()
    status = {theirs: ours for ours, theirs in STATES.items()}.get(params.status)
    if status is None and params.status != "TASK_STATE_UNSPECIFIED":
        raise InvalidData.of(f"No task has this state. Use one of {', '.join(STATES.values())}.", "/params/status")
    asked: dict[str, Any] = {"session_id": params.contextId or None, "after": params.pageToken or None}
    wanted = RunFilter(agent_name=call.agent.name, status=status, limit=params.pageSize, **asked)
    is_whole = bool(params.includeArtifacts or params.historyLength)
    page = await call.engine.list_runs(wanted)
    for last in (run.run_id for run in page):
        await share.checkpoint()
        with suppress(RunNotFound):  # it was deleted meanwhile
            run = await (call.engine.get_run if is_whole else call.engine.get_outline)(last)
            if status is not RunStatus.WAITING or run.questions:  # otherwise it sleeps
                tasks.append(await _task(call, run, params.historyLength or 0, params.includeArtifacts))
                size += size_of(tasks[-1])
        if size >= MAX_LIST_BYTES:
            break
    token = last if page.has_more or (page and last != page[-1].run_id) else ""
    result = {"tasks": tasks, "nextPageToken": token, "pageSize": params.pageSize}
    return LongResponse(call.reply(result), 200, {}, is_head=False, slot=orders.download_slot(call.request))


# Streams


async def _subscribe(call: Call) -> Response:
    """SubscribeToTask"""
    run = await call.run_of(call.params.id)
    if run.status.is_final:
        raise RPCError(UNSUPPORTED, f"The task is {_state(run)}. GetTask returns it.")
    return await _streamed(call, orders.Answers(run.run_id), call.params.historyLength)


async def _streamed(call: Call, wanted: orders.Wanted, history_length: int | None) -> Response:
    """Return the task as it is, and what follows until it ends or waits."""
    stream = await orders.stream(call.request, wanted, reasoning=False)
    return stream.response(_events(call, stream.accepted.run.run_id, stream.events, history_length))


async def _events(
    call: Call, run_id: str, events: AsyncGenerator[Event | None, None], history_length: int | None
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a task. A text that is not appended begins the artifact again.

    Each status is that of its event. The run may be further by now, but the client has not seen that.
    """
    has_text, agents = False, orders.agents_of(call.request)
    slot = partial(orders.download_slot, call.request)
    answer = chats.StreamedAnswer(agents, as_json=False, takes_back=True, slot=slot)

    def update(kind: str, **content: Any) -> Mapping[str, Any]:
        return call.reply({kind: {**_ids(run), **content}})

    def status() -> bytes:
        return sent_event(update("statusUpdate", status=_status(call.request, run)))

    try:
        run = await call.engine.get_run(run_id)
        async for chunk in long_event(call.reply({"task": await _task(call, run, history_length)})):
            yield chunk
        run = replace(run, inputs=NOT_LOADED, steps=(), result=None)  # frees what may be long
        if not run.is_active:
            return
        async with aclosing(answer.pieces(events)) as pieces:
            async for piece in pieces:
                if piece is None:
                    yield KEEP_ALIVE
                elif isinstance(piece, str | chats.TakenBack):
                    if run.status is RunStatus.STARTING:
                        run = replace(run, status=RunStatus.RUNNING, started_at=now())
                        yield status()
                    text, append = (piece, has_text) if isinstance(piece, str) else (piece.text, False)
                    yield sent_event(update("artifactUpdate", artifact=_artifact({"text": text}), append=append))
                    has_text = True
                elif isinstance(piece, Event) and piece.name in ("run.progress", *chats.ENDS):
                    if piece.name == "run.waiting" and has_text:  # it begins again after the answer
                        yield sent_event(update("artifactUpdate", artifact=_artifact({"text": ""}), append=False))
                    if piece.name == "run.completed" and not answer.is_text:
                        artifact = _artifact(*_result_parts(call.request, piece.data["result"]))
                        async for chunk in long_event(update("artifactUpdate", artifact=artifact, append=False)):
                            yield chunk
                    run = run_in(run, piece)
                    yield status()
    except FlockError as exc:
        error = RPCError(jsonrpc.OTHER_ERROR, f"{exc} The task is {run_id}: subscribe to it, or get it.")
        yield sent_event(jsonrpc.reply(call.message, error=error.shown))


async def _get(call: Call) -> Response:
    """GetTask"""
    return await _shown(call, call.params.id, call.params.historyLength)


METHODS = {
    "SendMessage": _send,
    "SendStreamingMessage": _send,
    "GetTask": _get,
    "ListTasks": _list,
    "CancelTask": _cancel,
    "SubscribeToTask": _subscribe,
    "GetExtendedAgentCard": _extended_card,
}

"""Responses and conversations.

A response is a run until it ends, or until it waits for an answer. Its id is that of the run, and a number: how many
questions had been answered when it began. ``j`` after it means that its text is the JSON of all outputs, and ``b`` that
it is in the background. A conversation is a session. So any process can show all of them from the runs alone.
"""

import contextlib
import logging
import re
import zlib
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import anyio
import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.agent import Agent
from flock.agents.chat import conversation_of
from flock.agents.handoff import agent_of
from flock.errors import Conflict, FlockError, InvalidData, RunNotFound, SessionNotFound
from flock.jsontype import JSONType
from flock.protocols import chats
from flock.protocols import openai_parts as parts
from flock.runs import Call, Engine, Event, Question, Run, RunStatus, new_id
from flock.runs.records import PAGE_BYTES
from flock.web import orders
from flock.web.requests import fingerprint_of, idempotency_key, query_of, while_connected
from flock.web.responses import JSONResponse, PageResponse, sent_event

logger = logging.getLogger("flock.api")

#: The number of an event that follows a text of n characters begins at ``n << CHECK_BITS``. JavaScript can read it for
#: texts of up to ``2 ** 33`` characters.
CHECK_BITS = 20
#: The number of the first event of an answer. Those below it are of the reasoning, which is not stored, so a resumed
#: stream does not have it.
FIRST_NUMBER = 1 << (CHECK_BITS - 1)

#: How long a run whose client has left may take to stop, in seconds, before it is deleted.
STOP_S = 5.0

FAILED = (RunStatus.FAILED, RunStatus.CANCELLED)

#: The runs of a conversation whose messages are listed.
MAX_RUNS = 100

JSON = dict[str, Any]


class TextSettings(msgspec.Struct, frozen=True):
    format: parts.Format | None = None


class ReasoningSettings(msgspec.Struct, frozen=True):
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseRequest(parts.Settings, frozen=True, kw_only=True):
    """Body of ``POST /v1/responses``."""

    input: str | list[parts.Item] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, str] | None = None
    background: bool | None = None
    store: bool | None = None
    text: TextSettings | None = None
    instructions: str | None = None
    reasoning: ReasoningSettings | None = None

    @property
    def has_thoughts(self) -> bool:
        """Whether the client wants the reasoning. It is not stored, and a response in the background is read again."""
        return self.reasoning is not None and self.reasoning.summary is not None and not self.background

    @property
    def session_id(self) -> str | None:
        """Raises SessionNotFound."""
        id_ = self.conversation.get("id", "") if isinstance(self.conversation, dict) else self.conversation
        return None if id_ is None else _session(id_)[0]


RESPONSE_REQUEST = JSONType(ResponseRequest, ignores_unknown=True)


class ConversationRequest(msgspec.Struct, frozen=True):
    """Body of ``POST /v1/conversations``."""

    items: list[Any] | None = None


CONVERSATION_REQUEST = JSONType(ConversationRequest, ignores_unknown=True)


class ResponseQuery(msgspec.Struct, frozen=True, kw_only=True):
    """``starting_after``: the number of the last event of the stream that the client has."""

    stream: bool = False
    starting_after: Annotated[int, msgspec.Meta(ge=-1, le=10**15 - 1)] = -1


class Place(NamedTuple):
    """What the id of a response says."""

    run_id: str
    number: int = 0
    as_json: bool = False
    in_background: bool = False

    @property
    def id(self) -> str:
        return f"resp_{self.run_id}_{self.number}{'j' * self.as_json}{'b' * self.in_background}"

    @classmethod
    def of(cls, response_id: str) -> "Place":
        """Raises RunNotFound if it is not the id of a response."""
        found = re.fullmatch(r"resp_([0-9a-f-]{36})_(0|[1-9][0-9]{0,5})(j?)(b?)", response_id)
        if found is None:
            raise RunNotFound(response_id)
        return cls(found[1], int(found[2]), bool(found[3]), bool(found[4]))


class Reply(NamedTuple):
    """A response: a run as it is, or as it was when it asked *questions*, and all *answers* that it has got."""

    place: Place
    run: Run
    questions: Sequence[Question] = ()
    answers: Sequence[Call] = ()

    @property
    def is_last(self) -> bool:
        return self.place.number >= len(self.answers)

    @property
    def has_only_items(self) -> bool:
        """Whether a client can answer all of its questions by items."""
        return all(question.is_for_client or orders.approved_call(question) for question in self.questions)


async def _reply(engine: Engine, place: Place) -> Reply:
    """Return a response, the latest one of its run for the number -1. Raises RunNotFound if the caller has none."""
    run = await engine.get_run(place.run_id)
    calls = [call for made in (await engine.get_calls(run)).values() for call in made if call.kind == "question"]
    answers = sorted(calls, key=lambda call: call.completed_at)
    answered_at = {call.call_id: call.completed_at for call in answers}  # the run was read before them
    still_open = [each for each in run.questions if answered_at.get(each.call_id, each.asked_at) <= each.asked_at]
    place = place._replace(number=len(answers)) if place.number < 0 else place
    if place.number > len(answers):
        raise RunNotFound(place.id)
    if place.number == len(answers):
        return Reply(place, run, still_open if run.status is RunStatus.WAITING else (), answers)
    at = answers[place.number].completed_at
    ids = [call.call_id for call in answers[place.number :] if call.started_at <= at]
    answered = [(await engine.get_question(run.run_id, call_id)).question for call_id in ids]
    return Reply(place, run, [*answered, *(each for each in still_open if each.asked_at <= at)], answers)


# What clients see


def _message(id_: str, role: str, text: str) -> JSON:
    type_ = "input_text" if role == "user" else "output_text"
    content = {"type": type_, "text": text, **({} if role == "user" else {"annotations": [], "logprobs": []})}
    return {"id": f"msg_{id_}", "type": "message", "status": "completed", "role": role, "content": [content]}


def _thinking(place: Place, thoughts: str) -> list[JSON]:
    """Return the item of the reasoning, if there is any."""
    summary = [{"type": "summary_text", "text": thoughts}]
    item = {"id": f"rs_{place.id[5:]}", "type": "reasoning", "status": "completed", "summary": summary}
    return [item] if thoughts else []


def _asked(place: Place, questions: Sequence[Question]) -> list[JSON]:
    """Return the items of questions: calls of tools, requests for approvals, and the others as one message."""
    items, others = list[JSON](), list[Question]()
    for question in questions:
        at, arguments = f"{place.run_id}_{question.call_id}", {"arguments": parts.arguments_of(question)}
        if question.is_for_client:
            call = {"id": f"fc_{at}", "type": "function_call", "call_id": f"call_{at}", "status": "completed"}
            items.append({**call, "name": question.question, **arguments})
        elif (approval := orders.approved_call(question)) is not None:
            request = {"id": f"mcpr_{at}", "type": "mcp_approval_request", "name": approval[2], "server_label": "flock"}
            items.append({**request, **arguments})
        else:
            others.append(question)
    text = chats.question_text(others, place.run_id)
    return [*items, *([_message(f"{place.id[5:]}_asked", "assistant", text)] if others else [])]


def _response(reply: Reply, output: Sequence[Any], sent: ResponseRequest | None = None) -> JSON:
    """Return a response. It has no *output* yet if it has not ended."""
    run, has_ended = reply.run, bool(reply.questions) or reply.run.status.is_final
    status: str = run.status if has_ended else "queued" if run.status is RunStatus.STARTING else "in_progress"
    if reply.questions:
        status = "completed" if reply.has_only_items else "incomplete"
    error = {"code": "server_error", "message": chats.failure_text(run.error, run.run_id)}
    completed_at = max(each.asked_at for each in reply.questions) if reply.questions else run.completed_at
    return {
        **{"id": reply.place.id, "object": "response", "created_at": int(run.created_at.timestamp())},
        "completed_at": completed_at and int(completed_at.timestamp()),
        **{"status": status, "background": reply.place.in_background, "model": run.agent_name},
        **{"error": error if status == "failed" else None, "output": output},
        "incomplete_details": {"reason": "waiting"} if status == "incomplete" else None,
        "previous_response_id": sent and sent.previous_response_id,
        "conversation": {"id": run.session_id} if (run.session_id or "").startswith("conv_") else None,
        **{"metadata": (sent and sent.metadata) or {}, "store": sent is None or sent.store is not False},
        **{"instructions": None, "text": {"format": {"type": "json_object" if reply.place.as_json else "text"}}},
        **{"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "max_tool_calls": None, "user": None},
        **{"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_logprobs": 0},
        **{"max_output_tokens": None, "reasoning": {"effort": None, "summary": None}, "truncation": "disabled"},
        **{"service_tier": "default", "safety_identifier": None, "prompt_cache_key": None},
        "usage": parts.usage_of(run.usage, "input", "output") if has_ended else None,
    }


async def _shown(request: Request, reply: Reply, sent: ResponseRequest | None = None, thoughts: str = "") -> Response:
    """Return a response as it ended, or as it is. Raises RunNotFound, StoreError."""
    run, output = reply.run, [*_thinking(reply.place, thoughts), *_asked(reply.place, reply.questions)]
    if not reply.questions and run.status is RunStatus.COMPLETED:
        engine, agents = await orders.engine_of(request), orders.agents_of(request)
        text = await chats.text_of(engine, agents, run, as_json=reply.place.as_json)
        output.append(_message(reply.place.id[5:], "assistant", text))
    body, headers = _response(reply, output, sent), {"Flock-Run-Id": run.run_id}
    if request.method == "GET":  # a client repeats what gets 429, which must not be a new run
        return PageResponse(body, orders.download_slot(request), headers=headers)
    return JSONResponse(body, headers=headers)


# A new response


async def create_response(request: Request) -> Response:
    """POST /v1/responses: a new run, or the answers for which a run waits."""
    body = await orders.read_json(request)
    sent, engine = RESPONSE_REQUEST.decode(body), await orders.engine_of(request)
    if sent.background and sent.store is False:
        raise InvalidData.of("A response in the background must be stored. Leave this out.", "/store")
    if sent.previous_response_id is not None and sent.conversation is not None:
        raise InvalidData.of("Send this or 'previous_response_id', not both.", "/conversation")
    order, place = await _order_of(request, body, sent)
    if sent.stream:
        stream = await orders.stream(request, order, reasoning=sent.has_thoughts)
        place = place._replace(run_id=stream.accepted.run.run_id)
        return _streamed(request, engine, stream, Reply(place, stream.accepted.run), sent)
    with orders.watched(engine, order, is_wanted=sent.has_thoughts) as run_id:
        run = (await orders.accept(request, order, run_id)).run
        place, outlives_client = place._replace(run_id=run.run_id), run.is_async or isinstance(order, orders.Answers)
        # If its client leaves, it may repeat a request with a key.
        is_kept = sent.store is not False or (isinstance(order, orders.Order) and order.key is not None)
        try:
            if not sent.background:
                del run, order  # frees the inputs, which may be long, during the wait
                run = await orders.end_of(request, place.run_id, outlives_client)
            thoughts = await chats.thoughts_of(engine, run.run_id) if sent.has_thoughts else ""
            questions = run.questions if run.status is RunStatus.WAITING else ()
            response = await _shown(request, Reply(place, run, questions), sent, thoughts)
            is_kept = sent.store is not False
        finally:
            if not is_kept:
                await _forget(engine, place.run_id, 0 if outlives_client else STOP_S)
    return response


async def _order_of(request: Request, body: bytes, sent: ResponseRequest) -> tuple[orders.Wanted, Place]:
    """Return what a request asks for, and the place of its response, which has no run yet.

    Raises: InvalidData, AgentNotFound, RunNotFound, SessionNotFound.
    """
    agents, engine = orders.agents_of(request), await orders.engine_of(request)
    agent = agent_of(agents, sent.model)
    as_json = parts.wants_json(agents, agent, sent.text.format if sent.text else None, "/text/format")
    place = Place("", 0, as_json, sent.background is True)
    items = [parts.Item(role="user", content=sent.input)] if isinstance(sent.input, str) else sent.input or []
    messages, outputs = await parts.read(items, "/input")
    client = parts.client_settings(body, messages, sent.instructions or "")
    key, earlier, newest, answers = idempotency_key(request, lambda: fingerprint_of(request, body)), None, None, None
    if key is None or await engine.made_by(key) is None:  # otherwise this request has continued it before
        earlier, newest = await _earlier(request, sent, is_answer=bool(outputs) or not messages)
    if outputs:
        answers = await parts.answers_in(engine, outputs, "/input")
    elif earlier is not None and not messages:
        answers = orders.Answers(earlier.run.run_id)
    if answers is not None:
        before = {call.call_id for call in (await _reply(engine, Place(answers.run_id, -1))).answers}
        return answers, place._replace(number=len(before | answers.outputs.keys()))
    order = orders.Order(
        agent_name=sent.model,
        session_id=await _continued(request, agent, sent, earlier, messages),
        continues=newest,
        inputs=orders.nested(request, chats.inputs_of(agent, messages, sent.inputs, "/input")),
        is_async=sent.background is True,
        client=client,
        key=key,
    )
    return order, place


async def _forget(engine: Engine, run_id: str, wait_s: float = STOP_S) -> None:
    """Delete a run with ``store: false`` if it ends in that time. Its client gets the answer also if that fails."""
    try:
        with anyio.move_on_after(STOP_S, shield=True), contextlib.suppress(RunNotFound):
            if (await engine.wait(run_id, wait_s)).status.is_final:
                await engine.delete_run(run_id)
    except FlockError as exc:
        logger.error("the run %s of a response with store: false could not be deleted: %s", run_id, exc)


async def _earlier(request: Request, sent: ResponseRequest, *, is_answer: bool) -> tuple[Reply | None, str | None]:
    """Return the response that a request continues, or answers, and the newest run of its session.

    Only the latest response of a conversation can be continued.

    Raises: RunNotFound, SessionNotFound; InvalidData if there is a later one, or it has not completed.
    """
    previous_id, engine = sent.previous_response_id, await orders.engine_of(request)
    reply = None if previous_id is None else await _reply(engine, Place.of(previous_id))
    newest, latest = await _latest(request, sent.session_id if reply is None else reply.run.session_id)
    if reply is None and latest is not None:
        reply = await _reply(engine, Place(latest, -1))
    if reply is None or is_answer:
        return reply, newest
    name = "/conversation" if previous_id is None else "/previous_response_id"
    if latest not in (None, reply.run.run_id):
        raise InvalidData.of(f"A later response of the run {latest} continues this one. Continue that.", name)
    if not reply.is_last:
        newest = reply.place._replace(number=len(reply.answers)).id
        raise InvalidData.of(f"Its questions have been answered since. Continue {newest}.", name)
    if reply.questions:
        way = "Send it as an item, without messages" if reply.has_only_items else "GET /questions shows what it asks"
        raise InvalidData.of(f"The run {reply.run.run_id} waits for an answer. {way}.", name)
    if reply.run.status is not RunStatus.COMPLETED:
        raise InvalidData.of(f"The run {reply.run.run_id} is {reply.run.status}, so nothing can continue it.", name)
    return reply, newest


async def _latest(request: Request, session_id: str | None) -> tuple[str | None, str | None]:
    """Return the newest run of a session of the caller, or "", and the newest that neither failed nor was cancelled."""
    if session_id is None:
        return None, None
    newest = await orders.newest_run(request, session_id)
    if newest is None or newest.status not in FAILED:
        return ("", None) if newest is None else (newest.run_id, newest.run_id)
    found = [await orders.newest_run(request, session_id, each) for each in RunStatus if each not in FAILED]
    return newest.run_id, max((run.run_id for run in found if run is not None), default=None)


async def _continued(
    request: Request, agent: Agent, sent: ResponseRequest, earlier: Reply | None, messages: list[chats.Message]
) -> str | None:
    """Return the session of a new run, and put the messages of the run before it in front of its own.

    Raises: InvalidData if its agent does not read them.
    """
    has_session, has_messages = getattr(agent, "history", None) is not None, conversation_of(agent.input) is not None
    if earlier is None:
        is_kept = (has_session or has_messages) and sent.store is not False
        return sent.session_id or (f"resp_{new_id()}" if is_kept else None)
    if not has_session and not has_messages:
        problem = f"{agent.name!r} cannot continue a conversation. It needs an input of the type Messages, or history=."
        raise InvalidData.of(problem, "/previous_response_id" if sent.conversation is None else "/conversation")
    if has_messages:
        messages[:0] = await chats.turn_of(await orders.engine_of(request), orders.agents_of(request), earlier.run)
    return earlier.run.session_id


# Stored responses


async def one_response(request: Request) -> Response:
    """GET and DELETE /v1/responses/{response_id}"""
    engine = await orders.engine_of(request)
    reply = await _reply(engine, Place.of(request.path_params["response_id"]))
    run_id = reply.run.run_id
    if request.method == "DELETE":
        await engine.delete_run(run_id)
        return JSONResponse(
            {"id": reply.place.id, "object": "response", "deleted": True}, 200, {"Flock-Run-Id": run_id}
        )
    query = query_of(request, ResponseQuery)
    if not query.stream or request.method == "HEAD":
        return await _shown(request, reply)
    stream = await orders.stream(request, orders.Answers(run_id), reasoning=False)
    if not reply.is_last:
        stream = stream._replace(events=_waiting(reply.questions))
    return _streamed(request, engine, stream, reply, None, query.starting_after)


async def _waiting(questions: Sequence[Question]) -> AsyncGenerator[Event | None, None]:
    yield Event(id=None, name="run.waiting", data={"waiting_for": questions})


async def cancel_response(request: Request) -> Response:
    """POST /v1/responses/{response_id}/cancel: when the run has stopped."""
    engine, place = await orders.engine_of(request), Place.of(request.path_params["response_id"])
    reply = await _reply(engine, place)
    if reply.is_last and reply.run.status is not RunStatus.COMPLETED:
        run = await engine.cancel_run(place.run_id)
        if not run.status.is_final:
            await while_connected(request, engine.wait(place.run_id, orders.serving(request).options.max_wait_s))
    return await _shown(request, await _reply(engine, place))


async def input_items(request: Request) -> Response:
    """GET /v1/responses/{response_id}/input_items: the messages that became the inputs of its run."""
    engine, place = await orders.engine_of(request), Place.of(request.path_params["response_id"])
    reply = await _reply(engine, place)
    said, run_id = chats.said_in(orders.agents_of(request), reply.run), reply.run.run_id
    return _page(request, [(f"{run_id}_in{at}", each.role, each.content) for at, each in enumerate(said)], run_id)


class PageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """``after``: the id of the last item that the client has."""

    order: Literal["asc", "desc"] = "desc"
    limit: Annotated[int, msgspec.Meta(ge=1, le=100)] = 20
    after: str = ""


def _page(
    request: Request, items: Sequence[tuple[str, str, str]], run_id: str = "", *, has_more: bool = False
) -> Response:
    """Return a page of messages, oldest first, as clients list them: each has an id, a role and a text.

    *has_more*: there are others after *items*.

    Raises: InvalidData.
    """
    query = query_of(request, PageQuery)
    ordered, after = items if query.order == "asc" else items[::-1], query.after.removeprefix("msg_")
    first = next((at + 1 for at, (id_, _, _) in enumerate(ordered) if id_ == after), 0)
    shown = [_message(*item) for item in ordered[first : first + query.limit]]
    ids = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    body = {"object": "list", "data": shown, "has_more": has_more or len(ordered) > first + query.limit, **ids}
    return PageResponse(body, orders.download_slot(request), headers={"Flock-Run-Id": run_id} if run_id else None)


# Conversations


def _session(conversation_id: str) -> tuple[str, int]:
    """Return the session of a conversation, and when it was created. Raises SessionNotFound for another session."""
    found = re.fullmatch(r"conv_([0-9a-f]{8})-([0-9a-f]{4})-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", conversation_id)
    if found is None:
        raise SessionNotFound(conversation_id)
    return conversation_id, int(found[1] + found[2], 16) // 1000


async def create_conversation(request: Request) -> Response:
    """POST /v1/conversations: only an id. It exists as long as it has runs."""
    sent = CONVERSATION_REQUEST.decode(await orders.read_json(request, is_optional=True))
    if sent.items:
        raise InvalidData.of("A conversation begins without items. Send them to a response.", "/items")
    return _conversation(f"conv_{new_id()}")


async def one_conversation(request: Request) -> Response:
    """GET and DELETE /v1/conversations/{conversation_id}"""
    id_ = request.path_params["conversation_id"]
    response = _conversation(id_)
    if request.method != "DELETE":
        return response
    with contextlib.suppress(SessionNotFound):  # it has no runs
        await (await orders.engine_of(request)).delete_session(id_, orders.owner_of(request))
    return JSONResponse({"id": id_, "object": "conversation.deleted", "deleted": True})


def _conversation(id_: str) -> Response:
    return JSONResponse({"id": id_, "object": "conversation", "created_at": _session(id_)[1], "metadata": {}})


async def conversation_items(request: Request) -> Response:
    """GET /v1/conversations/{conversation_id}/items: what was said in its last runs, up to ``MAX_RUNS``."""
    engine, query = await orders.engine_of(request), query_of(request, PageQuery)
    session_id, _ = _session(request.path_params["conversation_id"])
    runs = await orders.newest_runs(request, session_id, RunStatus.COMPLETED, limit=MAX_RUNS)
    ids = sorted((run.run_id for run in runs), reverse=query.order == "desc")
    first = next((at for at, run_id in enumerate(ids) if run_id in query.after), 0)
    items, left, size = list[tuple[str, str, str]](), ids[first : first + query.limit // 2 + 2], 0
    while left and (size < PAGE_BYTES or len(items) < 3):  # a run has two items, of which the client may have both
        run_id = left.pop(0)
        with contextlib.suppress(RunNotFound):  # it was deleted meanwhile
            *said, answer = await chats.turn_of(engine, orders.agents_of(request), await engine.get_run(run_id))
            turn = [(f"{run_id}_in{len(said) - 1}", each.role, each.content) for each in said[-1:]]
            turn.append((Place(run_id).id[5:], answer.role, answer.content))
            items = items + turn if query.order == "asc" else turn + items
            size += sum(len(text) for _, _, text in turn)
        await anyio.lowlevel.checkpoint()
    return _page(request, items, has_more=bool(left))


# Streams


def _streamed(
    request: Request, engine: Engine, stream: orders.Stream, reply: Reply, sent: ResponseRequest | None, after: int = -1
) -> Response:
    """Return the stream of a run that was accepted. It never raises, so the slot of *stream* is always released."""
    slot = partial(orders.download_slot, request)
    answer = chats.StreamedAnswer(orders.agents_of(request), as_json=reply.place.as_json, slot=slot)
    content = parts.written(stream, answer, _Writer(engine, reply, sent, after))

    async def cut_off() -> None:
        if stream.on_cut_off is not None:
            with contextlib.suppress(Conflict):  # it has ended, and its client has not read that
                await stream.on_cut_off()
            await _forget(engine, reply.run.run_id)

    is_kept = sent is None or sent.store is not False
    return (stream if is_kept else stream._replace(on_cut_off=cut_off)).response(content)


#: Of an item with a text: the member that has it, and the names of the events of its part, if it has one, and its text.
TEXTS = {
    "message": ("content", "content_part", "output_text"),
    "reasoning": ("summary", "reasoning_summary_part", "reasoning_summary_text"),
    "function_call": ("arguments", "", "function_call_arguments"),
}


def _text_of(item: JSON) -> str:
    text = item[TEXTS[item["type"]][0]]
    return text if isinstance(text, str) else text[0]["text"]


class _Writer:
    """Writes the events of a response, in the order that clients check, without those up to the number *after*.

    The number of a piece of text has the length of the text after it, and a checksum of that. So another attempt, or
    another process, has the same numbers for the same text, and a client that has another text gets an error.
    """

    def __init__(self, engine: Engine, reply: Reply, sent: ResponseRequest | None, after: int) -> None:
        self._engine, self._reply, self._sent, self._after = engine, reply, sent, after
        self._had = max(0, after) >> CHECK_BITS  # characters that the client has, or one more at the end
        self._thoughts, self._text = list[str](), list[str]()
        self._empty = _message(reply.place.id[5:], "assistant", "")
        self._length = self._check = self._number = 0

    def begin(self) -> bytes:
        run = msgspec.structs.replace(self._reply.run, status=RunStatus.RUNNING, completed_at=None)
        response = _response(Reply(self._reply.place, run), (), self._sent)
        return b"".join(self._event(f"response.{name}", response=response) for name in ("created", "in_progress"))

    def piece(self, text: str | chats.Thought) -> bytes:
        """Return the events of more text, or of reasoning, which is dropped after the text has begun.

        Raises: TextReplaced if the client has another text.
        """
        if isinstance(text, chats.Thought):
            if self._text:
                return b""
            (item,) = _thinking(self._reply.place, text.text)
            events = b"" if self._thoughts else self._opened(0, item)
            self._thoughts.append(text.text)
            return events + self._delta(0, item, text.text)
        at = 1 if self._thoughts else 0
        events = b"" if self._text else self._thoughts_done() + self._opened(at, self._empty)
        missing = self._had - self._length
        for part in (text[:missing], text[missing:]) if 0 < missing < len(text) else (text,):
            self._text.append(part)
            self._length += len(part)
            self._check = zlib.crc32(part.encode("utf-8", "surrogatepass"), self._check)
            self._number = (self._length << CHECK_BITS) + self._check % (1 << CHECK_BITS)
            if self._length == self._had and self._number != self._after:
                raise chats.TextReplaced("The answer was replaced by another one after a part of it had been sent.")
            events += self._delta(at, self._empty, part)
        return events

    def _thoughts_done(self) -> bytes:
        thoughts = _thinking(self._reply.place, "".join(self._thoughts))
        return b"".join(event for item in thoughts for event in self._closed(0, item))

    async def end(self, event: Event) -> AsyncGenerator[bytes, None]:
        """Yield the last events, and delete a run with ``store: false`` that has ended. The events may be long.

        Raises: TextReplaced, RunNotFound, StoreError.
        """
        run = await self._engine.get_outline(self._reply.run.run_id)
        reply = self._reply._replace(run=run, questions=event.data.get("waiting_for", ()))
        if self._had > self._length + 1:
            raise chats.TextReplaced("The answer was replaced by a shorter one after a part of it had been sent.")
        is_completed = not reply.questions and run.status is RunStatus.COMPLETED
        answer = [_message(reply.place.id[5:], "assistant", "".join(self._text))] if is_completed or self._text else []
        thoughts = _thinking(reply.place, "".join(self._thoughts))
        output = [*thoughts, *answer, *_asked(reply.place, reply.questions)]
        if not self._text:
            yield self._thoughts_done()
        self._number = (self._length + 1) << CHECK_BITS
        for at, item in enumerate(output[len(thoughts) :], len(thoughts)):
            yield b"" if item in answer and self._text else self._opened(at, item)
            yield b"" if item in answer or item["type"] not in TEXTS else self._delta(at, item, _text_of(item))
            for closed in self._closed(at, item):
                yield closed
        response = _response(reply, output, self._sent)
        name = response["status"] if response["status"] in ("completed", "incomplete") else "failed"
        if self._sent is not None and self._sent.store is False and run.status.is_final:
            await _forget(self._engine, run.run_id)
        yield self._event(f"response.{name}", response=response)

    def error(self, error: str, code: str) -> bytes:
        message = chats.failure_text(error, self._reply.run.run_id)
        self._number = max(self._number, self._after + 1)
        return self._event("error", code=code, message=message, param=None)

    def _opened(self, at: int, item: JSON) -> bytes:
        """Return the events that an item begins with, before its text."""
        if item["type"] == "message":
            self._number = max(self._number, FIRST_NUMBER)
        member, part, _ = TEXTS.get(item["type"], ("", "", ""))
        empty = {**item, "status": "in_progress", member: [] if part else ""} if member else item
        events = self._event("response.output_item.added", output_index=at, item=empty)
        return events + (self._about(f"{part}.added", at, item, part={**item[member][0], "text": ""}) if part else b"")

    def _delta(self, at: int, item: JSON, text: str) -> bytes:
        return self._about(f"{TEXTS[item['type']][2]}.delta", at, item, delta=text)

    def _closed(self, at: int, item: JSON) -> Iterator[bytes]:
        """Yield the events that an item ends with, after its text."""
        if item["type"] in TEXTS:
            member, part, name = TEXTS[item["type"]]
            whole = {"text": _text_of(item)} if part else {member: item[member], "name": item["name"]}
            yield self._about(f"{name}.done", at, item, **whole)
            yield self._about(f"{part}.done", at, item, part=item[member][0]) if part else b""
        yield self._event("response.output_item.done", output_index=at, item=item)

    def _about(self, event: str, at: int, item: JSON, **data: Any) -> bytes:
        member, part, _ = TEXTS[item["type"]]
        place = {"item_id": item["id"], "output_index": at, **({f"{member}_index": 0} if part else {})}
        return self._event(f"response.{event}", **place, **data, **({"logprobs": []} if "output_text" in event else {}))

    def _event(self, type_: str, **data: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        event = {"type": type_, "sequence_number": number, **data}
        return b"" if number <= self._after else sent_event(event, type_)

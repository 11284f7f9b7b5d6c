"""What the protocols of front ends have in common: a chat is a session of an agent, and its messages show runs.

The history is that of the session. From a client, only the user's last message and answers to open questions are read.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.agent import Agent
from flock.agents.chat import conversation_of
from flock.agents.handoff import agent_of
from flock.errors import Conflict, FlockError, InvalidData
from flock.jsontype import JSONType
from flock.protocols import chats
from flock.runs import ClientSettings, ClientTool, Engine, Event, Question, Run, RunStatus
from flock.web import orders, wire
from flock.web.responses import KEEP_ALIVE, long_event, sent_event

T = TypeVar("T")


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error. Clients show the body."""
    about = {"code": problem.type.rpartition(":")[2], "request_id": problem.request_id}
    return problem.status, {"error": problem.detail, **about}


#: The answer to an approval that was cancelled.
DENIED = {"approved": False}

#: Makes the writer of the stream of a run, as a protocol spells it.
Writers = Callable[[Run], Any]

#: Whether an answer replaces that of the newest run: in any case, or if it was asked the same.
Replaces = Literal["no", "same", "newest"]


# Requests


class Said(NamedTuple):
    """What the user says: a text or files, and what else the client brings. *at* is the pointer of the text.

    A text with the *message_id* of the newest run is that message again, so the answer of that run is replaced.
    """

    text: str
    at: str
    inputs: Mapping[str, msgspec.Raw]
    tools: Sequence[ClientTool] = ()
    files: tuple[chats.SentFile, ...] = ()
    message_id: str | None = None


def agent_in(request: Request) -> Agent:
    """Return the agent in the path. Raises AgentNotFound."""
    return agent_of(orders.agents_of(request), request.path_params["agent"])


async def read(request: Request, type_: JSONType[T]) -> tuple[Agent, T, bytes]:
    """Return the agent in the path, its request, and the body of that. Raises AgentNotFound, InvalidData."""
    body, agent = await orders.read_json(request), agent_in(request)
    return agent, type_.decode(body), body


async def order_of(
    request: Request, agent: Agent, session_id: str, newest: Run | None, said: Said, replaces: Replaces
) -> orders.Order:
    """Return the order for what the user says after the *newest* run of a chat. Its history is that of the server.

    Raises: InvalidData; Conflict if the agent reads the history, and the newest run is not complete.
    """
    if not said.text and not said.files:
        raise InvalidData.of("The last message is not a text from the user.", said.at)
    engine, history = await orders.engine_of(request), list[chats.Message]()
    own = newest
    if newest is not None and newest.agent_name != agent.name:
        own = await orders.newest_run(request, session_id, agent_name=agent.name)
    run = None if own is None else await engine.get_run(own.run_id)
    before, reads_history = chats.messages_of(agent, run.inputs) if run else [], bool(conversation_of(agent.input))

    def inputs_after(history: Sequence[chats.Message]) -> msgspec.Raw:
        messages = [*history, chats.Message("user", said.text, said.files)]
        return orders.nested(request, chats.inputs_of(agent, messages, said.inputs, said.at))

    is_replaced = run is not None and replaces == "newest"
    client = ClientSettings(tools=tuple(said.tools), message_id=said.message_id)
    is_again = run is not None and run.client is not None and run.client.message_id == said.message_id is not None
    if run is not None and own is newest and (replaces == "same" or is_again):
        again = msgspec.json.decode(inputs_after(before[:-1]))
        is_replaced = bool(before and before[-1].content == said.text) or again == msgspec.json.decode(run.inputs)
    if is_replaced:
        history = before[:-1]
    elif reads_history and run is not None:
        if run.is_active and run.status is not RunStatus.WAITING:
            raise Conflict("The last answer is not complete. Wait for it, or stop it.")
        done: Run | None = run
        if run.status is not RunStatus.COMPLETED:
            listed = await orders.newest_run(request, session_id, RunStatus.COMPLETED, agent.name)
            done = None if listed is None else await engine.get_run(listed.run_id)
        if done is not None:
            history = await chats.turn_of(engine, orders.agents_of(request), done)
    return orders.Order(
        agent_name=agent.name,
        session_id=session_id,
        continues=(newest.run_id if newest else "") if is_replaced or reads_history else None,
        replaces=is_replaced,
        inputs=inputs_after(history),
        is_async=True,
        client=None if client == ClientSettings() else client,
    )


async def answers_of(
    request: Request, agent: Agent, session_id: str, run_id: str, sent: Mapping[str, Any], at: str
) -> orders.Answers:
    """Return the answers to what a run asks, from those *sent*, by id. Ids that it has not given are ignored.

    There may be none, to follow the run.

    Raises: RunNotFound; InvalidData if the run is not of this chat, it waits and there is no answer, or DENIED is the
        answer to a question that is about no call.
    """
    run = await (await orders.engine_of(request)).get_run(run_id)
    if (run.session_id, run.agent_name) != (session_id, agent.name):
        raise InvalidData.of("This is not an answer of this chat.", at)
    outputs = dict[str, msgspec.Raw]()
    for question in run.questions:
        if (id_ := _question_id(run, question)) in sent:
            if sent[id_] is DENIED and orders.approved_call(question) is None:
                raise InvalidData.of("Only an approval can be cancelled. Answer this question, or cancel its run.", at)
            output = msgspec.json.encode(sent[id_])
            is_text = not question.is_for_client or output.startswith(b'"')
            outputs[question.call_id] = msgspec.Raw(output if is_text else msgspec.json.encode(output.decode()))
    if not outputs and run.status is RunStatus.WAITING and run.questions:
        raise InvalidData.of("The run waits for an answer, and there is none.", at)
    return orders.Answers(run.run_id, outputs)


def _question_id(run: Run, question: Question) -> str:
    """Return the id that clients have for a question."""
    return f"call_{run.run_id}_{question.call_id}"


# Streams


class CallBegun(NamedTuple):
    """A call of a tool, of an agent, or of a question. The client executes or answers one with a *question*."""

    id: str
    name: str
    input: Any
    question: Question | None = None


class CallEnded(NamedTuple):
    """Its end. A call that was denied has an error."""

    id: str
    output: Any = None
    error: str | None = None


class SubAgent(NamedTuple):
    """A called agent works until the ``CallEnded`` with its id. The client may have the start of the call."""

    id: str
    name: str


class Asked(NamedTuple):
    """An open question of the client: whether a call may be executed, or else the call itself."""

    id: str
    call_id: str
    question: Question


async def streamed(request: Request, wanted: orders.Wanted, writer_of: Writers, *known: Iterable[str]) -> Response:
    """Return the stream of a run, as a writer of the protocol spells it.

    Args:
        known: the ids of the calls whose start the client has, and of those whose end it has.
    """
    engine, stream = await orders.engine_of(request), await orders.stream(request, wanted, reasoning=True)
    run = stream.accepted.run
    shown, writer = _ShownRun(request, engine, run, *map(set, known)), writer_of(run)

    async def content() -> AsyncGenerator[bytes, None]:
        yield writer.begin()
        try:
            async with aclosing(shown.parts(stream.events)) as parts:
                async for part in parts:
                    if isinstance(part, Event) and part.data.get("result") is not None:
                        async for piece in long_event(writer.result(part.data["result"])):
                            yield piece
                    if isinstance(part, Event) and part.name == "run.failed":
                        text = chats.failure_text(part.data["error"], run.run_id)
                        yield writer.failed(text, part.data["error_type"])
                    else:
                        yield (part and writer.part(part)) or KEEP_ALIVE
        except FlockError as exc:
            yield writer.failed(chats.failure_text(str(exc), run.run_id), "interrupted")
        yield writer.LAST

    return stream.response(content(), writer.HEADERS)


def typed_event(type_: str, **data: Any) -> bytes:
    return sent_event({"type": type_, **data})


class _ShownRun:
    """What a message shows of a run. No call is shown twice."""

    def __init__(self, request: Request, engine: Engine, run: Run, begun: set[str], ended: set[str]) -> None:
        self._request, self._engine, self._run = request, engine, run
        self._known, self._arguments = {CallBegun: begun, CallEnded: ended, SubAgent: {*ended}}, dict[str, Any]()
        agents, slot = orders.agents_of(request), partial(orders.download_slot, request)
        self._answer = chats.StreamedAnswer(agents, as_json=False, takes_back=True, slot=slot)

    async def parts(self, events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[Any, None]:
        """Yield texts, ``Thought``, ``TakenBack``, what is defined above, None, ``run.progress`` and one of ENDS.

        The result of an agent that writes no text is in ``run.completed``; otherwise that is None there.

        Raises: those of ``StreamedAnswer.pieces``.
        """
        calls = await self._engine.get_calls(self._run)
        self._arguments = {self._id(at, call.call_id): call.arguments for at, made in calls.items() for call in made}
        async with aclosing(self._answer.pieces(events)) as pieces:
            async for piece in pieces:
                found: list[Any] = [piece]
                if isinstance(piece, Event) and piece.name.startswith("call."):
                    found = await self._call(piece.data, has_ended=piece.name == "call.completed")
                elif isinstance(piece, Event) and piece.name == "run.waiting":
                    asked = [part for question in piece.data["waiting_for"] for part in self._asked(question)]
                    found = [chats.TakenBack(""), *asked, piece]  # the text begins again after the answer
                elif isinstance(piece, Event) and piece.name == "run.completed" and self._answer.is_text:
                    found = [msgspec.structs.replace(piece, data={**piece.data, "result": None})]
                for part in found:
                    known, id_ = self._known.get(type(part), set()), getattr(part, "id", "")
                    if id_ not in known:
                        yield part
                    known.add(id_)

    def _id(self, position: Any, call_id: str) -> str:
        return f"tool_{self._run.run_id}_{position}_{call_id}"

    async def _call(self, data: Mapping[str, Any], *, has_ended: bool) -> list[Any]:
        result = data.get("result")
        if data["kind"] == "question" and has_ended:
            question = (await self._engine.get_question(self._run.run_id, data["call_id"])).question
            begun, *_ = self._asked(question, is_open=False)
            if orders.approved_call(question) is None:
                return [begun, CallEnded(begun.id, result)]
            is_denied = result is not None and msgspec.json.decode(result).get("approved") is False
            return [begun, *([CallEnded(begun.id, error="A person denied this call.")] if is_denied else [])]
        if data["kind"] not in ("tool", "agent") or (data["kind"] == "agent" and orders.NESTED in data["call_id"]):
            return []
        id_ = self._id(data["position"], data["call_id"])
        begun = CallBegun(id_, data["name"], data.get("arguments", self._arguments.get(id_, {})))
        works = [SubAgent(id_, begun.name)] if data["kind"] == "agent" else []
        return [begun, *works, *([CallEnded(id_, result, data["error"])] if has_ended else [])]

    def _asked(self, question: Question, *, is_open: bool = True) -> list[Any]:
        """Return what a question shows. The client may not be the one who answers it."""
        id_, input = _question_id(self._run, question), question.arguments
        to_answer = question if is_open and orders.may_answer(self._request, self._run, question) else None
        if (approval := orders.approved_call(question)) is not None:
            call_id = self._id(*approval[:2])
            begun = CallBegun(call_id, approval[2], input)
        elif question.is_for_client:
            begun = CallBegun(id_, question.question, input, to_answer)
        else:
            about = {} if input is msgspec.UNSET else {"arguments": input}
            schema = {"question": question.question, "schema": question.schema, **about}
            begun = CallBegun(id_, "ask", schema, to_answer)
        return [begun, *([Asked(id_, begun.id, question)] if to_answer else [])]

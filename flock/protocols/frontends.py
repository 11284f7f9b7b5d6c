"""What the protocols of front ends have in common: a chat is a session of an agent, and its messages show runs.

What the session has counts, and of what a client sends only what the user says last, and answers to open questions.
"""

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request

from flock.agents.agent import Agent
from flock.agents.chat import conversation_of
from flock.declared import agent_of
from flock.errors import Conflict, InvalidData, NotFound
from flock.protocols import chats
from flock.runs import ClientSettings, ClientTool, Engine, Event, Question, Run, RunStatus
from flock.web import orders, wire

#: The kinds of calls that a message shows.
SHOWN = ("tool", "agent")


def error_shape(problem: wire.Problem) -> tuple[int, Mapping[str, Any]]:
    """Return the status and the body of an error. Clients show the body."""
    texts = [problem.detail, *(each.detail for each in problem.errors or [] if each.detail not in problem.detail)]
    code = problem.type.rpartition(":")[2]
    return problem.status, {"error": " ".join(texts), "code": code, "request_id": problem.request_id}


# Requests


def agent_in(request: Request) -> Agent:
    """Return the agent in the path. Raises AgentNotFound."""
    return agent_of(orders.serving(request).flock.agents, request.path_params["agent"])


async def runs_of(request: Request, agent: Agent, session_id: str) -> AsyncGenerator[Run, None]:
    """Yield the caller's runs of *agent* in a chat, newest first, without inputs and results."""
    async with aclosing(orders.runs_of_session(request, session_id)) as runs:
        async for run in runs:
            if run.agent_name == agent.name:
                yield run


async def newest_of(request: Request, agent: Agent, session_id: str) -> Run | None:
    async with aclosing(runs_of(request, agent, session_id)) as runs:
        return await anext(runs, None)


class Said(NamedTuple):
    """What the user says: a text, and what else the client brings. *at* is the pointer of the text."""

    text: str
    at: str
    inputs: Mapping[str, msgspec.Raw] = {}
    tools: Sequence[ClientTool] = ()


async def order_of(
    request: Request, agent: Agent, session_id: str, newest: Run | None, said: Said, *, replaces: bool
) -> orders.Order:
    """Return the order for what the user says after the *newest* run of a chat. Its history is that of the server.

    Args:
        replaces: if the newest run was asked the same, its answer is replaced: it is cancelled, or deleted.

    Raises: InvalidData; Conflict if the agent reads the history, and the newest run is not complete.
    """
    if not said.text:
        raise InvalidData.of("The last message is no text of the user.", said.at)
    engine, history = await orders.engine_of(request), list[chats.Message]()
    run = newest and await engine.get_run(newest.run_id)
    before = chats.messages_of(agent, run.inputs) if run else []
    replaced = run if replaces and before and before[-1].content == said.text else None
    if conversation_of(agent.input) is not None and run is not None:
        history = before[:-1] if replaced else await _history(request, agent, run)
    inputs = chats.inputs_of(agent, [*history, chats.Message("user", said.text)], said.inputs, said.at)
    if replaced is not None:
        with suppress(NotFound, Conflict):
            await (engine.delete_run if replaced.status.is_final else engine.cancel_run)(replaced.run_id)
    client = ClientSettings(tools=tuple(said.tools)) if said.tools else None
    return orders.Order(agent_name=agent.name, session_id=session_id, inputs=inputs, is_async=True, client=client)


async def _history(request: Request, agent: Agent, newest: Run) -> list[chats.Message]:
    if newest.is_active and newest.status is not RunStatus.WAITING:
        raise Conflict("The last answer is not complete. Wait for it, or stop it.")
    engine, agents = await orders.engine_of(request), orders.serving(request).flock.agents
    async with aclosing(runs_of(request, agent, newest.session_id or "")) as runs:
        async for listed in runs:
            if listed.status is RunStatus.COMPLETED:
                run = await engine.get_run(listed.run_id)
                text = await chats.text_of(engine, agents, run, as_json=False)
                return [*chats.messages_of(agent, run.inputs), chats.Message("assistant", text)]
    return []


async def answers_of(
    request: Request, agent: Agent, session_id: str, run_id: str, sent: Mapping[str, msgspec.Raw], at: str
) -> orders.Answers:
    """Return the answers to what a run asks, from those *sent*, by id. Ids that it has not given are ignored.

    There may be none, to follow the run.

    Raises: RunNotFound; InvalidData if the run is not of this chat, or it waits and there is no answer.
    """
    run = await (await orders.engine_of(request)).get_run(run_id)
    if (run.session_id, run.agent_name) != (session_id, agent.name):
        raise InvalidData.of("This is not an answer of this chat.", at)
    outputs = dict[str, msgspec.Raw]()
    for question in run.questions:
        output = sent.get(question_id(run, question))
        if output is not None:
            is_text = not question.is_for_client or bytes(output).startswith(b'"')
            outputs[question.call_id] = output if is_text else msgspec.Raw(msgspec.json.encode(bytes(output).decode()))
    if not outputs and run.status is RunStatus.WAITING and run.questions:
        raise InvalidData.of("The run waits for an answer, and there is none.", at)
    return orders.Answers(run.run_id, outputs)


def question_id(run: Run, question: Question) -> str:
    """Return the id that clients have for a question."""
    return f"call_{run.run_id}_{question.call_id}"


# Streams


class CallBegun(NamedTuple):
    """A call of a tool, of an agent, or of a question. The client executes or answers one that is not *ours*."""

    id: str
    name: str
    input: Any
    is_ours: bool = True


class CallEnded(NamedTuple):
    """Its end. Nobody executes a call that was denied."""

    id: str
    output: Any = None
    error: str | None = None
    is_denied: bool = False


class ApprovalAsked(NamedTuple):
    """The question whether a call may be executed."""

    id: str
    call_id: str
    question: Question


class ShownRun:
    """What a message shows of a run. No call is shown twice.

    Args:
        begun, ended: the ids of the calls whose begin and end the client has.
    """

    def __init__(
        self, request: Request, engine: Engine, run: Run, begun: Collection[str] = (), ended: Collection[str] = ()
    ) -> None:
        self._request, self._engine, self._run = request, engine, run
        self._begun, self._ended, self._arguments = set(begun), set(ended), dict[str, Any]()
        self._answer = chats.StreamedAnswer(orders.serving(request).flock.agents, as_json=False, takes_back=True)

    async def parts(self, events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[Any, None]:
        """Yield texts, ``Thought``, ``TakenBack``, what is defined above, None, ``run.progress`` and one of ENDS.

        The result of an agent that writes no text is in ``run.completed``; otherwise that is None there.

        Raises: those of ``StreamedAnswer.pieces``.
        """
        calls = await self._engine.get_calls(self._run)
        self._arguments = {self._id(at, call.call_id): call.arguments for at, made in calls.items() for call in made}
        async with aclosing(self._answer.pieces(events)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Event) and piece.name in ("call.started", "call.completed"):
                    for part in await self._call(piece.data, has_ended=piece.name == "call.completed"):
                        yield part
                    continue
                if isinstance(piece, Event) and piece.name == "run.waiting":
                    for question in piece.data["waiting_for"]:
                        is_ours = not orders.may_answer(self._request, self._run, question)
                        for part in self._asked(question, is_ours=is_ours):
                            yield part
                if isinstance(piece, Event) and piece.name == "run.completed" and self._answer.is_text:
                    piece = msgspec.structs.replace(piece, data={**piece.data, "result": None})
                yield piece

    def _id(self, position: Any, call_id: str) -> str:
        return f"tool_{self._run.run_id}_{position}_{call_id}"

    async def _call(self, data: Mapping[str, Any], *, has_ended: bool) -> list[CallBegun | CallEnded | ApprovalAsked]:
        if data["kind"] == "question" and has_ended:
            question = (await self._engine.get_question(self._run.run_id, data["call_id"])).question
            begun, result = self._asked(question, is_ours=True), data.get("result")
            if (approval := orders.approved_call(question)) is None:
                return [*begun, *self._once(CallEnded(question_id(self._run, question), result))]
            is_denied = result is not None and msgspec.json.decode(result).get("approved") is False
            id_ = self._id(approval.position, approval.call_id)
            return [*begun, *(self._once(CallEnded(id_, is_denied=True)) if is_denied else ())]
        if data["kind"] not in SHOWN or (data["kind"] == "agent" and orders.NESTED in data["call_id"]):
            return []
        id_ = self._id(data["position"], data["call_id"])
        begun = self._once(CallBegun(id_, data["name"], data.get("arguments", self._arguments.get(id_, {}))))
        return [*begun, *(self._once(CallEnded(id_, data.get("result"), data["error"])) if has_ended else ())]

    def _asked(self, question: Question, *, is_ours: bool) -> list[CallBegun | CallEnded | ApprovalAsked]:
        """Return what a question shows. If it is *ours*, the client cannot answer it, or it is answered."""
        id_, input = question_id(self._run, question), question.arguments
        if (approval := orders.approved_call(question)) is not None:
            call_id = self._id(approval.position, approval.call_id)
            asked = [] if is_ours else [ApprovalAsked(id_, call_id, question)]
            return [*self._once(CallBegun(call_id, approval.name, input)), *asked]
        if question.is_for_client:
            return self._once(CallBegun(id_, question.question, input, is_ours))
        about = {} if input is msgspec.UNSET else {"arguments": input}
        asks = {"question": question.question, "schema": question.schema, **about}
        return self._once(CallBegun(id_, "ask", asks, is_ours))

    def _once(self, part: CallBegun | CallEnded) -> list[Any]:
        known = self._begun if isinstance(part, CallBegun) else self._ended
        is_known = part.id in known
        known.add(part.id)
        return [] if is_known else [part]

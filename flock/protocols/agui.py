"""AG-UI 1.0: a thread is a session of an agent, and each run of its client is a run, or what follows an answer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.errors import Conflict
from flock.jsontype import JSONType
from flock.protocols import chats, frontends
from flock.protocols.chats import Part
from flock.protocols.frontends import error_shape as error_shape
from flock.protocols.frontends import typed_event
from flock.runs import ClientTool, Event, Run, RunStatus
from flock.web import orders, wire
from flock.web.routing import AppRoute

PREFIX = "/ag-ui"
#: How much of the id of a message is kept.
MAX_ID = 200


def routes() -> Sequence[AppRoute]:
    return [AppRoute("access", "POST", "/ag-ui/{agent}", run_agent)]


class Message(msgspec.Struct, frozen=True):
    """A message, as far as it is read."""

    id: str
    role: str
    content: str | list[Part] | None = None
    toolCallId: str = ""
    toolCalls: list[dict[str, Any]] = []


class Resume(msgspec.Struct, frozen=True):
    """An answer to an interrupt. One that is cancelled denies an approval."""

    interruptId: str
    status: Literal["resolved", "cancelled"]
    payload: Any = None


class RunInput(msgspec.Struct, frozen=True):
    """Body of ``POST /ag-ui/{agent}``. Members of the state that are inputs of the agent become them.

    ``forwardedProps`` may have ``replaces``: the id of the newest run of the thread, whose answer is replaced. Clients
    before 1.0 send no ``protocolVersion``. They refuse a stream with an outcome that they do not know.
    """

    threadId: wire.SessionID
    runId: str
    messages: list[Message]
    state: Any = None
    tools: list[ClientTool] = []
    resume: list[Resume] = []
    forwardedProps: Any = None
    protocolVersion: str = ""


class WholeMessages(msgspec.Struct, frozen=True):
    """The messages of a ``RunInput`` as the client has sent them, for ``MESSAGES_SNAPSHOT``."""

    messages: list[dict[str, Any]]


RUN_INPUT = JSONType(RunInput, ignores_unknown=True)
WHOLE_MESSAGES = JSONType(WholeMessages, ignores_unknown=True)


async def run_agent(request: Request) -> Response:
    """POST /ag-ui/{agent}: a new run, or the answers for which a run waits."""
    agent, sent, body = await frontends.read(request, RUN_INPUT)
    messages, is_corrected = WHOLE_MESSAGES.decode(body).messages, False
    given = {one.interruptId: one.payload if one.status == "resolved" else frontends.DENIED for one in sent.resume}
    last, place = (sent.messages or [Message("", "")])[-1], f"/messages/{len(sent.messages) - 1}"
    for at, message in reversed(list(enumerate(sent.messages))):
        if message.toolCalls or message.role == "reasoning":
            continue  # some clients put each result after its call
        if message.role != "tool":
            break
        if message.toolCallId.startswith("call_"):
            given[message.toolCallId] = chats.text_in(message.content, f"/messages/{at}")
    if given:
        run_id = next(iter(given)).removeprefix("call_")[:36]
        wanted: orders.Wanted = await frontends.answers_of(request, agent, sent.threadId, run_id, given, "/resume")
    else:
        names, state = {field.name for field in agent.input.fields}, sent.state if isinstance(sent.state, dict) else {}
        inputs = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in state.items() if name in names}
        text, newest = chats.text_in(last.content, place), await orders.newest_run(request, sent.threadId)
        said = frontends.Said(
            text if last.role == "user" else "", place, inputs, sent.tools, message_id=last.id[:MAX_ID]
        )
        replaced = sent.forwardedProps.get("replaces") if isinstance(sent.forwardedProps, dict) else None
        if replaced is not None and (newest is None or (newest.run_id, newest.agent_name) != (replaced, agent.name)):
            raise Conflict("Only the last answer can be replaced. Omit 'replaces', or begin another thread.")
        replaces: frontends.Replaces = "no" if replaced is None else "newest"
        is_corrected = replaced is None and newest is not None and await _correct(request, newest, messages)
        order = await frontends.order_of(request, agent, sent.threadId, newest, said, replaces)
        # Its client stops it by disconnecting, and cannot reconnect.
        wanted = msgspec.structs.replace(order, is_async=False)
    begun = {str(call.get("id")) for each in sent.messages for call in each.toolCalls}
    ended = {each.toolCallId for each in sent.messages if each.role == "tool"}
    return await frontends.streamed(
        request, wanted, lambda run: _Writer(run.run_id, sent, messages, is_corrected), begun, ended
    )


async def _correct(request: Request, newest: Run, messages: list[Any]) -> bool:
    """Complete the newest answer in *messages* if its stream was cut off, or remove it if its run was interrupted.

    Returns: whether it has changed.
    """
    begin, is_interrupted = f"msg_{newest.run_id}_", newest.error_type == "interrupted"
    answers = [each for each in messages if each["role"] == "assistant" and str(each.get("id")).startswith(begin)]
    if not answers or not (is_interrupted or newest.status is RunStatus.COMPLETED):
        return False
    if is_interrupted:
        messages.remove(answers[-1])
        return True
    engine = await orders.engine_of(request)
    run = await engine.get_run(newest.run_id)
    text = await chats.text_of(engine, orders.agents_of(request), run, as_json=False)
    before, answers[-1]["content"] = answers[-1].get("content"), text
    return bool(before != text)


class _Writer:
    """Writes events. A text that is taken back is left out of ``MESSAGES_SNAPSHOT``, and another message begins."""

    HEADERS: ClassVar = dict[str, str]()
    LAST: ClassVar = b""

    def __init__(self, run_id: str, sent: RunInput, messages: list[Any], is_corrected: bool) -> None:
        self._ids, self._is_v1 = {"threadId": sent.threadId, "runId": sent.runId}, bool(sent.protocolVersion)
        self._message_id, self._has_text = f"msg_{run_id}_{len(messages)}", False
        self._messages, self._is_corrected = messages, is_corrected
        self._interrupts, self._pending = list[Any](), list[str]()
        self._subagents = dict[str, None]()  # those that work, in the order of their starts

    def begin(self) -> bytes:
        begun = typed_event("RUN_STARTED", **self._ids, protocolVersion="1.0")
        return begun + (self._snapshot() if self._is_corrected else b"")

    def _snapshot(self) -> bytes:
        return typed_event("MESSAGES_SNAPSHOT", messages=self._messages)

    def result(self, result: Any) -> Mapping[str, Any]:
        return {"type": "STATE_SNAPSHOT", "snapshot": result}

    def failed(self, text: str, error_type: str) -> bytes:
        return typed_event("RUN_ERROR", message=text, code=error_type)

    def part(self, part: Any) -> bytes:
        match part:
            case str():
                self._has_text = True
                return typed_event("TEXT_MESSAGE_CHUNK", messageId=self._message_id, role="assistant", delta=part)
            case chats.Thought():
                return typed_event("REASONING_MESSAGE_CHUNK", messageId=f"{self._message_id}r", delta=part.text)
            case chats.TakenBack():
                had_text, self._has_text, self._message_id = self._has_text, False, f"{self._message_id}x"
                return (self._snapshot() if had_text else b"") + (self.part(part.text) if part.text else b"")
            case frontends.CallBegun():
                call = {"name": part.name, "arguments": msgspec.json.encode(part.input).decode()}
                calls, by = [{"id": part.id, "type": "function", "function": call}], self._made_by(part.id)
                self._messages.append({"id": part.id, "role": "assistant", "toolCalls": calls, **by})
                about = {"toolCallName": part.name, "delta": call["arguments"], **by}
                return typed_event("TOOL_CALL_CHUNK", toolCallId=part.id, **about)
            case frontends.SubAgent():
                if not self._is_v1:
                    return b""
                self._subagents[part.id] = None
                about = {"name": part.name, "parentToolCallId": part.id}
                return typed_event("SUBAGENT_STARTED", subagentRunId=part.id, **about)
            case frontends.CallEnded():
                text = part.error or msgspec.json.encode(part.output).decode()
                result = {"toolCallId": part.id, "content": text, "role": "tool", **self._made_by(part.id)}
                self._messages.append({"id": f"{part.id}_result", **result})
                ended = self._end(part.id, part.error) if part.id in self._subagents else b""
                return ended + typed_event("TOOL_CALL_RESULT", messageId=f"{part.id}_result", **result)
            case frontends.Asked(question=question) if question.is_for_client:
                self._pending.append(part.id)
                return b""
            case frontends.Asked(question=question):
                reason = "question" if part.id == part.call_id else "approval"
                asked = {"reason": reason, "message": question.question, "responseSchema": question.schema}
                self._interrupts.append({"id": part.id, "toolCallId": part.call_id, **asked})
                return b""
            case Event(name="run.progress"):
                return typed_event("CUSTOM", name="progress", value=part.data)
            case Event(name="run.cancelled") if not self._is_v1:
                return self.failed("The run was cancelled.", "cancelled")
            case Event(name="run.cancelled"):
                return self._end_all() + typed_event("RUN_FINISHED", **self._ids, outcome={"type": "cancelled"})
        suspended = {"outcome": {"type": "suspended"}} if part.name == "run.waiting" else {}
        pending = {"pendingToolCallIds": self._pending} if self._pending and self._is_v1 else {}
        outcome: Any = {"type": "success", **pending}
        outcome = {"type": "interrupt", "interrupts": self._interrupts} if self._interrupts else outcome
        return self._end_all(**suspended) + typed_event("RUN_FINISHED", **self._ids, outcome=outcome)

    def _made_by(self, call_id: str) -> Mapping[str, str]:
        """Return the attribution of a call that a called agent makes."""
        caller, nested, _ = call_id.partition(orders.NESTED)
        return {"subagentRunId": caller} if nested and caller in self._subagents else {}

    def _end_all(self, **suspended: Any) -> bytes:
        error = None if suspended else "cancelled"
        return b"".join(self._end(id_, error, **suspended) for id_ in list(self._subagents))

    def _end(self, id_: str, error: str | None, **how: Any) -> bytes:
        self._subagents.pop(id_, None)
        type_ = "SUBAGENT_FINISHED" if error is None else "SUBAGENT_ERROR"
        return typed_event(type_, subagentRunId=id_, **(how if error is None else {"message": error}))

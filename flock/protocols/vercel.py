"""The UI message stream of Vercel's AI SDK: a chat of ``useChat`` is a session of an agent, and each answer is a run.

A message has the parts of a run: reasoning, calls of tools and agents, the text, questions. Each request adds steps to
it.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.errors import Conflict, InvalidData, NotFound
from flock.jsontype import JSONType
from flock.protocols import chats, frontends
from flock.protocols.frontends import error_shape as error_shape
from flock.protocols.frontends import typed_event
from flock.runs import ClientTool, Event, RunStatus
from flock.web import orders, wire
from flock.web.requests import while_connected
from flock.web.responses import PageResponse, head_of_stream
from flock.web.routing import AppRoute

PREFIX = "/vercel"

TEXT = {"type": "text", "state": "done"}

#: The messages of a chat that are listed: at most so many, and of about so many characters.
MAX_MESSAGES, MAX_CHARS = 100, 1024 * 1024


def routes() -> Sequence[AppRoute]:
    return [
        AppRoute("access", "POST", "/vercel/{agent}", chat),
        AppRoute("access", "GET", "/vercel/{agent}/{chat_id}", list_messages),
        AppRoute("access", "GET", "/vercel/{agent}/{chat_id}/stream", resume),
        AppRoute("access", "POST", "/vercel/{agent}/{chat_id}/stop", stop),
    ]


# Requests


class Approval(msgspec.Struct, frozen=True):
    id: str
    approved: bool | None = None
    reason: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a message, as far as it is read: a text, or a call of a tool."""

    type: str
    text: str = ""
    toolCallId: str = ""
    state: str = ""
    output: msgspec.Raw = msgspec.Raw(b"null")
    errorText: str | None = None
    approval: Approval | None = None

    @property
    def answers(self) -> list[tuple[str, Any]]:
        """The id of the question that it answers, and the answer, if it does."""
        if self.approval is not None and self.approval.approved is not None:
            return [(self.approval.id, {"approved": self.approval.approved, "reason": self.approval.reason})]
        output = self.output if self.errorText is None else f"The tool failed: {self.errorText}"
        return [(self.toolCallId, output)] if self.state.startswith("output-") else []


class UIMessage(msgspec.Struct, frozen=True):
    id: str
    role: str
    parts: list[Part] = []


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /vercel/{agent}``, as ``DefaultChatTransport`` sends it.

    ``body`` of the transport may add the last three.

    Attributes:
        inputs: those that are not messages, by name.
        tools: of the client.
        resumable: whether the run continues if the client disconnects.
    """

    id: wire.SessionID
    messages: Annotated[list[UIMessage], msgspec.Meta(min_length=1)]
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    messageId: str | None = None
    inputs: dict[str, msgspec.Raw] = {}
    tools: list[ClientTool] = []
    resumable: bool = True


CHAT_REQUEST = JSONType(ChatRequest, ignores_unknown=True)


async def chat(request: Request) -> Response:
    """POST /vercel/{agent}: a new run, or the answers for which the run of a message waits."""
    agent, sent, _ = await frontends.read(request, CHAT_REQUEST)
    named = [at for at, each in enumerate(sent.messages) if each.id == sent.messageId]
    message, place = sent.messages[named[0] if named else -1], "/messages"
    if message.role == "assistant" and sent.trigger == "submit-message":
        given, run_id = {id_: said for part in message.parts for id_, said in part.answers}, message.id[4:]
        answers = await frontends.answers_of(request, agent, sent.id, run_id, given, place)
        answers = msgspec.structs.replace(answers, is_async=sent.resumable)
        return await _streamed(request, answers, message.parts)
    if any(part.type == "file" for part in message.parts):
        raise InvalidData.of("Files are not supported. Send text.", place)
    newest = await orders.newest_run(request, sent.id)
    is_named = newest and newest.agent_name == agent.name and sent.messageId == f"msg_{newest.run_id}"
    replaces: frontends.Replaces = "no" if sent.trigger == "submit-message" else "newest" if is_named else "same"
    if not (is_named or sent.messageId is None) and (newest is not None or message is not sent.messages[-1]):
        raise Conflict("Only the last answer can be replaced. To change an earlier message, begin another chat.")
    text = "".join(part.text for part in message.parts if part.type == "text" and message.role == "user")
    said = frontends.Said(text, place, sent.inputs, sent.tools)
    order = await frontends.order_of(request, agent, sent.id, newest, said, replaces)
    return await _streamed(request, msgspec.structs.replace(order, is_async=sent.resumable))


async def list_messages(request: Request) -> Response:
    """GET /vercel/{agent}/{chat_id}: what was said in the last runs that have completed, and asked in the newest."""
    engine, agent = await orders.engine_of(request), frontends.agent_in(request)
    agents, messages, chars = orders.agents_of(request), list[Any](), 0
    found, read = orders.runs_of_session(request, request.path_params["chat_id"]), 0
    with orders.download_slot(request):
        async with contextlib.aclosing(found) as runs:
            async for listed in runs:
                read += 1
                if chars >= MAX_CHARS or len(messages) >= MAX_MESSAGES or read > 10 * MAX_MESSAGES:
                    break
                if listed.agent_name != agent.name or (messages and listed.status is not RunStatus.COMPLETED):
                    continue
                with contextlib.suppress(NotFound):  # it was deleted meanwhile
                    run, answer, text = await engine.get_run(listed.run_id), list[Any](), ""
                    if run.status is RunStatus.COMPLETED:
                        text = await chats.text_of(engine, agents, run, as_json=False)
                        is_text = chats.text_output_of(agents.get(run.steps[-1].agent_name, agent)) is not None
                        part = {**TEXT, "text": text} if is_text else _result(run.run_id, msgspec.Raw(text.encode()))
                        answer.append({"id": f"msg_{run.run_id}", "role": "assistant", "parts": [part]})
                    said = chats.messages_of(agent, run.inputs)[-1].content
                    asked = {"id": f"msg_{run.run_id}_in", "role": "user", "parts": [{**TEXT, "text": said}]}
                    messages += [*answer, asked]
                    chars += len(text) + len(said)
    return PageResponse(messages[::-1], orders.download_slot(request))


def _result(run_id: str, result: Any) -> Mapping[str, Any]:
    return {"type": "data-result", "id": run_id, "data": result}


async def resume(request: Request) -> Response:
    """GET /vercel/{agent}/{chat_id}/stream: the newest message from the start, or 204 if there is none."""
    agent, newest = frontends.agent_in(request), await orders.newest_run(request, request.path_params["chat_id"])
    if newest is None or newest.agent_name != agent.name:
        return Response(status_code=204)
    if request.method == "HEAD":
        return head_of_stream("text/event-stream", {**_Writer.HEADERS, "X-Accel-Buffering": "no"})
    return await _streamed(request, orders.Answers(newest.run_id))


async def stop(request: Request) -> Response:
    """POST /vercel/{agent}/{chat_id}/stop: cancel the runs of a chat, and wait a while until they have stopped."""
    engine, agent = await orders.engine_of(request), frontends.agent_in(request)
    stopping, max_wait_s = list[str](), orders.serving(request).options.max_wait_s
    for status in (RunStatus.STARTING, RunStatus.RUNNING, RunStatus.WAITING):
        async for run in orders.runs_of_session(request, request.path_params["chat_id"], status):
            if run.agent_name == agent.name:
                with contextlib.suppress(Conflict, NotFound):  # it has just ended
                    await engine.cancel_run(run.run_id)
                    stopping.append(run.run_id)

    with anyio.move_on_after(max_wait_s) as waiting:
        for run_id in stopping:
            with contextlib.suppress(NotFound):
                await while_connected(request, engine.wait(run_id))
    return Response(status_code=202 if waiting.cancelled_caught else 204)


async def _streamed(request: Request, wanted: orders.Wanted, known: Sequence[Part] = ()) -> Response:
    """Return the stream of a run, without the calls in *known*, which are parts that the client has.

    If they end with a text, an earlier stream was cut off. It is taken back.
    """
    last = max((at for at, part in enumerate(known) if part.type == "step-start"), default=0)
    is_cut = any(part.type == "text" for part in known[last:])
    known = known[:last] if is_cut else known
    calls = ({each.toolCallId for each in known if begins in each.state} for begins in ("", "output-"))
    return await frontends.streamed(request, wanted, lambda run: _Writer(run.run_id, is_cut=is_cut), *calls)


# Streams


class _Writer:
    """Writes the parts of a message.

    The text is in a step, so that ``reset-step`` takes it back, and with it the calls that were written after it: those
    are written again.
    """

    HEADERS: ClassVar = {"x-vercel-ai-ui-message-stream": "v1"}
    LAST: ClassVar = b"data: [DONE]\n\n"

    def __init__(self, run_id: str, *, is_cut: bool) -> None:
        self._run_id, self._is_cut = run_id, is_cut
        #: the kind of the part that is open, and its number
        self._open, self._number = "", 0
        self._has_parts, self._has_text, self._after_text = False, False, list[bytes]()

    def begin(self) -> bytes:
        begun = typed_event("start", messageId=f"msg_{self._run_id}", messageMetadata={"run_id": self._run_id})
        return begun + (typed_event("reset-step") if self._is_cut else b"") + typed_event("start-step")

    def result(self, result: Any) -> Mapping[str, Any]:
        return _result(self._run_id, result)

    def failed(self, text: str, error_type: str) -> bytes:
        return typed_event("error", errorText=text)

    def part(self, part: Any) -> bytes:
        match part:
            case str():
                is_in_step = self._has_text or not self._has_parts
                begun, self._has_text = b"" if is_in_step else self._end_step() + typed_event("start-step"), True
                return begun + self._delta("text", part)
            case chats.Thought():
                return self._delta("reasoning", part.text)
            case chats.TakenBack():
                taken = typed_event("reset-step") + b"".join(self._after_text) if self._has_text else b""
                self._open, self._has_text = "" if taken else self._open, False
                self._after_text.clear()
                return taken + (self.part(part.text) if part.text else b"")
            case frontends.CallBegun():
                ours = {} if part.question else {"providerExecuted": True}
                return self._call("tool-input-available", part.id, toolName=part.name, input=part.input, **ours)
            case frontends.SubAgent():
                return b""  # it is a part of its call
            case frontends.Asked():
                is_call = part.call_id == part.id
                return b"" if is_call else self._call("tool-approval-request", part.call_id, approvalId=part.id)
            case frontends.CallEnded(error=None):
                return self._call("tool-output-available", part.id, output=part.output)
            case frontends.CallEnded():
                return self._call("tool-output-error", part.id, errorText=part.error)
            case Event(name="run.progress"):
                return typed_event("data-progress", data=part.data, transient=True)
            case Event(name="run.cancelled"):
                return self._end_step() + typed_event("abort", reason="The run was cancelled.")
        is_done = part.name == "run.completed"
        return self._end_step() + typed_event("finish", finishReason="stop" if is_done else "tool-calls")

    def _delta(self, kind: str, text: str) -> bytes:
        begun, self._has_parts = b"" if self._open == kind else self._close(), True
        if self._open != kind:
            self._open, self._number = kind, self._number + 1
            begun += typed_event(f"{kind}-start", id=f"{kind}{self._number}")
        return begun + typed_event(f"{kind}-delta", id=f"{kind}{self._number}", delta=text)

    def _close(self) -> bytes:
        kind, self._open = self._open, ""
        return typed_event(f"{kind}-end", id=f"{kind}{self._number}") if kind else b""

    def _end_step(self) -> bytes:
        return self._close() + typed_event("finish-step")

    def _call(self, type_: str, call_id: str, **data: Any) -> bytes:
        chunk, self._has_parts = typed_event(type_, toolCallId=call_id, **data), True
        if self._has_text:
            self._after_text.append(chunk)
        return chunk

"""The UI message stream of Vercel's AI SDK: a chat of ``useChat`` is a session of an agent, and each answer is a run.

A message has the parts of a run: reasoning, calls of tools and agents, the text, questions. Each request adds steps to
it.
"""

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

import anyio.lowlevel
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.errors import Conflict, FlockError, InvalidData
from flock.jsontype import JSONType
from flock.protocols import chats, frontends
from flock.protocols.frontends import error_shape as error_shape
from flock.protocols.openai_parts import failure_text
from flock.runs import ClientTool, Event, Run, RunStatus
from flock.web import orders, wire
from flock.web.requests import while_connected
from flock.web.responses import KEEP_ALIVE, EventStream, PageResponse, head_of_stream, long_event, sent_event
from flock.web.routing import AppRoute

PREFIX = "/vercel"

HEADERS = {"x-vercel-ai-ui-message-stream": "v1", "X-Accel-Buffering": "no"}

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
        if self.state == "output-error":
            return [(self.toolCallId, f"The tool failed: {self.errorText}")]
        return [(self.toolCallId, self.output)] if self.state == "output-available" else []


class UIMessage(msgspec.Struct, frozen=True):
    id: str
    role: str
    parts: list[Part] = []


class ChatRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of ``POST /vercel/{agent}``, as ``DefaultChatTransport`` sends it. Its ``body`` may have the last three.

    Attributes:
        inputs: those that are not messages, by name.
        tools: of the client.
        resumable: whether the run continues if the client disconnects.
    """

    id: wire.SessionID
    messages: list[UIMessage]
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    messageId: str | None = None
    inputs: dict[str, msgspec.Raw] = {}
    tools: list[ClientTool] = []
    resumable: bool = True


CHAT_REQUEST = JSONType(ChatRequest, ignores_unknown=True)


async def chat(request: Request) -> Response:
    """POST /vercel/{agent}: a new run, or the answers for which the run of a message waits."""
    body, agent = await orders.read_json(request), frontends.agent_in(request)
    sent = CHAT_REQUEST.decode(body)
    at = next((at for at, each in enumerate(sent.messages) if each.id == sent.messageId), len(sent.messages) - 1)
    if at < 0:
        raise InvalidData.of("There is no message.", "/messages")
    message, place = sent.messages[at], f"/messages/{at}"
    if message.role == "assistant" and sent.trigger == "submit-message":
        given = {
            id_: msgspec.Raw(msgspec.json.encode(answer)) for part in message.parts for id_, answer in part.answers
        }
        answers = await frontends.answers_of(request, agent, sent.id, message.id.removeprefix("msg_"), given, place)
        return await _streamed(request, answers, message.parts)
    for number, part in enumerate(message.parts):
        if part.type == "file":
            raise InvalidData.of("Files are not supported. Send text.", f"{place}/parts/{number}")
    newest = await frontends.newest_of(request, agent, sent.id)
    if sent.messageId not in (None, newest and f"msg_{newest.run_id}"):
        raise Conflict("Only the last answer can be replaced. To change an earlier message, begin another chat.")
    text = "".join(part.text for part in message.parts if part.type == "text" and message.role == "user")
    said, is_again = frontends.Said(text, place, sent.inputs, sent.tools), sent.trigger == "regenerate-message"
    order = await frontends.order_of(request, agent, sent.id, newest, said, replaces=is_again)
    return await _streamed(request, msgspec.structs.replace(order, is_async=sent.resumable))


async def _newest(request: Request) -> Run | None:
    return await frontends.newest_of(request, frontends.agent_in(request), request.path_params["chat_id"])


async def list_messages(request: Request) -> Response:
    """GET /vercel/{agent}/{chat_id}: what was said in the last runs that have completed, and asked in the newest."""
    engine, agent, agents = (
        await orders.engine_of(request),
        frontends.agent_in(request),
        orders.serving(request).flock.agents,
    )
    messages, chars = list[Any](), 0
    async with contextlib.aclosing(frontends.runs_of(request, agent, request.path_params["chat_id"])) as runs:
        async for listed in runs:
            await anyio.lowlevel.checkpoint()
            if messages and listed.status is not RunStatus.COMPLETED:
                continue
            if chars >= MAX_CHARS or len(messages) >= MAX_MESSAGES:
                break
            run, text = await engine.get_run(listed.run_id), ""
            if run.status is RunStatus.COMPLETED:
                text = await chats.text_of(engine, agents, run, as_json=False)
                is_text = chats.text_output_of(agents.get(run.steps[-1].agent_name, agent)) is not None
                part = _text(text) if is_text else _result(run.run_id, msgspec.Raw(text.encode()))
                messages.append({"id": f"msg_{run.run_id}", "role": "assistant", "parts": [part]})
            said = chats.messages_of(agent, run.inputs)[-1].content
            messages.append({"id": f"msg_{run.run_id}_in", "role": "user", "parts": [_text(said)]})
            chars += len(text) + len(said)
    return PageResponse(messages[::-1], orders.download_slot(request))


def _text(text: str) -> Mapping[str, Any]:
    return {"type": "text", "text": text, "state": "done"}


def _result(run_id: str, result: Any) -> Mapping[str, Any]:
    return {"type": "data-result", "id": run_id, "data": result}


async def resume(request: Request) -> Response:
    """GET /vercel/{agent}/{chat_id}/stream: the newest message from its beginning, or 204 if there is none."""
    newest = await _newest(request)
    if newest is None:
        return Response(status_code=204)
    if request.method == "HEAD":
        return head_of_stream(EventStream.media_type, HEADERS)
    return await _streamed(request, orders.Answers(newest.run_id))


async def stop(request: Request) -> Response:
    """POST /vercel/{agent}/{chat_id}/stop: cancel the newest run of a chat, and wait until it has stopped."""
    engine, newest = await orders.engine_of(request), await _newest(request)
    if newest is not None and not newest.status.is_final:
        with contextlib.suppress(Conflict):  # it has just ended
            await engine.cancel_run(newest.run_id)
        await while_connected(request, engine.wait(newest.run_id, orders.serving(request).options.max_wait_s))
    return Response(status_code=204)


# Streams


async def _streamed(request: Request, wanted: orders.Order | orders.Answers, known: Sequence[Part] = ()) -> Response:
    """Return the stream of a run, without the calls in *known*, which are parts that the client has.

    If they end with a text, an earlier stream was cut off. It is taken back.
    """
    last = max((at for at, part in enumerate(known) if part.type == "step-start"), default=0)
    is_cut = any(part.type == "text" for part in known[last:])
    known = known[:last] if is_cut else known
    ended = [part.toolCallId for part in known if part.state.startswith("output-")]
    stream, engine = await orders.stream(request, wanted, reasoning=True), await orders.engine_of(request)
    run = stream.accepted.run
    shown = frontends.ShownRun(request, engine, run, [part.toolCallId for part in known], ended)

    async def content() -> AsyncGenerator[bytes, None]:
        writer = _Writer(run)
        yield writer.begin() + (_chunk("reset-step") if is_cut else b"")
        try:
            async with contextlib.aclosing(shown.parts(stream.events)) as parts:
                async for part in parts:
                    if isinstance(part, Event) and part.data.get("result") is not None:
                        yield writer.step()
                        async for piece in long_event(_result(run.run_id, part.data["result"])):
                            yield piece
                    yield writer.part(part) if part else KEEP_ALIVE
        except FlockError as exc:
            yield _chunk("error", errorText=failure_text(str(exc), run.run_id))
        yield b"data: [DONE]\n\n"

    return EventStream(content(), stream.held, {**HEADERS, "Flock-Run-Id": run.run_id}, on_cut_off=stream.on_cut_off)


class _Writer:
    """Writes the parts of a message.

    The text is in the last step, so that ``reset-step`` takes it back, and with it the calls that were written after
    it: those are written again. What a run asks is in a step of its own, as clients expect.
    """

    def __init__(self, run: Run) -> None:
        self._run_id = run.run_id
        #: the kind of the part that is open, and its number
        self._open, self._number = "", 0
        self._has_step = self._has_text = False
        self._after_text = list[bytes]()

    def begin(self) -> bytes:
        return _chunk("start", messageId=f"msg_{self._run_id}", messageMetadata={"run_id": self._run_id})

    def step(self) -> bytes:
        """Begin another step."""
        ended = self._end_step()
        self._has_step, self._has_text = True, False
        self._after_text.clear()
        return ended + _chunk("start-step")

    def _end_step(self) -> bytes:
        return self._close() + (_chunk("finish-step") if self._has_step else b"")

    def part(self, part: Any) -> bytes:
        match part:
            case str():
                begun, self._has_text = b"" if self._has_text else self.step(), True
                return begun + self._delta("text", part)
            case chats.Thought():
                return self._delta("reasoning", part.text)
            case chats.TakenBack():
                return self._take_back() + (self.part(part.text) if part.text else b"")
            case frontends.CallBegun():
                begun = b"" if part.is_ours else self._take_back(ends=True)
                ours = {"providerExecuted": True} if part.is_ours else {}
                call = {"toolCallId": part.id, "toolName": part.name, "input": part.input, **ours}
                return begun + self._call("tool-input-available", call)
            case frontends.ApprovalAsked():
                about = {"approvalId": part.id, "toolCallId": part.call_id}
                return self._take_back(ends=True) + self._call("tool-approval-request", about)
            case frontends.CallEnded(is_denied=True):
                return self._call("tool-output-denied", {"toolCallId": part.id})
            case frontends.CallEnded():
                end = {"output": part.output} if part.error is None else {"errorText": part.error}
                kind = "available" if part.error is None else "error"
                return self._call(f"tool-output-{kind}", {"toolCallId": part.id, **end})
            case Event(name="run.progress"):
                return _chunk("data-progress", data=part.data, transient=True)
            case _:
                return self._end(part.name, part.data)

    def _take_back(self, *, ends: bool = False) -> bytes:
        """Take the text back, if there is any. If it *ends*, it begins again after an answer, in another step."""
        if not self._has_text:
            return b""
        self._open = ""
        return _chunk("reset-step") + b"".join(self._after_text) + (self.step() if ends else b"")

    def _delta(self, kind: str, text: str) -> bytes:
        begun = b"" if self._has_step else self.step()
        if self._open != kind:
            begun += self._close()
            self._open, self._number = kind, self._number + 1
            begun += _chunk(f"{kind}-start", id=f"{kind}{self._number}")
        return begun + _chunk(f"{kind}-delta", id=f"{kind}{self._number}", delta=text)

    def _close(self) -> bytes:
        kind, self._open = self._open, ""
        return _chunk(f"{kind}-end", id=f"{kind}{self._number}") if kind else b""

    def _call(self, type_: str, data: Mapping[str, Any]) -> bytes:
        begun, chunk = b"" if self._has_step else self.step(), _chunk(type_, **data)
        if self._has_text:
            self._after_text.append(chunk)
        return begun + chunk

    def _end(self, name: str, data: Mapping[str, Any]) -> bytes:
        ended = self._end_step()
        if name == "run.failed":
            return ended + _chunk("error", errorText=failure_text(data["error"], self._run_id))
        if name == "run.cancelled":
            return ended + _chunk("abort", reason="The run was cancelled.")
        return ended + _chunk("finish", finishReason="stop" if name == "run.completed" else "tool-calls")


def _chunk(type_: str, **data: Any) -> bytes:
    return sent_event({"type": type_, **data})

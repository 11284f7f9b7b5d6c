"""The conversation of one step with a model: its replies, the tool calls that it asks for, and its answer."""

import functools
import hashlib
import itertools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.functions import stored_call
from flock.agents.hooks import Hook, with_model_hooks
from flock.agents.tools import Toolbox
from flock.errors import InvalidData, InvalidOutput, MalformedJSON, ModelError
from flock.models.completions import Completion, Listener, Message, with_user_text
from flock.models.requests import Request, bytes_of_files
from flock.runs import RunContext, Usage
from flock.runs.traces import of_chat


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What ``validate=`` says about an answer: its result, or the reason why it is sent back."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    reason: str = ""


class Conversation(msgspec.Struct, kw_only=True):
    """Asks a model until its answer is valid.

    A reply is a call of the step. It is stored if another call follows it: those of tools, or the next question.

    Attributes:
        messages: of the conversation so far.
        models: the names of the models that may answer. The first one identifies their calls in the journal.
        request: the parts that all of its requests share.
        complete: sends a request to the model; see ``ModelClient.complete``.
        in_batch: sends the first request through the provider's batch endpoint. It returns None if it is to be sent as
            a normal one.
        hooks: functions around that. With them nothing is streamed, since they may change the answer.
        read: returns the result for an answer. Raises MalformedJSON, InvalidData, UnicodeEncodeError.
        listen: returns a listener for one reply. It is called if somebody watches the run.
        validate: checks a valid answer; None if all are accepted.
        instruct: returns the instructions for one call, and the system message that has them; None if they are fixed.
    """

    messages: list[Message]
    toolbox: Toolbox
    context: RunContext
    models: Sequence[str]
    request: Request
    complete: Callable[[Request], Awaitable[Completion]]
    in_batch: Callable[[Request], Awaitable[Completion | None]] | None = None
    hooks: Sequence[Hook] = ()
    read: Callable[[str], msgspec.Raw]
    listen: Callable[[], Listener]
    validate: Callable[[str], Awaitable[Verdict]] | None = None
    instruct: Callable[[], Awaitable[tuple[str, Message]]] | None = None

    async def converse(self, answer_retries: int) -> msgspec.Raw:
        """Return the result of the first valid answer.

        Raises: InvalidOutput if more than *answer_retries* answers are invalid; ModelError; TooManyTokens; CostLimit.
        """
        retries = number = 0
        while True:
            number += 1
            reply = await self._reply(number, is_last=retries == answer_retries)
            if reply.tool_calls:
                self.context.reset_output()  # a text with calls is not the answer
                self.messages.append(Message("assistant", reply.text or "", reply.tool_calls))
                self.messages += await self.toolbox.results(reply.tool_calls, number)
                if not self.toolbox.offered:
                    self._ask_for_answer("No more calls are possible.")
            elif reply.text is None:
                self._ask_for_answer("Make no more calls.")
            else:
                result, problem = self._result_of(reply.text)
                if is_checked := result is not None and self.validate is not None:
                    verdict = await self._verdict(self.validate, reply.text, number)
                    result, problem = verdict.result or None, verdict.reason
                if result is not None:
                    return result
                self.context.reset_output()
                if retries == answer_retries:
                    raise InvalidOutput(
                        f"The model's answers did not match the output of {self.context.agent_name!r} "
                        f"in {answer_retries + 1} attempts: {problem}"
                    )
                retries += 1
                self.messages.append(Message("assistant", reply.text))
                problem = f"That answer cannot be used. {problem}"
                if is_checked and self.toolbox.offered:
                    self.messages = with_user_text(self.messages, problem)
                else:
                    self._ask_for_answer(problem)

    async def _reply(self, number: int, *, is_last: bool) -> Completion:
        """Ask the model, or read its reply if it was asked before the step started again."""
        context, is_first = self.context, number == 1
        asks = itertools.count(1)

        async def pay_once(request: Request) -> Completion:
            """Store the reply that a hook gets before it goes on, since it may wait for a person or make calls."""

            asked = next(asks)

            async def sealed() -> Completion:
                return self.toolbox.sealed(await self._pay(request, is_first=is_first and asked == 1))

            reply = await stored_call(
                context, "reply", str(asked), sealed, Completion, kind="model", should_keep=lambda _: True
            )
            return self.toolbox.unsealed(reply)

        async def ask() -> Completion:
            instructions: str | msgspec.UnsetType = msgspec.UNSET
            if self.instruct is not None:
                instructions, system = await self.instruct()
                self.messages = [system, *self.messages[1:]]
            request = replace(
                self.request,
                messages=self.messages,
                tools=self.toolbox.offered,
                options=self._options,
                # Each call needs its own key, or a provider would return the invalid answer again.
                idempotency_key=key if number == 1 else f"{key}/{number}",
                listener=self.listen() if context.is_watched and not self.hooks else None,
                on_unfinished=context.spend,
            )
            pay = pay_once if self.hooks else functools.partial(self._pay, is_first=is_first)
            completion = await with_model_hooks(self.hooks, pay, request, context)
            return self.toolbox.sealed(replace(completion, instructions=instructions))

        def needs_more(reply: Completion) -> bool:
            if reply.tool_calls or reply.text is None or self.validate or self.instruct or self.hooks:
                return True
            return not is_last and self._result_of(reply.text)[0] is None

        key, label = context.model_key, re.sub(r"[^A-Za-z0-9_.-]", "_", self._model)
        reply = await stored_call(context, label, str(number), ask, Completion, kind="model", should_keep=needs_more)
        return self.toolbox.unsealed(reply)

    async def _pay(self, request: Request, *, is_first: bool) -> Completion:
        """Ask the model, within the budget of the run, and count what the reply cost."""
        if is_first and self.in_batch is not None and (reply := await self.in_batch(request)) is not None:
            return reply  # it is counted where it was stored
        context, files = self.context, " " * bytes_of_files(request.messages)
        async with context.reserve(self._model, (request.messages, request.tools, files), request.max_tokens):
            context.check_tokens(self.models)
            with of_chat(self._model, request.max_tokens, request.temperature) as span:
                try:
                    completion = await self.complete(replace(request, traceparent=context.traceparent))
                except ModelError as exc:
                    if exc.usage is not None:  # the answer is paid for, even if it cannot be used
                        context.spend(exc.usage, exc.model)
                    raise
                context.spend(completion.usage, completion.model)
                span.note({"gen_ai.response.model": (completion.model or "").partition("/")[2] or None})
                span.content(lambda: self._content(request, completion))
        return completion

    @property
    def _model(self) -> str:
        """The model that is asked first."""
        return next(iter(self.models), "")

    @property
    def _options(self) -> Mapping[str, Any]:
        """The options of the next request. A model that must call tools would never answer, so that is asked once."""
        options = dict(self.request.options)
        if self.toolbox.calls_made:
            options.pop("tool_choice", None)
        return options

    async def _verdict(self, validate: Callable[[str], Awaitable[Verdict]], text: str, number: int) -> Verdict:
        """Return what ``validate=`` says. It is a call of the step, since it may decide otherwise the next time."""
        digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]  # a retry gets other answers
        return await stored_call(
            self.context, "validate", f"{number}-{digest}", functools.partial(validate, text), Verdict
        )

    def _result_of(self, text: str) -> tuple[msgspec.Raw | None, str]:
        """Return the result for an answer, or None and the reason why it is invalid."""
        try:
            return self.read(text), ""
        except (MalformedJSON, InvalidData, UnicodeEncodeError) as exc:
            return None, str(exc)

    def _content(self, request: Request, completion: Completion) -> Mapping[str, Any]:
        """Return what the model was sent and has answered, as spans have it. Secret arguments are encrypted."""
        answer = self._shown(Message("assistant", completion.text or "", completion.tool_calls))
        answer["finish_reason"] = "tool_call" if completion.tool_calls else "stop"
        return {"gen_ai.input.messages": list(map(self._shown, request.messages)), "gen_ai.output.messages": [answer]}

    def _shown(self, message: Message) -> dict[str, Any]:
        made = self.toolbox.sealed(Completion(text=None, usage=Usage(), tool_calls=message.tool_calls)).tool_calls
        parts = [{"type": "tool_call", "id": call.id, **msgspec.to_builtins(call.function)} for call in made]
        if message.tool_call_id is not None:
            parts = [{"type": "tool_call_response", "id": message.tool_call_id, "response": message.content}]
        elif message.content:
            parts.insert(0, {"type": "text", "content": message.content})
        return {"role": message.role, "parts": parts}

    def _ask_for_answer(self, reason: str) -> None:
        """Ask for the answer in the strictest format of the model's server, and offer no more tools."""
        self.toolbox.close()
        request = f"{reason}\nAnswer now, with one JSON object and nothing else."
        self.messages = with_user_text(self.messages, request)

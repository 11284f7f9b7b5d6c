"""What a model sees of earlier turns of a conversation: their prompts, answers and calls of tools."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from flock.errors import CallError, DefinitionError
from flock.models.completions import Completion, Message
from flock.models.streams import BYTES_PER_TOKEN
from flock.runs import Call

#: The name of the call in which a function edits the history.
EDIT = "history"


class Exchange(NamedTuple):
    """The inputs and the result of an earlier turn, and the calls of its step if they were asked for."""

    inputs: msgspec.Raw
    result: msgspec.Raw
    calls: Sequence[Call] = ()


class History(msgspec.Struct, frozen=True, kw_only=True):
    """What a model sees of earlier turns.

    Args:
        turns: max number of turns, at least 1.
        calls: whether it sees the calls of tools and their results. Arguments of tools with ``secret=`` are left out.
        max_tokens: the oldest turns are left out as a whole until the others have at most as many tokens, estimated as
            one for 4 bytes. None means no limit.
        edit: a function of the messages, as in OpenAI's API, and of the context if it has one more parameter. It
            returns the messages that the model sees, and may run an agent to summarise them. Its result is kept for the
            session: the next turn gets it, and this turn after it, in place of the earlier turns. It is async, or runs
            in a worker thread, for ``tool_timeout_s`` at most.

    Raises: DefinitionError.
    """

    turns: int = 20
    calls: bool = False
    max_tokens: int | None = None
    edit: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for name in ("turns", "max_tokens"):
            value = getattr(self, name)
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not is_count and (name == "turns" or value is not None):
                raise DefinitionError(f"{name}= of a History must be a whole number from 1, not {value!r}.")

    @property
    def needs_calls(self) -> bool:
        return self.calls or self.edit is not None

    def within_limit(self, turns: Sequence[Sequence[Message]]) -> list[Message]:
        """Return the messages of the last *turns* that are within ``max_tokens``."""
        left = None if self.max_tokens is None else self.max_tokens * BYTES_PER_TOKEN
        kept: list[Message] = []
        for turn in reversed(turns):
            if left is not None and (left := left - len(msgspec.json.encode(turn))) < 0:
                break
            kept = [*turn, *kept]
        return kept


def edited_by(calls: Sequence[Call]) -> list[Message] | None:
    """Return the history that a function has edited last in a step with these calls, or None."""
    for call in reversed(calls):
        if call.call_id == f"{EDIT}:1" and call.error is None:
            return msgspec.json.decode(call.result, type=list[Message])
    return None


def messages_of(calls: Sequence[Call], secret: Callable[[str], bool]) -> list[Message]:
    """Return the calls of tools of a step, and their results, as messages. *secret*: whether a tool has secrets."""
    ended = {call.call_id: call for call in calls if "~" not in call.call_id}  # not what calls have called
    replies: dict[int, Completion] = {}
    for call in ended.values():
        last = call.call_id.rpartition(":")[2]
        if call.kind == "model" and call.error is None and last.isdecimal():
            replies[int(last)] = msgspec.json.decode(call.result, type=Completion)
    messages: list[Message] = []
    for number, reply in sorted(replies.items()):
        if reply.tool_calls:
            made = [
                msgspec.structs.replace(each, function=msgspec.structs.replace(each.function, arguments="{}"))
                if secret(each.function.name)
                else each
                for each in reply.tool_calls
            ]
            messages.append(Message("assistant", reply.text or "", tuple(made)))
            for position, each in enumerate(made, 1):
                result = _result_of(ended.get(f"{each.function.name}:{number}.{position}"))
                messages.append(Message("tool", result, tool_call_id=each.id))
    return messages


def _result_of(call: Call | None) -> str:
    if call is None:
        return "It was not called."
    value = f"Error: {call.error}" if call.error is not None else msgspec.json.decode(call.result)
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def checked_messages(option: str, returned: Any) -> list[Message]:
    """Return what a function that edits the history has returned. Raises CallError if it is not a conversation."""
    try:
        messages = msgspec.convert(msgspec.to_builtins(returned), list[Message])
    except (msgspec.ValidationError, TypeError) as exc:
        raise CallError(f"{option} returned what is not a list of messages: {exc}.") from exc
    open_calls: set[str | None] = set()
    for number, message in enumerate(messages):
        is_known = message.role in ("user", "assistant") or (
            message.role == "tool" and message.tool_call_id in open_calls
        )
        if not is_known:
            raise CallError(
                f"{option} returned an invalid conversation: message {number} has the role {message.role!r}. Use "
                "'user' and 'assistant', and 'tool' after the call whose result it is."
            )
        if message.role == "tool":
            open_calls.discard(message.tool_call_id)
        elif open_calls:
            break
        else:
            open_calls = {call.id for call in message.tool_calls}
    if open_calls:
        raise CallError(f"{option} returned an invalid conversation: a call of a tool has no result.")
    return messages

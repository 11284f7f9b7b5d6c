"""What a retry keeps of the calls that earlier attempts have made."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import msgspec
from msgspec.structs import replace

from flock.agents.questions import BATCH_REPLY
from flock.runs import Call
from flock.runs.records import Mark, Raised
from flock.steps.identity import asking_call
from flock.steps.replay import NESTED, parent_of

#: Long enough to tell the failed calls of one run apart.
KEY_CHARS = 16


class _Reply(msgspec.Struct):
    tool_calls: tuple[msgspec.Raw, ...] = ()


def kept_calls(calls: Iterable[Call], dropped: Collection[str]) -> list[Call]:
    """Return those of the *calls* of earlier attempts that a retry does not execute again.

    Args:
        dropped: see ``Run``.
    """
    return _without(calls, lambda call: call.once is None and (_is_in(dropped, call) or _is_no_answer(call)))


def _without(calls: Iterable[Call], is_left_out: Callable[[Call], bool]) -> list[Call]:
    """Return the other *calls*. The first of them gets what is stored with those left out of when others were seen."""
    kept: list[Call] = []
    ids: set[str] = set()
    also: list[Mark] = []
    for call in calls:
        if not is_left_out(call):
            kept.append(call)
            ids.add(asking_call(call.call_id))
        elif call.place is not None:  # what ends later is executed again, unless its own entry has its place
            also += [mark for mark in call.place.also if mark.call_id in ids]
    for index, call in enumerate(kept):
        if also and call.place is not None:
            kept[index] = replace(call, place=replace(call.place, also=(*also, *call.place.also)))
            break
    return kept


def without_excluded(calls: Sequence[Call], begun_by: Collection[str]) -> Sequence[Call]:
    """Return *calls* without approvals by principals who started or retried the run, unless the tool has started.

    Args:
        begun_by: see ``Run``.
    """
    started = {call.call_id for call in calls if call.kind == "tool"}

    def is_excluded(call: Call) -> bool:
        return call.four_eyes and call.answered_by in begun_by and tool_call_of(call.call_id) not in started

    return _without(calls, is_excluded)


def tool_call_of(approval_id: str) -> str:
    """Return the id of the call of a tool that an approval allows: ``refund:1.1`` for ``ask:refund.1.1``."""
    parent, nested, own = asking_call(approval_id).rpartition(NESTED)
    tool, _, number = own.partition(":")[2].partition(".")
    return f"{parent}{nested}{tool}:{number}"


def dropped_calls(
    failed: Sequence[tuple[Call, BaseException | None]],
    end: BaseException | None,
    has_gone_on: Callable[[Call], bool],
    kept: Iterable[Call],
) -> list[str]:
    """Return the keys of *failed* calls that a retry executes again: the program has not continued after them.

    Args:
        failed: each with the exception that the program has seen.
        end: what the step has raised; None if it was ended from outside.
        has_gone_on: whether a call of the step has started after a call had failed.
        kept: the calls that earlier attempts have not dropped. Those that have started after them may be.
    """
    ends, kept_keys = set(map(id, _named_by(end))), {key_of(call) for call in kept if call.error is not None}
    dropped = [call for call, exc in failed if id(exc) in ends or not (key_of(call) in kept_keys or has_gone_on(call))]
    return list(dict.fromkeys(map(key_of, (*dropped, *_passed_on([call for call, _ in failed], dropped)))))


def _passed_on(failed: Sequence[Call], dropped: Sequence[Call]) -> Iterator[Call]:
    """Yield the calls whose exceptions the *dropped* ones that made them have raised, themselves or in a group.

    If the step has run twice, these are not the same exceptions, but equal ones: those of the calls that ended last.
    """
    made_by = defaultdict[str, list[Call]](list)
    for call in {key_of(call): call for call in failed}.values():
        made_by[parent_of(call.call_id)].append(call)
    left = list(dropped)
    while left:
        call = left.pop()
        raised = Counter(map(msgspec.json.encode, _parts_of(call.raised)))
        for made in sorted(made_by[call.call_id], key=_end_of, reverse=True):
            if raised[key := msgspec.json.encode(made.raised)] > 0:
                raised[key] -= 1
                left.append(made)
                yield made


def _end_of(call: Call) -> int:
    return 0 if call.place is None else call.place.end


def _parts_of(raised: Raised | None) -> Iterator[Raised]:
    """Yield an exception, and the members of a group."""
    if raised is not None:
        yield raised
        for each in raised.exceptions:
            yield from _parts_of(each)


def key_of(call: Call) -> str:
    """Return what identifies an entry of the journal: a call that failed may have been made again."""
    of = f"{asking_call(call.call_id)} {call.completed_at.isoformat()}"
    return hashlib.sha256(of.encode()).hexdigest()[:KEY_CHARS]


def _is_in(dropped: Collection[str], call: Call) -> bool:
    """Whether *call* is dropped. An answer has the same key as its call, if that was cancelled in the same instant."""
    return (call.error is not None or BATCH_REPLY in call.call_id) and key_of(call) in dropped


def _named_by(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield *exc*, the members of groups, and the causes that they name, each once."""
    found, left = set[int](), [exc]
    while left:
        each = left.pop()
        if each is not None and id(each) not in found:
            found.add(id(each))
            yield each
            left.append(each.__cause__)
            left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def _is_no_answer(call: Call) -> bool:
    """Whether *call* is an answer of a model that was not valid: a valid one ends its step.

    Or a call without an answer, which fell back to a normal one.
    """
    if BATCH_REPLY in call.call_id:
        return call.error is None and bytes(call.result) == b"null"
    return call.kind == "model" and call.error is None and not msgspec.json.decode(call.result, type=_Reply).tool_calls

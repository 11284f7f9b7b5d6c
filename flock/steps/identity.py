"""What identifies a call of a function, beside its parents: the name of the function, and its arguments.

And what identifies a question: the call that asks it, in which try of the run, and what it asks.
"""

import functools
import hashlib
import hmac
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UnsetType

from flock.errors import CallError
from flock.pydanticmodel import from_json, to_json
from flock.runs import Question

#: A name that a program gives to a call. It becomes a part of the call's id, and so of URLs.
NAME = r"[A-Za-z0-9_.-]{1,128}"

DIGEST_CHARS = 16
#: Between the id of the call that asks, and what belongs to the question. No call has it in its id.
ASKED = "@"
#: Types that read each value in only one way.
_PLAIN = (Any, bool, str)


def new_call_key() -> str:
    """Return a new ``Run.call_key``, or key of a flock."""
    return os.urandom(16).hex()


def digest(content: bytes, key: str = "") -> str:
    """Return a digest of *content*. With a *key*, nobody without it can find out whether a guess is right."""
    hashed = hmac.new(key.encode(), content, hashlib.sha256) if key else hashlib.sha256(content)
    return hashed.hexdigest()[:DIGEST_CHARS]


def digest_of(
    label: str,
    function: Callable[..., Any],
    arguments: msgspec.Raw,
    hints: Mapping[str, Any],
    *,
    version: int,
    key: str = "",
) -> str:
    """Return what identifies a call: its function, what a partial or a method is bound to, and its arguments.

    The module does not count, so a file may be renamed or moved, or be started as ``__main__``. Version 1 is that of an
    earlier version of this package; see ``Run.call_ids``.

    Args:
        hints: the types of the parameters, by name.
        key: see ``digest``.

    Raises: CallError.
    """
    bound: list[Any] = []
    unbound = function
    while isinstance(unbound, functools.partial):
        bound += [unbound.args, unbound.keywords]
        unbound = unbound.func
    owner = getattr(unbound, "__self__", None)
    bound_json = json_of(label, "object or the bound arguments", [bound, None if inspect.ismodule(owner) else owner])
    name, read = getattr(unbound, "__qualname__", type(unbound).__qualname__), bytes(arguments)
    if version == 1:
        name = f"{getattr(unbound, '__module__', '')}.{name}"
    else:
        read = _as_declared(function, read, hints)
    return digest(b"\0".join([name.encode(), bound_json, read]), key)


def code_of(function: Callable[..., Any]) -> object:
    """Return the code of *function*, or of what it wraps. That of two closures of one function is the same."""
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__code__") and not inspect.isroutine(function):
        function = type(function).__call__
    function = inspect.unwrap(function)
    of = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")  # of a built-in
    return getattr(function, "__code__", of)


def json_of(label: str, part: str, value: Any) -> msgspec.Raw:
    try:
        return msgspec.Raw(msgspec.json.encode(value, order="deterministic", enc_hook=to_json))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise CallError(
            f"The {part} of the call {label!r} cannot be converted to JSON: {exc}. Pass call_name= to identify the "
            "call without them."
        ) from exc


def question_id(call_id: str, tries: int, position: int, question: Question) -> str:
    """Return the id of a *question* that the call *call_id* of a step first asks in the try *tries* of its run.

    It belongs to what is asked, so that an answer never counts for something else.
    """
    about = question.arguments
    asked = [question.question, question.schema, None if isinstance(about, UnsetType) else msgspec.json.decode(about)]
    digest = hashlib.sha256(msgspec.json.encode(asked, order="deterministic")).hexdigest()[:DIGEST_CHARS]
    return f"{call_id}{ASKED}{tries}.{position}.{digest}"


def asking_call(question_id: str) -> str:
    """Return the id of the call that asks a question. Earlier versions gave both the same id."""
    return question_id.partition(ASKED)[0]


def place_of(question_id: str) -> tuple[str, str]:
    """Return what only questions have in common of which one replaces the other: the call, and its step."""
    call_id, _, asked = question_id.partition(ASKED)
    return call_id, asked.partition(".")[2].partition(".")[0]


def try_of(question_id: str) -> int | None:
    """Return the try in which a question was first asked; None if an earlier version has asked it."""
    number = question_id.partition(ASKED)[2].partition(".")[0]
    return int(number) if number.isdecimal() else None


def _as_declared(function: Callable[..., Any], arguments: bytes, hints: Mapping[str, Any]) -> bytes:
    """Return *arguments* as their declared types read them, so that ``9`` and ``9.0`` are one ``float``."""
    types = {name: type_ for name, type_ in hints.items() if type_ not in _PLAIN}
    if not types or arguments == b"{}":
        return arguments
    values = msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    for name in values.keys() & types.keys():
        type_ = types[name]
        if bytes(values[name])[:1] in (b"[", b"{"):  # a signature takes longer than the rest
            type_ = _type_of(inspect.signature(function).parameters[name].kind, type_)
        try:
            value = msgspec.json.decode(values[name], type=type_, dec_hook=from_json)
            read = msgspec.json.encode(value, order="deterministic", enc_hook=to_json)
        except Exception:  # it does not match, or the type cannot be read, or any code of the type has run
            continue
        if _has_all(msgspec.json.decode(read), msgspec.json.decode(values[name])):
            values[name] = msgspec.Raw(read)
    return msgspec.json.encode(values, order="deterministic")


def _type_of(kind: Any, annotation: Any) -> Any:
    """Return the type of a parameter, which may be one for all other arguments: ``*args`` or ``**kwargs``."""
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return list[annotation]
    return dict[str, annotation] if kind is inspect.Parameter.VAR_KEYWORD else annotation


def _has_all(read: Any, given: Any) -> bool:
    """Whether *read* has all members of *given*: a base class does not read those of a subclass."""
    if isinstance(given, dict) and isinstance(read, dict):
        return all(name in read and _has_all(read[name], value) for name, value in given.items())
    if isinstance(given, list) and isinstance(read, list):
        return len(read) == len(given) and all(map(_has_all, read, given))
    return True


class Newest(NamedTuple):
    """The newest run of a session that a caller knows, or "", and whether another run replaces it."""

    run_id: str
    is_replaced: bool

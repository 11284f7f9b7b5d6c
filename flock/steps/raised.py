"""Exceptions of calls: stored with the call, and raised again when its step runs again."""

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import msgspec

from flock.errors import CallError, CostLimit, EngineStopped, OwnershipLost, StoreError, TooManyTokens, cut
from flock.runs import Call, safe_text
from flock.runs.records import Raised

logger = logging.getLogger("flock.runs")

#: A longer exception, as JSON, is raised again as a ``CallError``.
MAX_RAISED_BYTES = 64 * 1024
_named = WeakSet[type[BaseException]]()


class Refused(CallError):
    """The engine does not make or store a call: the limit of calls or bytes is reached, or the step has ended."""


def is_refused(exc: BaseException) -> bool:
    """Whether the engine, and not the function of a call, is why it raised *exc*. The call is then executed again."""
    refusals = (CostLimit, EngineStopped, OwnershipLost, Refused, StoreError, TooManyTokens)
    return any(isinstance(each, refusals) for each in _causes(exc))


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield *exc*, the members of groups, and their causes, each once."""
    found, left = set[int](), [exc]
    while left:
        each = left.pop()
        if id(each) not in found:
            found.add(id(each))
            yield each
            left += [cause for cause in (each.__cause__, each.__context__) if cause is not None]
            left += each.exceptions if isinstance(each, BaseExceptionGroup) else ()


def raised_by(label: str, exc: Exception) -> Raised:
    """Return *exc* as it is stored. Warn, once for each class, if an equal exception cannot be made from that."""
    try:
        raised = _stored(exc)
        again = _made_from(msgspec.json.decode(msgspec.json.encode(raised), type=Raised))
        if _is_equal(again, exc) and len(msgspec.json.encode(raised)) <= MAX_RAISED_BYTES:
            return raised
    except Exception:  # any code of the class may have run
        pass
    if type(exc) not in _named:
        _named.add(type(exc))
        template = "call %s: if its step runs again, it raises a CallError, because a %s cannot be made from JSON"
        logger.warning(template, label, type(exc).__qualname__)
    return Raised(module="", name="", args=msgspec.Raw(msgspec.json.encode([cut(safe_text(exc))])))


def exception_of(call: Call) -> Exception:
    """Return an exception equal to the one that *call* has raised, or a CallError with its text."""
    assert call.raised is not None
    if call.raised.name:
        try:
            return _made_from(call.raised)
        except Exception:  # its class is gone, or has changed
            logger.warning("call %s: the %s that it has raised cannot be made", call.call_id, call.raised.name)
    shown = call.error or ""
    # The arguments of a class that is gone may be anything, and earlier versions have stored none without a class.
    args = [] if call.raised.name else msgspec.json.decode(call.raised.args)
    exc = CallError(args[0] if args else shown)
    exc.shown = shown
    return exc


def _stored(exc: BaseException) -> Raised:
    members = exc.exceptions if isinstance(exc, BaseExceptionGroup) else ()
    args = exc.args[:1] if members else OSError.__reduce__(exc)[1] if isinstance(exc, OSError) else exc.args
    return Raised(
        module=_name_of_main() if type(exc).__module__ == "__main__" else type(exc).__module__,
        name=type(exc).__qualname__,
        args=msgspec.Raw(msgspec.json.encode(args)),
        attributes=msgspec.Raw(msgspec.json.encode({k: value for k, value in vars(exc).items() if _is_json(value)})),
        exceptions=tuple(map(_stored, members)),
    )


def _is_json(value: Any) -> bool:
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except Exception:  # not only of msgspec: a value may compare itself
        return False


def _made_from(raised: Raised) -> Exception:
    """Return a new exception. Raises any exception if it cannot be made."""
    cls = _class_of(raised)
    args = msgspec.json.decode(raised.args)
    if raised.exceptions:
        args.append([_made_from(each) for each in raised.exceptions])
    exc = cls.__new__(cls, *args)
    vars(exc).update(msgspec.json.decode(raised.attributes))
    return exc


def _class_of(raised: Raised) -> type[Exception]:
    """Find a class in its module. Raises AttributeError, ImportError, TypeError."""
    found: Any = sys.modules["__main__"] if raised.module == _name_of_main() else importlib.import_module(raised.module)
    for part in raised.name.split("."):
        found = getattr(found, part)
    if not issubclass(found, Exception):
        raise TypeError(f"{raised.name} is no exception")
    return cast(type[Exception], found)


def _name_of_main() -> str:
    """Return the name by which other processes import the module that Python has started in this one."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return str(spec.name)
    return Path(getattr(main, "__file__", None) or "__main__").stem


def _is_equal(one: BaseException, other: BaseException) -> bool:
    if isinstance(one, BaseExceptionGroup) and isinstance(other, BaseExceptionGroup):
        is_like = one.message == other.message and len(one.exceptions) == len(other.exceptions)
        return type(one) is type(other) and is_like and all(map(_is_equal, one.exceptions, other.exceptions))
    return type(one) is type(other) and one.args == other.args and str(one) == str(other)

"""A call of a function, as the journal needs it: its options, arguments and types."""

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
from msgspec.structs import replace

from flock.agents.signature import hints_of_function, is_context
from flock.errors import CallError, SignatureError
from flock.pydanticmodel import from_json
from flock.runs import JSON_NULL, RunContext
from flock.runs.context import CallOptions
from flock.steps.identity import NAME, json_of

#: Signatures and types that a step has read. It keeps them no longer, since they may keep what they were read from.
Signatures = WeakKeyDictionary[FunctionType, tuple[inspect.Signature | None, dict[str, Any]]]


def with_context(
    context: RunContext,
    function: Callable[..., Any],
    hints: Mapping[str, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the arguments, and the context for the parameter that is annotated with it."""
    name = next((name for name, hint in hints.items() if is_context(hint)), None)
    if name is None or any(isinstance(value, RunContext) for value in (*args, *kwargs.values())):
        return args, kwargs
    index = list(_parameters(function)).index(name)
    if index <= len(args) and _parameters(function)[name].kind is not inspect.Parameter.KEYWORD_ONLY:
        return (*args[:index], context, *args[index:]), kwargs
    return args, {**kwargs, name: context}


def check_name(label: str, name: str | None) -> None:
    if name is not None and not re.fullmatch(NAME, name):
        raise CallError(
            f"{name!r} is not a valid name for a call of {label!r}. Use 1 to 128 letters, digits, '_', '-' and '.'."
        )


def checked_options(
    label: str, function: Callable[..., Any], kwargs: Mapping[str, Any], options: CallOptions
) -> tuple[CallOptions, Mapping[str, Any]]:
    """Return the options of a call, and its other keyword arguments. Raises CallError if it cannot be identified."""
    if not callable(function) or inspect.isclass(function):
        raise CallError(f"{function!r} is not a function. Call a function, a method, or an object that can be called.")
    if earlier := kwargs.keys() & {"name", "keep"}:
        earlier -= _parameters(function).keys()
        options = replace(options, **{key: kwargs[key] for key in earlier})
        kwargs = {key: value for key, value in kwargs.items() if key not in earlier}
    if options.name is None and getattr(function, "__name__", "") == "<lambda>":
        raise CallError("A lambda has no name that identifies its call. Use a named function, or pass call_name=.")
    if options.timeout_s is not None and not options.timeout_s > 0:
        raise CallError(f"call_timeout_s of {label!r} must be above 0 seconds, not {options.timeout_s}.")
    if options.retries < 0:
        raise CallError(f"call_retries of {label!r} must be 0 or more, not {options.retries}.")
    if options.retries and options.once:
        raise CallError(f"{label!r} is executed at most once (call_once), so omit call_retries.")
    return options, kwargs


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    signature = _read_signature(function)
    return {} if signature is None else signature.parameters


def arguments_of(
    label: str, signature: inspect.Signature | None, args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None
) -> msgspec.Raw:
    """Return the arguments by name, as JSON, without the context; null if they cannot be JSON and need not be."""
    check_name(label, name)
    given: dict[str, Any] = {"args": args, "kwargs": kwargs}
    with contextlib.suppress(TypeError):  # the call will raise the same error
        given = given if signature is None else signature.bind_partial(*args, **kwargs).arguments
    given = {key: value for key, value in given.items() if not isinstance(value, RunContext)}
    try:
        return json_of(label, "arguments", given)
    except CallError:
        if name is None:
            raise
        return JSON_NULL


def signature_of(
    label: str, function: Callable[..., Any], known: Signatures
) -> tuple[inspect.Signature | None, dict[str, Any]]:
    """Return the signature of a function, None for some built-in ones, and the types of its parameters by name.

    Raises: CallError.
    """
    found = known.get(function) if isinstance(function, FunctionType) else None
    if found is None:
        found = _read_signature(function), _read_hints(label, function)
        if isinstance(function, FunctionType):
            known[function] = found
    return found


def _read_signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):  # a built-in
        return None


def _read_hints(label: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return hints_of_function(function)
    except (SignatureError, TypeError) as exc:
        raise CallError(f"The return type of the call {label!r} is unknown: {exc}.") from exc


def decoded(label: str, result_type: Any, result: msgspec.Raw) -> Any:
    """Return *result* as it is returned after a crash, also the first time, so that both ways behave alike."""
    try:
        return msgspec.json.decode(result, type=result_type, dec_hook=from_json)
    except (msgspec.ValidationError, TypeError) as exc:
        raise CallError(f"The result of the call {label!r} does not match its return type: {exc}.") from exc

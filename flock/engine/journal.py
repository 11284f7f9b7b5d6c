"""The journal of one step: the calls that it has finished.

A call is executed once. Its result is on disk before the step continues, so that a step that runs again after a crash
reads the result. If a call is cancelled, or the process dies, before its result is on disk, it has no entry and is
executed again.
"""

import functools
import hashlib
import inspect
import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import msgspec

from flock.agents.signature import context_parameter, hints_of_function, name_of
from flock.engine.outcomes import error_of
from flock.errors import CallError, SignatureError, cut
from flock.pydanticmodel import from_json, to_json, to_json_and_back
from flock.runs import CURRENT_CALL, Call, RunContext, now

__all__ = ["Journal"]

logger = logging.getLogger("flock.runs")

#: A name that a program gives to a call. It becomes a part of the call's id, and so of URLs.
NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
DIGEST_CHARS = 16
#: Between the id of a call and that of a call that it makes.
NESTED = "~"
_LATE = "The call {!r} was made after its step had ended. Await it in the step."


class Journal:
    """The calls of one turn.

    Args:
        finished: the calls that earlier turns of the same step have finished.
        save: stores a call; on return it is on disk.
        call_in_thread: calls a synchronous function in a worker thread.
        max_calls: max calls of the step.
        max_result_bytes: max size of one result, as JSON.
        max_total_bytes: max size of all arguments and results together, as JSON.
        expose_errors: whether the text of any exception is stored with a failed call.
    """

    def __init__(
        self,
        finished: Iterable[Call],
        *,
        save: Callable[[Call], Awaitable[None]],
        call_in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        max_calls: int,
        max_result_bytes: float,
        max_total_bytes: float,
        expose_errors: bool,
    ) -> None:
        self._finished = {call.call_id: call for call in finished if call.error is None}
        self._save = save
        self._call_in_thread = call_in_thread
        self._max_calls = max_calls
        self._max_result_bytes = max_result_bytes
        self._bytes_left = max_total_bytes - sum(map(_bytes_of, self._finished.values()))
        self._expose_errors = expose_errors
        self._call_count = 0
        #: the numbers of calls that run or have finished, for each key
        self._numbers: defaultdict[str, set[int]] = defaultdict(set)
        self._is_closed = False
        self._save_error: BaseException | None = None

    def close(self) -> Sequence[str]:
        """Accept no more calls. Returns the ids of finished calls that this turn has not repeated."""
        self._is_closed = True
        return [call_id for call_id in self._finished if NESTED not in call_id]

    def call(
        self,
        context: RunContext,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        name: str | None,
    ) -> Awaitable[Any]:
        """See ``RunContext.call``. Equal calls are numbered here, before any of them can wait."""
        try:
            anyio.lowlevel.current_token()
        except RuntimeError as exc:  # in a worker thread
            raise CallError(f"{context.agent_name!r} is not async, so it cannot make calls. Make it async.") from exc
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", name_of(function))
        _check_callable(label, function, name)
        arguments = _arguments(label, function, args, kwargs, name)
        self._check_size(label, "arguments", arguments)
        parent = CURRENT_CALL.get()
        key = f"{label}:{name or _digest(label, function, arguments)}"
        return self._run(label, f"{parent}{NESTED}{key}" if parent else key, arguments, context, function, args, kwargs)

    def _run(
        self,
        label: str,
        key: str,
        arguments: msgspec.Raw | None,
        context: RunContext,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Awaitable[Any]:
        number = self._take_number(label, key)
        call_id = key if number == 1 else f"{key}:{number}"

        async def run() -> Any:
            is_done = False
            try:
                if self._is_closed:
                    raise CallError(_LATE.format(label))
                result_type = _result_type(label, function)
                finished = self._finished.pop(call_id, None)
                if finished is not None and finished.result is not None:
                    is_done = True
                    return _decode(label, finished.result, result_type)
                value = await self._make(label, call_id, arguments, result_type, context, function, args, kwargs)
                is_done = True
                return value
            finally:
                if not is_done:  # the next equal call takes its place, also when the step runs again
                    self._numbers[key].discard(number)

        return run()

    def _take_number(self, label: str, key: str) -> int:
        """Return the number of a call among the equal ones that run or have finished, from 1."""
        if self._save_error is not None:
            raise self._save_error
        if self._is_closed:
            raise CallError(_LATE.format(label))
        if self._call_count >= self._max_calls:
            raise CallError(f"The step has made {self._max_calls} calls, the limit (max_calls). Split it into steps.")
        self._call_count += 1
        numbers = self._numbers[key]
        number = next(n for n in itertools.count(1) if n not in numbers)
        numbers.add(number)
        return number

    async def _make(
        self,
        label: str,
        call_id: str,
        arguments: msgspec.Raw | None,
        result_type: Any,
        context: RunContext,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Execute a call, and store it."""
        started_at = now()

        def entry(**end: Any) -> Call:
            return Call(call_id=call_id, name=label, arguments=arguments, started_at=started_at, **end)

        reset = CURRENT_CALL.set(call_id)
        try:
            result = self._encode(label, await self._execute(context, function, args, kwargs))
            value = _decode(label, result, result_type)
        except Exception as exc:
            error, error_type = error_of(exc, f"The call {label!r}", expose_errors=self._expose_errors)
            await self._store(entry(error=cut(error), error_type=error_type, completed_at=now()))
            raise
        finally:
            CURRENT_CALL.reset(reset)
        await self._store(entry(result=result, completed_at=now()))
        return value

    async def _execute(
        self, context: RunContext, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        parameter = context_parameter(function)
        if parameter is not None and not any(value is context for value in (*args, *kwargs.values())):
            kwargs = {parameter: context, **kwargs}
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            return await function(*args, **kwargs)
        value = await self._call_in_thread(functools.partial(function, *args, **kwargs))
        return await value if inspect.isawaitable(value) else value

    def _encode(self, label: str, value: Any) -> msgspec.Raw:
        try:
            result = msgspec.json.encode(value, enc_hook=to_json_and_back)
        except (TypeError, ValueError, OverflowError, RecursionError) as exc:
            raise CallError(f"The result of the call {label!r} cannot be converted to JSON: {exc}.") from exc
        self._check_size(label, "result", result)
        return msgspec.Raw(result)

    def _check_size(self, label: str, part: str, content: bytes | msgspec.Raw | None) -> None:
        if content is not None and len(content) > self._max_result_bytes:
            raise CallError(
                f"The {part} of the call {label!r} has {len(content)} bytes, more than the maximum "
                f"({self._max_result_bytes}, max_result_bytes). Use a reference to long values instead."
            )

    async def _store(self, call: Call) -> None:
        self._bytes_left -= _bytes_of(call)
        if self._bytes_left < 0:
            raise CallError(
                f"The arguments and results of the step's calls are larger than the cluster can store. The call "
                f"{call.name!r} has {_bytes_of(call)} bytes of them. Return references to long results instead."
            )
        if self._is_closed:
            return
        try:
            with anyio.CancelScope(shield=True):  # it is done, so it must not be executed again
                await self._save(call)
        except Exception as exc:
            self._save_error = exc
            raise


def _bytes_of(call: Call) -> int:
    return len(call.arguments or b"") + len(call.result or b"")


def _check_callable(label: str, function: Callable[..., Any], name: str | None) -> None:
    """Raise CallError if *function* cannot be identified, or is not a function."""
    if not callable(function) or inspect.isclass(function):
        raise CallError(f"{function!r} is not a function. Call a function, a method, or an object that can be called.")
    if name is None and getattr(function, "__name__", "") == "<lambda>":
        raise CallError("A lambda has no name that identifies its call. Use a named function, or pass name=.")
    if name is not None and "name" in _parameters(function):
        raise CallError(
            f"{label!r} has a parameter 'name', which cannot be passed here, since name= identifies the call. Use "
            f"functools.partial({label}, name=…)."
        )


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # a built-in without a signature
        return {}


def _digest(label: str, function: Callable[..., Any], arguments: msgspec.Raw | None) -> str:
    """Return what identifies a call: its function, what a partial or a method is bound to, and its arguments."""
    bound: list[Any] = []
    while isinstance(function, functools.partial):
        bound += [function.args, function.keywords]
        function = function.func
    owner = getattr(function, "__self__", None)
    bound_json = _json(label, "object or the bound arguments", [bound, None if inspect.ismodule(owner) else owner])
    of = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return hashlib.sha256(b"\0".join([of.encode(), bound_json, arguments or b""])).hexdigest()[:DIGEST_CHARS]


def _arguments(
    label: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None
) -> msgspec.Raw | None:
    """Return the arguments by name, as JSON, without the context; None if they cannot be JSON and need not be."""
    if name is not None and not NAME.fullmatch(name):
        raise CallError(
            f"{name!r} is not a valid name for a call of {label!r}. Use 1 to 128 letters, digits, '_', '-' and '.'."
        )
    try:
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    except (TypeError, ValueError):  # no signature, or the call will raise the same error
        given = {"args": args, "kwargs": kwargs}
    given = {key: value for key, value in given.items() if not isinstance(value, RunContext)}
    try:
        return _json(label, "arguments", given)
    except CallError:
        if name is None:
            raise
        return None


def _json(label: str, part: str, value: Any) -> msgspec.Raw:
    try:
        return msgspec.Raw(msgspec.json.encode(value, order="deterministic", enc_hook=to_json))
    except (TypeError, ValueError, OverflowError, RecursionError) as exc:
        raise CallError(
            f"The {part} of the call {label!r} cannot be converted to JSON: {exc}. Pass name= to identify the call "
            "without them."
        ) from exc


def _result_type(label: str, function: Callable[..., Any]) -> Any:
    try:
        return hints_of_function(function).get("return", Any)
    except (SignatureError, TypeError) as exc:
        raise CallError(f"The return type of the call {label!r} is unknown: {exc}.") from exc


def _decode(label: str, result: msgspec.Raw, result_type: Any) -> Any:
    """Return *result* as it is returned after a crash, also the first time, so that both ways behave alike."""
    try:
        return msgspec.json.decode(result, type=result_type, dec_hook=from_json)
    except (msgspec.ValidationError, TypeError) as exc:
        raise CallError(f"The result of the call {label!r} does not match its return type: {exc}.") from exc

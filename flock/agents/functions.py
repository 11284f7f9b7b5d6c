"""Functions of a program that an agent with a model calls beside its tools, such as ``validate=``."""

import functools
import inspect
import logging
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, TypeVar

import anyio
import msgspec

from flock.agents.signature import called, context_parameter, is_async, is_generator
from flock.errors import CallError, DefinitionError
from flock.runs import JSON_NULL, RunContext
from flock.scopes import move_on_after_working

T = TypeVar("T")

logger = logging.getLogger("flock.runs")

#: A function that occupies the event loop for longer is warned of, in seconds.
BLOCKING_S = 0.1


class OwnFunction:
    """A function that is an option of an agent. It is async, or runs in a worker thread.

    Args:
        option: its name with its owner, such as ``validate= of 'writer'``.
        function: it may have one more parameter for the context, which has a type or is the last one.
        count: how many arguments it receives.

    Raises: DefinitionError if it is not such a function.
    """

    def __init__(self, option: str, function: Any, count: int) -> None:
        if not callable(function) or inspect.isclass(function) or is_generator(function):
            raise DefinitionError(f"{option} must be a function, not {function!r}.")
        self.option, self.function = option, function
        self._context = context_parameter(function)
        self._adds_context = self._context is None and not _accepts(function, count)
        if self._adds_context and not _accepts(function, count + 1):
            what = f"{count} argument{'s'[: count - 1]}, and optionally the context" if count else "the context"
            raise DefinitionError(f"{option} must be a function of {what}.")

    async def call(
        self, *args: Any, context: RunContext, call_in_thread: Callable[..., Awaitable[Any]], timeout_s: float
    ) -> Any:
        """Call the function, with the context if it has a parameter for it.

        Raises: CallError if it does not end within *timeout_s*; any exception of the function.
        Cancellation: a coroutine is cancelled. A thread runs to its end first, or until the timeout.
        """
        call = self.bound(*args, context=context)
        with move_on_after_working(timeout_s):
            if is_async(call):
                return await watched(call(), self.option)
            return await called(call, call_in_thread, anyio.current_effective_deadline())
        raise CallError(f"{self.option} did not end within {timeout_s:g} s (tool_timeout_s).")

    def bound(self, *args: Any, context: RunContext) -> Callable[[], Any]:
        """Return the function with its arguments, and with the context if it has a parameter for it."""
        options = {} if self._context is None else {self._context: context}
        return functools.partial(self.function, *args, *([context] if self._adds_context else []), **options)


async def stored_call(
    context: RunContext, label: str, key: str, execute: Callable[[], Awaitable[T]], type_: type[T], **options: Any
) -> T:
    """Make a call of the step, of a function by default, without its arguments; see ``StepJournal.once``.

    Args:
        type_: of its result.
    """
    options = {"kind": "function", "arguments": JSON_NULL, **options}
    decode = functools.partial(msgspec.json.decode, type=type_)
    result: T = await context.journal.once(label, key, execute, decode=decode, **options)
    return result


@types.coroutine
def watched(coroutine: Coroutine[Any, Any, Any], option: str) -> Generator[Any, Any, Any]:
    """Await *coroutine*, and log a WARNING whenever it has blocked the event loop."""
    resume: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        began = time.perf_counter()
        try:
            awaited = resume(value)
        except StopIteration as end:
            return end.value
        finally:
            value = None  # the traceback of an exception refers to this frame
            if (took_s := time.perf_counter() - began) > BLOCKING_S:
                logger.warning("%s has blocked the event loop for %.1f s. Await asyncio.to_thread(…).", option, took_s)
        try:
            value, resume = (yield awaited), coroutine.send
        except BaseException as exc:  # such as a cancellation
            value, resume = exc, coroutine.throw


def _accepts(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return True
    return True

"""Functions of a program that an agent with a model calls beside its tools, such as ``validate=``."""

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import anyio

from flock.agents.signature import called, context_parameter, is_generator
from flock.errors import CallError, DefinitionError
from flock.runs import RunContext
from flock.scopes import move_on_after_working


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
        options = {} if self._context is None else {self._context: context}
        call = functools.partial(self.function, *args, *([context] if self._adds_context else []), **options)
        with move_on_after_working(timeout_s):
            return await called(call, call_in_thread, anyio.current_effective_deadline())
        raise CallError(f"{self.option} did not end within {timeout_s:g} s (tool_timeout_s).")


def _accepts(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # a built-in without a signature
        return True
    return True

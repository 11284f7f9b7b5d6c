"""Tasks in an empty context, and the cancel scopes of a task that runs code of a user."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any

import anyio
from anyio.abc import TaskGroup

__all__ = ["closing_scopes", "current_task", "set_deadline", "start_in_empty_context"]

logger = logging.getLogger("flock.runs")


def current_task() -> "asyncio.Task[Any] | None":
    """Return the current asyncio task, or None on another event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def start_in_empty_context(tasks: TaskGroup, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
    """Start a task that does not see the context variables of its caller, and does not keep them alive."""
    Context().run(tasks.start_soon, function, *args)


def set_deadline(scope: anyio.CancelScope, deadline: float) -> None:
    """Set the deadline of a scope that was entered, in an empty context.

    asyncio keeps a timer and its context, with the objects of a request, until the deadline, even if it is cancelled.
    """
    Context().run(setattr, scope, "deadline", deadline)


@contextlib.contextmanager
def closing_scopes(agent_name: str) -> Iterator[None]:
    """Close the cancel scopes that the block has entered and not left, and cancel their task groups.

    An abandoned async generator leaves one open, or an ``AsyncExitStack`` that nobody closes. anyio then refuses to
    leave the scopes around it, which ends the engine. It has no public way to find them. On trio nothing is closed.
    """
    before = _current_scope()
    try:
        yield
    finally:
        if before is not None and (left_open := _scopes_above(before)):
            logger.warning("agent %s left %d cancel scopes or task groups open", agent_name, len(left_open))
            for scope in left_open:
                scope.cancel()
                scope.__exit__(None, None, None)


def _current_scope() -> Any:
    task, states = current_task(), getattr(sys.modules.get("anyio._backends._asyncio"), "_task_states", {})
    return None if task is None else getattr(states.get(task), "cancel_scope", None)


def _scopes_above(before: Any) -> list[Any]:
    """Return the scopes between the current one and *before*, innermost first; none if *before* was left too."""
    found, scope = [], _current_scope()
    while scope is not None and scope is not before:
        found.append(scope)
        scope = getattr(scope, "_parent_scope", None)
    return found if scope is before else []

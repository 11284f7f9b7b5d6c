"""What the agents of a flock share: its state."""

from contextlib import AsyncExitStack
from typing import Any, Self

from flock.agents.signature import is_generator
from flock.errors import CallError, DefinitionError, EngineStopped


class Shared:
    """What the agents of a flock share.

    Args:
        state: see ``Flock``.

    Raises: DefinitionError if *state* is a generator, and not a context manager.
    """

    def __init__(self, state: Any = None) -> None:
        if callable(state) and is_generator(state):
            raise DefinitionError(f"state= is a generator, {state!r}. Decorate it with @asynccontextmanager.")
        self.state = state


class State:
    """The state of a flock in one engine or worker, which enters it as a context manager. It is never stored."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._value: Any = None
        self._is_open = False
        self._exit = AsyncExitStack()

    @property
    def value(self) -> Any:
        """Raises: CallError if the flock has no state; EngineStopped if the engine has ended."""
        if self._shared.state is None:
            raise CallError("This flock has no state. Pass Flock(state=…).")
        if not self._is_open:
            raise EngineStopped("The state of the flock is closed, because its engine has ended.")
        return self._value

    async def __aenter__(self) -> Self:
        value = self._shared.state
        if callable(value):
            manager = value()
            if not hasattr(type(manager), "__aenter__"):
                raise DefinitionError(
                    f"state= must be a value, or a function that returns an async context manager, not "
                    f"{type(manager).__name__}. Decorate it with @asynccontextmanager."
                )
            value = await self._exit.enter_async_context(manager)
        self._value, self._is_open = value, True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._value, self._is_open = None, False
        await self._exit.aclose()

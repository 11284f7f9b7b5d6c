"""Old names of options, which still work."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[F], F]:
    """Let a function also take options under their old names, with a warning: ``@renamed(old="new")``.

    It raises TypeError if an option has both names. A coroutine function remains one.
    """

    def with_new_names(options: dict[str, Any]) -> dict[str, Any]:
        for old in names.keys() & options:
            if names[old] in options:
                raise TypeError(f"{old}= is the old name of {names[old]}=. Pass only {names[old]}=.")
            text = f"{old}= is called {names[old]}= now, and the old name will be removed."
            warnings.warn(text, DeprecationWarning, stacklevel=3)
            options[names[old]] = options.pop(old)
        return options

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **with_new_names(options))

        @functools.wraps(function)
        async def call_async(*args: Any, **options: Any) -> Any:
            return await function(*args, **with_new_names(options))

        return cast(F, call_async if inspect.iscoroutinefunction(function) else call)

    return decorate

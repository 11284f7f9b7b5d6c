"""Old names of options, which still work."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def with_new_names(names: Mapping[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a function, whose caller is warned of old *names*. Raises TypeError if one has both."""
    for old in names.keys() & options:
        if names[old] in options:
            raise TypeError(f"{old}= is the old name of {names[old]}=. Pass only {names[old]}=.")
        text = f"{old}= is called {names[old]}= now, and the old name will be removed."
        warnings.warn(text, DeprecationWarning, stacklevel=3)
        options[names[old]] = options.pop(old)
    return options


def renamed(**names: str) -> Callable[[F], F]:
    """Let a function also take options under their old names: ``@renamed(old="new")``. A coroutine remains one."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **with_new_names(names, options))

        @functools.wraps(function)
        async def call_async(*args: Any, **options: Any) -> Any:
            return await function(*args, **with_new_names(names, options))

        return cast(F, call_async if inspect.iscoroutinefunction(function) else call)

    return decorate

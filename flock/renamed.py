"""Old names of options, which still work."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[F], F]:
    """Let a function also take options under their old names, with a warning: ``@renamed(old="new")``."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for old in names.keys() & options:
                text = f"{old}= is called {names[old]}= now, and the old name will be removed."
                warnings.warn(text, DeprecationWarning, stacklevel=2)
                options[names[old]] = options.pop(old)
            return function(*args, **options)

        return cast(F, call)

    return decorate

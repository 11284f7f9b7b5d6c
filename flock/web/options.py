"""What the options of ``create_app`` may be, and how that is said if one is something else."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from flock.errors import MAX_ECHOED_CHARS, DefinitionError

__all__ = ["OPTIONS", "check_options", "is_host_name"]

#: Says whether a value is valid, and in words what is.
Option = tuple[Callable[[Any], bool], str]


def _of_type(type_: Any, words: str) -> Option:
    return lambda value: isinstance(value, type_), words


def _whole(least: int) -> Option:
    words = f"a whole number of at least {least}"
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least, words


def _or_none(is_valid: Callable[[Any], bool], words: str) -> Option:
    return lambda value: value is None or is_valid(value), f"{words}, or None"


def _many(is_valid: Callable[[Any], bool], words: str) -> Option:
    """A list or the like, and not one text, which has letters for its members."""
    return (
        lambda value: isinstance(value, Collection) and not isinstance(value, str) and all(map(is_valid, value)),
        words,
    )


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_host_name(value: Any) -> bool:
    """Whether *value* may stand in ``Host``, before the port."""
    return isinstance(value, str) and re.fullmatch(r"\[[\da-fA-F:.]+\]|[^\s:/\[\]]+", value) is not None


def _names_keys(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, [*value, *value.values()]))


FLAG = _of_type(bool, "True or False")
PATH = _of_type(str | Path, "the path of a file or folder")

OPTIONS: Mapping[str, Option] = {
    "flock": (lambda value: hasattr(value, "shared_engine"), "a Flock"),
    "server_name": _of_type(str, "a text"),
    "engine": _or_none(lambda value: hasattr(value, "submit_batch"), "an engine, such as flock.engine()"),
    "store": PATH,
    "max_body_bytes": _whole(1),
    "max_upload_bytes": _whole(1),
    "max_json_depth": _whole(1),
    "max_header_bytes": _whole(1),
    "body_timeout_s": (_is_time, "a number of seconds above 0"),
    "csv_dir": _or_none(*PATH),
    "max_wait_s": _whole(0),
    "max_event_streams": _whole(0),
    "max_uploads_per_principal": _whole(0),
    "max_downloads_per_principal": _whole(0),
    "max_requests_per_minute": _or_none(*_whole(1)),
    "on_disconnect": (lambda value: value in ("cancel", "continue"), '"cancel" or "continue"'),
    "expose_errors": FLAG,
    "routes": _many(lambda value: hasattr(value, "matches"), "a list of Starlette routes"),
    "openapi_paths": _or_none(*_of_type(Mapping, "a mapping of paths, as in OpenAPI")),
    "api_keys": _or_none(_names_keys, "a mapping of names to keys, all of them texts"),
    "auth": _or_none(
        lambda value: callable(value) or value in ("host", "anybody"),
        'a function of the connection that returns a Principal or None, "host" if the host lets only its users in, or '
        '"anybody" if everybody who can connect may call it',
    ),
    "allowed_hosts": _or_none(
        *_many(is_host_name, 'a list of host names without scheme and port, such as ["agents.example"]')
    ),
    "cors_origins": _many(_is_text, 'a list of origins, such as ["https://agents.example"]'),
    "middleware": _many(lambda value: hasattr(value, "cls"), "a list of starlette.middleware.Middleware"),
    "exception_handlers": _or_none(*_of_type(Mapping, "a mapping of exception classes or status codes to functions")),
    "lifespan": _or_none(callable, "a function of the app that returns an async context manager"),
    "docs": _or_none(*FLAG),
    "create_ui": FLAG,
    "metrics": _or_none(*FLAG),
}


def check_options(given: Mapping[str, Any]) -> None:
    """Raise DefinitionError for the first of ``OPTIONS`` that is not valid in *given*; API keys are not shown."""
    for name, (is_valid, words) in OPTIONS.items():
        value = given[name]
        if not is_valid(value):
            is_shown = isinstance(value, str | int | float) and name != "api_keys"
            got = repr(value)[:MAX_ECHOED_CHARS] if is_shown else f"a value of type {type(value).__name__}"
            raise DefinitionError(f"create_app: {name}= must be {words}, not {got}.")

"""Option structs: each field declares its valid values and its option on the command line."""

import math
import re
from collections.abc import Callable, Collection, Mapping
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec.structs import replace

from flock.errors import MAX_ECHOED_CHARS, DefinitionError
from flock.nearest import did_you_mean

#: Max seconds that an option accepts: about 30 years.
MAX_SECONDS = 1e9


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """The constraints of one field of ``Options``. It is part of the field's type: ``Annotated[int, whole(1)]``.

    Attributes:
        words: the valid values, as described in an error.
        help: help text on the command line; without it, the command line does not offer the option.
        unit: the unit of a number: a count or seconds.
        minimum: the smallest valid count.
        on_cluster: which component enforces the limit if the runs are stored on a Temporal cluster.
        is_secret: whether errors hide the value.
    """

    is_valid: Callable[[Any], bool]
    words: str
    help: str = ""
    unit: Literal["", "N", "SECONDS"] = ""
    minimum: int = 0
    on_cluster: Literal["server", "worker", "cluster", "namespace"] = "server"
    is_secret: bool = False


def whole(minimum: int, help: str = "", **more: Any) -> Option:
    return Option(
        is_valid=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        words=f"a whole number of at least {minimum}",
        help=help,
        unit="N",
        minimum=minimum,
        **more,
    )


def seconds(help: str = "", *, allow_zero: bool = False, **more: Any) -> Option:
    def is_valid(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        return is_number and (0 < value <= MAX_SECONDS or (allow_zero and value == 0))

    words = f"a number of seconds {'from 0 to' if allow_zero else 'above 0 and up to'} {MAX_SECONDS:g}"
    return Option(is_valid=is_valid, words=words, help=help, unit="SECONDS", **more)


def of_type(type_: Any, words: str) -> Option:
    return Option(is_valid=lambda value: isinstance(value, type_), words=words)


def many(is_valid: Callable[[Any], Any], words: str, **more: Any) -> Option:
    """Return an option for a collection of valid values. A string is not one, although it is a collection."""

    def are_valid(value: Any) -> bool:
        return isinstance(value, Collection) and not isinstance(value, str) and all(map(is_valid, value))

    return Option(is_valid=are_valid, words=words, **more)


def _is_address(value: Any) -> bool:
    import httpx  # late, because it takes long and most programs have no address

    try:
        parts = urlsplit(str(value))
        if not parts.hostname or parts.port == 0 or not httpx.URL(str(value)).host:
            return False
    except (ValueError, httpx.InvalidURL):  # such as a bracket that is not closed, or a port that is too high
        return False
    return re.fullmatch(r"https?://[^\s/?#@]+([/?#][!-~]*)?", str(value)) is not None


#: Where webhooks are sent. Only the program's operator sets it, and it may contain a secret.
WEBHOOK_URL = Option(
    is_valid=lambda value: value is None or _is_address(value),
    words="an address that begins with https://, or with http:// if nobody can listen on the way, or None",
    is_secret=True,
)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """A struct that validates its fields when it is created or copied with ``replace``.

    Raises: DefinitionError for the first invalid field.
    """

    #: The name of the function that takes these options, for errors.
    TAKEN_BY: ClassVar[str]

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            if (option := option_of(field)) is not None:
                check(self.TAKEN_BY, field.name, getattr(self, field.name), option)


def option_of(field: msgspec.structs.FieldInfo) -> Option | None:
    """Return the constraints of *field*, or None if it has none. If its type allows None, so does the option."""
    type_, *metadata = get_args(field.type) or (field.type,)
    option = next((entry for entry in metadata if isinstance(entry, Option)), None)
    if option is None or NoneType not in get_args(type_):
        return option
    is_valid = option.is_valid
    return replace(option, is_valid=lambda value: value is None or is_valid(value), words=f"{option.words}, or None")


def check(taken_by: str, name: str, value: Any, option: Option) -> None:
    """Raise DefinitionError if *value* is not valid."""
    if not option.is_valid(value):
        is_shown = isinstance(value, str | int | float) and not option.is_secret
        got = repr(value)[:MAX_ECHOED_CHARS] if is_shown else f"a value of type {type(value).__name__}"
        raise DefinitionError(f"{taken_by}: {name}= must be {option.words}, not {got}.")


T = TypeVar("T", bound=Options)


def replaced(options: T, given: Mapping[str, Any], names: Collection[str] | None = None) -> T:
    """Return a copy of *options* with the *given* keyword arguments of a function applied.

    Args:
        names: the options that the function accepts; None means all of them.

    Raises: TypeError if an option is unknown; DefinitionError if a value is invalid.
    """
    names = options.__struct_fields__ if names is None else names
    for name in given:
        if name not in names:
            hint = did_you_mean(name, names)
            raise TypeError(f"{options.TAKEN_BY} got an unexpected keyword argument {name!r}.{hint}")
    return replace(options, **given)

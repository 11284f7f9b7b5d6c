"""Options of models, as programs pass them."""

from collections.abc import Mapping
from typing import Any

import msgspec

from flock.errors import DefinitionError, InvalidData
from flock.jsontype import JSONType
from flock.nearest import did_you_mean
from flock.runs import ModelOptions

_OPTIONS: JSONType[Any] = JSONType(ModelOptions)


def checked_options(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a copy of options of a model. Raises DefinitionError if they are invalid."""
    if not isinstance(options, Mapping):
        raise DefinitionError(f"{where} must be a mapping such as {{'top_p': 0.5}}, not {options!r}.")
    known = ModelOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        raise DefinitionError(
            f"{where} has an unknown option {unknown[0]!r}.{did_you_mean(str(unknown[0]), known)} Others than "
            f"{', '.join(known)} belong into extra_body."
        )
    try:
        found: dict[str, Any] = _OPTIONS.decode(msgspec.json.encode(options))
    except (TypeError, InvalidData) as exc:
        raise DefinitionError(f"{where} is invalid. {exc}") from exc
    return found

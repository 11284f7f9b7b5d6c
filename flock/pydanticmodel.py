"""Pydantic models in signatures: msgspec's hooks for them, and their JSON Schema.

pydantic is a package of the user's program. It is imported here only to describe a type that is one of its models.
"""

from collections.abc import Sequence
from typing import Any, Literal, Union

import msgspec

from flock.files import File, file_from, is_file

#: "validation" describes what a model is read from, "serialization" what it is written as. They differ, for example, in
#: aliases and computed fields.
SchemaMode = Literal["validation", "serialization"]

#: The prefix of the names of pydantic's definitions. No class name has a hyphen, so they differ from msgspec's.
PREFIX = "pydantic-"
#: If a value has more errors than these, their details are not collected, because that takes long.
MAX_DETAILED_ERRORS = 1000


class InvalidModel(ValueError):
    """A value does not match a model. ``problems`` has the location of each problem in the value, and its text."""

    def __init__(self, problems: Sequence[tuple[Sequence[str | int], str]]) -> None:
        super().__init__(" ".join(text for _, text in problems[:3]))
        self.problems = problems


class KeptModel:
    """An instance among plain values. It is validated and written by pydantic as it is."""

    def __init__(self, model: Any) -> None:
        self.model = model


def is_model(type_: Any) -> bool:
    """Whether *type_* is a class of pydantic models."""
    return isinstance(type_, type) and hasattr(type_, "__pydantic_validator__") and hasattr(type_, "model_dump")


def is_pydantic_dataclass(type_: Any) -> bool:
    """Whether *type_* is a dataclass of pydantic. msgspec would read it without pydantic's validation."""
    return hasattr(type_, "__pydantic_validator__") and not is_model(type_)


def is_pydantic_constraint(note: Any) -> bool:
    """Whether an annotation's *note* is a constraint or a validator for pydantic. msgspec would ignore it."""
    package = type(note).__module__.partition(".")[0]
    return package in ("pydantic", "annotated_types") and bool(getattr(note, "metadata", True))


def has_model_fields(type_: Any) -> bool:
    """Whether *type_* is a class of pydantic models that are JSON objects."""
    return is_model(type_) and not getattr(type_, "__pydantic_root_model__", False)


def from_json(type_: Any, value: Any) -> Any:
    """Validate *value* as a model: msgspec's ``dec_hook``. Raises InvalidModel."""
    if is_file(type_):
        return file_from(type_, value)
    if not is_model(type_):
        return value  # msgspec reports that it is not an instance of the type
    try:
        if isinstance(value, KeptModel):
            return type_.model_validate(value.model)
        return type_.model_validate_json(msgspec.json.encode(value, enc_hook=to_json))
    except ValueError as exc:
        raise InvalidModel(_problems(exc, value)) from None


def to_json(value: Any, **options: bool) -> Any:
    """Return a model as plain values: msgspec's ``enc_hook``. Raises TypeError, ValueError."""
    if isinstance(value, File):
        return value.reference
    model = _model(value)
    try:
        return model.model_dump(mode="json", by_alias=True, warnings="error", **options)
    except ValueError as exc:  # its text contains the value
        raise ValueError(f"a value in the model {type(model).__name__} does not have its declared type") from exc


def to_json_and_back(value: Any) -> Any:
    """Like ``to_json``, but return what the model can be read from again, without computed fields."""
    return to_json(value, round_trip=True)


def keep(value: Any) -> Any:
    """Return a model for ``from_json`` and ``to_json``: an ``enc_hook`` for ``builtin_types=[KeptModel]``."""
    return msgspec.to_builtins(value.reference) if isinstance(value, File) else KeptModel(_model(value))


def _model(value: Any) -> Any:
    model = value.model if isinstance(value, KeptModel) else value
    if not is_model(type(model)):
        raise TypeError(f"Encoding objects of type {type(model).__name__} is unsupported")
    return model


def _problems(exc: Any, value: Any) -> list[tuple[Sequence[str | int], str]]:
    if not hasattr(exc, "error_count"):  # not pydantic's own error
        return [((), f"{exc}.")]
    if exc.error_count() > MAX_DETAILED_ERRORS:
        return [((), f"There are {exc.error_count()} errors in this value.")]
    details = exc.errors(include_url=False, include_context=False, include_input=False)
    return [(_location(detail, value), _text(detail)) for detail in details]


def _location(detail: Any, value: Any) -> list[str | int]:
    """Return where an error is in *value*. pydantic's own location also names the members of unions."""
    location: list[str | int] = []
    is_missing = detail["type"] == "missing"
    for number, part in enumerate(detail["loc"], 1):
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_index or (isinstance(value, dict) and part in value):
            location.append(part)
            value = value[part]
        elif is_missing and number == len(detail["loc"]):
            location.append(part)
    return location


def _text(detail: Any) -> str:
    if detail["type"] == "missing":
        return "This field is required."
    if detail["type"] == "extra_forbidden":
        return "Unknown field."
    text = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return text if text.endswith((".", "!", "?")) else f"{text}."


def model_fields(type_: Any) -> list[dict[str, Any]]:
    """Return the fields of a model, with their names in JSON, as keyword arguments of ``Field``."""
    return [
        {
            "name": _first_name(info.validation_alias or name),
            "type": info.annotation if _is_readable(info.annotation) else Any,
            "description": info.description or "",
            "required": info.is_required(),
            "deprecated": bool(info.deprecated),
        }
        for name, info in type_.model_fields.items()
    ]


def _first_name(alias: Any) -> str:
    """Return the name that pydantic shows in the schema: of the first of several choices, the first step of a path."""
    first = getattr(alias, "choices", [alias])[0]
    return str(getattr(first, "path", [first])[0])


def _is_readable(annotation: Any) -> bool:
    try:
        msgspec.json.Decoder(annotation)
    except TypeError:
        return False
    return True


def model_schemas(models: Sequence[Any], mode: SchemaMode, ref: str) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Return a ``$ref`` to the schema of each model, and all schemas by name.

    Args:
        ref: the prefix of a name in a ``$ref``.

    Raises: TypeError if pydantic cannot describe a model.
    """
    if not models:
        return {}, {}
    from pydantic.json_schema import models_json_schema

    try:
        refs, schema = models_json_schema([(model, mode) for model in models], ref_template=f"{ref}{PREFIX}{{model}}")
    except (RuntimeError, NameError) as exc:  # pydantic's errors in the definition of a model
        raise TypeError(str(exc).split("\n")[0]) from exc
    named = {f"{PREFIX}{name}": definition for name, definition in schema["$defs"].items()}
    return {model: refs[model, mode] for model in models}, named


def union_model(name: str, models: Sequence[Any], field: str, tag: str) -> Any:
    """Return a model with a *field* that is one of *models*, distinguished by their names in the field *tag*."""
    import pydantic

    create: Any = pydantic.create_model
    tagged = [create(model.__name__, __base__=model, **{tag: (Literal[model.__name__], ...)}) for model in models]
    union: Any = Union[tuple(tagged)]  # noqa: UP007 - it is made at run time
    return create(name, **{field: (union, pydantic.Field(discriminator=tag))})

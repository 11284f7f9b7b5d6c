"""Outputs that are one of several types, such as ``Refund | Question``: an agent may ask back instead of answering."""

import types
import typing
from collections.abc import Mapping
from typing import Any, Union

import msgspec

from flock.agents.signature import UNION, Signature
from flock.errors import SignatureError
from flock.jsontype import Field
from flock.pydanticmodel import is_model, union_model

#: The field that has the value, and the one in it that has the name of its type.
RESULT, TAG = "result", "type"


class UnionOutput(Signature):
    """An output with one field ``result``, one of several types, distinguished by name: ``{"type": "Refund"}``.

    Raises: SignatureError if two have the same name, or they are neither all structs nor all pydantic models.
    """

    def __init__(self, union: Any, name: str) -> None:
        members = typing.get_args(union)
        self._names = [getattr(member, "__name__", repr(member)) for member in members]
        if len(set(self._names)) < len(members):
            raise SignatureError(f"Two types in {union} have the same name. Rename one.")
        if all(map(is_model, members)):
            if typed := [member.__name__ for member in members if TAG in member.model_fields]:
                raise SignatureError(f"{typed[0]} has a field {TAG!r}, which has the name of the type here. Rename it.")
            super().__init__([Field.of(RESULT, Any)], union_model(name, members, RESULT, TAG))
            for member in self.schema["properties"][RESULT]["anyOf"]:  # a model writes first what decides on the rest
                member["properties"] = {TAG: member["properties"].pop(TAG), **member["properties"]}
        elif all(isinstance(member, type) and issubclass(member, msgspec.Struct) for member in members):
            super().__init__([Field.of(RESULT, UNION[tuple(map(_tagged, members))])], name=name)
        else:
            raise SignatureError(f"The types in {union} must be structs of msgspec, or models of pydantic.")

    def encode(self, value: Any) -> msgspec.Raw:
        """Also accept an instance of one of the types, without its tag."""
        inner = value if type(value).__name__ in self._names else None
        if inner is not None:
            plain = inner.model_dump(mode="json") if is_model(type(inner)) else msgspec.to_builtins(inner)
            value = {RESULT: {TAG: type(inner).__name__, **plain}}
        return super().encode(value)


def _tagged(struct: type[msgspec.Struct]) -> type[msgspec.Struct]:
    config = struct.__struct_config__
    if config.tag is not None:
        return struct
    if TAG in struct.__struct_fields__ or config.array_like:
        raise SignatureError(
            f"{struct.__name__} needs a tag in a union, and has a field {TAG!r} or is an array. Declare it with "
            f"tag=True, tag_field=…."
        )
    return msgspec.defstruct(struct.__name__, [], bases=(struct,), tag=struct.__name__, tag_field=TAG)


def output_of(source: Any, named: Mapping[str, Any] | None, *, name: str) -> Signature:
    """Return the signature of an output, which may also be a union of types. Raises SignatureError."""
    if typing.get_origin(source) in (Union, types.UnionType):
        return UnionOutput(source, name)
    return Signature.of(source, named, name=name)

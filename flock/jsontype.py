"""JSON in: one type's way from bytes to values, with every place that is wrong.

msgspec decodes fast, and stops at the first error, whose path has lost the keys of dicts. Only when it has failed is
the text looked at once more, field by field, so that a client reads all that is wrong, each with a JSON pointer
(RFC 6901).
"""

import dataclasses
import itertools
import json
import math
import operator
import re
import typing
from typing import Any, Generic, TypeVar

import msgspec

from flock.errors import FieldError, FlockError, InvalidData, MalformedJSON

__all__ = [
    "Field",
    "JSONType",
    "check_depth",
    "escape_pointer",
    "example_for",
    "explain",
    "fields_of",
    "has_fields",
    "hints_of",
    "malformed",
]

T = TypeVar("T")

#: How many unknown fields are told at once.
MAX_ERRORS = 100

#: What values of these types look like, by msgspec's names for them.
EXAMPLES = {
    "datetime": "2026-11-30T14:30:00Z",
    "date": "2026-11-30",
    "time": "14:30:00Z",
    "duration": "PT1H30M",
}
#: What msgspec says where one of them is wanted.
WANTS_TIME = re.compile(
    r"(?:Expected [`'][^`']*\b|Invalid RFC3339 encoded |Invalid ISO8601 |Only units .* ISO8601 )"
    rf"({'|'.join(EXAMPLES)})s?\b"
)

#: A string of JSON, or one that never ends. Nothing in it is read twice, whatever it holds.
STRING = rb'"(?:[^"\\]++|\\.)*+"?'
STRINGS = re.compile(STRING, re.DOTALL)
#: All up to a bracket that is in no string, and the bracket.
TO_BRACKET = rb'(?:%s|[^"\[\]{}])*+[\[\]{}]' % STRING
#: An opening bracket as 1 and a closing one as -1, in signed bytes; and what is neither.
LEVELS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One named value. ``default`` is UNSET where the type's own code makes it, or there is none.

    One that is *deprecated*, as JSON Schema has it, is accepted, and is not named among the known fields.
    """

    name: str
    type: Any = str
    description: str = ""
    required: bool = True
    default: Any = msgspec.UNSET
    deprecated: bool = False

    @classmethod
    def of(cls, name: str, annotation: Any, **more: Any) -> "Field":
        """A field whose description may stand in ``Annotated[T, "…"]`` or in msgspec's ``Meta``."""
        notes = getattr(annotation, "__metadata__", ())
        texts = [note if isinstance(note, str) else getattr(note, "description", None) for note in notes]
        extras = [getattr(note, "extra_json_schema", None) or {} for note in notes]
        if notes and all(isinstance(note, str) for note in notes):
            annotation = annotation.__origin__
        return cls(
            name=name,
            type=annotation,
            description=next((text for text in texts if text), ""),
            deprecated=any(extra.get("deprecated") for extra in extras),
            **more,
        )


def has_fields(type_: Any) -> bool:
    """Whether *type_* is a struct, a dataclass or a TypedDict, and so a JSON object."""
    if not isinstance(type_, type):
        return False
    if issubclass(type_, msgspec.Struct):
        return not type_.__struct_config__.array_like
    return dataclasses.is_dataclass(type_) or typing.is_typeddict(type_)


def fields_of(type_: Any) -> tuple[Field, ...]:
    """The fields of a struct, a dataclass or a TypedDict, under the names that JSON has for them."""
    if issubclass(type_, msgspec.Struct):
        return tuple(Field.of(f.encode_name, f.type, required=f.required) for f in msgspec.structs.fields(type_))
    if dataclasses.is_dataclass(type_):
        hints = typing.get_type_hints(type_, include_extras=True)
        missing = dataclasses.MISSING
        return tuple(
            Field.of(f.name, hints[f.name], required=f.default is missing and f.default_factory is missing)
            for f in dataclasses.fields(type_)
            if f.init
        )
    return tuple(
        Field.of(name, hint, required=name in type_.__required_keys__) for name, hint in hints_of(type_).items()
    )


def hints_of(type_: Any) -> dict[str, Any]:
    """The annotations of a class in the order of declaration, without ``Required[...]`` and ``NotRequired[...]``."""
    hints = typing.get_type_hints(type_, include_extras=True)
    wrappers = (typing.Required, typing.NotRequired)
    return {name: hint.__args__[0] if typing.get_origin(hint) in wrappers else hint for name, hint in hints.items()}


class JSONType(Generic[T]):
    """The way in from JSON for one type with named fields (struct, dataclass or TypedDict)."""

    def __init__(self, type_: type[T]) -> None:
        self.type = type_
        self.fields = fields_of(type_)
        self._decoder = msgspec.json.Decoder(type_)
        config = getattr(type_, "__struct_config__", None)
        self._is_closed = config is not None and config.forbid_unknown_fields
        self._names = {field.name for field in self.fields} | {getattr(config, "tag_field", None)}

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> T:
        """Read *raw*.

        Args:
            at: the JSON pointer of *raw* within what the client sent; all pointers begin with it.

        Raises:
            MalformedJSON: it is not JSON.
            InvalidData: it is JSON, but does not fit.
        """
        try:
            try:
                value = self._decoder.decode(raw)
            except msgspec.ValidationError as exc:
                raise InvalidData(self._explain(bytes(raw), at) or [_field_error(exc, at)]) from exc
            if not self._is_closed and (unknown := self._unknown(raw, at)):
                raise InvalidData(unknown)
            return value
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise malformed(bytes(raw), exc) from exc
        except FlockError:
            raise
        except Exception as exc:  # a list within a set cannot be hashed; a type's own code may raise anything
            raise InvalidData(self._explain(bytes(raw), at) or [_foreign_error(exc, at)]) from exc

    def _unknown(self, raw: bytes | msgspec.Raw, at: str) -> list[FieldError]:
        known = ", ".join(field.name for field in self.fields if not field.deprecated) or "none"
        errors = (
            FieldError(detail=f"Unknown field. The fields here are: {known}.", pointer=f"{at}/{escape_pointer(key)}")
            for key in msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
            if key not in self._names
        )
        return list(itertools.islice(errors, MAX_ERRORS))

    def _explain(self, raw: bytes, at: str) -> list[FieldError]:
        """All that is wrong with *raw*, field by field: the decoder stops at the first."""
        try:
            members = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        except msgspec.ValidationError as exc:
            return [_field_error(exc, at)]
        errors = self._unknown(raw, at)
        for field in self.fields:
            pointer = f"{at}/{escape_pointer(field.name)}"
            if field.name in members:
                errors += explain(field.type, bytes(members[field.name]), pointer)
            elif field.required:
                errors.append(FieldError(detail="This field is required.", pointer=pointer))
        return errors


def malformed(raw: bytes, exc: Exception) -> MalformedJSON:
    """Say where *raw* stops being JSON. msgspec gives a byte, or says only that the text was truncated."""
    if isinstance(exc, RecursionError):
        return MalformedJSON("nested too deep", 1, 1)
    reason, position = "it ends too early", len(raw)
    if isinstance(exc, UnicodeDecodeError):
        reason, position = "it is not UTF-8", _first_bad_byte(raw)
    elif found := re.search(r"malformed: (.+) \(byte (\d+)\)", str(exc)):
        reason, position = found[1], int(found[2])
    elif lone := re.search(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-bA-B](?![0-9a-fA-F]{2}\\u[dD][c-fC-F])", raw):
        reason, position = "half of a surrogate pair", lone.start()
    return _malformed_at(raw, reason, position)


def _malformed_at(raw: bytes, reason: str, position: int) -> MalformedJSON:
    before = raw[:position].decode("utf-8", "replace")
    line_start = before.rfind("\n") + 1
    return MalformedJSON(reason, before.count("\n") + 1, len(before) - line_start + 1)


def check_depth(raw: bytes, max_depth: int) -> None:
    """Raise MalformedJSON where arrays and objects of *raw* lie deeper in each other than *max_depth* levels.

    No text takes long, JSON or not: whatever goes from byte to byte here is not Python.
    """
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    levels = memoryview(STRINGS.sub(b"", raw).translate(LEVELS, NO_BRACKETS)).cast("b")
    try:
        brackets = 1 + operator.indexOf(itertools.accumulate(levels), max_depth + 1)
    except ValueError:  # it is never reached
        return
    found = re.match(rb"(?:%s){%d}" % (TO_BRACKET, brackets), raw, re.DOTALL)
    assert found is not None
    raise _malformed_at(raw, f"nested deeper than {max_depth} levels", found.end() - 1)


def _first_bad_byte(raw: bytes) -> int:
    """msgspec counts from the start of a string, and not of the document."""
    try:
        raw.decode()
    except UnicodeDecodeError as exc:
        return exc.start
    raise AssertionError("it was found not to be UTF-8")


def escape_pointer(name: str) -> str:
    """One reference token of a JSON pointer (RFC 6901, section 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def _field_error(exc: msgspec.ValidationError, at: str) -> FieldError:
    """msgspec's message without its path: ``Expected `int`, got `str` - at `$.a[0]` ``."""
    detail = str(exc).split(" - at ")[0].replace("`", "'")
    if detail.startswith(("Invalid enum value ", "Invalid value ")):  # it goes on with the value, however long that is
        detail = "This is none of the values that are possible here"
    if detail == "Number out of range":
        detail = "This number is out of range: the largest is about 1.8e308"
    return FieldError(detail=f"{detail}.{example_for(detail)}", pointer=at)


def example_for(message: str) -> str:
    """A sentence that shows a valid value, if *message*, one of msgspec's, is about a time; or else nothing."""
    wanted = WANTS_TIME.match(message)
    if wanted is None:
        return ""
    example = EXAMPLES[wanted[1]].removesuffix("Z" if "no timezone" in message else "")
    return f' Write a {wanted[1]} like "{example}".'


def _foreign_error(exc: Exception, at: str) -> FieldError:
    """What is neither msgspec's nor meant for a client: its text stays here."""
    return FieldError(detail=f"This value is not possible here ({type(exc).__name__}).", pointer=at)


def explain(type_: Any, raw: bytes, at: str) -> list[FieldError]:
    """What is wrong with *raw* as a *type_*: one error, or none. *raw* must be JSON."""
    try:
        msgspec.json.decode(raw, type=type_)
    except msgspec.ValidationError as exc:
        path = re.search(r" - at (?:`key` in )?`\$(.*)`$", str(exc))
        try:
            pointer = _resolve(type_, json.loads(raw, parse_float=_number), path[1]) if path else ""
        except (ValueError, LookupError, TypeError, RecursionError):  # a path that cannot be followed: name the field
            pointer = ""
        return [_field_error(exc, at + pointer)]
    except (ValueError, RecursionError):  # not JSON after all
        raise
    except Exception as exc:
        return [_foreign_error(exc, at)]
    return []


def _number(text: str) -> Any:
    """A float; the text itself if no float can hold it, since infinity would be encoded as null."""
    number = float(text)
    return number if math.isfinite(number) else msgspec.Raw(text.encode())


def _resolve(type_: Any, value: Any, path: str) -> str:
    """msgspec's path as a JSON pointer. It writes ``[...]`` for a key of a dict: find that key by trying."""
    whole = value = [value]  # a root that can be written to
    key: Any = 0
    pointer = ""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path):
        place = value[key]
        if index == "...":
            value[key] = place = _one_bad_entry(type_, whole, value, key, path)
            if len(place) > 1:  # a dict with fewer entries fails for another reason
                return pointer
            step: Any = next(iter(place))
        else:
            step = int(index) if index else name
        value, key = place, step
        pointer += f"/{escape_pointer(str(step))}"
    return pointer


def _one_bad_entry(type_: Any, whole: list[Any], parent: Any, key: Any, path: str) -> dict[str, Any]:
    """Halve the dict at ``parent[key]`` until one entry is left that gives the same error."""
    entries: dict[str, Any] = parent[key]
    while len(entries) > 1:
        names = list(entries)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        for half in halves:
            parent[key] = {name: entries[name] for name in half}
            try:
                msgspec.json.decode(msgspec.json.encode(whole[0]), type=type_)
            except msgspec.ValidationError as exc:
                if f"`${path}`" in str(exc):
                    entries = parent[key]
                    break
        else:
            break
    return entries

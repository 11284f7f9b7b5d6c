"""JSON in: one type's way from bytes to values, with every place that is wrong.

msgspec decodes fast, and stops at the first error, whose path has lost the keys of dicts. Only when it has failed is
the text looked at once more, field by field, so that a client reads all that is wrong, each with a JSON pointer
(RFC 6901).
"""

import dataclasses
import functools
import gc
import itertools
import json
import math
import operator
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from flock.errors import FieldError, FlockError, InvalidData, MalformedJSON

__all__ = [
    "Field",
    "JSONType",
    "check_depth",
    "depth_steps",
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
#: How much of a text is checked for its depth in one step.
STEP_BYTES = 64 * 1024
#: In a longer value the entry of a dict that does not fit is not searched for: the pointer ends at the dict.
MAX_SEARCHED_BYTES = 64 * 1024
#: A text of this length may hold so many small lists that collecting garbage takes longer than decoding.
MANY_BYTES = 64 * 1024

#: What values of these types look like, by msgspec's names for them.
EXAMPLES = {
    "datetime": "2026-11-30T14:30:00Z",
    "date": "2026-11-30",
    "time": "14:30:00Z",
    "duration": "PT1H30M",
}
#: The members of an object, none of which is read yet.
MEMBERS = dict[str, msgspec.Raw]
#: The end of msgspec's message on an item of a list, or of a list of lists, in a field.
INDEXED = re.compile(r" - at `\$\.(\w+)((?:\[\d+\])+)`$")
#: What msgspec says where one of them is wanted.
WANTS_TIME = re.compile(
    r"(?:Expected [`'][^`']*\b|Invalid RFC3339 encoded |Invalid ISO8601 |Only units .* ISO8601 )"
    rf"({'|'.join(EXAMPLES)})s?\b"
)

#: The rest of a string of JSON, or of one that never ends. Nothing in it is read twice, whatever it holds.
STRING_END = rb'(?:[^"\\]++|\\.)*+"?'
STRING = b'"' + STRING_END
#: All up to a bracket that is in no string, and the bracket.
TO_BRACKET = rb'(?:%s|[^"\[\]{}])*+[\[\]{}]' % STRING
#: An opening bracket as 1 and a closing one as -1, in signed bytes; and what is neither.
LEVELS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
NO_BACKSLASH = re.compile(rb"[^\\]")


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
                value = _decoded(self._decoder.decode, raw)
            except msgspec.ValidationError as exc:
                raise InvalidData(self._explain(bytes(raw), at, exc) or [_field_error(exc, at)]) from exc
            if not self._is_closed and (unknown := self._unknown(msgspec.json.decode(raw, type=MEMBERS), at)):
                raise InvalidData(unknown)
            return value
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise malformed(bytes(raw), exc) from exc
        except FlockError:
            raise
        except Exception as exc:  # a list within a set cannot be hashed; a type's own code may raise anything
            raise InvalidData(self._explain(bytes(raw), at, exc) or [_foreign_error(exc, at)]) from exc

    def _unknown(self, members: Iterable[str], at: str) -> list[FieldError]:
        known = ", ".join(field.name for field in self.fields if not field.deprecated) or "none"
        errors = (
            FieldError(detail=f"Unknown field. The fields here are: {known}.", pointer=f"{at}/{escape_pointer(key)}")
            for key in members
            if key not in self._names
        )
        return list(itertools.islice(errors, MAX_ERRORS))

    def _explain(self, raw: bytes, at: str, first: Exception) -> list[FieldError]:
        """All that is wrong with *raw*, field by field: the decoder stopped with the *first* error."""
        try:
            members = msgspec.json.decode(raw, type=MEMBERS)
        except msgspec.ValidationError as exc:
            return [_field_error(exc, at)]
        errors = self._unknown(members, at)
        known = INDEXED.search(str(first))
        for field in self.fields:
            pointer = f"{at}/{escape_pointer(field.name)}"
            if known is not None and known[1] == field.name:  # a long list is not read a second time
                errors.append(_field_error(first, pointer + known[2].replace("][", "/").replace("[", "/").strip("]")))
            elif field.name in members:
                errors += explain(field.type, bytes(members[field.name]), pointer)
            elif field.required:
                errors.append(FieldError(detail="This field is required.", pointer=pointer))
        return errors


def _decoded(decode: Callable[[bytes | msgspec.Raw], T], raw: bytes | msgspec.Raw) -> T:
    """Decode *raw* without garbage collection if it is long: of very many small lists none is garbage yet."""
    if len(raw) < MANY_BYTES or not gc.isenabled():
        return decode(raw)
    gc.disable()
    try:
        return decode(raw)
    finally:
        gc.enable()


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
    """Raise MalformedJSON where arrays and objects of *raw* lie deeper in each other than *max_depth* levels."""
    for _ in depth_steps(raw, max_depth):
        pass


def depth_steps(raw: bytes, max_depth: int) -> Iterator[None]:
    """``check_depth`` in steps of about ``STEP_BYTES``, for a caller that lets others run between them.

    No text takes long, JSON or not: whatever goes from byte to byte here is not Python.
    """
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    start, level, is_string = 0, 0, False
    while start < len(raw):
        end = start + STEP_BYTES
        if raw[end - 1 : end] == b"\\":  # an escape is not divided
            found = NO_BACKSLASH.search(raw, end)
            end = found.end() if found else len(raw)
        without_escapes = raw[start:end].replace(rb"\\", b"").replace(rb"\"", b"")
        parts = without_escapes.split(b'"')
        outside = b"".join(parts[is_string::2])
        levels = memoryview(outside.translate(LEVELS, NO_BRACKETS)).cast("b")
        try:
            number = operator.indexOf(itertools.accumulate(levels, initial=level), max_depth + 1)
        except ValueError:  # it is not reached here
            level += sum(levels)
        else:
            raise _malformed_at(raw, f"nested deeper than {max_depth} levels", _bracket(raw, start, is_string, number))
        is_string ^= len(parts) % 2 == 0
        start = end
        yield


def _bracket(raw: bytes, start: int, is_string: bool, number: int) -> int:
    """Where the bracket of that *number* is, counted from *start*."""
    if is_string:
        found = re.compile(STRING_END, re.DOTALL).match(raw, start)
        start = found.end() if found else start
    found = re.compile(rb"(?:%s){%d}" % (TO_BRACKET, number), re.DOTALL).match(raw, start)
    return found.end() - 1 if found else start  # there are backslashes outside of strings: it is not JSON at all


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


def _field_error(exc: Exception, at: str) -> FieldError:
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
        _decoded(functools.partial(msgspec.json.decode, type=type_), raw)
    except msgspec.ValidationError as exc:
        path = re.search(r" - at (?:`key` in )?`\$(.*)`$", str(exc))
        try:
            pointer = _resolve(type_, raw, path[1]) if path else ""
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


def _resolve(type_: Any, raw: bytes, path: str) -> str:
    """msgspec's path as a JSON pointer. It writes ``[...]`` for a key of a dict: find that key by trying."""
    steps, pointer = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path), ""
    if len(raw) > MAX_SEARCHED_BYTES:
        found = itertools.takewhile(lambda step: step != ("", "..."), steps)
        return "".join(f"/{escape_pointer(name or index)}" for name, index in found)
    value: Any = [json.loads(raw, parse_float=_number)]
    whole = value  # a root that can be written to
    key: Any = 0
    for name, index in steps:
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

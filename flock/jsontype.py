"""JSON decoding that reports every error, each with a JSON pointer (RFC 6901).

msgspec is fast, but stops at the first error, and its path does not contain the keys of dicts. So if it fails, the text
is checked again field by field to find all errors.
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
from flock.pydanticmodel import InvalidModel, from_json, has_model_fields, is_model, model_fields

T = TypeVar("T")

#: Max unknown fields that are reported.
MAX_ERRORS = 100
#: Size of the piece of a text that ``depth_steps`` checks in one step.
STEP_BYTES = 64 * 1024
#: In longer values, the invalid entry of a dict is not searched for, and the pointer ends at the dict.
MAX_SEARCHED_BYTES = 64 * 1024
#: Texts of this size may contain enough small lists for garbage collection to take longer than decoding.
GC_PAUSE_BYTES = 64 * 1024

#: Example values for types, by msgspec's names for the types.
EXAMPLES = {"datetime": "2026-11-30T14:30:00Z", "date": "2026-11-30", "time": "14:30:00Z", "duration": "PT1H30M"}
#: The undecoded members of an object.
MEMBERS = dict[str, msgspec.Raw]
#: The end of msgspec's message about an item of a list, or of nested lists, in a field.
INDEXED = r" - at `\$\.(\w+)((?:\[\d+\])+)`$"
#: msgspec's messages about values of these types.
WANTS_TIME = (
    r"(?:Expected [`'][^`']*\b|Invalid RFC3339 encoded |Invalid ISO8601 |Only units .* ISO8601 )"
    rf"({'|'.join(EXAMPLES)})s?\b"
)

#: The rest of a JSON string, or of an unterminated one. It matches in linear time.
STRING_END = rb'(?:[^"\\]++|\\.)*+"?'
STRING = b'"' + STRING_END
#: Everything up to and including the next bracket outside of strings.
TO_BRACKET = rb'(?:%s|[^"\[\]{}])*+[\[\]{}]' % STRING
#: Maps an opening bracket to 1 and a closing bracket to -1, as signed bytes.
LEVELS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
NO_BRACKETS = bytes(set(range(256)) - set(b"[{]}"))
NO_BACKSLASH = re.compile(rb"[^\\]")


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One named value. ``default`` is UNSET if the field has no default, or if the type creates it.

    A *deprecated* field (as in JSON Schema) is accepted, but not listed among the known fields.
    """

    name: str
    type: Any = str
    description: str = ""
    required: bool = True
    default: Any = msgspec.UNSET
    deprecated: bool = False

    @classmethod
    def of(cls, name: str, annotation: Any, **more: Any) -> "Field":
        """Return a field. Its description may be in ``Annotated[T, "…"]`` or in msgspec's ``Meta``."""
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
    """Whether *type_* is a struct, dataclass, TypedDict or pydantic model that is encoded as a JSON object."""
    if not isinstance(type_, type):
        return False
    if issubclass(type_, msgspec.Struct):
        return not type_.__struct_config__.array_like
    return dataclasses.is_dataclass(type_) or typing.is_typeddict(type_) or has_model_fields(type_)


def fields_of(type_: Any) -> tuple[Field, ...]:
    """Return the fields of a struct, dataclass, TypedDict or pydantic model, with their names in JSON."""
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
    if is_model(type_):
        return tuple(Field(**field) for field in model_fields(type_))
    return tuple(
        Field.of(name, hint, required=name in type_.__required_keys__) for name, hint in hints_of(type_).items()
    )


def hints_of(type_: Any) -> dict[str, Any]:
    """Return the annotations of a class in order of declaration, without ``Required`` and ``NotRequired``."""
    hints = typing.get_type_hints(type_, include_extras=True)
    wrappers = (typing.Required, typing.NotRequired)
    return {name: hint.__args__[0] if typing.get_origin(hint) in wrappers else hint for name, hint in hints.items()}


class JSONType(Generic[T]):
    """Decodes JSON to a type with named fields (struct, dataclass, TypedDict or pydantic model).

    Args:
        ignores_unknown: unknown fields are ignored, instead of rejected.
    """

    def __init__(self, type_: type[T], *, ignores_unknown: bool = False) -> None:
        self.type = type_
        self._ignores_unknown = ignores_unknown
        self.fields = fields_of(type_)
        self._decoder = msgspec.json.Decoder(type_, dec_hook=from_json)
        config = getattr(type_, "__struct_config__", None)
        # A model has its own rule for unknown fields.
        forbids_unknown = config is not None and config.forbid_unknown_fields
        self._is_closed = ignores_unknown or is_model(type_) or forbids_unknown
        self._names = {field.name for field in self.fields} | {getattr(config, "tag_field", None)}

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> T:
        """Decode *raw*.

        Args:
            at: JSON pointer to *raw* in the client's request. It is the prefix of all pointers in errors.

        Raises:
            MalformedJSON: *raw* is not valid JSON.
            InvalidData: *raw* does not match the type.
        """
        try:
            try:
                value = _decode(self._decoder.decode, raw)
            except msgspec.ValidationError as exc:
                raise InvalidData(self._explain(bytes(raw), at, exc) or _field_errors(exc, at)) from exc
            if not self._is_closed and (unknown := self._unknown(msgspec.json.decode(raw, type=MEMBERS), at)):
                raise InvalidData(unknown)
            return value
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise malformed(bytes(raw), exc) from exc
        except (FlockError, MemoryError):
            raise
        except Exception as exc:  # a list in a set is not hashable, and a type's own code may raise anything
            raise InvalidData(self._explain(bytes(raw), at, exc) or [_unexpected_error(exc, at)]) from exc

    def _unknown(self, members: Iterable[str], at: str) -> list[FieldError]:
        known = [field.name for field in self.fields if not field.deprecated]
        errors = (unknown_field(known, f"{at}/{escape_pointer(key)}") for key in members if key not in self._names)
        return list(itertools.islice(errors, MAX_ERRORS))

    def _explain(self, raw: bytes, at: str, first: Exception) -> list[FieldError]:
        """Return all errors in *raw*, by checking each field; *first* is the error of the decoder."""
        try:
            members = msgspec.json.decode(raw, type=MEMBERS)
        except msgspec.ValidationError as exc:
            return _field_errors(exc, at)
        if is_model(self.type):
            return _field_errors(first, at)
        errors = [] if self._ignores_unknown else self._unknown(members, at)
        known = re.search(INDEXED, str(first))
        for field in self.fields:
            pointer = f"{at}/{escape_pointer(field.name)}"
            if known is not None and known[1] == field.name:  # do not decode a long list again
                errors += _field_errors(first, pointer + known[2].replace("][", "/").replace("[", "/").strip("]"))
            elif field.name in members:
                errors += explain(field.type, bytes(members[field.name]), pointer)
            elif field.required:
                errors.append(FieldError(detail="This field is required.", pointer=pointer))
        return errors


def unknown_field(known: Iterable[str], at: str) -> FieldError:
    return FieldError(detail=f"Unknown field. Known fields: {', '.join(known) or 'none'}.", pointer=at)


def _decode(decode: Callable[[bytes | msgspec.Raw], T], raw: bytes | msgspec.Raw) -> T:
    """Decode *raw*, without garbage collection if it is long: no value is garbage until decoding ends."""
    if len(raw) < GC_PAUSE_BYTES or not gc.isenabled():
        return decode(raw)
    gc.disable()
    try:
        return decode(raw)
    finally:
        gc.enable()


def malformed(raw: bytes, exc: Exception) -> MalformedJSON:
    """Return the error for *raw*, with its position. msgspec reports a byte offset, or only that *raw* is truncated."""
    if isinstance(exc, RecursionError):
        return MalformedJSON("nested too deeply", 1, 1)
    reason, position = "unexpected end", len(raw)
    if isinstance(exc, UnicodeDecodeError) or str(exc).startswith("Invalid UTF-8"):  # before msgspec 0.23, and since
        reason, position = "invalid UTF-8", _first_invalid_byte(raw)
    elif found := re.search(r"malformed: (.+) \(byte (\d+)\)", str(exc)):
        reason, position = found[1], int(found[2])
    elif lone := re.search(rb"(?<!\\)(?:\\\\)*\\u[dD][89a-bA-B](?![0-9a-fA-F]{2}\\u[dD][c-fC-F])", raw):
        reason, position = "unpaired surrogate", lone.start()
    return _malformed_at(raw, reason, position)


def _malformed_at(raw: bytes, reason: str, position: int) -> MalformedJSON:
    if raw[position : position + 1] == b"'":
        reason += " (use double quotes)"
    before = raw[:position].decode("utf-8", "replace")
    line_start = before.rfind("\n") + 1
    return MalformedJSON(reason, before.count("\n") + 1, len(before) - line_start + 1)


def check_depth(raw: bytes, max_depth: int) -> None:
    """Raise MalformedJSON if arrays and objects in *raw* are nested deeper than *max_depth* levels."""
    for _ in depth_steps(raw, max_depth):
        pass


def depth_steps(raw: bytes, max_depth: int) -> Iterator[None]:
    """Check the depth in steps of about ``STEP_BYTES``, so that the caller can yield to other tasks in between.

    This is fast for any text, valid or not, because no Python code runs per byte.
    """
    if raw.count(b"[") + raw.count(b"{") <= max_depth:
        return
    start, level, is_string = 0, 0, False
    while start < len(raw):
        end = start + STEP_BYTES
        if raw[end - 1 : end] == b"\\":  # do not split an escape sequence
            match = NO_BACKSLASH.search(raw, end)
            end = match.end() if match else len(raw)
        without_escapes = raw[start:end].replace(rb"\\", b"").replace(rb"\"", b"")
        parts = without_escapes.split(b'"')
        outside = b"".join(parts[is_string::2])
        levels = memoryview(outside.translate(LEVELS, NO_BRACKETS)).cast("b")
        try:
            number = operator.indexOf(itertools.accumulate(levels, initial=level), max_depth + 1)
        except ValueError:  # *max_depth* is not exceeded in this piece
            level += sum(levels)
        else:
            raise _malformed_at(raw, f"nested deeper than {max_depth} levels", _bracket(raw, start, is_string, number))
        is_string ^= len(parts) % 2 == 0
        start = end
        yield


def _bracket(raw: bytes, start: int, is_string: bool, number: int) -> int:
    """Return the position of the bracket with that *number*, counted from *start*."""
    if is_string:
        match = re.compile(STRING_END, re.DOTALL).match(raw, start)
        start = match.end() if match else start
    match = re.compile(rb"(?:%s){%d}" % (TO_BRACKET, number), re.DOTALL).match(raw, start)
    return match.end() - 1 if match else start  # backslashes outside of strings: not valid JSON


def _first_invalid_byte(raw: bytes) -> int:
    """Return the position in the document; msgspec counts from the start of the string."""
    try:
        raw.decode()
    except UnicodeDecodeError as exc:
        return exc.start
    raise AssertionError("invalid UTF-8 was reported before")


def escape_pointer(name: str) -> str:
    """Escape *name* as a reference token of a JSON pointer (RFC 6901, section 3)."""
    return name.replace("~", "~0").replace("/", "~1")


def _field_errors(exc: Exception, at: str) -> list[FieldError]:
    """Convert msgspec's error. Its message ends with a path: ``Expected `int`, got `str` - at `$.a[0]` ``.

    There is one error, or one for each problem in a pydantic model.
    """
    if isinstance(exc.__cause__, InvalidModel):
        problems = exc.__cause__.problems[:MAX_ERRORS]
        return [
            FieldError(detail=text, pointer=at + "".join(f"/{escape_pointer(str(part))}" for part in location))
            for location, text in problems
        ]
    detail = str(exc).split(" - at ")[0].replace("`", "'")
    if detail.startswith(("Invalid enum value ", "Invalid value ")):  # the value follows, and may be long
        detail = "This value is not one of the allowed values"
    if detail == "Number out of range":
        detail = "This number is out of range: the largest is about 1.8e308"
    return [FieldError(detail=f"{detail}.{example_for(detail)}", pointer=at)]


def example_for(message: str) -> str:
    """Return a sentence with a valid example if *message* of msgspec is about a time; otherwise ""."""
    match = re.match(WANTS_TIME, message)
    if match is None:
        return ""
    example = EXAMPLES[match[1]].removesuffix("Z" if "no timezone" in message else "")
    return f' Write a {match[1]} like "{example}".'


def _unexpected_error(exc: Exception, at: str) -> FieldError:
    """Return an error for an exception of a type's own code, without its text, which is not meant for clients."""
    return FieldError(detail=f"This value is not valid here ({type(exc).__name__}).", pointer=at)


def explain(type_: Any, raw: bytes, at: str) -> list[FieldError]:
    """Return the errors of decoding *raw* as *type_*, or no errors if it is valid. *raw* must be JSON."""
    try:
        _decode(functools.partial(msgspec.json.decode, type=type_, dec_hook=from_json), raw)
    except msgspec.ValidationError as exc:
        path = re.search(r" - at (?:`key` in )?`\$(.*)`$", str(exc))
        try:
            pointer = _resolve(type_, raw, path[1]) if path else ""
        except (ValueError, LookupError, TypeError, RecursionError):  # the path cannot be resolved: report the field
            pointer = ""
        return _field_errors(exc, at + pointer)
    except (ValueError, RecursionError, MemoryError):  # not valid JSON, or not known
        raise
    except Exception as exc:
        return [_unexpected_error(exc, at)]
    return []


def float_of(text: str) -> Any:
    """Return a float, or the text itself if it is out of range, because infinity would be encoded as null."""
    number = float(text)
    return number if math.isfinite(number) else msgspec.Raw(text.encode())


def loads(raw: bytes, parse_float: Callable[[str], Any] = float_of) -> Any:
    """Return the value of *raw*. A number that Python or msgspec cannot hold stays the text that it was."""
    is_long = b"0" * 19 in raw.translate(_AS_ZEROS)  # else json reads integers itself, several times as fast
    return json.loads(raw.decode(), parse_float=parse_float, parse_int=_int_of if is_long else int)


_AS_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def _int_of(text: str) -> Any:
    return int(text) if len(text) < 19 else msgspec.Raw(text.encode())


def _resolve(type_: Any, raw: bytes, path: str) -> str:
    """Convert msgspec's path to a JSON pointer. The path has ``[...]`` for dict keys, which are found by bisection."""
    steps, pointer = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path), ""
    if len(raw) > MAX_SEARCHED_BYTES:
        known_steps = itertools.takewhile(lambda step: step != ("", "..."), steps)
        return "".join(f"/{escape_pointer(name or index)}" for name, index in known_steps)
    value: Any = [loads(raw)]
    whole = value  # a root whose value can be replaced
    key: Any = 0
    for name, index in steps:
        place = value[key]
        if index == "...":
            value[key] = place = _one_invalid_entry(type_, whole, value, key, path)
            if len(place) > 1:  # smaller dicts fail for a different reason
                return pointer
            step: Any = next(iter(place))
        else:
            step = int(index) if index else name
        value, key = place, step
        pointer += f"/{escape_pointer(str(step))}"
    return pointer


def _one_invalid_entry(type_: Any, whole: list[Any], parent: Any, key: Any, path: str) -> dict[str, Any]:
    """Bisect the dict at ``parent[key]`` until a single entry that causes the same error is left."""
    entries: dict[str, Any] = parent[key]
    while len(entries) > 1:
        names = list(entries)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        for half in halves:
            parent[key] = {name: entries[name] for name in half}
            try:
                msgspec.json.decode(msgspec.json.encode(whole[0]), type=type_, dec_hook=from_json)
            except msgspec.ValidationError as exc:
                if f"`${path}`" in str(exc):
                    entries = parent[key]
                    break
        else:
            break
    return entries


#: Members of a JSON Schema that do not change what it allows.
ASIDE_OF_SCHEMA = {"title", "description", "$schema", "$defs", "definitions", "default", "examples"}


def is_same_schema(ours: Any, theirs: Any) -> bool:
    """Whether two JSON Schemas are the same, apart from titles, descriptions, order and a few ways to write them.

    Both are read side by side, and each pair of places only once, so references cannot make it long.
    """
    seen = set[tuple[int, int]]()

    def resolved(node: Any, root: Any) -> Any:
        for _ in range(100):
            if not (isinstance(node, dict) and isinstance(node.get("$ref"), str)):
                return node
            name, definitions = node["$ref"].rpartition("/")[2], root.get("$defs", root.get("definitions"))
            node = definitions.get(name) if isinstance(definitions, dict) else None
        return None

    def same(a: Any, b: Any) -> bool:
        a, b = resolved(a, ours), resolved(b, theirs)
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return bool(a == b) and a is not None
        if (id(a), id(b)) in seen:
            return True
        seen.add((id(a), id(b)))
        a, b = _normal_schema(a), _normal_schema(b)
        return a.keys() == b.keys() and all(same_member(name, a[name], b[name]) for name in a)

    def same_member(name: str, a: Any, b: Any) -> bool:
        if name == "properties" and isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[each], b[each]) for each in a)
        if name in ("required", "enum") and isinstance(a, list) and isinstance(b, list):
            return sorted(map(msgspec.json.encode, a)) == sorted(map(msgspec.json.encode, b))
        if name in ("items", "additionalProperties"):
            return same(a, b)
        if name in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    return isinstance(theirs, dict) and same(ours, theirs)


def _normal_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in the one form that several spellings have."""
    kept = {name: value for name, value in schema.items() if name not in ASIDE_OF_SCHEMA}
    if "const" in kept:
        kept["enum"] = [kept.pop("const")]
    if "enum" in kept:
        kept.pop("type", None)
    if kept.get("additionalProperties") is False:  # required of strict schemas
        del kept["additionalProperties"]
    if isinstance(kept.get("type"), list) and len(kept) == 1:
        return {"anyOf": [{"type": each} for each in kept["type"]]}
    return kept

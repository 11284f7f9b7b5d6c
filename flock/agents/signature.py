"""Signatures: ``"text: str | what to analyse, limit: int"`` ⇄ a msgspec type ⇄ JSON Schema.

A signature says what an agent takes or gives: named fields, each with a type and perhaps a description. It is written
as a string, as a struct, dataclass or TypedDict, or is read from a function's annotations. The string's grammar:

    signature   = [ field *( "," field ) [ "," ] ]
    field       = identifier [ ":" type ] [ "|" description ]
    type        = alternative *( "|" alternative )
    alternative = name [ "[" … "]" ]

No type means ``str``. A bar goes on with the type when a type follows it, and starts the description otherwise. Inside
a description a comma starts a new field only when ``identifier: type`` follows. Names of types come from a fixed table
and from ``types=``; nothing is evaluated.
"""

import ast
import copy
import datetime
import decimal
import functools
import inspect
import keyword
import re
import types as python_types
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import msgspec
import msgspec.inspect

from flock.errors import FieldError, InvalidData, MalformedJSON, SignatureError
from flock.jsontype import Field, JSONType, explain, fields_of, has_fields, hints_of
from flock.nearest import did_you_mean
from flock.runs import RunContext

__all__ = ["Signature", "context_parameter", "name_of", "text_as_json"]

NAMED_TYPES: Mapping[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "bytes": bytes,
    "list": list,
    "dict": dict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Any": Any,
    "None": None,
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "timedelta": datetime.timedelta,
    "UUID": uuid.UUID,
    "Decimal": decimal.Decimal,
    # The capitalised names of the typing module, which older scripts use.
    "List": list,
    "Dict": dict,
    "Tuple": tuple,
    "Set": set,
    "FrozenSet": frozenset,
}

# Built at run time, where a type checker cannot follow.
UNION: Any = Union
LITERAL: Any = Literal
ANNOTATED: Any = Annotated

#: How many types each generic takes: any number where it is None.
TYPE_ARGUMENTS: Mapping[Any, int | None] = {list: 1, set: 1, frozenset: 1, dict: 2, tuple: None}


class _Parser:
    """Reads a signature's text from left to right. ``position`` is the next character to be read."""

    def __init__(self, text: str, types: Mapping[str, Any]) -> None:
        self.text = text
        self.types = {**NAMED_TYPES, **types}
        self.position = 0

    def fields(self) -> Iterator[Field]:
        seen: set[str] = set()
        while self.text[self.position :].strip():
            name = self._name(seen)
            seen.add(name)
            type_ = self._type() if self._take(":") else str
            description = self._description() if self._take("|") else ""
            if not self._take(",") and self.text[self.position :].strip():
                raise self._error(self._what_is_missing_after(name))
            yield Field(name=name, type=type_, description=description)

    def _what_is_missing_after(self, name: str) -> str:
        try:
            end, _ = self._alternative(self.position)
        except SignatureError:
            return f"expected ':' or ',' after the field {name!r}"
        return f"a colon is missing. Write '{name}: {self.text[self.position : end].strip()}'"

    def _error(self, message: str, position: int | None = None) -> SignatureError:
        at = self.position if position is None else position
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        return SignatureError(f"In the signature {self.text!r}: {message}", at + 1)

    def _take(self, character: str) -> bool:
        found = re.compile(rf"\s*{re.escape(character)}").match(self.text, self.position)
        if found:
            self.position = found.end()
        return found is not None

    def _name(self, seen: set[str]) -> str:
        found = re.compile(r"\s*([^\s,:|]*)").match(self.text, self.position)
        name = found[1] if found else ""
        if problem := _name_problem(name):
            raise self._error(problem)
        if name in seen:
            raise self._error(f"the field {name!r} is there twice")
        self.position = found.end() if found else self.position
        return name

    def _type(self) -> Any:
        start = self.position
        end, alternative = self._alternative(start)
        alternatives = [alternative]
        while self.text[end : end + 1] == "|":
            try:
                next_end, alternative = self._alternative(end + 1)
            except SignatureError:
                break  # no type follows the bar: the description starts
            alternatives.append(alternative)
            end = next_end
        self.position = end
        try:
            type_ = _union(alternatives)
            _check_json(type_)
        except (TypeError, ValueError, NotImplementedError) as exc:
            raise self._error(_reason(exc), start) from exc
        return type_

    def _alternative(self, start: int) -> tuple[int, Any]:
        """One type that begins at *start*: where it ends (at "," or "|" or the text's end), and what it is."""
        end, depth = start, 0
        tokens = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|.", re.DOTALL)
        for token in tokens.finditer(self.text, start):
            depth += {"[": 1, "]": -1}.get(token[0], 0)
            if depth == 0 and token[0] in (",", "|"):
                break
            end = token.end()
        source = self.text[start:end]
        lead = len(source) - len(source.lstrip())
        try:
            node = ast.parse(source.strip(), mode="eval").body
        except (SyntaxError, ValueError) as exc:
            raise self._error(f"{source.strip()!r} is not a type", start) from exc
        return end, self._resolve(node, source[lead:], start + lead)

    def _resolve(self, node: ast.expr, source: str, start: int) -> Any:
        """The type that *node* names. Only names, brackets, bars and literals have a meaning here."""
        line_bytes = source.encode()[: node.col_offset]
        at = start + len(line_bytes.decode(errors="ignore"))
        match node:
            case ast.Constant(value=None):
                return None
            case ast.Name(id=name) if name in self.types:
                return self.types[name]
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return _union([self._resolve(left, source, start), self._resolve(right, source, start)])
            case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
                return LITERAL[tuple(self._literal(item, at) for item in _items(inner))]
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                return _union([self._resolve(inner, source, start), None])
            case ast.Subscript(value=ast.Name(id="Union"), slice=inner):
                return _union([self._resolve(item, source, start) for item in _items(inner)])
            case ast.Subscript(value=ast.Name(id=name), slice=inner) if self._takes_types(name):
                return self._generic(self.types[name], _items(inner), source, start, at)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id not in self.types:
            node = node.value  # with a name that is known, the brackets are what is wrong
        name, generics = ast.unparse(node), ("Literal", "Optional", "Union")
        hint = ""
        if name.isidentifier():
            known = ", ".join(sorted({*self.types, *(f"{generic}[...]" for generic in generics)}))
            nearest = did_you_mean(name, [*generics, *reversed(self.types)])
            hint = f"{nearest} Pass it with types={{{name!r}: ...}}, or use one of: {known}."
        raise self._error(f"{name!r} is not a type known here.{hint}", at)

    def _takes_types(self, name: str) -> bool:
        return isinstance(self.types.get(name), type) and self.types[name] in TYPE_ARGUMENTS

    def _generic(self, base: Any, items: Sequence[ast.expr], source: str, start: int, at: int) -> Any:
        wanted = TYPE_ARGUMENTS[base]
        if wanted is not None and len(items) != wanted:
            raise self._error(f"{base.__name__} takes {wanted} type{'s'[: wanted - 1]} in its brackets", at)
        arguments = tuple(
            ... if isinstance(item, ast.Constant) and item.value is ... else self._resolve(item, source, start)
            for item in items
        )
        return base[arguments]

    def _literal(self, node: ast.expr, at: int) -> Any:
        try:
            value = ast.literal_eval(node)  # a constant, or a sign before one: nothing is evaluated
        except ValueError:
            value = ...
        if not isinstance(value, str | int | None):
            raise self._error("Literal takes strings, whole numbers, true, false and None", at)
        return value

    def _description(self) -> str:
        start = self.position
        next_field = re.compile(r",\s*([^\W\d]\w*)\s*:")
        for comma in re.compile(r",").finditer(self.text, start):
            rest = self.text[comma.end() :]
            if not rest.strip():  # a trailing comma
                self.position = comma.start()
                return self.text[start : comma.start()].strip()
            if found := next_field.match(self.text, comma.start()):
                try:
                    self._alternative(found.end())
                except SignatureError:
                    continue
                self.position = comma.start()
                return self.text[start : comma.start()].strip()
        self.position = len(self.text)
        return self.text[start:].strip()


def _union(types: Sequence[Any]) -> Any:
    """The union of *types*, whose Literals are marked with their order: typing caches unions without regard to it."""
    if len(types) == 1:
        return types[0]
    return UNION[tuple(map(_with_order, types))]


def _with_order(type_: Any) -> Any:
    if typing.get_origin(type_) is not Literal:
        return type_
    return ANNOTATED[type_, msgspec.Meta(extra={"choices": typing.get_args(type_)})]


def _items(node: ast.expr) -> Sequence[ast.expr]:
    return node.elts if isinstance(node, ast.Tuple) else [node]


def _name_problem(name: str) -> str | None:
    if not name:
        return "a field's name is missing"
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        return f"{name!r} cannot be a field's name: use letters, digits and '_', no Python keyword, no '_' in front"
    return None


def _check_json(type_: Any) -> None:
    """Raise TypeError where msgspec cannot read or describe *type_*."""
    msgspec.json.Decoder(type_)
    msgspec.json.schema_components([type_])


def _reason(exc: Exception) -> str:
    """What msgspec says, without its list of remedies."""
    first, *_, last = [*str(exc).split("\n"), ""] if "\n" not in str(exc) else str(exc).split("\n")
    return (last if first.endswith("requires either:") else first).replace("`", "'")


# The signature itself


class Signature:
    """What an agent takes or gives.

    Attributes:
        fields: in the order in which they were written.
        type: the struct, dataclass or TypedDict to which JSON is converted.
        schema: its JSON Schema (2020-12), an object at the root, with everything inlined that is not recursive.
    """

    def __init__(self, fields: Sequence[Field], type_: Any = None, *, name: str = "Fields") -> None:
        if type_ is None:
            type_ = msgspec.defstruct(
                name, [_struct_field(f) for f in fields], kw_only=True, forbid_unknown_fields=True
            )
        self.fields = tuple(fields)
        self.type = type_
        self.schema = _inlined_schema(type_)
        for field in fields:
            if field.default is not msgspec.UNSET:
                self.schema["properties"][field.name]["default"] = msgspec.to_builtins(field.default, str_keys=True)
        self._json: JSONType[Any] = JSONType(type_)

    @classmethod
    def of(cls, source: Any, types: Mapping[str, Any] | None = None, *, name: str = "Fields") -> "Signature":
        """A signature from its text, or from a struct, dataclass or TypedDict.

        Args:
            types: what the text may name beyond the built-in types, by name.

        Raises:
            SignatureError: with the column where the text cannot be understood.
        """
        if isinstance(source, str):
            return cls(list(_Parser(source, types or {}).fields()), name=name)
        if not has_fields(source):
            raise SignatureError(
                f"A signature is a string such as 'text: str', or a struct, dataclass or TypedDict; not {source!r}."
            )
        try:
            _check_json(source)
        except (TypeError, NameError) as exc:
            raise SignatureError(f"{source.__name__} cannot be read from JSON: {_reason(exc)}") from exc
        return cls(fields_of(source), source)

    @classmethod
    def of_parameters(cls, function: Callable[..., Any]) -> "Signature":
        """What *function* takes: one field for each parameter. Raises SignatureError."""
        hints, name = _hints(function), name_of(function)
        try:
            parameters = inspect.signature(function).parameters
        except ValueError as exc:
            raise SignatureError(f"{name}: Python does not know its parameters. Wrap it in a function.") from exc
        fields = []
        for parameter in parameters.values():
            if hints.get(parameter.name) is RunContext:
                continue
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise SignatureError(f"{name}: the parameter {parameter} cannot be given by name, as an input is.")
            if parameter.name not in hints:
                raise SignatureError(f"{name}: the parameter {parameter.name!r} needs a type, such as ': str'.")
            if problem := _name_problem(parameter.name):
                raise SignatureError(f"{name}: {problem}.")
            fields.append(
                Field.of(parameter.name, hints[parameter.name])
                if parameter.default is parameter.empty
                else Field.of(parameter.name, hints[parameter.name], required=False, default=parameter.default)
            )
        return cls(_checked(fields, name), name=name)

    @classmethod
    def of_result(cls, function: Callable[..., Any]) -> tuple["Signature", bool]:
        """What *function* returns, and whether its bare value goes into one field, ``result``.

        Raises SignatureError.
        """
        returned = _hints(function).get("return", Any)
        if has_fields(returned):
            return cls.of(returned), False
        name = name_of(function)
        return cls(_checked([Field.of("result", returned)], name), name=name), True

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> Any:
        """Read a JSON object into ``type``. Raises MalformedJSON, InvalidData; see ``JSONType.decode``."""
        return self._json.decode(raw, at)

    def encode(self, value: Any) -> msgspec.Raw:
        """Check *value* (an instance of ``type``, or a mapping) and write it as JSON.

        NaN and infinities become null. Raises InvalidData: it does not fit, or cannot be JSON.
        """
        try:
            # By way of plain values, since convert() takes an instance of the type itself unchecked.
            plain = msgspec.to_builtins(value, str_keys=True)
            try:
                typed = msgspec.convert(plain, self.type, str_keys=True)
            except msgspec.ValidationError as exc:
                self.decode(msgspec.json.encode(plain))  # raises with all that is wrong, and where
                raise InvalidData([FieldError(detail=str(exc), pointer="")]) from exc
            return msgspec.Raw(msgspec.json.encode(typed))
        except (RecursionError, MalformedJSON) as exc:
            raise InvalidData([FieldError(detail="It is nested too deep to be JSON.", pointer="")]) from exc
        except (TypeError, ValueError, OverflowError) as exc:
            raise InvalidData([FieldError(detail=f"It cannot be JSON: {exc}.", pointer="")]) from exc

    def from_text(self, values: Mapping[str, str]) -> dict[str, msgspec.Raw]:
        """Values typed by a person, such as ``{"limit": "5"}``: text where the field takes text, JSON otherwise."""
        types = {field.name: field.type for field in self.fields}
        return {name: text_as_json(types.get(name, Any), text) for name, text in values.items()}


def text_as_json(type_: Any, text: str) -> msgspec.Raw:
    """*text* as a string where *type_* takes that or where it is no JSON, and as it is otherwise."""
    text = text.encode("utf-8", "replace").decode()  # a shell may hand over bytes that are no text
    quoted = msgspec.json.encode(text)
    if not explain(type_, quoted, ""):
        return msgspec.Raw(quoted)
    try:
        msgspec.json.decode(text, type=msgspec.Raw)  # 1e400 is JSON, although no float can hold it
    except (msgspec.DecodeError, RecursionError):
        return msgspec.Raw(quoted)
    return msgspec.Raw(text.encode())


def _struct_field(field: Field) -> Any:
    type_ = (
        typing.Annotated[field.type, msgspec.Meta(description=field.description)] if field.description else field.type
    )
    if field.required:
        return field.name, type_
    # A default that can be changed must not pass from one run to the next.
    if isinstance(field.default, str | int | float | bool | None):
        return field.name, type_, field.default
    return field.name, type_, msgspec.field(default_factory=functools.partial(copy.deepcopy, field.default))


def context_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter of *function* that takes a ``RunContext``; it is no input."""
    return next((name for name, hint in _hints(function).items() if hint is RunContext), None)


def name_of(function: Callable[..., Any]) -> str:
    """What people call it: the name of a function or method, or the class of an object that can be called."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target: Any = function.func if isinstance(function, functools.partial) else inspect.unwrap(function)
    if inspect.isclass(target):
        target = target.__init__
    elif not isinstance(target, python_types.FunctionType | python_types.MethodType):
        target = type(target).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError as exc:
        raise SignatureError(f"{name_of(function)}: the type {exc.name!r} is not known where it is defined.") from exc


def _checked(fields: Sequence[Field], owner: str) -> Sequence[Field]:
    for field in fields:
        try:
            _check_json(field.type)
            if field.default is not msgspec.UNSET:
                msgspec.json.encode(field.default)
        except TypeError as exc:
            raise SignatureError(f"{owner}: {field.name!r} cannot be read from JSON: {_reason(exc)}.") from exc
    return fields


# JSON Schema

REF = "#/$defs/"

#: The formats that msgspec leaves out, since a time without its zone is valid too.
FORMATS: Mapping[Any, str] = {datetime.datetime: "date-time", datetime.time: "time"}


def _inlined_schema(type_: Any) -> dict[str, Any]:
    """The schema of *type_* with each ``$ref`` replaced by what it names; recursive types stay in ``$defs``."""
    root, components = _schema_components(type_)
    recursive: set[str] = set()

    def inline(node: Any, within: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [inline(item, within) for item in node]
        if not isinstance(node, dict):
            return node
        # A discriminator names definitions that are gone once they are inlined; it only repeats the members' own tags.
        siblings = {key: inline(value, within) for key, value in node.items() if key not in ("$ref", "discriminator")}
        if "$ref" not in node:
            return siblings
        name = node["$ref"].removeprefix(REF)
        if name in within[1:]:
            recursive.add(name)
            return {**siblings, "$ref": node["$ref"]}
        return {**inline(components[name], (*within, name)), **siblings}

    schema: dict[str, Any] = inline(root, ("",))
    definitions: dict[str, Any] = {}
    while missing := recursive - definitions.keys():
        for name in missing:
            definitions[name] = inline(components[name], ("", name))
    return {**schema, "$defs": definitions} if definitions else schema


def _schema_components(type_: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """msgspec's schema of *type_* and of each named type in it, all in the order of declaration.

    msgspec alone sorts the members of a TypedDict and the choices of enums and Literals, and most times have no format.
    """
    named = _named_types(msgspec.inspect.type_info(type_), {})
    fields = [_as_declared(hint) for info in named.values() for hint in _field_types(info)]
    # One call for all, so that a type has the same name in each schema.
    (root, *others), components = msgspec.json.schema_components([type_, *named, *fields], ref_template=REF + "{name}")
    refs, of_fields = others[: len(named)], iter(others[len(named) :])
    for info, ref in zip(named.values(), refs, strict=True):
        schema = components[ref["$ref"].removeprefix(REF)]
        if isinstance(info, msgspec.inspect.EnumType):
            schema["enum"] = [member.value for member in info.cls]
            continue
        for position, field in enumerate(info.fields, -len(info.fields)):
            place = (
                schema["properties"][field.encode_name] if "properties" in schema else schema["prefixItems"][position]
            )
            place.update(next(of_fields))
        if isinstance(info, msgspec.inspect.TypedDictType):
            names = list(hints_of(typing.get_origin(info.cls) or info.cls))
            schema["properties"] = {name: schema["properties"][name] for name in names}
            schema["required"] = [name for name in names if name in schema["required"]]
    return root, components


def _named_types(node: Any, found: dict[Any, Any]) -> dict[Any, Any]:
    """*found* with the classes and enums below a node of ``msgspec.inspect``, each with its own node."""
    if isinstance(node, tuple):
        for item in node:
            _named_types(item, found)
    elif isinstance(node, msgspec.inspect.Type | msgspec.inspect.Field):
        cls = getattr(node, "cls", None)
        if cls is None or cls not in found:
            found |= {} if cls is None else {cls: node}
            for name in node.__struct_fields__:
                _named_types(getattr(node, name), found)
    return found


def _field_types(info: Any) -> list[Any]:
    """The annotations of the fields of a named type, in the order that ``msgspec.inspect`` has."""
    fields = getattr(info, "fields", ())
    hints = hints_of(typing.get_origin(info.cls) or info.cls) if fields else {}
    return [hints.get(field.name, Any) for field in fields]


def _as_declared(type_: Any) -> Any:
    """*type_* for msgspec's schema, with the choices of its Literals as they stand, and the format of its times."""
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if isinstance(type_, type) and type_ in FORMATS:
        return ANNOTATED[type_, msgspec.Meta(extra_json_schema={"format": FORMATS[type_]})]
    if origin is Literal:
        return ANNOTATED[Any, msgspec.Meta(extra_json_schema={"enum": list(arguments)})]
    if origin is Annotated:
        has_no_zone = any(getattr(note, "tz", None) is False for note in arguments[1:])  # neither format allows that
        return type_ if has_no_zone else ANNOTATED[(_as_declared(arguments[0]), *arguments[1:])]
    if origin in (Union, python_types.UnionType):
        return UNION[tuple(map(_as_declared, arguments))]
    if origin is None or not arguments or has_fields(origin):
        return _as_declared(inner) if (inner := _aliased(type_)) is not None else type_
    return origin[tuple(map(_as_declared, arguments))]


def _aliased(type_: Any) -> Any:
    """What a NewType or a ``type`` statement stands for."""
    return None if isinstance(type_, type) else getattr(type_, "__supertype__", getattr(type_, "__value__", None))

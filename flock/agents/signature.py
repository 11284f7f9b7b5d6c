"""Signatures: ``"text: str | what to analyse, limit: int"`` ⇄ a msgspec type ⇄ JSON Schema.

A signature describes an agent's inputs or outputs: named fields with types and optional descriptions. It is written as
a string, or as a struct, dataclass, TypedDict or pydantic model, or derived from a function's annotations. The grammar
of the string:

    signature   = [ field *( "," field ) [ "," ] ]
    field       = identifier [ ":" type ] [ "|" description ]
    type        = alternative *( "|" alternative )
    alternative = name [ "[" … "]" ]

The default type is ``str``. A bar continues the type if a type follows it; otherwise it starts the description. In a
description, a comma starts a new field only if ``identifier: type`` follows. Type names are looked up in a fixed table
and in ``types=``; nothing is evaluated.
"""

import ast
import collections.abc
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
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

import msgspec
import msgspec.inspect

from flock.agents.messages import Messages
from flock.agents.result import Result
from flock.errors import InvalidData, MalformedJSON, SignatureError
from flock.files import MAX_FILES, Audio, Document, File, Find, Image, is_file, taking
from flock.jsontype import Field, JSONType, explain, fields_of, has_fields, hints_of
from flock.nearest import did_you_mean
from flock.pydanticmodel import (
    KeptModel,
    SchemaMode,
    from_json,
    is_model,
    is_pydantic_constraint,
    is_pydantic_dataclass,
    keep,
    model_schemas,
    to_json,
)
from flock.runs import RunContext, safe_text

NAMED_TYPES: Mapping[str, Any] = {
    **{type_.__name__: type_ for type_ in (str, int, float, bool, bytes, list, dict, tuple, set, frozenset)},
    **{type_.__name__: type_ for type_ in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta)},
    **{type_.__name__: type_ for type_ in (uuid.UUID, decimal.Decimal)},
    "Any": Any,
    "None": None,
    "Messages": Messages,
    **{type_.__name__: type_ for type_ in (Image, Audio, Document, File)},
    # The capitalised names of the typing module, for older scripts.
    "List": list,
    "Dict": dict,
    "Tuple": tuple,
    "Set": set,
    "FrozenSet": frozenset,
}

# Typed as Any, because types are built from them at run time.
UNION: Any = Union
LITERAL: Any = Literal
ANNOTATED: Any = Annotated

#: Number of type arguments of each generic type; None means any number.
TYPE_ARGUMENTS: Mapping[Any, int | None] = {list: 1, set: 1, frozenset: 1, dict: 2, tuple: None}


class _Parser:
    """Parses a signature's text from left to right. ``position`` is the next character."""

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
                raise self._error(self._problem_after(name))
            yield Field(name=name, type=type_, description=description)

    def _problem_after(self, name: str) -> str:
        found = self._alternative_or_none(self.position)
        if found is None:
            return f"expected ':' or ',' after the field {name!r}"
        return f"a colon is missing. Write '{name}: {self.text[self.position : found[0]].strip()}'"

    def _error(self, message: str, position: int | None = None) -> SignatureError:
        at = self.position if position is None else position
        at += len(self.text[at:]) - len(self.text[at:].lstrip())
        return SignatureError(f"In the signature {self.text!r}: {message}", at + 1)

    def _take(self, character: str) -> bool:
        match = re.compile(rf"\s*{re.escape(character)}").match(self.text, self.position)
        if match:
            self.position = match.end()
        return match is not None

    def _name(self, seen: set[str]) -> str:
        match = re.compile(r"\s*([^\s,:|]*)").match(self.text, self.position)
        name = match[1] if match else ""
        if problem := _name_problem(name):
            raise self._error(problem)
        if name in seen:
            raise self._error(f"the field {name!r} is defined twice")
        self.position = match.end() if match else self.position
        return name

    def _type(self) -> Any:
        start = self.position
        end, alternative = self._alternative(start)
        alternatives = [alternative]
        # If no type follows a bar, the description starts there.
        while self.text[end : end + 1] == "|" and (found := self._alternative_or_none(end + 1)):
            end, alternative = found
            alternatives.append(alternative)
        self.position = end
        try:
            type_ = _union(alternatives)
            _check_json(type_)
        except (TypeError, ValueError, NotImplementedError) as exc:
            raise self._error(_reason(exc), start) from exc
        return type_

    def _alternative(self, start: int) -> tuple[int, Any]:
        """Parse the type at *start*, up to "," or "|" or the end. Return its end and the type."""
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
            reason = ", because a bracket is not closed" if depth > 0 else ""
            if re.search(r"\s\w+\s*:", source):
                reason = ": put a comma before the next field"
            raise self._error(f"{source.strip()!r} is not a type{reason}", start) from exc
        return end, self._resolve(node, source[lead:], start + lead)

    def _alternative_or_none(self, start: int) -> tuple[int, Any] | None:
        try:
            return self._alternative(start)
        except SignatureError:
            return None

    def _resolve(self, node: ast.expr, source: str, start: int) -> Any:
        """Return the type for *node*. Only names, brackets, bars and literals are supported."""
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
            node = node.value  # report just the name if it is unknown; otherwise the brackets are the error
        name, generics = ast.unparse(node), ("Literal", "Optional", "Union")
        hint = ""
        if name.isidentifier():
            known = ", ".join(sorted({*self.types, *(f"{generic}[...]" for generic in generics)}))
            nearest = did_you_mean(name, [*generics, *reversed(self.types)])
            hint = f"{nearest} Pass it with types={{{name!r}: ...}}, or use one of: {known}."
        raise self._error(f"unknown type {name!r}.{hint}", at)

    def _takes_types(self, name: str) -> bool:
        return isinstance(self.types.get(name), type) and self.types[name] in TYPE_ARGUMENTS

    def _generic(self, base: Any, items: Sequence[ast.expr], source: str, start: int, at: int) -> Any:
        expected = TYPE_ARGUMENTS[base]
        if expected is not None and len(items) != expected:
            raise self._error(f"{base.__name__} takes {expected} type{'s'[: expected - 1]} in its brackets", at)
        arguments = tuple(
            ... if isinstance(item, ast.Constant) and item.value is ... else self._resolve(item, source, start)
            for item in items
        )
        return base[arguments]

    def _literal(self, node: ast.expr, at: int) -> Any:
        try:
            value = ast.literal_eval(node)  # a constant, optionally with a sign; nothing is evaluated
        except ValueError:
            value = ...
        if not isinstance(value, str | int | None):
            raise self._error("Literal takes strings, whole numbers, true, false and None", at)
        return value

    def _description(self) -> str:
        start = self.position
        next_field = re.compile(r",\s*([^\W\d]\w*)\s*:")
        for comma in re.compile(r",").finditer(self.text, start):
            is_last = not self.text[comma.end() :].strip()
            match = next_field.match(self.text, comma.start())
            if is_last or (match and self._alternative_or_none(match.end())):
                self.position = comma.start()
                break
        else:
            self.position = len(self.text)
        return self.text[start : self.position].strip()


def _union(types: Sequence[Any]) -> Any:
    """Return the union of *types*. Literals are marked with their order, which the cache of typing ignores."""
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
        return "a field name is missing"
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        return f"{name!r} is not a valid field name. Use letters, digits and '_', no Python keyword, and no leading '_'"
    return None


def _check_json(type_: Any) -> None:
    """Raise TypeError if *type_* cannot be decoded, or has no schema."""
    msgspec.json.Decoder(type_)
    _as_declared(type_)
    _schema_components(type_, "validation")


def _reason(exc: Exception) -> str:
    """Return msgspec's message without its list of suggestions."""
    lines = str(exc).split("\n")
    return lines[-1 if lines[0].endswith("requires either:") else 0].replace("`", "'")


# Signatures


class Signature:
    """The inputs or outputs of an agent.

    Attributes:
        fields: in order of declaration.
        type: the struct, dataclass, TypedDict or pydantic model that JSON is decoded to.
        is_declared: whether the program has declared that type. Otherwise it was made from the fields.
        has_files: whether a field may have a file, of a type in ``flock.files``.
        schema: its JSON Schema (2020-12). The root is an object, and all types that are not recursive are inlined.
        result_schema: the schema of what ``encode`` returns. It is the same, except for pydantic models with computed
            fields, or whose names or types in JSON differ between reading and writing.
    """

    def __init__(self, fields: Sequence[Field], type_: Any = None, *, name: str = "Fields") -> None:
        self.is_declared = type_ is not None
        if type_ is None:
            members = list(map(_struct_field, fields))
            type_ = msgspec.defstruct(name, members, kw_only=True, forbid_unknown_fields=True)
        self.fields = tuple(fields)
        self.type = type_
        self.schema = _inlined_schema(type_, "validation")
        self.result_schema = _inlined_schema(type_, "serialization") if _models(type_) else self.schema
        for field in fields:
            if field.default is not msgspec.UNSET:
                shown = msgspec.to_builtins(field.default, str_keys=True, enc_hook=to_json)
                self.schema["properties"][field.name]["default"] = shown
        self._json: JSONType[Any] = JSONType(type_)
        self.has_files = any(map(is_file, _named_types(msgspec.inspect.type_info(type_), {})))

    @classmethod
    def of(cls, source: Any, types: Mapping[str, Any] | None = None, *, name: str = "Fields") -> "Signature":
        """Create a signature from its text, or from a struct, dataclass, TypedDict or pydantic model.

        Args:
            types: additional types, by name, that the text may use.

        Raises:
            SignatureError: the signature is invalid; for a text, with the column.
        """
        if isinstance(source, str):
            return cls(list(_Parser(source, types or {}).fields()), name=name)
        if not has_fields(source):
            raise SignatureError(
                "A signature must be a string such as 'text: str', or a struct, dataclass, TypedDict or pydantic "
                f"model, not {source!r}."
            )
        try:
            _check_json(source)
        except (TypeError, NameError) as exc:
            raise SignatureError(f"{source.__name__} cannot be read from JSON: {_reason(exc)}") from exc
        return cls(fields_of(source), source)

    @classmethod
    def of_parameters(cls, function: Callable[..., Any]) -> "Signature":
        """Create the signature of a function's inputs: one field for each parameter. Raises SignatureError."""
        hints, name = hints_of_function(function), name_of(function)
        try:
            parameters = inspect.signature(function).parameters
        except ValueError as exc:
            raise SignatureError(f"{name}: Python cannot inspect its parameters. Wrap it in a typed function.") from exc
        fields = []
        for parameter in parameters.values():
            if is_context(hints.get(parameter.name)):
                continue
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise SignatureError(f"{name}: the parameter {parameter} cannot be passed by name, as inputs are.")
            if parameter.name not in hints:
                example = "': RunContext' or ': str'" if parameter.name == "context" else "': str'"
                raise SignatureError(f"{name}: the parameter {parameter.name!r} needs a type, such as {example}.")
            if problem := _name_problem(parameter.name):
                raise SignatureError(f"{name}: {problem}.")
            default = {} if parameter.default is parameter.empty else {"required": False, "default": parameter.default}
            fields.append(Field.of(parameter.name, hints[parameter.name], **default))
        return cls(_checked(fields, name), name=name)

    @classmethod
    def of_result(cls, function: Callable[..., Any]) -> tuple["Signature", bool]:
        """Create the signature of a function's result, and return whether its value is wrapped in a field ``result``.

        Raises SignatureError.
        """
        returned, name = hints_of_function(function).get("return", Any), name_of(function)
        if is_generator(function):
            yielded = typing.get_args(returned)[:1]
            if typing.get_origin(returned) not in ITERATORS or not yielded:
                raise SignatureError(
                    f"{name}: it is a generator. Say what it yields: '-> AsyncIterator[str]' for text, "
                    "'-> AsyncIterator[str | Article]' for text and then the whole result, or output=."
                )
            returned = _result_among(yielded[0])
        if has_fields(returned):
            return cls.of(returned), False
        return cls(_checked([Field.of("result", returned)], name), name=name), True

    def decode(self, raw: bytes | msgspec.Raw, at: str = "") -> Any:
        """Decode a JSON object to ``type``. Raises MalformedJSON, InvalidData; see ``JSONType.decode``."""
        return self._json.decode(raw, at)

    def take(self, raw: msgspec.Raw, at: str, find: Find | None) -> tuple[msgspec.Raw, Mapping[str, bytes | None]]:
        """Check the inputs of a client, and return them with references to their files, and those files by id.

        Args:
            find: returns a stored file; None if no input takes one.

        Returns: the files with their content, or None if it is stored already.

        Raises: the same as ``decode``, and NotFound.
        """
        if find is None:
            self.decode(raw, at)
            return raw, {}
        with taking(find) as contents:
            typed = self.decode(raw, at)
        if contents.references > MAX_FILES:
            raise InvalidData.of(f"A run may have at most {MAX_FILES} files.", at)
        if not contents:
            return raw, {}
        texts = raw, msgspec.json.encode(typed, enc_hook=to_json)
        sent, read = (msgspec.json.decode(text, type=dict[str, msgspec.Raw]) for text in texts)
        # No text has these characters in JSON, so all else stays as it was sent.
        changed = {name: read[name] for name in sent if b'"file_id":' in bytes(read.get(name, b""))}
        return msgspec.Raw(msgspec.json.encode({**sent, **changed})), contents

    def encode(self, value: Any) -> msgspec.Raw:
        """Validate *value* (an instance of ``type``, or a mapping) and encode it as JSON.

        NaN and infinities become null. Raises InvalidData if it is invalid, or cannot be encoded as JSON.
        """
        try:
            # Convert to plain values first, because convert() does not validate an instance of the type itself.
            plain = msgspec.to_builtins(value, str_keys=True, enc_hook=keep, builtin_types=(KeptModel,))
            try:
                typed = msgspec.convert(plain, self.type, str_keys=True, dec_hook=from_json)
            except msgspec.ValidationError as exc:
                # This raises with all errors and their locations.
                self.decode(msgspec.json.encode(plain, enc_hook=to_json))
                raise InvalidData.of(str(exc)) from exc
            return msgspec.Raw(msgspec.json.encode(typed, enc_hook=to_json))
        except (RecursionError, MalformedJSON) as exc:
            raise InvalidData.of("It is nested too deeply to be encoded as JSON.") from exc
        except (TypeError, ValueError, OverflowError) as exc:
            remedy = " Write await before the call that returned it." if "type coroutine" in str(exc) else ""
            raise InvalidData.of(f"It cannot be encoded as JSON: {exc}.{remedy}") from exc

    def from_text(self, values: Mapping[str, str]) -> dict[str, msgspec.Raw]:
        """Convert text values, such as ``{"limit": "5"}``, to JSON: to strings if the field accepts them."""
        types = {field.name: field.type for field in self.fields}
        return {name: text_as_json(types.get(name, Any), text) for name, text in values.items()}


def text_as_json(type_: Any, text: str) -> msgspec.Raw:
    """Return *text* as a JSON string if *type_* accepts that or if *text* is not valid JSON, otherwise unchanged."""
    text = safe_text(text)  # a shell may pass bytes that are not valid text
    quoted = msgspec.json.encode(text)
    if not explain(type_, quoted, ""):
        return msgspec.Raw(quoted)
    try:
        msgspec.json.decode(text, type=msgspec.Raw)  # 1e400 is valid JSON, although it is out of range for a float
    except (msgspec.DecodeError, RecursionError):
        return msgspec.Raw(quoted)
    return msgspec.Raw(text.encode())


def _struct_field(field: Field) -> Any:
    type_ = Annotated[field.type, msgspec.Meta(description=field.description)] if field.description else field.type
    if field.required:
        return field.name, type_
    # A mutable default must not be shared between runs.
    if isinstance(field.default, str | int | float | bool | None):
        return field.name, type_, field.default
    return field.name, type_, msgspec.field(default_factory=functools.partial(copy.deepcopy, field.default))


def context_parameter(function: Callable[..., Any]) -> str | None:
    """Return the parameter of *function* that receives the ``RunContext``, which is not an input, or None."""
    return next((name for name, hint in hints_of_function(function).items() if is_context(hint)), None)


def is_context(hint: Any) -> bool:
    """Whether a type is ``RunContext``, also with the type of the state."""
    return hint is RunContext or typing.get_origin(hint) is RunContext


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, a method, a callable object or a partial of one is a coroutine function."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def called(function: Callable[[], Any], call_in_thread: Callable[..., Awaitable[Any]], *deadline: float) -> Any:
    """Return what *function* returns. It is async, or runs in a thread, and may be a plain wrapper of an async one."""
    if is_async(function):
        return await function()
    value = await call_in_thread(function, *deadline)
    return await value if inspect.isawaitable(value) else value


#: The possible return types of a generator.
ITERATORS = (
    *(collections.abc.AsyncGenerator, collections.abc.AsyncIterable, collections.abc.AsyncIterator),
    *(collections.abc.Generator, collections.abc.Iterable, collections.abc.Iterator),
)


def is_generator(function: Callable[..., Any], *, is_async: bool | None = None) -> bool:
    """Whether a function, a method or a callable object is a generator function, async or not if *is_async* is None."""
    called = function, type(function).__call__
    is_one = is_async is not True and any(map(inspect.isgeneratorfunction, called))
    return is_one or (is_async is not False and any(map(inspect.isasyncgenfunction, called)))


def _result_among(yielded: Any) -> Any:
    """Return the type of the result of a generator that yields this type: what is not text, or else text."""
    is_union = typing.get_origin(yielded) in (Union, python_types.UnionType)
    members = typing.get_args(yielded) if is_union else [yielded]
    others = [member for member in members if member not in (str, Result)]
    return UNION[tuple(others)] if others else str


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function or method, or the class name of a callable object."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return getattr(function, "__name__", type(function).__name__)


def hints_of_function(function: Callable[..., Any]) -> dict[str, Any]:
    target: Any = function.func if isinstance(function, functools.partial) else inspect.unwrap(function)
    if inspect.isclass(target):
        target = target.__init__
    elif not isinstance(target, python_types.FunctionType | python_types.MethodType):
        target = type(target).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError as exc:
        raise SignatureError(f"{name_of(function)}: the type {exc.name!r} is not defined in its module.") from exc


def _checked(fields: Sequence[Field], owner: str) -> Sequence[Field]:
    for field in fields:
        try:
            _check_json(field.type)
            if field.default is not msgspec.UNSET:
                msgspec.json.encode(field.default, enc_hook=to_json)
        except TypeError as exc:
            raise SignatureError(f"{owner}: {field.name!r} cannot be read from JSON: {_reason(exc)}.") from exc
    return fields


# JSON Schema

REF = "#/$defs/"

#: Formats that msgspec omits, because it also accepts times without a time zone.
FORMATS: Mapping[Any, str] = {datetime.datetime: "date-time", datetime.time: "time"}


def _inlined_schema(type_: Any, mode: SchemaMode) -> dict[str, Any]:
    """Return the schema of *type_* with each ``$ref`` inlined. Recursive types stay in ``$defs``."""
    root, components = _schema_components(type_, mode)
    recursive: set[str] = set()

    def inline(node: Any, within: tuple[str, ...]) -> Any:
        if isinstance(node, list):
            return [inline(item, within) for item in node]
        if not isinstance(node, dict):
            return node
        # A discriminator refers to definitions that are inlined here, and only repeats the members' own tags.
        siblings = {key: inline(value, within) for key, value in node.items() if key not in ("$ref", "discriminator")}
        if isinstance(siblings.get("oneOf"), list):  # of a tagged union in a pydantic model: at most one can match
            siblings["anyOf"] = siblings.pop("oneOf")
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


def _schema_components(type_: Any, mode: SchemaMode) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the schemas of *type_* and of each named type in it, in order of declaration.

    msgspec itself sorts the members of a TypedDict and the choices of enums and Literals, and omits most time formats.

    Raises: TypeError if a type has no schema.
    """
    refs_of_models, components_of_models = model_schemas(_models(type_), mode, REF)

    def schema_of(custom: Any) -> dict[str, Any]:
        if is_file(custom):
            return {"title": custom.__name__, "type": ["string", "object"], "description": "A data URL, or a file_id."}
        if custom not in refs_of_models:
            raise NotImplementedError
        return dict(refs_of_models[custom])

    found = _named_types(msgspec.inspect.type_info(type_), {})
    named_types = {cls: info for cls, info in found.items() if not isinstance(info, msgspec.inspect.CustomType)}
    fields = [_as_declared(hint) for info in named_types.values() for hint in _field_types(info)]
    # A single call, so that a type has the same name in all schemas.
    (root, *others), components = msgspec.json.schema_components(
        [type_, *named_types, *fields], ref_template=REF + "{name}", schema_hook=schema_of
    )
    refs, of_fields = others[: len(named_types)], iter(others[len(named_types) :])
    for info, ref in zip(named_types.values(), refs, strict=True):
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
    return root, components | components_of_models


def _models(type_: Any) -> list[Any]:
    """Return the pydantic models in *type_*. Raises TypeError if a dataclass of pydantic is in it."""
    classes = list(_named_types(msgspec.inspect.type_info(type_), {}))
    for cls in classes:
        if is_pydantic_dataclass(cls):
            raise TypeError(
                f"{cls.__name__!r} is a dataclass of pydantic. Use a model of pydantic, or a plain dataclass"
            )
    return [cls for cls in classes if is_model(cls)]


def _named_types(node: Any, found: dict[Any, Any]) -> dict[Any, Any]:
    """Add the classes and enums below a node of ``msgspec.inspect`` to *found*, each with its node, and return it."""
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
    """Return the annotations of the fields of a named type, in the order of ``msgspec.inspect``."""
    fields = getattr(info, "fields", ())
    hints = hints_of(typing.get_origin(info.cls) or info.cls) if fields else {}
    return [hints.get(field.name, Any) for field in fields]


def _as_declared(type_: Any) -> Any:
    """Return *type_* for msgspec's schema, with Literal choices in order of declaration and formats of times.

    Raises: TypeError for constraints of pydantic, which msgspec would ignore.
    """
    origin, arguments = typing.get_origin(type_), typing.get_args(type_)
    if isinstance(type_, type) and type_ in FORMATS:
        return ANNOTATED[type_, msgspec.Meta(extra_json_schema={"format": FORMATS[type_]})]
    if origin is Literal:
        return ANNOTATED[Any, msgspec.Meta(extra_json_schema={"enum": list(arguments)})]
    if origin is Annotated:
        if any(map(is_pydantic_constraint, arguments[1:])):
            raise TypeError("constraints of pydantic are only read in its models. Use msgspec.Meta here")
        has_no_zone = any(getattr(note, "tz", None) is False for note in arguments[1:])  # neither format allows this
        return type_ if has_no_zone else ANNOTATED[(_as_declared(arguments[0]), *arguments[1:])]
    if origin in (Union, python_types.UnionType):
        return UNION[tuple(map(_as_declared, arguments))]
    if origin is None or not arguments or has_fields(origin):
        return _as_declared(inner) if (inner := _aliased(type_)) is not None else type_
    return origin[tuple(map(_as_declared, arguments))]


def _aliased(type_: Any) -> Any:
    """Return the underlying type of a NewType or a ``type`` statement, or None."""
    return None if isinstance(type_, type) else getattr(type_, "__supertype__", getattr(type_, "__value__", None))

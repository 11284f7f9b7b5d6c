"""The signature language, and the types and schemas that it produces."""

import contextlib
import dataclasses
import datetime
import decimal
import enum
import json
import re
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Optional, Required, TypedDict, TypeVar

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flock.agents.signature import Signature
from flock.errors import InvalidData, SignatureError


class Invoice(msgspec.Struct):
    number: int
    lines: list[str] = []


class Tree(msgspec.Struct):
    name: str
    children: "list[Tree]" = []


@dataclasses.dataclass
class Point:
    x: int
    y: int = 3
    tags: list[str] = dataclasses.field(default_factory=list)


class Row(TypedDict):
    name: str
    note: NotRequired[str]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def shapes(text: str, **types: Any) -> list[tuple[str, Any, str]]:
    return [(field.name, field.type, field.description) for field in Signature.of(text, types).fields]


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        pytest.param("text", [("text", str, "")], id="no type is str"),
        pytest.param("text: str", [("text", str, "")], id="one"),
        pytest.param("", [], id="none"),
        pytest.param(" a : int , b ,", [("a", int, ""), ("b", str, "")], id="trailing comma and spaces"),
        pytest.param(
            "text: str | what to analyse, limit: int",
            [("text", str, "what to analyse"), ("limit", int, "")],
            id="description",
        ),
        pytest.param("text | what, why, how", [("text", str, "what, why, how")], id="commas in a description"),
        pytest.param(
            "a | note: this, and that | those, b: int",
            [("a", str, "note: this, and that | those"), ("b", int, "")],
            id="colon and bar in a description",
        ),
        pytest.param(
            "a: str | see, tone: formal, b: int | n",
            [("a", str, "see, tone: formal"), ("b", int, "n")],
            id="a colon without a type continues the description",
        ),
        pytest.param("a: str | the user's (only, b: int", [("a", str, "the user's (only"), ("b", int, "")], id="quote"),
        pytest.param("a | text,", [("a", str, "text")], id="trailing comma after a description"),
        pytest.param("a: int | None", [("a", Optional[int], "")], id="a bar before a type is a union"),  # noqa: UP045
        pytest.param("a: int | None | how many", [("a", int | None, "how many")], id="union, then description"),
        pytest.param("a: Optional[int] | n", [("a", int | None, "n")], id="Optional"),
        pytest.param("a: Union[int, str, None]", [("a", int | str | None, "")], id="Union"),
        pytest.param("a: list[str | None]", [("a", list[str | None], "")], id="bar inside brackets"),
        pytest.param("a: dict[str, list[int]]", [("a", dict[str, list[int]], "")], id="nested generics"),
        pytest.param("a: tuple[int, ...]", [("a", tuple[int, ...], "")], id="tuple of any length"),
        pytest.param("a: tuple[int, str]", [("a", tuple[int, str], "")], id="tuple"),
        pytest.param("a: List[Dict[str, Any]]", [("a", list[dict[str, Any]], "")], id="names from typing"),
        pytest.param("a: list, b: dict, c: set", [("a", list, ""), ("b", dict, ""), ("c", set, "")], id="bare"),
        pytest.param(
            "a: Literal['x, y', \"it's | z\", 1, -2, True, None] | pick",
            [("a", Literal["x, y", "it's | z", 1, -2, True, None], "pick")],
            id="Literal",
        ),
        pytest.param(
            "a: datetime, b: date, c: time, d: timedelta, e: UUID, f: Decimal, g: bytes, h: float, i: bool",
            [
                ("a", datetime.datetime, ""),
                ("b", datetime.date, ""),
                ("c", datetime.time, ""),
                ("d", datetime.timedelta, ""),
                ("e", uuid.UUID, ""),
                ("f", decimal.Decimal, ""),
                ("g", bytes, ""),
                ("h", float, ""),
                ("i", bool, ""),
            ],
            id="scalars",
        ),
        pytest.param("größe: int | maß, ü: str", [("größe", int, "maß"), ("ü", str, "")], id="not ASCII"),
    ],
)
def test_a_text_is_parsed_into_fields(text: str, fields: list[tuple[str, Any, str]]) -> None:
    assert shapes(text) == fields


def test_custom_types_are_found_by_their_given_name() -> None:
    """For structs, dataclasses, TypedDicts and enums."""
    text = "invoice: Invoice | the invoice, points: list[P], row: Row, colour: Colour"
    assert shapes(text, Invoice=Invoice, P=Point, Row=Row, Colour=Colour) == [
        ("invoice", Invoice, "the invoice"),
        ("points", list[Point], ""),
        ("row", Row, ""),
        ("colour", Colour, ""),
    ]


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        pytest.param("a: Foo", 4, "unknown type 'Foo'", id="unknown type"),
        pytest.param("a: int, b: list[Foo]", 17, "types={'Foo': ...}", id="unknown type inside brackets"),
        pytest.param("ä: dict[str, Foo]", 14, "'Foo'", id="columns count characters, not bytes"),
        pytest.param("a: string", 4, "use one of: Any", id="another language's name"),
        pytest.param("a, b: int, a", 12, "the field 'a' is defined twice", id="duplicate"),
        pytest.param("1a: str", 1, "'1a' is not a valid field name", id="illegal name"),
        pytest.param("class: str", 1, "no Python keyword", id="keyword"),
        pytest.param("_a: str", 1, "no leading '_'", id="underscore"),
        pytest.param("a,, b", 3, "name is missing", id="empty field"),
        pytest.param(": int", 1, "name is missing", id="type without a name"),
        pytest.param("a:", 3, "'' is not a type", id="no type after the colon"),
        pytest.param("a: int b", 4, "'int b' is not a type", id="two words"),
        pytest.param("a b: int", 3, "expected ':' or ',' after the field 'a'", id="two names"),
        pytest.param("text str", 6, "a colon is missing. Write 'text: str'", id="no colon"),
        pytest.param("a, b list[int] | n, c", 6, "Write 'b: list[int]'", id="no colon before brackets"),
        pytest.param("text strng", 6, "expected ':' or ','", id="no colon and no type"),
        pytest.param("a: strng", 4, "Did you mean 'str'?", id="a misspelt type"),
        pytest.param("a: list[Dattime | None]", 9, "Did you mean 'datetime'?", id="a misspelt type inside brackets"),
        pytest.param("a: optional[int]", 4, "Did you mean 'Optional'?", id="a generic in lower case"),
        pytest.param("a: Invioce", 4, "Did you mean 'Invoice'?", id="a misspelt custom type"),
        pytest.param("a: Zebra", 4, "unknown type 'Zebra'. Pass it with", id="no similar type"),
        pytest.param("a: list[int", 4, "'list[int' is not a type, because a bracket is not closed", id="open bracket"),
        pytest.param("a: int b: str", 4, "is not a type: put a comma before the next field", id="no comma"),
        pytest.param("a: list[int, str]", 4, "list takes 1 type", id="too many types"),
        pytest.param("a: dict[str]", 4, "dict takes 2 types", id="too few types"),
        pytest.param("a: Literal[1.5]", 4, "Literal takes", id="literal float"),
        pytest.param("a: Literal[99999999999999999999]", 4, "", id="literal beyond 64 bits"),
        pytest.param("a: Odd[int]", 4, "unknown type", id="a name that is not a type, with brackets"),
        pytest.param("a: Literal[b]", 4, "Literal takes", id="literal name"),
        pytest.param("a: str | datetime", 4, "more than one str-like type", id="union of two str-like types"),
        pytest.param("a: int, b: list | set", 12, "more than one array-like", id="union of two array-like types"),
        pytest.param("a: Invoice | dict", 4, "more than one dict-like", id="union of two dict-like types"),
        pytest.param("a: __import__('os')", 4, "unknown type", id="a call is not evaluated"),
        pytest.param("a: str if 1 else int", 4, "unknown type", id="an expression is not evaluated"),
        pytest.param("a: str.upper", 4, "unknown type", id="an attribute is not read"),
        pytest.param("a: str[int]", 4, "unknown type", id="a type that takes no brackets"),
    ],
)
def test_a_syntax_error_is_reported_with_its_column(text: str, column: int, words: str) -> None:
    with pytest.raises(SignatureError) as caught:
        Signature.of(text, {"Invoice": Invoice, "Odd": []})
    assert words in str(caught.value)
    assert caught.value.column == column
    assert f"(column {column})" in str(caught.value)


@given(st.text(alphabet="ab:,|[]'\" \\intsrLeal1_.é\n", max_size=30))
def test_any_text_is_a_signature_or_a_signature_error(text: str) -> None:
    try:
        signature = Signature.of(text)
    except SignatureError as exc:
        column = exc.column or 0
    else:
        column = 1
        names = [field.name for field in signature.fields]
        assert len(names) == len(set(names)) == len(signature.schema["properties"])
    assert 1 <= column <= len(text) + 1


def test_schema_is_an_inlined_object_with_the_descriptions() -> None:
    signature = Signature.of("invoice: Invoice | what to book, limit: int | at most", {"Invoice": Invoice}, name="book")
    assert signature.schema == {
        "title": "book",
        "type": "object",
        "properties": {
            "invoice": {
                "title": "Invoice",
                "type": "object",
                "properties": {
                    "number": {"type": "integer"},
                    "lines": {"type": "array", "items": {"type": "string"}, "default": []},
                },
                "required": ["number"],
                "description": "what to book",
            },
            "limit": {"type": "integer", "description": "at most"},
        },
        "required": ["invoice", "limit"],
        "additionalProperties": False,
    }


def test_recursive_types_stay_in_defs() -> None:
    schema = Signature.of("tree: Tree", {"Tree": Tree}).schema
    assert schema["properties"]["tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert schema["$defs"]["Tree"]["properties"]["children"]["items"] == {"$ref": "#/$defs/Tree"}
    assert "$ref" not in schema


@pytest.mark.parametrize("source", [Invoice, Point, Row])
def test_a_type_can_replace_the_text(source: type) -> None:
    signature = Signature.of(source)
    assert signature.type is source
    assert signature.fields[0].required
    assert not signature.fields[1].required


def test_a_type_that_replaces_the_text_refuses_unknown_members() -> None:
    for source, text in (
        (Invoice, '{"number": 1, "x": 2}'),
        (Point, '{"x": 1, "z": 2}'),
        (Row, '{"name": "", "z": 1}'),
    ):
        with pytest.raises(InvalidData, match="Unknown field"):
            Signature.of(source).decode(text.encode())


class Level(enum.IntEnum):
    TOP = 9
    LOW = 1


class Line(TypedDict):
    word: Literal["zinc", "iron", "gold"]
    at: NotRequired[Annotated[int, msgspec.Meta(ge=1)]]


class Page(TypedDict, total=False):
    title: Required[str]
    lines: list[Line]
    colour: Colour
    by_name: Required[dict[str, Line | None]]
    level: Level | None


class Place(NamedTuple):
    side: Literal["right", "left"]
    column: int = 1


T = TypeVar("T")


class Box(msgspec.Struct, Generic[T], tag="box"):
    value: T
    kind: Literal["wide", "tall"] = "wide"


@dataclasses.dataclass
class Book:
    size: Literal["s", 3, "m", 1, None]
    pages: tuple[Page, Literal["open", "closed"], Literal["closed", "open"]]
    place: Place
    box: Box[int]
    mood: Annotated[Literal["sunny", "grey"] | None, msgspec.Meta(description="as it looks")] = None


LINE_SCHEMA = {
    "title": "Line",
    "type": "object",
    "properties": {"word": {"enum": ["zinc", "iron", "gold"]}, "at": {"type": "integer", "minimum": 1}},
    "required": ["word"],
}
PAGE_SCHEMA = {
    "title": "Page",
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "lines": {"type": "array", "items": LINE_SCHEMA},
        "colour": {"title": "Colour", "enum": ["red", "blue"]},
        "by_name": {"type": "object", "additionalProperties": {"anyOf": [LINE_SCHEMA, {"type": "null"}]}},
        "level": {"anyOf": [{"title": "Level", "enum": [9, 1]}, {"type": "null"}]},
    },
    "required": ["title", "by_name"],
}


def test_a_schema_has_members_and_choices_in_declaration_order() -> None:
    """In TypedDicts, dataclasses, named tuples, generic structs and enums, at any depth."""
    properties = Signature.of(Book).schema["properties"]
    assert properties["size"] == {"enum": ["s", 3, "m", 1, None]}
    pages = properties["pages"]["prefixItems"]
    assert json.dumps(pages) == json.dumps([PAGE_SCHEMA, {"enum": ["open", "closed"]}, {"enum": ["closed", "open"]}])
    assert properties["place"]["prefixItems"] == [{"enum": ["right", "left"]}, {"type": "integer", "default": 1}]
    assert properties["box"]["properties"]["value"] == {"type": "integer"}
    assert properties["box"]["properties"]["kind"] == {"enum": ["wide", "tall"], "default": "wide"}
    mood = {"anyOf": [{"enum": ["sunny", "grey"]}, {"type": "null"}], "description": "as it looks", "default": None}
    assert properties["mood"] == mood


def test_the_fields_of_a_typed_dict_are_in_declaration_order() -> None:
    signature = Signature.of(Page)
    assert [field.name for field in signature.fields] == list(signature.schema["properties"])
    assert json.dumps(Signature.of("pages: list[Page]", {"Page": Page}).schema["properties"]["pages"]["items"]) == (
        json.dumps(PAGE_SCHEMA)
    )


def test_literals_with_equal_choices_keep_their_own_order() -> None:
    """Also in unions, which ``typing`` caches without regard to the order of choices."""
    for choices in (["up", "down"], ["down", "up"]):
        literal = f"Literal[{choices[0]!r}, {choices[1]!r}]"
        for text in (literal, f"{literal} | None", f"Optional[{literal}]", f"Union[{literal}, None]"):
            shown = Signature.of(f"a: {text}").schema["properties"]["a"]
            assert shown.get("anyOf", [shown])[0] == {"enum": choices}


def test_a_violated_constraint_in_a_typed_dict_is_reported_with_its_pointer() -> None:
    with pytest.raises(InvalidData, match=r"^/at: Expected 'int' >= 1"):
        Signature.of(Line).decode(b'{"word": "zinc", "at": 0}')


class Trip(msgspec.Struct):
    starts: datetime.datetime
    zoned: Annotated[datetime.datetime, msgspec.Meta(tz=True, description="to the minute")]
    naive: Annotated[datetime.datetime, msgspec.Meta(tz=False)]
    stops: list[tuple[str, datetime.time | None]]
    lasts: datetime.timedelta | None = None


def test_times_have_their_format_in_the_schema() -> None:
    """The formats of JSON Schema require a time zone, so a naive time has no format."""
    assert Signature.of(Trip).schema["properties"] == {
        "starts": {"type": "string", "format": "date-time"},
        "zoned": {"type": "string", "format": "date-time", "description": "to the minute"},
        "naive": {"type": "string"},
        "stops": {
            "type": "array",
            "items": {
                "type": "array",
                "minItems": 2,
                "maxItems": 2,
                "prefixItems": [
                    {"type": "string"},
                    {"anyOf": [{"type": "string", "format": "time"}, {"type": "null"}]},
                ],
                "items": False,
            },
        },
        "lasts": {"anyOf": [{"type": "string", "format": "duration"}, {"type": "null"}], "default": None},
    }
    shown = Signature.of("a: datetime | when, b: date, c: time, d: timedelta").schema["properties"]
    assert [schema["format"] for schema in shown.values()] == ["date-time", "date", "time", "duration"]
    assert shown["a"]["description"] == "when"


@pytest.mark.parametrize(
    ("type_", "raw", "problem"),
    [
        ("datetime", '"tomorrow"', "Invalid RFC3339 encoded datetime."),
        ("datetime", '"2026-11-30T14:30"', "Invalid RFC3339 encoded datetime."),
        ("datetime | None", "5", "Expected 'datetime | null', got 'int'."),
        ("date", '"30.11.2026"', "Invalid RFC3339 encoded date."),
        ("int | date", "1.5", "Expected 'int | date', got 'float'."),
        ("time", '"2 pm"', "Invalid RFC3339 encoded time."),
        ("timedelta", '"two hours"', "Invalid ISO8601 duration."),
        ("timedelta", '"P1W"', "Only units 'D', 'H', 'M', and 'S' are supported when parsing ISO8601 durations."),
        ("Zoned", '"2026-11-30T14:30:00"', "Expected 'datetime' with a timezone component."),
        ("Naive", '"2026-11-30T14:30:00Z"', "Expected 'datetime' with no timezone component."),
    ],
)
def test_an_invalid_time_is_reported_with_a_valid_example(type_: str, raw: str, problem: str) -> None:
    zones = {"Zoned": True, "Naive": False}
    types = {name: Annotated[datetime.datetime, msgspec.Meta(tz=tz)] for name, tz in zones.items()}
    signature = Signature.of(f"a: {type_}", types)
    with pytest.raises(InvalidData) as caught:
        signature.decode(f'{{"a": {raw}}}'.encode())
    (error,) = caught.value.errors
    found = re.fullmatch(re.escape(problem) + r' Write a \w+ like ("\S+")\.', error.detail)
    assert found, error.detail
    signature.decode(f'{{"a": {found[1]}}}'.encode())


class Day(TypedDict):
    date: str


def test_an_example_of_a_time_is_shown_only_for_a_time() -> None:
    """A field that is only named like one has no example."""
    with pytest.raises(InvalidData) as caught:
        Signature.of("day: Day, n: int", {"Day": Day}).decode(b'{"day": {}, "n": "x"}')
    assert not [error for error in caught.value.errors if "Write a" in error.detail]


class Row2(msgspec.Struct, array_like=True):
    a: int


class Dog(msgspec.Struct, tag=True):
    name: str


class Cat(msgspec.Struct, tag=True):
    name: str


def test_tagged_unions_are_inlined() -> None:
    schema = Signature.of("pet: Dog | Cat", {"Dog": Dog, "Cat": Cat}).schema
    assert "$defs" not in json.dumps(schema)
    tags = [member["properties"]["type"]["enum"] for member in schema["properties"]["pet"]["anyOf"]]
    assert sorted(tags) == [["Cat"], ["Dog"]]


def test_an_invalid_type_of_signature_is_refused() -> None:
    for source in (int, 5, None, list[str], Row2):
        with pytest.raises(SignatureError, match="A signature must be a string"):
            Signature.of(source)


def test_a_type_that_json_cannot_represent_is_refused() -> None:
    class Socket:
        pass

    class Wrapper(msgspec.Struct):
        socket: Socket

    with pytest.raises(SignatureError, match=r"Wrapper cannot be read from JSON: type .*Socket'> is not supported"):
        Signature.of(Wrapper)


# Functions


def test_parameters_become_fields() -> None:
    def book(
        invoice: Invoice,
        tags: list[str] = ["new"],  # noqa: B006
        *,
        limit: Annotated[int, "at most"] = 5,
        note: "str | None" = None,
    ) -> None: ...

    signature = Signature.of_parameters(book)
    assert [(f.name, f.type, f.description, f.required) for f in signature.fields] == [
        ("invoice", Invoice, "", True),
        ("tags", list[str], "", False),
        ("limit", int, "at most", False),
        ("note", Optional[str], "", False),  # noqa: UP045
    ]
    assert signature.schema["properties"]["tags"]["default"] == ["new"]
    assert signature.schema["properties"]["limit"] == {"type": "integer", "description": "at most", "default": 5}


def test_a_mutable_default_is_not_shared() -> None:
    def remember(tags: list[str] = ["new"]) -> None: ...  # noqa: B006

    signature = Signature.of_parameters(remember)
    signature.decode(b"{}").tags.append("seen")
    assert signature.decode(b"{}").tags == ["new"]


def test_msgspec_meta_is_kept() -> None:
    def f(n: Annotated[int, msgspec.Meta(ge=1, description="from one")]) -> None: ...

    signature = Signature.of_parameters(f)
    assert signature.fields[0].description == "from one"
    with pytest.raises(InvalidData, match=">= 1"):
        signature.decode(b'{"n": 0}')


def no_type(a) -> None: ...  # type: ignore[no-untyped-def]
def variadic(*a: int) -> None: ...
def keywords(**a: int) -> None: ...
def positional(a: int, /) -> None: ...
def custom(a: object) -> None: ...
def unknown(a: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def odd_default(a: Any = object()) -> None: ...  # noqa: B008
def private(_a: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (no_type, "no_type: the parameter 'a' needs a type"),
        (variadic, "cannot be passed by name"),
        (keywords, "cannot be passed by name"),
        (positional, "cannot be passed by name"),
        (custom, "custom: 'a' cannot be read from JSON"),
        (unknown, "the type 'Nowhere' is not defined"),
        (odd_default, "'a' cannot be read from JSON"),
        (private, "no leading '_'"),
    ],
)
def test_a_function_that_cannot_be_an_agent_is_refused_with_a_reason(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(SignatureError, match=words.replace("(", r"\(")):
        Signature.of_parameters(function)


def test_the_return_type_becomes_the_output() -> None:
    def as_struct() -> Invoice:
        return Invoice(1)

    def as_number() -> int:
        return 1

    def as_anything(): ...  # type: ignore[no-untyped-def]
    def as_object() -> object: ...

    assert Signature.of_result(as_struct)[1] is False
    signature, is_boxed = Signature.of_result(as_number)
    assert is_boxed
    assert [(f.name, f.type) for f in signature.fields] == [("result", int)]
    assert Signature.of_result(as_anything)[0].fields[0].type is Any
    with pytest.raises(SignatureError, match="'result' cannot be read from JSON"):
        Signature.of_result(as_object)


def test_a_callable_object_has_a_signature() -> None:
    class Adder:
        def __call__(self, a: int) -> int:
            return a

    assert [f.name for f in Signature.of_parameters(Adder()).fields] == ["a"]


# Encoding


def test_encode_validates_and_serialises() -> None:
    signature = Signature.of("n: float, when: date, tags: set[str]")
    raw = signature.encode({"n": 1, "when": datetime.date(2026, 11, 24), "tags": {"a"}})
    assert json.loads(bytes(raw)) == {"n": 1.0, "when": "2026-11-24", "tags": ["a"]}


def test_encode_validates_an_instance_of_the_type() -> None:
    with pytest.raises(InvalidData, match="/number: Expected 'int', got 'str'"):
        Signature.of(Invoice).encode(Invoice(number="1"))  # type: ignore[arg-type]


def test_nan_and_infinities_become_null() -> None:
    raw = Signature.of("a: float, b: Any").encode({"a": float("nan"), "b": [float("inf")]})
    assert json.loads(bytes(raw)) == {"a": None, "b": [None]}


def circle() -> Any:
    around: list[Any] = []
    around.append(around)
    return around


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        pytest.param({"a": object()}, "cannot be encoded as JSON", id="object"),
        pytest.param({"a": "\ud800"}, "surrogates not allowed", id="lone surrogate"),
        pytest.param({"a": 10**5000}, "cannot be encoded as JSON", id="huge integer"),
        pytest.param({"a": {(1, 2): 3}}, "cannot be encoded as JSON", id="key that is not text"),
        pytest.param({"a": circle()}, "nested too deeply", id="circle"),
        pytest.param({"a": deep(100_000)}, "nested too deeply", id="deep"),
        pytest.param({}, "/a: This field is required", id="missing"),
        pytest.param({"a": 1, "b": 2}, "/b: Unknown field", id="unknown"),
        pytest.param({"b": "\ud800"}, "surrogates not allowed", id="unknown lone surrogate"),
        pytest.param({"a": 1, "n": float("nan")}, "got `float`", id="NaN in a nullable field"),
        pytest.param(None, "Expected 'object'", id="None"),
        pytest.param("text", "Expected 'object'", id="text"),
    ],
)
def test_a_value_that_cannot_be_json_is_invalid_data(value: Any, words: str) -> None:
    output = "a: Any, n: int | None" if isinstance(value, dict) and "n" in value else "a: Any"
    with pytest.raises(InvalidData, match=words):
        Signature.of(output).encode(value)


def test_the_error_for_a_forgotten_await_says_so() -> None:
    with contextlib.closing(anyio.sleep(1)) as never_awaited, pytest.raises(InvalidData, match="Write await before"):
        Signature.of("a: Any").encode({"a": never_awaited})


def test_text_from_a_person_is_converted_to_the_type_of_its_field() -> None:
    signature = Signature.of("name: str, n: int, tags: list[str], day: date, either: int | str, maybe: int | None")
    texts = {"name": "5", "n": "5", "tags": '["a"]', "day": "2026-11-24", "either": "5", "maybe": "null"}
    values = {name: json.loads(bytes(raw)) for name, raw in signature.from_text(texts).items()}
    assert values == {"name": "5", "n": 5, "tags": ["a"], "day": "2026-11-24", "either": "5", "maybe": None}
    # A number too large for a float is passed on as a number, and refused as one.
    assert bytes(Signature.of("n: float | None").from_text({"n": "1e400"})["n"]) == b"1e400"
    # Other text stays a string, for which input validation reports the error.
    assert {name: bytes(raw) for name, raw in signature.from_text({"n": "x", "other": "y"}).items()} == {
        "n": b'"x"',
        "other": b'"y"',
    }

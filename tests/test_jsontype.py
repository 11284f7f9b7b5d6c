"""JSON decoding, with a pointer to every error."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flock.errors import InvalidData, MalformedJSON
from flock.jsontype import JSONType, check_depth, escape_pointer, explain


class Inner(msgspec.Struct):
    numbers: list[int] = []
    by_name: dict[str, int] = {}
    either: int | list[int] = 0


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    inner: dict[str, Inner] = {}
    pair: tuple[int, str] = (1, "")
    keys: dict[int, int] = {}
    chosen: set[int] = set()


OUTER: JSONType[Outer] = JSONType(Outer)


def errors_of(raw: str | bytes, at: str = "") -> dict[str, str]:
    with pytest.raises(InvalidData) as caught:
        OUTER.decode(raw.encode() if isinstance(raw, str) else raw, at)
    return {error.pointer: error.detail for error in caught.value.errors}


def test_every_error_is_reported_with_its_pointer() -> None:
    raw = '{"nome": "", "inner": 5, "pair": [1, 2], "keys": {"x": 1}}'
    assert errors_of(raw, "/inputs") == {
        "/inputs/nome": "Unknown field. Known fields: name, inner, pair, keys, chosen.",
        "/inputs/name": "This field is required.",
        "/inputs/inner": "Expected 'object', got 'int'.",
        "/inputs/pair/1": "Expected 'str', got 'int'.",
        "/inputs/keys": "Expected 'int', got 'str'.",
    }


@pytest.mark.parametrize("names", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("bad", ["first", "last"])
def test_an_error_in_a_dict_points_to_its_key(names: int, bad: str) -> None:
    """msgspec loses the key. The right key is still reported, with many entries and two levels deep."""
    inner: dict[str, Any] = {f"k{i}": {"by_name": {f"n{j}": j for j in range(3)}} for i in range(names)}
    key = f"k{0 if bad == 'first' else names - 1}"
    inner[key]["by_name"]["n1"] = "one"
    assert list(errors_of(json.dumps({"name": "", "inner": inner}))) == [f"/inner/{key}/by_name/n1"]


def test_the_pointer_ends_at_the_dict_if_the_key_is_ambiguous() -> None:
    """If a key occurs twice, the search sees the last value and the decoder the first."""
    raw = '{"name": "", "inner": {"a": {"by_name": {"x": 1, "y": "z", "y": 2}}}}'
    assert list(errors_of(raw)) == ["/inner/a/by_name"]


def test_pointers_are_escaped() -> None:
    assert escape_pointer("a/b~c") == "a~1b~0c"
    raw = json.dumps({"name": "", "inner": {"a/b~c": {"numbers": [0, "x"]}}})
    assert list(errors_of(raw)) == ["/inner/a~1b~0c/numbers/1"]


def test_an_element_of_a_set_is_identified_by_its_array_index() -> None:
    assert list(errors_of('{"name": "", "chosen": [1, "x"]}')) == ["/chosen/1"]


def test_a_number_out_of_range_is_invalid_not_malformed() -> None:
    assert list(errors_of('{"name": "", "inner": {"a": {"numbers": [1e400]}}}')) == ["/inner/a/numbers/0"]
    assert list(errors_of('{"name": "", "pair": [' + "1" * 5000 + ', ""]}')) == ["/pair/0"]


class Loose(msgspec.Struct):
    anything: Any


def test_a_number_out_of_range_is_found_in_a_field_of_any_type() -> None:
    """Among other members, several levels deep."""
    for number in ("1e400", "-1E+999"):
        raw = f'{{"anything": {{"a": 1.5, "b": {{"c": [1, {number}], "d": 2}}, "e": "x"}}}}'
        with pytest.raises(InvalidData, match=r"^/anything/b/c/1: This number is out of range: the largest is"):
            JSONType(Loose).decode(raw.encode())


def test_a_root_of_the_wrong_type_is_reported() -> None:
    assert errors_of("[]", "/inputs") == {"/inputs": "Expected 'object', got 'array'."}
    assert errors_of("null") == {"": "Expected 'object', got 'null'."}


@pytest.mark.parametrize(
    ("raw", "reason", "line", "column"),
    [
        pytest.param(b'{"name":\n  x}', "invalid character", 2, 3, id="second line"),
        pytest.param(b'{"name": "', "unexpected end", 1, 11, id="truncated"),
        pytest.param(b"", "unexpected end", 1, 1, id="empty"),
        pytest.param('{"ä": é}'.encode(), "invalid character", 1, 7, id="columns count characters"),
        pytest.param(b'{"name": "\xff"}', "invalid UTF-8", 1, 11, id="not UTF-8"),
        pytest.param(b'{"name": "\\ud800"}', "unpaired surrogate", 1, 11, id="lone surrogate"),
        pytest.param(b'{"name": ""} {}', "trailing characters", 1, 15, id="two values"),
        pytest.param(b'{"name": NaN}', "invalid character", 1, 10, id="NaN"),
        pytest.param(b'{"nome": 01}', "invalid number", 1, 11, id="after an unknown field"),
        pytest.param(b'{"name": ' + b"[" * 100_000, "nested too deeply", 1, 1, id="deep"),
    ],
)
def test_malformed_json_is_reported_with_line_and_column(raw: bytes, reason: str, line: int, column: int) -> None:
    with pytest.raises(MalformedJSON, match=reason) as caught:
        OUTER.decode(raw)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_an_escaped_surrogate_pair_is_decoded() -> None:
    assert OUTER.decode(b'{"name": "\\ud83d\\ude00"}').name == "\N{GRINNING FACE}"


class Tagged(msgspec.Struct, tag_field="kind", tag="t"):
    a: int


def test_a_tag_is_not_an_unknown_field() -> None:
    assert JSONType(Tagged).decode(b'{"kind": "t", "a": 1}') == Tagged(1)


class Checked(msgspec.Struct):
    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")


class Large(msgspec.Struct):
    def __post_init__(self) -> None:
        raise MemoryError


def test_memory_that_cannot_be_had_is_not_an_error_of_the_data() -> None:
    with pytest.raises(MemoryError):
        JSONType(Large).decode(b"{}")
    with pytest.raises(MemoryError):
        explain(Large, b"{}", "")


def test_an_error_from_post_init_is_reported() -> None:
    with pytest.raises(InvalidData, match="low is above high"):
        JSONType(Checked).decode(b'{"low": 2, "high": 1}')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["name", "inner", "pair", "keys", "chosen", "x"]), json_values))
def test_every_pointer_resolves_in_the_document(document: dict[str, Any]) -> None:
    """Except for missing fields, which are not in the document."""
    try:
        OUTER.decode(json.dumps(document).encode("utf-8", "surrogatepass"))
    except InvalidData as exc:
        for error in exc.errors:
            value: Any = document
            for token in error.pointer.split("/")[1:]:
                name = token.replace("~1", "/").replace("~0", "~")
                if isinstance(value, list):
                    value = value[int(name)]
                elif name in value:
                    value = value[name]
                else:
                    assert error.detail == "This field is required."
    except MalformedJSON:
        pytest.fail("json.dumps writes JSON")


def depth_of(value: Any) -> int:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if members is None else 1 + max(map(depth_of, members), default=0)


@given(json_values | st.text('[]{}"\\\\').map(lambda text: [text, [text]]))
def test_the_depth_check_agrees_with_the_nesting_of_the_value(value: Any) -> None:
    """Brackets inside strings do not count."""
    raw, depth = json.dumps(value).encode("utf-8", "surrogatepass"), depth_of(value)
    check_depth(raw, depth)
    if depth:
        with pytest.raises(MalformedJSON, match=f"nested deeper than {depth - 1} levels"):
            check_depth(raw, depth - 1)


def test_json_nested_too_deep_is_reported_with_line_and_column() -> None:
    raw = '{"[[\\"[": "é",\n "a": [[], [[1]]]}'.encode()
    check_depth(raw, 4)
    with pytest.raises(MalformedJSON, match="deeper than 3 levels") as caught:
        check_depth(raw, 3)
    assert (caught.value.line, caught.value.column) == (2, 13)


MIB = 1024 * 1024


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"[" * MIB, id="deep"),
        pytest.param(b"[]" * (MIB // 2 - 100) + b"[" * 200, id="flat, then deep"),
        pytest.param(b'"",' * (MIB // 3) + b"[" * 200, id="many strings"),
        pytest.param(b'"[",' * (MIB // 4) + b"[" * 200, id="many brackets in strings"),
        pytest.param(b"[" * 200 + b'"' + b"\\" * MIB, id="an unterminated string of backslashes"),
        pytest.param(b"[" * 200 + b'\\"' * (MIB // 2), id="escaped quotes outside a string"),
        pytest.param(b"[" * 200 + b'"\\' * (MIB // 2), id="alternating quotes and backslashes"),
    ],
)
@pytest.mark.alone
def test_the_depth_check_takes_linear_time(raw: bytes) -> None:
    """A MiB takes less than a tenth of a second. A check that rescans parts of it would take minutes."""
    took_s = []
    for _ in range(3):
        started_at = time.thread_time()
        with pytest.raises(MalformedJSON):
            check_depth(raw, 100)
        took_s.append(time.thread_time() - started_at)
    assert min(took_s) < 0.3


@given(st.binary(max_size=11))
def test_arbitrary_bytes_are_invalid_or_malformed(raw: bytes) -> None:
    with pytest.raises((InvalidData, MalformedJSON)):
        OUTER.decode(raw)  # eleven bytes are too few for a valid document

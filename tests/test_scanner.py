"""The scanner that reads an answer while it is written."""

import json
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flock.models.pieces import Joiner
from flock.models.scanner import Scanner

#: The members of the answers here: two texts, and two values.
FIELDS = {"a": True, "b": True, "n": False, "s": False}


def pieces_of(text: str, cuts: list[int]) -> Iterator[str]:
    ends = sorted({cut % (len(text) + 1) for cut in cuts} | {len(text)})
    start = 0
    for end in ends:
        yield text[start:end]
        start = end


def read(pieces: Iterator[str] | list[str], fields: dict[str, bool] = FIELDS) -> dict[str, Any]:
    """Return what a reader of all reports knows at the end."""
    scanner, known = Scanner(fields), dict[str, Any]()
    for piece in pieces:
        for name, value in scanner.feed(piece):
            is_more = fields[name] and isinstance(value, str)
            assert is_more or name not in known, "a value is reported once"
            known[name] = known.get(name, "") + value if is_more else value
    return known


def in_all_ways(text: str) -> Iterator[dict[str, Any]]:
    """Read *text* as a whole, split at each place, and character by character."""
    for cut in range(len(text) + 1):
        yield read([text[:cut], text[cut:]])
    yield read(list(text))


# What is read

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ANSWERS = st.fixed_dictionaries(
    {}, optional={"a": st.text(), "b": st.text() | VALUES, "n": VALUES, "s": st.text(), "unknown": VALUES}
)
CUTS = st.lists(st.integers(min_value=0, max_value=10_000), max_size=12)
#: Texts with halves of surrogate pairs.
SURROGATES = st.text(alphabet='\ud83d\ude00\ud800\udfffa"\\\u00e9\U0001f600')
SPACES = st.sampled_from([None, 1, "\t", "\r\n "])


@given(ANSWERS, CUTS, st.booleans(), SPACES)
@example({"a": '\U0001f600\\"\n', "n": [{"x": '"}]'}]}, list(range(99)), True, None)
def test_the_reports_add_up_to_the_answer(answer: dict[str, Any], cuts: list[int], ascii_: bool, indent: Any) -> None:
    text = json.dumps(answer, ensure_ascii=ascii_, indent=indent)
    expected = {name: value for name, value in json.loads(text).items() if name in FIELDS and value != ""}
    known = read(pieces_of(text, cuts))
    assert {name: value for name, value in known.items() if value != ""} == expected


@given(SURROGATES, CUTS, st.booleans())
@example("\ud83d", [], True)
@example("\ud83d\ud83d\ude00", [8, 9, 10, 15, 21], True)
@example("\ude00\ud83dx", [], False)
def test_surrogates_are_joined_and_lone_ones_replaced(text: str, cuts: list[int], ascii_: bool) -> None:
    """Escaped, or as characters, which a server can send in two chunks."""
    source = json.dumps({"a": text}, ensure_ascii=ascii_)
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    assert read(pieces_of(source, cuts)).get("a", "") == whole.encode("utf-8", "replace").decode()


@given(SURROGATES, CUTS)
def test_a_joiner_returns_the_same_for_all_pieces(text: str, cuts: list[int]) -> None:
    joiner = Joiner()
    joined = "".join([joiner.add(piece) for piece in pieces_of(text, cuts)]) + joiner.end()
    whole = Joiner()
    assert joined == whole.add(text) + whole.end()
    assert joined.encode().decode() == joined


def test_a_text_is_reported_as_it_grows() -> None:
    scanner = Scanner(FIELDS)
    found = [scanner.feed(piece) for piece in ('{"a"', ': "He', "l\\", 'n", "n', '": [1,', " 2]", ' , "s": "x', '"}')]
    assert found == [[], [("a", "He")], [("a", "l")], [("a", "\n")], [], [("n", [1, 2])], [], [("s", "x")]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('Here it is: {"a": "x"}', {"a": "x"}, id="text before"),
        pytest.param('```json\n{"a": "x"}\n```', {"a": "x"}, id="code fence"),
        pytest.param('{"a": "x"} {"a": "y", "b": "z"}', {"a": "x"}, id="two objects"),
        pytest.param('{"a": "x"}, "b": "y"}', {"a": "x"}, id="text after"),
        pytest.param('{"other": {"a": "x"}, "a": "y"}', {"a": "y"}, id="nested name"),
        pytest.param('{"other": "\\", \\"a\\": ", "a": "y"}', {"a": "y"}, id="name in a string"),
        pytest.param('{"\\u0061": "x"}', {"a": "x"}, id="escaped name"),
        pytest.param('{"a": null, "b": 5}', {"a": None, "b": 5}, id="other values of texts"),
        pytest.param('{"n":-1.5e3}', {"n": -1500.0}, id="number at the end"),
        pytest.param('{"n" :\t[ ] , "s":"]"}', {"n": [], "s": "]"}, id="spaces and brackets"),
        pytest.param("{}", {}, id="empty"),
        pytest.param("", {}, id="nothing"),
        pytest.param("no JSON here", {}, id="prose"),
    ],
)
def test_the_first_object_is_read(text: str, expected: dict[str, Any]) -> None:
    assert all(known == expected for known in in_all_ways(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param('{"a": "x", "b": "y', {"a": "x", "b": "y"}, id="cut in a text"),
        pytest.param('{"a": "x\\', {"a": "x"}, id="cut in an escape"),
        pytest.param('{"a": "x", "n": [1, 2', {"a": "x"}, id="cut in a list"),
        pytest.param('{"a": "x\\q", "b": "y"}', {"a": "x"}, id="unknown escape"),
        pytest.param('{"a": "x\\u12g4", "b": "y"}', {"a": "x"}, id="bad digits"),
        pytest.param('{"a": "x\ny", "b": "y"}', {"a": "x"}, id="line break in a string"),
        pytest.param('{"a": "x" "b": "y"}', {"a": "x"}, id="no comma"),
        pytest.param('{"a": "x", , "b": "y"}', {"a": "x"}, id="two commas"),
        pytest.param('{"a": "x", "n": [1}, "b": "y"}', {"a": "x"}, id="wrong bracket"),
        pytest.param('{"a": "x", "n": 01, "b": "y"}', {"a": "x"}, id="bad number"),
        pytest.param('{"a": "x", "n": NaN, "b": "y"}', {"a": "x"}, id="NaN"),
        pytest.param('{"a": "x", "n": , "b": "y"}', {"a": "x"}, id="no value"),
        pytest.param('{"a": "x", b: "y"}', {"a": "x"}, id="name without quotes"),
        pytest.param('{"a": "x", "a": "y", "b": "z"}', {"a": "x"}, id="a name twice"),
        pytest.param('{"a" "x"}', {}, id="no colon"),
        pytest.param('{not JSON} {"a": "x"}', {}, id="brace in prose"),
        pytest.param('{"a": "x", "s": "\\ud800", "b": "y"}', {"a": "x"}, id="lone surrogate in a value"),
    ],
)
def test_broken_json_ends_the_reports(text: str, expected: dict[str, Any]) -> None:
    assert all(known == expected for known in in_all_ways(text))


@given(st.text(alphabet='{}[]",:\\u0aebn 1-'), CUTS)
def test_pieces_make_no_difference(rest: str, cuts: list[int]) -> None:
    """What is reported for any text depends on the text only, and agrees with JSON."""
    text = '{"a": "' + rest
    known = read(pieces_of(text, cuts))
    assert known == read([text])
    try:
        answer = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return
    if len(json.loads(text, object_pairs_hook=list)) == len(answer):
        assert all(known.get(name, "") == answer[name] for name in FIELDS if name in answer)


def test_a_value_that_is_nested_too_deeply_is_not_reported() -> None:
    assert read(['{"n": ' + "[" * 100_000, "]" * 100_000 + ', "a": "x"}']) == {}


@pytest.mark.alone
@pytest.mark.parametrize("start", ['{"a": "', '{"n": ["', '{"unknown": "', "prose", '{"'])
def test_a_piece_takes_no_longer_late_in_an_answer(start: str) -> None:
    scanner = Scanner(FIELDS)
    scanner.feed(start)
    times = []
    for _ in range(20):
        started = time.process_time()
        for _ in range(5000):
            scanner.feed("x")
        times.append(time.process_time() - started)
    assert min(times[-5:]) < 3 * min(times[:5])

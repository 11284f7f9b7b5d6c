"""A scanner for a JSON object that a model is still writing."""

import json
import re
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

import msgspec

from flock.models.pieces import Joiner
from flock.runs import safe_text

#: What precedes the object.
BEFORE = re.compile(r"[^{]*+")
#: Complete characters and escapes in a string.
IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*+')
#: An escape that continues in the next piece.
PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?")
SPACE = re.compile(r"[ \t\r\n]*+")
#: A number, true, false or null.
SCALAR = re.compile(r"[-+.0-9A-Za-z]*+")
#: The text before the next quote or bracket in a list or object.
NESTED = re.compile(r'[^"\[\]{}]*+')


T = TypeVar("T")
Reader = Generator[None, None, T]


class _Broken(Exception):
    """The text is not a JSON object."""


def _ignore(part: str) -> None: ...


class Scanner:
    """Reads the members of a JSON object while its text arrives, in one pass over the characters.

    It skips what precedes the first ``{``, and ignores what follows the object. It stops if the JSON is broken, or if a
    name occurs twice.

    Args:
        fields: the members to report, and whether each is text. A string of a text is reported as it grows; any other
            value when it is complete.
    """

    def __init__(self, fields: Mapping[str, bool]) -> None:
        self._fields = fields
        self._found: list[tuple[str, Any]] = []
        self._text, self._at = "", 0
        self._reader = self._object()

    def feed(self, piece: str) -> list[tuple[str, Any]]:
        """Return what *piece* adds: names of fields, each with more of its text or with its value."""
        self._text, self._at = self._text[self._at :] + piece, 0
        self._found = []
        try:
            next(self._reader)
        except (StopIteration, _Broken):
            self._at = len(self._text)
        return self._found

    # Readers: generators that yield when they need more text

    def _object(self) -> Reader[None]:
        yield from self._until(BEFORE)
        self._at += 1
        names: set[str] = set()
        while (yield from self._char()) == '"':
            source = list[str]()
            yield from self._string(source.append)
            name = json.loads(f'"{"".join(source)}"')
            if name in names or (yield from self._char()) != ":":
                return
            names.add(name)
            yield from self._value(name)
            if (yield from self._char()) != ",":  # the end, or the JSON is broken
                return

    def _value(self, name: str) -> Reader[None]:
        char = yield from self._until(SPACE)
        if char == '"' and self._fields.get(name):
            self._at += 1
            joiner = Joiner()
            yield from self._string(lambda source: self._report(name, joiner.add(json.loads(f'"{source}"'))))
            self._report(name, joiner.end())
            return
        source, depth = list[str](), 0
        keep = source.append if name in self._fields else _ignore
        while True:
            char = yield from self._until(NESTED if depth else SCALAR, keep)
            if not depth and char not in '"[{':  # the end of a scalar
                break
            self._at += 1
            keep(char)
            if char == '"':
                yield from self._string(keep)
                keep('"')
            depth += (char in "[{") - (char in "]}")
            if not depth:
                break
        if name in self._fields:
            try:
                self._found.append((name, msgspec.json.decode(safe_text("".join(source)))))
            except (msgspec.DecodeError, RecursionError) as exc:
                raise _Broken from exc

    def _string(self, keep: Callable[[str], None]) -> Reader[None]:
        """Read the rest of a string, and pass the source of each part to *keep*."""
        while True:
            keep(self._take(IN_STRING))
            if self._text.startswith('"', self._at):
                self._at += 1
                return
            if self._at < len(self._text) and not PART_OF_ESCAPE.fullmatch(self._text, self._at):
                raise _Broken
            yield

    def _char(self) -> Reader[str]:
        """Read white space and the next character, and return it."""
        char = yield from self._until(SPACE)
        self._at += 1
        return char

    def _until(self, pattern: re.Pattern[str], keep: Callable[[str], None] = _ignore) -> Reader[str]:
        """Pass what *pattern* matches to *keep*, and return the character after it, which is not read yet."""
        while True:
            keep(self._take(pattern))
            if self._at < len(self._text):
                return self._text[self._at]
            yield

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Return what *pattern*, which also matches an empty text, matches here."""
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match[0]

    def _report(self, name: str, text: str) -> None:
        if text:
            self._found.append((name, text))

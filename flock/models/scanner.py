"""A scanner for a JSON object that a model is still writing."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from flock.models.pieces import Joiner
from flock.runs import safe_text

__all__ = ["Scanner"]

#: Complete characters and escapes in a string.
IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9A-Fa-f]{4})*+')
#: An escape that continues in the next piece.
PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9A-Fa-f]{0,3})?")
SPACE = re.compile(r"[ \t\r\n]*+")
#: A number, true, false or null.
SCALAR = re.compile(r"[-+.0-9A-Za-z]*+")
#: What precedes the next quote or bracket in a list or object.
NESTED = re.compile(r'[^"\[\]{}]*+')


class _Broken(Exception):
    """The text is not a JSON object."""


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
        self._seen: set[str] = set()
        self._text, self._at = "", 0
        #: reads more of the text, and sets the next reader; None at the end
        self._read: Callable[[], None] | None = self._before
        self._name = ""
        #: the name or value that is not complete
        self._parts: list[str] = []
        self._depth, self._in_string = 0, False
        self._joiner = Joiner()

    def feed(self, piece: str) -> list[tuple[str, Any]]:
        """Return what *piece* adds: names of fields, each with more of its text or with its value."""
        self._text, self._at = self._text[self._at :] + piece, 0
        self._found = []
        try:
            while self._read is not None and self._at < len(self._text):
                before = self._read, self._at
                self._read()
                if before == (self._read, self._at):  # the rest is a part of an escape
                    return self._found
        except _Broken:
            self._read = None
        self._text, self._at = "", 0
        return self._found

    # Readers

    def _before(self) -> None:
        self._at = self._text.find("{") + 1
        if self._at:
            self._read = self._first_name
        else:
            self._at = len(self._text)

    def _first_name(self) -> None:
        self._expect({'"': self._in_name, "}": None})

    def _later_name(self) -> None:
        self._expect({'"': self._in_name})

    def _in_name(self) -> None:
        self._parts.append(self._take(IN_STRING))
        if self._ends_string():
            self._name = json.loads(f'"{self._source()}"')
            if self._name in self._seen:
                raise _Broken
            self._seen.add(self._name)
            self._read = self._colon

    def _colon(self) -> None:
        self._expect({":": self._value})

    def _value(self) -> None:
        self._take(SPACE)
        if self._fields.get(self._name) and self._text.startswith('"', self._at):
            self._at += 1
            self._read = self._in_text
        elif self._at < len(self._text):
            self._read = self._in_value

    def _in_text(self) -> None:
        self._report(self._joiner.add(json.loads(f'"{self._take(IN_STRING)}"')))
        if self._ends_string():
            self._report(self._joiner.end())
            self._read = self._after_value

    def _in_value(self) -> None:
        if self._in_string:
            self._keep(self._take(IN_STRING))
            if not self._ends_string():
                return
            self._in_string = False
            self._keep('"')
        else:
            self._keep(self._take(NESTED if self._depth else SCALAR))
            char = self._text[self._at : self._at + 1]
            if not char:
                return
            if char in '"[{' or self._depth:
                self._at += 1
                self._keep(char)
            self._in_string = char == '"'
            self._depth += (char in "[{") - (char in "]}" and self._depth > 0)
        if not self._depth and not self._in_string:
            self._end_value()

    def _end_value(self) -> None:
        source = self._source()
        if self._name in self._fields:
            try:
                self._found.append((self._name, msgspec.json.decode(safe_text(source))))
            except (msgspec.DecodeError, RecursionError) as exc:
                raise _Broken from exc
        self._read = self._after_value

    def _after_value(self) -> None:
        self._expect({",": self._later_name, "}": None})

    # What they use

    def _take(self, pattern: re.Pattern[str]) -> str:
        """Return what *pattern*, which also matches an empty text, matches here."""
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match[0]

    def _expect(self, readers: Mapping[str, Callable[[], None] | None]) -> None:
        """Skip white space and one of the given characters, and continue with its reader."""
        self._take(SPACE)
        if self._at < len(self._text):
            char = self._text[self._at]
            if char not in readers:
                raise _Broken
            self._at += 1
            self._read = readers[char]

    def _ends_string(self) -> bool:
        """Skip the quote that ends a string. Return whether there is one."""
        if self._text.startswith('"', self._at):
            self._at += 1
            return True
        if self._at < len(self._text) and not PART_OF_ESCAPE.fullmatch(self._text, self._at):
            raise _Broken
        return False

    def _report(self, text: str) -> None:
        if text:
            self._found.append((self._name, text))

    def _keep(self, part: str) -> None:
        if self._name in self._fields:
            self._parts.append(part)

    def _source(self) -> str:
        source = "".join(self._parts)
        self._parts.clear()
        return source

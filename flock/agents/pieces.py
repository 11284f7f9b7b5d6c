"""Text that arrives in pieces."""

import re

__all__ = ["REPLACEMENT", "Joiner", "joined"]

#: Replaces what an agent writes that is not a character (Unicode, section 5.22).
REPLACEMENT = "\ufffd"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Joiner:
    """Joins the halves of surrogate pairs, and replaces lone ones, which cannot be sent or stored, with *lone*."""

    def __init__(self, lone: str = "?") -> None:
        self._high, self._lone = "", lone

    def add(self, piece: str) -> str:
        """Return the text that is complete now. A high surrogate at the end waits for its other half."""
        if not self._high and piece.isascii():
            return piece
        text = self._high + piece
        self._high = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return joined(text[: len(text) - len(self._high)], self._lone)

    def end(self) -> str:
        """Return the rest."""
        text, self._high = self._high, ""
        return joined(text, self._lone)


def joined(text: str, lone: str = "?") -> str:
    """Return a complete text, in the same way."""
    return LONE_SURROGATE.sub(lone, text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass"))

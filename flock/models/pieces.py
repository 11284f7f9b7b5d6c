"""Text that arrives in pieces."""

from flock.runs import safe_text

__all__ = ["Joiner", "joined"]


class Joiner:
    """Joins the halves of surrogate pairs, and replaces lone ones, which cannot be sent or stored."""

    def __init__(self) -> None:
        self._high = ""

    def add(self, piece: str) -> str:
        """Return the text that is complete now. A high surrogate at the end waits for its other half."""
        if not self._high and piece.isascii():
            return piece
        text = self._high + piece
        self._high = text[-1:] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return joined(text[: len(text) - len(self._high)])

    def end(self) -> str:
        """Return the rest."""
        text, self._high = self._high, ""
        return joined(text)


def joined(text: str) -> str:
    """Return a complete text, in the same way."""
    return safe_text(text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass"))

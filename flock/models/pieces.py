"""Text that arrives in pieces."""

import codecs

from flock.runs import safe_text

#: With "surrogatepass" it joins the halves of pairs, also of those that arrive in two pieces, and keeps lone ones.
UTF_16_DECODER = codecs.getincrementaldecoder("utf-16-le")


class Joiner:
    """Joins the halves of surrogate pairs, and replaces lone ones, which cannot be sent or stored."""

    def __init__(self) -> None:
        self._decoder = UTF_16_DECODER("surrogatepass")
        self._has_half = False

    def add(self, piece: str) -> str:
        """Return the text that is complete now. A high surrogate at the end waits for its other half."""
        if not self._has_half and piece.isascii():
            return piece
        text = self._decoder.decode(piece.encode("utf-16-le", "surrogatepass"))
        self._has_half = self._decoder.getstate()[0] != b""
        return safe_text(text)

    def end(self) -> str:
        """Return the rest."""
        return safe_text(self._decoder.decode(b"", final=True))


def joined(text: str) -> str:
    """Return a complete text, in the same way."""
    joiner = Joiner()
    return joiner.add(text) + joiner.end()

"""Rows in: the items of a batch as a client writes them, with names to map and gaps to fill."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from flock.errors import FieldError, InvalidData, TooLarge
from flock.jsontype import escape_pointer

__all__ = ["EXPANSION", "Rows"]

#: How many times as long as a body its rows may become with their static inputs.
EXPANSION = 16


class Rows:
    """The rows of one batch.

    Args:
        rows: as they were sent.
        static: inputs that each row has which does not bring its own.
        names: what a member of a row is called as an input.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, msgspec.Raw]],
        static: Mapping[str, msgspec.Raw] | None,
        names: Mapping[str, str] | None,
    ) -> None:
        self._rows = rows
        self._static = static or {}
        self._names = names or {}

    def inputs(self, max_bytes: int) -> Iterator[msgspec.Raw]:
        """The inputs of each item: names mapped, gaps filled.

        Raises:
            InvalidData: two members of a row become one input.
            TooLarge: all together are longer than *max_bytes*; static inputs are sent once, and kept often.
        """
        total = 0
        for position, row in enumerate(self._rows):
            if self._names:
                self._sources(position)  # raises where two become one
            encoded = msgspec.json.encode({**self._static, **{self._names.get(key, key): row[key] for key in row}})
            total += len(encoded)
            if total > max_bytes:
                raise TooLarge(f"With the static inputs the rows are longer than {max_bytes} bytes together.")
            yield msgspec.Raw(encoded)

    def as_sent(self, exc: InvalidData) -> InvalidData:
        """Errors of inputs with pointers into what the client sent: names not yet mapped, gaps not yet filled."""
        errors = {}
        for error in exc.errors:
            pointer = error.pointer
            _, *tokens = pointer.split("/")
            if len(tokens) > 2:
                sources = {escape_pointer(name): place for name, place in self._sources(int(tokens[1])).items()}
                pointer = "/".join([sources.get(tokens[2], "/".join(["", *tokens[:3]])), *tokens[3:]])
            errors[pointer, error.detail] = FieldError(detail=error.detail, pointer=pointer)
        return InvalidData(list(errors.values()))

    def _sources(self, position: int) -> dict[str, str]:
        """For each input of one item where the client wrote it, as a JSON pointer; the item wins over static inputs."""
        sources = {name: f"/static_inputs/{escape_pointer(name)}" for name in self._static}
        own: set[str] = set()
        for key in self._rows[position]:
            name, pointer = self._names.get(key, key), f"/batch_inputs/{position}/{escape_pointer(key)}"
            if name in own:
                detail = f"Another member becomes the input {name!r} too."
                raise InvalidData([FieldError(detail=detail, pointer=pointer)])
            own.add(name)
            sources[name] = pointer
        return sources

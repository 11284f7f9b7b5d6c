"""The result of a generator that is an agent."""

from typing import Any

import msgspec


class Result(msgspec.Struct, frozen=True):
    """The result of a generator that writes text: ``yield Result(value)``. Without it, a text is a part of the output.

    It is only needed if the result is itself a text, and differs from the text that was written.
    """

    value: Any

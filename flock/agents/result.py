"""The result of a generator that is an agent."""

from typing import Any

import msgspec


class Result(msgspec.Struct, frozen=True):
    """The result of a generator that writes text: ``yield Result(value)``. Without it, a text is a part of the output.

    Only a result that is a text itself, and another one than was written, needs it.
    """

    value: Any

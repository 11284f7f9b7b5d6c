"""The nearest known name to one that is not known, for messages."""

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`` Did you mean 'str'?`` with the nearest of the *known* names, whatever its case; or nothing if none is near."""
    by_lower = {each.lower(): each for each in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, 1, cutoff)
    return f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""

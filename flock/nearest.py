"""Suggestions for misspelled names, for messages."""

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `` Did you mean 'str'?`` with the closest *known* name, ignoring case, or "" if none is close."""
    import difflib  # only messages of errors need it

    by_lower = {known_name.lower(): known_name for known_name in known}
    nearest = difflib.get_close_matches(name.lower(), by_lower, 1, cutoff)
    return f" Did you mean {by_lower[nearest[0]]!r}?" if nearest else ""

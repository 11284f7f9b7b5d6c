"""Content negotiation: the ``Prefer`` and ``Accept`` headers."""

import re
from collections.abc import Sequence


def preferences(sent: Sequence[str]) -> dict[str, str]:
    """Parse ``Prefer``, without parameters. If a preference is sent twice, the first one counts (RFC 7240, 2)."""
    if not sent:
        return {}
    from urllib.request import parse_http_list  # imported here, because it loads a client for all of HTTP and FTP

    found: dict[str, str] = {}
    for preference in parse_http_list(",".join(sent)):
        name, _, value = preference.partition(";")[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    return found


def preferred(accept: str, offered: Sequence[str]) -> str | None:
    """Return the media type in *offered* that *accept* prefers, or None if it accepts none of them.

    If several have the same quality, the first one counts (RFC 9110, section 12.5.1).
    """
    sent: dict[str, float] = {}
    for range_ in accept.lower().split(",") if accept.strip() else ["*/*"]:
        name, *parameters = (part.strip() for part in range_.split(";"))
        weight = next((p[2:] for p in parameters if p.startswith("q=")), "1")
        sent[name] = float(weight) if re.fullmatch(r"[01](\.[0-9]{0,3})?", weight) else 1.0

    def quality(media_type: str) -> float:
        """Return the quality of the most specific range that matches."""
        ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
        return next((sent[name] for name in ranges if name in sent), 0.0)

    best = max(offered, key=quality)
    return best if quality(best) > 0 else None

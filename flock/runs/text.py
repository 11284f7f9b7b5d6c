"""Text from outside that is stored, sent or logged."""

import re

__all__ = ["for_terminal", "of_request", "one_line", "safe_text", "valid_traceparent"]

#: What a terminal may execute, not show: C0, DEL and C1 except newlines and tabs, and bidirectional controls.
CONTROLS = "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|\r(?!\n)"

#: A later version may append fields to those of version 00.
TRACEPARENT = r"(?!ff)([0-9a-f]{2})(-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2})(-.*)?"


def valid_traceparent(sent: str | None) -> str | None:
    """Return *sent* as version 00, or None if it is invalid (W3C Trace Context, sections 3.2 and 4.3)."""
    match = re.fullmatch(TRACEPARENT, sent) if sent else None
    return None if match is None or (match[1] == "00" and match[3]) else f"00{match[2]}"


def safe_text(value: object) -> str:
    """Return *value* as text that can be stored and sent, even if it has lone surrogates or its ``str()`` fails."""
    try:
        return str(value).encode("utf-8", "replace").decode()
    except Exception:
        return f"({type(value).__name__})"


def of_request(request_id: str | None) -> str:
    """Return `` (request ID)``, which ends a line of the log, or "" if there was no request."""
    return "" if request_id is None else f" (request {request_id})"


def for_terminal(text: str) -> str:
    """Return *text* with CONTROLS as ``\\uXXXX``. JSON stays the same JSON."""
    return re.sub(CONTROLS, lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    """Return *text* with line breaks, terminal escapes and other non-printable characters escaped, for the log."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)

"""The HTTP client of calls: httpx, or httpx2, which has the same API and needs half the CPU time for a call.

Each is imported at its first use, since that takes as long as the import of all our modules.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def library(transport: object = None) -> Any:
    """Return httpx2 if it is installed, otherwise httpx. A *transport* of a user is one of httpx."""
    has_newer = transport is None and importlib.util.find_spec("httpx2") is not None
    return importlib.import_module("httpx2" if has_newer else "httpx")


def url_for(client: Any, url: str) -> Any:
    """Return *url* as a client of httpx or httpx2 has it. Of a text, it would parse each part in each call."""
    make: Callable[[str], Any] = type(client.base_url)
    return _parsed(make, url)


@functools.lru_cache(maxsize=100)
def _parsed(make: Callable[[str], Any], url: str) -> Any:
    return make(url)


def errors(name: str) -> tuple[type[Exception], ...]:
    """Return the exception *name* of both, as far as they are imported."""
    found = (getattr(sys.modules.get(module), name, None) for module in ("httpx2", "httpx"))
    return tuple(error for error in found if error is not None)

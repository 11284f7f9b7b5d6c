"""The specification as an app serves it, and the docs pages. They are files of the package with the app's title."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

PACKAGE = Path(__file__).parent.parent
STATIC = PACKAGE / "static"

#: The pages may load only files of this server. ReDoc would fetch a logo from another host.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Contract:
    """``openapi.yaml`` with the title and the additional paths of one app.

    Args:
        title: the title of the specification and of the pages.
        more_paths: path items to add to those of the file.
    """

    def __init__(self, title: str, more_paths: Mapping[str, Any] | None = None) -> None:
        self.title = title
        self._more_paths = more_paths or {}

    def as_yaml(self) -> bytes:
        """Return the file with its comments. With additional paths, return JSON, which is also valid YAML."""
        if self._more_paths:
            return self.as_json()
        in_checkout = PACKAGE.parent / "openapi.yaml"  # a wheel has it inside the package
        text = (in_checkout if in_checkout.is_file() else PACKAGE / "openapi.yaml").read_text("utf-8")
        title = json.dumps(self.title)  # a JSON string is a YAML string
        return re.sub(r"(?m)^  title: .*$", lambda _: f"  title: {title}", text, count=1).encode()

    def as_json(self) -> bytes:
        """Return the specification as JSON."""
        spec = json.loads((STATIC / "openapi.json").read_bytes())
        spec["info"]["title"] = self.title
        spec["paths"] |= self._more_paths
        return msgspec.json.encode(spec) + b"\n"

    def page(self, name: str) -> str:
        """Return a page of ``static/``. Send it with ``PAGE_HEADERS``."""
        return (STATIC / name).read_text("utf-8").replace("{title}", html.escape(self.title))

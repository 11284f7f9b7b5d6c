"""The contract as an app serves it, and the pages that show it: files of the package with the app's name in them."""

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

__all__ = ["PAGE_HEADERS", "STATIC", "Contract"]

PACKAGE = Path(__file__).parent.parent
STATIC = PACKAGE / "static"

#: What the pages may load: files of this server. ReDoc would fetch a logo from elsewhere.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
        "worker-src 'self' blob:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Contract:
    """``openapi.yaml`` with the title of one app, and what its owner added.

    Args:
        title: of the specification and of the pages.
        more_paths: path items beside those of the file.
    """

    def __init__(self, title: str, more_paths: Mapping[str, Any] | None = None) -> None:
        self.title = title
        self._more_paths = more_paths or {}

    def as_yaml(self) -> bytes:
        """The file as it is, comments and all; as JSON, which is YAML too, if there are more paths."""
        if self._more_paths:
            return self.as_json()
        beside = PACKAGE.parent / "openapi.yaml"  # in a checkout; a wheel has it inside the package
        text = (beside if beside.is_file() else PACKAGE / "openapi.yaml").read_text("utf-8")
        title = json.dumps(self.title)  # a JSON string is a YAML string
        return re.sub(r"(?m)^  title: .*$", lambda _: f"  title: {title}", text, count=1).encode()

    def as_json(self) -> bytes:
        """The same as JSON."""
        spec = json.loads((STATIC / "openapi.json").read_bytes())
        spec["info"]["title"] = self.title
        spec["paths"] |= self._more_paths
        return msgspec.json.encode(spec) + b"\n"

    def page(self, name: str) -> str:
        """A page of ``static/``; send it with ``PAGE_HEADERS``."""
        return (STATIC / name).read_text("utf-8").replace("{title}", html.escape(self.title))

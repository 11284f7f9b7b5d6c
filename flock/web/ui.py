"""The web page at ``/ui``: files of the package, in the form in which they are sent."""

import gzip
import hashlib
import html
import mimetypes
import re
from collections.abc import Mapping

import msgspec

from flock.web.contract import STATIC

__all__ = ["UIFile", "takes_gzip", "ui_files"]


class UIFile(msgspec.Struct, frozen=True):
    """One file. ``etag`` is weak: it is the same for both forms."""

    media_type: str
    etag: str
    plain: bytes
    gzipped: bytes


def ui_files(title: str, *, has_docs: bool = True) -> Mapping[str, UIFile]:
    """All files of the page by name, with *title* in it, and a link to the docs pages; read and compressed once."""
    files = {path.name: path.read_bytes() for path in sorted((STATIC / "ui").iterdir())}
    page = files["index.html"] if has_docs else re.sub(rb' *<a href="docs">.*?</a>\n', b"", files["index.html"])
    files["index.html"] = page.replace(b"{title}", html.escape(title).encode())
    return {name: _file(name, plain) for name, plain in files.items()}


def _file(name: str, plain: bytes) -> UIFile:
    media_type = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "text/plain"
    etag = f'W/"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return UIFile(media_type, etag, plain, gzip.compress(plain, 9, mtime=0))


def takes_gzip(accept_encoding: str) -> bool:
    """Whether a client takes it (RFC 9110, section 12.5.3). Who says nothing is sent the file as it is."""
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accept_encoding, re.IGNORECASE) is not None

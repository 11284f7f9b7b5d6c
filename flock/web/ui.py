"""The files of the web page at ``/ui``, ready to be sent."""

import graphlib
import gzip
import hashlib
import html
import mimetypes
import re
from collections.abc import Collection, Mapping

import msgspec

from flock.web.contract import STATIC

__all__ = ["UIFile", "takes_gzip", "ui_files"]

#: The script that loads the views, and the first view.
ENTRY, FIRST_VIEW = "main.js", "agents.js"
#: A static import in the form that all our scripts use. They never rename an import.
IMPORT = re.compile(rb'^import \{(?P<names>[^}]*)\} from "\./(?P<module>[\w.]+)";\n', re.MULTILINE)


class UIFile(msgspec.Struct, frozen=True):
    """One file. ``etag`` is weak, since it is the same for the plain and the compressed form."""

    media_type: str
    etag: str
    plain: bytes
    gzipped: bytes


def ui_files(title: str, *, has_docs: bool = True) -> Mapping[str, UIFile]:
    """Return all files of the page by name, with *title* and, if *has_docs*, a link to the docs pages."""
    files = {path.name: path.read_bytes() for path in sorted((STATIC / "ui").iterdir())}
    page = files["index.html"] if has_docs else re.sub(rb' *<a href="docs">.*?</a>\n', b"", files["index.html"])
    files["index.html"] = page.replace(b"{title}", html.escape(title).encode())
    return {name: _file(name, plain) for name, plain in _bundled(files).items()}


def _bundled(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Bundle all modules that the first paint needs into one script, since one request for each would be slower.

    The other scripts import from the bundle instead of from those modules.
    """
    imports: dict[str, list[str]] = {}
    pending = [ENTRY, FIRST_VIEW]
    while pending:
        name = pending.pop()
        if name not in imports:
            imports[name] = [match["module"].decode() for match in IMPORT.finditer(files[name])]
            pending += imports[name]
    order = [name for name in graphlib.TopologicalSorter(imports).static_order() if name != FIRST_VIEW]
    rest = {name: _from_entry(plain, order) for name, plain in files.items() if name not in order}
    return {**rest, ENTRY: b"\n".join(IMPORT.sub(b"", files[name]) for name in order)}


def _from_entry(script: bytes, bundled: Collection[str]) -> bytes:
    imports = [match for match in IMPORT.finditer(script) if match["module"].decode() in bundled]
    for match in imports:
        script = script.replace(match[0], b"")
    names = b", ".join(match["names"].strip(b" ,\n") for match in imports)
    return b'import { %s } from "./%s";\n' % (names, ENTRY.encode()) + script if names else script


def _file(name: str, plain: bytes) -> UIFile:
    media_type = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "text/plain"
    etag = f'W/"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return UIFile(media_type, etag, plain, gzip.compress(plain, 9, mtime=0))


def takes_gzip(accept_encoding: str) -> bool:
    """Whether a client accepts gzip (RFC 9110, section 12.5.3). Without ``Accept-Encoding`` it does not."""
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accept_encoding, re.IGNORECASE) is not None

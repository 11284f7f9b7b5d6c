"""The files of the web page at ``/ui``, ready to be sent."""

import graphlib
import gzip
import hashlib
import html
import mimetypes
import re
from collections.abc import Mapping, Sequence

import msgspec

from flock.web.contract import STATIC

#: The script that loads the views.
ENTRY = "main.js"
#: A static import in the form that all our scripts use. They never rename an import.
IMPORT = rb'(?m)^import \{(?P<names>[^}]*)\} from "\./(?P<module>[\w.]+)";\n'

#: What is kept as it is in a script: strings, templates and regular expressions. A division has a space after it.
KEPT = rb"""("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`[^`]*`|/(?=[^ /*])(?:[^/\\\n\[]|\\.|\[(?:[^\]\\\n]|\\.)*\])+/)"""
#: What browsers need not load: comments, and space around punctuation. Each statement ends with a semicolon.
COMMENT = re.compile(KEPT + rb"|//[^\n]*|(?s:/\*.*?\*/)")
SPACE = re.compile(KEPT + rb"|\s*([{}()\[\],;:?=<>&|!]+)\s*|\n\s*(?=\n)")
SPACE_OF_STYLE = re.compile(rb"\s*([{};,]|:(?= ))\s*")
#: A semicolon or a comma before a bracket that closes. No statement is empty.
LAST = re.compile(KEPT + rb"|;(?=\})|,(?=[)}\]])")


class UIFile(msgspec.Struct, frozen=True):
    """One file. ``etag`` is weak, since it is the same for the plain and the compressed form."""

    media_type: str
    etag: str
    plain: bytes
    gzipped: bytes


def ui_files(title: str, *, has_docs: bool = True, has_webhooks: bool = True) -> Mapping[str, UIFile]:
    """Return all files of the page by name, with *title*, and links to the docs and the webhooks if there are any."""
    files = {path.name: path.read_bytes() for path in sorted((STATIC / "ui").iterdir())}
    page = files["index.html"]
    for link, is_there in ((b"docs", has_docs), (b"#/webhooks", has_webhooks)):
        page = page if is_there else re.sub(rb' *<a href="%s".*?</a>\n' % link, b"", page)
    files["index.html"] = page.replace(b"{title}", html.escape(title).encode())
    return {name: _file(name, plain) for name, plain in bundled(files).items()}


def bundled(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """Join the modules of the first paint, those of each view, and those of several views, since requests take time."""
    imports = {
        name: [match["module"].decode() for match in re.finditer(IMPORT, plain)]
        for name, plain in files.items()
        if name.endswith(".js")
    }
    order = list(graphlib.TopologicalSorter(imports).static_order())
    needed: dict[str, set[str]] = {}  # by each module
    for name in order:
        needed[name] = {name}.union(*(needed[module] for module in imports[name]))
    views = needed.keys() - {ENTRY}.union(*imports.values())
    users = {name: [view for view in views if name in needed[view]] for name in order}
    last_shared = max((name for name in order if len(users[name]) > 1), key=order.index, default=ENTRY)
    script_of = {name: users[name][0] if len(users[name]) == 1 else last_shared for name in order}
    script_of |= dict.fromkeys(needed[ENTRY], ENTRY)
    scripts = {
        script: _script([files[name] for name in order if script_of[name] == script], script, script_of)
        for script in script_of.values()
    }
    return {name: plain for name, plain in files.items() if name not in imports} | scripts


def _script(modules: Sequence[bytes], name: str, script_of: Mapping[str, str]) -> bytes:
    """Return one script with the code of *modules*. What they import from other scripts is imported once."""
    imported: dict[str, list[bytes]] = {}
    for match in (match for module in modules for match in re.finditer(IMPORT, module)):
        names = match["names"].strip(b" ,\n").replace(b"\n ", b"")
        imported.setdefault(script_of[match["module"].decode()], []).append(names)
    imported.pop(name, None)
    heads = [
        b'import { %s } from "./%s";\n' % (b", ".join(sorted(set(b", ".join(names).split(b", ")))), script.encode())
        for script, names in imported.items()
    ]
    return b"".join(heads) + b"\n".join(re.sub(IMPORT, b"", module) for module in modules)


def _file(name: str, plain: bytes) -> UIFile:
    media_type = "text/javascript" if name.endswith(".js") else mimetypes.guess_type(name)[0] or "text/plain"
    if name.endswith(".js"):
        plain = LAST.sub(rb"\1", SPACE.sub(rb"\1\2", COMMENT.sub(rb"\1", plain)))
    elif name.endswith(".css"):
        plain = SPACE_OF_STYLE.sub(rb"\1", plain)
    elif name.endswith(".html"):
        plain = re.sub(rb"\n\s+", b"\n", plain)
    etag = f'W/"{hashlib.sha256(plain).hexdigest()[:16]}"'
    return UIFile(media_type, etag, plain, gzip.compress(plain, 9, mtime=0))


def takes_gzip(accept_encoding: str) -> bool:
    """Whether a client accepts gzip (RFC 9110, section 12.5.3). Without ``Accept-Encoding`` it does not."""
    return re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))", accept_encoding, re.IGNORECASE) is not None

"""Files in inputs: their types, and what a client may send for one.

A record never has the content of a file, only a reference: ``{"file_id", "media_type", "size", "name"}``. The id is the
SHA-256 of the content. Contents are kept in a folder of each principal beside the store; see ``flock.store.contents``.
"""

import base64
import binascii
import codecs
import contextlib
import hashlib
import io
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, TypeGuard
from urllib.parse import quote, unquote, unquote_to_bytes

import msgspec

from flock.errors import CallError

#: Size of one read from a file.
CHUNK_BYTES = 64 * 1024
#: The start of a file that shows what it is.
HEAD_BYTES = 1024
#: Max characters of the name of a file. A longer one is cut at the front, so that its ending stays.
MAX_NAME_CHARS = 200

#: Max files of one run. The same file counts each time.
MAX_FILES = 100
#: Max length of a data URL that is not in base64.
MAX_PLAIN_CHARS = 8192

#: The media types that the start of a content shows.
MAGIC: Mapping[str, bytes] = {
    **{"image/png": rb"\x89PNG\r\n\x1a\n", "image/jpeg": rb"\xff\xd8\xff", "image/gif": rb"GIF8[79]a"},
    **{"image/webp": rb"RIFF....WEBP", "application/pdf": rb"%PDF-", "audio/wav": rb"RIFF....WAVE"},
    **{"audio/mpeg": rb"ID3|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]", "audio/ogg": rb"OggS", "audio/flac": rb"fLaC"},
    "audio/mp4": rb"....ftypM4[AB]",
}
TEXT, UNKNOWN = "text/plain", "application/octet-stream"
#: Media types of texts.
TEXTS = r"text/|application/(json|xml|yaml|toml|x-ndjson)$|application/.*\+(json|xml)$"
#: Other names of media types.
ALIASES = {
    **{"image/jpg": "image/jpeg", "audio/mp3": "audio/mpeg", "audio/x-wav": "audio/wav", "audio/wave": "audio/wav"},
    **{"audio/x-m4a": "audio/mp4", "audio/m4a": "audio/mp4", "audio/x-flac": "audio/flac", "video/ogg": "audio/ogg"},
}
#: Makes base64 of URLs that of other texts.
STANDARD = str.maketrans("-_", "+/")
HOW_TO_SEND = "send a data URL (data:image/png;base64,…), a part of a form, or the file_id that POST /files returns"
#: The id of a content: its SHA-256.
ID = "^[0-9a-f]{64}$"


class FileReference(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reference to a file in a record; see ``File``."""

    file_id: Annotated[str, msgspec.Meta(pattern=ID)]
    media_type: str
    size: int
    name: str = ""
    detail: Literal["", "auto", "low", "high"] = ""


class File:
    """A file in the inputs of a run: any content.

    Attributes:
        sha256: of the content, in hexadecimal digits.
        media_type: of the content, whatever the client says. ``text/plain`` is any text in UTF-8, and
            ``application/octet-stream`` anything unknown.
        size: in bytes.
        name: that the client has given it, without folders; "" if none. It is not trustworthy.
        detail: for models that look at images in several resolutions: "auto", "low" or "high"; "" if not given.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("",)
    WHAT: ClassVar[str] = "a file"

    def __init__(self, reference: FileReference) -> None:
        self.reference, self.sha256, self.media_type = reference, reference.file_id, reference.media_type
        self.size, self.name, self.detail = reference.size, reference.name, reference.detail
        self._folder = FOLDER.get()
        if not self.media_type.startswith(self.KINDS):
            found = f"content is {self.media_type}" if self.size else "file is empty"
            raise ValueError(f"The {found}, and this input takes {self.WHAT}")

    def open(self) -> BinaryIO:
        """Open the content for reading. Raises CallError if it is not stored or readable now, or outside of a step."""
        try:
            return open((self._folder or Path)() / self.sha256, "rb")
        except OSError as exc:
            problem = "is not stored any more" if isinstance(exc, FileNotFoundError) else "cannot be read now"
            raise CallError(f"The file {self.name or self.sha256!r} {problem}.") from exc

    def read(self) -> bytes:
        """Return the content. Raises CallError as ``open`` does."""
        with self.open() as file:
            return file.read()

    def text(self) -> str:
        """Return the content of a text, without a byte order mark.

        Raises: CallError if it is a PDF, image or audio, and as ``open`` does; UnicodeDecodeError if it is not UTF-8.
        """
        if self.media_type in MAGIC:
            raise CallError(f"The file {self.name or self.sha256!r} is {self.media_type}, not a text. Use read().")
        return self.read().decode("utf-8-sig")


class Image(File):
    """A PNG, JPEG, GIF or WebP."""

    KINDS = ("image/",)
    WHAT = "a PNG, JPEG, GIF or WebP"


class Audio(File):
    """A WAV, MP3, Ogg, FLAC or M4A."""

    KINDS = ("audio/",)
    WHAT = "a WAV, MP3, Ogg, FLAC or M4A"


class Document(File):
    """A PDF, or a text in UTF-8."""

    KINDS = ("application/pdf", TEXT)
    WHAT = "a PDF or a text in UTF-8"


def is_file(type_: Any) -> TypeGuard[type[File]]:
    return isinstance(type_, type) and issubclass(type_, File)


# Contents


def media_type_of(head: bytes) -> str:
    """Return the media type that the first ``HEAD_BYTES`` of a content show."""
    for name, pattern in MAGIC.items():
        if re.match(pattern, head, re.DOTALL):
            return name
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return UNKNOWN
    return UNKNOWN if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) else TEXT


def check_declared(declared: str, found: str, size: int = 1) -> None:
    """Raise ValueError if a content that is *found* to be of one type, with a *size*, was declared as another one."""
    declared = declared.partition(";")[0].strip().lower()
    declared = ALIASES.get(declared, declared)
    is_text = re.match(TEXTS, declared) is not None
    is_other = found == UNKNOWN and declared not in MAGIC and not is_text
    if declared not in ("", UNKNOWN, found) and not (is_text if found == TEXT else is_other):
        about = f"It is declared as {declared[:100]}, but the content is {found}"
        raise ValueError(about if size else "The file is empty")


def safe_name(name: str) -> str:
    """Return the last part of a path, without characters that hide or reorder others."""
    shown = "".join(c for c in re.split(r"[/\\]", name[-5 * MAX_NAME_CHARS :])[-1] if unicodedata.category(c)[0] != "C")
    return shown.strip()[-MAX_NAME_CHARS:].lstrip(".")


def data_url(content: bytes | Path) -> str:
    """Return a file, or the one at a path, as a data URL, which is what an input takes in Python too."""
    name = f";name={quote(content.name)}" if isinstance(content, Path) else ""
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{media_type_of(content[:HEAD_BYTES])}{name};base64,{base64.b64encode(content).decode()}"


def _read_data_url(url: str) -> tuple[str, str, bytes]:
    """Return the declared media type, the name and the content. Raises ValueError."""
    head, _, data = url.removeprefix("data:").partition(",")
    declared, *parameters = head.split(";")
    names = [part[5:] for part in parameters if part.startswith("name=")]
    name, is_base64 = unquote("".join(names[-1:])[-MAX_PLAIN_CHARS:]), parameters[-1:] == ["base64"]
    if not is_base64 and len(data) > MAX_PLAIN_CHARS:
        raise ValueError(f"This data URL has more than {MAX_PLAIN_CHARS:,} characters. Write it in base64")
    try:
        return declared, name, base64.b64decode(data, validate=True) if is_base64 else unquote_to_bytes(data)
    except binascii.Error as exc:
        raise ValueError("This data URL is not valid. Write data:image/png;base64, and the content in base64") from exc


def as_data_url(content: str, media_type: str) -> str:
    """Return a content in base64, perhaps that of URLs and without padding, as Protocol Buffers write it."""
    content = content.translate(STANDARD)
    return f"data:{media_type.partition(',')[0]};base64,{content}{'=' * (-len(content) % 4)}"


def media_type_in(url: str) -> str:
    """Return the media type that the content of a data URL shows. Raises ValueError if the URL is not valid."""
    return media_type_of(_read_data_url(url)[2][:HEAD_BYTES])


def references_in(result: Any) -> list[FileReference]:
    """Return the references in a result of a run that are outputs, or elements of one. A long one has none."""
    found, outputs = list[FileReference](), msgspec.json.decode(result) if isinstance(result, msgspec.Raw) else {}
    for value in outputs.values():
        for each in value if isinstance(value, list) else [value]:
            with contextlib.suppress(msgspec.ValidationError):
                found.append(msgspec.convert(each, FileReference))
    return found


# Inputs

#: Returns the folder with the files of the run that the current task executes.
FOLDER: ContextVar[Callable[[], Path] | None] = ContextVar("flock_files", default=None)
#: Returns a stored file. Raises NotFound, or ValueError for a file that cannot be stored.
Find = Callable[[str], FileReference]
#: Finds files, and collects them, in what a client has sent. Otherwise, a file is a reference already.
_TAKING: ContextVar[tuple[Find, "Taken"] | None] = ContextVar("flock_taking", default=None)


class Taken(dict[str, bytes | None]):
    """Files by id: the content, or None if it is stored already. ``references`` counts the same file again."""

    references = 0


def _from_block(sent: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a content block of MCP as the members of a file, and another object as it is."""
    kind = sent.get("type")
    block = sent.get("resource") if kind == "resource" else sent
    if kind not in ("resource", "image", "audio") or not isinstance(block, dict):
        return sent
    content, text = block.get("blob" if kind == "resource" else "data"), block.get("text")
    if kind == "resource" and isinstance(text, str):
        content = base64.b64encode(text.encode()).decode()
    url = as_data_url(content, str(block.get("mimeType", ""))) if isinstance(content, str) else None
    return {"file_id": url, "name": unquote(str(block.get("uri", "")))}


def _reference_to(sent: Any, find: Find, contents: Taken) -> FileReference:
    """Return the reference to a file that a client has sent. Raises ValueError, NotFound."""
    contents.references += 1
    if contents.references > 2 * MAX_FILES:  # invalid inputs are read a second time, to find all errors
        raise ValueError(f"A run may have at most {MAX_FILES} files")
    more = _from_block(sent) if isinstance(sent, dict) else {}
    sent, content, name = more.get("file_id", sent), None, str(more.get("name", ""))
    if not isinstance(sent, str) or re.match(r"[a-z][a-z0-9+.-]*://", sent, re.IGNORECASE):
        raise ValueError(f"This is not a file, and no address is fetched: {HOW_TO_SEND}")
    if sent.startswith("data:"):
        declared, named, content = _read_data_url(sent)
        name = named or name
        sent, media_type = hashlib.sha256(content).hexdigest(), media_type_of(content[:HEAD_BYTES])
        check_declared(declared, media_type, len(content))
        found = FileReference(file_id=sent, media_type=media_type, size=len(content))
    else:
        found = find(sent)
    contents[found.file_id] = content
    more = {"name": safe_name(name or found.name), "detail": more.get("detail", "")}
    return msgspec.convert(msgspec.to_builtins(found) | more, FileReference)


def file_from(type_: type[File], value: Any) -> File:
    """Return a file for msgspec, which has found *value* in JSON. Raises ValueError, NotFound."""
    taking = _TAKING.get()
    return type_(msgspec.convert(value, FileReference) if taking is None else _reference_to(value, *taking))


@contextlib.contextmanager
def taking(find: Find) -> Iterator[Taken]:
    """Read files from what a client has sent inside the block. Nothing is stored."""
    contents = Taken()
    token = _TAKING.set((find, contents))
    try:
        yield contents
    finally:
        _TAKING.reset(token)


def open_below(folder: Path, name: str) -> io.BufferedReader:
    """Open a regular file below *folder*. Raises OSError or ValueError."""
    root = Path(os.path.realpath(folder, strict=True))  # for a circle of links, Path.resolve raises RuntimeError
    path = Path(os.path.realpath(root / name, strict=True))
    parts = path.relative_to(root).parts
    # The resolved path has no links. A link that was created since then is not followed.
    opened = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        parent = opened
        try:  # O_NONBLOCK, because opening a pipe would wait for a writer
            opened = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        finally:
            os.close(parent)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ValueError("not a file")
    return os.fdopen(opened, "rb")

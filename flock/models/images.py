"""Images without what cameras and programs write beside the picture, such as the place where it was taken."""

import re
import struct
import zlib
from collections.abc import Iterator

#: The next marker in the data of a JPEG's picture.
MARKER = re.compile(rb"\xff(?![\x00\xd0-\xd7\xff])")
#: The segments of a JPEG that show the picture: its size and tables, JFIF, a colour profile, and Adobe's colours.
APP0, APP1, APP2, APP14, APP15, SOS, EOI, COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xDA, 0xD9, 0xFE
EXIF, PROFILE = b"Exif\0\0", b"ICC_PROFILE\0"
#: The chunks of a PNG that do not: texts, XMP, EXIF, and when it was changed.
PNG_TEXTS, PNG_SIGNATURE_BYTES = (b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tIME"), 8
#: The flags of a WebP for EXIF and XMP.
WEBP_EXIF, WEBP_XMP = 0x08, 0x04
ORIENTATION, SHORT = 0x0112, 3


def without_metadata(image: bytes, media_type: str) -> bytes:
    """Return an image without EXIF, XMP and comments, and without what follows it, but with its orientation.

    The picture itself stays as it is. Only JPEG, PNG and WebP are changed.

    Raises: ValueError if the parts of the image cannot be found.
    """
    parts = {"image/jpeg": _jpeg, "image/png": _png, "image/webp": _webp}.get(media_type)
    try:
        return image if parts is None else b"".join(parts(image))
    except (IndexError, struct.error) as exc:
        raise ValueError("The image ends too early") from exc


def _jpeg(image: bytes) -> Iterator[bytes]:
    at = 2
    yield image[:at]
    while image[at + 1] != EOI:
        if image[at : at + 2] == b"\xff\xff":  # it may be filled up
            at += 1
            continue
        marker, size = image[at + 1], *struct.unpack_from(">H", image, at + 2)
        if image[at] != 0xFF or size < 2 or at + 2 + size > len(image):
            raise ValueError("A segment of the image is damaged")
        content, after = image[at + 4 : at + 2 + size], at + 2 + size
        if marker == APP1 and content.startswith(EXIF):
            if exif := _orientation_alone(content[len(EXIF) :]):
                yield struct.pack(">BBH", 0xFF, APP1, 2 + len(EXIF) + len(exif)) + EXIF + exif
        elif marker in (APP0, APP14) or (marker == APP2 and content.startswith(PROFILE)):
            yield image[at:after]
        elif not (APP0 <= marker <= APP15 or marker == COMMENT):
            end = MARKER.search(image, after) if marker == SOS else None
            after = after if marker != SOS else len(image) if end is None else end.start()
            yield image[at:after]
        at = after
        if at == len(image):  # browsers show such images, too
            return
    yield image[at : at + 2]


def _png(image: bytes) -> Iterator[bytes]:
    at, kind = PNG_SIGNATURE_BYTES, b""
    yield image[:at]
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", image, at)
        whole = image[at : at + size + 12]
        if len(whole) < size + 12:
            raise ValueError("A chunk of the image is damaged")
        exif = _orientation_alone(whole[8:-4]) if kind == b"eXIf" else b""
        if kind not in PNG_TEXTS:
            yield whole
        elif exif:
            yield struct.pack(">I", len(exif)) + kind + exif + struct.pack(">I", zlib.crc32(kind + exif))
        at += len(whole)


def _webp(image: bytes) -> Iterator[bytes]:
    chunks, at, end = list[tuple[bytes, bytes]](), 12, min(len(image), 8 + struct.unpack_from("<I", image, 4)[0])
    while at < end:
        kind, size = struct.unpack_from("<4sI", image, at)
        chunks.append((kind, image[at + 8 : at + 8 + size]))
        if len(chunks[-1][1]) < size:
            raise ValueError("A chunk of the image is damaged")
        at += 8 + size + size % 2
    exif = b"".join(_orientation_alone(content) for kind, content in chunks if kind == b"EXIF")
    kept = bytearray(image[8:12])
    for kind, content in chunks:
        if kind == b"VP8X":
            content = bytes([content[0] & ~(WEBP_XMP if exif else WEBP_XMP | WEBP_EXIF)]) + content[1:]
        elif kind == b"EXIF":
            content = exif
        if kind != b"XMP " and (exif or kind != b"EXIF"):
            kept += struct.pack("<4sI", kind, len(content)) + content + b"\0" * (len(content) % 2)
    yield b"RIFF" + struct.pack("<I", len(kept)) + kept


def _orientation_alone(exif: bytes) -> bytes:
    """Return EXIF with nothing but the orientation; none if the image is not turned, or that cannot be read."""
    exif = exif.removeprefix(EXIF)
    order = ">" if exif[:2] == b"MM" else "<"
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, directory)
        for at in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, at)
            if tag == ORIENTATION and kind == SHORT and 1 < value <= 8:
                return struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, ORIENTATION, SHORT, 1, value, 0, 0)
    except struct.error:
        pass
    return b""

"""Images are sent to models without their metadata, if the program says so. Pillow makes and reads them."""

import io
import struct
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from flock.files import data_url
from flock.models.images import without_metadata
from flock.models.models import Model
from flock.testing import FakeModel, Reply
from tests.test_files_for_models import receipt_flock, sent_by

MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
SECRET = "Elm Street 7"


def photo(form: str, orientation: int | None = 6, **options: Any) -> bytes:
    """Return a photo with a location in its EXIF, XMP and comments."""
    image = Image.new("RGB", (61, 40))
    image.putdata([(x * 4 % 256, y * 6 % 256, (x * y) % 256) for y in range(40) for x in range(61)])
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.ImageDescription] = SECRET
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSDateStamp] = SECRET
    more: dict[str, Any] = {"xmp": f"<x:xmpmeta>{SECRET}</x:xmpmeta>".encode(), "comment": SECRET}
    if form == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("Comment", SECRET)
        texts.add_itxt("XML:com.adobe.xmp", SECRET)
        more = {"pnginfo": texts}
    image.save(file := io.BytesIO(), form, exif=exif, **more, **options)
    assert SECRET.encode() in file.getvalue()
    return file.getvalue()


def pixels(content: bytes) -> bytes:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").tobytes()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"restart_marker_blocks": 1, "icc_profile": b"a profile" * 9000}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


@pytest.mark.parametrize(("form", "options"), CASES)
@pytest.mark.parametrize("orientation", [None, 1, 6])
def test_an_image_keeps_its_picture_and_orientation_alone(form: str, options: Any, orientation: int | None) -> None:
    content = photo(form, orientation, **options)
    stripped = without_metadata(content + SECRET.encode(), MEDIA_TYPES[form])
    assert SECRET.encode() not in stripped
    assert pixels(stripped) == pixels(content)
    with Image.open(io.BytesIO(stripped)) as image:
        assert dict(image.getexif()) == ({ExifTags.Base.Orientation: 6} if orientation == 6 else {})
        assert image.info.get("icc_profile") == options.get("icc_profile")
    assert without_metadata(stripped, MEDIA_TYPES[form]) == stripped


def test_exif_in_the_other_byte_order_and_damaged_exif_are_read_as_far_as_possible() -> None:
    plain = photo("PNG", None)
    at = plain.index(b"IDAT") - 4

    def with_exif(exif: bytes) -> bytes:
        return plain[:at] + struct.pack(">I", len(exif)) + b"eXIf" + exif + b"crc?" + plain[at:]

    little = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, ExifTags.Base.Orientation, 3, 1, 3, 0, 0)
    stripped = without_metadata(with_exif(little), "image/png")
    with Image.open(io.BytesIO(stripped)) as image:
        assert dict(image.getexif()) == {ExifTags.Base.Orientation: 3}
    for cut in range(len(little)):
        assert pixels(without_metadata(with_exif(little[:cut]), "image/png")) == pixels(plain)
    endless = struct.pack(">2sHIH", b"MM", 42, 8, 65535)
    assert pixels(without_metadata(with_exif(endless), "image/png")) == pixels(plain)


@pytest.mark.parametrize("form", MEDIA_TYPES)
def test_a_cut_image_is_refused_or_has_no_metadata_either(form: str) -> None:
    content = photo(form)
    for cut in range(12, len(content)):
        try:
            stripped = without_metadata(content[:cut], MEDIA_TYPES[form])
        except ValueError:
            continue
        assert SECRET.encode() not in stripped


def test_other_types_stay_as_they_are() -> None:
    assert without_metadata(b"GIF89a", "image/gif") == b"GIF89a"


@pytest.mark.anyio
@pytest.mark.parametrize("strips", [True, False])
async def test_a_model_gets_an_image_without_its_metadata_if_it_says_so(model: FakeModel, strips: bool) -> None:
    model.replies = [Reply({"total": "40 €"})]
    flock = receipt_flock()
    flock.model = Model("openai/gpt-4o", strip_metadata=strips)
    content = photo("JPEG")
    run, messages = await sent_by(flock, model, {"photo": data_url(content), "note": ""})
    assert run.value == {"total": "40 €"}, run.error
    expected = without_metadata(content, "image/jpeg") if strips else content
    assert messages[-1]["content"][1]["image_url"]["url"] == data_url(expected)


@pytest.mark.anyio
async def test_a_damaged_image_is_refused_before_it_is_paid(model: FakeModel) -> None:
    flock = receipt_flock()
    flock.model = Model("openai/gpt-4o", strip_metadata=True)
    inputs = {"photo": data_url(photo("JPEG")[:300]), "note": ""}
    run, messages = await sent_by(flock, model, inputs)
    assert (run.error_type, messages) == ("model_bad_request", [])
    assert "so its metadata cannot be removed (strip_metadata=True)" in run.error

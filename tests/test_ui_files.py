"""The web page takes files: chosen, dropped, pasted and photographed. The page is docs/files.md."""

from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from tests.support.servers import serving
from tests.support.site import Site, Visit
from tests.test_files import PNG

pytest_plugins = "tests.support.site"  # for its fixtures

TARGET = """
from flock.core import Document, Flock, Image

flock = Flock("pictures")

@flock.agent
def look(photo: Image, letter: Document | None = None, more: list[Image] = []) -> str:
    return " ".join(f"{file.name}:{len(file.read())}" for file in (photo, letter, *more) if file)
"""
#: Gives a control a file by an event, as a browser does after a drop or Ctrl-V.
GIVE = """(control, [type, name, bytes]) => {
  const files = new DataTransfer();
  files.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: files, bubbles: true })
    : new DragEvent(type, { dataTransfer: files, bubbles: true, cancelable: true });
  control.dispatchEvent(event);
}"""


def give(page: Page, label: str, how: str, name: str) -> None:
    page.get_by_label(label, exact=True).evaluate(GIVE, [how, name, list(PNG)])
    expect(page.get_by_text(f"{name}, image/png, {len(PNG)} bytes")).to_be_visible()


def sent(name: str, content: bytes, media_type: str) -> Any:
    return {"name": name, "mimeType": media_type, "buffer": content}


def test_a_file_is_chosen_dropped_pasted_or_photographed(visit: Visit, tmp_path: Path) -> None:
    (script := tmp_path / "pictures.py").write_text(TARGET)
    with serving(script, tmp_path, "--ui") as server:
        site = Site(tmp_path, server.url, "", None)
        page = visit.page(site, "agent/look", has_touch=True, is_mobile=True)
        photo = page.get_by_label("photo (required)")
        visit.expected.append("422")
        photo.set_input_files(sent("x.png", b"<html><script>alert(1)</script>", "image/png"))
        expect(page.get_by_text("It is declared as image/png, but the content is text/plain.")).to_be_visible()
        page.get_by_role("button", name="Run", exact=True).click()
        assert page.url.endswith("agent/look"), "a file is required"

        with page.expect_file_chooser() as opened:
            page.get_by_role("button", name="Take a photo").first.click()
        assert photo.get_attribute("capture") == "environment"
        opened.value.set_files(sent("camera.png", PNG, "image/png"))
        expect(page.get_by_text("camera.png, image/png, 70 bytes")).to_be_visible()
        give(page, "photo (required)", "drop", "dropped.png")
        expect(page.get_by_text("camera.png")).to_have_count(0)
        page.get_by_label("letter").set_input_files(sent("a.txt", b"hello", "text/plain"))
        expect(page.get_by_text("a.txt, text/plain, 5 bytes")).to_be_visible()
        page.get_by_role("button", name="Add to more").click()
        give(page, "more 1", "paste", "pasted.png")

        page.reload()
        expect(page.get_by_text("pasted.png, image/png, 70 bytes")).to_be_visible()
        page.get_by_role("button", name="Remove letter").click()
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("group", name="Result")).to_contain_text("dropped.png:70 pasted.png:70")
        (run,) = site.get("/runs?include=inputs")["runs"]
        assert run["inputs"]["photo"]["name"] == "dropped.png"
        page.close()  # before the server stops

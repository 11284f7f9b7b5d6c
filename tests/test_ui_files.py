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
        letter = page.get_by_label("letter", exact=True)
        letter.set_input_files(sent("a.txt", b"hello", "application/vnd.ms-excel"))
        expect(page.get_by_text("a.txt, text/plain, 5 bytes")).to_be_visible()
        page.get_by_role("button", name="Add to more").click()
        give(page, "more 1", "paste", "pasted.png")

        page.reload()
        expect(page.get_by_text("pasted.png, image/png, 70 bytes")).to_be_visible()
        page.get_by_role("button", name="Remove the file of letter").click()
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_role("group", name="Result")).to_contain_text("dropped.png:70 pasted.png:70")
        (run,) = site.get("/runs?include=inputs")["runs"]
        assert run["inputs"]["photo"]["name"] == "dropped.png"
        page.close()  # before the server stops


#: Drops files whose names are given, or a folder, as a browser does.
DROP = """(control, [isFolder, names]) => {
  const files = new DataTransfer();
  for (const name of names) files.items.add(new File(["hello"], name));
  const { webkitGetAsEntry } = DataTransferItem.prototype;
  if (isFolder) DataTransferItem.prototype.webkitGetAsEntry = () => ({ isDirectory: true });
  control.dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true }));
  DataTransferItem.prototype.webkitGetAsEntry = webkitGetAsEntry;
}"""


def test_what_is_no_single_file_is_refused_and_a_file_can_be_chosen_again(visit: Visit, tmp_path: Path) -> None:
    (script := tmp_path / "pictures.py").write_text(TARGET)
    with serving(script, tmp_path, "--ui") as server:
        page = visit.page(Site(tmp_path, server.url, "", None), "agent/look")
        letter = page.get_by_label("letter", exact=True)
        letter.evaluate(DROP, [False, ["a.txt", "b.txt"]])
        expect(page.get_by_text("These are several files. Choose one.")).to_be_visible()
        letter.evaluate(DROP, [True, ["folder"]])
        expect(page.get_by_text("This is a folder. Choose a file.")).to_be_visible()
        for _ in range(2):
            letter.set_input_files(sent("a.txt", b"hello", "text/plain"))
            expect(page.get_by_text("a.txt, text/plain, 5 bytes")).to_be_visible()
            expect(page.get_by_text("This is a folder. Choose a file.")).to_be_hidden()
            assert letter.evaluate("(control) => control.files.length") == 0, "the same file can be chosen again"
            page.get_by_role("button", name="Remove the file of letter").click()
            expect(letter).to_be_focused()

        aborted = list[str]()
        page.on("requestfailed", lambda request: aborted.append(request.url))
        page.route("**/files", lambda route: None, times=1)  # the first one is never answered
        with page.expect_request("**/files"):
            letter.set_input_files(sent("slow.txt", b"hello", "text/plain"))
        letter.set_input_files(sent("next.txt", b"hello", "text/plain"))
        expect(page.get_by_text("next.txt, text/plain, 5 bytes")).to_be_visible()
        assert aborted == [f"{server.url}/files"]

        page.get_by_role("button", name="Add to more").click()
        give(page, "more 1", "drop", "dropped.png")
        page.get_by_role("button", name="Remove more 1", exact=True).click()
        expect(page.get_by_text("dropped.png")).to_have_count(0)
        page.close()  # before the server stops

"""The web page takes files: chosen, dropped, pasted and photographed. The page is docs/files.md."""

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Dialog, Page, Request, Route, expect
from playwright.sync_api import Error as PlaywrightError

from flock.web.auth import new_key
from tests.hostile_files import seeds, trap
from tests.support.servers import flockapi_command, running, serving
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


#: Returns its photo, and files that it invents: one that is not stored, and a text that is called an image.
SHOWN = """
from typing import Any
from flock.core import Document, Flock, Image
from flock.runs import RunContext

flock = Flock("shown")

@flock.agent(output="photo: Image, claimed: list")
async def show(photo: Image, letter: Document, context: RunContext) -> dict[str, Any]:
    missing = {"file_id": "0" * 64, "media_type": "image/png", "size": 5, "name": "missing.png"}
    script = {"file_id": letter.sha256, "media_type": "image/png", "size": 5, "name": "<img src=x onerror=alert(1)>"}
    numbers = {"file_id": 12345678901234567890, "media_type": "image/png", "size": 12345678901234567890, "name": "n"}
    return {"photo": photo, "claimed": [missing, script, numbers, {**missing, "size": 12345678901234567890}]}
"""
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Site]:
    """Serve ``SHOWN`` with a key, so that the address of a file is not enough to get it. It comes before ``visit``."""
    (script := tmp_path / "shown.py").write_text(SHOWN)
    key = new_key()
    serve = flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), "--ui")
    with running(*serve, FLOCK_API_KEYS=f"ann={key}") as server:
        yield Site(tmp_path, server.url, "", key)


def uploaded(site: Site, content: bytes, name: str) -> dict[str, str]:
    response = httpx.post(f"{site.url}/files", content=content, headers=site.headers)
    return {"file_id": response.raise_for_status().json()["file_id"], "name": name}


#: An image that is a page for whoever takes it as one.
GIF_PAGE = b"GIF89a<body onload=alert(1)>"


def test_images_are_shown_small_and_all_files_can_be_downloaded(shown: Site, visit: Visit) -> None:
    photo, letter = uploaded(shown, PNG, "photo.png"), uploaded(shown, SVG, "letter.svg")
    run_id = shown.run("show", photo=photo, letter=letter)
    visit.expected.append("404")
    page = visit.page(shown, f"run/{run_id}", viewport={"width": 1200, "height": 3000})
    result, inputs = page.get_by_role("group", name="Result"), page.get_by_role("group", name="Inputs")
    for box in (result, inputs):
        image = box.locator("img[alt='photo.png']")
        expect(image).to_have_js_property("naturalWidth", 1)
        assert str(image.get_attribute("src")).startswith("data:image/png;base64,")
        assert image.evaluate("(image) => [image.offsetWidth, image.offsetHeight]") == [64, 64]
    expect(inputs).to_contain_text(f"letter.svg{len(SVG)} bytes")
    expect(page.get_by_role("img")).to_have_count(2)  # those that are no images are gone
    expect(result).to_contain_text("<img src=x onerror=alert(1)>")
    with page.expect_download() as download:
        inputs.get_by_role("button", name="Download letter.svg").click()
    assert download.value.suggested_filename == "letter.svg"
    assert download.value.path().read_bytes() == SVG
    result.get_by_role("button", name="Download missing.png").first.click()
    expect(page.locator("#notice")).to_contain_text("no file")
    page.get_by_role("button", name="JSON").click()
    expect(result.locator("pre")).to_contain_text(photo["file_id"])

    page = visit.page(shown, "runs")
    expect(page.locator("tbody tr")).to_contain_text("photo: photo.png, letter: letter.svg")
    body = {"agent_name": "show", "batch_inputs": [{"photo": photo, "letter": letter}]}
    batch = httpx.post(f"{shown.url}/run/batch", json=body, headers=shown.headers).raise_for_status().json()
    page = visit.page(shown, f"batch/{batch['batch_id']}")
    row = page.get_by_role("row").nth(1)
    expect(row.get_by_role("img", name="photo.png").first).to_have_js_property("naturalWidth", 1)
    expect(row).to_contain_text(f"letter.svg{len(SVG)} bytes")


def test_a_browser_executes_nothing_of_a_file_that_it_opens(visit: Visit, tmp_path: Path) -> None:
    """Also if it took one as a page, which opens a dialog without the policy."""
    (script := tmp_path / "pictures.py").write_text(TARGET)
    opened = {"inline": 0, "attachment": 0}
    with trap() as (port, mark), serving(script, tmp_path) as server:
        found = [content for content in seeds(port, mark) if len(content) < 10_000 and b"127.0.0.1" in content]
        page = visit.context(Site(tmp_path, server.url, "", None)).new_page()
        requests, dialogs = list[str](), list[Dialog]()

        def dismiss(dialog: Dialog) -> None:
            dialogs.append(dialog)
            dialog.dismiss()

        page.on("dialog", dismiss)
        page.on("request", lambda request: requests.append(request.url))
        for content in [*found, b"<body onload=alert(1)>", GIF_PAGE]:
            sent = httpx.post(f"{server.url}/files", content=content).raise_for_status()
            url = server.url + sent.headers["Location"]
            headers = httpx.get(url).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
            opened[headers["Content-Disposition"]] += 1
            requests.clear()
            if headers["Content-Disposition"] == "inline":
                page.goto(url, wait_until="load")
                assert page.content().count("<img") == 1, "it is shown as an image only"
            else:
                with page.expect_download(), pytest.raises(PlaywrightError, match="Download is starting"):
                    page.goto(url)
            assert requests == [url]
        policy = {"Content-Security-Policy": headers["Content-Security-Policy"]}
        page.route("**/guarded", lambda route: route.fulfill(body=GIF_PAGE, content_type="text/html", headers=policy))
        page.route("**/open", lambda route: route.fulfill(body=GIF_PAGE, content_type="text/html"))
        page.goto(f"{server.url}/guarded")
        assert dialogs == []
        page.goto(f"{server.url}/open")
        assert len(dialogs) == 1
        page.close()  # before the server stops
    assert min(opened.values()) >= 3, opened


def test_an_image_is_loaded_once_and_only_if_it_is_visible(shown: Site, visit: Visit) -> None:
    letter, photo = uploaded(shown, b"x\n" * 5000, "a.txt"), uploaded(shown, PNG, "photo.png")
    run_id = shown.run("show", photo=photo, letter=letter)
    loaded = list[str]()
    page = visit.context(shown, viewport={"width": 390, "height": 200}).new_page()
    page.on("request", lambda request: loaded.append(request.url) if photo["file_id"] in request.url else None)
    page.goto(f"{shown.url}/ui#/run/{run_id}")
    images = page.locator("[aria-label=Result] img[alt='photo.png'], [aria-label=Inputs] img[alt='photo.png']")
    expect(images).to_have_count(2)
    assert loaded == []
    for image in images.all():
        image.locator("..").hover()  # scrolls, also if the page is drawn again meanwhile
        expect(image).to_have_js_property("naturalWidth", 1)
    assert len(loaded) == 1


def gray(side: int) -> bytes:
    """A PNG of side x side pixels."""
    rows = zlib.compress(bytes((1 + side) * side), 1)
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    return PNG[:8] + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def test_an_image_with_too_many_pixels_is_not_decoded(shown: Site, visit: Visit) -> None:
    letter = uploaded(shown, b"x", "a.txt")
    for side, pictures in ((100, 2), (8000, 0)):
        photo = uploaded(shown, gray(side), "photo.png")
        run_id = shown.run("show", photo=photo, letter=letter)
        page = visit.page(shown, f"run/{run_id}", viewport={"width": 1200, "height": 3000})
        expect(page.get_by_role("button", name="Download photo.png")).to_have_count(2)
        visit.expected.append("404")
        images = page.locator(":is([aria-label=Inputs], [aria-label=Result]) img")
        expect(images).to_have_count(pictures)
        expect(images.and_(page.locator("[src]"))).to_have_count(pictures)


def test_few_images_load_at_once_and_a_closed_view_ends_them(shown: Site, visit: Visit) -> None:
    letter = uploaded(shown, b"x", "a.txt")
    photos = [uploaded(shown, gray(100 + number), f"{number}.png") for number in range(6)]
    rows = [{"photo": photo, "letter": letter} for photo in photos]
    body = {"agent_name": "show", "batch_inputs": rows}
    batch = httpx.post(f"{shown.url}/run/batch", json=body, headers=shown.headers).raise_for_status().json()
    shown.get(f"/batch/{batch['batch_id']}?wait=30")
    page = visit.page(shown)
    begun, ended = list[str](), list[str]()
    page.route("**/files/*", lambda route: begun.append(route.request.url))  # they are never answered

    def is_last(request: Request) -> bool:
        if "/files/" in request.url:  # the view may ask for other things too
            ended.append(request.url)
        return len(ended) == 3

    page.goto(f"{shown.url}/ui#/batch/{batch['batch_id']}")
    expect(page.get_by_role("row").nth(6)).to_contain_text("5.png")
    while len(begun) < 3:
        page.wait_for_timeout(20)  # handles what the browser sends
    with page.expect_event("requestfailed", is_last):
        page.get_by_role("link", name="Agents").click()
    assert sorted(ended) == sorted(begun)


LETTERS = """
from flock.core import Document, Flock

flock = Flock("letters")

@flock.agent
def read(letter: Document, more: list[Document] = [], note: str = "") -> str:
    return " ".join([note, *(f"{file.name}={file.text()}" for file in (letter, *more))])
"""


@pytest.fixture
def letters(tmp_path: Path) -> Iterator[Site]:
    (script := tmp_path / "letters.py").write_text(LETTERS)
    key = new_key()
    serve = flockapi_command("serve", str(script), "--port", "0", "--store", str(tmp_path / "flock.db"), "--ui")
    with running(*serve, FLOCK_API_KEYS=f"ann={key}") as server:
        yield Site(tmp_path, server.url, "", key)


def posted_files(page: Page) -> list[str]:
    """Return a list that gets an entry for each file that the page sends."""
    sent = list[str]()
    page.on("request", lambda it: sent.append(it.url) if it.url.endswith("/files") else None)
    return sent


def test_files_that_a_table_names_are_sent_once_and_their_names_replaced(letters: Site, visit: Visit) -> None:
    table = (
        'letter;more;note;id\n"a.txt";"[""b.txt"", ""a.txt""]";0,5 ä "x";007\n.\\sub\\c.txt;;"say ""b.txt""";b.txt\n'
    )
    page = visit.page(letters, "new-batch")
    visit.expected.append("422")  # the rows are not UTF-8
    posted = posted_files(page)
    page.locator("input[type=file]").first.set_input_files(sent("rows.csv", table.encode("windows-1252"), "text/csv"))
    page.get_by_text("Numbers and encoding of CSV").click()
    page.get_by_label("Encoding of a file").select_option("windows-1252")
    files = page.get_by_role("region", name="Files")
    expect(files.get_by_role("status")).to_contain_text("Missing: 3 of 3 files that the rows name.")
    several = files.get_by_label("Choose the files, or drop them here")
    several.set_input_files([sent("a.txt", b"A", "text/plain"), sent("other.txt", b"O", "text/plain")])
    expect(files.get_by_role("listitem")).to_have_text(["b.txt", "sub/c.txt"])
    assert posted == [], "nothing is sent while one is missing"
    expect(page.get_by_role("button", name="Start the batch")).to_be_disabled()

    folder = letters.folder / "letters"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("B")
    (folder / "sub" / "c.txt").write_text("C")
    files.get_by_label("or choose their folder").set_input_files(folder)
    expect(files.get_by_role("status")).to_contain_text("3 files sent.")
    assert len(posted) == 3
    expect(page.get_by_role("region", name="Check").get_by_role("status")).to_contain_text("All 2 rows are valid.")
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_role("row").nth(2)).to_contain_text("c.txt=C")
    batch_id = page.url.split("/")[-1].split("?")[0]
    rows = letters.get(f"/batch/{batch_id}/results?format=json")
    assert [row["result"]["result"] for row in rows] == ['0,5 ä "x" a.txt=A b.txt=B a.txt=A', 'say "b.txt" c.txt=C']
    assert [row["extra"] for row in rows] == [{"id": "007"}, {"id": "b.txt"}]
    assert len(posted) == 3


def test_files_of_ndjson_are_sent_and_a_failure_is_said_and_tried_again(letters: Site, visit: Visit) -> None:
    page = visit.page(letters, "new-batch")
    visit.expected.append("507")
    posted = posted_files(page)
    lines = [f'{{"letter": "{n}.txt", "more": ["0.txt"], "n": 12345678901234567890}}' for n in range(9)]
    page.get_by_label("or paste rows").fill("\n".join(lines))
    files = page.get_by_role("region", name="Files")
    routed = list[Route]()

    def refuse_fourth(route: Route) -> None:
        routed.append(route)
        if len(routed) == 4:
            route.fulfill(status=507, body='{"detail": "The disk is full."}')
        else:
            route.continue_()

    page.route("**/files", refuse_fourth)
    chosen = [sent(f"{n}.txt", str(n).encode(), "text/plain") for n in range(9)]
    files.get_by_label("Choose the files, or drop them here").set_input_files(chosen)
    # Several are sent at once, so that any of them may be the fourth.
    expect(files.get_by_text(re.compile(r"^\d\.txt: The disk is full\.$"))).to_be_visible()
    expect(files.get_by_role("status")).to_contain_text(" of 9 files sent.")
    page.unroute("**/files")
    files.get_by_role("button", name="Try again").click()
    expect(files.get_by_role("status")).to_contain_text("9 files sent.")
    assert len(posted) == 10, "what was sent is not sent again"
    page.get_by_role("button", name="Start the batch").click()
    expect(page.get_by_role("row").nth(9)).to_contain_text("8.txt=8 0.txt=0")
    batch_id = page.url.split("/")[-1].split("?")[0]
    rows = letters.get(f"/batch/{batch_id}/results?format=json")
    assert {row["extra"]["n"] for row in rows} == {12345678901234567890}


def test_a_line_that_is_no_object_is_left_to_the_check(letters: Site, visit: Visit) -> None:
    page = visit.page(letters, "new-batch")
    page.get_by_label("or paste rows").fill('{"letter": "a.txt"}\n{"letter": \n5\nnull')
    files = page.get_by_role("region", name="Files")
    files.get_by_label("Choose the files, or drop them here").set_input_files(sent("a.txt", b"A", "text/plain"))
    expect(files.get_by_role("status")).to_contain_text("1 file sent.")
    expect(page.get_by_role("region", name="Check").get_by_role("status")).to_contain_text("3 of 4 rows are invalid.")


def test_files_that_were_chosen_are_sent_when_the_rows_change(letters: Site, visit: Visit) -> None:
    page = visit.page(letters, "new-batch")
    page.get_by_label("or paste rows").fill("letter\na.txt\nb.txt\n")
    files = page.get_by_role("region", name="Files")
    files.get_by_label("Choose the files, or drop them here").set_input_files(sent("a.txt", b"A", "text/plain"))
    expect(files.get_by_role("listitem")).to_have_text(["b.txt"])
    page.get_by_label("or paste rows").fill("letter\na.txt\n")
    expect(files.get_by_role("status")).to_contain_text("1 file sent.")
    expect(page.get_by_role("region", name="Check").get_by_role("status")).to_contain_text("The row is valid.")
    page.get_by_label("Column letter maps to").select_option("more")
    expect(files.get_by_role("status")).to_contain_text("1 file sent.")


def test_a_table_without_files_has_no_place_for_them(letters: Site, visit: Visit) -> None:
    page = visit.page(letters, "new-batch")
    file_id = uploaded(letters, b"A", "a.txt")["file_id"]
    page.get_by_label("or paste rows").fill(f"letter,note\n{file_id},a.txt\n")
    expect(page.get_by_role("region", name="Check").get_by_role("status")).to_contain_text("The row is valid.")
    expect(page.get_by_role("region", name="Files")).to_be_hidden()
    expect(page.get_by_role("button", name="Start the batch")).to_be_enabled()

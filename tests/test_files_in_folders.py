"""``flockapi batch --files``: cells that are names of files in a folder. No name may leave the folder."""

import csv
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from flock.command.cli import main
from flock.files import open_below
from flock.store import contents
from tests.images_once import play
from tests.support import open_files
from tests.test_files import PNG

TARGET = """
from flock.core import Document, Flock, Image

flock = Flock("folders")

@flock.agent(version="1")
def read(letter: Document, more: list[Document] = []) -> str:
    with open("log", "a") as log:
        print(letter.name, file=log)
    return " ".join(each.text() for each in (letter, *more))

@flock.agent
def look(photo: Image) -> int:
    return photo.size
"""


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path(f"{tmp_path.name}_target.py").write_text(TARGET)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, content in (("a.txt", b"A"), ("sub/b.txt", b"B"), ("c.png", PNG)):
        (folder / name).write_bytes(content)
    (tmp_path / "secret.txt").write_text("secret")
    return folder


def batch(agent: str, *cells: str, options: str = "") -> Result:
    with open("rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["photo" if agent == "look" else "letter"], *([cell] for cell in cells)])
    target = f"{Path.cwd().name}_target.py"
    arguments = ["batch", target, agent, "rows.csv", "-o", "out.csv", "--force", "--files", "in", *options.split()]
    return CliRunner().invoke(main, arguments)


def results() -> list[str]:
    with open("out.csv", newline="") as file:
        return [row["result"] or row["error"] for row in csv.DictReader(file)]


def test_cells_name_files_in_the_folder() -> None:
    done = batch("read", "a.txt", "sub/b.txt", "./sub/../a.txt")
    assert done.exit_code == 0, done.output
    assert results() == ["A", "B", "A"]
    assert sorted(Path("log").read_text().splitlines()) == ["a.txt", "a.txt", "b.txt"]
    assert len(list(Path().glob("out.csv.flock.db-files/*/*"))) == 2, "the same content is stored once"
    assert batch("look", "c.png").exit_code == 0
    assert results() == [str(len(PNG))]


def test_a_changed_file_is_read_again_and_no_other_one(photos: Path) -> None:
    assert batch("read", "a.txt", "sub/b.txt").exit_code == 0
    assert "All 2 rows are complete." in batch("read", "a.txt", "sub/b.txt").output
    (photos / "sub" / "b.txt").write_text("changed")
    done = batch("read", "a.txt", "sub/b.txt")
    assert (done.exit_code, results()) == (0, ["A", "changed"]), done.output
    assert sorted(Path("log").read_text().split()) == ["a.txt", "b.txt", "b.txt"]


def test_the_store_in_the_folder_does_not_count_as_a_change(photos: Path) -> None:
    done = batch("read", "a.txt", options="--store in/state.db")
    assert done.exit_code == 0, done.output
    assert "All 1 rows are complete." in batch("read", "a.txt", options="--store in/state.db").output
    assert batch("read", "a.txt", options="--store in/state.db --forget").exit_code == 0
    assert sorted(each.name for each in photos.iterdir()) == ["a.txt", "c.png", "sub"]


def test_a_file_that_no_row_names_does_not_count_as_a_change(photos: Path) -> None:
    assert batch("read", "a.txt", "sub/b.txt").exit_code == 0
    (photos / ".DS_Store").write_text("new")
    (photos / "c.png").unlink()
    (photos / "results.log").write_text("new")
    assert "All 2 rows are complete." in batch("read", "a.txt", "sub/b.txt").output


def test_a_named_file_whose_name_begins_as_the_store_does_counts_as_a_change(photos: Path) -> None:
    assert batch("read", "a.txt", options="--store in/a").exit_code == 0
    (photos / "a.txt").write_text("changed")
    assert batch("read", "a.txt", options="--store in/a").exit_code == 0
    assert results() == ["changed"]


def test_a_file_that_is_added_or_removed_counts_as_a_change(photos: Path) -> None:
    assert batch("read", "a.txt", "new é.txt", options="--on-invalid skip").exit_code == 1
    (photos / "new é.txt").write_text("new")
    assert batch("read", "a.txt", "new é.txt", options="--on-invalid skip").exit_code == 0
    assert results() == ["A", "new"]
    (photos / "new é.txt").unlink()
    assert batch("read", "a.txt", "new é.txt", options="--on-invalid skip").exit_code == 1


def test_a_name_outside_leaves_no_descriptor_open(photos: Path) -> None:
    before = open_files()
    for name in ("/etc/passwd", "../secret.txt", "sub", "missing") * 5:
        with pytest.raises((ValueError, OSError)):
            open_below(photos, name)
    assert open_files() == before


class Broken(io.BytesIO):
    def fileno(self) -> int:
        return 0

    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_file_that_cannot_be_read_now_stops_the_command(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row would be invalid for ever otherwise, since the file has not changed."""

    def fail(folder: Path, name: str) -> Any:
        if when == "read":
            return Broken()
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(contents, "open_below", fail)
        done = batch("read", "a.txt", options="--on-invalid skip")
        assert done.exit_code == 1
        assert "The file 'in/a.txt' cannot be read:" in done.output, done.output
        assert not Path("out.csv").exists()
    done = batch("read", "a.txt", options="--on-invalid skip")
    assert (done.exit_code, results()) == (0, ["A"]), done.output


def test_a_full_disk_stops_the_command_and_the_next_one_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is not invalid: there may be space later."""
    with monkeypatch.context() as patched:
        patched.setattr(contents, "MIN_FREE_BYTES", 2**62)
        done = batch("read", "a.txt", "sub/b.txt", options="--on-invalid skip")
    assert done.exit_code == os.EX_IOERR, done.output
    assert done.output.startswith("Error: out.csv.flock.db: "), done.output
    assert done.output.count("\n") == 1, done.output
    assert "bytes are free" in done.output
    assert not Path("out.csv").exists()
    assert not [path for path in Path().glob("out.csv.flock.db-files/*/*")]
    done = batch("read", "a.txt", "sub/b.txt", options="--on-invalid skip")
    assert (done.exit_code, results()) == (0, ["A", "B"]), done.output


def test_a_file_that_many_rows_name_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, finish = [], contents._ContentsOfPrincipal._finish

    def counted(*arguments: Any) -> None:
        copied.append(arguments)
        finish(*arguments)

    monkeypatch.setattr(contents._ContentsOfPrincipal, "_finish", counted)
    assert batch("read", *["a.txt", "sub/b.txt"] * 5).exit_code == 0
    assert results() == ["A", "B"] * 5
    assert len(copied) == 2


def test_no_name_leaves_the_folder(photos: Path, tmp_path: Path) -> None:
    os.symlink("../secret.txt", photos / "link.txt")
    os.symlink("..", photos / "linked")
    os.symlink("circle", photos / "circle")
    os.mkfifo(photos / "pipe")
    paths = ["../secret.txt", "sub/../../secret.txt", f"{tmp_path}/secret.txt", "/etc/passwd", "a.txt/../../secret.txt"]
    links = ["link.txt", "linked/secret.txt", "circle", "pipe", "sub", ".", "/"]
    names = [*paths, *links, "~/secret.txt", "..\\secret.txt", "a.txt\u202e", "x" * 4096, "missing.txt", "a" * 64]
    done = batch("read", "a.txt", *names, options="--on-invalid skip")
    assert done.exit_code == 1, done.output
    first, *others = results()
    assert first == "A"
    assert [name for name, error in zip(names, others, strict=True) if "in the folder 'in'" not in error] == []
    assert Path("log").read_text() == "a.txt\n"
    assert len(list(Path().glob("out.csv.flock.db-files/*/*"))) == 1


def test_a_name_with_nul_is_not_in_the_folder() -> None:
    Path("rows.ndjson").write_text('{"letter": "a.txt\\u0000.png"}\n{"letter": 5}\n')
    target = f"{Path.cwd().name}_target.py"
    done = CliRunner().invoke(main, ["batch", target, "read", "rows.ndjson", "-o", "out.csv", "--files", "in"])
    assert done.exit_code == 1
    assert "There is no file 'a.txt\\x00.png' in the folder 'in'" in done.output


def test_a_dry_run_reads_files_and_stores_none() -> None:
    done = batch("read", "a.txt", "c.png", "missing", options="--dry-run")
    assert (done.exit_code, "1 of 3 rows" in done.output) == (1, True), done.output
    assert "this input takes a PDF or a text" in done.output
    assert not list(Path().glob("*flock.db*"))


def test_a_file_that_is_too_long_fails_its_row(photos: Path) -> None:
    with open(photos / "long.txt", "wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)
    done = batch("read", "a.txt", "long.txt", options="--on-invalid skip")
    assert done.exit_code == 1, done.output
    first, second = results()
    assert (first, "'long.txt': A file may have at most 67108864 bytes" in second) == ("A", True)
    assert len(list(Path().glob("out.csv.flock.db-files/*/*"))) == 1, "no temporary file is left"


def test_each_image_is_sent_once_though_the_command_is_killed_twice() -> None:
    """Its memory has room for those in flight, and not for all that one process sends."""
    assert 0 < play(120, image_bytes=1024 * 1024) < 175, "MB: 140 are usual, and 215 if what was sent is kept"

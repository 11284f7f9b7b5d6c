"""``flockapi batch``: from file to file, stopped, killed and resumed, in its own process where that matters."""

import asyncio
import contextlib
import csv
import errno
import gzip
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from flock.command.cli import main
from flock.core import Flock
from flock.runs import Batch, BatchOptions, RunStatus, Usage, now
from flock.steps import progress
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support.servers import flockapi_command
from tests.test_cli import at_terminal

TARGET = """
import os, signal, sys, threading, time
import anyio
from flock.core import Flock

flock = Flock("worker")
LOG = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
begun = 0

if "DIE_AFTER_RENAME" in os.environ:
    replace = os.replace
    os.replace = lambda *paths: (replace(*paths), os.kill(os.getpid(), signal.SIGKILL))

if "DIE_AT_RENAME" in os.environ:
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)

@flock.agent
async def work(n: int, word: str = "w") -> str:
    global begun
    os.write(LOG, f"{n}\\n".encode())
    begun += 1
    if begun == int(os.environ.get("TELL_AT", 0)):
        print("so far", file=sys.stderr, flush=True)
    while begun == int(os.environ.get("HOLD_AT", 0)) and not os.path.exists("go"):
        await anyio.sleep(0.01)
    await anyio.sleep(0.001)
    if n == -1:
        raise ValueError("minus one")
    return f"{word}{n}"

@flock.agent
def hang(n: int) -> None:
    print("at work", file=sys.stderr, flush=True)
    threading.Event().wait()

@flock.agent
def measure(text: str) -> int:
    return len(text)
"""


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write target.py into the test's own folder, which is the working directory."""
    Path("target.py").write_text(TARGET)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "target", raising=False)


def command(*arguments: str) -> list[str]:
    return flockapi_command("batch", "target.py", *arguments)


def in_own_process(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=90
    )


def batch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which is quicker, and load the target again."""
    sys.modules.pop("target", None)
    given = ["batch", "target.py", *arguments]
    done = CliRunner().invoke(main, given, catch_exceptions=False, prog_name="flockapi")
    return subprocess.CompletedProcess([], done.exit_code, done.stdout, done.stderr)


#: Executes its arguments in a process that reacts to SIGINT.
WITH_INTERRUPTS = "import os, signal, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


@contextlib.contextmanager
def started(*arguments: str, words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in its own process, and yield it when it has printed *words* on stderr."""
    process = subprocess.Popen(
        # A shell's background jobs ignore SIGINT, and their children inherit that. Tests may run in one.
        [sys.executable, "-c", WITH_INTERRUPTS, *command(*arguments)],
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        assert process.stderr is not None
        assert any(words in line for line in process.stderr), "the process has ended"
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def rows_of(path: str) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write_numbers(path: str, count: int) -> None:
    Path(path).write_text("n\n" + "".join(f"{n}\n" for n in range(count)))


def in_log() -> Counter[int]:
    return Counter(int(line) for line in Path("log").read_text().split())


def committed(state: str) -> set[int]:
    with contextlib.closing(sqlite3.connect(state)) as db:
        query = "SELECT json_extract(CAST(inputs AS TEXT), '$.n') FROM runs WHERE status = 'completed'"
        return {n for (n,) in db.execute(query)}


MIXED = (
    "Warning: Its results are of 2 versions of the agent 'work'; see the column 'version'. To run all rows with one "
    "version, use another --store.\n"
)
STORE = ("results.csv.flock.db", "results.csv.flock.db-output")


def files() -> set[str]:
    return {path.name for path in Path().iterdir()} - {"target.py", "log", "__pycache__"}


# From a file to a file


def test_results_are_in_the_order_of_the_rows() -> None:
    """Only the store is left beside them, and nothing is written to stdout."""
    Path("rows.csv").write_text('n,word\n3,"a, b"\n-1,x\n1,\n')
    done = in_own_process("work", "rows.csv", "-o", "results.csv")
    assert rows_of("results.csv") == [
        ["n", "word", "result", "status", "error"],
        ["3", "a, b", "a, b3", "completed", ""],
        ["-1", "x", "", "failed", "The agent 'work' raised ValueError: minus one"],
        ["1", "", "w1", "completed", ""],
    ]
    assert (done.returncode, done.stdout) == (1, "")
    reasons = "For the reasons, see 'error' in results.csv. To run failed rows again, add --retry failed."
    assert done.stderr == f"2 of 3 rows completed, and 1 failed. {reasons}\n"
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_the_exit_code_is_0_if_all_rows_completed() -> None:
    write_numbers("rows.csv", 1)
    done = batch("work", "rows.csv", "-o", "results.csv")
    assert (done.returncode, done.stderr) == (0, "1 of 1 rows completed.\n")


def test_ndjson_results_are_the_same_as_over_http() -> None:
    Path("rows.jsonl").write_text('{"n": 1}\n{"n": 2, "word": "x"}\n')
    assert batch("work", "rows.jsonl", "-o", "results.ndjson").returncode == 0
    first, second = map(json.loads, Path("results.ndjson").read_text().splitlines())
    names = ["position", "run_id", "status", "inputs", "result", "error", "error_type", "started_at", "completed_at"]
    assert list(first) == names
    assert (first["position"], first["result"], first["inputs"]) == (0, {"result": "w1"}, {"n": 1})
    assert (second["position"], second["result"], second["status"]) == (1, {"result": "x2"}, "completed")


def test_output_on_stdout_has_the_format_of_the_rows() -> None:
    write_numbers("rows.csv", 2)
    done = in_own_process("work", "rows.csv", "-o", "-")
    assert done.stdout.splitlines()[1:] == ["0,,w0,completed,", "1,,w1,completed,"]
    done = batch("work", "rows.csv", "-o", "-", "--format", "ndjson")
    assert [json.loads(line)["result"]["result"] for line in done.stdout.splitlines()] == ["w0", "w1"]
    assert files() == {"rows.csv", "rows.csv.flock.db"}
    assert set(in_log().values()) == {1}


def test_files_may_be_gzipped() -> None:
    Path("rows.ndjson.gz").write_bytes(gzip.compress(b'{"n": 7}\n'))
    assert batch("work", "rows.ndjson.gz", "-o", "results.csv.gz").returncode == 0
    assert gzip.decompress(Path("results.csv.gz").read_bytes()).splitlines()[1] == b"7,,w7,completed,"


def test_columns_are_mapped_and_empty_cells_are_filled() -> None:
    Path("rows.csv").write_text("number;word\n1;a\n2;\n")
    options = ("--map", "number=n", "--static", "word=12", "--delimiter", ";")
    assert batch("work", "rows.csv", "-o", "results.csv", *options).returncode == 0
    assert rows_of("results.csv")[1:] == [["1", "a", "a1", "completed", ""], ["2", "12", "122", "completed", ""]]


def test_formulas_are_escaped_unless_that_is_switched_off() -> None:
    Path("rows.csv").write_text("n,word\n1,=A1+\n")
    for options, cell in (((), "'=A1+1"), (("--no-escape-formulas",), "=A1+1")):
        assert batch("work", "rows.csv", "-o", "results.csv", "--force", *options).returncode == 0
        assert rows_of("results.csv")[1][2] == cell


def test_a_cell_may_be_as_long_as_a_row() -> None:
    """Python's csv module reads at most 131,072 characters by default."""
    Path("rows.csv").write_bytes(b"\xef\xbb\xbftext\r\n" + 5_000_000 * b"x" + b'\r\n"a\r\nb"\r\n')
    assert batch("measure", "rows.csv", "-o", "results.csv").returncode == 0
    lines = Path("results.csv").read_bytes().split(b"\r\n")
    assert lines[1] == 5_000_000 * b"x" + b",5000000,completed,"
    assert lines[2:4] == [b'"a', b'b",4,completed,']


def test_invalid_rows_are_listed_and_nothing_is_started() -> None:
    Path("rows.csv").write_text("n\n" + "".join(f"{n}x\n" for n in range(30)))
    Path("results.csv").write_text("of before")
    done = batch("work", "rows.csv", "-o", "results.csv", "--force")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0] == "Error: Nothing was started, since rows.csv is invalid:"
    assert lines[1:21] == [f"  line {n + 2} /n: Expected 'int', got 'str'." for n in range(20)]
    hint = "If only some rows are wrong, --on-invalid skip starts the others."
    assert lines[21:] == ["  and 10 more in the part that was read", hint]
    assert (files(), Path("results.csv").read_text()) == ({"rows.csv", "results.csv"}, "of before")
    Path("rows.csv").write_text("n\nx\n1\n")
    assert batch("work", "rows.csv", "-o", "results.csv", "--force", "--on-invalid", "skip").returncode == 1
    statuses = [row[2:] for row in rows_of("results.csv")[1:]]
    assert statuses == [["", "failed", "line 2 /n: Expected 'int', got 'str'."], ["w1", "completed", ""]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "line 1: The header is missing"),
        ("header.csv", b"n,word\r\n", "header.csv has no rows, so nothing was started."),
        ("empty.ndjson", b"\n", "empty.ndjson has no rows, so nothing was started."),
        ("wrong.csv", b"m\n1\n", "There is no input 'm'"),
        ("latin.csv", b"n,word\n1,\xe9\n", "line 2: This is not UTF-8"),
        ("broken.csv.gz", b"n\n1\n", "broken.csv.gz is not a valid gzip file"),
    ],
)
def test_an_unusable_file_leaves_no_other_files(name: str, content: bytes, words: str) -> None:
    Path(name).write_bytes(content)
    done = batch("work", name, "-o", "results.csv")
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert files() == {name}


# Dry runs


def test_a_dry_run_prints_rows_and_errors_without_running_or_writing() -> None:
    Path("rows.csv").write_text("n,id\n1,0042\nx,7\n12345678901234567890,8\n")
    mapped = ["--map", "id="]
    done = batch("work", "rows.csv", "--dry-run", *mapped)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        'line 2: {"n":1}',
        'line 3: {"n":"x"}',
        'line 4: {"n":12345678901234567890}',
        "2 of 3 rows in rows.csv are valid.",
        "  line 3 /n: Expected 'int', got 'str'.",
    ]
    real = batch("work", "rows.csv", "-o", "results.csv", *mapped)
    hint = "If only some rows are wrong, --on-invalid skip starts the others."
    assert (real.returncode, real.stderr.splitlines()[1:]) == (1, [*done.stdout.splitlines()[4:], hint])
    done = batch("work", "rows.csv", "--dry-run", "-o", "results.csv", "--on-invalid", "skip", "--on-extra", "keep")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, 'line 2: {"n":1} keeps {"id":"0042"}')
    assert files() == {"rows.csv"}
    assert not Path("log").read_text()


def test_a_dry_run_of_an_agent_with_files_stores_none() -> None:
    Path("rows.csv").write_text(f'letter\n"data:;base64,aGk="\n{"a" * 64}\n')
    Path("target.py").write_text(
        "from flock.core import Document, Flock\nflock = Flock('files')\n"
        "@flock.agent\ndef read(letter: Document) -> str:\n    return letter.text()\n"
    )
    done = in_own_process("read", "rows.csv", "--dry-run")
    assert (done.returncode, done.stderr) == (1, "")
    assert '"media_type":"text/plain","size":2' in done.stdout
    assert "1 of 2 rows in rows.csv are valid." in done.stdout
    assert files() == {"rows.csv"}


def test_a_dry_run_counts_all_rows_and_shows_the_first() -> None:
    """It needs no model key."""
    Path("rows.ndjson").write_text('{"text": "a"}\n' * 1500)
    Path("target.py").write_text(
        'from flock.core import Flock, FlockFactory\nflock = Flock("m", model="openai/gpt-4o")\n'
        'flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer"))\n'
    )
    done = in_own_process("ask", "rows.ndjson", "--dry-run", OPENAI_API_KEY="")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[19:] == [
        'line 20: {"text": "a"}'.replace(': "a', ':"a'),
        "…",
        "1,500 of 1,500 rows in rows.ndjson are valid.",
    ]
    assert files() == {"rows.ndjson"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "line 1: The header is missing"),
        ("header.csv", b"n,word\r\n", "A batch must have at least one item."),
        ("wrong.csv", b"m\n1\n", "There is no input 'm'"),
        ("latin.csv", b"n,word\n1,\xe9\n", "line 2: This is not UTF-8"),
        ("broken.csv.gz", b"n\n1\n", "broken.csv.gz is not a valid gzip file"),
    ],
)
def test_a_dry_run_of_an_unusable_file_fails(name: str, content: bytes, words: str) -> None:
    Path(name).write_bytes(content)
    result = invoke("work", name, "--dry-run")
    assert (result.exit_code, files()) == (1, {name})
    assert words in result.output


# Killed, stopped and resumed


def test_a_killed_batch_resumes_without_repeating_committed_rows() -> None:
    """It is killed twice. Only rows that were running at a kill may be executed again."""
    write_numbers("rows.csv", 2000)
    done: Counter[int] = Counter()
    for _ in range(2):
        with started("work", "rows.csv", "-o", "results.csv", words="so far", TELL_AT="700") as process:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        assert not Path("results.csv").exists()
        times = in_log()
        assert all(times[n] == count for n, count in done.items()), "a committed row was executed again"
        done = Counter({n: times[n] for n in committed("results.csv.flock.db")})
    assert len(done) > 1000
    last = batch("work", "rows.csv", "-o", "results.csv", "--max-workers", "9")
    assert last.returncode == 0
    assert f"Resuming: {len(done):,} of 2,000 rows are already done." in last.stderr
    assert rows_of("results.csv")[1:] == [[str(n), "", f"w{n}", "completed", ""] for n in range(2000)]
    times = in_log()
    assert all(times[n] == count for n, count in done.items()), "a committed row was executed again"
    again = times.total() - 2000
    assert again <= 2 * 5, "more rows than the workers were running"
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_kept_columns_survive_a_kill() -> None:
    """Rows have them whether they were done before the kill or after it."""
    Path("rows.csv").write_text("id,n\n" + "".join(f"{n:05},{n}\n" for n in range(1000)))
    arguments = ("work", "rows.csv", "-o", "results.csv", "--on-extra", "keep")
    with started(*arguments, words="so far", TELL_AT="400") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert 300 < len(committed("results.csv.flock.db")) < 1000
    done = batch(*arguments)
    assert (done.returncode, "Resuming:" in done.stderr) == (0, True)
    assert rows_of("results.csv")[0] == ["id", "n", "word", "result", "status", "error"]
    assert rows_of("results.csv")[1:] == [[f"{n:05}", str(n), "", f"w{n}", "completed", ""] for n in range(1000)]


def test_a_batch_killed_before_the_rename_only_writes_its_results() -> None:
    write_numbers("rows.csv", 50)
    assert in_own_process("work", "rows.csv", "-o", "results.csv", DIE_AT_RENAME="1").returncode == -signal.SIGKILL
    assert not Path("results.csv").exists()
    assert any(name.endswith(".part") for name in files())
    done = batch("work", "rows.csv", "-o", "results.csv")
    assert (done.returncode, len(rows_of("results.csv"))) == (0, 51)
    assert done.stderr == "All 50 rows are complete.\n"
    assert set(in_log().values()) == {1}
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_a_batch_killed_after_the_rename_replaces_its_own_output() -> None:
    """One that was edited since is not replaced."""
    write_numbers("rows.csv", 3)
    assert in_own_process("work", "rows.csv", "-o", "results.csv", DIE_AFTER_RENAME="1").returncode == -signal.SIGKILL
    written = Path("results.csv").read_bytes()
    Path("results.csv").write_text("edited")
    refused = batch("work", "rows.csv", "-o", "results.csv")
    assert (refused.returncode, "results.csv: The file already exists" in refused.stderr) == (1, True)
    assert Path("results.csv").read_text() == "edited"
    again = in_own_process("work", "rows.csv", "-o", "results.csv", "--force", DIE_AFTER_RENAME="1")
    assert (again.returncode, Path("results.csv").read_bytes()) == (-signal.SIGKILL, written)
    done = batch("work", "rows.csv", "-o", "results.csv")
    assert (done.returncode, Path("results.csv").read_bytes()) == (0, written)
    assert set(in_log().values()) == {1}
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_a_batch_killed_before_it_replaces_its_own_output_replaces_it_later() -> None:
    write_numbers("rows.csv", 3)
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    for _ in range(2):
        died = in_own_process("work", "rows.csv", "-o", "results.csv", DIE_AT_RENAME="1")
        assert died.returncode == -signal.SIGKILL
    done = batch("work", "rows.csv", "-o", "results.csv")
    assert (done.returncode, len(rows_of("results.csv"))) == (0, 4), done.stderr


def test_an_output_that_exists_is_not_replaced() -> None:
    """Nothing is executed. With ``--force`` the output is replaced."""
    write_numbers("rows.csv", 1)
    Path("results.csv").write_text("of somebody else")
    refused = batch("work", "rows.csv", "-o", "results.csv")
    reason = "Error: results.csv: The file already exists. Choose another output, or add --force to replace it.\n"
    assert (refused.returncode, refused.stderr) == (1, reason)
    assert (Path("results.csv").read_text(), Path("log").read_text()) == ("of somebody else", "")
    assert files() == {"rows.csv", "results.csv"}
    assert batch("work", "rows.csv", "-o", "results.csv", "--force").returncode == 0
    assert len(rows_of("results.csv")) == 2


def test_an_output_that_appears_meanwhile_is_not_replaced() -> None:
    write_numbers("rows.csv", 2000)
    with started("work", "rows.csv", "-o", "results.csv", words="so far", TELL_AT="1") as process:
        Path("results.csv").write_text("of somebody else")
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "results.csv: The file already exists. Choose another output, or add --force to replace it." in stderr
    assert "Finished rows are stored in results.csv.flock.db. To resume, run the same command again." in stderr
    assert Path("results.csv").read_text() == "of somebody else"
    assert batch("work", "rows.csv", "-o", "results.csv", "--force").returncode == 0
    assert (len(rows_of("results.csv")), set(in_log().values())) == (2001, {1})


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ("n\n1\n2\n", ()),
        ("n\n1\n", ("--static", "word=x")),
        ("n\n1\n", ("--timeout", "9")),
        ("n\n1\n", ("--on-extra", "keep")),
        ("n\n1\n", ("--decimal", ",")),
        ("n\n1\n", ("--encoding", "cp1252")),
    ],
)
def test_other_rows_or_options_start_a_new_batch(rows: str, options: Sequence[str]) -> None:
    """The results of the old one are kept, but a function without a version runs again."""
    Path("rows.csv").write_text("n\n1\n")
    assert in_own_process("work", "rows.csv", "-o", "results.csv", DIE_AT_RENAME="1").returncode == -signal.SIGKILL
    Path("rows.csv").write_text(rows)
    done = batch("work", "rows.csv", "-o", "results.csv", *options)
    assert "have changed, so a new batch starts. The results of earlier ones are kept." in done.stderr
    assert (done.returncode, len(rows_of("results.csv"))) == (0, len(rows.split()))
    assert in_log()[1] == 2
    Path("rows.csv").write_text("n\n1\n")
    assert "All 1 rows are complete." in batch("work", "rows.csv", "-o", "results.csv").stderr
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_an_unfinished_old_batch_does_not_run_beside_the_new_one() -> None:
    write_numbers("rows.csv", 2000)
    with started("work", "rows.csv", "-o", "results.csv", words="so far", TELL_AT="100") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    Path("log").write_text("")
    Path("rows.csv").write_text("n\n5000\n")
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    assert in_log() == {5000: 1}


def test_ctrl_c_stops_cleanly_and_the_same_command_resumes() -> None:
    write_numbers("rows.csv", 2000)
    with started("work", "rows.csv", "-o", "results.csv", words="so far", TELL_AT="300") as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    expected = "Stopped. Finished rows are stored in results.csv.flock.db. To resume, run the same command again.\n"
    assert stderr == expected
    done = committed("results.csv.flock.db")
    assert len(done) >= 290
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    assert all(in_log()[n] == 1 for n in done)
    assert len(rows_of("results.csv")) == 2001
    assert files() == {"rows.csv", "results.csv", *STORE}


def test_ctrl_c_does_not_wait_for_a_function_that_does_not_return() -> None:
    write_numbers("rows.csv", 20)
    with started("hang", "rows.csv", "-o", "results.csv", words="at work") as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped. Finished rows are stored in results.csv.flock.db" in stderr
    assert "Traceback" not in stderr


def test_a_second_command_on_the_same_output_is_refused() -> None:
    write_numbers("rows.csv", 20)
    with started("hang", "rows.csv", "-o", "results.csv", words="at work") as process:
        done = batch("work", "rows.csv", "-o", "results.csv")
        assert done.returncode == 1
        assert "Another command is using results.csv.flock.db" in done.stderr
        assert process.poll() is None
        assert batch("work", "rows.csv", "-o", "results.csv", "--store", "mine.db").returncode == 0
    assert len(rows_of("results.csv")) == 21


def test_finished_rows_are_kept_if_the_output_cannot_be_written() -> None:
    """A folder takes the name of the output while the rows are running."""
    write_numbers("rows.csv", 2000)
    Path("out").mkdir()
    paths = ("-o", "out/results.csv", "--store", "s.db")
    with started("work", "rows.csv", *paths, words="so far", TELL_AT="1") as process:
        Path("out/results.csv").mkdir()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error: out/results.csv: Is a directory. Finished rows are stored in s.db. To resume, run" in stderr
    Path("out/results.csv").rmdir()
    done = batch("work", "rows.csv", *paths)
    assert done.stderr == "All 2,000 rows are complete.\n"
    assert set(in_log().values()) == {1}
    assert files() == {"rows.csv", "out", "s.db", "s.db-output"}


def test_nothing_is_lost_if_the_reader_closes_the_pipe() -> None:
    write_numbers("rows.csv", 2000)
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(command("work", "rows.csv", "-o", "-"), stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"closed the pipe before the end of the results. Finished rows are stored in rows.csv.flock.db" in stderr
    assert len(batch("work", "rows.csv", "-o", "-").stdout.splitlines()) == 2001
    assert set(in_log().values()) == {1}


# Continued


def test_failed_rows_run_again_only_on_request_and_the_output_is_rewritten() -> None:
    Path("rows.csv").write_text("n\n1\n-1\n2\n")
    for _ in range(2):
        done = batch("work", "rows.csv", "-o", "results.csv")
        assert (done.returncode, "add --retry failed" in done.stderr) == (1, True)
        assert [row[3] for row in rows_of("results.csv")[1:]] == ["completed", "failed", "completed"]
    assert in_log() == {1: 1, -1: 1, 2: 1}
    Path("target.py").write_text(TARGET.replace("if n == -1:", "if False:"))
    done = batch("work", "rows.csv", "-o", "results.csv", "--retry", "failed")
    assert (done.returncode, in_log()) == (0, {1: 1, -1: 2, 2: 1})
    assert done.stderr == f"Resuming: 2 of 3 rows are already done.\n3 of 3 rows completed.\n{MIXED}"
    assert [row[3] for row in rows_of("results.csv")[1:]] == ["completed"] * 3
    versions = [row[5] for row in rows_of("results.csv")]
    assert (versions[0], versions[1] == versions[3], len({*versions[1:]})) == ("version", True, 2)
    assert batch("work", "rows.csv", "-o", "results.csv").stderr == f"All 3 rows are complete.\n{MIXED}"
    batch("work", "rows.csv", "-o", "results.csv", "--like-input", "--partial")
    assert rows_of("results.csv")[0][1:] == ["result", "status", "error", "version"]


def test_failed_rows_of_a_killed_batch_run_again_on_request() -> None:
    Path("rows.csv").write_text("n\n-1\n" + "".join(f"{n}\n" for n in range(2000)))
    with started("work", "rows.csv", "-o", "results.csv", words="so far", TELL_AT="700") as process:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    done = committed("results.csv.flock.db")
    assert batch("work", "rows.csv", "-o", "results.csv", "--retry", "all").returncode == 1
    assert in_log()[-1] == 2
    assert all(in_log()[n] == 1 for n in done)
    assert len(rows_of("results.csv")) == 2002


def test_forget_removes_the_store_and_runs_nothing() -> None:
    write_numbers("rows.csv", 3)
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    done = batch("work", "rows.csv", "-o", "results.csv", "--forget")
    assert (done.returncode, done.stderr) == (0, "results.csv.flock.db was removed.\n")
    assert files() == {"rows.csv", "results.csv"}
    done = batch("work", "rows.csv", "-o", "results.csv", "--forget")
    assert (done.returncode, done.stderr) == (0, "There is no results.csv.flock.db.\n")
    Path("notes").write_text("mine")
    assert batch("work", "rows.csv", "--store", "notes", "--forget").returncode == 1
    assert Path("notes").read_text() == "mine"


def test_max_failures_stops_the_command_and_the_same_command_continues() -> None:
    Path("rows.csv").write_text("n\n" + "-1\n" * 3 + "1\n2\n")
    options = ("--max-failures", "1", "--max-workers", "1")
    done = batch("work", "rows.csv", "-o", "results.csv", *options)
    assert done.returncode == 1
    assert "The batch stopped before 3 of 5 items were done. More items have failed" in done.stderr
    assert [row[3] for row in rows_of("results.csv")[1:]] == ["failed"] * 2 + ["cancelled"] * 3
    done = batch("work", "rows.csv", "-o", "results.csv", *options)
    assert [row[3] for row in rows_of("results.csv")[1:]] == ["failed"] * 3 + ["completed"] * 2
    assert in_log() == {-1: 3, 1: 1, 2: 1}


# Errors


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["batch", "target.py", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["work", "rows.csv"], "Missing option '-o'"),
        (["work", "nowhere.csv", "-o", "x.csv"], "'nowhere.csv' does not exist"),
        (["work", "rows.csv", "-o", "rows.csv"], "must be three different files"),
        (["work", "rows.csv", "-o", "./link.csv"], "must be three different files"),
        (["work", "rows.csv", "-o", "x.csv", "--store", "x.csv"], "must be three different files"),
        (["work", "rows.csv", "-o", "x.csv", "--store", "rows.csv"], "must be three different files"),
        (["work", "rows.csv", "-o", "x.csv", "--store", ":memory:"], "needs a file to resume from"),
        (["work", "rows.csv", "-o", "no/x.csv"], "There is no folder no. Create it, or choose another path for x.csv."),
        (["work", "rows.csv", "-o", "/dev/null"], "/dev/null is not a regular file"),
        (["work", "rows.csv", "-o", "."], "is a directory"),
        (["work", "rows.txt", "-o", "x.csv"], "The format of rows.txt is unknown."),
        (["work", "rows.csv", "-o", "rows.xls"], "The extension of rows.xls is not supported."),
        (["work", "rows.csv", "-o", "rows.txt.gz"], "Use .json, .ndjson, .jsonl, .csv,"),
        (["work", "rows.csv", "-o", "x.csv", "--map", "a"], "'a' is not COLUMN=INPUT"),
        (["work", "rows.csv", "-o", "x.csv", "--static", "a"], "'a' is not KEY=VALUE"),
        (["work", "rows.csv", "-o", "x.csv", "--delimiter", ";;"], "delimiter must be one character"),
        (["work", "rows.csv", "-o", "x.csv", "--timeout", "nan"], "'nan' is not a valid number of seconds"),
        (["work", "rows.csv", "-o", "x.csv", "--max-workers", "0"], "0 is not in the range"),
    ],
)
def test_an_invalid_command_line_is_reported(arguments: list[str], words: str) -> None:
    for name in ("rows.csv", "rows.txt"):
        write_numbers(name, 1)
    Path("link.csv").symlink_to("rows.csv")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert files() == {"rows.csv", "rows.txt", "link.csv"}


def test_an_unreadable_file_is_reported() -> None:
    """This file can be opened but not read, even by root."""
    Path("rows.csv").symlink_to("/proc/self/mem")
    result = invoke("work", "rows.csv", "-o", "x.csv")
    assert (result.exit_code, result.output) == (1, "Error: rows.csv: Input/output error.\n")
    assert files() == {"rows.csv"}


def test_an_unknown_agent_is_reported() -> None:
    write_numbers("rows.csv", 1)
    result = invoke("nobody", "rows.csv", "-o", "x.csv")
    assert result.exit_code == 1
    assert "There is no agent 'nobody'. Known agents: work, hang, measure." in result.output


@pytest.mark.parametrize("kind", ["text", "server", "database"])
def test_a_store_that_is_not_of_this_command_is_refused_and_not_changed(kind: str) -> None:
    """This includes a server's store, whose runs would be deleted at the end."""
    write_numbers("rows.csv", 1)
    if kind == "text":
        Path("s.db").write_text("these are my notes")
    elif kind == "server":
        _make_store("s.db")
    else:
        with contextlib.closing(sqlite3.connect("s.db")) as db:
            db.execute("CREATE TABLE mine (x)")
    before = Path("s.db").read_bytes()
    result = invoke("work", "rows.csv", "-o", "x.csv", "--store", "s.db")
    assert result.exit_code == 1
    assert "Choose another file with --store." in result.output
    assert Path("s.db").read_bytes() == before
    assert not Path("log").read_text()


def _make_store(path: str) -> None:
    async def make() -> None:
        async with Flock().engine(store=path):
            pass

    anyio.run(make)


@pytest.mark.parametrize("folder", ["/proc", "/sys"])
def test_an_unwritable_folder_is_reported(folder: str) -> None:
    """Not even root can write to these."""
    write_numbers("rows.csv", 1)
    result = invoke("work", "rows.csv", "-o", f"{folder}/results.csv")
    assert result.exit_code == 1
    assert f"Error: {folder}/results.csv.flock.db-batch: " in result.output
    assert "Traceback" not in result.output


def test_the_state_file_is_named_after_the_symbolic_link() -> None:
    Path("elsewhere").mkdir()
    Path("results.csv").symlink_to("elsewhere/results.csv")
    write_numbers("rows.csv", 2)
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    assert Path("results.csv").is_symlink()
    assert len(rows_of("elsewhere/results.csv")) == 3
    assert files() == {"rows.csv", "results.csv", "elsewhere", *STORE}


# Some rows first


def test_limit_then_sample_then_the_whole_table_is_one_batch() -> None:
    write_numbers("rows.csv", 300)
    done = batch("work", "rows.csv", "-o", "results.csv", "--limit", "10")
    assert done.returncode == 0
    others = "290 others were not chosen: to run them, omit --limit and --sample."
    assert done.stderr == f"10 rows completed. {others}\n"
    assert [row[3] for row in rows_of("results.csv")[1:]] == ["completed"] * 10 + ["cancelled"] * 290
    assert batch("work", "rows.csv", "-o", "results.csv", "--sample", "20", "--seed", "7").returncode == 0
    assert 20 <= len(in_log()) <= 30
    assert batch("work", "rows.csv", "-o", "results.csv").returncode == 0
    assert (len(in_log()), set(in_log().values())) == (300, {1})


def test_a_try_shows_results_and_without_a_terminal_prints_the_command_that_continues() -> None:
    wrong = random.Random(0).sample(range(300), 5)[0]  # a row that is tried
    Path("-my rows.csv").write_text("id,n\n" + "".join(f"{n},{-1 if n == wrong else n}\n" for n in range(300)))
    options = ("--static", "word=it's", "--max-workers", "7", "--timeout", "9.5", "--no-escape-formulas", "--usage")
    mapped = ("--map", "id=", "--on-invalid", "skip", "--delimiter", ",")
    done = batch("work", "-o", "results.csv", "--try", "5", *options, *mapped, "--", "-my rows.csv")
    assert (done.returncode, done.stdout, Path("results.csv").exists()) == (0, "", False)
    *shown, estimate, hint, line = done.stderr.splitlines()
    assert len(shown) == len(in_log()) == 5
    (failed,) = [text for text in shown if text.startswith('{"word":"it\'s","n":-1} -> failed: ')]
    assert failed.endswith("ValueError: minus one")
    shown.remove(failed)
    assert all('{"word":"it\'s","n":' in text and '-> {"result":"it\'s' in text for text in shown), shown
    assert estimate.startswith("5 of 300 rows were tried, and 1 failed. about 0:0")
    assert hint == "To run the other rows:"
    quoted = "--static 'word=it'\"'\"'s' "
    assert line.startswith("flockapi batch -o results.csv --max-workers 7 --map id= " + quoted), line
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    continued = subprocess.run(["sh", "-c", line], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    summary = continued.stderr.splitlines()[1]
    assert continued.returncode == 1
    assert summary.startswith("299 of 300 rows completed, and 1 failed."), continued
    assert (len(in_log()), set(in_log().values())) == (300, {1})
    assert rows_of("results.csv")[1][:3] == ["0", "it's", "it's0"]


def test_progress_as_json_ends_with_the_final_counts() -> None:
    write_numbers("rows.csv", 3)
    done = batch("work", "rows.csv", "-o", "results.csv", "--progress", "json")
    *_, last, summary = done.stderr.splitlines()
    assert (json.loads(last)["status"], json.loads(last)["completed_items"]) == ("completed", 3)
    assert summary == "3 of 3 rows completed."


@pytest.mark.parametrize(("kind", "are_shown"), [("auto", True), ("lines", True), ("none", False)])
def test_without_a_terminal_the_progress_is_lines_or_nothing(
    kind: str, are_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.04)
    write_numbers("rows.csv", 300)
    *lines, summary = batch("work", "rows.csv", "-o", "results.csv", "--progress", kind).stderr.splitlines()
    assert (summary, bool(lines)) == ("300 of 300 rows completed.", are_shown)
    assert all(re.match(r"work: \d+ of 300 rows  ", line) for line in lines), lines


def test_a_line_of_progress_is_printed_each_10_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine is one whose clock passes only while somebody waits for its batch, which takes 35 s."""
    clock = 0.0
    batch = Batch(flock="f", batch_id="b", agent_name="work", options=BatchOptions(), total_items=70, created_at=now())

    async def state(batch_id: str, timeout_s: float = 0) -> Batch:
        nonlocal clock
        clock += timeout_s
        status = RunStatus.COMPLETED if clock >= 35 else RunStatus.RUNNING
        return replace(batch, completed_items=int(2 * clock), status=status)

    async def check_ready() -> None:
        pass

    engine: Any = SimpleNamespace(get_batch=state, wait_batch=state, check_ready=check_ready)
    monkeypatch.setattr(progress, "anyio", SimpleNamespace(current_time=lambda: clock))
    asyncio.run(progress.print_progress(engine, "b", as_json=False))
    counts = [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == [f"work: {count} of 70 rows" for count in (20, 40, 60)]


def test_a_full_disk_stops_the_command_and_the_next_one_continues() -> None:
    """No row runs again but those whose results were about to be written."""
    count, workers = 200, 5
    rows = "".join(f"{n},{'w' * 200}\n" for n in range(count))
    Path("rows.csv").write_text(f"n,word\n{rows}")
    command = flockapi_command("batch", "target.py", "work", "rows.csv", "-o", "out.csv", "--max-workers", str(workers))
    limited = ["bash", "-c", 'ulimit -f 800; exec "$@"', "bash", *command]  # files of at most 800 KiB
    stopped = subprocess.run(limited, capture_output=True, text=True, timeout=100)
    assert stopped.returncode == os.EX_IOERR, stopped.stderr
    (line,) = stopped.stderr.splitlines()
    assert line.startswith("Error: out.csv.flock.db: ")
    assert "run the same command again" in line
    assert 0 < len(Path("log").read_text().splitlines()) < count
    assert not Path("out.csv").exists()
    subprocess.run(command, check=True, timeout=100)
    started = Counter(Path("log").read_text().splitlines())
    assert len(started) == count
    assert started.total() <= count + 2 * workers
    with open("out.csv", newline="") as file:
        assert sum(row["status"] == "completed" for row in csv.DictReader(file)) == count


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a device that is always full")
def test_a_full_disk_while_the_output_is_written_keeps_the_old_output_and_all_rows() -> None:
    Path("rows.csv").write_text("n,word\n" + "".join(f"{n},{'w' * 200}\n" for n in range(200)))
    arguments = ("work", "rows.csv", "-o", "out.csv")
    assert batch(*arguments).returncode == 0
    written, names = Path("out.csv").read_bytes(), {path.name for path in Path().iterdir() if ".csv" in path.suffixes}
    hint = "Finished rows are stored in out.csv.flock.db. To resume, run the same command again.\n"
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command(*arguments)]  # the output has 80 KiB
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}  # it could not write
    stopped = subprocess.run(limited, capture_output=True, text=True, timeout=100, env=env)
    assert (stopped.returncode, stopped.stderr) == (os.EX_IOERR, f"Error: out.csv: {os.strerror(errno.EFBIG)}. {hint}")
    assert Path("out.csv").read_bytes() == written
    assert not list(Path().glob("*.part"))
    with open("/dev/full", "wb") as full:
        to_stdout = command("work", "rows.csv", "-o", "-", "--store", "out.csv.flock.db")
        stopped = subprocess.run(to_stdout, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (stopped.returncode, stopped.stderr) == (os.EX_IOERR, f"Error: -: {os.strerror(errno.ENOSPC)}. {hint}")
    assert "All 200 rows are complete." in batch(*arguments).stderr
    assert {path.name for path in Path().iterdir() if ".csv" in path.suffixes} == names
    assert (in_log().total(), Path("out.csv").read_bytes()) == (200, written)


def test_the_rows_so_far_are_written_beside_a_running_command() -> None:
    write_numbers("rows.csv", 300)
    arguments = ("batch", "target.py", "work", "rows.csv", "-o", "out.csv", "--max-workers", "1")
    none_yet = subprocess.run([*flockapi_command(*arguments), "--partial"], capture_output=True, text=True)
    assert none_yet.returncode == 1
    assert "out.csv.flock.db has no rows of this command. Run it without --partial first." in none_yet.stderr
    env = {**os.environ, "TELL_AT": "50", "HOLD_AT": "50"}
    with subprocess.Popen(flockapi_command(*arguments), stderr=subprocess.PIPE, text=True, env=env) as running:
        assert running.stderr is not None
        while "so far" not in (line := running.stderr.readline()):
            assert line
        partial = subprocess.run([*flockapi_command(*arguments), "--partial"], capture_output=True, text=True)
        assert partial.returncode == 0, partial.stderr
        with open("out.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert 0 < len(rows) < 50
        assert f"{len(rows)} of 300 rows have ended." in partial.stderr
        assert [row["result"] for row in rows] == [f"w{n}" for n in range(len(rows))]
        Path("go").touch()
        running.stderr.read()
    assert running.returncode == 0
    with open("out.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 300
    assert Counter(Path("log").read_text().split()).total() == 300


# Paid once, by what the provider has been asked

ASKING = """
import os
from flock.core import Flock, FlockFactory, Model

name = os.environ.get("MODEL", "openai/gpt-4o")
flock = Flock("asking", model=Model(name, base_url=os.environ["FAKE_URL"], api_key="none"))
flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output=os.environ.get("OUTPUT", "answer")))
"""


class Provider(FakeModel):
    """Answers as long as it has credit, but no text that is bad, and counts the requests for each text."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.asked, self.credit = Counter[str](), 1000

    def _reply(self, request: ModelRequest) -> Reply | Failure:
        if not self.credit:
            return Failure(429, "insufficient_quota")
        self.credit -= 1
        (text,) = re.findall(r"text \w+", request.text)
        self.asked[text] += 1
        answer = {name: "yes" for name in request.schema["properties"]}
        return Failure(400) if "bad" in text else Reply(answer, usage=Usage(input_tokens=10_000, output_tokens=5000))


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[Provider]:
    Path("target.py").write_text(ASKING)
    provider = Provider()
    with provider.serve() as url:
        monkeypatch.setenv("FAKE_URL", url)
        yield provider


def ask(names: Sequence[Any], *options: str) -> int:
    """Run the command with these texts, and return how many of its rows have completed."""
    Path("rows.csv").write_text("text\n" + "".join(f"text {name}\n" for name in names))
    batch("ask", "rows.csv", "-o", "out.csv", *options)
    return sum(row[2] == "completed" for row in rows_of("out.csv")[1:])


def test_retry_cancelled_pays_the_rows_that_were_cut_off_and_retry_failed_the_others_too(provider: Provider) -> None:
    names = [1, "bad", 3, 4, 5, 6]
    provider.credit = 3
    assert ask(names, "--max-workers", "1") == 2
    provider.credit = 1000
    assert ask(names, "--retry", "cancelled") == 5
    assert provider.asked == {f"text {name}": 1 for name in names}
    assert ask(names, "--retry", "cancelled") == ask(names, "--retry", "failed") == 5
    assert provider.asked == {f"text {name}": 1 for name in names} | {"text bad": 2}


def test_dedupe_pays_equal_rows_once(provider: Provider) -> None:
    assert ask([1, 2, 1, 1, 2, 3], "--dedupe") == 6
    assert provider.asked == {"text 1": 1, "text 2": 1, "text 3": 1}
    assert ask([4, 4]) == 2
    assert provider.asked["text 4"] == 2, "only with the option"


def test_another_timeout_order_or_edit_pays_only_rows_that_are_new(provider: Provider) -> None:
    assert ask([1, 2, 3, 3]) == 4
    paid = {"text 1": 1, "text 2": 1, "text 3": 2}
    for names, options in (([1, 2, 3, 3], ("--timeout", "9")), ([3, 2, 1, 3], ()), ([2, 3], ("--timeout", "8"))):
        assert (ask(names, *options), provider.asked) == (len(names), paid)
    assert ask([3, "edited", 4, 1, 3]) == 5
    assert provider.asked == {**paid, "text edited": 1, "text 4": 1}


def test_a_person_is_asked_whether_to_pay_for_a_changed_agent(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask([1, 2, 3, 4]) == 4
    written = Path("out.csv").read_bytes()
    monkeypatch.setenv("OUTPUT", "answer, reason")
    command = ("batch", "target.py", "ask", "rows.csv", "-o", "out.csv")
    text = at_terminal(*command, typed="n\n")
    assert "The agent 'ask' has changed, so all 4 rows run again. They will cost about $0.30 at the prices of" in text
    assert (provider.asked.total(), Path("out.csv").read_bytes()) == (4, written)
    assert "4 of 4 rows completed." in at_terminal(*command, typed="y\n")
    assert (set(provider.asked.values()), rows_of("out.csv")[0][1:3]) == ({2}, ["answer", "reason"])


@pytest.mark.parametrize(
    ("model", "cost"),
    [
        pytest.param(
            "openai/gpt-4o-mini", " They will cost about $0.02 at the prices of openai/gpt-4o-mini", id="cheaper"
        ),
        pytest.param(
            "anthropic/claude-opus-5",
            " They will cost about $0.70 at the prices of anthropic/claude-opus-5",
            id="dearer",
        ),
        pytest.param("openai/unknown", "", id="without a price"),
    ],
)
def test_the_rows_of_another_model_are_estimated_at_its_own_prices(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, model: str, cost: str
) -> None:
    assert ask([1, 2, 3, 4]) == 4
    monkeypatch.setenv("MODEL", model)
    text = at_terminal("batch", "target.py", "ask", "rows.csv", "-o", "out.csv", typed="n\n")
    assert f"The agent 'ask' has changed, so all 4 rows run again.{cost}" in text
    assert ("will cost" in text) == bool(cost)
    if cost:
        assert "if they need as many tokens as the 4 rows before" in text.replace("\n", "").replace("\r", "")


def test_a_person_who_tries_rows_is_asked_whether_to_run_the_others(provider: Provider) -> None:
    wrong = random.Random(0).sample(range(5), 2)[0]  # a row that is tried
    texts = ["text bad" if n == wrong else f"text {n}" for n in range(5)]
    Path("rows.csv").write_text("\n".join(["text", *texts, ""]))
    command = ("batch", "target.py", "ask", "rows.csv", "-o", "out.csv", "--try", "2")
    text = at_terminal(*command, typed="n\n")
    assert text.count('-> {"answer":"yes"}') == 1
    assert '{"text":"text bad"} -> failed: ' in text
    assert re.search(r"2 of 5 rows were tried, and 1 failed\. .* 37,500 tokens in all, \$0\.19 in all\.", text), text
    assert "Run the other rows? [y/N]" in text
    assert (provider.asked.total(), Path("out.csv").exists()) == (2, False)
    assert "4 of 5 rows completed, and 1 failed." in at_terminal(*command, typed="y\n")
    assert (provider.asked.total(), len(provider.asked), len(rows_of("out.csv"))) == (5, 5, 6)

"""No row is paid twice: a table, a provider whose credit runs out, edits, a changed agent, and kills.

    python -m tests.paid_once --rows 100000
    python -m tests.paid_once --rows 100000 --batch-api

Each step prints how many rows the provider has been paid for, and ends the script if that is not what it should be.
A provider charges a request once for each idempotency key. Its answers are counted too: they may only be more by the
requests that were in flight at a kill, at most one for each worker. With --batch-api, the calls go through its batch
endpoint, which charges each line that it answers, also if it has charged an equal one.
"""

import argparse
import csv
import logging
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.support import ROOT
from tests.support.batchapi import BatchProvider
from tests.support.servers import flockapi_command

TARGET = """
import os
from flock.core import Flock, FlockFactory, Model

flock = Flock("table", model=Model("fake/model", base_url=os.environ["FAKE_URL"], api_key="none"))
flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output=os.environ["OUTPUT"]))
"""
EDITED = 50
WORKERS = 20


class Provider(FakeModel):
    """Answers as long as it has credit, and kills *process* when *kill_at* requests are paid."""

    def __init__(self) -> None:
        super().__init__(self._reply)
        self.credit, self.answers = 0, 0
        self.paid = set[str]()
        self.kill_at = 0
        self.process: subprocess.Popen[str] | None = None

    def _reply(self, request: ModelRequest) -> Reply | Failure:
        key = request.headers["idempotency-key"]
        if key not in self.paid:
            if not self.credit:
                return Failure(429, "insufficient_quota")
            self.credit -= 1
            self.paid.add(key)
        self.answers += 1
        self.requests.clear()
        if self.process is not None and len(self.paid) == self.kill_at:
            self.process.send_signal(signal.SIGKILL)
        return Reply({name: "yes" for name in request.schema["properties"]})


class BatchEndpoint(BatchProvider):
    """Answers as long as it has credit, and kills *process* at a step of the next job."""

    def __init__(self) -> None:
        super().__init__(self._answered)
        self.credit = 0
        self.kill_at = ""
        self.process: subprocess.Popen[str] | None = None
        self.fault = self._kill

    @property
    def count(self) -> int:
        return self.paid.total()

    def _answered(self, request: ModelRequest) -> Reply | Failure:
        if not self.credit:
            return Failure(429, "insufficient_quota")
        self.credit -= 1
        return Reply({name: "yes" for name in request.schema["properties"]})

    def _kill(self, method: str, path: str) -> str | None:
        """Kill the process after it was sent the first half of the results, or before it gets another answer."""
        if self.process is None or not self.kill_at or not re.fullmatch(self.kill_at, f"{method} {path}"):
            return None
        self.kill_at = ""
        if path.endswith("/content"):
            return "half"
        self.process.send_signal(signal.SIGKILL)
        return "lost"

    def half_sent(self) -> None:
        assert self.process is not None
        time.sleep(0.5)  # for the replies that have arrived
        self.process.send_signal(signal.SIGKILL)


class Table:
    def __init__(self, folder: Path, rows: int, provider: Any, url: str, *options: str) -> None:
        self._folder, self._provider, self._url, self._options = folder, provider, url, options
        self._texts = [f"text {number}" for number in range(rows)]
        self.output = "answer"
        (folder / "target.py").write_text(TARGET)
        self.write()

    def write(self) -> None:
        with open(self._folder / "rows.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in self._texts)])

    def edit(self) -> None:
        for number in range(EDITED):
            self._texts[number * len(self._texts) // EDITED] += ", edited"
        self.write()

    def run(self, *options: str, kill_at: Any = 0) -> int:
        """Run the command, and kill it when that many rows are paid, or at a step of a job. Return its exit code."""
        command = flockapi_command("batch", "target.py", "ask", "rows.csv", "-o", "out.csv")
        with subprocess.Popen(
            [*command, "--max-workers", str(WORKERS), *self._options, *options],
            cwd=self._folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            self._provider.kill_at, self._provider.process = kill_at, process
            said = process.communicate()[1]
        print(f"    exit code {process.returncode}: {said.strip().splitlines()[-1] if said.strip() else ''}")
        return process.returncode

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "FAKE_URL": self._url, "OUTPUT": self.output, "PYTHONPATH": str(ROOT)}

    def complete(self) -> int:
        with open(self._folder / "out.csv", newline="") as file:
            return sum(row["status"] == "completed" for row in csv.DictReader(file))


def play(rows: int) -> None:
    """Raises AssertionError if a row was paid twice, or not at all."""
    provider, kills = Provider(), 0
    with tempfile.TemporaryDirectory() as folder, provider.serve() as url:
        table = Table(Path(folder), rows, provider, url)
        began_at = time.monotonic()

        def check(what: str, code: int, wanted: int, paid: int) -> None:
            nonlocal kills
            kills += code == -signal.SIGKILL
            answers = f"{len(provider.paid):,} rows paid, {provider.answers:,} answers"
            print(f"{what}: {answers}, {time.monotonic() - began_at:.0f} s", flush=True)
            assert provider.answers <= len(provider.paid) + kills * WORKERS, answers
            assert (code, len(provider.paid)) == (wanted, paid), (code, len(provider.paid), wanted, paid)

        provider.credit = rows // 2
        check("the credit runs out in the middle", table.run(), 1, rows // 2)
        assert table.complete() == rows // 2
        check("the same command without credit", table.run(), 1, rows // 2)
        provider.credit = 10 * rows
        check("with credit, killed", table.run(kill_at=rows * 2 // 3), -signal.SIGKILL, len(provider.paid))
        check("killed again", table.run(kill_at=rows * 5 // 6), -signal.SIGKILL, len(provider.paid))
        check("the same command", table.run(), 0, rows)
        check("nothing is left", table.run(), 0, rows)
        table.edit()
        check(f"{EDITED} cells edited", table.run(), 0, rows + EDITED)
        table.output = "answer, reason"
        check("an output added, not confirmed", table.run(), 1, rows + EDITED)
        check("confirmed, killed", table.run("--yes", kill_at=rows * 3 // 2), -signal.SIGKILL, len(provider.paid))
        check("the same command", table.run(), 0, 2 * rows + EDITED)
        table.output = "answer"
        check("the output removed again", table.run(), 0, 2 * rows + EDITED)
        assert table.complete() == rows


def play_with_batch_endpoint(rows: int) -> None:
    """Raises AssertionError if a row was paid twice, or not at all."""
    provider = BatchEndpoint()
    with tempfile.TemporaryDirectory() as folder, provider.serve() as url:
        table = Table(Path(folder), rows, provider, url, "--batch-api")
        began_at = time.monotonic()

        def check(what: str, code: int, wanted: int, paid: int) -> None:
            print(f"{what}: {provider.count:,} rows paid, {time.monotonic() - began_at:.0f} s", flush=True)
            assert (code, provider.count) == (wanted, paid), (code, provider.count, wanted, paid)

        provider.credit = rows // 2
        check("the credit runs out in the middle", table.run(), 1, rows // 2)
        assert table.complete() == rows // 2
        check("the same command without credit", table.run(), 1, rows // 2)
        provider.credit = 10 * rows
        check("with credit, killed in its submission", table.run(kill_at="POST /batches"), -signal.SIGKILL, rows // 2)
        check(
            "killed in the middle of its results", table.run(kill_at="GET .*/content"), -signal.SIGKILL, provider.count
        )
        check("the same command", table.run(), 0, rows)
        check("nothing is left", table.run(), 0, rows)
        assert table.complete() == rows
        table.edit()
        check(f"{EDITED} cells edited", table.run(), 0, rows + EDITED)
        table.output = "answer, reason"
        check("an output added, not confirmed", table.run(), 1, rows + EDITED)
        code = table.run("--yes", kill_at="GET .*/content")
        check("confirmed, killed in the middle of its results", code, -signal.SIGKILL, provider.count)
        check("the same command", table.run(), 0, 2 * rows + EDITED)
        table.output = "answer"
        check("the output removed again", table.run(), 0, 2 * rows + EDITED)
        assert table.complete() == rows
        assert not provider.normal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch-api", action="store_true")
    given = parser.parse_args()
    logging.getLogger("uvicorn.error").disabled = True  # requests that a kill has cut off
    (play_with_batch_endpoint if given.batch_api else play)(given.rows)

"""Generated requests against a real server with keys: python -m tests.fuzz_api --max-examples 1000

schemathesis makes them from the specification, whole and broken, one by one and along its links. An answer must be as
the specification says, and none may be 5xx. ``test_fuzz`` does the same with fewer.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from flock.auth import new_key
from tests.fakes import ROOT, flockapi_command, running

SERVED = '''
from typing import Any
from flock.core import Flock

flock = Flock("fuzzed")

@flock.agent
async def text_analyzer(text: str) -> str:
    """The agent of the specification's examples."""
    return text[:10]

@flock.agent
def add(a: int, b: int = 2) -> int:
    return a + b

@flock.agent
async def anything(value: Any = None) -> Any:
    return value
'''

# Which inputs an agent takes, and which keys were used before, a schema cannot say.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "413", "422", "429"]
"""


def fuzz(max_examples: int, seed: int) -> tuple[str, int]:
    """What schemathesis reports of about 25 cases for each example, and how many cases there were.

    Raises AssertionError with the report where a case failed, or the server wrote of an error.
    """
    key = new_key()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "served.py").write_text(SERVED)
        (Path(folder) / "schemathesis.toml").write_text(CONFIG)
        serve = flockapi_command("serve", f"{folder}/served.py", "--port", "0", "--store", f"{folder}/flock.db")
        with running(*serve, FLOCK_API_KEYS=f"fuzz:admin={key}") as server:
            command = [sys.executable, "-m", "schemathesis.cli", "run", str(ROOT / "openapi.yaml")]
            command += ["--url", server.url, "--header", f"Authorization: Bearer {key}", "--checks", "all"]
            command += ["--max-examples", str(max_examples), "--seed", str(seed), "--no-color"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            server.stop()
    report = done.stdout + done.stderr
    assert done.returncode == 0, report
    errors = [line for line in server.lines if line.startswith("ERROR") or '" 50' in line or "Traceback" in line]
    assert not errors, errors
    cases = re.search(r"(\d+) generated", report)
    assert cases is not None, report
    return report, int(cases[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-examples", type=int, default=1000, help="of each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(fuzz(arguments.max_examples, arguments.seed)[0])


if __name__ == "__main__":
    main()

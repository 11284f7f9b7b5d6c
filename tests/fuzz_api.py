"""Send generated requests to a real server with keys: python -m tests.fuzz_api --max-examples 1000

schemathesis generates valid and invalid requests from the specification, one by one and along its links. Each response
must match the specification, and none may be 5xx. ``test_fuzz`` does the same with fewer requests.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from flock.web.auth import new_key
from tests.support import PATIENCE_S, ROOT
from tests.support.servers import NO_COVERAGE, flockapi_command, running

#: The schema of an event stream, which schemathesis takes for that of each event. ``test_contract`` checks events.
STREAM = re.compile(r"schema:\n +type: string\n +description: Blocks of server-sent events.*\n.*\n.*\n.*\n")

SERVED = '''
from typing import Any
import anyio
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

@flock.agent
async def nap(text: str = "") -> None:
    await anyio.sleep(len(text) / 10)
'''

# A generated string is seldom the name of an agent and never a table for one, and most JSON bodies come with query
# options, which are refused. So the hook changes most valid requests that start something into ones that may succeed.
HOOKS = """
import csv, io, json
import schemathesis
from hypothesis import strategies as st

TAKES = {"text_analyzer": ["text"], "add": ["a", "b"], "anything": ["value"], "nap": ["text"]}
TYPES = ["text/csv", "application/x-ndjson"]
BINARY = ["application/vnd.apache.parquet", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"]

@st.composite
def likely_bodies(draw):
    name = draw(st.sampled_from(list(TAKES)))
    columns = TAKES[name]
    cells = {
        "text": st.text(max_size=9) | st.sampled_from(["=1+1", "a\\nb", '"', ""]),
        "value": st.sampled_from([None, True, [1], {}, "3", 1.5]),
    }
    row = st.tuples(*(cells.get(column, st.integers()) for column in columns))
    rows = draw(st.lists(row, min_size=1, max_size=9)) + draw(st.sampled_from([[], [], [], [("x", "y")]]))
    file = io.StringIO()
    csv.writer(file).writerows([columns, *rows])
    items = [dict(zip(columns, row)) for row in rows]
    lines = "\\n".join(map(json.dumps, items))
    has_options = draw(st.sampled_from([False, False, True]))
    return {"name": name, "items": items, "has_options": has_options, TYPES[0]: file.getvalue(), TYPES[1]: lines}

@schemathesis.serializer(*TYPES, *BINARY)
def as_it_is(context, value):
    return {"data": value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")}

@schemathesis.hook
def before_generate_case(context, strategy):
    if context.operation.definition.raw.get("operationId") not in ("runBatch", "runFlock"):
        return strategy
    likely = likely_bodies()
    return st.builds(made_likely, strategy.filter(may_be_wrong), st.none() | likely | likely | likely)

@schemathesis.hook
def before_call(context, case, kwargs):
    # Nobody asks here, so that a valid wait would last.
    wait = str((case.query or {}).get("wait"))
    if case.operation.path == "/questions" and wait.isdecimal() and 1 < int(wait) <= 3600:
        case.query["wait"] = 1

def may_be_wrong(case):
    # A list in place of a text is still sent as text, and its rows may be skipped.
    return case.media_type not in TYPES or not isinstance(case.body, (bool, int, float, list, dict, type(None)))

def made_likely(case, likely):
    if likely is None or case.meta is None or not case.meta.generation.mode.is_positive:
        return case
    if case.media_type in TYPES:
        case.body = likely[case.media_type]
        options = case.query or {} if likely["has_options"] else {}
        case.query = {**options, "agent_name": likely["name"]}
    elif isinstance(case.body, dict):
        inputs = {"batch_inputs": likely["items"]} if "batch_inputs" in case.body else {"inputs": likely["items"][0]}
        options = case.body if likely["has_options"] else {}
        case.body = {**options, **inputs, "agent_name": likely["name"]}
        case.query = {}
    return case
"""

# A schema cannot say which inputs an agent takes or which keys were used before.
CONFIG = """
hooks = "hooks.py"

[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "409", "413", "422", "429"]

# What a message must be depends on the agent, and OpenAI's clients expect 400 if it is not.
[[operations]]
include-tag = "openai"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "413", "422", "429"]

# A conversation without runs is not stored, so each valid id has one.
[[operations]]
include-path-regex = "^/v1/conversations/"
[operations.checks.use_after_free]
enabled = false

# A method may be unknown, and what it needs is not in the document.
[[operations]]
include-tag = "mcp"
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "401", "403", "404", "413", "422", "429"]
[operations.checks.negative_data_rejection] # a batch is answered 200, with an error for each invalid message
expected-statuses = ["2xx", "400", "401", "403", "404", "405", "406", "409", "415", "422", "428", "429", "5xx"]

# An error of the protocol is answered 200.
[[operations]]
include-tag = "a2a"
[operations.checks.negative_data_rejection]
expected-statuses = ["200", "400", "401", "403", "404", "405", "406", "409", "415", "422", "428", "429", "5xx"]

# A dry run of invalid rows is answered 200, and an accepted batch 202.
[[operations]]
include-operation-id = "runBatch"
[operations.checks.negative_data_rejection]
expected-statuses = [
    "200", "400", "401", "403", "404", "405", "406", "409", "415", "422", "428", "429", "5xx"
]
"""


def fuzz(max_examples: int, seed: int) -> tuple[str, int]:
    """Run schemathesis with about 25 cases for each example. Return its report and the number of cases.

    Raises AssertionError with the report if a case failed, or with the errors that the server logged.
    """
    key = new_key()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "served.py").write_text(SERVED)
        (Path(folder) / "hooks.py").write_text(HOOKS)
        (Path(folder) / "schemathesis.toml").write_text(CONFIG)
        specification = (ROOT / "openapi.yaml").read_text("utf-8")
        (Path(folder) / "openapi.yaml").write_text(STREAM.sub("schema: {}\n", specification), "utf-8")
        serve = flockapi_command("serve", f"{folder}/served.py", "--port", "0", "--store", f"{folder}/flock.db")
        with running(*serve, FLOCK_API_KEYS=f"fuzz:admin={key}", **NO_COVERAGE) as server:
            command = [sys.executable, "-m", "schemathesis.cli", "run", f"{folder}/openapi.yaml"]
            command += ["--url", server.url, "--header", f"Authorization: Bearer {key}", "--checks", "all"]
            command += ["--max-examples", str(max_examples), "--seed", str(seed), "--no-color"]
            command += ["--request-timeout", str(PATIENCE_S)]
            command += ["--exclude-operation-id", "getQuestionEvents"]  # it never ends; see test_query_parameters
            env = {**os.environ, **NO_COVERAGE}
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
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
    parser.add_argument("--max-examples", type=int, default=1000, help="examples for each operation and phase")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(fuzz(arguments.max_examples, arguments.seed)[0])


if __name__ == "__main__":
    main()

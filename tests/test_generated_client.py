"""Clients that other projects generate from the specification run, wait, stream, list and cancel.

The generator for Python does not know CSV and NDJSON bodies, and says so when it runs.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flock.web.auth import new_key
from tests.support import EXAMPLES, PATIENCE_S, ROOT
from tests.support.pages import blocks_of
from tests.support.servers import flockapi_command, free_port, running
from tests.test_front_end_clients import AGENTS, npm

SERVED = """
import anyio
from collections.abc import AsyncIterator
from flock.core import Flock

flock = Flock()

@flock.agent
async def write(topic: str) -> AsyncIterator[str]:
    for word in ("All ", "about ", topic):
        yield word

@flock.agent
def add(a: int, b: int = 2) -> int:
    return a + b

@flock.agent
async def nap() -> None:
    await anyio.sleep(600)
"""

PROGRAM = """
import json, sys
from client import AuthenticatedClient, Client
from client.api.agents import get_agent
from client.api.batches import (
    cancel_batch, delete_batch, get_batch, get_batch_results, list_batches, retry_batch, run_batch
)
from client.api.runs import cancel_run, get_run, list_runs, run_flock
from client.models import (
    FlockAPIRequest, FlockAPIRequestInputs, FlockBatchRequest, FlockBatchRequestBatchInputsType0Item as Row,
    FlockBatchRequestOnInvalid, FlockBatchResponse, OutputDelta, Problem, RunEnded, RunStatus,
)

url, key = sys.argv[1:]
inputs = FlockAPIRequestInputs.from_dict({"a": 40})
add = FlockAPIRequest(agent_name="add", inputs=inputs)
with AuthenticatedClient(base_url=url, token=key) as client:
    run = run_flock.sync(client=client, body=add)
    assert (run.status, run.result.to_dict()) == (RunStatus.COMPLETED, {"result": 42})
    later = run_flock.sync(client=client, body=add, prefer="respond-async", idempotency_key="once")
    later = get_run.sync(later.run_id, client=client, wait=30)
    assert later.status is RunStatus.COMPLETED
    again = run_flock.sync(client=client, body=add, prefer="respond-async", idempotency_key="once")
    assert again.run_id == later.run_id
    nap = run_flock.sync(client=client, body=FlockAPIRequest(agent_name="nap", async_run=True))
    assert {found.run_id for found in list_runs.sync(client=client).runs} == {run.run_id, later.run_id, nap.run_id}
    stopped = cancel_run.sync(nap.run_id, client=client, wait=30)
    assert stopped.status is RunStatus.CANCELLED
    assert list_runs.sync(client=client, status=RunStatus.CANCELLED).runs[0].run_id == nap.run_id
    problem = run_flock.sync(client=client, body=FlockAPIRequest(agent_name="add"))
    assert isinstance(problem, Problem) and problem.errors[0].pointer == "/inputs/a"
    agent = get_agent.sync("add", client=client)
    assert agent.input_schema.to_dict()["required"] == ["a"]
    assert [(each.from_, each.to, each.kind) for each in agent.graph] == [("add", None, "fixed")]
    assert agent.mermaid.startswith("flowchart LR")
    rows = [Row.from_dict({"a": 40}), Row.from_dict({"a": "x"})]
    skip = FlockBatchRequestOnInvalid.SKIP
    adds = run_batch.sync(client=client, body=FlockBatchRequest(agent_name="add", batch_inputs=rows, on_invalid=skip))
    adds = get_batch.sync(adds.batch_id, client=client, wait=30)
    assert (adds.status, adds.completed_items, adds.failed_items) == (RunStatus.COMPLETED, 2, 1)
    assert adds.results[0] == {"result": 42} and adds.results[1]["error_type"] == "invalid_input"
    assert get_batch_results.sync(adds.batch_id, client=client)[0].result.to_dict() == {"result": 42}
    http = client.get_httpx_client()
    write = FlockAPIRequest(agent_name="write", inputs=FlockAPIRequestInputs.from_dict({"topic": "tea"})).to_dict()
    stream = http.post("/run/flock", json=write, headers={"Accept": "text/event-stream"})
    fields = [dict(line.split(": ", 1) for line in block.splitlines()) for block in stream.text.strip().split("\\n\\n")]
    events = [{**each, "data": json.loads(each["data"])} for each in fields]
    deltas = [OutputDelta.from_dict(each) for each in events if each["event"] == "output.delta"]
    assert "".join(each.data.text for each in deltas) == "All about tea"
    ended = RunEnded.from_dict({**events[-1], "id": int(events[-1]["id"])})
    assert (ended.data.status, ended.data.error) == (RunStatus.COMPLETED, None)
    sent = http.post("/run/batch?agent_name=add", content="a\\n1\\n2\\n", headers={"Content-Type": "text/csv"})
    table = get_batch.sync(FlockBatchResponse.from_dict(sent.json()).batch_id, client=client, wait=30)
    assert table.results == [{"result": 3}, {"result": 4}]
    assert delete_batch.sync_detailed(table.batch_id, client=client).status_code == 204
    naps = run_batch.sync(client=client, body=FlockBatchRequest(agent_name="nap", batch_inputs=[Row(), Row()]))
    assert [found.batch_id for found in list_batches.sync(client=client).batches] == [naps.batch_id, adds.batch_id]
    stopped = cancel_batch.sync(naps.batch_id, client=client, wait=30)
    assert (stopped.status, stopped.cancelled_items) == (RunStatus.CANCELLED, 2)
    assert retry_batch.sync(naps.batch_id, client=client).attempt == 2
    assert delete_batch.sync_detailed(adds.batch_id, client=client).status_code == 204
with Client(base_url=url) as client:
    assert run_flock.sync(client=client, body=add).status == 401
print("all of it")
"""


#: The strictest options that programs use.
TSCONFIG = {
    "compilerOptions": {
        **{"strict": True, "exactOptionalPropertyTypes": True, "noUncheckedIndexedAccess": True},
        **{"module": "nodenext", "target": "es2022", "types": []},
        "lib": ["es2022", "dom", "dom.iterable", "dom.asynciterable"],
    },
    "files": ["session.ts"],
}


@pytest.mark.timeout(300)
@npm
def test_a_generated_typescript_client_runs_streams_and_sends_csv(tmp_path: Path) -> None:
    """The program of the page "HTTP API", with the default options of the generator and strict types."""
    (program,) = (block.text for block in blocks_of(ROOT / "docs" / "http-api.md") if block.language == "ts")
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "package.json").write_text('{"private": true, "type": "module"}')
    (tmp_path / "tsconfig.json").write_text(json.dumps(TSCONFIG))
    packages = ("openapi-typescript@7", "openapi-fetch@0", "typescript@5")
    run("npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages, folder=tmp_path)
    run("npx", "openapi-typescript", str(ROOT / "openapi.yaml"), "--output", "schema.d.ts", folder=tmp_path)
    key = new_key()
    serve = flockapi_command("serve", str(tmp_path / "served.py"), "--port", "0", "--store", ":memory:")
    with running(*serve, FLOCK_API_KEYS=f"ann={key}") as server:
        program = program.replace("http://127.0.0.1:8000", server.url).replace("fk_...", key)
        (tmp_path / "session.ts").write_text(program)
        run("npx", "tsc", "--project", ".", folder=tmp_path)
        output = run("node", "session.js", folder=tmp_path)
    rows = ["topic,result,status,error", "tea,All about tea,completed,", "coffee,All about coffee,completed,"]
    first, *deltas = output.partition("completed topic")[0].splitlines()
    assert first == "completed All about tea"
    assert "".join(deltas) == "All about tea"
    assert output.partition("completed topic")[2].split() == " ".join(rows).removeprefix("topic").split()


@pytest.fixture(scope="module")
def typescript(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of ``examples/typescript``, after the commands of its page, with one more program."""
    folder = tmp_path_factory.mktemp("typescript")
    names = ("package.json", "tsconfig.json", "flock-stream.ts", "chat.ts")
    for path in (*(EXAMPLES / "typescript" / name for name in names), ROOT / "tests" / "clients" / "stream.ts"):
        shutil.copy(path, folder)
    (commands,) = (block.text for block in blocks_of(EXAMPLES / "typescript" / "README.md") if block.language == "bash")
    (folder / "served.py").write_text(AGENTS)
    serve = flockapi_command("serve", str(folder / "served.py"), "--port", "0", "--store", ":memory:")
    with running(*serve) as server:
        run("bash", "-ec", commands.replace("http://127.0.0.1:8344", server.url), folder=folder)
    return folder


@pytest.mark.timeout(300)
@npm
def test_the_helper_for_streams_gets_each_event_once_over_refusals_and_cut_connections(typescript: Path) -> None:
    assert len((typescript / "flock-stream.ts").read_text().splitlines()) <= 100
    serve = flockapi_command("serve", str(typescript / "served.py"), "--port", "0", "--store", ":memory:")
    with running(*serve) as server:
        assert run("node", "stream.js", server.url, folder=typescript) == "all of it\n"


@pytest.mark.timeout(300)
@npm
@pytest.mark.parametrize(
    ("topic", "screen"),
    [
        pytest.param("tea", "> All about tea\n> ", id="the same text again"),
        pytest.param("coffee", "> All \nSome about coffee\n> ", id="another text"),
    ],
)
def test_the_chat_shows_each_character_once_although_the_server_is_killed(
    topic: str, screen: str, typescript: Path, tmp_path: Path
) -> None:
    shutil.copy(typescript / "served.py", tmp_path)
    port, key = free_port(), new_key()
    serve = f"cd {tmp_path} && exec {shlex.join(flockapi_command('serve', 'served.py', '--port', str(port)))}"
    env = {"FLOCK_URL": f"http://127.0.0.1:{port}", "FLOCK_API_KEY": key}
    with running("bash", "-c", serve, FLOCK_API_KEYS=f"ann={key}") as server:
        chat = subprocess.Popen(
            ["node", "chat.js", "hold"],
            cwd=typescript,
            env={**os.environ, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert chat.stdin is not None
        assert chat.stdout is not None
        chat.stdin.write(f"{topic}\n")
        chat.stdin.flush()
        assert chat.stdout.read(6) == "> All "
        server.process.kill()
        server.process.wait()
    (tmp_path / "may_go").touch()
    with running("bash", "-c", serve, FLOCK_API_KEYS=f"ann={key}"):
        assert chat.stdout.read(len(screen) - 6) == screen[6:]
        assert chat.communicate(timeout=PATIENCE_S)[0] == ""
    assert chat.returncode == 0


@pytest.mark.timeout(300)
@npm
def test_the_chat_asks_for_an_approval(typescript: Path) -> None:
    serve = flockapi_command("serve", str(typescript / "served.py"), "--port", "0", "--store", ":memory:")
    with running(*serve) as server:
        command = ["node", "chat.js", "payer"]
        env = {**os.environ, "FLOCK_URL": server.url}
        done = subprocess.run(
            command, cwd=typescript, env=env, input="pay\ny\n", capture_output=True, text=True, check=True
        )
    assert done.stdout.startswith("> \n")
    assert done.stdout.endswith(' {"amount":3} [y/n] paid 3\n> ')


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_a_generated_client_runs_waits_lists_and_cancels(tmp_path: Path) -> None:
    generator = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command = [*generator, "--path", str(ROOT / "openapi.yaml"), "--output-path", str(tmp_path / "client")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "served.py").write_text(SERVED)
    (tmp_path / "program.py").write_text(PROGRAM)
    key = new_key()
    serve = flockapi_command("serve", str(tmp_path / "served.py"), "--port", "0", "--store", ":memory:")
    with running(*serve, FLOCK_API_KEYS=f"ann={key}") as server:
        command = [sys.executable, str(tmp_path / "program.py"), server.url, key]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("all of it\n", 0), done.stderr

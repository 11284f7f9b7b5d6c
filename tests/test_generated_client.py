"""A client that another project generates from the specification runs, waits, lists and cancels.

The generator does not know CSV and NDJSON bodies, and says so when it runs.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from flock.web.auth import new_key
from tests.support import ROOT
from tests.support.servers import flockapi_command, running

SERVED = """
import anyio
from flock.core import Flock

flock = Flock()

@flock.agent
def add(a: int, b: int = 2) -> int:
    return a + b

@flock.agent
async def nap() -> None:
    await anyio.sleep(600)
"""

PROGRAM = """
import sys
from client import AuthenticatedClient, Client
from client.api.agents import get_agent
from client.api.batches import (
    cancel_batch, delete_batch, get_batch, get_batch_results, list_batches, retry_batch, run_batch
)
from client.api.runs import cancel_run, get_run, list_runs, run_flock
from client.models import (
    FlockAPIRequest, FlockAPIRequestInputs, FlockBatchRequest, FlockBatchRequestBatchInputsType0Item as Row,
    FlockBatchRequestOnInvalid, Problem, RunStatus,
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

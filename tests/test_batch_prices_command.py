"""``flockapi batch --batch-api``, killed at each step of its jobs, over real HTTP."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flock.testing import Failure
from tests.paid_once import BatchEndpoint, Table, play_with_batch_endpoint
from tests.support.servers import flockapi_command


@pytest.fixture
def provider() -> BatchEndpoint:
    endpoint = BatchEndpoint()
    endpoint.credit = 10_000
    return endpoint


@pytest.fixture
def table(provider: BatchEndpoint, tmp_path: Path) -> Iterator[Table]:
    with provider.serve() as url:
        yield Table(tmp_path, 250, provider, url, "--batch-api")


STEPS = {
    "the upload": ("POST /files", 1),
    "the submission": ("POST /batches", 1),
    "a poll": (r"GET /batches/batch_\d+", 1),
    "the download": ("GET .*/content", 1),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_command_that_is_killed_in_a_step_of_a_job_pays_no_row_twice(
    table: Table, provider: BatchEndpoint, step: str
) -> None:
    pattern, jobs = STEPS[step]
    assert table.run(kill_at=pattern) == -signal.SIGKILL
    assert table.run() == 0
    assert (table.complete(), len(provider.jobs), provider.normal) == (250, jobs, {})
    assert list(provider.paid.values()) == [1] * 250


def test_a_command_that_is_killed_before_its_upload_arrives_submits_the_job_once(
    table: Table, provider: BatchEndpoint
) -> None:
    is_killed = False

    def kill(method: str, path: str) -> Failure | None:
        nonlocal is_killed
        if is_killed or provider.process is None:
            return None
        is_killed = True
        provider.process.send_signal(signal.SIGKILL)
        return Failure(503)

    provider.fault = kill
    assert table.run() == -signal.SIGKILL
    assert table.run() == 0
    assert (table.complete(), len(provider.jobs), list(provider.paid.values())) == (250, 1, [1] * 250)
    asked = [path for method, path in provider.asked if method == "GET" and path == "/batches"]
    assert len(asked) == 1  # it has searched for the job before it was sent


def test_the_command_shows_what_is_submitted_and_resumes_after_a_stop(
    table: Table, provider: BatchEndpoint, tmp_path: Path
) -> None:
    provider.is_held = True
    arguments = ["target.py", "ask", "rows.csv", "-o", "out.csv", "--batch-api", "--progress", "bar"]
    with subprocess.Popen(
        flockapi_command("batch", *arguments), cwd=tmp_path, env=table.env, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said, give_up_at = "", time.monotonic() + 60
        while not re.search(r"250 waiting +250 submitted", said):
            assert time.monotonic() < give_up_at, said
            said += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    provider.is_held = False
    assert table.run() == 0
    assert (table.complete(), len(provider.jobs), list(provider.paid.values())) == (250, 1, [1] * 250)


@pytest.mark.parametrize(
    ("agent", "model", "error"),
    [
        ("ask", "anthropic/claude-opus-5", "'anthropic' of 'ask' has no batch endpoint that is supported"),
        ("ask", "local/smollm2-135m", "'local' of 'ask' has no batch endpoint that is supported"),
        ("with_tools", "openai/gpt-4o", "'with_tools' has tools, and each of their results needs another call"),
        ("count", "openai/gpt-4o", "'count' is a function. --batch-api needs an agent with a model."),
        ("nobody", "openai/gpt-4o", "There is no agent 'nobody'"),
    ],
)
def test_agents_that_cannot_use_the_endpoint_are_refused_before_anything_starts(
    tmp_path: Path, agent: str, model: str, error: str
) -> None:
    (tmp_path / "rows.csv").write_text("text\na\n")
    (tmp_path / "target.py").write_text(
        "from flock.core import Flock, FlockFactory\n"
        "flock = Flock('t', model='openai/gpt-4o')\n"
        "create = FlockFactory.create_default_agent\n"
        "flock.add_agent(create('ask', input='text', output='answer'))\n"
        "flock.add_agent(create('with_tools', input='text', output='answer', tools=['ask']))\n"
        "@flock.agent\n"
        "def count(text: str) -> int: return 1\n"
    )
    command = flockapi_command(
        "batch", "target.py", agent, "rows.csv", "-o", "out.csv", "--batch-api", "--model", model
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert error in done.stderr
    assert not (tmp_path / "out.csv.flock.db").exists()


def test_the_provider_is_paid_once_for_each_of_2000_rows() -> None:
    play_with_batch_endpoint(2000)

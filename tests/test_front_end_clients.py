"""The real clients of front ends, in Node, against a real server."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import PATIENCE_S, ROOT
from tests.support.servers import flockapi_command, free_port, running
from tests.test_openai_clients import SERVED, run

pytestmark = [
    pytest.mark.skipif(
        shutil.which("npm") is None and "CI" not in os.environ, reason="npm is not installed; it is in CI"
    ),
    pytest.mark.timeout(400),
]

#: Writes a text, calls an agent, and begins again with another text.
AGENTS = (
    SERVED
    + """
@flock.agent
async def replaced(topic: str, context: RunContext) -> str:
    context.emit("The first")
    await asyncio.sleep(0.3)
    await context.run_agent("write", {"topic": topic})
    context.reset_output()
    return "Another one"
"""
)

#: The packages that the program of each client needs.
PACKAGES = {"vercel.mjs": ("ai@7", "@ai-sdk/react@4"), "agui.mjs": ("@ag-ui/client@1",)}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the clients, and a version of Node that is new enough for them."""
    folder = tmp_path_factory.mktemp("node")
    packages = ["node@22", *(package for each in PACKAGES.values() for package in each)]
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages], check=True, cwd=folder)
    for program in PACKAGES:
        shutil.copy(ROOT / "tests" / "clients" / program, folder)  # it imports the packages beside it
    return folder


@pytest.mark.parametrize("program", PACKAGES)
def test_clients_of_front_ends(program: str, node: Path, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    with running(*flockapi_command("serve", f"{tmp_path}/served.py", "--port", "0", "--store", ":memory:")) as server:
        assert run(node / "node_modules" / ".bin" / "node", str(node / program), server.url) == "all of it\n"


def test_a_reader_gets_each_character_once_although_the_server_is_killed(node: Path, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    port, _interpreter = free_port(), str(node / "node_modules" / ".bin" / "node")
    command = f"cd {tmp_path} && exec {shlex.join(flockapi_command('serve', 'served.py', '--port', str(port)))}"
    client = [
        str(node / "node_modules" / ".bin" / "node"),
        str(node / "vercel.mjs"),
        f"http://127.0.0.1:{port}",
        "killed",
    ]
    with running("bash", "-c", command) as server:
        reader = subprocess.Popen(client, stdout=subprocess.PIPE, text=True)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "half\n"
        server.process.kill()
        server.process.wait()
    (tmp_path / "may_go").touch()
    with running("bash", "-c", command):
        assert reader.communicate(timeout=PATIENCE_S)[0] == "all of it\n"
    assert reader.returncode == 0

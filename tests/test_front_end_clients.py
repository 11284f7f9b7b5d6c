"""The real clients of front ends, in Node, against a real server."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import PATIENCE_S, ROOT
from tests.support.environments import new_environment, pip
from tests.support.pages import blocks_of
from tests.support.servers import flockapi_command, free_port, running
from tests.test_openai_clients import SERVED, run

npm = pytest.mark.skipif(
    shutil.which("npm") is None and "CI" not in os.environ, reason="npm is not installed; it is in CI"
)
pytestmark = [npm, pytest.mark.timeout(400)]

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

@flock.agent
async def delegates(order: str, context: RunContext) -> str:
    return (await context.run_agent("payer", {"order": order}))["reply"]
"""
)

#: The packages that the program of each client needs.
PACKAGES = {"vercel.mjs": ("ai@7", "@ai-sdk/react@4"), "agui.mjs": ("@ag-ui/client@1",)}
#: CopilotKit's runtime and its client, which need an older client of AG-UI.
COPILOTKIT = ("@copilotkit/runtime@1", "@copilotkit/core@1", "zod@3")
#: What a page in a browser needs besides those.
OF_PAGES = ("react@19", "react-dom@19", "esbuild@0.25")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the clients, and a version of Node that is new enough for them."""
    folder = tmp_path_factory.mktemp("node")
    packages = ["node@22", *OF_PAGES, *(package for each in PACKAGES.values() for package in each)]
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages], check=True, cwd=folder)
    for program in (*PACKAGES, "page.mjs"):
        shutil.copy(ROOT / "tests" / "clients" / program, folder)  # it imports the packages beside it
    return folder


@pytest.mark.parametrize("program", PACKAGES)
def test_clients_of_front_ends(program: str, node: Path, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    with running(*flockapi_command("serve", f"{tmp_path}/served.py", "--port", "0", "--store", ":memory:")) as server:
        client = [str(node / program), server.url, *([str(tmp_path)] if program == "agui.mjs" else [])]
        assert run(node / "node_modules" / ".bin" / "node", *client) == "all of it\n"
    if program == "agui.mjs":
        python = new_environment(tmp_path / "environment")
        subprocess.run(pip(python, "install", "-q", "ag-ui-validate"), check=True)
        streams = sorted(tmp_path.glob("*.sse"))
        assert {"roles", "thinker", "mood", "replaced", "delegates", "payer", "guide", "fail", "nap"} == {
            stream.name.partition("-")[0] for stream in streams
        }
        for stream in streams:
            run(python.with_name("ag-ui-validate"), str(stream), "--max-warnings", "0")


def test_copilotkit_streams_asks_and_calls_tools_of_the_page_over_ag_ui(tmp_path: Path) -> None:
    """The runtime of ``docs/front-ends.md``, and the client of CopilotKit's components."""
    (runtime,) = (block.text for block in blocks_of(ROOT / "docs" / "front-ends.md") if "CopilotRuntime" in block.text)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", "--ignore-scripts"]
    subprocess.run([*install, *COPILOTKIT], check=True, cwd=tmp_path)
    (tmp_path / "served.py").write_text(AGENTS)
    serve = shlex.join(flockapi_command("serve", "served.py", "--port", "0", "--store", ":memory:"))
    with running("bash", "-c", f"cd {tmp_path} && exec {serve}") as server:
        runtime, anywhere = runtime.replace("http://127.0.0.1:8344", server.url), 'listen(0, "127.0.0.1")'
        assert 'listen(3000, "127.0.0.1")' in runtime
        runtime = runtime.replace('listen(3000, "127.0.0.1")', anywhere)
        (tmp_path / "runtime.mjs").write_text(f"{runtime}\nexport {{ agent, agents, server }};\n")
        shutil.copy(ROOT / "tests" / "clients" / "copilotkit.mjs", tmp_path)
        program = ["node", "copilotkit.mjs", "may_go", server.url]
        env = {**os.environ, "COPILOTKIT_TELEMETRY_DISABLED": "true", "FLOCK_API_KEY": "none"}
        done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.endswith("all of it\n"), done.stdout + done.stderr


@pytest.mark.parametrize("program", PACKAGES)
def test_a_reader_gets_each_character_once_although_the_server_is_killed(
    program: str, node: Path, tmp_path: Path
) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    port, _interpreter = free_port(), str(node / "node_modules" / ".bin" / "node")
    command = f"cd {tmp_path} && exec {shlex.join(flockapi_command('serve', 'served.py', '--port', str(port)))}"
    client = [
        str(node / "node_modules" / ".bin" / "node"),
        str(node / program),
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


def test_a_page_that_is_reloaded_in_the_middle_of_an_answer_shows_each_character_once(
    node: Path, tmp_path: Path
) -> None:
    """``useChat`` in a browser."""
    pytest.importorskip("playwright")
    from tests.support.browser import CHROMIUM, Watch, chromium

    if not Path(CHROMIUM).exists():
        pytest.skip("Chromium is not installed: apt-get install chromium")
    (tmp_path / "served.py").write_text(AGENTS)
    bundle = [str(node / "node_modules" / ".bin" / "esbuild"), "page.mjs", "--bundle", "--format=esm"]
    script = subprocess.run(bundle, check=True, cwd=node, capture_output=True, text=True).stdout
    serve = shlex.join(flockapi_command("serve", "served.py", "--port", "0", "--store", ":memory:"))
    with running("bash", "-c", f"cd {tmp_path} && exec {serve}") as server, chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        watch = Watch(page, server.url)
        html = f"<!doctype html><meta charset=utf-8><body></body><script type=module>{script}</script>"
        page.route("**/page", lambda route: route.fulfill(body=html, content_type="text/html"))
        page.goto(f"{server.url}/page")
        page.get_by_role("button").click()
        page.locator(".assistant", has_text="All").wait_for()
        seen = page.evaluate("window.seen")
        page.reload()
        page.locator(".assistant", has_text="All").wait_for()
        (tmp_path / "may_go").touch()
        page.locator("output", has_text="ready").wait_for()
        page.locator(".assistant", has_text="All about tea").wait_for()
        assert page.locator("p").all_inner_texts() == ["tea", "All about tea"]
        seen += page.evaluate("window.seen")  # all that was shown at any time
        assert [text for text in seen if not "All about tea".startswith(text)] == []
        assert (watch.errors, watch.elsewhere) == ([], [])

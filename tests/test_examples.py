"""The examples, each served as its first line says."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import anyio.abc
import click
import httpx
import pytest
import yaml
from click.testing import CliRunner

from flock.command.cli import main
from flock.core import Flock
from flock.testing import FakeModel, ModelRequest, Reply
from tests.support import EXAMPLES, PATIENCE_S, ROOT
from tests.support.servers import flockapi_command, running

GREET = {"agent_name": "greet", "inputs": {"name": "Ann", "times": 2}}
TRANSLATE = {"agent_name": "translate", "inputs": {"text": "hi"}}
GREETED = {"result": "Hello, Ann! Hello, Ann!"}

SITE = """
from django.http import HttpResponse
from django.urls import path

SECRET_KEY, ROOT_URLCONF, ALLOWED_HOSTS = "x", __name__, ["*"]
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "site.db"}}
DEFAULT_AUTO_FIELD = "django.db.models.AutoField"

def log_in(request, name):
    from django.contrib.auth import authenticate, login
    login(request, authenticate(request, username=name, password=request.GET["password"]))
    return HttpResponse(f"Django greets {name}")

urlpatterns = [path("login/<name>", log_in)]
"""

PREPARE_SITE = """
import django
django.setup()
from django.core.management import call_command
from django.contrib.auth.models import User
call_command("migrate", verbosity=0)
User.objects.create_user("ann", password="of-ann")
"""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    """It has under ten lines, or under thirty if it authenticates users, asks a person, calls agents or reads a photo.

    Those that search have under sixty, ``support.py`` with its tests under 150, and ``text_analyzer.py`` may be longer.
    """
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and '"""' not in line]
    is_long = any(word in "".join(lines) for word in ("auth=", ".ask(", ".run_agent(", "Image"))
    most = 150 if path.stem == "support" else 60 if path.stem.startswith("search_") else 30 if is_long else 10
    assert len(lines) < most or path.stem == "text_analyzer"


def ask(url: str, body: Any, **headers: str) -> Any:
    return httpx.post(f"{url}/run/flock", json=body, headers=headers, timeout=30).raise_for_status().json()


def statuses_without_a_credential(url: str, **headers: str) -> set[int]:
    """Return the statuses of all requests that run agents or show runs, if they have no credential."""
    requests = [
        ("POST", "/run/flock"),
        ("POST", "/run/batch"),
        ("GET", "/runs"),
        ("GET", "/agents"),
        ("GET", "/metrics"),
    ]
    return {httpx.request(method, url + path, json=GREET, headers=headers).status_code for method, path in requests}


@pytest.mark.parametrize(
    ("example", "body", "result"),
    [
        ("plain_function", GREET, GREETED),
        (
            "pydantic_ai_agent",
            {"agent_name": "translate", "inputs": {"text": "hi"}},
            {"result": "success (no tool calls)"},
        ),
    ],
)
def test_an_example_is_served(example: str, body: Any, result: Any) -> None:
    command = flockapi_command("serve", str(EXAMPLES / f"{example}.py"), "--port", "0", "--store", ":memory:")
    with running(*command) as server:
        assert ask(server.url, body)["result"] == result


@pytest.mark.anyio
async def test_the_chat_remembers_its_conversation() -> None:
    """Its provider answers with the number of messages that it was sent."""

    provider = FakeModel(lambda request: {"reply": f"{len(request['messages'])} messages"})
    command = flockapi_command("serve", str(EXAMPLES / "chat.py"), "--port", "0", "--store", ":memory:")
    with provider.serve() as url:
        with running(*command, OPENAI_BASE_URL=url) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
                replies = []
                for session_id in ("a", "a", "b", "a"):
                    body = {"agent_name": "chat", "inputs": {"message": "Hi!"}, "session_id": session_id}
                    replies.append((await client.post("/run/flock", json=body)).json()["result"]["reply"])
    assert replies == ["2 messages", "4 messages", "2 messages", "6 messages"]


@pytest.mark.anyio
async def test_research_looks_into_its_topics_at_the_same_time(model: FakeModel) -> None:
    all_running = anyio.Event()

    async def look_into(request: ModelRequest) -> Reply:
        if len(model.requests) == 4:
            all_running.set()
        with anyio.fail_after(PATIENCE_S):
            await all_running.wait()
        topic = next(topic for topic in topics if topic in request.text)
        return Reply({"findings": f"about {topic}"})

    async def conclude(request: ModelRequest) -> Reply:
        return Reply({"answer": " ".join(re.findall(r"about \w+", request.text))})

    topics = ["taste", "price", "smell"]
    model.replies = [Reply({"topics": topics}), look_into, look_into, look_into, conclude]
    flock: Flock = runpy.run_path(str(EXAMPLES / "research.py"))["flock"]
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("research", {"question": "Which coffee?"})
        run = await engine.wait(run.run_id)
    assert run.error is None
    assert bytes(run.result or b"") == b'{"result":"about taste about price about smell"}'


def test_the_refund_waits_for_an_approval_above_a_small_amount() -> None:
    command = flockapi_command("serve", str(EXAMPLES / "refund.py"), "--port", "0", "--store", ":memory:")
    with running(*command) as server:
        small = ask(server.url, {"agent_name": "refund", "inputs": {"order": "B2"}})
        assert small["result"] == {"result": "8.50 € paid back for B2"}
        run = ask(server.url, {"agent_name": "refund", "inputs": {"order": "A7"}})
        [question] = run["waiting_for"]
        assert question["question"] == "Refund 40.00 € for the order A7?"
        path = f"{server.url}/run/{run['run_id']}/calls/{question['call_id']}?wait=30"
        done = httpx.post(path, json={"output": {"approved": True}}, timeout=60).json()
        assert done["result"] == {"result": "40.00 € paid back for A7"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_passes_the_check(path: Path, tmp_path: Path) -> None:
    """The environment has the key of its model, and the settings of a site for Django."""
    (tmp_path / "site_of_test.py").write_text(SITE)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "site_of_test"}
    command = flockapi_command("check", str(path))
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": nothing is missing.\n")


def test_an_example_without_its_key_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    result = CliRunner().invoke(main, ["check", str(EXAMPLES / "text_analyzer.py")])
    assert result.exit_code == 1
    assert result.output.startswith(
        "The agent 'text_analyzer' cannot run. The model cannot be called: 'openai/gpt-4o' "
    )
    assert "Set the environment variable OPENAI_API_KEY" in result.output


def uvicorn(target: str) -> list[str]:
    return [sys.executable, "-m", "uvicorn", "--port", "0", target]


JWT_SECRET = "of-the-host-and-long-enough-for-HS256"


def login_of(user: str, *, secret: str = JWT_SECRET, expires_in_s: int = 60, **claims: str) -> dict[str, str]:
    import jwt

    claims_ = {"sub": user, "exp": time.time() + expires_in_s, **claims}
    return {"Authorization": f"Bearer {jwt.encode(claims_, secret, 'HS256')}"}


def test_the_fastapi_host_serves_agents_and_its_own_route_only_to_its_users() -> None:
    of_ann = login_of("ann")
    with running(*uvicorn("examples.fastapi_host:app"), PYTHONPATH=str(ROOT), JWT_SECRET=JWT_SECRET) as server:
        run = ask(f"{server.url}/ai", GREET, **of_ann)
        assert run["result"] == GREETED
        assert httpx.get(f"{server.url}/me", headers=of_ann).json() == "ann"
        assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "FastAPI"
        run_url = f"{server.url}/ai/run/{run['run_id']}"
        readers = of_ann, login_of("bob"), login_of("ops", role="admin")
        assert [httpx.get(run_url, headers=reader).status_code for reader in readers] == [200, 404, 200]
        foreign, expired = login_of("ann", secret="x" * 32), login_of("ann", expires_in_s=-1)
        for headers in ({}, {"Authorization": "Bearer"}, foreign, expired):
            assert statuses_without_a_credential(f"{server.url}/ai", **headers) == {401}
            assert httpx.get(f"{server.url}/me", headers=headers).status_code == 401
        refused = httpx.get(f"{server.url}/ai/runs", headers=expired)
        assert refused.json()["detail"] == "The token is not valid: Signature has expired."
        assert refused.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
        assert server.stop() in (0, -15)
    assert not re.search("Traceback|WARNING|has no authentication", "\n".join(server.lines))


def test_the_fastapi_host_without_a_secret_refuses_every_request() -> None:
    with running(*uvicorn("examples.fastapi_host:app"), PYTHONPATH=str(ROOT), JWT_SECRET="") as server:
        for headers in ({}, {"Authorization": "Bearer"}, login_of("ann")):
            assert statuses_without_a_credential(f"{server.url}/ai", **headers) == {401}


def test_workers_of_uvicorn_share_their_metrics_and_log_as_json(tmp_path: Path) -> None:
    """The command is that of ``host.service``."""
    unit = (EXAMPLES / "deploy" / "host.service").read_text("utf-8")
    (options,) = re.findall(r"(?m)^ExecStart=\S+ --app-dir \S+ acme:app (.*)$", unit)
    options = options.replace("/opt/acme", str(EXAMPLES / "deploy")).replace("--port 8344", "--port 0")
    (tmp_path / "metrics").mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"), "PYTHONPATH": str(ROOT), "JWT_SECRET": JWT_SECRET}
    of_ops = login_of("ops", role="admin")
    with running(*uvicorn("examples.fastapi_host:app"), *options.split(), **env) as server:
        server.wait_for_line("Application startup complete", times=2)
        server.wait_until_listening()
        runs = [ask(f"{server.url}/ai", GREET, **of_ops) for _ in range(4)]
        for _ in range(4):  # each is answered by one of the workers
            page = httpx.get(f"{server.url}/ai/metrics", headers=of_ops).text
            assert 'flock_runs_total{agent_name="greet",status="completed"} 4.0' in page
        server.wait_for_line(runs[-1]["run_id"])
        assert server.stop() in (0, -15)
    logged = [json.loads(line) for line in server.lines if line.startswith("{")]
    assert {run["run_id"] for run in runs} == {line["run_id"] for line in logged if "run_id" in line}


def test_the_django_host_serves_agents_only_to_its_users(tmp_path: Path) -> None:
    """A user who is logged in to the site is known to the flock by the same session."""
    (tmp_path / "site_of_test.py").write_text(SITE)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "site_of_test"}
    subprocess.run([sys.executable, "-c", PREPARE_SITE], env=os.environ | env, check=True)
    with running(*uvicorn("examples.django_host:app"), **env) as server:
        assert statuses_without_a_credential(f"{server.url}/ai") == {401}
        assert statuses_without_a_credential(f"{server.url}/ai", Cookie="sessionid=made-up") == {401}
        logged_in = httpx.get(f"{server.url}/login/ann?password=of-ann")
        assert logged_in.text == "Django greets ann"
        cookie = f"sessionid={logged_in.cookies['sessionid']}"
        run = ask(f"{server.url}/ai", GREET, Cookie=cookie)
        assert run["result"] == GREETED
        foreign = {"Cookie": cookie, "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
        assert httpx.post(f"{server.url}/ai/run/flock", json=GREET, headers=foreign).status_code == 403
        assert server.stop() in (0, -15)
    assert not re.search("Traceback|has no authentication", "\n".join(server.lines))


# The compose file cannot be run here, so these tests check its form and its references

COMPOSE = (EXAMPLES / "compose.yaml").read_text("utf-8")


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE)


def test_the_compose_file_says_that_it_was_never_run() -> None:
    assert "has never been run" in COMPOSE.partition("\nservices:")[0]


def test_the_services_of_the_compose_file_refer_to_what_exists(compose: Any) -> None:
    services = compose["services"]
    replicas = {name: service["deploy"]["replicas"] for name, service in services.items() if "deploy" in service}
    assert replicas == {"api": 2, "worker": 3}
    for name, service in services.items():
        for other, dependency in service.get("depends_on", {}).items():
            assert other in services
            assert dependency["condition"] != "service_healthy" or "healthcheck" in services[other]
            is_job = services[other].get("restart") == "on-failure"
            assert is_job is (dependency["condition"] == "service_completed_successfully"), (name, other)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= compose.get("volumes", {}).keys()
        for config in service.get("configs", []):
            yaml.safe_load(compose["configs"][config["source"]]["content"])
        assert "build" in service or re.fullmatch(r"[\w./-]+:\d[\d.]*", service["image"]), "the version is pinned"
    tags = {image.partition(":")[2] for image in re.findall("image: (temporalio/.*)", COMPOSE)}
    assert len(tags) == 1, "the server and the tools that create its tables have the same version"
    assert "/readyz" in services["api"]["healthcheck"]["test"][-1]


def test_the_compose_file_contains_no_secret(compose: Any) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|PWD", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), "it must come from the environment"


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_commands_in_the_compose_file_are_valid(name: str, compose: Any) -> None:
    service = compose["services"][name]
    program, command, *arguments = shlex.split(service["command"])
    assert program == "flockapi"
    group = click.Context(main, **main.context_settings)  # a command keeps the names of its help option
    with main.commands[command].make_context(command, arguments, group) as context:
        options = context.params
    assert (ROOT / options["target"]).is_file()
    host, port = options["temporal"].split(":")
    assert host in compose["services"]
    assert port == "7233"
    assert float(service["stop_grace_period"].removesuffix("s")) > options["drain_timeout_s"]
    if name == "api":
        assert all(port.endswith(f":{options['port']}") for port in service["ports"])
    lines = service["build"]["dockerfile_inline"].splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources)
    assert service["build"]["context"] == ".."
    assert any("[temporal" in line for line in lines)

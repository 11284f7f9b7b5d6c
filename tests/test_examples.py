"""The examples, each served as its first line says."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from flock.cli import main
from tests.fakes import EXAMPLES, ROOT, flockapi_command, running

GREET = {"agent_name": "greet", "inputs": {"name": "Ann", "times": 2}}
TRANSLATE = {"agent_name": "translate", "inputs": {"text": "hi"}}
GREETED = {"result": "Hello, Ann! Hello, Ann!"}

SITE = """
from django.http import HttpResponse
from django.urls import path

SECRET_KEY, ROOT_URLCONF, ALLOWED_HOSTS = "x", __name__, ["*"]
urlpatterns = [path("hello/<name>", lambda request, name: HttpResponse(f"Django greets {name}"))]
"""


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_has_under_ten_lines(path: Path) -> None:
    """The page's own script is as the page prints it."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and '"""' not in line]
    assert len(lines) < 10 or path.stem == "text_analyzer"


def ask(url: str, body: Any) -> Any:
    return httpx.post(f"{url}/run/flock", json=body, timeout=30).raise_for_status().json()


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


def uvicorn(target: str) -> list[str]:
    return [sys.executable, "-m", "uvicorn", "--port", "0", target]


def test_the_fastapi_host_serves_both() -> None:
    with running(*uvicorn("examples.fastapi_host:app"), PYTHONPATH=str(ROOT)) as server:
        assert ask(f"{server.url}/ai", GREET)["result"] == GREETED
        assert httpx.get(f"{server.url}/openapi.json").json()["info"]["title"] == "FastAPI"
        assert server.stop() in (0, -15)
    assert "Traceback" not in "\n".join(server.lines)


def test_the_django_host_serves_both(tmp_path: Path) -> None:
    (tmp_path / "site_of_test.py").write_text(SITE)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "DJANGO_SETTINGS_MODULE": "site_of_test"}
    with running(*uvicorn("examples.django_host:app"), timeout_s=60, **env) as server:
        assert ask(f"{server.url}/ai", GREET)["result"] == GREETED
        assert httpx.get(f"{server.url}/hello/Ann").text == "Django greets Ann"
        assert server.stop() in (0, -15)
    assert "Traceback" not in "\n".join(server.lines)


# The compose file: nothing here can run it, so its form is checked, and that what it names is there

COMPOSE = (EXAMPLES / "compose.yaml").read_text("utf-8")


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load(COMPOSE)


def test_the_compose_file_says_that_it_was_never_run() -> None:
    assert "It was never run" in COMPOSE.partition("\nservices:")[0]


def test_the_services_of_the_compose_file_refer_to_what_there_is(compose: Any) -> None:
    services = compose["services"]
    replicas = {name: service["deploy"]["replicas"] for name, service in services.items() if "deploy" in service}
    assert replicas == {"api": 2, "worker": 3}
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
            is_job = services[other].get("restart") == "on-failure"
            assert is_job is (how["condition"] == "service_completed_successfully"), (name, other)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= compose.get("volumes", {}).keys()
        for config in service.get("configs", []):
            yaml.safe_load(compose["configs"][config["source"]]["content"])
        assert "build" in service or re.fullmatch(r"[\w./-]+:\d[\d.]*", service["image"]), "the version is named"
    tags = {image.partition(":")[2] for image in re.findall("image: (temporalio/.*)", COMPOSE)}
    assert len(tags) == 1, "the server and the tools that make its tables are of one version"
    assert "/readyz" in services["api"]["healthcheck"]["test"][-1]


def test_the_compose_file_holds_no_secret(compose: Any) -> None:
    for service in compose["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|PWD", name):
                assert re.fullmatch(r"\$\{\w+:\?.+\}", value), "it is asked for"


@pytest.mark.parametrize("name", ["api", "worker"])
def test_the_command_line_takes_what_the_compose_file_says(name: str, compose: Any) -> None:
    service = compose["services"][name]
    program, command, *arguments = shlex.split(service["command"])
    assert program == "flockapi"
    with main.commands[command].make_context(command, arguments) as context:
        given = context.params
    assert (ROOT / given["target"]).is_file()
    host, port = given["temporal"].split(":")
    assert host in compose["services"]
    assert port == "7233"
    assert float(service["stop_grace_period"].removesuffix("s")) > given["drain_timeout_s"]
    if name == "api":
        assert all(port.endswith(f":{given['port']}") for port in service["ports"])
    lines = service["build"]["dockerfile_inline"].splitlines()
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources)
    assert service["build"]["context"] == ".."
    assert any("[temporal" in line for line in lines)

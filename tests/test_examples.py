"""The examples, each served as its first line says."""

import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

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

"""What people import, used as a script would."""

import functools
import json
import subprocess
import sys
from typing import Any

import pytest

from flock.core import Flock, FlockFactory
from flock.errors import AgentNotFound, DefinitionError, InvalidData, RunFailed, SignatureError
from tests.fakes import sample_flock


def test_run_gives_the_result() -> None:
    assert sample_flock().run("add", {"a": 40}) == {"result": 42}


def test_run_raises_what_went_wrong() -> None:
    flock = sample_flock()
    with pytest.raises(RunFailed, match="more than I can do") as caught:
        flock.run("refuse", {"text": "This"})
    assert caught.value.error_type == "agent_error"
    # In one's own process nothing needs to be hidden.
    with pytest.raises(RunFailed, match="raised ValueError: a secret: x"):
        flock.run("explode", {"text": "x"})
    with pytest.raises(AgentNotFound):
        flock.run("nobody")
    with pytest.raises(InvalidData, match="/inputs/a"):
        flock.run("add", {"a": "1"})
    for odd in (object(), "\ud800"):
        with pytest.raises(InvalidData, match="cannot be JSON"):
            flock.run("add", {"a": odd})


@pytest.mark.anyio
async def test_run_within_a_loop_says_what_to_call() -> None:
    flock = sample_flock()
    with pytest.raises(RuntimeError, match=r"await flock\.run_async"):
        flock.run("add", {"a": 1})
    assert await flock.run_async("add", {"a": 1}) == {"result": 3}


def test_a_name_is_taken_once() -> None:
    flock = sample_flock()
    with pytest.raises(DefinitionError, match="'add' is in this flock already"):
        flock.add_agent(flock.agents["add"])


def test_what_is_no_agent_is_refused() -> None:
    not_an_agent: Any = "print"
    with pytest.raises(DefinitionError, match="is no agent"):
        Flock().add_agent(not_an_agent)
    with pytest.raises(SignatureError, match="cannot be given by name"):
        Flock().add_agent(print)


def test_the_method_agent_takes_options() -> None:
    flock = Flock("named")

    @flock.agent(name="other", description="Says it.")
    def original() -> str:
        return "x"

    assert list(flock.agents) == ["other"]
    assert repr(flock) == "<Flock 'named': other>"
    assert repr(Flock()) == "<Flock 'flock': no agents>"


def test_the_factory_takes_what_the_page_gives_it() -> None:
    made = FlockFactory.create_default_agent(
        name="text_analyzer",
        description="Analyses.",
        model="openai/gpt-4o",
        input="text: str",
        output="sentiment: str, keywords: list[str]",
    )
    assert (made.name, made.description, made.model) == ("text_analyzer", "Analyses.", "openai/gpt-4o")
    assert list(made.output.schema["properties"]) == ["sentiment", "keywords"]


def test_importing_pulls_in_no_server_and_no_extra() -> None:
    code = "import sys, json, flock.core; print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"uvicorn", "starlette", "xllamacpp", "litellm", "temporalio", "prometheus_client"} & set(modules)


def test_whatever_is_callable_with_typed_parameters_is_an_agent() -> None:
    class Counter:
        """Counts what it is asked for."""

        def __call__(self, text: str, of: str = "e") -> int:
            return text.count(of)

        async def longest(self, text: str) -> str:
            return max(text.split(), key=len)

    flock = Flock()
    flock.add_agent(Counter().longest)
    flock.add_agent(functools.partial(Counter(), of="n"))
    assert flock.run("longest", {"text": "one eleven"}) == {"result": "eleven"}
    assert flock.run("Counter", {"text": "one eleven"}) == {"result": 2}
    with pytest.raises(SignatureError, match="needs a type"):
        flock.add_agent(lambda text: text)
    with pytest.raises(DefinitionError, match="is a class"):
        flock.add_agent(Counter)


def test_what_yields_or_has_no_parameters_known_to_python_is_refused() -> None:
    class Yields:
        def __call__(self, text: str) -> Any:
            yield text

    with pytest.raises(DefinitionError, match="yields"):
        Flock().add_agent(Yields())
    with pytest.raises(SignatureError, match="Wrap it in a function"):
        Flock().add_agent(max)

"""Options are validated in one place, and can be passed one by one or as one struct."""

import re
from typing import Annotated, Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from flock.command.arguments import options_of
from flock.core import Flock
from flock.errors import DefinitionError
from flock.limits import Limits, enforced_by
from flock.models.llm import ModelClient
from flock.options import whole
from flockapi import AppOptions, FlockAPI, create_app


def engine_with(**options: Any) -> Limits:
    return Flock().engine(**options)._limits


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_an_invalid_limit_is_refused_with_an_explanation(name: str) -> None:
    """By the struct itself, and as a keyword argument of an engine."""
    made: Any = Limits
    for make in (made, engine_with):
        for value in (-1, "10", True, float("nan")):
            with pytest.raises(DefinitionError, match=rf"^engine: {name}= must be a .*number.*, not "):
                make(**{name: value})


def test_only_an_optional_limit_accepts_none() -> None:
    for field in msgspec.structs.fields(Limits):
        if field.default is None:
            engine_with(**{field.name: None})
        else:
            with pytest.raises(DefinitionError, match=f"{field.name}= must be "):
                engine_with(**{field.name: None})


def test_limits_can_be_one_struct_which_a_keyword_argument_overrides() -> None:
    limits = Limits(max_queue=5, max_items=7)
    assert engine_with(limits=limits) == limits
    assert engine_with(limits=limits, max_items=8) == Limits(max_queue=5, max_items=8)
    assert engine_with() == Limits()


def test_an_unknown_limit_is_refused_with_a_suggestion() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'max_queues'\. Did you mean 'max_queue'\?"):
        engine_with(max_queues=5)


@pytest.mark.cluster
def test_on_a_cluster_each_side_accepts_only_the_limits_that_it_enforces() -> None:
    from flock.temporal import TemporalEngine, TemporalWorker

    assert set(Limits.__struct_fields__) == {
        name for side in ("server", "worker", "cluster", "namespace") for name in enforced_by(side)
    }
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_concurrency'"):
        TemporalEngine({}, "127.0.0.1:1", max_concurrency=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_queue'"):
        TemporalWorker({}, ModelClient(), "127.0.0.1:1", max_queue=5)
    with pytest.raises(DefinitionError, match="max_concurrency= must be"):
        TemporalWorker({}, ModelClient(), "127.0.0.1:1", max_concurrency=0)
    with pytest.raises(DefinitionError, match="max_items= must be"):
        TemporalEngine({}, "127.0.0.1:1", max_items=0)


def test_the_options_of_an_app_can_be_one_struct() -> None:
    options = AppOptions(store=":memory:", max_wait_s=5)
    assert FlockAPI(Flock(), options).options == options
    assert FlockAPI(Flock(), options, docs=False).options == msgspec.structs.replace(options, docs=False)
    assert create_app(Flock(), store=":memory:", max_wait_s=5).options == options


def test_an_unknown_option_of_an_app_is_refused_with_a_suggestion() -> None:
    made: Any = create_app
    with pytest.raises(TypeError, match=r"create_app got an unexpected keyword argument 'doc'\. Did you mean 'docs'\?"):
        made(Flock(), doc=False)


class More(Limits, frozen=True, kw_only=True):
    """A new limit, which needs only this field and the code that enforces it."""

    max_things: Annotated[int, whole(1, "Things of one run; more are refused.")] = 3


def test_a_new_limit_is_validated_and_becomes_a_command_line_option() -> None:
    with pytest.raises(DefinitionError, match="engine: max_things= must be a whole number of at least 1, not 0"):
        More(max_things=0)
    command = options_of(More)(click.command()(lambda max_things, **others: click.echo(max_things)))
    assert re.search(
        r"--max-things N +Things of one run; more are refused", CliRunner().invoke(command, ["--help"]).output
    )
    assert CliRunner().invoke(command, []).output == "3\n"
    assert CliRunner().invoke(command, ["--max-things", "5"]).output == "5\n"
    assert "0 is not in the range x>=1" in CliRunner().invoke(command, ["--max-things", "0"]).output

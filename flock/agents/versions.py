"""Versions of agents, by which processes notice that they have different code."""

import functools
import hashlib
import inspect
from typing import Any

import msgspec

from flock.agents.agent import Agent, FunctionAgent, ModelAgent
from flock.agents.tools import Tool
from flock.models.models import models_of, names_of


def version_of(agent: Agent) -> str:
    """Return a digest of the signature and the definition of *agent*, the same in all processes that have its code.

    The definition of a function is its source. What it calls, and limits such as ``max_concurrency``, do not count.
    """
    handoffs = [(handoff.value, handoff.to) for handoff in agent.handoffs()]
    definition: list[Any] = [agent.description, agent.input.schema, agent.output.schema, handoffs, agent.on_interrupt]
    if isinstance(agent, FunctionAgent):
        definition.append(_source_of(agent.function))
    elif isinstance(agent, ModelAgent):
        models = names_of(models_of(agent.model, repr(agent.name)))
        tools = [  # an agent as a tool has no function
            [tool.name, tool.description, tool.parameters.schema, _source_of(getattr(tool, "function", None))]
            for tool in agent.tools
            if isinstance(tool, Tool)
        ]
        definition += [models, agent.instructions, agent._examples, tools, agent.temperature]
        definition += [agent.options] if agent.options else []
        definition += [
            _source_of(own.function) for own in (agent.dynamic_instructions, agent.validate) if own is not None
        ]
    else:
        definition.append(_source_of(type(agent)))
    return hashlib.sha256(msgspec.json.encode(definition, enc_hook=str)).hexdigest()[:12]


def _source_of(code: Any) -> str:
    """Return the source of a function, or of the class of an object, or "" if it has none."""
    while isinstance(code, functools.partial):
        code = code.func
    of: Any = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    return _source(of)


@functools.lru_cache(maxsize=1000)
def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # a built-in, or a line in a prompt of Python
        return ""

"""Versions of agents, by which processes notice that they have different code."""

import functools
import hashlib
import inspect
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flock.agents.agent import Agent, FunctionAgent, ModelAgent
from flock.agents.graph import graph_of
from flock.agents.hooks import Hook
from flock.agents.tools import Tool
from flock.models.models import Model, models_of, names_of


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


def recipe_of(
    name: str, agents: Mapping[str, Agent], default: Sequence[Model], hooks: Sequence[Hook] = ()
) -> str | None:
    """Return a digest of all that makes the results of an agent, and of those that may follow it.

    None if equal inputs may have other results: an agent is missing, or has no ``version`` and is a function, or has
    tools, a history, functions of its own, or *hooks* around its calls of models.
    """
    parts: list[Any] = []
    for each in _chain(name, agents):
        agent = agents.get(each)
        if agent is None or (agent.version is None and (hooks or not _is_pure(agent))):
            return None
        handoffs = [(handoff.value, handoff.to) for handoff in agent.handoffs()]
        parts.append([each, agent.version, agent.description, agent.input.schema, agent.output.schema, handoffs])
        if isinstance(agent, ModelAgent):
            models = models_of(agent.model, repr(each)) or default
            tools = [
                tool if isinstance(tool, str) else getattr(tool, "name", type(tool).__name__) for tool in agent.tools
            ]
            options = [agent.temperature, agent.max_tokens, agent.options, agent._answer.schema]
            parts.append([[(model.name, model.base_url, model.extra_body) for model in models], options, tools])
            parts.append([agent.instructions, agent._examples])
    return hashlib.sha256(msgspec.json.encode(parts, enc_hook=str)).hexdigest()[:32]


def label_of(name: str, agents: Mapping[str, Agent], default: Sequence[Model], hooks: Sequence[Hook] = ()) -> str:
    """Return its ``version``, if any, and a text that differs if the agent, or one that may follow, has changed."""
    made_by: Any = recipe_of(name, agents, default, hooks)
    if made_by is None:
        made_by = [names_of(default), [version_of(agents[each]) for each in _chain(name, agents) if each in agents]]
    digest = hashlib.sha256(msgspec.json.encode(made_by)).hexdigest()[:12]
    version = agents[name].version if name in agents else None
    return digest if version is None else f"{version}-{digest}"


def _chain(name: str, agents: Mapping[str, Agent]) -> Mapping[str, None]:
    """Return the agent and those that may follow it."""
    return dict.fromkeys([name, *(each.to for each in graph_of(name, agents) if each.to is not None)])


def _is_pure(agent: Agent) -> bool:
    if not isinstance(agent, ModelAgent) or agent.tools or agent.history:
        return False
    has_functions = agent.dynamic_instructions is not None or agent.validate is not None
    return not has_functions and all(handoff.kind != "function" for handoff in agent.handoffs())


def _source_of(code: Any) -> str:
    """Return the source of a function, or of the class of an object, or "" if it has none."""
    while isinstance(code, functools.partial):
        code = code.func
    of: Any = code if inspect.isroutine(code) or inspect.isclass(code) else type(code)
    return _source(of)


@functools.lru_cache(maxsize=10_000)  # of all agents, since it is the code that runs only when it is read first
def _source(code: Any) -> str:
    try:
        return inspect.getsource(code)
    # A built-in, a line in a prompt of Python, or a file that has changed since.
    except (OSError, TypeError, SyntaxError, IndexError, tokenize.TokenError):
        return ""

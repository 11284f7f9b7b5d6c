"""Checks at startup for problems that would make runs fail, such as a missing API key."""

import logging
from collections.abc import Collection, Iterator, Mapping

from flock.agents.agent import Agent, ModelAgent
from flock.agents.handoff import missing_agents
from flock.agents.tools import AgentTool, Approval, Tool, ToolSource
from flock.errors import DefinitionError, ModelError
from flock.models.llm import ModelClient
from flock.models.models import ModelChoice, models_of
from flock.models.providers import check_model
from flock.nearest import did_you_mean

logger = logging.getLogger("flock.checks")


def problems(agents: Mapping[str, Agent], default_model: ModelChoice, *, calls_models: bool = True) -> list[str]:
    """Return the problems that would make runs fail, each as a text. It sends no requests and loads no weights.

    Args:
        default_model: the model, or models, of agents without one.
        calls_models: False if other processes call the models, and may have other keys and packages.
    """
    names_of: dict[tuple[str, str], list[str]] = {}
    calls_models = calls_models and ModelClient.stand_in is None  # which needs no keys and no packages
    agent_problems: list[str] = []
    for agent in agents.values():
        if calls_models and isinstance(agent, ModelAgent):
            for problem in _model_problems(agent.model or default_model):
                names_of.setdefault(problem, []).append(repr(agent.name))
        agent_problems += map(str, missing_agents(agent, agents))
        agent_problems += [
            f"The agent {agent.name!r} has a tool {name!r}, but this flock has no such agent."
            f"{did_you_mean(name, agents)} Add it with add_agent."
            for name in _agents_as_tools(agent)
            if name not in agents
        ]
    model_problems = [
        f"The agent{'s'[: len(names) - 1]} {', '.join(names)} {effect}. {reason}"
        for (effect, reason), names in names_of.items()
    ]
    no_agents = [] if agents else ["This flock has no agents. Add one with flock.add_agent(...)."]
    return no_agents + model_problems + agent_problems


def check_no_batches(agents: Mapping[str, Agent], default_model: ModelChoice) -> None:
    """Raise DefinitionError if a model is to be called through a batch endpoint, which a cluster does not do."""
    for agent in agents.values():
        models = (
            models_of(agent.model or default_model or None, repr(agent.name)) if isinstance(agent, ModelAgent) else ()
        )
        if models and models[0].batch:
            raise DefinitionError(
                f"{models[0].name!r} of {agent.name!r} has batch=True, but on a cluster no calls go through batch "
                "endpoints. Omit it, or run without a cluster."
            )


def _model_problems(choice: ModelChoice) -> list[tuple[str, str]]:
    """Return the effect and the reason of each problem. An agent runs if one of its models can be called."""
    models, reasons = models_of(choice, "an agent") or (None,), []
    for model in models:
        try:
            check_model(model)
        except ModelError as exc:
            reasons.append(str(exc))
    if len(reasons) == len(models):
        return [("cannot run", " ".join(reasons))]
    return [("cannot use one of the models", reason) for reason in reasons]


def _agents_as_tools(agent: Agent) -> list[str]:
    tools = agent.tools if isinstance(agent, ModelAgent) else []
    names = [tool.agent_name if isinstance(tool, AgentTool) else tool for tool in tools]
    return [name for name in names if isinstance(name, str)]


def _approvals(agents: Mapping[str, Agent]) -> Iterator[tuple[str, Approval]]:
    """Yield how calls of tools are approved, each with the tools in words."""
    for agent in agents.values():
        for tool in agent.tools if isinstance(agent, ModelAgent) else ():
            if isinstance(tool, ToolSource):
                yield f"the tools of {tool!r} of the agent {agent.name!r}", tool.approval
            elif isinstance(tool, Tool):
                yield f"the tool {tool.name!r} of the agent {agent.name!r}", tool.approval


def check_nobody_is_named(agents: Mapping[str, Agent], auth: str) -> None:
    """Raise DefinitionError if a tool names its approvers, since all callers are one principal.

    Args:
        auth: why that is so, in words.
    """
    for tools, approval in _approvals(agents):
        if approval.is_restricted:
            option = "four_eyes=" if approval.approver is None else "approver="
            raise DefinitionError(
                f"{option} of {tools} says who may approve its calls, but{auth or ' without api_keys= and auth='} this "
                "app cannot tell callers apart. Pass api_keys= (--api-keys-file, FLOCK_API_KEYS), or as auth= a "
                "function that returns a Principal with roles."
            )


def warn_of_missing_roles(agents: Mapping[str, Agent], roles: Collection[str]) -> None:
    """Log a WARNING for each role that may approve calls and that no API key has."""
    for tools, approval in _approvals(agents):
        if approval.approver is not None and approval.approver not in roles:
            logger.warning(
                "No API key has the role %r, so nobody can approve calls of %s. Add it to a key: NAME:role:%s=KEY",
                *(approval.approver, tools, approval.approver),
            )


def tool_sources(agents: Mapping[str, Agent]) -> list[ToolSource]:
    """Return the sources of tools that the agents have, each once."""
    tools = [tool for agent in agents.values() if isinstance(agent, ModelAgent) for tool in agent.tools]
    return list(dict.fromkeys(tool for tool in tools if isinstance(tool, ToolSource)))


def warn_of_problems(agents: Mapping[str, Agent], default_model: ModelChoice, *, calls_models: bool = True) -> None:
    """Log each of the ``problems`` as a WARNING."""
    for problem in problems(agents, default_model, calls_models=calls_models):
        logger.warning("%s", problem)

"""Checks at startup for problems that would make runs fail, such as a missing API key."""

import logging
from collections.abc import Mapping

from flock.agents.agent import Agent, ModelAgent
from flock.agents.llm import check_model
from flock.agents.workflow import missing_agents
from flock.errors import ModelError

__all__ = ["problems", "warn_of_problems"]

logger = logging.getLogger("flock.checks")


def problems(agents: Mapping[str, Agent], default_model: str | None, *, calls_models: bool = True) -> list[str]:
    """Return the problems that would make runs fail, each as a text. It sends no requests and loads no weights.

    Args:
        default_model: the model of agents without one.
        calls_models: False if other processes call the models, and may have other keys and packages.
    """
    names_of: dict[str, list[str]] = {}
    handoff_problems: list[str] = []
    for agent in agents.values():
        try:
            if calls_models and isinstance(agent, ModelAgent):
                check_model(agent.model or default_model)
        except ModelError as exc:
            names_of.setdefault(str(exc), []).append(repr(agent.name))
        handoff_problems += map(str, missing_agents(agent, agents))
    model_problems = [
        f"The agent{'s'[: len(names) - 1]} {', '.join(names)} cannot run. {reason}"
        for reason, names in names_of.items()
    ]
    return model_problems + handoff_problems


def warn_of_problems(agents: Mapping[str, Agent], default_model: str | None, *, calls_models: bool = True) -> None:
    """Log each of the ``problems`` as a WARNING."""
    for problem in problems(agents, default_model, calls_models=calls_models):
        logger.warning("%s", problem)

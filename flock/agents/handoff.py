"""Hand-offs from one agent to the next: which agent is next, its inputs, and its execution.

``next_agent`` and ``inputs_for`` are pure functions of a run's record. They and ``execute_agent`` do not depend on a
store, so every engine can use them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent, Resources
from flock.agents.graph import graph_of
from flock.agents.history import Exchange
from flock.errors import AgentNotFound, InvalidData, InvalidHandoff, TooManySteps
from flock.nearest import did_you_mean
from flock.runs import Run, RunContext

#: The names of a run's inputs and of its result's members, with their types in JSON Schema; "" if there are several.
#: Each is None if it is not known in advance.
Columns = tuple[Mapping[str, str] | None, Mapping[str, str] | None]


def next_agent(run: Run, agents: Mapping[str, Agent], max_steps: int) -> Agent | None:
    """Return the agent for the next step of *run*, or None if there are no more steps. *run* may be a stub.

    Raises:
        InvalidHandoff: the next agent does not exist.
        TooManySteps: the run already has *max_steps* steps.
    """
    steps, name = run.steps, run.next_agent_name
    if name is None:
        return None
    agent = agents.get(name)
    if agent is not None and len(steps) < max_steps:
        return agent
    path = " → ".join([*(step.agent_name for step in steps), name])
    if len(steps) >= max_steps:
        raise TooManySteps(
            f"Stopped after {max_steps} steps, the limit (max_steps): {path}. Check next_agent for a loop."
        )
    raise _no_such_agent(name, path, agents)


def inputs_for(agent: Agent, run: Run) -> msgspec.Raw:
    """Return the inputs of the next agent of *run*: from its inputs and the results of all steps. Later values win."""
    if not run.steps:
        return run.inputs
    known: dict[str, msgspec.Raw] = {}
    for source in (run.inputs, *(step.result for step in run.steps)):
        known |= msgspec.json.decode(source, type=dict[str, msgspec.Raw])
    selected = {field.name: known[field.name] for field in agent.input.fields if field.name in known}
    return msgspec.Raw(msgspec.json.encode(selected))


def exchanges_of(agent: Agent, runs: Iterable[Run]) -> list[tuple[Run, int, Exchange]]:
    """Return the run, the position, and the inputs and the result of each step of *agent* in *runs*, in order."""
    return [
        (run, position, Exchange(inputs_for(agent, replace(run, steps=run.steps[:position])), step.result))
        for run in runs
        for position, step in enumerate(run.steps)
        if step.agent_name == agent.name
    ]


def missing_agents(agent: Agent, agents: Mapping[str, Agent]) -> list[InvalidHandoff]:
    """Return the error of a run for each agent that *agent* can hand off to and that does not exist."""
    names = dict.fromkeys(handoff.to for handoff in agent.handoffs() if handoff.to is not None)
    missing = [name for name in names if name not in agents]
    return [_no_such_agent(name, f"{agent.name} → {name}", agents) for name in missing]


def _no_such_agent(name: str, path: str, agents: Mapping[str, Agent]) -> InvalidHandoff:
    known = ", ".join(agents)
    return InvalidHandoff(
        f"There is no agent {name!r} to hand off to ({path}).{did_you_mean(name, agents)} Known agents: {known}."
    )


async def execute_agent(agent: Agent, inputs: msgspec.Raw, resources: Resources, context: RunContext) -> msgspec.Raw:
    """Validate *inputs*, execute *agent* with them, and return its result.

    Raises: InvalidHandoff if the inputs are missing or invalid; any exception of the agent.
    Cancellation: what it has done is lost.
    """
    try:
        decoded = agent.input.decode(inputs)
    except InvalidData as exc:
        raise InvalidHandoff(f"The inputs for the agent {agent.name!r} are missing or invalid. {exc}") from exc
    result = await agent.execute(decoded, resources, context)
    context.settle_output(result)
    return result


def columns_of(agent_name: str, agents: Mapping[str, Agent]) -> Columns:
    """Return the names and types of the inputs and of the results of runs that start with an agent.

    If mappings decide which agent is the last, the results have the outputs of all that can be.
    """
    first, graph = agents.get(agent_name), graph_of(agent_name, agents)
    inputs = None if first is None else _kinds(first.input.schema)
    last = dict.fromkeys(handoff.from_ for handoff in graph if handoff.to is None)
    if not last or any(handoff.kind == "function" for handoff in graph):
        return inputs, None
    outputs: dict[str, str] = {}
    for each in last:
        for name, kind in _kinds(agents[each].output.result_schema).items():
            outputs[name] = kind if outputs.get(name, kind) == kind else ""
    return inputs, outputs


def result_names(agent_name: str, agents: Mapping[str, Agent]) -> set[str]:
    """Return all possible member names of an item's result, including those of a failed item.

    If a function decides which agent is the last, these are the outputs of all agents.
    """
    outputs = columns_of(agent_name, agents)[1]
    if outputs is None:
        outputs = {name: "" for agent in agents.values() for name in _kinds(agent.output.result_schema)}
    return {*outputs, "error", "error_type"}


def _kinds(schema: Mapping[str, Any]) -> dict[str, str]:
    """Return the names and types of the members of an object."""
    kinds: dict[str, str] = {}
    for name, member in schema.get("properties", {}).items():
        types = {str(each.get("type", "")) for each in member.get("anyOf", [member])} - {"null"}
        kinds[name] = types.pop() if len(types) == 1 else ""
    return kinds


def agent_of(agents: Mapping[str, Agent], name: str) -> Agent:
    """Return the agent called *name*. Raises AgentNotFound."""
    if name not in agents:
        raise AgentNotFound(name, list(agents))
    return agents[name]

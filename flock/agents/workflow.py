"""Workflows: which agent goes on with what, and one step of it.

``next_agent`` and ``inputs_for`` are pure functions of a run's record, and ``run_step`` is one step. They know nothing
of stores, so that every engine can use them.
"""

from collections.abc import Mapping, Sequence

import msgspec

from flock.agents.agent import Agent, Resources
from flock.errors import InvalidData, InvalidHandoff, TooManySteps
from flock.nearest import did_you_mean
from flock.runs import Run, RunContext, Step, now

__all__ = [
    "Columns",
    "check_handoff",
    "columns_of",
    "inputs_for",
    "next_agent",
    "result_names",
    "run_step",
]

#: The names of a run's inputs and of its result's members; None where nobody knows them before.
Columns = tuple[Sequence[str] | None, Sequence[str] | None]


def next_agent(run: Run, agents: Mapping[str, Agent], max_steps: int) -> Agent | None:
    """The agent that has its turn after the steps of *run*, which may be a stub; None when it is at its end.

    Raises:
        InvalidHandoff: the next agent does not exist.
        TooManySteps: it would be more than *max_steps*.
    """
    steps, name = run.steps, run.next_agent_name
    if name is None:
        return None
    path = " → ".join([*(step.agent_name for step in steps), name])
    if len(steps) >= max_steps:
        raise TooManySteps(
            f"Stopped after {max_steps} steps, the limit (max_steps): {path}. Do they hand on in a loop?"
        )
    agent = agents.get(name)
    if agent is None:
        raise _no_such_agent(name, path, agents)
    return agent


def inputs_for(agent: Agent, run: Run) -> msgspec.Raw:
    """The inputs of the next agent of *run*: drawn from all that is known, its inputs, then each result; later wins."""
    if not run.steps:
        return run.inputs
    known: dict[str, msgspec.Raw] = {}
    for source in (run.inputs, *(step.result for step in run.steps)):
        known |= msgspec.json.decode(source, type=dict[str, msgspec.Raw])
    drawn = {field.name: known[field.name] for field in agent.input.fields if field.name in known}
    return msgspec.Raw(msgspec.json.encode(drawn))


def check_handoff(agent: Agent, agents: Mapping[str, Agent]) -> None:
    """Raise the InvalidHandoff with which runs would fail after *agent*, if it names a next one that does not exist."""
    chosen = agent.next_agent
    name = chosen.name if isinstance(chosen, Agent) else chosen
    if isinstance(name, str) and name not in agents:
        raise _no_such_agent(name, f"{agent.name} → {name}", agents)


def _no_such_agent(name: str, path: str, agents: Mapping[str, Agent]) -> InvalidHandoff:
    known = ", ".join(agents)
    return InvalidHandoff(
        f"There is no agent {name!r} to hand on to ({path}).{did_you_mean(name, agents)} Known agents: {known}."
    )


async def run_step(agent: Agent, inputs: msgspec.Raw, resources: Resources, context: RunContext) -> Step:
    """Let *agent* have its turn. Raises what the agent raises, and InvalidHandoff where its inputs do not fit.

    Cancellation: the step is lost.
    """
    started_at = now()
    try:
        decoded = agent.input.decode(inputs)
    except InvalidData as exc:
        raise InvalidHandoff(f"The agent {agent.name!r} does not get the inputs that it needs. {exc}") from exc
    turn = await agent.take_turn(decoded, resources, context)
    return Step(
        agent_name=agent.name,
        result=turn.result,
        next_agent=await agent.choose_next(turn.result),
        usage=turn.usage,
        attempt=context.attempt,
        started_at=started_at,
        completed_at=now(),
    )


def columns_of(agent_name: str, agents: Mapping[str, Agent]) -> Columns:
    """What runs that begin with an agent are given, and what they give."""
    first = last = agents.get(agent_name)
    met: list[Agent] = []
    while last is not None and last.next_agent is not None and last not in met:
        met.append(last)
        name = last.next_agent.name if isinstance(last.next_agent, Agent) else last.next_agent
        last = agents.get(name) if isinstance(name, str) else None
    inputs = None if first is None else [field.name for field in first.input.fields]
    return inputs, None if last is None or last in met else list(last.output.schema.get("properties", {}))


def result_names(agent_name: str, agents: Mapping[str, Agent]) -> set[str]:
    """All names that the result of an item may have: the outputs, of any agent if the last one is decided on the way,
    and what a failure has in their place."""
    outputs = columns_of(agent_name, agents)[1]
    if outputs is None:
        outputs = [name for agent in agents.values() for name in agent.output.schema.get("properties", {})]
    return {*outputs, "error", "error_type"}

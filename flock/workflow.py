"""Workflows: which agent goes on with what, and one step of it.

``next_step`` is a pure function of what is known, and ``run_step`` does what it says; they know agents and a journal,
and nothing of stores, so that every engine can use them.
"""

from collections.abc import Mapping, Sequence

import msgspec

from flock.agents import Agent, Resources
from flock.errors import InvalidData, InvalidHandoff, TooManySteps
from flock.runs import Journal, Run, Step, now

__all__ = ["NextStep", "next_step", "run_step", "run_workflow"]


class NextStep(msgspec.Struct, frozen=True):
    """Who goes on, and with what."""

    agent: Agent
    inputs: msgspec.Raw


def next_step(run: Run, steps: Sequence[Step], agents: Mapping[str, Agent], max_steps: int) -> NextStep | None:
    """What *run* does next after *steps*, or None when it is at its end.

    The inputs of the next agent are drawn from all that is known: the run's inputs, then each result; later wins.

    Raises:
        InvalidHandoff: the next agent does not exist.
        TooManySteps: it would be more than *max_steps*.
    """
    name = steps[-1].next_agent if steps else run.agent_name
    if name is None:
        return None
    path = " → ".join([*(step.agent_name for step in steps), name])
    if len(steps) >= max_steps:
        raise TooManySteps(
            f"Stopped after {max_steps} steps, the limit (max_steps): {path}. Do they hand on in a loop?"
        )
    agent = agents.get(name)
    if agent is None:
        raise InvalidHandoff(f"There is no agent {name!r} to hand on to ({path}). Known agents: {', '.join(agents)}.")
    if not steps:
        return NextStep(agent, run.inputs)
    known: dict[str, msgspec.Raw] = {}
    for source in (run.inputs, *(step.result for step in steps)):
        known |= msgspec.json.decode(source, type=dict[str, msgspec.Raw])
    drawn = {field.name: known[field.name] for field in agent.input.fields if field.name in known}
    return NextStep(agent, msgspec.Raw(msgspec.json.encode(drawn)))


async def run_step(step: NextStep, resources: Resources) -> Step:
    """Let one agent have its turn. Raises what the agent raises, and InvalidHandoff where its inputs do not fit."""
    started_at = now()
    try:
        inputs = step.agent.input.decode(step.inputs)
    except InvalidData as exc:
        raise InvalidHandoff(f"The agent {step.agent.name!r} cannot go on with what is known. {exc}") from exc
    turn = await step.agent.take_turn(inputs, resources)
    return Step(
        agent_name=step.agent.name,
        result=turn.result,
        next_agent=await step.agent.choose_next(turn.result),
        usage=turn.usage,
        started_at=started_at,
        completed_at=now(),
    )


async def run_workflow(
    run: Run, agents: Mapping[str, Agent], journal: Journal, resources: Resources, *, max_steps: int
) -> msgspec.Raw:
    """Carry *run* on after the last step in *journal*, to its end.

    Returns: the last agent's result.

    Cancellation: a step in flight is lost; those that were saved are not executed again.
    """
    steps = list(await journal.load())
    while (step := next_step(run, steps, agents, max_steps)) is not None:
        steps.append(await run_step(step, resources))
        await journal.save(steps[-1])
    return steps[-1].result

"""Agents that a step calls; see ``RunContext.run_agent``."""

import functools
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent, ModelAgent
from flock.agents.handoff import inputs_for, next_agent
from flock.agents.options import checked_options
from flock.errors import CallError, DefinitionError, InvalidData, TooManySteps
from flock.nearest import did_you_mean
from flock.runs import JSON_NULL, Run, RunContext, Step, now
from flock.runs.context import CallKeep
from flock.steps.identity import digest
from flock.steps.journal import Journal, depth_of_current_call

#: Executes an agent, with its inputs and the context of its caller, and returns its result.
Execute = Callable[[Agent, msgspec.Raw, RunContext], Awaitable[msgspec.Raw]]


class Callees(msgspec.Struct, frozen=True, kw_only=True):
    """The agents that one step of the run *caller* may call. ``elsewhere``: see ``ActiveRun``."""

    caller: Run
    agents: Mapping[str, Agent]
    max_steps: int
    execute: Execute
    elsewhere: Collection[str]

    async def run(
        self,
        journal: Journal,
        context: RunContext,
        name: str,
        inputs: Mapping[str, Any],
        keep: CallKeep,
        options: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Call an agent, and the agents that it hands off to. Each is one call of *journal*."""
        agent = self.agents.get(name)
        if agent is None and name in self.elsewhere:
            return await journal.wait_elsewhere(name)
        if agent is None:
            known = ", ".join(self.agents)
            raise CallError(
                f"There is no agent {name!r} to call.{did_you_mean(name, self.agents)} Known agents: {known}."
            )
        if depth_of_current_call() >= self.max_steps:
            raise TooManySteps(
                f"{name!r} was not called, because {self.max_steps} calls are already nested, the limit (max_steps). "
                "Check for agents that call each other in a loop."
            )
        try:
            run = replace(self.caller, agent_name=name, inputs=agent.input.encode(inputs), steps=())
        except InvalidData as exc:
            raise CallError(f"The inputs for the agent {name!r} are invalid. {exc}") from exc
        if options:
            if not isinstance(agent, ModelAgent):
                raise CallError(f"{name!r} is a function, so it has no model for options=. Omit them.")
            try:
                options = checked_options(options, f"options= for {name!r}")
            except DefinitionError as exc:
                raise CallError(str(exc)) from exc
        then = functools.partial(self._follow, journal, context, run, keep)
        found: dict[str, Any] = await self._call(journal, context, agent, run, keep, then, options)
        return found

    async def _follow(
        self, journal: Journal, context: RunContext, run: Run, keep: CallKeep, result: msgspec.Raw
    ) -> dict[str, Any]:
        while True:
            agent = self.agents[run.next_agent_name or ""]
            at = now()
            chosen = await agent.choose_next(result)
            step = Step(agent_name=agent.name, result=result, next_agent=chosen, started_at=at, completed_at=at)
            run = replace(run, steps=(*run.steps, step))
            if chosen is not None and chosen not in self.agents and chosen in self.elsewhere:
                await journal.wait_elsewhere(chosen)
            following = next_agent(run, self.agents, self.max_steps)
            if following is None:
                found: dict[str, Any] = msgspec.json.decode(result)
                return found
            result = await self._call(journal, context, following, run, keep)

    def _call(
        self,
        journal: Journal,
        context: RunContext,
        agent: Agent,
        run: Run,
        keep: CallKeep,
        then: Callable[[msgspec.Raw], Awaitable[Any]] | None = None,
        options: Mapping[str, Any] = {},
    ) -> Coroutine[Any, Any, Any]:
        if agent.on_interrupt == "fail":
            raise CallError(
                f"{agent.name!r} may not be repeated (on_interrupt='fail'), but a step that runs again after a crash "
                "repeats the calls that were running. Hand off to it with next_agent= instead."
            )
        inputs = inputs_for(agent, run)
        is_kept = keep == "all"
        identity = msgspec.json.encode([inputs, options]) if options else bytes(inputs)
        key = digest(msgspec.Raw(identity), "" if is_kept else journal.call_key)
        shown = inputs if is_kept else JSON_NULL

        async def execute() -> msgspec.Raw:
            return await self.execute(agent, inputs, context.with_options(options))

        return journal.once(agent.name, key, execute, kind="agent", arguments=shown, decode=msgspec.Raw, then=then)

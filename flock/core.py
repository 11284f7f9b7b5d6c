"""What people import: ``Flock``, ``FlockFactory`` and ``agent``."""

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import anyio
import httpx
import msgspec

from flock.agents import Agent, FunctionAgent, ModelAgent, NextAgent, OnInterrupt, agent
from flock.embedded import EmbeddedEngine
from flock.errors import DefinitionError, RunFailed
from flock.llm import ModelClient
from flock.runs import RunStatus
from flock.signature import Signature
from flock.store import Durability, Store

__all__ = ["Flock", "FlockFactory", "agent"]


class Flock:
    """A set of agents that are served together.

    Args:
        name: for people and logs.
        model: ``provider/model`` for the agents that name none; see ``flock.llm.PROVIDERS``.
        max_steps: how often one run may be handed from agent to agent.

    Attributes:
        agents: by name. Add to it with ``add_agent``.
    """

    def __init__(self, name: str = "flock", *, model: str | None = None, max_steps: int = 32) -> None:
        self.name = name
        self.model = model
        self.max_steps = max_steps
        self.agents: dict[str, Agent] = {}
        self._shared_engines: weakref.WeakValueDictionary[tuple[str, bool], EmbeddedEngine] = (
            weakref.WeakValueDictionary()
        )

    def __repr__(self) -> str:
        return f"<Flock {self.name!r}: {', '.join(self.agents) or 'no agents'}>"

    def add_agent(self, agent: Agent | Callable[..., Any]) -> Agent:
        """Add an agent, or a callable with typed parameters as one, and return it.

        Raises: DefinitionError if its name is taken; SignatureError where a parameter has no type.
        """
        if not isinstance(agent, Agent):
            if not callable(agent):
                raise DefinitionError(f"{agent!r} is no agent: make one with FlockFactory, or pass a typed function.")
            agent = FunctionAgent(agent)
        if agent.name in self.agents:
            raise DefinitionError(f"An agent called {agent.name!r} is in this flock already.")
        self.agents[agent.name] = agent
        return agent

    @overload
    def agent(self, function: Callable[..., Any], /) -> FunctionAgent: ...

    @overload
    def agent(
        self,
        /,
        *,
        name: str | None = None,
        description: str | None = None,
        output: Any = None,
        types: Mapping[str, Any] | None = None,
        next_agent: NextAgent = None,
        max_concurrency: int | None = None,
        on_interrupt: OnInterrupt = "retry",
    ) -> Callable[[Callable[..., Any]], FunctionAgent]: ...

    def agent(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """Make an agent of a typed function, as ``flock.core.agent`` does, and add it."""

        def add(function: Callable[..., Any]) -> FunctionAgent:
            self.add_agent(made := FunctionAgent(function, **options))
            return made

        return add if function is None else add(function)

    def engine(
        self,
        *,
        store: str | Path = ":memory:",
        durability: Durability = "power",
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Any,
    ) -> EmbeddedEngine:
        """An engine for these agents; enter it with ``async with``.

        Args:
            store: the SQLite file that keeps the runs; ``":memory:"`` keeps them as long as the engine runs.
            durability: "power" survives a power cut, "process" any crash of the process; see ``Store``.
            transport: what model calls go through in place of the network.
            options: see ``EmbeddedEngine``.
        """
        models = ModelClient(self.model, transport=transport)
        options = {"flock": self.name, "max_steps": self.max_steps, **options}
        return EmbeddedEngine(self.agents, models, Store(store, durability=durability), **options)

    def shared_engine(self, *, store: str | Path, expose_errors: bool = False) -> EmbeddedEngine:
        """As ``engine``, but one and the same for all who ask for it, as long as somebody has it."""
        engine = self.engine(store=store, expose_errors=expose_errors)
        return self._shared_engines.setdefault((engine.store.path, expose_errors), engine)

    async def run_async(self, agent_name: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Run one agent and what it hands on to, without a server.

        Returns:
            dict: the last agent's result.

        Raises:
            AgentNotFound: no agent has that name.
            InvalidData: the inputs do not fit its signature.
            RunFailed: the run ended as failed; ``error_type`` says how.

        Cancellation: the run is cancelled.
        """
        async with self.engine(expose_errors=True) as engine:
            run = await engine.submit(agent_name, inputs or {}, is_async=False)
            run = await engine.wait(run.run_id)
        if run.status is not RunStatus.COMPLETED or run.result is None:
            raise RunFailed(run.error or "The run has no result.", run.error_type or "unknown")
        result: dict[str, Any] = msgspec.json.decode(run.result)
        return result

    def run(self, agent_name: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ``run_async``, for scripts: it blocks until the result is there."""
        if _is_loop_running():
            raise RuntimeError("An event loop is running here already: write 'await flock.run_async(...)' instead.")
        return anyio.run(self.run_async, agent_name, inputs)

    def start_api(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8344,
        server_name: str = "Flock Server",
        create_ui: bool = False,
        custom_endpoints: Sequence[Any] = (),
        api_keys: Mapping[str, str] | None = None,
        allow_anonymous: bool = False,
    ) -> None:
        """Serve the agents over HTTP until the process is told to stop. It blocks.

        On an address that others can reach every request needs a key. Where none is named one is made, and printed.

        Args:
            port: 0 takes a free one.
            server_name: the title of the docs pages and of the served specification.
            create_ui: kept for scripts that pass it; there is no web page yet.
            custom_endpoints: Starlette routes of your own; see ``routes`` of ``flockapi.create_app``.
            api_keys: by name; see ``flockapi.create_app``. If None, ``FLOCK_API_KEYS``.
            allow_anonymous: let everybody in who can connect.
        """
        # The one import that points up: the user's script asks for the server here.
        from flock.server import ServerSettings, serve_flock

        settings = ServerSettings(
            host=host, port=port, server_name=server_name, api_keys=api_keys, allow_anonymous=allow_anonymous
        )
        serve_flock(self, settings, create_ui=create_ui, routes=custom_endpoints)


class FlockFactory:
    """Makes agents from what a script declares."""

    @staticmethod
    def create_default_agent(
        name: str,
        description: str = "",
        model: str | None = None,
        input: Any = "",
        output: Any = "",
        *,
        types: Mapping[str, Any] | None = None,
        instructions: str = "",
        temperature: float | None = None,
        max_tokens: int | None = None,
        max_retries: int = 2,
        timeout_s: float = 300,
        next_agent: NextAgent = None,
        max_concurrency: int | None = None,
        on_interrupt: OnInterrupt = "retry",
    ) -> ModelAgent:
        """An agent that asks a language model.

        Args:
            input, output: a signature such as ``"text: str | what to analyse, limit: int"``, or a struct, dataclass or
                TypedDict.
            types: what the strings may name beyond the built-in types, by name.
            model, instructions, temperature, max_tokens, max_retries, timeout_s: see ``ModelAgent``.
            next_agent, max_concurrency, on_interrupt: see ``Agent``.

        Raises:
            SignatureError: a signature cannot be understood; with the column.
            DefinitionError: the name is not one, or there is no output field.
        """
        return ModelAgent(
            name,
            Signature.of(input, types, name=f"{name}_input"),
            Signature.of(output, types, name=f"{name}_output"),
            description=description,
            model=model,
            instructions=instructions,
            temperature=temperature,
            max_tokens=max_tokens,
            max_retries=max_retries,
            timeout_s=timeout_s,
            next_agent=next_agent,
            max_concurrency=max_concurrency,
            on_interrupt=on_interrupt,
        )


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

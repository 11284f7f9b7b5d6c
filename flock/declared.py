"""What a program declares: agents, and a flock of them that carries out runs and batches in this process."""

import asyncio
import contextlib
import functools
import sys
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, overload

import anyio
import httpx
import msgspec

from flock.agents.agent import Agent, FunctionAgent, ModelAgent, NextAgent, OnInterrupt, agent
from flock.agents.llm import ModelClient
from flock.agents.signature import Signature
from flock.agents.workflow import result_names
from flock.engine.embedded import EmbeddedEngine, limits_for_one_batch
from flock.engine.intake import mapping_rows
from flock.engine.progress import follow_batch
from flock.engine.rowchecks import as_json
from flock.engine.store import Durability, Store
from flock.errors import AgentNotFound, DefinitionError, RunFailed
from flock.limits import Limits
from flock.rows.dialect import CSVDialect
from flock.rows.results import item_pages
from flock.rows.tables import MAX_ROW_BYTES, RowMapping, file_rows
from flock.runs import BatchOptions, OnExtra, OnInvalid, Row, RunStatus

__all__ = ["BatchInputs", "DeclaredFlock", "FlockFactory", "agent"]

#: What a program makes a batch of: mappings, which are read one by one, or the path of a file of CSV or NDJSON.
BatchInputs = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]] | str | Path

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """*function* with the same parameters, for who has no event loop."""

    @functools.wraps(function, assigned=("__doc__",))
    def call(*args: P.args, **options: P.kwargs) -> T:
        _check_no_loop(function.__name__)
        return anyio.run(functools.partial(function, *args, **options))

    return call


class DeclaredFlock:
    """A set of agents that are served together. Programs make a ``flock.core.Flock``, which adds ``start_api``.

    Args:
        name: under which its runs are kept in a store. Every flock of this name on the same store lists them, and
            carries them out after a crash if it has their agents; a flock of another name does not see them. Give each
            program that shares a store a name of its own, unless they are copies of one program.
        model: ``provider/model`` for the agents that name none; see ``flock.agents.llm.PROVIDERS``.
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
        limits: Limits | None = None,
        **options: Any,
    ) -> EmbeddedEngine:
        """An engine for these agents; enter it with ``async with``.

        Args:
            store: the SQLite file that keeps the runs; ``":memory:"`` keeps them as long as the engine runs.
            durability: "power" survives a power cut, "process" any crash of the process; see ``Store``.
            transport: what model calls go through in place of the network.
            limits: its bounds; each field of ``Limits`` is also an option by its own name.
            options: see ``EmbeddedEngine``.

        Raises: DefinitionError if an option is not valid.
        """
        models = ModelClient(self.model, transport=transport)
        options = {"flock": self.name, "max_steps": self.max_steps, **options}
        return EmbeddedEngine(self.agents, models, Store(store, durability=durability), limits=limits, **options)

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
        _check_no_loop("run_async")
        return anyio.run(self.run_async, agent_name, inputs)

    async def run_batch_async(
        self,
        agent_name: str,
        batch_inputs: BatchInputs,
        *,
        input_mapping: Mapping[str, str | None] | None = None,
        static_inputs: Mapping[str, Any] | None = None,
        parallel: bool = True,
        max_workers: int = 5,
        on_invalid: OnInvalid = "reject",
        on_extra: OnExtra = "reject",
        timeout_s: float | None = None,
        return_errors: bool = True,
        box_results: bool = True,
        delimiter: str = ",",
        decimal: str = ".",
        encoding: str = "utf-8",
        progress: bool | None = None,
    ) -> list[Any]:
        """Run one agent over many inputs, without a server. All of it is kept in memory, and nothing after it.

        Args:
            batch_inputs: mappings, read once and one by one, or the path of a file whose name ends in ``.csv``,
                ``.ndjson`` or ``.jsonl``, also with ``.gz`` behind it. Cells of CSV are typed by the agent's signature.
            input_mapping: what a member of a mapping, or a column, is called as an input; None drops it.
            static_inputs: for all items that do not bring their own.
            parallel, max_workers, return_errors, box_results: see ``BatchOptions``.
            on_invalid: "reject" begins nothing where an item does not fit; "skip" lets that one fail.
            on_extra: "reject" begins nothing if a column, or a member of a mapping, is no input; "ignore" drops it;
                "keep" puts it, unchanged, before the outputs in the results. One with the name of an output is refused.
            timeout_s: wall-clock seconds for each item.
            delimiter, decimal, encoding: how a CSV file is written; see ``CSVDialect``.
            progress: show a line on stderr that says how far it is. If None, where that is a terminal.

        Returns:
            list: in the order of the inputs, a result for each. For an item that failed ``{"error", "error_type"}``, or
            None; that is so for all of them where all failed. Of no inputs, it is empty.

        Raises:
            AgentNotFound: no agent has that name.
            InvalidData: items do not fit, at most 100 errors of them, with the line where there are lines; or the file
                cannot be understood.
            DefinitionError: an option is none, or the file's name does not tell what is in it.
            OSError: the file cannot be read.
            And whatever *batch_inputs* raises.

        Cancellation: the batch is cancelled.
        """
        options = BatchOptions(
            max_workers=max_workers,
            parallel=parallel,
            return_errors=return_errors,
            box_results=box_results,
            timeout_s=timeout_s,
        )
        _check_choices(on_invalid, on_extra, timeout_s)
        if agent_name not in self.agents:
            raise AgentNotFound(agent_name, list(self.agents))
        row_mapping = RowMapping(
            self.agents[agent_name].input,
            _static(static_inputs),
            input_mapping,
            lambda: sys.maxsize,
            on_extra=on_extra,
            result_names=result_names(agent_name, self.agents),
        )
        dialect = CSVDialect(delimiter=delimiter, decimal=decimal, encoding=encoding)
        results: list[Any] = []
        async with contextlib.aclosing(_rows(batch_inputs, row_mapping, dialect)) as rows:
            first = await anext(rows, None)
            if first is None:
                return results
            async with self.engine(limits=limits_for_one_batch(max_workers), expose_errors=True) as engine:
                batch = await engine.submit_batch(agent_name, _chain(first, rows), options, on_invalid=on_invalid)
                try:
                    await follow_batch(engine, batch.batch_id, is_shown=progress)
                except BaseException:
                    with anyio.CancelScope(shield=True):
                        await engine.cancel_batch(batch.batch_id)
                    raise
                async for page in item_pages(engine, batch.batch_id):
                    results += msgspec.json.decode(msgspec.json.encode([batch.result_of(item) for item in page]))
        return results

    #: As ``run_batch_async``, for scripts: it blocks until all results are there.
    run_batch = _blocking(run_batch_async)


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


def _check_no_loop(async_name: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"An event loop is running here already: write 'await flock.{async_name}(...)' instead.")


def _check_choices(on_invalid: str, on_extra: str, timeout_s: float | None) -> None:
    for name, given, choices in (("on_invalid", on_invalid, OnInvalid), ("on_extra", on_extra, OnExtra)):
        if given not in get_args(choices):
            raise DefinitionError(f"{name} is one of {', '.join(get_args(choices))}, and not {given!r}.")
    if timeout_s is not None and not timeout_s > 0:
        raise DefinitionError(f"timeout_s is a number of seconds above 0, and not {timeout_s}.")


def _static(static_inputs: Mapping[str, Any] | None) -> dict[str, msgspec.Raw]:
    """Raises InvalidData where a static input cannot be JSON."""
    raw = as_json(static_inputs or {}, "/static_inputs", MAX_ROW_BYTES)
    return msgspec.json.decode(raw, type=dict[str, msgspec.Raw])


def _rows(batch_inputs: BatchInputs, row_mapping: RowMapping, dialect: CSVDialect) -> AsyncGenerator[Row, None]:
    if isinstance(batch_inputs, str | Path):
        return file_rows(Path(batch_inputs), row_mapping, dialect)
    return mapping_rows(batch_inputs, row_mapping, MAX_ROW_BYTES)


async def _chain(first: Row, rows: AsyncIterator[Row]) -> AsyncIterator[Row]:
    yield first
    async for row in rows:
        yield row

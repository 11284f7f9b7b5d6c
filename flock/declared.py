"""The declarations of a program: agents, and a flock that runs them in this process."""

import contextlib
import functools
import math
import os
import sys
import weakref
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, Unpack, get_args, overload

import anyio
import msgspec

from flock.agents.agent import (
    Agent,
    AgentOptions,
    FunctionAgent,
    ModelAgent,
    NextAgent,
    OnChange,
    OnInterrupt,
    ToolLike,
)
from flock.agents.handoff import agent_of, result_names
from flock.agents.history import History
from flock.agents.hooks import Hook
from flock.agents.questions import nobody
from flock.agents.shared import Shared
from flock.agents.signature import Signature
from flock.agents.union import output_of
from flock.agents.versions import version_of
from flock.errors import DefinitionError, RunFailed
from flock.formats import each_row
from flock.limits import Limits, limits_for_one_batch
from flock.models.llm import ModelClient
from flock.models.models import ModelChoice, models_of
from flock.models.prices import Price, merged
from flock.options import WEBHOOK_URL, check
from flock.renamed import renamed, with_new_names
from flock.runs import Answer, BatchOptions, Event, Frame, ModelOptions, OnExtra, OnInvalid, RetriedCalls, Row
from flock.scopes import current_task

if TYPE_CHECKING:
    import httpx

    from flock.engine.embedded import EmbeddedEngine
    from flock.rows.tables import RowMapping
    from flock.store.database import Durability

#: Inputs of a batch: mappings, which are read one at a time, or the path of a file with rows.
BatchInputs = Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]] | Frame | str | Path

H = TypeVar("H", bound=Callable[..., Coroutine[Any, Any, Any]])
P = ParamSpec("P")
T = TypeVar("T")


def blocking(function: Callable[P, Coroutine[Any, Any, T]], **names: str) -> Callable[P, T]:
    """Return a blocking version of *function*, for callers without an event loop. *names* are as in ``renamed``."""

    @functools.wraps(function, assigned=("__doc__",))
    def call(*args: P.args, **options: P.kwargs) -> T:
        if current_task() is not None:
            name = function.__name__
            raise RuntimeError(f"An event loop is already running. Use 'await flock.{name}(...)' instead.")
        try:
            return anyio.run(functools.partial(function, *args, **with_new_names(names, options)))
        except RunFailed as exc:
            raise exc.with_traceback(None) from None  # the lines of the event loop would hide its message

    return call


class DeclaredFlock:
    """A set of agents that are served together. Programs use ``flock.core.Flock``, which adds ``start_api``.

    Args:
        name: identifies its runs in a store. All flocks with this name on the same store list these runs, and resume
            them after a crash if they have the agents. Flocks with another name do not see them. If several programs
            share a store, give each its own name, unless they are copies of the same program.
        model: default model for agents without one: ``provider/model``, a ``Model``, or a list of these; see
            ``ModelAgent`` and ``flock.models.providers.PROVIDERS``.
        max_steps: max steps in one run.
        state: what agents share in a process, such as a database pool: ``context.state``. It is a value, or a function
            that returns an async context manager: each engine or worker enters it at its start, and leaves it when its
            steps have ended. It is never stored.
        prices: what models cost, ``{"openai/gpt-4o": Price(input=2.5, output=10, cached_input=1.25)}``. They are added
            to those that come with the package, ``flock.models.prices.PRICES``, or replace them.
        webhook_url: where the events of runs and batches are sent, unless their agent has an address of its own; see
            ``docs/webhooks.md``.

    Raises: DefinitionError if a price, the state or the address is invalid.

    Attributes:
        agents: the agents by name. Use ``add_agent`` to add one.
        program_path: the file that has created the flock. Engines warn if a store was used by another program.
    """

    def __init__(
        self,
        name: str = "flock",
        *,
        model: ModelChoice = None,
        max_steps: int = 32,
        prices: Mapping[str, Price] | None = None,
        state: Any = None,
        webhook_url: str | None = None,
    ) -> None:
        models_of(model, "the flock")
        check("Flock", "webhook_url", webhook_url, WEBHOOK_URL)
        self.webhook_url = webhook_url
        self.shared = Shared(state)
        self.name = name
        self.model = model
        self.max_steps = max_steps
        self.prices = merged(prices)
        self.agents: dict[str, Agent] = {}
        self.program_path = os.path.abspath(sys._getframe(1).f_code.co_filename)
        self._shared_engines = weakref.WeakValueDictionary[tuple[str, bool], "EmbeddedEngine"]()

    def __repr__(self) -> str:
        return f"<Flock {self.name!r}: {', '.join(self.agents) or 'no agents'}>"

    def add_agent(self, agent: Agent | Callable[..., Any]) -> Agent:
        """Add an agent and return it. A callable with typed parameters is converted to an agent.

        Raises: DefinitionError if its name is taken, or the model of the flock cannot enforce its output;
            SignatureError if a parameter has no type.
        """
        if not isinstance(agent, Agent):
            if not callable(agent):
                raise DefinitionError(
                    f"{agent!r} is not an agent. Create one with FlockFactory, or pass a typed function."
                )
            agent = FunctionAgent(agent)
        if agent.name in self.agents:
            raise DefinitionError(f"This flock already has an agent {agent.name!r}. Choose another name.")
        if isinstance(agent, ModelAgent) and not agent.model:
            agent.check_models(self.model)
        version_of(agent)  # reads its source, which may be edited before the first batch
        self.agents[agent.name] = agent
        return agent

    @overload
    def agent(self, function: Callable[..., Any], /) -> FunctionAgent: ...

    @overload
    def agent(self, /, **options: Unpack[AgentOptions]) -> Callable[[Callable[..., Any]], FunctionAgent]: ...

    @renamed(retry="on_retry")
    def agent(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """Convert a typed function to an agent, like ``flock.core.agent``, and add it."""

        def add(function: Callable[..., Any]) -> Agent:
            return self.add_agent(FunctionAgent(function, **options))

        return add if function is None else add(function)

    def on_model_call(self, hook: H) -> H:
        """Add a function around each call of a model: ``async def hook(call, ask)``. It can decorate the function.

        It gets the call, a ``ModelCall``, and a function that makes it: ``await ask()``, or ``await ask(call)`` with a
        changed one, returns the reply of the model. It returns that reply, or a text in place of an answer, which is
        checked like one of the model. It may ask several times, or not at all. A third parameter receives the context.
        If it raises, the step fails; the client reads the text of an ``AgentError``. The first hook is the outermost.
        A reply is stored as it comes from the hooks, so they do not run again for it. With a hook, the answers of
        models are not streamed.

        Raises: DefinitionError if it is not such a function.
        """
        self.shared.model_hooks.append(Hook("on_model_call", hook))
        return hook

    def on_tool_call(self, hook: H) -> H:
        """Add a function around each call of a tool: ``async def hook(use, call)``, like ``on_model_call``.

        It gets a ``ToolUse``, after a person has allowed the call, and returns what ``await call()`` returns, or
        another result. What it raises is an error that the model reads. It is not called for tools of the client.
        """
        self.shared.tool_hooks.append(Hook("on_tool_call", hook))
        return hook

    @renamed(answer="on_question")
    def engine(
        self,
        *,
        store: str | Path = ":memory:",
        durability: "Durability" = "power",
        transport: "httpx.AsyncBaseTransport | None" = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> "EmbeddedEngine":
        """Create an engine for these agents. Enter it with ``async with``.

        Args:
            store: path of the SQLite file for the runs. ``":memory:"`` keeps them only while the engine is open.
            durability: "power" survives a power cut, "process" survives a crash of the process; see ``Store``.
            transport: replaces the network for model calls.
            limits: the limits of the engine. Each field of ``Limits`` is also a keyword argument.
            options: see ``EmbeddedEngine``.

        Raises: DefinitionError if an option is invalid.
        """
        # Imported here, because a program that declares agents may be served by a cluster, or not at all.
        from flock.engine.embedded import EmbeddedEngine
        from flock.store.store import SQLiteStore

        models = ModelClient(self.model, transport=transport)
        own = {"flock": self.name, "program_path": self.program_path}
        options = {**own, "max_steps": self.max_steps, "prices": self.prices, "shared": self.shared, **options}
        return EmbeddedEngine(self.agents, models, SQLiteStore(store, durability=durability), limits=limits, **options)

    def shared_engine(self, *, store: str | Path, expose_errors: bool = False) -> "EmbeddedEngine":
        """Like ``engine``, but return the same engine for equal arguments while it is in use."""
        engine = self.engine(store=store, expose_errors=expose_errors)
        return self._shared_engines.setdefault((engine.store.path, expose_errors), engine)

    def row_mapping(
        self,
        agent_name: str,
        static: Mapping[str, msgspec.Raw] | None,
        names: Mapping[str, str | None] | None,
        on_extra: OnExtra,
        max_static_bytes: Callable[[], int] = lambda: sys.maxsize,
    ) -> "RowMapping":
        """Return the mapping of the rows of a batch to the inputs of an agent. Raises AgentNotFound, InvalidData."""
        from flock.rows.tables import RowMapping

        inputs, results = agent_of(self.agents, agent_name).input, result_names(agent_name, self.agents)
        return RowMapping(inputs, static, names, max_static_bytes, on_extra=on_extra, result_names=results)

    @renamed(answer="on_question")
    async def run_async(
        self,
        agent_name: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        on_question: Answer = nobody,
        on_event: Callable[[Event], object] | None = None,
    ) -> dict[str, Any]:
        """Run an agent, and the agents that it hands off to, without a server.

        Args:
            on_question: a function that answers the questions of the agents; see ``RunContext.ask``. It may be async.
                By default a question fails the run.
            on_event: called with each event of the run, such as ``output.delta`` with a piece of text as it is written.

        Returns:
            dict: the last agent's result.

        Raises:
            AgentNotFound: there is no agent with that name.
            InvalidData: the inputs do not match its signature.
            RunFailed: the run failed; ``error_type`` has the kind of failure.

        Cancellation: the run is cancelled.
        """
        async with self.engine(expose_errors=True, on_question=on_question) as engine:
            run = await engine.submit(agent_name, inputs or {}, is_async=False, watch=on_event is not None)
            if on_event is not None:
                async with contextlib.aclosing(engine.events(run.run_id)) as events:
                    async for event in events:
                        if event is not None:
                            on_event(event)
            run = await engine.wait(run.run_id)
        return run.value_as(dict[str, Any])

    #: ``run_async`` for scripts: blocks until the result is available.
    run = blocking(run_async, answer="on_question")

    @renamed(answer="on_question")
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
        max_cost: float | None = None,
        max_failures: float | None = None,
        dedupe: bool = False,
        return_errors: bool = True,
        box_results: bool = True,
        delimiter: str = ",",
        decimal: str = ".",
        encoding: str = "utf-8",
        progress: bool | None = None,
        on_question: Answer = nobody,
    ) -> list[Any]:
        """Run an agent for many inputs, without a server. Everything is held in memory, and nothing is stored.

        Args:
            batch_inputs: mappings, which are read once and one at a time; a frame of pandas or polars; or the path of a
                file whose name ends in that of a format, such as ``.csv``, optionally followed by ``.gz``. Cells are
                converted to the types of the agent's signature. NaN is a missing value.
            input_mapping: maps columns, or members of a mapping, to input names; None drops the column.
            static_inputs: default inputs for all items.
            parallel, max_workers, return_errors, box_results: see ``BatchOptions``.
            on_invalid: "reject" runs nothing if an item is invalid; "skip" fails only that item.
            on_extra: how to handle a column, or a member of a mapping, that is not an input. "reject" runs nothing,
                "ignore" drops it, "keep" copies it unchanged to the results, before the outputs. A column with the name
                of an output cannot be kept.
            timeout_s: wall-clock seconds for each item.
            max_cost: US dollars that all items together may cost. Those that are left then fail with ``cost_limit``.
            max_failures, dedupe: see ``BatchOptions``.
            delimiter, decimal, encoding: the format of a CSV file; see ``CSVDialect``.
            progress: show a progress line on stderr. If None, only if stderr is a terminal.
            on_question: see ``run_async``. By default a question fails its item.

        Returns:
            list: one result per item, in the order of the inputs. The result of a failed item is
            ``{"error", "error_type"}``, or None without ``return_errors``, even if all items fail. Without inputs, the
            list is empty.

        Raises:
            AgentNotFound: there is no agent with that name.
            InvalidData: items are invalid (up to 100 errors, with line numbers for files), or the file cannot be
                parsed.
            DefinitionError: an option is invalid, or the format cannot be determined from the file's name.
            OSError: the file cannot be read.
            Any exception that *batch_inputs* raises.

        Cancellation: the batch is cancelled.
        """
        from flock.engine.intake import mapping_rows
        from flock.engine.jobs import CANCEL_TIMEOUT_S
        from flock.engine.rowchecks import as_json
        from flock.rows.dialect import CSVDialect
        from flock.rows.files import MAX_ROW_BYTES, file_rows
        from flock.rows.items import item_pages
        from flock.steps.progress import follow_batch

        options = BatchOptions(
            max_workers=max_workers,
            parallel=parallel,
            return_errors=return_errors,
            box_results=box_results,
            timeout_s=timeout_s,
            max_cost=max_cost,
            max_failures=max_failures,
            dedupe=dedupe,
        )
        _check_choices(on_invalid, on_extra, timeout_s)
        raw = as_json(static_inputs or {}, "/static_inputs", MAX_ROW_BYTES)
        static = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        row_mapping = self.row_mapping(agent_name, static, input_mapping or {}, on_extra)
        dialect = CSVDialect(delimiter=delimiter, decimal=decimal, encoding=encoding)
        results: list[Any] = []
        if isinstance(batch_inputs, str | Path):
            source = file_rows(Path(batch_inputs), row_mapping, dialect)
        else:
            source = mapping_rows(each_row(batch_inputs), row_mapping, MAX_ROW_BYTES)
        async with contextlib.aclosing(source) as rows:
            first = await anext(rows, None)
            if first is None:
                return results
            limits = limits_for_one_batch(max_workers)
            async with self.engine(limits=limits, expose_errors=True, on_question=on_question) as engine:
                batch = await engine.submit_batch(agent_name, _chain(first, rows), options, on_invalid=on_invalid)
                try:
                    await follow_batch(engine, batch.batch_id, engine.count_submitted, is_shown=progress)
                except BaseException:
                    is_working = anyio.current_effective_deadline() > -math.inf  # a scope around it ends its tasks too
                    with anyio.CancelScope(shield=True):
                        await engine.cancel_batch(batch.batch_id)
                        with anyio.move_on_after(CANCEL_TIMEOUT_S if is_working else 0):  # jobs of providers
                            await engine.wait_batch(batch.batch_id)
                    raise
                async for page in item_pages(engine, batch.batch_id):
                    results += msgspec.json.decode(msgspec.json.encode([batch.result_of(item) for item in page]))
        return results

    #: ``run_batch_async`` for scripts: blocks until all results are available.
    run_batch = blocking(run_batch_async, answer="on_question")


class FlockFactory:
    """Creates agents from signatures."""

    @staticmethod
    @renamed(max_retries="answer_retries", retry="on_retry")
    def create_default_agent(
        name: str,
        description: str = "",
        model: ModelChoice = None,
        input: Any = "",
        output: Any = "",
        *,
        types: Mapping[str, Any] | None = None,
        instructions: str | Callable[..., Any] = "",
        examples: Sequence[tuple[Any, Any]] = (),
        reasoning: bool = False,
        history: int | History | None = None,
        tools: Sequence[ToolLike] = (),
        max_tool_calls: int = 10,
        tool_timeout_s: float = 60,
        temperature: float | None = None,
        max_tokens: int | None = None,
        options: ModelOptions | None = None,
        answer_retries: int = 2,
        validate: Callable[..., Any] | None = None,
        timeout_s: float = 300,
        client_instructions: bool = False,
        client_tools: bool = False,
        client_options: bool = False,
        next_agent: NextAgent = None,
        max_concurrency: int | None = None,
        on_interrupt: OnInterrupt = "retry",
        on_change: OnChange = "stop",
        on_retry: RetriedCalls = "keep",
        version: str | None = None,
        webhook_url: str | None = None,
    ) -> ModelAgent:
        """Create an agent that calls a language model.

        Args:
            input, output: a signature such as ``"text: str | what to analyse, limit: int"``, or a struct, dataclass,
                TypedDict or pydantic model. The output may also be a union of structs or of pydantic models, such as
                ``Refund | Question``, which is then a field ``result`` with the name of its type in ``type``.
            types: additional types, by name, that the strings may use.
            model, instructions, examples, reasoning, history, tools, max_tool_calls, tool_timeout_s, temperature,
                max_tokens, options, answer_retries, validate, timeout_s, client_instructions, client_tools,
                client_options: see ``ModelAgent``.
            next_agent, max_concurrency, on_interrupt, on_change, on_retry, version, webhook_url: see ``Agent``.

        Raises:
            SignatureError: a signature is invalid.
            DefinitionError: the name is invalid, see ``ModelAgent``, or ``next_agent`` is a mapping that does not
                match the output.
        """
        return ModelAgent(
            name,
            Signature.of(input, types, name=f"{name}_input"),
            output_of(output, types, name=f"{name}_output"),
            description=description,
            model=model,
            instructions=instructions,
            examples=examples,
            reasoning=reasoning,
            history=history,
            tools=tools,
            max_tool_calls=max_tool_calls,
            tool_timeout_s=tool_timeout_s,
            temperature=temperature,
            max_tokens=max_tokens,
            options=options,
            answer_retries=answer_retries,
            validate=validate,
            timeout_s=timeout_s,
            client_instructions=client_instructions,
            client_tools=client_tools,
            client_options=client_options,
            next_agent=next_agent,
            max_concurrency=max_concurrency,
            on_interrupt=on_interrupt,
            on_change=on_change,
            on_retry=on_retry,
            version=version,
            webhook_url=webhook_url,
        )


def _check_choices(on_invalid: str, on_extra: str, timeout_s: float | None) -> None:
    for name, given, choices in (("on_invalid", on_invalid, OnInvalid), ("on_extra", on_extra, OnExtra)):
        if given not in get_args(choices):
            raise DefinitionError(f"{name}= must be one of {', '.join(get_args(choices))}, not {given!r}.")
    if timeout_s is not None and not timeout_s > 0:
        raise DefinitionError(f"timeout_s= must be a number of seconds above 0, not {timeout_s}.")


async def _chain(first: Row, rows: AsyncIterator[Row]) -> AsyncIterator[Row]:
    yield first
    async for row in rows:
        yield row

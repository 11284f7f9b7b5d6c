"""The base class of both engines: checks of new work, event streams, and health."""

import contextlib
import itertools
import math
import sys
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Context, copy_context
from datetime import timedelta
from typing import Any, Literal

import anyio
import anyio.lowlevel
import msgspec
from msgspec.structs import replace

from flock.agents.agent import Agent, ModelAgent
from flock.agents.clients import settings_for
from flock.agents.graph import graph_of
from flock.agents.hooks import Hook
from flock.agents.versions import label_of, recipe_of
from flock.engine.intake import Intake
from flock.engine.rowchecks import as_json
from flock.errors import (
    AgentNotFound,
    Conflict,
    DefinitionError,
    EngineFull,
    EngineStopped,
    FieldError,
    InvalidData,
    NotFound,
    RunNotFound,
    SessionNotFound,
    StoreError,
    TooManyRequests,
)
from flock.fair import FairShare
from flock.limits import Limits
from flock.logs import audit
from flock.models.models import ModelChoice, models_of, names_of
from flock.models.prices import Price, day_is_spent, merged, no_price, price_of
from flock.runs import (
    MAX_COST,
    AskedQuestion,
    Batch,
    BatchOptions,
    Call,
    ClientSettings,
    Engine,
    EngineHealth,
    Event,
    FileBox,
    IdempotencyKey,
    Inputs,
    ItemLimits,
    Items,
    LongJSON,
    OnInvalid,
    Principal,
    QuestionFilter,
    QuestionPage,
    Run,
    RunFilter,
    RunStatus,
    Session,
    Statuses,
    Usage,
    UsageFilter,
    UsagePage,
    UsageRow,
    added,
    cost_in_words,
    event_of_batch,
    event_of_call,
    new_id,
    now,
    statuses_of,
    traces,
    valid_traceparent,
)
from flock.runs.events import EVENTS_PER_STEP, events_after
from flock.runs.records import CALL_IDS, name_and_caller
from flock.runs.usage import UsageSums, is_spent, next_day
from flock.steps.identity import Newest, new_call_key
from flock.steps.live import LiveReader
from flock.steps.refusals import not_accepting, not_deleted

#: How long an event stream may be silent, in seconds.
KEEP_ALIVE_S = 15.0
#: How often a reader of events that waits for a change sees whether it must send one, in seconds.
WAKE_INTERVAL_S = 5.0
#: The shortest interval between two progress events of a batch, and between two polls of a run, in seconds.
PROGRESS_INTERVAL_S = 0.25
#: How long an idempotency key is stored.
KEEP_KEYS_FOR = timedelta(hours=24)
#: How long the usage of a day is stored.
KEEP_USAGE_FOR = timedelta(days=400)
#: How many principals without a budget are remembered, and how long, in seconds.
MAX_UNLIMITED, UNLIMITED_S = 10_000, 60.0


Calls = Mapping[int, Sequence[Call]]


def ended_calls(run: Run, calls: Calls) -> Calls:
    """Return the *calls* of *run* that have ended, and if it does not run, those whose end is not recorded."""
    if not run.status.is_active:
        return calls
    return {position: [call for call in made if not call.is_start] for position, made in calls.items()}


class RunReader:
    """Reads the record of one run repeatedly. It polls unless an engine overrides ``changed``.

    Attributes:
        live: its place in the live output of the run; None if the engine has none.
    """

    live: LiveReader | None = None

    def __init__(
        self, get_run: Callable[[str], Awaitable[Run]], get_calls: Callable[[Run], Awaitable[Calls]], run_id: str
    ) -> None:
        self._get_run = get_run
        self._get_calls = get_calls
        self._run_id = run_id
        self._run: Run | None = None
        self._calls: Calls | None = None

    @property
    def has_news(self) -> bool:
        """Whether the record may have changed since ``seen``."""
        return True

    async def read(self) -> Run:
        """Return the record. Raises EngineStopped, RunNotFound, StoreError."""
        if self._run is None:
            self._run = await self._get_run(self._run_id)
        return self._run

    async def call(self, run: Run, position: int, number: int) -> Call | None:
        """Return the stored call *number*, from 0, of a step, as ``get_calls`` does. Raises StoreError."""
        if self._calls is None:
            self._calls = await self._get_calls(run)
        calls = self._calls.get(position, ())
        return calls[number] if number < len(calls) else None

    def seen(self) -> None:
        """Called when all events of the record that ``read`` has returned were sent."""

    async def changed(self) -> None:
        """Wait until the record may have changed since the last ``read``, or the live output, or WAKE_INTERVAL_S."""
        self._run = self._calls = None
        await anyio.sleep(PROGRESS_INTERVAL_S)

    async def present(self, event: Event, run: Run) -> Event:
        """Return *event* of *run* with its result."""
        return event


class EngineBase(Engine):
    """The part of an engine that does not depend on where records are stored. Methods without a docstring: see there.

    Args:
        agents: by name. The mapping is read at each submission, so agents added later are found.
        flock: the name under which runs are stored.
        prices: see ``EmbeddedEngine``.
        default_model: the model of agents without one, if it is known here.
    """

    def __init__(
        self,
        agents: Mapping[str, Agent],
        flock: str,
        limits: Limits,
        *,
        prices: Mapping[str, Price] | None = None,
        default_model: ModelChoice = None,
    ) -> None:
        self._agents = agents
        self._flock = flock
        self._limits = limits
        self._prices = merged(prices)
        self._default_models = models_of(default_model, "the flock")
        self._model_hooks: Sequence[Hook] = ()
        #: the principals without a budget, and until when that need not be read again
        self._unlimited: dict[str, float] = {}

    # To be implemented by an engine

    calls_models: bool = False
    #: Max size of the inputs of an item, if that is less than ``max_input_bytes``.
    _max_item_bytes: int = sys.maxsize
    _new_batch_id: Callable[[], str] = staticmethod(new_id)

    @property
    def _owner(self) -> str | None:
        """The id of the engine that owns new work, or None if work has no owner."""
        return None

    @property
    @abstractmethod
    def _is_entered(self) -> bool: ...

    @property
    @abstractmethod
    def _is_store_ok(self) -> bool: ...

    @abstractmethod
    async def _accept(self, run: Run, key: IdempotencyKey | None, context: Context, newest: Newest | None) -> None:
        """Store *run*, and start it in *context* if this process executes it. Raises the same as ``Engine.submit``."""

    @abstractmethod
    async def _accept_batch(self, intake: Intake, key: IdempotencyKey | None) -> Batch:
        """Store a batch with its items and start it. Raises the same as ``Engine.submit_batch``."""

    async def get_outline(self, run_id: str, principal: str | None = None) -> Run:
        return await self.get_run(run_id, principal)  # by default, the whole run is read

    async def get_state(self, run_id: str, principal: str | None = None) -> tuple[RunStatus, int]:
        run = await self.get_outline(run_id, principal)
        return run.status, run.attempt

    async def shown_result(self, run: Run, position: int | None = None) -> msgspec.Raw | LongJSON | None:
        return run.result if position is None else run.steps[position].result

    def files(self, principal: str | None = None) -> FileBox:
        self._check_entered()
        raise Conflict(
            "This server keeps its runs on a cluster, and has no folder for files. Send texts only. To enable files, "
            "its operator names a folder that all machines share (--files-dir, files_dir=)."
        )

    def watch(self, run_id: str) -> AbstractContextManager[object]:
        return contextlib.nullcontext()  # by default, there is no live output

    def _watch_until_read(self, run_id: str) -> AbstractContextManager[object]:
        """Watch a run that is accepted inside the block, until its first reader comes; see ``Engine.submit``."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _reader(self, run_id: str, after: int, *, reasoning: bool) -> Iterator[RunReader]:
        yield RunReader(self.get_run, self.get_calls, run_id)

    @abstractmethod
    def _may_end_in_drain(self, run_id: str) -> bool:
        """Whether event streams of a run continue while the engine drains, since it may end before the drain does."""

    def _next_change(self) -> Callable[[], Awaitable[object]]:
        """Return a function that waits for the next change of any record. The default does not wait: callers poll."""
        return anyio.lowlevel.checkpoint

    # State

    @property
    def item_limits(self) -> ItemLimits:
        max_bytes = min(self._limits.max_input_bytes, self._max_item_bytes)
        return ItemLimits(max_items=self._limits.max_items, max_input_bytes=max_bytes)

    def _check_entered(self) -> None:
        if not self._is_entered:
            raise EngineStopped()

    def _check_not_entered(self) -> None:
        if self._is_entered:
            raise EngineStopped("This engine is already running. Enter it only once, or create another engine.")

    def _check_running(self) -> None:
        self._check_entered()
        if self.is_draining:
            raise not_accepting()

    def health(self) -> EngineHealth:
        store: Literal["ok", "failing"] = "ok" if self._is_store_ok else "failing"
        if not self._is_entered:
            return EngineHealth("stopped", store)
        return EngineHealth("stopping" if self.is_draining else "running", store)

    # New work

    def _agent(self, name: str) -> Agent:
        try:
            return self._agents[name]
        except KeyError:
            raise AgentNotFound(name, list(self._agents)) from None

    def _check_prices(self, agent_name: str, max_cost: float | None) -> None:
        """Raise InvalidData if *max_cost* cannot hold: an agent that may run has a model without a price.

        Raises: DefinitionError if it is not a valid amount.
        """
        if max_cost is None:
            return
        if not 0 < max_cost <= MAX_COST:
            raise DefinitionError(f"max_cost must be US dollars above 0 and up to {MAX_COST:,}, not {max_cost}.")
        names = [agent_name, *(each.to for each in graph_of(agent_name, self._agents) if each.to is not None)]
        for agent in (self._agents[name] for name in names if name in self._agents):
            if isinstance(agent, ModelAgent):
                for model in names_of(models_of(agent.model, repr(agent.name)) or self._default_models):
                    if price_of(self._prices, model) is None:
                        raise InvalidData([FieldError(detail=no_price(model, agent.name), pointer="/max_cost")])

    def recipe_of(self, agent_name: str) -> str | None:
        """Return what makes the results of an agent; see ``Batch.recipe``."""
        return recipe_of(agent_name, self._agents, self._default_models, self._model_hooks)

    def recipe_and_version(self, agent_name: str) -> tuple[str | None, str]:
        """Return the recipe and the version of an agent; see ``Batch``."""
        return self.recipe_of(agent_name), label_of(agent_name, self._agents, self._default_models, self._model_hooks)

    def _check_not_spent(self, batch: Batch, max_cost: float | None) -> None:
        """Raise InvalidData if a retry of *batch*, with *max_cost* if it is not None, could call no model."""
        limit = batch.options.max_cost if max_cost is None else max_cost
        if limit is not None and is_spent(batch.usage, limit):
            cost = f"The batch has cost {cost_in_words(batch.usage)}, and may cost {limit:g} US dollars (max_cost)."
            raise InvalidData.of(f"{cost} Retry it with a higher max_cost.", "/max_cost")

    def _retried(self, only: Statuses) -> Sequence[RunStatus]:
        """Return the statuses of the items that a retry executes again. Raises DefinitionError."""
        retried = (RunStatus.FAILED, RunStatus.CANCELLED)
        statuses = statuses_of(only) or retried
        if not set(statuses) <= set(retried):
            raise DefinitionError("only= of a retry must be 'failed', 'cancelled', or both.")
        return statuses

    async def submit(
        self,
        agent_name: str,
        inputs: Inputs,
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: Principal | str | None = None,
        is_async: bool = True,
        timeout_s: float | None = None,
        session_id: str | None = None,
        continues: str | None = None,
        replaces: bool = False,
        max_cost: float | None = None,
        key: IdempotencyKey | None = None,
        run_id: str | None = None,
        watch: bool = False,
        client: ClientSettings | None = None,
    ) -> Run:
        self._check_running()
        raw = as_json(inputs, "/inputs", self._limits.max_input_bytes)
        agent, (name, caller) = self._agent(agent_name), name_and_caller(principal)
        box = self.files(name) if agent.input.has_files else None
        raw, contents = agent.input.take(raw, "/inputs", None if box is None else box.find)
        self._check_prices(agent_name, max_cost)
        if client is not None:
            client = settings_for(agent_name, self._agents, client, self._limits.max_input_bytes - len(raw))
        files = await box.keep_all(contents) if box is not None else ()
        run = Run(
            run_id=run_id or new_id(),
            flock=self._flock,
            agent_name=agent_name,
            inputs=raw,
            created_at=now(),
            request_id=request_id,
            traceparent=valid_traceparent(traceparent or traces.current()),
            principal=name,
            caller=caller,
            is_async=is_async or key is not None,
            timeout_s=timeout_s,
            owner=self._owner,
            session_id=session_id,
            max_cost=max_cost,
            call_ids=CALL_IDS,
            call_key=new_call_key(),
            client=client,
            files=files,
        )
        with self._watch_until_read(run.run_id) if watch else contextlib.nullcontext():
            newest = None if continues is None else Newest(continues, replaces and continues != "")
            await self._accept(run, key, Context() if is_async else copy_context(), newest)
        return run

    async def _drop_run(self, run_id: str) -> None:
        """Cancel a run, or delete it if it has ended. A failure is ignored: a new run was accepted in its place."""
        with contextlib.suppress(NotFound, Conflict, StoreError, EngineFull):
            try:
                await self.cancel_run(run_id)
            except Conflict:
                await self.delete_run(run_id)

    async def submit_batch(
        self,
        agent_name: str,
        items: Items,
        options: BatchOptions,
        *,
        on_invalid: OnInvalid = "reject",
        request_id: str | None = None,
        traceparent: str | None = None,
        principal: Principal | str | None = None,
        key: IdempotencyKey | None = None,
    ) -> Batch:
        self._check_running()
        self._check_prices(agent_name, options.max_cost)
        name, caller = name_and_caller(principal)
        batch = Batch(
            batch_id=self._new_batch_id(),
            flock=self._flock,
            agent_name=agent_name,
            options=options,
            total_items=0,
            created_at=now(),
            request_id=request_id,
            principal=name,
            owner=self._owner,
            recipe=self.recipe_of(agent_name),
        )
        agent = self._agent(agent_name)
        intake = Intake(
            agent,
            items,
            batch,
            on_invalid=on_invalid,
            traceparent=valid_traceparent(traceparent or traces.current()),
            caller=caller,
            limits=self.item_limits,
            files=self.files(name) if agent.input.has_files else None,
        )
        return await self._accept_batch(intake, key)

    # Usage

    @abstractmethod
    async def made_by(self, key: IdempotencyKey) -> str | None: ...

    @abstractmethod
    async def _set_budget(self, principal: str, max_cost: float | None) -> None:
        """Set what the runs of a principal may cost in a day. Raises StoreError."""

    @abstractmethod
    def _usage_pages(self, wanted: UsageFilter) -> AsyncIterator[Sequence[UsageRow]]:
        """Yield the usage of the days and the principal of *wanted*, at least by its fields. Raises StoreError."""

    async def check_budget(
        self,
        principal: str,
        max_cost: float | msgspec.UnsetType | None = msgspec.UNSET,
        key: IdempotencyKey | None = None,
    ) -> None:
        self._check_running()
        if max_cost is None and self._unlimited.get(principal, 0) > anyio.current_time():
            return  # so that others pay nothing for budgets
        account = await self.get_account(principal)
        if max_cost is not msgspec.UNSET and max_cost != account.max_cost:
            await self._set_budget(principal, max_cost)
            words = "no budget" if max_cost is None else f"a budget of {max_cost:g} US dollars in a day"
            audit("budget.changed", f"{words} from now on", {"max_cost_per_day": max_cost}, principal)
            account = replace(account, max_cost=max_cost)
        self._unlimited.pop(principal, None)
        if account.max_cost is None:
            if len(self._unlimited) >= MAX_UNLIMITED:
                self._unlimited.clear()
            self._unlimited[principal] = anyio.current_time() + UNLIMITED_S
        if account.is_spent and (key is None or await self.made_by(key) is None):
            at = now()
            wait_s = math.ceil((next_day(at) - at).total_seconds())
            raise TooManyRequests(f"{day_is_spent(account)} The next day begins in {wait_s} s.", wait_s)

    async def get_usage(self, wanted: UsageFilter) -> UsagePage:
        self._check_entered()
        sums, share = UsageSums(wanted), FairShare()
        async for page in self._usage_pages(wanted):
            sums.add(page)
            await share.checkpoint()
        return sums.page

    # Sessions

    async def get_session(self, session_id: str, principal: str | None = None) -> Session:
        usage, total, share = None, 0, FairShare()
        wanted = RunFilter(session_id=session_id, principal=principal)
        while page := await self._spent(wanted):
            for run_id, spent in page:
                with contextlib.suppress(RunNotFound):  # another request has deleted it
                    if spent is None:  # its agents asked no model, or an earlier version stored it
                        spent = (await self.get_outline(run_id)).usage
                    usage, total = added(usage, spent), total + 1
                await share.checkpoint()
            wanted = replace(wanted, after=page[-1][0])
        if not total:
            raise SessionNotFound(session_id)
        return Session(session_id=session_id, total_runs=total, usage=usage)

    async def _spent(self, wanted: RunFilter) -> Sequence[tuple[str, Usage | None]]:
        """Return one page of runs, and what each has spent; None if that must be read from the run."""
        return [(run.run_id, None) for run in await self.list_runs(wanted)]

    async def delete_session(self, session_id: str, principal: str | None = None) -> None:
        wanted = RunFilter(session_id=session_id, principal=principal)
        for status in RunStatus:
            if not status.is_final:
                for run in await self.list_runs(replace(wanted, status=status, limit=1)):
                    raise not_deleted(run)
        page, share = await self.list_runs(wanted), FairShare()
        if not page:
            raise SessionNotFound(session_id)
        while page:
            for run in page:
                with contextlib.suppress(RunNotFound):  # another request has deleted it
                    await self.delete_run(run.run_id)
                await share.checkpoint()
            page = await self.list_runs(replace(wanted, after=page[-1].run_id))

    # Questions

    #: How often the open questions are read for a client that waits, at most, in seconds.
    _questions_interval_s = PROGRESS_INTERVAL_S

    @abstractmethod
    async def _questions(self, wanted: QuestionFilter, since: int | None = None) -> QuestionPage:
        """Return a page of open questions, or of those that have changed *since*; see ``Store.list_questions``."""

    async def list_questions(self, wanted: QuestionFilter, wait_s: float = 0) -> QuestionPage:
        self._check_entered()
        page, share = await self._questions(wanted), FairShare()
        while not page and page.rest is not None:
            await share.checkpoint()
            page = await self._questions(*page.rest)
        if page or not wait_s:
            return page
        with anyio.move_on_after(wait_s):
            async with contextlib.aclosing(self.question_events(wanted)) as events:
                async for event in events:
                    is_asked = event is not None and event[0] == "question.asked"
                    if is_asked and (found := await self.list_questions(wanted)):
                        return found
        return page

    async def question_events(self, wanted: QuestionFilter) -> AsyncGenerator[tuple[str, AskedQuestion] | None, None]:
        self._check_entered()
        known, sent_at, share = dict[tuple[str, str], AskedQuestion](), anyio.current_time(), FairShare()
        wanted, since = replace(wanted, limit=1000), None
        while True:
            changed, page = self._next_change(), await self._questions(wanted, since)
            closed, since = dict(known) if since is None else {}, page.newest
            while True:
                for asked in page:
                    key = asked.run_id, asked.question.call_id
                    closed.pop(key, None)
                    if asked.status == "closed" and key in known:
                        closed[key] = known[key]
                    elif asked.status == "open" and key not in known:
                        known[key] = _without_content(asked)
                        yield "question.asked", asked
                        sent_at = anyio.current_time()
                await share.checkpoint()
                if page.rest is None:
                    break
                page = await self._questions(*page.rest)
            for key, asked in closed.items():
                del known[key]
                yield "question.closed", replace(asked, status="closed")
                sent_at = anyio.current_time()
            if self.is_draining:
                return
            if anyio.current_time() >= sent_at + KEEP_ALIVE_S:
                yield None
                sent_at = anyio.current_time()
            await anyio.sleep(self._questions_interval_s)
            with anyio.move_on_after(KEEP_ALIVE_S):
                await changed()

    # Events

    async def events(
        self, run_id: str, after: int = 0, *, reasoning: bool = False
    ) -> AsyncGenerator[Event | None, None]:
        idle_since: float | None = None
        latest = dict[str, Event]()  # the latest of the stored events without an id
        share = FairShare()
        with self._reader(run_id, after, reasoning=reasoning) as reader:
            flushed: Any = None  # the event before which all that was written is sent
            while True:
                run, event, is_last = None, None, False
                if reader.has_news:
                    run = await reader.read()
                    is_last = run.status.is_final or (self.is_draining and not self._may_end_in_drain(run_id))
                    event = await self._next_event(reader, run, after, latest)
                    if event is None and not is_last:
                        reader.seen()
                # What was written before the event was stored is sent before it.
                key = None if event is None else event.id or (event.name, event.data.get("waiting_for"))
                has_all = reader.live is None or (key is not None and key == flushed) or not reader.live.has_news
                pieces = iter(()) if reader.live is None or has_all else reader.live.events(after)
                if (piece := next(pieces, None)) is not None:
                    flushed = key
                    del run, event  # for a slow client, only one event stays in memory; the rest is read again
                    while piece is not None:
                        yield piece
                        if (piece := next(pieces, None)) is not None:
                            await share.checkpoint()
                    idle_since = time.monotonic()
                    if key is None:  # at the latest when there is more of either, another look follows
                        await reader.changed()
                        share = FairShare()
                    continue
                flushed = None
                if event is not None and run is not None:
                    event = await reader.present(event, run)
                del run
                if event is None and is_last:
                    return
                if event is not None and reader.live is not None:
                    if self._makes_calls(event) and (missed := reader.live.missed_output(event)) is not None:
                        yield missed
                    reader.live.passed(event)
                if event is None:
                    at = time.monotonic()  # anyio's clock takes as long as to send a piece
                    idle_since = idle_since or at
                    if at >= idle_since + KEEP_ALIVE_S - WAKE_INTERVAL_S:
                        yield None
                        idle_since = at
                    await reader.changed()
                    share = FairShare()  # others had their turn
                    continue
                yield event
                idle_since = None
                await share.checkpoint()
                if event.id is None:
                    latest[event.name] = event
                else:
                    after = event.id

    async def _next_event(self, reader: RunReader, run: Run, after: int, latest: dict[str, Event]) -> Event | None:
        """Return the next event of *run* that is stored, after the id *after*, or None."""
        open_step: Event | None = None
        for event in itertools.chain(events_after(run, after), [None]):
            if event is not None and event.id is not None and event.id <= after:
                open_step = event if event.name == "step.started" else None
                continue
            if open_step is not None and (call := await self._next_call(reader, run, open_step, after)) is not None:
                return call
            open_step = None
            if event is None or event.id is not None or event != latest.get(event.name):
                return event
        return None

    async def _next_call(self, reader: RunReader, run: Run, started: Event, after: int) -> Event | None:
        """Return the event of the next stored call after the id *after*, in the step that began with *started*."""
        assert started.id is not None
        position, number = started.data["position"], after - started.id
        is_running = position == len(run.steps)
        has_calls = self._makes_calls(started) if is_running else run.steps[position].call_count > 0
        if not has_calls or number >= EVENTS_PER_STEP - 2:  # the last id of the step is that of its end
            return None
        call = await reader.call(run, position, number)
        return None if call is None else event_of_call(started, number, call)

    def _makes_calls(self, event: Event) -> bool:
        """Whether the agent of *event* may make calls and write live output."""
        agent = self._agents.get(event.data.get("agent_name", ""))
        return agent is None or agent.uses_context

    async def batch_events(self, batch_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        sent, sent_at = (-1, -1), anyio.current_time()
        while True:
            changed, batch = self._next_change(), await self.get_batch(batch_id)
            counts = batch.completed_items, batch.waiting_items
            is_new = batch.attempt > after if batch.status.is_final else counts != sent
            if is_new or anyio.current_time() >= sent_at + KEEP_ALIVE_S:
                sent, sent_at = counts, anyio.current_time()
                yield event_of_batch(batch) if is_new else None
            if batch.status.is_final or self.is_draining:
                return
            await anyio.sleep(PROGRESS_INTERVAL_S)
            with anyio.move_on_after(KEEP_ALIVE_S):
                await changed()


def _without_content(asked: AskedQuestion) -> AskedQuestion:
    """Return *asked* without what holds the whole page in memory."""
    short = {"schema": msgspec.Raw(b"{}"), "arguments": msgspec.UNSET, "default": msgspec.UNSET}
    return replace(asked, question=replace(asked.question, **short))

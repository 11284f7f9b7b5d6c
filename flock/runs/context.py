"""The context of a running agent, which reports progress, writes output, makes calls, calls agents and asks people."""

import asyncio
import copy
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypedDict, TypeVar, Unpack, overload

import msgspec

from flock.errors import CallError, TooManyTokens, cut
from flock.runs.client import ClientSettings, ModelOptions
from flock.runs.ids import now
from flock.runs.records import Call, CallKind, Principal, Progress, Run
from flock.runs.text import safe_text
from flock.runs.traces import current, spent
from flock.runs.usage import Usage

__all__ = ["Budget", "CallOptions", "Live", "RunContext", "StepJournal"]

T = TypeVar("T")
if TYPE_CHECKING:  # a default of a type variable needs Python 3.13
    import typing_extensions

    S = typing_extensions.TypeVar("S", default=Any)
else:
    S = TypeVar("S")

#: The id of the call that the current task, or its thread, is executing; "" outside of calls.
CURRENT_CALL: ContextVar[str] = ContextVar("flock_call", default="")
#: When the blocks of ``RunContext.timeout`` around the current code are over.
CURRENT_LIMITS: ContextVar[tuple[datetime, ...]] = ContextVar("flock_limits", default=())


#: Whether the arguments of a call are stored, or only its result.
CallKeep = Literal["all", "result"]


class CallOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a call is made; see ``RunContext.call``."""

    name: str | None = None
    keep: CallKeep = "all"
    timeout_s: float | None = None
    retries: int = 0
    once: bool = False


class StepJournal(Protocol):
    """Keeps the calls of the running step, and counts its tokens; see ``flock.steps.journal``."""

    @property
    def spent(self) -> Usage:
        """The tokens that the run has used so far."""

    @property
    def call_key(self) -> str:
        """See ``Run``."""

    def spend(self, usage: Usage, model: str | None) -> None: ...

    def call(
        self,
        context: "RunContext",
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: CallOptions,
    ) -> Coroutine[Any, Any, Any]: ...

    def once(
        self,
        label: str,
        key: str,
        execute: Callable[[], Awaitable[Any]],
        *,
        kind: CallKind,
        arguments: msgspec.Raw,
        decode: Callable[[msgspec.Raw], Any],
        should_keep: Callable[[Any], bool] | None = None,
        on_error: Callable[[str], Any] | None = None,
        at_most_once: bool = False,
    ) -> Coroutine[Any, Any, Any]: ...

    def run_agent(
        self, context: "RunContext", name: str, inputs: Mapping[str, Any], keep: CallKeep, options: Mapping[str, Any]
    ) -> Coroutine[Any, Any, dict[str, Any]]: ...

    def ask(
        self,
        context: "RunContext",
        question: str,
        type_: Any,
        name: str | None,
        expires_s: float | None,
        default: Any,
        about: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET,
        answerer: str | None = None,
        *,
        four_eyes: bool = False,
        kind: Literal["client_tool"] | msgspec.UnsetType = msgspec.UNSET,
    ) -> Coroutine[Any, Any, Any]: ...

    def receive(
        self, context: "RunContext", name: str, type_: Any, expires_s: float | None, default: Any
    ) -> Coroutine[Any, Any, Any]: ...

    @property
    def replies(self) -> Sequence[Call]: ...

    def receive_reply(self, name: str, call: msgspec.Raw, type_: Any) -> Coroutine[Any, Any, Any]: ...

    def sleep(self, context: "RunContext", until: Callable[[datetime], datetime]) -> Coroutine[Any, Any, None]: ...

    async def deadline(self, context: "RunContext", seconds: float) -> datetime: ...

    def timer(self, until: datetime) -> Coroutine[Any, Any, None]: ...

    def note_answer(self) -> None: ...

    @property
    def is_suspended(self) -> bool:
        """Whether the step was ended to start again later or elsewhere."""


class Live(Protocol):
    """The text that the agents of a run write for its readers; see ``flock.steps.live``. It is thread-safe."""

    def write(self, writer: "RunContext", field: str, text: str) -> None: ...

    def write_value(self, writer: "RunContext", field: str, value: Any) -> None: ...

    def write_reasoning(self, writer: "RunContext", text: str) -> None: ...

    def reset(self, writer: "RunContext") -> None: ...

    def settle(self, writer: "RunContext", result: msgspec.Raw, *, has_missed: bool) -> None: ...


class Budget(Protocol):
    """The limit of what a run may cost; see ``flock.models.prices``."""

    def check(self, agent_name: str, models: Sequence[str]) -> None: ...

    def reserve(self, model: str, prompt: Any, max_tokens: int | None) -> AbstractAsyncContextManager[None]: ...


class _WaitOptions(TypedDict, total=False):
    expires_s: float | None
    default: Any


class _AskOptions(_WaitOptions, total=False):
    name: str | None
    answerer: str | None


#: How long a run may sleep, in seconds: ten years.
MAX_SLEEP_S = 10 * 365 * 86_400


class RunContext(Generic[S]):
    """The context of a running step. It is passed to the parameter annotated with this type, and is thread-safe.

    ``RunContext[Pool]`` says that ``state`` is a ``Pool``.

    Attributes:
        run_id, agent_name, attempt, request_id, session_id: of the run.
        traceparent: the W3C trace context to send on: that of the current span, or without spans that of the request.
        principal: the principal who sent the request of the run, or of its batch, with its roles at that time.
            None without API keys and ``auth=``.
        position: of the step in the run, from 0.
        call_id: of the call of the step that this agent executes; "" if the agent is that of the step.
        step_key: idempotency key of this step, ``run:{run_id}/{position}``, from 0. It stays the same if the step is
            repeated after a crash or in a retry, unless that executes all calls again. Send it as ``Idempotency-Key``
            to paid services. If a step makes several calls, append a suffix of your own to each.
        model_key: the same for calls of models. It changes with each retry, since a provider may repeat its answer.
        is_item: whether the run is an item of a batch.
        client: what the client of the run has brought for its models; None if nothing, and in an agent that was called.
        cancel_requested: True after cancellation of the run was requested. A synchronous function should check it
            regularly, and return or raise. An async function is cancelled at its next await, so it need not check.
    """

    def __init__(
        self,
        run: Run,
        agent_name: str,
        on_progress: Callable[[Progress | None], None],
        journal: StepJournal | None = None,
        *,
        on_usage: Callable[[str, Usage, str | None], None] = lambda agent_name, usage, model: None,
        max_tokens: int | None = None,
        live: Callable[[], Live | None] = lambda: None,
        output_names: Sequence[str] = (),
        priced: Callable[[Usage, str | None], Usage] = lambda usage, model: usage,
        budgets: Sequence[Budget] = (),
        state: Callable[[], Any] = lambda: None,
    ) -> None:
        self.run_id = run.run_id
        self.agent_name = agent_name
        self.position = len(run.steps)
        self.call_id = ""
        self.attempt = run.attempt
        self.request_id = run.request_id
        self.session_id = run.session_id
        self.principal: Principal | None = run.acts_for
        self._traceparent = run.traceparent
        self.client: ClientSettings | None = run.client
        #: of the call of ``run_agent`` that this agent executes
        self.model_options: Mapping[str, Any] = {}
        self.is_item = run.batch_id is not None
        #: the progress that the agents of the step have reported last
        self._reported: list[Progress] = []
        self.step_key = self._root_key = run.step_key(len(run.steps))
        self.model_key = self._root_model_key = run.model_key(len(run.steps))
        self._cancel_requested: list[bool] = []
        self._on_progress = on_progress
        self._on_usage = on_usage
        self._max_tokens = max_tokens
        self._priced = priced
        self._budgets = budgets
        self._state = state
        self._journal = journal
        self._live = live
        self._output_names = output_names
        self._began_in: Live | msgspec.UnsetType | None = msgspec.UNSET

    @property
    def state(self) -> S:
        """What ``Flock(state=…)`` has set up in this process.

        Raises: CallError if the flock has no state; EngineStopped if the engine has ended.
        """
        state: S = self._state()
        return state

    @property
    def traceparent(self) -> str | None:
        return current(self._traceparent)

    @property
    def cancel_requested(self) -> bool:
        return bool(self._cancel_requested)

    def request_cancel(self) -> None:
        """Set ``cancel_requested``, for this agent and those that this step has called."""
        self._cancel_requested.append(True)

    def with_options(self, options: Mapping[str, Any]) -> "RunContext":
        """Return this context for an agent that is called with options of its model. Only an engine uses it."""
        context = copy.copy(self)
        context.model_options = options
        return context

    def of_called_agent(self, agent_name: str, output_names: Sequence[str] = ()) -> "RunContext":
        """Return the context of an agent that the current call executes. Only an engine uses it."""
        context = copy.copy(self)
        context.agent_name = agent_name
        context.step_key = self.idempotency_key
        context.call_id = CURRENT_CALL.get()
        context.client = None
        context.model_key = f"{self._root_model_key}/{context.call_id}"
        context._output_names = output_names
        context._began_in = msgspec.UNSET
        return context

    # Output while it is written

    @property
    def is_watched(self) -> bool:
        """Whether it is worth writing the output piece by piece: the run is asynchronous, or somebody reads it now."""
        return self._live() is not None

    def emit(self, text: str, field: str | None = None) -> None:
        """Append *text* to a field of the output, for clients that read the run's events now. Nothing is stored.

        The result of the agent is what counts: if it differs in the end, clients get the right text instead.

        Args:
            field: of the output. By default the first one that is a string, or else the first one.

        Raises: ValueError if the output has no such field.
        """
        names = self._output_names
        if field is None:
            field = names[0] if names else "result"
        elif names and field not in names:
            raise ValueError(
                f"The output of {self.agent_name!r} has no field {field!r}. Its fields: {', '.join(names)}."
            )
        if (live := self._live_from_start()) is not None and text:
            live.write(self, field, text)

    def emit_value(self, field: str, value: Any) -> None:
        """Set a field of the output that is not written piece by piece, like ``emit``."""
        if (live := self._live_from_start()) is not None:
            live.write_value(self, field, value)

    def _live_from_start(self) -> Live | None:
        """Return the live output, unless a part of what this agent has written is missing in it."""
        live = self._live()
        if self._began_in is msgspec.UNSET:
            self._began_in = live
        return live if live is self._began_in else None

    def emit_reasoning(self, text: str) -> None:
        """Append *text* to the reasoning of the model, for clients that ask for it."""
        if (live := self._live()) is not None:
            live.write_reasoning(self, text)

    def reset_output(self) -> None:
        """Drop what this agent has written in this execution. It starts again. No effect if it has written nothing."""
        self._began_in = msgspec.UNSET
        if (live := self._live()) is not None:
            live.reset(self)

    def settle_output(self, result: msgspec.Raw) -> None:
        """Correct the output that clients have received to *result*, if this agent has written any. Engines call it."""
        if (live := self._live()) is not None:
            has_missed = self._began_in is not msgspec.UNSET and self._began_in is not live
            live.settle(self, result, has_missed=has_missed)

    def call(
        self,
        function: Callable[..., Any],
        /,
        *args: Any,
        call_name: str | None = None,
        call_keep: CallKeep = "all",
        call_timeout_s: float | None = None,
        call_retries: int = 0,
        call_once: bool = False,
        **kwargs: Any,
    ) -> Coroutine[Any, Any, Any]:
        """Execute a function once, and store its result.

        If the step runs again after a crash, the stored result is returned and the function is not executed. If it has
        raised an exception, an equal one is raised. So put side effects into calls: the code around them runs again.
        Calls may be made at the same time.

        Args:
            function: async, or sync, which runs in a worker thread. It is identified by its name, without its module,
                and its arguments, as their types read them. A parameter annotated with ``RunContext`` receives this
                context.
            call_name: identifies the call instead of its arguments. Equal calls are numbered in their order. ``name=``
                and ``keep=`` mean the same as ``call_name=`` and ``call_keep=`` if the function has no such parameter.
            call_keep: "result" does not store the arguments. Use it if they are long or secret: they cannot be guessed
                from the id of the call either, which has a digest of them with a secret key of the run.
            call_timeout_s: seconds for each try, without the time in which it waits for a person. Then the call raises
                TimeoutError. A function in a thread is waited for, and its result counts even if it is late.
            call_retries: how many more times to execute the function if it raises. The pauses grow from half a second
                to eight seconds. All tries have the same ``idempotency_key``.
            call_once: never execute the function a second time. Its start is stored before it is executed. If it was
                started and its end is not stored, because the process died or it was cancelled, the call raises
                Uncertain. If it has raised, it raises the same whenever it is made. Only a retry with
                ``{"calls": "again"}`` executes it again.

        Returns: the result, as its return type reads it from JSON. Without a return type, it is plain JSON values.

        Raises:
            CallError: the agent is not async; the arguments or the result cannot be JSON; the result does not match the
                return type; or another function has the same name and its call the same id.
            Uncertain: it was started before with ``call_once``, and its end is not known.
            Exception: what the function raises. If the step runs again, an equal exception, or a CallError with its
                text if none can be made from JSON.

        Cancellation: a call that the program cancels is stored as cancelled: if the step runs again, it is not executed
            but waits to be cancelled again. If the run or the step ends, it is not stored. A synchronous function is
            waited for, and the next equal call returns its result.
        """
        options = CallOptions(
            name=call_name, keep=call_keep, timeout_s=call_timeout_s, retries=call_retries, once=call_once
        )
        return self.journal.call(self, function, args, kwargs, options)

    def run_agent(
        self, name: str, inputs: Mapping[str, Any], *, call_keep: CallKeep = "all", options: ModelOptions | None = None
    ) -> Coroutine[Any, Any, dict[str, Any]]:
        """Let another agent of the flock run, as a call of this step, and return its result.

        The agent runs in the slot of this run, and counts towards its own ``max_concurrency``. If it hands off, the
        next agents run too, each as a call of its own. Their tokens count as those of this step.

        Args:
            name: of an agent of the same flock.
            inputs: one value for each field of its input signature.
            call_keep: "result" does not store the inputs, as for ``call``. What the agent does with them is stored as
                usual.
            options: options of its model for this call, in place of the agent's own; see ``ModelOptions``. They
                identify the call, together with the inputs. Agents to which it hands off do not get them.

        Returns: the outputs of the last agent, as JSON values.

        Raises:
            CallError: this agent is not async, or the inputs are invalid, or there is no such agent, or it may not be
                repeated (``on_interrupt="fail"``), or it has no model for *options*, or they are invalid.
            InvalidHandoff, TooManySteps: the agent hands off to an agent that does not exist, or too many times.
            Exception: what the agent raises.

        Cancellation: as for ``call``.
        """
        return self.journal.run_agent(self, name, inputs, call_keep, options or {})

    @property
    def journal(self) -> StepJournal:
        """The calls of the step. Agents may call ``once`` of it; see ``flock.steps.journal``."""
        assert self._journal is not None, "an engine made this context"
        return self._journal

    @overload
    def ask(self, question: str, type: type[T], /, **options: Unpack[_AskOptions]) -> Coroutine[Any, Any, T]: ...

    @overload
    def ask(self, question: str, type: Any, /, **options: Unpack[_AskOptions]) -> Coroutine[Any, Any, Any]: ...

    def ask(
        self,
        question: str,
        type: Any,
        /,
        *,
        name: str | None = None,
        expires_s: float | None = None,
        default: Any = msgspec.UNSET,
        answerer: str | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Ask a person. The run waits for the answer, and uses no memory and no slot meanwhile.

        The step ends here, and runs again at the first answer: calls that have finished are not executed again, but
        the code around them is. Calls that run at the same time are finished first.

        Args:
            question: identifies the call, together with the type. Equal questions are numbered in their order.
            type: of the answer: any type that can be read from JSON. People see its JSON Schema.
            name: identifies the call instead of the question, for one whose text changes.
            expires_s: how long to wait, in seconds. Then the run fails as "expired". By default without a limit.
            default: the answer if nobody has answered in time.
            answerer: the role of those who may answer, which is one of ``Principal``, or of an API key; None means the
                owner of the run and admins.

        Returns: the answer, read from JSON as *type*.

        Raises: CallError if the agent is not async; *type* cannot be read from JSON; or nobody can be asked, because
            the run is executed without a server.

        Cancellation: the question is not asked.
        """
        return self.journal.ask(self, question, type, name, expires_s, default, answerer=answerer)

    def sleep(self, seconds: float) -> Coroutine[Any, Any, None]:
        """Sleep. The run is "waiting" and uses no memory and no slot meanwhile, unless it is for less than 5 seconds.

        The step ends here, as it does for ``ask``, and runs again when the time has come, also after a restart. The
        wake-up time is on disk, by the clock of the machine. The sleep is identified by its order in the step, and not
        by its time, which may be computed from the clock.

        Raises: CallError if the agent is not async, or *seconds* is negative or above ten years.

        Cancellation: the sleep is over. One of less than 5 seconds begins again after a crash.
        """
        if not 0 <= seconds <= MAX_SLEEP_S:
            raise CallError(f"A run can sleep 0 to {MAX_SLEEP_S} seconds, not {seconds}.")
        return self.journal.sleep(self, lambda at: at + timedelta(seconds=seconds))

    def sleep_until(self, time: datetime) -> Coroutine[Any, Any, None]:
        """Sleep until *time*, like ``sleep``. It must have a time zone, such as ``datetime.now(UTC)`` has.

        If it is over already, this returns at once.

        Raises: CallError, as ``sleep``, and if *time* has no time zone.
        """
        if time.tzinfo is None:
            raise CallError(
                f"The time {time.isoformat()} has no time zone. Use datetime(…, tzinfo=UTC), or a ZoneInfo."
            )
        time = time.astimezone(UTC)
        if (time - now()).total_seconds() > MAX_SLEEP_S:
            raise CallError(f"A run can sleep up to {MAX_SLEEP_S} seconds, not until {time.isoformat()}.")
        return self.journal.sleep(self, lambda at: time)

    @asynccontextmanager
    async def timeout(self, seconds: float) -> AsyncIterator[None]:
        """Raise TimeoutError in the block if it takes longer: ``async with context.timeout(3600): …``.

        The time counts from the first start of the block, on disk, also while the run waits and across restarts. When
        it is over, calls of the block are cancelled, as by ``asyncio.timeout``, whose time would begin again whenever
        the step runs again. It needs asyncio. If *seconds* differ when the step runs again, the time counts from then.

        Raises: CallError if the agent is not async, or *seconds* is not above 0 and at most ten years; TimeoutError.
        """
        if not 0 < seconds <= MAX_SLEEP_S:
            raise CallError(f"A time-out must be above 0 and at most {MAX_SLEEP_S} seconds, not {seconds}.")
        until, is_over = await self.journal.deadline(self, seconds), False

        def expire(timer: asyncio.Task[None]) -> None:
            if not (is_over or timer.cancelled()):
                limit.reschedule(0)

        async with asyncio.timeout(None) as limit:
            timer = asyncio.create_task(self.journal.timer(until))
            timer.add_done_callback(expire)
            reset = CURRENT_LIMITS.set((*CURRENT_LIMITS.get(), until))
            try:
                yield
            finally:
                is_over = True
                with suppress(ValueError):  # another task may close a generator that is in the block
                    CURRENT_LIMITS.reset(reset)
                if not timer.done():
                    timer.cancel()
                    await asyncio.wait([timer])
                elif not timer.cancelled():
                    timer.result()

    @overload
    def receive(self, name: str, type: type[T], /, **options: Unpack[_WaitOptions]) -> Coroutine[Any, Any, T]: ...

    @overload
    def receive(self, name: str, type: Any, /, **options: Unpack[_WaitOptions]) -> Coroutine[Any, Any, Any]: ...

    def receive(
        self, name: str, type: Any, /, *, expires_s: float | None = None, default: Any = msgspec.UNSET
    ) -> Coroutine[Any, Any, Any]:
        """Receive a message of another system, which sends it by ``POST /run/{run_id}/messages/{name}``.

        The run waits as it does for ``ask``. Messages of one name are received in the order in which they were sent.
        One that was sent before is kept. If it does not fit, it is dropped, and shown as a failed call of the run.

        Args:
            name: of the message: 1 to 128 letters, digits, "_", "-" and ".".
            type: of the message: any type that can be read from JSON. One that does not fit is rejected while the run
                waits for it.
            expires_s: how long to wait, in seconds. Then the run fails as "expired". By default without a limit.
            default: what is received if no message has come in time.

        Returns: the message, read from JSON as *type*.

        Raises: CallError, as ``ask``.

        Cancellation: no message is received.
        """
        return self.journal.receive(self, name, type, expires_s, default)

    @property
    def is_suspending(self) -> bool:
        """Whether the step is being ended to run again, when it need not wait any more. Use it in ``finally`` blocks.

        ``finally``, ``except BaseException`` and the ends of ``async with`` are executed each time that a step ends to
        wait.
        """
        return self.journal.is_suspended

    @property
    def idempotency_key(self) -> str:
        """The idempotency key of the call that is executing, or ``step_key`` outside of a call."""
        call_id = CURRENT_CALL.get()
        return f"{self._root_key}/{call_id}" if call_id else self.step_key

    def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Report the progress of the work. Of many calls in a short time, only the last one is stored.

        A message longer than 8 KiB is truncated.

        Raises: TypeError or ValueError if *done* or *total* is not a finite number.
        """
        numbers = [None if number is None else float(number) for number in (done, total)]
        if numbers[0] is None or not all(math.isfinite(number) for number in numbers if number is not None):
            raise ValueError(f"Progress must be given in finite numbers, not as {done!r} of {total!r}.")
        progress = Progress(done=numbers[0], total=numbers[1], message=cut(safe_text(message)))
        self._reported[:] = [progress]
        self._on_progress(progress)

    def report_wait(self, reason: str | None) -> None:
        """Show what the step waits for as the message of its progress; None if it no longer waits."""
        reported = self._reported[0] if self._reported else None
        if reason is not None:
            reported = msgspec.structs.replace(reported or Progress(done=0), message=reason)
        self._on_progress(reported)

    def spend(self, usage: Usage, model: str | None = None) -> None:
        """Report the tokens of a model's answer, whether or not the answer is usable.

        Args:
            model: the model that answered, ``provider/model``. Without it, the cost of the run is unknown.
        """
        usage = self._priced(usage, model)
        spent(usage)
        if self._journal is not None:
            self._journal.spend(usage, model)
        self._on_usage(self.agent_name, usage, model)

    @asynccontextmanager
    async def reserve(self, model: str, prompt: Any, max_tokens: int | None) -> AsyncIterator[None]:
        """Reserve what a call of *model* will probably cost, if there is a limit; see ``Budget``."""
        async with AsyncExitStack() as reserved:
            for budget in self._budgets:
                await reserved.enter_async_context(budget.reserve(model, prompt, max_tokens))
            yield

    def check_tokens(self, models: Sequence[str] = ()) -> None:
        """Check that the run may call one of *models*. An agent must call this before each model call of its own.

        Raises: TooManyTokens if it has no tokens left; CostLimit if its ``max_cost`` or the ``max_cost_per_day`` of its
            principal is spent, or it has one of these and one of *models* has no price.
        """
        for budget in self._budgets:
            budget.check(self.agent_name, models)
        if self._max_tokens is None or self._journal is None:
            return
        used = self._journal.spent.input_tokens + self._journal.spent.output_tokens
        if used >= self._max_tokens:
            raise TooManyTokens(
                f"Stopped after {used} tokens, before {self.agent_name!r} called its model. One run may use "
                f"{self._max_tokens} tokens (max_tokens of the engine)."
            )
